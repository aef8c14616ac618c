"""The colour of each organ id, the same in every picture and in the label maps themselves.

The colours differ from one another in every vision and from the gray of CT. They started from an atlas (liver brown,
arteries red, veins blue, gallbladder green). The smallest CIEDE2000 distances, grays from 10 to 90 % of white,
dichromats simulated after Machado et al. 2009 at full severity:

    vision          between two organs                          between an organ and a gray
    normal          20.8 (gallbladder and duodenum)             20.7 (pancreas)
    protanopia      11.0 (pancreas and gallbladder)              8.8 (aorta)
    deuteranopia    11.3 (gallbladder and left kidney)           6.0 (right adrenal gland)
    tritanopia      11.1 (aorta and left kidney)                 8.7 (esophagus)

tests/visualization/test_overlay.py measures them again.
"""

import colorsys

ORGAN_COLOURS = (
    "#9d4300",  # 1 liver
    "#d8df06",  # 2 right kidney
    "#944882",  # 3 spleen
    "#fecf91",  # 4 pancreas
    "#d72d4a",  # 5 aorta
    "#2c4de0",  # 6 inferior vena cava
    "#a7f8d4",  # 7 right adrenal gland
    "#1992f1",  # 8 left adrenal gland
    "#82b165",  # 9 gallbladder
    "#bdb6ff",  # 10 esophagus
    "#d987b7",  # 11 stomach
    "#0d8560",  # 12 duodenum
    "#d27801",  # 13 left kidney
)
# Turns of the colour circle from one id to the next beyond the 13: the golden ratio never comes back to a hue.
GOLDEN_RATIO = 0.618034


def colour_of(organ: int) -> tuple[float, float, float]:
    """Return an organ's colour.

    Ids beyond the 13 of ORGAN_COLOURS get one hue after another by the golden ratio, in three turns of brightness.
    Only the 13 are measured to be told apart.

    Args:
        organ: id, 1 or more; the background has no colour.

    Returns:
        red, green, blue, each 0 to 1.

    Raises:
        ValueError: when the id is below 1.
    """
    if organ < 1:
        raise ValueError(f"only ids from 1 on have a colour, not {organ}")
    if organ <= len(ORGAN_COLOURS):
        return tuple(int(ORGAN_COLOURS[organ - 1][start : start + 2], 16) / 255 for start in (1, 3, 5))
    beyond = organ - len(ORGAN_COLOURS) - 1
    return colorsys.hsv_to_rgb(beyond * GOLDEN_RATIO % 1, (0.45, 0.9, 0.7)[beyond % 3], (0.95, 0.8, 0.6)[beyond % 3])


def rgb_of(organ: int) -> tuple[int, int, int]:
    """Return an organ's colour as red, green, blue in 0..255; raises as `colour_of`."""
    return tuple(round(255 * part) for part in colour_of(organ))
