"""What the tests find where there is nothing: the features of real cells, given to other cells at random.

An SAE is trained on the cells. Each permutation then gives every cell all activations of a random cell, so that no gene and no gene
set has to do with any feature, while the features and the genes go together as before. For each test:

    tests               feature × gene or feature × gene set, over all permutations
    p < .05             the share of them with p < .05: .05 if p is right, less for counts
    lowest, highest     the same in single permutations
    features            the share of features with anything at an adjusted p < .05 (Benjamini-Hochberg, within a feature)
    per feature         how much there is

The lines with cells expected divide the genes by how many cells with them are to be expected in the group where that is fewer
(sae.core.differential.expected_cells).

Genes are not independent of each other: single permutations scatter around the mean, and tests of gene sets that take genes for
independent find too many of them.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --cells pbmc4k.h5ad --sets reactome.gmt.gz --sets go_bp.gmt.gz --permutations 8

Counts (integers in X) are normalised to 10,000 and log-transformed; otherwise X is taken for log1p values. X_pca is computed from 2,000
variable genes where it is missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

import sae
from sae._genesets import default_collection, match
from sae.core.differential import MIN_EXPECTED, differential
from sae.core.enrichment import over_representation
from sae.core.groups import active_groups, percentile_groups
from sae.core.moments import group_moments, scan
from sae.core.null import permuted_cells
from sae.core.scfeaturelens import concepts
from sae.core.statistics import benjamini_hochberg
from sae.core.wilcoxon import wilcoxon

ALPHA = 0.05
EXPECTED = (1, 3, 5, 10, 20, 30, 100, np.inf)
WELCH = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 10}
MIN_LOG2FC, N_RAISED = 0.5, 100
SMALLEST_SET, LARGEST_SET = 10, 500
SCFEATURELENS_BLOCK = 50
ENRICHED = ("ora", "mannwhitney", "scfeaturelens")

Sets: TypeAlias = dict[str, sparse.csr_matrix]
Nets: TypeAlias = dict[str, tuple[object, int]]
"""By name, a net and the smallest number of measured genes."""
Found: TypeAlias = Iterator[tuple[str, np.ndarray, np.ndarray]]
"""Of some features: the name of a test, p (features, tests) with NaN where not tested, and what was found (features, tests)."""


def cells(path: str | None) -> ad.AnnData:
    if path is None:
        return sae.datasets.pbmc68k()
    adata = ad.read_h5ad(path)
    values = adata.X.data if sparse.issparse(adata.X) else np.asarray(adata.X)
    if (values == np.round(values)).all():
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if "X_pca" not in adata.obsm:
        sc.pp.highly_variable_genes(adata, n_top_genes=2000)
        sc.pp.pca(adata, n_comps=50)
    return adata


def gene_sets(nets: Nets, genes: pd.Index) -> Sets:
    return {name: match(net, genes, min_size=size, max_size=LARGEST_SET).weights for name, (net, size) in nets.items()}


def welch_test(adata: ad.AnnData, sets: Sets) -> Found:
    groups, genes = active_groups(adata.obsm["sae"]), scan(adata.X)
    for block in differential(groups, adata.X, genes, **WELCH, min_expected=0):
        yield "welch, all genes", block.pval, block.padj < ALPHA
    for block in differential(groups, adata.X, genes, **WELCH):
        yield "welch, tested by default", block.pval, block.padj < ALPHA
        # Of these alone p < .05 is .05; the others are tested in the direction in which p is too large rather than too small.
        either = np.where(block.either_way, block.pval, np.nan)
        yield "  whichever group is higher", either, block.either_way & (block.padj < ALPHA)


def welch_by_expected_cells(adata: ad.AnnData, sets: Sets) -> Found:
    groups, genes = active_groups(adata.obsm["sae"]), scan(adata.X)
    limits = (differential(groups, adata.X, genes, **WELCH, min_expected=limit) for limit in (0, *EXPECTED))
    for blocks in zip(*limits, strict=True):
        everything = blocks[0]
        for low, high, some, fewer in zip((0, *EXPECTED), EXPECTED, blocks, blocks[1:], strict=False):
            inside = some.either_way & ~fewer.either_way
            name = f"  {low}-{high} cells expected" if high < np.inf else f"  {low} or more cells expected"
            yield name, np.where(inside, everything.pval, np.nan), inside & (everything.padj < ALPHA)


def wilcoxon_test(adata: ad.AnnData, sets: Sets) -> Found:
    for name, limits in (("wilcoxon, normal for rare genes too", {"min_expected": 0}), ("wilcoxon, by default", {})):
        for block in wilcoxon(active_groups(adata.obsm["sae"]), adata.X, min_cells=WELCH["min_cells"], **limits):
            yield name, block.pval, block.padj < ALPHA


def ora(adata: ad.AnnData, sets: Sets) -> Found:
    """The genes that stand out as in sae.tl.enrich, and as many for each feature."""
    for block in differential(active_groups(adata.obsm["sae"]), adata.X, scan(adata.X), **WELCH):
        place = np.argsort(np.argsort(-block.score, axis=1), axis=1)
        studies = {
            "up": (block.padj <= ALPHA) & (block.log2fc >= MIN_LOG2FC),
            "down": (block.padj <= ALPHA) & (block.log2fc <= -MIN_LOG2FC),
            f"the {N_RAISED} most raised": place < N_RAISED,
        }
        for name, members in sets.items():
            for genes, study in studies.items():
                result = over_representation(study, members, study.shape[1])
                yield f"ora, {genes}: {name}", result.pval, benjamini_hochberg(result.pval) < ALPHA


def scfeaturelens(adata: ad.AnnData, sets: Sets) -> Found:
    """As published, with the two p-values of each set as one test: the larger, as both must be below .05."""
    x = sparse.csr_matrix(adata.X).expm1()
    groups, genes = percentile_groups(adata.obsm["sae"]), scan(x)
    features = np.flatnonzero((groups.n_positive > 1) & (groups.n_reference > 1))
    for block in group_moments(groups, features, x, genes, block=SCFEATURELENS_BLOCK):
        for name, members in sets.items():
            result = concepts(*block.moments(), members)
            yield f"scfeaturelens: {name}", np.maximum(result.p_binomial, result.p_mannwhitney), result.kept


TESTS: tuple[Callable[[ad.AnnData, Sets], Found], ...] = (
    welch_test,
    welch_by_expected_cells,
    wilcoxon_test,
    ora,
    scfeaturelens,
)


def one_permutation(adata: ad.AnnData, sets: Sets) -> pd.DataFrame:
    """Counts of every test (rows)."""
    rows = [
        {
            "test": name,
            "tests": np.isfinite(pval).sum(),
            "below": (pval < ALPHA).sum(),
            "rows": len(found),
            "with any": found.any(axis=1).sum(),
            "found": found.sum(),
        }
        for test in TESTS
        for name, pval, found in test(adata, sets)
    ]
    return pd.DataFrame(rows).groupby("test", sort=False).sum()


def annotated(adata: ad.AnnData, nets: Nets, seed: int) -> pd.DataFrame:
    """Share of features with a gene set by sae.tl.enrich, with another permutation as its null."""
    rows = []
    for name, (net, size) in nets.items():
        for method in ENRICHED:
            sae.tl.enrich(
                adata,
                net,
                method=method,
                collection=name,
                min_size=size,
                max_size=LARGEST_SET,
                rng=seed,
                progress=False,
            )
            null = adata.uns["sae"]["enrichment_null"].set_index("collection").loc[name]
            shares = {"padj ≤ .05": null["annotated"], "fdr ≤ .05": null["annotated_fdr"]}
            rows.append({"method": method, "sets": name} | shares)
    return pd.DataFrame(rows).set_index(["method", "sets"])


def summary(permutations: list[pd.DataFrame]) -> pd.DataFrame:
    total = sum(permutations[1:], start=permutations[0])
    shares = pd.concat([counts["below"] / counts["tests"] for counts in permutations], axis=1)
    return pd.DataFrame(
        {
            "tests": total["tests"].map("{:,}".format),
            "p < .05": (total["below"] / total["tests"]).map("{:.4f}".format),
            "lowest": shares.min(axis=1).map("{:.4f}".format),
            "highest": shares.max(axis=1).map("{:.4f}".format),
            "features": (total["with any"] / total["rows"]).map("{:.3f}".format),
            "per feature": (total["found"] / total["rows"]).map("{:,.2f}".format),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help=".h5ad; by default the 700 PBMC of sae.datasets.pbmc68k")
    parser.add_argument("--sets", action="append", default=[], help="GMT file; by default sae.datasets.immune_markers")
    parser.add_argument("--permutations", type=int, default=5)
    parser.add_argument("--only-enrich", action="store_true", help="leave out all but the last table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    adata = cells(options.cells)
    nets: Nets = {default_collection(path): (path, SMALLEST_SET) for path in options.sets}
    nets = nets or {"immune markers": (sae.datasets.immune_markers(), 1)}
    sets = gene_sets(nets, adata.var_names)
    sae.tl.fit(adata, rng=options.seed, progress=False)
    sae.tl.encode(adata, progress=False)
    activations = adata.obsm["sae"]
    n_active = activations.getnnz(axis=0)
    print(
        f"{Path(options.cells).name if options.cells else 'pbmc68k'}: {adata.n_obs:,} cells × {adata.n_vars:,} genes, "
        f"{(n_active > 0).sum()} features in {np.median(n_active[n_active > 0]):.0f} cells (median); "
        + ", ".join(f"{name} {members.shape[0]:,} sets" for name, members in sets.items())
        + f"; {options.permutations} permutations; welch expects {MIN_EXPECTED:.0f} cells",
        flush=True,
    )
    rng = np.random.default_rng(options.seed)
    permutations, by_enrich = [], []
    for seed in range(options.permutations):
        adata.obsm["sae"] = permuted_cells(activations, rng=rng)
        if not options.only_enrich:
            permutations.append(one_permutation(adata, sets))
        by_enrich.append(annotated(adata, nets, seed))
    if permutations:
        print(summary(permutations).to_string())
    print("\nFeatures with a gene set by sae.tl.enrich (mean over permutations)")
    print((sum(by_enrich) / len(by_enrich)).to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
