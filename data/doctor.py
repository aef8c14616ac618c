"""Is this data set fit to train on? Every file is read to its end, and every case compared with anatomy and the others.

    python -m data.doctor DATA_DIR [--output DIR]

DATA_DIR holds images/ and labels/, or is the folder of one DICOM series. Scans in images/ may be such folders too.
Prints a table and, for each finding, what to do; writes doctor.json and doctor.png (a slice of every case, with the
contours of its organs) into the output folder, by default DATA_DIR/doctor. Exit code 0: no error, 1: an error, 2: wrong
usage.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config import DEFAULT_CONFIG, check, load_organs
from core.scans.anatomy import misplaced, odd_volumes, organs_in, plausible_ml, swapped_sides
from core.scans.annotated import read_annotated
from core.scans.dicom_folders import is_series_folder
from core.scans.dicom_series import load_series
from core.scans.files import list_files
from core.scans.geometry import Geometry, check_same_grid
from core.scans.nifti import MAX_GIB, Reading
from core.scans.resample import resize_image
from core.scans.typical import hu_percentiles
from core.scans.volumes import load_labels, load_scan, window_hu
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.system.files import whole_file
from core.system.parallel import MOST_WORKERS, cores, in_processes
from dataset import find_data

REPORT, SHEET = "doctor.json", "doctor.png"  # in the output folder
LEAST_CASES = 5  # from which on one can be far off the rest
FAR_OFF = 6.0  # robust standard deviations
LEAST_SPREAD = {"spacing_mm": 0.1, "extent_mm": 0.1, "hu": 20.0}  # of a factor e, and in HU: less is no difference
MAD_TO_SD = 1.4826  # of a normal distribution
# What copies that were resampled, turned into other types or denoised are told by: the scan in this window on so few
# voxels, and their correlation. Copies gave 0.998 and more, other patients 0.89 at most (RESULTS.md).
COARSE_SIZE, COARSE_WINDOW_HU, ALIKE = (32, 32, 24), (-160.0, 240.0), 0.97
SHEET_VOXELS = 256  # of a slice on the sheet, along its longer side
WHAT_TO_DO = {
    "no_partner": "add the missing file, or take the other one out",
    "two_files": "keep one",
    "dicom": "write it as NIfTI, which train.py reads",
    "unreadable": "copy or download the file again",
    "bad_labels": "make it a map of the organ list's ids, or give the --config that lists its organs",
    "grid_mismatch": "resample the label map to its scan's grid, or pair the right files",
    "mirrored": "mirror the affine of the one that is not as its source has it",
    "misplaced": "look whether the label map belongs to this scan",
    "sides_swapped": "look at the scan: mirror the file's affine, or swap the ids of the pair",
    "duplicate": "keep one, and never have copies in training and validation",
    "near_copy": "look at both; one patient's scans must not be in training and validation",
    "no_organs": "segment the case, or take it out",
    "organ_absent": "look whether the organ was removed or forgotten",
    "odd_volume": "look at the organ in doctor.png or a viewer",
    "odd_file": "look at the scan",
    "outlier": "look whether the case belongs to the data",
}
ERRORS = (
    *("no_partner", "two_files", "unreadable", "bad_labels", "grid_mismatch", "mirrored", "sides_swapped", "duplicate"),
)


@dataclass(frozen=True)
class Finding:
    """Something about a case: its `code` is one of WHAT_TO_DO's."""

    case: str
    code: str
    message: str

    @property
    def severity(self) -> str:
        """Of what must not be trained on: error; of what somebody should look at: warning."""
        return "error" if self.code in ERRORS else "warning"


@dataclass
class Examined:
    """What one case's files are like.

    Attributes:
        case: its id.
        findings: what was found.
        shape: voxels.
        spacing_mm: of neighbouring voxels.
        extent_mm: of the whole.
        hu: dataset.HU_PERCENTILES of the body.
        volumes_ml: of the organs that occur, by name.
        content: a hash of the scan's voxels in RAS+ order; a copy in another storage order has the same.
        coarse: the scan on COARSE_SIZE voxels, flat, of mean 0 and length 1; None for a constant one.
        slice_hu: (A, B), an axial slice, SHEET_VOXELS at most.
        slice_labels: (A, B) ids in it.
        slice_mm: its size.
    """

    case: str
    findings: list[Finding] = field(default_factory=list)
    shape: tuple = ()
    spacing_mm: tuple = ()
    extent_mm: tuple = ()
    hu: list = field(default_factory=list)
    volumes_ml: dict = field(default_factory=dict)
    content: str = ""
    coarse: np.ndarray | None = None
    slice_hu: np.ndarray | None = None
    slice_labels: np.ndarray | None = None
    slice_mm: tuple = ()

    def find(self, code: str, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(self.case, code, message))


