"""The look of every picture: the organs' colours, the lines, and how a figure reaches the disk.

The organs' colours come from core/scans/organ_colours.py, since label maps carry them too.
"""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from core.scans.organ_colours import colour_of, rgb_of
from core.system.files import whole_file
from visualization import fonts
from visualization.page import data_url

# Pixels an inch: a picture 11 inches wide fills a full-HD screen's width and no more.
PIXELS_PER_INCH = 150
PICTURE_SUFFIXES = (".png", ".jpg", ".webp", ".pdf", ".svg")
# What is written and drawn, and what it stands on: the organs' light colours would vanish on white.
INK, PAPER = "#f2f2f2", "#000000"
# What is wrong with a prediction: organ missed, organ where there is none, one organ taken for another. Far apart in
# lightness and in blue, so that every vision tells them apart.
MISSED, EXTRA, MIXED_UP = "#ff4d3d", "#2fb8ff", "#ffe75e"


def colour_table(classes: int) -> np.ndarray:
    """Give all classes' colours, to be indexed with a label map.

    Args:
        classes: K, the background included.

    Returns:
        (K, 4) float64: red, green, blue, opacity, 0 to 1; the background is wholly transparent.
    """
    table = np.zeros((classes, 4))
    for organ in range(1, classes):
        table[organ] = (*colour_of(organ), 1.0)
    return table


def organ_rules(classes: int) -> str:
    """Return the organs' colours for a web page, as CSS classes `organ-1`, `organ-2`, ... up to K - 1."""
    colours = {organ: " ".join(map(str, rgb_of(organ))) for organ in range(1, classes)}
    return "\n".join(f".organ-{organ} {{ background: rgb({colour}); }}" for organ, colour in colours.items())


def apply_style() -> None:
    """Set matplotlib's defaults for the figures made from here on: light on black, as scans are read."""
    matplotlib.rcParams.update(
        {
            "font.family": fonts.families,
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


def figure_url(figure: Figure) -> str:
    """Return a figure as a data URL, WebP, that a page can hold."""
    content = io.BytesIO()
    figure.savefig(content, format="webp")
    return data_url("image/webp", content.getvalue())


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
