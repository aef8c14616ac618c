"""One axial, one coronal and one sagittal slice of a scan with its organs, as a picture.

    python -m visualization.overlay SCAN LABELS --output slices.png

The slices are chosen to show as many organs as possible. All three share one scale in mm, so thick slices are drawn as
thick as they are. Left and right follow the radiological convention: the patient's right is at the picture's left.
The slice numbers in the captions count from 0 in RAS+ order: from the left, the back and the feet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import offset_copy

from core.config import DEFAULT_CONFIG, load_organs
from core.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.preprocess import check_same_grid, load_labels, load_scan
from visualization.style import INK, apply_style, check_format, colour_of, colour_table, save_figure

# HU drawn black and white: the soft-tissue window of abdominal reading, level 40 and width 400.
WINDOW_HU = (-160.0, 240.0)
# Share of an organ's colour in its tint: enough to name the organ, little enough to see the tissue through it.
TINT = 0.35
# Points: thinner is lost when a README shrinks the picture, thicker fills the adrenal glands.
CONTOUR_WIDTH = 1.1
# Mm of surroundings shown beyond the organs: reaches the skin in most patients, and leaves chest and table out.
SURROUNDINGS_MM = 50.0
# Inches that the panels may take side by side and above one another, gaps not counted.
PANELS_WIDTH, PANELS_HEIGHT = 10.0, 10.0
# Inches around a panel, for its letters; between the rows, for letters, scale bar and caption; and for the title.
MARGIN, ROW_GAP, TITLE_HEIGHT = 0.35, 0.85, 0.4
# Inches of one line of the legend and of a legend as wide as "right adrenal gland" and its volume.
LEGEND_LINE, LEGEND_WIDTH = 0.235, 2.9
# The views by the axis that they cut, with the letters at the picture's left, right, top and bottom.
VIEWS = {2: ("axial", "RLAP"), 1: ("coronal", "RLSI"), 0: ("sagittal", "APSI")}


def as_seen(plane: np.ndarray) -> np.ndarray:
    """Turn a slice of a RAS+ volume, (A, B), into a picture's rows and columns, (B, A).

    Whichever axis was cut, the remaining two point right or forward, and forward or up; the radiological convention
    has those ends at the picture's left and top.
    """
    return plane[::-1, ::-1].T


def count_by_slice(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """Count the voxels of every class in every slice: for each axis X, Y, Z a (slices, K) array."""
    return [
        np.stack([np.bincount(plane.ravel(), minlength=classes) for plane in np.moveaxis(labels, axis, 0)])
        for axis in range(3)
    ]


def choose_slices(counts: Sequence[np.ndarray]) -> list[int]:
    """Choose the slice of each axis so that the three together show the most organs.

    An organ counts by the root of its area over its largest area along the axis, so that one more organ is worth more
    than more of one. An organ that an earlier view shows already (axial, coronal, sagittal) counts half.

    Args:
        counts: as `count_by_slice` gives them.

    Returns:
        one slice number for each axis X, Y, Z; the middle where there is no organ.
    """
    weights = np.ones(counts[0].shape[1] - 1)
    chosen = [0, 0, 0]
    for axis in VIEWS:
        area = counts[axis][:, 1:]
        worth = np.sqrt(area / np.maximum(area.max(axis=0), 1)) @ weights  # (slices,)
        chosen[axis] = int(worth.argmax()) if worth.any() else len(worth) // 2
        weights[area[chosen[axis]] > 0] = 0.5
    return chosen


def crop_to_organs(counts: Sequence[np.ndarray], spacing_mm: Sequence[float]) -> tuple[slice, slice, slice]:
    """Find the box of all organs and SURROUNDINGS_MM around it, within the scan; the whole scan without any organ."""
    box = []
    for count, mm in zip(counts, spacing_mm, strict=True):
        found = np.flatnonzero(count[:, 1:].any(axis=1))
        first, last = (found[0], found[-1]) if len(found) else (0, len(count) - 1)
        more = round(SURROUNDINGS_MM / mm)
        box.append(slice(max(0, first - more), min(len(count), last + 1 + more)))
    return tuple(box)


def lay_out(extent_mm: Sequence[float], legend_lines: int) -> tuple[Figure, list[Axes], Axes]:
    """Make the figure: coronal below axial, sagittal beside coronal, all at one scale, the legend beside axial.

    Args:
        extent_mm: the volume's size along X, Y, Z in mm.
        legend_lines: how many lines the legend must hold.

    Returns:
        the figure, the panels by the axis that they cut, and the legend's axes.
    """
    x, y, z = extent_mm
    inches = min(PANELS_WIDTH / (x + y), PANELS_HEIGHT / (y + z))
    x, y, z = x * inches, y * inches, z * inches
    top_row = max(y, legend_lines * LEGEND_LINE)
    width = MARGIN + x + 2 * MARGIN + max(y, LEGEND_WIDTH) + MARGIN
    height = TITLE_HEIGHT + MARGIN + top_row + ROW_GAP + z + MARGIN
    figure = Figure(figsize=(width, height))

    def add_axes(left: float, top: float, w: float, h: float) -> Axes:
        """Axes placed in inches from the figure's upper left corner."""
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    right, upper, lower = 3 * MARGIN + x, TITLE_HEIGHT + MARGIN, TITLE_HEIGHT + MARGIN + top_row + ROW_GAP
    sagittal, coronal = add_axes(right, lower, y, z), add_axes(MARGIN, lower, x, z)
    return figure, [sagittal, coronal, add_axes(MARGIN, upper, x, y)], add_axes(right, upper, LEGEND_WIDTH, top_row)


