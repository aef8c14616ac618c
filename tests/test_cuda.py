"""What only a GPU can show: gradients, precisions, memory, no waiting inside a step, and the scripts on CUDA.

Small sizes: three minutes on any card of 8 GiB. Without a GPU all of it is skipped.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, in_ras, same_weights

import infer
import train
from core.checkpoint import load_network, save_checkpoint
from core.config import Config, load_config
from core.training import kernels
from core.training.augment import augment
from core.training.device import DTYPES, choose_device, choose_precision
from core.training.losses import LOSSES
from core.training.memory_plans import NothingFitsError, blank_batch, choose_plan, step_that_fits, try_step
from core.training.setup import PLANS, Training, make_optimizer, seed_torch
from core.training.step import PendingLoss, training_step, validation_step
from vnet import NORMS, VNet

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU here"),
]
# torch looks at it once, at the process's first matrix product, whether or not that is to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # read when CUDA starts, which `works` below makes it do
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
CUDA = "cuda"
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
CLASSES, SHAPE, PATCH = 5, (32, 32, 16), (16, 32, 8)


def works(precision: str) -> bool:
    """Return True where train.py computes in it: not bf16 on cards before Ampere, or with a cuDNN that lacks it."""
    try:
        return torch.cuda.is_available() and bool(choose_precision(precision, torch.device(CUDA)))
    except ValueError:
        return False


HALF = [DTYPES[name] for name in ("bf16", "fp16") if works(name)] or [torch.float16]


@pytest.fixture(autouse=True)
def card():
    """Make the first GPU the current one, as the scripts do, and leave it as it was."""
    seed_torch(0, deterministic=False)
    yield choose_device(CUDA)
    seed_torch(0, deterministic=False)
    torch.cuda.empty_cache()


def network(norm: str = "instance") -> VNet:
    torch.manual_seed(0)
    return VNet(CLASSES, channels=4, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm)


def batch(device: torch.device | str = CPU, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    image, labels = torch.rand(2, 1, *SHAPE, dtype=torch.float64), torch.randint(CLASSES, (2, *SHAPE))
    return image.to(device, dtype), labels.to(device, torch.uint8)


def start(net: VNet, plan: str, loss: str, precision: torch.dtype, **more: object) -> Training:
    device = next(net.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    return Training(net, LOSSES[loss], make_optimizer(net, 1e-3), scaler, precision, plan=plan, **more)


def gradients(training: Training, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the gradients of a step, in one row; a clipping that shortens nothing takes the scaler's factor out."""
    training.max_grad_norm = 1e9
    training_step(training, image, labels)
    return torch.cat([p.grad.detach().flatten().double().cpu() for p in training.network.parameters()])


# ---- Numbers


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_those_of_the_cpu_in_float64(plan, norm, loss):
    expected = gradients(start(network(norm).double(), "off", loss, torch.float32), *batch(dtype=torch.float64))
    for precision, least in ((torch.float32, 1 - 1e-8), *((each, 0.99) for each in HALF)):
        found = gradients(start(network(norm).to(CUDA), plan, loss, precision), *batch(CUDA))
        assert torch.cosine_similarity(found, expected, dim=0) > least, precision
        if precision == torch.float32:  # without TF32, which would be off by some 1e-3
            assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("precision", [torch.float32, *HALF])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_that_is_not_finite_changes_no_weight(plan, precision):
    training = start(network().to(CUDA), plan, "cross_entropy", precision)
    image, labels = batch(CUDA)
    training_step(training, image, labels)
    before = copy.deepcopy(training.network.state_dict())
    training_step(training, torch.full_like(image, float("nan")), labels)
    assert all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())


def test_an_overflow_in_fp16_changes_no_weight_and_halves_the_factor():
    training = start(network().to(CUDA), "off", "cross_entropy", torch.float16)
    training.scaler = torch.amp.GradScaler(CUDA, init_scale=2.0**60)
    before = copy.deepcopy(training.network.state_dict())
    loss = training_step(training, *batch(CUDA))
    assert loss.isfinite()
    assert training.scaler.get_scale() == 2.0**59
    assert all(torch.equal(before[name], value) for name, value in training.network.state_dict().items())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("plan", PLANS)
