"""Choose the memory plan: time training steps under each on the GPU, and step down when memory runs out later."""

import gc
import json
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import Config, config_to_dict
from core.system.exits import is_out_of_memory, one_line, print_line
from core.system.files import read_text
from core.system.processes import ALONE, Group
from core.training.kernels import TRITON_VERSION
from core.training.low_memory import is_supported
from core.training.run_folder import RunFolder
from core.training.setup import PLANS, Training
from core.training.step import apply_gradients, compute_gradients

GIB = 2**30
TIMED_STEPS, TIMED_SECONDS = 3, 10  # of a plan at most; with a first step each, three plans take less than a minute
FREED_GIB = 0.5  # of a card; when more is free than before, a plan may fit that did not
# Settings, besides the organs, that change what a step computes.
STEP_SETTINGS = (
    "size", "patch_size", "batch_size", "accumulation_steps", "channels", "down_convs", "up_convs", "norm",
    "optimizer", "loss", "ema_decay", "compile", "channels_last", "deterministic",
)  # fmt: skip


class NothingFitsError(MemoryError):
    """Under no memory plan does a step fit."""


@dataclass(frozen=True)
class Tried:
    """A plan that fits: the seconds of a step's gradients (0: not timed), and the peak in GiB."""

    seconds: float
    peak_gib: float


def choose_plan(
    training: Training, config: Config, device: torch.device, group: Group = ALONE, folder: RunFolder | None = None
) -> str:
    """Return the plan of the settings; under "auto" on a GPU that of the plans that fit whose steps take least time.

    What was measured is noted in the run folder's run.json. It is not measured again for the same settings, card and
    versions: in this run, or in another of the same parent folder. All processes return the same plan.

    Args:
        training: whose plan is to be chosen; not changed.
        config: the settings. With `deterministic`, nothing is timed, and the first plan that fits is taken.
        device: that this process computes on.
        group: the processes of the run.
        folder: the run folder, or None.

    Raises:
        NothingFitsError: when no plan fits, naming the command that tells which settings would.
    """
    if config.memory != "auto" or device.type != "cuda":
        return "off" if config.memory == "auto" else config.memory
    now = conditions(training, config, device, group)
    record = group.gather(recall(folder.path, now, device) if folder and group.first else None)[0]
    if record:
        how = "as measured before with these settings on this card"
    else:
        free_gib = torch.cuda.mem_get_info(device)[0] / GIB
        tables = group.gather(measure_plans(training, config, device))
        chosen = fastest(tables)
        plans = {plan: asdict(tried) for plan, tried in tables[0].items()}
        record = {"chosen": chosen, "free_gib": free_gib, "plans": plans, "conditions": now}
        how = "the first that fits" if config.deterministic else "the fastest that fits"
        if group.first:
            print(format_tried(tables[0]))
    if folder:
        folder.note(memory_plan=record)
    if group.first:
        print_line(f"memory plan {record['chosen']} ({how})", sys.stdout)
    return record["chosen"]


def measure_plans(training: Training, config: Config, device: torch.device) -> dict[str, Tried]:
    """Try each plan on a batch of zeros, and return those that fit.

    Raises:
        NothingFitsError: when none does.
    """
    fits, reason = {}, ""
    for plan in plans_for(training.network):
        try:
            fits[plan] = measure_plan(replace(training, plan=plan), config, device)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error, smaller=True):
                raise
            reason = one_line(error)
        free_memory()  # only behind the except clause has the error let go of the step's tensors
    if fits:
        return fits
    free, card = torch.cuda.mem_get_info(device)
    # train.py --plan counts the weights and Adam's state, too, which this process holds already.
    free_gib, card_gib = (free + torch.cuda.memory_reserved(device)) / GIB, card / GIB
    raise NothingFitsError(
        f"no memory plan fits into the {free_gib:.1f} GiB that this run can have of the card's {card_gib:.1f}; "
        f"train.py --plan --card-gib {free_gib:.1f} with the same settings tells what would ({reason})"
    )


def measure_plan(training: Training, config: Config, device: torch.device) -> Tried:
    """Try one plan: one step to see whether it fits, others to time it."""
    batch, seconds = blank_batch(config, device), []
    peak_gib = try_step(training, *batch)
    while not config.deterministic and len(seconds) < TIMED_STEPS and sum(seconds) < TIMED_SECONDS:
        started = clock(device)
        try_step(training, *batch)
        seconds.append(clock(device) - started)
    return Tried(statistics.median(seconds) if seconds else 0.0, peak_gib)


def clock(device: torch.device) -> float:
    """Return the seconds of a clock when the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(tables: list[dict[str, Tried]]) -> str:
    """Return the plan that fits every process's GPU and is the fastest on the slowest of them; of equals the first."""
    common = [plan for plan in PLANS if all(plan in table for table in tables)]
    return min(common, key=lambda plan: max(table[plan].seconds for table in tables), default=PLANS[-1])


