"""The benchmarks count and answer what they say; nothing timed is asserted, and MONAI is not needed."""

import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import inference, memory, peers, train_step
from benchmarks.measuring import Contender, take_turns
from benchmarks.peers import NO_MONAI, monai_installed
from core.config import load_config
from core.network import build_network
from core.scans.files import find_scans
from core.training.memory_count import count_step
from core.training.setup import PLANS
from core.training.step import training_step
from data.make_phantom import write_phantom

SMALL = load_config(
    flags={"size": ["32", "32", "16"], "channels": "4", "down_convs": ["1", "1"], "up_convs": ["1"], "device": "cpu"}
)


@pytest.fixture
def without_monai(monkeypatch):
    monkeypatch.setattr(peers, "monai_installed", lambda: False)


@pytest.fixture
def with_a_peer(monkeypatch):
    """Return a network of one convolution in MONAI's place."""
    monkeypatch.setattr(peers, "monai_installed", lambda: True)
    monkeypatch.setattr(peers, "monai_vnet", lambda classes: nn.Conv3d(1, classes, kernel_size=1))


def run(monkeypatch, capsys, module, *flags: object) -> tuple[list[str], dict]:
    """Return a benchmark on the small network: the lines that it prints, and its last line read as JSON."""

    def load(flags: dict):
        return replace(SMALL, size=tuple(map(int, flags["size"])))

    monkeypatch.setattr(module, "load_config", load)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    assert module.main() == 0
    lines = capsys.readouterr().out.splitlines()
    return lines, json.loads(lines[-1])


@pytest.mark.slow
def test_memory_answers_in_json_with_the_numbers_of_the_plans(monkeypatch, capsys, without_monai):
    lines, result = run(monkeypatch, capsys, memory, "--size", 32, 32, 16, "--json")
    assert len(lines) == 1
    keys = {"project_off_gib", "project_low_gib", "project_lowest_gib", "monai_gib", "machine"}
    assert keys <= set(result)
    for plan in PLANS:
        assert result[f"project_{plan}_gib"] == count_step(SMALL, plan, torch.bfloat16).peak_gib
        assert result["step_operations"][f"project_{plan}"] > 100
    # Norm, residual and PReLU in one operation save what computing them twice costs; weights count much at this size.
    traffic = result["step_traffic_gb"]
    assert traffic["project_low"] < 1.2 * traffic["project_off"]
    assert result["monai_gib"] is None
    assert NO_MONAI in result["notes"]
    assert result["machine"]["torch"] == torch.__version__


def test_traffic_by_hand():
    x, y = torch.zeros(2, 3), torch.zeros(3, dtype=torch.bfloat16)
    with memory.Traffic() as traffic:
        x.add_(y)  # reads 24 and 6 bytes, writes 24
        x[:1].expand(2, 3).clone()  # a view of 12 bytes, and 24 written
        y.copy_(x[0])  # reads 12, writes 6
        torch.empty(5)
    assert (traffic.bytes, traffic.operations) == (54 + 36 + 18, 3)


def test_traffic_of_norm_and_prelu_by_hand():
    x = torch.zeros(1, 2, 4, 4, 4, dtype=torch.bfloat16)  # 256 bytes
    stats, slope, numbers = torch.zeros(4, 1, 2), torch.zeros(2), torch.zeros(1, 2)  # 32, 8 and 8 bytes
    gradient, result = torch.zeros_like(x), torch.zeros_like(x)
    with memory.Traffic() as traffic:
        torch.ops.vnet.moments(x)  # reads x, writes 2 numbers a channel: 16 bytes
        torch.ops.vnet.write_activated(x, stats, slope, None, result)  # reads x and 40 bytes, writes the result
        torch.ops.vnet.write_activated(x, stats, slope, None, x)  # the same into x
        torch.ops.vnet.sums_backward(x, stats, slope, result, gradient)  # reads 3 volumes, writes 1, and 24 bytes
        torch.ops.vnet.input_backward(x, stats, slope, gradient, numbers, numbers)  # reads 2 and 56 bytes, writes 1
    assert traffic.bytes == (256 + 16) + 2 * (2 * 256 + 40) + (4 * 256 + 40 + 24) + (3 * 256 + 32 + 8 + 8)
    assert traffic.operations == 2 + 1 + 1 + 2 + 1


@pytest.mark.slow
def test_memory_prints_a_table_above_the_json(monkeypatch, capsys, with_a_peer):
    lines, result = run(monkeypatch, capsys, memory, "--size", 32, 32, 16)
    assert any(line.startswith("project_lowest_gib: ") for line in lines)
    assert result["monai_gib"] > 0
    assert f"monai_gib: {result['monai_gib']:.4g}" in lines
    assert f"monai {result['step_tflop']['monai']:.4g}" in next(line for line in lines if line.startswith("step_tflop"))


