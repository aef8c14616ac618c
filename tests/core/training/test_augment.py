"""Random augmentation: what changes, by how much, and from which seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from data_files import settings
from scipy import ndimage
from torch import Tensor

from core.config import load_config
from core.scans.organ_words import mirrored_ids
from core.training.augment import (
    CONTROL_POINTS,
    augment,
    change_values,
    draw_affine,
    draw_offsets,
    draw_warp,
    flip_left_right,
    smooth,
    warp,
)

NO_CHANGE = {
    f"augment_{name}": 0
    for name in ("rotation_degrees", "scale", "shift", "elastic", "contrast", "brightness", "gamma", "noise")
}


class Fixed:
    """In place of a random generator: every draw gives the numbers of `values`, first to last."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low: float, high: float, size: int | None = None):
        """Return the next value."""
        return self.values.pop(0)

    def standard_normal(self, size: tuple, dtype: type):
        """Return twos."""
        return np.full(size, 2, dtype)


def random_batch(samples: int = 3, size: tuple = (12, 10, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """Return images and labels in blobs, and extents in mm."""
    rng = np.random.default_rng(0)
    zoom = (1, size[0] / 3, size[1] / 3, size[2] / 2)
    labels = ndimage.zoom(rng.integers(0, 14, (samples, 3, 3, 2)), zoom, order=0)
    image = torch.from_numpy(rng.random((samples, 1, *size), dtype=np.float32))
    return image, torch.from_numpy(labels.astype(np.uint8)), torch.tensor([[350.0, 250.0, 200.0]] * samples)


def centroid_mm(labels: Tensor, organ: int, spacing_mm: tuple) -> np.ndarray:
    """Return the centroid of an organ in mm from the volume's centre."""
    places = (labels == organ).nonzero().double().mean(dim=0).numpy()
    return (places + 0.5 - np.array(labels.shape) / 2) * spacing_mm


def test_no_strength_is_no_change():
    image, labels, extent_mm = random_batch()
    changed, moved = augment(image, labels, extent_mm, settings(**NO_CHANGE, augment_flip=False), 3, range(3))
    torch.testing.assert_close(changed, image, atol=1e-4, rtol=0)
    assert torch.equal(moved, labels)
    assert (changed.dtype, moved.dtype) == (image.dtype, labels.dtype)


def test_a_change_depends_on_seed_epoch_and_position_alone():
    image, labels, extent_mm = random_batch(4)
    config = settings(augment_flip=True)

    def one_by_one(seed: int, epoch: int, positions: list[int]) -> tuple[Tensor, Tensor]:
        rows = [
            augment(image[i : i + 1], labels[i : i + 1], extent_mm[:1], replace(config, seed=seed), epoch, [position])
            for i, position in enumerate(positions)
        ]
        return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])

    np.random.seed(0)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(0)
    together = augment(image, labels, extent_mm, config, 5, range(8, 12))
    torch.rand(7)
    alone = one_by_one(0, 5, [8, 9, 10, 11])
    torch.testing.assert_close(together[0], alone[0], atol=1e-6, rtol=0)
    assert torch.equal(together[1], alone[1])
    for other in (one_by_one(1, 5, [8, 9, 10, 11]), one_by_one(0, 6, [8, 9, 10, 11]), one_by_one(0, 5, [9, 8, 11, 10])):
        assert all((a - b).abs().max() > 0.05 for a, b in zip(alone[0], other[0], strict=True))
    assert together[0].dtype == torch.float32
    assert together[1].dtype == torch.uint8


