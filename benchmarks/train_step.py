"""Seconds of one training step: this network under each memory plan, and MONAI's VNet in the same loop.

    python -m benchmarks.train_step                                    # 128x128x64, 5 repeats
    python -m benchmarks.train_step --size 256 256 128 --repeats 10    # on a GPU
    python -m benchmarks.train_step --channels-last --compile          # both networks so too, and with both together
    python -m benchmarks.train_step --cudnn-benchmark                  # with cuDNN trying its algorithms, on a GPU
    python -m benchmarks.train_step --json                             # only the line of JSON

On a CPU in float32, on a GPU in bf16 mixed precision; batch 1. Each ratio is taken within a turn. Forward is the time
to the loss, in training mode. The share is the step's counted arithmetic by its median time, in the device's rate for
a large matrix product. A network or plan that runs out of memory is left out, and its row says so.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measuring, peers
from core.config import Config, load_config
from core.network import build_network
from core.system.exits import run_command
from core.training.device import choose_device, choose_precision
from core.training.losses import LOSSES
from core.training.memory_count import count_step
from core.training.setup import PLANS, Training, compile_network, make_optimizer, to_channels_last
from core.training.step import training_step

SIZE = (128, 128, 64)
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # of square matrices that keep the device busy for a moment
MATMUL_REPEATS = 6
PROJECT, PEER = "project", "MONAI"
COMPILED, CHANNELS_LAST = "compiled", "channels last"


def make_training(network: nn.Module, device: torch.device, variant: Sequence[str] = ()) -> Training:
    """Return a network with everything that a step needs, as train.py has it."""
    network = network.to(device).train()
    if CHANNELS_LAST in variant:
        to_channels_last(network)
    if COMPILED in variant:
        compile_network(network, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return Training(
        network, LOSSES["cross_entropy"], make_optimizer(network, 1e-4), scaler, choose_precision("auto", device)
    )


def make_contenders(
    config: Config, image: Tensor, labels: Tensor, asked: Sequence[str] = ()
) -> list[measuring.Contender]:
    """Make this network under each plan and MONAI's, and both again in each variant asked for and in all of them.

    Raises:
        ValueError: when torch.compile does not work here.
    """
    contenders = []

    def add(name: str, training: Training, variant: Sequence[str] = ()) -> None:
        def run(lap: measuring.Laps) -> None:
            training_step(training, image, labels, on_loss=lambda loss: lap("forward"))

        # The gradients of the turn before would hide the rise of memory.
        before = partial(training.optimizer.zero_grad, set_to_none=True)
        contenders.append(measuring.Contender(", ".join([name, *variant]), run, before=before))

    plans = make_training(build_network(config), image.device)
    for plan in PLANS:
        add(plan, replace(plans, plan=plan))
    for variant in [(), *([name] for name in asked), *([asked] if len(asked) > 1 else [])]:
        if variant:
            add("off", make_training(build_network(config), image.device, variant), variant)
        if peers.monai_installed():
            add(PEER, make_training(peers.monai_vnet(len(config.organs)), image.device, variant), variant)
    return contenders


def matmul_flops_per_second(device: torch.device, precision: torch.dtype) -> float:
    """Return the rate of a large matrix product; a step's own rate beside it tells how well the device is used."""
    n = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, n, n, device=device).to(precision)
    return 2 * n**3 / measuring.time_each({"product": lambda: a @ b}, MATMUL_REPEATS, device)["product"]["median"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let the contenders take turns.

    Raises:
        ValueError: when a flag does not fit, or as `make_contenders`.
    """
    config = load_config(flags={"size": list(map(str, arguments.size)), "device": arguments.device})
    config = replace(config, batch_size=1, loss="cross_entropy")
    device = choose_device(config.device)
    precision = choose_precision("auto", device)
    torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
    torch.manual_seed(config.seed)
    image = torch.rand(1, 1, *config.size, device=device)
    labels = torch.randint(len(config.organs), (1, *config.size), dtype=torch.uint8, device=device)
    asked = [
        name for name, wanted in ((COMPILED, arguments.compile), (CHANNELS_LAST, arguments.channels_last)) if wanted
    ]
    contenders = make_contenders(config, image, labels, asked)
    measuring.take_turns(contenders, arguments.repeats, device, skip_failed=True)
    return {
        "size": list(config.size),
        "device": str(device),
        "precision": str(precision),
        "repeats": arguments.repeats,
        **compare(contenders, config, device, precision),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "notes": peers.monai_notes(),
    }


def compare(
    contenders: list[measuring.Contender], config: Config, device: torch.device, precision: torch.dtype
) -> dict[str, Any]:
    """Return the contenders' numbers, and the arithmetic of a plain step beside the device's rate."""
    peer = next((each for each in contenders if each.name == PEER), None)
    counts = {plan: count_step(config, plan, precision) for plan in PLANS}
    plain = {PROJECT: counts["off"]}
    if peer:
        counts[PEER] = count_step(config, "off", precision, lambda _: peers.monai_vnet(len(config.organs)))
        plain[PEER] = counts[PEER]
    rate = matmul_flops_per_second(device, precision)
    forward = {each.name: each.laps.get("forward", []) for each in contenders}
    rows = {
        each.name: {
            "forward_s": measuring.summarise(forward[each.name]),
            "step_s": measuring.summarise(each.seconds),
            "forward_to_monai": peer and measuring.ratios(forward[each.name], forward[PEER]),
            "step_to_monai": peer and measuring.ratios(each.seconds, peer.seconds),
            "rise_gib": measuring.summarise(each.rise_gib),
            "counted_peak_gib": counts[each.name].peak_gib if each.name in counts else None,
            "share_of_matmul": counts[each.name.split(",")[0]].flops / statistics.median(each.seconds) / rate
            if each.seconds
            else None,
        }
        | ({"failed": each.failed} if each.failed else {})
        for each in contenders
    }
    arithmetic = {
        name: {
            "forward_tflop": count.forward_flops / 1e12,
            "step_tflop": count.flops / 1e12,
            "step_s_at_matmul_rate": count.flops / rate,
        }
        for name, count in plain.items()
    }
    return {"contenders": rows, "arithmetic": arithmetic, "matmul_tflop_per_s": rate / 1e12}


def main() -> int:
    """Measure, and print."""
    parser = measuring.make_parser(__doc__, repeats=5, device=True)
    parser.add_argument("--size", **measuring.THREE, default=SIZE, help="voxels")
    parser.add_argument("--channels-last", action="store_true", help="both networks in channels_last_3d too")
    parser.add_argument("--compile", action="store_true", help="both networks under torch.compile too")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms, unlike in train.py")
    return measuring.measure_and_print(parser, measure)


if __name__ == "__main__":
    run_command(main)
