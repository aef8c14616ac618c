"""One slice of every case on a sheet, with its organs."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from visualization.fonts import drawable
from visualization.slices import draw_slice
from visualization.style import INK, apply_style

CELL_INCHES = 2.2
MAX_COLUMNS = 8
NAME_LETTERS = 26


def draw_sheet(slices: Sequence[tuple[str, np.ndarray, np.ndarray, Sequence[float]]]) -> Figure:
    """Draw axial slices side by side, to scale in themselves.

    Args:
        slices: of each case its id, HU (X, Y), ids (X, Y), and the size in mm along X and Y.
    """
    apply_style()
    columns = min(MAX_COLUMNS, math.ceil(math.sqrt(len(slices))))
    rows = math.ceil(len(slices) / columns)
    figure = Figure(figsize=(columns * CELL_INCHES, rows * (CELL_INCHES + 0.2)))
    for place, (case, hu, ids, size_mm) in enumerate(slices, start=1):
        axes = figure.add_subplot(rows, columns, place)
        draw_slice(axes, hu, ids, size_mm)
        name = case if len(case) <= NAME_LETTERS else f"{case[: NAME_LETTERS - 1]}…"
        axes.set_title(drawable(name), color=INK, fontsize=7, pad=3)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.2 / (rows * 2.4), wspace=0.04, hspace=0.12)
    return figure
