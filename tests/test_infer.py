"""The prediction script as users run it, with a small untrained network: it is the way there and back that counts."""

import csv
import dataclasses
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import REAL, make_series, write
from helpers import (
    AFFINE,
    AXIS_CODES,
    SOON,
    SPACING_MM,
    TABLES,
    VOXEL_ML,
    files_in,
    in_ras,
    make_voxels,
    save_scan,
    start,
    wait_for,
)
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage
from torch.nn import functional as F
from warm import run_script

import infer
from core.checkpoint import load_checkpoint, load_network, save_checkpoint
from core.config import Config, load_config
from core.inference import output_folder, restoring
from core.inference.output_folder import OutputFolder
from core.network import build_network
from core.scans.crop import whole_box
from core.scans.geometry import Geometry
from core.scans.typical import differences
from core.training.batches import describe_cases
from dataset import CaseDataset, find_cases

ROOT = Path(__file__).resolve().parents[1]
SIZE, WINDOW_HU = (32, 32, 16), (-100.0, 300.0)
ORGANS = ("background", "liver", "spleen", "left kidney")


@pytest.fixture(scope="module")
def config() -> Config:
    return dataclasses.replace(
        load_config(), size=SIZE, window_hu=WINDOW_HU, organs=ORGANS, channels=2, down_convs=(1, 1, 1), up_convs=(1, 1),
        cache_dir=None, device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(config, tmp_path_factory) -> Path:
    """Return an untrained network, said to have been trained on two scans: one of SIZE, one a little larger."""
    folder = tmp_path_factory.mktemp("training")
    for case, shape in (("a", SIZE), ("b", (36, 36, 20))):
        save_scan(folder / "images" / f"{case}_0000.nii.gz", make_voxels(shape))
        save_scan(folder / "labels" / f"{case}.nii.gz", np.zeros(shape, np.uint8))
    training_data = describe_cases(CaseDataset(find_cases(folder), config), workers=0).ranges
    training_data["organs"] = list(ORGANS[1:])
    torch.manual_seed(0)
    save_checkpoint(folder / "best.pt", build_network(config), config, training_data=training_data)
    return folder / "best.pt"


@pytest.fixture
def run(checkpoint, tmp_path, run_main):
    """Run infer.py's main in this process, into tmp_path/out: exit code, stdout and stderr."""
    return partial(run_main, infer, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--device", "cpu")


def predict_by_hand(checkpoint: Path, voxels: np.ndarray) -> np.ndarray:
    """Return the label map of voxels, (X, Y, Z) in RAS+ order, by torch's own resizing."""
    network, _ = load_network(checkpoint)
    low, high = WINDOW_HU
    image = torch.from_numpy(np.clip((voxels.astype(np.float64) - low) / (high - low), 0, 1)).float()[None, None]
    image = (F.interpolate(image, SIZE, mode="trilinear") * 255).round() / 255
    with torch.inference_mode():
        logits = F.interpolate(network(image), voxels.shape, mode="trilinear")
    return logits[0].argmax(dim=0).numpy()


def read_volumes(folder: Path) -> dict[tuple[str, str], float]:
    with open(folder / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "case", "id", "organ", "ml", "hu_mean", "hu_sd", "hu_median", "pieces", "touches_edge",
    ]  # fmt: skip
    assert all(ORGANS[int(row["id"])] == row["organ"] for row in rows)
    found = {(row["case"], row["organ"]): float(row["ml"]) for row in rows}
    assert len(found) == len(rows)
    return found


# ---- There and back


def test_the_command_gives_every_storage_order_the_same_label_map(checkpoint, tmp_path):
    voxels = make_voxels((36, 30, 20))
    for axes in AXIS_CODES:
        save_scan(tmp_path / "scans" / f"{axes}_0000.nii", voxels, axes)
    command = [ROOT / "infer.py", "scans", "--checkpoint", checkpoint, "--output", "out"]
    result = run_script(*command, "--device", "cpu", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "48 of 48 scans segmented into out" in result.stdout

    expected = predict_by_hand(checkpoint, voxels)
    assert min(np.bincount(expected.ravel(), minlength=4)) > 50  # every class is there to be misplaced
    for axes in AXIS_CODES:
        scan = nib.load(tmp_path / "scans" / f"{axes}_0000.nii")
        labels = nib.load(tmp_path / "out" / f"{axes}.nii.gz")
        assert labels.shape == scan.shape
        assert labels.get_data_dtype() == np.uint8
        assert "".join(nib.aff2axcodes(labels.affine)) == axes
        assert np.array_equal(labels.affine, scan.affine)
        assert np.mean(in_ras(tmp_path / "out" / f"{axes}.nii.gz") != expected) < 1e-3
    # To the last voxel the same, in the patient, as the scan stored in RAS+ order.
    first = in_ras(tmp_path / "out" / "RAS.nii.gz")
    assert all(np.array_equal(in_ras(tmp_path / "out" / f"{axes}.nii.gz"), first) for axes in AXIS_CODES)
    volumes = read_volumes(tmp_path / "out")
    for axes, (i, organ) in itertools.product(AXIS_CODES, enumerate(ORGANS[1:], start=1)):
        assert volumes[axes, organ] == pytest.approx((first == i).sum() * VOXEL_ML, abs=5e-4)
    with open(tmp_path / "out" / "volumes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        mask = first == int(row["id"])
        hu = voxels[mask]
        assert (float(row["hu_mean"]), float(row["hu_sd"])) == pytest.approx((hu.mean(), hu.std()), abs=0.06)
        assert float(row["hu_median"]) == np.median(hu)
        assert int(row["pieces"]) == ndimage.label(mask, np.ones((3, 3, 3)))[1]
        ends = {"left": mask[0], "right": mask[-1], "back": mask[:, 0], "front": mask[:, -1]}
        ends |= {"bottom": mask[..., 0], "top": mask[..., -1]}
        assert row["touches_edge"].split() == [name for name, side in ends.items() if side.any()]
    assert len({row["touches_edge"] for row in rows}) > 1  # not the same for all organs


def test_a_scan_on_the_networks_own_grid_is_predicted_to_the_voxel(run, checkpoint, tmp_path):
    voxels = make_voxels(SIZE, seed=1)
    code, *_ = run(save_scan(tmp_path / "scan.nii.gz", voxels, "PIR"))
    assert code == 0
    assert np.array_equal(in_ras(tmp_path / "out" / "scan.nii.gz"), predict_by_hand(checkpoint, voxels))


@pytest.mark.parametrize("axes", ["RAS", "LPI"])
def test_an_oblique_scan_keeps_its_place_and_its_header(run, checkpoint, tmp_path, axes):
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.1)
    affine = nib.affines.from_matvec(turn @ np.diag(SPACING_MM), (5, -7, 90))
    voxels = make_voxels((34, 32, 18), seed=2)
    file = nib.Nifti1Image(voxels, affine)
    file = file.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(axes)))
    file.header.set_xyzt_units("mm", "sec")
    file.set_sform(file.affine, code="mni")
    file.set_qform(file.affine, code="scanner")
    nib.save(file, tmp_path / "scan.nii.gz")
    code, *_ = run(tmp_path / "scan.nii.gz")
    assert code == 0

    scan, labels = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "out" / "scan.nii.gz")
    assert labels.shape == scan.shape
    assert np.array_equal(labels.affine, scan.affine)
    for form in ("get_sform", "get_qform"):
        expected, code = getattr(scan, form)(coded=True)
        found, found_code = getattr(labels, form)(coded=True)
        assert np.array_equal(found, expected)
        assert found_code == code != 0
    assert labels.header.get_zooms() == scan.header.get_zooms()
    assert labels.header.get_xyzt_units() == scan.header.get_xyzt_units() == ("mm", "sec")
    assert np.mean(in_ras(tmp_path / "out" / "scan.nii.gz") != predict_by_hand(checkpoint, voxels)) < 1e-3
    volumes = read_volumes(tmp_path / "out")
    assert volumes["scan", "liver"] == pytest.approx((np.asarray(labels.dataobj) == 1).sum() * VOXEL_ML, abs=5e-4)


def test_probabilities_belong_to_the_label_map(run, tmp_path):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels((36, 30, 20)), "LSA")
    code, *_ = run(scan, "--probabilities")
    assert code == 0
    file = nib.load(tmp_path / "out" / "scan_probabilities.nii.gz")
    labels = np.asarray(nib.load(tmp_path / "out" / "scan.nii.gz").dataobj)
    probabilities = file.get_fdata()
    assert probabilities.shape == (*labels.shape, len(ORGANS))
    assert np.array_equal(file.affine, nib.load(scan).affine)
    assert np.abs(probabilities.sum(axis=-1) - 1).max() < 1e-4
    of_label = np.take_along_axis(probabilities, labels[..., None].astype(int), axis=-1)[..., 0]
    assert (probabilities.max(axis=-1) - of_label).max() < 1e-4
    assert probabilities.min() >= 0
    assert np.ptp(probabilities) > 0.1


def test_without_the_flag_there_are_no_probabilities(run, tmp_path):
    run(save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE)))
    assert set(files_in(tmp_path / "out")) == {"scan.nii.gz", *TABLES}


@pytest.mark.parametrize("flag", ["--size", "--window-hu", "--organs", "--config"])
def test_no_flag_contradicts_the_checkpoint(run, tmp_path, flag):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE))
    code, _, err = run(scan, flag, "1")
    assert code == 2
    assert f"unrecognized arguments: {flag} 1" in err


def test_the_window_comes_from_the_checkpoint(run, config, checkpoint, tmp_path):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE))
    network, content = load_network(checkpoint)
    other = dataclasses.replace(config, window_hu=(-1000.0, 1000.0), organs=("background", "x", "y", "z"))
    save_checkpoint(tmp_path / "other.pt", network, other, training_data=content["training_data"])
    run(scan)
    code, *_ = run(scan, "--checkpoint", tmp_path / "other.pt", "--output", tmp_path / "other")
    assert code == 0
    assert (in_ras(tmp_path / "out" / "scan.nii.gz") != in_ras(tmp_path / "other" / "scan.nii.gz")).any()
    assert "scan,1,x," in (tmp_path / "other" / "volumes.csv").read_text()


