"""Steering real cells, where the shared data folder is at hand: genes rise that the literature names, and cells move where they should."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc

import sae

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
# Globins and their chaperone, heme synthesis and its carriers, biliverdin reductase, carbonic anhydrases of red cells.
ERYTHROID = (
    "HBA1 HBA2 HBB HBD HBG1 HBG2 HBM HBQ1 AHSP ALAS2 ALAD HMBS UROS UROD CPOX PPOX FECH SLC25A37 SLC25A38 TSPO2 ABCB6 ABCB10 FAM132B "
    "BLVRB CA1 CA2"
).split()
INTERFERON = (
    "ISG15 ISG20 IFIT1 IFIT2 IFIT3 IFI6 IFI44 IFI44L IFI35 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL STAT1 IRF7 CXCL10 CXCL11 "
    "RSAD2 LY6E PLSCR1 EIF2AK2 HERC5 DDX58 XAF1 SAMD9 TRIM22 BST2 APOBEC3A TNFSF10"
).split()


def read(name: str) -> ad.AnnData:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    return ad.read_h5ad(path)


def log_normalise(adata: ad.AnnData) -> None:
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)


def steered(adata, model, use_rep, groupby, target, start, markers):
    """Choose the feature of the target on one half of the cells, and set it in the starting cells of the other half."""
    keys = ["sae", "seed_1", "seed_2"]
    for seed, key in enumerate(keys):
        sae.tl.fit(adata, use_rep=use_rep, rng=seed, key_added=key, progress=False)
        sae.tl.encode(adata, key=key, progress=False)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    one, other = (adata[np.sort(order[half::2])].copy() for half in range(2))
    sae.tl.score_labels(one, groupby, progress=False)
    feature = sae.get.labels(one, label=target)["feature"].iloc[0]
    inside = (one.obs[groupby] == target).to_numpy()
    sae.tl.steer(
        other,
        feature,
        model=model,
        value=float(sae.get.activations(one, feature).X[inside].mean()),
        doses=[1],
        cells=other.obs[groupby].isin(start).to_numpy(),
        groupby=groupby,
        net={"markers": markers},
        n_controls=200,
        control_keys=keys[1:],
        progress=False,
    )
    controls = sae.get.steering(other, table="controls").set_index(["measure", "name"])
    labels = sae.get.steering(other, table="labels").set_index(["label", "towards"])
    return controls, labels


def test_the_erythroid_feature_raises_globins_in_progenitors():
    scvi = pytest.importorskip("scvi")
    adata = read("marrow_cd34_setty19_counts_labeled.h5ad")
    with warnings.catch_warnings():
        # The model was saved by another version of torch or scvi-tools.
        warnings.simplefilter("ignore")
        counts = adata[:, adata.var["scvi_gene"]].copy()
        trained = scvi.model.SCVI.load(FOLDER / "models" / "marrow_scvi", adata=counts)
    model = sae.models.SCVI(trained)
    np.testing.assert_allclose(model.embed(counts), adata.obsm["X_scVI"], atol=1e-5)
    log_normalise(adata)
    start = ["HSC", "HSC_MPP", "MEP_Mk_primed"]
    controls, labels = steered(adata, model, "X_scVI", "cell_type", "Erythroid_late", start, ERYTHROID)

    genes = controls.loc[("gene_set", "markers")]
    assert genes["value"] >= 0.9
    assert genes["n_features"] == genes["n_directions"] == 200
    assert genes["above_features"] >= 0.99 and genes["above_directions"] >= 0.97
    for label in ("Erythroid_early", "Erythroid_late"):
        towards = controls.loc[("label", label)]
        assert towards["value"] > 0 and min(towards["above_features"], towards["above_directions"]) >= 0.97
    for label in start:
        assert labels.loc[(label, "Erythroid_late"), "closed"] > 0.2


def test_the_interferon_feature_moves_cells_towards_stimulated_ones():
    adata = read("kang18_pbmc_ifnb_muscat_counts_labeled.h5ad")
    log_normalise(adata)
    sc.pp.pca(adata)
    controls, labels = steered(adata, sae.models.PCA(adata), "X_pca", "condition", "stim", ["ctrl"], INTERFERON)
    genes, towards = controls.loc[("gene_set", "markers")], controls.loc[("label", "stim")]
    assert genes["value"] >= 0.9 and min(genes["above_features"], genes["above_directions"]) >= 0.98
    assert towards["value"] > 0.1 and min(towards["above_features"], towards["above_directions"]) >= 0.98
    assert labels.loc[("ctrl", "stim"), "closed"] > 0.3
