"""What conversion refuses, which cases fail alone, and what a second run does."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from foreign_layouts import (
    ALL_BUT_DUODENUM,
    AMOS,
    BTCV,
    CASES,
    annotated,
    check_converted,
    renumbered,
    voxels,
    write_labels,
    write_pairs,
)
from helpers import files_in
from warm import run_script

from core.scans.organ_names import organ_names_extension
from data import doctor
from data.converted import DataFolder
from data.layouts import SourceCase
from dataset import find_cases

ROOT = Path(__file__).resolve().parents[2]


def test_unknown_layouts_and_ids_are_refused_in_one_sentence(phantoms, run, tmp_path):
    empty = tmp_path / "empty"
    (empty / "scans").mkdir(parents=True)
    code, _, err, data = run(empty)
    assert (code, err.count("\n"), data.exists()) == (2, 1, False)
    assert "no layout that is known, found scans/; known are: imagesTr and labelsTr" in err
    code, _, err, _ = run(tmp_path, to=tmp_path / "inside")
    assert (code, "write into a folder outside of it" in err) == (2, True)
    code, _, err, _ = run(tmp_path / "nowhere")
    assert (code, "no such folder" in err) == (2, True)
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", "case_{}.nii.gz", "case_{}.nii.gz", AMOS)
    code, _, err, _ = run(source)
    assert (code, err.count("\n"), "nothing says which organs the ids are" in err) == (2, 1, True)
    assert "found case_1" in err
    code, _, err, data = run(source, "--source-organs", "6=liver", "1=spleen")
    assert code == 1
    assert "case case_1: " in err
    assert "ids without a name: 2 (" in err
    assert not (data / "labels" / "case_1.nii.gz").exists()
    (source / "images").mkdir()
    (source / "labels").mkdir()
    code, _, err, _ = run(source, "--layout", "amos", to=tmp_path / "two")
    assert (code, "several layouts" in err) == (2, True)
    (source / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}}))
    shutil.rmtree(source / "images")
    code, _, err, _ = run(source, "--layout", "amos", to=tmp_path / "two")
    assert (code, "id 1 is 'liver', but 'spleen' in amos" in err) == (2, True)


def test_no_organ_of_the_list(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", "c{}.nii.gz", "c{}.nii.gz", {1: 1})
    (source / "dataset.json").write_text(json.dumps({"labels": {"Vessel": 1}}))
    code, _, err, _ = run(source)
    assert (code, "none of the source's organs (Vessel) is in the organ list" in err) == (2, True)


def test_voxels_that_nobody_annotated(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", "c{}.nii.gz", "c{}.nii.gz", {1: 1, 3: 2})
    (source / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "ignore": 2}}))
    code, _, err, data = run(source)
    assert (code, "voxels are 'ignore' (id 2), which nobody annotated" in err) == (1, True)
    code, _, _, data = run(source, "--source-organs", "2=background")
    assert code == 0
    check_converted(data, phantoms, "c{}", [1])


def test_one_bad_case_leaves_the_others(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    labels = source / "label" / "label0002.nii.gz"
    good = labels.read_bytes()
    write_labels(phantoms[0][0], voxels(labels)[:-1], labels)
    shutil.copyfile(source / "img" / "img0001.nii.gz", source / "img" / "img0003.nii.gz")
    shutil.copyfile(source / "img" / "img0001.nii.gz", source / "img" / "img0000.nii.gz")
    broken = source / "label" / "label0000.nii.gz"
    broken.write_bytes(good[: len(good) // 2])
    code, out, err, data = run(source)
    assert code == 1
    assert "case img0002: the scan has" in err
    assert f"case img0000: {broken}: " in err
    assert "case img0003: no label map for" in err
    assert "1 cases converted, 0 were finished before, 3 failed" in out
    assert [case.id for case in find_cases(data)] == ["img0001"]
    assert annotated(data) == {"img0001": ALL_BUT_DUODENUM}
    first = (data / "labels" / "img0001.nii.gz").stat().st_mtime_ns
    labels.write_bytes(good)
    for path in (source / "img" / "img0003.nii.gz", source / "img" / "img0000.nii.gz", broken):
        path.unlink()
    code, out, _, _ = run(source)
    assert (code, "1 cases converted, 1 were finished before, 0 failed" in out) == (0, True)
    assert (data / "labels" / "img0001.nii.gz").stat().st_mtime_ns == first
    check_converted(data, phantoms, "img{:04d}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13])


def test_a_case_that_is_damaged_later_goes(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    run(source)
    (source / "label" / "label0002.nii.gz").write_bytes(b"no label map")
    code, out, _, data = run(source)
    assert (code, "0 cases converted, 1 were finished before, 1 failed" in out) == (1, True)
    assert [case.id for case in find_cases(data)] == ["img0001"]
    assert list(annotated(data)) == ["img0001"]


def test_a_link_that_leads_nowhere_costs_its_case_alone_also_in_a_second_run(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    (source / "label" / "label0002.nii.gz").unlink()
    (source / "label" / "label0002.nii.gz").symlink_to("nowhere")
    for before in (0, 1):
        code, out, err, _ = run(source)
        assert (code, f"{1 - before} cases converted, {before} were finished before, 1 failed" in out) == (1, True)
        assert "case img0002" in err
        assert "is a link to nowhere, which does not exist" in err


def test_two_cases_of_one_name(phantoms, run, tmp_path):
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    write_pairs(phantoms[1:], source, "imagesVa", "labelsVa", names, names, AMOS)
    code, out, err, _ = run(source)
    assert (code, "1 failed" in out) == (1, True)
    assert "imagesVa/amos_0001.nii.gz is a second case of this name" in err


def test_a_second_run_follows_changes_and_touches_nothing_of_others(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    _, _, _, data = run(source)
    # Other names for the same ids: both cases are converted again.
    code, out, _, _ = run(source, "--source-organs", "6=background")
    assert (code, "2 cases converted, 0 were finished before" in out) == (0, True)
    assert "liver" not in annotated(data)["img0001"]
    assert not np.any(voxels(data / "labels" / "img0001.nii.gz") == 1)
    assert (data / "images" / "img0001_0000.nii.gz").samefile(source / "img" / "img0001.nii.gz")
    code, _, err, _ = run(source, "--organs", "liver")
    assert (code, "was converted with other organs" in err) == (2, True)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    code, _, err, _ = run(copy)
    assert (code, "has a case of this name already, from" in err) == (1, True)
    foreign = tmp_path / "foreign"
    for name in ("images", "labels"):
        (foreign / name).mkdir(parents=True)
    (foreign / "labels" / "img0001.nii.gz").write_bytes(b"mine")
    code, _, err, _ = run(source, to=foreign)
    assert (code, "from elsewhere" in err) == (1, True)
    assert (foreign / "labels" / "img0001.nii.gz").read_bytes() == b"mine"
    assert sorted(path.name for path in (foreign / "images").iterdir()) == ["img0002_0000.nii.gz"]


def test_settings_in_organs_yaml_stay_and_a_foreign_one_is_kept(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    other = tmp_path / "other"
    other.mkdir()
    (other / "organs.yaml").write_text("organs: [background, tumour]")
    _, _, err, _ = run(source, to=other)
    assert (other / "organs.yaml.old").read_text() == "organs: [background, tumour]"
    assert f"so the earlier organs.yaml is now {other / 'organs.yaml.old'}" in err
    with open(other / "organs.yaml", "a") as file:
        file.write("size: [64, 64, 48]  # mine\npatch_size: [96, 96, 64]  # with --size\n")
    before = (other / "organs.yaml").read_bytes()
    code, _, err, _ = run(source, to=other)
    assert (code, "organs.yaml" in err) == (0, False)
    assert (other / "organs.yaml").read_bytes() == before


def kill(folder: DataFolder, *_: object) -> None:
    """End the command as SIGKILL does: nothing is written any more."""
    folder.save = lambda: None
    raise KeyboardInterrupt


def test_lines_of_annotated_csv_that_somebody_has_changed_stay(phantoms, run, tmp_path, monkeypatch):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    _, _, _, data = run(source)
    table = data / "annotated.csv"
    table.write_text("case,organs\nimg0001,liver\nmine,spleen\n")
    (data / "labels" / "img0002.nii.gz").unlink()
    code, out, _, _ = run(source)
    assert (code, "1 cases converted, 1 were finished before" in out) == (0, True)
    assert annotated(data) == {"img0001": ["liver"], "mine": ["spleen"], "img0002": ALL_BUT_DUODENUM}
    # A conversion that is killed leaves no line of the one before.
    monkeypatch.setattr(DataFolder, "finish", kill)
    with pytest.raises(KeyboardInterrupt):
        run(source, "--source-organs", "6=background")
    assert annotated(data) == {"mine": ["spleen"]}
    monkeypatch.undo()
    # Nothing is written where nothing is converted.
    other = tmp_path / "other"
    shutil.copytree(data / "images", other / "images")
    shutil.copytree(data / "labels", other / "labels")
    shutil.copy(table, other)
    before = files_in(other)
    code, _, err, _ = run(source, to=other)
    assert (code, err.count("from elsewhere")) == (1, 2)
    assert files_in(other) == before


def test_a_killed_conversion_and_two_at_once_keep_what_is_annotated(phantoms, run, tmp_path, monkeypatch):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    names = "amos_{:04d}.nii.gz"
    other = write_pairs(phantoms, tmp_path / "o", "imagesTr", "labelsTr", names, names, AMOS)
    finish = DataFolder.finish

    def finish_after_another(folder: DataFolder, case: SourceCase, *about: object) -> None:
        monkeypatch.setattr(DataFolder, "finish", finish)
        run(other)
        finish(folder, case, *about)
        monkeypatch.setattr(DataFolder, "finish", kill)  # the second case is never finished

    monkeypatch.setattr(DataFolder, "finish", finish_after_another)
    with pytest.raises(KeyboardInterrupt):
        run(source)
    data = tmp_path / "data"
    assert list(annotated(data)) == ["amos_0001", "amos_0002", "img0001"]
    monkeypatch.undo()
    code, out, _, _ = run(source)
    assert (code, "1 cases converted, 1 were finished before" in out) == (0, True)
    assert sorted(json.loads((data / "convert.json").read_text())["cases"]) == list(annotated(data))
    assert annotated(data)["img0002"] == ALL_BUT_DUODENUM


def test_our_own_layout_keeps_what_is_annotated_and_made_labels_are_refused(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    _, _, _, ours = run(source)
    (ours / "annotated.csv").write_text("case,organs\nimg0001,liver;left kidney\n")
    code, _, _, data = run(ours, "--organs", "spleen", "left kidney", to=tmp_path / "two")
    assert code == 0
    assert annotated(data) == {"img0001": ["left kidney"], "img0002": ["spleen", "left kidney"]}
    (ours / "weights.csv").write_text("case,weight\nimg0001,0.9\n")
    code, _, err, _ = run(ours, to=tmp_path / "three")
    assert (code, "weights.csv says that a network has made its labels" in err) == (2, True)
    assert not (tmp_path / "three").exists()


def name_ids(labels: Path, *organs: str) -> None:
    """Write organ names into a label map's header: of the ids 1, 2 and so on."""
    image = nib.load(labels)
    named = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
    named.header.extensions.append(organ_names_extension(["background", *organs]))
    nib.save(named, labels)


