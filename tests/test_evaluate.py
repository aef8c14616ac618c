"""The scoring script as users run it, on small label maps whose scores can be counted."""

import csv
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.stats import wilcoxon
from torch.nn import functional as F
from warm import run_script

import evaluate
from core.config import load_organs
from core.scoring.case import CEILING_SCORES, Task
from core.scoring.cases import score_or_refuse
from core.scoring.statistics import bootstrap_interval, spread
from core.scoring.tables import ceiling_table, comparison_table, lay_out, score_table
from core.system.files import open_text

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SPACING_MM, VOXEL_ML = (10, 8, 6), (2.0, 1.5, 3.0), 0.009
AFFINE = np.diag([*SPACING_MM, 1.0])
AFFINE[:3, 3] = (-30, 12, 500)
COLUMNS = "case,id,organ,dice,precision,recall,accuracy,nsd,hd95_mm,reference_ml,predicted_ml"
SCORES = ("dice", "precision", "recall", "accuracy", "nsd", "hd95_mm")
LIVER, SPLEEN, AORTA, GALLBLADDER, LEFT_KIDNEY = 1, 3, 5, 9, 13
ORGANS = load_organs()


def save(path: Path, labels: np.ndarray, axes: str = "RAS", affine: np.ndarray = AFFINE) -> Path:
    """Write a label map, (X, Y, Z) in RAS+ order, with its axes stored in another order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(labels.astype(np.uint8), affine)
    nib.save(file.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes))), path)
    return path


def two_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return reference and prediction by case, each (X, Y, Z).

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
    """Return the flags of a run on two cases, predictions and references with their axes stored in different orders."""
    for case, (reference, prediction) in two_cases().items():
        save(tmp_path / "labels" / f"{case}.nii.gz", reference, "LPS")
        save(tmp_path / "predictions" / f"{case}.nii.gz", prediction, "SAR")
    return [f"--{name}={tmp_path / name}" for name in ("labels", "predictions")] + [f"--output={tmp_path / 'scores'}"]


@pytest.fixture
def run(run_main):
    """Run evaluate.py's main and all its work in this process: exit code, stdout and stderr."""
    return partial(run_main, evaluate, "--workers=1")


