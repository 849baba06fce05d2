from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from .. import get
from .._names import label_text, set_text, shorten
from ._style import COLORS, COLUMN, DIVERGING, GREY, LIGHT_GREY, MARKERS, ORANGE, axes, open_frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from .._data import Data

HUES = COLORS[:6]
"""Black is for the numbers."""
N_MODULES, N_NAMED, N_VALUES = 18, 10, 14
"""How many modules have a colour, how many are in the legend, and how many values of another column have a colour."""
LINE, HALF_LINE = 46, 22
"""Characters of a legend's line, in one and in two columns."""
HEIGHT, LINE_HEIGHT = 2.9, 0.135
"""Inches: of the figure without a legend, and of each line of that."""
WIDE = 10
"""Numbers that differ by more than this factor are drawn by their logarithm."""


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
    dots = _Dots(ax, table, size)
    if term is not None:
        found = get.term_features(data, term, collection=collection, **where)
        _mark(dots, pd.Index(found["feature"].astype(str)), term)
    elif parents is not None:
        settings = {"level": level, "collection": collection, **where}
        names = get.parent_terms(data, parents, **settings)["name"].loc[table.index]
        _categories(
            dots, names.astype(object).map(set_text, na_action="ignore"), f"most frequent term of level {level}"
        )
    elif color in (None, "module") and groupby is None:
        _modules(dots, get.modules(data, n=1, collection=collection, **where))
    elif color in (None, "label"):
        scored = str(get.label_matrix(data, groupby, **where).columns.name)
        labels = [None if pd.isna(label) else label_text(str(label), scored) for label in table[f"{scored}_label"]]
        _categories(dots, pd.Series(labels, table.index, dtype=object), f"best {scored}")
    else:
        _column(dots, color, cmap)
    dots.ax.set(xticks=[], yticks=[], xlabel="UMAP1 of features", ylabel="UMAP2 of features")
    open_frame(dots.ax)
    return dots.ax