def test_a_backward_pass_is_almost_twice_the_forward_pass():
    need = count_step(replace(SMALL, loss="cross_entropy", batch_size=1), "off", torch.bfloat16)
    # The gradients of input and weights cost a forward pass each; nobody asks for that of the image.
    assert 2.5 < need.flops / need.forward_flops < 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--json"], ["--channels-last"]])
def test_train_step_times_every_contender(monkeypatch, capsys, with_a_peer, flags):
    lines, result = run(monkeypatch, capsys, train_step, "--size", 16, 16, 16, "--repeats", 2, *flags)
    assert (len(lines) == 1) == ("--json" in flags)
    last = ["off, channels last", "MONAI, channels last"] if "--channels-last" in flags else []
    assert list(result["contenders"]) == [*PLANS, "MONAI", *last]
    for row in result["contenders"].values():
        assert row["step_s"]["n"] == row["step_to_monai"]["n"] == 2
        assert 0 < row["forward_s"]["median"] < row["step_s"]["median"]
    assert result["contenders"]["MONAI"]["step_to_monai"]["median"] == 1
    assert set(result["arithmetic"]) == {"project", "MONAI"}


@pytest.mark.parametrize("first_turns", [0, 2])
def test_train_step_goes_on_without_what_runs_out_of_memory(monkeypatch, capsys, with_a_peer, first_turns):
    def step(training, *batch, on_loss):
        if isinstance(training.network, nn.Conv3d) and len(taken) >= first_turns:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 62 GiB")
        if isinstance(training.network, nn.Conv3d):
            taken.append(training)
        return training_step(training, *batch, on_loss=on_loss)

    taken = []
    monkeypatch.setattr(train_step, "training_step", step)
    lines, result = run(monkeypatch, capsys, train_step, "--size", 16, 16, 16, "--repeats", 2)
    assert len(taken) == first_turns
    for name, row in result["contenders"].items():
        assert (row["step_s"] is None) == ("failed" in row) == (name == "MONAI")
        assert row["step_to_monai"] is None
    assert result["contenders"]["MONAI"]["failed"] == "CUDA out of memory. Tried to allocate 62 GiB"
    assert any("CUDA out of memory. Tried to allocate 62 GiB" in line for line in lines[:-1])


