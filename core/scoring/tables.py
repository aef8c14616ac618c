"""Tables of scores as text: for a terminal of 100 columns, or in Markdown."""

import textwrap
from collections import Counter
from collections.abc import Sequence

from core.scoring.case import CEILING_SCORES, Rules

COLUMNS = 100  # of the terminal that text is wrapped for
NAME_WIDTH = 20  # of an organ; longer names are cut in their middle, so that 100 columns are enough
FEW_CASES = 10  # below this number, a bootstrap interval is too narrow to rely on
NOT_DEFINED = "-"


def score_table(summary: dict, cases: int, markdown: bool = False) -> str:
    """Return a table with a line per organ, the mean over organs, and notes below.

    Args:
        summary: "mean", "organs" and "interval_95" as in summary.json.
        cases: number of cases in it.
        markdown: True for Markdown, False for a terminal.
    """
    full = "hd95_mm" in summary["mean"]  # the challenge has Dice and NSD alone
    header = ["organ", "n", "Dice", "sd", "NSD"]
    lines = []
    for organ, scores in summary["organs"].items():
        dice = scores["dice"]
        line = [organ, str(dice["n"]), decimals(dice["mean"]), decimals(dice["sd"]), decimals(scores["nsd"]["mean"])]
        if full:
            line.append(distance(scores["hd95_mm"]))
            for name in ("precision", "recall"):
                line += [decimals(scores[name]["mean"]), str(scores[name]["n"])]
            line.append(decimals(scores["accuracy"]["mean"]))
        lines.append(line)
    mean = summary["mean"]
    last = ["mean over organs", "", decimals(mean["dice"]), "", decimals(mean["nsd"])]
    if full:
        header += ["HD95 mm", "precision", "n", "recall", "n", "accuracy"]
        any_infinite = any(scores["hd95_mm"]["n_infinite"] for scores in summary["organs"].values())
        hd95 = "inf" if any_infinite else decimals(mean["hd95_mm"], 2)
        last += [hd95, decimals(mean["precision"]), "", decimals(mean["recall"]), "", decimals(mean["accuracy"])]
    return "\n".join([lay_out([header, *lines, last], markdown), "", *score_notes(summary, cases, full)])


def score_notes(summary: dict, cases: int, full: bool) -> list[str]:
    """Return the notes that explain the table, in lines of at most 100 columns."""
    notes = []
    intervals = {name: ends for name, ends in summary["interval_95"].items() if ends}
    if intervals:
        ends = ", ".join(
            f"{label} {decimals(intervals[name][0])} to {decimals(intervals[name][1])}"
            for name, label in (("dice", "Dice"), ("nsd", "NSD"))
            if name in intervals
        )
        few = ": too few" if cases < FEW_CASES else ""
        notes.append(f"Mean, 95 % interval: {ends} (bootstrap, {cases} cases{few}).")
    if not full:
        notes.append(f"n: of {cases} cases. flare22: the challenge's rules; an organ in neither label map scores 1.")
        return notes
    notes.append(f"n: of {cases} cases, those in which the score is defined. Background is in no mean.")
    if any(scores["hd95_mm"]["n_infinite"] for scores in summary["organs"].values()):
        notes.append("HD95: infinite where the organ is in one label map only; * median, for the mean is infinite.")
    notes.append("accuracy: one organ against the rest, near 1 even for an organ wholly missed; read Dice.")
    return notes


def print_notes(summary: dict, rules: Rules) -> None:
    """Print below a table which organs have no reference or no annotation, and where the organ names come from."""
    for note in (absent_note(summary, rules), annotated_note(summary), rules.organs_note):
        if note:
            print(textwrap.fill(note, COLUMNS, break_long_words=False, break_on_hyphens=False))


def absent_note(summary: dict, rules: Rules) -> str | None:
    """Return a sentence on the organs that are in no reference, and how they count; None when there are none."""
    absent = summary["in_no_reference"]
    if not absent:
        return None
    note = f"{len(absent)} of {len(rules.scored)} organs are in no reference: {', '.join(absent)}; "
    note += "--organs chooses which are scored."
    predicted = [name for name in absent if summary["organs"][name]["dice"]["n"]]
    if rules.protocol == "flare22":
        note += " flare22 counts them as 1 where they are not predicted either, else as 0."
    elif predicted:
        which = "all of them" if predicted == absent else ", ".join(predicted)
        note += f" Predicted all the same, and so counted as Dice 0: {which}."
    return note


