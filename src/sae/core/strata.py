"""Differential expression within strata of the cells: batches, whose effects are averaged, or donors, which are the sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from .differential import BLOCK_VALUES, MIN_EXPECTED, Differential, expected_cells
from .groups import Counts, Groups
from .moments import Block, Genes, Moments, stratum_moments
from .rows import Matrix, row_blocks
from .statistics import log2_fold_change
from .t_test import check_limits, from_t, rounding_of_means, t_statistic
from .workers import available_threads, in_order

HELD_VALUES = 20_000_000
"""Features × genes whose six averages over strata are held at a time (1 GB), beside sums of one or several strata."""
AVERAGES = 6
MIN_STRATUM_CELLS = 2
"""Active cells, and reference cells, without which a stratum does not count for a feature: one cell has no variance."""
MIN_DONOR_CELLS = 3
MIN_DONORS = 3


@dataclass(frozen=True)
class Strata:
    """The stratum of each cell, and which of them a feature can be tested in.

    Attributes
    ----------
    codes
        (n,) 0 to b − 1.
    counts
        Cells of both groups (b, h).
    usable
        (b, h), where there are enough of both.
    """

    codes: np.ndarray
    counts: Counts
    usable: np.ndarray

    @property
    def n_positive(self) -> np.ndarray:
        """Cells (b, h) that stand for a feature."""
        return self.counts.positive

    @property
    def n_reference(self) -> np.ndarray:
        """Cells (b, h) where a feature is zero."""
        return self.counts.n[:, None] - self.counts.active


def split(groups: Groups, codes: np.ndarray, least: int) -> Strata:
    """Divide the cells (n,) with codes 0, 1, ... into strata; those with `least` cells in both groups are usable."""
    counts = groups.within(codes)
    n_reference = counts.n[:, None] - counts.active
    return Strata(codes, counts, (counts.positive >= least) & (n_reference >= least))


def stratified(
    groups: Groups,
    x: Matrix,
    genes: Genes,
    codes: np.ndarray,
    *,
    log_base: float | None,
    pseudocount: float,
    min_cells: int,
    min_expected: float = MIN_EXPECTED,
) -> Iterator[Differential]:
    r"""Compare positive with reference cells within strata: Welch's t of the average difference.

    With moments within stratum b and weights ω_b ∝ n_1b n_0b / (n_1b + n_0b), Σ ω_b = 1, which are best where the variances
    are equal (Cochran 1954),

    d = Σ ω_b (x̄_1b − x̄_0b),  v = Σ ω_b² (s²_1b/n_1b + s²_0b/n_0b),  t = d / √v,

    with the Welch-Satterthwaite degrees of freedom v² / Σ ω_b⁴ ((s²_1b/n_1b)²/(n_1b − 1) + (s²_0b/n_0b)²/(n_0b − 1)). A
    stratum with fewer than two positive or two reference cells does not count for a feature. A lone stratum gives what
    :func:`differential` does. The fold change is of Σ ω_b x̄_1b and Σ ω_b x̄_0b.

    Parameters
    ----------
    groups
        Of h features among n cells.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    genes
        What :func:`scan` found.
    codes
        Stratum of each cell (n,), 0 to b − 1.
    log_base, pseudocount
        For the fold change, see :func:`log2_fold_change`.
    min_cells
        Features with fewer positive or fewer reference cells, over all strata, are left out.
    min_expected
        A gene is not tested for a feature if it is too rare for the group S that has less of it, given the other group O:
        if (Σ ω_b x̄_Ob)² / Σ ω_b² s²_Ob/n_Sb, in a lone stratum :func:`.differential.expected_cells`, is below this. 0 tests
        all.

    Yields
    ------
    The blocks of features of :func:`differential`. Genes that are constant within strata, and features without a stratum
    that counts, are not tested: score 0, p and adjusted p NaN.
    """
    check_limits(min_cells, pseudocount, min_expected)
    strata = split(groups, codes, MIN_STRATUM_CELLS)
    for features in _held(groups, min_cells, x.shape[1]):
        average = _Average(strata, features, x.shape[1])
        yield from _compared(
            average, groups, strata, x, genes, log_base=log_base, pseudocount=pseudocount, min_expected=min_expected
        )


def by_donor(
    groups: Groups,
    x: Matrix,
    genes: Genes,
    codes: np.ndarray,
    *,
    log_base: float | None,
    pseudocount: float,
    min_cells: int,
    min_expected: float = MIN_EXPECTED,
) -> Iterator[Differential]:
    r"""Compare positive with reference cells in each donor, and test the differences over donors by Student's t.

    With d_j = x̄_1j − x̄_0j in each of J donors, t = d̄ √J / s_d with J − 1 degrees of freedom: what varies is the donor, and
    every donor counts once however many cells it has. A donor with fewer than three positive or three reference cells does
    not count for a feature. The fold change is of the means of x̄_1j and x̄_0j over donors.

    Parameters
    ----------
    groups, x, genes, log_base, pseudocount, min_cells, min_expected
        As in :func:`stratified`, with the same weight for all donors.
    codes
        Donor of each cell (n,), 0, 1, ....

    Yields
    ------
    The blocks of features of :func:`differential`. Genes that are constant within donors, and features with fewer than
    three donors that count, are not tested: score 0, p and adjusted p NaN.
    """
    check_limits(min_cells, pseudocount, min_expected)
    strata = split(groups, codes, MIN_DONOR_CELLS)
    for features in _held(groups, min_cells, x.shape[1]):
        average = _OverDonors(strata, features, x.shape[1])
        yield from _compared(
            average, groups, strata, x, genes, log_base=log_base, pseudocount=pseudocount, min_expected=min_expected
        )


class _Average:
    """Weighted averages over strata, of some features (f, g).

    Attributes
    ----------
    features
        Those that are averaged.
    counts
        (f,), those with a stratum that counts.
    mean1, mean0
        Of both groups.
    noise1, noise0
        Squared standard error of the mean of each group, if it had as many cells as the other.
    """

    def __init__(self, strata: Strata, features: np.ndarray, g: int):
        n1, n0 = (n[:, features].astype(np.float64) for n in (strata.n_positive, strata.n_reference))
        weights = np.where(strata.usable[:, features], n1 * n0 / np.maximum(n1 + n0, 1), 0)
        total = weights.sum(axis=0)
        self.features, self._weights = features, weights / np.where(total > 0, total, 1)
        self.counts = total > 0
        self.mean1, self.mean0, self.noise1, self.noise0, self._variance, self._spread = np.zeros((6, len(features), g))

    def add(self, stratum: int, places: np.ndarray, one: Moments, rest: Moments) -> None:
        """Add the moments within one stratum to the averages of some features."""
        weight = self._weights[stratum, places, None]
        square1, square0 = one.variance / one.n, rest.variance / rest.n
        self.mean1[places] += weight * one.mean
        self.mean0[places] += weight * rest.mean
        self.noise1[places] += weight**2 * one.variance / rest.n
        self.noise0[places] += weight**2 * rest.variance / one.n
        self._variance[places] += weight**2 * (square1 + square0)
        self._spread[places] += weight**4 * (square1**2 / (one.n - 1) + square0**2 / (rest.n - 1))

    def test(self, part: slice, rounding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return t and its degrees of freedom."""
        variance, spread = self._variance[part], self._spread[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            df = np.where(variance > 0, variance**2 / spread, np.inf)
        return t_statistic(self.mean1[part], self.mean0[part], variance, rounding), df


class _OverDonors:
    """Means and squares over donors, of some features (f, g), updated donor by donor (Welford 1962).

    Attributes are those of :class:`_Average`, with the same weight for all donors.
    """

    def __init__(self, strata: Strata, features: np.ndarray, g: int):
        self._so_far = np.cumsum(strata.usable[:, features], axis=0)
        self.features, self._n = features, self._so_far[-1]
        self.counts = self._n >= MIN_DONORS
        self._weight = 1 / np.maximum(self._n, 1)
        self.mean1, self.mean0, self.noise1, self.noise0, self._square = np.zeros((5, len(features), g))

    def add(self, stratum: int, places: np.ndarray, one: Moments, rest: Moments) -> None:
        """Count one more donor for some features."""
        n, weight = self._so_far[stratum, places, None], self._weight[places, None]
        difference = one.mean - rest.mean
        before = difference - (self.mean1[places] - self.mean0[places])
        self.mean1[places] += (one.mean - self.mean1[places]) / n
        self.mean0[places] += (rest.mean - self.mean0[places]) / n
        self.noise1[places] += weight**2 * one.variance / rest.n
        self.noise0[places] += weight**2 * rest.variance / one.n
        self._square[places] += before * (difference - (self.mean1[places] - self.mean0[places]))

    def test(self, part: slice, rounding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return t and its degrees of freedom."""
        n = np.maximum(self._n[part, None], 2)
        variance = self._square[part] / (n * (n - 1))
        variance = np.where(variance > rounding**2, variance, 0.0)
        return t_statistic(self.mean1[part], self.mean0[part], variance, rounding), n - 1


def _block(g: int) -> int:
    return max(1, BLOCK_VALUES // max(g, 1))


def _held(groups: Groups, min_cells: int, g: int) -> Iterator[np.ndarray]:
    """Yield the features that are not too rare or too common, as many at a time as memory allows."""
    features = np.flatnonzero((groups.n_positive >= min_cells) & (groups.n_reference >= min_cells))
    block = _block(g)
    for held in row_blocks(len(features), max(1, HELD_VALUES // (block * max(g, 1))) * block):
        yield features[held]


def _compared(
    average: _Average | _OverDonors,
    groups: Groups,
    strata: Strata,
    x: Matrix,
    genes: Genes,
    *,
    log_base: float | None,
    pseudocount: float,
    min_expected: float,
) -> Iterator[Differential]:
    """Add up the strata one after another, then test the features in blocks."""
    g, block, imprecise = x.shape[1], _block(x.shape[1]), 0
    usable = {stratum: average.features[some] for stratum, some in enumerate(strata.usable[:, average.features])}
    held = AVERAGES * len(average.features) * g
    for stratum, blocks in stratum_moments(
        groups, strata.counts, usable, x, genes, strata.codes, block=block, beside=held
    ):
        imprecise += sum(in_order(partial(_added, average, stratum), blocks, available_threads()))

    def tested(part: slice) -> Differential:
        counts, mean1, mean0 = average.counts[part, None], average.mean1[part], average.mean0[part]
        t, df = average.test(part, rounding_of_means(mean1, mean0, genes.shift))
        raised = counts & _enough(mean1, average.noise1[part], genes, min_expected)
        lowered = counts & _enough(mean0, average.noise0[part], genes, min_expected)
        means = (np.maximum(mean, 0) for mean in (mean1, mean0))
        log2fc = log2_fold_change(*means, log_base=log_base, pseudocount=pseudocount)
        return from_t(
            average.features[part],
            np.where(np.where(mean1 > mean0, raised, lowered), t, np.nan),
            df,
            np.where(counts, log2fc, np.nan),
            either_way=raised & lowered & ~np.isnan(t),
            imprecise=imprecise if part.start == 0 else 0,
        )

    yield from in_order(tested, row_blocks(len(average.features), block), available_threads())


def _enough(mean: np.ndarray, noise: np.ndarray, genes: Genes, min_expected: float) -> np.ndarray:
    """Tell which genes are common enough in one group to be tested where the other has less of them."""
    group = Moments(np.ones((1, 1)), mean, noise)
    return (expected_cells(group.n, group, genes.mean) >= min_expected) | (genes.lowest < 0)


def _added(average: _Average | _OverDonors, stratum: int, block: Block) -> int:
    """Add a block of features within a stratum, and count the variances that rounding may have spoilt."""
    one, rest = block.moments()
    average.add(stratum, np.searchsorted(average.features, block.features), one, rest)
    return one.imprecise() + rest.imprecise()
