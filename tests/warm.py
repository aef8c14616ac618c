"""Run the project's scripts in processes that have torch loaded already, which is most of what starting one takes.

They are forked from a process that has loaded LOADED and no file of the project. The rest is as in `python SCRIPT ...`:
arguments, folder, environment, signals, exit code, what is printed.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOADED = ["torch", "torch._dynamo", "numpy", "scipy.ndimage", "nibabel", "yaml", "tqdm"]
LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(LOADED)


class Script:
    """A running script, with some of the methods of subprocess.Popen.

    Args:
        command: what would stand behind `python`: a script, or -m and a module, and arguments.
        cwd: the folder it runs in.
        env: its environment; None: this process's. Libraries of LOADED have read the tests' own.
    """

    def __init__(self, *command: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None):
        self.args = [*map(str, command)]
        self.files = [tempfile.NamedTemporaryFile("w+", errors="surrogateescape") for _ in ("stdout", "stderr")]  # noqa: SIM115
        names = [file.name for file in self.files]
        arguments = (self.args, str(cwd), dict(os.environ if env is None else env), *names)
        self.process = forks.Process(target=become, args=arguments)
        self.process.start()

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        """Kill it, if it still runs."""
        self.process.kill()

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for its end, and kill it after `timeout` seconds; return what it has printed on stdout and stderr."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


def run_script(*command: object, **options: object) -> subprocess.CompletedProcess:
    """Run a script to its end; arguments as of `Script`."""
    script = Script(*command, **options)
    out, err = script.communicate()
    return subprocess.CompletedProcess(script.args, script.poll(), out, err)


def become(command: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Make this process that of a script."""
    for path, number in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    given = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    libraries = given + [path for path in sys.path if path.startswith(LIBRARIES)]
    if command[0] == "-m":
        sys.path[:] = [cwd, *libraries]
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(command[0]).resolve().parent), *libraries]
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
