"""Segment CT scans with a trained V-Net.

    python infer.py INPUT [INPUT ...] --checkpoint runs/vnet/best.pt --output predictions

INPUT is a NIfTI file, a folder of them, or the folder of a DICOM series. Writes OUTPUT/CASE.nii.gz, a label map in the
scan's own geometry, for each scan, and OUTPUT/volumes.csv with every organ's volume in mL; with --report also a page
with pictures, and OUTPUT/reports/index.html, which leads to them. Size, HU window and organs come from the checkpoint.
What an earlier run left of a case that fails is renamed to .old. Several GPUs share the scans out by
`torchrun --nproc-per-node N infer.py ...`.
Exit code 0: done, 1: some input or scan was refused (the others are done), 2: wrong usage.
"""

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, starmap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.checkpoint import load_networks
from core.config import Config, check
from core.inference.inputs import choose_reading, find_inputs, named_case
from core.inference.output_folder import (
    REPORTS,
    check_inputs_are_elsewhere,
    is_finished,
    label_map_path,
    prepare_folder,
    probabilities_path,
    rename_old,
    report_files,
    set_aside,
    write_volumes,
)
from core.inference.stages import Segmentation, attempt, in_thread, stage_thread
from core.scans.files import select_cases
from core.scans.geometry import Geometry
from core.scans.nifti import MAX_GIB, Reading
from core.scans.resample import logits_to_labels
from core.scans.typical import differences
from core.scans.volumes import (
    DEFAULT_READING,
    load_scan,
    prepare_image,
    save_label_map,
    save_probabilities,
    warn_of_values,
)
from core.system.exits import DONE, REFUSED, USAGE, print_error, print_warning, refusing, run_command
from core.system.files import check_room, whole_file
from core.system.processes import join_group, leave_group, own_device
from core.training.setup import autocast, choose_device, choose_precision
from vnet import VNet

PROBABILITY_BYTES = 2  # of a voxel and class, in the file that they lie in before they are compressed


@dataclass(frozen=True)
class Inference:
    """All that segmenting a scan works with.

    Attributes:
        networks: ready to predict, on `device`; of several, the probabilities are averaged.
        config: the settings that they were trained under.
        training_data: what their training cases were like.
        device: where it runs.
        precision: the type that convolutions are computed in.
        output: the folder for the results.
        probabilities: whether they are written too.
        reading: what is accepted of scans.
        series_uid: which of the series in a DICOM folder is meant; None: the only one.
    """

    networks: Sequence[VNet]
    config: Config
    training_data: dict
    device: torch.device
    precision: torch.dtype
    output: Path
    probabilities: bool
    reading: Reading = DEFAULT_READING
    series_uid: str | None = None


# ---- The three stages ------------------------------------------------------------------------------------------------


def read(inference: Inference, file: Path, reading: Reading) -> tuple[np.ndarray, Geometry]:
    """A scan's HU, (X, Y, Z) float32 in RAS+ order, and its geometry, from a NIfTI file or the folder of a series.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    if not file.is_dir():
        return load_scan(file, reading)
    from core.scans.dicom_series import load_series

    voxels, geometry = load_series(file, inference.series_uid, reading.warn, reading.max_gib)
    warn_of_values(voxels, reading.warn)
    return voxels, geometry


def prepare(inference: Inference, scan: Segmentation) -> None:
    """Read a scan and resize it to the network's grid; warn if it is unlike the training cases.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    reading = replace(inference.reading, warn=lambda message: print_warning(scan.named(message)))
    voxels, scan.geometry = read(inference, scan.file, reading)
    unlike = differences(voxels, scan.geometry, inference.training_data)
    if unlike:
        reading.warn(f"unlike the training cases, expect a poor prediction: {', '.join(unlike)}")
    scan.image = prepare_image(voxels, inference.config.size, inference.config.window_hu)


@torch.inference_mode()
def predict(inference: Inference, scan: Segmentation) -> None:
    """Run the networks on a prepared scan."""
    image = torch.from_numpy(scan.image).to(inference.device).float() / 255  # (X, Y, Z) in 0..1
    probabilities = None
    for network in inference.networks:
        with autocast(inference.device, inference.precision):
            scan.logits = network(image[None, None])[0].float()  # (K, X, Y, Z)
        if len(inference.networks) > 1:
            scan.logits = scan.logits.softmax(dim=0)
            probabilities = scan.logits if probabilities is None else probabilities.add_(scan.logits)
    if probabilities is not None:
        # Logarithms of the mean probabilities are logits whose softmax they are.
        scan.logits = probabilities.div_(len(inference.networks)).clamp_(min=torch.finfo(torch.float32).tiny).log_()
    scan.image = None


