"""Do time and memory stay bounded when the cells do not fit into memory?

Cells are simulated (programs that drive both a 50-dimensional embedding and 2,000 genes) and written to a Zarr store by
chunks, once. For every number of cells a fresh process opens the first of them lazily, fits 2,048 features, encodes into
another store, ranks genes, tests gene sets (the genes of each program) and scores labels (random ones); it reports seconds per million cells,
the highest resident memory of each step, and how long it takes just to read the matrices once. `--cluster` repeats all but
the fit on a local dask cluster of two workers, and says whether the result is the same to the last bit. `--figure` draws
time and memory against the number of cells.

    python benchmarks/scale.py --folder FOLDER [--cells 1000000 2000000 5000000 10000000] [--cluster 1000000]
        [--figure FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import pandas as pd
import zarr
from scipy import sparse

import sae
from sae.core.rows import pieces

N_INPUTS, N_GENES, N_PROGRAMS, N_FEATURES = 50, 2_000, 200, 2_048
N_LABELS = 20
PART = 50_000
"""Cells that are simulated at a time."""
VALUES = 1_000_000
"""Of a chunk of the stored sparse matrix."""
ROWS = 20_000
"""Of a chunk of the stored embedding."""
LAZY_ROWS = 65_536
"""Of a chunk of the lazy arrays."""
NAMES = ("read the embedding", "read the genes", "fit", "encode", "rank_genes", "enrich", "score_labels")
GB, MILLION = 2**30, 1e6


def programs() -> tuple[sparse.csr_matrix, np.ndarray]:
    """Draw what every program does: loadings (programs, genes), and directions (programs, 50)."""
    rng = np.random.default_rng(0)
    loadings = (rng.random((N_PROGRAMS, N_GENES)) < 0.02) * rng.gamma(2, 0.15, (N_PROGRAMS, N_GENES))
    directions = rng.standard_normal((N_PROGRAMS, N_INPUTS)).astype(np.float32)
    return sparse.csr_matrix(loadings, dtype=np.float32), directions


def gene_sets() -> dict[str, list[str]]:
    """Return the genes of every program."""
    loadings, _ = programs()
    return {f"program {i}": [f"gene{j}" for j in row.indices] for i, row in enumerate(loadings)}


def simulate(
    n: int, loadings: sparse.csr_matrix, directions: np.ndarray, seed: int
) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Draw some cells: embedding (n, 50), and log1p values of the genes, of which one in twenty is not zero."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, N_PROGRAMS), dtype=np.float32) < 6 / N_PROGRAMS
    activity = active * rng.gamma(4, 0.25, active.shape).astype(np.float32)
    embedding = activity @ directions + 0.3 * rng.standard_normal((n, N_INPUTS), dtype=np.float32)
    # A sum of Poisson counts, one for each active programme and one for all genes alike, is Poisson of the summed rate.
    cells, programs = np.nonzero(active)
    n_driven = np.diff(loadings.indptr)[programs]
    places = np.arange(n_driven.sum()) + np.repeat(loadings.indptr[programs] - np.cumsum(n_driven) + n_driven, n_driven)
    rates = loadings.data[places] * np.repeat(activity[cells, programs], n_driven)
    n_anywhere = rng.poisson(0.03 * N_GENES, n)
    rows = np.concatenate([np.repeat(cells, n_driven), np.repeat(np.arange(n), n_anywhere)])
    genes = np.concatenate([loadings.indices[places], rng.integers(N_GENES, size=n_anywhere.sum())])
    drawn = np.concatenate([rng.poisson(rates), np.ones(n_anywhere.sum(), np.int64)])
    found = drawn > 0
    counts = sparse.csr_matrix((drawn[found], (rows[found], genes[found])), shape=(n, N_GENES), dtype=np.float32)
    counts.sum_duplicates()
    depth = rng.lognormal(0, 0.3, n).astype(np.float32)
    counts.data = np.log1p(counts.data / np.repeat(depth, np.diff(counts.indptr)))
    return embedding, counts


def write(path: Path, n_cells: int) -> None:
    """Write the cells in the layout of anndata, except for the names of the cells, which are their numbers."""
    loadings, directions = programs()
    root = zarr.open_group(path, mode="w", zarr_format=3)
    x = root.create_group("X", attributes={"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
    data, indices = (
        x.create_array(name, shape=(0,), chunks=(VALUES,), dtype=kind)
        for name, kind in (("data", np.float32), ("indices", np.int32))
    )
    embedding = root.create_array("embedding", shape=(n_cells, N_INPUTS), chunks=(ROWS, N_INPUTS), dtype=np.float32)
    embedding.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    starts = [np.zeros(1, np.int64)]
    for start in range(0, n_cells, PART):
        part, genes = simulate(min(PART, n_cells - start), loadings, directions, start)
        embedding[start : start + len(part)] = part
        for stored, new in ((data, genes.data), (indices, genes.indices)):
            stored.append(new)
        starts.append(starts[-1][-1] + genes.indptr[1:].astype(np.int64))
    indptr = np.concatenate(starts)
    x.create_array("indptr", data=indptr, chunks=(VALUES,))
    x.attrs["shape"] = [n_cells, N_GENES]


def opened(path: Path, n_cells: int) -> ad.AnnData:
    """Open the first cells as dask arrays."""
    root = zarr.open_group(path, mode="r")
    lazy = ad.experimental.read_elem_lazy
    x = lazy(root["X"], chunks=(LAZY_ROWS, N_GENES))[:n_cells]
    embedding = lazy(root["embedding"], chunks=(LAZY_ROWS, N_INPUTS))[:n_cells]
    labels = np.random.default_rng(0).integers(N_LABELS, size=n_cells)
    obs = pd.DataFrame(
        {"label": pd.Categorical.from_codes(labels, [f"label {i}" for i in range(N_LABELS)])},
        index=pd.RangeIndex(n_cells).astype(str),
    )
    return ad.AnnData(x, obs, pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]), obsm={"X_pca": embedding})


def resident() -> float:
    """Return the highest resident memory so far in GB, and forget it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    highest = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return highest


