"""Scans without labels turned into a data set, and trained on beside labelled cases, by the real commands."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_files import make_slice, write
from helpers import TINY, files_in
from torch import nn
from warm import ROOT, run_script

import train
from core.checkpoint import load_checkpoint, load_network, save_checkpoint
from core.scans.anatomy import organs_in
from core.scans.annotated import read_annotated, write_annotated
from core.scans.volumes import load_labels, load_scan
from core.scans.weights import read_weights, write_weights
from data import convert, doctor, made_labels, pseudo_label
from data.agreement import inverse, predict_and_compare, views
from data.judging import Limits, judge
from dataset import find_cases

ORGANS = ["background", "liver", "right kidney", "spleen", "left kidney"]


@pytest.fixture(scope="module")
def trained(phantom_data, tmp_path_factory) -> Path:
    """Return the run folder of a network that knows phantoms: 40 epochs of 5 cases on a small grid."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--channels", "4", "--epochs", "40", "--optimizer", "muon", "--val-interval", "40"]
    where = ["--data-dir", phantom_data, "--run-dir", folder / "run", "--cache-dir", folder / "cache"]
    done = run_script("train.py", *where, *flags, "--checkpoint-minutes", "10", "--val-fraction", "0")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(run_main):
    def run(*arguments: object) -> tuple[int, str, str]:
        return run_main(pseudo_label, *arguments, "--device", "cpu")

    return run


def rows_of(folder: Path) -> list[dict]:
    with open(folder / "pseudo_labels.csv", newline="") as file:
        return list(csv.DictReader(file))


CASES = ["--cases", "phantom_0001", "phantom_0002"]
LENIENT = ["--min-agreement", "0.5", "--min-organs", "0.2"]


@pytest.fixture
def made(run, trained, phantom_data, tmp_path) -> Path:
    """Return a data set that two phantoms were taken into."""
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "made"]
    code, out, err = run(phantom_data, *flags, *LENIENT, *CASES)
    assert (code, "2 of 2 scans taken" in out) == (0, True), err
    return tmp_path / "made"


def test_scans_become_a_data_set_of_the_organs_that_are_trusted(made, trained, phantom_data):
    weights, annotated = read_weights(made), read_annotated(made)
    assert set(weights) == set(annotated) == {"phantom_0001", "phantom_0002"}
    names = load_checkpoint(trained / "last.pt")["config"].organs
    for case, organs in annotated.items():
        mine = {row["organ"]: row for row in rows_of(made) if row["case"] == case}
        assert {name for name, row in mine.items() if name and row["taken"] == "yes"} == set(organs)
        assert all(row["reason"] for name, row in mine.items() if name and name not in organs)
        agreement = [float(mine[name]["agreement"]) for name in organs]
        assert weights[case] == pytest.approx(np.mean(agreement), abs=1e-3) == float(mine[""]["weight"])
        labels = np.asarray(nib.load(made / "labels" / f"{case}.nii.gz").dataobj)
        assert {names[i] for i in np.unique(labels) if i} == set(organs)
        assert (made / "images" / f"{case}_0000.nii.gz").samefile(phantom_data / "images" / f"{case}_0000.nii.gz")
        # It is worth something: the liver is found.
        truth = np.asarray(nib.load(phantom_data / "labels" / f"{case}.nii.gz").dataobj)
        assert 2 * ((labels == 1) & (truth == 1)).sum() / ((labels == 1).sum() + (truth == 1).sum()) > 0.7


def test_organs_that_no_scan_can_teach_are_named(made, run, trained, phantom_data, tmp_path):
    best: dict[str, float] = {}
    for row in rows_of(made):
        if row["agreement"]:
            best[row["organ"]] = max(best.get(row["organ"], 0), float(row["agreement"]))
    least = sum(sorted(best.values())[1:3]) / 2  # two organs agree less in every scan
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "some", "--min-agreement", least]
    code, out, err = run(phantom_data, *flags, "--min-organs", "0", *CASES)
    assert (code, "2 of 2 scans taken" in out) == (0, True), err
    (named,) = (line for line in out.splitlines() if line.startswith("trusted in none: "))
    assert all(organ in named for organ, agreement in best.items() if agreement < least)
    assert "liver" not in named


