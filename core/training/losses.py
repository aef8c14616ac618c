"""Loss functions: each maps logits (B, K, X, Y, Z) and labels (B, X, Y, Z) to a scalar; LOSSES lists them by name.

To train with another loss, write such a function, add it to LOSSES, and give its name as `--loss`. A loss that depends
on the voxels through sums alone can be a `SlabLoss`: it is then computed slab by slab, so that the logits of the whole
volume never exist at once. Any other function gets the logits of the whole volume, under every memory plan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> scalar; logits are float32 or float64


@dataclass(frozen=True)
class SlabLoss:
    """A loss that is a function of sums over the voxels, so that it can be computed slab by slab.

    Attributes:
        sums: (logits, labels) -> a list of sums over the voxels; the sums of a volume are those of its slabs, added up.
        from_sums: (sums, number of voxels) -> the loss, a scalar.
    """

    sums: Callable[[Tensor, Tensor], list[Tensor]]
    from_sums: Callable[[list[Tensor], int], Tensor]

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (B, K, X, Y, Z) for labels (B, X, Y, Z), integers below K."""
        return self.from_sums(self.sums(logits, labels), labels.numel())


def cross_entropy_sums(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the sum of the cross-entropy over the voxels."""
    labels = labels.long()
    if torch.are_deterministic_algorithms_enabled():  # CUDA's cross-entropy of volumes is not, these operations are
        return [(logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]).sum()]
    return [F.cross_entropy(logits, labels, reduction="sum")]


def cross_entropy_from_sums(sums: list[Tensor], voxels: int) -> Tensor:
    """Return the mean cross-entropy over the voxels."""
    return sums[0] / voxels


def dice_cross_entropy_sums(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the sums that cross-entropy and the Dice loss need."""
    return cross_entropy_sums(logits, labels) + dice_sums(logits, labels)


def dice_cross_entropy_from_sums(sums: list[Tensor], voxels: int) -> Tensor:
    """Return cross-entropy plus Dice loss: the first moves every voxel, the second gives small organs their weight."""
    return cross_entropy_from_sums(sums[:1], voxels) + dice_loss(*sums[1:])


def dice_sums(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return, for each sample and class, sum(p g), sum(p^2) and sum(g) over the voxels: three tensors (B, K)."""
    probabilities = logits.softmax(dim=1).flatten(2)  # (B, K, N)
    ids = labels.long().flatten(1)  # (B, N)
    # Without a one-hot volume: each voxel adds to its own label's sum.
    own = probabilities.gather(1, ids[:, None])[:, 0]
    if torch.are_deterministic_algorithms_enabled():  # CUDA's scatter_add is not
        masks = [ids == organ for organ in range(probabilities.shape[1])]
        shared = torch.stack([(own * mask).sum(dim=1) for mask in masks], dim=1)
        in_labels = torch.stack([mask.sum(dim=1) for mask in masks], dim=1).to(own.dtype)
    else:
        empty = own.new_zeros(probabilities.shape[:2])  # (B, K)
        shared = empty.scatter_add(1, ids, own)
        in_labels = empty.scatter_add(1, ids, torch.ones_like(own))
    return [shared, probabilities.square().sum(dim=2), in_labels]


def dice_loss(shared: Tensor, squares: Tensor, in_labels: Tensor) -> Tensor:
    """Return 1 - soft Dice of the V-Net paper (section 3), averaged over a sample's organs and over samples.

    D = 2 sum(p g) / (sum p^2 + sum g^2) over the voxels, for each organ; the background is left out. The squares
    matter: with plain sums in the denominator, small organs are found later (RESULTS.md).

    Args:
        shared: (B, K) sum(p g), from `dice_sums`, as are the other two.
        squares: (B, K) sum(p^2).
        in_labels: (B, K) sum(g).

    Returns:
        a scalar in 0..1; 0 when no sample has any organ.
    """
    # An organ that is present has at least one voxel; for an absent one the clamp avoids 0 / 0.
    dice = 2 * shared / (squares + in_labels).clamp(min=1)
    present = in_labels[:, 1:] > 0
    of_samples = ((1 - dice[:, 1:]) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return of_samples.mean()


def marginal(loss: Loss, annotated: Tensor | None) -> Loss:
    """Return a loss that takes background for "background, or an organ that this sample does not annotate".

    The probabilities of such organs are added to the background's before the loss (Fang and Yan 2020; Shi et al. 2021).

    Args:
        loss: any loss.
        annotated: (B, K) bool on the CPU; None, or all True: `loss` itself.
    """
    if annotated is None or annotated.all():
        return loss
    if isinstance(loss, SlabLoss):
        return SlabLoss(lambda logits, labels: loss.sums(to_background(logits, annotated), labels), loss.from_sums)
    return lambda logits, labels: loss(to_background(logits, annotated), labels)


def to_background(logits: Tensor, annotated: Tensor) -> Tensor:
    """Return logits (B, K, X, Y, Z) whose softmax counts organs that are not `annotated` (B, K) to the background."""
    absent = annotated.logical_not().to(logits.device, non_blocking=True)[:, 1:, None, None, None]
    organs = logits[:, 1:]
    others = organs.masked_fill(absent.logical_not(), -torch.inf)
    background = torch.cat([logits[:, :1], others], dim=1).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, organs.masked_fill(absent, -torch.inf)], dim=1)


LOSSES: dict[str, Loss] = {
    "cross_entropy": SlabLoss(cross_entropy_sums, cross_entropy_from_sums),
    "dice_cross_entropy": SlabLoss(dice_cross_entropy_sums, dice_cross_entropy_from_sums),
}


def loss_named(name: str) -> Loss:
    """Return the loss of that name.

    Raises:
        ValueError: when there is none.
    """
    if name not in LOSSES:
        raise ValueError(f"loss: got {name}, expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


def check_scalar(loss: Tensor) -> Tensor:
    """Return a loss; raise a ValueError when it is no scalar."""
    if loss.ndim:
        raise ValueError(f"loss: returns a tensor of shape {tuple(loss.shape)}, expected a scalar; its mean may do")
    return loss


def in_full_precision(logits: Tensor) -> Tensor:
    """Return logits as float32; a loss of bf16 or fp16 logits would round its sums away. float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
