"""Scores of a label map against a reference: arrays in, numbers out.

Every score is read off one confusion matrix. A score is NaN where it is not defined, never a made-up 0 or 1:

    reference   prediction   Dice   precision   recall   accuracy
    organ       organ        0..1   0..1        0..1     0..1
    organ       -            0      NaN         0        0..1
    -           organ        0      0           NaN      0..1
    -           -            NaN    NaN         NaN      NaN
"""

from collections.abc import Iterable

import numpy as np

SCORES = ("dice", "precision", "recall", "accuracy")
CHUNK_VOXELS = 2**22  # counted at a time, so that the pairs' indices take 32 MiB and not 8 times the volume


def confusion_matrix(reference: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count how often each pair of ids meets.

    Args:
        reference: label map, any shape, whole numbers from 0 to below `classes`.
        prediction: label map of the same shape.
        classes: K, the number of classes with background.

    Returns:
        (K, K) int64; row: id in the reference, column: id in the prediction. All zeros for empty arrays.

    Raises:
        ValueError: when the shapes differ or an id is out of range.
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"reference of shape {reference.shape}, prediction of shape {prediction.shape}")
    for labels in (reference, prediction):
        lowest, highest = labels.min(initial=0), labels.max(initial=0)
        if lowest < 0 or highest >= classes:
            raise ValueError(f"got ids from {lowest} to {highest}, expected 0 to {classes - 1}")
    flat_reference, flat_prediction = reference.ravel(), prediction.ravel()
    counts = np.zeros(classes * classes, dtype=np.int64)
    for start in range(0, flat_reference.size, CHUNK_VOXELS):
        chunk = slice(start, start + CHUNK_VOXELS)
        pairs = flat_reference[chunk].astype(np.intp) * classes + flat_prediction[chunk].astype(np.intp)
        counts += np.bincount(pairs, minlength=classes * classes)
    return counts.reshape(classes, classes)


def organ_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Dice, precision, recall and accuracy of each class, one against the rest.

    Accuracy is (true positives + true negatives) / all voxels. It is near 1 even for an organ that was wholly missed,
    because nearly every voxel belongs to something else; read Dice instead.

    Args:
        matrix: (K, K) from `confusion_matrix`.

    Returns:
        for each name of SCORES an array (K,), NaN where it is not defined; index 0 is the background.
    """
    total = matrix.sum()
    in_both = np.diag(matrix).astype(np.float64)
    in_reference = matrix.sum(axis=1)
    in_prediction = matrix.sum(axis=0)
    wrong = in_reference + in_prediction - 2 * in_both
    occurs = in_reference + in_prediction > 0
    return {
        "dice": divide(2 * in_both, in_reference + in_prediction),
        "precision": divide(in_both, in_prediction),
        "recall": divide(in_both, in_reference),
        "accuracy": divide((total - wrong) * occurs, total * occurs),
    }


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """`numerator / denominator`, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator != 0)


def mean_defined(values: Iterable[float]) -> tuple[float, int]:
    """The mean over the values that are defined (not NaN), and how many they are; (NaN, 0) when there is none."""
    values = np.asarray(list(values), dtype=np.float64)
    defined = values[~np.isnan(values)]
    return (float(defined.mean()), len(defined)) if len(defined) else (float("nan"), 0)
