"""Score one case: two label maps on disk in, a row per organ out.

There are two protocols: the default one, in which a score that is not defined is NaN, and the FLARE22 challenge's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import Reading
from core.scans.organ_names import check_organ_names
from core.scans.volumes import DEFAULT_READING, load_labels
from core.scoring.flare22 import flare22_scores
from core.scoring.overlap import SCORES, confusion_matrix, organ_scores, voxel_accuracy
from core.scoring.surface import hausdorff_mm, mean_distance_mm, nsd, organ_surfaces

DIGITS = 6  # significant digits of a number in a row; all means are computed from the rounded numbers
SURFACE_SCORES = ("nsd", "hd95_mm")
DISTANCES = ("hd_mm", "mean_distance_mm")
COMPARED = ("dice", "nsd")
CEILING_SCORES = ("dice", "nsd", "dice_as_labels", "nsd_as_labels")


@dataclass(frozen=True)
class Rules:
    """How cases are scored; all that a worker process needs to know.

    Attributes:
        organs: names by id, background first.
        tolerances_mm: of NSD, by id, background first.
        protocol: default or flare22.
        distances: whether DISTANCES are wanted too.
        size: the grid whose ceiling is wanted, or None.
        threads: for one case's nearest neighbours.
        reading: what is accepted of label maps.
        organs_note: where the names come from, when the user should know.
    """

    organs: tuple[str, ...]
    tolerances_mm: tuple[float, ...]
    protocol: str
    distances: bool
    size: tuple[int, int, int] | None
    threads: int = 1
    reading: Reading = DEFAULT_READING
    organs_note: str | None = None

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores."""
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
    """A case to be scored; `prediction` is None when there is none."""

    case: str
    reference: Path
    prediction: Path | None = None


@dataclass(frozen=True)
class Scored:
    """The outcome of a case: a CSV row per organ, or no row and the reason why the case was refused."""

    rows: Sequence[dict] = ()
    voxel_accuracy: float = math.nan
    refusal: str | None = None


def ignore() -> None:
    """Do nothing; called after each organ when nobody waits for it."""


def score_case(task: Task, rules: Rules, tick: Callable[[], object] = ignore) -> Scored:
    """Score the prediction of one case against its reference.

    Args:
        task: the case's files.
        rules: how to score.
        tick: called after each organ.

    Raises:
        OSError, ValueError: when a file cannot be read, holds other organs, or is on another grid.
    """
    reference, geometry = read_label_map(task.reference, rules)
    prediction = np.zeros_like(reference)
    if task.prediction:
        prediction, prediction_geometry = read_label_map(task.prediction, rules)
        check_same_grid(geometry, prediction_geometry, f"case {task.case}", "the reference", "the prediction")
    matrix = confusion_matrix(reference, prediction, len(rules.organs))
    if rules.protocol == "flare22" and not task.prediction:
        scores = [{"dice": 0.0, "nsd": 0.0} for _ in rules.organs[1:]]
    else:
        scores = score_organs(reference, prediction, matrix, geometry, rules, tick)
    volumes_ml = matrix[1:].sum(axis=1) * geometry.voxel_ml, matrix[:, 1:].sum(axis=0) * geometry.voxel_ml
    for of_organ, reference_ml, predicted_ml in zip(scores, *volumes_ml, strict=True):
        of_organ |= {"reference_ml": reference_ml, "predicted_ml": predicted_ml}
    return Scored(as_rows(task.case, scores, rules.organs), float(voxel_accuracy(matrix)))


def read_label_map(path: Path, rules: Rules) -> tuple[np.ndarray, Geometry]:
    """Read a label map, (X, Y, Z) uint8 in RAS+ order, and its geometry.

    Raises:
        OSError, ValueError: when it cannot be read, or its ids or organ names are not those of the organ list.
    """
    labels, geometry = load_labels(path, len(rules.organs), rules.reading)
    check_organ_names(path, rules.organs)
    return labels, geometry


def score_organs(
    reference: np.ndarray,
    prediction: np.ndarray,
    matrix: np.ndarray,
    geometry: Geometry,
    rules: Rules,
    tick: Callable[[], object] = ignore,
) -> list[dict[str, float]]:
    """Return the scores of organ 1, 2, ... by name; NaN when not defined.

    Args:
        reference: label map, (X, Y, Z) uint8 in RAS+ order.
        prediction: label map of the same shape.
        matrix: (K, K), their confusion matrix.
        geometry: of both.
        rules: how to score.
        tick: called after each organ.
    """
    scores = []
    if rules.protocol == "flare22":
        stored = [geometry.from_ras(labels) for labels in (reference, prediction)]
        pixdim_mm = [float(mm) for mm in geometry.header.get_zooms()]
        for dice, surface_dice in flare22_scores(*stored, rules.organs, rules.tolerances_mm, pixdim_mm, rules.threads):
            scores.append({"dice": dice, "nsd": surface_dice})
            tick()
        return scores
    overlap = organ_scores(matrix)
    surfaces = organ_surfaces(reference, prediction, len(rules.organs), geometry.spacing_mm, rules.threads)
    for organ, both in enumerate(surfaces, start=1):
        of_organ = {name: overlap[name][organ] for name in SCORES}
        of_organ |= {"nsd": nsd(both, rules.tolerances_mm[organ]), "hd95_mm": hausdorff_mm(both, 95)}
        if rules.distances:
            of_organ |= {"hd_mm": hausdorff_mm(both), "mean_distance_mm": mean_distance_mm(both)}
        scores.append(of_organ)
        tick()
    return scores


def as_rows(case: str, scores: Sequence[dict[str, float]], organs: Sequence[str]) -> list[dict]:
    """Return the CSV rows of one case, with numbers rounded as in the file."""
    return [
        {"case": case, "id": organ, "organ": organs[organ]}
        | {name: float(f"{value:.{DIGITS}g}") for name, value in of_organ.items()}
        for organ, of_organ in enumerate(scores, start=1)
    ]
