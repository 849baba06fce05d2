from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sae.core import baselines
from sae.core.baselines import (
    Standardised,
    both_signs,
    in_both_halves,
    independent_components,
    nonnegative_factors,
    rectified,
    supervised,
)
from sae.core.labels import stratified_halves


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def best_correlation(found, truth):
    return np.abs(np.corrcoef(found.T, truth.T)[: found.shape[1], found.shape[1] :]).max(axis=0)


def test_independent_components_find_sources(rng):
    truth = rng.laplace(size=(2000, 4))
    x = (truth @ rng.normal(size=(4, 4))).astype(np.float32)
    found, remark = independent_components(x[:1500], x, 0)
    assert (best_correlation(found, truth) > 0.98).all()
    assert remark == ""


def test_independent_components_of_a_matrix_without_full_rank(rng):
    x = rng.laplace(size=(300, 3)) @ rng.normal(size=(3, 5))
    found, _ = independent_components(x, x, 0)
    assert found.shape == (300, 3)


def test_it_is_said_when_a_decomposition_did_not_converge(rng, monkeypatch):
    monkeypatch.setattr(baselines, "ICA_STEPS", 1)
    x = rng.laplace(size=(300, 4))
    _, remark = independent_components(x, x, 0)
    assert remark == "FastICA had not converged after 1 steps"


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_nonnegative_factors_find_parts(rng, layout):
    truth = rng.gamma(0.3, size=(300, 3))
    parts = np.kron(np.eye(3), rng.uniform(0.5, 1.5, size=(1, 10)))
    x = truth @ parts
    found, _ = nonnegative_factors(layout(x[:200]), layout(x), 3, 0)
    assert found.min() >= 0
    assert (best_correlation(found, truth) > 0.98).all()


def test_both_signs():
    np.testing.assert_array_equal(both_signs(np.array([[1, 2]])), [[1, 2, -1, -2]])


@pytest.mark.parametrize("n_active", [0, 1, 7, 50], ids=str)
def test_rectified_columns_are_as_dense_as_asked(rng, n_active):
    x = rng.normal(size=(50, 2))
    found = rectified(x, np.array([n_active, 3]))
    assert (np.count_nonzero(found, axis=0) == [n_active, 3]).all()
    assert found.min() >= 0
    active = found[:, 1] > 0
    assert x[active, 1].min() > x[~active, 1].max()
    # The values that stay keep their distances.
    np.testing.assert_allclose(np.diff(found[active, 1]), np.diff(x[active, 1]))


def test_labels_in_both_halves():
    codes, halves = np.array([0, 0, 1, 1, 2]), np.array([[0, 1, 0, 1, 0], [0, 0, 1, 1, 0]])
    np.testing.assert_array_equal(in_both_halves(codes, 3, halves), [[True, True, False], [False, False, False]])


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_standardised_columns(rng, layout):
    x = np.maximum(rng.normal(size=(30, 5)), 0)
    x[:, 2] = 0.1
    standard = Standardised.of(layout(x))
    found = standard.transform(layout(x), np.array([0, 2, 4]))
    expected = (x - x.mean(axis=0)) / x.std(axis=0)
    np.testing.assert_allclose(found[:, [0, 2]], expected[:, [0, 4]])
    assert not found[:, 1].any()
    inside = rng.random(30) < 0.4
    r = [0 if j == 2 else np.corrcoef(x[:, j], inside)[0, 1] for j in range(5)]
    assert set(standard.most_correlated(layout(x), inside, 2)) == set(np.argsort(-np.abs(r))[:2])


class TestSupervised:
    @pytest.fixture
    def cells(self, rng):
        codes = np.repeat([0, 1, 2], [60, 40, 8])
        x = rng.normal(size=(108, 30))
        for label, column in enumerate((4, 9, 17)):
            x[codes == label, column] -= 3
        return x, codes, stratified_halves(codes, 2, rng)

    def test_the_column_that_knows_the_label_is_chosen_with_its_sign(self, cells):
        x, codes, halves = cells
        found = supervised(x, codes, 3, halves, 0)
        for split, half in enumerate(halves):
            for label, column in enumerate((4, 9, 17)):
                for p in range(2):
                    scored, fitted = x[half != p, column], x[half == p, column]
                    expected = -(scored - fitted.mean()) / fitted.std()
                    np.testing.assert_allclose(found.column[split, label, half != p], expected)
                    auroc = roc_auc_score(codes[half != p] == label, found.classifier[split, label, half != p])
                    assert auroc > 0.85
        assert (found.n_columns >= 1).all() and found.n_columns.mean() < 20

    def test_layouts_agree(self, cells):
        x, codes, halves = cells
        x = np.maximum(x, 0)
        one, other = (supervised(each, codes, 3, halves, 0) for each in (x, sparse.csr_matrix(x)))
        np.testing.assert_allclose(one.classifier, other.classifier, atol=1e-6)

    def test_the_other_half_has_no_say(self, cells, rng):
        x, codes, halves = cells
        before = supervised(x, codes, 3, halves[:1], 0)
        changed, half = x.copy(), halves[0]
        changed[half == 1] += rng.normal(size=(int((half == 1).sum()), 30))
        after = supervised(changed, codes, 3, halves[:1], 0)
        # What was fitted on half 0 scores half 1: only its cells changed.
        np.testing.assert_array_equal(before.n_columns[0, 0], after.n_columns[0, 0])
        assert (before.n_columns[0, 1] != after.n_columns[0, 1]).any()

    def test_with_labels_that_mean_nothing_it_is_chance(self, rng):
        x, codes = rng.normal(size=(400, 100)), rng.integers(2, size=400)
        halves = stratified_halves(codes, 4, rng)
        found = supervised(x, codes, 2, halves, 0)
        for scores in (found.classifier, found.column):
            each = [
                roc_auc_score(codes[h == p] == 1, scores[s, 1, h == p]) for s, h in enumerate(halves) for p in (0, 1)
            ]
            assert 0.44 < np.mean(each) < 0.56

    def test_the_objective_is_as_small_as_that_of_another_solver(self, cells):
        """A tenth of the penalty at which the last column leaves, by the formula of the L1 penalty."""
        x, codes, halves = cells
        rows, inside = halves[0] == 0, codes[halves[0] == 0] == 1
        z = (x[rows] - x[rows].mean(axis=0)) / x[rows].std(axis=0)
        penalty = 0.1 * np.abs((inside - inside.mean()) @ z).max()
        modern = LogisticRegression().penalty == "deprecated"
        l1 = {"l1_ratio": 1.0} if modern else {"penalty": "l1"}
        other = LogisticRegression(C=1 / penalty, solver="saga", max_iter=20_000, tol=1e-8, random_state=0, **l1)
        other.fit(z, inside)
        found = supervised(x, codes, 3, halves[:1], 0)
        assert found.n_columns[0, 0, 1] == pytest.approx(np.count_nonzero(other.coef_), abs=1)
        scored = (x[~rows] - x[rows].mean(axis=0)) / x[rows].std(axis=0)
        np.testing.assert_allclose(found.classifier[0, 1, ~rows], other.decision_function(scored), atol=0.05)

    def test_only_the_most_correlated_columns_are_looked_at(self, cells, monkeypatch):
        monkeypatch.setattr(baselines, "SCREENED", 1)
        x, codes, halves = cells
        assert (supervised(x, codes, 3, halves, 0).n_columns == 1).all()
