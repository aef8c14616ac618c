"""The benchmarks of data loading and restoring answer what they say; nothing timed is asserted."""

import json
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from benchmarks import data_loading, peers, restore
from benchmarks.peers import NO_MONAI
from core.config import load_config
from data.make_phantom import write_phantom
from dataset import CaseDataset, find_cases

SIZE = (32, 32, 16)
SMALL = replace(load_config(), size=SIZE, device="cpu", cache_dir=None)
KINDS = ("network-like", "random")


@pytest.fixture
def small(monkeypatch):
    """Both benchmarks in seconds: small volumes, few cases, no MONAI."""
    monkeypatch.setattr(restore, "SHAPE", (20, 24, 10))
    monkeypatch.setattr(restore, "load_config", lambda flags: replace(SMALL, device=flags["device"]))
    monkeypatch.setattr(peers, "monai_installed", lambda: False)


def answer(run_main, module: ModuleType, *flags: object) -> tuple[list[str], dict]:
    """Return the lines that a benchmark prints, and its last line read as JSON."""
    code, out, _ = run_main(module, *flags)
    assert code == 0
    lines = out.splitlines()
    return lines, json.loads(lines[-1])


# ---- Data loading ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_loading_times_raw_and_cached_samples(run_main, small):
    flags = ["--shape", 32, 32, 24, "--size", *SIZE, "--repeats", 2]
    lines, result = answer(run_main, data_loading, *flags)
    assert NO_MONAI in lines
    assert list(result["contenders"]) == ["this, raw", "this, cached"]
    raw, cached = result["contenders"].values()
    assert [row["later_epochs_ms"]["0"]["n"] for row in (raw, cached)] == [1, 2]
    for row in (raw, cached):
        assert list(row["later_epochs_ms"]) == list(row["samples_per_s"]) == ["0", "1", "2"]
        assert row["first_epoch_ms"] > 0
    assert raw["disk_mib_per_case"] == 0
    # Two bytes a voxel, and a line of facts.
    assert cached["disk_mib_per_case"] == pytest.approx(2 * 32 * 32 * 16 / 2**20, rel=0.02)
    assert result["machine"]["torch"] == torch.__version__
    assert len(lines) > 8


@pytest.mark.slow
def test_data_loading_takes_a_users_data(run_main, small, tmp_path):
    write_phantom(tmp_path / "data", 4, (32, 32, 24), seed=0)
    flags = ["--data-dir", tmp_path / "data", "--size", *SIZE, "--repeats", 1, "--json"]
    lines, result = answer(run_main, data_loading, *flags)
    assert len(lines) == 1
    assert result["cases"] == data_loading.CASES == 3
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["images", "labels", "phantom.json"]


def test_monai_gets_the_same_samples(tmp_path):
    pytest.importorskip("monai", reason="MONAI is a peer, not a requirement")
    write_phantom(tmp_path / "data", 1, (48, 40, 24), seed=0)
    cases = find_cases(tmp_path / "data")
    ours = CaseDataset(cases, SMALL)[0]
    theirs = data_loading.monai_transforms(SMALL)({"image": str(cases[0].scan), "labels": str(cases[0].labels)})
    assert (theirs["image"] - ours["image"].float() / 255).abs().max() < 0.6 / 255
    # Nearest neighbour and largest share differ at boundaries alone.
    assert (theirs["labels"][0] == ours["labels"]).float().mean() > 0.95
    (tmp_path / "kept").mkdir()
    for way in data_loading.make_ways(cases, SMALL, tmp_path / "kept").values():
        dataset, row = data_loading.set_up(way)
        assert len(dataset) == 1
        assert row["first_epoch_ms"] > 0


# ---- Restoring -------------------------------------------------------------------------------------------------------


def test_restore_times_and_compares_both_kinds(run_main, small):
    lines, result = answer(run_main, restore, "--repeats", 2, "--device", "cpu")
    assert NO_MONAI in lines
    assert tuple(result["kinds"]) == KINDS
    assert list(result["ways"]) == [f"{kind}, {way}" for kind in KINDS for way in ("logits_to_labels", "plain")]
    for kind, row in result["kinds"].items():
        assert result["ways"][f"{kind}, plain"]["plain_to_this"]["median"] == 1
        assert result["ways"][f"{kind}, logits_to_labels"]["seconds"]["n"] == 2
        assert row["voxels_that_differ"] <= 1  # a tie in the last bit
    assert 0 < result["kinds"]["network-like"]["boundary_share"] < result["kinds"]["random"]["boundary_share"]
    lines, _ = answer(run_main, restore, "--repeats", 1, "--json", "--device", "cpu")
    assert len(lines) == 1


def test_made_up_logits_are_the_same_every_time_and_hold_every_organ():
    config = replace(SMALL, size=(96, 88, 64))
    logits = restore.network_like_logits(config)
    assert logits.shape == (14, 96, 88, 64)
    assert torch.equal(logits, restore.network_like_logits(config))
    assert set(logits.argmax(dim=0).unique().tolist()) == set(range(14))
    assert 0.01 < restore.boundary_share(logits) < 0.4


def test_monai_restores_the_same_labels():
    pytest.importorskip("monai", reason="MONAI is a peer, not a requirement")
    logits = torch.randn(4, 8, 8, 6, generator=torch.Generator().manual_seed(0))
    shape = (13, 9, 7)
    plain = F.interpolate(logits[None], size=shape, mode="trilinear")[0].argmax(dim=0)
    assert torch.equal(restore.restore_with_monai(logits, shape).long(), plain)
    assert torch.equal(restore.restore_plainly(logits, shape).long(), plain)


@pytest.mark.parametrize(
    ("module", "flags", "told"),
    [
        (data_loading, ["--repeats", 0], "--repeats: got 0"),
        (data_loading, ["--data-dir", "nowhere"], "nowhere: is no data set"),
        (data_loading, ["--size", 0, 32, 32], "--size: got [0, 32, 32]"),
        (restore, ["--repeats", 0], "--repeats: got 0"),
        (restore, ["--device", "cuda:99"], "device: got cuda:99"),
    ],
)
def test_wrong_usage_is_told_in_a_sentence(run_main, module, flags, told):
    code, _, error = run_main(module, *flags)
    assert code == 2
    assert told in error
