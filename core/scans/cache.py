"""Keep resized cases on disk as bytes, with a checksum."""

import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from isal import isal_zlib

from core.system.exits import one_line
from core.system.files import whole_file

CHECKSUM_BYTES = 4  # of CRC-32, at the end of a cache file


@cache
def code_checksum(modules: Sequence[str]) -> int:
    """Return a CRC-32 of the source of modules, by name: an edit of how cases are prepared makes their cache anew."""
    return isal_zlib.crc32(b"".join(Path(sys.modules[name].__file__).read_bytes() for name in modules))


def write_cache(path: Path, volumes: np.ndarray, facts: dict) -> None:
    """Write a cache file: volumes (2, X, Y, Z) uint8, the scan's facts as JSON, and the checksum of both.

    Raises:
        OSError: when it cannot be written, as on a full disk; it says how to go on.
    """
    content = volumes.tobytes() + json.dumps(facts).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(content + checksum(content))
    except OSError as error:
        raise OSError(
            f"{path}: the cache cannot be written ({error.strerror or one_line(error)}); make room, give another "
            "--cache-dir, or train without a cache by --cache-dir null"
        ) from error


def read_cache(path: Path, size: tuple[int, int, int]) -> tuple[np.ndarray, dict] | None:
    """Memory-map a cache file: volumes (2, X, Y, Z) uint8 and the scan's facts; None when it is missing or damaged."""
    length = 2 * math.prod(size)
    try:
        # Copy on write: torch wants writable memory, and the file must not change.
        content = np.memmap(path, np.uint8, mode="c")
    except (FileNotFoundError, ValueError):  # ValueError: the file is empty
        return None
    if content.size <= length or checksum(content[:-CHECKSUM_BYTES]) != bytes(content[-CHECKSUM_BYTES:]):
        return None
    return content[:length].reshape(2, *size), json.loads(bytes(content[length:-CHECKSUM_BYTES]))


def checksum(content: bytes | np.ndarray) -> bytes:
    """Return the CRC-32 in CHECKSUM_BYTES bytes."""
    return isal_zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")
