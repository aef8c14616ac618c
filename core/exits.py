"""How a command ends: exit codes, and one clear sentence in place of a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tqdm import tqdm

DONE = 0
REFUSED = 1  # some input was refused or some case failed; the others are done and kept
USAGE = 2  # wrong usage or settings
STOPPED = 3  # a run that had to stop
INTERRUPTED = 130  # Ctrl-C

# An error from a DataLoader's worker has the worker's whole traceback as its message, the error itself at the end.
WORKER_TRACEBACK = "Traceback (most recent call last):"


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and end with the exit code that it returns; Ctrl-C ends it in one sentence."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was written before is whole", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def refusing(code: int) -> Iterator[None]:
    """End the command with `code` when the block raises what a user can cause: bad values, files and folders.

    Where memory runs out, the code is STOPPED.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        print_error(error)
        raise SystemExit(code) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print_error(error)
        raise SystemExit(STOPPED) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of Python, numpy or torch says that memory ran out; torch has no type of its own on a CPU."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)


def print_warning(message: str) -> None:
    """Print a warning on stderr, beside a progress bar if there is one."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def print_error(error: Exception) -> None:
    """Print an error as one sentence on stderr."""
    name = type(error).__name__
    message = str(error) or name
    if WORKER_TRACEBACK in message:
        message = message.rpartition(f"\n{name}: ")[2]
    print(f"error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
