"""How an SAE was trained, and what was encoded with it."""

from __future__ import annotations

import copy
from typing import Any

from .. import _schema
from .._data import Data, holder


def params(data: Data, *, encoded: bool = False, key: str = "sae", mod: str | None = None) -> dict[str, Any]:
    """Return the settings of an SAE, and how well it reconstructs.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.
    encoded
        With `True`, of the cells that `tl.encode` encoded instead.

    Returns
    -------
    A copy of `uns[key]["params"]` (architecture, `n_features`, what it was trained on, the seed, `fvu`, `l0`, ...), or of
    `uns[key]["encoded"]` (`n_obs`, what was encoded, `fvu`, `l0`).

    Raises
    ------
    KeyError
        There is no SAE of this name, or nothing was encoded with it.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.get.params(adata)["use_rep"]
    'X_pca'
    """
    held = holder(data, mod)
    stored = _schema.read(held, key)
    if encoded and "encoded" not in stored:
        raise KeyError(f"Nothing was encoded with {key!r} of {held.where}. Run sae.tl.encode(..., key={key!r}) first.")
    return copy.deepcopy(dict(stored["encoded" if encoded else "params"]))
