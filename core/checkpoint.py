"""Checkpoints: a network with the settings it was trained under, saved whole and loaded with care.

A checkpoint may come from a stranger. What it holds is described first (core/torch_file.py) and compared with the
network that its settings describe, which takes no memory; only then is it loaded, by torch.load(weights_only=True).
"""

import math
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import Config, config_from_dict, config_to_dict, load_config
from core.system.files import check_room, whole_file
from core.torch_file import TensorForm, describe
from vnet import VNet, check_size

KIND = "V-Net checkpoint"  # tells our files from any other that torch can load
VERSION = 1
# What torch.load raises on files that it cannot load.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error,
    OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, ImportError,
)  # fmt: skip
# A network's grid of more voxels is a mistake or an attack: 16 channels of it as float32 take 64 GiB.
MOST_VOXELS = 2**30
MOST_EPOCHS = 10**9
SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


def build_network(config: Config) -> VNet:
    """The network that the settings describe, with fresh weights.

    Raises:
        ValueError: when the settings do not make a network, or their size does not fit it.
    """
    network = VNet(len(config.organs), config.channels, config.down_convs, config.up_convs, config.norm)
    check_size(config.size, network.halvings)
    return network


def save_checkpoint(
    path: str | Path, network: VNet, config: Config, previous: str | Path | None = None, **state: Any
) -> None:
    """Write the network, its settings and whatever `state` there is (plain values and tensors), whole.

    The new file is read back before it takes the old one's place; the old one becomes `previous` where that is given.

    Raises:
        OSError: when it cannot be written, or reads otherwise than it was written; then the old one is as it was.
    """
    content = {"kind": KIND, "version": VERSION, "config": config_to_dict(config), "network": network.state_dict()}
    content |= state
    # Not less than what is needed: without room nothing is begun.
    check_room(Path(path).parent, sum(x.numel() * x.element_size() for x in all_tensors(content)), "a checkpoint")
    try:
        with whole_file(path) as temporary:
            torch.save(content, temporary)
            check_readable(temporary)
            if previous is not None and Path(path).exists():
                os.replace(path, previous)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path}: cannot be written, is the disk full? ({str(error).splitlines()[0]})") from error


