"""Lay out a figure in inches for pictures of one scan's slices."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from visualization.fonts import drawable
from visualization.style import apply_style

# Inches around a panel, for its letters; between the rows, for letters, scale bar and caption; and for the title.
MARGIN, ROW_GAP, TITLE_HEIGHT = 0.35, 0.85, 0.4


class Canvas:
    """A figure that is filled with axes placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float, title: str):
        apply_style()
        self.figure = Figure(figsize=(width, height))
        self.figure.text(
            MARGIN / width, 1 - TITLE_HEIGHT / height, drawable(title), size=13, weight="bold", va="bottom"
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes of that size in inches, their upper left corner at `left`, `top`."""
        w, h = self.figure.get_size_inches()
        return self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
