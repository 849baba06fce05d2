from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from ._style import BLACK, COLORS, GREY, MARKERS, axes, open_frame
from ._titles import literal, short_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = {"abs_r": "best feature", "matched": "own feature"}
WIDTH, LETTERS, MANY = 20, 40, 9
"""Letters of the name of a group, letters side by side below the Axes, and numbers side by side above."""
SPREAD = 0.8
"""Of the width of a place on the axis, that its points may take."""


def recovery(
    table: pd.DataFrame | Mapping[str, pd.DataFrame],
    *,
    score: Literal["abs_r", "matched"] = "matched",
    ax: Axes | None = None,
) -> Axes:
    r"""Draw how well known variables are found: \|r\| of each with its feature, against the linear ceiling.

    * One table of variables: a point per variable at its ceiling, a group by its marker and colour; filled with its best feature, joined
      to the hollow one with the feature of its own. On the line a feature knows what the best direction in the representation could. For
      each group the legend tells how many variables are above the lowest threshold.
    * Several tables, or one without a ceiling: a column of points per group and table, in rising order, with their mean, their mean
      ceiling, and how many are above the lowest threshold.
    * Tables of groups (`summary=True`): the same with means alone.

    Parameters
    ----------
    table
        What :func:`sae.tl.recovery` returned; or several of them by name, such as of an SAE, principal components and genes
        (`use_rep=`), to compare.
    score
        Of several tables, or without a ceiling: `"matched"`, \|r\| with the feature of its own, or `"abs_r"`, with the best one, which
        variables may share, and which grows with the number of features alone.
    ax
        Axes to draw on.

    Returns
    -------
    The Axes.

    Raises
    ------
    TypeError
        Something else than tables.
    ValueError
        A table that is not of `tl.recovery`, or tables of variables and of groups together; no variable with a score; an unknown
        `score`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.simulate_small(2_000)
    >>> sae.tl.fit(adata, "X", n_features=8, k=2, steps=200, progress=False)
    >>> sae.tl.encode(adata)
    >>> found = sae.tl.recovery(adata, {"programs": "programs", "activity": "activity"})
    >>> ax = sae.pl.recovery(found)
    >>> genes = sae.tl.recovery(adata, "programs", use_rep="X")
    >>> ax = sae.pl.recovery({"SAE": found, "genes": genes})
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is not one of {', '.join(map(repr, SCORES))}.")
    tables = _tables(table)
    first = next(iter(tables.values()))
    if len(tables) == 1 and "n_variables" not in first and _has_ceiling(first):
        return _against_ceiling(axes(ax, height=3.6), first)
    return _by_group(ax, tables, score)


def _tables(table: Any) -> dict[str, pd.DataFrame]:
    """Check the tables, and leave out variables that are the same in all cells."""
    tables = {"": table} if isinstance(table, pd.DataFrame) else table
    if not isinstance(tables, Mapping) or not all(isinstance(one, pd.DataFrame) for one in tables.values()):
        raise TypeError(f"Expected a table of sae.tl.recovery, or a dict of them, got {type(table).__name__}.")
    if not tables:
        raise ValueError("table= is an empty dict. Pass tables of sae.tl.recovery by name.")
    known = {}
    for name, one in tables.items():
        what = f"The table {name!r}" if name else "The table"
        missing = [column for column in ("group", "matched") if column not in one]
        if missing or not ({"abs_r", "mean_abs_r"} & set(one)):
            raise ValueError(
                f"{what} has no {(missing or ['abs_r'])[0]!r}: it is not one that sae.tl.recovery returned."
            )
        known[str(name)] = one[one["matched"].notna()]
        if known[str(name)].empty:
            raise ValueError(f"{what} has no variable with a score: all are the same in all cells.")
    if len({"n_variables" in one for one in known.values()}) > 1:
        raise ValueError("Some tables are of variables, others of groups (summary=True). Pass one kind.")
    return known


def _has_ceiling(table: pd.DataFrame) -> bool:
    return "ceiling" in table and bool(table["ceiling"].notna().any())


def _thresholds(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """Return the thresholds that are in all tables, as they are written in names of columns, the lowest first."""
    columns = [[str(name) for name in one] for one in tables.values()]
    named = [{name.removeprefix("n_above_") for name in of_one if name.startswith("n_above_")} for of_one in columns]
    return sorted(set.intersection(*named), key=float)


def _style(number: int) -> dict[str, Any]:
    """Return a colour and a marker, of which no two of 49 are both the same."""
    marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]
    return {"color": COLORS[number % len(COLORS)], "marker": marker, "markersize": 4.5, "linestyle": "none"}


def _against_ceiling(ax: Axes, table: pd.DataFrame) -> Axes:
    thresholds = _thresholds({"": table})
    ax.axline((0, 0), slope=1, color=GREY, linewidth=0.8)
    groups = dict(iter(table.groupby("group", sort=False, observed=True)))
    names = short_labels([str(group) for group in groups], WIDTH)
    for number, (label, part) in enumerate(zip(names, groups.values(), strict=True)):
        style = _style(number)
        if thresholds:
            best, own = ((part[name] > float(thresholds[0])).sum() for name in SCORES)
            label += f": {best} best, {own} own of {len(part)}"
        ax.vlines(part["ceiling"], part["matched"], part["abs_r"], color=style["color"], linewidth=0.6, alpha=0.6)
        ax.plot(part["ceiling"], part["matched"], markerfacecolor="none", markeredgewidth=0.8, **style)
        ax.plot(part["ceiling"], part["abs_r"], label=label, markeredgewidth=0.8, **style)
    _lines(ax, thresholds)
    title = "filled: best feature, hollow: its own" + (f"\n|r| > {thresholds[0]}" if thresholds else "")
    ax.legend(
        frameon=False, fontsize="small", title=title, title_fontsize="small", labelspacing=0.3, handletextpad=0.2,
        loc="lower left", bbox_to_anchor=(-0.15, 1), alignment="left",
    )  # fmt: skip
    ax.set(xlabel="linear ceiling (held-out R)", ylabel="|r| with a feature", xlim=(-0.02, 1.04), ylim=(-0.02, 1.04))
    open_frame(ax)
    return ax


def _lines(ax: Axes, thresholds: list[str]) -> None:
    for threshold in thresholds:
        ax.axhline(float(threshold), color=GREY, linewidth=0.8, linestyle=":", zorder=0)


def _by_group(ax: Axes | None, tables: Mapping[str, pd.DataFrame], score: str) -> Axes:
    groups = list(dict.fromkeys(str(group) for one in tables.values() for group in one["group"]))
    names = short_labels(groups, WIDTH)
    longest = max(map(len, names))
    turned, upright = len(groups) * longest > LETTERS, len(groups) * len(tables) > MANY
    thresholds = _thresholds(tables)
    ax = axes(ax, height=3.4 + 0.07 * longest * turned)
    wide = SPREAD / len(tables)
    for number, (name, table) in enumerate(tables.items()):
        style = _style(number)
        ax.plot([], [], label=literal(name), **style)
        for place, group in enumerate(groups):
            part = table[table["group"].astype(str) == group]
            if part.empty:
                continue
            middle = place + (number - (len(tables) - 1) / 2) * wide
            _column(ax, part, score, middle, wide * SPREAD / 2, style)
            if thresholds:
                found, turn = _found(part, score, thresholds[0]), 90 if upright else 0
                ax.text(middle, 1.04, found, ha="center", va="bottom", fontsize="x-small", rotation=turn)
    _lines(ax, thresholds)
    for place in range(1, len(groups)):
        ax.axvline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
    _legend(ax, tables, thresholds, 0.34 if upright else 0.16)
    ax.set_xticks(range(len(groups)), names, fontsize="small", rotation=90 if turned else 0)
    of = SCORES[score] + ", mean" * ("n_variables" in next(iter(tables.values())))
    ax.set(ylabel=f"|r| with {of}", xlim=(-0.5, len(groups) - 0.5), ylim=(-0.02, 1.03))
    open_frame(ax)
    return ax


def _column(ax: Axes, part: pd.DataFrame, score: str, middle: float, half: float, style: dict[str, Any]) -> None:
    """Draw the scores of a group in rising order, their mean, and that of their ceiling."""
    ends = [middle - half, middle + half]
    if "n_variables" in part:
        values = part["mean_abs_r" if score == "abs_r" else score].to_numpy()
        ax.plot(middle, values[0], **style)
    else:
        values = np.sort(part[score].to_numpy())
        ax.plot(np.linspace(ends[0], ends[1], len(values) + 2)[1:-1], values, alpha=0.8, **style | {"markersize": 3})
    ax.plot(ends, [values.mean()] * 2, color=style["color"], linewidth=2)
    if _has_ceiling(part):
        ax.plot(ends, [part["ceiling"].mean()] * 2, color=BLACK, linewidth=1)


def _found(part: pd.DataFrame, score: str, threshold: str) -> str:
    """Tell how many variables of a group are above a threshold, of how many."""
    if "n_variables" in part:
        name = "n_above" if score == "abs_r" else "n_matched_above"
        return f"{int(part[f'{name}_{threshold}'].iloc[0])}/{int(part['n_variables'].iloc[0])}"
    return f"{(part[score] > float(threshold)).sum()}/{len(part)}"


def _legend(ax: Axes, tables: Mapping[str, pd.DataFrame], thresholds: list[str], above: float) -> None:
    """Name the tables, so many inches above the Axes, where the numbers found are."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import offset_copy

    handles, names = ax.get_legend_handles_labels()
    if list(tables) == [""]:
        handles, names = [], []
    if any(map(_has_ceiling, tables.values())):
        handles, names = [*handles, Line2D([], [], color=BLACK, linewidth=1)], [*names, "ceiling, mean"]
    title = f"numbers: |r| > {thresholds[0]}" if thresholds else None
    ncols = 2 if max(map(len, names), default=0) <= WIDTH else 1
    if handles or title:
        ax.legend(
            handles, names, frameon=False, fontsize="small", title=title, title_fontsize="small", labelspacing=0.3,
            ncols=ncols, columnspacing=1.0, loc="lower left", bbox_to_anchor=(-0.15, 1), alignment="left",
            bbox_transform=offset_copy(ax.transAxes, ax.get_figure(root=True), y=above),
        )  # fmt: skip
