"""Over-representation of gene sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from .statistics import benjamini_hochberg


@dataclass(frozen=True)
class OverRepresentation:
    """All arrays (features, sets)."""

    overlap: np.ndarray
    log2_odds: np.ndarray
    pval: np.ndarray
    padj: np.ndarray


def over_representation(study: np.ndarray, sets: sparse.csr_matrix) -> OverRepresentation:
    """Test whether each gene set is over-represented in each study set: one-sided hypergeometric test.

    With N measured genes, K of them in the set and n in the study set, P(X ≥ overlap) for X ~ Hypergeometric(N, K, n),
    which is Fisher's exact test with alternative "greater". Adjusted over sets by Benjamini-Hochberg. Odds ratios have
    0.5 added to each cell of the table (Haldane and Anscombe).

    Parameters
    ----------
    study
        (features, genes), which genes stand out for which feature.
    sets
        (sets, genes), 1 for a member.
    """
    n_genes = study.shape[1]
    overlap = np.asarray(sets @ study.T.astype(np.float64)).T.round().astype(np.int64)
    size = sets.getnnz(axis=1)[None, :]
    n_study = study.sum(axis=1)[:, None]
    table = np.stack(np.broadcast_arrays(overlap, size, n_study), axis=-1).reshape(-1, 3)
    unique, inverse = np.unique(table, axis=0, return_inverse=True)
    hits, members, drawn = unique.T
    pval = np.where(hits > 0, stats.hypergeom.sf(hits - 1, n_genes, members, drawn), 1.0)
    pval = pval[inverse].reshape(overlap.shape)
    inside, outside = overlap + 0.5, n_study - overlap + 0.5
    rest_inside, rest_outside = size - overlap + 0.5, n_genes - size - n_study + overlap + 0.5
    log2_odds = np.log2(inside * rest_outside / (outside * rest_inside))
    return OverRepresentation(overlap, log2_odds, pval, benjamini_hochberg(pval))
