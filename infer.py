"""Segment CT scans with a trained V-Net.

    python infer.py INPUT [INPUT ...] --checkpoint runs/vnet/best.pt --output predictions

INPUT is a NIfTI file or a folder of them. Writes OUTPUT/CASE.nii.gz, a label map in the scan's own geometry, for each
scan, and OUTPUT/volumes.csv with every organ's volume in mL. Size, HU window and organs come from the checkpoint.
Exit code 0: done, 1: some input or scan was refused (the others are done), 2: wrong usage.
"""

import argparse
import csv
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.checkpoint import load_network
from core.config import Config, check
from core.exits import DONE, REFUSED, USAGE, is_out_of_memory, print_error, refusing, run_command
from core.files import whole_file
from core.preprocess import Geometry, load_scan, prepare_image, save_label_map, save_probabilities
from core.resample import logits_to_labels
from core.step import autocast, choose_device, choose_precision
from dataset import find_scans, hu_percentiles, select_cases
from vnet import VNet

VOLUME_COLUMNS = ["case", "id", "organ", "ml"]
EXTENT_TOLERANCE = 0.25  # a scan may be this much smaller or larger than every training case before infer.py warns
HU_TOLERANCE = 50.0  # HU by which the body's HU percentiles may lie outside those of the training cases


@dataclass(frozen=True)
class Inference:
    """All that segmenting a scan works with.

    Attributes:
        network: ready to predict, on `device`.
        config: the settings that it was trained under.
        training_data: what its training cases were like.
        device: where it runs.
        precision: the type that convolutions are computed in.
        output: the folder for the results.
        probabilities: whether they are written too.
    """

    network: VNet
    config: Config
    training_data: dict
    device: torch.device
    precision: torch.dtype
    output: Path
    probabilities: bool


@dataclass
class Segmentation:
    """A scan on its way to a label map; each stage leaves what the next one needs, and drops what it took itself.

    Attributes:
        case: the scan's id.
        file: where it is read from.
        geometry: its geometry, once it is read.
        image: (X, Y, Z) uint8, what the network is to see.
        logits: (K, X, Y, Z) float32, what it gave.
        failure: why no stage can go on with it.
        out_of_memory: whether that was for want of memory.
    """

    case: str
    file: Path
    geometry: Geometry | None = None
    image: np.ndarray | None = None
    logits: torch.Tensor | None = None
    failure: str | None = None
    out_of_memory: bool = False


# ---- The three stages ------------------------------------------------------------------------------------------------


def prepare(inference: Inference, scan: Segmentation) -> None:
    """Read a scan and resize it to the network's grid; warn if it is unlike the training cases.

    Raises:
        OSError, ValueError: when it cannot be read.
    """
    voxels, scan.geometry = load_scan(scan.file)
    unlike = differences(voxels, scan.geometry, inference.training_data)
    if unlike:
        tqdm.write(
            f"warning: case {scan.case}: unlike the training cases, expect a poor prediction: {', '.join(unlike)}",
            file=sys.stderr,
        )
    scan.image = prepare_image(voxels, inference.config.size, inference.config.window_hu)


@torch.inference_mode()
def predict(inference: Inference, scan: Segmentation) -> None:
    """Run the network on a prepared scan."""
    image = torch.from_numpy(scan.image).to(inference.device).float() / 255  # (X, Y, Z) in 0..1
    with autocast(inference.device, inference.precision):
        scan.logits = inference.network(image[None, None])[0].float()  # (K, X, Y, Z)
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
        save_probabilities(logits, geometry, inference.output / f"{scan.case}_probabilities.nii.gz")
    write_volumes(inference.output / "volumes.csv", scan.case, voxels * geometry.voxel_ml, organs)
    # The label map comes last: --skip-existing takes it as the sign that all of the case is done.
    save_label_map(labels, geometry, inference.output / f"{scan.case}.nii.gz")


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
    preparing, predicting, finishing = (partial(attempt, stage, inference) for stage in (prepare, predict, finish))
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


def attempt(stage: Callable[[Inference, Segmentation], None], inference: Inference, scan: Segmentation) -> Segmentation:
    """Take a scan through a stage, unless it has failed before; a failure is noted, so that the other scans go on."""
    if scan.failure:
        return scan
    try:
        stage(inference, scan)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        scan.out_of_memory = is_out_of_memory(error.__cause__ or error)
        if isinstance(error, RuntimeError) and not scan.out_of_memory:
            raise
        # In words, since the error itself would keep alive all that the stage was working on.
        reason = str(error) or type(error).__name__
        scan.failure = reason if reason.startswith(str(scan.file)) else f"case {scan.case}: {reason}"
        scan.image = scan.logits = None
    return scan


