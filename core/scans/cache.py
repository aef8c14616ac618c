"""Keep resized cases on disk as bytes, with a checksum."""

import json
from pathlib import Path

import numpy as np
from isal import isal_zlib

from core.system.files import whole_file

CHECKSUM_BYTES = 4  # of CRC-32, at the end of a cache file
CACHE_VERSION = 4  # to be raised when what is cached for the same scan and settings changes


def write_cache(path: Path, volumes: np.ndarray, facts: dict) -> None:
    """Write a cache file: the bytes of the volumes, the scan's facts as JSON, and the checksum of both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = volumes.tobytes() + json.dumps(facts).encode()
    with whole_file(path) as temporary:
        temporary.write_bytes(content + checksum(content))


def checksum(content: bytes | np.ndarray) -> bytes:
    """CRC-32 in CHECKSUM_BYTES bytes."""
    return isal_zlib.crc32(content).to_bytes(CHECKSUM_BYTES, "big")
