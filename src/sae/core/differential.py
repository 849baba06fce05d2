"""Differential expression of every feature's active against its inactive cells, all genes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .groups import Groups
from .moments import Moments, group_moments, scan
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
    padj: np.ndarray
    imprecise: int = 0
    """Genes of features whose variance rounding may have spoilt: mean over standard deviation above 1e5 in a group."""


def differential(
    groups: Groups, x: Matrix, *, log_base: float | None, pseudocount: float, min_cells: int
) -> Iterator[Differential]:
    """Compare the positive with the reference cells of every feature by Welch's t, for blocks of features.

    Parameters
    ----------
    groups
        Of h features among n cells.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    log_base, pseudocount
        For the fold change, see :func:`log2_fold_change`.
    min_cells
        Features with fewer positive or fewer reference cells are left out.

    Yields
    ------
    Blocks of features in order. Genes that are constant over all cells are not tested: score 0, p and adjusted p NaN.
    """
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells} is below 2, and one cell has no variance.")
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )
    genes = scan(x)
    features = np.flatnonzero((groups.n_positive >= min_cells) & (groups.n_reference >= min_cells))
    block = max(1, BLOCK_VALUES // max(x.shape[1], 1))

    def tested(measured: tuple[np.ndarray, Moments, Moments]) -> Differential:
        chosen, one, rest = measured
        score, pval = welch(one.mean, one.variance, one.n, rest.mean, rest.variance, rest.n)
        score, pval = np.where(genes.varies, score, 0), np.where(genes.varies, pval, np.nan)
        means = (np.maximum(group.mean, 0) for group in (one, rest))
        log2fc = log2_fold_change(*means, log_base=log_base, pseudocount=pseudocount)
        imprecise = one.imprecise() + rest.imprecise()
        return Differential(chosen, score, log2fc, pval, benjamini_hochberg(pval), imprecise)

    yield from in_order(tested, group_moments(groups, features, x, genes, block=block), available_threads())
