from __future__ import annotations

import random

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import sae

COLUMNS = ["map_x", "map_y", "module"]


@pytest.fixture(scope="module")
def _mapped(_analysed):
    adata = _analysed.copy()
    sae.tl.feature_map(adata, n_neighbors=5)
    return adata


@pytest.fixture
def mapped(_mapped):
    return _mapped.copy()


def test_map_is_stored(analysed, compare):
    analysed.uns["sae"].pop("feature_map", None)
    analysed.uns["sae"]["features"] = sae.get.features(analysed).drop(columns=COLUMNS, errors="ignore")
    before = compare.state(analysed)
    sae.tl.feature_map(analysed, n_neighbors=4, resolution=2)
    after = compare.state(analysed)
    new, old = after["uns"]["sae"], before["uns"]["sae"]
    table = new["features"]
    assert list(table.columns) == [*old["features"].columns, *COLUMNS]
    live = ~table["dead"]
    assert table.loc[live, COLUMNS].notna().all(axis=None) and table.loc[~live, COLUMNS].isna().all(axis=None)
    sizes = table["module"].value_counts(sort=False)
    assert sizes.index.tolist() == [str(i) for i in range(len(sizes))]
    assert (np.diff(sizes) <= 0).all() and sizes.sum() == live.sum()
    stored = new.pop("feature_map")
    assert stored["params"] == {"space": "coactivation", "n_neighbors": 4, "resolution": 2.0, "seed": 0}
    neighbors = stored["neighbors"]
    assert neighbors.columns.tolist() == ["feature", "neighbor", "similarity"]
    new["features"] = table.drop(columns=COLUMNS)
    compare.assert_same(before, after)


def test_similarity_is_correlation(mapped):
    a = mapped.obsm["sae"].toarray()
    r = pd.DataFrame(np.corrcoef(a[:, a.any(axis=0)].T))
    names = sae.get.features(mapped).index[a.any(axis=0)]
    r.index = r.columns = names
    table = mapped.uns["sae"]["feature_map"]["neighbors"].astype({"feature": str, "neighbor": str})
    for name, part in table.groupby("feature", sort=False):
        expected = r.loc[name].drop(name).sort_values(ascending=False).head(5)
        expected = expected[expected > 0]
        assert part["neighbor"].tolist() == expected.index.tolist()
        np.testing.assert_allclose(part["similarity"], expected, rtol=1e-4)


def test_modules_gather_alike_features(mapped):
    module = sae.get.features(mapped)["module"]
    table = sae.get.neighbors(mapped).astype({"feature": str, "neighbor": str})
    same = module[table["feature"]].to_numpy() == module[table["neighbor"]].to_numpy()
    assert 1 < module.nunique() < 16 and same.mean() > 0.5


def test_spaces_differ_and_say_what_they_used(analysed):
    found = {}
    for space in ("coactivation", "genes", "enrichment", "decoder"):
        sae.tl.feature_map(analysed, space=space, n_neighbors=3)
        stored = analysed.uns["sae"]["feature_map"]
        assert stored["params"]["space"] == space
        found[space] = stored["neighbors"]["neighbor"].astype(str).tolist()
    assert len({tuple(names) for names in found.values()}) == 4
    sae.tl.feature_map(analysed, space="enrichment", collection="immune", max_padj=0.01)
    assert analysed.uns["sae"]["feature_map"]["params"]["collection"] == "immune"


def test_decoder_is_taken_in_the_space_of_training(analysed):
    sae.tl.feature_map(analysed, space="decoder", n_neighbors=1)
    stored = analysed.uns["sae"]
    live = ~stored["features"]["dead"].to_numpy()
    rows = sae._schema.directions(stored)[live]
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -1)
    table = stored["feature_map"]["neighbors"]
    names = stored["features"].index[live]
    assert table["neighbor"].tolist() == names[cosine.argmax(axis=1)].tolist()


