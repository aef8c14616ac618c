"""Seconds of one training step: this network under each memory plan, and MONAI's VNet in the same loop.

    python -m benchmarks.train_step                                    # 128x128x64, 5 repeats
    python -m benchmarks.train_step --size 256 256 128 --repeats 10    # on a GPU
    python -m benchmarks.train_step --channels-last --compile          # both networks so too, and with both together
    python -m benchmarks.train_step --cudnn-benchmark                  # with cuDNN trying its algorithms, on a GPU
    python -m benchmarks.train_step --json                             # only the line of JSON

On a CPU in float32, on a GPU in bf16 mixed precision; batch 1. The contenders take turns, so that what else happens on
the machine meets all of them; each ratio is taken within a turn. Forward is the time to the loss, in training mode.
The share is the step's counted arithmetic by its median time, in the device's rate for a large matrix product.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine, print_result
from benchmarks.memory import Count, count_plain_step
from benchmarks.peers import NO_MONAI, monai_installed, monai_vnet
from core.config import Config, load_config
from core.network import build_network
from core.system.exits import DONE, USAGE, refusing, run_command
from core.training.losses import LOSSES
from core.training.memory_count import Need, count_step
from core.training.memory_plans import GIB
from core.training.setup import (
    PLANS,
    Training,
    choose_device,
    choose_precision,
    compile_network,
    make_optimizer,
    to_channels_last,
)
from core.training.step import training_step
from vnet import check_size

SIZE = (128, 128, 64)
WARM_UP_TURNS = 1  # enough for Adam's state, and for what libraries set up at a first call
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # of square matrices that keep the device busy for a moment
MATMUL_REPEATS = 7
PEER = "MONAI"
COMPILED, CHANNELS_LAST = "compiled", "channels last"


@dataclass
class Contender:
    """One way to do a training step, and the seconds that its turns took; `base` has the same arithmetic."""

    name: str
    base: str
    training: Training
    image: Tensor
    forward_s: list[float]
    step_s: list[float]
    rise_gib: list[float]


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
    config: Config, image: Tensor, channels_last: bool = False, compiled: bool = False
) -> list[Contender]:
    """Make this network under each plan and MONAI's, and both again in each variant asked for and in all.

    Raises:
        ValueError: when torch.compile does not work here.
    """
    contenders = []
    asked = [name for name, wanted in ((COMPILED, compiled), (CHANNELS_LAST, channels_last)) if wanted]
    variants = [[name] for name in asked] + ([asked] if len(asked) > 1 else [])

    def add(name: str, training: Training, variant: Sequence[str] = ()) -> None:
        contenders.append(Contender(", ".join([name, *variant]), name, training, image, [], [], []))

    plans = make_training(build_network(config), image.device)
    for plan in PLANS:
        add(plan, replace(plans, plan=plan))
    for variant in [(), *variants]:
        if variant:
            add("off", make_training(build_network(config), image.device, variant), variant)
        if monai_installed():
            add(PEER, make_training(monai_vnet(len(config.organs)), image.device, variant), variant)
    return contenders


def take_turn(contender: Contender, labels: Tensor) -> None:
    """One training step with a clock."""
    device = labels.device
    contender.training.optimizer.zero_grad(set_to_none=True)  # the gradients of the turn before would hide the rise
    read_rise_gib = watch_memory(device)
    times = [clock(device)]
    training_step(contender.training, contender.image, labels, check=lambda loss: times.append(clock(device)))
    times.append(clock(device))
    contender.forward_s.append(times[1] - times[0])
    contender.step_s.append(times[2] - times[0])
    rise_gib = read_rise_gib()
    if rise_gib is not None:
        contender.rise_gib.append(rise_gib)


def clock(device: torch.device) -> float:
    """Seconds, when everything given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def watch_memory(device: torch.device) -> Callable[[], float | None]:
    """Start watching; what comes back tells by how many GiB memory has risen since then, at the most.

    On a GPU the allocated, on a CPU the resident memory; the latter on Linux alone, None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - before) / GIB
    try:
        # What was freed but is kept by malloc would otherwise hide the rise.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident memory back to what it is now
    except OSError:
        return lambda: None
    before = resident_peak()
    return lambda: (resident_peak() - before) / GIB


def resident_peak() -> int:
    """Return the most resident memory of this process since the peak was set back, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def matmul_flops_per_second(device: torch.device, precision: torch.dtype) -> float:
    """Return the rate of a large matrix product; a step's own rate beside it tells how well the device is used."""
    n = MATMUL_SIZE[device.type]
    a, b = torch.randn(2, n, n, device=device).to(precision)
    seconds = []
    for _ in range(MATMUL_REPEATS):
        started = clock(device)
        a @ b
        seconds.append(clock(device) - started)
    return 2 * n**3 / statistics.median(seconds[1:])


def summarise(values: Sequence[float]) -> dict[str, Any] | None:
    """Median and spread; None of nothing."""
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(values: list[float], to: list[float]) -> dict[str, Any] | None:
    """Median and spread of the ratios, turn by turn."""
    return summarise([a / b for a, b in zip(values, to, strict=True)])


