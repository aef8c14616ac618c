"""Data loaders: a reproducible batch order per epoch, split over processes."""

import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from core.config import Config
from core.scans.anatomy import odd_organs
from core.scans.annotated import ANNOTATED, warn_of_unknown_names
from core.scans.files import listed
from core.scans.organ_names import check_organ_names
from core.scans.typical import ranges_of
from core.system.exits import CtrlC, leave_signals_to_the_command, print_warning
from core.system.processes import ALONE, Group

SEEN = ("image", "labels", "extent_mm", "annotated", "weight")  # what training sees of a sample
DIGITS = 8  # of a checksum
MIN_BOX = 0.5  # share of the usual length of the organs' box, below which a case is warned of
SHARED_MEMORY = Path("/dev/shm")  # through which worker processes hand over samples, on Linux


class EpochBatches(Sampler):
    """The batches of an epoch, as lists of indices: an order that depends on (seed, epoch) alone.

    Each case labelled by people comes once in an epoch. Of the cases labelled by a network, some are drawn without
    replacement, by chances in proportion to their weights. A step's batch is split over `processes`, `batch_size` cases
    each. When the last batch has no case left for a process, it gets a case of weight 0, since all processes must take
    part in every step.

    Args:
        weights: of the cases; None where people have made the labels.
        batch_size: cases of each process in a step.
        seed: of the order.
        rank: number of this process.
        processes: how many there are.
        made_per_labelled: cases with a weight in an epoch, for each without.

    Attributes:
        epoch: its number; set before each epoch.
        start: number of the first step; above 0 for an epoch that was interrupted.
    """

    def __init__(
        self,
        weights: Sequence[float | None],
        batch_size: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        made_per_labelled: float = 1.0,
    ):
        self.labelled = [i for i, weight in enumerate(weights) if weight is None]
        self.made = [i for i, weight in enumerate(weights) if weight is not None]
        self.chances = np.array([weights[i] for i in self.made], dtype=np.float64)
        self.drawn = min(len(self.made), round(made_per_labelled * len(self.labelled)))
        self.length = len(self.labelled) + self.drawn  # cases of an epoch
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.cases_per_step = batch_size * processes
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return math.ceil(self.length / self.cases_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for step in range(self.start, len(self)):
            yield [order[position] for position in self.positions(step)] or order[:1]

    def order(self) -> list[int]:
        """Return the cases of the epoch in their order."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.made:
            return rng.permutation(self.length).tolist()
        drawn = rng.choice(self.made, self.drawn, replace=False, p=self.chances / self.chances.sum())
        return rng.permutation([*self.labelled, *drawn]).tolist()

    def positions(self, step: int) -> range:
        """Return this process's positions in the epoch's order in that step; none where no case is left for it."""
        first = min(step * self.cases_per_step + self.rank * self.batch_size, self.length)
        last = min(first + self.batch_size, (step + 1) * self.cases_per_step, self.length)
        return range(first, last)

    def weight(self, step: int) -> float:
        """Return this process's share of the step's cases, 0 to 1."""
        return len(self.positions(step)) / min(self.cases_per_step, self.length - step * self.cases_per_step)


def make_loader(
    dataset: Dataset, config: Config, workers: int, device: torch.device, group: Group, train: bool
) -> DataLoader:
    """Return the loader of this process's share: shuffled batches for training, single cases for validation.

    `dataset` is a CaseDataset.
    """
    if train:
        processes = group.rank, group.size
        batches = EpochBatches(dataset.weights, config.batch_size, config.seed, *processes, config.made_per_labelled)
        order = {"batch_sampler": batches}
    else:
        order = {"sampler": range(group.rank, len(dataset), group.size)}
    return DataLoader(
        dataset,
        **order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_the_command,
    )


def workers_that_fit(config: Config) -> int:
    """Return the number of loading processes: as the settings say, or none where shared memory is too small."""
    if not (config.workers and SHARED_MEMORY.is_dir()):
        return config.workers
    # Each may have two batches ready beside the one that is in use; a sample is image and labels.
    needed = (2 * config.workers + 1) * config.batch_size * 2 * math.prod(config.size)
    status = os.statvfs(SHARED_MEMORY)
    if status.f_bavail * status.f_frsize >= needed:
        return config.workers
    print_warning(
        f"{SHARED_MEMORY}: too small for --workers {config.workers}, which need {needed / 2**20:.0f} MiB there (docker "
        "run takes --shm-size); cases are loaded between the steps"
    )
    return 0


@contextmanager
def naming_dead_workers() -> Iterator[None]:
    """Replace torch's long message by one sentence when a process that loads cases has died.

    Raises:
        MemoryError: in that case, as the most likely reason.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise MemoryError(
            "a process that loads cases was killed, most likely because memory ran out; go on with --resume and fewer "
            "--workers"
        ) from error


class CaseFacts(NamedTuple):
    """Facts of a set of cases: ranges of extent and HU, the organs that occur, and each case's checksums."""

    ranges: dict
    fingerprints: dict[str, str]


def describe_cases(dataset: Dataset, workers: int, group: Group = ALONE, train: bool = False) -> CaseFacts:
    """Read every case once, which fills the cache and shows broken files; warn where the organs look mixed up.

    Each process reads its share of the cases. Warnings about a case's files are given here, and not again.

    Args:
        dataset: a CaseDataset.
        workers: processes that load cases.
        group: the processes of the run.
        train: True for the training cases: print and check how many of them annotate each organ.

    Raises:
        FileNotFoundError, ValueError: when a file cannot be read, or a label map names other organs than the settings.
    """
    found = {"extent_mm": [], "hu_percentiles": [], "volumes_ml": []}  # of each case a row of numbers
    fingerprints, counts, ignored = [], [], []
    share = range(group.rank, len(dataset), group.size)
    for index in share:
        check_organ_names(dataset.cases[index].labels, dataset.organs)
    loader = DataLoader(dataset, sampler=share, num_workers=workers, worker_init_fn=leave_signals_to_the_command)
    for sample in tqdm(loader, desc="preparing cases", disable=None if group.first else True):
        CtrlC.check()
        for name, values in found.items():
            values += sample[name].tolist()
        counts += map(annotated_and_present, sample["annotated"], sample["labels"], sample["volumes_ml"])
        left_out = (sample["volumes_ml"] > 0) & ~sample["annotated"]
        ignored += [dataset.organs[organ] for organ in left_out.nonzero()[:, 1].tolist()]
        fingerprints += zip(sample["case"], map(fingerprint, *(sample[name] for name in SEEN)), strict=True)
        warn_of_swapped(sample["case"], sample["swapped"])
    dataset.warn_no_more()
    found = {name: list(chain(*group.gather(values))) for name, values in found.items()}
    volumes = [dict(zip(dataset.organs, row, strict=True)) for row in found.pop("volumes_ml")]
    odd = odd_organs([{organ: ml for organ, ml in case.items() if ml} for case in volumes])
    if odd and group.first:
        print_warning(odd)
    counts, fingerprints, ignored = (list(chain(*group.gather(each))) for each in (counts, fingerprints, ignored))
    if train and group.first:
        warn_of_annotated(dataset, ignored)
        folders = {case.id: case.scan.parent.parent for case in dataset.cases}
        say_what_teaches(counts, dataset.organs, [folders[case] for case, _ in fingerprints])
        if dataset.crop == "organs":
            warn_of_small_boxes([case for case, _ in fingerprints], found["extent_mm"], counts)
    taught = [organ for i, organ in enumerate(dataset.organs) if i and any(present[i] for _, present in counts)]
    return CaseFacts(ranges_of(found) | {"organs": taught}, dict(fingerprints))


def warn_of_swapped(cases: Sequence[str], swapped: Sequence[str]) -> None:
    """Warn of cases whose organs lie on the wrong sides; `swapped` says of each which, or is empty."""
    for case, organs in zip(cases, swapped, strict=True):
        if organs:
            print_warning(f"case {case}: {organs}; mirrored, or ids mixed up? python -m data.doctor tells more")


def annotated_and_present(annotated: torch.Tensor, labels: torch.Tensor, ml: torch.Tensor) -> np.ndarray:
    """Return (2, K) bool: the classes that a case annotates, and those of them that it holds."""
    # The network's grid may have lost a small organ, and volumes are unknown of organs that the scan cuts.
    on_grid = np.bincount(labels.numpy().ravel(), minlength=len(annotated)) > 0
    return np.stack([annotated.numpy(), annotated.numpy() & (on_grid | (ml.numpy() > 0))])


def warn_of_annotated(dataset: Dataset, ignored: Sequence[str]) -> None:
    """Warn of names in annotated.csv that no organ has, and of organs of label maps that it leaves out, `ignored`."""
    warn_of_unknown_names((case.annotated for case in dataset.cases), dataset.organs)
    if ignored:
        by_organ = ", ".join(f"{organ} in {n}" for organ, n in Counter(ignored).items())
        print_warning(f"{ANNOTATED} leaves out organs that label maps hold ({by_organ} cases); they count as unknown")


def say_what_teaches(counts: list[np.ndarray], organs: Sequence[str], folders: Sequence[Path]) -> None:
    """Say in how many cases each organ is annotated; warn of organs that are annotated but found in no case.

    `folders` are the data sets of the cases: an organ that one of them never holds may not be annotated there.
    """
    annotated = np.sum(counts, axis=0)[0, 1:]
    if (annotated < len(counts)).any():
        by_organ = (f"{organ} {n}" for organ, n in zip(organs[1:], annotated, strict=True))
        print(f"{ANNOTATED}: of {len(counts)} cases to train on, so many annotate {', '.join(by_organ)}", flush=True)
    for folder in dict.fromkeys(folders):
        own = [count for count, place in zip(counts, folders, strict=True) if place == folder]
        annotated, present = np.sum(own, axis=0)[:, 1:]
        absent = [organ for organ, n, found in zip(organs[1:], annotated, present, strict=True) if n and not found]
        if absent:
            where = "" if len(own) == len(counts) else f" of {folder}"
            print_warning(
                f"in none of the {len(own)} cases to train on{where}: {listed(absent)}; if one is there but not "
                f"annotated, say so in {ANNOTATED} (docs/data.md)"
            )


def warn_of_held_out(to_train: CaseFacts, held_out: CaseFacts) -> None:
    """Warn of scans that are trained on and held out under two ids, and where no held-out case holds an organ."""
    twins = {mark[:DIGITS]: case for case, mark in to_train.fingerprints.items()}
    held_out_scans = {case: mark[:DIGITS] for case, mark in held_out.fingerprints.items()}
    same = [f"{twins[scan]} and {case}" for case, scan in held_out_scans.items() if scan in twins]
    if same:
        print_warning(f"the same scans are trained on and held out, under two ids: {listed(same)}; remove one")
    if held_out.fingerprints and not held_out.ranges["organs"]:
        print_warning("no held-out case holds an organ that it annotates: their Dice says nothing, nor does best.pt")


def warn_of_small_boxes(cases: Sequence[str], extents_mm: Sequence, counts: Sequence[np.ndarray]) -> None:
    """Warn of cases whose organs' box is much shorter than where more organs are annotated.

    Args:
        cases: their ids.
        extents_mm: (N, 3), of the boxes.
        counts: of each case, as `annotated_and_present` gives them.
    """
    annotated = np.array([count[0].sum() for count in counts])
    extents = np.array(extents_mm)
    usual = np.median(extents[annotated == annotated.max()], axis=0)
    short = (extents < MIN_BOX * usual).any(axis=1) & (annotated < annotated.max())
    if short.any():
        names = [case for case, is_short in zip(cases, short, strict=True) if is_short]
        print_warning(
            f"crop: organs: {listed(names)}: the box of the organs that are annotated is less than {MIN_BOX:.0%} as "
            "long as where more are; the network sees these cases enlarged; leave them out, or take crop: body"
        )


def fingerprint(*tensors: torch.Tensor) -> str:
    """Return a checksum of the first tensor and one of all, each of DIGITS in hexadecimal."""
    values = list(accumulate(tensors, lambda value, tensor: zlib.crc32(tensor.numpy(), value), initial=0))
    return f"{values[1]:0{DIGITS}x}{values[-1]:0{DIGITS}x}"
