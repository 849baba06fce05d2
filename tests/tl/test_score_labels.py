from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.metrics import precision_recall_curve, roc_auc_score

import sae

COLUMNS = {
    "feature": "category",
    "groupby": "category",
    "label": "category",
    "auroc": "float64",
    "f1": "float64",
    "held_out_auroc": "float64",
    "held_out_f1": "float64",
    "difference": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
    "pval": "float64",
    "padj": "float64",
}


SUMMARY = {
    "groupby": "category",
    "label": "category",
    "source": "category",
    "n_cells": "int64",
    "selected": "category",
    "agreement": "float64",
    "selection_auroc": "float64",
    "held_out_auroc": "float64",
    "held_out_sd": "float64",
    "held_out_f1": "float64",
    "difference": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
}


def scope_from_the_formula(a, labels):
    """Count the labels a feature is significant for, one by one."""
    if not (a > 0).any():
        return "dead"
    n_significant = 0
    for label in np.unique(labels):
        inside, outside = a[labels == label], a[labels != label]
        error = sum(np.std(part, ddof=1) / np.sqrt(len(part)) for part in (inside, outside))
        n_significant += inside.mean() - outside.mean() > 1.96 * error
    return {0: "global", 1: "local"}.get(n_significant, "regional")


def assert_scores_of(table, a, labels):
    """Compare every row with scikit-learn and SciPy."""
    a = a.toarray().astype(np.float64)
    for row in table.itertuples():
        activation, inside = a[:, int(row.feature.rpartition("_")[2])], labels == row.label
        assert row.auroc == pytest.approx(roc_auc_score(inside, activation))
        assert row.difference == pytest.approx(activation[inside].mean() - activation[~inside].mean())
        if len(set(activation)) > 1:
            test = stats.mannwhitneyu(activation[inside], activation[~inside], method="asymptotic")
            assert row.pval == pytest.approx(test.pvalue, rel=1e-6, abs=1e-300)
            precision, recall, thresholds = precision_recall_curve(inside, activation)
            with np.errstate(invalid="ignore"):
                f1 = 2 * precision * recall / (precision + recall)
            assert row.f1 == pytest.approx(np.nan_to_num(f1[:-1][thresholds > 0]).max())
        else:
            assert (row.pval, row.f1) == (1, 0)
    np.testing.assert_allclose(table["padj"], stats.false_discovery_control(table["pval"]), rtol=1e-9)


def test_writes_the_table_and_the_summary(encoded, compare):
    before = compare.state(encoded)
    assert sae.tl.score_labels(encoded, "bulk_labels") is None
    table = encoded.uns["sae"].pop("labels")
    summary = encoded.uns["sae"].pop("label_summary")
    features = encoded.uns["sae"]["features"]
    assert list(features)[-3:] == ["bulk_labels_label", "bulk_labels_auroc", "bulk_labels_scope"]
    encoded.uns["sae"]["features"] = features.iloc[:, :-3]
    compare.assert_same(before, compare.state(encoded))
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert list(table) == list(COLUMNS)
    assert summary.dtypes.astype(str).to_dict() == SUMMARY
    assert list(summary) == list(SUMMARY)
    assert len(summary) == 10 and set(summary["source"]) == {"feature"}
    counts = encoded.obs["bulk_labels"].value_counts()
    assert summary["n_cells"].tolist() == counts[summary["label"].astype(str)].tolist()
    assert len(table) == 32 * 10
    assert table.index.tolist() == [str(i) for i in range(320)]
    assert set(table["groupby"]) == {"bulk_labels"}
    best = table.loc[table.groupby("feature", observed=True)["auroc"].idxmax()].set_index("feature")
    best = best.loc[features.index]
    assert features["bulk_labels_label"].tolist() == best["label"].tolist()
    assert features["bulk_labels_auroc"].tolist() == best["auroc"].tolist()


