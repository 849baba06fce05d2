from __future__ import annotations

import contextlib
import re
import textwrap
from typing import TYPE_CHECKING

from .. import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._data import Data

MAX_PADJ = 0.05
WIDTH = 36
IDENTIFIER = re.compile(r"\s*\([A-Za-z_]+:\w+\)$")


def titles(data: Data, features: Sequence[str], *, key: str, mod: str | None) -> list[str]:
    """Write a title per feature: its name and, below it, its top gene set, or else its best label."""
    meaning: dict[str, str] = {}
    with contextlib.suppress(KeyError):
        best = get.labels(data, list(features), max_padj=MAX_PADJ, n=1, key=key, mod=mod)
        best = best[best["auroc"] > 0.5]
        meaning |= dict(zip(best["feature"], best["label"], strict=True))
    with contextlib.suppress(KeyError):
        best = get.enrichment(data, list(features), direction="up", max_padj=MAX_PADJ, n=1, key=key, mod=mod)
        meaning |= dict(zip(best["feature"], best["gene_set"], strict=True))
    return [f"{name}\n{shorten(meaning[name])}" if name in meaning else name for name in features]


def shorten(name: str) -> str:
    """Drop the identifier behind a name, and cut a long one at a word."""
    name = IDENTIFIER.sub("", name)
    return textwrap.shorten(name, WIDTH, placeholder=" ...") if len(name) > WIDTH else name