def count_arithmetic(config: Config, precision: torch.dtype) -> dict[str, dict[str, int]]:
    """Floating-point operations of both networks, forward and in a whole step, in a plain loop."""
    networks = {"project": lambda: build_network(config)}
    if monai_installed():
        networks["monai"] = lambda: monai_vnet(len(config.organs))
    counts = {name: count_plain_step(build, config.size, precision) for name, build in networks.items()}
    return {name: {"forward": count.forward_flops, "step": count.flops} for name, count in counts.items()}


def count_steps(config: Config, precision: torch.dtype) -> dict[str, Need | Count]:
    """Peak in GiB and arithmetic of a step, as benchmarks.memory counts them, parameters and Adam's state included."""
    counts: dict[str, Need | Count] = {plan: count_step(config, plan, precision) for plan in PLANS}
    if monai_installed():
        counts[PEER] = count_plain_step(lambda: monai_vnet(len(config.organs)), config.size, precision)
    return counts


def measure(config: Config, repeats: int, channels_last: bool = False, compiled: bool = False) -> dict[str, Any]:
    """Let the contenders take turns.

    Raises:
        ValueError: as `make_contenders`.
    """
    config = replace(config, batch_size=1, loss="cross_entropy")
    device = choose_device(config.device)
    precision = choose_precision("auto", device)
    torch.manual_seed(config.seed)
    image = torch.rand(1, 1, *config.size, device=device)
    labels = torch.randint(len(config.organs), (1, *config.size), dtype=torch.uint8, device=device)
    contenders = make_contenders(config, image, channels_last, compiled)
    for turn in range(WARM_UP_TURNS + repeats):
        for contender in contenders:
            if turn == WARM_UP_TURNS:
                contender.forward_s, contender.step_s, contender.rise_gib = [], [], []
            take_turn(contender, labels)
    peer = next((each for each in contenders if each.name == PEER), None)
    counts, rate = count_steps(config, precision), matmul_flops_per_second(device, precision)
    rows = {
        each.name: {
            "forward_s": summarise(each.forward_s),
            "step_s": summarise(each.step_s),
            "forward_to_monai": peer and ratios(each.forward_s, peer.forward_s),
            "step_to_monai": peer and ratios(each.step_s, peer.step_s),
            "rise_gib": summarise(each.rise_gib),
            "counted_peak_gib": counts[each.name].peak_gib if each.name in counts else None,
            "share_of_matmul": counts[each.base].flops / statistics.median(each.step_s) / rate,
        }
        for each in contenders
    }
    return {
        "size": list(config.size),
        "device": str(device),
        "precision": str(precision),
        "repeats": repeats,
        "contenders": rows,
        "flops": count_arithmetic(config, precision),
        "matmul_flops_per_second": rate,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "notes": [] if peer else [NO_MONAI],
        "machine": machine(),
    }


def format_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    titles = ("forward s", "step s", "min", "max", "fwd ratio", "step ratio", "rise GiB", "counted", "share")
    lines = [f"{'':<32}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in result["contenders"].items():
        median = {key: value["median"] for key, value in row.items() if isinstance(value, dict)}
        numbers = [median["forward_s"], median["step_s"], row["step_s"]["min"], row["step_s"]["max"]]
        numbers += [median.get(key) for key in ("forward_to_monai", "step_to_monai", "rise_gib")]
        numbers += [row["counted_peak_gib"], row["share_of_matmul"]]
        lines.append(f"{name:<32}" + "".join(f"{'-':>11}" if n is None else f"{n:>11.3f}" for n in numbers))
    rate = result["matmul_flops_per_second"]
    for name, flops in result["flops"].items():
        lines.append(
            f"{name}: {flops['forward'] / 1e12:.3f} TFLOP forward, {flops['step'] / 1e12:.3f} a step, which is "
            f"{flops['step'] / rate:.3g} s at the {rate / 1e12:.3f} TFLOP/s of a large matrix product"
        )
    size = " x ".join(map(str, result["size"]))
    title = f"one training step at {size} on {result['device']} in {result['precision']}, n = {result['repeats']}"
    return [title, *lines, *result["notes"]]


def main() -> int:
    """Measure, and print."""
    arguments = parse_arguments()
    with refusing(USAGE):
        if arguments.repeats < 1:
            raise ValueError(f"--repeats: got {arguments.repeats}, expected 1 or more")
        config = load_config(flags={"size": list(map(str, arguments.size)), "device": arguments.device})
        check_size(config.size, len(config.up_convs))
        choose_device(config.device)
        torch.backends.cudnn.benchmark = arguments.cudnn_benchmark
        result = measure(config, arguments.repeats, arguments.channels_last, arguments.compile)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Time one training step, MONAI's VNet in the same loop beside it.")
    parser.add_argument("--size", nargs=3, type=int, default=SIZE, metavar=("X", "Y", "Z"), help="voxels")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns after the warm-up (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--channels-last", action="store_true", help="both networks in channels_last_3d too")
    parser.add_argument("--compile", action="store_true", help="both networks under torch.compile too")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms, unlike in train.py")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
