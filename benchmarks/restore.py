"""From logits to label maps on a scan's grid: logits_to_labels against plain interpolation and MONAI's transforms.

    python -m benchmarks.restore                                                # logits as a network gives, and random
    python -m benchmarks.restore --checkpoint runs/vnet/best.pt --scan SCAN     # those of a trained network instead
    python -m benchmarks.restore --long                                         # a scan of 512x512x1000 as well
    python -m benchmarks.restore --json                                         # only the line of JSON

Logits (14, 256, 256, 128) to labels (512, 512, 100). Plain is F.interpolate (trilinear) of all classes and argmax. All
take turns; ratios are taken within a turn. The memory is what a way needs above the logits and its answer.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from benchmarks import machine, print_result
from benchmarks.peers import NO_MONAI, monai_installed
from benchmarks.train_step import clock, ratios, summarise, watch_memory
from core.checkpoint import load_network
from core.config import Config, load_config
from core.scans.resample import cells_with_boundary, logits_to_labels, resize_labels
from core.scans.volumes import load_scan, prepare_image
from core.system.exits import DONE, USAGE, refusing, run_command
from core.training.memory_plans import GIB
from core.training.setup import choose_device
from data.make_phantom import make_case

SHAPE = (512, 512, 100)  # voxels of a usual abdominal scan
LONG_SHAPE = (512, 512, 1000)
TIE = 1e-6  # two classes whose plain scores differ by no more are a tie
OURS, PLAIN, PEER = "logits_to_labels", "plain", "MONAI"
# Of the made-up logits: as many cells have a boundary as behind the trained network of RESULTS.md (4.6 %).
CONTRAST, BLUR_VOXELS, NOISE, NOISE_VOXELS = 12.0, 7, 4.3, 4


def network_like_logits(config: Config) -> Tensor:
    """(K, X, Y, Z) logits as a trained network might give: a phantom's organs, blurred, and smooth noise on top."""
    labels = resize_labels(make_case(config.seed, number=1)[1], config.size)
    random = torch.Generator().manual_seed(config.seed)
    logits = torch.empty(len(config.organs), *config.size)
    for k, scores in enumerate(logits):
        share = torch.from_numpy(ndimage.uniform_filter((labels == k).astype(np.float32), BLUR_VOXELS))
        noise = torch.randn(1, 1, *(n // NOISE_VOXELS for n in config.size), generator=random)
        noise = F.interpolate(noise, size=config.size, mode="trilinear")[0, 0]
        torch.add(CONTRAST * share, noise, alpha=NOISE, out=scores)
    return logits


def trained_logits(checkpoint: Path, scan: Path, config: Config) -> Tensor:
    """(K, X, Y, Z) logits of a trained network for a scan, on the settings' grid."""
    network, saved = load_network(checkpoint, torch.device("cpu"))
    image = prepare_image(load_scan(scan)[0], config.size, saved["config"].window_hu)
    with torch.inference_mode():
        return network(torch.from_numpy(image)[None, None].float() / 255)[0].float()


def restore_plainly(logits: Tensor, shape: Sequence[int]) -> Tensor:
    """Restore labels in the plain way, against which logits_to_labels is measured."""
    full = F.interpolate(logits[None], size=tuple(shape), mode="trilinear", align_corners=False)[0]
    return full.argmax(dim=0).to("cpu", torch.uint8)


def restore_with_monai(logits: Tensor, shape: Sequence[int]) -> Tensor:
    """Do the same with MONAI's transforms.

    Raises:
        ImportError: when MONAI is not installed.
    """
    from monai.transforms import AsDiscrete, Resize  # takes seconds to import, and is an optional package

    full = Resize(spatial_size=tuple(shape), mode="trilinear", align_corners=False)(logits)
    return AsDiscrete(argmax=True)(full)[0].to("cpu", torch.uint8)


def compare(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """In how many voxels labels differ from plain ones, and by how much plain scores prefer theirs, at the most.

    Class by class, so that long scans fit.
    """
    shape = tuple(labels.shape)
    best, winner = torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.uint8)
    chosen = torch.empty(shape)
    for k, scores in enumerate(logits):
        scores = F.interpolate(scores[None, None], size=shape, mode="trilinear", align_corners=False)[0, 0].cpu()
        winner.masked_fill_(scores > best, k)
        best = torch.maximum(best, scores)
        chosen = torch.where(labels == k, scores, chosen)
    behind = best - chosen
    differ = winner != labels
    return {
        "voxels_that_differ": int(differ.sum()),
        "of": labels.numel(),
        "largest_gap": float(behind.max()),
        "differ_beyond_ties": int((behind[differ] > TIE).sum()),
    }


def boundary_share(logits: Tensor) -> float:
    """Return the share of cells of eight neighbouring voxels with more than one winning class."""
    return float(cells_with_boundary(logits.argmax(dim=0).to("cpu", torch.uint8).numpy()).mean())


def time_ways(ways: dict[str, Callable], logits: Tensor, shape: Sequence[int], repeats: int) -> dict[str, Any]:
    """Let the ways take turns, after one turn to warm up; the first one's label map is kept."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rise_gib: dict[str, list[float]] = {name: [] for name in ways}
    labels = None
    for turn in range(1 + repeats):
        for name, restore in ways.items():
            read_rise_gib = watch_memory(logits.device)
            started = clock(logits.device)
            restored = torch.as_tensor(restore(logits, shape))
            taken, rise = clock(logits.device) - started, read_rise_gib()
            if name == OURS:
                labels = restored
            if turn > 0:
                seconds[name].append(taken)
                rise_gib[name] += [] if rise is None else [rise]
    on_device = labels.nbytes / GIB if logits.device.type == "cpu" else 0
    return {
        "labels": labels,
        "ways": {
            name: {
                "seconds": summarise(taken),
                "plain_to_this": ratios(seconds[PLAIN], taken) if PLAIN in ways else None,
                "gib_above_logits_and_labels": summarise([max(0, rise - on_device) for rise in rise_gib[name]]),
            }
            for name, taken in seconds.items()
        },
    }


def measure_kind(logits: Tensor, repeats: int, long: bool) -> dict[str, Any]:
    """All that is measured on one kind of logits."""
    ways = {OURS: logits_to_labels, PLAIN: restore_plainly}
    if monai_installed():
        ways[PEER] = restore_with_monai
    timed = time_ways(ways, logits, SHAPE, repeats)
    result = {
        "boundary_share": boundary_share(logits),
        "shape": list(SHAPE),
        "ways": timed["ways"],
        "against_plain": compare(logits, timed["labels"]),
        "one_pass_s": one_pass_s(logits, repeats),
    }
    if long:
        timed = time_ways({OURS: logits_to_labels}, logits, LONG_SHAPE, repeats)
        per_slice = {
            "seconds": timed["ways"][OURS]["seconds"]["median"] / LONG_SHAPE[2],
            "plain_seconds": result["ways"][PLAIN]["seconds"]["median"] / SHAPE[2],
        }
        compared = compare(logits, timed["labels"])
        result["long"] = {"shape": list(LONG_SHAPE), **timed["ways"][OURS], "per_slice": per_slice, **compared}
    return result


def one_pass_s(logits: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds to read the logits once, which nothing that looks at all of them can beat."""
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        logits.sum().item()
        seconds.append(time.perf_counter() - started)
    return summarise(seconds[1:])


def measure(config: Config, repeats: int, checkpoint: Path | None, scan: Path | None, long: bool) -> dict[str, Any]:
    """Measure on a network's logits and on random ones."""
    device = choose_device(config.device)
    first = "network-like" if checkpoint is None else "trained"
    logits = network_like_logits(config) if checkpoint is None else trained_logits(checkpoint, scan, config)
    kinds = {first: measure_kind(logits.to(device), repeats, long)}
    logits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(config.seed))
    kinds["random"] = measure_kind(logits.to(device), repeats, long)
    return {
        "logits": list(logits.shape),
        "device": str(device),
        "repeats": repeats,
        "kinds": kinds,
        "notes": [] if monai_installed() else [NO_MONAI],
        "machine": machine(),
    }


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables."""
    lines = [f"logits {result['logits']} on {result['device']}, n = {result['repeats']}"]
    for kind, row in result["kinds"].items():
        lines.append(f"{kind} logits ({row['boundary_share']:.1%} of the cells have a boundary) to {row['shape']}")
        titles = ("seconds", "min", "max", "plain/this", "min", "max", "GiB above")
        lines.append(f"  {'':<18}" + "".join(f"{title:>12}" for title in titles))
        for name, way in row["ways"].items():
            numbers = [way[key][n] for key in ("seconds", "plain_to_this") for n in ("median", "min", "max")]
            above = way["gib_above_logits_and_labels"] or {"max": None}
            numbers.append(above["max"])
            lines.append(f"  {name:<18}" + "".join(f"{'-':>12}" if n is None else f"{n:>12.3f}" for n in numbers))
        lines.append(
            f"  {describe(row['against_plain'])}; one pass over the logits {row['one_pass_s']['median']:.3f} s"
        )
        if "long" in row:
            long, above = row["long"], row["long"]["gib_above_logits_and_labels"] or {"max": math.nan}
            slice_ms, plain_ms = (1000 * long["per_slice"][key] for key in ("seconds", "plain_seconds"))
            lines.append(
                f"  to {long['shape']}: {long['seconds']['median']:.2f} s, {slice_ms:.2f} ms a slice (plain to "
                f"{row['shape']}: {plain_ms:.2f}), {above['max']:.3f} GiB above; {describe(long)}"
            )
    return [*lines, *result["notes"]]


def describe(compared: dict[str, Any]) -> str:
    """How labels compare with plain ones, in words."""
    return (
        f"{compared['voxels_that_differ']} of {compared['of']} voxels differ from plain, "
        f"{compared['differ_beyond_ties']} by more than {TIE:g}"
    )


def main() -> int:
    """Measure, and print."""
    arguments = parse_arguments()
    with refusing(USAGE):
        if arguments.repeats < 1:
            raise ValueError(f"--repeats: got {arguments.repeats}, expected 1 or more")
        if (arguments.checkpoint is None) != (arguments.scan is None):
            raise ValueError("--checkpoint and --scan: got one of them, expected both or none")
        config = load_config(flags={"device": arguments.device})
        choose_device(config.device)
        result = measure(config, arguments.repeats, arguments.checkpoint, arguments.scan, arguments.long)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time the way from logits to label maps, peers beside it.")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained network, instead of made-up logits")
    parser.add_argument("--scan", type=Path, metavar="SCAN", help="what the trained network is to see")
    parser.add_argument("--long", action="store_true", help="restore to 512x512x1000 as well (8 GiB of memory)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns after the warm-up (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
