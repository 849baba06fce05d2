"""What nested reconstruction costs where there is no hierarchy: a dictionary of independent directions, recovered or not.

20,000 cells, each the sum of 4 of 512 random unit directions in 64 dimensions with weights 0.5 + Exp(1). An SAE of the
true width and sparsity is trained with and without nested reconstruction; a direction counts as found when its weight
and some feature's activation correlate at r > .9 over the cells.

    python benchmarks/nested.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np

import sae

N_CELLS, N_INPUTS, N_DIRECTIONS, N_ACTIVE = 20_000, 64, 512, 4


def simulate(seed: int) -> tuple[ad.AnnData, np.ndarray]:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((N_DIRECTIONS, N_INPUTS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    active = rng.random((N_CELLS, N_DIRECTIONS)).argsort(axis=1) < N_ACTIVE
    weights = np.where(active, 0.5 + rng.exponential(size=active.shape), 0)
    return ad.AnnData(obsm={"X_pca": (weights @ directions).astype(np.float32)}), weights


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = ((part - part.mean(axis=0)) / (part.std(axis=0) + 1e-12) for part in (one, other))
    return one.T @ other / len(one)


if __name__ == "__main__":
    adata, truth = simulate(0)
    print(f"{'training':<10}{'FVU':>8}{'dead':>8}{'mean best r':>14}{'found':>8}")
    for name in ("matryoshka", "batchtopk", "topk"):
        sae.tl.fit(adata, architecture=name, n_features=N_DIRECTIONS, k=N_ACTIVE, progress=False)
        sae.tl.encode(adata, progress=False)
        best = correlations(truth, adata.obsm["sae"].toarray()).max(axis=1)
        fvu, dead = adata.uns["sae"]["params"]["fvu"], sae.get.features(adata)["dead"].mean()
        print(f"{name:<10}{fvu:>8.3f}{dead:>8.1%}{best.mean():>14.3f}{(best > 0.9).sum():>8}")
