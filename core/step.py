"""One training step: the losses, the arithmetic it runs in, the memory plans, and the step itself.

A memory plan is a way to work out the same gradients:

    off      as torch does it: everything that the backward pass needs is kept
    low      only the convolutions' inputs and outputs are kept; no convolution is done twice
    lowest   only what passes between stages is kept; every convolution is done once more in the backward pass
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.recompute import convolve, features
from vnet import VNet

PLANS = ("off", "low", "lowest")  # from the fastest to the smallest
SLAB_BYTES = 32 * 2**20  # of float32 logits that exist at a time under the plans low and lowest
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NotFiniteError(ArithmeticError):
    """The loss is NaN or infinite, so that training on would destroy the weights."""


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU if there is one.

    Raises:
        ValueError: when it is a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name}, but torch sees {torch.cuda.device_count()} GPUs; expected auto or cpu")
    return device


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions are computed in; float32 means no mixed precision.

    Raises:
        ValueError: when the device cannot train in what was asked for.
    """
    if device.type == "cpu":
        # With torch 2.13 the 5x5x5 convolutions of the deepest stage get gradients that are not finite.
        if precision not in ("auto", "float32"):
            raise ValueError(f"precision: got {precision} on a CPU, expected auto or float32: training fails otherwise")
        return torch.float32
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return DTYPES[precision]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which the network runs: mixed precision, or none for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision in (torch.bfloat16, torch.float16))


# ---- Losses ----------------------------------------------------------------------------------------------------------


