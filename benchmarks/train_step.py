"""Seconds of one training step: this network under each memory plan, and MONAI's VNet in the same loop.

    python -m benchmarks.train_step                                    # 128x128x64, 5 repeats
    python -m benchmarks.train_step --size 256 256 128 --repeats 10    # on a GPU
    python -m benchmarks.train_step --channels-last                    # both networks in that format too
    python -m benchmarks.train_step --json                             # only the line of JSON

On a CPU in float32, on a GPU in bf16 mixed precision; batch 1. The contenders take turns, so that what else happens on
the machine meets all of them; each ratio is taken within a turn. Forward is the time to the loss, in training mode.
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
from benchmarks.memory import count_plain_step
from benchmarks.peers import NO_MONAI, monai_installed, monai_vnet
from core.checkpoint import build_network
from core.config import Config, load_config
from core.exits import DONE, USAGE, refusing, run_command
from core.memory import GIB, predict
from core.step import PLANS, Loss, Training, choose_device, choose_precision, gradients
from vnet import check_size

SIZE = (128, 128, 64)
WARM_UP_TURNS = 1  # enough for Adam's state, and for what libraries set up at a first call
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}  # of square matrices that keep the device busy for a moment
MATMUL_REPEATS = 7
PEER = "MONAI"


@dataclass
class Contender:
    """One way to do a training step, and the seconds that its turns took."""

    name: str
    training: Training
    image: Tensor
    forward_s: list[float]
    step_s: list[float]
    rise_gib: list[float]


def make_training(network: nn.Module, device: torch.device, channels_last: bool) -> Training:
    """A network with everything that a step needs, as train.py has it."""
    network = network.to(device).train()
    if channels_last:
        network = network.to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return Training(network, Loss("cross_entropy"), optimizer, scaler, choose_precision("auto", device))


def make_contenders(config: Config, image: Tensor, channels_last: bool) -> list[Contender]:
    """This network under each plan and MONAI's, and with `channels_last` both once more in that memory format."""
    contenders = []

    def add(name: str, training: Training, image: Tensor) -> None:
        contenders.append(Contender(name, training, image, [], [], []))

    plans = make_training(build_network(config), image.device, channels_last=False)
    for plan in PLANS:
        add(plan, replace(plans, plan=plan), image)
    classes = len(config.organs)
    if monai_installed():
        add(PEER, make_training(monai_vnet(classes), image.device, channels_last=False), image)
    if channels_last:
        last = image.to(memory_format=torch.channels_last_3d)
        add("off, channels last", make_training(build_network(config), image.device, True), last)
        if monai_installed():
            add(f"{PEER}, channels last", make_training(monai_vnet(classes), image.device, True), last)
    return contenders


def take_turn(contender: Contender, labels: Tensor) -> None:
    """One training step, as core.step.training_step does it, with a clock."""
    training, device = contender.training, labels.device
    training.optimizer.zero_grad(set_to_none=True)
    read_rise_gib = watch_memory(device)
    times = [clock(device)]
    gradients(training, contender.image, labels, check=lambda loss: times.append(clock(device)))
    training.scaler.step(training.optimizer)
    training.scaler.update()
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
    """The most resident memory of this process since the peak was set back, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def matmul_flops_per_second(device: torch.device, precision: torch.dtype) -> float:
    """The rate of a large matrix product, beside which a step's own rate says how well the device is used."""
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


def counted_peaks(config: Config, precision: torch.dtype) -> dict[str, float]:
    """Peaks in GiB as benchmarks.memory counts them, in this precision, parameters and Adam's state included."""
    peaks = {plan: predict(config, plan, precision).peak_gib for plan in PLANS}
    if monai_installed():
        peaks[PEER] = count_plain_step(lambda: monai_vnet(len(config.organs)), config.size, precision).peak_gib
    return peaks


def measure(config: Config, repeats: int, channels_last: bool = False) -> dict[str, Any]:
    """Let the contenders take turns."""
    config = replace(config, batch_size=1, loss="cross_entropy")
    device = choose_device(config.device)
    precision = choose_precision("auto", device)
    torch.manual_seed(config.seed)
    image = torch.rand(1, 1, *config.size, device=device)
    labels = torch.randint(len(config.organs), (1, *config.size), dtype=torch.uint8, device=device)
    contenders = make_contenders(config, image, channels_last)
    for turn in range(WARM_UP_TURNS + repeats):
        for contender in contenders:
            if turn == WARM_UP_TURNS:
                contender.forward_s, contender.step_s, contender.rise_gib = [], [], []
            take_turn(contender, labels)
    peer = next((each for each in contenders if each.name == PEER), None)
    peaks = counted_peaks(config, precision)
    rows = {
        each.name: {
            "forward_s": summarise(each.forward_s),
            "step_s": summarise(each.step_s),
            "forward_to_monai": peer and ratios(each.forward_s, peer.forward_s),
            "step_to_monai": peer and ratios(each.step_s, peer.step_s),
            "rise_gib": summarise(each.rise_gib),
            "counted_peak_gib": peaks.get(each.name),
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
        "matmul_flops_per_second": matmul_flops_per_second(device, precision),
        "notes": [] if peer else [NO_MONAI],
        "machine": machine(),
    }


def format_table(result: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    titles = ("forward s", "step s", "min", "max", "fwd ratio", "step ratio", "rise GiB", "counted")
    lines = [f"{'':<24}" + "".join(f"{title:>11}" for title in titles)]
    for name, row in result["contenders"].items():
        median = {key: value["median"] for key, value in row.items() if isinstance(value, dict)}
        numbers = [median["forward_s"], median["step_s"], row["step_s"]["min"], row["step_s"]["max"]]
        numbers += [median.get(key) for key in ("forward_to_monai", "step_to_monai", "rise_gib")]
        numbers.append(row["counted_peak_gib"])
        lines.append(f"{name:<24}" + "".join(f"{'-':>11}" if n is None else f"{n:>11.3f}" for n in numbers))
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
    result = measure(config, arguments.repeats, arguments.channels_last)
    print_result(format_table(result), result, arguments.json)
    return DONE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time one training step, MONAI's VNet in the same loop beside it.")
    parser.add_argument("--size", nargs=3, type=int, default=SIZE, metavar=("X", "Y", "Z"), help="voxels")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns after the warm-up (default: 5)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--channels-last", action="store_true", help="both networks in channels_last_3d too")
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
