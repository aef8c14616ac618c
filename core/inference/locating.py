"""Find the part of a scan that a network was trained on: with a second network where that is the organs' box."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from core.checkpoint import load_networks
from core.config import Config
from core.inference.networks import choose_inference_precision, predict_logits
from core.scans.annotated import annotated_classes
from core.scans.crop import Box, body_box, located_box, whole_box, windows_along_z
from core.scans.files import listed
from core.scans.geometry import Geometry
from core.scans.organ_words import same_name
from core.scans.resample import largest_class
from core.scans.volumes import prepare_image
from core.system.exits import print_warning


@dataclass(frozen=True)
class Locator:
    """Finds the box of a scan that a network's grid has to cover.

    Attributes:
        crop: the setting that the network was trained with: none, body or organs. The rest is for organs.
        network: a second network, which finds the organs on its own grid: (1, 1, X, Y, Z) to logits (1, K, X, Y, Z).
        config: the settings that it was trained with; its organs need not be those of the other network.
        device: where it runs.
        precision: the type that convolutions are computed in.
        wanted: (K,) bool, the classes of that network that the first one was taught; the others do not count.
        usual_mm: geometric mean of the shortest and the longest training extent along Z. A longer scan is searched in
            windows of that length.
    """

    crop: str = "none"
    network: nn.Module | None = None
    config: Config | None = None
    device: torch.device | None = None
    precision: torch.dtype = torch.float32
    wanted: np.ndarray | None = None
    usual_mm: float = math.inf

    @classmethod
    def load(cls, path: str | None, checkpoint: dict, device: torch.device, warn: bool = False) -> "Locator":
        """Return the locator for a network's `checkpoint`, with the network at `path` (--locate) if it takes one.

        The fingerprint in `checkpoint` becomes that of both networks. With `warn`, a warning names organs that the
        locator was not trained on, though the network was.

        Raises:
            FileNotFoundError, ValueError: when the file cannot be used, is missing, or would do nothing.
        """
        crop = checkpoint["config"].crop
        if crop != "organs":
            if path:
                raise ValueError(f"--locate: the network was trained with crop {crop}, which needs none; leave it out")
            return cls(crop)
        if not path:
            raise ValueError(
                "--locate: missing; the network was trained on the organs' box (crop: organs) and needs a second one "
                "that finds it, a checkpoint that was trained with crop none or body (docs/training.md)"
            )
        (network,), content = load_networks([path], device)
        config = content["config"]
        if config.crop == "organs":
            raise ValueError(
                f"{path}: was trained with crop organs, expected none or body to find the organs in a scan"
            )
        ours, theirs = (each["training_data"].get("organs") for each in (checkpoint, content))  # older ones: None
        taught = ours or checkpoint["config"].organs[1:]
        wanted = annotated_classes(taught, config.organs)
        if not wanted[1:].any():
            raise ValueError(f"{path}: knows none of the network's organs: {listed(taught)}")
        missed = [organ for organ in ours or () if theirs and not any(same_name(organ, other) for other in theirs)]
        if missed and warn:
            print_warning(f"{path}: was not trained on {', '.join(missed)}; the box that it finds may cut them")
        checkpoint["fingerprint"] += f"+{content['fingerprint']}"
        precision = choose_inference_precision("auto", config.precision, device)
        lengths = [content["training_data"]["extent_mm"][end][2] for end in ("min", "max")]
        return cls(crop, network, config, device, precision, wanted, math.sqrt(math.prod(lengths)))

    def find_box(self, voxels: np.ndarray, geometry: Geometry, warn: Callable[[str], None]) -> Box:
        """Return the box for a scan, (X, Y, Z) in HU; with crop organs and nothing found the body's, with a warning."""
        if self.crop == "none":
            return whole_box(voxels.shape)
        if self.crop == "body":
            return body_box(voxels)
        searched = Locator(self.config.crop).find_box(voxels, geometry, warn)
        most, found = 0, None
        for window in windows_along_z(searched, self.usual_mm / geometry.spacing_mm[2]):
            labels = self.labels_on_grid(voxels[window])
            if np.count_nonzero(labels) > most:
                most, found = np.count_nonzero(labels), located_box(labels, window, voxels.shape)
        if found is None:
            warn("the network of --locate found no organ, so the whole body is segmented; expect a poor prediction")
            return body_box(voxels)
        return found

    @torch.inference_mode()
    def labels_on_grid(self, voxels: np.ndarray) -> np.ndarray:
        """Return the labels, uint8, of `wanted` that the network finds in voxels (X, Y, Z) in HU, on its own grid."""
        image = prepare_image(voxels, self.config.size, self.config.window_hu)
        image = torch.from_numpy(image).to(self.device).float() / 255
        labels = largest_class(predict_logits(self.network, image[None, None], self.precision)[0])
        return labels * self.wanted[labels]
