"""The ceiling that the network's grid sets: references resized to the grid and back, scored against themselves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from core.scans.crop import organs_box, whole_box
from core.scans.resample import apply_weights, axis_weights, logits_to_labels, resize_labels
from core.scoring.case import COMPARED, Rules, Scored, Task, keep_organs, outcome, read_label_map, score_organs
from core.scoring.cases import score_cases
from core.scoring.overlap import confusion_matrix
from core.scoring.results import CEILING_RESULTS, DEFINITIONS, summary_of, write_json
from core.scoring.tables import ceiling_table, print_notes
from core.system.exits import DONE, REFUSED


def score_ceiling(tasks: list[Task], rules: Rules, workers: int, output: Path, markdown: bool) -> int:
    """Score each reference after its way to the grid of `rules.size` and back; write and print the results.

    Returns:
        the command's exit code.

    Raises:
        MemoryError: when a worker was killed.
        OSError: when the results cannot be written.
    """
    results = score_cases(tasks, rules, workers, output / "ceiling.csv", measure_ceiling)
    summary = summary_of(results, rules) | {"size": rules.size, "crop": rules.crop}
    summary["definitions"] |= DEFINITIONS["ceiling"]
    write_json(output / "ceiling.json", summary)
    print(ceiling_table(summary, rules.size, rules.crop, markdown))
    print_notes(summary, rules)
    print(f"{len(summary['cases'])} of {len(tasks)} cases pushed through, into {output}: {', '.join(CEILING_RESULTS)}")
    return REFUSED if summary["refused"] else DONE


def measure_ceiling(task: Task, rules: Rules) -> Scored:
    """Score one reference, resized to the grid of `rules.size` and back in two ways, against itself.

    dice, nsd: by `from_shares`, the scores of a network that predicts each voxel's exact shares. This is not a proven
    bound: logits fitted to the full-size labels of one scan could draw finer borders.
    dice_as_labels, nsd_as_labels: by `from_labels`, the scores of a network that repeats its training labels.

    Raises:
        OSError, ValueError: when the file cannot be read, or holds other organs.
    """
    reference, geometry = read_label_map(task.reference, rules)
    torch.set_num_threads(1)  # cases run in parallel, and the numbers must not depend on the machine
    scores = [{} for _ in rules.organs[1:]]
    kept = keep_organs(reference, task, rules)
    for ending, there_and_back in (("", from_shares), ("_as_labels", from_labels)):
        # Organs that are not scored are on the grid too: they share its voxels with the others.
        restored = keep_organs(in_box(there_and_back, reference, rules), task, rules)
        matrix = confusion_matrix(kept, restored, len(rules.organs))
        found = score_organs(kept, restored, matrix, geometry, rules)
        for of_organ, here in zip(scores, found, strict=True):
            of_organ |= {f"{name}{ending}": here[name] for name in COMPARED}
    return outcome(task, scores, matrix, rules)


def in_box(there_and_back: Callable, labels: np.ndarray, rules: Rules) -> np.ndarray:
    """Restore the part of labels, (X, Y, Z), that the grid covers; background around it."""
    box = (organs_box(labels) if rules.crop == "organs" else None) or whole_box(labels.shape)
    restored = np.zeros_like(labels)
    restored[box] = there_and_back(labels[box], rules)
    return restored


def from_shares(labels: np.ndarray, rules: Rules) -> np.ndarray:
    """Restore labels, (X, Y, Z), like a network's logits, from each organ's exact share of every voxel of the grid."""
    weights = [axis_weights(n_in, n_out, antialias=True) for n_in, n_out in zip(labels.shape, rules.size, strict=True)]
    shares = torch.zeros((len(rules.organs), *rules.size))
    for organ in range(len(rules.organs)):
        mask = labels == organ
        if mask.any():
            shares[organ] = apply_weights(torch.from_numpy(mask).float(), weights)
    return logits_to_labels(shares, labels.shape)


def from_labels(labels: np.ndarray, rules: Rules) -> np.ndarray:
    """Restore labels, (X, Y, Z), from the labels that a network is trained on."""
    return resize_labels(resize_labels(labels, rules.size), labels.shape)
