"""Expression that is not in memory gives what it gives in memory, and is read in chunks."""

from __future__ import annotations

import tracemalloc
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
CHUNK = 64
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
each_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
each_layout = pytest.mark.parametrize("layout", ["dense", "csr"])
VERBS = {
    "rank_genes": (lambda data, **how: sae.tl.rank_genes(data, n_genes=None, **how), ["genes"]),
    "rank_genes, percentile": (lambda data, **how: sae.tl.rank_genes(data, percentile=90, **how), ["genes"]),
    "rank_genes, wilcoxon": (lambda data, **how: sae.tl.rank_genes(data, method="wilcoxon", **how), ["genes"]),
    "rank_genes, regression": (lambda data, **how: sae.tl.rank_genes(data, method="regression", **how), ["genes"]),
    "rank_genes, batch": (lambda data, **how: sae.tl.rank_genes(data, batch="group", **how), ["genes"]),
    "enrich": (lambda data, **how: sae.tl.enrich(data, SETS, max_padj=1, min_log2fc=0, **how), ["enrichment"]),
    "score_labels": (
        lambda data, **how: sae.tl.score_labels(data, "group", baselines=True, **how),
        ["labels", "label_summary"],
    ),
}
each_verb = pytest.mark.parametrize(("verb", "tables"), VERBS.values(), ids=VERBS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", CHUNK)


@pytest.fixture(scope="module")
def cells(make_adata):
    """Factory: the same encoded cells, dense or CSR; one gene never varies."""
    encoded = make_adata(n=N, g=G)
    encoded.X[:, 3] = 0
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
        pd.testing.assert_frame_equal(table, adata.uns["sae"][name])


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
        pd.testing.assert_frame_equal(table, adata.uns["sae"][name])
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
        pd.testing.assert_frame_equal(table, mdata["rna"].uns["sae"][name])
        if name in ("genes", "enrichment"):
            pd.testing.assert_frame_equal(table.drop(columns="modality"), alone.uns["sae"][name])


@each_layout
@pytest.mark.parametrize(("name", "settings"), [("rank_genes", {}), ("enrich", {"n_null": 0})])
def test_no_more_than_some_chunks_are_held(tmp_path, make_adata, layout, name, settings):
    verb = VERBS[name][0]
    n, g = 20 * CHUNK, 800
    adata = make_adata(n=n, g=g, layout=layout)
    sae.tl.fit(adata, n_features=4, k=2, steps=30)
    sae.tl.encode(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    size = adata.X.data.nbytes + adata.X.indices.nbytes if layout == "csr" else 2 * adata.X.nbytes
    """In float64, as dense values are summed."""
    del adata
    opened = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    verb(opened, **settings)
    tracemalloc.start()
    verb(opened, **settings)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    opened.file.close()
    assert peak < size / 3
