"""The picture of the scores, drawn from metrics.csv."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from warm import run_script

from core.config import load_organs
from visualization.scores import (
    BOXED_CASES,
    MARKED_CASES,
    NAMED_CASES,
    NOT_DEFINED,
    draw_boxes,
    draw_heat_map,
    draw_scores,
    main,
    read_metrics,
)
from visualization.style import colour_of

ROOT = Path(__file__).resolve().parents[2]
ORGANS = load_organs()
HEADER = "case,id,organ,dice,precision,recall,accuracy,nsd,hd95_mm,reference_ml,predicted_ml\n"


def table_of(cases: int, organs: int = 13) -> np.ndarray:
    """Make up Dice, (cases, organs), with one organ that is never defined and one that a case lacks."""
    table = np.random.default_rng(0).uniform(0.3, 0.99, (cases, organs))
    table[:, 9] = np.nan
    table[0, 3] = np.nan
    return table


def write_metrics(path: Path, table: np.ndarray, organs: tuple[str, ...] = ORGANS) -> Path:
    """Write Dice and a somewhat higher NSD as evaluate.py does."""
    rows = []
    for (case, i), dice in np.ndenumerate(table):
        scores = ",,,," if np.isnan(dice) else f"{dice:.6g},,,,{dice**0.5:.6g}"
        rows.append(f"case{case:04},{i + 1},{organs[i + 1]},{scores},inf,1,0\n")
    path.write_text(HEADER + "".join(rows))
    return path


def axes_of(width: float = 6, height: float = 6):
    """Return an empty panel."""
    return Figure(figsize=(width, height)).subplots()


# ---- Reading


def test_cells_come_where_they_belong(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + "b,2,spleen,0.25,,,,0.5,inf,1,0\nb,7,cyst,,,,,,,0,0\na,7,cyst,1,1,1,1,0.125,0,1,1\n")
    scores = read_metrics(path)
    assert (scores.cases, scores.organs) == (["b", "a"], {2: "spleen", 7: "cyst"})
    nan = np.nan
    assert np.array_equal(scores.tables["dice"], [[0.25, nan], [nan, 1]], equal_nan=True)
    assert np.array_equal(scores.tables["nsd"], [[0.5, nan], [nan, 0.125]], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "no such file"),
        ("", "lacks the columns case, id, organ, dice, nsd"),
        (HEADER.replace("nsd", "iou"), "lacks the columns nsd"),
        (HEADER, "has no row"),
        (HEADER + "a,1,liver,good,1,1,1,1,1,1,1\n", "has a cell that is no number (could not convert"),
        (HEADER + "a,one,liver,1,1,1,1,1,1,1,1\n", "has a cell that is no number (invalid literal"),
        (HEADER + "a,1,liver,1,1\n", "has a row that is cut off"),
        (HEADER + "a,1,\xe9", "has a row that is cut off"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_named(tmp_path, capsys, text, complaint):
    if text is not None:
        (tmp_path / "metrics.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'metrics.csv'}: ")
    assert complaint in error
    assert not (tmp_path / "scores.png").exists()


# ---- Drawing


@pytest.mark.parametrize("cases", [1, 4, 50, 1000])
def test_any_number_of_cases_gives_a_picture_of_one_size(tmp_path, cases):
    draw_scores(write_metrics(tmp_path / "metrics.csv", table_of(cases)), tmp_path / "scores.png")
    picture = imread(tmp_path / "scores.png")
    assert picture.shape[:2] == (1140, 2250)
    lit = picture[..., :3].max(axis=2) > 0.2
    # Nothing is cut off: no name or number reaches the border.
    assert not lit[[0, -1]].any()
    assert not lit[:, [0, -1]].any()
    for organ in (1, 2, 3):  # a box or points in the organ's colour
        assert (np.abs(picture[..., :3] - colour_of(organ)).max(axis=2) < 0.02).sum() > 20


def test_boxes_span_the_middle_half_and_have_the_organs_colours():
    axes = axes_of()
    table = np.array([np.linspace(0, 0.8, 41), np.full(41, np.nan), np.linspace(0.4, 0.8, 41)]).T
    draw_boxes(axes, table, [1, 2, 13])
    assert len(axes.patches) == 2  # none for the organ that is never defined
    for box, organ, low, high in zip(axes.patches, (1, 13), (0.2, 0.5), (0.6, 0.7), strict=True):
        assert box.get_facecolor()[:3] == pytest.approx(colour_of(organ))
        corners = box.get_path().vertices
        assert (corners[:, 0].min(), corners[:, 0].max()) == pytest.approx((low, high))
        assert corners[:, 1].mean() == pytest.approx({1: 0, 13: 2}[organ], abs=0.3)
    assert axes.get_ylim() == (2.5, -0.5)  # the first organ on top


def test_few_cases_are_points_without_a_box():
    for cases in (1, BOXED_CASES - 1, BOXED_CASES, MARKED_CASES, MARKED_CASES + 1):
        axes = axes_of()
        draw_boxes(axes, np.linspace(0.2, 0.8, cases)[:, None], [1])
        assert len(axes.patches) == (cases >= BOXED_CASES)
        points = [line for line in axes.lines if line.get_marker() == "." and len(line.get_xdata())]
        assert bool(points) == (cases <= MARKED_CASES), cases
        if points:
            assert points[0].get_xdata() == pytest.approx(np.linspace(0.2, 0.8, cases))


def test_the_heat_map_has_the_lowest_case_on_top_and_says_what_is_not_defined():
    axes = axes_of()
    table = np.array([[0.9, 0.8], [np.nan, np.nan], [0.1, np.nan], [0.4, 0.6]])
    draw_heat_map(axes, table, ["good", "empty", "bad", "fair"], ["liver", "spleen"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bad", "fair", "good", "empty"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["liver", "spleen"]
    written = {tuple(text.get_position()[::-1]): text.get_text() for text in axes.texts}
    assert written[0, 0] == "0.10"
    assert written[0, 1] == written[3, 0] == "-"
    assert written[2, 1] == "0.80"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # row 0 on top
    shown = axes.images[0].get_array()
    assert (shown[0, 0], shown[2, -1]) == (0.1, 0.8)
    gray = tuple(int(NOT_DEFINED[i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert axes.images[0].to_rgba(shown)[0, -1][:3] == pytest.approx(gray)


@pytest.mark.slow
def test_a_single_bad_case_of_a_thousand_is_seen(tmp_path):
    table = np.full((1000, 13), 0.9)
    path = write_metrics(tmp_path / "metrics.csv", table)
    draw_scores(path, tmp_path / "before.png")
    table[500] = 0.0
    draw_scores(write_metrics(path, table), tmp_path / "after.png")
    changed = np.abs(imread(tmp_path / "before.png") - imread(tmp_path / "after.png")).max(axis=2) > 0.1
    assert changed[:, 1300:1990].sum(axis=1).max() > 600  # right across the heat map


def test_many_cases_are_not_named_one_by_one():
    for cases in (NAMED_CASES, NAMED_CASES + 1):
        axes = axes_of()
        names = [f"case{i}" for i in range(cases)]
        draw_heat_map(axes, np.linspace(0, 1, cases)[:, None].repeat(3, axis=1), names, ["a", "b", "c"])
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert (labels == names) == (cases == NAMED_CASES)
        assert (axes.get_xlabel() == "lowest: case0, case1, case2") == (cases > NAMED_CASES)


def test_long_names_are_cut_in_the_middle():
    axes = axes_of()
    names = ["1.2.840.113619.2.55.3.604688119.971.1", "1.2.840.113619.2.55.3.604688119.971.2"]
    draw_heat_map(axes, np.ones((2, 2)), names, ["a", "b"])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == 2
    assert all(len(label) <= 22 and label[:6] == "1.2.84" and "…" in label for label in labels)


@pytest.mark.slow
def test_a_hundred_organs_are_drawn(tmp_path):
    organs = ("background", *(f"a structure with a long name {i}" for i in range(1, 118)))
    draw_scores(write_metrics(tmp_path / "metrics.csv", table_of(20, 117), organs), tmp_path / "scores.png")
    picture = imread(tmp_path / "scores.png")
    assert picture.shape[:2] == (1140, 2250)
    assert not (picture[:, 0, :3].max(axis=1) > 0.2).any()


def test_the_command_draws_into_the_folder(tmp_path):
    write_metrics(tmp_path / "metrics.csv", table_of(3))
    done = run_script("-m", "visualization.scores", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {tmp_path / 'scores.png'}\n"
    first = (tmp_path / "scores.png").read_bytes()
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "scores.png").read_bytes() == first
