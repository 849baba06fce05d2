from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from sae.core import choose_k as module
from sae.core.choose_k import EXPLAINED, PILOT_STEPS, SHARES, choose_k
from sae.core.defaults import nested_groups
from sae.core.preprocess import fit_scaling

D = 20
KS = sorted({round(share * D) for share in SHARES})


def sums_of_programs(k, *, n=2000, noise=0.0):
    """Cells (n, 20), each a sum of k of 20 programs, which are unit vectors."""
    rng = np.random.default_rng(0)
    programs = rng.normal(size=(D, D))
    programs /= np.linalg.norm(programs, axis=1, keepdims=True)
    active = rng.random((n, D)).argsort(axis=1) < k
    x = np.where(active, rng.uniform(1, 2, size=(n, D)), 0) @ programs
    return (x + noise * rng.normal(size=x.shape)).astype(np.float32)


@pytest.fixture
def chosen(settings):
    """Choose k for cells of which the last 400 are held out."""

    def chosen(x, architecture="batchtopk", **given):
        rows = np.arange(len(x))
        used = settings(architecture, **{"n_features": 64, "k": 6, "learning_rate": 8e-3, "steps": 1000} | given)
        return choose_k(x, fit_scaling(x, "whiten"), used, train_rows=rows[:-400], val_rows=rows[-400:])

    return chosen


@pytest.mark.parametrize(("architecture", "k"), [("matryoshka", 3), ("topk", 5)])
def test_finds_how_many_programs_a_cell_has(chosen, architecture, k):
    found = chosen(sums_of_programs(k), architecture)
    assert (found.k, found.found) == (k, True)
    assert all((unexplained < EXPLAINED) is (tried >= k) for tried, unexplained in found.tried.items())


def test_where_cells_are_noisy_the_default_stands(chosen):
    found = chosen(sums_of_programs(3, noise=1.0), steps=200)
    assert (found.k, found.found, list(found.tried)) == (6, False, [KS[-1]])


def test_a_dictionary_too_narrow_for_any_k_keeps_its_own(chosen):
    found = chosen(sums_of_programs(3), n_features=3, k=1)
    assert (found.k, found.found, found.tried) == (1, False, {})


@pytest.fixture
def train_as_if(monkeypatch):
    """Let training leave what a function of its settings says; returns the settings of all runs."""

    def train_as_if(unexplained, ended="finished"):
        runs = []

        def train(x, scaling, settings, **rows):
            runs.append(settings)
            return SimpleNamespace(unexplained=unexplained(settings.k), ended=ended)

        monkeypatch.setattr(module, "train", train)
        return runs

    return train_as_if


@pytest.mark.parametrize("needed", [1, *KS])
def test_bisection_ends_at_the_smallest_k_that_explains(chosen, train_as_if, needed):
    runs = train_as_if(lambda k: EXPLAINED * (0.9 if k >= needed else 1.1))
    found = chosen(sums_of_programs(3))
    assert found.k == next(k for k in KS if k >= needed)
    assert found.tried == {run.k: EXPLAINED * (0.9 if run.k >= needed else 1.1) for run in runs}
    assert len(runs) <= 1 + np.ceil(np.log2(len(KS)))


def test_trials_are_short_and_narrow(chosen, train_as_if):
    runs = train_as_if(lambda k: 0)
    chosen(sums_of_programs(3), n_features=512, steps=100_000)
    chosen(sums_of_programs(3), n_features=512, steps=100)
    assert {run.steps for run in runs} == {PILOT_STEPS, 100}
    groups = nested_groups(512, fit_scaling(sums_of_programs(3), "whiten").n_effective)[:2]
    assert {(run.n_features, run.groups) for run in runs} == {(groups[-1], groups)}
    assert groups[-1] < 64


def test_no_more_than_half_of_the_features_are_tried_as_k(chosen, train_as_if):
    runs = train_as_if(lambda k: 0)
    chosen(sums_of_programs(3), n_features=13)
    assert max(run.k for run in runs) == 6


def test_ctrl_c_in_a_trial_ends_the_search(chosen, train_as_if):
    train_as_if(lambda k: 0, ended="interrupted")
    with pytest.raises(KeyboardInterrupt):
        chosen(sums_of_programs(3))