def test_a_right_angle_in_mm_by_hand():
    # 80 x 40 x 40 mm on a grid of 40 x 40 x 20: voxels of 2 x 1 x 2 mm. A box of 16 x 32 mm turned by 90 degrees about
    # Z is one of 32 x 16 mm: 16 x 16 voxels. Turned in voxels instead, its 8 x 32 would become 32 x 8.
    labels = torch.zeros(1, 40, 40, 20, dtype=torch.uint8)
    labels[0, 16:24, 4:36, 5:15] = 1
    matrix = draw_affine(
        Fixed(np.array([0, 0, 1]), 0, np.zeros(3)), (80, 40, 40), settings(augment_rotation_degrees=90)
    )
    image, turned = warp((labels == 1).float()[:, None], labels, matrix[None])
    expected = torch.zeros_like(labels)
    expected[0, 12:28, 12:28, 5:15] = 1
    assert torch.equal(turned, expected)
    inside = ndimage.binary_erosion(expected[0].numpy(), iterations=1)
    np.testing.assert_allclose(image[0, 0].numpy()[inside], 1, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotations_shifts_and_scales_in_mm(axis):
    # Two balls 30 mm from the centre along the turned axes; where 20 degrees take them is worked out in mm.
    spacing_mm, size = (2.0, 1.0, 4.0), (60, 130, 30)
    extent_mm = np.multiply(spacing_mm, size)
    mm = np.stack(np.meshgrid(*[(np.arange(n) + 0.5 - n / 2) * s for n, s in zip(size, spacing_mm, strict=True)],
                              indexing="ij"), axis=-1)  # fmt: skip
    first, second = np.eye(3)[(axis + 1) % 3] * 30, np.eye(3)[(axis + 2) % 3] * 30
    labels = torch.zeros(1, *size, dtype=torch.uint8)
    for organ, place in ((1, first), (2, second)):
        labels[0][torch.from_numpy(np.linalg.norm(mm - place, axis=-1) < 12)] = organ
    image = (labels > 0).float()[:, None]

    def changed(angle: float, scale: float, shift: tuple) -> Tensor:
        config = settings(augment_rotation_degrees=20, augment_scale=0.2, augment_shift=0.1)
        draws = Fixed(np.eye(3)[axis] * angle, scale, np.array(shift))
        image_moved, labels_moved = warp(image, labels, draw_affine(draws, extent_mm, config)[None])
        # The two move together: where the image is bright there is an organ.
        assert ((image_moved[0, 0] > 0.5) == (labels_moved[0] > 0)).float().mean() > 0.995
        return labels_moved[0]

    cos, sin = np.cos(np.radians(20)), np.sin(np.radians(20))
    turned = changed(1, 0, (0, 0, 0))
    # The new volume looks up its values at places turned by +20 degrees, so that what it shows is turned by -20.
    np.testing.assert_allclose(centroid_mm(turned, 1, spacing_mm), cos * first - sin * second, atol=0.6)
    np.testing.assert_allclose(centroid_mm(turned, 2, spacing_mm), cos * second + sin * first, atol=0.6)
    larger = changed(0, 1, (0, 0, 0))
    np.testing.assert_allclose(centroid_mm(larger, 1, spacing_mm), 1.2 * first, atol=0.6)
    assert (larger == 1).sum() / (labels == 1).sum() == pytest.approx(1.2**3, rel=0.1)
    shifted = changed(0, 0, np.eye(3)[axis])
    np.testing.assert_allclose(centroid_mm(shifted, 1, spacing_mm), first - 0.1 * extent_mm * np.eye(3)[axis], atol=0.6)


def test_strengths_are_the_largest_change():
    config = settings(augment_rotation_degrees=10, augment_scale=0.1, augment_shift=0.05)
    extent_mm = np.array([350.0, 250.0, 200.0])
    angles, scales, shifts = [], [], []
    for seed in range(300):
        matrix = draw_affine(np.random.default_rng(seed), extent_mm, config).double().numpy()
        in_mm = np.diag(extent_mm) @ matrix[:, :3] @ np.diag(1 / extent_mm)
        scale = np.cbrt(np.linalg.det(in_mm))
        np.testing.assert_allclose(in_mm.T @ in_mm, np.eye(3) * scale**2, atol=1e-5)  # right angles, one scale
        angles.append(np.degrees(np.arcsin(in_mm[2, 1] / scale)))
        scales.append(1 / scale)
        shifts.append(matrix[:, 3] / 2)  # of the length, which runs from -1 to 1
    assert 9 < np.max(np.abs(angles)) < 10.5
    assert (np.min(scales), np.max(scales)) == (pytest.approx(0.9, abs=0.01), pytest.approx(1.1, abs=0.01))
    assert 0.048 < np.abs(shifts).max() <= 0.05 + 1e-6


def test_values_by_hand():
    # Contrast 1.2 about the mean 0.4, brightness -0.1, gamma 1.5, and noise of 2 times 0.5 * 0.04.
    image = torch.tensor([0.2, 0.6]).reshape(1, 2, 1, 1)
    config = settings(augment_contrast=0.4, augment_brightness=0.2, augment_gamma=0.5, augment_noise=0.04)
    changed = change_values(image, Fixed(0.5, -0.5, 1, 0.5), config)
    expected = [(0.4 - 0.2 * 1.2 - 0.1) ** 1.5 + 0.04, (0.4 + 0.2 * 1.2 - 0.1) ** 1.5 + 0.04]
    assert changed.ravel().tolist() == pytest.approx(expected, abs=1e-6)


def test_each_sample_is_turned_by_its_own_extent():
    image, labels, _ = random_batch(2)
    extents = torch.tensor([[350.0, 250.0, 200.0], [350.0, 500.0, 200.0]])
    config = settings(**NO_CHANGE | {"augment_rotation_degrees": 30})
    together = augment(image, labels, extents, config, 1, [0, 1])[1]
    alone = augment(image[1:], labels[1:], extents[1:], config, 1, [1])[1]
    assert torch.equal(together[1:], alone)


def test_values_stay_from_0_to_1_and_outside_is_0():
    image, labels, extent_mm = random_batch()
    config = settings(
        augment_contrast=0.9, augment_brightness=1, augment_gamma=0.9, augment_noise=1, augment_shift=0.4,
        augment_flip=True,
    )  # fmt: skip
    for epoch in range(8):
        changed, moved = augment(image, labels, extent_mm, config, epoch, range(3))
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert changed.isfinite().all()
        assert set(moved.unique().tolist()) <= set(labels.unique().tolist()) | {0, 2, 7, 8, 13}
    # Moved by half its length, half of the volume is outside: 0 in both.
    half = torch.eye(3, 4)
    half[0, 3] = 1
    ones = torch.ones(1, 1, 8, 8, 8)
    image, moved = warp(ones, ones[:, 0].to(torch.uint8), half[None])
    for volume in (image[0, 0], moved[0]):
        assert (volume[:4] == 1).all()
        assert (volume[4:] == 0).all()


def test_a_flip_mirrors_along_x_and_swaps_right_and_left():
    organs = load_config().organs
    assert mirrored_ids(organs) == [0, 1, 13, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 2]
    labels = torch.zeros(2, 6, 1, 1, dtype=torch.uint8)
    labels[:, :, 0, 0] = torch.tensor([0, 1, 2, 13, 7, 8])
    image = torch.arange(12.0).reshape(2, 1, 6, 1, 1) / 12
    flipped, swapped = flip_left_right(image, labels, [True, False], organs)
    assert swapped[0, :, 0, 0].tolist() == [7, 8, 2, 13, 1, 0]
    assert torch.equal(swapped[1], labels[1])
    assert torch.equal(flipped[0, 0, :, 0, 0], torch.tensor([5.0, 4, 3, 2, 1, 0]) / 12)
    assert torch.equal(flipped[1], image[1])
    assert (flipped.dtype, swapped.dtype) == (image.dtype, labels.dtype)
    again = flip_left_right(flipped, swapped, [True, False], organs)
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], labels)


