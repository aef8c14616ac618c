"""Scores of a label map against a reference: arrays in, numbers out.

Every score is computed from one confusion matrix. A score that is not defined is NaN, never a made-up 0 or 1:

    reference   prediction   Dice   precision   recall   accuracy
    organ       organ        0..1   0..1        0..1     0..1
    organ       -            0      NaN         0        0..1
    -           organ        0      0           NaN      0..1
    -           -            NaN    NaN         NaN      NaN
"""

from collections.abc import Iterable

import numpy as np

SCORES = ("dice", "precision", "recall", "accuracy")
CHUNK_VOXELS = 2**18  # counted at a time; intermediate results stay in the processor's cache


def confusion_matrix(reference: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count how often each pair of ids meets.

    Args:
        reference: label map, any shape, any type of integer, ids from 0 to below `classes`.
        prediction: label map of the same shape.
        classes: K, the number of classes with background.

    Returns:
        (K, K) int64; row: id in the reference, column: id in the prediction. All zeros for empty arrays.

    Raises:
        ValueError: when the shapes differ, the ids are no integers, or an id is out of range.
    """
    check_ids(reference, prediction, classes)
    kind = np.min_scalar_type(classes**2 - 1)  # the smallest type that holds every pair: 8 bits for up to 16 classes
    counts = np.zeros(classes**2, dtype=np.int64)
    # In the order of the arrays' memory, whatever it is, and without a copy of the whole.
    chunks = np.nditer(
        [reference, prediction],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_dtypes=[kind, kind],
        casting="unsafe",
        buffersize=CHUNK_VOXELS,
    )
    for reference_ids, prediction_ids in chunks:
        pairs = reference_ids * kind.type(classes) + prediction_ids
        # Most voxels are background in both; only the others are counted one by one.
        counts += np.bincount(pairs[pairs != 0], minlength=classes**2)
    counts[0] = reference.size - counts.sum()
    return counts.reshape(classes, classes)


def check_ids(reference: np.ndarray, prediction: np.ndarray, classes: int) -> None:
    """Refuse, by a ValueError, label maps of different shapes, or with ids other than 0 to below `classes`."""
    if reference.shape != prediction.shape:
        raise ValueError(f"reference of shape {reference.shape}, prediction of shape {prediction.shape}")
    for labels in (reference, prediction):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"got ids of type {labels.dtype}, expected integers")
        lowest, highest = labels.min(initial=0), labels.max(initial=0)
        if lowest < 0 or highest >= classes:
            raise ValueError(f"got ids from {lowest} to {highest}, expected 0 to {classes - 1}")


def organ_scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Compute Dice, precision, recall and accuracy of each class, one against the rest.

    Accuracy is (true positives + true negatives) / all voxels. It is near 1 even for an organ that was wholly missed,
    because nearly every voxel belongs to another class; read Dice instead.

    Args:
        matrix: (K, K) from `confusion_matrix`.

    Returns:
        for each name of SCORES an array (K,), NaN when not defined; index 0 is the background.
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


def voxel_accuracy(matrix: np.ndarray) -> float:
    """Return the share of all voxels whose id is right, 0..1, background included.

    Args:
        matrix: (K, K) from `confusion_matrix`.

    Returns:
        NaN when no voxel was counted.
    """
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return `numerator / denominator`, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def mean_defined(values: Iterable[float]) -> tuple[float, int]:
    """Return the mean of the defined values (not NaN) and their number; (NaN, 0) when there is none."""
    values = np.asarray(list(values), dtype=np.float64)
    defined = values[~np.isnan(values)]
    return (float(defined.mean()), len(defined)) if len(defined) else (float("nan"), 0)
