"""Decode the pixels of DICOM files in a process of its own; core/scans/dicom_series.py starts it.

    python -m core.scans.dicom_pixels < request.json > frames

Decoders of compressed pixels are C code, and a damaged file can crash them, keep them busy or make them ask for all
memory. Here that ends this process, and whoever started it refuses the file and goes on.

The request is {"files": [[PATH, FRAMES], ...]}. The answer holds, frame by frame, FRAME and the stored values as int32
in the machine's byte order, row by row; or at last FAILURE and in words what was wrong.
"""

import argparse
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

try:
    import resource
except ImportError:  # not on Windows, where memory is not bounded
    resource = None

FRAME, FAILURE = b"F", b"E"
FRAME_SECONDS = 60  # to decode one frame; a 512x512 one takes a hundredth of a second
MEMORY_BYTES = 3 * 2**30  # of address space for Python and its libraries, and for one frame at a time
MEMORY_PER_BYTE = 4  # more for each byte of the largest file, which is read whole
REASON_CHARACTERS = 200  # of what a decoder says


def decode_errors() -> tuple[type[Exception], ...]:
    """Return what pydicom and its decoders raise on bad files; they have no base class of their own."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError),
        *(OSError, EOFError, MemoryError, struct.error, zlib.error, BytesLengthException, InvalidDicomError),
    )


def decode(path: str, frames: int) -> Iterator[np.ndarray]:
    """Return the stored values of a file's frames, (rows, columns) int32 each.

    Raises:
        ValueError: when it holds more frames or fewer.
    """
    import pydicom
    from pydicom.pixels import iter_pixels

    count = 0
    for count, frame in enumerate(iter_pixels(pydicom.dcmread(path), raw=True), start=1):
        if count > frames:
            break
        yield frame.astype(np.int32)
    if count != frames:
        raise ValueError(f"its pixels are {'more' if count > frames else 'fewer'} than the {frames} frame(s) declared")


def limit_resources(largest_bytes: int) -> None:
    """Bound this process's memory, and see that a crash leaves no core file behind."""
    if resource:
        limit = MEMORY_BYTES + MEMORY_PER_BYTE * largest_bytes
        with suppress(ValueError, OSError):  # a lower limit is in force already, or the system has none
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def set_alarm(seconds: int) -> None:
    """End this process by a signal after so many seconds, even within a decoder; 0 calls it off."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def main() -> None:
    """Answer the request on standard input."""
    parser = argparse.ArgumentParser(
        description="Decode DICOM files for core/scans/dicom_series.py: JSON in, frames out."
    )
    parser.parse_args()
    request = json.load(sys.stdin)
    # A library that prints must not print into the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        limit_resources(max(os.path.getsize(path) for path, _ in request["files"]))
        for path, frames in request["files"]:
            set_alarm(FRAME_SECONDS)
            for stored in decode(path, frames):
                answer.write(FRAME + stored.tobytes())
                answer.flush()
                set_alarm(FRAME_SECONDS)
    except decode_errors() as error:
        lines = str(error).splitlines() or [type(error).__name__]
        answer.write(FAILURE + ascii(lines[0][:REASON_CHARACTERS])[1:-1].encode())
    set_alarm(0)
    answer.close()


if __name__ == "__main__":
    main()
