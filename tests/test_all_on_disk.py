"""Every verb, every way to read results, and every figure, with the expression, the representation and the activations on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import sae
from sae.core import moments, rows

da = pytest.importorskip("dask.array")
N, G = 240, 30
CHUNKS = 70
NET = {name: [f"g{i}" for i in genes] for name, genes in {"early": range(12), "late": range(15, 24)}.items()}
MODEL = sae.models.Functions(
    decode=lambda z, data: np.column_stack([z[:, 0], -z[:, 0], z[:, 1] ** 2]),
    genes=["up", "down", "both"],
    scale="linear",
)
QUIET = {"progress": False}


# ---- Where things are


def sparse_chunks(matrix):
    return da.from_array(matrix.toarray(), chunks=(CHUNKS, matrix.shape[1])).map_blocks(sparse.csr_matrix)


def replaced(adata, change):
    """Put something else in place of X, each layer, and all in `obsm`."""
    opened = adata.copy()
    opened.X = change("X", adata.X)
    opened.layers["log"] = change("log", adata.layers["log"])
    for name, value in adata.obsm.items():
        opened.obsm[name] = change(name, value)
    return opened


@contextmanager
def backed(adata, folder):
    path = folder / "cells.h5ad"
    if not path.exists():
        adata.write_h5ad(path)
    opened = ad.read_h5ad(path, backed="r")
    yield opened
    opened.file.close()


@contextmanager
def with_zarr(adata, folder):
    group = zarr.open_group(folder / "cells.zarr", mode="a", zarr_format=2)
    yield replaced(adata, lambda name, value: kept(group, name, value, chunks=(64, value.shape[1])))


@contextmanager
def with_hdf5(adata, folder):
    with h5py.File(folder / "cells.h5", "a") as file:
        yield replaced(adata, lambda name, value: kept(file, name, value))


def kept(group, name, value, **how):
    """Write a matrix once, and return what reads it."""
    if name not in group:
        ad.io.write_elem(group, name, value, dataset_kwargs={} if sparse.issparse(value) else how)
    return ad.io.sparse_dataset(group[name]) if sparse.issparse(value) else group[name]


@contextmanager
def with_dask(adata, folder):
    """Sparse where the activations are, and the expression too if it is."""
    yield replaced(
        adata,
        lambda _, value: (
            sparse_chunks(value) if sparse.issparse(value) else da.from_array(value, chunks=(CHUNKS, value.shape[1]))
        ),
    )


@contextmanager
def lazy(adata, folder):
    """Not even columns of `obs` and what is in `uns` are read before they are needed."""
    pytest.importorskip("xarray")
    path = folder / "cells.h5ad"
    if not path.exists():
        adata.write_h5ad(path)
    yield ad.experimental.read_lazy(path)


PLACES = {
    "backed": (backed, "csr"),
    "zarr": (with_zarr, "csr"),
    "zarr dense": (with_zarr, "dense"),
    "hdf5": (with_hdf5, "csr"),
    "dask": (with_dask, "csr"),
    "dask dense": (with_dask, "dense"),
    "lazy": (lazy, "csr"),
}
OF_FIGURES = ("hdf5", "dask", "lazy")
"""Where those are tried: they read little, and drawing takes long."""


# ---- What is run: the tables, arrays and objects that each gives


def stored(*names):
    """Run a verb and return what it has stored under some names in `uns["sae"]`."""

    def run(verb):
        def on(data):
            verb(data)
            return {name: data.uns["sae"][name] for name in names}

        return on

    return run


def steer(data):
    sae.tl.steer(
        data, [0], model=MODEL, doses=[1], groupby="group", net={"s": ["up"]}, n_controls=3, reconstruct=True,
        key_added="steered", layer_added=None, **QUIET,
    )  # fmt: skip
    return {"steering": data.uns["sae"]["steering"], "new": data.obsm["steered"], "arrows": arrows(data)}


def arrows(data):
    how = {"min_cells": 1, "n_grid": 4, "basis": "umap"}
    return sae.get.steering_arrows(data, "steered", "sae_0", **how)


def ablate(data):
    sae.tl.ablate(data, [0, 1], batch="batch", groupby="group", n_controls=2, key_added="less", **QUIET)
    return {"ablation": data.uns["sae"]["ablation"], "new": data.obsm["less"]}


def perturb(layer):
    def verb(data):
        how = {"target": {"b": ["g3", "g4"]}, "n_permutations": 5, "batch": "batch"}
        sae.tl.perturbation(data, "group", "a", layer=layer, **how, **QUIET)

    return stored("perturbation")(verb)


def evaluate(layer):
    baselines = [
        "representation",
        "pca",
        "nmf",
        "genes",
        "random_rectified",
        "frozen_decoder",
        "l1_genes",
        "input_x_gradient",
    ]

    def verb(data):
        how = {"model": MODEL, "baselines": baselines, "n_splits": 1, "n_bootstrap": 10, "layer": layer}
        sae.tl.evaluate(data, "group", NET, donor=None, min_size=3, n_cells=150, **how, **QUIET)

    return stored("metrics")(verb)


def match(by, **how):
    return lambda data: {by: sae.tl.match(data, data, key_b="other", by=by, n_permutations=1, **how)}


def activations(data):
    found = sae.get.activations(data, [1, 2])
    assert not isinstance(found.obsm.get("other"), type(None))
    return {"X": found.X, "obs": found.obs, "var": found.var}


def shown(draw):
    """Draw a figure, and return what is written and drawn on it."""

    def on(data):
        draw(data)
        axes = plt.gcf().axes
        texts = [text.get_text() for text in plt.gcf().findobj(plt.Text)]
        points = [np.asarray(part.get_offsets()) for ax in axes for part in ax.collections]
        lines = [line.get_xydata() for ax in axes for line in ax.lines]
        plt.close("all")
        return {"texts": texts, "points": points, "lines": lines}

    return on


def report(data, folder):
    return {"page": sae.report(data, folder / "page.html", features=[0, 1]).read_text(encoding="utf-8")}


VERBS = {
    "fit and encode": lambda data: (
        sae.tl.fit(data, "X_pca", n_features=6, steps=30, key_added="new", **QUIET)
        or sae.tl.encode(data, key="new", **QUIET)
        or {"uns": data.uns["new"], "a": data.obsm["new"]}
    ),
    "rank_genes": stored("genes")(lambda data: sae.tl.rank_genes(data, n_genes=None, layer="log", **QUIET)),
    "enrich": stored("enrichment")(lambda data: sae.tl.enrich(data, NET, max_padj=1, min_size=3, n_null=0, **QUIET)),
    "score_labels": stored("labels", "label_summary", "features")(
        lambda data: sae.tl.score_labels(
            data, "group", baselines=True, donor="donor", order=["a", "b", "c"], layer="log", **QUIET
        )
    ),
    "score_labels of some cells": stored("labels", "label_summary", "features")(
        lambda data: sae.tl.score_labels(data, "some", baselines=True, order=["c", "a"], **QUIET)
    ),
    "name_features": stored("features")(sae.tl.name_features),
    "steer": steer,
    "ablate": ablate,
    "perturbation": perturb(None),
    "perturbation, layer": perturb("log"),
    "feature_map": stored("features", "feature_map")(sae.tl.feature_map),
    "feature_map, genes": stored("feature_map")(lambda data: sae.tl.feature_map(data, space="genes", layer="log")),
    "evaluate": evaluate(None),
    "evaluate, layer": evaluate("log"),
    "stability": stored("features", "stability")(lambda data: sae.tl.stability(data, n_seeds=1, subsample=0.7, **QUIET)),
    "sweep": lambda data: {
        "runs": sae.tl.sweep(
            data, {"n_features": [4, 6], "steps": 30}, groupby="group", truth="truth", **QUIET
        ).drop(columns="seconds")
    },
    "match, decoder": match("decoder"),
    "match, activations": match("activations"),
    "match, genes": match("genes", layer="log"),
    "match, enrichment": match("enrichment", max_padj=1),
    "compare_enrichment": lambda data: {"terms": sae.tl.compare_enrichment(data, data, key_b="other", max_padj=1)},
    "recovery": lambda data: {"found": sae.tl.recovery(data, ["truth", "group"])},
    "recovery of the other features": lambda data: {
        "found": sae.tl.recovery(data, "truth", use_rep="other", graph=np.eye(G, 2)),
        "genes": sae.tl.recovery(data, "X_pca", layer="log", ceiling=False),
    },
    "probe": lambda data: {
        "pca": sae.tl.probe(data, None, ["truth", "group"], donor="donor", **QUIET),
        "features": sae.tl.probe(data, "sae", ["truth", "group"], **QUIET),
        "genes": sae.tl.probe(data, None, "group", layer="log", **QUIET),
    },
    "peaks_to_genes": lambda data: {
        "peaks": sae.tl.peaks_to_genes(
            data, pd.DataFrame({"gene": ["x"], "chrom": ["1"], "start": [10], "end": [2000], "strand": ["+"]})
        )
    },
    "get.activations": activations,
    "get.by_label": lambda data: {
        "labels": sae.get.by_label(data, None, "group"),
        "numbers": sae.get.by_label(data, 1, "time", donor="donor"),
    },
    "get.embedding": lambda data: {"umap": sae.get.embedding(data)},
    "get, tables": lambda data: {
        name: getattr(sae.get, name)(data)
        for name in ("decoder", "enrichment", "features", "genes", "history", "label_matrix", "labels", "modules", "neighbors")
    },
    "get, of some cells": lambda data: {"features": sae.get.features(data[10:150])},
    "pl.feature_umap": shown(lambda data: sae.pl.feature_umap(data, features=[0, 1])),
    "pl.feature_card": shown(lambda data: sae.pl.feature_card(data, 0)),
    "pl.density": shown(sae.pl.density),
    "pl.lineage": shown(lambda data: sae.pl.lineage(data, [0, 1], "group", order=["a", "b", "c"])),
    "pl.labels": shown(lambda data: sae.pl.labels(data, "group")),
    "pl.feature_map": shown(sae.pl.feature_map),
    "adata.sae": lambda data: {"X": data.sae.get.activations().X},
    "report": report,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK_ROWS", 64)
    monkeypatch.setattr(rows, "CHUNKS_PER_PIECE", 1)


@pytest.fixture(scope="module")
def analysed(make_adata):
    """Two SAEs, with what figures and names need."""
    adata = make_adata(n=N, g=G, layout="csr")
    rng = np.random.default_rng(0)
    adata.layers["log"] = adata.X * 2
    adata.obs["batch"] = pd.Categorical(np.array(["x", "y"])[rng.integers(2, size=N)])
    adata.obs["donor"] = pd.Categorical(rng.integers(8, size=N).astype(str))
    adata.obs["some"] = adata.obs["group"].where(rng.random(N) < 0.8)
    adata.obs["time"] = rng.random(N)
    adata.obsm["X_umap"] = adata.obsm["X_pca"][:, :2] + 1
    adata.obsm["truth"] = adata.obsm["X_pca"][:, :2].astype(np.float64) ** 2
    for column, values in {"chrom": "chr1", "start": np.arange(G) * 100, "end": np.arange(G) * 100 + 50}.items():
        adata.var[column] = values
    for key, seed in (("sae", 0), ("other", 1)):
        sae.tl.fit(adata, n_features=8, steps=60, rng=seed, key_added=key, **QUIET)
        sae.tl.encode(adata, key=key, **QUIET)
        sae.tl.rank_genes(adata, key=key, **QUIET)
        sae.tl.enrich(adata, NET, key=key, max_padj=1, min_size=3, n_null=0, **QUIET)
    sae.tl.score_labels(adata, "group", **QUIET)
    sae.tl.feature_map(adata)
    return adata


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the files of each place."""
    return {place: tmp_path_factory.mktemp("files") for place in PLACES}


