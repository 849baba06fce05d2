from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from sae.core.groups import percentile_groups
from sae.core.scfeaturelens import Concepts, Moments, binomial_two_sided, concepts, half_mann_whitney

N_CELLS, N_GENES = 1200, 150
PROGRAM = slice(0, 20)
FEATURES = ["in 40 %", "in 30 %", "in 5 %", "under 1 %", "one cell", "dead", "in all cells", "one level", "noise"]


def activity(*, seed=0):
    """Activations (cells, features) as named in FEATURES."""
    rng = np.random.default_rng(seed)
    n_active = np.array([480, 360, 60, 8, 1, 0, N_CELLS, 600, 100])
    a = np.where(np.arange(N_CELLS)[:, None] < n_active, rng.exponential(size=(N_CELLS, len(n_active))), 0)
    a = rng.permuted(a, axis=0)
    a[:, FEATURES.index("one level")] = a[:, FEATURES.index("one level")] > 0
    return a


def expression(a, *, seed=1):
    """Counts (cells, genes): programs that follow features, the rest noise; the last genes are degenerate."""
    rng = np.random.default_rng(seed)
    rate = np.tile(rng.uniform(0.05, 3, N_GENES), (N_CELLS, 1))
    rate[:, PROGRAM] *= 1 + 2 * a[:, [0]]
    rate[:, 20:30] /= 1 + 5 * a[:, [0]]
    rate[:, 30:40] *= 1 + 0.3 * np.minimum(a[:, [2]], 1)
    rate[:, 60:70] *= 1 + 9 * (a[:, [3]] > 0)
    x = rng.poisson(rate).astype(np.float64)
    groups = percentile_groups(sparse.csr_matrix(a))
    positive = groups.positive().toarray()
    x[:, -1] = 0
    x[:, -2] = 3
    x[:, -3] = positive[:, 0] * rng.integers(1, 9, N_CELLS)
    x[:, -4] = positive[:, 0]
    x[:, -5] = positive[:, 3] * rng.integers(1, 9, N_CELLS)
    x[:, -6] = np.where(positive[:, 0], 2, x[:, -6])
    x[:, -7] = np.where(a[:, 0] == 0, 2, x[:, -7])
    x[:, -8] = np.where(positive[:, 0], 0, x[:, -8])
    return x


def levels(a, *, seed=1):
    """Expression (cells, genes) that is high everywhere, so that no gene doubles."""
    rng = np.random.default_rng(seed)
    x = rng.normal(10, 1, size=(N_CELLS, N_GENES))
    x[:, PROGRAM] += 0.5 * a[:, [0]] + 0.7 * np.minimum(a[:, [2]], 1)
    return x


EXPRESSION = {"counts": expression, "levels": levels}


def gene_sets(n=60, *, seed=2):
    """Membership (sets, genes): the programs, random sets, none and all."""
    rng = np.random.default_rng(seed)
    sets = rng.random((n, N_GENES)) < rng.uniform(0.03, 0.4, size=(n, 1))
    sets[0] = np.isin(np.arange(N_GENES), np.arange(N_GENES)[PROGRAM])
    sets[1] = (np.arange(N_GENES) >= 20) & (np.arange(N_GENES) < 40)
    sets[2] = (np.arange(N_GENES) >= 60) & (np.arange(N_GENES) < 72)
    sets[3] = np.arange(N_GENES) >= N_GENES - 8
    sets[-2:] = [[False], [True]]
    return sets


def moments_of(masks, x):
    """Moments from groups of cells (features, cells), one at a time."""
    mean = np.array([x[mask].mean(axis=0) if mask.any() else np.full(x.shape[1], np.nan) for mask in masks])
    variance = np.array([x[mask].var(axis=0, ddof=1) if mask.sum() > 1 else np.zeros(x.shape[1]) for mask in masks])
    return Moments(masks.sum(axis=1, keepdims=True), mean, variance)


def annotated(a, x, sets) -> Concepts:
    groups = percentile_groups(sparse.csr_matrix(a))
    positive = moments_of(groups.positive().toarray().T, x)
    reference = moments_of(~groups.active().toarray().T, x)
    return concepts(positive, reference, sparse.csr_matrix(sets.astype(np.float64)))


