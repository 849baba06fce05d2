"""Settings and tables as JSON, and back as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

from .._data import listing

SPECIAL = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf}
"""Numbers that JSON lacks, as R writes them."""
INTEGERS, FLOATS = (
    ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    ("float16", "float32", "float64"),
)
MOST_AXES = 8
OTHERS = "Remove it, or write the whole object with write_h5ad."


def from_params(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Write text, numbers, None and arrays; a number that JSON lacks becomes an array without axes."""
    return {_name(name, where): _from_value(value, f"{where} {name!r}") for name, value in params.items()}


def _from_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    array = np.asarray(value)
    if not isinstance(value, Real | np.ndarray):
        raise TypeError(f"{where} is a {type(value).__name__}, which cannot be written. {OTHERS}")
    return {**_from_values(array.ravel(), where), "shape": list(array.shape)}


def _from_values(values: np.ndarray, where: str) -> dict[str, Any]:
    kind = str(values.dtype)
    if kind in FLOATS:
        return {"type": kind, "values": [_from_float(value) for value in values.tolist()]}
    if kind == "bool" or kind in INTEGERS:
        return {"type": kind, "values": values.tolist()}
    if values.dtype.kind in "OUT" and all(isinstance(value, str) for value in values):
        return {"type": "text", "values": [str(value) for value in values]}
    raise TypeError(f"{where} has the type {kind}, which cannot be written. {OTHERS}")


def _from_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def to_params(found: object, where: str) -> dict[str, Any]:
    """Read what `from_params` wrote."""
    return {_name(name, where): _to_value(value, f"{where} {name!r}") for name, value in _object(found, where).items()}


def _to_value(value: Any, where: str) -> Any:
    if not isinstance(value, dict | list):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError(f"{where} is an integer of more than 64 bits.")
        return value
    found = _object(value, where, {"type", "values", "shape"})
    values, shape = _to_values(found, where), found["shape"]
    fits = isinstance(shape, list) and all(type(n) is int and 0 <= n <= max(len(values), 1) for n in shape)
    if not fits or math.prod(shape) != len(values) or len(shape) > MOST_AXES:
        raise ValueError(f"{where} has the shape {str(shape)[:50]}, which its {len(values)} values do not have.")
    return values.reshape(shape) if shape else values.item()


def _to_values(found: Mapping[str, Any], where: str) -> np.ndarray:
    kind, values = found["type"], found["values"]
    if not isinstance(values, list):
        raise ValueError(f"{where} has a {type(values).__name__} in the place of a list of values.")
    if kind in FLOATS:
        _all(values, where, kind, lambda value: type(value) is float or (isinstance(value, str) and value in SPECIAL))
        exact = np.array([SPECIAL[value] if isinstance(value, str) else value for value in values], dtype=np.float64)
        with np.errstate(over="ignore"):
            found_as = exact.astype(kind)
        if not np.array_equal(found_as, exact, equal_nan=True):
            raise ValueError(f"{where} has values that are none of type {kind}.")
        return found_as
    if kind in INTEGERS:
        limits = np.iinfo(kind)
        _all(values, where, kind, lambda value: type(value) is int and limits.min <= value <= limits.max)
        return np.array(values, dtype=kind)
    if kind == "bool":
        _all(values, where, kind, lambda value: type(value) is bool)
        return np.array(values, dtype=bool)
    if kind == "text":
        _all(values, where, kind, lambda value: isinstance(value, str))
        return np.array(values, dtype=object)
    raise ValueError(f"{where} has the type {str(kind)[:50]!r}, which is none that sae writes.")


def _all(values: list[Any], where: str, kind: str, fits: Callable[[Any], bool]) -> None:
    wrong = [value for value in values if not fits(value)]
    if wrong:
        raise ValueError(f"{where} has {str(wrong[0])[:50]!r} among values of type {kind}.")


def from_table(table: pd.DataFrame, where: str) -> dict[str, Any]:
    """Write the columns of a table, in their order; its index is left out."""
    return {_name(name, where): _from_column(table[name], f"{where} {name!r}") for name in table}


def _from_column(column: pd.Series, where: str) -> dict[str, Any]:
    if isinstance(column.dtype, pd.CategoricalDtype):
        categories = _from_values(column.cat.categories.to_numpy(dtype=object), where)["values"]
        values = [None if value is None else categories[value] for value in _missing(column.cat.codes)]
        return {"type": "category", "values": values, "categories": categories, "ordered": bool(column.cat.ordered)}
    if column.dtype.kind in "biuf":
        return _from_values(column.to_numpy(), where)
    values = [None if pd.isna(value) else value for value in column]
    _from_values(np.array([value for value in values if value is not None], dtype=object), where)
    return {"type": "text", "values": values}


def _missing(codes: pd.Series) -> list[int | None]:
    return [None if code < 0 else code for code in codes.tolist()]


def to_table(found: object, n_rows: int | None, where: str) -> pd.DataFrame:
    """Read what `from_table` wrote, with `n_rows` rows (None for any), numbered from 0."""
    columns = {
        _name(name, where): _to_column(column, f"{where} {name!r}") for name, column in _object(found, where).items()
    }
    lengths = {len(column) for column in columns.values()}
    if n_rows is not None:
        lengths.add(n_rows)
    if len(lengths) > 1:
        expected = "all the same" if n_rows is None else f"{n_rows} in each"
        raise ValueError(
            f"{where} has columns of {' and '.join(map(str, sorted(lengths)[:3]))} rows; expected {expected}."
        )
    return pd.DataFrame(columns, index=pd.RangeIndex(max(lengths, default=0)))


def _to_column(value: object, where: str) -> Any:
    found = _object(value, where)
    if found.get("type") == "category":
        found = _object(found, where, {"type", "values", "categories", "ordered"})
        categories = _to_values({"type": "text", "values": found["categories"]}, where)
        if len(set(categories)) < len(categories) or type(found["ordered"]) is not bool:
            raise ValueError(f"{where} has categories that occur twice, or does not say whether they are ordered.")
        values = _with_missing(found["values"], where)
        unknown = set(values) - set(categories) - {None}
        if unknown:
            raise ValueError(f"{where} has {listing(sorted(unknown), 3)}, none of its categories.")
        return pd.Categorical(values, categories=categories, ordered=found["ordered"])
    found = _object(found, where, {"type", "values"})
    return _with_missing(found["values"], where) if found["type"] == "text" else _to_values(found, where)


def _with_missing(values: object, where: str) -> np.ndarray:
    """Check text of which some may be missing."""
    known = [value for value in values if value is not None] if isinstance(values, list) else values
    _to_values({"type": "text", "values": known}, where)
    return np.array(values, dtype=object)


def _object(value: object, where: str, names: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; expected an object.")
    if names is not None and set(value) != names:
        raise ValueError(f"{where} has {sorted(value)[:8]}; expected {sorted(names)}.")
    return value


def _name(name: object, where: str) -> str:
    """Refuse names that h5ad and zarr would take for the path to something else."""
    if not isinstance(name, str) or not name or "/" in name or set(name) <= {"."}:
        raise ValueError(f"{where} has the name {str(name)[:50]!r}; expected text without '/'.")
    return name
