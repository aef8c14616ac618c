"""Is this data set fit to train on? Every file is read to its end, and what is wrong is said with its repair.

    python -m data.doctor DATA_DIR [--output DIR]
    python -m data.doctor FOLDER_OF_A_DICOM_SERIES

prints a table and the findings, and writes doctor.json and doctor.png (a slice of each case with its organs) into
DATA_DIR itself: beside the data that they are about, but never into images or labels, where scans are looked for. Of a
DICOM series nothing is written without --output.
Exit code 0: no error (warnings may be), 1: errors, 2: wrong usage, 3: had to stop. data/README.md lists the codes.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config import DEFAULT_CONFIG, check, load_organs
from core.exits import DONE, REFUSED, STOPPED, USAGE, refusing, run_command
from core.files import whole_file
from core.nifti import MAX_GIB, Reading
from core.parallel import MOST_WORKERS, cores, in_processes
from core.preprocess import DEFAULT_READING, NIFTI_SUFFIXES
from data.dicom import is_series_folder
from data.examine import ERROR, WARNING, Examination, Examined, Finding, Pair
from dataset import case_id, find_data, listed

RESULTS = ("doctor.json", "doctor.png")
PIXELS = 480  # of a slice on the sheet, at most twice as many
# Correlation of two coarse scans from which on they may be one patient. 0.997 and more for a scan that was resampled,
# made noisy or lost a slice, 0.86 at most between different patients (RESULTS.md).
NEAR_DUPLICATE = 0.97
FEWEST_TO_COMPARE = 5  # cases; of fewer, none can be far off the rest
FAR_OFF = 4.0  # spreads from the median
# The least that counts as a spread: of sizes a quarter, of HU so many. A case is far off from 1.25^4 = 2.4 times on.
LEAST_RATIO, LEAST_HU = 1.25, 25.0
MAD_TO_SD = 1.4826  # of a normal distribution
MOST_DRAWN = 1000  # cases; a sheet of more cannot be opened


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """The files of a folder by the case that they mean, and the names of those that are no scans; hidden ones apart.

    The rules are those of dataset.find_files, but nothing is refused; the folder of a DICOM series counts as a file.
    """
    found: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.name.lower().endswith(NIFTI_SUFFIXES):
            if is_series_folder(path):
                found.setdefault(case_id(path.with_name(f"{path.name}.nii")), []).append(path)
            else:
                others.append(path.name)
            continue
        if path.is_dir():
            inside = [p for p in path.iterdir() if p.name.lower().endswith(NIFTI_SUFFIXES) and p.name[0] != "."]
            path = inside[0] if len(inside) == 1 else path
        found.setdefault(case_id(path), []).append(path)
    return found, others


def pair_up(folder: Path) -> tuple[list[Pair], list[Finding]]:
    """The cases of a data set, also those without a partner, and what is wrong with their files' names.

    Raises:
        FileNotFoundError: when there is no scan and no label map.
    """
    findings = []
    sides = {}
    for side in ("images", "labels"):
        sides[side], others = list_files(folder / side)
        for case, paths in sides[side].items():
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                findings.append(
                    Finding(case, ERROR, "same_case", f"{side}: {names} all mean this case; keep one of them")
                )
        if others:
            message = (
                f"{folder / side}: not looked at, being no .nii.gz or .nii: {listed(others)}; convert scans to NIfTI"
            )
            findings.append(Finding("", WARNING, "left_out", message))
    scans, labels = ({case: paths[0] for case, paths in sides[side].items()} for side in ("images", "labels"))
    pairs = [Pair(case, scans.get(case), labels.get(case)) for case in sorted(scans.keys() | labels.keys())]
    if not pairs:
        raise FileNotFoundError(f"{folder}: no scans in images, no label maps in labels (.nii.gz or .nii)")
    return pairs, findings + [finding for pair in pairs for finding in check_partner(pair)]


def check_partner(pair: Pair) -> Iterator[Finding]:
    """What train.py would refuse of a case by its files' names and kinds."""
    case = pair.case
    if pair.labels is None:
        message = f"{pair.scan}: has no label map; add labels/{case}.nii.gz, or move the scan elsewhere"
        yield Finding(case, ERROR, "missing_labels", message)
    if pair.scan is None:
        message = f"{pair.labels}: has no scan; add images/{case}_0000.nii.gz, or move the label map elsewhere"
        yield Finding(case, ERROR, "missing_scan", message)
    for path in (pair.scan, pair.labels):
        if path is not None and path.is_dir() and not path.name.lower().endswith(NIFTI_SUFFIXES):
            message = f"{path}: is a DICOM series, which train.py does not read; convert it to NIfTI (dcm2niix does)"
            yield Finding(case, ERROR, "dicom", message)