def read(folder: Path) -> tuple[dict, dict]:
    """Return the rows of metrics.csv by (case, id), and summary.json."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = {(row["case"], int(row["id"])): row for row in csv.DictReader(file)}

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    return rows, json.loads((folder / "summary.json").read_text(), parse_constant=refuse)


def score_pair(run, folder: Path, reference: np.ndarray, prediction: np.ndarray, *flags, axes: str = "RAS") -> dict:
    """Return the row of each organ by id, of one case in files whose axes are stored in some order."""
    save(folder / "labels" / "a.nii.gz", reference, axes)
    save(folder / "predictions" / "a.nii.gz", prediction, axes)
    names = ("labels", "predictions", "output")
    code, _, err = run(*(f"--{name}={folder / name}" for name in names), *flags)
    assert (code, err) == (0, "")
    return {organ: row for (_, organ), row in read(folder / "output")[0].items()}


# ---- What comes out


def test_the_command_scores_two_cases(folders, tmp_path):
    # A notebook's shell names a backend of matplotlib that is not installed here.
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    result = run_script(ROOT / "evaluate.py", *folders, cwd=tmp_path, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    header, *lines = (tmp_path / "scores" / "metrics.csv").read_text().splitlines()
    assert header == COLUMNS
    assert len(lines) == 2 * 13
    # 2 * 3 / (4 + 5), 3 of 5, 3 of 4, 477 of 480 voxels; 4 and 5 voxels of 0.009 mL.
    # The surface of n voxels in a row along Z has n + 1 layers of 4 points. At the ends a point stands for a triangle
    # of sqrt(4.5^2 + 6^2 + 3^2) / 8 mm2, between them for two, together sqrt(4.5^2 + 6^2) / 2 = 3.75 mm2. Only the
    # prediction's last layer, 6 mm from the reference, is beyond the liver's 5 mm; it is 5.9 % of its own surface.
    end, between = 4 * math.sqrt(4.5**2 + 6**2 + 3**2) / 8, 4 * 3.75
    surface = (2 * end + 3 * between) + (2 * end + 4 * between)
    surface_dice = f"{(surface - end) / surface:.6g}"
    assert lines[LIVER - 1] == f"case1,1,liver,0.666667,0.6,0.75,0.99375,{surface_dice},6,0.036,0.045"
    assert lines[SPLEEN - 1] == "case1,3,spleen,0,,0,0.989583,0,inf,0.045,0"
    assert lines[AORTA - 1] == "case1,5,aorta,,,,,,,0,0"
    assert lines[LEFT_KIDNEY - 1] == "case1,13,left kidney,0,0,,0.997917,0,inf,0,0.009"
    assert lines[13] == "case2,1,liver,1,1,1,1,1,0,0.072,0.072"
    *table, last = result.stdout.splitlines()
    assert max(map(len, table)) <= 100
    by_organ = {line[:20].strip(): line[20:].split() for line in table if line}
    numbers = ["2", "0.8333", "0.2357", "0.9833", "3.00", "0.8000", "2", "0.8750", "2", "0.9969"]
    assert by_organ["liver"] == numbers
    assert by_organ["spleen"] == ["1", "0.0000", "-", "0.0000", "inf*", "-", "0", "0.0000", "1", "0.9896"]
    assert by_organ["left kidney"] == ["1", "0.0000", "-", "0.0000", "inf*", "0.0000", "1", "-", "0", "0.9979"]
    assert by_organ["mean over organs"] == ["0.2778", "0.3278", "inf", "0.4000", "0.4375", "0.9948"]
    assert last == f"2 of 2 cases scored, into {tmp_path / 'scores'}: metrics.csv, summary.json, scores.png"
    assert (tmp_path / "scores" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_counted_by_hand(folders, run, tmp_path):
    code, *_ = run(*folders)
    assert code == 0
    _, summary = read(tmp_path / "scores")
    assert set(summary) == {
        "protocol", "mean", "organs", "interval_95", "voxel_accuracy", "cases", "missing", "refused", "extra",
        "in_no_reference", "not_annotated",
        "tolerances_mm", "definitions", "versions",
    }  # fmt: skip
    assert (summary["protocol"], summary["cases"]) == ("default", ["case1", "case2"])
    assert (summary["missing"], summary["refused"], summary["extra"]) == ([], {}, [])
    assert list(summary["organs"]) == list(ORGANS[1:])  # no background
    assert set(SCORES) | {"voxel_accuracy", "interval_95", "mean"} <= set(summary["definitions"])
    dice = summary["organs"]["liver"]["dice"]
    assert dice["mean"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert dice["median"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert dice["sd"] == pytest.approx((1 / 3) / math.sqrt(2), abs=1e-6)  # of a sample of two
    assert (dice["n"], dice["n_infinite"]) == (2, 0)
    assert summary["organs"]["liver"]["hd95_mm"]["mean"] == 3
    # Missed: Dice, NSD and recall 0, HD95 infinite; precision is not defined, and neither is the spread of one case.
    for name in ("dice", "nsd", "recall"):
        assert summary["organs"]["spleen"][name] == {"mean": 0, "sd": None, "median": 0, "n": 1, "n_infinite": 0}
    infinite = {"mean": None, "sd": None, "median": None, "n": 1, "n_infinite": 1}
    assert summary["organs"]["spleen"]["hd95_mm"] == summary["organs"]["left kidney"]["hd95_mm"] == infinite
    nothing = {"mean": None, "sd": None, "median": None, "n": 0, "n_infinite": 0}
    assert summary["organs"]["spleen"]["precision"] == nothing
    assert summary["organs"]["left kidney"]["recall"] == nothing
    assert summary["organs"]["aorta"] == dict.fromkeys(SCORES, nothing)
    # Over the organs where there is something to count: liver, spleen, left kidney.
    assert set(summary["mean"]) == set(SCORES)
    assert summary["mean"]["dice"] == pytest.approx((5 / 6 + 0 + 0) / 3, abs=1e-6)
    assert summary["mean"]["precision"] == pytest.approx((0.8 + 0) / 2)
    assert summary["mean"]["recall"] == pytest.approx((0.875 + 0) / 2)
    assert summary["mean"]["hd95_mm"] is None  # and not the liver's 3 mm
    accuracy = [(477 / 480 + 1) / 2, 475 / 480, 479 / 480]
    assert summary["mean"]["accuracy"] == pytest.approx(sum(accuracy) / 3, abs=1e-6)
    # Wrong: 1 liver voxel missed and 2 made up, 5 of the spleen, 1 of the kidney.
    assert summary["voxel_accuracy"]["mean"] == pytest.approx((471 / 480 + 1) / 2, abs=1e-6)
    # Two cases: all four draws of two are equally likely, so the ends are the means of twice the worse, and of case2.
    assert summary["interval_95"]["dice"] == pytest.approx([(2 / 3) / 3, 1], abs=1e-6)


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
        assert [row[name] for name in SCORES] == ["1", "1", "1", "1", "1", "0"]
        assert row["reference_ml"] == row["predicted_ml"] == f"{(truth == organ).sum() * VOXEL_ML:.6g}"
    assert [rows["a", 13][name] for name in SCORES] == [""] * 6
    assert summary["mean"] == {"dice": 1, "precision": 1, "recall": 1, "accuracy": 1, "nsd": 1, "hd95_mm": 0}
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
    start, end = text.index("\norgans:") + 1, text.index("# ---- Network")
    (tmp_path / "config.yaml").write_text(text[:start] + "organs: [nothing, stone]\n" + text[end:], encoding="utf-8")
    labels = np.zeros(SHAPE)
    labels[0] = 1
    for name in ("labels", "predictions"):
        save(tmp_path / name / "a.nii.gz", labels)
    code, *_ = run(*(f"--{flag}={tmp_path / name}" for flag, name in [
        ("labels", "labels"), ("predictions", "predictions"), ("output", "scores"), ("config", "config.yaml"),
    ]))  # fmt: skip
    assert code == 0
    rows, summary = read(tmp_path / "scores")
    assert list(rows) == [("a", 1)]
    assert rows["a", 1]["organ"] == "stone"
    assert list(summary["organs"]) == ["stone"]


# ---- What is refused


def test_each_bad_case_is_named_and_the_others_are_scored(folders, run, tmp_path):
    labels, predictions = tmp_path / "labels", tmp_path / "predictions"
    for case in ("moved", "cropped", "unknown", "fraction", "nan", "broken", "cut", "reference_unknown"):
        save(labels / f"{case}.nii.gz", np.zeros(SHAPE))
        save(predictions / f"{case}.nii.gz", np.zeros(SHAPE))
    moved = AFFINE.copy()
    moved[0, 3] += 1  # half a voxel
    save(predictions / "moved.nii.gz", np.zeros(SHAPE), affine=moved)
    save(predictions / "cropped.nii.gz", np.zeros((10, 8, 5)))
    save(predictions / "unknown.nii.gz", np.full(SHAPE, 14))
    for case, value in (("fraction", 2.5), ("nan", math.nan)):
        nib.save(nib.Nifti1Image(np.full(SHAPE, value, np.float32), AFFINE), predictions / f"{case}.nii.gz")
    save(labels / "reference_unknown.nii.gz", np.full(SHAPE, 200))
    (predictions / "broken.nii.gz").write_text("no NIfTI at all")
    (predictions / "cut.nii.gz").unlink()
    whole = save(predictions / "cut.nii", np.zeros(SHAPE)).read_bytes()
    (predictions / "cut.nii").write_bytes(whole[: len(whole) // 2])

    code, out, err = run(*folders)
    assert code == 1
    expected = {
        "cropped": "case cropped: the reference has 10x8x6 .*, the prediction 10x8x5 .* expected the same voxels",
        "moved": "case moved: the reference .* from .-30.0, .*, the prediction .* from .-29.0, .* the same voxels",
        "reference_unknown": f"{labels}/reference_unknown.nii.gz: ids outside the organ list: 200 .* expected 0 to 13",
        "unknown": f"{predictions}/unknown.nii.gz: ids outside the organ list: 14 .480 voxels.; expected 0 to 13",
        "fraction": f"{predictions}/fraction.nii.gz: 480 of 480 voxels are no whole numbers, expected organ ids",
        "nan": f"{predictions}/nan.nii.gz: 480 of 480 voxels are no whole numbers, expected organ ids",
        "broken": f"{predictions}/broken.nii.gz: is no NIfTI file: .*",
        "cut": f"{predictions}/cut.nii: has [0-9]+ bytes, too few for .*",
    }
    for sentence in expected.values():
        assert len(re.findall(f"^error: {sentence}$", err, re.MULTILINE)) == 1, sentence
    assert len(err.splitlines()) == len(expected)
    assert "2 of 10 cases scored, 8 refused, into" in out
    rows, summary = read(tmp_path / "scores")
    assert {case for case, _ in rows} == {"case1", "case2"}
    assert summary["cases"] == ["case1", "case2"]
    assert summary["refused"].keys() == expected.keys()
    assert all(re.fullmatch(expected[case], reason) for case, reason in summary["refused"].items())
    assert summary["mean"]["dice"] == pytest.approx((5 / 6 + 0 + 0) / 3, abs=1e-6)  # as without them


def test_a_case_of_one_digit_is_named_when_memory_runs_out():
    def score(_task, _rules):
        raise MemoryError("Unable to allocate 2.19 GiB")

    task = Task("2", Path("labels/2.nii.gz"))
    assert score_or_refuse(task, score, None).refusal == "case 2: Unable to allocate 2.19 GiB"


def test_a_missing_prediction_is_an_error_and_scored_as_missed(folders, run, tmp_path):
    (tmp_path / "predictions" / "case2.nii.gz").unlink()
    code, out, err = run(*folders)
    assert code == 1
    sentence = f"error: case case2: no prediction in {tmp_path / 'predictions'}; scored as missed; "
    assert err == f"{sentence}looked for predictions/case2.nii.gz\n"
    assert "2 of 2 cases scored, 1 of them as missed, into" in out
    rows, summary = read(tmp_path / "scores")
    # As an empty label map would be: 472 of 480 voxels are not liver.
    assert [rows["case2", LIVER][name] for name in SCORES] == ["0", "", "0", "0.983333", "0", "inf"]
    assert (rows["case2", LIVER]["reference_ml"], rows["case2", LIVER]["predicted_ml"]) == ("0.072", "0")
    assert [rows["case2", SPLEEN][name] for name in SCORES] == [""] * 6
    assert (summary["cases"], summary["missing"]) == (["case1", "case2"], ["case2"])
    assert summary["organs"]["liver"]["dice"]["mean"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-6)
    assert (summary["organs"]["liver"]["dice"]["n"], summary["organs"]["liver"]["hd95_mm"]["n_infinite"]) == (2, 1)
    assert re.search(r"^liver +2 .* 6\.00\* ", out, re.MULTILINE) is None  # the median of 6 and infinity is infinite
    assert re.search(r"^liver +2 .* inf\* ", out, re.MULTILINE)


def test_a_case_both_missing_and_without_a_readable_reference_is_refused(folders, run, tmp_path):
    (tmp_path / "predictions" / "case2.nii.gz").unlink()
    (tmp_path / "labels" / "case2.nii.gz").write_text("no NIfTI at all")
    assert run(*folders)[0] == 1
    summary = read(tmp_path / "scores")[1]
    assert (summary["cases"], summary["missing"], list(summary["refused"])) == (["case1"], [], ["case2"])


def test_predictions_without_a_reference_are_reported(folders, run, tmp_path):
    for case in ("another", "more"):
        save(tmp_path / "predictions" / f"{case}.nii.gz", np.zeros(SHAPE))
    code, _, err = run(*folders, "--cases", "case1")  # case2 has a reference: it is not asked for, and no surplus
    assert code == 0
    assert err == f"warning: {tmp_path / 'predictions'}: no reference for 2: another, more\n"
    summary = read(tmp_path / "scores")[1]
    assert (summary["cases"], summary["extra"]) == (["case1"], ["another", "more"])


def test_a_folder_for_other_cases_is_wrong_usage(folders, run, tmp_path):
    (tmp_path / "predictions" / "case1.nii.gz").rename(tmp_path / "predictions" / "seg_1.nii.gz")
    (tmp_path / "predictions" / "case2.nii.gz").rename(tmp_path / "predictions" / "seg_2.nii.gz")
    code, out, err = run(*folders)
    assert (code, out) == (2, "")
    assert "none of its label maps (seg_1, seg_2) belongs to a case of the references (case1, case2)" in err
    assert not (tmp_path / "scores").exists()


def test_references_as_predictions_of_themselves_are_warned_of(folders, run, tmp_path):
    labels, output = tmp_path / "labels", tmp_path / "scores"
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "case1.nii.gz").symlink_to(labels / "case1.nii.gz")
    for references, predictions in ((labels, labels), (tmp_path, tmp_path), (labels, tmp_path / "links")):
        code, _, err = run(f"--labels={references}", f"--predictions={predictions}", f"--output={output}")
        told = f"warning: {predictions}: 1 of 2" if predictions.name == "links" else f"warning: {predictions}: 2 of 2"
        assert f"{told} predictions are the references themselves: case1" in err
        assert code == (1 if predictions.name == "links" else 0)  # there is no link for case2


def test_predictions_beside_a_folder_of_labels_are_the_ones_scored(folders, run, tmp_path):
    assert run(*folders)[0] == 0
    scores = (tmp_path / "scores" / "metrics.csv").read_bytes()
    for path in (tmp_path / "predictions").iterdir():
        path.rename(tmp_path / path.name)  # beside labels/
    flags = (f"--labels={tmp_path}", f"--predictions={tmp_path}", f"--output={tmp_path / 'scores'}")
    warning = f"warning: {tmp_path}: label maps are those of {tmp_path / 'labels'}, not the files beside it\n"
    assert run(*flags)[::2] == (0, warning)
    assert (tmp_path / "scores" / "metrics.csv").read_bytes() == scores


def test_no_case_that_can_be_scored_is_no_perfect_score(folders, run, tmp_path):
    for case in two_cases():
        (tmp_path / "predictions" / f"{case}.nii.gz").write_text("no NIfTI at all")
    code, out, _ = run(*folders)
    assert code == 1
    assert "0 of 2 cases scored, 2 refused, into" in out
    rows, summary = read(tmp_path / "scores")
    assert rows == {}
    assert summary["mean"] == dict.fromkeys(SCORES)
    assert summary["interval_95"] == {"dice": None, "nsd": None}


def test_what_an_earlier_run_left_is_gone_when_this_one_breaks(folders, run, tmp_path):
    assert run(*folders, "--against", tmp_path / "predictions")[0] == 0
    results = tmp_path / "scores"
    assert {path.name for path in results.iterdir()} == {
        "metrics.csv", "other_metrics.csv", "summary.json", "comparison.json", "scores.png",
    }  # fmt: skip
    assert run(*folders)[0] == 0
    assert {path.name for path in results.iterdir()} == {"metrics.csv", "summary.json", "scores.png"}


def test_results_of_other_programs_are_kept(folders, run, tmp_path):
    results = tmp_path / "scores"
    results.mkdir()
    foreign = {
        "metrics.csv": b"epoch,loss\n1,0.5\n",
        "summary.json": b'{"metric_per_case": [], "mean": {}}',  # nnU-Net's
        "comparison.json": b"[1]",
        "scores.png": b"a picture",
    }
    for name, content in foreign.items():
        (results / name).write_bytes(content)
    code, _, err = run(*folders)
    assert code == 0
    assert err.splitlines() == [
        f"warning: not known to be a result of evaluate.py, so the earlier {name} is now {results / name}.old"
        for name in foreign
    ]
    assert run(*folders)[2] == ""  # our own are replaced
    assert {path.name for path in results.iterdir()} == {
        "metrics.csv", "summary.json", "scores.png", *(f"{name}.old" for name in foreign),
    }  # fmt: skip
    assert all((results / f"{name}.old").read_bytes() == content for name, content in foreign.items())


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
        (["--against={}/nowhere"], "error: {}/nowhere: no such folder\n"),
        (["--tolerance-mm=-1"], "error: --tolerance-mm: got -1.0, expected millimetres of 0 or more\n"),
        (["--tolerance-mm=nan"], "error: --tolerance-mm: got nan"),
        (["--workers=0"], "--workers: got 0, expected 1 or more"),
        (["--protocol=flare23"], "invalid choice: 'flare23'"),
        (["--protocol=flare22", "--distances"], "--distances: the flare22 protocol has none"),
        (["--ceiling", "--size", "8"], "expected 3 arguments"),
        (["--size", "8", "8", "8"], "expected --predictions DIR, or --ceiling (which takes --size and --crop)"),
        (["--ceiling"], "--ceiling takes --labels and --size; leave out --predictions"),
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


# ---- Distances, tolerances and tables


def test_distances_are_added_at_the_end(folders, run, tmp_path):
    code, *_ = run(*folders, "--distances")
    assert code == 0
    rows, summary = read(tmp_path / "scores")
    header = (tmp_path / "scores" / "metrics.csv").read_text().splitlines()[0]
    assert header == COLUMNS + ",hd_mm,mean_distance_mm"
    # Of the layers of points (see above) the reference's first is 3 mm away, the prediction's last two 3 and 6 mm.
    end, between = 4 * math.sqrt(4.5**2 + 6**2 + 3**2) / 8, 4 * 3.75
    mean_mm = (3 * end + 3 * between + 6 * end) / (4 * end + 7 * between)
    assert (rows["case1", LIVER]["hd_mm"], rows["case1", LIVER]["mean_distance_mm"]) == ("6", f"{mean_mm:.6g}")
    assert (rows["case1", SPLEEN]["hd_mm"], rows["case1", SPLEEN]["mean_distance_mm"]) == ("inf", "inf")
    assert (rows["case1", AORTA]["hd_mm"], rows["case1", AORTA]["mean_distance_mm"]) == ("", "")
    assert summary["organs"]["liver"]["hd_mm"]["mean"] == 3
    assert summary["organs"]["spleen"]["mean_distance_mm"]["n_infinite"] == 1


def test_hd95_leaves_out_the_farthest_twentieth_of_the_surface(run, tmp_path):
    reference, prediction = np.zeros(SHAPE), np.zeros(SHAPE)
    reference[:9, 0, 0] = prediction[:10, 0, 0] = LIVER
    row = score_pair(run, tmp_path, reference, prediction, "--distances")[LIVER]
    # The prediction's last layer, 2 mm away, is 4.04 of 128.82 mm2: 3 %.
    assert (row["hd95_mm"], row["hd_mm"]) == ("0", "2")


@pytest.mark.parametrize(("degrees", "warned"), [(0.2, False), (15, True)])
def test_distances_on_sheared_slices_come_with_a_warning(run, tmp_path, degrees, warned):
    sheared = AFFINE.copy()
    sheared[1, 2] = SPACING_MM[2] * math.tan(math.radians(degrees))
    for name in ("labels", "predictions"):
        save(tmp_path / name / "a.nii.gz", column(0, 3, LIVER), affine=sheared)
    code, _, err = run(*(f"--{name}={tmp_path / name}" for name in ("labels", "predictions", "output")))
    warning = "warning: case a: NSD and HD95 are not exact, since its slices are sheared (tilted gantry)\n"
    assert (code, err.count(warning)) == (0, int(warned))


def test_tolerances_go_by_name_and_others_by_the_flag(folders, run, tmp_path):
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    start, end = text.index("\norgans:") + 1, text.index("# ---- Network")
    (tmp_path / "config.yaml").write_text(
        text[:start] + "organs: [nothing, cyst, b, spleen, liver, e, f, g, h, i, j, k, l, m]\n" + text[end:],
        encoding="utf-8",
    )
    flags = [*folders, f"--config={tmp_path / 'config.yaml'}"]
    nsd, tolerances = [], []
    for more in ([], ["--tolerance-mm=6"]):
        code, _, err = run(*flags, *more)
        said = "--tolerance-mm: does not change FLARE22's tolerances, which spleen, liver have"
        assert (code, said in err) == (0, bool(more))
        rows, summary = read(tmp_path / "scores")
        nsd.append(float(rows["case1", LIVER]["nsd"]))
        tolerances.append(summary["tolerances_mm"])
    end, between = 4 * math.sqrt(4.5**2 + 6**2 + 3**2) / 8, 4 * 3.75
    assert nsd == [pytest.approx(1 - end / (4 * end + 7 * between), abs=1e-6), 1]  # within 3 mm, the default, and 6
    assert [(t["cyst"], t["spleen"], t["liver"]) for t in tolerances] == [(3, 3, 5), (6, 3, 5)]


def test_a_markdown_table_has_the_same_numbers(folders, run, tmp_path):
    _, text, _ = run(*folders)
    _, markdown, _ = run(*folders, "--table=md")
    header, rule, *lines = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    assert {len(line) for line in cells} == {11}
    assert all(re.fullmatch(r"-{3,}|-{2,}:", cell.strip()) for cell in rule.strip("|").split("|"))
    by_organ = {line[:20].strip(): line[20:].split() for line in text.splitlines() if line}
    assert by_organ["liver"] == cells[1][1:]
    assert by_organ["left kidney"] == cells[13][1:]
    assert by_organ["mean over organs"] == [cell for cell in cells[14][1:] if cell]


def test_names_of_two_sides_are_cut_in_their_middle():
    lines = [["organ", "Dice"], *([f"gluteus_maximus_muscle_{side}", "1"] for side in ("left", "right"))]
    assert [line.split("  ")[0] for line in lay_out(lines, markdown=False).splitlines()[1:]] == [
        "gluteus_m…uscle_left", "gluteus_m…scle_right",
    ]  # fmt: skip


def test_tables_fit_100_columns_with_a_thousand_cases_and_long_names(run):
    spread = {"mean": 0.12345678, "sd": 0.12345678, "median": 123.456789, "n": 1000, "n_infinite": 999}
    scores = dict.fromkeys(SCORES, spread)
    summary = {
        "organs": dict.fromkeys([*ORGANS[1:], "portal vein and splenic vein"], scores),
        "mean": dict.fromkeys(SCORES, 0.12345678),
        "interval_95": {"dice": [0.12345678, 0.987654321], "nsd": [0.12345678, 0.987654321]},
    }
    pair = {"mean": 0.1234567, "other_mean": 0.1234567, "difference": -0.1234567, "interval_95": [-0.123456, 0.123456]}
    pair |= {"p": 1.23456e-300, "n": 1000, "n_unpaired": 1}
    compared = {"mean": pair, "organs": dict.fromkeys(summary["organs"], pair)}
    for cases in (9, 1000):
        table = score_table(summary, cases)
        assert max(map(len, table.splitlines())) <= 100
        assert "Background is in no mean" in table
        assert "123.46*" in table
        assert ("too few" in table) == (cases == 9)
    assert max(map(len, comparison_table("Dice", compared).splitlines())) <= 100
    ceiling = {"mean": dict.fromkeys(CEILING_SCORES, 0.5)}
    ceiling["organs"] = dict.fromkeys(summary["organs"], dict.fromkeys(CEILING_SCORES, spread))
    assert max(map(len, ceiling_table(ceiling, (256, 256, 128), "none").splitlines())) <= 100


# ---- The two protocols


def column(first: int, last: int, organ: int = AORTA) -> np.ndarray:
    """Return a label map with an organ of 2 x 2 voxels from slice `first` to slice `last` along Z."""
    labels = np.zeros((8, 8, 10))
    labels[2:4, 2:4, first : last + 1] = organ
    return labels


# The surface of such a column has a layer of 3 x 3 points below, between and above its slices, of this area in mm2: at
# its ends 4 corners, 4 edges and the middle, elsewhere 4 edges and 4 faces around. Voxels are 2 x 1.5 x 3 mm.
END = 4 * math.sqrt(4.5**2 + 6**2 + 3**2) / 8 + math.sqrt(6**2 + 3**2) + math.sqrt(4.5**2 + 3**2) + 3
AROUND = 4 * 3.75 + 2 * 4.5 + 2 * 6


def test_both_protocols_on_an_aorta_that_goes_on_above_the_reference(run, tmp_path):
    reference, prediction = column(1, 4), column(2, 7)
    row = score_pair(run, tmp_path, reference, prediction)[AORTA]
    # 3 of 4 slices found, 3 made up. Of the reference's layers, 1 to 5, the first is 3 mm from the prediction's, 2 to
    # 8, of which the last three are 3 mm away and more. The aorta's tolerance is 2 mm.
    assert row["dice"] == "0.6"
    areas = (2 * END + 3 * AROUND) + (2 * END + 5 * AROUND)
    assert row["nsd"] == f"{(areas - END - 2 * AROUND - END) / areas:.6g}" == "0.697465"
    row = score_pair(run, tmp_path, reference, prediction, "--protocol=flare22")[AORTA]
    # Slices 1, 2, 3: the reference's 4 is left out. 2 of 3 found, none made up. The layers of the reference are 1 to 4,
    # of which the first is 3 mm away, those of the prediction 2 to 4.
    assert row["dice"] == "0.8"
    areas = (2 * END + 2 * AROUND) + (2 * END + AROUND)
    assert row["nsd"] == f"{(areas - END) / areas:.4f}" == "0.8962"
    assert [row[name] for name in ("precision", "recall", "accuracy", "hd95_mm")] == [""] * 4
    assert (row["reference_ml"], row["predicted_ml"]) == ("0.144", "0.216")  # of the whole scan


@pytest.mark.parametrize(
    ("axes", "dice"),
    [
        ("RAS", "0.8"),
        ("LPS", "0.8"),
        ("RAI", "1"),  # the last stored slice is the lowest, 1: the others are found
        ("SAR", "0.6"),  # stored slices go along X: one of the two is left, with 3 of 4 voxels found and 3 made up
    ],
)
def test_flare22_counts_slices_along_the_third_axis_as_stored(run, tmp_path, axes, dice):
    rows = score_pair(run, tmp_path, column(1, 4), column(2, 7), "--protocol=flare22", axes=axes)
    assert rows[AORTA]["dice"] == dice
    assert score_pair(run, tmp_path, column(1, 4), column(2, 7), axes=axes)[AORTA]["dice"] == "0.6"


def test_flare22_limits_only_aorta_vena_cava_and_esophagus(run, tmp_path):
    reference, prediction = np.zeros((14, 4, 10)), np.zeros((14, 4, 10))
    for organ in range(1, 14):
        reference[organ, 1:3, 1:5] = prediction[organ, 1:3, 2:8] = organ
    rows = score_pair(run, tmp_path, reference, prediction, "--protocol=flare22")
    limited = {name for organ, name in enumerate(ORGANS) if organ and rows[organ]["dice"] == "0.8"}
    assert limited == {"aorta", "inferior vena cava", "esophagus"}
    assert {row["dice"] for row in rows.values()} == {"0.8", "0.6"}


def test_flare22_keeps_an_organ_of_one_slice(run, tmp_path):
    rows = score_pair(run, tmp_path, column(3, 3), column(3, 4), "--protocol=flare22")
    assert (rows[AORTA]["dice"], rows[AORTA]["nsd"]) == ("1", "1")
    # An aorta that is predicted, but not in the slice, is no finding there.
    rows = score_pair(run, tmp_path, column(3, 3), column(4, 5), "--protocol=flare22")
    assert (rows[AORTA]["dice"], rows[AORTA]["nsd"]) == ("0", "0")


def test_flare22_scores_what_is_absent(run, tmp_path):
    nothing = column(1, 4) * 0
    rows = score_pair(run, tmp_path, nothing, column(1, 4), "--protocol=flare22")
    assert [(rows[organ]["dice"], rows[organ]["nsd"]) for organ in (AORTA, LIVER)] == [("0", "0"), ("1", "1")]
    rows = score_pair(run, tmp_path, column(1, 4), nothing, "--protocol=flare22")
    assert [(rows[organ]["dice"], rows[organ]["nsd"]) for organ in (AORTA, LIVER)] == [("0", "0"), ("1", "1")]
    summary = read(tmp_path / "output")[1]
    assert summary["protocol"] == "flare22"
    assert set(summary["mean"]) == {"dice", "nsd"}
    assert summary["mean"]["dice"] == pytest.approx(12 / 13)
    assert summary["organs"]["liver"]["dice"]["n"] == 1


@pytest.mark.parametrize(("voxels", "dice"), [(9, "0.2"), (10, "0.1818")])
def test_flare22_gives_no_surface_score_below_a_dice_of_a_fifth(run, tmp_path, voxels, dice):
    """One liver voxel, found as a row of many: all but the far ones lie within the tolerance of 5 mm."""
    reference, prediction = np.zeros((10, 8, 6)), np.zeros((10, 8, 6))
    reference[0, 0, 0] = prediction[:voxels, 0, 0] = LIVER  # Dice 2 / (1 + voxels)
    default = score_pair(run, tmp_path, reference, prediction)[LIVER]
    official = score_pair(run, tmp_path, reference, prediction, "--protocol=flare22")[LIVER]
    assert float(default["nsd"]) > 0.3
    assert official["dice"] == dice
    assert official["nsd"] == (f"{float(default['nsd']):.4f}" if voxels == 9 else "0")


def test_flare22_rounds_each_case_to_4_places(run, tmp_path):
    reference, prediction = np.zeros(SHAPE), np.zeros(SHAPE)
    reference[0, 0, 0:4] = prediction[0, 0, 1:6] = LIVER
    rows = score_pair(run, tmp_path, reference, prediction, "--protocol=flare22")
    assert (rows[LIVER]["dice"], rows[LIVER]["nsd"]) == ("0.6667", "0.9667")
    assert read(tmp_path / "output")[1]["organs"]["liver"]["dice"]["mean"] == 0.6667


def test_flare22_takes_the_voxel_size_from_pixdim(run, tmp_path):
    """The official script reads no affine; where both disagree, the default protocol keeps to the affine."""
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[0, 0, 0:4] = prediction[0, 0, 1:5] = LIVER  # 3 mm off by the affine, 6 mm by pixdim
    for name, labels in (("labels", reference), ("predictions", prediction)):
        header = nib.Nifti1Header()
        header.set_data_shape(SHAPE)
        header.set_sform(AFFINE, 1)
        header.set_zooms((2, 1.5, 6))
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(labels, None, header), tmp_path / name / "a.nii.gz")
    nsd = {}
    for protocol in ("default", "flare22"):
        names = ("labels", "predictions", "output")
        assert run(*(f"--{name}={tmp_path / name}" for name in names), f"--protocol={protocol}")[0] == 0
        nsd[protocol] = float(read(tmp_path / "output")[0]["a", LIVER]["nsd"])
    assert nsd["default"] == 1
    assert nsd["flare22"] < 0.95


@pytest.mark.parametrize("pixdim", [0, np.nan, np.inf, -3, 0.003])  # the last in metres
def test_flare22_takes_the_affine_where_pixdim_is_no_size(run, tmp_path, pixdim):
    reference, prediction = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[0, 0, 0:4] = prediction[0, 0, 1:5] = LIVER  # 3 mm off by the affine
    for name, labels in (("labels", reference), ("predictions", prediction)):
        content = bytearray(nib.Nifti1Image(labels, AFFINE).to_bytes())
        content[88:92] = np.float32(pixdim).tobytes()  # pixdim[3], which nibabel would not write
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii").write_bytes(content)
    names = ("labels", "predictions", "output")
    code, _, err = run(*(f"--{name}={tmp_path / name}" for name in names), "--protocol=flare22")
    assert (code, err) == (0, "warning: case a: its header's pixdim is no voxel size; the affine's is used\n")
    assert float(read(tmp_path / "output")[0]["a", LIVER]["nsd"]) == 1


def test_flare22_gives_a_missing_prediction_nothing(folders, run, tmp_path):
    (tmp_path / "predictions" / "case2.nii.gz").unlink()
    code, *_ = run(*folders, "--protocol=flare22")
    assert code == 1
    rows, _ = read(tmp_path / "scores")
    assert {(rows["case2", organ]["dice"], rows["case2", organ]["nsd"]) for organ in range(1, 14)} == {("0", "0")}
    assert (rows["case2", LIVER]["reference_ml"], rows["case2", LIVER]["predicted_ml"]) == ("0.072", "0")


# ---- Intervals and comparisons


def test_the_spread_passes_over_what_is_not_defined_and_says_what_is_infinite():
    numbers = {"mean": 3, "sd": 2, "median": 3, "n": 3, "n_infinite": 0}
    assert spread([1, math.nan, 3, math.nan, 5]) == numbers
    infinite = {"mean": None, "sd": None, "median": 4, "n": 3, "n_infinite": 1}
    assert spread([4, 2, math.inf]) == infinite
    assert spread([4, math.inf, math.inf])["median"] is None
    assert spread([]) == {"mean": None, "sd": None, "median": None, "n": 0, "n_infinite": 0}


def test_the_interval_is_that_of_resampling_the_cases():
    random = np.random.default_rng(1)
    table = np.clip(random.normal([0.9, 0.7, 0.5], [0.02, 0.05, 0.2], (40, 3)) + random.normal(0, 0.05, (40, 1)), 0, 1)
    table[random.random(table.shape) < 0.2] = np.nan
    means = []
    for _ in range(4000):
        drawn = table[random.integers(0, 40, 40)]
        means.append(np.mean([np.nanmean(organ) for organ in drawn.T]))
    low, high = bootstrap_interval(table)
    assert [low, high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.15 * (high - low))
    assert low < np.nanmean(table, axis=0).mean() < high
    assert bootstrap_interval(table) == [low, high]  # seeded
    assert bootstrap_interval(table[:, ::-1]) == pytest.approx([low, high])


def test_the_interval_of_a_mean_is_about_two_standard_errors_each_way():
    values = np.random.default_rng(0).normal(0.8, 0.1, 400)
    low, high = bootstrap_interval(values[:, None])
    error = values.std(ddof=1) / 20
    assert [low, high] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.2 * error)


def test_an_interval_needs_two_cases():
    assert bootstrap_interval(np.array([[0.5, 0.7]])) is None
    assert bootstrap_interval(np.full((5, 2), np.nan)) is None
    assert bootstrap_interval(np.zeros((0, 2))) is None
    assert bootstrap_interval(np.array([[0.5], [np.nan], [0.5]])) == [0.5, 0.5]


@pytest.fixture
def ten_cases(tmp_path) -> list[str]:
    """Return the flags of a comparison: two sets of predictions of ten cases, good ones and worse ones."""
    random = np.random.default_rng(0)
    for case in range(10):
        reference = np.zeros(SHAPE)
        reference[1:6, 1:6, 1:5] = LIVER
        reference[6:9, 2:6, 1:5] = SPLEEN
        save(tmp_path / "labels" / f"c{case}.nii.gz", reference)
        for name, wrong in (("good", 0.02), ("worse", 0.1)):
            prediction = np.where(random.random(SHAPE) < wrong * (1 + case / 10), LIVER, reference)
            save(tmp_path / name / f"c{case}.nii.gz", prediction)
    folders = {"labels": "labels", "predictions": "good", "against": "worse", "output": "scores"}
    return [f"--{flag}={tmp_path / name}" for flag, name in folders.items()]


def per_case(path: Path, score: str, organ: int | None = None) -> np.ndarray:
    """Read each case's mean over organs, or one organ's score, (cases,), straight from a CSV file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    cases = dict.fromkeys(row["case"] for row in rows)
    chosen = [row for row in rows if row[score] and organ in (None, int(row["id"]))]
    return np.array([np.mean([float(row[score]) for row in chosen if row["case"] == case]) for case in cases])


