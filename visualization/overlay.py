"""Slices of a scan with its organs, as a picture: the three that show most, prediction beside reference, or many.

    python -m visualization.overlay SCAN LABELS --output slices.png
    python -m visualization.overlay SCAN PREDICTION --truth LABELS --output errors.png
    python -m visualization.overlay SCAN LABELS --contact 20 --output sheet.png

One axial, one coronal and one sagittal slice are chosen to show as many organs as possible; a sheet holds axial slices
from the lowest to the highest with an organ. All share one scale in mm, so thick slices are drawn as thick as they are.
Left and right follow the radiological convention: the patient's right is at the picture's left. The slice numbers in
the captions count from 0 in RAS+ order: from the left, the back and the feet.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from core.scoring.organ_list import load_given
from core.scoring.overlap import confusion_matrix, organ_scores
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from visualization.shown import add_organ_flags, label_map_paths, print_written, read_shown
from visualization.slices import (
    AROUND,
    LEGEND_LINE,
    VIEWS,
    as_seen,
    choose_slices,
    count_by_slice,
    crop_to_organs,
    draw_legend,
    draw_scale_bar,
    draw_slice,
    draw_tissue,
    legend_width,
    write_around,
)
from visualization.style import EXTRA, MISSED, MIXED_UP, apply_style, check_format, save_figure

# Inches that the panels may take side by side and above one another, gaps not counted.
PANELS_WIDTH, PANELS_HEIGHT = 10.0, 10.0
COMPARED_WIDTH, COMPARED_HEIGHT = 13.0, 12.0  # the same where three columns stand side by side
SHEET_WIDTH, SHEET_CELL = 14.0, 2.6  # inches of a sheet, and of a slice on it at most
SHEET_GAP, SHEET_CAPTION = 0.08, 0.22  # inches between the slices of a sheet, and for the caption above each
# Inches around a panel, for its letters; between the rows, for letters, scale bar and caption; and for the title.
MARGIN, ROW_GAP, TITLE_HEIGHT = 0.35, 0.85, 0.4
# Share of an error's colour in its tint: an error is to be found at once, the tissue below matters less.
ERROR_TINT = 0.85
ERRORS = {"missed": MISSED, "too much": EXTRA, "another organ": MIXED_UP}  # in the order of `errors_of`


class Canvas:
    """A figure that is filled with axes placed in inches from its upper left corner."""

    def __init__(self, width: float, height: float, title: str):
        apply_style()
        self.figure = Figure(figsize=(width, height))
        self.figure.text(MARGIN / width, 1 - TITLE_HEIGHT / height, title, size=13, weight="bold", va="bottom")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes of that size in inches, their upper left corner at `left`, `top`."""
        w, h = self.figure.get_size_inches()
        return self.figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))


def draw_overlay(
    voxels: np.ndarray,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    organs: Sequence[str],
    title: str,
    voxel_ml: float | None = None,
) -> Figure:
    """Draw the three slices that show the most organs, with directions, scale bar and the organs' volumes.

    Args:
        voxels: (X, Y, Z) HU in RAS+ order.
        labels: (X, Y, Z) ids on the same grid; without any organ the middle slices are drawn.
        spacing_mm: distance of neighbouring voxels along X, Y, Z in mm.
        organs: names by id, background first.
        title: written above, the case as a rule.
        voxel_ml: volume of one voxel in mL, smaller than the spacing makes it where the grid is sheared.

    Returns:
        the figure, for `save_figure`: coronal below axial, sagittal beside coronal, the legend beside axial.

    Raises:
        ValueError: when the shapes differ or an id has no name.
    """
    check_volumes(title, voxels, organs, labels)
    counts = count_by_slice(labels, len(organs))
    present = organs_present(counts)
    chosen, box = choose_slices(counts), crop_to_organs(counts, spacing_mm)
    extent_mm = box_extent_mm(box, spacing_mm)

    x, y, z = extent_mm
    x, y, z = extent_mm * min(PANELS_WIDTH / (x + y), PANELS_HEIGHT / (y + z))
    top_row = max(y, (len(present) + 2) * LEGEND_LINE)  # beside the organs the legend has a heading and a foot
    right, upper, lower = 3 * MARGIN + x, TITLE_HEIGHT + MARGIN, TITLE_HEIGHT + MARGIN + top_row + ROW_GAP
    canvas = Canvas(right + max(y, legend_width(1)) + MARGIN, lower + z + MARGIN, title)
    panels = canvas.axes(MARGIN, upper, x, y), canvas.axes(MARGIN, lower, x, z), canvas.axes(right, lower, y, z)
    for panel, (axis, (view, letters)) in zip(panels, VIEWS.items(), strict=True):
        plane = plane_of(axis, chosen[axis], box)
        draw_slice(panel, as_seen(voxels[plane]), as_seen(labels[plane]), np.delete(extent_mm, axis))
        write_around(panel, letters, f"{view}, {'xyz'[axis]} = {chosen[axis]}")
    draw_scale_bar(panels[0])
    legend = canvas.axes(right, upper, legend_width(1), top_row)
    columns = {"mL": volume_column(counts, spacing_mm, voxel_ml)}
    draw_legend(legend, organs, present, columns, organs_shown(counts, chosen))
    return canvas.figure


