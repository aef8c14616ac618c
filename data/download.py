"""Download the 50 labelled cases of FLARE22 from Zenodo, verify the zip file and unpack it to data/FLARE22Train.

    python -m data.download [--to data] [--url URL|PATH] [--sha256 HEX] [--no-doctor]

The download is kept in data/FLARE22Train.zip.part: after a break, the same command continues from there. At the end,
data/doctor.py checks every case. Exit codes: 0 done; 1 refused: wrong file, no such page, an error in the data;
2 wrong usage; 3 stopped, the same command continues: no connection, full disk.
"""

import argparse
import hashlib
import os
import re
import shutil
import time
import zlib
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

from tqdm import tqdm

from core.system import exits
from core.system.files import check_room, user_path
from data import doctor
from dataset import find_cases, find_data

NAME = "FLARE22Train"
LICENCE = "https://zenodo.org/records/7860267"  # the page that states it
URL = f"{LICENCE}/files/{NAME}.zip"
SHA256 = "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154"
CHUNK = 2**20  # bytes read at once
TIMEOUT_SECONDS = 60.0  # without a byte
WAITS_SECONDS = (1, 2, 4, 8, 16)  # before each new try
RETRY_STATUS = (408, 429, 500, 502, 503, 504)  # HTTP statuses after which a new try may help


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, part: Path) -> None:
    """Append the rest of `url` to `part`; connect again when the connection is lost.

    Raises:
        ValueError: when the server refuses.
        OSError: when every try failed, or the disk is full; `part` is kept.
    """
    for wait_s in (*WAITS_SECONDS, None):
        start = part.stat().st_size if part.exists() else 0
        headers = {"Range": f"bytes={start}-", "User-Agent": f"{NAME}-download"}  # Zenodo refuses Python's own
        try:
            with urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
                return receive(response, part, start)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            if isinstance(error, HTTPError) and error.code == 416 and start:
                return None  # Range Not Satisfiable: the server has no more bytes
            if isinstance(error, HTTPError) and error.code not in RETRY_STATUS:
                raise ValueError(f"{url}: {error}; check the address, or try another --url") from error
            if wait_s is None:
                raise ConnectionError(f"{url}: {error}") from error
            exits.print_stderr(f"{error}; next try in {wait_s} s")
            time.sleep(wait_s)


def receive(response: HTTPResponse, part: Path, start: int) -> None:
    """Append a response to `part`, or overwrite `part` when the server ignores Range and sends the whole file."""
    have = start if response.status == 206 else 0
    total = have + (response.length or 0)
    check_room(part.parent, total - have + total, "the zip file and its unpacked content")  # of about the same size
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="downloading", disable=None)
    with bar, open(part, "ab" if have else "wb") as file:
        while block := response.read1(CHUNK):
            have += file.write(block)
            bar.update(len(block))
    if have < total:
        raise ConnectionError(f"the connection ended after {have} of {total} bytes")


def unpack(zip_file: Path, target: Path) -> None:
    """Unpack a data set to `target`, which appears only after every file is written.

    Raises:
        ValueError: when the zip file is damaged or holds no data set.
    """
    temporary = target.resolve().with_name(f".{NAME}.unpacking")  # resolved: a link may lead to a larger disk
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
    try:
        with ZipFile(zip_file) as archive:
            check_room(temporary.parent, sum(info.file_size for info in archive.infolist()), "the unpacked data")
            archive.extractall(temporary, tqdm(archive.infolist(), desc="unpacking", disable=None))
        os.replace(find_data(temporary), target.resolve())
    except (BadZipFile, zlib.error, EOFError, RuntimeError, FileNotFoundError) as error:
        raise ValueError(f"{zip_file}: cannot be unpacked ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    """Run the command; return the exit code."""
    args = parse_arguments()
    target, part = args.to / NAME, args.to / f"{NAME}.zip.part"
    zip_file = part if "://" in args.url else Path(args.url)
    with exits.refusing(exits.REFUSED):
        if target.exists() and any(target.iterdir()):
            print(f"{target}: is there already; to download it again, move it away", flush=True)
            print(f"{target}: {len(find_cases(target))} cases; to check them: python -m data.doctor {target}")
            return exits.DONE
    with exits.refusing(exits.USAGE):
        args.to.mkdir(parents=True, exist_ok=True)
    with exits.refusing(exits.REFUSED):
        try:
            if zip_file is part and not (part.exists() and sha256_of(part) == args.sha256):
                print(f"{args.url}: downloading to {part}; licence and terms: {LICENCE}", flush=True)
                download(args.url, part)
            if (found := sha256_of(zip_file)) != args.sha256:
                if zip_file is part:
                    part.unlink()
                raise ValueError(f"{args.url}: has sha256 {found}, expected {args.sha256}; download it again")
            unpack(zip_file, target)
            part.unlink(missing_ok=True)
        except OSError as error:
            exits.print_error(OSError(f"{args.to}: {error}; run the same command again to continue"))
            return exits.STOPPED
    print(f"{target}: verified and unpacked")
    return exits.DONE if args.no_doctor else doctor.main([str(target), "--output", str(args.to / f"{NAME}_doctor")])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=user_path, default=Path("data"), metavar="DIR", help=f"folder for {NAME}")
    parser.add_argument(
        "--url", type=os.path.expanduser, default=URL, metavar="URL|PATH", help="a mirror, or a local zip file"
    )
    parser.add_argument("--sha256", default=SHA256, type=str.lower, metavar="HEX", help="of the zip file")
    parser.add_argument("--no-doctor", action="store_true", help="do not check the data afterwards")
    args = parser.parse_args()
    if not re.fullmatch(r"https?://[^/:\s]+(:\d+)?/\S*", args.url) and not Path(args.url).is_file():
        parser.error(f"--url: got {args.url}, expected https://HOST/..., http://HOST/... or a zip file")
    if not re.fullmatch("[0-9a-f]{64}", args.sha256):
        parser.error(f"--sha256: got {args.sha256}, expected 64 hexadecimal digits")
    return args


if __name__ == "__main__":
    exits.run_command(main)
