from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import sparse

from sae.core.autoencoder import BLOCK_ROWS, Autoencoder

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def made(d=5, h=11, *, activation="relu", k=None, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    weights = {"W_enc": (d, h), "b_enc": h, "W_dec": (h, d), "b_dec": d}
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    drawn["b_enc"] += np.float32(shift)
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
            a[i, j] = max(pre[j], 0)
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
        pytest.param({"shift": -100}, 0, id="none active"),
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


@pytest.mark.parametrize("settings", [{}, {"activation": "topk", "k": 4}], ids=["relu", "topk"])
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


SHAPES = {"7 to 16": (7, 16, None), "50 to 64": (50, 64, 8), "50 to 300": (50, 300, None), "130 to 33": (130, 33, 5)}
POSITIONS = (0, 1, 7, 255, 505, BLOCK_ROWS - 1, BLOCK_ROWS, 2222, 4607, 4608, 4999)


def assert_alone_as_among_others(sae, x, layout):
    among = sae.encode(layout(x))
    for row in POSITIONS:
        alone = sae.encode(layout(x[row : row + 1]))
        np.testing.assert_array_equal(alone.activations.toarray(), among.activations[row].toarray())
        assert alone.squared_error[0] == among.squared_error[row]


@each_layout
@pytest.mark.parametrize(("d", "h", "k"), SHAPES.values(), ids=SHAPES)
def test_cell_alone_is_encoded_to_the_bit_as_among_others(layout, d, h, k):
    sae = made(d, h, activation="topk" if k else "relu", k=k)
    assert_alone_as_among_others(sae, cells(5000, d), layout)


@pytest.mark.parametrize("kernel", ["Haswell", "SkylakeX"])
def test_cell_alone_is_encoded_as_among_others_whatever_the_linear_algebra(kernel):
    """OpenBLAS for AVX2 adds up rows 6 to 11 of a product in another order than rows 0 to 5, that for AVX-512 does not."""
    script = (
        "import numpy as np\n"
        "from sae.core.autoencoder import Autoencoder\n"
        "rng = np.random.default_rng(0)\n"
        "shapes = (50, 64), (64,), (64, 50), (50,)\n"
        "sae = Autoencoder(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))\n"
        "x = np.tile(rng.normal(size=50).astype(np.float32), (600, 1))\n"
        "a = sae.encode(x).activations.toarray()\n"
        "assert (a == sae.encode(x[:1]).activations.toarray()).all()\n"
    )
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": "2"}
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
