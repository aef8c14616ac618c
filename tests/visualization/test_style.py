"""The style of all pictures: files are drawn whatever backend the shell names."""

import os
from pathlib import Path

import pytest
from warm import run_script

from core.config import DEFAULT_CONFIG, load_organs
from data.make_phantom import write_phantom

ROOT = Path(__file__).resolve().parents[2]
# Every notebook's shell sets this name. Without the package, which is no requirement here, matplotlib refuses it.
NOTEBOOK_BACKEND = "module://matplotlib_inline.backend_inline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a phantom in data, and with the log, the settings and the scores of a run in run."""
    folder = tmp_path_factory.mktemp("notebook")
    write_phantom(folder / "data", 1, (32, 32, 24), seed=0)
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Path(DEFAULT_CONFIG).read_text())
    organs = load_organs()[1:]
    columns = ["epoch", "train_loss", "val_loss", "val_dice", *(f"dice_{organ.replace(' ', '_')}" for organ in organs)]
    (run / "log.csv").write_text(",".join(columns) + "\n" + ",".join("1" for _ in columns) + "\n")
    (run / "metrics.csv").write_text("case,id,organ,dice,nsd\na,1,liver,0.5,0.6\n")
    return folder


SCAN, LABELS = "data/images/phantom_0001_0000.nii.gz", "data/labels/phantom_0001.nii.gz"


@pytest.mark.parametrize(
    ("arguments", "picture"),
    [
        (["visualization.curves", "run"], "run/curves.png"),
        (["visualization.scores", "run"], "run/scores.png"),
        (["visualization.overlay", SCAN, LABELS, "--output", "slices.png"], "slices.png"),
        (["data.doctor", "data", "--output", "doctor"], "doctor/doctor.png"),
    ],
)
def test_the_commands_draw_under_a_notebooks_backend(folder, arguments, picture):
    environment = {**os.environ, "MPLBACKEND": NOTEBOOK_BACKEND, "PYTHONPATH": str(ROOT)}
    done = run_script("-m", *arguments, cwd=folder, env=environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
