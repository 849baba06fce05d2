from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._steered import CHANGE, CONTROLS, Steered, known_genes
from ._style import BLACK, BLUE, COLORS, MARKERS, axes, open_frame
from ._titles import literal, short_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

MEASURES = {
    "effect": "effect (RMS over genes)",
    "distance": "distance to nearest cells",
    "off_manifold": "share off the manifold",
    "step": "length of the step",
}


def draw_genes_by_dose(ax: Axes | None, steered: Steered, genes: Sequence[str]) -> Axes:
    found, n_labels = steered.changes()
    mean = (found.groupby(["gene", "dose"])["change"].sum() / n_labels).unstack("dose")
    doses = steered.doses.set_index("dose").sort_index()
    mean = mean.reindex(columns=doses.index)
    mean.loc[:, doses["n_moved"] == 0] = 0.0
    genes = known_genes(genes, mean.index, f"of {steered.name}")
    ax = axes(ax)
    for number, (gene, text) in enumerate(zip(genes, short_labels(genes), strict=True)):
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        ax.plot(doses.index, mean.loc[gene], markersize=4, label=text, **style)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set(xlabel=_dose_label(doses), ylabel=CHANGE)
    return _finished(ax)


def draw_measure_by_dose(ax: Axes | None, steered: Steered, measure: str) -> Axes:
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} is not one of {', '.join(map(repr, MEASURES))}.")
    doses = steered.doses.set_index("dose").sort_index()
    controls = steered.table("controls")
    controls = controls[controls["measure"] == measure].set_index("dose").sort_index()
    compared = [name for name in CONTROLS if controls[name].notna().any()]
    own = controls["value"] if compared else doses[measure]
    ax = axes(ax)
    ax.plot(own.index, own, color=BLUE, marker="o", markersize=4, label=literal(steered.name), zorder=3)
    for name in compared:
        text, style = CONTROLS[name]
        ax.plot(controls.index, controls[name], markersize=5, label=text, zorder=4, **style)
    if f"{measure}_before" in doses:
        ax.axhline(doses[f"{measure}_before"].iloc[0], color=BLACK, linewidth=0.8, label="before")
    ax.set(xlabel=_dose_label(doses), ylabel=MEASURES[measure])
    ax.set_ylim(0, 1.08 * max(ax.get_ylim()[1] / 1.05, 1e-12))
    return _finished(ax)


def _dose_label(doses: pd.DataFrame) -> str:
    """Say which activation a dose stands for, where it is not a factor."""
    one = (doses["value"] / doses.index)[doses.index != 0]
    factor = one.empty or not np.isfinite(one).all() or np.allclose(one, 1) or not one.any()
    return "dose" if factor else f"dose (1 = activation of {one.iloc[-1]:.2g})"


def _finished(ax: Axes) -> Axes:
    ax.legend(frameon=False, fontsize="small", labelspacing=0.3)
    open_frame(ax)
    return ax
