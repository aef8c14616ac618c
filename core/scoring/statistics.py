"""Means, intervals and comparisons of scores over cases: tables in, numbers out.

A table is an array of (cases, organs) float64, NaN where a score is not defined. Results that are not defined or
infinite are None, since JSON knows neither.
"""

import math
from collections.abc import Sequence

import numpy as np

from core.scoring.overlap import divide

BOOTSTRAP_SEED = 0
BOOTSTRAP_SAMPLES = 2000
INTERVAL_PERCENT = (2.5, 97.5)  # of the bootstrap samples: the 95 % interval


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Return mean, sample standard deviation, median and number of the defined values (not NaN).

    With an infinite value among them, mean and sd are None; n_infinite counts the infinite values.
    """
    defined = np.array([value for value in values if not math.isnan(value)])
    infinite = int(np.isinf(defined).sum())
    median = float(np.median(defined)) if len(defined) else math.inf
    return {
        "mean": float(defined.mean()) if len(defined) and not infinite else None,
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 and not infinite else None,
        "median": median if math.isfinite(median) else None,
        "n": len(defined),
        "n_infinite": infinite,
    }


def summarise(tables: dict[str, np.ndarray], organs: Sequence[str]) -> dict:
    """Return each organ's `spread` of each score over the cases, and for each score the mean of the organs' means.

    The mean over organs is None when one of them is infinite. An organ without any defined value is in no mean.

    Args:
        tables: for each score a (C, K - 1) table.
        organs: the K - 1 names, without background.
    """
    per_organ = {
        organ: {score: spread(table[:, i]) for score, table in tables.items()} for i, organ in enumerate(organs)
    }
    means = {score: spread(mean_over(table, axis=0))["mean"] for score, table in tables.items()}
    return {"mean": means, "organs": per_organ}


def mean_over(table: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean along an axis over the defined values; NaN where there is none."""
    defined = ~np.isnan(table)
    return divide(np.where(defined, table, 0).sum(axis=axis), defined.sum(axis=axis))


def bootstrap_interval(table: np.ndarray) -> list[float] | None:
    """Return the 95 % percentile-bootstrap interval, over cases, of the mean over organs of each organ's mean.

    Whole cases are drawn with replacement, BOOTSTRAP_SAMPLES times, from a fixed seed: the same table gives the same
    interval. With few cases it is too narrow. It is None for fewer than two cases, or when nothing is defined.

    Args:
        table: (C, organs), finite or NaN.

    Returns:
        lower and upper end.
    """
    table = table[~np.isnan(table).all(axis=1)]
    cases = len(table)
    if cases < 2:
        return None
    times = np.random.default_rng(BOOTSTRAP_SEED).multinomial(cases, np.full(cases, 1 / cases), BOOTSTRAP_SAMPLES)
    defined = ~np.isnan(table)
    # einsum adds in one order on any number of threads; a matrix product need not.
    sums = np.einsum("sc,co->so", times, np.where(defined, table, 0.0))
    counts = np.einsum("sc,co->so", times, defined.astype(np.int64))
    means = mean_over(divide(sums, counts), axis=1)  # (samples,)
    return [float(end) for end in np.nanpercentile(means, INTERVAL_PERCENT)]


def compare(here: np.ndarray, other: np.ndarray) -> dict[str, float | int | list | None]:
    """Compare two sets of scores of the same cases, pair by pair.

    Args:
        here: (C,), finite or NaN.
        other: (C,); a pair counts where both are defined.

    Returns:
        n, the number of pairs; n_unpaired, the number of cases where only one score is defined; over the pairs the mean
        of each side, mean and median of the difference (here - other), its bootstrap interval, and p of Wilcoxon's
        signed-rank test, two-sided.
    """
    paired = ~np.isnan(here) & ~np.isnan(other)
    n = int(paired.sum())
    differences = (here - other)[paired]
    return {
        "n": n,
        "n_unpaired": int((np.isnan(here) != np.isnan(other)).sum()),
        "mean": float(here[paired].mean()) if n else None,
        "other_mean": float(other[paired].mean()) if n else None,
        "difference": float(differences.mean()) if n else None,
        "median_difference": float(np.median(differences)) if n else None,
        "interval_95": bootstrap_interval(differences[:, None]),
        "p": wilcoxon_p(differences) if n else None,
    }


def wilcoxon_p(differences: np.ndarray) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test, by scipy's defaults; 1 when no pair differs."""
    if not differences.any():
        return 1.0
    # The import takes a second, which only comparisons have to wait for.
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue)


def compare_tables(here: np.ndarray, other: np.ndarray, organs: Sequence[str]) -> dict:
    """`compare` two (C, organs) tables by each case's mean over organs, and organ by organ.

    A case's mean is over the organs defined on that side. An organ predicted in a scan without it therefore counts
    against that side.
    """
    return {
        "mean": compare(mean_over(here, axis=1), mean_over(other, axis=1)),
        "organs": {organ: compare(here[:, i], other[:, i]) for i, organ in enumerate(organs)},
    }
