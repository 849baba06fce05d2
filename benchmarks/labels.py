"""Do features know cell types? Held-out AUROC of the best feature, the best component and a supervised probe.

Five stratified halves: the feature (or component, with its sign) with the highest AUROC for a label on one half is scored
on the other. The probe is a logistic regression of the label on the embedding, trained on the one half and scored on the
other. The SAE itself never sees a label; it is trained on all cells.

    python benchmarks/labels.py
    python benchmarks/labels.py --h5ad pbmc3k.h5ad --groupby cell_type --seeds 3

Counts (integers in X) are normalised, log-transformed and reduced to 50 principal components of 2,000 variable genes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter

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


def aurocs(scores: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return np.array([roc_auc_score(inside, column) for column in scores.T])


def held_out(scores: np.ndarray, inside: np.ndarray, splits: list, *, signed: bool) -> tuple[list[float], list[int]]:
    values, picks = [], []
    for pick, test in splits:
        found = aurocs(scores[pick], inside[pick])
        strength = np.maximum(found, 1 - found) if signed else found
        best = int(strength.argmax())
        value = roc_auc_score(inside[test], scores[test, best])
        values.append(1 - value if signed and found[best] < 0.5 else value)
        picks.append(best)
    return values, picks


def probe(x: np.ndarray, inside: np.ndarray, splits: list) -> list[float]:
    values = []
    for pick, test in splits:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        values.append(roc_auc_score(inside[test], model.fit(x[pick], inside[pick]).decision_function(x[test])))
    return values


def table(adata: ad.AnnData, groupby: str, seed: int, **settings: object) -> pd.DataFrame:
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
    labels = adata.obs[groupby].astype(str).to_numpy()
    halves = StratifiedShuffleSplit(N_SPLITS, test_size=0.5, random_state=0)
    splits = list(halves.split(labels, labels))
    x, a = np.asarray(adata.obsm["X_pca"], dtype=np.float64), adata.obsm["sae"].toarray()
    rows = []
    for label, count in adata.obs[groupby].value_counts().items():
        inside = labels == str(label)
        feature, picks = held_out(a, inside, splits, signed=False)
        component, _ = held_out(x, inside, splits, signed=True)
        supervised = probe(x, inside, splits)
        name = features.index[Counter(picks).most_common(1)[0][0]]
        sets = sae.get.enrichment(adata, name, direction="up", max_padj=0.05, n=1)
        rows.append(
            {
                "label": label,
                "cells": count,
                "feature": f"{np.mean(feature):.3f} ± {np.std(feature):.3f}",
                "component": f"{np.mean(component):.3f} ± {np.std(component):.3f}",
                "probe": f"{np.mean(supervised):.3f} ± {np.std(supervised):.3f}",
                "name": name,
                "gene set": sets["gene_set"].iloc[0] if len(sets) else "-",
                "means": (np.mean(feature), np.mean(component), np.mean(supervised)),
            }
        )
    found = pd.DataFrame(rows)
    means = np.array(found.pop("means").tolist())
    print(found.to_string(index=False))
    print(
        f"mean: feature {means[:, 0].mean():.3f}, component {means[:, 1].mean():.3f}, probe {means[:, 2].mean():.3f}; "
        f"labels at ≥ 0.9: {(means[:, 0] >= 0.9).sum()} of {len(means)}, {(means[:, 1] >= 0.9).sum()}, {(means[:, 2] >= 0.9).sum()}"
    )
    return found


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
        table(data, options.groupby, number, architecture=options.architecture, preprocess=options.preprocess)
