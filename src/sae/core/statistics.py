"""Tests and effect sizes, vectorised over features."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from scipy import special

from .student import log_two_sided

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjust p-values along the last axis by Benjamini and Hochberg (1995); NaN means not tested and stays NaN."""
    # Zero may come with a minus, which would be sorted as the largest of all.
    rows = np.ascontiguousarray(p, dtype=np.float64).reshape(math.prod(p.shape[:-1]), p.shape[-1]) + 0.0
    adjusted = np.full(rows.shape, np.nan)
    _step_up(rows, rows.view(np.uint64), adjusted)
    return adjusted.reshape(p.shape)


@_compiled
def _step_up(p, bits, adjusted):
    """Write min over j ≥ i of p₍ⱼ₎ n / j for the i-th smallest of the n tested p-values of each row."""
    keys, places = np.empty((2, p.shape[1]), np.uint64), np.empty((2, p.shape[1]), np.int64)
    for row in range(p.shape[0]):
        n = 0
        for place in range(p.shape[1]):
            if not np.isnan(p[row, place]):
                keys[0, n], places[0, n] = bits[row, place], place
                n += 1
        _sort(keys[:, :n], places[:, :n])
        lowest = 1.0
        for i in range(n, 0, -1):
            place = places[0, i - 1]
            lowest = min(lowest, p[row, place] * (n / i))
            adjusted[row, place] = lowest


@_compiled
def _sort(keys, places):
    """Sort keys[0], and places[0] along, by one byte after the other from the lowest; the second rows are room.

    Floats that are not negative have the order of their bits. This takes a quarter of the time of sorting by comparison.
    """
    starts = np.zeros((8, 257), np.int64)
    for key in keys[0]:
        for byte in range(8):
            starts[byte, _byte(key, byte) + 1] += 1
    for byte in range(8):
        for value in range(256):
            starts[byte, value + 1] += starts[byte, value]
        source, target = byte % 2, 1 - byte % 2
        for e in range(keys.shape[1]):
            value = _byte(keys[source, e], byte)
            at = starts[byte, value]
            starts[byte, value] = at + 1
            keys[target, at], places[target, at] = keys[source, e], places[source, e]


@_compiled
def _byte(key, byte):
    return (key >> np.uint64(8 * byte)) & np.uint64(255)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Welch's t (1947), its two-sided p and log p (natural) from moments, with unbiased variances.

    t = (x̄₁ − x̄₀) / √(s₁²/n₁ + s₀²/n₀), with the Welch-Satterthwaite degrees of freedom. Where both variances are zero,
    t is ± infinity with p = 0 for different means, and 0 with p = 1 for equal ones.
    """
    se, df = _welch_error(var1, n1, var0, n0)
    difference = mean1 - mean0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, difference / se, np.sign(difference) * np.inf)
    t = np.where(difference == 0, 0.0, t)
    log_pval = log_two_sided(t, df)
    return t, np.exp(log_pval), log_pval


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
    """log2 of the ratio of means plus a pseudocount, after undoing log1p of the given base (as Scanpy does).

    Means below 0, which a linear model may predict, count as 0.
    """
    if log_base is not None:
        mean1, mean0 = (np.maximum(np.expm1(mean * np.log(log_base)), 0) for mean in (mean1, mean0))
    return np.log2((mean1 + pseudocount) / (mean0 + pseudocount))
