"""Names in every script: a font that has the letters, or the organ's id and one warning, and never a box."""

import unicodedata
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

from visualization import fonts
from visualization.canvas import Canvas
from visualization.fonts import FONT, characters_of, drawable, drawable_organs, font_file
from visualization.movie import draw_background
from visualization.sheet import draw_sheet
from visualization.slices import draw_legend
from visualization.style import apply_style, save_figure

NO_FONT = "\U0010fffd"  # the last private character: no font of letters has it


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(fonts, "families", [FONT])
    monkeypatch.setattr(fonts, "warned", set())


def only(monkeypatch, *families: str) -> None:
    """Let no other fonts be installed."""
    monkeypatch.setattr(fonts, "fontManager", SimpleNamespace(ttflist=[SimpleNamespace(name=f) for f in families]))


def test_organs_that_no_font_has_are_shown_by_their_ids_and_named_once(monkeypatch, capsys):
    only(monkeypatch, FONT)
    assert drawable_organs(["background", "肝", "Müllerader", "脾"]) == [
        "background",
        "organ 1",
        "Müllerader",
        "organ 3",
    ]
    assert drawable_organs(["肝"], [7]) == ["organ 7"]
    assert drawable("肝") == "?"
    assert capsys.readouterr().err == (
        "warning: no installed font has the characters 肝脾: organs are shown by their ids in pictures; "
        "install a font with them\n"
    )


def test_bytes_of_a_name_that_are_not_utf8_are_replaced_without_a_warning(capsys):
    assert drawable("M\udcfcller\t") == "M?ller?"
    assert "\udcfc" not in capsys.readouterr().err


def test_an_installed_font_with_the_characters_is_used(monkeypatch, capsys, tmp_path):
    # Of the fonts that come with matplotlib, STIX has characters that DejaVu lacks; others must not be taken.
    only(monkeypatch, "cmr10", "STIXGeneral", "Last Resort High-Efficiency")
    others = characters_of(FONT) | characters_of("cmr10")
    character = min(c for c in characters_of("STIXGeneral") - others if unicodedata.category(c)[0] == "S")
    assert ord(character) not in FT2Font(findfont(FONT)).get_charmap()
    name = f"organ {character}"
    assert drawable_organs(["background", name]) == ["background", name]
    assert fonts.families[0] == FONT
    assert fonts.families[-1] == "STIXGeneral"
    assert font_file(character) == findfont("STIXGeneral")
    assert font_file("liver") == findfont(FONT)
    apply_style()
    figure = Figure()
    figure.text(0.5, 0.5, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "figure.png")
    assert capsys.readouterr().err == ""


def test_pictures_are_drawn_without_a_warning_of_matplotlib(monkeypatch, tmp_path):
    only(monkeypatch, FONT)
    canvas = Canvas(4, 3, f"M\udcfcller 肝 {NO_FONT}")
    draw_legend(canvas.axes(0, 0, 3, 2), ["background", "肝"], [1], {"mL": ["0", "1"]}, {1})
    square = np.zeros((8, 8))
    sheet = draw_sheet([("肝\udcfc", square, square.astype(np.uint8), (8, 8))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(canvas.figure, tmp_path / "legend.png")
        save_figure(sheet, tmp_path / "sheet.png")
        draw_background((320, 240), "M\udcfcller", [(1, "肝", [1.0])])
    texts = [text.get_text() for axes in canvas.figure.axes for text in axes.texts]
    assert "organ 1" in texts
    assert "肝" not in texts
