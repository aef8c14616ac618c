"""Many tasks in parallel processes, of which none outlives the command."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from threading import Thread
from typing import TypeVar

from core.system.exits import CtrlC

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_WORKERS = 8  # by default, whatever the number of cores: each may need 1 GiB and more
# What takes seconds to import: the server does it once, and every worker is a copy of it.
IMPORTED_ONCE = ["torch", "nibabel", "scipy.ndimage", "scipy.spatial"]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Yield each task and `function(task)` in the order in which they finish; one worker means this process.

    Use contextlib.closing when leaving the loop early: the processes then end at once.

    Args:
        function: picklable, as are the tasks (hashable too) and the results.
        tasks: what to do.
        workers: number of processes; where the system has no fork (Windows), all is done in this process.

    Raises:
        MemoryError: when a process was killed from outside, as a system does that runs out of memory.
    """
    if workers == 1 or "forkserver" not in multiprocessing.get_all_start_methods():
        for task in tasks:
            CtrlC.check()
            yield task, function(task)
        return
    executor = None
    futures: dict[Future, Task] = {}
    try:
        # A process that is just being started can neither be ended nor work without this one.
        with ctrl_c_later():
            executor = start_executor(workers)
            futures = {executor.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise MemoryError(
            f"one of {workers} worker processes was killed, most likely because memory ran out; "
            "try again with fewer --workers"
        ) from error
    finally:
        if not all(future.done() for future in futures):
            for worker in multiprocessing.active_children():
                worker.terminate()
        if executor:
            executor.shutdown(cancel_futures=True)


@contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; what is started in it never gets it, though a terminal sends it to all."""
    held = []
    # When it starts, Python's tracker of shared resources would let signals through again.
    resource_tracker.ensure_running()
    # A blocked signal still reaches this process by way of numpy's threads; what it starts is spared.
    handler = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def start_executor(workers: int) -> ProcessPoolExecutor:
    """Start a pool of processes, forked from a server as tasks come in."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_the_command)


def end_with_the_command() -> None:
    """Make this worker process end when its parent process does, even by SIGKILL."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
