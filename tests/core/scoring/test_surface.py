"""Surface distances against numbers worked out by hand, against google-deepmind's, and what must hold."""

import math

import numpy as np
import pytest
import surface_distance
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter
from surface_distance.lookup_tables import create_table_neighbour_code_to_surface_area

from core.scoring import surface
from core.scoring.surface import (
    Surfaces,
    element_areas_mm2,
    hausdorff_mm,
    mean_distance_mm,
    neighbour_codes,
    nsd,
    organ_surfaces,
    percentile_mm,
    surfaces_of,
)

SPACING_MM = (0.7, 1.3, 2.5)
PERCENTS = (50, 95, 100)
# Where 38 of 40 equal areas are near, DeepMind's rounding decides whether that is 95 % of them. No small number of
# equal areas makes these percents.
ODD_PERCENTS = (47.3, 94.7, 100)
METHODS = {"tree": 0, "transform": math.inf}  # values of TRANSFORM_BELOW that leave nothing to the other
THE_SAME_EVERY_TIME = settings(derandomize=True, database=None, deadline=None)

# surface-distance imports from parts of scipy that have moved.
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")


def box_mask(shape: tuple, low: tuple, high: tuple) -> np.ndarray:
    """Return a mask of one box, from voxel `low` to below `high`."""
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, low, high))] = True
    return mask


def area_mm2(mask: np.ndarray, spacing_mm: tuple) -> float:
    """Return the area of a mask's whole surface."""
    return float(surfaces_of(mask, mask, spacing_mm).reference_mm2.sum())


def scores_of(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple, tolerance_mm: float, percents: tuple = PERCENTS
) -> list[float]:
    """Return all scores of two masks."""
    both = surfaces_of(reference, prediction, spacing_mm)
    return [nsd(both, tolerance_mm), *(hausdorff_mm(both, percent) for percent in percents), mean_distance_mm(both)]


def scores_by_deepmind(
    reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple, tolerance_mm: float, percents: tuple = PERCENTS
) -> list[float]:
    """Return the same from the package surface-distance, whose means of the two ways are put together by area."""
    both = surface_distance.compute_surface_distances(reference, prediction, spacing_mm)
    areas = [both["surfel_areas_gt"].sum(), both["surfel_areas_pred"].sum()]
    mean = np.average(surface_distance.compute_average_surface_distance(both), weights=areas)
    hausdorff = [surface_distance.compute_robust_hausdorff(both, percent) for percent in percents]
    return [surface_distance.compute_surface_dice_at_tolerance(both, tolerance_mm), *hausdorff, mean]


