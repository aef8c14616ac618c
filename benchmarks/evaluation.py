"""Seconds and memory of scoring one case: this repository and the libraries that people use for it, numbers compared.

    python -m benchmarks.evaluation                        # a phantom of 512x512x100 with 13 organs; some minutes
    python -m benchmarks.evaluation --shape 144 128 80     # a smaller one
    python -m benchmarks.evaluation --json                 # only the line of JSON

Three tasks: `overlap` (Dice of every organ), `surface` (NSD, HD95 and HD of every organ) and `speckle` (the same of the
liver alone, where 5 % of the prediction's voxels are wrong at random, so that it is everywhere). From label maps in
memory to numbers, whatever the library needs in between. A peer that is not installed is named and left out.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion, find_objects

from benchmarks.measuring import (
    THREE,
    Contender,
    installed_version,
    make_parser,
    measure_and_print,
    ratios,
    summarise,
    take_turns,
)
from core.config import load_config
from core.scoring.overlap import confusion_matrix, divide, organ_scores
from core.scoring.surface import Surfaces, hausdorff_mm, nsd, organ_surfaces, surfaces_of
from core.system.exits import run_command
from data.make_phantom import MAX_VOXELS, MIN_SIDE
from data.phantom import make_case

SHAPE = (512, 512, 100)
SEED = 0
TOLERANCE_MM = 2.0  # of every organ's NSD
MAX_SHIFT_VOXELS = (3, 3, 1)  # by which an organ of the wrong copy is moved
SPECKLE_SHARE = 0.05  # of the voxels, wrong at random
SPECKLE_ORGAN = 1  # the liver, the largest
MIB_PER_GIB = 1024
PROJECT = "this repository"

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


# ---- The case --------------------------------------------------------------------------------------------------------


def wrong_copy(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a fair network's label map: move each organ by some voxels, and erode or dilate it by one."""
    wrong = np.zeros_like(labels)
    for organ, box in enumerate(find_objects(labels), start=1):
        if box is None:
            continue
        margin = [reach + 1 for reach in MAX_SHIFT_VOXELS]
        mask = np.pad(labels[box] == organ, [(m, m) for m in margin])
        eroded = binary_erosion(mask)
        mask = eroded if eroded.any() and rng.random() < 0.5 else binary_dilation(mask)
        shift = [int(rng.integers(-reach, reach + 1)) for reach in MAX_SHIFT_VOXELS]
        voxels = np.argwhere(mask) + [side.start for side in box] - margin + shift
        voxels = voxels[((voxels >= 0) & (voxels < labels.shape)).all(axis=1)]
        wrong[tuple(voxels.T)] = organ
    return wrong


