"""What a label map of the abdomen can be: which organ lies on which side, and how large each is in adults.

Everything goes by the organs' names, so that data with other ids or fewer organs are checked as far as they go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.preprocess import Geometry

# Volumes in mL of adults' organs, set generously: wide enough for small and diseased ones and for tubes (aorta,
# vena cava, esophagus, duodenum) of which a scan shows a part. What lies outside is worth a look, not wrong.
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
RIGHT_OF = (
    ("liver", "spleen"),
    ("right kidney", "left kidney"),
    ("right adrenal gland", "left adrenal gland"),
)


@dataclass(frozen=True)
class Organ:
    """One organ in one label map.

    Attributes:
        ml: its volume.
        right_mm: how far to the patient's right its centre lies, from the origin of world coordinates.
        cut: whether it touches the edge of the scan, so that it may go on outside.
    """

    ml: float
    right_mm: float
    cut: bool


def organs_in(labels: np.ndarray, geometry: Geometry, organs: Sequence[str]) -> dict[str, Organ]:
    """The organs that occur in labels, (X, Y, Z) integers below K in RAS+ order, by name; background left out."""
    counts = [
        np.stack([np.bincount(plane.ravel(), minlength=len(organs)) for plane in np.moveaxis(labels, axis, 0)])
        for axis in range(3)
    ]
    corners = geometry.corners_mm  # in the order of (x, y, z) with z fastest
    steps = [(corners[4 >> axis] - corners[0])[0] / max(1, labels.shape[axis] - 1) for axis in range(3)]
    found = {}
    for i, name in enumerate(organs[1:], start=1):
        voxels = int(counts[0][:, i].sum())
        if voxels:
            centre = [(along[:, i] @ np.arange(len(along))) / voxels for along in counts]
            right_mm = corners[0][0] + sum(step * place for step, place in zip(steps, centre, strict=True))
            cut = any(along[0, i] or along[-1, i] for along in counts)
            found[name] = Organ(voxels * geometry.voxel_ml, float(right_mm), bool(cut))
    return found


def swapped_sides(found: dict[str, Organ]) -> list[tuple[str, str]]:
    """The pairs of RIGHT_OF that lie the wrong way round."""
    pairs = [(right, left) for right, left in RIGHT_OF if right in found and left in found]
    return [(right, left) for right, left in pairs if found[right].right_mm <= found[left].right_mm]


def odd_volumes(found: dict[str, Organ]) -> list[tuple[str, float]]:
    """Organs with a volume outside PLAUSIBLE_ML, in mL; one that the scan's edge cuts may be as small as it likes."""
    odd = []
    for name, organ in found.items():
        low, high = PLAUSIBLE_ML.get(name, (0, np.inf))
        if organ.ml > high or (organ.ml < low and not organ.cut):
            odd.append((name, organ.ml))
    return odd
