"""Whose organ names count: a network's own names go from checkpoint to scores, whatever config.yaml lists."""

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from warm import run_script

import evaluate
import infer
from core.checkpoint import load_network, save_checkpoint
from core.config import load_config, save_config
from core.network import build_network
from core.scans.geometry import Geometry
from core.scans.volumes import read_geometry, save_label_map
from core.scoring.organ_list import DEFAULT_NOTE
from core.training.batches import describe_cases
from dataset import CaseDataset, find_cases
from visualization import movie, overlay, report, viewer

ROOT = Path(__file__).resolve().parents[3]
ORGANS = ("background", "left lung", "肝臓 & <x>", "heart")
SHAPE, AFFINE = (32, 32, 16), np.diag([3.0, 3.0, 5.0, 1.0])
BOXES = {1: np.s_[2:12, 4:20, 2:12], 2: np.s_[14:26, 4:20, 2:12], 3: np.s_[14:26, 21:30, 2:12]}


def make_labels() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for organ, box in BOXES.items():
        labels[box] = organ
    return labels


def make_scan(path: Path) -> Path:
    """Write a scan of three organs in fat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.where(make_labels() > 0, 60, -100).astype(np.int16), AFFINE), path)
    return path


def save_plain(path: Path, labels: np.ndarray) -> Path:
    """Write a label map without names, as other programs do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, AFFINE), path)
    return path


