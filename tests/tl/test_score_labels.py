from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import precision_recall_curve, roc_auc_score

import sae

COLUMNS = {
    "feature": "category",
    "groupby": "category",
    "label": "category",
    "auroc": "float64",
    "f1": "float64",
    "difference": "float64",
    "pval": "float64",
    "padj": "float64",
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
    features = encoded.uns["sae"]["features"]
    assert list(features)[-3:] == ["bulk_labels_label", "bulk_labels_auroc", "bulk_labels_scope"]
    encoded.uns["sae"]["features"] = features.iloc[:, :-3]
    compare.assert_same(before, compare.state(encoded))
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert list(table) == list(COLUMNS)
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


def test_a_label_of_one_cell(encoded):
    encoded.obs["one"] = np.where(np.arange(700) == 5, "this", "others")
    sae.tl.score_labels(encoded, "one")
    table = encoded.uns["sae"]["labels"]
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