class Threshold(torch.nn.Module):
    """A network without weights: the second class above the middle of the HU window, which is 100 HU."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - image, image - 0.5], dim=1)  # (B, 1, X, Y, Z) to (B, 2, X, Y, Z)


def test_any_network_segments_scans(config, checkpoint, tmp_path):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE), "LPI")
    config = dataclasses.replace(config, organs=("background", "liver"))
    training_data = load_checkpoint(checkpoint)["training_data"]
    output = OutputFolder(tmp_path)
    cpu = torch.device("cpu")
    inference = infer.Inference([Threshold()], config, training_data, cpu, torch.float32, output)
    assert infer.segment(inference, {"liver": scan}, show=False) == []
    found, hu = in_ras(tmp_path / "liver.nii.gz"), in_ras(scan)
    sure = np.abs(hu - 100.0) > 2  # the image has 256 steps of 1.6 HU
    assert np.array_equal(found[sure], (hu > 100)[sure])
    assert 1000 < found.sum() < found.size - 1000


def test_a_tilde_is_the_home_folder(run_main, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_scan(tmp_path / "scans" / "one.nii.gz", make_voxels(SIZE))
    (tmp_path / "best.pt").symlink_to(checkpoint)
    flags = ["--checkpoint", "~/best.pt", "--output", "~/out", "--device", "cpu"]
    assert run_main(infer, "~/scans", *flags)[0] == 0
    assert set(files_in(tmp_path / "out")) == {"one.nii.gz", *TABLES}


# ---- A part of the scan

BODY = (slice(5, 37), slice(3, 35), slice(0, 20))  # of a scan of 44x40x20


def body_in_air() -> np.ndarray:
    voxels = np.full((44, 40, 20), -1000, np.int16)
    voxels[BODY] = np.maximum(make_voxels((32, 32, 20)), -100)
    return voxels


def cropped_checkpoint(path: Path, config: Config, checkpoint: Path, crop: str, bias: Sequence[float] = ()) -> Path:
    """Return the checkpoint's network with another crop; `bias` decides what it finds everywhere."""
    network, content = load_network(checkpoint)
    if bias:
        network.classify.weight.data.zero_()
        network.classify.bias.data = torch.tensor(bias).float()
    config = dataclasses.replace(config, crop=crop)
    save_checkpoint(path, network, config, training_data=content["training_data"])
    return path


def expected_in(box: tuple[slice, ...], checkpoint: Path, voxels: np.ndarray) -> np.ndarray:
    labels = np.zeros(voxels.shape, np.uint8)
    labels[box] = predict_by_hand(checkpoint, voxels[box])
    return labels


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SLA", "PIR"])
def test_a_network_of_the_body_sees_and_labels_the_body_alone(config, checkpoint, tmp_path, run_main, axes):
    body = cropped_checkpoint(tmp_path / "body.pt", config, checkpoint, "body")
    scan = save_scan(tmp_path / "scan.nii.gz", body_in_air(), axes)
    flags = ["--checkpoint", body, "--output", tmp_path / "out", "--device", "cpu", "--probabilities"]
    code, _, err = run_main(infer, scan, *flags)
    assert (code, err) == (0, "")
    labels = in_ras(tmp_path / "out" / "scan.nii.gz")
    assert np.array_equal(labels, expected_in(BODY, checkpoint, body_in_air()))
    assert labels.any()
    probabilities = in_ras(tmp_path / "out" / "scan_probabilities.nii.gz")
    assert np.array_equal(probabilities.argmax(axis=3), labels)
    assert probabilities[:5, :, :, 0].min() == pytest.approx(1)


def test_the_organs_box_is_found_by_a_second_network(config, checkpoint, tmp_path, run_main, monkeypatch):
    organs = cropped_checkpoint(tmp_path / "organs.pt", config, checkpoint, "organs")
    scan = save_scan(tmp_path / "scan.nii.gz", body_in_air())
    flags = [scan, "--checkpoint", organs, "--output", tmp_path / "out", "--device", "cpu"]
    # Everything is liver: the box is all that was searched, the body and a tenth around it.
    everywhere = cropped_checkpoint(tmp_path / "all.pt", config, checkpoint, "body", bias=(0, 1, 0, 0))
    code, _, err = run_main(infer, *flags, "--locate", everywhere)
    assert (code, err) == (0, "")
    wider = (slice(1, 41), slice(0, 39), slice(0, 20))
    assert np.array_equal(in_ras(tmp_path / "out" / "scan.nii.gz"), expected_in(wider, checkpoint, body_in_air()))
    # Nothing is found: the body, with a warning.
    nothing = cropped_checkpoint(tmp_path / "nothing.pt", config, checkpoint, "none", bias=(1, 0, 0, 0))
    code, _, err = run_main(infer, *flags, "--locate", nothing)
    assert code == 0
    assert "case scan: the network of --locate found no organ, so the whole body is segmented" in err
    assert np.array_equal(in_ras(tmp_path / "out" / "scan.nii.gz"), expected_in(BODY, checkpoint, body_in_air()))
    # Label maps say both networks.
    code, _, err = run_main(infer, *flags, "--locate", everywhere, "--skip-existing")
    assert code == 0
    assert "other options" in err


def test_organs_that_the_network_was_not_taught_make_no_box(config, checkpoint, tmp_path, run_main):
    organs = cropped_checkpoint(tmp_path / "organs.pt", config, checkpoint, "organs")
    liver = cropped_checkpoint(tmp_path / "all.pt", config, checkpoint, "none", bias=(0, 1, 0, 0))
    content = torch.load(organs, weights_only=True)
    scan = save_scan(tmp_path / "scan.nii.gz", body_in_air())
    flags = [scan, "--checkpoint", organs, "--locate", liver, "--output", tmp_path / "out", "--device", "cpu"]
    for taught in (config.organs[1:3], config.organs[2:3]):
        torch.save(content | {"training_data": content["training_data"] | {"organs": list(taught)}}, organs)
        code, _, err = run_main(infer, *flags)
        assert (code, "the network of --locate found no organ" in err) == (0, "liver" not in taught)
    config = dataclasses.replace(config, organs=("background", "a", "b", "c"))
    others = cropped_checkpoint(tmp_path / "others.pt", config, checkpoint, "none")
    code, _, err = run_main(infer, *flags[:3], "--locate", others, *flags[5:])
    assert (code, f"error: {others}: knows none of the network's organs: " in err) == (2, True)


def test_a_scan_longer_than_those_of_the_training_is_searched_in_windows(config, checkpoint, tmp_path, run_main):
    organs = cropped_checkpoint(tmp_path / "organs.pt", config, checkpoint, "organs")
    everywhere = cropped_checkpoint(tmp_path / "all.pt", config, checkpoint, "none", bias=(0, 1, 0, 0))
    voxels = make_voxels((32, 32, 60))
    scan = save_scan(tmp_path / "scan.nii.gz", voxels)
    flags = ["--checkpoint", organs, "--locate", everywhere, "--output", tmp_path / "out", "--device", "cpu"]
    code, _, err = run_main(infer, scan, *flags)
    assert code == 0, err
    # Trained on 48 and 60 mm along Z: 53.7 mm are 18 slices. All windows hold as much; the first is taken, and a tenth.
    lowest = (slice(0, 32), slice(0, 32), slice(0, 20))
    assert np.array_equal(in_ras(tmp_path / "out" / "scan.nii.gz"), expected_in(lowest, checkpoint, voxels))


def test_a_network_of_patches_labels_the_whole_grid(config, checkpoint, tmp_path, run):
    network, content = load_network(checkpoint)
    patched = tmp_path / "patched.pt"
    on_patches = dataclasses.replace(config, patch_size=(16, 32, 8))
    save_checkpoint(patched, network, on_patches, training_data=content["training_data"])
    voxels = make_voxels(SIZE)
    save_scan(tmp_path / "scan.nii", voxels)
    assert run(tmp_path / "scan.nii", "--checkpoint", patched)[0] == 0

    low, high = WINDOW_HU
    image = torch.from_numpy(np.rint(np.clip((voxels - low) / (high - low), 0, 1) * 255) / 255).float()[None, None]
    x, y, z = (np.exp(-(((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) / 2) for n in (16, 32, 8))
    weight = np.maximum(x[:, None, None] * y[:, None] * z, 1e-3)
    total = np.zeros((len(ORGANS), *SIZE))
    for i in (0, 8, 16):
        for k in (0, 4, 8):
            with torch.inference_mode():
                part = network(image[:, :, i : i + 16, :, k : k + 8]).softmax(dim=1)[0]
            total[:, i : i + 16, :, k : k + 8] += weight * part.numpy()
    labels = np.asarray(nib.load(tmp_path / "out" / "scan.nii.gz").dataobj)
    assert (labels == total.argmax(axis=0)).mean() > 0.999
    with torch.inference_mode():
        whole = network(image)[0].argmax(dim=0).numpy()
    assert (labels == whole).mean() < 0.99  # it makes a difference

    # Averaged with a network of the whole grid.
    assert run(tmp_path / "scan.nii", "--checkpoint", patched, checkpoint)[0] == 0
    with torch.inference_mode():
        both = total / total.sum(axis=0) + network(image)[0].softmax(dim=0).numpy()
    labels = np.asarray(nib.load(tmp_path / "out" / "scan.nii.gz").dataobj)
    assert (labels == both.argmax(axis=0)).mean() > 0.999


@pytest.mark.parametrize(("flags", "share"), [(["--largest-piece"], 1), (["--drop-pieces", "0.01"], 0.01)])
def test_small_pieces_of_each_organ_are_removed(checkpoint, tmp_path, run, flags, share):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE))
    assert run(scan, *flags)[0] == 0
    found, all_pieces = in_ras(tmp_path / "out" / "scan.nii.gz"), predict_by_hand(checkpoint, make_voxels(SIZE))
    removed = kept = 0
    for organ in range(1, 4):
        pieces, _ = ndimage.label(all_pieces == organ, np.ones((3, 3, 3)))
        sizes = np.bincount(pieces.ravel())[1:]
        stay = [i for i, voxels in enumerate(sizes) if i == np.argmax(sizes) or voxels > share * max(sizes)]
        assert np.array_equal(found == organ, np.isin(pieces, np.add(stay, 1)))
        removed, kept = removed + len(sizes) - len(stay), kept + len(stay)
    assert removed > 0
    assert (kept == 3) == (share == 1)
    assert read_volumes(tmp_path / "out")["scan", "liver"] == pytest.approx((found == 1).sum() * VOXEL_ML, rel=1e-4)


