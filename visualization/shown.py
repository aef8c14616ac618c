"""A scan and its label maps, read and checked once for every kind of picture, and the flags that all pictures have."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from core.scans.files import case_id
from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import MAX_GIB, Reading
from core.scans.organ_names import check_organ_names
from core.scans.volumes import load_labels, load_scan
from core.scoring.organ_list import choose_organs, load_given
from core.system.exits import REFUSED, USAGE, refusing
from core.system.files import user_path


@dataclass(frozen=True, eq=False)
class Shown:
    """A scan with the label maps to look at.

    Attributes:
        title: the case, as a rule.
        voxels: (X, Y, Z) float32, HU in RAS+ order.
        geometry: of the scan.
        label_maps: (X, Y, Z) uint8 ids on the same grid, by their titles on the page.
        organs: names by id, background first.
        taught: the organs that the network was taught; None: not known.
        box_ends: by organ, the ends of the segmented part of the scan that it touches.
    """

    title: str
    voxels: np.ndarray
    geometry: Geometry
    label_maps: dict[str, np.ndarray]
    organs: Sequence[str]
    taught: Sequence[str] | None = None
    box_ends: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def labels(self) -> np.ndarray:
        """The first label map, the prediction where there are two."""
        return next(iter(self.label_maps.values()))


def read_shown(args: argparse.Namespace) -> tuple[Shown, str | None]:
    """Read the scan and the label maps of a command line; end the command with USAGE or REFUSED where it is wrong.

    Args:
        args: from a parser of `picture_parser`. The organ names are those of --config or --checkpoint, else the label
            maps' own.

    Returns:
        what to look at, and a note for the user when a label map has no organ names.
    """
    with refusing(USAGE):
        given = load_given(args.config, args.checkpoint)
    reading = Reading(args.max_gib, args.assume_ras)
    paths = {"labels": args.labels}
    if args.reference is not None:
        paths = {"prediction": args.labels, "reference": args.reference}
    with refusing(REFUSED):
        organs, note = choose_organs(given, {name: [path] for name, path in paths.items()})
        voxels, geometry = load_scan(args.scan, reading)
        label_maps = read_label_maps(paths, geometry, organs, reading)
    return Shown(title_of(case_id(args.scan)), voxels, geometry, label_maps, organs), note


def title_of(case: str) -> str:
    """Return a case's name as text that can be drawn; file names may hold bytes that are not letters."""
    return case.encode(errors="replace").decode()


def read_label_maps(
    paths: dict[str, Path], geometry: Geometry, organs: Sequence[str], reading: Reading
) -> dict[str, np.ndarray]:
    """Read label maps of a scan, (X, Y, Z) uint8 in RAS+ order, by the same titles.

    Raises:
        OSError, ValueError: when a file cannot be read, is not on the scan's grid, or holds other organs.
    """
    label_maps = {}
    for name, path in paths.items():
        label_maps[name], grid = load_labels(path, len(organs), reading)
        check_same_grid(geometry, grid, path.name)
        check_organ_names(path, organs)
    return label_maps


def in_mm(geometry: Geometry, voxel: Sequence[int]) -> list[float]:
    """Return the place of a voxel of the RAS+ array in the patient, in mm."""
    return (geometry.ras_affine @ [*voxel, 1])[:3].tolist()


# ---- The command line ------------------------------------------------------------------------------------------------


def picture_parser(name: str, about: str, output: str, reference: str) -> argparse.ArgumentParser:
    """Return the parser of a command of this folder, with the flags that all pictures have.

    Args:
        name: of the module.
        about: its docstring.
        output: help of --output.
        reference: help of --reference.
    """
    parser = argparse.ArgumentParser(prog=f"python -m visualization.{name}", description=about.splitlines()[0])
    parser.add_argument("scan", type=user_path, help="CT scan, NIfTI")
    parser.add_argument("labels", type=user_path, help="its label map, NIfTI")
    parser.add_argument("--output", type=user_path, required=True, help=output)
    # --truth is the flag's earlier name.
    parser.add_argument("--reference", "--truth", type=user_path, metavar="LABELS", help=reference)
    text = "settings that name the organs (default: the label map does)"
    parser.add_argument("--config", type=user_path, metavar="FILE", help=text)
    parser.add_argument("--checkpoint", type=user_path, metavar="FILE", help="network whose settings name the organs")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest scan, as float32")
    parser.add_argument("--assume-ras", action="store_true", help="take files without a place in the patient as RAS+")
    return parser


def print_written(output: Path, note: str | None, size: str = "") -> None:
    """Print what was written, and the note on the organ names when there is one."""
    print(f"wrote {output}{size}")
    if note:
        print(note)
