"""Which of many runs no other run beats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

HIGHER_IS_BETTER = ("label_auroc", "truth_best", "truth_matched", "truth_found", "stability")
"""Of the measures of a sweep; of the others, lower."""


def pareto(measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mark the runs that no other run beats: is as good as in all measures, and better in one.

    Parameters
    ----------
    measures
        (runs,) each. A run with NaN in one of them is never marked.
    """
    signs = np.array([-1 if name in HIGHER_IS_BETTER else 1 for name in measures])
    values = np.column_stack([np.asarray(value, dtype=np.float64) for value in measures.values()]) * signs
    known = ~np.isnan(values).any(axis=1)
    front = np.zeros(len(values), dtype=bool)
    for i in np.flatnonzero(known):
        as_good = (values[known] <= values[i]).all(axis=1)
        front[i] = not (as_good & (values[known] < values[i]).any(axis=1)).any()
    return front
