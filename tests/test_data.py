from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sae._data import (
    Holder,
    Representation,
    columns_in_order,
    fingerprint,
    listing,
    readable,
    recomputed,
    refuse_non_finite,
    representation,
)
from sae.core import moments
from sae.core.rows import Rows

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def values(n=30, d=4, *, seed=0):
    return np.random.default_rng(seed).poisson(1, size=(n, d)).astype(np.float32)


class Strange:
    """Has a shape and a type, and is nothing that is known."""

    shape, dtype = (3, 2), np.dtype(np.float32)


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        pytest.param(None, ValueError, "X is None", id="None"),
        pytest.param(Strange(), TypeError, r"X is a .*\.Strange; expected a NumPy array, a SciPy sparse matrix, an HDF5", id="unknown"),
        pytest.param([[1, 2]], TypeError, r"X is a builtins\.list; expected a NumPy array", id="list"),
        pytest.param(np.ones(3), ValueError, r"X has the shape \(3,\); expected cells", id="one axis"),
        pytest.param(np.ones((3, 0)), ValueError, r"X has the shape \(3, 0\); expected cells", id="no columns"),
        pytest.param(np.ones((3, 2), dtype=complex), TypeError, r"X holds complex128 values; expected numbers", id="complex"),
        pytest.param(np.array([["a"]]), TypeError, r"X holds <U1 values; expected numbers", id="text"),
    ],
)  # fmt: skip
def test_what_cannot_be_read(matrix, error, message):
    with pytest.raises(error, match=message):
        readable(matrix, "X")


@pytest.mark.parametrize("as_format", [sparse.csr_array, sparse.csc_matrix, sparse.csc_array, sparse.coo_matrix])
def test_sparse_matrices_in_memory_become_csr(as_format):
    found = readable(as_format(values()), "X")
    assert type(found) is sparse.csr_matrix
    np.testing.assert_array_equal(found.toarray(), values())


def with_bad(places, *, n=9, dtype=np.float32):
    matrix = np.ones((n, 3), dtype=dtype)
    for row, column, value in places:
        matrix[row, column] = value
    return matrix


@each_layout
@pytest.mark.parametrize(
    ("places", "message"),
    [
        pytest.param([(4, 1, np.nan)], "X has 1 NaN or infinite values in 1 of 9 rows (rows 4).", id="NaN"),
        pytest.param([(0, 1, np.inf)], "X has 1 NaN or infinite values in 1 of 9 rows (rows 0).", id="infinite"),
        pytest.param([(1, 1, np.inf), (8, 2, -np.inf)], "X has 2 NaN or infinite values in 2 of 9 rows (rows 1, 8).", id="both signs"),
        pytest.param([(3, 0, np.nan), (3, 2, np.nan)], "X has 2 NaN or infinite values in 1 of 9 rows (rows 3).", id="same row"),
        pytest.param([(row, 0, np.nan) for row in range(5)], "5 of 9 rows (rows 0, 1, 2, 3, 4).", id="five rows"),
        pytest.param([(row, 0, np.nan) for row in range(6)], "6 of 9 rows (rows 0, 1, 2, 3, 4, ...).", id="many rows"),
    ],
)  # fmt: skip
def test_non_finite_values_are_refused_with_their_rows(layout, places, message, monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 2)
    matrix = layout(with_bad(places))
    for where in (matrix, Rows(matrix, np.arange(9))):
        with pytest.raises(ValueError, match=re.escape(message)):
            refuse_non_finite(where, "X")
    with pytest.raises(ValueError, match=re.escape(f"adata.{message}" if message.startswith("X") else message)):
        representation(Holder(ad.AnnData(matrix), "adata"), "X", None)


@each_layout
@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(values(), id="floats"),
        pytest.param(values().astype(np.int32), id="integers"),
        pytest.param(values() > 0, id="booleans"),
        pytest.param(np.full((4, 3), 3e38), id="large double precision"),
        pytest.param(np.full((4, 3), 3e38, dtype=np.float32), id="large single precision"),
        pytest.param(np.zeros((0, 3)), id="no cells"),
    ],
)
def test_finite_values_pass(layout, matrix):
    refuse_non_finite(layout(matrix), "X")


def held(n=30, **slots):
    adata = ad.AnnData(values(n), obs=pd.DataFrame(index=[f"cell-{i}" for i in range(n)]))
    adata.obsm["X_pca"] = values(n, 3, seed=1)
    adata.layers["counts"] = sparse.csr_matrix(values(n, seed=2))
    return Holder(adata, "adata")


SLOTS = {
    "obsm": ("X_pca", None, lambda adata: adata.obsm["X_pca"]),
    "layer": (None, "counts", lambda adata: adata.layers["counts"]),
    "X": ("X", None, lambda adata: adata.X),
}
each_slot = pytest.mark.parametrize(("use_rep", "layer", "read"), SLOTS.values(), ids=SLOTS)


@each_slot
def test_unchanged_representation_was_not_recomputed(use_rep, layer, read):
    holder = held()
    taken = fingerprint(holder, read(holder.data))
    assert not recomputed(holder, use_rep, layer, [], taken)


