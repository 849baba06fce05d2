from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._data import Data, Holder, Representation, holder, is_mudata, listing, representation
from .._expression import recognised_scale
from ..core.rows import read_rows
from ._model import Prediction, Scale, check_latent, prediction
from ._reading import cells_in, genes_in

if TYPE_CHECKING:
    from ..core.moments import Genes

CHECKED_CELLS = 1_000
TOLERANCE = 1e-3
"""Of the standard deviation of a component: exact solvers stay below 2e-5, and 5 % of the cells removed exceed it."""


class PCA:
    r"""Scanpy's principal components as a model: scores of cells, and the expression that scores stand for.

    With loadings W (genes × d, `varm["PCs"]`) and the mean μ of the values that the components were computed from,

    .. math::
        z = (x - \mu) W, \qquad \hat{x} = z W^T + \mu

    Scanpy does not keep μ: it is computed again, in float64, from all cells, and checked against the stored scores.

    Parameters
    ----------
    data
        AnnData after :func:`scanpy.pp.pca`, with all the cells that the components were computed from, or a MuData with `mod`.
        Expression may be on disk. It is read once, and not needed afterwards.
    basis
        Key of the scores in `obsm`. Scanpy keeps loadings under `varm["PCs"]`, and those of `key_added=` under that key.
    layer
        The layer that the components were computed from, by default the one that Scanpy recorded, else `X`.
    mod
        The modality of a MuData.

    Raises
    ------
    KeyError
        No scores, loadings or layer of that name.
    ValueError
        The scores are not those of the values: these were changed since, or cells were added or removed. What was tried, and what
        fits if something does, is in the message. Also for loadings of another shape, NaN, or a MuData without `mod`.

    Notes
    -----
    Genes outside the mask that the components were computed with (highly variable ones, usually) have loadings of zero.
    Nothing is known of them, and their prediction is NaN rather than their mean. `PCA(adata[:, mask])` leaves them out, and
    decodes faster by as much.

    Predictions of log-normalised values have the scale `"log1p"`, and may be slightly negative; those of counts or other
    values without negative ones are `"linear"`. Those of scaled values (:func:`scanpy.pp.scale`) have no scale of their own:
    verbs recognise them, give differences in standard deviations, and no fold changes.

    Examples
    --------
    >>> import sae
    >>> import scanpy as sc
    >>> adata = sae.datasets.pbmc68k()
    >>> sc.pp.pca(adata)
    >>> model = sae.models.PCA(adata)
    >>> bool(abs(model.embed(adata) - adata.obsm["X_pca"]).max() < 1e-4)
    True
    >>> model.decode(adata.obsm["X_pca"], adata).shape
    (700, 765)
    """

    def __init__(self, data: Data, *, basis: str = "X_pca", layer: str | None = None, mod: str | None = None) -> None:
        held = _of_genes(data, mod)
        stored = _stored(held, basis)
        layer = stored.params.get("layer") if layer is None else layer
        found, summary = _values(held, layer)
        mean = stored.mean(found, summary)
        if mean is None:
            raise ValueError(_mismatch(held, stored, layer, found, summary))

        masked = "mask_var" not in stored.params or stored.params["mask_var"] is not None
        inside = stored.loadings.any(axis=1) | np.full(len(mean), not masked)
        recognised = recognised_scale(summary.of(inside))
        self._mod, self._layer = mod, layer
        self._genes, self._inside = held.data.var_names.copy(), inside
        self._scale: Scale | None = {"log1p": "log1p", "scaled": None}.get(recognised, "linear")
        self._log1p = {"base": (held.data.uns.get("log1p") or {}).get("base")}
        self._mean, self._loadings = mean, stored.loadings
        # The mean as a last row, for a last component of 1: nothing is left to do after the product, nor for genes outside the
        # mask, whose mean is NaN here.
        offset = np.where(inside, mean, np.nan)
        self._decoder = np.vstack([stored.loadings.T, offset]).astype(np.float32)

    def embed(self, data: Data) -> np.ndarray:
        """Return the scores (n, d) of the cells in `data`, as float32.

        Genes are found by name, in any order; those outside the mask are not needed.

        Raises
        ------
        ValueError
            Genes are missing; NaN; cells of a MuData that are not in the modality.
        KeyError
            `data` has no such layer.
        """
        from ..core.moments import chunks

        held = _of_genes(data, self._mod if is_mudata(data) else None)
        cells = slice(None) if held.data is data else _rows(held, data)
        columns = genes_in(
            held.data.var_names, self._genes[self._inside], held.where, "genes", "the principal components are of"
        )
        loadings = self._loadings[self._inside]
        origin = self._mean[self._inside] @ loadings
        z = np.empty((held.data.n_obs, loadings.shape[1]), dtype=np.float32)
        for rows, part in chunks(_representation(held, self._layer).matrix):
            z[rows] = part[:, columns] @ loadings - origin
        return z[cells]

    def decode(self, z: np.ndarray, data: Data) -> Prediction:
        """Return the expression at the scores `z` (n, d): the inverse transform, for all genes of the fitted data.

        Raises
        ------
        ValueError
            `z` has another shape than the scores of the cells in `data`, or NaN.
        """
        z = check_latent(z, data, self._loadings.shape[1], "PCA")
        values = np.column_stack([z, np.ones(len(z), np.float32)]) @ self._decoder
        found = prediction(values, data.obs_names, self._genes, self._scale or "linear")
        if self._scale == "log1p":
            found.uns["log1p"] = dict(self._log1p)
        elif self._scale is None:
            del found.uns["scale"]
        if not is_mudata(data):
            return found
        _of_genes(data, self._mod)
        return {str(self._mod): found}


