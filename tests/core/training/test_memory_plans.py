"""What is counted before a step, and what happens when memory runs out."""

import copy
import itertools
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import train
from core.config import load_config
from core.network import build_network
from core.training import memory_count
from core.training import memory_plans as memory
from core.training.losses import LOSSES
from core.training.memory_count import Need, count_step, plan_for
from core.training.memory_plans import NothingFitsError, Tried, choose_plan, fastest, step_that_fits
from core.training.run_folder import RunFolder
from core.training.setup import PLANS, Training, make_optimizer
from core.training.step import compute_gradients
from data.make_phantom import write_phantom
from vnet import VNet

SMALL = load_config(
    flags={"size": ["32", "32", "32"], "channels": "4", "down_convs": ["1", "2", "2"], "up_convs": ["2", "1"]}
)


def start(norm: str = "instance", plan: str = "off") -> Training:
    torch.manual_seed(0)
    network = VNet(5, channels=3, down_convs=(1, 2), up_convs=(1,), norm=norm)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Training(network, LOSSES["cross_entropy"], make_optimizer(network, 1e-2), scaler, torch.float32, plan=plan)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(1, 1, 8, 8, 8), torch.randint(5, (1, 8, 8, 8), dtype=torch.uint8)


class Listing(nn.Conv3d):
    """A network with several outputs."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [super().forward(x)]


def test_what_cannot_be_counted_is_said_in_a_sentence(monkeypatch):
    config = replace(load_config(), size=(32, 32, 16), channels=2)
    with pytest.raises(ValueError, match=r"\(Listing\) returns list, expected \(B, K, X, Y, Z\)"):
        count_step(config, "off", torch.bfloat16, lambda config: Listing(1, 14, 1))
    monkeypatch.setitem(LOSSES, "cross_entropy", lambda logits, labels: logits.mean() if labels.any() else logits.sum())
    with pytest.raises(ValueError, match=r"^--plan: the network or the loss asks for values"):
        count_step(config, "off", torch.bfloat16)


@pytest.mark.slow
def test_default_network_fits_small_cards():
    # The figures of README: the whole V-Net on 256x256x128 voxels.
    needs = [count_step(load_config(), plan, torch.bfloat16) for plan in PLANS]
    off, low, lowest = needs
    assert off.peak_gib == pytest.approx(7.7, abs=0.15)
    assert low.peak_gib == pytest.approx(4.5, abs=0.05)
    assert lowest.peak_gib < 3.0
    assert low.flops == pytest.approx(off.flops, rel=0.001)
    assert 1.3 < lowest.flops / off.flops < 1.35
    # Forward arithmetic: of every 5x5x5 convolution of figure 2, multiply and add; backward is twice as much.
    fives = [(1, 16, 0)] + [(32, 32, 1)] * 2 + [(64, 64, 2)] * 3 + [(128, 128, 3)] * 3 + [(256, 256, 4)] * 3
    fives += [(256, 256, 3)] * 3 + [(128, 128, 2)] * 3 + [(64, 64, 1)] * 2 + [(32, 32, 0)]
    forward = sum(2 * 125 * c_in * c_out * 256 * 256 * 128 / 8**level for c_in, c_out, level in fives)
    assert off.flops == pytest.approx(3 * forward, rel=0.02)


@pytest.mark.slow
def test_count_grows_with_the_settings():
    base = count_step(SMALL, "off", torch.float32)
    assert count_step(replace(SMALL, batch_size=2), "off", torch.float32).flops == 2 * base.flops
    assert count_step(replace(SMALL, size=(64, 32, 32)), "off", torch.float32).peak_gib > 1.5 * base.peak_gib


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_in_pieces_takes_the_memory_of_a_piece(plan):
    alone, whole, cut = (
        count_step(replace(SMALL, batch_size=batch, accumulation_steps=pieces), plan, torch.float32)
        for batch, pieces in ((1, 1), (4, 1), (4, 4))
    )
    assert cut.flops == pytest.approx(whole.flops)
    # Besides, three more cases of image and labels, 5 bytes a voxel, and the gradients of the pieces before.
    inputs_gib = 3 * 5 * math.prod(SMALL.size) / 2**30
    assert 0 <= cut.peak_gib - alone.peak_gib - inputs_gib <= 1.2 * weights_gib()
    assert cut.peak_gib < 0.6 * whole.peak_gib


def weights_gib() -> float:
    return sum(p.numel() for p in build_network(SMALL).parameters()) * 4 / 2**30


def test_an_average_takes_the_memory_of_the_weights():
    base, averaged = (count_step(replace(SMALL, ema_decay=d), "lowest", torch.float32).peak_gib for d in (0.0, 0.9))
    assert averaged - base == pytest.approx(weights_gib(), rel=0.05)


def test_count_is_of_what_lives():
    # Parameters, Adam's two moments and gradients are 4 times the weights; a step cannot need less.
    weights_gib = sum(p.numel() for p in VNet(14, 4, (1, 2, 2), (2, 1)).parameters()) * 4 / 2**30
    for plan in PLANS:
        assert count_step(SMALL, plan, torch.float32).peak_gib > 4 * weights_gib


def test_plan_for_a_card():
    needs = [Need("off", 7.7, 3), Need("low", 4.2, 3), Need("lowest", 2.9, 4)]
    assert plan_for(needs, 24).plan == "off"
    assert plan_for(needs, 6).plan == "low"
    assert plan_for(needs, 5).plan == "lowest"
    assert plan_for(needs, 4) is None


def out_of_memory_under(plans: set[str], real):
    """Return a function like `real` that runs out of memory under some plans, after the forward pass."""

    def run(training: Training, *arguments, **settings):
        if training.plan in plans:
            real(training, *arguments, **settings)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(training, *arguments, **settings)

    return run


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_out_of_memory_does_the_same_step_again_under_the_next_plan(monkeypatch, capsys, norm):
    expected, training = start(norm, "low"), start(norm)
    value = step_that_fits(expected, *batch())
    monkeypatch.setattr(memory, "compute_gradients", out_of_memory_under({"off"}, compute_gradients))
    assert step_that_fits(training, *batch()) == value
    assert training.plan == "low"
    again = "out of memory under the plan off: the same step again"
    assert capsys.readouterr().out.splitlines() == [again, f"{again} under low"]
    for (name, a), b in zip(expected.network.state_dict().items(), training.network.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(state["step"] == 1 for state in training.optimizer.state.values())


def test_out_of_memory_under_the_smallest_plan_stops(monkeypatch):
    training = start()
    before = copy.deepcopy(training.network.state_dict())
    monkeypatch.setattr(memory, "compute_gradients", out_of_memory_under(set(PLANS), compute_gradients))
    with pytest.raises(NothingFitsError, match=r"out of memory under the smallest memory plan.*\(CUDA out of memory\)"):
        step_that_fits(training, *batch())
    assert all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())


def failing(errors: list[Exception | None], real):
    """Return a function like `real` that raises these errors, one a call; None: works."""

    def run(training: Training, *arguments, **settings):
        loss = real(training, *arguments, **settings)
        error = errors.pop(0) if errors else None
        if error is not None:
            raise error
        return loss

    return run


# What memory that runs out is called, by torch, CUDA, cuBLAS and cuDNN.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_way_to_say_that_memory_ran_out_is_understood(monkeypatch, card, error):
    training = start()
    monkeypatch.setattr(memory, "compute_gradients", failing([error], compute_gradients))
    assert choose_plan(training, SMALL, card) == "low"
    monkeypatch.setattr(memory, "compute_gradients", failing([error, error], compute_gradients))
    step_that_fits(training, *batch())
    assert training.plan == "low"


def test_a_first_time_out_of_memory_keeps_the_plan(monkeypatch):
    training = start()
    monkeypatch.setattr(memory, "compute_gradients", failing([OUT_OF_MEMORY[0]], compute_gradients))
    step_that_fits(training, *batch())
    assert training.plan == "off"
    monkeypatch.setattr(memory, "compute_gradients", failing([OUT_OF_MEMORY[0]], compute_gradients))
    step_that_fits(training, *batch())
    assert training.plan == "low"


def test_other_errors_of_torch_pass_through(monkeypatch, card):
    fault = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(memory, "compute_gradients", failing([fault, fault], compute_gradients))
    with pytest.raises(RuntimeError, match="device-side assert"):
        choose_plan(start(), SMALL, card)
    with pytest.raises(RuntimeError, match="device-side assert"):
        step_that_fits(start(), *batch())


def test_no_engine_under_the_last_plan_names_cudnn(monkeypatch):
    training = start(plan="lowest")
    monkeypatch.setattr(memory, "compute_gradients", failing([OUT_OF_MEMORY[-1]] * 2, compute_gradients))
    with pytest.raises(NothingFitsError, match="unable to find an engine to execute this computation"):
        step_that_fits(training, *batch())


def test_all_processes_step_down_when_another_one_ran_out(monkeypatch):
    training, expected = start(), start(plan="low")
    answers = [True, True, False]
    training.any_process = lambda own: answers.pop(0) or own
    assert step_that_fits(training, *batch()) == step_that_fits(expected, *batch())
    assert (training.plan, answers) == ("low", [])


def test_out_of_memory_in_the_first_step_finds_adams_state_whole():
    training = start()
    states = training.optimizer.state.values()
    assert len(states) == len(list(training.network.parameters()))
    for state in states:
        assert (state["step"].item(), state["exp_avg"].any().item(), state["exp_avg_sq"].any().item()) == (0, 0, 0)


@pytest.fixture
def card(monkeypatch) -> torch.device:
    """Return a made-up card of 6 GiB: the functions of torch.cuda that choosing a plan asks. A step takes a second."""
    properties = type("Properties", (), {"total_memory": 6 * 2**30, "name": "Card"})
    ticks = itertools.count()
    monkeypatch.setattr(memory, "clock", lambda device: next(ticks))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**30, 6 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**29)
    monkeypatch.setattr(memory, "blank_batch", lambda config, device: batch())
    return torch.device("cuda")


def test_auto_takes_a_plan_that_fits_and_changes_nothing(monkeypatch, capsys, card):
    training = start("batch")
    before = copy.deepcopy(training.network.state_dict())
    tried = []

    def fake(training, image, labels):
        tried.append(training.plan)
        if training.plan == "off":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_gradients(training, image, labels)

    monkeypatch.setattr(memory, "compute_gradients", fake)
    assert choose_plan(training, SMALL, card) == "low"
    assert tried == ["off", *["low"] * 4, *["lowest"] * 4]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["low", "1.000", "5.00"]
    assert lines[3:] == ["memory plan low (the fastest that fits)"]
    assert all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())
    assert all(state["step"] == 0 for state in training.optimizer.state.values())
    assert all(p.grad is None for p in training.network.parameters())


@pytest.fixture
def timed(monkeypatch, card):
    """Count the steps that are tried; under the plan low they take half the time of the others."""
    tried, now = [], [0.0]

    def step(training: Training, image: torch.Tensor, labels: torch.Tensor) -> float:
        tried.append(training.plan)
        now[0] += 0.5 if training.plan == "low" else 1.0
        return 3.0

    monkeypatch.setattr(memory, "clock", lambda device: now[0])
    monkeypatch.setattr(memory, "try_step", step)
    return tried


def test_auto_takes_the_fastest_plan_and_measures_once(timed, tmp_path, card, monkeypatch, capsys):
    folders = [RunFolder(replace(SMALL, run_dir=str(tmp_path / name))) for name in ("first", "second")]
    for folder in folders:
        folder.path.mkdir()
        (folder.path / "run.json").write_text('{"commit": "abc"}')
    assert choose_plan(start(), SMALL, card, folder=folders[0]) == "low"
    assert len(timed) == 12
    noted = json.loads((folders[0].path / "run.json").read_text())
    assert noted["commit"] == "abc"
    assert {plan: tried["seconds"] for plan, tried in noted["memory_plan"]["plans"].items()} == {
        "off": 1.0, "low": 0.5, "lowest": 1.0
    }  # fmt: skip
    capsys.readouterr()
    for folder in folders:  # the run resumed, and another one beside it
        assert choose_plan(start(), SMALL, card, folder=folder) == "low"
        assert capsys.readouterr().out.startswith("memory plan low (as measured before")
        assert "memory_plan" in json.loads((folder.path / "run.json").read_text())
    assert len(timed) == 12
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    choose_plan(start(), SMALL, card, folder=folders[1])
    assert len(timed) == 24
    monkeypatch.setattr(memory, "TRITON_VERSION", "8.8.8")
    choose_plan(start(), SMALL, card, folder=folders[1])
    assert len(timed) == 36
    others = {"batch_size": 2}, {"optimizer": "muon"}, {"patch_size": SMALL.size}
    for settings in others:
        choose_plan(start(), replace(SMALL, **settings), card, folder=folders[0])
    assert len(timed) == 36 + 12 * len(others)


def test_a_plan_measured_of_v_net_is_not_taken_by_an_edited_one(timed, tmp_path, card):
    folder = RunFolder(replace(SMALL, run_dir=str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    assert choose_plan(start(), SMALL, card, folder=folder) == "low"
    edited = start()  # its class and its parameters are those of V-Net
    edited.network.first.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    assert choose_plan(edited, SMALL, card, folder=folder) == "off"


def test_a_plan_is_measured_again_when_more_of_the_card_is_free(timed, tmp_path, card, monkeypatch):
    folder = RunFolder(replace(SMALL, run_dir=str(tmp_path)))
    (tmp_path / "run.json").write_text("{}")
    fits = memory.try_step

    def off_does_not(training: Training, *batch: torch.Tensor) -> float:
        if training.plan == "off":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fits(training, *batch)

    monkeypatch.setattr(memory, "try_step", off_does_not)
    for free_gib, steps in ((5, 8), (5.4, 8), (5.6, 16)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free_gib: (free * 2**30, 6 * 2**30))
        choose_plan(start(), SMALL, card, folder=folder)
        assert len(timed) == steps


def test_a_deterministic_run_takes_the_first_plan_that_fits(timed, card, capsys):
    assert choose_plan(start(), replace(SMALL, deterministic=True), card) == "off"
    assert timed == list(PLANS)
    assert "not timed" in capsys.readouterr().out


def test_processes_agree_on_a_plan_that_fits_all_cards():
    quick, slow = Tried(1.0, 3.0), Tried(2.0, 3.0)
    assert fastest([{"off": quick, "low": slow}, {"off": quick, "low": slow}]) == "off"
    assert fastest([{"off": quick, "low": slow, "lowest": slow}, {"low": slow, "lowest": quick}]) == "low"
    assert fastest([{"low": slow, "lowest": quick}, {"low": quick, "lowest": quick}]) == "lowest"


def test_auto_stops_with_the_command_that_names_settings_that_would_fit(monkeypatch, capsys, card):
    def nothing_fits(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "compute_gradients", nothing_fits)
    needed = {(256, 256, 128): 8.0, (128, 256, 128): 5.0, (128, 128, 128): 4.4}
    monkeypatch.setattr(memory_count, "count_step", lambda config, plan, _: Need(plan, needed[config.input_size], 1))
    had = r"the 5\.5 GiB that this run can have of the card's 6\.0; train.py --plan --card-gib 5\.5"
    with pytest.raises(NothingFitsError, match=had):
        choose_plan(start(), load_config(), card)
    assert memory_count.show_plans(load_config(), 6.0) == 3
    assert "no plan fits a card of 6 GiB; --size 128 128 128 --batch-size 1 should" in capsys.readouterr().out
    on_patches = replace(load_config(), size=(512, 512, 256), patch_size=(256, 256, 128))
    assert memory_count.show_plans(on_patches, 6.0) == 3
    assert "; --patch-size 128 128 128 --batch-size 1 should" in capsys.readouterr().out


def test_without_a_card_auto_is_off_and_a_named_plan_is_taken():
    cpu = torch.device("cpu")
    assert choose_plan(start(), SMALL, cpu) == "off"
    assert choose_plan(start(), replace(SMALL, memory="lowest"), cpu) == "lowest"


def run_train(monkeypatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.main()


@pytest.mark.slow
def test_plan_prints_the_table_and_what_a_card_would_get(monkeypatch, capsys, tmp_path):
    small = ["--size", 32, 32, 32, "--channels", 4, "--down-convs", 1, 1, 1, "--up-convs", 1, 1]
    flags = [*small, "--run-dir", tmp_path / "run", "--plan"]
    assert run_train(monkeypatch, *flags, "--card-gib", 4) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["plan", "off", "low", "lowest"]
    assert "on a card of 4 GiB: off" in out
    assert run_train(monkeypatch, *flags, *("--size", 64, 64, 64, "--patch-size", 32, 32, 32)) == 0
    assert capsys.readouterr().out == out.replace("on a card of 4 GiB: off\n", "")  # a step needs what a patch needs
    assert run_train(monkeypatch, *flags, "--card-gib", 0.5) == 3
    assert "no plan fits a card of 0.5 GiB" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_whole_run_under_each_plan_learns_the_same(monkeypatch, tmp_path):
    write_phantom(tmp_path / "data", cases=3, shape=(36, 32, 24), seed=0)
    flags = ["--data-dir", tmp_path / "data", "--cache-dir", tmp_path / "cache", "--device", "cpu", "--workers", 0]
    flags += ["--size", 16, 16, 16, "--channels", 2, "--down-convs", 1, 1, "--up-convs", 1, "--epochs", 2]
    losses = {}
    for plan in PLANS:
        assert run_train(monkeypatch, *flags, "--memory", plan, "--run-dir", tmp_path / plan) == 0
        losses[plan] = (tmp_path / plan / "log.csv").read_text().splitlines()[-1].split(",")[1]
    assert float(losses["low"]) == pytest.approx(float(losses["off"]), rel=1e-4)
    assert float(losses["lowest"]) == pytest.approx(float(losses["off"]), rel=1e-4)
