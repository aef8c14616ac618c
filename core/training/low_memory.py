"""Run V-Net's forward and backward pass with few activations kept in memory between the two.

A training step of plain autograd keeps, for every convolution, its input, its output, the normed output and the sum
with the residual. Here the network runs in units (a change of resolution and the stage after it). Each unit is an
autograd function of its own, which keeps its inputs and either

    keep=True    the outputs of its convolutions; norm, residual and PReLU are recomputed in the backward pass (cheap)
    keep=False   nothing more; the convolutions are recomputed as well (a third more arithmetic)

In both, a gradient overwrites its tensor as soon as that is not needed any more, and norm, residual and PReLU work on a
few channels at a time, which keeps their temporaries small. The gradients are those of plain autograd; only roundings
differ.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vnet import Down, ResidualStage, Up, VNet

PIECE_BYTES = 32 * 2**20  # of float32 values that norm, residual and PReLU work on at a time
PART_BYTES = 128 * 2**20  # of a convolution's input whose gradient is worked out at a time; smaller is slower


@dataclass(frozen=True)
class Layer:
    """A convolution with the norm and the PReLU after it."""

    conv: nn.Conv3d | nn.ConvTranspose3d
    norm: nn.Module
    activation: nn.PReLU

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the order in which their gradients are returned."""
        return [*self.conv.parameters(), *self.norm.parameters(), *self.activation.parameters()]


@dataclass(frozen=True)
class Unit:
    """A change of resolution (none before the first stage) and the stage after it."""

    resample: Layer | None
    stage: tuple[Layer, ...]

    @classmethod
    def of(cls, resample: Down | Up | None, stage: ResidualStage) -> "Unit":
        """Make the unit of two modules of vnet.py."""
        first = None if resample is None else Layer(resample.conv, resample.norm, resample.activation)
        return cls(first, tuple(map(Layer, stage.convs, stage.norms, stage.activations)))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in their order."""
        return self.stage if self.resample is None else (self.resample, *self.stage)


def is_supported(network: nn.Module) -> bool:
    """Return True when the plans low and lowest can run the network: V-Net itself, for a subclass may run otherwise."""
    return type(network) is VNet


def features(network: VNet, image: Tensor, precision: torch.dtype, keep: bool) -> Tensor:
    """Run the network without its last 1x1x1 convolution: (B, 1, X, Y, Z) -> (B, 2C, X, Y, Z) in `precision`."""

    def run(resample: Down | Up | None, stage: ResidualStage, h: Tensor, skip: Tensor | None = None) -> Tensor:
        unit = Unit.of(resample, stage)
        return UnitFunction.apply(unit, keep, h, skip, *(p for layer in unit.layers for p in layer.parameters))

    h = run(None, network.first, image.to(precision))
    skips = []
    for down, stage in zip(network.downs, network.down_stages, strict=True):
        skips.append(h)
        h = run(down, stage, h)
    for up, stage in zip(network.ups, network.up_stages, strict=True):
        h = run(up, stage, h, skips.pop())
    return h


class UnitFunction(torch.autograd.Function):
    """A unit as an autograd function: what it keeps, and which gradients it returns."""

    @staticmethod
    def forward(ctx, unit: Unit, keep: bool, h: Tensor, skip: Tensor | None, *_: nn.Parameter) -> Tensor:
        """Run the unit on `h` and, on the way up, on the skip from across."""
        ctx.unit = unit
        result, outputs = unit_forward(unit, h, skip, keep)
        ctx.save_for_backward(h, skip, *outputs)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        """Return the gradients of h, the skip and the parameters; overwrite `gradient`, which nobody else needs."""
        h, skip, *outputs = ctx.saved_tensors
        needs_h = ctx.needs_input_grad[2]
        of_h, of_skip, of_parameters = unit_backward(ctx.unit, h, skip, outputs, gradient, needs_h)
        return None, None, of_h, of_skip, *of_parameters


def unit_forward(unit: Unit, h: Tensor, skip: Tensor | None, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Return a unit's result, and the outputs of its convolutions if they are kept."""
    outputs = []

    def run(layer: Layer, h: Tensor, residual: Tensor | None = None) -> Tensor:
        output = convolve(layer.conv, h)
        update_running_statistics(layer.norm, output)
        if keep:
            outputs.append(output)
        return activate(layer, output, residual, into=torch.empty_like(output) if keep else output)

    if unit.resample is not None:
        h = run(unit.resample, h)
    x = h = join(h, skip)
    for layer in unit.stage[:-1]:
        h = run(layer, h)
    return run(unit.stage[-1], h, residual=x), outputs


