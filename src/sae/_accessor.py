"""`adata.sae`: the same functions, called on the object."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import anndata as ad

from . import _schema, get, pl, tl
from .report import report


class Methods:
    """Functions on data, as methods of the data."""

    def __init__(self, adata: ad.AnnData):
        self._data = adata


def _methods(name: str, functions: dict[str, Callable[..., Any]], doc: str | None) -> type[Methods]:
    return type(name, (Methods,), {"__doc__": doc, **{key: _method(f) for key, f in functions.items()}})


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the object take the place of the first argument; the rest of the signature and the docstring stay."""

    @functools.wraps(function)
    def method(self: Methods, *args: Any, **kwargs: Any) -> Any:
        return function(self._data, *args, **kwargs)

    return method


def _on_data(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Choose the functions whose first argument is data."""
    functions = {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    return {name: f for name, f in functions.items() if next(iter(inspect.signature(f).parameters)) in ("data", "a")}


Results = _methods("Results", _on_data(get), get.__doc__)
Figures = _methods("Figures", _on_data(pl), pl.__doc__)
Verbs = _methods("Verbs", {**_on_data(tl), "report": report}, tl.__doc__)


@ad.register_anndata_namespace("sae")
class Accessor(Verbs):  # type: ignore[misc,valid-type]
    """`sae` as methods of an AnnData: verbs as they are, `pl` and `get` under their names.

    `adata.sae.fit()` is `sae.tl.fit(adata)`, `adata.sae.pl.history()` is `sae.pl.history(adata)`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> adata.sae.fit(n_features=32, steps=200)
    >>> adata.sae.encode()
    >>> adata.sae.get.features().shape
    (32, 5)
    """

    def __init__(self, adata: ad.AnnData):
        super().__init__(adata)
        self.get = Results(adata)
        self.pl = Figures(adata)

    def __repr__(self) -> str:
        stored = {key: self._data.uns[key] for key in _schema.stored_keys(self._data.uns)}
        held = [f"    {key!r}: {sae['params']['n_features']} features; {', '.join(sae)}" for key, sae in stored.items()]
        return "\n".join(["SAEs:" if held else "No SAEs: adata.sae.fit() trains one.", *held])