def test_a_comparison_is_scipys_on_the_written_numbers(ten_cases, run, tmp_path):
    code, out, err = run(*ten_cases)
    assert (code, err) == (0, "")
    comparison = json.loads((tmp_path / "scores" / "comparison.json").read_text())
    assert (comparison["cases"], comparison["left_out"]) == ([f"c{i}" for i in range(10)], [])
    for score in ("dice", "nsd"):
        for organ, found in ((None, comparison[score]["mean"]), (LIVER, comparison[score]["organs"]["liver"])):
            here, other = (per_case(tmp_path / "scores" / f"{of}metrics.csv", score, organ) for of in ("", "other_"))
            differences = here - other
            assert found["p"] == pytest.approx(wilcoxon(differences).pvalue, rel=1e-12)
            assert found["p"] < 0.05
            assert (found["n"], found["n_unpaired"]) == (10, 0)
            assert found["mean"] == pytest.approx(here.mean())
            assert found["other_mean"] == pytest.approx(other.mean())
            assert found["difference"] == pytest.approx(differences.mean())
            assert found["median_difference"] == pytest.approx(np.median(differences))
            low, high = found["interval_95"]
            assert 0 < low < found["difference"] < high
    mean = comparison["dice"]["mean"]
    assert re.search(rf"^mean of a case +10 .* \{mean['difference']:+.4f} .* {mean['p']:.2g}$", out, re.MULTILINE)
    assert comparison["dice"]["organs"]["aorta"] == {
        "n": 0, "n_unpaired": 0, "mean": None, "other_mean": None, "difference": None, "median_difference": None,
        "interval_95": None, "p": None,
    }  # fmt: skip