def unit_backward(
    unit: Unit, h: Tensor, skip: Tensor | None, outputs: list[Tensor], gradient: Tensor, needs_h: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of a unit's input, its skip and its parameters.

    Args:
        unit: as it ran.
        h: its input.
        skip: what was joined to its resampled input, or None.
        outputs: of its convolutions, overwritten; an empty list: compute them again.
        gradient: of its result, overwritten.
        needs_h: True when the input's gradient is needed (not that of the scan itself).
    """
    again, resample, stage = not outputs, unit.resample, unit.stage
    inputs, output = recompute(unit, h, skip, outputs)
    of_parameters: list[Tensor] = []
    for layer in reversed(stage):
        of_output = outputs.pop()
        of_norm = activate_backward(layer, of_output, inputs[0] if layer is stage[-1] else None, gradient)
        if layer is stage[-1]:
            of_x = gradient if gradient.shape[1] == inputs[0].shape[1] else gradient.sum(dim=1, keepdim=True)
        # The gradient of the stage's input is added to that of the residual, which is the same tensor.
        add_to = of_x if layer is stage[0] else torch.zeros_like(inputs[-1])
        wanted = layer is not stage[0] or resample is not None or needs_h
        of_conv = convolve_backward(layer.conv, inputs.pop(), of_output, add_to if wanted else None)
        of_parameters = of_conv + of_norm + of_parameters
        gradient = add_to
        del of_output

    of_h, of_skip = of_x, None
    if skip is not None:
        of_h, of_skip = of_x.split([of_x.shape[1] - skip.shape[1], skip.shape[1]], dim=1)
    if resample is not None:
        of_output = convolve(resample.conv, h) if again else output
        of_norm = activate_backward(resample, of_output, None, of_h)
        of_h = torch.zeros_like(h)
        of_parameters = convolve_backward(resample.conv, h, of_output, of_h) + of_norm + of_parameters
    return of_h if needs_h else None, of_skip, of_parameters


def recompute(unit: Unit, h: Tensor, skip: Tensor | None, outputs: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Compute what a unit's backward pass needs and was not kept.

    Args:
        unit: as it ran.
        h: its input.
        skip: what was joined to its resampled input, or None.
        outputs: of its convolutions; those of the stage are left in it, and filled in where none were kept.

    Returns:
        the inputs of the stage's convolutions, and the output of the change of resolution where it was kept.
    """
    again, kept = not outputs, None
    if unit.resample is not None:
        output = convolve(unit.resample.conv, h) if again else outputs.pop(0)
        h = activate(unit.resample, output, into=output if again else torch.empty_like(output))
        kept = None if again else output
        del output
    inputs = [join(h, skip)]
    del h
    for i, layer in enumerate(unit.stage):
        if again:
            outputs.append(convolve(layer.conv, inputs[i]))
        if i < len(unit.stage) - 1:
            inputs.append(activate(layer, outputs[i], into=torch.empty_like(outputs[i])))
    return inputs, kept


def join(h: Tensor, skip: Tensor | None) -> Tensor:
    """Concatenate the channels of both; return `h` itself where there is no skip."""
    return h if skip is None else torch.cat([h, skip], dim=1)


# ---- Convolutions ----------------------------------------------------------------------------------------------------


def convolve(conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """Apply `conv` in the type of `x`."""
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    run = F.conv_transpose3d if isinstance(conv, nn.ConvTranspose3d) else F.conv3d
    return run(x, conv.weight.to(x.dtype), bias, conv.stride, conv.padding)


def convolve_backward(
    conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor, gradient: Tensor, add_to: Tensor | None
) -> list[Tensor]:
    """Return the gradients of the weight and, if there is one, the bias, given that of the output.

    The gradient of `x` is added to `add_to`, if that is not None: a part of the channels after the other, so that it
    never lies in memory whole beside it.
    """
    transposed = isinstance(conv, nn.ConvTranspose3d)
    channel_axis = 0 if transposed else 1  # of the weight, for the channels of x
    width = max(1, min(x.shape[1], PART_BYTES // (x.element_size() * x[:, 0].numel())))
    of_weights = []
    for first in range(0, x.shape[1], width):
        part = slice(first, first + width)
        weight = conv.weight[part] if transposed else conv.weight[:, part]
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x[:, part],
            weight.to(x.dtype),
            None if conv.bias is None else list(conv.bias.shape),
            conv.stride,
            conv.padding,
            conv.dilation,
            transposed,
            conv.output_padding,
            conv.groups,
            [add_to is not None, True, conv.bias is not None],
        )
        if add_to is not None:
            add_to[:, part] += of_x
        del of_x
        of_weights.append(of_weight.to(conv.weight.dtype))
    of_bias = [] if conv.bias is None else [of_bias.to(conv.bias.dtype)]
    return [torch.cat(of_weights, dim=channel_axis), *of_bias]


# ---- Norm, residual and PReLU ----------------------------------------------------------------------------------------


def pieces(norm: nn.Module, x: Tensor) -> list[slice]:
    """Cut the channels of (B, C, X, Y, Z) into pieces of PIECE_BYTES at most that keep a group norm's groups whole."""
    width = group_width(norm)
    channels = max(1, PIECE_BYTES // (4 * width * x[:, 0].numel())) * width
    return [slice(first, first + channels) for first in range(0, x.shape[1], channels)]


def group_width(norm: nn.Module) -> int:
    """Return how many channels share their statistics."""
    return norm.num_channels // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1


def spread(norm: nn.Module, x: Tensor) -> Tensor:
    """Copy a piece (B, c, X, Y, Z) for arithmetic, to (B, groups, width, N) in float32, or float64 where `x` is."""
    width = group_width(norm)
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    return wide.view(x.shape[0], x.shape[1] // width, width, -1)


def per_channel(norm: nn.Module, values: Tensor) -> Tensor:
    """Reshape values of a piece's channels, (c,), for multiplication with (B, groups, width, N)."""
    return values.view(1, -1, group_width(norm), 1)


def together(norm: nn.Module) -> tuple[int, ...]:
    """Return the axes of (B, groups, width, N) over which a norm takes its statistics."""
    return (0, 2, 3) if isinstance(norm, nn.BatchNorm3d) else (2, 3)


def standardise(norm: nn.Module, piece: Tensor, channels: slice) -> tuple[Tensor, Tensor | float]:
    """Standardise a piece in place; return it and the factor it was multiplied by. Without a norm it is unchanged."""
    if isinstance(norm, nn.Identity):
        return piece, 1.0
    if isinstance(norm, nn.BatchNorm3d) and not norm.training:
        mean, variance = (per_channel(norm, noted[channels]) for noted in (norm.running_mean, norm.running_var))
    else:
        variance, mean = torch.var_mean(piece, dim=together(norm), correction=0, keepdim=True)
    factor = (variance + norm.eps).rsqrt()
    return piece.sub_(mean).mul_(factor), factor


def before_activation(norm: nn.Module, normed: Tensor, channels: slice, residual: Tensor | None) -> Tensor:
    """Return the PReLU's input: the standardised piece, scaled and shifted by the norm, plus the residual."""
    total = normed.clone()
    if not isinstance(norm, nn.Identity):
        total.mul_(per_channel(norm, norm.weight[channels])).add_(per_channel(norm, norm.bias[channels]))
    return total if residual is None else total.add_(spread(norm, residual[:, channels]))


def activate(layer: Layer, output: Tensor, residual: Tensor | None = None, *, into: Tensor) -> Tensor:
    """Write PReLU(norm(output) + residual) `into` a tensor like `output`, or into itself, and return it."""
    norm = layer.norm
    residual = None if residual is None else residual.expand_as(output)
    for channels in pieces(norm, output):
        normed, _ = standardise(norm, spread(norm, output[:, channels]), channels)
        total = before_activation(norm, normed, channels, residual)
        slope = per_channel(norm, layer.activation.weight[channels])
        into[:, channels] = torch.where(total > 0, total, total * slope).view_as(into[:, channels])
    return into


def activate_backward(layer: Layer, output: Tensor, residual: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """Return the gradients of the norm's and the PReLU's parameters, given that of the result.

    Overwrites `output` by its own gradient, and `gradient` by that of the residual.
    """
    norm = layer.norm
    residual = None if residual is None else residual.expand_as(output)
    of_weight, of_bias, of_slope = (torch.zeros_like(layer.activation.weight) for _ in range(3))
    for channels in pieces(norm, output):
        normed, factor = standardise(norm, spread(norm, output[:, channels]), channels)
        total = before_activation(norm, normed, channels, residual)
        g = spread(norm, gradient[:, channels])
        below = total <= 0
        of_slope[channels] = torch.where(below, total.mul_(g), 0).sum(dim=(0, 3)).flatten()
        g = torch.where(below, g * per_channel(norm, layer.activation.weight[channels]), g)
        gradient[:, channels] = g.view_as(gradient[:, channels])
        if not isinstance(norm, nn.Identity):
            of_bias[channels] = g.sum(dim=(0, 3)).flatten()
            of_weight[channels] = torch.mul(g, normed, out=total).sum(dim=(0, 3)).flatten()
            # The derivative of standardising: what changes the mean or the variance has no effect.
            g.mul_(per_channel(norm, norm.weight[channels]))
            along = torch.mul(g, normed, out=total).mean(dim=together(norm), keepdim=True)
            g.sub_(g.mean(dim=together(norm), keepdim=True)).sub_(normed.mul_(along)).mul_(factor)
        output[:, channels] = g.view_as(output[:, channels])
    return [of_slope] if isinstance(norm, nn.Identity) else [of_weight, of_bias, of_slope]


def update_running_statistics(norm: nn.Module, output: Tensor) -> None:
    """Update the running statistics of a batch norm, once a step; other norms have none."""
    if not (isinstance(norm, nn.BatchNorm3d) and norm.training):
        return
    norm.num_batches_tracked += 1
    for channels in pieces(norm, output):
        piece = spread(norm, output[:, channels])
        variance, mean = torch.var_mean(piece, dim=together(norm), correction=1)
        norm.running_mean[channels] += norm.momentum * (mean.flatten() - norm.running_mean[channels])
        norm.running_var[channels] += norm.momentum * (variance.flatten() - norm.running_var[channels])
