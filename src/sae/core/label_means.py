"""Means of columns in the cells of each label, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .statistics import welch_interval


@dataclass(frozen=True)
class LabelMeans:
    """How active columns are in each label; arrays (labels, columns)."""

    n: np.ndarray
    """(labels, 1): cells, or samples, that the interval is of."""
    mean: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    share: np.ndarray
    """Of cells that are active."""


def label_means(
    a: sparse.csr_matrix, codes: np.ndarray, n_labels: int, samples: np.ndarray | None = None
) -> LabelMeans:
    """Average columns over the cells of each label, with Student's 95 % interval, x̄ ± t(n − 1) s / √n.

    Parameters
    ----------
    a
        Activations (n, columns) ≥ 0.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    samples
        (n,) sample of each cell, 0, 1, ...: cells are first averaged within each sample, and samples are then what is counted.
    """
    activation = sparse.csr_array(a, dtype=np.float64)
    parts = [activation, (activation > 0).astype(np.float64)]
    if samples is not None:
        n_samples = samples.max(initial=0) + 1
        pairs, unit = np.unique(codes * n_samples + samples, return_inverse=True)
        parts = [_sums(part, unit, len(pairs)) / np.bincount(unit)[:, None] for part in parts]
        codes = pairs // n_samples
    n = np.bincount(codes, minlength=n_labels).astype(np.float64)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, share = (_sums(part, codes, n_labels) / n for part in parts)
        spread = np.maximum(_sums(parts[0] ** 2, codes, n_labels) - n * mean**2, 0)
        variance = np.where(n > 1, spread / (n - 1), np.nan)
    # Welch's interval of the difference from a constant is Student's.
    low, high = welch_interval(mean, variance, n, np.zeros(1), np.zeros(1), np.full(1, np.inf))
    return LabelMeans(n, mean, low, high, share)


def _sums(x: np.ndarray | sparse.csr_array, codes: np.ndarray, n: int) -> np.ndarray:
    """Add up the rows of each code: (n, columns)."""
    members = sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n, len(codes)))
    summed = members @ x
    return summed.toarray() if sparse.issparse(summed) else summed
