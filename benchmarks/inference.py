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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import machine, print_result
from benchmarks.peers import NO_MONAI, MonaiPipeline, monai_installed
from benchmarks.train_step import clock, ratios, summarise
from core.checkpoint import load_network
from core.config import Config, load_config
from core.inference.output_folder import OutputFolder
from core.inference.stages import Segmentation, run_overlapped
from core.network import build_network
from core.scans.files import find_scans
from core.scans.resample import logits_to_labels
from core.scans.typical import HU_PERCENTILES
from core.scans.volumes import load_scan, prepare_image, save_label_map
from core.system.exits import DONE, USAGE, refusing, run_command
from core.training.setup import choose_device
from data.make_phantom import write_phantom
from infer import Inference, finish, predict, prepare
from vnet import VNet, check_size

SHAPE = (512, 512, 100)  # voxels of a clinical scan
STAGES = ("read", "resize", "forward", "restore", "write")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
PROJECT, PEER, IN_TURN = "project", "MONAI", "in turn"
# Ranges that no scan lies outside of, so that there is nothing to warn about.
ANY_SCAN = {
    "extent_mm": {"min": [0.0] * 3, "max": [np.inf] * 3},
    "percentiles": list(HU_PERCENTILES),
    "hu_percentiles": {"min": [-np.inf] * len(HU_PERCENTILES), "max": [np.inf] * len(HU_PERCENTILES)},
}