@pytest.fixture(scope="module")
def in_memory(analysed, tmp_path_factory):
    """What each verb gives in memory, with sparse or dense expression."""
    found = {}

    def get(verb, layout):
        if (verb, layout) not in found:
            found[verb, layout] = run(verb, laid_out(analysed, layout), tmp_path_factory.mktemp("memory"))
        return found[verb, layout]

    return get


def laid_out(adata, layout):
    adata = adata.copy()
    if layout == "dense":
        adata.X, adata.layers["log"] = adata.X.toarray(), adata.layers["log"].toarray()
    return adata


def run(verb, data, folder):
    return VERBS[verb](data, folder) if verb == "report" else VERBS[verb](data)


def plain(value):
    """Lists have no place in nested comparisons; NumPy objects are compared as lists."""
    if isinstance(value, list):
        return {str(number): part for number, part in enumerate(value)}
    return value


@pytest.mark.parametrize(
    ("place", "verb"),
    [
        (place, verb)
        for place in PLACES
        for verb in VERBS
        if place in OF_FIGURES or not verb.startswith(("pl.", "report"))
    ],
)
def test_results_are_those_in_memory(analysed, in_memory, folders, compare, tmp_path, place, verb):
    opener, layout = PLACES[place]
    expected = in_memory(verb, layout)
    with opener(laid_out(analysed, layout), folders[place]) as opened:
        assert not isinstance(opened.X, np.ndarray | sparse.spmatrix)
        found = run(verb, opened, tmp_path)
        compare.assert_same({k: plain(v) for k, v in expected.items()}, {k: plain(v) for k, v in found.items()})


