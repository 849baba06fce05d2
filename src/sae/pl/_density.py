from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import get
from ._style import BLACK, BLUE, GREEN, LIGHT_GREY, ORANGE, axes, open_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from .._data import Data

SCOPES = {"local": (BLUE, ""), "regional": (ORANGE, "////"), "global": (GREEN, "....")}
"""Colour and hatching."""
UNSEEN = "in no labelled cell"


def density(
    data: Data,
    *,
    groupby: str | None = None,
    bins: int = 20,
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many features are active in which share of the cells, on a logarithmic scale.

    Dead features have no place on it; their number is told.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    groupby
        A column of `obs` after :func:`sae.tl.score_labels`: stack the features by their scope, local, regional or global.
    bins
        How many bars.
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
        There are no activations, or no scopes of `groupby`.
    ValueError
        All features are dead; no `bins`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> ax = sae.pl.density(adata)
    """
    from matplotlib.ticker import MaxNLocator

    if bins < 1:
        raise ValueError(f"bins={bins} is below 1. Pass how many bars to draw, such as 20.")
    table = get.features(data, key=key, mod=mod)
    alive = table[~table["dead"]]
    if alive.empty:
        raise ValueError(f"All {len(table)} features are dead: none is active in any cell. Fit the SAE again.")
    percent = 100 * alive["density"]
    edges = np.geomspace(min(10 ** np.floor(np.log10(percent.min())), 10), 100, bins + 1)
    groups = [("", percent, {"color": BLUE})] if groupby is None else _by_scope(alive, groupby, percent)
    ax = axes(ax)
    bottom = np.zeros(bins)
    for label, values, style in groups:
        counts, _ = np.histogram(values, edges)
        ax.bar(
            edges[:-1], counts, np.diff(edges), bottom, align="edge", label=label or None, edgecolor="white", **style
        )
        bottom += counts
    ax.axvline(percent.median(), color=BLACK, linestyle="--", linewidth=1, label=f"median {percent.median():.2g} %")
    ax.plot([], [], " ", label=f"{len(table) - len(alive)} of {len(table)} dead")
    ax.set(xscale="log", xlim=(edges[0], edges[-1]), xlabel="cells a feature is active in (%)", ylabel="features")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    open_frame(ax)
    # The bars can be anywhere.
    ax.legend(
        frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2,
        handlelength=1.5, columnspacing=1,
    )  # fmt: skip
    return ax


def _by_scope(table: pd.DataFrame, groupby: str, values: pd.Series) -> list[tuple[str, pd.Series, dict[str, Any]]]:
    """Return a label, the values and a style for each scope."""
    column = f"{groupby}_scope"
    if column not in table:
        scored = ", ".join(repr(name.removesuffix("_scope")) for name in map(str, table) if name.endswith("_scope"))
        raise KeyError(
            f"There are no scopes for {groupby!r}; there are for {scored or 'none'}. "
            f"Run sae.tl.score_labels(..., {groupby!r}) first."
        )
    scope = table[column].astype(object).where(table[column].isin(SCOPES), UNSEEN)
    return [
        (f"{name} ({(scope == name).sum()})", values[scope == name], {"color": color, "hatch": hatch})
        for name, (color, hatch) in {**SCOPES, UNSEEN: (LIGHT_GREY, "")}.items()
        if name != UNSEEN or (scope == name).any()
    ]