def test_organs_that_are_found_in_no_scan_are_named_too(phantom_data, tmp_path):
    scan = phantom_data / "images" / "phantom_0001_0000.nii.gz"
    voxels, geometry = load_labels(phantom_data / "labels" / "phantom_0001.nii.gz")
    labels = np.where(voxels <= 2, voxels, 0).astype(np.uint8)  # liver and right kidney
    agreement = {"liver": 0.9, "right kidney": 0.5, "spleen": math.nan, "left kidney": math.nan}
    judgement = judge(organs_in(labels, geometry, ORGANS), agreement, ORGANS[1:4], (), Limits(trusted=0))
    made = made_labels.MadeLabels(tmp_path / "made", ORGANS, "network", Limits(trusted=0), copy=False)
    made.begin({"phantom_0001": scan})
    made.add("phantom_0001", scan, labels, geometry, judgement)
    # The left kidney was never taught, so that nothing of it can be lost.
    assert "trusted in none: right kidney, spleen; training can" in made.summary(["phantom_0001"])[-1]


def test_a_dicom_series_becomes_nifti_and_gets_the_same_labels(made, run, trained, phantom_data, tmp_path):
    voxels, geometry = load_scan(phantom_data / "images" / "phantom_0001_0000.nii.gz")
    x_mm, y_mm, z_mm = geometry.spacing_mm
    stored = (voxels[::-1, ::-1] + 1024).astype(np.uint16).transpose(2, 1, 0)  # (Z, backwards, leftwards)
    look = {"Rows": stored.shape[1], "Columns": stored.shape[2], "PixelSpacing": [y_mm, x_mm]}
    look["PixelPaddingValue"] = 4024  # for a warning; no voxel has it
    slices = [make_slice(k, PixelData=rows.tobytes(), **look) for k, rows in enumerate(stored)]
    for k, one in enumerate(slices):
        one.ImagePositionPatient = [0, 0, z_mm * k]
    write(tmp_path / "series", slices)
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "of_dicom"]
    code, out, err = run(tmp_path / "series", *flags, *LENIENT)
    assert (code, "1 of 1 scans taken" in out) == (0, True), err
    assert err.count("PixelPaddingValue is 3000 HU") == 1
    (case,) = find_cases(tmp_path / "of_dicom")
    copy, grid = load_scan(case.scan)
    assert (case.id, np.array_equal(copy, voxels), nib.load(case.scan).get_data_dtype()) == ("series", True, np.int16)
    assert grid.spacing_mm == pytest.approx(geometry.spacing_mm)
    expected, _ = load_labels(made / "labels" / "phantom_0001.nii.gz")
    assert np.array_equal(load_labels(case.labels)[0], expected)


