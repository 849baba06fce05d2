"""Where steered cells go on an embedding, of every kind of data."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import sae

SETTINGS = {"n_controls": 0, "progress": False}
MODEL = sae.models.Functions(decode=lambda z, data: z[:, :1].copy(), genes=["a"], scale="linear")


def steer(data, **settings):
    sae.tl.steer(data, 0, model=MODEL, doses=[3], key_added="X_new", **SETTINGS | settings)


@pytest.fixture(scope="module")
def _steered(make_adata):
    adata = make_adata(120)
    sae.tl.fit(adata, n_features=8, k=2, steps=50, progress=False)
    sae.tl.encode(adata)
    steer(adata)
    return adata


@pytest.fixture
def steered(_steered):
    return _steered.copy()


def by_hand(adata, basis, k):
    """Shift of each cell, all of them being real cells."""
    z, new, places = adata.obsm["X_pca"], adata.obsm["X_new"], np.asarray(adata.obsm[basis])[:, :2]

    def place(points):
        distance = np.linalg.norm(points[:, None] - z[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        return places[np.argsort(distance, axis=1)[:, :k]].mean(axis=1)

    return places, place(new) - place(z)


def test_one_square_has_the_mean(steered):
    places, shift = by_hand(steered, "X_pca", 5)
    moved = (steered.obsm["X_new"] != steered.obsm["X_pca"]).any(axis=1)
    found = sae.get.steering_arrows(steered, "X_new", basis="pca", n_neighbors=5, n_grid=1)
    assert found["n_cells"].tolist() == [moved.sum()]
    np.testing.assert_allclose(found[["x", "y"]].iloc[0], places[moved].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found[["dx", "dy"]].iloc[0], shift[moved].mean(axis=0), rtol=1e-4)
    length = np.linalg.norm(shift[moved].mean(axis=0)) / np.linalg.norm(shift[moved], axis=1).mean()
    assert found["agreement"][0] == pytest.approx(length, rel=1e-4)


def test_cells_go_where_the_feature_points(steered):
    """Along the first two columns of the representation, which are the picture here."""
    found = sae.get.steering_arrows(steered, "X_new", "sae_0", basis="pca")
    towards = sae.get.decoder(steered).loc["sae_0"].to_numpy()[:2]
    weights = found["n_cells"] / found["n_cells"].sum()
    mean = (found[["dx", "dy"]].mul(weights, axis=0)).sum().to_numpy()
    assert mean @ towards / np.linalg.norm(mean) / np.linalg.norm(towards) > 0.8


def test_only_cells_that_moved_count(steered):
    some = steered.obs["group"] == "a"
    steer(steered, cells=some)
    found = sae.get.steering_arrows(steered, "X_new", 0, basis="pca", min_cells=1)
    assert found["n_cells"].sum() == some.sum()
    assert sae.get.steering_arrows(steered, "X_new", basis="pca", n_grid=4, min_cells=4)["n_cells"].min() >= 4


def test_squares_are_those_of_the_whole_embedding(steered):
    """Not of the cells that moved: these are a few of them, in one square."""
    places = steered.obsm["X_pca"][:, :2]
    low, side = places.min(axis=0), np.ptp(places, axis=0).max() / 2
    square = np.minimum((places - low) // side, 1)
    some = (square == square[0]).all(axis=1)
    steer(steered, cells=some)
    found = sae.get.steering_arrows(steered, "X_new", basis="pca", n_grid=2, min_cells=1)
    assert found["n_cells"].tolist() == [some.sum()]


def test_cells_without_a_place_are_left_out(steered):
    places = steered.obsm["X_pca"][:, :2].copy()
    places[:20] = np.nan
    steered.obsm["X_part"] = places
    found = sae.get.steering_arrows(steered, "X_new", basis="part", min_cells=1)
    assert found["n_cells"].sum() <= 100 and np.isfinite(found).all(axis=None)


def test_few_cells_are_drawn_the_same_each_time(steered):
    settings = {"basis": "pca", "max_cells": 40, "min_cells": 1}
    first, second = (sae.get.steering_arrows(steered, "X_new", **settings) for _ in range(2))
    assert first["n_cells"].sum() == 40
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(sae.get.steering_arrows(steered, "X_new", rng=1, **settings))


def test_reconstruction_and_ablation_are_steps_of_the_feature(steered):
    steer(steered, reconstruct=True)
    sae.get.steering_arrows(steered, "X_new", "sae_0", basis="pca")
    sae.tl.ablate(steered, "sae_1", batch="group", n_controls=0, key_added="X_without", progress=False)
    sae.get.steering_arrows(steered, "X_without", "sae_1", basis="pca")
    with pytest.raises(ValueError, match="obsm\\['X_without'\\] is not moved along sae_0"):
        sae.get.steering_arrows(steered, "X_without", "sae_0", basis="pca")


def test_nothing_changes(steered, compare):
    before = compare.state(steered)
    sae.get.steering_arrows(steered, "X_new", 0, basis="pca")
    compare.assert_same(before, compare.state(steered))


def test_mudata(make_mudata):
    mdata = make_mudata()
    for settings in ({"mod": "rna"}, {"use_rep": "X_joint"}):
        sae.tl.fit(mdata, n_features=8, k=2, steps=20, progress=False, **settings)
        where = {"mod": settings.get("mod")}
        sae.tl.encode(mdata, **where)
        steer(mdata, **where)
        basis = settings.get("use_rep", "pca")
        assert len(sae.get.steering_arrows(mdata, "X_new", 0, basis=basis, **where))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"key_added": "X_other"}, KeyError, "no 'X_other'; it has .* Run sae.tl.steer"),
        ({"key_added": "X_pca"}, ValueError, "is the representation of 'sae' itself: no cell is moved"),
        ({"key_added": "sae"}, ValueError, r"is \(120, 8\), and the representation of the SAE \(120, 6\)"),
        ({"feature": 1}, ValueError, "is not moved along sae_1"),
        ({"feature": "sae_99"}, KeyError, "no feature 'sae_99'"),
        ({"basis": "umap"}, KeyError, "no 'umap'"),
        ({"basis": "none"}, ValueError, "2 cells have a place on 'none'"),
        ({"n_grid": 0}, ValueError, "n_grid=0 must be 1 or more"),
        ({"max_cells": 1}, ValueError, "max_cells=1 must be 2 or more"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
    ],
)
def test_bad_input(steered, settings, error, message):
    steered.obsm["none"] = np.full((120, 2), np.nan)
    steered.obsm["none"][:2] = 0
    with pytest.raises(error, match=message):
        sae.get.steering_arrows(steered, **{"key_added": "X_new", "basis": "pca"} | settings)
