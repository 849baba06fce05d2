from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import get
from .._names import shorten
from ._style import BLACK, COLUMN, DIVERGING, GREY, LIGHT_GREY, activation_colors, axes
from ._titles import LABEL_WIDTH, short_labels, titles

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.image import AxesImage
    from matplotlib.transforms import Transform

    from .._data import Data
    from .._schema import Features

NAMES = {"auroc": "AUROC", "held_out_auroc": "held-out AUROC", "f1": "F1", "held_out_f1": "held-out F1"}
CELL, LETTER = 0.14, 0.052
"""Inches: a row or column of the matrix, and a letter of its labels."""
GAP, MARK, TREE = 0.05, 0.1, 0.25
"""Inches: between the matrix and what is beside it, the column of scopes, and the height of a tree."""
SCOPES = {"local": "full", "regional": "left", "global": "none", "dead": "none"}
"""How much of a circle is filled; dead features have a cross instead."""


def labels(
    data: Data,
    groupby: str | None = None,
    *,
    metric: str = "auroc",
    features: Features = None,
    n_features: int = 20,
    dendrogram: bool = True,
    cmap: str | Colormap | None = None,
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a score of features and labels as a matrix, similar ones next to each other, with the scope of each feature.

    A full circle beside a feature says that it is local (significantly higher in exactly one label), half a circle that it is regional
    (in several), a ring that it is global (in none, although active), a cross that it is dead; :func:`sae.tl.score_labels` has the rule.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.score_labels`.
    groupby
        Labels of this column of `obs`; can be left out where only one was scored.
    metric
        `"auroc"`, `"held_out_auroc"`, `"f1"`, `"held_out_f1"` or `"difference"`. Differences are in units of the feature's activation, and
        are drawn as parts of its largest.
    features
        By name or number; by default those that score best in some label: the best of each, then the second best, and so on.
    n_features
        How many features to draw when `features` is not given.
    dendrogram
        Order features and labels by their similarity (average linkage of Euclidean distances) and draw the trees. With `False`,
        features stay in the order given, and labels in that of their categories.
    cmap
        Colour map of the scores.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    ax
        Axes to draw the matrix on; the trees are drawn outside, like its labels.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        There are no label scores, none of this column, or no such feature.
    ValueError
        No such metric; no `n_features`; several columns were scored, and `groupby` does not say which is meant.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> ax = sae.pl.labels(adata)
    """
    import matplotlib as mpl

    matrix = get.label_matrix(data, groupby, metric=metric, features=features, key=key, mod=mod)
    table = get.features(data, key=key, mod=mod)
    if n_features < 1:
        raise ValueError(f"n_features={n_features} is below 1. Pass how many features to draw, or features=.")
    if features is None:
        matrix = matrix.loc[_telling(matrix, table["dead"]).index[:n_features]]
    if metric == "difference":
        largest = matrix.abs().max(axis=1)
        matrix = matrix.div(largest.where(largest > 0, 1), axis=0)
    low, center = {"difference": (-1.0, 0.0), "f1": (0.0, 0.0)}.get(metric.removeprefix("held_out_"), (0.0, 0.5))
    trees = [_tree(values.fillna(center)) for values in (matrix, matrix.T)] if dendrogram else []
    if trees:
        matrix = matrix.iloc[trees[0].leaves, trees[1].leaves]
    rows = [_row_title(title) for title in titles(data, matrix.index.tolist(), key=key, mod=mod)]
    columns = short_labels(matrix.columns.tolist())
    scopes = table[f"{matrix.columns.name}_scope"].astype(str)[matrix.index]

    if ax is None:
        left, below = (LETTER * max(map(len, names)) for names in (rows, columns))
        height, width = (CELL * n for n in matrix.shape)
        ax = axes(None, height + max(below, 0.16 * scopes.nunique()) + 0.6, max(COLUMN, left + width + 0.7))
    colors = mpl.colormaps.get_cmap(cmap or (DIVERGING if center > low else activation_colors()))
    image = ax.imshow(
        matrix, colors.with_extremes(bad=LIGHT_GREY), aspect="auto", interpolation="none", vmin=low, vmax=1
    )
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize="x-small")
    ax.set_yticks(range(len(rows)), rows, fontsize="x-small")
    ax.tick_params(length=0)
    _add_colorbar(ax, image, center, NAMES.get(metric, "difference, of\nthe largest"))
    _mark_scopes(ax, scopes)
    if trees:
        _draw_trees(ax, *trees)
    return ax


def _telling(matrix: pd.DataFrame, dead: pd.Series) -> pd.DataFrame:
    """Sort features: the best of each label, then the second best of each, and so on; dead ones last."""
    place = matrix.rank(ascending=False, method="first").min(axis=1)
    order = np.lexsort((-matrix.max(axis=1), place, dead[matrix.index]))
    return matrix.iloc[order]


def _row_title(title: str) -> str:
    feature, *name = title.split("\n")
    # Not "B cell ·…" or "CD79A,…".
    short = [re.sub(r"[ ·,]+…$", "…", shorten(text, LABEL_WIDTH)) for text in name]
    return "  ".join([*short, feature])


@dataclass(frozen=True)
class _Tree:
    leaves: list[int]
    forks: np.ndarray
    """(forks, 4, 2): place among the leaves, and height, of the four ends of its lines."""


def _tree(values: pd.DataFrame) -> _Tree:
    from scipy.cluster.hierarchy import dendrogram, linkage

    if len(values) < 2:
        return _Tree([0], np.empty((0, 4, 2)))
    # The best order of leaves takes a minute for 2,000.
    links = linkage(values, "average", optimal_ordering=len(values) <= 500)
    found = dendrogram(links, no_plot=True)
    # SciPy puts leaves at 5, 15, 25, ...
    return _Tree(found["leaves"], np.stack([np.array(found["icoord"]) / 10 - 0.5, found["dcoord"]], axis=2))


def _inches_from(ax: Axes, x: float, y: float) -> Transform:
    """Measure inches from a corner of the Axes."""
    from matplotlib.transforms import ScaledTranslation

    return ax.figure.dpi_scale_trans + ScaledTranslation(x, y, ax.transAxes)  # type: ignore[arg-type]


def _beside(ax: Axes, side: str, place: float, size: float) -> Axes:
    """Add Axes along the top or right side, so many inches away and thick.

    They belong to the given Axes, like its labels, which a layout makes room for; Axes of `axes_grid1` are not.
    """
    from matplotlib.transforms import blended_transform_factory

    inches = _inches_from(ax, 1, 1)
    if side == "top":
        added = ax.inset_axes((0, place, 1, size), transform=blended_transform_factory(ax.transAxes, inches))
        added.set_xlim(ax.get_xlim())
    else:
        added = ax.inset_axes((place, 0, size, 1), transform=blended_transform_factory(inches, ax.transAxes))
        added.set_ylim(ax.get_ylim())
    added.set_axis_off()
    return added


def _draw_trees(ax: Axes, features: _Tree, labels: _Tree) -> None:
    from matplotlib.collections import LineCollection

    for side, place, tree in (("top", GAP, labels), ("right", 2 * GAP + MARK, features)):
        added = _beside(ax, side, place, TREE)
        lines = tree.forks if side == "top" else tree.forks[..., ::-1]
        added.add_collection(LineCollection(list(lines), colors=GREY, linewidths=0.8), autolim=False)
        limits = (0, 1.05 * max(tree.forks[..., 1].max(initial=0), 1e-9))
        added.set(**{"ylim" if side == "top" else "xlim": limits})


def _mark_scopes(ax: Axes, scopes: pd.Series) -> None:
    """Mark the scope of each row beside it, and explain the marks below the names of the rows."""
    added = _beside(ax, "right", GAP, MARK)
    added.set_xlim(-1, 1)
    handles = []
    for scope, fill in SCOPES.items():
        y = np.flatnonzero(scopes == scope)
        style: dict[str, Any] = {
            "marker": "x" if scope == "dead" else "o",
            "fillstyle": fill,
            "markerfacecoloralt": "white",
        }
        marks = added.plot(np.zeros(len(y)), y, color=BLACK, linestyle="", markersize=4.5, markeredgewidth=0.8, **style)
        if len(y):
            marks[0].set_label(scope)
            handles += marks
    ax.legend(
        handles=handles, frameon=False, fontsize="x-small", loc="upper right", bbox_to_anchor=(0, 0), borderaxespad=0.2,
        handletextpad=0.1, labelspacing=0.2,
    )  # fmt: skip


def _add_colorbar(ax: Axes, image: AxesImage, center: float, label: str) -> None:
    """Add a colour bar above the names of the rows."""
    bar = ax.inset_axes((-0.85, GAP, 0.7, 0.07), transform=_inches_from(ax, 0, 1))
    ax.figure.colorbar(image, cax=bar, orientation="horizontal", ticks=sorted({image.norm.vmin, center, 1}))
    bar.xaxis.set_ticks_position("top")
    bar.tick_params(labelsize="x-small", length=2, pad=1)
    bar.set_ylabel(label, rotation=0, ha="right", va="center", fontsize="x-small")
