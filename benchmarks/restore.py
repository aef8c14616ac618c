"""From logits to label maps on a scan's grid: logits_to_labels against plain interpolation and MONAI's transforms.

    python -m benchmarks.restore                                                # logits as a network gives, and random
    python -m benchmarks.restore --checkpoint runs/vnet/best.pt --scan SCAN     # those of a trained network instead
    python -m benchmarks.restore --long                                         # a scan of 512x512x1000 as well
    python -m benchmarks.restore --json                                         # only the line of JSON

Logits (14, 256, 256, 128) to labels (512, 512, 100). Plain is F.interpolate (trilinear) of all classes and argmax.
Ratios are taken within a turn. The memory is what a way needs above the logits and its answer.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.measuring import Contender, make_parser, measure_and_print, ratios, summarise, take_turns, time_each
from core.checkpoint import load_network
from core.config import Config, load_config
from core.scans.resample import cells_with_boundary, logits_to_labels, resize_labels
from core.scans.volumes import load_scan, prepare_image
from core.system.exits import run_command
from core.training.device import choose_device
from core.training.memory_plans import GIB
from data.make_phantom import DEFAULT_SHAPE
from data.phantom import make_case

SHAPE = (512, 512, 100)  # voxels of a usual abdominal scan
LONG_SHAPE = (512, 512, 1000)
TIE = 1e-6  # two classes whose plain scores differ by no more are a tie
OURS, PLAIN, PEER = "logits_to_labels", "plain", "MONAI"
# Of the made-up logits: as many cells have a boundary as behind the trained network of RESULTS.md (4.6 %).
CONTRAST, BLUR_VOXELS, NOISE, NOISE_VOXELS = 12.0, 7, 4.3, 4


def network_like_logits(config: Config) -> Tensor:
    """(K, X, Y, Z) logits as a trained network might give: a phantom's organs, blurred, and smooth noise on top."""
    labels = resize_labels(make_case(config.seed, 1, DEFAULT_SHAPE)[1], config.size)
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


def time_ways(ways: dict[str, Callable], logits: Tensor, shape: Sequence[int], repeats: int) -> tuple[dict, Tensor]:
    """Let the ways take turns; return the numbers of each, and the first one's label map."""
    contenders = [Contender(name, lambda _, way=way: torch.as_tensor(way(logits, shape))) for name, way in ways.items()]
    take_turns(contenders, repeats, logits.device)
    labels = contenders[0].answer
    on_device = labels.nbytes / GIB if logits.device.type == "cpu" else 0
    plain = next((each for each in contenders if each.name == PLAIN), None)
    rows = {
        each.name: {
            "seconds": summarise(each.seconds),
            "plain_to_this": plain and ratios(plain.seconds, each.seconds),
            "gib_above_logits_and_labels": summarise([max(0, rise - on_device) for rise in each.rise_gib]),
        }
        for each in contenders
    }
    return rows, labels


def measure_kind(logits: Tensor, repeats: int, long: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the numbers of each way on one kind of logits, and what else is measured on it."""
    ways = {OURS: logits_to_labels, PLAIN: restore_plainly}
    if peers.monai_installed():
        ways[PEER] = restore_with_monai
    rows, labels = time_ways(ways, logits, SHAPE, repeats)
    # Nothing that looks at all logits can beat reading them once.
    one_pass = time_each({"one_pass_s": lambda: logits.sum().item()}, repeats)
    facts = {"boundary_share": boundary_share(logits), **one_pass, **compare(logits, labels)}
    if long:
        long_rows, labels = time_ways({OURS: logits_to_labels}, logits, LONG_SHAPE, repeats)
        row = {"shape": list(LONG_SHAPE), **long_rows[OURS], **compare(logits, labels)}
        row["slice_ms"] = 1000 * row["seconds"]["median"] / LONG_SHAPE[2]
        row["plain_slice_ms"] = 1000 * rows[PLAIN]["seconds"]["median"] / SHAPE[2]  # to the usual shape
        facts["long"] = row
    return rows, facts


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on a network's logits and on random ones.

    Raises:
        ValueError: when the flags do not fit each other, or the checkpoint or the scan cannot be used.
    """
    checkpoint, scan = arguments.checkpoint, arguments.scan
    if (checkpoint is None) != (scan is None):
        raise ValueError("--checkpoint and --scan: got one of them, expected both or none")
    config = load_config(flags={"device": arguments.device})
    device = choose_device(config.device)
    first = "network-like" if checkpoint is None else "trained"
    logits = network_like_logits(config) if checkpoint is None else trained_logits(checkpoint, scan, config)
    random = torch.randn(logits.shape, generator=torch.Generator().manual_seed(config.seed))
    result = {"logits": list(logits.shape), "shape": list(SHAPE), "device": str(device), "repeats": arguments.repeats}
    ways, facts = {}, {}
    for kind, each in ((first, logits), ("random", random)):
        rows, facts[kind] = measure_kind(each.to(device), arguments.repeats, arguments.long)
        ways |= {f"{kind}, {name}": row for name, row in rows.items()}
    return {**result, "ways": ways, "kinds": facts, "notes": peers.monai_notes()}


def main() -> int:
    """Measure, and print."""
    parser = make_parser(__doc__, repeats=5, device=True)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a trained network, instead of made-up logits")
    parser.add_argument("--scan", type=Path, metavar="SCAN", help="what the trained network is to see")
    parser.add_argument("--long", action="store_true", help="restore to 512x512x1000 as well (8 GiB of memory)")
    return measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
