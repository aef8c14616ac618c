"""Measurements against peers; what they share: the machine they ran on, and how they answer."""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from core.system.provenance import git_commit, versions

CPU_INFO = Path("/proc/cpuinfo")  # Linux only; elsewhere platform tells less


def machine() -> dict[str, Any]:
    """Return what a number depends on: processor, card, memory in GiB, versions and commit."""
    names = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **versions(),
        "monai": installed_version("monai"),
        "commit": git_commit(),
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def print_result(table: list[str], result: dict[str, Any], json_only: bool) -> None:
    """Print the table, unless only JSON is asked for, and the result as one line of JSON at the end."""
    if not json_only:
        print("\n".join(table))
    print(json.dumps(result, allow_nan=False))
