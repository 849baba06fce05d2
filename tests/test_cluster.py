"""On a dask.distributed cluster, verbs give what they give in memory, to the last bit."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import sae
from sae.core import moments, partitions
from sae.core.cluster import cluster_of, folded, whole_chunks
from sae.core.groups import active_groups, percentile_groups
from sae.core.moments import scan

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

N, G, PARTITION = 300, 40, 100


@pytest.fixture(scope="module")
def client():
    """Two worker processes of one thread each."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 64)
    monkeypatch.setattr(moments, "PARTITION_ROWS", PARTITION)
    # Several slices make a partition.
    monkeypatch.setattr("sae.core.cluster.PIECE_BYTES", 1)
    monkeypatch.setattr("sae.tl._enrich.NULL_SETS", 20)


@pytest.fixture
def on_cluster(monkeypatch):
    """What went through the workers of the cluster: the names of what was summed."""
    seen = []

    def noted(client, function, matrices, parts, *shared):
        seen.append(type(shared[0]).__name__)
        return folded(client, function, matrices, parts, *shared)

    monkeypatch.setattr(partitions, "folded", noted)
    return seen


@pytest.fixture(scope="module")
def cells(make_adata):
    """Factory: the same encoded cells, CSR."""
    encoded = make_adata(n=N, g=G, layout="csr")
    encoded.obs["donor"] = pd.Categorical(np.array(["x", "y", "z"])[np.arange(N) % 3])
    sae.tl.fit(encoded, n_features=8, steps=60)
    sae.tl.encode(encoded)
    return encoded.copy


def in_csr_chunks(x, rows=70):
    return da.from_array(x.toarray(), chunks=(rows, x.shape[1])).map_blocks(sparse.csr_matrix)


def in_chunks(x):
    return da.from_array(x.toarray(), chunks=(70, 15))


def persisted(x):
    return in_csr_chunks(x).persist()


