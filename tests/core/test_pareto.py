from __future__ import annotations

import numpy as np
import pytest

from sae.core.pareto import pareto


def beaten_by_hand(values):
    """By the definition, run against run; all values the lower the better."""
    beaten = [False] * len(values)
    for i, a in enumerate(values):
        for b in values:
            as_good = all(q <= p for p, q in zip(a, b, strict=True))
            if as_good and any(q < p for p, q in zip(a, b, strict=True)):
                beaten[i] = True
    return np.array(beaten)


@pytest.mark.parametrize("n_measures", [2, 3])
def test_front_is_what_no_other_run_beats(n_measures):
    values = np.random.default_rng(0).integers(6, size=(60, n_measures))
    front = pareto({f"m{i}": column for i, column in enumerate(values.T)})
    np.testing.assert_array_equal(front, ~beaten_by_hand(values.tolist()))
    assert 0 < front.sum() < 60


def test_some_measures_are_better_when_higher():
    l0, auroc = np.array([1.0, 2, 3, 4]), np.array([0.6, 0.9, 0.8, 0.9])
    assert pareto({"l0": l0, "label_auroc": auroc}).tolist() == [True, True, False, False]
    assert pareto({"l0": l0, "fvu": auroc}).tolist() == [True, False, False, False]


def test_equal_runs_are_both_marked_and_unknown_ones_never():
    l0, fvu = np.array([1.0, 1, np.nan, 0.5]), np.array([0.5, 0.5, 0.1, np.nan])
    assert pareto({"l0": l0, "fvu": fvu}).tolist() == [True, True, False, False]
