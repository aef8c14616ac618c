"""Small data sets of random scans and label maps, for tests of what reads and changes them."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from core.config import Config, load_config

SHAPE, SPACING_MM, SIZE = (12, 10, 6), (2.0, 3.0, 5.0), (8, 8, 8)


def write_volume(path: Path, array: np.ndarray, shift_mm: float = 0) -> None:
    """Write an array as NIfTI, with SPACING_MM and its first voxel at `shift_mm` along X."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING_MM, 1])
    affine[0, 3] = shift_mm
    nib.save(nib.Nifti1Image(array, affine), path)


def make_data(
    folder: Path, ids: tuple = ("a", "b", "c"), scan: str = "{}_0000.nii.gz", labels: str = "{}.nii.gz"
) -> Path:
    """Return a data set of random scans and label maps, a different one for each id; the folder."""
    for case in ids:
        rng = np.random.default_rng(list(case.encode()))
        write_volume(folder / "images" / scan.format(case), rng.integers(-1000, 1000, SHAPE).astype(np.int16))
        write_volume(folder / "labels" / labels.format(case, case), rng.integers(0, 14, SHAPE).astype(np.uint8))
    return folder


def settings(**changes) -> Config:
    """Return the default settings on a small grid, without a cache."""
    return replace(load_config(), **{"size": SIZE, "cache_dir": None} | changes)


def same_samples(first: dict, second: dict) -> bool:
    """Return True when two samples are the same to the bit, types and shapes included."""
    assert first.keys() == second.keys()
    return all(
        value == second[key]
        if isinstance(value, str | list)
        else value.dtype == second[key].dtype and torch.equal(value, second[key].view_as(value))
        for key, value in first.items()
    )
