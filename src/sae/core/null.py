"""What enrichment finds where there is nothing: random gene sets, shuffled cells, and the false discovery rate from them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse


def strength_bins(strength: np.ndarray, n_bins: int) -> np.ndarray:
    """Number (genes,) from 0 of the bin each gene falls into; bins of equal size, by quantiles of strength."""
    g = len(strength)
    if np.isnan(strength).any():
        raise ValueError(f"{np.isnan(strength).sum()} of {g} genes have no strength (NaN). Drop them from the sets.")
    if not 1 <= n_bins <= g // 2:
        raise ValueError(f"n_bins={n_bins} must be from 1 to {g // 2}, so that each bin has two of the {g} genes.")
    bins = np.empty(g, np.int64)
    bins[np.argsort(strength, kind="stable")] = np.arange(g) * n_bins // g
    return bins


def matched_sets(
    sets: sparse.csr_matrix,
    strength: np.ndarray,
    n_null: int,
    rng: int | np.random.Generator | None = 0,
    *,
    n_bins: int = 50,
) -> Iterator[sparse.csr_matrix]:
    """Draw random gene sets like the real ones in size and in how strongly their genes are expressed.

    Each replicate exchanges genes at random with others of their bin, the same way in all sets. Each random set is then a
    uniform draw among those with as many genes from every bin, and two sets share as many genes as the real ones do.

    Random genes are less correlated than those of a real set. What such sets show is whether a result is due to size and
    expression; the p-values of a test that takes genes for independent look better with them than they are.

    Parameters
    ----------
    sets
        (sets, genes), stored for a member (any value, which the gene in its place takes over).
    strength
        (genes,), such as mean expression.
    n_null
        Replicates.
    n_bins
        Of equal size, by quantiles of strength.

    Yields
    ------
    One replicate of all sets at a time, (sets, genes).
    """
    bins = strength_bins(strength, n_bins)
    rng = np.random.default_rng(rng)
    for _ in range(n_null):
        drawn = sets.copy()
        drawn.indices = shuffled_within(bins, rng)[sets.indices].astype(sets.indices.dtype)
        drawn.has_sorted_indices = False
        drawn.sort_indices()
        yield drawn


def permuted_cells(
    active: sparse.csr_matrix, codes: np.ndarray | None = None, rng: int | np.random.Generator | None = 0
) -> sparse.csr_matrix:
    """Give each cell all activations of a random cell, so that expression has nothing to do with the features.

    How features go together and how many cells each has is kept, and so is the correlation of the genes.

    Parameters
    ----------
    active
        Activations (n, h).
    codes
        (n,) batch of each cell; cells are exchanged within their batch only. None for a single batch.
    """
    return active[random_cells(active.shape[0], codes, rng)]


def random_cells(n: int, codes: np.ndarray | None = None, rng: int | np.random.Generator | None = 0) -> np.ndarray:
    """Return the cell (n,) whose place each one takes: all of them in a random order, within the batches of `codes` (n,)."""
    codes = np.zeros(n, np.int64) if codes is None else np.asarray(codes)
    if codes.shape != (n,):
        raise ValueError(f"codes has shape {codes.shape}, but there are {n} cells. Pass one batch for each.")
    return shuffled_within(codes, np.random.default_rng(rng))


def shuffled_within(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of all positions (n,) that keeps each within its group."""
    order = np.empty(len(groups), np.int64)
    order[np.argsort(groups, kind="stable")] = np.lexsort((rng.random(len(groups)), groups))
    return order


def empirical_fdr(scores: np.ndarray, real: np.ndarray, null: np.ndarray, n_null: int) -> np.ndarray:
    """Estimate the false discovery rate among tests that score at least as high, from tests without any effect.

    With B replicates of the null,

    FDR(t) = (1 + null scores ≥ t) / B / (real scores ≥ t),  q(s) = min over real t ≤ s of FDR(t), at most 1:

    the permutation estimate of Tusher, Tibshirani and Chu (2001, doi:10.1073/pnas.091062498) with all tests counted as null
    (π₀ = 1, the conservative choice), made monotone as a q-value (Storey and Tibshirani 2003, doi:10.1073/pnas.1530509100).
    The 1 that is added (Barber and Candès 2015, doi:10.1214/15-AOS1337) keeps a few scores that are higher than all of
    the null's, as half of the best ones are by chance with B = 1, from counting as certain.

    Parameters
    ----------
    scores
        For which the rate is wanted, in any shape.
    real
        Scores of all tests, higher for more evidence.
    null
        Those of the same tests in all replicates together. What is left out of both has no influence on higher scores.
    n_null
        B.
    """
    if n_null < 1:
        raise ValueError(f"n_null={n_null} replicates give no rate. At least one is needed.")
    found, counts = np.unique(real, return_counts=True)
    if len(found) == 0:
        return np.ones(np.shape(scores))
    n_by_chance = 1 + len(null) - np.searchsorted(np.sort(null), found, side="left")
    n_real = np.cumsum(counts[::-1])[::-1]
    rate = np.minimum.accumulate(np.minimum(n_by_chance / n_null / n_real, 1))
    place = np.searchsorted(found, scores, side="right") - 1
    return np.where(place < 0, 1.0, rate[np.maximum(place, 0)])
