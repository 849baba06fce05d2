"""How often and how strongly each feature is active, added up over blocks of cells."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from .rows import Matrix, as_csr, pieces

PIECE_ROWS = 65_536


class FeatureStatistics:
    """Counts, sums and maxima of activations (n, h); sums are float64, in the order of the cells however they come.

    Attributes
    ----------
    n
        Cells.
    n_cells
        (h,) cells in which the feature is active.
    total
        (h,) sum of its activations.
    highest
        (h,) its largest activation, 0 where it has none.
    """

    def __init__(self, n_features: int):
        self.n = 0
        self.n_cells = np.zeros(n_features, np.int64)
        self.total, self.highest = np.zeros((2, n_features))

    @classmethod
    def of(cls, a: Matrix) -> FeatureStatistics:
        """Add up activations (n, h), in memory or on disk."""
        found = cls(a.shape[1])
        for _, part in pieces(a, PIECE_ROWS):
            found.add(as_csr(part))
        return found

    def add(self, a: sparse.csr_matrix) -> None:
        """Add the next cells."""
        # NumPy is fast where nothing is to be converted on the way.
        features, values = a.indices.astype(np.intp), a.data.astype(np.float64)
        self.n += a.shape[0]
        self.n_cells += np.bincount(features, minlength=len(self.n_cells))
        np.add.at(self.total, features, values)
        np.maximum.at(self.highest, features, values)
