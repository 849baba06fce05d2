from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import sae
from sae.core.label_means import label_means


def test_label_matrix_has_the_scores(analysed):
    table = sae.get.labels(analysed, groupby="bulk_labels").set_index(["feature", "label"])
    for metric in ("auroc", "f1", "held_out_auroc", "held_out_f1", "difference"):
        matrix = sae.get.label_matrix(analysed, "bulk_labels", metric=metric)
        assert matrix.shape == (32, 10) and matrix.index.tolist() == [f"sae_{i}" for i in range(32)]
        assert matrix.columns.tolist() == analysed.obs["bulk_labels"].cat.categories.tolist()
        assert matrix.columns.name == "bulk_labels"
        for feature, label in (("sae_3", "Dendritic"), ("sae_30", "CD19+ B")):
            assert matrix.loc[feature, label] == table.loc[(feature, label), metric]


def test_label_matrix_of_some_features_in_their_order(analysed):
    matrix = sae.get.label_matrix(analysed, "phase", features=["sae_7", 2])
    assert matrix.index.tolist() == ["sae_7", "sae_2"]
    assert matrix.columns.tolist() == ["G1", "G2M", "S"]


def test_label_matrix_of_the_only_column(encoded):
    sae.tl.score_labels(encoded, "phase")
    assert sae.get.label_matrix(encoded).columns.name == "phase"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "several columns were scored: 'bulk_labels', 'phase'. Pass one"),
        ({"groupby": "louvain"}, KeyError, "no results for the groupby 'louvain'"),
        ({"groupby": "phase", "metric": "pval"}, ValueError, "metric='pval' is not one of 'auroc'"),
        ({"groupby": "phase", "features": "sae_99"}, KeyError, "no feature 'sae_99'"),
    ],
)
def test_label_matrix_refuses(analysed, settings, error, message):
    with pytest.raises(error, match=message):
        sae.get.label_matrix(analysed, **settings)


