"""What a reconstruction keeps of a representation, and how alike the features of a dictionary are."""

from __future__ import annotations

import numpy as np

from .rows import row_blocks

BLOCK_VALUES = 8_000_000
"""Values held at a time (64 MB)."""


def unexplained(x: np.ndarray, x_hat: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Fraction of variance unexplained Σ‖x − x̂‖² / Σ‖x − mean‖², of each resample (resamples,); NaN for one without variance.

    Parameters
    ----------
    x, x_hat
        (n, d)
    weights
        (resamples, n), how often each cell counts.
    """
    n, d = x.shape
    mean = x.mean(axis=0, dtype=np.float64)
    errors, sizes, sums = np.empty(n), np.empty(n), np.zeros((len(weights), d))
    for rows in row_blocks(n, max(1, BLOCK_VALUES // d)):
        centred = x[rows] - mean
        errors[rows] = np.square(x[rows].astype(np.float64) - x_hat[rows]).sum(axis=1)
        sizes[rows] = np.square(centred).sum(axis=1)
        sums += weights[:, rows] @ centred
    variance = weights @ sizes - np.square(sums).sum(axis=1) / weights.sum(axis=1)
    return weights @ errors / np.where(variance > 0, variance, np.nan)


def components(seen: np.ndarray, x: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (cells, n) of `x` on the first principal components of the cells `seen`, and what they reconstruct of it."""
    from sklearn.decomposition import PCA

    solver = "full" if x.shape[1] <= 500 else "randomized"
    model = PCA(n, svd_solver=solver, random_state=seed).fit(seen)
    scores = model.transform(x)
    return scores, model.inverse_transform(scores)


def right_votes(near: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Tell of each cell whether most of its neighbours (n, k) have its code; in a tie, the lowest code counts."""
    votes = np.zeros((len(codes), codes.max() + 1), dtype=np.int64)
    np.add.at(votes, (np.arange(len(codes))[:, None], codes[near]), 1)
    return votes.argmax(axis=1) == codes


def kept_neighbors(near: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Share of the neighbours (n, k) of each cell that are also among its `other` ones (n, k)."""
    n, k = near.shape
    first = np.arange(n)[:, None] * n
    return np.isin(near + first, other + first).sum(axis=1) / k


def nearest_cosine(directions: np.ndarray) -> np.ndarray:
    """Highest cosine (h,) of each direction (h, d) with another one; NaN where it is the only one."""
    length = np.linalg.norm(directions, axis=1, keepdims=True)
    unit = (directions / np.where(length > 0, length, 1)).astype(np.float32)
    h = len(unit)
    nearest = np.full(h, np.nan)
    for rows in row_blocks(h, max(1, BLOCK_VALUES // max(h, 1))) if h > 1 else ():
        cosines = unit[rows] @ unit.T
        cosines[np.arange(len(cosines)), np.arange(rows.start, rows.stop)] = -np.inf
        nearest[rows] = cosines.max(axis=1)
    return nearest