def digest(*arrays: Any) -> str:
    """Hash arrays or tables."""
    found = hashlib.blake2b(digest_size=8)
    for values in arrays:
        table = isinstance(values, pd.DataFrame)
        found.update(pd.util.hash_pandas_object(values).to_numpy().tobytes() if table else np.asarray(values).tobytes())
    return found.hexdigest()


def run(path: Path, n_cells: int, weights: Path, *, fitted: bool) -> dict[str, Any]:
    """Go through the job; `fitted` takes the SAE that an earlier process has left."""
    adata = opened(path, n_cells)
    found: dict[str, Any] = {"imports": {"peak": resident(), "seconds": 0.0}}

    def measure(name: str, function: Any, *given: Any, **options: Any) -> None:
        start = time.perf_counter()
        function(*given, **options)
        found[name] = {"seconds": time.perf_counter() - start, "peak": resident()}

    def read(x: Any) -> None:
        for _ in pieces(x, LAZY_ROWS):
            pass

    if fitted:
        adata.uns["sae"] = sae.io.read(weights).uns["sae"]
    else:
        # A few cells, so that compiling is not measured.
        warm = opened(path, 20_000)
        sae.tl.fit(warm, n_features=64, steps=20, progress=False)
        sae.tl.encode(warm, progress=False)
        sae.tl.rank_genes(warm, progress=False)
        sae.tl.enrich(warm, gene_sets(), progress=False)
        sae.tl.score_labels(warm, "label", progress=False)
        measure("warm-up", lambda: None)
        measure("read the embedding", read, adata.obsm["X_pca"])
        measure("read the genes", read, adata.X)
        measure("fit", sae.tl.fit, adata, n_features=N_FEATURES, progress=False)
        sae.io.write(adata, weights, overwrite=True)
    activations = path.parent / f"activations{'_cluster' if fitted else ''}.zarr"
    # Those of another number of cells are not replaced.
    shutil.rmtree(activations, ignore_errors=True)
    measure("encode", sae.tl.encode, adata, out=activations, progress=False)
    measure("rank_genes", sae.tl.rank_genes, adata, progress=False)
    measure("enrich", sae.tl.enrich, adata, gene_sets(), progress=False)
    measure("score_labels", sae.tl.score_labels, adata, "label", progress=False)
    features, genes = sae.get.features(adata), sae.get.genes(adata)
    sets, labels = sae.get.enrichment(adata), sae.get.labels(adata)
    stored = zarr.open_group(activations, mode="r")
    whole = digest(*(stored[name][:1_000_000] for name in ("data", "indices", "indptr")))
    stored_bytes = sum(stored[name].nbytes for name in ("data", "indices", "indptr"))
    params = adata.uns["sae"]["params"]
    return found | {
        "result": digest(features.drop(columns="genes_status"), genes, sets, labels) + whole,
        "l0": adata.uns["sae"]["encoded"]["l0"],
        "fvu": adata.uns["sae"]["encoded"]["fvu"],
        "gigabytes": stored_bytes / GB,
        "k": params["k"],
        "steps": params["steps"],
        "batch_size": params["batch_size"],
    }


