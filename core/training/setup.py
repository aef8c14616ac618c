"""Set up a training run: device, precision, optimiser, and the state of training."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.config import Config
from core.network import build_network
from core.system.processes import Group
from core.training.losses import Loss
from vnet import VNet

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        max_grad_norm: the largest norm of a step's gradient, all weights together; 0 for any.
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
    max_grad_norm: float = 0.0
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
            # Not Module.to, which cannot do it to tensors without memory (core/training/memory_plans.py).
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


def start_training(config: Config, device: torch.device, group: Group) -> Training:
    """Network, optimiser and the rest as the settings say, before the first step.

    Raises:
        ValueError: when the settings ask for what the device cannot do, or for what does not go together.
    """
    precision = choose_precision(config.precision, device)
    if group.size > 1 and config.norm == "batch":
        raise ValueError(
            f"norm: got batch with {group.size} processes, each of which would have statistics of its own; expected "
            "instance or group"
        )
    if config.accumulation_steps > 1 and config.norm == "batch":
        raise ValueError(
            "norm: got batch with accumulation_steps, whose pieces would each have statistics of their own; expected "
            "instance or group"
        )
    be_deterministic(config.deterministic)
    torch.manual_seed(config.seed)  # the same first weights in every process
    # Off on purpose: trying cuDNN's algorithms takes gigabytes of workspace and picks other ones in every run.
    torch.backends.cudnn.benchmark = False
    network = build_network(config).to(device)
    if config.channels_last:
        to_channels_last(network)
    if config.compile:
        if config.memory not in ("auto", "off"):
            raise ValueError(f"compile: got true with memory: {config.memory}, expected false, or memory: auto or off")
        compile_network(network, device)
    optimizer = make_optimizer(network, config.learning_rate)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    loss = Loss(config.loss, config.deterministic)
    return Training(
        network,
        loss,
        optimizer,
        scaler,
        precision,
        max_grad_norm=config.max_grad_norm,
        pieces=config.accumulation_steps,
    )


def be_deterministic(wanted: bool) -> None:
    """Have torch take algorithms that give the same bits each time, or refuse to compute; or the fastest ones."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for looking for faults; it takes time
    torch.backends.cudnn.deterministic = wanted


@torch.no_grad()
def start_from_shares(network: VNet, dataset: Dataset, group: Group) -> None:
    """Set the last convolution's bias so that the network starts from the classes' shares of the training voxels.

    The bias is the logarithm of the shares (Karpathy 2019, "A Recipe for Training Neural Networks"): the first epochs
    then need not find out that nearly all is background. A class without a voxel counts as having one.
    """
    classes = len(network.classify.bias)
    share = range(group.rank, len(dataset), group.size)
    counts = sum(torch.bincount(dataset[i]["labels"].flatten(), minlength=classes) for i in share)
    counts = sum(group.gather(counts + torch.zeros(classes, dtype=torch.long))).clamp(min=1)
    network.classify.bias.copy_((counts / counts.sum()).log())
