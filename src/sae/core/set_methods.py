"""From the genes of a block of features to their gene sets, by several methods and all in one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .decoupled import SetScores, aucell, gsea, ulm
from .differential import Differential
from .enrichment import count_overlaps, over_representation, rank_sets
from .moments import Moments
from .scfeaturelens import concepts

DIRECTIONS = ("up", "down", "both")
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class StandingOut:
    """Which genes stand out for a feature."""

    max_padj: float
    min_log2fc: float

    def select(self, block: Differential, direction: str) -> np.ndarray:
        """Mark (features, genes) that differ in a direction; without a limit to the fold change, its sign is that of the score."""
        if direction == "both":
            return self.select(block, "up") | self.select(block, "down")
        sign = 1 if direction == "up" else -1
        far = sign * block.log2fc >= self.min_log2fc if self.min_log2fc > 0 else sign * block.score > 0
        return (block.padj <= self.max_padj) & far


@dataclass(frozen=True)
class SetTests:
    """Gene sets of a block of features in one direction; all other arrays (features, sets)."""

    direction: str
    study: np.ndarray
    """(features, genes), those that stand out."""
    strength: np.ndarray
    """(features, genes), by how much."""
    overlap: np.ndarray
    score: np.ndarray
    pval: np.ndarray
    log_pval: np.ndarray
    tested: np.ndarray
    """All tests but those of the other direction, where the sign of the score tells which it is."""
    kept: np.ndarray
    """Those that may be stored: with a gene that stands out, or a score in this direction."""


def by_over_representation(
    block: Differential, sets: sparse.csr_matrix, standing: StandingOut, directions: Sequence[str]
) -> list[SetTests]:
    """Test study sets by :func:`over_representation`; the score is the log2 odds ratio."""
    found, strength = [], np.abs(block.score)
    for direction in directions:
        study = standing.select(block, direction)
        test = over_representation(study, sets, sets.shape[1])
        statistics = (test.log2_odds, test.pval, test.log_pval)
        everywhere = np.ones(test.pval.shape, dtype=bool)
        found.append(SetTests(direction, study, strength, test.overlap, *statistics, everywhere, test.overlap > 0))
    return found


def by_ranks(block: Differential, sets: sparse.csr_matrix, standing: StandingOut) -> list[SetTests]:
    """Rank the scores of the genes that are tested either way, by :func:`rank_sets`; the score is z."""
    test = rank_sets(np.where(block.either_way, block.score, np.nan), members(sets))
    return _by_sign(block, sets, standing, test.z, test.pval, test.log_pval)


def by_ulm(block: Differential, sets: sparse.csr_matrix, standing: StandingOut) -> list[SetTests]:
    """Regress the scores of the genes on the weights of the sets; the score is t of the slope."""
    found = _scored(fair(block), lambda values: ulm(values, sets), sets.shape[0])
    return _by_sign(block, sets, standing, found.score, found.pval, _log(found.pval))


def by_gsea(block: Differential, sets: sparse.csr_matrix, standing: StandingOut, seed: int) -> list[SetTests]:
    """Walk down the scores of the genes; the score is the normalised enrichment score."""
    found = _scored(fair(block), lambda values: gsea(values, sets, seed), sets.shape[0])
    return _by_sign(block, sets, standing, found.score, found.pval, _log(found.pval))


def by_aucell(block: Differential, sets: sparse.csr_matrix, standing: StandingOut) -> list[SetTests]:
    """Take the highest scores of the genes, and the lowest; the score is the area under the recovery curve."""
    tests, strength = [], np.abs(block.score)
    for direction, sign in (("up", 1), ("down", -1)):
        values = sign * fair(block)
        values = np.where(block.either_way, values, values.min(axis=1, keepdims=True) - 1)
        found = _scored(values, lambda values: aucell(values, sets), sets.shape[0])
        study = standing.select(block, direction)
        statistics = (found.score, found.pval, _log(found.pval))
        everywhere = np.ones(found.pval.shape, dtype=bool)
        overlap = count_overlaps(study, sets)
        tests.append(SetTests(direction, study, strength, overlap, *statistics, everywhere, found.score > 0))
    return tests


def by_scfeaturelens(positive: Moments, reference: Moments, sets: sparse.csr_matrix) -> list[SetTests]:
    """Test sets as published, by :func:`concepts`: the score is log2 of hits over those expected, p the larger of the two."""
    found = concepts(positive, reference, members(sets))
    expected = found.n_study[:, None] * sets.getnnz(axis=1) / sets.shape[1]
    score = np.log2((found.hits + 0.5) / (expected + 0.5))
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = np.abs(np.log2(positive.mean / reference.mean))
    pval = np.maximum(found.p_binomial, found.p_mannwhitney)
    statistics = (score, pval, _log(pval))
    everywhere = np.ones(pval.shape, dtype=bool)
    return [SetTests("both", found.study, strength, found.hits, *statistics, everywhere, found.kept)]


def members(sets: sparse.csr_matrix) -> sparse.csr_matrix:
    """Replace weights by 1."""
    return sparse.csr_matrix((np.ones(sets.nnz), sets.indices, sets.indptr), shape=sets.shape)


def fair(block: Differential) -> np.ndarray:
    """Return scores without infinite ones (of perfect markers: the largest of the feature instead), 0 for genes not tested either way."""
    score = np.where(block.either_way, block.score, 0.0)
    largest = np.where(np.isfinite(score), np.abs(score), 1.0).max(axis=1, initial=1.0, keepdims=True)
    return np.clip(score, -largest, largest)


def _log(pval: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(pval, TINY))


def _scored(values: np.ndarray, method: Callable[[np.ndarray], SetScores], n_sets: int) -> SetScores:
    """Run a method on the rows that have any spread; the others, and what it cannot score, get the score 0 and p = 1."""
    varies = np.ptp(values, axis=1) > 0
    score, pval = np.zeros((len(values), n_sets)), np.ones((len(values), n_sets))
    if varies.any():
        found = method(values[varies])
        score[varies], pval[varies] = np.nan_to_num(found.score), np.nan_to_num(found.pval, nan=1.0)
    return SetScores(score, pval)


def _by_sign(
    block: Differential,
    sets: sparse.csr_matrix,
    standing: StandingOut,
    score: np.ndarray,
    pval: np.ndarray,
    log_pval: np.ndarray,
) -> list[SetTests]:
    """Take sets with a positive score as up, and those with a negative one as down."""
    strength, testable, tests = np.abs(block.score), ~np.isnan(pval), []
    for direction, side, kept in (("up", score >= 0, score > 0), ("down", score < 0, score < 0)):
        study = standing.select(block, direction)
        overlap = count_overlaps(study, sets)
        tests.append(SetTests(direction, study, strength, overlap, score, pval, log_pval, side & testable, kept))
    return tests
