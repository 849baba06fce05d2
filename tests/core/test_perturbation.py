from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core import perturbation as core
from sae.core.moments import chunks
from sae.core.perturbation import (
    comparable,
    compare_places,
    group_means,
    permuted_labels,
    place_targets,
    places,
    respond,
    sums,
)


def made(n=240, h=12, *, effect=0.0, tied=False, n_strata=1, seed=0):
    """Activations (n, h), whether each cell is perturbed, and strata of different mean; the first feature responds."""
    rng = np.random.default_rng(seed)
    strata = np.arange(n) % n_strata
    perturbed = rng.random(n) < np.where(strata % 2, 0.5, 0.3)
    values = rng.integers(1, 5, size=(n, h)) / 2.0 if tied else rng.exponential(size=(n, h))
    a = np.where(rng.random((n, h)) < 0.6, values + strata[:, None] / 2, 0)
    a[:, 0] += effect * perturbed
    return sparse.csr_matrix(a.astype(np.float32)), perturbed, strata


def response(a, perturbed, strata, n_permutations=20, *, min_cells=2, max_fdr=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return respond(a, perturbed, strata, n_permutations, rng, min_cells=min_cells, max_fdr=max_fdr)


def van_elteren(values, perturbed, strata):
    """The z of the stratified rank-sum test, and the AUROC of pairs from the same stratum, one stratum after another."""
    total, variance, u_total, pairs = 0.0, 0.0, 0.0, 0
    for stratum in np.unique(strata):
        x, inside = values[strata == stratum], perturbed[strata == stratum]
        n, n1 = len(x), inside.sum()
        ranks = stats.rankdata(x)
        u = ranks[inside].sum() - n1 * (n1 + 1) / 2
        ties = sum(t**3 - t for t in np.unique(x, return_counts=True)[1])
        total += (u - n1 * (n - n1) / 2) / (n + 1)
        variance += n1 * (n - n1) / 12 * (n + 1 - ties / (n * (n - 1))) / (n + 1) ** 2
        u_total, pairs = u_total + u, pairs + n1 * (n - n1)
    return total / np.sqrt(variance), u_total / pairs


@pytest.mark.parametrize("tied", [False, True], ids=["values", "ties"])
def test_test_is_that_of_mann_and_whitney(tied):
    a, perturbed, strata = made(tied=tied, effect=0.8)
    found = response(a, perturbed, strata)
    assert found.features.tolist() == list(range(12))
    for feature in range(12):
        x = a[:, feature].toarray().ravel().astype(np.float64)
        one, rest = x[perturbed], x[~perturbed]
        test = stats.mannwhitneyu(one, rest, method="asymptotic")
        np.testing.assert_allclose(found.pval[feature], test.pvalue, rtol=1e-9)
        np.testing.assert_allclose(found.auroc[feature], test.statistic / len(one) / len(rest), rtol=1e-12)
        np.testing.assert_allclose(found.difference[feature], one.mean() - rest.mean(), atol=1e-12)
        np.testing.assert_allclose(found.active[feature], (one > 0).mean(), rtol=1e-12)
        np.testing.assert_allclose(found.control_active[feature], (rest > 0).mean(), rtol=1e-12)
        assert np.sign(found.score[feature]) == np.sign(test.statistic / len(one) / len(rest) - 0.5)
    assert found.pval.argmin() == 0 and found.difference[0] > 0


def test_strata_are_compared_apart():
    a, perturbed, strata = made(n_strata=3, effect=0.3)
    found = response(a, perturbed, strata)
    n1, n0 = (np.bincount(strata, weights=some) for some in (perturbed, ~perturbed))
    weights = n1 * n0 / (n1 + n0) / (n1 * n0 / (n1 + n0)).sum()
    for feature in range(12):
        x = a[:, feature].toarray().ravel().astype(np.float64)
        z, auroc = van_elteren(x, perturbed, strata)
        np.testing.assert_allclose([found.score[feature], found.auroc[feature]], [z, auroc], rtol=1e-9)
        np.testing.assert_allclose(found.pval[feature], 2 * stats.norm.sf(abs(z)), rtol=1e-9)
        parts = [[x[(strata == b) & (perturbed == side)] for b in range(3)] for side in (True, False)]
        means = [[part.mean() for part in side] for side in parts]
        shares = [[(part > 0).mean() for part in side] for side in parts]
        np.testing.assert_allclose(found.difference[feature], weights @ np.subtract(*means), atol=1e-12)
        np.testing.assert_allclose(found.active[feature], weights @ shares[0], rtol=1e-12)
        np.testing.assert_allclose(found.control_active[feature], weights @ shares[1], rtol=1e-12)


@pytest.mark.parametrize("n_strata", [1, 3], ids=["one batch", "batches"])
@pytest.mark.parametrize("effect", [0.0, 0.5], ids=["no effect", "effect"])
def test_null_is_a_loop_over_permuted_labels(n_strata, effect):
    a, perturbed, strata = made(n_strata=n_strata, effect=effect)
    found = response(a, perturbed, strata, 20)
    labels = permuted_labels(perturbed, strata, 20, np.random.default_rng(0)).toarray()
    z = np.empty((20, 12))
    for b, feature in product(range(20), range(12)):
        x = a[:, feature].toarray().ravel().astype(np.float64)
        if n_strata > 1:
            z[b, feature] = abs(van_elteren(x, labels[:, b], strata)[0])
        else:
            test = stats.mannwhitneyu(x[labels[:, b]], x[~labels[:, b]], method="asymptotic")
            z[b, feature] = stats.norm.isf(test.pvalue / 2)
    real = np.abs(found.score)
    for feature in range(12):
        lower = real[real <= real[feature]]
        rates = [(1 + (z >= least - 1e-9).sum()) / 20 / (real >= least).sum() for least in lower]
        assert found.fdr[feature] == pytest.approx(min(1, *rates))
    n_higher = (z.max(axis=1) >= real.max() - 1e-9).sum()
    assert found.pval_any == pytest.approx((1 + n_higher) / 21)
    chosen = real[found.fdr <= 0.05]
    assert found.n_permuted == ((z >= chosen.min() - 1e-9).sum() / 20 if len(chosen) else 0)
    assert (found.fdr[0] <= 0.05) == bool(effect)


def test_permuted_labels():
    strata = np.repeat([0, 2], [30, 50])
    perturbed = np.zeros(80, bool)
    perturbed[[0, 1, 2, *range(30, 50)]] = True
    drawn = permuted_labels(perturbed, strata, 2000, np.random.default_rng(0)).toarray()
    assert drawn.shape == (80, 2000)
    assert (drawn[:30].sum(axis=0) == 3).all() and (drawn[30:].sum(axis=0) == 20).all()
    expected = np.repeat([0.1, 0.4], [30, 50])
    np.testing.assert_allclose(drawn.mean(axis=1), expected, atol=0.05)


def test_comparable():
    perturbed = np.array([True, False, True, True, False, False])
    assert comparable(perturbed, np.array([0, 0, 1, 1, 3, 3])).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("n_strata", [1, 2], ids=["one batch", "batches"])
def test_p_is_calibrated(n_strata):
    """Sparse features of all kinds; nothing is true."""
    rng = np.random.default_rng(1)
    below, any_below, fdr = [], [], []
    for seed in range(40):
        density = rng.uniform(0.05, 0.9, size=60)
        a = sparse.csr_matrix(np.where(rng.random((400, 60)) < density, rng.exponential(size=(400, 60)), 0))
        strata = rng.integers(n_strata, size=400)
        found = response(a, rng.random(400) < 0.4, strata, 50, seed=seed)
        below.append((found.pval < 0.05).mean())
        any_below.append(found.pval_any <= 0.1)
        fdr.append((found.fdr <= 0.05).any())
    assert np.mean(below) == pytest.approx(0.05, abs=0.01)
    assert np.mean(any_below) <= 0.25
    assert np.mean(fdr) <= 0.15


def test_rare_and_constant_features_are_not_tested():
    a, perturbed, strata = made(h=5)
    dense = a.toarray()
    dense[:, 1], dense[:, 2] = 0, 1
    dense[5:, 3] = 0
    found = response(sparse.csr_matrix(dense), perturbed, strata, min_cells=10)
    assert found.features.tolist() == [0, 4]
    nothing = response(sparse.csr_matrix(dense[:, 1:3]), perturbed, strata, min_cells=10)
    assert len(nothing.features) == len(nothing.fdr) == 0
    assert np.isnan(nothing.pval_any) and nothing.n_permuted == 0


# ---- Targets


def expression(n=90, f=4, g=7, *, seed=0):
    rng = np.random.default_rng(seed)
    a = np.where(rng.random((n, f)) < 0.7, rng.exponential(size=(n, f)), 0)
    x = np.log1p(rng.poisson(np.exp(rng.normal(size=(n, g)))))
    x[:, 0] += a[:, 1]
    return a, x, rng.integers(3, size=n)


def within(values, strata):
    """Residuals from the means of strata."""
    return values - np.stack([values[strata == b].mean(axis=0) for b in np.arange(strata.max() + 1)])[strata]


def correlations(a, x, strata):
    ra, rx = within(a, strata), within(x, strata)
    return np.array([[np.corrcoef(ra[:, f], rx[:, g])[0, 1] for g in range(x.shape[1])] for f in range(a.shape[1])])


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])
def test_correlation_within_strata(layout, monkeypatch):
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 32)
    a, x, strata = expression()
    assert len(list(chunks(x))) == 3
    whole = sums(sparse.csr_matrix(a), layout(x), strata, 3)
    np.testing.assert_allclose(whole.correlation(), correlations(a, x, strata), atol=1e-12)
    out = np.arange(20, 50)
    some = sums(sparse.csr_matrix(a[out]), layout(x[out]), strata[out], 3)
    rest = np.setdiff1d(np.arange(90), out)
    expected = correlations(a[rest], x[rest], strata[rest])
    np.testing.assert_allclose(whole.without(some).correlation(), expected, atol=1e-12)
    few = np.array([1, 3])
    np.testing.assert_array_equal(whole.of(few).correlation(), whole.correlation()[few])