def test_source_organs_keep_what_the_source_annotates_under_its_own_names(phantoms, run, tmp_path):
    ids = {1: 1, 13: 2, 2: 3}
    source = write_pairs(phantoms, tmp_path / "s", "images", "labels", "c{}_0000.nii.gz", "c{}.nii.gz", ids)
    for case in ("c1", "c2"):
        name_ids(source / "labels" / f"{case}.nii.gz", "liver", "LK", "RK")
    (source / "annotated.csv").write_text("case,organs\nc1,liver;LK;RK\nc2,liver;right kidney\n")
    kidneys = ["--organs", "liver", "left kidney", "right kidney"]
    code, _, err, data = run(source, *kidneys, "--source-organs", "2=left kidney", "3=right kidney")
    assert (code, err) == (0, "")
    assert annotated(data) == {"c1": ["liver", "left kidney", "right kidney"], "c2": ["liver", "right kidney"]}


def test_a_header_that_names_fewer_organs_annotates_these_and_what_its_label_map_holds(phantoms, run, tmp_path):
    source = write_pairs([phantoms[0]] * 3, tmp_path / "s", "images", "labels", "c{}.nii.gz", "c{}.nii.gz", {1: 1})
    write_labels(phantoms[0][1], renumbered(phantoms[0][1], {3: 2}), source / "labels" / "c3.nii.gz")
    for case, names in (("c1", ["liver", "spleen"]), ("c2", ["liver"]), ("c3", ["liver"])):
        name_ids(source / "labels" / f"{case}.nii.gz", *names)
    code, _, err, data = run(source, "--organs", "liver", "spleen", "pancreas")
    assert (code, err) == (0, "")
    # The third holds the spleen without naming it, and names the liver without holding it.
    assert annotated(data) == {"c1": ["liver", "spleen"], "c2": ["liver"], "c3": ["liver", "spleen"]}


