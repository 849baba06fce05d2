from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .. import get
from .._names import ENSEMBL, shorten
from ._style import BLUE, GREY, LIGHT_GREY, ORANGE, open_frame, panels, refuse_several
from ._titles import literal, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._data import Data
    from .._schema import Features

WIDTH = 22
"""Of the name of a gene, in characters."""
LINE = 1.25
"""Height of a line of text, of the size of its font."""
LETTER = 0.68
"""Width of a capital letter, likewise."""
SIZE = 18


def genes(
    data: Data,
    features: Features,
    *,
    kind: str = "rank",
    n_genes: int = 10,
    direction: str | None = None,
    modality: str | None = None,
    max_padj: float = 0.05,
    key: str = "sae",
    mod: str | None = None,
    ncols: int = 4,
    ax: Axes | None = None,
) -> Axes | list[Axes]:
    """Draw the genes of features, a panel each: the best ones with their scores, or all that are stored as a volcano.

    Triangles up are genes that are higher where the feature is active, triangles down those that are lower. The table that
    :func:`sae.tl.rank_genes` stores has the best genes of each direction and no others (`n_genes=None` there stores all), so a volcano
    says how many it shows: its empty middle is no finding.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.rank_genes`.
    features
        One or several, by name or number.
    kind
        `"rank"`: the score of the best genes, highest first. `"volcano"`: fold change and adjusted p-value of all stored genes. A
        p-value too small for a float is 0; such genes are drawn, hollow, above the others.
    n_genes
        How many genes to name, of each direction; in a volcano, of those with an adjusted p-value up to `max_padj`.
    direction
        `"up"` or `"down"`: only genes that are higher, or lower, where the feature is active; by default both.
    modality
        Only variables of this modality, of a MuData.
    max_padj
        Genes with a higher adjusted p-value are drawn hollow (rank) or grey (volcano).
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    ncols
        Panels per row.
    ax
        Axes to draw a single feature on. Names are put in the room that there is, so draw on Axes of the final size.

    Returns
    -------
    The Axes; a list of them for several features. The panel of a feature without genes (dead, or active in too few cells to be
    tested) says so.

    Raises
    ------
    KeyError
        There are no genes, or no such feature or modality.
    ValueError
        No such kind; no `n_genes`; `ax` with several features; a volcano of genes without fold changes, those of scaled expression.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata)
    >>> ax = sae.pl.genes(adata, "sae_0")
    >>> ax = sae.pl.genes(adata, "sae_0", kind="volcano")
    """
    if kind not in ("rank", "volcano"):
        raise ValueError(f"kind={kind!r} is neither 'rank' nor 'volcano'.")
    if n_genes < (kind == "rank"):
        raise ValueError(f"n_genes={n_genes} is too few. Pass how many genes to name, such as 10.")
    table = get.genes(data, features, direction=direction, modality=modality, key=key, mod=mod)
    names = _names(get.features(data, key=key, mod=mod).index, features)
    refuse_several(ax, len(names), "features")
    if kind == "volcano":
        if len(table) and table["log2fc"].isna().all():
            raise ValueError("These genes have no fold changes: the expression was scaled. Pass kind='rank'.")
        table = table.dropna(subset=["log2fc", "padj"])
    parts = [_drawn(table[table["feature"] == name], n_genes) for name in names]
    rows = max(part["named"].sum() for part in parts)
    height = 1.0 + 0.14 * rows if kind == "rank" else 3.2
    axes = panels(len(names), height, ncols=ncols) if ax is None else [ax]
    for panel, part, title in zip(axes, parts, titles(data, names, key=key, mod=mod), strict=True):
        panel.set_title(title, fontsize="small")
        if part.empty:
            _say_none(panel)
        elif kind == "rank":
            _rank(panel, part[part["named"]], max_padj)
        else:
            _volcano(panel, part, max_padj)
    # Names are put in the room that the layout leaves.
    axes[0].figure.canvas.figure.draw_without_rendering()
    for panel, part in zip(axes, parts, strict=True):
        if kind == "rank":
            panel.tick_params(axis="y", labelsize=_font_size(panel, abs(np.subtract(*panel.get_ylim()))))
        else:
            _name_points(panel, part[part["named"] & (part["padj"] <= max_padj)])
    return axes if len(axes) > 1 else axes[0]


def _names(index: pd.Index, features: Features) -> list[str]:
    """Name features that are known to be there."""
    if features is None:
        return index.tolist()
    asked = [features] if isinstance(features, str | int | np.integer) else features
    return list(dict.fromkeys(name if isinstance(name, str) else index[name] for name in asked))


def _drawn(table: pd.DataFrame, n_genes: int) -> pd.DataFrame:
    """Sort the genes of a feature from up to down, mark the best ones of each direction, and shorten their names."""
    table = table.sort_values("score", ascending=False, kind="stable")
    # Without any variance, t is infinite.
    most = 1.1 * table["score"].abs().replace(np.inf, np.nan).max()
    table["score"] = table["score"].clip(-most, most)
    up = table["score"] > 0
    named = table["score"].abs().groupby(up).rank(ascending=False, method="first") <= n_genes
    text = table["gene"].astype(str).map(lambda gene: shorten(ENSEMBL.sub("", gene), WIDTH))
    if "modality" in table and table["modality"].nunique() > 1:
        text += " (" + table["modality"].astype(str) + ")"
    return table.assign(up=up, named=named, text=text.map(literal), strength=_strength(table["padj"]))


