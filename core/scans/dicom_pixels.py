"""Decode the pixels of DICOM files; core/scans/dicom_series.py starts it as a process for compressed ones.

    python -m core.scans.dicom_pixels < request.json > frames

Decoders of compressed pixels are C code, and a damaged file can crash them, keep them busy or make them ask for all
memory. Here that ends this process, and whoever started it refuses the file and goes on.

The request is {"files": [[PATH, FRAMES], ...]}. The answer holds, frame by frame, FRAME and the stored values as int32
in the machine's byte order, row by row; or at last FAILURE and in words what was wrong.
"""

import io
import json
import os
import signal
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.pixels import iter_pixels
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

try:
    import resource
except ImportError:  # not on Windows, where memory is not bounded
    resource = None

FRAME, FAILURE = b"F", b"E"
FRAME_SECONDS = 60  # to decode one frame; a 512x512 one takes a hundredth of a second
MEMORY_BYTES = 3 * 2**30  # of address space for Python and its libraries, and for one frame at a time
MEMORY_PER_BYTE = 4  # more for each byte of the largest file, which is read whole
REASON_CHARACTERS = 200  # of what a decoder says
PREAMBLE_BYTES, MAGIC = 128, b"DICM"  # PS3.10 7.1: what every DICOM file begins with; some exporters leave it out
HEAD_BYTES = 1024  # of a file, which show that it is DICOM
FIRST_GROUPS = (2, 8)  # the first element is of the file's meta information, or of the dataset itself
LONG_VRS = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"UC", b"UR", b"OD", b"OF", b"OL", b"OV")  # PS3.5 7.1.2
MAX_FIRST_BYTES = 512  # of the first element's value, without which a file cannot be told from others
# What pydicom and its decoders raise on bad files; they have no base class of their own.
DECODE_ERRORS = (
    *(ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError),
    *(OSError, EOFError, MemoryError, struct.error, zlib.error, BytesLengthException, InvalidDicomError),
)


def reason_of(error: Exception) -> str:
    """Return why pixels cannot be decoded, in ASCII: the first line of what a decoder says."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ascii(lines[0][:REASON_CHARACTERS])[1:-1]


def dataset_start(head: bytes) -> int | None:
    """Return where the data elements of a DICOM file begin, by its first HEAD_BYTES; None when it is no DICOM.

    A file without the preamble, or with a damaged one, is DICOM when its first two elements are.
    """
    begins = PREAMBLE_BYTES + len(MAGIC)
    if head[PREAMBLE_BYTES:begins] == MAGIC:
        return begins
    after_magic = len(MAGIC) if head.startswith(MAGIC) else 0
    return next((start for start in (after_magic, PREAMBLE_BYTES, begins) if begins_elements(head[start:])), None)


def begins_elements(content: bytes) -> bool:
    """Return True when bytes begin with two data elements in the order of their tags (PS3.5 7.1)."""
    for order in ("<", ">"):
        at, last = 0, (0, 0)
        for _ in range(2):
            if len(content) < at + 12:
                break
            tag = struct.unpack_from(f"{order}HH", content, at)
            vr = content[at + 4 : at + 6]
            if vr.isalpha() and vr.isupper():
                size, value = (
                    (struct.unpack_from(f"{order}I", content, at + 8)[0], at + 12)
                    if vr in LONG_VRS
                    else (struct.unpack_from(f"{order}H", content, at + 6)[0], at + 8)
                )
            else:
                size, value = struct.unpack_from(f"{order}I", content, at + 4)[0], at + 8
            if tag[0] not in FIRST_GROUPS or tag <= last or size > MAX_FIRST_BYTES:
                break
            at, last = value + size, tag
        else:
            return True
    return False


def open_dicom(path: str | os.PathLike) -> IO[bytes]:
    """Open a DICOM file; one without the preamble is read into memory and given one."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        start = dataset_start(head)
        if start is not None and not head[PREAMBLE_BYTES:].startswith(MAGIC):
            file.seek(start)
            return io.BytesIO(bytes(PREAMBLE_BYTES) + MAGIC + file.read())
    return open(path, "rb")


def name_transfer_syntax(dataset: Dataset) -> None:
    """Set the transfer syntax of a file that does not name it: an uncompressed one, as its elements are written."""
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit


def decode(path: str | os.PathLike, frames: int) -> Iterator[np.ndarray]:
    """Return the stored values of a file's frames, (rows, columns) int32 each.

    Raises:
        ValueError: when it holds more frames or fewer.
    """
    with open_dicom(path) as file:
        dataset = pydicom.dcmread(file)
        name_transfer_syntax(dataset)
    count = 0
    for count, frame in enumerate(iter_pixels(dataset, raw=True), start=1):
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
    except DECODE_ERRORS as error:
        answer.write(FAILURE + reason_of(error).encode())
    set_alarm(0)
    answer.close()


if __name__ == "__main__":
    main()
