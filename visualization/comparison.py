"""A prediction beside its reference: three slices of both, and in colour where the two differ."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from core.scoring.overlap import confusion_matrix, organ_scores
from visualization import slices
from visualization.canvas import MARGIN, ROW_GAP, TITLE_HEIGHT, Canvas
from visualization.shown import Shown
from visualization.style import EXTRA, MISSED, MIXED_UP

# Inches that the panels, three columns of them, may take side by side and above one another, gaps not counted.
COMPARED_WIDTH, COMPARED_HEIGHT = 13.0, 12.0
# Share of an error's colour in its tint: an error is to be found at once, the tissue below matters less.
ERROR_TINT = 0.85
ERRORS = {"missed": MISSED, "too much": EXTRA, "another organ": MIXED_UP}  # in the order of `errors_of`


def draw_comparison(shown: Shown) -> Figure:
    """Return a figure of three views, a row each: prediction, reference, errors; its legend has each organ's Dice."""
    prediction, reference = shown.label_maps.values()
    voxels, organs, spacing_mm = shown.voxels, shown.organs, shown.geometry.spacing_mm
    counted = [slices.count_by_slice(labels, len(organs)) for labels in (prediction, reference)]
    # Slices of the prediction only when the reference is empty.
    chosen = slices.choose_slices(counted[1] if reference.any() else counted[0])
    counts = [p + r for p, r in zip(*counted, strict=True)]
    box, present = slices.crop_to_organs(counts, spacing_mm), slices.organs_present(counts)
    extent_mm = slices.box_extent_mm(box, spacing_mm)

    x, y, z = extent_mm
    scale = min(COMPARED_WIDTH / (3 * max(x, y)), COMPARED_HEIGHT / (y + 2 * z))
    legend_height = (len(present) + 3 + len(ERRORS)) * slices.LEGEND_LINE
    rows = (y + 2 * z) * scale + 2 * ROW_GAP
    column, upper = max(x, y) * scale + 2 * MARGIN, TITLE_HEIGHT + 2 * MARGIN
    side, top = MARGIN + 3 * column, upper
    canvas = Canvas(side + slices.legend_width(3) + MARGIN, upper + max(rows, legend_height) + 2 * MARGIN, shown.title)
    for axis, (view, letters) in slices.VIEWS.items():
        plane, size_mm = slices.plane_of(axis, chosen[axis], box), np.delete(extent_mm, axis)
        width, height = size_mm * scale
        panels = [canvas.axes(MARGIN + place * column, top, width, height) for place in range(3)]
        for panel, labels in zip(panels, (prediction, reference), strict=False):
            slices.draw_slice(panel, voxels[plane], labels[plane], size_mm)
        draw_errors(panels[2], voxels[plane], errors_of(prediction[plane], reference[plane]), size_mm)
        for panel in panels:
            slices.write_around(panel, letters, f"{view}, {'xyz'[axis]} = {chosen[axis]}" if panel is panels[0] else "")
        if axis == 2:
            slices.draw_scale_bar(panels[0])
            for panel, heading in zip(panels, ("prediction", "reference", "errors"), strict=True):
                panel.annotate(heading, (0, 1), (0, 26), **slices.AROUND, weight="bold")
        top += height + ROW_GAP
    volumes = [slices.volume_column(of_map, shown.geometry.voxel_ml) for of_map in counted]
    dice = organ_scores(confusion_matrix(reference, prediction, len(organs)))["dice"]
    columns = {"mL": volumes[0], "reference": volumes[1], "Dice": [f"{value:.3f}" for value in dice]}
    legend = canvas.axes(side, upper, slices.legend_width(3), legend_height)
    slices.draw_legend(legend, organs, present, columns, slices.organs_shown(counts, chosen))
    draw_error_legend(canvas, side, upper + legend_height)
    return canvas.figure


def errors_of(prediction: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return where label maps differ: 0 nowhere, 1 organ missed, 2 organ where there is none, 3 another organ."""
    errors = np.zeros(reference.shape, np.uint8)
    errors[(reference > 0) & (prediction == 0)] = 1
    errors[(reference == 0) & (prediction > 0)] = 2
    errors[(reference > 0) & (prediction > 0) & (reference != prediction)] = 3
    return errors


def draw_errors(axes: Axes, voxels: np.ndarray, errors: np.ndarray, size_mm: Sequence[float]) -> None:
    """Draw one slice: CT in gray, and in colour where prediction and reference differ.

    Args:
        axes: of the same shape as the slice.
        voxels: (A, B) HU, a slice of a RAS+ volume.
        errors: (A, B) of `errors_of`.
        size_mm: its size along A and B: the picture's width and height.
    """
    slices.draw_tissue(axes, voxels, size_mm)
    colours = np.array([(0, 0, 0, 0), *(to_rgba(colour, ERROR_TINT) for colour in ERRORS.values())])
    axes.imshow(colours[slices.as_seen(errors)], extent=(0, size_mm[0], size_mm[1], 0), interpolation="nearest")


def draw_error_legend(canvas: Canvas, left: float, bottom: float) -> None:
    """List the colours of errors, above `bottom` (inches)."""
    width, height = slices.legend_width(3), len(ERRORS) * slices.LEGEND_LINE
    axes = canvas.axes(left, bottom - height, width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for place, (name, colour) in enumerate(ERRORS.items()):
        y = (place + 0.5) * slices.LEGEND_LINE
        axes.add_patch(Rectangle((0, y - 0.07), 0.2, 0.14, facecolor=colour))
        axes.text(0.3, y, name, va="center")
