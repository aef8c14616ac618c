"""Checkpoints: written whole, read back the same, and anything else refused by name before it is built."""

import io
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from core import torch_file
from core.checkpoint import build_network, check_resumable, load_checkpoint, load_network, load_weights, save_checkpoint
from core.config import load_config

CONFIG = load_config(flags={"size": ["16", "16", "8"], "channels": "2", "down_convs": ["1", "1"], "up_convs": ["1"]})
TRAINING_DATA = {
    "percentiles": [5, 50, 95],
    "extent_mm": {"min": [100.0, 100.0, 90.0], "max": [300.0, 300.0, 290.0]},
    "hu_percentiles": {"min": [-90.0, 20.0, 150.0], "max": [-80.0, 40.0, 200.0]},
}


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "last.pt", build_network(CONFIG), CONFIG, epoch=3, training_data=TRAINING_DATA)
    return tmp_path / "last.pt"


@pytest.fixture
def resumable(tmp_path):
    """A checkpoint as train.py writes it after a step."""
    network = build_network(CONFIG)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(
        tmp_path / "last.pt", network, CONFIG, epoch=1, best_dice=0.5, val_dice=None, training_data=TRAINING_DATA,
        optimizer=optimizer.state_dict(), scaler={}, cases={"train": ["a"], "val": ["b"]},
    )  # fmt: skip
    return tmp_path / "last.pt"


def refusal(path: Path) -> str:
    """What load_checkpoint says, which is one sentence that names the file."""
    with pytest.raises(ValueError, match=" ") as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 1000
    return message


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def rewrite(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def replace_pickle(path: Path, pickled: bytes) -> None:
    rewrite(path, {name: pickled if name.endswith("data.pkl") else old for name, old in members_of(path).items()})


def test_network_and_settings_come_back(path):
    network, content = load_network(path)
    torch.manual_seed(0)
    expected = build_network(CONFIG).state_dict()
    assert content["config"] == CONFIG
    assert content["epoch"] == 3
    assert content["training_data"] == TRAINING_DATA
    assert list(expected) == list(network.state_dict())
    assert all(torch.equal(expected[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_networks_of_all_norms_come_back(tmp_path, norm):
    config = load_config(flags={"size": ["16", "16", "8"], "channels": "2", "down_convs": ["1", "1"],
                                "up_convs": ["1"], "norm": norm})  # fmt: skip
    network = build_network(config)
    save_checkpoint(tmp_path / "last.pt", network, config, training_data=TRAINING_DATA)
    found = load_network(tmp_path / "last.pt")[0].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())


def test_what_training_goes_on_from_comes_back(resumable):
    content = load_checkpoint(resumable)
    check_resumable(content, resumable)
    network = build_network(CONFIG)
    load_weights(network, content, resumable)
    optimizer = torch.optim.Adam(network.parameters())
    optimizer.load_state_dict(content["optimizer"])
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert content["cases"] == {"train": ["a"], "val": ["b"]}


def test_channels_last_and_a_state_that_was_never_stepped_come_back(tmp_path):
    network = build_network(CONFIG).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.Adam(network.parameters())
    save_checkpoint(tmp_path / "last.pt", network, CONFIG, optimizer=optimizer.state_dict(), scaler={}, cases={})
    with pytest.raises(ValueError, match="its cases is not what"):
        load_checkpoint(tmp_path / "last.pt")
    save_checkpoint(tmp_path / "last.pt", network, CONFIG, optimizer=optimizer.state_dict())
    weights = load_checkpoint(tmp_path / "last.pt")["network"]
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_a_checkpoint_without_an_optimizer_is_not_resumed(path):
    with pytest.raises(ValueError, match=r"last\.pt: lacks optimizer, scaler, cases, so that training cannot go on"):
        check_resumable(load_checkpoint(path), path)


def test_a_network_without_training_data_is_not_used(path):
    save_checkpoint(path, build_network(CONFIG), CONFIG)
    with pytest.raises(ValueError, match=r"last\.pt: lacks training_data"):
        load_network(path)


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


# ---- Files of other kinds


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"not a checkpoint", "damaged, or another kind of file"),
        (bytes(range(256)) * 9, "damaged, or another kind of file"),
        (b"\x80\x02", "it is a pickle, or of torch before 1.6"),
        (b"PK\x03\x04 cut", "it is cut short"),
        (b"PK\x03\x04" + bytes(500), "it is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00 cut", "it is packed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "it is an array of numpy"),
        (b"\x08\x07\x12\x07pytorch", "it looks like an ONNX model"),
        (struct.pack("<Q", 40) + b'{"w":{"dtype":"F32","shape":[1]}}' + bytes(60), "it is a safetensors file"),
        (b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"x.pt\0".ljust(257, b"\0") + b"ustar\x0000", "it is a tar archive"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path, content, what):
    for name in ("file.pt", "file.safetensors"):  # torch.load looks at this name
        (tmp_path / name).write_bytes(content)
        message = refusal(tmp_path / name)
        assert f"{name}: cannot be read as a checkpoint: " in message
        assert what in message


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchs_old_forms_are_refused_by_name(path):
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "it is a pickle, or of torch before 1.6" in refusal(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refusal(path)


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"a.npy": b"\x93NUMPY"}, "a zip archive, but not of torch.save"),
        ({"word/document.xml": b"<w/>", "docProps/app.xml": b""}, "a zip archive, but not of torch.save"),
        ({"last/code/x.py": b"import os", "last/data.pkl": b"\x80\x02}."}, "TorchScript"),
    ],
)
def test_other_archives_are_refused(tmp_path, members, what):
    rewrite(tmp_path / "file.pt", members)
    assert what in refusal(tmp_path / "file.pt")


