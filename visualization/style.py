"""The look of every picture: the organs' colours, the fonts and how a figure reaches the disk.

Colours belong to ids, not to names, so an organ looks the same in the slices, the curves, the movie and the viewer.
"""

import colorsys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from core.files import whole_file

ORGAN_COLOURS = (
    "#925401",  # 1 liver
    "#e9ee03",  # 2 right kidney
    "#7b5682",  # 3 spleen
    "#fed28f",  # 4 pancreas
    "#e72144",  # 5 aorta
    "#075cc6",  # 6 inferior vena cava
    "#a7f7d3",  # 7 right adrenal gland
    "#1796e9",  # 8 left adrenal gland
    "#75b821",  # 9 gallbladder
    "#c9b2e1",  # 10 esophagus
    "#db61a3",  # 11 stomach
    "#55845b",  # 12 duodenum
    "#e89a86",  # 13 left kidney
)
# Turns of the colour circle from one id to the next beyond the 13: the golden ratio never comes back to a hue.
GOLDEN_RATIO = 0.618034
# DejaVu comes with matplotlib, so a bare machine draws the same letters.
FONT = "DejaVu Sans"
# Pixels an inch: a picture 11 inches wide fills a full-HD screen's width and no more.
PIXELS_PER_INCH = 150
PICTURE_SUFFIXES = (".png", ".jpg", ".webp", ".pdf", ".svg")
# What is written and drawn, and what it stands on: the organs' light colours would vanish on white.
INK, PAPER = "#f2f2f2", "#000000"


def colour_of(organ: int) -> tuple[float, float, float]:
    """Give an organ's colour.

    The 13 of ORGAN_COLOURS, then for larger ids one hue after another by the golden ratio in three turns of
    brightness: the same at every call, but only the 13 are measured to be told apart.

    Args:
        organ: id, 1 or more; the background has no colour.

    Returns:
        Red, green, blue, each 0 to 1.

    Raises:
        ValueError: the id is below 1.
    """
    if organ < 1:
        raise ValueError(f"only ids from 1 on have a colour, not {organ}")
    if organ <= len(ORGAN_COLOURS):
        return tuple(int(ORGAN_COLOURS[organ - 1][start : start + 2], 16) / 255 for start in (1, 3, 5))
    beyond = organ - len(ORGAN_COLOURS) - 1
    return colorsys.hsv_to_rgb(beyond * GOLDEN_RATIO % 1, (0.45, 0.9, 0.7)[beyond % 3], (0.95, 0.8, 0.6)[beyond % 3])


def colour_table(classes: int) -> np.ndarray:
    """Give all classes' colours, to be indexed with a label map.

    Args:
        classes: K, the background included.

    Returns:
        (K, 4) float64 red, green, blue, opacity, 0 to 1; the background is wholly transparent.
    """
    table = np.zeros((classes, 4))
    for organ in range(1, classes):
        table[organ] = (*colour_of(organ), 1.0)
    return table


def apply_style() -> None:
    """Set matplotlib's defaults for the figures made from here on: light on black, as scans are read."""
    matplotlib.rcParams.update(
        {
            "font.family": FONT,
            "font.size": 10,
            # A case may have dollar signs in its name.
            "text.parse_math": False,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.6,
            "figure.dpi": PIXELS_PER_INCH,
            "savefig.dpi": "figure",
            "savefig.facecolor": "auto",
            **dict.fromkeys(("figure.facecolor", "axes.facecolor"), PAPER),
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        }
    )


def check_format(path: Path) -> None:
    """Check, before any work is done, that a picture's name ends with a format that can be written.

    Raises:
        ValueError: naming the path and the formats.
    """
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{path}: a picture's name must end with one of {', '.join(PICTURE_SUFFIXES)}")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole: whoever opens the path sees the old picture or the new one, never half of one.

    Args:
        figure: a `matplotlib.figure.Figure`, made without pyplot: no screen is needed and nothing stays in memory.
        path: the suffix chooses the format; the folder is made when missing.

    Raises:
        ValueError: when the suffix is no picture's.
        OSError: when the folder cannot be written to.
    """
    check_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary)
