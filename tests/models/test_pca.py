from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse
from sklearn.decomposition import PCA as Reference
from sklearn.decomposition import TruncatedSVD

import sae
from sae.models._pca import PCA

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}


@pytest.fixture
def cells():
    """500 × 200 log-normalised cells with twelve components of their own values, and a column that marks 150 genes."""
    adata = sae.datasets.pbmc68k()[:500, :200].copy()
    adata.X = adata.X.toarray()
    adata.var["variable"] = np.arange(200) % 4 != 1
    del adata.varm["PCs"], adata.obsm["X_pca"], adata.uns["pca"]
    return adata


def reference(x, n_comps=12):
    """Scikit-learn's decomposition in float64, by another solver than Scanpy's."""
    return Reference(n_comps, svd_solver="full").fit(np.asarray(x, dtype=np.float64))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back_is_scikit_learns(cells, layout, compare):
    expected = reference(cells.X)
    x = cells.X
    cells.X = layout(x)
    sc.pp.pca(cells, n_comps=12)
    before = compare.state(cells)
    model = PCA(cells)
    z = model.embed(cells)
    np.testing.assert_allclose(z, cells.obsm["X_pca"], atol=2e-5)
    np.testing.assert_allclose(np.abs(z), np.abs(expected.transform(x)), atol=1e-4)
    found = model.decode(z, cells)
    np.testing.assert_allclose(found.X, expected.inverse_transform(expected.transform(x)), atol=1e-4)
    assert found.X.dtype == z.dtype == np.float32
    assert found.obs_names.equals(cells.obs_names) and found.var_names.equals(cells.var_names)
    assert found.uns == {"scale": "log1p", "log1p": {"base": None}}
    compare.assert_same(compare.state(cells), before)


def test_any_latent_is_transformed_back(cells):
    sc.pp.pca(cells, n_comps=12)
    z = np.random.default_rng(0).normal(size=(30, 12))
    expected = z @ np.asarray(cells.varm["PCs"], np.float64).T + cells.X.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(PCA(cells).decode(z, cells[:30]).X, expected, atol=1e-5)


def test_decoded_in_chunks(cells):
    sc.pp.pca(cells, n_comps=12)
    model, z = PCA(cells), cells.obsm["X_pca"]
    whole = model.decode(z, cells).X
    rows = [slice(0, 1), slice(1, 130), slice(130, 500)]
    np.testing.assert_allclose(np.vstack([model.decode(z[part], cells[part]).X for part in rows]), whole, atol=1e-6)
    order = np.random.default_rng(0).permutation(500)
    np.testing.assert_allclose(model.decode(z[order], cells[order]).X, whole[order], atol=1e-6)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "concatenated"])
def test_genes_outside_the_mask_are_unknown(cells, recorded):
    inside = cells.var["variable"].to_numpy()
    sc.pp.pca(cells, n_comps=12, mask_var="variable")
    if not recorded:
        del cells.uns["pca"]
    model = PCA(cells)
    found = model.decode(cells.obsm["X_pca"], cells)
    assert (np.isnan(found.X) == ~inside).all()
    expected = reference(cells.X[:, inside])
    x = cells.X[:, inside]
    np.testing.assert_allclose(found.X[:, inside], expected.inverse_transform(expected.transform(x)), atol=1e-4)
    np.testing.assert_allclose(model.embed(cells[:, inside]), cells.obsm["X_pca"], atol=2e-5)
    only = PCA(cells[:, inside])
    np.testing.assert_allclose(only.decode(cells.obsm["X_pca"], cells).X, found.X[:, inside], atol=1e-6)


def test_a_gene_that_never_varies_is_predicted_where_there_was_no_mask(cells):
    cells.X[:, 7] = 0.5
    sc.pp.pca(cells, n_comps=12)
    cells.varm["PCs"][7] = 0
    found = PCA(cells).decode(cells.obsm["X_pca"], cells)
    np.testing.assert_allclose(found.X[:, 7], 0.5, atol=1e-6)
    assert np.isfinite(found.X).all()


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "not recorded"])
def test_without_centring(cells, recorded):
    sc.pp.pca(cells, n_comps=12, zero_center=False, svd_solver="arpack")
    if not recorded:
        del cells.uns["pca"]
    model = PCA(cells)
    np.testing.assert_allclose(model.embed(cells), cells.obsm["X_pca"], atol=1e-4)
    expected = TruncatedSVD(12, algorithm="arpack", random_state=0).fit(cells.X.astype(np.float64))
    back = expected.inverse_transform(expected.transform(cells.X))
    np.testing.assert_allclose(model.decode(cells.obsm["X_pca"], cells).X, back, atol=1e-4)


