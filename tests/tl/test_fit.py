from __future__ import annotations

import time

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from scipy import sparse

import sae
from sae import _schema
from sae.core.architectures import ARCHITECTURES
from sae.core.defaults import nested_groups
from sae.core.preprocess import fit_scaling

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
CALIBRATED = ("batchtopk", "matryoshka")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
HISTORY = ["step", "learning_rate", "loss", "fvu", "l0", "dead_fraction", "val_fvu", "val_l0"]


def weights(adata, key="sae"):
    return [adata.uns[key]["weights"][name] for name in WEIGHTS]


def assert_same_weights(a, b):
    left, right = (adata.uns["sae"]["weights"] for adata in (a, b))
    assert ("threshold" in left) is ("threshold" in right)
    for name in (*WEIGHTS, *(["threshold"] if "threshold" in left else [])):
        assert left[name].tobytes() == right[name].tobytes(), name


def fvu_and_l0(x, stored):
    """Both from the formula, in float64, with the stored weights alone."""
    W_enc, b_enc, W_dec, b_dec = (stored["weights"][name].astype(np.float64) for name in WEIGHTS)
    x = np.asarray(x, dtype=np.float64)
    a = x @ W_enc + b_enc
    a[a <= stored["weights"].get("threshold", 0)] = 0
    if stored["params"]["architecture"] == "topk":
        a[a < -np.sort(-a, axis=1)[:, [stored["params"]["k"] - 1]]] = 0
    residual = x - (a @ W_dec + b_dec)
    return np.square(residual).sum() / np.square(x - x.mean(axis=0)).sum(), (a > 0).sum(axis=1).mean()


def test_writes_what_it_says(make_adata, compare):
    adata = make_adata(d=6)
    before = compare.state(adata)
    assert sae.tl.fit(adata, architecture="topk", n_features=16, steps=20) is None
    stored = adata.uns.pop("sae")
    compare.assert_same(before, compare.state(adata))
    assert set(stored) == {"schema_version", "params", "weights", "history"}
    assert stored["schema_version"] == 1
    assert {name: value.shape for name, value in stored["weights"].items()} == {
        "W_enc": (6, 16),
        "b_enc": (16,),
        "W_dec": (16, 6),
        "b_dec": (6,),
    }
    assert {value.dtype for value in stored["weights"].values()} == {np.dtype(np.float32)}
    assert list(stored["history"]) == HISTORY
    assert stored["history"]["step"].iloc[-1] == 20
    assert stored["history"]["step"].is_monotonic_increasing
    expected = {"architecture": "topk", "n_features": 16, "k": 4, "use_rep": "X_pca", "layer": None, "steps": 20}
    assert {name: stored["params"][name] for name in expected} == expected
    assert "l1" not in stored["params"]
    assert {type(value) for value in stored["params"].values()} <= {str, int, float, bool, type(None)}


def test_key_added_leaves_other_saes_alone(fitted, compare):
    before = compare.state(fitted)
    sae.tl.fit(fitted, n_features=16, steps=2, key_added="second")
    assert fitted.uns["second"]["weights"]["W_enc"].shape == (50, 16)
    del fitted.uns["second"]
    compare.assert_same(before, compare.state(fitted))


@pytest.mark.parametrize(
    ("n", "d", "n_features", "k", "batch_size"),
    [
        pytest.param(40, 50, 64, 15, 36, id="few cells"),
        pytest.param(2_700, 50, 64, 15, 256, id="pbmc3k"),
        pytest.param(10_000, 50, 256, 15, 256, id="10,000"),
        pytest.param(30_000, 50, 512, 15, 256, id="30,000"),
        pytest.param(100_000, 10, 128, 4, 1_024, id="many, narrow"),
        pytest.param(1_100, 300, 64, 16, 256, id="a fourth of the features"),
    ],
)
def test_defaults_follow_the_data(n, d, n_features, k, batch_size):
    adata = ad.AnnData(obsm={"X_pca": np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)})
    sae.tl.fit(adata, steps=1)
    params = adata.uns["sae"]["params"]
    assert (params["n_features"], params["k"], params["batch_size"]) == (n_features, k, batch_size)
    assert params["learning_rate"] == 8e-3
    sae.tl.fit(adata, architecture="vanilla", steps=1)
    params = adata.uns["sae"]["params"]
    assert params["learning_rate"] == pytest.approx(2e-4 * (16384 / n_features) ** 0.5)