@pytest.mark.parametrize(("share", "stay"), [(0.49, "aabbc"), (0.5, "aabb"), (0.99, "aabb"), (1, "aa")])
def test_a_piece_of_that_share_goes_and_of_equal_ones_the_first_stays(share, stay):
    labels = np.array([1, 1, 0, 1, 1, 0, 1, 0, 2], np.uint8).reshape(9, 1, 1)
    expected = [int(letter in stay) for letter in "aa.bb.c"] + [0, 2]
    assert restoring.drop_small_pieces(labels, share).ravel().tolist() == expected


@pytest.mark.parametrize("typed", ["1.1", "-0.1", "nan"])
def test_another_share_of_pieces_is_wrong_usage(scans, run, typed):
    code, _, err = run(scans, "--drop-pieces", typed)
    assert (code, err) == (2, f"error: --drop-pieces: got {typed}, expected a number from 0 to 1\n")


def test_a_folder_with_a_files_name_costs_itself_alone(scans, run, tmp_path):
    for name, inside in (("empty.nii.gz", ()), ("pair.nii", ("a.nii.gz", "b.nii.gz"))):
        (scans / name).mkdir()
        for file in inside:
            shutil.copyfile(scans / "one_0000.nii.gz", scans / name / file)
    code, _, err = run(scans)
    assert code == 1
    for name, files in (("empty.nii.gz", 0), ("pair.nii", 2)):
        assert f"error: {scans / name}: is a folder with {files} NIfTI files, expected one\n" in err
    assert (tmp_path / "out" / "one.nii.gz").is_file()


def test_two_ways_to_drop_pieces_are_refused(scans, run):
    code, _, err = run(scans, "--largest-piece", "--drop-pieces", "0.1")
    assert code == 2
    assert "argument --drop-pieces: not allowed with argument --largest-piece" in err


@pytest.mark.parametrize(
    ("crop", "locate", "told"),
    [
        ("organs", None, "--locate: missing; the network was trained on the organs' box"),
        ("organs", "organs", "was trained with crop organs, expected none or body"),
        ("body", "body", "--locate: the network was trained with crop body, which needs none; leave it out"),
    ],
)
def test_networks_that_do_not_go_together_are_wrong_usage(config, checkpoint, tmp_path, run, crop, locate, told):
    scan = save_scan(tmp_path / "scan.nii.gz", body_in_air())
    paths = {
        name: cropped_checkpoint(tmp_path / f"{name}.pt", config, checkpoint, name) for name in {crop, locate} - {None}
    }
    flags = [] if locate is None else ["--locate", paths[locate]]
    code, _, err = run(scan, "--checkpoint", paths[crop], *flags)
    assert code == 2
    assert told in err
    assert not (tmp_path / "out" / "scan.nii.gz").exists()


# ---- Which scans


@pytest.fixture
def scans(tmp_path) -> Path:
    """Return a folder of three scans: one, three, two."""
    for seed, case in enumerate(("one", "two", "three")):
        save_scan(tmp_path / "scans" / f"{case}_0000.nii.gz", make_voxels(SIZE, seed))
    return tmp_path / "scans"


def test_cases_by_id_and_by_file(run, scans, tmp_path):
    assert run(scans, "--cases", "two")[0] == 0
    assert set(files_in(tmp_path / "out")) == {"two.nii.gz", *TABLES}
    (tmp_path / "val_cases.txt").write_text("three\n")
    assert run(scans, "--cases", tmp_path / "val_cases.txt")[0] == 0
    assert set(files_in(tmp_path / "out")) == {"three.nii.gz", "two.nii.gz", *TABLES}
    code, _, err = run(scans, "--cases", "two", "four", "--output", tmp_path / "other")
    assert code == 2
    assert "error: --cases: four not among the 3 cases: one, three, two" in err
    assert not (tmp_path / "other").exists()


