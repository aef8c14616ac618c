"""Predict with one network or with several: their precision, and the mean of their probabilities."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from core.training.convolutions import convolve
from core.training.device import autocast, choose_precision
from core.training.low_memory import features, is_supported
from core.training.slabs import slabs_along_x
from vnet import VNet


def choose_inference_precision(name: str, trained_in: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions are computed in; "auto" is float32 on a CPU, the training's setting on a GPU.

    Raises:
        ValueError: when the device does not compute in what was asked for.
    """
    if name == "auto" and device.type != "cpu" and trained_in != "bf16":
        name = trained_in  # a network that was trained in bf16 runs in fp16 on a card without bf16
    return choose_precision(name, device)


def predict_logits(network: nn.Module, image: Tensor, precision: torch.dtype) -> Tensor:
    """Return a network's logits, (1, K, X, Y, Z) float32, for an image (1, 1, X, Y, Z) float32 in 0..1.

    V-Net runs unit by unit and is classified slab by slab, which takes less memory: on a CPU 3.4 GiB instead of 5.2 at
    the default size in float32.
    """
    if is_supported(network):
        return logits_in_slabs(network, image, precision)
    with autocast(image.device, precision):
        return network(image).float()


def logits_in_slabs(network: VNet, image: Tensor, precision: torch.dtype) -> Tensor:
    """Return the same as `predict_logits`, computed unit by unit and slab by slab."""
    h = features(network, image, precision, keep=False)
    logits = torch.empty(1, network.classify.out_channels, *image.shape[2:], device=image.device)
    for slab in slabs_along_x(network.classify, h):
        logits[:, :, slab] = convolve(network.classify, h[:, :, slab])
    return logits


def mean_logits(logits_of_each: Iterable[Tensor], networks: int) -> Tensor:
    """Return logits, (K, X, Y, Z) float32, whose softmax is the mean of the networks' probabilities.

    Args:
        logits_of_each: the logits of each network, (K, X, Y, Z) float32, computed one after the other.
        networks: how many networks there are; the logits of a single one are returned as they are.
    """
    total = None
    for logits in logits_of_each:
        if networks == 1:
            return logits
        probabilities = logits.softmax(dim=0)
        total = probabilities if total is None else total.add_(probabilities)
        del logits, probabilities  # while the next network runs, only the total is in memory
    # The softmax of the logarithms of probabilities is these probabilities.
    return total.div_(networks).clamp_(min=torch.finfo(torch.float32).tiny).log_()
