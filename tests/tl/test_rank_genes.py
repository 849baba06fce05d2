from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse, stats

import sae
from sae.core import moments

COLUMNS = {
    "feature": "category",
    "gene": "category",
    "score": "float64",
    "log2fc": "float64",
    "pval": "float64",
    "padj": "float64",
}


def of(table, feature):
    table = table[table["feature"] == feature]
    return table.set_index(table["gene"].astype(str)).drop(columns=["feature", "gene"])


def dense(x):
    return x.toarray() if hasattr(x, "toarray") else np.asarray(x)


def expected(x, active, genes, *, mean=np.expm1, pseudocount=0.1):
    """Welch's test of SciPy and the fold change of the docstring, for one feature."""
    x = dense(x).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        test = stats.ttest_ind(x[active], x[~active], equal_var=False)
    m1, m0 = mean(x[active].mean(axis=0)), mean(x[~active].mean(axis=0))
    return pd.DataFrame(
        {
            "score": test.statistic,
            "log2fc": np.log2((m1 + pseudocount) / (m0 + pseudocount)),
            "pval": test.pvalue,
            "padj": stats.false_discovery_control(test.pvalue),
        },
        index=genes,
    )


def test_writes_the_table_and_nothing_else(encoded, compare):
    before = compare.state(encoded)
    assert sae.tl.rank_genes(encoded) is None
    table = encoded.uns["sae"].pop("genes")
    assert set(encoded.uns["sae"]["features"].pop("genes_status")) == {"tested"}
    compare.assert_same(before, compare.state(encoded))
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert list(table) == list(COLUMNS)
    assert table.index.tolist() == [str(i) for i in range(len(table))]
    assert set(table["feature"]) == set(sae.get.features(encoded).index)


@pytest.mark.parametrize("feature", [0, 7, 31])
def test_agrees_with_scipy(encoded, feature):
    sae.tl.rank_genes(encoded, min_expected=0, n_genes=None)
    table = of(encoded.uns["sae"]["genes"], f"sae_{feature}")
    active = encoded.obsm["sae"][:, [feature]].toarray().ravel() > 0
    oracle = expected(encoded.X, active, encoded.var_names)
    assert sorted(table.index) == sorted(encoded.var_names)
    for name in oracle:
        np.testing.assert_allclose(table[name], oracle.loc[table.index, name], rtol=1e-6, atol=1e-300, err_msg=name)


