"""What one training step needs at its peak: this network under each memory plan, and its peers in a plain loop.

    python -m benchmarks.memory             # the table, and one line of JSON
    python -m benchmarks.memory --json      # the line alone
    python -m benchmarks.memory --size 128 128 64

Counted, not measured: parameters, gradients, Adam's state, activations and temporaries of a step in bf16 mixed
precision at batch 1, tensor by tensor, on tensors that have shapes but no memory. Needs no GPU. MONAI is left out where
it is not installed.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, print_result
from benchmarks.peers import NO_MONAI, Predecessor, monai_installed, monai_vnet
from core.config import Config, load_config
from core.system.exits import DONE, USAGE, refusing, run_command
from core.training.losses import LOSSES
from core.training.memory_count import count_step
from core.training.memory_plans import GIB
from core.training.setup import PLANS, Training
from core.training.step import compute_gradients
from vnet import check_size


@dataclass(frozen=True)
class Count:
    """What one training step in a plain loop needs: its peak in GiB, and its floating-point operations."""

    peak_gib: float
    forward_flops: int
    flops: int


def count_plain_step(
    build: Callable[[], nn.Module], size: Sequence[int], precision: torch.dtype, growth: int = 1
) -> Count:
    """Count a step of autocast, cross-entropy, backward pass and Adam, as core/training/memory_count.py does.

    Args:
        build: makes the network.
        size: of the input, (X, Y, Z) voxels; batch 1.
        precision: that convolutions are computed in.
        growth: voxels of the network's output per voxel of its input along each axis, for the labels' size.
    """
    counter, tracker, forward_flops = FlopCounterMode(display=False), MemTracker(), []
    with FakeTensorMode():
        network = build()
        optimizer = torch.optim.Adam(network.parameters())
        for parameter in network.parameters():  # a step without a network's, so that Adam's state is there
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        image = torch.zeros(1, 1, *size)
        labels = torch.zeros(1, *(growth * n for n in size), dtype=torch.uint8)
        training = Training(
            network, LOSSES["cross_entropy"], optimizer, torch.amp.GradScaler("cpu", enabled=False), precision
        )
        tracker.track_external(network, optimizer, image, labels)
        with tracker, counter:
            compute_gradients(
                training, image, labels, check=lambda loss: forward_flops.append(counter.get_total_flops())
            )
            optimizer.step()
    peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    return Count(peak / GIB, forward_flops[0], counter.get_total_flops())


def measure(config: Config) -> dict[str, Any]:
    """Count a step of every network at the settings' size; a peak is null where its network is not installed."""
    config = replace(config, batch_size=1, loss="cross_entropy")
    classes, precision = len(config.organs), torch.bfloat16
    result, flops = {}, {}
    for plan in PLANS:
        need = count_step(config, plan, precision)
        result[f"project_{plan}_gib"], flops[f"project_{plan}"] = need.peak_gib, need.flops
    monai = count_plain_step(lambda: monai_vnet(classes), config.size, precision) if monai_installed() else None
    predecessor = count_plain_step(Predecessor, config.size, precision, Predecessor.GROWTH)
    for name, count in {"monai": monai, "predecessor": predecessor}.items():
        result[f"{name}_gib"] = count and count.peak_gib
        flops[name] = count and count.flops
    notes = ["counted for one training step; bf16 mixed precision, batch 1", "predecessor: a reconstruction"]
    notes += [] if monai else [NO_MONAI]
    settings = {"size": list(config.size), "classes": classes, "channels": config.channels, "norm": config.norm}
    return {**result, "step_flops": flops, **settings, "notes": notes, "machine": machine()}


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    lines = [f"{'network':<24}{'peak GiB':>10}{'TFLOP':>10}"]
    for name, flops in result["step_flops"].items():
        peak_gib = result[f"{name}_gib"]
        numbers = "not installed" if peak_gib is None else f"{peak_gib:>10.2f}{flops / 1e12:>10.2f}"
        lines.append(f"{name.replace('_', ', plan ', 1):<24}{numbers}")
    return [f"one training step at {' x '.join(map(str, result['size']))}", *lines, *result["notes"]]


def main() -> int:
    """Count, and print."""
    arguments = parse_arguments()
    with refusing(USAGE):
        config = load_config(flags={"size": list(map(str, arguments.size))} if arguments.size else {})
        check_size(config.size, len(config.up_convs))
    result = measure(config)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Count what one training step needs, peers beside it.")
    parser.add_argument("--size", nargs=3, type=int, metavar=("X", "Y", "Z"), help="default: that of config.yaml")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
