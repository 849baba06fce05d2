"""What a feature can be known by in other cells: its correlation with every gene."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from .moments import ROUNDING, chunks
from .rows import Matrix


def signatures(a: sparse.csr_matrix, x: Matrix) -> np.ndarray:
    """Pearson's r (h, g) of each feature's activation with each gene's expression; 0 where either is constant.

    Computed in float64 from sums over the cells, which are read in chunks.

    Parameters
    ----------
    a
        (n, h).
    x
        (n, g), dense or sparse, in memory or read by rows.
    """
    n, h = a.shape
    a = sparse.csr_matrix(a, dtype=np.float64)
    products, total, squares = np.zeros((h, x.shape[1])), np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for rows, part in chunks(x):
        expressed = sparse.csr_matrix(part, dtype=np.float64) if sparse.issparse(part) else part
        added = a[rows].T @ expressed
        products += added.toarray() if sparse.issparse(added) else added
        total += np.asarray(expressed.sum(axis=0)).ravel()
        squared = expressed.multiply(expressed) if sparse.issparse(expressed) else np.square(expressed)
        squares += np.asarray(squared.sum(axis=0)).ravel()
    activity = np.bincount(a.indices, weights=a.data, minlength=h)
    of_features = _about_mean(activity, np.bincount(a.indices, weights=np.square(a.data), minlength=h), n)
    per_feature, per_gene = _inverse_root(of_features), _inverse_root(_about_mean(total, squares, n))
    for row, r in enumerate(products):  # In place: with 16,384 features and 20,000 genes this matrix has 2.6 GB.
        r -= activity[row] / n * total
        r *= per_feature[row] * per_gene
    return np.clip(products, -1, 1, out=products)


def _about_mean(total: np.ndarray, squares: np.ndarray, n: int) -> np.ndarray:
    """Return Σ(x − x̄)² from Σx and Σx²; exactly 0 where rounding is all that is left."""
    centred = squares - total**2 / n
    return np.where(centred > ROUNDING * squares, centred, 0)


def _inverse_root(squares: np.ndarray) -> np.ndarray:
    return np.divide(1, np.sqrt(squares), out=np.zeros_like(squares), where=squares > 0)
