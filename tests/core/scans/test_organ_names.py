"""Organ names in the header of a label map, read back by independent parsers."""

import gzip
import struct
from pathlib import Path
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension

from core.scans.geometry import Geometry
from core.scans.organ_colours import colour_of
from core.scans.organ_names import as_list, check_organ_names, organ_names_extension, read_organ_names
from core.scans.organ_words import same_name
from core.scans.volumes import load_labels, read_geometry, save_label_map

AFFINE = np.array([[0, -2.0, 0, 30], [1.5, 0, 0, -12], [0, 0, 3, 500], [0, 0, 0, 1]])
LABELS = (np.arange(10 * 8 * 6) % 4).reshape(10, 8, 6).astype(np.uint8)
ORGANS = ("background", "liver", "right kidney", "spleen")
ODD = ("Hintergrund", "a & b", "<x> ]]> \"y\" 'z'", "肝臓 (左)", "Nebenniere ü")
# As TotalSegmentator writes it: a date, line breaks, blanks behind the end.
FOREIGN = (
    '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>   '
    '<VolumeInformation Index="0">   <LabelTable>\n'
    '<Label Key="1" Red="0.0" Green="1.0" Blue="0.0" Alpha="1"><![CDATA[spleen]]></Label>\n'
    '<Label Key="2" Red="0.0" Green="0.0" Blue="1.0" Alpha="1"><![CDATA[kidney_right]]></Label>\n'
    "\n  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  "
    "<VolumeType><![CDATA[Label]]></VolumeType>   </VolumeInformation></CaretExtension>\n              "
)


@pytest.fixture
def geometry(tmp_path) -> Geometry:
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 10, 6), np.int16), AFFINE), path)
    return read_geometry(path)


def save_foreign(path: Path, *contents: bytes, code: int = 0, kind: type = nib.Nifti1Image) -> Path:
    """Write a label map with header extensions by nibabel."""
    image = kind(LABELS, np.eye(4))
    image.header.extensions.extend(Nifti1Extension(code, content) for content in contents)
    nib.save(image, path)
    return path


def test_the_header_is_xml_that_any_parser_reads(geometry, tmp_path):
    path = tmp_path / "labels.nii.gz"
    save_label_map(LABELS, geometry, path, ODD)
    (extension,) = nib.load(path).header.extensions
    root = ElementTree.fromstring(extension.get_content().decode("utf-8"))
    assert (extension.get_code(), root.tag) == (0, "CaretExtension")
    assert [element.get("Index") for element in root.findall("VolumeInformation")] == ["0"]
    assert root.find("VolumeInformation/VolumeType").text == "Label"
    labels = root.findall("VolumeInformation/LabelTable/Label")
    assert {int(label.get("Key")): label.text for label in labels} == dict(enumerate(ODD[1:], start=1))
    for label in labels:
        colour = [float(label.get(name)) for name in ("Red", "Green", "Blue")]
        assert colour == pytest.approx(colour_of(int(label.get("Key"))), abs=1e-5)
        assert label.get("Alpha") == "1"
    assert [round(255 * float(labels[0].get(name))) for name in ("Red", "Green", "Blue")] == [0x9D, 0x43, 0x00]
    assert read_organ_names(path) == dict(enumerate(ODD[1:], start=1))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("count", range(1, 18))  # every length modulo 16
def test_voxels_and_place_are_as_without_names(geometry, tmp_path, suffix, count):
    named, plain = tmp_path / f"named{suffix}", tmp_path / f"plain{suffix}"
    save_label_map(LABELS, geometry, named, ("background", "n" * count))
    save_label_map(LABELS, geometry, plain)
    (with_names, without) = (nib.load(path) for path in (named, plain))
    assert np.array_equal(np.asarray(with_names.dataobj), np.asarray(without.dataobj))
    assert np.array_equal(with_names.affine, without.affine)
    assert with_names.header["vox_offset"] % 16 == 0
    labels, grid = load_labels(named, 4)
    assert np.array_equal(labels, LABELS)
    assert np.array_equal(grid.affine, geometry.affine)
    assert read_organ_names(plain) == {}


