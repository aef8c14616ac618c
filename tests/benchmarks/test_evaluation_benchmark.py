"""The benchmark of scoring compares numbers as it says, and needs no peer."""

import json
import math

import numpy as np
import pytest

from benchmarks import evaluation, measuring
from benchmarks.evaluation import PROJECT, TASKS, differences

ALWAYS_THERE = {PROJECT, "boolean masks", "surface-distance"}  # the last one: for the tests


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


def test_peers_that_are_missing_are_named(run_main, monkeypatch):
    monkeypatch.setattr(measuring, "installed_version", lambda package: None)
    code, out, _ = run_main(evaluation, "--shape", 48, 40, 32, "--repeats", 1, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["notes"] == ["not installed: monai, surface-distance; pip install -r benchmarks/requirements.txt"]
    assert [list(result[task]) for task in TASKS] == [[PROJECT, "boolean masks"], [PROJECT]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--repeats", 0], "--repeats: got 0, expected 1 or more"),
        (["--shape", 15, 64, 64], "--shape: got 15 64 64, expected 16 or more each"),
        (["--shape", 512, 512, 512], "33554432 voxels at most"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(run_main, flags, told):
    code, _, err = run_main(evaluation, *flags)
    assert code == 2
    assert told in err
