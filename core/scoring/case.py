"""Score one case: two label maps on disk in, a row per organ out.

There are two protocols: the default one, in which a score that is not defined is NaN, and the FLARE22 challenge's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import Reading
from core.scans.organ_names import check_organ_names
from core.scans.placement import SHEAR_DEGREES, SPACING_MM, shear_degrees
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
    """Hold the rules of scoring; all that a worker process needs to know.

    Attributes:
        organs: names by id, background first.
        scored: ids of the organs that are scored; the others count as background.
        tolerances_mm: of NSD, by id, background first.
        protocol: default or flare22.
        distances: whether DISTANCES are wanted too.
        size: the grid whose ceiling is wanted, or None.
        crop: what that grid covers: none for the whole label map, or organs.
        threads: for one case's nearest neighbours.
        reading: what is accepted of label maps.
        organs_note: where the names come from, when the user should know.
    """

    organs: tuple[str, ...]
    scored: tuple[int, ...]
    tolerances_mm: tuple[float, ...]
    protocol: str
    distances: bool
    size: tuple[int, int, int] | None
    threads: int = 1
    reading: Reading = DEFAULT_READING
    organs_note: str | None = None
    crop: str = "none"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the organs that are scored."""
        return tuple(self.organs[organ] for organ in self.scored)

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
    """A case to be scored.

    Attributes:
        case: its id.
        reference: its label map.
        prediction: the label map to score; None when there is none.
        annotated: ids of the organs that the reference annotates; None when it annotates all.
    """

    case: str
    reference: Path
    prediction: Path | None = None
    annotated: tuple[int, ...] | None = None

    def to_score(self, rules: Rules) -> tuple[int, ...]:
        """Return the ids of the organs to score in this case: those that are scored and annotated."""
        return tuple(organ for organ in rules.scored if self.annotated is None or organ in self.annotated)


@dataclass(frozen=True)
class Scored:
    """The outcome of a case.

    Attributes:
        rows: a CSV row per scored organ; none when the case was refused.
        voxel_accuracy: share of voxels with the right id.
        refusal: why the case was refused; None when it was not.
        in_reference: ids of the organs that the reference holds.
        not_annotated: ids of the organs without a score, because the reference does not annotate them.
    """

    rows: Sequence[dict] = ()
    voxel_accuracy: float = math.nan
    refusal: str | None = None
    in_reference: frozenset[int] = frozenset()
    not_annotated: tuple[int, ...] = ()


def score_case(task: Task, rules: Rules) -> Scored:
    """Score the prediction of one case against its reference.

    Args:
        task: the case's files.
        rules: how to score.

    Raises:
        OSError, ValueError: when a file cannot be read, holds other organs, or is on another grid.
    """
    reference, geometry = read_label_map(task.reference, rules)
    prediction = np.zeros_like(reference)
    if task.prediction:
        prediction, prediction_geometry = read_label_map(task.prediction, rules)
        check_same_grid(geometry, prediction_geometry, f"case {task.case}", "the reference", "the prediction")
    if shear_degrees(geometry.affine) > SHEAR_DEGREES:
        rules.reading.warn(
            f"case {task.case}: NSD and HD95 are not exact, since its slices are sheared (tilted gantry)"
        )
    if rules.protocol == "flare22" and pixdim_of(geometry) != geometry.header["pixdim"][1:4].tolist():
        rules.reading.warn(f"case {task.case}: its header's pixdim is no voxel size; the affine's is used")
    reference, prediction = (keep_organs(labels, task, rules) for labels in (reference, prediction))
    matrix = confusion_matrix(reference, prediction, len(rules.organs))
    if rules.protocol == "flare22" and not task.prediction:
        scores = [{"dice": 0.0, "nsd": 0.0} for _ in rules.organs[1:]]
    else:
        scores = score_organs(reference, prediction, matrix, geometry, rules)
    volumes_ml = matrix[1:].sum(axis=1) * geometry.voxel_ml, matrix[:, 1:].sum(axis=0) * geometry.voxel_ml
    for of_organ, reference_ml, predicted_ml in zip(scores, *volumes_ml, strict=True):
        of_organ |= {"reference_ml": reference_ml, "predicted_ml": predicted_ml}
    return outcome(task, scores, matrix, rules)


