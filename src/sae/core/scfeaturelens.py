"""The feature-to-concept step of scFeatureLens as published, to compare with; nothing in here is our own default."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

from .moments import Moments
from .statistics import average_ranks, benjamini_hochberg, welch

PADJ, RELAXED_PADJ = 1e-5, 0.05
FOLD_CHANGE = 2.0
KEPT = 0.05
TIE = np.log1p(1e-7)
"""Outcomes that are at most this much more likely, in logarithms, count as equally likely (the rule of SciPy)."""


@dataclass(frozen=True)
class Concepts:
    """Gene sets of a block of features."""

    hits: np.ndarray
    """(features, sets), genes of the study set that are in the gene set."""
    p_binomial: np.ndarray
    """(features, sets)"""
    p_mannwhitney: np.ndarray
    """(features, sets), at most 0.5."""
    kept: np.ndarray
    """(features, sets)"""
    study: np.ndarray
    """(features, genes), the study set."""
    relaxed_padj: np.ndarray
    """(features,), whether the study set was selected by adjusted p < 0.05."""
    no_fold_change: np.ndarray
    """(features,), whether the study set was selected without regard to the fold change."""

    @property
    def n_study(self) -> np.ndarray:
        """Genes of each study set (features,)."""
        return self.study.sum(axis=1)


def concepts(positive: Moments, reference: Moments, sets: sparse.csr_matrix) -> Concepts:
    """Annotate features with gene sets exactly as scFeatureLens does (arXiv 2410.11468).

    1. Welch's t-test of every gene, positive against reference cells, adjusted over genes by Benjamini-Hochberg. The
       fold change is the ratio of the two means.
    2. The study set are the genes with adjusted p < 1e-5 and a fold change above 2 or below 1/2. Each condition has
       its own fallback: 0.05 instead of 1e-5 if no adjusted p is ≤ 1e-5, and no condition on the fold change if
       none is ≥ 2. The set can still be empty.
    3. For each gene set, a two-sided binomial test of the hits among the study set, each with probability
       members / genes, and a Mann-Whitney test of the members' fold changes against all other genes', from the normal
       approximation without continuity correction. A set is kept when both p < 0.05.

    Equal fold changes share their average rank, and the variance of the Mann-Whitney test is corrected for them;
    published, they are in arbitrary order. Infinite fold changes rank above all finite ones and NaN, of a gene absent
    from both groups, above the infinite ones, as published.

    Its flaws are kept, because the point is to compare:

    * No pseudocount: one transcript in the positive cells puts a gene that the reference lacks at the top of the ranks
      and rules out the fallback for the fold change; a gene that is nowhere ranks higher still.
    * A gene that is constant in either group gets p = 1 and counts as tested. A perfect marker, absent from all
      reference cells, can therefore never be in the study set.
    * The Mann-Whitney p is half of the two-sided value, so 5 % means 10 %.
    * Nothing is corrected over gene sets or features: at 2,600 sets about 10 false terms are to be expected for every
      feature.
    * Both tests are two-sided and need not agree, so a set is also kept for having too few hits.
    * The published annotations are direct ones, not passed on to the ancestors of a term; `sets` is taken as it is.

    Parameters
    ----------
    positive, reference
        See :func:`sae.core.groups.percentile_groups`; published: expression as counts or their model's mean.
    sets
        (sets, genes), 1 for a member; published: those of 10 to 500 genes. A set without members or with all genes
        has both p at their maximum.
    """
    testable = (positive.variance > 0) & (reference.variance > 0)
    pval = np.where(testable, _welch_p(positive, reference, testable), 1.0)
    padj = benjamini_hochberg(pval)
    with np.errstate(divide="ignore", invalid="ignore"):
        fold_change = positive.mean / reference.mean
    relaxed_padj = padj.min(axis=1) > PADJ
    no_fold_change = np.fmax.reduce(fold_change, axis=1) < FOLD_CHANGE
    changed = (fold_change > FOLD_CHANGE) | (fold_change < 1 / FOLD_CHANGE) | no_fold_change[:, None]
    study = (padj < np.where(relaxed_padj, RELAXED_PADJ, PADJ)[:, None]) & changed

    hits = np.asarray(sets @ study.T.astype(np.float64)).T.round().astype(np.int64)
    p_binomial = binomial_two_sided(hits, study.sum(axis=1)[:, None], sets.getnnz(axis=1)[None, :], study.shape[1])
    p_mannwhitney = half_mann_whitney(fold_change, sets)
    kept = (p_binomial < KEPT) & (p_mannwhitney < KEPT)
    return Concepts(hits, p_binomial, p_mannwhitney, kept, study, relaxed_padj, no_fold_change)


def _welch_p(positive: Moments, reference: Moments, testable: np.ndarray) -> np.ndarray:
    # A group of fewer than two cells has no variance, so what stands in for it is not used.
    arguments = []
    for group in (positive, reference):
        arguments += [group.mean, np.where(testable, group.variance, 1.0), np.maximum(group.n, 2)]
    return welch(*arguments)[1]


def binomial_two_sided(hits: np.ndarray, drawn: np.ndarray, members: np.ndarray, total: int) -> np.ndarray:
    """Two-sided binomial test of `hits` successes in `drawn` trials of probability members / total.

    p is the probability of all outcomes that are no more likely than the one found, up to a relative tolerance of 1e-7,
    as in :func:`scipy.stats.binomtest`; 1 where nothing was drawn. Each distinct case is computed once.

    Parameters
    ----------
    hits, drawn, members
        Integers that broadcast against each other.
    total
        What `members` is a share of.
    """
    cases = np.stack(np.broadcast_arrays(hits, drawn, members)).astype(np.int64)
    shape = cases.shape[1:]
    code = np.ravel_multi_index(cases.reshape(3, -1), cases.reshape(3, -1).max(axis=1, initial=0) + 1)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    k, n, m = cases.reshape(3, -1)[:, first]
    # Too few hits are too many misses, so only the upper half needs a formula.
    few = k * total < n * m
    k, m = np.where(few, n - k, k), np.where(few, total - m, m)
    p, q = m / total, (total - m) / total

    def log_probability(i: np.ndarray) -> np.ndarray:
        log_choose = special.gammaln(n + 1) - special.gammaln(i + 1) - special.gammaln(n - i + 1)
        return log_choose + special.xlogy(i, p) + special.xlogy(n - i, q)

    bound = log_probability(k) + TIE
    # Below the mean the probability rises: bisect for the last outcome that is no more likely; −1 if there is none.
    low, high = np.full_like(k, -1), n * m // total
    while (low < high).any():
        middle = (low + high + 1) // 2
        unlikely = log_probability(middle) <= bound
        low, high = np.where(unlikely, middle, low), np.where(unlikely, high, middle - 1)
    upper = special.betainc(k, n - k + 1, p)
    lower = np.where(low >= 0, special.betainc(n - low, np.maximum(low, 0) + 1, q), 0)
    pval = np.where(k * total == n * m, 1.0, np.minimum(upper + lower, 1))
    return pval[inverse].reshape(shape)


def half_mann_whitney(values: np.ndarray, sets: sparse.csr_matrix) -> np.ndarray:
    """Half the two-sided p of the Mann-Whitney test, members of each set against all other genes.

    p = Φ(−|U − K(g − K)/2| / σ) for K members among g genes, with σ² = K(g − K)/12 · (g + 1 − Σ(t³ − t)/(g(g − 1)))
    over runs of t equal values. 0.5 where σ is 0.

    Parameters
    ----------
    values
        (features, genes); NaN ranks highest.
    sets
        (sets, genes), 1 for a member.
    """
    g = values.shape[1]
    ranks, ties = average_ranks(values)
    members = sets.getnnz(axis=1)[None, :].astype(np.float64)
    excess = np.asarray(sets @ ranks.T).T - members * (g + 1) / 2
    variance = members * (g - members) / 12 * (g + 1 - ties[:, None] / max(g * (g - 1), 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, special.ndtr(-np.abs(excess) / np.sqrt(variance)), 0.5)
