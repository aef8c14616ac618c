"""Checkpoints: a network's weights with the settings it was trained under, written whole and checked when loaded.

A damaged, truncated or foreign file is refused in one sentence. torch.load(weights_only=True) runs no code in a file.
"""

import hashlib
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from core.config import Config, config_from_dict, config_to_dict
from core.network import build_network
from core.patches import InPatches
from core.scans.organ_words import same_name
from core.system.exits import print_warning
from core.system.files import check_room, whole_file

KIND, VERSION = "V-Net checkpoint", 1  # mark our files, whatever the network is
# What zipfile, torch.load and load_state_dict raise for content that they cannot use.
UNUSABLE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError,
)  # fmt: skip
# The first bytes of files that people take for checkpoints.
MAGICS = (
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file itself with git lfs pull"),
    (b"<", "it is a web page, perhaps the error page of a download"),
    (b"\x1f\x8b", "it is compressed with gzip; unpack it first"),
)
SHARED = ("size", "window_hu", "crop", "organs")  # settings that networks must share to be averaged
IS_FOLDER = 0x10  # a bit in a zip member's attributes; torch reads nothing of such a member and does not say so


def save_checkpoint(
    path: str | Path,
    network: nn.Module | Mapping[str, Tensor],
    config: Config,
    previous: str | Path | None = None,
    **state: Any,
) -> None:
    """Write weights, settings and `state` (plain values and tensors) to a new file, which then replaces `path`.

    The new file is read back first. If `previous` is given, the old file is kept under that name.

    Args:
        path: the file.
        network: the network, or its state dict.
        config: the settings that it was trained with.
        previous: the path that the old file is moved to.
        state: further entries of the file.

    Raises:
        OSError: when the file cannot be written or reads back differently; the old file is then unchanged.
    """
    weights = network if isinstance(network, Mapping) else network.state_dict()
    content = {"kind": KIND, "version": VERSION, "config": config_to_dict(config), "network": weights, **state}
    needed = sum(tensor.numel() * tensor.element_size() for _, tensor in named_tensors(content))
    check_room(Path(path).parent, needed, "a checkpoint")
    try:
        with whole_file(path) as temporary:
            torch.save(content, temporary)
            check_archive(temporary)
            if previous is not None and Path(path).exists():
                os.replace(path, previous)
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: reads otherwise than it was written ({error}); is the disk failing?") from error
    except RuntimeError as error:  # torch's error for a full disk
        raise OSError(f"{path}: cannot be written, is the disk full? ({str(error).splitlines()[0]})") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, with `config` as a Config; all tensors in it are finite and on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint of this repository, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, expected a checkpoint in it" if path.is_dir() else "no such checkpoint"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        with open(path, "rb") as file:
            content = read_content(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND or not {"config", "network"} <= content.keys():
        raise ValueError(f"{path}: is no checkpoint of this repository's train.py")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: is of version {content.get('version')}, expected {VERSION}")
    for name, tensor in named_tensors(content):
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers; take another checkpoint")
    # A checkpoint from before a setting existed lacks it; the setting's default is what was done then.
    return content | {"config": config_from_dict(content["config"], str(path))}


def read_content(file: BinaryIO) -> Any:
    """Return the content of an open file; a ValueError says what it is, without torch's advice to load it unsafely."""
    start = file.read(32)
    for magic, what in MAGICS:
        if start.startswith(magic):
            raise ValueError(what)
    try:
        check_archive(file)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # that a file of TorchScript is one
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds other things than tensors and plain values; nothing in it was run") from error
    except UNUSABLE as error:
        raise ValueError("it is empty, cut short, damaged or another kind of file; copy it once more") from error


def check_archive(file: Path | BinaryIO) -> None:
    """Compare every part of a file with its checksum, which torch.load skips; raise BadZipFile where one differs."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip() or any(member.external_attr & IS_FOLDER for member in archive.infolist())
    if damaged:
        raise zipfile.BadZipFile("its content differs from its checksums")


def named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in nested dicts and lists, with names such as network.classify.bias."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Load a checkpoint's network, in evaluation mode, and return it with the checkpoint's whole content.

    A network that was trained on patches is wrapped in `InPatches`, so it takes the whole grid too.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, and when it lacks the ranges of its training cases.
    """
    content = load_checkpoint(path)  # on the CPU: a card needs the weights alone, not what training goes on from
    if "training_data" not in content:
        raise ValueError(f"{path}: lacks training_data, which train.py writes")
    try:
        network = build_network(content["config"]).to(device)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_weights(network, with_ema_weights(content), path)
    if patch_size := content["config"].patch_size:
        network = InPatches(network, patch_size)
    return network.eval(), content


def load_networks(paths: Sequence[str], device: torch.device, warn: bool = False) -> tuple[list[nn.Module], dict]:
    """Load several networks; return them and the first one's content, with the ranges of all their cases.

    In this content, `training_data` lists the organs that every network was trained on; with `warn`, a warning names
    the others. `fingerprint` is a hash of all weights, 12 hexadecimal digits, for any order of the networks.

    Raises:
        FileNotFoundError, ValueError: when one cannot be read, does not go together with the first, or is given twice.
    """
    networks, contents = zip(*(load_network(path, device) for path in paths), strict=True)
    hashes = [hash_of(network) for network in networks]
    check_different(hashes, paths)
    first = contents[0]
    for path, content in zip(paths, contents, strict=True):
        for key in SHARED:
            ours, others = getattr(content["config"], key), getattr(first["config"], key)
            if ours != others:
                raise ValueError(f"{path}: its {key} is {ours}, that of {paths[0]} {others}; expected the same")
    merged = dict(first["training_data"])
    for name in ("extent_mm", "hu_percentiles"):
        ranges = [content["training_data"][name] for content in contents]
        merged[name] = {
            "min": np.min([each["min"] for each in ranges], axis=0).tolist(),
            "max": np.max([each["max"] for each in ranges], axis=0).tolist(),
        }
    if "organs" in merged:  # older checkpoints do not say it
        taught = [content["training_data"].get("organs", merged["organs"]) for content in contents]
        merged["organs"] = [organ for organ in merged["organs"] if all(organ in names for names in taught)]
        untaught = [organ for organ in first["config"].organs[1:] if organ not in merged["organs"]]
        if untaught and warn:
            names = ", ".join(untaught)
            print_warning(f"not every checkpoint was taught {names}: 0 mL in volumes.csv says nothing there")
    return list(networks), first | {"training_data": merged, "fingerprint": fingerprint_of(hashes)}


def check_different(hashes: Sequence[str], paths: Sequence[str]) -> None:
    """Raise a ValueError when two networks have the same weights: these would count twice, and agree in all."""
    seen: dict[str, str] = {}
    for weights, path in zip(hashes, paths, strict=True):
        if weights in seen:
            raise ValueError(f"{path}: has the weights of {seen[weights]}; expected different networks, leave one out")
        seen[weights] = path


def fingerprint_of(hashes: Sequence[str]) -> str:
    """Return the fingerprint of networks that are averaged, given their `hash_of`; the same for any order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()[:12]


def hash_of(network: nn.Module) -> str:
    """Return a hash of a network's weights."""
    found = hashlib.sha256()
    for name, weight in network.state_dict().items():
        found.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def load_weights(network: nn.Module, content: dict[str, Any], path: str | Path) -> None:
    """Load a checkpoint's weights into a network; those of another network are a ValueError."""
    check_same_shapes(content["network"], network.state_dict(), f"{path}: its weights are another network's")
    network.load_state_dict(content["network"])


def with_ema_weights(content: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's content with the EMA weights in place of the network's own, where it holds any."""
    return content | {"network": content["network"] | content.get("ema", {})}


def load_weights_for_organs(network: nn.Module, config: Config, content: dict[str, Any], warn: bool) -> str | None:
    """Load init_from's weights into a network that may segment other organs: then all but those of the last layer.

    The last layer is the last module of the network with a weight for every organ.

    Args:
        network: to load into.
        config: its settings.
        content: of the checkpoint, as `load_checkpoint` gives it.
        warn: whether to name inputs and a norm that the weights were not trained with.

    Returns:
        a sentence that says which weights were left out, or None.

    Raises:
        ValueError: when the other weights are another network's, or the organs are others and no such layer is there.
    """
    path, before, ours, theirs = config.init_from, content["config"], config.organs, content["config"].organs
    for key in ("norm", "window_hu", "crop") if warn else ():
        if getattr(before, key) != getattr(config, key):
            print_warning(f"{path}: was trained with {key} {getattr(before, key)}, this run has {getattr(config, key)}")
    layers = [name for name, module in network.named_modules() if has_a_weight_for_each(module, len(ours))]
    content = with_ema_weights(content)
    if len(ours) == len(theirs) and all(map(same_name, ours, theirs)):
        load_weights(network, content, path)
        return None
    if not layers:
        name = type(network).__name__
        raise ValueError(f"{path}: segments other organs, and no layer of the {name} has a weight for each of them")
    last = layers[-1]
    new = {f"{last}.{name}": value for name, value in network.get_submodule(last).state_dict().items()}
    load_weights(network, {"network": content["network"] | new}, path)
    return f"{path}: segments other organs ({', '.join(theirs[1:])}); all its weights are kept but those of {last}"


def has_a_weight_for_each(module: nn.Module, classes: int) -> bool:
    """Return True for a layer with a weight whose axis of outputs counts the classes."""
    axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    return any(weight.ndim > 1 and weight.shape[axis] == classes for weight in module.parameters(recurse=False))


def check_same_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str) -> None:
    """Raise a ValueError with `complaint` and the first tensor whose name or shape differs."""
    for name in [*expected, *found]:
        if name not in found or name not in expected:
            raise ValueError(f"{complaint} ({name} is {'missing' if name in expected else 'not part of it'})")
        got, wanted = list(found[name].shape), list(expected[name].shape)
        if got != wanted:
            raise ValueError(f"{complaint} ({name} is of shape {got}, expected {wanted})")


def load_optimizer(
    optimizer: torch.optim.Optimizer, checkpoint: dict[str, Any], path: str | Path, scaler: Any = None
) -> None:
    """Load the state of an optimizer and of a GradScaler; a state that does not fit is a ValueError."""
    complaint = f"{path}: its optimizer state does not fit the network"
    try:
        for saved, own in zip(checkpoint["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            saved["fused"] = own.get("fused")  # depends on this run's device and torch, not on the saved one's
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler and checkpoint["scaler"]:  # empty when the run so far was not in fp16
            scaler.load_state_dict(checkpoint["scaler"])
    except UNUSABLE as error:
        raise ValueError(f"{complaint} ({str(error).splitlines()[0]})") from error
    # load_state_dict compares no shapes.
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        moments = {name: value for name, value in state.items() if name in ("exp_avg", "exp_avg_sq", "momentum")}
        check_same_shapes(moments, dict.fromkeys(moments, parameter), f"{complaint}: parameter {i}")


def check_resumable(content: dict[str, Any], path: str | Path) -> None:
    """Raise a ValueError when a checkpoint lacks what training goes on from; best.pt does."""
    needed = ["optimizer", "scaler", "epoch", "cases"] + ["ema"] * (content["config"].ema_decay > 0)
    missing = [key for key in needed if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}, so that training cannot go on from it; take last.pt")