@dataclass(frozen=True)
class _Components:
    """What Scanpy stored: the key of the scores, scores (n, d) and loadings (g, d) in float64, and parameters."""

    basis: str
    scores: np.ndarray
    loadings: np.ndarray
    params: Mapping[str, Any]

    @property
    def centred(self) -> list[bool]:
        """Whether a mean was subtracted: what Scanpy recorded, else what to try."""
        return [bool(self.params["zero_center"])] if "zero_center" in self.params else [True, False]

    def mean(self, found: Representation, summary: Genes) -> np.ndarray | None:
        """Return the mean with which the scores are those of the values, or zeros, or None."""
        means = (summary.mean * with_mean for with_mean in self.centred)
        return next((mean for mean in means if self.relative(self.errors(found, mean)).max() <= TOLERANCE), None)

    def errors(self, found: Representation, mean: np.ndarray) -> np.ndarray:
        """Return how far the scores of some cells, evenly spaced, are from those of the values (cells, d)."""
        n = len(self.scores)
        rows = np.linspace(0, n - 1, min(n, CHECKED_CELLS)).astype(np.int64)
        return (read_rows(found.matrix, rows).astype(np.float64) - mean) @ self.loadings - self.scores[rows]

    def relative(self, errors: np.ndarray) -> np.ndarray:
        """Return the root mean square error of each component in units of its standard deviation."""
        spread = self.scores.std(axis=0)
        # Components beyond the rank of the data have next to no spread, and nothing but rounding.
        return np.sqrt((errors**2).mean(axis=0)) / np.maximum(spread, 1e-3 * spread.max() + 1e-30)


def _of_genes(data: Data, mod: str | None) -> Holder:
    """Find the AnnData that has the genes."""
    held = holder(data, mod)
    if is_mudata(held.data):
        raise ValueError(
            f"Principal components are of one modality. Pass PCA(mdata, mod=...), with one of {listing(held.data.mod)}."
        )
    return held


def _representation(held: Holder, layer: str | None) -> Representation:
    return representation(held, "X" if layer is None else None, layer)