def test_every_second_case_is_flipped_and_only_when_asked():
    image, labels, extent_mm = random_batch(1)
    for asked, expected in ((True, 100), (False, 0)):
        config = settings(**NO_CHANGE, augment_flip=asked)
        flipped = sum(
            not torch.equal(augment(image, labels, extent_mm, config, 1, [position])[1], labels)
            for position in range(200)
        )
        assert abs(flipped - expected) <= (25 if asked else 0)


def test_an_elastic_deformation_is_as_strong_as_asked_for_and_smooth():
    config = settings(augment_elastic=0.02)
    draws = [draw_offsets(np.random.default_rng(i), config) for i in range(200)]
    offsets = smooth(torch.stack(draws), (24, 20, 16)).numpy()  # (200, 3, X, Y, Z) in units of half a volume
    assert offsets.std() / 2 == pytest.approx(0.02, rel=0.05)
    np.testing.assert_allclose(offsets.std(axis=(0, 2, 3, 4)) / 2, 0.02, rtol=0.1)
    # A cubic B-spline of scipy at the same places, from the first draw's coefficients.
    places = np.meshgrid(*[np.linspace(1, draws[0].shape[1] - 2, n) for n in (24, 20, 16)], indexing="ij")
    expected = ndimage.map_coordinates(draws[0][1].numpy().astype(float), places, order=3, prefilter=False)
    np.testing.assert_allclose(offsets[0, 1], expected, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_elastic_deformation_moves_image_and_labels_alike_along_its_own_axis(axis):
    image, labels, _ = random_batch(2)
    matrices = torch.eye(3, 4).expand(2, 3, 4)
    offsets = torch.zeros(2, 3, *[CONTROL_POINTS] * 3)
    offsets[1, axis] = 2 * 3 / image.shape[2 + axis]  # the same for all points: three voxels along the axis
    moved_image, moved = warp(image, labels, matrices, offsets)
    assert torch.equal(moved[0], labels[0])
    moved_image, image, moved, before = (
        volume.movedim(axis, 0) for volume in (moved_image[1, 0], image[1, 0], moved[1], labels[1])
    )
    assert torch.equal(moved[:-3], before[3:])
    torch.testing.assert_close(moved_image[:-3], image[3:], atol=1e-4, rtol=0)
    assert not moved[-3:].any()


def test_an_elastic_deformation_depends_on_the_epoch():
    image, labels, extent_mm = random_batch(2)
    config = settings(**NO_CHANGE | {"augment_elastic": 0.05})
    once, again, other = (augment(image, labels, extent_mm, config, epoch, [0, 1])[1] for epoch in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_a_patch_is_drawn_with_or_without_augmentation():
    image, labels, extent_mm = random_batch(2)
    patch = {"size": (12, 10, 8), "patch_size": (8, 6, 8)}
    plain = settings(**patch, augment=False)
    cut, ids = augment(image, labels, extent_mm, plain, 3, range(2))
    assert (cut.shape, ids.shape) == ((2, 1, 8, 6, 8), (2, 8, 6, 8))
    for i in range(2):
        shifts = [(x, y) for x in range(5) for y in range(5) if torch.equal(image[i, :, x : x + 8, y : y + 6], cut[i])]
        assert len(shifts) == 1
        x, y = shifts[0]
        assert torch.equal(labels[i, x : x + 8, y : y + 6], ids[i])
    again = augment(image[1:], labels[1:], extent_mm[1:], plain, 3, [1])
    assert torch.equal(again[0][0], cut[1])  # its place depends on seed, epoch and position alone
    assert not torch.equal(augment(image, labels, extent_mm, plain, 4, range(2))[0], cut)

    # Augmented by nothing, a patch is a part of the volume, too.
    nothing = settings(**NO_CHANGE, **patch, augment=True, augment_flip=False)
    corners = set()
    for epoch in range(30):
        warped, moved = augment(image, labels, extent_mm, nothing, epoch, range(2))
        near = [
            (x, y)
            for x in range(5)
            for y in range(5)
            if torch.allclose(image[0, :, x : x + 8, y : y + 6], warped[0], atol=1e-4)
        ]
        assert len(near) == 1
        x, y = near[0]
        assert torch.equal(labels[0, x : x + 8, y : y + 6], moved[0])
        corners |= set(near)
    assert len(corners) > 10


def test_a_patch_is_warped_as_the_same_part_of_the_volume():
    image, labels, extent_mm = random_batch(1, (16, 16, 16))
    strong = {"augment_rotation_degrees": 30, "augment_scale": 0.3, "augment_contrast": 0, "augment_brightness": 0}
    strong |= {"augment_gamma": 0, "augment_noise": 0, "augment_elastic": 0, "augment_flip": False, "augment": True}
    for seed in range(3):
        config = settings(size=(16, 16, 16), patch_size=(8, 16, 4), **strong, seed=seed)
        whole, moved = augment(image, labels, extent_mm, replace(config, patch_size=None), 1, [0])
        part, ids = augment(image, labels, extent_mm, config, 1, [0])
        found = [
            (x, z)
            for x in range(9)
            for z in range(13)
            if torch.allclose(whole[..., x : x + 8, :, z : z + 4], part, atol=1e-4)
        ]
        assert len(found) == 1
        x, z = found[0]
        assert torch.equal(moved[:, x : x + 8, :, z : z + 4], ids)


def test_an_elastic_deformation_is_as_steep_in_a_patch_as_in_the_volume():
    size, extent_mm = (16, 12, 8), (350.0, 250.0, 200.0)
    config = settings(augment_elastic=0.02, size=size, patch_size=(8, 9, 8))
    _, in_volume = draw_warp(np.random.default_rng(0), extent_mm, size, replace(config, patch_size=None))
    _, in_patch = draw_warp(np.random.default_rng(0), extent_mm, size, config)
    for axis, share in enumerate((0.5, 0.75, 1)):
        torch.testing.assert_close(in_patch[axis], share * in_volume[axis])
