from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import sae
from sae.datasets import simulate_differentiation

ERYTHROID = ["HSC", "MK/E progenitor", "proerythroblast", "erythroblast", "normoblast"]
ON_ANY_BRANCH = ["stem", "cell cycle", "interferon", "early response"]


@pytest.fixture(scope="module")
def cells():
    return simulate_differentiation()


def means(adata, by="cell_type"):
    return adata.obsm["programs"].groupby(adata.obs[by], observed=True).mean()


def test_what_it_holds(cells):
    assert cells.shape == (3_000, 800)
    assert isinstance(cells.X, sparse.csr_matrix)
    assert cells.X.dtype == np.float32
    counts = cells.layers["counts"]
    assert (counts.data == counts.data.round()).all()
    again = ad.AnnData(counts.copy())
    sc.pp.normalize_total(again, target_sum=1e4)
    sc.pp.log1p(again)
    np.testing.assert_allclose(cells.X.toarray(), again.X.toarray(), rtol=1e-4)
    assert cells.uns["log1p"] == {"base": None}
    assert cells.var_names.is_unique
    assert cells.obsm["programs"].columns.equals(cells.varm["programs"].columns)
    assert not cells.obsm["programs"].columns.str.contains("/").any()


def test_stages_follow_one_another_on_each_branch(cells):
    obs = cells.obs
    assert list(obs["cell_type"].cat.categories[:5]) == ERYTHROID
    assert obs["cell_type"].value_counts().min() > 100
    stem = obs["time"] < 0.2
    assert (obs["cell_type"][stem] == "HSC").all()
    assert (obs["branch"][stem] == "stem").all()
    assert not (obs["branch"][~stem] == "stem").any()
    assert not (obs["cell_type"][~stem] == "HSC").any()
    begins = obs.groupby("cell_type", observed=True)["time"].min()[ERYTHROID]
    np.testing.assert_allclose(begins, [0, 0.2, 0.4, 0.6, 0.8], atol=0.02)
    for _, branch in obs[~stem].groupby("branch", observed=True):
        stages = branch.groupby("cell_type", observed=True)["time"].agg(["min", "max"])
        assert len(stages) >= 2
        assert stages["min"].is_monotonic_increasing
        assert (stages["max"].to_numpy()[:-1] < stages["min"].to_numpy()[1:]).all()


def test_programs_are_on_where_and_when_they_should(cells):
    assert means(cells).drop(columns=["antigen presentation", *ON_ANY_BRANCH[1:]]).idxmax().to_dict() == {
        "stem": "HSC",
        "megakaryocyte-erythroid": "MK/E progenitor",
        "erythroid commitment": "proerythroblast",
        "heme": "erythroblast",
        "oxygen transport": "normoblast",
        "red-cell membrane": "normoblast",
        "granule": "G/M progenitor",
        "monocyte": "monocyte",
        "lymphoid": "lymphoid progenitor",
        "pro-B": "pro-B cell",
        "B cell": "B cell",
    }
    rising = means(cells)["oxygen transport"][ERYTHROID].to_numpy()
    assert (np.diff(rising) > 0).all()
    elsewhere = means(cells[cells.obs["time"] > 0.5], "branch") < 1e-12
    assert elsewhere.drop(columns=ON_ANY_BRANCH).sum().to_dict() == {
        name: 1 if name == "antigen presentation" else 2 for name in elsewhere.columns.drop(ON_ANY_BRANCH)
    }
    shares = (cells.obsm["programs"][ON_ANY_BRANCH[1:]] > 0).mean()
    np.testing.assert_allclose(shares, [0.5, 0.1, 0.25], atol=0.03)


