"""How much of a known truth the features hold: correlations of variables with features, best and one to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from .rows import Matrix, dense_rows, row_blocks, varying_columns

BLOCK_VALUES = 8_000_000
"""Cells × features held densely in float64 at a time (64 MB), for dense activations."""


@dataclass(frozen=True)
class Recovery:
    """How well each of p variables is found among h features."""

    best: np.ndarray
    """(p,), highest |r| over all features."""
    feature: np.ndarray
    """(p,), number of the feature that has it."""
    matched: np.ndarray
    """(p,), |r| with the variable's own feature, of the one-to-one matching with the highest sum; 0 without one."""


def recovery(truth: np.ndarray, activations: Matrix) -> Recovery:
    """Find for each variable its most correlated feature, with and without sharing of features.

    Both are by |r|. The matching is the optimal one (Hungarian method, :func:`scipy.optimize.linear_sum_assignment`); with
    more variables than features, some get none.

    Parameters
    ----------
    truth
        (n, p), numbers.
    activations
        (n, h), CSR or dense.
    """
    strength = np.abs(correlations(truth, activations))
    if strength.shape[1] == 0:
        raise ValueError("The activations have no features to look for the variables in.")
    feature = strength.argmax(axis=1)
    matched = np.zeros(len(strength))
    variables, partners = linear_sum_assignment(strength, maximize=True)
    matched[variables] = strength[variables, partners]
    return Recovery(strength[np.arange(len(strength)), feature], feature, matched)


def correlations(truth: np.ndarray, activations: Matrix) -> np.ndarray:
    """Pearson correlation r (p, h) of each variable with each feature; 0 where either is constant.

    With z the centred variables, r = zᵀa / √(Σz² Σ(a − ā)²), in float64; a sparse `a` is multiplied as it is.

    Parameters
    ----------
    truth
        (n, p), numbers.
    activations
        (n, h), CSR or dense.
    """
    if truth.ndim != 2 or len(truth) != activations.shape[0]:
        raise ValueError(f"The truth is {truth.shape}; expected one row for each of {activations.shape[0]} cells.")
    z = truth.astype(np.float64)
    if not np.isfinite(z).all():
        raise ValueError(f"{(~np.isfinite(z)).sum()} values of the truth are not finite. Leave these cells out.")
    z -= z.mean(axis=0) if len(z) else 0
    products, squares = (_sparse_sums if sparse.issparse(activations) else _dense_sums)(z, activations)
    r = np.zeros_like(products)
    varying = np.ix_(varying_columns(truth), varying_columns(activations))
    norms = np.sqrt(np.outer(np.square(z).sum(axis=0), squares))
    r[varying] = products[varying] / norms[varying]
    return np.clip(r, -1, 1)


def _sparse_sums(z: np.ndarray, a: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return zᵀa (p, h) and Σ(a − ā)² (h,) from the stored values; that of the zeros is ā² each."""
    a = sparse.csr_matrix(a, dtype=np.float64)
    n, h = a.shape
    n_stored = np.bincount(a.indices, minlength=h)
    mean = np.bincount(a.indices, weights=a.data, minlength=h) / max(n, 1)
    squares = np.bincount(a.indices, weights=np.square(a.data - mean[a.indices]), minlength=h)
    return (a.T @ z).T, squares + (n - n_stored) * mean**2


def _dense_sums(z: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return zᵀa (p, h) and Σ(a − ā)² (h,) in blocks of cells."""
    n, h = a.shape
    mean = a.sum(axis=0, dtype=np.float64) / max(n, 1)
    products, squares = np.zeros((z.shape[1], h)), np.zeros(h)
    for rows in row_blocks(n, max(1, BLOCK_VALUES // max(h, 1))):
        centred = dense_rows(a, rows) - mean
        products += z[rows].T @ centred
        squares += np.square(centred).sum(axis=0)
    return products, squares
