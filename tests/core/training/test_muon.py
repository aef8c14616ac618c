"""Muon: its step worked out with the singular value decomposition, what it leaves out, and what it keeps."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from core.training.muon import Muon, orthogonalise
from core.training.setup import make_optimizer
from vnet import VNet


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return VNet(3, channels=2, down_convs=(1, 1), up_convs=(1,))


def give_gradients(network: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("shape", [(4, 50), (50, 4), (6, 6)])
def test_singular_values_come_close_to_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(*shape) @ torch.diag(torch.linspace(0.2, 1, shape[1])) * 1e-3
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.65
    assert values.max() < 1.25
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    between = u.T @ result @ v.T  # the singular vectors are the matrix's own: nothing off the diagonal
    assert (between - torch.diag(between.diagonal())).abs().max() < 0.05
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(16, 1000), (60, 30)])
def test_it_is_the_iteration_on_singular_values(shape):
    """The same polynomial of the singular values themselves, in float64, from 1 down to 0.0001."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), dtype=torch.double))[0] for n in shape)
    values = torch.logspace(0, -4, min(shape), dtype=torch.double)
    matrix = (u * values) @ v.T
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    expected = (u * values) @ v.T
    assert (orthogonalise(matrix.float()) - expected).norm() < 1e-3 * expected.norm()


def test_the_step_of_hidden_convolutions_is_the_learning_rate_and_others_are_adams():
    network = small_network()
    twin = copy.deepcopy(network)
    muon, adam = make_optimizer(network, 0.01, "muon"), make_optimizer(twin, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for each in (network, twin):
        give_gradients(each, 1)
    muon.step()
    adam.step()
    hidden = {"down_stages.0.convs.0.weight", "up_stages.0.convs.0.weight", "downs.0.conv.weight"}
    assert hidden < before.keys()
    for (name, parameter), (_, of_adam) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        change = parameter.detach() - before[name]
        if name in hidden:
            # All singular values are about 1, so the mean square of an (M, N) matrix is min(M, N) / (M N).
            assert 0.7 < change.square().mean().sqrt() / 0.01 < 1.2
            u, _, v = np.linalg.svd(parameter.grad.flatten(1).numpy(), full_matrices=False)
            along = (change.flatten(1).numpy() * (u @ v)).sum() / np.linalg.norm(change) / np.linalg.norm(u @ v)
            assert along < -0.97
        else:
            assert torch.equal(parameter, of_adam)


def test_two_steps_by_hand_and_a_frozen_weight_stays():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 3, (3, 1, 1), bias=False), nn.Conv3d(3, 2, 2)).double()
    network[1].requires_grad_(False)
    weight, frozen = (layer.weight for layer in network)
    start, kept = weight.detach().clone(), frozen.detach().clone()
    optimizer = Muon(network, 0.1)
    first, second = torch.randn(2, *weight.shape, dtype=torch.double)
    for gradient in (first, second):
        weight.grad = gradient
        optimizer.step()
    # The momentum is 0.05 a, then 0.95 * 0.05 a + 0.05 b; a step looks ahead: 0.05 of its gradient and 0.95 of that.
    ahead = (0.05 + 0.95 * 0.05) * first, 0.05 * second + 0.95 * (0.95 * 0.05 * first + 0.05 * second)
    expected = start - 0.1 * 6**0.5 * sum(by_singular_values(each.flatten(1)).view_as(start) for each in ahead)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)  # (M, N) = (3, 6)
    assert torch.equal(frozen, kept)


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """Return Muon's direction of a matrix, by its polynomial of the singular values."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return (u * values) @ v


def test_a_shared_weight_makes_one_step():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(4, 4, 3), nn.Conv3d(4, 4, 3))
    network[1].weight = network[0].weight
    optimizer = Muon(network, 1e-3)
    before = network[0].weight.detach().clone()
    give_gradients(network, 1)
    optimizer.step()
    assert (network[0].weight - before).square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.3)


def test_a_step_that_is_not_finite_changes_nothing():
    network = small_network()
    optimizer = make_optimizer(network, 0.01, "muon")
    give_gradients(network, 1)
    optimizer.step()
    kept = copy.deepcopy((network.state_dict(), optimizer.state_dict()["state"]))
    for parameter in network.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for one, other in zip(kept[0].values(), network.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, kept[1][number][name])


def test_the_scale_of_fp16_makes_no_difference():
    networks = [small_network(), small_network()]
    optimizers = [make_optimizer(network, 0.01, "muon") for network in networks]
    for scale in (1024.0, 512.0):
        for network, optimizer, by in zip(networks, optimizers, (1.0, scale), strict=True):
            give_gradients(network, int(scale))  # another one in each step: the momentum of one alone has no scale
            for parameter in network.parameters():
                parameter.grad *= by
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(by), torch.zeros(())
            optimizer.step()
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_its_state_is_loaded_and_smaller_than_adams():
    network = small_network()
    optimizer = make_optimizer(network, 0.01, "muon")
    give_gradients(network, 1)
    optimizer.step()
    twin = copy.deepcopy(network)
    again = make_optimizer(twin, 0.5, "muon")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((network, optimizer), (twin, again)):
        give_gradients(each, 2)
        its.step()
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), twin.parameters(), strict=True))
    size = {name: state_size(make_optimizer(small_network(), 0.01, name)) for name in ("adam", "muon")}
    assert size["muon"] < 0.6 * size["adam"]


def state_size(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.numel() for state in optimizer.state.values() for value in state.values())


def test_a_network_without_hidden_convolutions_has_adam():
    network = nn.Sequential(nn.Conv3d(1, 2, 3), nn.PReLU(), nn.Conv3d(2, 3, 1))
    twin = copy.deepcopy(network)
    assert Muon(network, 0.1).param_groups[1]["params"] == []
    optimizers = make_optimizer(network, 0.01, "muon"), make_optimizer(twin, 0.01)
    for each, optimizer in zip((network, twin), optimizers, strict=True):
        give_gradients(each, 1)
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), twin.parameters(), strict=True))
