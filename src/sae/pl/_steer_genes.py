from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ._steered import CHANGE, Steered, known_genes
from ._style import BLACK, BLUE, ORANGE, axes, open_frame
from ._titles import short_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes


def draw_genes(ax: Axes | None, steered: Steered, dose: float, n: int, chosen: Sequence[str] | None) -> Axes:
    if n < 1:
        raise ValueError(f"n_genes={n} is below 1. Pass how many genes to draw of each direction, such as 10.")
    found, n_labels = steered.changes()
    found = found[found["dose"] == dose]
    mean = (found.groupby("gene")["change"].sum() / n_labels).sort_values(ascending=False, kind="stable")
    if chosen is not None:
        mean = mean[known_genes(chosen, mean.index, f"of {steered.name} at dose {dose:g}")].sort_values(ascending=False)
    else:
        mean = pd.concat([mean[mean > 0].head(n), mean[mean < 0].tail(n)])
    if mean.empty:
        raise ValueError(f"No gene changes at dose {dose:g} of {steered.name}: no cell is moved. Pass another dose=.")
    ax = axes(ax, height=0.9 + 0.15 * len(mean))
    y = np.arange(len(mean))
    ax.barh(y, mean, height=0.75, color=np.where(mean > 0, ORANGE, BLUE))
    if n_labels > 1:
        found = found[found["gene"].isin(mean.index)]
        ax.plot(found["change"], mean.index.get_indexer(pd.Index(found["gene"])), "|", color="0.25", markersize=4)
    ax.axvline(0, color=BLACK, linewidth=0.8)
    ax.set_yticks(y, short_labels(mean.index.tolist()), fontsize="small")
    ax.set_ylim(len(mean) - 0.4, -0.6)
    each = " (a tick per label)" if n_labels > 1 else ""
    ax.set_xlabel(f"{CHANGE} at dose {dose:g}{each}", fontsize="small", loc="right")
    open_frame(ax)
    return ax
