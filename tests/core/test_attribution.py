from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sae.core.attribution import (
    BestColumn,
    Probes,
    completeness_gap,
    enough_nodes,
    input_x_gradient,
    integrated_gradients,
)
from sae.core.labels import stratified_halves


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def nonlinear(rng):
    """Logits softplus(z A) B of a decoder, and their gradient (n, d, probes) by the chain rule."""
    first, second = rng.normal(size=(4, 12)), rng.normal(size=(12, 3))

    def logits(z):
        return np.logaddexp(0, z @ first) @ second

    def gradient(z):
        slope = 1 / (1 + np.exp(-(z @ first)))
        return np.einsum("dg,ng,gp->ndp", first, slope, second)

    return logits, gradient


def test_gradients_are_the_analytic_ones(nonlinear, rng):
    logits, gradient = nonlinear
    z = rng.normal(size=(20, 4))
    found = np.stack(list(input_x_gradient(logits, z)), axis=1)
    expected = z[:, :, None] * gradient(z)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_integrated_gradients_are_the_integral(nonlinear, rng):
    logits, gradient = nonlinear
    z, baseline = rng.normal(size=(20, 4)), rng.normal(size=4)
    found = np.stack(list(integrated_gradients(logits, z, baseline, 8)), axis=1)
    way = z - baseline
    along = [gradient(baseline + t * way) for t in (np.arange(2000) + 0.5) / 2000]
    expected = way[:, :, None] * np.mean(along, axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_attributions_add_up_to_the_change_of_the_logit(nonlinear, rng):
    logits, _ = nonlinear
    z, baseline = 3 * rng.normal(size=(30, 4)), np.zeros(4)
    n_nodes, gap = enough_nodes(logits, z, baseline)
    assert n_nodes > 1
    assert gap < 1e-2
    total = sum(integrated_gradients(logits, z, baseline, n_nodes))
    np.testing.assert_allclose(total, logits(z) - logits(baseline[None]), atol=1e-2 * logits(z).std(axis=0).max())
    # The slope along the way is the sum of those along the dimensions.
    assert completeness_gap(total, logits(z), logits(np.broadcast_to(baseline, z.shape))) == pytest.approx(
        gap, abs=5e-3
    )


def test_nodes_cost_two_predictions_each_whatever_the_dimensions(rng):
    calls, weights = [], rng.normal(size=(50, 2))

    def logits(z):
        calls.append(len(z))
        return np.sin(3 * z @ weights)

    enough_nodes(logits, rng.normal(size=(8, 50)), np.zeros(50))
    assert len(calls) <= 2 + 2 * (1 + 4 + 16)


def test_one_node_is_exact_for_a_linear_decoder(rng):
    weights = rng.normal(size=(5, 2))
    z = rng.normal(size=(10, 5))
    assert enough_nodes(lambda z: z @ weights + 1, z, z.mean(axis=0))[0] == 1


def test_a_gap_is_found(rng):
    at = rng.normal(size=(10, 2))
    total = at - 1
    total[3, 1] += 0.5
    assert completeness_gap(total, at, np.ones((10, 2))) == pytest.approx(0.5 / at[:, 1].std())
    # A probe without any weights has no logit to explain.
    assert completeness_gap(np.ones((4, 1)), np.zeros((4, 1)), np.zeros((4, 1))) == 0


class TestProbes:
    @pytest.mark.parametrize("genes", [6, 80], ids=["few genes", "more genes than cells"])
    def test_probes_are_those_of_scikit_learn_on_all_genes(self, rng, genes):
        codes = rng.integers(3, size=60)
        x = rng.normal(size=(60, genes)) * rng.uniform(0.1, 5, size=genes) + 2
        x[:, :3] += 2 * (codes[:, None] == np.arange(3))
        x[:, 4] = 1.0
        halves = stratified_halves(codes, 2, rng)
        logits = Probes.fit(x, codes, 3, halves).logits(x).reshape(60, 2, 2, 3)
        for split, half in enumerate(halves):
            for p in range(2):
                rows = half == p
                sd = x[rows].std(axis=0)
                scaled = (x - x[rows].mean(axis=0)) / np.where(sd > 1e-9, sd, np.inf)
                for label in range(3):
                    model = LogisticRegression(max_iter=10_000, tol=1e-8).fit(scaled[rows], codes[rows] == label)
                    np.testing.assert_allclose(
                        logits[:, split, p, label], model.decision_function(scaled), rtol=0.02, atol=0.05
                    )

    def test_a_label_in_one_half_has_no_probe(self, rng):
        codes = np.array([0] * 10 + [1] * 9 + [2])
        halves = stratified_halves(codes, 1, rng)
        probes = Probes.fit(rng.normal(size=(20, 4)), codes, 3, halves)
        assert probes.valid.tolist() == [[True, True, False]]
        assert not probes.weights.reshape(4, 1, 2, 3)[..., 2].any()


def test_the_best_dimension_of_each_probe_is_chosen_on_its_own_half(rng):
    n, d, n_labels = 50, 4, 2
    codes = rng.integers(n_labels, size=n)
    halves = stratified_halves(codes, 2, rng)
    columns = rng.normal(size=(d, n, 2, 2, n_labels)) + (codes == 1)[None, :, None, None, None]
    best = BestColumn(codes, halves, np.ones((2, n_labels), bool))
    for values in columns:
        best.add(values.reshape(n, -1))
    for split, half in enumerate(halves):
        for p in range(2):
            for label in range(n_labels):
                on = half == p
                aurocs = [roc_auc_score(codes[on] == label, columns[j, on, split, p, label]) for j in range(d)]
                expected = columns[np.argmax(aurocs), ~on, split, p, label]
                np.testing.assert_array_equal(best.scores[split, label, ~on], expected)


def test_a_label_without_a_probe_is_not_scored():
    codes, halves = np.array([0, 1, 0, 1]), np.array([[0, 0, 1, 1]])
    best = BestColumn(codes, halves, np.array([[True, False]]))
    best.add(np.arange(16.0).reshape(4, 4))
    assert np.isnan(best.scores[0, 1]).all() and not np.isnan(best.scores[0, 0]).any()