def read_label_map(path: Path, rules: Rules) -> tuple[np.ndarray, Geometry]:
    """Read a label map, (X, Y, Z) uint8 in RAS+ order, and its geometry.

    Raises:
        OSError, ValueError: when it cannot be read, or its ids or organ names are not those of the organ list.
    """
    labels, geometry = load_labels(path, len(rules.organs), rules.reading)
    check_organ_names(path, rules.organs)
    return labels, geometry


def keep_organs(labels: np.ndarray, task: Task, rules: Rules) -> np.ndarray:
    """Return labels, (X, Y, Z) uint8, in which the organs that are not scored in this case are background."""
    organs = list(task.to_score(rules))
    if len(organs) == len(rules.organs) - 1:
        return labels
    kept = np.zeros(len(rules.organs), np.uint8)
    kept[organs] = organs
    return kept[labels]


def score_organs(
    reference: np.ndarray, prediction: np.ndarray, matrix: np.ndarray, geometry: Geometry, rules: Rules
) -> list[dict[str, float]]:
    """Return the scores of organ 1, 2, ... by name; NaN when not defined.

    Args:
        reference: label map, (X, Y, Z) uint8 in RAS+ order.
        prediction: label map of the same shape.
        matrix: (K, K), their confusion matrix.
        geometry: of both.
        rules: how to score.
    """
    if rules.protocol == "flare22":
        stored = [geometry.from_ras(labels) for labels in (reference, prediction)]
        found = flare22_scores(*stored, rules.organs, rules.tolerances_mm, pixdim_of(geometry), rules.threads)
        return [{"dice": dice, "nsd": surface_dice} for dice, surface_dice in found]
    scores = []
    overlap = organ_scores(matrix)
    surfaces = organ_surfaces(reference, prediction, len(rules.organs), geometry.spacing_mm, rules.threads)
    for organ, both in enumerate(surfaces, start=1):
        of_organ = {name: overlap[name][organ] for name in SCORES}
        of_organ |= {"nsd": nsd(both, rules.tolerances_mm[organ]), "hd95_mm": hausdorff_mm(both, 95)}
        if rules.distances:
            of_organ |= {"hd_mm": hausdorff_mm(both), "mean_distance_mm": mean_distance_mm(both)}
        scores.append(of_organ)
    return scores


def pixdim_of(geometry: Geometry) -> list[float]:
    """Return the header's pixdim, along the stored axes, in mm; the affine's voxel size where pixdim is none of CT."""
    pixdim = [float(mm) for mm in geometry.header["pixdim"][1:4]]
    low, high = SPACING_MM
    return pixdim if all(low <= mm <= high for mm in pixdim) else voxel_sizes(geometry.affine).tolist()


def outcome(task: Task, scores: Sequence[dict[str, float]], matrix: np.ndarray, rules: Rules) -> Scored:
    """Return the outcome of a case, with the numbers of its rows rounded as in the CSV file.

    Args:
        task: the case.
        scores: of organ 1, 2, ... by name.
        matrix: (K, K), the confusion matrix of reference and prediction.
        rules: how it was scored.
    """
    rows, to_score = [], task.to_score(rules)
    for organ in rules.scored:
        of_organ = scores[organ - 1] if organ in to_score else dict.fromkeys(scores[organ - 1], math.nan)
        numbers = {name: float(f"{value:.{DIGITS}g}") for name, value in of_organ.items()}
        rows.append({"case": task.case, "id": organ, "organ": rules.organs[organ]} | numbers)
    in_reference = frozenset(organ for organ in to_score if matrix[organ].any())
    not_annotated = tuple(organ for organ in rules.scored if organ not in to_score)
    return Scored(rows, float(voxel_accuracy(matrix)), None, in_reference, not_annotated)