def test_other_keys_and_layers(cells):
    cells.layers["log"] = cells.X.copy()
    sc.pp.scale(cells)
    sc.pp.pca(cells, n_comps=12, layer="log", key_added="components")
    sc.pp.pca(cells, n_comps=8)
    of_layer, of_scaled = PCA(cells, basis="components"), PCA(cells)
    expected = reference(cells.layers["log"])
    back = expected.inverse_transform(expected.transform(cells.layers["log"]))
    found = of_layer.decode(cells.obsm["components"], cells)
    np.testing.assert_allclose(found.X, back, atol=1e-4)
    assert found.uns["scale"] == "log1p"
    np.testing.assert_allclose(of_layer.embed(cells), cells.obsm["components"], atol=2e-5)
    np.testing.assert_allclose(of_scaled.embed(cells), cells.obsm["X_pca"], atol=1e-4)
    # What scaled values are is recognised: there is no name for it.
    assert of_scaled.decode(cells.obsm["X_pca"], cells).uns == {}


@pytest.mark.parametrize(
    ("change", "uns"),
    [
        (lambda x: x, {"scale": "log1p", "log1p": {"base": 2}}),
        (lambda x: np.round(x), {"scale": "linear"}),
        (lambda x: 100 * x, {"scale": "linear"}),
        (lambda x: x - 0.1, {}),
    ],
    ids=["log2", "counts", "large", "negative"],
)
def test_what_values_are(cells, change, uns):
    cells.X = change(cells.X)
    cells.uns["log1p"] = {"base": 2}
    sc.pp.pca(cells, n_comps=12)
    assert PCA(cells).decode(cells.obsm["X_pca"], cells).uns == uns


def test_new_cells_with_genes_in_another_order(cells):
    sc.pp.pca(cells, n_comps=12)
    model = PCA(cells)
    other = sae.datasets.pbmc68k()[500:, ::-1].copy()
    mean, loadings = cells.X.astype(np.float64).mean(axis=0), cells.varm["PCs"].astype(np.float64)
    expected = (other[:, cells.var_names].X.toarray() - mean) @ loadings
    np.testing.assert_allclose(model.embed(other), expected, atol=1e-5)
    other.X = other.X.toarray()
    np.testing.assert_allclose(model.embed(other), expected, atol=1e-5)
    assert model.decode(model.embed(other), other).shape == (200, 200)


def test_read_from_disk(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 64)
    for layout in (np.asarray, sparse.csr_matrix):
        stored = cells.copy()
        stored.X = layout(stored.X)
        sc.pp.pca(stored, n_comps=12)
        stored.write_h5ad(tmp_path / "cells.h5ad")
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        model, memory = PCA(backed), PCA(stored)
        np.testing.assert_array_equal(model.embed(backed), memory.embed(stored))
        z = stored.obsm["X_pca"]
        np.testing.assert_array_equal(model.decode(z, backed).X, memory.decode(z, stored).X)
        backed.file.close()


def test_modality_of_a_mudata(make_mudata):
    mdata = make_mudata()
    sc.pp.pca(mdata["adt"], n_comps=5)
    model = PCA(mdata, mod="adt")
    inside = mdata[mdata["adt"].obs_names].copy()
    expected = pd.DataFrame(mdata["adt"].obsm["X_pca"], index=mdata["adt"].obs_names)
    z = model.embed(inside)
    np.testing.assert_allclose(z, expected.loc[inside.obs_names], atol=1e-5)
    found = model.decode(z, inside)
    assert set(found) == {"adt"} and found["adt"].obs_names.equals(inside.obs_names)
    np.testing.assert_array_equal(found["adt"].X, model.decode(z, mdata["adt"]).X)
    np.testing.assert_allclose(model.embed(mdata["adt"]), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"10 of the 80 cells of the MuData are not in mdata.mod\['adt'\]"):
        model.embed(mdata)
    with pytest.raises(ValueError, match=r"Pass PCA\(mdata, mod=...\), with one of 'rna', 'adt'"):
        PCA(mdata)
    with pytest.raises(ValueError, match=r"Pass PCA\(mdata, mod=...\)"):
        PCA(mdata["adt"]).decode(np.zeros((80, 5)), mdata)
    with pytest.raises(ValueError, match="mod='adt' names a modality, but the data is an AnnData"):
        PCA(mdata["adt"], mod="adt")


# ---- Scores that are not those of the values