def test_predictions_against_themselves_do_not_differ(ten_cases, run, tmp_path):
    code, *_ = run(*ten_cases, f"--against={tmp_path / 'good'}")
    assert code == 0
    comparison = json.loads((tmp_path / "scores" / "comparison.json").read_text())
    found = comparison["dice"]["mean"]
    assert (found["difference"], found["p"], found["interval_95"], found["n"]) == (0, 1, [0, 0], 10)
    first, second = (tmp_path / "scores" / name for name in ("metrics.csv", "other_metrics.csv"))
    assert first.read_text() == second.read_text()


def test_what_only_one_side_has_is_said_and_counts_against_it(ten_cases, run, tmp_path):
    made_up = nib.load(tmp_path / "worse" / "c0.nii.gz").get_fdata()
    made_up[0, 0, 0] = GALLBLADDER  # which the reference does not have
    save(tmp_path / "worse" / "c0.nii.gz", made_up)
    (tmp_path / "worse" / "c1.nii.gz").unlink()
    (tmp_path / "worse" / "c2.nii.gz").write_text("no NIfTI at all")
    code, out, err = run(*ten_cases)
    assert code == 1
    assert f"error: case c1: no prediction in {tmp_path / 'worse'}; scored as missed" in err
    comparison = json.loads((tmp_path / "scores" / "comparison.json").read_text())
    assert (comparison["left_out"], len(comparison["cases"])) == (["c2"], 9)
    assert comparison["missing"] == {"predictions": [], "against": ["c1"]}
    assert "over 9 cases, 1 of them without a prediction on one side, compared as missed; p:" in " ".join(out.split())
    gallbladder = comparison["dice"]["organs"]["gallbladder"]
    assert (gallbladder["n"], gallbladder["n_unpaired"]) == (0, 1)
    assert "on one side only" in out
    other = per_case(tmp_path / "scores" / "other_metrics.csv", "dice")
    assert comparison["dice"]["mean"]["other_mean"] == pytest.approx(other.mean())
    assert other[1] == 0  # missed
    liver, spleen = (per_case(tmp_path / "scores" / "other_metrics.csv", "dice", organ)[0] for organ in (LIVER, SPLEEN))
    assert other[0] == pytest.approx((liver + spleen + 0) / 3)