def lazily(x, folder, name):
    group = zarr.open_group(folder / f"{name}.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "x", x)
    return ad.experimental.read_elem_lazy(group["x"], chunks=(90, x.shape[1]))


X = {"csr": in_csr_chunks, "dense": in_chunks, "persisted": persisted}
VERBS = {
    "rank_genes": (lambda data: sae.tl.rank_genes(data, n_genes=None), ["genes"], 3),
    "percentile": (lambda data: sae.tl.rank_genes(data, percentile=90, min_expected=0), ["genes"], 6),
    "batch": (lambda data: sae.tl.rank_genes(data, batch="donor"), ["genes"], 4),
    "donor": (lambda data: sae.tl.rank_genes(data, donor="donor", min_expected=0), ["genes"], 4),
    "regression": (lambda data: sae.tl.rank_genes(data, method="regression", batch="donor"), ["genes"], 3),
    "wilcoxon": (lambda data: sae.tl.rank_genes(data, method="wilcoxon"), ["genes"], 3),
    "enrich": (
        lambda data: sae.tl.enrich(data, {"some": [f"g{i}" for i in range(12)]}, max_padj=1, min_log2fc=0),
        ["enrichment", "enrichment_null"],
        4,
    ),
    "score_labels": (lambda data: sae.tl.score_labels(data, "group"), ["labels", "label_summary"], 0),
}
CASES = [
    *((name, "csr", True) for name in VERBS),
    *((name, "csr", False) for name in ("rank_genes", "batch", "regression", "enrich")),
    *((name, layout, True) for name in ("rank_genes", "regression") for layout in ("dense", "persisted")),
]


def assert_same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize(("name", "layout", "stored"), CASES)
def test_results_are_those_in_memory(client, cells, on_cluster, tmp_path, name, layout, stored):
    """With expression in several layouts; with activations that are `stored`, or in memory."""
    verb, tables, n_passes = VERBS[name]
    adata, expected = cells(), cells()
    if layout == "dense":
        expected.X = expected.X.toarray()
    adata.X = X[layout](adata.X)
    if stored:
        adata.obsm["sae"] = lazily(adata.obsm["sae"], tmp_path, "a")
    verb(adata)
    assert isinstance(adata.X, da.Array)
    # Whatever reads activations alone goes through the cluster where they are on it.
    of_expression = [name for name in on_cluster if name in ("_Scanning", "_Adding", "_Multiplying")]
    assert len(on_cluster) == (n_passes if stored else len(of_expression))
    assert bool(of_expression) == (n_passes > 0)
    verb(expected)
    for name in tables:
        assert len(expected.uns["sae"][name])
        assert_same(adata.uns["sae"][name], expected.uns["sae"][name])


def test_activations_of_cells_in_memory(client, cells, on_cluster, tmp_path):
    adata, expected = cells(), cells()
    adata.obsm["sae"] = lazily(adata.obsm["sae"], tmp_path, "a")
    for data in (adata, expected):
        sae.tl.rank_genes(data, n_genes=None)
    assert on_cluster == ["_Counting"]
    assert_same(adata.uns["sae"]["genes"], expected.uns["sae"]["genes"])


def test_encode(client, cells):
    adata, expected = cells(), cells()
    adata.obsm["X_pca"] = da.from_array(adata.obsm["X_pca"], chunks=(70, 6))
    for data in (adata, expected):
        sae.tl.encode(data)
    found = adata.obsm["sae"]
    assert (sparse.csr_matrix(found) != expected.obsm["sae"]).nnz == 0
    assert_same(adata.uns["sae"]["features"], expected.uns["sae"]["features"])


def test_cells_as_a_lazy_object_has_them(client, cells, tmp_path):
    """Read by anndata, which leaves everything on disk."""
    adata = cells()
    adata.write_zarr(tmp_path / "cells.zarr")
    group = zarr.open_group(tmp_path / "cells.zarr", mode="r")
    opened = cells()
    opened.X = ad.experimental.read_elem_lazy(group["X"])
    opened.obsm["sae"] = ad.experimental.read_elem_lazy(group["obsm/sae"])
    for data in (opened, adata):
        sae.tl.rank_genes(data, n_genes=None)
    assert_same(opened.uns["sae"]["genes"], adata.uns["sae"]["genes"])


@pytest.mark.parametrize("rows", [30, 300])
def test_chunks_do_not_matter(client, cells, rows):
    """Chunks smaller and larger than partitions, and such that end elsewhere."""
    adata = cells()
    genes, expected = scan(in_csr_chunks(adata.X, rows)), scan(adata.X)
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(genes, name), values, err_msg=name)
    for make in (active_groups, lambda a: percentile_groups(a, 60)):
        found, expected = make(in_csr_chunks(adata.obsm["sae"], rows)), make(adata.obsm["sae"])
        np.testing.assert_array_equal(found.n_active, expected.n_active)
        np.testing.assert_array_equal(found.limits, expected.limits)


# ---- The frame


def total(so_far, x):
    return x.sum() if so_far is None else so_far + x.sum()


def test_parts_come_in_order_and_each_is_made_of_its_slices(client, cells):
    x = in_csr_chunks(cells().X)
    parts = [[slice(0, 50), slice(50, 80)], [slice(80, 81)], [slice(200, 300)]]
    found = list(folded(client, total, [x], parts))
    expected = [sum(cells().X[rows].sum() for rows in part) for part in parts]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(0, 300), [(0, 140), (140, 280), (280, 300)]),
        (slice(100, 260), [(100, 210), (210, 260)]),
        (slice(71, 79), [(71, 79)]),
    ],
    ids=str,
)
def test_slices_end_where_chunks_end(rows, expected, monkeypatch):
    monkeypatch.setattr("sae.core.cluster.PIECE_BYTES", 150 * 8 * G)
    x = da.zeros((300, G), chunks=(70, G))
    assert [(some.start, some.stop) for some in whole_chunks(x, rows)] == expected
    monkeypatch.setattr("sae.core.cluster.PIECE_BYTES", 1)
    assert [some.stop for some in whole_chunks(x, slice(0, 300))] == [70, 140, 210, 280, 300]


def test_an_array_in_memory_is_on_no_cluster(client, cells):
    assert cluster_of(cells().X) is None
    assert cluster_of(cells().X, in_chunks(cells().X)) is client


class Broken(RuntimeError):
    """What goes wrong in a chunk."""


def broken(x):
    if x.shape[0] and x[0, 0] == 210:
        raise Broken("chunk 3 cannot be read")
    return sparse.csr_matrix(x)


