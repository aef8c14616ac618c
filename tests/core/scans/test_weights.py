"""weights.csv: read as it was written, and refused in a sentence."""

import pytest

from core.scans.weights import read_weights, write_weights


def test_what_is_written_is_read(tmp_path, capsys):
    assert read_weights(tmp_path) == {}
    write_weights(tmp_path, {"a": 0.91234, "Ü b": 1.0})
    assert read_weights(tmp_path, ["a", "Ü b"]) == {"a": 0.91234, "Ü b": 1.0}
    assert capsys.readouterr().err == ""
    read_weights(tmp_path, ["a"])
    assert "weights.csv: lists Ü b, expected ids of the 1 cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no list of weights"),
        ("case;weight\na;1\n", "its columns are not case, weight"),
        ("case,weight\na,heavy\n", "the weight of a is heavy, expected a number above 0 and at most 1"),
        ("case,weight\na,1\na,1\n", "names a case twice"),
        ("case,weight\na,0\n", "the weight of a is 0, expected a number above 0 and at most 1"),
        ("case,weight\na,1.5\n", "the weight of a is 1.5"),
        ("case,weight\na,nan\n", "the weight of a is nan"),
    ],
)
def test_other_files_are_refused(tmp_path, text, words):
    (tmp_path / "weights.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_weights(tmp_path)
