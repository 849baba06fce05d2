"""Differential expression of every feature's active against its inactive cells, all genes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .rows import Matrix, dense_rows, row_blocks, varying_columns
from .statistics import benjamini_hochberg, log2_fold_change, welch

BLOCK_VALUES = 4_000_000
"""Features × genes worked on at a time; about 15 float64 arrays of this size are alive at once (0.5 GB)."""
CHUNK_ROWS = 4096
ROUNDING = 1e-13
"""A variance below this share of the mean square is what rounding leaves of zero."""


@dataclass(frozen=True)
class Differential:
    """Statistics of a block of features; all arrays (features of the block, genes)."""

    features: np.ndarray
    score: np.ndarray
    log2fc: np.ndarray
    pval: np.ndarray
    padj: np.ndarray


@dataclass(frozen=True)
class _Sums:
    n: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def mean_variance(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self.first / self.n
        square = self.second / self.n
        variance = (square - mean**2) * self.n / (self.n - 1)
        return mean, np.where(variance > ROUNDING * square, variance, 0)


def differential(
    active: sparse.csr_matrix, x: Matrix, *, log_base: float | None, pseudocount: float, min_cells: int
) -> Iterator[Differential]:
    """Compare active with inactive cells by Welch's t, for blocks of features.

    Parameters
    ----------
    active
        (n, h); a feature is active in a cell where it is stored and positive.
    x
        Expression (n, g), dense or CSR.
    log_base, pseudocount
        For the fold change, see :func:`log2_fold_change`.
    min_cells
        Features with fewer active or fewer inactive cells are left out.

    Yields
    ------
    Blocks of features in order. Genes that are constant over all cells are not tested: score 0, p and adjusted p NaN.
    """
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells} is below 2, and one cell has no variance.")
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )
    n, g = x.shape
    members = sparse.csr_matrix((active > 0).T, dtype=np.float64)
    n_active = members.getnnz(axis=1)
    features = np.flatnonzero((n_active >= min_cells) & (n - n_active >= min_cells))
    shift = np.zeros(g) if sparse.issparse(x) else x.mean(axis=0, dtype=np.float64)
    everyone = sparse.csr_matrix(np.ones((1, n)))
    total = _sums(everyone, x, shift)
    varies = varying_columns(x)
    step = max(1, BLOCK_VALUES // max(g, 1))
    for block in row_blocks(len(features), step):
        chosen = features[block]
        one = _sums(members[chosen], x, shift)
        rest = _Sums(total.n - one.n, total.first - one.first, total.second - one.second)
        (mean1, var1), (mean0, var0) = one.mean_variance(), rest.mean_variance()
        score, pval = welch(mean1, var1, one.n, mean0, var0, rest.n)
        score, pval = np.where(varies, score, 0), np.where(varies, pval, np.nan)
        mean1, mean0 = (np.maximum(mean + shift, 0) for mean in (mean1, mean0))
        log2fc = log2_fold_change(mean1, mean0, log_base=log_base, pseudocount=pseudocount)
        yield Differential(chosen, score, log2fc, pval, benjamini_hochberg(pval))


def _sums(members: sparse.csr_matrix, x: Matrix, shift: np.ndarray) -> _Sums:
    """Σ(x − shift) and Σ(x − shift)² of every gene over the cells of each row of `members`, in float64."""
    f, n = members.shape
    first, second = np.zeros((f, x.shape[1])), np.zeros((f, x.shape[1]))
    by_cell = sparse.csc_matrix(members)
    for rows in row_blocks(n, CHUNK_ROWS):
        part = sparse.csr_matrix(by_cell[:, rows])
        if sparse.issparse(x):
            values = x[rows].astype(np.float64)
            first += (part @ values).toarray()
            second += (part @ values.multiply(values).tocsr()).toarray()
        else:
            values = dense_rows(x, rows).astype(np.float64) - shift
            first += part @ values
            second += part @ np.square(values)
    return _Sums(np.asarray(members.sum(axis=1)).reshape(-1, 1), first, second)
