"""Differential expression of every feature's active against its inactive cells, all genes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .groups import Groups
from .moments import ROUNDING, Block, Genes, Moments, group_moments
from .rows import Matrix
from .statistics import benjamini_hochberg, log2_fold_change, welch
from .workers import available_threads, in_order

BLOCK_VALUES = 2_000_000
"""Features × genes that a thread works on at a time; about 15 float64 arrays of this size are alive at once (0.25 GB)."""

SAME_MEANS = 1e-9
"""Means of one and the same value, over different numbers of cells, differ by rounding: up to this share of them."""

MIN_EXPECTED = 30.0
"""From here on 5 ± 0.5 % of p are below 0.05 when cells are permuted, at every level of expression."""


@dataclass(frozen=True)
class Differential:
    """Statistics of a block of features; arrays are (features of the block, genes)."""

    features: np.ndarray
    score: np.ndarray
    log2fc: np.ndarray
    pval: np.ndarray
    log_pval: np.ndarray
    """Natural logarithm of p, also where p itself is too small for a float."""
    padj: np.ndarray
    either_way: np.ndarray
    """Whether the gene is tested in whichever group it is higher. Of weakly expressed genes only those that are higher in one
    of the groups may be tested: in a rank test of gene sets, their sets would all seem to be higher there."""
    imprecise: int = 0
    """Genes of features whose variance rounding may have spoilt: mean over standard deviation above 1e5 in a group."""


def differential(
    groups: Groups,
    x: Matrix,
    genes: Genes,
    *,
    log_base: float | None,
    pseudocount: float,
    min_cells: int,
    min_expected: float = MIN_EXPECTED,
) -> Iterator[Differential]:
    """Compare the positive with the reference cells of every feature by Welch's t, for blocks of features.

    Parameters
    ----------
    groups
        Of h features among n cells.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    genes
        What :func:`sae.core.moments.scan` tells of `x`; those that do not vary are not tested.
    log_base, pseudocount
        For the fold change, see :func:`log2_fold_change`. It is NaN where `log_base` is.
    min_cells
        Features with fewer positive or fewer reference cells are left out. In a group of three or four, values that agree by
        chance make any difference look certain; from about ten on that no longer happens.
    min_expected
        A gene is not tested for a feature if :func:`expected_cells` is below this for the group that has less of it. Genes
        with negative values always are. 0 tests all.

    Yields
    ------
    Blocks of features in order. What is not tested, genes that are constant over the compared cells included, has score 0, every
    p NaN, and no part in the adjustment.
    """

    def tested(block: Block) -> Differential:
        positive, reference = block.moments()
        return compare(
            block.features,
            positive,
            reference,
            genes,
            log_base=log_base,
            pseudocount=pseudocount,
            min_expected=min_expected,
        )

    yield from in_order(tested, measured_groups(groups, x, genes, min_cells), available_threads())


def measured_groups(
    groups: Groups, x: Matrix, genes: Genes, min_cells: int, *, most: int | None = None
) -> Iterator[Block]:
    """Measure both groups of all features that have enough cells, in blocks of a size that a thread can work on."""
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells} is below 2, and one cell has no variance.")
    features = np.flatnonzero((groups.n_positive >= min_cells) & (groups.n_reference >= min_cells))
    block = max(1, BLOCK_VALUES // max(x.shape[1], 1))
    return group_moments(groups, features, x, genes, block=block if most is None else min(block, most))


def compare(
    features: np.ndarray,
    positive: Moments,
    reference: Moments,
    genes: Genes,
    *,
    log_base: float | None,
    pseudocount: float,
    min_expected: float = MIN_EXPECTED,
) -> Differential:
    """Compare two groups of cells of each feature of a block, from the moments of (features, genes)."""
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )
    if not min_expected >= 0:
        raise ValueError(f"min_expected={min_expected} is not a number of cells. Pass 0 or more; 0 tests every gene.")
    score, pval, log_pval = welch(
        positive.mean, positive.variance, positive.n, reference.mean, reference.variance, reference.n
    )
    raised, lowered = (
        genes.varies & ((expected_cells(n, others, genes.mean) >= min_expected) | (genes.lowest < 0))
        for n, others in ((reference.n, positive), (positive.n, reference))
    )
    untested = _equal(positive, reference, genes.shift) | ~np.where(positive.mean > reference.mean, raised, lowered)
    score[untested], pval[untested], log_pval[untested] = 0, np.nan, np.nan
    means = (np.maximum(group.mean, 0) for group in (positive, reference))
    log2fc = log2_fold_change(*means, log_base=log_base, pseudocount=pseudocount)
    imprecise = positive.imprecise() + reference.imprecise()
    padj = benjamini_hochberg(pval)
    return Differential(features, score, log2fc, pval, log_pval, padj, raised & lowered, imprecise)


def _equal(positive: Moments, reference: Moments, shift: np.ndarray) -> np.ndarray:
    """Mark genes that have one and the same value in all cells of both groups.

    Means of one value over different numbers of cells, with the shift added back, differ by rounding.
    """
    constant = (positive.variance == 0) & (reference.variance == 0)
    if not constant.any():
        return constant
    size = np.abs(positive.mean) + np.abs(reference.mean) + np.abs(shift)
    return constant & (np.abs(positive.mean - reference.mean) <= SAME_MEANS * size)


def expected_cells(n: np.ndarray, others: Moments, level: np.ndarray) -> np.ndarray:
    """Cells with the gene to expect in a group of n cells, if it were like the others: n x̄² / s².

    It is the square of how many standard errors the expected mean is above zero. For a gene that few cells have, in about the
    same amount, it is the number of them to be expected; for one that all cells have alike it is far more than n.

    Where it is small, Welch's test is too liberal for the group that has less of the gene: no value is below zero, so with
    next to nothing of the gene goes next to no variance, and a difference by chance looks certain. The group that has more
    of it makes no such error: k cells that stick out give t ≤ √k or so.

    Parameters
    ----------
    n
        (features, 1)
    others
        The other cells of each feature, with values ≥ 0.
    level
        (genes,), mean over all cells, to tell zero from what rounding leaves of it.

    Returns
    -------
    (features, genes); 0 for a gene that the others lack.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = n * others.mean**2 / others.variance
    return np.where(others.mean <= ROUNDING * level, 0, expected)
