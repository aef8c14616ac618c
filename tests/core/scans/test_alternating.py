"""Volumes whose slices are of several acquisitions in turn are told from real scans and phantoms."""

from pathlib import Path

import numpy as np
import pytest
from helpers import make_voxels

from core.scans.alternating import period_of_slices
from core.scans.nifti import Reading
from core.scans.volumes import load_scan, warn_of_values
from dataset import find_cases

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
REAL = [
    *(f"labelled/images/{case}" for case in ("amos_0001", "amos_0013", "ts_example")),
    *(f"unlabelled/{case}" for case in ("matrad_liver", "c3l_00189", "acrin_abdomen")),
    *(f"patients/images/{case}" for case in ("patient_02", "patient_08")),
]


def in_turn(voxels: np.ndarray, period: int, hu: float) -> np.ndarray:
    """Return a scan in which organs and vessels of every second (third) slice are brighter, as by contrast agent."""
    voxels = voxels.copy()
    for start in range(1, period):
        slices = voxels[:, :, start::period]
        slices[(slices > 20) & (slices < 300)] += hu * start
    return voxels


@pytest.mark.parametrize("name", REAL)
def test_real_scans_do_not_alternate_and_do_with_a_second_phase(name):
    path = DATA / f"{name}_0000.nii.gz"
    if not path.is_file():
        pytest.skip("needs the real scans, which are not part of the repository")
    voxels, _ = load_scan(path, Reading(warn=lambda message: None))
    assert period_of_slices(voxels) == 1
    assert period_of_slices(voxels[:, :, ::2]) == period_of_slices(voxels[:, :, ::3]) == 1  # thicker slices
    assert period_of_slices(in_turn(voxels, 2, hu=20)) == 2
    noise = np.random.default_rng(0).normal(0, 15, voxels.shape).astype(np.float32)
    noise[:, :, ::2] = 0
    assert period_of_slices(voxels + noise) == 2  # a sharper kernel
    if voxels.shape[2] > 30:
        assert period_of_slices(in_turn(voxels, 3, hu=20)) == 3


def test_phantoms_do_not_alternate(phantom_data):
    for case in find_cases(phantom_data):
        voxels, _ = load_scan(case.scan)
        assert period_of_slices(voxels) == 1
        assert period_of_slices(in_turn(voxels, 2, hu=20)) == 2


def test_steps_noise_and_few_slices_do_not_alternate():
    steps = make_voxels((32, 32, 24)).astype(np.float32)
    steps[:, :, 12:] += 200
    steps[:, :, 17] += 100
    assert period_of_slices(steps) == 1
    noise = np.random.default_rng(0).normal(40, 30, (32, 32, 24)).astype(np.float32)
    assert period_of_slices(noise) == 1
    assert period_of_slices(np.full((32, 32, 24), 40, np.float32)) == 1
    assert period_of_slices(in_turn(make_voxels((32, 32, 9)), 2, hu=50)) == 1


def test_a_scan_that_alternates_is_warned_of():
    voxels = make_voxels((32, 32, 24)).astype(np.float32)
    voxels[:4] = -1000
    said: list[str] = []
    warn_of_values(voxels, said.append)
    assert said == []
    warn_of_values(in_turn(voxels, 2, hu=30), said.append)
    assert said == [
        "neighbouring slices alternate in HU or noise; are they of two acquisitions, such as contrast phases?"
    ]
