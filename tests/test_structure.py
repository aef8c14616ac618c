"""The shape of the repository: who imports whom, and what every command answers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each file may import of ours; None: anything. core.files and core.exits may be imported everywhere.
MAY_IMPORT = {
    "vnet.py": set(),
    "core/files.py": set(),
    "core/exits.py": set(),
    "core/config.py": set(),
    "core/predictions.py": set(),
    "core/resample.py": set(),
    "core/nifti.py": set(),
    "core/preprocess.py": {"core.nifti", "core.resample"},
    "core/anatomy.py": {"core.preprocess"},
    "core/metrics.py": set(),
    "core/surface.py": set(),
    "core/flare22.py": {"core.surface"},
    "core/scoring.py": {
        "core.flare22",
        "core.metrics",
        "core.nifti",
        "core.preprocess",
        "core.resample",
        "core.surface",
    },
    "core/summary.py": {"core.metrics"},
    "core/tables.py": set(),
    "core/parallel.py": set(),
    "core/network.py": {"core.config", "vnet"},
    "core/checkpoint.py": {"core.config", "core.network"},
    "core/recompute.py": {"vnet"},
    "core/step.py": {"core.recompute", "vnet"},
    "core/distributed.py": set(),
    "core/memory.py": {"core.config", "core.network", "core.step", "vnet"},
    "core/run_folder.py": {"core.checkpoint", "core.config", "vnet"},
    "core/augment.py": {"core.config"},
    "core/loading.py": {"core.config", "core.distributed"},
    "dataset.py": {"core.anatomy", "core.nifti", "core.preprocess", "core.resample", "core.config"},
    "train.py": {"dataset", "vnet", "core"},
    "infer.py": {"dataset", "vnet", "core"},
    "evaluate.py": {"dataset", "core"},
}
FOLDERS_MAY_IMPORT = {"data": {"dataset", "core", "data"}, "visualization": {"dataset", "core", "visualization"}}
EVERYWHERE = {"core.files", "core.exits"}
OPTIONAL = {"visualization", "data"}  # imported by a script inside the function that needs it
OURS = {"vnet", "dataset", "train", "infer", "evaluate", "core", "data", "visualization", "benchmarks"}
SCRIPTS = ("train.py", "infer.py", "evaluate.py")
COMMANDS = [[script] for script in SCRIPTS] + [
    ["-m", f"{folder}.{path.stem}"]
    for folder in ("data", "visualization")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


def our_imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name for name in names if name.split(".")[0] in OURS}


def allowed_for(path: Path) -> set[str]:
    name = path.relative_to(ROOT).as_posix()
    return MAY_IMPORT.get(name) or FOLDERS_MAY_IMPORT.get(name.split("/")[0]) or set()


def source_files() -> list[Path]:
    folders = [ROOT, ROOT / "core", ROOT / "data", ROOT / "visualization"]
    return [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_keep_to_the_table(path):
    allowed = allowed_for(path) | EVERYWHERE
    script = path.name in SCRIPTS
    for name in our_imports(path):
        inside_a_function = (script or path.parent.name == "data") and name.split(".")[0] in OPTIONAL
        assert inside_a_function or name in allowed or name.split(".")[0] in allowed, f"{path.name} imports {name}"
    if script:
        assert not {name for name in our_imports(path, top_level_only=True) if name.split(".")[0] in OPTIONAL}


def test_every_file_of_ours_is_in_the_table():
    names = {path.relative_to(ROOT).as_posix() for path in source_files()}
    assert {name for name in names if name.split("/")[0] not in FOLDERS_MAY_IMPORT} == set(MAY_IMPORT)


def test_no_error_is_swallowed():
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                assert caught not in ("", "Exception", "BaseException"), f"{path.name}:{node.lineno} catches everything"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_answers(command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    wrong = subprocess.run([sys.executable, *command, "--no-such-flag"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
