"""Choose the device and the number type that convolutions are computed in; refuse what does not work there."""

import math
import os
import re
from collections.abc import Sequence

import torch
from torch.nn.grad import conv3d_weight

from core.config import Config

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNUSED_CUDNN = (90800, 91500)  # from the first version that torch leaves out in 3-D to the first that it uses again
MAX_CHECKED_VOXELS = 4096  # of a stage whose gradients are checked; in larger ones they are right, and take time


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
    # Or float32 would be computed with 10 bits of precision. Some containers switch it on; Muon would diverge.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
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


def training_precision(config: Config, device: torch.device) -> torch.dtype:
    """Return the type that training computes convolutions in, as `choose_precision`.

    Raises:
        ValueError: also when the CPU's gradients are wrong in bf16, in a stage of a network of that size.
    """
    precision = choose_precision(config.precision, device)
    if device.type == "cpu" and precision == torch.bfloat16:
        stages = [[n // 2**halvings for n in config.input_size] for halvings in range(len(config.down_convs))]
        for size in stages:
            if 0 < math.prod(size) <= MAX_CHECKED_VOXELS and not has_right_gradients(precision, size):
                raise ValueError(
                    f"precision: got bf16, in which this CPU's gradients are wrong for {' x '.join(map(str, size))} "
                    f"voxels, where an input of {' '.join(map(str, config.input_size))} voxels leads; expected auto or "
                    "float32, or a larger size or patch_size"
                )
    return precision


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions are computed in; float32 means no mixed precision.

    Raises:
        ValueError: when the device does not compute in what was asked for.
    """
    if device.type == "cpu":
        if precision == "fp16":  # hundreds of times the seconds of float32, on a processor that has bf16 (RESULTS.md)
            raise ValueError("precision: got fp16 on a CPU, where it is very slow; expected auto, float32 or bf16")
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


def has_right_gradients(precision: torch.dtype, size: Sequence[int]) -> bool:
    """Tell whether this CPU works out the weight gradient of a 5x5x5 convolution over `size` voxels in `precision`.

    In bf16 on processors without AMX, oneDNN (torch 2.13) gives infinities where no axis has more than 4 voxels.
    """
    random = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(1, 32, *size, generator=random).to(precision) for _ in range(2))
    shape = (32, 32, 5, 5, 5)
    got = conv3d_weight(x, shape, gradient, padding=2).float()
    expected = conv3d_weight(x.float(), shape, gradient.float(), padding=2)
    return torch.allclose(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


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
