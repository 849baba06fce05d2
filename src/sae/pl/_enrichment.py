from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .. import get
from ._titles import set_titles, titles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from .._data import Data
    from .._schema import Features

LARGEST_DOT = 160.0
MOST_SIGNIFICANT = 20.0
"""-log10 of the adjusted p-value from which dots no longer grow."""


def enrichment(
    data: Data,
    features: Features = None,
    *,
    collection: str | None = None,
    direction: str = "up",
    modality: str | None = None,
    n_features: int = 20,
    n_sets: int = 2,
    max_padj: float = 0.05,
    max_fdr: float = 0.05,
    redundant: bool = False,
    cmap: str | Colormap = "viridis",
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a dot plot of features against their gene sets.

    A dot's area grows with −log10 of the adjusted p-value (up to 20), its colour is the score. Features are written with the names
    that :func:`sae.tl.name_features` gave them, or would.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.enrich`.
    features
        By name or number; by default the `n_features` with the most significant gene sets.
    collection
        Only gene sets of this collection.
    direction
        `"up"` or `"down"`: sets of genes that are higher, or lower, where the feature is active; `"both"`: those that were found by
        both together.
    modality
        Only gene sets found in this modality, of a MuData; by default in all, and a set that was found in several is drawn as where it is
        most significant.
    n_features
        How many features to draw when `features` is not given.
    n_sets
        Every feature contributes so many of its best gene sets as rows.
    max_padj
        Only gene sets with an adjusted p-value up to this.
    max_fdr
        And with a false discovery rate up to this, where there is one.
    redundant
        Also make rows of sets whose genes are all among those of a better one, see :func:`sae.get.enrichment`.
    cmap
        Colour map of the scores.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    ax
        Axes to draw on.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        There is no enrichment, or no such feature, collection or modality.
    ValueError
        No gene set of these features passes `max_padj` and `max_fdr`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers())
    >>> ax = sae.pl.enrichment(adata)
    """
    import matplotlib.pyplot as plt

    found = partial(
        get.enrichment,
        data,
        collection=collection,
        direction=direction,
        modality=modality,
        max_padj=max_padj,
        key=key,
        mod=mod,
    )
    table = found(features)
    if table["fdr"].notna().any():
        found = partial(found, max_fdr=max_fdr)
        table = found(features)
    if table.empty:
        raise ValueError(
            f"None of these features has a gene set with padj ≤ {max_padj} and fdr ≤ {max_fdr}. Raise max_padj= or max_fdr=."
        )
    if features is None:
        table = table[table["feature"].isin(table["feature"].drop_duplicates().iloc[:n_features])]
    columns, rows = _order(found(table["feature"].unique().tolist(), redundant=redundant), n_sets)
    # From all sets: one that is redundant for a feature can be the best of another, and both have it.
    table = table[table["gene_set"].isin(rows)].drop_duplicates(["feature", "gene_set"])
    x = [columns.index(name) for name in table["feature"]]
    y = [rows.index(name) for name in table["gene_set"]]
    feature_names = ["  ".join(reversed(title.split("\n"))) for title in titles(data, columns, key=key, mod=mod)]
    set_names = set_titles(rows)
    if ax is None:
        width = 1.9 + 0.3 * len(columns) + 0.07 * max(map(len, set_names))
        size = (width, 0.6 + 0.27 * len(rows) + 0.07 * max(map(len, feature_names)))
        _, ax = plt.subplots(figsize=size, layout="constrained")
    strength = np.minimum(-np.log10(np.maximum(table["padj"], 1e-300)), MOST_SIGNIFICANT)
    dots = ax.scatter(x, y, s=LARGEST_DOT * strength / MOST_SIGNIFICANT, c=table["score"], cmap=cmap)
    ax.set_xticks(range(len(columns)), feature_names, rotation=90)
    ax.set_yticks(range(len(rows)), set_names)
    ax.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(rows) - 0.4, -0.6))
    ax.grid(color="#eeeeee")
    ax.set_axisbelow(True)
    ax.figure.colorbar(dots, cax=ax.inset_axes((1.04, 0, 0.02, 0.4)), label="score")
    shown = [value for value in (2, 5, 10, 20) if value <= max(strength.max(), 2)]
    handles = [ax.scatter([], [], s=LARGEST_DOT * value / MOST_SIGNIFICANT, color="#666666") for value in shown]
    labels = [f"{value}" if value < MOST_SIGNIFICANT else f"≥ {value}" for value in shown]
    ax.legend(
        handles, labels, title="−log10 padj", frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), labelspacing=1
    )
    return ax


def _order(table: pd.DataFrame, n_sets: int) -> tuple[list[str], list[str]]:
    """Order features by their best gene set, and gene sets by the features, so that dots lie near the diagonal."""
    best = table.groupby("feature", observed=True).head(n_sets)
    top_set = table.drop_duplicates("feature").set_index("feature")["gene_set"].astype(str)
    columns = top_set.sort_values(kind="stable").index.astype(str).tolist()
    by_feature = {name: part["gene_set"].astype(str).tolist() for name, part in best.groupby("feature", observed=True)}
    rows = list(dict.fromkeys(name for feature in columns for name in by_feature[feature]))
    return columns, rows
