"""Seconds per scan of infer.py, and of the same job written with MONAI's transforms.

    python -m benchmarks.inference                                             # the default network, phantoms
    python -m benchmarks.inference --size 128 128 64 --cases 2                 # minutes on two cores
    python -m benchmarks.inference --checkpoint runs/vnet/best.pt --scans DIR  # a trained network, scans of your own
    python -m benchmarks.inference --json                                      # only the line of JSON

From the scan's file to the label map's file, in float32 and in bf16. The same network runs in both, so that only what
is around it differs: reading, resizing, restoring to the scan's grid, writing. Each does it twice: as it is meant to be
used (infer.py with its overlapping stages, MONAI with a loader's process that reads ahead), and "in turn", one stage
after the other, which tells the stages' seconds. Ratios are taken within a turn of all. Start-up is not in it.

Without --checkpoint the network is untrained. Its label maps are noise, which restoring and writing take longer for.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import measuring, peers
from core.checkpoint import load_network
from core.config import Config, load_config
from core.inference.output_folder import OutputFolder
from core.inference.stages import Segmentation, run_overlapped
from core.network import build_network
from core.scans.files import find_scans
from core.scans.resample import logits_to_labels
from core.scans.typical import HU_PERCENTILES
from core.scans.volumes import load_scan, prepare_image, save_label_map
from core.system.exits import print_warning, run_command
from core.training.device import choose_device, choose_precision
from data.make_phantom import write_phantom
from infer import Inference, finish, predict, prepare
from vnet import VNet

SHAPE = (512, 512, 100)  # voxels of a clinical scan
PRECISIONS = ("float32", "bf16")
PROJECT, PEER, IN_TURN = "project", "MONAI", "in turn"
# Ranges that no scan lies outside of, so that there is nothing to warn about.
ANY_SCAN = {
    "extent_mm": {"min": [0.0] * 3, "max": [np.inf] * 3},
    "percentiles": list(HU_PERCENTILES),
    "hu_percentiles": {"min": [-np.inf] * len(HU_PERCENTILES), "max": [np.inf] * len(HU_PERCENTILES)},
}


def run_project(inference: Inference, scans: dict[str, Path], _: measuring.Laps) -> None:
    """Segment scans as infer.py does."""
    stages = [partial(stage, inference) for stage in (prepare, predict, finish)]
    for scan in run_overlapped(stages, scans, inference.device):
        if scan.failure:
            raise ValueError(scan.failure)


def run_project_in_turn(inference: Inference, scans: dict[str, Path], lap: measuring.Laps) -> None:
    """Segment scans with the functions of infer.py's stages, one after the other."""
    config = inference.config
    for case, file in scans.items():
        voxels, geometry = load_scan(file)
        lap("read")
        scan = Segmentation(case, file, geometry, image=prepare_image(voxels, config.size, config.window_hu))
        del voxels
        lap("resize")
        predict(inference, scan)
        lap("forward")
        labels = logits_to_labels(scan.logits, geometry.shape)
        lap("restore")
        save_label_map(labels, geometry, inference.output.label_map(case))
        lap("write")


def run_monai(pipeline: peers.MonaiPipeline, scans: dict[str, Path], _: measuring.Laps) -> None:
    """Do the same with MONAI's transforms, while a process of its own reads ahead."""
    pipeline.run(list(scans.values()))


def run_monai_in_turn(pipeline: peers.MonaiPipeline, scans: dict[str, Path], lap: measuring.Laps) -> None:
    """Do the same with MONAI's transforms, one after the other."""
    for file in scans.values():
        item = {"image": str(file)}
        for stage in ("read", "resize", "forward", "restore", "write"):
            item = getattr(pipeline, stage)(item)
            lap(stage)


