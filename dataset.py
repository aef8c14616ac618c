"""Find the cases of a data set; `CaseDataset` resizes them, caches them and returns them as samples.

    find_cases -> core.training.splitting -> CaseDataset[i] -> core.training.batches -> core.training.augment

Layout of a data set (FLARE22's own): `images/CASE_0000.nii.gz` and `labels/CASE.nii.gz`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from core.config import Config
from core.scans.anatomy import comparable_ml, organs_in, swapped_sides
from core.scans.annotated import annotated_classes, check_both_sides, read_annotated
from core.scans.cache import code_checksum, read_cache, write_cache
from core.scans.crop import crop_box, extent_of
from core.scans.files import check_partners, find_files
from core.scans.geometry import check_same_grid
from core.scans.nifti import Reading
from core.scans.not_found import found_below, found_instead
from core.scans.resample import resize_labels
from core.scans.typical import hu_percentiles
from core.scans.volumes import DEFAULT_READING, load_labels, load_scan, prepare_image, read_geometry
from core.scans.weights import read_weights

NUMBERS = ("extent_mm", "hu_percentiles", "volumes_ml")  # facts of a case that a sample holds as float32
# The modules that prepare a sample; an edit of one of them invalidates the cache.
READING = ("volumes", "nifti", "placement", "geometry", "resample", "crop", "anatomy", "typical")
PREPARED_BY = (__name__, *(f"core.scans.{name}" for name in READING))


@dataclass(frozen=True)
class Case:
    """A scan and its label map, with the id that both files' names share."""

    id: str
    scan: Path
    labels: Path
    annotated: tuple[str, ...] | None = None  # the organs that the label map annotates, by annotated.csv; None: all
    weight: float | None = None  # of labels that a network has made, by weights.csv; None: people have made them


# ---- Finding ---------------------------------------------------------------------------------------------------------


def find_data(data_dir: str | Path) -> Path:
    """Find the folder of `images` and `labels`: `data_dir`, or one or two folders FLARE22Train below it.

    Raises:
        FileNotFoundError: when there is none.
    """
    folder = Path(data_dir)
    while not (folder / "images").is_dir() and (folder / "FLARE22Train").is_dir():
        folder = folder / "FLARE22Train"
    if not ((folder / "images").is_dir() and (folder / "labels").is_dir()):
        raise FileNotFoundError(
            f"{data_dir}: is no data set, expected a folder with images/CASE_0000.nii.gz and labels/CASE.nii.gz "
            f"(data/README.md says where to get one){found_below(folder)}"
        )
    return folder


def find_cases(data_dir: str | Path, reading: Reading = DEFAULT_READING) -> list[Case]:
    """Find the labelled cases of a data set, ordered by id.

    Reads FLARE22's layout, also under one or two folders FLARE22Train, and label maps in folders of their own name
    (`labels/X.nii/X.nii`), as some mirrors unpack. Only headers are read.

    Raises:
        FileNotFoundError: when the folder or its images and labels are missing.
        ValueError: naming the cases without a partner, given twice, or whose scan and label map differ in grid.
    """
    folder = find_data(data_dir)
    scans = find_files(folder / "images")
    labels = find_files(folder / "labels", scans)
    if not scans:
        raise FileNotFoundError(f"{folder}: no scans in images (.nii.gz or .nii){found_instead(folder / 'images')}")
    check_partners(folder, scans, labels)
    annotated, weights = read_annotated(folder, scans), read_weights(folder, scans)
    cases = [Case(case, scans[case], labels[case], annotated.get(case), weights.get(case)) for case in sorted(scans)]
    for case in cases:
        scan, labels = (read_geometry(path, reading) for path in (case.scan, case.labels))
        check_same_grid(scan, labels, f"case {case.id}")
    return cases


def find_cases_of_all(data_dirs: Sequence[Path], reading: Reading = DEFAULT_READING) -> list[Case]:
    """Find the labelled cases of several data sets, ordered by id; errors as `find_cases`, and for an id in two."""
    found: dict[str, tuple[Path, Case]] = {}
    for folder in data_dirs:
        for case in find_cases(folder, reading):
            other, _ = found.setdefault(case.id, (folder, case))
            if other != folder:
                raise ValueError(f"case {case.id}: is in {other} and in {folder}, expected in one; rename it")
    return [case for _, (_, case) in sorted(found.items())]


# ---- Samples ---------------------------------------------------------------------------------------------------------


def reading_of(config: Config) -> Reading:
    """Return the options for reading files from the settings."""
    return Reading(config.max_gib, config.assume_ras, config.replace_nonfinite)