@each_slot
def test_changed_value_was_recomputed(use_rep, layer, read):
    holder = held()
    taken = fingerprint(holder, read(holder.data))
    matrix = read(holder.data)
    (matrix.data if sparse.issparse(matrix) else matrix)[7] += 1
    assert recomputed(holder, use_rep, layer, [], taken)


@each_slot
def test_other_cells_are_not_a_recomputed_representation(use_rep, layer, read):
    holder = held()
    taken = fingerprint(holder, read(holder.data))
    subset = Holder(holder.data[3:].copy(), "adata")
    assert not recomputed(subset, use_rep, layer, [], taken)


def test_fingerprint_does_not_depend_on_how_the_matrix_is_stored():
    holder = held()
    matrix = holder.data.obsm["X_pca"]
    stored = (matrix, sparse.csr_matrix(matrix), np.asfortranarray(matrix), matrix.astype(np.float64))
    assert len({fingerprint(holder, other) for other in stored}) == 1


def test_fingerprint_of_many_cells_looks_at_the_first_and_the_last():
    holder = held(3001)
    matrix = holder.data.obsm["X_pca"]
    taken = fingerprint(holder, matrix)
    for row in (0, 3000):
        matrix[row, 0] += 1
        assert fingerprint(holder, matrix) != taken
        matrix[row, 0] -= 1
    assert fingerprint(holder, matrix) == taken


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda adata: adata.obsm.pop("X_pca"), id="removed"),
        pytest.param(
            lambda adata: adata.obsm.update(X_pca=pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names)), id="as a table"
        ),
        pytest.param(lambda adata: adata.obsm.update(X_pca=sparse.csc_matrix(adata.obsm["X_pca"])), id="as csc"),
    ],
)  # fmt: skip
def test_same_values_in_another_form_or_none_at_all_are_not_recomputed(change):
    holder = held()
    taken = fingerprint(holder, holder.data.obsm["X_pca"])
    change(holder.data)
    assert not recomputed(holder, "X_pca", None, [], taken)


def test_columns_with_names_are_compared_in_the_order_of_the_sae():
    holder = held()
    adata, names = holder.data, list(holder.data.var_names)
    taken = fingerprint(holder, adata.X)
    reordered, fewer = (Holder(adata[:, columns].copy(), "adata") for columns in ([2, 0, 3, 1], [0, 1, 2]))
    assert not recomputed(reordered, "X", None, names, taken)
    assert not recomputed(fewer, "X", None, names, taken)
    reordered.data.X[4, 0] += 1
    assert recomputed(reordered, "X", None, names, taken)


def test_columns_of_a_table_are_compared_in_the_order_of_the_sae():
    holder = held()
    adata, names = holder.data, ["a", "b", "c"]
    taken = fingerprint(holder, adata.obsm["X_pca"])
    table = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=names)
    adata.obsm["X_pca"] = table[["c", "a", "b"]]
    assert not recomputed(holder, "X_pca", None, names, taken)
    adata.obsm["X_pca"] = table[["c", "a", "b"]] + 1
    assert recomputed(holder, "X_pca", None, names, taken)


def found(names):
    matrix = np.arange(12.0).reshape(3, 4)
    return Representation(matrix, "adata.X", None if names is None else np.array(names, dtype=object))


@pytest.mark.parametrize(
    ("names", "wanted", "columns"),
    [
        pytest.param(["a", "b", "c", "d"], ["a", "b", "c", "d"], [0, 1, 2, 3], id="same"),
        pytest.param(["a", "b", "c", "d"], ["d", "a", "c", "b"], [3, 0, 2, 1], id="reordered"),
        pytest.param(["a", "b", "c", "d"], ["c", "a"], [2, 0], id="fewer"),
        pytest.param(None, ["a", "b", "c", "d"], [0, 1, 2, 3], id="without names"),
        pytest.param(["a", "b", "c", "d"], [], [0, 1, 2, 3], id="trained without names"),
    ],
)
def test_columns_are_put_in_the_order_of_the_sae(names, wanted, columns):
    representation = found(names)
    np.testing.assert_array_equal(columns_in_order(representation, wanted), representation.matrix[:, columns])


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match=re.escape("adata.X lacks 2 of the 3 columns that the SAE reads: 'y', 'z'.")):
        columns_in_order(found(["a", "b", "c", "d"]), ["a", "y", "z"])


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        ([], 3, "none"),
        (["a"], 3, "'a'"),
        (["a", "b", "c"], 3, "'a', 'b', 'c'"),
        (["a", "b", "c", "d"], 3, "'a', 'b', 'c', ... (4 in all)"),
        ([1, 2.5], 3, "'1', '2.5'"),
        (pd.Index(["a", "b"]), 3, "'a', 'b'"),
        ({"k": 0, "l": 1}, 3, "'k', 'l'"),
    ],
)
def test_listing_quotes_and_shortens(names, most, text):
    assert listing(names, most) == text
