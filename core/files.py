"""Files written whole, where there is room for them, and errors of writing that name the file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Whoever reads the file finds the old content or the new, never half of it.

    The temporary name keeps the suffix, by which libraries choose the format, and starts with a dot, which every
    listing of cases passes over. When the block raises, `path` is as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, as fsync has a file's content, where the system can."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
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


def gib(size: int) -> str:
    """A number of bytes for a message."""
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
