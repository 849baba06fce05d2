"""The whole job on one data set: train, encode, genes, gene sets, labels, figures and tables.

Run `python -m sae.demo --help`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import pandas as pd
import scanpy as sc

import sae

from .core.moments import scan

MOST_LABELS = 50
N_SHOWN, N_DRAWN = 12, 8
PERCENTILE = 95
"""Only the cells where a feature is strongest stand for it: many are weakly active in half of all cells."""


def main(arguments: list[str] | None = None) -> None:
    """Run the demo with command-line arguments."""
    options = _parser().parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    adata = ad.read_h5ad(options.h5ad) if options.h5ad else sae.datasets.pbmc68k()
    if scan(adata.X).whole.all():
        print("X holds counts: kept in layers['counts'], X normalised to 10,000 and log-transformed")
        adata.layers["counts"] = adata.X.copy()
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if options.use_rep is None and "X_pca" not in adata.obsm:
        print("no embedding was given with --use-rep: 50 principal components are computed")
        sc.pp.pca(adata)
    net, collection = (options.net, None) if options.net else (sae.datasets.immune_markers(), "immune_markers")
    groupby = options.groupby or _guess_labels(adata)
    print(f"{adata.n_obs} cells × {adata.n_vars} genes; labels: {groupby or 'none'}")

    with _timed("sae.tl.fit"):
        sae.tl.fit(adata, use_rep=options.use_rep)
    with _timed("sae.tl.encode"):
        sae.tl.encode(adata)
    with _timed("sae.tl.rank_genes"):
        sae.tl.rank_genes(adata, percentile=PERCENTILE)
    with _timed("sae.tl.enrich"):
        sae.tl.enrich(adata, net, collection=collection, percentile=PERCENTILE)
    if groupby:
        with _timed("sae.tl.score_labels"):
            sae.tl.score_labels(adata, groupby)
    with _timed("sae.tl.name_features"):
        # Not by label, so that the labels in the summary tell whether the names are right.
        sae.tl.name_features(adata, by=("gene set", "genes"))

    named = summary(adata, groupby)
    with _timed("sae.tl.feature_map"):
        sae.tl.feature_map(adata)
    with _timed("figures, report and tables"):
        sae.report(adata, out / "report.html")
        _draw(adata, list(named.drop_duplicates("gene_set")["feature"].head(N_DRAWN)), groupby, out)
        adata.write_h5ad(out / "adata.h5ad")
        named.to_csv(out / "summary.csv", index=False)
        for name in ("features", "genes", "enrichment", "labels", "history"):
            if name in adata.uns["sae"]:
                getattr(sae.get, name)(adata).to_csv(out / f"{name}.csv", index=name == "features")
    params = adata.uns["sae"]["params"]
    print(
        f"\n{params['n_features']} features, {params['l0']:.1f} active per cell, "
        f"FVU {params['fvu']:.3f} (held out {params['val_fvu']:.3f}). The strongest feature of each gene set:\n"
    )
    strongest = named.drop_duplicates("gene_set").head(N_SHOWN)
    print("none at padj and fdr ≤ 0.05" if strongest.empty else strongest.to_string(index=False))
    print(f"\nWritten to {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def summary(adata: ad.AnnData, groupby: str | None) -> pd.DataFrame:
    """One row per feature that has a gene set by `sae.tl.name_features`, strongest first, with its best label and top genes.

    Strength is the mean activation over all cells.
    """
    features = sae.get.features(adata)
    features = features[features["name_gene_set"].notna()].sort_values("mean", ascending=False, kind="stable")
    table = pd.DataFrame(
        {
            "feature": features.index,
            "gene_set": features["name_gene_set"].astype(str),
            "padj": features["name_gene_set_padj"].map("{:.0e}".format),
            "fdr": features["name_gene_set_fdr"].map("{:.3f}".format),
            "cells": features["n_cells"],
        }
    )
    if groupby:
        table["label"] = features[f"{groupby}_label"].astype(str)
        table["auroc"] = features[f"{groupby}_auroc"].round(3)
    table["genes"] = features["name_genes"].astype(str).str.split(";").str[:5].str.join(", ")
    return table.reset_index(drop=True)


def _guess_labels(adata: ad.AnnData) -> str | None:
    """Take the first categorical column of `obs` that can be cell types."""
    for name, column in adata.obs.items():
        if isinstance(column.dtype, pd.CategoricalDtype) and 2 <= column.nunique() <= MOST_LABELS:
            return str(name)
    return None


def _draw(adata: ad.AnnData, features: list[str], groupby: str | None, out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sae.pl.history(adata)
    plt.savefig(out / "history.png", dpi=150)
    sae.pl.feature_map(adata)
    plt.savefig(out / "feature_map.png", dpi=150)
    if features:
        sae.pl.enrichment(adata)
        plt.savefig(out / "enrichment.png", dpi=150)
        sae.pl.feature_card(adata, features[0], groupby=groupby)
        plt.savefig(out / "feature_card.png", dpi=150)
    basis = next((key for key in ("X_umap", "X_tsne") if key in adata.obsm), None)
    if basis and features:
        sae.pl.feature_umap(adata, features, basis=basis)
        plt.savefig(out / "feature_umap.png", dpi=150, bbox_inches="tight")
    plt.close("all")


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    print(f"{what:<24} {time.perf_counter() - start:6.1f} s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sae.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--h5ad", type=Path, help="cells with an embedding; by default 700 PBMC that come with Scanpy")
    parser.add_argument("--use-rep", help='key of obsm, or "X" (default: X_pca)')
    parser.add_argument("--net", help="GMT file of gene sets; by default markers of immune cell types")
    parser.add_argument("--groupby", help="column of obs with labels (default: the first categorical one)")
    parser.add_argument("--out", type=Path, default=Path("sae-demo"), help="folder for the results (default: sae-demo)")
    return parser


if __name__ == "__main__":
    main()
