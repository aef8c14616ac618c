"""Runs that are killed, stopped, short of disk or damaged, and always come back; with real processes and signals."""

import csv
import errno
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from helpers import TINY, files_in
from warm import run_script

import train
from core.checkpoint import load_checkpoint
from core.config import load_config
from core.system import files
from core.training import batches as loading
from core.training.run import Run
from core.training.run_folder import RunFolder
from core.training.step import NotFiniteError
from data.make_phantom import write_phantom
from dataset import CaseDataset

fcntl = pytest.importorskip("fcntl")
ROOT = Path(__file__).resolve().parents[3]
# A network and a grid on which a step takes some hundredths of a second; last.pt is written after each.
FLAGS = [*TINY, "--augment", "--epochs", "4", "--schedule", "cosine", "--checkpoint-minutes", "0"]
STEPS = 16  # of a whole run: four epochs of four cases
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # with another number of threads the last bits differ
NOT_COMPARED = ("seconds", "data_seconds", "peak_gib")  # of log.csv


@pytest.fixture(scope="module")
def data(phantom_data) -> Path:
    return phantom_data


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """Return the folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_script(*command(data, folder)[1:], env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(data, tmp_path, run_main):
    """Run train.py's main in this process: exit code, stdout and stderr; the run folder is tmp_path/run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda *flags: run_main(train, *command(data, tmp_path, *flags)[2:])
    torch.set_num_threads(before)


def command(data: Path, folder: Path, *flags: object) -> list[str]:
    where = ["--data-dir", data, "--run-dir", folder / "run", "--cache-dir", folder / "cache"]
    return [sys.executable, "train.py", *map(str, [*where, *FLAGS, *flags])]


def start(data: Path, folder: Path, *flags: object) -> subprocess.Popen:
    """Start the script with --resume, as a scheduler does again and again, as the leader of a process group."""
    arguments = command(data, folder, "--resume", *flags)
    return subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=ONE_THREAD, start_new_session=True
    )


def wait_for_checkpoint(process: subprocess.Popen, last: Path, saves: int) -> None:
    """Wait until last.pt has been replaced `saves` times, or the run has ended."""
    seen = None
    while saves and process.poll() is None:
        now = None  # also for the moment between last.pt's move to previous.pt and its replacement
        with suppress(FileNotFoundError):
            now = last.stat().st_mtime_ns
        saves -= now != seen
        seen = now
        time.sleep(0.001)


def content(folder: Path) -> dict:
    """Return all that a run's last.pt holds, but for the settings, which name its folders."""
    return {key: value for key, value in load_checkpoint(folder / "last.pt").items() if key != "config"}


