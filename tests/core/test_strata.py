from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from scipy import sparse, stats

from sae.core import moments, partitions
from sae.core import strata as module
from sae.core.differential import Differential, differential
from sae.core.groups import active_groups, percentile_groups
from sae.core.moments import scan
from sae.core.strata import by_donor, stratified

ARRAYS = ("features", "score", "log2fc", "pval", "log_pval", "padj", "either_way")
LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
METHODS = {"stratified": stratified, "by_donor": by_donor}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
GROUPS = {"active": active_groups, "percentile": lambda a: percentile_groups(a, 70)}
each_group = pytest.mark.parametrize("made", GROUPS.values(), ids=GROUPS)
N = 150


def expression(n=N, g=12, *, seed=0):
    """Log1p-like values (n, g) with zeros; the last gene has none."""
    rng = np.random.default_rng(seed)
    x = np.log1p(rng.poisson(2, size=(n, g)) * rng.uniform(0.5, 2, size=(n, 1)))
    x[:, -1] += 1
    return x


def rare_expression(n=N, g=12, *, seed=4):
    """Values (n, g) of genes that few to most cells have."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, g)) < np.linspace(0.05, 0.9, g), rng.uniform(0.5, 2, (n, g)), 0)


def activity(n=N, h=7, *, seed=1):
    """Activations (n, h) of features that are active in few to most cells."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((n, h)) < np.linspace(0.08, 0.92, h), rng.uniform(0.1, 1, size=(n, h)), 0)


def strata(n=N, b=7, *, seed=2):
    """Codes (n,) of b strata of very different sizes, mixed."""
    rng = np.random.default_rng(seed)
    return rng.permutation(np.r_[np.arange(b), rng.choice(b, n - b, p=np.arange(1, b + 1) / (b * (b + 1) / 2))])


def compared(
    method, a, x, codes, *, made=active_groups, log_base=np.e, pseudocount=0.1, min_cells=3, min_expected=0
) -> Differential:
    """All blocks as one; of genes however rare, unless asked otherwise."""
    options = {"log_base": log_base, "pseudocount": pseudocount, "min_cells": min_cells, "min_expected": min_expected}
    blocks = list(method(made(sparse.csr_matrix(a)), x, scan(x), codes, **options))
    found = Differential(**{name: np.concatenate([vars(block)[name] for block in blocks]) for name in ARRAYS})
    return Differential(**{**vars(found), "imprecise": sum(block.imprecise for block in blocks)})


def cells(a, feature, percentile=None):
    """Positive and reference cells."""
    threshold = 0 if percentile is None else np.percentile(a[:, feature], percentile)
    return a[:, feature] > threshold, a[:, feature] == 0


def plain_stratified(x, positive, reference, codes):
    """t, degrees of freedom and weighted means of one gene, stratum by stratum from the formula."""
    means1, means0, weights, squares1, squares0, n1s, n0s = [], [], [], [], [], [], []
    for stratum in np.unique(codes):
        one, rest = (x[group & (codes == stratum)] for group in (positive, reference))
        if len(one) < 2 or len(rest) < 2:
            continue
        means1.append(one.mean())
        means0.append(rest.mean())
        weights.append(len(one) * len(rest) / (len(one) + len(rest)))
        squares1.append(one.var(ddof=1) / len(one))
        squares0.append(rest.var(ddof=1) / len(rest))
        n1s.append(len(one))
        n0s.append(len(rest))
    w = np.array(weights)
    difference = sum(w * (np.array(means1) - means0)) / sum(w)
    terms1, terms0 = w**2 * squares1 / sum(w) ** 2, w**2 * squares0 / sum(w) ** 2
    variance = sum(terms1) + sum(terms0)
    df = variance**2 / (sum(terms1**2 / (np.array(n1s) - 1)) + sum(terms0**2 / (np.array(n0s) - 1)))
    return difference / np.sqrt(variance), df, np.average(means1, weights=w), np.average(means0, weights=w)


def donor_differences(x, positive, reference, codes):
    """Means of each donor (donors,) that has enough cells."""
    means = []
    for donor in np.unique(codes):
        one, rest = (x[group & (codes == donor)] for group in (positive, reference))
        if len(one) >= 3 and len(rest) >= 3:
            means.append((one.mean(), rest.mean()))
    return np.array(means).T


