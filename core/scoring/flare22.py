"""The scoring rules of the FLARE22 challenge: label maps in, Dice and NSD out.

The rules are facts about the scripts in https://github.com/JunMa11/FLARE, FLARE22/Evaluation/FLARE22_DSC_NSD_Eval.py
and, for the same 13 organs, FLARE24/T2andT3_FLARE24_DSC_NSD_Eval.py, which added that a low Dice makes NSD 0:

    - An organ in neither label map scores 1 and 1, an organ in one only 0 and 0.
    - Aorta, inferior vena cava and esophagus count only within the reference's slices, along the third axis as the file
      stores it. The last of these slices is left out, since the script's range ends before it.
    - A Dice below 0.2 makes NSD 0.
    - Both scores are rounded to 4 places, case by case.
    - Voxels are as large as the header's pixdim says.

When an organ of the second rule has one slice only, the range is empty and the script fails; here the slice counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.ndimage import find_objects

from core.scans.organ_words import standard_name
from core.scoring.surface import nsd, surfaces_of, union

# Tolerances of NSD in mm, by organ; the organs are in the order of their ids.
TOLERANCES_MM = {
    "liver": 5.0,
    "right kidney": 3.0,
    "spleen": 3.0,
    "pancreas": 5.0,
    "aorta": 2.0,
    "inferior vena cava": 2.0,
    "right adrenal gland": 2.0,
    "left adrenal gland": 2.0,
    "gallbladder": 2.0,
    "esophagus": 3.0,
    "stomach": 5.0,
    "duodenum": 7.0,
    "left kidney": 3.0,
}
TOLERANCE_MM = 3.0  # of NSD, for organs without a tolerance there
WITHIN_REFERENCE = ("aorta", "inferior vena cava", "esophagus")
NSD_FROM_DICE = 0.2  # below this Dice, NSD is 0
DECIMALS = 4

Box = tuple[slice, slice, slice]


def tolerance_mm(organ: str, otherwise: float) -> float:
    """Return FLARE22's tolerance of NSD for an organ, however its name is spelled; `otherwise` for other organs."""
    return TOLERANCES_MM.get(standard_name(organ), otherwise)


def unknown_names(organs: Sequence[str], complete: bool = True) -> list[str]:
    """Return a sentence each on names that the protocol does not know, and on organs of the protocol without a name.

    Args:
        organs: the names of the organs that are scored, without background.
        complete: True when they are the whole list, which should have all organs of the protocol.
    """
    standard = [standard_name(organ) for organ in organs]
    lacking = [name for name in TOLERANCES_MM if name not in standard]
    unknown = [organ for organ, name in zip(organs, standard, strict=True) if name not in TOLERANCES_MM]
    found = []
    if lacking and (complete or unknown):
        whose = "its rule is" if len(lacking) == 1 else "their rules are"
        found.append(f"no organ of the list is the protocol's {', '.join(map(repr, lacking))}; {whose} not used")
    if unknown:
        found.append(
            f"the protocol does not know {', '.join(map(repr, unknown))} of the list; "
            "scored in all slices and with the tolerance of --tolerance-mm"
        )
    return found


def flare22_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    organs: Sequence[str],
    tolerances_mm: Sequence[float],
    spacing_mm: Sequence[float],
    threads: int = 1,
) -> Iterator[tuple[float, float]]:
    """Yield Dice and NSD of organ 1, 2, ..., each 0..1.

    Args:
        reference: label map, integers, its axes in the order and directions in which its file stores them.
        prediction: label map of the same shape, its axes as the reference's.
        organs: names by id, background first.
        tolerances_mm: of NSD, by id, background first.
        spacing_mm: voxel size along the three axes.
        threads: for nearest neighbours; they do not change the numbers.
    """
    boxes = zip(find_objects(reference, len(organs) - 1), find_objects(prediction, len(organs) - 1), strict=True)
    for organ, (in_reference, in_prediction) in enumerate(boxes, start=1):
        if in_reference is None or in_prediction is None:
            both_absent = float(in_reference is in_prediction)
            yield both_absent, both_absent
            continue
        box = compared_box(organs[organ], in_reference, in_prediction)
        masks = [labels[box] == organ for labels in (reference, prediction)]
        dice = 2 * np.count_nonzero(masks[0] & masks[1]) / sum(map(np.count_nonzero, masks))
        surface_dice = 0.0
        if dice >= NSD_FROM_DICE:
            surface_dice = nsd(surfaces_of(*masks, spacing_mm, threads), tolerances_mm[organ])
        yield round(dice, DECIMALS), round(surface_dice, DECIMALS)


def compared_box(organ: str, in_reference: Box, in_prediction: Box) -> Box:
    """Return the box in which an organ is compared, from its boxes in the reference and in the prediction."""
    *in_plane, slices = union((in_reference, in_prediction))
    if standard_name(organ) in WITHIN_REFERENCE:
        first, end = in_reference[2].start, in_reference[2].stop
        slices = slice(first, max(end - 1, first + 1))
    return (*in_plane, slices)
