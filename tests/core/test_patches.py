"""Patches: where they lie, what is drawn of a case, and that predictions of a grid are the mean over them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from core.patches import InPatches, draw_patches, mean_over_patches, patch_boxes, patch_to_volume, patch_weights


@pytest.mark.parametrize(
    ("size", "patch_size", "count"),
    [((8, 8, 8), (8, 8, 8), 1), ((12, 8, 9), (8, 8, 8), 4), ((16, 12, 8), (8, 8, 8), 6), ((17, 8, 8), (4, 8, 8), 8)],
)
def test_places_cover_the_grid_and_overlap_by_half(size, patch_size, count):
    found = patch_boxes(size, patch_size)
    assert len(found) == count
    covered = np.zeros(size, int)
    for place in found:
        covered[place] += 1
        assert covered[place].shape == patch_size  # none leaves the grid
    assert covered.min() >= 1
    for axis, length in enumerate(patch_size):
        starts = sorted({place[axis].start for place in found})
        assert (starts[0], starts[-1]) == (0, size[axis] - length)
        assert all(b - a <= length / 2 for a, b in pairwise(starts))


def test_a_patchs_centre_counts_most():
    weights = patch_weights((16, 8, 8))
    assert weights.shape == (16, 8, 8)
    assert weights[7, 3, 3] == weights.max()
    assert weights[0, 0, 0] == weights.min() == pytest.approx(1e-3)
    # Half a voxel off the centre along Y and Z, 3.5 along X, whose deviation is 2 and that of the others 1.
    assert weights[4, 3, 3].item() == pytest.approx(np.exp(-(3.5**2) / 8 - 0.125 - 0.125))


def test_a_network_that_looks_at_voxels_alone_predicts_the_same_in_patches():
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 5, 1)
    image = torch.rand(2, 1, 13, 8, 9)
    with torch.no_grad():
        expected, found = network(image), InPatches(network, (8, 8, 4))(image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.softmax(dim=1), expected.softmax(dim=1))


def test_probabilities_are_averaged_by_weight():
    seen = []

    def network(part: torch.Tensor) -> torch.Tensor:
        """Predict class 0 with odds of 1:1 in the first patch and of 3:1 in the second."""
        seen.append(tuple(part.shape))
        logits = torch.zeros(1, 2, *part.shape[2:])
        logits[:, 0] = np.log([1.0, 3.0][len(seen) - 1])
        return logits

    found = mean_over_patches(network, torch.rand(1, 1, 6, 4, 4), (4, 4, 4)).softmax(dim=1)[0, 0]
    assert seen == [(1, 1, 4, 4, 4)] * 2
    weights = patch_weights((4, 4, 4))
    assert found[0, 0, 0].item() == pytest.approx(0.5)
    assert found[5, 0, 0].item() == pytest.approx(0.75)
    first, second = weights[2, 1, 1].item(), weights[0, 1, 1].item()  # of the voxel 2, 1, 1 of the grid
    assert found[2, 1, 1].item() == pytest.approx((0.5 * first + 0.75 * second) / (first + second))


def test_numbers_that_are_not_finite_stay_so():
    logits = mean_over_patches(lambda part: part.repeat(1, 2, 1, 1, 1) + np.nan, torch.ones(1, 1, 6, 4, 4), (4, 4, 4))
    assert logits.isnan().all()


def test_patches_of_image_and_labels_are_drawn_at_the_same_place_anywhere():
    size, patch_size = (6, 5, 4), (4, 4, 4)
    labels = torch.arange(120).reshape(1, *size).repeat(2, 1, 1, 1)
    corners = []
    for seed in range(40):
        draws = [np.random.default_rng([seed, position]) for position in range(2)]
        image, cut = draw_patches(labels[:, None].float(), labels, patch_size, draws)
        assert torch.equal(image[:, 0], cut.float())
        assert cut.shape == (2, *patch_size)
        corners += cut[:, 0, 0, 0].tolist()
        x, y, z = np.unravel_index(cut[1, 0, 0, 0].item(), size)
        assert torch.equal(cut[1], labels[1, x : x + 4, y : y + 4, z : z + 4])
    assert set(corners) == {np.ravel_multi_index((x, y, 0), size) for x in range(3) for y in range(2)}


def test_a_window_maps_the_patch_to_its_place():
    window = patch_to_volume((slice(2, 6), slice(0, 4), slice(0, 8)), (8, 4, 16))
    corners = window @ torch.tensor([[-1.0, -1, -1, 1], [1, 1, 1, 1]]).T
    torch.testing.assert_close(corners[:3].T, torch.tensor([[-0.5, -1, -1], [0.5, 1, 0]]))
