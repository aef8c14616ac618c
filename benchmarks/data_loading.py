"""How fast training samples come: this data set raw and cached, and MONAI's caching data sets beside it.

    python -m benchmarks.data_loading                        # phantoms of 512x512x100 voxels, made first (minutes)
    python -m benchmarks.data_loading --data-dir data/FLARE22Train
    python -m benchmarks.data_loading --json                 # only the line of JSON

A sample is ready when its batch of one is: image and label map on the network's grid, 256x256x128 unless told
otherwise, in memory of their own. The files are in the operating system's page cache, as they are from the second epoch
on. MONAI is left out where it is not installed.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from benchmarks import measuring, peers
from core.config import Config, load_config
from core.system.exits import run_command
from data.make_phantom import write_phantom
from dataset import Case, CaseDataset, find_cases

SHAPE = (512, 512, 100)  # voxels of the phantoms, a usual abdominal scan
CASES = 3
WORKERS = (0, 1, 2)
MIB = 2**20
MIB_PER_GIB = 1024


@dataclass
class Way:
    """A way to get samples: its data set, its kind of loader, the folder of its files, and how many turns count."""

    make_dataset: Callable[[], Dataset]
    loader: type[DataLoader] = DataLoader
    folder: Path | None = None
    turns: int = sys.maxsize


def make_ways(cases: Sequence[Case], config: Config, folder: Path) -> dict[str, Way]:
    """Make this data set without and with its cache, and MONAI's two with the same transforms."""
    cached = replace(config, cache_dir=str(folder / "ours"))
    uncached = replace(config, cache_dir=None)
    ways = {
        # Every epoch is as slow as the first: one with each number of workers tells all.
        "this, raw": Way(lambda: CaseDataset(cases, uncached), turns=1),
        "this, cached": Way(lambda: CaseDataset(cases, cached), folder=folder / "ours"),
    }
    if peers.monai_installed():
        # Takes seconds to import, and is an optional package.
        from monai.data import CacheDataset, PersistentDataset
        from monai.data import DataLoader as MonaiLoader

        files = [{"image": str(case.scan), "labels": str(case.labels)} for case in cases]
        transform, kept = monai_transforms(config), folder / "monai"
        ways["MONAI CacheDataset"] = Way(lambda: CacheDataset(files, transform, progress=False), MonaiLoader)
        ways["MONAI PersistentDataset"] = Way(lambda: PersistentDataset(files, transform, kept), MonaiLoader, kept)
    return ways


def monai_transforms(config: Config) -> Callable:
    """Make MONAI's transforms that do what CaseDataset does; label maps by nearest neighbour, its usual choice."""
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Resized, ScaleIntensityRanged

    both = ["image", "labels"]
    low, high = config.window_hu
    return Compose(
        [
            LoadImaged(both),
            EnsureChannelFirstd(both),
            Orientationd(both, axcodes="RAS", labels=None),
            ScaleIntensityRanged(["image"], a_min=low, a_max=high, b_min=0, b_max=1, clip=True),
            Resized(both, spatial_size=config.size, mode=("trilinear", "nearest")),
        ]
    )


def set_up(way: Way) -> tuple[Dataset, dict[str, Any]]:
    """Make the data set and run its first epoch in this process; return the time and memory that it took."""
    before, started = resident_mib(), time.perf_counter()
    dataset = way.make_dataset()
    run_epoch(way.loader(dataset, batch_size=1))
    first_ms = (time.perf_counter() - started) * 1000 / len(dataset)
    kept_mib = None if before is None else (resident_mib() - before) / len(dataset)
    files = [path for path in way.folder.rglob("*") if path.is_file()] if way.folder else []
    disk_mib = sum(path.stat().st_size for path in files) / MIB / len(dataset)
    return dataset, {"first_epoch_ms": first_ms, "kept_mib_per_case": kept_mib, "disk_mib_per_case": disk_mib}


def compete(ways: dict[str, Way], cases: int, repeats: int) -> dict[str, Any]:
    """Let the ways take turns, an epoch each with each number of workers; return the numbers of each way."""
    rows, epochs = {}, {}
    for name, way in ways.items():
        dataset, rows[name] = set_up(way)
        for workers in WORKERS:
            loader = way.loader(dataset, batch_size=1, num_workers=workers, persistent_workers=workers > 0)
            epochs[name, workers] = measuring.Contender(name, lambda _, loader=loader: run_epoch(loader), way.turns)
    # Workers start in the turn that does not count. Memory returned to the system would slow the samples.
    measuring.take_turns(list(epochs.values()), repeats, memory=False)
    for name, row in rows.items():
        later = {w: measuring.summarise([1000 * s / cases for s in epochs[name, w].seconds]) for w in WORKERS}
        row["later_epochs_ms"] = {str(workers): ms for workers, ms in later.items()}
        row["samples_per_s"] = {str(workers): 1000 / ms["median"] for workers, ms in later.items()}
    return rows


def run_epoch(loader: DataLoader) -> None:
    """Load every sample once."""
    for batch in loader:
        del batch


def resident_mib() -> float | None:
    """Return the resident memory of this process, what was freed given back first; None where it cannot be told."""
    gc.collect()
    measuring.return_freed_memory()
    try:
        return measuring.resident_gib("VmRSS") * MIB_PER_GIB
    except OSError:
        return None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on a data set's first cases, or on phantoms."""
    config = load_config(flags={"size": list(map(str, arguments.size))} if arguments.size else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.data_dir is None:
            write_phantom(folder / "phantoms", CASES, tuple(arguments.shape), seed=0)
        cases = find_cases(arguments.data_dir or folder / "phantoms")[:CASES]
        return {
            "size": list(config.size),
            "cases": len(cases),
            "repeats": arguments.repeats,
            "contenders": compete(make_ways(cases, config, folder), len(cases), arguments.repeats),
            "notes": peers.monai_notes(),
        }


def main() -> int:
    """Measure, and print."""
    parser = measuring.make_parser(__doc__, repeats=20)
    parser.add_argument("--data-dir", metavar="DIR", help=f"a data set, of which {CASES} cases are used; else phantoms")
    parser.add_argument("--shape", **measuring.THREE, default=SHAPE, help="of the phantoms")
    parser.add_argument("--size", **measuring.THREE, help="default: that of config.yaml")
    return measuring.measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
