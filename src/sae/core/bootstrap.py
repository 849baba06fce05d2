"""How scores would vary with other cells: the same cells drawn again and again, with what was chosen on others kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from .rows import Matrix, dense_rows

LEVEL = 0.95

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


def resamples(groups: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the cells of each group again, with replacement (Efron 1979): how often each counts, (1 + n_resamples, n).

    In the first row, each counts once.

    Parameters
    ----------
    groups
        (n,) codes, such as labels: each resample has as many cells of each as there are.
    """
    weights = np.ones((1 + n_resamples, len(groups)))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        weights[1:, rows] = _drawn(len(rows), n_resamples, rng)
    return weights


def donor_resamples(donors: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the donors again, with replacement, each with all its cells: how often each cell counts, (1 + n_resamples, n)."""
    drawn = _drawn(int(donors.max()) + 1, n_resamples, rng)
    return np.concatenate([np.ones((1, len(donors))), drawn[:, donors]])


def _drawn(n: int, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_resamples)]).astype(np.float64)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of values (n,) in each resample."""
    return weights @ values / weights.sum(axis=1)


def interval(samples: np.ndarray) -> tuple[float, float, float]:
    """Estimate, and the percentiles 2.5 and 97.5 of the resamples (1 + n_resamples,) that have a value."""
    known = samples[1:][~np.isnan(samples[1:])]
    if np.isnan(samples[0]) or len(known) < 2:
        return float(samples[0]), float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(samples[0]), float(low), float(high)


def mean_of_known(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of the values that are not NaN; NaN for none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=axis) / known.sum(axis=axis)


def of_chosen(x: Matrix, chosen: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Read for each cell the column that was chosen for each label on the half that the cell is not in.

    Parameters
    ----------
    x
        (n, columns), dense or CSR.
    chosen
        (splits, 2, labels) of :class:`CrossFit`; −1 for none.
    halves
        (splits, n) of 0 and 1.

    Returns
    -------
    (splits, labels, n); NaN for none.
    """
    columns, place = np.unique(chosen, return_inverse=True)
    place = place.reshape(chosen.shape)
    values = dense_rows(x[:, np.maximum(columns, 0)], slice(None)).astype(np.float64).T
    values[columns < 0] = np.nan
    scores = np.empty((len(halves), chosen.shape[2], halves.shape[1]))
    for split, half in enumerate(halves):
        for p in range(2):
            rows = np.flatnonzero(half != p)
            scores[split][:, rows] = values[place[split, p]][:, rows]
    return scores


def held_out_auroc(scores: np.ndarray, codes: np.ndarray, halves: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC of each label in each resample, the mean over halves and splits (1 + n_resamples, labels).

    In each half, U / (W₁ W₀) with the weights w of the cells inside (W₁ in all) and outside (W₀), and U = Σ wᵢ wⱼ over pairs of
    a cell inside and one outside that has the lower score, ties counted half. NaN where no half has both.

    Parameters
    ----------
    scores
        (splits, labels, n), each cell by what was chosen on the other half; NaN for nothing.
    codes
        (n,) labels, 0, 1, ...
    halves
        (splits, n) of 0 and 1.
    weights
        (1 + n_resamples, n)
    """
    n_splits, n_labels, _ = scores.shape
    by_cell = np.ascontiguousarray(weights.T)
    found = np.full((n_splits * 2, n_labels, len(weights)), np.nan)
    for split, half in enumerate(halves):
        for p in range(2):
            rows = np.flatnonzero(half == p)
            for label in range(n_labels):
                values = scores[split, label, rows]
                if not np.isnan(values).any():
                    order = np.argsort(values, kind="stable")
                    found[2 * split + p, label] = _auroc(values[order], rows[order], codes == label, by_cell)
    return mean_of_known(found, axis=0).T


@_compiled
def _auroc(values, cells, inside, weights):
    """Go up the sorted values, all resamples side by side: (resamples,) from weights (n, resamples)."""
    n_resamples = weights.shape[1]
    u, n_in, below = np.zeros(n_resamples), np.zeros(n_resamples), np.zeros(n_resamples)
    tied_in, tied_out = np.zeros(n_resamples), np.zeros(n_resamples)
    start = 0
    while start < values.size:
        stop = start
        tied_in[:] = 0
        tied_out[:] = 0
        while stop < values.size and values[stop] == values[start]:
            cell = cells[stop]
            if inside[cell]:
                tied_in += weights[cell]
            else:
                tied_out += weights[cell]
            stop += 1
        u += tied_in * (below + tied_out / 2)
        n_in += tied_in
        below += tied_out
        start = stop
    return u / (n_in * below)