def test_an_error_in_a_chunk_is_raised_and_leaves_nothing(client, cells):
    adata = cells()
    before = adata.uns["sae"]
    numbered = np.repeat(np.arange(float(N))[:, None], G, axis=1)
    adata.X = da.from_array(numbered, chunks=(70, G)).map_blocks(broken, meta=sparse.csr_matrix((0, 0)))
    with pytest.raises(Broken, match="chunk 3 cannot be read"):
        sae.tl.rank_genes(adata)
    assert adata.uns["sae"] is before
    assert_no_work_is_left(client)


def assert_no_work_is_left(client, within=10.0):
    limit = time.monotonic() + within
    while any(client.processing().values()) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(client.processing().values())


def slow(so_far, x):
    time.sleep(2)
    return os.getpid()


def test_a_caller_who_stops_leaves_no_work(client, cells):
    running = folded(client, slow, [in_chunks(cells().X)], [[slice(i, i + 10)] for i in range(0, N, 10)])
    next(running)
    running.close()
    assert_no_work_is_left(client, within=1)


def test_an_interrupt_cancels_what_is_in_work(client, cells):
    x = in_chunks(cells().X)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        list(folded(client, slow, [x], [[slice(i, i + 10)] for i in range(0, N, 10)]))
    timer.join()
    # Where the traceback is kept, what was asked for is, too.
    assert raised.tb is not None
    assert_no_work_is_left(client, within=1)


def test_a_worker_that_dies_is_replaced(client, cells, tmp_path, monkeypatch):
    """In the middle of a sum: the first to come to a chunk ends its process, once."""
    adata, expected = cells(), cells()
    died = tmp_path / "died"

    def deadly(x):
        if x.shape[0] and not died.exists():
            died.touch()
            os._exit(1)
        return x

    sae.tl.rank_genes(expected, n_genes=None)
    adata.X = in_csr_chunks(adata.X).map_blocks(deadly, meta=sparse.csr_matrix((0, 0), dtype=np.float32))
    sae.tl.rank_genes(adata, n_genes=None)
    assert died.exists()
    assert_same(adata.uns["sae"]["genes"], expected.uns["sae"]["genes"])


def ranked(adata, place):
    adata.X = place(adata.X)
    sae.tl.rank_genes(adata, n_genes=None)
    return adata.uns["sae"]["genes"]


def test_a_verb_in_a_task_waits_for_no_place_of_its_own(client, cells):
    """As many of them as there are threads: what they hand to the cluster would never have its turn."""
    expected, *found = (
        client.submit(ranked, cells(), place, pure=False) for place in (sparse.csr_matrix, *2 * [in_csr_chunks])
    )
    for task in found:
        assert_same(task.result(timeout=60), expected.result(timeout=60))


def test_a_sweep_on_the_cluster_reads_a_dask_array(client, cells):
    adata, expected = cells(), cells()
    adata.obsm["X_pca"] = da.from_array(adata.obsm["X_pca"], chunks=(70, 6))
    grid = {"n_features": [8], "k": [2, 3], "steps": [30]}
    done = threading.Event()
    # Ctrl-C after a minute, or the test would wait for ever.
    timer = threading.Timer(60, lambda: done.is_set() or os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    try:
        found = sae.tl.sweep(adata, grid, client=client, progress=False)
    finally:
        done.set()
        timer.cancel()
    assert_same(found.drop(columns="seconds"), sae.tl.sweep(expected, grid, progress=False).drop(columns="seconds"))


@pytest.mark.filterwarnings("ignore:.*was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_an_event_loop_dask_says_what_is_wrong(client, cells):
    adata = cells()
    adata.obsm["X_pca"] = da.from_array(adata.obsm["X_pca"], chunks=(70, 6))
    before = adata.uns["sae"]

    async def encode():
        async with distributed.Client(client.scheduler.address, asynchronous=True):
            sae.tl.encode(adata)

    # The second by dask before 2025.
    with pytest.raises(
        (RuntimeError, TypeError), match="asynchronous Client in a synchronous context|'coroutine' object"
    ):
        asyncio.run(encode())
    # What was never awaited is said to be so here, and not in the middle of another test.
    gc.collect()
    assert adata.uns["sae"] is before
