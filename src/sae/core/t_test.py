"""From a t statistic of every feature and gene to what is reported of it."""

from __future__ import annotations

import numpy as np
from scipy import special

from .differential import Differential
from .statistics import benjamini_hochberg

SAME_MEANS = 1e-9
"""Means of one and the same value, over different numbers of cells, differ by rounding: up to this share of them."""


def check_limits(min_cells: int, pseudocount: float) -> None:
    """Refuse groups of one cell, and fold changes of nothing."""
    if min_cells < 2:
        raise ValueError(f"min_cells={min_cells} is below 2, and one cell has no variance.")
    if pseudocount <= 0:
        raise ValueError(
            f"pseudocount={pseudocount} must be positive, or a gene absent from a group has no fold change."
        )


def t_statistic(mean1: np.ndarray, mean0: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Divide x̄₁ − x̄₀ by its standard error, the root of `variance`; without variance ± infinity, or NaN for equal means."""
    difference = mean1 - mean0
    same = (variance == 0) & (np.abs(difference) <= SAME_MEANS * (np.abs(mean1) + np.abs(mean0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(same, np.nan, difference / np.sqrt(variance))


def from_t(
    features: np.ndarray, t: np.ndarray, df: np.ndarray | int, log2fc: np.ndarray, imprecise: int = 0
) -> Differential:
    """Add the two-sided p of Student's t to a block of (features, genes), adjusted within a feature.

    Parameters
    ----------
    t
        NaN where there is nothing to test: score 0, p and adjusted p NaN.
    df
        Degrees of freedom, shaped to broadcast with `t`.
    """
    pval = 2 * special.stdtr(df, -np.abs(t))
    return Differential(features, np.where(np.isnan(t), 0.0, t), log2fc, pval, benjamini_hochberg(pval), imprecise)
