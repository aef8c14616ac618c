"""The training script as users run it: on phantoms, from the command line."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import TINY, same_weights
from torch import nn
from warm import run_script

import train
from core.checkpoint import load_checkpoint, load_network, load_weights_for_organs
from core.config import load_config
from core.network import build_network
from core.system.processes import ALONE
from core.training.run_folder import RunFolder
from core.training.setup import initialise_output_bias
from core.training.step import PendingLoss
from core.training.tensorboard import write_scalars
from dataset import CaseDataset, find_cases

ROOT = Path(__file__).resolve().parents[1]
CASES = [f"phantom_{number:04d}" for number in range(1, 6)]


@pytest.fixture
def data(phantom_data) -> Path:
    return phantom_data


@pytest.fixture
def run(data, tmp_path, run_main):
    """Run train.py's main in this process: exit code, stdout and stderr; the run folder is tmp_path/run."""

    def run(*flags: object, folder: str = "run") -> tuple[int, str, str]:
        where = ["--data-dir", data, "--run-dir", tmp_path / folder, "--cache-dir", tmp_path / "cache"]
        return run_main(train, *where, *TINY, *flags)

    return run


@contextmanager
def power_cut(before_epoch: int) -> Iterator[None]:
    """Make a block in which training breaks off before that epoch."""
    one_epoch = train.train_one_epoch

    def cut(run, *others):
        if run.epoch == before_epoch:
            raise KeyboardInterrupt
        return one_epoch(run, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_one_epoch", cut)
        yield


def test_mixed_up_sides_are_said_before_the_first_epoch(run, data, tmp_path, monkeypatch):
    sick = tmp_path / "sick"
    shutil.copytree(data, sick)
    organs = load_config().organs
    right, left = organs.index("right kidney"), organs.index("left kidney")
    path = sick / "labels" / "phantom_0002.nii.gz"
    file = nib.load(path)
    swap = np.arange(256, dtype=np.uint8)
    swap[[right, left]] = left, right
    nib.save(nib.Nifti1Image(swap[np.asanyarray(file.dataobj).astype(np.uint8)], file.affine), path)
    said = "warning: case phantom_0002: right kidney to the left of left kidney; mirrored, or ids mixed up? "
    for _ in range(2):  # from the files, and from the cache
        code, _, err = run("--epochs", "1", "--data-dir", sick, "--overwrite")
        assert code == 0
        assert err.count("warning: case") == 1
        assert said in err


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["network"]


def read_log(folder: Path) -> list[dict]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_what_it_promises(data, tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", "--data-dir", data, "--run-dir", folder, "--cache-dir", tmp_path / "cache"]
    flags = [*TINY, "--epochs", "4", "--workers", "1", "--augment", "--batch-size", "2", "--val-interval", "3"]
    done = run_script(*command, *flags)
    assert done.returncode == 0, done.stderr
    names = {"config.yaml", "run.json", "val_cases.txt", "log.csv", "curves.png", "last.pt", "best.pt"}
    names |= {"previous.pt", "run.lock"}
    assert {path.name for path in folder.iterdir()} == names

    log = read_log(folder)
    assert [row["epoch"] for row in log] == ["1", "2", "3", "4"]
    assert [bool(row["val_dice"]) for row in log] == [False, False, True, True]  # every third epoch and the last
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])
    organs = load_config().organs
    dice = [f"dice_{organ.replace(' ', '_')}" for organ in organs[1:]]
    assert list(log[0]) == [
        "epoch", "train_loss", "val_loss", "val_dice", *dice, "seconds", "data_seconds", "peak_gib", "learning_rate"
    ]  # fmt: skip
    per_organ = [float(log[-1][name]) for name in dice if log[-1][name]]
    assert float(log[-1]["val_dice"]) == pytest.approx(np.mean(per_organ), abs=1e-5)

    held_out = (folder / "val_cases.txt").read_text().split()
    assert len(held_out) == 1
    facts = json.loads((folder / "run.json").read_text())
    assert facts["val_cases"] == held_out
    assert sorted(facts["train_cases"] + held_out) == CASES
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["outcome"] == "done"
    assert facts["started"] <= facts["ended"]
    network, checkpoint = load_network(folder / "best.pt")
    assert checkpoint["config"] == load_config(folder / "config.yaml")
    assert checkpoint["config"].channels == 2
    assert not network.training
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The phantoms' field of view is some 370 x 280 x 290 mm.
    low, high = (np.array(checkpoint["training_data"]["extent_mm"][end]) for end in ("min", "max"))
    assert (low <= high).all()
    assert (low > (280, 200, 250)).all()
    assert (high < (450, 380, 330)).all()


def test_best_is_the_epoch_with_the_highest_validation_dice(run, tmp_path):
    assert run("--epochs", "4")[0] == 0
    dice = [float(row["val_dice"]) for row in read_log(tmp_path / "run")]
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 1 + int(np.argmax(dice))
    assert best["val_dice"] == pytest.approx(max(dice), abs=1e-5)


