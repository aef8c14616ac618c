"""Names as users have them, through the scripts: a case id that is not UTF-8, organs in Chinese, in any locale."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from helpers import TINY

from core.config import load_organs
from core.system.files import open_text, write_text
from core.system.yaml_files import dump_yaml

ROOT = Path(__file__).resolve().parents[1]
CASE = "M\udcfcller"  # b"M\xfcller", from an old zip file
NAMES = {"liver": "肝", "aorta": "Hauptschlagäder"}
ORGANS = [NAMES.get(name, name) for name in load_organs()]


@pytest.fixture
def data(phantom_data, tmp_path) -> Path:
    """Return three phantoms, one of them named CASE, whose label maps hold no organ names."""
    for number, case in enumerate((CASE, "二", "three"), start=1):
        for folder, end in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            target = tmp_path / "data" / folder / f"{case}{end}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(phantom_data / folder / f"phantom_{number:04d}{end}", target)
        labels = nib.load(target)
        nib.save(nib.Nifti1Image(np.asarray(labels.dataobj, np.uint8), labels.affine), tmp_path / "plain.nii.gz")
        (tmp_path / "plain.nii.gz").replace(target)
    write_text(tmp_path / "organs_ü.yaml", dump_yaml({"organs": ORGANS}))
    return tmp_path / "data"


@pytest.mark.parametrize(
    "locale",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.slow),
    ],
)
def test_every_script_works(data, tmp_path, locale):
    def run(*command: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | locale, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        for unwanted in (b"Traceback", b"UserWarning", b"Glyph"):
            assert unwanted not in done.stderr
        return done

    config = ("--config", tmp_path / "organs_ü.yaml")
    run_dir, predictions, scores = (tmp_path / f"{name}_\udcfc" for name in ("run", "predictions", "scores"))
    write_text(tmp_path / "held_out.txt", f"{CASE}\n")
    held_out = ("--val-cases", tmp_path / "held_out.txt")
    run("train.py", *config, *TINY, *held_out, "--epochs", 1, "--data-dir", data, "--run-dir", run_dir)
    assert json.loads((run_dir / "run.json").read_text())["val_cases"] == [CASE]
    with open_text(run_dir / "log.csv") as file:
        assert {"dice_肝", "dice_Hauptschlagäder"} <= set(next(csv.reader(file)))
    images = data / "images"
    chosen = ("--cases", run_dir / "val_cases.txt")
    run("infer.py", images, "--checkpoint", run_dir / "best.pt", "--output", predictions, *chosen)
    done = run("evaluate.py", "--predictions", predictions, "--labels", data / "labels", "--output", scores, *chosen)
    assert "肝" in done.stdout.decode(errors="surrogateescape")
    with open_text(scores / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {CASE}
    assert [row["organ"] for row in rows] == ORGANS[1:]
    assert (scores / "scores.png").is_file()
    picture = tmp_path / f"{CASE}.png"
    run(
        "-m",
        "visualization.overlay",
        images / f"{CASE}_0000.nii.gz",
        predictions / f"{CASE}.nii.gz",
        "--output",
        picture,
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