def assert_same(first: object, second: object) -> None:
    """Check that two values are equal to the last bit, however deep."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
    if isinstance(first, dict | list | tuple):
        pairs = (
            [(first[key], second[key]) for key in first] if isinstance(first, dict) else zip(first, second, strict=True)
        )
        for one, other in pairs:
            assert_same(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def facts(folder: Path) -> dict:
    """Return what run.json tells."""
    return json.loads((folder / "run.json").read_text())


def assert_same_run(folder: Path, whole: Path) -> None:
    """Check that weights, optimiser, scores and log are those of the run that nothing happened to."""
    assert_same(content(folder), content(whole))
    assert_same(load_checkpoint(folder / "best.pt")["network"], load_checkpoint(whole / "best.pt")["network"])
    rows = []
    for log in (folder / "log.csv", whole / "log.csv"):
        with open(log, newline="") as file:
            rows.append([{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in csv.DictReader(file)])
    assert [row["epoch"] for row in rows[0]] == ["1", "2", "3", "4"]
    assert rows[0] == rows[1]


def kill_until_done(data: Path, folder: Path, whole: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(data, folder)
        wait_for_checkpoint(process, folder / "run" / "last.pt", rng.randrange(0, 4))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        assert "Traceback" not in process.communicate()[1]
    process = start(data, folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_same_run(folder / "run", whole)
    assert not [path.name for path in (folder / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_was_not(data, whole, tmp_path):
    kill_until_done(data, tmp_path, whole, kills=3, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_fifty_kills(data, whole, tmp_path, seed):
    kill_until_done(data, tmp_path, whole, kills=5, seed=seed)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 15])
def test_a_power_cut_after_any_step_changes_nothing(run, whole, tmp_path, monkeypatch, step):
    done = []
    one_step = train.step_that_fits

    def cut(*arguments):
        if len(done) == step:
            raise KeyboardInterrupt
        done.append(None)
        return one_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "step_that_fits", cut)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert content(tmp_path / "run")["epoch"] == step // 4
    assert run("--resume")[0] == 0
    assert_same_run(tmp_path / "run", whole)


SIGNALS = [
    (signal.SIGTERM, 143),
    *(pytest.param(*rest, marks=pytest.mark.long) for rest in ((signal.SIGINT, 130), (signal.SIGUSR1, 138))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_to_all_processes_stops_after_a_step_and_resumes(data, whole, tmp_path, number, code):
    process = start(data, tmp_path, "--workers", "2")
    wait_for_checkpoint(process, tmp_path / "run" / "last.pt", 3)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert f"stopped by {number.name}; the run is saved: --resume goes on from here" in err
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    assert run_script(*command(data, tmp_path, "--resume")[1:], env=ONE_THREAD).returncode == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_run_whose_printed_lines_find_no_room_goes_on_to_its_end(run, whole, tmp_path, monkeypatch):
    class FullDisk(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")  # train.py > log.txt

    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert run()[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_during_validation_is_acted_on_and_the_validation_done_later(run, whole, tmp_path, monkeypatch):
    one_step = train.validation_step

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return one_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_step", signalled)
        code, _, err = run()
    assert code == 143
    assert "stopped by SIGTERM" in err
    before = content(tmp_path / "run")
    assert (before["epoch"], len(before["losses"])) == (0, 4)  # all steps of the first epoch, but not its validation
    assert facts(tmp_path / "run")["outcome"] == "stopped by SIGTERM"
    code, _, err = run("--resume")
    assert code == 0, err
    assert facts(tmp_path / "run")["outcome"] == "done"
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_no_step_is_lost_when_memory_runs_out_in_validation(run, whole, tmp_path, monkeypatch, error):
    def too_large(*_):
        raise error("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_step", too_large)
        code, _, err = run("--checkpoint-minutes", "1000")
    assert (code, err.count("error: out of memory")) == (3, 1)
    before = content(tmp_path / "run")
    assert (before["epoch"], len(before["losses"])) == (0, 4)
    assert run("--resume")[0] == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_second_signal_quits_at_once(data, tmp_path):
    slow = ["--size", "64", "64", "48", "--channels", "8", "--batch-size", "4", "--accumulation-steps", "4"]
    process = start(data, tmp_path, *slow)
    wait_for_checkpoint(process, tmp_path / "run" / "last.pt", 2)
    process.send_signal(signal.SIGTERM)
    assert "stopping after this step" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert (facts(tmp_path / "run")["outcome"], facts(tmp_path / "run")["ended"]) == ("under way", None)


def test_a_damaged_last_falls_back_to_the_one_before(run, whole, tmp_path):
    assert run()[0] == 0
    last = tmp_path / "run" / "last.pt"
    for damage in (last.read_bytes()[:-1000], b""):
        last.write_bytes(damage)
        code, _, err = run("--resume")
        assert code == 0, err
        assert f"{last}: cannot be read" in err
        assert "going on from previous.pt" in err
        assert_same_run(tmp_path / "run", whole)
    last.write_bytes(b"")
    (tmp_path / "run" / "previous.pt").write_bytes(b"")
    code, _, err = run("--resume")
    assert code == 2
    assert f"{last}: cannot be read" in err


@contextmanager
def no_file_larger_than(size: int):
    """Make a block in which writing beyond `size` bytes of a file fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def during_epochs(monkeypatch, context) -> None:
    """Run the steps of each epoch, and what finishes it, in `context(epoch)`."""

    def wrapped(function):
        def call(run, *others):
            with context(run.epoch):
                return function(run, *others)

        return call

    monkeypatch.setattr(train, "train_one_epoch", wrapped(train.train_one_epoch))
    monkeypatch.setattr(Run, "finish_epoch", wrapped(Run.finish_epoch))


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(run, whole, tmp_path, monkeypatch):
    written = []

    @contextmanager
    def disk_fills(epoch: int):
        if epoch != 2:
            yield
            return
        written.append((tmp_path / "run" / "last.pt").read_bytes())
        with no_file_larger_than(4096):
            yield
        assert (tmp_path / "run" / "last.pt").read_bytes() == written[0]
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]

    during_epochs(monkeypatch, disk_fills)
    code, _, err = run()
    assert code == 0, err
    assert f"warning: {tmp_path / 'run' / 'last.pt'}: cannot be written" in err
    assert "the run goes on" in err
    assert_same(content(tmp_path / "run")["network"], content(whole)["network"])
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    # The best of all epochs: that of the second was kept, and written when there was room again.
    best = load_checkpoint(tmp_path / "run" / "best.pt")
    assert best["epoch"] == int(max(rows, key=lambda row: float(row["val_dice"]))["epoch"])


