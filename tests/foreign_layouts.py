"""Phantoms in the layouts of other collections, and the check that they come back."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from core.config import load_organs
from core.scans.organ_names import read_organ_names
from dataset import find_cases

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


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj).astype(int)


def write_labels(like: Path, ids: np.ndarray, path: Path, dtype: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(ids.astype(dtype), nib.load(like).affine), path)


def renumbered(labels: Path, ids: dict[int, int]) -> np.ndarray:
    """Return a label map under another collection's ids; organs that it lacks become 0."""
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
