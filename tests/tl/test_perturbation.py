from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import zarr
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

import sae
from sae.tl._perturbation import FEATURES, SUMMARY, TARGETS, perturbation

DATA = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
QUICK = {"progress": False, "n_permutations": 50}
TEXT = ("perturbation", "feature", "groupby", "status", "best_feature", "target", "target_status", "target_feature")
INTEGERS = ("n_cells", "n_control", "n_responding", "n_targets")


@pytest.fixture(scope="module")
def _fitted_cells():
    """600 cells with an SAE of 60 features, whose activations the tests replace."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.zeros((600, 30), np.float32), obs=pd.DataFrame(index=[f"cell{i}" for i in range(600)]))
    adata.var_names = [f"g{i}" for i in range(30)]
    adata.obsm["X_pca"] = rng.normal(size=(600, 6)).astype(np.float32)
    sae.tl.fit(adata, n_features=60, steps=20, progress=False)
    sae.tl.encode(adata, progress=False)
    return adata


@pytest.fixture
def screen(_fitted_cells):
    """Knock-outs of g0 to g2, each of which lowers the feature of its number, and of g3, which lowers nothing else.

    Features 0 to 2 follow their genes in all cells. Batches differ in features 10 to 19.
    """
    adata, rng = _fitted_cells.copy(), np.random.default_rng(1)
    label, batch = rng.integers(6, size=600), rng.integers(2, size=600)
    x = rng.gamma(4, 0.5, size=(600, 30))
    a = np.where(rng.random((600, 60)) < 0.6, rng.exponential(size=(600, 60)), 0)
    a[:, 10:20] += 2.0 * batch[:, None]
    for gene in range(3):
        a[:, gene] = np.maximum(x[:, gene] - 1 + rng.normal(0, 0.2, size=600), 0)
        a[label == gene, gene] *= 0.2
    for gene in range(4):
        x[label == gene, gene] *= 0.1
    adata.X, adata.obsm["sae"] = x.astype(np.float32), sparse.csr_matrix(a.astype(np.float32))
    adata.obs["gene"] = pd.Categorical(np.array(["g0", "g1", "g2", "g3", "none", "none"])[label])
    adata.obs["guide"] = np.array(["g0", "g1", "g2", "g3", "none", "none"])[label] + pd.Series(
        np.where(rng.random(600) < 0.5, "_1", "_2"), index=adata.obs_names
    )
    adata.obs["batch"] = pd.Categorical(np.array(["x", "y"])[batch])
    return adata


def tables(data, key="sae", mod=None):
    holder = data if mod is None else data[mod]
    return holder.uns[key]["perturbation"]


def of(table, name, column="perturbation"):
    return table[table[column] == name].reset_index(drop=True)


# ---- Tables


def test_writes_three_tables_and_nothing_else(screen, compare):
    before = compare.state(screen)
    assert perturbation(screen, "gene", "none", **QUICK) is None
    found = screen.uns["sae"].pop("perturbation")
    compare.assert_same(before, compare.state(screen))
    assert list(found) == ["features", "summary", "targets"]
    for table, columns in zip(found.values(), (FEATURES, SUMMARY, TARGETS), strict=True):
        assert list(table) == list(columns)
        assert table.index.tolist() == [str(i) for i in range(len(table))]
        for column, dtype in table.dtypes.astype(str).items():
            kind = "category" if column in TEXT else "bool" if column == "responds" else "float64"
            assert dtype == ("int64" if column in INTEGERS else kind)
    assert len(found["features"]) == 4 * 60 and len(found["summary"]) == 4 and len(found["targets"]) == 1


def test_finds_what_responds_and_its_target(screen):
    perturbation(screen, "gene", "none", **QUICK)
    features, summary, targets = tables(screen).values()
    for gene in range(3):
        row = summary.iloc[gene]
        assert row["perturbation"] == f"g{gene}" and row["best_feature"] == row["target_feature"] == f"sae_{gene}"
        assert row["target"] == f"g{gene}" and row["target_status"] == "placed" and row["status"] == "tested"
        assert (row["target_rank"], row["target_percentile"]) == (1, 1)
        assert row["target_log2fc"] < -2 and row["target_correlation"] > 0.8 and row["best_auroc"] < 0.3
        assert row["pval"] == pytest.approx(1 / 51) and row["n_responding"] >= 1 > row["n_permuted"]
        assert 1 / 51 <= row["target_pval"] <= 0.15
        assert of(features, f"g{gene}")["responds"].sum() == row["n_responding"]
        assert of(features, f"g{gene}")["difference"].argmin() == gene
    nothing = summary.iloc[3]
    assert nothing["n_responding"] == 0 and nothing["padj"] > 0.05 and nothing["best_fdr"] > 0.05
    assert nothing["target"] == "g3" and nothing["target_status"] == "no feature responds"
    assert nothing["target_log2fc"] < -2 and pd.isna(nothing["target_feature"]) and np.isnan(nothing["target_rank"])
    row = targets.iloc[0]
    assert (row["n_targets"], row["percentile"]) == (3, 1)
    assert row["expected"] < 0.7 and row["pval_random"] < 0.01 and row["pval_exchanged"] < 0.3


def test_agrees_with_scipy_and_scikit_learn(encoded):
    perturbation(encoded, "bulk_labels", "CD14+ Monocyte", **QUICK)
    features, summary, _ = tables(encoded).values()
    labels, n_checked = encoded.obs["bulk_labels"].astype(str).to_numpy(), 0
    a = encoded.obsm["sae"].toarray().astype(np.float64)
    for row in features.itertuples():
        inside, outside = labels == row.perturbation, labels == "CD14+ Monocyte"
        x = a[:, int(row.feature.split("_")[1])]
        assert row.auroc == pytest.approx(roc_auc_score(inside[inside | outside], x[inside | outside]))
        assert row.difference == pytest.approx(x[inside].mean() - x[outside].mean(), abs=1e-9)
        assert row.active == pytest.approx((x[inside] > 0).mean())
        assert row.control_active == pytest.approx((x[outside] > 0).mean())
        if (x[inside | outside] > 0).mean() * min(inside.sum(), outside.sum()) >= 30:
            test = stats.mannwhitneyu(x[inside], x[outside], method="asymptotic")
            assert row.pval == pytest.approx(test.pvalue, rel=1e-6)
            n_checked += 1
    assert n_checked > 20
    np.testing.assert_allclose(features["padj"], stats.false_discovery_control(features["pval"]), rtol=1e-9)
    tested = summary[summary["status"] == "tested"]
    assert len(tested) == len(summary) - 1
    np.testing.assert_allclose(tested["padj"], stats.false_discovery_control(tested["pval"]), rtol=1e-9)
    counts = encoded.obs["bulk_labels"].value_counts()
    assert summary["n_cells"].tolist() == counts[summary["perturbation"].astype(str)].tolist()
    assert (summary["n_control"] == counts["CD14+ Monocyte"]).all()
    assert summary["target_status"].eq("not measured").all()


def test_genes_are_those_of_other_cells(screen):
    perturbation(screen, "gene", "none", batch="batch", **QUICK)
    row = tables(screen)["summary"].iloc[1]
    kept = (screen.obs["gene"] != "g1").to_numpy()
    values = pd.DataFrame(screen.X[kept], columns=screen.var_names).astype(float)
    values["feature"] = screen.obsm["sae"][kept][:, [1]].toarray().ravel()
    batch = screen.obs["batch"].to_numpy()[kept]
    r = (values - values.groupby(batch).transform("mean")).corr()["feature"].drop("feature")
    assert row["target_correlation"] == pytest.approx(r["g1"], abs=1e-6)
    assert row["target_rank"] == r.abs().rank(ascending=False)["g1"]
    means = {name: np.expm1(screen.X[screen.obs["gene"] == name, 1].mean(dtype=float)) for name in ("g1", "none")}
    assert row["target_log2fc"] == pytest.approx(np.log2((means["g1"] + 0.1) / (means["none"] + 0.1)), rel=1e-5)


def test_guides_of_one_target_are_left_out_together(screen):
    controls = ["none_1", "none_2"]
    perturbation(screen, "guide", controls, target="gene", **QUICK)
    summary = tables(screen)["summary"]
    assert summary["perturbation"].tolist() == [f"g{i}_{j}" for i in range(4) for j in (1, 2)]
    kept = (screen.obs["gene"] != "g1").to_numpy()
    a = screen.obsm["sae"][kept][:, [1]].toarray().ravel()
    expected = np.corrcoef(a, screen.X[kept, 1])[0, 1]
    np.testing.assert_allclose(summary["target_correlation"][2:4], expected, rtol=1e-5)
    assert (summary["n_control"] == (screen.obs["gene"] == "none").sum()).all()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"g0": "g5", "g1": ["g7", "g1", "missing"]}, ["g5", "g1", None, None]),
        ("gene", ["g0", "g1", "g2", "g3"]),
        (None, ["g0", "g1", "g2", "g3"]),
    ],
    ids=["dict", "column", "label"],
)
def test_targets(screen, target, expected):
    perturbation(screen, "gene", "none", target=target, **QUICK)
    found = tables(screen)["summary"]["target"].astype(object)
    assert found.where(found.notna(), None).tolist() == expected


def test_layer_and_raw_are_read(screen):
    screen.layers["other"] = screen.X[:, ::-1].copy()
    perturbation(screen, "gene", "none", layer="other", **QUICK)
    assert tables(screen)["summary"]["target_rank"].iloc[0] > 1
    screen.raw = screen.copy()
    screen = screen[:, ["g29"]].copy()
    perturbation(screen, "gene", "none", **QUICK)
    assert tables(screen)["summary"]["target_rank"].iloc[0] == 1


# ---- Cells


def test_batches_are_compared_apart(screen):
    """Batch y has more of features 10 to 19, and all cells of one perturbation."""
    rng = np.random.default_rng(0)
    y = (screen.obs["batch"] == "y").to_numpy()
    screen.obs["drug"] = np.where(rng.random(600) < np.where(y, 0.7, 0.2), "drug", "vehicle")
    found = {}
    for batch in (None, "batch"):
        perturbation(screen, "drug", "vehicle", batch=batch, **QUICK)
        found[batch] = tables(screen)["features"].set_index("feature")["responds"]
    assert found[None][[f"sae_{i}" for i in range(10, 20)]].all()
    assert found["batch"].sum() <= 2


def test_batches_without_controls_do_not_count(screen, log):
    screen.obs["batch"] = screen.obs["batch"].astype(str)
    rows = (screen.obs["gene"] == "g0").to_numpy()
    screen.obs.loc[screen.obs_names[rows], "batch"] = "alone"
    screen.obs.loc[screen.obs_names[rows][:30], "batch"] = "x"
    screen.obs.loc[screen.obs["gene"] == "g1", "batch"] = "alone"
    perturbation(screen, "gene", "none", batch="batch", **QUICK)
    summary = tables(screen)["summary"]
    assert summary["n_cells"].tolist()[:2] == [30, 0]
    assert summary["n_control"].iloc[0] == ((screen.obs["gene"] == "none") & (screen.obs["batch"] == "x")).sum()
    why = "fewer than 10 cells or controls in values of 'batch' that have both"
    assert summary["status"].tolist() == ["tested", why, "tested", "tested"]
    assert f"1 perturbations of 'gene' were skipped, with {why}: 'g1'" in log()
    assert summary.loc["1", ["pval", "padj", "n_permuted", "best_auroc"]].isna().all()
    assert "g1" not in set(tables(screen)["features"]["perturbation"])


def test_cells_without_a_label_are_left_out(screen):
    screen.obs["known"] = screen.obs["gene"].astype(object)
    screen.obs.loc[screen.obs_names[::7], "known"] = np.nan
    screen.obs.loc[screen.obs_names[::7], "batch"] = np.nan
    perturbation(screen, "known", "none", batch="batch", **QUICK)
    kept = screen[screen.obs["known"].notna()].copy()
    perturbation(kept, "known", "none", batch="batch", **QUICK)
    for name in ("features", "summary", "targets"):
        pd.testing.assert_frame_equal(tables(screen)[name], tables(kept)[name])


def test_perturbation_without_any_active_feature(screen):
    silent = screen.obs["gene"].isin(["g3", "none"]).to_numpy()
    screen.obsm["sae"] = sparse.csr_matrix(screen.obsm["sae"].toarray() * ~silent[:, None])
    perturbation(screen, "gene", "none", **QUICK)
    features, summary, _ = tables(screen).values()
    assert summary["status"].tolist() == ["tested"] * 3 + ["no feature differs between enough cells"]
    assert summary["n_responding"].iloc[3] == 0 and np.isnan(summary["pval"].iloc[3])
    assert "g3" not in set(features["perturbation"])


@pytest.mark.parametrize("control", [False, "False"])
def test_boolean_column(screen, control):
    screen.obs["treated"] = (screen.obs["gene"] == "g0").to_numpy()
    perturbation(screen, "treated", control, **QUICK)
    assert tables(screen)["summary"]["perturbation"].tolist() == ["True"]
    assert tables(screen)["targets"]["n_targets"].tolist() == [0]


def test_permuted_labels_find_nothing(screen):
    rng, below, responding, found = np.random.default_rng(2), [], [], []
    for seed in range(30):
        screen.obs["permuted"] = rng.permutation(screen.obs["gene"].to_numpy())
        perturbation(screen, "permuted", "none", rng=seed, progress=False, n_permutations=100)
        features, summary, _ = tables(screen).values()
        below.append((features["pval"] < 0.05).mean())
        responding.append((summary["n_responding"] > 0).mean())
        found.append((summary["padj"] <= 0.05).any())
    assert np.mean(below) == pytest.approx(0.05, abs=0.01)
    # Of each perturbation by itself, and of all perturbations together.
    assert np.mean(responding) <= 0.1
    assert np.mean(found) <= 0.15


# ---- State


def test_another_groupby_keeps_rows(screen):
    perturbation(screen, "gene", "none", **QUICK)
    first = {name: table.copy() for name, table in tables(screen).items()}
    perturbation(screen, "guide", ["none_1", "none_2"], target="gene", **QUICK)
    for name, table in tables(screen).items():
        assert set(table["groupby"]) == {"gene", "guide"}
        kept = of(table, "gene", "groupby")
        assert kept.astype(object).equals(first[name].reset_index(drop=True).astype(object))
    n_rows = len(tables(screen)["features"])
    perturbation(screen, "gene", "none", **QUICK)
    assert len(tables(screen)["features"]) == n_rows


def test_the_same_seed_gives_the_same_and_touches_nothing_global(screen, compare):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    found = []
    for seed in (0, 0, 1):
        perturbation(screen, "gene", "none", rng=seed, **QUICK)
        found.append(tables(screen))
    assert (np.random.get_state()[1] == before).all()
    compare.assert_same(found[0], found[1])
    assert not found[0]["features"]["fdr"].equals(found[2]["features"]["fdr"])
    perturbation(screen, "gene", "none", rng=np.random.default_rng(0), **QUICK)
    compare.assert_same(found[0], tables(screen))


@pytest.mark.parametrize("layout", [sparse.csr_matrix, sparse.csc_matrix], ids=["CSR", "CSC"])
def test_sparse_expression(screen, layout):
    perturbation(screen, "gene", "none", batch="batch", **QUICK)
    other = screen.copy()
    other.X = layout(screen.X)
    perturbation(other, "gene", "none", batch="batch", **QUICK)
    for name in ("features", "summary", "targets"):
        pd.testing.assert_frame_equal(tables(screen)[name], tables(other)[name], rtol=1e-9)


def test_backed(screen, tmp_path):
    perturbation(screen, "gene", "none", **QUICK)
    expected = tables(screen)
    del screen.uns["sae"]["perturbation"]
    screen.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    perturbation(backed, "gene", "none", **QUICK)
    for name in ("features", "summary", "targets"):
        pd.testing.assert_frame_equal(expected[name], tables(backed)[name], rtol=1e-9)
    backed.file.close()


@pytest.mark.parametrize("through", ["h5ad", "zarr"])
def test_round_trip(screen, through, tmp_path, compare):
    screen.obs["nothing"] = np.where(np.arange(600) % 2, "drug", "vehicle")
    perturbation(screen, "gene", "none", **QUICK)
    perturbation(screen, "nothing", "vehicle", **QUICK)
    assert tables(screen)["summary"]["target"].isna().any()
    if through == "h5ad":
        screen.write_h5ad(tmp_path / "cells.h5ad")
        read = ad.read_h5ad(tmp_path / "cells.h5ad")
    else:
        store = zarr.storage.MemoryStore()
        screen.write_zarr(store)
        read = ad.read_zarr(store)
    compare.assert_same(screen.uns["sae"], read.uns["sae"])
    for adata in (screen, read):
        perturbation(adata, "guide", ["none_1", "none_2"], target="gene", **QUICK)
    compare.assert_same(tables(screen), tables(read))


def test_without_any_target_anywhere(screen, tmp_path, compare):
    """All targets missing: columns of nothing are stored and read."""
    screen.obs["nothing"] = np.where(np.arange(600) % 2, "drug", "vehicle")
    perturbation(screen, "nothing", "vehicle", **QUICK)
    screen.write_h5ad(tmp_path / "cells.h5ad")
    compare.assert_same(tables(screen), tables(ad.read_h5ad(tmp_path / "cells.h5ad")))


def test_expression_is_not_needed_without_targets(screen):
    screen.X = None
    screen.obs["nothing"] = np.where(np.arange(600) % 2, "drug", "vehicle")
    perturbation(screen, "nothing", "vehicle", **QUICK)
    assert tables(screen)["summary"]["status"].tolist() == ["tested"]


@pytest.mark.parametrize("joint", [False, True], ids=["modality", "joint"])
def test_mudata(screen, joint):
    """The genes are those of another modality, which lacks some of the cells and has the others in another order."""
    rna = ad.AnnData(screen.X, obs=screen.obs[[]], var=screen.var)[590:20:-1].copy()
    surface = ad.AnnData(np.zeros((600, 1), np.float32), obs=screen.obs, uns=screen.uns, obsm=dict(screen.obsm))
    mdata = mudata.MuData({"rna": rna, "surface": surface})
    where = {} if joint else {"mod": "surface"}
    if joint:
        mdata.uns["sae"] = surface.uns.pop("sae")
        mdata.obsm["sae"] = surface.obsm.pop("sae")[surface.obs_names.get_indexer(mdata.obs_names)]
        mdata.obsm["X_pca"] = surface.obsm["X_pca"][surface.obs_names.get_indexer(mdata.obs_names)]
        mdata.obs["gene"] = surface.obs["gene"].reindex(mdata.obs_names)
    perturbation(mdata, "gene", "none", var_mod="rna", **where, **QUICK)
    summary = tables(mdata, mod=where.get("mod"))["summary"]
    kept = screen[rna.obs_names].copy()
    a = kept.obsm["sae"][:, [1]].toarray().ravel()
    others = (kept.obs["gene"] != "g1").to_numpy()
    assert summary["target_rank"].tolist()[:3] == [1, 1, 1]
    assert summary["n_cells"].sum() + summary["n_control"].iloc[0] == 600
    assert summary["target_correlation"].iloc[1] == pytest.approx(
        np.corrcoef(a[others], kept.X[others, 1])[0, 1], rel=1e-5
    )
    perturbation(mdata, "gene", "none", **where, **QUICK)
    assert tables(mdata, mod=where.get("mod"))["summary"]["target"].isna().all()


# ---- Bad input


def broken(adata, kind):
    if kind == "float":
        adata.obs["gene"] = np.linspace(0, 1, 600)
    elif kind == "same text":
        adata.obs["gene"] = pd.Categorical([1, "1", "none"] * 200, categories=[1, "1", "none"])
    elif kind == "batch":
        adata.obs.loc[adata.obs_names[:5], "batch"] = np.nan
    elif kind == "nan":
        adata.X[3, 4] = np.nan
    elif kind == "encode":
        del adata.obsm["sae"]
    elif kind == "few":
        adata.obs["gene"] = np.where(np.arange(600) < 4, "none", "g0")
    elif kind == "one":
        adata.obs["gene"] = "none"
    elif kind == "rare":
        adata.obs["gene"] = np.where(np.arange(600) < 4, "g0", "none")
    return adata


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("", {"groupby": "guides"}, KeyError, "no column 'guides'; it has 'gene', 'guide', 'batch'"),
        ("", {"control": "NT"}, ValueError, "no cells of the control 'NT'; it has 'g0', 'g1', 'g2', 'g3', 'none'"),
        ("", {"control": ["none", "x"]}, ValueError, "no cells of the control 'x'"),
        ("", {"control": []}, ValueError, "no cells of the control none"),
        ("", {"control": ["none", "g0", "g1", "g2", "g3"]}, ValueError, "only the control"),
        ("one", {}, ValueError, "has only the control 'none'; a perturbation is needed"),
        ("float", {}, ValueError, "is continuous"),
        ("same text", {}, ValueError, "read the same as text"),
        ("few", {}, ValueError, "has 4 control cells"),
        ("rare", {}, ValueError, "no perturbation to compare: 'g0' have fewer than 10 cells"),
        ("", {"batch": "plate"}, KeyError, "no column 'plate'"),
        ("batch", {"batch": "batch"}, ValueError, "missing for 5 of the 600 cells"),
        ("", {"target": "genes"}, KeyError, "no column 'genes'.*as target="),
        ("", {"target": {"g9": "g1"}}, KeyError, "target= names 'g9'; the perturbations of .* are 'g0'"),
        ("", {"target": {"g0": "GAPDH"}}, ValueError, "none of the targets .'GAPDH'.* 30 genes, such as 'g0'"),
        ("", {"layer": "counts"}, KeyError, "no 'counts'"),
        ("", {"var_mod": "rna"}, ValueError, "var_mod='rna' names a modality"),
        ("", {"mod": "rna"}, ValueError, "mod='rna' names a modality"),
        ("", {"min_cells": 1}, ValueError, "min_cells=1 is not an integer of 2 or more"),
        ("", {"n_permutations": 0}, ValueError, "n_permutations=0 is not an integer of 1 or more"),
        ("", {"n_permutations": 20.0}, ValueError, r"n_permutations=20\.0 is not an integer"),
        ("", {"max_fdr": 5}, ValueError, "max_fdr=5 is not a rate"),
        ("", {"key": "other"}, KeyError, "no SAE 'other'"),
        ("nan", {}, ValueError, "NaN or infinite"),
        ("encode", {}, KeyError, "no activations 'sae'. Run sae.tl.encode"),
    ],
)
def test_bad_input(screen, compare, kind, arguments, error, message):
    screen = broken(screen, kind)
    before = compare.state(screen)
    with pytest.raises(error, match=message):
        perturbation(screen, **({"groupby": "gene", "control": "none"} | QUICK | arguments))
    compare.assert_same(before, compare.state(screen))


# ---- Real cells


def read(name, **settings):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}; set SAE_TEST_DATA to the folder that has it")
    adata = ad.read_h5ad(DATA / name)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=50)
    sae.tl.fit(adata, progress=False, **settings)
    sae.tl.encode(adata, progress=False)
    return adata


def test_knock_outs_of_the_interferon_pathway():
    adata = read("papalexi21_eccite_crispr_counts.h5ad")
    perturbation(adata, "perturbation", "non-targeting", batch="bio_rep", progress=False)
    features, summary, targets = tables(adata).values()
    features = features.assign(size=features["score"].abs()).sort_values("size", ascending=False)
    strongest = features.groupby("perturbation", observed=True, sort=False).head(5)
    pathway = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1"]
    assert set(features["perturbation"].drop_duplicates().head(4)) == set(pathway[:4])
    known = summary.set_index(summary["perturbation"].astype(str))
    assert (known.loc[pathway, "padj"] <= 0.05).all() and (known.loc[pathway, "n_responding"] >= 10).all()
    assert (known["n_responding"] == 0).sum() >= 11
    # The receptors, the kinase and the transcription factor share their features.
    tops = [set(of(strongest, name)["feature"]) for name in pathway[:4]]
    assert len(set.intersection(*tops)) >= 3
    assert known.loc["JAK2", "target_rank"] <= 5 and known.loc["JAK2", "target_pval"] <= 0.05
    assert targets["percentile"].iloc[0] > targets["expected"].iloc[0]

    # The genes of these features, in cells of other perturbations, are those of the response to interferon gamma.
    response = {"BTG1", "IL2RB", "JAK2", "NFKBIA", "PSMB9", "RNF31", "STAT1", "STAT2", "STAT3", "UBE2L6"}
    others = adata[~adata.obs["perturbation"].isin(pathway)].copy()
    sae.tl.rank_genes(others, n_genes=10, batch="bio_rep", progress=False)
    lowered = [name for name in set.intersection(*tops) if of(features, name, "feature")["score"].iloc[0] < 0]
    found = [set(sae.get.genes(others, name, direction="up", n=10)["gene"]) & response for name in lowered]
    assert max(map(len, found)) >= 3


def test_interferon_beta_within_donors_and_cell_types():
    adata = read("kang18_pbmc_ifnb_muscat_counts_labeled.h5ad", steps=800)
    adata.obs["batch"] = adata.obs["sample"].astype(str).str[-3:] + " " + adata.obs["cell_type"].astype(str)
    perturbation(adata, "condition", "ctrl", batch="batch", progress=False)
    features, summary, _ = tables(adata).values()
    assert summary["n_cells"].tolist() == [806] and summary["pval"].iloc[0] < 0.01
    raised = features.sort_values("auroc").tail(2)
    assert raised["responds"].all() and (raised["auroc"] > 0.75).all()
    sae.tl.rank_genes(adata, n_genes=10, batch="batch", progress=False)
    for feature in raised["feature"]:
        genes = sae.get.genes(adata, feature, direction="up", n=10)["gene"]
        assert len({"ISG15", "IFI6", "IFIT1", "IFIT3", "MX1", "LY6E", "ISG20"} & set(genes)) >= 4