def test_activities_differ_between_cells_as_asked(cells):
    same = simulate_differentiation(activity_sd=0)
    ratio = np.log(cells.obsm["programs"] / same.obsm["programs"].where(same.obsm["programs"] > 0))
    np.testing.assert_allclose(ratio.std(), 0.3, rtol=0.1)
    np.testing.assert_allclose(ratio.mean(), 0, atol=0.05)


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_counts(dispersion):
    """Of stem cells that differ in nothing else, counts follow the weights, with the variance asked for."""
    adata = simulate_differentiation(4_000, 300, depth=2_000, dispersion=dispersion, library_sd=0, activity_sd=0, rng=1)
    programs, weights = adata.obsm["programs"], adata.varm["programs"]
    counts = adata.layers["counts"].toarray().astype(float)
    assert counts.sum(axis=1).mean() == pytest.approx(2_000, rel=0.01)
    same = (adata.obs["time"] < 0.08) & (programs[ON_ANY_BRANCH[1:]] == 0).all(axis=1)
    assert same.sum() > 100
    inside = counts[same]
    seen = inside.mean(axis=0) > 1
    mean, spread = inside[:, seen].mean(axis=0), inside[:, seen].var(axis=0)
    # v = m + φ m², from all genes at once.
    assert (spread - mean).sum() / (mean**2).sum() == pytest.approx(dispersion, abs=0.05)
    # Stem genes stand to each other as their weights do, beside what every cell has.
    stem = weights.index[(weights["stem"] > 0) & ~weights.index.str.startswith("gene_")]
    expected = weights.loc[stem, "stem"].to_numpy()
    found = inside[:, adata.var_names.get_indexer(stem)].mean(axis=0)
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_library_sizes_differ_as_asked():
    totals = [
        np.asarray(simulate_differentiation(2_000, library_sd=sd, rng=2).layers["counts"].sum(axis=1)).ravel()
        for sd in (0.0, 0.5)
    ]
    assert np.log(totals[0]).std() < 0.15
    assert np.log(totals[1]).std() == pytest.approx(0.5, abs=0.07)
    assert totals[1].mean() == pytest.approx(4_000, rel=0.05)


def test_a_seed_makes_the_same_cells_and_genes_do_not_depend_on_their_number():
    one, other, third, more = (simulate_differentiation(n, rng=rng) for n, rng in ((60, 3), (60, 3), (60, 4), (90, 3)))
    assert (one.X != other.X).nnz == 0
    pd.testing.assert_frame_equal(one.obs, other.obs)
    assert (one.X != third.X).nnz > 0
    pd.testing.assert_frame_equal(one.varm["programs"], more.varm["programs"])
    drawn = simulate_differentiation(60, rng=np.random.default_rng(5))
    repeated = simulate_differentiation(60, rng=drawn.uns["simulation"]["seed"])
    assert (drawn.X != repeated.X).nnz == 0


def test_genes_with_names_alone():
    adata = simulate_differentiation(50, 211)
    assert not adata.var_names.str.startswith("gene_").any()
    assert (adata.varm["programs"] > 0).any(axis=1).sum() == 211 - 19


def test_gene_sets_that_come_with_the_package_are_in_it(cells):
    net = sae.datasets.immune_markers()
    known = net[net["target"].isin(cells.var_names)].groupby("source").size()
    assert (known[["Erythroid cell", "CD14+ monocyte", "B cell", "CD34+ progenitor"]] >= 8).all()


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_it_can_be_stored(cells, tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    few = cells[:50].copy()
    getattr(few, f"write_{suffix}")(path)
    again = getattr(ad, f"read_{suffix}")(path)
    pd.testing.assert_frame_equal(again.obsm["programs"], few.obsm["programs"])
    assert list(again.obs["cell_type"].cat.categories)[0] == "HSC"


def test_an_sae_finds_the_red_cells_and_the_programs(cells):
    adata = cells.copy()
    sc.pp.pca(adata, n_comps=30)
    sae.tl.fit(adata, n_features=32, steps=400, progress=False)
    sae.tl.encode(adata)
    sae.tl.score_labels(adata, "cell_type", order=ERYTHROID)
    assert sae.get.label_summary(adata, label="normoblast")["held_out_auroc"].iloc[0] > 0.9
    assert sae.get.features(adata)["cell_type_trend_score"].max() > 20
    found = sae.tl.recovery(adata, "programs", graph="programs")
    assert found["variable"].tolist() == list(adata.obsm["programs"].columns)
    assert found["ceiling"].min() > 0.85
    assert found["abs_r"].mean() > 0.6


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_cells": 0}, ValueError, "n_cells=0 is below 1"),
        ({"n_cells": 1.5}, TypeError, "n_cells=1.5 is a float; expected an integer"),
        ({"n_genes": 100}, ValueError, "n_genes=100 is less than the 211 genes with names"),
        ({"depth": 0}, ValueError, "depth=0 leaves no counts"),
        ({"dispersion": -1}, ValueError, "dispersion=-1 is not a number from 0 up"),
        ({"library_sd": np.inf}, ValueError, "library_sd=inf is not"),
        ({"activity_sd": -0.1}, ValueError, "activity_sd=-0.1 is not"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        simulate_differentiation(**{"n_cells": 20, **options})