@pytest.mark.parametrize("feature", [0, 7, 31])
def test_wilcoxon_agrees_with_scipy(encoded, feature):
    sae.tl.rank_genes(encoded, method="welch", min_expected=0, n_genes=None)
    fold_changes = of(encoded.uns["sae"]["genes"], f"sae_{feature}")["log2fc"]
    sae.tl.rank_genes(encoded, method="wilcoxon", n_genes=None)
    by_default = of(encoded.uns["sae"]["genes"], f"sae_{feature}")["pval"]
    sae.tl.rank_genes(encoded, method="wilcoxon", min_expected=0, n_genes=None)
    table = of(encoded.uns["sae"]["genes"], f"sae_{feature}")
    active = encoded.obsm["sae"][:, [feature]].toarray().ravel() > 0
    x = dense(encoded[:, table.index].X).astype(np.float64)
    test = stats.mannwhitneyu(x[active], x[~active], method="asymptotic")
    np.testing.assert_allclose(table["pval"], test.pvalue, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(table["padj"], stats.false_discovery_control(test.pvalue), rtol=1e-9, atol=1e-300)
    higher = np.sign(test.statistic - active.sum() * (~active).sum() / 2)
    assert (np.sign(table["score"]) * higher >= 0).all()
    pd.testing.assert_series_equal(table["log2fc"], fold_changes[table.index])
    n_expected = (x > 0).mean(axis=0) * min(active.sum(), (~active).sum())
    ratio = by_default[table.index].to_numpy() / table["pval"].to_numpy()
    assert (ratio >= 1).all()
    assert (ratio[n_expected < 30] > 1).any()
    assert (ratio[n_expected >= 30] == 1).all()


@pytest.mark.parametrize("how", [{}, {"batch": "plate"}, {"percentile": 90}], ids=str)
def test_genes_too_rare_for_the_group_that_has_less_are_left_out(encoded, how):
    encoded.obs["plate"] = "all"
    tables = {}
    for least in (0, 30, 100):
        sae.tl.rank_genes(encoded, n_genes=None, **how, **({} if least == 30 else {"min_expected": least}))
        tables[least] = of(encoded.uns["sae"]["genes"], "sae_7")
    a, x = encoded.obsm["sae"][:, [7]].toarray().ravel(), dense(encoded.X).astype(np.float64)
    one, rest = x[a > np.percentile(a, how.get("percentile", 0))], x[a == 0]
    raised = one.mean(axis=0) > rest.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        in_one, in_rest = (
            len(group) * others.mean(axis=0) ** 2 / others.var(axis=0, ddof=1)
            for group, others in ((one, rest), (rest, one))
        )
    expected = np.where(raised, in_rest, in_one)
    for least, table in tables.items():
        if least:
            assert set(table.index) == set(encoded.var_names[expected >= least])
            assert 0 < len(table) < len(tables[0])
            pd.testing.assert_series_equal(table["pval"], tables[0].loc[table.index, "pval"])


@pytest.mark.parametrize("method", ["wilcoxon", "regression"])
def test_other_tests_leave_no_gene_out(encoded, method):
    tables = []
    for least in (0, 100):
        sae.tl.rank_genes(encoded, method=method, n_genes=None, min_expected=least)
        tables.append(encoded.uns["sae"]["genes"].set_index(["feature", "gene"]).sort_index())
    pd.testing.assert_index_equal(tables[0].index, tables[1].index)
    assert set(tables[0].index.get_level_values("gene")) == set(encoded.var_names)
    assert tables[0].equals(tables[1]) == (method == "regression")


@pytest.mark.parametrize("feature", [0, 7])
def test_percentile_compares_the_strongest_cells_with_those_at_zero(encoded, feature):
    sae.tl.rank_genes(encoded, percentile=90, min_expected=0, n_genes=None)
    table = of(encoded.uns["sae"]["genes"], f"sae_{feature}")
    a = encoded.obsm["sae"][:, [feature]].toarray().ravel()
    strongest, zero = a > np.percentile(a, 90), a == 0
    assert 0 < strongest.sum() < (a > 0).sum()
    x = dense(encoded[:, table.index].X).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        test = stats.ttest_ind(x[strongest], x[zero], equal_var=False)
    testable = (x[strongest].std(axis=0) > 0) & (x[zero].std(axis=0) > 0)
    assert testable.sum() > 500
    np.testing.assert_allclose(table["score"][testable], test.statistic[testable], rtol=1e-6)
    np.testing.assert_allclose(table["pval"][testable], test.pvalue[testable], rtol=1e-5, atol=1e-300)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "t-test"}, "method='t-test' is not one of 'welch', 'wilcoxon', 'regression'"),
        ({"method": "wilcoxon", "percentile": 99}, "method='wilcoxon' .* percentile=99 leaves some out"),
        ({"method": "regression", "percentile": 99}, "method='regression' .* percentile=99 leaves some out"),
        ({"percentile": 101}, "percentile=101 is not between 0 and 100"),
        ({"method": "wilcoxon", "donor": "phase"}, "donor='phase' makes the donors the sample. Use method='welch'"),
        ({"method": "regression", "donor": "phase"}, "method='regression' takes cells as independent"),
        ({"covariates": ["phase"]}, "method='welch' has no covariates. Use method='regression', or batch="),
        ({"method": "wilcoxon", "covariates": []}, "method='wilcoxon' has no covariates"),
        ({"batch": "phase", "donor": "bulk_labels"}, "Both batch='phase' and donor='bulk_labels' were given"),
        ({"batch": "percent_mito"}, r"adata\.obs\['percent_mito'\] is continuous"),
        ({"donor": "gap"}, r"adata\.obs\['gap'\] is missing for 350 of the 700 cells\. Fill it in"),
        ({"donor": "half"}, r"adata\.obs\['half'\] has 2 different values \('0', '1'\) .*donor= needs 3"),
        ({"batch": "gap"}, r"adata\.obs\['gap'\] is missing for 350 of the 700 cells"),
        ({"method": "regression", "batch": "gap"}, r"adata\.obs\['gap'\] is missing for 350 of the 700 cells"),
        ({"method": "regression", "covariates": ["gap"]}, r"adata\.obs\['gap'\] is missing for 350 of the 700 cells"),
        ({"method": "regression", "covariates": ["cell"]}, "700 cells leave no degrees of freedom"),
        ({"method": "regression", "pseudocount": 0}, "pseudocount=0 must be positive"),
        ({"donor": "phase", "min_cells": 1}, "min_cells=1 is below 2"),
        ({"min_expected": -1}, "min_expected=-1 is not a number of cells"),
        ({"batch": "phase", "min_expected": -1}, "min_expected=-1 is not a number of cells"),
    ],
    ids=str,
)
def test_bad_settings(encoded, compare, how, message):
    encoded.obs["gap"], encoded.obs["cell"] = ["a", None] * 350, encoded.obs_names
    encoded.obs["half"] = np.arange(700) % 2
    before = compare.state(encoded)
    with pytest.raises(ValueError, match=message):
        sae.tl.rank_genes(encoded, **how)
    compare.assert_same(before, compare.state(encoded))