def test_deterministic_steps_are_equal_to_the_last_bit(plan, loss):
    found = []
    for _ in range(2):
        seed_torch(0, deterministic=True)
        training = start(network().to(CUDA), plan, loss, torch.float32)
        for _ in range(3):
            training_step(training, *batch(CUDA))
        found.append(copy.deepcopy(training.network.state_dict()))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


@pytest.mark.parametrize("patch_size", [None, PATCH])
@pytest.mark.parametrize("precision", [torch.float32, *HALF])
def test_validation_predicts_as_the_cpu(precision, patch_size):
    own, labels, more = network(), batch()[1], {"patch_size": patch_size}
    loss, predicted = validation_step(start(own, "off", "cross_entropy", torch.float32, **more), *batch())
    on_card, there = validation_step(start(own.to(CUDA), "off", "cross_entropy", precision, **more), *batch(CUDA))
    assert on_card == pytest.approx(loss, rel=1e-2)
    assert (there.cpu() == predicted).double().mean() > (0.999 if precision == torch.float32 else 0.95)
    assert there.shape == labels.shape


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed; it exists for Linux alone")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_the_kernels_compute_what_plain_torch_does(card, dtype, capsys):
    assert kernels.works(card, dtype), capsys.readouterr().err
    found = kernels.all_results(tuple(kernels.PLAIN), card, dtype)
    expected = kernels.all_results(tuple(kernels.PLAIN.values()), CPU, torch.float64)
    near = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=near, atol=near)


def test_the_plan_low_is_the_same_without_triton(monkeypatch):
    expected = gradients(start(network().to(CUDA), "low", "cross_entropy", torch.float32), *batch(CUDA))
    monkeypatch.setattr(kernels, "works", lambda device, dtype: False)
    found = gradients(start(network().to(CUDA), "low", "cross_entropy", torch.float32), *batch(CUDA))
    assert (found - expected).norm() < 1e-4 * expected.norm()


# ---- Waiting and memory


@pytest.mark.parametrize("patch", [{}, {"size": SHAPE, "patch_size": PATCH}])
@pytest.mark.parametrize("augmented", [True, False])
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_in_a_step_waits_for_the_card(plan, precision, augmented, patch):
    flip = {"augment_flip": True, "organs": ("background", "right kidney", "left kidney", "liver", "spleen")}
    config = replace(load_config(), augment=augmented or not patch, augment_elastic=0.02, **flip, **patch)
    training = start(network().to(CUDA), plan, "dice_cross_entropy", precision, max_grad_norm=1.0)
    image, labels = batch(CUDA)
    extent_mm = torch.tensor([[300.0, 300.0, 200.0]] * 2)
    for mode in ("default", "error"):  # the first step makes what later ones reuse
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode(mode)
            changed = augment(image, labels, extent_mm, config, 1, [0, 1])
            loss = PendingLoss(step_that_fits(training, *changed), "here")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.read() > 0


def test_auto_takes_a_smaller_plan_on_a_smaller_card(card):
    config = load_config(flags={"size": ["128", "128", "64"], "channels": "8"})
    total = torch.cuda.get_device_properties(card).total_memory
    plans = []
    for gib in (8.0, 0.0):
        torch.manual_seed(0)
        net = VNet(14, channels=8).to(CUDA)
        training = start(net, "off", "cross_entropy", HALF[0])
        torch.cuda.empty_cache()
        used = torch.cuda.memory_reserved(card)
        if gib == 0:  # a little more than `low` needs, less than `off` does
            needs = peaks_gib(training, config, card)
            gib = 0.1 * needs["off"] + 0.9 * needs["low"] - used / 2**30
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + gib * 2**30) / total), card)
        try:
            plans.append(choose_plan(training, config, card))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, card)
    assert plans[0] in PLANS  # the fastest on this card
    assert plans[1] in ("low", "lowest")


