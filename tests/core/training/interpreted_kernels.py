"""The GPU kernels interpreted by Triton on a CPU; test_kernels.py runs this file with TRITON_INTERPRET=1."""

import copy

import pytest
import torch

from core.training import activation, kernels
from core.training.losses import LOSSES
from core.training.setup import Training, make_optimizer
from core.training.step import compute_gradients
from vnet import NORMS, VNet

CPU = torch.device("cpu")
OPERATIONS = ("moments", "write_activated", "sums_backward", "input_backward")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forget_what_works():
    kernels.works.cache_clear()
    kernels.warn_once.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compute_what_plain_torch_does(dtype):
    found, expected = (kernels.all_results(of, CPU, dtype) for of in zip(*kernels.PLAIN.items(), strict=True))
    assert len(found) == len(expected) == 1 + 3 * 4
    near = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)
    assert kernels.works(CPU, dtype)


@pytest.mark.parametrize("number", range(4))
def test_a_kernel_that_is_wrong_is_found_out(monkeypatch, capsys, number):
    right = list(kernels.PLAIN)[number]

    def wrong(*given):
        """Be a thousandth too large in the second case."""
        result = right(*given)
        changed = given[{1: 4, 3: 0}[number]] if result is None else result.transpose(0, 1)
        changed[1] *= 1.001
        return result

    monkeypatch.setattr(kernels, "PLAIN", {wrong if of is right else of: what for of, what in kernels.PLAIN.items()})
    assert not kernels.works(CPU, torch.float32)
    assert "without Triton, which takes more time (its kernels compute otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("norm", NORMS)
def test_a_network_has_the_gradients_of_the_plain_step(monkeypatch, norm):
    monkeypatch.setattr(kernels, "TILE", 512)  # so that the volume has several tiles
    torch.manual_seed(0)
    plain = VNet(5, channels=3, down_convs=(1, 2), up_convs=(1,), norm=norm).double()
    other = copy.deepcopy(plain)
    image, labels = torch.rand(2, 1, 12, 8, 10, dtype=torch.float64), torch.randint(5, (2, 12, 8, 10))
    losses = []
    for network, plan in ((plain, "off"), (other, "low")):
        scaler, optimizer = torch.amp.GradScaler("cpu", enabled=False), make_optimizer(network, 1e-3)
        training = Training(network, LOSSES["cross_entropy"], optimizer, scaler, torch.float64, plan=plan)
        losses.append(compute_gradients(training, image, labels).item())
        for operation in OPERATIONS:
            monkeypatch.setattr(activation, operation, getattr(kernels, operation))
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * a.grad.norm(), name