@each_layout
@pytest.mark.parametrize("percentile", [None, 70])
def test_stratified_is_the_formula(layout, percentile):
    a, x, codes = activity(), expression(), strata()
    found = compared(stratified, a, layout(x), codes, made=GROUPS["percentile" if percentile else "active"])
    np.testing.assert_array_equal(found.features, np.arange(7))
    for row, feature in enumerate(found.features):
        positive, reference = cells(a, feature, percentile)
        for gene in range(x.shape[1]):
            t, df, mean1, mean0 = plain_stratified(x[:, gene], positive, reference, codes)
            np.testing.assert_allclose(found.score[row, gene], t, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found.pval[row, gene], 2 * stats.t.sf(abs(t), df), rtol=1e-8)
            np.testing.assert_allclose(found.log_pval[row, gene], np.log(found.pval[row, gene]), rtol=1e-8)
            fold_change = np.log2((np.expm1(mean1) + 0.1) / (np.expm1(mean0) + 0.1))
            np.testing.assert_allclose(found.log2fc[row, gene], fold_change, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.padj, stats.false_discovery_control(found.pval, axis=1), rtol=1e-12)


def test_there_are_strata_to_leave_out():
    """Else the test above would not see whether they are."""
    active, codes = activity() > 0, strata()
    for group in (active, ~active):
        assert 1 in np.array([group[codes == stratum].sum(axis=0) for stratum in range(7)])


@each_layout
@each_group
@pytest.mark.parametrize(("values", "min_expected"), [(expression, 0), (rare_expression, 20)])
def test_a_lone_stratum_is_welch(layout, made, values, min_expected):
    a, x = activity(), layout(values())
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3, "min_expected": min_expected}
    [expected] = differential(made(sparse.csr_matrix(a)), x, scan(x), **options)
    assert np.isnan(expected.pval).any() == (min_expected > 0)
    found = compared(stratified, a, x, np.zeros(N, dtype=np.int64), made=made, min_expected=min_expected)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(found)[name], vars(expected)[name], err_msg=name)


@each_layout
@pytest.mark.parametrize("percentile", [None, 70])
def test_by_donor_is_a_t_test_of_the_differences(layout, percentile):
    a, x, codes = activity(), expression(), strata(b=6)
    found = compared(by_donor, a, layout(x), codes, made=GROUPS["percentile" if percentile else "active"])
    tested = 0
    for row, feature in enumerate(found.features):
        for gene in range(x.shape[1]):
            means = donor_differences(x[:, gene], *cells(a, feature, percentile), codes)
            if means.size == 0 or means.shape[1] < 3:
                assert np.isnan(found.pval[row, gene]) and found.score[row, gene] == 0
                continue
            tested += 1
            expected = stats.ttest_1samp(means[0] - means[1], 0)
            np.testing.assert_allclose(found.score[row, gene], expected.statistic, rtol=1e-9)
            np.testing.assert_allclose(found.pval[row, gene], expected.pvalue, rtol=1e-8)
            one, rest = np.expm1(means.mean(axis=1))
            np.testing.assert_allclose(found.log2fc[row, gene], np.log2((one + 0.1) / (rest + 0.1)), rtol=1e-9)
    assert 0 < tested < found.pval.size


def expected_cells(x, one, rest, codes, method):
    """Of one gene: of those in the positive group and in the reference, what the other group lets expect."""
    means, noises = [], []
    for stratum in np.unique(codes):
        parts = [x[group & (codes == stratum)] for group in (one, rest)]
        sizes = [len(part) for part in parts]
        if min(sizes) >= (2 if method is stratified else 3):
            weight = sizes[0] * sizes[1] / sum(sizes) if method is stratified else 1
            means.append([weight, *(weight * part.mean() for part in parts)])
            squares = [part.var(ddof=1) / size for part, size in zip(parts, sizes[::-1], strict=True)]
            noises.append([weight**2 * square for square in squares])
    total, mean1, mean0 = np.sum(means, axis=0)
    noise1, noise0 = np.sum(noises, axis=0) / total**2
    return [(mean / total) ** 2 / noise if mean > 0 else 0 for mean, noise in ((mean0, noise0), (mean1, noise1))]


