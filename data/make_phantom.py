"""Write a made-up abdominal CT data set in FLARE22's layout, to try the whole pipeline without real data.

    python -m data.make_phantom DATA_DIR [--cases N] [--shape X Y Z] [--seed S]

gives DATA_DIR/images/phantom_0001_0000.nii.gz (int16 HU), DATA_DIR/labels/phantom_0001.nii.gz (uint8 ids, same grid),
and so on, and DATA_DIR/phantom.json with the settings. The same command gives the same bytes, and a case does not
depend on how many are made. Body size, fat, field of view, contrast phase, axis order and the organs' place, size
and form change from case to case, so that neither HU nor position alone tells an organ. A network that is good
here has shown that the code works, nothing about patients.

data/phantom.py makes a case of the organs in data/phantom_atlas.py.
"""

import argparse
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from core.scans.organ_names import organ_names_extension
from core.scoring.flare22 import TOLERANCES_MM
from core.system.exits import DONE, USAGE, CtrlC, refusing, run_command
from core.system.files import read_text, user_path, whole_file, write_text
from data.phantom import make_case

VERSION = 1  # raised when the same settings begin to give other voxels, so that an older set is not reused

ORGANS = ("background", *TOLERANCES_MM)  # FLARE22's 13 in the order of their ids, which are those of the phantoms
DEFAULT_CASES = 20
DEFAULT_SHAPE = (144, 128, 80)
MAX_CASES = 9999  # case names have four digits
MIN_SIDE, MAX_SIDE = 16, 512  # voxels; below, organs vanish; above, no network grid here needs it
MAX_VOXELS = 2**25  # 512 x 512 x 128, about 2 GiB of memory while one case is made

# FLARE22's scans come mostly in LPS; the rest are there so that code which trusts one order fails.
AXIS_ORDERS = ("LPS", "RAS", "LAS", "LAI", "RPI", "PIL", "ASR", "SRA", "IPL", "LSA")
LPS_SHARE = 0.5
OBLIQUE_SHARE, MAX_TILT_DEGREES = 0.3, 4.0


