from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import get
from .._names import label_text, set_text, shorten
from ._feature_dots import WIDE, Dots
from ._style import COLORS, DIVERGING, GREY, LIGHT_GREY, MARKERS, ORANGE, open_frame
from ._titles import literal, short_labels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

    from .._data import Data

HUES = COLORS[:6]
"""Black is for the numbers."""
N_MODULES, N_NAMED, N_VALUES = 18, 10, 14
"""How many modules have a colour, how many are in the legend, and how many values of another column have a colour."""
LINE, HALF_LINE = 46, 22
"""Characters of a legend's line, in one and in two columns."""


def feature_map(
    data: Data,
    *,
    color: str | None = None,
    term: str | None = None,
    parents: pd.DataFrame | None = None,
    level: int = 1,
    groupby: str | None = None,
    collection: str | None = None,
    size: str | None = "density",
    cmap: str | Colormap = "viridis",
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the map of the features, a dot each.

    Modules are numbered where they are. The legend names the ten largest ones by what :func:`sae.get.modules` finds for them first.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.feature_map`.
    color
        `"module"`, the default; `"label"`, the best label of `groupby`; or any column of :func:`sae.get.features`.
    term
        Instead, mark the features that have a significant gene set with these words in its name, as
        :func:`sae.get.term_features` finds them, such as `"ion homeostasis"`. Their number is told.
    parents
        Instead, colour by the part of an ontology that the feature's gene sets belong to most often. A table as from
        :func:`sae.io.read_go_terms`, for :func:`sae.get.parent_terms`.
    level
        Of `parents`: steps below the top of the ontology.
    groupby
        Column of `obs` whose labels to colour by; can be left out where only one was scored.
    collection
        Only gene sets of this collection, for `term`, `parents` and the names of modules.
    size
        Column of numbers that the area of the dots grows with: `"density"`, `"mean"` or another one. By its logarithm where it differs
        more than tenfold. None for equal dots.
    cmap
        Colour map of numbers above 0; if there are also some below, red is up and blue is down.
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
        There is no map, no such column, or nothing stored of what is asked for.
    ValueError
        Two of `color`, `term` and `parents` are given; no feature is on the map.

    Notes
    -----
    Where two dots are close, the features are alike; other distances mean little, see :func:`sae.tl.feature_map`. With more than
    18 modules, or 14 values of another column, the rest is grey.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.feature_map(adata)
    >>> ax = sae.pl.feature_map(adata, color="mean")
    """
    asked = {"color": color, "term": term, "parents": parents}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{'= and '.join(given)}= were given. A dot has one colour: pass one of them.")
    where: dict[str, Any] = {"key": key, "mod": mod}
    get.neighbors(data, n=0, **where)
    table = get.features(data, **where)
    table = table[table["map_x"].notna()]
    if table.empty:
        raise ValueError("No feature is on the map: none could be compared with others. Are all of them dead?")
    dots = Dots(ax, table, size)
    if term is not None:
        found = get.term_features(data, term, collection=collection, **where)
        _mark(dots, pd.Index(found["feature"].astype(str)), term)
    elif parents is not None:
        settings = {"level": level, "collection": collection, **where}
        names = get.parent_terms(data, parents, **settings)["name"].loc[table.index]
        _categories(
            dots, names.astype(object).map(set_text, na_action="ignore"), f"most frequent term of level {level}"
        )
    elif color == "module" or (color is None and groupby is None):
        _modules(dots, get.modules(data, n=1, collection=collection, **where))
    elif color in (None, "label"):
        scored = str(get.label_matrix(data, groupby, **where).columns.name)
        labels = [None if pd.isna(label) else label_text(str(label), scored) for label in table[f"{scored}_label"]]
        _categories(dots, pd.Series(labels, table.index, dtype=object), f"best {literal(scored)}")
    else:
        _column(dots, color, cmap)
    dots.ax.set(xticks=[], yticks=[], xlabel="UMAP1 of features", ylabel="UMAP2 of features")
    open_frame(dots.ax)
    return dots.ax


def _modules(dots: Dots, modules: pd.DataFrame) -> None:
    """Colour by module, number them, and name the largest."""
    module = dots.table["module"].astype(str)
    shown = modules["module"].astype(str).tolist()[:N_MODULES]
    if len(modules) > len(shown):
        dots.draw(~module.isin(shown), color=LIGHT_GREY)
    for i, name in enumerate(shown):
        dots.draw(module == name, color=_shade(i))
    dots.number(shown)
    named = [dots.handle(color=_shade(i)) for i in range(min(len(shown), N_NAMED))]
    lines = [_line(row) for row in modules.iloc[: len(named)].to_dict("records")]
    if len(modules) > len(named):
        named.append(dots.handle(alpha=0))
        lines.append(f"and {len(modules) - len(named) + 1} smaller ones")
    dots.legend(named, lines, 1)


def _line(module: Mapping[Any, Any]) -> str:
    """Write the number of a module, its size, and what its features have more often than the others."""
    label, gene_set = (str(module.get(name, "")).split("; ")[0].replace("_", " ") for name in ("labels", "gene_sets"))
    known = [text for text in (label, set_text(gene_set) if gene_set else "") if text] or [module.get("genes", "")]
    text = shorten(" · ".join(part for part in known if part), LINE)
    return literal(f"{module['module']}  ({module['n_features']})  {text}".rstrip())


def _mark(dots: Dots, found: pd.Index, term: str) -> None:
    """Mark some features, number the modules, and tell how many there are."""
    marked = pd.Series(dots.table.index.isin(found), dots.table.index)
    dots.draw(~marked, color=LIGHT_GREY)
    dots.draw(marked, color=ORANGE, edgecolor="black", linewidth=0.5)
    dots.number(dots.table["module"].value_counts().index[:N_MODULES].astype(str).tolist())
    handles = [dots.handle(color=ORANGE, edgecolor="black"), dots.handle(color=LIGHT_GREY)]
    words = f"gene sets with “{literal(shorten(term, LINE // 2))}”: {marked.sum()} of {len(marked)} features"
    missing = len(found) - marked.sum()
    dots.legend(handles, [words + (f", {missing} not on the map" if missing else ""), "other features"], 1)


def _column(dots: Dots, color: str, cmap: str | Colormap) -> None:
    """Colour by a column of the feature table."""
    import matplotlib as mpl

    if color not in dots.table:
        raise KeyError(
            f"The features have no {color!r}; they have {', '.join(map(repr, dots.table.columns))}, and 'module' and 'label'."
        )
    values, title = dots.table[color], literal(color.replace("_", " "))
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return _categories(dots, values.astype(object).map(str, na_action="ignore"), title)
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    scale: dict[str, Any] = {"cmap": mpl.colormaps[cmap] if isinstance(cmap, str) else cmap}
    if low < 0 < high:
        limit = max(-low, high)
        scale = {"cmap": mpl.colormaps[DIVERGING], "vmin": -limit, "vmax": limit, "edgecolor": GREY, "linewidth": 0.3}
    elif 0 < WIDE * low < high:
        scale["norm"] = "log"
    scale["cmap"] = scale["cmap"].with_extremes(bad=LIGHT_GREY)
    if values.isna().any():
        dots.legend([dots.handle(color=LIGHT_GREY)], ["none"], 1)
    points = dots.draw(c=values, plotnonfinite=True, **scale)
    bar = dots.ax.figure.colorbar(points, ax=dots.ax, label=title, shrink=0.7, fraction=0.05, pad=0.02)
    if scale.get("norm") == "log":
        ticks = np.geomspace(low, high, 4)
        bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize="x-small")


def _categories(dots: Dots, values: pd.Series, title: str) -> None:
    """Colour by a few values, the commonest, each with a marker of its own."""
    counts = values.value_counts()
    shown = sorted(counts.index[:N_VALUES])
    groups = [
        (value, values == value, {"color": HUES[i % len(HUES)], "marker": MARKERS[i % len(MARKERS)]})
        for i, value in enumerate(shown)
    ]
    n_rest = len(counts) - len(shown)
    groups.append((f"{n_rest} other{'s' * (n_rest > 1)}", values.notna() & ~values.isin(shown), {"color": GREY}))
    groups.append(("none", values.isna(), {"color": LIGHT_GREY}))
    groups = [group for group in groups if group[1].any()]
    for _, rows, style in reversed(groups):
        dots.draw(rows, **style)
    labels = [label for label, _, _ in groups]
    one_column = max(map(len, labels)) > HALF_LINE
    lines = short_labels(labels, LINE if one_column else HALF_LINE)
    dots.legend([dots.handle(**style) for _, _, style in groups], lines, 1 if one_column else 2, title)


def _shade(i: int) -> tuple[float, ...]:
    """Return the hues as they are, then lighter, then darker."""
    from matplotlib.colors import to_rgb

    towards, share = ((0.0, 0.0), (1.0, 0.5), (0.0, 0.4))[i // len(HUES) % 3]
    return tuple(float((1 - share) * part + share * towards) for part in to_rgb(HUES[i % len(HUES)]))
