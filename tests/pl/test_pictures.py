"""Every figure looks as it did when somebody last looked at it."""

from __future__ import annotations

import pytest

import sae

FIGURES = {
    "enrichment": lambda adata: sae.pl.enrichment(adata, n_features=8),
    "feature_umap": lambda adata: sae.pl.feature_umap(adata, 0),
    "history": lambda adata: sae.pl.history(adata),
    "sweep": lambda adata: sae.pl.sweep(adata, color="n_features"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_picture(name, archived, as_before):
    FIGURES[name](archived)
    as_before(name)
