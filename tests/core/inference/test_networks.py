"""Several networks predict the mean of their probabilities; the precision suits the device."""

import math

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from core.inference.networks import choose_inference_precision, mean_logits, predict_logits
from core.training import convolutions
from core.training.low_memory import is_supported
from vnet import NORMS, VNet


def logits_of(*probabilities: float) -> torch.Tensor:
    """Return logits, (K, 1, 1, 1), whose softmax gives these probabilities, shifted by a constant."""
    return torch.tensor([math.log(p) + 7 for p in probabilities]).view(-1, 1, 1, 1)


def test_the_probabilities_are_averaged_not_the_logits():
    each = [logits_of(0.90, 0.09, 0.01), logits_of(0.2, 0.5, 0.3), logits_of(0.1, 0.1, 0.8)]
    found = mean_logits(iter(each), 3).softmax(dim=0).flatten()
    torch.testing.assert_close(found, torch.tensor([1.2 / 3, 0.69 / 3, 1.11 / 3]))


def test_a_probability_of_zero_in_all_networks_stays_finite():
    logits = torch.tensor([200.0, -200.0]).view(2, 1, 1, 1)
    found = mean_logits([logits, logits.clone()], 2)
    assert found.isfinite().all()
    torch.testing.assert_close(found.softmax(dim=0).flatten(), torch.tensor([1.0, 0.0]))


def test_the_logits_of_one_network_are_left_as_they_are():
    logits = torch.randn(3, 2, 2, 2)
    assert mean_logits(iter([logits]), 1) is logits


@pytest.mark.parametrize(
    ("name", "trained_in", "device", "expected"),
    [
        ("auto", "auto", "cpu", torch.float32),
        ("auto", "bf16", "cpu", torch.float32),
        ("float32", "bf16", "cpu", torch.float32),
        ("bf16", "float32", "cpu", torch.bfloat16),
        ("auto", "float32", "cuda", torch.float32),
        ("auto", "fp16", "cuda", torch.float16),
        ("auto", "bf16", "cuda", torch.bfloat16),
        ("bf16", "fp16", "cuda", torch.bfloat16),
        ("float32", "bf16", "cuda", torch.float32),
    ],
)
def test_precision_is_the_one_asked_for_or_that_of_the_training(monkeypatch, name, trained_in, device, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert choose_inference_precision(name, trained_in, torch.device(device)) == expected


def test_a_network_trained_in_bf16_runs_in_fp16_on_a_card_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert choose_inference_precision("auto", "bf16", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("norm", NORMS)
def test_logits_in_slabs_are_those_of_the_network(monkeypatch, norm):
    torch.manual_seed(0)
    network = VNet(classes=5, channels=4, down_convs=(1, 2, 2), up_convs=(2, 1), norm=norm).double().eval()
    image = torch.rand(1, 1, 28, 12, 8, dtype=torch.float64)
    monkeypatch.setattr("core.training.slabs.SLAB_BYTES", 4 * 5 * 12 * 8 * 5)  # 5 of the 28 planes at a time
    monkeypatch.setattr(convolutions, "SLAB_BYTES", 8 * 4 * 12 * 8 * 3)  # 3 planes of 4 channels, and so on
    planes, convolve = set(), convolutions.convolve
    monkeypatch.setattr(convolutions, "convolve", lambda conv, x, *a: planes.add(x.shape[2]) or convolve(conv, x, *a))
    with torch.inference_mode():
        expected, found = network(image), predict_logits(network, image, torch.float64)
    assert found.shape == (1, 5, 28, 12, 8)
    torch.testing.assert_close(found, expected.float())
    assert max(planes) < 28  # nothing was convolved whole


def test_v_net_predicts_in_less_memory_than_layer_by_layer(monkeypatch):
    monkeypatch.setattr(convolutions, "SLAB_BYTES", 2**18)
    monkeypatch.setattr("core.training.activation.PIECE_VOXELS", 2**15)
    network, image = VNet(classes=5, channels=4).eval(), torch.rand(1, 1, 64, 64, 32)
    volume = 8 * image.numel() * 4  # bytes of the last stage's 8 channels
    peaks = []
    with torch.inference_mode():
        predict_logits(network, image, torch.float32)  # compares first whether it may
        for predict in (network, lambda image: predict_logits(network, image, torch.float32)):
            with MemTracker() as tracker:
                tracker.track_external(network)
                before = tracker.get_tracker_snapshot()[torch.device("cpu")]["Total"]
                predict(image)
            peaks.append(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before)
    # The stage's input, what it learns to add, their norm and their sum; or the input and the sum alone.
    assert peaks[0] > 3.5 * volume
    assert peaks[1] < 2.8 * volume


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(3, 2, 5, padding=2),
        nn.Conv3d(3, 2, 5, padding="same"),
        nn.Conv3d(3, 2, 3, padding=1),
        nn.Conv3d(3, 2, 2, stride=2),
        nn.Conv3d(3, 2, 3, stride=2, padding=1),
        nn.Conv3d(3, 2, 5, stride=2, padding=2),
        nn.Conv3d(3, 2, 3),
        nn.ConvTranspose3d(3, 2, 2, stride=2),
        nn.ConvTranspose3d(3, 2, 4, stride=2, padding=1),
        nn.ConvTranspose3d(3, 2, 3, padding=1),
    ],
)
@pytest.mark.parametrize("planes", [1, 2, 3, 4, 22])
@torch.no_grad()
def test_a_convolution_in_slabs_is_the_whole_one(monkeypatch, conv, planes):
    x = torch.randn(2, 3, 22, 6, 8)
    monkeypatch.setattr(convolutions, "SLAB_BYTES", x[:, :, :planes].numel() * 4)
    torch.testing.assert_close(convolutions.convolve_in_slabs(conv, x), conv(x), rtol=1e-5, atol=1e-5)


def test_v_net_with_one_slope_for_all_channels_is_predicted_in_pieces(monkeypatch):
    network = VNet(classes=3, channels=4, down_convs=(1, 1), up_convs=(1,))
    for stage in (network.first, *network.downs, *network.down_stages, *network.ups, *network.up_stages):
        if hasattr(stage, "activation"):
            stage.activation = nn.PReLU(init=0.5)
        else:
            stage.activations = nn.ModuleList(nn.PReLU(init=0.1) for _ in stage.activations)
    assert is_supported(network)  # found with a volume that is one piece
    monkeypatch.setattr("core.training.activation.PIECE_VOXELS", 100)
    image = torch.rand(1, 1, 12, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(predict_logits(network.eval(), image, torch.float32), network(image))


def test_a_size_that_does_not_fit_is_refused():
    network = VNet(classes=3, channels=2, down_convs=(1, 2, 2), up_convs=(2, 1)).eval()
    with torch.inference_mode():
        for size, words in (((10, 8, 8), "expected multiples of 4"), ((4, 4, 4), "a single voxel at the bottom")):
            with pytest.raises(ValueError, match=words):
                predict_logits(network, torch.rand(1, 1, *size), torch.float32)
