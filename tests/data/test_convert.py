"""Conversion as users run it: phantoms in each collection's layout come back voxel by voxel under our ids."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from core.config import load_organs
from core.scans.organ_names import read_organ_names
from data import convert
from data.label_names import match_organs, parse_source_organs, read_dataset_json, same_organ
from data.make_phantom import write_phantom
from dataset import find_cases

ROOT = Path(__file__).resolve().parents[2]
ORGANS = load_organs()
CASES = 2
# Ids of other collections by FLARE22's id, worked out by hand from their papers; what they lack is left out.
BTCV = {1: 6, 2: 2, 3: 1, 4: 11, 5: 8, 6: 9, 7: 12, 8: 13, 9: 4, 10: 5, 11: 7, 13: 3}
AMOS = {1: 6, 2: 2, 3: 1, 4: 10, 5: 8, 6: 9, 7: 11, 8: 12, 9: 4, 10: 5, 11: 7, 12: 13, 13: 3}
WORD = {1: 1, 2: 4, 3: 2, 4: 8, 7: 12, 8: 12, 9: 6, 10: 7, 11: 5, 12: 9, 13: 3}  # 12: both adrenal glands
ATLAS = {
    1: "liver", 2: "kidney_right", 3: "spleen", 4: "pancreas", 5: "aorta", 6: "postcava", 9: "gall_bladder",
    11: "stomach", 13: "kidney_left",
}  # fmt: skip
TOTAL = ATLAS | {
    6: "inferior_vena_cava", 7: "adrenal_gland_right", 8: "adrenal_gland_left", 9: "gallbladder", 10: "esophagus",
    12: "duodenum",
}  # fmt: skip
ALL_BUT_DUODENUM = [name for name in ORGANS[1:] if name != "duodenum"]


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> list[tuple[Path, Path]]:
    """Scan and label map of each case; their label maps lose the names in their headers."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(folder, cases=CASES, shape=(48, 40, 32), seed=0)
    cases = [(case.scan, case.labels) for case in find_cases(folder)]
    for _, labels in cases:
        write_labels(labels, voxels(labels), labels)
    return cases


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj).astype(int)


def write_labels(like: Path, ids: np.ndarray, path: Path, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ids.astype(dtype), nib.load(like).affine), path)


def renumbered(labels: Path, ids: dict[int, int]) -> np.ndarray:
    """A label map under another collection's ids; organs that it lacks become 0."""
    ours, theirs = voxels(labels), np.zeros(voxels(labels).shape, int)
    for organ, other in ids.items():
        theirs[ours == organ] = other
    return theirs


def kept(labels: Path, organs: list[int]) -> np.ndarray:
    ours = voxels(labels)
    return np.where(np.isin(ours, organs), ours, 0)


def write_pairs(phantoms, root: Path, images: str, maps: str, scan_name: str, map_name: str, ids: dict) -> Path:
    for number, (scan, labels) in enumerate(phantoms, start=1):
        target = root / images / scan_name.format(number)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(scan, target)
        write_labels(labels, renumbered(labels, ids), root / maps / map_name.format(number))
    return root


def write_masks(phantoms, root: Path, names: dict[int, str], case_name: str = "s{:04d}") -> Path:
    for number, (scan, labels) in enumerate(phantoms, start=1):
        folder = root / case_name.format(number)
        folder.mkdir(parents=True)
        shutil.copyfile(scan, folder / "ct.nii.gz")
        for organ, name in names.items():
            write_labels(labels, voxels(labels) == organ, folder / "segmentations" / f"{name}.nii.gz")
    return root


@pytest.fixture
def run(run_main, tmp_path):
    """Run the conversion into tmp_path/data without the doctor: exit code, stdout, stderr, and the folder."""

    def run(source: Path, *flags: object, to: Path = tmp_path / "data"):
        return *run_main(convert, source, to, "--no-doctor", "--workers", "1", *flags), to

    return run


def annotated(data: Path) -> dict[str, list[str]]:
    with open(data / "annotated.csv", newline="") as file:
        return {row["case"]: row["organs"].split(";") for row in csv.DictReader(file)}


def check_converted(data: Path, phantoms, case_name: str, organs: list[int]) -> None:
    """Check that the data set holds the phantoms with these organs, in the files' own voxels and places."""
    cases = find_cases(data)
    assert [case.id for case in cases] == [case_name.format(number) for number in range(1, CASES + 1)]
    for case, (scan, labels) in zip(cases, phantoms, strict=True):
        assert case.scan.read_bytes() == scan.read_bytes()
        np.testing.assert_array_equal(voxels(case.labels), kept(labels, organs))
        np.testing.assert_allclose(nib.load(case.labels).affine, nib.load(labels).affine, atol=1e-5)
        assert read_organ_names(case.labels) == dict(enumerate(ORGANS[1:], start=1))
        assert annotated(data)[case.id] == [ORGANS[organ] for organ in organs]


