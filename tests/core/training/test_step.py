"""The losses by hand, and what one training step may and may not change."""

import copy
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.grad import conv3d_weight
from torch.nn.utils import parametrize

from core.checkpoint import with_ema_weights
from core.config import Config
from core.patches import InPatches
from core.training import device as devices
from core.training import slabs
from core.training.activation import moments, moments_by_sums
from core.training.device import autocast, choose_device, choose_precision, has_right_gradients, training_precision
from core.training.losses import LOSSES, Loss, loss_named
from core.training.low_memory import features, is_supported
from core.training.setup import EMA, PLANS, Training, compile_network, make_optimizer, to_channels_last
from core.training.step import (
    NotFiniteError,
    PendingLoss,
    compute_gradients,
    count_pairs,
    micro_batches,
    training_step,
    validation_step,
)
from vnet import NORMS, VNet

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def sharp_logits(labels: torch.Tensor, classes: int, sureness: float = 50.0) -> torch.Tensor:
    return sureness * nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def start(
    network: nn.Module, rate: float = 1e-2, plan: str = "off", loss: str | Loss = "cross_entropy", scaled: bool = False
) -> Training:
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    precision = next(network.parameters()).dtype
    loss = LOSSES.get(loss, loss)
    return Training(network, loss, make_optimizer(network, rate), scaler, precision, plan=plan)


def step_on(network: VNet, image: torch.Tensor, labels: torch.Tensor, rate: float = 1e-2, **settings: str) -> float:
    return training_step(start(network, rate, **settings), image, labels).item()


def dice_part(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (LOSSES["dice_cross_entropy"](logits, labels) - LOSSES["cross_entropy"](logits, labels)).item()


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_torchs_own():
    logits, labels = torch.randn(2, 5, 4, 3, 6), torch.randint(5, (2, 4, 3, 6))
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert LOSSES["cross_entropy"](logits, labels.to(torch.uint8)).item() == pytest.approx(expected, rel=1e-6)


def test_dice_loss_by_hand():
    # Four voxels, three classes. Organ 1: p = .5 .25 on its two voxels, .25 on another; organ 2 is absent.
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
    logits = probabilities.clamp(min=1e-30).log().T.reshape(1, 3, 4, 1, 1)
    labels = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    # 2 * (1/2 + 1/4) / ((1/4 + 1/16 + 1/16) + 2) = 12/19
    assert dice_part(logits, labels) == pytest.approx(1 - 12 / 19, abs=1e-6)


def test_dice_loss_is_the_mean_over_organs_that_occur():
    labels = torch.tensor([[1, 1, 0, 0], [2, 0, 0, 0]]).reshape(2, 4, 1, 1)
    right = sharp_logits(labels, 4)
    assert dice_part(right, labels) == pytest.approx(0, abs=1e-6)
    half = right.clone()
    half[1] = sharp_logits(torch.zeros(1, 4, 1, 1, dtype=torch.long), 4)[0]  # the second sample's organ is missed
    assert dice_part(half, labels) == pytest.approx(0.5, abs=1e-5)


def test_dice_loss_of_a_batch_is_the_mean_of_its_samples():
    # Two organs in the first sample and one in the second: it is samples that count the same, not organs, so that
    # several processes can each work out their own.
    labels = torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0]]).reshape(2, 4, 1, 1)
    logits = torch.randn(2, 4, 4, 1, 1)
    alone = [dice_part(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert alone[0] != pytest.approx(alone[1], abs=1e-3)
    assert dice_part(logits, labels) == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_dice_loss_without_organs_is_zero_and_has_a_gradient():
    logits = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    labels = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    loss = LOSSES["dice_cross_entropy"](logits, labels)
    loss.backward()
    assert dice_part(logits.detach(), labels) == 0
    assert torch.isfinite(logits.grad).all()


def test_dice_cross_entropy_is_their_sum():
    logits, labels = torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.long)
    # Every class has 1/4: cross-entropy ln 4; Dice of organ 1 is 2 * 8/4 / (8/16 + 8) = 8/17.
    assert LOSSES["dice_cross_entropy"](logits, labels).item() == pytest.approx(math.log(4) + 9 / 17, abs=1e-6)


# ---- Steps -----------------------------------------------------------------------------------------------------------


def test_steps_lower_the_loss():
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    image = torch.rand(1, 1, 8, 8, 8)
    labels = (image[:, 0] * 3).long().clamp(max=2)
    losses = [step_on(network, image, labels) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]


def test_step_changes_every_weight_once():
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    before = [p.clone() for p in network.parameters()]
    step_on(network, torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8)), rate=1e-3)
    # Adam's first step moves each weight by the rate, whatever its gradient: a second step would show.
    for old, new in zip(before, network.parameters(), strict=True):
        assert (old - new).abs().max().item() == pytest.approx(1e-3, rel=1e-2)


