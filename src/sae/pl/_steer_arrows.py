from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import get
from ._style import BLACK, activation_colors, axes, open_frame
from ._titles import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._data import Data

LONGEST = 2.5
"""The longest arrow, in squares."""


def draw_arrows(
    ax: Axes | None, data: Data, name: str, key_added: str, basis: str, n_grid: int, key: str, mod: str | None
) -> Axes:
    from matplotlib.lines import Line2D

    arrows = get.steering_arrows(data, key_added, name, basis=basis, n_grid=n_grid, key=key, mod=mod)
    if arrows.empty:
        raise ValueError(f"No square holds three moved cells. Pass a smaller n_grid= than {n_grid}.")
    places = get.embedding(data, basis, mod=mod)
    activation = get.activations(data, name, key=key, mod=mod).X.toarray().ravel()
    order = np.argsort(activation, kind="stable")
    x, y = places.iloc[order].to_numpy().T
    size = np.clip(8_000 / len(order), 0.5, 12)
    ax = axes(ax)
    dots = ax.scatter(x, y, c=activation[order], s=size, cmap=activation_colors(), vmin=0, linewidths=0)
    dots.set_rasterized(True)
    ax.figure.colorbar(dots, ax=ax, label=f"activation of {literal(name)}", shrink=0.6, aspect=25, pad=0.02)
    longest = np.hypot(arrows["dx"], arrows["dy"]).max()
    placed = places[np.isfinite(places).all(axis=1)]
    square = float(np.ptp(placed.to_numpy(), axis=0).max()) / n_grid
    factor = min(1.0, LONGEST * square / longest) if longest > 0 else 1.0
    far, shift = arrows["off_manifold"] > 0.5, "shift" if factor == 1 else f"shift × {factor:.2g}"
    handles = []
    for some, face, edge, text in (
        (~far, BLACK, "white", shift),
        (far, "white", BLACK, f"{shift}, mostly off the manifold"),
    ):
        part = arrows[some]
        if part.empty:
            continue
        ax.quiver(
            part["x"], part["y"], factor * part["dx"], factor * part["dy"], angles="xy", scale_units="xy", scale=1,
            width=0.009, headwidth=3.5, headlength=4, headaxislength=3.6, facecolor=face, edgecolor=edge, linewidth=0.6,
            zorder=3,
        )  # fmt: skip
        handle = Line2D(
            [], [], label=text, marker=r"$\rightarrow$", markersize=10, markerfacecolor=face, markeredgecolor=BLACK,
            markeredgewidth=0.5, linestyle="none",
        )  # fmt: skip
        handles.append(handle)
    ax.legend(
        handles=handles, frameon=False, fontsize="small", labelspacing=0.3, loc="upper left", bbox_to_anchor=(-0.02, -0.08)
    )  # fmt: skip
    ax.set(xlabel=literal(places.columns[0]), ylabel=literal(places.columns[1]), xticks=[], yticks=[])
    ax.margins(0.06)
    open_frame(ax)
    return ax
