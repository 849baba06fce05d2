from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pytest
import torch
from scipy import sparse

import sae
from sae.models._functions import Functions

W = np.random.default_rng(0).normal(size=(6, 20))


def decode(z, data):
    return z @ W


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        torch.from_numpy,
        sparse.csr_matrix,
        lambda x: x.tolist(),
        lambda x: torch.from_numpy(x).requires_grad_(),
    ],
    ids=["array", "tensor", "sparse", "list", "tensor with gradient"],
)
def test_arrays_become_predictions(make_adata, convert):
    adata = make_adata()
    z = adata.obsm["X_pca"]
    model = Functions(
        embed=lambda data: convert(data.obsm["X_pca"].astype(float)),
        decode=lambda z, data: convert(z @ W),
        scale="log1p",
    )
    np.testing.assert_array_equal(model.embed(adata), z)
    found = model.decode(model.embed(adata), adata)
    np.testing.assert_allclose(found.X, z @ W, rtol=1e-5)
    assert found.X.dtype == model.embed(adata).dtype == np.float32
    assert found.obs_names.equals(adata.obs_names) and found.var_names.equals(adata.var_names)
    assert found.uns == {"scale": "log1p", "log1p": {"base": None}}


def test_genes_and_scale_are_those_given_or_open(make_adata):
    adata = make_adata()
    names = [f"peak-{i}" for i in range(20)]
    found = Functions(decode=decode, genes=names).decode(adata.obsm["X_pca"], adata)
    assert list(found.var_names) == names and "scale" not in found.uns


def test_what_is_anndata_stays_as_it_is(make_adata):
    adata = make_adata()
    model = Functions(decode=lambda z, data: ad.AnnData(z @ W, uns={"scale": "log"}))
    assert model.decode(adata.obsm["X_pca"], adata).uns["scale"] == "log"


def test_modalities(make_mudata):
    mdata = make_mudata()
    z = np.zeros((80, 2))
    arrays = Functions(
        embed=lambda data: data.obsm["X_joint"],
        decode=lambda z, data: {"rna": np.ones((80, 20)), "adt": np.zeros((80, 8))},
        scale={"rna": "log1p", "adt": "linear"},
    )
    assert arrays.embed(mdata).shape == (80, 6)
    found = arrays.decode(z, mdata)
    assert {name: (part.shape, part.uns["scale"]) for name, part in found.items()} == {
        "rna": ((80, 20), "log1p"),
        "adt": ((80, 8), "linear"),
    }
    assert found["adt"].var_names.equals(mdata["adt"].var_names) and found["adt"].obs_names.equals(mdata.obs_names)

    peaks = Functions(decode=lambda z, data: {"atac": np.zeros((80, 2))}, genes={"atac": ["p1", "p2"]}, scale="linear")
    assert list(peaks.decode(z, mdata)["atac"].var_names) == ["p1", "p2"]
    joint = Functions(decode=lambda z, data: mudata.MuData({"rna": data["rna"]}))
    assert joint.decode(z, mdata)["rna"].shape == (80, 20)
    with pytest.raises(ValueError, match="an array for 'atac', and the MuData has 'rna', 'adt'"):
        Functions(decode=lambda z, data: {"atac": np.zeros((80, 2))}).decode(z, mdata)
    with pytest.raises(ValueError, match="an array for None, and the MuData has 'rna', 'adt'"):
        Functions(decode=lambda z, data: np.zeros((80, 2))).decode(z, mdata)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: Functions(), TypeError, "Neither embed= nor decode= was given"),
        (lambda: Functions(embed=3), TypeError, "embed= is a int, which cannot be called"),
        (lambda: Functions(embed=len, decode="x"), TypeError, "decode= is a str, which cannot be called"),
    ],
    ids=["none", "number", "text"],
)
def test_functions_that_are_none(model, error, message):
    with pytest.raises(error, match=message):
        model()


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Functions(decode=decode), NotImplementedError, r"This model has no embed: pass Functions\(embed="),
        (Functions(embed=lambda data: np.zeros(80)), ValueError, r"embed returned the shape \(80,\) for 80 cells"),
        (Functions(embed=lambda data: np.zeros((8, 2))), ValueError, r"embed returned the shape \(8, 2\) for 80 cells"),
        (Functions(embed=lambda data: "z"), TypeError, "embed returned a str, which is no array of numbers"),
    ],
    ids=["no embed", "one dimension", "fewer cells", "no numbers"],
)  # fmt: skip
def test_embed_that_is_wrong(make_adata, model, error, message):
    with pytest.raises(error, match=message):
        model.embed(make_adata())


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Functions(embed=len), NotImplementedError, "has no decode: expression cannot be predicted from its latent"),
        (Functions(decode=lambda z, data: z), ValueError, r"the shape \(80, 6\) for 80 cells and 20 genes. Pass the names"),
        (Functions(decode=decode, genes=["a"]), ValueError, r"the shape \(80, 20\) for 80 cells and 1 genes"),
        (Functions(decode=lambda z, data: data[:5]), ValueError, "decode returned 5 cells, and data has 80"),
        (Functions(decode=lambda z, data: {"rna": data[:5]}), ValueError, "decode returned 5 cells of 'rna', and data has 80"),
    ],
    ids=["no decode", "other genes", "names", "AnnData", "modality"],
)  # fmt: skip
def test_decode_that_is_wrong(make_adata, model, error, message):
    adata = make_adata()
    with pytest.raises(error, match=message):
        model.decode(adata.obsm["X_pca"], adata)


def test_verbs_take_it(encoded):
    loadings = np.linalg.lstsq(encoded.obsm["X_pca"], encoded.X.toarray(), rcond=None)[0]
    sae.tl.rank_genes(encoded, model=Functions(decode=lambda z, data: z @ loadings, scale="log1p"), progress=False)
    table = sae.get.genes(encoded)
    assert np.isfinite(table["log2fc"]).all() and len(table)


def test_scale_is_checked_at_once():
    with pytest.raises(ValueError, match="scale='Log1p' is not one of 'log1p', 'linear', 'log'"):
        Functions(decode=decode, scale="Log1p")
    with pytest.raises(ValueError, match="scale='counts' is not one of"):
        Functions(decode=decode, scale={"rna": "log1p", "atac": "counts"})


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "decode returned None. Return an array"),
        (
            np.zeros((7, 20)),
            ValueError,
            r"decode returned the shape \(7, 20\) for \d+ cells; expected a row for each cell",
        ),
    ],
)
def test_decode_without_a_row_per_cell(make_adata, returned, error, message):
    adata = make_adata()
    with pytest.raises(error, match=message):
        Functions(decode=lambda z, data: returned).decode(adata.obsm["X_pca"], adata)
