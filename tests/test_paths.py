"""Paths with a leading ~, as a shell leaves them in --flag=~/x and as scripts hand them on."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from helpers import TINY
from test_structure import COMMANDS

import evaluate
import infer
import train
from core.config import load_config, save_config
from core.scans.files import read_case_ids
from data import convert, doctor, download, make_phantom
from visualization import curves, overlay, scores, viewer


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return a home folder; the commands run in another, which stays as it is."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path / "home"
    assert list((tmp_path / "elsewhere").iterdir()) == []  # above all, no folder named ~


@pytest.fixture
def done(run_main):
    """Run a command that has to succeed."""

    def done(script, *arguments):
        code, _, err = run_main(script, *arguments)
        assert code == 0, err

    return done


@pytest.mark.slow
def test_every_path_of_the_scripts_may_begin_with_the_home_folder(home, done, monkeypatch):
    done(make_phantom, "~/data", "--cases", "3", "--shape", "40", "36", "28")
    done(doctor, "~/data", "--output=~/doctor", "--workers=1")
    assert (home / "doctor" / "doctor.json").is_file()
    save_config(load_config(), home / "config.yaml")
    paths = ["--config=~/config.yaml", "--data-dir=~/data", "--run-dir=~/run", "--cache-dir=~/cache"]
    done(train, *paths, *TINY, "--epochs", "1", "--val-fraction", "0.4")
    case = (home / "run" / "val_cases.txt").read_text().split()[0]
    done(
        infer, "~/data", "--checkpoint=~/run/best.pt", "--output=~/found", "--cases", "~/run/val_cases.txt",
        "--device=cpu",
    )  # fmt: skip
    done(
        evaluate, "--predictions=~/found", "--labels=~/data/labels", "--output=~/scores", "--against=~/found",
        "--cases", "~/run/val_cases.txt", "--config=~/config.yaml", "--checkpoint=~/run/best.pt", "--workers=1",
    )  # fmt: skip
    assert (home / "scores" / "comparison.json").is_file()
    (home / "scores" / "scores.png").unlink()
    done(scores, "~/scores")
    assert (home / "scores" / "scores.png").is_file()
    done(curves, "~/run")
    scan, labels = f"~/data/images/{case}_0000.nii.gz", f"~/data/labels/{case}.nii.gz"
    given = [scan, labels, f"--truth=~/found/{case}.nii.gz"]
    done(overlay, *given, "--output=~/a.png", "--config=~/config.yaml")
    monkeypatch.setattr(viewer, "organ_mesh", lambda *_: None)  # which takes seconds, and no path
    done(viewer, *given, "--output=~/a.html", "--checkpoint=~/run/best.pt")
    assert (home / "a.png").is_file()
    assert (home / "a.html").is_file()


def test_the_paths_of_data_convert_and_data_download(home, done, phantom_data):
    (home / "organs.txt").write_text("liver\nspleen\n")
    done(convert, phantom_data, "~/converted", "--organs", "~/organs.txt", "--no-doctor", "--workers=1")
    assert (home / "converted" / "annotated.csv").is_file()
    with zipfile.ZipFile(home / "data.zip", "w") as file:
        for path in phantom_data.glob("*/phantom_0001*"):
            file.write(path, Path("FLARE22Train", path.relative_to(phantom_data)))
    checksum = hashlib.sha256((home / "data.zip").read_bytes()).hexdigest()
    done(download, "--to=~/down", "--url=~/data.zip", "--sha256", checksum, "--no-doctor")
    assert list((home / "down").glob("*/labels/phantom_0001.nii.gz"))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_reads_a_path_as_it_was_typed(command):
    source = Path(__file__).parents[1].joinpath(*command.split(".")).with_suffix(".py").read_text()
    assert "type=Path" not in source


def test_a_list_of_cases_may_lie_in_the_home_folder(home):
    (home / "cases.txt").write_text("a\n")
    assert read_case_ids(["~/cases.txt"]) == ["a"]
    assert read_case_ids(["~a"]) == ["~a"]  # an id, and no user


def test_the_home_of_an_unknown_user_is_no_traceback(home, run_main):
    code, _, err = run_main(doctor, "~nobody-of-this-name/data")
    assert code == 2
    assert err.startswith("error: ~nobody-of-this-name/data: ")


def test_an_empty_path_is_not_the_current_folder(home, run_main):
    code, _, err = run_main(evaluate, "--predictions=", "--labels=x", "--output=y")
    assert code == 2
    assert "--predictions: got an empty path" in err
    for given in (["", "--output=y"], ["x", "--output="]):
        code, _, err = run_main(infer, *given, "--checkpoint=z")
        assert (code, "got an empty path" in err) == (2, True)