def blobs(seed: int, shape: tuple = (24, 20, 16), voxels: float = 2.0) -> np.ndarray:
    """Return a mask of smooth blobs over about half of the array, its edges included."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return gaussian_filter(noise, voxels) > 0


@pytest.fixture(params=METHODS)
def method(request, monkeypatch) -> str:
    """Choose one of the two ways to find the nearest point; a call of the other one fails the test."""

    def must_not(*arguments):
        raise AssertionError("the other method was used")

    monkeypatch.setattr(surface, "TRANSFORM_BELOW", METHODS[request.param])
    other = next(name for name in METHODS if name != request.param)
    monkeypatch.setattr(surface, f"nearest_by_{other}", must_not)
    return request.param


# ---- Areas, by hand


def test_area_of_one_voxel():
    # Each corner is cut by the triangle through the middles of its three edges of 1, 2 and 3 mm: 7 / 8 mm2.
    assert area_mm2(np.ones((1, 1, 1), bool), (1, 2, 3)) == pytest.approx(7, abs=1e-12)
    a, b, c = SPACING_MM
    expected = math.sqrt((a * b) ** 2 + (b * c) ** 2 + (c * a) ** 2)
    assert area_mm2(np.ones((1, 1, 1), bool), SPACING_MM) == pytest.approx(expected, abs=1e-12)


def test_area_of_a_box():
    # 3 x 4 x 5 voxels of 1 x 2 x 3 mm: flat sides between bevelled edges, and the eight corners of a single voxel.
    sides = 2 * ((3 * 4) * (2 * 3) + (2 * 4) * (1 * 3) + (2 * 3) * (1 * 2))
    edges = 4 * (2 * 1 * math.sqrt(2**2 + 3**2) + 3 * 2 * math.sqrt(1**2 + 3**2) + 4 * 3 * math.sqrt(1**2 + 2**2)) / 2
    assert area_mm2(np.ones((3, 4, 5), bool), (1, 2, 3)) == pytest.approx(sides + edges + 7, abs=1e-12)


def test_area_of_a_hole_is_that_of_a_voxel():
    block = np.ones((5, 5, 5), bool)
    hollow = block.copy()
    hollow[2, 2, 2] = False
    assert area_mm2(hollow, (1, 2, 3)) - area_mm2(block, (1, 2, 3)) == pytest.approx(7, abs=1e-12)


def test_two_voxels_that_share_a_corner_keep_their_areas():
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert area_mm2(mask, (1, 2, 3)) == pytest.approx(2 * 7, abs=1e-12)


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), SPACING_MM, (5.0, 0.3, 0.31)])
def test_all_256_areas(spacing_mm):
    expected = create_table_neighbour_code_to_surface_area(spacing_mm)
    areas = element_areas_mm2(spacing_mm)
    np.testing.assert_allclose(areas, expected, rtol=0, atol=1e-12)
    assert areas[0] == areas[255] == 0
    assert (areas[1:255] > 0).all()


def test_a_code_has_a_bit_for_each_voxel_around_the_corner():
    mask = np.zeros((2, 3, 4), bool)
    mask[0, 1, 2] = True
    codes = neighbour_codes(mask)
    assert codes.shape == (3, 4, 5)
    assert codes[0:2, 1:3, 2:4].tolist() == [[[1, 2], [4, 8]], [[16, 32], [64, 128]]]
    assert codes.sum() == 255


# ---- Distances, by hand


def test_voxels_apart_along_one_axis(method):
    # Along Y, corners 0 and 1 face corners 3 and 4: half of each surface is 2, the other half 3 voxels of 1.3 mm away.
    reference = box_mask((1, 4, 1), (0, 0, 0), (1, 1, 1))
    prediction = box_mask((1, 4, 1), (0, 3, 0), (1, 4, 1))
    both = surfaces_of(reference, prediction, SPACING_MM)
    assert nsd(both, 2.59) == 0
    assert nsd(both, 2.6) == nsd(both, 3.89) == pytest.approx(0.5)
    assert nsd(both, 2.6) == nsd(both, 2.6 + 1e-12)
    assert nsd(both, 3.91) == 1
    assert hausdorff_mm(both) == hausdorff_mm(both, 95) == pytest.approx(3.9)
    assert hausdorff_mm(both, 50) == pytest.approx(2.6)
    assert mean_distance_mm(both) == pytest.approx(3.25)


def test_voxels_apart_along_two_axes(method):
    # Of four corners one faces the other voxel, 2 voxels of 2 mm and 3 of 1 mm away: 5 mm.
    reference = box_mask((4, 5, 1), (0, 0, 0), (1, 1, 1))
    prediction = box_mask((4, 5, 1), (3, 4, 0), (4, 5, 1))
    both = surfaces_of(reference, prediction, (2, 1, 7))
    assert sorted(set(both.reference_mm)) == pytest.approx([5, math.hypot(4, 4), math.hypot(6, 3), math.hypot(6, 4)])
    assert nsd(both, 5) == pytest.approx(0.25)
    assert hausdorff_mm(both) == pytest.approx(math.hypot(6, 4))


def test_two_parallel_plates(method):
    # One voxel thick, 5 slices of 2.5 mm apart: the near faces are 10 mm from the other plate, the far ones 12.5 mm.
    reference = box_mask((6, 6, 10), (0, 0, 2), (6, 6, 3))
    prediction = box_mask((6, 6, 10), (0, 0, 7), (6, 6, 8))
    both = surfaces_of(reference, prediction, SPACING_MM)
    assert [nsd(both, tolerance) for tolerance in (9.99, 10, 12.49, 12.5)] == [0, 0.5, 0.5, 1]
    assert [hausdorff_mm(both, percent) for percent in (50, 51, 95, 100)] == [10, 12.5, 12.5, 12.5]
    assert mean_distance_mm(both) == pytest.approx(11.25)


def test_each_way_counts_by_its_own_area(method):
    # The prediction's second voxel is made up: its corners are 9 and 10 voxels from the first, which both have.
    reference = box_mask((11, 1, 1), (0, 0, 0), (1, 1, 1))
    prediction = reference | box_mask((11, 1, 1), (10, 0, 0), (11, 1, 1))
    both = surfaces_of(reference, prediction, (1, 2, 3))
    assert nsd(both, 0) == pytest.approx(2 / 3)  # 7 of 7 and 7 of 14 mm2
    assert both.reference_mm.max() == 0
    assert hausdorff_mm(both) == 10
    assert mean_distance_mm(both) == pytest.approx((7 / 2 * 9 + 7 / 2 * 10) / (7 + 14))


def test_a_hand_made_percentile():
    distances, areas = np.array([3.0, 1.0, 2.0, 9.0]), np.array([1.0, 5.0, 3.5, 0.5])
    found = [percentile_mm(distances, areas, p) for p in (0, 49, 50, 51, 85, 85.1, 95, 95.1, 100)]
    assert found == [1, 1, 1, 2, 2, 3, 3, 9, 9]
    assert percentile_mm(np.array([]), np.array([]), 95) == math.inf


def test_the_order_of_adding_up_does_not_move_a_percentile():
    # 38 of 40 equal areas are near, which is 95 % to the last digit or, added up in floating point, a little less.
    distances = np.array([1.0] * 38 + [50.0] * 2)
    for area in np.random.default_rng(0).uniform(0.1, 3, 200):
        areas = np.full(40, area)
        assert percentile_mm(distances, areas, 95) == 1
        assert percentile_mm(distances, areas, 95.001) == 50
        assert percentile_mm(distances, areas, 100) == 50


# ---- Edges


@pytest.mark.filterwarnings("error")
def test_an_organ_in_neither_has_no_scores():
    nothing = np.zeros((3, 4, 5), bool)
    assert all(map(math.isnan, scores_of(nothing, nothing, SPACING_MM, 1)))
    nowhere = np.zeros((0, 0, 0), bool)
    assert all(map(math.isnan, scores_of(nowhere, nowhere, SPACING_MM, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("missed", [True, False])
def test_an_organ_in_one_only_is_infinitely_far(missed):
    masks = [box_mask((4, 4, 4), (1, 1, 1), (3, 3, 3)), np.zeros((4, 4, 4), bool)]
    masks = masks if missed else masks[::-1]
    assert scores_of(*masks, SPACING_MM, 1000) == [0, math.inf, math.inf, math.inf, math.inf]


@pytest.mark.filterwarnings("error")
def test_the_same_mask_twice_is_perfect():
    assert scores_of(blobs(0), blobs(0), SPACING_MM, 0) == [1, 0, 0, 0, 0]


@pytest.mark.filterwarnings("error")
def test_a_mask_that_fills_the_array_has_a_surface():
    full = np.ones((2, 2, 2), bool)
    both = surfaces_of(full, full, (1, 2, 3))
    assert len(both.reference_mm) == 3**3 - 1  # all corners but the middle one
    assert nsd(both, 0) == 1


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"reference of shape \(2, 2, 2\), prediction of shape \(2, 2, 3\)"):
        surfaces_of(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), SPACING_MM)
    label_maps = np.zeros((2, 2, 2), np.uint8), np.zeros((2, 3, 2), np.uint8)
    for labels in label_maps:
        labels[0, 0, 0] = 1  # boxes that fit
    with pytest.raises(ValueError, match=r"reference of shape \(2, 2, 2\), prediction of shape \(2, 3, 2\)"):
        next(organ_surfaces(*label_maps, 2, SPACING_MM))


# ---- Against google-deepmind/surface-distance


@pytest.mark.parametrize("seed", range(6))
def test_smooth_and_noisy_masks_against_deepmind(method, seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(5, 30, 3))
    spacing_mm = tuple(rng.uniform(0.4, 5, 3))
    reference = blobs(seed, shape, 1.5)
    prediction = blobs(seed + 100, shape, 1.5) if seed % 2 else reference ^ (rng.random(shape) < 0.02)
    for tolerance_mm in (0.5, 2, 5):
        ours = scores_of(reference, prediction, spacing_mm, tolerance_mm)
        theirs = scores_by_deepmind(reference, prediction, spacing_mm, tolerance_mm)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


@st.composite
def two_masks(draw) -> tuple[np.ndarray, np.ndarray]:
    """Draw two small masks of the same shape, sparse or dense; some are empty."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    fill = draw(st.booleans())
    return tuple(draw(arrays(bool, shape, fill=st.just(fill))) for _ in range(2))


