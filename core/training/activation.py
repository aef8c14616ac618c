"""Norm, residual and PReLU of V-Net as one operation with its own backward pass, in few passes over memory.

A norm standardises channels, by statistics of each channel alone (instance), of all cases (batch) or of neighbouring
channels (group), then scales and shifts them. So it is x * scale + shift, with numbers for each case and channel. These
are computed once, in float32; volumes are read and written in their own type.

Each pass over a volume is an operation of torch. On a GPU it is a kernel (core/training/kernels.py), which reads each
value once and writes each result once. Elsewhere it is plain torch, in pieces that stay in a processor's cache.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.training import kernels
from core.training.kernels import wide

PIECE_VOXELS = 2**18  # that a processor's core computes at a time: 1 MiB in float32, which its cache holds
GPU_PIECE_VOXELS = 2**24  # of a GPU without kernels: temporaries of 64 MiB in float32
VOLUME = (2, 3, 4)  # axes of (B, C, X, Y, Z)


# ---- Norm, residual and PReLU, forward and backward ------------------------------------------------------------------


def statistics(norm: nn.Module, x: Tensor) -> Tensor:
    """Return mean, 1 / standard deviation, scale and shift of a norm, (4, B, C): norm(x) = x * scale + shift.

    In float32, or float64 where `x` is. Updates the running statistics of a batch norm in training.
    """
    if isinstance(norm, nn.Identity):
        zeros = x.new_zeros(x.shape[:2], dtype=wide(x))
        return torch.stack([zeros, zeros + 1, zeros + 1, zeros])
    if isinstance(norm, nn.BatchNorm3d) and not norm.training:
        mean, variance = (noted.expand(x.shape[:2]) for noted in (norm.running_mean, norm.running_var))
    else:
        mean, variance = moments(x)
        if not isinstance(norm, nn.InstanceNorm3d):
            # Variance over several channels or cases: mean of their variances plus variance of their means.
            own, mean = mean, shared_mean(norm, mean)
            variance = shared_mean(norm, variance + (own - mean).square())
        if isinstance(norm, nn.BatchNorm3d):
            update_running_statistics(norm, mean[0], variance[0], x.numel() // x.shape[1])
    factor = (variance + norm.eps).rsqrt()
    scale = factor * norm.weight
    return torch.stack([mean, factor, scale, torch.addcmul(norm.bias, mean, scale, value=-1)])


def shared_mean(norm: nn.Module, values: Tensor) -> Tensor:
    """Average (B, C) values over the cases and channels that share statistics; return the means as (B, C)."""
    if isinstance(norm, nn.BatchNorm3d):
        return values.mean(dim=0, keepdim=True).expand_as(values)
    if isinstance(norm, nn.GroupNorm):
        groups = values.view(len(values), norm.num_groups, -1)
        return groups.mean(dim=2, keepdim=True).expand_as(groups).reshape(values.shape)
    return values


def update_running_statistics(norm: nn.BatchNorm3d, mean: Tensor, variance: Tensor, voxels: int) -> None:
    """Move the running statistics of a batch norm towards those of a batch with so many voxels a channel."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((variance * (voxels / (voxels - 1))).to(norm.running_var.dtype), norm.momentum)


def activate(prelu: nn.PReLU, x: Tensor, stats: Tensor, residual: Tensor | None = None, *, into: Tensor) -> Tensor:
    """Write PReLU(norm(x) + residual) `into` a tensor like `x`, or `x` itself, and return it.

    Args:
        prelu: of a layer.
        x: (B, C, X, Y, Z), the output of its convolution.
        stats: the `statistics` of its norm and `x`.
        residual: like `x`, or with one channel, or None.
        into: overwritten.
    """
    write_activated(x, stats, slope_of(prelu, x), residual, into)
    return into


def slope_of(prelu: nn.PReLU, x: Tensor) -> Tensor:
    """Return a slope for each channel, (C,); some PReLUs have one for all."""
    return prelu.weight.expand(x.shape[1]).contiguous()