@pytest.mark.parametrize(
    ("images", "maps"), [("img", "label"), (".", "."), ("imagesTr", "labelsTr"), ("Training/img", "Training/label")]
)
def test_btcv(phantoms, run, tmp_path, images, maps):
    source = write_pairs(phantoms, tmp_path / "s", images, maps, "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    write_labels(phantoms[0][1], renumbered(phantoms[0][1], BTCV | {12: 10}), source / maps / "label0001.nii.gz")
    code, out, err, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "img{:04d}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13])
    assert "12  duodenum                not annotated" in out
    assert "becomes background): 10 portal vein and splenic vein" in out
    lost = np.count_nonzero(voxels(phantoms[0][1]) == 12)  # the duodenum, which stands in for the veins here
    assert f"10 portal vein and splenic vein: {lost} voxels in 1 cases became background" in err


def test_amos_with_its_own_dataset_json_and_mr(phantoms, run, tmp_path):
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms[:1], tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    write_pairs(phantoms[1:], tmp_path / "s", "imagesVa", "labelsVa", "amos_0002.nii.gz", "amos_0002.nii.gz", AMOS)
    for part in ("imagesVa", "labelsVa"):
        shutil.copyfile(source / part / "amos_0002.nii.gz", source / part / "amos_0507.nii.gz")
    (source / "imagesTs").mkdir()
    labels = {"0": "background", "1": "spleen", "2": "right kidney", "3": "left kidney", "4": "gall bladder"}
    labels |= {"5": "esophagus", "6": "liver", "7": "stomach", "8": "arota", "9": "postcava", "10": "pancreas"}
    labels |= {"11": "right adrenal gland", "12": "left adrenal gland", "13": "duodenum", "14": "bladder"}
    (source / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}, "labels": labels}))
    code, out, _, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "amos_{:04d}", list(range(1, 14)))
    assert "organ names from dataset.json" in out
    assert "14 bladder" in out
    assert "1 cases left out, no CT by the numbering of amos: amos_0507" in out
    assert "imagesTs: left out, without label maps" in out


def test_amos_without_dataset_json(phantoms, run, tmp_path):
    names = "amos_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", names, names, AMOS)
    code, out, _, data = run(source)
    assert (code, "the collection amos in" in out) == (0, True)
    check_converted(data, phantoms, "amos_{:04d}", list(range(1, 14)))


def test_word_has_one_id_for_both_adrenal_glands(phantoms, run, tmp_path):
    names = "word_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesVal", "labelsVal", names, names, WORD)
    code, out, err, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "word_{:04d}", [1, 2, 3, 4, 9, 10, 11, 12, 13])
    assert "7  right adrenal gland     not annotated" in out
    assert "12 adrenal: " in err


@pytest.mark.parametrize("version", [1, 2])
def test_decathlon_and_nnunet_join_tumours_only_when_asked(phantoms, run, tmp_path, version):
    channel = "_0000" if version == 2 else ""
    scans, maps = f"liver_{{}}{channel}.nii.gz", "liver_{}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "imagesTr", "labelsTr", scans, maps, {1: 1})
    for number, (_, labels) in enumerate(phantoms, start=1):
        ids = renumbered(labels, {1: 1})
        ids[tuple(np.argwhere(ids == 1)[:5].T)] = 2  # five voxels of tumour in the liver
        write_labels(labels, ids, source / "labelsTr" / maps.format(number), np.float32)
    labels = {"0": "background", "1": "liver", "2": "cancer"} if version == 1 else {"background": 0, "liver": 1}
    labels |= {} if version == 1 else {"cancer": 2}
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    code, _, err, data = run(source)
    assert code == 0
    assert annotated(data) == {"liver_1": ["liver"], "liver_2": ["liver"]}
    liver = np.count_nonzero(voxels(phantoms[0][1]) == 1)
    assert np.count_nonzero(voxels(data / "labels" / "liver_1.nii.gz")) == liver - 5
    assert "2 cancer: 10 voxels in 2 cases became background; if it is part of an organ" in err
    code, _, err, joined = run(source, "--source-organs", "2=liver", to=tmp_path / "joined")
    assert (code, err) == (0, "")
    check_converted(joined, phantoms, "liver_{}", [1])


