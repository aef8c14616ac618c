"""Segment CT scans with a trained network.

    python infer.py INPUT [INPUT ...] --checkpoint runs/vnet/best.pt --output predictions

INPUT is a NIfTI file, a folder of them, or the folder of a DICOM series. For each scan the command writes
OUTPUT/CASE.nii.gz, a label map in the scan's own geometry, and adds every organ's volume and HU to OUTPUT/volumes.csv.
With --report it also writes a page with pictures for each scan, and OUTPUT/reports/index.html, which links to them.
Size, HU window and organs come from the checkpoint. Earlier outputs of a case that fails are renamed to *.old.
`torchrun --nproc-per-node N infer.py ...` splits the scans over several GPUs.
Exit code 0: done, 1: some input or scan was refused (the others are done), 2: wrong usage.
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from core.checkpoint import load_networks
from core.config import Config, check, check_share
from core.inference.inputs import choose_scans, read_scan
from core.inference.locating import Locator
from core.inference.networks import choose_inference_precision, mean_logits, predict_logits
from core.inference.output_folder import OutputFolder
from core.inference.restoring import restore_labels
from core.inference.stages import Segmentation, run_overlapped
from core.scans.nifti import Reading
from core.scans.typical import differences
from core.scans.volumes import prepare_image
from core.system.exits import DONE, REFUSED, USAGE, print_stderr, refusing, run_command
from core.system.files import user_path
from core.system.processes import join_group, leave_group, own_device
from core.training.device import choose_device


@dataclass(frozen=True)
class Inference:
    """Everything that segmenting a scan needs.

    Attributes:
        networks: map (B, 1, X, Y, Z) to logits (B, K, X, Y, Z), on `device`; probabilities of several are averaged.
        config: the settings that they were trained with.
        training_data: extents in mm and HU percentiles of their training cases.
        device: where the networks run.
        precision: the type that convolutions are computed in.
        output: the folder for the results.
        reading: which scans are accepted.
        series_uid: which of the series in a DICOM folder to read, UID or UID:N; None when there is only one.
        fingerprint: of the networks and options that change label maps; written into each label map.
        locator: finds the part of a scan that the networks were trained on.
        drop_pieces: pieces of an organ up to this share of its largest piece become background; 0: none.
    """

    networks: Sequence[nn.Module]
    config: Config
    training_data: dict
    device: torch.device
    precision: torch.dtype
    output: OutputFolder
    reading: Reading = field(default_factory=Reading)
    series_uid: str | None = None
    fingerprint: str = ""
    locator: Locator = field(default_factory=Locator)
    drop_pieces: float = 0


# ---- One scan: read and prepare, predict, finish ---------------------------------------------------------------------


def prepare(inference: Inference, scan: Segmentation) -> None:
    """Read a scan and resample it to the network's grid; warn if it is unlike the training cases.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    reading = replace(inference.reading, warn=scan.warn)
    voxels, scan.geometry = read_scan(scan.file, reading, inference.series_uid)  # (X, Y, Z) in HU
    inference.output.check(scan)
    scan.box = inference.locator.find_box(voxels, scan.geometry, scan.warn)
    unlike = differences(voxels, scan.geometry, scan.box, inference.training_data)
    if unlike:
        scan.warn(f"unlike the training cases, expect a poor prediction: {', '.join(unlike)}")
    scan.image = prepare_image(voxels[scan.box], inference.config.size, inference.config.window_hu)  # uint8
    scan.keep_hu(voxels[scan.box])


@torch.inference_mode()
def predict(inference: Inference, scan: Segmentation) -> None:
    """Run the networks on a prepared scan."""
    image = torch.from_numpy(scan.image).to(inference.device).float() / 255  # (X, Y, Z) in 0..1
    logits_of_each = (
        predict_logits(network, image[None, None], inference.precision)[0] for network in inference.networks
    )
    scan.logits = mean_logits(logits_of_each, len(inference.networks))  # (K, X, Y, Z)
    scan.image = None


def finish(inference: Inference, scan: Segmentation) -> None:
    """Resample the logits to the scan's own grid; write its label map, its volumes, and probabilities if asked to.

    Raises:
        OSError, ValueError: when the network's output is not finite, or a file cannot be written.
    """
    logits, geometry, organs, output = scan.logits, scan.geometry, inference.config.organs, inference.output
    scan.logits = None
    labels = restore_labels(logits, scan.box, geometry.shape, inference.drop_pieces)  # (X, Y, Z) uint8
    output.write(scan, logits, labels, organs, inference.fingerprint)


# ---- All scans -------------------------------------------------------------------------------------------------------


def segment(inference: Inference, cases: dict[str, Path], show: bool) -> list[str]:
    """Segment cases, given with their files, with a progress bar if `show`; return those that failed."""
    stages = [partial(stage, inference) for stage in (prepare, predict, finish)]
    failed = []
    with closing(run_overlapped(stages, cases, inference.device)) as segmented:
        for scan in tqdm(segmented, total=len(cases), desc="scans", disable=None if show else True):
            if scan.failure:
                print_stderr(f"error: {scan.failure}")
                inference.output.set_aside(scan.case)
                failed.append(scan.case)
    return failed


def write_reports(
    inference: Inference, cases: dict[str, Path], paths: Sequence[str], locate: str | None, checkpoint: dict
) -> list[str]:
    """Write a page with pictures for each segmented case; return the cases for which that failed."""
    from visualization import report, reports

    quiet = replace(inference.reading, warn=lambda _: None)  # the warnings were printed when it was segmented
    made_by = report.provenance_of(paths, checkpoint) | {"computed in": str(inference.precision).removeprefix("torch.")}
    options = {"located by": locate, "pieces dropped": inference.drop_pieces, "series": inference.series_uid}
    made_by |= {name: str(value) for name, value in options.items() if value}
    read = partial(read_scan, reading=quiet, series_uid=inference.series_uid)
    about = inference.config.organs, made_by, quiet, inference.training_data.get("organs")
    return reports.write_reports(inference.output.path, cases, read, *about)


