"""Wilcoxon rank-sum test of every feature's active against its inactive cells, all genes at once.

A gene is ranked once for all features. Its cells are then visited once, and each adds its rank to the features active in it:
the sums of one gene stay in the processor's cache. Ranks count from that of zero, so that cells without the gene add
nothing, and are doubled: average ranks end in .5, and float64 holds sums of integers exactly up to 67 million cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numba import float64, njit
from scipy import special

from .columns import GeneBlock, GeneColumns
from .differential import BLOCK_VALUES
from .groups import Groups, Pattern, pattern_of
from .rows import Matrix, row_blocks
from .statistics import benjamini_hochberg
from .workers import Workers, available_threads, in_order

SUM_VALUES = 128_000_000
"""Rank sums (features × genes, twice with strata) held at a time, 1 GB; for further features all genes are ranked again."""

MIN_EXPECTED = 30.0
"""From here on p < 0.001 is as frequent as it should be when cells are permuted, and p < 1e-5 at most twice as frequent."""

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
class Strata:
    """Groups of cells that are ranked apart."""

    codes: np.ndarray
    """(n,) stratum of each cell, from 0."""
    sizes: np.ndarray
    """(strata,) cells of each."""

    @property
    def weights(self) -> np.ndarray:
        """(strata,) van Elteren's 1/(n_b + 1) in units of 1/(n + 1), and so exactly 1 for a lone stratum."""
        return (len(self.codes) + 1) / (self.sizes + 1)


@dataclass(frozen=True)
class RankSums:
    """What every gene's ranks add up to.

    A rank is twice that among the cells of the stratum, from 1, with average ranks for ties.
    """

    sums: np.ndarray
    """(genes, features), over the active cells of each feature, of the rank less that of a cell without the gene."""
    weighted: np.ndarray
    """The same, each rank times the weight of its stratum."""
    centre: np.ndarray
    """(strata, genes): rank of a cell without the gene less the mean rank n + 1."""
    spread: np.ndarray
    """(strata, genes): n³ − Σ t³ over groups of t tied cells; 0 for a constant gene."""
    n_with: np.ndarray
    """(genes,) cells that have the gene; 0 if some values are negative."""

    def of(self, features: slice) -> RankSums:
        """Return those of some features."""
        return replace(self, sums=self.sums[:, features], weighted=self.weighted[:, features])


