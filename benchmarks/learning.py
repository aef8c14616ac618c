"""How well a recipe learns: train on all parts of a data set but one, segment and score that one, for each part.

    python -m benchmarks.learning DATA --recipe recipes/best.yaml --output runs/learning/best
    python -m benchmarks.learning DATA --recipe FILE --output OUT --folds 0 1 --size 64 64 48       # screening
    python -m benchmarks.learning DATA --recipe FILE --output OUT --against runs/learning/other     # paired

Flags that are not listed by --help go to train.py. The parts are runs of neighbouring ids. Each run takes `--steps`
steps, whatever the number of its training cases. A second call goes on where the first one stopped. Scores are those of
evaluate.py, on the scans' own grids; a mean is over the organs that the label maps have.
"""

import argparse
import csv
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measuring import machine, positive
from core.scoring.statistics import compare, mean_over
from core.system.exits import DONE, USAGE, refusing, run_command
from core.system.files import open_text, read_text, user_path, write_text
from dataset import find_cases, find_data

RESULT = "learning.json"


def main() -> int:
    """Train, segment and score every part with every seed; print the table."""
    arguments, settings = parse_arguments()
    runs = {}
    with refusing(USAGE):
        data_dir = find_data(arguments.data)
        ids = [case.id for case in find_cases(data_dir)]
        parts = [part.tolist() for part in np.array_split(ids, arguments.parts)]
        for seed in arguments.seeds:
            for fold in arguments.folds:
                epochs = math.ceil(arguments.steps / (len(ids) - len(parts[fold])))
                flags = ["--seed", str(seed), "--epochs", str(epochs), "--val-interval", str(epochs), *settings]
                folder = arguments.output / f"fold{fold}_seed{seed}"
                runs[f"fold {fold}, seed {seed}"] = learn(arguments, data_dir, parts[fold], folder, flags)
                print_table(runs)
        result = {"command": sys.argv, "machine": machine(), "runs": runs}
        write_text(arguments.output / RESULT, json.dumps(result, indent=2) + "\n")
        if arguments.against:
            print_comparison(runs, json.loads(read_text(arguments.against / RESULT))["runs"])
    return DONE


def learn(arguments: argparse.Namespace, data_dir: Path, held_out: Sequence[str], folder: Path, flags: list) -> dict:
    """Train without the `held_out` cases and score them; return the seconds of training and Dice by case and organ.

    Raises:
        OSError, ValueError: when a script fails, or the folder holds the result of another recipe.
    """
    made_by = {"recipes": [read_text(recipe) for recipe in arguments.recipe], "flags": flags, "held_out": held_out}
    result = folder / "result.json"
    if result.is_file():
        found = json.loads(read_text(result))
        if found["made_by"] != made_by:
            raise ValueError(f"{folder}: holds the result of another recipe or data set; give another --output")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    cases, log, seconds = ["--cases", *held_out], folder / "log.txt", 0.0
    *locators, network = [folder / f"train_{Path(recipe).stem}" for recipe in arguments.recipe]
    for recipe, run_dir in zip(arguments.recipe, [*locators, network], strict=True):
        common = ["--val-cases", *held_out, "--cache-dir", arguments.output.parent / "cache", "--resume", *flags]
        started = time.monotonic()
        run_script(["train.py", "--config", recipe, "--data-dir", data_dir, "--run-dir", run_dir, *common], log)
        seconds += time.monotonic() - started
    predictions, scores = folder / "predictions", folder / "scores"
    locate = [flag for run_dir in locators for flag in ("--locate", run_dir / "best.pt")]
    network = ["--checkpoint", network / "best.pt", *locate]  # validated only at the end: best.pt is the last
    run_script(["infer.py", data_dir, *cases, *network, "--output", predictions], log)
    run_script(["evaluate.py", "--predictions", predictions, "--labels", data_dir, *cases, "--output", scores], log)
    dice = {case: {} for case in held_out}
    with open_text(scores / "metrics.csv") as file:
        for row in csv.DictReader(file):
            if row["recall"]:  # empty where the reference does not hold the organ
                dice[row["case"]][row["organ"]] = float(row["dice"])
    found = {"made_by": made_by, "seconds": seconds, "dice": dice}
    write_text(result, json.dumps(found, indent=2) + "\n")
    return found


