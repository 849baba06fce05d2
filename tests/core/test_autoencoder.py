from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from sae.core import autoencoder as module
from sae.core.autoencoder import BLOCK_ROWS, Autoencoder

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def made(d=5, h=11, *, activation="relu", k=None, threshold=None, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    weights = {"W_enc": (d, h), "b_enc": h, "W_dec": (h, d), "b_dec": d}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    drawn["b_enc"] += np.float32(shift)
    if threshold is not None:
        drawn["threshold"] = (threshold + rng.random(h)).astype(np.float32)
    return Autoencoder(**drawn, activation=activation, k=k)


def cells(n=20, d=5, *, seed=1):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def encoded_by_loop(sae, x):
    """Encode one number at a time, in double precision."""
    a = np.zeros((len(x), sae.n_features))
    for i, row in enumerate(x):
        pre = [
            sum(float(row[p]) * float(sae.W_enc[p, j]) for p in range(sae.n_inputs)) + float(sae.b_enc[j])
            for j in range(sae.n_features)
        ]
        kept = sorted(range(len(pre)), key=lambda j: -pre[j])[: sae.k] if sae.activation == "topk" else range(len(pre))
        for j in kept:
            a[i, j] = pre[j] if pre[j] > (0 if sae.threshold is None else sae.threshold[j]) else 0
    return a


@each_layout
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        pytest.param({}, 11, id="relu"),
        pytest.param({"activation": "topk", "k": 3}, 3, id="topk"),
        pytest.param({"activation": "topk", "k": 1}, 1, id="topk of one"),
        pytest.param({"activation": "topk", "k": 6, "shift": -2}, 5, id="fewer positive than k"),
        pytest.param({"activation": "topk", "k": 11}, 11, id="k of all"),
        pytest.param({"activation": "topk", "k": 30}, 11, id="k of more than all"),
        pytest.param({"shift": -100}, 0, id="none active"),
        pytest.param({"activation": "topk", "k": 3, "shift": -100}, 0, id="none active of topk"),
        pytest.param({"activation": "threshold", "threshold": 0.5}, 11, id="threshold"),
        pytest.param({"activation": "threshold", "threshold": 100}, 0, id="none active of threshold"),
    ],
)
def test_encode_is_the_formula(layout, settings, most):
    sae, x = made(**settings), cells()
    encoded = sae.encode(layout(x))
    expected = encoded_by_loop(sae, x)
    assert (expected > 0).sum(axis=1).max() <= most
    assert isinstance(encoded.activations, sparse.csr_matrix)
    assert encoded.activations.dtype == np.float32
    np.testing.assert_array_equal(encoded.activations.toarray() > 0, expected > 0)
    np.testing.assert_allclose(encoded.activations.toarray(), expected, rtol=1e-4, atol=1e-5)
    residual = x - (expected @ sae.W_dec.astype(np.float64) + sae.b_dec)
    np.testing.assert_allclose(encoded.squared_error, np.square(residual).sum(axis=1), rtol=1e-4)


KINDS = {
    "relu": {},
    "topk": {"activation": "topk", "k": 4},
    "threshold": {"activation": "threshold", "threshold": 0.5},
}
each_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def test_an_activation_at_its_threshold_is_not_active():
    ones = np.ones((1, 3), np.float32)
    sae = Autoencoder(
        ones, np.zeros(3, np.float32), ones.T.copy(), np.zeros(1, np.float32), "threshold", None, 2 * ones[0]
    )
    x = np.array([[2], [np.nextafter(np.float32(2), np.float32(3))]], np.float32)
    np.testing.assert_array_equal(sae.encode(x).activations.toarray(), [[0, 0, 0], [x[1, 0]] * 3])


def test_of_equal_activations_topk_keeps_the_first():
    ones = np.ones((1, 7), np.float32)
    sae = Autoencoder(ones, np.zeros(7, np.float32), ones.T.copy(), np.zeros(1, np.float32), "topk", 3)
    np.testing.assert_array_equal(sae.encode(ones[:, :1]).activations.toarray(), [[1, 1, 1, 0, 0, 0, 0]])


