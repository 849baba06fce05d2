"""Wilcoxon rank-sum test of every feature's active against its inactive cells, all genes at once.

A gene is ranked once for all features. Ranks count from that of zero, so that cells without the gene add nothing, and are
kept as twice the rank: average ranks end in .5, and sums of integers are exact in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from scipy import sparse, special

from .differential import BLOCK_VALUES
from .rows import Matrix, row_blocks
from .statistics import benjamini_hochberg

RANKED_VALUES = 8_000_000
"""Values sorted at a time; 0.5 GB at most."""
SUM_VALUES = 128_000_000
"""Rank sums (features × genes) held at a time, 1 GB; where there are more, genes are ranked again for the next features."""

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class RankSum:
    """Statistics of a block of features; all arrays but the first (features of the block, genes)."""

    features: np.ndarray
    score: np.ndarray
    auroc: np.ndarray
    """Chance that an active cell has more of the gene than an inactive one, plus half the chance of a tie."""
    pval: np.ndarray
    log_pval: np.ndarray
    """Natural logarithm of p, also where p itself is too small for a float."""
    padj: np.ndarray


@dataclass(frozen=True)
class Ranks:
    """Ranks of the cells in each of some genes, average ranks for ties."""

    twice: sparse.csc_matrix
    """(n, genes), int64: twice the rank less `zero`. Cells that are not stored have the rank of zero."""
    zero: np.ndarray
    """(genes,), int64: twice the rank of a cell without the gene."""
    spread: np.ndarray
    """(genes,): n³ − Σ t³ over groups of t tied cells; 0 for a constant gene."""


def wilcoxon(active: sparse.csr_matrix, x: Matrix, *, min_cells: int) -> Iterator[RankSum]:
    """Compare active with inactive cells by the Wilcoxon rank-sum (Mann-Whitney U) test, for blocks of features.

    With R₁ the sum of the ranks of the n₁ active among all n cells, U = R₁ − n₁(n₁ + 1)/2, and with n₀ = n − n₁ and groups
    of t tied cells,

    z = ± max(abs(U − n₁n₀/2) − 1/2, 0) / √(n₁n₀ (n³ − Σ t³) / (12 n (n − 1))),  p = 2 Φ(−abs(z)),

    the normal approximation with corrections for ties and continuity (Hollander and Wolfe 1973), as in
    ``scipy.stats.mannwhitneyu(method="asymptotic")``. AUROC = U / (n₁n₀).

    Parameters
    ----------
    active
        (n, h); a feature is active in a cell where it is stored and positive.
    x
        Expression (n, g), dense or CSR.
    min_cells
        Features with fewer active or fewer inactive cells are left out.

    Yields
    ------
    The blocks of features of :func:`differential`. `score` is z, positive where active cells have more. Genes that are
    constant over all cells are not tested: score 0, AUROC 0.5 and every p NaN.
    """
    if min_cells < 1:
        raise ValueError(f"min_cells={min_cells} is below 1, and a group without cells has no ranks.")
    n, g = x.shape
    members = sparse.csr_matrix(active > 0)
    n_active = members.getnnz(axis=0).astype(np.int64)
    features = np.flatnonzero((n_active >= min_cells) & (n - n_active >= min_cells))
    step = max(1, BLOCK_VALUES // max(g, 1))
    n_held = step * max(1, SUM_VALUES // (step * max(g, 1)))
    for held in row_blocks(len(features), n_held):
        chosen = features[held]
        sums, spread = _rank_sums(members[:, chosen], x)
        for block in row_blocks(len(chosen), step):
            yield _test(chosen[block], sums[:, block].T, n_active[chosen[block], None], n, spread)


def rank_cells(columns: sparse.csc_matrix) -> Ranks:
    """Rank the cells in each column; values may be negative, and stored zeros are zeros."""
    n, g = columns.shape
    starts, values = columns.indptr, columns.data
    order = np.empty(len(values), np.int64)
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        order[start:stop] = start + np.argsort(values[start:stop])
    twice, zero, spread = np.empty(len(values), np.int64), np.empty(g, np.int64), np.empty(g)
    rank_csc(starts, values, order, n, twice, zero, spread)
    return Ranks(sparse.csc_matrix((twice, columns.indices, starts), shape=(n, g)), zero, spread)


def _rank_sums(members: sparse.csr_matrix, x: Matrix) -> tuple[np.ndarray, np.ndarray]:
    """Twice the rank sum of every gene over the members of each feature (genes, features), and each gene's spread."""
    n_members = members.getnnz(axis=0)
    sums, spread = np.zeros((x.shape[1], members.shape[1]), np.int64), np.empty(x.shape[1])
    for genes, columns in _columns(x):
        ranks = rank_cells(columns)
        twice = ranks.twice
        add_ranks_csc(twice.indptr, twice.indices, twice.data, members.indptr, members.indices, sums[genes])
        sums[genes] += ranks.zero[:, None] * n_members
        spread[genes] = ranks.spread
    return sums, spread


