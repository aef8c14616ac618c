"""The networks that this one is compared with: MONAI's VNet, and the predecessor's rebuilt from its description."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import installed_version

NO_MONAI = "MONAI is not installed; pip install -r benchmarks/requirements.txt"


def monai_installed() -> bool:
    """Whether there is a MONAI to compare with."""
    return installed_version("monai") is not None


def monai_vnet(classes: int) -> nn.Module:
    """MONAI's VNet as it comes: batch norm, ELU in place, dropout; (B, 1, X, Y, Z) -> (B, K, X, Y, Z).

    Raises:
        ImportError: when MONAI is not installed.
    """
    from monai.networks.nets import VNet  # takes seconds to import, and is an optional package

    return VNet(spatial_dims=3, in_channels=1, out_channels=classes)


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
