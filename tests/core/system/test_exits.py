"""How an error is printed: one sentence on stderr, never a traceback."""

import subprocess
import sys
from collections import Counter

from core.system.exits import print_error


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
