from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .. import get
from ._style import BLUE, GREEN, ORANGE, axes, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._data import Data

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "sae": ("SAE", {"color": BLUE, "linewidth": 2}),
    "cells": ("random cells", {"color": ORANGE, "linestyle": "--"}),
    "random": ("random directions", {"color": GREEN, "linestyle": ":"}),
}
NAMES = {"decoder": "cosine of decoder directions", "activation": "correlation of activations"}


def stability(
    data: Data,
    *,
    measure: Literal["decoder", "activation"] = "decoder",
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how many features other seeds bring back: the share whose stability is at least a threshold.

    Beside the SAE stand dictionaries that learned nothing: of the directions of random cells, and of random directions. Where cells are
    alike, random cells pair well too, and their curve can lie above that of the SAE. They are seldom found again, which asks that the
    partner stands out from the other features: the legend tells the mean share of runs in which a feature is (by its decoder direction, whatever `measure` is drawn).

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.stability`.
    measure
        `"decoder"` or `"activation"`: of what the similarity is.
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
        There is no such SAE, its stability is not known, or no such measure.
    ValueError
        All features are dead.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.stability(adata, n_seeds=1)
    >>> ax = sae.pl.stability(adata)
    """
    curve = get.stability(data, table="curve", measure=measure, key=key, mod=mod)
    summary = get.stability(data, key=key, mod=mod).set_index("source")
    found = summary["stability_found"].to_dict()
    if not summary["n_features"]["sae"]:
        raise ValueError(f"All features of {key!r} are dead: none has a stability. Run sae.tl.fit with other settings.")
    ax = axes(ax, height=3.2)
    for source, (name, style) in SOURCES.items():
        of_source = curve[curve["source"] == source]
        ax.plot(of_source["threshold"], of_source["share"], label=f"{name} ({100 * found[source]:.0f} %)", **style)
    ax.set(xlabel=f"{NAMES[measure]}, at least", ylabel="share of features", xlim=(0, 1), ylim=(0, 1.03))
    # Above: the curves can run anywhere.
    ax.legend(
        frameon=False, fontsize="small", title="found again by another seed", title_fontsize="small", labelspacing=0.3,
        loc="lower left", bbox_to_anchor=(0, 1), alignment="left",
    )  # fmt: skip
    open_frame(ax)
    return ax