def test_the_same_names_give_the_same_bytes(geometry, tmp_path):
    for name in "ab":
        save_label_map(LABELS, geometry, tmp_path / f"{name}.nii.gz", ORGANS)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert organ_names_extension(ORGANS).get_content() == organ_names_extension(list(ORGANS)).get_content()


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("code", [0, 30])
def test_names_of_other_programs_are_read(tmp_path, kind, code):
    path = save_foreign(tmp_path / "a.nii.gz", b"first a comment", FOREIGN.encode(), code=code, kind=kind)
    assert read_organ_names(path) == {1: "spleen", 2: "kidney_right"}
    assert as_list({1: "spleen", 3: "liver"}, path) == ("background", "spleen", "id 2", "liver")


def test_names_of_a_big_endian_file_are_read(tmp_path):
    image = nib.Nifti1Image(LABELS, np.eye(4), nib.Nifti1Header(endianness=">"))
    image.header.extensions.append(Nifti1Extension(0, FOREIGN.encode()))
    nib.save(image, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == struct.pack(">i", 348)
    assert read_organ_names(tmp_path / "a.nii") == {1: "spleen", 2: "kidney_right"}


@pytest.mark.parametrize("content", [b"a comment", b"<?xml version='1.0'?><other/>", b"\0" * 40])
def test_other_extensions_are_no_names(tmp_path, content):
    assert read_organ_names(save_foreign(tmp_path / "a.nii.gz", content)) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("</LabelTable>", ""), "damaged XML"),
        (('Key="2"', 'Key="two"'), "invalid literal"),
        (('Key="2"', 'Key="-2"'), "id -2 has a name, expected ids from 0 to 255"),
        (('Key="2"', 'Key="70000"'), "id 70000 has a name"),
    ],
)
def test_damaged_names_are_refused_by_the_files_name(tmp_path, change, words):
    path = save_foreign(tmp_path / "a.nii.gz", FOREIGN.replace(*change).encode())
    with pytest.raises(ValueError, match=words) as error:
        read_organ_names(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_ends_within_its_names_is_refused(tmp_path):
    content = save_foreign(tmp_path / "a.nii", FOREIGN.encode()).read_bytes()
    for length in (100, 349, 356, 500):
        (tmp_path / "cut.nii.gz").write_bytes(gzip.compress(content[:length]))
        with pytest.raises(ValueError, match=r"cut\.nii\.gz: "):
            read_organ_names(tmp_path / "cut.nii.gz")


def test_names_that_contradict_the_list_are_refused(geometry, tmp_path):
    path = tmp_path / "a.nii.gz"
    save_label_map(LABELS, geometry, path, ORGANS)
    check_organ_names(path, ORGANS)
    check_organ_names(path, ("nothing", "Liver", "kidney_right", "spleen", "heart"))
    with pytest.raises(ValueError, match=r"a\.nii\.gz: its header says that id 2 is 'right kidney', but .* 'spleen'"):
        check_organ_names(path, ("background", "liver", "spleen", "right kidney"))
    with pytest.raises(ValueError, match="id 3 is 'spleen', but the organ list ends at id 2"):
        check_organ_names(path, ORGANS[:3])


@pytest.mark.parametrize("other", ["kidney_right", "Right-Kidney", "kidney (right)", "RIGHT KIDNEY", " right  kidney"])
def test_spellings_of_one_name(other):
    assert same_name("right kidney", other)
    assert not same_name("left kidney", other)


def test_names_without_letters_differ():
    assert not same_name("***", "+++")
    assert not same_name("lesion 1", "lesion 2")


def test_two_organs_of_one_name_make_no_list():
    with pytest.raises(ValueError, match=r"a\.nii: the organ names in its header: got .* all different"):
        as_list({1: "liver", 2: "liver"}, "a.nii")