def _test(features: np.ndarray, twice_sums: np.ndarray, n1: np.ndarray, n: int, spread: np.ndarray) -> RankSum:
    """Turn twice the rank sums (features, genes) into statistics; n₁ is (features, 1)."""
    pairs = n1 * (n - n1)
    twice_u = twice_sums - n1 * (n1 + 1)
    difference = twice_u - pairs
    varies = spread > 0
    twice_sd = np.sqrt(pairs * spread / (3 * n * (n - 1)))
    # The continuity correction of 1/2 is 1 here, and never changes the sign.
    z = np.sign(difference) * np.maximum(np.abs(difference) - 1, 0) / np.where(varies, twice_sd, 1)
    tail = np.where(varies, -np.abs(z), np.nan)
    pval, log_pval = 2 * special.ndtr(tail), np.minimum(np.log(2) + special.log_ndtr(tail), 0)
    return RankSum(features, z, twice_u / (2 * pairs), pval, log_pval, benjamini_hochberg(pval))


def _columns(x: Matrix) -> Iterator[tuple[slice, sparse.csc_matrix]]:
    """Yield consecutive blocks of genes with the values of each, at most `RANKED_VALUES` or one gene."""
    n, g = x.shape
    if not sparse.issparse(x):
        for genes in row_blocks(g, max(1, RANKED_VALUES // max(n, 1))):
            by_gene = np.ascontiguousarray(x[:, genes].T, dtype=np.float64)
            gene, cells = np.nonzero(by_gene)
            yield genes, _csc(np.bincount(gene, minlength=len(by_gene)), cells, by_gene[gene, cells], n)
        return
    # Looked at anew: a matrix may carry a note of its order from before it was changed, and the kernel relies on it.
    x = sparse.csr_matrix((x.data, x.indices, x.indptr), shape=x.shape)
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    sizes = np.zeros(g, np.int64)
    for some in row_blocks(x.nnz, RANKED_VALUES):
        sizes += np.bincount(x.indices[some], minlength=g)
    ends = np.cumsum(sizes)
    cursors = x.indptr[:-1].copy()
    low = 0
    while low < g:
        high = max(low + 1, int(np.searchsorted(ends, ends[low] - sizes[low] + RANKED_VALUES, side="right")))
        genes = slice(low, high)
        size = sizes[genes].sum()
        cells, values = np.empty(size, np.int32), np.empty(size)
        places = np.cumsum(sizes[genes]) - sizes[genes]
        take_columns_csr(x.indptr, x.indices, x.data, cursors, low, high, places, cells, values)
        yield genes, _csc(sizes[genes], cells, values, n)
        low = high


def _csc(sizes: np.ndarray, cells: np.ndarray, values: np.ndarray, n: int) -> sparse.csc_matrix:
    return sparse.csc_matrix((values, cells, np.concatenate([[0], np.cumsum(sizes)])), shape=(n, len(sizes)))


@_compiled
def take_columns_csr(indptr, indices, data, cursors, low, high, places, cells, values):
    """Copy the entries of columns low to high, by column.

    Parameters
    ----------
    cursors
        (n,) first entry of each row in these columns; moved to the first one after them, so that all blocks together
        read every entry once.
    places
        (high − low,) where each column begins in `cells` and `values`, which are written; moved to its end.
    """
    for r in range(cursors.size):
        e = cursors[r]
        while e < indptr[r + 1] and indices[e] < high:
            place = places[indices[e] - low]
            places[indices[e] - low] = place + 1
            cells[place] = r
            values[place] = data[e]
            e += 1
        cursors[r] = e


@_compiled
def rank_csc(starts, values, order, n, twice, zero, spread):
    """Rank n cells in each column, average ranks for ties.

    Parameters
    ----------
    order
        Sorts the values of each column upwards.
    twice, zero, spread
        Written: see `Ranks`.
    """
    for j in range(starts.size - 1):
        first, stop = starts[j], starts[j + 1]
        n_negative, n_positive = 0, 0
        for e in range(first, stop):
            n_negative += values[e] < 0
            n_positive += values[e] > 0
        n_zero = n - n_negative - n_positive
        zero[j] = 2 * n_negative + n_zero + 1
        # n³ − Σ t³ = Σ t (n − t)(n + t), which loses no digits where nearly all cells are tied. In integers it overflows.
        total = np.float64(n_zero) * (n - n_zero) * (n + n_zero)
        low = first
        while low < stop:
            value = values[order[low]]
            high = low + 1
            while high < stop and values[order[high]] == value:
                high += 1
            rank = zero[j]
            if value != 0:
                n_tied = high - low
                n_below = low - first if value < 0 else n - (stop - low)
                rank = 2 * n_below + n_tied + 1
                total += np.float64(n_tied) * (n - n_tied) * (n + n_tied)
            for e in range(low, high):
                twice[order[e]] = rank - zero[j]
            low = high
        spread[j] = total


@_compiled
def add_ranks_csc(starts, cells, twice, indptr, features, sums):
    """Add rank matrixᵀ (CSC) · members (CSR: `indptr`, `features`) to `sums` (genes, features)."""
    for j in range(starts.size - 1):
        of_gene = sums[j]
        for e in range(starts[j], starts[j + 1]):
            rank = twice[e]
            for k in range(indptr[cells[e]], indptr[cells[e] + 1]):
                of_gene[features[k]] += rank
