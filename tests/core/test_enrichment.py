from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.enrichment import over_representation, rank_sets, set_inflation

N_GENES = 40
N_CELLS = 200


def draw(n, share, *, seed):
    """Random membership (n, genes)."""
    return np.random.default_rng(seed).random((n, N_GENES)) < share


def enriched(study, sets):
    return over_representation(study, sparse.csr_matrix(sets.astype(np.float64)), study.shape[1])


def each_table(study, sets):
    """Yield feature, set and their 2 × 2 table."""
    for feature, chosen in enumerate(study):
        for place, members in enumerate(sets):
            counts = [[(chosen == one) & (members == other) for other in (True, False)] for one in (True, False)]
            yield feature, place, np.sum(counts, axis=-1)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_p_value_is_that_of_fishers_exact_test(share):
    study, sets = draw(6, share, seed=0), draw(8, 0.25, seed=1)
    found = enriched(study, sets)
    for feature, place, table in each_table(study, sets):
        assert found.overlap[feature, place] == table[0, 0]
        expected = stats.fisher_exact(table, alternative="greater").pvalue
        np.testing.assert_allclose(found.pval[feature, place], expected, rtol=1e-10)


def test_score_is_the_log_odds_ratio_with_a_half_added_to_each_count():
    study, sets = draw(6, 0.3, seed=0), draw(8, 0.25, seed=1)
    found = enriched(study, sets)
    for feature, place, table in each_table(study, sets):
        (a, b), (c, d) = table + 0.5
        np.testing.assert_allclose(found.log2_odds[feature, place], np.log2(a * d / (b * c)), rtol=1e-12)


def test_genes_beyond_those_of_the_study_count_as_measured():
    study, sets = draw(6, 0.3, seed=0), draw(8, 0.25, seed=1)
    wider = [np.pad(part, ((0, 0), (0, 20))) for part in (study, sets)]
    found = over_representation(study, sparse.csr_matrix(sets), N_GENES + 20)
    np.testing.assert_array_equal(found.pval, enriched(*wider).pval)


def test_logarithm_of_a_tail_goes_on_where_p_ends():
    chosen = np.arange(13_000) < np.array([[400], [401]])
    found = enriched(chosen, chosen[:1])
    assert found.pval.max() == 0
    expected = stats.hypergeom.logpmf(400, 13_000, 400, [[400], [401]])
    np.testing.assert_allclose(found.log_pval, expected, rtol=1e-11)
    assert found.log_pval[0] < found.log_pval[1] < -700


def test_exact_overlap_is_as_unlikely_as_one_draw_in_all():
    chosen = np.arange(N_GENES)[None] < 5
    found = enriched(chosen, chosen)
    np.testing.assert_allclose(found.pval, stats.hypergeom.pmf(5, N_GENES, 5, 5), rtol=1e-12)
    assert found.log2_odds > 5


@pytest.mark.parametrize(
    ("study", "sets"),
    [
        pytest.param(np.zeros((1, N_GENES), dtype=bool), draw(3, 0.3, seed=2), id="empty study set"),
        pytest.param(np.ones((1, N_GENES), dtype=bool), draw(3, 0.3, seed=2), id="study set of all genes"),
        pytest.param(draw(1, 0.3, seed=2), np.ones((3, N_GENES), dtype=bool), id="gene set of all genes"),
        pytest.param(draw(1, 0.3, seed=2), ~draw(1, 0.3, seed=2), id="nothing in common"),
    ],
)
def test_what_could_not_be_otherwise_is_no_evidence(study, sets):
    found = enriched(study, sets)
    np.testing.assert_allclose(found.pval, 1, rtol=1e-12)
    np.testing.assert_array_equal(found.overlap, (study.astype(int) @ sets.T.astype(int)))
    assert np.isfinite(found.log2_odds).all()


def test_tails_of_large_tables_are_those_of_scipy():
    rng = np.random.default_rng(0)
    study = rng.random((3, 13_000)) < [[0.001], [0.05], [0.6]]
    sets = rng.random((5, 13_000)) < [[0.001], [0.01], [0.01], [0.04], [0.9]]
    sets[1] &= study[1]
    found = enriched(study, sets)
    n = [np.broadcast_to(part, found.overlap.shape) for part in (sets.sum(axis=1), study.sum(axis=1)[:, None])]
    # Logarithms of factorials near 13,000! have ten digits after the point.
    np.testing.assert_allclose(found.pval, stats.hypergeom.sf(found.overlap - 1, 13_000, *n), rtol=1e-9)


