"""What an epoch's end writes, and when."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from core.checkpoint import load_checkpoint
from core.config import load_config
from core.training import run_folder
from core.training.run_folder import BEST_SECONDS, DRAW_SECONDS, RunFolder
from visualization.curves import draw_curves


class Clock:
    """In place of the module time."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_folder, "time", clock)
    return clock


@pytest.fixture
def folder(clock, tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(replace(load_config(), run_dir=str(tmp_path / "run")))


def network_of(value: float) -> nn.Module:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    return network


def best(folder: RunFolder) -> tuple[float, float]:
    """Return the weight and the Dice in best.pt."""
    content = load_checkpoint(folder.best)
    return content["network"]["weight"].item(), content["val_dice"]


def test_what_is_noted_before_an_earlier_run_is_replaced_is_kept(folder):
    cases = {"train": ["a"], "val": [], "made": []}
    folder.start(torch.device("cpu"), cases)
    folder.note(memory_plan="of the earlier run")
    again = RunFolder(folder.config)
    again.replaces = True
    again.note(outcome="under way", memory_plan="measured")
    assert json.loads((folder.path / "run.json").read_text())["memory_plan"] == "of the earlier run"
    again.lock_file = folder.lock_file
    again.start(torch.device("cpu"), cases)
    again.note(more=1)
    found = json.loads((folder.path / "run.json").read_text())
    assert [found[key] for key in ("outcome", "memory_plan", "more")] == ["under way", "measured", 1]


@pytest.mark.parametrize(("outcome", "refused"), [("done", True), (None, True), ("under way", False)])
def test_a_finished_run_without_last_pt_is_not_started_again(folder, outcome, refused):
    folder.start(torch.device("cpu"), {"train": ["a"], "val": [], "made": []})
    folder.best.write_bytes(b"the only copy")
    assert folder.find_run(resume=True, overwrite=False) is None  # killed just after its start
    if outcome:
        folder.note(outcome=outcome)
    else:
        (folder.path / "run.json").unlink()
    if refused:
        with pytest.raises(FileExistsError, match=r"holds a run without last.pt; put it back, or give --overwrite"):
            folder.find_run(resume=True, overwrite=False)
    else:  # killed before its first last.pt
        assert folder.find_run(resume=True, overwrite=False) is None


def test_files_of_somebody_else_in_the_run_folder_are_kept(folder, capsys):
    for name in ("config.yaml", "val_cases.txt", "run.json"):
        (folder.path / name).write_text('{"mine": 1}')
    for number in range(2):  # the second time, they are a run's
        folder.start(torch.device("cpu"), {"train": ["a"], "val": ["b"], "made": []})
        assert capsys.readouterr().err.count("no run has written it, so the earlier") == (0 if number else 3)
    for name in ("config.yaml", "val_cases.txt", "run.json"):
        assert (folder.path / f"{name}.old").read_text() == '{"mine": 1}'
    assert folder.val_cases.read_text() == "b\n"


def test_best_is_written_at_most_once_a_minute_and_with_last(folder, clock):
    network = network_of(1)
    folder.keep_best(network, val_dice=0.1)
    assert best(folder) == (1, 0.1)
    nn.init.constant_(network.weight, 2)
    clock.now += BEST_SECONDS - 1
    folder.keep_best(network, val_dice=0.2)
    nn.init.constant_(network.weight, 3)  # as the next step does
    assert best(folder) == (1, 0.1)
    folder.save_last(network, epoch=2)
    assert best(folder) == (2, 0.2)
    last = load_checkpoint(folder.last)
    assert (last["best_dice"], last["network"]["weight"].item()) == (0.2, 3)
    clock.now += BEST_SECONDS
    folder.keep_best(network, val_dice=0.3)
    assert best(folder) == (3, 0.3)


def test_the_end_of_a_run_writes_the_best(folder):
    folder.keep_best(network_of(1), val_dice=0.1)
    folder.keep_best(network_of(2), val_dice=0.2)
    with pytest.raises(ZeroDivisionError), folder.noting_the_end():
        1 / 0  # noqa: B018
    assert best(folder) == (2, 0.2)


def test_a_best_that_could_not_be_written_is_written_later(folder, clock, monkeypatch, capsys):
    folder.keep_best(network_of(1), val_dice=0.1)
    clock.now += BEST_SECONDS
    with monkeypatch.context() as full:
        full.setattr("core.checkpoint.torch.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        folder.keep_best(network_of(2), val_dice=0.2)
        assert "No space left" in capsys.readouterr().err
        folder.save_last(network_of(2), epoch=1)
    assert best(folder) == (1, 0.1)
    folder.save_last(network_of(2), epoch=2)
    assert best(folder) == (2, 0.2)
    assert folder.unwritten is None


def test_curves_are_drawn_at_most_once_a_minute(folder, clock):
    drawn = []
    folder.draw = lambda *_: drawn.append(clock.now)
    for epoch in range(1, 10):
        clock.now += DRAW_SECONDS / 3
        folder.log_epoch({"epoch": epoch, "train_loss": 1.0})
    assert drawn == [1000 + DRAW_SECONDS, 1000 + 2 * DRAW_SECONDS, 1000 + 3 * DRAW_SECONDS]


def test_a_log_edited_by_hand_costs_the_curves_and_not_the_run(folder, clock, capsys):
    folder.draw = draw_curves
    row = dict.fromkeys(folder.log_columns)
    folder.log_epoch(row | {"epoch": 1, "train_loss": 1.0, "val_dice": 0.5})
    folder.log.write_text(folder.log.read_text().replace("0.5", "n/a"))
    folder.log_table.rows = None  # as after --resume
    clock.now += DRAW_SECONDS
    folder.log_epoch(row | {"epoch": 2, "train_loss": 0.5})
    assert "warning: no new curves.png: " in (err := capsys.readouterr().err)
    assert "row 2, column val_dice: 'n/a', expected a number" in err
    assert len(folder.log.read_text().splitlines()) == 3


def test_the_copy_of_the_best_is_on_the_cpu_and_of_its_own(folder, clock):
    network = network_of(1)
    folder.keep_best(network, val_dice=0.1)
    folder.keep_best(network, val_dice=0.2)
    weights, _ = folder.kept_best
    assert weights["weight"].device == torch.device("cpu")
    assert weights["weight"].data_ptr() != network.weight.data_ptr()
