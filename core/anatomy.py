"""What a label map shows of a patient: the organs' volumes and places, and what of it can hardly be true.

    measure(labels, steps_mm, organs) -> {organ: Organ}      -> sides_problem, volume_problems
    check_training_labels                                     (the cheap part, on the network's grid)

Organs are known by their names in the organ list; those without a rule here pass. Arrays are (X, Y, Z) in RAS+ order:
X grows to the patient's right, so that the liver has a larger X than the spleen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from core.preprocess import Geometry

# Millilitres that an adult's organ may have, from below half of the smallest usual one to twice the largest and more: a
# volume outside speaks for a wrong id, wrong units or a damaged label map, not for a sick patient.
# - liver: about 1500 mL in adults (Vauthey et al. 2002)
# - spleen: 215 mL, 107 to 315 (Prassopoulos et al. 1997); 2 L and more when it is enlarged
# - kidneys: 202 mL in men, 154 in women, sd 36 and 33 (Cheong et al. 2007); atrophic or cystic ones beyond that
# - pancreas: 70 to 80 mL, half of it in old age (Saisho et al. 2007)
# - adrenal glands: 4 to 5 g each; gallbladder: 30 to 50 mL when fasting; stomach: 50 mL when empty to 1.5 L
#   (textbooks of anatomy)
# - vessels, esophagus and duodenum: from the textbooks' lengths and widths; how much of them a scan shows differs.
ADULT_ML = {
    "liver": (400, 5000),
    "right kidney": (30, 800),
    "spleen": (20, 3000),
    "pancreas": (10, 250),
    "aorta": (5, 1000),
    "inferior vena cava": (5, 400),
    "right adrenal gland": (0.5, 30),
    "left adrenal gland": (0.5, 30),
    "gallbladder": (1, 400),
    "esophagus": (1, 200),
    "stomach": (20, 4000),
    "duodenum": (10, 400),
    "left kidney": (30, 800),
}
# The first lies to the right of the second; besides, so does every "right X" of the organ list to its "left X".
RIGHT_OF = (
    ("liver", "spleen"),
    ("liver", "left kidney"),
    ("right kidney", "spleen"),
    ("right kidney", "aorta"),
    ("inferior vena cava", "left kidney"),
)
# By which the centres of two organs must lie the wrong way round to count: far below their usual distances of 40 mm and
# more, and more than a cut-off organ's centre is off.
SIDE_MARGIN_MM = 10.0
MOST_NAMED = 3  # pairs of organs in a message
# Organs without gas and with little fat, and the HU that they and their vessels have with and without contrast medium.
SOLID_ORGANS = ("liver", "spleen", "right kidney", "left kidney")
SOLID_HU = (-100.0, 400.0)
# Share of their voxels that may lie outside. 0.1 % at most in three real cases and twenty phantoms, 7 % and more with
# the scan mirrored under its label map (RESULTS.md).
MOST_OFF_TISSUE = 0.05


@dataclass(frozen=True)
class Organ:
    """An organ of one case.

    Attributes:
        ml: its volume.
        centre_mm: of its voxels, to the patient's right, front and head, from the volume's first voxel.
        slices: its first slice along Z and the one after its last.
        cut: whether it reaches the volume's outermost voxels, so that some of it may lie outside.
    """

    ml: float
    centre_mm: tuple[float, float, float]
    slices: tuple[int, int]
    cut: bool


def ras_steps_mm(geometry: Geometry) -> np.ndarray:
    """(3, 3): its columns lead from a voxel to the next along X, Y and Z of the RAS+ array, in mm in the patient."""
    steps = np.empty((3, 3))
    for stored, (axis, direction) in enumerate(geometry.orientation):
        steps[:, int(axis)] = geometry.affine[:3, stored] * direction
    return steps


def measure(labels: np.ndarray, steps_mm: np.ndarray, organs: Sequence[str]) -> dict[str, Organ]:
    """Measure the organs of a label map.

    Args:
        labels: (X, Y, Z) uint8 ids in RAS+ order; ids that have no name are passed over.
        steps_mm: (3, 3) as `ras_steps_mm` gives it, so that a patient who lies askew in the volume is placed rightly.
        organs: names by id, background first.

    Returns:
        by name, those that are present; nothing for an empty label map.
    """
    found = {}
    for organ, box in enumerate(ndimage.find_objects(labels, len(organs) - 1), start=1):
        if box is None:
            continue
        mask = labels[box] == organ
        in_plane = np.count_nonzero(mask, axis=2)
        by_axis = [in_plane.sum(axis=1), in_plane.sum(axis=0), np.count_nonzero(mask, axis=(0, 1))]
        voxels = int(in_plane.sum())
        index = [
            side.start + np.arange(len(counts)) @ counts / voxels for side, counts in zip(box, by_axis, strict=True)
        ]
        cut = any(side.start == 0 or side.stop == n for side, n in zip(box, labels.shape, strict=True))
        ml = voxels * abs(float(np.linalg.det(steps_mm))) / 1000
        found[organs[organ]] = Organ(ml, tuple((steps_mm @ index).tolist()), (box[2].start, box[2].stop), cut)
    return found


# ---- Left and right --------------------------------------------------------------------------------------------------


def side_pairs(organs: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of names of the organ list of which the first lies to the patient's right of the second."""
    pairs = [pair for pair in RIGHT_OF if set(pair) <= set(organs)]
    for organ in organs:
        other = re.sub(r"\bright\b", "left", organ)
        if other != organ and other in organs:
            pairs.append((organ, other))
    return pairs


