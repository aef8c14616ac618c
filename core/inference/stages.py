"""Overlap the stages of inference: read the next scan and write the one before while the network works on one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.scans.crop import Box
from core.scans.geometry import Geometry
from core.system.exits import is_out_of_memory, print_stderr, print_warning

Stage = Callable[["Segmentation"], None]


@dataclass
class Segmentation:
    """A scan that is being segmented. Each stage stores what the next stage needs and deletes its own input.

    Attributes:
        case: the scan's id.
        file: the NIfTI file, or the folder of a DICOM series.
        geometry: the scan's geometry, once it is read.
        box: the part of the scan that the network's grid covers.
        hu: the voxels in the box, in whole HU, int16.
        image: (X, Y, Z) uint8, the network's input.
        logits: (K, X, Y, Z) float32, the network's output.
        failure: the reason why the scan failed, or None.
        out_of_memory: whether it failed because memory ran out.
    """

    case: str
    file: Path
    geometry: Geometry | None = None
    box: Box | None = None
    hu: np.ndarray | None = None
    image: np.ndarray | None = None
    logits: Tensor | None = None
    failure: str | None = None
    out_of_memory: bool = False

    def keep_hu(self, voxels: np.ndarray) -> None:
        """Keep the voxels in the box in whole HU, at half the memory of float32, until the organs are measured."""
        whole = np.iinfo(np.int16)
        self.hu = np.empty(voxels.shape, np.int16)
        for kept, plane in zip(self.hu, voxels, strict=True):
            kept[:] = np.rint(plane).clip(whole.min, whole.max)

    def named(self, message: str) -> str:
        """Return a message that names this scan."""
        return message if message.startswith(str(self.file)) else f"case {self.case}: {message}"

    def warn(self, message: str) -> None:
        """Print a warning about this scan on stderr."""
        print_warning(self.named(message))


def run_overlapped(
    stages: Iterable[Stage], scans: dict[str, Path], device: torch.device, kind: type[Segmentation] = Segmentation
) -> Iterator[Segmentation]:
    """Segment scans with overlapping stages: the network runs on one scan while the next is read and the last written.

    Each stage works on one scan; at most one scan waits for the next stage. Memory peaks at the sum of the stages:
    about 10 bytes per voxel of the scan being read, the network's activations, and logits and labels of the scan being
    written (logits twice while a third scan waits). Each scan also keeps its HU, 2 bytes per voxel, until its organs
    are measured, which takes about 10 bytes per voxel of the largest organ's box. A scan that runs out of memory is
    tried again alone at the end, since other scans may have used the memory.

    Args:
        stages: prepare, predict and finish; each takes a scan as a Segmentation and changes it.
        scans: the file of each scan by case id.
        device: where the network runs.
        kind: what a scan is passed on as.

    Yields:
        each scan when it is done or has failed; in order, except for those tried again.
    """
    preparing, predicting, finishing = (partial(attempt, stage) for stage in stages)
    once_more = []
    with stage_thread(device) as reader, stage_thread(device) as writer:
        prepared = in_thread(reader, preparing, starmap(kind, scans.items()))
        try:
            for scan in in_thread(writer, finishing, map(predicting, prepared)):
                if scan.out_of_memory:
                    once_more.append(kind(scan.case, scan.file))
                else:
                    yield scan
        except KeyboardInterrupt:
            print_stderr("interrupted; what is being written is finished first")
            raise
    yield from map(finishing, map(predicting, map(preparing, once_more)))


def attempt(stage: Stage, scan: Segmentation) -> Segmentation:
    """Run a stage on a scan that has not failed before. A failure is stored in the scan, and the other scans go on."""
    if scan.failure:
        return scan
    try:
        stage(scan)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
        scan.out_of_memory = is_out_of_memory(error.__cause__ or error, smaller=True)
        if isinstance(error, RuntimeError):
            if not scan.out_of_memory:
                raise
            message = message if "out of memory" in message else f"out of memory ({message})"
        # As text: the error itself would keep all of the stage's arrays in memory.
        scan.failure = scan.named(message)
        scan.hu = scan.image = scan.logits = None
    return scan


@contextmanager
def stage_thread(device: torch.device) -> Iterator[Executor]:
    """Yield a thread for one stage. When the block ends, it finishes its scan but starts no other."""
    # On a CPU the network uses all cores, and more threads would only wait for one another. torch keeps this number for
    # each thread: the main thread's does not change.
    cores = 1 if device.type == "cpu" else torch.get_num_threads()
    thread = ThreadPoolExecutor(max_workers=1, initializer=torch.set_num_threads, initargs=(cores,))
    thread.submit(int).result()  # starts it now: later, a scan may have taken the memory that a thread needs
    try:
        yield thread
    finally:
        thread.shutdown(cancel_futures=True)


def in_thread(
    thread: Executor, stage: Callable[[Segmentation], Segmentation], scans: Iterable[Segmentation]
) -> Iterator[Segmentation]:
    """Run a stage on scans, in order: the thread works on the next scan while the caller works on this one."""
    running = None
    for scan in scans:
        following = thread.submit(stage, scan)
        if running:
            yield running.result()
        running = following
    if running:
        yield running.result()