def test_features_without_gene_sets_are_not_on_their_map(analysed):
    sae.tl.feature_map(analysed, space="enrichment", n_neighbors=3)
    table = sae.get.enrichment(analysed, direction="up", max_padj=0.05)
    having = set(table.loc[~(table["fdr"] > 0.05), "feature"])
    features = sae.get.features(analysed)
    assert set(features.index[features["module"].notna()]) == having and len(having) < len(features)


def test_genes_are_those_of_the_layer(make_adata):
    adata = make_adata(layout="csr")
    sae.tl.fit(adata, n_features=12, steps=50, progress=False)
    sae.tl.encode(adata)
    rng = np.random.default_rng(0)
    adata.layers["other"] = sparse.csr_matrix(np.log1p(rng.poisson(2, adata.shape)))
    sae.tl.feature_map(adata, space="genes")
    first = adata.uns["sae"]["feature_map"]["neighbors"]
    sae.tl.feature_map(adata, space="genes", layer="other")
    stored = adata.uns["sae"]["feature_map"]
    assert stored["params"]["layer"] == "other"
    assert not first["similarity"].equals(stored["neighbors"]["similarity"])
    dense = adata.copy()
    dense.layers["other"] = dense.layers["other"].toarray()
    sae.tl.feature_map(dense, space="genes", layer="other")
    pd.testing.assert_frame_equal(
        dense.uns["sae"]["feature_map"]["neighbors"], stored["neighbors"], check_exact=False, rtol=1e-5
    )


def test_deterministic_and_nothing_global(analysed):
    again = analysed.copy()
    # A library that comes with UMAP draws a number when it is imported.
    sae.tl.feature_map(again)
    states = random.getstate(), np.random.get_state()[1].copy()
    for adata in (analysed, again):
        sae.tl.feature_map(adata, rng=3)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    table = sae.get.features(analysed)
    pd.testing.assert_frame_equal(table, sae.get.features(again))
    sae.tl.feature_map(again, rng=np.random.default_rng(1))
    seed = again.uns["sae"]["feature_map"]["params"]["seed"]
    assert not sae.get.features(again)["map_x"].equals(table["map_x"])
    sae.tl.feature_map(analysed, rng=seed)
    pd.testing.assert_frame_equal(sae.get.features(analysed), sae.get.features(again))


def make_active(n_live: int, h: int = 5) -> ad.AnnData:
    """An object whose SAE has so many features that are active."""
    rng = np.random.default_rng(0)
    adata = ad.AnnData(np.zeros((30, 2), dtype=np.float32), obsm={"X_pca": rng.normal(size=(30, 4)).astype(np.float32)})
    sae.tl.fit(adata, n_features=h, steps=5, k=2, progress=False)
    sae.tl.encode(adata)
    a = np.abs(rng.normal(size=(30, h))).astype(np.float32)
    a[:, n_live:] = 0
    adata.obsm["sae"] = sparse.csr_matrix(a)
    adata.uns["sae"]["features"]["dead"] = ~a.any(axis=0)
    return adata


@pytest.mark.parametrize("n_live", [0, 1, 2, 3])
@pytest.mark.parametrize("through", ["h5ad", "zarr"])
def test_few_or_no_live_features(n_live, through, tmp_path, compare):
    adata = make_active(n_live)
    for space in ("coactivation", "decoder"):
        sae.tl.feature_map(adata, space=space)
        table = sae.get.features(adata)
        assert table["map_x"].notna().sum() == table["module"].notna().sum() == n_live
    if through == "h5ad":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        stored = ad.read_h5ad(tmp_path / "cells.h5ad")
    else:
        store = zarr.storage.MemoryStore()
        adata.write_zarr(store)
        stored = ad.read_zarr(store)
    compare.assert_same(adata.uns["sae"], stored.uns["sae"])
    assert len(sae.get.neighbors(stored)) <= n_live * (n_live - 1)