def test_another_error_of_a_contender_ends_the_benchmark():
    contender = Contender("x", lambda lap: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        take_turns([contender], repeats=1, skip_failed=True)


@pytest.mark.slow
def test_train_step_without_monai_has_no_ratios(monkeypatch, capsys, without_monai):
    lines, result = run(monkeypatch, capsys, train_step, "--size", 16, 16, 16, "--repeats", 1)
    assert list(result["contenders"]) == list(PLANS)
    assert all(row["step_to_monai"] is None for row in result["contenders"].values())
    assert NO_MONAI in lines


@pytest.mark.parametrize(
    ("module", "flags", "told"),
    [
        (memory, ["--size", "30", "32", "32"], "size: got 30 32 32"),
        (train_step, ["--size", "30", "32", "32"], "size: got 30 32 32"),
        (train_step, ["--repeats", "0"], "--repeats: got 0"),
        (train_step, ["--device", "cuda:99"], "device: got cuda:99"),
        (inference, ["--size", "30", "32", "32"], "size: got 30 32 32"),
        (inference, ["--cases", "0"], "--cases: got 0"),
        (inference, ["--scans", "nowhere"], "nowhere: no such file or folder"),
        (inference, ["--checkpoint", "none.pt", "--size", "32", "32", "32"], "leave out --size or --checkpoint"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(monkeypatch, capsys, module, flags, told):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_take_turns_trains_as_the_training_step_does(monkeypatch, without_monai):
    torch.manual_seed(0)
    image, labels = torch.rand(1, 1, 16, 16, 16), torch.randint(14, (1, 16, 16, 16), dtype=torch.uint8)
    config = replace(SMALL, size=(16, 16, 16))
    networks = []

    def build(config):
        networks.append(build_network(config))
        return networks[-1]

    monkeypatch.setattr(train_step, "build_network", build)
    (contender, *_) = train_step.make_contenders(config, image, labels)
    before = [p.clone() for p in networks[0].parameters()]
    take_turns([contender], repeats=1, warm_up=0)
    assert all(not torch.equal(a, b) for a, b in zip(before, networks[0].parameters(), strict=True))
    assert len(contender.seconds) == len(contender.laps["forward"]) == 1
    contender.before()
    assert all(p.grad is None for p in networks[0].parameters())


# ---- inference

TINY = ["--size", 16, 16, 16, "--shape", 40, 36, 24, "--cases", 2, "--repeats", 2]


class Peer:
    """In MONAI's place: finds an organ nowhere."""

    def __init__(self, network, config, device, precision, output):
        self.device, self.output = device, output
        output.mkdir()
        self.read = self.resize = self.forward = self.restore = lambda item: item

    def write(self, item):
        scan = nib.load(item["image"])
        nib.save(nib.Nifti1Image(np.zeros(scan.shape, np.uint8), scan.affine), self.output / Path(item["image"]).name)

    def run(self, scans):
        for scan in scans:
            self.write({"image": str(scan)})


def test_inference_tells_the_stages_of_every_way(monkeypatch, capsys):
    monkeypatch.setattr(peers, "monai_installed", lambda: True)
    monkeypatch.setattr(peers, "MonaiPipeline", Peer)
    lines, result = run(monkeypatch, capsys, inference, *TINY, "--device", "cpu")
    ways = itertools.product(("float32", "bf16"), ("project", "MONAI"), ("", ", in turn"))
    assert list(result["contenders"]) == [f"{name}, {precision}{way}" for precision, name, way in ways]
    for name, row in result["contenders"].items():
        assert row["scan_s"]["n"] == row["to_monai"]["n"] == 2
        assert set(row["stages_s"]) == ({"read", "resize", "forward", "restore", "write"} if "turn" in name else set())
    stages = result["contenders"]["project, float32, in turn"]["stages_s"]
    assert all(stage["min"] > 0 for stage in stages.values())
    whole = result["contenders"]["project, float32, in turn"]["scan_s"]
    assert sum(stage["min"] for stage in stages.values()) <= whole["max"]
    assert result["contenders"]["MONAI, bf16"]["to_monai"]["median"] == 1
    assert sorted(map(sorted, result["scans"])) == [[24, 36, 40]] * 2
    assert any("project, bf16, in turn" in line for line in lines)


def test_inference_leaves_out_a_precision_that_the_device_lacks(monkeypatch, capsys, without_monai):
    def choose(name, device):
        if name == "bf16":
            raise ValueError("precision: got bf16 on Card")
        return torch.float32

    monkeypatch.setattr(inference, "choose_precision", choose)
    _, result = run(monkeypatch, capsys, inference, *TINY, "--device", "cpu")
    assert list(result["contenders"]) == ["project, float32", "project, float32, in turn"]


def test_inference_without_monai_has_no_ratios(monkeypatch, capsys):
    monkeypatch.setattr(peers, "monai_installed", lambda: False)
    lines, result = run(monkeypatch, capsys, inference, *TINY, "--device", "cpu", "--json")
    assert len(lines) == 1
    assert all("project" in name and row["to_monai"] is None for name, row in result["contenders"].items())
    assert result["same_voxels_as_monai"] == {}
    assert result["notes"] == [NO_MONAI]


def test_inference_in_turn_writes_the_label_maps_of_infer(tmp_path):
    write_phantom(tmp_path / "data", 2, (40, 36, 24), seed=0)
    config = replace(SMALL, size=(16, 16, 16))
    scans = find_scans(tmp_path / "data")
    torch.manual_seed(0)
    contenders = inference.make_contenders(build_network(config).eval(), config, torch.device("cpu"), scans, tmp_path)
    whole, in_turn = contenders["project", "float32"]
    assert (whole.name, in_turn.name) == ("project, float32", "project, float32, in turn")
    output = inference.output_of(tmp_path, "project", "float32")
    take_turns([whole], repeats=1, warm_up=0)
    shutil.copytree(output, tmp_path / "whole")
    for path in output.glob("*.nii.gz"):
        path.unlink()
    take_turns([in_turn], repeats=1, warm_up=0)
    names = {case: Path(f"{case}.nii.gz") for case in scans}
    assert inference.same_voxels(tmp_path / "whole", output, names) == 1


@pytest.mark.skipif(not monai_installed(), reason=NO_MONAI)
def test_monai_does_the_same_job(monkeypatch, capsys):
    # Phantoms less than twice the network's grid, where neither side blurs; MONAI never does.
    flags = ["--size", 16, 16, 16, "--shape", 30, 28, 24, "--cases", 2, "--repeats", 1, "--device", "cpu"]
    _, result = run(monkeypatch, capsys, inference, *flags)
    assert result["same_voxels_as_monai"]["float32"] > 0.97