def test_values_that_were_changed_since(cells):
    sc.pp.pca(cells, n_comps=12)
    PCA(cells)
    cells.layers["other"] = np.sqrt(cells.X)
    cells.X = cells.X * 1.01
    message = (
        "adata.obsm['X_pca'] is not what the loadings make of adata.X, taking the values less their mean: components are off by up "
        "to 0.01 of their standard deviations. Other layers do not fit either ('other'). The values were changed since"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PCA(cells)


def test_the_layer_that_fits_is_named(cells):
    sc.pp.pca(cells, n_comps=12)
    cells.layers["log"] = cells.X.copy()
    sc.pp.scale(cells)
    with pytest.raises(ValueError, match=r"It fits adata.layers\['log'\]: pass it as layer=."):
        PCA(cells)
    assert PCA(cells, layer="log").decode(cells.obsm["X_pca"], cells).uns["scale"] == "log1p"
    del cells.uns["pca"]
    sc.pp.pca(cells, n_comps=12)
    with pytest.raises(ValueError, match=r"make of adata.layers\['log'\].* It fits adata.X: leave layer= out"):
        PCA(cells, layer="log")


@pytest.mark.parametrize("kept", [np.arange(500) < 475, np.arange(500) < 20], ids=["most", "few"])
def test_cells_that_were_removed_since(cells, kept):
    sc.pp.pca(cells, n_comps=12)
    with pytest.raises(ValueError, match="All cells are off by the same: cells were removed or added since"):
        PCA(cells[kept])


def test_components_from_an_approximate_solver():
    rng = np.random.default_rng(0)
    strong = 5 * rng.normal(size=(600, 1)) * rng.normal(size=300)
    adata = ad.AnnData((strong + rng.normal(size=(600, 300))).astype(np.float32))
    sc.pp.pca(adata, n_comps=20, svd_solver="randomized")
    with pytest.raises(ValueError, match="The first component does fit, .* svd_solver='arpack'"):
        PCA(adata)
    sc.pp.pca(adata, n_comps=20, svd_solver="arpack")
    PCA(adata)


def test_scores_of_values_that_are_gone():
    with pytest.raises(
        ValueError, match=r"is not what the loadings make of adata.X.*Other layers do not fit either \(none\)"
    ):
        PCA(sae.datasets.pbmc68k())


# ---- Bad input


def test_what_is_not_there(cells):
    with pytest.raises(
        KeyError, match="adata.obsm has no 'X_pca'; it has 'X_umap'. Run sc.pp.pca first, or pass its key_added="
    ):
        PCA(cells)
    sc.pp.pca(cells, n_comps=12)
    with pytest.raises(KeyError, match="adata.layers has no 'log'"):
        PCA(cells, layer="log")
    with pytest.raises(KeyError, match="adata.obsm has no 'pcs'; it has 'X_umap', 'X_pca'"):
        PCA(cells, basis="pcs")
    del cells.varm["PCs"]
    with pytest.raises(
        KeyError, match="adata.varm has no 'PCs', where Scanpy keeps the loadings of 'X_pca'; it has none"
    ):
        PCA(cells)
    cells.varm["PCs"] = np.zeros((200, 3))
    with pytest.raises(
        ValueError, match=re.escape("adata.varm['PCs'] has the shape (200, 3) and obsm['X_pca'] (500, 12)")
    ):
        PCA(cells)


def test_genes_that_are_missing_or_repeated(cells):
    sc.pp.pca(cells, n_comps=12, mask_var="variable")
    model = PCA(cells)
    few = cells[:, np.arange(200) >= 20]
    with pytest.raises(
        ValueError, match=r"adata lacks 15 of the 150 genes \(10.0%\) that the principal components are of: 'HES4'"
    ):
        model.embed(few)
    cells.var_names = [*cells.var_names[:-1], cells.var_names[3]]
    with pytest.raises(ValueError, match="adata has names that occur more than once .*var_names_make_unique"):
        model.embed(cells)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((500, 11)), r"PCA decodes a latent of 12 dimensions; got an array of shape \(500, 11\)"),
        (np.zeros((499, 12)), "The latent has 499 rows and data 500 cells"),
        (
            np.where(np.arange(500)[:, None] % 200 == 7, np.nan, np.zeros(12)),
            "NaN or infinite values in 3 of 500 rows, row 7 first",
        ),
    ],
    ids=["width", "rows", "NaN"],
)
def test_a_latent_of_another_shape(cells, z, message):
    sc.pp.pca(cells, n_comps=12)
    with pytest.raises(ValueError, match=message):
        PCA(cells).decode(z, cells)


def test_a_layer_with_nan_is_not_what_fits(cells):
    """Predictions that `sae.tl.steer` adds as a layer are NaN outside the mask."""
    sc.pp.pca(cells, n_comps=12, mask_var="variable")
    cells.layers["a prediction"] = PCA(cells).decode(cells.obsm["X_pca"], cells).X
    cells.layers["kept"] = cells.X.copy()
    cells.X = cells.X * 2
    with pytest.raises(ValueError, match=r"It fits adata.layers\['kept'\]: pass it as layer="):
        PCA(cells)
    del cells.layers["kept"]
    with pytest.raises(ValueError, match=r"Other layers do not fit either \('a prediction'\)"):
        PCA(cells)


def test_corrected_scores_cannot_be_decoded(cells):
    sc.pp.pca(cells, n_comps=12)
    cells.obsm["X_pca_harmony"] = cells.obsm["X_pca"] + 1
    with pytest.raises(KeyError, match="varm has no 'X_pca_harmony'.* corrected afterwards .Harmony. have none"):
        PCA(cells, basis="X_pca_harmony")


def test_verbs_take_it(cells):
    sc.pp.pca(cells, n_comps=12, mask_var="variable")
    sae.tl.fit(cells, n_features=16, steps=50, progress=False)
    sae.tl.encode(cells)
    sae.tl.rank_genes(cells, model=PCA(cells), n_genes=None, progress=False)
    table = sae.get.genes(cells)
    assert set(table["gene"]) == set(cells.var_names[cells.var["variable"]])
    assert np.isfinite(table["log2fc"]).all()
