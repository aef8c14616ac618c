"""Small scans, settings and comparisons that several test files share."""

import itertools
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch.nn import functional as F

from core.checkpoint import load_checkpoint

# Flags of train.py: a network and a grid on which an epoch of `phantom_data` takes a second.
TINY = [
    *("--size", "32", "32", "16", "--channels", "2", "--down-convs", "1", "1", "1", "--up-convs", "1", "1"),
    *("--learning-rate", "1e-2", "--loss", "dice_cross_entropy", "--workers", "0", "--device", "cpu"),
    *("--checkpoint-minutes", "0"),  # after every step
]
SOON = 60  # seconds; only a failing test waits that long

SPACING_MM = (2.0, 1.5, 3.0)
VOXEL_ML = 2.0 * 1.5 * 3.0 / 1000
AFFINE = np.diag([*SPACING_MM, 1.0])
AFFINE[:3, 3] = (-30, 12, 500)
# All 48 orders and directions of a file's axes.
AXIS_CODES = [
    "".join(pair[flip] for pair, flip in zip(pairs, flips, strict=True))
    for pairs in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]
TABLES = ("volumes.csv", "organs.ctbl", "organs.label")  # that infer.py writes beside the label maps


def make_voxels(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Return blobs of -200 to 400 HU, (X, Y, Z) int16, different at every end of every axis."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(-200, 400, (1, 1, 5, 4, 3)))
    return F.interpolate(coarse, shape, mode="trilinear")[0, 0].round().numpy().astype(np.int16)


def save_scan(path: Path, voxels: np.ndarray, axes: str = "RAS", affine: np.ndarray = AFFINE) -> Path:
    """Write voxels, (X, Y, Z) in RAS+ order, with their axes stored in another order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(voxels, affine)
    file.header.set_xyzt_units("mm")
    nib.save(file.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes))), path)
    return path


def in_ras(path: Path) -> np.ndarray:
    """Return a file's voxels in RAS+ order, as nibabel reads them."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder and below by relative path, without the lock of volumes.csv."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop(".volumes.lock", None)
    return files


def same_weights(first: Path, second: Path) -> bool:
    """Return True when the networks of two checkpoint files are equal to the last bit."""
    a, b = (load_checkpoint(path)["network"] for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(*command: object, **options: object) -> subprocess.Popen:
    """Start a command whose output is read as text."""
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until a condition is true, SOON seconds at most; return whether it is."""
    deadline = time.monotonic() + SOON
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()