@pytest.mark.parametrize(
    "how", [{"batch": "plate"}, {"donor": "plate"}, {"method": "regression", "covariates": ["plate"]}]
)
def test_missing_column(encoded, how):
    with pytest.raises(
        KeyError, match=r"adata\.obs has no column 'plate'; it has 'bulk_labels', .*Pass one of them in \w+="
    ):
        sae.tl.rank_genes(encoded, **how)


def with_sae(adata):
    """The same with the activations of eight features, and four batches of different sizes."""
    rng = np.random.default_rng(0)
    adata.obs["batch"] = pd.Categorical(rng.choice(list("wxyz"), adata.n_obs, p=[0.4, 0.3, 0.2, 0.1]))
    adata.obs["size"] = rng.normal(1000, 100, adata.n_obs)
    sae.tl.fit(adata, n_features=8, k=3, steps=30)
    sae.tl.encode(adata)
    return adata


each_layout = pytest.mark.parametrize("layout", ["dense", "csr"])


def features_of(adata):
    """Yield a feature's name, its activation and its rows of the table, for features that have any."""
    table = adata.uns["sae"]["genes"]
    a = adata.obsm["sae"].toarray()
    for feature in table["feature"].unique():
        yield a[:, int(feature[4:])], of(table, feature)


@each_layout
@pytest.mark.parametrize("percentile", [None, 80])
def test_batch_averages_differences_within_batches(make_adata, layout, percentile):
    adata = with_sae(make_adata(n=200, layout=layout))
    sae.tl.rank_genes(adata, batch="batch", percentile=percentile, min_expected=0, n_genes=None)
    n_features = 0
    for a, table in features_of(adata):
        n_features += 1
        x = dense(adata[:, table.index].X).astype(np.float64)
        positive, zero = a > (0 if percentile is None else np.percentile(a, percentile)), a == 0
        parts = []
        for batch in "wxyz":
            one, rest = (x[group & (adata.obs["batch"] == batch).to_numpy()] for group in (positive, zero))
            if min(len(one), len(rest)) >= 2:
                weight = len(one) * len(rest) / (len(one) + len(rest))
                error = one.var(axis=0, ddof=1) / len(one) + rest.var(axis=0, ddof=1) / len(rest)
                parts.append((weight, one.mean(axis=0), rest.mean(axis=0), error))
        total = sum(weight for weight, *_ in parts)
        mean1, mean0 = (sum(part[0] * part[i] for part in parts) / total for i in (1, 2))
        error = sum(weight**2 * error for weight, _, _, error in parts) / total**2
        np.testing.assert_allclose(table["score"], (mean1 - mean0) / np.sqrt(error), rtol=1e-6, atol=1e-9)
        fold_change = np.log2((np.expm1(mean1) + 0.1) / (np.expm1(mean0) + 0.1))
        np.testing.assert_allclose(table["log2fc"], fold_change, rtol=1e-6, atol=1e-9)
    assert n_features > 3


