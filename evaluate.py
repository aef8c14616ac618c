"""Score label maps against reference label maps, of this network or any other.

    python evaluate.py --predictions predictions --labels data/FLARE22Train/labels --output scores \
        --cases runs/vnet/val_cases.txt
    python evaluate.py --predictions predictions --against others --labels data/FLARE22Train/labels --output scores
    python evaluate.py --ceiling --labels data/FLARE22Train/labels --size 256 256 128 --output scores

The first writes OUTPUT/metrics.csv (a row per case and organ), OUTPUT/summary.json and OUTPUT/scores.png, and prints a
table per organ. The second compares two sets of predictions as well (comparison.json, other_metrics.csv). The third
says what the network's grid costs (ceiling.csv, ceiling.json).
Exit code 0: done, 1: some case was missing or refused (the others are scored), 2: wrong usage, 3: had to stop.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tqdm import tqdm

from core.config import DEFAULT_CONFIG, check, load_config
from core.scans.files import find_label_maps, listed, select_cases
from core.scans.nifti import MAX_GIB, Reading
from core.scoring.case import Rules, Scored, Task, score_case
from core.scoring.flare22 import TOLERANCE_MM, TOLERANCES_MM
from core.scoring.results import (
    CEILING_RESULTS,
    DEFINITIONS,
    RESULTS,
    comparison_of,
    csv_text,
    prepare_output,
    summary_of,
    write_json,
)
from core.scoring.statistics import (
    spread,
)
from core.scoring.tables import ceiling_table, comparison_table, score_table
from core.system.exits import DONE, REFUSED, USAGE, print_error, refusing, run_command
from core.system.files import whole_file
from core.system.parallel import MOST_WORKERS, cores, in_processes

# ---- All cases -------------------------------------------------------------------------------------------------------


def score_all(tasks: Sequence[Task], rules: Rules, workers: int, path: Path) -> dict[str, Scored]:
    """Score the cases in parallel, and name on stderr those that are refused.

    The rows of a case reach the CSV file `path` when it is done, so that a break loses no finished case; at the end
    they are put in the order of the cases.

    Raises:
        MemoryError: when a worker was killed.
        OSError: when the file cannot be written.
    """
    organs = len(rules.organs) - 1
    done: dict[str, Scored] = {}
    with open(path, "w", newline="") as file, tqdm(total=len(tasks) * organs, unit="organ", disable=None) as bar:
        file.write(csv_text([], rules.columns, header=True))
        file.flush()
        # Another process tells of whole cases only.
        score = partial(score_case, rules=rules, **({"tick": bar.update} if workers == 1 else {}))
        with closing(in_processes(score, tasks, workers)) as finished:
            for task, scored in finished:
                done[task.case] = scored
                if scored.refusal:
                    print_error(ValueError(scored.refusal))
                file.write(csv_text(scored.rows, rules.columns))
                file.flush()
                bar.update(len(done) * organs - bar.n)
    in_order = {task.case: done[task.case] for task in tasks}
    rows = [row for scored in in_order.values() for row in scored.rows]
    with whole_file(path) as temporary:
        temporary.write_text(csv_text(rows, rules.columns, header=True), newline="")
    return in_order


# ---- The command -----------------------------------------------------------------------------------------------------


def main() -> int:
    """Score predictions, or the network's grid."""
    arguments = parse_arguments()
    with refusing(USAGE):
        references = find_label_maps(arguments.labels)
        chosen = select_cases(references, arguments.cases)
        workers = min(arguments.workers or min(cores(), MOST_WORKERS), len(chosen))
        rules = read_rules(arguments, threads=max(1, cores() // workers))
        if arguments.ceiling:
            return score_ceiling(chosen, rules, workers, arguments)
        return score_predictions(references, chosen, rules, workers, arguments)


def score_predictions(
    references: dict[str, Path], chosen: dict[str, Path], rules: Rules, workers: int, arguments: argparse.Namespace
) -> int:
    """Score the predictions of the chosen cases, and those of --against; write, draw and print what came out."""
    output, markdown = Path(arguments.output), arguments.table == "md"
    tasks, extra = pair_up(arguments.predictions, references, chosen)
    other_tasks, _ = pair_up(arguments.against, references, chosen) if arguments.against else ([], [])
    prepare_output(output, RESULTS)
    if extra:
        print(f"warning: {arguments.predictions}: no reference for {len(extra)}: {listed(extra)}", file=sys.stderr)
    missing = name_missing(tasks, arguments.predictions)
    results = score_all(tasks, rules, workers, output / "metrics.csv")
    summary = summary_of(results, rules) | {
        "voxel_accuracy": spread([scored.voxel_accuracy for scored in results.values()]),
        "missing": [case for case in missing if not results[case].refusal],
        "extra": extra,
    }
    write_json(output / "summary.json", summary)
    written = ["metrics.csv", "summary.json"]
    if summary["cases"]:
        written += draw_picture(output)
    print(score_table(summary, len(summary["cases"]), markdown))
    failed = bool(missing or summary["refused"])
    if other_tasks:
        failed |= bool(name_missing(other_tasks, arguments.against))
        other = score_all(other_tasks, rules, workers, output / "other_metrics.csv")
        comparison = comparison_of(results, other, rules)
        write_json(output / "comparison.json", comparison)
        written += ["other_metrics.csv", "comparison.json"]
        print_comparison(comparison, markdown)
        failed |= any(scored.refusal for scored in other.values())
    but = f", {len(summary['missing'])} of them as missed" if summary["missing"] else ""
    but += f", {len(summary['refused'])} refused" if summary["refused"] else ""
    print(f"{len(summary['cases'])} of {len(chosen)} cases scored{but}, into {output}: {', '.join(written)}")
    return REFUSED if failed else DONE


def score_ceiling(chosen: dict[str, Path], rules: Rules, workers: int, arguments: argparse.Namespace) -> int:
    """Score the truth pushed through the grid; write and print what came out."""
    output = Path(arguments.output)
    prepare_output(output, CEILING_RESULTS)
    tasks = [Task(case, reference) for case, reference in chosen.items()]
    summary = summary_of(score_all(tasks, rules, workers, output / "ceiling.csv"), rules) | {"size": rules.size}
    summary["definitions"] |= DEFINITIONS["ceiling"]
    write_json(output / "ceiling.json", summary)
    print(ceiling_table(summary, rules.size, arguments.table == "md"))
    print(f"{len(summary['cases'])} of {len(chosen)} cases pushed through, into {output}: {', '.join(CEILING_RESULTS)}")
    return REFUSED if summary["refused"] else DONE


def pair_up(folder: str, references: dict[str, Path], chosen: dict[str, Path]) -> tuple[list[Task], list[str]]:
    """The chosen cases with their predictions in a folder, and the folder's cases that have no reference.

    Raises:
        FileNotFoundError, ValueError: when the folder holds no prediction of any reference's case.
    """
    predictions = find_label_maps(folder)
    if not predictions.keys() & references.keys():
        raise ValueError(
            f"{folder}: none of its label maps ({listed(list(predictions), 3)}) belongs to a case of the references "
            f"({listed(list(references), 3)}); a prediction is CASE.nii.gz"
        )
    tasks = [Task(case, reference, predictions.get(case)) for case, reference in chosen.items()]
    return tasks, [case for case in predictions if case not in references]


def name_missing(tasks: Sequence[Task], folder: str) -> list[str]:
    """The cases without a prediction in the folder, each named on stderr."""
    missing = [task.case for task in tasks if task.prediction is None]
    for case in missing:
        print_error(FileNotFoundError(f"case {case}: no prediction in {folder}; scored as missed"))
    return missing


def draw_picture(output: Path) -> list[str]:
    """Draw scores.png from metrics.csv; the names of what was drawn: none without matplotlib, which is optional."""
    try:
        from visualization.scores import draw_scores
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("warning: no scores.png, since matplotlib is not installed", file=sys.stderr)
        return []
    draw_scores(output / "metrics.csv", output / "scores.png")
    return ["scores.png"]


def print_comparison(comparison: dict, markdown: bool) -> None:
    """Print what --against adds."""
    for name, title in (("dice", "Dice"), ("nsd", "NSD")):
        print(f"\n{comparison_table(title, comparison[name], markdown)}")
    cases = len(comparison["cases"])
    print(f"\ndifference: predictions - against, over {cases} cases; p: Wilcoxon's signed-rank test, not corrected.")


def read_rules(arguments: argparse.Namespace, threads: int) -> Rules:
    """The rules of scoring that the command line asks for, with `threads` for each case.

    Raises:
        FileNotFoundError, ValueError: when the settings file is no good, or a value.
    """
    config = load_config(arguments.config)
    if not 0 <= arguments.tolerance_mm < math.inf:
        raise ValueError(f"--tolerance-mm: got {arguments.tolerance_mm}, expected millimetres of 0 or more")
    size = None
    if arguments.ceiling:
        size = check("size", arguments.size, "--size") if arguments.size else config.size
    return Rules(
        organs=config.organs,
        tolerances_mm=tuple(TOLERANCES_MM.get(organ, arguments.tolerance_mm) for organ in config.organs),
        protocol=arguments.protocol,
        distances=arguments.distances,
        size=size,
        threads=threads,
        reading=Reading(check("max_gib", arguments.max_gib, "--max-gib"), arguments.assume_ras),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score label maps against reference label maps.")
    parser.add_argument("--predictions", metavar="DIR", help="folder of CASE.nii.gz from infer.py, or any network's")
    parser.add_argument("--labels", required=True, metavar="DIR", help="folder of reference CASE.nii.gz")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="settings that list the organs")
    parser.add_argument("--protocol", choices=("default", "flare22"), default="default", help="whose rules")
    parser.add_argument(
        "--tolerance-mm", type=float, default=TOLERANCE_MM, metavar="MM",
        help=f"of NSD, for organs that FLARE22 does not have (default: {TOLERANCE_MM:g})",
    )  # fmt: skip
    parser.add_argument("--distances", action="store_true", help="hd_mm and mean_distance_mm too, in the files only")
    parser.add_argument("--against", metavar="DIR", help="other predictions of the same cases, to compare with")
    parser.add_argument("--ceiling", action="store_true", help="score the labels pushed through the network's grid")
    parser.add_argument("--size", nargs=3, type=int, metavar=tuple("XYZ"), help="that grid (default: that of --config)")
    parser.add_argument("--workers", type=int, metavar="N", help=f"processes (default: cores, at most {MOST_WORKERS})")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest label map, as float32")
    parser.add_argument("--assume-ras", action="store_true", help="files that do not say where they lie are RAS+")
    parser.add_argument("--table", choices=("text", "md"), default="text", help="md: print tables in Markdown")
    arguments = parser.parse_args()
    if arguments.ceiling and (arguments.predictions or arguments.against or arguments.distances):
        parser.error("--ceiling takes --labels and --size; leave out --predictions, --against and --distances")
    if not arguments.ceiling and (arguments.size or not arguments.predictions):
        parser.error("expected --predictions DIR, or --ceiling (which takes --size)")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, expected 1 or more")
    if arguments.protocol == "flare22" and arguments.distances:
        parser.error("--distances: the flare22 protocol has none; leave it out or take the default protocol")
    return arguments


if __name__ == "__main__":
    run_command(main)
