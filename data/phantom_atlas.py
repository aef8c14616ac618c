"""The organs of a phantom, and their unlabelled neighbours, as tubes in an atlas.

The atlas is in mm in RAS+ (x to the patient's right, y to the front, z to the head), the origin in the middle of the
trunk at the height of the first lumbar vertebra.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Part:
    """An organ, or an unlabelled neighbour, as a union of tubes that are jittered together.

    Attributes:
        label: FLARE22's id; 0 for what has none.
        hu: HU without contrast medium.
        uptake: HU that contrast medium adds in the mean portal venous phase.
        tubes: each a text "x y z radius; x y z radius; ..." in atlas mm.
        carved: tubes taken away again: hila, fissures.
        squash: thickness along (x, y, z) relative to a round tube.
        gap_mm: fat kept free around it.
        wall_mm: thickness of the wall of a hollow part; 0 when solid.
        shift_mm, growth, turn_degrees: largest jitter of place, of size as a share, and of each angle.
    """

    label: int
    hu: float
    uptake: float
    tubes: tuple[str, ...]
    carved: tuple[str, ...] = ()
    squash: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gap_mm: float = 1.5
    wall_mm: float = 0.0
    shift_mm: float = 6.0
    growth: float = 0.08
    turn_degrees: float = 7.0


def mirrored(part: Part, label: int) -> Part:
    """Return the same part on the patient's other side."""

    def flip(tubes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("; ".join(f"{-x} {y} {z} {radius}" for x, y, z, radius in read_points(tube)) for tube in tubes)

    return replace(part, label=label, tubes=flip(part.tubes), carved=flip(part.carved))


def read_points(tube: str) -> np.ndarray:
    """Return (n, 4) x, y, z and radius in atlas mm of a tube written as in Part."""
    return np.array([point.split() for point in tube.split(";")], float)


# How muscles and vessels move that run along the spine: hardly, and they keep their length.
FIXED = {"shift_mm": 2.0, "growth": 0.0, "turn_degrees": 0.0}

ERECTOR = Part(0, 50, 8, ("30 -78 200 17; 32 -78 0 19; 28 -80 -200 19",), **FIXED)
PSOAS = Part(0, 50, 8, ("24 -44 5 7; 32 -44 -40 14; 44 -38 -110 20; 56 -28 -200 22",), **FIXED)
KIDNEY, KIDNEY_SINUS = "48 -46 32 19; 59 -41 14 24; 62 -38 -12 25; 58 -34 -34 20", "32 -26 -2 10; 46 -34 0 10"
RIGHT_KIDNEY = Part(2, 35, 135, (KIDNEY,), carved=(KIDNEY_SINUS,), shift_mm=7, growth=0.07)
COMMON_ILIAC = Part(0, 42, 105, ("-6 -16 -106 6; 22 -12 -150 6; 44 -4 -200 6",), **FIXED)
ADRENAL = ("29 -22 60 5.4; 29 -34 51 5.2; 30 -44 43 4.6", "29 -22 60 5.4; 34 -29 52 5.2; 41 -37 47 4.6")
RIGHT_ADRENAL = Part(7, 28, 48, ADRENAL, gap_mm=2, shift_mm=3)
COLON = (
    "82 -15 -170 24; 88 -5 -100 24; 84 10 -52 20; 55 55 -48 18; 0 68 -58 17; "
    "-60 58 -30 17; -96 15 5 17; -100 -20 -40 15; -98 -25 -170 14"
)
HEART = "5 20 160 38; -35 38 138 40"
STOMACH = "-58 -12 84 32; -68 12 55 34; -58 36 22 28; -22 46 2 21; 12 42 6 15; 30 34 12 10"
RIGHT_LOBE, LEFT_LOBE = "72 -10 14 52; 70 -2 48 67; 62 8 60 61", "52 34 52 45; 10 50 62 33; -32 50 72 19"
LIVER_FISSURE, RETROPERITONEUM = "28 90 20 4; 26 50 22 5; 24 20 28 6", "32 -34 68 9; 34 -38 46 12; 46 -48 8 17"
SPLEEN, SPLEEN_HILUM = "-84 -52 74 23; -102 -36 52 32; -102 -14 28 23", "-62 -10 70 20; -64 -14 45 22"
DUODENUM = "34 34 10 11; 50 20 4 12; 52 10 -40 12; 32 2 -64 11; -8 4 -62 11; -24 14 -36 10"
PANCREAS = "26 4 -34 11; 30 12 -14 16; 6 20 4 10; -24 14 14 12; -52 -6 26 11.5; -74 -22 34 9"
PORTAL_VEIN = "4 0 -50 5; 5 4 0 6; 24 9 26 6; 46 14 44 6"
AORTA = "-16 -26 220 11; -12 -20 90 11; -6 -16 0 9.5; -6 -16 -105 8.5"
VENA_CAVA = "20 -18 -110 10; 20 -18 0 11; 22 -12 50 12; 16 2 100 12; 14 8 122 11"
GALLBLADDER = "44 36 14 9; 50 46 -6 15; 54 54 -20 16"
ESOPHAGUS = "-4 -12 220 8.5; -8 -6 120 9; -20 -6 96 9; -36 -6 84 9"

MUSCLES = (ERECTOR, mirrored(ERECTOR, 0), PSOAS, mirrored(PSOAS, 0))
# Painted in this order, after muscles and small bowel: what comes later lies over what came before.
PARTS = (
    Part(0, 40, 25, (COLON,), wall_mm=3, shift_mm=12, growth=0.15),
    Part(0, 40, 95, (HEART,), squash=(1, 1, 0.8)),
    Part(11, 40, 32, (STOMACH,), wall_mm=4.5, growth=0.15),
    Part(1, 55, 50, (RIGHT_LOBE, LEFT_LOBE), carved=(LIVER_FISSURE, RETROPERITONEUM), growth=0.06),
    Part(3, 48, 67, (SPLEEN,), carved=(SPLEEN_HILUM,), growth=0.13),
    RIGHT_KIDNEY,
    mirrored(RIGHT_KIDNEY, 13),
    Part(12, 40, 25, (DUODENUM,), wall_mm=3.5, growth=0.1),
    Part(4, 38, 52, (PANCREAS,), gap_mm=1, growth=0.1),
    Part(0, 42, 105, (PORTAL_VEIN,), gap_mm=0.5, shift_mm=4),
    COMMON_ILIAC,
    mirrored(COMMON_ILIAC, 0),
    Part(5, 42, 105, (AORTA,), **FIXED),
    Part(6, 40, 92, (VENA_CAVA,), squash=(1, 0.85, 1), gap_mm=0.5, **FIXED),
    Part(9, 12, 0, (GALLBLADDER,), gap_mm=0.8, growth=0.14),
    Part(10, 38, 12, (ESOPHAGUS,), wall_mm=4.5, **FIXED),
    RIGHT_ADRENAL,
    mirrored(RIGHT_ADRENAL, 8),
)
KIDNEYS = (2, 13)
