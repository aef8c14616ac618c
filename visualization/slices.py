"""Choose slices of a scan and draw them, with their labels and scale.

All in mm, so that thick slices are drawn as thick as they are, and by the radiological convention: the patient's right
is at the picture's left, and the front or the head at its top.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.transforms import offset_copy

from core.scans.anatomy import volume_text
from visualization.fonts import drawable_organs
from visualization.style import INK, colour_of, colour_table

# HU drawn black and white: the soft-tissue window of abdominal reading, level 40 and width 400.
WINDOW_HU = (-160.0, 240.0)
# Share of an organ's colour in its tint: enough to name the organ, little enough to see the tissue through it.
TINT = 0.35
# Points: thinner is lost when a README shrinks the picture, thicker fills the adrenal glands.
CONTOUR_WIDTH = 1.1
# Mm of surroundings shown beyond the organs: reaches the skin in most patients, and leaves chest and table out.
SURROUNDINGS_MM = 50.0
# Inches of one line of a legend, of its name column ("right adrenal gland") and of each column of numbers beside it.
LEGEND_LINE, LEGEND_NAMES, LEGEND_COLUMN = 0.235, 1.95, 0.95
# How text stands beside a panel: so many points from a place given as shares of the panel.
AROUND = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
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


def box_extent_mm(box: Sequence[slice], spacing_mm: Sequence[float]) -> np.ndarray:
    """Return the size of a box of voxels along X, Y, Z in mm."""
    return np.array([(cut.stop - cut.start) * mm for cut, mm in zip(box, spacing_mm, strict=True)])


def plane_of(axis: int, number: int, box: Sequence[slice]) -> tuple[int | slice, ...]:
    """Return the index of one slice of a volume, within a box."""
    return tuple(number if other == axis else cut for other, cut in enumerate(box))


def organs_present(counts: Sequence[np.ndarray]) -> list[int]:
    """Return the ids of the organs that have voxels."""
    return (np.flatnonzero(counts[0].sum(axis=0)[1:]) + 1).tolist()


def volume_column(counts: Sequence[np.ndarray], voxel_ml: float) -> list[str]:
    """Return each id's volume in mL as text; `voxel_ml` is that of one voxel."""
    return [volume_text(ml) for ml in counts[0].sum(axis=0) * voxel_ml]


def organs_shown(counts: Sequence[np.ndarray], chosen: Sequence[int]) -> set[int]:
    """Return the ids that the chosen slices of the three axes show."""
    return {organ for axis in VIEWS for organ in np.flatnonzero(counts[axis][chosen[axis]]).tolist()}


def draw_tissue(axes: Axes, voxels: np.ndarray, size_mm: Sequence[float]) -> None:
    """Draw the CT of one slice in gray.

    Args:
        axes: of the same shape as the slice; its data unit becomes the mm.
        voxels: (A, B) HU, a slice of a RAS+ volume.
        size_mm: its size along A and B: the picture's width and height.
    """
    width, height = size_mm
    (low, high), extent = WINDOW_HU, (0, width, height, 0)
    axes.imshow(as_seen(voxels), cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")


def draw_slice(axes: Axes, voxels: np.ndarray, labels: np.ndarray, size_mm: Sequence[float]) -> None:
    """Draw one slice: CT in gray, every organ as a tint and a contour.

    Args:
        axes: of the same shape as the slice; its data unit becomes the mm.
        voxels: (A, B) HU, a slice of a RAS+ volume.
        labels: (A, B) ids of the same slice.
        size_mm: its size along A and B: the picture's width and height.
    """
    draw_tissue(axes, voxels, size_mm)
    labels = as_seen(labels)
    extent = (0, size_mm[0], size_mm[1], 0)
    colours = colour_table(int(labels.max()) + 1)
    axes.imshow((colours * (1, 1, 1, TINT))[labels], extent=extent, interpolation="nearest")
    # With a frame of background, an organ that the scan cuts off gets its contour along the scan's edge.
    framed = np.pad(labels, 1)
    x, y = ((np.arange(n) - 0.5) * mm / (n - 2) for n, mm in zip(framed.T.shape, size_mm, strict=True))
    for organ in np.unique(labels[labels > 0]):
        axes.contour(x, y, framed == organ, levels=[0.5], colors=[colours[organ]], linewidths=CONTOUR_WIDTH)


def write_around(axes: Axes, letters: str, caption: str) -> None:
    """Write the four directions and the caption outside of a panel, where they hide nothing."""
    # For each letter: the point of the panel it belongs to (0 to 1), and how far outside it stands (points).
    places = ((0, 0.5, -10, 0), (1, 0.5, 10, 0), (0.5, 1, 0, 10), (0.5, 0, 0, -10))
    for letter, (x, y, right, up) in zip(letters, places, strict=True):
        axes.annotate(letter, (x, y), (right, up), **AROUND, ha="center", weight="bold")
    axes.annotate(caption, (0, 1), (0, 10), **AROUND, size=9)


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


def legend_width(columns: int) -> float:
    """Inches that a legend with so many columns of numbers takes."""
    return LEGEND_NAMES + columns * LEGEND_COLUMN


def draw_legend(
    axes: Axes, organs: Sequence[str], present: Sequence[int], columns: dict[str, Sequence[str]], shown: set[int]
) -> None:
    """List organs: colour, name, and numbers; hollow where no slice passes through the organ.

    Args:
        axes: `legend_width` wide; its data unit becomes the inch.
        organs: names by id, background first.
        present: ids to list.
        columns: by heading, what to write for each id.
        shown: ids that can be seen in the slices.
    """
    width, height = axes.get_position().size * axes.figure.get_size_inches()
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y, names = LEGEND_LINE / 2, drawable_organs(organs)
    axes.text(0, y, "organ" if present else "no organ in the label map", va="center", weight="bold")
    ends = [width - (len(columns) - 1 - place) * LEGEND_COLUMN for place in range(len(columns))]
    for end, heading in zip(ends, columns if present else (), strict=False):
        axes.text(end, y, heading, va="center", ha="right", weight="bold")
    for organ in present:
        y += LEGEND_LINE
        colour = colour_of(organ)
        axes.add_patch(Rectangle((0, y - 0.07), 0.2, 0.14, facecolor=colour, edgecolor=colour, fill=organ in shown))
        axes.text(0.3, y, names[organ], va="center")
        for end, values in zip(ends, columns.values(), strict=True):
            axes.text(end, y, values[organ], va="center", ha="right")
    if not shown.issuperset(present):
        axes.text(0, y + LEGEND_LINE, "hollow: in none of these slices", va="center", size=8, style="italic")
