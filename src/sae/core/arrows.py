"""Where cells that were moved in a representation go on a picture of it: by the places of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .neighbours import OUTLYING


@dataclass(frozen=True)
class Arrows:
    """Means over the moved cells of each of m squares."""

    place: np.ndarray
    """(m, 2) of the cells."""
    shift: np.ndarray
    """(m, 2)"""
    n_cells: np.ndarray
    """(m,)"""
    agreement: np.ndarray
    """(m,) length of the mean shift by the mean length: 1 where all cells go the same way, 0 where they scatter."""
    outlying: np.ndarray
    """(m,) share of the cells that end up off the manifold."""


def shifts(
    latent: np.ndarray, places: np.ndarray, before: np.ndarray, after: np.ndarray, own: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find how far cells are shifted on a picture: from the mean place of their k nearest neighbours to that of their new ones.

    Parameters
    ----------
    latent, places
        Of the real cells: (m, d), and (m, 2) on the picture.
    before, after
        (n, d) of the cells that are moved.
    own
        (n,) the number of each among the real cells, −1 for one that is not: none is its own neighbour.

    Returns
    -------
    (n, 2) shifts, and (n,) whether the neighbours are then farther than those of 99 % of the real cells.
    """
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(latent) - 1)
    search: Any = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(latent)

    def nearest(z: np.ndarray, itself: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distance, found = search.kneighbors(z)
        dropped = found == itself[:, None]
        dropped[~dropped.any(axis=1), -1] = True
        return distance[~dropped].reshape(-1, k).mean(axis=1), places[found[~dropped].reshape(-1, k)].mean(axis=1)

    limit = np.quantile(nearest(latent, np.arange(len(latent)))[0], OUTLYING)
    distance, there = nearest(after, own)
    return there - nearest(before, own)[1], distance > limit


def averaged(
    places: np.ndarray, shift: np.ndarray, outlying: np.ndarray, picture: np.ndarray, n_grid: int, min_cells: int
) -> Arrows:
    """Average shifts (n, 2) of cells at places (n, 2) over squares, `n_grid` along the longer side of a picture of cells (m, 2).

    Squares with fewer than `min_cells` cells are left out.
    """
    low = picture.min(axis=0)
    side = max(float(np.ptp(picture, axis=0).max()), np.finfo(np.float64).tiny) / n_grid
    square = np.minimum((places - low) / side, n_grid - 1).astype(np.int64)
    _, code = np.unique(square, axis=0, return_inverse=True)
    code = code.ravel()
    n_cells = np.bincount(code)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(code, weights=values) / n_cells

    by = np.column_stack([mean(shift[:, 0]), mean(shift[:, 1])])
    length, mean_length = np.linalg.norm(by, axis=1), mean(np.linalg.norm(shift, axis=1))
    agreement = np.divide(length, mean_length, out=np.zeros_like(length), where=mean_length > 0)
    place = np.column_stack([mean(places[:, 0]), mean(places[:, 1])])
    some = n_cells >= min_cells
    return Arrows(place[some], by[some], n_cells[some], agreement[some], mean(outlying.astype(np.float64))[some])