def test_what_does_not_vary_has_no_correlation():
    a, x, strata = expression()
    a[:, 2], x[:, 3] = strata, 0.1 + strata
    r = sums(sparse.csr_matrix(a), x, strata, 3).correlation()
    assert np.isnan(r[:, 3]).all() and (r[2, :3] == 0).all()
    assert np.isfinite(np.delete(r, 3, axis=1)).all()


def test_places_are_ranks():
    rng = np.random.default_rng(0)
    r = np.round(rng.uniform(-1, 1, size=(5, 30)), 1)
    r[:, 7] = np.nan
    rank, percentile = places(r, np.array([3, 7, 20]))
    for row in range(5):
        known = np.delete(np.abs(r[row]), 7)
        expected = stats.rankdata(-known)
        assert rank[row, [0, 2]].tolist() == [expected[3], expected[19]]
        for column, gene in ((0, 3), (2, 20)):
            others = np.delete(np.abs(r[row]), [7, gene])
            share = (others < abs(r[row, gene])).mean() + (others == abs(r[row, gene])).mean() / 2
            assert percentile[row, column] == pytest.approx(share)
    assert np.isnan(rank[:, 1]).all() and np.isnan(percentile[:, 1]).all()


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])
def test_group_means(layout):
    _, x, codes = expression()
    codes = codes - 1
    found = group_means(layout(x), codes, 2, np.array([4, 1, 4]))
    np.testing.assert_allclose(found, [x[codes == code][:, [4, 1, 4]].mean(axis=0) for code in (0, 1)])


