"""Models of several modalities, and those that take steps, read as expression."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import sae

LOADINGS = np.random.default_rng(0).normal(size=(6, 28)).astype(np.float32)
SETS = {"early": [f"g{i}" for i in range(8)], "late": [f"g{i}" for i in range(12, 20)]}


class Joint:
    """A decoder of 20 genes and 8 proteins."""

    def decode(self, z, data):
        x = np.log1p(np.exp(z @ LOADINGS * 0.3))
        names = {"rna": [f"g{i}" for i in range(20)], "adt": [f"p{i}" for i in range(8)]}
        values = {"rna": x[:, :20], "adt": x[:, 20:]}
        return {
            mod: ad.AnnData(values[mod], obs=data.obs[[]], var=pd.DataFrame(index=names[mod]), uns={"scale": "log1p"})
            for mod in names
        }


@pytest.fixture
def adata(make_adata):
    adata = make_adata(120)
    sae.tl.fit(adata, n_features=16, k=3, steps=100, progress=False)
    sae.tl.encode(adata)
    return adata


def of_modality(mod):
    """A model of one modality alone."""
    return sae.models.Functions(decode=lambda z, data: Joint().decode(z, data)[mod])


@pytest.mark.parametrize("mod", ["rna", "adt"])
def test_one_of_several_modalities_for_an_anndata(adata, mod):
    alone = adata.copy()
    sae.tl.rank_genes(adata, model=Joint(), var_mod=mod, n_genes=None)
    sae.tl.rank_genes(alone, model=of_modality(mod), n_genes=None)
    found, expected = sae.get.genes(adata), sae.get.genes(alone)
    assert len(found) > 0
    columns = ["feature", "gene", "score", "log2fc", "pval", "padj"]
    pd.testing.assert_frame_equal(found[columns], expected[columns])


def test_enrichment_of_one_of_several_modalities(adata):
    alone = adata.copy()
    settings = {"method": "ulm", "collection": "sets"}
    sae.tl.enrich(adata, SETS, model=Joint(), var_mod="rna", **settings)
    sae.tl.enrich(alone, SETS, model=of_modality("rna"), **settings)
    found, expected = (sae.get.enrichment(data) for data in (adata, alone))
    assert len(found) > 0
    pd.testing.assert_series_equal(found["score"], expected["score"])


def test_the_modality_has_to_be_said(adata, compare):
    before = compare.state(adata)
    with pytest.raises(
        ValueError, match=r"is of the modalities 'rna', 'adt', not of None\. Pass one of them as var_mod="
    ):
        sae.tl.rank_genes(adata, model=Joint())
    with pytest.raises(ValueError, match=r"var_mod='rna' names a modality, but the prediction of Functions has none"):
        sae.tl.rank_genes(adata, model=of_modality("rna"), var_mod="rna")
    with pytest.raises(ValueError, match=r"Leave var_mod= out"):
        sae.tl.rank_genes(adata, var_mod="rna")
    compare.assert_same(before, compare.state(adata))


def test_expression_is_decoded_also_by_a_model_that_takes_steps(adata):
    class Both:
        def intervene(self, step, data):
            raise AssertionError("not asked for")

        def decode(self, z, data):
            return Joint().decode(z, data)["rna"]

    alone = adata.copy()
    sae.tl.rank_genes(adata, model=Both())
    sae.tl.rank_genes(alone, model=of_modality("rna"))
    pd.testing.assert_frame_equal(sae.get.genes(adata), sae.get.genes(alone))


def test_steps_alone_are_no_expression(adata):
    class Steps:
        def intervene(self, step, data):
            return Joint().decode(adata[data.obs_names].obsm["X_pca"] + step, data)["rna"]

    with pytest.raises(TypeError, match=r"model= is a Steps, which has no method decode\(z, data\)"):
        sae.tl.rank_genes(adata, model=Steps())
    sae.tl.steer(adata, 0, model=Steps(), value=1, doses=[1], n_controls=1)
    by_decoding = adata.copy()
    sae.tl.steer(by_decoding, 0, model=of_modality("rna"), value=1, doses=[1], n_controls=1)
    pd.testing.assert_frame_equal(sae.get.steering(adata), sae.get.steering(by_decoding))


def test_a_prediction_of_no_modality_goes_where_it_is_told(make_mudata):
    mdata = make_mudata(80)
    sae.tl.fit(mdata, use_rep="X_joint", n_features=16, k=3, steps=100, progress=False)
    sae.tl.encode(mdata)
    settings = {"model": of_modality("adt"), "value": 1, "doses": [1], "n_controls": 0, "layer_added": "up"}
    with pytest.raises(ValueError, match=r"A MuData has no layers, .* Pass var_mod="):
        sae.tl.steer(mdata, 0, **settings)
    with pytest.raises(ValueError, match=r"no modality 'atac'"):
        sae.tl.steer(mdata, 0, var_mod="atac", **settings)
    sae.tl.steer(mdata, 0, var_mod="adt", key_added="X_up", **settings)
    rows = mdata.obs_names.get_indexer(mdata["adt"].obs_names)
    expected = np.log1p(np.exp(mdata.obsm["X_up"] @ LOADINGS[:, 20:] * 0.3))[rows]
    np.testing.assert_allclose(mdata["adt"].layers["up"], expected, rtol=1e-4, atol=1e-5)
