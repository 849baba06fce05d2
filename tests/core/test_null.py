from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.null import empirical_fdr, matched_sets, permuted_cells, random_cells, strength_bins

N_GENES, N_BINS = 200, 8


def gene_sets(n=12, *, seed=0):
    rng = np.random.default_rng(seed)
    sets = rng.random((n, N_GENES)) < rng.uniform(0.02, 0.5, size=(n, 1))
    sets[0] = False
    sets[1] = True
    return sparse.csr_matrix(sets.astype(np.float64))


def strength(*, seed=1):
    return np.random.default_rng(seed).exponential(size=N_GENES)


def matched(n_null=5, **kwargs):
    return list(matched_sets(gene_sets(), strength(), n_null, **{"rng": 0, "n_bins": N_BINS} | kwargs))


def test_bins_are_quantiles_of_strength():
    bins = strength_bins(strength(), N_BINS)
    np.testing.assert_array_equal(np.bincount(bins), N_GENES // N_BINS)
    assert (np.diff(bins[np.argsort(strength())]) >= 0).all()


def test_bins_of_genes_that_do_not_divide_evenly_differ_by_one():
    assert set(np.bincount(strength_bins(strength()[:99], N_BINS))) == {12, 13}


def test_random_sets_have_as_many_genes_of_each_bin_as_the_real_ones():
    in_bin = np.eye(N_BINS)[strength_bins(strength(), N_BINS)]
    real = gene_sets()
    for drawn in matched():
        assert drawn.has_canonical_format
        assert sparse.csr_matrix((drawn.data, drawn.indices, drawn.indptr), shape=drawn.shape).has_canonical_format
        np.testing.assert_array_equal(drawn.getnnz(axis=1), real.getnnz(axis=1))
        assert drawn.toarray().max() == 1, "a gene twice in a set"
        np.testing.assert_array_equal(drawn @ in_bin, real @ in_bin)


def test_random_sets_share_as_many_genes_with_each_other_as_the_real_ones():
    real = gene_sets()
    for drawn in matched():
        np.testing.assert_array_equal((drawn @ drawn.T).toarray(), (real @ real.T).toarray())


def test_real_sets_are_left_as_they_are():
    real, before = gene_sets(), gene_sets()
    list(matched_sets(real, strength(), 2, n_bins=N_BINS))
    assert (real != before).nnz == 0


def test_every_gene_of_a_bin_is_drawn_equally_often():
    bins = strength_bins(strength(), N_BINS)
    real = sparse.csr_matrix(((bins == 3) & (np.cumsum(bins == 3) <= 5)).astype(np.float64)[None])
    times = sum(drawn.toarray()[0] for drawn in matched_sets(real, strength(), 2000, n_bins=N_BINS))
    assert times[bins != 3].sum() == 0
    assert stats.chisquare(times[bins == 3]).pvalue > 1e-3


def test_random_sets_depend_on_the_seed_alone():
    one, again, other = matched(), matched(rng=np.random.default_rng(0)), matched(rng=1)
    assert all((a != b).nnz == 0 for a, b in zip(one, again, strict=True))
    assert (one[0] != other[0]).nnz > 0
    assert (one[0] != one[1]).nnz > 0


@pytest.mark.parametrize(
    ("values", "n_bins", "message"),
    [
        pytest.param(strength(), 0, "n_bins=0 must be from 1 to 100", id="none"),
        pytest.param(strength(), 101, "n_bins=101 must be from 1 to 100", id="more than pairs of genes"),
        pytest.param(np.where(np.arange(N_GENES) < 2, np.nan, 1), 8, "2 of 200 genes have no strength", id="NaN"),
    ],
)
def test_bins_that_cannot_be_are_refused(values, n_bins, message):
    with pytest.raises(ValueError, match=message):
        strength_bins(values, n_bins)


def activations(n=300, h=6, *, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(np.where(rng.random((n, h)) < 0.3, rng.exponential(size=(n, h)), 0))


def test_random_cells_are_those_whose_activations_are_taken():
    a, codes = activations(), np.arange(300) % 3
    order = random_cells(300, codes, 5)
    np.testing.assert_array_equal(np.sort(order), np.arange(300))
    np.testing.assert_array_equal(codes[order], codes)
    assert (permuted_cells(a, codes, 5) != a[order]).nnz == 0


def sorted_rows(a):
    return a[np.lexsort(a.T)]


@pytest.mark.parametrize("batches", [None, 1, 4], ids=["no batch", "one batch", "four batches"])
def test_cells_exchange_whole_rows_within_their_batch(batches):
    a = activations()
    codes = None if batches is None else np.random.default_rng(1).integers(0, batches, a.shape[0])
    found = permuted_cells(a, codes).toarray()
    for code in range(batches or 1):
        members = slice(None) if codes is None else codes == code
        np.testing.assert_array_equal(sorted_rows(found[members]), sorted_rows(a.toarray()[members]))
        assert (found[members] != a.toarray()[members]).any()


def test_each_cell_of_a_batch_goes_to_every_place_equally_often():
    codes = np.array([0, 1, 0, 1, 0, 0])
    a = sparse.csr_matrix(np.diag(np.arange(1.0, 7)))
    rng = np.random.default_rng(0)
    times = sum((permuted_cells(a, codes, rng).toarray() > 0).astype(int) for _ in range(2000))
    same = codes[:, None] == codes
    assert times[~same].sum() == 0
    expected = np.where(codes == 0, 2000 / 4, 2000 / 2)[:, None] * same
    assert stats.chisquare(times[same], expected[same]).pvalue > 1e-3


def test_permutation_depends_on_the_seed_alone():
    one, again, other = (permuted_cells(activations(), rng=seed) for seed in (0, np.random.default_rng(0), 1))
    assert (one != again).nnz == 0
    assert (one != other).nnz > 0


def test_codes_must_fit_the_cells():
    with pytest.raises(ValueError, match=r"shape \(3,\), but there are 300 cells"):
        permuted_cells(activations(), np.zeros(3))


def fdr_by_loop(real, null):
    """The formula, one threshold at a time."""
    rate = {t: (1 + np.sum(null >= t)) / len(null) / np.sum(real >= t) for t in real}
    return np.array([min(1, *(value for t, value in rate.items() if t <= score)) for score in real])


@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "tied"])
def test_false_discovery_rate_is_that_of_the_formula(levels):
    rng = np.random.default_rng(0)
    real, null = rng.normal(size=60), rng.normal(size=(4, 60))
    real[:30] += 2
    if levels is not None:
        real, null = np.round(real * levels), np.round(null * levels)
    found = empirical_fdr(real, real, null.ravel(), 4)
    np.testing.assert_allclose(found, fdr_by_loop(real, null), rtol=1e-12)
    assert (np.diff(found[np.argsort(real)]) <= 0).all()
    assert 0 < found.min() < 0.3 < found.max() <= 1
    some = np.array([[real[3], real[40]], [real.min() - 1, real.max() + 1]])
    np.testing.assert_array_equal(empirical_fdr(some, real, null.ravel(), 4)[0], found[[3, 40]])
    np.testing.assert_array_equal(empirical_fdr(some, real, null.ravel(), 4)[1], [1, found.min()])


