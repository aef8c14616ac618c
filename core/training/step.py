"""One training step: the losses, the arithmetic it runs in, the memory plans, and the step itself.

A memory plan is a way to work out the same gradients:

    off      as torch does it: everything that the backward pass needs is kept
    low      only the convolutions' inputs and outputs are kept; no convolution is done twice
    lowest   only what passes between stages is kept; every convolution is done once more in the backward pass
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from core.training.low_memory import convolve, features
from core.training.setup import Training, autocast

PLANS = ("off", "low", "lowest")  # from the fastest to the smallest
SLAB_BYTES = 32 * 2**20  # of float32 logits that exist at a time under the plans low and lowest


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite, so that training on would destroy the weights."""


def training_step(
    training: Training,
    image: Tensor,
    labels: Tensor,
    check: Callable[[Tensor], None] = lambda loss: None,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Change the network's weights once, for one batch; on a GPU it is launched and not waited for.

    Args:
        training: with the network in training mode.
        image: (B, 1, X, Y, Z) float32 in 0..1.
        labels: (B, X, Y, Z), integer ids.
        check: is shown the loss of each piece before its backward pass.
        after: is called when a piece is done.

    Returns:
        the loss before the change, a scalar on the device; where it is NaN or infinite, no weight has changed.
    """
    training.optimizer.zero_grad(set_to_none=True)
    loss = training.combine(training.network, gradients(training, image, labels, check, after))
    # Adam reads on the device whether to leave this step out. An enabled scaler puts its own answer here, in which all
    # gradients have a say.
    if training.max_grad_norm:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.network.parameters(), training.max_grad_norm)
    training.optimizer.found_inf = loss.isfinite().logical_not().float()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.average:
        training.average.update(training.network)
    return loss


def pieces_of(cases: int, pieces: int) -> list[tuple[slice, float]]:
    """A batch cut into pieces, as even as can be and none empty, with the share of the cases that each has."""
    pieces = min(pieces, cases)
    ends = [cases * number // pieces for number in range(pieces + 1)]
    return [(slice(a, b), (b - a) / cases) for a, b in pairwise(ends)]


def gradients(
    training: Training,
    image: Tensor,
    labels: Tensor,
    check: Callable[[Tensor], None] = lambda loss: None,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Put the loss's gradients, times the scaler's factor, into the parameters, piece by piece; returns the loss.

    `check` and `after` are those of `training_step`.
    """
    losses = []
    for piece, share in pieces_of(len(image), training.pieces):
        losses.append(share * gradients_of_piece(training, image[piece], labels[piece], check, share))
        after()
    return sum(losses[1:], start=losses[0])


def gradients_of_piece(
    training: Training, image: Tensor, labels: Tensor, check: Callable[[Tensor], None], share: float
) -> Tensor:
    """Add the gradients of a piece that is this share of its batch to the parameters', as the plan says.

    Returns:
        the piece's loss.
    """
    network, plan = training.network, training.plan
    if plan == "off":
        with autocast(image.device, training.precision):
            value = training.loss(network(image), labels)  # (B, K, X, Y, Z) -> scalar
        check(value)
        training.scaler.scale(value * share).backward()
        return value.detach()
    result = features(network, image, training.precision, keep=plan == "low")  # (B, 2C, X, Y, Z)
    gradient = result.detach()  # the same memory: from here on nobody needs the result itself
    value = backward_in_slabs(training, gradient, labels, check, share)
    result.backward(gradient)
    return value


def backward_in_slabs(
    training: Training, h: Tensor, labels: Tensor, check: Callable[[Tensor], None], share: float
) -> Tensor:
    """The loss of the classes found in `h`, (B, 2C, X, Y, Z), which is overwritten by its gradient.

    Slab by slab along X, so that the K-class logits never exist whole. The loss depends on sums over all voxels: a
    first pass finds the sums, and with them how the loss changes with each; a second the gradients of each slab's part.
    """
    classify, loss = training.network.classify, training.loss
    slabs = slabs_along_x(classify, h)
    with torch.no_grad():
        parts = [loss.sums(convolve(classify, h[:, :, slab]), labels[:, slab]) for slab in slabs]
    sums = [torch.stack(part).sum(dim=0).requires_grad_() for part in zip(*parts, strict=True)]
    value = loss.of_sums(sums, labels.numel())
    check(value)
    slopes = torch.autograd.grad(value * share, sums)
    for slab in slabs:
        part = h[:, :, slab].clone().requires_grad_()
        sums = loss.sums(convolve(classify, part), labels[:, slab])
        change = sum((slope * each).sum() for slope, each in zip(slopes, sums, strict=True))
        training.scaler.scale(change).backward()
        h[:, :, slab] = part.grad
    return value.detach()


class RunningLoss:
    """The loss of a step that a GPU may still be at work on: on its way to the processor, which does not wait for it.

    Args:
        loss: a scalar, from `training_step`.
        where: epoch, step and case, for the sentence that says that it is not finite.
    """

    def __init__(self, loss: Tensor, where: str):
        self.where = where
        self.value = loss.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def read(self) -> float:
        """Wait for the step, but not for those launched behind it.

        Raises:
            NotFiniteError: when the loss is NaN or infinite.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss = self.value.item()
        if not math.isfinite(loss):
            raise NotFiniteError(f"{self.where}: the loss is {loss}; a lower --learning-rate may help")
        return loss


@torch.no_grad()
def validation_step(training: Training, image: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The loss for a batch and the class of every voxel, (B, X, Y, Z) uint8, in less memory than any training step."""
    classify = training.network.classify
    h = features(training.network, image, training.precision, keep=False)
    parts, predicted = [], torch.empty_like(labels, dtype=torch.uint8)
    for slab in slabs_along_x(classify, h):
        logits = convolve(classify, h[:, :, slab])
        parts.append(training.loss.sums(logits, labels[:, slab]))
        predicted[:, slab] = logits.argmax(dim=1)
    sums = [torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)]
    return training.loss.of_sums(sums, labels.numel()).item(), predicted


def slabs_along_x(classify: nn.Conv3d, h: Tensor) -> list[slice]:
    """Cut the X axis of `h`, (B, C, X, Y, Z), so that the float32 logits of one slab stay within SLAB_BYTES."""
    thickness = max(1, SLAB_BYTES // (4 * classify.out_channels * h[:, 0, 0].numel()))
    return [slice(x, x + thickness) for x in range(0, h.shape[2], thickness)]
