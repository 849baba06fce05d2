"""Every figure looks as it did when somebody last looked at it."""

from __future__ import annotations

import pytest

import sae

def recovered(adata, **settings):
    return sae.tl.recovery(adata, ["bulk_labels", "phase"], thresholds=(0.5, 0.9), **settings)


FIGURES = {
    "density": lambda adata: sae.pl.density(adata, groupby="bulk_labels"),
    "enrichment": lambda adata: sae.pl.enrichment(adata, n_features=8),
    "feature_card": lambda adata: sae.pl.feature_card(adata, 0),
    "feature_map": lambda adata: sae.pl.feature_map(adata),
    "feature_map_term": lambda adata: sae.pl.feature_map(adata, term="monocyte"),
    "feature_umap": lambda adata: sae.pl.feature_umap(adata, 0),
    "genes": lambda adata: sae.pl.genes(adata, 0),
    "genes_volcano": lambda adata: sae.pl.genes(adata, 0, kind="volcano"),
    "history": lambda adata: sae.pl.history(adata),
    "labels": lambda adata: sae.pl.labels(adata, "bulk_labels"),
    "lineage": lambda adata: sae.pl.lineage(adata, [0, 1, 2], "phase", order=["G1", "S", "G2M"]),
    "recovery": lambda adata: sae.pl.recovery(recovered(adata)),
    "recovery_compared": lambda adata: sae.pl.recovery(
        {"SAE": recovered(adata), "PCA": recovered(adata, use_rep="X_pca")}
    ),
    "stability": lambda adata: sae.pl.stability(adata),
    "steer_arrows": lambda adata: sae.pl.steer(adata, 0, kind="arrows", key_added="X_pca_ablated"),
    "steer_doses": lambda adata: sae.pl.steer(adata, 0, kind="doses", measure="distance"),
    "steer_genes": lambda adata: sae.pl.steer(adata, 0),
    "steer_labels": lambda adata: sae.pl.steer(adata, 0, kind="labels"),
    "sweep": lambda adata: sae.pl.sweep(adata, color="n_features"),
}


def test_every_figure_is_here():
    assert {name for name in sae.pl.__all__ if not any(figure.startswith(name) for figure in FIGURES)} == set()


@pytest.mark.parametrize("name", FIGURES)
def test_picture(name, archived, as_before):
    FIGURES[name](archived)
    as_before(name)
