"""The features as dots on their map, with numbers and legends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from ._style import COLUMN, GREY, axes
from ._titles import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT, LINE_HEIGHT = 2.9, 0.135
"""Inches: of the figure without a legend, and of each line of that."""
WIDE = 10
"""Numbers that differ by more than this factor are drawn by their logarithm."""


class Dots:
    """Where the features are and how large."""

    def __init__(self, ax: Axes | None, table: pd.DataFrame, size: str | None):
        self._own = ax is None
        self.ax, self.table = axes(ax, height=HEIGHT), table
        self._large = float(np.clip(400 / np.sqrt(len(table)), 5, 80))
        self.areas = pd.Series(self._large / 2, table.index)
        if size is not None:
            if size not in table or not pd.api.types.is_numeric_dtype(table[size]):
                numbers = table.select_dtypes("number").columns.drop(["map_x", "map_y"])
                raise KeyError(f"There is no column of numbers {size!r}; there are {', '.join(map(repr, numbers))}.")
            self._scale(size)

    def draw(self, rows: pd.Series | slice = slice(None), **style: Any) -> Any:
        """Draw some features, the large ones first, so that they hide none."""
        areas = self.areas[rows].sort_values(ascending=False, kind="stable")
        table = self.table.loc[areas.index]
        if isinstance(style.get("c"), pd.Series):
            style["c"] = style["c"][areas.index]
        style = {"linewidth": 0, "rasterized": len(self.table) > 2_000, **style}
        return self.ax.scatter(table["map_x"], table["map_y"], s=areas, **style)

    def _scale(self, size: str) -> None:
        """Let areas grow with a column, and show three of them above the Axes."""
        from matplotlib.legend import Legend

        values = self.table[size].astype(np.float64)
        low, high = values.min(), values.max()
        by_logarithm = bool(0 < WIDE * low < high)
        ends = [low, high]
        if not high > low:
            return

        def area(value: Any) -> Any:
            position = np.log(value / low) / np.log(high / low) if by_logarithm else (value - low) / (high - low)
            return self._large * (0.15 + 0.85 * position)

        self.areas = area(values).fillna(self._large * 0.15)
        ends.insert(1, np.sqrt(low * high) if by_logarithm else (low + high) / 2)
        unit, factor = (" %", 100) if size == "density" else ("", 1)
        title = {"density": "active in", "mean": "mean activation"}.get(size, literal(size.replace("_", " ")))
        handles = [self.ax.scatter([], [], s=0)]
        handles += [self.ax.scatter([], [], s=area(value), color=GREY, linewidth=0) for value in ends]
        # Axes.legend makes the only one of its Axes, which is the one of the colours.
        key = Legend(
            self.ax,
            handles,
            [title, *(f"{value * factor:.2g}{unit}" for value in ends)],
            ncols=4,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            frameon=False,
            fontsize="x-small",
            columnspacing=0.8,
            handletextpad=0.1,
            borderaxespad=0.1,
        )
        self.ax.add_artist(key).set_clip_on(False)

    def number(self, modules: list[str]) -> None:
        """Write the number of each module above the feature nearest to its middle."""
        from matplotlib.patheffects import withStroke

        for module in modules:
            places = self.table.loc[self.table["module"] == module, ["map_x", "map_y"]].to_numpy()
            distance = np.linalg.norm(places - np.median(places, axis=0), axis=1)
            self.ax.annotate(
                module,
                places[distance.argmin()],
                (0, np.sqrt(self._large) / 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize="small",
                fontweight="bold",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )

    def legend(self, handles: list[Any], labels: list[str], ncols: int, title: str | None = None) -> None:
        """Write the legend below the Axes, and make room for it in a figure of our own."""
        if self._own:
            n_lines = -(-len(labels) // ncols) + (title is not None)
            cast("Figure", self.ax.figure).set_size_inches(COLUMN, HEIGHT + LINE_HEIGHT * n_lines)
        self.ax.legend(
            handles,
            labels,
            title=title,
            ncols=ncols,
            loc="upper left",
            bbox_to_anchor=(-0.12, 0),
            frameon=False,
            fontsize="x-small",
            title_fontsize="x-small",
            alignment="left",
            labelspacing=0.3,
            columnspacing=0.8,
            handletextpad=0.2,
            borderaxespad=3,
        )

    def handle(self, **style: Any) -> Any:
        """Return a dot for the legend."""
        return self.ax.scatter([], [], s=20, **{"linewidth": 0, **style})