def test_comparison_is_that_of_all_draws_and_exchanges():
    rng = np.random.default_rng(3)
    percentile = rng.random((8, 3))
    rows, alike = np.array([2, 5, 2]), {2: np.array([0, 1, 3]), 5: np.array([4, 6, 7])}
    percentile[2] = 0.8
    pval, expected, random, exchanged = compare_places(percentile, rows, alike, np.random.default_rng(0))
    found = percentile[rows, range(3)]
    for i, row in enumerate(rows):
        assert pval[i] == (1 + (percentile[alike[row], i] >= found[i]).sum()) / 4
    # The rows are exchanged together where a feature is shared.
    draws = [[p, q, p] for p, q in product([*alike[2], 2], [*alike[5], 5])]
    means = np.array([percentile[some, range(3)].mean() for some in draws])
    assert expected == pytest.approx(means.mean(), abs=0.01)
    assert random == pytest.approx((means >= found.mean() - 1e-12).mean(), abs=0.02)
    means = np.array([percentile[rows, order].mean() for order in permutations(range(3))])
    assert exchanged == pytest.approx((means >= found.mean() - 1e-12).mean(), abs=0.02)


def test_comparison_of_nothing():
    pval, *overall = compare_places(np.empty((0, 0)), np.empty(0, int), {}, np.random.default_rng(0))
    assert len(pval) == 0 and np.isnan(overall).all()


