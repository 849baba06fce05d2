"""Results in the hands of the rest of scverse. Warnings are errors here too."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
from anndata import ImplicitModificationWarning
from scipy import sparse

import sae

NO_UMAP = "gauss"
"""The edge weights of `method="umap"` compile for half a minute where numba's cache is empty: one test does that."""


def test_neighbors_on_activations(encoded):
    sc.pp.neighbors(encoded, use_rep="sae", n_neighbors=10, method=NO_UMAP)
    assert encoded.uns["neighbors"]["params"]["use_rep"] == "sae"
    # Near in the activations means alike: most neighbours have the same label.
    labels = encoded.obs["bulk_labels"].to_numpy()
    rows, columns = encoded.obsp["distances"].nonzero()
    assert (labels[rows] == labels[columns]).mean() > 0.5


def test_obs_df(encoded):
    table = sc.get.obs_df(encoded, keys=["bulk_labels"], obsm_keys=[("sae", 3)])
    np.testing.assert_array_equal(table["sae-3"], encoded.obsm["sae"].toarray()[:, 3])


def test_subset(analysed):
    mask = (analysed.obs["bulk_labels"] == "CD19+ B").to_numpy()
    part = analysed[mask].copy()
    assert isinstance(part.obsm["sae"], sparse.csr_matrix)
    np.testing.assert_array_equal(part.obsm["sae"].toarray(), analysed.obsm["sae"].toarray()[mask])
    assert len(sae.get.genes(part)) == len(sae.get.genes(analysed))
    assert sae.get.activations(part).n_obs == mask.sum()
    sae.tl.score_labels(part, "phase")
    sae.tl.encode(part)


def test_view(fitted, net):
    """anndata turns a view into a copy when it is written to, and says so; the parent is not touched."""
    view = fitted[fitted.obs["phase"] == "G1"]
    assert view.is_view
    with pytest.warns(ImplicitModificationWarning):
        sae.tl.encode(view)
    assert not view.is_view
    assert "sae" not in fitted.obsm and "features" not in fitted.uns["sae"]
    alone = fitted[fitted.obs["phase"] == "G1"].copy()
    sae.tl.encode(alone)
    assert (view.obsm["sae"] != alone.obsm["sae"]).nnz == 0


@pytest.mark.parametrize(
    "verb",
    [
        lambda adata, net: sae.tl.fit(adata, steps=2),
        lambda adata, net: sae.tl.rank_genes(adata),
        lambda adata, net: sae.tl.enrich(adata, net),
        lambda adata, net: sae.tl.score_labels(adata, "bulk_labels"),
    ],
    ids=["fit", "rank_genes", "enrich", "score_labels"],
)
def test_verbs_on_a_view(encoded, net, compare, verb):
    before = compare.state(encoded)
    view, alone = encoded[:400], encoded[:400].copy()
    with pytest.warns(ImplicitModificationWarning):
        verb(view, net)
    verb(alone, net)
    compare.assert_same(alone.uns["sae"], view.uns["sae"])
    compare.assert_same(before, compare.state(encoded))


def test_concat(analysed):
    a, b = analysed[:300].copy(), analysed[300:].copy()
    joined = ad.concat([a, b])
    assert isinstance(joined.obsm["sae"], sparse.csr_matrix)
    assert (joined.obsm["sae"] != analysed.obsm["sae"]).nnz == 0
    assert "sae" not in joined.uns, "concat drops uns by default"
    with pytest.raises(KeyError, match=r"Run sae\.tl\.fit"):
        sae.get.activations(joined)
    sae.tl.encode(joined, reference=a)
    assert (joined.obsm["sae"] != analysed.obsm["sae"]).nnz == 0

    joined = ad.concat([a, b], uns_merge="first")
    assert sae.get.activations(joined).shape == (700, 32)
    sae.tl.score_labels(joined, "bulk_labels")
    sae.tl.encode(joined)
    assert (joined.obsm["sae"] != analysed.obsm["sae"]).nnz == 0


def test_activations_through_scanpy(encoded):
    a = sae.get.activations(encoded)
    sc.pp.neighbors(a, use_rep="X", n_neighbors=10)
    sc.tl.umap(a, maxiter=20)
    assert a.obsm["X_umap"].shape == (700, 2)
    sc.tl.rank_genes_groups(a, "bulk_labels", groups=["CD19+ B", "CD14+ Monocyte"], method="wilcoxon")
    best = sc.get.rank_genes_groups_df(a, "CD19+ B")["names"].iloc[0]
    sae.tl.score_labels(encoded, "bulk_labels")
    scores = sae.get.labels(encoded, groupby="bulk_labels", label="CD19+ B").set_index("feature")["auroc"]
    assert scores[best] > scores.quantile(0.9)
    axes = sc.pl.dotplot(a, ["sae_0", "sae_1", best], "bulk_labels", show=False)
    assert "mainplot_ax" in axes
    plt.close("all")


def test_activations_with_default_neighbors(encoded):
    """Scanpy takes `X_pca` where there is one: it must be of the activations, not of the embedding they came from."""
    a = sae.get.activations(encoded)
    sc.pp.neighbors(a, method=NO_UMAP)
    assert "X_pca" not in a.obsm or a.obsm["X_pca"].shape != encoded.obsm["X_pca"].shape


def test_rows_of_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=20)
    sae.tl.encode(mdata)
    part = mdata[::2].copy()
    assert part.obsm["sae"].shape == (40, 8)
    sae.tl.rank_genes(part, var_mod="rna")
    sae.tl.encode(part)


def test_after_a_plain_concat_the_message_says_how_to_get_the_sae_back(analysed):
    joined = ad.concat([analysed, analysed], index_unique="-")
    with pytest.raises(KeyError, match=r"anndata\.concat drops uns.*uns_merge='first'.*reference="):
        sae.get.features(joined)
    sae.tl.encode(joined, reference=analysed)
    assert sae.get.features(joined)["n_cells"].equals(2 * sae.get.features(analysed)["n_cells"])
