"""Which cells stand for a feature, and which it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Groups:
    """Two groups of cells for each feature; both matrices (h, n), boolean CSR without stored zeros."""

    positive: sparse.csr_matrix
    active: sparse.csr_matrix
    """Where the feature is above zero. The reference is all other cells: sums over it are the total less these."""

    @property
    def n_positive(self) -> np.ndarray:
        """Cells of the positive group of each feature."""
        return self.positive.getnnz(axis=1)

    @property
    def n_reference(self) -> np.ndarray:
        """Cells where each feature is zero."""
        return self.active.shape[1] - self.active.getnnz(axis=1)

    def status(self, min_cells: int) -> np.ndarray:
        """Say of each feature whether it can be tested, or why not (h,)."""
        return np.select(
            [self.n_positive < min_cells, self.n_reference < min_cells],
            [
                f"fewer than {min_cells} {'active cells' if self.positive is self.active else 'cells above the percentile'}",
                f"fewer than {min_cells} inactive cells",
            ],
            "tested",
        ).astype(object)


def active_groups(a: sparse.csr_matrix) -> Groups:
    """Compare the cells where a feature is above zero with all others."""
    active = sparse.csr_matrix((a > 0).T)
    return Groups(active, active)


def percentile_groups(a: sparse.csr_matrix, percentile: float = 99) -> Groups:
    """Select the cells where a feature is above a percentile of its activation over all cells.

    The percentile is NumPy's, with linear interpolation. It lies between two neighbours among the sorted values and
    below the higher one, so the cells above it are those above the lower neighbour, and nothing is interpolated. Where
    the lower neighbour is zero (fewer than 1 % of the cells are active, for the 99th percentile) these are all active
    cells.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    percentile
        0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is not between 0 and 100.")
    values = sparse.csc_matrix(a, copy=True)
    values.data = np.maximum(values.data, 0)
    values.eliminate_zeros()
    n, h = values.shape
    n_active = np.diff(values.indptr)
    # Zeros are the lowest values, so this is a place among the active cells, or negative where it falls on a zero.
    place = int((n - 1) * (percentile / 100)) - (n - n_active)
    threshold = np.zeros(h, dtype=values.dtype)
    for feature in np.flatnonzero(place >= 0):
        column = values.data[values.indptr[feature] : values.indptr[feature + 1]]
        threshold[feature] = np.partition(column, place[feature])[place[feature]]
    above = values.data > np.repeat(threshold, n_active)
    starts = np.append(0, np.cumsum(above))[values.indptr]
    return Groups(_marked(values.indices[above], starts, (h, n)), _marked(values.indices, values.indptr, (h, n)))


def _marked(indices: np.ndarray, indptr: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones(len(indices), dtype=bool), indices, indptr), shape=shape)