def child(arguments: argparse.Namespace, n_cells: int, *, cluster: bool) -> dict[str, Any]:
    """Run the job in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(arguments.folder), "--child", str(n_cells)]
    lines = subprocess.run(
        command + (["--on-cluster"] if cluster else []), check=True, text=True, stdout=subprocess.PIPE
    ).stdout
    return json.loads(lines.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True, help="for the cells, which are kept, and the activations")
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000_000, 2_000_000, 5_000_000, 10_000_000])
    parser.add_argument("--cluster", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--figure", type=Path, help="of the curves, a PNG")
    parser.add_argument("--child", type=int)
    parser.add_argument("--on-cluster", action="store_true")
    arguments = parser.parse_args()
    n_cells = max(arguments.cells)
    path, weights = arguments.folder / "cells.zarr", arguments.folder / "weights"
    if arguments.child:
        if arguments.on_cluster:
            from distributed import Client, LocalCluster

            cluster = LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="3GB", dashboard_address=None)
            with cluster, Client(cluster):
                result = run(path, arguments.child, weights, fitted=True)
        else:
            result = run(path, arguments.child, weights, fitted=False)
        print(json.dumps(result))
        return
    if not path.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".partial")
        write(written, n_cells)
        written.rename(path)
    root = zarr.open_group(path, mode="r")
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / GB
    n_stored, values = root["embedding"].shape[0], root["X"]["data"].shape[0]
    print(
        f"{n_stored:,} cells × {N_INPUTS} and × {N_GENES:,} genes, {values / n_stored:.0f} of them not zero: "
        f"{stored:.1f} GB on disk, {8 * values / GB:.1f} GB as CSR, {4 * n_stored * N_GENES / GB:.0f} GB dense\n"
    )
    print("Seconds per million cells (peak memory, GB):\n")
    print(f"| cells | {' | '.join(NAMES)} | L0 | FVU | activations, GB |")
    print("|---" * (len(NAMES) + 4) + "|")
    results: dict[int, dict[str, Any]] = {}
    for n in sorted(arguments.cells):
        found = results[n] = child(arguments, n, cluster=False)
        cells = [f"{found[name]['seconds'] / n * MILLION:.1f} ({found[name]['peak']:.2f})" for name in NAMES]
        print(
            f"| {n:,} | {' | '.join(cells)} | {found['l0']:.1f} | {found['fvu']:.3f} | {found['gigabytes']:.2f} |",
            flush=True,
        )
        if n in arguments.cluster:
            again = child(arguments, n, cluster=True)
            cells = ["", "", ""] + [
                f"{again[name]['seconds'] / n * MILLION:.1f} ({again[name]['peak']:.2f})" for name in NAMES[3:]
            ]
            same = "the same" if again["result"] == found["result"] else "ANOTHER RESULT"
            print(f"| {n:,}, two dask workers | {' | '.join(cells)} | {same} | | |", flush=True)
    print(
        "\npeak with imports and compiled code alone:",
        f"{found['warm-up']['peak']:.2f} GB;",
        f"{found['steps']:,} steps of {found['batch_size']:,}",
    )
    if arguments.figure:
        draw(results, arguments.figure)


def draw(results: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw time per million cells and the peak of memory of each step."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    cells = np.array(sorted(results))
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (times, memory) = plt.subplots(1, 2, figsize=(7, 2.6), layout="constrained")
        for name in NAMES[2:]:
            seconds = np.array([results[n][name]["seconds"] for n in cells])
            times.plot(cells / MILLION, seconds / cells * MILLION, marker="o", markersize=3, label=name)
            memory.plot(cells / MILLION, [results[n][name]["peak"] for n in cells], marker="o", markersize=3)
        memory.plot(cells / MILLION, [results[n]["imports"]["peak"] for n in cells], color="grey", linestyle=":")
        memory.text(
            0.98, 0.03, "dotted: imports, names of the cells", color="grey", ha="right", transform=memory.transAxes
        )
        times.set(xlabel="million cells", ylabel="seconds per million cells", ylim=(0, None), xlim=(0, None))
        memory.set(xlabel="million cells", ylabel="peak memory (GB)", ylim=(0, 3.2), xlim=(0, None))
        memory.axhline(3, color="grey", linewidth=0.8)
        figure.legend(loc="outside right center", frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


if __name__ == "__main__":
    main()
