"""Run V-Net's forward and backward pass with few activations kept in memory between the two.

A training step of plain autograd keeps, for every convolution, its input, its output, the normed output and the sum
with the residual. Here the network runs in units (a change of resolution and the stage after it). Each unit is an
autograd function of its own, which keeps its inputs and either

    keep=True    the outputs of its convolutions; norm, residual and PReLU are recomputed in the backward pass (cheap)
    keep=False   nothing more; the convolutions are recomputed as well (a third more arithmetic)

In both, a gradient is written over a tensor that is no longer needed. The gradients are those of plain autograd; only
roundings differ.
"""

import copy
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from core.training.activation import activate, activate_backward, statistics
from core.training.convolutions import convolve, convolve_backward, convolve_in_slabs
from vnet import Down, ResidualStage, Up, VNet, check_size


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

    transition: Layer | None
    stage: tuple[Layer, ...]

    @classmethod
    def of(cls, transition: Down | Up | None, stage: ResidualStage) -> "Unit":
        """Make the unit of two modules of vnet.py."""
        first = None if transition is None else Layer(transition.conv, transition.norm, transition.activation)
        return cls(first, tuple(map(Layer, stage.convs, stage.norms, stage.activations)))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in their order."""
        return self.stage if self.transition is None else (self.transition, *self.stage)


SUPPORTED: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()  # results of `runs_alike`


def is_supported(network: nn.Module, training: bool = False) -> bool:
    """Return True when `features` gives the network's own logits, and for `training` its gradients, as for a V-Net.

    An edit of vnet.py, a hook or a replaced layer can change them; such a network trains under `off` only.
    """
    if type(network) is not VNet:
        return False
    results = SUPPORTED.setdefault(network, {})
    if training not in results:
        results[training] = runs_alike(network, training)
    return results[training]


def runs_alike(network: VNet, training: bool) -> bool:
    """Return True when a copy of the network has the same logits by `features` as by itself, and the same gradients."""
    # A layer that draws numbers shall not move the run's.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.set_grad_enabled(training):
        twin = copy.deepcopy(network).to("cpu", torch.float64)
        side = 2 ** len(network.downs)
        image = torch.linspace(0, 1, 2 * side**3, dtype=torch.float64).reshape(1, 1, 2 * side, side, side).sin()
        try:
            for mode in (True, False):
                twin.train(mode)
                own = with_gradients(twin, twin(image))
                found = with_gradients(twin, twin.classify(features(twin, image, torch.float64, keep=False)))
                if not all(map(torch.allclose, own, found)):
                    return False
            return not (training and any(map(parametrize.is_parametrized, twin.modules())))
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False


def with_gradients(network: nn.Module, logits: Tensor) -> list[Tensor]:
    """Return logits, and in training mode the gradients by what is trained of norms and activations.

    Those of the convolutions' weights come from the same chain, and would take many times as long.
    """
    if not (network.training and logits.requires_grad):
        return [logits]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad and parameter.ndim == 1]
    return [logits, *(torch.autograd.grad(logits.sin().sum(), trained, materialize_grads=True) if trained else ())]


def features(network: VNet, image: Tensor, precision: torch.dtype, keep: bool) -> Tensor:
    """Run the network without its last 1x1x1 convolution: (B, 1, X, Y, Z) -> (B, 2C, X, Y, Z) in `precision`.

    Raises:
        ValueError: when the size cannot be halved often enough.
    """
    check_size(image.shape[2:], network.halvings)

    def run(transition: Down | Up | None, stage: ResidualStage, inputs: list[Tensor]) -> None:
        unit = Unit.of(transition, stage)
        if torch.is_grad_enabled():
            parameters = (p for layer in unit.layers for p in layer.parameters)
            result = UnitFunction.apply(unit, keep, inputs.pop(0), inputs.pop() if inputs else None, *parameters)
        else:
            result = unit_forward(unit, inputs, keep=False, in_slabs=image.device.type == "cpu")[0]
        inputs.append(result)

    # In a list, which a unit empties, its inputs do not outlive it.
    h = [image.to(precision)]
    run(None, network.first, h)
    skips = []
    for down, stage in zip(network.downs, network.down_stages, strict=True):
        skips += h
        run(down, stage, h)
    for up, stage in zip(network.ups, network.up_stages, strict=True):
        h.append(skips.pop())
        run(up, stage, h)
    return h.pop()


class UnitFunction(torch.autograd.Function):
    """A unit as an autograd function: what it keeps, and which gradients it returns."""

    @staticmethod
    def forward(ctx, unit: Unit, keep: bool, h: Tensor, skip: Tensor | None, *_: nn.Parameter) -> Tensor:
        """Run the unit on `h` and, on the way up, on the skip from across."""
        ctx.unit = unit
        result, stats, outputs = unit_forward(unit, [h] if skip is None else [h, skip], keep)
        ctx.save_for_backward(h, skip, *stats, *outputs)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        """Return the gradients of h, the skip and the parameters; `gradient` is overwritten."""
        h, skip, *kept = ctx.saved_tensors
        stats, outputs = kept[: len(ctx.unit.layers)], kept[len(ctx.unit.layers) :]
        needs_h = ctx.needs_input_grad[2]
        grad_h, grad_skip, parameter_grads = unit_backward(ctx.unit, h, skip, stats, outputs, gradient, needs_h)
        return None, None, grad_h, grad_skip, *parameter_grads


def unit_forward(
    unit: Unit, inputs: list[Tensor], keep: bool, in_slabs: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return a unit's result, its layers' statistics, and the outputs of its convolutions if they are kept.

    Args:
        unit: to run.
        inputs: its input, and the skip on the way up; emptied.
        keep: True to return the outputs of the convolutions.
        in_slabs: True to convolve slab by slab.
    """
    run_conv = convolve_in_slabs if in_slabs else convolve
    stats, outputs = [], []

    def run(layer: Layer, h: Tensor, residual: Tensor | None = None) -> Tensor:
        output = run_conv(layer.conv, h)
        stats.append(statistics(layer.norm, output))
        if keep:
            outputs.append(output)
        into = torch.empty_like(output) if keep else output
        return activate(layer.activation, output, stats[-1], residual, into=into)

    if unit.transition is not None:
        inputs[0] = run(unit.transition, inputs[0])
    x = h = join(*inputs)
    inputs.clear()
    for layer in unit.stage[:-1]:
        h = run(layer, h)
    return run(unit.stage[-1], h, residual=x), stats, outputs


