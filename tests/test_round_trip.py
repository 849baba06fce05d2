"""Every result survives h5ad, zarr and h5mu, and whatever comes next works on the object that was read back."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr

import sae

VERBS = {
    "fit": lambda data, **where: sae.tl.fit(data, n_features=16, steps=50, **where),
    "encode": lambda data, **where: sae.tl.encode(data, **where),
    "rank_genes": lambda data, var_mod=None, **where: sae.tl.rank_genes(data, var_mod=var_mod, **where),
    "enrich": lambda data, var_mod=None, **where: sae.tl.enrich(
        data, SETS, var_mod=var_mod, max_padj=0.5, min_log2fc=0, **where
    ),
    "enrich by ulm": lambda data, var_mod=None, **where: sae.tl.enrich(
        data, SETS, method="ulm", collection="ulm", var_mod=var_mod, **where
    ),
    "score_labels": lambda data, **where: sae.tl.score_labels(data, "group", order=["a", "b", "c"], **where),
    "score_labels again": lambda data, **where: sae.tl.score_labels(data, "half", **where),
    "feature_map": lambda data, **where: sae.tl.feature_map(data, n_neighbors=4, **where),
    "perturbation": lambda data, var_mod=None, **where: sae.tl.perturbation(
        data, "group", "a", target={"b": "g3"}, n_permutations=20, var_mod=var_mod, **where
    ),
    "ablate": lambda data, **where: sae.tl.ablate(data, [0, 1], batch="half", groupby="group", n_controls=2, **where),
    "steer": lambda data, var_mod=None, **where: sae.tl.steer(
        data,
        [0, 1],
        model=sae.models.Functions(decode=decode, genes=["g0", "g1", "g2"], scale="linear"),
        value=1.0,
        doses=[0, 1],
        groupby="group",
        n_controls=2,
        net=SETS,
        **where,
    ),
    "evaluate": lambda data, **where: sae.tl.evaluate(
        data,
        "group",
        SETS,
        baselines=["pca", "genes", "frozen_decoder"],
        n_splits=1,
        n_bootstrap=20,
        min_size=2,
        progress=False,
        **where,
    ),
    "stability": lambda data, **where: sae.tl.stability(data, n_seeds=1, progress=False, **where),
    "sweep": lambda data, **where: sweep(data, **where),
    "name_features": lambda data, **where: sae.tl.name_features(data, max_padj=0.5, min_auroc=0.5, min_f1=0, **where),
}
SETS = {"early": [f"g{i}" for i in range(8)], "late": [f"g{i}" for i in range(12, 20)]}


def sweep(data, **where):
    grid = {"n_features": [8, 12], "steps": 10, "k": 2}
    sae.tl.sweep(data, grid, groupby="group", progress=False, **where)
    # Time is never the same.
    (data[where["mod"]] if "mod" in where else data).uns["sae_sweep"]["runs"]["seconds"] = 0.0


def decode(z, data):
    """A model of three genes."""
    return z[:, :3] * 0.5 + z[:, 3:4]


NEED_GENES = ("rank_genes", "enrich", "enrich by ulm", "perturbation", "evaluate")
NEED_LATENT = ("fit", "sweep")
GETTERS = (
    "params",
    "activations",
    "features",
    "model",
    "decoder",
    "history",
    "genes",
    "enrichment",
    "labels",
    "label_summary",
    "neighbors",
    "modules",
    "steering",
    "metrics",
    "stability",
    "sweep",
)


def write_h5ad(adata: ad.AnnData, path: Path) -> ad.AnnData:
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad")


def write_zarr(adata: ad.AnnData, path: Path) -> ad.AnnData:
    # In memory: the same bytes, without a file system's time for a hundred small files.
    store = zarr.storage.MemoryStore()
    adata.write_zarr(store)
    return ad.read_zarr(store)


def write_both(adata: ad.AnnData, path: Path) -> ad.AnnData:
    return write_h5ad(write_zarr(adata, path), path)


@pytest.mark.parametrize(
    ("trained_on", "through"),
    [
        pytest.param("X_pca", write_h5ad, id="array-h5ad"),
        pytest.param("X", write_h5ad, id="genes-h5ad"),
        pytest.param("frame", write_h5ad, id="DataFrame-h5ad"),
        pytest.param("X", write_zarr, id="genes-zarr"),
        pytest.param("frame", write_both, id="DataFrame-zarr to h5ad"),
    ],
)
def test_after_every_verb(make_adata, trained_on, through, tmp_path, compare):
    """Two objects go through all verbs, one of them written and read in between: they stay the same."""
    kept = make_adata(layout="csr")
    kept.obs["half"] = np.arange(80) % 2 == 0
    kept.uns["log1p"] = {"base": None}
    if trained_on == "frame":
        kept.obsm["X_pca"] = pd.DataFrame(kept.obsm["X_pca"], index=kept.obs_names, columns=list("abcdef"))
    stored = kept.copy()
    for name, verb in VERBS.items():
        for adata in (kept, stored):
            verb(adata, **({"use_rep": "X" if trained_on == "X" else "X_pca"} if name == "fit" else {}))
        (tmp_path / name).mkdir()
        stored = through(stored, tmp_path / name)
        compare.assert_same(kept.uns["sae"], stored.uns["sae"], f"uns after {name}: ")
        if name != "fit":
            compare.assert_same(kept.obsm["sae"], stored.obsm["sae"], f"obsm after {name}: ")
    for name in GETTERS:
        a, b = (getattr(sae.get, name)(adata) for adata in (kept, stored))
        if isinstance(a, pd.DataFrame):
            pd.testing.assert_frame_equal(a, b, check_exact=True, check_names=False)
        elif isinstance(a, ad.AnnData):
            compare.assert_same(compare.state(a), compare.state(b))
        else:
            compare.assert_same(*(part if isinstance(part, dict) else vars(part) for part in (a, b)))
    before = kept.obsm["sae"]
    sae.tl.encode(stored)
    compare.assert_same(before, stored.obsm["sae"])
    new = kept.copy()
    del new.uns["sae"], new.obsm["sae"]
    sae.tl.encode(new, reference=stored)
    compare.assert_same(before, new.obsm["sae"])


@pytest.mark.parametrize("through", [write_h5ad, write_zarr], ids=["h5ad", "zarr"])
@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "vanilla", "l1": 0.5},
        {"architecture": "relu"},
        {"validation": 0},
        {"rng": None, "k": np.int64(3)},
    ],
    ids=["vanilla", "relu", "no validation", "NumPy numbers"],
)
def test_every_kind_of_sae(make_adata, through, tmp_path, compare, settings):
    adata = make_adata()
    sae.tl.fit(adata, n_features=np.int32(8), steps=20, **settings)
    sae.tl.encode(adata)
    read = through(adata, tmp_path)
    compare.assert_same(adata.uns["sae"], read.uns["sae"])
    compare.assert_same(adata.obsm["sae"], read.obsm["sae"])
    sae.tl.encode(read)
    compare.assert_same(adata.obsm["sae"], read.obsm["sae"])


@pytest.mark.parametrize("through", [write_h5ad, write_zarr], ids=["h5ad", "zarr"])
def test_empty_tables_and_dead_features(make_adata, through, tmp_path, compare):
    adata = make_adata()
    sae.tl.fit(adata, n_features=8, steps=20)
    adata.uns["sae"]["weights"]["b_enc"][:] = -1e6
    with pytest.warns(UserWarning, match="unexplained"):
        sae.tl.encode(adata)
    sae.tl.rank_genes(adata)
    sae.tl.enrich(adata, SETS)
    sae.tl.score_labels(adata, "group")
    sae.tl.name_features(adata)
    assert adata.uns["sae"]["genes"].empty and adata.uns["sae"]["enrichment"].empty
    read = through(adata, tmp_path)
    compare.assert_same(adata.uns["sae"], read.uns["sae"])
    compare.assert_same(adata.obsm["sae"], read.obsm["sae"])
    assert sae.get.genes(read).empty
    sae.tl.enrich(read, SETS, collection="again")


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"mod": "rna"}, id="modality"),
        pytest.param({"mod": "adt", "var_mod": "rna"}, id="genes of another modality"),
        pytest.param({"use_rep": "X_joint", "var_mod": "rna"}, id="joint"),
    ],
)
def test_h5mu_after_every_verb(make_mudata, where, tmp_path, compare):
    kept = make_mudata()
    for data in (kept, kept["rna"], kept["adt"]):
        data.obs["half"] = np.arange(data.n_obs) % 2 == 0
    stored = kept.copy()
    slot = {"mod": where["mod"]} if "mod" in where else {}
    rep = {"use_rep": where["use_rep"]} if "use_rep" in where else {}
    genes = {"var_mod": where["var_mod"]} if "var_mod" in where else {}
    for name, verb in VERBS.items():
        for data in (kept, stored):
            verb(data, **slot, **(rep if name in NEED_LATENT else genes if name in NEED_GENES else {}))
        stored.write_h5mu(tmp_path / f"{name}.h5mu")
        stored = mudata.read_h5mu(tmp_path / f"{name}.h5mu")
        a, b = (data[where["mod"]] if slot else data for data in (kept, stored))
        compare.assert_same(a.uns["sae"], b.uns["sae"], f"uns after {name}: ")
        if name != "fit":
            compare.assert_same(a.obsm["sae"], b.obsm["sae"], f"obsm after {name}: ")
    for name in GETTERS:
        getattr(sae.get, name)(stored, **slot)
    sae.tl.encode(stored, **slot)
    compare.assert_same(a.obsm["sae"], (stored[where["mod"]] if slot else stored).obsm["sae"])