@each_method
@each_layout
def test_genes_too_rare_for_the_group_that_has_less_are_not_tested(method, layout):
    a, codes = activity(n=400), strata(n=400, b=4)
    x = rare_expression(n=400, g=30)
    every, found = (compared(method, a, layout(x), codes, min_expected=least) for least in (0, 15))
    both = np.zeros(found.pval.shape, dtype=bool)
    for row, feature in enumerate(found.features):
        for gene in range(30):
            in_one, in_rest = expected_cells(x[:, gene], *cells(a, feature), codes, method)
            less = in_rest if every.score[row, gene] > 0 else in_one
            assert np.isfinite(found.pval[row, gene]) == (less >= 15), (feature, gene)
            both[row, gene] = min(in_one, in_rest) >= 15
    tested = np.isfinite(found.pval)
    np.testing.assert_array_equal(found.either_way, both)
    assert (both & tested == both).all() and both.sum() < tested.sum() < tested.size
    for name in ("score", "pval", "log_pval"):
        np.testing.assert_array_equal(vars(found)[name][tested], vars(every)[name][tested])
    assert (found.score[~tested] == 0).all()
    np.testing.assert_array_equal(found.log2fc, every.log2fc)
    centred = x - x.mean(axis=0)
    assert np.isfinite(compared(method, a, layout(centred), codes, min_expected=15, log_base=None).pval).all()