def test_a_data_sets_folder_is_taken_by_its_images(run, scans, tmp_path):
    scans.rename(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("images", "labels"):
        (tmp_path / name).rename(tmp_path / "data" / name)
    code, out, _ = run(tmp_path / "data")
    assert code == 0
    assert "3 of 3 scans segmented" in out


def test_skip_existing_leaves_finished_cases_alone(run, scans, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "two.nii.gz").write_text("done before")
    code, out, _ = run(scans, "--skip-existing")
    assert code == 0
    assert "2 of 2 scans segmented" in out
    assert (tmp_path / "out" / "two.nii.gz").read_text() == "done before"
    assert {case for case, _ in read_volumes(tmp_path / "out")} == {"one", "three"}
    assert run(scans)[0] == 0
    assert (tmp_path / "out" / "two.nii.gz").read_bytes() != b"done before"


def test_skip_existing_names_label_maps_without_rows_in_volumes_csv(run, scans, tmp_path):
    assert run(scans)[0] == 0
    (tmp_path / "out" / "volumes.csv").unlink()
    assert run(scans, "--skip-existing")[2] == (
        f"warning: {tmp_path / 'out'}: volumes.csv lacks one, three, two, whose label maps --skip-existing keeps\n"
    )


def test_what_a_folder_holds_beside_its_scans_is_named(run, scans, tmp_path):
    assert run(scans)[2] == ""
    (scans / "four.MHA").write_bytes(b"")
    shutil.copytree(scans, tmp_path / "more")
    (tmp_path / "more").rename(scans / "more")
    (scans / "notes").mkdir()
    shutil.copytree(tmp_path / "out", scans / "out")  # results of infer.py
    said = f"warning: {scans}: left out four.MHA, more; give folders one by one, and scans as NIfTI\n"
    assert run(scans)[2] == said
    data = tmp_path / "data"
    (data / "labels").mkdir(parents=True)
    one = next(scans.glob("one*"))
    shutil.copy(one, data / "labels" / "one.nii.gz")
    shutil.copytree(scans / "more", data / "images")
    shutil.copy(one, data)
    assert run(data)[2] == said.replace("MHA, more", f"MHA, {one.name}").replace(str(scans), str(data))


def test_organs_that_were_never_taught_are_named(run, scans, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["training_data"]["organs"] = list(content["config"]["organs"][2:])
    torch.save(content, tmp_path / "other.pt")
    said = f"warning: not every checkpoint was taught {ORGANS[1]}: 0 mL in volumes.csv says nothing there\n"
    assert said in run(scans, "--checkpoint", tmp_path / "other.pt")[2]
    content["training_data"]["organs"] = list(content["config"]["organs"][1:])
    torch.save(content, tmp_path / "other.pt")
    assert "was taught" not in run(scans, "--checkpoint", tmp_path / "other.pt")[2]


def test_skip_existing_keeps_no_label_map_of_another_scan(run, scans, tmp_path):
    assert run(scans)[0] == 0
    before = files_in(tmp_path / "out")
    moved = AFFINE.copy()
    moved[2, 3] += 40  # another patient's scan under the same name
    save_scan(scans / "two_0000.nii.gz", make_voxels(SIZE, seed=7), affine=moved)
    code, out, err = run(scans, "--skip-existing")
    assert (code, out.splitlines()[0]) == (0, f"1 of 1 scans segmented into {tmp_path / 'out'}")
    warning, kept = err.splitlines()
    assert warning == (
        f"warning: {tmp_path / 'out' / 'two.nii.gz'}: is of another scan than {scans / 'two_0000.nii.gz'}; "
        "--skip-existing does not keep a label map of another scan"
    )
    after = files_in(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {"two.nii.gz", "volumes.csv"}
    assert kept.startswith("warning: case two: it is of another scan; another --output keeps both")
    assert after["two.nii.gz.old"] == before["two.nii.gz"]
    assert np.array_equal(nib.load(tmp_path / "out" / "two.nii.gz").affine, moved)
    assert run(scans, "--skip-existing")[1:] == (f"0 of 0 scans segmented into {tmp_path / 'out'}\n", "")


def test_skip_existing_warns_of_label_maps_of_another_network(run, checkpoint, config, scans, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.manual_seed(1)
    other = tmp_path / "other.pt"
    torch.save(content | {"network": build_network(config).state_dict()}, other)
    copy = tmp_path / "copy.pt"  # the same network in another file
    torch.save(content | {"epoch": 7}, copy)
    assert run(scans, "--cases", "one")[0] == 0
    assert run(scans, "--cases", "two", "--checkpoint", other)[0] == 0
    _, out, err = run(scans, "--cases", "two", "--checkpoint", other, "--skip-existing")
    assert (out.startswith("0 of 0 scans"), err.count("warning")) == (True, 0)
    assert run(scans, "--cases", "one", "--checkpoint", copy, "--skip-existing")[2].count("warning") == 0
    code, _, err = run(scans, "--skip-existing")
    assert code == 0
    (said,) = [line for line in err.splitlines() if "--skip-existing" in line]
    assert said.endswith(
        "1 of 2 label maps that --skip-existing keeps are another network's: two; leave it out to segment these again"
    )
    file = nib.load(tmp_path / "out" / "one.nii.gz")
    nib.save(nib.Nifti1Image(np.asanyarray(file.dataobj), file.affine), tmp_path / "out" / "one.nii.gz")
    assert "keeps do not say which network made them: one" in run(scans, "--cases", "one", "--skip-existing")[2]
    assert run(scans, "--cases", "one", "--checkpoint", checkpoint, other)[0] == 0
    both = run(scans, "--cases", "one", "--checkpoint", other, checkpoint, "--skip-existing")
    assert "keeps" not in both[2]


def test_skip_existing_tells_label_maps_of_other_options(run, scans, series, tmp_path):
    for path in series.glob("*.dcm"):
        one = pydicom.dcmread(path)
        one.AcquisitionNumber = 1 + round((one.ImagePositionPatient[2] - 30) / 2.5) % 2
        one.save_as(path)
    assert run(series, "--series", "1.2.3.4:1")[0] == 0
    _, _, err = run(series, "--series", "1.2.3.4:2", "--skip-existing")  # its slices lie elsewhere
    assert "--skip-existing does not keep a label map of another scan" in err
    for scan, flags, others in (
        (scans / "one_0000.nii.gz", (), ("--largest-piece",)),
        (scans / "two_0000.nii.gz", ("--drop-pieces", "0.1"), ("--drop-pieces", "0.2")),
    ):
        assert run(scan, *flags)[0] == 0
        assert "keeps" not in run(scan, *flags, "--skip-existing")[2]
        assert "keeps are of other options (--drop-pieces, --locate): " in run(scan, *others, "--skip-existing")[2]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_another_scan_of_the_same_name_and_grid_takes_no_place(run, tmp_path, suffix):
    """As in collections with a folder for each patient and a `ct.nii.gz` in each."""
    for seed, patient in enumerate("ab"):
        save_scan(tmp_path / patient / f"ct{suffix}", make_voxels(SIZE, seed))
    label_map = tmp_path / "out" / "ct.nii.gz"
    assert run(tmp_path / "a" / f"ct{suffix}")[0] == 0
    first = label_map.read_bytes()
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    code, out, err = run(tmp_path / "moved" / f"ct{suffix}", "--skip-existing")
    assert (code, out.startswith("0 of 0 scans segmented"), err) == (0, True, "")
    code, out, err = run(tmp_path / "b" / f"ct{suffix}", "--skip-existing")
    assert (code, out.startswith("1 of 1 scans segmented")) == (0, True)
    assert f"{label_map}: is of another scan than {tmp_path / 'b'}" in err
    assert "case ct: it is of another scan; another --output keeps both, so the earlier" in err
    assert (tmp_path / "out" / "ct.nii.gz.old").read_bytes() == first
    assert "another scan" not in run(tmp_path / "b" / f"ct{suffix}")[2]


# ---- What is refused


def test_scan_too_large_for_the_memory_is_named_and_the_others_are_done(run, scans, tmp_path, monkeypatch):
    whole = infer.prepare_image

    def too_large(voxels, *settings):
        if voxels.shape[0] == 7:
            raise MemoryError("Unable to allocate 9 GiB")
        return whole(voxels, *settings)

    save_scan(scans / "huge.nii.gz", make_voxels((7, 8, 9)))
    monkeypatch.setattr(infer, "prepare_image", too_large)
    code, out, err = run(scans)
    assert code == 1
    assert "error: case huge: Unable to allocate 9 GiB" in err
    assert "scans segmented" in out
    assert not out.startswith("0 of")


def test_broken_scans_are_named_and_the_others_are_done(run, scans, tmp_path):
    (scans / "broken.nii.gz").write_text("no NIfTI at all")
    whole = save_scan(scans / "cut.nii", make_voxels(SIZE)).read_bytes()
    (scans / "cut.nii").write_bytes(whole[: len(whole) // 2])
    holes = make_voxels(SIZE).astype(np.float32)
    holes[3, 4, 5] = math.nan
    save_scan(scans / "holes.nii.gz", holes)
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), scans / "moving.nii.gz")
    code, out, err = run(scans)
    assert code == 1
    *errors, last = err.splitlines()
    for line, (name, complaint) in zip(
        errors,
        [
            ("broken.nii.gz", "is no NIfTI file"),
            ("cut.nii", "has 16560 bytes, too few for the 33120"),
            ("holes.nii.gz", "1 of 16384 voxels are NaN or infinite, expected finite HU"),
            ("moving.nii.gz", "has the shape 8x8x8x2, expected one 3-D volume"),
        ],
        strict=True,
    ):
        assert line.startswith(f"error: {scans / name}: {complaint}")
    assert last == "error: failed: broken, cut, holes, moving"
    assert "3 of 7 scans segmented" in out
    assert set(files_in(tmp_path / "out")) == {"one.nii.gz", "two.nii.gz", "three.nii.gz", *TABLES}
    assert {case for case, _ in read_volumes(tmp_path / "out")} == {"one", "two", "three"}


def test_a_missing_input_is_named_and_the_others_are_done(run, scans, tmp_path):
    (tmp_path / "empty").mkdir()
    nowhere = tmp_path / "nowhere.nii.gz"
    code, out, err = run(scans / "one_0000.nii.gz", nowhere, tmp_path / "empty", scans / "two_0000.nii.gz")
    assert code == 1
    assert f"error: {nowhere}: no such file or folder\n" in err
    assert f"error: {tmp_path / 'empty'}: no scan in this folder" in err
    assert f"error: failed: {nowhere}, {tmp_path / 'empty'}\n" in err
    assert "2 of 2 scans segmented" in out
    assert set(files_in(tmp_path / "out")) == {"one.nii.gz", "two.nii.gz", *TABLES}


def test_nothing_but_missing_inputs(run, tmp_path):
    code, out, err = run(tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_is_refused_before_the_network_is_read(run, scans, tmp_path):
    (tmp_path / "a_file").write_text("text")
    for output in (tmp_path / "a_file", tmp_path / "a_file" / "below", Path("/proc")):  # not even root writes there
        code, out, err = run(scans, "--output", output, "--checkpoint", tmp_path / "none.pt")
        assert (code, out) == (2, "")
        assert str(output) in err
        assert "none.pt" not in err
    assert (tmp_path / "a_file").read_text() == "text"


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("none", "no such checkpoint"),
        ("text", "cannot be read as a checkpoint"),
        ("cut", "cannot be read as a checkpoint"),
        ("foreign", "is no checkpoint of this repository's train.py"),
        ("other network", "its weights are another network's"),
        ("other size", "size: got 30 32 16, expected multiples of 4"),
    ],
)
def test_a_checkpoint_that_is_none_is_refused_by_name(run, scans, config, checkpoint, tmp_path, kind, complaint):
    path = tmp_path / "bad.pt"
    network, content = load_network(checkpoint)
    state = {"training_data": content["training_data"]}
    if kind == "text":
        path.write_text("weights, they said\n" * 100)
    elif kind == "cut":
        path.write_bytes(checkpoint.read_bytes()[:-2000])
    elif kind == "foreign":
        torch.save({"state_dict": network.state_dict()}, path)
    elif kind == "other network":
        save_checkpoint(path, network, dataclasses.replace(config, channels=4), **state)
    elif kind == "other size":
        save_checkpoint(path, network, dataclasses.replace(config, size=(30, 32, 16)), **state)
    code, out, err = run(scans, "--checkpoint", path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert complaint in err
    assert str(path) in err or kind == "other size"
    assert err.count("\n") == 1
    assert not files_in(tmp_path / "out")


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("gpu", "error: --device: got gpu, expected auto, cpu, cuda or cuda:N\n"),
        ("cuda:99", "error: device: got cuda:99, but torch sees"),
    ],
)
def test_a_device_that_is_not_there(run, scans, device, complaint):
    code, _, err = run(scans, "--device", device)
    assert code == 2
    assert complaint in err


def test_a_network_that_computes_nan_makes_no_label_map(run, scans, config, checkpoint, tmp_path):
    network, content = load_network(checkpoint)
    network.classify.weight.data[1] = 3e38  # finite, but no sum of its products is
    save_checkpoint(tmp_path / "nan.pt", network, config, training_data=content["training_data"])
    code, out, err = run(scans, "--checkpoint", tmp_path / "nan.pt")
    assert code == 1
    assert "error: case two: the network's output is not finite" in err
    assert "0 of 3 scans segmented" in out
    assert not files_in(tmp_path / "out")


# ---- What earlier runs left ------------------------------------------------------------------------------------------


def test_what_was_there_of_a_case_that_fails_cannot_pass_for_new(run, scans, tmp_path):
    out = tmp_path / "out"
    assert run(scans, "--probabilities")[0] == 0
    (out / "two.nii.gz.old").write_text("older still")
    before, volumes = files_in(out), read_volumes(out)
    (scans / "two_0000.nii.gz").write_text("no NIfTI at all")
    code, _, err = run(scans, "--probabilities")
    assert code == 1
    for name in ("two.nii.gz", "two_probabilities.nii.gz"):
        assert f"warning: case two: failed, so the earlier {name} is now {out / name}.old\n" in err
        assert files_in(out)[f"{name}.old"] == before[name]
        assert not (out / name).exists()
    assert read_volumes(out) == {key: ml for key, ml in volumes.items() if key[0] != "two"}
    # Nothing but that has changed, and once more nothing does.
    after = files_in(out)
    assert {name for name in before if after.get(name) != before[name]} == {
        "two.nii.gz", "two.nii.gz.old", "two_probabilities.nii.gz", "volumes.csv",
    }  # fmt: skip
    code, _, err = run(scans, "--probabilities")
    assert (code, "earlier" in err) == (1, False)
    assert files_in(out) == after


def test_earlier_probabilities_do_not_stay_beside_a_new_label_map(run, scans, tmp_path):
    assert run(scans, "--probabilities", "--cases", "two")[0] == 0
    code, _, err = run(scans)
    assert code == 0
    name = "two_probabilities.nii.gz"
    assert err == (
        f"warning: case two: without --probabilities, so the earlier {name} is now {tmp_path / 'out' / name}.old\n"
    )
    assert set(files_in(tmp_path / "out")) == {
        "one.nii.gz", "three.nii.gz", "two.nii.gz", f"{name}.old", *TABLES,
    }  # fmt: skip


def test_a_label_map_that_no_network_has_made_is_kept(run, scans, tmp_path):
    drawn = save_scan(tmp_path / "out" / "two.nii.gz", np.ones((6, 6, 6), np.uint8))
    (tmp_path / "out" / "three.nii.gz").write_bytes(b"no label map")
    before = drawn.read_bytes()
    code, _, err = run(scans)
    assert code == 0
    assert [line.split(": the label map")[0] for line in err.splitlines()] == [
        "warning: case three", "warning: case two",
    ]  # fmt: skip
    assert f"so the earlier two.nii.gz is now {drawn}.old" in err
    assert (tmp_path / "out" / "two.nii.gz.old").read_bytes() == before
    assert (tmp_path / "out" / "three.nii.gz.old").read_bytes() == b"no label map"
    assert run(scans)[::2] == (0, "")  # a network's own label map is replaced
    assert (tmp_path / "out" / "two.nii.gz.old").read_bytes() == before
    (scans / "two_0000.nii.gz").write_text("no NIfTI at all")
    assert run(scans, "--cases", "two")[0] == 1  # the network's becomes two.nii.gz.old in its turn
    assert (tmp_path / "out" / "two.nii.gz.old.old").read_bytes() == before


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_label_map_that_somebody_has_edited_is_kept(run, scans, tmp_path, dtype):
    assert run(scans)[0] == 0
    path = tmp_path / "out" / "two.nii.gz"
    before = in_ras(path)
    made = nib.load(path)  # with nibabel the header names the network still
    edited = np.asarray(made.dataobj).astype(dtype)
    nib.save(nib.Nifti1Image(edited, made.affine, made.header), path)  # unchanged voxels
    assert run(scans)[::2] == (0, "")
    nib.save(nib.Nifti1Image(made.get_fdata(), made.affine, made.header), path)  # nibabel scales them
    assert run(scans)[::2] == (0, "")
    edited[0, 0, 0] += 1
    nib.save(nib.Nifti1Image(edited, made.affine, made.header, dtype=dtype), path)
    code, _, err = run(scans)
    assert (code, err.count("\n")) == (0, 1)
    assert f"so the earlier two.nii.gz is now {path}.old" in err
    assert np.array_equal(in_ras(path), before)
    kept = shutil.copy(f"{path}.old", tmp_path / "kept.nii.gz")
    assert np.count_nonzero(nib.load(kept).get_fdata() != nib.load(path).get_fdata()) == 1
    assert run(scans)[::2] == (0, "")


def test_a_label_map_of_a_network_is_kept_once_when_its_case_fails_twice(run, scans, tmp_path):
    content = (scans / "two_0000.nii.gz").read_bytes()
    for _ in range(2):
        assert run(scans)[0] == 0
        (scans / "two_0000.nii.gz").write_text("no NIfTI at all")
        assert run(scans)[0] == 1
        (scans / "two_0000.nii.gz").write_bytes(content)
    assert sorted(path.name for path in (tmp_path / "out").glob("two*")) == ["two.nii.gz.old"]


def test_two_cases_whose_files_would_have_one_name_are_refused(run, scans, tmp_path):
    save_scan(scans / "one_probabilities.nii.gz", make_voxels((6, 6, 6)))
    code, _, err = run(scans)
    assert (code, err.count("error: ")) == (2, 1)
    assert "cases one and one_probabilities: " in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.nii.gz"))


def test_organs_that_the_locator_was_not_trained_on_are_named(config, checkpoint, tmp_path, run_main):
    organs = cropped_checkpoint(tmp_path / "organs.pt", config, checkpoint, "organs")
    body = cropped_checkpoint(tmp_path / "all.pt", config, checkpoint, "body", bias=(0, 1, 0, 0))
    for path, taught in ((organs, list(config.organs[1:])), (body, list(config.organs[1:2]))):
        content = torch.load(path, weights_only=True)
        torch.save(content | {"training_data": content["training_data"] | {"organs": taught}}, path)
    scan = save_scan(tmp_path / "scan.nii.gz", body_in_air())
    flags = ["--checkpoint", organs, "--locate", body, "--output", tmp_path / "out", "--device", "cpu"]
    code, _, err = run_main(infer, scan, *flags)
    missed = ", ".join(config.organs[2:])
    assert (code, f"all.pt: was not trained on {missed}; the box that it finds may cut them" in err) == (0, True)


def test_a_file_beside_no_label_map_of_a_network_is_kept(run, scans, tmp_path):
    path = tmp_path / "out" / "two_probabilities.nii.gz"
    path.parent.mkdir()
    path.write_bytes(b"somebody's work")
    code, _, err = run(scans, "--probabilities")
    assert (code, path.is_file()) == (0, True)
    assert err == (
        "warning: case two: it is beside no label map that is as this program made it, "
        f"so the earlier {path.name} is now {path}.old\n"
    )
    assert run(scans, "--probabilities")[::2] == (0, "")  # a network's own are replaced
    assert path.with_name(f"{path.name}.old").read_bytes() == b"somebody's work"


@pytest.mark.parametrize("others", [True, False])
def test_an_input_that_is_gone_counts_as_failed_too(run, scans, tmp_path, others):
    out = tmp_path / "out"
    assert run(scans)[0] == 0
    two, inputs = scans / "two_0000.nii.gz", [scans / "one_0000.nii.gz"] * others
    two.unlink()
    before = files_in(out)
    assert run(two, *inputs, "--skip-existing")[0] == 1
    if others:  # a choice of cases in which it is not
        assert run(two, *inputs, "--cases", "one")[0] == 1
    assert files_in(out) == before
    code, _, err = run(two, *inputs)
    assert code == 1
    assert err.startswith(f"error: {two}: no such file")
    assert f"warning: case two: failed, so the earlier two.nii.gz is now {out / 'two.nii.gz'}.old\n" in err
    assert set(files_in(out)) == {"one.nii.gz", "three.nii.gz", "two.nii.gz.old", *TABLES}
    assert {case for case, _ in read_volumes(out)} == {"one", "three"}


def test_a_mistyped_scan_moves_no_label_map_of_the_data(run, tmp_path):
    labels = save_scan(tmp_path / "data" / "labels" / "two.nii.gz", make_voxels(SIZE))
    (tmp_path / "data" / "images").mkdir()
    code, _, err = run(tmp_path / "data" / "images" / "two_0000.nii.gz", "--output", labels.parent)
    assert code == 2
    assert "holds the data's own label maps; choose another folder" in err
    assert set(files_in(tmp_path / "data")) == {"labels/two.nii.gz"}


@pytest.mark.parametrize("step", ["save_label_map", "write_tables", "replace"])
def test_a_case_that_cannot_be_written_leaves_neither_files_nor_rows(run, scans, tmp_path, monkeypatch, step):
    out = tmp_path / "out"
    assert run(scans)[0] == 0
    earlier = (out / "two.nii.gz").read_bytes()
    owner = {"replace": os, "write_tables": OutputFolder, "save_label_map": output_folder}[step]
    real_step = getattr(owner, step)

    def fail_for_two(*arguments):
        target = next((Path(path).name for path in reversed(arguments[:4]) if isinstance(path, str | Path)), "")
        if getattr(arguments[1], "case", None) == "two" or (target if step == "replace" else target[-11:]) in (
            "two.nii.gz",
            ".two.nii.gz",
        ):
            raise OSError(28, "No space left on device")
        return real_step(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr(owner, step, fail_for_two)
        code, _, err = run(scans)
    assert code == 1
    assert f"error: case two: [Errno 28] No space left on device: '{out / 'two.nii.gz'}'\n" in err
    assert files_in(out)["two.nii.gz.old"] == earlier
    assert set(files_in(out)) == {"one.nii.gz", "three.nii.gz", "two.nii.gz.old", *TABLES}
    assert {case for case, _ in read_volumes(out)} == {"one", "three"}
    assert run(scans, "--skip-existing")[0] == 0
    assert {case for case, _ in read_volumes(out)} == {"one", "three", "two"}
    assert files_in(out)["two.nii.gz"] == earlier


def test_a_killed_run_leaves_nothing_half_done(run, checkpoint, tmp_path):
    scan, cases = save_scan(tmp_path / "scan.nii.gz", make_voxels((36, 36, 20))), {f"{i:02}" for i in range(40)}
    (tmp_path / "scans").mkdir()
    for case in cases:
        (tmp_path / "scans" / f"{case}.nii.gz").symlink_to(scan)
    command = [sys.executable, ROOT / "infer.py", tmp_path / "scans", "--checkpoint", checkpoint, "--device", "cpu"]
    process = start(*command, "--output", tmp_path / "out")
    assert wait_for(lambda: (tmp_path / "out" / "02.nii.gz").is_file())
    process.kill()
    process.communicate(timeout=SOON)
    done = {path.name[:2]: path.read_bytes() for path in (tmp_path / "out").glob("[0-9]*.nii.gz")}
    assert 3 <= len(done) < 40
    assert len(set(done.values())) == 1  # all are whole: the scans are the same
    assert done.keys() <= {case for case, _ in read_volumes(tmp_path / "out")}
    code, out, _ = run(tmp_path / "scans", "--skip-existing")
    assert code == 0
    assert f"{40 - len(done)} of {40 - len(done)} scans segmented" in out
    assert {case for case, _ in read_volumes(tmp_path / "out")} == cases
    assert all((tmp_path / "out" / f"{case}.nii.gz").read_bytes() == done["00"] for case in cases)


def test_left_overs_of_a_killed_run_are_in_nobodys_way(run, scans, tmp_path):
    (tmp_path / "out").mkdir()
    left = {f".{name}": b"half" for name in ("ab12.two.nii.gz", "cd34.volumes.csv", "volumes.lock")}
    for name, content in left.items():
        (tmp_path / "out" / name).write_bytes(content)
    assert run(scans)[0] == 0
    assert run(tmp_path / "out", "--output", tmp_path / "again")[0] == 0  # its label maps, taken for scans
    assert set(files_in(tmp_path / "again")) == {"one.nii.gz", "two.nii.gz", "three.nii.gz", *TABLES}
    assert left.items() <= {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}.items()


def test_what_a_killed_run_left_of_a_case_is_removed_with_it(run, scans, tmp_path):
    out, token = tmp_path / "out", "0123456789ab"
    out.mkdir()
    (scans / "two_0000.nii.gz").rename(scans / "t[wo]_0000.nii.gz")
    names = [f".{token}.one.nii.gz", f".{token}..{token}.t[wo].nii.gz", f".{token}.t[wo]_probabilities.nii.gz"]
    others = [f".{token}.four.nii.gz", ".one.nii.gz"]
    for name in (*names, *others):
        (out / name).write_bytes(b"half")
    assert run(scans)[::2] == (0, "")
    assert set(files_in(out)) == {"one.nii.gz", "t[wo].nii.gz", "three.nii.gz", *TABLES, *others}


# ---- Disks and links -------------------------------------------------------------------------------------------------


@pytest.fixture
def large(run, scans, tmp_path) -> int:
    """One more scan, and how many KiB its label map takes; the other label maps together take less than half."""
    save_scan(scans / "large.nii.gz", make_voxels((200, 200, 60)))
    assert run(scans, "--output", tmp_path / "sizes")[0] == 0
    kib = {name: len(content) // 1024 + 4 for name, content in files_in(tmp_path / "sizes").items()}
    assert kib["large.nii.gz"] > 2 * (sum(kib.values()) - kib["large.nii.gz"])
    return kib["large.nii.gz"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make a block in which this process cannot write a file of more bytes."""
    import resource  # Windows has none

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_scan_that_no_room_is_left_for_fails_alone(run, scans, large, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "large.nii.gz").write_text("from an earlier run")
    with largest_file(large // 2 * 1024):
        code, out, err = run(scans)
    assert code == 1
    assert f"error: case large: [Errno 27] File too large: '{tmp_path / 'out' / 'large.nii.gz'}'\n" in err
    assert err.endswith("error: failed: large\n")
    assert "3 of 4 scans segmented" in out
    files = files_in(tmp_path / "out")
    assert set(files) == {"large.nii.gz.old", "one.nii.gz", "two.nii.gz", "three.nii.gz", *TABLES}
    assert files["large.nii.gz.old"] == b"from an earlier run"
    assert {case for case, _ in read_volumes(tmp_path / "out")} == {"one", "two", "three"}


def may_mount() -> bool:
    """Whether a process may mount file systems that only it sees."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs unshare -rm, which this machine does not allow")
@pytest.mark.parametrize(
    ("mounted", "complaint"),
    [
        ("mount -t tmpfs -o ro none out", "Read-only file system"),
        ("mount -t tmpfs -o size=8k none out && cat /dev/zero > out/full 2>/dev/null", "No space left on device"),
    ],
)
def test_a_full_or_read_only_disk_is_found_before_the_network_is_read(scans, tmp_path, mounted, complaint):
    (tmp_path / "out").mkdir()
    command = [sys.executable, ROOT / "infer.py", scans, "--checkpoint", tmp_path / "none.pt", "--output", "out"]
    process = start("unshare", "-rm", "bash", "-c", f'{mounted}; exec "$@"', "bash", *command, cwd=tmp_path)
    out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith(f"{complaint}: 'out'\n")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="needs unshare -rm, which this machine does not allow")
def test_a_disk_that_fills_up(checkpoint, scans, large, tmp_path):
    """The large label map has no place on it, those of the others do."""
    for name in ("out", "kept"):
        (tmp_path / name).mkdir()
    mount_and_run = f'mount -t tmpfs -o size={large * 3 // 4}k none out; "$@"; code=$?; cp -a out/. kept; exit $code'
    command = [sys.executable, ROOT / "infer.py", scans, "--checkpoint", checkpoint, "--output", "out"]
    isolated = ["unshare", "-rm", "bash", "-c", mount_and_run, "bash"]
    process = start(*isolated, *command, "--device", "cpu", cwd=tmp_path)
    _, err = process.communicate(timeout=SOON)
    assert process.returncode == 1, err
    assert "error: case large: [Errno 28] No space left on device: 'out/large.nii.gz'\n" in err
    assert set(files_in(tmp_path / "kept")) == {"one.nii.gz", "two.nii.gz", "three.nii.gz", *TABLES}
    assert {case for case, _ in read_volumes(tmp_path / "kept")} == {"one", "two", "three"}


# ---- Several processes -----------------------------------------------------------------------------------------------


# ---- DICOM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def series(tmp_path) -> Path:
    """Return the folder of a DICOM series: 8 columns, 6 rows, 4 slices; 0.8 x 0.5 x 2.5 mm."""
    return write(tmp_path / "patients" / "p1", make_series())


def test_dicom_segments_and_contours_beside_the_label_map(run, series, tmp_path):
    pytest.importorskip("highdicom")
    out = tmp_path / "out"
    assert run(series, "--dicom-seg", "--rtstruct")[0] == 0
    assert set(files_in(out)) == {"p1.nii.gz", "p1_seg.dcm", "p1_rtstruct.dcm", *TABLES}
    labels = np.asarray(nib.load(out / "p1.nii.gz").dataobj)  # (column, row, slice)
    found = pydicom.dcmread(out / "p1_seg.dcm")
    voxels = Counter()
    for frame, groups in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence, strict=True):
        voxels[groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber] += int(np.count_nonzero(frame))
    assert voxels == Counter(labels[labels > 0].tolist())
    structures = pydicom.dcmread(out / "p1_rtstruct.dcm")
    drawn = {one.ReferencedROINumber for one in structures.ROIContourSequence if "ContourSequence" in one}
    assert drawn == set(voxels)

    assert run(series, "--dicom-seg", "--rtstruct", "--skip-existing")[1].startswith("0 of 0 scans")
    (out / "p1_seg.dcm").unlink()
    assert run(series, "--dicom-seg", "--skip-existing")[1].startswith("1 of 1 scans")
    assert (out / "p1_seg.dcm").is_file()
    code, _, err = run(series)
    assert code == 0
    assert f"case p1: without --dicom-seg, so the earlier p1_seg.dcm is now {out / 'p1_seg.dcm'}.old" in err
    assert set(files_in(out)) == {"p1.nii.gz", "p1_seg.dcm.old", "p1_rtstruct.dcm.old", *TABLES}


def test_what_fails_beside_a_label_map_leaves_all_earlier_files_as_old(run, series, tmp_path, monkeypatch):
    pytest.importorskip("highdicom")
    out = tmp_path / "out"
    assert run(series, "--dicom-seg", "--rtstruct")[0] == 0
    earlier = files_in(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_folder, "write_structures", full)
    code, _, err = run(series, "--dicom-seg", "--rtstruct")
    assert (code, "No space left on device" in err) == (1, True)
    names = {"p1.nii.gz", "p1_seg.dcm", "p1_rtstruct.dcm"}
    assert {name: files_in(out)[f"{name}.old"] for name in names} == {name: earlier[name] for name in names}
    assert set(files_in(out)) == {f"{name}.old" for name in names} | {*TABLES}


def test_dicom_results_are_refused_before_the_work_starts(run, scans, series, tmp_path, monkeypatch):
    code, _, err = run(series, scans / "one_0000.nii.gz", "--rtstruct")
    assert (code, err) == (
        2, f"error: --rtstruct: {scans / 'one_0000.nii.gz'} is NIfTI, expected a DICOM series, to whose slices the "
        "result refers\n",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "highdicom", None)
    code, _, err = run(series, "--dicom-seg")
    assert code == 2
    assert err.startswith("error: --dicom-seg: needs highdicom (")
    assert err.endswith("); pip install highdicom\n")


def test_a_tilted_gantry_is_refused_where_dicom_is_wanted(run, tmp_path):
    lean = make_series(ImageOrientationPatient=[1, 0, 0, 0, 0.9396926, -0.3420201], PixelSpacing=[1, 1])
    for k, one in enumerate(lean):
        one.ImagePositionPatient = [-10, -20, 30 + 5 * k]
    series = write(tmp_path / "leaning", lean)
    code, _, err = run(series, "--rtstruct")
    assert code == 1
    assert "error: case leaning: its slices are sheared (tilted gantry), which viewers show wrongly" in err
    assert "leave out --rtstruct\n" in err
    assert files_in(tmp_path / "out") == {}
    assert run(series)[0] == 0


def test_a_dicom_series_is_a_case_named_as_its_folder(run, scans, series, tmp_path):
    out = tmp_path / "out"
    code, done, err = run(f"{series}/", scans / "one_0000.nii.gz")
    assert code == 0
    assert "2 of 2 scans segmented" in done
    assert "warning: case p1: unlike the training cases" in err
    assert "warning: case p1: its values go from -13 to 23, without the fat and air of every CT" in err
    assert set(files_in(out)) == {"one.nii.gz", "p1.nii.gz", *TABLES}
    labels = nib.load(out / "p1.nii.gz")
    assert labels.shape == (8, 6, 4)
    # Columns run to the left, rows to the back, from L -10, P -20, S 30 (test_dicom.py).
    expected = [[-0.8, 0, 0, 10], [0, -0.5, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]]
    np.testing.assert_allclose(labels.affine, expected, rtol=1e-6)
    volumes = {organ: ml for (case, organ), ml in read_volumes(out).items() if case == "p1"}
    for i, organ in enumerate(ORGANS[1:], start=1):
        assert volumes[organ] == pytest.approx((np.asarray(labels.dataobj) == i).sum() * 0.001, abs=5e-4)

    before = files_in(out)
    assert run(series, "--skip-existing")[1].startswith("0 of 0 scans")
    assert run(series, scans, "--cases", "two")[0] == 0
    assert set(files_in(out)) == set(before) | {"two.nii.gz"}
    next(series.glob("*.dcm")).write_bytes(b"damaged")
    code, _, err = run(series)
    assert code == 1
    assert f"error: {series}: " in err
    assert files_in(out)["p1.nii.gz.old"] == before["p1.nii.gz"]
    assert "p1" not in {case for case, _ in read_volumes(out)}


def test_the_network_sees_the_series_values_in_their_places(run, checkpoint, tmp_path):
    """The same blobs as a DICOM series and as a NIfTI file get the same label map, each in its own storage order."""
    voxels = make_voxels((8, 6, 20), seed=3)
    slices = make_series(20)
    for k, one in enumerate(slices):
        stored = voxels[::-1, ::-1, k].T + 1024  # columns to the left, rows to the back
        one.PixelData = np.ascontiguousarray(stored).astype(np.uint16).tobytes()
    code, *_ = run(write(tmp_path / "p1", slices))
    assert code == 0
    found = in_ras(tmp_path / "out" / "p1.nii.gz")
    expected = predict_by_hand(checkpoint, voxels)
    assert len(np.unique(expected)) > 1
    assert np.mean(found != expected) < 1e-2


def test_which_of_several_series(run, series, tmp_path):
    write(series, make_series(3, SeriesInstanceUID="1.2.3.7"), "LUNG")
    code, _, err = run(series)
    assert code == 1
    assert f"error: {series}: holds 2 CT series, expected one; choose by --series UID: 1.2.3.4" in err
    assert run(series, "--series", "1.2.3.7")[0] == 0
    assert nib.load(tmp_path / "out" / "p1.nii.gz").shape == (8, 6, 3)
    first = files_in(tmp_path / "out")["p1.nii.gz"]
    code, _, err = run(series, "--series", "1.2.3.4")
    assert (code, "case p1: it is of another scan; another --output keeps both, so the earlier" in err) == (0, True)
    assert nib.load(tmp_path / "out" / "p1.nii.gz").shape == (8, 6, 4)
    assert files_in(tmp_path / "out")["p1.nii.gz.old"] == first
    assert "another scan" not in run(series, "--series", "1.2.3.4")[2]


def test_skip_existing_keeps_no_label_map_of_another_series(run, series, tmp_path):
    assert run(series)[0] == 0
    code, out, err = run(series, "--skip-existing")
    assert (code, err, "0 of 0 scans segmented" in out) == (0, "", True)
    shutil.rmtree(series)
    write(series, make_series(6))  # exported again, now whole
    code, out, err = run(series, "--skip-existing")
    assert (code, "--skip-existing does not keep a label map of another scan" in err) == (0, True)
    assert nib.load(tmp_path / "out" / "p1.nii.gz").shape == (8, 6, 6)


def test_which_of_several_acquisitions(run, series, tmp_path):
    for path in series.glob("*.dcm"):
        one = pydicom.dcmread(path)
        one.AcquisitionNumber = 1 + round((one.ImagePositionPatient[2] - 30) / 2.5) % 2
        one.save_as(path)
    code, _, err = run(series)
    assert code == 1
    names = "1.2.3.4:1 (AcquisitionNumber 1, 2 slices); 1.2.3.4:2 (AcquisitionNumber 2, 2 slices)"
    message = f"holds 2 acquisitions under one series UID; choose by --series UID:N: {names}\n"
    assert f"error: {series}: {message}" in err
    assert run(series, "--series", "1.2.3.4:2")[0] == 0
    assert "0 of 0 scans segmented" in run(series, "--series", "1.2.3.4:2", "--skip-existing")[1]
    labels = nib.load(tmp_path / "out" / "p1.nii.gz")
    assert labels.shape == (8, 6, 2)
    np.testing.assert_allclose(labels.affine[2], [0, 0, 5, 32.5])


def test_a_series_in_two_folders_is_one_case_or_refused(run, tmp_path):
    parts = [write(tmp_path / "export" / f"DIR00{i}", make_series(12)[6 * i : 6 * i + 6]) for i in range(2)]
    code, _, err = run(*parts)
    assert code == 1
    for part, rest in (parts, parts[::-1]):
        message = f"holds a part of a DICOM series, {rest} another part; give {tmp_path / 'export'} alone\n"
        assert f"error: {part}: {message}" in err
    assert run(tmp_path / "export")[0] == 0
    assert nib.load(tmp_path / "out" / "export.nii.gz").shape == (8, 6, 12)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans, which are not part of the repository")
def test_a_real_series_label_map_lies_where_its_headers_say(run, tmp_path):
    code, _, err = run(REAL)
    assert code == 0, err
    labels = nib.load(tmp_path / "out" / f"{REAL.name}.nii.gz")
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in REAL.glob("*.dcm")]
    headers.sort(key=lambda header: float(header.ImagePositionPatient[2]))
    assert labels.shape == (headers[0].Columns, headers[0].Rows, len(headers)) == (512, 512, 20)
    # Every slice's corners by PS3.3 equation C.7.6.2.1-1, in LPS, against the label map's affine, in RAS.
    for k, header in enumerate(headers):
        along_row, down_column = np.reshape(np.array(header.ImageOrientationPatient, float), (2, 3))
        row_mm, column_mm = map(float, header.PixelSpacing)
        for i, j in itertools.product((0, header.Columns - 1), (0, header.Rows - 1)):
            lps = np.array(header.ImagePositionPatient, float) + along_row * column_mm * i + down_column * row_mm * j
            np.testing.assert_allclose(labels.affine @ [i, j, k, 1], [*(lps * [-1, -1, 1]), 1], atol=1e-3)


# ---- What is accepted of scans ---------------------------------------------------------------------------------------


def test_scans_above_the_limit_are_refused(run, scans):
    save_scan(scans / "small.nii.gz", make_voxels((8, 8, 8)))
    assert "--max-gib: got 0.0, expected a number of GiB above 0" in run(scans, "--max-gib", "0")[2]
    assert run(scans, "--max-gib", "nan")[0] == 2
    code, out, err = run(scans, "--max-gib", "1e-5")  # 10737 bytes; 32 x 32 x 16 voxels take 65536, 8 x 8 x 8 take 2048
    assert code == 1
    assert "1 of 4 scans segmented" in out
    assert err.count(f"error: {scans}") == 3


def test_a_series_above_the_limit_is_refused(run, series):
    code, _, err = run(series, "--max-gib", "1e-7")  # 107 bytes
    assert code == 1
    assert f"error: {series}: 8x6x4 voxels" in err
    assert run(series, "--max-gib", "1e-6")[0] == 0  # 1074 bytes; the series takes 768


def test_voxels_that_are_not_finite_are_replaced_when_asked_for(run, tmp_path):
    holes = make_voxels(SIZE).astype(np.float32)
    holes[3, 4, 5] = math.nan
    scan = save_scan(tmp_path / "scan.nii.gz", holes)
    code, _, err = run(scan)
    assert code == 1
    assert f"error: {scan}: 1 of 16384 voxels" in err
    code, _, err = run(scan, "--replace-nonfinite")
    assert code == 0
    assert err.startswith(f"warning: {scan}: 1 ")


def test_a_scan_that_does_not_say_where_it_lies_is_segmented_when_asked_for(run, tmp_path):
    file = nib.Nifti1Image(make_voxels(SIZE), None)
    file.header.set_zooms(SPACING_MM)
    nib.save(file, tmp_path / "scan.nii.gz")
    code, _, err = run(tmp_path / "scan.nii.gz")
    assert code == 1
    assert err.startswith(f"error: {tmp_path / 'scan.nii.gz'}: ")
    assert "--assume-ras" in err
    assert run(tmp_path / "scan.nii.gz", "--assume-ras")[0] == 0
    labels = nib.load(tmp_path / "out" / "scan.nii.gz")
    assert labels.shape == SIZE
    assert labels.header.get_zooms() == SPACING_MM


# ---- Stages that overlap


@pytest.fixture
def many(tmp_path) -> Path:
    """Return a folder of six scans: 0 to 5."""
    for seed in range(6):
        save_scan(tmp_path / "scans" / f"{seed}.nii.gz", make_voxels(SIZE, seed))
    return tmp_path / "scans"


def test_a_mistake_of_ours_is_no_failure_of_a_scan(run, many, tmp_path, monkeypatch):
    def mistake(*_: object):
        raise RuntimeError("the shapes do not match")

    monkeypatch.setattr(infer, "restore_labels", mistake)
    with pytest.raises(RuntimeError, match="the shapes do not match"):
        run(many)
    assert files_in(tmp_path / "out") == {}


def test_failures_are_named_in_order_whatever_the_stage(run, many, monkeypatch):
    finish, predict = infer.restore_labels, infer.predict

    def fail_to_finish(logits, box, shape, drop_pieces):
        if shape[0] == 20:
            raise OSError("no space left")
        return finish(logits, box, shape, drop_pieces)

    def fail_to_predict(inference, scan):
        if scan.case == "3":
            raise MemoryError
        predict(inference, scan)

    save_scan(many / "1.nii.gz", make_voxels((20, 20, 20)))
    (many / "2.nii.gz").write_text("no NIfTI at all")
    monkeypatch.setattr(infer, "restore_labels", fail_to_finish)
    monkeypatch.setattr(infer, "predict", fail_to_predict)
    code, out, err = run(many)
    assert code == 1
    assert "3 of 6 scans segmented" in out
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: case 1: no space left"
    assert errors[1].startswith(f"error: {many / '2.nii.gz'}: is no NIfTI file")
    assert errors[2:] == ["error: case 3: MemoryError", "error: failed: 1, 2, 3"]


def test_a_scan_that_had_too_little_memory_is_done_again(run, many, monkeypatch):
    predict, tries = infer.predict, Counter()

    def crowded(inference, scan):
        tries[scan.case] += 1
        if scan.case == "1" and tries["1"] == 1:
            raise RuntimeError("could not create a primitive")  # oneDNN's words
        predict(inference, scan)

    monkeypatch.setattr(infer, "predict", crowded)
    code, out, err = run(many)
    assert (code, "error" in err) == (0, False)
    assert "6 of 6 scans segmented" in out
    assert tries == {case: 2 if case == "1" else 1 for case in "012345"}


@pytest.mark.parametrize("network_runs", [True, False])
def test_interrupted_while_a_label_map_is_written(run, many, tmp_path, monkeypatch, network_runs):
    """Ctrl-C reaches the main thread, which the network runs in, or which waits for the writing."""
    writing, predicted = threading.Event(), threading.Event()
    predict, save = infer.predict, output_folder.save_label_map

    def predict_2(inference, scan):
        if scan.case == "2" and network_runs:
            assert writing.wait(SOON)
            raise KeyboardInterrupt
        predict(inference, scan)
        if scan.case == "2":
            predicted.set()

    def save_1(labels, geometry, path, *named):
        if path.name.endswith(".1.nii.gz"):  # its temporary name
            writing.set()
            if not network_runs:
                assert predicted.wait(SOON)
                time.sleep(0.2)  # until the main thread waits
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        save(labels, geometry, path, *named)

    monkeypatch.setattr(infer, "predict", predict_2)
    monkeypatch.setattr(output_folder, "save_label_map", save_1)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run(many)
    assert threading.active_count() == before
    # What was being written is whole, and nothing was begun after it.
    assert set(files_in(tmp_path / "out")) == {"0.nii.gz", "1.nii.gz", *TABLES}
    assert in_ras(tmp_path / "out" / "1.nii.gz").shape == SIZE
    assert {case for case, _ in read_volumes(tmp_path / "out")} == {"0", "1"}


@pytest.mark.slow
def test_ctrl_c_ends_the_command_cleanly(checkpoint, tmp_path):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels((36, 36, 20)))
    (tmp_path / "scans").mkdir()
    for i in range(1000):  # far more than are done before the signal
        (tmp_path / "scans" / f"{i:04}.nii.gz").symlink_to(scan)
    command = [sys.executable, ROOT / "infer.py", tmp_path / "scans", "--checkpoint", checkpoint, "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--output", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert wait_for(lambda: (tmp_path / "out" / "0002.nii.gz").is_file())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == [
        "interrupted; what is being written is finished first",
        "interrupted; what was written before is whole",
    ]
    found = set(files_in(tmp_path / "out"))
    cases = {name.removesuffix(".nii.gz") for name in found - {*TABLES}}
    assert 3 <= len(cases) < 1000
    assert all(case.isdigit() for case in cases)  # no temporary file
    assert all(in_ras(tmp_path / "out" / f"{case}.nii.gz").shape == (36, 36, 20) for case in cases)
    assert cases <= {case for case, _ in read_volumes(tmp_path / "out")}


# ---- Precision


def test_bf16_finds_the_same_organs(run_main, config, phantom_data, tmp_path):
    """On phantoms, with a network trained for a second to tell tissues by their HU, so that it is sure of something."""
    found = find_cases(phantom_data)[:2]
    cases = CaseDataset(found, dataclasses.replace(config, organs=load_config().organs))
    image = torch.stack([case["image"] for case in cases]).float() / 255  # (2, 1, X, Y, Z)
    tissue = torch.bucketize(image[:, 0], torch.tensor([0.1, 0.3, 0.5]))  # air, fat, soft tissue, bone
    torch.manual_seed(0)
    network = build_network(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(network(image), tissue).backward()
        optimizer.step()
    save_checkpoint(tmp_path / "net.pt", network, config, training_data=describe_cases(cases, workers=0).ranges)

    for precision in ("float32", "bf16", "auto"):
        flags = ["--checkpoint", tmp_path / "net.pt", "--output", tmp_path / precision, "--precision", precision]
        assert run_main(infer, *(case.scan for case in found), *flags, "--device", "cpu", "--probabilities")[0] == 0
    for case in ("phantom_0001", "phantom_0002"):
        exact, rounded = (in_ras(tmp_path / folder / f"{case}.nii.gz") for folder in ("float32", "bf16"))
        assert min(np.bincount(exact.ravel(), minlength=len(ORGANS))) > 500
        both = [(exact == i, rounded == i) for i in (1, 2, 3)]
        assert np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in both]) >= 0.98
        p_exact, p_rounded = (
            nib.load(tmp_path / folder / f"{case}_probabilities.nii.gz").get_fdata() for folder in ("float32", "bf16")
        )
        # bf16 has 8 bits of mantissa: the probabilities are other ones, by a little.
        assert np.abs(p_exact - p_rounded).max() > 1e-3
        assert np.abs(p_exact - p_rounded).mean() < 1e-2
        # On a CPU the default is float32.
        assert np.array_equal(in_ras(tmp_path / "auto" / f"{case}.nii.gz"), exact)
    assert read_volumes(tmp_path / "auto") == read_volumes(tmp_path / "float32") != read_volumes(tmp_path / "bf16")


