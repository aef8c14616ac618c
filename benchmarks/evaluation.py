"""Seconds and memory of scoring one case: this repository and the libraries that people use for it, numbers compared.

    python -m benchmarks.evaluation                        # a phantom of 512x512x100 with 13 organs; some minutes
    python -m benchmarks.evaluation --shape 144 128 80     # a smaller one
    python -m benchmarks.evaluation --json                 # only the line of JSON

Two tasks: `overlap` (Dice of every organ) and `surface` (NSD, HD95 and HD of every organ). From label maps in memory to
numbers, whatever the library needs in between. A peer that is not installed is named and left out.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import measuring
from core.config import load_config
from core.scoring.overlap import confusion_matrix, divide, organ_scores
from core.scoring.surface import hausdorff_mm, nsd, organ_surfaces
from core.system.exits import run_command
from data.make_phantom import MAX_VOXELS, MIN_SIDE
from data.phantom import make_case

SHAPE = (512, 512, 100)
SEED = 0
TOLERANCE_MM = 2.0  # of every organ's NSD
SHIFT_VOXELS = (3, 3, 1)  # by which the prediction is moved
MIB_PER_GIB = 1024
PROJECT = "this repository"
PACKAGES = ("monai", "surface-distance")  # of the peers

DISTANCES = ("nsd", "hd95_mm", "hd_mm")  # the scores of the task surface
Scores = dict[str, np.ndarray]  # score -> its value for organ 1, 2, ...


@dataclass(frozen=True)
class Case:
    """Two label maps (X, Y, Z) uint8 of K classes on one grid."""

    reference: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, float, float]
    classes: int


class Scorer(NamedTuple):
    """One way to do a task: its name, the package that it needs, turns that count at most, and what it leaves out."""

    name: str
    package: str | None
    score: Callable[[Case], Scores]
    turns: int = sys.maxsize
    note: str = ""


# ---- Contenders ------------------------------------------------------------------------------------------------------


def overlap(case: Case) -> Scores:
    """As evaluate.py does it."""
    matrix = confusion_matrix(case.reference, case.prediction, case.classes)
    return {"dice": organ_scores(matrix)["dice"][1:]}


def overlap_by_masks(case: Case) -> Scores:
    """Score in the textbook's way, with three boolean masks for each organ."""
    in_both, in_either = [], []
    for organ in range(1, case.classes):
        expected, found = case.reference == organ, case.prediction == organ
        in_both.append((expected & found).sum())
        in_either.append(expected.sum() + found.sum())
    return {"dice": divide(2 * np.array(in_both), np.array(in_either))}


def one_hot(labels: np.ndarray, classes: int) -> torch.Tensor:
    """(X, Y, Z) -> (1, K, X, Y, Z) uint8, which MONAI's scores take."""
    from monai.networks.utils import one_hot

    return one_hot(torch.from_numpy(labels)[None, None], classes, dtype=torch.uint8)


def overlap_by_monai(case: Case) -> Scores:
    """monai.metrics.compute_dice of one-hot volumes."""
    from monai.metrics import compute_dice

    truth, found = (one_hot(labels, case.classes) for labels in (case.reference, case.prediction))
    return {"dice": compute_dice(found, truth, include_background=False)[0].numpy()}


def surface(case: Case) -> Scores:
    """As evaluate.py does it, organ after organ."""
    threads = torch.get_num_threads()
    surfaces = organ_surfaces(case.reference, case.prediction, case.classes, case.spacing_mm, threads)
    rows = [(nsd(each, TOLERANCE_MM), hausdorff_mm(each, 95), hausdorff_mm(each)) for each in surfaces]
    return dict(zip(DISTANCES, np.transpose(rows), strict=True))


def surface_by_deepmind(case: Case) -> Scores:
    """surface-distance, organ after organ."""
    import surface_distance as sd

    rows = []
    for organ in range(1, case.classes):
        both = sd.compute_surface_distances(case.reference == organ, case.prediction == organ, case.spacing_mm)
        hd95, hd = (sd.compute_robust_hausdorff(both, percent) for percent in (95, 100))
        rows.append((sd.compute_surface_dice_at_tolerance(both, TOLERANCE_MM), hd95, hd))
    return dict(zip(DISTANCES, np.transpose(rows), strict=True))


