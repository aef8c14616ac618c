"""The scoring script as users run it, on small label maps whose scores can be counted."""

import csv
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

import evaluate
from core.config import load_organs

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SPACING_MM, VOXEL_ML = (10, 8, 6), (2.0, 1.5, 3.0), 0.009
AFFINE = np.diag([*SPACING_MM, 1.0])
AFFINE[:3, 3] = (-30, 12, 500)
COLUMNS = "case,id,organ,dice,precision,recall,accuracy,reference_ml,predicted_ml"
LIVER, SPLEEN, AORTA, LEFT_KIDNEY = 1, 3, 5, 13
ORGANS = load_organs()


def save(path: Path, labels: np.ndarray, axes: str = "RAS", affine: np.ndarray = AFFINE) -> Path:
    """Write a label map, (X, Y, Z) in RAS+ order, with its axes stored in another order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(labels.astype(np.uint8), affine)
    nib.save(file.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes))), path)
    return path


def two_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By case: reference and prediction, (X, Y, Z).

    case1: liver 4 voxels, of which 3 are found and 1 missed, 2 made up; spleen 5 voxels, missed; left kidney made up.
    case2: liver 8 voxels, all found and none made up.
    """
    first, first_found = np.zeros(SHAPE), np.zeros(SHAPE)
    first[0, 0, 0:4] = first_found[0, 0, 1:6] = LIVER
    first[5, 0:5, 2] = SPLEEN
    first_found[9, 7, 5] = LEFT_KIDNEY
    second = np.zeros(SHAPE)
    second[2:4, 2:4, 2:4] = LIVER
    return {"case1": (first, first_found), "case2": (second, second)}


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """The flags of a run on two cases, predictions and references with their axes stored in different orders."""
    for case, (reference, prediction) in two_cases().items():
        save(tmp_path / "labels" / f"{case}.nii.gz", reference, "LPS")
        save(tmp_path / "predictions" / f"{case}.nii.gz", prediction, "SAR")
    return [f"--{name}={tmp_path / name}" for name in ("labels", "predictions")] + [f"--output={tmp_path / 'scores'}"]


@pytest.fixture
def run(run_main):
    """Run evaluate.py's main in this process: exit code, stdout and stderr."""
    return partial(run_main, evaluate)