def activate_backward(
    norm: nn.Module, prelu: nn.PReLU, x: Tensor, stats: Tensor, residual: Tensor | None, gradient: Tensor
) -> list[Tensor]:
    """Return the gradients of the norm's and the PReLU's parameters, given that of the result.

    Overwrites `x` by its own gradient and, where there is a residual, `gradient` by that of the residual. The other
    arguments are those of `activate`.

    The gradient of `x` is scale * g - along * x + offset, with g the gradient of the PReLU's input: what would change
    only mean or variance is taken out.
    """
    slope = slope_of(prelu, x)
    sums, products, slopes = sums_backward(x, stats, slope, residual, gradient)
    grad_slope = slopes.sum(dim=0).to(slope.dtype)
    slope = slope if residual is None else None
    if isinstance(norm, nn.Identity):
        input_backward(x, stats, slope, gradient, torch.zeros_like(sums), torch.zeros_like(sums))
        return [grad_slope]
    mean, factor = stats[0], stats[1]
    grad_weights = factor * (products - mean * sums)  # the sums of g * standardised x
    voxels = x[0, 0].numel()
    along = factor.square() * shared_mean(norm, norm.weight * grad_weights) / voxels
    level = factor * shared_mean(norm, norm.weight * sums) / voxels
    input_backward(x, stats, slope, gradient, along, along * mean - level)
    return [grad_weights.sum(dim=0).to(norm.weight.dtype), sums.sum(dim=0).to(norm.bias.dtype), grad_slope]


# ---- Passes over a volume --------------------------------------------------------------------------------------------


LIBRARY = torch.library.Library("vnet", "DEF")  # not custom_op, whose first call imports torch's compiler, a second


def one_pass(schema: str, result: Callable[..., Tensor | None]) -> Callable:
    """Make an operation of torch of a function: on a GPU, the kernel of the same name computes it where that works.

    Args:
        schema: the types of its arguments and of its result, as torch.library writes them.
        result: makes a tensor without values like the function's result, from the same arguments.
    """

    def make(plain: Callable) -> Callable:
        name = plain.__name__
        LIBRARY.define(f"{name}{schema}")
        LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        LIBRARY.impl(name, kernels.or_plain(getattr(kernels, name), plain), "CUDA")
        torch.library.register_fake(f"vnet::{name}", result, lib=LIBRARY)
        return getattr(torch.ops.vnet, name).default

    return make


@one_pass("(Tensor x) -> Tensor", lambda x: x.new_empty(2, *x.shape[:2], dtype=wide(x)))
def moments(x: Tensor) -> Tensor:
    """Return mean and variance of each channel of a volume, (2, B, C), in float32 or float64.

    torch.var_mean would round both to the type of `x`.
    """
    if x.device.type == "cpu":
        # By planes, which keeps sums short and is several times faster than torch.var_mean.
        planes = x.contiguous().flatten(0, 2)[None]
        unused = torch.zeros(planes.shape[1], dtype=wide(x))
        found = torch.ops.aten.batch_norm_update_stats(planes, unused, unused.clone(), 0.0)
        means, variances = (each.view(x.shape[:3]) for each in found)
        mean = means.mean(dim=2)
        return torch.stack([mean, variances.mean(dim=2) + (means - mean[..., None]).square().mean(dim=2)])
    return moments_by_sums(x)


def moments_by_sums(x: Tensor) -> Tensor:
    """Return the same as `moments`, on a GPU without kernels."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        variance, mean = torch.var_mean(x, dim=VOLUME, correction=0)
        return torch.stack([mean, variance])
    # The difference of float32 sums loses less than the rounding of `x` has lost.
    voxels = x[0, 0].numel()
    mean = x.sum(dim=VOLUME, dtype=torch.float32) / voxels
    square = torch.linalg.vector_norm(x, dim=VOLUME, dtype=torch.float32).square() / voxels
    return torch.stack([mean, (square - mean.square()).clamp(min=0)])


@one_pass("(Tensor x, Tensor stats, Tensor slope, Tensor? residual, Tensor(a!) into) -> ()", lambda *_: None)
def write_activated(x: Tensor, stats: Tensor, slope: Tensor, residual: Tensor | None, into: Tensor) -> None:
    """Write PReLU(x * scale + shift + residual) `into` a tensor like `x`; `slope` (C,) is the PReLU's."""
    slope = slope.to(wide(x))
    for volume, channels in pieces(x):
        total = before_activation(x, stats, residual, volume, channels)
        into[volume] = F.prelu(total, slope[channels])


