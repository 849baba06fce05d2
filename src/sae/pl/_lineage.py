from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import get
from ._style import COLORS, MARKERS, axes, open_frame
from ._titles import literal, short_labels, titles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from .._data import Data
    from .._schema import Features

SCALED = ["mean", "ci_low", "ci_high"]
MOST = 2
"""Times the highest mean that is drawn."""
LEVEL, SLANTED = 24, 10
"""Labels with so many letters in all are written level, up to so many labels aslant, more upright."""
LETTER = 0.065
"""Inches: a letter of a label."""


def lineage(
    data: Data,
    features: Features,
    groupby: str,
    *,
    order: Sequence[str] | None = None,
    n_bins: int = 10,
    donor: str | None = None,
    relative: bool = False,
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the mean activation of features along ordered labels, or along a number such as pseudotime.

    The band is the 95 % interval of the mean (Student's t), over cells, or over donors with `donor`. Whether a feature rises or falls
    is tested by :func:`sae.tl.score_labels` with the same `order`.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    features
        One or several, by name or number, a line each.
    groupby
        Column of `obs`, an ordered categorical or numbers; or any other, with `order`.
    order
        Labels in the order of a process; cells of other labels are left out.
    n_bins
        A column of more different numbers is divided into so many bins of about as many cells, each drawn at the mean of its numbers.
    donor
        Column of `obs`: every donor counts once, see :func:`sae.get.by_label`. Without it, the bands take cells as
        independent, and are too narrow for what other donors would show.
    relative
        Divide by the highest mean of each feature, so that features of different strength can be compared.
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
        There are no activations, or no such feature or column.
    ValueError
        The labels have no order, or fewer than two are there.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> ax = sae.pl.lineage(adata, ["sae_0", "sae_1"], "phase", order=["G1", "S", "G2M"])
    """
    table = get.by_label(data, features, groupby, order=order, n_bins=n_bins, donor=donor, key=key, mod=mod)
    labels = table["label"].cat
    found = ", ".join(map(repr, labels.categories[:10]))
    if not labels.ordered:
        raise ValueError(f"{groupby!r} has labels without an order: {found}. Pass them in their order as order=.")
    if len(labels.categories) < 2:
        raise ValueError(f"{groupby!r} has only one label or bin, {found}; a line needs two.")
    if relative:
        highest = table.groupby("feature", observed=True)["mean"].transform("max")
        table[SCALED] = table[SCALED].div(highest.where(highest > 0, 1), axis=0)
    names = table["feature"].unique().tolist()
    texts = short_labels(labels.categories.tolist()) if table["position"].dtype.kind == "i" else []
    longest = max(map(len, texts), default=0)
    angle = 0 if sum(map(len, texts)) <= LEVEL else 45 if max(len(texts), longest / 2) <= SLANTED else 90
    ax = axes(ax, height=2.3 + 0.15 * len(names) + LETTER * longest * np.sin(np.radians(angle)))
    for i, (name, title) in enumerate(zip(names, titles(data, names, key=key, mod=mod), strict=True)):
        rows = table[table["feature"] == name]
        color, marker = COLORS[i % len(COLORS)], MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
        ax.plot(
            rows["position"], rows["mean"], color=color, marker=marker, markersize=4, label=title.replace("\n", "  ")
        )
        ax.fill_between(rows["position"], rows["ci_low"], rows["ci_high"], color=color, alpha=0.2, linewidth=0)
    what = "activation, of its highest" if relative else "mean activation"
    ax.set(
        xlabel=literal(groupby.replace("_", " ")), ylabel=f"{what}\n(95 % interval{' over donors' if donor else ''})"
    )
    # The interval of two or three cells reaches far beyond all means.
    ax.set_ylim(0, min(1.05 * np.nanmax(table[SCALED].to_numpy()), MOST * table["mean"].max()) or 1)
    if texts:
        slanted: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if angle == 45 else {}
        ax.set_xticks(rows["position"], texts, rotation=angle, fontsize="small", **slanted)
    open_frame(ax)
    ax.legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return ax
