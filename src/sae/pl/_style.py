"""What all figures share: sizes, and colours that people with any colour vision tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

COLUMN = 3.35
"""Inches: a single column of 85 mm."""
BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLORS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK)
"""For a few groups (Okabe and Ito)."""
MARKERS = "osD^vPX"
"""With the colours, so that groups differ in print, too."""
GREY, LIGHT_GREY = "0.5", "0.82"
"""For what is there to compare with, and for what is there but not meant."""
DIVERGING = "RdBu_r"
"""For changes: red is up, white is none."""
LIGHTEST = 0.85
"""Of viridis: its end is hard to see on white."""


def axes(ax: Axes | None, height: float = 2.8, width: float = COLUMN) -> Axes:
    """Return the given Axes, or those of a new figure of this size in inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def refuse_several(ax: Axes | None, n: int, argument: str) -> None:
    """Refuse one Axes for several panels."""
    if ax is not None and n > 1:
        raise ValueError(f"ax= takes one panel, but {argument}= has {n}. Pass one, or leave ax= out.")


def panels(n: int, height: float = 2.8, width: float = COLUMN, ncols: int = 4) -> list[Axes]:
    """Return the Axes of a new figure of `n` panels in rows, each of this size."""
    import matplotlib.pyplot as plt

    ncols = min(n, ncols)
    nrows = -(-n // ncols)
    figure, grid = plt.subplots(
        nrows, ncols, figsize=(width * ncols, height * nrows), squeeze=False, layout="constrained"
    )
    for spare in grid.flat[n:]:
        figure.delaxes(spare)
    return list(grid.flat[:n])


def open_frame(ax: Axes) -> None:
    """Leave the frame open at the top and right."""
    ax.spines[["top", "right"]].set_visible(False)


def activation_colors() -> Colormap:
    """Plasma, reversed and begun in grey: dark stands for active, and lightness alone tells the order."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "activation", ["#dfdfdf", *colormaps["plasma"]([0.85, 0.65, 0.45, 0.25, 0.0])]
    )


def shades(n: int) -> Sequence[tuple[float, float, float, float]]:
    """Return `n` colours from dark to light, for ordered groups."""
    import numpy as np
    from matplotlib import colormaps

    return [tuple(color) for color in colormaps["viridis"](np.linspace(0, LIGHTEST, n))]