def one_feature_as_published(activation, x, sets):
    """Written from the method, one gene and one gene set at a time."""
    positive = x[activation > np.percentile(activation, 99)]
    negative = x[activation == 0]
    genes = pd.DataFrame({"p": np.ones(N_GENES), "fold_change": np.full(N_GENES, np.nan)})
    for gene in range(N_GENES):
        one, rest = positive[:, gene], negative[:, gene]
        if len(one) and len(rest):
            with np.errstate(divide="ignore", invalid="ignore"):
                genes.loc[gene, "fold_change"] = one.mean() / rest.mean()
            if one.std() > 0 and rest.std() > 0:
                genes.loc[gene, "p"] = stats.ttest_ind(one, rest, equal_var=False).pvalue
    genes["padj"] = stats.false_discovery_control(genes["p"])
    genes["rank"] = genes["fold_change"].rank(na_option="bottom")
    relaxed_padj, no_fold_change = genes["padj"].min() > 1e-5, genes["fold_change"].max() < 2
    study = genes["padj"] < (0.05 if relaxed_padj else 1e-5)
    if not no_fold_change:
        study &= (genes["fold_change"] > 2) | (genes["fold_change"] < 0.5)
    tests = []
    for members in sets:
        hits, p_binomial, p_mannwhitney = (study & members).sum(), 1.0, 0.5
        if study.any():
            p_binomial = stats.binomtest(hits, study.sum(), members.sum() / N_GENES).pvalue
        if members.any() and not members.all() and genes["rank"].nunique() > 1:
            inside, outside = genes["rank"][members], genes["rank"][~members]
            both = stats.mannwhitneyu(inside, outside, use_continuity=False, method="asymptotic")
            p_mannwhitney = both.pvalue / 2
        tests.append([hits, p_binomial, p_mannwhitney, p_binomial < 0.05 and p_mannwhitney < 0.05])
    return SimpleNamespace(
        tests=np.array(tests, dtype=float).T,
        n_study=study.sum(),
        relaxed_padj=relaxed_padj,
        no_fold_change=no_fold_change,
        fold_change=genes["fold_change"],
    )


@pytest.fixture(scope="module")
def both():
    """Found and expected for every feature, by kind of expression."""
    a, sets = activity(), gene_sets()
    data = {name: make(a) for name, make in EXPRESSION.items()}
    return {
        name: (annotated(a, x, sets), [one_feature_as_published(activation, x, sets) for activation in a.T])
        for name, x in data.items()
    }


@pytest.mark.parametrize("name", EXPRESSION)
@pytest.mark.parametrize("feature", range(len(FEATURES)), ids=FEATURES)
def test_each_feature_is_annotated_as_published(both, feature, name):
    found, expected = both[name][0], both[name][1][feature]
    hits, p_binomial, p_mannwhitney, kept = expected.tests
    assert found.n_study[feature] == expected.n_study
    assert found.relaxed_padj[feature] == expected.relaxed_padj
    assert found.no_fold_change[feature] == expected.no_fold_change
    np.testing.assert_array_equal(found.hits[feature], hits)
    np.testing.assert_allclose(found.p_binomial[feature], p_binomial, rtol=1e-9)
    np.testing.assert_allclose(found.p_mannwhitney[feature], p_mannwhitney, rtol=1e-9)
    np.testing.assert_array_equal(found.kept[feature], kept)


def test_the_features_above_take_every_path(both):
    taken = {
        (padj, fold_change, n_study > 0, kept)
        for found, _ in both.values()
        for padj, fold_change, n_study, kept in zip(
            found.relaxed_padj.tolist(),
            found.no_fold_change.tolist(),
            found.n_study.tolist(),
            found.kept.any(axis=1).tolist(),
            strict=True,
        )
    }
    assert {path[:2] for path in taken} == {(False, False), (False, True), (True, False), (True, True)}
    assert {path[2:] for path in taken} >= {(False, False), (True, True)}
    fold_change = both["counts"][1][0].fold_change
    assert np.isinf(fold_change).any()
    assert np.isnan(fold_change).any()
    assert (fold_change == 0).any()


def test_a_perfect_marker_is_not_found_and_a_gene_that_is_nowhere_ranks_above_it():
    a = activity()
    x = expression(a)
    only_marker = np.eye(N_GENES, dtype=bool)[[-3, -1]]
    found = annotated(a, x, only_marker)
    assert found.n_study[0] > 0
    assert found.hits[0].tolist() == [0, 0]
    assert found.p_mannwhitney[0, 1] < found.p_mannwhitney[0, 0]


def group(mean, variance=1.0, n=50):
    return Moments(np.array([[n]]), np.array([mean], dtype=float), np.broadcast_to(np.array(variance), (1, len(mean))))


STRONG, CLEAR, WEAK = (3, 1), (1.5, 0.04), (3, 8)
SMALL, DOWN, NOISE = (1.1, 0.05), (0.1, 0.04), (3, 1e6)