# ---- One case --------------------------------------------------------------------------------------------------------


def examine(
    files: tuple[str, Path | None, Path | None],
    organs: tuple[str, ...],
    reading: Reading,
    annotated: Mapping[str, Sequence[str]],
) -> Examined:
    """Read a case's files to their end and look at them; no error leaves it."""
    case, scan, labels = files
    seen = Examined(case)
    warnings: list[str] = []
    reading = replace(reading, warn=warnings.append)
    voxels = ids = None
    try:
        if scan:
            if is_series_folder(scan):
                voxels, geometry = load_series(scan, warn=warnings.append, max_gib=reading.max_gib)
            else:
                voxels, geometry = load_scan(scan, reading)
            describe_scan(seen, voxels, geometry)
    except (ValueError, OSError, MemoryError) as error:
        seen.find("unreadable", str(error))
    try:
        if labels:
            ids, labels_geometry = load_labels(labels, len(organs), reading)
            describe_labels(seen, ids, labels_geometry, organs, annotated.get(case, organs))
    except (ValueError, OSError, MemoryError) as error:
        about_ids = "organ ids" in str(error) or "ids outside" in str(error)
        seen.find("bad_labels" if about_ids else "unreadable", str(error))
    for message in dict.fromkeys(warnings):
        seen.find("odd_file", message)
    if voxels is not None and ids is not None:
        try:
            check_same_grid(geometry, labels_geometry, f"case {case}")
            check_place(seen, voxels, ids, organs)
            keep_slice(seen, voxels, ids, geometry)
        except ValueError as error:
            seen.find("grid_mismatch", str(error))
    return seen


def describe_scan(seen: Examined, voxels: np.ndarray, geometry: Geometry) -> None:
    """Note what a scan is like."""
    seen.shape, seen.spacing_mm, seen.extent_mm = geometry.shape, geometry.spacing_mm, geometry.extent_mm
    seen.hu = hu_percentiles(voxels)
    content = hashlib.sha256(str(voxels.shape).encode())
    for plane in voxels:
        content.update(np.ascontiguousarray(plane))
    seen.content = content.hexdigest()
    image = resize_image(window_hu(voxels, COARSE_WINDOW_HU), COARSE_SIZE).ravel()
    image -= image.mean()
    length = float(np.linalg.norm(image))
    seen.coarse = image / np.float32(length) if length else None


def describe_labels(
    seen: Examined, ids: np.ndarray, geometry: Geometry, organs: Sequence[str], annotated: Sequence[str]
) -> None:
    """Note which organs are there, how large, and on which side; only annotated ones can be absent."""
    found = organs_in(ids, geometry, organs)
    seen.volumes_ml = {name: organ.ml for name, organ in found.items()}
    absent = [name for name in organs[1:] if name in annotated and name not in found]
    if not found:
        seen.find("no_organs", "its label map is empty")
    elif absent:
        seen.find("organ_absent", f"without {', '.join(absent)}")
    for right, left in swapped_sides(found):
        apart = found[left].right_mm - found[right].right_mm
        seen.find("sides_swapped", f"the {right} lies {apart:.0f} mm to the patient's left of the {left}")
    for name, ml in odd_volumes(found):
        low, high = plausible_ml(name)
        seen.find("odd_volume", f"{name} of {ml:.4g} mL, expected {low:g} to {high:g} in an adult")


def check_place(seen: Examined, voxels: np.ndarray, ids: np.ndarray, organs: Sequence[str]) -> None:
    """Note a label map that does not lie on the scan's organs."""
    off, mirrored = misplaced(voxels, ids, organs)
    if off:
        message = f"{off:.0%} of its liver, kidneys and spleen lie on what has no organ's HU"
        if mirrored:
            seen.find("mirrored", f"{message}, as scan or label map have {mirrored} mirrored")
        else:
            seen.find("misplaced", message)


