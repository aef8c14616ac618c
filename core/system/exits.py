"""How a command ends: exit codes, one clear sentence in place of a traceback, and signals that ask it to stop."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, TextIO

from tqdm import tqdm

DONE = 0
REFUSED = 1  # some input was refused or some case failed; the others are done and kept
USAGE = 2  # wrong usage or settings
STOPPED = 3  # a run that had to stop
INTERRUPTED = 130  # Ctrl-C
BY_SIGNAL = 128  # plus the signal's number, as shells have it: 143 for SIGTERM
# What asks a run to stop: Ctrl-C, kill and schedulers, and SLURM's --signal=USR1, which comes some time before the end.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

# Lower-case parts of RuntimeErrors that mean "out of memory", from torch, CUDA, oneDNN on a CPU, C++, cuBLAS and cuDNN.
OUT_OF_MEMORY = (
    "allocate memory", "out of memory", "could not create a primitive", "could not create a memory", "bad_alloc",
    "alloc_failed", "allocation_failed", "cudnn_status_internal_error", "cublas_status_not_initialized",
)  # fmt: skip
NO_ENGINE = ("find an engine to execute", "find a valid cudnn algorithm")

# An error from a DataLoader's worker has the worker's whole traceback as its message, the error itself at the end.
WORKER_TRACEBACK = "Traceback (most recent call last):"


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a script's main and end with the exit code that it returns; Ctrl-C ends it in one sentence."""
    use_utf8()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, CtrlC.note)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print_stderr("interrupted; what was written before is whole")
        sys.exit(INTERRUPTED)


class CtrlC:
    """Raises KeyboardInterrupt at Ctrl-C, as Python does, and remembers it.

    One that is raised while Python clears away a file object (io's finalizer asks it whether it is closed) is dropped
    without a word, and the command would go on. Loops that read or write files call `check` before each.
    """

    pressed = False

    @classmethod
    def note(cls, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        cls.pressed = True
        signal.default_int_handler(number, frame)

    @classmethod
    def check(cls) -> None:
        """Raise KeyboardInterrupt where Ctrl-C was pressed before and is lost."""
        if cls.pressed:
            raise KeyboardInterrupt


def use_utf8() -> None:
    """Let file names and printed text be UTF-8, whatever the locale; bytes that are not UTF-8 stay as they are.

    In a locale without UTF-8 and with Python's UTF-8 mode switched off (PYTHONUTF8=0), a path with a letter outside the
    locale cannot be opened. The command then starts again in UTF-8 mode, which its processes inherit.
    """
    again = os.environ.get("PYTHONUTF8") != "1"  # once only: -X utf8=0 overrides the variable
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8" and again:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    for name, errors in (("stdout", "surrogateescape"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:  # closed (2>&-)
            setattr(sys, name, io.TextIOWrapper(open(os.devnull, "wb")))  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):  # not where a program that runs the command collects its text
            stream.reconfigure(encoding="utf-8", errors=errors)


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


def is_out_of_memory(error: BaseException, smaller: bool = False) -> bool:
    """Return True when an error of Python, numpy or torch says that memory ran out.

    Args:
        error: of any type; torch.OutOfMemoryError is only one of those that torch raises.
        smaller: whether something smaller can be tried: then cuDNN's "no engine" counts too. It comes when the
            workspace of a convolution does not fit, but also when cuDNN cannot compute the convolution at all.
    """
    texts = OUT_OF_MEMORY + NO_ENGINE if smaller else OUT_OF_MEMORY
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)


def print_line(line: str, stream: TextIO) -> None:
    """Print a line on stdout or stderr at once, beside a progress bar if there is one.

    The line and its end are one write: lines of several threads and processes never run into each other. Where nobody
    reads them any more (2>&1 | head), or the disk is full (> log.txt), the work goes on.
    """
    with suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
        stream.write(f"{line}\n")
        stream.flush()


def print_stderr(line: str) -> None:
    """Print a line on stderr, as `print_line` does."""
    print_line(line, sys.stderr)


def print_warning(message: str) -> None:
    """Print a warning on stderr."""
    print_stderr(f"warning: {message}")


def print_error(error: Exception) -> None:
    """Print an error as one sentence on stderr."""
    name = type(error).__name__
    message = in_the_way(error) or str(error) or name
    if WORKER_TRACEBACK in message:
        message = message.rpartition(f"\n{name}: ")[2]
    print_stderr(f"error: {' '.join(line.strip() for line in message.splitlines())}")


def in_the_way(error: Exception) -> str | None:
    """Say what is in the way of a path to be written, a file or a folder; None for other errors."""
    expected = {
        FileExistsError: "is a file, expected a folder",
        NotADirectoryError: "leads through a file, expected folders",
        IsADirectoryError: "is a folder, expected a file",
    }.get(type(error))
    return f"{error.filename}: {expected}" if expected and getattr(error, "filename", None) else None


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks, or its type where there is none."""
    return " ".join(str(error).split()) or type(error).__name__


class Stopped(Exception):
    """The signal `number` has asked the command to stop, which then ends with `exit_code`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = BY_SIGNAL + number


class StopSignals:
    """Context that stores a stop signal in `received` instead of ending the process; a second one ends it at once."""

    def __init__(self):
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: object) -> None:
        """Note the first signal; let a second one end the process."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        # Not print, which may be at work already on what the signal has interrupted. Nobody may read it: Ctrl-C
        # ends tee, too (2>&1 | tee log), and with 2>&- there is no stderr.
        with suppress(OSError, AttributeError):
            os.write(sys.__stderr__.fileno(), b"stopping after this step; once more quits at once\n")


def leave_signals_to_the_command(_worker: int = 0) -> None:
    """Ignore stop signals in a data-loading process; terminals send them to all processes, the main one decides."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def how_it_ended(error: BaseException | None) -> str:
    """Describe how a run ended: with this error, or without one."""
    if error is None:
        return "done"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return f"stopped by {error}" if isinstance(error, Stopped) else one_line(error)
