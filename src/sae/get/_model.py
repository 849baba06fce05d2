"""The SAE itself: its weights, and how they were trained."""

from __future__ import annotations

import copy

import pandas as pd

from .. import _schema
from .._data import Data, holder
from ..core.autoencoder import Autoencoder


def model(data: Data, *, key: str = "sae", mod: str | None = None) -> Autoencoder:
    """Return the SAE as plain arrays that can encode and decode.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> model = sae.get.model(adata)
    >>> activations = model.encode(adata.obsm["X_pca"]).activations
    >>> model.decode(activations).shape
    (700, 50)
    """
    return copy.deepcopy(_schema.model(_schema.read(holder(data, mod), key)))


def decoder(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the decoder: the direction of each feature in the representation.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Returns
    -------
    `W_dec` (features × columns of the representation), in units of the representation.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.get.decoder(adata).loc["sae_3"].shape
    (50,)
    """
    stored = _schema.read(holder(data, mod), key)
    directions, params = stored["weights"]["W_dec"], stored["params"]
    names = stored["weights"].get("input_names")
    if names is None:
        names = [f"{params['layer'] or params['use_rep']}_{i}" for i in range(directions.shape[1])]
    return pd.DataFrame(directions.copy(), index=_schema.feature_names(key, len(directions)), columns=list(names))


def history(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the training history, a row per record.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Returns
    -------
    `step`, `learning_rate`, `loss` (of the batch), `fvu`, `l0` (of up to 2,048 training cells), `dead_fraction` (features
    not active for two passes), `val_fvu`, `val_l0` (of up to 2,048 held-out cells).

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> int(sae.get.history(adata)["step"].iloc[-1])
    200
    """
    return _schema.table(holder(data, mod), key, "history").reset_index(drop=True)
