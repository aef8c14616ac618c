"""Patches: parts of the network's grid, where it sees less than all of it at a time (`patch_size`).

A training step sees one patch of each case, at a random place; a prediction is the mean over overlapping patches.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from core.scans.crop import Box

MIN_WEIGHT = 1e-3  # of a patch's voxel; its centre has 1


class InPatches(nn.Module):
    """A network that was trained on patches, for a grid of any size that is not smaller than they are.

    Args:
        network: maps (B, 1, *patch_size) to logits (B, K, *patch_size).
        patch_size: voxels along X, Y, Z.
    """

    def __init__(self, network: nn.Module, patch_size: Sequence[int]):
        super().__init__()
        self.network, self.patch_size = network, patch_size

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> logits (B, K, X, Y, Z)."""
        return mean_over_patches(self.network, image, self.patch_size)


def mean_over_patches(network: Callable[[Tensor], Tensor], image: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Return logits (B, K, X, Y, Z), float32, whose softmax is the weighted mean of the probabilities of all patches.

    A voxel counts by its distance from the patch's centre, as in nnU-Net (Isensee et al. 2021): a network knows less
    near its border.

    Args:
        network: maps (B, 1, *patch_size) to logits (B, K, *patch_size).
        image: (B, 1, X, Y, Z).
        patch_size: voxels along X, Y, Z; none more than the image has.
    """
    size = image.shape[2:]
    weights = patch_weights(patch_size).to(image.device)
    total, weight = None, torch.zeros(size, device=image.device)
    for box in patch_boxes(size, patch_size):
        probabilities = network(image[(..., *box)]).float().softmax(dim=1)
        if total is None:
            total = probabilities.new_zeros(*probabilities.shape[:2], *size)
        total[(..., *box)] += weights * probabilities
        weight[box] += weights
    # The softmax of the logarithms of probabilities is these probabilities.
    return total.div_(weight).clamp_(min=torch.finfo(torch.float32).tiny).log_()


def patch_weights(patch_size: Sequence[int]) -> Tensor:
    """Return the weights of a patch's voxels, (X, Y, Z): a Gaussian whose deviation is an eighth of each length."""
    axes = [torch.exp(-(((torch.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) / 2) for n in patch_size]
    return torch.einsum("x,y,z->xyz", *axes).clamp(min=MIN_WEIGHT)


def patch_boxes(size: Sequence[int], patch_size: Sequence[int]) -> list[Box]:
    """Return boxes of patches that cover a volume and overlap by half of their length or more."""
    starts = []
    for n, length in zip(size, patch_size, strict=True):
        count = 1 + math.ceil((n - length) / (length / 2))
        starts.append(np.linspace(0, n - length, count).round().astype(int).tolist())
    return [box_at(start, patch_size) for start in product(*starts)]


def draw_patches(
    image: Tensor, labels: Tensor, patch_size: Sequence[int], draws: Sequence[np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Return a patch of each case at a random place: image (B, 1, *patch_size) and labels (B, *patch_size).

    `draws` has a generator for each case.
    """
    drawn = [draw_box(rng, labels.shape[1:], patch_size) for rng in draws]
    images = [one[(..., *box)] for one, box in zip(image, drawn, strict=True)]
    return torch.stack(images), torch.stack([one[box] for one, box in zip(labels, drawn, strict=True)])


def draw_box(rng: np.random.Generator, size: Sequence[int], patch_size: Sequence[int]) -> Box:
    """Draw the box of a patch in a volume; all boxes inside it are equally likely."""
    return box_at(rng.integers(0, np.subtract(size, patch_size) + 1).tolist(), patch_size)


def box_at(start: Sequence[int], patch_size: Sequence[int]) -> Box:
    """Return the box of the patch that begins at voxel `start`."""
    return tuple(slice(first, first + n) for first, n in zip(start, patch_size, strict=True))


def patch_to_volume(box: Box, size: Sequence[int]) -> Tensor:
    """Return the matrix (4, 4) from coordinates in a patch to those in the volume; both span -1 to 1 along X, Y, Z."""
    matrix = np.eye(4)
    for axis, (cut, n) in enumerate(zip(box, size, strict=True)):
        matrix[axis, axis], matrix[axis, 3] = (cut.stop - cut.start) / n, (cut.start + cut.stop) / n - 1
    return torch.from_numpy(matrix).float()
