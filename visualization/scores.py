"""The scores of a set of predictions: a box for every organ, and every case's Dice, drawn from metrics.csv.

    python -m visualization.scores SCORES_DIR

writes SCORES_DIR/scores.png, as evaluate.py does.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from core.scoring.tables import shorten
from core.system.exits import DONE, REFUSED, refusing, run_command
from core.system.files import user_path
from visualization.fonts import drawable, drawable_organs
from visualization.style import INK, PAPER, apply_style, colour_of, save_figure
from visualization.tables import read_table

FIGURE_INCHES = (15.0, 7.6)
DRAWN = {"dice": "Dice", "nsd": "Normalised surface Dice"}
# From this many cases on there is a box. Up to so many, each is a point beside it, the heat map names each and
# writes its number. Above so many, the heat map blends neighbouring cases, since it has no more pixels.
BOXED_CASES, MARKED_CASES, NAMED_CASES, NUMBERED_CASES, BLENDED_CASES = 5, 30, 60, 24, 400
# Rows that fill the heat map's height; with fewer cases it is lower, so that one case is no column.
FULL_ROWS = 12
# Pieces into which each cell is cut, so that many cases are blended within an organ's column, never across.
PIECES = 60
# Points: the largest names, and what all of a row of names may take of a panel's height or width.
NAME_SIZE, NAMES_LENGTH = 9.0, 330
NAME_LETTERS = 22  # of a case or an organ
NOT_DEFINED = "#3a3a3a"
THIN = {"color": INK, "linewidth": 0.9}
DOT = {"markerfacecolor": INK, "markeredgecolor": PAPER, "markeredgewidth": 0.5}
COLOURS = "viridis"  # even steps for every kind of colour vision, and no gray among them
DARK_BELOW = 0.55  # Dice up to which white is read on these colours, and black above


@dataclass(frozen=True)
class Scores:
    """Ids of the cases, names of the organs by id, and by score a table of (cases, organs), NaN where not defined."""

    cases: list[str]
    organs: dict[int, str]
    tables: dict[str, np.ndarray]


def read_metrics(path: str | Path) -> Scores:
    """Read a metrics.csv.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it has no row, lacks a column, or a cell is no number.
    """
    needed = ("case", "id", "organ", *DRAWN)
    rows = read_table(Path(path), needed, "evaluate.py")
    if any(row[name] is None for row in rows for name in needed):
        raise ValueError(f"{path}: has a row that is cut off")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    try:
        organs = {int(row["id"]): row["organ"] for row in rows}
        tables = {name: np.full((len(cases), len(organs)), np.nan) for name in DRAWN}
        row_of, column_of = ({key: i for i, key in enumerate(keys)} for keys in (cases, organs))
        for row in rows:
            for name, table in tables.items():
                table[row_of[row["case"]], column_of[int(row["id"])]] = float(row[name] or "nan")
    except ValueError as error:
        raise ValueError(f"{path}: has a cell that is no number ({error})") from error
    return Scores(cases, organs, tables)


def draw_boxes(axes: Axes, table: np.ndarray, organs: Sequence[int]) -> None:
    """Draw a lying box for every organ id, the first on top, and each case as a point where they are few.

    A box spans the middle half of the cases, its line is the median; whiskers reach the last case within 1.5 box
    lengths. Fewer than BOXED_CASES are points alone.
    """
    columns = [column[~np.isnan(column)] for column in table.T]
    marked = len(table) <= MARKED_CASES
    for place, (organ, column) in enumerate(zip(organs, columns, strict=True)):
        boxed = len(column) >= BOXED_CASES
        if boxed:
            axes.boxplot(
                [column], positions=[place], orientation="horizontal", widths=0.62, patch_artist=True,
                manage_ticks=False, showfliers=not marked, medianprops={"color": PAPER, "linewidth": 1.8},
                boxprops={"facecolor": colour_of(organ), "edgecolor": INK, "linewidth": 0.7},
                whiskerprops=THIN, capprops=THIN, flierprops={"marker": ".", "markersize": 5, **DOT},
            )  # fmt: skip
        if marked:
            # One below the other in the order of the cases, so that equal scores do not hide each other.
            beside = place + 0.22 * np.linspace(-1, 1, len(column)) if len(column) > 1 else [place] * len(column)
            style = (
                {"markersize": 6, **DOT} if boxed else {"markersize": 10, **DOT, "markerfacecolor": colour_of(organ)}
            )
            axes.plot(column, beside, ".", **style)
    axes.set(xlim=(-0.02, 1.02), ylim=(len(columns) - 0.5, -0.5))
    axes.set_yticks(range(len(columns)), [])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def draw_heat_map(axes: Axes, table: np.ndarray, cases: Sequence[str], organs: Sequence[str]) -> None:
    """Draw every case's Dice as a row of cells, the lowest mean on top, with the colours' meaning above."""
    means = [np.inf if np.isnan(row).all() else np.nanmean(row) for row in table]
    order = np.argsort(means, kind="stable")
    table, cases = table[order], [cases[i] for i in order]
    place = axes.get_position()
    height = place.height * min(1, len(cases) / FULL_ROWS)
    axes.set_position((place.x0, place.y1 - height, place.width, height))
    colours = colormaps[COLOURS].with_extremes(bad=NOT_DEFINED)
    extent = (-0.5, len(organs) - 0.5, len(cases) - 0.5, -0.5)
    image = axes.imshow(
        table.repeat(PIECES, axis=1), vmin=0, vmax=1, cmap=colours, aspect="auto", extent=extent,
        interpolation="antialiased" if len(cases) > BLENDED_CASES else "nearest",
    )  # fmt: skip
    name_cells(axes, table, cases, organs)
    above = axes.figure.add_axes((place.x0, place.y1 + 0.008, place.width, 0.012))
    bar = axes.figure.colorbar(image, cax=above, orientation="horizontal", ticklocation="top")
    bar.outline.set_visible(False)
    above.set_title(f"Dice of {len(cases)} case{'s' * (len(cases) > 1)}, lowest mean on top; gray: not defined")


def name_cells(axes: Axes, table: np.ndarray, cases: Sequence[str], organs: Sequence[str]) -> None:
    """Write the organs' names below a heat map, the cases' beside it, and the numbers into it, where there is room."""
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    names = [shorten(organ, NAME_LETTERS) for organ in organs]
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="x", labelsize=min(NAME_SIZE, NAMES_LENGTH / len(organs)))
    axes.yaxis.tick_right()
    if len(cases) <= NAMED_CASES:
        axes.set_yticks(range(len(cases)), [shorten(case, NAME_LETTERS) for case in cases])
        axes.tick_params(axis="y", labelsize=min(NAME_SIZE, NAMES_LENGTH / len(cases)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"lowest: {', '.join(shorten(case, NAME_LETTERS) for case in cases[:3])}")
    if len(cases) <= NUMBERED_CASES and len(organs) <= NUMBERED_CASES:
        for (row, column), value in np.ndenumerate(table):
            text, colour = ("-", INK) if np.isnan(value) else (f"{value:.2f}", INK if value < DARK_BELOW else PAPER)
            axes.text(column, row, text, ha="center", va="center", size=7.5, color=colour)


def draw_scores(metrics_path: str | Path, output_path: str | Path) -> None:
    """Draw the scores of a metrics.csv.

    Args:
        metrics_path: with columns case, id, organ, dice and nsd; an empty cell is a score that is not defined.
        output_path: picture to write, replaced whole.

    Raises:
        FileNotFoundError, ValueError: as `read_metrics`.
    """
    scores = read_metrics(metrics_path)
    apply_style()
    figure = Figure(figsize=FIGURE_INCHES)
    *boxes, heat_map = figure.subplots(1, 3, width_ratios=(1, 1, 1.55))
    figure.subplots_adjust(left=0.125, right=0.885, top=0.91, bottom=0.17, wspace=0.08)
    for axes, (name, title) in zip(boxes, DRAWN.items(), strict=True):
        draw_boxes(axes, scores.tables[name], scores.organs)
        axes.set(title=title)
    defined = (~np.isnan(scores.tables["dice"])).sum(axis=0)
    organs = drawable_organs(list(scores.organs.values()), list(scores.organs))
    names = [f"{shorten(organ, NAME_LETTERS)}  {n}" for organ, n in zip(organs, defined, strict=True)]
    boxes[0].set_yticks(range(len(names)), names, size=min(NAME_SIZE, NAMES_LENGTH / len(names)))
    boxes[0].set_xlabel("beside the names: in how many cases it is defined")
    draw_heat_map(heat_map, scores.tables["dice"], [drawable(case) for case in scores.cases], organs)
    save_figure(figure, Path(output_path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 input refused (2, wrong usage, comes from argparse)."""
    parser = argparse.ArgumentParser(prog="python -m visualization.scores", description=__doc__.splitlines()[0])
    parser.add_argument("scores_dir", type=user_path, help="the folder that evaluate.py wrote, with metrics.csv")
    folder = parser.parse_args(arguments).scores_dir
    with refusing(REFUSED):
        draw_scores(folder / "metrics.csv", folder / "scores.png")
    print(f"wrote {folder / 'scores.png'}")
    return DONE


if __name__ == "__main__":
    run_command(main)
