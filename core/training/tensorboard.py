"""TensorBoard, an optional package (train.py --tensorboard)."""

import math
from pathlib import Path
from typing import Any


def check_tensorboard(run_dir: str | Path) -> None:
    """Raise a ValueError when the package that writes for TensorBoard is not installed, or cannot write into a run."""
    if str(run_dir).encode(errors="ignore").decode() != str(run_dir):  # TensorBoard's writer refuses such a path
        raise ValueError(f"tensorboard: got true with run_dir {run_dir!s}, expected a folder whose name is UTF-8")
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
