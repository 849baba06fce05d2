"""Expression and activations that are not in memory give what they give in memory, to the last bit, and are read in chunks."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import sae
from sae.core import moments

N, G = 300, 40
CHUNK, PARTITION = 64, 100
SETS = {
    name: [f"{modality}{i}" for i in genes for modality in ("g", "other")]
    for name, genes in {"early": range(12), "late": range(20, 32)}.items()
}


@contextmanager
def backed(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    opened = ad.read_h5ad(folder / "cells.h5ad", backed="r")
    yield opened
    opened.file.close()


@contextmanager
def with_zarr(adata, folder):
    group = zarr.open_group(folder / "cells.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "X", adata.X)
    opened = adata.copy()
    opened.X = ad.io.sparse_dataset(group["X"]) if sparse.issparse(adata.X) else group["X"]
    yield opened


@contextmanager
def with_dask(adata, folder):
    """Chunks along genes too."""
    da = pytest.importorskip("dask.array")
    opened = adata.copy()
    if sparse.issparse(adata.X):
        opened.X = da.from_array(adata.X.toarray(), chunks=(70, 15)).map_blocks(sparse.csr_matrix)
    else:
        opened.X = da.from_array(adata.X, chunks=(70, 15))
    yield opened


@contextmanager
def with_layer(adata, folder):
    """As a layer on disk, which the verbs are told of."""
    with h5py.File(folder / "layer.h5", "w") as file:
        ad.io.write_elem(file, "x", adata.X)
        opened = adata.copy()
        opened.layers["log"] = ad.io.sparse_dataset(file["x"]) if sparse.issparse(adata.X) else file["x"]
        del opened.X
        yield opened


@contextmanager
def with_memory_map(adata, folder):
    np.save(folder / "x.npy", adata.X.toarray() if sparse.issparse(adata.X) else adata.X)
    opened = adata.copy()
    opened.X = np.load(folder / "x.npy", mmap_mode="r")
    yield opened


PLACES = {
    "backed": backed,
    "zarr": with_zarr,
    "dask": with_dask,
    "layer": with_layer,
    "memory map": with_memory_map,
}


def lazily(a, folder):
    """As `sae.tl.encode(..., out=)` leaves them; the blocks are not those of the expression."""
    da = pytest.importorskip("dask.array")
    group = zarr.open_group(folder / "activations.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "a", a)
    lazy = ad.experimental.read_elem_lazy(group["a"], chunks=(90, a.shape[1]))
    assert isinstance(lazy, da.Array) and lazy.numblocks[0] > 3
    return lazy


def in_zarr(a, folder):
    group = zarr.open_group(folder / "activations.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "a", a)
    return ad.io.sparse_dataset(group["a"])


def in_hdf5(a, folder):
    group = h5py.File(folder / "activations.h5", "w")
    ad.io.write_elem(group, "a", a)
    return ad.io.sparse_dataset(group["a"])


def dense_in_zarr(a, folder):
    return zarr.array(a.toarray(), store=folder / "activations.zarr", chunks=(70, 3))


ACTIVATIONS = {"dask": lazily, "zarr": in_zarr, "hdf5": in_hdf5, "dense": dense_in_zarr}
each_store = pytest.mark.parametrize("store", ACTIVATIONS.values(), ids=ACTIVATIONS)
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
each_layout = pytest.mark.parametrize("layout", ["dense", "csr"])
VERBS = {
    "rank_genes": (lambda data, **how: sae.tl.rank_genes(data, n_genes=None, **how), ["genes"]),
    "rank_genes, percentile": (lambda data, **how: sae.tl.rank_genes(data, percentile=90, **how), ["genes"]),
    "rank_genes, wilcoxon": (lambda data, **how: sae.tl.rank_genes(data, method="wilcoxon", **how), ["genes"]),
    "rank_genes, regression": (lambda data, **how: sae.tl.rank_genes(data, method="regression", **how), ["genes"]),
    "rank_genes, batch": (lambda data, **how: sae.tl.rank_genes(data, batch="group", **how), ["genes"]),
    "rank_genes, donor": (lambda data, **how: sae.tl.rank_genes(data, donor="donor", min_expected=0, **how), ["genes"]),
    "enrich": (lambda data, **how: sae.tl.enrich(data, SETS, max_padj=1, min_log2fc=0, **how), ["enrichment"]),
    "enrich, percentile": (
        lambda data, **how: sae.tl.enrich(
            data, SETS, max_padj=1, min_log2fc=0, percentile=60, batch="donor", n_null=2, **how
        ),
        ["enrichment", "enrichment_null"],
    ),
    "score_labels": (
        lambda data, **how: sae.tl.score_labels(data, "group", baselines=True, **how),
        ["labels", "label_summary"],
    ),
}
each_verb = pytest.mark.parametrize(("verb", "tables"), VERBS.values(), ids=VERBS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", CHUNK)
    monkeypatch.setattr(moments, "PARTITION_ROWS", PARTITION)
    monkeypatch.setattr("sae.tl._enrich.NULL_SETS", 20)


@pytest.fixture(scope="module")
def cells(make_adata):
    """Factory: the same encoded cells, dense or CSR; one gene never varies."""
    encoded = make_adata(n=N, g=G)
    encoded.X[:, 3] = 0
    encoded.obs["donor"] = pd.Categorical(np.array(["x", "y", "z"])[np.arange(N) % 3])
    sae.tl.fit(encoded, n_features=8, steps=60)
    sae.tl.encode(encoded)

    def make(layout):
        adata = encoded.copy()
        if layout == "csr":
            adata.X = sparse.csr_matrix(adata.X)
        return adata

    return make


@each_verb
@each_layout
@each_place
def test_results_are_those_in_memory(cells, tmp_path, place, layout, verb, tables):
    adata = cells(layout)
    where = {"layer": "log"} if place is with_layer else {}
    with place(adata, tmp_path) as opened:
        matrix = opened.layers["log"] if where else opened.X
        assert type(matrix) is not type(adata.X)
        verb(opened, **where)
        found = {name: opened.uns["sae"][name] for name in tables}
    if place is with_memory_map:
        adata.X = adata.X.toarray() if layout == "csr" else adata.X
    verb(adata)
    for name, table in found.items():
        assert len(table)
        assert_same(table, adata.uns["sae"][name])


@each_verb
@each_store
@pytest.mark.parametrize("place", [backed, with_dask], ids=["backed", "dask"])
def test_activations_on_disk_give_what_they_give_in_memory(cells, tmp_path, place, store, verb, tables):
    adata = cells("csr")
    where = {"layer": "log"} if place is with_layer else {}
    with place(adata, tmp_path) as opened:
        opened.obsm["sae"] = store(adata.obsm["sae"], tmp_path)
        assert not isinstance(opened.obsm["sae"], np.ndarray | sparse.spmatrix)
        verb(opened, **where)
        found = opened.uns["sae"]
    if place is with_memory_map:
        adata.X = adata.X.toarray()
    verb(adata)
    for name in tables:
        assert len(found[name])
        assert_same(found[name], adata.uns["sae"][name])
    status = [name for name in adata.uns["sae"]["features"] if name.endswith("status")]
    assert_same(found["features"][status], adata.uns["sae"]["features"][status])


@each_verb
@each_store
def test_activations_on_disk_of_cells_in_memory(cells, tmp_path, store, verb, tables):
    adata = cells("csr")
    stored = adata.copy()
    stored.obsm["sae"] = store(adata.obsm["sae"], tmp_path)
    verb(stored)
    verb(adata)
    for name in tables:
        assert_same(stored.uns["sae"][name], adata.uns["sae"][name])


@each_verb
@pytest.mark.parametrize("store", [lazily, in_hdf5], ids=["dask", "hdf5"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:mudata")
def test_activations_on_disk_of_cells_that_are_matched_by_name(cells, tmp_path, store, verb, tables):
    """The other modality has some of the cells, in another order."""
    rna = cells("csr")
    other = rna[np.random.default_rng(0).permutation(N)[: N - 30]].copy()
    del other.uns["sae"], other.obsm["sae"]
    other.var_names = [f"other{i}" for i in range(G)]
    found = []
    for a in (rna.obsm["sae"], store(rna.obsm["sae"], tmp_path)):
        mdata = mudata.MuData({"rna": rna.copy(), "other": other.copy()})
        mdata["rna"].obsm["sae"] = a
        verb(mdata, mod="rna", var_mod="other")
        found.append(mdata["rna"].uns["sae"])
    for name in tables:
        assert_same(found[0][name], found[1][name])


def test_a_model_predicts_from_a_latent_on_disk(cells, tmp_path):
    found = []
    for opened in (cells("csr"), cells("csr")):
        if found:
            group = zarr.open_group(tmp_path / "latent.zarr", mode="w", zarr_format=2)
            ad.io.write_elem(group, "z", np.asarray(opened.obsm["X_pca"]))
            opened.obsm["sae"], opened.obsm["X_pca"] = lazily(opened.obsm["sae"], tmp_path), group["z"]
        model = sae.models.Functions(decode=_some_genes, genes=[f"g{i}" for i in range(G)], scale="linear")
        sae.tl.rank_genes(opened, model=model, n_genes=None)
        found.append(opened.uns["sae"]["genes"])
    assert len(found[0])
    assert_same(*found)


def _some_genes(z, data):
    return np.exp(z @ np.random.default_rng(0).normal(size=(z.shape[1], G)) / 10)


def assert_same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@each_verb
@each_layout
def test_raw_is_read_from_a_backed_file(cells, tmp_path, layout, verb, tables):
    adata = cells(layout)
    adata.raw = adata.copy()
    adata = adata[:, :5].copy()
    adata.X = -adata.X
    with backed(adata, tmp_path) as opened:
        verb(opened)
        found = {name: opened.uns["sae"][name] for name in tables}
    verb(adata)
    for name, table in found.items():
        assert_same(table, adata.uns["sae"][name])
    if "genes" in found:
        assert found["genes"]["gene"].nunique() == G - 1


@each_verb
@each_layout
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:mudata")
def test_cells_of_a_backed_mudata_are_matched_by_name(cells, tmp_path, layout, verb, tables):
    """The other modality has some of the cells, in another order."""
    rna = cells(layout)
    other = rna[np.random.default_rng(0).permutation(N)[: N - 30]].copy()
    del other.uns["sae"], other.obsm["sae"]
    other.var_names = [f"other{i}" for i in range(G)]
    other.X = other.X * 2
    mdata = mudata.MuData({"rna": rna, "other": other})
    where = {"mod": "rna", "var_mod": "other"}
    mdata.write(tmp_path / "cells.h5mu")
    opened = mudata.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    assert not isinstance(opened["other"].X, np.ndarray | sparse.spmatrix)
    verb(opened, **where)
    found = {name: opened["rna"].uns["sae"][name] for name in tables}
    opened.file.close()

    alone = other.copy()
    alone.uns["sae"], alone.obsm["sae"] = dict(rna.uns["sae"]), rna[other.obs_names].obsm["sae"]
    verb(alone)
    verb(mdata, **where)
    for name, table in found.items():
        assert_same(table, mdata["rna"].uns["sae"][name])
        if name in ("genes", "enrichment"):
            pd.testing.assert_frame_equal(table.drop(columns="modality"), alone.uns["sae"][name])


STORED = """
import sys
import anndata as ad, numpy as np, pandas as pd, zarr
from scipy import sparse
import sae

