from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Holder, holder, is_mudata, joint_keys, listing, representation
from ..core.rows import dense_rows, select_rows
from ._cells import embedding

STRAY = 1e-3
"""Share of a step's length that may lie across the direction of the feature: rounding."""
RESOLUTION = 1e-5
"""Of the values that steps are differences of, float32."""


def steering_arrows(
    data: Data,
    key_added: str,
    feature: str | int | None = None,
    *,
    basis: str = "umap",
    n_neighbors: int = 15,
    n_grid: int = 20,
    min_cells: int = 3,
    max_cells: int = 10_000,
    key: str = "sae",
    mod: str | None = None,
    rng: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    """Return where steered cells go on an embedding, averaged over squares.

    An embedding such as UMAP has no place for cells that were never in it. A steered cell is therefore placed by its nearest
    neighbours among the real cells in the representation: its shift is from the mean place of the neighbours that it had to
    the mean place of those that it has now, itself never among them. Shifts are averaged over the moved cells of each square.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.steer(..., key_added=)`, or `tl.ablate`.
    key_added
        The steered representation in `obsm`.
    feature
        By name or number: check that the cells were moved along this one.
    basis
        Key of `obsm` to place cells on, with or without `X_`.
    n_neighbors
        Neighbours of a cell.
    n_grid
        Squares along the longer side of the embedding.
    min_cells
        Squares with fewer moved cells are left out.
    max_cells
        Neighbours are looked for among so many real cells, and for so many moved ones, drawn at random.
    rng
        Seed or generator, for the cells that are drawn.

    Returns
    -------
    A row per square: `x`, `y` (mean place of its cells), `dx`, `dy` (mean shift), `n_cells`, `agreement` (length of the mean shift by the mean
    length: 1 where all cells go the same way, 0 where they scatter), `off_manifold` (share of cells that end up farther from their
    neighbours than 99 % of real cells are from theirs: where the nearest real cells are says little of them).

    Raises
    ------
    KeyError
        There is no such SAE, feature, embedding or steered representation.
    ValueError
        It has another shape than the representation, no cell is moved, or cells are moved along something else than the feature; a
        setting out of range; fewer than three cells with a place.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> model = sae.models.Functions(decode=lambda z, data: z[:, :1], genes=["a gene"], scale="linear")
    >>> sae.tl.steer(adata, "sae_0", model=model, doses=[1], n_controls=0, key_added="X_steered")
    >>> arrows = sae.get.steering_arrows(adata, "X_steered", "sae_0")
    >>> arrows.columns.tolist()
    ['x', 'y', 'dx', 'dy', 'n_cells', 'agreement', 'off_manifold']
    """
    from ..core.arrows import averaged, shifts

    given = {"n_neighbors": n_neighbors, "n_grid": n_grid, "min_cells": min_cells, "max_cells": max_cells}
    for name, value in given.items():
        least = 2 if name == "max_cells" else 1
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
    held = holder(data, mod)
    latent = _schema.latent(held, key).matrix
    steered = _steered(held, key_added, latent.shape)
    places = embedding(data, basis, mod=mod).to_numpy(dtype=np.float64)
    known = np.flatnonzero(np.isfinite(places).all(axis=1))
    if len(known) < 3:
        raise ValueError(f"{len(known)} cells have a place on {basis!r}. Arrows need three or more.")
    generator = np.random.default_rng(rng)
    real = np.sort(generator.permutation(known)[:max_cells])
    z, new = (dense_rows(select_rows(x, known), slice(None)).astype(np.float32, copy=False) for x in (latent, steered))
    moved = np.flatnonzero((z != new).any(axis=1))
    if len(moved) == 0:
        raise ValueError(
            f"{held.where}.obsm[{key_added!r}] is the representation of {key!r} itself: no cell is moved. Run "
            "sae.tl.steer(..., key_added=) with another dose."
        )
    moved = np.sort(generator.permutation(moved)[:max_cells])
    if feature is not None:
        _check_direction(held, key, key_added, feature, known[moved], z[moved], new[moved])
    own = np.searchsorted(real, known[moved]).clip(max=len(real) - 1)
    own = np.where(real[own] == known[moved], own, -1)
    reference = z[np.searchsorted(known, real)]
    shift, outlying = shifts(reference, places[real], z[moved], new[moved], own, n_neighbors)
    found = averaged(places[known[moved]], shift, outlying, places[known], n_grid, min_cells)
    return pd.DataFrame(
        {
            "x": found.place[:, 0],
            "y": found.place[:, 1],
            "dx": found.shift[:, 0],
            "dy": found.shift[:, 1],
            "n_cells": found.n_cells,
            "agreement": found.agreement,
            "off_manifold": found.outlying,
        }
    )


def _steered(held: Holder, key_added: str, shape: tuple[int, ...]) -> Any:
    """Read a representation that was written beside the one of the SAE."""
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    if key_added not in keys:
        raise KeyError(
            f"{held.where}.obsm has no {key_added!r}; it has {listing(keys)}. Run sae.tl.steer(..., key_added={key_added!r}) with "
            "one feature and one dose first."
        )
    found = representation(held, key_added, None).matrix
    if found.shape != shape:
        raise ValueError(
            f"{held.where}.obsm[{key_added!r}] is {found.shape}, and the representation of the SAE {shape}. Pass what sae.tl.steer "
            "wrote for this SAE as key_added=."
        )
    return found


def _check_direction(
    held: Holder, key: str, key_added: str, feature: str | int, cells: np.ndarray, z: np.ndarray, new: np.ndarray
) -> None:
    """Refuse cells that were moved along anything but one feature, from where they were or from their reconstruction."""
    stored: Mapping[str, Any] = _schema.read(held, key)
    model = _schema.model(stored)
    [number] = _schema.resolve(feature, _schema.feature_names(key, len(model.W_dec)), stored["features"].get("name"))
    direction = model.W_dec[number].astype(np.float64)
    rounding = RESOLUTION * np.linalg.norm(z)

    def along(start: np.ndarray) -> bool:
        step = new - start.astype(np.float64)
        across = step - np.outer(step @ direction / (direction @ direction), direction)
        return bool(np.linalg.norm(across) <= STRAY * np.linalg.norm(step) + rounding)

    if not along(z) and not along(model.decode(_schema.activations_in_memory(held, key)[cells])):
        raise ValueError(
            f"{held.where}.obsm[{key_added!r}] is not moved along {_schema.feature_names(key, len(model.W_dec))[number]}. Pass the "
            "feature that it was made with, or run sae.tl.steer again."
        )
