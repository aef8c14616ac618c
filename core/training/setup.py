"""Set up training: deterministic mode, the network's options, the optimizer, EMA, and `Training`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.checkpoint import check_same_shapes
from core.config import Config
from core.scans.organ_words import mirrored_ids
from core.system.exits import print_warning
from core.system.processes import Group
from core.training.losses import Loss
from core.training.low_memory import is_supported
from core.training.muon import Muon

PLANS = ("off", "low", "lowest")  # memory plans, from the fastest to the smallest (core/training/step.py)


@dataclass
class Training:
    """State of training: network, loss, optimizer, and how a step is computed.

    Attributes:
        network: maps images (B, 1, X, Y, Z) to logits (B, K, X, Y, Z).
        loss: maps logits and labels to a scalar.
        optimizer: of the network's parameters.
        scaler: enabled for fp16 alone, whose small gradients would underflow otherwise.
        precision: the type that convolutions are computed in; float32 means no mixed precision.
        max_grad_norm: largest norm of a step's gradient over all weights; 0: no clipping.
        accumulation_steps: micro-batches that a batch is computed in, one after the other.
        plan: one of PLANS.
        any_process: tells whether a value is true in any process of the run; asked once a step.
        has_freed_memory: True after memory ran out once and the same plan was tried again.
        patch_size: voxels X Y Z of what the network sees of a larger grid at a time; None: all of it.
        ema: exponential moving average of the weights, or None.
        never_annotated: (K,) bool on the CPU, the classes that no training case annotates. The loss treats them as
            annotated, so they are learned as absent; else nothing tells them from the background. None: there are none.
        average_gradients: (network, loss) -> loss; where several processes share a batch, it replaces gradients and
            loss by those of the whole batch.
    """

    network: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: torch.dtype
    max_grad_norm: float = 0.0
    accumulation_steps: int = 1
    plan: str = "off"
    any_process: Callable[[bool], bool] = bool
    has_freed_memory: bool = False
    patch_size: Sequence[int] | None = None
    ema: "EMA | None" = None
    never_annotated: Tensor | None = None
    average_gradients: Callable[[nn.Module, Tensor], Tensor] = lambda network, loss: loss

    def ema_weights(self) -> AbstractContextManager:
        """Return a context in which the network has the averaged weights, where there are any."""
        return self.ema.in_place(self.network) if self.ema else nullcontext()


class EMA:
    """Exponential moving average of a network's weights over the steps.

    Args:
        network: whose weights the average starts from.
        decay: weight of the old average in each step, 0 to 1; 0.99 averages over about 100 steps.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in all_names(network)}

    def load(self, saved: dict[str, Tensor], path: Path) -> None:
        """Take over the averaged weights of the checkpoint at `path`; those of another network are a ValueError."""
        check_same_shapes(saved, self.weights, f"{path}: its EMA weights are another network's")
        for name, weight in saved.items():
            self.weights[name].copy_(weight)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average a step towards the network's weights."""
        torch._foreach_lerp_(list(self.weights.values()), [value for _, value in all_names(network)], 1 - self.decay)

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Give the network the averaged weights until the block ends."""
        own = {name: parameter.data for name, parameter in all_names(network)}
        try:
            for name, parameter in all_names(network):
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in all_names(network):
                parameter.data = own[name]


def all_names(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has: a checkpoint holds a shared weight under each."""
    return network.named_parameters(remove_duplicate=False)


def make_optimizer(network: nn.Module, learning_rate: float, name: str = "adam") -> torch.optim.Optimizer:
    """Return fused Adam or Muon with its state: it allocates no state in a step, and skips it when found_inf is set."""
    if name == "muon":
        optimizer = Muon(network, learning_rate)
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    # A step of zero gradients makes the state and changes no weight. Made in the first real step, half of the state
    # would exist after running out of memory there.
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    return optimizer


# ---- Before the first step -------------------------------------------------------------------------------------------


