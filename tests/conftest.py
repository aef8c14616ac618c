"""What several test files share: a script's main, run in this process, which spares its start-up."""

import signal
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

import visualization  # noqa: F401 (takes a notebook's backend out of the environment before a test imports matplotlib)

# Started in the background of a script, the tests would pass on to every command that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_main(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a script's main with command-line arguments: exit code, stdout and stderr, which holds no traceback."""

    def run_main(script: ModuleType, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        try:
            code = script.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_main
