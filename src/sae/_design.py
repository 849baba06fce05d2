"""From columns of `obs` to what statistics take account of: labels, covariates, batches and donors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ._data import Holder, listing
from ._lazy import column as read_column

MAX_CATEGORIES = 1_000
MAX_LABELS = 1_000


def codes(held: Holder, column: str, rows: np.ndarray | slice, argument: str, *, least: int = 1) -> np.ndarray:
    """Number the batches or donors of some cells, 0, 1, ..., as a column of `obs` names them.

    Parameters
    ----------
    rows
        The cells.
    argument
        The parameter that names the column, for messages.
    least
        Different values that it needs.
    """
    values, place = _values(held, column, rows, argument)
    if pd.api.types.is_float_dtype(values):
        other = ", or a continuous one as one of covariates= of method='regression'" if argument == "batch" else ""
        raise ValueError(f"{place} is continuous ({values.dtype}). Pass a column of names as {argument}={other}.")
    found, names = pd.factorize(values)
    _refuse_many(len(names), place)
    if len(names) < least:
        raise ValueError(
            f"{place} has {len(names)} different values ({listing(names)}) among the {len(values)} cells; {argument}= needs "
            f"{least}. Leave it out, or pass another column."
        )
    return found


def label_column(obs: Any, groupby: str, where: str) -> pd.Categorical:
    """Read a column of labels, with unused categories dropped."""
    if not isinstance(groupby, str) or groupby not in obs.columns:
        raise KeyError(f"{where}.obs has no column {groupby!r}; it has {listing(obs.columns)}.")
    column = read_column(obs, groupby)
    if pd.api.types.is_float_dtype(column):
        raise ValueError(
            f"{where}.obs[{groupby!r}] is continuous ({column.dtype}). Pass a column of labels, or make one with pd.cut."
        )
    labels = pd.Categorical(column).remove_unused_categories()
    if len(labels.categories) > MAX_LABELS:
        raise ValueError(
            f"{where}.obs[{groupby!r}] has {len(labels.categories)} different values; labels can be up to {MAX_LABELS}. "
            "Pass a column of cell types, conditions or the like."
        )
    if not labels.categories.astype(str).is_unique:
        raise ValueError(
            f"{where}.obs[{groupby!r}] has labels that read the same as text ({listing(labels.categories)}). Rename them."
        )
    if len(labels.categories) < 2:
        found = f"only one label ({listing(labels.categories)})" if len(labels.categories) else "no labels"
        raise ValueError(
            f"{where}.obs[{groupby!r}] has {found}; a feature can only be told from another label: two are needed."
        )
    return labels


def ordered_labels(order: Sequence[str], names: pd.Index, where: str, *, least: int = 1) -> list[str]:
    """Return labels in the order of a process; refuse too few, some that no cell has, and one that is named twice."""
    if isinstance(order, str) or len(order) < least:
        some = "two or more labels" if least == 2 else "labels"
        raise ValueError(f"order={order!r} is not a list of {some}. {where} has {listing(names)}.")
    wanted = pd.Index(order).astype(str)
    unknown = wanted[~wanted.isin(names)]
    if len(unknown):
        raise ValueError(f"order= has labels that no cell has: {listing(unknown)}. {where} has {listing(names)}.")
    if not wanted.is_unique:
        raise ValueError(f"order= has {listing(wanted[wanted.duplicated()])} more than once. Name each label once.")
    return wanted.tolist()


def design(held: Holder, columns: Sequence[str], rows: np.ndarray | slice) -> np.ndarray:
    """Make covariates (n, c) of columns of `obs`: numbers and booleans as they are, others 0 or 1 for all categories but one."""
    if isinstance(columns, str):
        raise TypeError(f"covariates={columns!r} is a string; expected a list of columns: [{columns!r}].")
    parts = [np.empty((held.data.n_obs, 0))[rows]]
    for column in columns:
        values, place = _values(held, column, rows, "covariates")
        if pd.api.types.is_numeric_dtype(values):
            parts.append(_numbers(values, place))
        else:
            found, names = pd.factorize(values)
            _refuse_many(len(names), place)
            parts.append(indicators(found))
    return np.hstack(parts)


def indicators(codes: np.ndarray) -> np.ndarray:
    """Mark all categories but the first in columns of their own."""
    return (codes[:, None] == np.arange(1, codes.max(initial=0) + 1)).astype(np.float64)


def _values(held: Holder, column: str, rows: np.ndarray | slice, argument: str) -> tuple[pd.Series, str]:
    """Read a column for some cells, none of which may be missing; also return how to speak of it."""
    obs = held.data.obs
    if column not in obs.columns:
        raise KeyError(
            f"{held.where}.obs has no column {column!r}; it has {listing(obs.columns)}. Pass one of them in {argument}=."
        )
    values, place = read_column(obs, column).iloc[rows], f"{held.where}.obs[{column!r}]"
    missing = int(values.isna().sum())
    if missing:
        raise ValueError(
            f"{place} is missing for {missing} of the {len(values)} cells. Fill it in, or remove these cells."
        )
    return values, place


def _numbers(values: pd.Series, place: str) -> np.ndarray:
    numbers = values.to_numpy(dtype=np.float64)
    n_infinite = int(np.isinf(numbers).sum())
    if n_infinite:
        raise ValueError(f"{place} has {n_infinite} infinite values. Replace them, or remove these cells.")
    return numbers[:, None]


def _refuse_many(n_names: int, place: str) -> None:
    if n_names > MAX_CATEGORIES:
        raise ValueError(
            f"{place} has {n_names} different values; categories can be up to {MAX_CATEGORIES}. Pass a column of batches, "
            "donors or the like."
        )