@pytest.mark.parametrize(
    ("precision", "complaint"),
    [
        ("fp16", "error: precision: got fp16 on a CPU, where it is very slow; expected auto, float32 or bf16\n"),
        ("half", "error: --precision: got half, expected one of auto, float32, bf16, fp16\n"),
    ],
)
def test_a_precision_that_will_not_do(run, scans, tmp_path, precision, complaint):
    code, out, err = run(scans, "--precision", precision)
    assert (code, out, err) == (2, "", complaint)
    assert files_in(tmp_path / "out") == {}


# ---- What is unlike the training cases: 64 to 72 mm along X, 48 to 54 along Y, 48 to 60 along Z


@pytest.mark.parametrize(
    ("shape", "warning"),
    [
        ((44, 36, 20), ""),  # 88 mm is below 72 + 25 %
        ((48, 36, 20), "it covers 96 mm along X (64 to 72)"),
        ((36, 36, 10), "it covers 30 mm along Z (48 to 60)"),
        ((36, 36, 13), ""),  # 39 mm is above 48 - 25 %
    ],
)
def test_a_scan_larger_or_smaller_than_those_trained_on(run, tmp_path, shape, warning):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels(shape), "SPL")
    code, _, err = run(scan)
    assert code == 0
    assert ("warning: case scan: unlike the training cases, expect a poor prediction: " in err) == bool(warning)
    assert warning in err


