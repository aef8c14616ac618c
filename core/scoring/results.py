"""The result files of evaluate.py: metrics.csv, summary.json, comparison.json, ceiling.json, and their contents."""

import csv
import io
import json
import math
import platform
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from core.scoring import statistics
from core.scoring.case import COMPARED, DIGITS, Rules, Scored
from core.system.files import read_text, rename_old, write_text

Results = dict[str, Scored]  # by case

# All files that a run may write. Those of an earlier run are removed first: they would pass for results of this one.
RESULTS = ("metrics.csv", "other_metrics.csv", "summary.json", "comparison.json", "scores.png")
CEILING_RESULTS = ("ceiling.csv", "ceiling.json")
# The meaning of each score under each protocol, written into the JSON files.
SCORE_DEFINITIONS = {
    "default": {
        "dice": "2 TP / (2 TP + FP + FN), voxels of one organ in one case; null where it is in neither label map",
        "precision": "TP / (TP + FP); null where nothing was predicted",
        "recall": "TP / (TP + FN); null where there is nothing to find",
        "accuracy": "(TP + TN) / all voxels, one organ against the rest; near 1 even for an organ wholly missed",
        "nsd": "share of both surfaces' area within tolerances_mm of the other, as surface-distance defines it; 0 "
        "where the organ is in one label map only, null where it is in neither",
        "hd95_mm": "distance within which 95 % of a surface's area lies of the other, the larger of the two ways; "
        "infinite where the organ is in one label map only: mean and sd are null then",
        "hd_mm": "as hd95_mm, for 100 %",
        "mean_distance_mm": "mean distance to the other surface over both surfaces' area; infinite as hd95_mm",
        "missing": "cases without a prediction, scored as if an empty label map had been predicted",
    },
    "flare22": {
        "dice": "as the challenge's script: 1 where the organ is in neither label map; aorta, inferior vena cava and "
        "esophagus only within the reference's slices without the last of them; rounded to 4 places",
        "nsd": "as the challenge's script: within the same slices, 1 where the organ is in neither label map, 0 where "
        "Dice is below 0.2; rounded to 4 places",
        "missing": "cases without a prediction, with 0 for every organ",
    },
}
# The meaning of everything else in the JSON files.
INTERVAL = (
    f"percentile bootstrap over cases, {statistics.BOOTSTRAP_SAMPLES} samples, seed {statistics.BOOTSTRAP_SEED}; "
    "too narrow for few cases, null for fewer than two"
)
DEFINITIONS = {
    "summary": {
        "voxel_accuracy": "share of all voxels of a case with the right id, background included; over the cases",
        "mean": "over organs, of each organ's mean over the cases where its score is defined; null where infinite",
        "interval_95": f"95 % interval of mean: {INTERVAL}",
        "refused": "cases of which a file could not be read or compared, and why; they are in no mean",
        "in_no_reference": "scored organs that no reference holds; a prediction that holds one counts as Dice 0",
        "not_annotated": "organs by case that annotated.csv does not list for it; they have no score there",
        "extra": "predictions of cases without a reference; they are not looked at",
        "rounding": f"the rows have {DIGITS} significant digits, and everything else is computed from those",
    },
    "comparison": {
        "difference": "mean over the pairs of (predictions - against)",
        "mean": "of each case's mean over the organs that are defined on that side",
        "n": "pairs where both are defined; n_unpaired: cases where one is",
        "interval_95": f"95 % interval of difference: {INTERVAL}",
        "p": "Wilcoxon's signed-rank test, two-sided (scipy's default), 1 where no pair differs; not corrected for the "
        "number of organs; with fewer than 6 pairs it cannot fall below 0.05",
        "left_out": "cases that were refused on either side",
        "missing": "cases without a prediction on a side, compared as missed there",
    },
    "ceiling": {
        "dice, nsd": "the reference as each organ's share of every voxel of the grid, restored like a network's answer",
        "dice_as_labels, nsd_as_labels": "the reference as the labels that a network is trained on there, resized back",
    },
}


def csv_text(rows: Sequence[dict], columns: Sequence[str], header: bool = False) -> str:
    """Return rows as CSV; a score that is not defined, or not known to the protocol, is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    if header:
        writer.writeheader()
    for row in rows:
        writer.writerow({name: format_cell(value) for name, value in row.items()})
    return text.getvalue()


def format_cell(value: str | int | float) -> str | int:
    """Return a value as the CSV file shows it."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.{DIGITS}g}"


