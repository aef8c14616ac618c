"""Overlap the stages of inference: read the next scan and write the one before while the network works on one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.scans.geometry import Geometry
from core.system.exits import is_out_of_memory


@dataclass
class Segmentation:
    """A scan on its way to a label map; each stage leaves what the next one needs, and drops what it took itself.

    Attributes:
        case: the scan's id.
        file: where it is read from; for a DICOM series, its folder.
        geometry: its geometry, once it is read.
        image: (X, Y, Z) uint8, what the network is to see.
        logits: (K, X, Y, Z) float32, what it gave.
        failure: why no stage can go on with it.
        out_of_memory: whether that was for want of memory.
    """

    case: str
    file: Path
    geometry: Geometry | None = None
    image: np.ndarray | None = None
    logits: torch.Tensor | None = None
    failure: str | None = None
    out_of_memory: bool = False

    def named(self, message: str) -> str:
        """A message that says which scan it is about."""
        return message if message.startswith(str(self.file)) else f"case {self.case}: {message}"


def attempt(stage: Callable[[Segmentation], None], scan: Segmentation) -> Segmentation:
    """Take a scan through a stage, unless it has failed before; a failure is noted, so that the other scans go on."""
    if scan.failure:
        return scan
    try:
        stage(scan)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        scan.out_of_memory = is_out_of_memory(error.__cause__ or error)
        if isinstance(error, RuntimeError) and not scan.out_of_memory:
            raise
        # In words, since the error itself would keep alive all that the stage was working on.
        scan.failure = scan.named(str(error) or type(error).__name__)
        scan.image = scan.logits = None
    return scan


@contextmanager
def stage_thread(device: torch.device) -> Iterator[Executor]:
    """A thread for one stage. When the block ends, it finishes what it is at, but nothing that still waits."""
    # On a CPU the network has all cores, and more threads beside it would wait for one another. torch keeps this number
    # thread by thread: the main thread's stays.
    cores = 1 if device.type == "cpu" else torch.get_num_threads()
    thread = ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(cores,))
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def in_thread(
    thread: Executor, stage: Callable[[Segmentation], Segmentation], scans: Iterable[Segmentation]
) -> Iterator[Segmentation]:
    """Take scans through a stage, in order: the thread is at work on the next one while the caller is on this one."""
    running = None
    for scan in scans:
        following = thread.submit(stage, scan)
        if running:
            yield running.result()
        running = following
    if running:
        yield running.result()