@each_layout
def test_wilcoxon_ranks_within_batches(make_adata, layout):
    adata = with_sae(make_adata(n=200, layout=layout))
    sae.tl.rank_genes(adata, batch="batch", min_expected=0, n_genes=None)
    fold_changes = adata.uns["sae"]["genes"].set_index(["feature", "gene"])["log2fc"]
    sae.tl.rank_genes(adata, method="wilcoxon", batch="batch", n_genes=None)
    found = adata.uns["sae"]["genes"].set_index(["feature", "gene"])["log2fc"]
    pd.testing.assert_series_equal(found, fold_changes[found.index])
    n_features = 0
    for a, table in features_of(adata):
        n_features += 1
        x = dense(adata[:, table.index].X).astype(np.float64)
        difference, variance = 0, 0
        for batch in "wxyz":
            inside = (adata.obs["batch"] == batch).to_numpy()
            n, active = inside.sum(), a[inside] > 0
            ranks = stats.rankdata(x[inside], axis=0)
            difference += (ranks[active].sum(axis=0) - active.sum() * (n + 1) / 2) / (n + 1)
            variance += active.sum() * (n - active.sum()) * ranks.var(axis=0, ddof=1) / n / (n + 1) ** 2
        z = difference / np.sqrt(variance)
        np.testing.assert_allclose(table["score"], z, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(table["pval"], 2 * stats.norm.sf(np.abs(z)), rtol=1e-8)
    assert n_features > 3


@pytest.mark.parametrize("how", [{}, {"percentile": 90}, {"method": "wilcoxon"}, {"method": "regression"}], ids=str)
def test_a_lone_batch_changes_nothing(encoded, how):
    encoded.obs["plate"] = 7
    sae.tl.rank_genes(encoded, **how)
    plain = encoded.uns["sae"]["genes"]
    sae.tl.rank_genes(encoded, batch="plate", **how)
    pd.testing.assert_frame_equal(encoded.uns["sae"]["genes"], plain, check_exact=True)


@each_layout
@pytest.mark.parametrize("percentile", [None, 80])
def test_donor_tests_the_differences_of_donors(make_adata, layout, percentile):
    adata = with_sae(make_adata(n=300, layout=layout))
    sae.tl.rank_genes(adata, donor="batch", percentile=percentile, min_expected=0, n_genes=None)
    n_features = 0
    for a, table in features_of(adata):
        n_features += 1
        x = dense(adata[:, table.index].X).astype(np.float64)
        positive, zero = a > (0 if percentile is None else np.percentile(a, percentile)), a == 0
        differences = []
        for donor in "wxyz":
            one, rest = (x[group & (adata.obs["batch"] == donor).to_numpy()] for group in (positive, zero))
            if min(len(one), len(rest)) >= 3:
                differences.append(one.mean(axis=0) - rest.mean(axis=0))
        expected = stats.ttest_1samp(differences, 0)
        np.testing.assert_allclose(table["score"], expected.statistic, rtol=1e-5)
        np.testing.assert_allclose(table["pval"], expected.pvalue, rtol=1e-5)
        np.testing.assert_allclose(table["padj"], stats.false_discovery_control(expected.pvalue), rtol=1e-5)
    assert n_features > 3


def test_features_of_too_few_donors_are_left_out(make_adata):
    """Three donors in all, in one of which a feature is silent."""
    adata = with_sae(make_adata(n=200))
    adata = adata[adata.obs["batch"] != "x"].copy()
    a = adata.obsm["sae"].toarray()
    a[:, 3] = np.arange(len(a)) % 2 * (adata.obs["batch"] != "z")
    a[:, 5] = np.arange(len(a)) % 2
    adata.obsm["sae"] = sparse.csr_matrix(a)
    sae.tl.rank_genes(adata, donor="batch")
    tested = set(adata.uns["sae"]["genes"]["feature"])
    assert "sae_3" not in tested and "sae_5" in tested


@each_layout
@pytest.mark.parametrize("covariates", [None, ["size", "batch"]])
def test_regression_agrees_with_least_squares(make_adata, layout, covariates):
    adata = with_sae(make_adata(n=200, layout=layout))
    sae.tl.rank_genes(adata, method="regression", covariates=covariates, n_genes=None)
    others = np.ones((200, 1))
    if covariates is not None:
        dummies = pd.get_dummies(adata.obs["batch"], drop_first=True).to_numpy(dtype=float)
        others = np.column_stack([others, adata.obs["size"], dummies])
    n_features = 0
    for a, table in features_of(adata):
        n_features += 1
        x = dense(adata[:, table.index].X).astype(np.float64)
        design = np.column_stack([a, others]).astype(np.float64)
        beta, residual, rank, _ = np.linalg.lstsq(design, x, rcond=None)
        assert rank == design.shape[1]
        t = beta[0] / np.sqrt(residual / (200 - rank) * np.linalg.inv(design.T @ design)[0, 0])
        p = 2 * stats.t.sf(np.abs(t), 200 - rank)
        np.testing.assert_allclose(table["score"], t, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(table["pval"], p, rtol=1e-6)
        np.testing.assert_allclose(table["padj"], stats.false_discovery_control(p), rtol=1e-6)
    assert n_features > 3


def test_batch_of_a_regression_is_a_categorical_covariate(make_adata):
    adata = with_sae(make_adata(n=200))
    adata.obs["number"] = adata.obs["batch"].cat.codes.to_numpy()
    tables = []
    for how in ({"covariates": ["size", "batch"]}, {"covariates": ["size"], "batch": "number"}):
        sae.tl.rank_genes(adata, method="regression", n_genes=None, **how)
        tables.append(adata.uns["sae"]["genes"].sort_values(["feature", "gene"], ignore_index=True))
    pd.testing.assert_frame_equal(*tables, rtol=1e-9)
    sae.tl.rank_genes(adata, method="regression", n_genes=None, covariates=["size", "number"])
    assert not np.allclose(adata.uns["sae"]["genes"]["pval"].sort_values(), tables[0]["pval"].sort_values())


def test_regression_tests_features_that_are_active_in_all_cells(make_adata):
    adata = with_sae(make_adata(n=100))
    a = adata.obsm["sae"].toarray()
    a[:, 2] = np.random.default_rng(0).uniform(1, 2, 100)
    adata.obsm["sae"] = sparse.csr_matrix(a)
    sae.tl.rank_genes(adata)
    assert "sae_2" not in set(adata.uns["sae"]["genes"]["feature"])
    sae.tl.rank_genes(adata, method="regression")
    assert "sae_2" in set(adata.uns["sae"]["genes"]["feature"])


def test_best_first_and_adjusted_over_all_genes(encoded):
    sae.tl.rank_genes(encoded, n_genes=None)
    whole = encoded.uns["sae"]["genes"]
    sae.tl.rank_genes(encoded, n_genes=5)
    best = encoded.uns["sae"]["genes"]
    order = pd.Index([f"sae_{i}" for i in range(32)])
    for table in (whole, best):
        codes = order.get_indexer(table["feature"])
        assert (np.diff(codes) >= 0).all(), "features in order"
        assert (table.groupby("feature", observed=True)["score"].diff().dropna() <= 0).all(), "most raised first"
    assert (best.groupby("feature", observed=True).size() == 10).all()
    for feature in order:
        scores = of(whole, feature)["score"]
        assert list(of(best, feature).index[:5]) == list(scores.nlargest(5).index)
        assert set(of(best, feature).index[5:]) == set(scores.nsmallest(5).index)
        pd.testing.assert_frame_equal(of(best, feature), of(whole, feature).loc[of(best, feature).index])


def test_never_more_than_there_are(make_adata):
    adata = make_adata(g=6)
    sae.tl.fit(adata, steps=30)
    sae.tl.encode(adata)
    sae.tl.rank_genes(adata, n_genes=100)
    assert not adata.uns["sae"]["genes"].duplicated(["feature", "gene"]).any()
    assert adata.uns["sae"]["genes"].groupby("feature", observed=True).size().max() <= 6


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_constant_genes_are_not_tested(make_adata, layout):
    adata = make_adata(g=12)
    adata.X[:, 3], adata.X[:, 4] = 1.7, 0
    if layout == "csr":
        adata.X = sparse.csr_matrix(adata.X)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    sae.tl.rank_genes(adata, min_expected=0, n_genes=None)
    table = adata.uns["sae"]["genes"]
    assert set(adata.var_names) - set(table["gene"]) == {"g3", "g4"}
    feature = table["feature"].iloc[0]
    active = adata.obsm["sae"][:, [int(feature[4:])]].toarray().ravel() > 0
    rest = adata[:, adata.var_names.difference(["g3", "g4"], sort=False)]
    oracle = expected(rest.X, active, rest.var_names)
    np.testing.assert_allclose(of(table, feature)["padj"], oracle.loc[of(table, feature).index, "padj"], rtol=1e-6)


def test_which_expression_is_read(make_adata):
    """A layer if named, else `.raw` if there is one, else `X`: Scanpy's rule."""
    adata = make_adata(g=20)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    adata.layers["double"] = adata.X * 2
    adata.raw = adata.copy()
    adata.raw.X[:] = adata.raw.X * 3
    adata = adata[:, :15].copy()
    n_active = adata.obsm["sae"].getnnz(axis=0)
    feature = int(np.flatnonzero((n_active > 5) & (n_active < 75))[0])
    active = adata.obsm["sae"][:, [feature]].toarray().ravel() > 0
    cases = {
        "raw": ({}, adata.raw.X, adata.raw.var_names),
        "raw asked for": ({"use_raw": True}, adata.raw.X, adata.raw.var_names),
        "X": ({"use_raw": False}, adata.X, adata.var_names),
        "layer": ({"layer": "double"}, adata.layers["double"], adata.var_names),
        "layer and no raw": ({"layer": "double", "use_raw": False}, adata.layers["double"], adata.var_names),
    }
    for name, (arguments, x, genes) in cases.items():
        sae.tl.rank_genes(adata, min_expected=0, n_genes=None, **arguments)
        table = of(adata.uns["sae"]["genes"], f"sae_{feature}")
        oracle = expected(x, active, genes)
        assert set(table.index) == set(genes), name
        np.testing.assert_allclose(table["log2fc"], oracle.loc[table.index, "log2fc"], rtol=1e-5, err_msg=name)


def test_scaled_values_are_passed_over_for_raw(encoded):
    plain = encoded.copy()
    encoded.raw = encoded.copy()
    encoded.X = dense(encoded.X) - dense(encoded.X).mean(axis=0)
    sae.tl.rank_genes(plain)
    sae.tl.rank_genes(encoded)
    pd.testing.assert_frame_equal(plain.uns["sae"]["genes"], encoded.uns["sae"]["genes"])


@pytest.mark.parametrize("method", ["welch", "wilcoxon"])
def test_scaled_values_are_tested_without_a_fold_change(encoded, log, method):
    encoded.layers["scaled"] = dense(encoded.X) - dense(encoded.X).mean(axis=0)
    sae.tl.rank_genes(encoded, n_genes=None, min_expected=0, method=method)
    plain = encoded.uns["sae"]["genes"]
    assert plain["log2fc"].notna().all()
    assert log() == ""
    sae.tl.rank_genes(encoded, n_genes=None, min_expected=0, method=method, layer="scaled")
    scaled = encoded.uns["sae"]["genes"]
    assert log().count("WARNING") == 1
    assert "adata.layers['scaled'] looks scaled: it has negative values (down to -" in log()
    assert scaled["log2fc"].isna().all()
    one, other = (table.set_index(["feature", "gene"]).sort_index() for table in (plain, scaled))
    np.testing.assert_allclose(one["score"], other["score"], rtol=1e-3, atol=1e-3)


class PCA:
    """Principal components turned back into expression; genes that they do not cover are NaN."""

    def __init__(self, adata, wrap=lambda x: x):
        self.mean = dense(adata.X).mean(axis=0, dtype=np.float64)
        self.loadings = adata.varm["PCs"]
        self.unknown = ~self.loadings.any(axis=1)
        self.wrap = wrap
        self.n_cells = []

    def decode(self, z, data):
        np.testing.assert_array_equal(z, data.obsm["X_pca"])
        self.n_cells.append(len(z))
        x = np.maximum(z @ self.loadings.T + self.mean, 0)
        x[:, self.unknown] = np.nan
        return self.wrap(x)


@pytest.fixture(scope="module")
def with_loadings():
    """Encoded cells whose components cover 300 of 765 genes."""
    adata = sae.datasets.pbmc68k()
    adata.var["covered"] = np.random.default_rng(0).permutation(adata.n_vars) < 300
    sc.pp.pca(adata, n_comps=20, mask_var="covered")
    sae.tl.fit(adata, n_features=16, steps=60)
    sae.tl.encode(adata)
    return adata


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: x, id="array"),
        pytest.param(sparse.csr_matrix, id="sparse"),
        pytest.param(lambda x: ad.AnnData(x, var=pd.DataFrame(index=[f"predicted-{i}" for i in range(765)])), id="AnnData"),
    ],
)  # fmt: skip
def test_a_prediction_is_ranked_as_the_same_values_in_a_layer(with_loadings, wrap, monkeypatch, log):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 64)
    adata = with_loadings.copy()
    model = PCA(adata, wrap)
    covered = adata[:, adata.var["covered"]].copy()
    covered.layers["predicted"] = PCA(adata).decode(adata.obsm["X_pca"], adata)[:, adata.var["covered"]]
    sae.tl.rank_genes(adata, model=model, n_genes=None)
    sae.tl.rank_genes(covered, layer="predicted", n_genes=None)
    assert max(model.n_cells) == 64
    assert log() == ""
    found, expected = (data.uns["sae"]["genes"] for data in (adata, covered))
    found["gene"] = found["gene"].astype(str)
    if found["gene"].iloc[0].startswith("predicted-"):
        found["gene"] = adata.var_names[found["gene"].str.removeprefix("predicted-").astype(int)]
    assert found["gene"].nunique() == 300
    index = ["feature", "gene"]
    found, expected = (table.set_index(table[index].astype(str).agg(" ".join, axis=1)) for table in (found, expected))
    assert set(found.index) == set(expected.index)
    for name in ("score", "log2fc", "pval", "padj"):
        np.testing.assert_allclose(found[name], expected[name][found.index], rtol=1e-6, atol=1e-9, err_msg=name)


