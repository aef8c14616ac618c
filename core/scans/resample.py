"""Resize volumes between the grids of a scan and of the network: images, label maps, and logits to label maps.

    resize_image, resize_labels      (to the network's grid; each its own inverse)
    logits_to_labels                 (from the network's grid to the scan's own)

Arrays are (X, Y, Z); voxel centres are half-voxel aligned, as in F.interpolate with align_corners=False.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage, sparse
from torch import Tensor
from torch.nn import functional as F

ANTIALIAS_ABOVE = 2.0  # input voxels per output voxel: up to here linear interpolation still touches every voxel
SLAB_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}  # of scores resized at a time; more leaves the CPU's cache
DENSE_ABOVE = 0.4  # share of cells with a boundary above which interpolating all voxels is faster than picking them


def axis_weights(n_in: int, n_out: int, antialias: bool = False) -> Tensor:
    """Return the linear interpolation from `n_in` to `n_out` voxels over the same length, as a matrix.

    Voxel i of the output has its centre at (i + 1/2) n_in / n_out - 1/2 of the input (half-voxel aligned); beyond the
    outermost centres the outermost value goes on. With `antialias` and shrinking by more than ANTIALIAS_ABOVE the
    interpolation's triangle is widened to cover every input voxel.

    Returns:
        (n_out, n_in) float32; every row sums to 1.
    """
    step = n_in / n_out
    width = step if antialias and step > ANTIALIAS_ABOVE else 1.0
    centres = (torch.arange(n_out, dtype=torch.float64) + 0.5) * step - 0.5
    distances = (torch.arange(n_in, dtype=torch.float64) - centres[:, None]).abs()
    weights = (1 - distances / width).clamp(min=0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def apply_weights(volume: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """Apply an (n_out, n_in) matrix along each of the last three axes of (..., X, Y, Z); None leaves an axis alone."""
    axes = [axis for axis in range(3) if weights[axis] is not None]
    # The axis that shrinks most goes first, so that the rest has the least to do.
    for axis in sorted(axes, key=lambda a: weights[a].shape[0] / weights[a].shape[1]):
        # Each product takes the volume in its memory order; moving the axis to the end would copy it.
        if axis == 0:
            volume = (weights[axis] @ volume.flatten(-2)).unflatten(-1, volume.shape[-2:])
        elif axis == 1:
            volume = weights[axis] @ volume
        else:
            volume = volume @ weights[axis].T
    return volume


def resize_image(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize an image, (X, Y, Z) float32, to `size`: trilinear, anti-aliased where it shrinks by more than 2.

    The inverse is the same function with the image's own shape; detail lost by averaging does not come back.
    """
    # Not by F.interpolate with antialias: torch 2.13 gets pictures of one voxel's width wrong.
    averaging = [
        axis_weights(n_in, n_out, antialias=True) if n_in > ANTIALIAS_ABOVE * n_out else None
        for n_in, n_out in zip(image.shape, size, strict=True)
    ]
    volume = apply_weights(torch.from_numpy(image), averaging)
    return F.interpolate(volume[None, None], size=tuple(size), mode="trilinear", align_corners=False)[0, 0].numpy()