@pytest.fixture
def geometry(tmp_path) -> Geometry:
    return read_geometry(make_scan(tmp_path / "grid.nii.gz"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Return a network of three organs, and the settings it was trained under as config.yaml beside it."""
    folder = tmp_path_factory.mktemp("training")
    config = dataclasses.replace(
        load_config(), size=SHAPE, channels=2, down_convs=(1, 1), up_convs=(1,), device="cpu", cache_dir=None,
        organs=ORGANS,
    )  # fmt: skip
    make_scan(folder / "images" / "a_0000.nii.gz")
    save_plain(folder / "labels" / "a.nii.gz", make_labels())
    training_data = describe_cases(CaseDataset(find_cases(folder), config), workers=0).ranges
    torch.manual_seed(0)
    save_checkpoint(folder / "best.pt", build_network(config), config, training_data=training_data, epoch=1)
    save_config(config, folder / "config.yaml")
    return folder / "best.pt"


@pytest.fixture
def run(run_main):
    return partial(run_main, evaluate, "--workers=1")


def folders(folder: Path) -> list[str]:
    return [f"--{name}={folder / name}" for name in ("predictions", "labels", "output")]


def names_in(folder: Path) -> list[str]:
    """Return the organ names of metrics.csv, one case's."""
    with open(folder / "output" / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["organ"] for row in rows if row["case"] == rows[0]["case"]]


def test_a_networks_names_go_from_infer_to_evaluate(checkpoint, tmp_path):
    make_scan(tmp_path / "scans" / "a_0000.nii.gz")
    save_plain(tmp_path / "labels" / "a.nii.gz", make_labels())
    for command in (
        [
            "infer.py",
            tmp_path / "scans",
            "--checkpoint",
            checkpoint,
            "--output",
            tmp_path / "predictions",
            "--device=cpu",
        ],
        ["evaluate.py", *folders(tmp_path)],
    ):
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
    assert names_in(tmp_path) == list(ORGANS[1:])
    assert [line.split("  ")[0] for line in done.stdout.splitlines()[1:4]] == list(ORGANS[1:])
    assert "config.yaml" not in done.stdout
    assert list(json.loads((tmp_path / "output" / "summary.json").read_text())["organs"]) == list(ORGANS[1:])


def test_without_names_the_default_list_counts_and_is_said(run, tmp_path):
    for name in ("predictions", "labels"):
        save_plain(tmp_path / name / "a.nii.gz", make_labels())
    code, out, err = run(*folders(tmp_path))
    assert (code, err) == (0, "")
    assert out.splitlines().count(DEFAULT_NOTE) == 1
    assert len(DEFAULT_NOTE) <= 100
    assert names_in(tmp_path) == list(load_config().organs[1:])


@pytest.mark.parametrize("flags", [["config"], ["checkpoint"], ["config", "checkpoint"]])
def test_flags_name_the_organs_of_files_without_names(checkpoint, run, tmp_path, flags):
    for name in ("predictions", "labels"):
        save_plain(tmp_path / name / "a.nii.gz", make_labels())
    files = {"config": checkpoint.parent / "config.yaml", "checkpoint": checkpoint}
    code, out, _ = run(*folders(tmp_path), *(f"--{flag}={files[flag]}" for flag in flags))
    assert code == 0
    assert DEFAULT_NOTE not in out
    assert names_in(tmp_path) == list(ORGANS[1:])


def test_flags_that_differ_are_wrong_usage(checkpoint, run, tmp_path, capsys):
    for name in ("predictions", "labels"):
        save_plain(tmp_path / name / "a.nii.gz", make_labels())
    flags = ["--config", str(ROOT / "config.yaml"), "--checkpoint", str(checkpoint)]
    code, out, err = run(*folders(tmp_path), *flags)
    assert (code, out) == (2, "")
    assert "differ: id 1 is 'liver' in the first and 'left lung' in the second; give one of them" in err
    assert err.count("\n") == 1
    scan = str(make_scan(tmp_path / "a_0000.nii.gz"))
    for module, output in ((overlay, "o.png"), (movie, "o.mp4"), (viewer, "o.html"), (report, "out")):
        with pytest.raises(SystemExit) as end:
            module.main([scan, str(tmp_path / "labels" / "a.nii.gz"), *flags, "--output", str(tmp_path / output)])
        assert end.value.code == 2
        assert "differ: id 1 is" in capsys.readouterr().err
        assert not (tmp_path / output).exists()


def test_the_references_names_count_when_predictions_have_none(geometry, run, tmp_path):
    save_plain(tmp_path / "predictions" / "a.nii.gz", make_labels())
    (tmp_path / "labels").mkdir()
    save_label_map(make_labels(), geometry, tmp_path / "labels" / "a.nii.gz", ORGANS)
    code, out, _ = run(*folders(tmp_path))
    assert code == 0
    assert DEFAULT_NOTE not in out
    note = "Organ names come from the references; there are none in the predictions, whose ids are read by them."
    assert out.replace("\n", " ").count(note) == 1
    assert names_in(tmp_path) == list(ORGANS[1:])
    # With names on both sides nothing is to be said.
    save_label_map(make_labels(), geometry, tmp_path / "predictions" / "a.nii.gz", ORGANS)
    assert "Organ names" not in run(*folders(tmp_path))[1]


def test_names_of_one_side_are_put_on_the_others_ids_with_a_note(geometry, run, tmp_path, capsys):
    """The ids of left and right lung, say, may be exchanged in references that do not name them."""
    scan, plain = make_scan(tmp_path / "a_0000.nii.gz"), save_plain(tmp_path / "labels" / "a.nii.gz", make_labels())
    for name in ("predictions", "others"):
        (tmp_path / name).mkdir()
        save_label_map(make_labels(), geometry, tmp_path / name / "a.nii.gz", ORGANS)
    code, out, _ = run(*folders(tmp_path), f"--against={tmp_path / 'others'}")
    assert code == 0
    note = "Organ names come from the predictions; there are none in the references, whose ids are read by them."
    assert out.replace("\n", " ").count(note) == 1
    named = tmp_path / "predictions" / "a.nii.gz"
    assert overlay.main([str(scan), str(named), "--truth", str(plain), "--output", str(tmp_path / "o.png")]) == 0
    note = "Organ names come from the prediction; there are none in the reference, whose ids are read by them."
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / 'o.png'}", note]


def test_predictions_of_different_lists_are_refused(geometry, run, tmp_path):
    (tmp_path / "predictions").mkdir()
    for case, organs in (("a", ORGANS), ("b", ORGANS[:3])):
        save_plain(tmp_path / "labels" / f"{case}.nii.gz", make_labels())
        save_label_map(make_labels(), geometry, tmp_path / "predictions" / f"{case}.nii.gz", organs)
    code, out, err = run(*folders(tmp_path))
    assert (code, out) == (2, "")
    first, second = (tmp_path / "predictions" / f"{case}.nii.gz" for case in "ab")
    assert (
        f"{first} and {second} differ in the organ names of their headers: id 3 is 'heart' in the first and no" in err
    )
    assert not (tmp_path / "output").exists()


def test_a_case_whose_names_contradict_the_list_is_refused_and_the_others_scored(checkpoint, geometry, run, tmp_path):
    (tmp_path / "predictions").mkdir()
    for case, organs in (("a", ORGANS), ("b", ("background", "left lung", "heart", "肝臓 & <x>"))):
        save_plain(tmp_path / "labels" / f"{case}.nii.gz", make_labels())
        save_label_map(make_labels(), geometry, tmp_path / "predictions" / f"{case}.nii.gz", organs)
    code, out, err = run(*folders(tmp_path), f"--checkpoint={checkpoint}")
    assert code == 1
    assert f"{tmp_path / 'predictions' / 'b.nii.gz'}: its header says that id 2 is 'heart', but the organ list" in err
    assert "1 of 2 cases scored, 1 refused" in out
    assert names_in(tmp_path) == list(ORGANS[1:])


def test_ids_beyond_the_names_are_refused(geometry, run, tmp_path):
    (tmp_path / "predictions").mkdir()
    save_plain(tmp_path / "labels" / "a.nii.gz", make_labels() + np.uint8(1))
    save_label_map(make_labels(), geometry, tmp_path / "predictions" / "a.nii.gz", ORGANS)
    code, _, err = run(*folders(tmp_path))
    assert code == 1
    assert "labels/a.nii.gz: ids outside the organ list: 4 " in err


def test_the_ceiling_has_the_references_names_and_the_checkpoints_size(checkpoint, geometry, run, tmp_path):
    (tmp_path / "labels").mkdir()
    save_label_map(make_labels(), geometry, tmp_path / "labels" / "a.nii.gz", ORGANS)
    flags = folders(tmp_path)[1:]
    code, out, _ = run(*flags, "--ceiling", f"--checkpoint={checkpoint}")
    assert code == 0
    assert "32x32x16 voxels" in out
    code, out, _ = run(*flags, "--ceiling", "--size", 16, 16, 8)
    assert code == 0
    rows = (tmp_path / "output" / "ceiling.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [row.split(",")[2] for row in rows] == list(ORGANS[1:])


def test_label_maps_without_names_among_others_are_named(geometry, run, tmp_path):
    for side in ("predictions", "labels"):
        for case in ("a", "b", "c"):
            path = tmp_path / side / f"{case}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            if (side, case) in (("predictions", "b"), ("labels", "c")):
                save_plain(path, make_labels())
            else:
                save_label_map(make_labels(), geometry, path, ORGANS)
    code, out, _ = run(*folders(tmp_path))
    assert code == 0
    nameless = "1 of the 3 predictions (b.nii.gz) and 1 of the 3 references (c.nii.gz)"
    note = f"Organ names come from the predictions; there are none in {nameless}, whose ids are read by them."
    assert note in out.replace("\n", " ")


# ---- Pictures --------------------------------------------------------------------------------------------------------


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


@pytest.mark.slow
def test_pictures_take_the_label_maps_names(geometry, tmp_path, monkeypatch, capsys):
    scan, labels = make_scan(tmp_path / "a_0000.nii.gz"), tmp_path / "a.nii.gz"
    save_label_map(make_labels(), geometry, labels, ("background", "left lung", "trachea", "heart"))
    figures = []
    monkeypatch.setattr(overlay, "save_figure", lambda figure, path: figures.append(figure))
    assert overlay.main([str(scan), str(labels), "--output", str(tmp_path / "o.png")]) == 0
    assert {"left lung", "trachea", "heart"} <= set(texts(figures[0]))
    assert viewer.main([str(scan), str(labels), "--output", str(tmp_path / "o.html")]) == 0
    assert '"name": "trachea"' in (tmp_path / "o.html").read_text(encoding="utf-8").replace('":"', '": "')
    assert report.main([str(scan), str(labels), "--output", str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["organ"] for row in facts["organs"]] == ["left lung", "trachea", "heart"]
    small = ["--frames", "1", "--size", "64", "64"]
    assert movie.main([str(scan), str(labels), "--organs", "trachea", *small, "--output", str(tmp_path / "o.gif")]) == 0
    assert DEFAULT_NOTE not in capsys.readouterr().out


def test_pictures_refuse_a_contradiction_and_say_the_default(geometry, tmp_path, capsys):
    scan, labels = make_scan(tmp_path / "a_0000.nii.gz"), tmp_path / "a.nii.gz"
    save_label_map(make_labels(), geometry, labels, ORGANS)
    plain = save_plain(tmp_path / "plain.nii.gz", make_labels())
    for module, output in ((overlay, "o.png"), (movie, "o.mp4"), (viewer, "o.html"), (report, "out")):
        flags = ["--config", str(ROOT / "config.yaml"), "--output", str(tmp_path / output)]
        with pytest.raises(SystemExit) as end:
            module.main([str(scan), str(plain), "--truth", str(labels), *flags])
        assert end.value.code == 1
        err = capsys.readouterr().err
        assert f"{labels}: its header says that id 1 is 'left lung', but the organ list says 'liver'" in err
        assert err.count("\n") == 1
        assert not (tmp_path / output).is_file()
    assert overlay.main([str(scan), str(plain), "--output", str(tmp_path / "o.png")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"wrote {tmp_path / 'o.png'}", DEFAULT_NOTE]


def test_infer_and_evaluate_agree_in_one_process(checkpoint, run_main, run, tmp_path):
    """The names of several checkpoints' common settings are those of the label map, too."""
    make_scan(tmp_path / "scans" / "a_0000.nii.gz")
    save_plain(tmp_path / "labels" / "a.nii.gz", make_labels())
    network, content = load_network(checkpoint)
    with torch.no_grad():
        network.classify.bias[1] += 0.5
    save_checkpoint(tmp_path / "other.pt", network, content["config"], training_data=content["training_data"])
    files = [checkpoint, tmp_path / "other.pt"]
    code, *_ = run_main(infer, tmp_path / "scans", "--checkpoint", *files, "--output", tmp_path / "predictions")
    assert code == 0
    assert run(*folders(tmp_path))[0] == 0
    assert names_in(tmp_path) == list(ORGANS[1:])
