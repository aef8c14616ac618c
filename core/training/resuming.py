"""What a resumed run must have in common with the run so far: settings, cases, number of processes.

Each check raises a ValueError that names the run folder and the difference.
"""

from pathlib import Path
from typing import Any

from core.config import Config, config_to_dict
from core.system.exits import print_warning

# Settings that a resumed run may have of its own. For data_dir the cases are compared; init_from has done its work.
MAY_CHANGE = (
    "run_dir", "data_dir", "cache_dir", "init_from", "max_gib", "workers", "device", "memory", "compile",
    "checkpoint_minutes", "tensorboard",
)  # fmt: skip


def check_same_settings(folder: Path, before: Config, config: Config, extend: bool) -> None:
    """Check that the run so far had these settings, but for MAY_CHANGE and, with `extend`, fewer epochs."""
    now, then = config_to_dict(config), config_to_dict(before)
    may_change = [*MAY_CHANGE]
    if extend:
        if before.schedule != "constant" or now["epochs"] < then["epochs"]:
            raise ValueError(
                f"--extend: the run had schedule {before.schedule} and {before.epochs} epochs, this has "
                f"{config.epochs}; expected the schedule constant, whose rate does not depend on the epochs, "
                "and more epochs"
            )
        may_change.append("epochs")
    if now["memory"] != then["memory"]:
        print_warning(f"memory was {then['memory']}, is {now['memory']}: from here on the last bits may differ")
    changed = [key for key in now if now[key] != then[key] and key not in may_change]
    if changed:
        how = "; ".join(f"{key} was {then[key]}, is {now[key]}" for key in changed)
        more = "--extend for more epochs, " if changed == ["epochs"] and now["epochs"] > then["epochs"] else ""
        raise ValueError(
            f"{folder}: cannot go on with other settings ({how}); give {more}the run's own, as in --config "
            f"{folder / 'config.yaml'} --run-dir {folder}, or start anew in another --run-dir"
        )


def check_same_run(folder: Path, checkpoint: dict[str, Any], cases: dict[str, list[str]], processes: int) -> None:
    """Check that the run so far, of this checkpoint, had the same cases and as many processes."""
    check_same_cases(folder, {"made": cases["made"]} | checkpoint["cases"], cases)
    check_same_processes(folder, checkpoint.get("processes"), processes)


def check_same_cases(folder: Path, before: dict[str, list[str]], now: dict[str, list[str]]) -> None:
    """Check that the run so far was trained on the same cases, else some held out would be trained on."""
    for part, what in (("train", "to train on"), ("val", "held out"), ("made", "with made labels")):
        changed = sorted(set(before[part]) ^ set(now[part]))
        if changed:
            raise ValueError(
                f"{folder}: cannot go on with other cases; {what} only before or only now: "
                f"{', '.join(changed[:5])}; start anew in another --run-dir"
            )


def check_same_processes(folder: Path, before: int | None, now: int) -> None:
    """Check that the run so far had as many processes: each step takes a batch of each. None: not known."""
    if before not in (None, now):
        raise ValueError(
            f"{folder}: cannot go on in {now} process(es), the run had {before}, and so many cases in a step "
            "for each of one; start it by torchrun as before, or anew with --init-from in another --run-dir"
        )