def test_gradients_of_the_step_before_are_gone():
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8))
    step_on(network, image, labels, rate=0)
    once = [p.grad.clone() for p in network.parameters()]
    step_on(network, image, labels, rate=0)
    for first, second in zip(once, network.parameters(), strict=True):
        assert torch.equal(first, second.grad)


def test_mixed_precision_runs_convolutions_in_bf16_and_the_loss_in_float32():
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    with autocast(CPU, torch.bfloat16):
        logits = network(torch.rand(1, 1, 8, 8, 8))
        loss = LOSSES["dice_cross_entropy"](logits, torch.zeros(1, 8, 8, 8, dtype=torch.long))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


# ---- A batch in pieces, and the average of the weights ---------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_cross_entropy"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pieces", [2, 9])  # two and one case, and one each
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(plan, loss, pieces):
    torch.manual_seed(0)
    whole = VNet(5, channels=3, down_convs=(1, 2), up_convs=(1,)).double()
    cut = copy.deepcopy(whole)
    image = torch.rand(3, 1, 8, 8, 12, dtype=torch.double)
    labels = torch.randint(5, (3, 8, 8, 12), dtype=torch.uint8)
    expected = training_step(start(whole, plan=plan, loss=loss), image, labels)
    training = start(cut, plan=plan, loss=loss)
    training.accumulation_steps = pieces
    seen = []
    found = training_step(training, image, labels, on_loss=seen.append)
    assert len(seen) == min(pieces, 3)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * a.grad.norm(), name


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_cases_weight_is_that_of_its_gradient(plan, pieces):
    torch.manual_seed(0)
    network = VNet(5, channels=3, down_convs=(1, 2), up_convs=(1,)).double()
    image, labels = torch.rand(2, 1, 8, 8, 12, dtype=torch.double), torch.randint(5, (2, 8, 8, 12))
    training = start(network, plan=plan, loss="dice_cross_entropy")
    expected, losses = [torch.zeros_like(parameter) for parameter in network.parameters()], []
    for case, weight in ((0, 0.25), (1, 1.0)):
        losses.append(weight * compute_gradients(training, image[case : case + 1], labels[case : case + 1]) / 2)
        for total, parameter in zip(expected, network.parameters(), strict=True):
            total += weight * parameter.grad / 2
    training.accumulation_steps = pieces
    loss = compute_gradients(training, image, labels, weights=torch.tensor([0.25, 1.0], dtype=torch.double))
    assert loss.item() == pytest.approx(sum(losses).item(), rel=1e-9)
    for total, parameter in zip(expected, network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-12)


def test_micro_batches_of_a_batch():
    assert micro_batches(5, 2) == [(slice(0, 2), 0.4), (slice(2, 5), 0.6)]
    assert micro_batches(1, 4) == [(slice(0, 1), 1.0)]


def test_average_of_the_weights_by_hand():
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(1.0)
    average = EMA(network, 0.75)
    for weight in (5.0, 9.0):
        with torch.no_grad():
            network.weight.fill_(weight)
        average.update(network)
    # 1, then 3/4 * 1 + 1/4 * 5 = 2, then 3/4 * 2 + 1/4 * 9 = 3.75
    assert average.weights["weight"].item() == pytest.approx(3.75)
    inside = []

    def look() -> None:
        with average.in_place(network):
            inside.append(network(torch.ones(1, 1)).item())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert inside == pytest.approx([3.75])
    assert network.weight.item() == 9.0
    network.weight.data.fill_(0.0)
    assert average.weights["weight"].item() == pytest.approx(3.75)