class Loss:
    """Cross-entropy, alone or with the paper's Dice, as a function of sums over voxels.

    Because all that it needs of the voxels are sums, it can be worked out slab by slab.

    Args:
        name: "cross_entropy" or "dice_cross_entropy" (their sum: cross-entropy moves every voxel, Dice gives small
            organs their weight).
        deterministic: whether to leave out the GPU kernels that add up in any order; the others are slower.
    """

    def __init__(self, name: str, deterministic: bool = False):
        self.with_dice = name == "dice_cross_entropy"
        self.deterministic = deterministic

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K, X, Y, Z) for labels (B, X, Y, Z), integers below K: a scalar."""
        return self.of_sums(self.sums(logits, labels), labels.numel())

    def sums(self, logits: Tensor, labels: Tensor) -> list[Tensor]:
        """What the loss needs of these voxels; that of the whole volume is the total over its parts."""
        labels = labels.long()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.deterministic:  # cross-entropy of volumes has no such kernel, these have
            sums = [(logits.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]).sum()]
        else:
            sums = [F.cross_entropy(logits, labels, reduction="sum")]
        return sums + dice_sums(logits, labels, self.deterministic) if self.with_dice else sums

    def of_sums(self, sums: list[Tensor], voxels: int) -> Tensor:
        """The loss of `voxels` voxels that have these sums."""
        mean = sums[0] / voxels
        return mean + dice_loss(*sums[1:]) if self.with_dice else mean


def dice_sums(logits: Tensor, labels: Tensor, deterministic: bool = False) -> list[Tensor]:
    """For each sample and class, sum(p g), sum(p^2) and sum(g) over the voxels: three tensors (B, K)."""
    probabilities = logits.softmax(dim=1).flatten(2)  # (B, K, N)
    ids = labels.flatten(1)  # (B, N)
    # Without a one-hot volume: each voxel adds to its own label's sum.
    own = probabilities.gather(1, ids[:, None])[:, 0]
    if deterministic:  # scatter_add is not
        masks = [ids == organ for organ in range(probabilities.shape[1])]
        shared = torch.stack([(own * mask).sum(dim=1) for mask in masks], dim=1)
        in_labels = torch.stack([mask.sum(dim=1) for mask in masks], dim=1).to(own.dtype)
    else:
        empty = own.new_zeros(probabilities.shape[:2])  # (B, K)
        shared = empty.scatter_add(1, ids, own)
        in_labels = empty.scatter_add(1, ids, torch.ones_like(own))
    return [shared, probabilities.square().sum(dim=2), in_labels]


def dice_loss(shared: Tensor, squares: Tensor, in_labels: Tensor) -> Tensor:
    """1 - soft Dice as the V-Net paper has it (section 3), the mean over a sample's organs, and over samples.

    D = 2 sum(p g) / (sum p^2 + sum g^2) over the voxels, for each organ; the background is left out. The squares
    matter: with plain sums below the line, small organs start to be found later (RESULTS.md).

    Args:
        shared: (B, K) sum(p g), from `dice_sums`, as are the other two.
        squares: (B, K) sum(p^2).
        in_labels: (B, K) sum(g).

    Returns:
        a scalar in 0..1; 0 when no sample has any organ.
    """
    # An organ that is there has at least one voxel; for one that is not, 0 / 0 must not come out.
    dice = 2 * shared / (squares + in_labels).clamp(min=1)
    present = in_labels[:, 1:] > 0
    of_samples = ((1 - dice[:, 1:]) * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
    return of_samples.mean()


# ---- One step --------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """All that a training step works with.

    Attributes:
        network: whose weights are trained.
        loss: what is to become small.
        optimizer: of the network's parameters, from `make_optimizer`.
        scaler: enabled for fp16 alone, whose small gradients would vanish otherwise.
        precision: the type that convolutions are computed in.
        plan: one of PLANS.
        clip_norm: the largest norm of a step's gradient, all weights together; 0 for any.
        pieces: in which a batch is worked out, one after the other.
        average: of the weights over the steps, or None.
        combine: is given the network with its gradients and the loss when a backward pass is over, and returns the
            loss; where several processes share a batch, it makes both those of the whole batch.
    """

    network: VNet
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    plan: str = "off"
    clip_norm: float = 0.0
    pieces: int = 1
    average: "Average | None" = None
    combine: Callable[[nn.Module, Tensor], Tensor] = lambda network, loss: loss

    def averaged(self) -> AbstractContextManager:
        """A block in which the network has the averaged weights, where there are any."""
        return self.average.in_place(self.network) if self.average else nullcontext()


def make_optimizer(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """Adam in one kernel: with no memory beside its state it cannot run out half-way, and it can leave a step out."""
    return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)


@torch.no_grad()
def to_channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions with the channels last, so that volumes are worked on in that order too.

    The scan itself has one channel, which makes both orders the same. For an optimiser's state to take the order over,
    this comes before `make_optimizer`.
    """
    for parameter in network.parameters():
        if parameter.ndim == 5:
            # Not Module.to, which cannot do it to tensors without memory (core/memory.py).
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Let torch.compile write the kernels of `network(image)`, which of the plans only `off` calls; names stay.

    Raises:
        ValueError: when it cannot, on a CPU for want of a C++ compiler.
    """
    sample = torch.zeros(2, device=device)
    try:
        torch.compile(lambda x: x + 1)(sample)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile: torch.compile does not work here ({reason}); expected false") from error
    network.compile()


def training_step(
    training: Training,
    image: Tensor,
    labels: Tensor,
    check: Callable[[Tensor], None] = lambda loss: None,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Change the network's weights once, for one batch; on a GPU it is launched and not waited for.

    Args:
        training: with the network in training mode.
        image: (B, 1, X, Y, Z) float32 in 0..1.
        labels: (B, X, Y, Z), integer ids.
        check: is shown the loss of each piece before its backward pass.
        after: is called when a piece is done.

    Returns:
        the loss before the change, a scalar on the device; where it is NaN or infinite, no weight has changed.
    """
    training.optimizer.zero_grad(set_to_none=True)
    loss = training.combine(training.network, gradients(training, image, labels, check, after))
    # Adam reads on the device whether to leave this step out. An enabled scaler puts its own answer here, in which all
    # gradients have a say.
    if training.clip_norm:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.network.parameters(), training.clip_norm)
    training.optimizer.found_inf = loss.isfinite().logical_not().float()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    if training.average:
        training.average.update(training.network)
    return loss


