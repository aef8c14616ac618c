"""Set up training: device, precision, deterministic mode, the network's options, EMA, and `Training`."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.grad import conv3d_weight
from torch.utils.data import Dataset

from core.checkpoint import check_same_shapes
from core.config import Config
from core.scans.organ_words import mirrored_ids
from core.system.processes import Group
from core.training.losses import Loss
from core.training.low_memory import is_supported
from core.training.muon import Muon

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNUSED_CUDNN = (90800, 91500)  # from the first version that torch leaves out in 3-D to the first that it uses again
PLANS = ("off", "low", "lowest")  # memory plans, from the fastest to the smallest (core/training/step.py)


@dataclass
class Training:
    """All that a training step works with.

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
        ema: exponential moving average of the weights, or None.
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
    ema: "EMA | None" = None
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
        self.weights = {name: value.detach().clone() for name, value in network.named_parameters()}

    def load(self, saved: dict[str, Tensor], path: Path) -> None:
        """Take over the averaged weights of the checkpoint at `path`; those of another network are a ValueError."""
        check_same_shapes(saved, self.weights, f"{path}: its EMA weights are another network's")
        for name, weight in saved.items():
            self.weights[name].copy_(weight)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move the average a step towards the network's weights."""
        torch._foreach_lerp_(list(self.weights.values()), list(network.parameters()), 1 - self.decay)

    @contextmanager
    def in_place(self, network: nn.Module) -> Iterator[None]:
        """Give the network the averaged weights until the block ends."""
        own = {name: parameter.data for name, parameter in network.named_parameters()}
        try:
            for name, parameter in network.named_parameters():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in network.named_parameters():
                parameter.data = own[name]


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


# ---- Device and precision --------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """Return the device of that name, a GPU as this process's current one; "auto" is the first GPU if there is one.

    Raises:
        ValueError: when it is a GPU that does not exist, or that this torch has no kernels for.
    """
    # Fewer fragments of memory; read when CUDA starts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    device = torch.device(device.type, device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device: got {name}, but torch sees {torch.cuda.device_count()} GPUs; expected auto or cpu")
    check_kernels(device)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # or float32 would be computed with 10 bits of precision
    return device


def check_kernels(device: torch.device) -> None:
    """Raise a ValueError when torch was built without kernels for a GPU.

    Kernels of sm_XY run on cards of the same X and at least Y; those of compute_XY on every newer card as well.
    """
    card = torch.cuda.get_device_capability(device)
    built = torch.cuda.get_arch_list()
    found = [(kind, divmod(int(number), 10)) for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(built))]
    if found and not any(of <= card and (kind == "compute" or of[0] == card[0]) for kind, of in found):
        raise ValueError(
            f"device: {torch.cuda.get_device_name(device)} has compute capability {card[0]}.{card[1]}, but this torch "
            f"{torch.__version__} was built for {' '.join(built)}; install another build of torch, or take --device cpu"
        )


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions are computed in; float32 means no mixed precision.

    Raises:
        ValueError: when the device cannot train in what was asked for.
    """
    if device.type == "cpu":
        if precision == "fp16":
            raise ValueError("precision: got fp16 on a CPU, expected auto, float32 or bf16")
        if precision == "bf16" and not has_right_gradients(torch.bfloat16):
            raise ValueError("precision: got bf16 on a CPU whose gradients are wrong in it; expected auto or float32")
        return DTYPES["float32" if precision == "auto" else precision]
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise ValueError(
            f"precision: got bf16, which {torch.cuda.get_device_name(device)} lacks; expected auto or fp16"
        )
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp16"
    check_cudnn(precision)
    return DTYPES[precision]


def has_right_gradients(precision: torch.dtype) -> bool:
    """Tell whether this CPU works out the weight gradients of 5x5x5 convolutions over few voxels in `precision`.

    The deepest stages have such. oneDNN (torch 2.13) gives infinities for them in bf16 on processors without AMX.
    """
    random = torch.Generator().manual_seed(0)
    for size in ((2, 2, 2), (3, 2, 2), (4, 4, 3)):
        x, gradient = (torch.randn(1, 32, *size, generator=random).to(precision) for _ in range(2))
        shape = (32, 32, 5, 5, 5)
        got = conv3d_weight(x, shape, gradient, padding=2).float()
        expected = conv3d_weight(x.float(), shape, gradient.float(), padding=2)
        if not torch.allclose(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item()):
            return False
    return True


def check_cudnn(precision: str) -> None:
    """Raise a ValueError for a cuDNN that torch does not use for 3-D convolutions in that precision.

    Some of its kernels gave wrong results. Without them torch unrolls the volume, which needs tens of GiB
    (pytorch issues 163539, 166643 and 174051).
    """
    version = torch.backends.cudnn.version()
    first, last = UNUSED_CUDNN
    if precision == "float32" or version is None or not first <= version < last:
        return
    cuda = (torch.version.cuda or "12").split(".")[0]
    found = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
    raise ValueError(
        f"precision: {precision} with cuDNN {found}; torch uses no 9.8 to 9.14 for 3-D convolutions in {precision}; "
        f"pip install --upgrade 'nvidia-cudnn-cu{cuda}>=9.15', or take --precision float32"
    )


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which the network runs: mixed precision, or none for float32."""
    return torch.autocast(device.type, dtype=precision, enabled=precision in (torch.bfloat16, torch.float16))


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
            raise ValueError(
                f"{got} with accumulation_steps, whose micro-batches would each have their own statistics; expected "
                "instance or group"
            )
    if config.augment and config.augment_flip:
        mirrored_ids(config.organs)  # refuses a side without a partner
    if config.compile and config.memory not in ("auto", "off"):
        raise ValueError(f"compile: got true with memory: {config.memory}, expected false, or memory: auto or off")
    if config.memory in ("low", "lowest") and not is_supported(network):
        raise ValueError(
            f"memory: got {config.memory} for a {name}, expected auto or off: the plans low and lowest know V-Net alone"
        )
    if config.init_output_bias:
        output_convolution(network, len(config.organs))


def seed_torch(seed: int, deterministic: bool) -> None:
    """Seed torch's random numbers and choose algorithms: deterministic ones, or else the fastest."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses without it
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # torch imports its compiler for it, a second
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that takes time
    torch.backends.cudnn.deterministic = deterministic
    # Off on purpose: trying cuDNN's algorithms takes gigabytes of workspace and picks other ones in every run.
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(seed)


def fit_network(network: nn.Module, config: Config, device: torch.device) -> nn.Module:
    """Move a new network to the device, and apply channels_last and compile.

    Raises:
        ValueError: when torch.compile does not work here.
    """
    network.to(device)
    if config.channels_last:
        to_channels_last(network)
    if config.compile:
        compile_network(network, device)
    return network


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
