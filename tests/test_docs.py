"""The documentation names only what exists: links, files, and flags of the commands."""

import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GUIDE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCS = [*GUIDE, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "RESULTS.md"))]
DOCS += [ROOT / "data" / "README.md", ROOT / "benchmarks" / "README.md"]
README_LINES = 130
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w./-])((?:core|tests|data|docs|visualization|benchmarks)/[\w./-]*\.(?:py|md|txt|yaml|css|js|png|mp4))\b"
)
FOLDER = re.compile(r"`((?:core|tests|docs|visualization|benchmarks)/[\w/]*)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
# A script or module of ours, and its arguments up to the end of the line, over continued lines.
COMMAND = re.compile(r"(\b(?:train|infer|evaluate)\.py|-m (?:data|visualization)\.\w+)\b((?:\\\n|[^`#;&|\n])*)")
SCRIPTS = (
    "train.py",
    "infer.py",
    "evaluate.py",
    *(f"data/{name}.py" for name in ("convert", "download", "doctor", "make_phantom", "pseudo_label")),
    *(f"visualization/{name}.py" for name in ("overlay", "movie", "viewer", "report")),
)
# Flags of other programs: torchrun, pip, SLURM, ruff.
FOREIGN = {"--nproc-per-node", "--max-restarts", "--index-url", "--signal", "--check"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def flags_of(script: str) -> frozenset[str]:
    """Return the flags that a script's --help lists; it runs in this process, which imports torch only once."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return frozenset(FLAG.findall(out.getvalue()))


def foreign_flags(text: str) -> dict[str, set[str]]:
    """Return the flags in `text` that are not those of the command before them, by script; only scripts with some."""
    found = {}
    for command, arguments in COMMAND.findall(text):
        script = f"{command.removeprefix('-m ').replace('.', '/')}.py" if command.startswith("-m ") else command
        found.setdefault(script, set()).update(set(FLAG.findall(arguments)) - flags_of(script) - FOREIGN)
    return {script: flags for script, flags in found.items() if flags}


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_relative_link_leads_to_a_file(path):
    targets = [link.split("#")[0] for link in LINK.findall(path.read_text()) if "://" not in link]
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_every_file_that_is_named_exists(path):
    text = path.read_text()
    named = FILE.findall(re.sub(r"\]\([^)]*\)", "]", text)) + FOLDER.findall(text)
    assert sorted({name for name in named if not (ROOT / name).exists()}) == []


@pytest.mark.parametrize("path", GUIDE, ids=name_of)
def test_every_flag_is_one_of_its_command(path):
    text = path.read_text()
    assert sorted(set(FLAG.findall(text)) - FOREIGN.union(*map(flags_of, SCRIPTS))) == []
    assert foreign_flags(text) == {}


def test_a_flag_of_another_command_is_found():
    text = """`python evaluate.py --labels L --epochs 3`, and
    torchrun --nproc-per-node 2 train.py --resume \\
        --frames 4  # --size
    python -m visualization.movie --frames 4 --reference LABELS
    """
    assert foreign_flags(text) == {"evaluate.py": {"--epochs"}, "train.py": {"--frames"}}


def test_readme_fits_its_budget():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_every_file_of_core_has_a_row_in_the_list_of_files():
    text = (ROOT / "docs" / "code.md").read_text()
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "core").rglob("*.py") if path.name != "__init__.py"]
    assert not [name for name in files if f"[{name}](../{name})" not in text]