def test_default_steps(make_adata):
    adata = make_adata()
    sae.tl.fit(adata)
    assert adata.uns["sae"]["params"]["steps"] == 2500
    adata = make_adata(n=1000)
    sae.tl.fit(adata, architecture="vanilla", learning_rate=0.1)
    assert adata.uns["sae"]["params"]["steps"] == 90
    sae.tl.fit(adata, architecture="vanilla", learning_rate=0.1, batch_size=9)
    assert adata.uns["sae"]["params"]["steps"] == 100, "one pass over 900 training cells"


SPARSITY = {name: architecture.sparsity for name, architecture in ARCHITECTURES.items()}


@each_architecture
def test_default_sparsity(make_adata, architecture):
    adata = make_adata()
    sae.tl.fit(adata, architecture=architecture, steps=1)
    params = adata.uns["sae"]["params"]
    assert params["architecture"] == architecture
    assert params["recipe"] == "default"
    assert {"k", "l1"} & params.keys() == {SPARSITY[architecture]} - {"l0"}
    if SPARSITY[architecture] == "k":
        assert params["k"] == 4
    elif SPARSITY[architecture] == "l1":
        assert params["l1"] == 1


@each_architecture
def test_sparsity_that_was_asked_for_is_kept(make_adata, architecture):
    """Beside the L0 that was found."""
    adata = make_adata()
    asked = 3 if SPARSITY[architecture] == "k" else 0.0625
    sae.tl.fit(adata, architecture=architecture, steps=1, **{SPARSITY[architecture]: asked})
    params = adata.uns["sae"]["params"]
    assert asked in [value for name, value in params.items() if "fvu" not in name]
    fvu, l0 = fvu_and_l0(adata.obsm["X_pca"], adata.uns["sae"])
    assert 0.9 * params["l0"] + 0.1 * params["val_l0"] == pytest.approx(l0, rel=1e-3)


def test_automatic_k_is_stored_with_what_was_tried(tmp_path):
    """Cells are sums of three of 16 programs."""
    rng = np.random.default_rng(0)
    programs, active = rng.normal(size=(16, 16)), rng.random((1000, 16)).argsort(axis=1) < 3
    adata = ad.AnnData(obsm={"X_pca": (np.where(active, rng.uniform(1, 2, size=(1000, 16)), 0) @ programs)})
    sae.tl.fit(adata, k="auto", preprocess="whiten", n_features=32, steps=600)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for params in (adata.uns["sae"]["params"], ad.read_h5ad(tmp_path / "cells.h5ad").uns["sae"]["params"]):
        tried = dict(zip(params["k_tried"].tolist(), params["k_tried_unexplained"].tolist(), strict=True))
        assert list(tried) == sorted(tried)
        assert params["k"] == min(k for k, unexplained in tried.items() if unexplained < 0.01)
        assert params["k_choice"] == "the smallest k that leaves less than 1% of held-out cells unexplained"


def test_automatic_k_falls_back_on_the_default(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, k="auto", steps=20)
    params = adata.uns["sae"]["params"]
    assert params["k"] == 4
    assert params["k_choice"] == "the default: no k leaves less than 1% of held-out cells unexplained"
    assert (params["k_tried_unexplained"] > 0.01).all()


ONE_SEED = [(name, "center", 0.1) for name in ARCHITECTURES]
ONE_SEED += [("topk", preprocess, 0.1) for preprocess in ("standardize", "whiten", "none")] + [("topk", "center", 0)]


@pytest.mark.parametrize(("architecture", "preprocess", "validation"), ONE_SEED)
def test_one_seed_one_result(make_adata, architecture, preprocess, validation):
    a, b, c = (make_adata() for _ in range(3))
    for adata, seed in ((a, 3), (b, 3), (c, 4)):
        sae.tl.fit(adata, architecture=architecture, preprocess=preprocess, steps=40, rng=seed, validation=validation)
    assert_same_weights(a, b)
    assert not np.array_equal(weights(a)[0], weights(c)[0])
    pd.testing.assert_frame_equal(a.uns["sae"]["history"], b.uns["sae"]["history"], check_exact=True)


def test_one_seed_one_result_on_real_cells(pbmc, fitted):
    sae.tl.fit(pbmc, n_features=32, steps=150)
    assert_same_weights(pbmc, fitted)


