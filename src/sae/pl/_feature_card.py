from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import get
from .._names import set_text, shorten
from ._feature_lines import draw_lines, lines_of, stored
from ._feature_umap import feature_umap
from ._genes import genes
from ._style import BLACK, BLUE, COLUMN, GREEN, GREY, LIGHT_GREY, ORANGE, open_frame
from ._titles import literal, short_labels, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    from .._data import Data

ROW = 2.2
"""Inches: height of a row of panels."""
SET_WIDTH = 46
"""Letters of a gene set in a bar."""
DOTS = 20_000
"""Square points that all dots of an embedding may cover together."""
STABILITY = {
    "stability": "decoder cosine",
    "stability_best": "… of the most similar",
    "stability_activation": "activation correlation",
    "stability_found": "found again, share",
}

Panel = Callable[["Axes"], None]


def feature_card(
    data: Data,
    feature: str | int,
    *,
    basis: str = "umap",
    groupby: str | None = None,
    collection: str | None = None,
    modality: str | None = None,
    n_genes: int = 5,
    n_sets: int = 8,
    n_labels: int = 8,
    max_padj: float = 0.05,
    key: str = "sae",
    mod: str | None = None,
    fig: FigureBase | None = None,
) -> dict[str, Axes]:
    """Draw what is known of one feature on one page.

    Panels for which nothing is stored are left out, and the others take their room; of a dead feature there are only the numbers:

    * `"umap"`: the cells, coloured by activation;
    * `"numbers"`: in how many cells it is active and how strongly, its name and what that rests on, the most similar features;
    * `"histogram"`: the activations above 0;
    * `"stability"`: how well other seeds bring it back, a dot per measure, beside the mean of all features (a bar) and of random cells
      (a cross);
    * `"genes"`: the genes raised and lowered most;
    * `"labels"`: the labels that it tells apart best, by AUROC;
    * `"enrichment"`: the most significant gene sets, and the direction of their genes.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    feature
        One, by name or number.
    basis
        Key of `obsm` to draw the cells on, with or without `X_`.
    groupby
        Draw labels of this column of `obs`; by default of the first one that was scored.
    collection
        Only gene sets of this collection.
    modality
        Only genes and gene sets of this modality, of a MuData.
    n_genes
        Genes per direction.
    n_sets
        Gene sets, without those whose genes are all among those of a better one.
    n_labels
        Labels.
    max_padj
        Only gene sets with an adjusted p-value up to this.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE and the embedding.
    fig
        Figure or SubFigure to draw on, of a Figure with `layout="constrained"`; by default a new one, two columns of a journal wide.

    Returns
    -------
    The Axes of each panel that is drawn, by its name.

    Raises
    ------
    KeyError
        There are no activations, no such feature, embedding, labels, collection or modality.
    ValueError
        Several features.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata)
    >>> panels = sae.pl.feature_card(adata, "sae_0")
    >>> list(panels)
    ['umap', 'numbers', 'histogram', 'genes']
    """
    import matplotlib.pyplot as plt

    where: dict[str, Any] = {"key": key, "mod": mod}
    cells = get.activations(data, feature, **where)
    if cells.n_vars > 1:
        raise ValueError(f"feature={feature!r} are {cells.n_vars} features; a card is of one.")
    name, activation = cells.var_names[0], cells.X.data
    table = get.features(data, **where)
    found: dict[str, Panel | None] = {
        "umap": _umap(data, name, len(cells), basis, where) if len(activation) else None,
        "numbers": partial(draw_lines, lines=lines_of(data, name, table.loc[name], len(cells), activation, where)),
        "histogram": partial(_histogram, activation=activation, n=len(cells)) if len(activation) else None,
        "stability": _stability(data, name, table, where),
        "genes": _genes(data, name, modality, n_genes, where),
        "labels": _labels(data, name, groupby, n_labels, where) if len(activation) else None,
        "enrichment": _sets(data, name, collection, modality, max_padj, n_sets, where),
    }
    if modality is not None and found["genes"] is found["enrichment"] is None:
        # Nothing may be known of the feature, or of anything of this name.
        get.genes(data, name, modality=modality, **where)
    drawn = {panel: draw for panel, draw in found.items() if draw is not None}
    n_rows = -(-len(drawn) // 2)
    if fig is None:
        fig = plt.figure(figsize=(2 * COLUMN, ROW * n_rows + 0.4), layout="constrained")
    grid = fig.add_gridspec(n_rows, 2)
    axes = {}
    for number, (panel, draw) in enumerate(drawn.items()):
        row, column = divmod(number, 2)
        alone = number == len(drawn) - 1 and column == 0
        # A SubFigure each: long labels of one panel take no room from those above and below.
        axes[panel] = fig.add_subfigure(grid[row, :] if alone else grid[row, column]).subplots()
        draw(axes[panel])
    fig.suptitle("  ".join(titles(data, [name], **where)[0].split("\n")), fontsize="large")
    return axes


def _umap(data: Data, name: str, n: int, basis: str, where: dict[str, Any]) -> Panel | None:
    if stored(get.embedding, data, basis, asked=basis != "umap", mod=where["mod"]) is None:
        return None

    def draw(ax: Axes) -> None:
        feature_umap(data, name, basis=basis, size=float(np.clip(DOTS / n, 0.5, 15)), ax=ax, **where)
        ax.set_title("activation", fontsize="medium")

    return draw


def _histogram(ax: Axes, activation: np.ndarray, n: int) -> None:
    ax.hist(activation, bins=min(40, max(8, len(activation) // 10)), color=BLUE)
    ax.set(xlabel="activation, where above 0", ylabel="cells", xlim=(0, None))
    ax.set_title(f"active in {len(activation):,} of {n:,} cells", fontsize="medium")
    open_frame(ax)


def _genes(data: Data, name: str, modality: str | None, n: int, where: dict[str, Any]) -> Panel | None:
    table = stored(get.genes, data, name, modality=modality, asked=False, **where)
    if table is None or table.empty:
        return None

    def draw(ax: Axes) -> None:
        genes(data, name, modality=modality, n_genes=n, ax=ax, **where)
        ax.set_title("genes, active against inactive cells", fontsize="medium")

    return draw


def _labels(data: Data, name: str, groupby: str | None, n: int, where: dict[str, Any]) -> Panel | None:
    table = stored(get.labels, data, name, groupby=groupby, asked=groupby is not None, **where)
    if table is None or table["auroc"].notna().sum() == 0:
        return None
    groupby = groupby or str(get.labels(data, **where)["groupby"].cat.categories[0])
    table = table[table["groupby"] == groupby].dropna(subset=["auroc"]).iloc[:n]

    def draw(ax: Axes) -> None:
        y = np.arange(len(table))
        ax.hlines(y, 0.5, table["auroc"], color=LIGHT_GREY, linewidth=1)
        ax.plot(table["auroc"], y, "o", color=BLUE, markersize=4.5)
        ax.axvline(0.5, color=GREY, linewidth=0.8)
        _rows(ax, short_labels(table["label"].astype(str).tolist()))
        ax.set(xlabel="AUROC", xlim=(min(0.48, table["auroc"].min() - 0.02), 1.02))
        ax.set_title(literal(groupby), fontsize="medium")

    return draw


def _sets(
    data: Data, name: str, collection: str | None, modality: str | None, max_padj: float, n: int, where: dict[str, Any]
) -> Panel | None:
    stored(get.enrichment, data, name, collection=collection, asked=collection is not None, **where)
    chosen: dict[str, Any] = {"collection": collection, "modality": modality, "max_padj": max_padj}
    table = stored(get.enrichment, data, name, redundant=False, n=n, asked=False, **chosen, **where)
    if table is None or table.empty:
        return None
    strength = -np.log10(np.maximum(table["padj"].to_numpy(), 1e-300))
    arrows = table["direction"].map({"up": "▲", "down": "▼"}).astype(object).fillna("◆")
    names = [literal(shorten(set_text(name), SET_WIDTH)) for name in table["gene_set"]]

    def draw(ax: Axes) -> None:
        y = np.arange(len(table))
        down = (table["direction"] == "down").to_numpy()
        ax.barh(y, strength, height=0.85, color=np.where(down, "#B3D4EA", "#F7CFB0"))
        for row, (arrow, text) in enumerate(zip(arrows, names, strict=True)):
            ax.text(0.01, row, f"{arrow} {text}", transform=ax.get_yaxis_transform(), va="center", fontsize="x-small")
        ax.set(ylim=(len(table) - 0.4, -0.6), yticks=[], xlabel="−log10 padj")
        ax.set_title("gene sets (▲ of raised genes, ▼ of lowered)", fontsize="medium")
        open_frame(ax)

    return draw


def _stability(data: Data, name: str, table: pd.DataFrame, where: dict[str, Any]) -> Panel | None:
    if "stability" not in table or table["stability"].isna()[name]:
        return None
    summary = get.stability(data, **where).set_index("source")

    def draw(ax: Axes) -> None:
        y = np.arange(len(STABILITY))
        own, mean, cells = (part[list(STABILITY)].to_numpy(dtype=float) for part in (
            table.loc[name], summary.loc["sae"], summary.loc["cells"],
        ))  # fmt: skip
        ax.hlines(y, 0, own, color=LIGHT_GREY, linewidth=1)
        ax.plot(mean, y, "|", color=BLACK, markersize=9, label="all features")
        ax.plot(cells, y, "x", color=GREEN, markersize=5, label="random cells")
        ax.plot(own, y, "o", color=ORANGE, markersize=5, label="this feature")
        _rows(ax, list(STABILITY.values()))
        ax.set(xlim=(min(0, own.min()) - 0.03, 1.03))
        ax.set_title("stability over seeds", fontsize="medium")
        ax.legend(
            frameon=False, fontsize="x-small", ncols=3, loc="upper right", bbox_to_anchor=(1.02, -0.16), handletextpad=0.1,
            columnspacing=0.8, borderaxespad=0,
        )  # fmt: skip

    return draw


def _rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize="small")
    ax.set_ylim(len(names) - 0.4, -0.6)
    open_frame(ax)
