"""Choose the memory plan: try a training step under each on the GPU, and step down when memory runs out later."""

import gc
from dataclasses import replace

import torch
from torch import Tensor, nn

from core.config import Config
from core.system.exits import is_out_of_memory, one_line
from core.training.low_memory import is_supported
from core.training.setup import PLANS, Training
from core.training.step import apply_gradients, compute_gradients

GIB = 2**30


class NothingFitsError(MemoryError):
    """Under no memory plan does a step fit."""


def choose_plan(training: Training, config: Config, device: torch.device) -> str:
    """Return the plan of the settings; under "auto" on a GPU try a step under each and return the fastest that fits.

    Raises:
        NothingFitsError: when none does, naming the command that tells which settings would.
    """
    if config.memory != "auto" or device.type != "cuda":
        return "off" if config.memory == "auto" else config.memory
    card_gib = torch.cuda.get_device_properties(device).total_memory / GIB
    failed = []
    for plan in plans_for(training.network):
        try:
            peak_gib = try_step(replace(training, plan=plan), *blank_batch(config, device))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error, smaller=True):
                raise
            failed.append(plan)
            reason = one_line(error)
        else:
            why = f"{' and '.join(failed)} did not fit" if failed else "the fastest"
            print(f"memory plan {plan} ({why}): {peak_gib:.2f} of {card_gib:.1f} GiB", flush=True)
            return plan
        free_memory()  # only behind the except clause has the error let go of the step's tensors
    free_gib = torch.cuda.mem_get_info(device)[0] / GIB
    raise NothingFitsError(
        f"no memory plan fits into the {free_gib:.1f} GiB that are free of the card's {card_gib:.1f}; train.py --plan "
        f"--card-gib {free_gib:.1f} with the same settings tells what would ({reason})"
    )


def plans_for(network: nn.Module) -> tuple[str, ...]:
    """Return the plans that can run a network, from the fastest to the smallest."""
    return PLANS if is_supported(network) else PLANS[:1]


def blank_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch of zeros: image (B, 1, X, Y, Z) float32 and labels (B, X, Y, Z) uint8."""
    shape = (config.batch_size, *config.size)
    return torch.zeros(shape, device=device)[:, None], torch.zeros(shape, dtype=torch.uint8, device=device)


def try_step(training: Training, image: Tensor, labels: Tensor) -> float:
    """Compute a step's gradients beside Adam's state and the EMA, change nothing, and return the peak in GiB."""
    buffers = [buffer.clone() for buffer in training.network.buffers()]
    torch.cuda.reset_peak_memory_stats(image.device)
    try:
        compute_gradients(training, image, labels)
        return torch.cuda.max_memory_allocated(image.device) / GIB
    finally:
        training.optimizer.zero_grad(set_to_none=True)
        restore(training.network, buffers)


def step_that_fits(training: Training, image: Tensor, labels: Tensor) -> Tensor:
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
            loss = compute_gradients(training, image, labels)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error, smaller=True):
                raise
            failure = one_line(error)
        if not training.any_process(failure is not None):
            return apply_gradients(training, loss)
        loss = None
        free_memory()  # only behind the except clause has the error let go of the step's tensors
        restore(training.network, buffers)
        what = f"out of memory under the plan {training.plan}: the same step again"
        if training.has_freed_memory:
            plans = plans_for(training.network)
            smaller = plans[plans.index(training.plan) + 1 :]
            if not smaller:
                raise NothingFitsError(
                    "out of memory under the smallest memory plan; try a smaller --size or --channels "
                    f"({failure or 'another process ran out of memory'})"
                )
            training.plan = smaller[0]
            what += f" under {training.plan}"
        training.has_freed_memory = True
        print(what, flush=True)


@torch.no_grad()
def restore(network: nn.Module, buffers: list[Tensor]) -> None:
    """Restore the running statistics of batch norms."""
    for buffer, before in zip(network.buffers(), buffers, strict=True):
        buffer.copy_(before)


def free_memory() -> None:
    """Free the memory of a failed step."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float | None:
    """Return the peak of GPU memory since the last call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak
