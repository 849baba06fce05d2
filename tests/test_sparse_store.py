from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import zarr
from scipy import sparse

from sae import _sparse_store as module
from sae._sparse_store import SparseStore
from sae.core.rows import take_rows

pytest.importorskip("dask.array")
H = 23


def drawn(n=1000, density=0.2, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.random((n, H)) * (rng.random((n, H)) < density)).astype(np.float32))


def written(path, a, *, key="sae", block=64):
    with SparseStore(path, key, a.shape) as store:
        for start in range(0, a.shape[0], block):
            store.append(a[start : start + block])
        return store.publish()


def read(path):
    return ad.io.read_elem(zarr.open_group(path, mode="r"))


def assert_same(found, expected):
    assert type(found) is sparse.csr_matrix and found.dtype == np.float32 and found.shape == expected.shape
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


@pytest.mark.parametrize("chunk", [1, 100, 4600, 10**6])
@pytest.mark.parametrize("n", [0, 1, 64, 1000])
def test_what_is_written_is_read(tmp_path, monkeypatch, n, chunk):
    monkeypatch.setattr(module, "CHUNK_VALUES", chunk)
    a = drawn(n) if chunk > 1 else drawn(n, 0.002)
    x = written(tmp_path / "a.zarr", a)
    assert os.listdir(tmp_path) == ["a.zarr"]
    assert_same(read(tmp_path / "a.zarr"), a)
    assert_same(take_rows(x, slice(None)), a)
    assert zarr.open_group(tmp_path / "a.zarr", mode="r")["data"].chunks == (chunk,)


def test_cells_without_activations(tmp_path):
    a = sparse.csr_matrix((100, H), dtype=np.float32)
    assert_same(sparse.csr_matrix(written(tmp_path / "a.zarr", a).compute()), a)


@pytest.mark.parametrize(("values", "rows"), [(100, 16), (3, 1), (10**9, 32)])
def test_blocks_have_about_as_many_values_as_they_should(tmp_path, monkeypatch, values, rows):
    monkeypatch.setattr(module, "BLOCK_VALUES", values)
    monkeypatch.setattr(module, "MOST_BLOCK_ROWS", 32)
    x = written(tmp_path / "a.zarr", drawn(100))
    assert x.chunks[0][0] == rows and x.chunks[1] == (H,)
    assert_same(sparse.csr_matrix(x.compute()), drawn(100))


def test_starts_are_64_bit_where_they_must_be(tmp_path, monkeypatch):
    a = drawn()
    written(tmp_path / "a.zarr", a)
    assert zarr.open_group(tmp_path / "a.zarr")["indptr"].dtype == np.int32
    monkeypatch.setattr(module, "LONGEST_SHORT", a.nnz - 1)
    written(tmp_path / "b.zarr", a)
    assert zarr.open_group(tmp_path / "b.zarr")["indptr"].dtype == np.int64
    assert_same(read(tmp_path / "b.zarr"), a)


def test_an_earlier_one_is_replaced_when_the_new_one_is_complete(tmp_path):
    path, old, new = tmp_path / "a.zarr", drawn(seed=1), drawn(500)
    written(path, old)
    with SparseStore(path, "sae", new.shape) as store:
        store.append(new)
        assert_same(read(path), old)
        store.publish()
        assert_same(read(path), new)
    assert os.listdir(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moment", ["empty", "half", "complete", "published"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, earlier, moment, error):
    path, old = tmp_path / "a.zarr", drawn(seed=1)
    if earlier:
        written(path, old)
    with pytest.raises(error), SparseStore(path, "sae", (1000, H)) as store:
        if moment != "empty":
            store.append(drawn(500))
        if moment in ("complete", "published"):
            store.append(drawn(500))
        if moment == "published":
            store.publish()
        raise error
    assert os.listdir(tmp_path) == (["a.zarr"] if earlier else [])
    if earlier:
        assert_same(read(path), old)


def test_a_failure_of_the_exchange_leaves_what_was_there(tmp_path, monkeypatch):
    path, old, rename = tmp_path / "a.zarr", drawn(seed=1), os.rename
    written(path, old)

    def fails(source, target):
        if str(source).endswith(".partial"):
            raise PermissionError("not now")
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", fails)
    with pytest.raises(PermissionError, match="not now"):
        written(path, drawn())
    assert os.listdir(tmp_path) == ["a.zarr"]
    assert_same(read(path), old)


def a_file(path):
    path.write_text("notes")


def a_folder(path):
    path.mkdir()


def a_folder_with_files(path):
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def cells_in_zarr(path):
    ad.AnnData(np.ones((3, 2), np.float32)).write_zarr(path)


def a_matrix_of_the_user(path):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    ad.io.write_elem(group, "x", drawn(10))
    os.rename(path / "x", path.with_name("x"))
    import shutil

    shutil.rmtree(path)
    os.rename(path.with_name("x"), path)
    assert_same(read(path), drawn(10))


def strange_attributes(path):
    path.mkdir()
    (path / ".zattrs").write_text("[1, 2")


def a_list_of_attributes(path):
    path.mkdir()
    (path / ".zattrs").write_text("[]")


def activations_of_another(path):
    written(path, drawn(10), key="other")


REFUSED = {
    "file": (a_file, "was not written by sae.tl.encode"),
    "folder": (a_folder, "was not written by sae.tl.encode"),
    "folder with files": (a_folder_with_files, "was not written by sae.tl.encode"),
    "cells": (cells_in_zarr, "was not written by sae.tl.encode"),
    "matrix": (a_matrix_of_the_user, "was not written by sae.tl.encode"),
    "damaged attributes": (strange_attributes, "was not written by sae.tl.encode"),
    "other attributes": (a_list_of_attributes, "was not written by sae.tl.encode"),
    "another SAE": (activations_of_another, "holds the activations of the SAE 'other'"),
}


def everything_in(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_something_else_is_refused_and_left_alone(tmp_path, make, message):
    make(tmp_path / "a.zarr")
    before = everything_in(tmp_path)
    with pytest.raises(FileExistsError, match=rf"out='.*a\.zarr' .*{message}"):
        written(tmp_path / "a.zarr", drawn())
    assert everything_in(tmp_path) == before


def test_what_appears_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match="was not written"), SparseStore(tmp_path / "a", "sae", (10, H)) as store:
        store.append(drawn(10))
        (tmp_path / "a").mkdir()
        store.publish()
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"a folder that does not exist: {tmp_path}/no\. Make it first"):
        written(tmp_path / "no" / "a.zarr", drawn())


@pytest.mark.parametrize("out", [3, True, ["a.zarr"]])
def test_what_is_no_path(out):
    with pytest.raises(TypeError, match=r"expected the path of a folder"):
        written(out, drawn())


@pytest.mark.parametrize("missing", ["dask", "zarr"])
def test_without_dask(tmp_path, monkeypatch, missing):
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=r'pip install "scsae\[dask\]"'):
        written(tmp_path / "a.zarr", drawn())
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "a.zarr").symlink_to(tmp_path / "real" / "b.zarr")
    for seed in (0, 1):
        written(str(tmp_path / "a.zarr"), drawn(seed=seed))
        assert (tmp_path / "a.zarr").is_symlink()
        assert_same(read(tmp_path / "real" / "b.zarr"), drawn(seed=seed))
    assert sorted(os.listdir(tmp_path)) == ["a.zarr", "real"] and os.listdir(tmp_path / "real") == ["b.zarr"]