spacings_mm = st.tuples(*[st.floats(0.2, 6)] * 3)


@THE_SAME_EVERY_TIME
@given(two_masks(), spacings_mm, st.floats(0, 20))
def test_any_masks_against_deepmind(masks, spacing_mm, tolerance_mm):
    assume(masks[0].any() and masks[1].any())
    ours = scores_of(*masks, spacing_mm, tolerance_mm, ODD_PERCENTS)
    theirs = scores_by_deepmind(*masks, spacing_mm, tolerance_mm, ODD_PERCENTS)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


# ---- What must hold


def same_scores(ours: list[float], others: list[float]) -> None:
    np.testing.assert_allclose(ours, others, rtol=0, atol=1e-9)


@THE_SAME_EVERY_TIME
@given(two_masks(), spacings_mm, st.floats(0, 20), st.integers(0, 2), st.permutations(range(3)))
def test_what_changes_no_score(masks, spacing_mm, tolerance_mm, axis, order):
    scores = scores_of(*masks, spacing_mm, tolerance_mm)
    same_scores(scores, scores_of(*masks[::-1], spacing_mm, tolerance_mm))  # truth and prediction swapped
    same_scores(scores, scores_of(*(np.flip(mask, axis) for mask in masks), spacing_mm, tolerance_mm))
    permuted = [mask.transpose(order) for mask in masks]
    same_scores(scores, scores_of(*permuted, tuple(spacing_mm[i] for i in order), tolerance_mm))
    padded = [np.pad(mask, [(1, 4), (0, 2), (3, 0)]) for mask in masks]
    same_scores(scores, scores_of(*padded, spacing_mm, tolerance_mm))


