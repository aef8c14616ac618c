"""Several processes, as torchrun starts them, over Gloo on a CPU: the run of one process at the whole batch."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, same_weights
from torch import nn

import infer
import train
from core.checkpoint import load_checkpoint
from core.system.processes import ALONE, Group, in_buckets, naming_lost_processes, own_device, started_by_torchrun
from data.make_phantom import write_phantom
from vnet import VNet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="torchrun's processes are ended by signals of POSIX")
ROOT = Path(__file__).resolve().parents[3]
FLAGS = [
    *TINY,
    *("--augment", "--epochs", "3", "--schedule", "poly", "--checkpoint-minutes", "0", "--val-fraction", "0.375"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Make eight cases: five to train on and three held out. Two processes can share neither evenly."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(folder, cases=8, shape=(40, 36, 28), seed=0)
    return folder


def flags(data: Path, folder: Path, *more: object) -> list[str]:
    where = ["--data-dir", data, "--run-dir", folder / "run", "--cache-dir", folder / "cache"]
    return ["train.py", *map(str, [*where, *FLAGS, *more])]


def torchrun(data: Path, folder: Path, *more: object, restarts: int = 0) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [sys.executable, *launch, *flags(data, folder, "--batch-size", "1", *more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def two(data, tmp_path_factory) -> Path:
    """Return the folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    process = torchrun(data, folder)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert out.count("epoch   1/3") == 1  # one of them speaks
    assert "in 2 processes" in out
    return folder / "run"


def log(folder: Path) -> list[dict]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_two_processes_are_one_at_the_whole_batch(data, two, tmp_path):
    alone = subprocess.run(
        [sys.executable, *flags(data, tmp_path, "--batch-size", "2")], cwd=ROOT, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    first, second = log(two), log(tmp_path / "run")
    assert [row["epoch"] for row in first] == ["1", "2", "3"]
    for one, other in zip(first, second, strict=True):
        for column in ("train_loss", "val_loss", "val_dice"):
            assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-3), column
    a, b = (load_checkpoint(folder / "last.pt") for folder in (two, tmp_path / "run"))
    assert a["training_data"] == b["training_data"]
    assert a["cases"] == b["cases"]
    for name, weight in a["network"].items():
        assert (weight - b["network"][name]).abs().max() < 2e-3, name


def wait_for(process: subprocess.Popen, last: Path) -> None:
    while not last.exists() and process.poll() is None:
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_the_run_ends_the_same(data, two, tmp_path):
    process = torchrun(data, tmp_path, "--resume", restarts=2)
    wait_for(process, tmp_path / "run" / "last.pt")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "Traceback" not in out
    # Started twice. Whether the broken connection or torchrun's signal reaches the survivor first is left to chance.
    assert out.count("cases to train on") == 2
    assert same_weights(tmp_path / "run" / "last.pt", two / "last.pt")
    assert [row["train_loss"] for row in log(tmp_path / "run")] == [row["train_loss"] for row in log(two)]


@pytest.mark.long
def test_a_signal_to_torchrun_stops_all_at_the_same_step(data, two, tmp_path):
    process = torchrun(data, tmp_path, "--resume")
    wait_for(process, tmp_path / "run" / "last.pt")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "stopped by SIGTERM; the run is saved" in out
    process = torchrun(data, tmp_path, "--resume")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert same_weights(tmp_path / "run" / "last.pt", two / "last.pt")


@pytest.mark.slow
def test_batch_norm_is_refused(data, tmp_path):
    process = torchrun(data, tmp_path, "--norm", "batch")
    out, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "norm: got batch with 2 processes" in out
    assert not (tmp_path / "run").exists()


def test_one_process_does_nothing():
    network = nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    gradient = network.weight.grad.clone()
    loss = torch.tensor(3.0)
    assert ALONE.average_gradients(network, loss, 1.0) is loss
    assert torch.equal(network.weight.grad, gradient)
    assert ALONE.gather("x") == ["x"]
    assert (ALONE.any(False), ALONE.any(True), ALONE.first) == (False, True, True)


