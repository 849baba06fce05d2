"""Tests and effect sizes, vectorised over features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special


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
    se1, se0 = var1 / n1, var0 / n0
    se = se1 + se0
    difference = mean1 - mean0
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, difference / np.sqrt(se), np.sign(difference) * np.inf)
        df = np.where(se > 0, se**2 / (se1**2 / (n1 - 1) + se0**2 / (n0 - 1)), np.inf)
    t = np.where(difference == 0, 0.0, t)
    return t, np.minimum(2 * special.stdtr(df, -np.abs(t)), 1)


def log2_fold_change(mean1: np.ndarray, mean0: np.ndarray, *, log_base: float | None, pseudocount: float) -> np.ndarray:
    """log2 of the ratio of means plus a pseudocount, after undoing log1p of the given base (as Scanpy does)."""
    if log_base is not None:
        mean1, mean0 = (np.expm1(mean * np.log(log_base)) for mean in (mean1, mean0))
    return np.log2((mean1 + pseudocount) / (mean0 + pseudocount))


@dataclass(frozen=True)
class LabelScores:
    """How well each feature tells each label from the other cells; all arrays (labels, features)."""

    auroc: np.ndarray
    f1: np.ndarray
    difference: np.ndarray
    pval: np.ndarray
    standard_error: np.ndarray
    """SE of the mean inside the label plus SE of the mean outside."""


def score_labels(a: sparse.csr_matrix, codes: np.ndarray, n_labels: int) -> LabelScores:
    """Score every feature against every label, from the non-zero activations alone.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    """
    a = sparse.csc_matrix(a, copy=True)
    a.eliminate_zeros()
    n, h = a.shape
    indicator = sparse.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(n_labels, n))
    n_in = np.bincount(codes, minlength=n_labels).astype(np.float64)[:, None]
    n_out = n - n_in
    columns = np.repeat(np.arange(h), np.diff(a.indptr))
    sort = np.lexsort((-a.data, columns))
    values, labels = a.data[sort].astype(np.float64), codes[a.indices[sort]]
    ends = _tie_ends(values, columns)

    ranks, ties = _descending_ranks(values, columns, a.indptr, n, ends)
    rank_matrix = sparse.csc_matrix((ranks, a.indices[sort], a.indptr), shape=(n, h))
    active = sparse.csc_matrix((np.ones(a.nnz), a.indices, a.indptr), shape=(n, h))
    n_zero = n - np.diff(a.indptr).astype(np.float64)
    rank_sum = (indicator @ rank_matrix).toarray() + (n_in - (indicator @ active).toarray()) * (n_zero + 1) / 2
    u = rank_sum - n_in * (n_in + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = u / (n_in * n_out)
        tied = n + 1 - (ties + n_zero**3 - n_zero) / (n * (n - 1))
        sd = np.sqrt(n_in * n_out / 12 * tied)
        z = (np.abs(u - n_in * n_out / 2) - 0.5) / sd
    pval = np.where(sd > 0, np.minimum(2 * special.ndtr(-z), 1), 1.0)

    f1 = _best_f1(labels, columns, a.indptr, ends, n_in[:, 0], h)
    values64 = a.astype(np.float64)
    sums = (indicator @ values64).toarray()
    squares = (indicator @ values64.multiply(values64)).toarray()
    mean_in, var_in = _mean_variance(sums, squares, n_in)
    mean_out, var_out = _mean_variance(sums.sum(axis=0) - sums, squares.sum(axis=0) - squares, n_out)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(var_in / n_in) + np.sqrt(var_out / n_out)
    return LabelScores(auroc, f1, mean_in - mean_out, pval, error)


def _tie_ends(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Mark the last of each run of equal values in a column."""
    ends = np.ones(len(values), dtype=bool)
    ends[:-1] = (values[1:] != values[:-1]) | (columns[1:] != columns[:-1])
    return ends


def _descending_ranks(
    values: np.ndarray, columns: np.ndarray, indptr: np.ndarray, n: int, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Average ranks (1 = lowest of n) of positive values sorted downwards in each column, and Σ(t³ − t) of their ties."""
    position = np.arange(len(values)) - indptr[columns]
    run = np.cumsum(ends) - ends
    last = position[ends]
    size = np.bincount(run, minlength=len(last)).astype(np.float64)
    average_position = last - (size - 1) / 2
    ties = np.bincount(columns[ends], weights=size**3 - size, minlength=len(indptr) - 1)
    return n - average_position[run], ties


def _best_f1(
    labels: np.ndarray, columns: np.ndarray, indptr: np.ndarray, ends: np.ndarray, n_in: np.ndarray, h: int
) -> np.ndarray:
    """Highest F1 = 2 TP / (predicted + actual) over thresholds above zero; 0 for a feature that is never active."""
    best = np.zeros((len(n_in), h))
    filled = np.flatnonzero(np.diff(indptr) > 0)
    if len(filled) == 0:
        return best
    starts = indptr[filled]
    predicted = np.arange(len(labels)) - indptr[columns] + 1
    for label, actual in enumerate(n_in):
        hits = np.concatenate([[0], np.cumsum(labels == label)])
        true_positive = hits[1:] - hits[indptr[columns]]
        f1 = np.where(ends, 2 * true_positive / (predicted + actual), 0)
        best[label, filled] = np.maximum.reduceat(f1, starts)
    return best


def _mean_variance(sums: np.ndarray, squares: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance from Σx and Σx²; NaN where there are too few values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / n
        variance = np.where(n > 1, np.maximum(squares - n * mean**2, 0) / (n - 1), np.nan)
    return mean, variance
