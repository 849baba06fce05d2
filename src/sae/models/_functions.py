from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .._data import Data, is_mudata, listing
from ._model import Prediction, Scale, prediction


class Functions:
    """Any two functions as a model: one from cells to a latent, one from the latent to expression.

    Parameters
    ----------
    embed
        `embed(data)` returns the latent (cells × d) of the cells in an AnnData or MuData, in their order.
    decode
        `decode(z, data)` returns the expression of the cells in `data` at the latent `z` (cells × d): an array, cells × genes;
        an AnnData; or a dict of them by modality, or a MuData. The prediction of a cell must depend on its own row and cell alone.
    genes
        Names of the columns of the arrays that `decode` returns, or of those of each modality; by default those of the data.
    scale
        What the values in the arrays are, or those of each modality: `"log1p"` for ln(1 + x) of normalised expression,
        `"linear"` for means or proportions, `"log"` for natural logarithms. Where it is not given, verbs recognise it from the
        values, as they do for data.

    Raises
    ------
    TypeError
        Neither of them, or something that cannot be called.
    ValueError
        Another scale.

    Examples
    --------
    A linear model, from principal components of expression to expression:

    >>> import sae
    >>> import scanpy as sc
    >>> adata = sae.datasets.pbmc68k()
    >>> sc.pp.pca(adata)
    >>> model = sae.models.Functions(
    ...     embed=lambda data: data.obsm["X_pca"],
    ...     decode=lambda z, data: z @ data.varm["PCs"].T,
    ...     scale="log1p",
    ... )
    >>> model.decode(model.embed(adata), adata).shape
    (700, 765)
    """

    def __init__(
        self,
        embed: Callable[[Data], Any] | None = None,
        decode: Callable[[np.ndarray, Data], Any] | None = None,
        *,
        genes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        scale: Scale | Mapping[str, Scale] | None = None,
    ) -> None:
        if embed is None and decode is None:
            raise TypeError("Neither embed= nor decode= was given. Pass at least one function.")
        for name, function in (("embed", embed), ("decode", decode)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}= is a {type(function).__name__}, which cannot be called. Pass a function.")
        for given in scale.values() if isinstance(scale, Mapping) else (scale,):
            if given not in (None, *get_args(Scale)):
                raise ValueError(f"scale={given!r} is not one of {listing(get_args(Scale))}.")
        self._embed, self._decode = embed, decode
        self._genes, self._scale = genes, scale

    def embed(self, data: Data) -> np.ndarray:
        """Return the latent (n, d) of the cells in `data`, as float32.

        Raises
        ------
        NotImplementedError
            No function `embed` was given.
        ValueError
            The function returns something else than a row per cell.
        """
        if self._embed is None:
            raise NotImplementedError(
                "This model has no embed: pass Functions(embed=...), or use a latent that you have."
            )
        z = _array(self._embed(data), "embed")
        if z.ndim != 2 or len(z) != data.n_obs:
            raise ValueError(f"embed returned the shape {z.shape} for {data.n_obs} cells; expected cells × dimensions.")
        return z

    def decode(self, z: np.ndarray, data: Data) -> Prediction:
        """Return the expression that is predicted for the cells in `data` at the latent `z` (n, d).

        Raises
        ------
        NotImplementedError
            No function `decode` was given.
        ValueError
            The function returns something else than a row per cell and a column per gene, or an array for a modality that the
            data do not have.
        """
        if self._decode is None:
            raise NotImplementedError(
                "This model has no decode: expression cannot be predicted from its latent. Pass Functions(decode=...)."
            )
        found = self._decode(z, data)
        if is_mudata(found):
            found = found.mod
        if isinstance(found, Mapping):
            return {modality: self._prediction(part, data, modality) for modality, part in found.items()}
        return self._prediction(found, data, None)

    def _prediction(self, found: Any, data: Data, modality: str | None) -> ad.AnnData:
        """Name the columns of an array, and say what its values are."""
        of = "" if modality is None else f" of {modality!r}"
        if isinstance(found, ad.AnnData):
            if found.n_obs != data.n_obs:
                raise ValueError(f"decode returned {found.n_obs} cells{of}, and data has {data.n_obs}.")
            return found
        scale = self._scale.get(str(modality)) if isinstance(self._scale, Mapping) else self._scale
        values, genes = _array(found, "decode"), self._columns(data, modality)
        if values.ndim != 2 or len(values) != data.n_obs:
            raise ValueError(
                f"decode returned the shape {values.shape}{of} for {data.n_obs} cells; expected a row for each cell in data, "
                "which may be some of those that the model was made with."
            )
        if values.shape[1] != len(genes):
            raise ValueError(
                f"decode returned the shape {values.shape}{of} for {data.n_obs} cells and {len(genes)} genes. Pass the names "
                "of its columns as genes= if they are not the genes of the data."
            )
        named = prediction(values, data.obs_names, genes, scale or "linear")
        if scale is None:
            del named.uns["scale"]
        return named

    def _columns(self, data: Data, modality: str | None) -> pd.Index:
        genes = self._genes
        if isinstance(genes, Mapping):
            genes = genes.get(str(modality))
        if genes is not None:
            return pd.Index(genes)
        if not is_mudata(data):
            return data.var_names
        if modality not in data.mod:
            raise ValueError(
                f"decode returned an array for {modality!r}, and the MuData has {listing(data.mod)}. Return a dict by modality, or "
                "pass genes= to Functions."
            )
        return data.mod[modality].var_names


def _array(values: Any, function: str) -> np.ndarray:
    """Convert an array, a tensor or a sparse matrix to float32."""
    if values is None:
        raise TypeError(f"{function} returned None. Return an array: a row for each cell in data.")
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    if sparse.issparse(values):
        values = values.toarray()
    try:
        return np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise TypeError(f"{function} returned a {type(values).__name__}, which is no array of numbers.") from None