def test_the_average_of_a_shared_weight_has_both_of_its_names():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    network[1].weight = network[0].weight
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        average = EMA(network, 0.75)
        network[0].weight.fill_(5.0)
    average.update(network)
    content = with_ema_weights({"network": network.state_dict(), "ema": average.weights})
    assert {name: weight.item() for name, weight in content["network"].items()} == {"0.weight": 2.0, "1.weight": 2.0}
    with average.in_place(network):
        assert network(torch.ones(1, 1)).item() == 4.0
    assert network(torch.ones(1, 1)).item() == 25.0
    assert network[0].weight is network[1].weight


def test_each_step_moves_the_average():
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    training = start(network, rate=1e-2)
    training.ema = EMA(network, 0.9)
    before = copy.deepcopy(training.ema.weights)
    training_step(training, torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8)))
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(training.ema.weights[name], 0.9 * before[name] + 0.1 * parameter)


# ---- The deterministic loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "dice_cross_entropy"])
def test_the_deterministic_loss_is_the_same(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 3, 6, dtype=torch.double, requires_grad=True)
    labels = torch.randint(4, (2, 4, 3, 6))  # one class is in none
    losses = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            losses.append(LOSSES[name](logits, labels))
        finally:
            torch.use_deterministic_algorithms(False)
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-12)
    first, second = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-14)


# ---- Memory plans: other ways to the same gradients ------------------------------------------------------------------


