"""Time the main thread at the end of an epoch, while a GPU has nothing to do.

    python -m benchmarks.epoch_end [--repeats 3] [--step-seconds 0.1]

The default network's files are written into a temporary folder: best.pt, last.pt, a row of log.csv, curves.png. The
share is that of an epoch of 40 steps whose network is the best so far, with the intervals at which each is done.
Validation is left out: on a GPU, all of it is computed there.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import make_parser, measure_and_print, summarise
from core.config import load_config
from core.network import build_network
from core.system.exits import run_command
from core.training.run_folder import BEST_SECONDS, DRAW_SECONDS, RunFolder
from core.training.setup import make_optimizer
from visualization.curves import draw_curves

STEPS, LOGGED_EPOCHS = 40, 50


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time each part; add up what an epoch has of them."""
    config = load_config()
    network = build_network(config)
    optimizer = make_optimizer(network, config.learning_rate)
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(replace(config, run_dir=place), draw_curves)
        folder.best_written = time.monotonic()
        row = dict.fromkeys(folder.log_columns, 0.5)
        for epoch in range(1, LOGGED_EPOCHS + 1):
            folder.log_table.append(row | {"epoch": epoch})
        parts = {
            "copy of the best network": lambda: folder.keep_best(network, val_dice=0.5),
            "best.pt": folder.write_best,
            "last.pt": lambda: folder.save_last(network, epoch=1, optimizer=optimizer.state_dict()),
            "row of log.csv": lambda: folder.log_table.append(row | {"epoch": LOGGED_EPOCHS}),
            "curves.png": lambda: draw_curves(folder.log, folder.curves, config.organs),
        }
        seconds = {name: [] for name in parts}
        for _ in range(arguments.repeats):
            for name, part in parts.items():
                seconds[name].append(seconds_of(part))
        sizes = {path.name: path.stat().st_size / 1e6 for path in Path(place).iterdir()}
    typical = {name: float(np.median(values)) for name, values in seconds.items()}
    epoch = STEPS * arguments.step_seconds
    every = {
        "copy of the best network": 1,
        "best.pt": min(1, epoch / BEST_SECONDS),
        "last.pt": min(1, epoch / (60 * config.checkpoint_minutes)),
        "row of log.csv": 1,
        "curves.png": min(1, epoch / DRAW_SECONDS),
    }
    an_epoch = {name: every[name] * typical[name] for name in parts}
    saved = sum(typical[name] * (1 - every[name]) for name in ("best.pt", "curves.png"))
    return {
        "parts": {
            name: {"seconds": summarise(values), "of_an_epoch_ms": 1000 * an_epoch[name]}
            for name, values in seconds.items()
        },
        "written_mb": sizes,
        "epoch_seconds": epoch,
        "share_percent": 100 * sum(an_epoch.values()) / epoch,
        "share_without_intervals_percent": 100 * (sum(an_epoch.values()) + saved) / epoch,
        "notes": ["on one thread of a CPU; on a GPU, copying the best network to the host takes its own time"],
    }


def seconds_of(part: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    part()
    return time.perf_counter() - started


def main() -> int:
    """Measure, and print."""
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument(
        "--step-seconds", type=float, default=0.1, metavar="S", help="of a training step (default: 0.1)"
    )
    torch.set_num_threads(1)  # the main thread's own work
    return measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