# ---- The ceiling


def blobs() -> np.ndarray:
    """Make organs of all sizes, down to one voxel, (16, 16, 12)."""
    places = np.random.default_rng(3).random((14, 3)) * (16, 16, 12)
    grid = np.stack(np.meshgrid(*map(np.arange, (16, 16, 12)), indexing="ij"), axis=-1)
    apart = np.linalg.norm(grid[:, :, :, None] - places, axis=-1) - np.linspace(1, 6, 14)
    return np.where(apart.min(axis=-1) < 0, apart.argmin(axis=-1), 0).astype(np.uint8)


def run_ceiling(run, folder: Path, labels: np.ndarray, size: tuple[int, int, int], *flags) -> dict:
    """Return the content of ceiling.json for one label map."""
    save(folder / "labels" / "a.nii.gz", labels)
    code, out, err = run(
        f"--labels={folder / 'labels'}", f"--output={folder / 'out'}", "--ceiling", *flags, "--size", *size
    )
    assert (code, err) == (0, "")
    assert f"{'x'.join(map(str, size))} voxels" in out
    return json.loads((folder / "out" / "ceiling.json").read_text())


def test_the_ceiling_is_1_where_the_grid_is_the_scans_own(run, tmp_path):
    ceiling = run_ceiling(run, tmp_path, blobs(), (16, 16, 12))
    assert ceiling["mean"] == dict.fromkeys(CEILING_SCORES, 1)
    assert ceiling["size"] == [16, 16, 12]
    assert ceiling["cases"] == ["a"]


