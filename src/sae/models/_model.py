"""What a pretrained model has to offer, and the form of what it predicts."""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd

from .._data import Data, holder

Scale: TypeAlias = Literal["log1p", "linear", "log"]
Prediction: TypeAlias = "ad.AnnData | dict[str, ad.AnnData]"
"""Cells × genes of one modality, or of several by name."""


class Model(Protocol):
    """A pretrained model: from cells to its latent space, and from there to expression.

    Adapters have both methods, or say why one is missing by raising `NotImplementedError`. Where `data` is a MuData, the
    prediction is a dict with an AnnData per modality that the model knows.
    """

    def embed(self, data: Data) -> np.ndarray:
        """Return the latent (n, d) of the cells in `data`, in their order."""
        ...

    def decode(self, z: np.ndarray, data: Data) -> Prediction:
        """Return the expression that the model predicts for the cells in `data` at the latent `z` (n, d).

        The prediction of a cell depends on its own `z` and `data` alone, and is always the same. A cell may be in `data` several times. Genes without a prediction
        are NaN. `uns["scale"]` says what the values are: see :func:`prediction`.
        """
        ...


def prediction(values: np.ndarray, cells: pd.Index, genes: pd.Index, scale: Scale) -> ad.AnnData:
    """Wrap predicted expression (n, g).

    Parameters
    ----------
    scale
        `"log1p"`: ln(1 + x) of normalised expression; `"linear"`: means or proportions themselves; `"log"`: natural logarithms,
        of probabilities for example. Stored as `uns["scale"]`, and for `"log1p"` also where Scanpy keeps it.
    """
    uns = {"scale": scale} | ({"log1p": {"base": None}} if scale == "log1p" else {})
    return ad.AnnData(values, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes), uns=uns)


def check_latent(z: np.ndarray, data: Data, n_latent: int, model: str) -> np.ndarray:
    """Refuse a latent that is not of the cells in `data` or not of the model, and return it as float32."""
    n_cells = holder(data, None).data.n_obs
    z = np.asarray(z)
    if z.ndim != 2 or z.shape[1] != n_latent:
        raise ValueError(
            f"{model} decodes a latent of {n_latent} dimensions; got an array of shape {z.shape}. Pass z as cells × {n_latent}, "
            "from the representation that this model makes."
        )
    if len(z) != n_cells:
        raise ValueError(f"The latent has {len(z)} rows and data {n_cells} cells; {model} needs a row per cell.")
    z = np.ascontiguousarray(z, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(z).all(axis=1))
    if len(bad):
        raise ValueError(f"The latent has NaN or infinite values in {len(bad)} of {n_cells} rows, row {bad[0]} first.")
    return z


def check_library_size(library_size: Any) -> None:
    """Refuse what is neither a number of counts nor "observed"."""
    if library_size != "observed" and not (
        isinstance(library_size, int | float | np.number) and 0 < library_size < math.inf
    ):
        raise ValueError(f"library_size={library_size!r} is neither a number of counts above 0 nor 'observed'.")