def test_agrees_with_scikit_learn_and_scipy(encoded):
    sae.tl.score_labels(encoded, "bulk_labels")
    assert_scores_of(encoded.uns["sae"]["labels"], encoded.obsm["sae"], encoded.obs["bulk_labels"].to_numpy())


@pytest.mark.parametrize("groupby", ["bulk_labels", "phase", "louvain"])
def test_scopes(encoded, groupby):
    sae.tl.score_labels(encoded, groupby)
    a, labels = encoded.obsm["sae"].toarray().astype(np.float64), encoded.obs[groupby].to_numpy()
    expected = [scope_from_the_formula(a[:, i], labels) for i in range(32)]
    assert encoded.uns["sae"]["features"][f"{groupby}_scope"].tolist() == expected
    assert len(set(expected)) > 1
    sae.tl.score_labels(encoded, groupby, scopes="2-way")
    two_way = ["global" if scope == "regional" else scope for scope in expected]
    assert encoded.uns["sae"]["features"][f"{groupby}_scope"].tolist() == two_way


def test_dead_features(fitted):
    fitted.uns["sae"]["weights"]["b_enc"][3] = -1e6
    sae.tl.encode(fitted)
    sae.tl.score_labels(fitted, "phase")
    dead = sae.get.labels(fitted, "sae_3")
    assert dead["auroc"].tolist() == [0.5] * 3
    assert dead[["f1", "difference"]].eq(0).all(axis=None) and dead["pval"].eq(1).all()
    summary = sae.get.features(fitted).loc["sae_3"]
    assert summary["phase_scope"] == "dead" and pd.isna(summary["phase_label"])


def test_a_second_groupby_keeps_the_first(encoded):
    sae.tl.score_labels(encoded, "bulk_labels")
    first = encoded.uns["sae"]["labels"]
    sae.tl.score_labels(encoded, "phase")
    both = encoded.uns["sae"]["labels"]
    assert both["groupby"].unique().tolist() == ["bulk_labels", "phase"]
    assert both.dtypes.astype(str).to_dict() == COLUMNS
    assert both.index.is_unique
    kept = both[both["groupby"] == "bulk_labels"]
    pd.testing.assert_frame_equal(kept, first, check_categorical=False)
    assert_scores_of(both[both["groupby"] == "phase"], encoded.obsm["sae"], encoded.obs["phase"].to_numpy())
    features = encoded.uns["sae"]["features"]
    assert {"bulk_labels_scope", "phase_scope"} <= set(features)

    encoded.obs["phase"] = encoded.obs["phase"].cat.rename_categories({"G1": "one"})
    sae.tl.score_labels(encoded, "phase")
    again = encoded.uns["sae"]["labels"]
    assert set(again.loc[again["groupby"] == "phase", "label"]) == {"one", "S", "G2M"}
    assert len(again) == len(both)
    assert set(encoded.uns["sae"]["features"]["phase_label"].cat.categories) == {"one", "S", "G2M"}


def test_cells_without_a_label_are_left_out(encoded):
    encoded.obs["some"] = encoded.obs["phase"].astype(object).where(np.arange(700) % 3 > 0)
    known = encoded.obs["some"].notna().to_numpy()
    sae.tl.score_labels(encoded, "some")
    table = encoded.uns["sae"]["labels"]
    assert set(table["label"]) == {"G1", "S", "G2M"}
    assert_scores_of(table, encoded.obsm["sae"][known], encoded.obs["phase"].to_numpy()[known])