def _values(held: Holder, layer: str | None) -> tuple[Representation, Genes]:
    from ..core.moments import scan

    found = _representation(held, layer)
    return found, scan(found.matrix)


def _stored(held: Holder, basis: str) -> _Components:
    adata, where = held.data, held.where
    if basis not in adata.obsm:
        raise KeyError(
            f"{where}.obsm has no {basis!r}; it has {listing(adata.obsm)}. Run sc.pp.pca first, or pass its "
            "key_added= as basis=."
        )
    by_default = basis == "X_pca" and basis not in adata.varm
    key, of_params = ("PCs", "pca") if by_default else (basis, basis)
    if key not in adata.varm:
        raise KeyError(
            f"{where}.varm has no {key!r}, where Scanpy keeps the loadings of {basis!r}; it has "
            f"{listing(adata.varm)}. Run sc.pp.pca again: concatenation, for one, drops loadings. Scores that were corrected "
            "afterwards (Harmony) have none, and cannot be decoded."
        )
    scores, loadings = np.asarray(adata.obsm[basis], np.float64), np.asarray(adata.varm[key], np.float64)
    if loadings.ndim != 2 or scores.ndim != 2 or loadings.shape[1] != scores.shape[1] or 0 in scores.shape:
        raise ValueError(
            f"{where}.varm[{key!r}] has the shape {loadings.shape} and obsm[{basis!r}] {scores.shape}: no "
            "cells, or not of the same components. Run sc.pp.pca again."
        )
    return _Components(basis, scores, loadings, (adata.uns.get(of_params) or {}).get("params") or {})


def _mismatch(held: Holder, stored: _Components, layer: str | None, found: Representation, summary: Genes) -> str:
    """Write what does not fit, what was tried, and what would."""
    names = {True: "less their mean", False: "as they are (zero_center=False)"}
    errors = stored.errors(found, summary.mean * stored.centred[0])
    relative = stored.relative(errors)
    text = (
        f"{held.where}.obsm[{stored.basis!r}] is not what the loadings make of {found.where}, taking the values "
        f"{' or '.join(names[with_mean] for with_mean in stored.centred)}: components are off by up to {relative.max():.2g} of "
        "their standard deviations. "
    )
    others = [name for name in held.data.layers if name not in (layer, None)]
    if layer is not None and held.data.X is not None:
        others.append(None)
    for name in others:
        if _fits(held, stored, name):
            return (
                text
                + f"It fits {held.where}."
                + ("X: leave layer= out." if name is None else f"layers[{name!r}]: pass it as layer=.")
            )
    text += f"Other layers do not fit either ({listing(name or 'X' for name in others)}). "
    if np.abs(errors - errors.mean(axis=0)).max() <= TOLERANCE * stored.scores.std(axis=0).max():
        return text + "All cells are off by the same: cells were removed or added since. Run sc.pp.pca again on these."
    if relative[0] <= TOLERANCE:
        return text + (
            "The first component does fit, so that they may come from an approximate solver. Run sc.pp.pca(..., "
            "svd_solver='arpack')."
        )
    return text + (
        "The values were changed since (normalised, scaled, corrected). Run sc.pp.pca again, or keep what it was run on as a "
        "layer and pass layer=."
    )


def _fits(held: Holder, stored: _Components, layer: str | None) -> bool:
    """Tell whether the scores are those of a layer; one with NaN, such as a prediction, cannot be what they are of."""
    try:
        return stored.mean(*_values(held, layer)) is not None
    except (TypeError, ValueError):
        return False


def _rows(held: Holder, mdata: Data) -> np.ndarray:
    """Find the cells of a MuData in one of its modalities."""
    positions = cells_in(held.data.obs_names, mdata.obs_names, held.where)
    if (positions < 0).any():
        raise ValueError(
            f"{(positions < 0).sum()} of the {len(positions)} cells of the MuData are not in {held.where}, and have no "
            "principal components. Select the cells that are: mdata[mdata.mod[mod].obs_names]."
        )
    return positions
