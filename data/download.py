"""Download FLARE22's 50 labelled cases, verify the file and unpack it where train.py looks for it.

    python -m data.download [--to data] [--url URL|PATH] [--sha256 HEX]

leaves data/FLARE22Train/images and data/FLARE22Train/labels. While the file comes it is data/FLARE22Train.zip.part; the
same command goes on from there after a break. The sha256 decides whether what came is the right file, so the file may
be put together from several answers and several servers. Only a verified file is unpacked, into a temporary folder that
gets its name when all is written; then the zip is removed. A zip file given as PATH is left as it is. At the end the
doctor (data/doctor.py) looks at every case, and leaves what was found in data/FLARE22Train_doctor.

Exit codes: 0 done, or there already; 1 refused, the same command will not help: wrong file, unsafe zip, no such page,
an error in the data; 2 wrong usage; 3 stopped, the same command goes on: no connection, full disk.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from http.client import HTTPException, HTTPResponse, InvalidURL, responses
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from core.config import load_organs
from core.scans.files import find_files
from core.scans.nifti import Reading
from core.system.exits import DONE, REFUSED, STOPPED, USAGE, print_error, refusing, run_command
from core.system.files import check_room, gib, naming
from core.system.parallel import MOST_WORKERS, cores
from data.doctor import REPORT, diagnose
from data.unzip import extract
from dataset import find_data

NAME = "FLARE22Train"
CASES = 50
LICENCE = "https://zenodo.org/records/7860267"  # the page that states it
URL = f"{LICENCE}/files/{NAME}.zip"
SHA256 = "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154"
RECORD = "download.json"  # in the unpacked folder: where it came from, and every file with its size in bytes

USER_AGENT = f"{NAME}-download/1.0"  # Zenodo refuses Python's own
CHUNK = 2**20  # bytes read at once
STALL_SECONDS = 60.0  # without a byte; the connection is then given up
RETRIES = 5  # in a row; as many as take half a minute
BACKOFF_SECONDS = 1.0  # before the first; each further one waits twice as long
LONGEST_RETRY_AFTER = 120.0  # seconds that a server may ask us to wait
# Request timeout, too many requests, and the server errors that pass.
PASSING_STATUS = (408, 429, 500, 502, 503, 504)

# 50 scans of 512 x 512 x 100 voxels as float32 are 5 GiB, gzipped about 2.
MAX_ZIP_BYTES = 32 * 2**30


class Lost(Exception):
    """The connection failed in a way that may pass; `wait_s` is how long the server asks us to wait."""

    def __init__(self, why: str, wait_s: float = 0.0):
        """Say why."""
        super().__init__(why)
        self.wait_s = wait_s


class WrongRange(Exception):
    """The server cannot, or does not, go on at the byte that was asked for."""


# ---- What is there already -------------------------------------------------------------------------------------------


def is_there(target: Path, sha256: str) -> bool:
    """Whether the folder holds the whole data set; False when there is nothing.

    What this command unpacked must come from the zip with that sha256 and have every file in its size. What somebody
    else unpacked passes with FLARE22's 50 cases.

    Raises:
        ValueError: when something else is there.
    """
    if not os.path.lexists(target) or is_empty_folder(target):
        return False
    try:
        folder = find_data(target)
        if (folder / RECORD).is_file():
            check_record(folder, sha256)
        elif sha256 != SHA256:
            raise ValueError(f"it has no {RECORD} that says from which file it came")
        elif count_cases(folder) != CASES:
            raise ValueError(f"it holds {count_cases(folder)} of {CASES} cases")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{target}: is there, but is not the whole data set ({error}); move it away, or choose another --to"
        ) from error
    return True


def is_empty_folder(path: Path) -> bool:
    """Whether the path is a folder, not a link to one, with nothing in it."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def check_record(folder: Path, sha256: str) -> None:
    """Compare a folder with the record that `unpack` left in it.

    Raises:
        ValueError: when it came from another file, or a file is missing or has another size.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise ValueError(f"{RECORD} is not as this command writes it")
    if record.get("sha256") != sha256:
        raise ValueError(f"it came from a file with sha256 {record.get('sha256')}, not {sha256}")
    there = sizes_in(folder)
    wrong = [name for name, size in record["files"].items() if there.get(name) != size]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(record['files'])} files are missing or of another size: {wrong[0]} ...")


def sizes_in(folder: Path) -> dict[str, int]:
    """Every file below a folder by its relative name, with its size in bytes."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def count_cases(folder: Path) -> int:
    """The number of cases with a scan and a label map, by their files' names."""
    return len(find_files(folder / "images").keys() & find_files(folder / "labels").keys())


