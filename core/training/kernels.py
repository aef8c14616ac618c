"""GPU kernels, written in Triton, for the passes over memory of norm, residual and PReLU (core/training/activation.py).

A program computes one tile of one channel of one case: it loads each value once, computes in float32 (float64 where the
volume is), and stores each result once. Many programs share a channel: each stores its sums, which are then added up
in a fixed order. Triton comes with torch's builds for GPUs on Linux; without it the passes are computed in plain torch.
"""

from __future__ import annotations  # without Triton, tl.constexpr is a word

import math
import os
import subprocess
from collections.abc import Callable, Sequence
from functools import cache, wraps

import torch
from torch import Tensor

from core.system.exits import is_out_of_memory, one_line, print_warning

try:
    import triton
    from triton import language as tl
    from triton.errors import TritonError

    jit, MISSING = triton.jit, ""
except ImportError as error:
    triton = tl = None
    TritonError, MISSING = ImportError, one_line(error)

    def jit(kernel: Callable) -> Callable:
        """Leave a kernel as it is, which nothing calls without Triton."""
        return kernel


TRITON_VERSION = triton and triton.__version__
TILE = 4096  # voxels that a program computes
# What Triton raises where it cannot compile or start a kernel: it asserts that it finds libcuda, imports what it has
# compiled, and runs other programs.
FAILURES = (
    TritonError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, SystemError,
    TypeError, ValueError, subprocess.SubprocessError,
)  # fmt: skip
WARPS = 8  # of 32 threads that compute a tile
CHECKED = (2, 3, 17, 19, 29)  # shape of the volume that the kernels are tried on; its last tile is incomplete


# ---- Kernels: as activation.py says, in one pass ---------------------------------------------------------------------