def test_a_disk_that_stays_full_ends_the_run_with_a_failure(run, tmp_path, monkeypatch):
    during_epochs(monkeypatch, lambda epoch: no_file_larger_than(4096))
    code, _, err = run("--epochs", "1")
    assert code == 3
    assert "error:" in err.splitlines()[-1]
    assert "cannot be written" in err.splitlines()[-1]
    assert facts(tmp_path / "run")["outcome"].startswith("done; the latest results could not be written")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_json_is_warned_of_and_the_run_goes_on(run, tmp_path, content):
    assert run("--epochs", "1")[0] == 0
    notes = tmp_path / "run" / "run.json"
    notes.write_text(content)
    code, _, err = run("--epochs", "2", "--schedule", "constant", "--overwrite")
    assert code == 0
    assert facts(tmp_path / "run")["outcome"] == "done"
    notes.write_text(content)
    code, _, err = run("--epochs", "3", "--schedule", "constant", "--resume", "--extend")
    assert code == 0
    assert "run: no run has written it, so the earlier" in err
    assert facts(tmp_path / "run")["outcome"] == "done"
    assert notes.with_name("run.json.old").read_text() == content


def test_a_disk_without_room_is_seen_before_writing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: Room)
    code, _, err = run("--epochs", "1")
    assert code == 3
    assert "a checkpoint needs" in err
    assert not (tmp_path / "run" / "last.pt").exists()


class Room:
    free = 1000


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    one_step = train.step_that_fits
    done = []

    def spoiled(training, *others):
        loss = one_step(training, *others)
        done.append(None)
        if len(done) == 3:
            with torch.no_grad():
                next(training.network.parameters()).view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(train, "step_that_fits", spoiled)
    code, _, err = run()
    assert code == 3
    assert "epoch 1, step 3: weights are not finite" in err
    assert facts(tmp_path / "run")["outcome"].startswith("epoch 1, step 3: weights are not finite")
    saved = content(tmp_path / "run")
    assert len(saved["losses"]) == 2
    assert all(weight.isfinite().all() for weight in saved["network"].values())