def random_rows(n, columns, stored, seed):
    rng = np.random.default_rng(seed)
    width = columns // stored
    indices = np.arange(stored, dtype=np.int32) * width + rng.integers(width, size=(n, stored), dtype=np.int32)
    values = rng.random(n * stored, dtype=np.float32) + 0.1
    return sparse.csr_matrix((values, indices.ravel(), np.arange(n + 1) * stored), shape=(n, columns))

def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) * 1024

def cells(n, x):
    adata = ad.AnnData(x, obs=pd.DataFrame(index=np.arange(n).astype(str)))
    adata.obs["donor"] = pd.Categorical.from_codes(np.arange(n) % 4, list("abcd"))
    return adata

def verbs(adata):
    sae.tl.rank_genes(adata, batch="donor", progress=False)
    sae.tl.enrich(adata, {"some": [str(i) for i in range(40)]}, percentile=90, n_null=0, progress=False)

n, genes, features = 200_000, 2_000, 64
folder = sys.argv[1]
small = cells(2_000, random_rows(2_000, genes, 100, 0))
small.obsm["X_pca"] = np.random.default_rng(0).normal(size=(2_000, 8)).astype(np.float32)
sae.tl.fit(small, n_features=features, steps=5, progress=False)
sae.tl.encode(small)
group = zarr.open_group(folder, mode="w", zarr_format=2)
for number, size in enumerate((2_000, n)):
    for name, columns, stored in (("x", genes, 100), ("a", features, 16)):
        values = random_rows(size, columns, stored, number)
        ad.io.write_elem(group, f"{name}{number}", values, dataset_kwargs={"chunks": 200_000, "compressor": None})
    opened = cells(size, ad.io.sparse_dataset(group[f"x{number}"]))
    opened.uns["sae"] = dict(small.uns["sae"])
    opened.obsm["sae"] = ad.experimental.read_elem_lazy(group[f"a{number}"], chunks=(10_000, features))
    stored = values = None
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = resident("VmRSS")
    verbs(opened)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_what_is_on_disk(tmp_path):
    """160 MB of expression and 25 MB of activations, in another process."""
    pytest.importorskip("dask.array")
    # Without them, what threads have freed is kept for later.
    returned = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", STORED, tmp_path]
    ran = subprocess.run(command, env=os.environ | returned, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr

    assert int(ran.stdout.split()[-1]) < 110_000_000


def test_a_dask_array_of_unknown_size_is_refused(cells):
    da = pytest.importorskip("dask.array")
    adata = cells("dense")
    x = da.from_array(adata.obsm["X_pca"], chunks=(100, -1))
    adata.obsm["X_new"] = x[:, (x[0] > -np.inf)]
    with pytest.raises(ValueError, match=r"size is not known: \(300, nan\). Call compute_chunk_sizes"):
        sae.tl.fit(adata, "X_new", n_features=8, steps=5)