# ---- Downloading -----------------------------------------------------------------------------------------------------


def download(url: str, part: Path, sha256: str) -> None:
    """Bring the file at `url` to `part`, going on with what an earlier run left there, until its sha256 is right.

    Raises:
        ValueError: when the server has no such file or sends another one, which is removed.
        OSError: when the connection breaks for good or the disk is full; what came is kept.
    """
    if part.exists() and sha256_of(part) == sha256:
        print(f"{part}: is whole")
        return
    print(f"{url}: downloading to {part} (after a break, the same command goes on from there)", flush=True)
    pieced = fetch(url, part, resume=True)
    came = sha256_of(part)
    if came != sha256 and pieced:
        # A server that lies about ranges, or another file's beginning: only a file in one go tells.
        notice("the parts do not make up the right file; starting again")
        fetch(url, part, resume=False)
        came = sha256_of(part)
    if came != sha256:
        size = size_of(part)
        part.unlink()
        raise ValueError(
            f"{url}: sent a file of {size} bytes with sha256 {came}, expected sha256 {sha256}; it was removed, "
            "try later, or another --url"
        )


def fetch(url: str, part: Path, resume: bool) -> bool:
    """Bring whatever is at `url` to `part`, with new tries after a stall or a break.

    Returns:
        Whether the file was put together from more than one answer.
    """
    failures, furthest, etag = 0, 0, None
    while True:
        start = size_of(part) if resume else 0
        try:
            with open_url(url, start, etag) as response:
                start, total = find_start(response, start)
                check_answer(response, part, start, total)
                etag = strong_etag(response)
                receive(response, part, start, total)
            return start > 0
        except WrongRange as wrong:
            if not start:
                raise ValueError(f"{url}: {wrong}") from wrong
            notice(f"{wrong}; starting again")
            resume = False
        except Lost as lost:
            have = size_of(part)
            # Only new ground counts as progress: a server that drops early and knows no ranges must not go on for ever.
            failures = 1 if have >= furthest + CHUNK else failures + 1
            furthest = max(furthest, have)
            if failures > RETRIES:
                kept = f"; {have} bytes are kept in {part}, the same command goes on from there" if have else ""
                raise ConnectionError(f"{url}: {lost}, gave up after {failures} tries{kept}") from lost
            wait_s = max(BACKOFF_SECONDS * 2 ** (failures - 1), lost.wait_s)
            notice(f"{lost}; try {failures} of {RETRIES} in {wait_s:g} s")
            time.sleep(wait_s)


def open_url(url: str, start: int, etag: str | None) -> HTTPResponse:
    """Ask for a file from byte `start` on, through the proxy that the environment names.

    Raises:
        Lost: when another try may help.
        WrongRange: when the file has no such byte.
        ValueError: when the server refuses.
    """
    headers = {"User-Agent": USER_AGENT}
    if start:
        headers["Range"] = f"bytes={start}-"
        if etag:
            headers["If-Range"] = etag
    try:
        return urlopen(Request(url, headers=headers), timeout=STALL_SECONDS)
    except HTTPError as error:
        with error:
            code = error.code
            answer = f"the server answered {code} {responses.get(code, '')}".rstrip()
            if code in PASSING_STATUS:
                asked = error.headers.get("Retry-After", "")
                wait_s = min(float(asked), LONGEST_RETRY_AFTER) if re.fullmatch("[0-9]{1,9}", asked) else 0.0
                raise Lost(answer, wait_s) from error
            if code == 416 and start:
                raise WrongRange(answer) from error
            raise ValueError(f"{url}: {answer}{', a redirect that leads nowhere' * (300 <= code < 400)}") from error
    except InvalidURL as error:
        raise ValueError(f"{url}: {error}") from error
    except (OSError, HTTPException) as error:
        raise Lost(reason_of(error)) from error


