"""annotated.csv: what is written comes back, and what is no such file is refused by name."""

import os
import re

import pytest

from core.scans.annotated import read_annotated, write_annotated


def test_what_is_written_comes_back(tmp_path):
    organs = {"a, b": ("liver", "right kidney"), "#2": (), "café": ("spleen",)}
    write_annotated(tmp_path, organs)
    assert read_annotated(tmp_path) == organs
    assert (tmp_path / "annotated.csv").read_text(encoding="utf-8").splitlines()[:2] == [
        "case,organs",
        '"a, b",liver;right kidney',
    ]


def test_no_file_annotates_nothing_in_particular(tmp_path):
    assert read_annotated(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "case\na\n", "case,organs\na,liver\na,spleen\n", "case,organs\na,liver,spleen\n"])
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "annotated.csv").write_text(text)
    with pytest.raises(ValueError, match=r"annotated\.csv: "):
        read_annotated(tmp_path)


def test_blank_lines_and_blanks_around_a_cell_do_not_count(tmp_path, capsys):
    (tmp_path / "annotated.csv").write_text("case,organs\n\n a , liver;spleen\n,\nb,\n\n")
    assert read_annotated(tmp_path, ["a", "b"]) == {"a": ("liver", "spleen"), "b": ()}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "(it is empty)"),
        ("\n\n", "(it is empty)"),
        ("case;organs\n", "(its columns are not case, organs)"),
        ("case,organs\na,liver\nb,liver,spleen\n", "('b,liver,spleen': its columns are not case, organs)"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, reason):
    (tmp_path / "annotated.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"is no list of annotated organs {reason}; write it again")):
        read_annotated(tmp_path)


def test_case_ids_that_are_not_utf8_come_back(tmp_path):
    case = os.fsdecode(b"M\xfcller")
    write_annotated(tmp_path, {case: ("liver",)})
    assert (tmp_path / "annotated.csv").read_bytes() == b"case,organs\nM\xfcller,liver\n"
    assert read_annotated(tmp_path) == {case: ("liver",)}


def test_a_case_that_is_not_there_is_warned_of(tmp_path, capsys):
    write_annotated(tmp_path, {"a": ("liver",), "aa": ("liver",)})
    assert list(read_annotated(tmp_path, ["a", "b"])) == ["a", "aa"]
    assert "lists aa, expected ids of the 2 cases; such lines do nothing" in capsys.readouterr().err
    read_annotated(tmp_path)
    assert capsys.readouterr().err == ""
