"""Series whose files are in several folders, or lack the DICOM preamble: read whole, or refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import COLUMNS, MR_IMAGE, REAL, ROWS, make_series, make_slice, write
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless
from test_dicom_series import compress

from core.inference.inputs import find_inputs
from core.scans import dicom_folders
from core.scans.dicom_folders import is_series_folder
from core.scans.dicom_series import load_series
from core.scans.volumes import load_scan

COUNT = 12


def warned(folder: Path) -> tuple[list[str], np.ndarray]:
    warnings: list[str] = []
    voxels, _ = load_series(folder, warn=warnings.append)
    return warnings, voxels


def divided(first: Path, second: Path, **changes: object) -> np.ndarray:
    """Write the head half of a series into one folder, the other half into another; return the whole one's voxels."""
    slices = make_series(COUNT, **changes)
    whole = write(first.parent / "whole", slices)
    voxels = load_series(whole)[0]
    shutil.rmtree(whole)
    write(second, slices[: COUNT // 2])
    write(first, slices[COUNT // 2 :])
    return voxels


# ---- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["sub", "a/b/c"])
def test_a_series_is_joined_with_its_part_in_a_folder_within(tmp_path, below):
    whole = divided(tmp_path / "main", tmp_path / "main" / below)
    write(tmp_path / "main" / "other", make_series(5, SeriesInstanceUID="1.2.3.7"))
    warnings, voxels = warned(tmp_path / "main")
    np.testing.assert_array_equal(voxels, whole)
    main = tmp_path / "main"
    assert warnings == [f"{main}: read with 6 more slice(s) of the same series in {main / below}"]


def test_a_slice_that_cannot_be_opened_costs_its_own_folder_alone(tmp_path, monkeypatch):
    for n, name in enumerate(("p1", "p2", "p1/below"), start=1):
        write(tmp_path / name, make_series(4, SeriesInstanceUID=f"1.2.3.{n}", FrameOfReferenceUID=f"1.2.4.{n}"))
    locked = {sorted((tmp_path / name).glob("*.dcm"))[-1] for name in ("p1", "p1/below")}
    reads = dicom_folders.is_dicom

    def is_dicom(path):
        if path in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return reads(path)

    monkeypatch.setattr(dicom_folders, "is_dicom", is_dicom)
    found, _ = find_inputs([str(tmp_path / "p1"), str(tmp_path / "p2")])
    assert list(found) == ["p1", "p2"]


def test_a_series_without_its_uid_is_joined_by_its_frame_of_reference(tmp_path):
    whole = divided(tmp_path / "main", tmp_path / "main" / "sub", SeriesInstanceUID="")
    assert warned(tmp_path / "main")[1].shape == whole.shape
    divided(tmp_path / "two", tmp_path / "two" / "sub", SeriesInstanceUID="", FrameOfReferenceUID="")
    assert warned(tmp_path / "two")[1].shape == (COLUMNS, ROWS, COUNT // 2)


def test_a_copy_within_is_left_out(tmp_path):
    whole = write(tmp_path / "main", make_series(COUNT))
    shutil.copytree(whole, tmp_path / "copy")
    shutil.move(tmp_path / "copy", whole / "copy")
    warnings, voxels = warned(whole)
    assert warnings == [f"{whole}: left out {whole / 'copy'}, which holds 12 of its slices once more"]
    assert voxels.shape[2] == COUNT


def test_a_link_that_leads_back_ends(tmp_path):
    folder = write(tmp_path / "main", make_series(COUNT))
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    assert warned(folder)[0] == []


@pytest.mark.parametrize("parts", [("DIR000", "DIR001"), ("ST0/SE0", "ST0/SE1")])
def test_parts_in_folders_of_their_own_are_read_by_the_folder_above(tmp_path, capsys, parts):
    first, second = (tmp_path / "export" / part for part in parts)
    whole = divided(first, second)
    found, refused = find_inputs([str(tmp_path / "export")])
    assert (found, refused) == ({"export": tmp_path / "export"}, [])
    np.testing.assert_array_equal(warned(tmp_path / "export")[1], whole)

    assert find_inputs([str(tmp_path / "export"), str(first)])[0] == {}
    assert f"error: {first}: holds a part of a DICOM series" in capsys.readouterr().err
    assert find_inputs([str(first), str(second)]) == ({}, [first, second])
    err = capsys.readouterr().err
    assert f"error: {first}: holds a part of a DICOM series, {second} another part; give {first.parent} alone\n" in err
    assert f"error: {second}: holds a part of a DICOM series, {first} another part; give {first.parent} alone\n" in err


def test_parts_beside_other_series_are_refused(tmp_path, capsys):
    first, second, other = (tmp_path / "export" / part for part in ("DIR000", "DIR001", "DIR002"))
    divided(first, second)
    write(other, make_series(5, SeriesInstanceUID="1.2.3.7"))
    assert find_inputs([str(tmp_path / "export")]) == ({}, [tmp_path / "export"])
    assert "its DICOM series are in folders within it; give those, say" in capsys.readouterr().err
    assert find_inputs([str(first), str(second), str(other)]) == ({"DIR002": other}, [first, second])
    assert "another part; put its files into one folder and give that" in capsys.readouterr().err


def test_parts_in_folders_of_the_same_name_are_refused_as_parts(tmp_path, capsys):
    first, second = tmp_path / "x" / "SE", tmp_path / "y" / "SE"
    divided(first, second)
    assert find_inputs([str(first), str(second)]) == ({}, [first, second])
    assert f"error: {first}: holds a part of a DICOM series, {second} another part; give" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "second"), [("DIR000", "DIR001"), ("main/sub", "main")])
def test_a_part_alone_is_warned_of(tmp_path, capsys, first, second):
    first, second = (tmp_path / "export" / part for part in (first, second))
    divided(first, second)
    assert find_inputs([str(first)]) == ({first.name: first}, [])
    warning = f"warning: {first}: {second} holds 6 more slice(s) of the same series; give {first.parent} alone\n"
    assert capsys.readouterr().err == warning
    other = write(tmp_path / "export" / "other", make_series(5, SeriesInstanceUID="1.2.3.7"))
    assert find_inputs([str(other)])[0] == {"other": other}
    assert capsys.readouterr().err == ""


def test_overlapping_parts_are_joined_without_their_copies(tmp_path):
    slices = make_series(COUNT)
    whole = load_series(write(tmp_path / "whole", slices))[0]
    export = write(tmp_path / "export" / "a", slices[:8]).parent
    write(export / "b", slices[5:])
    assert find_inputs([str(export)])[0] == {"export": export}
    np.testing.assert_array_equal(warned(export)[1], whole)
    main = write(tmp_path / "main", slices[:8])
    write(main / "sub", slices[5:])
    warnings, voxels = warned(main)
    assert warnings == [f"{main}: read with 4 more slice(s) of the same series in {main / 'sub'}"]
    np.testing.assert_array_equal(voxels, whole)


def test_copies_without_their_uids_are_told_by_content(tmp_path):
    main = write(tmp_path / "main", make_series(COUNT, SOPInstanceUID=""))
    whole = load_series(main)[0]
    (main / "sub").mkdir()
    for k in range(5, COUNT):
        name = f"IM{3 * k + 2:03d}.dcm"
        (shutil.copy if k < 8 else shutil.move)(main / name, main / "sub" / name)
    np.testing.assert_array_equal(warned(main)[1], whole)


def test_other_slices_at_the_places_of_a_part_are_not_left_out(tmp_path):
    slices = make_series(COUNT)
    main = write(tmp_path / "main", slices[:8])
    for k, one in enumerate(slices):
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.4.{k}"
    write(main / "sub", slices[5:])
    with pytest.raises(ValueError, match="3 slice\\(s\\) at a place that another one has"):
        load_series(main, warn=print)


def test_whole_phases_whose_slices_take_turns_are_two_cases(tmp_path, capsys):
    both = make_series(2 * COUNT)
    first, second = write(tmp_path / "x" / "a", both[::2]), write(tmp_path / "x" / "b", both[1::2])
    assert find_inputs([str(first), str(second)]) == ({"a": first, "b": second}, [])
    assert find_inputs([str(first)])[0] == {"a": first}
    assert capsys.readouterr().err == ""
    assert find_inputs([str(tmp_path / "x")])[0] == {}
    assert "its DICOM series are in folders within it; give those, say" in capsys.readouterr().err


def test_a_folder_and_the_one_within_are_one_series(tmp_path, capsys):
    divided(tmp_path / "main", tmp_path / "main" / "sub")
    assert find_inputs([str(tmp_path / "main"), str(tmp_path / "main" / "sub")])[0] == {}
    assert f"another part; give {tmp_path / 'main'} alone\n" in capsys.readouterr().err


def test_another_series_within_is_another_case(tmp_path):
    main = write(tmp_path / "main", make_series(COUNT))
    other = write(main / "other", make_series(5, SeriesInstanceUID="1.2.3.7"))
    assert find_inputs([str(main), str(other)]) == ({"main": main, "other": other}, [])


def test_copies_of_a_series_are_two_cases(tmp_path):
    one = write(tmp_path / "one", make_series(COUNT))
    two = write(tmp_path / "two", make_series(COUNT))
    assert list(find_inputs([str(one), str(two)])[0]) == ["one", "two"]


def test_a_slice_without_preamble_that_is_given_itself_is_named_as_dicom(tmp_path):
    path = write(tmp_path / "one", make_series(2)) / "IM002.dcm"
    without_preamble(path, "dataset only")
    with pytest.raises(ValueError, match="is a DICOM file; give the folder of its series"):
        load_scan(path)


def test_series_of_an_export_tree_are_named(tmp_path, capsys):
    folders = [tmp_path / "PA0" / "ST0" / f"SE{i}" for i in range(2)]
    for i, folder in enumerate(folders):
        write(folder, make_series(5, SeriesInstanceUID=f"1.2.3.{i}"))
    assert find_inputs([str(tmp_path / "PA0")])[0] == {}
    message = f"its DICOM series are in folders within it; give those, {folders[0]}, {folders[1]}"
    assert capsys.readouterr().err == f"error: {tmp_path / 'PA0'}: {message}\n"


# ---- Without the preamble --------------------------------------------------------------------------------------------


def without_preamble(path: Path, kind: str) -> None:
    """Rewrite a file as exporters leave it."""
    content = path.read_bytes()
    dataset = content.index(b"\x08\x00\x08\x00" if b"\x08\x00\x08\x00" in content[132:] else b"\x00\x08\x00\x08", 132)
    path.write_bytes(
        {
            "no preamble": content[132:],
            "magic only": content[128:],
            "no magic": content[:128] + content[132:],
            "magic overwritten": content[:128] + b"XXXX" + content[132:],
            "dataset only": content[dataset:],
        }[kind]
    )


@pytest.mark.parametrize("kind", ["no preamble", "magic only", "no magic", "magic overwritten", "dataset only"])
@pytest.mark.parametrize("share", [4, 1], ids=["some", "all"])
def test_slices_without_the_preamble_are_read(tmp_path, kind, share):
    folder = write(tmp_path / "scan", make_series(COUNT))
    whole = load_series(folder)[0]
    for path in sorted(folder.iterdir())[::share]:
        without_preamble(path, kind)
    assert is_series_folder(folder)
    warnings, voxels = warned(folder)
    assert warnings == []
    np.testing.assert_array_equal(voxels, whole)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_dataset_alone_in_other_encodings(tmp_path, syntax):
    slices = make_series(COUNT)
    for one in slices:
        one.file_meta.TransferSyntaxUID = syntax
    folder = write(tmp_path / "scan", slices)
    whole = load_series(folder)[0]
    for path in folder.iterdir():
        without_preamble(path, "dataset only")
    np.testing.assert_array_equal(warned(folder)[1], whole)


def test_compressed_pixels_of_a_dataset_alone_are_refused(tmp_path):
    folder = write(tmp_path / "scan", make_series(COUNT))
    path = folder / "IM008.dcm"
    compress(path, JPEG2000Lossless)
    without_preamble(path, "dataset only")
    with pytest.raises(ValueError, match=f"^{path}: .*its pixels are compressed and it does not say how"):
        load_series(folder)


def test_a_dataset_that_does_not_say_what_it_is_is_refused(tmp_path):
    folder = write(tmp_path / "scan", make_series(COUNT))
    path = folder / "IM008.dcm"
    one = pydicom.dcmread(path)
    one.SOPClassUID = ""
    one.save_as(path)
    without_preamble(path, "dataset only")
    with pytest.raises(ValueError, match=f"^{path}: does not say what kind of image it is"):
        load_series(folder)


def test_a_series_without_preamble_within_is_named_as_dicom(tmp_path, capsys):
    series = write(tmp_path / "PA0" / "ST0" / "SE0", make_series(COUNT))
    for path in series.iterdir():
        without_preamble(path, "dataset only")
    assert find_inputs([str(tmp_path / "PA0")])[0] == {}
    assert "its DICOM series are in folders within it; give those, " + str(series) in capsys.readouterr().err
    assert find_inputs([str(series)])[0] == {"SE0": series}


def test_what_is_no_dicom_is_left_out(tmp_path):
    folder = write(tmp_path / "scan", make_series(COUNT))
    names = {"readme.txt": b"8 slices\n" * 200, "all.zip": b"PK\x03\x04" * 999, "IM002.dcm.jpg": b"\xff\xd8" * 999}
    for name, content in names.items():
        (folder / name).write_bytes(content)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    picture = make_slice(0, Modality="MR", SOPClassUID=MR_IMAGE, SeriesInstanceUID="1.2.3.9")
    picture.file_meta.MediaStorageSOPClassUID = MR_IMAGE
    write(tmp_path / "mr", [picture])
    without_preamble(tmp_path / "mr" / "IM002.dcm", "no preamble")
    shutil.move(tmp_path / "mr" / "IM002.dcm", folder / "MR.dcm")
    warnings, voxels = warned(folder)
    assert voxels.shape[2] == COUNT
    assert warnings[0] == f"{folder}: left out, being no DICOM: IM002.dcm.jpg, all.zip, readme.txt"


@pytest.mark.parametrize("name", ["IM035.dcm", "IM035.dcm.part", "IM035.DCM"])
@pytest.mark.parametrize("content", [bytes(2000), b"damaged"])
def test_a_damaged_last_slice_is_refused(tmp_path, name, content):
    folder = write(tmp_path / "scan", make_series(COUNT))
    (folder / "IM035.dcm").unlink()  # the last slice, whose loss no gap would show
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{folder}: {name} is no DICOM but is named like the slices"):
        load_series(folder)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans, which are not part of the repository")
def test_a_real_series_in_two_folders_with_slices_without_preamble(tmp_path):
    main = tmp_path / "main"
    (main / "sub").mkdir(parents=True)
    for path in REAL.glob("*.dcm"):
        z = pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2]
        copy = shutil.copyfile(path, (main if z < -780 else main / "sub") / path.name)
        if z in (-804.5, -770.5, -766.5):
            copy.write_bytes(copy.read_bytes()[132:])
    warnings, voxels = warned(main)
    assert len(warnings) == 1
    np.testing.assert_array_equal(voxels, load_series(REAL)[0])
