"""Activations and embeddings of the cells."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, is_mudata, joint_keys, listing
from .._schema import Features
from ._features import features


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
    `X_pca`, which Scanpy would take for the principal components of `X`. Pass `use_rep="X"` to `sc.pp.neighbors` to compute
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
    a = _schema.activations_in_memory(held, key)
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    obsm = {name: held.data.obsm[name] for name in keys if name not in (key, "X_pca")}
    uns = {name: value for name, value in held.data.uns.items() if name.endswith("_colors")}
    var = features(data, key=key, mod=mod)
    chosen = _schema.resolve(feature, var.index, var.get("name"))
    return ad.AnnData(X=a[:, chosen], obs=held.data.obs, var=var.iloc[chosen], obsm=obsm, uns=uns).copy()


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
    coordinates = np.asarray(held.data.obsm[found])
    if coordinates.ndim != 2 or coordinates.shape[1] < 2:
        raise ValueError(
            f"{held.where}.obsm[{found!r}] has the shape {coordinates.shape}; two columns are needed to plot on. "
            "Pass another basis=."
        )
    name = found.removeprefix("X_").upper()
    return pd.DataFrame(
        coordinates[:, :2].copy(), index=held.data.obs_names, columns=[f"{name}{i + 1}" for i in range(2)]
    )
