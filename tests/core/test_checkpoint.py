"""Checkpoints: written whole, loaded the same, and anything else refused in one sentence that names the file."""

import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from core import checkpoint as checkpoint_module
from core.checkpoint import (
    check_resumable,
    load_checkpoint,
    load_network,
    load_networks,
    load_optimizer,
    load_weights,
    save_checkpoint,
)
from core.config import load_config
from core.network import build_network

SMALL = {"size": ["16", "16", "8"], "channels": "2", "down_convs": ["1", "1"], "up_convs": ["1"]}
CONFIG = load_config(flags=SMALL)
TRAINING_DATA = {
    "percentiles": [5, 50, 95],
    "extent_mm": {"min": [100.0, 100.0, 90.0], "max": [300.0, 300.0, 290.0]},
    "hu_percentiles": {"min": [-90.0, 20.0, 150.0], "max": [-80.0, 40.0, 200.0]},
}
DAMAGED = "cannot be read as a checkpoint: it is empty, cut short, damaged or another kind of file"


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "last.pt", build_network(CONFIG), CONFIG, epoch=3, training_data=TRAINING_DATA)
    return tmp_path / "last.pt"


def stepped(network: nn.Module) -> torch.optim.Adam:
    """Return Adam after one step with gradients of ones: exp_avg is 0.1 and exp_avg_sq 0.001 everywhere."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def resumable(tmp_path):
    """Save a checkpoint as train.py does after a step."""
    network = build_network(CONFIG)
    state = {"optimizer": stepped(network).state_dict(), "scaler": {}, "cases": {"train": ["a"], "val": ["b"]}}
    state["average"] = {name: value.detach() + 1 for name, value in network.named_parameters()}
    save_checkpoint(tmp_path / "last.pt", network, CONFIG, epoch=1, training_data=TRAINING_DATA, **state)
    return tmp_path / "last.pt"


def refusal(path: Path) -> str:
    """Return what load_checkpoint says, which must be one sentence that names the file."""
    with pytest.raises(ValueError, match=" ") as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "weights_only" not in message  # torch's advice to run the file's code
    assert len(message) < len(str(path)) + 200
    return message


def test_network_and_settings_come_back(path):
    network, content = load_network(path)
    torch.manual_seed(0)
    expected = build_network(CONFIG).state_dict()
    assert content["config"] == CONFIG
    assert content["epoch"] == 3
    assert content["training_data"] == TRAINING_DATA
    assert not network.training
    assert list(expected) == list(network.state_dict())
    assert all(torch.equal(expected[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_networks_of_all_norms_come_back(tmp_path, norm):
    config = load_config(flags=SMALL | {"norm": norm})
    network = build_network(config).to(memory_format=torch.channels_last_3d)
    save_checkpoint(tmp_path / "last.pt", network, config, training_data=TRAINING_DATA)
    found = load_network(tmp_path / "last.pt")[0].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())


class OtherNetwork(nn.Module):
    """Any network from (B, 1, X, Y, Z) to (B, K, X, Y, Z), with a buffer and a parameter that no V-Net has."""

    def __init__(self, classes: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Conv3d(4, classes, 1))

    def forward(self, x):
        return self.scale * self.layers(x)


def test_any_network_can_take_the_place_of_v_net(path, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "build_network", lambda config: OtherNetwork(len(config.organs)))
    network = OtherNetwork(14)
    optimizer = stepped(network)
    image = torch.rand(2, 1, 6, 5, 4)
    network(image)  # moves the batch norm's running mean
    state = {"optimizer": optimizer.state_dict(), "training_data": TRAINING_DATA}
    save_checkpoint(tmp_path / "other.pt", network, CONFIG, **state)
    found, content = load_network(tmp_path / "other.pt")
    assert torch.equal(found(image), network.eval()(image))
    assert found(image).shape == (2, 14, 6, 5, 4)
    resumed = torch.optim.Adam(found.parameters())
    load_optimizer(resumed, content, tmp_path / "other.pt")
    assert torch.equal(resumed.state[found.scale]["exp_avg"], torch.tensor(0.1))
    with pytest.raises(ValueError, match=r"last\.pt: its weights are another network's \(scale is missing\)"):
        load_network(path)
    content["network"]["extra"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"last\.pt: its weights are another network's \(extra is not part of it\)"):
        load_weights(network, content, path)


def test_what_training_goes_on_from_comes_back(resumable):
    content = load_checkpoint(resumable)
    check_resumable(content, resumable)
    network = build_network(CONFIG)
    load_weights(network, content, resumable)
    optimizer = torch.optim.Adam(network.parameters(), fused=False)
    load_optimizer(optimizer, content, resumable)
    state = optimizer.state_dict()
    assert len(state["state"]) == len(list(network.parameters()))
    for moments in state["state"].values():
        assert moments["step"] == 1
        assert torch.allclose(moments["exp_avg"], torch.tensor(0.1))
        assert torch.allclose(moments["exp_avg_sq"], torch.tensor(0.001))
    assert state["param_groups"][0]["lr"] == 1e-3
    assert state["param_groups"][0]["fused"] is False  # the checkpoint's was fused
    assert content["cases"] == {"train": ["a"], "val": ["b"]}


def test_checkpoint_from_before_a_setting_existed_gets_the_default(path):
    content = torch.load(path, weights_only=True)
    del content["config"]["memory"]
    torch.save(content, path)
    assert load_checkpoint(path)["config"].memory == load_config().memory


def test_the_file_before_is_kept_as_previous(path):
    before = path.read_bytes()
    save_checkpoint(path, build_network(CONFIG), CONFIG, path.with_name("previous.pt"), epoch=4)
    assert path.with_name("previous.pt").read_bytes() == before
    assert load_checkpoint(path)["epoch"] == 4


def test_a_full_or_failing_disk_is_named_and_the_old_file_stays(path, monkeypatch):
    def full(content, target):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0")

    def failing(content, target, save=torch.save):
        save(content, target)
        flip(target, target.read_bytes(), target.stat().st_size // 2)

    before = path.read_bytes()
    for save, what in ((full, "cannot be written, is the disk full"), (failing, "reads otherwise than it was written")):
        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(OSError, match=rf"last\.pt: {what}"):
            save_checkpoint(path, build_network(CONFIG), CONFIG, path.with_name("previous.pt"))
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def flip(path: Path, whole: bytes, position: int, bit: int = 0) -> None:
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])


@pytest.mark.slow
def test_any_flipped_bit_is_found_or_harmless(path):
    """In weights, pickle and lists of members; one in padding or in dates that nobody reads may stay."""
    whole, expected = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        members, directory = archive.infolist(), archive.start_dir
    places = [(position, position % 8) for position in range(0, len(whole), 71)]
    places += [(position, bit) for position in range(directory, directory + 80) for bit in range(8)]
    places += [(position, position % 8) for position in range(len(whole) - 98, len(whole))]
    found = {}
    for position, bit in places:
        flip(path, whole, position, bit)
        try:
            content = load_checkpoint(path)
        except ValueError as error:
            found[position] = str(error)
            continue
        assert all(torch.equal(value, content["network"][name]) for name, value in expected["network"].items())
        assert all(content[key] == expected[key] for key in ("config", "epoch", "training_data"))
    assert all(message.startswith(f"{path}: {DAMAGED}") for message in found.values())
    for member in members:  # every part's own content
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", whole, member.header_offset + 26))
        assert {place for place, _ in places if start <= place < start + member.file_size} <= found.keys()


def test_a_member_marked_as_a_folder_is_refused(path):
    """torch.load alone reads nothing of it and takes whatever the memory held for the weights."""
    whole = path.read_bytes()
    entry = whole.rfind(b"PK\x01\x02", 0, whole.rfind(b"/data/0"))
    flip(path, whole, entry + 38, 4)
    assert DAMAGED in refusal(path)


@pytest.mark.parametrize("part", [0, 0.001, 0.1, 0.5, 0.9, 0.95, 0.999])
def test_a_truncated_file_is_refused(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert DAMAGED in refusal(path)
    path.write_bytes(whole[:-1])
    assert DAMAGED in refusal(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_and_optimizer_states_that_are_not_finite_are_refused(resumable, value):
    content = torch.load(resumable, weights_only=True)
    for name, tensor in (
        ("network.classify.bias", content["network"]["classify.bias"]),
        ("average.classify.bias", content["average"]["classify.bias"]),
        ("optimizer.state.1.exp_avg", content["optimizer"]["state"][1]["exp_avg"]),
    ):
        kept = tensor.clone()
        tensor[-1] = value
        torch.save(content, resumable)
        assert f"{name} holds NaN or infinite numbers" in refusal(resumable)
        tensor.copy_(kept)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"not a checkpoint", DAMAGED),
        (b"\x89PNG\r\n\x1a\n" + bytes(500), DAMAGED),
        (pickle.dumps({"kind": "V-Net checkpoint"}), DAMAGED),
        (b"PK\x03\x04" + bytes(500), DAMAGED),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00 cut", "it is compressed with gzip"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, content, what):
    (tmp_path / "file.pt").write_bytes(content)
    assert what in refusal(tmp_path / "file.pt")


def test_other_archives_and_torchs_other_formats_are_refused(path, recwarn):
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert DAMAGED in refusal(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    recwarn.clear()
    assert DAMAGED in refusal(path)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("word/document.xml", "<w/>" * 100)
        assert DAMAGED in refusal(path)
    assert not recwarn


def test_other_peoples_checkpoints_are_refused(path):
    ours = torch.load(path, weights_only=True)
    for content in ({"state_dict": {}}, [1, 2], torch.ones(3), {"kind": ["V-Net checkpoint"]}, {"kind": ours["kind"]}):
        torch.save(content, path)
        assert "is no checkpoint of this repository's train.py" in refusal(path)
    torch.save(ours | {"version": 99}, path)
    assert "is of version 99, expected 1" in refusal(path)
    torch.save(nn.Linear(2, 2), path)
    assert "it holds other things than tensors and plain values" in refusal(path)


def test_code_in_a_checkpoint_is_not_run(path, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'it ran'}'",)

    torch.save(torch.load(path, weights_only=True) | {"epoch": Harmful()}, path)
    assert "nothing in it was run" in refusal(path)
    assert not (tmp_path / "it ran").exists()
    torch.load(path, weights_only=False)  # without care it would have run
    assert (tmp_path / "it ran").exists()


def test_what_is_not_a_file_is_not_found(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(FileNotFoundError, match=r"fifo\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "fifo.pt")
    with pytest.raises(FileNotFoundError, match="is a folder, expected a checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (
            {"channels": 3},
            r"\(first.convs.0.weight is of shape \[2, 1, 5, 5, 5\], expected \[3, 1, 5, 5, 5\]\)",
        ),
        ({"down_convs": [2, 1]}, r"network's \(first.convs.1.weight is missing\)"),
        ({"norm": "batch"}, r"network's \(first.norms.0.running_mean is missing\)"),
        ({"organs": ["background", "liver"]}, r"network's \(classify.weight is of shape \[14, "),
        ({"up_convs": [1, 1]}, r"up_convs: got 2 stages up for 2 down"),
        ({"size": [15, 16, 8]}, r"size: got 15 16 8"),
        ({"norm": "none!"}, r"norm: got none!"),
    ],
)
def test_settings_of_another_network_are_refused(path, damage, what):
    content = torch.load(path, weights_only=True)
    content["config"] |= damage
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"last\.pt: .*{what}"):
        load_network(path)


def test_an_optimizer_of_another_network_is_refused(resumable):
    def refused(what: str) -> None:
        with pytest.raises(ValueError, match=rf"last\.pt: its optimizer state does not fit the network.*{what}"):
            load_optimizer(torch.optim.Adam(build_network(CONFIG).parameters()), content, resumable)

    content = load_checkpoint(resumable)
    state = content["optimizer"]["state"][2]
    state["exp_avg"] = torch.zeros(3)
    refused(r"parameter 2 \(exp_avg is of shape \[3\], expected \[")
    content["optimizer"]["param_groups"][0]["params"].pop()
    refused("doesn't match the size")
    content["optimizer"]["param_groups"] *= 2
    refused("argument 2 is shorter")
    del content["optimizer"]["param_groups"]
    refused("param_groups")


def test_a_part_that_is_missing_is_named(path):
    with pytest.raises(ValueError, match=r"last\.pt: lacks optimizer, scaler, cases, so that training cannot go on"):
        check_resumable(load_checkpoint(path), path)
    save_checkpoint(path, build_network(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"last\.pt: lacks training_data"):
        load_network(path)


def test_several_networks_were_taught_what_each_of_them_was(tmp_path):
    for name, organs in (("a", ["liver", "spleen", "aorta"]), ("b", ["spleen", "liver"])):
        data = TRAINING_DATA | {"organs": organs}
        save_checkpoint(tmp_path / f"{name}.pt", build_network(CONFIG), CONFIG, training_data=data)
    _, content = load_networks([tmp_path / "a.pt", tmp_path / "b.pt"], torch.device("cpu"))
    assert content["training_data"]["organs"] == ["liver", "spleen"]


def test_a_network_that_is_given_twice_is_refused(tmp_path):
    """It would count twice, and agree with itself in everything."""
    network = build_network(CONFIG)
    for name in ("a", "b"):
        save_checkpoint(tmp_path / f"{name}.pt", network, CONFIG, training_data=TRAINING_DATA)
    save_checkpoint(tmp_path / "c.pt", build_network(CONFIG), CONFIG, training_data=TRAINING_DATA)
    a, b, c = (str(tmp_path / f"{name}.pt") for name in "abc")
    for given in ([a, c, b], [a, a]):
        with pytest.raises(ValueError, match=re.escape(f"{given[-1]}: has the weights of {a}; expected different")):
            load_networks(given, torch.device("cpu"))
    assert len(load_networks([a, c], torch.device("cpu"))[0]) == 2
