"""Where in the latent a cell is: which labels its nearest neighbours have, and how far away they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

OUTLYING = 0.99
"""A cell is off the manifold when its neighbours are farther away than those of so many real cells."""


@dataclass(frozen=True)
class Placed:
    """Where some cells are among the reference cells."""

    distance: np.ndarray
    """(n,) mean Euclidean distance to the nearest neighbours."""
    shares: np.ndarray
    """(n, labels) share of the neighbours with each label."""


class Reference:
    """Cells that others are placed among, by their k nearest neighbours."""

    def __init__(self, latent: np.ndarray, codes: np.ndarray, n_labels: int, k: int):
        from sklearn.neighbors import NearestNeighbors

        self.k = min(k, len(latent) - 1)
        self._codes, self._n_labels = codes, n_labels
        self._search: Any = NearestNeighbors(n_neighbors=self.k + 1, algorithm="brute").fit(latent)
        own = self.place(latent, np.arange(len(latent))).distance
        self.outlying = float(np.quantile(own, OUTLYING))
        """Mean distance to the neighbours that 99 % of the reference cells stay below."""

    def place(self, latent: np.ndarray, own: np.ndarray) -> Placed:
        """Find the neighbours of cells, none of which is its own neighbour.

        Parameters
        ----------
        latent
            (n, d)
        own
            (n,) number of each cell among the reference cells, −1 for one that is not among them.
        """
        distance, found = self._search.kneighbors(latent)
        if not np.isfinite(distance).all():
            raise FloatingPointError(
                f"Distances between cells are beyond float32: the representation has values up to {np.abs(latent).max():.1e}. "
                "Divide it by a number and train on that, or steer by less."
            )
        itself = found == own[:, None]
        # Without itself among them, the farthest of the k + 1 is left out.
        itself[~itself.any(axis=1), -1] = True
        found, distance = found[~itself].reshape(-1, self.k), distance[~itself].reshape(-1, self.k)
        shares = np.zeros((len(latent), self._n_labels))
        np.add.at(shares, (np.arange(len(latent))[:, None], self._codes[found]), 1 / self.k)
        return Placed(distance.mean(axis=1), shares)
