from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import get
from ._history import NAMES as OF_TRAINING
from ._style import BLUE, COLORS, GREY, MARKERS, axes, open_frame, shades
from ._titles import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._data import Data

NAMES = OF_TRAINING | {
    "val_fvu": "held-out variance unexplained",
    "val_l0": "active features per held-out cell (L0)",
    "dead": "share of dead features",
    "redundancy": "highest cosine with another feature",
    "label_auroc": "held-out AUROC of labels",
    "truth_best": "|r| of true variables, best",
    "truth_matched": "|r| of true variables, matched",
    "truth_found": "true variables found",
    "stability": "cosine between seeds, matched",
    "n_features": "features",
    "l1": "L1 penalty",
    "l0_weight": "L0 penalty",
}
SIZE = 24
FRONT, SEED = "0.4", "0.75"
WIDE = 10
"""Numbers that differ by more than this factor are coloured by their logarithm."""


def sweep(
    data: Data,
    x: str = "l0",
    y: str = "val_fvu",
    *,
    color: str | None = None,
    key: str = "sae_sweep",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the settings of a sweep, a point each, with the front of those that no other beats.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.sweep`.
    x, y
        Columns of :func:`sae.get.sweep`, which says of which of them higher is better. Settings with several seeds are drawn
        at their mean, to which the seeds are joined.
    color
        A setting, or a measure, to colour the points by; settings without it are grey.
    key
        Name of the sweep.
    mod
        The modality that holds it.
    ax
        Axes to draw on.

    Returns
    -------
    The Axes.

    Raises
    ------
    KeyError
        There is no sweep of this name, or no such column.
    ValueError
        No run has both `x` and `y`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> runs = sae.tl.sweep(adata, {"n_features": [16, 32], "k": [2, 4], "steps": 50})
    >>> ax = sae.pl.sweep(adata, color="n_features")
    """
    import matplotlib as mpl

    table = get.sweep(data, pareto=(x, y), key=key, mod=mod)
    if color is not None and color not in table:
        raise KeyError(f"The sweep has no {color!r}; it has {', '.join(map(repr, table.columns))}.")
    table = table[table[x].notna() & table[y].notna()]
    if table.empty:
        raise ValueError(f"No run has both {x!r} and {y!r}. Were any cells held out? Choose another x= or y=.")
    ax = axes(ax, height=3.0)
    settings = _settings(table)
    front = settings[settings["pareto"]].sort_values(x)
    steps = "pre" if x in get.HIGHER_IS_BETTER else "post"
    ax.plot(front[x], front[y], color=FRONT, linewidth=1, drawstyle=f"steps-{steps}", zorder=1)
    _join_seeds(ax, table, x, y)
    if color is None:
        ax.scatter(settings[x], settings[y], s=SIZE, color=BLUE, zorder=3)
    elif _is_continuous(settings[color]):
        cmap = mpl.colormaps["viridis"].with_extremes(bad=GREY)
        c = settings[color]
        norm = "log" if 0 < WIDE * c.min() < c.max() else None
        points = ax.scatter(settings[x], settings[y], s=SIZE, c=c, cmap=cmap, norm=norm, plotnonfinite=True, zorder=3)
        ax.figure.colorbar(points, ax=ax, label=_name(color))
    else:
        for label, rows, style in _groups(settings[color]):
            ax.scatter(settings.loc[rows, x], settings.loc[rows, y], s=SIZE, zorder=3, label=label, **style)
        title = _name(color)
        ax.legend(
            frameon=False, fontsize="small", title=title, title_fontsize="small", labelspacing=0.3, handletextpad=0.4
        )
    ax.set(xlabel=_name(x), ylabel=_name(y))
    ax.margins(0.06)
    open_frame(ax)
    return ax


def _name(column: str) -> str:
    return NAMES.get(column, literal(column.replace("_", " ")))


def _settings(table: pd.DataFrame) -> pd.DataFrame:
    """Average the seeds of each setting."""
    by_setting = table.groupby("setting")
    means = by_setting.mean(numeric_only=True)
    return by_setting.first().assign(**{str(name): means[name] for name in means if name != "pareto"})


def _join_seeds(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Draw the seeds of settings that have several, each joined to their mean."""
    from matplotlib.collections import LineCollection

    several = table[table["setting"].duplicated(keep=False)]
    runs = several[[x, y]].to_numpy(dtype=np.float64)
    means = several.groupby("setting")[[x, y]].transform("mean").to_numpy()
    ax.add_collection(LineCollection(list(np.stack([runs, means], axis=1)), colors=SEED, linewidths=0.8, zorder=2))
    ax.scatter(runs[:, 0], runs[:, 1], s=SIZE / 4, color=SEED, zorder=2)


def _is_continuous(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and values.nunique() > len(COLORS)


def _groups(values: pd.Series) -> list[tuple[str, pd.Series, dict[str, Any]]]:
    """Return a label, the rows and a style for each value of a column, and for rows without one."""
    known = sorted(values.dropna().unique())
    if pd.api.types.is_numeric_dtype(values) and values.dtype != bool:
        styles: list[dict[str, Any]] = [{"color": shade} for shade in shades(len(known))]
    else:
        styles = [{"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]} for i in range(len(known))]
    found = [
        (
            f"{value:g}" if pd.api.types.is_number(value) and not pd.api.types.is_bool(value) else literal(str(value)),
            values == value,
            style,
        )
        for value, style in zip(known, styles, strict=True)
    ]
    if values.isna().any():
        found.append(("none", values.isna(), {"color": GREY}))
    return found
