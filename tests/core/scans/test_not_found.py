"""Messages about files that are not found, as train.py, infer.py and evaluate.py give them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import SHAPE, make_data, write_volume
from helpers import TINY

import evaluate
import infer
import train
from core.scans.files import select_cases
from core.scans.not_found import found_instead, looked_for
from dataset import find_cases, find_data


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("liver-1.nii.gz", True),
        ("LIVER_1.nii.gz", True),
        ("liver_1_seg.nii.gz", True),
        ("liver_1-label.nii.gz", True),
        ("gt_liver_1.nii", True),
        ("liver_001.nii.gz", True),
        ("livr_1.nii.gz", True),
        ("Liver1_segmentation.nii.gz", True),
        ("seg_1.nii.gz", True),
        ("liver_1.nrrd", True),
        ("liver_1_0000.mha", True),
        ("liver_1/", True),
        ("liver_2.nii.gz", False),  # has a scan
        ("liver_12.nii.gz", True),  # has none
        ("liver_21.nii.gz", False),
        ("readme.txt", False),
        (".liver_1.nii.gz", False),
    ],
)
def test_a_label_map_without_its_name_is_named(tmp_path, name, similar):
    folder = make_data(tmp_path, ("liver_1", "liver_2"))
    (folder / "labels" / "liver_1.nii.gz").unlink()
    if name.endswith("/"):
        (folder / "labels" / name).mkdir()
    elif name != "liver_2.nii.gz":
        (folder / "labels" / name).write_bytes(b"")
    with pytest.raises(ValueError, match="no label map for the case liver_1: ") as error:
        find_cases(folder)
    hint = "looked for labels/liver_1.nii.gz" + (f"; similar: labels/{name}" if similar else "")
    assert str(error.value).endswith(f": {hint}")


def test_the_most_similar_name_comes_first(tmp_path):
    for name in ("liver_1_old_seg_2.nii.gz", "liver_1_seg.nii.gz", "case_1.nii.gz", "other.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    hint = looked_for("liver_1", tmp_path, ())
    assert hint.endswith(f"{tmp_path.name}/liver_1_seg.nii.gz, {tmp_path.name}/liver_1_old_seg_2.nii.gz")


def test_a_scan_without_its_name_is_named(tmp_path):
    folder = make_data(tmp_path, ("a1", "b"))
    shutil.move(folder / "images" / "a1_0000.nii.gz", folder / "images" / "a1_0000.nrrd")
    message = "no scan for the case a1: looked for images/a1_0000.nii.gz; similar: images/a1_0000.nrrd$"
    with pytest.raises(ValueError, match=message):
        find_cases(folder)


def test_a_prediction_without_its_name_is_named(tmp_path, run_main):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:5] = 1
    for name in ("labels/case_1", "labels/case_2", "found/case_1", "found/case_2_pred"):
        write_volume(tmp_path / f"{name}.nii.gz", labels)
    paths = {"labels": "labels", "predictions": "found", "output": "scores"}
    code, _, err = run_main(evaluate, "--workers=1", *(f"--{flag}={tmp_path / name}" for flag, name in paths.items()))
    assert code == 1
    hint = "looked for found/case_2.nii.gz; similar: found/case_2_pred.nii.gz"
    assert f"case case_2: no prediction in {tmp_path / 'found'}; scored as missed; {hint}\n" in err


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], ""),
        ([".hidden"], ""),
        (["a.mha", "b.MHA", "c.mha"], "holds 3 .mha files: python -m data.convert turns"),
        (["a.nrrd", "notes.txt"], "holds 1 .nrrd file, 1 .txt file: python -m data.convert turns"),
        (["a.hdr", "a.img"], "holds 1 .hdr file, 1 .img file: write each pair as one .nii.gz file"),
        (["a.npz", "b.npz"], "holds 2 .npz files: such files do not say where their voxels lie"),
        (["1.png"], "holds 1 .png file: such files do not say"),
        (["1.dcm", "2.dcm"], "holds 2 .dcm files: infer.py reads the folder of one DICOM series"),
        (["data.tar.gz"], "holds 1 .gz file: unpack them"),
        (["case1/", "case2/"], "holds 2 folders: give the folder that holds the files itself"),
        (["IM0001", "IM0002"], "holds 2 files without a suffix"),
        (["a.b", "a.c", "a.d", "a.e"], "holds 1 .b file, 1 .c file, 1 .d file and more"),
    ],
)
def test_other_files_of_a_folder_are_named(tmp_path, names, found):
    told = found_instead(fill(tmp_path / "images", *names))
    assert told.startswith(f"; {found}") if found else told == ""


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.mha", "b.mha"], "; holds 2 .mha files: python -m data.convert turns"),
        (
            ["patient1/", "patient1/IM0001"],
            "; patient1 holds 1 DICOM file: infer.py reads the folder of one DICOM series",
        ),
        (
            ["imagesTr/", "imagesTr/a.nii.gz", "labelsTr/"],
            "; imagesTr holds 1 .nii.gz file: python -m data.convert reads",
        ),
        (["empty/"], ""),
    ],
)
def test_what_is_no_data_set_is_named(tmp_path, names, found):
    fill(tmp_path / "data", *names)
    for path in tmp_path.rglob("IM*"):
        path.write_bytes(bytes(128) + b"DICM")
    with pytest.raises(FileNotFoundError, match="is no data set, expected a folder with images/") as error:
        find_data(tmp_path / "data")
    assert str(error.value).partition("where to get one)")[2][: len(found) or None] == found


def test_the_three_scripts_name_other_formats(tmp_path, run_main):
    found = "holds 3 .mha files: python -m data.convert turns a labelled collection into NIfTI"
    names = ["a.mha", "b.mha", "c.mha"]
    images, labels = (fill(tmp_path / "data" / name, *names) for name in ("images", "labels"))
    flags = [f"--run-dir={tmp_path / 'run'}", f"--cache-dir={tmp_path / 'cache'}", *TINY]
    code, _, err = run_main(train, f"--data-dir={tmp_path / 'data'}", *flags)
    assert code == 1
    assert f"{tmp_path / 'data'}: no scans in images (.nii.gz or .nii); {found}" in err
    torch.save({}, tmp_path / "best.pt")
    for given in (images, tmp_path / "data"):
        code, _, err = run_main(infer, given, f"--checkpoint={tmp_path / 'best.pt'}", f"--output={tmp_path / 'out'}")
        assert code == 1
        assert f"{images}: no scan in this folder (.nii.gz or .nii); {found}" in err
    for given in (labels, tmp_path / "data"):
        code, _, err = run_main(evaluate, f"--predictions={labels}", f"--labels={given}", f"--output={tmp_path / 's'}")
        assert code == 2
        assert f"{labels}: no label map in this folder (CASE.nii.gz or CASE.nii); {found}" in err


def test_labels_of_another_format_are_named(tmp_path):
    folder = make_data(tmp_path, ("a", "b"))
    for case in "ab":
        shutil.move(folder / "labels" / f"{case}.nii.gz", folder / "labels" / f"{case}.nrrd")
    message = "no label map for the case a, b: .* similar: labels/a.nrrd; holds 2 .nrrd files: python -m data.convert"
    with pytest.raises(ValueError, match=message):
        find_cases(folder)


@pytest.mark.parametrize(("content", "kind"), [(b"ObjectType = Image\n", "MetaImage"), (b"\x93NUMPY", "numpy")])
def test_one_file_of_another_format_is_named(tmp_path, content, kind):
    folder = make_data(tmp_path, ("a",))
    (folder / "images" / "a_0000.nii.gz").write_bytes(content * 50)
    with pytest.raises(ValueError, match=rf"a_0000.nii.gz: is .*{kind}"):
        find_cases(folder)


@pytest.mark.parametrize(
    ("given", "hint"),
    [("Liver-4", "; did you mean liver_4?"), ("liver_4_pred", "; did you mean liver_4?"), ("liver_9", ""), ("x", "")],
)
def test_a_case_that_is_asked_for_by_another_name_is_named(given, hint):
    found = {f"liver_{i}": Path(f"liver_{i}.nii.gz") for i in range(1, 6)}
    with pytest.raises(ValueError, match=rf"^--cases: {given} not among the 5 cases: .*\.\.\.{re.escape(hint)}$"):
        select_cases(found, [given])
