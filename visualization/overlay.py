"""Slices of a scan with its organs, as a picture: the three that show most, prediction beside reference, or many.

    python -m visualization.overlay SCAN LABELS --output slices.png
    python -m visualization.overlay SCAN PREDICTION --reference LABELS --output errors.png
    python -m visualization.overlay SCAN LABELS --contact 20 --output sheet.png

One axial, one coronal and one sagittal slice are chosen to show as many organs as possible; a sheet holds axial slices
from the lowest to the highest with an organ. All share one scale in mm, so thick slices are drawn as thick as they are.
Left and right follow the radiological convention: the patient's right is at the picture's left. The slice numbers in
the captions count from 0 in RAS+ order: from the left, the back and the feet.
"""

import argparse
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from visualization import slices
from visualization.canvas import MARGIN, ROW_GAP, TITLE_HEIGHT, Canvas
from visualization.comparison import draw_comparison
from visualization.shown import Shown, picture_parser, print_written, read_shown
from visualization.style import check_format, save_figure

# Inches that the panels may take side by side and above one another, gaps not counted.
PANELS_WIDTH, PANELS_HEIGHT = 10.0, 10.0
SHEET_WIDTH, SHEET_CELL = 14.0, 2.6  # inches of a sheet, and of a slice on it at most
SHEET_GAP, SHEET_CAPTION = 0.08, 0.22  # inches between the slices of a sheet, and for the caption above each


def draw_overlay(shown: Shown) -> Figure:
    """Draw the three slices that show the most organs, with directions, scale bar and the organs' volumes.

    Without any organ the middle slices are drawn.

    Returns:
        the figure, for `save_figure`: coronal below axial, sagittal beside coronal, the legend beside axial.
    """
    voxels, labels, organs, spacing_mm = shown.voxels, shown.labels, shown.organs, shown.geometry.spacing_mm
    counts = slices.count_by_slice(labels, len(organs))
    present = slices.organs_present(counts)
    chosen, box = slices.choose_slices(counts), slices.crop_to_organs(counts, spacing_mm)
    extent_mm = slices.box_extent_mm(box, spacing_mm)

    x, y, z = extent_mm
    x, y, z = extent_mm * min(PANELS_WIDTH / (x + y), PANELS_HEIGHT / (y + z))
    top_row = max(y, (len(present) + 2) * slices.LEGEND_LINE)  # beside the organs the legend has a heading and a foot
    right, upper, lower = 3 * MARGIN + x, TITLE_HEIGHT + MARGIN, TITLE_HEIGHT + MARGIN + top_row + ROW_GAP
    canvas = Canvas(right + max(y, slices.legend_width(1)) + MARGIN, lower + z + MARGIN, shown.title)
    panels = canvas.axes(MARGIN, upper, x, y), canvas.axes(MARGIN, lower, x, z), canvas.axes(right, lower, y, z)
    for panel, (axis, (view, letters)) in zip(panels, slices.VIEWS.items(), strict=True):
        plane = slices.plane_of(axis, chosen[axis], box)
        slices.draw_slice(panel, voxels[plane], labels[plane], np.delete(extent_mm, axis))
        slices.write_around(panel, letters, f"{view}, {'xyz'[axis]} = {chosen[axis]}")
    slices.draw_scale_bar(panels[0])
    legend = canvas.axes(right, upper, slices.legend_width(1), top_row)
    columns = {"mL": slices.volume_column(counts, shown.geometry.voxel_ml)}
    slices.draw_legend(legend, organs, present, columns, slices.organs_shown(counts, chosen))
    return canvas.figure


def draw_contact_sheet(shown: Shown, number: int) -> Figure:
    """Return a figure of so many axial slices, evenly from the highest to the lowest with an organ.

    Without any organ the slices are those of the whole scan. There are fewer when the scan has not as many.
    """
    voxels, labels, organs, spacing_mm = shown.voxels, shown.labels, shown.organs, shown.geometry.spacing_mm
    counts = slices.count_by_slice(labels, len(organs))
    chosen, present = evenly_spaced(counts[2], number), slices.organs_present(counts)
    box = slices.crop_to_organs(counts, spacing_mm)
    size_mm = slices.box_extent_mm(box, spacing_mm)[:2]
    x, y = size_mm * SHEET_CELL / max(size_mm)
    columns = math.ceil(math.sqrt(len(chosen) * (y + SHEET_CAPTION) / x))
    columns = min(len(chosen), columns, int(SHEET_WIDTH / (x + SHEET_GAP)))
    legend_height = (len(present) + 2) * slices.LEGEND_LINE
    upper, cell = TITLE_HEIGHT + MARGIN, y + SHEET_CAPTION + SHEET_GAP
    side, below = 2 * MARGIN + columns * (x + SHEET_GAP), math.ceil(len(chosen) / columns) * cell
    canvas = Canvas(side + slices.legend_width(1) + MARGIN, upper + max(below, legend_height) + MARGIN, shown.title)
    for place, z in enumerate(chosen):
        row, column = divmod(place, columns)
        panel = canvas.axes(MARGIN + column * (x + SHEET_GAP), upper + SHEET_CAPTION + row * cell, x, y)
        plane = slices.plane_of(2, z, box)
        slices.draw_slice(panel, voxels[plane], labels[plane], size_mm)
        panel.annotate(f"z = {z}", (0, 1), (0, 6), **slices.AROUND, size=8)
    write_sides(canvas.figure.axes[0])
    slices.draw_scale_bar(panel)
    seen = set(np.flatnonzero(counts[2][chosen].any(axis=0)).tolist())
    volumes = {"mL": slices.volume_column(counts, shown.geometry.voxel_ml)}
    slices.draw_legend(canvas.axes(side, upper, slices.legend_width(1), legend_height), organs, present, volumes, seen)
    return canvas.figure


def evenly_spaced(counts: np.ndarray, number: int) -> np.ndarray:
    """Return slice numbers evenly from the highest to the lowest slice with an organ, from a (slices, K) count.

    Without any organ they cover all slices. There are fewer than `number` when there are fewer slices.
    """
    found = np.flatnonzero(counts[:, 1:].any(axis=1))
    first, last = (found[0], found[-1]) if len(found) else (0, len(counts) - 1)
    return np.unique(np.linspace(first, last, number).round().astype(int))[::-1]


def write_sides(panel: Axes) -> None:
    """Write R and L inside a panel, at the patient's right and left."""
    for letter, where, side in (("R", (0.02, 0.5), "left"), ("L", (0.98, 0.5), "right")):
        panel.annotate(letter, where, xycoords="axes fraction", ha=side, va="center", weight="bold")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        check_format(args.output)
        if args.contact is not None and args.reference is not None:
            raise ValueError("--contact and --reference: a sheet shows one label map, expected one of the two")
        if args.contact is not None and args.contact < 1:
            raise ValueError(f"--contact: got {args.contact}, expected 1 or more")
    shown, note = read_shown(args)
    with refusing(REFUSED):
        if args.reference:
            figure = draw_comparison(shown)
        else:
            figure = draw_contact_sheet(shown, args.contact) if args.contact else draw_overlay(shown)
        save_figure(figure, args.output)
    print_written(args.output, note)
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    output = "picture to write: .png, .jpg, .webp, .pdf or .svg"
    parser = picture_parser("overlay", __doc__, output, "reference to draw beside it, and where the two differ")
    parser.add_argument("--contact", type=int, metavar="N", help="draw a sheet of N axial slices instead")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