def test_the_latent_is_what_was_encoded(make_adata):
    """From another slot, and columns by name in the order of the SAE."""
    adata = make_adata()
    table = pd.DataFrame(adata.obsm["X_pca"] + 1, index=adata.obs_names, columns=list("abcdef"))
    adata.obsm["X_other"] = table
    sae.tl.fit(adata, "X_other", n_features=8, steps=30)
    sae.tl.encode(adata)
    adata.obsm["X_other"] = table[list("fedcba")]
    given = []

    class Model:
        def decode(self, z, data):
            given.append(z)
            return data.X

    sae.tl.rank_genes(adata, model=Model())
    np.testing.assert_array_equal(given[-1], table)
    of_model = adata.uns["sae"]["genes"]
    sae.tl.rank_genes(adata)
    pd.testing.assert_frame_equal(of_model, adata.uns["sae"]["genes"])


def test_counts_are_read_as_they_are_and_logged(make_adata, log):
    adata = make_adata()
    adata.X = np.rint(np.expm1(adata.X) * 10)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    assert log() == ""
    sae.tl.rank_genes(adata, n_genes=None)
    assert "adata.X holds integers, probably counts" in log()
    feature = adata.uns["sae"]["genes"]["feature"].iloc[0]
    active = adata.obsm["sae"][:, [int(feature[4:])]].toarray().ravel() > 0
    table = of(adata.uns["sae"]["genes"], feature)
    oracle = expected(adata.X, active, adata.var_names, mean=lambda mean: mean)
    np.testing.assert_allclose(table["log2fc"], oracle.loc[table.index, "log2fc"], rtol=1e-5)