def format_tried(table: dict[str, Tried]) -> str:
    """Return a small table of the plans that fit."""
    lines = [f"{'plan':<10}{'seconds a step':>16}{'peak GiB':>10}"]
    for plan, tried in table.items():
        seconds = f"{tried.seconds:.3f}" if tried.seconds else "not timed"
        lines.append(f"{plan:<10}{seconds:>16}{tried.peak_gib:>10.2f}")
    return "\n".join(lines)


def conditions(training: Training, config: Config, device: torch.device, group: Group) -> dict[str, Any]:
    """Return what the time and memory of a step depend on, as JSON holds it."""
    card, network = torch.cuda.get_device_properties(device), training.network
    settings = {key: value for key, value in config_to_dict(config).items() if key in STEP_SETTINGS}
    return json.loads(
        json.dumps(
            {
                "card": [card.name, card.total_memory],
                "versions": [torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), TRITON_VERSION],
                "processes": group.size,
                "precision": str(training.precision),
                "network": [type(network).__name__, sum(p.numel() for p in network.parameters()), plans_for(network)],
                "settings": settings | {"organs": len(config.organs)},
            }
        )
    )


def recall(run_dir: Path, now: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
    """Return what was measured under the same conditions by this run or another beside it, or None.

    A plan that did not fit may fit when more of the card is free than then; this is measured again.
    """
    free_gib = torch.cuda.mem_get_info(device)[0] / GIB
    for path in [run_dir / "run.json", *sorted(run_dir.parent.glob("*/run.json"))]:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # a file of something else
            record = json.loads(read_text(path)).get("memory_plan")
            same = record["conditions"] == now and record["chosen"] in PLANS
            if same and (len(record["plans"]) == len(PLANS) or free_gib <= record["free_gib"] + FREED_GIB):
                return record
    return None


def plans_for(network: nn.Module) -> tuple[str, ...]:
    """Return the plans that can run a network, from the fastest to the smallest."""
    return PLANS if is_supported(network, training=True) else PLANS[:1]


def blank_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch of zeros: image (B, 1, X, Y, Z) float32 and labels (B, X, Y, Z) uint8."""
    shape = (config.batch_size, *config.input_size)
    return torch.zeros(shape, device=device)[:, None], torch.zeros(shape, dtype=torch.uint8, device=device)


def try_step(training: Training, image: Tensor, labels: Tensor) -> float:
    """Compute a step's gradients with Adam's state and the EMA in memory; change nothing; return the peak in GiB."""
    buffers = [buffer.clone() for buffer in training.network.buffers()]
    torch.cuda.reset_peak_memory_stats(image.device)
    try:
        compute_gradients(training, image, labels)
        return torch.cuda.max_memory_allocated(image.device) / GIB
    finally:
        training.optimizer.zero_grad(set_to_none=True)
        restore_buffers(training.network, buffers)


def step_that_fits(
    training: Training, image: Tensor, labels: Tensor, annotated: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Run `training_step` and return its loss; out of memory, repeat it under the next smaller plan, which then stays.

    The first time, the same plan is tried once more with emptied caches, since memory may only be in fragments. When
    one of several processes runs out of memory, all of them repeat the step.

    Raises:
        NothingFitsError: when memory runs out under the smallest plan.
    """
    while True:
        buffers = [buffer.clone() for buffer in training.network.buffers()]
        failure = None
        try:
            loss = compute_gradients(training, image, labels, annotated=annotated, weights=weights)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error, smaller=True):
                raise
            failure = one_line(error)
        if not training.any_process(failure is not None):
            return apply_gradients(training, loss)
        loss = None
        free_memory()  # only behind the except clause has the error let go of the step's tensors
        restore_buffers(training.network, buffers)
        what = f"out of memory under the plan {training.plan}: the same step again"
        if training.has_freed_memory:
            plans = plans_for(training.network)
            smaller = plans[plans.index(training.plan) + 1 :]
            if not smaller:
                raise NothingFitsError(
                    "out of memory under the smallest memory plan; try a smaller --size, --patch-size or --channels "
                    f"({failure or 'another process ran out of memory'})"
                )
            training.plan = smaller[0]
            what += f" under {training.plan}"
        training.has_freed_memory = True
        print_line(what, sys.stdout)


@torch.no_grad()
def restore_buffers(network: nn.Module, buffers: list[Tensor]) -> None:
    """Restore a network's buffers, such as the running statistics of batch norms."""
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def free_memory() -> None:
    """Free the memory of a failed step."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_peak_gib(device: torch.device) -> float | None:
    """Return the peak of GPU memory in GiB since the last call and reset it; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return peak
