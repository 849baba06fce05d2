from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import get
from ._style import BLUE, ORANGE, open_frame, panels, refuse_several

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from .._data import Data

NAMES = {
    "loss": "loss of the batch",
    "fvu": "fraction of variance unexplained",
    "l0": "active features per cell (L0)",
    "dead_fraction": "share of dead features",
    "learning_rate": "learning rate",
}


def history(
    data: Data,
    metrics: str | Sequence[str] = ("fvu", "l0", "dead_fraction"),
    *,
    key: str = "sae",
    mod: str | None = None,
    ax: Axes | None = None,
) -> Axes | list[Axes]:
    """Draw how training went, on the training and on the held-out cells.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with an SAE.
    metrics
        Columns of :func:`sae.get.history`, a panel each; a held-out counterpart is drawn with it.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    ax
        Axes to draw a single metric on.

    Returns
    -------
    The Axes; a list of them for several metrics.

    Raises
    ------
    KeyError
        There is no SAE of this name, or no such metric.
    ValueError
        `ax` with several metrics.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> ax = sae.pl.history(adata, "fvu")
    """
    table = get.history(data, key=key, mod=mod)
    chosen = [metrics] if isinstance(metrics, str) else list(metrics)
    if not chosen:
        raise ValueError(f"No metrics were given. Pass some of {', '.join(map(repr, table.columns))}.")
    unknown = [metric for metric in chosen if metric not in table.columns]
    if unknown:
        raise KeyError(f"The history has no {unknown[0]!r}; it has {', '.join(map(repr, table.columns))}.")
    refuse_several(ax, len(chosen), "metrics")
    axes = panels(len(chosen)) if ax is None else [ax]
    for panel, metric in zip(axes, chosen, strict=True):
        panel.plot(table["step"], table[metric], color=BLUE, label="training")
        held_out = table.get(f"val_{metric}")
        if held_out is not None and held_out.notna().any():
            panel.plot(table["step"], held_out, color=ORANGE, linestyle="--", label="held out")
            panel.legend(frameon=False)
        panel.set(xlabel="step", ylabel=NAMES.get(metric, metric))
        peak = np.nanmax(np.concatenate([[0.0], *(line.get_ydata() for line in panel.lines)]))
        panel.set_ylim(0, 1.08 * peak if peak > 0 else 1)
        open_frame(panel)
    return axes if len(axes) > 1 else axes[0]