def pieces_of(cases: int, pieces: int) -> list[tuple[slice, float]]:
    """A batch cut into pieces, as even as can be and none empty, with the share of the cases that each has."""
    pieces = min(pieces, cases)
    ends = [cases * number // pieces for number in range(pieces + 1)]
    return [(slice(a, b), (b - a) / cases) for a, b in pairwise(ends)]


class Average:
    """A moving average of a network's weights over the steps, which is steadier than the last of them.

    Args:
        network: from whose weights it starts.
        decay: what is left of the average in each step, 0 to 1.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move a step towards the network's weights."""
        torch._foreach_lerp_(list(self.weights.values()), list(network.parameters()), 1 - self.decay)

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """A block in which the network has the averaged weights."""
        own = {name: parameter.data for name, parameter in network.named_parameters()}
        try:
            for name, parameter in network.named_parameters():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in network.named_parameters():
                parameter.data = own[name]


def gradients(
    training: Training,
    image: Tensor,
    labels: Tensor,
    check: Callable[[Tensor], None] = lambda loss: None,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Put the loss's gradients, times the scaler's factor, into the parameters, piece by piece; returns the loss.

    `check` and `after` are those of `training_step`.
    """
    losses = []
    for piece, share in pieces_of(len(image), training.pieces):
        losses.append(share * gradients_of_piece(training, image[piece], labels[piece], check, share))
        after()
    return sum(losses[1:], start=losses[0])


def gradients_of_piece(
    training: Training, image: Tensor, labels: Tensor, check: Callable[[Tensor], None], share: float
) -> Tensor:
    """Add the gradients of a piece that is this share of its batch to the parameters', as the plan says.

    Returns:
        the piece's loss.
    """
    network, plan = training.network, training.plan
    if plan == "off":
        with autocast(image.device, training.precision):
            value = training.loss(network(image), labels)  # (B, K, X, Y, Z) -> scalar
        check(value)
        training.scaler.scale(value * share).backward()
        return value.detach()
    result = features(network, image, training.precision, keep=plan == "low")  # (B, 2C, X, Y, Z)
    gradient = result.detach()  # the same memory: from here on nobody needs the result itself
    value = backward_in_slabs(training, gradient, labels, check, share)
    result.backward(gradient)
    return value


def backward_in_slabs(
    training: Training, h: Tensor, labels: Tensor, check: Callable[[Tensor], None], share: float
) -> Tensor:
    """The loss of the classes found in `h`, (B, 2C, X, Y, Z), which is overwritten by its gradient.

    Slab by slab along X, so that the K-class logits never exist whole. The loss depends on sums over all voxels: a
    first pass finds the sums, and with them how the loss changes with each; a second the gradients of each slab's part.
    """
    classify, loss = training.network.classify, training.loss
    slabs = slabs_along_x(classify, h)
    with torch.no_grad():
        parts = [loss.sums(convolve(classify, h[:, :, slab]), labels[:, slab]) for slab in slabs]
    sums = [torch.stack(part).sum(dim=0).requires_grad_() for part in zip(*parts, strict=True)]
    value = loss.of_sums(sums, labels.numel())
    check(value)
    slopes = torch.autograd.grad(value * share, sums)
    for slab in slabs:
        part = h[:, :, slab].clone().requires_grad_()
        sums = loss.sums(convolve(classify, part), labels[:, slab])
        change = sum((slope * each).sum() for slope, each in zip(slopes, sums, strict=True))
        training.scaler.scale(change).backward()
        h[:, :, slab] = part.grad
    return value.detach()


class RunningLoss:
    """The loss of a step that a GPU may still be at work on: on its way to the processor, which does not wait for it.

    Args:
        loss: a scalar, from `training_step`.
        where: epoch, step and case, for the sentence that says that it is not finite.
    """

    def __init__(self, loss: Tensor, where: str):
        self.where = where
        self.value = loss.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def read(self) -> float:
        """Wait for the step, but not for those launched behind it.

        Raises:
            NotFiniteError: when the loss is NaN or infinite.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        loss = self.value.item()
        if not math.isfinite(loss):
            raise NotFiniteError(f"{self.where}: the loss is {loss}; a lower --learning-rate may help")
        return loss


@torch.no_grad()
def validation_step(training: Training, image: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The loss for a batch and the class of every voxel, (B, X, Y, Z) uint8, in less memory than any training step."""
    classify = training.network.classify
    h = features(training.network, image, training.precision, keep=False)
    parts, predicted = [], torch.empty_like(labels, dtype=torch.uint8)
    for slab in slabs_along_x(classify, h):
        logits = convolve(classify, h[:, :, slab])
        parts.append(training.loss.sums(logits, labels[:, slab]))
        predicted[:, slab] = logits.argmax(dim=1)
    sums = [torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True)]
    return training.loss.of_sums(sums, labels.numel()).item(), predicted


def slabs_along_x(classify: nn.Conv3d, h: Tensor) -> list[slice]:
    """Cut the X axis of `h`, (B, C, X, Y, Z), so that the float32 logits of one slab stay within SLAB_BYTES."""
    thickness = max(1, SLAB_BYTES // (4 * classify.out_channels * h[:, 0, 0].numel()))
    return [slice(x, x + thickness) for x in range(0, h.shape[2], thickness)]