def find_start(response: HTTPResponse, start: int) -> tuple[int, int | None]:
    """Where in the file the answer begins, 0 when the server passed over the range, and the file's size in bytes.

    The size is None when the server does not tell.

    Raises:
        WrongRange: when the answer is neither the whole file nor its rest from `start` on.
    """
    if response.status == 200:
        return 0, response.length
    said = response.headers.get("Content-Range", "")
    place = re.fullmatch("bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})", said)
    if response.status == 206 and start and place and int(place[1]) == start <= int(place[2]) < int(place[3]):
        return start, int(place[3])
    raise WrongRange(f"asked for bytes from {start} on, the server answered {response.status} with {said!r}")


def check_answer(response: HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Look at what will come before `part` is touched; a `total` of None passes.

    Raises:
        ValueError: for a web page, and for more than MAX_ZIP_BYTES.
        OSError: when the rest of the zip and what will be unpacked from it do not fit on the disk.
    """
    if response.headers.get_content_type() == "text/html":  # a login page, or a block's explanation
        raise ValueError(f"{response.url}: sent a web page, expected a zip file; open it in a browser, or try later")
    if total is None:
        return
    if total > MAX_ZIP_BYTES:
        raise ValueError(f"{response.url}: has {gib(total)}, expected at most {gib(MAX_ZIP_BYTES)}")
    # Its files are compressed themselves, so the unpacked ones are about as large as the zip. Checked exactly later.
    check_room(part.parent, total - start + total, "the zip file with what it holds")


def strong_etag(response: HTTPResponse) -> str | None:
    """The mark of this version of the file, where the server gives one that stands for its very bytes."""
    etag = response.headers.get("ETag", "")
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag) else None


def receive(response: HTTPResponse, part: Path, start: int, total: int | None) -> None:
    """Write the answer into `part` from byte `start` on, over what was there when that is 0.

    Raises:
        Lost: when nothing comes any more before the end.
        ValueError: when more than MAX_ZIP_BYTES come.
    """
    have = start
    with (
        naming(part),
        open(part, "ab" if start else "wb") as file,
        tqdm(
            total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc="downloading", disable=None
        ) as bar,
    ):
        while have != total and have <= MAX_ZIP_BYTES:
            try:
                block = response.read1(CHUNK if total is None else min(CHUNK, total - have))
            except (OSError, HTTPException) as error:
                raise Lost(f"{reason_of(error)} after {have} bytes") from error
            if not block:
                break
            file.write(block)
            have += len(block)
            bar.update(len(block))
    if have > MAX_ZIP_BYTES:
        part.unlink()
        raise ValueError(f"{response.url}: sends more than {gib(MAX_ZIP_BYTES)}")
    if total is not None and have < total:
        raise Lost(f"the connection ended after {have} of {total} bytes")


def reason_of(error: Exception) -> str:
    """What went wrong with a connection, in words."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"nothing came for {STALL_SECONDS:g} s"
    return f"the connection failed ({getattr(reason, 'strerror', None) or reason or type(reason).__name__})"


# ---- Unpacking -------------------------------------------------------------------------------------------------------


def unpack(zip_file: Path, target: Path, source: str, sha256: str) -> None:
    """Unpack a data set's zip file to the folder `target`, which appears when all of it is written.

    Args:
        zip_file: with images and labels at the top, or under one or two folders FLARE22Train.
        target: not there, or an empty folder.
        source: where the zip came from, for the record.
        sha256: the zip's, for the record.

    Raises:
        ValueError: naming the zip and what in it is unsafe, broken or missing; nothing is left behind.
        OSError: when the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as temporary:
        unpacked = Path(temporary) / NAME
        unpacked.mkdir()
        extract(zip_file, unpacked)
        folder = find_images_and_labels(zip_file, unpacked)
        record = {"source": source, "sha256": sha256, "files": sizes_in(folder)}
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(folder, target)


def find_images_and_labels(zip_file: Path, unpacked: Path) -> Path:
    """The folder with images and labels in an unpacked zip.

    Raises:
        ValueError: naming the zip, when there is none, or it holds no case.
    """
    try:
        folder = find_data(unpacked)
        cases = count_cases(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{zip_file}: {str(error).replace(str(unpacked), 'what it holds')}") from error
    if not cases:
        raise ValueError(f"{zip_file}: holds no case, expected images/CASE_0000.nii.gz and labels/CASE.nii.gz")
    return folder


# ---- Files -----------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """The size of a file in bytes, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def notice(text: str) -> None:
    """Say on stderr how it goes on."""
    print(text, file=sys.stderr, flush=True)


# ---- The command -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Leave the data set in --to, and say what to do next; return the exit code."""
    args = parse_arguments()
    target, part = args.to / NAME, args.to / f"{NAME}.zip.part"
    with refusing(REFUSED):
        there = is_there(target, args.sha256)
    if not there:
        with refusing(USAGE):
            make_writable_folder(args.to)
        print(f"The data's licence and terms are its source's: {LICENCE}")
        with refusing(REFUSED):
            try:
                install(args.url, args.sha256, target, part)
            except OSError as error:
                print_error(error)
                return STOPPED
    cases = count_cases(find_data(target))
    print(f"{target}: {cases} cases{', there already; nothing was downloaded' * there}")
    report = args.to / f"{NAME}_doctor"
    if args.no_doctor or (report / REPORT).is_file():
        print(f"To check them{' again' * (report / REPORT).is_file()}: python -m data.doctor {target}")
        return DONE
    with refusing(REFUSED):
        return examine_data(target, report)


def install(source: str | Path, sha256: str, target: Path, part: Path) -> None:
    """Bring the data set of a URL, or of a local zip file, to the folder `target`.

    Raises:
        ValueError: when the file is wrong or unsafe.
        OSError: when it cannot be fetched, or the disk is full.
    """
    if isinstance(source, Path):
        came = sha256_of(source)
        if came != sha256:
            raise ValueError(f"{source}: has sha256 {came}, expected {sha256}; if it is meant so, give it by --sha256")
        unpack(source, target, source.name, sha256)
        return
    download(source, part, sha256)
    unpack(part, target, source, sha256)
    part.unlink()
    print(f"{part}: unpacked and removed")


def examine_data(target: Path, output: Path) -> int:
    """Have the doctor look at the data set; return the exit code.

    Raises:
        OSError, ValueError: when its results cannot be written.
    """
    print("Now every file is read to its end (python -m data.doctor does the same):", flush=True)
    sick = diagnose(target, output, load_organs(), Reading(), min(cores(), MOST_WORKERS))
    return REFUSED if sick else DONE


def make_writable_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        OSError: when nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with naming(folder), tempfile.TemporaryFile(dir=folder):
        pass


def read_source(text: str) -> str | Path:
    """What --url names: an http or https address as text, or an existing file as a path.

    Raises:
        argparse.ArgumentTypeError: when it is neither.
    """
    if "://" not in text:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"{text}: no such file; an address begins with https://")
        return Path(text)
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: is no address ({error})") from error
    if not whole:
        raise argparse.ArgumentTypeError(f"{text}: expected https://HOST/..., http://HOST/... or a file")
    # Spaces and umlauts as they are sent; what is escaped already stays.
    return quote(text, safe="%/:=&?~#+!$,;'@()*[]")


def read_sha256(text: str) -> str:
    """A sha256 in lower case.

    Raises:
        argparse.ArgumentTypeError: when the text is none.
    """
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text}: is no sha256, expected 64 hexadecimal digits")
    return text.lower()


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings; a wrong one ends the program with exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--to", type=Path, default=Path("data"), metavar="DIR", help=f"folder to leave {NAME} in (default: %(default)s)"
    )
    parser.add_argument(
        "--url",
        type=read_source,
        default=URL,
        metavar="URL|PATH",
        help="a mirror, or the zip file itself (default: Zenodo)",
    )
    parser.add_argument(
        "--sha256", type=read_sha256, default=SHA256, metavar="HEX", help="of the zip file (default: %(default)s)"
    )
    parser.add_argument("--no-doctor", action="store_true", help="do not examine the data afterwards")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