def test_two_runs_on_one_folder(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    with open(tmp_path / "run" / "run.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on elsewhere\n")
        other.flush()
        code, _, err = run("--resume")
        assert code == 2
        assert f"{tmp_path / 'run'}: another run is at work on it (process 7 on elsewhere)" in err
    assert run("--epochs", "1", "--resume")[0] == 0  # the other has ended, though its file is there


def test_without_locks_a_run_is_warned_and_goes_on(run, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run("--epochs", "1")
    monkeypatch.setattr("core.system.files.fcntl.flock", no_locks)
    code, _, err = run("--epochs", "1", "--resume")
    assert code == 0
    assert "run.lock: this file system has no locks" in err


def test_what_a_killed_run_was_writing_goes(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    half, own = tmp_path / "run" / ".0123456789ab.last.pt", tmp_path / "run" / ".0123456789ab.notes.txt"
    half.write_bytes(b"half")
    own.write_text("the user's")
    assert run("--epochs", "1", "--resume")[0] == 0
    assert not half.exists()
    assert own.exists()


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def files_only(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)

    monkeypatch.setattr(files.os, "fsync", files_only)
    with files.whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_an_epoch_ends_without_a_checkpoint_until_it_is_due(run, tmp_path, monkeypatch):
    saved, save = [], RunFolder.save_last

    def note_and_save(*arguments, **state):
        saved.append(state["epoch"])
        save(*arguments, **state)

    monkeypatch.setattr(RunFolder, "save_last", note_and_save)
    assert run("--checkpoint-minutes", "15")[0] == 0
    assert saved == [4]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 4


def test_a_signal_between_two_epochs_saves_the_run(run, whole, tmp_path, monkeypatch):
    finish = Run.finish_epoch

    def finish_and_signal(self, scores):
        finish(self, scores)
        if self.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_epoch", finish_and_signal)
        assert run("--checkpoint-minutes", "15")[0] == 143
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2
    assert run("--checkpoint-minutes", "15", "--resume")[0] == 0
    assert_same(load_checkpoint(tmp_path / "run" / "last.pt")["network"], load_checkpoint(whole / "last.pt")["network"])


def test_a_warning_of_a_case_comes_once_and_not_every_epoch(run, tmp_path):
    mine = tmp_path / "mine"
    write_phantom(mine, cases=3, shape=(40, 36, 28), seed=0)
    scan = next((mine / "images").iterdir())
    image = nib.load(scan)
    moved = image.affine.copy()
    moved[0, 3] += 50
    data = np.asarray(image.dataobj)
    odd = nib.Nifti1Image(data, image.affine)
    odd.header.set_data_dtype(data.dtype)
    odd.set_qform(moved, 1)
    odd.set_sform(image.affine, 1)
    nib.save(odd, scan)
    warnings = {}
    for epochs in ("1", "3"):
        flags = ("--data-dir", mine, "--cache-dir", "null", "--overwrite", "--workers", "0", "--epochs", epochs)
        code, _, err = run(*flags)
        assert code == 0
        warnings[epochs] = err.count(f"{scan}: its sform and qform")
    assert warnings["3"] == warnings["1"] > 0


def test_a_worker_that_dies_ends_the_run_in_one_sentence(run, tmp_path, monkeypatch):
    load = CaseDataset.__getitem__

    def deadly(self, index):
        if torch.utils.data.get_worker_info() and (tmp_path / "run" / "last.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, index)

    monkeypatch.setattr(CaseDataset, "__getitem__", deadly)
    code, _, err = run("--workers", "1")
    assert code == 3
    assert "a process that loads cases was killed" in err.splitlines()[-1]
    monkeypatch.undo()


def test_too_little_shared_memory_means_no_workers(run, monkeypatch):
    real = os.statvfs
    none_free = os.statvfs_result((1, 1, 1, 1, 1, 1, 1, 1, 1, 1))
    monkeypatch.setattr(loading.os, "statvfs", lambda path: none_free if path == loading.SHARED_MEMORY else real(path))
    load = CaseDataset.__getitem__

    def alone(self, index):  # also while the cases are prepared
        assert torch.utils.data.get_worker_info() is None
        return load(self, index)

    monkeypatch.setattr(CaseDataset, "__getitem__", alone)
    code, _, err = run("--epochs", "1", "--workers", "2")
    assert code == 0
    assert err.count("/dev/shm: too small for --workers 2") == 1


def test_a_run_that_is_refused_leaves_the_earlier_one(run, data, tmp_path):
    assert run("--epochs", "1")[0] == 0
    before = files_in(tmp_path / "run")
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    path = broken / "labels" / "phantom_0002.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    flags = ["--epochs", "2", "--val-cases", "phantom_0001", "--overwrite"]
    code, _, err = run(*flags, "--data-dir", broken)
    assert (code, "phantom_0002.nii.gz: cannot be read to its end" in err) == (1, True)
    assert files_in(tmp_path / "run") == before
    assert run(*flags)[0] == 0
    written = facts(tmp_path / "run")
    assert (written["outcome"], written["val_cases"], written["config"]["epochs"]) == ("done", ["phantom_0001"], 2)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 2


def test_another_number_of_processes_is_no_way_to_go_on(run, tmp_path):
    assert run("--epochs", "1", "--schedule", "constant")[0] == 0
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    assert content["processes"] == 1
    torch.save(content | {"processes": 4}, last)
    code, _, err = run("--epochs", "2", "--schedule", "constant", "--resume", "--extend")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot go on in 1 process(es), the run had 4" in err


def test_a_log_that_another_program_has_changed_starts_anew(run, tmp_path):
    assert run("--epochs", "1", "--schedule", "constant")[0] == 0
    log = tmp_path / "run" / "log.csv"
    changed = log.read_text().replace(",", ";")
    log.write_text(changed)
    code, _, err = run("--epochs", "2", "--schedule", "constant", "--resume", "--extend")
    assert code == 0, err
    assert f"{log}: is no log of this run any more, so it is now log.csv.old" in err
    assert (tmp_path / "run" / "log.csv.old").read_text() == changed
    assert [row["epoch"] for row in csv.DictReader(log.read_text().splitlines())] == ["2"]


def test_a_scan_that_vanishes_is_named(run, data, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    write_phantom(mine, cases=2, shape=(40, 36, 28), seed=0)
    one_epoch = train.train_one_epoch

    def vanishing(run, *others):
        for scan in (mine / "images").iterdir():
            scan.unlink()
        return one_epoch(run, *others)

    monkeypatch.setattr(train, "train_one_epoch", vanishing)
    code, _, err = run("--data-dir", mine, "--cache-dir", "null")
    assert code == 1
    assert f"{mine / 'images'}" in err
    assert "no such file" in err


def test_a_loss_that_is_not_finite_names_organs_that_are_not_annotated():
    run = SimpleNamespace(losses=[0.5], pending=None, epoch=3, read_loss=lambda: None, bar=SimpleNamespace(update=int))
    annotated = torch.tensor([[True, True], [True, False]])
    Run.record_loss(run, torch.tensor(math.nan), {"case": ["a", "b"], "annotated": annotated})
    with pytest.raises(NotFiniteError, match=r"^epoch 3, step 2, case a, b: the loss is nan; .* logits of -inf"):
        run.pending.read()


@pytest.mark.slow
def test_extending_a_run_is_the_longer_run(run, tmp_path):
    constant = ["--schedule", "constant"]
    assert run(*constant, "--run-dir", tmp_path / "long")[0] == 0
    assert run(*constant, "--epochs", "2")[0] == 0
    code, _, err = run(*constant, "--resume")
    assert code == 2
    assert "epochs was 2, is 4); give --extend for more epochs, the run's own" in err
    assert run(*constant, "--resume", "--extend")[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "long")
    assert load_config(tmp_path / "run" / "config.yaml").epochs == 4
    assert facts(tmp_path / "run")["config"]["epochs"] == 4
    code, _, err = run(*constant, "--resume", "--extend", "--epochs", "1")
    assert code == 2
    assert "--extend: the run had schedule constant and 4 epochs, this has 1" in err


def test_a_checkpoint_alone_becomes_a_whole_run_folder(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    names = ("config.yaml", "val_cases.txt", "run.json")
    before = [(tmp_path / "run" / name).read_bytes() for name in names[:2]]
    for name in names:
        (tmp_path / "run" / name).unlink()
    assert run("--epochs", "1", "--resume")[::2] == (0, "")
    assert [(tmp_path / "run" / name).read_bytes() for name in names[:2]] == before
    assert facts(tmp_path / "run")["val_cases"] == before[1].decode().split()
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    assert run("--epochs", "1", "--resume", "--run-dir", moved)[0] == 0
    assert load_config(moved / "config.yaml").run_dir == facts(moved)["config"]["run_dir"] == str(moved)


def test_another_memory_plan_is_said_to_change_the_last_bits(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    last = tmp_path / "run" / "last.pt"
    content = torch.load(last, weights_only=True)
    del content["cases"]["made"]  # as of a run from before made labels
    torch.save(content, last)
    code, _, err = run("--epochs", "1", "--resume", "--memory", "lowest")
    assert code == 0
    assert "memory was auto, is lowest: from here on the last bits may differ" in err