def unit_backward(
    unit: Unit,
    h: Tensor,
    skip: Tensor | None,
    stats: list[Tensor],
    outputs: list[Tensor],
    gradient: Tensor,
    needs_h: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of a unit's input, its skip and its parameters.

    Args:
        unit: as it ran.
        h: its input.
        skip: what was joined to its resampled input, or None.
        stats: the statistics of its layers; emptied.
        outputs: of its convolutions, overwritten; an empty list: compute them again.
        gradient: of its result, overwritten.
        needs_h: True when the input's gradient is needed (not that of the scan itself).
    """
    again, transition, stage, grad_x = not outputs, unit.transition, unit.stage, None
    inputs, output = recompute(unit, h, skip, stats, outputs)
    parameter_grads: list[Tensor] = []
    for layer in reversed(stage):
        grad_output, residual = outputs.pop(), inputs[0] if grad_x is None else None
        norm_grads = activate_backward(layer.norm, layer.activation, grad_output, stats.pop(), residual, gradient)
        if grad_x is None:
            grad_x = gradient if gradient.shape[1] == inputs[0].shape[1] else gradient.sum(dim=1, keepdim=True)
        gradient = None  # frees its memory, but for that of the residual
        wanted = layer is not stage[0] or transition is not None or needs_h
        # The gradient of the stage's input is added to that of the residual, which is the same tensor.
        add_to = grad_x if layer is stage[0] else None
        gradient, conv_grads = convolve_backward(layer.conv, inputs.pop(), grad_output, wanted, add_to, in_parts=again)
        parameter_grads = conv_grads + norm_grads + parameter_grads
        del grad_output, residual

    grad_h, grad_skip = grad_x, None
    if skip is not None:
        grad_h, grad_skip = grad_x.split([grad_x.shape[1] - skip.shape[1], skip.shape[1]], dim=1)
    if transition is not None:
        grad_output = convolve(transition.conv, h) if again else output
        norm_grads = activate_backward(transition.norm, transition.activation, grad_output, stats.pop(), None, grad_h)
        grad_h, conv_grads = convolve_backward(transition.conv, h, grad_output, True, in_parts=again)
        parameter_grads = conv_grads + norm_grads + parameter_grads
    return grad_h if needs_h else None, grad_skip, parameter_grads


def recompute(
    unit: Unit, h: Tensor, skip: Tensor | None, stats: list[Tensor], outputs: list[Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """Compute what a unit's backward pass needs and was not kept.

    Args:
        unit: as it ran.
        h: its input.
        skip: what was joined to its resampled input, or None.
        stats: the statistics of its layers.
        outputs: of its convolutions; those of the stage are left in it, and filled in where none were kept.

    Returns:
        the inputs of the stage's convolutions, and the output of the change of resolution where it was kept.
    """
    again, kept = not outputs, None

    def run(layer: Layer, output: Tensor, number: int, into: Tensor) -> Tensor:
        return activate(layer.activation, output, stats[number], into=into)

    if unit.transition is not None:
        output = convolve(unit.transition.conv, h) if again else outputs.pop(0)
        h = run(unit.transition, output, 0, into=output if again else torch.empty_like(output))
        kept = None if again else output
        del output
    inputs = [join(h, skip)]
    del h
    for i, layer in enumerate(unit.stage):
        if again:
            outputs.append(convolve(layer.conv, inputs[i]))
        if i < len(unit.stage) - 1:
            inputs.append(run(layer, outputs[i], i - len(unit.stage), into=torch.empty_like(outputs[i])))
    return inputs, kept


def join(h: Tensor, skip: Tensor | None = None) -> Tensor:
    """Concatenate the channels of both; return `h` itself where there is no skip."""
    return h if skip is None else torch.cat([h, skip], dim=1)
