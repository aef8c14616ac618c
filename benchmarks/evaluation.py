"""Seconds and memory of scoring one case: this repository and the libraries that people use for it, numbers compared.

    python -m benchmarks.evaluation                        # a phantom of 512x512x100 with 13 organs; some minutes
    python -m benchmarks.evaluation --shape 144 128 80     # a smaller one
    python -m benchmarks.evaluation --json                 # only the line of JSON

Three tasks: `overlap` (Dice of every organ), `surface` (NSD, HD95 and HD of every organ) and `speckle` (the same of the
liver alone, where 5 % of the prediction's voxels are wrong at random, so that it is everywhere). From label maps in
memory to numbers, whatever the library needs in between. A peer that is not installed is named and left out.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion, find_objects

from benchmarks import installed_version, machine, print_result
from benchmarks.train_step import ratios, summarise, watch_memory
from core.config import load_config
from core.scoring.overlap import confusion_matrix, divide, organ_scores
from core.scoring.surface import Surfaces, hausdorff_mm, nsd, organ_surfaces, surfaces_of
from core.system.exits import DONE, USAGE, refusing, run_command
from data.make_phantom import MAX_VOXELS, MIN_SIDE, make_case

SHAPE = (512, 512, 100)
SEED = 0
TOLERANCE_MM = 2.0  # of every organ's NSD
MAX_SHIFT_VOXELS = (3, 3, 1)  # by which an organ of the wrong copy is moved
SPECKLE_SHARE = 0.05  # of the voxels, wrong at random
SPECKLE_ORGAN = 1  # the liver, the largest
MIB = 2**20
PROJECT = "this repository"

Scores = dict[str, np.ndarray]  # score -> its value for organ 1, 2, ...


@dataclass(frozen=True)
class Case:
    """Two label maps (X, Y, Z) uint8 of K classes on one grid."""

    reference: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, float, float]
    classes: int


@dataclass
class Contender:
    """One way to do a task, and what its turns gave."""

    name: str
    package: str | None  # that must be installed
    score: Callable[[Case], Scores]
    slow: bool = False  # takes one turn
    note: str = ""
    seconds: list[float] = field(default_factory=list)
    rise_mib: list[float] = field(default_factory=list)
    scores: Scores = field(default_factory=dict)


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


def make_contenders() -> dict[str, list[Contender]]:
    """Task -> who does it, this repository first."""
    voxels = "between voxels, not surfaces"
    return {
        "overlap": [
            Contender(PROJECT, None, overlap),
            Contender("boolean masks", None, overlap_by_masks),
            Contender("SimpleITK", "SimpleITK", overlap_by_simpleitk),
            Contender("scikit-learn", "scikit-learn", overlap_by_scikit_learn),
            Contender("MONAI", "monai", overlap_by_monai, slow=True),
        ],
        "surface": [
            Contender(PROJECT, None, surface),
            Contender("surface-distance", "surface-distance", surface_by_deepmind),
            Contender("MONAI", "monai", surface_by_monai, slow=True, note=f"HD95 {voxels}; no HD"),
            Contender("SimpleITK", "SimpleITK", surface_by_simpleitk, slow=True, note=f"HD alone, {voxels}"),
        ],
        "speckle": [
            Contender(PROJECT, None, speckle),
            Contender("surface-distance", "surface-distance", speckle_by_deepmind, slow=True),
        ],
    }


# ---- Measuring -------------------------------------------------------------------------------------------------------


def take_turn(contender: Contender, case: Case) -> None:
    """Score the case once, with a clock and an eye on the resident memory."""
    read_rise_gib = watch_memory(torch.device("cpu"))
    started = time.perf_counter()
    contender.scores = contender.score(case)
    contender.seconds.append(time.perf_counter() - started)
    rise_gib = read_rise_gib()
    if rise_gib is not None:
        contender.rise_mib.append(rise_gib * 2**30 / MIB)


def compete(contenders: list[Contender], case: Case, repeats: int) -> None:
    """Let the contenders take turns, the slow ones one alone; all have loaded what they need before."""
    for contender in contenders:
        contender.score(tiny_case(case.classes))
    for turn in range(repeats):
        for contender in contenders:
            if turn == 0 or not contender.slow:
                take_turn(contender, case)


def differences(scores: Scores, to: Scores) -> dict[str, float | None]:
    """For each score that both have the largest difference over the organs; None where one is defined, one is not."""
    found = {}
    for name in scores.keys() & to.keys():
        same = (scores[name] == to[name]) | (np.isnan(scores[name]) & np.isnan(to[name]))  # infinite ones too
        apart = np.where(same, 0, np.abs(np.where(same, 0, scores[name]) - np.where(same, 0, to[name])))
        found[name] = float(apart.max()) if np.isfinite(apart).all() else None
    return dict(sorted(found.items()))


def rows_of(contenders: list[Contender]) -> dict[str, Any]:
    """Return the results of a task, by contender, this repository the first of them."""
    project = contenders[0]
    return {
        each.name: {
            "seconds": summarise(each.seconds),
            "ratio": ratios(each.seconds, project.seconds[: len(each.seconds)]),
            "rise_mib": summarise(each.rise_mib),
            "differs_by": differences(each.scores, project.scores),
            "note": each.note,
        }
        for each in contenders
    }


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


def measure(cases: dict[str, Case], repeats: int) -> dict[str, Any]:
    """Let everybody score the cases."""
    tasks, packages = {}, {}
    for task, contenders in make_contenders().items():
        packages |= {each.package: installed_version(each.package) for each in contenders if each.package}
        present = [each for each in contenders if each.package is None or packages[each.package]]
        compete(present, cases[task], repeats)
        tasks[task] = rows_of(present)
    missing = ", ".join(package for package, version in packages.items() if version is None)
    case = cases["surface"]
    return {
        "shape": list(case.reference.shape),
        "spacing_mm": case.spacing_mm,
        "organs": case.classes - 1,
        "tolerance_mm": TOLERANCE_MM,
        "repeats": repeats,
        "tasks": tasks,
        "peers": packages,
        "notes": [f"not installed: {missing}; pip install -r benchmarks/requirements.txt"] if missing else [],
        "machine": machine(),
    }


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables, one table a task."""
    shape = " x ".join(map(str, result["shape"]))
    lines = [f"scoring {result['organs']} organs at {shape}; ratio: to this repository; rise: of resident memory"]
    for task, rows in result["tasks"].items():
        titles = ("seconds", "min", "max", "n", "ratio", "rise MiB")
        lines += ["", f"{task:<18}" + "".join(f"{title:>10}" for title in titles) + "  differs by at most"]
        for name, row in rows.items():
            seconds, rise = row["seconds"], row["rise_mib"]
            times = "".join(f"{seconds[key]:>10.3f}" for key in ("median", "min", "max")) + f"{seconds['n']:>10}"
            memory = "-" if rise is None else f"{rise['max']:.0f}"
            apart = [f"{score} {'not defined' if x is None else f'{x:.1g}'}" for score, x in row["differs_by"].items()]
            told = "; ".join([", ".join(apart)] * (name != PROJECT) + [row["note"]] * bool(row["note"]))
            lines.append(f"{name:<18}{times}{row['ratio']['median']:>10.2f}{memory:>10}  {told}".rstrip())
    return [*lines, "", *result["notes"]]


def main() -> int:
    """Measure, and print."""
    arguments = parse_arguments()
    with refusing(USAGE):
        if arguments.repeats < 1:
            raise ValueError(f"--repeats: got {arguments.repeats}, expected 1 or more")
        shape = tuple(arguments.shape)
        if min(shape) < MIN_SIDE or prod(shape) > MAX_VOXELS:
            given = " ".join(map(str, shape))
            raise ValueError(f"--shape: got {given}, expected {MIN_SIDE} or more each, {MAX_VOXELS} voxels at most")
        cases = make_cases(shape, len(load_config().organs))
    result = measure(cases, arguments.repeats)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time the scoring of one case, the libraries for it beside.")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("X", "Y", "Z"), help="voxels")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns after the warm-up (default: 5)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
