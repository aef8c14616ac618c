"""How fast training samples come: this data set raw and cached, and MONAI's caching data sets beside it.

    python -m benchmarks.data_loading                        # phantoms of 512x512x100 voxels, made first (minutes)
    python -m benchmarks.data_loading --data-dir data/FLARE22Train
    python -m benchmarks.data_loading --json                 # only the line of JSON

A sample is ready when its batch of one is: image and label map on the network's grid, 256x256x128 unless told
otherwise, in memory of their own. The files are in the operating system's page cache, as they are from the second epoch
on. MONAI is left out where it is not installed.
"""

import argparse
import ctypes
import gc
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from torch.utils.data import DataLoader, Dataset

from benchmarks import machine, print_result
from benchmarks.peers import NO_MONAI, monai_installed
from benchmarks.train_step import make_training, summarise, watch_memory
from core.config import Config, load_config
from core.network import build_network
from core.scans.resample import resize_labels
from core.scans.volumes import load_labels, load_scan, prepare_image, save_label_map
from core.system.exits import DONE, USAGE, refusing, run_command
from core.training.step import training_step
from data.make_phantom import write_phantom
from dataset import Case, CaseDataset, find_cases

SHAPE = (512, 512, 100)  # voxels of the phantoms, a usual abdominal scan
CASES = 3
WORKERS = (0, 1, 2)
GROWTH_CASES = (10, 50, 200)  # data sets of these many cases show whether memory or time a sample grows
GROWTH_SIZE = (64, 64, 48)  # small, so that it takes seconds: 0.4 MiB a case, if it were kept
STAGE_REPEATS = 7  # at the most
COPY_REPEATS = 15
MIB = 2**20
STATUS = Path("/proc/self/status")  # Linux only
# What `make demo` trains, whose step a CPU can do often enough to be timed beside its data.
DEMO = {
    **{"size": ["64", "64", "48"], "channels": "8", "loss": "dice_cross_entropy"},
    **{"down_convs": ["1"] * 5, "up_convs": ["1"] * 4},
}


@dataclass
class Contender:
    """A way to get samples, and what was measured of it.

    Attributes:
        name: in the table.
        make_dataset: sets it up.
        loader: the kind of DataLoader that goes with it.
        folder: where it keeps what it has prepared; None for nowhere.
        turns: epochs that it takes part in at the most.
        first_ms: milliseconds a sample until the first epoch was over, setting up included.
        kept_mib: memory a case that is still held then; None where it cannot be told.
        loaders: one for each number of workers.
        later_ms: milliseconds a sample of the further epochs, by number of workers.
    """

    name: str
    make_dataset: Callable[[], Dataset]
    loader: type[DataLoader]
    folder: Path | None = None
    turns: int = sys.maxsize
    first_ms: float = math.nan
    kept_mib: float | None = None
    loaders: dict[int, DataLoader] = field(default_factory=dict)
    later_ms: dict[int, list[float]] = field(default_factory=lambda: {workers: [] for workers in WORKERS})


def set_up(contender: Contender) -> None:
    """Make the data set, run the first epoch in this process, and start the workers."""
    before = resident_mib()
    started = time.perf_counter()
    dataset = contender.make_dataset()
    contender.first_ms = (time.perf_counter() - started) * 1000 / len(dataset)
    contender.first_ms += epoch_ms(contender.loader(dataset, batch_size=1))
    if before is not None:
        contender.kept_mib = (resident_mib() - before) / len(dataset)
    for workers in WORKERS:
        contender.loaders[workers] = contender.loader(
            dataset, batch_size=1, num_workers=workers, persistent_workers=workers > 0
        )
        epoch_ms(contender.loaders[workers])  # workers start in an epoch that does not count


def summarise_contender(contender: Contender) -> dict[str, Any]:
    """Return a contender's numbers."""
    files = [path for path in contender.folder.rglob("*") if path.is_file()] if contender.folder else []
    later = {str(workers): summarise(ms) for workers, ms in contender.later_ms.items()}
    return {
        "first_epoch_ms": contender.first_ms,
        "later_epochs_ms": later,
        "samples_per_s": {workers: 1000 / ms["median"] for workers, ms in later.items()},
        "kept_mib_per_case": contender.kept_mib,
        "disk_mib_per_case": sum(path.stat().st_size for path in files) / MIB / len(contender.loaders[0]),
    }


def epoch_ms(loader: DataLoader) -> float:
    """Milliseconds a sample of one epoch over a loader."""
    started = time.perf_counter()
    for batch in loader:
        del batch
    return (time.perf_counter() - started) * 1000 / len(loader)


def resident_mib() -> float | None:
    """Resident memory of this process in MiB, what was freed given back first; None where it cannot be told."""
    if not STATUS.is_file():
        return None
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))