def draw_slice(axes: Axes, voxels: np.ndarray, labels: np.ndarray, size_mm: Sequence[float]) -> None:
    """Draw one slice: CT in gray, every organ as a tint and a contour.

    Args:
        axes: of the same shape as the slice; its data unit becomes the mm.
        voxels: (rows, columns) HU, as seen.
        labels: (rows, columns) ids, as seen.
        size_mm: the slice's width and height in mm.
    """
    width, height = size_mm
    (low, high), extent = WINDOW_HU, (0, width, height, 0)
    axes.imshow(voxels, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    colours = colour_table(int(labels.max()) + 1)
    axes.imshow((colours * (1, 1, 1, TINT))[labels], extent=extent, interpolation="nearest")
    # With a frame of background, an organ that the scan cuts off gets its contour along the scan's edge.
    framed = np.pad(labels, 1)
    x, y = ((np.arange(n) - 0.5) * mm / (n - 2) for n, mm in zip(framed.T.shape, size_mm, strict=True))
    for organ in np.unique(labels[labels > 0]):
        axes.contour(x, y, framed == organ, levels=[0.5], colors=[colours[organ]], linewidths=CONTOUR_WIDTH)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")


def write_around(axes: Axes, letters: str, caption: str) -> None:
    """Write the four directions and the caption outside of a panel, where they hide nothing."""
    # For each letter: the point of the panel it belongs to (0 to 1), and how far outside it stands (points).
    places = ((0, 0.5, -10, 0), (1, 0.5, 10, 0), (0.5, 1, 0, 10), (0.5, 0, 0, -10))
    style = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
    for letter, (x, y, right, up) in zip(letters, places, strict=True):
        axes.annotate(letter, (x, y), (right, up), ha="center", weight="bold", **style)
    axes.annotate(caption, (0, 1), (0, 10), size=9, **style)


def draw_scale_bar(axes: Axes) -> None:
    """Draw a bar of a round length in mm under the right end of a panel whose data unit is the mm."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[0]
    power = 10.0 ** np.floor(np.log10(width / 3))
    length = max(step * power for step in (1, 2, 5) if step * power <= width / 3)
    # Along the panel in mm, below it in points.
    below = offset_copy(axes.transData, axes.figure, y=-10, units="points")
    start = width - length
    axes.plot(
        [start, width], [height, height], color=INK, lw=2.5, solid_capstyle="butt", transform=below, clip_on=False
    )
    axes.text(start - 0.01 * width, height, f"{length:g} mm", size=9, va="center", ha="right", transform=below)


def draw_legend(axes: Axes, volumes_ml: np.ndarray, shown: set[int], organs: Sequence[str]) -> None:
    """List the organs that are present: colour, name, volume; hollow where no slice passes through the organ.

    Args:
        axes: LEGEND_WIDTH wide; its data unit becomes the inch.
        volumes_ml: (K,) volume of every class in mL.
        shown: ids that can be seen in the slices.
        organs: names by id, background first.
    """
    height = axes.get_position().height * axes.figure.get_figheight()
    axes.set(xlim=(0, LEGEND_WIDTH), ylim=(height, 0))
    axes.axis("off")
    present = [organ for organ in range(1, len(organs)) if volumes_ml[organ] > 0]
    y = LEGEND_LINE / 2
    axes.text(0, y, "organ" if present else "no organ in the label map", va="center", weight="bold")
    if present:
        axes.text(LEGEND_WIDTH, y, "mL", va="center", ha="right", weight="bold")
    for organ in present:
        y += LEGEND_LINE
        colour = colour_of(organ)
        axes.add_patch(Rectangle((0, y - 0.07), 0.2, 0.14, facecolor=colour, edgecolor=colour, fill=organ in shown))
        axes.text(0.3, y, organs[organ], va="center")
        axes.text(LEGEND_WIDTH, y, f"{volumes_ml[organ]:,.1f}", va="center", ha="right")
    if not shown.issuperset(present):
        axes.text(0, y + LEGEND_LINE, "hollow: in none of the three slices", va="center", size=8, style="italic")


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
        the figure, for `save_figure`.

    Raises:
        ValueError: when the shapes differ or an id has no name.
    """
    if voxels.shape != labels.shape:
        raise ValueError(f"{title}: the scan has shape {voxels.shape}, its labels {labels.shape}, expected the same")
    if labels.max() >= len(organs):
        raise ValueError(f"{title}: label {labels.max()} found, expected 0 to {len(organs) - 1}")
    counts = count_by_slice(labels, len(organs))
    volumes_ml = counts[0].sum(axis=0) * (voxel_ml or np.prod(spacing_mm) / 1000)
    slices, box = choose_slices(counts), crop_to_organs(counts, spacing_mm)
    extent_mm = [(cut.stop - cut.start) * mm for cut, mm in zip(box, spacing_mm, strict=True)]
    apply_style()
    # Beside the organs the legend has a heading and a foot.
    figure, panels, legend = lay_out(extent_mm, np.count_nonzero(volumes_ml[1:]) + 2)
    for axis, (view, letters) in VIEWS.items():
        plane = tuple(slices[axis] if other == axis else cut for other, cut in enumerate(box))
        draw_slice(panels[axis], as_seen(voxels[plane]), as_seen(labels[plane]), np.delete(extent_mm, axis))
        write_around(panels[axis], letters, f"{view}, {'xyz'[axis]} = {slices[axis]}")
    draw_scale_bar(panels[2])
    shown = {organ for axis in VIEWS for organ in np.flatnonzero(counts[axis][slices[axis]]).tolist()}
    draw_legend(legend, volumes_ml, shown, organs)
    left, top = MARGIN / figure.get_figwidth(), 1 - TITLE_HEIGHT / figure.get_figheight()
    figure.text(left, top, title, size=13, weight="bold", va="bottom")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused, 2 wrong usage or settings."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        check_format(args.output)
        organs = load_organs(args.config)
    with refusing(REFUSED):
        voxels, scan = load_scan(args.scan)
        labels, grid = load_labels(args.labels, len(organs))
        check_same_grid(scan, grid, args.labels.name)
        title = args.scan.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
        save_figure(draw_overlay(voxels, labels, scan.spacing_mm, organs, title, scan.voxel_ml), args.output)
    print(f"wrote {args.output}")
    return DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m visualization.overlay", description=__doc__.splitlines()[0])
    parser.add_argument("scan", type=Path, help="CT scan, NIfTI")
    parser.add_argument("labels", type=Path, help="its label map, NIfTI")
    parser.add_argument("--output", type=Path, required=True, help="picture to write: .png, .jpg, .webp, .pdf or .svg")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings that name the organs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