def test_a_broken_connection_is_told_in_a_sentence():
    with (
        pytest.raises(ConnectionError, match="another process of this run has ended; --resume goes on"),
        naming_lost_processes(),
    ):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:12345")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000", "are on one GPU"),
        ("Error while creating shared memory segment /dev/shm/nccl-x (size 9637888)", "--shm-size"),
        ("something new", "could not exchange their values \\(something new\\)"),
    ],
)
def test_another_cause_of_a_failed_exchange_is_named(text, said):
    with pytest.raises(ConnectionError, match=said), naming_lost_processes():
        raise RuntimeError(text)


def test_out_of_memory_in_an_exchange_is_no_lost_process():
    with pytest.raises(torch.OutOfMemoryError), naming_lost_processes():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("name", "own"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_a_named_gpu_is_taken_under_torchrun_too(monkeypatch, name, own):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device(name) == own


def test_frozen_and_unused_parameters_take_part(monkeypatch):
    """Two processes in one: what is reduced is doubled, as if the other process had the same."""

    class Done:
        def wait(self) -> None:
            pass

    reduced = []

    def doubled(tensor: torch.Tensor, async_op: bool) -> Done:
        reduced.append(tensor.numel())
        tensor.mul_(2)
        return Done()

    monkeypatch.setattr("core.system.processes.distributed.all_reduce", doubled)
    network = nn.ModuleDict({"used": nn.Linear(1, 1), "unused": nn.Linear(1, 1), "frozen": nn.Linear(1, 1)})
    network["frozen"].requires_grad_(False)
    network["used"](torch.ones(1, 1)).sum().backward()
    loss = Group(rank=0, size=2).average_gradients(network, torch.tensor(3.0), 0.5)
    assert loss == 3
    assert network["used"].weight.grad == 1
    assert network["unused"].weight.grad == 0
    assert network["frozen"].weight.grad is None
    assert reduced == [5]  # one exchange: the loss, two weights and two biases
    monkeypatch.setattr("core.system.processes.BUCKET_BYTES", 12)
    network["used"].weight.grad.fill_(math.nan)
    loss = Group(rank=0, size=2).average_gradients(network, torch.tensor(math.nan), 0.0)
    assert reduced[1:] == [3, 2]
    assert (loss, network["used"].weight.grad) == (0, 0)


def test_the_default_networks_gradients_are_exchanged_in_few_buckets():
    with torch.device("meta"):
        gradients = [*map(torch.empty_like, VNet(14).parameters())]
    buckets = in_buckets(gradients)
    assert [id(each) for bucket in buckets for each in bucket] == [*map(id, gradients)]
    assert len(gradients) > 100
    assert len(buckets) == 4
    mixed = in_buckets([torch.zeros(2), torch.zeros(1, dtype=torch.double), torch.zeros(3)])
    assert [[tensor.numel() for tensor in bucket] for bucket in mixed] == [[2, 3], [1]]


TORCHRUN = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip


def test_one_of_several_is_known_by_what_torchrun_sets():
    assert started_by_torchrun(TORCHRUN)
    for alone in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, TORCHRUN | {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "3"}):
        assert not started_by_torchrun(alone)
    for name in TORCHRUN.keys() - {"WORLD_SIZE"}:
        for value in ({}, {name: ""}):
            rest = {key: TORCHRUN[key] for key in TORCHRUN if key != name}
            with pytest.raises(ValueError, match=f"has WORLD_SIZE 2 without {name}, .* torchrun .* unset WORLD_SIZE"):
                started_by_torchrun(rest | value)
    with pytest.raises(ValueError, match="WORLD_SIZE two, "):
        started_by_torchrun(TORCHRUN | {"WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
    ],
)
def test_what_a_scheduler_leaves_is_one_sentence(left, run_main, monkeypatch, phantom_data, tmp_path):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    where = [f"--data-dir={phantom_data}", f"--run-dir={tmp_path / 'run'}", f"--cache-dir={tmp_path / 'cache'}"]
    scan = phantom_data / "images" / "phantom_0001_0000.nii.gz"
    segment = [scan, "--device=cpu", f"--checkpoint={tmp_path / 'best.pt'}", f"--output={tmp_path / 'out'}"]
    for script, flags in ((train, [*where, *TINY]), (infer, segment)):
        code, out, err = run_main(script, *flags)
        assert (code, out) == (2, "")
        assert re.fullmatch(f"error: the environment has WORLD_SIZE {left['WORLD_SIZE']}.*unset WORLD_SIZE\n", err)
    assert list(tmp_path.iterdir()) == []