def _say_none(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no genes are stored", ha="center", va="center", color=GREY, transform=ax.transAxes)
    ax.set(xticks=[], yticks=[])


def _rank(ax: Axes, table: pd.DataFrame, max_padj: float) -> None:
    y = pd.Series(np.arange(len(table), dtype=np.float64), index=table.index)
    if table["up"].any():
        y[~table["up"]] += 0.5
    ax.hlines(y, 0, table["score"], color=LIGHT_GREY, linewidth=1, zorder=1)
    _triangles(ax, table["score"], y, table["up"], hollow=~(table["padj"] <= max_padj))
    ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    ax.set_yticks(y, table["text"])
    ax.set(ylim=(y.max() + 0.7, -0.7), xlabel="score (t or z)")
    if not (table["padj"] <= max_padj).all():
        ax.set_xlabel(f"score (t or z)\nhollow: padj > {max_padj:g}")
    open_frame(ax)


def _volcano(ax: Axes, table: pd.DataFrame, max_padj: float) -> None:
    y, zero = table["strength"], table["padj"] == 0
    certain = table["padj"] <= max_padj
    ax.scatter(table["log2fc"][~certain], y[~certain], s=SIZE / 3, color=GREY)
    _triangles(ax, table["log2fc"][certain], y[certain], table["up"][certain], hollow=zero[certain])
    ax.axhline(-np.log10(max_padj), color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    counts = {"up": table["up"].sum(), "down": (~table["up"]).sum()}
    notes = ["shown: best " + ", ".join(f"{n} {side}" for side, n in counts.items() if n)]
    if zero.any():
        notes.append("hollow: padj rounds to 0")
    ax.set_xlabel("\n".join(["log2 fold change", *notes]), fontsize="small")
    ax.set_ylabel("−log10 padj", fontsize="small")
    ax.set_ylim(0, 1.08 * max(y.max(), -np.log10(max_padj)))
    open_frame(ax)


def _triangles(ax: Axes, x: pd.Series, y: pd.Series, up: pd.Series, hollow: pd.Series) -> None:
    """Draw triangles that point up or down, filled or not."""
    for rows, color, marker in ((up, ORANGE, "^"), (~up, BLUE, "v")):
        for some, face in ((rows & ~hollow, color), (rows & hollow, "white")):
            ax.scatter(x[some], y[some], s=SIZE, marker=marker, edgecolors=color, facecolors=face, zorder=2)


def _strength(padj: pd.Series) -> pd.Series:
    """Return −log10, of what is too small for a float a little more than of all others."""
    strength = -np.log10(padj.where(padj > 0))
    highest = strength.max() if (padj > 0).any() else -np.log10(np.finfo(np.float64).tiny)
    return strength.mask(padj == 0, 1.1 * highest + 1)


def _name_points(ax: Axes, table: pd.DataFrame) -> None:
    """Write the names in a column on the side of their direction, each at the height of its point or next to it."""
    width, height = np.asarray(ax.get_window_extent().size) * 72 / ax.figure.dpi
    letter = LETTER * _font_size(ax) / width
    line = LINE * _font_size(ax) / height
    fitting = int(1 / line)
    sides = [table[~table["up"]].tail(fitting), table[table["up"]].head(fitting)]
    room = [letter * (rows["text"].str.len().max() + 2) if len(rows) else 0 for rows in sides]
    low, high = ax.get_xlim()
    span = (high - low) / max(1 - sum(room), 1 / 3)
    ax.set_xlim(low - room[0] * span, high + room[1] * span)
    top = ax.get_ylim()[1]
    for rows, x, side, inner in zip(sides, (0.005, 0.995), ("left", "right"), (1, 0), strict=True):
        leader = {"arrowstyle": "-", "color": LIGHT_GREY, "linewidth": 0.6, "relpos": (inner, 0.5), "shrinkB": 2}
        places = _apart(rows["strength"].to_numpy() / top, line)
        for point, text, y in zip(
            rows[["log2fc", "strength"]].itertuples(index=False), rows["text"], places, strict=True
        ):
            ax.annotate(
                text, point, (x, y), textcoords="axes fraction", ha=side, va="center", fontsize="x-small",
                arrowprops={**leader, "shrinkA": 1}, zorder=1,
            )  # fmt: skip


def _apart(y: np.ndarray, gap: float) -> np.ndarray:
    """Move values (n,) between 0 and 1 as little as needed for all to be `gap` apart, in the same order."""
    from scipy.optimize import isotonic_regression

    if not len(y):
        return y
    order = np.argsort(-y, kind="stable")
    steps = gap * np.arange(len(y))
    moved = isotonic_regression(y[order] + steps, increasing=False).x.clip(gap / 2 + steps[-1], 1 - gap / 2)
    places = np.empty(len(y))
    places[order] = moved - steps
    return places


def _font_size(ax: Axes, n_lines: float = 1) -> float:
    """Return a size in points, small enough for so many lines of text one below the other."""
    from matplotlib.font_manager import FontProperties

    height = ax.get_window_extent().height * 72 / ax.figure.dpi
    return min(FontProperties(size="x-small").get_size_in_points(), height / n_lines / LINE)