# ---- All cases together ----------------------------------------------------------------------------------------------


def examine_all(pairs: Sequence[Pair], examination: Examination, workers: int) -> dict[str, Examined]:
    """Look at the cases in parallel; by id, in their order.

    Raises:
        MemoryError: when a worker was killed.
    """
    done = {}
    with (
        tqdm(total=len(pairs), desc="reading", unit="case", disable=None) as bar,
        closing(in_processes(examination, pairs, workers)) as finished,
    ):
        for pair, found in finished:
            done[pair.case] = found
            bar.update()
    return {pair.case: done[pair.case] for pair in pairs}


def find_duplicates(cases: dict[str, Examined]) -> Iterator[Finding]:
    """Patients who are there twice: the same voxels in whatever order, or nearly the same picture."""
    firsts: dict[str, str] = {}
    seen: dict[str, np.ndarray] = {}
    for case, found in cases.items():
        if found.fingerprint is None:
            continue
        first = firsts.setdefault(found.fingerprint, case)
        if first != case:
            message = f"its scan has the voxels of case {first}, stored otherwise or mirrored; remove one of them"
            yield Finding(case, ERROR, "duplicate", message)
        elif found.coarse is not None:
            if seen:
                alike = np.stack(list(seen.values())) @ found.coarse
                most = int(alike.argmax())
                if alike[most] > NEAR_DUPLICATE:
                    message = (
                        f"its scan looks like that of case {list(seen)[most]} (correlation {alike[most]:.3f}); where "
                        "they are of one patient, train on one of them, or hold both out"
                    )
                    yield Finding(case, WARNING, "near_duplicate", message)
            seen[case] = found.coarse


def find_outliers(cases: dict[str, Examined]) -> Iterator[Finding]:
    """Cases that are far off the rest in spacing, extent, brightness or an organ's volume, where 5 or more have it.

    Far off is 4 spreads from the median. The spread is that of the median absolute deviation, of logarithms for sizes,
    and at least LEAST_RATIO or LEAST_HU, so that cases which are all but the same have no outlier.
    """
    measures: dict[str, dict[str, float]] = {}
    for case, found in cases.items():
        for name, value in numbers_of(found):
            measures.setdefault(name, {})[case] = value
    off: dict[str, list[str]] = {}
    for name, by_case in measures.items():
        if len(by_case) < FEWEST_TO_COMPARE:
            continue
        values = np.array(list(by_case.values()))
        is_hu = name.endswith("HU")
        scaled, least = (values, LEAST_HU) if is_hu else (np.log(values), np.log(LEAST_RATIO))
        apart = np.abs(scaled - np.median(scaled))
        spread = max(MAD_TO_SD * np.median(apart), least)
        for case, value, far in zip(by_case, values, apart / spread > FAR_OFF, strict=True):
            if far:
                off.setdefault(case, []).append(
                    f"{name} {value:.3g} (median of {len(values)} cases: {np.median(values):.3g})"
                )
    for case, what in off.items():
        message = f"far off the rest: {', '.join(what)}; look at it, and leave it out where it is of another kind"
        yield Finding(case, WARNING, "outlier", message)


def numbers_of(found: Examined) -> Iterator[tuple[str, float]]:
    """What cases are compared by: a name that ends with the unit, and the number. Organs that are cut off have none."""
    if found.geometry is not None:
        for axis, mm, extent_mm in zip("XYZ", found.geometry.spacing_mm, found.geometry.extent_mm, strict=True):
            yield f"spacing {axis} in mm", mm
            yield f"extent {axis} in mm", extent_mm
    if found.body_hu is not None:
        yield "body's median HU", found.body_hu
    for name, organ in (found.organs or {}).items():
        if not organ.cut:
            yield f"{name} in mL", organ.ml


