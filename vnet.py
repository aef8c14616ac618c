"""V-Net, a fully convolutional network for segmenting volumes.

F. Milletari, N. Navab, S.-A. Ahmadi: V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
Segmentation, 3DV 2016, arXiv 1606.04797. The network below is figure 2 of the paper, seen from left to right and back:

    input  ─► stage 16 ────────────── skip ──────────────► stage 32 ─► 1x1x1 ─► logits
                 └► stage 32 ──────── skip ──────────► stage 64 ┘
                        └► stage 64 ── skip ────► stage 128 ┘
                              └► stage 128 ─► stage 256 ┘
                                     └► stage 256 ┘

Axes are (B, C, X, Y, Z) throughout: batch, channels and the three axes of the volume.

Where it differs from the paper: K classes instead of two, logits instead of probabilities, and a normalisation after
every convolution, which the paper (of 2016, trained on random 128x128x64 volumes) did without.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

NORMS = ("instance", "batch", "group", "none")
GROUPS = 8  # of channels that a group norm averages over; fewer where the channels are not divisible by it


def make_norm(norm: str, channels: int) -> nn.Module:
    """Make the normalisation after a convolution of `channels` channels; `norm` is one of NORMS.

    Instance norm is the default because volumes come one at a time (batch 1): a batch norm then trains on the
    statistics of single cases but predicts with their running average, which fits none of them.
    """
    if norm == "instance":
        return nn.InstanceNorm3d(channels, affine=True)
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")


class ResidualStage(nn.Module):
    """One stage of figure 2: 5x5x5 convolutions that learn what to add to the stage's input.

    The input may have one channel (the scan itself in the first stage): the sum then broadcasts it over the channels.
    """

    def __init__(self, in_channels: int, channels: int, convs: int, norm: str):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        # A bias before a normalisation would be subtracted again with the mean.
        self.convs = nn.ModuleList(
            nn.Conv3d(c_in, c_out, kernel_size=5, padding=2, bias=norm == "none") for c_in, c_out in pairwise(widths)
        )
        self.norms = nn.ModuleList(make_norm(norm, channels) for _ in range(convs))
        self.activations = nn.ModuleList(nn.PReLU(channels) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, X, Y, Z) -> (B, C, X, Y, Z)."""
        h = x
        last = len(self.convs) - 1
        for i, (conv, norm, activation) in enumerate(zip(self.convs, self.norms, self.activations, strict=True)):
            h = norm(conv(h))
            h = activation(h + x if i == last else h)
        return h


class Down(nn.Module):
    """Halves every axis by a strided 2x2x2 convolution, in place of pooling, and doubles the channels."""

    def __init__(self, in_channels: int, channels: int, norm: str):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, channels, kernel_size=2, stride=2, bias=norm == "none")
        self.norm = make_norm(norm, channels)
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, X, Y, Z) -> (B, C, X/2, Y/2, Z/2)."""
        return self.activation(self.norm(self.conv(x)))


class Up(nn.Module):
    """Doubles every axis by a transposed 2x2x2 convolution of stride 2."""

    def __init__(self, in_channels: int, channels: int, norm: str):
        super().__init__()
        self.conv = nn.ConvTranspose3d(in_channels, channels, kernel_size=2, stride=2, bias=norm == "none")
        self.norm = make_norm(norm, channels)
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
        return self.activation(self.norm(self.conv(x)))


class VNet(nn.Module):
    """The V-Net of figure 2, for any number of classes, channels and stages.

    Args:
        classes: K, the number of classes with background.
        channels: of the first stage; every stage down doubles them.
        down_convs: convolutions of the stages on the way down, the bottom one last.
        up_convs: convolutions of the stages on the way up: one stage fewer than down, since the bottom is shared.
        norm: "instance", "batch", "group" or "none".

    Raises:
        ValueError: when the settings do not make a V-Net.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 16,
        down_convs: Sequence[int] = (1, 2, 3, 3, 3),
        up_convs: Sequence[int] = (3, 3, 2, 1),
        norm: str = "instance",
    ):
        super().__init__()
        if len(up_convs) != len(down_convs) - 1:
            raise ValueError(
                f"up_convs: got {len(up_convs)} stages up for {len(down_convs)} down, "
                f"expected {len(down_convs) - 1}, so that the output has the input's size"
            )
        self.halvings = len(up_convs)
        widths = [channels * 2**i for i in range(len(down_convs))]  # 16, 32, 64, 128, 256
        self.first = ResidualStage(1, channels, down_convs[0], norm)
        self.downs = nn.ModuleList()
        self.down_stages = nn.ModuleList()
        for width, convs in zip(widths[1:], down_convs[1:], strict=True):
            self.downs.append(Down(width // 2, width, norm))
            self.down_stages.append(ResidualStage(width, width, convs, norm))
        self.ups = nn.ModuleList()
        self.up_stages = nn.ModuleList()
        below = widths[-1]
        for skip, convs in zip(widths[-2::-1], up_convs, strict=True):
            self.ups.append(Up(below, skip, norm))
            below = 2 * skip  # the skip's channels and as many from below: 256, 128, 64, 32
            self.up_stages.append(ResidualStage(below, below, convs, norm))
        self.classify = nn.Conv3d(below, classes, kernel_size=1)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> logits (B, K, X, Y, Z).

        Raises:
            ValueError: when the channels are not one, or the size cannot be halved often enough.
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"input of shape {tuple(x.shape)}, expected (B, 1, X, Y, Z): one channel of CT")
        check_size(x.shape[2:], self.halvings)
        h = self.first(x)  # (B, C, X, Y, Z)
        skips = []
        for down, stage in zip(self.downs, self.down_stages, strict=True):
            skips.append(h)
            h = stage(down(h))  # (B, 2C, X/2, Y/2, Z/2), and so on to (B, 16C, X/16, Y/16, Z/16)
        for up, stage in zip(self.ups, self.up_stages, strict=True):
            h = stage(torch.cat([up(h), skips.pop()], dim=1))  # (B, 16C, X/8, Y/8, Z/8) and back to (B, 2C, X, Y, Z)
        return self.classify(h)  # (B, K, X, Y, Z)


def initialise(module: nn.Module) -> None:
    """He initialisation of one convolution for the PReLU behind it (He et al. 2015, arXiv 1502.01852, eq. 15)."""
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        fan = "fan_out" if isinstance(module, nn.ConvTranspose3d) else "fan_in"
        nn.init.kaiming_normal_(module.weight, a=0.25, mode=fan)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_size(size: Sequence[int], halvings: int, name: str = "size") -> None:
    """Check that a volume of `size` (X, Y, Z) voxels can be halved `halvings` times, with two voxels left at least.

    Raises:
        ValueError: naming the size, as `name`, and the nearest one that works.
    """
    step = 2**halvings
    if any(n < 1 or n % step for n in size):
        nearest = " ".join(str(max(1, round(n / step)) * step) for n in size)
        raise ValueError(
            f"{name}: got {' '.join(map(str, size))}, expected multiples of {step}, because the network halves every "
            f"axis {halvings} times; the nearest is {nearest}"
        )
    if math.prod(n // step for n in size) < 2:
        raise ValueError(
            f"{name}: got {' '.join(map(str, size))}, which leaves a single voxel at the bottom of the network, "
            f"where nothing can be normalised; expected at least {2 * step} along one axis"
        )
