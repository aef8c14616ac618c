"""One training step: the losses, the arithmetic it runs in, and the step itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet import VNet

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite, so that training on would destroy the weights."""


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one.

    Raises:
        ValueError: when it is a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name}, but torch sees {torch.cuda.device_count()} GPUs; expected auto or cpu")
    return device


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions are computed in; float32 means no mixed precision.

    Raises:
        ValueError: when the device cannot train in what was asked for.
    """
    if device.type == "cpu":
        # With torch 2.13 the 5x5x5 convolutions of the deepest stage get gradients that are not finite.
        if precision not in ("auto", "float32"):
            raise ValueError(f"precision: got {precision} on a CPU, expected auto or float32: training fails otherwise")
        return torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return DTYPES[precision]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which the network runs: mixed precision, or none for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def choose_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of that name: a function of logits (B, K, X, Y, Z) and labels (B, X, Y, Z) int64."""
    return {"cross_entropy": F.cross_entropy, "dice_cross_entropy": dice_cross_entropy}[name]


def dice_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of both losses: cross-entropy moves every voxel, Dice gives small organs their weight."""
    return F.cross_entropy(logits, labels) + dice_loss(logits, labels)


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - soft Dice as the V-Net paper has it (section 3), the mean over the organs that occur in each sample.

    D = 2 sum(p g) / (sum p^2 + sum g^2) over the voxels, for each organ; the background is left out. The squares
    matter: with plain sums below the line, small organs start to be found about twice as late (RESULTS.md).

    Args:
        logits: (B, K, X, Y, Z).
        labels: (B, X, Y, Z) int64 below K.

    Returns:
        a scalar in 0..1; 0 when no sample has any organ.
    """
    probabilities = logits.float().softmax(dim=1).flatten(2)  # (B, K, N)
    ids = labels.flatten(1)  # (B, N)
    # Sums per organ without a one-hot volume: each voxel adds to its own label's sum.
    own = probabilities.gather(1, ids[:, None])[:, 0]
    empty = own.new_zeros(probabilities.shape[:2])  # (B, K)
    shared = empty.scatter_add(1, ids, own)
    in_labels = empty.scatter_add(1, ids, torch.ones_like(own))
    # An organ that is there has at least one voxel; for one that is not, 0 / 0 must not come out.
    dice = 2 * shared / (probabilities.square().sum(dim=2) + in_labels).clamp(min=1)
    present = in_labels[:, 1:] > 0
    return ((1 - dice[:, 1:]) * present).sum() / present.sum().clamp(min=1)


def training_step(
    network: VNet | nn.Module,
    image: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
) -> float:
    """Change the network's weights once, for one batch.

    Args:
        network: in training mode.
        image: (B, 1, X, Y, Z) float32 in 0..1.
        labels: (B, X, Y, Z) int64.
        loss_of: from `choose_loss`.
        optimizer: of the network's parameters.
        scaler: enabled for fp16 alone, whose small gradients would vanish otherwise.
        precision: from `choose_precision`.

    Returns:
        the loss before the change.

    Raises:
        NotFiniteError: when the loss is NaN or infinite; no weight has changed then.
    """
    optimizer.zero_grad(set_to_none=True)
    with autocast(image.device, precision):
        logits = network(image)  # (B, K, X, Y, Z)
        loss = loss_of(logits, labels)
    if not torch.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss.item()}")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.item()