@pytest.mark.parametrize(
    ("recorded", "factor", "mean"),
    [
        pytest.param(None, 1, np.expm1, id="recognised by size"),
        pytest.param({"base": None}, 1, np.expm1, id="recorded"),
        pytest.param({}, 1, np.expm1, id="recorded, without a base"),
        pytest.param({"base": 2}, 1 / np.log(2), lambda mean: 2**mean - 1, id="base 2"),
        pytest.param(None, 100, lambda mean: mean, id="not log"),
    ],
)
def test_fold_change_of_log_values(make_adata, recorded, factor, mean):
    adata = make_adata()
    adata.X = adata.X * factor
    if recorded is not None:
        adata.uns["log1p"] = recorded
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata)
    sae.tl.rank_genes(adata, n_genes=None, pseudocount=0.5)
    feature = adata.uns["sae"]["genes"]["feature"].iloc[0]
    active = adata.obsm["sae"][:, [int(feature[4:])]].toarray().ravel() > 0
    table = of(adata.uns["sae"]["genes"], feature)
    oracle = expected(adata.X, active, adata.var_names, mean=mean, pseudocount=0.5)
    np.testing.assert_allclose(table["log2fc"], oracle.loc[table.index, "log2fc"], rtol=1e-5, atol=1e-6)


