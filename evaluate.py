"""Score label maps against reference label maps.

    python evaluate.py --predictions predictions --labels data/FLARE22Train/labels --output scores \
        --cases runs/vnet/val_cases.txt

Writes OUTPUT/metrics.csv (a row per case and organ) and OUTPUT/summary.json, and prints a table per organ.
Exit code 0: done, 1: some case could not be scored (the others are), 2: wrong usage.
"""

import argparse
import csv
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.config import DEFAULT_CONFIG, load_organs
from core.exits import DONE, REFUSED, USAGE, print_error, refusing, run_command
from core.files import whole_file
from core.metrics import SCORES, confusion_matrix, organ_scores
from core.preprocess import check_same_grid, load_labels
from dataset import find_label_maps, select_cases

COLUMNS = ("case", "id", "organ", *SCORES, "reference_ml", "predicted_ml")
DEFINITIONS = {
    "dice": "2 TP / (2 TP + FP + FN), voxels of one organ in one case",
    "precision": "TP / (TP + FP); null where nothing was predicted",
    "recall": "TP / (TP + FN); null where there is nothing to find",
    "accuracy": "(TP + TN) / all voxels, one organ against the rest; near 1 even for an organ wholly missed",
    "mean": "over organs, of each organ's mean over the cases where its score is defined",
}


def score_case(case: str, reference: Path, prediction: Path, organs: Sequence[str]) -> list[dict]:
    """The rows of metrics.csv for one case, an organ each; NaN where a score is not defined.

    Raises:
        FileNotFoundError, ValueError: when a file cannot be read, has an unknown id, or another grid.
    """
    expected, geometry = load_labels(reference, len(organs))
    predicted, predicted_geometry = load_labels(prediction, len(organs))
    check_same_grid(geometry, predicted_geometry, f"case {case}", "the reference", "the prediction")
    matrix = confusion_matrix(expected, predicted, len(organs))
    scores = organ_scores(matrix)
    reference_ml = matrix.sum(axis=1) * geometry.voxel_ml
    predicted_ml = matrix.sum(axis=0) * geometry.voxel_ml
    return [
        {"case": case, "id": i, "organ": organ}
        | {name: float(scores[name][i]) for name in SCORES}
        | {"reference_ml": float(reference_ml[i]), "predicted_ml": float(predicted_ml[i])}
        for i, organ in enumerate(organs[1:], start=1)
    ]


def summarise(rows: Sequence[dict], organs: Sequence[str]) -> dict:
    """For each organ and score: mean, sd, median and n over the cases where it is defined; and means over organs."""
    per_organ = {
        organ: {name: spread([row[name] for row in rows if row["organ"] == organ]) for name in SCORES}
        for organ in organs[1:]
    }
    means = {name: spread([scores[name]["mean"] for scores in per_organ.values()])["mean"] for name in SCORES}
    return {"mean": means, "organs": per_organ}


def spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation and median of the values that are defined (not None, not NaN), and their number.

    What is itself not defined, or infinite, is None: JSON knows neither.
    """
    defined = np.array([value for value in values if value is not None and not math.isnan(value)])
    infinite = int(np.isinf(defined).sum())
    median = float(np.median(defined)) if len(defined) else math.inf
    return {
        "mean": float(defined.mean()) if len(defined) and not infinite else None,
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 and not infinite else None,
        "median": median if math.isfinite(median) else None,
        "n": len(defined),
        "n_infinite": infinite,
    }


def format_table(summary: dict, cases: int) -> str:
    """The summary as text: a line per organ, the mean over organs below."""
    lines = [f"{'organ':<22}{'n':>4}" + "".join(f"{name:>11}" for name in ("Dice", "sd", *SCORES[1:]))]
    for organ, scores in summary["organs"].items():
        dice, others = scores["dice"], [scores[name]["mean"] for name in SCORES[1:]]
        lines.append(format_line(organ, dice["n"], [dice["mean"], dice["sd"], *others]))
    mean = summary["mean"]
    lines.append(format_line("mean over organs", "", [mean["dice"], None, *(mean[name] for name in SCORES[1:])]))
    lines.append(f"n: of {cases} cases, those with the organ in reference or prediction. Background is in no mean.")
    lines.append("accuracy: near 1 even for an organ that was wholly missed; read Dice.")
    return "\n".join(lines)


def format_line(name: str, n: int | str, values: Sequence[float | None]) -> str:
    """A line of the table; "-" for what is not defined."""
    return f"{name:<22}{n:>4}" + "".join(f"{'-' if value is None else f'{value:.4f}':>11}" for value in values)


def write_metrics(path: Path, rows: Sequence[dict]) -> None:
    """Write metrics.csv; an empty cell is a score that is not defined."""
    with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            numbers = {
                name: "" if math.isnan(value) else f"{value:.6g}" for name, value in row.items() if type(value) is float
            }
            writer.writerow(row | numbers)


def main() -> int:
    """Score the cases one by one, then write and print what came out."""
    arguments = parse_arguments()
    output = Path(arguments.output)
    with refusing(USAGE):
        organs = load_organs(arguments.config)
        references = select_cases(find_label_maps(arguments.labels), arguments.cases)
        predictions = find_label_maps(arguments.predictions)
        output.mkdir(parents=True, exist_ok=True)
        # Whoever may not write there learns it now, not after the work.
        tempfile.TemporaryFile(dir=output).close()

    rows, scored, failed = [], [], []
    for case, reference in tqdm(references.items(), desc="cases", disable=None):
        try:
            if case not in predictions:
                raise FileNotFoundError(f"case {case}: no prediction in {arguments.predictions}")
            rows += score_case(case, reference, predictions[case], organs)
            scored.append(case)
        except (ValueError, OSError, MemoryError) as error:
            print_error(error if case in str(error) else ValueError(f"case {case}: {error}"))
            failed.append(case)
    summary = {"protocol": "default", **summarise(rows, organs), "cases": scored, "failed": failed}
    summary["definitions"] = DEFINITIONS
    with refusing(USAGE):
        write_metrics(output / "metrics.csv", rows)
        with whole_file(output / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    print(format_table(summary, len(scored)))
    print(f"{len(scored)} of {len(references)} cases scored into {output}: metrics.csv, summary.json")
    return REFUSED if failed else DONE


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Score label maps against reference label maps.")
    parser.add_argument("--predictions", required=True, metavar="DIR", help="folder of CASE.nii.gz from infer.py")
    parser.add_argument("--labels", required=True, metavar="DIR", help="folder of reference CASE.nii.gz")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for metrics.csv and summary.json")
    parser.add_argument("--cases", nargs="+", metavar="ID", help="only these cases: ids, or a file with one a line")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="settings that list the organs")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