def test_survives_storage(mapped, tmp_path, compare):
    mapped.write_h5ad(tmp_path / "cells.h5ad")
    stored = ad.read_h5ad(tmp_path / "cells.h5ad")
    compare.assert_same(mapped.uns["sae"]["feature_map"], stored.uns["sae"]["feature_map"])
    pd.testing.assert_frame_equal(sae.get.neighbors(mapped), sae.get.neighbors(stored))
    pd.testing.assert_frame_equal(sae.get.modules(mapped), sae.get.modules(stored))
    sae.tl.feature_map(stored, n_neighbors=5)
    for name in ("features", "feature_map"):
        compare.assert_same(mapped.uns["sae"][name], stored.uns["sae"][name])


@pytest.mark.parametrize(
    "verb", [sae.tl.encode, lambda adata: sae.tl.fit(adata, n_features=8, steps=5, progress=False)]
)
def test_new_activations_drop_the_map(mapped, verb):
    verb(mapped)
    assert "feature_map" not in mapped.uns["sae"]
    assert "module" not in mapped.uns["sae"].get("features", ())


def test_mudata(make_mudata):
    mdata = make_mudata()
    for where in ({}, {"mod": "rna"}):
        sae.tl.fit(mdata, "X_pca" if where else "X_joint", n_features=12, steps=50, progress=False, **where)
        sae.tl.encode(mdata, **where)
        sae.tl.feature_map(mdata, n_neighbors=3, **where)
        assert len(sae.get.neighbors(mdata, n=1, **where)) > 0
    # The other modality has fewer cells, in another order.
    sae.tl.feature_map(mdata, space="genes", mod="rna", var_mod="adt")
    assert mdata["rna"].uns["sae"]["feature_map"]["params"]["var_mod"] == "adt"
    adt, rows = mdata["adt"], mdata["rna"].obs_names.get_indexer(mdata["adt"].obs_names)
    a = mdata["rna"].obsm["sae"][rows].toarray()
    live = np.flatnonzero(a.any(axis=0))
    r = np.array([[np.corrcoef(a[:, i], adt.X[:, g])[0, 1] for g in range(adt.n_vars)] for i in live])
    cosine = r @ r.T / np.outer(np.linalg.norm(r, axis=1), np.linalg.norm(r, axis=1))
    np.fill_diagonal(cosine, 0)
    best = sae.get.neighbors(mdata, n=1, mod="rna").set_index("feature")["similarity"]
    expected = pd.Series(cosine.max(axis=1), [f"sae_{i}" for i in live])
    expected = expected[expected > 0]
    np.testing.assert_allclose(best[expected.index], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"space": "umap"}, ValueError, "space='umap' is not one of 'coactivation', 'genes', 'enrichment', 'decoder'"),
        ({"layer": "counts"}, ValueError, "layer='counts' belongs to space='genes', not to 'coactivation'"),
        ({"space": "genes", "collection": "go"}, ValueError, "collection='go' belongs to space='enrichment'"),
        ({"space": "decoder", "max_padj": 0.1}, ValueError, "max_padj=0.1 belongs to space='enrichment'"),
        ({"space": "genes", "layer": "no"}, KeyError, "layers has no 'no'"),
        ({"space": "enrichment", "collection": "go"}, KeyError, "no results for the collection 'go'"),
        ({"n_neighbors": 0}, ValueError, "n_neighbors=0 is not a number of features of 1 or more"),
        ({"n_neighbors": 2.5}, ValueError, "n_neighbors=2.5 is not"),
        ({"resolution": 0}, ValueError, "resolution=0 is not above 0"),
        ({"resolution": np.nan}, ValueError, "resolution=nan is not above 0"),
        ({"rng": -1}, ValueError, "rng=-1 is no seed"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
    ],
)
def test_bad_input(analysed, compare, settings, error, message):
    before = compare.state(analysed)
    with pytest.raises(error, match=message):
        sae.tl.feature_map(analysed, **settings)
    compare.assert_same(before, compare.state(analysed))


def test_without_what_it_needs(fitted, encoded):
    with pytest.raises(KeyError, match=r"Run sae.tl.encode"):
        sae.tl.feature_map(fitted)
    with pytest.raises(KeyError, match=r"Run sae.tl.enrich"):
        sae.tl.feature_map(encoded, space="enrichment")
