"""The benchmark of scoring makes the cases it says, compares numbers as it says, and needs no peer."""

import json
import math

import numpy as np
import pytest

from benchmarks import evaluation
from benchmarks.evaluation import MAX_SHIFT_VOXELS, PROJECT, TASKS, differences, speckled, wrong_copy

ALWAYS_THERE = {PROJECT, "boolean masks", "scikit-learn", "surface-distance"}  # the latter two: for the tests


@pytest.fixture
def one_box() -> np.ndarray:
    """Return an organ of 8 x 8 x 6 voxels with the id 2, and one in the array's corner with the id 5."""
    labels = np.zeros((30, 20, 12), np.uint8)
    labels[16:24, 6:14, 3:9] = 2
    labels[:6, :6, :6] = 5
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_the_wrong_copy_moves_erodes_or_dilates_each_organ_a_little(one_box, seed):
    wrong = wrong_copy(one_box, np.random.default_rng(seed))
    assert wrong.dtype == np.uint8
    assert set(np.unique(wrong)) == {0, 2, 5}
    dilated_voxels = 8 * 8 * 6 + 2 * (8 * 8 + 8 * 6 + 8 * 6)
    assert (wrong == 2).sum() in (6 * 6 * 4, dilated_voxels)
    moved = np.argwhere(wrong == 2).mean(axis=0) - np.argwhere(one_box == 2).mean(axis=0)
    assert (np.abs(moved) <= np.array(MAX_SHIFT_VOXELS) + 1e-9).all()
    assert (wrong == wrong_copy(one_box, np.random.default_rng(seed))).all()


def test_speckle_is_wrong_in_one_voxel_of_twenty(one_box):
    labels = np.tile(one_box, (3, 3, 3))
    share = (speckled(labels, 14, np.random.default_rng(0)) != labels).mean()
    assert share == pytest.approx(0.05 * 13 / 14, rel=0.1)  # one in 14 of the ids drawn is the right one


def test_differences_are_the_largest_over_the_organs():
    ours = {
        "nsd": np.array([0.5, math.nan, 1.0]),
        "hd_mm": np.array([1.0, math.inf, math.inf]),
        "dice": np.array([1.0]),
    }
    theirs = {"nsd": np.array([0.25, math.nan, 0.9]), "hd_mm": np.array([1.0, math.inf, 3.0])}
    assert differences(theirs, ours) == {"hd_mm": None, "nsd": 0.25}
    assert differences(ours, ours) == {"dice": 0, "hd_mm": 0, "nsd": 0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_contenders_score_the_same_case(run_main):
    code, out, _ = run_main(evaluation, "--shape", 48, 40, 32, "--repeats", 2)
    assert code == 0
    *table, line = out.splitlines()
    result = json.loads(line)
    assert result["shape"] == [48, 40, 32]
    assert result["organs"] == 13
    for task, contenders in TASKS.items():
        rows = result[task]
        assert next(iter(rows)) == PROJECT
        assert {each.name for each in contenders} >= rows.keys() >= {each.name for each in contenders} & ALWAYS_THERE
        assert rows[PROJECT]["seconds"]["n"] == 2
        assert rows[PROJECT]["ratio"]["median"] == 1
        for name in rows.keys() & ALWAYS_THERE:
            assert all(apart <= 1e-9 for apart in rows[name]["differs_by"].values()), name
            assert any(name in text for text in table)
    assert result["speckle"]["surface-distance"]["seconds"]["n"] == 1


def test_peers_that_are_missing_are_named(run_main, monkeypatch):
    monkeypatch.setattr(evaluation, "installed_version", lambda package: None)
    code, out, _ = run_main(evaluation, "--shape", 48, 40, 32, "--repeats", 1, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["notes"] == [
        "not installed: SimpleITK, scikit-learn, monai, surface-distance; pip install -r benchmarks/requirements.txt"
    ]
    assert [list(result[task]) for task in TASKS] == [[PROJECT, "boolean masks"], [PROJECT], [PROJECT]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--repeats", 0], "--repeats: got 0, expected 1 or more"),
        (["--shape", 15, 64, 64], "--shape: got 15 64 64, expected 16 or more each"),
        (["--shape", 40, 32, 24], "--shape: 40 32 24 voxels are too few for 13 organs"),
        (["--shape", 512, 512, 512], "33554432 voxels at most"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(run_main, flags, told):
    code, _, err = run_main(evaluation, *flags)
    assert code == 2
    assert told in err