def scan_affine(rng: np.random.Generator, shape: tuple, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the affine (4, 4) of a case in RAS+ order, in mm; in some cases the patient lies a little turned."""
    tilt = rng.uniform(-MAX_TILT_DEGREES, MAX_TILT_DEGREES, 3) * (rng.random() < OBLIQUE_SHARE)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = rng.uniform(-60, 60, 3) - affine[:3, :3] @ (np.array(shape) / 2)
    return affine


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray, axis_order: str, organs: Sequence[str] = ()) -> bytes:
    """Return a gzipped NIfTI file of voxels given in RAS+ order and stored in another, with no date in it.

    Its header holds the names of `organs`, by id with the background first, when they are given.
    """
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axis_order)
    )
    image = nib.Nifti1Image(voxels, affine).as_reoriented(turn)
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    if organs:
        image.header.extensions.append(organ_names_extension(organs))
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def write_case(data_dir: Path, seed: int, number: int, shape: tuple) -> None:
    """Make one case and write its two files; labels first, so that a scan is never without them."""
    voxels, labels, spacing_mm = make_case(seed, number, shape)
    # A stream of its own, so that the way of storing does not depend on what was drawn for the anatomy.
    rng = np.random.default_rng((seed, number, 1))
    affine = scan_affine(rng, shape, spacing_mm)
    axis_order = "LPS" if rng.random() < LPS_SHARE else str(rng.choice(AXIS_ORDERS))
    image_path, labels_path = case_paths(data_dir, number)
    for path, array, organs in ((labels_path, labels, ORGANS), (image_path, voxels, ())):
        with whole_file(path) as temporary:
            temporary.write_bytes(nifti_bytes(array, affine, axis_order, organs))


def case_paths(data_dir: Path, number: int) -> tuple[Path, Path]:
    """Return where a case's image and its label map lie."""
    name = f"phantom_{number:04d}"
    return data_dir / "images" / f"{name}_0000.nii.gz", data_dir / "labels" / f"{name}.nii.gz"


def first_foreign_file(data_dir: Path) -> Path | None:
    """Return some path in data_dir that this script does not write, or None."""
    ours = re.compile(r"images|labels|(images/|labels/)?(\.\d+\.)?phantom(_\d{4}(_0000)?\.nii\.gz|\.json)")
    found = (path.relative_to(data_dir) for path in data_dir.rglob("*"))
    return next((path for path in found if not ours.fullmatch(path.as_posix())), None)


def read_record(data_dir: Path) -> dict:
    """Return what phantom.json says; empty when it is not there or not ours."""
    try:
        record = json.loads(read_text(data_dir / "phantom.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(data_dir: Path, record: dict) -> None:
    """Write phantom.json, whole."""
    write_text(data_dir / "phantom.json", json.dumps(record, indent=2) + "\n")


def write_phantom(data_dir: Path, cases: int, shape: tuple[int, int, int], seed: int) -> bool:
    """Write the data set unless the same one is there already.

    phantom.json says from the start what is being made, and at the end that all of it is there; so the same command
    begins an interrupted run again.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: data_dir is a file, or holds something else or phantoms of other settings; nothing is written then.
    """
    settings = {"version": VERSION, "cases": cases, "shape": list(shape), "seed": seed}
    paths = [path for number in range(1, cases + 1) for path in case_paths(data_dir, number)]
    if data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"{data_dir} is a file; give a new or empty folder")
    record = read_record(data_dir)
    if record == {"finished": True, "settings": settings} and all(path.is_file() for path in paths):
        return False
    if foreign := first_foreign_file(data_dir):
        raise ValueError(f"{data_dir} holds {foreign}, which is no phantom; give a new or empty folder")
    if any(data_dir.glob("*/*")) and record.get("settings") != settings:
        found = record.get("settings", "unknown settings")
        raise ValueError(f"{data_dir} holds phantoms made with {found}, not with {settings}; give another folder")
    for folder in ("images", "labels"):
        (data_dir / folder).mkdir(parents=True, exist_ok=True)
    for half_written in data_dir.glob("**/.*.phantom*"):  # by a run that was killed
        half_written.unlink()
    write_record(data_dir, {"finished": False, "settings": settings})
    for number in tqdm(range(1, cases + 1), desc="phantoms", unit="case", disable=None):
        CtrlC.check()
        write_case(data_dir, seed, number, shape)
    write_record(data_dir, {"finished": True, "settings": settings})
    return True


def main() -> int:
    """Write the data set that the command line asks for; return the exit code."""
    args = parse_arguments()
    with refusing(USAGE):
        written = write_phantom(args.data_dir, args.cases, tuple(args.shape), args.seed)
    print(f"{args.data_dir}: {args.cases} phantoms " + ("written" if written else "there already, reused"))
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m data.make_phantom", description=__doc__.partition("\n")[0])
    parser.add_argument("data_dir", type=user_path, metavar="DATA_DIR", help="a new or empty folder")
    parser.add_argument("--cases", type=int, default=DEFAULT_CASES, help="how many (default: %(default)s)")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=DEFAULT_SHAPE,
        metavar=("X", "Y", "Z"),
        help="voxels to the right, front and head; the field of view stays some 370 x 280 x 290 mm, and below about "
        "32 32 24 small organs may vanish (default: 144 128 80)",
    )
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    args = parser.parse_args()
    if not 1 <= args.cases <= MAX_CASES:
        parser.error(f"--cases must be from 1 to {MAX_CASES}, not {args.cases}")
    if min(args.shape) < MIN_SIDE or max(args.shape) > MAX_SIDE or np.prod(args.shape) > MAX_VOXELS:
        parser.error(
            f"--shape needs {MIN_SIDE} to {MAX_SIDE} voxels along each axis and at most {MAX_VOXELS} in all, "
            f"not {' '.join(map(str, args.shape))}"
        )
    if args.seed < 0:
        parser.error(f"--seed must be 0 or more, not {args.seed}")
    return args


if __name__ == "__main__":
    run_command(main)
