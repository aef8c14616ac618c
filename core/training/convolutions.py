"""Convolutions of V-Net forward and backward, whole, slab by slab, or by parts of the channels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLAB_BYTES = 32 * 2**20  # of the input that a CPU convolves at a time where no gradients are computed
PART_BYTES = 128 * 2**20  # of a convolution's input whose gradient is computed at a time where that is asked for


def convolve(conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor, padding: tuple[int, ...] | None = None) -> Tensor:
    """Apply `conv` in the type of `x`, with its own padding unless another is given."""
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    run = F.conv_transpose3d if isinstance(conv, nn.ConvTranspose3d) else F.conv3d
    return run(x, conv.weight.to(x.dtype), bias, conv.stride, conv.padding if padding is None else padding)


def convolve_in_slabs(conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """Return the same as `convolve`, computed slab by slab along X.

    On a CPU, oneDNN computes in a layout of its own: it holds a copy of the input and one of the output.
    """
    planes, border, step, kernel = x.shape[2], conv.padding[0], conv.stride[0], conv.kernel_size[0]
    thickness = max(1, SLAB_BYTES // (x.element_size() * x[:, :, 0].numel()) // step) * step
    # As V-Net's are: a slab needs no neighbours, or as many planes on either side.
    centred = step == 1 and 2 * border == kernel - 1 and isinstance(conv, nn.Conv3d)
    is_usual = centred or (border == 0 and step == kernel)
    if thickness >= planes or not is_usual:
        return convolve(conv, x)
    output = None
    for first in range(0, planes, thickness):
        after = min(first + thickness, planes)
        before, behind = max(0, first - border), min(planes, after + border)
        zeros = (border - (first - before), border - (behind - after))  # planes beyond the volume
        slab = F.pad(x[:, :, before:behind], (0, 0, 0, 0, *zeros)) if border else x[:, :, first:after]
        part = convolve(conv, slab, (0, *conv.padding[1:]))
        if output is None:
            output = part.new_empty(*part.shape[:2], part.shape[2] * planes // thickness, *part.shape[3:])
        place = first * output.shape[2] // planes
        output[:, :, place : place + part.shape[2]] = part
    return output


def convolve_backward(
    conv: nn.Conv3d | nn.ConvTranspose3d,
    x: Tensor,
    gradient: Tensor,
    wanted: bool,
    add_to: Tensor | None = None,
    *,
    in_parts: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of `x`, if wanted, and of the weight and the bias, if there is one.

    Args:
        conv: the convolution.
        x: its input.
        gradient: of its output.
        wanted: True when the gradient of `x` is.
        add_to: a tensor like `x` that its gradient is added to, in place.
        in_parts: compute a part of the channels of `x` after the other, which takes less memory and more time.
    """
    channels, element = x.shape[1], x.element_size()
    width = max(1, min(channels, PART_BYTES // (element * x[:, 0].numel()))) if in_parts else channels
    grad_whole = add_to if wanted else None
    grad_weights = []
    for first in range(0, channels, width):
        part = slice(first, first + width)
        grad_x, grad_weight, grad_bias = gradients_of_part(conv, x, gradient, part, wanted)
        grad_weights.append(grad_weight.to(conv.weight.dtype))
        if wanted and add_to is not None:
            add_to[:, part] += grad_x
        elif wanted and width == channels:
            grad_whole = grad_x
        elif wanted:
            grad_whole = torch.empty_like(x) if grad_whole is None else grad_whole
            grad_whole[:, part] = grad_x
        del grad_x
    channel_axis = 0 if isinstance(conv, nn.ConvTranspose3d) else 1  # of the weight, for the channels of x
    grad_weight = grad_weights[0] if len(grad_weights) == 1 else torch.cat(grad_weights, dim=channel_axis)
    return grad_whole, [grad_weight, *([] if conv.bias is None else [grad_bias.to(conv.bias.dtype)])]


def gradients_of_part(
    conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor, gradient: Tensor, part: slice, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of some channels of `x`, if wanted, of their weights, and of the bias, if there is one."""
    transposed = isinstance(conv, nn.ConvTranspose3d)
    weight = conv.weight[part] if transposed else conv.weight[:, part]
    return torch.ops.aten.convolution_backward(
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
        [wanted, True, conv.bias is not None],
    )
