"""Reading a matrix by rows, dense or CSR, without copying all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

Matrix: TypeAlias = Any
"""A NumPy array or a SciPy CSR matrix."""


def dense_rows(x: Matrix, rows: slice | np.ndarray) -> np.ndarray:
    """Return some rows of `x` (n, d) as a dense array of its dtype."""
    part = x[rows]
    return part.toarray() if sparse.issparse(part) else np.asarray(part)


def row_blocks(n: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` rows that cover `n` rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def varying_columns(x: Matrix) -> np.ndarray:
    """Mark the columns of `x` that do not hold one and the same value throughout."""
    if x.shape[0] == 0:
        return np.zeros(x.shape[1], dtype=bool)
    highest, lowest = x.max(axis=0), x.min(axis=0)
    if sparse.issparse(x):
        highest, lowest = highest.toarray().ravel(), lowest.toarray().ravel()
    return highest > lowest
