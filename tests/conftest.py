"""Fixtures that several test files share: a script's main run in this process, and a small data set."""

import gc
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import visualization  # noqa: F401 (takes a notebook's backend out of the environment before a test imports matplotlib)
from data.make_phantom import write_phantom

# Started in the background of a script, the tests would pass on to every command that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def fast_collections() -> None:
    """Take what is loaded out of Python's garbage collections: a million objects of torch, half a second each time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def phantom_data(tmp_path_factory) -> Path:
    """Return a data set of five small phantoms, phantom_0001 to phantom_0005; tests must not change it."""
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantom(folder, cases=5, shape=(40, 36, 28), seed=0)
    return folder
