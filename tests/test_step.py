"""The losses by hand, and what one training step may and may not change."""

import copy
import math

import pytest
import torch
from torch import nn

from core import step
from core.recompute import features
from core.step import (
    PLANS,
    Loss,
    NotFiniteError,
    Training,
    autocast,
    choose_device,
    choose_precision,
    training_step,
    validation_step,
)
from vnet import NORMS, VNet

CPU = torch.device("cpu")


def sharp_logits(labels: torch.Tensor, classes: int, sureness: float = 50.0) -> torch.Tensor:
    return sureness * nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


def start(network: VNet, rate: float = 1e-2, plan: str = "off", loss: str = "cross_entropy") -> Training:
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Training(network, Loss(loss), optimizer, scaler, next(network.parameters()).dtype, plan)


def step_on(network: VNet, image: torch.Tensor, labels: torch.Tensor, rate: float = 1e-2, **settings: str) -> float:
    return training_step(start(network, rate, **settings), image, labels)


def dice_part(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (Loss("dice_cross_entropy")(logits, labels) - Loss("cross_entropy")(logits, labels)).item()


# ---- Losses ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_is_torchs_own():
    logits, labels = torch.randn(2, 5, 4, 3, 6), torch.randint(5, (2, 4, 3, 6))
    expected = nn.functional.cross_entropy(logits, labels).item()
    assert Loss("cross_entropy")(logits, labels.to(torch.uint8)).item() == pytest.approx(expected, rel=1e-6)


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


def test_dice_loss_without_organs_is_zero_and_has_a_gradient():
    logits = torch.zeros(1, 3, 2, 2, 2, requires_grad=True)
    labels = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    loss = Loss("dice_cross_entropy")(logits, labels)
    loss.backward()
    assert dice_part(logits.detach(), labels) == 0
    assert torch.isfinite(logits.grad).all()


def test_dice_cross_entropy_is_their_sum():
    logits, labels = torch.zeros(1, 4, 2, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.long)
    # Every class has 1/4: cross-entropy ln 4; Dice of organ 1 is 2 * 8/4 / (8/16 + 8) = 8/17.
    assert Loss("dice_cross_entropy")(logits, labels).item() == pytest.approx(math.log(4) + 9 / 17, abs=1e-6)


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
        loss = Loss("dice_cross_entropy")(logits, torch.zeros(1, 8, 8, 8, dtype=torch.long))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


# ---- Memory plans: other ways to the same gradients ------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "dice_cross_entropy"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("plan", PLANS[1:])
def test_plans_give_the_gradients_of_the_plain_step(plan, norm, loss, monkeypatch):
    torch.manual_seed(0)
    plain = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double()
    frugal = copy.deepcopy(plain)
    image = torch.rand(2, 1, 16, 8, 12, dtype=torch.double)
    labels = torch.randint(5, (2, 16, 8, 12), dtype=torch.uint8)
    expected = step_on(plain, image, labels, rate=1e-3, loss=loss)
    # Small enough that a slab is thinner than the volume, and a piece has fewer channels.
    monkeypatch.setattr(step, "SLAB_BYTES", 20_000)
    monkeypatch.setattr("core.recompute.PIECE_BYTES", 20_000)
    monkeypatch.setattr("core.recompute.PART_BYTES", 50_000)
    found = step_on(frugal, image, labels, rate=1e-3, loss=loss, plan=plan)
    assert found == pytest.approx(expected, rel=1e-9)
    for (name, a), b in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * a.grad.norm(), name
    for a, b in zip(plain.buffers(), frugal.buffers(), strict=True):  # running statistics, updated once
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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


@pytest.mark.parametrize("plan", PLANS)
def test_loss_that_is_not_finite_stops_every_plan_before_any_weight_changes(plan):
    network = VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))
    before = copy.deepcopy(network.state_dict())
    image = torch.full((1, 1, 8, 8, 8), float("nan"))
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        step_on(network, image, torch.zeros(1, 8, 8, 8, dtype=torch.uint8), plan=plan)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_validation_step_is_the_network_in_slabs(norm, monkeypatch):
    torch.manual_seed(0)
    network = VNet(5, channels=3, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double()
    image, labels = torch.rand(1, 1, 16, 8, 12, dtype=torch.double), torch.randint(5, (1, 16, 8, 12))
    step_on(network, image, labels)  # gives a batch norm something to note
    training = start(network.eval(), loss="dice_cross_entropy")
    logits = network(image)
    before = copy.deepcopy(network.state_dict())
    monkeypatch.setattr(step, "SLAB_BYTES", 20_000)
    loss, predicted = validation_step(training, image, labels.to(torch.uint8))
    assert loss == pytest.approx(training.loss(logits, labels).item(), rel=1e-9)
    assert torch.equal(predicted, logits.argmax(dim=1).to(torch.uint8))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


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
    for precision in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"precision: got {precision} on a CPU, expected auto or float32"):
            choose_precision(precision, CPU)
    with pytest.raises(ValueError, match=r"device: got cuda:99, but torch sees \d+ GPUs"):
        choose_device("cuda:99")
