"""The losses by hand, and what one training step may and may not change."""

import math

import pytest
import torch
from torch import nn

from core.step import (
    NotFiniteError,
    autocast,
    choose_device,
    choose_loss,
    choose_precision,
    dice_cross_entropy,
    dice_loss,
    training_step,
)
from vnet import VNet

CPU = torch.device("cpu")


def sharp_logits(labels: torch.Tensor, classes: int, sureness: float = 50.0) -> torch.Tensor:
    return sureness * nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def step_on(network: nn.Module, image: torch.Tensor, labels: torch.Tensor, rate: float = 1e-2) -> float:
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return training_step(network, image, labels, choose_loss("cross_entropy"), optimizer, scaler, torch.float32)


def test_dice_loss_by_hand():
    # Four voxels, three classes. Organ 1: p = .5 .25 on its two voxels, .25 on another; organ 2 is absent.
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
    logits = probabilities.clamp(min=1e-30).log().T.reshape(1, 3, 4, 1, 1)
    labels = torch.tensor([1, 1, 0, 0]).reshape(1, 4, 1, 1)
    # 2 * (1/2 + 1/4) / ((1/4 + 1/16 + 1/16) + 2) = 12/19
    assert dice_loss(logits, labels).item() == pytest.approx(1 - 12 / 19, abs=1e-6)


def test_dice_loss_is_the_mean_over_organs_that_occur():
    labels = torch.tensor([[1, 1, 0, 0], [2, 0, 0, 0]]).reshape(2, 4, 1, 1)
    right = sharp_logits(labels, 4)
    assert dice_loss(right, labels).item() == pytest.approx(0, abs=1e-6)
    half = right.clone()
    half[1] = sharp_logits(torch.zeros(1, 4, 1, 1, dtype=torch.long), 4)[0]  # the second sample's organ is missed
    assert dice_loss(half, labels).item() == pytest.approx(0.5, abs=1e-6)


def test_dice_loss_without_organs_is_zero_and_has_a_gradient():
    logits = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    loss = dice_loss(logits, torch.zeros(1, 2, 2, 2, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(logits.grad).all()


def test_dice_cross_entropy_is_their_sum():
    logits, labels = torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.long)
    # Every class has 1/4: cross-entropy ln 4; Dice of organ 1 is 2 * 8/4 / (8/16 + 8) = 8/17.
    assert dice_cross_entropy(logits, labels).item() == pytest.approx(math.log(4) + 9 / 17, abs=1e-6)


def test_cross_entropy_counts_every_voxel_alike():
    logits = torch.zeros(1, 4, 2, 2, 2)
    labels = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    assert choose_loss("cross_entropy")(logits, labels).item() == pytest.approx(math.log(4), abs=1e-6)


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


def test_loss_that_is_not_finite_stops_before_any_weight_changes():
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        step_on(network, torch.full((1, 1, 8, 8, 8), float("nan")), torch.zeros(1, 8, 8, 8, dtype=torch.long))
    for old, new in zip(before, network.parameters(), strict=True):
        assert torch.equal(old, new)


def test_mixed_precision_runs_convolutions_in_bf16_and_the_loss_in_float32():
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    with autocast(CPU, torch.bfloat16):
        logits = network(torch.rand(1, 1, 8, 8, 8))
        loss = choose_loss("dice_cross_entropy")(logits, torch.zeros(1, 8, 8, 8, dtype=torch.long))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


def test_precision_and_device():
    assert choose_precision("auto", CPU) == torch.float32
    assert choose_device("cpu") == CPU
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"precision: got {precision} on a CPU, expected auto or float32"):
            choose_precision(precision, CPU)
    with pytest.raises(ValueError, match=r"device: got cuda:99, but torch sees \d+ GPUs"):
        choose_device("cuda:99")