def finish(inference: Inference, scan: Segmentation) -> None:
    """Bring the logits back to the scan's own grid; write its volumes and label map, and probabilities if asked to.

    Raises:
        OSError, ValueError: when the network's output is not finite, or a file cannot be written.
    """
    logits, geometry, organs = scan.logits, scan.geometry, inference.config.organs
    scan.logits = None
    if not torch.isfinite(logits).all():
        raise ValueError("the network's output is not finite, so that no label map can be made of it")
    labels = logits_to_labels(logits, geometry.shape)
    # Slice by slice, since bincount makes 8 bytes of each label.
    voxels = sum(np.bincount(labels_yz.ravel(), minlength=len(organs)) for labels_yz in labels)
    if inference.probabilities:
        check_room(inference.output, PROBABILITY_BYTES * len(organs) * labels.size, f"the probabilities of {scan.case}")
        save_probabilities(logits, geometry, probabilities_path(inference.output, scan.case))
    else:
        rename_old(probabilities_path(inference.output, scan.case), f"case {scan.case}: without --probabilities")
    # The label map is the sign that all of the case is done, so it takes its place last. It is whole on the disk before
    # the volumes are written, so that hardly anything can go wrong between the two.
    with whole_file(label_map_path(inference.output, scan.case)) as temporary:
        save_label_map(labels, geometry, temporary, organs)
        write_volumes(inference.output, scan.case, voxels * geometry.voxel_ml, organs)


# ---- All scans -------------------------------------------------------------------------------------------------------


def segment_all(inference: Inference, scans: dict[str, Path]) -> Iterator[Segmentation]:
    """Segment scans, given by case: while the network works on one, the next is read and the one before is written.

    Each stage has one scan at a time, and at most one waits for the next stage, as the network's input or its logits.
    So memory peaks at the sum of the three stages: some 10 bytes for each voxel of the scan that is read, the network's
    activations, and the logits and labels of the scan that is written (the logits twice while a third scan waits). A
    scan that runs out of memory is done once more at the end, alone: its neighbours may have taken what it needed.

    Yields:
        each scan when it is done or has failed; in order, but for those done once more.
    """
    preparing, predicting, finishing = (
        partial(attempt, partial(stage, inference)) for stage in (prepare, predict, finish)
    )
    once_more = []
    with stage_thread(inference.device) as reader, stage_thread(inference.device) as writer:
        prepared = in_thread(reader, preparing, starmap(Segmentation, scans.items()))
        try:
            for scan in in_thread(writer, finishing, map(predicting, prepared)):
                if scan.out_of_memory:
                    once_more.append(Segmentation(scan.case, scan.file))
                else:
                    yield scan
        except KeyboardInterrupt:
            print("interrupted; what is being written is finished first", file=sys.stderr)
            raise
    yield from map(finishing, map(predicting, map(preparing, once_more)))


def choose_inference_precision(name: str, trained_in: str, device: torch.device) -> torch.dtype:
    """The type that convolutions are computed in; "auto" is float32 on a CPU and the training's setting on a GPU.

    Raises:
        ValueError: for fp16 on a CPU.
    """
    if device.type != "cpu":
        return choose_precision(trained_in if name == "auto" else name, device)
    if name == "fp16":
        # Hundreds of times the seconds of float32, on a processor that has bf16 (RESULTS.md).
        raise ValueError("--precision: got fp16 on a CPU, where it is very slow; expected auto, float32 or bf16")
    return torch.bfloat16 if name == "bf16" else torch.float32