def read(folder: Path) -> tuple[dict, dict]:
    """The rows of metrics.csv by (case, id), and summary.json."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = {(row["case"], int(row["id"])): row for row in csv.DictReader(file)}

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return rows, json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


# ---- What comes out


def test_the_command_scores_two_cases(folders, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *folders], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    header, *lines = (tmp_path / "scores" / "metrics.csv").read_text().splitlines()
    assert header == COLUMNS
    assert len(lines) == 2 * 13
    # 2 * 3 / (4 + 5), 3 of 5, 3 of 4, 477 of 480 voxels; 4 and 5 voxels of 0.009 mL
    assert lines[LIVER - 1] == "case1,1,liver,0.666667,0.6,0.75,0.99375,0.036,0.045"
    assert lines[SPLEEN - 1] == "case1,3,spleen,0,,0,0.989583,0.045,0"
    assert lines[AORTA - 1] == "case1,5,aorta,,,,,0,0"
    assert lines[LEFT_KIDNEY - 1] == "case1,13,left kidney,0,0,,0.997917,0,0.009"
    assert lines[13] == "case2,1,liver,1,1,1,1,0.072,0.072"
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100  # the last line names the folder
    assert "liver                    2     0.8333     0.2357     0.8000     0.8750     0.9969" in result.stdout
    assert "2 of 2 cases scored" in result.stdout


def test_the_summary_counted_by_hand(folders, run, tmp_path):
    code, *_ = run(*folders)
    assert code == 0
    _, summary = read(tmp_path / "scores")
    assert set(summary) == {"protocol", "mean", "organs", "cases", "failed", "definitions"}
    assert (summary["protocol"], summary["cases"], summary["failed"]) == ("default", ["case1", "case2"], [])
    assert list(summary["organs"]) == list(ORGANS[1:])  # no background
    dice = summary["organs"]["liver"]["dice"]
    assert dice["mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert dice["median"] == pytest.approx((2 / 3 + 1) / 2)
    assert dice["sd"] == pytest.approx((1 / 3) / math.sqrt(2))  # of a sample of two
    assert (dice["n"], dice["n_infinite"]) == (2, 0)
    # Missed: Dice and recall 0; precision is not defined, and neither is the spread of one case.
    assert summary["organs"]["spleen"]["dice"] == {"mean": 0, "sd": None, "median": 0, "n": 1, "n_infinite": 0}
    nothing = {"mean": None, "sd": None, "median": None, "n": 0, "n_infinite": 0}
    assert summary["organs"]["spleen"]["precision"] == nothing
    assert summary["organs"]["left kidney"]["recall"] == nothing
    assert all(summary["organs"]["aorta"][name] == nothing for name in ("dice", "precision", "recall", "accuracy"))
    # Over the organs where there is something to count: liver, spleen, left kidney.
    assert set(summary["mean"]) == {"dice", "precision", "recall", "accuracy"}
    assert summary["mean"]["dice"] == pytest.approx((5 / 6 + 0 + 0) / 3)
    assert summary["mean"]["precision"] == pytest.approx((0.8 + 0) / 2)
    assert summary["mean"]["recall"] == pytest.approx((0.875 + 0) / 2)
    accuracy = [(477 / 480 + 1) / 2, 475 / 480, 479 / 480]
    assert summary["mean"]["accuracy"] == pytest.approx(sum(accuracy) / 3)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "ASR", "SPL", "IAL"])
def test_truth_against_itself_is_1_however_it_is_stored(run, tmp_path, axes):
    truth = np.random.default_rng(0).integers(0, 12, SHAPE)  # 12 and 13 do not occur
    save(tmp_path / "labels" / "a.nii.gz", truth, "LPS")
    save(tmp_path / "predictions" / "a.nii", truth, axes)
    code, out, _ = run(*(f"--{name}={tmp_path / name}" for name in ("labels", "predictions", "output")))
    assert code == 0
    rows, summary = read(tmp_path / "output")
    for organ in range(1, 12):
        row = rows["a", organ]
        assert [row[name] for name in ("dice", "precision", "recall", "accuracy")] == ["1", "1", "1", "1"]
        assert row["reference_ml"] == row["predicted_ml"] == f"{(truth == organ).sum() * VOXEL_ML:.6g}"
    assert [rows["a", 13][name] for name in ("dice", "precision", "recall", "accuracy")] == ["", "", "", ""]
    assert summary["mean"] == {"dice": 1, "precision": 1, "recall": 1, "accuracy": 1}
    assert len([line for line in out.splitlines() if "1.0000" in line]) == 12  # 11 organs and their mean


def test_a_prediction_flipped_left_to_right_is_no_perfect_one(run, tmp_path):
    truth = np.zeros(SHAPE)
    truth[0:3] = LIVER
    save(tmp_path / "labels" / "a.nii.gz", truth)
    save(tmp_path / "predictions" / "a.nii.gz", truth[::-1])
    code, *_ = run(*(f"--{name}={tmp_path / name}" for name in ("labels", "predictions", "output")))
    assert code == 0
    assert read(tmp_path / "output")[0]["a", LIVER]["dice"] == "0"


def test_a_whole_data_set_is_taken_by_its_labels_and_probabilities_are_passed_over(folders, run, tmp_path):
    save(tmp_path / "labels" / "images" / "case1_0000.nii.gz", np.zeros(SHAPE))
    save(tmp_path / "predictions" / "case1_probabilities.nii.gz", np.zeros(SHAPE))
    (tmp_path / "data").mkdir()
    (tmp_path / "labels").rename(tmp_path / "data" / "labels")
    code, out, _ = run(*folders, f"--labels={tmp_path / 'data'}")
    assert code == 0
    assert "2 of 2 cases scored" in out


def test_other_organs_come_from_another_settings_file(run, tmp_path):
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    start, end = text.index("organs:"), text.index("# ---- Network")
    (tmp_path / "config.yaml").write_text(text[:start] + "organs: [nothing, stone]\n" + text[end:], encoding="utf-8")
    labels = np.zeros(SHAPE)
    labels[0] = 1
    save(tmp_path / "labels" / "a.nii.gz", labels)
    code, *_ = run(*(f"--{flag}={tmp_path / name}" for flag, name in [
        ("labels", "labels"), ("predictions", "labels"), ("output", "scores"), ("config", "config.yaml"),
    ]))  # fmt: skip
    assert code == 0
    rows, summary = read(tmp_path / "scores")
    assert list(rows) == [("a", 1)]
    assert rows["a", 1]["organ"] == "stone"
    assert list(summary["organs"]) == ["stone"]


# ---- What is refused


def test_each_bad_case_is_named_and_the_others_are_scored(folders, run, tmp_path):
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for case in ("moved", "cropped", "unknown", "broken", "cut", "missing", "reference_unknown"):
        save(labels / f"{case}.nii.gz", np.zeros(SHAPE))
        save(predictions / f"{case}.nii.gz", np.zeros(SHAPE))
    moved = AFFINE.copy()
    moved[0, 3] += 1  # half a voxel
    save(predictions / "moved.nii.gz", np.zeros(SHAPE), affine=moved)
    save(predictions / "cropped.nii.gz", np.zeros((10, 8, 5)))
    save(predictions / "unknown.nii.gz", np.full(SHAPE, 14))
    save(labels / "reference_unknown.nii.gz", np.full(SHAPE, 200))
    (predictions / "broken.nii.gz").write_text("no NIfTI at all")
    (predictions / "cut.nii.gz").unlink()
    whole = save(predictions / "cut.nii", np.zeros(SHAPE)).read_bytes()
    (predictions / "cut.nii").write_bytes(whole[: len(whole) // 2])
    (predictions / "missing.nii.gz").unlink()

    code, out, err = run(*folders)
    assert code == 1
    expected = [
        "case cropped: the reference has 10x8x6 voxels .*, the prediction 10x8x5 voxels .* expected the same voxels",
        "case moved: the reference .* from .-30.0, .*, the prediction .* from .-29.0, .* expected the same voxels",
        f"case missing: no prediction in {predictions}",
        f"{labels}/reference_unknown.nii.gz: ids outside the organ list: 200 .480 voxels.; expected 0 to 13",
        f"{predictions}/unknown.nii.gz: ids outside the organ list: 14 .480 voxels.; expected 0 to 13",
        f"{predictions}/broken.nii.gz: cannot be read as NIfTI .*",
        f"{predictions}/cut.nii: cannot be read to its end .*",
    ]
    for sentence in expected:
        assert len(re.findall(f"^error: {sentence}$", err, re.MULTILINE)) == 1, sentence
    assert len(err.splitlines()) == len(expected)
    assert "2 of 9 cases scored" in out
    rows, summary = read(tmp_path / "scores")
    assert {case for case, _ in rows} == {"case1", "case2"}
    assert summary["cases"] == ["case1", "case2"]
    assert sorted(summary["failed"]) == [
        "broken", "cropped", "cut", "missing", "moved", "reference_unknown", "unknown",
    ]  # fmt: skip


def test_no_case_that_can_be_scored_is_no_perfect_score(folders, run, tmp_path):
    for case in two_cases():
        (tmp_path / "predictions" / f"{case}.nii.gz").write_text("no NIfTI at all")
    code, out, _ = run(*folders)
    assert code == 1
    assert "0 of 2 cases scored" in out
    rows, summary = read(tmp_path / "scores")
    assert rows == {}
    assert summary["mean"] == dict.fromkeys(("dice", "precision", "recall", "accuracy"))


def test_cases_by_id_and_by_file(folders, run, tmp_path):
    listed = tmp_path / "val_cases.txt"
    listed.write_text("# held out\ncase2\n")
    for given in (["case2"], [listed]):
        code, *_ = run(*folders, "--cases", *given)
        assert code == 0
        assert read(tmp_path / "scores")[1]["cases"] == ["case2"]
    code, *_ = run(*folders, "--cases", "case2", "case1")
    assert code == 0
    assert read(tmp_path / "scores")[1]["cases"] == ["case1", "case2"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--cases", "case3"], "error: --cases: case3 not among the 2 cases: case1, case2"),
        (["--labels={}/nowhere"], "error: {}/nowhere: no such folder\n"),
        (["--predictions={}/nowhere"], "error: {}/nowhere: no such folder\n"),
        (["--predictions={}/empty"], "error: {}/empty: no label map in this folder"),
        (["--config={}/nowhere.yaml"], "error: {}/nowhere.yaml: no such settings file\n"),
        (["--output={}/a_file"], "{}/a_file"),
        (["--output={}/a_file/below"], "{}/a_file/below"),
        (["--metric=dice"], "unrecognized arguments: --metric=dice"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_scored(folders, run, tmp_path, flags, complaint):
    (tmp_path / "a_file").write_text("text")
    (tmp_path / "empty").mkdir()
    code, out, err = run(*folders, *(flag.format(tmp_path) for flag in flags))
    assert (code, out) == (2, "")
    assert complaint.format(tmp_path) in err
    assert not list(tmp_path.glob("scores/*"))
    assert (tmp_path / "a_file").read_text() == "text"


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(folders, run, tmp_path):
    (tmp_path / "predictions" / "case1.nii.gz").write_text("no NIfTI at all")
    code, out, err = run(*folders, "--output=/proc")  # not even root writes there
    assert (code, out) == (2, "")
    assert "/proc" in err
    assert "case1" not in err  # nothing has been scored


def test_a_result_that_cannot_be_replaced_is_named(folders, run, tmp_path):
    (tmp_path / "scores" / "metrics.csv" / "in the way").mkdir(parents=True)
    code, _, err = run(*folders)
    assert code == 2
    assert "metrics.csv" in err


# ---- Spread


def test_the_spread_passes_over_what_is_not_defined_and_says_what_is_infinite():
    numbers = {"mean": 3, "sd": 2, "median": 3, "n": 3, "n_infinite": 0}
    assert evaluate.spread([1, math.nan, 3, None, 5]) == numbers
    infinite = {"mean": None, "sd": None, "median": 4, "n": 3, "n_infinite": 1}
    assert evaluate.spread([4, 2, math.inf]) == infinite
    assert evaluate.spread([4, math.inf, math.inf])["median"] is None


def test_the_table_fits_100_columns_with_a_thousand_cases(folders, run, tmp_path):
    run(*folders)
    table = evaluate.format_table(read(tmp_path / "scores")[1], 1000)
    assert max(map(len, table.splitlines())) <= 100
    assert "Background is in no mean" in table
