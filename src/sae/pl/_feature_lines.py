"""What the tables say of one feature, in lines of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import get
from .._names import label_text, set_text, shorten
from ._style import GREY
from ._titles import literal, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .._data import Data

LABEL_WIDTH, LINE_WIDTH = 24, 40
"""Letters of a name, and of a whole line."""


def stored(read: Callable[..., pd.DataFrame], *args: Any, asked: bool, **settings: Any) -> pd.DataFrame | None:
    """Read a table; None where there is none, unless it was asked for."""
    try:
        return read(*args, **settings)
    except KeyError:
        if asked:
            raise
        return None


def draw_lines(ax: Axes, lines: Sequence[tuple[str, str]]) -> None:
    """Write lines of a heading and a text each."""
    ax.set_axis_off()
    for row, (heading, text) in enumerate(lines):
        y = 1 - (row + 0.5) / max(len(lines), 9)
        ax.text(0, y, heading, va="center", fontsize="small", color=GREY)
        ax.text(0.24, y, text, va="center", fontsize="small")


def lines_of(
    data: Data, name: str, row: pd.Series, n: int, activation: np.ndarray, where: dict[str, Any]
) -> list[tuple[str, str]]:
    """Tell a feature in lines of a heading and a text."""
    if not len(activation):
        return [("active in", f"none of {n:,} cells (dead)")]
    lines = [
        ("active in", f"{len(activation):,} cells ({100 * len(activation) / n:.2g} %)"),
        ("activation", f"mean {activation.mean():.3g} where active, highest {activation.max():.3g}"),
    ]
    lines += [(heading, literal(text)) for heading, text in _evidence(row)]
    found = stored(get.neighbors, data, name, asked=False, n=3, **where)
    if found is None:
        return lines
    lines += [("module", str(row["module"]))] if isinstance(row["module"], str) else []
    names = [" ".join(title.split("\n")[1:]) for title in titles(data, found["neighbor"].tolist(), **where)]
    similar = [f"{other} ({value:.2f}) {name}" for (other, value), name in zip(
        found[["neighbor", "similarity"]].itertuples(index=False), names, strict=True
    )]  # fmt: skip
    headings = ["similar", *[""] * len(similar)]
    return lines + [(heading, shorten(text, LINE_WIDTH)) for heading, text in zip(headings, similar, strict=False)]


def _evidence(row: pd.Series) -> list[tuple[str, str]]:
    """Tell what a name rests on."""
    if row.get("name_from") is None or row["name_from"] == "none":
        return []
    lines = [("named", f"by {row['name_from']}")]
    if isinstance(row["name_label"], str):
        label = shorten(label_text(row["name_label"], str(row["name_groupby"])), LABEL_WIDTH)
        lines.append(("label", f"{label} (held-out AUROC {row['name_label_auroc']:.2f})"))
    if isinstance(row["name_gene_set"], str):
        text = shorten(set_text(row["name_gene_set"]), LABEL_WIDTH)
        lines.append(("gene set", f"{text} (padj {row['name_gene_set_padj']:.1g})"))
    if isinstance(row["name_genes"], str):
        lines.append(("genes", shorten(", ".join(row["name_genes"].split(";")[:5]), LINE_WIDTH)))
    return lines