@THE_SAME_EVERY_TIME
@given(two_masks(), spacings_mm, st.floats(0, 20), st.floats(0.1, 10))
def test_what_bounds_a_score(masks, spacing_mm, tolerance_mm, factor):
    both = surfaces_of(*masks, spacing_mm)
    assume(masks[0].any() and masks[1].any())
    assert 0 <= nsd(both, tolerance_mm) <= nsd(both, tolerance_mm + 1) <= 1
    assert nsd(both, hausdorff_mm(both)) == pytest.approx(1)
    assert 0 <= hausdorff_mm(both, 50) <= hausdorff_mm(both, 95) <= hausdorff_mm(both)
    assert mean_distance_mm(both) <= hausdorff_mm(both) + 1e-9
    larger = surfaces_of(*masks, tuple(factor * side for side in spacing_mm))
    assert mean_distance_mm(larger) == pytest.approx(factor * mean_distance_mm(both))
    assert larger.reference_mm2.sum() == pytest.approx(factor**2 * both.reference_mm2.sum())


@THE_SAME_EVERY_TIME
@given(two_masks(), spacings_mm)
def test_tree_and_transform_give_the_same_distances(masks, spacing_mm):
    found = {}
    for name, below in METHODS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surface, "TRANSFORM_BELOW", below)
            found[name] = surfaces_of(*masks, spacing_mm)
    for field in Surfaces.__dataclass_fields__:
        tree, transform = (getattr(found[name], field) for name in METHODS)
        np.testing.assert_allclose(tree, transform, rtol=0, atol=1e-12)