@dataclass
class Contender:
    """One way to segment all scans; `run` returns the seconds of each stage, or none where stages overlap."""

    name: str
    precision: str
    overlaps: bool
    run: Callable[[], dict[str, float]]
    output: Path
    seconds: list[float] = field(default_factory=list)  # per scan, a number for each turn
    stages: list[dict[str, float]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the table calls it."""
        return f"{self.name}, {self.precision}" + ("" if self.overlaps else f", {IN_TURN}")


def run_project(inference: Inference, scans: dict[str, Path]) -> dict[str, float]:
    """Segment scans as infer.py does."""
    stages = [partial(stage, inference) for stage in (prepare, predict, finish)]
    for scan in run_overlapped(stages, scans, inference.device):
        if scan.failure:
            raise ValueError(scan.failure)
    return {}


def run_project_in_turn(inference: Inference, scans: dict[str, Path]) -> dict[str, float]:
    """Segment scans with the functions of infer.py's stages, one after the other: the seconds of each."""
    config, seconds = inference.config, dict.fromkeys(STAGES, 0.0)
    for case, file in scans.items():
        times = [clock(inference.device)]
        voxels, geometry = load_scan(file)
        times.append(clock(inference.device))
        scan = Segmentation(case, file, geometry, image=prepare_image(voxels, config.size, config.window_hu))
        del voxels
        times.append(clock(inference.device))
        predict(inference, scan)
        times.append(clock(inference.device))
        labels = logits_to_labels(scan.logits, geometry.shape)
        times.append(clock(inference.device))
        save_label_map(labels, geometry, inference.output.label_map(case))
        times.append(clock(inference.device))
        add_stages(seconds, times)
    return seconds


def run_monai_in_turn(pipeline: MonaiPipeline, scans: dict[str, Path]) -> dict[str, float]:
    """Do the same with MONAI's transforms."""
    seconds = dict.fromkeys(STAGES, 0.0)
    stages = (pipeline.read, pipeline.resize, pipeline.forward, pipeline.restore, pipeline.write)
    for file in scans.values():
        times, item = [clock(pipeline.device)], {"image": str(file)}
        for stage in stages:
            item = stage(item)
            times.append(clock(pipeline.device))
        add_stages(seconds, times)
    return seconds


def add_stages(seconds: dict[str, float], times: list[float]) -> None:
    """Add the time between one reading of the clock and the next to each stage's seconds."""
    for i, stage in enumerate(STAGES):
        seconds[stage] += times[i + 1] - times[i]


def make_contenders(
    network: VNet, config: Config, device: torch.device, scans: dict[str, Path], folder: Path
) -> list[Contender]:
    """Infer.py and MONAI, in both precisions, each in both ways; every one writes into a folder of its own."""
    contenders = []

    def add(name: str, precision: str, overlaps: bool, run: Callable, way: Any) -> None:
        contenders.append(Contender(name, precision, overlaps, lambda: run(way, scans), folder / f"{name}_{precision}"))

    for precision, dtype in PRECISIONS.items():
        output = folder / f"{PROJECT}_{precision}"
        output.mkdir()
        inference = Inference([network], config, ANY_SCAN, device, dtype, OutputFolder(output))
        add(PROJECT, precision, True, run_project, inference)
        add(PROJECT, precision, False, run_project_in_turn, inference)
        if monai_installed():
            pipeline = MonaiPipeline(network, config, device, dtype, folder / f"{PEER}_{precision}")
            add(PEER, precision, True, lambda way, scans: way.run(list(scans.values())) or {}, pipeline)
            add(PEER, precision, False, run_monai_in_turn, pipeline)
    return contenders


def take_turns(contenders: list[Contender], scans: int, repeats: int, device: torch.device) -> None:
    """Let each contender do all scans once a turn; the first turn warms up and is not counted."""
    for turn in range(1 + repeats):
        for contender in contenders:
            started = clock(device)
            stages = contender.run()
            seconds = clock(device) - started
            if turn:
                contender.seconds.append(seconds / scans)
                contender.stages.append({stage: total / scans for stage, total in stages.items()})


def same_voxels(project: Path, monai: Path, scans: dict[str, Path]) -> float:
    """Return the share of voxels that have the same organ in both folders' label maps, averaged over the scans."""
    shares = []
    for case, file in scans.items():
        maps = [np.asarray(nib.load(path).dataobj) for path in (project / f"{case}.nii.gz", monai / file.name)]
        shares.append(float(np.mean(maps[0] == maps[1])))
    return statistics.mean(shares)


def measure(
    network: VNet, config: Config, device: torch.device, scans: dict[str, Path], repeats: int
) -> dict[str, Any]:
    """Let the contenders take turns on the scans."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = make_contenders(network, config, device, scans, Path(folder))
        take_turns(contenders, len(scans), repeats, device)
        outputs = {(each.name, each.precision): each.output for each in contenders}
        same = {p: same_voxels(outputs[PROJECT, p], outputs[PEER, p], scans) for n, p in outputs if n == PEER}
    ways = {(each.name, each.precision, each.overlaps): each for each in contenders}
    rows = {}
    for each in contenders:
        peer = ways.get((PEER, each.precision, True))
        rows[each.title] = {
            "scan_s": summarise(each.seconds),
            "to_monai": peer and ratios(each.seconds, peer.seconds),
            "to_in_turn": ratios(each.seconds, ways[each.name, each.precision, False].seconds),
            "stages_s": {stage: summarise([turn[stage] for turn in each.stages]) for stage in each.stages[0]},
        }
    return {
        "scans": [list(nib.load(file).shape) for file in scans.values()],
        "size": list(config.size),
        "channels": config.channels,
        "device": str(device),
        "repeats": repeats,
        "contenders": rows,
        "same_voxels_as_monai": same,
        "notes": [] if monai_installed() else [NO_MONAI],
        "machine": machine(),
    }


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    titles = ("s a scan", "min", "max", "to MONAI", "to in turn", *STAGES)
    lines = [f"{'':<28}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in result["contenders"].items():
        numbers = [row["scan_s"][key] for key in ("median", "min", "max")]
        found = [row["to_monai"], row["to_in_turn"], *(row["stages_s"].get(stage) for stage in STAGES)]
        numbers += [each and each["median"] for each in found]
        lines.append(f"{name:<28}" + "".join(f"{'-':>11}" if n is None else f"{n:>11.3f}" for n in numbers))
    shapes = ", ".join(sorted({"x".join(map(str, shape)) for shape in result["scans"]}))
    size = "x".join(map(str, result["size"]))
    title = (
        f"{len(result['scans'])} scans of {shapes} by a network of {result['channels']} channels at {size} "
        f"on {result['device']}, n = {result['repeats']}"
    )
    same = [f"{p}: {share:.2%} of the voxels as MONAI has them" for p, share in result["same_voxels_as_monai"].items()]
    return [title, *lines, *same, *result["notes"]]


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
    check_size(config.size, len(config.up_convs))
    torch.manual_seed(config.seed)
    return build_network(config).to(device).eval(), config


def main() -> int:
    """Measure, and print."""
    arguments = parse_arguments()
    with refusing(USAGE), tempfile.TemporaryDirectory() as folder:
        for flag in ("repeats", "cases"):
            if getattr(arguments, flag) < 1:
                raise ValueError(f"--{flag}: got {getattr(arguments, flag)}, expected 1 or more")
        device = choose_device(arguments.device)
        network, config = get_network(arguments, device)
        if not arguments.scans:
            write_phantom(Path(folder), arguments.cases, tuple(arguments.shape), seed=0)
        scans = find_scans(arguments.scans or folder)
        result = measure(network, config, device, scans, arguments.repeats)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time infer.py, and the same job with MONAI's transforms beside it.")
    three = {"nargs": 3, "type": int, "metavar": ("X", "Y", "Z")}
    parser.add_argument("--checkpoint", metavar="FILE", help="a trained network (default: an untrained one)")
    parser.add_argument("--size", **three, help="of the untrained network's grid (default: that of config.yaml)")
    parser.add_argument("--scans", metavar="DIR", help="a folder of scans (default: phantoms)")
    parser.add_argument("--shape", **three, default=SHAPE, help="voxels of a phantom (default: 512 512 100)")
    parser.add_argument("--cases", type=int, default=3, metavar="N", help="phantoms (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns after the warm-up (default: 3)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