def test_baselines_leave_out_cells_without_a_label(encoded):
    encoded.obs["some"] = encoded.obs["phase"].astype(object).where(np.arange(700) % 3 > 0)
    known = encoded[encoded.obs["some"].notna()].copy()
    for adata in (encoded, known):
        sae.tl.score_labels(adata, "some", baselines=True)
    pd.testing.assert_frame_equal(sae.get.label_summary(encoded), sae.get.label_summary(known))


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(lambda labels: labels.astype(str).astype(object), id="object"),
        pytest.param(lambda labels: labels.astype("string"), id="string"),
        pytest.param(lambda labels: labels.cat.add_categories(["unused"]), id="unused category"),
        pytest.param(lambda labels: labels.cat.reorder_categories(["S", "G2M", "G1"], ordered=True), id="ordered"),
    ],
)
def test_kinds_of_labels(encoded, column):
    other = encoded.copy()
    other.obs["phase"] = column(other.obs["phase"])
    for adata in (encoded, other):
        sae.tl.score_labels(adata, "phase")
    a, b = (sae.get.labels(adata).astype({"feature": str, "label": str}) for adata in (encoded, other))
    by = ["feature", "label"]
    pd.testing.assert_frame_equal(
        a.sort_values(by).reset_index(drop=True), b.sort_values(by).reset_index(drop=True), check_categorical=False
    )


def test_booleans_and_integers_become_names(encoded):
    encoded.obs["b_cell"] = (encoded.obs["bulk_labels"] == "CD19+ B").to_numpy()
    encoded.obs["batch"] = np.arange(700) % 3
    sae.tl.score_labels(encoded, "b_cell")
    sae.tl.score_labels(encoded, "batch")
    sae.tl.score_labels(encoded, "bulk_labels")
    assert set(sae.get.labels(encoded, groupby="b_cell")["label"]) == {"True", "False"}
    assert set(sae.get.labels(encoded, groupby="batch")["label"]) == {"0", "1", "2"}
    a = sae.get.labels(encoded, groupby="b_cell", label="True").set_index("feature")
    b = sae.get.labels(encoded, groupby="bulk_labels", label="CD19+ B").set_index("feature")
    np.testing.assert_allclose(a["auroc"], b.loc[a.index, "auroc"])
    # Of two labels, one is the mirror image of the other.
    mirrored = sae.get.labels(encoded, groupby="b_cell", label="False").set_index("feature")
    np.testing.assert_allclose(mirrored.loc[a.index, "auroc"], 1 - a["auroc"])


def test_known_biology(encoded):
    sae.tl.score_labels(encoded, "bulk_labels")
    best = sae.get.labels(encoded).groupby("label", observed=True)["auroc"].max()
    assert best[["CD19+ B", "CD14+ Monocyte"]].min() > 0.9


def test_a_label_of_one_cell(encoded, log):
    encoded.obs["one"] = np.where(np.arange(700) == 5, "this", "others")
    sae.tl.score_labels(encoded, "one")
    table = encoded.uns["sae"]["labels"]
    assert "no held-out scores for 'others', 'this'" in log() and "at least two cells" in log()
    assert table[["held_out_auroc", "held_out_f1", "ci_low", "ci_high"]].isna().all(axis=None)
    summary = encoded.uns["sae"]["label_summary"]
    assert summary["selected"].isna().all() and summary["held_out_auroc"].isna().all()
    assert_scores_of(table, encoded.obsm["sae"], encoded.obs["one"].to_numpy())
    # No spread can be estimated from one cell, so nothing is called significant.
    assert set(encoded.uns["sae"]["features"]["one_scope"]) == {"global"}


def test_mudata(make_mudata, compare):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=30)
    sae.tl.encode(mdata)
    sae.tl.score_labels(mdata, "group")
    assert_scores_of(mdata.uns["sae"]["labels"], mdata.obsm["sae"], mdata.obs["group"].to_numpy())

    sae.tl.fit(mdata, mod="adt", n_features=8, steps=30)
    sae.tl.encode(mdata, mod="adt")
    before = compare.state(mdata)
    sae.tl.score_labels(mdata, "group", mod="adt")
    table = mdata["adt"].uns["sae"].pop("labels")
    del mdata["adt"].uns["sae"]["label_summary"]
    assert_scores_of(table, mdata["adt"].obsm["sae"], mdata["adt"].obs["group"].to_numpy())
    features = mdata["adt"].uns["sae"]["features"]
    mdata["adt"].uns["sae"]["features"] = features.iloc[:, :-3]
    compare.assert_same(before, compare.state(mdata))


