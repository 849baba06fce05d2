"""Gene sets of every feature: over-representation among chosen genes, and a rank test of all genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from scipy import sparse, special

from .moments import chunks
from .rows import Matrix
from .statistics import average_ranks, benjamini_hochberg

_compiled: Any = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class OverRepresentation:
    """All arrays (features, sets)."""

    overlap: np.ndarray
    log2_odds: np.ndarray
    pval: np.ndarray
    padj: np.ndarray


@dataclass(frozen=True)
class RankedSets:
    """All arrays (features, sets)."""

    z: np.ndarray
    """Positive where the genes of the set score higher than the others."""
    auroc: np.ndarray
    """Chance that a gene of the set scores higher than another gene, plus half the chance of a tie."""
    pval: np.ndarray
    log_pval: np.ndarray
    """Natural logarithm of p, also where p itself is too small for a float."""
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


def rank_sets(score: np.ndarray, sets: sparse.csr_matrix, inflation: np.ndarray | None = None) -> RankedSets:
    """Test whether the genes of each set score higher or lower than all other tested genes: Mann-Whitney, two-sided.

    With R the sum of the ranks of the m members among n tested genes, U = R − m(m + 1)/2, k = n − m and ρ the mean
    correlation of the scores of two members,

    z = ± max(abs(U − mk/2) − 1/2, 0) / σ,  p = 2 Φ(−abs(z)),  AUROC = U / (mk),

    σ² = mk [asin 1 + (k − 1) asin ½ + (m − 1)(k − 1) asin(ρ/2) + (m − 1) asin((1 + ρ)/2)] / (2π) · (1 − Σ(t³ − t)/(n³ − n))

    over groups of t tied genes. Genes outside the set count as independent. This is the rank version of CAMERA (Wu and
    Smyth 2012, doi:10.1093/nar/gks461); with ρ = 0 the first factor is mk(n + 1)/12, and the test that of
    ``scipy.stats.mannwhitneyu(method="asymptotic")``. Adjusted over sets by Benjamini-Hochberg.

    Without `inflation` genes count as independent, which those of a real set are not: p-values are then far too small.

    Parameters
    ----------
    score
        (features, genes); NaN for a gene that was not tested for a feature. It then belongs neither to a set nor to the
        others.
    sets
        (sets, genes), 1 for a member.
    inflation
        (sets,) of :func:`set_inflation` for the same sets; ρ = (inflation − 1) / (genes of the set − 1).

    Returns
    -------
    A set with no tested gene, with all of them, or where all scores are equal is not tested: z 0, AUROC 0.5, every p NaN.
    """
    correlation = _mean_correlation(inflation, sets)
    tested = ~np.isnan(score)
    n = tested.sum(axis=1)[:, None].astype(np.float64)
    ranks, ties = average_ranks(score)
    # Genes that were not tested hold the highest ranks, as one group of ties: without it all is as if they were not there.
    ranks[~tested] = 0
    n_untested = score.shape[1] - n[:, 0]
    ties -= n_untested**3 - n_untested

    m = _sums(sets, tested.astype(np.float64))
    k = n - m
    difference = _sums(sets, ranks) - m * (n + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = _u_variance(m, k, correlation) * (1 - ties[:, None] / (n**3 - n))
        varies = variance > 0
        z = np.sign(difference) * np.maximum(np.abs(difference) - 0.5, 0) / np.sqrt(variance)
        auroc = 0.5 + difference / (m * k)
    tail = np.where(varies, -np.abs(z), np.nan)
    pval, log_pval = 2 * special.ndtr(tail), np.minimum(np.log(2) + special.log_ndtr(tail), 0)
    z, auroc = np.where(varies, z, 0), np.where(varies, auroc, 0.5)
    return RankedSets(z, auroc, pval, log_pval, benjamini_hochberg(pval))


def set_inflation(
    x: Matrix, sets: sparse.csr_matrix, mean: np.ndarray, sd: np.ndarray, *, codes: np.ndarray | None = None
) -> np.ndarray:
    """Measure how much correlation between its genes inflates the variance of each set's mean score.

    The variance inflation factor of CAMERA (Wu and Smyth 2012, doi:10.1093/nar/gks461) of a set of m genes, 1 + (m − 1) r̄
    with r̄ the mean Pearson correlation of two of its genes, is the variance of the sum of its standardised genes
    over m: Var(Σ zⱼ) = m + m(m − 1) r̄. At least 1.

    Over all cells, correlations include what tells cell types apart. That keeps the level for features that have nothing to
    do with expression, but leaves little power for markers of a cell type, which go together because of it. Correlations
    within groups leave more power and do not keep that level.

    Parameters
    ----------
    x
        Expression (n, g), dense or sparse, in memory or read by rows; read once.
    sets
        (sets, g), 1 for a member.
    mean
        (g,), or (groups, g) with `codes`.
    sd
        (g,), root mean square over all cells of what is left after subtracting the mean. Not 0 for a member.
    codes
        (n,) row of `mean` that is subtracted from each cell. With the means of groups of cells, correlations are those
        within groups.

    Returns
    -------
    (sets,)
    """
    constant = np.unique(sets.indices[~(sd[sets.indices] > 0)])
    if len(constant):
        raise ValueError(
            f"{len(constant)} genes of the sets have no standard deviation above 0, the first at position {constant[0]}. "
            "Genes that do not vary have no correlation: drop them from the sets."
        )
    weights = sparse.csr_matrix(sets, dtype=np.float64, copy=True)
    weights.data[:] = 1 / sd[weights.indices]
    centre = np.asarray(weights @ np.atleast_2d(mean).T).T
    by_gene = weights.T.tocsr()
    squares = np.zeros(sets.shape[0])
    for rows, part in chunks(x):
        sums = (part @ by_gene).toarray() if sparse.issparse(part) else _sums(weights, part)
        sums -= centre if codes is None else centre[codes[rows]]
        squares += np.einsum("cs,cs->s", sums, sums)
    return np.maximum(squares / (x.shape[0] * np.maximum(sets.getnnz(axis=1), 1)), 1)


def _sums(sets: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Sum values (rows, genes) over the genes of each set, (rows, sets)."""
    return np.asarray(sets @ values.T).T


