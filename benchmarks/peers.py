"""The peers: MONAI's VNet and its transforms, and the predecessor's network, rebuilt from its description."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        # Takes seconds to import, and is an optional package.
        from monai.transforms import (
            AsDiscreted,
            Compose,
            Invertd,
            LoadImaged,
            Orientationd,
            Resized,
            SaveImaged,
            ScaleIntensityRanged,
        )

        self.network, self.device, self.precision, self.output = network, device, precision, output
        low, high = config.window_hu
        load = LoadImaged("image", ensure_channel_first=True)
        orient = Orientationd("image", axcodes="RAS", labels=None)
        window = ScaleIntensityRanged("image", a_min=low, a_max=high, b_min=0, b_max=1, clip=True)
        resize = Resized("image", spatial_size=config.size, mode="trilinear")
        self.read, self.resize = Compose([load, orient]), Compose([window, resize])
        self.before = Compose([load, orient, window, resize])
        invert = Invertd("pred", transform=self.before, orig_keys="image", nearest_interp=False, to_tensor=True)
        self.restore = Compose([invert, AsDiscreted("pred", argmax=True)])
        self.write = SaveImaged(
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


class ResidualBlock(nn.Module):
    """Two 5x5x5 convolutions with batch norm and PReLU, added to their input."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(in_channels, channels, kernel_size=5, padding=2),
            nn.BatchNorm3d(channels),
            nn.PReLU(channels),
            nn.Conv3d(channels, channels, kernel_size=5, padding=2),
            nn.BatchNorm3d(channels),
        )
        self.match = nn.Conv3d(in_channels, channels, kernel_size=1) if in_channels != channels else nn.Identity()
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, X, Y, Z) -> (B, C, X, Y, Z)."""
        return self.activation(self.body(x) + self.match(x))


class Predecessor(nn.Module):
    """A reconstruction of the predecessor's network; its code is not here, only what is known of it.

    Known: a notebook's V-Net with four poolings and five up-convolutions, so that its output has twice the input's size
    along every axis, and four classes for ids up to 13. Assumed: 16 channels that double, residual blocks of two
    convolutions, one such block behind the fifth up-convolution. A step needs labels on the doubled grid, and none of
    them above 3: counting it is possible, training with it on the data never was.
    """

    CLASSES = 4
    GROWTH = 2  # voxels of the output per voxel of the input, along each axis

    def __init__(self, channels: int = 16):
        super().__init__()
        widths = [channels * 2**i for i in range(5)]  # 16, 32, 64, 128, 256
        self.first = ResidualBlock(1, channels)
        self.down_blocks = nn.ModuleList(ResidualBlock(c_in, c_out) for c_in, c_out in pairwise(widths))
        around = list(pairwise(reversed(widths)))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(c_in, c_out, kernel_size=2, stride=2) for c_in, c_out in around)
        self.up_blocks = nn.ModuleList(ResidualBlock(2 * c_out, c_out) for _, c_out in around)
        self.fifth_up = nn.ConvTranspose3d(channels, channels, kernel_size=2, stride=2)
        self.fifth_block = ResidualBlock(channels, channels)
        self.classify = nn.Conv3d(channels, self.CLASSES, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, 4, 2X, 2Y, 2Z)."""
        h = self.first(x)  # (B, C, X, Y, Z)
        skips = []
        for block in self.down_blocks:
            skips.append(h)
            h = block(F.max_pool3d(h, 2))  # (B, 2C, X/2, Y/2, Z/2), and so on to (B, 16C, X/16, Y/16, Z/16)
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            h = block(torch.cat([up(h), skips.pop()], dim=1))  # back to (B, C, X, Y, Z)
        return self.classify(self.fifth_block(self.fifth_up(h)))  # (B, 4, 2X, 2Y, 2Z)