def test_generator_draws_the_seed_that_is_kept(make_adata):
    a, b, c = (make_adata() for _ in range(3))
    generator = np.random.default_rng(7)
    sae.tl.fit(a, steps=5, rng=generator)
    sae.tl.fit(b, steps=5, rng=generator)
    seed = a.uns["sae"]["params"]["seed"]
    assert type(seed) is int
    assert b.uns["sae"]["params"]["seed"] != seed
    sae.tl.fit(c, steps=5, rng=seed)
    assert_same_weights(a, c)
    sae.tl.fit(c, steps=1, rng=None)
    drawn = c.uns["sae"]["params"]["seed"]
    sae.tl.fit(c, steps=1, rng=None)
    assert c.uns["sae"]["params"]["seed"] != drawn


def test_global_generators_are_left_alone(make_adata):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    sae.tl.fit(make_adata(), steps=5)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


MEASURED = [(name, "center") for name in ARCHITECTURES]
MEASURED += [(name, preprocess) for name in ("topk", "vanilla") for preprocess in ("standardize", "whiten", "none")]


@pytest.mark.parametrize(("architecture", "preprocess"), MEASURED)
def test_metrics_are_of_the_stored_weights_on_the_raw_embedding(pbmc, architecture, preprocess):
    kind = SPARSITY[architecture]
    sparsity = {kind: {"k": 5, "l1": 0.5, "l0": 0.05}[kind]}
    sae.tl.fit(pbmc, architecture=architecture, preprocess=preprocess, n_features=32, steps=100, **sparsity)
    stored = pbmc.uns["sae"]
    params = stored["params"]
    fvu, l0 = fvu_and_l0(pbmc.obsm["X_pca"], stored)
    # Whichever cells were held out, the two shares add up to all cells.
    assert 0.9 * params["fvu"] + 0.1 * params["val_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert 0.9 * params["l0"] + 0.1 * params["val_l0"] == pytest.approx(l0, rel=1e-3)
    last = stored["history"].iloc[-1]
    # Where the threshold is calibrated in the end, the records are of the last batch's.
    rel = 0.1 if architecture in CALIBRATED else 1e-3
    assert last["val_fvu"] == pytest.approx(params["val_fvu"], rel=rel)
    assert last["fvu"] == pytest.approx(params["fvu"], rel=rel)
    assert params["val_fvu"] > params["fvu"]
    # It has learned something: better than the mean by far, and better than at the start.
    assert fvu < 0.7
    assert last["val_fvu"] < stored["history"]["val_fvu"].iloc[0]


def test_decoder_has_unit_norm_in_the_training_space(pbmc):
    x = pbmc.obsm["X_pca"].astype(np.float64)
    sae.tl.fit(pbmc, n_features=32, steps=30, preprocess="center")
    scale = pbmc.uns["sae"]["params"]["input_scale"]
    assert scale == pytest.approx(np.sqrt(x.shape[1] / x.var(axis=0).sum()))
    np.testing.assert_allclose(np.linalg.norm(weights(pbmc)[2] * scale, axis=1), 1, rtol=1e-5)
    sae.tl.fit(pbmc, n_features=32, steps=30, preprocess="standardize")
    np.testing.assert_allclose(np.linalg.norm(weights(pbmc)[2] / x.std(axis=0), axis=1), 1, rtol=1e-5)
    assert pbmc.uns["sae"]["params"]["input_scale"] is None


@pytest.mark.parametrize(
    ("preprocess", "scale", "same"),
    [
        pytest.param("center", 10.0, True, id="center, all columns alike"),
        pytest.param("center", np.arange(1.0, 7.0), False, id="center, columns apart"),
        pytest.param("standardize", np.arange(1.0, 7.0), True, id="standardize, columns apart"),
    ],
)
def test_what_scaling_takes_out(make_adata, preprocess, scale, same):
    plain, moved = make_adata(), make_adata()
    moved.obsm["X_pca"] = moved.obsm["X_pca"] * scale + 3
    for adata in (plain, moved):
        sae.tl.fit(adata, architecture="topk", preprocess=preprocess, steps=30)
        sae.tl.encode(adata)
    a, b = (adata.obsm["sae"].toarray() for adata in (plain, moved))
    assert np.allclose(a, b, atol=1e-3) is same


def test_nested_dictionaries_reconstruct_on_their_own(pbmc):
    x = pbmc.obsm["X_pca"]
    width = nested_groups(64, fit_scaling(x, "center").n_effective)[0]
    assert width < 64
    left = {}
    for architecture in ("batchtopk", "matryoshka"):
        sae.tl.fit(pbmc, architecture=architecture, n_features=64, steps=200, preprocess="center")
        model = sae.get.model(pbmc)
        first = model.encode(x).activations.toarray()
        first[:, width:] = 0
        left[architecture] = np.square(x - model.decode(first)).sum() / np.square(x - x.mean(axis=0)).sum()
    assert left["matryoshka"] < left["batchtopk"] - 0.05, "the first features alone"


@pytest.mark.parametrize("architecture", CALIBRATED)
def test_held_out_cells_have_k_active_features_on_average(make_adata, architecture):
    adata = make_adata(n=4000)
    sae.tl.fit(adata, architecture=architecture, k=3, n_features=32, steps=100, validation=0.3)
    params = adata.uns["sae"]["params"]
    assert params["val_l0"] == pytest.approx(3, abs=0.02)
    assert params["l0"] == pytest.approx(3, abs=0.3)
    assert params["k"] == 3


@each_architecture
def test_thresholds_are_stored_where_there_are_any(make_adata, architecture):
    adata = make_adata()
    sae.tl.fit(adata, architecture=architecture, n_features=16, steps=30)
    stored = adata.uns["sae"]["weights"]
    assert ("threshold" in stored) is (architecture in ("batchtopk", "matryoshka", "jumprelu", "gated"))
    if "threshold" in stored:
        assert stored["threshold"].shape == (16,)
        assert stored["threshold"].dtype == np.float32
        assert (stored["threshold"] >= 0).all() and (stored["threshold"] > 0).any()
        np.testing.assert_array_equal(sae.get.model(adata).threshold, stored["threshold"])


@each_architecture
def test_every_architecture_goes_through_files(make_adata, tmp_path, compare, architecture):
    adata = make_adata()
    sae.tl.fit(adata, architecture=architecture, n_features=16, steps=30)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    store = zarr.storage.MemoryStore()
    adata.write_zarr(store)
    read = ad.read_h5ad(tmp_path / "cells.h5ad"), ad.read_zarr(store)
    for other in (adata, *read):
        sae.tl.encode(other)
    for other in read:
        compare.assert_same(dict(adata.uns["sae"]), dict(other.uns["sae"]))
        compare.assert_same(adata.obsm["sae"], other.obsm["sae"])
    assert adata.uns["sae"]["encoded"]["l0"] == pytest.approx(adata.obsm["sae"].nnz / 80)


# ---- The recipe of the paper


@pytest.mark.parametrize("architecture", ["vanilla", "relu", "topk"])
def test_paper_starts_from_uniform_weights(make_adata, architecture):
    """As torch's linear layers: within 1 / sqrt(inputs of the layer), on the embedding as it is."""
    adata, h = make_adata(d=6), 400
    sae.tl.fit(adata, recipe="paper", architecture=architecture, n_features=h, steps=1, learning_rate=1e-12)
    stored = adata.uns["sae"]["weights"]
    bounds = {"W_enc": 6**-0.5, "W_dec": h**-0.5}
    bounds |= {"b_enc": 6**-0.5, "b_dec": h**-0.5} if architecture == "vanilla" else {}
    for name, bound in bounds.items():
        highest = np.abs(stored[name]).max()
        assert 0.5 * bound < highest <= bound * (1 + 1e-6), name
        assert np.abs(stored[name].mean()) < 0.5 * bound, name
    for name in {"b_enc", "b_dec"} - bounds.keys():
        np.testing.assert_allclose(stored[name], 0, atol=1e-9)


def test_paper_has_the_published_settings(make_adata):
    adata = make_adata(n=300)
    sae.tl.fit(adata, recipe="paper", architecture="vanilla", steps=1)
    params = adata.uns["sae"]["params"]
    expected = {
        "recipe": "paper",
        "architecture": "vanilla",
        "n_features": 10_000,
        "l1": 1e-3,
        "learning_rate": 1e-4,
        "batch_size": 128,
        "preprocess": "none",
    }
    assert {name: params[name] for name in expected} == expected
    small = make_adata(n=40)
    sae.tl.fit(small, recipe="paper", architecture="vanilla", n_features=4, batch_size=10)
    assert small.uns["sae"]["params"]["steps"] == 500 * 4, "500 passes over 36 cells"


def test_paper_keeps_one_learning_rate_and_free_decoder_norms(make_adata):
    adata = make_adata(n=200)
    sae.tl.fit(adata, recipe="paper", architecture="vanilla", n_features=32, steps=200, learning_rate=1e-3)
    stored = adata.uns["sae"]
    assert (stored["history"]["learning_rate"] == 1e-3).all()
    assert np.linalg.norm(stored["weights"]["W_dec"], axis=1).std() > 0.01
    assert stored["params"]["fvu"] < stored["history"]["fvu"].iloc[0]


# ---- Ending early, interruption, checkpoints


def test_early_stopping_ends_where_nothing_is_gained(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, steps=400, learning_rate=1e-9, early_stopping=3)
    params = adata.uns["sae"]["params"]
    assert params["ended"] == "early"
    assert params["steps"] < 300
    assert adata.uns["sae"]["history"]["step"].iloc[-1] == params["steps"]
    sae.tl.fit(adata, steps=20)
    assert adata.uns["sae"]["params"]["ended"] == "finished"


@pytest.fixture
def interrupt(monkeypatch):
    """Call it with a number: Ctrl-C is pressed after so many steps of the next `fit`."""
    from sae.tl import _fit as module

    make = module.progress_bar

    def interrupt(step):
        def progress_bar(*args, **kwargs):
            bar = make(*args, **kwargs)
            count, left = bar.update, iter(range(step - 1, -1, -1))

            def update(n=1):
                count(n)
                if next(left) == 0:
                    monkeypatch.setattr(module, "progress_bar", make)
                    raise KeyboardInterrupt

            bar.update = update
            return bar

        monkeypatch.setattr(module, "progress_bar", progress_bar)

    return interrupt


def test_interruption_keeps_what_was_trained(make_adata, interrupt, log):
    adata = make_adata()
    interrupt(15)
    sae.tl.fit(adata, steps=50)
    params = adata.uns["sae"]["params"]
    assert (params["steps"], params["ended"]) == (15, "interrupted")
    assert "interrupted after 15 of 50 steps; what was trained so far is kept" in log()
    assert adata.uns["sae"]["history"]["step"].tolist() == list(range(1, 16))
    fvu, _ = fvu_and_l0(adata.obsm["X_pca"], adata.uns["sae"])
    assert 0.9 * params["fvu"] + 0.1 * params["val_fvu"] == pytest.approx(fvu, rel=1e-4)
    sae.tl.encode(adata)


def test_interruption_before_the_first_record_leaves_an_empty_history(make_adata, interrupt, tmp_path):
    adata = make_adata()
    interrupt(1)
    sae.tl.fit(adata, steps=200)
    assert list(adata.uns["sae"]["history"]) == HISTORY
    assert len(adata.uns["sae"]["history"]) == 0
    adata.write_h5ad(tmp_path / "cells.h5ad")
    sae.tl.encode(ad.read_h5ad(tmp_path / "cells.h5ad"))


def test_checkpoint_is_gone_on_from(make_adata, interrupt, tmp_path):
    whole, resumed = make_adata(), make_adata()
    sae.tl.fit(whole, steps=50)
    interrupt(15)
    sae.tl.fit(resumed, steps=50, checkpoint=tmp_path / "state.npz")
    sae.tl.fit(resumed, steps=50, checkpoint=str(tmp_path / "state.npz"))
    assert_same_weights(whole, resumed)
    pd.testing.assert_frame_equal(whole.uns["sae"]["history"], resumed.uns["sae"]["history"], check_exact=True)
    assert resumed.uns["sae"]["params"] == whole.uns["sae"]["params"]


CHANGED = {
    "seed": ({"rng": 1}, None),
    "sparsity": ({"k": 2}, None),
    "preprocessing": ({"preprocess": "standardize"}, None),
    "held-out share": ({"validation": 0.2}, None),
    "values": ({}, lambda adata: adata.obsm["X_pca"].__setitem__((0, 0), 9)),
    "cells": ({}, lambda adata: setattr(adata, "obs_names", adata.obs_names[::-1])),
}


@pytest.mark.parametrize(("given", "change"), CHANGED.values(), ids=CHANGED)
def test_checkpoint_of_something_else_is_refused(make_adata, interrupt, tmp_path, compare, given, change):
    path = tmp_path / "state.npz"
    interrupt(15)
    sae.tl.fit(make_adata(), steps=50, checkpoint=path)
    adata = make_adata()
    if change is not None:
        change(adata)
    before = compare.state(adata)
    with pytest.raises(ValueError, match=r"state\.npz was written with other settings or other data"):
        sae.tl.fit(adata, **({"steps": 50, "checkpoint": path} | given))
    compare.assert_same(before, compare.state(adata))


# ---- Where cells are read from disk


def in_file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return h5py.File(tmp_path / "cells.h5ad")["X"]


def in_zarr(adata, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    return zarr.open(str(tmp_path / "cells.zarr"), mode="r")["X"]


def in_dask(adata, chunks):
    return pytest.importorskip("dask.array").from_array(adata.X, chunks=chunks)


ON_DISK = {
    "hdf5": in_file,
    "hdf5 csr": lambda adata, path: ad.io.sparse_dataset(in_file(adata, path)),
    "hdf5 csc": lambda adata, path: ad.io.sparse_dataset(in_file(adata, path)),
    "zarr": in_zarr,
    "zarr csr": lambda adata, path: ad.io.sparse_dataset(in_zarr(adata, path)),
    "dask": lambda adata, path: in_dask(adata, (100, 7)),
    "dask csr": lambda adata, path: in_dask(adata, (100, 20)),
}


@pytest.fixture(params=ON_DISK)
def from_disk(request, make_adata, tmp_path):
    """Cells with a layer on disk, and the same cells with it in memory."""
    kind = request.param.partition(" ")[2]
    memory = make_adata(n=600)
    memory.X = {"": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[kind](memory.X)
    disk = make_adata(n=600)
    disk.layers["log"] = ON_DISK[request.param](memory, tmp_path)
    memory.layers["log"] = memory.X
    yield disk, memory
    if request.param.startswith("hdf5"):
        layer = disk.layers["log"]
        (layer if isinstance(layer, h5py.Dataset) else layer.group).file.close()


def test_layer_on_disk_is_encoded_as_in_memory(from_disk):
    disk, memory = from_disk
    sae.tl.fit(memory, layer="log", n_features=32, steps=50)
    sae.tl.encode(memory)
    sae.tl.encode(disk, reference=memory)
    assert (disk.obsm["sae"] != memory.obsm["sae"]).nnz == 0
    assert disk.uns["sae"]["encoded"] == memory.uns["sae"]["encoded"]


def test_layer_on_disk_is_read_in_the_order_of_the_reference(from_disk):
    disk, memory = from_disk
    reordered = memory[:, np.random.default_rng(0).permutation(20)].copy()
    sae.tl.fit(reordered, layer="log", n_features=32, steps=50)
    sae.tl.encode(reordered)
    sae.tl.encode(disk, reference=reordered)
    assert (disk.obsm["sae"] != reordered.obsm["sae"]).nnz == 0


def test_layer_on_disk_is_trained_on(from_disk):
    disk, memory = from_disk
    for adata in (disk, memory):
        sae.tl.fit(adata, layer="log", architecture="vanilla", n_features=32, steps=50, learning_rate=1e-2)
    one, other = (adata.uns["sae"]["params"] for adata in (disk, memory))
    assert one["fvu"] == pytest.approx(other["fvu"], rel=0.05)
    assert one["variance"] == pytest.approx(other["variance"])
    assert one["fingerprint"] == other["fingerprint"]
    assert disk.uns["sae"]["weights"]["input_names"].tolist() == disk.var_names.tolist()
    sae.tl.encode(disk)
    assert disk.uns["sae"]["encoded"]["fvu"] == pytest.approx(0.9 * one["fvu"] + 0.1 * one["val_fvu"], rel=1e-6)


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_backed_object(make_adata, tmp_path, layout):
    memory = make_adata(n=600, layout=layout)
    memory.write_h5ad(tmp_path / "cells.h5ad")
    adata = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sae.tl.fit(adata, "X", n_features=32, steps=50, validation=0)
    sae.tl.encode(adata)
    sae.tl.encode(memory, reference=adata)
    assert (adata.obsm["sae"] != memory.obsm["sae"]).nnz == 0
    adata.file.close()


def test_embedding_in_a_memory_map(make_adata, tmp_path):
    memory, disk = make_adata(n=600), make_adata(n=600)
    np.save(tmp_path / "x.npy", memory.obsm["X_pca"])
    disk.obsm["X_pca"] = np.load(tmp_path / "x.npy", mmap_mode="r")
    sae.tl.fit(disk, n_features=32, steps=50)
    sae.tl.encode(disk)
    sae.tl.encode(memory, reference=disk)
    assert (disk.obsm["sae"] != memory.obsm["sae"]).nnz == 0


def test_non_finite_values_on_disk_are_refused(make_adata, tmp_path):
    memory = make_adata(n=600)
    memory.X[[3, 500], 0] = np.nan
    memory.layers["log"] = in_file(memory, tmp_path)
    with pytest.raises(ValueError, match=r"2 NaN or infinite values in 2 of 600 rows \(rows 3, 500\)"):
        sae.tl.fit(memory, layer="log", steps=1)
    memory.layers["log"].file.close()


def test_stronger_penalty_fewer_active_features(make_adata):
    l0 = []
    for l1 in (0.1, 1.0, 5.0):
        adata = make_adata(n=200)
        sae.tl.fit(adata, architecture="vanilla", l1=l1, steps=200)
        l0.append(adata.uns["sae"]["params"]["l0"])
    assert l0[0] > l0[1] > l0[2] > 0


def test_no_validation(make_adata):
    adata = make_adata(n=12)
    sae.tl.fit(adata, validation=0, steps=20, batch_size=1000)
    stored = adata.uns["sae"]
    assert np.isnan(stored["params"]["val_fvu"]) and np.isnan(stored["params"]["val_l0"])
    assert stored["history"][["val_fvu", "val_l0"]].isna().all(axis=None)
    assert stored["params"]["batch_size"] == 12, "a batch is never larger than the training cells"
    fvu, l0 = fvu_and_l0(adata.obsm["X_pca"], stored)
    assert stored["params"]["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert stored["params"]["l0"] == pytest.approx(l0)
    sae.tl.encode(adata)


def test_validation_cells_are_not_trained_on(make_adata):
    """With more features than cells the training cells are fitted closely, the others cannot be."""
    adata = ad.AnnData(obsm={"X_pca": np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)})
    sae.tl.fit(adata, n_features=256, k=16, steps=400, validation=0.5)
    params = adata.uns["sae"]["params"]
    assert params["val_fvu"] > 3 * params["fvu"]


def test_layer_dense_and_sparse_and_x_agree(make_adata):
    fitted = []
    for layout, where in (("dense", "layer"), ("csr", "layer"), ("csc", "layer"), ("dense", "X"), ("csr", "X")):
        adata = make_adata(layout="csr" if layout == "csr" else "dense")
        if layout == "csc":
            adata.X = sparse.csc_matrix(adata.X)
        if where == "layer":
            adata.layers["log"] = adata.X
            adata.X = None
            sae.tl.fit(adata, layer="log", steps=20)
            assert (adata.uns["sae"]["params"]["use_rep"], adata.uns["sae"]["params"]["layer"]) == (None, "log")
        else:
            sae.tl.fit(adata, use_rep="X", steps=20)
            assert (adata.uns["sae"]["params"]["use_rep"], adata.uns["sae"]["params"]["layer"]) == ("X", None)
        assert adata.uns["sae"]["weights"]["input_names"].tolist() == adata.var_names.tolist()
        fitted.append(adata)
    for other in fitted[1:]:
        assert_same_weights(fitted[0], other)


def test_obsm_as_data_frame_keeps_column_names(make_adata):
    array, frame = make_adata(d=3), make_adata(d=3)
    frame.obsm["X_pca"] = pd.DataFrame(frame.obsm["X_pca"], index=frame.obs_names, columns=["a", "b", "c"])
    for adata in (array, frame):
        sae.tl.fit(adata, steps=10)
    assert_same_weights(array, frame)
    assert "input_names" not in array.uns["sae"]["weights"]
    assert frame.uns["sae"]["weights"]["input_names"].tolist() == ["a", "b", "c"]
    assert sae.get.decoder(frame).columns.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.uint16, np.float16])
def test_input_types(make_adata, dtype):
    reference, other = make_adata(), make_adata()
    values = np.rint(np.abs(reference.obsm["X_pca"]) * 10)
    reference.obsm["X_pca"], other.obsm["X_pca"] = values.astype(np.float32), values.astype(dtype)
    for adata in (reference, other):
        sae.tl.fit(adata, steps=10)
    assert_same_weights(reference, other)
    assert weights(other)[0].dtype == np.float32


@pytest.mark.parametrize("preprocess", ["center", "standardize", "whiten"])
def test_constant_columns_get_no_weight(make_adata, log, preprocess):
    adata = make_adata(d=6)
    adata.obsm["X_pca"][:, 2] = 4
    adata.obsm["X_pca"][:, 5] = 0
    sae.tl.fit(adata, preprocess=preprocess, steps=20)
    W_enc, _, W_dec, b_dec = weights(adata)
    assert not W_enc[[2, 5]].any() and not W_dec[:, [2, 5]].any()
    assert W_enc[[0, 1, 3, 4]].any(axis=1).all()
    np.testing.assert_allclose(b_dec[[2, 5]], [4, 0])
    assert adata.uns["sae"]["params"]["n_constant_inputs"] == 2
    assert "2 of 6 columns of adata.obsm['X_pca'] are constant" in log()


def test_refit_drops_what_belonged_to_the_old_sae(analysed):
    analysed.varm["sae"] = np.zeros((analysed.n_vars, 32))
    sae.tl.fit(analysed, n_features=16, steps=2)
    assert "sae" not in analysed.obsm
    assert "sae" not in analysed.varm
    assert set(analysed.uns["sae"]) == {"schema_version", "params", "weights", "history"}
    with pytest.raises(KeyError, match=r"sae\.tl\.encode"):
        sae.get.activations(analysed)


def test_mudata_modality(make_mudata, compare):
    mdata, alone = make_mudata(), make_mudata()["adt"].copy()
    before = compare.state(mdata)
    sae.tl.fit(mdata, mod="adt", steps=10)
    sae.tl.fit(alone, steps=10)
    assert_same_weights(mdata["adt"], alone)
    del mdata["adt"].uns["sae"]
    compare.assert_same(before, compare.state(mdata))


def test_mudata_joint(make_mudata, compare):
    mdata = make_mudata()
    before = compare.state(mdata)
    alone = ad.AnnData(obs=mdata.obs, obsm={"X_joint": mdata.obsm["X_joint"]})
    sae.tl.fit(mdata, "X_joint", steps=10)
    sae.tl.fit(alone, "X_joint", steps=10)
    assert_same_weights(mdata, alone)
    del mdata.uns["sae"]
    compare.assert_same(before, compare.state(mdata))


def test_divergence_is_an_error_and_leaves_the_object_alone(analysed, compare):
    before = compare.state(analysed)
    with pytest.raises(FloatingPointError, match=r"try learning_rate="):
        sae.tl.fit(analysed, learning_rate=1e30, steps=20)
    compare.assert_same(before, compare.state(analysed))


@pytest.mark.parametrize(("seconds", "progress", "shown"), [(0, True, False), (1.1, True, True), (1.1, False, False)])
def test_bar_when_it_takes_long(make_adata, capsys, monkeypatch, seconds, progress, shown):
    from sae.core import train

    evaluate = train._evaluate
    monkeypatch.setattr(train, "_evaluate", lambda *args: time.sleep(seconds / 4) or evaluate(*args))
    sae.tl.fit(make_adata(), steps=2, progress=progress)
    assert ("fvu=" in capsys.readouterr().err) is shown


@pytest.mark.parametrize(("preprocess", "shape"), [("damped", (50, 50)), ("standardize", (50,)), ("center", None)])
def test_scaling_is_stored_where_it_turns_directions(pbmc, preprocess, shape):
    sae.tl.fit(pbmc, preprocess=preprocess, n_features=16, steps=20)
    stored = pbmc.uns["sae"]
    scaling = stored["weights"].get("scaling")
    assert (None if scaling is None else scaling.shape) == shape
    found = _schema.directions(stored)
    W_dec = stored["weights"]["W_dec"].astype(np.float64)
    in_training = W_dec if scaling is None else W_dec * scaling if scaling.ndim == 1 else W_dec @ scaling
    norms = np.linalg.norm(in_training, axis=1, keepdims=True)
    np.testing.assert_allclose(found, in_training / norms, rtol=1e-6, atol=1e-9)
    if scaling is not None:
        np.testing.assert_allclose(norms, 1, rtol=1e-4)
