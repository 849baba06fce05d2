"""What an SAE must have to be one, whether it comes from a folder or is in an object that others made or changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd

from ._data import listing
from ._lazy import loaded
from .core.architectures import ARCHITECTURES

SCHEMA_VERSION = 1
STATISTICS = ("n_cells", "density", "mean", "max", "dead")
NEEDED: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "n_features": (Integral,),
    "n_obs": (Integral,),
    "variance": (Real,),
    "fvu": (Real,),
    "val_fvu": (Real,),
    "l0": (Real,),
    "val_l0": (Real,),
    "use_rep": (str, type(None)),
    "layer": (str, type(None)),
    "fingerprint": (str,),
    "version": (str,),
}
"""Settings that verbs count on, and their types."""
NEEDED_OF_CELLS = {name: NEEDED[name] for name in ("n_obs", "fvu", "use_rep", "layer", "fingerprint")}
KINDS = {str: "text", Integral: "an integer", Real: "a number", type(None): "None"}


def check_stored(stored: Mapping[str, Any], where: str) -> None:
    """Check what is in `uns[key]` as far as verbs count on it; weights and tables on disk are not read for it."""
    version = loaded(stored.get("schema_version"))
    if not _is(version, (Integral,)) or version < 1:
        raise ValueError(f"{where} has the schema version {str(version)[:50]!r}; expected a number from 1 on.")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{where} has the schema version {version}; this version of sae reads up to {SCHEMA_VERSION}. Update sae."
        )
    params = _mapping(loaded(stored.get("params")), f"{where}['params']")
    weights = _mapping(stored["weights"], f"{where}['weights']")
    check_params(params, where)
    check_shapes(weights, params, where)
    if not hasattr(stored.get("history"), "columns"):
        raise ValueError(
            f"{where} has no table 'history'. Read the object again from its file, or train the SAE again."
        )
    if "features" in stored:
        table, h = stored["features"], params["n_features"]
        fits = set(STATISTICS) <= set(getattr(table, "columns", ())) and table.shape[0] == h
        if fits and isinstance(table, pd.DataFrame):
            fits = table.index.is_unique and all(table[name].dtype.kind in "biuf" for name in STATISTICS)
        if not fits:
            raise ValueError(
                f"{where}['features'] is no table of {h} features with {listing(STATISTICS)}. Run sae.tl.encode again."
            )
    if "encoded" in stored:
        encoded = _mapping(loaded(stored["encoded"]), f"{where}['encoded']")
        _check_types(encoded, NEEDED_OF_CELLS, f"{where}['encoded']")


def check_params(params: Mapping[str, Any], where: str) -> None:
    """Check the settings that verbs count on."""
    _check_types(params, NEEDED, where)
    architecture, h, k = params["architecture"], params["n_features"], params.get("k")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{where} has the architecture {architecture[:50]!r}; known are {listing(ARCHITECTURES)}.")
    if ARCHITECTURES[architecture].activation == "topk" and k is None:
        raise ValueError(f"{where} has a {architecture} SAE without k.")
    if k is not None and (not _is(k, (Integral,)) or not 1 <= k <= h):
        raise ValueError(f"{where} has as k {str(k)[:50]}; expected a number of features up to {h}.")
    # NaN where it is not known, of an SAE of others.
    if params["variance"] <= 0 or math.isinf(params["variance"]):
        raise ValueError(f"{where} has as variance {params['variance']}; expected a number above 0.")


def check_shapes(weights: Mapping[str, Any], params: Mapping[str, Any], where: str) -> None:
    """Check which weights there are, that they are numbers, and that their shapes are those of one SAE."""
    arrays = {name: values for name, values in weights.items() if name != "input_names"}
    h, W_enc = params["n_features"], arrays.get("W_enc")
    if len(_shape(W_enc)) != 2:
        raise ValueError(f"{where} has no matrix 'W_enc'; it has {listing(weights)}.")
    d = _shape(W_enc)[0]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, h), "b_enc": (h,), "W_dec": (h, d), "b_dec": (d,)}
    if ARCHITECTURES[params["architecture"]].activation == "threshold":
        shapes["threshold"] = (h,)
    if "scaling" in arrays:
        shapes["scaling"] = (d, d)[: max(1, len(_shape(arrays["scaling"])))]
    if set(arrays) != set(shapes):
        raise ValueError(f"{where} has the weights {listing(sorted(arrays))}; expected {listing(sorted(shapes))}.")
    for name, shape in shapes.items():
        if _shape(arrays[name]) != shape:
            raise ValueError(f"{where} has {name!r} of the shape {_shape(arrays[name])}; expected {shape}.")
        if arrays[name].dtype.kind != "f":
            raise ValueError(f"{where} has {name!r} of the type {arrays[name].dtype}; expected float32.")
    if d == 0 or h == 0:
        raise ValueError(f"{where} has an SAE of {h} features of {d} inputs.")
    names = weights.get("input_names")
    if names is not None and _shape(names) != (d,):
        n = len(names) if isinstance(names, list | tuple | np.ndarray) and np.ndim(names) else 0
        raise ValueError(f"{where} has {n} names of inputs; the SAE reads {d}.")


def check_values(weights: Mapping[str, Any], where: str) -> None:
    """Check that weights are finite, and thresholds not below 0."""
    for name, values in weights.items():
        if n := 0 if name == "input_names" else int(np.count_nonzero(~np.isfinite(values))):
            raise ValueError(
                f"{where} has {n} NaN or infinite values in {name!r}: the SAE is of no use. Train it again."
            )
    if "threshold" in weights and weights["threshold"].min() < 0:
        raise ValueError(f"{where} has thresholds below 0.")


def _check_types(found: Mapping[str, Any], needed: Mapping[str, tuple[type, ...]], where: str) -> None:
    for name, types in needed.items():
        if name not in found or not _is(found[name], types):
            value = repr(found[name])[:50] if name in found else "none"
            expected = " or ".join(KINDS[kind] for kind in types)
            raise ValueError(f"{where} has as {name} {value}; expected {expected}.")


def _is(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool | np.bool_)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where} is a {type(value).__name__}; expected a dictionary. Read the object again from its file, or train the SAE again."
        )
    return value


def _shape(values: Any) -> tuple[int, ...]:
    """Return the shape of an array, in memory or on disk; of anything else, that of a single value."""
    is_array = isinstance(values, np.ndarray) or type(values).__module__.partition(".")[0] in ("dask", "h5py", "zarr")
    return tuple(values.shape) if is_array else ()
