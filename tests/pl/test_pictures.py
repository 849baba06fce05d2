"""Every figure looks as it did when somebody last looked at it, keeps to its Axes, and writes names as they are."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.text import Text

import sae


def recovered(adata, **settings):
    return sae.tl.recovery(adata, ["bulk_labels", "phase"], thresholds=(0.5, 0.9), **settings)


FIGURES = {
    "density": lambda adata, **on: sae.pl.density(adata, groupby="bulk_labels", **on),
    "enrichment": lambda adata, **on: sae.pl.enrichment(adata, n_features=8, **on),
    "feature_card": lambda adata, **on: sae.pl.feature_card(adata, 0, **on),
    "feature_map": lambda adata, **on: sae.pl.feature_map(adata, **on),
    "feature_map_term": lambda adata, **on: sae.pl.feature_map(adata, term="monocyte", **on),
    "feature_umap": lambda adata, **on: sae.pl.feature_umap(adata, 0, **on),
    "genes": lambda adata, **on: sae.pl.genes(adata, 0, **on),
    "genes_volcano": lambda adata, **on: sae.pl.genes(adata, 0, kind="volcano", **on),
    "history": lambda adata, **on: sae.pl.history(adata, **on),
    "labels": lambda adata, **on: sae.pl.labels(adata, "bulk_labels", **on),
    "lineage": lambda adata, **on: sae.pl.lineage(adata, [0, 1, 2], "phase", order=["G1", "S", "G2M"], **on),
    "recovery": lambda adata, **on: sae.pl.recovery(recovered(adata), **on),
    "recovery_compared": lambda adata, **on: sae.pl.recovery(
        {"SAE": recovered(adata), "PCA": recovered(adata, use_rep="X_pca")}, **on
    ),
    "stability": lambda adata, **on: sae.pl.stability(adata, **on),
    "steer_arrows": lambda adata, **on: sae.pl.steer(adata, 0, kind="arrows", key_added="X_pca_ablated", **on),
    "steer_doses": lambda adata, **on: sae.pl.steer(adata, 0, kind="doses", measure="distance", **on),
    "steer_genes": lambda adata, **on: sae.pl.steer(adata, 0, **on),
    "steer_labels": lambda adata, **on: sae.pl.steer(adata, 0, kind="labels", **on),
    "sweep": lambda adata, **on: sae.pl.sweep(adata, color="n_features", **on),
}


def test_every_figure_is_here():
    assert {name for name in sae.pl.__all__ if not any(figure.startswith(name) for figure in FIGURES)} == set()


@pytest.mark.parametrize("name", FIGURES)
def test_picture(name, archived, as_before):
    FIGURES[name](archived)
    as_before(name)


@pytest.mark.parametrize("layout", [None, "constrained"])
@pytest.mark.parametrize("name", sorted({*FIGURES, "feature_map_numbers", "sweep_numbers"} - {"feature_card"}))
def test_given_axes_are_all_that_is_drawn_on(name, layout, archived):
    """A colour bar takes its room from the given Axes; those beside it, the current ones and the layout stay."""
    draw = {
        **FIGURES,
        "history": lambda adata, **on: sae.pl.history(adata, "fvu", **on),
        "feature_map_numbers": lambda adata, **on: sae.pl.feature_map(adata, color="mean", **on),
        "sweep_numbers": lambda adata, **on: sae.pl.sweep(adata, color="seconds", **on),
    }[name]
    figure, (other, given, current) = plt.subplots(1, 3, figsize=(9, 3), layout=layout)
    places = [ax.get_position().bounds for ax in (other, current)]
    size, engine = figure.get_size_inches().copy(), figure.get_layout_engine()
    children = [len(ax.get_children()) for ax in (other, current)]
    assert draw(archived, ax=given) is given and given.has_data()
    assert plt.gca() is current and plt.get_fignums() == [figure.number]
    assert [len(ax.get_children()) for ax in (other, current)] == children
    np.testing.assert_array_equal(figure.get_size_inches(), size)
    assert figure.get_layout_engine() is engine
    if layout is None:
        assert [ax.get_position().bounds for ax in (other, current)] == places


NAMES = {
    "label",
    "towards",
    "gene",
    "gene_set",
    "name",
    "name_label",
    "name_gene_set",
    "bulk_labels_label",
    "labels",
    "gene_sets",
}
DOLLARS = "$a_{1}$"


def with_dollars(stored):
    """Append what matplotlib could read as mathematics to all names in tables."""
    if isinstance(stored, dict):
        return {name: with_dollars(value) for name, value in stored.items()}
    if not isinstance(stored, pd.DataFrame):
        return stored
    renamed = {
        name: stored[name].cat.rename_categories(lambda text: f"{text[:9]}{DOLLARS}{text[9:]}")
        for name in NAMES & set(stored)
        if isinstance(stored[name].dtype, pd.CategoricalDtype)
    }
    return stored.assign(**renamed)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(FIGURES) - {"density", "feature_map_term", "history", "recovery", "recovery_compared", "stability", "sweep"}
    ),
)
def test_dollars_in_names_are_no_mathematics(name, archived):
    archived.uns["sae"] = with_dollars(archived.uns["sae"])
    for column in ("bulk_labels", "phase"):
        archived.obs[column] = archived.obs[column].cat.rename_categories(lambda text: text + DOLLARS)
    settings = {"order": [f"{phase}{DOLLARS}" for phase in ("G1", "S", "G2M")]} if name == "lineage" else {}
    if settings:
        sae.pl.lineage(archived, [0, 1, 2], "phase", **settings)
    else:
        FIGURES[name](archived)
    plt.gcf().canvas.draw()
    written = [text.get_text() for text in plt.gcf().findobj(Text)]
    named = [text for text in written if "$" in text]
    assert named
    assert not any(map(is_math_text, named))


def test_dollars_in_groups_tables_and_terms_are_no_mathematics(archived):
    """Names that are given, or those of columns."""
    archived.obs[f"of{DOLLARS}"] = archived.obs["phase"].to_numpy()
    sae.tl.score_labels(archived, f"of{DOLLARS}", progress=False)
    found = sae.tl.recovery(archived, [f"of{DOLLARS}"])
    for draw in (
        lambda: sae.pl.feature_map(archived, term=f"of{DOLLARS}"),
        lambda: sae.pl.feature_map(archived, groupby=f"of{DOLLARS}"),
        lambda: sae.pl.lineage(archived, 0, f"of{DOLLARS}", order=["G1", "S"]),
        lambda: sae.pl.recovery(found),
        lambda: sae.pl.recovery({DOLLARS: found, "other": found}),
        lambda: sae.pl.feature_card(archived, 0, groupby=f"of{DOLLARS}"),
    ):
        draw()
        plt.gcf().canvas.draw()
        named = [text.get_text() for text in plt.gcf().findobj(Text) if "$" in text.get_text()]
        assert named and not any(map(is_math_text, named))
