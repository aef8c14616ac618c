"""Check a label map of the abdomen for anatomy: the side of each organ, its neighbour, its volume, its pieces.

Everything goes by the organs' names, so that data with other ids or fewer organs are checked as far as they go.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from core.scans.crop import Box, shape_of
from core.scans.geometry import Geometry
from core.scans.organ_words import standard_name

# Volumes in mL of adults' organs, set generously: wide enough for small and diseased ones and for tubes (aorta,
# vena cava, esophagus, duodenum) of which a scan shows a part. A volume outside is worth a look, but not wrong.
PLAUSIBLE_ML = {
    "liver": (400, 5000),
    "right kidney": (30, 700),
    "spleen": (20, 3000),
    "pancreas": (10, 300),
    "aorta": (10, 600),
    "inferior vena cava": (10, 300),
    "right adrenal gland": (0.5, 25),
    "left adrenal gland": (0.5, 25),
    "gallbladder": (2, 300),
    "esophagus": (1, 150),
    "stomach": (20, 3000),
    "duodenum": (10, 350),
    "left kidney": (30, 700),
}
# The first lies to the patient's right of the second. (Not so in situs inversus, one person of some ten thousand.)
RIGHT_OF = (("liver", "spleen"), ("right kidney", "left kidney"), ("right adrenal gland", "left adrenal gland"))
# The first lies at the second. Their boxes overlapped in fifteen real cases, vena cava and aorta within 4 mm.
NEIGHBOURS = (
    ("gallbladder", "liver"),
    ("pancreas", "aorta"),
    ("duodenum", "pancreas"),
    ("right adrenal gland", "right kidney"),
    ("left adrenal gland", "left kidney"),
    ("inferior vena cava", "aorta"),
    ("esophagus", "aorta"),
)
MAX_GAP_MM = 30.0  # between the boxes of neighbours
# Organs without gas and with little fat, and the HU that they and their vessels have with and without contrast medium.
SOLID_ORGANS = ("liver", "right kidney", "spleen", "left kidney")
SOLID_HU = (-100.0, 400.0)
# Share of their voxels that may lie outside. It was 0.1 % at most in three real cases and twenty phantoms, 5 % and more
# with the scan mirrored under its label map (RESULTS.md).
MAX_OFF_TISSUE = 0.03
# A label map counts as mirrored when the mirrored one has this many times fewer voxels off tissue.
BETTER_MIRRORED = 5
# The scan's ends along X, Y, Z in RAS+ order.
ENDS = (("left", "right"), ("back", "front"), ("bottom", "top"))
TUBES = ("aorta", "inferior vena cava", "esophagus")
# Share of an organ outside its largest piece that needs no remark; most predictions have small loose pieces.
CRUMBS = 0.02
# The share of a data set's cases, and their number, that must be odd in the same organ to doubt the organ list.
ODD_SHARE, MIN_ODD = 0.5, 2


@dataclass(frozen=True)
class Organ:
    """One organ in one label map.

    Attributes:
        ml: its volume.
        right_mm: position of its centre along the patient's right, from the origin of world coordinates.
        cut: the ends of the scan that it touches, where it may go on outside: some of ENDS.
        pieces_ml: volumes of the pieces that hang together (by face, edge or corner), the largest first.
        box_mm: where it begins and ends along X, Y, Z in RAS+ order, from the scan's first voxel.
    """

    ml: float
    right_mm: float
    cut: tuple[str, ...]
    pieces_ml: tuple[float, ...]
    box_mm: tuple[tuple[float, float], ...]


def organs_in(labels: np.ndarray, geometry: Geometry, organs: Sequence[str]) -> dict[str, Organ]:
    """Return the organs in labels, (X, Y, Z) integers below K in RAS+ order, by name, without the background."""
    found = {}
    boxes = ndimage.find_objects(labels, max_label=len(organs) - 1)
    for organ, (name, box) in enumerate(zip(organs[1:], boxes, strict=True), start=1):
        if box is None:
            continue
        mask = labels[box] == organ
        centre = [place.mean() + cut.start for place, cut in zip(np.nonzero(mask), box, strict=True)]
        right_mm = float((geometry.ras_affine @ [*centre, 1])[0])
        pieces = np.bincount(ndimage.label(mask, np.ones((3, 3, 3)))[0].ravel())[1:]
        pieces_ml = tuple(float(voxels * geometry.voxel_ml) for voxels in sorted(pieces, reverse=True))
        box_mm = tuple((part.start * mm, part.stop * mm) for part, mm in zip(box, geometry.spacing_mm, strict=True))
        ml, cut = float(pieces.sum() * geometry.voxel_ml), ends_of(box, labels.shape)
        found[name] = Organ(ml, right_mm, cut, pieces_ml, box_mm)
    return found


def ends_of(box: Sequence[slice], shape: Sequence[int]) -> tuple[str, ...]:
    """Return the ends of a scan of `shape` (X, Y, Z) that a box of it touches, some of ENDS."""
    return tuple(
        end
        for part, n, pair in zip(box, shape, ENDS, strict=True)
        for end, touched in zip(pair, (part.start == 0, part.stop == n), strict=True)
        if touched
    )


def cut_by_box(labels: np.ndarray, box: Box, organs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the ends of a box of the scan that cut organs, some of ENDS, by name; without ends of the scan itself.

    The top and the bottom do not count for TUBES, which go on beyond the abdomen.

    Args:
        labels: (X, Y, Z) ids below K in RAS+ order, of the whole scan; background outside of the box.
        box: the part of the scan that was segmented.
        organs: names by id, background first.
    """
    parts = zip(organs[1:], ndimage.find_objects(labels[box], max_label=len(organs) - 1), strict=True)
    cut = {}
    for name, part in parts:
        expected = ends_of(box, labels.shape) + ends_beyond(name)
        ends = tuple(end for end in ends_of(part, shape_of(box)) if end not in expected) if part else ()
        if ends:
            cut[name] = ends
    return cut