@each_kind
def test_activations_are_stored_in_order_without_zeros(settings):
    a = made(**settings).encode(cells(n=BLOCK_ROWS + 30)).activations
    assert (a.data > 0).all()
    a.has_canonical_format = a.has_sorted_indices = False
    for start, stop in zip(a.indptr[:-1], a.indptr[1:], strict=True):
        assert (np.diff(a.indices[start:stop]) > 0).all()


def test_decode_is_the_formula_for_dense_and_sparse_activations():
    sae, rng = made(), np.random.default_rng(0)
    a = np.where(rng.random((9, 11)) < 0.3, rng.random((9, 11)), 0).astype(np.float32)
    expected = a.astype(np.float64) @ sae.W_dec + sae.b_dec
    np.testing.assert_allclose(sae.decode(a), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sae.decode(sparse.csr_matrix(a)), expected, rtol=1e-5, atol=1e-6)


@each_kind
@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_changes_nothing(monkeypatch, settings, threads):
    sae, x = made(**settings), cells(5 * BLOCK_ROWS + 17)
    expected = sae.encode(x)
    monkeypatch.setattr(module, "available_threads", lambda: threads)
    found = sae.encode(x)
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found.activations, part), getattr(expected.activations, part))
    np.testing.assert_array_equal(found.squared_error, expected.squared_error)


SHAPES = {
    "7 to 16": (7, 16, {}),
    "50 to 64": (50, 64, {"activation": "topk", "k": 8}),
    "50 to 300": (50, 300, {}),
    "130 to 33": (130, 33, {"activation": "topk", "k": 5}),
    "50 to 70": (50, 70, {"activation": "threshold", "threshold": 2}),
}
POSITIONS = (0, 1, 7, 255, 505, BLOCK_ROWS - 1, BLOCK_ROWS, 2222, 4607, 4608, 4999)


def assert_alone_as_among_others(sae, x, layout):
    among = sae.encode(layout(x))
    for row in POSITIONS:
        alone = sae.encode(layout(x[row : row + 1]))
        np.testing.assert_array_equal(alone.activations.toarray(), among.activations[row].toarray())
        assert alone.squared_error[0] == among.squared_error[row]


@each_layout
@pytest.mark.parametrize(("d", "h", "settings"), SHAPES.values(), ids=SHAPES)
def test_cell_alone_is_encoded_to_the_bit_as_among_others(layout, d, h, settings):
    assert_alone_as_among_others(made(d, h, **settings), cells(5000, d), layout)


def test_cell_alone_is_encoded_as_among_others_without_vector_instructions_of_this_cpu():
    """The compiler then arranges the sums for the plainest CPU of its kind."""
    script = (
        "import numpy as np\n"
        "from sae.core.autoencoder import Autoencoder\n"
        "rng = np.random.default_rng(0)\n"
        "shapes = (50, 67), (67,), (67, 50), (50,)\n"
        "sae = Autoencoder(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))\n"
        "x = np.tile(rng.normal(size=50).astype(np.float32), (601, 1))\n"
        "among, alone = sae.encode(x), sae.encode(x[:1])\n"
        "assert (among.activations.toarray() == alone.activations.toarray()).all()\n"
        "assert (among.squared_error == alone.squared_error).all()\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@each_layout
def test_no_cells_give_empty_results(layout):
    encoded = made().encode(layout(cells(0)))
    assert encoded.activations.shape == (0, 11)
    assert encoded.activations.dtype == np.float32
    assert encoded.squared_error.shape == (0,)


@pytest.mark.parametrize("dtype", [np.float64, np.int16])
def test_input_of_any_number_type_is_read_as_single_precision(dtype):
    x = np.rint(10 * cells())
    expected, found = (made().encode(x.astype(kind)).activations for kind in (np.float32, dtype))
    np.testing.assert_array_equal(found.toarray(), expected.toarray())


def test_every_block_is_announced():
    sizes = []
    made().encode(cells(2 * BLOCK_ROWS + 3), on_block=sizes.append)
    assert sizes == [BLOCK_ROWS, BLOCK_ROWS, 3]
