"""Share code between the benchmarks: contenders that take turns, a clock, memory, and how a result is printed."""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from core.system.exits import DONE, USAGE, is_out_of_memory, one_line, refusing
from core.system.provenance import git_commit, versions
from core.training.memory_plans import GIB, clock, free_memory

CPU = torch.device("cpu")
WIDTH = 120  # of a table, in letters
CPU_INFO = Path("/proc/cpuinfo")  # Linux only; elsewhere platform tells less
THREE = {"nargs": 3, "type": int, "metavar": ("X", "Y", "Z")}  # of a flag for voxels along the axes


# ---- Turns -----------------------------------------------------------------------------------------------------------


class Laps:
    """A stopwatch for one turn: `lap(name)` adds the seconds since the last call, or since the start, to `name`."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        self.started = self.last = clock(device)

    def __call__(self, name: str) -> None:
        now = clock(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


@dataclass
class Contender:
    """One way to do a job, and what its turns gave.

    Attributes:
        name: in the table.
        run: does the job once; it may call the stopwatch that it gets after each part of the job.
        turns: number of turns that count, at most.
        before: is called before the clock starts.
        answer: what `run` returned last.
        seconds: of each turn.
        laps: part of the job -> its seconds, of each turn.
        rise_gib: rise of memory above what was there before the turn, of each turn.
        failed: why it ran out of memory, or None. Then it has no results and takes no more turns.
    """

    name: str
    run: Callable[[Laps], Any]
    turns: int = sys.maxsize
    before: Callable[[], Any] = lambda: None
    answer: Any = None
    seconds: list[float] = field(default_factory=list)
    laps: dict[str, list[float]] = field(default_factory=dict)
    rise_gib: list[float] = field(default_factory=list)
    failed: str | None = None


def take_turns(
    contenders: Sequence[Contender],
    repeats: int,
    device: torch.device = CPU,
    warm_up: int = 1,
    memory: bool = True,
    skip_failed: bool = False,
) -> None:
    """Let contenders do the job in turns, so that what else happens on the machine meets all of them.

    Args:
        contenders: get the results of each turn.
        repeats: turns that count.
        device: that the clock waits for, and whose memory is watched.
        warm_up: turns that do not count.
        memory: watch it; freed memory is returned to the system first, which slows the next allocations.
        skip_failed: go on without a contender that runs out of memory.
    """
    for turn in range(-warm_up, repeats):
        for contender in contenders:
            if turn >= contender.turns or contender.failed:
                continue
            contender.answer = None
            contender.before()
            read_rise_gib = watch_memory(device) if memory else lambda: None
            laps = Laps(device)
            try:
                contender.answer = contender.run(laps)
                seconds, rise_gib = clock(device) - laps.started, read_rise_gib()
            except (MemoryError, RuntimeError) as error:
                if not skip_failed or not is_out_of_memory(error, smaller=True):
                    raise
                contender.failed = one_line(error)
                contender.seconds, contender.laps, contender.rise_gib = [], {}, []
            if contender.failed:  # only behind the except clause has the error let go of the turn's tensors
                contender.before()
                free_memory()
            if turn < 0 or contender.failed:
                continue
            contender.seconds.append(seconds)
            contender.rise_gib += [] if rise_gib is None else [rise_gib]
            for name, part in laps.seconds.items():
                contender.laps.setdefault(name, []).append(part)


def time_each(
    jobs: dict[str, Callable[[], Any]], repeats: int, device: torch.device = CPU, warm_up: int = 1
) -> dict[str, dict[str, Any]]:
    """Return median and spread of the seconds of each job; they take turns after `warm_up` others."""
    contenders = [Contender(name, lambda _, job=job: job()) for name, job in jobs.items()]
    take_turns(contenders, repeats, device, warm_up, memory=False)
    return {each.name: summarise(each.seconds) for each in contenders}


def watch_memory(device: torch.device) -> Callable[[], float | None]:
    """Start to watch memory and return a function that gives its largest rise since then, in GiB.

    It is the allocated memory on a GPU and the resident memory on a CPU, where it is None outside Linux.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / GIB
    try:
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident memory back to what it is now
    except OSError:
        return lambda: None
    before = resident_gib("VmHWM")
    return lambda: resident_gib("VmHWM") - before


def return_freed_memory() -> None:
    """Return memory that was freed, but that malloc keeps, to the system; it would hide a rise."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


def resident_gib(which: str) -> float:
    """Return the resident memory of this process, now ("VmRSS") or at its peak ("VmHWM"); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(f"{which}:"))


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def summarise(values: Sequence[float]) -> dict[str, Any] | None:
    """Return median and spread; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(values: Sequence[float], to: Sequence[float]) -> dict[str, Any] | None:
    """Return median and spread of the ratios within a turn, over the turns that both have taken."""
    return summarise([a / b for a, b in zip(values, to, strict=False)])


def machine() -> dict[str, Any]:
    """Return what a number depends on: processor, card, versions and commit."""
    names = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **versions(),
        "monai": installed_version("monai"),
        "commit": git_commit(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- The command -----------------------------------------------------------------------------------------------------


def make_parser(doc: str, repeats: int | None = None, device: bool = False) -> argparse.ArgumentParser:
    """Make a parser with the flags that benchmarks share; its description is the first line of a module's docstring."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if repeats:
        told = "turns that count (default: %(default)s)"
        parser.add_argument("--repeats", type=positive, default=repeats, metavar="N", help=told)
    if device:
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser


def positive(text: str) -> int:
    """Parse a whole number of 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return int(text)


def measure_and_print(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Measure as the command line says, and print the result: as tables, and as one line of JSON at the end."""
    arguments = parser.parse_args()
    with refusing(USAGE):
        result = measure(arguments) | {"machine": machine()}
    if not arguments.json:
        print("\n".join(format_result(result)))
    print(json.dumps(result, allow_nan=False))
    return DONE


def format_result(result: dict[str, Any]) -> list[str]:
    """Return the lines of a result: a table for each dictionary of dictionaries, notes as they are, `key: value`."""
    lines = []
    for key, value in result.items():
        if key == "notes":
            lines += value
        elif not is_row(value):
            lines.append(f"{key}: {cell(value)}")
        elif value and all(map(is_row, value.values())):
            lines += [*[""] * (lines[-1:] != [""]), *table(key, value), ""]
        elif value:
            lines.append(f"{key}: " + ", ".join(f"{name} {cell(part)}" for name, part in value.items()))
    return lines


def table(title: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of a table: a line for each row, a column for each value; turned where that is too wide."""
    flat = {name: flatten(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    grid = [[title, *columns]]
    grid += [[name, *(cell(row.get(column, "")) for column in columns)] for name, row in flat.items()]
    lines = aligned(grid)
    return lines if max(map(len, lines)) <= WIDTH else aligned(list(zip(*grid, strict=True)))


def aligned(grid: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a grid of cells, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in grid]


def is_row(value: Any) -> bool:
    """Return True for a dictionary that is not one of `summarise`."""
    return isinstance(value, dict) and "median" not in value


def flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose values are no dictionaries; the values of {"a": {"b": 1}} are {"a b": 1}."""
    flat = {}
    for key, value in row.items():
        flat |= {f"{key} {name}": part for name, part in value.items()} if is_row(value) else {key: value}
    return flat


def cell(value: Any) -> str:
    """Return a value as text: median (min-max), a number with four digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        spread = f"{cell(value['min'])}-{cell(value['max'])}" if value["n"] > 1 else "n = 1"
        return f"{cell(value['median'])} ({spread})"
    if isinstance(value, list | tuple):
        return ("x" if isinstance(value[0], int) else ", ").join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
