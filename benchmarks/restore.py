"""From logits to label maps on a scan's grid: logits_to_labels against plain interpolation and MONAI's transforms.

    python -m benchmarks.restore            # logits as a network gives, and random ones
    python -m benchmarks.restore --json     # only the line of JSON

Logits (14, 256, 256, 128) to labels (512, 512, 100). Plain is F.interpolate (trilinear) of all classes and argmax.
Ratios are taken within a turn. The memory is what a way needs above the logits and its answer.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.measuring import Contender, make_parser, measure_and_print, ratios, summarise, take_turns, time_each
from core.config import Config, load_config
from core.scans.resample import cells_with_boundary, logits_to_labels, resize_labels
from core.system.exits import run_command
from core.training.device import choose_device
from core.training.memory_plans import GIB
from data.make_phantom import DEFAULT_SHAPE
from data.phantom import make_case

SHAPE = (512, 512, 100)  # voxels of a usual abdominal scan
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


def boundary_share(logits: Tensor) -> float:
    """Return the share of cells of eight neighbouring voxels with more than one winning class."""
    return float(cells_with_boundary(logits.argmax(dim=0).to("cpu", torch.uint8).numpy()).mean())


def time_ways(ways: dict[str, Callable], logits: Tensor, shape: Sequence[int], repeats: int) -> tuple[dict, int]:
    """Let the ways take turns; return the numbers of each, and how many voxels of the first differ from plain ones."""
    contenders = [Contender(name, lambda _, way=way: torch.as_tensor(way(logits, shape))) for name, way in ways.items()]
    take_turns(contenders, repeats, logits.device)
    labels = contenders[0].answer
    on_device = labels.nbytes / GIB if logits.device.type == "cpu" else 0
    plain = next(each for each in contenders if each.name == PLAIN)
    rows = {
        each.name: {
            "seconds": summarise(each.seconds),
            "plain_to_this": ratios(plain.seconds, each.seconds),
            "gib_above_logits_and_labels": summarise([max(0, rise - on_device) for rise in each.rise_gib]),
        }
        for each in contenders
    }
    return rows, int((plain.answer != labels).sum())


def measure_kind(logits: Tensor, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the numbers of each way on one kind of logits, and what else is measured on it."""
    ways = {OURS: logits_to_labels, PLAIN: restore_plainly}
    if peers.monai_installed():
        ways[PEER] = restore_with_monai
    rows, differ = time_ways(ways, logits, SHAPE, repeats)
    # Nothing that looks at all logits can beat reading them once.
    one_pass = time_each({"one_pass_s": lambda: logits.sum().item()}, repeats)
    return rows, {"boundary_share": boundary_share(logits), **one_pass, "voxels_that_differ": differ}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure on logits as of a network and on random ones.

    Raises:
        ValueError: when there is no such device.
    """
    config = load_config(flags={"device": arguments.device})
    device = choose_device(config.device)
    logits = network_like_logits(config)
    random = torch.randn(logits.shape, generator=torch.Generator().manual_seed(config.seed))
    result = {"logits": list(logits.shape), "shape": list(SHAPE), "device": str(device), "repeats": arguments.repeats}
    ways, facts = {}, {}
    for kind, each in (("network-like", logits), ("random", random)):
        rows, facts[kind] = measure_kind(each.to(device), arguments.repeats)
        ways |= {f"{kind}, {name}": row for name, row in rows.items()}
    return {**result, "ways": ways, "kinds": facts, "notes": peers.monai_notes()}


def main() -> int:
    """Measure, and print."""
    return measure_and_print(make_parser(__doc__, repeats=5, device=True), measure)


if __name__ == "__main__":
    run_command(main)
