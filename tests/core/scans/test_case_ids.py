"""Lists of case ids: whatever is written is read back as it was."""

import pytest

from core.scans.files import format_case_ids, read_case_ids

ODD = [
    "case",
    "scan #2",
    "#3",
    " padded ",
    "a#b",
    '"quoted"',
    "M\udcfcller",
    "two\nlines",
    "tab\tin",
    "Ärzte 王",
    "x\r",
]


def test_every_id_comes_back_as_it_was(tmp_path):
    file = tmp_path / "val_cases.txt"
    file.write_bytes(format_case_ids(ODD))
    assert read_case_ids([str(file)]) == ODD
    assert format_case_ids(["case_1", "a#b"]) == b"case_1\na#b\n"  # the usual ids stay plain


def test_comments_and_blank_lines_are_no_ids(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text("# held out\nfirst  # a comment\n\n  second\r\n")
    assert read_case_ids([str(file)]) == ["first", "second"]


def test_an_id_with_a_broken_quote_is_refused(tmp_path):
    file = tmp_path / "cases.txt"
    file.write_text('"half\n')
    with pytest.raises(ValueError, match=r'cases\.txt: "half is no id in quotes'):
        read_case_ids([str(file)])
