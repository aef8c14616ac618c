"""Unpack a zip file that anybody may have made: all of it is checked before any of it is written."""

import io
import os
import re
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from stat import S_IFDIR, S_IFMT, S_IFREG
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from tqdm import tqdm

from core.system.files import check_room, gib, naming

CHUNK = 2**20  # bytes unpacked at once
MAX_UNPACKED_BYTES = 128 * 2**30
# Unpacked bytes to the zip's own. Scans shrink 2 to 4 times, all-zero bytes 1000 times.
MAX_RATIO = 50
MAX_FILES = 10_000
MAX_DIRECTORY_BYTES = 4 * 2**20  # of the zip's table of contents: 10,000 files need some 2 MiB
MAX_NAME_BYTES = 255
ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of an encrypted entry or table of contents (APPNOTE 4.4.4)


class BoundedReads(io.FileIO):
    """A file that refuses to read much at once, as zipfile would do with a table of contents that claims gigabytes."""

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes.

        Raises:
            BadZipFile: when `size` is above MAX_DIRECTORY_BYTES.
        """
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise BadZipFile(f"its table of contents has {size} bytes, expected at most {MAX_DIRECTORY_BYTES}")
        return super().read(size)


def extract(zip_file: Path, folder: Path) -> None:
    """Write every file of a zip below a new folder, after all of its entries have been checked.

    Raises:
        ValueError: when the zip is unsafe or broken.
        OSError: when the disk is full.
    """
    with zip_errors(zip_file), BoundedReads(zip_file) as raw, ZipFile(raw) as archive:
        entries = check_entries(archive, zip_file.stat().st_size)
        size = sum(info.file_size for info, _ in entries)
        check_room(folder, size, "what the zip file holds")
        with tqdm(total=size, unit="B", unit_scale=True, unit_divisor=1024, desc="unpacking", disable=None) as bar:
            for info, path in entries:
                if info.is_dir():
                    (folder / path).mkdir(parents=True, exist_ok=True)
                else:
                    extract_file(archive, info, folder / path, bar)


def extract_file(archive: ZipFile, info: ZipInfo, path: Path, bar: tqdm) -> None:
    """Write one file of a zip to a new path; zipfile stops at the declared size and checks the CRC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), archive.open(info) as content, open(path, "xb") as file:
        while block := content.read(CHUNK):
            file.write(block)
            bar.update(len(block))
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != info.file_size:
        raise BadZipFile(f"{info.filename!r} has {path.stat().st_size} bytes, declared are {info.file_size}")


@contextmanager
def zip_errors(zip_file: Path) -> Iterator[None]:
    """Turn all that zipfile raises about a file's content into a ValueError that names the file."""
    try:
        yield
    # RuntimeError: a kind of entry that zipfile does not know. ValueError: numbers and texts that are none.
    except (BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{zip_file}: cannot be unpacked, {str(error) or 'it ends too early'}") from error


def check_entries(archive: ZipFile, zip_bytes: int) -> list[tuple[ZipInfo, PurePosixPath]]:
    """The entries of a zip of that size with their relative paths, when all are safe to write.

    Raises:
        BadZipFile: saying which is not, and why.
    """
    infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    if len(infos) > MAX_FILES:
        raise BadZipFile(f"it has {len(infos)} entries, expected at most {MAX_FILES}")
    if size > MAX_UNPACKED_BYTES:
        raise BadZipFile(f"it would unpack to {gib(size)}, expected at most {gib(MAX_UNPACKED_BYTES)}")
    if size > MAX_RATIO * zip_bytes:
        raise BadZipFile(f"its {zip_bytes} bytes would unpack to {size}, expected at most {MAX_RATIO} times as many")
    entries = [(info, check_entry(info)) for info in infos]
    # Some systems hold names for the same that differ in case or in how an umlaut is stored.
    keys = [PurePosixPath(unicodedata.normalize("NFC", str(path)).casefold()) for _, path in entries]
    files = {key for key, (info, _) in zip(keys, entries, strict=True) if not info.is_dir()}
    seen = set()
    for key, (info, _) in zip(keys, entries, strict=True):
        if key in seen or not files.isdisjoint(key.parents):
            raise BadZipFile(f"two entries mean {info.filename!r}")
        seen.add(key)
    return entries


def check_entry(info: ZipInfo) -> PurePosixPath:
    """The relative path of an entry that is safe to write.

    Raises:
        BadZipFile: when it leads out of the folder, is neither a file nor a folder, or cannot be read.
    """
    name = info.orig_filename  # as stored; zipfile cuts `filename` at a zero byte
    parts = name.removesuffix("/").split("/")
    # A backslash and a colon lead elsewhere on Windows; an empty first part is an absolute path.
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f\x7f-\x9f]", name):
        raise BadZipFile(f"the name {name!r} does not stay in the folder, or is none")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise BadZipFile(f"the name {name[:40]!r}... is longer than {MAX_NAME_BYTES} bytes")
    kind = S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
    if kind not in (0, S_IFDIR if info.is_dir() else S_IFREG):
        raise BadZipFile(f"{name!r} is a link, a device or the like, expected only files and folders")
    if info.flag_bits & ENCRYPTED:
        raise BadZipFile(f"{name!r} is encrypted")
    if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise BadZipFile(f"{name!r} is compressed by method {info.compress_type}, expected 0 (stored) or 8 (deflated)")
    if info.header_offset < 0 or (info.is_dir() and info.file_size):
        raise BadZipFile(f"{name!r} is described wrongly")
    return PurePosixPath(*parts)