def scores(n_features, n_genes, *, seed, levels=None):
    """Scores (features, genes), rounded to few levels for ties."""
    drawn = np.random.default_rng(seed).normal(size=(n_features, n_genes))
    return drawn if levels is None else np.round(drawn * levels)


def ranked(score, sets, **kwargs):
    return rank_sets(score, sparse.csr_matrix(sets.astype(np.float64)), **kwargs)


@pytest.mark.parametrize("untested", [0.0, 0.3], ids=["all tested", "some not tested"])
@pytest.mark.parametrize("levels", [None, 1], ids=["distinct", "tied"])
def test_rank_test_is_that_of_scipy_on_the_tested_genes(levels, untested):
    score, sets = scores(6, N_GENES, seed=0, levels=levels), draw(8, 0.25, seed=1)
    score[np.random.default_rng(2).random(score.shape) < untested] = np.nan
    found = ranked(score, sets)
    for feature, place in np.ndindex(found.pval.shape):
        tested = np.isfinite(score[feature])
        one, rest = (score[feature, tested & side] for side in (sets[place], ~sets[place]))
        expected = stats.mannwhitneyu(one, rest, method="asymptotic")
        np.testing.assert_allclose(found.pval[feature, place], expected.pvalue, rtol=1e-12)
        np.testing.assert_allclose(found.auroc[feature, place], expected.statistic / (len(one) * len(rest)), rtol=1e-12)
        assert np.sign(found.z[feature, place]) in (0, np.sign(found.auroc[feature, place] - 0.5))
    np.testing.assert_allclose(found.pval, np.minimum(2 * stats.norm.sf(np.abs(found.z)), 1), rtol=1e-12)
    np.testing.assert_allclose(found.log_pval, np.log(found.pval), rtol=1e-10, atol=1e-14)


def test_logarithm_of_p_goes_on_where_p_ends():
    found = ranked(np.arange(8000.0)[None], np.arange(8000)[None] >= 4000)
    assert found.pval == 0
    np.testing.assert_allclose(found.log_pval, np.log(2) + stats.norm.logsf(found.z), rtol=1e-12)
    assert found.auroc == 1


@pytest.mark.parametrize(
    ("score", "sets"),
    [
        pytest.param(scores(1, N_GENES, seed=0), np.zeros((1, N_GENES), dtype=bool), id="no member"),
        pytest.param(scores(1, N_GENES, seed=0), np.ones((1, N_GENES), dtype=bool), id="all genes"),
        pytest.param(np.full((1, N_GENES), 2.0), draw(1, 0.3, seed=1), id="equal scores"),
        pytest.param(np.full((1, N_GENES), np.nan), draw(1, 0.3, seed=1), id="no gene tested"),
        pytest.param(np.where(draw(1, 0.3, seed=1), np.nan, 1.0), draw(1, 0.3, seed=1), id="no member tested"),
        pytest.param(np.where(np.arange(N_GENES) == 3, 1.0, np.nan)[None], draw(1, 0.3, seed=1), id="one gene tested"),
    ],
)
def test_set_that_cannot_differ_is_not_tested(score, sets):
    found = ranked(score, sets)
    assert (found.z, found.auroc) == (0, 0.5)
    assert np.isnan([found.pval, found.log_pval]).all()


