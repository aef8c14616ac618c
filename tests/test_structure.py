"""The shape of the repository: who imports whom, how long files and functions are, and that every command answers."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each row may import from the rows above it and from itself, but for rooms side by side in one row.
LAYERS = (
    ("vnet", "core.system"),
    ("core.config",),
    ("core.network", "core.scans"),
    ("core.patches",),
    ("core.checkpoint", "core.scoring", "core.training", "core.inference"),
    ("dataset", "core.export"),
    ("train", "infer", "evaluate", "data", "visualization"),
    ("benchmarks",),
)
# What a room may import of its own row: training and inference load and save checkpoints, training scores validation,
# and inference chooses device and precision as training does.
BESIDE = {
    "core.training": {"core.checkpoint", "core.scoring"},
    "core.scoring": {"core.checkpoint"},
    "core.inference": {"core.checkpoint", "core.training"},
}
SCRIPTS = ("train.py", "infer.py", "evaluate.py")
OPTIONAL = {"visualization", "data"}  # imported by a script inside the function that needs it
ROOMS = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
COMMANDS = [*(script.removesuffix(".py") for script in SCRIPTS), "core.export"] + [
    f"{folder}.{path.stem}"
    for folder in ("data", "visualization")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]
# Lines of a file, or of each file of a folder; lines of a function; names of ours that a script imports.
LINES = {"train.py": 220, "infer.py": 260, "evaluate.py": 220, "dataset.py": 260, "core": 350}
FUNCTION_LINES = 45
IMPORTED_NAMES = 30


def source_files() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(p for d in ("core", "data", "visualization") for p in (ROOT / d).rglob("*.py"))]
    return sorted(path for path in files if path.name != "__init__.py" and "vendor" not in path.parts)


def room_of(module: str) -> str | None:
    """Name the room of a dotted module; None for a module of somebody else."""
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), None)


def imports_of(path: Path, inside_functions: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_room_imports_from_those_below_it(path):
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here, f"{path} is in no room"
    for name in imports_of(path):
        room = room_of(name)
        below = room is None or room == here or ROOMS[room] < ROOMS[here] or room in BESIDE.get(here, ())
        optional = path.name in SCRIPTS and room in OPTIONAL
        assert below or optional or (here in OPTIONAL and room in OPTIONAL), f"{here} imports {name}"
    if path.name in SCRIPTS:
        assert not {room_of(name) for name in imports_of(path, inside_functions=False)} & OPTIONAL


def test_no_error_is_swallowed():
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                assert caught not in ("", "Exception", "BaseException"), f"{path.name}:{node.lineno} catches everything"


def test_text_files_are_opened_by_core_system_files_alone():
    """Find no call of open in text mode, nor of Path.read_text and Path.write_text, which go by the locale."""
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path != ROOT / "core" / "system" / "files.py":
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                binary = "b" in "".join(ast.unparse(argument) for argument in node.args[1:2])
                text = isinstance(node.func, ast.Attribute) and called in ("read_text", "write_text")
                text |= ast.unparse(node.func) == "open" and not binary
                assert not text, f"{path.name}:{node.lineno} {called}"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_and_its_functions_keep_to_their_budget(path):
    name, text = path.relative_to(ROOT).as_posix(), path.read_text()
    lines = LINES.get(name, LINES.get(name.split("/")[0]))
    if lines:
        assert len(text.splitlines()) <= lines, f"{name}: more than {lines} lines; it has two subjects"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{name}:{node.lineno} {node.name} has {length} lines"
    if name in SCRIPTS:
        names = [name for name in imports_of(path) if room_of(name)]
        assert len(names) <= IMPORTED_NAMES, f"{name} imports {len(names)} of the project's names"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_answers_and_a_wrong_flag_does_not(module, monkeypatch, capsys):
    main = importlib.import_module(module).main
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        monkeypatch.setattr(sys, "argv", [module, flag])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == code
        captured = capsys.readouterr()
        assert (captured.out if code == 0 else captured.err).startswith("usage:")