def test_feature_silent_in_the_labelled_cells_has_no_label(analysed):
    active = analysed.obsm["sae"][:, 0].toarray().ravel() > 0
    labels = analysed.obs["bulk_labels"].astype(object)
    labels[active] = np.nan
    analysed.obs["part"] = labels.astype("category")
    sae.tl.score_labels(analysed, "part")
    row = sae.get.features(analysed).loc["sae_0"]
    assert row["part_scope"] == "dead"
    assert row["part_label"] is np.nan or row["part_label"] is None or row["part_label"] != row["part_label"]


def test_held_out_scores_can_be_told_from_those_of_all_cells(encoded):
    sae.tl.score_labels(encoded, "bulk_labels")
    table = sae.get.labels(encoded)
    assert (table["ci_low"] <= table["difference"]).all() and (table["difference"] <= table["ci_high"]).all()
    strong = table[table["auroc"] > 0.8]
    np.testing.assert_allclose(strong["held_out_auroc"], strong["auroc"], atol=0.05)
    absent = table[table["auroc"] < 0.2]
    assert (absent["held_out_auroc"] > 0.75).all(), "scored in the direction that was chosen"
    assert table["held_out_f1"].mean() < table["f1"].mean()


def test_summary(encoded):
    sae.tl.score_labels(encoded, "bulk_labels", baselines=True)
    summary = sae.get.label_summary(encoded)
    assert len(summary) == 30 and summary["held_out_auroc"].is_monotonic_decreasing
    features = sae.get.label_summary(encoded, source="feature")
    assert features["selected"].isin(sae.get.features(encoded).index).all()
    assert sae.get.label_summary(encoded, source="gene")["selected"].isin(encoded.var_names).all()
    assert sae.get.label_summary(encoded, source="representation")["selected"].str.startswith("X_pca_").all()
    assert summary["agreement"].between(0.1, 1).all() and summary["held_out_sd"].between(0, 0.3).all()
    assert summary["held_out_auroc"].mean() < summary["selection_auroc"].mean()
    assert summary["held_out_f1"].between(0, 1).all() and summary["held_out_f1"].max() > 0.8
    assert (summary["ci_low"] < summary["difference"]).all() and (summary["difference"] < summary["ci_high"]).all()
    assert (summary["ci_low"] > 0).mean() > 0.8, "components are taken in the direction that is higher in the label"
    b_cells = sae.get.label_summary(encoded, label="CD19+ B", source="gene").iloc[0]
    assert b_cells["selected"] in ("CD79A", "CD79B", "CD74", "HLA-DRA", "MS4A1")
    # The summary agrees with the scores of the feature on all cells.
    best = sae.get.labels(encoded, label="CD19+ B").iloc[0]
    row = sae.get.label_summary(encoded, label="CD19+ B", source="feature").iloc[0]
    same = ["difference", "ci_low", "ci_high"]
    np.testing.assert_allclose(row[same].astype(float), best[same].astype(float), rtol=1e-6)
    assert row["selected"] == best["feature"] and row["held_out_auroc"] == pytest.approx(best["auroc"], abs=0.05)


def test_random_labels_are_not_known_to_any_feature(encoded):
    """The mean over 20 draws, within 4 of its standard errors."""
    means, chosen = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        encoded.obs["random"] = rng.permutation(encoded.obs["louvain"].astype(str))
        sae.tl.score_labels(encoded, "random", rng=seed, n_splits=2)
        summary = sae.get.label_summary(encoded)
        means.append(summary["held_out_auroc"].mean())
        chosen.append(summary["selection_auroc"].mean())
    error = np.std(means, ddof=1) / np.sqrt(20)
    assert error < 0.02 and abs(np.mean(means) - 0.5) < 4 * error
    assert np.mean(chosen) > 0.55


