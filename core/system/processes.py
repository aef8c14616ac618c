"""Several processes at one run, one for each GPU, started by torchrun; in one process everything here does nothing.

Each process works out the gradient of its share of a batch, and all together add them up. That happens when a backward
pass is over and not during it, as DistributedDataParallel does it: then every memory plan is free to work out gradients
in its own order.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from core.system.exits import is_out_of_memory, one_line

# The environment variables of a process that torchrun has started, beside WORLD_SIZE.
TORCHRUN_SETS = (
    "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip
WAIT = timedelta(minutes=30)  # for the slowest process; preparing scans for the first time takes minutes
BUCKET_BYTES = 64 * 2**20  # of gradients that are exchanged at a time; few large messages take less time than many
# Words in the errors of NCCL and Gloo, and what they mean.
ENDED = "another process of this run has ended"
CAUSES = {
    "Duplicate GPU detected": "two processes are on one GPU; start as many processes as there are GPUs",
    "shared memory segment": "NCCL found too little shared memory; docker run takes --shm-size=1g",
    **dict.fromkeys(("Connection closed by peer", "Connection reset", "Connection refused", "Broken pipe"), ENDED),
    **dict.fromkeys(("Socket closed", "remote process exited", "Read error"), ENDED),
    "Timed out": f"another process of this run did not answer for {int(WAIT.total_seconds() / 60)} minutes",
}


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        rank: which of them this one is, from 0; the first writes all files.
        size: how many there are.
        cpu_group: the Gloo group for plain values, which are exchanged on the CPU and wait for no GPU.
    """

    rank: int = 0
    size: int = 1
    cpu_group: Any = None

    @property
    def first(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with naming_lost_processes():
            distributed.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any(self, value: bool) -> bool:
        """Return True when the value is true in any process."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value))
        with naming_lost_processes():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.cpu_group)
        return bool(flag)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            with naming_lost_processes():
                distributed.barrier(group=self.cpu_group)

    def average_gradients(self, network: nn.Module, loss: Tensor, weight: float) -> Tensor:
        """Replace gradients of this process's share of a batch by those of the whole; return the whole batch's loss.

        Args:
            network: whose gradients are to be replaced.
            loss: the mean over this process's share, a scalar.
            weight: the share, 0 to 1; over all processes 1.
        """
        if self.size == 1:
            return loss
        tensors = [loss.clone()]
        for parameter in network.parameters():
            if parameter.requires_grad:
                # A parameter that this share did not use has none; all processes must reduce the same list.
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                tensors.append(parameter.grad)
        with naming_lost_processes():
            under_way = []
            for bucket in in_buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                # What is of no weight may hold anything, and NaN times 0 is NaN.
                flat = flat.mul_(weight) if weight else flat.zero_()
                under_way.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
            for bucket, flat, work in under_way:
                work.wait()
                for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(values.view_as(tensor))
        return tensors[0]


def in_buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return tensors in buckets of one type, each of at most BUCKET_BYTES or a single tensor."""
    buckets: list[list[Tensor]] = []
    last: dict[torch.dtype, list[Tensor]] = {}  # the bucket that a type is put into
    for tensor in tensors:
        bucket = last.get(tensor.dtype)
        if bucket is None or sum(each.nbytes for each in [*bucket, tensor]) > BUCKET_BYTES:
            bucket = last[tensor.dtype] = []
            buckets.append(bucket)
        bucket.append(tensor)
    return buckets


ALONE = Group()


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Say in one sentence why an exchange between processes failed.

    Raises:
        MemoryError: when memory ran out in it.
        ConnectionError: otherwise, naming the cause.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        text = str(error)
        why = next((why for words, why in CAUSES.items() if words.lower() in text.lower()), None)
        why = why or f"the processes could not exchange their values ({one_line(error)})"
        raise ConnectionError(f"{why}; --resume goes on from the last checkpoint") from error


def join_group(device: torch.device) -> Group:
    """Join the processes that torchrun has started; alone where it has not.

    Talks over NCCL between GPUs and over Gloo between processors.

    Raises:
        ValueError: when the environment tells of several processes that torchrun has not started.
    """
    if not started_by_torchrun(os.environ):
        return ALONE
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(distributed.rendezvous("env://", timeout=WAIT))
    # torchrun keeps its store over a restart, with the addresses of the processes that are gone.
    store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # With the device NCCL takes its memory now, before a memory plan is chosen by what is left.
    own = {"device_id": device} if device.type == "cuda" else {}
    with naming_lost_processes():
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT, **own)
        cpu_group = distributed.new_group(backend="gloo", timeout=WAIT)
    return Group(rank, size, cpu_group)


def started_by_torchrun(environment: Mapping[str, str]) -> bool:
    """Return True when torchrun has started this process as one of several, by the environment variables that it sets.

    Raises:
        ValueError: when WORLD_SIZE tells of several processes, as a scheduler leaves it, without the rest.
    """
    size = environment.get("WORLD_SIZE", "1").strip() or "1"
    if size == "1":
        return False
    missing = [name for name in TORCHRUN_SETS if not environment.get(name)]
    if not missing and size.isdecimal():
        return True
    lacking = f" without {', '.join(missing)}" if missing else ""
    raise ValueError(
        f"the environment has WORLD_SIZE {size}{lacking}, so that torchrun has not started this process; for several "
        "processes start it by torchrun --nproc-per-node N, for one: unset WORLD_SIZE"
    )


def own_device(name: str) -> str:
    """Return this process's device name; under torchrun "auto" and "cuda" are the GPU of its local rank."""
    number = os.environ.get("LOCAL_RANK")
    if number is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{number}"


def leave_group(group: Group) -> None:
    """Leave the group, so that the other processes do not wait."""
    if group.size > 1:
        distributed.destroy_process_group()
