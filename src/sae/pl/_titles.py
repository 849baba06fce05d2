from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .. import get
from .._names import names, set_text, shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._data import Data

WIDTH = 60


def titles(data: Data, features: Sequence[str], *, key: str, mod: str | None) -> list[str]:
    """Write a title per feature: its row in the table and, below, its name where something is known of it."""
    table = get.features(data, key=key, mod=mod)
    if "name" not in table:
        table = names(data, key=key, mod=mod)
    named = table["name"].astype(str)
    return [feature if named[feature] == feature else f"{feature}\n{named[feature]}" for feature in features]


def set_titles(gene_sets: Sequence[str]) -> list[str]:
    """Write gene sets as in the names of features, cut when they are long, unless two would read the same."""
    whole = [set_text(name) for name in gene_sets]
    cut = [shorten(text, WIDTH) for text in whole]
    repeated = Counter(cut)
    return [long if repeated[short] > 1 else short for long, short in zip(whole, cut, strict=True)]