def test_dataset_json_may_name_ids_that_no_voxel_has(phantoms, run, tmp_path):
    names = "case_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", names, names, {1: 1})
    table = {"modality": "CT", "labels": {"background": 0, "liver": 1, "unknown": 999}}
    (source / "dataset.json").write_text(json.dumps(table))
    code, _, err, data = run(source)
    assert code == 0, err
    assert annotated(data)["case_0001"] == ["liver"]


def test_organs_in_no_case_are_doubted(phantoms, run, tmp_path):
    """Some copies of BTCV lack organs that the collection has."""
    few = {organ: other for organ, other in BTCV.items() if organ not in (7, 8)}
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", few)
    code, _, err, data = run(source)
    assert code == 0
    assert "in none of 2 cases: right adrenal gland, left adrenal gland; annotated.csv says" in err
    assert "--source-organs 12=background 13=background" in err
    code, _, err, _ = run(source, "--source-organs", "12=background", "13=background")
    assert (code, err) == (0, "")
    assert annotated(data)["img0002"] == [name for name in ALL_BUT_DUODENUM if "adrenal" not in name]


def raise_other_disk(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_scans_are_linked_or_copied(phantoms, run, tmp_path, monkeypatch):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    scan = source / "img" / "img0001.nii.gz"
    _, _, _, linked = run(source)
    _, _, _, copied = run(source, "--copy", to=tmp_path / "copied")
    assert (linked / "images" / "img0001_0000.nii.gz").samefile(scan)
    monkeypatch.setattr(os, "link", raise_other_disk)
    _, _, _, symbolic = run(source, to=tmp_path / "symbolic")
    assert (symbolic / "images" / "img0001_0000.nii.gz").readlink() == scan.resolve()
    assert [case.id for case in find_cases(symbolic)] == ["img0001", "img0002"]
    copy = copied / "images" / "img0001_0000.nii.gz"
    assert not copy.samefile(scan)
    assert copy.read_bytes() == scan.read_bytes()


def test_copy_in_a_second_run_replaces_links_by_copies_and_nothing_else(phantoms, run, tmp_path, monkeypatch):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    run(source, to=tmp_path / "hard")
    monkeypatch.setattr(os, "link", raise_other_disk)
    run(source, to=tmp_path / "symbolic")
    for data in (tmp_path / "hard", tmp_path / "symbolic"):
        edited = data / "labels" / "img0001.nii.gz"
        edited.write_bytes(b"edited by hand")
        code, out, _, _ = run(source, "--copy", to=data)
        assert (code, "0 cases converted, 2 were finished before" in out) == (0, True)
        for case, (scan, _) in zip(("img0001", "img0002"), phantoms, strict=True):
            copy, original = data / "images" / f"{case}_0000.nii.gz", source / "img" / f"{case}.nii.gz"
            assert (copy.is_symlink(), copy.samefile(original)) == (False, False)
            assert copy.read_bytes() == original.read_bytes() == scan.read_bytes()
        assert edited.read_bytes() == b"edited by hand"
        written = copy.stat().st_mtime_ns
        run(source, "--copy", to=data)
        assert copy.stat().st_mtime_ns == written


def test_simpleitk_formats_say_what_to_install(phantoms, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "s" / part).mkdir(parents=True)
        (tmp_path / "s" / part / "a.mha").write_bytes(b"ObjectType = Image\n")
    code, _, err, data = run(tmp_path / "s", "--layout", "amos")
    assert (code, err.count("\n"), data.exists()) == (2, 1, False)
    assert "a.mha: .mha files (2) are read with SimpleITK; pip install SimpleITK" in err


def test_simpleitk_formats_are_read(phantoms, run, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    for path in [*source.rglob("*.nii.gz")]:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ".mha"))
        path.unlink()
    code, _, _, data = run(source)
    assert code == 0
    for case, (scan, labels) in zip(find_cases(data), phantoms, strict=True):
        np.testing.assert_array_equal(voxels(case.labels), voxels(labels))
        np.testing.assert_array_equal(voxels(case.scan), voxels(scan))
        np.testing.assert_allclose(nib.load(case.labels).affine, nib.load(labels).affine, atol=1e-3)


@pytest.mark.slow
def test_the_command_ends_with_the_doctor(phantoms, tmp_path, run_main):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    done = run_script("-m", "data.convert", source, tmp_path / "data")
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "data" / "doctor" / "doctor.json").read_text())
    assert sorted(report["cases"]) == ["img0001", "img0002"]
    assert done.returncode == any(finding["severity"] == "error" for finding in report["findings"])
    # The duodenum is in the list, and BTCV does not annotate it: the doctor does not miss it.
    assert "organ_absent" not in {finding["code"] for finding in report["findings"]}
    assert "without duodenum" not in done.stdout
    (tmp_path / "data" / "annotated.csv").unlink()
    code, out, _ = run_main(doctor, tmp_path / "data", "--workers", "1")
    assert (code, out.count("without duodenum")) == (done.returncode, CASES)