@pytest.mark.parametrize(
    ("gene", "other", "relaxed_padj", "no_fold_change", "n_study"),
    [
        pytest.param(STRONG, STRONG, False, False, 2, id="both conditions met"),
        pytest.param(STRONG, CLEAR, False, False, 1, id="one gene changes too little"),
        pytest.param(CLEAR, CLEAR, False, True, 2, id="all change too little"),
        pytest.param(WEAK, WEAK, True, False, 2, id="none certain"),
        pytest.param(SMALL, SMALL, True, True, 2, id="neither"),
        pytest.param(DOWN, CLEAR, False, True, 2, id="a fall alone does not count as a change"),
        pytest.param(CLEAR, NOISE, False, False, 0, id="each condition met by another gene"),
        pytest.param(NOISE, NOISE, True, False, 0, id="nothing"),
    ],
)
def test_each_condition_has_its_own_fallback(gene, other, relaxed_padj, no_fold_change, n_study):
    mean, variance = np.transpose([gene, other, (1, 1)])
    found = concepts(group(mean, variance), group(np.ones(3), variance), sparse.csr_matrix(np.eye(3)))
    assert found.relaxed_padj == relaxed_padj
    assert found.no_fold_change == no_fold_change
    assert found.n_study == n_study


@pytest.mark.parametrize(
    ("mean", "no_fold_change", "n_study"),
    [pytest.param(0, True, 1, id="absent from both"), pytest.param(1, False, 0, id="absent from the reference")],
)
def test_only_an_infinite_fold_change_counts_as_one(mean, no_fold_change, n_study):
    variance = [CLEAR[1], 0]
    found = concepts(group([CLEAR[0], mean], variance), group([1, 0], variance), sparse.csr_matrix(np.eye(2)))
    assert found.no_fold_change == no_fold_change
    assert found.n_study == n_study


@pytest.mark.parametrize("n", [0, 1], ids=["no cells", "one cell"])
def test_group_without_a_variance_gives_no_study_set(n):
    variance = np.nan if n == 0 else 0.0
    found = concepts(group([np.nan] * 4, variance, n), group(np.arange(4)), sparse.csr_matrix(np.eye(4)))
    assert found.n_study == 0
    assert (found.p_binomial == 1).all()
    assert not found.kept.any()


def reordered(found, *, sets=slice(None), genes=slice(None), features=slice(None)):
    columns = {name: genes if name == "study" else sets for name in vars(found)}
    return Concepts(
        **{name: v[features][:, columns[name]] if v.ndim == 2 else v[features] for name, v in vars(found).items()}
    )


def assert_equal(found, expected):
    for name, values in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-10, err_msg=name)


def test_order_of_cells_genes_sets_and_features_and_units_of_genes_do_not_matter(both):
    a = activity()
    x, sets = expression(a), gene_sets()
    rng = np.random.default_rng(3)
    cells, genes, order, features = (rng.permutation(size) for size in (N_CELLS, N_GENES, len(sets), len(FEATURES)))
    units = 2.0 ** rng.integers(-3, 4, N_GENES)
    found = annotated(a[cells][:, features], (x * units)[cells][:, genes], sets[order][:, genes])
    assert_equal(found, reordered(both["counts"][0], sets=order, genes=genes, features=features))


def test_features_may_come_in_blocks(both):
    a = activity()
    x, sets = expression(a), gene_sets()
    for block in (slice(0, 1), slice(1, 9)):
        assert_equal(annotated(a[:, block], x, sets), reordered(both["counts"][0], features=block))


@pytest.mark.parametrize(
    ("drawn", "members", "total"),
    [(1, 3, 10), (7, 5, 10), (12, 3, 9), (40, 0, 30), (40, 30, 30), (40, 1, 1000), (200, 37, 113), (3000, 500, 13431)],
)
def test_binomial_test_is_that_of_scipy_for_every_outcome(drawn, members, total):
    hits = np.arange(drawn if members == total else 0, 1 if members == 0 else drawn + 1)
    expected = [stats.binomtest(k, drawn, members / total).pvalue for k in hits]
    found = binomial_two_sided(hits, np.array(drawn), np.array(members), total)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)


def test_binomial_test_broadcasts_and_nothing_drawn_is_no_evidence():
    hits = np.array([[0, 0, 0], [1, 4, 3]])
    found = binomial_two_sided(hits, np.array([[0], [5]]), np.array([[2, 5, 9]]), 10)
    np.testing.assert_array_equal(found[0], 1)
    expected = [stats.binomtest(k, 5, p).pvalue for k, p in zip(hits[1], [0.2, 0.5, 0.9], strict=True)]
    np.testing.assert_allclose(found[1], expected, rtol=1e-12)


def test_mann_whitney_p_is_twice_too_small_for_random_sets():
    rng = np.random.default_rng(0)
    sets = sparse.csr_matrix((rng.random((20_000, 300)) < 0.1).astype(np.float64))
    p = half_mann_whitney(rng.normal(size=(1, 300)), sets)
    assert 0.018 < (p <= 0.01).mean() < 0.022
    assert p.max() <= 0.5


@pytest.mark.parametrize("values", [np.ones(6), np.full(6, np.nan), np.full(6, np.inf)], ids=["1", "nan", "inf"])
def test_equal_fold_changes_are_no_evidence(values):
    np.testing.assert_array_equal(half_mann_whitney(values[None], sparse.csr_matrix(np.eye(6))), 0.5)