def surface_by_monai(case: Case) -> Scores:
    """monai.metrics, NSD with areas and HD95 of voxels; one-hot volumes."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    volumes = [one_hot(labels, case.classes) for labels in (case.prediction, case.reference)]
    thresholds = [TOLERANCE_MM] * (case.classes - 1)
    surface_dice = compute_surface_dice(*volumes, thresholds, spacing=case.spacing_mm, use_subvoxels=True)
    hd95 = compute_hausdorff_distance(*volumes, percentile=95, spacing=case.spacing_mm)
    return {"nsd": surface_dice[0].numpy(), "hd95_mm": hd95[0].numpy()}


TASKS = {  # who does it, this repository first
    "overlap": [
        Scorer(PROJECT, None, overlap),
        Scorer("boolean masks", None, overlap_by_masks),
        Scorer("MONAI", "monai", overlap_by_monai, turns=1),
    ],
    "surface": [
        Scorer(PROJECT, None, surface),
        Scorer("surface-distance", "surface-distance", surface_by_deepmind),
        Scorer("MONAI", "monai", surface_by_monai, turns=1, note="HD95 between voxels, not surfaces; no HD"),
    ],
}


# ---- Measuring -------------------------------------------------------------------------------------------------------


def compete(scorers: list[Scorer], case: Case, repeats: int) -> dict[str, Any]:
    """Let the scorers take turns; return the numbers of each. The first turn loads what they need."""
    contenders = [measuring.Contender(each.name, lambda _, each=each: each.score(case), each.turns) for each in scorers]
    measuring.take_turns(contenders, repeats)
    project = contenders[0]
    return {
        each.name: {
            "seconds": measuring.summarise(each.seconds),
            "ratio": measuring.ratios(each.seconds, project.seconds),
            "rise_mib": measuring.summarise([rise * MIB_PER_GIB for rise in each.rise_gib]),
            "differs_by": differences(each.answer, project.answer),
            "note": scorer.note,
        }
        for each, scorer in zip(contenders, scorers, strict=True)
    }


def differences(scores: Scores, to: Scores) -> dict[str, float | None]:
    """For each score that both have the largest difference over the organs; None where one is defined, one is not."""
    found = {}
    for name in scores.keys() & to.keys():
        same = (scores[name] == to[name]) | (np.isnan(scores[name]) & np.isnan(to[name]))  # infinite ones too
        apart = np.where(same, 0, np.abs(np.where(same, 0, scores[name]) - np.where(same, 0, to[name])))
        found[name] = float(apart.max()) if np.isfinite(apart).all() else None
    return dict(sorted(found.items()))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let everybody score a phantom's label map, moved, against itself.

    Raises:
        ValueError: when the shape does not fit.
    """
    shape = tuple(arguments.shape)
    if min(shape) < MIN_SIDE or prod(shape) > MAX_VOXELS:
        given = " ".join(map(str, shape))
        raise ValueError(f"--shape: got {given}, expected {MIN_SIDE} or more each, {MAX_VOXELS} voxels at most")
    _, reference, spacing = make_case(SEED, 1, shape)
    prediction = np.roll(reference, SHIFT_VOXELS, axis=(0, 1, 2))
    case = Case(reference, prediction, tuple(map(float, spacing)), len(load_config().organs))
    packages = {package: measuring.installed_version(package) for package in PACKAGES}
    tasks = {
        name: compete([each for each in task if not each.package or packages[each.package]], case, arguments.repeats)
        for name, task in TASKS.items()
    }
    missing = ", ".join(package for package, version in packages.items() if version is None)
    return {
        "shape": list(shape),
        "spacing_mm": list(case.spacing_mm),
        "organs": case.classes - 1,
        "tolerance_mm": TOLERANCE_MM,
        "repeats": arguments.repeats,
        **tasks,
        "peers": packages,
        "notes": [f"not installed: {missing}; pip install -r benchmarks/requirements.txt"] if missing else [],
    }


def main() -> int:
    """Measure, and print."""
    parser = measuring.make_parser(__doc__, repeats=5)
    parser.add_argument("--shape", **measuring.THREE, default=SHAPE, help="voxels")
    return measuring.measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
