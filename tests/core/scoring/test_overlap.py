"""Scores against numbers worked out by hand, against plain boolean masks and against scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from core.scoring import overlap as metrics
from core.scoring.overlap import SCORES, confusion_matrix, mean_defined, organ_scores, voxel_accuracy

NAN = math.nan


def scores_of(reference, prediction, classes: int) -> dict[str, np.ndarray]:
    return organ_scores(confusion_matrix(np.array(reference), np.array(prediction), classes))


def by_masks(reference: np.ndarray, prediction: np.ndarray, organ: int) -> dict[str, float]:
    """Return the scores of one organ from the textbook's four counts, without a confusion matrix."""
    expected, found = reference == organ, prediction == organ
    hits, false_alarms = int((expected & found).sum()), int((~expected & found).sum())
    misses, rest = int((expected & ~found).sum()), int((~expected & ~found).sum())
    occurs = hits + false_alarms + misses > 0
    return {
        "dice": 2 * hits / (expected.sum() + found.sum()) if occurs else NAN,
        "precision": hits / found.sum() if found.any() else NAN,
        "recall": hits / expected.sum() if expected.any() else NAN,
        "accuracy": (hits + rest) / expected.size if occurs else NAN,
    }


# ---- Counting


def test_a_matrix_counted_by_hand():
    reference = np.array([[0, 0, 1], [1, 1, 2]])
    prediction = np.array([[0, 1, 1], [1, 2, 0]])
    matrix = confusion_matrix(reference, prediction, 4)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [
        [1, 1, 0, 0],  # of two background voxels one was called organ 1
        [0, 2, 1, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 105, 1000])
def test_cutting_into_chunks_changes_nothing(monkeypatch, chunk):
    rng = np.random.default_rng(0)
    reference, prediction = rng.integers(0, 4, (2, 5, 3, 7)).astype(np.uint8)
    expected = [[int(((reference == i) & (prediction == j)).sum()) for j in range(4)] for i in range(4)]
    monkeypatch.setattr(metrics, "CHUNK_VOXELS", chunk)
    assert confusion_matrix(reference, prediction, 4).tolist() == expected


def test_a_volume_larger_than_a_chunk():
    voxels = metrics.CHUNK_VOXELS + 5
    reference, prediction = np.zeros(voxels, np.uint8), np.zeros(voxels, np.uint8)
    reference[-5:], prediction[-2:] = 1, 1
    assert confusion_matrix(reference, prediction, 2).tolist() == [[voxels - 5, 0], [3, 2]]


def test_how_the_arrays_lie_in_memory_changes_nothing():
    rng = np.random.default_rng(1)
    reference, prediction = rng.integers(0, 5, (2, 6, 5, 4)).astype(np.uint8)
    expected = confusion_matrix(reference, prediction, 5).tolist()
    assert expected == [[int(((reference == i) & (prediction == j)).sum()) for j in range(5)] for i in range(5)]
    layouts = {
        "C": lambda a: a,
        "Fortran": np.asfortranarray,
        "a view with its axes swapped": lambda a: np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0),
        "every second voxel of a larger one": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        "backwards": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    }
    for first, lay_reference in layouts.items():
        for second, lay_prediction in layouts.items():
            matrix = confusion_matrix(lay_reference(reference), lay_prediction(prediction), 5)
            assert matrix.tolist() == expected, (first, second)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.uint64, ">i4"])
@pytest.mark.parametrize("classes", [2, 14, 16, 17, 255, 256])  # a pair of ids needs 8 bits up to 16, 16 bits up to 256
def test_the_highest_id_does_not_run_over_a_small_type(kind, classes):
    reference, prediction = np.array([classes - 1, classes - 1, 0], kind), np.array([classes - 1, 0, classes - 1], kind)
    matrix = confusion_matrix(reference, prediction, classes)
    assert matrix[-1, -1] == matrix[-1, 0] == matrix[0, -1] == 1
    assert matrix.sum() == 3


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(derandomize=True, database=None, deadline=None)
@given(st.data(), st.integers(1, 256), array_shapes(max_dims=3, max_side=6))
def test_any_label_maps_against_scikit_learn(data, classes, shape):
    kinds = st.sampled_from([np.uint8, np.int16, np.uint16, np.int64])
    ids = st.integers(0, classes - 1)
    reference, prediction = (data.draw(arrays(data.draw(kinds), shape, elements=ids)) for _ in range(2))
    matrix = confusion_matrix(reference, prediction, classes)
    flat = reference.ravel(), prediction.ravel()
    expected = sklearn.metrics.confusion_matrix(*flat, labels=range(classes))
    np.testing.assert_array_equal(matrix, expected)
    assert voxel_accuracy(matrix) == pytest.approx(sklearn.metrics.accuracy_score(*flat))