def test_summary_of_a_second_groupby_keeps_the_first(encoded):
    sae.tl.score_labels(encoded, "bulk_labels", baselines=True)
    first = encoded.uns["sae"]["label_summary"]
    sae.tl.score_labels(encoded, "phase", n_splits=1)
    both = encoded.uns["sae"]["label_summary"]
    assert len(both) == 33 and both.dtypes.astype(str).to_dict() == SUMMARY
    pd.testing.assert_frame_equal(both.head(30), first, check_categorical=False)
    assert both.tail(3)["held_out_sd"].isna().all(), "one split has no standard deviation"
    sae.tl.score_labels(encoded, "bulk_labels")
    assert len(encoded.uns["sae"]["label_summary"]) == 13


def test_splits_are_seeded(encoded):
    def summary(**settings):
        sae.tl.score_labels(encoded, "bulk_labels", **settings)
        return encoded.uns["sae"]["label_summary"]

    pd.testing.assert_frame_equal(summary(), summary(rng=0))
    pd.testing.assert_frame_equal(summary(), summary(rng=np.random.default_rng(0)))
    assert not summary().equals(summary(rng=1))


def test_donors_are_not_divided(encoded, log):
    """A feature of one donor looks like one of a label that the donor has most of, until other donors are scored."""
    encoded.obs["donor"] = np.array(["d1", "d2", "d3", "d4"])[np.arange(700) % 4]
    encoded.obs["where"] = np.where(encoded.obs["donor"] == "d1", "one", "many")
    sae.tl.score_labels(encoded, "where", donor="donor")
    assert "no held-out scores for 'many', 'one'" in log() or "no held-out scores for 'one'" in log()
    assert "at least two donors (adata.obs['donor'])" in log()
    sae.tl.score_labels(encoded, "bulk_labels", donor="donor")
    summary = sae.get.label_summary(encoded, groupby="bulk_labels", label="CD19+ B")
    assert summary["held_out_auroc"].iloc[0] > 0.9

    a = encoded.obsm["sae"].toarray()
    inside = (encoded.obs["bulk_labels"] == "CD19+ B").to_numpy()
    column = int(summary["selected"].iloc[0].rpartition("_")[2])
    of_donor = [roc_auc_score(inside[np.arange(700) % 4 == i], a[np.arange(700) % 4 == i, column]) for i in range(4)]
    assert min(of_donor) - 0.05 < summary["held_out_auroc"].iloc[0] < max(of_donor) + 0.05


def test_trend_along_ordered_labels(encoded):
    order = ["CD34+", "CD4+/CD25 T Reg", "CD14+ Monocyte", "Dendritic"]
    sae.tl.score_labels(encoded, "bulk_labels", order=order)
    features = sae.get.features(encoded)
    assert list(features)[-3:] == ["bulk_labels_trend", "bulk_labels_trend_score", "bulk_labels_trend_padj"]
    known = encoded.obs["bulk_labels"].isin(order).to_numpy()
    place = pd.Index(order).get_indexer(encoded.obs["bulk_labels"][known])
    a = encoded.obsm["sae"].toarray()[known].astype(np.float64)
    tests = [stats.kendalltau(place, column, method="asymptotic") for column in a.T]
    for test, score in zip(tests, features["bulk_labels_trend_score"], strict=True):
        assert test.pvalue == pytest.approx(2 * stats.norm.sf(abs(score)), rel=1e-9)
        assert np.sign(test.statistic) == np.sign(score)
    padj = stats.false_discovery_control([test.pvalue for test in tests])
    np.testing.assert_allclose(features["bulk_labels_trend_padj"], padj, rtol=1e-9)
    means = np.stack([a[place == i].mean(axis=0) for i in range(4)])
    steps = np.diff(means, axis=0)
    expected = np.select([(steps > 0).all(axis=0), (steps < 0).all(axis=0)], ["rising", "falling"], "none")
    assert features["bulk_labels_trend"].tolist() == expected.tolist()
    assert len(set(expected)) > 1

    encoded.obs["bulk_labels_trend"] = encoded.obs["phase"]
    sae.tl.score_labels(encoded, "bulk_labels_trend")
    sae.tl.score_labels(encoded, "bulk_labels")
    left = [name for name in sae.get.features(encoded) if "_trend" in name]
    assert left == [f"bulk_labels_trend_{name}" for name in ("label", "auroc", "scope")], "no trend of an earlier order"


