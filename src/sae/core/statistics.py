"""Tests and effect sizes, vectorised over features."""

from __future__ import annotations

import numpy as np
from scipy import special


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjust p-values along the last axis by Benjamini and Hochberg (1995); NaN means not tested and stays NaN."""
    tested = np.isfinite(p)
    n = tested.sum(axis=-1, keepdims=True)
    order = np.argsort(np.where(tested, p, np.inf), axis=-1)
    ranked = np.take_along_axis(p, order, axis=-1) * n / np.arange(1, p.shape[-1] + 1)
    ranked = np.where(np.isnan(ranked), np.inf, ranked)
    monotone = np.minimum.accumulate(ranked[..., ::-1], axis=-1)[..., ::-1]
    adjusted = np.empty_like(monotone)
    np.put_along_axis(adjusted, order, np.minimum(monotone, 1), axis=-1)
    return np.where(tested, adjusted, np.nan)


def adjusted_among(log_p: np.ndarray, among: np.ndarray, n_tests: int) -> np.ndarray:
    """Adjust p-values among all tests by Benjamini and Hochberg (1995).

    Parameters
    ----------
    log_p
        Natural logarithms of those p-values whose adjusted value is wanted.
    among
        Those of all tests, in any order; tests with p = 1 may be missing, as they have no influence on the others.
    n_tests
        Number of all tests.
    """
    ordered = np.sort(among)
    ranked = np.append(ordered + np.log(max(n_tests, 1) / np.arange(1, len(ordered) + 1)), 0.0)
    adjusted = np.exp(np.minimum.accumulate(ranked[::-1])[::-1])
    return adjusted[np.searchsorted(ordered, log_p, side="left")]


def average_ranks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks 1 ... g of each row of (rows, g), equal values sharing theirs and NaN last, and Σ(t³ − t) of the ties."""
    rows, g = values.shape
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    below, above = ordered[:, :-1], ordered[:, 1:]
    starts = np.ones((rows, g), dtype=bool)
    starts[:, 1:] = (above != below) & ~(np.isnan(above) & np.isnan(below))
    start = np.flatnonzero(starts)
    size = np.diff(np.append(start, rows * g))
    ranks = np.empty((rows, g))
    average = np.repeat(start % g + (size + 1) / 2, size).reshape(rows, g)
    np.put_along_axis(ranks, order, average, axis=1)
    cubes = size.astype(np.float64) ** 3 - size
    return ranks, np.bincount(start // g, weights=cubes, minlength=rows)


def welch(
    mean1: np.ndarray, var1: np.ndarray, n1: np.ndarray, mean0: np.ndarray, var0: np.ndarray, n0: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Welch's t (1947) and its two-sided p from moments, with unbiased variances.

    t = (x̄₁ − x̄₀) / √(s₁²/n₁ + s₀²/n₀), with the Welch-Satterthwaite degrees of freedom. Where both variances are zero,
    t is ± infinity with p = 0 for different means, and 0 with p = 1 for equal ones.
    """
    se, df = _welch_error(var1, n1, var0, n0)
    difference = mean1 - mean0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, difference / se, np.sign(difference) * np.inf)
    t = np.where(difference == 0, 0.0, t)
    return t, np.minimum(2 * special.stdtr(df, -np.abs(t)), 1)


def welch_interval(
    mean1: np.ndarray,
    var1: np.ndarray,
    n1: np.ndarray,
    mean0: np.ndarray,
    var0: np.ndarray,
    n0: np.ndarray,
    *,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray]:
    """Confidence interval of x̄₁ − x̄₀ without equal variances: ± t √(s₁²/n₁ + s₀²/n₀), t of Welch's degrees of freedom.

    NaN where a variance is (a group of one value); without any width where both variances are zero.
    """
    se, df = _welch_error(var1, n1, var0, n0)
    margin = np.where(se == 0, 0.0, special.stdtrit(df, (1 + level) / 2) * se)
    return mean1 - mean0 - margin, mean1 - mean0 + margin


def _welch_error(var1: np.ndarray, n1: np.ndarray, var0: np.ndarray, n0: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of a difference of means, and the Welch-Satterthwaite degrees of freedom."""
    with np.errstate(divide="ignore", invalid="ignore"):
        square1, square0 = var1 / n1, var0 / n0
        square = square1 + square0
        df = np.where(square > 0, square**2 / (square1**2 / (n1 - 1) + square0**2 / (n0 - 1)), np.inf)
    return np.sqrt(square), df


def log2_fold_change(mean1: np.ndarray, mean0: np.ndarray, *, log_base: float | None, pseudocount: float) -> np.ndarray:
    """log2 of the ratio of means plus a pseudocount, after undoing log1p of the given base (as Scanpy does)."""
    if log_base is not None:
        mean1, mean0 = (np.expm1(mean * np.log(log_base)) for mean in (mean1, mean0))
    return np.log2((mean1 + pseudocount) / (mean0 + pseudocount))