def ends_beyond(name: str) -> tuple[str, ...]:
    """Return the ends of the abdomen beyond which an organ goes on, some of ENDS: top and bottom for TUBES."""
    return ENDS[2] if standard_name(name) in TUBES else ()


def swapped_sides(found: dict[str, Organ]) -> list[tuple[str, str]]:
    """Return the pairs of RIGHT_OF that lie the wrong way round."""
    names = {standard_name(name): name for name in found}
    pairs = [(names[right], names[left]) for right, left in RIGHT_OF if right in names and left in names]
    return [(right, left) for right, left in pairs if found[right].right_mm <= found[left].right_mm]


def far_apart(found: Mapping[str, Organ]) -> list[tuple[str, str, float]]:
    """Return the pairs of NEIGHBOURS whose boxes are more than MAX_GAP_MM apart, with the gap in mm."""
    names = {standard_name(name): name for name in found}
    pairs = [(names[one], names[other]) for one, other in NEIGHBOURS if one in names and other in names]
    gaps = [(one, other, gap_mm(found[one], found[other])) for one, other in pairs]
    return [(one, other, gap) for one, other, gap in gaps if gap > MAX_GAP_MM]


def gap_mm(one: Organ, other: Organ) -> float:
    """Return the distance in mm between the boxes of two organs; 0 where they overlap."""
    along = zip(one.box_mm, other.box_mm, strict=True)
    return math.hypot(*(max(0.0, a[0] - b[1], b[0] - a[1]) for a, b in along))


def plausible_ml(name: str) -> tuple[float, float] | None:
    """Return the volumes in mL between which an adult's organ of that name is, or None for an unknown organ."""
    return PLAUSIBLE_ML.get(standard_name(name))


def odd_volumes(found: dict[str, Organ]) -> list[tuple[str, float]]:
    """Return organs with a volume (mL) outside PLAUSIBLE_ML; an organ cut by the scan's edge is never too small."""
    odd = []
    for name, organ in found.items():
        low, high = plausible_ml(name) or (0, np.inf)
        if organ.ml > high or (organ.ml < low and not organ.cut):
            odd.append((name, organ.ml))
    return odd


def comparable_ml(found: dict[str, Organ]) -> dict[str, float]:
    """Return the volumes in mL by name, without organs that are too small because the scan's edge cuts them."""
    small = {name for name, organ in found.items() if organ.cut and organ.ml < (plausible_ml(name) or (0, 0))[0]}
    return {name: organ.ml for name, organ in found.items() if name not in small}


