"""Does removing batch features mix batches and keep cell types? Beside random features, and what needs no SAE.

    python benchmarks/batch.py --h5ad three_batches.h5ad --batch batch --groupby cell_type
    python benchmarks/batch.py --h5ad multiome.h5mu --mod rna --batch batch --groupby cell_type

SAEs are trained at defaults on 50 principal components, of 2,000 variable genes if there are more; counts (integers in X) are normalised and
log-transformed first. The features are found on the cells that are scored, as are the components that are removed: those that tell batches and
no labels by the same rule as features, and the one to three that tell batches best. "Centred" subtracts the mean of each batch; Harmony takes
part where it is installed. A random draw is as many features that move cells similarly far. `as low` counts the draws after which
the silhouette between batches is as low as after the removal of batch features.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

import sae
from sae.core.mixing import mixing, separation

NEIGHBORS, THRESHOLD, LABEL_THRESHOLD, MIN_CELLS = 15, 0.75, 0.85, 10
COLUMNS = ("batch_asw", "silhouette_batch", "batch_purity", "silhouette_label", "label_purity", "label_accuracy")


def cells(path: str, mod: str | None) -> ad.AnnData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = mudata.read_h5mu(path)[mod].copy() if path.endswith(".h5mu") else ad.read_h5ad(path)
    values = adata.X.data if sparse.issparse(adata.X) else np.asarray(adata.X)
    if (values == np.round(values)).all():
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if adata.n_vars > 2000:
        sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    sc.pp.pca(adata, n_comps=50)
    return adata


def telling(z: np.ndarray, codes: np.ndarray, within: np.ndarray) -> np.ndarray:
    """How well each component tells a batch or label of 10 cells or more, in either direction."""
    auroc = separation(sparse.csr_matrix(z), codes, within)[np.bincount(codes) >= MIN_CELLS]
    return np.nanmax(np.maximum(auroc, 1 - auroc), axis=0)


def without_sae(adata: ad.AnnData, batch: np.ndarray, label: np.ndarray, column: str) -> dict[str, np.ndarray]:
    z = np.asarray(adata.obsm["X_pca"], dtype=np.float64)
    of_batch, of_label = telling(z, batch, label), telling(z, label, batch)
    chosen = np.flatnonzero((of_batch >= THRESHOLD) & (of_label < LABEL_THRESHOLD))
    found = {f"{len(chosen)} batch components": np.delete(z, chosen, axis=1)}
    for n in (1, 2, 3):
        found[f"best {n} components"] = np.delete(z, np.argsort(-of_batch)[:n], axis=1)
    means = np.stack([z[batch == one].mean(axis=0) for one in range(batch.max() + 1)])
    found["centred"] = z - means[batch]
    try:
        from harmonypy import run_harmony
    except ImportError:
        print("Harmony is not installed.")
    else:
        found["Harmony"] = np.asarray(run_harmony(z, adata.obs, column, verbose=False).Z_corr).reshape(z.shape)
    return found


def ablated(adata: ad.AnnData, seed: int, options: argparse.Namespace) -> tuple[pd.DataFrame | None, str]:
    sae.tl.fit(adata, rng=seed, preprocess=options.preprocess, progress=False)
    sae.tl.encode(adata, progress=False)
    try:
        sae.tl.ablate(
            adata,
            batch=options.batch,
            groupby=options.groupby,
            threshold=THRESHOLD,
            label_threshold=LABEL_THRESHOLD,
            n_neighbors=NEIGHBORS,
            max_cells=adata.n_obs,
            progress=False,
        )
    except ValueError as error:
        return None, f"seed {seed}: {error}"
    return adata.uns["sae"]["ablation"]["scores"], ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", required=True, help="cells with batches and labels; h5mu with --mod")
    parser.add_argument("--mod")
    parser.add_argument("--batch", default="batch")
    parser.add_argument("--groupby", default="cell_type")
    parser.add_argument("--preprocess", help="of the SAE; by default as tl.fit chooses")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()

    adata = cells(options.h5ad, options.mod)
    batch, label = (pd.factorize(adata.obs[column])[0] for column in (options.batch, options.groupby))
    print(
        f"{adata.n_obs:,} cells, {batch.max() + 1} batches ({options.batch}), {label.max() + 1} labels ({options.groupby})"
    )
    rows, not_found = [], []
    for seed in range(options.seeds):
        scores, message = ablated(adata, seed, options)
        if scores is None:
            not_found.append(message)
            continue
        draws = scores[scores["source"] == "control"]
        after = scores.iloc[1]
        kept = ["n_features", "change", *COLUMNS]
        rows.append({"seed": seed, "features": "batch", **after[kept]})
        as_low = f"{(draws['batch_asw'] <= after['batch_asw']).sum()}/{len(draws)}"
        rows.append({"seed": seed, "features": "random", **draws[kept].mean(), "as low": as_low})
    print("\n".join(not_found))
    if rows:
        table = pd.DataFrame(rows).fillna({"as low": ""})
        print(table.round(3).to_string(index=False))
        print("\nmean of the seeds")
        print(table.groupby("features")[["n_features", "change", *COLUMNS]].mean().round(3).to_string())
    compared = {"before": np.asarray(adata.obsm["X_pca"]), **without_sae(adata, batch, label, options.batch)}
    scored = {name: vars(mixing(x, batch, label, NEIGHBORS)) for name, x in compared.items()}
    print("\nwithout an SAE")
    print(pd.DataFrame(scored).T[list(COLUMNS)].round(3).to_string())


if __name__ == "__main__":
    main()