def test_the_same_again_makes_what_is_missing_and_other_limits_are_refused(run, made, trained, phantom_data):
    before = files_in(made)
    flags = ["--checkpoint", trained / "last.pt", "--output", made]
    (made / "labels" / "phantom_0002.nii.gz").unlink()
    kept = (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns
    code, _, _ = run(phantom_data, *flags, *LENIENT, *CASES)
    assert (code, files_in(made)) == (0, before)
    assert (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns == kept
    code, _, err = run(phantom_data, *flags, *LENIENT, "--min-agreement", "0.6")
    assert code == 2
    assert "has 2 cases of other networks or limits (phantom_0001, phantom_0002); choose another folder" in err


def test_copy_in_a_second_run_replaces_links_by_copies(run, made, trained, phantom_data):
    flags = ["--checkpoint", trained / "last.pt", "--output", made]
    labelled = (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns
    code, _, err = run(phantom_data, *flags, *LENIENT, *CASES, "--copy")
    assert code == 0, err
    for case in ("phantom_0001", "phantom_0002"):
        copy, original = (folder / "images" / f"{case}_0000.nii.gz" for folder in (made, phantom_data))
        assert not copy.samefile(original)
        assert copy.read_bytes() == original.read_bytes()
    assert (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns == labelled


def test_edited_lines_of_annotated_and_weights_stay(run, made, trained, phantom_data):
    (annotated, weights), deleted = (read_annotated(made), read_weights(made)), "phantom_0002"
    assert len(annotated["phantom_0001"]) > 1
    write_annotated(made, annotated | {"phantom_0001": annotated["phantom_0001"][1:]})  # a wrong liver
    write_weights(made, {case: weight for case, weight in weights.items() if case != deleted})
    flags = ["--checkpoint", trained / "last.pt", "--output", made]
    code, _, err = run(phantom_data, *flags, *LENIENT, "--cases", "phantom_0001", deleted, "phantom_0003")
    assert code == 0, err
    assert read_annotated(made)["phantom_0001"] == annotated["phantom_0001"][1:]
    assert set(read_weights(made)) == {"phantom_0001", "phantom_0003"}
    (made / "weights.csv").write_text("case,weight\nphantom_0001,0.98765\n")
    write_weights(made, read_weights(made))
    assert read_weights(made) == {"phantom_0001": 0.98765}
    (made / "weights.csv").write_text("case,weight\nphantom_0001,0\n")
    code, _, err = run(phantom_data, *flags, *LENIENT)
    assert (code, err.count("\n"), "expected a number above 0" in err) == (2, 1, True)


def test_organs_that_the_box_cuts_are_left_out(run, trained, phantom_data, tmp_path, monkeypatch):
    def lower_half(locator, voxels, geometry, warn):
        x, y, z = voxels.shape
        return slice(0, x), slice(0, y), slice(0, z // 2)

    monkeypatch.setattr(pseudo_label.Locator, "find_box", lower_half)
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "made", "--cases", "phantom_0001"]
    run(phantom_data, *flags, "--min-agreement", "0", "--min-organs", "0")
    reasons = {row["organ"]: row["reason"] for row in rows_of(tmp_path / "made")}
    assert "cut by the top of the box" in reasons.values(), reasons


def test_another_scan_of_the_same_name_is_refused(run, made, trained, phantom_data, tmp_path):
    scan = phantom_data / "images" / "phantom_0002_0000.nii.gz"
    (tmp_path / "more").mkdir()
    shutil.copy(phantom_data / "images" / "phantom_0003_0000.nii.gz", tmp_path / "more" / scan.name)
    before, flags = files_in(made), ["--checkpoint", trained / "last.pt", "--output", made, *LENIENT]
    code, _, err = run(tmp_path / "more", *flags)
    assert code == 2
    assert f"has case phantom_0002 of {scan.resolve()}, and {tmp_path / 'more' / scan.name} would be it, too" in err
    assert files_in(made) == before
    # A table from before scans were noted is gone on with.
    rows = rows_of(made)
    with open(made / "pseudo_labels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "scan"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    code, out, err = run(phantom_data, *flags, *CASES)
    assert (code, "2 of 2 scans taken" in out) == (0, True), err


def test_a_scan_that_cannot_be_read_costs_itself_alone(run, trained, phantom_data, tmp_path):
    for number in (1, 2):
        scan = phantom_data / "images" / f"phantom_000{number}_0000.nii.gz"
        (tmp_path / scan.name).write_bytes(scan.read_bytes()[: 2000 if number == 1 else None])
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "out", *LENIENT]
    code, out, err = run(tmp_path, *flags)
    assert (code, "1 of 2 scans taken" in out) == (1, True)
    assert "error: failed: phantom_0001" in err
    assert list(read_weights(tmp_path / "out")) == ["phantom_0002"]


def test_made_and_labelled_cases_train_together_and_only_the_labelled_are_held_out(
    run_main, made, phantom_data, tmp_path
):
    labelled = tmp_path / "labelled"
    for part, name in (("images", "phantom_000{}_0000.nii.gz"), ("labels", "phantom_000{}.nii.gz")):
        (labelled / part).mkdir(parents=True)
        for number in (3, 4):
            shutil.copy(phantom_data / part / name.format(number), labelled / part)
    where = ["--data-dir", labelled, made, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    code, out, err = run_main(train, *where, *TINY, "--epochs", "1", "--val-fraction", "0.5")
    assert code == 0, err
    assert "3 cases to train on (2 with labels that a network has made)" in out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["made_cases"] == ["phantom_0001", "phantom_0002"]
    assert facts["val_cases"][0] in ("phantom_0003", "phantom_0004")
    code, _, err = run_main(train, *where, *TINY, "--val-cases", "phantom_0001", "--overwrite")
    assert (code, "val_cases: phantom_0001 in weights.csv: a network's labels" in err) == (2, True)
    code, _, err = run_main(train, "--data-dir", made, *where[3:], *TINY, "--overwrite")
    assert (code, "all 2 cases are in weights.csv" in err) == (2, True)
    code, _, err = run_main(train, "--data-dir", phantom_data, made, *where[3:], *TINY, "--overwrite")
    assert code == 1
    assert f"case phantom_0001: is in {phantom_data} and in {made}, expected in one; rename it" in err


def test_a_made_case_without_a_weight_does_not_pass_for_labels_of_people(run_main, phantom_data, tmp_path):
    made = Path(shutil.copytree(phantom_data, tmp_path / "made"))
    (made / "pseudo_labels.csv").write_text("case\n")
    write_weights(made, {f"phantom_000{number}": 0.9 for number in (1, 3, 4, 5)})
    where = ["--data-dir", made, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    said = f"{made / 'weights.csv'}: has no line for phantom_0002, whose labels would pass for people's beside pseudo"
    for command, flags in ((train, [*where, *TINY]), (doctor, [made]), (convert, [made, tmp_path / "converted"])):
        code, _, err = run_main(command, *flags)
        assert (code > 0, err.count("\n"), said in err) == (True, 1, True), err
    (made / "images" / "phantom_0002_0000.nii.gz").unlink()
    (made / "labels" / "phantom_0002.nii.gz").unlink()
    assert [(case.id[-1], case.weight) for case in find_cases(made)] == [(number, 0.9) for number in "1345"]


@pytest.mark.slow
def test_processes_of_torchrun_share_the_scans_out(trained, phantom_data, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "data.pseudo_label"]
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "made", "--device", "cpu"]
    command = [sys.executable, *launch, phantom_data, *flags, "--min-agreement", "0.5", "--min-organs", "0.2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 of 5 scans taken") == 1
    assert len(find_cases(tmp_path / "made")) == len(read_weights(tmp_path / "made")) == 5


def test_untrusted_scans_leave_rows_alone(run, trained, phantom_data, tmp_path):
    made = tmp_path / "made"
    flags = ["--checkpoint", trained / "last.pt", "--output", made, "--min-agreement", "1"]
    code, out, _ = run(phantom_data, *flags, "--cases", "phantom_0001")
    assert (code, "0 of 1 scans taken" in out) == (0, True)
    assert list(made.glob("*/*")) == []
    (scan, *_), rows = rows_of(made)[:1], rows_of(made)
    assert (scan["taken"], scan["weight"]) == ("no", "0")
    assert scan["reason"].endswith("organs can be trusted")
    assert {row["taken"] for row in rows} == {"no"}
    assert (read_weights(made), read_annotated(made)) == ({}, {})


def test_what_cannot_be_used_is_refused(run, trained, phantom_data, tmp_path):
    flags = ["--checkpoint", trained / "last.pt", "--output", tmp_path / "made"]
    for more, words in (
        (["--min-agreement", "2"], "--min-agreement: got 2, expected a number from 0 to 1"),
        (["--min-organs", "-1"], "--min-organs: got -1, expected a number from 0 to 1"),
        (["--cases", "nobody"], "nobody"),
        (["--output", phantom_data], "holds the scan"),
    ):
        code, _, err = run(phantom_data, *flags, *more)
        assert (code, words in err, err.count("\n")) == (2, True, 1), err
    (tmp_path / "made" / "labels").mkdir(parents=True, exist_ok=True)  # alone it hinders nobody
    (tmp_path / "made" / "labels" / "mine.nii.gz").write_text("")
    assert "holds a data set that this command has not made" in run(phantom_data, *flags)[2]
    for name in ("images/mine_0000.nii.gz", "annotated.csv", "weights.csv"):
        shutil.rmtree(tmp_path / "made")
        (tmp_path / "made" / name).parent.mkdir(parents=True)
        (tmp_path / "made" / name).write_text("mine")
        assert "holds a data set that this command has not made" in run(phantom_data, *flags)[2]
        assert (tmp_path / "made" / name).read_text() == "mine"
    shutil.rmtree(tmp_path / "made")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "pseudo_labels.csv").write_text("a,b\n1,2\n")
    assert "is another kind of table, expected the columns case, organ" in run(phantom_data, *flags)[2]


def test_a_break_costs_no_scan_that_is_done(run, trained, phantom_data, tmp_path, monkeypatch):
    made = tmp_path / "made"
    flags = ["--checkpoint", trained / "last.pt", "--output", made, "--min-agreement", "0.5", "--min-organs", "0.2"]
    with monkeypatch.context() as broken:
        written = []

        def fails_at_the_second(*arguments):
            written.append(arguments)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
            return save(*arguments)

        save = made_labels.save_label_map
        broken.setattr(made_labels, "save_label_map", fails_at_the_second)
        assert run(phantom_data, *flags, "--cases", "phantom_0001", "phantom_0002", "phantom_0003")[0] == 1
    first = (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns
    assert not (made / "labels" / "phantom_0002.nii.gz").exists()
    assert run(phantom_data, *flags, "--cases", "phantom_0001", "phantom_0002", "phantom_0003")[0] == 0
    assert (made / "labels" / "phantom_0001.nii.gz").stat().st_mtime_ns == first
    assert len(find_cases(made)) == 3


def test_two_networks_are_compared_with_their_mean(run, trained, phantom_data, tmp_path):
    network, content = load_network(trained / "last.pt")
    with torch.no_grad():
        network.classify.bias[1] += 0.5  # another network, which finds more liver
    save_checkpoint(tmp_path / "other.pt", network, content["config"], training_data=content["training_data"])
    networks = ["--checkpoint", trained / "last.pt", tmp_path / "other.pt"]
    code, _, _ = run(phantom_data, *networks, "--output", tmp_path / "made", "--cases", "phantom_0001")
    assert code == 0
    liver = next(row for row in rows_of(tmp_path / "made") if row["organ"] == "liver")
    assert 0.5 < float(liver["agreement"]) < 1


class Halves(nn.Module):
    """Knows the organ by its HU alone, so that every view agrees."""

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], dim=1)


def test_a_network_without_a_sense_of_place_agrees_with_itself():
    image = torch.zeros(1, 1, 32, 32, 32)
    image[:, :, 8:24, 10:22, 12:20] = 1
    logits, agreement = predict_and_compare([Halves()], image, torch.float32)
    assert torch.equal(logits[1] > 0, image[0, 0] > 0.5)
    assert agreement[1] > 0.9  # but for voxels at the surface
    everywhere = predict_and_compare([Halves(), Halves()], image, torch.float32)[1]
    assert everywhere.tolist() == [1, 1]
    nothing = predict_and_compare([Halves()], torch.zeros(1, 1, 16, 16, 16), torch.float32)[1]
    assert np.isnan(nothing[1])


def test_views_have_their_inverse():
    for matrix in views():
        both = torch.cat([matrix, torch.tensor([[0.0, 0, 0, 1]])]) @ torch.cat(
            [inverse(matrix), torch.tensor([[0.0, 0, 0, 1]])]
        )
        torch.testing.assert_close(both, torch.eye(4))