def peaks_gib(training: Training, config: Config, card: torch.device) -> dict[str, float]:
    """Return the peak in GiB of a step under each plan."""
    return {plan: try_step(replace(training, plan=plan), *blank_batch(config, card)) for plan in PLANS}


def test_a_card_that_is_too_small_for_everything_is_said_in_one_sentence(card):
    config = load_config(flags={"size": ["128", "128", "64"], "channels": "8"})
    training = start(VNet(14, channels=8).to(CUDA), "off", "cross_entropy", HALF[0])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(card).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(card) + 2**26) / total, card)
    try:
        with pytest.raises(NothingFitsError, match="no memory plan fits"):
            choose_plan(training, config, card)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)


# ---- The scripts


@pytest.fixture
def run(phantom_data, tmp_path, run_main):
    """Run train.py's main into tmp_path/run on a device."""

    def run(device: str, *flags: object) -> tuple[int, str, str]:
        where = ["--data-dir", phantom_data, "--run-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache"]
        return run_main(train, *where, *TINY, "--device", device, "--precision", "float32", *flags)

    return run


def test_a_run_goes_from_one_device_to_the_other(run, tmp_path):
    for epochs, device in enumerate(("cpu", CUDA, "cpu", CUDA), start=1):
        code, _, err = run(device, "--epochs", epochs, "--resume", *(["--extend"] if epochs > 1 else []))
        assert code == 0, err


def test_training_is_the_same_twice_with_deterministic(run, tmp_path):
    for folder, how in (("first", "the first that fits"), ("second", "as measured before")):
        code, out, err = run(CUDA, "--epochs", 2, "--deterministic", "--augment", "--run-dir", tmp_path / folder)
        assert code == 0, err
        assert f"memory plan off ({how}" in out
    assert same_weights(tmp_path / "first" / "last.pt", tmp_path / "second" / "last.pt")


def test_infer_gives_the_label_maps_of_the_cpu(run, run_main, phantom_data, tmp_path):
    assert run(CUDA, "--epochs", 4)[0] == 0
    best, other = tmp_path / "run" / "best.pt", tmp_path / "other.pt"
    net, content = load_network(best)
    with torch.no_grad():
        net.classify.bias[1] += 0.5
    save_checkpoint(other, net, content["config"], training_data=content["training_data"])
    half = [name for name in ("bf16", "fp16") if works(name)][:1]
    for device, precision in (("cpu", "float32"), (CUDA, "float32"), *((CUDA, name) for name in half)):
        out = ["--output", tmp_path / f"{device}_{precision}", "--device", device, "--precision", precision]
        code, _, err = run_main(infer, phantom_data, "--checkpoint", best, other, "--probabilities", *out)
        assert code == 0, err
    for path in sorted((tmp_path / "cpu_float32").glob("phantom_????.nii.gz")):
        expected = in_ras(path)
        for name, least in (("cuda_float32", 0.9999), *((f"cuda_{name}", 0.99) for name in half)):
            assert np.mean(in_ras(tmp_path / name / path.name) == expected) > least, (name, path.name)


def test_gradients_are_averaged_over_nccl():
    code = (
        "import torch; from torch import distributed, nn; from core.system.processes import Group\n"
        "distributed.init_process_group('nccl', store=distributed.HashStore(), rank=0, world_size=1)\n"
        "net = nn.Linear(3, 1).cuda(); loss = net(torch.ones(1, 3).cuda()).sum(); loss.backward()\n"
        "before = net.weight.grad.clone()\n"
        "whole = Group(rank=0, size=2).average_gradients(net, loss.detach(), 0.5)\n"
        "assert torch.equal(net.weight.grad, before / 2) and whole == loss / 2\n"
        "distributed.destroy_process_group()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