def test_resuming_gives_the_same_weights_and_log_as_never_stopping(run, tmp_path):
    flags = ["--epochs", "4", "--augment", "--schedule", "cosine"]
    assert run(*flags, folder="whole")[0] == 0

    with power_cut(before_epoch=3), pytest.raises(KeyboardInterrupt):
        run(*flags, "--resume", folder="broken")  # --resume starts a run where there is none
    assert run(*flags, "--resume", folder="broken")[0] == 0

    assert same_weights(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")
    compared = ("epoch", "train_loss", "val_dice", "learning_rate")
    scores = [[[row[key] for key in compared] for row in read_log(tmp_path / name)] for name in ("whole", "broken")]
    assert scores[0] == scores[1]
    rates = [float(row["learning_rate"]) for row in read_log(tmp_path / "whole")]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 2 * rates[-1] > 0
    code, out, _ = run(*flags, "--resume", folder="broken")
    assert (code, "all 4 epochs are done" in out) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "optimizer"), [("off", "muon"), ("lowest", "adam")])
def test_resuming_with_an_average_and_pieces(run, tmp_path, plan, optimizer):
    flags = ["--epochs", "3", "--ema-decay", "0.8", "--batch-size", "2", "--accumulation-steps", "2", "--memory", plan]
    flags += ["--init-output-bias", "--deterministic", "--optimizer", optimizer]
    assert run(*flags, folder="whole")[0] == 0
    with power_cut(before_epoch=3), pytest.raises(KeyboardInterrupt):
        run(*flags, "--resume", folder="broken")
    assert run(*flags, "--resume", folder="broken")[0] == 0
    whole, broken = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    for part in ("network", "ema"):
        assert all(torch.equal(whole[part][name], broken[part][name]) for name in whole["ema"]), part
    assert not any(torch.equal(whole["ema"][name], whole["network"][name]) for name in whole["ema"])
    network, _ = load_network(tmp_path / "whole" / "last.pt")  # as infer.py does
    start = build_network(whole["config"])  # as --init-from does
    load_weights_for_organs(start, dataclasses.replace(whole["config"], init_from="last.pt"), whole, warn=False)
    for found in (network, start):
        assert all(torch.equal(value, whole["ema"][name]) for name, value in found.named_parameters())
    # best.pt is of the last epoch here, and holds the average.
    assert load_checkpoint(tmp_path / "whole" / "best.pt")["epoch"] == 3
    best = weights(tmp_path / "whole" / "best.pt")
    assert all(torch.equal(best[name], value) for name, value in whole["ema"].items())
    content = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
    (tmp_path / "whole" / "previous.pt").unlink()
    content["ema"]["classify.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "whole" / "last.pt")
    code, _, err = run(*flags, "--resume", folder="whole")
    assert (code, "last.pt: its EMA weights are another network's (classify.bias is of shape [3]" in err) == (2, True)
    del content["ema"]
    torch.save(content, tmp_path / "whole" / "last.pt")
    code, _, err = run(*flags, "--resume", folder="whole")
    assert (code, "last.pt: lacks ema, so that training cannot go on" in err) == (2, True)


def test_the_output_starts_from_the_shares_of_the_training_voxels(data, tmp_path):
    config = dataclasses.replace(load_config(), size=(32, 32, 16), channels=2, down_convs=(1, 1), up_convs=(1,),
                                 cache_dir=None)  # fmt: skip
    dataset = CaseDataset(find_cases(data)[:2], config)
    network = build_network(config)
    initialise_output_bias(network, len(config.organs), dataset, ALONE)
    counts = np.zeros(len(config.organs))
    for number in range(2):
        counts += np.bincount(dataset[number]["labels"].numpy().ravel(), minlength=len(counts))
    expected = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
    shares = network.classify.bias.detach().softmax(dim=0).numpy()
    assert shares == pytest.approx(expected, rel=1e-4)
    assert shares[0] > 0.8


@pytest.mark.long
def test_the_same_seed_gives_the_same_weights_whatever_the_workers(data, tmp_path):
    """Processes of their own: nothing that one run leaves behind may help the others."""
    folders = []
    for number, workers in enumerate(("0", "0", "2")):
        folders.append(tmp_path / str(number))
        where = ["--data-dir", data, "--run-dir", folders[-1], "--cache-dir", tmp_path / "cache"]
        flags = [*TINY, "--epochs", "2", "--augment", "--deterministic", "--workers", workers]
        done = subprocess.run([sys.executable, "train.py", *map(str, [*where, *flags])], cwd=ROOT, capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert same_weights(folders[0] / "last.pt", folders[1] / "last.pt")
    assert same_weights(folders[0] / "last.pt", folders[2] / "last.pt")


def test_the_runs_of_all_folds_hold_out_every_case_once(run, data, tmp_path):
    held_out = []
    for fold in range(2):
        code, out, _ = run("--folds", "2", "--fold", fold, "--epochs", "1", folder=f"fold{fold}")
        assert (code, f"held out as fold {fold} of 2" in out) == (0, True)
        held_out += (tmp_path / f"fold{fold}" / "val_cases.txt").read_text().split()
    assert sorted(held_out) == CASES
    code, _, err = run("--folds", "2", "--fold", "2", "--epochs", "1")
    assert (code, "fold: got 2 of 2 folds" in err) == (2, True)
    code, _, err = run("--folds", "2", "--val-cases", "phantom_0001", "--epochs", "1")
    assert (code, "expected one of the two" in err) == (2, True)


def test_tensorboard_gets_the_numbers_of_the_log(run, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard, an optional package, is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("--epochs", "2", "--tensorboard")[0] == 0
    assert run("--epochs", "3", "--tensorboard", "--resume", "--extend")[0] == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_log(tmp_path / "run")
    assert len(rows) == 3
    for tag, column in (("train_loss", "train_loss"), ("val_dice", "val_dice"), ("learning_rate", "learning_rate")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [1, 2, 3]
        assert [value for _, value in found] == pytest.approx([float(row[column]) for row in rows], rel=1e-4)
    assert "dice/liver" in events.Tags()["scalars"]
    # An epoch that is done again, as after a kill, takes the place of the first.
    folder = RunFolder(load_config(tmp_path / "run" / "config.yaml"))
    write_scalars(folder.scalars, {"epoch": 3, "train_loss": 9.0, "val_loss": math.nan, "val_dice": None})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")][2:] == [(3, 9.0)]


def test_tensorboard_that_is_not_installed_is_said_at_the_start(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = run("--epochs", "1", "--tensorboard")
    assert (code, err.count("\n")) == (2, 1)
    assert "tensorboard: got true" in err
    assert "pip install tensorboard" in err
    assert not (tmp_path / "run").exists()


def test_batch_norm_in_pieces_is_refused(run):
    code, _, err = run("--norm", "batch", "--batch-size", "2", "--accumulation-steps", "2")
    assert (code, err.count("\n")) == (2, 1)
    assert "norm: got batch with accumulation_steps" in err
    code, _, err = run("--accumulation-steps", "4")
    assert (
        code,
        "accumulation_steps: got 4, more than the cases of a batch that it splits; expected at most 1" in err,
    ) == (2, True)


def test_resuming_with_other_settings_is_refused_by_name(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    code, _, err = run("--epochs", "1", "--resume", "--seed", "7", "--norm", "group", "--channels-last")
    assert code == 2
    assert "norm was instance, is group" in err
    # Adam's state would lie in another order than the weights, and be added to the wrong ones.
    assert "channels_last was False, is True" in err
    assert "seed was 0, is 7" in err
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resuming_with_other_cases_is_refused_by_name(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    assert run("--epochs", "2", "--data-dir", mine)[0] == 0
    (held_out,) = (tmp_path / "run" / "val_cases.txt").read_text().split()
    (mine / "images" / f"{held_out}_0000.nii.gz").unlink()
    (mine / "labels" / f"{held_out}.nii.gz").unlink()
    code, _, err = run("--epochs", "2", "--data-dir", mine, "--resume")
    assert code == 2
    assert "cannot go on with other cases; to train on only before or only now: phantom_000" in err


def test_resuming_on_changed_data_names_the_cases(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    flags = ["--epochs", "2", "--data-dir", mine]
    with power_cut(before_epoch=2), pytest.raises(KeyboardInterrupt):
        run(*flags)
    before = json.loads((tmp_path / "run" / "run.json").read_text())["case_fingerprints"]
    path = mine / "labels" / "phantom_0004.nii.gz"
    file = nib.load(path)
    labels = np.asanyarray(file.dataobj).astype(np.uint8)
    labels[labels == 1] = 0
    nib.save(nib.Nifti1Image(labels, file.affine), path)
    shutil.copytree(data, tmp_path / "moved")  # the same data in another place, with other times
    with power_cut(before_epoch=2), pytest.raises(KeyboardInterrupt):
        run(*flags[:2], "--data-dir", tmp_path / "moved", "--resume")
    code, _, err = run(*flags, "--resume")
    assert code == 0
    assert "warning: " in err
    assert "weight of 1 of 5 cases has changed since the run began: phantom_0004; it goes on with the new" in err
    after = json.loads((tmp_path / "run" / "run.json").read_text())["case_fingerprints"]
    assert [case for case in CASES if before[case] != after[case]] == ["phantom_0004"]


def test_ids_of_another_list_are_doubted(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    btcv = np.array([0, 6, 2, 1, 11, 8, 9, 12, 13, 4, 5, 7, 0, 3], np.uint8)  # its ids of FLARE22's organs 0 to 13
    for path in (mine / "labels").iterdir():
        file = nib.load(path)
        nib.save(nib.Nifti1Image(btcv[np.asanyarray(file.dataobj).astype(np.uint8)], file.affine), path)
    code, _, err = run("--epochs", "1", "--data-dir", mine)
    assert code == 0
    (said,) = [line for line in err.splitlines() if "ids of another list?" in line]
    # BTCV has the spleen in the liver's place.
    assert re.search(r"liver is of [12]\d\d(\.\d)? to [12]\d\d(\.\d)? mL in 4 of 4 cases, expected 400 to 5000", said)
    assert "ids of another list?" not in run("--epochs", "1", folder="default")[2]


def test_resuming_elsewhere_and_without_init_from(run, data, tmp_path):
    assert run("--epochs", "1", folder="first")[0] == 0
    start = tmp_path / "first" / "last.pt"
    assert run("--epochs", "2", "--init-from", start)[0] == 0
    start.unlink()
    shutil.copytree(data, tmp_path / "moved")
    code, out, _ = run("--epochs", "2", "--resume", "--init-from", start, "--data-dir", tmp_path / "moved")
    assert (code, "all 2 epochs are done" in out) == (0, True)


def test_resuming_a_run_whose_optimizer_was_not_fused(run, tmp_path):
    flags = ["--epochs", "2", "--resume"]
    assert run(*flags, folder="whole")[0] == 0
    assert run("--epochs", "1", "--schedule", "constant")[0] == 0
    path = tmp_path / "run" / "last.pt"
    content = torch.load(path, weights_only=True)
    content["config"]["epochs"] = 2
    assert content["optimizer"]["param_groups"][0]["fused"]
    content["optimizer"]["param_groups"][0]["fused"] = None
    torch.save(content, path)
    assert run(*flags)[0] == 0
    assert same_weights(tmp_path / "whole" / "last.pt", path)


@pytest.mark.slow
def test_channels_last_learns_the_same_and_resumes(run, tmp_path):
    for folder, flags in {"plain": [], "last": ["--channels-last"]}.items():
        assert run("--epochs", "3", *flags, folder=folder)[0] == 0
    losses = [[float(row["train_loss"]) for row in read_log(tmp_path / name)] for name in ("plain", "last")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    network, _ = load_network(tmp_path / "last" / "last.pt")
    assert network.downs[0].conv.weight.is_contiguous()  # a checkpoint is read the same by infer.py
    with power_cut(before_epoch=2), pytest.raises(KeyboardInterrupt):
        run("--epochs", "3", "--channels-last", folder="broken")
    assert run("--epochs", "3", "--channels-last", "--resume", folder="broken")[0] == 0
    assert same_weights(tmp_path / "last" / "last.pt", tmp_path / "broken" / "last.pt")


@pytest.mark.parametrize("asked", [False, True])
def test_settings_of_the_machine_reach_the_network(monkeypatch, asked):
    small = {"size": ["16", "16", "8"], "channels": "2", "down_convs": ["1", "1"], "up_convs": ["1"]}
    config = load_config(flags=small | {"channels_last": str(asked).lower(), "compile": str(asked).lower()})
    compiled = []
    monkeypatch.setattr("core.training.setup.compile_network", lambda network, device: compiled.append(network))
    network = train.start_training(config, torch.device("cpu")).network
    assert network.downs[0].conv.weight.is_contiguous(memory_format=torch.channels_last_3d) == asked
    assert compiled == [network] * asked


@pytest.mark.slow
def test_compile_without_a_compiler_is_refused_in_one_sentence(data, tmp_path):
    where = ["--data-dir", data, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, where), *TINY, "--compile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: compile: torch.compile does not work here (")
    assert "No working C++ compiler" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.long  # the compiler takes minutes
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_run_learns_the_same_and_goes_on_without(run, tmp_path):
    assert run("--epochs", "2", folder="plain")[0] == 0
    assert run("--epochs", "2", "--compile", "--batch-size", "1", folder="compiled")[0] == 0
    losses = [[float(row["train_loss"]) for row in read_log(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert "all 2 epochs are done" in run("--epochs", "2", "--resume", folder="compiled")[1]


def test_validation_that_is_not_finite_saves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validation_step", lambda training, image, labels, annotated: (math.nan, labels))
    code, _, err = run("--epochs", "1", "--checkpoint-minutes", "15")
    assert code == 3
    assert "epoch 1: the validation loss is nan" in err
    assert not (tmp_path / "run" / "last.pt").exists()


def test_memory_that_runs_out_on_a_cpu_stops_in_one_sentence(run, tmp_path, monkeypatch):
    def too_much(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(train, "step_that_fits", too_much)
    code, _, err = run("--epochs", "1")
    assert code == 3
    assert "can't allocate memory" in err
    assert err.count("\n") == 1


def test_broken_validation_case_shows_before_the_first_epoch(run, data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    path = broken / "images" / f"{CASES[3]}_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:20_000])
    code, _, err = run("--data-dir", broken, "--val-cases", CASES[3])
    assert code == 1
    assert f"{CASES[3]}_0000.nii.gz: cannot be read to its end" in err
    assert not (tmp_path / "run" / "log.csv").exists()
    # Repaired, the same command starts the run: nothing was there to be lost.
    assert run("--val-cases", CASES[3], "--epochs", "1")[0] == 0


def test_a_folder_that_holds_a_run_is_refused_or_overwritten(run, tmp_path):
    assert run("--epochs", "2")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, _, err = run("--epochs", "1")
    assert code == 2
    assert "holds a run already; go on with --resume or replace it by --overwrite" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert run("--epochs", "1", "--overwrite")[0] == 0
    assert len(read_log(tmp_path / "run")) == 1
    assert run("--epochs", "1", "--overwrite", "--resume")[0] == 2


def test_seed_decides_the_weights_and_workers_do_not(run, tmp_path):
    flags = ["--epochs", "1", "--augment"]
    for folder, more in {"a": [], "b": ["--workers", "2"], "c": ["--seed", "1", "--val-cases", CASES[0]]}.items():
        assert run(*flags, *more, folder=folder)[0] == 0
    assert same_weights(tmp_path / "a" / "last.pt", tmp_path / "b" / "last.pt")
    assert not same_weights(tmp_path / "a" / "last.pt", tmp_path / "c" / "last.pt")


@pytest.mark.parametrize("bad_step", [1, 4])  # the first of an epoch, and the last, behind which no step is launched
def test_loss_that_is_not_finite_stops_the_run_with_the_case(run, tmp_path, monkeypatch, bad_step):
    one_step = train.step_that_fits
    calls = []

    def third_epoch_explodes(training, image, labels, *rest):
        calls.append(1)
        bad = len(calls) == 2 * 4 + bad_step  # 4 training cases an epoch
        return one_step(training, image * math.nan if bad else image, labels)

    monkeypatch.setattr(train, "step_that_fits", third_epoch_explodes)
    code, _, err = run("--epochs", "3")
    assert code == 3
    assert f"epoch 3, step {bad_step}, case phantom_000" in err
    assert "the loss is nan; a lower --learning-rate may help" in err
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


def test_a_loss_is_read_when_the_next_step_is_on_its_way(run, tmp_path, monkeypatch):
    one_step, events = train.step_that_fits, []

    class Watched(PendingLoss):
        def read(self) -> float:
            events.append(f"read {self.where.split(', ')[1]}")
            return super().read()

    def watched(*args):
        events.append("launch")
        return one_step(*args)

    monkeypatch.setattr(train, "step_that_fits", watched)
    monkeypatch.setattr("core.training.run.PendingLoss", Watched)
    assert run("--epochs", "1", "--checkpoint-minutes", "15")[0] == 0
    assert events == [
        "launch", "launch", "read step 1", "launch", "read step 2", "launch", "read step 3", "read step 4"
    ]  # fmt: skip
    assert len(read_log(tmp_path / "run")) == 1


def test_without_validation_cases_there_is_no_best(run, tmp_path):
    code, out, _ = run("--epochs", "1", "--val-fraction", "0")
    assert code == 0
    assert "5 cases to train on" in out
    assert "best.pt" not in out
    assert not (tmp_path / "run" / "best.pt").exists()
    assert (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("more", [("gut",), (), None])
def test_init_from_a_network_of_other_organs_keeps_all_but_the_last_layer(run, tmp_path, monkeypatch, more):
    assert run("--epochs", "1", folder="first")[0] == 0
    start, organs = tmp_path / "first" / "last.pt", load_config().organs
    if more is None:
        organs = [organs[0], "gut", *organs[2:]]  # as many organs
    monkeypatch.setattr(train, "train", lambda run, *_: run.checkpoint())
    flags = ["--organs", *organs, *more] if more else ["--organs", *organs]
    code, out, _ = run("--epochs", "1", "--init-from", start, *flags, folder="second")
    assert code == 0
    before, after = weights(start), weights(tmp_path / "second" / "last.pt")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if more == ():
        assert (changed, "are kept" in out) == ([], False)
    else:
        assert changed == ["classify.weight", "classify.bias"]
        assert "last.pt: segments other organs (liver, right kidney, spleen," in out
        assert "all its weights are kept but those of classify" in out


class EndsInUp(nn.Module):
    """A network whose last layer is a transposed convolution."""

    def __init__(self, classes: int):
        super().__init__()
        self.down, self.up = nn.Conv3d(1, 4, 2, stride=2), nn.ConvTranspose3d(4, classes, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


def test_the_last_layer_of_another_network_may_be_a_transposed_convolution(tmp_path):
    organs = load_config().organs
    ours = dataclasses.replace(load_config(), init_from="last.pt", organs=[organs[0], *reversed(organs[1:])])
    network, before = EndsInUp(len(organs)), EndsInUp(len(organs))
    own = network.up.weight.detach().clone()
    content = {"config": load_config(), "network": before.state_dict()}
    assert "but those of up" in load_weights_for_organs(network, ours, content, warn=False)
    assert torch.equal(network.up.weight, own)
    assert torch.equal(network.down.weight, before.down.weight)
    with pytest.raises(ValueError, match="segments other organs, and no layer of the Conv3d has a weight for each"):
        load_weights_for_organs(nn.Conv3d(1, 1, 1), ours, content, warn=False)


def test_init_from_starts_with_the_other_runs_weights(run, tmp_path):
    assert run("--epochs", "2", folder="first")[0] == 0
    start = tmp_path / "first" / "last.pt"
    assert run("--epochs", "1", "--init-from", start, folder="second")[0] == 0
    losses = [float(read_log(tmp_path / name)[0]["train_loss"]) for name in ("first", "second")]
    assert losses[1] < losses[0]
    organs = load_config().organs
    names = [name.replace("left kidney", "kidney_left") for name in organs]  # another spelling is the same organ
    spelled = run("--epochs", "1", "--init-from", start, "--organs", *names, folder="spelled")
    assert (spelled[0], "are kept but" in spelled[1]) == (0, False)
    assert float(read_log(tmp_path / "spelled")[0]["train_loss"]) == losses[1]
    code, _, err = run("--epochs", "1", "--init-from", start, "--norm", "group", "--crop", "body", folder="other")
    assert code == 0
    assert f"warning: {start}: was trained with norm instance, this run has group\n" in err
    assert err.count("was trained with") == 2
    code, _, err = run("--epochs", "1", "--init-from", start, "--channels", "3", folder="third")
    assert code == 2
    assert "last.pt: its weights are another network's" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "30", "32", "16"], "size: got 30 32 16, expected multiples of 4"),
        (["--up-convs", "1", "1", "1"], "up_convs: got 3 stages up for 3 down"),
        (["--patch-size", "16", "18", "16"], "patch_size: got 16 18 16, expected multiples of 4"),
        (["--patch-size", "16", "64", "16"], "patch_size: got 16 64 16, expected no more than the size along any axis"),
        (["--precision", "fp16"], "precision: got fp16 on a CPU"),
        (["--precision", "bf16", "--size", "32", "32", "2"], "size: got 32 32 2, expected multiples of 4"),
        (["--compile", "--memory", "low"], "compile: got true with memory: low, expected false, or memory: auto or"),
        (["--device", "cuda:99"], "device: got cuda:99, but torch sees"),
        (["--epochs", "0"], "--epochs: got 0, expected a whole number of 1 or more"),
        (["--val-cases", "phantom_0001", "nobody"], "val_cases: nobody not among the 5 cases"),
        (["--val-cases", *CASES], "val_cases: holds out all 5 cases"),
        (["--fold", "1"], "fold: got 1 without folds, expected the number of folds too"),
        (["--data-dir", "no/such/folder"], "no/such/folder: is no data set"),
        (["--config", "no.yaml"], "no.yaml: no such settings file"),
        (["--init-from", "no.pt"], "no.pt: no such checkpoint"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(run, tmp_path, flags, message):
    code, _, err = run(*flags)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1  # one sentence
    assert not (tmp_path / "run").exists()


def test_a_network_whose_checkpoints_could_not_be_loaded_is_refused(run, tmp_path, monkeypatch):
    def masked(config):
        network = build_network(config)
        network.register_buffer("mask", torch.full((2, 2), -torch.inf))
        return network

    monkeypatch.setattr(train, "build_network", masked)
    code, _, err = run("--epochs", "1")
    assert code == 2
    assert "mask of the network (VNet) holds NaN or infinite numbers" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("augment", ["true", "false"])
def test_a_run_on_patches_is_validated_on_the_whole_grid(run, data, tmp_path, monkeypatch, augment):
    seen, step = [], train.step_that_fits

    def watched(training, image, labels, *others):
        seen.append((tuple(image.shape), tuple(labels.shape)))
        return step(training, image, labels, *others)

    monkeypatch.setattr(train, "step_that_fits", watched)
    patch = ["--size", 30, 28, 16, "--patch-size", 16, 16, 16, "--epochs", 2]
    patch += ["--augment", augment, "--augment-elastic", "0.02"]
    with power_cut(before_epoch=2), pytest.raises(KeyboardInterrupt):
        run(*patch, "--checkpoint-minutes", "0")
    assert run(*patch, "--resume", "--checkpoint-minutes", "0")[0] == 0
    assert set(seen) == {((1, 1, 16, 16, 16), (1, 16, 16, 16))}
    assert run(*patch, folder="whole")[0] == 0
    assert same_weights(tmp_path / "run" / "last.pt", tmp_path / "whole" / "last.pt")

    # Dice by a mean over patches written here; both epochs may have been the best.
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    config, network = best["config"], build_network(best["config"])
    network.load_state_dict(best["network"])
    held_out = [case for case in find_cases(data) if case.id in best["cases"]["val"]]
    gauss = np.exp(-(((np.arange(16) - 7.5) / 2) ** 2) / 2)
    weight = torch.from_numpy(np.maximum(gauss[:, None, None] * gauss[:, None] * gauss, 1e-3))
    for sample in CaseDataset(held_out, config):
        image, labels = sample["image"][None].float() / 255, sample["labels"].numpy()
        total = torch.zeros(len(config.organs), *config.size, dtype=torch.float64)
        for x in (0, 7, 14):
            for y in (0, 6, 12):
                with torch.no_grad():
                    found = network(image[:, :, x : x + 16, y : y + 16]).softmax(dim=1)[0]
                total[:, x : x + 16, y : y + 16] += found * weight
        predicted = total.argmax(dim=0).numpy()
        dice = [
            2 * ((predicted == k) & (labels == k)).sum() / ((predicted == k).sum() + (labels == k).sum())
            for k in range(1, len(config.organs))
            if (predicted == k).any() or (labels == k).any()
        ]
    log = read_log(tmp_path / "run")
    assert len(held_out) == 1
    assert max(float(row["val_dice"]) for row in log) == pytest.approx(np.mean(dice), abs=2e-3)


def test_held_out_cases_without_an_organ_are_named(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    path = mine / "labels" / f"{CASES[0]}.nii.gz"
    file = nib.load(path)
    nib.save(nib.Nifti1Image(np.zeros(file.shape, np.uint8), file.affine), path)
    said = "warning: no held-out case holds an organ that it annotates: their Dice says nothing, nor does best.pt"
    assert said in run("--epochs", "1", "--data-dir", mine, "--val-cases", CASES[0])[2]
    assert said not in run("--epochs", "1", "--data-dir", mine, "--val-cases", *CASES[:2], folder="usual")[2]


def test_a_researchers_own_score_is_logged_though_not_in_every_epoch(run, tmp_path, monkeypatch):
    validate = train.validate

    def validate_more(*arguments):
        scores = validate(*arguments)
        return scores | {"val_worst": 0.25}

    monkeypatch.setattr(train, "validate", validate_more)
    flags = ["--epochs", "3", "--val-interval", "2", "--checkpoint-minutes", "0"]
    with power_cut(before_epoch=3), pytest.raises(KeyboardInterrupt):
        run(*flags)
    code, _, err = run(*flags, "--resume")
    assert (code, "log.csv.old" in err) == (0, False)
    assert [row["val_worst"] for row in read_log(tmp_path / "run")] == ["", "0.25", "0.25"]


def test_strengths_of_augmentation_without_it_are_said_to_do_nothing(run):
    _, _, err = run("--epochs", "1", "--augment-flip", "--augment-noise", "0.1")
    assert "warning: augment_noise, augment_flip: given without augment: true, so nothing is augmented" in err


def test_a_flip_that_swaps_nothing_is_said(run):
    names = ["background", *(f"teil {n}" for n in range(1, 14))]
    _, _, err = run("--epochs", "1", "--organs", *names, "--augment", "--augment-flip")
    assert "no name of organs says right or left in English, so a flip swaps no ids" in err
    assert "says right or left" not in run("--epochs", "1", "--augment", "--augment-flip", folder="usual")[2]


def test_what_annotated_csv_gets_wrong_is_said(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    organs = [name for name in load_config().organs[1:] if name != "spleen"]
    names = ";".join("oesophagus" if name == "esophagus" else name for name in organs)
    lines = ["case,organs", *(f"{case},{names}" for case in CASES)]
    (mine / "annotated.csv").write_text("\n".join(lines) + "\n")
    _, _, err = run("--epochs", "1", "--data-dir", mine, "--val-cases", CASES[4])
    assert "warning: annotated.csv: oesophagus is none of organs; names are separated by ;" in err
    assert "annotated.csv leaves out organs that label maps hold (spleen in 4" in err


def test_an_organ_that_one_of_several_folders_never_holds_is_named(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    for path in [*mine.glob("images/*"), *mine.glob("labels/*")]:
        file = nib.load(path)
        voxels = np.asanyarray(file.dataobj)
        voxels = np.where(voxels == 3, 0, voxels) if path.parent.name == "labels" else voxels
        nib.save(nib.Nifti1Image(voxels, file.affine), path.with_name(path.name.replace("phantom", "other")))
        path.unlink()
    _, _, err = run("--epochs", "1", "--data-dir", data, mine, "--val-cases", CASES[4])
    assert f"warning: in none of the 5 cases to train on of {mine}: spleen; if one is there but not annotated" in err


def test_the_same_data_trained_on_and_held_out_are_named(run, data, tmp_path):
    twin = tmp_path / "twin"
    for part, name, other in (("images", "_0000", "_0000"), ("labels", "", "")):
        (twin / part).mkdir(parents=True)
        shutil.copy(data / part / f"{CASES[0]}{name}.nii.gz", twin / part / f"twin{other}.nii.gz")
    _, _, err = run("--epochs", "1", "--data-dir", data, twin, "--val-cases", CASES[0])
    said = f"warning: the same scans are trained on and held out, under two ids: twin and {CASES[0]}"
    assert said in err
    labels = nib.load(twin / "labels" / "twin.nii.gz")  # as another reader, or a network, has drawn them
    nib.save(nib.Nifti1Image(labels.get_fdata() * 0, labels.affine), twin / "labels" / "twin.nii.gz")
    assert said in run("--epochs", "1", "--data-dir", data, twin, "--val-cases", CASES[0], folder="redrawn")[2]
    assert "under two ids" not in run("--epochs", "1", folder="usual")[2]


def test_resuming_without_weights_csv_is_refused(run, data, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data, mine)
    (mine / "weights.csv").write_text(f"case,weight\n{CASES[0]},0.5\n")
    flags = ["--data-dir", mine, "--val-cases", CASES[4], "--epochs", "2"]
    with power_cut(before_epoch=2), pytest.raises(KeyboardInterrupt):
        run(*flags)
    (mine / "weights.csv").unlink()
    code, _, err = run(*flags, "--resume")
    assert code == 2
    assert f"cannot go on with other cases; with made labels only before or only now: {CASES[0]}" in err
    (mine / "weights.csv").write_text(f"case,weight\n{CASES[0]},0.4\n")
    code, _, err = run(*flags, "--resume")
    assert code == 0
    assert f"1 of 5 cases has changed since the run began: {CASES[0]};" in err


@pytest.mark.parametrize("memory", ["off", "low"])
def test_a_cpu_trains_in_bf16_where_its_gradients_are_right(run, tmp_path, memory):
    flags = ["--epochs", "2", "--workers", "0", "--memory", memory]
    code, _, err = run(*flags, "--precision", "bf16", folder="bf16")
    if code == 2:  # the comparison itself is tested in tests/core/training/test_step.py
        assert "precision: got bf16, in which this CPU's gradients are wrong for" in err
        return
    assert code == 0, err
    assert run(*flags, folder="float32")[0] == 0
    losses = [[float(row["train_loss"]) for row in read_log(tmp_path / name)] for name in ("bf16", "float32")]
    np.testing.assert_allclose(*losses, rtol=0.01)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_label_beyond_the_organ_list_is_refused_by_case(run, data, tmp_path, workers):
    # The predecessor had 4 classes for ids up to 13.
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    path = broken / "labels" / "phantom_0002.nii.gz"
    file = nib.load(path)
    labels = np.asarray(file.dataobj).copy()
    labels[0, 0, :3] = 14
    nib.save(nib.Nifti1Image(labels, file.affine, file.header), path)
    code, _, err = run("--data-dir", broken, "--workers", workers, "--val-fraction", "0")
    assert code == 1
    assert "phantom_0002.nii.gz: ids outside the organ list: 14 (3 voxels); expected 0 to 13" in err


@pytest.mark.slow
def test_ctrl_c_ends_in_one_sentence(data, tmp_path):
    where = ["--data-dir", data, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, where), *TINY, "--epochs", "1000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background has Ctrl-C switched off, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not process.stdout.readline().startswith("epoch"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == [
        "stopping after this step; once more quits at once",
        "stopped by SIGINT; the run is saved: --resume goes on from here",
    ]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1


def test_the_network_sees_0_to_1():
    image, labels = torch.tensor([0, 51, 255], dtype=torch.uint8), torch.tensor([0, 3, 13], dtype=torch.uint8)
    seen, ids = train.to_device({"image": image, "labels": labels}, torch.device("cpu"))
    assert (seen.tolist(), ids.tolist()) == (pytest.approx([0, 0.2, 1]), [0, 3, 13])


def test_learning_rates_by_hand():
    config = load_config(flags={"learning_rate": "0.1", "schedule": "cosine"})
    assert train.learning_rate(config, 0, 8) == pytest.approx(0.1)
    assert train.learning_rate(config, 4, 8) == pytest.approx(0.05)
    assert train.learning_rate(config, 6, 8) == pytest.approx(0.1 * (1 - math.sqrt(0.5)) / 2)
    poly = load_config(flags={"learning_rate": "0.1", "schedule": "poly"})
    assert train.learning_rate(poly, 0, 8) == pytest.approx(0.1)
    assert train.learning_rate(poly, 4, 8) == pytest.approx(0.1 * 0.5**0.9)
    assert train.learning_rate(load_config(), 7, 8) == 1e-4


def test_without_matplotlib_a_run_warns_once_and_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "visualization.curves", raising=False)
    monkeypatch.delitem(sys.modules, "visualization.style", raising=False)
    code, _, err = run("--epochs", "2")
    assert code == 0
    assert err.count("warning: no curves.png, since matplotlib cannot be imported") == 1
    assert len(read_log(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "curves.png").exists()
