"""Known variables of the cells, from wherever a user keeps them: columns of numbers, each with a group and a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from ._data import Holder, is_mudata, joint_keys, listing
from ._lazy import column as read_column
from ._lazy import loaded
from .core.rows import varying_columns

MAX_LABELS = 1_000

Source: TypeAlias = "str | np.ndarray | sparse.spmatrix | pd.Series | pd.DataFrame"
"""A key of `obsm` or a column of `obs`, or values with a row per cell."""
Asked: TypeAlias = "Source | Sequence[str] | Mapping[str, Source]"


@dataclass(frozen=True)
class Variables:
    """Variables of n cells.

    Attributes
    ----------
    values
        (n, p) numbers; 0 and 1 for a label of a categorical variable.
    group, name
        (p,) strings.
    label
        (p,) whether it is a label of a categorical variable.
    """

    values: np.ndarray
    group: np.ndarray
    name: np.ndarray
    label: np.ndarray

    def varying(self, argument: str) -> np.ndarray:
        """Mark the variables (p,) that are not the same in all cells, warning of others in the log."""
        from scanpy import logging as logg

        varies = varying_columns(self.values)
        if not varies.any():
            raise ValueError(
                f"{argument}= has no variable that differs between the {len(self.values)} cells: there is nothing to find."
            )
        if not varies.all():
            logg.warning(
                f"{(~varies).sum()} of {len(varies)} variables of {argument}= are the same in all cells "
                f"({listing(self.name[~varies], 5)}): their scores are NaN, and count in no mean."
            )
        return varies


def variables(held: Holder, asked: Asked, argument: str) -> Variables:
    """Read variables of the cells of a holder: numbers as they are, of a categorical or string column each label.

    Parameters
    ----------
    asked
        A key of `obsm`, a column of `obs`, several of these, an array or table with a row per cell (a table is brought into
        the order of `obs_names`), or a mapping from names of groups to these.
    argument
        The parameter that it came from, for messages; it names the group of an array.
    """
    asked = loaded(asked)
    if not isinstance(asked, Iterable) and not hasattr(asked, "__array__"):
        raise TypeError(
            f"{argument}={asked!r} is a {type(asked).__name__}; expected a key of obsm, a column of obs, several of these, or "
            "values with a row per cell."
        )
    if isinstance(asked, Mapping):
        groups = {f"{argument}[{name!r}]": (str(name), one) for name, one in asked.items()}
    elif isinstance(asked, str) or hasattr(asked, "__array__") or sparse.issparse(asked):
        groups = {f"{argument}=": (asked if isinstance(asked, str) else argument, asked)}
    else:
        groups = {
            f"{argument}[{number}]": (one if isinstance(one, str) else f"{argument}_{number}", one)
            for number, one in enumerate(asked)
        }
    if not groups:
        raise ValueError(f"{argument}= is empty. Pass a key of obsm, a column of obs, or values with a row per cell.")
    parts = [_read(held, source, group, place) for place, (group, source) in groups.items()]
    return Variables(
        *(np.concatenate(both, axis=-1) for both in zip(*(vars(one).values() for one in parts), strict=True))
    )


def _read(held: Holder, source: Any, group: str, place: str) -> Variables:
    if isinstance(source, str):
        source, place = _stored(held, source, place)
    source = loaded(source)
    if isinstance(source, pd.Series):
        source = source.to_frame(group if source.name is None else source.name)
    if isinstance(source, pd.DataFrame):
        columns = _columns(held, source, group, place)
    else:
        columns = _array(source, group, place)
    n_cells = held.data.n_obs
    values = np.column_stack([values for values, _, _ in columns]) if columns else np.empty((n_cells, 0))
    if len(values) != n_cells or values.shape[1] == 0:
        raise ValueError(
            f"{place} has the shape {values.shape}; expected a row for each of the {n_cells} cells, and a column at least."
        )
    n_bad = int((~np.isfinite(values)).any(axis=1).sum())
    if n_bad:
        raise ValueError(
            f"{place} is missing, NaN or infinite for {n_bad} of the {n_cells} cells. Fill it in, or leave these cells out: "
            f"{held.where}[known].copy()."
        )
    p = values.shape[1]
    names = np.array([name for _, name, _ in columns], dtype=object)
    return Variables(values, np.full(p, group, dtype=object), names, np.array([label for _, _, label in columns]))


Column: TypeAlias = tuple[np.ndarray, str, bool]
"""Values, name, and whether it is a label."""


def _stored(held: Holder, name: str, place: str) -> tuple[Any, str]:
    """Find what a name means: a column of `obs`, or a key of `obsm`."""
    data, where = held.data, held.where
    keys = joint_keys(data) if is_mudata(data) else list(data.obsm)
    columns = data.obs.columns
    if name in columns and name in keys:
        raise ValueError(
            f"{name!r} is in {where}.obs and in {where}.obsm. Pass the one that you mean: {where}.obs[{name!r}], say."
        )
    if name in columns:
        return read_column(data.obs, name), f"{where}.obs[{name!r}]"
    if name in keys:
        return data.obsm[name], f"{where}.obsm[{name!r}]"
    raise KeyError(
        f"{place} {name!r} is neither in {where}.obs, which has {listing(columns)}, nor in {where}.obsm, which has "
        f"{listing(keys)}. Pass one of them, or values with a row per cell."
    )


def _columns(held: Holder, table: pd.DataFrame, group: str, place: str) -> list[Column]:
    """Read a table, its rows matched to the cells by name."""
    names = held.data.obs_names
    if not table.index.equals(names):
        if not table.index.is_unique or not names.is_unique:
            raise ValueError(f"{place} cannot be matched to the cells: names of cells occur more than once.")
        lacking = names.difference(table.index, sort=False)
        if len(lacking):
            raise ValueError(
                f"{place} has no rows for {len(lacking)} of the {len(names)} cells ({listing(lacking, 3)}). Name its rows by "
                "obs_names, or pass an array."
            )
        table = table.loc[names]
    found: list[Column] = []
    for name, column in table.items():
        if pd.api.types.is_numeric_dtype(column) and not isinstance(column.dtype, pd.CategoricalDtype):
            found.append((column.to_numpy(dtype=np.float64, na_value=np.nan), str(name), False))
            continue
        if column.isna().any():
            raise ValueError(
                f"{place} is missing, NaN or infinite for {int(column.isna().sum())} of the {len(names)} cells. Fill it in, or "
                f"leave these cells out: {held.where}[known].copy()."
            )
        labels = pd.Categorical(column).remove_unused_categories()
        if len(labels.categories) > MAX_LABELS:
            raise ValueError(
                f"{place} has {len(labels.categories)} different values in {name!r}; labels can be up to {MAX_LABELS}. Pass "
                "numbers as numbers, or a column of cell types, conditions or the like."
            )
        alone = len(table.columns) == 1
        for code, label in enumerate(labels.categories):
            found.append((labels.codes == code, str(label) if alone else f"{name}: {label}", True))
    return found


def _array(source: Any, group: str, place: str) -> list[Column]:
    values = source.toarray() if sparse.issparse(source) else np.asarray(source)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise TypeError(
            f"{place} is an array of {values.dtype} of shape {values.shape}; expected numbers, cells × variables. Pass labels as "
            "a categorical column of obs or a pandas Series."
        )
    names = [group] if values.shape[1] == 1 else [f"{group}_{number}" for number in range(values.shape[1])]
    return [(column, name, False) for column, name in zip(values.T, names, strict=True)]