def check_settings(config: Config, network: nn.Module, processes: int) -> None:
    """Check settings that each are right, but do not go together, or not with this network.

    Raises:
        ValueError: naming what does not go together.
    """
    name = type(network).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        got = "norm: got batch" if config.norm == "batch" else f"the network ({name}) has batch norm"
        if processes > 1:
            raise ValueError(
                f"{got} with {processes} processes, each of which would have its own statistics; expected instance or "
                "group"
            )
        if config.accumulation_steps > 1:
            got += " with accumulation_steps, whose micro-batches would each have their own statistics"
            raise ValueError(f"{got}; expected instance or group")
    if config.accumulation_steps > config.batch_size:
        got = f"accumulation_steps: got {config.accumulation_steps}, more than the cases of a batch that it splits"
        raise ValueError(f"{got}; expected at most {config.batch_size}, the batch_size")
    flips = config.augment and config.augment_flip
    if flips and mirrored_ids(config.organs) == list(range(len(config.organs))):  # refuses a side without a partner
        print_warning("augment_flip: no name of organs says right or left in English, so a flip swaps no ids")
    strengths = [field.name for field in fields(config) if field.name.startswith("augment_")]
    idle = [name for name in strengths if getattr(config, name) != getattr(Config(), name)]
    if idle and not config.augment:
        print_warning(f"{', '.join(idle)}: given without augment: true, so nothing is augmented")
    if config.compile and config.memory not in ("auto", "off"):
        raise ValueError(f"compile: got true with memory: {config.memory}, expected false, or memory: auto or off")
    if config.memory in ("low", "lowest") and not is_supported(network, training=True):
        raise ValueError(
            f"memory: got {config.memory} for a {name}, expected auto or off: the plans low and lowest know V-Net alone"
            ", without edits"
        )
    if config.init_output_bias:
        output_convolution(network, len(config.organs))
    for key, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{key} of the network ({name}) holds NaN or infinite numbers, which no checkpoint may hold; expected "
                "finite ones, or a buffer registered with persistent=False"
            )


def seed_torch(seed: int, deterministic: bool) -> None:
    """Seed torch's random numbers; use deterministic algorithms alone if asked to."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # torch imports its compiler for it, a second
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    torch.backends.cudnn.deterministic = deterministic
    # Off on purpose: trying cuDNN's algorithms takes gigabytes of workspace and picks other ones in every run.
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def move_network(network: nn.Module, config: Config, device: torch.device) -> None:
    """Move a new network to the device, and apply channels_last and compile.

    Raises:
        ValueError: when torch.compile does not work here.
    """
    network.to(device)
    if config.channels_last:
        to_channels_last(network)
    if config.compile:
        compile_network(network, device)


@torch.no_grad()
def to_channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions with the channels last, so that volumes are computed in that order too.

    This comes before the optimiser, whose state takes the order over. The scan itself has one channel, for which both
    orders are the same.
    """
    for parameter in network.parameters():
        if parameter.ndim == 5:
            # Not Module.to, which cannot convert tensors without memory (core/training/memory_count.py).
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile `network(image)`, which is called under the plan `off` alone; parameter names stay.

    Raises:
        ValueError: when torch.compile does not work, on a CPU for want of a C++ compiler.
    """
    sample = torch.zeros(2, device=device)
    try:
        torch.compile(lambda x: x + 1)(sample)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile: torch.compile does not work here ({reason}); expected false") from error
    network.compile()


def output_convolution(network: nn.Module, classes: int) -> nn.Conv3d:
    """Return the network's last convolution, which must have a bias and one channel a class.

    Raises:
        ValueError: when it has not.
    """
    last = [module for module in network.modules() if isinstance(module, nn.Conv3d)][-1:]
    if not last or last[0].bias is None or last[0].out_channels != classes:
        raise ValueError(
            f"init_output_bias: got true for a {type(network).__name__} whose last convolution is not one with a bias "
            f"and {classes} channels; expected false"
        )
    return last[0]


@torch.no_grad()
def initialise_output_bias(network: nn.Module, classes: int, dataset: Dataset, group: Group) -> None:
    """Set the last convolution's bias to the logarithm of the classes' shares of the training voxels.

    The network then starts from these shares instead of equal ones (Karpathy 2019, "A Recipe for Training Neural
    Networks"). A class without a voxel counts as having one.
    """
    share = range(group.rank, len(dataset), group.size)
    counts = sum(torch.bincount(dataset[i]["labels"].flatten(), minlength=classes) for i in share)
    counts = sum(group.gather(counts + torch.zeros(classes, dtype=torch.long))).clamp(min=1)
    output_convolution(network, classes).bias.copy_((counts / counts.sum()).log())
