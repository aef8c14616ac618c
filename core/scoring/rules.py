"""The rules of scoring that evaluate.py's command line asks for."""

import argparse
import math
from collections.abc import Sequence

from core.config import Config, check, load_config
from core.scans.nifti import Reading
from core.scans.organ_words import standard_name
from core.scoring.case import Rules, Task
from core.scoring.flare22 import TOLERANCE_MM, TOLERANCES_MM, tolerance_mm, unknown_names
from core.scoring.organ_list import choose_organs, choose_scored, load_given
from core.system.exits import print_warning
from core.system.parallel import MAX_WORKERS, cores


def make_rules(tasks: Sequence[Task], others: Sequence[Task], arguments: argparse.Namespace) -> tuple[Rules, int]:
    """Return the rules of scoring and the number of processes.

    Raises:
        FileNotFoundError, ValueError: when a flag or a file that it names is wrong, or predictions differ in organs.
    """
    given = load_given(arguments.config, arguments.checkpoint)
    groups = {"predictions": tasks, "predictions of --against": others}
    groups = {name: [task.prediction for task in group if task.prediction] for name, group in groups.items()}
    organs, note = choose_organs(given, groups | {"references": [task.reference for task in tasks]})
    scored = choose_scored(arguments.organs, organs)
    if arguments.protocol == "flare22":
        for doubt in unknown_names([organs[organ] for organ in scored], complete=arguments.organs is None):
            print_warning(f"--protocol flare22: {doubt}")
    if not 0 <= arguments.tolerance_mm < math.inf:
        raise ValueError(f"--tolerance-mm: got {arguments.tolerance_mm}, expected millimetres of 0 or more")
    fixed = [organs[organ] for organ in scored if standard_name(organs[organ]) in TOLERANCES_MM]
    if fixed and arguments.tolerance_mm != TOLERANCE_MM:
        print_warning(f"--tolerance-mm: does not change FLARE22's tolerances, which {', '.join(fixed)} have")
    size, crop = grid_of(arguments, given or load_config()) if arguments.ceiling else (None, "none")
    workers = min(arguments.workers or min(cores(), MAX_WORKERS), len(tasks))
    rules = Rules(
        organs=organs,
        scored=scored,
        organs_note=note,
        tolerances_mm=tuple(tolerance_mm(organ, arguments.tolerance_mm) for organ in organs),
        protocol=arguments.protocol,
        distances=arguments.distances,
        size=size,
        crop=crop,
        threads=max(1, cores() // workers),
        reading=Reading(check("max_gib", arguments.max_gib, "--max-gib"), arguments.assume_ras),
    )
    return rules, workers


def grid_of(arguments: argparse.Namespace, settings: Config) -> tuple[tuple[int, int, int], str]:
    """Return the size of the grid whose ceiling is wanted and what it covers: as flags say, else as settings do."""
    size = check("size", arguments.size, "--size") if arguments.size else settings.size
    crop = check("crop", arguments.crop or settings.crop, "--crop")
    if crop == "body":
        raise ValueError(
            "--crop: got body, which takes the scans, but --ceiling reads label maps; expected none or organs"
        )
    return size, crop
