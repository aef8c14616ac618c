"""Find the part of a scan that a network was trained on: with a second network where that is the organs' box."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from core.checkpoint import load_networks
from core.config import Config
from core.inference.networks import choose_inference_precision, predict_logits
from core.scans.crop import Box, body_box, located_box, whole_box
from core.scans.resample import largest_class
from core.scans.volumes import prepare_image
from core.system.exits import print_warning


@dataclass(frozen=True)
class Locator:
    """A network that finds the organs in a whole scan or body, so that another one can look closer.

    Attributes:
        network: maps (1, 1, X, Y, Z) to logits (1, K, X, Y, Z), on `device`.
        config: the settings that it was trained with; its organs need not be those of the other network.
        device: where it runs.
        precision: the type that convolutions are computed in.
    """

    network: nn.Module
    config: Config
    device: torch.device
    precision: torch.dtype


def load_locator(path: str | None, checkpoint: dict, device: torch.device) -> Locator | None:
    """Load the checkpoint that --locate names; None where the crop of the other network's `checkpoint` needs none.

    The fingerprint in `checkpoint` becomes that of both networks.

    Raises:
        FileNotFoundError, ValueError: when it cannot be used, is missing, or would do nothing.
    """
    crop = checkpoint["config"].crop
    if crop != "organs":
        if path:
            raise ValueError(f"--locate: the network was trained with crop {crop}, which needs none; leave it out")
        return None
    if not path:
        raise ValueError(
            "--locate: missing; the network was trained on the organs' box (crop: organs) and needs a second one that "
            "finds it, a checkpoint that was trained with crop none or body (docs/training.md)"
        )
    (network,), content = load_networks([path], device)
    config = content["config"]
    if config.crop == "organs":
        raise ValueError(f"{path}: was trained with crop organs, expected none or body to find the organs in a scan")
    precision = choose_inference_precision("auto", config.precision, device)
    checkpoint["fingerprint"] += f"+{content['fingerprint']}"
    return Locator(network, config, device, precision)


def find_box(
    voxels: np.ndarray, crop: str, locator: Locator | None, warn: Callable[[str], None] = print_warning
) -> Box:
    """Return the box of a scan, (X, Y, Z) in HU, that the network's grid has to cover.

    With crop organs and nothing found it is the body's, with a warning.
    """
    if crop == "none":
        return whole_box(voxels.shape)
    if crop == "body":
        return body_box(voxels)
    searched = find_box(voxels, locator.config.crop, None)
    found = located_box(predict_on_grid(voxels[searched], locator), searched, voxels.shape)
    if found is None:
        warn("the network of --locate found no organ, so that the whole body is segmented; expect a poor prediction")
        return body_box(voxels)
    return found


@torch.inference_mode()
def predict_on_grid(voxels: np.ndarray, locator: Locator) -> np.ndarray:
    """Return the labels, uint8, that the locator finds in voxels (X, Y, Z) in HU, on its own grid."""
    image = prepare_image(voxels, locator.config.size, locator.config.window_hu)
    image = torch.from_numpy(image).to(locator.device).float() / 255
    return largest_class(predict_logits(locator.network, image[None, None], locator.precision)[0])
