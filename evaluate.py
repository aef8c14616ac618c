"""Score label maps against reference label maps, of this network or any other.

    python evaluate.py --predictions predictions --labels data/FLARE22Train/labels --output scores \
        --cases runs/vnet/val_cases.txt
    python evaluate.py --predictions predictions --labels DIR --output scores --organs liver "left kidney"
    python evaluate.py --predictions predictions --against others --labels data/FLARE22Train/labels --output scores
    python evaluate.py --ceiling --labels data/FLARE22Train/labels --size 256 256 128 --output scores

The first writes OUTPUT/metrics.csv (a row per case and organ), OUTPUT/summary.json and OUTPUT/scores.png, and prints a
table per organ. The second does so for some organs only. The third compares two sets of predictions as well
(comparison.json, other_metrics.csv). The fourth measures what the network's grid costs (ceiling.csv, ceiling.json).
Organ names come from --config or --checkpoint, else from the label maps themselves, else from config.yaml.
Exit code 0: done, 1: some case was missing or refused (the others are scored), 2: wrong usage, 3: had to stop.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from core.scans.files import find_label_maps, select_cases
from core.scans.nifti import MAX_GIB
from core.scoring.case import Rules, Task
from core.scoring.cases import mark_annotated, name_unpaired, pair_up, score_cases
from core.scoring.ceiling import score_ceiling
from core.scoring.flare22 import TOLERANCE_MM
from core.scoring.results import CEILING_RESULTS, RESULTS, prepare_output, write_comparison, write_summary
from core.scoring.rules import make_rules
from core.scoring.tables import comparison_text, print_notes, score_table
from core.system.exits import DONE, REFUSED, STOPPED, USAGE, print_warning, refusing, run_command
from core.system.files import user_path
from core.system.parallel import MAX_WORKERS


def main() -> int:
    """Score predictions, or the network's grid."""
    arguments = parse_arguments()
    with refusing(USAGE):
        references = find_label_maps(arguments.labels)
        chosen = select_cases(references, arguments.cases)
        if arguments.ceiling:
            tasks, others, extra = [Task(case, reference) for case, reference in chosen.items()], [], []
        else:
            tasks, extra = pair_up(arguments.predictions, references, chosen)
            others, _ = pair_up(arguments.against, references, chosen) if arguments.against else ([], [])
        rules, workers = make_rules(tasks, others, arguments)
        tasks = mark_annotated(tasks, arguments.labels, rules.organs, references)
        others = mark_annotated(others, arguments.labels, rules.organs)
        prepare_output(arguments.output, CEILING_RESULTS if arguments.ceiling else RESULTS)
    with refusing(STOPPED):  # results that cannot be written
        if arguments.ceiling:
            return score_ceiling(tasks, rules, workers, arguments.output, arguments.table == "md")
        return score_predictions(tasks, others, extra, rules, workers, arguments)


def score_predictions(
    tasks: Sequence[Task],
    others: Sequence[Task],
    extra: Sequence[str],
    rules: Rules,
    workers: int,
    arguments: argparse.Namespace,
) -> int:
    """Score the predictions, and those of --against; write, draw and print the results; return the exit code."""
    output, markdown = arguments.output, arguments.table == "md"
    missing = name_unpaired(tasks, extra, arguments.predictions)
    results = score_cases(tasks, rules, workers, output / "metrics.csv")
    summary = write_summary(output, results, rules, missing, extra)
    print(score_table(summary, len(summary["cases"]), markdown))
    print_notes(summary, rules)
    written = ["metrics.csv", "summary.json", *(draw_picture(output) if summary["cases"] else [])]
    failed = bool(missing or summary["refused"])
    if others:
        without = {"predictions": missing, "against": name_unpaired(others, [], arguments.against)}
        other_results = score_cases(others, rules, workers, output / "other_metrics.csv")
        comparison = write_comparison(output, results, other_results, rules, without)
        print(f"\n{comparison_text(comparison, markdown)}")
        failed |= bool(without["against"]) or any(scored.refusal for scored in other_results.values())
        written += ["other_metrics.csv", "comparison.json"]
    but = f", {len(summary['missing'])} of them as missed" if summary["missing"] else ""
    but += f", {len(summary['refused'])} refused" if summary["refused"] else ""
    print(f"{len(summary['cases'])} of {len(tasks)} cases scored{but}, into {output}: {', '.join(written)}")
    return REFUSED if failed else DONE


def draw_picture(output: Path) -> list[str]:
    """Draw scores.png from metrics.csv; return its name, or nothing when it cannot be drawn."""
    try:
        from visualization.scores import draw_scores

        draw_scores(output / "metrics.csv", output / "scores.png")
        return ["scores.png"]
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print_warning("no scores.png, since matplotlib is not installed")
    except OSError as error:
        print_warning(f"no scores.png: {error}")
    return []


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score label maps against reference label maps.")
    folder = partial(parser.add_argument, type=user_path, metavar="DIR")
    file = partial(parser.add_argument, type=user_path, metavar="FILE")
    folder("--predictions", help="folder of CASE.nii.gz from infer.py, or any network's")
    folder("--labels", required=True, help="folder of reference CASE.nii.gz")
    folder("--output", required=True, help="folder for the results")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    file("--config", help="settings that name the organs (default: the label maps do)")
    file("--checkpoint", help="network whose settings name the organs")
    parser.add_argument("--organs", nargs="+", metavar="NAME", help="score only these organs (default: all)")
    parser.add_argument("--protocol", choices=("default", "flare22"), default="default", help="rules of scoring")
    parser.add_argument(
        "--tolerance-mm", type=float, default=TOLERANCE_MM, metavar="MM",
        help=f"of NSD, for organs that FLARE22 does not have (default: {TOLERANCE_MM:g})",
    )  # fmt: skip
    parser.add_argument("--distances", action="store_true", help="hd_mm and mean_distance_mm too, in the files only")
    folder("--against", help="other predictions of the same cases, to compare with")
    parser.add_argument("--ceiling", action="store_true", help="score the labels on the network's grid and back")
    parser.add_argument("--size", nargs=3, type=int, metavar=tuple("XYZ"), help="that grid (default: the settings')")
    parser.add_argument("--crop", metavar="WHAT", help="none or organs: what it covers (default: the settings')")
    parser.add_argument("--workers", type=int, metavar="N", help=f"processes (default: cores, at most {MAX_WORKERS})")
    parser.add_argument("--max-gib", type=float, default=MAX_GIB, metavar="G", help="largest label map, as float32")
    parser.add_argument("--assume-ras", action="store_true", help="take files without a place in the patient as RAS+")
    parser.add_argument("--table", choices=("text", "md"), default="text", help="md: print tables in Markdown")
    arguments = parser.parse_args()
    if arguments.ceiling and (arguments.predictions or arguments.against or arguments.distances):
        parser.error("--ceiling takes --labels and --size; leave out --predictions, --against and --distances")
    if not arguments.ceiling and (arguments.size or arguments.crop or not arguments.predictions):
        parser.error("expected --predictions DIR, or --ceiling (which takes --size and --crop)")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers: got {arguments.workers}, expected 1 or more")
    if arguments.protocol == "flare22" and arguments.distances:
        parser.error("--distances: the flare22 protocol has none; leave it out or take the default protocol")
    return arguments


if __name__ == "__main__":
    run_command(main)