def test_abdomenatlas_masks_and_nested_folder(phantoms, run, tmp_path):
    write_masks(phantoms, tmp_path / "s" / "inner", ATLAS, "BDMAP_{:08d}")
    code, out, _, data = run(tmp_path / "s")
    assert (code, "'masks'" in out) == (0, True)
    check_converted(data, phantoms, "BDMAP_{:08d}", [1, 2, 3, 4, 5, 6, 9, 11, 13])


def test_totalsegmentator_masks_that_overlap_and_are_missing(phantoms, run, tmp_path):
    source = write_masks(phantoms, tmp_path / "s", TOTAL | {99: "heart"})
    labels = phantoms[0][1]
    grown = voxels(labels)
    taken = np.argwhere(grown == 1)[:7]  # seven voxels of the liver, claimed by the stomach too
    mask = grown == 11
    mask[tuple(taken.T)] = True
    write_labels(labels, mask * 255, source / "s0001" / "segmentations" / "stomach.nii.gz")
    (source / "s0002" / "segmentations" / "pancreas.nii.gz").unlink()
    code, out, err, data = run(source)
    assert code == 0
    grown[tuple(taken.T)] = 11
    np.testing.assert_array_equal(voxels(data / "labels" / "s0001.nii.gz"), grown)
    assert "case s0001: 7 voxels are both liver and stomach; they became stomach" in err
    assert annotated(data)["s0001"] == list(ORGANS[1:])
    assert annotated(data)["s0002"] == [name for name in ORGANS[1:] if name != "pancreas"]
    assert "pancreas (1 of 2 cases)" in out
    assert "heart" in out


def test_combined_labels_need_the_version(phantoms, run, tmp_path):
    ids = {5: 1, 9: 2, 13: 3, 2: 4, 1: 5, 4: 6, 6: 7, 3: 8, 11: 9}
    source = write_pairs(phantoms, tmp_path / "s", ".", ".", "B{}/ct.nii.gz", "B{}/combined_labels.nii.gz", ids)
    code, _, err, _ = run(source)
    assert (code, "--layout: btcv, amos" in err) == (2, True)
    code, _, _, data = run(source, "--layout", "abdomenatlas_1.0")
    assert code == 0
    check_converted(data, phantoms, "B{}", sorted(ids))


def test_flare22_and_names_given_by_the_user(phantoms, run, tmp_path):
    same = {organ: organ for organ in range(1, 14)}
    names = "FLARE22_Tr_{:04d}_0000.nii.gz", "FLARE22_Tr_{:04d}.nii.gz"
    source = write_pairs(phantoms, tmp_path / "s", "images", "labels", *names, same)
    code, _, _, data = run(source)
    assert code == 0
    check_converted(data, phantoms, "FLARE22_Tr_{:04d}", list(range(1, 14)))
    code, _, _, other = run(source, "--organs", "Kidney (left)", "kidney-right", to=tmp_path / "two")
    assert code == 0
    original = voxels(phantoms[0][1])
    expected = np.where(original == 13, 1, np.where(original == 2, 2, 0))
    np.testing.assert_array_equal(voxels(other / "labels" / "FLARE22_Tr_0001.nii.gz"), expected)
    assert load_organs(other / "organs.yaml") == ("background", "Kidney (left)", "kidney-right")


def test_names_come_from_the_header_and_must_agree(phantoms, run, tmp_path):
    """A converted data set names its ids itself, and can be converted again into another list."""
    same = {organ: organ for organ in range(1, 14)}
    source = write_pairs(
        phantoms, tmp_path / "s", "images", "labels", "FLARE22_Tr_{:04d}.nii.gz", "FLARE22_Tr_{:04d}.nii.gz", same
    )
    run(source)
    code, out, _, again = run(tmp_path / "data", "--organs", "spleen", "liver", to=tmp_path / "again")
    assert (code, "organ names from the header of" in out) == (0, True)
    original = voxels(phantoms[1][1])
    expected = np.where(original == 3, 1, np.where(original == 1, 2, 0))
    np.testing.assert_array_equal(voxels(again / "labels" / "FLARE22_Tr_0002.nii.gz"), expected)
    code, _, err, _ = run(tmp_path / "data", "--layout", "amos", to=tmp_path / "wrong")
    assert code == 1
    assert "its header says that id 1 is 'liver', but it is read as 'spleen'" in err
    assert not list((tmp_path / "wrong" / "images").iterdir())