def test_a_scan_brighter_than_those_trained_on(run, tmp_path):
    code, _, err = run(save_scan(tmp_path / "scan.nii.gz", make_voxels(SIZE) + np.int16(1000)))
    assert code == 0
    assert err.count("% of its body lies below") == 3
    code, _, err = run(save_scan(tmp_path / "other.nii.gz", make_voxels(SIZE) + np.int16(40)))
    assert (code, err) == (0, "")


def test_percentiles_are_compared_one_by_one():
    training_data = {
        "percentiles": [5, 50, 95],
        "extent_mm": {"min": [64, 48, 48], "max": [64, 48, 48]},
        "hu_percentiles": {"min": [-100, 0, 200], "max": [-90, 20, 300]},
    }
    flat = np.full(SIZE, 60, np.float32)
    geometry = Geometry(SIZE, AFFINE, nib.Nifti1Header())
    assert differences(flat, geometry, whole_box(SIZE), training_data) == [
        "5 % of its body lies below 60 HU (-100 to -90)",
        "95 % of its body lies below 60 HU (200 to 300)",
    ]


# ---- Several networks, several processes -----------------------------------------------------------------------------


def other_checkpoint(path: Path, config: Config, checkpoint: Path, seed: int, **changes: object) -> Path:
    """Another untrained network, of other settings if asked to, said to know scans of twice the extents."""
    torch.manual_seed(seed)
    data = load_checkpoint(checkpoint)["training_data"]
    wider = data | {"extent_mm": {"min": data["extent_mm"]["min"], "max": [2 * mm for mm in data["extent_mm"]["max"]]}}
    config = dataclasses.replace(config, **changes)
    save_checkpoint(path, build_network(config), config, training_data=wider)
    return path


