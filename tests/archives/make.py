"""Make `schema_1.h5ad`, and the same as Zarr in a zip: small real cells with the results of every verb that stores any.

The file is kept: what this version of the package wrote must stay readable, and figures are compared on it, because training
differs a little from machine to machine. Make another one, under the next number, when the layout changes.
"""

from __future__ import annotations

import tempfile
import warnings
import zipfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import scanpy as sc

import sae

N_CELLS, N_GENES = 350, 250


def make(path: Path) -> None:
    adata = sae.datasets.pbmc68k()
    rng = np.random.default_rng(0)
    cells = np.sort(rng.choice(adata.n_obs, N_CELLS, replace=False))
    markers = set(sae.datasets.immune_markers()["target"])
    genes = np.array([gene in markers for gene in adata.var_names])
    genes[rng.choice(np.flatnonzero(~genes), N_GENES - genes.sum(), replace=False)] = True
    adata = adata[cells, genes].copy()
    adata.raw = None
    sc.pp.pca(adata, n_comps=20)
    adata.obs = adata.obs[["bulk_labels", "phase"]].copy()
    adata.obsm = {key: adata.obsm[key] for key in ("X_pca", "X_umap")}
    adata.obsp, adata.uns = {}, {"pca": adata.uns["pca"]}

    quiet = {"progress": False}
    sae.tl.fit(adata, n_features=24, steps=600, **quiet)
    sae.tl.encode(adata)
    sae.tl.rank_genes(adata, n_genes=40)
    sae.tl.enrich(adata, sae.datasets.immune_markers(), collection="immune_markers", min_size=5, **quiet)
    sae.tl.score_labels(adata, "bulk_labels")
    sae.tl.score_labels(adata, "phase")
    sae.tl.name_features(adata)
    sae.tl.steer(
        adata, [0, 1], model=sae.models.PCA(adata), doses=[0, 1, 2], groupby="bulk_labels", n_controls=5, **quiet
    )
    sae.tl.ablate(adata, [0], batch="phase", groupby="bulk_labels", n_controls=2, **quiet)
    sae.tl.perturbation(adata, "bulk_labels", "Dendritic", n_permutations=20, **quiet)
    few = {"baselines": ["pca", "fastica", "genes", "random_directions"], "n_splits": 2, "n_bootstrap": 50}
    sae.tl.evaluate(adata, "bulk_labels", sae.datasets.immune_markers(), **few, **quiet)
    sae.tl.stability(adata, n_seeds=2, **quiet)
    sae.tl.feature_map(adata)
    grid = {"n_features": [12, 24, 48], "k": [2, 4, 8], "steps": 100}
    sae.tl.sweep(adata, grid, groupby="bulk_labels", **quiet)
    # The newest layout of HDF5 takes a quarter of the space for hundreds of small arrays.
    with h5py.File(path, "w", libver="latest") as file:
        ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip"})


def zip_zarr(h5ad: Path, path: Path) -> None:
    """Write the same as Zarr, all its small files in one."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        ad.read_h5ad(h5ad).write_zarr(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ad.settings.zarr_write_format = 3
        path = Path(__file__).with_name("schema_1.h5ad")
        make(path)
        zip_zarr(path, path.with_name("schema_1.zarr.zip"))