def test_unknown_layouts_and_ids_are_refused_in_one_sentence(phantoms, run, tmp_path):
    empty = tmp_path / "empty"
    (empty / "scans").mkdir(parents=True)
    code, _, err, data = run(empty)
    assert (code, err.count("\n"), data.exists()) == (2, 1, False)
    assert "no layout that is known, found scans/; known are: imagesTr and labelsTr" in err
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
    code, out, err, data = run(source)
    assert code == 1
    assert "case img0002: the scan has" in err
    assert "case img0003: no label map for" in err
    assert "1 cases converted, 0 were finished before, 2 failed" in out
    assert [case.id for case in find_cases(data)] == ["img0001"]
    assert annotated(data) == {"img0001": ALL_BUT_DUODENUM}
    first = (data / "labels" / "img0001.nii.gz").stat().st_mtime_ns
    labels.write_bytes(good)
    (source / "img" / "img0003.nii.gz").unlink()
    code, out, _, _ = run(source)
    assert (code, "1 cases converted, 1 were finished before, 0 failed" in out) == (0, True)
    assert (data / "labels" / "img0001.nii.gz").stat().st_mtime_ns == first
    check_converted(data, phantoms, "img{:04d}", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13])


def test_a_second_run_follows_changes_and_touches_nothing_of_others(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    _, _, _, data = run(source)
    # Other names for the same ids: both cases are converted again.
    code, out, _, _ = run(source, "--source-organs", "6=background")
    assert (code, "2 cases converted, 0 were finished before" in out) == (0, True)
    assert "liver" not in annotated(data)["img0001"]
    assert not np.any(voxels(data / "labels" / "img0001.nii.gz") == 1)
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


def test_scans_are_linked_or_copied(phantoms, run, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    scan = source / "img" / "img0001.nii.gz"
    _, _, _, linked = run(source)
    _, _, _, copied = run(source, "--copy", to=tmp_path / "copied")
    assert (linked / "images" / "img0001_0000.nii.gz").samefile(scan)
    copy = copied / "images" / "img0001_0000.nii.gz"
    assert not copy.samefile(scan)
    assert copy.read_bytes() == scan.read_bytes()


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


def test_the_command_ends_with_the_doctor(phantoms, tmp_path):
    source = write_pairs(phantoms, tmp_path / "s", "img", "label", "img{:04d}.nii.gz", "label{:04d}.nii.gz", BTCV)
    command = [sys.executable, "-m", "data.convert", source, tmp_path / "data", "--organs", *ALL_BUT_DUODENUM]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "data" / "doctor" / "doctor.json").read_text())
    assert sorted(report["cases"]) == ["img0001", "img0002"]
    assert done.returncode == any(finding["severity"] == "error" for finding in report["findings"])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("kidney_right", "right kidney", True),
        ("Kidney (left)", "LEFT-KIDNEY", True),
        ("postcava", "inferior_vena_cava", True),
        ("arota", "Aorta", True),
        ("gall bladder", "gallbladder", True),
        ("oesophagus", "esophagus", True),
        ("adrenal_gland_left", "left adrenal", True),
        ("kidney", "right kidney", False),
        ("adrenal", "right adrenal gland", False),
        ("superior_vena_cava", "inferior vena cava", False),
        ("kidney_cyst_left", "left kidney", False),
        ("bladder", "gallbladder", False),
    ],
)
def test_names(first, second, same):
    assert same_organ(first, second) is same


def test_two_ids_of_one_organ_are_refused_unless_said():
    names = {1: "liver", 2: "Liver", 3: "spleen"}
    with pytest.raises(ValueError, match=r"1 \(liver\) and 2 \(Liver\) both mean 'liver'"):
        match_organs(names, {}, ORGANS)
    assert match_organs(names, {2: "liver"}, ORGANS).target == {1: 1, 2: 1, 3: 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"name": 1}', "cannot be read"),
        ('{"labels": ["liver"]}', "cannot be read"),
        ('{"labels": {"0": "liver"}}', "id 0 to an organ"),
        ('{"labels": {"liver": 1, "spleen": 1}}', "twice"),
        ('{"labels": {"liver": 1}, "channel_names": {"0": "CT", "1": "PET"}}', "2 images"),
    ],
)
def test_wrong_dataset_json(tmp_path, content, message):
    path = tmp_path / "dataset.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_dataset_json(path)


def test_regions_of_nnunet_name_no_id(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"labels": {"background": 0, "whole": [1, 2], "spleen": [3], "liver": "4"}}')
    assert read_dataset_json(path) == {3: "spleen", 4: "liver"}


@pytest.mark.parametrize("given", ["liver", "=liver", "1=", "x=liver", "0=liver", "256=liver"])
def test_wrong_source_organs(given):
    with pytest.raises(ValueError, match="--source-organs: got"):
        parse_source_organs([given], masks=False)