def list_reports(folder: Path) -> None:
    """Write the page that links to all reports in a folder, if the folder exists."""
    from visualization import reports

    if folder.is_dir():
        print(f"reports in {reports.write_index(folder)}")


def main() -> int:
    """Segment the scans that the command line names; return the exit code."""
    arguments = parse_arguments()
    output = OutputFolder(Path(arguments.output), arguments.extras, arguments.report, arguments.series)
    with refusing(USAGE):
        device = choose_device(own_device(check("device", arguments.device, "--device")))
        reading = check_options(arguments)
        group = join_group(torch.device("cpu"))  # the processes exchange only names
        cases, refused = choose_scans(arguments.inputs, arguments.cases, arguments.series, show=group.first)
        output.prepare(cases, refused)
        if cases:
            networks, checkpoint = load_networks(arguments.checkpoint, device, warn=group.first)
            locator = Locator.load(arguments.locate, checkpoint, device, warn=group.first)
            checkpoint["fingerprint"] += output.mark_of_options(arguments.drop_pieces)
            precision = choose_inference_precision(arguments.precision, checkpoint["config"].precision, device)
    if group.first and arguments.cases is None and not arguments.skip_existing:
        output.set_aside_refused(refused, cases)
    if not cases:
        leave_group(group)
        return REFUSED
    to_report = output.without_report(cases, checkpoint["fingerprint"]) if arguments.skip_existing else {}
    if arguments.skip_existing:
        cases = output.unfinished(cases, checkpoint["fingerprint"], warn=group.first)
    group.wait()  # all processes have listed the same cases before the first one is segmented
    own, to_report = (dict(list(each.items())[group.rank :: group.size]) for each in (cases, to_report))
    config, training_data, fingerprint = (checkpoint[key] for key in ("config", "training_data", "fingerprint"))
    options = output, reading, arguments.series, fingerprint, locator, arguments.drop_pieces
    inference = Inference(networks, config, training_data, device, precision, *options)
    failed, unreported = segment(inference, own, group.first), []
    done = {case: file for case, file in own.items() if case not in failed}
    with refusing(REFUSED):
        if arguments.report:
            paths = arguments.checkpoint, arguments.locate
            unreported = write_reports(inference, done | to_report, *paths, checkpoint)
        failed, unreported = (sorted(chain(*group.gather(names))) for names in (failed, unreported))
        names = [*failed, *map(str, refused), *(f"{case} (its report)" for case in unreported)]
        if group.first:
            print(f"{len(cases) - len(failed)} of {len(cases)} scans segmented into {output.path}")
            if arguments.report:
                list_reports(output.reports)
            if names:
                print_stderr(f"error: failed: {', '.join(names)}")
    leave_group(group)
    return REFUSED if names else DONE


def check_options(arguments: argparse.Namespace) -> Reading:
    """Check the options whose values are limited, with a ValueError for a wrong one; return those for reading scans."""
    check("precision", arguments.precision, "--precision")
    check_share(arguments.drop_pieces, "--drop-pieces")
    max_gib = check("max_gib", arguments.max_gib, "--max-gib")
    return Reading(max_gib, arguments.assume_ras, arguments.replace_nonfinite)


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments; ~ in paths is expanded."""
    parser = argparse.ArgumentParser(description="Segment CT scans with a trained V-Net.")
    path, switch = partial(parser.add_argument, type=user_path), partial(parser.add_argument, action="store_true")
    path("inputs", nargs="+", metavar="INPUT", help="a NIfTI file, a folder of them, or a DICOM series")
    several = "best.pt or last.pt of a run; of several, as of all folds, the probabilities are averaged"
    path("--checkpoint", required=True, nargs="+", metavar="FILE", help=several)
    path("--locate", metavar="FILE", help="network that finds the box for crop: organs")
    path("--output", required=True, metavar="DIR", help="folder for label maps and volumes.csv")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto (as trained; on a CPU float32), float32, bf16, fp16")
    switch("--skip-existing", help="leave out scans whose label map is there")
    pieces = "remove pieces of an organ up to this share of its largest piece, 0 to 1 (default: 0, none)"
    drop = parser.add_mutually_exclusive_group().add_argument
    drop("--drop-pieces", type=float, default=0.0, metavar="SHARE", help=pieces)
    drop("--largest-piece", action="store_const", const=1.0, dest="drop_pieces", help="the same as --drop-pieces 1")
    extra = partial(parser.add_argument, action="append_const", dest="extras", default=[])
    extra("--probabilities", const="--probabilities", help="write CASE_probabilities.nii.gz too")
    extra("--dicom-seg", const="--dicom-seg", help="write CASE_seg.dcm too, a DICOM Segmentation of a DICOM series")
    extra("--rtstruct", const="--rtstruct", help="write CASE_rtstruct.dcm too, an RT Structure Set of a DICOM series")
    switch("--report", help="write a page with pictures for each case, in reports/")
    parser.add_argument("--series", metavar="UID", help="the DICOM series to segment; UID:2: its second acquisition")
    parser.add_argument("--max-gib", type=float, default=Reading.max_gib, metavar="G", help="largest scan, as float32")
    switch("--assume-ras", help="take files that do not say where they lie to be in RAS+ order")
    switch("--replace-nonfinite", help="make air of NaN and infinite voxels, instead of refusing them")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
