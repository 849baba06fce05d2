from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import get
from .._names import names, set_text, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._data import Data

SET_WIDTH, LABEL_WIDTH = 60, 26
"""Of the names of gene sets and of labels, in characters."""


def literal(text: str) -> str:
    """Escape dollar signs, between which matplotlib would read mathematics."""
    return text.replace("$", r"\$")


def titles(data: Data, features: Sequence[str], *, key: str, mod: str | None) -> list[str]:
    """Write a title per feature: its row in the table and, below, its name where something is known of it."""
    table = get.features(data, key=key, mod=mod)
    if "name" not in table:
        table = names(data, key=key, mod=mod)
    named = table["name"].astype(str)
    texts = (feature if named[feature] == feature else f"{feature}\n{named[feature]}" for feature in features)
    return [literal(text) for text in texts]


def set_titles(gene_sets: Sequence[str]) -> list[str]:
    """Write gene sets as in the names of features, cut when they are long, unless two would read the same."""
    return short_labels([set_text(name) for name in gene_sets], SET_WIDTH)


def short_labels(names: Sequence[str], width: int = LABEL_WIDTH) -> list[str]:
    """Cut names when they are long, unless two would read the same."""
    cut = [shorten(name, width) for name in names]
    repeated = Counter(cut)
    return [literal(name if repeated[short] > 1 else short) for name, short in zip(names, cut, strict=True)]
