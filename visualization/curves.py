"""The course of a training run: loss and Dice by epoch, drawn from the run's log.csv.

    python -m visualization.curves RUN_DIR

writes RUN_DIR/curves.png, as training does at most once a minute and at its end.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.config import load_organs
from core.scoring.tables import shorten
from core.system.exits import DONE, REFUSED, refusing, run_command
from core.system.files import user_path
from visualization.fonts import drawable_organs
from visualization.style import INK, apply_style, colour_of, save_figure
from visualization.tables import read_table

# Up to this many points are drawn one by one: a single epoch has no line, and a few are easier to read off.
MARKED_POINTS = 20
# Ratio of the largest to the smallest loss from which a linear axis hides the course of the later epochs.
DECADE = 10
FIGURE_INCHES = (13.0, 5.2)
# Points: the size of the organs' names, and what all of them together may take of the panel's height.
NAME_SIZE, NAMES_HEIGHT = 9, 230
NAME_LETTERS = 22  # that fit beside the panel


def read_log(log_path: Path, organs: Sequence[str]) -> dict[str, np.ndarray]:
    """Read the columns of a run's log.csv that are drawn.

    Args:
        log_path: a table with a heading and a row per epoch; cells may be empty (no validation in that epoch, organ in
            no scan), and so may the end of a last row that is still being written.
        organs: names by id, background first; each has its column dice_<name>, spaces as underscores.

    Returns:
        for each column its values, (epochs,) float64, NaN where empty.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it lacks a column, has no row, or a cell that is no number; names the cell.
    """
    needed = ["epoch", "train_loss", "val_loss", "val_dice", *(f"dice_{o.replace(' ', '_')}" for o in organs[1:])]
    rows = read_table(log_path, needed, "train.py")
    columns = {name: np.full(len(rows), np.nan) for name in needed}
    for number, row in enumerate(rows):
        for name, values in columns.items():
            try:
                values[number] = float(row[name] or "nan")
            except ValueError:
                raise ValueError(
                    f"{log_path}: row {number + 2}, column {name}: {row[name]!r}, expected a number"
                ) from None
    return columns


def draw_line(axes: Axes, epochs: np.ndarray, values: np.ndarray, **style: object) -> tuple[float, float] | None:
    """Draw the finite values over their epochs, joined across the gaps; return the last point, None without any."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    epochs, values = epochs[finite], values[finite]
    axes.plot(epochs, values, marker="o" if len(values) <= MARKED_POINTS else "", markersize=3.5, **style)
    return epochs[-1], values[-1]


def draw_loss(axes: Axes, log: dict[str, np.ndarray]) -> None:
    """Draw training and validation loss, on a logarithmic axis once they span more than a DECADE."""
    losses = {"training": (log["train_loss"], INK), "validation": (log["val_loss"], "#ffb000")}
    for name, (values, colour) in losses.items():
        draw_line(axes, log["epoch"], values, color=colour, label=name)
    axes.set(title="Loss", xlabel="epoch")
    drawn = np.concatenate([line.get_ydata() for line in axes.lines] or [np.zeros(0)])
    if not drawn.size:
        return
    axes.legend(frameon=False)
    if 0 < DECADE * drawn.min() < drawn.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        # From zero, with room for the markers above.
        axes.set_ylim(min(0, drawn.min()), 1.1 * max(drawn.max(), 0) or None)


def draw_dice(axes: Axes, log: dict[str, np.ndarray], organs: Sequence[str]) -> None:
    """Draw Dice by organ and in the mean, the names beside the line ends in the order of the last values.

    The names stand evenly over the panel's height, so that 13 lines that end close together stay readable; a thin line
    leads from each to its line's end. An organ without a value comes last and has none.
    """
    lines = {"mean": ("val_dice", INK, 3.2)}
    for organ in range(1, len(organs)):
        lines[organs[organ]] = (f"dice_{organs[organ].replace(' ', '_')}", colour_of(organ), 1.4)
    ends = {}
    for name, (column, colour, width) in lines.items():
        ends[name] = draw_line(axes, log["epoch"], log[column], color=colour, linewidth=width, zorder=2 + (width > 3))
    axes.set(title="Dice on the validation scans", xlabel="epoch", ylim=(0, 1))
    shown = {"mean": "mean"} | dict(zip(organs, drawable_organs(organs), strict=True))
    ranked = sorted(lines, key=lambda name: -1 if ends[name] is None else ends[name][1], reverse=True)
    size = min(NAME_SIZE, NAMES_HEIGHT / len(ranked))
    for place, name in enumerate(ranked):
        _, colour, width = lines[name]
        height = 1 - (place + 0.5) / len(ranked)
        value = "-" if ends[name] is None else f"{ends[name][1]:.3f}"
        style = {"transform": axes.transAxes, "va": "center", "size": size, "weight": "bold" if width > 3 else "normal"}
        axes.text(1.12, height, "\u25a0", color=colour, **style)
        axes.text(1.155, height, value, **style)
        axes.text(1.25, height, shorten(shown[name], NAME_LETTERS), **style)
        if ends[name] is not None:
            axes.annotate(
                "", ends[name], (1.11, height), textcoords="axes fraction", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def draw_curves(log_path: str | Path, output_path: str | Path, organs: Sequence[str]) -> None:
    """Draw a run's losses and Dice scores by epoch.

    Args:
        log_path: the run's log.csv.
        output_path: picture to write, replaced whole.
        organs: names by id, background first; each needs its column dice_<name>, spaces as underscores.

    Raises:
        FileNotFoundError: when there is no log.
        ValueError: when the log has no row, lacks a column or holds something that is no number.
    """
    log = read_log(Path(log_path), organs)
    if not np.isfinite(log["epoch"]).all():
        raise ValueError(f"{log_path}: has a row without its epoch")
    apply_style()
    figure = Figure(figsize=FIGURE_INCHES)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    figure.subplots_adjust(left=0.06, right=0.785, top=0.91, bottom=0.11, wspace=0.18)
    draw_loss(left, log)
    draw_dice(right, log, organs)
    for axes in (left, right):
        # Half an epoch on each side gives a single epoch some room.
        axes.set_xlim(log["epoch"].min() - 0.5, log["epoch"].max() + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save_figure(figure, Path(output_path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused (2, wrong usage, comes from argparse)."""
    parser = argparse.ArgumentParser(prog="python -m visualization.curves", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=user_path, help="the run's folder, with log.csv and config.yaml")
    run_dir = parser.parse_args(arguments).run_dir
    with refusing(REFUSED):
        draw_curves(run_dir / "log.csv", run_dir / "curves.png", load_organs(run_dir / "config.yaml"))
    print(f"wrote {run_dir / 'curves.png'}")
    return DONE


if __name__ == "__main__":
    run_command(main)