def make_contenders(
    network: VNet, config: Config, device: torch.device, scans: dict[str, Path], folder: Path
) -> dict[tuple[str, str], list[measuring.Contender]]:
    """Make infer.py and MONAI in both precisions, (name, precision): as it is meant to be used, and in turn.

    Each pair writes into a folder of its own, `output_of`.
    """
    contenders = {}

    def add(name: str, precision: str, whole: Callable, in_turn: Callable, job: Any) -> None:
        contenders[name, precision] = [
            measuring.Contender(f"{name}, {precision}", partial(whole, job, scans)),
            measuring.Contender(f"{name}, {precision}, {IN_TURN}", partial(in_turn, job, scans)),
        ]

    for precision in PRECISIONS:
        try:
            dtype = choose_precision(precision, device)
        except ValueError as error:  # the device does not compute in it
            print_warning(f"left out: {error}")
            continue
        output = output_of(folder, PROJECT, precision)
        output.mkdir()
        inference = Inference([network], config, ANY_SCAN, device, dtype, OutputFolder(output))
        add(PROJECT, precision, run_project, run_project_in_turn, inference)
        if peers.monai_installed():
            pipeline = peers.MonaiPipeline(network, config, device, dtype, output_of(folder, PEER, precision))
            add(PEER, precision, run_monai, run_monai_in_turn, pipeline)
    return contenders


def output_of(folder: Path, name: str, precision: str) -> Path:
    """Return the folder of a contender's label maps."""
    return folder / f"{name}_{precision}"


def same_voxels(project: Path, monai: Path, scans: dict[str, Path]) -> float:
    """Return the share of voxels that have the same organ in both folders' label maps, averaged over the scans."""
    shares = []
    for case, file in scans.items():
        maps = [np.asarray(nib.load(path).dataobj) for path in (project / f"{case}.nii.gz", monai / file.name)]
        shares.append(float(np.mean(maps[0] == maps[1])))
    return statistics.mean(shares)


def compete(
    network: VNet, config: Config, device: torch.device, scans: dict[str, Path], repeats: int
) -> dict[str, Any]:
    """Let the contenders take turns on the scans; the first turn warms up and is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = make_contenders(network, config, device, scans, folder)
        measuring.take_turns([each for pair in contenders.values() for each in pair], repeats, device, memory=False)
        same = {
            precision: same_voxels(*(output_of(folder, name, precision) for name in (PROJECT, PEER)), scans)
            for name, precision in contenders
            if name == PEER
        }
    rows = {}
    for (_, precision), pair in contenders.items():
        peer = contenders.get((PEER, precision))
        for each in pair:
            rows[each.name] = {
                "scan_s": measuring.summarise([seconds / len(scans) for seconds in each.seconds]),
                "to_monai": peer and measuring.ratios(each.seconds, peer[0].seconds),
                "to_in_turn": measuring.ratios(each.seconds, pair[1].seconds),
                "stages_s": {
                    stage: measuring.summarise([s / len(scans) for s in laps]) for stage, laps in each.laps.items()
                },
            }
    return {"contenders": rows, "same_voxels_as_monai": same}


def get_network(arguments: argparse.Namespace, device: torch.device) -> tuple[VNet, Config]:
    """Return the network of the checkpoint, or an untrained one.

    Raises:
        OSError, ValueError: when the checkpoint cannot be used, or the size does not fit the network.
    """
    if arguments.checkpoint:
        if arguments.size:
            raise ValueError("--size: the checkpoint has a size of its own; leave out --size or --checkpoint")
        network, checkpoint = load_network(arguments.checkpoint, device)
        return network, checkpoint["config"]
    config = load_config(flags={"size": list(map(str, arguments.size))} if arguments.size else {})
    torch.manual_seed(config.seed)
    return build_network(config).to(device).eval(), config


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on phantoms, or on a user's scans."""
    device = choose_device(arguments.device)
    network, config = get_network(arguments, device)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.scans:
            write_phantom(Path(folder), arguments.cases, tuple(arguments.shape), seed=0)
        scans = find_scans(arguments.scans or folder)
        result = compete(network, config, device, scans, arguments.repeats)
        shapes = [list(nib.load(file).shape) for file in scans.values()]
    return {
        "scans": shapes,
        "size": list(config.size),
        "channels": config.channels,
        "device": str(device),
        "repeats": arguments.repeats,
        **result,
        "notes": peers.monai_notes(),
    }


def main() -> int:
    """Measure, and print."""
    parser = measuring.make_parser(__doc__, repeats=3, device=True)
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained network (default: an untrained one)")
    parser.add_argument("--size", **measuring.THREE, help="of the untrained network's grid (default: config.yaml's)")
    parser.add_argument("--scans", metavar="DIR", help="a folder of scans (default: phantoms)")
    parser.add_argument("--shape", **measuring.THREE, default=SHAPE, help="voxels of a phantom (default: 512 512 100)")
    parser.add_argument("--cases", type=measuring.positive, default=3, metavar="N", help="phantoms (default: 3)")
    return measuring.measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