def test_too_rare_or_too_common_features_are_left_out(encoded):
    n_cells = sae.get.features(encoded)["n_cells"]
    limit = int(n_cells.median())
    sae.tl.rank_genes(encoded, min_cells=limit)
    tested = set(encoded.uns["sae"]["genes"]["feature"])
    assert tested == set(n_cells.index[(n_cells >= limit) & (700 - n_cells >= limit)])
    assert 0 < len(tested) < 32
    sae.tl.rank_genes(encoded, min_cells=10_000)
    assert encoded.uns["sae"]["genes"].empty
    assert encoded.uns["sae"]["genes"].dtypes.astype(str).to_dict() == COLUMNS


def test_known_biology(encoded):
    """The feature that follows the B cells best has their genes."""
    sae.tl.score_labels(encoded, "bulk_labels")
    sae.tl.rank_genes(encoded)
    feature = sae.get.labels(encoded, label="CD19+ B")["feature"].iloc[0]
    assert {"CD79A", "CD79B", "MS4A1"} & set(sae.get.genes(encoded, feature, direction="up", n=10)["gene"])


def test_mudata_other_modality_matched_by_name(make_mudata, compare):
    """An SAE on the RNA, read against proteins of fewer cells in another order."""
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", n_features=8, steps=30)
    sae.tl.encode(mdata, mod="rna")
    before = compare.state(mdata)
    sae.tl.rank_genes(mdata, mod="rna", var_mod="adt", n_genes=None)
    table = mdata["rna"].uns["sae"].pop("genes")
    mdata["rna"].uns["sae"]["features"].pop("genes_status")
    compare.assert_same(before, compare.state(mdata))
    assert table["modality"].unique().tolist() == ["adt"]
    assert table["modality"].dtype == "category"
    cells = mdata["adt"].obs_names
    for feature in table["feature"].unique():
        active = mdata["rna"][cells].obsm["sae"][:, [int(feature[4:])]].toarray().ravel() > 0
        oracle = expected(mdata["adt"].X, active, mdata["adt"].var_names)
        part = of(table, feature)
        np.testing.assert_allclose(part["score"], oracle.loc[part.index, "score"], rtol=1e-5)
        np.testing.assert_allclose(part["log2fc"], oracle.loc[part.index, "log2fc"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", [{"batch": "batch"}, {"donor": "batch"}, {"method": "regression", "batch": "batch"}])
def test_mudata_batches_of_the_matched_cells(make_mudata, how):
    """The batch of a cell goes with its name, wherever the other modality has it."""
    mdata = make_mudata()
    with_sae(mdata["rna"])
    mdata["rna"].obs.loc[mdata["rna"].obs_names.difference(mdata["adt"].obs_names), "batch"] = None
    sae.tl.rank_genes(mdata, mod="rna", var_mod="adt", n_genes=None, **how)
    table = mdata["rna"].uns["sae"]["genes"].drop(columns="modality")
    alone = mdata["adt"].copy()
    cells = mdata["rna"][alone.obs_names].copy()
    alone.uns["sae"], alone.obsm["sae"] = cells.uns["sae"], cells.obsm["sae"]
    alone.obsm["X_pca"], alone.obs["batch"] = cells.obsm["X_pca"], cells.obs["batch"]
    del alone.uns["sae"]["genes"]
    sae.tl.rank_genes(alone, n_genes=None, **how)
    assert len(table)
    names = ["feature", "gene"]
    found, expected = (t.sort_values(names, ignore_index=True) for t in (table, alone.uns["sae"]["genes"]))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-9)


def test_mudata_own_modality_and_joint(make_mudata):
    mdata = make_mudata()
    alone = mdata["rna"].copy()
    for data, where in ((mdata, {"mod": "rna"}), (alone, {})):
        sae.tl.fit(data, n_features=8, steps=30, **where)
        sae.tl.encode(data, **where)
        sae.tl.rank_genes(data, **where)
    table = sae.get.genes(mdata, mod="rna")
    assert table.pop("modality").unique().tolist() == ["rna"]
    pd.testing.assert_frame_equal(table, sae.get.genes(alone))

    sae.tl.fit(mdata, "X_joint", n_features=8, steps=30)
    sae.tl.encode(mdata)
    sae.tl.rank_genes(mdata, var_mod="adt")
    assert set(sae.get.genes(mdata)["gene"]) <= set(mdata["adt"].var_names)
    assert "genes" not in mdata["adt"].uns


def test_mudata_without_common_cells(make_adata):
    rna, adt = make_adata(n=20), make_adata(n=20, first=100)
    adt.var_names = [f"p{i}" for i in range(adt.n_vars)]
    mdata = mudata.MuData({"rna": rna, "adt": adt})
    sae.tl.fit(mdata, mod="rna", steps=2)
    sae.tl.encode(mdata, mod="rna")
    with pytest.raises(ValueError, match=r"No cell of mdata\.mod\['rna'\] is in mdata\.mod\['adt'\]"):
        sae.tl.rank_genes(mdata, mod="rna", var_mod="adt")


def test_status_says_why_a_feature_was_not_tested(encoded):
    n_cells = sae.get.features(encoded)["n_cells"]
    few, many = int(n_cells.quantile(0.2)), 700 - int(n_cells.max()) + 1
    for least, reason in ((few, f"fewer than {few} active cells"), (many, f"fewer than {many} inactive cells")):
        sae.tl.rank_genes(encoded, min_cells=least)
        status = sae.get.features(encoded)["genes_status"]
        tested = set(encoded.uns["sae"]["genes"]["feature"])
        assert set(status.index[status == "tested"]) == tested
        assert (status == reason).any()
    encoded.obs["donor"] = np.where(np.arange(700) < 698, "a", np.where(np.arange(700) == 698, "b", "c"))
    sae.tl.rank_genes(encoded, donor="donor")
    assert sae.get.features(encoded)["genes_status"].str.contains("too few donors").any()
