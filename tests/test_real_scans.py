"""The scripts on real CT, where it lies beside the repository; skipped elsewhere."""

import json
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.spatial.transform import Rotation
from warm import run_script

from core.scans.nifti import Reading
from core.scans.volumes import load_labels, load_scan

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans, which are not part of the repository")

TINY = [
    *("--size", "32", "32", "32", "--channels", "2", "--down-convs", "1", "1", "1", "--up-convs", "1", "1"),
    *("--epochs", "2", "--loss", "dice_cross_entropy", "--learning-rate", "1e-2", "--val-fraction", "0"),
]


def run(*command: object) -> subprocess.CompletedProcess:
    done = run_script(*command)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    where = ["--data-dir", REAL / "labelled", "--run-dir", folder / "run", "--cache-dir", folder / "cache"]
    done = run("train.py", *where, *TINY)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "last.pt"


NOT_CT = "without the fat and air of every CT; is it MR, or not in HU?"
# What is said of the odd files, by their names; of every other file, nothing.
SAID = {
    "nibabel_anatomical.nii": [NOT_CT],  # MR
    "niivue_AIL.nii.gz": [NOT_CT],
    "niivue_CT_pitch.nii.gz": [NOT_CT],  # a CT, whose HU were scaled to 0..255
    "niivue_shear.nii.gz": ["34.5 mm apart; the sform is used", "sheared by 16.7 degrees"],
    "ts_example_mr_sm.nii.gz": [NOT_CT],
}
REFUSED = {"nibabel_example4d.nii.gz": "has the shape 128x96x24x2, expected one 3-D volume"}


@pytest.mark.parametrize("path", sorted(REAL.rglob("*.nii*")), ids=lambda path: path.name)
def test_every_real_file_has_its_verdict(path):
    warnings = []
    load = load_labels if path.parent.name == "labels" else load_scan
    if path.name in REFUSED:
        with pytest.raises(ValueError, match=f"{path.name}: {REFUSED[path.name]}"):
            load(path)
        return
    load(path, reading=Reading(warn=warnings.append))
    expected = SAID.get(path.name, [])
    assert len(warnings) == len(expected), warnings
    for sentence, words in zip(warnings, expected, strict=True):
        assert sentence.startswith(f"{path}: ")
        assert words in sentence


@pytest.mark.slow
def test_copies_in_other_axis_orders_give_the_same_voxels_back(checkpoint, tmp_path):
    original = nib.load(REAL / "labelled" / "images" / "ts_example_0000.nii.gz")
    (tmp_path / "scans").mkdir()
    nib.save(original, tmp_path / "scans" / "RAS.nii.gz")
    for order in ("LPS", "PIL"):
        turn = ornt_transform(io_orientation(original.affine), axcodes2ornt(order))
        nib.save(original.as_reoriented(turn), tmp_path / "scans" / f"{order}.nii.gz")
    tilt = np.eye(4)
    tilt[:3, :3] = Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix()
    oblique = nib.Nifti1Image(np.asanyarray(original.dataobj), tilt @ original.affine)
    nib.save(oblique, tmp_path / "scans" / "oblique.nii.gz")

    done = run("infer.py", tmp_path / "scans", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected = np.asarray(nib.load(tmp_path / "out" / "RAS.nii.gz").dataobj)
    assert len(np.unique(expected)) > 2  # two epochs are enough to find something
    for name in ("LPS", "PIL", "oblique"):
        scan, labels = nib.load(tmp_path / "scans" / f"{name}.nii.gz"), nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert labels.get_data_dtype() == np.uint8
        assert labels.shape == scan.shape
        np.testing.assert_array_equal(labels.affine, scan.affine)
        np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(labels).dataobj), expected)


@pytest.mark.slow
def test_thick_slices_and_padding_are_segmented_with_a_warning(checkpoint, tmp_path):
    # 512x512x99 in LPS, padded with -3024 HU; the training cases above are smaller in Z or of other contrast.
    scan = REAL / "unlabelled" / "acrin_abdomen_0000.nii.gz"
    done = run("infer.py", scan, "--checkpoint", checkpoint, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: case acrin_abdomen: unlike the training cases" in done.stderr
    labels = nib.load(tmp_path / "acrin_abdomen.nii.gz")
    assert labels.shape == (512, 512, 99)
    assert np.asarray(labels.dataobj).max() <= 13


@pytest.mark.slow
def test_truth_against_itself_is_perfect(tmp_path):
    labels = REAL / "labelled" / "labels"
    done = run("evaluate.py", "--predictions", labels, "--labels", labels, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mean"] == dict.fromkeys(("dice", "nsd", "precision", "recall", "accuracy"), 1.0) | {"hd95_mm": 0.0}
    assert summary["organs"]["esophagus"]["dice"] == {"mean": None, "sd": None, "median": None, "n": 0, "n_infinite": 0}
    # ../shared/data/README.md: one of the three cases lacks the right adrenal gland.
    assert summary["organs"]["right adrenal gland"]["dice"]["n"] == 2
    assert summary["organs"]["liver"]["dice"]["n"] == 3