@pytest.mark.parametrize("place", PLACES)
def test_some_cells(analysed, folders, compare, place):
    """A view of an object, in another order; dask arrays are of another class there."""
    opener, layout = PLACES[place]
    some = np.random.default_rng(0).permutation(N)[:150]

    def read(data):
        names = data.obs_names.to_numpy(dtype=object)
        probed = sae.tl.probe(data, None, "truth", **QUIET)
        signatures = sae.tl.match(data, data, key_b="other", by="genes", n_permutations=0)
        values = sae.get.by_label(data, 0, "some")
        return {
            "names": names,
            "a": sae.get.activations(data).X,
            "probed": probed,
            "pairs": signatures,
            "v": values,
        }

    with opener(laid_out(analysed, layout), folders[place]) as opened:
        # HDF5 gives rows in rising order only.
        some = np.sort(some) if place in ("backed", "hdf5") else some
        found = read(opened[some])
    compare.assert_same(read(laid_out(analysed, layout)[some]), found)


# ---- Memory


MEMORY = '''
"""Score labels of activations on disk, and print their size, by how much memory grew, and the seconds that it took."""
import sys, threading, time
from pathlib import Path
import anndata as ad, numpy as np, pandas as pd, zarr
import sae
from sae.core import columns, rows

N, H, L0, PART = 400_000, 200, 40, 100_000


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def written(folder):
    """Write cells × features, 100,000 cells at a time."""
    group = zarr.open_group(folder, mode="w", zarr_format=2)
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [N, H]})
    size = {"shape": (N * L0,), "chunks": (PART * L0 // 4,), "compressors": None}
    data, indices = group.create_array("data", dtype="f4", **size), group.create_array("indices", dtype="i4", **size)
    group.create_array("indptr", data=np.arange(N + 1) * L0)
    rng = np.random.default_rng(0)
    for first in range(0, N * L0, PART * L0):
        part = rng.integers(H // L0, size=(PART, 1), dtype="i4") + np.arange(0, H, H // L0, dtype="i4")
        indices[first : first + PART * L0] = part.ravel()
        data[first : first + PART * L0] = rng.random(PART * L0, dtype="f4") + 0.1
    return ad.io.sparse_dataset(group), data.nbytes + indices.nbytes


def scored(n, matrix):
    obs = pd.DataFrame({"group": pd.Categorical.from_codes(np.arange(n) % 7, list("abcdefg"))})
    cells = ad.AnnData(obs=obs.set_axis(obs.index.astype(str)), obsm={"X_pca": np.zeros((n, 2), "f4"), "sae": matrix(n)})
    cells.uns["sae"] = small.uns["sae"]
    before, start, highest, done = resident(), time.perf_counter(), 0, threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    sae.tl.score_labels(cells, "group", n_splits=1, progress=False)
    done.set()
    watching.join()
    assert len(sae.get.labels(cells)) == 7 * H
    return highest - before, time.perf_counter() - start


small = ad.AnnData(obsm={"X_pca": np.random.default_rng(0).normal(size=(500, 2)).astype("f4")})
sae.tl.fit(small, n_features=H, k=1, steps=5, progress=False)
sae.tl.encode(small, progress=False)
columns.DISK_COLUMN_VALUES, rows.PIECE_BYTES = 2_000_000, 4_000_000
stored, size = written(sys.argv[1])
scored(1_000, lambda n: stored[:n])
print(size, *scored(N, lambda n: stored))
'''


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="The memory that a process has is read from /proc.")
def test_activations_on_disk_are_never_held_whole(tmp_path):
    """400,000 cells × 200 features, 40 of them active in each: 128 MB."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "a.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    size, growth = map(int, done.stdout.split()[:2])
    assert growth < 0.6 * size


def test_scores_on_a_cluster_are_those_in_memory(analysed):
    distributed = pytest.importorskip("distributed")
    adata, lazily = analysed.copy(), analysed.copy()
    lazily.obsm["sae"] = sparse_chunks(lazily.obsm["sae"])
    with distributed.Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=":0"):
        for data in (adata, lazily):
            sae.tl.score_labels(data, "some", order=["a", "b"], **QUIET)
    for name in ("labels", "label_summary", "features"):
        pd.testing.assert_frame_equal(lazily.uns["sae"][name], adata.uns["sae"][name])


def test_a_folder_that_other_cells_are_read_from_is_not_replaced(make_adata, tmp_path):
    adata, others = make_adata(), make_adata(first=1000, seed=5)
    sae.tl.fit(adata, n_features=8, steps=30)
    sae.tl.encode(adata, out=tmp_path / "a.zarr")
    expected = adata.obsm["sae"].compute()
    for cells in (others, adata[: adata.n_obs // 2].copy()):
        with pytest.raises(FileExistsError, match=r"a\.zarr' holds the activations of other cells"):
            sae.tl.encode(cells, reference=adata, out=tmp_path / "a.zarr")
        assert "sae" not in others.obsm
    sae.tl.encode(adata, out=tmp_path / "a.zarr")
    assert (adata.obsm["sae"].compute() != expected).nnz == 0
