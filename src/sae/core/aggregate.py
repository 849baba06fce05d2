"""Columns of a matrix added up in groups: the peaks of a gene, say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .moments import chunks
from .rows import Matrix, on_disk, take_rows


@dataclass(frozen=True)
class Aggregated:
    """Sums over groups of columns, (n, groups), made whenever rows are read.

    Attributes
    ----------
    members
        (columns, groups), 1 where a column belongs to a group.
    log_base
        Of log1p values: they are summed as what they are the logarithm of, and the sum is log1p in the same base. None for
        others, which are summed as they are.
    """

    matrix: Matrix
    members: sparse.csr_matrix
    log_base: float | None

    dtype = np.dtype(np.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and groups."""
        return self.matrix.shape[0], self.members.shape[1]

    def __getitem__(self, rows: slice) -> np.ndarray | sparse.csr_matrix:
        """Return some rows, CSR if the matrix gives CSR."""
        part = take_rows(self.matrix, rows)
        if not sparse.issparse(part):
            return _log(_unlog(part, self.log_base) @ self.members, self.log_base)
        unlogged = sparse.csr_matrix((_unlog(part.data, self.log_base), part.indices, part.indptr), part.shape)
        summed = unlogged @ self.members
        summed.data = _log(summed.data, self.log_base)
        return summed


def aggregate(x: Matrix, members: sparse.csr_matrix, log_base: float | None) -> Matrix:
    """Add up columns by group: at once where `x` (n, d) is in memory, else when rows are read. See :class:`Aggregated`."""
    lazy = Aggregated(x, members, log_base)
    if on_disk(x):
        return lazy
    parts = [part for _, part in chunks(lazy)]
    return sparse.vstack(parts, format="csr") if sparse.issparse(x) else np.concatenate(parts)


def _unlog(values: np.ndarray, base: float | None) -> np.ndarray:
    values = values.astype(np.float64)
    return values if base is None else np.expm1(values * np.log(base))


def _log(values: np.ndarray, base: float | None) -> np.ndarray:
    return values if base is None else np.log1p(values) / np.log(base)
