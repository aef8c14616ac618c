"""Text is UTF-8 in every locale, and bytes that are not UTF-8 come through."""

import os
import subprocess
import sys

from core.system.files import open_text, read_text, write_text

NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
COMMAND = """
import sys
from core.system.exits import run_command
from core.system.files import read_text, write_text
def main():
    write_text(sys.argv[1], "肝 Müller\\r\\n")
    print(read_text(sys.argv[1]), sys.argv[2], end="")
    print("肝", sys.argv[2], file=sys.stderr)
    return 0
run_command(main)
"""


def test_bytes_that_are_not_utf8_and_line_ends_come_through(tmp_path):
    path = tmp_path / "text.txt"
    write_text(path, "M\udcfcller,肝\r\n")
    assert path.read_bytes() == b"M\xfcller,\xe8\x82\x9d\r\n"
    assert read_text(path) == "M\udcfcller,肝\r\n"
    path.write_bytes(b"\xef\xbb\xbfcase\n")
    with open_text(path) as file:
        assert list(file) == ["case\n"]


def test_a_command_prints_and_writes_any_text_in_any_locale(tmp_path):
    path = tmp_path / "Lunge_ü.txt"
    (script := tmp_path / "command.py").write_text(COMMAND, encoding="utf-8")
    for locale in ({}, NO_UTF8, {"PYTHONIOENCODING": "ascii"}):
        command = [sys.executable, str(script), str(path), b"M\xfcller"]
        environment = os.environ | {"PYTHONPATH": os.getcwd()} | locale
        done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"\xe8\x82\x9d M\xc3\xbcller\r\n M\xfcller"
        assert done.stderr == b"\xe8\x82\x9d M\\udcfcller\n"
        assert path.read_bytes() == b"\xe8\x82\x9d M\xc3\xbcller\r\n"
