"""Segment CT scans with a trained V-Net.

    python infer.py INPUT [INPUT ...] --checkpoint runs/vnet/best.pt --output predictions

INPUT is a NIfTI file or a folder of them. Writes OUTPUT/CASE.nii.gz, a label map in the scan's own geometry, for each
scan, and OUTPUT/volumes.csv with every organ's volume in mL. Size, HU window and organs come from the checkpoint.
Exit code 0: done, 1: some scan was refused (the others are done), 2: wrong usage.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from core.checkpoint import load_network
from core.config import Config
from core.exits import DONE, REFUSED, USAGE, print_error, refusing
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

EXTENT_TOLERANCE = 0.25  # a scan may be this much smaller or larger than every training case before infer.py warns
HU_TOLERANCE = 50.0  # HU by which the body's HU percentiles may lie outside those of the training cases


@torch.inference_mode()
def predict(network: VNet, voxels: np.ndarray, config: Config, device: torch.device) -> torch.Tensor:
    """Run the network on a scan, (X, Y, Z) float32 in HU and RAS+ order: logits (K, *config.size) float32."""
    image = torch.from_numpy(prepare_image(voxels, config.size, config.window_hu)).to(device).float() / 255
    with autocast(device, choose_precision("auto", device)):
        return network(image[None, None])[0].float()


def segment(
    case: str, scan: Path, network: VNet, checkpoint: dict, device: torch.device, output: Path, probabilities: bool
) -> np.ndarray:
    """Predict a scan and write its label map; the volumes in mL by id, (K,).

    Raises:
        FileNotFoundError, ValueError: when the scan cannot be read.
    """
    voxels, geometry = load_scan(scan)
    unlike = differences(voxels, geometry, checkpoint["training_data"])
    if unlike:
        tqdm.write(
            f"warning: case {case}: unlike the training cases, expect a poor prediction: {', '.join(unlike)}",
            file=sys.stderr,
        )
    logits = predict(network, voxels, checkpoint["config"], device)
    labels = logits_to_labels(logits, geometry.shape)
    save_label_map(labels, geometry, output / f"{case}.nii.gz")
    if probabilities:
        save_probabilities(logits, geometry, output / f"{case}_probabilities.nii.gz")
    return np.bincount(labels.ravel(), minlength=len(logits)) * geometry.voxel_ml


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


def write_volumes(path: Path, volumes_ml: dict[str, Sequence[float]], organs: Sequence[str]) -> None:
    """Put the volumes of cases, each (K,) in mL by id, into volumes.csv; rows of other cases stay."""
    rows = []
    if path.is_file():
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["case"] not in volumes_ml]
    for case, values in volumes_ml.items():
        for i, organ in enumerate(organs[1:], start=1):
            rows.append({"case": case, "id": i, "organ": organ, "ml": f"{values[i]:.3f}"})
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "id", "organ", "ml"])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["case"], int(row["id"]))))


def main() -> int:
    """Load the network once, then predict case by case."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    with refusing(USAGE):
        device = choose_device(arguments.device)
        network, checkpoint = load_network(arguments.checkpoint, device)
        output.mkdir(parents=True, exist_ok=True)
    with refusing(REFUSED):
        found = find_scans(arguments.inputs)
    with refusing(USAGE):
        cases = select_cases(found, arguments.cases)
        for case, scan in cases.items():
            if scan.resolve() == (output / f"{case}.nii.gz").resolve():
                raise ValueError(f"--output: {output} would replace the scan {scan}; choose another folder")
    if arguments.skip_existing:
        cases = {case: scan for case, scan in cases.items() if not (output / f"{case}.nii.gz").is_file()}

    failed = []
    for case, scan in tqdm(cases.items(), desc="scans", disable=None):
        try:
            volumes_ml = segment(case, scan, network, checkpoint, device, output, arguments.probabilities)
            write_volumes(output / "volumes.csv", {case: volumes_ml}, checkpoint["config"].organs)
        except (ValueError, OSError) as error:
            print_error(error)
            failed.append(case)
    print(f"{len(cases) - len(failed)} of {len(cases)} scans segmented into {output}")
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return REFUSED if failed else DONE


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
    sys.exit(main())