def find_unlearnable(cases: dict[str, Examined], organs: Sequence[str]) -> Iterator[Finding]:
    """Organs of the list that no case has, where there is a label map to learn from at all."""
    labelled = [found.organs for found in cases.values() if found.organs]
    absent = [organ for organ in organs[1:] if not any(organ in of_case for of_case in labelled)]
    if labelled and absent:
        message = (
            f"{', '.join(absent)}: in none of the {len(labelled)} label maps with organs, so that nothing of it can be "
            "learnt; is the organ list (--config) that of this data?"
        )
        yield Finding("", WARNING, "organ_in_no_case", message)


# ---- What is said ----------------------------------------------------------------------------------------------------


def table_of(cases: dict[str, Examined], findings: Sequence[Finding], organs: Sequence[str]) -> str:
    """A line per case: voxels, spacing, HU range, organs, and the codes of its findings."""
    lines = [["case", "voxels", "spacing mm", "HU 1-99 %", "organs", "findings"]]
    for case, found in cases.items():
        geometry, hu = found.geometry, found.hu
        lines.append(
            [
                case,
                "x".join(map(str, geometry.shape)) if geometry else "-",
                "x".join(f"{mm:.3g}" for mm in geometry.spacing_mm) if geometry else "-",
                f"{hu[0]:.0f} to {hu[1]:.0f}" if hu else "-",
                f"{len(found.organs)}/{len(organs) - 1}" if found.organs is not None else "-",
                codes_of(case, findings) or "-",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def codes_of(case: str, findings: Sequence[Finding]) -> str:
    """A case's findings in short, errors first."""
    by_severity = {ERROR: [], WARNING: []}
    for finding in findings:
        if finding.case == case and finding.code not in by_severity[finding.severity]:
            by_severity[finding.severity].append(finding.code)
    return "; ".join(f"{severity}: {', '.join(codes)}" for severity, codes in by_severity.items() if codes)


def distribution_of(cases: dict[str, Examined]) -> list[str]:
    """Smallest, median and largest spacing and extent along each axis, in lines."""
    geometries = [found.geometry for found in cases.values() if found.geometry]
    if not geometries:
        return []
    lines = []
    for what, values in (
        ("spacing", [geometry.spacing_mm for geometry in geometries]),
        ("extent", [geometry.extent_mm for geometry in geometries]),
    ):
        low, middle, high = np.min(values, axis=0), np.median(values, axis=0), np.max(values, axis=0)
        axes = [f"{axis} {low[i]:.3g} to {high[i]:.3g} (median {middle[i]:.3g})" for i, axis in enumerate("XYZ")]
        lines.append(f"{what} in mm: {', '.join(axes)}")
    return lines


def facts_of(found: Examined) -> dict:
    """What doctor.json says of a case beside its findings."""
    geometry = found.geometry
    return {
        "shape": list(geometry.shape) if geometry else None,
        "spacing_mm": list(geometry.spacing_mm) if geometry else None,
        "extent_mm": list(geometry.extent_mm) if geometry else None,
        "hu_1_99_percent": list(found.hu) if found.hu else None,
        "volumes_ml": None if found.organs is None else {name: organ.ml for name, organ in found.organs.items()},
    }


def write_results(
    output: Path, title: str, cases: dict[str, Examined], findings: Sequence[Finding], organs: Sequence[str]
) -> list[str]:
    """Write doctor.json and, where matplotlib is installed, doctor.png; the names of what was written.

    Raises:
        OSError: when it cannot be.
    """
    content = {
        "findings": [asdict(finding) for finding in findings],
        "cases": {case: facts_of(found) for case, found in cases.items()},
    }
    with whole_file(output / "doctor.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    try:
        from visualization.overlay import as_seen
        from visualization.sheet import Panel, draw_sheet
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("warning: no doctor.png, since matplotlib is not installed", file=sys.stderr)
        return ["doctor.json"]
    panels = []
    for case, found in list(cases.items())[:MOST_DRAWN]:
        severities = [finding.severity for finding in findings if finding.case == case]
        worst = ERROR if ERROR in severities else WARNING if severities else ""
        one, codes = found.slice, codes_of(case, findings)
        where = f"slice {one.number} of {one.depth}" if one else ""
        seen = (as_seen(one.voxels), as_seen(one.labels), one.size_mm) if one else (None, None, (1.0, 1.0))
        panels.append(Panel(case, codes or where, worst, *seen))
    draw_sheet(panels, organs, title, output / "doctor.png")
    return ["doctor.json", "doctor.png"]


# ---- The command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the data set that the command line, or `arguments`, name."""
    args = parse_arguments(arguments)
    with refusing(USAGE):
        organs = load_organs(args.config)
        reading = Reading(check("max_gib", args.max_gib, "--max-gib"), args.assume_ras, args.replace_nonfinite)
    return diagnose(args.data_dir, args.output, organs, reading, args.workers, args.series)


def diagnose(
    data_dir: Path,
    output: Path | None = None,
    organs: tuple[str, ...] | None = None,
    reading: Reading = DEFAULT_READING,
    workers: int | None = None,
    series: str | None = None,
) -> int:
    """Look at a data set, or at one DICOM series; print, write, and return the exit code.

    Args:
        data_dir: the folder.
        output: where the results go; None: `data_dir`, and nowhere for a series.
        organs: names by id, background first; None: those of config.yaml.
        reading: what is accepted of files.
        workers: processes; None: one per core, at most MOST_WORKERS.
        series: SeriesInstanceUID to take where a DICOM folder holds several.
    """
    organs = organs or load_organs()
    with refusing(USAGE):
        if is_series_folder(data_dir):
            path = data_dir.resolve()
            pairs, findings = [Pair(path.name, path, None)], []
        else:
            folder = find_data(data_dir)
            pairs, findings = pair_up(folder)
            output = output or data_dir
            prepare_output(output, folder)
        if output:
            prepare_output(output, data_dir)
    workers = min(workers or min(cores(), MOST_WORKERS), len(pairs))
    with refusing(STOPPED):
        cases = examine_all(pairs, Examination(organs, reading, PIXELS, series), workers)
        findings += [finding for found in cases.values() for finding in found.findings]
        findings += [*find_duplicates(cases), *find_outliers(cases), *find_unlearnable(cases, organs)]
        order = {case: place for place, case in enumerate(cases)}
        findings.sort(key=lambda finding: (finding.severity != ERROR, order.get(finding.case, -1)))
        title = f"{data_dir.resolve().name}: {len(cases)} case(s)"
        print_results(cases, findings, organs)
        written = write_results(output, title, cases, findings, organs) if output else []
    counts = Counter(finding.severity for finding in findings)
    where = f"; in {output}: {', '.join(written)}" if written else ""
    print(f"{data_dir}: {len(cases)} case(s), {counts[ERROR]} error(s), {counts[WARNING]} warning(s){where}")
    return REFUSED if counts[ERROR] else DONE


def print_results(cases: dict[str, Examined], findings: Sequence[Finding], organs: Sequence[str]) -> None:
    """Print the table, the distribution of sizes, and the findings with their repair."""
    print(table_of(cases, findings, organs))
    print("\n".join(["", *distribution_of(cases)]))
    for finding in findings:
        print(f"{finding.severity}: {finding.case or 'the data set'}: {finding.code}: {finding.message}")


def prepare_output(output: Path, data: Path) -> None:
    """Make the folder for the results, without those of an earlier run, which would pass for this one's.

    Raises:
        ValueError: when it lies where scans are looked for.
        OSError: when it cannot be written to.
    """
    inside = {output.resolve(), *output.resolve().parents}
    taken = [data / "images", data / "labels"] if (data / "images").is_dir() else [data] * is_series_folder(data)
    for folder in taken:
        if folder.resolve() in inside:
            raise ValueError(f"--output: got {output}, which is in {folder}, where scans are; choose another")
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
    for name in RESULTS:
        (output / name).unlink(missing_ok=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "data_dir", type=Path, metavar="DATA_DIR", help="folder with images and labels, or a DICOM series"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for doctor.json and doctor.png (default: DATA_DIR)"
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="settings that list the organs")
    parser.add_argument("--workers", type=int, metavar="N", help=f"processes (default: cores, at most {MOST_WORKERS})")
    parser.add_argument("--series", metavar="UID", help="of a DICOM folder with several series, the one to look at")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest scan, in GiB as float32")
    parser.add_argument("--assume-ras", action="store_true", help="files that do not say where they lie are RAS+")
    parser.add_argument("--replace-nonfinite", action="store_true", help="NaN and infinite voxels are air, no error")
    args = parser.parse_args(arguments)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers: got {args.workers}, expected 1 or more")
    return args


if __name__ == "__main__":
    run_command(main)
