"""Files written whole, text as UTF-8, where there is room, one process at a time, and errors that name the file."""

import argparse
import csv
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from core.system.exits import print_warning

try:
    import fcntl
except ImportError:  # Windows has none: there, no two processes may share an output folder
    fcntl = None

TOKEN_BYTES = 6  # of the hexadecimal number that makes a temporary name another one each time
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what file systems without locks answer


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Whoever reads the file finds the old content or the new, never half of it.

    The temporary name keeps the suffix, by which libraries choose the format, and starts with a dot, which every
    listing of cases passes over; errors name `path` in its place. It is another one each time, so that threads,
    processes and hosts that share the folder never write to one file, and what a killed run left is in nobody's way.
    When the block raises, `path` is as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(TOKEN_BYTES)}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None or str(error.filename or temporary) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def open_text(path: str | Path, mode: str = "r") -> IO[str]:
    """Open a text file as UTF-8, whatever the locale, with its line ends as they are.

    Bytes that are not UTF-8, as in the name of a case from an old zip file, become surrogates, and bytes again when
    they are written. A byte order mark, as spreadsheet programs write it, is skipped in reading.
    """
    encoding = "utf-8-sig" if mode == "r" else "utf-8"
    return open(path, mode, encoding=encoding, errors="surrogateescape", newline="")


def read_text(path: str | Path) -> str:
    """Return the content of a text file, opened as `open_text`."""
    with open_text(path) as file:
        return file.read()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, opened as `open_text`."""
    with whole_file(path) as temporary, open_text(temporary, "w") as file:
        file.write(text)


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, by column, as a CSV file, whole; what a row lacks is an empty cell."""
    with whole_file(path) as temporary, open_text(temporary, "w") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let no other process or thread into a block with the same path; the file at `path` stays, for the next one.

    Where the file system has no locks, a warning says so.

    Raises:
        OSError: when the file cannot be opened.
    """
    with naming(path), open(path, "ab") as file:
        lock_file(file, path)
        yield


def lock_file(file: IO, path: Path, wait: bool = True) -> bool:
    """Lock an open file until it is closed, also by the end of a killed process.

    Returns:
        whether it is locked; where the file system has no locks it is not, and a warning says so.

    Raises:
        BlockingIOError: without `wait`, when another process has it.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print_warning(f"{path}: this file system has no locks; let one process at a time write into the folder")
        return False
    return True


def remove_left_over(path: Path) -> None:
    """Delete what killed processes left of `path` half written, when no other process writes it now."""
    name = f".{'[0-9a-f]' * 2 * TOKEN_BYTES}."
    for pattern in (name, name * 2):  # the second of a whole_file within a whole_file
        for temporary in path.parent.glob(pattern + glob.escape(path.name)):
            temporary.unlink(missing_ok=True)


def rename_old(path: Path, why: str) -> None:
    """Rename an earlier file, if there is one, to *.old, and print it on stderr; an older *.old file is replaced."""
    old = path.with_name(f"{path.name}.old")
    with suppress(FileNotFoundError):  # another process may be faster
        if path.is_file():
            os.replace(path, old)
            print_warning(f"{why}, so the earlier {path.name} is now {old}")


def sync_folder(folder: Path) -> None:
    """Sync a directory to disk (fsync), where the system supports it."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems cannot, and the file is in its place already
                os.fsync(opened)
        finally:
            os.close(opened)


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise an OSError when the disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: has {gib(free)} free, but {what} needs {gib(needed)}; make room, or choose another folder"
        )


def user_path(typed: str) -> Path:
    """Return the path that a user typed, with a leading ~ expanded; `type=` of every path in argparse.

    Raises:
        argparse.ArgumentTypeError: when it is empty, which would mean the current folder.
    """
    if not typed:
        raise argparse.ArgumentTypeError("got an empty path")
    return Path(os.path.expanduser(typed))  # not Path.expanduser, which has no answer for the home of an unknown user


def gib(size: int) -> str:
    """Format a number of bytes for a message."""
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an error of writing, which does not do so itself."""
    try:
        yield
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