def test_probabilities_of_several_networks_are_averaged(run, scans, config, checkpoint, tmp_path):
    other = other_checkpoint(tmp_path / "other.pt", config, checkpoint, 1)
    apart = []
    for path in (checkpoint, other):
        run(scans / "one_0000.nii.gz", "--probabilities", "--checkpoint", path, "--output", tmp_path / path.stem)
        apart.append(np.asanyarray(nib.load(tmp_path / path.stem / "one_probabilities.nii.gz").dataobj).astype(float))
    assert np.abs(apart[0] - apart[1]).max() > 0.1
    code, _, err = run(scans / "one_0000.nii.gz", "--probabilities", "--checkpoint", checkpoint, other)
    assert (code, err) == (0, "")
    found = np.asanyarray(nib.load(tmp_path / "out" / "one_probabilities.nii.gz").dataobj).astype(float)
    # Exact on the network's grid; in between, logarithms are interpolated. The scan is as large as the grid.
    assert found.shape[:3] == SIZE
    np.testing.assert_allclose(found, (apart[0] + apart[1]) / 2, atol=2e-3)
    labels = np.asanyarray(nib.load(tmp_path / "out" / "one.nii.gz").dataobj)
    sure = np.sort(found, axis=-1)[..., -1] - np.sort(found, axis=-1)[..., -2] > 0.01
    assert np.array_equal(labels[sure], found.argmax(axis=-1)[sure])