def hardest_half(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return a loss that no sums over voxels give: the mean over the hardest half of the voxels."""
    losses = nn.functional.cross_entropy(logits, labels.long(), reduction="none").flatten()
    return losses.topk(losses.numel() // 2).values.mean()


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_cross_entropy", hardest_half])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_plans_give_the_gradients_of_the_plain_step(plan, norm, loss, monkeypatch):
    torch.manual_seed(0)
    plain = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double()
    with torch.no_grad():  # of norms and PReLUs: no two channels alike
        for parameter in plain.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.2, 1.2)
    frugal = copy.deepcopy(plain)
    image = torch.rand(2, 1, 16, 8, 12, dtype=torch.double)
    labels = torch.randint(5, (2, 16, 8, 12), dtype=torch.uint8)
    expected = step_on(plain, image, labels, rate=1e-3, loss=loss)
    # Small enough that a slab is thinner than the volume, and a piece has fewer channels.
    monkeypatch.setattr(slabs, "SLAB_BYTES", 20_000)
    monkeypatch.setattr("core.training.activation.PIECE_VOXELS", 300)
    monkeypatch.setattr("core.training.convolutions.PART_BYTES", 50_000)
    found = step_on(frugal, image, labels, rate=1e-3, loss=loss, plan=plan)
    assert found == pytest.approx(expected, rel=1e-9)
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * a.grad.norm(), name
    for a, b in zip(plain.buffers(), frugal.buffers(), strict=True):  # running statistics, updated once
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("compute", [moments, moments_by_sums])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_statistics_are_not_rounded_to_the_type_of_the_volume(dtype, compute):
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 16, 16, 8) * 0.5 + torch.tensor([0.0, 3.0, -20.0]).view(3, 1, 1, 1)).to(dtype)
    mean, variance = compute(x)
    expected = x.double()
    torch.testing.assert_close(mean.double(), expected.mean(dim=(2, 3, 4)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), expected.var(dim=(2, 3, 4), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("compute", [moments, moments_by_sums])
@pytest.mark.parametrize("value", [3.0, 7.0, 20.0, 45.0])
def test_the_variance_of_a_flat_volume_is_never_below_zero(value, compute):
    for dtype in (torch.bfloat16, torch.float16):
        mean, variance = compute(torch.full((1, 2, 12, 10, 7), value, dtype=dtype))
        assert (variance >= 0).all()  # below -eps, the norm would be NaN
        assert mean.tolist() == [pytest.approx([value] * 2)]


@pytest.mark.parametrize("plan", PLANS[1:])
def test_plans_give_the_plain_loss_in_float32(plan):
    torch.manual_seed(0)
    network = VNet(5, channels=4, down_convs=(1, 2, 2), up_convs=(2, 1))
    image, labels = torch.rand(1, 1, 24, 16, 16), torch.randint(5, (1, 24, 16, 16), dtype=torch.uint8)
    expected = step_on(copy.deepcopy(network), image, labels)
    assert step_on(network, image, labels, plan=plan) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_plans_in_bf16_point_where_float32_does(plan):
    torch.manual_seed(0)
    exact = VNet(5, channels=8, down_convs=(1, 1), up_convs=(1,))
    frugal = copy.deepcopy(exact)
    image, labels = torch.rand(1, 1, 16, 16, 16), torch.randint(5, (1, 16, 16, 16), dtype=torch.uint8)
    step_on(exact, image, labels)
    training = start(frugal, plan=plan)
    training.precision = torch.bfloat16
    training_step(training, image, labels)
    a, b = (torch.cat([p.grad.flatten() for p in network.parameters()]) for network in (exact, frugal))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("plan", PLANS)
def test_step_whose_loss_is_not_finite_is_left_out(plan, bad, scaled):
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    training = start(network, plan=plan, scaled=scaled)
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8), dtype=torch.uint8)
    training_step(training, image, labels)
    before = copy.deepcopy((network.state_dict(), training.optimizer.state_dict()["state"]))
    loss = training_step(training, torch.full_like(image, bad), labels)
    assert not math.isfinite(loss)
    with pytest.raises(NotFiniteError, match=r"^epoch 2, step 3, case x: the loss is nan; a lower "):
        PendingLoss(loss, "epoch 2, step 3, case x").read()
    with pytest.raises(NotFiniteError, match="rate may help, or a loss that bears logits of -inf, which organs that"):
        PendingLoss(loss, "", torch.tensor([[True, True, False]])).read()
    torch.testing.assert_close((network.state_dict(), training.optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    # The next step goes on from there, as if the one that was left out had never been.
    loss = training_step(training, image, labels)
    assert PendingLoss(loss, "").read() == loss.item()
    assert all(state["step"] == 2 for state in training.optimizer.state.values())


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_step_never_waits_for_a_value(plan, norm, scaled, optimizer):
    # These tensors have no values: whatever asks for one, and on a GPU would have to wait for it, raises.
    with FakeTensorMode():
        network = VNet(5, channels=4, down_convs=(1, 2), up_convs=(1,), norm=norm)
        training = start(network, plan=plan, loss="dice_cross_entropy", scaled=scaled)
        training.optimizer = make_optimizer(network, 1e-2, optimizer)
        training.precision = torch.bfloat16
        image, labels = torch.zeros(2, 1, 8, 8, 8), torch.zeros(2, 8, 8, 8, dtype=torch.uint8)
        for _ in range(2):
            value = training_step(training, image, labels)
        for ask in (torch.Tensor.item, bool):
            with pytest.raises(DataDependentOutputException):
                ask(value)


@pytest.mark.parametrize("plan", PLANS)
def test_a_loss_that_is_no_scalar_is_named(plan):
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    training = start(network, loss=lambda logits, _: logits.mean((1, 2, 3, 4)))
    training.plan = plan
    with pytest.raises(ValueError, match=r"^loss: returns a tensor of shape \(2,\), expected a scalar"):
        training_step(training, torch.rand(2, 1, 8, 8, 8), torch.zeros(2, 8, 8, 8, dtype=torch.uint8))


def test_a_loss_on_a_gpu_is_copied_at_once_and_waited_for_when_read(monkeypatch):
    order = []

    class OnGpu:
        """As much of a scalar on a GPU as PendingLoss touches, and of its stream, the event, and the copy."""

        is_cuda, device = True, torch.device("cuda:1")

        def to(self, device: str, non_blocking: bool) -> "OnGpu":
            order.append(f"copy to {device}{' without waiting' * non_blocking}")
            return self

        def record_event(self) -> "OnGpu":
            order.append("record")
            return self

        def synchronize(self) -> None:
            order.append("wait")

        def item(self) -> float:
            order.append("read")
            return 0.5

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: order.append(f"stream of {device}") or OnGpu())
    running = PendingLoss(OnGpu(), "")
    assert order == ["copy to cpu without waiting", "stream of cuda:1", "record"]
    assert running.read() == 0.5
    assert order[3:] == ["wait", "read"]


# ---- Settings of the machine: the same steps -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS)
def test_channels_last_trains_to_the_same_weights(plan, norm):
    torch.manual_seed(0)
    plain = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double()
    last = copy.deepcopy(plain)
    to_channels_last(last)
    image, labels = torch.rand(2, 1, 16, 8, 12, dtype=torch.double), torch.randint(5, (2, 16, 8, 12))
    trainings = [start(network, rate=1e-3, plan=plan) for network in (plain, last)]
    for _ in range(3):
        a, b = (training_step(training, image, labels).item() for training in trainings)
        assert a == pytest.approx(b, rel=1e-9)
    for (name, a), b in zip(plain.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
        if a.ndim == 5:
            assert b.is_contiguous(memory_format=torch.channels_last_3d), name


@pytest.mark.parametrize("norm", ["batch", "group", "none"])  # torch's instance norm lays its channels apart again
def test_channels_last_reaches_the_volumes(norm):
    network = VNet(5, channels=4, down_convs=(1, 2), up_convs=(1,), norm=norm)
    to_channels_last(network)
    image = torch.rand(1, 1, 8, 8, 8)
    results = [features(network, image, torch.float32, keep) for keep in (True, False)]
    for stage in (network.first, *network.down_stages, *network.up_stages):
        stage.register_forward_hook(lambda _, __, output: results.append(output))
    network(image)
    assert len(results) == 2 + 3
    for result in results:
        assert result.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.long  # the compiler takes a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_network_gives_the_same_gradients():
    torch.manual_seed(0)
    plain = VNet(5, channels=4, down_convs=(1, 2), up_convs=(1,))
    compiled = copy.deepcopy(plain)
    compile_network(compiled, CPU)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    image, labels = torch.rand(1, 1, 16, 8, 8), torch.randint(5, (1, 16, 8, 8), dtype=torch.uint8)
    expected = step_on(plain, image, labels, rate=1e-3)
    assert step_on(compiled, image, labels, rate=1e-3) == pytest.approx(expected, rel=1e-5)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-3 * a.grad.norm(), name


@pytest.mark.parametrize("loss", ["dice_cross_entropy", hardest_half])
def test_another_network_is_trained_and_validated_whole(loss):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.PReLU(), nn.Conv3d(4, 3, 1))
    image, labels = torch.rand(2, 1, 8, 6, 5), torch.randint(3, (2, 8, 6, 5), dtype=torch.uint8)
    training = start(network, loss=loss)
    training.accumulation_steps = 2
    before = training_step(training, image, labels).item()
    assert training_step(training, image, labels).item() < before
    network.eval()
    noted = []
    network.register_forward_hook(lambda *_: noted.append(torch.is_grad_enabled()))
    value, predicted = validation_step(training, image, labels)
    assert noted == [False]
    logits = network(image)
    assert value == pytest.approx(training.loss(logits, labels).item(), rel=1e-6)
    assert torch.equal(predicted, logits.argmax(dim=1).to(torch.uint8))


class Backwards(VNet):
    """A V-Net that a researcher changed: the classes in another order."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(1)


def test_a_subclass_of_v_net_is_validated_by_its_own_forward():
    torch.manual_seed(0)
    network = Backwards(3, channels=2, down_convs=(1, 1), up_convs=(1,)).eval()
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8), dtype=torch.uint8)
    _, predicted = validation_step(start(network), image, labels)
    assert torch.equal(predicted, network(image).argmax(dim=1).to(torch.uint8))