def test_the_ceiling_of_a_coarser_grid_is_what_torch_makes_of_it(run, tmp_path):
    labels, size = blobs(), (9, 11, 7)
    ceiling = run_ceiling(run, tmp_path, labels, size)

    def one_hot(ids: torch.Tensor) -> torch.Tensor:
        return F.one_hot(ids.long(), 14).permute(3, 0, 1, 2)[None].double()

    def resize(volumes: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return F.interpolate(volumes, shape, mode="trilinear", align_corners=False)

    shares = resize(one_hot(torch.from_numpy(labels)), size)
    for ending, logits in (("", shares), ("_as_labels", one_hot(shares[0].argmax(dim=0)))):
        restored = resize(logits, labels.shape)[0].argmax(dim=0).numpy()
        for organ in np.unique(labels)[1:]:
            found, there = restored == organ, labels == organ
            dice = ceiling["organs"][ORGANS[organ]][f"dice{ending}"]["mean"]
            assert dice == pytest.approx(2 * (found & there).sum() / (found.sum() + there.sum()), abs=1e-6), ORGANS[
                organ
            ]
    assert 0.5 < ceiling["mean"]["dice_as_labels"] < ceiling["mean"]["dice"] < 1
    header, *rows = (tmp_path / "out" / "ceiling.csv").read_text().splitlines()
    assert header == "case,id,organ,dice,nsd,dice_as_labels,nsd_as_labels"
    assert len(rows) == 13


def test_the_ceiling_counts_all_voxels_of_a_coarse_one(run, tmp_path):
    labels = np.zeros((12, 4, 4))
    labels[3:] = LIVER
    liver = run_ceiling(run, tmp_path, labels, (3, 4, 4))["organs"]["liver"]
    # Shares of 9/28, 31/32 and 1, so that the half lies between voxels 2 and 3, where the border is. The labels 0, 1, 1
    # put it between 3 and 4: 8 of 9 slices are found.
    assert liver["dice"]["mean"] == 1
    assert liver["dice_as_labels"]["mean"] == pytest.approx(16 / 17, abs=1e-6)


def test_the_ceiling_takes_the_size_of_the_settings_and_leaves_scores_alone(folders, run, tmp_path):
    assert run(*folders)[0] == 0
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(re.sub(r"(?m)^size:.*$", "size: [5, 4, 3]", text), encoding="utf-8")
    code, out, _ = run(*folders[::2], "--ceiling", f"--config={tmp_path / 'config.yaml'}")
    assert code == 0
    assert "5x4x3 voxels" in out
    assert {"metrics.csv", "summary.json", "ceiling.csv", "ceiling.json"} <= {
        path.name for path in (tmp_path / "scores").iterdir()
    }


def test_the_ceiling_of_the_organs_box_is_1_where_the_grid_is_the_boxs_own(run, tmp_path):
    labels = np.zeros((24, 20, 18))
    labels[5:15, 4:14, 3:13] = blobs()[:10, :10, :10]
    labels[[5, 14], [4, 13], [3, 12]] = LIVER  # the corners: 10 voxels along each axis, and one more on each side
    ceiling = run_ceiling(run, tmp_path, labels, (12, 12, 12), "--crop", "organs")
    assert set(ceiling["mean"].values()) == {1}
    assert ceiling["crop"] == "organs"
    assert run_ceiling(run, tmp_path, labels, (12, 12, 12))["mean"]["dice"] < 1


def test_the_ceiling_of_the_body_is_refused(folders, run):
    code, _, err = run(*folders[::2], "--ceiling", "--crop", "body")
    assert code == 2
    assert "--crop: got body, which takes the scans, but --ceiling reads label maps; expected none or organs" in err


def test_the_ceiling_names_what_it_cannot_read(folders, run, tmp_path):
    (tmp_path / "labels" / "case1.nii.gz").write_text("no NIfTI at all")
    code, out, err = run(*folders[::2], "--ceiling", "--size", 5, 4, 3)
    assert code == 1
    assert "case1.nii.gz: is no NIfTI file" in err
    assert "1 of 2 cases" in out


# ---- Many cases, and breaks


@pytest.fixture
def slow_cases(tmp_path) -> list[str]:
    """Return the flags of a run on twelve cases of noise, each of which takes a moment."""
    random = np.random.default_rng(0)
    for case in range(12):
        for name in ("labels", "predictions"):
            save(tmp_path / name / f"c{case:02}.nii.gz", random.integers(0, 14, (40, 40, 40)))
    return [f"--{name}={tmp_path / name}" for name in ("labels", "predictions")] + [f"--output={tmp_path / 'scores'}"]


def start(*flags) -> subprocess.Popen:
    """Start the command in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, ROOT / "evaluate.py", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def lines_of(folder: Path) -> list[str]:
    """Return the lines of metrics.csv as it is now; none when there is none."""
    path = folder / "metrics.csv"
    return path.read_text().splitlines() if path.is_file() else []


def wait_for(condition, seconds: float = 90.0) -> None:
    """Wait until something is so; fail when it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "has not come about"
        time.sleep(0.02)


def group(command: subprocess.Popen) -> list[int]:
    """Return the ids of all processes that still run in the command's group, workers of its own included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # has just ended
            continue
        if int(of_group) == command.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_files(ten_cases, tmp_path):
    files = []
    for workers in (1, 3):
        done = start(*ten_cases, f"--workers={workers}")
        out, err = done.communicate(timeout=120)
        assert (done.returncode, err) == (0, "")
        files.append({path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} | {"out": out})
    assert files[0] == files[1]
    assert len(files[0]) == 6


@pytest.mark.slow
def test_a_kill_loses_no_finished_case(slow_cases, run, tmp_path):
    command = start(*slow_cases, "--workers=2")
    wait_for(lambda: len(lines_of(tmp_path / "scores")) > 13)
    os.kill(command.pid, signal.SIGKILL)
    command.communicate(timeout=60)
    wait_for(lambda: not group(command))  # the workers leave too
    header, *rows = lines_of(tmp_path / "scores")
    assert header == COLUMNS
    assert 0 < len(rows) < 6 * 13  # not only when a buffer is full
    assert len(rows) % 13 == 0
    finished = {row.split(",")[0] for row in rows}
    assert run(*slow_cases, "--cases", *finished)[0] == 0
    assert sorted(rows) == sorted(lines_of(tmp_path / "scores")[1:])
    assert not list((tmp_path / "scores").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_all_processes_in_one_sentence(slow_cases, tmp_path, workers, early):
    command = start(*slow_cases, f"--workers={workers}")
    # Early: while the workers are being started.
    wait_for(lambda: len(lines_of(tmp_path / "scores")) > (0 if early else 13))
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, "")
    assert err == "interrupted; what was written before is whole\n"
    wait_for(lambda: not group(command))
    assert (len(lines_of(tmp_path / "scores")) - 1) % 13 == 0


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_in_one_sentence(slow_cases, tmp_path):
    command = start(*slow_cases, "--workers=2")
    wait_for(lambda: len(lines_of(tmp_path / "scores")) > 13)
    # The youngest process is a worker: the command, its resource tracker and the server were started before.
    os.kill(max(group(command)), signal.SIGKILL)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (3, "")
    assert err == (
        "error: one of 2 worker processes was killed, most likely because memory ran out; "
        "try again with fewer --workers\n"
    )
    wait_for(lambda: not group(command))
    assert (len(lines_of(tmp_path / "scores")) - 1) % 13 == 0
    assert not (tmp_path / "scores" / "summary.json").exists()


@pytest.mark.slow
def test_what_is_under_way_is_not_waited_for():
    """A task of ten minutes beside one that is done, after which the loop is left."""
    code = (
        "import time\nfrom contextlib import closing\nfrom core.system.parallel import in_processes\n"
        "with closing(in_processes(time.sleep, [0, 600], 2)) as done:\n    print(next(done))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(0, None)\n", "")


def test_without_matplotlib_only_the_picture_is_missing(folders, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "visualization.scores", raising=False)
    monkeypatch.delitem(sys.modules, "visualization.style", raising=False)
    code, out, err = run(*folders)
    assert code == 0
    assert err == "warning: no scores.png, since matplotlib is not installed\n"
    assert out.splitlines()[-1].endswith("metrics.csv, summary.json")
    assert not (tmp_path / "scores" / "scores.png").exists()


def test_a_picture_that_cannot_be_drawn_costs_no_table(folders, run, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scores.png")

    monkeypatch.setattr("visualization.scores.draw_scores", full)
    code, out, err = run(*folders)
    assert (code, err) == (0, "warning: no scores.png: [Errno 28] No space left on device: 'scores.png'\n")
    assert out.startswith("organ ")
    assert out.splitlines()[-1].endswith("metrics.csv, summary.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["metrics.csv", "ceiling.csv"])
def test_a_full_disk_stops_the_command_with_the_files_name(folders, run, tmp_path, monkeypatch, name):
    monkeypatch.setattr("core.scoring.cases.open_text", lambda _, mode: open_text("/dev/full", mode))
    flags = folders if name == "metrics.csv" else [folders[0], folders[2], "--ceiling", "--size", "8", "8", "8"]
    code, _, err = run(*flags)
    assert code == 3
    assert err.splitlines()[-1] == f"error: [Errno 28] No space left on device: '{tmp_path / 'scores' / name}'"
    assert run(folders[0], folders[1], "--output=/dev/full/scores")[0] == 2  # never a folder
