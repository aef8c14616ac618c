"""Score many cases: pair predictions with references, work in parallel, and lose no finished case."""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.scans.annotated import annotated_classes, read_annotated, warn_of_unknown_names
from core.scans.files import data_set_of, find_label_maps, label_folder, listed, prediction_folder
from core.scans.not_found import looked_for
from core.scoring.case import Rules, Scored, Task, score_case
from core.scoring.results import csv_text
from core.system.exits import print_error, print_warning
from core.system.files import naming, open_text, write_text
from core.system.parallel import in_processes

Score = Callable[[Task, Rules], Scored]


def pair_up(folder: Path, references: dict[str, Path], chosen: dict[str, Path]) -> tuple[list[Task], list[str]]:
    """Return the chosen cases with their predictions in a folder, and the folder's cases that have no reference.

    Raises:
        FileNotFoundError, ValueError: when the folder holds no prediction of any reference's case.
    """
    predictions = find_label_maps(folder, references)
    if not predictions.keys() & references.keys():
        raise ValueError(
            f"{folder}: none of its label maps ({listed(list(predictions), 3)}) belongs to a case of the references "
            f"({listed(list(references), 3)}); a prediction is CASE.nii.gz"
        )
    tasks = [Task(case, reference, predictions.get(case)) for case, reference in chosen.items()]
    pairs = [(task.case, os.path.realpath(task.reference), os.path.realpath(task.prediction or "")) for task in tasks]
    same = [case for case, reference, prediction in pairs if reference == prediction]
    if same:
        print_warning(
            f"{folder}: {len(same)} of {len(tasks)} predictions are the references themselves: {listed(same, 3)}"
        )
    return tasks, [case for case in predictions if case not in references]


def mark_annotated(
    tasks: Sequence[Task], labels: Path, organs: Sequence[str], ids: Collection[str] | None = None
) -> list[Task]:
    """Note in each task which organs its reference annotates, by the annotated.csv beside a folder named `labels`.

    With the `ids` of all references, lines of other cases and names that are no organs are warned of.

    Raises:
        ValueError: when that file is damaged.
    """
    data_dir = data_set_of(label_folder(labels))
    annotated = read_annotated(data_dir, ids) if data_dir else {}
    if ids:
        warn_of_unknown_names(annotated.values(), organs)
    known = {case: tuple(np.flatnonzero(annotated_classes(of, organs)).tolist()) for case, of in annotated.items()}
    return [replace(task, annotated=known.get(task.case)) for task in tasks]


def name_unpaired(tasks: Sequence[Task], extra: Sequence[str], folder: Path) -> list[str]:
    """Name on stderr the cases without a prediction in the folder, and its predictions `extra` without a reference.

    Returns:
        the cases without a prediction.
    """
    if extra:
        print_warning(f"{folder}: no reference for {len(extra)}: {listed(extra)}")
    missing = [task.case for task in tasks if task.prediction is None]
    for case in missing:
        hint = looked_for(case, prediction_folder(folder), [task.prediction for task in tasks if task.prediction])
        print_error(FileNotFoundError(f"case {case}: no prediction in {folder}; scored as missed; {hint}"))
    return missing


def score_cases(
    tasks: Sequence[Task], rules: Rules, workers: int, path: Path, score: Score = score_case
) -> dict[str, Scored]:
    """Score the cases in parallel, and name on stderr those that are refused.

    The rows of a case reach the CSV file `path` as soon as it is done: a run that breaks off loses no finished case.
    At the end the rows are put in the order of the cases.

    Raises:
        MemoryError: when a worker was killed.
        OSError: when the file cannot be written.
    """
    done: dict[str, Scored] = {}
    with naming(path), open_text(path, "w") as file, tqdm(total=len(tasks), unit="case", disable=None) as bar:
        file.write(csv_text([], rules.columns, header=True))
        file.flush()
        one = partial(score_or_refuse, score=score, rules=rules)
        with closing(in_processes(one, tasks, workers)) as finished:
            for task, scored in finished:
                done[task.case] = scored
                if scored.refusal:
                    print_error(ValueError(scored.refusal))
                file.write(csv_text(scored.rows, rules.columns))
                file.flush()
                bar.update()
    in_order = {task.case: done[task.case] for task in tasks}
    rows = [row for scored in in_order.values() for row in scored.rows]
    write_text(path, csv_text(rows, rules.columns, header=True))
    return in_order


def score_or_refuse(task: Task, score: Score, rules: Rules) -> Scored:
    """Score one case; return its refusal when something is wrong with its files."""
    try:
        return score(task, rules)
    except (ValueError, OSError, MemoryError) as error:
        reason = str(error) or "memory ran out"
        named = reason.startswith((f"case {task.case}:", str(task.reference), str(task.prediction)))
        return Scored(refusal=reason if named else f"case {task.case}: {reason}")
