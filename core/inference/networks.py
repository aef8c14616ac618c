"""Predict with one network or with several: their precision, and the mean of their probabilities."""

from collections.abc import Iterable

import torch
from torch import Tensor

from core.training.setup import choose_precision


def choose_inference_precision(name: str, trained_in: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions are computed in; "auto" is float32 on a CPU, the training's setting on a GPU.

    Raises:
        ValueError: for fp16 on a CPU.
    """
    if device.type != "cpu":
        return choose_precision(trained_in if name == "auto" else name, device)
    if name == "fp16":
        # Hundreds of times the seconds of float32, on a processor that has bf16 (RESULTS.md).
        raise ValueError("--precision: got fp16 on a CPU, where it is very slow; expected auto, float32 or bf16")
    return torch.bfloat16 if name == "bf16" else torch.float32


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