def test_a_folder_and_a_fifo_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(FileNotFoundError, match=r"fifo\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "fifo.pt")
    with pytest.raises(FileNotFoundError, match="is a folder, expected a checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_cut_file_is_refused_by_name(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert "cannot be read as a checkpoint: it is cut short" in refusal(path)


def test_any_flipped_bit_is_found_or_harmless(path):
    """torch.load alone takes a flipped bit of a weight for the weight. In headers that nobody reads it may stay."""
    whole, expected = path.read_bytes(), load_checkpoint(path)
    refusals = []
    for position in range(0, len(whole), 41):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            refusals.append(str(error))
            continue
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found["network"][name]) for name, value in expected["network"].items())
        assert all(found[key] == expected[key] for key in ("config", "epoch", "training_data"))
    assert len(refusals) > 100
    assert all(message.startswith(f"{path}: ") for message in refusals)


# ---- Files that claim too much


def test_a_member_that_is_marked_as_a_folder_is_refused(path):
    """torch.load alone takes unset memory for its numbers."""
    content = path.read_bytes()
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(b"/data/0"))
    path.write_bytes(content[: entry + 38] + b"\x10" + content[entry + 39 :])
    assert "marked as encrypted or as a folder" in refusal(path)


def test_a_compressed_archive_is_refused(path):
    members = members_of(path)
    bomb = next(iter(members)).partition("/")[0] + "/data/99"
    rewrite(path, members | {bomb: bytes(10**6)}, zipfile.ZIP_DEFLATED)
    assert "compressed archive" in refusal(path)


def test_members_that_claim_more_than_the_file_are_refused(path):
    content = path.read_bytes()
    start = content.rfind(b"PK\x01\x02")
    claimed = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content[: start + 20] + claimed + content[start + 28 :])
    assert "claim more bytes than the file has" in refusal(path)


def test_a_long_pickle_and_a_long_list_of_members_are_refused(path, monkeypatch):
    monkeypatch.setattr(torch_file, "MOST_PICKLE_BYTES", 1000)
    assert "its data.pkl has" in refusal(path)
    monkeypatch.setattr(torch_file, "MOST_DIRECTORY_BYTES", 100)
    assert "list of members" in refusal(path)
    monkeypatch.setattr(torch_file, "MOST_GIB", 0)
    assert "expected 0 at most" in refusal(path)


