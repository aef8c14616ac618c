"""Compute the last convolution and the loss slab by slab along X, so that the K-class logits never exist whole."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from core.training.convolutions import convolve
from core.training.losses import Loss, SlabLoss, check_scalar, in_full_precision

SLAB_BYTES = 32 * 2**20  # of float32 logits that exist at a time


def backward_in_slabs(
    classify: nn.Conv3d,
    loss: Loss,
    h: Tensor,
    labels: Tensor,
    on_loss: Callable[[Tensor], None],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the loss of the logits that `classify` gives for `h`, and overwrite `h` by the gradient.

    The loss depends on sums over all voxels: a first pass computes the sums, and from them the derivative of the loss
    by each sum; a second pass computes the gradient of each slab.

    Args:
        classify: the network's last convolution; gradients are added to its parameters.
        loss: a `SlabLoss`, or any other one, which gets the whole volume as its only slab.
        h: (B, C, X, Y, Z), the features before `classify`; overwritten.
        labels: (B, X, Y, Z).
        on_loss: is called with the loss before the backward pass.
        scale: is applied to the loss before the backward pass (share of the batch, loss scaling of fp16).
    """
    slab_loss, slabs = in_slabs(classify, loss, h)
    with torch.no_grad():
        parts = [slab_loss.sums(logits_of(classify, h[:, :, slab]), labels[:, slab]) for slab in slabs]
    sums = [torch.stack(part).sum(dim=0).requires_grad_() for part in zip(*parts, strict=True)]
    value = check_scalar(slab_loss.from_sums(sums, labels.numel()))
    on_loss(value)
    slopes = torch.autograd.grad(scale(value), sums)
    for slab in slabs:
        part = h[:, :, slab].clone().requires_grad_()
        sums = slab_loss.sums(logits_of(classify, part), labels[:, slab])
        sum((slope * each).sum() for slope, each in zip(slopes, sums, strict=True)).backward()
        h[:, :, slab] = part.grad
    return value.detach()


def predict_in_slabs(classify: nn.Conv3d | None, loss: Loss, h: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, a scalar, and the class of every voxel, (B, X, Y, Z) uint8, for features `h` (B, C, X, Y, Z).

    Without `classify`, `h` are the logits.
    """
    slab_loss, slabs = in_slabs(classify, loss, h)
    parts, predicted = [], torch.empty_like(labels, dtype=torch.uint8)
    for slab in slabs:
        logits = logits_of(classify, h[:, :, slab])
        parts.append(slab_loss.sums(logits, labels[:, slab]))
        predicted[:, slab] = logits.argmax(dim=1)
    sums = [torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)]
    return slab_loss.from_sums(sums, labels.numel()), predicted


def logits_of(classify: nn.Conv3d | None, h: Tensor) -> Tensor:
    """Return the logits of features `h` in float32 (float64 where they are)."""
    return in_full_precision(convolve(classify, h) if classify else h)


def in_slabs(classify: nn.Conv3d | None, loss: Loss, h: Tensor) -> tuple[SlabLoss, list[slice]]:
    """Return the loss as one of slabs, and the slabs: the whole volume where the loss cannot be split."""
    if isinstance(loss, SlabLoss):
        return loss, list(slabs_along_x(classify, h))
    return SlabLoss(lambda logits, labels: [loss(logits, labels)], lambda sums, voxels: sums[0]), [slice(None)]


def slabs_along_x(classify: nn.Conv3d | None, h: Tensor) -> Iterator[slice]:
    """Cut the X axis of `h`, (B, C, X, Y, Z), so that the float32 logits of one slab stay within SLAB_BYTES."""
    classes = classify.out_channels if classify else h.shape[1]
    thickness = max(1, SLAB_BYTES // (4 * classes * h[:, 0, 0].numel()))
    return (slice(x, x + thickness) for x in range(0, h.shape[2], thickness))