def odd_organs(cases: Sequence[Mapping[str, float]]) -> str | None:
    """Return a sentence when most cases are odd in the same organ, as when their ids are those of another list.

    Args:
        cases: the organs' volumes in mL by name, of each case; best from `comparable_ml`.

    Returns:
        the sentence, about the organ that is odd in most cases, or None.
    """
    cases = [case for case in cases if case]
    odd = {}
    for name in dict.fromkeys(name for case in cases for name in case):
        low, high = plausible_ml(name) or (0, np.inf)
        values = sorted(case[name] for case in cases if name in case and not low <= case[name] <= high)
        if len(values) >= max(MIN_ODD, ODD_SHARE * len(cases)):
            odd[name] = values
    if not odd:
        return None
    name, values = max(odd.items(), key=lambda item: len(item[1]))  # the first organ of the list among equals
    low, high = plausible_ml(name)
    others = f" (odd as well: {', '.join(other for other in odd if other != name)})" if len(odd) > 1 else ""
    return (
        f"ids of another list? {name} is of {values[0]:.4g} to {values[-1]:.4g} mL in {len(values)} of {len(cases)} "
        f"cases, expected {low:g} to {high:g}{others}; python -m data.convert remaps ids by name"
    )


def remarks(found: dict[str, Organ], organs: Sequence[str]) -> list[str]:
    """List in words what to look at in a label map: organs missing, cut off, in pieces, too small or too large.

    Args:
        found: as `organs_in` gives it.
        organs: names by id, background first.
    """
    said = [
        f"{right} lies to the patient's left of the {left}: mirrored, or taken for one another"
        for right, left in swapped_sides(found)
    ]
    said += [f"{one} {gap:.0f} mm from the {other}, expected beside it" for one, other, gap in far_apart(found)]
    for name in organs[1:]:
        if name not in found:
            said.append(f"{name} not found")
            continue
        organ = found[name]
        if organ.cut:
            said.append(f"{name} cut by the {' and the '.join(organ.cut)} of the scan")
        apart = 1 - organ.pieces_ml[0] / organ.ml
        if apart > CRUMBS:
            said.append(f"{name} in {len(organ.pieces_ml)} pieces, {apart:.0%} of it apart from the largest")
    for name, ml in odd_volumes(found):
        low, high = plausible_ml(name)
        said.append(f"{name} of {rounded(ml)} mL, expected {low:g} to {high:g} in an adult")
    return said


def rounded(value: float) -> str:
    """Return a number as text, with three digits or all before the point: 0.0123, 12.3, 1230."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def volume_text(ml: float) -> str:
    """Return a volume in mL as text, with one decimal; below 0.1 mL with three digits, since it is not 0."""
    return rounded(ml) if 0 < ml < 0.1 else f"{ml:,.1f}"


def share_off_tissue(voxels: np.ndarray, labels: np.ndarray, organs: Sequence[str]) -> float:
    """Return the share of the voxels of SOLID_ORGANS with HU outside SOLID_HU; 0 when none of them is labelled.

    Args:
        voxels: (X, Y, Z) HU.
        labels: (X, Y, Z) ids on the same grid, below K.
        organs: names by id, background first.
    """
    hu = voxels[np.array([standard_name(name) in SOLID_ORGANS for name in organs])[labels]]
    low, high = SOLID_HU
    return np.count_nonzero((hu < low) | (hu > high)) / max(1, hu.size)


def misplaced(voxels: np.ndarray, labels: np.ndarray, organs: Sequence[str]) -> tuple[float, str | None]:
    """Check that a label map fits its scan's organs; arguments as for `share_off_tissue`.

    Returns:
        the share of solid organs' voxels that is off tissue, 0 up to MAX_OFF_TISSUE; and the axis along which
        one of the two is mirrored, as "left and right", or None.
    """
    off = share_off_tissue(voxels, labels, organs)
    if off <= MAX_OFF_TISSUE:
        return 0.0, None
    mirrored = [share_off_tissue(voxels, np.flip(labels, axis), organs) for axis in range(3)]
    axis = int(np.argmin(mirrored))
    return off, " and ".join(ENDS[axis]) if mirrored[axis] * BETTER_MIRRORED < off else None