def test_false_discovery_rate_holds():
    """Of 2,000 scores 200 have an effect: among those at q ≤ 0.2, about a fifth at most must have none."""
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(20):
        real, null = rng.normal(size=2000), rng.normal(size=(10, 2000))
        real[:200] += 3
        found = np.flatnonzero(empirical_fdr(real, real, null.ravel(), 10) <= 0.2)
        assert len(found) > 100
        shares.append(np.mean(found >= 200))
    assert 0.1 < np.mean(shares) < 0.2


def test_a_few_scores_above_all_of_the_null_are_not_certain():
    """With one replicate and no effect, the best score of all is the null's in half of all cases."""
    rng = np.random.default_rng(2)
    real, null = rng.normal(size=(2, 400, 50))
    found = [empirical_fdr(one, one, other, 1).min() <= 0.05 for one, other in zip(real, null, strict=True)]
    assert np.mean(found) <= 0.01


def test_nothing_found_has_no_rate_below_one():
    np.testing.assert_array_equal(empirical_fdr(np.zeros(3), np.empty(0), np.zeros(2), 1), np.ones(3))


def test_no_replicate_is_an_error():
    with pytest.raises(ValueError, match="n_null=0 replicates give no rate"):
        empirical_fdr(np.zeros(3), np.zeros(3), np.zeros(0), 0)
