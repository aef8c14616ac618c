"""How an error is printed: one sentence on stderr, never a traceback."""

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from core.system.exits import CtrlC, StopSignals, print_error, print_warning, use_utf8
from data.make_phantom import write_phantom
from visualization.reports import write_reports


def test_the_last_line_of_a_message_does_not_stand_for_all_of_it(capsys):
    print_error(ValueError("scan.nii: cannot be read\n - could the file be damaged?"))
    assert capsys.readouterr().err == "error: scan.nii: cannot be read - could the file be damaged?\n"


def test_an_error_without_a_message_is_named(capsys):
    print_error(EOFError())
    assert capsys.readouterr().err == "error: EOFError\n"


def test_a_loading_process_error_is_printed_without_its_traceback(capsys):
    message = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "dataset.py", line 1, in load\nValueError: inner\n\nThe above exception was the direct cause:\n\n'
        'Traceback (most recent call last):\n  File "dataset.py", line 2, in load\n'
        "ValueError: case 0001: cannot be read (ValueError: inner)\n"
    )
    print_error(ValueError(message))
    assert capsys.readouterr().err == "error: case 0001: cannot be read (ValueError: inner)\n"


def test_lines_of_several_threads_do_not_run_into_each_other():
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from core.system.exits import *\n"
        "sys.setswitchinterval(1e-6)\n"
        "def say(i): (print_warning if i % 2 else print_error)(ValueError('x' * 30))\n"
        "with ThreadPoolExecutor(4) as threads: list(threads.map(say, range(4000)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Counter(done.stderr.splitlines()) == {f"error: {'x' * 30}": 2000, f"warning: {'x' * 30}": 2000}


def test_a_message_that_nobody_reads_any_more_ends_no_work(monkeypatch):
    class Broken:
        def write(self, _text: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")  # infer.py ... 2>&1 | head

    monkeypatch.setattr(sys, "stderr", Broken())
    print_warning("odd")


def test_a_stop_is_noted_though_nobody_reads_that_it_is(monkeypatch):
    signals = StopSignals()
    with monkeypatch.context() as broken:  # train.py 2>&1 | tee log: Ctrl-C ends tee, too
        broken.setattr(os, "write", lambda *_: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
        signals.note(signal.SIGINT, None)
    assert signals.received == signal.SIGINT


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_takes_what_is_printed(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)  # as Python has it after 2>&-
    use_utf8()
    with getattr(sys, name) as stream:
        print("odd", file=stream)


def test_ctrl_c_that_a_finalizer_drops_ends_the_loop_over_cases():
    code = (
        "import io, os, signal\n"
        "from core.system.exits import run_command\n"
        "from core.system.parallel import in_processes\n"
        "class File(io.RawIOBase):\n"
        "    @property\n"
        "    def closed(self): os.kill(os.getpid(), signal.SIGINT); return True\n"
        "def read(case): File(); return case\n"  # clearing it away drops the KeyboardInterrupt
        "def main():\n"
        "    for case, _ in in_processes(read, range(3), 1): print(case)\n"
        "    return 0\n"
        "run_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "0\n")
    assert done.stderr == "interrupted; what was written before is whole\n"


def test_ctrl_c_that_is_lost_ends_other_loops_over_cases_too(monkeypatch, tmp_path):
    monkeypatch.setattr(CtrlC, "pressed", True)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "data", 1, (16, 16, 16), 0)
    with pytest.raises(KeyboardInterrupt):
        write_reports(tmp_path, {"a": tmp_path / "a.nii"}, None, ("background", "liver"), {})


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda path: path.mkdir(exist_ok=True), "file: is a file, expected a folder"),
        (lambda path: (path / "in").write_text(""), "file/in: leads through a file, expected folders"),
        (lambda path: path.parent.write_text(""), ": is a folder, expected a file"),
    ],
)
def test_what_is_in_the_way_is_said(tmp_path, capsys, act, words):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Errno") as caught:
        act(tmp_path / "file")
    print_error(caught.value)
    assert capsys.readouterr().err.endswith(f"{words}\n")


def test_an_error_of_ones_own_words_is_left_alone(capsys):
    print_error(FileExistsError("a: is there"))
    print_error(FileNotFoundError(2, "No such file or directory", "b"))
    assert capsys.readouterr().err == "error: a: is there\nerror: [Errno 2] No such file or directory: 'b'\n"
