from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, r2_score
from sklearn.model_selection import KFold, cross_val_predict

import sae
from sae.tl._recovery import recovery

TEXT = ["group", "variable", "feature", "matched_feature"]
FEATURE_COLUMNS = ["r", "abs_r", "signed_r", "matched", "n_above_0.9", "n_above_0.95", "ceiling"]
GRAPH_COLUMNS = ["precision", "recall", "f1", "average_precision", "density"]


@pytest.fixture(scope="module")
def _programs():
    adata = sae.datasets.simulate_programs(3_000, 60, n_programs=10, n_types=12)
    sae.tl.fit(adata, "X", n_features=24, k=4, steps=300, progress=False)
    sae.tl.encode(adata, progress=False)
    return adata


@pytest.fixture
def programs(_programs):
    return _programs.copy()


def of_numpy(z, x):
    """Correlations of columns; 0 for genes that no program drives."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(z.T, x.T)[: z.shape[1], z.shape[1] :])


def truth(adata):
    return {"X''": "programs", "X": "activity", "A": adata.obs["cell_type"], "B": "covariate"}


def test_each_column_follows_its_definition(programs):
    found = recovery(programs, truth(programs))
    assert list(found) == [
        "group",
        "variable",
        "feature",
        *FEATURE_COLUMNS[:3],
        "matched_feature",
        *FEATURE_COLUMNS[3:],
    ]
    assert found["group"].tolist() == ["X''"] * 10 + ["X"] * 10 + ["A"] * 12 + ["B"]
    assert found["variable"].tolist()[-13:] == [*(f"type_{i}" for i in range(12)), "covariate"]
    a = programs.obsm["sae"].toarray()
    types = pd.get_dummies(programs.obs["cell_type"]).to_numpy(dtype=float)
    parts = [programs.obsm["programs"], programs.obsm["activity"], types, programs.obs["covariate"].to_numpy()[:, None]]
    alive = np.flatnonzero(a.any(axis=0))
    for row, variable in zip(found.itertuples(index=False), np.hstack(parts).T, strict=True):
        r = np.zeros(a.shape[1])
        r[alive] = [stats.pearsonr(variable, a[:, j]).statistic for j in alive]
        best = np.abs(r).argmax()
        assert row.feature == f"sae_{best}"
        assert row.r == pytest.approx(r[best], abs=1e-6)
        assert row.abs_r == pytest.approx(np.abs(r).max(), abs=1e-6)
        assert row.signed_r == pytest.approx(r.max(), abs=1e-6)
        assert row[list(found).index("n_above_0.9")] == (np.abs(r) > 0.9).sum()
        assert row[list(found).index("n_above_0.95")] == (np.abs(r) > 0.95).sum()
        if row.matched > 0:
            assert row.matched == pytest.approx(abs(r[int(row.matched_feature.removeprefix("sae_"))]), abs=1e-6)
    for _, group in found.groupby("group", observed=True):
        assert group["matched_feature"].is_unique
        assert (group["matched"] <= group["abs_r"]).all()


def test_the_ceiling_is_the_held_out_multiple_correlation(programs):
    found = recovery(programs, {"X": "activity", "B": "covariate", "X''": "programs"})
    folds = KFold(5, shuffle=True, random_state=1)
    y = np.hstack([programs.obsm["activity"], programs.obs["covariate"].to_numpy()[:, None], programs.obsm["programs"]])
    # Of rank 10; what least squares does with more columns differs between versions.
    x = PCA(10, svd_solver="full").fit_transform(programs.X.astype(np.float64))
    predicted = cross_val_predict(LinearRegression(), x, y, cv=folds)
    r2 = r2_score(y, predicted, multioutput="raw_values")
    np.testing.assert_allclose(found["ceiling"] ** 2, np.maximum(r2, 0), atol=0.01)
    np.testing.assert_allclose(found["ceiling"][-10:], 1, atol=1e-6)
    assert recovery(programs, "programs", ceiling=False)["ceiling"].isna().all()


def test_the_summary_is_of_the_table(programs):
    table = recovery(programs, truth(programs), graph="programs", thresholds=(0.5, 0.8))
    found = recovery(programs, truth(programs), graph="programs", thresholds=(0.5, 0.8), summary=True).set_index(
        "group"
    )
    assert found.index.tolist() == ["X''", "X", "A", "B"]
    for group, part in table.groupby("group", observed=True):
        row = found.loc[group]
        assert row["n_variables"] == len(part)
        for name in ("abs_r", "signed_r"):
            assert row[f"mean_{name}"] == pytest.approx(part[name].mean())
            assert row[f"max_{name}"] == pytest.approx(part[name].max())
        assert row["matched"] == pytest.approx(part["matched"].mean())
        assert row["ceiling"] == pytest.approx(part["ceiling"].mean())
        for threshold in (0.5, 0.8):
            assert row[f"n_above_{threshold}"] == (part["abs_r"] > threshold).sum()
            assert row[f"n_matched_above_{threshold}"] == (part["matched"] > threshold).sum()
            assert row[f"features_per_variable_{threshold}"] == pytest.approx(part[f"n_above_{threshold}"].mean())
        assert row["f1"] == pytest.approx(part["f1"].mean(), nan_ok=True)
    assert found["n_above_0.5"].max() > 0
    assert found.loc["A", ["f1", "recall"]].isna().all()


def test_any_representation_can_be_judged(programs, tmp_path):
    found = recovery(programs, "programs", use_rep="programs")
    np.testing.assert_allclose(found[["r", "matched", "ceiling"]], 1, atol=1e-6)
    assert found["matched_feature"].tolist() == [f"programs_{i}" for i in range(10)]
    of_genes = recovery(programs, "programs", use_rep="X")
    assert set(of_genes["feature"]) <= set(programs.var_names)
    expected = np.abs(of_numpy(programs.obsm["programs"], programs.X))
    np.testing.assert_allclose(of_genes["abs_r"], expected.max(axis=1), atol=1e-5)
    programs.layers["sparse"] = sparse.csr_matrix(programs.X)
    of_layer = recovery(programs, "programs", layer="sparse")
    assert of_layer["feature"].tolist() == of_genes["feature"].tolist()
    np.testing.assert_allclose(of_layer["ceiling"], 1, atol=1e-6)
    programs.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    on_disk = recovery(backed, "programs", use_rep="X", graph="programs")
    in_memory = recovery(programs, "programs", use_rep="X", graph="programs")
    pd.testing.assert_frame_equal(on_disk, in_memory, rtol=1e-6)
    backed.file.close()


def test_truth_may_come_from_anywhere(programs):
    expected = recovery(programs, "programs")
    values = programs.obsm["programs"]
    table = pd.DataFrame(values, programs.obs_names, [f"p{i}" for i in range(10)]).sample(frac=1, random_state=0)
    for given in (values, sparse.csr_matrix(values), table):
        found = recovery(programs, given)
        assert set(found["group"]) == {"truth"}
        np.testing.assert_allclose(found["abs_r"], expected["abs_r"], atol=1e-9)
    assert found["variable"].tolist() == [f"p{i}" for i in range(10)]
    both = recovery(programs, ["programs", "covariate"])
    assert both["group"].tolist() == ["programs"] * 10 + ["covariate"]


# ---- Graphs


@pytest.mark.parametrize("edges", ["regression", "correlation", "cosine"])
def test_the_graph_of_the_matched_features(programs, edges):
    found = recovery(programs, "programs", graph="programs", edges=edges)
    assert list(found)[-5:] == GRAPH_COLUMNS
    known = programs.varm["programs"]
    np.testing.assert_allclose(found["density"], known.mean(axis=0))
    assert known.mean() < found["average_precision"].mean() <= 1
    # With as many edges as there are, the whole has as many false ones as are missed.
    n_true = known.sum(axis=0)
    hits = found["recall"] * n_true
    drawn = np.where(found["precision"] > 0, hits / found["precision"], 0)
    assert drawn.sum() <= n_true.sum() + 1e-6


def test_only_slopes_give_the_true_graph(programs):
    """With the programs themselves for features; a program that a cell uses with others correlates with the genes of those."""
    scores = {
        edges: recovery(programs, "programs", use_rep="programs", graph="programs", edges=edges)
        for edges in ("regression", "correlation", "cosine")
    }
    np.testing.assert_allclose(scores["regression"][["precision", "recall", "f1", "average_precision"]], 1)
    for edges in ("correlation", "cosine"):
        assert scores[edges]["f1"].mean() < 0.95
    r = of_numpy(programs.obsm["programs"], programs.X)
    for j, column in enumerate(programs.varm["programs"].T):
        expected = average_precision_score(column, r[j])
        assert scores["correlation"]["average_precision"].iloc[j] == pytest.approx(expected, abs=1e-4)


def test_a_feature_of_the_other_sign_has_its_edges_turned(programs):
    programs.obsm["negative"] = -programs.obsm["programs"]
    found = recovery(programs, "programs", use_rep="negative", graph="programs")
    np.testing.assert_allclose(found["r"], -1, atol=1e-6)
    np.testing.assert_allclose(found["f1"], 1)


def test_cut_is_the_share_of_edges(programs):
    arguments = {"use_rep": "programs", "graph": "programs", "edges": "correlation"}
    every = recovery(programs, "programs", cut=1.0, **arguments)
    np.testing.assert_allclose(every["recall"], 1)
    np.testing.assert_allclose(every["precision"], every["density"])
    few = recovery(programs, "programs", cut=0.01, **arguments)
    n_true = programs.varm["programs"].sum(axis=0)
    assert (few["recall"] * n_true).sum() <= round(0.01 * programs.varm["programs"].size)


def test_the_graph_may_be_given(programs):
    expected = recovery(programs, "programs", graph="programs")
    for graph in (programs.varm["programs"].astype(int), sparse.csr_matrix(programs.varm["programs"])):
        pd.testing.assert_frame_equal(recovery(programs, "programs", graph=graph), expected)


# ---- Around it


def test_the_table_survives_storage(programs, tmp_path, compare):
    before = compare.state(programs)
    tables = {
        "table": recovery(programs, truth(programs), graph="programs"),
        "summary": recovery(programs, truth(programs), graph="programs", summary=True),
    }
    compare.assert_same(before, compare.state(programs))
    assert [name for name in tables["table"] if tables["table"][name].dtype == "category"] == TEXT
    stored = ad.AnnData(uns=tables)
    for kind in ("h5ad", "zarr"):
        getattr(stored, f"write_{kind}")(tmp_path / kind)
        read = getattr(ad, f"read_{kind}")(tmp_path / kind)
        compare.assert_same(tables, dict(read.uns))


def test_mudata(programs):
    other = programs[::-1, :30].copy()
    other.var_names = [f"other_{name}" for name in other.var_names]
    mdata = mudata.MuData({"rna": programs, "other": other})
    alone = recovery(programs, "programs", graph="programs")
    pd.testing.assert_frame_equal(recovery(mdata, "programs", mod="rna", graph="programs"), alone)
    of_other = recovery(mdata, "programs", mod="rna", var_mod="other", graph="programs", ceiling=False)
    assert (of_other["density"] != alone["density"]).any()
    of_part = recovery(programs[:, :30].copy(), "programs", graph="programs", ceiling=False)
    pd.testing.assert_frame_equal(of_other, of_part, rtol=1e-6)


def test_fewer_features_than_variables(programs):
    programs.obsm["few"] = programs.obsm["programs"][:, :4]
    found = recovery(programs, "programs", use_rep="few", graph="programs")
    assert found["matched_feature"].isna().sum() == 6
    lacking = found["matched_feature"].isna()
    assert (found.loc[lacking, ["matched", "recall", "precision"]] == 0).all(axis=None)


def test_what_is_constant_counts_nowhere(programs, log):
    values = programs.obsm["programs"].copy()
    values[:, 3] = 2
    found = recovery(programs, values, graph="programs")
    assert found.drop(columns=["group", "variable"]).iloc[3].isna().all()
    assert found["abs_r"].notna().sum() == 9
    assert "1 of 10 variables of truth= are the same in all cells ('truth_3')" in log()
    assert recovery(programs, values, summary=True)["n_variables"].tolist() == [9]


def bad(**arguments):
    return lambda adata: recovery(adata, **{"truth": "programs", **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(bad(truth="nothing"), KeyError, "'nothing' is neither in adata.obs", id="no truth"),
        pytest.param(bad(truth={}), ValueError, "truth= is empty", id="empty"),
        pytest.param(bad(truth=np.ones(3_000)), ValueError, "no variable that differs", id="constant"),
        pytest.param(bad(truth=np.ones((9, 2))), ValueError, r"\(9, 2\); expected a row for each of", id="other cells"),
        pytest.param(bad(truth=np.full((3_000, 1), np.nan)), ValueError, "NaN or infinite for 3000", id="nan"),
        pytest.param(bad(key="other"), KeyError, "has no SAE 'other'", id="no SAE"),
        pytest.param(bad(use_rep="X_umap"), KeyError, "no 'X_umap'", id="no representation"),
        pytest.param(bad(thresholds=[1.5]), ValueError, "thresholds has 1.5", id="threshold"),
        pytest.param(bad(edges="cos"), ValueError, "edges='cos' is none of 'regression'", id="edges"),
        pytest.param(bad(cut=0), ValueError, "cut=0 is not a share", id="cut"),
        pytest.param(bad(graph="nothing"), KeyError, "varm has no 'nothing'; it has 'programs'", id="no graph"),
        pytest.param(
            bad(graph=np.ones((60, 7))), ValueError, r"\(60, 7\); expected the 60 genes", id="other variables"
        ),
        pytest.param(bad(graph=np.ones((9, 10))), ValueError, r"\(9, 10\); expected the 60 genes", id="other genes"),
        pytest.param(bad(graph="programs", var_mod="rna"), ValueError, "the data is an AnnData", id="modality"),
    ],
)
def test_bad_input(programs, call, error, message, compare):
    before = compare.state(programs)
    with pytest.raises(error, match=message):
        call(programs)
    compare.assert_same(before, compare.state(programs))


def test_too_few_cells(programs):
    with pytest.raises(
        ValueError, match="8 cells: a correlation needs three, and the linear ceiling 10.*ceiling=False"
    ):
        recovery(programs[:8].copy(), "programs")
    assert len(recovery(programs[:8].copy(), "programs", ceiling=False)) == 10
    with pytest.raises(ValueError, match="2 cells: a correlation needs three"):
        recovery(programs[:2].copy(), "programs", ceiling=False)


def test_too_many_columns_for_the_ceiling(programs, monkeypatch):
    monkeypatch.setattr("sae.core.probe.MAX_COLUMNS", 20)
    with pytest.raises(ValueError, match="ceiling of 60 columns is not computed; up to 20 are. Pass ceiling=False"):
        recovery(programs, "programs", use_rep="X")
    assert len(recovery(programs, "programs", use_rep="X", ceiling=False)) == 10
