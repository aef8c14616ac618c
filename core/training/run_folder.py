"""The run folder: settings, checkpoints, log, and the provenance of a run.

config.yaml   the merged settings             last.pt       everything to go on from
log.csv       a row per epoch                 previous.pt   the last.pt before, should that be damaged
run.json      versions, device, cases, data   best.pt       the network with the best validation Dice
run.lock      of the process at work on it    val_cases.txt   the cases held out
"""

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from core.checkpoint import check_resumable, load_checkpoint, save_checkpoint
from core.config import Config, config_to_dict, save_config
from core.scans.files import format_case_ids, listed
from core.system.exits import how_it_ended, one_line, print_warning
from core.system.files import lock_file, open_text, read_text, remove_left_over, rename_old, whole_file, write_text
from core.system.provenance import git_commit, versions
from core.training.log_table import LogTable
from core.training.resuming import check_same_settings
from core.training.tensorboard import write_scalars

# Least time between two drawings of curves.png, and between two best.pt: each takes about a second, and an epoch on a
# GPU takes seconds. best.pt is also written with last.pt; both are up to date at the end of a run.
DRAW_SECONDS = BEST_SECONDS = 60
RESULTS = ("log.csv", "curves.png", "last.pt", "previous.pt", "best.pt")
RUN_FILES = ("config.yaml", "run.json", "val_cases.txt", *RESULTS)


