"""Count what a training step needs under each memory plan, tensor by tensor, without a GPU (train.py --plan).

The count runs the real step on tensors that have shapes but no memory, and adds up what lives at each moment:
parameters, gradients, Adam's state, activations and temporaries. Not in it: the CUDA context, what the allocator loses
to fragments, and the workspaces of cuDNN's convolutions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from core.config import Config, flag_of
from core.network import build_network
from core.system.exits import DONE, STOPPED
from core.training.device import DTYPES
from core.training.losses import loss_named
from core.training.memory_plans import GIB, blank_batch, plans_for
from core.training.setup import EMA, Training, make_optimizer, to_channels_last
from core.training.step import training_step

Build = Callable[[Config], nn.Module]  # makes the network

RESERVED_GIB = 1.6  # of a card, for what the count leaves out: context some 0.5, cuDNN's workspaces up to some 1.1


@dataclass(frozen=True)
class Need:
    """Need of one training step under a plan: its peak in GiB, and its arithmetic in floating-point operations."""

    plan: str
    peak_gib: float
    flops: int
    forward_flops: int = 0  # up to the loss of the first micro-batch


def count_step(config: Config, plan: str, precision: torch.dtype, build: Build = build_network) -> Need:
    """Count one training step, not compiled; takes seconds, allocates next to nothing, needs no GPU.

    Benchmarks give `build`, to count another network than V-Net.

    Raises:
        ValueError: when the network or the loss depends on values.
    """
    counter, tracker, forward_flops = FlopCounterMode(display=False), MemTracker(), []

    def on_loss(loss: Tensor) -> None:
        forward_flops.append(counter.get_total_flops())

    with FakeTensorMode():
        training, image, labels = blank_training(config, plan, precision, build)
        weights = training.ema.weights.values() if training.ema else ()
        tracker.track_external(training.network, training.optimizer, image, labels, *weights)
        try:
            with tracker, counter:
                # The tracker also tracks modules, and allows one call of each between resets.
                training_step(training, image, labels, on_loss=on_loss, after=tracker.reset_mod_stats)
        except DataDependentOutputException as error:
            what = f"the network or the loss asks for values ({error.func}), which a count does not have"
            raise ValueError(f"--plan: {what}; train without it") from error
    peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    return Need(plan, peak / GIB, counter.get_total_flops(), forward_flops[0])


def blank_training(
    config: Config, plan: str, precision: torch.dtype, build: Build = build_network
) -> tuple[Training, Tensor, Tensor]:
    """Return what a step of these settings works with, and a batch of zeros: image and labels."""
    network = build(config)
    if config.channels_last:
        to_channels_last(network)
    training = Training(
        network,
        loss_named(config.loss),
        make_optimizer(network, config.learning_rate, config.optimizer),
        torch.amp.GradScaler("cpu", enabled=False),
        precision,
        accumulation_steps=config.accumulation_steps,
        plan=plan,
        ema=EMA(network, config.ema_decay) if config.ema_decay else None,
    )
    return training, *blank_batch(config, torch.device("cpu"))


def supported_plans(config: Config) -> tuple[str, ...]:
    """Return the plans that can run the network of these settings."""
    return plans_for(build_network(replace(config, channels=min(config.channels, 8))))  # a narrow one tells it, too


def plan_for(needs: list[Need], card_gib: float) -> Need | None:
    """Return the fastest plan that should fit a card of `card_gib` GiB; None when none should."""
    return next((need for need in needs if need.peak_gib + RESERVED_GIB <= card_gib), None)


def format_plans(needs: list[Need]) -> str:
    """Return a table of the plans: counted figures, none measured."""
    lines = [f"{'plan':<10}{'peak GiB':>10}{'arithmetic':>12}"]
    lines += [f"{need.plan:<10}{need.peak_gib:>10.2f}{need.flops / needs[0].flops:>12.2f}" for need in needs]
    lines.append("Counted tensor by tensor for one training step; a card needs")
    lines.append(f"some {RESERVED_GIB} GiB more for its context and the convolutions' workspaces.")
    return "\n".join(lines)


def what_would_fit(config: Config, precision: torch.dtype, card_gib: float) -> str:
    """Return flags of settings near to `config` whose smallest plan should fit."""
    smallest = supported_plans(config)[-1]
    halvings = len(config.up_convs)
    key = "patch_size" if config.patch_size else "size"
    size, least = list(config.input_size), 2**halvings
    while max(size) > least:
        longest = size.index(max(size))
        size[longest] = max(least, size[longest] // 2 // least * least)
        smaller = replace(config, **{key: tuple(size)}, batch_size=1)
        if sum(size) > 3 * least and plan_for([count_step(smaller, smallest, precision)], card_gib):
            return f"{flag_of(key)} {' '.join(map(str, size))} --batch-size 1 should"
    return "its parameters alone are too many; take fewer --channels"


def show_plans(config: Config, card_gib: float | None) -> int:
    """Print what a step needs on a GPU under each memory plan, and which would be chosen for a card of that size."""
    precision = DTYPES["bf16" if config.precision == "auto" else config.precision]
    needs = [count_step(config, plan, precision) for plan in supported_plans(config)]
    print(format_plans(needs))
    if card_gib is None:
        return DONE
    chosen = plan_for(needs, card_gib)
    if chosen is None:
        print(f"no plan fits a card of {card_gib:g} GiB; {what_would_fit(config, precision, card_gib)}")
        return STOPPED
    print(f"on a card of {card_gib:g} GiB: {chosen.plan}")
    return DONE
