"""Checkpoints: a network with the settings it was trained under, saved whole and loaded with care."""

import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import Config, config_from_dict, config_to_dict, load_config
from core.files import check_room, whole_file
from vnet import VNet, check_size

KIND = "V-Net checkpoint"  # tells our files from any other that torch can load
VERSION = 1
# What torch.load raises on files that are cut, empty or something else altogether.
UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error,
    OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, ImportError,
)  # fmt: skip


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
    check_room(Path(path).parent, sum(x.numel() * x.element_size() for x in tensors_in(content)), "a checkpoint")
    try:
        with whole_file(path) as temporary:
            torch.save(content, temporary)
            check_readable(temporary)
            if previous is not None and Path(path).exists():
                os.replace(path, previous)
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(f"{path}: cannot be written, is the disk full? ({str(error).splitlines()[0]})") from error


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(value)


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

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no checkpoint of this repository.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        # Not torch's own words, which advise to run whatever code the file holds.
        raise ValueError(f"{path}: cannot be read as a checkpoint; it is damaged, or another kind of file") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path}: is no checkpoint of this repository's train.py")
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: is of version {content.get('version')}, expected {VERSION}")
    # A checkpoint from before a setting existed lacks it; what config.yaml says is what was done then.
    settings = content.get("config") if isinstance(content.get("config"), dict) else {}
    content["config"] = config_from_dict(config_to_dict(load_config()) | settings, str(path))
    return content


def load_network(path: str | Path, device: torch.device | str = "cpu") -> tuple[VNet, dict[str, Any]]:
    """The network of a checkpoint, ready to predict, and the checkpoint's whole content.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint`, and when the weights do not fit the settings.
    """
    content = load_checkpoint(path, device)
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