class RunFolder:
    """The folder of one run.

    Args:
        config: of the run; its run_dir is the folder.
        draw: draws curves.png, given the paths of log.csv and of the picture, and the organs.
    """

    def __init__(self, config: Config, draw: Callable[[Path, Path, Sequence[str]], None] = lambda *_: None):
        self.config = config
        self.draw = draw
        self.path = Path(config.run_dir)
        self.last = self.path / "last.pt"
        self.previous = self.path / "previous.pt"
        self.best = self.path / "best.pt"
        self.log = self.path / "log.csv"
        self.curves = self.path / "curves.png"
        self.settings = self.path / "config.yaml"
        self.val_cases = self.path / "val_cases.txt"
        self.scalars = self.path / "tensorboard"
        self.log_table = LogTable(self.log)
        self.lock_file: IO | None = None
        self.replaces = False  # an earlier run, by --overwrite, which is there until this one starts
        self.noted: dict[str, Any] = {}  # facts for run.json, while the earlier run's is there
        self.last_is_damaged = False
        self.can_draw, self.is_drawn, self.drawn = True, True, time.monotonic()
        self.kept_best: tuple[dict, dict] | None = None  # weights and facts of a best network that is not written yet
        self.best_dice, self.best_written = -1.0, -math.inf  # validation Dice of best.pt, and when it was written
        self.unwritten: OSError | None = None  # why the latest results are not in the folder

    @property
    def log_columns(self) -> list[str]:
        """The columns of log.csv."""
        dice = [f"dice_{organ.replace(' ', '_')}" for organ in self.config.organs[1:]]
        before, after = ["epoch", "train_loss", "val_loss", "val_dice"], ["seconds", "data_seconds", "peak_gib"]
        return [*before, *dice, *after, "learning_rate"]

    def lock(self) -> None:
        """Keep other runs off the folder until this process ends, however it ends; nothing where there is no folder.

        What a killed run was writing goes.

        Raises:
            FileExistsError: when another process is at work on it.
        """
        if self.lock_file or not self.path.is_dir():
            return
        # The system gives a lock up with its process: one that was killed leaves none behind.
        path = self.path / "run.lock"
        file = open_text(path, "a+")  # open as long as the process lives
        holder = f"process {os.getpid()} on {platform.node()}\n"
        try:
            alone = lock_file(file, path, wait=False)
        except BlockingIOError as error:
            file.seek(0)
            other = file.read()
            if other != holder:
                raise FileExistsError(
                    f"{self.path}: another run is at work on it ({other.strip()}); "
                    "wait for its end, or choose another --run-dir"
                ) from error
            alone = True  # this process has it from an earlier run
        file.truncate(0)
        file.write(holder)
        file.flush()
        self.lock_file = file
        for name in RUN_FILES if alone else ():
            remove_left_over(self.path / name)

    def find_run(self, resume: bool, overwrite: bool, extend: bool = False) -> dict[str, Any] | None:
        """Return the checkpoint to go on from, or None for a new run; change nothing.

        Where last.pt is damaged it is the one before. With `extend` the run may go on for more epochs.

        Raises:
            FileExistsError: when the folder holds a run and neither `resume` nor `overwrite` is asked for, or a run
                that is done but has no last.pt.
            ValueError: when both are, or when the run to resume was made with other settings or is damaged.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite: got both, expected one: go on with the run or replace it")
        # The other files are written before the first epoch, and tell of no work that could be lost.
        holds_run = any(path.exists() for path in (self.log, self.last, self.previous, self.best))
        if holds_run and not (resume or overwrite):
            raise FileExistsError(f"{self.path}: holds a run already; go on with --resume or replace it by --overwrite")
        self.replaces = overwrite and holds_run
        checkpoint = self.newest_checkpoint() if resume else None
        # One that was killed before its first last.pt says "under way", and starts again.
        if resume and holds_run and not checkpoint and self.record().get("outcome", "done") == "done":
            raise FileExistsError(f"{self.path}: holds a run without last.pt; put it back, or give --overwrite")
        if checkpoint:
            check_same_settings(self.path, checkpoint["config"], self.config, extend)
        return checkpoint

    def newest_checkpoint(self) -> dict[str, Any] | None:
        """Load last.pt, or previous.pt with a warning where that cannot be read; return None when there is neither.

        Raises:
            ValueError: when none of those that are there can be read.
        """
        damaged = None
        for path in filter(Path.is_file, (self.last, self.previous)):
            try:
                checkpoint = load_checkpoint(path)
                check_resumable(checkpoint, path)
            except ValueError as error:
                damaged = damaged or error
                continue
            if damaged:
                print_warning(f"{damaged}; going on from {path.name}, the one before")
                self.last_is_damaged = True
            return checkpoint
        if damaged:
            raise damaged
        return None

    def start(self, device: torch.device, cases: dict[str, list[str]]) -> None:
        """Make the folder, remove a run that this one replaces, and write config.yaml, val_cases.txt and run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        if self.replaces:
            self.clear()
        for name in () if self.record() else ("config.yaml", "val_cases.txt", "run.json"):
            rename_old(self.path / name, f"{self.path}: no run has written it")
        self.write_settings(cases)
        self.write_record(device, cases)
        self.replaces = False

    def write_settings(self, cases: dict[str, list[str]]) -> None:
        """Write config.yaml and val_cases.txt."""
        save_config(self.config, self.settings)
        with whole_file(self.val_cases) as temporary:
            temporary.write_bytes(format_case_ids(cases["val"]))

    def write_record(self, device: torch.device, cases: dict[str, list[str]]) -> None:
        """Write run.json anew."""
        facts = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "commit": git_commit(),
            "versions": versions(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
            "train_cases": cases["train"],
            "val_cases": cases["val"],
            "made_cases": cases["made"],
            "config": config_to_dict(self.config),
            "outcome": "under way",
            **self.noted,
        }
        write_text(self.path / "run.json", json.dumps(facts, indent=2) + "\n")

    def go_on(self, before: Config, device: torch.device, cases: dict[str, list[str]]) -> None:
        """Write those files of `start` that a resumed run lacks, and what an extended or moved run has anew."""
        if not self.record():
            rename_old(self.path / "run.json", f"{self.path}: no run has written it")
            self.write_record(device, cases)
        same = (before.epochs, before.run_dir) == (self.config.epochs, self.config.run_dir)
        if not (same and self.settings.is_file() and self.val_cases.is_file()):
            self.write_settings(cases)
            self.note(config=config_to_dict(self.config))

    def record(self) -> dict[str, Any]:
        """Return the content of run.json; empty where no run has written one."""
        with suppress(OSError, ValueError):
            content = json.loads(read_text(self.path / "run.json"))
            if isinstance(content, dict) and "train_cases" in content:
                return content
        return {}

    def clear(self) -> None:
        """Remove what an earlier run has reached."""
        for name in RESULTS:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.scalars, ignore_errors=True)

    def compare_data(self, before: dict[str, str] | None, now: dict[str, str]) -> None:
        """Note the cases' fingerprints in run.json; warn of cases that had other ones `before`, as far as known."""
        changed = [case for case in now if before and before.get(case) != now[case]]
        if changed:
            print_warning(
                f"{self.path}: scan, label map or weight of {len(changed)} of {len(now)} cases has changed since the "
                f"run began: {listed(changed)}; it goes on with the new ones; --run-dir of another name starts anew"
            )
        self.note(data_fingerprint=hashlib.sha256(json.dumps(now).encode()).hexdigest(), case_fingerprints=now)

    @contextmanager
    def noting_the_end(self) -> Iterator[None]:
        """Record in run.json how and when the block ended; after a kill it still says "under way"."""
        self.note(outcome="under way", ended=None)
        try:
            yield
        finally:
            how, unwritten = how_it_ended(sys.exc_info()[1]), self.unwritten
            with self.writing():
                self.draw_curves()
            unwritten = unwritten or self.unwritten
            self.write_best()
            self.unwritten = unwritten or self.unwritten
            if self.unwritten:
                how += f"; the latest results could not be written ({one_line(self.unwritten)})"
            self.note(outcome=how, ended=datetime.now(UTC).isoformat(timespec="seconds"))

    def note(self, **facts: Any) -> None:
        """Put facts into run.json beside what is there; what hinders that is a warning, and the run goes on."""
        path = self.path / "run.json"
        if self.replaces:
            self.noted |= facts
            return
        try:
            before = json.loads(read_text(path))
            write_text(path, json.dumps({**before, **facts}, indent=2) + "\n")
        except (OSError, ValueError, TypeError) as error:  # no JSON, or no object in it
            print_warning(f"{path}: how the run ends is not noted ({one_line(error)})")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError of the block, such as a full disk, into a warning, and keep it in `unwritten`."""
        try:
            yield
        except OSError as error:
            print_warning(f"{error}; what was there before is whole, and the run goes on")
            self.unwritten = error
        else:
            self.unwritten = None

    def save_last(self, network: nn.Module, **state: Any) -> None:
        """Write best.pt if it is not up to date, and last.pt; the one before becomes previous.pt, if not damaged."""
        self.write_best()
        state["best_dice"] = self.best_dice
        with self.writing():
            save_checkpoint(self.last, network, self.config, None if self.last_is_damaged else self.previous, **state)
            self.last_is_damaged = False

    def keep_best(self, network: nn.Module, **state: Any) -> None:
        """Keep a copy of the best network so far, with its val_dice in `state`, and write best.pt if that is due."""
        weights = {name: tensor.to("cpu", copy=True) for name, tensor in network.state_dict().items()}
        self.kept_best = weights, state
        if time.monotonic() - self.best_written >= BEST_SECONDS:
            self.write_best()

    def write_best(self) -> None:
        """Write the network that `keep_best` has kept, if any, to best.pt; what fails is tried again the next time."""
        if self.kept_best is None:
            return
        weights, state = self.kept_best
        with self.writing():
            save_checkpoint(self.best, weights, self.config, **state)
            self.kept_best, self.best_dice = None, state["val_dice"]
        self.best_written = time.monotonic()

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Add an epoch's row to log.csv and to TensorBoard's files if asked for, and draw curves.png if due."""
        with self.writing():
            self.log_table.append(row)
            if self.config.tensorboard:
                write_scalars(self.scalars, row)
            self.is_drawn = False
            if time.monotonic() - self.drawn >= DRAW_SECONDS:
                self.draw_curves()

    def results(self) -> list[str]:
        """Return the names of the results that are in the folder."""
        return [path.name for path in (self.last, self.best, self.log, self.curves) if path.is_file()]

    def draw_curves(self) -> None:
        """Draw curves.png from log.csv; without matplotlib, or with a log.csv that somebody changed, warn and go on."""
        if self.is_drawn or not self.can_draw:
            return
        self.is_drawn, self.drawn = True, time.monotonic()
        try:
            self.draw(self.log, self.curves, self.config.organs)
        except ImportError as error:
            self.can_draw = False
            print_warning(f"no curves.png, since matplotlib cannot be imported ({one_line(error)}); install it again")
        except ValueError as error:
            print_warning(f"no new curves.png: {one_line(error)}")


class SilentRunFolder(RunFolder):
    """The run folder in a process that is not the first: it finds the checkpoint to go on from, and writes nothing."""

    def do_nothing(self, *_: object, **__: object) -> None:
        """Leave it to the first process."""

    lock = start = go_on = note = compare_data = save_last = keep_best = log_epoch = do_nothing