def wilcoxon(
    groups: Groups,
    x: Matrix,
    codes: np.ndarray | None = None,
    *,
    min_cells: int,
    min_expected: float = MIN_EXPECTED,
) -> Iterator[RankSum]:
    """Compare active with inactive cells by the Wilcoxon rank-sum (Mann-Whitney U) test, for blocks of features.

    With R₁ the sum of the ranks of the n₁ active among all n cells, U = R₁ − n₁(n₁ + 1)/2, and with n₀ = n − n₁ and groups
    of t tied cells,

    z = ± max(abs(U − n₁n₀/2) − 1/2, 0) / √V,  V = n₁n₀ (n³ − Σ t³) / (12 n (n − 1)),  p = 2 Φ(−abs(z)),

    the normal approximation with corrections for ties and continuity (Hollander and Wolfe 1973), as in
    ``scipy.stats.mannwhitneyu(method="asymptotic")``. AUROC = U / (n₁n₀).

    U has a long tail where few cells with the gene are expected in the smaller group, and a single one may be many standard
    deviations above the mean. With K cells that have the gene, m = min(n₁, n₀) and Km/n below `min_expected`, p is at least

    2 P(T ≥ t) = 2 Σₖ P(X = k) Φ((kn/2 + 1/2 − t) / σₖ),  σₖ² = s² k (K − k)/(K − 1),  X ~ Hypergeometric(n, K, m),

    if the smaller group has more of the gene. T is the sum of its ranks, counted from that of a cell without the gene, s² the
    variance of these ranks over the K cells, of which n/2 is the mean, and X the number of them in the group. Given X, T is the
    sum of a sample without replacement, taken as normal; without s², where all have the same value, this is twice the p of
    Fisher's one-sided exact test. Genes with negative values, and the test with strata, keep the p of the normal approximation.

    With strata b, cells are ranked within theirs, and

    z = Σ (U_b − n₁n₀/2) / (n_b + 1) / √(Σ V_b / (n_b + 1)²),

    the weights with the most power against a small shift that is the same in all strata (van Elteren 1960; Lehmann 1975,
    section 3.3). It is not corrected for continuity, for the weighted sums are not one step apart. AUROC = Σ U_b / Σ n₁n₀ is
    that of pairs of cells from the same stratum. A lone stratum is the plain test.

    Parameters
    ----------
    groups
        Where each of h features is active among n cells. Two to four bytes for each active value are held.
    x
        Expression (n, g), dense or sparse, in memory or read by rows. From disk, all rows are read once to count, then
        once for every 64 million values that are not zero (0.5 GB of float32, else 0.8 GB), and these again for every 128 million features × genes
        (64 million with strata; 1 GB).
    codes
        (n,) stratum of each cell, such as its batch. None for a single stratum.
    min_cells
        Features with fewer active or fewer inactive cells, in all strata together, are left out.
    min_expected
        Expected cells Km/n from which on the normal approximation is used as it is; 0 for all genes.

    Yields
    ------
    The blocks of features of :func:`differential`. `score` is z, positive where active cells have more; for a
    rare gene whose p is larger than that of z, it is the z that has this p. Genes that are constant over all cells, or in
    each stratum where a feature has both active and inactive cells, are not tested: score 0, AUROC 0.5 and every p NaN.
    """
    if min_cells < 1:
        raise ValueError(f"min_cells={min_cells} is below 1, and a group without cells has no ranks.")
    n, g = x.shape
    strata = _strata(codes, n)
    features = np.flatnonzero((groups.n_active >= min_cells) & (groups.n_reference >= min_cells))
    genes = GeneColumns(x)
    step = max(1, BLOCK_VALUES // max(g, 1))
    n_sums = max(g, 1) * (2 if len(strata.sizes) > 1 else 1)
    for held in row_blocks(len(features), step * max(1, SUM_VALUES // (step * n_sums))):
        members = pattern_of(replace(groups, threshold=None), features[held])
        yield from _compared(features[held], members, genes, strata, step, min_expected)


def _strata(codes: np.ndarray | None, n: int) -> Strata:
    codes = np.zeros(n, np.int64) if codes is None else np.asarray(codes)
    if codes.shape != (n,):
        raise ValueError(f"codes has shape {codes.shape}, but there are {n} cells. Pass one stratum for each.")
    _, codes, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    return Strata(codes.astype(np.int32), sizes)


def _compared(
    features: np.ndarray,
    members: Pattern,
    genes: GeneColumns,
    strata: Strata,
    step: int,
    min_expected: float,
) -> Iterator[RankSum]:
    """Test some features, `step` at a time."""
    n1 = np.zeros((members.shape[1], len(strata.sizes)))
    count_members(members.starts, members.features, strata.codes, n1)
    sums = _rank_sums(members, genes, strata)

    def test(block: slice) -> RankSum:
        return _test(features[block], n1[block], sums.of(block), strata, min_expected)

    yield from in_order(test, row_blocks(len(features), step), available_threads())


def _test(features: np.ndarray, n1: np.ndarray, ranks: RankSums, strata: Strata, min_expected: float) -> RankSum:
    """Turn rank sums into statistics; n₁ is (features, strata)."""
    n, weights = strata.sizes, strata.weights
    pairs = n1 * (n - n1)
    # Twice the difference of W from its mean, so that a continuity correction of 1/2 is 1, which never changes the sign.
    difference = ranks.weighted.T + (n1 * weights) @ ranks.centre
    sd = np.sqrt((pairs * weights**2 / (3 * n * np.maximum(n - 1, 1))) @ ranks.spread)
    varies = sd > 0
    plain = len(n) == 1
    z = np.sign(difference) * np.maximum(np.abs(difference) - plain, 0) / np.where(varies, sd, np.inf)
    log_pval = np.where(varies, np.log(2) + special.log_ndtr(-np.abs(z)), np.nan)
    if plain and min_expected > 0:
        z, log_pval = _with_long_tail(z, log_pval, n1[:, 0].astype(np.int64), n[0], ranks, min_expected)
    pval = np.exp(log_pval)
    all_pairs = np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    unweighted = difference if plain else ranks.sums.T + n1 @ ranks.centre
    auroc = (unweighted + all_pairs) / (2 * all_pairs)
    return RankSum(features, z, auroc, pval, log_pval, benjamini_hochberg(pval))


def _with_long_tail(
    z: np.ndarray, log_pval: np.ndarray, n1: np.ndarray, n: int, ranks: RankSums, min_expected: float
) -> tuple[np.ndarray, np.ndarray]:
    """Raise the p of rare genes, and return z and log p that belong together."""
    raised = log_pval.copy()
    log_factorials = special.gammaln(np.arange(n + 1) + 1.0)
    raise_rare(ranks.sums.T, n1, ranks.n_with, ranks.spread[0], min_expected, log_factorials, raised)
    changed = raised > log_pval
    z[changed] = np.copysign(special.ndtri_exp(raised[changed] - np.log(2)), z[changed])
    return z, raised


def _rank_sums(members: Pattern, genes: GeneColumns, strata: Strata) -> RankSums:
    """Rank the cells in each gene, and add the ranks up over the members of each feature."""
    g, f, n_strata = genes.shape[1], members.shape[1], len(strata.sizes)
    sums = np.zeros((g, f))
    weighted = np.zeros((g, f)) if n_strata > 1 else sums
    found = RankSums(sums, weighted, np.empty((n_strata, g)), np.empty((n_strata, g)), np.zeros(g, np.int64))
    by_cell = members.starts, members.features
    workers = Workers(available_threads())
    try:
        for block in genes.blocks(workers):
            workers.each(partial(_add_gene, block, strata, by_cell, found), range(len(block)))
    finally:
        workers.close()
    return found


def _add_gene(
    block: GeneBlock, strata: Strata, members: tuple[np.ndarray, np.ndarray], found: RankSums, worker: int, j: int
) -> None:
    """Rank the cells in the j-th gene of a block, and fill its place in what is to be found."""
    cells, values = block.gene(j)
    ranks, centre, spread = rank_cells(cells, values, strata)
    gene = block.first + j
    found.centre[:, gene], found.spread[:, gene] = centre, spread
    if values.min(initial=0) >= 0:
        found.n_with[gene] = np.count_nonzero(values)
    add_ranks(cells, ranks, *members, found.sums[gene])
    if found.weighted is not found.sums:
        add_ranks(cells, ranks * strata.weights[strata.codes[cells]], *members, found.weighted[gene])


def rank_cells(cells: np.ndarray, values: np.ndarray, strata: Strata) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank the cells of one gene within their strata.

    Parameters
    ----------
    cells, values
        (stored,) values may be negative, and stored zeros are zeros; cells that are not stored have zeros.

    Returns
    -------
    (stored,) ranks less that of a cell without the gene, and `centre` and `spread` (strata,), all as in `RankSums`.
    """
    n_strata = len(strata.sizes)
    ranks, centre, spread = np.empty(len(values)), np.empty(n_strata), np.empty(n_strata)
    rank_stored(values, np.argsort(values), cells, strata.codes, strata.sizes, ranks, centre, spread)
    return ranks, centre, spread


@_compiled
def rank_stored(values, order, cells, codes, sizes, ranks, centre, spread):
    """Rank all cells of a gene within their strata; see :func:`rank_cells`.

    Parameters
    ----------
    order
        Sorts the values upwards.
    codes, sizes
        See `Strata`.
    ranks, centre, spread
        Written, whatever they hold.
    """
    n_zero, n_negative = sizes.copy(), np.zeros_like(sizes)
    for e in range(values.size):
        stratum = codes[cells[e]]
        n_zero[stratum] -= values[e] != 0
        n_negative[stratum] += values[e] < 0
    # n³ − Σ t³ = Σ t (n − t)(n + t), which loses no digits where nearly all cells are tied. In integers it overflows.
    for b in range(sizes.size):
        n, t = sizes[b], n_zero[b]
        centre[b] = 2 * n_negative[b] + t - n
        spread[b] = np.float64(t) * (n - t) * (n + t)
    # Ranks count from zero's, so that n_lower is below 0 until all negative values have passed. It then is 0, and so is the
    # rank of a stored zero.
    n_lower, n_tied = -n_negative, np.zeros_like(sizes)
    low = 0
    while low < values.size:
        value = values[order[low]]
        high = low
        # Rather than equal, or a NaN, which equals nothing, would never be passed.
        while high < values.size and not values[order[high]] > value:
            n_tied[codes[cells[order[high]]]] += value != 0
            high += 1
        for k in range(low, high):
            b = codes[cells[order[k]]]
            ranks[order[k]] = 2 * n_lower[b] + np.sign(value) * n_zero[b] + n_tied[b]
        for k in range(low, high):
            b = codes[cells[order[k]]]
            n, t = sizes[b], n_tied[b]
            spread[b] += np.float64(t) * (n - t) * (n + t)
            n_lower[b] += t
            n_tied[b] = 0
        low = high


@_compiled
def count_members(starts, features, codes, counts):
    """Count the cells of each feature in each stratum (features, strata)."""
    for cell in range(codes.size):
        for k in range(starts[cell], starts[cell + 1]):
            counts[features[k], codes[cell]] += 1


@_compiled
def add_ranks(cells, ranks, starts, features, sums):
    """Add the rank of each cell to the sums of its features (CSR: `starts`, `features`)."""
    for e in range(cells.size):
        rank, cell = ranks[e], cells[e]
        for k in range(starts[cell], starts[cell + 1]):
            sums[features[k]] += rank


@_compiled
def raise_rare(sums, n_active, n_with, spread, min_expected, log_factorials, log_pval):
    """Raise p where few cells with the gene are expected in the smaller group and it has more; see :func:`wilcoxon`.

    Parameters
    ----------
    sums, n_with, spread
        See `RankSums`, of a lone stratum: (features, genes), (genes,) and (genes,).
    n_active
        (features,)
    log_factorials
        (n + 1,) log 0! to log n!.
    log_pval
        (features, genes) of the normal approximation; written.
    """
    n = log_factorials.size - 1
    for gene in range(n_with.size):
        k = n_with[gene]
        for feature in range(n_active.size):
            m, total = n_active[feature], sums[feature, gene]
            if 2 * m > n:
                m, total = n - m, n * k - total
            # mk is the mean of the total: n, doubled, for each of the mk/n cells with the gene.
            if m * k < min_expected * n and total > m * k:
                log_tail = log_upper_tail(total, m, k, spread[gene], log_factorials)
                log_pval[feature, gene] = max(log_pval[feature, gene], min(math.log(2.0) + log_tail, 0.0))


@_compiled
def log_upper_tail(total, m, n_with, spread, log_factorials):
    """Compute log P(T ≥ total / 2) of :func:`wilcoxon` for m cells, and a total above its mean.

    Terms are added on both sides of the likeliest number of cells with the gene, until they no longer matter.
    """
    n = log_factorials.size - 1
    n_without = n - n_with
    variance = max(spread / (3.0 * n_with) - float64(n_without) * n, 0.0) / max(n_with - 1, 1)
    constant = log_factorials[n_with] + log_factorials[n_without] - log_factorials[n]
    constant += log_factorials[m] + log_factorials[n - m]
    lowest, highest = max(0, m - n_without), min(m, n_with)
    start = min(math.ceil(total / n), highest)
    log_tail = -np.inf
    for first, step in ((start, 1), (start - 1, -1)):
        k = first
        while lowest <= k <= highest:
            log_term = constant - log_factorials[k] - log_factorials[n_with - k]
            log_term -= log_factorials[m - k] + log_factorials[n_without - m + k]
            sd = math.sqrt(variance * k * (n_with - k))
            log_term += log_normal_tail((total - 1 - float64(n) * k) / sd)
            log_tail = np.logaddexp(log_tail, log_term)
            if log_term < log_tail - 30:
                break
            k += step
    return log_tail


@_compiled
def log_normal_tail(z):
    """Compute log(1 − Φ(z)), where the tail falls below the range of floats to 1e-8 by its asymptotic series."""
    if z < 25:
        return math.log(math.erfc(z / math.sqrt(2.0)) / 2)
    return math.log1p(-1 / z**2) - z**2 / 2 - math.log(z * math.sqrt(2 * math.pi))