def test_baselines_of_a_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=30)
    sae.tl.encode(mdata)
    sae.tl.score_labels(mdata, "group", baselines=True, var_mod="adt")
    summary = sae.get.label_summary(mdata)
    assert summary.groupby("source", observed=True)["selected"].apply(set).loc["gene"] <= set(mdata["adt"].var_names)

    rows = mdata["adt"].obs_names
    inside = (mdata.obs["group"][rows] == "a").to_numpy()
    gene = summary.query("label == 'a' and source == 'gene'").iloc[0]
    values = np.asarray(mdata["adt"][:, gene["selected"]].X).ravel()
    if gene["agreement"] == 1:
        assert gene["held_out_auroc"] == pytest.approx(roc_auc_score(inside, values), abs=0.05)


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_baselines_of_scaled_values_are_those_of_the_values(encoded, log, layout):
    """The order of the cells is the same, whichever of them are zero."""
    sae.tl.score_labels(encoded, "bulk_labels", baselines=True)
    expected = sae.get.label_summary(encoded)
    assert log() == ""
    encoded.layers["scaled"] = layout(encoded.X.toarray() - np.float32(1.5))
    sae.tl.score_labels(encoded, "bulk_labels", baselines=True, layer="scaled")
    assert log().count("WARNING") == 1
    assert "adata.layers['scaled'] looks scaled" in log()
    pd.testing.assert_frame_equal(sae.get.label_summary(encoded), expected)


def test_baselines_of_features_of_genes(make_adata):
    adata = make_adata(layout="csr")
    sae.tl.fit(adata, "X", n_features=8, steps=30)
    sae.tl.encode(adata)
    sae.tl.score_labels(adata, "group", baselines=True)
    by = sae.get.label_summary(adata).set_index(["label", "source"])["held_out_auroc"].unstack()
    assert (by["representation"] >= by["gene"] - 0.1).all()


def test_rows_of_a_table_without_the_newer_columns_are_kept(encoded):
    sae.tl.score_labels(encoded, "bulk_labels")
    stored = encoded.uns["sae"]
    stored["labels"] = stored["labels"].drop(columns=["held_out_auroc", "held_out_f1", "ci_low", "ci_high"])
    sae.tl.score_labels(encoded, "phase")
    table = encoded.uns["sae"]["labels"]
    assert table.loc[table["groupby"] == "bulk_labels", "held_out_auroc"].isna().all()
    assert table.loc[table["groupby"] == "phase", "held_out_auroc"].notna().all()


@pytest.mark.parametrize("groupby", ["name", "name_label"])
def test_columns_that_the_names_of_features_would_overwrite(encoded, groupby):
    encoded.obs[groupby] = encoded.obs["phase"]
    with pytest.raises(ValueError, match=f"sae.tl.name_features writes '{groupby}_.*Rename the column"):
        sae.tl.score_labels(encoded, groupby)
    assert "labels" not in encoded.uns["sae"]
    sae.tl.score_labels(encoded, "phase")
    columns = sae.get.features(encoded).columns
    sae.tl.name_features(encoded)
    assert set(columns) <= set(sae.get.features(encoded).columns)
    assert f"{groupby}_{'label' if groupby == 'name' else 'auroc'}" in sae.get.features(encoded)