def test_few_points_are_searched_and_many_transformed(monkeypatch):
    asked = []
    for name in METHODS:
        original = getattr(surface, f"nearest_by_{name}")
        monkeypatch.setattr(
            surface, f"nearest_by_{name}", lambda *a, f=original, name=name: (asked.append(name), f(*a))[1]
        )
    far = box_mask((60, 60, 60), (1, 1, 1), (4, 4, 4)), box_mask((60, 60, 60), (50, 50, 50), (53, 53, 53))
    surfaces_of(*far, SPACING_MM)
    assert asked == ["tree", "tree"]
    rng = np.random.default_rng(0)
    surfaces_of(*(rng.random((30, 30, 30)) < 0.05 for _ in range(2)), SPACING_MM)
    assert asked[2:] == ["transform", "transform"]


def test_threads_change_nothing(monkeypatch):
    monkeypatch.setattr(surface, "TRANSFORM_BELOW", METHODS["tree"])
    one, two = (surfaces_of(blobs(1), blobs(2), SPACING_MM, workers) for workers in (1, 2))
    for field in Surfaces.__dataclass_fields__:
        assert getattr(one, field).tolist() == getattr(two, field).tolist()


# ---- What comes in


@pytest.mark.parametrize(
    "lay",
    [
        np.asfortranarray,
        lambda mask: mask.astype(np.uint8),
        lambda mask: mask.astype(np.int64) * 3,
        lambda mask: np.repeat(mask, 2, axis=1)[:, ::2],
        lambda mask: np.ascontiguousarray(mask[::-1])[::-1],
    ],
    ids=["Fortran", "uint8", "int64", "every second voxel of a larger one", "backwards"],
)
def test_how_a_mask_is_kept_changes_nothing(lay):
    expected = scores_of(blobs(1), blobs(2), SPACING_MM, 1)
    assert scores_of(lay(blobs(1)), blobs(2), SPACING_MM, 1) == expected
    assert scores_of(blobs(1), lay(blobs(2)), SPACING_MM, 1) == expected


@pytest.mark.parametrize("kind", [list, np.array, lambda spacing: np.array(spacing, np.float32)])
def test_how_a_spacing_is_kept_changes_nothing(method, kind):
    in_float32 = tuple(map(float, np.array(SPACING_MM, np.float32)))
    both, expected = (surfaces_of(blobs(1), blobs(2), spacing_mm) for spacing_mm in (kind(in_float32), in_float32))
    for field in Surfaces.__dataclass_fields__:
        assert getattr(both, field).dtype == np.float64
        assert getattr(both, field).tolist() == getattr(expected, field).tolist()


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_each_organ_of_a_label_map_is_scored_by_its_own_masks(kind):
    rng = np.random.default_rng(0)
    reference = (blobs(1) + 2 * blobs(2)).astype(kind)
    prediction = np.where(rng.random(reference.shape) < 0.1, 5, reference).astype(kind)
    prediction[prediction == 3] = 1
    reference[:9], prediction[:, 15:] = 0, 0  # the boxes of an organ are not those of the other map
    found = list(organ_surfaces(reference, prediction, 7, SPACING_MM))  # 3 is missed, 5 made up, 4 and 6 in neither
    assert len(found) == 6
    for organ, both in enumerate(found, start=1):
        expected = surfaces_of(reference == organ, prediction == organ, SPACING_MM)
        for field in Surfaces.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(both, field), getattr(expected, field))
    assert [nsd(both, 0.5) > 0 for both in found] == [True, True, False, False, False, False]
    assert [math.isnan(nsd(both, 0.5)) for both in found] == [False, False, False, True, False, True]


def test_background_alone_yields_nothing():
    assert list(organ_surfaces(np.zeros((3, 3, 3), np.uint8), np.zeros((3, 3, 3), np.uint8), 1, SPACING_MM)) == []
