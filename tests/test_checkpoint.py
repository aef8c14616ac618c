"""Checkpoints: written whole, read back the same, and anything else refused by name."""

import pytest
import torch

from core.checkpoint import build_network, load_checkpoint, load_network, save_checkpoint
from core.config import load_config

CONFIG = load_config(flags={"size": ["16", "16", "8"], "channels": "2", "down_convs": ["1", "1"], "up_convs": ["1"]})


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "last.pt", build_network(CONFIG), CONFIG, epoch=3)
    return tmp_path / "last.pt"


def test_network_and_settings_come_back(path):
    network, content = load_network(path)
    torch.manual_seed(0)
    expected = build_network(CONFIG).state_dict()
    assert content["config"] == CONFIG
    assert content["epoch"] == 3
    assert list(expected) == list(network.state_dict())
    assert all(torch.equal(expected[name], value) for name, value in network.state_dict().items())


def test_full_disk_is_named(path, monkeypatch):
    def full(content, target):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"last\.pt: cannot be written, is the disk full"):
        save_checkpoint(path, build_network(CONFIG), CONFIG)
    assert path.read_bytes() == before


def test_failed_save_leaves_the_old_file_whole(path):
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        save_checkpoint(path, build_network(CONFIG), CONFIG, cannot_be_saved=lambda: None)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02", b"PK\x03\x04 cut", bytes(range(256)) * 9])
def test_foreign_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.pt: cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "file.pt")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_file_is_refused_by_name(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"last\.pt: cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_other_peoples_checkpoints_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: is no checkpoint of this repository"):
        load_checkpoint(tmp_path / "other.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"kind": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(ValueError, match=r"harmful\.pt: cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "harmful.pt")


def test_checkpoint_from_before_a_setting_existed_is_read(path):
    content = torch.load(path, weights_only=True)
    del content["config"]["memory"]
    torch.save(content, path)
    assert load_checkpoint(path)["config"].memory == load_config().memory


def test_weights_of_another_network_are_refused(path):
    content = torch.load(path, weights_only=True)
    content["config"]["channels"] = 3
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"last\.pt: its weights are another network's"):
        load_network(path)


@pytest.mark.parametrize("damage", [{"norm": "none!"}, {"size": [15, 16, 8]}])
def test_settings_in_a_checkpoint_are_checked(path, damage):
    content = torch.load(path, weights_only=True)
    content["config"] |= damage
    torch.save(content, path)
    with pytest.raises(ValueError, match=next(iter(damage))):
        load_network(path)