@jit
def row_of(volume, batch_step, channel_step, channels):
    """Return the address of this program's channel; the second axis of the grid counts cases and channels."""
    row = tl.program_id(1).to(tl.int64)
    return volume + (row // channels) * batch_step + (row % channels) * channel_step


@jit
def moments_kernel(x, batch_step, channel_step, sums, channels, voxels, WIDE: tl.constexpr, TILE: tl.constexpr):
    """Store a tile's mean, and its sum of squared differences from this mean."""
    tile, row, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < voxels
    values = tl.load(row_of(x, batch_step, channel_step, channels) + at, inside, other=0).to(WIDE)
    mean = tl.sum(values, axis=0) / tl.minimum(voxels - tile * TILE, TILE)
    difference = tl.where(inside, values - mean, 0)
    tl.store(sums + row * tiles + tile, mean)
    tl.store(sums + (tl.num_programs(1) + row) * tiles + tile, tl.sum(difference * difference, axis=0))


@jit
def merge_kernel(sums, found, tiles, voxels, TILE: tl.constexpr, TILES: tl.constexpr):
    """Store a channel's mean and variance, given those of its tiles (Chan et al. 1983, eq. 2.1)."""
    row, rows = tl.program_id(1), tl.num_programs(1)
    tile = tl.arange(0, TILES)
    inside = tile < tiles
    means = tl.load(sums + row * tiles + tile, inside, other=0)
    squares = tl.load(sums + (rows + row) * tiles + tile, inside, other=0)
    counts = tl.where(inside, tl.minimum(voxels - tile * TILE, TILE), 0)
    mean = tl.sum(means * counts, axis=0) / voxels
    difference = means - mean
    tl.store(found + row, mean)
    tl.store(found + rows + row, tl.sum(squares + counts * difference * difference, axis=0) / voxels)


@jit
def write_activated_kernel(
    x, x_batch, x_channel, residual, residual_batch, residual_channel, into, into_batch, into_channel,
    stats, slope, channels, voxels, RESIDUAL: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store PReLU(x * scale + shift + residual)."""
    row, rows = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < voxels
    scale, shift = tl.load(stats + 2 * rows + row), tl.load(stats + 3 * rows + row)
    total = tl.load(row_of(x, x_batch, x_channel, channels) + at, inside, other=0).to(WIDE) * scale + shift
    if RESIDUAL:
        address = row_of(residual, residual_batch, residual_channel, channels) + at
        total += tl.load(address, inside, other=0).to(WIDE)
    result = tl.where(total > 0, total, total * tl.load(slope + row % channels))
    tl.store(row_of(into, into_batch, into_channel, channels) + at, result, inside)


@jit
def sums_backward_kernel(
    x, x_batch, x_channel, residual, residual_batch, residual_channel, gradient, gradient_batch, gradient_channel,
    stats, slope, sums, channels, voxels, RESIDUAL: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store a tile's sums of g, g * x and the slope's gradient; with a residual, g over the gradient."""
    tile, row, tiles, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    at = tile * TILE + tl.arange(0, TILE)
    inside = at < voxels
    scale, shift = tl.load(stats + 2 * rows + row), tl.load(stats + 3 * rows + row)
    own = tl.load(row_of(x, x_batch, x_channel, channels) + at, inside, other=0).to(WIDE)
    total = own * scale + shift
    if RESIDUAL:
        address = row_of(residual, residual_batch, residual_channel, channels) + at
        total += tl.load(address, inside, other=0).to(WIDE)
    address = row_of(gradient, gradient_batch, gradient_channel, channels) + at
    given = tl.load(address, inside, other=0).to(WIDE)
    g = tl.where(total > 0, given, given * tl.load(slope + row % channels))
    if RESIDUAL:
        tl.store(address, g, inside)
    tl.store(sums + row * tiles + tile, tl.sum(g, axis=0))
    tl.store(sums + (rows + row) * tiles + tile, tl.sum(g * own, axis=0))
    tl.store(sums + (2 * rows + row) * tiles + tile, tl.sum(tl.where(total > 0, 0, given * total), axis=0))


@jit
def input_backward_kernel(
    x, x_batch, x_channel, gradient, gradient_batch, gradient_channel,
    stats, slope, along, offset, channels, voxels, GIVEN: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store scale * g - along * x + offset over x; the gradient is g where it is GIVEN."""
    row, rows = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < voxels
    scale, shift = tl.load(stats + 2 * rows + row), tl.load(stats + 3 * rows + row)
    address = row_of(x, x_batch, x_channel, channels) + at
    own = tl.load(address, inside, other=0).to(WIDE)
    g = tl.load(row_of(gradient, gradient_batch, gradient_channel, channels) + at, inside, other=0).to(WIDE)
    if not GIVEN:
        g = tl.where(own * scale + shift > 0, g, g * tl.load(slope + row % channels))
    result = g * scale - own * tl.load(along + row) + tl.load(offset + row)
    tl.store(address, result, inside)


# ---- The operations of activation.py by these kernels ----------------------------------------------------------------


def moments(x: Tensor) -> Tensor:
    """Return mean and variance of each channel, (2, B, C)."""
    grid, voxels = grid_of(x), x[0, 0].numel()
    sums = x.new_empty(2, *x.shape[:2], grid[0], dtype=wide(x))
    found = x.new_empty(2, *x.shape[:2], dtype=wide(x))
    moments_kernel[grid](*steps(x), sums, x.shape[1], voxels, **sizes(x))
    blocks = {"TILES": triton.next_power_of_2(grid[0]), "num_warps": WARPS}
    merge_kernel[1, grid[1]](sums, found, grid[0], voxels, TILE=TILE, **blocks)
    return found


def write_activated(x: Tensor, stats: Tensor, slope: Tensor, residual: Tensor | None, into: Tensor) -> None:
    """Write PReLU(x * scale + shift + residual) `into` a tensor like `x`, or `x` itself."""
    other = x if residual is None else residual.expand_as(x)
    volumes = *steps(x), *steps(other), *steps(into)
    more = {"RESIDUAL": residual is not None, **sizes(x)}
    write_activated_kernel[grid_of(x)](*volumes, stats, slope, x.shape[1], x[0, 0].numel(), **more)


def sums_backward(x: Tensor, stats: Tensor, slope: Tensor, residual: Tensor | None, gradient: Tensor) -> Tensor:
    """Return the sums of g, g * x and the slope's gradient, (3, B, C); with a residual, overwrite `gradient` by g."""
    other, grid = x if residual is None else residual.expand_as(x), grid_of(x)
    sums = x.new_empty(3, *x.shape[:2], grid[0], dtype=wide(x))
    volumes = *steps(x), *steps(other), *steps(gradient)
    more = {"RESIDUAL": residual is not None, **sizes(x)}
    sums_backward_kernel[grid](*volumes, stats, slope, sums, x.shape[1], x[0, 0].numel(), **more)
    return sums.sum(dim=3)


def input_backward(
    x: Tensor, stats: Tensor, slope: Tensor | None, gradient: Tensor, along: Tensor, offset: Tensor
) -> None:
    """Overwrite `x` by scale * g - along * x + offset."""
    numbers = stats, stats if slope is None else slope, along.contiguous(), offset.contiguous()
    more = {"GIVEN": slope is None, **sizes(x)}
    input_backward_kernel[grid_of(x)](*steps(x), *steps(gradient), *numbers, x.shape[1], x[0, 0].numel(), **more)


def grid_of(x: Tensor) -> tuple[int, int]:
    """Return the programs that a volume takes: its tiles, and its cases times channels."""
    return triton.cdiv(x[0, 0].numel(), TILE), x.shape[0] * x.shape[1]


def steps(x: Tensor) -> tuple[Tensor, int, int]:
    """Return a volume and the distances in memory of its cases and of its channels."""
    return x, x.stride(0), x.stride(1)


def sizes(x: Tensor) -> dict[str, object]:
    """Return what a kernel is compiled for."""
    return {"WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32, "TILE": TILE, "num_warps": WARPS}


def wide(x: Tensor) -> torch.dtype:
    """Return the type to compute in: float32, or float64 where `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


# ---- Where they work -------------------------------------------------------------------------------------------------


PLAIN: dict[Callable, Callable] = {}  # what each operation above computes, in plain torch


def or_plain(kernel: Callable, plain: Callable) -> Callable:
    """Return a function that computes by `kernel` where it works, and by `plain` elsewhere."""
    PLAIN[kernel] = plain

    @wraps(plain)
    def compute(*tensors: Tensor | None) -> Tensor | None:
        volumes = [tensor for tensor in tensors if tensor is not None and tensor.ndim == 5]
        # Not where channels come last: a program computes voxels of one channel.
        in_rows = all(volume[0, 0].is_contiguous() for volume in volumes)
        return (kernel if in_rows and works(volumes[0].device, volumes[0].dtype) else plain)(*tensors)

    return compute


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True where the kernels compute what plain torch does; else print a warning. Waits for the device."""
    if triton is None:
        warn_once(MISSING)
        return False
    try:
        if is_right(device, dtype):
            return True
        warn_once("its kernels compute otherwise than plain torch")
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        warn_once(one_line(error))
    return False


@cache
def warn_once(reason: str) -> None:
    """Warn that the kernels are not used, in the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print_warning(f"norm and PReLU are computed without Triton, which takes more time ({reason})")


@torch.no_grad()
def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True when the kernels compute what plain torch does from a small volume."""
    near = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    pairs = zip(*(all_results(functions, device, dtype) for functions in zip(*PLAIN.items(), strict=True)), strict=True)
    return all(torch.allclose(found.double(), expected.double(), rtol=near, atol=near) for found, expected in pairs)


def all_results(functions: Sequence[Callable], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return all that the four operations compute from a small volume, without a residual and with one."""
    moments, write_activated, sums_backward, input_backward = functions
    wave = torch.linspace(0, 999, math.prod(CHECKED), dtype=torch.float64).sin().reshape(CHECKED)
    x, gradient, other = (wave.roll(voxels).to(device, dtype) for voxels in (0, 1000, 2000))
    slope = torch.tensor([0.1, 0.25, 1.5], device=device)
    stats = torch.linspace(0.5, 2, 4 * math.prod(CHECKED[:2]), dtype=wide(x), device=device).reshape(4, *CHECKED[:2])
    results = [moments(x)]
    for residual in (None, other, other[:, :1]):
        own, g, into = x.clone(), gradient.clone(), torch.empty_like(x)
        write_activated(x, stats, slope, residual, into)
        sums = sums_backward(x, stats, slope, residual, g)
        along, offset = sums[:2] / x[0, 0].numel()
        input_backward(own, stats, slope if residual is None else None, g, along, offset)
        results += [into, sums / x[0, 0].numel(), g, own]
    return results
