"""The main job on real multimodal cells, where the shared data folder is at hand."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import mudata
import numpy as np
import pytest
import scanpy as sc

import sae

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
CITE = FOLDER / "bmmc_cite_neurips2021_600cells.h5mu"
MULTIOME = FOLDER / "bmmc_multiome_neurips2021_500cells.h5mu"


def read(path: Path) -> mudata.MuData:
    if not path.exists():
        pytest.skip(f"{path.name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    with warnings.catch_warnings():
        # Some proteins of the file are named like genes.
        warnings.filterwarnings("ignore", message="var_names are not unique", module="mudata")
        return mudata.read_h5mu(path)


def add_pca(adata, n_comps=30):
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=n_comps)


def best(mdata, label, **where):
    """The feature that tells a cell type best from the others, with its AUROC."""
    return sae.get.labels(mdata, label=label, n=1, **where).iloc[0][["feature", "auroc"]]


def test_cite_rna_read_against_rna_and_protein(net):
    mdata = read(CITE)
    add_pca(mdata["rna"])
    sc.pp.normalize_total(mdata["adt"])
    sc.pp.log1p(mdata["adt"])
    sae.tl.fit(mdata, mod="rna", n_features=64, steps=800, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.rank_genes(mdata, mod="rna", n_genes=20)
    assert sae.get.genes(mdata, mod="rna")["modality"].eq("rna").all()
    sae.tl.enrich(mdata, net, mod="rna", min_size=3, collection="immune", progress=False)
    sae.tl.score_labels(mdata, "cell_type", mod="rna")
    assert "sae" not in mdata.uns and "sae" not in mdata["adt"].uns

    feature, auroc = best(mdata, "CD14+ Mono", mod="rna")
    assert auroc > 0.9
    sets = sae.get.enrichment(mdata, feature, direction="up", mod="rna")
    assert "monocyte" in sets["gene_set"].iloc[0] and "MNDA" in sets["genes"].iloc[0]

    sae.tl.rank_genes(mdata, mod="rna", var_mod="adt", n_genes=20)
    proteins = sae.get.genes(mdata, feature, direction="up", modality="adt", n=10, mod="rna")
    assert proteins["modality"].eq("adt").all()
    assert {"CD14", "CD33", "CD11b", "CD36", "CD64"} & set(proteins["gene"])


def test_cite_protein_read_against_rna(net):
    mdata = read(CITE)
    for modality in mdata.mod.values():
        add_pca(modality)
    sae.tl.fit(mdata, mod="adt", n_features=32, steps=500, progress=False, key_added="surface")
    where = {"mod": "adt", "key": "surface"}
    sae.tl.encode(mdata, **where)
    mdata["adt"].obs["cell_type"] = mdata.obs["cell_type"].reindex(mdata["adt"].obs_names)
    sae.tl.score_labels(mdata, "cell_type", **where)
    sae.tl.enrich(mdata, net, var_mod="rna", min_size=3, progress=False, **where)
    sae.tl.rank_genes(mdata, var_mod="rna", n_genes=20, **where)
    feature, auroc = best(mdata, "CD14+ Mono", **where)
    assert auroc > 0.9
    assert {"LYZ", "S100A9", "S100A8", "CD14", "VCAN", "FCN1"} & set(
        sae.get.genes(mdata, feature, direction="up", n=10, **where)["gene"]
    )
    assert sae.get.enrichment(mdata, **where)["modality"].eq("rna").all()
    assert "surface" not in mdata["rna"].uns


def test_multiome_joint_embedding_through_h5mu(tmp_path, net, compare):
    mdata = read(MULTIOME)
    for modality in mdata.mod.values():
        add_pca(modality, n_comps=20)
    mdata.obsm["X_joint"] = np.hstack([modality.obsm["X_pca"] for modality in mdata.mod.values()])
    sae.tl.fit(mdata, "X_joint", n_features=32, steps=500, progress=False)
    sae.tl.encode(mdata)
    sae.tl.score_labels(mdata, "cell_type")
    sae.tl.enrich(mdata, net, var_mod="rna", min_size=3, progress=False)
    sae.tl.rank_genes(mdata, var_mod="atac", n_genes=10)
    assert sae.get.genes(mdata)["gene"].isin(mdata["atac"].var_names).all()
    assert sae.get.labels(mdata)["auroc"].max() > 0.9

    mdata.write_h5mu(tmp_path / "cells.h5mu")
    stored = mudata.read_h5mu(tmp_path / "cells.h5mu")
    compare.assert_same(mdata.uns["sae"], stored.uns["sae"])
    sae.tl.encode(stored)
    compare.assert_same(mdata.obsm["sae"], stored.obsm["sae"])
