"""Is this data set fit to train on? Every file is read to its end, and every case compared with anatomy and the others.

    python -m data.doctor DATA_DIR [--output DIR]

DATA_DIR holds images/ and labels/, or is the folder of one DICOM series. Scans in images/ may be such folders too.
Prints a table and, for each finding, what to do; writes doctor.json and doctor.png (a slice of every case, with the
contours of its organs) into the output folder, by default DATA_DIR/doctor. Exit code 0: no error, 1: an error, 2: wrong
usage.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config import DEFAULT_CONFIG, check, load_organs
from core.scans.annotated import read_annotated, warn_of_unknown_names
from core.scans.dicom_folders import is_series_folder
from core.scans.files import list_files
from core.scans.nifti import MAX_GIB, Reading
from core.scans.weights import read_weights
from core.system.exits import DONE, REFUSED, USAGE, refusing, run_command
from core.system.files import user_path, write_text
from core.system.parallel import MAX_WORKERS, cores, in_processes
from data.checks import WHAT_TO_DO, Examined, Finding, examine, find_duplicates, find_other_ids, find_outliers
from dataset import find_data

REPORT, SHEET = "doctor.json", "doctor.png"  # in the output folder


def pair_files(folder: Path) -> tuple[list[tuple[str, Path | None, Path | None]], list[Finding]]:
    """Return the files of every case, and what is wrong with their pairing; a DICOM series is a case alone."""
    if is_series_folder(folder):
        return [(folder.resolve().name, folder, None)], []
    scans = list_files(folder / "images")
    series = {
        path.name: [path]
        for path in sorted((folder / "images").iterdir())
        if path.is_dir() and path.name not in scans and is_series_folder(path)
    }
    findings = [Finding(case, "dicom", "its scan is a DICOM series") for case in series]
    scans |= series
    labels = list_files(folder / "labels", scans)
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
    """Describe how spacing, size and HU are distributed over the cases, and in how many each organ is."""
    read = [seen for seen in cases if seen.shape]
    lines = [f"{'over the cases':<22}  {'lowest':>18}  {'median':>18}  {'highest':>18}"] if read else []
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
    """Write doctor.json: every finding with what to do, and the facts of each case."""
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
    write_text(path, json.dumps(content, indent=2) + "\n")


def diagnose(data_dir: Path, output: Path, organs: tuple[str, ...], reading: Reading, workers: int) -> bool:
    """Examine a data set, print and write what was found; return True when there is an error.

    Raises:
        OSError, ValueError: when it is no data set, or the results cannot be written.
    """
    from visualization.sheet import draw_sheet
    from visualization.style import save_figure

    folder = data_dir if data_dir.is_dir() and is_series_folder(data_dir) else find_data(data_dir)
    pairs, findings = pair_files(folder)
    ids = [case for case, *_ in pairs]
    annotated = read_annotated(folder, ids)
    warn_of_unknown_names(annotated.values(), organs)
    read_weights(folder, ids)  # only to refuse what train.py would
    output.mkdir(parents=True, exist_ok=True)
    look = partial(examine, organs=organs, reading=reading, annotated=annotated)
    with closing(in_processes(look, pairs, min(workers, len(pairs)))) as done:
        cases = [seen for _, seen in tqdm(done, total=len(pairs), desc="reading", disable=None)]
    cases.sort(key=lambda seen: seen.case)
    findings += [finding for seen in cases for finding in seen.findings]
    findings += [*find_duplicates(cases), *find_outliers(cases), *find_other_ids(cases)]
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
    parser.add_argument("data_dir", type=user_path, metavar="DATA_DIR", help="folder with images and labels")
    parser.add_argument("--output", type=user_path, metavar="DIR", help="folder for results (default: DATA_DIR/doctor)")
    parser.add_argument("--config", type=user_path, default=DEFAULT_CONFIG, help="settings that name the organs")
    parser.add_argument("--workers", type=int, default=min(cores(), MAX_WORKERS), metavar="N", help="processes")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest scan, as float32")
    parser.add_argument("--assume-ras", action="store_true", help="files that do not say where they lie are RAS+")
    parser.add_argument("--replace-nonfinite", action="store_true", help="NaN and infinite voxels become air")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_command(main)
