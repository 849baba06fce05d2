"""From features to gene sets: how long it takes, and in how much memory.

    published   5,000 cells × 2,000 genes, 512 features, 500 gene sets: sae.tl.enrich against the published procedure, a
                loop of SciPy calls per feature and gene set (timed on a few features)
    paper       the size of arXiv:2410.11468: 56,714 cells × 13,431 genes (a tenth of them expressed), 5,000 features, 64
                active in a cell, 2,600 gene sets: rank_genes and enrich

    python benchmarks/lens.py
    python benchmarks/lens.py paper --cells 10000

Expression and activations are random, and sparse; a gene set has 10 to 500 genes. Seconds are medians of interleaved rounds where
there are several; memory is the peak of a process of its own, with the data in it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import scipy
from scipy import sparse, stats

import sae

ROUNDS, LOOPED = 3, 2
EXPRESSED = 0.1
SMALL = {"n": 5_000, "g": 2_000, "h": 512, "n_sets": 500, "active": 32}
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

    def ours() -> None:
        sae.tl.enrich(adata, sets, progress=False)

    def theirs() -> None:
        published(adata, sets, range(LOOPED))

    ours()
    rounds = [(seconds(ours), seconds(theirs) / LOOPED * size["h"]) for _ in range(ROUNDS)]
    mine, loop = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"published: {size['n']:,} cells × {size['g']:,} genes, {size['h']} features, {size['n_sets']} gene sets")
    print(f"sae.tl.enrich        {mine:10.2f} s")
    print(f"SciPy {scipy.__version__}, in a loop {loop:8.0f} s, from {LOOPED} features")
    print(f"ratio                {loop / mine:10.0f}\n", flush=True)


def at_size_of_the_paper(n: int) -> None:
    size = {**PAPER, "n": n}
    adata, sets = simulated(size["n"], size["g"], size["h"], size["active"]), gene_sets(size["g"], size["n_sets"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"paper: {n:,} cells × {size['g']:,} genes, {size['h']:,} features, {size['n_sets']:,} gene sets")
    sums = size["active"] * adata.X.nnz
    for name, verb in (
        ("rank_genes", lambda: sae.tl.rank_genes(adata, progress=False)),
        ("enrich", lambda: sae.tl.enrich(adata, sets, progress=False)),
    ):
        print(
            f"{name:12} {seconds(verb):8.1f} s; {2 * sums / 1e9:.1f} thousand million additions at the least",
            flush=True,
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak / 1e6:.2f} GB, {before / 1e6:.2f} GB before\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=["published", "paper", []], help="by default both")
    parser.add_argument("--cells", type=int, default=PAPER["n"], help="of the part 'paper'")
    options = parser.parse_args()
    parts = options.part or ["published", "paper"]
    if len(parts) > 1:
        for part in parts:
            subprocess.run([sys.executable, __file__, part, "--cells", str(options.cells)], check=True)
    elif parts == ["published"]:
        compare_published()
    else:
        at_size_of_the_paper(options.cells)


if __name__ == "__main__":
    main()
