"""Many cases on one sheet: an axial slice each, with the organs' contours, to look through a data set at a glance.

`python -m data.doctor` draws it. Every slice has its own scale, with voxels as wide and high as they are in mm; the
patient's right is at the picture's left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from visualization.overlay import draw_slice
from visualization.style import INK, apply_style, colour_of, save_figure

# Inches that a sheet's cells cover together, and the least and the most of one cell's width.
SHEET_AREA, SMALLEST_CELL, LARGEST_CELL = 240.0, 1.5, 5.0
CELL_HEIGHT = 0.8  # of its width: bodies that lie are wider than high
WIDER = 1.5  # a sheet's width by its height, about as screens are
MARGIN, TITLE_HEIGHT, LETTERS = 0.15, 0.45, 0.42  # inches; LETTERS: above each slice
LEGEND_WIDTH, LEGEND_LINE = 1.75, 0.22  # inches of one entry
CHARACTER = 0.6  # a letter's width by its height
SEVERITY_COLOURS = {"error": "#ff6b6b", "warning": "#ffd166", "": INK}


@dataclass(frozen=True)
class Panel:
    """One case on the sheet.

    Attributes:
        title: its name.
        caption: the line below.
        severity: "error", "warning" or "": the letters' colour.
        voxels: (rows, columns) HU as seen, or None where there is nothing to show.
        labels: (rows, columns) ids as seen.
        size_mm: width and height of the slice.
    """

    title: str
    caption: str
    severity: str
    voxels: np.ndarray | None
    labels: np.ndarray | None
    size_mm: tuple[float, float]


def cell_width(cases: int) -> float:
    """Inches for one case: smaller for many of them, so that a sheet stays one that can be opened."""
    return min(LARGEST_CELL, max(SMALLEST_CELL, math.sqrt(SHEET_AREA / (cases * CELL_HEIGHT))))


def draw_sheet(panels: Sequence[Panel], organs: Sequence[str], title: str, path: Path) -> None:
    """Draw the panels, in rows, and the legend of the organs.

    Args:
        panels: at least one.
        organs: names by id, background first.
        title: of the sheet.
        path: picture to write, whole.
    """
    apply_style()
    width = cell_width(len(panels))
    height = width * CELL_HEIGHT + LETTERS
    columns = min(len(panels), max(1, round(math.sqrt(WIDER * len(panels) * height / width))))
    rows = math.ceil(len(panels) / columns)
    sheet_width = max(columns * (width + MARGIN) + MARGIN, 2 * LEGEND_WIDTH + 2 * MARGIN)
    per_line = int((sheet_width - 2 * MARGIN) // LEGEND_WIDTH)
    legend = math.ceil((len(organs) - 1) / per_line) * LEGEND_LINE
    sheet_height = TITLE_HEIGHT + rows * (height + MARGIN) + legend + MARGIN
    figure = Figure(figsize=(sheet_width, sheet_height))
    figure.text(MARGIN / sheet_width, 1 - TITLE_HEIGHT / 2 / sheet_height, title, size=11, weight="bold", va="center")
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left = MARGIN + column * (width + MARGIN)
        draw_panel(figure, panel, left, TITLE_HEIGHT + row * (height + MARGIN), width)
    draw_legend(figure, organs, per_line, sheet_height - legend - MARGIN / 2)
    save_figure(figure, path)


def draw_panel(figure: Figure, panel: Panel, left: float, top: float, width: float) -> None:
    """Draw one case in a cell `width` inches wide, its upper left corner so many inches from the sheet's."""
    sheet_width, sheet_height = figure.get_size_inches()
    for text, size, down in ((panel.title, 8, 0.1), (panel.caption, 6.5, 0.27)):
        most = int(width * 72 / (CHARACTER * size))
        text = text if len(text) <= most else f"{text[: most - 3]}..."
        weight = "bold" if size == 8 else "normal"
        figure.text(
            left / sheet_width,
            1 - (top + down) / sheet_height,
            text,
            size=size,
            weight=weight,
            va="center",
            color=SEVERITY_COLOURS[panel.severity],
        )
    cell_height = width * CELL_HEIGHT
    if panel.voxels is None:
        x, y = left + width / 2, top + LETTERS + cell_height / 2
        figure.text(x / sheet_width, 1 - y / sheet_height, "nothing to show", size=8, ha="center", va="center")
        return
    inches = min(width / panel.size_mm[0], cell_height / panel.size_mm[1])
    w, h = (mm * inches for mm in panel.size_mm)
    x, y = left + (width - w) / 2, top + LETTERS + (cell_height - h) / 2
    axes = figure.add_axes((x / sheet_width, 1 - (y + h) / sheet_height, w / sheet_width, h / sheet_height))
    draw_slice(axes, panel.voxels, panel.labels, panel.size_mm)


def draw_legend(figure: Figure, organs: Sequence[str], per_line: int, top: float) -> None:
    """List the organs' colours at the foot of the sheet, `per_line` beside one another."""
    width, height = figure.get_size_inches()
    for organ in range(1, len(organs)):
        row, column = divmod(organ - 1, per_line)
        x, y = MARGIN + column * LEGEND_WIDTH, top + (row + 0.5) * LEGEND_LINE
        corner = (x / width, 1 - (y + 0.06) / height)
        colour = colour_of(organ)
        figure.add_artist(Rectangle(corner, 0.18 / width, 0.12 / height, facecolor=colour, edgecolor=colour))
        figure.text((x + 0.26) / width, 1 - y / height, organs[organ], size=8, va="center")
