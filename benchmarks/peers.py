"""The peer: MONAI's VNet and its transforms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measuring import installed_version
from core.config import Config
from core.training.device import autocast

NO_MONAI = "MONAI is not installed; pip install -r benchmarks/requirements.txt"


def monai_installed() -> bool:
    """Return True when MONAI is installed."""
    return installed_version("monai") is not None


def monai_notes() -> list[str]:
    """Return the note of a result without MONAI."""
    return [] if monai_installed() else [NO_MONAI]


def monai_vnet(classes: int) -> nn.Module:
    """MONAI's VNet as it comes: batch norm, ELU in place, dropout; (B, 1, X, Y, Z) -> (B, K, X, Y, Z).

    Raises:
        ImportError: when MONAI is not installed.
    """
    from monai.networks.nets import VNet  # takes seconds to import, and is an optional package

    return VNet(spatial_dims=3, in_channels=1, out_channels=classes)


class MonaiPipeline:
    """From a scan's file to a label map's file as one writes it with MONAI: dictionary transforms, and their inverse.

    Each stage takes a dictionary with the scan under "image" and, from `forward` on, what was predicted under "pred".

    Raises:
        ImportError: when MONAI is not installed.
    """

    def __init__(self, network: nn.Module, config: Config, device: torch.device, precision: torch.dtype, output: Path):
        from monai import transforms as monai  # takes seconds to import, and is an optional package

        self.network, self.device, self.precision, self.output = network, device, precision, output
        low, high = config.window_hu
        load = monai.LoadImaged("image", ensure_channel_first=True)
        orient = monai.Orientationd("image", axcodes="RAS", labels=None)
        window = monai.ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0, b_max=1, clip=True)
        resize = monai.Resized("image", spatial_size=config.size, mode="trilinear")
        self.read, self.resize = monai.Compose([load, orient]), monai.Compose([window, resize])
        self.before = monai.Compose([load, orient, window, resize])
        invert = monai.Invertd("pred", transform=self.before, orig_keys="image", nearest_interp=False, to_tensor=True)
        self.restore = monai.Compose([invert, monai.AsDiscreted("pred", argmax=True)])
        self.write = monai.SaveImaged(
            "pred", output_dir=output, output_postfix="", output_dtype=np.uint8, separate_folder=False, print_log=False
        )

    @torch.inference_mode()
    def forward(self, item: dict[str, Any]) -> dict[str, Any]:
        """Predict (K, X, Y, Z) from an image (1, X, Y, Z)."""
        with autocast(self.device, self.precision):
            item["pred"] = self.network(item["image"][None].to(self.device))[0].float()
        return item

    def run(self, scans: Sequence[Path]) -> None:
        """Segment scans, while a process of its own reads ahead."""
        from monai.data import DataLoader, Dataset, decollate_batch

        loader = DataLoader(Dataset([{"image": str(scan)} for scan in scans], self.before), num_workers=1)
        for batch in loader:
            for item in decollate_batch(batch):
                self.write(self.restore(self.forward(item)))