class Gate(nn.PReLU):
    """An edit of a layer, which leaves its class and its parameters as they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.sigmoid(x.mean())


class Noisy(nn.PReLU):
    """An edit that draws numbers, in training alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Twice(nn.PReLU):
    """An edit that evaluation alone has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 if self.training else 2)


EDITS = {
    "in training": lambda network: network.first.activations.__setitem__(0, Noisy(2)),
    "in evaluation": lambda network: network.first.activations.__setitem__(0, Twice(2)),
    "forward": lambda network: setattr(network.down_stages[0], "forward", lambda x: x),
    "hook": lambda network: network.first.register_forward_hook(lambda module, inputs, output: 1.5 * output),
    "padding": lambda network: setattr(network.first.convs[0], "padding_mode", "replicate"),
    "activation": lambda network: network.first.activations.__setitem__(0, Gate(2)),
    "another activation": lambda network: network.first.activations.__setitem__(0, nn.LeakyReLU()),
    "head": lambda network: setattr(network, "classify", nn.Sequential(nn.Dropout3d(0.2), network.classify)),
    # The same logits, with other gradients.
    "backward hook": lambda network: network.downs[0].register_full_backward_hook(lambda _, into, out: (2 * into[0],)),
    "detached": lambda network: network.down_stages[0].register_forward_hook(lambda _, into, out: out.detach()),
    "parametrized": lambda network: parametrize.register_parametrization(network.ups[0].conv, "weight", nn.Identity()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_v_net_is_validated_by_its_own_forward(edit):
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    assert is_supported(network)
    assert is_supported(network, training=True)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    EDITS[edit](network)
    state = torch.get_rng_state()
    assert not is_supported(network.eval(), training=True)  # whatever mode it is in
    assert is_supported(network) == (edit in ("backward hook", "detached", "parametrized"))
    assert torch.equal(torch.get_rng_state(), state)
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8), dtype=torch.uint8)
    value, predicted = validation_step(start(network.eval()), image, labels)
    assert torch.equal(predicted, network(image).argmax(dim=1).to(torch.uint8))
    assert value == pytest.approx(LOSSES["cross_entropy"](network(image), labels).item(), rel=1e-6)


def test_a_v_net_edited_to_give_several_outputs_is_no_more_supported():
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    network.forward = lambda x: [x, x]
    assert not is_supported(network)


@pytest.mark.parametrize("plan", PLANS)
def test_the_last_convolution_alone_is_trained_under_every_plan(plan):
    torch.manual_seed(0)
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,)).requires_grad_(False)
    network.classify.requires_grad_(True)
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8), dtype=torch.uint8)
    training = start(network, plan=plan)
    compute_gradients(training, image, labels)
    expected = torch.autograd.grad(LOSSES["cross_entropy"](network(image), labels), network.classify.weight)[0]
    assert torch.allclose(network.classify.weight.grad, expected, atol=1e-6)


def test_a_loss_is_computed_outside_of_mixed_precision():
    """Count voxels by a matrix product: in bf16, which autocast would take, 2047 comes out as 2048."""
    network = nn.Conv3d(1, 3, 1)
    image, labels = torch.rand(1, 1, 23, 89, 1), torch.zeros(1, 23, 89, 1, dtype=torch.uint8)
    counted = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(1, labels.numel())
        counted.append((logits.dtype, (ones @ ones.T).item()))
        return nn.functional.cross_entropy(logits, labels.long())

    training = start(network, loss=loss)
    training.precision = torch.bfloat16
    training_step(training, image, labels)
    validation_step(training, image, labels)
    assert counted == [(torch.float32, 2047.0)] * 2


def test_an_unknown_loss_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="loss: got hinge, expected one of cross_entropy, dice_cross_entropy"):
        loss_named("hinge")


@pytest.mark.parametrize("norm", NORMS)
def test_validation_step_is_the_network_in_slabs(norm, monkeypatch):
    torch.manual_seed(0)
    network = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double()
    image, labels = torch.rand(1, 1, 16, 8, 12, dtype=torch.double), torch.randint(5, (1, 16, 8, 12))
    step_on(network, image, labels)  # gives a batch norm something to note
    training = start(network.eval(), loss="dice_cross_entropy")
    logits = network(image)
    before = copy.deepcopy(network.state_dict())
    monkeypatch.setattr(slabs, "SLAB_BYTES", 20_000)
    loss, predicted = validation_step(training, image, labels.to(torch.uint8))
    assert loss == pytest.approx(training.loss(logits, labels).item(), rel=1e-9)
    assert torch.equal(predicted, logits.argmax(dim=1).to(torch.uint8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_cross_entropy"])
def test_validation_in_patches_is_the_loss_of_the_mean(loss, monkeypatch):
    torch.manual_seed(0)
    network = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1)).eval()
    image, labels = torch.rand(1, 1, 16, 10, 12), torch.randint(3, (1, 16, 10, 12))
    training = replace(start(network, loss=loss), patch_size=(8, 8, 12))
    with torch.no_grad():
        probabilities = InPatches(network, training.patch_size)(image).exp()
    monkeypatch.setattr(slabs, "SLAB_BYTES", 20_000)
    found, predicted = validation_step(training, image, labels.to(torch.uint8))
    assert found == pytest.approx(training.loss(probabilities.log(), labels).item(), rel=1e-5)
    assert torch.equal(predicted, probabilities.argmax(dim=1).to(torch.uint8))

    # Organs 3 and 4 are not annotated: their probabilities count as background's.
    annotated = torch.tensor([[True, True, True, False, False]])
    found, predicted = validation_step(training, image, labels.to(torch.uint8), annotated)
    known = probabilities[:, :3].clone()
    known[:, 0] += probabilities[:, 3:].sum(dim=1)
    expected = training.loss(torch.cat([known, torch.zeros_like(probabilities[:, 3:])], dim=1).log(), labels)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(predicted, probabilities.argmax(dim=1).to(torch.uint8))


def test_a_step_and_a_prediction_do_not_import_torchs_compiler():
    """It takes a second, which torch.library.custom_op would take at its first call."""
    code = (
        "import sys, torch; from core.training.low_memory import features; from vnet import VNet\n"
        "network, image = VNet(5, channels=2, down_convs=(1, 1), up_convs=(1,)), torch.rand(1, 1, 8, 8, 8)\n"
        "features(network, image, torch.float32, True).sin().sum().backward()\n"
        "with torch.inference_mode(): features(network, image, torch.float32, False)\n"
        "assert network.first.norms[0].weight.grad.any()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("keep", [True, False])
def test_features_keep_what_they_say(keep):
    network = VNet(5, channels=8, down_convs=(1, 1), up_convs=(1,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        features(network, torch.rand(1, 1, 16, 16, 16), torch.float32, keep)
    full = {x.data_ptr() for x in kept if x.shape[2:] == (16, 16, 16) and x.shape[1] > 1}
    # Of full size: the first stage's result, the skip; and the outputs of the convolutions when they are kept.
    assert len(full) == (4 if keep else 1)


def test_precision_and_device():
    assert choose_precision("auto", CPU) == torch.float32
    assert choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="precision: got fp16 on a CPU, where it is very slow; expected auto, float32"):
        choose_precision("fp16", CPU)
    with pytest.raises(ValueError, match=r"device: got cuda:99, but torch sees \d+ GPUs"):
        choose_device("cuda:99")


def test_bf16_on_a_cpu_is_refused_where_a_stage_has_wrong_gradients(monkeypatch):
    checked = []

    def infinite_in_small_volumes(x, *given, **named):
        checked.append(tuple(x.shape[2:]))
        gradient = conv3d_weight(x.float(), given[0], given[1].float(), **named)
        wrong = x.dtype == torch.bfloat16 and max(x.shape[2:]) <= 4
        return gradient.index_fill(0, torch.tensor(3), math.inf) if wrong else gradient

    monkeypatch.setattr(devices, "conv3d_weight", infinite_in_small_volumes)
    small = Config(size=[64, 64, 48], precision="bf16")
    with pytest.raises(
        ValueError,
        match="precision: got bf16, in which this CPU's gradients are wrong for 4 x 4 x 3 voxels, where an input of "
        "64 64 48 voxels leads; expected auto or float32, or a larger size or patch_size",
    ):
        training_precision(small, CPU)
    assert set(checked) == {(16, 16, 12), (8, 8, 6), (4, 4, 3)}
    shallow = replace(small, down_convs=[1, 2, 3, 3], up_convs=[3, 2, 1])
    with pytest.raises(ValueError, match="4 x 4 x 3 voxels, where an input of 64 64 48 voxels leads"):
        training_precision(replace(small, size=[96, 96, 64], patch_size=[64, 64, 48]), CPU)
    for right in (shallow, Config(size=[96, 96, 64], precision="bf16"), Config(precision="bf16")):
        assert training_precision(right, CPU) == torch.bfloat16
    assert training_precision(replace(small, precision="auto"), CPU) == torch.float32
    assert choose_precision("bf16", CPU) == torch.bfloat16  # infer.py has no gradients


@pytest.mark.parametrize("size", [(2, 2, 2), (3, 3, 2), (4, 4, 3), (4, 4, 4), (5, 5, 4), (6, 6, 4), (8, 8, 8)])
def test_the_gradients_of_this_cpu_in_bf16_are_judged_rightly(size):
    torch.manual_seed(1)
    conv = torch.nn.Conv3d(48, 48, 5, padding=2, bias=False)
    x = torch.randn(1, 48, *size)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
    # The sum's gradient is 1 everywhere: the middle of each kernel gets the sum of its input channel.
    sums = x.bfloat16().float().sum((0, 2, 3, 4)).expand(48, 48)
    wrong = ((conv.weight.grad[:, :, 2, 2, 2] - sums).norm() / sums.norm()).nan_to_num(math.inf).item()
    assert has_right_gradients(torch.bfloat16, size) == (wrong < 0.02)
    assert has_right_gradients(torch.float32, size)


@pytest.fixture
def card(monkeypatch):
    """Make torch see one made-up card, with the capability, kernels, cuDNN and bf16 that the test gives."""

    def make(capability=(9, 0), built=("sm_80", "sm_90"), cudnn=92000, bf16=True):
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return make


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_card_becomes_the_current_one_and_computes_float32_in_full(card, name, index):
    chosen = card()
    assert choose_device(name) == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]
    assert torch.backends.cudnn.allow_tf32 is False
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ("sm_75", "sm_80", "sm_90"), True),  # of the same generation
        ((6, 1), ("sm_75", "sm_80", "sm_90"), False),
        ((12, 0), ("sm_80", "sm_90"), False),
        ((12, 0), ("sm_80", "sm_90", "compute_90"), True),  # translated when it starts
        ((10, 3), ("sm_100", "sm_120"), True),
        ((9, 0), (), True),  # a build that does not say
    ],
)
def test_a_card_without_kernels_is_refused_in_one_sentence(card, capability, built, runs):
    card(capability, built)
    if runs:
        choose_device("cuda")
    else:
        has = ".".join(map(str, capability))
        with pytest.raises(ValueError, match=rf"device: Card has compute capability {has}, but this torch .* sm_90"):
            choose_device("cuda")


@pytest.mark.parametrize(("cudnn", "used"), [(90701, True), (90800, False), (91499, False), (91500, True)])
def test_a_cudnn_that_torch_leaves_out_is_refused_with_the_command_that_helps(card, cudnn, used):
    card(cudnn=cudnn)
    assert choose_precision("float32", torch.device("cuda:0")) == torch.float32
    for precision in ("auto", "bf16", "fp16"):
        if used:
            choose_precision(precision, torch.device("cuda:0"))
        else:
            with pytest.raises(ValueError, match=r"with cuDNN 9\.\d+\.\d+; .*pip install --upgrade 'nvidia-"):
                choose_precision(precision, torch.device("cuda:0"))


def test_bf16_is_refused_on_a_card_without_it(card):
    card(capability=(7, 5), bf16=False)
    assert choose_precision("auto", torch.device("cuda:0")) == torch.float16
    with pytest.raises(ValueError, match="precision: got bf16, which Card lacks; expected auto or fp16"):
        choose_precision("bf16", torch.device("cuda:0"))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_clipping_shortens_the_gradient_and_keeps_its_direction(plan, scaled):
    torch.manual_seed(0)
    network = VNet(classes=3, channels=2, down_convs=(1, 1), up_convs=(1,))
    image, labels = torch.rand(1, 1, 8, 8, 8), torch.randint(3, (1, 8, 8, 8))
    found = []
    for max_grad_norm in (1e9, 1e-3):  # the first shortens nothing, but takes the scaler's factor out
        training = start(copy.deepcopy(network), plan=plan, scaled=scaled)
        training.max_grad_norm = max_grad_norm
        training_step(training, image, labels)
        found.append(torch.cat([p.grad.flatten() for p in training.network.parameters()]))
    whole, clipped = found
    assert whole.norm() > 1e-2
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(clipped, whole * (1e-3 / whole.norm()), rtol=1e-3, atol=1e-9)


def test_pairs_are_counted_the_same_on_any_device():
    torch.manual_seed(0)
    labels, predicted = (torch.randint(0, 5, (2, 7, 6, 5), dtype=torch.uint8) for _ in range(2))
    expected = np.zeros((5, 5), int)
    np.add.at(expected, (labels.numpy(), predicted.numpy()), 1)
    assert np.array_equal(count_pairs(labels, predicted, 5), expected)

    class Elsewhere(torch.Tensor):
        """Says that it is on a GPU."""

        device = torch.device("cuda")

    assert np.array_equal(count_pairs(labels.as_subclass(Elsewhere), predicted, 5), expected)
