"""Over-representation of gene sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

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
    pval = _upper_tails(overlap, np.broadcast_to(size, overlap.shape), np.broadcast_to(n_study, overlap.shape), n_genes)
    inside, outside = overlap + 0.5, n_study - overlap + 0.5
    rest_inside, rest_outside = size - overlap + 0.5, n_genes - size - n_study + overlap + 0.5
    log2_odds = np.log2(inside * rest_outside / (outside * rest_inside))
    return OverRepresentation(overlap, log2_odds, pval, benjamini_hochberg(pval))


def _upper_tails(hits: np.ndarray, members: np.ndarray, drawn: np.ndarray, total: int) -> np.ndarray:
    """P(X ≥ hits) for X ~ Hypergeometric(total, members, drawn), each distribution summed once from its far end."""
    log_factorial = special.gammaln(np.arange(total + 1) + 1.0)
    found = hits > 0
    x, K, n = (part[found].astype(np.int64) for part in (hits, members, drawn))
    order = np.argsort(K * (total + 1) + n, kind="stable")
    x, K, n = x[order], K[order], n[order]
    starts = np.flatnonzero(np.diff(K * (total + 1) + n, prepend=-1))
    stops = np.append(starts, len(x))[1:]
    tails = np.empty(len(x))
    for start, stop in zip(starts, stops, strict=True):
        k, m = K[start], n[start]
        lowest = max(0, m + k - total)
        j = np.arange(lowest, min(k, m) + 1)
        log_choose = log_factorial[k] - log_factorial[j] - log_factorial[k - j]
        log_choose += log_factorial[total - k] - log_factorial[m - j] - log_factorial[total - k - m + j]
        probability = np.exp(log_choose + log_factorial[m] + log_factorial[total - m] - log_factorial[total])
        tails[start:stop] = np.cumsum(probability[::-1])[::-1][x[start:stop] - lowest]
    pval = np.ones(hits.shape)
    pval[found] = np.minimum(_unsorted(tails, order), 1)
    return pval


def _unsorted(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    restored = np.empty_like(values)
    restored[order] = values
    return restored