def test_what_follows_the_archive_or_stands_in_it_twice_is_refused(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    assert "cut short, or damaged" in refusal(path)
    path.write_bytes(whole)
    members = members_of(path)
    rewrite(path, members)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(iter(members)), b"")
    assert "two members" in refusal(path)


def tensor_pickle(elements: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """The pickle of a tensor as torch.save writes it, with whatever numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if value == "the storage" else None

    class Tensor:
        def __reduce__(self):
            arguments = ("the storage", offset, shape, strides, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump({"tensor": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((1000, 0, (1000,), (1,)), "claims 1000 numbers of torch.float32, but has 4 bytes"),
        ((-1, 0, (1,), (1,)), "claims -1 numbers"),
        ((1, 0, (10**6, 10**6), (0, 0)), "does not fit its storage of 1 numbers"),
        ((1, 0, (2,), (0,)), "does not fit its storage"),
        ((1, 0, (-1,), (1,)), "does not fit its storage"),
        ((1, 10**9, (1,), (1,)), "does not fit its storage"),
        ((1, -1, (1,), (1,)), "does not fit its storage"),
    ],
)
def test_a_tensor_must_have_its_numbers(tmp_path, arguments, what):
    torch.save({"tensor": torch.ones(1)}, tmp_path / "file.pt")
    replace_pickle(tmp_path / "file.pt", tensor_pickle(*arguments))
    assert what in refusal(tmp_path / "file.pt")


def test_expanded_overlapping_and_shared_tensors_are_refused(path):
    content = torch.load(path, weights_only=True)
    name, weight = next(iter(content["network"].items()))
    for wrong in (
        torch.zeros(1).expand(weight.shape),
        torch.as_strided(torch.zeros(weight.numel()), weight.shape, [1] * weight.ndim),
        torch.zeros(weight.numel() + 7)[7:].view(weight.shape),
    ):
        torch.save(content | {"network": content["network"] | {name: wrong}}, path)
        assert "does not fit its storage" in refusal(path)
    torch.save(content | {"other": weight.view(-1)}, path)
    assert "share the storage" in refusal(path)


def test_a_pickle_cannot_take_memory(path):
    """All of these take gigabytes when torch.load(weights_only=True) gets them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = b"\x8a\x05" + (4 * 10**9).to_bytes(5, "little")
    for pickled in (
        b"\x80\x02cbuiltins\nbytearray\n" + size + b"\x85R.",
        b"\x80\x02ctorch\nFloatTensor\n" + size + b"\x85R.",
        b"\x80\x02ctorch\nFloatTensor\n" + size + b"\x85\x81.",
        b"\x80\x02X\xff\xff\xff\x7fshort.",
    ):
        replace_pickle(path, pickled)
        refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        ({"channels": 100000}, "describe a larger one"),
        ({"channels": 10**30}, "describe a larger one"),
        ({"down_convs": [10**9, 1]}, "describe a larger one"),
        ({"down_convs": [1] * 5000, "up_convs": [1] * 4999}, "describe a larger one"),
        ({"channels": 3}, "first.convs.0.weight is float32 of shape 2x1x5x5x5, expected float32 of shape 3x1x5x5x5"),
        ({"norm": "none"}, "bias is missing"),
        ({"up_convs": [1, 1]}, "up_convs: got 2 stages up for 2 down"),
        ({"organs": ["background", "liver"]}, "classify"),
        ({"size": [4096, 4096, 4096]}, "voxels at most"),
        ({"organs": ["background", "liver\n\x1b[2J"]}, "organs: got"),
        ({"organs": [["background"] * 10**4] * 3}, "organs: got"),
        ({"norm": "x" * 10**6}, "norm: got xxx"),
        ({"x" * 10**6: 1}, "unknown key xxx"),
        ({"window_hu": [float("nan"), 1.0]}, "window_hu: got"),
    ],
)
def test_settings_that_do_not_describe_the_network_are_refused(path, damage, what):
    content = torch.load(path, weights_only=True)
    content["config"] |= damage
    torch.save(content, path)
    assert what in refusal(path)


