"""Count the memory of one training step at its peak: this network under each memory plan, and MONAI's VNet.

    python -m benchmarks.memory             # the table, and one line of JSON
    python -m benchmarks.memory --json      # the line alone
    python -m benchmarks.memory --size 128 128 64

Counted, not measured: parameters, gradients, Adam's state, activations and temporaries of a step in bf16 mixed
precision at batch 1, tensor by tensor, on tensors that have shapes but no memory. For the plans also the operations
that torch launches, and their traffic: the bytes that they must read and write. Needs no GPU. MONAI is left out where
it is not installed.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import peers
from benchmarks.measuring import THREE, make_parser, measure_and_print
from core.config import Config, load_config
from core.system.exits import run_command
from core.training.memory_count import blank_training, count_step
from core.training.setup import PLANS
from core.training.step import training_step

LAUNCHES = {"vnet::moments": 2, "vnet::sums_backward": 2}  # each with sums over the tiles of a channel


class Traffic(TorchDispatchMode):
    """Count the operations on tensors, and the bytes that they must read and write.

    An operation reads each of its tensors once and writes each result once. Views and new, empty tensors cost nothing.
    An operation of core/training/activation.py is counted as what its kernels do on a GPU with Triton.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and count it."""
        kwargs = dict(kwargs or {})
        result, name = operation(*args, **kwargs), operation.name()
        if name.startswith(("aten::", "vnet::")) and not (operation.is_view or "empty" in name or "detach" in name):
            kwargs.pop("out", None)
            written = [result]
            if name.startswith("vnet::"):
                named = list(zip(operation._schema.arguments, args, strict=True))
                written += [value for argument, value in named if argument.is_write]
                args = [value for argument, value in named if argument.name != "into"]
            elif name.startswith(("aten::copy_", "aten::zero_", "aten::fill_")):
                args = args[1:]  # the first is written only
            read = {} if "_like" in name else {id(each): each for each in tree_leaves([args, kwargs])}
            self.bytes += sum(map(stored_bytes, [*read.values(), *tree_leaves(written)]))
            self.operations += LAUNCHES.get(name, 1)
        return result


def stored_bytes(value: object) -> int:
    """Return the bytes of a tensor, those that broadcasting repeats once; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    return value.element_size() * math.prod(n for n, step in zip(value.shape, value.stride(), strict=True) if step)


def count_traffic(config: Config, plan: str, precision: torch.dtype) -> Traffic:
    """Count the operations and the traffic of one training step, not compiled."""
    with FakeTensorMode():
        training, image, labels = blank_training(config, plan, precision)
        with Traffic() as traffic:
            training_step(training, image, labels)
    return traffic


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Count a step of every network at the settings' size; a peak is null where its network is not installed."""
    config = load_config(flags={"size": list(map(str, arguments.size))} if arguments.size else {})
    config = replace(config, batch_size=1, loss="cross_entropy")
    classes, precision = len(config.organs), torch.bfloat16
    counts = {f"project_{plan}": count_step(config, plan, precision) for plan in PLANS}
    traffic = {f"project_{plan}": count_traffic(config, plan, precision) for plan in PLANS}
    has_monai = peers.monai_installed()
    counts["monai"] = count_step(config, "off", precision, lambda _: peers.monai_vnet(classes)) if has_monai else None
    return {
        "size": list(config.size),
        "classes": classes,
        "channels": config.channels,
        "norm": config.norm,
        **{f"{name}_gib": count and count.peak_gib for name, count in counts.items()},
        "step_tflop": {name: count and count.flops / 1e12 for name, count in counts.items()},
        "step_traffic_gb": {name: each.bytes / 1e9 for name, each in traffic.items()},
        "step_operations": {name: each.operations for name, each in traffic.items()},
        "notes": ["counted for one training step; bf16 mixed precision, batch 1", *peers.monai_notes()],
    }


def main() -> int:
    """Count, and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", **THREE, help="default: that of config.yaml")
    return measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