def run_script(command: Sequence[object], log: Path) -> None:
    """Run one of the scripts; what it prints goes to the end of `log`.

    Raises:
        ValueError: when it fails.
    """
    with open(log, "a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        code = subprocess.run([sys.executable, *map(str, command)], stdout=file, stderr=file, check=False).returncode
    if code:
        raise ValueError(f"{command[0]} ended with exit code {code}; {log} tells why")


def print_table(runs: dict[str, dict]) -> None:
    """Print mean Dice by organ and run, over the held-out cases; the last line is the mean over organs."""
    organs = organs_of(runs)
    tables = {name: dice_table(run, organs) for name, run in runs.items()}
    tables["mean"] = np.concatenate(list(tables.values()))
    print(f"\n{'Dice':20}", *(f"{name:>15}" for name in tables))
    by_organ = np.stack([mean_over(dice, axis=0) for dice in tables.values()], axis=1)
    for organ, row in zip(organs, by_organ, strict=True):
        print(f"{organ:20}", *(f"{value:15.4f}" for value in row))
    print(f"{'mean over organs':20}", *(f"{value:15.4f}" for value in mean_over(by_organ, axis=0)))
    print(f"{'seconds of training':20}", *(f"{run['seconds']:15.0f}" for run in runs.values()), flush=True)


def print_comparison(here: dict[str, dict], other: dict[str, dict]) -> None:
    """Print the mean difference in Dice, organ by organ, over the cases and seeds that both have."""
    shared = [name for name in here if name in other]
    if not shared:
        raise ValueError("--against: has no fold and seed in common with this one")
    organs = organs_of(here)
    if any(here[name]["dice"].keys() != other[name]["dice"].keys() for name in shared):
        raise ValueError("--against: its folds hold out other cases than these")
    tables = {name: [dice_table(runs[name], organs, here[name]["dice"]) for runs in (here, other)] for name in shared}
    pairs = [np.concatenate(side) for side in zip(*tables.values(), strict=True)]
    print(f"\nDifference in Dice over {len(pairs[0])} pairs of {', '.join(shared)}")
    for i, organ in enumerate(organs):
        print(f"{organ:20}{signed(compare(pairs[0][:, i], pairs[1][:, i])['difference']):>10}")
    found = compare(*(mean_over(dice, axis=1) for dice in pairs))
    interval = " to ".join(map(signed, found["interval_95"] or []))
    print(f"{'mean over organs':20}{signed(found['difference']):>10}   95 % {interval}, p {found['p']:.3f}")


def signed(value: float | None) -> str:
    """Return a difference with its sign; a dash where no case has the organ on both sides."""
    return "-" if value is None else f"{value:+.4f}"


def organs_of(runs: dict[str, dict]) -> list[str]:
    """List the organs that any case has, in their order."""
    return list(dict.fromkeys(organ for run in runs.values() for dice in run["dice"].values() for organ in dice))


def dice_table(run: dict, organs: Sequence[str], cases: Iterable[str] | None = None) -> np.ndarray:
    """Return (cases, organs) Dice of all or these cases, in this order; NaN where a reference lacks the organ."""
    return np.array([[run["dice"][case].get(organ, math.nan) for organ in organs] for case in cases or run["dice"]])


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the command line's arguments, and the flags for train.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=user_path, metavar="DATA", help="a data set as for train.py")
    recipe = "settings; of two files, the first is of the network that locates for the second, which is scored"
    parser.add_argument("--recipe", required=True, nargs="+", metavar="FILE", help=recipe)
    parser.add_argument("--output", required=True, type=user_path, metavar="DIR", help="folder for runs and results")
    parser.add_argument("--against", type=user_path, metavar="DIR", help="the --output of another recipe")
    parser.add_argument("--parts", type=positive, default=4, metavar="N", help="parts of the data (default: 4)")
    parser.add_argument("--folds", type=int, nargs="+", metavar="N", help="parts to hold out, from 0 (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--steps", type=positive, default=600, metavar="N", help="of a run (default: 600)")
    arguments, settings = parser.parse_known_args()
    if len(arguments.recipe) > 2:
        parser.error(f"--recipe: got {len(arguments.recipe)} files, expected one, or two of which the first locates")
    if arguments.folds is None:
        arguments.folds = list(range(arguments.parts))
    if not all(0 <= fold < arguments.parts for fold in arguments.folds):
        parser.error(f"--folds: expected numbers from 0 to {arguments.parts - 1}")
    return arguments, settings


if __name__ == "__main__":
    run_command(main)
