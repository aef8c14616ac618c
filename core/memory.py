"""What a training step will need under each memory plan, counted before it runs; and finding the plan that fits.

The count runs the real step on tensors that have shapes but no memory, and adds up what lives at each moment:
parameters, gradients, Adam's state, activations and temporaries. Not in it: the CUDA context, what the allocator loses
to fragments, and the workspaces of cuDNN's convolutions.
"""

import gc
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from core.config import Config
from core.network import build_network
from core.step import PLANS, Average, Loss, Training, gradients, make_optimizer, to_channels_last, training_step
from vnet import VNet

GIB = 2**30
RESERVED_GIB = 0.8  # of a card, for what the count leaves out


class NothingFitsError(MemoryError):
    """Under no memory plan does a step fit."""


@dataclass(frozen=True)
class Need:
    """What one training step needs under a plan: its peak in GiB, and its arithmetic in floating-point operations."""

    plan: str
    peak_gib: float
    flops: int


def predict(config: Config, plan: str, precision: torch.dtype) -> Need:
    """Count one training step, not compiled; takes seconds, allocates next to nothing, needs no GPU."""
    counter, tracker = FlopCounterMode(display=False), MemTracker()
    with FakeTensorMode():
        network = build_network(config)
        if config.channels_last:
            to_channels_last(network)
        optimizer = make_optimizer(network, config.learning_rate)
        for parameter in network.parameters():  # a step without a network's, so that Adam's state is there
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        image, labels = blank_batch(config, torch.device("cpu"))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        average = Average(network, config.average_decay) if config.average_decay else None
        training = Training(
            network, Loss(config.loss), optimizer, scaler, precision, plan, pieces=config.accumulate, average=average
        )
        tracker.track_external(network, optimizer, image, labels, *(average.weights.values() if average else ()))
        with tracker, counter:
            # The tracker keeps accounts of the network's modules, too, and wants each to be called once.
            training_step(training, image, labels, after=tracker.reset_mod_stats)
    peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    return Need(plan, peak / GIB, counter.get_total_flops())


def plan_for(needs: list[Need], card_gib: float) -> Need | None:
    """The fastest plan that should fit a card of `card_gib` GiB; None when none should."""
    return next((need for need in needs if need.peak_gib + RESERVED_GIB <= card_gib), None)


def format_plans(needs: list[Need]) -> str:
    """A table of the plans, counted, not measured."""
    lines = [f"{'plan':<10}{'peak GiB':>10}{'arithmetic':>12}"]
    lines += [f"{need.plan:<10}{need.peak_gib:>10.2f}{need.flops / needs[0].flops:>12.2f}" for need in needs]
    lines.append("Counted tensor by tensor for one training step; a card needs")
    lines.append(f"some {RESERVED_GIB} GiB more for its context and the convolutions' workspaces.")
    return "\n".join(lines)


def choose_plan(training: Training, config: Config, device: torch.device) -> str:
    """The plan that the settings name; under "auto" on a GPU the fastest that a real step fits in, said in one line.

    Raises:
        NothingFitsError: when none does, naming settings that would.
    """
    if config.memory != "auto" or device.type != "cuda":
        return "off" if config.memory == "auto" else config.memory
    card_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    failed = []
    for plan in PLANS:
        try:
            peak_gib = try_step(replace(training, plan=plan), *blank_batch(config, device))
        except torch.OutOfMemoryError:
            failed.append(plan)
        else:
            counted = predict(config, plan, training.precision).peak_gib
            why = f"{' and '.join(failed)} did not fit" if failed else "the fastest"
            print(
                f"memory plan {plan} ({why}): {peak_gib:.2f} of {card_gib:.1f} GiB, {counted:.2f} counted", flush=True
            )
            return plan
        free_memory()  # only behind the except clause has the error let go of the step's tensors
    hint = what_would_fit(config, training.precision, card_gib)
    raise NothingFitsError(f"no memory plan fits into the card's {card_gib:.1f} GiB; {hint}")


def blank_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of the settings' size with nothing in it: image (B, 1, X, Y, Z) float32 and labels (B, X, Y, Z) uint8."""
    shape = (config.batch_size, *config.size)
    return torch.zeros(shape, device=device)[:, None], torch.zeros(shape, dtype=torch.uint8, device=device)


def try_step(training: Training, image: Tensor, labels: Tensor) -> float:
    """Work out a step's gradients, with room for Adam's two moments beside, and change nothing; the peak in GiB.

    Raises:
        torch.OutOfMemoryError: when it does not fit.
    """
    parameters = list(training.network.parameters())
    moments = [] if training.optimizer.state else [torch.empty_like(p) for p in parameters for _ in range(2)]
    buffers = [buffer.clone() for buffer in training.network.buffers()]
    torch.cuda.reset_peak_memory_stats(image.device)
    try:
        gradients(training, image, labels)
        return torch.cuda.max_memory_allocated(image.device) / GIB
    finally:
        training.optimizer.zero_grad(set_to_none=True)
        restore(training.network, buffers)
        del moments


def step_that_fits(training: Training, image: Tensor, labels: Tensor) -> Tensor:
    """The loss of a training step; out of memory, the same step again under the next smaller plan, which then stays.

    Raises:
        NothingFitsError: when it runs out under the smallest.
    """
    while True:
        buffers = [buffer.clone() for buffer in training.network.buffers()]
        try:
            return training_step(training, image, labels)
        except torch.OutOfMemoryError:
            smaller = PLANS[PLANS.index(training.plan) + 1 :]
        if not smaller:
            raise NothingFitsError("out of memory under the smallest memory plan; try a smaller --size or --channels")
        print(f"out of memory under the plan {training.plan}: the same step again under {smaller[0]}", flush=True)
        training.plan = smaller[0]
        free_memory()
        restore(training.network, buffers)


@torch.no_grad()
def restore(network: VNet, buffers: list[Tensor]) -> None:
    """Put the running statistics of batch norms back to what they were."""
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def what_would_fit(config: Config, precision: torch.dtype, card_gib: float) -> str:
    """Settings near to `config` whose smallest plan should fit, as flags."""
    smallest = PLANS[-1]
    halvings = len(config.up_convs)
    size, least = list(config.size), 2**halvings
    while max(size) > least:
        longest = size.index(max(size))
        size[longest] = max(least, size[longest] // 2 // least * least)
        smaller = replace(config, size=tuple(size), batch_size=1)
        if sum(size) > 3 * least and plan_for([predict(smaller, smallest, precision)], card_gib):
            return f"--size {' '.join(map(str, size))} --batch-size 1 should"
    return "its parameters alone are too many; take fewer --channels"


def free_memory() -> None:
    """Give back what a failed step has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
