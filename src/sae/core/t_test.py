"""From a t statistic of every feature and gene to what is reported of it."""

from __future__ import annotations

import numpy as np

from .differential import SAME_MEANS, Differential
from .statistics import benjamini_hochberg
from .student import log_two_sided


def check_limits(min_cells: int, pseudocount: float, min_expected: float = 0) -> None:
    """Refuse groups of one cell, and fold changes of nothing."""
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells} is below 2, and one cell has no variance.")
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )
    if not min_expected >= 0:
        raise ValueError(f"min_expected={min_expected} is not a number of cells. Pass 0 or more; 0 tests every gene.")


def t_statistic(mean1: np.ndarray, mean0: np.ndarray, variance: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """Divide x̄₁ − x̄₀ by its standard error, the root of `variance`; without variance ± infinity, or NaN for equal means.

    Parameters
    ----------
    rounding
        Means that differ by no more are equal.
    """
    difference = mean1 - mean0
    same = (variance == 0) & (np.abs(difference) <= rounding)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(same, np.nan, difference / np.sqrt(variance))


def rounding_of_means(mean1: np.ndarray, mean0: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Bound what rounding leaves of a difference of means from which a shift was subtracted while they were added up."""
    return SAME_MEANS * (np.abs(mean1) + np.abs(mean0) + np.abs(shift))


def from_t(
    features: np.ndarray,
    t: np.ndarray,
    df: np.ndarray | int,
    log2fc: np.ndarray,
    *,
    either_way: np.ndarray | None = None,
    imprecise: int = 0,
) -> Differential:
    """Add the two-sided p of Student's t to a block of (features, genes), adjusted within a feature.

    Parameters
    ----------
    t
        NaN where there is nothing to test: score 0, p and adjusted p NaN.
    df
        Degrees of freedom, shaped to broadcast with `t`.
    either_way
        Of :class:`Differential`; None for a test that takes no account of the direction.
    """
    untested = np.isnan(t)
    log_pval = log_two_sided(t, np.asarray(df))
    pval = np.exp(log_pval)
    return Differential(
        features=features,
        score=np.where(untested, 0.0, t),
        log2fc=log2fc,
        pval=pval,
        log_pval=log_pval,
        padj=benjamini_hochberg(pval),
        either_way=~untested if either_way is None else either_way,
        imprecise=imprecise,
    )