class CaseDataset(Dataset):
    """Labelled cases on the network's grid, kept on disk as bytes once they have been resized.

    A sample is a dict, the same to the bit with and without the cache:

        case            the id
        image           (1, X, Y, Z) uint8, 0..255 across the HU window
        labels          (X, Y, Z) uint8, 0 for organs that the case does not annotate
        annotated       (K,) bool, the classes that the case annotates
        weight          float32, 1 where people have made the labels
        extent_mm       (3,) float32, the size of what the grid covers
        hu_percentiles  (3,) float32, of the scan's body
        volumes_ml      (K,) float32 by id, 0 where unknown
        swapped         in words, pairs of right and left organs on each other's side

    Args:
        cases: with label maps.
        config: size, window_hu, crop, organs, cache_dir and the options for reading files are used.
    """

    def __init__(self, cases: Sequence[Case], config: Config):
        self.cases = list(cases)
        self.size = config.size
        self.window_hu = config.window_hu
        self.crop = config.crop
        self.organs = config.organs
        self.reading = reading_of(config)
        self.annotated = [annotated_classes(case.annotated, self.organs) for case in self.cases]
        if config.augment and config.augment_flip:
            check_both_sides(self.ids, self.annotated, self.organs)
        self.cache_dir = None if config.cache_dir is None else Path(config.cache_dir)

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def weights(self) -> list[float | None]:
        """The weights of the cases, in their order; None where people have made the labels."""
        return [case.weight for case in self.cases]

    def never_annotated(self, known: Sequence[str] = ()) -> torch.Tensor:
        """Return (K,) bool, the classes that no case annotates and that are not among the `known` organs."""
        return torch.from_numpy(~(np.any(self.annotated, axis=0) | annotated_classes(known, self.organs)))

    @property
    def ids(self) -> list[str]:
        """The ids of the cases, in their order."""
        return [case.id for case in self.cases]

    def warn_no_more(self) -> None:
        """Read without warnings from here on; each file's warnings came when it was first read."""
        self.reading = replace(self.reading, warn=say_nothing)

    def __getitem__(self, index: int) -> dict:
        case = self.cases[index]
        volumes, facts = self.load(case)
        image, labels = torch.from_numpy(volumes)
        annotated = torch.from_numpy(self.annotated[index])
        if not annotated.all():
            labels = labels * annotated[labels.long()]
        numbers = {name: torch.tensor(facts[name], dtype=torch.float32) for name in NUMBERS}
        numbers["weight"] = torch.tensor(1.0 if case.weight is None else case.weight)
        words = {"case": case.id, "swapped": facts["swapped"]}
        return {"image": image[None], "labels": labels, "annotated": annotated, **words, **numbers}

    def load(self, case: Case) -> tuple[np.ndarray, dict]:
        """Load a case's image and labels, (2, X, Y, Z) uint8, and facts of its scan; from the cache where possible."""
        if self.cache_dir is None:
            return self.prepare(case)
        path = self.cache_dir / f"{case.id}-{self.key(case)}.cache"
        cached = read_cache(path, self.size)
        if cached is None:
            cached = self.prepare(case)
            write_cache(path, *cached)
        return cached

    def prepare(self, case: Case) -> tuple[np.ndarray, dict]:
        """Read and resize a case.

        Raises:
            FileNotFoundError, ValueError: when its files cannot be read or do not fit together.
        """
        voxels, geometry = load_scan(case.scan, self.reading)
        labels, labels_geometry = load_labels(case.labels, len(self.organs), self.reading)
        check_same_grid(geometry, labels_geometry, f"case {case.id}")
        box = crop_box(self.crop, voxels, labels)
        found = organs_in(labels, geometry, self.organs)
        ml = comparable_ml(found)
        facts = {
            "extent_mm": list(extent_of(box, geometry)),
            "hu_percentiles": hu_percentiles(voxels),
            "volumes_ml": [ml.get(organ, 0.0) for organ in self.organs],
            "swapped": ", ".join(f"{right} to the left of {left}" for right, left in swapped_sides(found)),
        }
        image, labels = prepare_image(voxels[box], self.size, self.window_hu), resize_labels(labels[box], self.size)
        return np.stack([image, labels]), facts

    def key(self, case: Case) -> str:
        """Return a hash of everything that a cached sample depends on."""
        # ctime too, because some tools keep size and modification time.
        stats = [(p.resolve(), p.stat()) for p in (case.scan, case.labels)]
        files = [(str(p), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for p, stat in stats]
        accepted = [self.reading.assume_ras, self.reading.replace_nonfinite]
        settings = [code_checksum(PREPARED_BY), self.size, self.window_hu, self.crop, self.organs, *accepted]
        return hashlib.sha256(json.dumps([files, settings]).encode()).hexdigest()[:16]


def say_nothing(_message: str) -> None:
    """Ignore a warning. A lambda could not be sent to the processes that load cases."""