def oracle(values, level=0.95):
    """Mean, Student's interval and share of active of one group, by SciPy."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    return [values.mean(), low, high]


def test_by_label_is_what_scipy_says(analysed):
    table = sae.get.by_label(analysed, [4, "sae_1"], "phase")
    assert list(table) == ["feature", "label", "position", "n_cells", "mean", "ci_low", "ci_high", "share"]
    assert table["feature"].tolist() == ["sae_4"] * 3 + ["sae_1"] * 3
    assert table["label"].tolist() == ["G1", "G2M", "S"] * 2 and not table["label"].cat.ordered
    for _, row in table.iterrows():
        inside = (analysed.obs["phase"] == row["label"]).to_numpy()
        values = analysed.obsm["sae"].toarray()[inside, int(row["feature"][4:])].astype(np.float64)
        np.testing.assert_allclose(row[["mean", "ci_low", "ci_high"]].astype(float), oracle(values), rtol=1e-9)
        assert row["n_cells"] == inside.sum() and row["share"] == pytest.approx((values > 0).mean())


def test_by_label_counts_donors_once(analysed):
    rng = np.random.default_rng(0)
    analysed.obs["donor"] = [f"d{i}" for i in rng.choice(5, analysed.n_obs, p=[0.6, 0.1, 0.1, 0.1, 0.1])]
    table = sae.get.by_label(analysed, "sae_4", "phase", donor="donor").set_index("label")
    a = pd.Series(analysed.obsm["sae"].toarray()[:, 4].astype(np.float64), index=analysed.obs_names)
    means = a.groupby([analysed.obs["phase"], analysed.obs["donor"]], observed=True).mean()
    for label in ("G1", "G2M", "S"):
        np.testing.assert_allclose(
            table.loc[label, ["mean", "ci_low", "ci_high"]].astype(float), oracle(means[label].to_numpy()), rtol=1e-9
        )
    assert table["n_donors"].tolist() == means.groupby(level=0, observed=True).size().tolist()
    assert table["n_cells"].tolist() == analysed.obs["phase"].value_counts()[table.index].tolist()
    assert abs(table.loc["G1", "mean"] - sae.get.by_label(analysed, "sae_4", "phase")["mean"][0]) > 1e-6


def test_by_label_follows_the_order_and_leaves_others_out(analysed):
    table = sae.get.by_label(analysed, 0, "phase", order=["S", "G1"])
    assert table["label"].tolist() == ["S", "G1"] and table["label"].cat.ordered
    assert table["position"].tolist() == [0, 1]
    whole = sae.get.by_label(analysed, 0, "phase").set_index("label")
    np.testing.assert_array_equal(table["mean"], whole.loc[["S", "G1"], "mean"])


def test_ordered_categories_stay_ordered_and_missing_labels_are_left_out(analysed):
    phase = analysed.obs["phase"].astype(str)
    phase.iloc[:50] = np.nan
    analysed.obs["stage"] = pd.Categorical(phase, categories=["S", "G2M", "G1", "G0"], ordered=True)
    table = sae.get.by_label(analysed, 0, "stage")
    assert table["label"].tolist() == ["S", "G2M", "G1"] and table["label"].cat.ordered
    assert table["n_cells"].sum() == analysed.n_obs - 50


def test_numbers_are_binned_at_quantiles(analysed):
    time = analysed.obsm["X_pca"][:, 0].astype(np.float64)
    time[:7], time[7:9] = np.nan, np.inf
    analysed.obs["time"] = time
    table = sae.get.by_label(analysed, [0, 1], "time", n_bins=5)
    assert len(table) == 10 and table["label"].cat.ordered
    assert table["n_cells"].sum() == 2 * (analysed.n_obs - 9)
    assert table["n_cells"].max() - table["n_cells"].min() <= 1
    known = np.isfinite(time)
    parts = np.array_split(np.argsort(time[known], kind="stable"), 5)
    for row, cells in zip(table.itertuples(), parts, strict=False):
        if row.n_cells == len(cells):
            assert row.position == pytest.approx(time[known][cells].mean(), rel=0.05)
    assert table["position"][:5].is_monotonic_increasing


def test_few_numbers_are_labels(analysed):
    analysed.obs["day"] = np.where(analysed.obs["phase"] == "G1", 7, 21)
    table = sae.get.by_label(analysed, 0, "day")
    assert table["label"].tolist() == ["7", "21"] and table["position"].tolist() == [7.0, 21.0]
    inside = (analysed.obs["day"] == 21).to_numpy()
    assert table["mean"][1] == pytest.approx(analysed.obsm["sae"].toarray()[inside, 0].mean(dtype=np.float64))


def test_bins_without_cells_are_dropped(encoded):
    # Of these and five bins, the quantiles 2.0 and 2.4 have no number between them.
    few = encoded[:9].copy()
    few.obs["time"] = [0.0, 0, 1, 2, 2, 4, 5, 6, 7]
    table = sae.get.by_label(few, 0, "time", n_bins=5)
    assert len(table) == 4 and (table["n_cells"] > 0).all() and table["n_cells"].sum() == 9
    np.testing.assert_allclose(table["position"], [0, 5 / 3, 4.5, 6.5])


def test_many_equal_numbers_make_fewer_bins(encoded):
    encoded.obs["time"] = np.maximum(np.arange(encoded.n_obs) - 650.0, 0)
    table = sae.get.by_label(encoded, 0, "time", n_bins=20)
    assert len(table) == 2 and table["n_cells"].sum() == encoded.n_obs


def test_means_rise_where_the_trend_says_so(analysed):
    order = ["G1", "S", "G2M"]
    sae.tl.score_labels(analysed, "phase", order=order)
    means = sae.get.by_label(analysed, None, "phase", order=order)
    steps = means["mean"].to_numpy().reshape(32, 3)
    trend = sae.get.features(analysed)["phase_trend"]
    rising, falling = (np.diff(steps) > 0).all(axis=1), (np.diff(steps) < 0).all(axis=1)
    assert rising.any() and (trend == np.select([rising, falling], ["rising", "falling"], "none")).all()


def test_a_label_of_one_cell_has_no_interval_and_a_constant_one_no_width():
    a = sparse.csr_matrix(np.array([[1.0], [2.0], [2.0], [0.0], [0.0]]))
    found = label_means(a, np.array([0, 1, 1, 2, 2]), 4)
    np.testing.assert_array_equal(found.n.ravel(), [1, 2, 2, 0])
    np.testing.assert_array_equal(found.mean.ravel(), [1, 2, 0, np.nan])
    np.testing.assert_array_equal(found.ci_low.ravel(), [np.nan, 2, 0, np.nan])
    np.testing.assert_array_equal(found.ci_high.ravel(), [np.nan, 2, 0, np.nan])
    np.testing.assert_array_equal(found.share.ravel(), [1, 1, 0, np.nan])


@pytest.mark.parametrize("mod", ["rna", None])
def test_mudata(make_mudata, mod):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca" if mod else "X_joint", mod=mod, n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata, mod=mod)
    sae.tl.score_labels(mdata, "group", mod=mod)
    held = mdata.mod["rna"] if mod else mdata
    assert sae.get.label_matrix(mdata, mod=mod).shape == (8, 3)
    table = sae.get.by_label(mdata, 2, "group", mod=mod)
    means = pd.Series(held.obsm["sae"].toarray()[:, 2]).groupby(held.obs["group"].to_numpy()).mean()
    np.testing.assert_allclose(table["mean"], means, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groupby": "stage"}, KeyError, "adata.obs has no column 'stage'; it has"),
        ({"features": "sae_99"}, KeyError, "no feature 'sae_99'"),
        ({"order": "G1"}, ValueError, "order='G1' is not a list"),
        ({"order": []}, ValueError, r"order=\[\] is not a list"),
        ({"order": ["G1", "G0"]}, ValueError, "no cell has: 'G0'. adata.obs\\['phase'\\] has 'G1', 'G2M', 'S'"),
        ({"order": ["G1", "G1"]}, ValueError, "has 'G1' more than once"),
        ({"groupby": "n_genes", "n_bins": 1}, ValueError, "n_bins=1 is below 2"),
        ({"groupby": "nothing"}, ValueError, "has no finite numbers"),
        ({"groupby": "unknown"}, ValueError, "is missing for all cells"),
        ({"donor": "plate"}, KeyError, "no column 'plate'.* donor="),
        ({"donor": "percent_mito"}, ValueError, "is continuous \\(.*\\). Pass a column of names as donor=\\.$"),
        ({"donor": "unknown"}, ValueError, "is missing for 700 of the 700 cells"),
    ],
)
def test_by_label_refuses(analysed, settings, error, message):
    analysed.obs["nothing"] = np.nan
    analysed.obs["unknown"] = pd.Categorical([None] * analysed.n_obs, categories=["a"])
    with pytest.raises(error, match=message):
        sae.get.by_label(analysed, **{"features": 0, "groupby": "phase", **settings})


def test_without_activations(fitted):
    with pytest.raises(KeyError, match="Run sae.tl.encode"):
        sae.get.by_label(fitted, 0, "phase")
    with pytest.raises(KeyError, match="Run sae.tl.score_labels"):
        sae.get.label_matrix(fitted)
