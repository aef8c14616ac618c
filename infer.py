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
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.checkpoint import load_network
from core.config import Config, check
from core.exits import DONE, REFUSED, USAGE, is_out_of_memory, print_error, refusing, run_command
from core.files import whole_file
from core.preprocess import (
    Geometry,
    load_scan,
    logits_to_labels,
    prepare_image,
    save_label_map,
    save_probabilities,
)
from core.step import autocast, choose_device, choose_precision
from dataset import find_scans, hu_percentiles, select_cases
from vnet import VNet

VOLUME_COLUMNS = ["case", "id", "organ", "ml"]
EXTENT_TOLERANCE = 0.25  # a scan may be this much smaller or larger than every training case before infer.py warns
HU_TOLERANCE = 50.0  # HU by which the body's HU percentiles may lie outside those of the training cases


@torch.inference_mode()
def predict(network: VNet, voxels: np.ndarray, config: Config, device: torch.device) -> torch.Tensor:
    """Run the network on a scan, (X, Y, Z) float32 in HU and RAS+ order: logits (K, *config.size) float32."""
    image = torch.from_numpy(prepare_image(voxels, config.size, config.window_hu)).to(device).float() / 255
    with autocast(device, choose_precision(config.precision if device.type == "cuda" else "auto", device)):
        return network(image[None, None])[0].float()


def segment(
    case: str, scan: Path, network: VNet, checkpoint: dict, device: torch.device, output: Path, probabilities: bool
) -> None:
    """Predict a scan and write its label map and volumes, and its probabilities if asked to.

    Raises:
        OSError, ValueError: when the scan cannot be read, the network's output is not finite, or a file not written.
    """
    voxels, geometry = load_scan(scan)
    unlike = differences(voxels, geometry, checkpoint["training_data"])
    if unlike:
        tqdm.write(
            f"warning: case {case}: unlike the training cases, expect a poor prediction: {', '.join(unlike)}",
            file=sys.stderr,
        )
    config = checkpoint["config"]
    logits = predict(network, voxels, config, device)
    if not torch.isfinite(logits).all():
        raise ValueError(f"case {case}: the network's output is not finite, so that no label map can be made of it")
    labels = logits_to_labels(logits, geometry.shape)
    volumes_ml = np.bincount(labels.ravel(), minlength=len(config.organs)) * geometry.voxel_ml
    if probabilities:
        save_probabilities(logits, geometry, output / f"{case}_probabilities.nii.gz")
    write_volumes(output / "volumes.csv", case, volumes_ml, config.organs)
    # The label map comes last: --skip-existing takes it as the sign that all of the case is done.
    save_label_map(labels, geometry, output / f"{case}.nii.gz")


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


def main() -> int:
    """Load the network once, then predict case by case."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    with refusing(USAGE):
        device = choose_device(check("device", arguments.device, "--device"))
        found, refused = find_inputs(arguments.inputs)
        if not found:
            return REFUSED
        cases = select_cases(found, arguments.cases)
        prepare_output(output, cases.values())
        network, checkpoint = load_network(arguments.checkpoint, device)
    if arguments.skip_existing:
        endings = ["", "_probabilities"] if arguments.probabilities else [""]
        done = {case for case in cases if all((output / f"{case}{end}.nii.gz").is_file() for end in endings)}
        cases = {case: scan for case, scan in cases.items() if case not in done}

    failed = []
    for case, scan in tqdm(cases.items(), desc="scans", disable=None):
        try:
            segment(case, scan, network, checkpoint, device, output, arguments.probabilities)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            print_error(error if case in str(error) else ValueError(f"case {case}: {error}"))
            failed.append(case)
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
    parser.add_argument("--skip-existing", action="store_true", help="leave out scans whose label map is there")
    parser.add_argument("--probabilities", action="store_true", help="write CASE_probabilities.nii.gz too")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
