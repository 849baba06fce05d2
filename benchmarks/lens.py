"""From features to gene sets: how long it takes, and in how much memory.

    published   5,000 cells × 2,000 genes, 512 features, 500 gene sets: sae.tl.enrich against the published procedure, a
                loop of SciPy calls per feature and gene set (timed on a few features)
    paper       the size of arXiv:2410.11468: 56,714 cells × 13,431 genes (a tenth of them expressed), 5,000 features, 64
                active in a cell, 2,600 gene sets: rank_genes and enrich with its nulls
    growth      125,000 to 1,000,000 cells × 2,000 genes (a twentieth expressed) on disk, 512 features, 500 gene sets

    python benchmarks/lens.py
    python benchmarks/lens.py paper --cells 10000

Expression and activations are random, and sparse; a gene set has 10 to 500 genes. Seconds are medians of interleaved rounds where
there are several; memory is the peak of a process of its own, with the data in it.
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import h5py
import numpy as np
import scipy
from numba import njit
from scipy import sparse, stats

import sae

ROUNDS, LOOPED = 3, 2
EXPRESSED = 0.1
SMALL = {"n": 5_000, "g": 2_000, "h": 512, "n_sets": 500, "active": 32}
GROWTH = {"g": 2_000, "h": 512, "n_sets": 500, "active": 16}
GROWTH_CELLS = (125_000, 250_000, 500_000, 1_000_000)
PAPER = {"n": 56_714, "g": 13_431, "h": 5_000, "n_sets": 2_600, "active": 64}


def simulated(n: int, g: int, h: int, active: int, seed: int = 0) -> ad.AnnData:
    """Random cells with the activations of an SAE that was trained on next to nothing."""
    rng = np.random.default_rng(seed)
    per_cell = round(EXPRESSED * g)
    adata = ad.AnnData(rows_of(rng, n, g, per_cell), obsm={"X_pca": rng.standard_normal((n, 16)).astype(np.float32)})
    sae.tl.fit(adata, n_features=h, k=active, steps=1, preprocess="none", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae.tl.encode(adata, progress=False)
    adata.obsm["sae"] = rows_of(rng, n, h, active)
    return adata


def rows_of(rng: np.random.Generator, n: int, width: int, stored: int) -> sparse.csr_matrix:
    """Rows with so many positive values each, at random places, one in each of as many stretches of the row."""
    starts = np.linspace(0, width, stored + 1).astype(np.int32)
    columns = rng.integers(starts[:-1], starts[1:], size=(n, stored), dtype=np.int32)
    values = np.log1p(rng.exponential(2, size=n * stored)).astype(np.float32)
    return sparse.csr_matrix((values, columns.ravel(), np.arange(0, n * stored + 1, stored)), shape=(n, width))


def gene_sets(g: int, n_sets: int, seed: int = 0) -> dict[str, list[str]]:
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.integers(10, 501, n_sets), g // 2)
    return {f"set_{i}": [str(gene) for gene in rng.choice(g, size, replace=False)] for i, size in enumerate(sizes)}


def published(adata: ad.AnnData, sets: dict[str, list[str]], features: range) -> int:
    """Run the published procedure feature by feature; return the number of terms kept."""
    x, a = adata.X.toarray(), adata.obsm["sae"].toarray()
    genes = {gene: place for place, gene in enumerate(adata.var_names)}
    members = [np.isin(np.arange(x.shape[1]), [genes[gene] for gene in some]) for some in sets.values()]
    kept = 0
    for feature in features:
        positive, zero = a[:, feature] > np.percentile(a[:, feature], 99), a[:, feature] == 0
        p = np.array(
            [stats.ttest_ind(x[positive, gene], x[zero, gene], equal_var=False).pvalue for gene in genes.values()]
        )
        padj = stats.false_discovery_control(np.nan_to_num(p, nan=1))
        with np.errstate(divide="ignore", invalid="ignore"):
            fold_change = np.nan_to_num(x[positive].mean(axis=0) / x[zero].mean(axis=0))
        study = padj < (1e-5 if padj.min() < 1e-5 else 0.05)
        for inside in members:
            hits, n = int((study & inside).sum()), int(study.sum())
            binomial = stats.binomtest(hits, n, inside.mean()).pvalue if n else 1.0
            rank = stats.mannwhitneyu(fold_change[inside], fold_change[~inside]).pvalue / 2
            kept += binomial < 0.05 and rank < 0.05
    return kept


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare_published() -> None:
    size = SMALL
    adata, sets = simulated(size["n"], size["g"], size["h"], size["active"]), gene_sets(size["g"], size["n_sets"])
    settings = {
        "the same procedure": {"method": "scfeaturelens", "n_null": 0},
        "over-representation": {"n_null": 0},
        "the default, with both nulls": {},
    }
    runs = {name: functools.partial(sae.tl.enrich, adata, sets, progress=False, **s) for name, s in settings.items()}
    for run in runs.values():
        run()
    rounds = []
    for _ in range(ROUNDS):
        loop = seconds(lambda: published(adata, sets, range(LOOPED))) / LOOPED * size["h"]
        rounds.append((loop, *(seconds(run) for run in runs.values())))
    loop, *mine = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"published: {size['n']:,} cells × {size['g']:,} genes, {size['h']} features, {size['n_sets']} gene sets")
    print(f"{'SciPy ' + scipy.__version__ + ', in a loop':32} {loop:8.0f} s, from {LOOPED} features")
    for name, time_ in zip(runs, mine, strict=True):
        print(f"{name:32} {time_:8.2f} s, {loop / time_:6.0f} times as fast")
    print(flush=True)


def at_size_of_the_paper(n: int) -> None:
    size = {**PAPER, "n": n}
    adata, sets = simulated(size["n"], size["g"], size["h"], size["active"]), gene_sets(size["g"], size["n_sets"])
    before = peak_memory()
    print(f"paper: {n:,} cells × {size['g']:,} genes, {size['h']:,} features, {size['n_sets']:,} gene sets")
    additions = 2 * size["active"] * adata.X.nnz
    moved = adata.X.nnz * (adata.X.data.itemsize + adata.X.indices.itemsize)
    per_addition, per_byte = limits()
    for name, passes, verb in (
        ("rank_genes", 1, lambda: sae.tl.rank_genes(adata, progress=False)),
        ("enrich", 2, lambda: sae.tl.enrich(adata, sets, progress=False)),
        ("enrich, *", 2, lambda: sae.tl.enrich(adata, sets, max_padj=1, min_log2fc=0.25, progress=False)),
    ):
        taken = seconds(verb)
        least = passes * additions * per_addition, passes * moved * per_byte
        print(
            f"{name:12} {taken:8.1f} s; its {passes * additions / 1e9:.1f} thousand million additions take {least[0]:.1f} s at the "
            f"least ({least[0] / taken:.0%}), its {passes * moved / 1e9:.1f} GB {least[1]:.2f} s ({least[1] / taken:.1%})",
            flush=True,
        )
        print(f"{'':12} peak memory so far {peak_memory():.2f} GB, {before:.2f} GB before", flush=True)
    genes = sae.get.enrichment(adata)["overlap"].mean()
    print(
        f"* with study sets of random genes by their fold change alone: {genes:.0f} genes in a set on average\n",
        flush=True,
    )


def limits() -> tuple[float, float]:
    """Seconds per addition to sums that stay in the cache, and per byte read from memory, with all threads."""
    from sae.core.workers import available_threads

    n = available_threads()
    values, sums = np.random.default_rng(0).random((n, 20_000_000)), np.zeros((n, 64))
    times = []
    with ThreadPoolExecutor(n) as pool:
        for kernel, work in ((add_each, n * 2_000_000 * 64), (read_all, values.nbytes)):
            list(pool.map(kernel, values[:, :64], sums))
            given = values[:, :2_000_000] if kernel is add_each else values
            taken = min(seconds(lambda: list(pool.map(kernel, given, sums))) for _ in range(5))  # noqa: B023
            times.append(taken / work)
    return times[0], times[1]


@njit(nogil=True, fastmath=True)
def add_each(values, sums):
    for value in values:
        for i in range(sums.size):
            sums[i] += value


@njit(nogil=True, fastmath=True)
def read_all(values, sums):
    total = 0.0
    for value in values:
        total += value
    sums[0] = total


def growth() -> None:
    """Time and memory of an expression matrix that is read from disk, each in a process of its own."""
    print(f"growth: {GROWTH['g']:,} genes on disk, {GROWTH['h']} features, {GROWTH['n_sets']} gene sets")
    print(
        f"{'cells':>10} {'file, GB':>10} {'rank_genes, s':>14} {'enrich, s':>10} {'peak above the data, GB':>24}",
        flush=True,
    )
    for n in GROWTH_CELLS:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "cells.h5ad")
            write_cells(path, n)
            subprocess.run([sys.executable, __file__, "backed", "--path", path], check=True)
    print(flush=True)


def write_cells(path: str, n: int) -> None:
    """Write random cells to disk, a part at a time."""
    rng, stored = np.random.default_rng(0), GROWTH["g"] // 20
    adata = simulated(2_000, GROWTH["g"], GROWTH["h"], GROWTH["active"])
    whole = ad.AnnData(sparse.csr_matrix((n, GROWTH["g"]), dtype=np.float32), var=adata.var, uns=adata.uns)
    whole.obsm["sae"] = rows_of(rng, n, GROWTH["h"], GROWTH["active"])
    whole.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        del group["data"], group["indices"], group["indptr"]
        group["indptr"] = np.arange(0, n * stored + 1, stored)
        chunk = (min(1_000_000, n * stored),)
        data = group.create_dataset("data", (n * stored,), np.float32, chunks=chunk)
        indices = group.create_dataset("indices", (n * stored,), np.int32, chunks=chunk)
        for start in range(0, n, 50_000):
            part = rows_of(rng, min(50_000, n - start), GROWTH["g"], stored)
            place = slice(start * stored, start * stored + part.nnz)
            data[place], indices[place] = part.data, part.indices


def backed(path: str) -> None:
    adata, sets = ad.read_h5ad(path, backed="r"), gene_sets(GROWTH["g"], GROWTH["n_sets"])
    sae.tl.rank_genes(ad.AnnData(**first_cells(adata)), progress=False)
    before = peak_memory()
    ranked = seconds(lambda: sae.tl.rank_genes(adata, progress=False))
    enriched = seconds(lambda: sae.tl.enrich(adata, sets, progress=False))
    size, above = os.path.getsize(path) / 1e9, peak_memory() - before
    print(f"{adata.n_obs:10,} {size:10.2f} {ranked:14.1f} {enriched:10.1f} {above:24.2f}", flush=True)


def first_cells(adata: ad.AnnData) -> dict[str, object]:
    """A few cells in memory, on which everything is compiled."""
    return {"X": adata.X[:500], "var": adata.var, "obsm": {"sae": adata.obsm["sae"][:500]}, "uns": dict(adata.uns)}


def peak_memory() -> float:
    """Of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["published", "paper", "growth", "backed"], help="by default all")
    parser.add_argument("--cells", type=int, default=PAPER["n"], help="of the part 'paper'")
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        for part in ("published", "paper", "growth"):
            subprocess.run([sys.executable, __file__, part, "--cells", str(options.cells)], check=True)
    elif options.part == "published":
        compare_published()
    elif options.part == "paper":
        at_size_of_the_paper(options.cells)
    elif options.part == "growth":
        growth()
    else:
        backed(options.path)


if __name__ == "__main__":
    main()
