from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import torch
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

import sae
from sae.core.dense_autoencoder import hidden_widths
from sae.models._autoencoder import Autoencoder

QUICK = {"n_latent": 4, "epochs": 3, "rng": 0, "progress": False}


@pytest.fixture
def cells():
    """300 cells × 30 genes, none of them negative."""
    return sae.datasets.simulate_programs(300, 30, n_programs=5, noise="poisson", depth=300)


def weights(model):
    return [tensor.numpy() for layer in (*model._network.encoder, *model._network.decoder) for tensor in layer]


# ---- The layers


@pytest.mark.parametrize(
    ("n_genes", "n_latent", "depth", "width", "expected"),
    [
        (20_000, 150, 2, "wide", [5_075]),
        (20_000, 150, 4, "wide", [7_537, 5_075, 2_612]),
        (20_000, 150, 2, "narrow", [300]),
        (20_000, 20, 2, "narrow", [150]),
        (20_000, 20, 4, "narrow", [1_000, 150, 150]),
        (20_000, 1_000, 6, "narrow", [2_000] * 5),
        (20_000, 150, 1, "wide", []),
        (5, 4, 2, "wide", [3]),
        (100, 10, 3, 70, [70, 70]),
    ],
)
def test_widths_are_those_of_the_paper(n_genes, n_latent, depth, width, expected):
    assert hidden_widths(n_genes, n_latent, depth, width) == expected


@pytest.mark.parametrize(("depth", "width", "units"), [(1, "narrow", []), (2, "wide", [9]), (3, 12, [12, 12])])
def test_layers_are_what_was_asked_for(cells, depth, width, units):
    model = Autoencoder.fit(cells, depth=depth, width=width, **QUICK)
    widths = [30, *units, 4]
    encoder, decoder = model._network.encoder, model._network.decoder
    assert [tuple(weight.shape) for weight, _ in encoder] == list(zip(widths[1:], widths[:-1], strict=True))
    assert [tuple(weight.shape) for weight, _ in decoder] == list(zip(widths[::-1][1:], widths[::-1][:-1], strict=True))


def test_embed_and_decode_are_the_forward_pass(cells):
    """Against the product written out, with a ReLU between layers and on the output."""
    model = Autoencoder.fit(cells, depth=2, width=12, **QUICK)
    w1, b1, w2, b2, v1, c1, v2, c2 = (values.astype(np.float64) for values in weights(model))
    x = cells.X.astype(np.float64)
    z = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    x_hat = np.maximum(np.maximum(z @ v1.T + c1, 0) @ v2.T + c2, 0)
    np.testing.assert_allclose(model.embed(cells), z, rtol=1e-4, atol=1e-4)
    found = model.decode(model.embed(cells), cells)
    np.testing.assert_allclose(found.X, x_hat, rtol=1e-4, atol=1e-4)
    assert found.obs_names.equals(cells.obs_names) and found.var_names.equals(cells.var_names)
    assert found.X.dtype == np.float32
    of_mean = np.square(x - x.mean(axis=0)).sum()
    assert model.r2 == pytest.approx(1 - np.square(x - x_hat).sum() / of_mean, abs=1e-4)


def test_negative_values_are_reconstructed_too(cells):
    cells.X = cells.X - 1
    model = Autoencoder.fit(cells, **QUICK)
    assert not model._network.rectified
    assert model.decode(model.embed(cells), cells).X.min() < 0


# ---- What it learns


def test_a_linear_autoencoder_does_as_well_as_principal_components():
    adata = sae.datasets.simulate_programs(1_000, 40, n_programs=8)
    adata.X = adata.X - 5  # some values are negative, and the output is not rectified
    model = Autoencoder.fit(adata, n_latent=5, depth=1, epochs=200, batch_size=64, learning_rate=3e-3, progress=False)
    best = PCA(5).fit(adata.X.astype(np.float64)).explained_variance_ratio_.sum()
    assert best - 2e-3 < model.r2 <= best + 1e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_small_simulation_is_linear_in_four_units(seed):
    """The published check: with L = 4, every program is a linear function of the latent."""
    adata = sae.datasets.simulate_small(4_000, rng=seed)
    model = Autoencoder.fit(adata, n_latent=4, depth=1, rng=seed, progress=False)
    z, programs = model.embed(adata), adata.obsm["programs"]
    assert [LinearRegression().fit(z, x).score(z, x) for x in programs.T] == pytest.approx([1, 1, 1], abs=1e-3)


def test_two_units_are_too_few_for_three_programs():
    adata = sae.datasets.simulate_small(4_000)
    model = Autoencoder.fit(adata, n_latent=2, depth=1, progress=False)
    z, programs = model.embed(adata), adata.obsm["programs"]
    assert min(LinearRegression().fit(z, x).score(z, x) for x in programs.T) < 0.9


# ---- Random numbers


def test_the_same_seed_gives_the_same_model(cells):
    torch.manual_seed(1)
    one = Autoencoder.fit(cells, **QUICK)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()
    other = Autoencoder.fit(cells, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], np_state)
    for first, second in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(first, second)
    third = Autoencoder.fit(cells, **{**QUICK, "rng": np.random.default_rng(1)})
    assert not np.array_equal(weights(one)[0], weights(third)[0])


def test_it_trains_where_gradients_are_switched_off(cells):
    with torch.no_grad():
        model = Autoencoder.fit(cells, **QUICK)
    np.testing.assert_array_equal(weights(model)[0], weights(Autoencoder.fit(cells, **QUICK))[0])


