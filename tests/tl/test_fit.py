from __future__ import annotations

import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import sae

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
HISTORY = ["step", "learning_rate", "loss", "fvu", "l0", "dead_fraction", "val_fvu", "val_l0"]


def weights(adata, key="sae"):
    return [adata.uns[key]["weights"][name] for name in WEIGHTS]


def assert_same_weights(a, b):
    for name, left, right in zip(WEIGHTS, weights(a), weights(b), strict=True):
        assert left.tobytes() == right.tobytes(), name


def fvu_and_l0(x, stored):
    """Both from the formula, in float64, with the stored weights alone."""
    W_enc, b_enc, W_dec, b_dec = (stored["weights"][name].astype(np.float64) for name in WEIGHTS)
    x = np.asarray(x, dtype=np.float64)
    a = np.maximum(x @ W_enc + b_enc, 0)
    if "k" in stored["params"]:
        a[a < -np.sort(-a, axis=1)[:, [stored["params"]["k"] - 1]]] = 0
    residual = x - (a @ W_dec + b_dec)
    return np.square(residual).sum() / np.square(x - x.mean(axis=0)).sum(), (a > 0).sum(axis=1).mean()


def test_writes_what_it_says(make_adata, compare):
    adata = make_adata(d=6)
    before = compare.state(adata)
    assert sae.tl.fit(adata, n_features=16, steps=20) is None
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
    expected = {"architecture": "topk", "n_features": 16, "k": 2, "use_rep": "X_pca", "layer": None, "steps": 20}
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
        pytest.param(40, 50, 64, 10, 36, id="few cells"),
        pytest.param(2_700, 50, 128, 10, 256, id="pbmc3k"),
        pytest.param(10_000, 50, 512, 10, 256, id="10,000"),
        pytest.param(50_000, 50, 512, 10, 1_024, id="50,000"),
        pytest.param(50_000, 10, 128, 4, 1_024, id="narrow"),
        pytest.param(1_100, 300, 64, 10, 256, id="a sixth of the features"),
    ],
)
def test_defaults_follow_the_data(n, d, n_features, k, batch_size):
    adata = ad.AnnData(obsm={"X_pca": np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)})
    sae.tl.fit(adata, steps=1)
    params = adata.uns["sae"]["params"]
    assert (params["n_features"], params["k"], params["batch_size"]) == (n_features, k, batch_size)
    assert params["learning_rate"] == pytest.approx(2e-4 * (16384 / n_features) ** 0.5)


def test_default_steps(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, learning_rate=0.5)
    assert adata.uns["sae"]["params"]["steps"] == 18
    sae.tl.fit(adata, learning_rate=0.5, batch_size=2)
    assert adata.uns["sae"]["params"]["steps"] == 36, "one pass over 72 training cells"
    sae.tl.fit(adata, architecture="vanilla", steps=1)
    assert adata.uns["sae"]["params"]["l1"] == 1


@pytest.mark.parametrize("architecture", ["topk", "vanilla", "relu"])
@pytest.mark.parametrize(
    ("preprocess", "validation"), [("center", 0.1), ("standardize", 0.1), ("whiten", 0.1), ("center", 0)]
)
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


@pytest.mark.parametrize("architecture", ["topk", "vanilla", "relu"])
@pytest.mark.parametrize("preprocess", ["center", "standardize", "whiten"])
def test_metrics_are_of_the_stored_weights_on_the_raw_embedding(pbmc, architecture, preprocess):
    sparsity = {"k": 5} if architecture == "topk" else {"l1": 0.5}
    sae.tl.fit(pbmc, architecture=architecture, preprocess=preprocess, n_features=32, steps=100, **sparsity)
    stored = pbmc.uns["sae"]
    params = stored["params"]
    fvu, l0 = fvu_and_l0(pbmc.obsm["X_pca"], stored)
    # Whichever cells were held out, the two shares add up to all cells.
    assert 0.9 * params["fvu"] + 0.1 * params["val_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert 0.9 * params["l0"] + 0.1 * params["val_l0"] == pytest.approx(l0, rel=1e-3)
    last = stored["history"].iloc[-1]
    assert last["val_fvu"] == pytest.approx(params["val_fvu"], rel=1e-4)
    assert last["fvu"] == pytest.approx(params["fvu"], rel=1e-4)
    assert params["val_fvu"] > params["fvu"]
    # It has learned something: better than the mean by far, and better than at the start.
    assert fvu < 0.7
    assert last["val_fvu"] < stored["history"]["val_fvu"].iloc[0]


def test_decoder_has_unit_norm_in_the_training_space(pbmc):
    x = pbmc.obsm["X_pca"].astype(np.float64)
    sae.tl.fit(pbmc, n_features=32, steps=30)
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
        sae.tl.fit(adata, preprocess=preprocess, steps=30)
        sae.tl.encode(adata)
    a, b = (adata.obsm["sae"].toarray() for adata in (plain, moved))
    assert np.allclose(a, b, atol=1e-3) is same


@pytest.mark.parametrize("architecture", ["topk", "vanilla"])
def test_nested_dictionaries_reconstruct_on_their_own(pbmc, architecture):
    x = pbmc.obsm["X_pca"]
    left = {}
    for nested in (None, False, True):
        sae.tl.fit(pbmc, architecture=architecture, nested=nested, n_features=64, steps=200)
        assert pbmc.uns["sae"]["params"]["nested"] is (architecture == "topk" if nested is None else nested)
        model = sae.get.model(pbmc)
        first = model.encode(x).activations.toarray()
        first[:, 8:] = 0
        left[nested] = np.square(x - model.decode(first)).sum() / np.square(x - x.mean(axis=0)).sum()
    assert left[True] < 0.9 * left[False], "the first 8 features alone"
    assert left[None] == left[architecture == "topk"]


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
