from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from sae.core import preprocess as module
from sae.core.autoencoder import Autoencoder
from sae.core.preprocess import PREPROCESS, fit_scaling

D, CONSTANTS = 8, {2: 0.0, 5: 3.25}
VARYING = [column for column in range(D) if column not in CONSTANTS]


def cells(n=300, *, constants=CONSTANTS, seed=0):
    """Correlated columns of different mean and spread (n, d), with constant ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) * np.geomspace(0.2, 20, D) + rng.normal(size=D) * 10
    for column, value in constants.items():
        x[:, column] = value
    return x.astype(np.float32)


def trained(m, h=13, *, activation="relu", k=None, seed=1):
    """An SAE of a training space with m columns."""
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (m, h), "b_enc": h, "W_dec": (h, m), "b_dec": m}
    drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    threshold = rng.random(h) if activation == "threshold" else None
    return Autoencoder(**drawn, activation=activation, k=k, threshold=threshold)


def test_center_has_one_factor_and_a_mean_squared_norm_of_the_number_of_varying_columns():
    x = cells()
    y = fit_scaling(x, "center").transform(x)
    assert y.shape == (300, len(VARYING))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.square(y).sum(axis=1).mean(), len(VARYING), rtol=1e-5)
    factor = y.std(axis=0) / x[:, VARYING].std(axis=0)
    np.testing.assert_allclose(factor, factor[0], rtol=1e-4)


def test_standardize_gives_each_varying_column_unit_variance():
    x = cells()
    y = fit_scaling(x, "standardize").transform(x)
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(axis=0), 1, rtol=1e-5)


def test_whiten_gives_the_identity_covariance_up_to_the_ridge():
    x = cells()
    scaling = fit_scaling(x, "whiten")
    y = scaling.transform(x).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(np.cov(x[:, VARYING].astype(np.float64), rowvar=False, bias=True))
    shrunken = eigenvalues / (eigenvalues + 1e-3 * eigenvalues.mean())
    covariance = np.cov(y, rowvar=False, bias=True)
    np.testing.assert_allclose(covariance, np.diag(shrunken), atol=1e-5)
    assert shrunken.max() > 0.99


def components(n=800, d=20, *, steepness=0.8, seed=0):
    """Principal components (n, d) of falling variance, as uncorrelated as on the cells they were computed on."""
    drawn = np.random.default_rng(seed).normal(size=(n, d))
    u, _, _ = np.linalg.svd(drawn - drawn.mean(axis=0), full_matrices=False)
    return u * np.sqrt(n) * steepness ** np.arange(d)


def test_damped_divides_components_by_their_spread_and_damps_those_that_are_mostly_noise():
    x = components()
    scaling = fit_scaling(x @ np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0] + 3, "damped")
    values = np.sort(x.var(axis=0))
    # The spectrum falls by the same factor from one component to the next, half of its length further down too.
    noise = values[0] * 0.8**20
    gain = np.maximum(1 - noise / values, 0.1) ** 3 / np.sqrt(values)
    expected = gain * np.sqrt(20 / (gain**2 * values).sum())
    np.testing.assert_allclose(scaling.spread, expected * np.sqrt(values), rtol=1e-6)
    y = scaling.transform(x @ np.linalg.qr(np.random.default_rng(1).normal(size=(20, 20)))[0] + 3)
    np.testing.assert_allclose(np.cov(y, rowvar=False, bias=True), np.diag(scaling.spread**2), atol=1e-4)
    assert np.square(y).sum(axis=1).mean() == pytest.approx(20, rel=1e-4)


AUTO = {
    "components": (components(), "damped"),
    "components with a constant column": (np.insert(components(), 3, 2.0, axis=1), "damped"),
    "components of equal variance": (components(steepness=1.0), "center"),
    "few components": (components(d=10), "center"),
    "few cells": (components(n=150), "center"),
    "correlated columns": (components() @ np.random.default_rng(1).normal(size=(20, 20)), "center"),
    "genes": (np.random.default_rng(2).poisson(1, size=(300, 40)), "center"),
}


@pytest.mark.parametrize(("x", "kind"), AUTO.values(), ids=AUTO)
def test_auto_damps_principal_components_and_centres_everything_else(x, kind):
    found, expected = fit_scaling(x), fit_scaling(x, kind)
    assert found.kind == kind
    np.testing.assert_allclose(found.forward, expected.forward)


@pytest.mark.parametrize("kind", [None, *PREPROCESS])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_scaling_is_the_same_to_the_bit_wherever_and_however_cells_are_stored(tmp_path, kind, dtype):
    da = pytest.importorskip("dask.array")
    x = np.rint(cells(1300, constants={}) * 7).astype(dtype) if dtype is np.int16 else cells(1300).astype(dtype)
    expected = fit_scaling(x, kind, block_rows=512)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for other in (
            np.asfortranarray(x),
            np.repeat(x, 2, axis=0)[::2],
            sparse.csr_matrix(x),
            file.create_dataset("x", data=x, chunks=(100, 3)),
            file.create_dataset("contiguous", data=x),
            zarr.array(x, store=tmp_path / "x.zarr", chunks=(700, D)),
            zarr.create_array(tmp_path / "f.zarr", data=x, chunks=(99, 2), zarr_format=2, order="F"),
            da.from_array(np.asfortranarray(x), chunks=(100, 3)),
            da.from_array(x, chunks=(100, D)).map_blocks(sparse.csr_matrix),
        ):
            found = fit_scaling(other, kind, block_rows=512)
            for name, value in vars(expected).items():
                np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_kind_is_kept(kind):
    assert fit_scaling(cells(), kind).kind == kind


def test_none_leaves_the_varying_columns_as_they_are():
    x = cells()
    scaling = fit_scaling(x, "none")
    np.testing.assert_array_equal(scaling.transform(x), x[:, VARYING])
    np.testing.assert_array_equal(scaling.kept, VARYING)
    np.testing.assert_array_equal(scaling.mean[VARYING], 0)
    np.testing.assert_array_equal(scaling.forward, 1)
    np.testing.assert_array_equal(scaling.backward, 1)
    np.testing.assert_allclose(scaling.variance, np.square(x - x.mean(axis=0)).sum(axis=1).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_spread_is_that_of_the_training_space(kind):
    x = cells()
    scaling = fit_scaling(x, kind)
    y = scaling.transform(x).astype(np.float64)
    np.testing.assert_allclose(scaling.spread, y.std(axis=0), rtol=1e-4)
    eigenvalues = y.var(axis=0)
    assert scaling.n_effective == pytest.approx(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum(), rel=1e-3)


@pytest.mark.parametrize(("sd", "n_effective"), [([1, 1, 1, 1], 4), ([1, 1e-3, 1e-3, 1e-3], 1), ([1, 1, 0.5], 27 / 11)])
def test_effective_inputs_are_as_many_as_carry_most_of_the_variance(sd, n_effective):
    # Plus and minus one in each column, at right angles to the others.
    x = np.array([[(-1) ** (row >> column & 1) for column in range(len(sd))] for row in range(16)]) * sd
    assert fit_scaling(x, "none").n_effective == pytest.approx(n_effective, rel=0.05)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_backward_undoes_forward(kind):
    x = cells()
    scaling = fit_scaling(x, kind)
    y = scaling.transform(x).astype(np.float64)
    back = (y * scaling.backward if scaling.backward.ndim == 1 else y @ scaling.backward) + scaling.mean[VARYING]
    np.testing.assert_allclose(back, x[:, VARYING], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_mean_and_variance_are_those_of_numpy(kind):
    x = cells().astype(np.float64)
    scaling = fit_scaling(x, kind)
    np.testing.assert_array_equal(scaling.kept, VARYING)
    # Constant columns are filled in with their value also where nothing is subtracted.
    mean = np.where(np.isin(np.arange(D), VARYING), 0, x[0]) if kind == "none" else x.mean(axis=0)
    np.testing.assert_allclose(scaling.mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scaling.variance, np.square(x - x.mean(axis=0)).sum(axis=1).mean(), rtol=1e-12)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_csr_and_blocks_of_rows_give_the_same_scaling(kind):
    x = np.where(np.random.default_rng(3).random((300, D)) < 0.5, cells(constants={}), 0)
    expected = fit_scaling(x, kind)
    for other in (fit_scaling(sparse.csr_matrix(x), kind), fit_scaling(x, kind, block_rows=7)):
        for name in ("mean", "kept", "variance"):
            np.testing.assert_allclose(getattr(other, name), getattr(expected, name), rtol=1e-12)
        # Eigenvectors have no sign of their own.
        np.testing.assert_allclose(np.abs(other.forward), np.abs(expected.forward), rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(np.abs(other.backward), np.abs(expected.backward), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_whole_numbers_are_scaled_like_floats(dtype):
    x = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, size=(120, 4)).astype(dtype)
    found, expected = vars(fit_scaling(x, "standardize")), vars(fit_scaling(x.astype(np.float64), "standardize"))
    assert found.pop("kind") == expected.pop("kind")
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


SETTINGS = {"relu": {}, "topk": {"activation": "topk", "k": 3}, "threshold": {"activation": "threshold"}}


@pytest.mark.parametrize("constants", [{}, CONSTANTS], ids=["all vary", "two constant"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", PREPROCESS)
def test_folded_sae_on_raw_cells_is_the_trained_one_on_scaled_cells(kind, settings, constants):
    x = cells(constants=constants)
    scaling = fit_scaling(x, kind)
    sae = trained(D - len(constants), **settings)
    folded = scaling.fold(sae)
    assert (folded.activation, folded.k) == (sae.activation, sae.k)
    if sae.threshold is not None:
        np.testing.assert_allclose(folded.threshold, sae.threshold, rtol=1e-6)
    expected, found = sae.encode(scaling.transform(x)).activations, folded.encode(x).activations
    assert expected.nnz > len(x)
    np.testing.assert_allclose(found.toarray(), expected.toarray(), rtol=1e-3, atol=1e-3)
    decoded = folded.decode(expected)
    np.testing.assert_allclose(scaling.transform(decoded), sae.decode(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", PREPROCESS)
def test_constant_columns_get_zero_weight_and_their_own_value(kind):
    x = cells()
    folded = fit_scaling(x, kind).fold(trained(len(VARYING)))
    constant = list(CONSTANTS)
    assert (folded.W_enc[constant] == 0).all()
    assert (folded.W_dec[:, constant] == 0).all()
    np.testing.assert_array_equal(folded.b_dec[constant], list(CONSTANTS.values()))
    assert (folded.W_enc[VARYING] != 0).all()
    assert folded.W_enc.shape == (D, 13)
    assert folded.W_dec.shape == (13, D)
    assert {getattr(folded, name).dtype for name in ("W_enc", "b_enc", "W_dec", "b_dec")} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("column", "kept"),
    [
        pytest.param(lambda noise: 0 * noise, False, id="zero"),
        pytest.param(lambda noise: 0 * noise + 0.1, False, id="value with rounding"),
        pytest.param(lambda noise: 1e4 + 1e-3 * noise, False, id="sd a ten-millionth of the mean"),
        pytest.param(lambda noise: 1e4 + noise, True, id="sd a ten-thousandth of the mean"),
        pytest.param(lambda noise: 1e-4 * noise, True, id="narrow"),
    ],
)
@pytest.mark.parametrize("kind", PREPROCESS)
def test_column_is_constant_beside_its_mean(kind, column, kept):
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=200), column(rng.normal(size=200))])
    assert fit_scaling(x, kind).kept.tolist() == ([0, 1] if kept else [0])


@pytest.mark.parametrize(("kind", "kept"), [("center", [0]), ("whiten", [0]), ("standardize", [0, 1])])
def test_column_negligible_beside_the_widest_counts_only_where_columns_are_made_alike(kind, kept):
    x = np.random.default_rng(0).normal(size=(200, 2)) * [1, 1e-8]
    assert fit_scaling(x, kind).kept.tolist() == kept


@pytest.mark.parametrize(
    ("n", "d", "message"),
    [
        pytest.param(79, 8, "estimates a 8 × 8 covariance from 79 cells", id="few cells"),
        pytest.param(1000, 21, "it needs at most 20 columns and 10 cells per column", id="too wide"),
    ],
)
def test_whiten_refuses_what_it_cannot_estimate(n, d, message, monkeypatch):
    monkeypatch.setattr(module, "WHITEN_MAX_INPUTS", 20)
    x = np.random.default_rng(0).normal(size=(n, d))
    with pytest.raises(ValueError, match=message):
        fit_scaling(x, "whiten")
    assert len(fit_scaling(x, "standardize").kept) == d


def test_whiten_takes_ten_cells_per_column():
    assert len(fit_scaling(np.random.default_rng(0).normal(size=(80, 8)), "whiten").kept) == 8


@pytest.mark.parametrize("kind", PREPROCESS)
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_all_constant_input_is_refused(kind, value):
    with pytest.raises(ValueError, match="All 4 columns of the representation are constant over 50 cells"):
        fit_scaling(np.full((50, 4), value, dtype=np.float32), kind)
