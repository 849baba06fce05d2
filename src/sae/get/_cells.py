"""Activations and embeddings of the cells."""

from __future__ import annotations

from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, holder, is_mudata, joint_keys, listing
from .._lazy import loaded
from .._schema import Features
from ..core.rows import Matrix, dense_rows, on_disk, pieces
from ._features import features

BLOCK_ROWS = 65_536


def activations(data: Data, feature: Features = None, *, key: str = "sae", mod: str | None = None) -> ad.AnnData:
    """Return the activations as an AnnData of their own, cells × features, for the rest of Scanpy.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`.
    feature
        A feature or several, by name or number; by default all.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.

    Returns
    -------
    An AnnData with the activations (CSR) as `X`, the cells' `obs`, the feature table as `var`, and the cells' `obsm` without
    `X_pca`, which Scanpy would take for the principal components of `X`; what is on disk there stays on disk. Pass `use_rep="X"` to `sc.pp.neighbors` to compute
    neighbors on the activations themselves.

    Raises
    ------
    KeyError
        There are no activations under this key, or no such feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.get.activations(adata).shape
    (700, 32)
    """
    held = holder(data, mod)
    a = _schema.activations(held, key)
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    uns = {name: loaded(value) for name, value in held.data.uns.items() if name.endswith("_colors")}
    var = features(data, key=key, mod=mod)
    chosen = _schema.resolve(feature, var.index, var.get("name"))
    found = ad.AnnData(X=some_columns(a, chosen), obs=loaded(held.data.obs), var=var.iloc[chosen], uns=uns).copy()
    for name in keys:
        if name not in (key, "X_pca"):
            found.obsm[name] = _copied(held.data.obsm[name])
    return found


def some_columns(a: Matrix, positions: np.ndarray) -> sparse.csr_matrix:
    """Return the activations (n, h) of some features in memory; the others are not kept if they are on disk."""
    if not on_disk(a):
        return a[:, positions]
    parts = (sparse.csr_matrix(part[:, positions]) for _, part in pieces(a, BLOCK_ROWS))
    return sparse.vstack([sparse.csr_matrix((0, len(positions)), dtype=a.dtype), *parts], format="csr")


def _copied(value: Any) -> Any:
    """Copy what is in memory; what is on disk is left there."""
    return value.copy() if isinstance(value, pd.DataFrame) or not on_disk(value) else value


def embedding(data: Data, basis: str = "umap", *, mod: str | None = None) -> pd.DataFrame:
    """Return the first two coordinates of the cells in an embedding, to plot on.

    Parameters
    ----------
    data, mod
        As in :func:`sae.get.activations`.
    basis
        Key of `obsm`, with or without `X_`.

    Returns
    -------
    Cells × 2, columns named after the basis.

    Raises
    ------
    KeyError
        There is no such embedding.
    ValueError
        It has fewer than two columns.

    Examples
    --------
    >>> import sae
    >>> sae.get.embedding(sae.datasets.pbmc68k(), "umap").columns.tolist()
    ['UMAP1', 'UMAP2']
    """
    held = holder(data, mod)
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    found = next((name for name in (basis, f"X_{basis}") if name in keys), None)
    if found is None:
        raise KeyError(
            f"{held.where}.obsm has no {basis!r} or 'X_{basis}'; it has {listing(keys)}. Pass one as basis=."
        )
    stored = held.data.obsm[found]
    if len(stored.shape) != 2 or stored.shape[1] < 2:
        raise ValueError(
            f"{held.where}.obsm[{found!r}] has the shape {stored.shape}; two columns are needed to plot on. "
            "Pass another basis=."
        )
    x = stored.to_numpy() if isinstance(stored, pd.DataFrame) else stored
    parts = (dense_rows(part[:, :2], slice(None)) for _, part in pieces(x, BLOCK_ROWS))
    coordinates = np.concatenate([np.empty((0, 2), x.dtype), *parts])
    name = found.removeprefix("X_").upper()
    return pd.DataFrame(coordinates, index=held.data.obs_names, columns=[f"{name}{i + 1}" for i in range(2)])