def sides_problem(found: dict[str, Organ], organs: Sequence[str]) -> str | None:
    """In words, which organs lie on the wrong side of each other, why, and what to do; None where none does.

    A mirrored file has all pairs the wrong way round, swapped ids only some. An organ that is absent decides nothing.

    Args:
        found: what `measure` gives.
        organs: names by id, background first.
    """
    right_by_mm = {
        (right, left): found[right].centre_mm[0] - found[left].centre_mm[0]
        for right, left in side_pairs(organs)
        if right in found and left in found
    }
    wrong = {pair: -mm for pair, mm in right_by_mm.items() if mm < -SIDE_MARGIN_MM}
    held = sum(mm > SIDE_MARGIN_MM for mm in right_by_mm.values())
    if not wrong:
        return None
    mirrored = "the file is mirrored: convert it again from its source, or set its affine right (in a patient whose"
    mirrored += " organs do lie so, situs inversus, leave the case out)"
    swapped = "ids are swapped in the label map: give the organs each other's id"
    if held:
        why = f"{held} other pair(s) lie rightly, so {swapped}"
    elif len(wrong) > 1:
        why = f"so do all that can be checked, so {mirrored}"
    else:
        why = f"no other pair tells whether {swapped}; or {mirrored}"
    # The largest first; whoever knows which organs are swapped finds them there.
    largest = sorted(wrong, key=wrong.get, reverse=True)
    named = [f"{right} lies {wrong[right, left]:.0f} mm to the left of {left}" for right, left in largest[:MOST_NAMED]]
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return f"{', '.join(named)}{more}; {why}"


# ---- Volumes and values ----------------------------------------------------------------------------------------------


def volume_problems(found: dict[str, Organ]) -> list[str]:
    """In words, the organs whose volume no adult's is likely to have; one that the scan cuts off may be small."""
    problems = []
    for name, organ in found.items():
        low, high = ADULT_ML.get(name, (0, np.inf))
        if organ.ml > high or (organ.ml < low and not organ.cut):
            problems.append(f"{name} {organ.ml:.3g} mL, expected {low:g} to {high:g}")
    return problems


def share_off_tissue(voxels: np.ndarray, labels: np.ndarray, organs: Sequence[str]) -> float:
    """Share of the voxels labelled as solid organs whose HU no solid organ has; 0 where there is none of them.

    Args:
        voxels: (X, Y, Z) HU.
        labels: (X, Y, Z) uint8 ids on the same grid.
        organs: names by id, background first.
    """
    solid = np.zeros(256, dtype=bool)
    solid[: len(organs)] = [organ in SOLID_ORGANS for organ in organs]
    hu = voxels[solid[labels]]
    low, high = SOLID_HU
    return np.count_nonzero((hu < low) | (hu > high)) / max(1, hu.size)


# ---- For training ----------------------------------------------------------------------------------------------------


def check_training_labels(labels: np.ndarray, extent_mm: Sequence[float], organs: Sequence[str]) -> list[str]:
    """What speaks against training on a label map, as far as it can be seen on the network's grid, a sentence each.

    Args:
        labels: (X, Y, Z) uint8 ids in RAS+ order, on any grid.
        extent_mm: the volume's size along X, Y, Z.
        organs: names by id, background first.
    """
    found = measure(labels, np.diag([mm / n for mm, n in zip(extent_mm, labels.shape, strict=True)]), organs)
    if not found:
        return ["its label map has no organ"]
    problem = sides_problem(found, organs)
    return [problem] if problem else []