def all_tensors(content: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from all_tensors(value)


def check_readable(path: Path) -> None:
    """Read a checkpoint to its end and compare every part with its checksum.

    Raises:
        OSError: when one differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise OSError(f"{path}: reads otherwise than it was written ({error}); is the disk failing?") from error
    if damaged:
        raise OSError(f"{path}: {damaged} in it reads otherwise than it was written; is the disk failing?")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; `config` is a Config again.

    Every part that is there is what train.py writes: `network` has exactly the tensors of the settings' network, and so
    has `optimizer`; `training_data`, `cases`, `epoch` and `best_dice` have their types. All numbers are finite.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint of this repository, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, expected a checkpoint in it" if path.is_dir() else "no such checkpoint"
        raise FileNotFoundError(f"{path}: {what}")
    with open(path, "rb") as file:
        try:
            form = describe(file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as a checkpoint: {error}") from error
        config = check_form(form, path)
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except UNREADABLE as error:
            # Not torch's own words, which advise to run whatever code the file holds.
            raise ValueError(f"{path}: cannot be read as a checkpoint: it is damaged") from error
    check_numbers(content, path)
    return content | {"config": config, "network": dict(content["network"])}


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[VNet, dict[str, Any]]:
    """The network of a checkpoint, ready to predict, and the checkpoint's whole content.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, and when it lacks what its training cases were like.
    """
    content = load_checkpoint(path, device)
    if "training_data" not in content:
        raise ValueError(f"{path}: lacks training_data, which train.py writes")
    network = build_network(content["config"]).to(device)
    load_weights(network, content, path)
    return network.eval(), content


def load_weights(network: VNet, content: dict[str, Any], path: str | Path) -> None:
    """Put a checkpoint's weights into a network.

    Raises:
        ValueError: when they are another network's.
    """
    try:
        network.load_state_dict(content["network"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"{path}: its weights are another network's ({str(error).splitlines()[-1].strip()})"
        ) from error


# ---- What a checkpoint must be, before and after it is loaded --------------------------------------------------------


def check_form(form: Any, path: Path) -> Config:
    """Check the description of a checkpoint, and give its settings.

    Raises:
        ValueError: naming the file and the part that is wrong.
    """
    if not isinstance(form, dict) or form.get("kind") != KIND:
        raise ValueError(f"{path}: is no checkpoint of this repository's train.py")
    if form.get("version") != VERSION:
        raise ValueError(f"{path}: is of version {str(form.get('version'))[:40]}, expected {VERSION}")
    settings = form.get("config")
    if not isinstance(settings, dict) or not isinstance(form.get("network"), dict):
        raise ValueError(f"{path}: lacks its {'network' if isinstance(settings, dict) else 'config'}")
    # A checkpoint from before a setting existed lacks it; what config.yaml says is what was done then.
    config = config_from_dict(config_to_dict(load_config()) | settings, str(path))
    if math.prod(config.size) > MOST_VOXELS:
        raise ValueError(f"{path}: size: got {list(config.size)}, expected {MOST_VOXELS} voxels at most")
    network = network_form(config, form["network"], path)
    if "average" in form:
        check_average(form["average"], network, path)
    if "optimizer" in form:
        check_optimizer(form["optimizer"], network, path)
    checks = {
        "scaler": is_scaler_state,
        "training_data": is_training_data,
        "cases": is_case_lists,
        "epoch": lambda value: type(value) is int and 0 <= value <= MOST_EPOCHS,
        "losses": is_row,
        "best_dice": lambda value: is_number(value) and -1 <= value <= 1,
    }
    for key, is_right in checks.items():
        if key in form and not is_right(form[key]):
            raise ValueError(f"{path}: its {key} is not what train.py writes; it is damaged, or was tampered with")
    return config


def network_form(config: Config, found: dict, path: Path) -> VNet:
    """The network that the settings describe, without memory for its weights, after comparing it with those found.

    Raises:
        ValueError: when a tensor is missing, too many, or of another shape or type.
    """
    other = f"{path}: its weights are another network's"
    convolutions, widest = sum(config.down_convs) + sum(config.up_convs), config.channels << len(config.down_convs)
    tensors = [form for form in found.values() if isinstance(form, TensorForm)]
    # Even a network without weights takes time and memory for its layers.
    if convolutions > len(found) or widest > sum(math.prod(form.shape) for form in tensors):
        raise ValueError(f"{other} (its settings describe a larger one)")
    try:
        with torch.device("meta"):
            network = VNet(len(config.organs), config.channels, config.down_convs, config.up_convs, config.norm)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = {name: TensorForm(value.dtype, tuple(value.shape)) for name, value in network.state_dict().items()}
    for name in expected | found:
        if name not in expected or name not in found:
            what = "is missing" if name in expected else "is not part of it"
            raise ValueError(f"{other} ({str(name)[:80]} {what})")
        if found[name] != expected[name]:
            raise ValueError(f"{other} ({name} is {in_words(found[name])}, expected {in_words(expected[name])})")
    return network


def check_average(found: Any, network: VNet, path: Path) -> None:
    """Check that averaged weights are those of this network.

    Raises:
        ValueError: when they are not.
    """
    expected = {name: TensorForm(value.dtype, tuple(value.shape)) for name, value in network.named_parameters()}
    if found != expected:
        raise ValueError(f"{path}: its average is not that of its network; it is damaged, or was tampered with")


def check_optimizer(found: Any, network: VNet, path: Path) -> None:
    """Check that an optimiser's state is that of Adam for this network.

    Raises:
        ValueError: naming what is wrong.
    """
    parameters = list(network.parameters())
    wrong = ValueError(f"{path}: its optimizer is not that of its network; it is damaged, or was tampered with")
    (usual,) = torch.optim.Adam(parameters).state_dict()["param_groups"]
    groups = found.get("param_groups") if isinstance(found, dict) else None
    if not (isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)):
        raise wrong
    (group,) = groups
    # The rate is set anew for each step, and how the step is computed is the device's business.
    settings = {key: usual[key] for key in usual.keys() & group.keys() - {"lr", "fused", "foreach"}}
    if any(type(group[key]) is not type(value) or group[key] != value for key, value in settings.items()):
        raise wrong
    if "params" not in settings or not is_number(group.get("lr")):
        raise wrong
    states = found.get("state")
    if not isinstance(states, dict) or (states and states.keys() != set(range(len(parameters)))):
        raise wrong
    for i, state in states.items():
        form = TensorForm(parameters[i].dtype, tuple(parameters[i].shape))
        if state != {"step": TensorForm(torch.float32, ()), "exp_avg": form, "exp_avg_sq": form}:
            raise wrong


def check_resumable(content: dict[str, Any], path: str | Path) -> None:
    """Check that a checkpoint holds all that training goes on from.

    Raises:
        ValueError: naming what is missing; best.pt holds no optimiser.
    """
    needed = ["optimizer", "scaler", "epoch", "cases"] + ["average"] * (content["config"].ema_decay > 0)
    missing = [key for key in needed if key not in content]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}, so that training cannot go on from it; take last.pt")


def check_numbers(content: dict[str, Any], path: Path) -> None:
    """Check that no number of a loaded checkpoint is NaN or infinite, and that no two tensors are one.

    Raises:
        ValueError: naming the first tensor that is wrong.
    """
    seen = set()
    for name, tensor in tensors_in(content):
        if tensor.data_ptr() in seen:
            raise ValueError(f"{path}: {name} is the same tensor as another; it is damaged, or was tampered with")
        seen.add(tensor.data_ptr())
        if tensor.is_floating_point() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise ValueError(f"{path}: {name} holds NaN or infinite numbers; take another checkpoint")


def tensors_in(content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint's network and optimiser, with names for messages."""
    for part in ("network", "average"):
        yield from ((f"{part}: {name}", tensor) for name, tensor in content.get(part, {}).items())
    for i, state in content.get("optimizer", {"state": {}})["state"].items():
        yield from ((f"optimizer: {name} of parameter {i}", tensor) for name, tensor in state.items())


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def is_row(values: Any, length: int | None = None) -> bool:
    """Whether a value is a list of numbers, of that length if one is given."""
    return isinstance(values, list) and length in (None, len(values)) and all(map(is_number, values))


def is_scaler_state(state: Any) -> bool:
    """Whether a value is the state of a GradScaler; without mixed precision it is empty."""
    return isinstance(state, dict) and (
        not state or (state.keys() == SCALER_KEYS and all(map(is_number, state.values())) and state["scale"] > 0)
    )


def is_training_data(data: Any) -> bool:
    """Whether a value says what infer.py compares scans with: ranges of the extents and of the HU percentiles."""
    if not isinstance(data, dict) or not is_row(data.get("percentiles")):
        return False
    for name, length in (("extent_mm", 3), ("hu_percentiles", len(data["percentiles"]))):
        ranges = data.get(name)
        if not isinstance(ranges, dict) or not all(is_row(ranges.get(end), length) for end in ("min", "max")):
            return False
    return True


def is_case_lists(cases: Any) -> bool:
    """Whether a value lists the cases trained on and held out."""
    return isinstance(cases, dict) and all(
        isinstance(cases.get(part), list) and all(isinstance(case, str) for case in cases[part])
        for part in ("train", "val")
    )


def in_words(form: Any) -> str:
    """A tensor's shape and type for messages."""
    if not isinstance(form, TensorForm):
        return "no tensor"
    return f"{str(form.dtype).removeprefix('torch.')} of shape {'x'.join(map(str, form.shape)) or '()'}"[:80]


SHARED = ("size", "window_hu", "organs")  # settings that networks must share to be averaged


def load_networks(paths: Sequence[str], device: torch.device) -> tuple[list[VNet], dict]:
    """The networks of checkpoints, and what the first checkpoint says, the ranges of training cases those of all.

    Raises:
        FileNotFoundError, ValueError: when one cannot be read, or does not go together with the first.
    """
    networks, contents = zip(*(load_network(path, device) for path in paths), strict=True)
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
    return list(networks), first | {"training_data": merged}