@pytest.mark.parametrize(
    ("reference", "prediction", "complaint"),
    [
        ([0, 3], [0, 0], "got ids from 0 to 3, expected 0 to 2"),
        ([0, 0], [0, 3], "got ids from 0 to 3, expected 0 to 2"),
        ([1, -1], [0, 0], "got ids from -1 to 1, expected 0 to 2"),
        ([1, 1], [0, -1], "got ids from -1 to 0, expected 0 to 2"),  # 1 * 3 - 1 is the cell of another pair
        ([0, 256], [0, 0], "got ids from 0 to 256, expected 0 to 2"),  # in 8 bits it would be 0
        ([0, 0, 0], [0, 0], r"reference of shape \(3,\), prediction of shape \(2,\)"),
        ([0, 1], [0.0, 1.5], "got ids of type float64, expected integers"),
        ([0.0, math.nan], [0, 1], "got ids of type float64, expected integers"),
    ],
)
def test_ids_and_shapes_that_cannot_be_are_refused(reference, prediction, complaint):
    with pytest.raises(ValueError, match=complaint):
        confusion_matrix(np.array(reference), np.array(prediction), 3)


def test_empty_arrays_count_nothing_and_define_nothing():
    matrix = confusion_matrix(np.zeros((0, 3), np.uint8), np.zeros((0, 3), np.uint8), 3)
    assert matrix.tolist() == [[0, 0, 0]] * 3
    assert all(np.isnan(values).all() for values in organ_scores(matrix).values())


# ---- Scoring


def test_scores_worked_out_by_hand():
    # Organ 1: 3 voxels to find, 4 found, 2 of them right, in 10 voxels in all.
    scores = scores_of([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0, 0, 0], 2)
    assert list(scores) == list(SCORES)
    assert scores["dice"][1] == pytest.approx(4 / 7)
    assert scores["precision"][1] == pytest.approx(2 / 4)
    assert scores["recall"][1] == pytest.approx(2 / 3)
    assert scores["accuracy"][1] == pytest.approx(7 / 10)  # 2 found and 5 rightly left alone


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], (1, 1, 1, 1)),
        ([1, 1, 0, 0], [0, 0, 1, 0], (0, 0, 0, 1 / 4)),
        ([1, 0, 0, 0], [0, 0, 0, 0], (0, NAN, 0, 3 / 4)),
        ([0, 0, 0, 0], [1, 0, 0, 0], (0, 0, NAN, 3 / 4)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (NAN, NAN, NAN, NAN)),
    ],
    ids=["all of it", "beside it", "missed", "made up", "in neither"],
)
def test_every_row_of_the_table(reference, prediction, expected):
    scores = scores_of(reference, prediction, 2)
    np.testing.assert_equal(tuple(scores[name][1] for name in SCORES), expected)


def test_a_small_organ_wholly_missed_still_has_an_accuracy_near_1():
    reference = np.zeros((20, 20, 20), np.uint8)
    reference[9:11, 9:11, 9:11] = 1
    scores = scores_of(reference, np.zeros_like(reference), 2)
    assert scores["accuracy"][1] == pytest.approx(1 - 8 / 8000)
    assert scores["dice"][1] == 0


def test_scores_of_many_organs_against_boolean_masks():
    rng = np.random.default_rng(2)
    reference = rng.choice(6, (7, 8, 9), p=[0.7, 0.1, 0.1, 0.1, 0, 0]).astype(np.uint8)
    prediction = np.where(rng.random((7, 8, 9)) < 0.3, rng.choice([0, 1, 3, 4], (7, 8, 9)), reference)
    prediction[prediction == 2] = 0
    scores = scores_of(reference, prediction, 6)  # 2 is missed, 4 made up, 5 in neither
    for organ in range(6):
        expected = by_masks(reference, prediction, organ)
        np.testing.assert_allclose([scores[name][organ] for name in SCORES], [expected[name] for name in SCORES])


def test_reference_and_prediction_swapped_swap_precision_and_recall():
    rng = np.random.default_rng(3)
    reference, prediction = rng.integers(0, 3, (2, 100))
    scores, swapped = scores_of(reference, prediction, 3), scores_of(prediction, reference, 3)
    assert scores["precision"].tolist() == swapped["recall"].tolist()
    assert scores["dice"].tolist() == swapped["dice"].tolist()
    assert scores["precision"].tolist() != scores["recall"].tolist()


@pytest.mark.filterwarnings("error")
def test_what_is_not_defined_warns_of_nothing():
    scores_of([0, 0], [0, 0], 3)


def test_the_accuracy_of_all_classes_at_once_counts_each_voxel_once():
    matrix = confusion_matrix(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 0]), 3)
    assert voxel_accuracy(matrix) == pytest.approx(2 / 5)
    # One against the rest, a voxel with a wrong id is wrong for two organs and right for all the others.
    assert organ_scores(matrix)["accuracy"].tolist() == pytest.approx([3 / 5, 3 / 5, 3 / 5])


@pytest.mark.filterwarnings("error")
def test_no_voxels_have_no_accuracy():
    assert math.isnan(voxel_accuracy(np.zeros((3, 3), np.int64)))


# ---- Means


def test_a_mean_passes_over_what_is_not_defined_and_counts_the_rest():
    assert mean_defined([1.0, NAN, 0.5, NAN]) == (0.75, 2)
    assert mean_defined(iter([0.0, 1.0])) == (0.5, 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [NAN, NAN]])
def test_a_mean_of_nothing_is_not_defined(values):
    mean, count = mean_defined(values)
    assert math.isnan(mean)
    assert count == 0
