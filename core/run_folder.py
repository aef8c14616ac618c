"""What a run leaves behind: its settings, checkpoints, log and where it all came from.

config.yaml   the merged settings             last.pt   everything to go on from after the last epoch
log.csv       a row per epoch                 best.pt   the network with the best validation Dice
run.json      versions, device, cases, data   val_cases.txt   the cases held out
"""

import csv
import hashlib
import json
import math
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from core.checkpoint import check_resumable, load_checkpoint
from core.config import Config, config_to_dict, save_config
from core.files import whole_file

# Settings that a resumed run may have of its own. For data_dir the cases are compared; init_from has done its work.
MAY_CHANGE = ("run_dir", "data_dir", "cache_dir", "init_from", "workers", "device", "memory", "compile")
RUN_FILES = ("config.yaml", "run.json", "val_cases.txt", "log.csv", "curves.png", "last.pt", "best.pt")


class RunFolder:
    """The folder of one run.

    Args:
        config: of the run; its run_dir is the folder.
    """

    def __init__(self, config: Config):
        self.config = config
        self.path = Path(config.run_dir)
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.log = self.path / "log.csv"
        self.curves = self.path / "curves.png"
        self.val_cases = self.path / "val_cases.txt"

    @property
    def log_columns(self) -> list[str]:
        """The columns of log.csv."""
        dice = [f"dice_{organ.replace(' ', '_')}" for organ in self.config.organs[1:]]
        return ["epoch", "train_loss", "val_loss", "val_dice", *dice, "seconds", "data_seconds", "peak_gib"]

    def find_run(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a run from the start; changes nothing.

        Raises:
            FileExistsError: when the folder holds a run and neither `resume` nor `overwrite` is asked for.
            ValueError: when both are, or when the run to resume was made with other settings or is damaged.
        """
        if resume and overwrite:
            raise ValueError("--resume and --overwrite: got both, expected one: go on with the run or replace it")
        # The other files are written before the first epoch, and tell of no work that could be lost.
        holds_run = any(path.exists() for path in (self.log, self.last, self.best))
        if holds_run and not (resume or overwrite):
            raise FileExistsError(f"{self.path}: holds a run already; go on with --resume or replace it by --overwrite")
        if not (resume and self.last.is_file()):
            return None
        checkpoint = load_checkpoint(self.last)
        check_resumable(checkpoint, self.last)
        self.check_same_settings(checkpoint["config"])
        return checkpoint

    def check_same_settings(self, before: Config) -> None:
        """Check that the run so far had these settings."""
        now, then = config_to_dict(self.config), config_to_dict(before)
        changed = [key for key in now if now[key] != then[key] and key not in MAY_CHANGE]
        if changed:
            listed = "; ".join(f"{key} was {then[key]}, is {now[key]}" for key in changed)
            raise ValueError(
                f"{self.path}: cannot go on with other settings ({listed}); start anew in another --run-dir"
            )

    def check_same_cases(self, before: dict[str, list[str]], now: dict[str, list[str]]) -> None:
        """Check that the run so far was trained on the same cases, else some held out would be trained on."""
        for part, what in (("train", "to train on"), ("val", "held out")):
            changed = sorted(set(before[part]) ^ set(now[part]))
            if changed:
                raise ValueError(
                    f"{self.path}: cannot go on with other cases; {what} only before or only now: "
                    f"{', '.join(changed[:5])}; start anew in another --run-dir"
                )

    def start(self, device: torch.device, cases: dict[str, list[str]], data: Any, overwrite: bool) -> None:
        """Make the folder, clear it if asked to, and write config.yaml, val_cases.txt and run.json.

        `data` is plain values that change when the training data do; its hash is the data's fingerprint.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in RUN_FILES:
                (self.path / name).unlink(missing_ok=True)
        save_config(self.config, self.path / "config.yaml")
        with whole_file(self.val_cases) as temporary:
            temporary.write_text("".join(f"{case}\n" for case in cases["val"]))
        facts = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "commit": git_commit(),
            "versions": versions(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
            "train_cases": cases["train"],
            "val_cases": cases["val"],
            "data_fingerprint": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
            "config": config_to_dict(self.config),
        }
        with whole_file(self.path / "run.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")

    def append_log(self, row: dict[str, Any]) -> None:
        """Add an epoch's row to log.csv; a row of the same or a later epoch, of a run that broke off, goes.

        A value that is None or NaN becomes an empty cell.
        """
        rows = []
        if self.log.is_file():
            with open(self.log, newline="") as file:
                rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
        rows.append({key: format_cell(value) for key, value in row.items()})
        with whole_file(self.log) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)


def format_cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "numpy": np.__version__,
        "nibabel": nibabel.__version__,
    }


def git_commit() -> str | None:
    """The commit of this checkout, with "+" behind it when files were changed since; None outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
