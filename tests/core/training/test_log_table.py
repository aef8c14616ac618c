"""log.csv: rows with other columns, and tables that are no log of a run."""

import csv
from pathlib import Path

import pytest

from core.training.log_table import LogTable


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_that_comes_and_goes_is_kept(tmp_path):
    path = tmp_path / "log.csv"
    LogTable(path).append({"epoch": 1, "train_loss": 0.5})
    table = LogTable(path)  # as of a resumed run
    table.append({"epoch": 2, "train_loss": 0.25, "mine": 3.0})
    table.append({"epoch": 3, "train_loss": float("nan")})
    assert [list(row.values()) for row in rows_of(path)] == [["1", "0.5", ""], ["2", "0.25", "3"], ["3", "", ""]]
    LogTable(path).append({"epoch": 2, "train_loss": 0.125})
    assert [list(row.values()) for row in rows_of(path)] == [["1", "0.5", ""], ["2", "0.125", ""]]


@pytest.mark.parametrize("content", ["epoch,loss\n1,0.5\n", "epoch,train_loss\n1,0,7\n", "epoch,train_loss\n1.0,5\n"])
def test_a_table_that_is_no_log_makes_room(tmp_path, capsys, content):
    path = tmp_path / "log.csv"
    path.write_text(content)
    LogTable(path).append({"epoch": 2, "train_loss": 0.25})
    assert (tmp_path / "log.csv.old").read_text() == content
    assert [row["epoch"] for row in rows_of(path)] == ["2"]
    assert "is no log of this run any more, so it is now log.csv.old" in capsys.readouterr().err
