"""data/download.py against a local server that breaks, stalls, lies and sends the wrong file, and against bad zips."""

import errno
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data import download, unzip
from data.make_phantom import write_phantom
from dataset import find_cases

ROOT = Path(__file__).parents[2]
CASE_IDS = ("FLARE22_Tr_0001", "FLARE22_Tr_0002")
DONE, REFUSED, USAGE, STOPPED, INTERRUPTED = 0, 1, 2, 3, 130


# ---- A data set, and zips of it --------------------------------------------------------------------------------------


def data_set_files() -> dict[str, bytes]:
    """Two cases of noise, some 180 kB."""
    rng, files = np.random.default_rng(0), {}
    for case in CASE_IDS:
        scan = nib.Nifti1Image(rng.integers(-1000, 1000, (40, 40, 40), np.int16), np.eye(4))
        files[f"images/{case}_0000.nii.gz"] = scan.to_bytes()
        files[f"labels/{case}.nii.gz"] = nib.Nifti1Image(np.zeros((40, 40, 40), np.uint8), np.eye(4)).to_bytes()
    return {name: gzip.compress(content, 1, mtime=0) for name, content in files.items()}


FILES = data_set_files()


def zip_of(files: dict[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


PAYLOAD = zip_of({f"FLARE22Train/{name}": content for name, content in FILES.items()})
HALF = len(PAYLOAD) // 2
ETAG = '"md5:1"'


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def assert_installed(to: Path, files: dict[str, bytes] = FILES) -> None:
    """The folder holds the data set, its record, and nothing else; train.py reads it."""
    folder = to / "FLARE22Train"
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(there.pop("download.json"))
    assert there == files
    assert record["files"] == {name: len(content) for name, content in files.items()}
    assert [path.name for path in to.iterdir()] == ["FLARE22Train"]
    assert [case.id for case in find_cases(folder)] == list(CASE_IDS)


# ---- The server ------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers the n-th request by the n-th of `answers`, all further ones by the last, and remembers them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Callable] = [whole]
        self.requests: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.sent = 0
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/FLARE22Train.zip"

    @property
    def ranges(self) -> list[str | None]:
        return [request.get("Range") for request in self.requests]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up here; that is no error."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        server.paths.append(self.path)
        server.answers[min(len(server.requests), len(server.answers)) - 1](self)

    def head(self, status: int, **headers: object) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.server.sent += len(content)

    def log_message(self, *_: object) -> None:
        pass


def asked_from(handler: Handler, etag: str) -> int:
    """The first byte that an honest server sends."""
    asked = handler.headers.get("Range")
    if asked is None or handler.headers.get("If-Range", etag) != etag:
        return 0
    return int(asked.removeprefix("bytes=").removesuffix("-"))


def serve(
    content: bytes = PAYLOAD, upto: int | None = None, etag: str = ETAG, then: Callable = lambda handler: None
) -> Callable:
    """Answer honestly, but send only the bytes before `upto`, then do something more, then hang up."""

    def answer(handler: Handler) -> None:
        start = asked_from(handler, etag)
        if start >= len(content):
            handler.head(416, Content_Range=f"bytes */{len(content)}", Content_Length=0)
            return
        size = len(content)
        where = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        handler.head(206 if start else 200, Content_Length=size - start, ETag=etag, **where)
        handler.body(content[start:upto])
        then(handler)

    return answer


def without_ranges(upto: int | None = None) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=len(PAYLOAD))
        handler.body(PAYLOAD[:upto])

    return answer


def partial(where: str, content: bytes) -> Callable:
    def answer(handler: Handler) -> None:
        handler.head(206, Content_Length=len(content), Content_Range=where)
        handler.body(content)

    return answer


def status(code: int, **headers: object) -> Callable:
    return lambda handler: handler.head(code, Content_Length=0, **headers)


def chunked(content: bytes, end: bytes) -> Callable:
    """Send without a length, in one chunk; `end` is what follows it."""

    def answer(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.head(200, Transfer_Encoding="chunked", Connection="close")
        handler.body(f"{len(PAYLOAD):x}\r\n".encode() + content + end)
        handler.close_connection = True

    return answer


whole = serve()
drop = serve(upto=HALF)
stall = serve(upto=HALF, then=lambda handler: handler.server.released.wait(20))


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


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The waits between tries, which take no time here; and no proxy, so that the local server is asked itself."""
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        assert len(waits) < 100, "it tries for ever"

    monkeypatch.setattr(download.time, "sleep", wait)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # keeps the proxies of its first call
    return waits


@pytest.fixture
def to(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def get(run_main, server, to) -> Callable:
    """Run the command on the local server: exit code, stdout, stderr."""

    def get(*more: object, digest: str = sha256(PAYLOAD)) -> tuple[int, str, str]:
        return run_main(download, "--to", to, "--url", server.url, "--sha256", digest, "--no-doctor", *more)

    return get


def assert_one_sentence(stderr: str, *words: object) -> None:
    """Stderr ends with its only error, in one line that has the words."""
    lines = stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error:") for line in lines) == 1
    for word in words:
        assert str(word) in lines[-1]


# ---- The doctor afterwards -------------------------------------------------------------------------------------------


def test_the_doctor_looks_at_what_was_unpacked_once(to, tmp_path, run_main):
    folder = tmp_path / "made"
    write_phantom(folder, cases=2, shape=(64, 64, 48), seed=0)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.nii.gz")}
    sick = dict(files)
    name = next(name for name in sick if name.startswith("images"))
    sick[name] = sick[name][: len(sick[name]) // 2]
    for content, expected in ((files, DONE), (sick, REFUSED)):
        shutil.rmtree(to, ignore_errors=True)
        packed = tmp_path / "data.zip"
        packed.write_bytes(zip_of({f"FLARE22Train/{name}": file for name, file in content.items()}))
        command = ("--to", to, "--url", packed, "--sha256", sha256(packed.read_bytes()))
        code, out, _ = run_main(download, *command)
        assert code == expected
        assert f"2 cases, {int(content is sick)} errors" in out
        assert {path.name for path in to.iterdir()} == {"FLARE22Train", "FLARE22Train_doctor"}
        found = json.loads((to / "FLARE22Train_doctor" / "doctor.json").read_text())["findings"]
        assert [f["code"] for f in found if f["severity"] == "error"] == ["unreadable"] * (content is sick)
        code, out, _ = run_main(download, *command)
        assert code == DONE
        assert "there already" in out
        assert "To check them again: python -m data.doctor" in out


# ---- Downloads that end well -----------------------------------------------------------------------------------------


def test_downloads_verifies_unpacks_and_says_what_is_next(get, server, to):
    code, out, err = get()
    assert code == DONE, err
    assert_installed(to)
    record = json.loads((to / "FLARE22Train" / "download.json").read_text())
    assert (record["source"], record["sha256"]) == (server.url, sha256(PAYLOAD))
    assert "https://zenodo.org/records/7860267" in out
    assert "2 cases" in out
    assert out.splitlines()[-1].endswith(f"python -m data.doctor {to / 'FLARE22Train'}")
    assert "python" not in server.requests[0]["User-Agent"].lower()
    assert server.ranges == [None]


def test_default_is_the_file_that_the_issue_names():
    assert download.URL == "https://zenodo.org/records/7860267/files/FLARE22Train.zip"
    assert download.SHA256 == "d57e201dc9002bd4a6fc1f5e0d4525285f46bcc5be1a3c8f12543151e6675154"


def test_second_run_downloads_nothing(get, server, to):
    get()
    code, out, err = get()
    assert code == DONE, err
    assert "there already" in out
    assert len(server.requests) == 1
    assert_installed(to)


def test_goes_on_after_a_drop_without_sending_anything_twice(get, server, to, waits):
    server.answers = [drop, whole]
    code, _, err = get()
    assert code == DONE, err
    assert_installed(to)
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert server.requests[1]["If-Range"] == ETAG
    assert server.sent == len(PAYLOAD)
    assert waits == [1.0]


def test_goes_on_after_a_stall(get, server, to, monkeypatch):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    server.answers = [stall, whole]
    code, _, err = get()
    assert code == DONE, err
    assert "nothing came for 0.3 s" in err
    assert_installed(to)
    assert server.ranges[-1] == f"bytes={HALF}-"


def test_goes_on_where_an_earlier_run_ended(get, server, to):
    to.mkdir()
    (to / "FLARE22Train.zip.part").write_bytes(PAYLOAD[:1000])
    code, _, err = get()
    assert code == DONE, err
    assert_installed(to)
    assert server.ranges == ["bytes=1000-"]
    assert "If-Range" not in server.requests[0]


def test_whole_part_is_not_asked_for_again(get, server, to):
    to.mkdir()
    (to / "FLARE22Train.zip.part").write_bytes(PAYLOAD)
    assert get()[0] == DONE
    assert_installed(to)
    assert server.requests == []


def test_many_drops_are_fine_while_it_gets_on(get, server, to, monkeypatch, waits):
    monkeypatch.setattr(download, "CHUNK", 10_000)
    steps = range(10_000, len(PAYLOAD), 10_000)
    assert len(steps) > 2 * download.RETRIES
    server.answers = [*(serve(upto=upto) for upto in steps), whole]
    code, _, err = get()
    assert code == DONE, err
    assert_installed(to)
    assert set(waits) == {1.0}
    assert server.sent == len(PAYLOAD)


# What the server answers to "bytes=1000-", and why the command starts again; "" where it need not ask a second time.
RANGE_LIES = {
    "passes over the range": (without_ranges(), ""),
    "wrong start": (partial(f"bytes 0-{HALF}/{len(PAYLOAD)}", PAYLOAD), "answered 206 with 'bytes 0-"),
    "no place said": (partial("", PAYLOAD[1000:]), "answered 206 with ''"),
    "end behind the end": (partial("bytes 1000-1999/1500", b""), "answered 206 with 'bytes 1000-1999/1500'"),
    "right place, wrong bytes": (
        partial(f"bytes 1000-{len(PAYLOAD) - 1}/{len(PAYLOAD)}", bytes(len(PAYLOAD) - 1000)),
        "the parts do not make up the right file",
    ),
    "no such byte, falsely": (status(416), "answered 416"),
}


@pytest.mark.parametrize("kind", RANGE_LIES)
def test_lies_about_ranges_cost_a_new_start(get, server, to, kind):
    answer, why = RANGE_LIES[kind]
    to.mkdir()
    (to / "FLARE22Train.zip.part").write_bytes(PAYLOAD[:1000])
    server.answers = [answer, whole]
    code, _, err = get()
    assert code == DONE, err
    assert why in err
    assert_installed(to)
    assert server.ranges == (["bytes=1000-", None] if why else ["bytes=1000-"])


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(PAYLOAD), b"x" * 2 * len(PAYLOAD)], ids=len)
def test_part_of_another_file_is_replaced(get, server, to, left):
    to.mkdir()
    (to / "FLARE22Train.zip.part").write_bytes(left)
    code, _, err = get()
    assert code == DONE, err
    assert_installed(to)
    assert server.ranges == [f"bytes={len(left)}-", None]


def test_changed_file_is_not_pieced_together(get, server, to):
    server.answers = [serve(b"x" * len(PAYLOAD), upto=HALF, etag='"old"'), whole]
    code, _, err = get()
    assert code == DONE, err
    assert_installed(to)
    assert server.requests[1]["If-Range"] == '"old"'
    assert len(server.requests) == 2


def test_weak_mark_is_not_sent_back(get, server):
    server.answers = [serve(upto=HALF, etag='W/"1"'), whole]
    assert get()[0] == DONE
    assert "If-Range" not in server.requests[1]


def test_server_without_ranges_that_dropped_once(get, server, to):
    server.answers = [without_ranges(upto=HALF), without_ranges()]
    assert get()[0] == DONE
    assert_installed(to)


def test_no_length(get, server, to):
    server.answers = [chunked(PAYLOAD, b"\r\n0\r\n\r\n")]
    assert get()[0] == DONE
    assert_installed(to)


def test_broken_chunk_is_a_drop(get, server, to):
    server.answers = [chunked(PAYLOAD[:HALF], b""), whole]
    assert get()[0] == DONE
    assert server.ranges == [None, f"bytes={HALF}-"]
    assert_installed(to)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [({}, 1.0), ({"Retry_After": 7}, 7.0), ({"Retry_After": 86400}, 120.0), ({"Retry_After": "Wed, 21 Oct"}, 1.0)],
)
def test_busy_server_is_asked_again_after_the_time_it_says(get, server, to, waits, headers, wait_s):
    server.answers = [status(503, **headers), whole]
    assert get()[0] == DONE
    assert waits == [wait_s]
    assert_installed(to)


def test_redirect_keeps_the_range(get, server, to):
    server.answers = [status(302, Location="/elsewhere.zip"), drop, status(302, Location="/elsewhere.zip"), whole]
    assert get()[0] == DONE
    assert server.paths == ["/FLARE22Train.zip", "/elsewhere.zip"] * 2
    assert server.ranges == [None, None, f"bytes={HALF}-", f"bytes={HALF}-"]
    assert_installed(to)


def test_address_is_escaped_once(get, server):
    address = server.url.replace("FLARE22Train", "my%20own fïle") + "?download=1"
    assert get("--url", address)[0] == DONE
    assert server.paths == ["/my%20own%20f%C3%AFle.zip?download=1"]


def test_proxy_of_the_environment(run_main, server, to, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    url = "http://mirror.invalid/FLARE22Train.zip"
    code, _, err = run_main(download, "--to", to, "--url", url, "--sha256", sha256(PAYLOAD), "--no-doctor")
    assert code == DONE, err
    assert server.paths == [url]


# ---- Downloads that end otherwise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [PAYLOAD + b"!", b""], ids=["longer", "empty"])
def test_wrong_file_is_refused_and_removed(get, server, to, content):
    server.answers = [serve(content) if content else status(200)]
    code, _, err = get()
    assert code == REFUSED
    assert_one_sentence(err, server.url, f"{len(content)} bytes", sha256(content), sha256(PAYLOAD))
    assert list(to.iterdir()) == []
    assert len(server.requests) == 1


def test_web_page_is_refused_and_costs_nothing(get, server, to):
    to.mkdir()
    part = to / "FLARE22Train.zip.part"
    part.write_bytes(PAYLOAD[:HALF])
    server.answers = [status(200, Content_Type="text/html; charset=utf-8")]
    code, _, err = get()
    assert code == REFUSED
    assert_one_sentence(err, server.url, "web page")
    assert part.read_bytes() == PAYLOAD[:HALF]


def test_wrong_file_in_pieces_is_fetched_whole_once_before_it_is_refused(get, server, to):
    wrong = b"x" * len(PAYLOAD)
    server.answers = [serve(wrong, upto=HALF), serve(wrong)]
    assert get()[0] == REFUSED
    assert server.ranges == [None, f"bytes={HALF}-", None]
    assert list(to.iterdir()) == []


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusal_of_the_server_is_final(get, server, to, code):
    server.answers = [status(code)]
    ended, _, err = get()
    assert ended == REFUSED
    assert_one_sentence(err, server.url, code)
    assert len(server.requests) == 1
    assert list(to.iterdir()) == []


def test_redirect_in_a_circle_is_final(get, server):
    server.answers = [status(302, Location="/FLARE22Train.zip")]
    code, _, err = get()
    assert code == REFUSED
    assert_one_sentence(err, "302", "redirect")


def test_piece_that_was_not_asked_for_is_final(get, server, to):
    server.answers = [partial(f"bytes 5-9/{len(PAYLOAD)}", b"12345")]
    code, _, err = get()
    assert code == REFUSED
    assert_one_sentence(err, server.url, "206")


@pytest.mark.parametrize("code", [408, 429, 500, 502, 504])
def test_server_that_stays_broken_stops_the_run(get, server, waits, code):
    server.answers = [status(code)]
    ended, _, err = get()
    assert ended == STOPPED
    assert_one_sentence(err, server.url, code)
    assert len(server.requests) == 1 + download.RETRIES
    assert waits == [1, 2, 4, 8, 16]


def test_nobody_there_stops_the_run(run_main, to, server):
    url = server.url
    server.server_close()
    code, _, err = run_main(download, "--to", to, "--url", url, "--sha256", sha256(PAYLOAD), "--no-doctor")
    assert code == STOPPED
    assert_one_sentence(err, url, "refused")


def test_content_shorter_than_said_stops_the_run_and_keeps_what_came(get, server, to):
    server.answers = [drop]
    code, _, err = get()
    assert code == STOPPED
    part = to / "FLARE22Train.zip.part"
    assert_one_sentence(err, server.url, f"{HALF} bytes", part)
    assert part.read_bytes() == PAYLOAD[:HALF]
    server.answers = [whole]
    assert get()[0] == DONE
    assert server.ranges[-1] == f"bytes={HALF}-"
    assert_installed(to)


def test_drops_of_a_server_without_ranges_do_not_go_on_for_ever(get, server, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)  # so that every try gets far
    server.answers = [without_ranges(upto=HALF)]
    code, _, err = get()
    assert code == STOPPED, err
    assert len(server.requests) == 1 + download.RETRIES


@pytest.mark.parametrize(
    ("answer", "word"),
    [(whole, "expected at most"), (chunked(PAYLOAD, b"\r\n0\r\n\r\n"), "sends more")],
    ids=["said", "unsaid"],
)
def test_endless_file_is_refused(get, server, to, monkeypatch, answer, word):
    monkeypatch.setattr(download, "MAX_ZIP_BYTES", 10_000)
    server.answers = [answer]
    code, _, err = get()
    assert code == REFUSED
    assert_one_sentence(err, server.url, word, "GiB")
    assert list(to.iterdir()) == []


def with_free_bytes(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_disk_is_looked_at_before_the_download(get, to, monkeypatch):
    with_free_bytes(monkeypatch, 2 * len(PAYLOAD) - 1)
    code, _, err = get()
    assert code == STOPPED
    assert_one_sentence(err, to, "free", "another folder")
    assert list(to.iterdir()) == []
    with_free_bytes(monkeypatch, 2 * len(PAYLOAD))
    assert get()[0] == DONE


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing fail as on a full disk, with EFBIG in place of ENOSPC, when a file grows beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_downloading_keeps_what_came(get, to):
    with largest_file(HALF):
        code, _, err = get()
    assert code == STOPPED
    part = to / "FLARE22Train.zip.part"
    assert_one_sentence(err, part, os.strerror(errno.EFBIG))
    assert part.read_bytes() == PAYLOAD[:HALF]
    assert get()[0] == DONE


def test_interrupted_download_goes_on(get, server, to):
    server.answers = [stall, whole]
    command = [sys.executable, "-m", "data.download", "--to", to, "--url", server.url, "--sha256", sha256(PAYLOAD)]
    command += ["--no-doctor"]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    part = to / "FLARE22Train.zip.part"
    patience = threading.Event()  # time.sleep is not itself here
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        patience.wait(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()  # with a timeout it would wait by time.sleep
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in err
    have = part.stat().st_size
    assert 0 < have <= HALF
    assert part.read_bytes() == PAYLOAD[:have]
    assert get()[0] == DONE
    assert server.ranges[-1] == f"bytes={have}-"
    assert_installed(to)


def test_interrupted_unpacking_leaves_nothing_half_written(get, server, to, monkeypatch):
    extract_file, done = unzip.extract_file, []

    def interrupted(*arguments: object) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(extract_file(*arguments))

    monkeypatch.setattr(unzip, "extract_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get()
    assert [path.name for path in to.iterdir()] == ["FLARE22Train.zip.part"]
    monkeypatch.setattr(unzip, "extract_file", extract_file)
    assert get()[0] == DONE
    assert len(server.requests) == 1
    assert_installed(to)


# ---- Local files, and what is there already --------------------------------------------------------------------------


@pytest.fixture
def install(run_main, to, tmp_path) -> Callable:
    """Run the command on a local zip file with these bytes."""

    def install(content: bytes, digest: str | None = None) -> tuple[int, str, str]:
        zip_file = tmp_path / "mine.zip"
        zip_file.write_bytes(content)
        done = run_main(download, "--to", to, "--url", zip_file, "--sha256", digest or sha256(content), "--no-doctor")
        assert zip_file.read_bytes() == content
        return done

    return install


@pytest.mark.parametrize("above", ["", "FLARE22Train/", "FLARE22Train/FLARE22Train/"])
def test_local_zip_of_any_nesting_is_installed_in_the_same_place(install, to, above):
    folders = {f"{above}images/": b"", "__MACOSX/._x": b"junk"} if above else {}
    code, _, err = install(zip_of(folders | {above + name: content for name, content in FILES.items()}))
    assert code == DONE, err
    assert_installed(to)


def test_zip_not_made_on_unix(install, to):
    entries = {}
    for name, content in FILES.items():
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 0, 0x20
        entries[info] = content
    assert install(zip_of(entries))[0] == DONE
    assert_installed(to)


def test_wrong_local_zip_is_refused_and_left(install, to):
    code, _, err = install(PAYLOAD + b"!", digest=sha256(PAYLOAD))
    assert code == REFUSED
    assert_one_sentence(err, "mine.zip", sha256(PAYLOAD + b"!"), sha256(PAYLOAD))
    assert list(to.iterdir()) == []


def test_upper_case_sha256_is_the_same(install, to):
    assert install(PAYLOAD, digest=sha256(PAYLOAD).upper())[0] == DONE
    assert_installed(to)


def test_full_disk_before_unpacking(install, to, monkeypatch):
    size = sum(map(len, FILES.values()))
    with_free_bytes(monkeypatch, size - 1)
    code, _, err = install(PAYLOAD)
    assert code == STOPPED
    assert_one_sentence(err, to, "free")
    assert list(to.iterdir()) == []
    with_free_bytes(monkeypatch, size)
    assert install(PAYLOAD)[0] == DONE


def test_full_disk_while_unpacking_leaves_nothing(install, to):
    content = zip_of({**FILES, "labels/large.nii.gz": bytes(5_000_000)})
    assert len(content) < 1_000_000  # so that the zip itself stays below the limit
    with largest_file(1_000_000):
        code, _, err = install(content)
    assert code == STOPPED
    assert_one_sentence(err, "labels/large.nii.gz", os.strerror(errno.EFBIG))
    assert list(to.iterdir()) == []


def remove_scan(folder: Path) -> None:
    (folder / f"images/{CASE_IDS[0]}_0000.nii.gz").unlink()


def cut_label_map(folder: Path) -> None:
    path = folder / f"labels/{CASE_IDS[1]}.nii.gz"
    path.write_bytes(path.read_bytes()[:-1])


def break_record(folder: Path) -> None:
    (folder / "download.json").write_text("[]")


def remove_record(folder: Path) -> None:
    (folder / "download.json").unlink()


def remove_labels(folder: Path) -> None:
    shutil.rmtree(folder / "labels")


@pytest.mark.parametrize("damage", [remove_scan, cut_label_map, break_record, remove_record, remove_labels])
def test_damaged_data_set_does_not_pass_for_whole(install, to, damage):
    install(PAYLOAD)
    damage(to / "FLARE22Train")
    before = download.sizes_in(to)
    code, _, err = install(PAYLOAD)
    assert code == REFUSED
    assert_one_sentence(err, to / "FLARE22Train", "move it away")
    assert download.sizes_in(to) == before


def test_data_set_of_another_zip_does_not_pass(install, to):
    install(PAYLOAD)
    other = zip_of(FILES, zipfile.ZIP_STORED)
    code, _, err = install(other)
    assert code == REFUSED
    assert_one_sentence(err, sha256(PAYLOAD), sha256(other))


@pytest.mark.parametrize("above", ["FLARE22Train", "FLARE22Train/FLARE22Train"])
def test_unpacked_by_hand_passes_with_all_fifty_cases(run_main, to, above):
    for kind, end in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (to / above / kind).mkdir(parents=True)
        for number in range(1, 51):
            (to / above / kind / f"FLARE22_Tr_{number:04}{end}").touch()
    code, out, _ = run_main(download, "--to", to, "--no-doctor")
    assert code == DONE
    assert "50 cases, there already" in out
    code, _, err = run_main(download, "--to", to, "--sha256", "0" * 64, "--no-doctor")
    assert code == REFUSED
    assert_one_sentence(err, "download.json")
    (to / above / "labels/FLARE22_Tr_0007.nii.gz").unlink()
    code, _, err = run_main(download, "--to", to, "--no-doctor")
    assert code == REFUSED
    assert_one_sentence(err, "49 of 50")


def test_empty_folder_is_filled(install, to):
    (to / "FLARE22Train").mkdir(parents=True)
    assert install(PAYLOAD)[0] == DONE
    assert_installed(to)


@pytest.mark.parametrize("there", [True, False])
def test_link_is_not_written_through(install, to, tmp_path, there):
    to.mkdir()
    elsewhere = tmp_path / "elsewhere"
    if there:
        elsewhere.mkdir()
    (to / "FLARE22Train").symlink_to(elsewhere)
    code, _, err = install(PAYLOAD)
    assert code == REFUSED
    assert_one_sentence(err, to / "FLARE22Train", "move it away")
    assert elsewhere.exists() == there
    assert not there or not list(elsewhere.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sha256", "d57e"],
        ["--sha256", "g" * 64],
        ["--url", "ftp://host/file.zip"],
        ["--url", "file:///etc/passwd"],
        ["--url", "https:///file.zip"],
        ["--url", "https://host:port/file.zip"],
        ["--url", "https://[::1/file.zip"],
        ["--url", "no_such.zip"],
        ["--url", "."],
    ],
    ids=" ".join,
)
def test_wrong_usage(run_main, to, arguments):
    code, _, err = run_main(download, "--to", to, *arguments, "--no-doctor")
    assert code == USAGE
    assert arguments[0] in err.splitlines()[-1]
    assert arguments[1] in err.splitlines()[-1]
    assert not to.exists()


def test_folder_that_is_a_file(run_main, to):
    to.write_text("")
    code, _, err = run_main(download, "--to", to, "--no-doctor")
    assert code == USAGE
    assert_one_sentence(err, to)


# ---- Zips from strangers ---------------------------------------------------------------------------------------------


def entry(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def with_entry(name: str, mode: int = 0o100644, content: bytes = b"x") -> bytes:
    """The good data set and one entry more."""
    return zip_of({**FILES, entry(name, mode): content})


def patched(content: bytes, offset: int, form: str, value: int) -> bytes:
    """Change a number in the last entry of a zip's table of contents."""
    start = content.rindex(b"PK\1\2") + offset
    return content[:start] + struct.pack(form, value) + content[start + struct.calcsize(form) :]


def duplicated() -> bytes:
    content = with_entry("labels/FLARE22_Tr_0003.nii.gz")
    return content.replace(b"FLARE22_Tr_0003", b"FLARE22_Tr_0001")


def broken(compression: int) -> bytes:
    """A zip with the first byte of a file's content changed; as a deflate stream it begins with no known block."""
    content = bytearray(zip_of({"scan": bytes(range(256)) * 20}, compression))
    content[content.index(b"scan") + 4] = 0xFF
    return bytes(content)


def end_of_zip(directory_bytes: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, directory_bytes, 0, 0)


def shared_content() -> bytes:
    """Many entries that all mean the same compressed bytes: a bomb without nesting."""
    content, count = zip_of({"000": b"x" * 4000 + bytes(range(256)) * 4}), 400
    start, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    rows = b"".join(content[start:end].replace(b"000", b"%03d" % number) for number in range(count))
    return content[:start] + rows + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(rows), start, 0)


BAD_ZIPS = {
    "parent folder": (lambda: with_entry("../evil"), "'../evil'"),
    "parent folder inside": (lambda: with_entry("images/../../evil"), "'images/../../evil'"),
    "absolute": (lambda: with_entry("/tmp/evil"), "'/tmp/evil'"),
    "dot": (lambda: with_entry("images/./evil"), "evil"),
    "empty part": (lambda: with_entry("images//evil"), "evil"),
    "empty name": (lambda: with_entry("evil").replace(b"evil", b"/" * 4), "'////'"),
    "backslash": (lambda: with_entry("..\\evil"), "evil"),
    "drive": (lambda: with_entry("C:evil"), "'C:evil'"),
    "zero byte": (lambda: with_entry("imagesXevil").replace(b"imagesXevil", b"images\0evil"), "evil"),
    "terminal escape": (lambda: with_entry("\x1b[31mevil"), "\\x1b"),
    "long name": (lambda: with_entry("x" * 256), "255"),
    "link": (lambda: with_entry("images/link", 0o120777, b"/etc/passwd"), "'images/link'"),
    "device": (lambda: with_entry("images/device", 0o020666, b""), "'images/device'"),
    "pipe": (lambda: with_entry("images/pipe", 0o010666, b""), "'images/pipe'"),
    "folder by mode alone": (lambda: with_entry("images/folder", 0o040755, b""), "'images/folder'"),
    "link named as a folder": (lambda: with_entry("images/link/", 0o120777, b""), "'images/link/'"),
    "folder with content": (lambda: patched(with_entry("more/", 0o040755, b""), 24, "<L", 5), "'more/'"),
    "encrypted": (lambda: patched(with_entry("secret"), 8, "<H", 1), "'secret' is encrypted"),
    "method": (lambda: zip_of(FILES, zipfile.ZIP_LZMA), "method 14"),
    "unknown method": (lambda: patched(with_entry("odd"), 10, "<H", 99), "method 99"),
    "twice": (duplicated, "two entries"),
    "twice in other case": (lambda: with_entry("Images/flare22_tr_0001_0000.nii.gz"), "two entries"),
    "twice in other form": (lambda: zip_of({**FILES, "ä": b"", "a\u0308": b""}), "two entries"),
    "file and folder": (lambda: with_entry("labels"), "two entries"),
    "file below a file": (lambda: with_entry("labels/FLARE22_Tr_0001.nii.gz/x"), "two entries"),
    "bomb": (lambda: zip_of({"bomb": bytes(3_000_000)}), "50 times"),
    "claimed size": (lambda: patched(with_entry("bomb"), 24, "<L", 2**32 - 2), "50 times"),
    "shared content": (shared_content, "50 times"),
    "too many files": (lambda: zip_of({str(number): b"" for number in range(10_001)}, zipfile.ZIP_STORED), "10001"),
    "huge table of contents": (lambda: bytes(5 * 2**20) + end_of_zip(5 * 2**20), "table of contents"),
    "larger than said": (lambda: patched(with_entry("liar", content=b"x" * 99), 24, "<L", 5), "liar"),
    "smaller than said": (lambda: patched(with_entry("liar"), 24, "<L", 5), "liar"),
    "changed byte": (lambda: broken(zipfile.ZIP_STORED), "CRC"),
    "changed byte, deflated": (lambda: broken(zipfile.ZIP_DEFLATED), "decompressing"),
    "cut": (lambda: PAYLOAD[:-100], "mine.zip"),
    "cut to the table of contents": (lambda: PAYLOAD[HALF:], "mine.zip"),
    "only an end": (lambda: end_of_zip(0), "mine.zip"),
    "only a far end": (lambda: struct.pack("<4sLQL", b"PK\6\7", 0, 0, 1) + end_of_zip(0), "mine.zip"),
    "empty": (lambda: b"", "mine.zip"),
    "no zip": (lambda: b"hello" * 1000, "mine.zip"),
    "another thing": (lambda: zip_of({"readme.txt": b"hello"}), "images"),
    "no labels": (lambda: zip_of({name: b"" for name in FILES if "images" in name}), "labels"),
    "no case": (lambda: zip_of({"images/a.nii": b"", "labels/b.nii": b""}), "no case"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", BAD_ZIPS)
def test_bad_zip_is_refused_and_leaves_nothing(install, to, tmp_path, kind):
    make, word = BAD_ZIPS[kind]
    code, _, err = install(make())
    assert code == REFUSED, err
    assert_one_sentence(err, "mine.zip", word)
    assert list(to.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "mine.zip"]
    assert not Path("/tmp/evil").exists()


def test_unpacked_size_is_bounded(install, to, monkeypatch):
    monkeypatch.setattr(unzip, "MAX_UNPACKED_BYTES", 100_000)
    code, _, err = install(PAYLOAD)
    assert code == REFUSED
    assert_one_sentence(err, "mine.zip", "GiB")


def test_zip_that_cannot_be_unpacked_is_refused_after_a_download_too(get, server, to):
    content = with_entry("../evil")
    server.answers = [serve(content)]
    code, _, err = get(digest=sha256(content))
    assert code == REFUSED
    assert_one_sentence(err, to / "FLARE22Train.zip.part", "'../evil'")
    assert not (to / "FLARE22Train").exists()