def test_what_several_networks_know_is_what_one_of_them_knows(run, config, checkpoint, tmp_path):
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels((48, 36, 20)))  # 96 mm along X: too long for the first
    other = other_checkpoint(tmp_path / "other.pt", config, checkpoint, 1)
    assert "it covers 96 mm along X" in run(scan)[2]
    assert "it covers" not in run(scan, "--checkpoint", checkpoint, other)[2]


def test_networks_that_do_not_go_together_are_refused(run, scans, config, checkpoint, tmp_path):
    for changes in ({"size": (16, 16, 16)}, {"window_hu": (-50.0, 100.0)}, {"organs": (*ORGANS[:-1], "heart")}):
        other = other_checkpoint(tmp_path / "other.pt", config, checkpoint, 1, **changes)
        code, _, err = run(scans, "--checkpoint", checkpoint, other)
        assert (code, err.count("\n")) == (2, 1)
        assert f"other.pt: its {next(iter(changes))} is " in err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="torchrun over Gloo")
def test_processes_of_torchrun_share_the_scans_out(run, checkpoint, tmp_path):
    for number in range(5):
        save_scan(tmp_path / "scans" / f"case{number}.nii.gz", make_voxels(SIZE, seed=number))
    (tmp_path / "scans" / "case3.nii.gz").write_bytes(b"no scan")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--checkpoint", checkpoint, "--device", "cpu"]
    script = ["infer.py", tmp_path / "scans", tmp_path / "nowhere", *flags]
    process = start(*launch, *script, "--output", tmp_path / "two", cwd=ROOT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1
    assert out.count("4 of 5 scans segmented") == 1
    assert err.count("error: failed: case3") == 1
    assert (out + err).count("no such file or folder") == 1
    assert run(*script[1:3], "--output", tmp_path / "one")[0] == 1
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert {name for name in one if name.endswith(".nii.gz")} == {f"case{n}.nii.gz" for n in (0, 1, 2, 4)}
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".nii.gz"):
            first, second = (np.asanyarray(nib.load(tmp_path / which / name).dataobj) for which in ("one", "two"))
            assert (first != second).mean() < 1e-3, name  # another number of threads
    assert read_volumes(tmp_path / "two").keys() == read_volumes(tmp_path / "one").keys()
