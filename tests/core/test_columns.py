from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from sae.core import columns as module
from sae.core import moments
from sae.core.columns import GeneColumns
from sae.core.workers import Workers

N, G = 40, 12


def expression(n=N, g=G, *, seed=0):
    """Values (n, g) of either sign; column 0 has none but zeros, column 1 has no zero."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, g)) < 0.4, rng.normal(size=(n, g)), 0)
    x[:, 0], x[:, 1] = 0, rng.uniform(1, 2, n)
    return x


def with_stored_zeros(x):
    stored = sparse.csr_matrix(np.ones_like(x))
    stored.data[:] = x.ravel()
    assert stored.nnz == x.size > np.count_nonzero(x)
    return stored


def reversed_within_rows(x):
    rows = sparse.csr_matrix(x)
    for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        rows.indices[start:stop] = rows.indices[start:stop][::-1].copy()
        rows.data[start:stop] = rows.data[start:stop][::-1].copy()
    return sparse.csr_matrix((rows.data, rows.indices, rows.indptr), shape=x.shape)


def changed_after_a_look(x):
    rows = sparse.csr_matrix(x)
    assert rows.has_canonical_format
    other = reversed_within_rows(x)
    rows.indices[:], rows.data[:] = other.indices, other.data
    assert rows.has_canonical_format
    return rows


def with_repeated_entries(x):
    rows = sparse.csr_matrix(x)
    halves = np.repeat(rows.data / 2, 2), np.repeat(rows.indices, 2), rows.indptr * 2
    return sparse.csr_matrix(halves, shape=x.shape)


def with_long_indices(x):
    rows = sparse.csr_matrix(x)
    rows.indices, rows.indptr = rows.indices.astype(np.int64), rows.indptr.astype(np.int64)
    return rows


IN_MEMORY = {
    "array": np.asarray,
    "column order": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "sparse array": sparse.csr_array,
    "stored zeros": with_stored_zeros,
    "unsorted": reversed_within_rows,
    "unsorted and does not know": changed_after_a_look,
    "repeated": with_repeated_entries,
    "long indices": with_long_indices,
}
each_in_memory = pytest.mark.parametrize("stored", IN_MEMORY.values(), ids=IN_MEMORY)


def as_memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def as_hdf5(x, folder):
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=x, chunks=(7, 5))


def as_zarr(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=(7, 5))


def as_dask(x, folder):
    return pytest.importorskip("dask.array").from_array(x, chunks=(7, 5))


def as_dask_of_csr(x, folder):
    return pytest.importorskip("dask.array").from_array(x, chunks=(7, G)).map_blocks(sparse.csr_matrix)


def as_backed(x, folder):
    group = h5py.File(folder / "x.h5ad", "w")
    write_elem(group, "x", sparse.csr_matrix(x))
    return sparse_dataset(group["x"])


def as_backed_unsorted(x, folder):
    group = h5py.File(folder / "x.h5ad", "w")
    write_elem(group, "x", reversed_within_rows(x))
    return sparse_dataset(group["x"])


def as_zarr_backed(x, folder):
    group = zarr.open_group(folder / "sparse.zarr", mode="w", zarr_format=2)
    write_elem(group, "x", sparse.csr_matrix(x))
    return sparse_dataset(group["x"])


ON_DISK = {
    "memory map": as_memory_map,
    "hdf5": as_hdf5,
    "zarr": as_zarr,
    "dask": as_dask,
    "dask of csr": as_dask_of_csr,
    "backed": as_backed,
    "backed, unsorted": as_backed_unsorted,
    "backed by zarr": as_zarr_backed,
}
each_on_disk = pytest.mark.parametrize("place", ON_DISK.values(), ids=ON_DISK)


class Counted:
    """Rows on disk, and how often each was read."""

    def __init__(self, x):
        self._x, self.shape, self.dtype = x, x.shape, x.dtype
        self.n_read = np.zeros(len(x), int)

    def __getitem__(self, rows):
        self.n_read[rows] += 1
        return sparse.csr_matrix(self._x[rows])


def gathered(x, n_threads=1):
    workers = Workers(n_threads)
    try:
        return list(GeneColumns(x).blocks(workers))
    finally:
        workers.close()


def assert_columns(blocks, x):
    """Together, the blocks hold all of `x`, gene by gene and cells in order."""
    assert [block.first for block in blocks] == list(np.cumsum([0, *map(len, blocks)]))[:-1]
    assert sum(map(len, blocks)) == x.shape[1]
    for block in blocks:
        for j in range(len(block)):
            cells, values = block.gene(j)
            assert (np.diff(cells) > 0).all()
            found = np.zeros(len(x))
            found[cells] = values
            np.testing.assert_array_equal(found, x[:, block.first + j])


@pytest.mark.parametrize("held", [1, 60, 10_000])
@pytest.mark.parametrize("n_threads", [1, 2, 3])
@each_in_memory
def test_columns_of_a_matrix_in_memory(stored, n_threads, held, monkeypatch):
    monkeypatch.setattr(module, "COLUMN_VALUES", held)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 11)
    x = stored(expression())
    before = x.copy()
    assert_columns(gathered(x, n_threads), expression())
    if sparse.issparse(x):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(x, part), getattr(before, part))


@pytest.mark.parametrize("held", [1, 60, 10_000])
@pytest.mark.parametrize("n_threads", [1, 3])
@each_on_disk
def test_columns_of_a_matrix_on_disk(place, n_threads, held, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "DISK_COLUMN_VALUES", held)
    monkeypatch.setattr(module, "COLUMN_VALUES", 37)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 11)
    x = expression()
    blocks = gathered(place(x, tmp_path), n_threads)
    assert_columns(blocks, x)
    assert (len(blocks) == 1) == (held == 10_000)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize("stored", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_any_number_type(stored, dtype):
    x = (3 * np.abs(expression())).astype(dtype)
    assert_columns(gathered(stored(x)), x.astype(np.float64))


@pytest.mark.parametrize("held", [40, 60, 100, 1000])
def test_rows_are_read_once_to_count_and_once_for_every_block_that_fits(held, monkeypatch):
    monkeypatch.setattr(module, "DISK_COLUMN_VALUES", held)
    monkeypatch.setattr(moments, "CHUNK_ROWS", 11)
    x = Counted(expression())
    blocks = gathered(x)
    sizes = np.count_nonzero(expression(), axis=0)
    assert max(len(block.values) for block in blocks) <= held
    for block, after in zip(blocks, blocks[1:], strict=False):
        assert len(block.values) + sizes[after.first] > held
    np.testing.assert_array_equal(x.n_read, 1 + len(blocks))


def test_gene_with_more_values_than_may_be_held_is_alone(monkeypatch):
    monkeypatch.setattr(module, "COLUMN_VALUES", 20)
    blocks = gathered(expression())
    [full] = [block for block in blocks if len(block.values) == N]
    assert full.first == 1
    assert len(full) == 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("stored", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_nothing_to_gather(stored, shape):
    blocks = gathered(stored(np.zeros(shape)), 2)
    assert sum(map(len, blocks)) == shape[1]
    assert all(len(block.values) == 0 for block in blocks)