def resize_labels(labels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize a label map, (X, Y, Z) uint8, to `size`: each organ's share by linear interpolation, the largest wins.

    No label comes out that did not go in; ties go to the lower id. The inverse is the same function with the label
    map's own shape. Chosen over nearest neighbour by the Dice of going there and back (RESULTS.md).
    """
    weights = [axis_weights(n_in, n_out) for n_in, n_out in zip(labels.shape, size, strict=True)]
    winner = torch.zeros(tuple(size), dtype=torch.uint8)
    best = torch.zeros(tuple(size))  # the winning organ's share
    background = torch.ones(tuple(size))  # what the organs leave over
    for organ, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        # An organ's share is 0 outside the region that its box has weights for.
        target, inside = [], []
        for matrix, cut in zip(weights, box, strict=True):
            rows = matrix[:, cut].any(dim=1).nonzero()
            first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
            target.append(slice(first, last + 1))
            inside.append(matrix[first : last + 1, cut])
        target = tuple(target)
        share = apply_weights(torch.from_numpy(labels[box] == organ).float(), inside)
        background[target] -= share
        wins = share > best[target]
        best[target] = torch.where(wins, share, best[target])
        winner[target] = torch.where(wins, organ, winner[target])
    winner[background >= best] = 0
    return winner.numpy()


@torch.no_grad()
def logits_to_labels(logits: Tensor, shape: Sequence[int]) -> np.ndarray:
    """Resize logits, (K, X, Y, Z) on any device, to a scan's `shape` and take the largest class of each voxel.

    The labels are those of F.interpolate (trilinear, align_corners=False) and argmax, but memory never holds K
    full-size volumes. On a CPU only voxels near a boundary are interpolated, unless noisy logits make that most voxels.

    Returns:
        labels of `shape`, uint8, RAS+ order like the logits; ties go to the lower id.
    """
    labels = np.empty(tuple(shape), dtype=np.uint8)
    if logits.device.type == "cpu":
        winners = np.stack([largest_class(logits[:, layer].float()) for layer in range(logits.shape[1])])
        mixed = cells_with_boundary(winners)
        if mixed.mean() < DENSE_ABOVE:
            return interpolate_boundary(logits, winners, mixed, labels)
    for slab in slabs(logits, shape):
        labels[slab] = largest_class(resize_slab(logits, shape, slab))
    return labels


def largest_class(scores: Tensor) -> np.ndarray:
    """Return the class of the largest of (K, ...) float32 scores, uint8; ties go to the lower id."""
    if scores.device.type != "cpu":
        return scores.max(dim=0).indices.to("cpu", torch.uint8).numpy()
    # A running maximum: four times as fast as torch's max, which keeps int64 indices too.
    best, *others = scores.numpy()
    best, winner = best.copy(), np.zeros(best.shape, dtype=np.uint8)
    for k, other in enumerate(others, start=1):
        wins = (other > best).view(np.uint8)
        np.maximum(winner, wins * np.uint8(k), out=winner)
        np.maximum(best, other, out=best)
    return winner


def cells_with_boundary(winners: np.ndarray) -> np.ndarray:
    """Mark the cells of eight neighbouring voxels that have more than one winning class.

    In the other cells the class that wins at all eight corners wins everywhere between them, because interpolated
    logits are weighted means of the corners' logits. At the upper ends the last voxel is its own neighbour.

    Returns:
        (X, Y, Z) bool; a cell has the index of its lowest voxel.
    """
    mixed = np.zeros(winners.shape, dtype=bool)
    mixed[:-1] |= winners[:-1] != winners[1:]
    mixed[:, :-1] |= mixed[:, 1:] | (winners[:, :-1] != winners[:, 1:])
    mixed[:, :, :-1] |= mixed[:, :, 1:] | (winners[:, :, :-1] != winners[:, :, 1:])
    return mixed


def interpolate_boundary(logits: Tensor, winners: np.ndarray, mixed: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fill `labels` from (K, X, Y, Z) logits: by interpolation in `mixed` cells, by the winner in others."""
    (low_x, high_x, share_x), *in_plane = (neighbours(n, m) for n, m in zip(winners.shape, labels.shape, strict=True))
    (low_y, _, _), (low_z, _, _) = in_plane
    for layer in np.unique(low_x):
        slices = np.flatnonzero(low_x == layer)  # the output slices between this layer and the next
        labels[slices] = winners[layer].take(low_y, axis=0).take(low_z, axis=1)
        chosen = np.flatnonzero(mixed[layer].take(low_y, axis=0).take(low_z, axis=1))
        places = np.divmod(chosen, labels.shape[2])  # along Y' and along Z'
        points, weights = interpolation_in_plane(places, in_plane, winners.shape[1:])
        both = [plane for x in (layer, high_x[slices[0]]) for plane in logits[:, x].float().flatten(1).numpy()]
        low, high = np.hsplit(weights @ np.stack([plane.take(points) for plane in both], axis=1), 2)  # (chosen, K) each
        rise = high - low
        for x in slices:
            labels[x].reshape(-1)[chosen] = (low + share_x[x] * rise).argmax(axis=1)
    return labels


def interpolation_in_plane(
    places: tuple[np.ndarray, np.ndarray], in_plane: Sequence[tuple], plane: tuple[int, int]
) -> tuple[np.ndarray, sparse.csr_array]:
    """Interpolate a plane of (Y, Z) points bilinearly at `places`, N indices along Y' and along Z'.

    Args:
        places: indices in the output plane.
        in_plane: results of `neighbours` along Y and along Z.
        plane: (Y, Z), the extents of the input plane.

    Returns:
        the P points that are needed, counted along the flattened plane, and the weights, (N, P).
    """
    (low_y, high_y, to_y), (low_z, high_z, to_z) = (
        (low[i], high[i], share[i]) for i, (low, high, share) in zip(places, in_plane, strict=True)
    )
    corners = np.stack([at_y * plane[1] + at_z for at_y in (low_y, high_y) for at_z in (low_z, high_z)], axis=1)
    weights = np.stack([share_y * share_z for share_y in (1 - to_y, to_y) for share_z in (1 - to_z, to_z)], axis=1)
    needed = np.zeros(math.prod(plane), dtype=bool)
    needed[corners] = True
    columns = (np.cumsum(needed, dtype=np.int32) - 1)[corners]
    rows = np.arange(0, corners.size + 1, corners.shape[1], dtype=np.int32)  # where each begins
    points = np.flatnonzero(needed)
    return points, sparse.csr_array((weights.ravel(), columns.ravel(), rows), shape=(len(corners), len(points)))


def neighbours(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each of `n_out` voxels the two of `n_in` around it and the second's weight, as in `axis_weights`.

    It rounds in float32 as F.interpolate does, so the labels differ from F.interpolate's only at ties in the last bit.
    """
    step = np.float32(n_in / n_out)
    half = np.float32(0.5)
    centres = np.clip((np.arange(n_out, dtype=np.float32) + half) * step - half, 0, n_in - 1)
    low = np.floor(centres).astype(np.int64)
    return low, np.minimum(low + 1, n_in - 1), centres - low.astype(np.float32)


def slabs(logits: Tensor, shape: Sequence[int]) -> list[slice]:
    """Cut the X axis of `shape` so that float32 logits resized to one piece of it stay within SLAB_BYTES."""
    thickness = max(1, SLAB_BYTES[logits.device.type] // (4 * len(logits) * shape[1] * shape[2]))
    return [slice(start, min(start + thickness, shape[0])) for start in range(0, shape[0], thickness)]


def resize_slab(logits: Tensor, shape: Sequence[int], slab: slice) -> Tensor:
    """Resize (K, X, Y, Z) logits to `shape` and return the part `slab` along X: (K, slab, Y', Z') float32."""
    along_x = neighbours(logits.shape[1], shape[0])
    low, high, share = (torch.from_numpy(each[slab]).to(logits.device) for each in along_x)
    part = torch.lerp(logits[:, low].float(), logits[:, high].float(), share[:, None, None])  # (K, slab, Y, Z)
    return F.interpolate(part, size=tuple(shape[1:]), mode="bilinear", align_corners=False)
