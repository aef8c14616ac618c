"""Random augmentation on the device: affine, elastic, left-right flip, contrast, brightness, gamma, noise."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional as F

from core.config import Config
from core.patches import draw_box, draw_patches, patch_to_volume
from core.scans.organ_words import mirrored_ids

CONTROL_POINTS = 7  # of an elastic deformation along each axis; splines interpolate between them
SMOOTHING = (151 / 315) ** 1.5  # factor of `smooth` on the standard deviation, from the integral of B(x)^2


def augment(
    image: Tensor, labels: Tensor, extent_mm: Tensor, config: Config, epoch: int, positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Augment a batch at random, on its device; with patch_size, return a patch of each case, augmented or not.

    A sample's changes depend only on the seed, the epoch and the sample's position in it.

    Args:
        image: (B, 1, X, Y, Z) float32 in 0..1.
        labels: (B, X, Y, Z), integer ids.
        extent_mm: (B, 3), the volumes' size in mm: rotations keep right angles in the patient, not in voxels.
        config: the strengths (augment_*), the seed, and the organs (for left and right).
        epoch: number of the epoch.
        positions: (B,) the samples' positions in the epoch.

    Returns:
        image in 0..1 and labels, typed as they came and of the same shape, or that of patches with patch_size.
    """
    draws = [np.random.default_rng([config.seed, epoch, 1 + position]) for position in positions]
    if config.patch_size and not config.augment:
        return draw_patches(image, labels, config.patch_size, draws)
    if config.augment_flip:
        image, labels = flip_left_right(image, labels, [rng.random() < 0.5 for rng in draws], config.organs)
    size = image.shape[2:]
    warps = [draw_warp(rng, mm, size, config) for rng, mm in zip(draws, extent_mm.tolist(), strict=True)]
    matrices, offsets = (torch.stack(each).to(image.device, non_blocking=True) for each in zip(*warps, strict=True))
    image, labels = warp(image, labels, matrices, offsets if config.augment_elastic else None, config.patch_size)
    return torch.stack([change_values(x, rng, config) for x, rng in zip(image, draws, strict=True)]), labels


def draw_warp(
    rng: np.random.Generator, extent_mm: Sequence[float], size: Sequence[int], config: Config
) -> tuple[Tensor, Tensor]:
    """Draw a matrix (3, 4) and offsets (3, P, P, P) for `warp`; with patch_size, for a patch at a random place."""
    matrix = draw_affine(rng, extent_mm, config)
    offsets = draw_offsets(rng, config) if config.augment_elastic else torch.zeros(0)
    if config.patch_size:
        to_volume = patch_to_volume(draw_box(rng, size, config.patch_size), size)  # (4, 4)
        # The control points span the patch, so their offsets shrink with it.
        matrix, offsets = matrix @ to_volume, offsets * to_volume.diagonal()[:3, None, None, None]
    return matrix, offsets


def draw_affine(rng: np.random.Generator, extent_mm: Sequence[float], config: Config) -> Tensor:
    """Draw a matrix (3, 4) from coordinates in the new volume to those in the old; both span -1 to 1."""
    degrees = rng.uniform(-1, 1, 3) * config.augment_rotation_degrees
    rotation = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    scale = 1 + rng.uniform(-1, 1) * config.augment_scale
    shift = 2 * rng.uniform(-1, 1, 3) * config.augment_shift
    to_mm = np.diag(extent_mm)
    matrix = np.linalg.inv(to_mm) @ rotation @ to_mm / scale
    return torch.from_numpy(np.column_stack([matrix, shift])).float()


def draw_offsets(rng: np.random.Generator, config: Config) -> Tensor:
    """Draw an elastic deformation: offsets of P x P x P control points, (3, P, P, P); axes span -1 to 1."""
    normal = rng.standard_normal((3, *[CONTROL_POINTS] * 3), dtype=np.float32)
    return torch.from_numpy(2 * config.augment_elastic / SMOOTHING * normal)


def warp(
    image: Tensor, labels: Tensor, matrices: Tensor, offsets: Tensor | None = None, size: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Warp images and labels: sample the old volume at the coordinates of each new voxel; outside is 0 in both.

    Args:
        image: (B, 1, X, Y, Z).
        labels: (B, X, Y, Z).
        matrices: (B, 3, 4), from coordinates in the new volume to those in the old.
        offsets: (B, 3, P, P, P) of control points, interpolated and added to the coordinates; None: none.
        size: voxels X Y Z of the new volume; None: as many as of the old.
    """
    # torch orders coordinates from the last axis to the first: Z, Y, X.
    linear = matrices[:, :, :3].flip(1, 2)
    shape = (*image.shape[:2], *(size or image.shape[2:]))
    grid = F.affine_grid(torch.cat([linear, matrices[:, :, 3:].flip(1)], dim=2), shape, align_corners=False)
    if offsets is not None:
        grid = grid + smooth(offsets, shape[2:]).flip(1).movedim(1, -1)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", align_corners=False), moved[:, 0].to(labels.dtype)


def smooth(points: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate (B, 3, P, P, P) by cubic splines to (B, 3, *size); the outermost points lie outside of the volume."""
    for axis, n in enumerate(size, start=2):
        places = torch.linspace(1, points.shape[axis] - 2, n, device=points.device)
        away = (places[:, None] - torch.arange(points.shape[axis], device=points.device)).abs()
        # The cubic B-spline.
        weights = torch.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6)
        points = torch.movedim(torch.tensordot(points, weights, dims=([axis], [1])), -1, axis)
    return points


def flip_left_right(
    image: Tensor, labels: Tensor, flips: Sequence[bool], organs: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Mirror the samples that `flips` marks along X and give paired organs each other's id: right is right again."""
    # Copied without waiting for the GPU, which torch.tensor(..., device=...) would do.
    swapped = torch.tensor(mirrored_ids(organs), dtype=labels.dtype).to(labels.device, non_blocking=True)
    chosen = torch.tensor(flips).to(image.device, non_blocking=True)
    image = torch.where(chosen[:, None, None, None, None], image.flip(2), image)
    return image, torch.where(chosen[:, None, None, None], swapped[labels.long()].flip(1), labels)


def change_values(image: Tensor, rng: np.random.Generator, config: Config) -> Tensor:
    """Change contrast, brightness and gamma of an image in 0..1 and add noise; back in 0..1."""
    contrast = 1 + rng.uniform(-1, 1) * config.augment_contrast
    brightness = rng.uniform(-1, 1) * config.augment_brightness
    gamma = 1 + rng.uniform(-1, 1) * config.augment_gamma
    noise = rng.uniform(0, 1) * config.augment_noise
    mean = image.mean()
    image = ((image - mean) * contrast + mean + brightness).clamp(0, 1) ** gamma
    if noise > 0:
        image = image + noise * standard_normal(image, rng)
    return image.clamp(0, 1)


def standard_normal(like: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw float32 numbers of the shape and on the device of `like`; a GPU draws its own, without a copy."""
    if like.device.type == "cpu":
        return torch.from_numpy(rng.standard_normal(like.shape, dtype=np.float32))
    generator = torch.Generator(like.device).manual_seed(int(rng.integers(2**63)))
    return torch.randn(like.shape, device=like.device, generator=generator)
