"""Do features know cell types? Held-out AUROC of the best feature, the best component and a supervised probe.

The feature (or gene, or component with its sign) with the highest AUROC for a label on one half of the cells is scored on the
other, both ways, for five stratified divisions. The probe is a logistic regression of the label on the embedding, trained on
one half and scored on the other, for five divisions. The SAE itself never sees a label; it is trained on all cells.

    python benchmarks/labels.py
    python benchmarks/labels.py --h5ad pbmc3k.h5ad --groupby cell_type --seeds 3

Counts (integers in X) are normalised, log-transformed and reduced to 50 principal components of 2,000 variable genes.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import sae

N_SPLITS = 5
SOURCES = ("feature", "gene", "representation")
COLUMNS = ("feature", "gene", "component", "probe")


def cells(path: str | None) -> ad.AnnData:
    if path is None:
        return sae.datasets.pbmc68k()
    adata = ad.read_h5ad(path)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > 2000:
        sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    sc.pp.pca(adata, n_comps=50)
    return adata


def probe(x: np.ndarray, inside: np.ndarray, splits: list) -> list[float]:
    values = []
    for pick, test in splits:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        values.append(roc_auc_score(inside[test], model.fit(x[pick], inside[pick]).decision_function(x[test])))
    return values


def compare(adata: ad.AnnData, groupby: str, seed: int, **settings: object) -> pd.DataFrame:
    start = time.perf_counter()
    sae.tl.fit(adata, rng=seed, progress=False, **settings)
    sae.tl.encode(adata, progress=False)
    seconds = time.perf_counter() - start
    sae.tl.enrich(adata, sae.datasets.immune_markers(), progress=False)
    params, features = adata.uns["sae"]["params"], sae.get.features(adata)
    print(
        f"\nseed {seed}: {adata.n_obs} cells, {params['n_features']} features, k {params['k']}, {params['architecture']}, {params['preprocess']}, "
        f"FVU {params['fvu']:.3f} (held out {params['val_fvu']:.3f}), dead {features['dead'].mean():.1%}, {seconds:.1f} s"
    )
    sae.tl.score_labels(adata, groupby, baselines=True, n_splits=N_SPLITS, progress=False)
    found = sae.get.label_summary(adata, groupby=groupby).astype({"label": str}).set_index(["label", "source"])
    x, labels = np.asarray(adata.obsm["X_pca"], dtype=np.float64), adata.obs[groupby].astype(str).to_numpy()
    splits = list(StratifiedShuffleSplit(N_SPLITS, test_size=0.5, random_state=0).split(labels, labels))
    rows, means = [], []
    for label, count in adata.obs[groupby].astype(str).value_counts().items():
        best = found.loc[label]
        scores = [(best.loc[source, "held_out_auroc"], best.loc[source, "held_out_sd"]) for source in SOURCES]
        supervised = probe(x, labels == label, splits)
        scores.append((np.mean(supervised), np.std(supervised, ddof=1)))
        means.append([mean for mean, _ in scores])
        name = best.loc["feature", "selected"]
        sets = sae.get.enrichment(adata, name, direction="up", max_padj=0.05, n=1)
        shown = [f"{mean:.3f} ± {sd:.3f}" for mean, sd in scores]
        row = {"label": label, "cells": count} | dict(zip(COLUMNS, shown, strict=True))
        rows.append(row | {"name": name, "gene set": sets["gene_set"].iloc[0] if len(sets) else "-"})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    for column, values in zip(COLUMNS, np.transpose(means), strict=True):
        print(f"{column}: mean {values.mean():.3f}, {(values >= 0.9).sum()} of {len(values)} labels at ≥ 0.9")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", help="cells with labels; by default the 700 PBMC of sae.datasets.pbmc68k")
    parser.add_argument("--groupby", default="bulk_labels")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--architecture", default="matryoshka")
    parser.add_argument("--preprocess", default=None)
    options = parser.parse_args()
    data = cells(options.h5ad)
    for number in range(options.seeds):
        compare(data, options.groupby, number, architecture=options.architecture, preprocess=options.preprocess)
