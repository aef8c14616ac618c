"""Norm, residual and PReLU of V-Net as one operation with its own backward pass, in few passes over memory.

A norm standardises channels, by statistics of each channel alone (instance), of all cases (batch) or of neighbouring
channels (group), then scales and shifts them. So it is x * scale + shift, with numbers for each case and channel. These
are computed once, in float32, from two sums; volumes are read and written in their own type.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE_BYTES = 32 * 2**20  # of a volume's channels for which temporaries exist at a time
VOLUME = (2, 3, 4)  # axes of (B, C, X, Y, Z)


def statistics(norm: nn.Module, x: Tensor) -> Tensor | None:
    """Return mean, 1 / standard deviation, scale and shift of a norm, (4, B, C, 1, 1, 1): norm(x) = x * scale + shift.

    In float32, or float64 where `x` is; None for no norm. Updates the running statistics of a batch norm in training.
    """
    if isinstance(norm, nn.Identity):
        return None
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
    return torch.stack([mean, factor, scale, torch.addcmul(norm.bias, mean, scale, value=-1)])[..., None, None, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the volume, (B, C) each, without a copy of `x` in float32.

    torch.var_mean would round both to the type of `x`. In bf16 and fp16 the difference of float32 sums loses less than
    the rounding of `x` has lost.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        variance, mean = torch.var_mean(x, dim=VOLUME, correction=0)
        return mean, variance
    voxels = x[0, 0].numel()
    mean = x.sum(dim=VOLUME, dtype=torch.float32) / voxels
    square = torch.linalg.vector_norm(x, dim=VOLUME, dtype=torch.float32).square() / voxels
    return mean, (square - mean.square()).clamp(min=0)


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


def pieces(x: Tensor) -> list[slice]:
    """Cut the channels of (B, C, X, Y, Z) into pieces of at most PIECE_BYTES, or one channel."""
    width = max(1, PIECE_BYTES // (x.element_size() * x[:, 0].numel()))
    return [slice(first, first + width) for first in range(0, x.shape[1], width)]


def before_activation(x: Tensor, stats: Tensor | None, residual: Tensor | None, into: Tensor) -> Tensor:
    """Write the PReLU's input, norm(x) + residual, into a tensor like `x`, or `x` itself, and return it."""
    if stats is not None:
        torch.addcmul(stats[3], x, stats[2], out=into)
    elif into is not x:
        into.copy_(x)
    return into if residual is None else into.add_(residual)


def of_part(part: slice, *values: Tensor | None) -> list[Tensor | None]:
    """Return the values for some channels of (..., B, C, X, Y, Z)."""
    return [None if value is None else value[..., part, :, :, :] for value in values]


def activate(
    prelu: nn.PReLU, x: Tensor, stats: Tensor | None, residual: Tensor | None = None, *, into: Tensor
) -> Tensor:
    """Write PReLU(norm(x) + residual) `into` a tensor like `x`, or `x` itself, and return it.

    Args:
        prelu: of a layer.
        x: (B, C, X, Y, Z), the output of its convolution.
        stats: the `statistics` of its norm and `x`.
        residual: like `x`, or with one channel, or None.
        into: overwritten.
    """
    residual = None if residual is None else residual.expand_as(x)
    slope = prelu.weight.to(x.dtype)
    for part in pieces(x):
        total = before_activation(*of_part(part, x, stats, residual, into))
        total.copy_(F.prelu(total, slope[part]))
    return into


def activate_backward(
    norm: nn.Module, prelu: nn.PReLU, x: Tensor, stats: Tensor | None, residual: Tensor | None, gradient: Tensor
) -> list[Tensor]:
    """Return the gradients of the norm's and the PReLU's parameters, given that of the result.

    Overwrites `x` by its own gradient, and `gradient` by that of the residual. The other arguments are those of
    `activate`.
    """
    residual = None if residual is None else residual.expand_as(x)
    slope = prelu.weight.to(x.dtype)[:, None, None, None]  # (C, 1, 1, 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_slope, products = [], []
    for part in pieces(x):
        own, total = x[:, part], torch.empty_like(x[:, part])
        before_activation(own, *of_part(part, stats, residual), total)
        g, grad_slopes = torch.ops.aten._prelu_kernel_backward(gradient[:, part], total, slope[part])
        gradient[:, part] = g
        grad_slope.append(grad_slopes.sum(dim=(0, *VOLUME), dtype=wide))
        if stats is not None:
            products.append(torch.mul(g, own, out=total).sum(dim=VOLUME, dtype=wide))
    grad_slope = torch.cat(grad_slope).to(prelu.weight.dtype)
    if stats is None:
        x.copy_(gradient)
        return [grad_slope]
    return [*normalise_backward(norm, x, stats, gradient, torch.cat(products, dim=1)), grad_slope]


def normalise_backward(norm: nn.Module, x: Tensor, stats: Tensor, gradient: Tensor, products: Tensor) -> list[Tensor]:
    """Return the gradients of a norm's weight and bias, given that of its result; overwrite `x` by its own gradient.

    The gradient of `x` is scale * gradient - along * x + offset: what would change only mean or variance is taken out.

    Args:
        norm: the norm.
        x: (B, C, X, Y, Z), its input.
        stats: its `statistics`.
        gradient: of its result.
        products: (B, C), the sums of gradient * x over the volume.
    """
    mean, factor, scale, _ = stats[..., 0, 0, 0]
    sums = gradient.sum(dim=VOLUME, dtype=products.dtype)
    grad_weights = factor * (products - mean * sums)  # the sums of gradient * standardised x
    voxels = x[0, 0].numel()
    along = factor.square() * shared_mean(norm, norm.weight * grad_weights) / voxels
    level = factor * shared_mean(norm, norm.weight * sums) / voxels
    offset = along * mean - level
    scale, along, offset = (each[..., None, None, None] for each in (scale, along, offset))
    torch.addcmul(offset, x, along, value=-1, out=x)
    torch.addcmul(x, gradient, scale, out=x)
    return [grad_weights.sum(dim=0).to(norm.weight.dtype), sums.sum(dim=0).to(norm.bias.dtype)]
