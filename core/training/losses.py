"""Losses of logits (B, K, X, Y, Z) for labels (B, X, Y, Z)."""

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- Losses ----------------------------------------------------------------------------------------------------------


class Loss:
    """Cross-entropy, alone or with the paper's Dice, as a function of sums over voxels.

    Because all that it needs of the voxels are sums, it can be worked out slab by slab.

    Args:
        name: "cross_entropy" or "dice_cross_entropy" (their sum: cross-entropy moves every voxel, Dice gives small
            organs their weight).
        deterministic: whether to leave out the GPU kernels that add up in any order; the others are slower.
    """

    def __init__(self, name: str, deterministic: bool = False):
        if name not in ("cross_entropy", "dice_cross_entropy"):
            raise ValueError(f"loss: got {name}, expected one of cross_entropy, dice_cross_entropy")
        self.with_dice = name == "dice_cross_entropy"
        self.deterministic = deterministic

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K, X, Y, Z) for labels (B, X, Y, Z), integers below K: a scalar."""
        return self.of_sums(self.sums(logits, labels), labels.numel())

    def sums(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """What the loss needs of these voxels; that of the whole volume is the total over its parts."""
        labels = labels.long()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.deterministic:  # cross-entropy of volumes has no such kernel, these have
            sums = [(logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]).sum()]
        else:
            sums = [F.cross_entropy(logits, labels, reduction="sum")]
        return sums + dice_sums(logits, labels, self.deterministic) if self.with_dice else sums

    def of_sums(self, sums: list[Tensor], voxels: int) -> Tensor:
        """The loss of `voxels` voxels that have these sums."""
        mean = sums[0] / voxels
        return mean + dice_loss(*sums[1:]) if self.with_dice else mean


def dice_sums(logits: Tensor, labels: Tensor, deterministic: bool = False) -> list[Tensor]:
    """For each sample and class, sum(p g), sum(p^2) and sum(g) over the voxels: three tensors (B, K)."""
    probabilities = logits.softmax(dim=1).flatten(2)  # (B, K, N)
    ids = labels.flatten(1)  # (B, N)
    # Without a one-hot volume: each voxel adds to its own label's sum.
    own = probabilities.gather(1, ids[:, None])[:, 0]
    if deterministic:  # scatter_add is not
        masks = [ids == organ for organ in range(probabilities.shape[1])]
        shared = torch.stack([(own * mask).sum(dim=1) for mask in masks], dim=1)
        in_labels = torch.stack([mask.sum(dim=1) for mask in masks], dim=1).to(own.dtype)
    else:
        empty = own.new_zeros(probabilities.shape[:2])  # (B, K)
        shared = empty.scatter_add(1, ids, own)
        in_labels = empty.scatter_add(1, ids, torch.ones_like(own))
    return [shared, probabilities.square().sum(dim=2), in_labels]


def dice_loss(shared: Tensor, squares: Tensor, in_labels: Tensor) -> Tensor:
    """1 - soft Dice as the V-Net paper has it (section 3), the mean over a sample's organs, and over samples.

    D = 2 sum(p g) / (sum p^2 + sum g^2) over the voxels, for each organ; the background is left out. The squares
    matter: with plain sums below the line, small organs start to be found later (RESULTS.md).

    Args:
        shared: (B, K) sum(p g), from `dice_sums`, as are the other two.
        squares: (B, K) sum(p^2).
        in_labels: (B, K) sum(g).

    Returns:
        a scalar in 0..1; 0 when no sample has any organ.
    """
    # An organ that is there has at least one voxel; for one that is not, 0 / 0 must not come out.
    dice = 2 * shared / (squares + in_labels).clamp(min=1)
    present = in_labels[:, 1:] > 0
    of_samples = ((1 - dice[:, 1:]) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return of_samples.mean()