def box_extent_mm(box: Sequence[slice], spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the size of a box of voxels along X, Y, Z in mm."""
    return np.array([(cut.stop - cut.start) * mm for cut, mm in zip(box, spacing_mm, strict=True)])


def plane_of(axis: int, number: int, box: Sequence[slice]) -> tuple[int | slice, ...]:
    """Return the index of one slice of a volume, within a box."""
    return tuple(number if other == axis else cut for other, cut in enumerate(box))


def organs_present(counts: Sequence[np.ndarray]) -> list[int]:
    """Return the ids of the organs that have voxels, from the counts of `count_by_slice`."""
    return (np.flatnonzero(counts[0].sum(axis=0)[1:]) + 1).tolist()


def volume_column(counts: Sequence[np.ndarray], spacing_mm: Sequence[float], voxel_ml: float | None) -> list[str]:
    """Return each id's volume in mL as text, from the counts of `count_by_slice`; `voxel_ml` as for `draw_overlay`."""
    return [f"{ml:,.1f}" for ml in counts[0].sum(axis=0) * (voxel_ml or np.prod(spacing_mm) / 1000)]


def organs_shown(counts: Sequence[np.ndarray], chosen: Sequence[int]) -> set[int]:
    """Return the ids that the chosen slices of the three axes show, from the counts of `count_by_slice`."""
    return {organ for axis in VIEWS for organ in np.flatnonzero(counts[axis][chosen[axis]]).tolist()}


def draw_comparison(
    voxels: np.ndarray,
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing_mm: Sequence[float],
    organs: Sequence[str],
    title: str,
    voxel_ml: float | None = None,
) -> Figure:
    """Return a figure of three views, a row each: prediction, reference, errors; and a legend with each organ's Dice.

    Args:
        voxels: (X, Y, Z) HU in RAS+ order.
        prediction: (X, Y, Z) ids on the same grid.
        reference: (X, Y, Z) ids on the same grid.
        spacing_mm: as for `draw_overlay`.
        organs: as for `draw_overlay`.
        title: as for `draw_overlay`.
        voxel_ml: as for `draw_overlay`.

    Raises:
        ValueError: when the shapes differ or an id has no name.
    """
    check_volumes(title, voxels, organs, prediction, reference)
    counted = [count_by_slice(labels, len(organs)) for labels in (prediction, reference)]
    # Slices of the prediction only when the reference is empty.
    chosen = choose_slices(counted[1] if reference.any() else counted[0])
    counts = [p + r for p, r in zip(*counted, strict=True)]
    box, present = crop_to_organs(counts, spacing_mm), organs_present(counts)
    extent_mm = box_extent_mm(box, spacing_mm)

    x, y, z = extent_mm
    scale = min(COMPARED_WIDTH / (3 * max(x, y)), COMPARED_HEIGHT / (y + 2 * z))
    legend_height = (len(present) + 3 + len(ERRORS)) * LEGEND_LINE
    rows = (y + 2 * z) * scale + 2 * ROW_GAP
    upper, side = TITLE_HEIGHT + 2 * MARGIN, MARGIN + 3 * (max(x, y) * scale + 2 * MARGIN)
    canvas = Canvas(side + legend_width(3) + MARGIN, upper + max(rows, legend_height) + 2 * MARGIN, title)
    draw_compared_slices(canvas, upper, scale, (voxels, prediction, reference), chosen, box, extent_mm)
    volumes = [volume_column(of_map, spacing_mm, voxel_ml) for of_map in counted]
    dice = organ_scores(confusion_matrix(reference, prediction, len(organs)))["dice"]
    columns = {"mL": volumes[0], "reference": volumes[1], "Dice": [f"{value:.3f}" for value in dice]}
    legend = canvas.axes(side, upper, legend_width(3), legend_height)
    draw_legend(legend, organs, present, columns, organs_shown(counts, chosen))
    draw_error_legend(canvas, side, upper + legend_height)
    return canvas.figure


def draw_compared_slices(
    canvas: Canvas,
    top: float,
    scale: float,
    volumes: tuple[np.ndarray, np.ndarray, np.ndarray],
    chosen: Sequence[int],
    box: Sequence[slice],
    extent_mm: np.ndarray,
) -> None:
    """Draw a row for each view, with three panels: prediction, reference, errors.

    Args:
        canvas: to draw on.
        top: inches of the first row from the upper edge.
        scale: inches per mm.
        volumes: voxels in HU, prediction and reference, each (X, Y, Z).
        chosen: the number of the slice by axis.
        box: the part of the volumes to draw.
        extent_mm: its size along X, Y, Z.
    """
    voxels, prediction, reference = volumes
    column = max(extent_mm[:2]) * scale + 2 * MARGIN
    for axis, (view, letters) in VIEWS.items():
        plane, size_mm = plane_of(axis, chosen[axis], box), np.delete(extent_mm, axis)
        width, height = size_mm * scale
        panels = [canvas.axes(MARGIN + place * column, top, width, height) for place in range(3)]
        tissue = as_seen(voxels[plane])
        for panel, labels in zip(panels, (prediction, reference), strict=False):
            draw_slice(panel, tissue, as_seen(labels[plane]), size_mm)
        draw_errors(panels[2], tissue, as_seen(errors_of(prediction[plane], reference[plane])), size_mm)
        for panel in panels:
            write_around(panel, letters, f"{view}, {'xyz'[axis]} = {chosen[axis]}" if panel is panels[0] else "")
        if axis == 2:
            draw_scale_bar(panels[0])
            for panel, heading in zip(panels, ("prediction", "reference", "errors"), strict=True):
                panel.annotate(heading, (0, 1), (0, 26), **AROUND, weight="bold")
        top += height + ROW_GAP


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
        voxels: (rows, columns) HU, as seen.
        errors: (rows, columns) of `errors_of`, as seen.
        size_mm: the slice's width and height in mm.
    """
    draw_tissue(axes, voxels, size_mm)
    colours = np.array([(0, 0, 0, 0), *(to_rgba(colour, ERROR_TINT) for colour in ERRORS.values())])
    axes.imshow(colours[errors], extent=(0, size_mm[0], size_mm[1], 0), interpolation="nearest")


def draw_error_legend(canvas: Canvas, left: float, bottom: float) -> None:
    """List the colours of errors, above `bottom` (inches)."""
    width, height = legend_width(3), len(ERRORS) * LEGEND_LINE
    axes = canvas.axes(left, bottom - height, width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for place, (name, colour) in enumerate(ERRORS.items()):
        y = (place + 0.5) * LEGEND_LINE
        axes.add_patch(Rectangle((0, y - 0.07), 0.2, 0.14, facecolor=colour))
        axes.text(0.3, y, name, va="center")


def draw_contact_sheet(
    voxels: np.ndarray,
    labels: np.ndarray,
    spacing_mm: Sequence[float],
    organs: Sequence[str],
    title: str,
    number: int,
    voxel_ml: float | None = None,
) -> Figure:
    """Return a figure of axial slices, evenly from the highest to the lowest with an organ.

    Args:
        voxels: (X, Y, Z) HU in RAS+ order.
        labels: (X, Y, Z) ids on the same grid; without any organ the slices are those of the whole scan.
        number: of slices; fewer when there are not as many.
        spacing_mm: as for `draw_overlay`.
        organs: as for `draw_overlay`.
        title: as for `draw_overlay`.
        voxel_ml: as for `draw_overlay`.

    Raises:
        ValueError: when the shapes differ or an id has no name.
    """
    check_volumes(title, voxels, organs, labels)
    counts = count_by_slice(labels, len(organs))
    chosen, present, box = evenly_spaced(counts[2], number), organs_present(counts), crop_to_organs(counts, spacing_mm)
    size_mm = box_extent_mm(box, spacing_mm)[:2]
    x, y = size_mm * SHEET_CELL / max(size_mm)
    columns = math.ceil(math.sqrt(len(chosen) * (y + SHEET_CAPTION) / x))
    columns = min(len(chosen), columns, int(SHEET_WIDTH / (x + SHEET_GAP)))
    legend_height = (len(present) + 2) * LEGEND_LINE
    upper, cell = TITLE_HEIGHT + MARGIN, y + SHEET_CAPTION + SHEET_GAP
    side, below = 2 * MARGIN + columns * (x + SHEET_GAP), math.ceil(len(chosen) / columns) * cell
    canvas = Canvas(side + legend_width(1) + MARGIN, upper + max(below, legend_height) + MARGIN, title)
    panels = []
    for place, z in enumerate(chosen):
        row, column = divmod(place, columns)
        panels.append(canvas.axes(MARGIN + column * (x + SHEET_GAP), upper + SHEET_CAPTION + row * cell, x, y))
        draw_cell(panels[-1], voxels, labels, z, box, spacing_mm)
    write_sides(panels[0])
    draw_scale_bar(panels[-1])
    shown = set(np.flatnonzero(counts[2][chosen].any(axis=0)).tolist())
    volumes = {"mL": volume_column(counts, spacing_mm, voxel_ml)}
    draw_legend(canvas.axes(side, upper, legend_width(1), legend_height), organs, present, volumes, shown)
    return canvas.figure


def draw_cell(
    panel: Axes, voxels: np.ndarray, labels: np.ndarray, z: int, box: Sequence[slice], spacing_mm: Sequence[float]
) -> None:
    """Draw one axial slice of a sheet, within a box, with its number."""
    plane = plane_of(2, z, box)
    draw_slice(panel, as_seen(voxels[plane]), as_seen(labels[plane]), box_extent_mm(box, spacing_mm)[:2])
    panel.annotate(f"z = {z}", (0, 1), (0, 6), **AROUND, size=8)


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


def check_volumes(title: str, voxels: np.ndarray, organs: Sequence[str], *label_maps: np.ndarray) -> None:
    """Raise a ValueError when label maps are not of the scan's shape, or hold an id without a name."""
    for labels in label_maps:
        if voxels.shape != labels.shape:
            raise ValueError(
                f"{title}: the scan has shape {voxels.shape}, its labels {labels.shape}, expected the same"
            )
        if labels.max() >= len(organs):
            raise ValueError(f"{title}: label {labels.max()} found, expected 0 to {len(organs) - 1}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        check_format(args.output)
        if args.contact is not None and args.truth is not None:
            raise ValueError("--contact and --truth: a sheet shows one label map, expected one of the two")
        if args.contact is not None and args.contact < 1:
            raise ValueError(f"--contact: got {args.contact}, expected 1 or more")
        given = load_given(args.config, args.checkpoint)
    with refusing(REFUSED):
        shown, note = read_shown(args.scan, label_map_paths(args), given)
        about = (shown.geometry.spacing_mm, shown.organs, shown.title)
        if args.truth:
            figure = draw_comparison(shown.voxels, *shown.label_maps.values(), *about, shown.geometry.voxel_ml)
        elif args.contact:
            (labels,) = shown.label_maps.values()
            figure = draw_contact_sheet(shown.voxels, labels, *about, args.contact, shown.geometry.voxel_ml)
        else:
            figure = draw_overlay(shown.voxels, *shown.label_maps.values(), *about, shown.geometry.voxel_ml)
        save_figure(figure, args.output)
    print_written(args.output, note)
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m visualization.overlay", description=__doc__.splitlines()[0])
    parser.add_argument("scan", type=Path, help="CT scan, NIfTI")
    parser.add_argument("labels", type=Path, help="its label map, NIfTI")
    parser.add_argument("--output", type=Path, required=True, help="picture to write: .png, .jpg, .webp, .pdf or .svg")
    parser.add_argument(
        "--truth", type=Path, metavar="LABELS", help="reference to draw beside it, and where the two differ"
    )
    parser.add_argument("--contact", type=int, metavar="N", help="draw a sheet of N axial slices instead")
    add_organ_flags(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
