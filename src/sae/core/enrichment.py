"""Gene sets of every feature: over-representation among chosen genes, and a rank test of all genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import float64, njit
from scipy import sparse, special

from .moments import chunks
from .rows import Matrix
from .statistics import average_ranks

_compiled: Any = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class OverRepresentation:
    """All arrays (features, sets)."""

    overlap: np.ndarray
    log2_odds: np.ndarray
    pval: np.ndarray
    log_pval: np.ndarray
    """Natural logarithm of p, also where p itself is too small for a float."""


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


def over_representation(study: np.ndarray, sets: sparse.csr_matrix, n_genes: int) -> OverRepresentation:
    """Test whether each gene set is over-represented in each study set: one-sided hypergeometric test.

    With N measured genes, K of them in the set and n in the study set, P(X ≥ overlap) for X ~ Hypergeometric(N, K, n),
    which is Fisher's exact test with alternative "greater". Odds ratios have 0.5 added to each cell of the table (Haldane
    and Anscombe).

    Parameters
    ----------
    study
        (features, genes), which genes stand out for which feature.
    sets
        (sets, genes), stored for a member.
    n_genes
        N. Genes beyond these are in no set and no study set.
    """
    overlap = count_overlaps(study, sets)
    size, n_study = sets.getnnz(axis=1).astype(np.int64), study.sum(axis=1)
    log_pval = np.empty(overlap.shape)
    log_upper_tails(overlap, size, n_study, n_genes, special.gammaln(np.arange(n_genes + 1) + 1.0), log_pval)
    inside, outside = overlap + 0.5, n_study[:, None] - overlap + 0.5
    rest_inside, rest_outside = size - overlap + 0.5, n_genes - size - n_study[:, None] + overlap + 0.5
    log2_odds = np.log2(inside * rest_outside / (outside * rest_inside))
    return OverRepresentation(overlap, log2_odds, np.exp(log_pval), log_pval)


def count_overlaps(study: np.ndarray, sets: sparse.csr_matrix) -> np.ndarray:
    """Count the genes of each set in each study set, (features, sets)."""
    by_gene = sets.tocsc()
    overlap = np.zeros((len(study), sets.shape[0]), np.int64)
    add_sets(study, by_gene.indptr, by_gene.indices, overlap)
    return overlap


def rank_sets(score: np.ndarray, sets: sparse.csr_matrix, inflation: np.ndarray | None = None) -> RankedSets:
    """Test whether the genes of each set score higher or lower than all other tested genes: Mann-Whitney, two-sided.

    With R the sum of the ranks of the m members among n tested genes, U = R − m(m + 1)/2, k = n − m and ρ the mean
    correlation of the scores of two members,

    z = ± max(abs(U − mk/2) − 1/2, 0) / σ,  p = 2 Φ(−abs(z)),  AUROC = U / (mk),

    σ² = mk [asin 1 + (k − 1) asin ½ + (m − 1)(k − 1) asin(ρ/2) + (m − 1) asin((1 + ρ)/2)] / (2π) · (1 − Σ(t³ − t)/(n³ − n))

    over groups of t tied genes. Genes outside the set count as independent. This is the rank version of CAMERA (Wu and
    Smyth 2012, doi:10.1093/nar/gks461); with ρ = 0 the first factor is mk(n + 1)/12, and the test that of
    ``scipy.stats.mannwhitneyu(method="asymptotic")``.

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
    return RankedSets(z, auroc, pval, log_pval)


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


@_compiled
def add_sets(study, starts, sets, overlap):
    """Add one to the sets of each gene of a study set; genes × sets is CSR in `starts`, `sets`."""
    for feature in range(study.shape[0]):
        counts = overlap[feature]
        for gene in range(study.shape[1]):
            if study[feature, gene]:
                for e in range(starts[gene], starts[gene + 1]):
                    counts[sets[e]] += 1


@_compiled
def log_upper_tails(overlap, size, drawn, total, log_factorial, log_tail):
    """Write log P(X ≥ overlap), X ~ Hypergeometric(total, size, drawn): (features, sets), sizes (sets,), drawn (features,).

    Terms are summed away from the overlap on the side where they fall, each from the one before.
    """
    for feature in range(overlap.shape[0]):
        n = drawn[feature]
        for s in range(overlap.shape[1]):
            k, x = size[s], overlap[feature, s]
            if x <= max(0, n + k - total):
                log_tail[feature, s] = 0.0
                continue
            above = x * total > k * n
            j = x if above else x - 1
            log_term = log_factorial[k] - log_factorial[j] - log_factorial[k - j] + log_factorial[total - k]
            log_term -= log_factorial[n - j] + log_factorial[total - k - n + j]
            log_term += log_factorial[n] + log_factorial[total - n] - log_factorial[total]
            term, tail = 1.0, 1.0
            while term > 1e-17 * tail:
                if above:
                    term *= float64(k - j) * (n - j) / (float64(j + 1) * (total - k - n + j + 1))
                    j += 1
                else:
                    term *= float64(j) * (total - k - n + j) / (float64(k - j + 1) * (n - j + 1))
                    j -= 1
                tail += term
            log_tail[feature, s] = log_term + np.log(tail) if above else np.log1p(-np.exp(log_term) * tail)
