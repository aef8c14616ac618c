"""Where a result comes from: versions and commit."""

import platform
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import torch


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "numpy": np.__version__,
        "nibabel": nibabel.__version__,
    }


def git_commit() -> str | None:
    """Return the commit of this checkout, with "+" appended when files have changed; None outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    return done.stdout.strip() if done.returncode == 0 else None
