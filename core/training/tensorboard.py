"""TensorBoard, an optional package (train.py --tensorboard)."""

import math
from pathlib import Path
from typing import Any


def check_tensorboard() -> None:
    """Raise a ValueError when the package that writes for TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"tensorboard: got true, but the package cannot be imported ({error}); pip install tensorboard"
        ) from error


def write_scalars(folder: Path, row: dict[str, Any]) -> None:
    """Write an epoch's numbers for TensorBoard, in place of those of the same or a later epoch."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder, purge_step=row["epoch"]) as writer:
        for name, value in row.items():
            if name != "epoch" and value is not None and math.isfinite(value):
                group, _, rest = name.partition("_")
                writer.add_scalar(f"dice/{rest}" if group == "dice" else name, value, row["epoch"])
