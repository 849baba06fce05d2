"""Differential expression of every feature's active against its inactive cells, all genes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .groups import Groups
from .moments import Block, Genes, Moments, group_moments
from .rows import Matrix
from .statistics import benjamini_hochberg, log2_fold_change, welch
from .workers import available_threads, in_order

BLOCK_VALUES = 2_000_000
"""Features × genes that a thread works on at a time; about 15 float64 arrays of this size are alive at once (0.25 GB)."""


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
    imprecise: int = 0
    """Genes of features whose variance rounding may have spoilt: mean over standard deviation above 1e5 in a group."""


def differential(
    groups: Groups, x: Matrix, genes: Genes, *, log_base: float | None, pseudocount: float, min_cells: int
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
        Features with fewer positive or fewer reference cells are left out.

    Yields
    ------
    Blocks of features in order. Genes that are not tested: score 0, every p NaN.
    """

    def tested(block: Block) -> Differential:
        return compare(block.features, *block.moments(), genes.varies, log_base=log_base, pseudocount=pseudocount)

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
    varies: np.ndarray,
    *,
    log_base: float | None,
    pseudocount: float,
) -> Differential:
    """Compare two groups of cells of each feature of a block, from the moments of (features, genes)."""
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )
    score, *p = welch(positive.mean, positive.variance, positive.n, reference.mean, reference.variance, reference.n)
    score, pval, log_pval = np.where(varies, score, 0), *(np.where(varies, some, np.nan) for some in p)
    means = (np.maximum(group.mean, 0) for group in (positive, reference))
    log2fc = log2_fold_change(*means, log_base=log_base, pseudocount=pseudocount)
    imprecise = positive.imprecise() + reference.imprecise()
    return Differential(features, score, log2fc, pval, log_pval, benjamini_hochberg(pval), imprecise)
