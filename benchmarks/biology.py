"""What do features mean? For every label its best feature, and that feature's gene sets and genes.

    python benchmarks/biology.py --h5ad marrow.h5ad --groupby cell_type --sets go_bp.gmt
    python benchmarks/biology.py --h5ad marrow.h5ad --groupby cell_type --sets go_bp.gmt --order HSC,Erythroid_early,Erythroid

The best feature of a label has the highest AUROC on cells that did not choose it. With `--order`, the features whose mean activation
rises along these labels are listed, the clearest first. Counts (integers in X) are normalised, log-transformed and reduced to 50 principal
components of 2,000 variable genes. A star marks a false discovery rate above 5 %, estimated from permuted cells.
"""

from __future__ import annotations

import argparse

import numpy as np
from labels import cells

import sae

N_SETS, N_GENES = 3, 8


def meaning(adata, feature: str) -> str:
    """Its best gene sets, none covered by a better one, and its best genes."""
    sets = sae.get.enrichment(adata, feature, direction="up", redundant=False, max_padj=0.05, n=N_SETS)
    listed = [f"{row.gene_set} ({row.padj:.0e}{'' if row.fdr <= 0.05 else '*'})" for row in sets.itertuples()]
    genes = sae.get.genes(adata, feature, direction="up", n=N_GENES)["gene"]
    return f"{'; '.join(listed) or '-'} | {' '.join(genes)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", help="cells with labels; by default the 700 PBMC of sae.datasets.pbmc68k")
    parser.add_argument("--groupby", default="bulk_labels")
    parser.add_argument("--sets", help="GMT file; by default sae.datasets.immune_markers")
    parser.add_argument("--order", help="labels along a lineage, separated by commas")
    parser.add_argument("--percentile", type=float, help="compare only the strongest cells of a feature")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    adata = cells(options.h5ad)
    order = options.order.split(",") if options.order else None
    sae.tl.fit(adata, rng=options.seed, progress=False)
    sae.tl.encode(adata, progress=False)
    sae.tl.score_labels(adata, options.groupby, order=order, progress=False)
    sae.tl.rank_genes(adata, percentile=options.percentile, progress=False)
    sae.tl.enrich(adata, options.sets or sae.datasets.immune_markers(), percentile=options.percentile, progress=False)

    null = adata.uns["sae"]["enrichment_null"].iloc[0]
    print(
        f"{adata.n_obs:,} cells, {adata.uns['sae']['params']['n_features']} features; with a gene set at padj ≤ .05: "
        f"{null['annotated']:.1%}, when cells are permuted {null['annotated_permuted']:.1%}, of random sets "
        f"{null['annotated_random_sets']:.1%}; at FDR ≤ .05: {null['annotated_fdr']:.1%}\n"
    )
    print("label | cells | feature | AUROC, held out | gene sets (adjusted p) | genes")
    for row in sae.get.label_summary(adata, source="feature").itertuples():
        print(
            f"{row.label} | {row.n_cells} | {row.selected} | {row.held_out_auroc:.3f} | {meaning(adata, row.selected)}"
        )
    if order is None:
        return
    features = sae.get.features(adata)
    rising = features[features[f"{options.groupby}_trend"] == "rising"]
    rising = rising.sort_values(f"{options.groupby}_trend_score", ascending=False)
    print(f"\n{len(rising)} features rise along {' < '.join(order)}:")
    for feature, row in rising.head(5).iterrows():
        z = row[f"{options.groupby}_trend_score"]
        print(f"{feature} | {row['n_cells']} cells | z {z:.1f} | {meaning(adata, feature)}")


if __name__ == "__main__":
    np.set_printoptions(precision=3)
    main()
