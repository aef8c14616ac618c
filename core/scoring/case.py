"""The scores of one case: two label maps on disk in, a row per organ out; and the ceiling that a grid sets.

Two protocols: the default one, in which a score that is not defined is NaN, and that of the FLARE22 challenge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import Reading
from core.scans.resample import apply_weights, axis_weights, logits_to_labels, resize_labels
from core.scans.volumes import DEFAULT_READING, load_labels
from core.scoring.flare22 import flare22_scores
from core.scoring.overlap import SCORES, confusion_matrix, organ_scores, voxel_accuracy
from core.scoring.surface import hausdorff_mm, mean_distance_mm, nsd, organ_surfaces

DIGITS = 6  # significant ones of a number in a row; all means are of the numbers as they stand there
SURFACE_SCORES = ("nsd", "hd95_mm")
DISTANCES = ("hd_mm", "mean_distance_mm")
COMPARED = ("dice", "nsd")
CEILING_SCORES = ("dice", "nsd", "dice_as_labels", "nsd_as_labels")
# What each score and each protocol means, for whoever reads the files.
SCORE_DEFINITIONS = {
    "default": {
        "dice": "2 TP / (2 TP + FP + FN), voxels of one organ in one case; null where it is in neither label map",
        "precision": "TP / (TP + FP); null where nothing was predicted",
        "recall": "TP / (TP + FN); null where there is nothing to find",
        "accuracy": "(TP + TN) / all voxels, one organ against the rest; near 1 even for an organ wholly missed",
        "nsd": "share of both surfaces' area within tolerances_mm of the other, as surface-distance defines it; 0 "
        "where the organ is in one label map only, null where it is in neither",
        "hd95_mm": "distance within which 95 % of a surface's area lies of the other, the larger of the two ways; "
        "infinite where the organ is in one label map only: mean and sd are null then",
        "hd_mm": "as hd95_mm, for 100 %",
        "mean_distance_mm": "mean distance to the other surface over both surfaces' area; infinite as hd95_mm",
        "missing": "cases without a prediction, scored as if an empty label map had been predicted",
    },
    "flare22": {
        "dice": "as the challenge's script: 1 where the organ is in neither label map; aorta, inferior vena cava and "
        "esophagus only within the reference's slices without the last of them; rounded to 4 places",
        "nsd": "as the challenge's script: within the same slices, 1 where the organ is in neither label map, 0 where "
        "Dice is below 0.2; rounded to 4 places",
        "missing": "cases without a prediction, with 0 for every organ",
    },
}


@dataclass(frozen=True)
class Rules:
    """How cases are scored: all that a worker needs to know.

    Attributes:
        organs: names by id, background first.
        tolerances_mm: of NSD, by id, background first.
        protocol: default or flare22.
        distances: whether DISTANCES are wanted too.
        size: the grid whose ceiling is wanted, or None.
        threads: for one case's nearest neighbours.
        reading: what is accepted of label maps.
    """

    organs: tuple[str, ...]
    tolerances_mm: tuple[float, ...]
    protocol: str
    distances: bool
    size: tuple[int, int, int] | None
    threads: int = 1
    reading: Reading = DEFAULT_READING

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of what is scored."""
        if self.size:
            return CEILING_SCORES
        if self.protocol == "flare22":
            return COMPARED
        return (*SCORES, *SURFACE_SCORES, *(DISTANCES if self.distances else ()))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the CSV file; those that the protocol does not know stay empty."""
        names = CEILING_SCORES if self.size else (*SCORES, *SURFACE_SCORES, "reference_ml", "predicted_ml")
        return ("case", "id", "organ", *names, *(DISTANCES if self.distances else ()))


@dataclass(frozen=True)
class Task:
    """A case to be scored; `prediction` is None where there is none."""

    case: str
    reference: Path
    prediction: Path | None = None


@dataclass(frozen=True)
class Scored:
    """What came of a case: its rows of the CSV file, an organ each, or no row and why it was refused."""

    rows: Sequence[dict] = ()
    voxel_accuracy: float = math.nan
    refusal: str | None = None


def unnoticed() -> None:
    """What is called after each organ where nobody waits for it."""


# ---- One case --------------------------------------------------------------------------------------------------------


def score_case(task: Task, rules: Rules, tick: Callable[[], object] = unnoticed) -> Scored:
    """Score one case. What is wrong with its files becomes its refusal; `tick` is called after each organ."""
    try:
        expected, geometry = load_labels(task.reference, len(rules.organs), rules.reading)
        if rules.size:
            return measure_ceiling(task.case, expected, geometry, rules)
        predicted = np.zeros_like(expected)
        if task.prediction:
            predicted, predicted_geometry = load_labels(task.prediction, len(rules.organs), rules.reading)
            check_same_grid(geometry, predicted_geometry, f"case {task.case}", "the reference", "the prediction")
        matrix = confusion_matrix(expected, predicted, len(rules.organs))
        if rules.protocol == "flare22" and not task.prediction:
            scores = [{"dice": 0.0, "nsd": 0.0} for _ in rules.organs[1:]]
        else:
            scores = score_organs(expected, predicted, matrix, geometry, rules, tick)
        volumes_ml = matrix[1:].sum(axis=1) * geometry.voxel_ml, matrix[:, 1:].sum(axis=0) * geometry.voxel_ml
        for of_organ, reference_ml, predicted_ml in zip(scores, *volumes_ml, strict=True):
            of_organ |= {"reference_ml": reference_ml, "predicted_ml": predicted_ml}
        return Scored(as_rows(task.case, scores, rules.organs), float(voxel_accuracy(matrix)))
    except (ValueError, OSError, MemoryError) as error:
        reason = str(error) or "memory ran out"
        return Scored(refusal=reason if task.case in reason else f"case {task.case}: {reason}")


def score_organs(
    expected: np.ndarray,
    predicted: np.ndarray,
    matrix: np.ndarray,
    geometry: Geometry,
    rules: Rules,
    tick: Callable[[], object] = unnoticed,
) -> list[dict[str, float]]:
    """The scores of organ 1, 2, ...; NaN where not defined.

    Args:
        expected: label map, (X, Y, Z) uint8 in RAS+ order.
        predicted: label map of the same shape.
        matrix: (K, K), their confusion matrix.
        geometry: of both.
        rules: how to score.
        tick: called after each organ.
    """
    scores = []
    if rules.protocol == "flare22":
        stored = [geometry.from_ras(labels) for labels in (expected, predicted)]
        pixdim_mm = [float(mm) for mm in geometry.header.get_zooms()]
        for dice, surface_dice in flare22_scores(*stored, rules.organs, rules.tolerances_mm, pixdim_mm, rules.threads):
            scores.append({"dice": dice, "nsd": surface_dice})
            tick()
        return scores
    overlap = organ_scores(matrix)
    surfaces = organ_surfaces(expected, predicted, len(rules.organs), geometry.spacing_mm, rules.threads)
    for organ, both in enumerate(surfaces, start=1):
        of_organ = {name: overlap[name][organ] for name in SCORES}
        of_organ |= {"nsd": nsd(both, rules.tolerances_mm[organ]), "hd95_mm": hausdorff_mm(both, 95)}
        if rules.distances:
            of_organ |= {"hd_mm": hausdorff_mm(both), "mean_distance_mm": mean_distance_mm(both)}
        scores.append(of_organ)
        tick()
    return scores


def as_rows(case: str, scores: Sequence[dict[str, float]], organs: Sequence[str]) -> list[dict]:
    """The rows of one case, with numbers as they will stand in the file."""
    return [
        {"case": case, "id": organ, "organ": organs[organ]}
        | {name: float(f"{value:.{DIGITS}g}") for name, value in of_organ.items()}
        for organ, of_organ in enumerate(scores, start=1)
    ]


# ---- The ceiling -----------------------------------------------------------------------------------------------------


def measure_ceiling(case: str, labels: np.ndarray, geometry: Geometry, rules: Rules) -> Scored:
    """Score the truth itself, (X, Y, Z), pushed through the grid of `rules.size` and back, in two ways.

    dice, nsd: `from_shares`. A network that knows all that its voxels hold, and answers with it, scores this. It is no
    bound by proof: logits fitted to one scan's own full-size labels could draw finer borders still.
    dice_as_labels, nsd_as_labels: `from_labels`. A network that repeats its training labels and no more scores this.
    """
    torch.set_num_threads(1)  # cases are done side by side, and the numbers shall not depend on the machine
    scores = [{} for _ in rules.organs[1:]]
    for ending, there_and_back in (("", from_shares), ("_as_labels", from_labels)):
        restored = there_and_back(labels, rules)
        matrix = confusion_matrix(labels, restored, len(rules.organs))
        for of_organ, found in zip(scores, score_organs(labels, restored, matrix, geometry, rules), strict=True):
            of_organ |= {f"{name}{ending}": found[name] for name in COMPARED}
    return Scored(as_rows(case, scores, rules.organs))


def from_shares(labels: np.ndarray, rules: Rules) -> np.ndarray:
    """Labels, (X, Y, Z), restored like a network's logits from each organ's true share of every voxel of the grid."""
    weights = [axis_weights(n_in, n_out, antialias=True) for n_in, n_out in zip(labels.shape, rules.size, strict=True)]
    shares = torch.zeros((len(rules.organs), *rules.size))
    for organ in range(len(rules.organs)):
        mask = labels == organ
        if mask.any():
            shares[organ] = apply_weights(torch.from_numpy(mask).float(), weights)
    return logits_to_labels(shares, labels.shape)


def from_labels(labels: np.ndarray, rules: Rules) -> np.ndarray:
    """Labels, (X, Y, Z), restored from the labels that a network is trained on."""
    return resize_labels(resize_labels(labels, rules.size), labels.shape)