@contextmanager
def stage_thread(device: torch.device) -> Iterator[Executor]:
    """A thread for one stage. When the block ends, it finishes what it is at, but nothing that still waits."""
    # On a CPU the network has all cores, and more threads beside it would wait for one another. torch keeps this number
    # thread by thread: the main thread's stays.
    cores = 1 if device.type == "cpu" else torch.get_num_threads()
    thread = ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(cores,))
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def in_thread(
    thread: Executor, stage: Callable[[Segmentation], Segmentation], scans: Iterable[Segmentation]
) -> Iterator[Segmentation]:
    """Take scans through a stage, in order: the thread is at work on the next one while the caller is on this one."""
    running = None
    for scan in scans:
        following = thread.submit(stage, scan)
        if running:
            yield running.result()
        running = following
    if running:
        yield running.result()


# ---- What a scan is beside the training cases ------------------------------------------------------------------------


def differences(voxels: np.ndarray, geometry: Geometry, training_data: dict) -> list[str]:
    """In words, what sets a scan apart from all the cases that the network was trained on, theirs in brackets."""
    found = []
    extent = training_data["extent_mm"]
    for axis, mm, low, high in zip("XYZ", geometry.extent_mm, extent["min"], extent["max"], strict=True):
        if not low * (1 - EXTENT_TOLERANCE) <= mm <= high * (1 + EXTENT_TOLERANCE):
            found.append(f"it covers {mm:.0f} mm along {axis} ({low:.0f} to {high:.0f})")
    ranges = training_data["hu_percentiles"]
    rows = zip(training_data["percentiles"], hu_percentiles(voxels), ranges["min"], ranges["max"], strict=True)
    for percentile, hu, low, high in rows:
        if not low - HU_TOLERANCE <= hu <= high + HU_TOLERANCE:
            found.append(f"{percentile} % of its body lies below {hu:.0f} HU ({low:.0f} to {high:.0f})")
    return found


def read_volumes(path: Path) -> list[dict]:
    """The rows of a volumes.csv; none when there is no such file.

    Raises:
        ValueError: when the file has other columns.
    """
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != VOLUME_COLUMNS:
            raise ValueError(f"{path}: has the columns {reader.fieldnames}, expected {VOLUME_COLUMNS}; move it away")
        return list(reader)


def write_volumes(path: Path, case: str, volumes_ml: Sequence[float], organs: Sequence[str]) -> None:
    """Put the volumes of a case, (K,) in mL by id, into volumes.csv; the rows of other cases stay."""
    rows = [row for row in read_volumes(path) if row["case"] != case]
    for i, organ in enumerate(organs[1:], start=1):
        rows.append({"case": case, "id": i, "organ": organ, "ml": f"{volumes_ml[i]:.3f}"})
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, VOLUME_COLUMNS)
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["case"], int(row["id"]))))


def find_inputs(inputs: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """The scans of the inputs by case id, and the inputs that had to be refused, each named on stderr.

    Raises:
        ValueError: when two inputs mean the same case.
    """
    refused = []
    for path in inputs:
        try:
            find_scans([path])
        except (ValueError, OSError) as error:
            print_error(error)
            refused.append(path)
    return find_scans([path for path in inputs if path not in refused]), refused


def prepare_output(output: Path, scans: Iterable[Path]) -> None:
    """Make the folder for the results, where they replace nothing but earlier results.

    Raises:
        OSError, ValueError: when the folder cannot be written to, or holds scans or their reference label maps.
    """
    for scan in scans:
        for folder in (scan.parent.resolve(), scan.resolve().parent):  # where a link stands, and where it leads
            if output.resolve() == folder:
                raise ValueError(f"--output: {output} holds the scan {scan}; choose another folder")
            if folder.name == "images" and output.resolve() == folder.parent / "labels":
                raise ValueError(f"--output: {output} holds the data's own label maps; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    # Whoever may not write there learns it now, not after the work.
    tempfile.TemporaryFile(dir=output).close()
    read_volumes(output / "volumes.csv")


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
        device = choose_device(check("device", arguments.device, "--device"))
        check("precision", arguments.precision, "--precision")
        found, refused = find_inputs(arguments.inputs)
        if not found:
            return REFUSED
        cases = select_cases(found, arguments.cases)
        prepare_output(output, cases.values())
        network, checkpoint = load_network(arguments.checkpoint, device)
        precision = choose_inference_precision(arguments.precision, checkpoint["config"].precision, device)
    if arguments.skip_existing:
        endings = ["", "_probabilities"] if arguments.probabilities else [""]
        done = {case for case in cases if all((output / f"{case}{end}.nii.gz").is_file() for end in endings)}
        cases = {case: scan for case, scan in cases.items() if case not in done}

    config, training_data = checkpoint["config"], checkpoint["training_data"]
    inference = Inference(network, config, training_data, device, precision, output, arguments.probabilities)
    failed = []
    with closing(segment_all(inference, cases)) as segmented:
        for scan in tqdm(segmented, total=len(cases), desc="scans", disable=None):
            if scan.failure:
                print_error(ValueError(scan.failure))
                failed.append(scan.case)
    print(f"{len(cases) - len(failed)} of {len(cases)} scans segmented into {output}")
    if failed or refused:
        print(f"error: failed: {', '.join(failed + refused)}", file=sys.stderr)
        return REFUSED
    return DONE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Segment CT scans with a trained V-Net.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a NIfTI file, or a folder of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="best.pt or last.pt of a run")
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
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