def main() -> int:
    """Load the network once, then predict case by case."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    with refusing(USAGE):
        device = choose_device(own_device(check("device", arguments.device, "--device")))
        check("precision", arguments.precision, "--precision")
        reading = choose_reading(arguments)
        group = join_group(torch.device("cpu"))  # there is little to tell one another
        with nullcontext() if group.first else redirect_stderr(io.StringIO()):
            found, refused = find_inputs(arguments.inputs)
        cases = select_cases(found, arguments.cases) if found else {}
        if found and arguments.series is not None and not any(scan.is_dir() for scan in cases.values()):
            raise ValueError("--series: none of the scans is DICOM, expected the folder of a series; leave it out")
        check_inputs_are_elsewhere(output, [*cases.values(), *(path for path in refused if not path.is_dir())])
        if found:
            prepare_folder(output, cases)
            networks, checkpoint = load_networks(arguments.checkpoint, device)
            precision = choose_inference_precision(arguments.precision, checkpoint["config"].precision, device)
    if group.first and arguments.cases is None and not arguments.skip_existing:
        for case in {named_case(path) for path in refused} - found.keys():
            set_aside(output, case)
    if not found:
        leave_group(group)
        return REFUSED
    if arguments.skip_existing:
        cases = {case: scan for case, scan in cases.items() if not is_finished(output, case, arguments.probabilities)}
    group.wait()  # until all have looked at the folder, so that all share the same cases out
    own = dict(list(cases.items())[group.rank :: group.size])

    config, training_data = checkpoint["config"], checkpoint["training_data"]
    asked_for = (output, arguments.probabilities, reading, arguments.series)
    inference = Inference(networks, config, training_data, device, precision, *asked_for)
    failed = segment_into(inference, own, group.first)
    done = {case: scan for case, scan in own.items() if case not in failed}
    unreported = []
    with refusing(REFUSED):
        if arguments.report:
            unreported = report_on(inference, done, arguments.checkpoint, checkpoint)
        else:
            for path in (path for case in done for path in report_files(output, case)):
                rename_old(path, f"{path.parent.name}: segmented without --report")
        failed, unreported = (sorted(chain(*group.gather(names))) for names in (failed, unreported))
        if group.first:
            print(f"{len(cases) - len(failed)} of {len(cases)} scans segmented into {output}")
            if arguments.report:
                list_reports(output)
            if failed or refused or unreported:
                names = [*failed, *map(str, refused), *(f"{case} (its report)" for case in unreported)]
                print(f"error: failed: {', '.join(names)}", file=sys.stderr)
    leave_group(group)
    return REFUSED if failed or refused or unreported else DONE


def list_reports(output: Path) -> None:
    """Write the page that leads to all reports in the output folder, where there is one."""
    from visualization.report import write_index

    if (output / REPORTS).is_dir():
        print(f"reports in {write_index(output / REPORTS)}")


def segment_into(inference: Inference, cases: dict[str, Path], show: bool) -> list[str]:
    """Segment cases into the output folder, with a progress bar if asked to; those that failed, named and set aside."""
    failed = []
    with closing(segment_all(inference, cases)) as segmented:
        for scan in tqdm(segmented, total=len(cases), desc="scans", disable=None if show else True):
            if scan.failure:
                print_error(ValueError(scan.failure))
                set_aside(inference.output, scan.case)
                failed.append(scan.case)
    return failed


def report_on(inference: Inference, cases: dict[str, Path], paths: Sequence[str], checkpoint: dict) -> list[str]:
    """Write a page for each segmented case, and one that lists them; the cases without, which are named."""
    from visualization.report import provenance_of, write_reports

    quiet = replace(inference.reading, warn=lambda _: None)  # what there is to say was said when it was segmented
    made_by = provenance_of(paths, checkpoint) | {"computed in": str(inference.precision).removeprefix("torch.")}
    return write_reports(
        inference.output, cases, lambda file: read(inference, file, quiet), inference.config.organs, made_by
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Segment CT scans with a trained V-Net.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a NIfTI file, a folder of them, or a DICOM series")
    parser.add_argument(
        "--checkpoint",
        required=True,
        nargs="+",
        metavar="FILE",
        help="best.pt or last.pt of a run; of several, as of all folds, the probabilities are averaged",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the label maps and volumes.csv")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        help="auto, float32, bf16 or fp16 (default: auto: the training's on a GPU, float32 on a CPU)",
    )
    parser.add_argument("--skip-existing", action="store_true", help="leave out scans whose label map is there")
    parser.add_argument("--probabilities", action="store_true", help="write CASE_probabilities.nii.gz too")
    parser.add_argument("--report", action="store_true", help="write a page with pictures for each case, in reports/")
    parser.add_argument("--series", metavar="UID", help="of a DICOM folder with several series, the one to segment")
    parser.add_argument(
        "--max-gib",
        default=str(MAX_GIB),
        metavar="GIB",
        help=f"refuse scans of more memory than this (default: {MAX_GIB:g})",
    )
    parser.add_argument(
        "--assume-ras", action="store_true", help="take files that do not say where they lie to be in RAS+ order"
    )
    parser.add_argument(
        "--replace-nonfinite", action="store_true", help="make air of NaN and infinite voxels, instead of refusing them"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