def _mean_correlation(inflation: np.ndarray | None, sets: sparse.csr_matrix) -> np.ndarray:
    if inflation is None:
        return np.zeros(sets.shape[0])
    if inflation.shape != (sets.shape[0],):
        raise ValueError(
            f"inflation has shape {inflation.shape}, but there are {sets.shape[0]} sets. Pass one for each."
        )
    size = np.maximum(sets.getnnz(axis=1), 1)
    wrong = np.flatnonzero(~((inflation >= 1) & (inflation <= size * (1 + 1e-6))))
    if len(wrong):
        raise ValueError(
            f"inflation={inflation[wrong[0]]} of set {wrong[0]} is not between 1 and its {size[wrong[0]]} genes. "
            "Pass what set_inflation returns for the same sets."
        )
    return np.minimum((inflation - 1) / np.maximum(size - 1, 1), 1)


def _u_variance(m: np.ndarray, k: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Variance of U for m normal variables with one correlation, and k independent ones.

    U is the number of pairs x > y, and P(x > y, x' > y') = 1/4 + asin(r)/(2π) where the differences x − y and x' − y' have
    correlation r (Sheppard 1899): 1 for a pair with itself, ½ if only x is shared, (1 + ρ)/2 if only y, else ρ/2.
    """
    shared_x, shared_y = np.arcsin(0.5) * (k - 1), np.arcsin((1 + correlation) / 2) * (m - 1)
    neither = np.arcsin(correlation / 2) * (m - 1) * (k - 1)
    return m * k * (np.arcsin(1) + shared_x + shared_y + neither) / (2 * np.pi)


def _upper_tails(hits: np.ndarray, members: np.ndarray, drawn: np.ndarray, total: int) -> np.ndarray:
    """P(X ≥ hits) for X ~ Hypergeometric(total, members, drawn), each distribution summed once from its far end."""
    log_factorial = special.gammaln(np.arange(total + 1) + 1.0)
    found = hits > 0
    x, K, n = (part[found].astype(np.int64) for part in (hits, members, drawn))
    order = np.lexsort((-x, K * (total + 1) + n))
    tails = np.empty(len(x))
    sum_tails(x, K, n, total, order, log_factorial, tails)
    pval = np.ones(hits.shape)
    pval[found] = np.minimum(tails, 1)
    return pval


@_compiled
def sum_tails(x, K, n, total, order, log_factorial, tails):
    """Sum P(X = j) over j ≥ x for X ~ Hypergeometric(total, K, n).

    Parameters
    ----------
    order
        Sorts cases by distribution, and those of the same one by falling x.
    tails
        Written.
    """
    k, m, j, tail = -1, -1, 0, 0.0
    for case in order:
        if K[case] != k or n[case] != m:
            k, m = K[case], n[case]
            j, tail = min(k, m) + 1, 0.0
        while j > x[case]:
            j -= 1
            log_choose = log_factorial[k] - log_factorial[j] - log_factorial[k - j]
            log_choose += log_factorial[total - k] - log_factorial[m - j] - log_factorial[total - k - m + j]
            tail += np.exp(log_choose + log_factorial[m] + log_factorial[total - m] - log_factorial[total])
        tails[case] = tail