def make_contenders(cases: Sequence[Case], config: Config, folder: Path) -> list[Contender]:
    """Make this data set without and with its cache, and MONAI's two with the same transforms."""
    cached = replace(config, cache_dir=str(folder / "ours"))
    uncached = replace(config, cache_dir=None)
    contenders = [
        # Every epoch is as slow as the first: one with each number of workers tells all.
        Contender("this, raw", lambda: CaseDataset(cases, uncached), DataLoader, turns=1),
        Contender("this, cached", lambda: CaseDataset(cases, cached), DataLoader, folder / "ours"),
    ]
    if monai_installed():
        # Takes seconds to import, and is an optional package.
        from monai.data import CacheDataset, PersistentDataset
        from monai.data import DataLoader as MonaiLoader

        files = [{"image": str(case.scan), "labels": str(case.labels)} for case in cases]
        transform = monai_transforms(config)
        kept = folder / "monai"
        contenders += [
            Contender("MONAI CacheDataset", lambda: CacheDataset(files, transform, progress=False), MonaiLoader),
            Contender("MONAI PersistentDataset", lambda: PersistentDataset(files, transform, kept), MonaiLoader, kept),
        ]
    return contenders


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


def measure_stages(case: Case, config: Config, folder: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of each stage of a raw sample and of writing a label map, and memory that reading a scan takes."""
    voxels, geometry = load_scan(case.scan)
    labels, _ = load_labels(case.labels)
    read_rise_gib = watch_memory(torch.device("cpu"))
    load_scan(case.scan)
    rise_gib = read_rise_gib()
    written = folder / "labels.nii.gz"
    stages = {
        "gunzip alone": lambda: igzip.open(case.scan).read(),
        "load_scan": lambda: load_scan(case.scan),
        "nibabel's get_fdata": lambda: nib.as_closest_canonical(nib.load(case.scan)).get_fdata(dtype=np.float32),
        "load_labels": lambda: load_labels(case.labels),
        "prepare_image": lambda: prepare_image(voxels, config.size, config.window_hu),
        "resize_labels": lambda: resize_labels(labels, config.size),
        "save_label_map": lambda: save_label_map(labels, geometry, written),
    }
    ms: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(1 + repeats):
        for name, stage in stages.items():
            started = time.perf_counter()
            stage()
            ms[name].append((time.perf_counter() - started) * 1000)
    return {
        "shape": list(geometry.shape),
        "scan_mib": voxels.nbytes / MIB,
        "load_scan_rise_mib": rise_gib and rise_gib * 1024,
        "scan_file_mib": case.scan.stat().st_size / MIB,
        "labels_file_mib": written.stat().st_size / MIB,
        "ms": {name: summarise(taken[1:]) for name, taken in ms.items()},
    }


def measure_growth(case: Case, config: Config, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds a cached sample and memory gained in an epoch, for data sets of more and more cases (copies)."""
    config = replace(config, size=GROWTH_SIZE, cache_dir=str(folder / "growth"))
    copies = []
    for number in range(max(GROWTH_CASES)):
        copy = Case(f"case_{number}", *(folder / f"{number}_{path.name}" for path in (case.scan, case.labels)))
        shutil.copy(case.scan, copy.scan)
        shutil.copy(case.labels, copy.labels)
        copies.append(copy)
    epoch_ms(DataLoader(CaseDataset(copies, config)))  # fills the cache
    rows = []
    for count in GROWTH_CASES:
        before = resident_mib()
        loader = DataLoader(CaseDataset(copies[:count], config))
        ms = [epoch_ms(loader) for _ in range(3)]
        gained = None if before is None else resident_mib() - before
        rows.append({"cases": count, "later_epochs_ms": summarise(ms), "gained_mib": gained})
    return rows


def measure_demo(case: Case, folder: Path) -> dict[str, Any]:
    """Time the demo's step on this machine's CPU, and its samples from the cache."""
    config = replace(load_config(flags=DEMO), cache_dir=str(folder / "demo"), device="cpu")
    loader = DataLoader(CaseDataset([case], config))
    epoch_ms(loader)
    torch.manual_seed(config.seed)
    training = make_training(build_network(config), torch.device("cpu"))
    batch = next(iter(loader))
    image = batch["image"].float() / 255
    step_ms = []
    for _ in range(4):
        started = time.perf_counter()
        training_step(training, image, batch["labels"])
        step_ms.append((time.perf_counter() - started) * 1000)
    ms = [epoch_ms(loader) for _ in range(10)]
    return {"size": list(config.size), "step_ms": summarise(step_ms[1:]), "sample_ms": summarise(ms)}


def copy_gib_per_s() -> float:
    """Return the rate at which memory is copied, the limit of what comes from a cache."""
    source = np.ones(64 * MIB, dtype=np.uint8)
    target = np.empty_like(source)
    seconds = []
    for _ in range(COPY_REPEATS):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return source.nbytes / 2**30 / statistics.median(seconds[1:])


def measure(cases: Sequence[Case], config: Config, repeats: int) -> dict[str, Any]:
    """Let the contenders take turns, an epoch each."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(cases, config, Path(folder))
        for contender in contenders:
            set_up(contender)
        for turn in range(repeats):
            for contender in contenders:
                if turn >= contender.turns:
                    continue
                for workers, loader in contender.loaders.items():
                    contender.later_ms[workers].append(epoch_ms(loader))
        rows = {contender.name: summarise_contender(contender) for contender in contenders}
        del contenders  # ends the workers, and frees what they keep
        stages = measure_stages(cases[0], config, Path(folder), min(repeats, STAGE_REPEATS))
        small = make_small_case(Path(folder))
        growth = measure_growth(small, config, Path(folder))
        demo = measure_demo(small, Path(folder))
    return {
        "size": list(config.size),
        "cases": len(cases),
        "repeats": repeats,
        "contenders": rows,
        "stages": stages,
        "growth": growth,
        "demo": demo,
        "copy_gib_per_s": copy_gib_per_s(),
        "notes": [] if monai_installed() else [NO_MONAI],
        "machine": machine(),
    }


def make_small_case(folder: Path) -> Case:
    """Write a small phantom."""
    write_phantom(folder / "small", cases=1, shape=GROWTH_SIZE, seed=0)
    return find_cases(folder / "small")[0]


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables."""
    size = " x ".join(map(str, result["size"]))
    titles = ["first epoch", *(f"{workers} workers" for workers in WORKERS), "min", "max", "kept MiB", "disk MiB"]
    lines = [f"milliseconds a sample of {size}, {result['cases']} cases, n = {result['repeats']} later epochs"]
    lines += [f"{'':<26}" + "".join(f"{title:>12}" for title in titles)]
    for name, row in result["contenders"].items():
        later = row["later_epochs_ms"]
        numbers = [row["first_epoch_ms"], *(later[str(workers)]["median"] for workers in WORKERS)]
        numbers += [later["0"]["min"], later["0"]["max"], row["kept_mib_per_case"], row["disk_mib_per_case"]]
        lines.append(f"{name:<26}" + "".join(f"{'-':>12}" if n is None else f"{n:>12.1f}" for n in numbers))
    lines.append("min and max: of the epochs without workers; kept and disk: memory and files, a case")
    stages = result["stages"]
    rise = "-" if stages["load_scan_rise_mib"] is None else f"{stages['load_scan_rise_mib']:.0f}"
    lines.append(f"stages at {' x '.join(map(str, stages['shape']))}, median ms (min to max):")
    for name, ms in stages["ms"].items():
        lines.append(f"  {name:<24}{ms['median']:>8.0f} ({ms['min']:.0f} to {ms['max']:.0f})")
    lines.append(f"  a scan of {stages['scan_mib']:.0f} MiB as float32 is read with {rise} MiB of memory")
    for row in result["growth"]:
        gained = "-" if row["gained_mib"] is None else f"{row['gained_mib']:.1f}"
        ms = row["later_epochs_ms"]["median"]
        lines.append(
            f"{row['cases']} small cached cases: {ms:.2f} ms a sample, {gained} MiB more memory after 3 epochs"
        )
    step_ms, sample_ms = (result["demo"][key]["median"] for key in ("step_ms", "sample_ms"))
    lines.append(f"the demo's step on the CPU: {step_ms:.0f} ms, its sample from the cache: {sample_ms:.2f} ms")
    lines.append(f"copying memory: {result['copy_gib_per_s']:.1f} GiB/s")
    return [*lines, *result["notes"]]


def main() -> int:
    """Measure, and print."""
    arguments = parse_arguments()
    with refusing(USAGE):
        if arguments.repeats < 1:
            raise ValueError(f"--repeats: got {arguments.repeats}, expected 1 or more")
        config = load_config(flags={"size": list(map(str, arguments.size))} if arguments.size else {})
    with tempfile.TemporaryDirectory() as folder:
        with refusing(USAGE):
            if arguments.data_dir is None:
                write_phantom(Path(folder), CASES, tuple(arguments.shape), seed=0)
            cases = find_cases(arguments.data_dir or folder)[:CASES]
        result = measure(cases, config, arguments.repeats)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time training samples, MONAI's caching data sets beside them.")
    parser.add_argument("--data-dir", metavar="DIR", help=f"a data set, of which {CASES} cases are used; else phantoms")
    parser.add_argument("--shape", nargs=3, type=int, default=SHAPE, metavar=("X", "Y", "Z"), help="of the phantoms")
    parser.add_argument("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="default: that of config.yaml")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="epochs that count (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
