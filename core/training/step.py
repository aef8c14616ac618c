"""One training step and one validation step, under each memory plan.

A memory plan is a way to compute the same gradients:

    off      as torch does it: all that the backward pass needs is kept
    low      only the inputs and outputs of the convolutions are kept; no convolution is computed twice
    lowest   only what passes between stages is kept; every convolution is computed again in the backward pass

`low` and `lowest` know V-Net alone; any other network trains under `off`.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from core.patches import mean_over_patches
from core.scoring.overlap import confusion_matrix
from core.training.device import autocast
from core.training.losses import Loss, check_scalar, in_full_precision, marginal
from core.training.low_memory import features, is_supported
from core.training.setup import Training
from core.training.slabs import backward_in_slabs, predict_in_slabs


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite; a further step would destroy the weights."""


def training_step(training: Training, image: Tensor, labels: Tensor, **options: object) -> Tensor:
    """Change the network's weights once, for one batch; on a GPU this launches the step and does not wait for it.

    Takes what `compute_gradients` takes. Returns the loss before the change, a scalar on the device; where it is NaN
    or infinite, no weight has changed.
    """
    return apply_gradients(training, compute_gradients(training, image, labels, **options))


def apply_gradients(training: Training, loss: Tensor) -> Tensor:
    """Change the weights by the gradients of all processes, as `training_step` does; return the loss of all."""
    loss = training.average_gradients(training.network, loss)
    if training.max_grad_norm:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.network.parameters(), training.max_grad_norm)
    # Fused Adam reads found_inf on the device and skips the step when it is set. An enabled scaler replaces it by its
    # own answer, which all gradients decide.
    training.optimizer.found_inf = loss.isfinite().logical_not().float()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.ema:
        training.ema.update(training.network)
    return loss


def compute_gradients(
    training: Training,
    image: Tensor,
    labels: Tensor,
    on_loss: Callable[[Tensor], None] = lambda loss: None,
    after: Callable[[], None] = lambda: None,
    annotated: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Give the parameters the gradients of the loss, times the scaler's factor, and return the loss.

    Args:
        training: with the network in training mode.
        image: (B, 1, X, Y, Z) float32 in 0..1.
        labels: (B, X, Y, Z), integer ids.
        on_loss: is called with the loss of each micro-batch before its backward pass.
        after: is called after each micro-batch.
        annotated: (B, K) bool on the CPU, the classes that each case's labels annotate; None: all.
        weights: (B,) on the CPU, of the cases; the loss of a micro-batch counts their mean. None: all 1.
    """
    training.optimizer.zero_grad(set_to_none=True)
    losses, steps = [], training.accumulation_steps
    if weights is not None and len(weights.unique()) > 1:
        steps = len(image)  # one by one, for each case's loss to count by its own weight
    for part, share in micro_batches(len(image), steps):
        share *= 1.0 if weights is None else weights[part].mean().item()
        classes = None if annotated is None else annotated[part]
        losses.append(share * backward(training, image[part], labels[part], classes, on_loss, share))
        after()
    return sum(losses[1:], start=losses[0])


def loss_of(training: Training, annotated: Tensor | None) -> Loss:
    """Return the loss of cases that annotate the classes `annotated` (B, K); None: all."""
    if annotated is not None and training.never_annotated is not None:
        annotated = annotated | training.never_annotated
    return marginal(training.loss, annotated)


def micro_batches(cases: int, steps: int) -> list[tuple[slice, float]]:
    """Split a batch into `steps` parts, as equal as possible and none empty; give each one's share of the cases."""
    steps = min(steps, cases)
    ends = [cases * number // steps for number in range(steps + 1)]
    return [(slice(a, b), (b - a) / cases) for a, b in pairwise(ends)]


def backward(
    training: Training,
    image: Tensor,
    labels: Tensor,
    annotated: Tensor | None,
    on_loss: Callable[[Tensor], None],
    share: float,
) -> Tensor:
    """Run forward and backward pass of a micro-batch, `share` of its batch, as the plan says; return its loss."""

    def scale(loss: Tensor) -> Tensor:
        return training.scaler.scale(loss * share)

    network, criterion = training.network, loss_of(training, annotated)
    if training.plan == "off":
        loss = check_scalar(criterion(run_network(training, image, annotated), labels))
        on_loss(loss)
        scale(loss).backward()
        return loss.detach()
    result = features(network, image, training.precision, keep=training.plan == "low")  # (B, 2C, X, Y, Z)
    gradient = result.detach()  # the same memory: from here on nobody needs the result itself
    loss = backward_in_slabs(network.classify, criterion, gradient, labels, on_loss, scale)
    if result.requires_grad:  # not where the last convolution alone is trained
        result.backward(gradient)
    return loss


def run_network(training: Training, image: Tensor, annotated: Tensor | None) -> Tensor:
    """Return the network's logits (B, K, X, Y, Z), float32 or float64; K is that of `annotated`, where it is given.

    Raises:
        ValueError: when the network returns something else. Too many classes would train and go unnoticed.
    """
    with autocast(image.device, training.precision):
        logits = training.network(image)
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    whole = None if annotated is None else (*annotated.shape, *image.shape[2:])
    if not isinstance(logits, Tensor) or got != (whole or got):
        expected = f"{whole or '(B, K, X, Y, Z)'}: cases, organs with the background, and the images' grid"
        raise ValueError(f"the network ({type(training.network).__name__}) returns {got}, expected {expected}")
    return in_full_precision(logits)


@torch.no_grad()
def validation_step(
    training: Training, image: Tensor, labels: Tensor, annotated: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return the loss of a batch and the class of every voxel, (B, X, Y, Z) uint8; arguments as of `training_step`.

    For V-Net this takes less memory than any training step; with patch_size, the logits of the whole grid besides.
    """
    network, predict = training.network, partial(run_network, training, annotated=annotated)
    if training.patch_size:
        h, classify = mean_over_patches(predict, image, training.patch_size), None
    elif is_supported(network):
        h, classify = features(network, image, training.precision, keep=False), network.classify
    else:
        h, classify = predict(image), None
    loss, predicted = predict_in_slabs(classify, loss_of(training, annotated), h, labels)
    return loss.item(), predicted


def count_pairs(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Return the confusion matrix of two label maps of the same shape, as `confusion_matrix`; on a GPU, counted there.

    On a CPU `confusion_matrix` is faster than torch, on a GPU the volumes would have to be copied for it.
    """
    if labels.device.type == "cpu":
        return confusion_matrix(labels.numpy(), predicted.numpy(), classes)
    pairs = labels.long() * classes + predicted
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes).cpu().numpy()


class PendingLoss:
    """A loss that is being copied to the CPU asynchronously.

    Args:
        loss: a scalar, from `training_step`.
        where: epoch, step and case, for the sentence that says that it is not finite.
        annotated: (B, K) of its cases; a loss of one's own may not bear logits of organs that are not annotated.
    """

    def __init__(self, loss: Tensor, where: str, annotated: Tensor | None = None):
        self.where = where
        self.advice = "a lower --learning-rate may help"
        if annotated is not None and not annotated.all():
            self.advice += ", or a loss that bears logits of -inf, which organs that are not annotated have"
        self.value = loss.to("cpu", non_blocking=True)
        self.copied = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def read(self) -> float:
        """Wait for this step, but not for those launched after it, and return the loss.

        Raises:
            NotFiniteError: when the loss is NaN or infinite.
        """
        if self.copied is not None:
            self.copied.synchronize()
        loss = self.value.item()
        if not math.isfinite(loss):
            raise NotFiniteError(f"{self.where}: the loss is {loss}; {self.advice}")
        return loss