# ---- Data


def test_dense_sparse_layer_and_disk_give_the_same(cells, tmp_path):
    expected = Autoencoder.fit(cells, **QUICK).embed(cells)
    layered = ad.AnnData(np.zeros_like(cells.X), layers={"counts": cells.X}, obs=cells.obs, var=cells.var)
    np.testing.assert_array_equal(Autoencoder.fit(layered, layer="counts", **QUICK).embed(layered), expected)
    compressed = ad.AnnData(sparse.csr_matrix(cells.X), obs=cells.obs, var=cells.var)
    np.testing.assert_array_equal(Autoencoder.fit(compressed, **QUICK).embed(compressed), expected)
    compressed.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = Autoencoder.fit(cells, **QUICK)
    np.testing.assert_allclose(model.embed(backed), expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(Autoencoder.fit(backed, **QUICK).r2)
    backed.file.close()


def test_genes_are_found_by_name(cells):
    model = Autoencoder.fit(cells, **QUICK)
    shuffled = cells[:100, ::-1].copy()
    np.testing.assert_allclose(model.embed(shuffled), model.embed(cells)[:100], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="adata lacks 3 of the 30 genes .* the autoencoder reads: 'gene_0'"):
        model.embed(cells[:, 3:])


def test_data_stay_as_they_are(cells):
    before = cells.copy()
    model = Autoencoder.fit(cells, **QUICK)
    model.decode(model.embed(cells), cells)
    np.testing.assert_array_equal(cells.X, before.X)
    assert not cells.layers and set(cells.obsm) == set(before.obsm) and set(cells.uns) == set(before.uns)


@pytest.mark.parametrize(
    ("prepare", "scale"),
    [
        (lambda adata: None, "linear"),
        (sc.pp.log1p, "log1p"),
        (lambda adata: sc.pp.log1p(adata, base=2), "log1p"),
        (sc.pp.scale, None),
    ],
    ids=["counts", "log1p", "log2", "scaled"],
)
def test_the_scale_of_what_is_predicted(cells, prepare, scale):
    prepare(cells)
    model = Autoencoder.fit(cells, **QUICK)
    uns = model.decode(model.embed(cells), cells).uns
    assert uns.get("scale") == scale
    assert uns.get("log1p") == (cells.uns["log1p"] if scale == "log1p" else None)


def test_verbs_take_it(pbmc):
    model = Autoencoder.fit(pbmc, n_latent=10, epochs=5, progress=False)
    pbmc.obsm["X_ae"] = model.embed(pbmc)
    sae.tl.fit(pbmc, use_rep="X_ae", n_features=16, steps=50, progress=False)
    sae.tl.encode(pbmc, progress=False)
    sae.tl.rank_genes(pbmc, model=model, n_genes=5, progress=False)
    assert set(sae.get.genes(pbmc)["gene"]) <= set(pbmc.var_names)
    sae.tl.steer(pbmc, [0, 1], model=model, value=1, n_controls=2, progress=False)
    assert np.isfinite(sae.get.steering(pbmc)["log2fc"]).all()


# ---- Bad input


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n_latent": 0}, ValueError, "n_latent=0 is below 1"),
        ({"n_latent": 2.5}, TypeError, "n_latent=2.5 is a float; expected an integer"),
        ({"depth": 0}, ValueError, "depth=0 is below 1"),
        ({"width": "broad"}, ValueError, "width='broad' is neither 'narrow', 'wide' nor a number of units"),
        ({"width": 0}, ValueError, "width=0 is below 1"),
        ({"epochs": 0}, ValueError, "epochs=0 is below 1"),
        ({"batch_size": 0}, ValueError, "batch_size=0 is below 1"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0 is not above 0"),
        ({"layer": "counts"}, KeyError, "adata.layers has no 'counts'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_sense(cells, given, error, message):
    with pytest.raises(error, match=message):
        Autoencoder.fit(cells, **{**QUICK, **given})


def test_cells_that_cannot_be_learned_from(cells, make_mudata):
    with pytest.raises(ValueError, match=r"adata.X has no cells to train on"):
        Autoencoder.fit(cells[:0], **QUICK)
    with pytest.raises(TypeError, match="An autoencoder is of one modality. Pass mdata.mod"):
        Autoencoder.fit(make_mudata(), **QUICK)
    cells.X[3, 2] = np.nan
    with pytest.raises(ValueError, match="adata.X has 1 NaN or infinite values"):
        Autoencoder.fit(cells, **QUICK)


def test_training_that_diverges(cells):
    cells.X = cells.X * np.float32(1e18)
    with pytest.raises(FloatingPointError, match="The loss became .* Lower learning_rate=1000"):
        Autoencoder.fit(cells, **{**QUICK, "learning_rate": 1e3})


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((300, 3)), r"The autoencoder decodes a latent of 4 dimensions; got an array of shape \(300, 3\)"),
        (np.zeros((299, 4)), "The latent has 299 rows and data 300 cells"),
        (np.full((300, 4), np.nan), "NaN or infinite values in 300 of 300 rows"),
    ],
    ids=["width", "rows", "NaN"],
)
def test_a_latent_of_another_shape(cells, z, message):
    with pytest.raises(ValueError, match=message):
        Autoencoder.fit(cells, **QUICK).decode(z, cells)