def correlated(n, correlation, *, n_genes=300, seed=0):
    """Values (n, genes): the first 30 genes share a factor, the others are independent."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n_genes))
    x[:, :30] *= np.sqrt(1 - correlation)
    x[:, :30] += np.sqrt(correlation) * rng.normal(size=(n, 1))
    return x


FIRST_30 = np.arange(300)[None] < 30


@pytest.mark.parametrize("correlation", [0.0, 0.05, 0.4, 1.0])
def test_z_has_unit_variance_under_the_correlation_it_is_told(correlation):
    score = correlated(20_000, correlation)
    # Members that are one and the same value would be ties, which the normal scores of the formula do not have.
    score[:, :30] += 1e-9 * np.arange(30)
    found = ranked(score, FIRST_30, inflation=np.array([1 + 29 * correlation]))
    np.testing.assert_allclose(found.z.std(), 1, atol=0.03)
    assert abs(found.z.mean()) < 0.03


def test_inflation_of_one_changes_nothing():
    score, sets = scores(6, N_GENES, seed=0, levels=1), draw(8, 0.25, seed=1)
    np.testing.assert_array_equal(ranked(score, sets, inflation=np.ones(8)).pval, ranked(score, sets).pval)


@pytest.mark.parametrize(
    ("inflation", "message"),
    [
        pytest.param(np.ones(3), r"shape \(3,\), but there are 2 sets", id="number"),
        pytest.param(np.array([1.0, 0.5]), "0.5 of set 1 is not between 1 and its 30 genes", id="below 1"),
        pytest.param(np.array([1.0, 31.0]), "31.0 of set 1 is not between 1 and its 30 genes", id="above the size"),
        pytest.param(np.array([np.nan, 1.0]), "nan of set 0", id="NaN"),
    ],
)
def test_inflation_must_fit_the_sets(inflation, message):
    with pytest.raises(ValueError, match=message):
        ranked(scores(1, 300, seed=0), np.repeat(FIRST_30, 2, axis=0), inflation=inflation)


def counts(*, seed=0):
    """Counts (cells, genes) with zeros, where the first genes go together and the next go against each other."""
    rng = np.random.default_rng(seed)
    program = rng.exponential(size=(N_CELLS, 1))
    rate = np.tile(rng.uniform(0.2, 2, N_GENES), (N_CELLS, 1))
    rate[:, :10] *= program
    rate[:, 10] *= program[:, 0] ** 2
    rate[:, 11] /= 1 + 3 * program[:, 0] ** 2
    return rng.poisson(rate).astype(np.float32)


def sets_of_counts():
    sets = draw(8, 0.25, seed=1)
    sets[0] = np.arange(N_GENES) < 10
    sets[1] = np.isin(np.arange(N_GENES), [10, 11])
    sets[2] = np.arange(N_GENES) == 5
    sets[3] = False
    return sets


def inflation_by_pairs(x, sets):
    """1 + (m − 1) times the mean of the correlations of all pairs, at least 1."""
    correlation = np.corrcoef(x, rowvar=False)
    expected = np.ones(len(sets))
    for place, members in enumerate(sets):
        m = members.sum()
        if m > 1:
            pairs = correlation[np.ix_(members, members)][np.triu_indices(m, 1)]
            expected[place] = max(1 + (m - 1) * pairs.mean(), 1)
    return expected


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_inflation_comes_from_the_mean_correlation_of_all_pairs(layout, monkeypatch):
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 37)
    x, sets = counts(), sets_of_counts()
    members = sparse.csr_matrix(sets.astype(np.float64))
    found = set_inflation(layout(x), members, x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64))
    expected = inflation_by_pairs(x.astype(np.float64), sets)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert found[0] > 3, "genes that go together"
    np.testing.assert_array_equal(found[1:4], 1)


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_inflation_within_groups_is_that_of_what_their_means_leave(layout, monkeypatch):
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 37)
    x, sets = counts().astype(np.float64), sets_of_counts()
    codes = np.random.default_rng(3).integers(0, 3, N_CELLS)
    x[codes == 1, :20] += 4
    mean = np.stack([x[codes == code].mean(axis=0) for code in range(3)])
    residual = x - mean[codes]
    members = sparse.csr_matrix(sets.astype(np.float64))
    found = set_inflation(layout(x), members, mean, np.sqrt((residual**2).mean(axis=0)), codes=codes)
    np.testing.assert_allclose(found, inflation_by_pairs(residual, sets), rtol=1e-10)


def test_inflation_of_a_constant_member_is_refused():
    x = counts()
    x[:, 4] = 1
    members = sparse.csr_matrix(sets_of_counts().astype(np.float64))
    with pytest.raises(ValueError, match="1 genes of the sets .* first at position 4"):
        set_inflation(x, members, x.mean(axis=0), x.std(axis=0))


def test_inflation_restores_the_level_for_random_labels_and_correlated_genes():
    """Cells split at random a thousand times: nothing is there to be found."""
    x = correlated(N_CELLS, 0.2, seed=4)
    labels = np.random.default_rng(5).random((1000, N_CELLS)) < 0.3
    score = np.stack([stats.ttest_ind(x[label], x[~label], equal_var=False).statistic for label in labels])
    members = sparse.csr_matrix(FIRST_30.astype(np.float64))
    inflation = set_inflation(x, members, x.mean(axis=0), x.std(axis=0))
    naive, corrected = (np.mean(rank_sets(score, members, value).pval < 0.05) for value in (None, inflation))
    assert naive > 0.3
    assert 0.03 < corrected < 0.07