class _Dots:
    """Where the features are and how large."""

    def __init__(self, ax: Axes | None, table: pd.DataFrame, size: str | None):
        self._own = ax is None
        self.ax, self.table = axes(ax, height=HEIGHT), table
        self._large = float(np.clip(400 / np.sqrt(len(table)), 5, 80))
        self.areas = pd.Series(self._large / 2, table.index)
        if size is not None:
            if size not in table or not pd.api.types.is_numeric_dtype(table[size]):
                numbers = table.select_dtypes("number").columns.drop(["map_x", "map_y"])
                raise KeyError(f"There is no column of numbers {size!r}; there are {', '.join(map(repr, numbers))}.")
            self._scale(size)

    def draw(self, rows: pd.Series | slice = slice(None), **style: Any) -> Any:
        """Draw some features, the large ones first, so that they hide none."""
        areas = self.areas[rows].sort_values(ascending=False, kind="stable")
        table = self.table.loc[areas.index]
        if isinstance(style.get("c"), pd.Series):
            style["c"] = style["c"][areas.index]
        style = {"linewidth": 0, "rasterized": len(self.table) > 2_000, **style}
        return self.ax.scatter(table["map_x"], table["map_y"], s=areas, **style)

    def _scale(self, size: str) -> None:
        """Let areas grow with a column, and show three of them above the Axes."""
        from matplotlib.legend import Legend

        values = self.table[size].astype(np.float64)
        low, high = values.min(), values.max()
        by_logarithm = bool(0 < WIDE * low < high)
        ends = [low, high]
        if not high > low:
            return

        def area(value: Any) -> Any:
            position = np.log(value / low) / np.log(high / low) if by_logarithm else (value - low) / (high - low)
            return self._large * (0.15 + 0.85 * position)

        self.areas = area(values).fillna(self._large * 0.15)
        ends.insert(1, np.sqrt(low * high) if by_logarithm else (low + high) / 2)
        unit, factor = (" %", 100) if size == "density" else ("", 1)
        title = {"density": "active in", "mean": "mean activation"}.get(size, size.replace("_", " "))
        handles = [self.ax.scatter([], [], s=0)]
        handles += [self.ax.scatter([], [], s=area(value), color=GREY, linewidth=0) for value in ends]
        # Axes.legend makes the only one of its Axes, which is the one of the colours.
        key = Legend(
            self.ax,
            handles,
            [title, *(f"{value * factor:.2g}{unit}" for value in ends)],
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            frameon=False,
            fontsize="x-small",
            columnspacing=0.8,
            handletextpad=0.1,
            borderaxespad=0.1,
        )
        self.ax.add_artist(key).set_clip_on(False)

    def number(self, modules: list[str]) -> None:
        """Write the number of each module above the feature nearest to its middle."""
        from matplotlib.patheffects import withStroke

        for module in modules:
            places = self.table.loc[self.table["module"] == module, ["map_x", "map_y"]].to_numpy()
            distance = np.linalg.norm(places - np.median(places, axis=0), axis=1)
            self.ax.annotate(
                module,
                places[distance.argmin()],
                (0, np.sqrt(self._large) / 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize="small",
                fontweight="bold",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )

    def legend(self, handles: list[Any], labels: list[str], ncols: int, title: str | None = None) -> None:
        """Write the legend below the Axes, and make room for it in a figure of our own."""
        if self._own:
            n_lines = -(-len(labels) // ncols) + (title is not None)
            cast("Figure", self.ax.figure).set_size_inches(COLUMN, HEIGHT + LINE_HEIGHT * n_lines)
        self.ax.legend(
            handles,
            labels,
            title=title,
            ncols=ncols,
            loc="upper left",
            bbox_to_anchor=(-0.12, 0),
            frameon=False,
            fontsize="x-small",
            title_fontsize="x-small",
            alignment="left",
            labelspacing=0.3,
            columnspacing=0.8,
            handletextpad=0.2,
            borderaxespad=3,
        )


def _modules(dots: _Dots, modules: pd.DataFrame) -> None:
    """Colour by module, number them, and name the largest."""
    module = dots.table["module"].astype(str)
    shown = modules["module"].astype(str).tolist()[:N_MODULES]
    if len(modules) > len(shown):
        dots.draw(~module.isin(shown), color=LIGHT_GREY)
    for i, name in enumerate(shown):
        dots.draw(module == name, color=_shade(i))
    dots.number(shown)
    named = [_handle(dots.ax, color=_shade(i)) for i in range(min(len(shown), N_NAMED))]
    lines = [_line(row) for row in modules.iloc[: len(named)].to_dict("records")]
    if len(modules) > len(named):
        named.append(_handle(dots.ax, alpha=0))
        lines.append(f"and {len(modules) - len(named) + 1} smaller ones")
    dots.legend(named, lines, 1)


def _line(module: Mapping[Any, Any]) -> str:
    """Write the number of a module, its size, and what its features have more often than the others."""
    label, gene_set = (str(module.get(name, "")).split("; ")[0].replace("_", " ") for name in ("labels", "gene_sets"))
    known = [text for text in (label, set_text(gene_set) if gene_set else "") if text] or [module.get("genes", "")]
    text = shorten(" · ".join(part for part in known if part), LINE)
    return f"{module['module']}  ({module['n_features']})  {text}".rstrip()


def _mark(dots: _Dots, found: pd.Index, term: str) -> None:
    """Mark some features, number the modules, and tell how many there are."""
    marked = pd.Series(dots.table.index.isin(found), dots.table.index)
    dots.draw(~marked, color=LIGHT_GREY)
    dots.draw(marked, color=ORANGE, edgecolor="black", linewidth=0.5)
    dots.number(dots.table["module"].value_counts().index[:N_MODULES].astype(str).tolist())
    handles = [_handle(dots.ax, color=ORANGE, edgecolor="black"), _handle(dots.ax, color=LIGHT_GREY)]
    words = f"gene sets with “{shorten(term, LINE // 2)}”: {marked.sum()} of {len(marked)} features"
    missing = len(found) - marked.sum()
    dots.legend(handles, [words + (f", {missing} not on the map" if missing else ""), "other features"], 1)


def _column(dots: _Dots, color: str, cmap: str | Colormap) -> None:
    """Colour by a column of the feature table."""
    import matplotlib as mpl

    if color not in dots.table:
        raise KeyError(
            f"The features have no {color!r}; they have {', '.join(map(repr, dots.table.columns))}, and 'module' and 'label'."
        )
    values, title = dots.table[color], color.replace("_", " ")
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
        dots.legend([_handle(dots.ax, color=LIGHT_GREY)], ["none"], 1)
    points = dots.draw(c=values, plotnonfinite=True, **scale)
    bar = dots.ax.figure.colorbar(points, ax=dots.ax, label=title, shrink=0.7, fraction=0.05, pad=0.02)
    if scale.get("norm") == "log":
        ticks = np.geomspace(low, high, 4)
        bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
        bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize="x-small")


def _categories(dots: _Dots, values: pd.Series, title: str) -> None:
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
    lines = [shorten(label, LINE if one_column else HALF_LINE) for label in labels]
    dots.legend([_handle(dots.ax, **style) for _, _, style in groups], lines, 1 if one_column else 2, title)


def _handle(ax: Axes, **style: Any) -> Any:
    return ax.scatter([], [], s=20, **{"linewidth": 0, **style})


def _shade(i: int) -> tuple[float, ...]:
    """Return the hues as they are, then lighter, then darker."""
    from matplotlib.colors import to_rgb

    towards, share = ((0.0, 0.0), (1.0, 0.5), (0.0, 0.4))[i // len(HUES) % 3]
    return tuple(float((1 - share) * part + share * towards) for part in to_rgb(HUES[i % len(HUES)]))