def test_a_difference_between_batches_alone_is_not_seen():
    """A gene and a feature that follow the batch, and nothing else, are related only where batches are mixed."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 500)
    a = (rng.random((1000, 1)) < np.array([0.1, 0.6])[codes][:, None]) * 1.0
    x = rng.normal(size=(1000, 200)) + 2 + codes[:, None]
    [mixed] = differential(
        active_groups(sparse.csr_matrix(a)), x, scan(x), log_base=None, pseudocount=1, min_cells=3, min_expected=0
    )
    within = compared(stratified, a, x, codes, log_base=None, pseudocount=1)
    assert (mixed.pval < 1e-6).all()
    assert 0.01 < (within.pval < 0.05).mean() < 0.1


def test_one_big_donor_does_not_make_the_p_value():
    """All of the effect is in one of three donors, who has nearly all cells."""
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [5000, 40, 40])
    a = (rng.random((5080, 1)) < 0.4) * 1.0
    x = rng.normal(size=(5080, 50)) + 5 + a * (codes[:, None] == 0)
    [plain] = differential(
        active_groups(sparse.csr_matrix(a)), x, scan(x), log_base=None, pseudocount=1, min_cells=3, min_expected=0
    )
    found = compared(by_donor, a, x, codes, log_base=None, pseudocount=1)
    assert (plain.pval < 1e-100).all()
    assert (found.pval > 0.01).all()
    assert (found.pval > 0.05).mean() > 0.9


def test_p_of_donors_with_effects_of_their_own_is_uniform():
    """Every donor differs between active and inactive cells in a way of its own, with mean zero."""
    rng = np.random.default_rng(1)
    n_donors, n_each, g = 6, 60, 4000
    codes = np.repeat(np.arange(n_donors), n_each)
    a = (rng.random((n_donors * n_each, 1)) < 0.4) * 1.0
    own = rng.normal(size=(n_donors, g))
    x = rng.normal(size=(len(a), g)) + 10 + a * own[codes]
    [cell] = differential(
        active_groups(sparse.csr_matrix(a)), x, scan(x), log_base=None, pseudocount=1, min_cells=3, min_expected=0
    )
    within = compared(stratified, a, x, codes, log_base=None, pseudocount=1)
    found = compared(by_donor, a, x, codes, log_base=None, pseudocount=1)
    assert (cell.pval < 0.05).mean() > 0.3
    assert (within.pval < 0.05).mean() > 0.3
    assert stats.binomtest(int((found.pval < 0.05).sum()), g, 0.05).pvalue > 0.001
    assert stats.kstest(found.pval.ravel(), "uniform").pvalue > 0.001


@each_method
@each_layout
def test_chunks_blocks_and_threads_do_not_matter(method, layout, monkeypatch):
    a, x, codes = activity(), layout(expression(g=300)), strata(b=4)
    at_once = compared(method, a, x, codes)
    monkeypatch.setattr(module, "available_threads", lambda: 3)
    monkeypatch.setattr(partitions, "available_threads", lambda: 3)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(compared(method, a, x, codes))[name], vars(at_once)[name], err_msg=name)
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 300)
    monkeypatch.setattr(module, "HELD_VALUES", 4 * 300)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 7)
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3, "min_expected": 0}
    blocks = list(method(active_groups(sparse.csr_matrix(a)), x, scan(x), codes, **options))
    assert [block.features.tolist() for block in blocks] == [[0, 1], [2, 3], [4, 5], [6]]
    for name in ARRAYS:
        found = np.concatenate([vars(block)[name] for block in blocks])
        np.testing.assert_allclose(found, vars(at_once)[name], rtol=1e-9, atol=1e-12, err_msg=name)


@each_method
def test_order_of_cells_does_not_matter(method):
    a, x, codes = activity(), expression(), strata(b=4)
    order = np.argsort(codes, kind="stable")
    found, expected = compared(method, a[order], x[order], codes[order]), compared(method, a, x, codes)
    for name in ARRAYS:
        np.testing.assert_allclose(vars(found)[name], vars(expected)[name], rtol=1e-9, atol=1e-12, err_msg=name)


@each_method
@each_layout
@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_constant_gene_is_not_tested_and_not_counted(method, layout, value):
    a, x, codes = activity(), expression(), strata(b=4)
    alone = compared(method, a, layout(x), codes)
    found = compared(method, a, layout(np.insert(x, 4, value, axis=1)), codes)
    assert (found.score[:, 4] == 0).all()
    assert np.isnan(found.pval[:, 4]).all() and np.isnan(found.padj[:, 4]).all()
    np.testing.assert_allclose(found.log2fc[:, 4], 0, atol=1e-9)
    np.testing.assert_allclose(np.delete(found.padj, 4, axis=1), alone.padj, rtol=1e-9)


@each_method
@each_layout
def test_gene_that_differs_between_strata_alone_is_not_tested(method, layout):
    """Means of one and the same value, over different numbers of cells, must not differ."""
    a, x, codes = activity(), expression(), strata(b=3)
    x[:, 5] = np.array([0.1, 0.3, 0.7])[codes]
    found = compared(method, a, layout(x), codes)
    tested = np.isfinite(found.pval[:, 0])
    assert tested.any()
    assert (found.score[:, 5] == 0).all()
    assert np.isnan(found.pval[:, 5]).all()
    assert not found.either_way[:, 5].any()


@each_method
@each_layout
def test_genes_of_the_cells_that_are_left_out_are_not_tested(method, layout):
    """Those that neither the positive nor the reference cells have."""
    a, x, codes = activity(), expression(g=60), strata(b=3)
    groups = GROUPS["percentile"](sparse.csr_matrix(a))
    left_out = (groups.active() != groups.positive()).toarray()[:, 4]
    x[:, :50] = np.where(left_out[:, None], x[:, :50], 0)
    assert x[:, :50].any(axis=0).all()
    found = compared(method, a, layout(x), codes, made=GROUPS["percentile"])
    assert np.isnan(found.pval[4, :50]).all() and (found.score[4, :50] == 0).all()
    assert np.isfinite(found.pval[4, 50:]).all()


@each_method
@each_layout
def test_gene_that_only_the_feature_explains_is_certain(method, layout):
    a, codes = activity(h=1, seed=3), strata(b=3)
    a[:, 0] = np.random.default_rng(0).random(N) < 0.5
    x = np.hstack([np.where(a > 0, 0.1, 0), np.where(a > 0, 0.1, 0.3)])
    found = compared(method, a, layout(x), codes)
    np.testing.assert_array_equal(found.score, [[np.inf, -np.inf]])
    np.testing.assert_array_equal(found.pval, [[0, 0]])


@each_method
def test_feature_without_enough_strata_is_not_tested(method):
    """Active in all cells of a stratum or in none."""
    codes = np.repeat([0, 1, 2, 3], 20)
    a = np.column_stack([codes >= 2, np.arange(80) % 2]).astype(float)
    found = compared(method, a, expression(n=80), codes)
    np.testing.assert_array_equal(found.features, [0, 1])
    assert np.isnan(found.pval[0]).all() and (found.score[0] == 0).all() and np.isnan(found.log2fc[0]).all()
    assert np.isfinite(found.pval[1]).all() and np.isfinite(found.log2fc[1]).all()


@pytest.mark.parametrize(("n_donors", "tested"), [(2, False), (3, True)])
def test_three_donors_are_needed(n_donors, tested):
    codes = np.repeat(np.arange(n_donors), 20)
    a = (np.arange(len(codes)) % 2)[:, None].astype(float)
    assert np.isfinite(compared(by_donor, a, expression(n=len(codes)), codes).pval).all() == tested


@pytest.mark.parametrize(("n_active", "tested"), [(2, False), (3, True)])
@pytest.mark.parametrize("inverted", [False, True])
def test_three_cells_of_a_donor_are_needed(n_active, tested, inverted):
    codes = np.repeat(np.arange(3), 20)
    a = (np.arange(60) % 20 < np.repeat([10, 10, n_active], 20)).astype(float)
    a = (1 - a if inverted else a)[:, None]
    assert np.isfinite(compared(by_donor, a, expression(n=60), codes).pval).all() == tested


@each_method
def test_too_rare_and_too_common_features_are_left_out(method):
    n_active = [0, 2, 3, 76, 77, 78, 80]
    a = (np.random.default_rng(0).permutation(80)[:, None] < n_active).astype(float)
    found = compared(method, a, expression(n=80), np.zeros(80, dtype=np.int64), min_cells=3)
    np.testing.assert_array_equal(found.features, [2, 3, 4])


@each_method
def test_no_features_left(method):
    a, x = sparse.csr_matrix((60, 4)), expression(n=60)
    options = {"log_base": None, "pseudocount": 1, "min_cells": 3}
    assert list(method(active_groups(a), x, scan(x), strata(60), **options)) == []


@each_method
def test_spread_within_a_group_that_is_lost_is_counted(method, monkeypatch):
    """In both groups, in every stratum that counts and for all blocks of features."""
    a, x, codes = activity(), expression(), strata()
    assert compared(method, a, x, codes).imprecise == 0
    x[:, 5] = 1e6 + np.random.default_rng(0).standard_normal(N)
    least = 2 if method is stratified else 3
    n_cells = [((a[codes == b] > 0).sum(axis=0), (a[codes == b] == 0).sum(axis=0)) for b in range(7)]
    n_pairs = sum(int((np.minimum(*pair) >= least).sum()) for pair in n_cells)
    monkeypatch.setattr(module, "BLOCK_VALUES", 2 * 12)
    assert compared(method, a, x, codes, log_base=None).imprecise == 2 * n_pairs
    x[:, 5] = np.where(a[:, 3] > 0, x[:, 5], 0)
    one_sided = compared(method, a, sparse.csr_matrix(x), codes, log_base=None).imprecise
    assert sum(int(min(one[3], rest[3]) >= least) for one, rest in n_cells) <= one_sided < n_pairs


@each_method
def test_memory_map(method, tmp_path):
    a, x, codes = activity(), expression(), strata(b=4)
    np.save(tmp_path / "x.npy", x)
    found = compared(method, a, np.load(tmp_path / "x.npy", mmap_mode="r"), codes)
    for name in ARRAYS:
        np.testing.assert_array_equal(vars(found)[name], vars(compared(method, a, x, codes))[name], err_msg=name)


@each_method
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"pseudocount": 0}, "pseudocount=0 must be positive"),
        ({"min_cells": 1}, "min_cells=1 is below 2"),
        ({"min_expected": -1}, "min_expected=-1 is not a number of cells"),
        ({"min_expected": np.nan}, "min_expected=nan is not a number of cells"),
    ],
)
def test_bad_limits(method, limits, message):
    with pytest.raises(ValueError, match=message):
        compared(method, activity(), expression(), strata(), **limits)


shapes = st.tuples(st.integers(8, 30), st.integers(1, 5))


@given(x=st_np.arrays(np.float64, shapes, elements=st.integers(0, 8).map(lambda i: i / 4)), data=st.data())
def test_degenerate_input_agrees_with_the_formulas(x, data):
    """Ties, constant genes, strata with hardly a cell."""
    n = len(x)
    active = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    codes = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    codes[:4] = range(4)
    a = sparse.csr_matrix(active[:, None].astype(float))
    options = {"log_base": None, "pseudocount": 1, "min_cells": 2, "min_expected": 0}
    for layout in LAYOUTS.values():
        for method in METHODS.values():
            for found in method(active_groups(a), layout(x), scan(layout(x)), codes, **options):
                for gene in range(x.shape[1]):
                    check(method, found, gene, x[:, gene], active, codes)


def check(method, found, gene, x, active, codes):
    """Compare one gene with the formulas, where these are defined."""
    score, pval = found.score[0, gene], found.pval[0, gene]
    sizes = [(sum(active & (codes == b)), sum(~active & (codes == b))) for b in range(4)]
    if method is stratified:
        counts = any(min(pair) >= 2 for pair in sizes)
    else:
        counts = sum(min(pair) >= 3 for pair in sizes) >= 3
    if not counts:
        assert np.isnan(pval) and score == 0
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        if method is stratified:
            t, df, mean1, mean0 = plain_stratified(x, active, ~active, codes)
            difference, spread = mean1 - mean0, df == df
        else:
            differences = np.subtract(*donor_differences(x, active, ~active, codes))
            difference, spread, df = differences.mean(), differences.std() > 1e-9, len(differences) - 1
            t = difference / differences.std(ddof=1) * np.sqrt(len(differences))
    if spread:
        np.testing.assert_allclose(score, t, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(pval, 2 * stats.t.sf(abs(t), df), rtol=1e-6)
    elif abs(difference) < 1e-9:
        assert np.isnan(pval) and score == 0
    else:
        assert (score, pval) == (np.sign(difference) * np.inf, 0)