def keep_slice(seen: Examined, voxels: np.ndarray, ids: np.ndarray, geometry: Geometry) -> None:
    """Keep the axial slice in which most organs show, the largest area among equals."""
    per_slice = [np.bincount(ids[:, :, z].ravel(), minlength=2)[1:] for z in range(ids.shape[2])]
    z = max(range(len(per_slice)), key=lambda i: (np.count_nonzero(per_slice[i]), per_slice[i].sum()))
    step = max(1, max(ids.shape[:2]) // SHEET_VOXELS)
    seen.slice_hu, seen.slice_labels = voxels[::step, ::step, z].copy(), ids[::step, ::step, z].copy()
    seen.slice_mm = geometry.extent_mm[:2]


# ---- All cases -------------------------------------------------------------------------------------------------------


def pair_files(data_dir: Path) -> tuple[list[tuple[str, Path | None, Path | None]], list[Finding]]:
    """Return the files of every case, and what is wrong with their pairing; a DICOM series is a case alone."""
    if data_dir.is_dir() and is_series_folder(data_dir):
        return [(data_dir.resolve().name, data_dir, None)], []
    folder = find_data(data_dir)
    scans, labels = list_files(folder / "images"), list_files(folder / "labels")
    series = {
        path.name: [path]
        for path in sorted((folder / "images").iterdir())
        if path.is_dir() and path.name not in scans and is_series_folder(path)
    }
    findings = [Finding(case, "dicom", "its scan is a DICOM series") for case in series]
    for case, paths in series.items():
        scans.setdefault(case, []).extend(paths)
    if not scans and not labels:
        raise ValueError(f"{folder}: neither images nor labels has a file (.nii.gz or .nii)")
    for found in (scans, labels):
        findings += [
            Finding(case, "two_files", f"{' and '.join(str(path) for path in paths)} mean it")
            for case, paths in found.items()
            if len(paths) > 1
        ]
    pairs = [
        (case, *(found.get(case, [None])[0] for found in (scans, labels)))
        for case in sorted(scans.keys() | labels.keys())
    ]
    findings += [
        Finding(case, "no_partner", f"has no {'scan' if scan is None else 'label map'}")
        for case, scan, label_map in pairs
        if scan is None or label_map is None
    ]
    return pairs, findings


def find_duplicates(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Cases whose scans are the same voxel by voxel, under whatever name and storage order, or nearly the same."""
    first: dict[str, str] = {}
    different = []
    for seen in cases:
        if seen.content and first.setdefault(seen.content, seen.case) != seen.case:
            yield Finding(seen.case, "duplicate", f"its scan is that of {first[seen.content]}")
        elif seen.coarse is not None:
            different.append(seen)
    if not different:
        return
    images = np.stack([seen.coarse for seen in different])
    for number, (seen, alike) in enumerate(zip(different, images @ images.T, strict=True)):
        if number and alike[:number].max() >= ALIKE:
            other = int(alike[:number].argmax())
            message = f"its scan looks like that of {different[other].case} (correlation {alike[other]:.3f})"
            yield Finding(seen.case, "near_copy", message)


def find_outliers(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Cases whose spacing, extent or HU are far off the other cases' median, in robust standard deviations."""
    read = [seen for seen in cases if seen.shape]
    if len(read) < LEAST_CASES:
        return
    for what, least in LEAST_SPREAD.items():
        values = np.array([getattr(seen, what) for seen in read], dtype=float)
        compared = values if what == "hu" else np.log(values)
        median = np.median(compared, axis=0)
        spread = np.maximum(MAD_TO_SD * np.median(np.abs(compared - median), axis=0), least)
        usual = listed(median if what == "hu" else np.exp(median))
        for seen, value, far in zip(read, values, np.abs(compared - median) / spread, strict=True):
            if far.max() > FAR_OFF:
                message = f"{what} {listed(value)}, the {len(read)} cases' median {usual}"
                yield Finding(seen.case, "outlier", message)


def listed(values: Sequence[float]) -> str:
    """Numbers for a message."""
    return " x ".join(f"{value:.4g}" for value in values)


def format_table(cases: Sequence[Examined], findings: Sequence[Finding], organs: Sequence[str]) -> list[str]:
    """Return a row for every case."""
    codes = defaultdict(list)
    for finding in findings:
        codes[finding.case].append(finding.code)
    width = max([len(seen.case) for seen in cases] + [4])
    lines = [f"{'case':<{width}}  {'voxels':>13}  {'mm':>18}  {'HU 5-50-95 %':>15}  organs  findings"]
    for seen in cases:
        voxels, mm = "x".join(map(str, seen.shape)), " ".join(f"{x:.3g}" for x in seen.spacing_mm)
        hu = " ".join(f"{x:.0f}" for x in seen.hu)
        count = f"{len(seen.volumes_ml)}/{len(organs) - 1}"
        named = ", ".join(dict.fromkeys(codes[seen.case])) or "-"
        lines.append(f"{seen.case:<{width}}  {voxels:>13}  {mm:>18}  {hu:>15}  {count:>6}  {named}")
    return lines


def format_ranges(cases: Sequence[Examined], organs: Sequence[str]) -> list[str]:
    """How spacing, size and HU are distributed over the cases, and in how many each organ is."""
    read = [seen for seen in cases if seen.shape]
    lines = []
    if read:
        lines.append(f"{'over the cases':<22}  {'lowest':>18}  {'median':>18}  {'highest':>18}")
    for name, values in (
        ("voxels", [seen.shape for seen in read]),
        ("spacing, mm", [seen.spacing_mm for seen in read]),
        ("extent, mm", [seen.extent_mm for seen in read]),
        ("HU 5, 50, 95 %", [seen.hu for seen in read]),
    ):
        if read:
            ranges = (" ".join(f"{x:.3g}" for x in f(values, axis=0)) for f in (np.min, np.median, np.max))
            lines.append(f"{name:<22}  " + "  ".join(f"{numbers:>18}" for numbers in ranges))
    labelled = [seen for seen in cases if seen.volumes_ml]
    for organ in organs[1:] if labelled else ():
        volumes_ml = [seen.volumes_ml[organ] for seen in labelled if organ in seen.volumes_ml]
        ranges = [f"{f(volumes_ml):.4g}" if volumes_ml else "-" for f in (np.min, np.median, np.max)]
        name = f"{organ}, mL ({len(volumes_ml)})" if len(organ) < 16 else f"{organ} ({len(volumes_ml)})"
        lines.append(f"{name:<22}  " + "  ".join(f"{number:>18}" for number in ranges))
    return lines


def write_findings(findings: Sequence[Finding], cases: Sequence[Examined], path: Path) -> None:
    """doctor.json: every finding with what to do, and what each case is like."""
    content = {
        "findings": [asdict(f) | {"severity": f.severity, "what_to_do": WHAT_TO_DO[f.code]} for f in findings],
        "cases": {
            seen.case: {
                "shape": seen.shape, "spacing_mm": seen.spacing_mm, "extent_mm": seen.extent_mm,
                "hu_percentiles": seen.hu, "volumes_ml": seen.volumes_ml,
            }
            for seen in cases
        },
    }  # fmt: skip
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def diagnose(data_dir: Path, output: Path, organs: tuple[str, ...], reading: Reading, workers: int) -> bool:
    """Examine a data set, print and write what was found; whether there is an error among it.

    Raises:
        OSError, ValueError: when it is no data set, or the results cannot be written.
    """
    from visualization.sheet import draw_sheet
    from visualization.style import save_figure

    pairs, findings = pair_files(data_dir)
    output.mkdir(parents=True, exist_ok=True)
    look = partial(examine, organs=organs, reading=reading, annotated=read_annotated(data_dir))
    with closing(in_processes(look, pairs, min(workers, len(pairs)))) as done:
        cases = [seen for _, seen in tqdm(done, total=len(pairs), desc="reading", disable=None)]
    cases.sort(key=lambda seen: seen.case)
    findings += [finding for seen in cases for finding in seen.findings]
    findings += [*find_duplicates(cases), *find_outliers(cases)]
    findings.sort(key=lambda finding: (finding.severity, finding.case))
    print("\n".join([*format_table(cases, findings, organs), "", *format_ranges(cases, organs)]), end="\n\n")
    for finding in findings:
        print(f"{finding.severity}: {finding.case}: {finding.message}; {WHAT_TO_DO[finding.code]}")
    write_findings(findings, cases, output / REPORT)
    drawn = [seen for seen in cases if seen.slice_hu is not None]
    if drawn:
        sheet = draw_sheet([(seen.case, seen.slice_hu, seen.slice_labels, seen.slice_mm) for seen in drawn])
        save_figure(sheet, output / SHEET)
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{len(cases)} cases, {errors} errors, {len(findings) - errors} warnings; more in {output}")
    return errors > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        organs = load_organs(args.config)
        if args.workers < 1:
            raise ValueError(f"--workers: got {args.workers}, expected 1 or more")
        reading = Reading(check("max_gib", args.max_gib, "--max-gib"), args.assume_ras, args.replace_nonfinite)
        sick = diagnose(args.data_dir, args.output or args.data_dir / "doctor", organs, reading, args.workers)
    return REFUSED if sick else DONE


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, metavar="DATA_DIR", help="folder with images and labels")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results (default: DATA_DIR/doctor)")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="settings that name the organs")
    parser.add_argument("--workers", type=int, default=min(cores(), MOST_WORKERS), metavar="N", help="processes")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest scan, as float32")
    parser.add_argument("--assume-ras", action="store_true", help="files that do not say where they lie are RAS+")
    parser.add_argument("--replace-nonfinite", action="store_true", help="NaN and infinite voxels become air")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