def test_weights_of_another_type_or_not_finite_are_refused(path):
    content = torch.load(path, weights_only=True)
    name, weight = next(iter(content["network"].items()))
    for wrong, what in (
        (weight.double(), "is float64 of shape"),
        (weight.half(), "is float16 of shape"),
        (torch.full_like(weight, float("nan")), f"network: {name} holds NaN"),
        (torch.where(weight == weight.max(), -torch.inf, weight), f"network: {name} holds NaN or infinite"),
        ("text", "no tensor"),
        ({}, "no tensor"),
    ):
        torch.save(content | {"network": content["network"] | {name: wrong}}, path)
        assert what in refusal(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"training_data": None},
        {"training_data": {}},
        {"training_data": TRAINING_DATA | {"percentiles": "abc"}},
        {"training_data": TRAINING_DATA | {"percentiles": [5, 95]}},
        {"training_data": TRAINING_DATA | {"extent_mm": {"min": [1.0, 2.0], "max": [1.0, 2.0]}}},
        {"training_data": TRAINING_DATA | {"extent_mm": {"min": [1.0, 2.0, float("nan")], "max": [1.0, 2.0, 3.0]}}},
        {"training_data": TRAINING_DATA | {"hu_percentiles": {"min": [1.0, 2.0, "3"], "max": [1.0, 2.0, 3.0]}}},
        {"epoch": -1},
        {"epoch": "3"},
        {"epoch": True},
        {"best_dice": float("nan")},
        {"best_dice": 7},
        {"cases": {"train": ["a"]}},
        {"cases": {"train": "a", "val": []}},
        {"cases": {"train": [1], "val": []}},
        {"scaler": {"scale": 1.0}},
        {"scaler": None},
    ],
)
def test_other_parts_are_checked(path, damage):
    content = torch.load(path, weights_only=True)
    torch.save(content | damage, path)
    assert f"its {next(iter(damage))} is not what train.py writes" in refusal(path)


def test_the_optimizers_state_is_checked(resumable):
    content = torch.load(resumable, weights_only=True)
    optimizer = content["optimizer"]
    (group,), states = optimizer["param_groups"], optimizer["state"]
    first = states[0]
    for wrong in (
        None,
        {},
        {"state": states},
        {"state": states, "param_groups": [group, group]},
        {"state": states, "param_groups": [group | {"maximize": True}]},
        {"state": states, "param_groups": [group | {"betas": (2, 2)}]},
        {"state": states, "param_groups": [group | {"params": group["params"][::-1]}]},
        {"state": states, "param_groups": [group | {"lr": "1"}]},
        {"state": {0: first}, "param_groups": [group]},
        {"state": states | {0: {}}, "param_groups": [group]},
        {"state": states | {0: first | {"exp_avg": torch.zeros(3)}}, "param_groups": [group]},
        {"state": states | {0: first | {"step": 1}}, "param_groups": [group]},
    ):
        torch.save(content | {"optimizer": wrong}, resumable)
        assert "its optimizer is not that of its network" in refusal(resumable)
    torch.save(
        content | {"optimizer": optimizer | {"state": states | {0: first | {"exp_avg": first["exp_avg_sq"]}}}},
        resumable,
    )
    assert "is the same tensor as another" in refusal(resumable)
    wrong = states | {0: first | {"exp_avg": torch.full_like(first["exp_avg"], torch.nan)}}
    torch.save(content | {"optimizer": {"state": wrong, "param_groups": [group]}}, resumable)
    assert "optimizer: exp_avg of parameter 0 holds NaN" in refusal(resumable)