def speckled(labels: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Return a label map in which SPECKLE_SHARE of the voxels have an id drawn at random."""
    drawn = rng.integers(0, classes, labels.shape, dtype=np.uint8)
    return np.where(rng.random(labels.shape, dtype=np.float32) < SPECKLE_SHARE, drawn, labels)


def tiny_case(classes: int) -> Case:
    """All organs side by side."""
    labels = np.zeros((2 * classes, 4, 4), np.uint8)
    labels += np.repeat(np.arange(classes, dtype=np.uint8), 2)[:, None, None]
    return Case(labels, labels, (1.0, 1.0, 1.0), classes)


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


def overlap_by_simpleitk(case: Case) -> Scores:
    """LabelOverlapMeasuresImageFilter."""
    import SimpleITK as sitk

    measures = sitk.LabelOverlapMeasuresImageFilter()
    measures.Execute(*map(sitk.GetImageFromArray, (case.reference, case.prediction)))
    return {"dice": np.array([measures.GetDiceCoefficient(organ) for organ in range(1, case.classes)])}


def overlap_by_scikit_learn(case: Case) -> Scores:
    """sklearn.metrics.confusion_matrix."""
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(case.reference.ravel(), case.prediction.ravel(), labels=range(case.classes))
    return {"dice": organ_scores(matrix)["dice"][1:]}


def one_hot(labels: np.ndarray, classes: int) -> torch.Tensor:
    """(X, Y, Z) -> (1, K, X, Y, Z) uint8, which MONAI's scores take."""
    from monai.networks.utils import one_hot

    return one_hot(torch.from_numpy(labels)[None, None], classes, dtype=torch.uint8)


def overlap_by_monai(case: Case) -> Scores:
    """monai.metrics.compute_dice of one-hot volumes."""
    from monai.metrics import compute_dice

    truth, found = (one_hot(labels, case.classes) for labels in (case.reference, case.prediction))
    return {"dice": compute_dice(found, truth, include_background=False)[0].numpy()}


def surface_scores(surfaces: list[Surfaces]) -> Scores:
    """Compute what the task `surface` asks for."""
    return {
        "nsd": np.array([nsd(each, TOLERANCE_MM) for each in surfaces]),
        "hd95_mm": np.array([hausdorff_mm(each, 95) for each in surfaces]),
        "hd_mm": np.array([hausdorff_mm(each) for each in surfaces]),
    }


def surface(case: Case) -> Scores:
    """As evaluate.py does it, organ after organ."""
    each = organ_surfaces(case.reference, case.prediction, case.classes, case.spacing_mm, torch.get_num_threads())
    found = [surface_scores([surfaces]) for surfaces in each]
    return {score: np.concatenate([one[score] for one in found]) for score in found[0]}


def surface_by_deepmind(case: Case) -> Scores:
    """surface-distance, organ after organ."""
    import surface_distance as sd

    found = {"nsd": [], "hd95_mm": [], "hd_mm": []}
    for organ in range(1, case.classes):
        both = sd.compute_surface_distances(case.reference == organ, case.prediction == organ, case.spacing_mm)
        found["nsd"].append(sd.compute_surface_dice_at_tolerance(both, TOLERANCE_MM))
        found["hd95_mm"].append(sd.compute_robust_hausdorff(both, 95))
        found["hd_mm"].append(sd.compute_robust_hausdorff(both, 100))
    return {score: np.array(values) for score, values in found.items()}


def surface_by_monai(case: Case) -> Scores:
    """monai.metrics, NSD with areas and HD95 of voxels; one-hot volumes."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    volumes = [one_hot(labels, case.classes) for labels in (case.prediction, case.reference)]
    thresholds = [TOLERANCE_MM] * (case.classes - 1)
    surface_dice = compute_surface_dice(*volumes, thresholds, spacing=case.spacing_mm, use_subvoxels=True)
    hd95 = compute_hausdorff_distance(*volumes, percentile=95, spacing=case.spacing_mm)
    return {"nsd": surface_dice[0].numpy(), "hd95_mm": hd95[0].numpy()}


def surface_by_simpleitk(case: Case) -> Scores:
    """HausdorffDistanceImageFilter, organ after organ: the Hausdorff distance of voxels."""
    import SimpleITK as sitk

    measure, found = sitk.HausdorffDistanceImageFilter(), []
    images = [sitk.GetImageFromArray(labels.T) for labels in (case.reference, case.prediction)]
    for image in images:
        image.SetSpacing(case.spacing_mm)
    for organ in range(1, case.classes):
        measure.Execute(*(image == organ for image in images))
        found.append(measure.GetHausdorffDistance())
    return {"hd_mm": np.array(found)}


def speckle(case: Case) -> Scores:
    """One organ, as core.scoring.surface does each."""
    masks = case.reference == SPECKLE_ORGAN, case.prediction == SPECKLE_ORGAN
    return surface_scores([surfaces_of(*masks, case.spacing_mm, torch.get_num_threads())])


def speckle_by_deepmind(case: Case) -> Scores:
    """One organ by surface-distance."""
    masks = (labels == SPECKLE_ORGAN for labels in (case.reference, case.prediction))
    reference, prediction = (mask.astype(np.uint8) for mask in masks)
    return surface_by_deepmind(Case(reference, prediction, case.spacing_mm, classes=2))


VOXELS = "between voxels, not surfaces"
TASKS = {  # who does it, this repository first
    "overlap": [
        Scorer(PROJECT, None, overlap),
        Scorer("boolean masks", None, overlap_by_masks),
        Scorer("SimpleITK", "SimpleITK", overlap_by_simpleitk),
        Scorer("scikit-learn", "scikit-learn", overlap_by_scikit_learn),
        Scorer("MONAI", "monai", overlap_by_monai, turns=1),
    ],
    "surface": [
        Scorer(PROJECT, None, surface),
        Scorer("surface-distance", "surface-distance", surface_by_deepmind),
        Scorer("MONAI", "monai", surface_by_monai, turns=1, note=f"HD95 {VOXELS}; no HD"),
        Scorer("SimpleITK", "SimpleITK", surface_by_simpleitk, turns=1, note=f"HD alone, {VOXELS}"),
    ],
    "speckle": [
        Scorer(PROJECT, None, speckle),
        Scorer("surface-distance", "surface-distance", speckle_by_deepmind, turns=1),
    ],
}


# ---- Measuring -------------------------------------------------------------------------------------------------------


def compete(scorers: list[Scorer], case: Case, repeats: int) -> dict[str, Any]:
    """Let the scorers take turns; return the numbers of each. All have loaded what they need before."""
    for scorer in scorers:
        scorer.score(tiny_case(case.classes))
    contenders = [Contender(each.name, lambda _, each=each: each.score(case), each.turns) for each in scorers]
    take_turns(contenders, repeats, warm_up=0)
    project = contenders[0]
    return {
        each.name: {
            "seconds": summarise(each.seconds),
            "ratio": ratios(each.seconds, project.seconds),
            "rise_mib": summarise([rise * MIB_PER_GIB for rise in each.rise_gib]),
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


def make_cases(shape: tuple[int, int, int], classes: int) -> dict[str, Case]:
    """Task -> the case that it scores.

    Raises:
        ValueError: when an organ is lost on so small a grid; not every peer can score that.
    """
    rng = np.random.default_rng(SEED)
    _, reference, spacing = make_case(SEED, 1, shape)
    spacing_mm = tuple(map(float, spacing))
    case = Case(reference, wrong_copy(reference, rng), spacing_mm, classes)
    if min(len(np.unique(labels)) for labels in (case.reference, case.prediction)) < classes:
        raise ValueError(f"--shape: {' '.join(map(str, shape))} voxels are too few for {classes - 1} organs")
    with_speckle = Case(reference, speckled(reference, classes, rng), spacing_mm, classes)
    return {"overlap": case, "surface": case, "speckle": with_speckle}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let everybody score the cases.

    Raises:
        ValueError: when the shape does not fit.
    """
    shape = tuple(arguments.shape)
    if min(shape) < MIN_SIDE or prod(shape) > MAX_VOXELS:
        given = " ".join(map(str, shape))
        raise ValueError(f"--shape: got {given}, expected {MIN_SIDE} or more each, {MAX_VOXELS} voxels at most")
    cases = make_cases(shape, len(load_config().organs))
    packages = {
        each.package: installed_version(each.package) for task in TASKS.values() for each in task if each.package
    }
    tasks = {
        name: compete(
            [each for each in task if each.package is None or packages[each.package]], cases[name], arguments.repeats
        )
        for name, task in TASKS.items()
    }
    missing = ", ".join(package for package, version in packages.items() if version is None)
    return {
        "shape": list(shape),
        "spacing_mm": list(cases["surface"].spacing_mm),
        "organs": cases["surface"].classes - 1,
        "tolerance_mm": TOLERANCE_MM,
        "repeats": arguments.repeats,
        **tasks,
        "peers": packages,
        "notes": [f"not installed: {missing}; pip install -r benchmarks/requirements.txt"] if missing else [],
    }


def main() -> int:
    """Measure, and print."""
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument("--shape", **THREE, default=SHAPE, help="voxels")
    return measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
