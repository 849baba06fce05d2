"""Choosing rows of a table, and their order."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from .._schema import Features


def check_direction(direction: str | None, *more: str) -> None:
    """Refuse a direction that is neither "up", "down" nor one of those that are named."""
    known = ("up", "down", *more)
    if direction is not None and direction not in known:
        raise ValueError(f"direction={direction!r} is neither {' nor '.join(map(repr, known))}.")


def of(table: pd.DataFrame, column: str, wanted: str | None) -> pd.DataFrame:
    """Keep the rows with a value, or say which values there are."""
    if wanted is None:
        return table
    known = table[column].cat.categories if column in table else pd.Index([])
    if wanted not in known:
        raise KeyError(f"There are no results for the {column} {wanted!r}; there are for {listing(known)}.")
    return table[table[column] == wanted]


def rows_of(table: pd.DataFrame, feature: Features, data: Data, key: str, mod: str | None) -> pd.DataFrame:
    """Keep the rows of some features."""
    if feature is None:
        return table
    known = _schema.features(holder(data, mod), key)
    return table[table["feature"].isin(known.index[_schema.resolve(feature, known.index, known.get("name"))])]


def in_order(table: pd.DataFrame, by: Sequence[str], ascending: Sequence[bool], max_padj: float | None) -> pd.DataFrame:
    """Keep the significant rows, best first."""
    if max_padj is not None:
        table = table[table["padj"] <= max_padj]
    return table.sort_values(list(by), ascending=list(ascending), kind="stable")


def head(table: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Keep the first `n` rows of each feature."""
    if n is not None:
        table = table[table.groupby("feature", observed=True).cumcount() < n]
    return plain(table)


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """Number the rows, and drop categories without any."""
    categorical = table.select_dtypes("category").columns
    table = table.assign(**{name: table[name].cat.remove_unused_categories() for name in categorical})
    return table.reset_index(drop=True)