def summary_of(results: Results, rules: Rules) -> dict:
    """Return the content of summary.json that follows from the scores; refused cases are in no mean."""
    tables = tables_of(results, results, rules)
    return {
        "protocol": rules.protocol,
        **statistics.summarise(tables, rules.names),
        "interval_95": {name: statistics.bootstrap_interval(tables[name]) for name in COMPARED},
        "cases": [case for case, scored in results.items() if not scored.refusal],
        "refused": {case: scored.refusal for case, scored in results.items() if scored.refusal},
        "in_no_reference": organs_in_no_reference(results, rules),
        "not_annotated": {
            case: [rules.organs[organ] for organ in scored.not_annotated]
            for case, scored in results.items()
            if scored.not_annotated
        },
        "tolerances_mm": {rules.organs[organ]: rules.tolerances_mm[organ] for organ in rules.scored},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "nibabel", "torch")},
        "definitions": DEFINITIONS["summary"] | SCORE_DEFINITIONS[rules.protocol],
    }


def organs_in_no_reference(results: Results, rules: Rules) -> list[str]:
    """Return the scored organs that no reference holds, although one annotates them; none when no case was scored."""
    scored = [of_case for of_case in results.values() if not of_case.refusal]
    looked_for = {organ for of_case in scored for organ in rules.scored if organ not in of_case.not_annotated}
    found = frozenset().union(*(of_case.in_reference for of_case in scored))
    return [rules.organs[organ] for organ in rules.scored if organ in looked_for - found]


def write_summary(output: Path, results: Results, rules: Rules, missing: Sequence[str], extra: Sequence[str]) -> dict:
    """Write summary.json of predictions and return its content.

    Args:
        output: the folder.
        results: by case.
        rules: how they were scored.
        missing: cases without a prediction.
        extra: predictions without a reference.
    """
    summary = summary_of(results, rules) | {
        "voxel_accuracy": statistics.spread([scored.voxel_accuracy for scored in results.values()]),
        "missing": [case for case in missing if not results[case].refusal],
        "extra": list(extra),
    }
    write_json(output / "summary.json", summary)
    return summary


def tables_of(results: Results, cases: Iterable[str], rules: Rules) -> dict[str, np.ndarray]:
    """Return by score the table (cases, organs) of those of `cases` that are not refused."""
    rows = [results[case].rows for case in cases if not results[case].refusal]
    shape = (len(rows), len(rules.scored))
    return {
        name: np.array([row[name] for of_case in rows for row in of_case], dtype=float).reshape(shape)
        for name in rules.scores
    }


def write_comparison(
    output: Path, results: Results, other: Results, rules: Rules, missing: dict[str, Sequence[str]]
) -> dict:
    """Compare two sets of predictions of the same cases pair by pair; write comparison.json and return its content.

    `missing` holds the cases without a prediction by side: predictions, against.
    """
    cases = [case for case in results if not results[case].refusal and not other[case].refusal]
    here, there = tables_of(results, cases, rules), tables_of(other, cases, rules)
    comparison = {
        "protocol": rules.protocol,
        **{name: statistics.compare_tables(here[name], there[name], rules.names) for name in COMPARED},
        "cases": cases,
        "left_out": [case for case in results if case not in cases],
        "missing": {side: [case for case in names if case in cases] for side, names in missing.items()},
        "definitions": DEFINITIONS["comparison"],
    }
    write_json(output / "comparison.json", comparison)
    return comparison


def prepare_output(output: Path, results: Sequence[str]) -> None:
    """Make the folder for the results, and remove those of an earlier run; other programs' files become *.old.

    Raises:
        OSError: when it cannot be written to.
    """
    output.mkdir(parents=True, exist_ok=True)
    # A folder that cannot be written to is refused now, not after the work.
    tempfile.TemporaryFile(dir=output).close()
    foreign = [name for name in results if not is_result(output / name)]
    for name in results:
        if name in foreign:
            rename_old(output / name, "not known to be a result of evaluate.py")
        else:
            (output / name).unlink(missing_ok=True)


def is_result(path: Path) -> bool:
    """Return True when the content of a file is that of our results; a picture's is judged by the table beside it."""
    path = path.with_name("metrics.csv") if path.suffix == ".png" else path
    text = read_text(path) if path.exists() else ""
    if path.suffix == ".csv":
        return text.startswith("case,id,organ,")
    try:
        content = json.loads(text)
    except ValueError:
        return False
    return isinstance(content, dict) and {"protocol", "definitions"} <= content.keys()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
