from __future__ import annotations

import pickle
import tempfile

import anndata as ad
import dask.array
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from sae.core.rows import dense_rows, on_disk
from sae.core.sources import source_of

X = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
ROWS = slice(3, 12)


def through_pickle(x):
    return pickle.loads(pickle.dumps(source_of(x, "x")))()


def mapped(path):
    np.save(path / "x.npy", X)
    return np.load(path / "x.npy", mmap_mode="r")


def hdf5(path):
    with h5py.File(path / "x.h5", "w") as file:
        file.create_group("obsm")["X_pca"] = X
    return h5py.File(path / "x.h5", "r")["obsm/X_pca"]


def backed_sparse(path):
    ad.AnnData(sparse.csr_matrix(X)).write_h5ad(path / "x.h5ad")
    return ad.read_h5ad(path / "x.h5ad", backed="r").X


def zarr_array(path):
    written = zarr.open_array(str(path / "x.zarr"), mode="w", shape=X.shape, chunks=(8, 7), dtype="f4")
    written[:] = X
    return written


STORED = {
    "memory map": mapped,
    "HDF5": hdf5,
    "sparse HDF5": backed_sparse,
    "Zarr": zarr_array,
    "dask": lambda path: dask.array.from_array(X, chunks=(8, 7)),
}


@pytest.mark.parametrize("name", STORED)
def test_what_is_on_disk_is_read_there_again(name, tmp_path):
    x = STORED[name](tmp_path)
    source = source_of(x, "x")
    again = pickle.loads(pickle.dumps(source))()
    assert on_disk(x) and on_disk(again)
    assert again.shape == X.shape and again.dtype == X.dtype
    np.testing.assert_array_equal(dense_rows(again, ROWS), X[ROWS])
    if name != "dask":
        assert len(pickle.dumps(source)) < 4_000, "the values stay where they are"


@pytest.mark.parametrize("view", [np.s_[:, 2:5], np.s_[::3], np.s_[::-1, ::2], np.s_[5:]], ids=str)
def test_views_of_a_memory_map(view, tmp_path):
    again = through_pickle(mapped(tmp_path)[view])
    assert on_disk(again)
    np.testing.assert_array_equal(again, X[view])


@pytest.mark.parametrize("x", [X, np.asfortranarray(X), X[:, ::2], X.astype(np.float16), X > 0], ids=str)
def test_what_is_in_memory_stays_there(x):
    again = through_pickle(x)
    assert not on_disk(again) and again.dtype == x.dtype
    np.testing.assert_array_equal(again, x)


def test_memory_shared_as_a_map_counts_as_memory(tmp_path):
    """As joblib does with large arrays."""
    source = source_of(X, "x")
    shared = source.func(mapped(tmp_path))
    assert not on_disk(shared)
    np.testing.assert_array_equal(shared, X)


def test_sparse_in_memory():
    again = through_pickle(sparse.csr_matrix(X))
    assert sparse.issparse(again) and not on_disk(again)
    np.testing.assert_array_equal(again.toarray(), X)


def test_what_cannot_be_opened_again(tmp_path):
    in_file = dask.array.from_array(hdf5(tmp_path), chunks=(8, 7))
    with pytest.raises(ValueError, match=r"obsm\['X'\] cannot be opened in another process .* Read it into memory"):
        source_of(in_file, "adata.obsm['X']")
    with tempfile.TemporaryFile() as file:
        file.write(X.tobytes())
        file.flush()
        nameless = np.memmap(file, X.dtype, "r", shape=X.shape)
    with pytest.raises(ValueError, match="a memory map of a file without a name"):
        source_of(nameless, "x")