def perturbed_cells(n=600, f=80, g=40, *, circular, seed=0):
    """Knock-outs of genes 0 and 1 lower features 0 and 1, which know these genes in all cells, or in none but the perturbed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(2, 1, size=(n, g))
    a = np.where(rng.random((n, f)) < 0.7, rng.exponential(size=(n, f)), 0)
    codes = rng.integers(3, size=n)
    for gene in (0, 1):
        if not circular:
            a[:, gene] = np.maximum(x[:, gene] + rng.normal(0, 0.3, size=n), 0)
        x[codes == gene + 1, gene] -= 2
        a[codes == gene + 1, gene] *= 0.1
    return a, x, codes, rng.integers(2, size=n)


@pytest.mark.parametrize("circular", [False, True], ids=["known to the feature", "lost with the response"])
def test_targets_are_placed_in_other_cells(circular):
    a, x, codes, strata = perturbed_cells(circular=circular)
    own = [np.flatnonzero(codes == 1), np.flatnonzero(codes == 2)]
    strength = np.zeros((2, 80))
    strength[[0, 1], [0, 1]], strength[:, 5] = 9, 3
    rng = np.random.default_rng(0)
    genes = [np.array([0]), np.array([1, 30])]
    placed = place_targets(sparse.csr_matrix(a), x, strata, own, genes, strength, rng, min_cells=10)
    assert placed.feature.tolist() == [0, 1]
    everywhere = correlations(a, x, strata)
    for i, out in enumerate(own):
        rest = np.setdiff1d(np.arange(600), out)
        r = correlations(a[rest], x[rest], strata[rest])
        highest = genes[i][np.abs(r[i, genes[i]]).argmax()]
        assert placed.gene[i] == highest
        assert placed.correlation[i] == pytest.approx(r[i, highest])
        assert placed.rank[i] == stats.rankdata(-np.abs(r[i]))[highest]
        order = np.argsort((a > 0).sum(axis=0), kind="stable")
        apart = np.abs(np.arange(80) - np.flatnonzero(order == i))
        alike = order[np.argsort(apart, kind="stable")[1:51]]
        best = [stats.rankdata(-np.abs(row))[genes[i]].min() for row in r[alike]]
        assert placed.pval[i] == pytest.approx((1 + (best <= placed.rank[i]).sum()) / 51)
        # With the perturbed cells, the target is the first gene in any case.
        assert np.abs(everywhere[i]).argmax() == i
    if circular:
        assert placed.rank.max() > 5 and placed.pval.max() > 0.2 and placed.pval_random > 0.05
    else:
        assert (placed.rank == 1).all() and (placed.percentile == 1).all()
        assert placed.pval.max() <= 0.1 and placed.pval_random < 0.05
        assert placed.expected < 0.7 and placed.pval_exchanged == pytest.approx(0.5, abs=0.05)


def test_features_are_exchanged_though_they_are_not_alike(monkeypatch):
    monkeypatch.setattr(core, "N_ALIKE", 2)
    a, x, codes, strata = perturbed_cells(circular=False)
    a[:400, 0] = 0
    own = [np.flatnonzero(codes == 1), np.flatnonzero(codes == 2)]
    # Either feature knows the target of the other: exchanged, they stand higher.
    genes = [np.array([1]), np.array([0])]
    args = sparse.csr_matrix(a), x, strata, own, genes, np.eye(2, 80), np.random.default_rng(0)
    placed = place_targets(*args, min_cells=10)
    assert placed.feature.tolist() == [0, 1] and placed.percentile.max() < 1
    assert placed.pval_exchanged == 1


def test_features_that_other_cells_lack():
    a, x, codes, strata = perturbed_cells(circular=False)
    a[codes != 1, 0] = 0
    own = [np.flatnonzero(codes == 1), np.flatnonzero(codes == 2)]
    strength = np.zeros((2, 80))
    strength[0, 0], strength[1, :2] = 9, [9, 3]
    genes = [np.array([0]), np.array([1])]
    args = sparse.csr_matrix(a), x, strata, own, genes
    placed = place_targets(*args, strength, np.random.default_rng(0), min_cells=10)
    assert placed.feature.tolist() == [-1, 1] and placed.gene.tolist() == [-1, 1]
    assert np.isnan(placed.rank[0]) and placed.rank[1] == 1
    nothing = place_targets(*args, strength * 0, np.random.default_rng(0), min_cells=10)
    assert (nothing.gene == -1).all() and np.isnan(nothing.pval_random) and np.isnan(nothing.pval).all()
    x[codes != 2, 1] = 1
    constant = place_targets(*args, strength, np.random.default_rng(0), min_cells=10)
    assert constant.feature[1] == 1 and constant.gene[1] == -1


def test_features_of_like_activity():
    n_active = np.array([0, 50, 10, 20, 30, 40, 0])
    assert core._nearest(n_active, 4).tolist() == [3, 5, 2, 1]
    assert len(core._nearest(np.arange(1, 200), 100)) == 50