def annotated_note(summary: dict) -> str | None:
    """Return a sentence on the organs without a score because they are not annotated; None when there are none."""
    counts = Counter(name for names in summary["not_annotated"].values() for name in names)
    if not counts:
        return None
    listed = ", ".join(f"{name} ({count} of {len(summary['cases'])} cases)" for name, count in counts.items())
    return f"Not annotated by annotated.csv, and so not scored: {listed}."


def ceiling_table(summary: dict, size: Sequence[int], crop: str, markdown: bool = False) -> str:
    """Return the table of ceiling.json: Dice and NSD by organ that the grid allows, with notes."""
    lines = [["organ", "n", "Dice", "NSD", "Dice as labels", "NSD as labels"]]
    for organ, scores in summary["organs"].items():
        lines.append([organ, str(scores["dice"]["n"]), *(decimals(scores[name]["mean"]) for name in CEILING_SCORES)])
    lines.append(["mean over organs", "", *(decimals(summary["mean"][name]) for name in CEILING_SCORES)])
    what = "The organs' boxes of references" if crop == "organs" else "References"
    return "\n".join(
        [
            lay_out(lines, markdown),
            "",
            f"{what} on {'x'.join(map(str, size))} voxels and back on the scans' grids; the rest is resolution.",
            "Dice, NSD: restored from the organs' exact shares of every voxel there, all that a voxel can tell.",
            "as labels: restored from the labels that the network is trained on there.",
        ]
    )


def comparison_table(name: str, compared: dict, markdown: bool = False) -> str:
    """Return a table that compares two sets of predictions by one score: the mean of a case, and each organ."""
    lines = [[name, "n", "predictions", "against", "difference", "95 % interval", "p"]]
    for organ, pair in (("mean of a case", compared["mean"]), *compared["organs"].items()):
        ends = pair["interval_95"]
        interval = f"{ends[0]:+.4f} to {ends[1]:+.4f}" if ends else NOT_DEFINED
        difference = NOT_DEFINED if pair["difference"] is None else f"{pair['difference']:+.4f}"
        p = NOT_DEFINED if pair["p"] is None else f"{pair['p']:.2g}"
        means = [decimals(pair["mean"]), decimals(pair["other_mean"])]
        lines.append([organ, str(pair["n"]), *means, difference, interval, p])
    table = lay_out(lines, markdown)
    if any(pair["n_unpaired"] for pair in compared["organs"].values()):
        table += "\n\nn: pairs; some cases have the score on one side only (n_unpaired in comparison.json)."
    return table


def comparison_text(comparison: dict, markdown: bool = False) -> str:
    """Return the tables of comparison.json, Dice and NSD, with a note.

    Args:
        comparison: "dice", "nsd", "cases" and "missing" as in comparison.json.
        markdown: True for Markdown, False for a terminal.
    """
    tables = [comparison_table(title, comparison[name], markdown) for name, title in (("dice", "Dice"), ("nsd", "NSD"))]
    cases = len(comparison["cases"])
    missed = len({case for names in comparison["missing"].values() for case in names})
    but = f", {missed} of them without a prediction on one side, compared as missed" if missed else ""
    note = f"difference: predictions - against, over {cases} cases{but}; p: Wilcoxon's signed-rank test, not corrected."
    return "\n\n".join([*tables, textwrap.fill(note, COLUMNS)])


def lay_out(lines: Sequence[Sequence[str]], markdown: bool) -> str:
    """Return lines of cells as text, the header first; the first column is aligned left, numbers right."""
    if not markdown:
        lines = [[shorten(line[0], NAME_WIDTH), *line[1:]] for line in lines]
    least = 3 if markdown else 1  # characters of Markdown's rule below the header
    widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def shorten(name: str, letters: int) -> str:
    """Shorten a name that is longer than `letters` in its middle: ids of cases and sides of organs are at the end."""
    return name if len(name) <= letters else f"{name[: letters // 2 - 1]}…{name[-letters // 2 :]}"


def decimals(value: float | None, places: int = 4) -> str:
    """Return a number with that many decimals."""
    return NOT_DEFINED if value is None else f"{value:.{places}f}"


def distance(scores: dict) -> str:
    """Return a distance's mean in mm; the median with a mark when the mean is infinite."""
    if not scores["n_infinite"]:
        return decimals(scores["mean"], 2)
    return "inf*" if scores["median"] is None else f"{scores['median']:.2f}*"
