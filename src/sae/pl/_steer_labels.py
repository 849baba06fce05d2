from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._names import shorten
from ._steered import CONTROLS, Steered
from ._style import BLACK, BLUE, axes, open_frame
from ._titles import LABEL_WIDTH, literal, short_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_labels(ax: Axes | None, steered: Steered, dose: float) -> Axes:
    from matplotlib.transforms import offset_copy

    name, label = steered.name, steered.label
    if steered.table("labels").empty:
        raise ValueError(f"{name} was steered without labels. Run sae.tl.steer with groupby= first.")
    compared = []
    if label is None:
        found = steered.table("controls")
        found = found[(found["dose"] == dose) & (found["measure"] == "label")]
        if found.empty:
            raise ValueError(
                f"{name} was steered without controls. Pass label= to see the cells of one label, or run sae.tl.steer with "
                "n_controls=20."
            )
        compared = [control for control in CONTROLS if found[control].notna().any()]
        own = "value"
    else:
        found = steered.table("labels", label)
        found, own = found[found["dose"] == dose].rename(columns={"towards": "name"}), "difference"
    found = found.sort_values(own, ascending=False, kind="stable")
    ax = axes(ax, height=1.3 + 0.2 * len(found))
    y = np.arange(len(found))
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.hlines(y, 0, found[own], color=BLUE, linewidth=1.2)
    ax.plot(found[own], y, "o", color=BLUE, markersize=5, label=literal(name) if compared else None, zorder=3)
    for control in compared:
        text, style = CONTROLS[control]
        ax.plot(found[control], y, markersize=4, label=text, **style | {"linestyle": "none"})
    ax.set_yticks(y, short_labels(found["name"].astype(str).tolist()), fontsize="small")
    ax.set_ylim(len(found) - 0.4, -0.6)
    of = "all steered cells" if label is None else literal(shorten(label, LABEL_WIDTH))
    ax.set_xlabel(f"change of share among neighbours\n({of}, dose {dose:g})", fontsize="small", loc="right")
    if compared:
        below = offset_copy(ax.transAxes, ax.get_figure(root=True), y=-0.55)
        ax.legend(
            frameon=False, fontsize="small", labelspacing=0.3, loc="upper right", bbox_to_anchor=(1, 0), bbox_transform=below,
            borderaxespad=0,
        )  # fmt: skip
    open_frame(ax)
    return ax
