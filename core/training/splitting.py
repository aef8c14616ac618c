"""Split cases into those to train on and those held out. Cases whose labels a network has made are never held out.

A case has an `id` and a `weight`, which is None where people have labelled it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.config import Config
from core.scans.files import listed, read_case_ids
from core.scans.weights import WEIGHTS

DEFAULT_VAL_CASES = Path(__file__).resolve().parents[2] / "data" / "val_cases.txt"


def split_cases(
    cases: Sequence, val_cases: Sequence[str] | None, val_fraction: float, seed: int
) -> tuple[list, list, str]:
    """Split cases into training and validation.

    Ids in `val_cases` (or a file of them) decide. Without, data/val_cases.txt does where it fits the data; else the
    fraction `val_fraction`, drawn by `seed`: when it is above 0 at least one case, but never the last one to train on.

    Returns:
        training cases, validation cases, and a sentence that says how they were chosen.

    Raises:
        ValueError: when a named case is missing, or no case is left to train on.
    """
    ids = [case.id for case in by_people(cases)]
    made = {case.id for case in cases} - set(ids)
    if not ids:
        raise ValueError(f"all {len(cases)} cases are in {WEIGHTS}, which lists labels that a network has made")
    if val_cases is not None:
        held_out, source = read_case_ids(val_cases), "val_cases"
    elif val_fraction == 0:
        held_out, source = [], "val_fraction: 0"
    else:
        held_out, source = read_case_ids([str(DEFAULT_VAL_CASES)]), "data/val_cases.txt"
    if made.intersection(held_out):
        raise ValueError(f"{source}: {listed(sorted(made.intersection(held_out)))} in {WEIGHTS}: a network's labels")
    missing = [case for case in held_out if case not in ids]
    if val_cases is None and val_fraction and len(missing) == len(held_out):
        count = min(max(1, round(val_fraction * len(ids))), len(ids) - 1)
        drawn = np.random.default_rng(seed).permutation(len(ids))[:count]
        held_out = [ids[i] for i in drawn]
        how = f"{count} of {len(ids)} held out by val_fraction and seed (data/val_cases.txt is for other data)"
    elif missing:
        raise ValueError(f"{source}: {listed(missing)} not among the {len(ids)} cases of the data")
    else:
        how = f"{len(set(held_out))} of {len(ids)} held out by {source}"
    train = [case for case in cases if case.id not in held_out]
    if not by_people(train):  # an epoch is measured by them
        which = "cases that people have labelled" if train else "cases"
        raise ValueError(f"{source}: holds out all {len(ids)} {which}, so that none is left to train on")
    return train, [case for case in cases if case.id in held_out], how


def split_by_fold(cases: Sequence, folds: int, fold: int, seed: int) -> tuple[list, list, str]:
    """Split cases for cross-validation: cut into `folds` parts by `seed`, one of them held out.

    The parts differ by one case at most, and depend on nothing but the seed, their number and the cases' ids: the runs
    of all folds together hold out every case once.

    Returns:
        training cases, validation cases, and a sentence that says how they were chosen.

    Raises:
        ValueError: when there is no such fold, or fewer cases than folds.
    """
    if fold >= folds:
        raise ValueError(f"fold: got {fold} of {folds} folds, expected 0 to {folds - 1}")
    ids = sorted(case.id for case in by_people(cases))
    if folds > len(ids):
        raise ValueError(f"folds: got {folds} for {len(ids)} cases, expected no more folds than cases")
    order = np.random.default_rng([seed, folds]).permutation(len(ids))
    held_out = {ids[i] for i in order[fold::folds]}
    how = f"{len(held_out)} of {len(ids)} held out as fold {fold} of {folds} (0 to {folds - 1})"
    parts = ([case for case in cases if (case.id in held_out) is held] for held in (False, True))
    return *parts, how


def split(cases: Sequence, config: Config) -> tuple[list, list, str]:
    """Split cases as the settings say; return the same as `split_cases`.

    Raises:
        ValueError: when they cannot be split so.
    """
    if not config.folds:
        if config.fold:
            raise ValueError(
                f"fold: got {config.fold} without folds, expected the number of folds too, as in --folds 5"
            )
        return split_cases(cases, config.val_cases, config.val_fraction, config.seed)
    if config.val_cases is not None:
        raise ValueError("folds: got val_cases too, expected one of the two; val_cases: null leaves it to the folds")
    return split_by_fold(cases, config.folds, config.fold, config.seed)


def by_people(cases: Sequence) -> list:
    """Return the cases that people have labelled, which alone can be held out."""
    return [case for case in cases if case.weight is None]
