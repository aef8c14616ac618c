"""data/download.py against a local server that breaks, ignores ranges, refuses, or sends the wrong file."""

import hashlib
import io
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from warm import run_script

from data import download
from data.make_phantom import write_phantom
from dataset import find_cases

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "data.download"]
PART = "FLARE22Train.zip.part"
DONE, REFUSED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 3, 130


def zip_of(files: dict[str, bytes], above: str = "FLARE22Train/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(above + name, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


with tempfile.TemporaryDirectory() as made:
    write_phantom(Path(made), cases=2, shape=(64, 64, 48), seed=0)
    FILES = {path.relative_to(made).as_posix(): path.read_bytes() for path in sorted(Path(made).rglob("*.nii.gz"))}
SCAN, _, LABELS, _ = FILES
PAYLOAD = zip_of(FILES)
HALF = len(PAYLOAD) // 2


class Server(ThreadingHTTPServer):
    """A server of one file; the attributes set what it does wrong."""

    daemon_threads = True
    content, knows_ranges, stalls, sent = PAYLOAD, True, False, 0  # sent: bytes

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/FLARE22Train.zip"
        self.statuses: list[int] = []  # of the next answers
        self.ends: list[int] = []  # byte at which the next answers break off
        self.ranges: list[str] = []  # asked for
        self.released = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Ignore clients that hang up."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if server.knows_ranges else 0
        right = 416 if start >= len(server.content) else 206 if server.knows_ranges else 200
        status = server.statuses.pop(0) if server.statuses else right
        content = server.content[start:] if status < 300 else b""
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if server.ends and content:
            content = content[: server.ends.pop(0) - start]
        self.wfile.write(content)
        server.sent += len(content)
        if server.stalls:
            server.released.wait(20)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def to(tmp_path, monkeypatch) -> Path:
    """Return the folder to download to; no proxy and no waiting between tries."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies of the first call
    monkeypatch.setattr(download, "WAITS_SECONDS", (0, 0, 0))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def get(run_main, server, to):
    """Run the command: on the local server, or on a local zip file with this content."""

    def get(content: bytes | None = None, digest: str | None = None) -> tuple[int, str, str]:
        local = to.with_name("mine.zip")
        local.write_bytes(content or b"")
        source, digest = local if content else server.url, digest or sha256(content or PAYLOAD)
        ended = run_main(download, "--to", to, "--url", source, "--sha256", digest, "--no-doctor")
        assert local.read_bytes() == (content or b"")
        return ended

    return get


def assert_installed(to: Path) -> None:
    """Check that `to` holds the data set and nothing else, and that train.py can read it."""
    folder = to / "FLARE22Train"
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == FILES
    assert [path.name for path in to.iterdir()] == ["FLARE22Train"]
    assert len(find_cases(folder)) == 2


def assert_ends(ended: tuple[int, str, str], code: int, *words: object) -> None:
    """Check the exit code, and that stderr ends with its only error, in one line with these words."""
    lines = ended[2].strip().splitlines()
    assert ended[0] == code, lines
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert all(str(word) in lines[-1] for word in ("error: ", *words)), lines[-1]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing beyond `size` bytes fail, with EFBIG where a full disk has ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("is_sick", [False, True])
def test_real_command_downloads_unpacks_and_checks(server, to, is_sick):
    server.content = zip_of(FILES | {SCAN: FILES[SCAN][:5000]}) if is_sick else PAYLOAD
    to = to / "new/folder"
    command = [*COMMAND, "--to", to, "--url", server.url, "--sha256", sha256(server.content).upper()]
    done = run_script(*command[1:])
    assert done.returncode == (REFUSED if is_sick else DONE), done.stderr
    assert f"2 cases, {int(is_sick)} errors" in done.stdout
    assert "https://zenodo.org/records/7860267" in done.stdout
    assert {path.name for path in to.iterdir()} == {"FLARE22Train", "FLARE22Train_doctor"}
    assert (to / "FLARE22Train_doctor/doctor.json").is_file()


def test_default_is_the_file_on_zenodo():
    assert download.URL == "https://zenodo.org/records/7860267/files/FLARE22Train.zip"
    assert download.SHA256 == "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154"


def test_second_run_does_nothing_and_an_incomplete_folder_is_refused(get, server, to):
    assert get()[0] == DONE
    assert "2 cases" in get()[1]
    assert_installed(to)
    (to / "FLARE22Train" / LABELS).unlink()
    assert_ends(get(), REFUSED, to / "FLARE22Train", "no label map")
    assert server.ranges == ["bytes=0-"]


@pytest.mark.parametrize("stalls", [False, True])
def test_break_midway_is_continued_without_sending_a_byte_twice(get, server, to, monkeypatch, stalls):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.5)
    server.ends, server.stalls = [HALF, HALF + 1000], stalls
    started = time.monotonic()
    assert get()[0] == DONE
    assert time.monotonic() - started < 15, "waited for the server to hang up"
    assert server.ranges == ["bytes=0-", f"bytes={HALF}-", f"bytes={HALF + 1000}-"]
    assert server.sent == len(PAYLOAD)
    assert_installed(to)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_part_of_an_earlier_run(get, server, to, knows_ranges):
    (to / PART).write_bytes(PAYLOAD[:1000])
    server.knows_ranges = knows_ranges
    assert get()[0] == DONE
    assert server.ranges == ["bytes=1000-"]
    assert server.sent == len(PAYLOAD) - 1000 * knows_ranges
    assert_installed(to)


@pytest.mark.parametrize("left", [b"", b"x" * 1000, b"x" * len(PAYLOAD)], ids=["new", "file changed", "other file"])
def test_wrong_checksum_is_refused_and_removed(get, server, to, left):
    (to / PART).write_bytes(left)
    server.content = PAYLOAD if left else PAYLOAD[:-1] + b"!"
    assert_ends(get(), REFUSED, server.url, sha256(PAYLOAD), sha256(left + server.content[len(left) :]), "again")
    assert list(to.iterdir()) == []
    server.content = PAYLOAD
    assert get()[0] == DONE
    assert_installed(to)


@pytest.mark.parametrize(("status", "code", "tries"), [(404, REFUSED, 1), (503, STOPPED, 4)])
def test_refusing_server_costs_nothing_of_the_part(get, server, to, status, code, tries):
    (to / PART).write_bytes(PAYLOAD[:HALF])
    server.statuses = [status] * tries
    assert_ends(get(), code, server.url, status, "--url" if status == 404 else "same command")
    assert (to / PART).read_bytes() == PAYLOAD[:HALF]
    assert get()[0] == DONE
    assert server.ranges == [f"bytes={HALF}-"] * (tries + 1)
    assert_installed(to)


def test_no_server_stops_the_run(get, server):
    server.server_close()
    assert_ends(get(), STOPPED, server.url, "refused", "same command")


@pytest.mark.slow
def test_interrupted_download_continues(get, server, to):
    server.ends, server.stalls = [HALF], True
    command = [*COMMAND, "--to", to, "--url", server.url, "--no-doctor"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = to / PART
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED, err
    assert "Traceback" not in err
    have = part.stat().st_size
    server.stalls = False
    assert get()[0] == DONE
    assert server.ranges == ["bytes=0-", f"bytes={have}-"]
    assert_installed(to)


@pytest.mark.parametrize("local", [None, PAYLOAD], ids=["download", "local file"])
def test_room_is_checked_beforehand(get, to, monkeypatch, local):
    needed, usage = sum(map(len, FILES.values())) if local else 2 * len(PAYLOAD), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    assert_ends(get(local), STOPPED, to, "free", "make room")
    assert list(to.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert get(local)[0] == DONE
    assert_installed(to)


def test_full_disk_and_broken_off_unpacking(get, server, to):
    part = to / PART
    with largest_file(HALF):
        assert_ends(get(), STOPPED, to, "File too large", "same command")
    assert part.read_bytes() == PAYLOAD[:HALF]
    part.write_bytes(PAYLOAD)
    with largest_file(max(map(len, FILES.values())) - 1):
        assert_ends(get(), STOPPED, to, "File too large", "same command")
    assert list(to.iterdir()) == [part]
    killed = to / ".FLARE22Train.unpacking/FLARE22Train/images"  # left by a killed run
    killed.mkdir(parents=True)
    (killed / "FLARE22_Tr_0009_0000.nii.gz").touch()
    assert get()[0] == DONE
    assert server.ranges == ["bytes=0-"]
    assert_installed(to)


@pytest.mark.parametrize("above", ["", "FLARE22Train/", "FLARE22Train/FLARE22Train/"])
def test_local_zip_of_any_nesting_goes_to_the_same_place_also_behind_a_link(get, to, tmp_path, above):
    (tmp_path / "disk/data").mkdir(parents=True)
    (to / "FLARE22Train").symlink_to(tmp_path / "disk/data")
    assert get(zip_of(FILES, above))[0] == DONE
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["data"]
    assert_installed(to)


DAMAGED = PAYLOAD.replace(FILES[SCAN], FILES[SCAN][:-1] + b"!")


@pytest.mark.parametrize(
    ("content", "digest", "word"),
    [
        (PAYLOAD, "0" * 64, "sha256"),
        (PAYLOAD[:-99], None, "not a zip"),
        (DAMAGED, None, "CRC"),
        (zip_of({}), None, "data set"),
    ],
    ids=["wrong", "cut", "damaged", "empty"],
)
def test_unusable_local_zip_is_refused_and_a_download_is_kept(get, to, content, digest, word):
    (to / PART).write_bytes(b"x")
    assert_ends(get(content, digest), REFUSED, "mine.zip", word)
    assert list(to.iterdir()) == [to / PART]


@pytest.mark.parametrize(
    "usage", ["--sha256 d57e", "--url ftp://host/a.zip", "--url no_such.zip", "--to pyproject.toml"]
)
def test_wrong_usage(run_main, usage):
    code, _, err = run_main(download, *usage.split())
    assert code == USAGE
    assert usage.split()[1] in err.splitlines()[-1]