def test_averaged_weights_are_checked(path):
    content = torch.load(path, weights_only=True)
    right = {name: value.clone() for name, value in content["network"].items() if "running" not in name}
    torch.save(content | {"average": right}, path)
    load_checkpoint(path)
    name = next(iter(right))
    for wrong in (None, {}, right | {name: torch.zeros(3)}, right | {"more": torch.zeros(3)}):
        torch.save(content | {"average": wrong}, path)
        assert "its average is not that of its network" in refusal(path)
    torch.save(content | {"average": right | {name: torch.full_like(right[name], torch.nan)}}, path)
    assert f"average: {name} holds NaN" in refusal(path)


def test_other_peoples_checkpoints_are_refused(tmp_path):
    for content in ({"state_dict": {}}, [1, 2], torch.ones(3), {"kind": ["V-Net checkpoint"]}):
        torch.save(content, tmp_path / "other.pt")
        assert "other.pt: is no checkpoint of this repository" in refusal(tmp_path / "other.pt")


def test_parts_that_are_missing_are_named(path):
    content = torch.load(path, weights_only=True)
    for damage, what in (
        ({"version": 99}, "is of version 99, expected 1"),
        ({"version": "9" * 10**6}, "is of version 999"),
        ({"config": 3}, "lacks its config"),
        ({"network": 3}, "lacks its network"),
    ):
        torch.save(content | damage, path)
        assert what in refusal(path)


# ---- Nothing that a file names is run


def test_code_in_a_checkpoint_is_not_run(path, tmp_path):
    marker = tmp_path / "it ran"

    class Harmful:
        def __init__(self, function, *arguments):
            self.call = (function, arguments)

        def __reduce__(self):
            return self.call

    content = torch.load(path, weights_only=True)
    for harmful in (
        Harmful(os.system, f"touch '{marker}'"),
        Harmful(eval, f"open({str(marker)!r}, 'w')"),
        Harmful(open, str(marker), "w"),
        Harmful(__import__, "antigravity"),
    ):
        torch.save(content | {"epoch": harmful}, path)
        message = refusal(path)
        assert "it asks for '" in message
        assert "which was not run" in message
    # And where it stands in place of the whole, as an older pickle, or in another member's place.
    path.write_bytes(pickle.dumps(Harmful(os.system, f"touch '{marker}'"), protocol=0))
    refusal(path)
    path.write_bytes(pickle.dumps(Harmful(os.system, f"touch '{marker}'")))
    refusal(path)
    assert not marker.exists()
    # That the marker would tell: the same pickle, loaded without care.
    pickle.loads(pickle.dumps(Harmful(os.system, f"touch '{marker}'")))
    assert marker.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cno.such.module\nthing\n.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02(S'echo'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02}\x81.",
        b"\x80\x02}}b.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x04\x00\x00\x00keysK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\n(lK\x01R.",
        b"\x80\x02h\x05.",
        b"\x80\x02u.",
        b"\x80\x02R.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02.",
        b"\x80\x02}",
        b"",
        b"\x80\x02(" * 1000 + b".",
        b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"\x80\x02X\x07\x00\x00\x00storageQ.",
        b"\x80\x02ccaf\xc3\xa9\nx\n.",
    ],
)
def test_odd_pickles_are_refused(path, pickled):
    replace_pickle(path, pickled)
    refusal(path)


# ---- Older files, and other networks


def test_checkpoint_from_before_a_setting_existed_is_read(path):
    content = torch.load(path, weights_only=True)
    del content["config"]["memory"]
    torch.save(content, path)
    assert load_checkpoint(path)["config"].memory == load_config().memory


def test_weights_do_not_go_into_another_network(path):
    wider = load_config(flags={"channels": "3", "down_convs": ["1", "1"], "up_convs": ["1"]})
    with pytest.raises(ValueError, match=r"last\.pt: its weights are another network's"):
        load_weights(build_network(wider), load_checkpoint(path), path)


@pytest.mark.parametrize("damage", [{"norm": "none!"}, {"size": [15, 16, 8]}])
def test_settings_in_a_checkpoint_are_checked(path, damage):
    content = torch.load(path, weights_only=True)
    content["config"] |= damage
    torch.save(content, path)
    with pytest.raises(ValueError, match=next(iter(damage))):
        load_network(path)