@one_pass(
    "(Tensor x, Tensor stats, Tensor slope, Tensor? residual, Tensor(a!) gradient) -> Tensor",
    lambda x, *_: x.new_empty(3, *x.shape[:2], dtype=wide(x)),
)
def sums_backward(x: Tensor, stats: Tensor, slope: Tensor, residual: Tensor | None, gradient: Tensor) -> Tensor:
    """Return three sums over the volume, (3, B, C), given the gradient of what `write_activated` writes.

    Of g, the gradient of the PReLU's input; of g * x; and the gradient of the slope. Where there is a residual,
    `gradient` is overwritten by g.
    """
    sums = torch.zeros(3, *x.shape[:2], dtype=wide(x), device=x.device)
    for volume, channels in pieces(x):
        total, own = before_activation(x, stats, residual, volume, channels), gradient[volume].to(wide(x))
        g = prelu_backward(own, total, slope[channels])
        for number, each in enumerate((g, g * x[volume].to(wide(x)), total.clamp_(max=0).mul_(own))):
            sums[number, :, channels] += each.sum(dim=VOLUME)
        if residual is not None:
            gradient[volume] = g
    return sums


@one_pass(
    "(Tensor(a!) x, Tensor stats, Tensor? slope, Tensor gradient, Tensor along, Tensor offset) -> ()", lambda *_: None
)
def input_backward(
    x: Tensor, stats: Tensor, slope: Tensor | None, gradient: Tensor, along: Tensor, offset: Tensor
) -> None:
    """Overwrite `x` by its own gradient, scale * g - along * x + offset; `along` and `offset` are (B, C).

    `gradient` is that of the PReLU's result without a residual; where `slope` is None, it is g.
    """
    for volume, channels in pieces(x):
        g = gradient[volume].to(wide(x))
        if slope is not None:
            g = prelu_backward(g, before_activation(x, stats, None, volume, channels), slope[channels])
        scale, factor, level = (each[:, channels, None, None, None] for each in (stats[2], along, offset))
        x[volume] = (g * scale).addcmul_(x[volume].to(wide(x)), factor, value=-1).add_(level)


def prelu_backward(gradient: Tensor, total: Tensor, slope: Tensor) -> Tensor:
    """Return the gradient of a PReLU's input `total`; without a mask, which a processor is slow with."""
    positive = torch.ops.aten.threshold_backward(gradient, total, 0)  # where total > 0
    return torch.sub(gradient, positive).mul_(slope.to(total.dtype)[:, None, None, None]).add_(positive)


def before_activation(
    x: Tensor, stats: Tensor, residual: Tensor | None, volume: tuple[slice, ...], channels: slice
) -> Tensor:
    """Return the PReLU's input, x * scale + shift + residual, for a piece of the volume."""
    scale, shift = (each[:, channels, None, None, None] for each in stats[2:])
    total = (x[volume].to(wide(x)) * scale).add_(shift)
    return total if residual is None else total.add_(residual.expand_as(x)[volume].to(wide(x)))


def pieces(x: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Cut (B, C, X, Y, Z) into pieces of channels or, within a channel, of planes; yield each, and its channels."""
    limit = PIECE_VOXELS * torch.get_num_threads() if x.device.type == "cpu" else GPU_PIECE_VOXELS
    width = max(1, limit // x[:, 0].numel())
    thickness = max(1, limit // x[:, 0, 0].numel()) if width == 1 else x.shape[2]
    for channel in range(0, x.shape[1], width):
        for plane in range(0, x.shape[2], thickness):
            channels = slice(channel, channel + width)
            yield (slice(None), channels, slice(plane, plane + thickness)), channels
