"""What a feature can be known by in other cells: its correlation with every gene."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from .moments import ROUNDING
from .regression import cross_products
from .rows import Matrix


def signatures(a: sparse.csr_matrix, x: Matrix, shift: np.ndarray) -> np.ndarray:
    """Pearson's r (h, g) of each feature's activation with each gene's expression; 0 where either is constant.

    Parameters
    ----------
    a
        (n, h).
    x
        (n, g), dense or sparse, in memory or read by rows.
    shift
        (g,) of :func:`sae.core.moments.scan`: a value of each gene, which sums are taken about.
    """
    n, h = a.shape
    sums = cross_products(a, np.full((n, 1), n**-0.5), x, shift)
    # In place: with 16,384 features and 20,000 genes this matrix has 2.6 GB.
    r, of_genes, of_features = sums.products[:, :h], sums.products[:, h], sums.features_on_basis[:, 0]
    per_feature = _inverse_root(sums.feature_squares, of_features)
    per_gene = _inverse_root(sums.gene_squares, of_genes)
    for gene, row in enumerate(r):
        row -= of_genes[gene] * of_features
        row *= per_gene[gene] * per_feature
    return np.clip(r, -1, 1, out=r).T


def _inverse_root(squares: np.ndarray, on_mean: np.ndarray) -> np.ndarray:
    """Return 1 / √Σ(x − x̄)² from Σx² and √n x̄; 0 where rounding is all that is left of the sum."""
    centred = squares - on_mean**2
    return np.where(centred > ROUNDING * squares, centred, np.inf) ** -0.5
