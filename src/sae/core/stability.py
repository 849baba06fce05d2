"""Does an SAE find the same features again? Its dictionary against those of other runs, and what chance would give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from .autoencoder import Autoencoder
from .initial import unit
from .matching import FULL_PAIRS, match_activations, match_vectors
from .preprocess import Scaling
from .rows import Matrix, read_rows, row_blocks

MAX_CALIBRATED = 4096
"""Cells that the threshold of a random dictionary is set on."""
BLOCK_VALUES = 8_000_000
"""Of cells × features, or features × features, held at a time (64 MB)."""


@dataclass(frozen=True)
class Dictionary:
    """The features of one run: unit directions (h, m) in a space that all runs share, and activations (n, h) on the same cells."""

    directions: np.ndarray
    activations: sparse.csr_matrix

    @property
    def alive(self) -> np.ndarray:
        """(h,), features that are active in some cell."""
        return np.bincount(self.activations.indices, minlength=self.activations.shape[1]) > 0

    def of_alive(self) -> np.ndarray:
        """Directions (h, m), zero for dead features, which have no part in a matching then."""
        return np.where(self.alive[:, None], self.directions, 0)


@dataclass(frozen=True)
class Stability:
    """How alike the features of one dictionary are to those of r others.

    Of features that are alive; NaN for dead ones. A feature that finds no partner in a run has the similarity 0 there.
    """

    cosine: np.ndarray
    """(r, h), of decoder directions, with the feature's own partner in each run (one to one)."""
    best_cosine: np.ndarray
    """(r, h), with the most similar feature of each run, which several may share."""
    correlation: np.ndarray
    """(r, h), Pearson r of activations over the cells, with the partner in a matching by that."""
    nearest_other: np.ndarray
    """(h,), highest cosine with another feature of the same dictionary."""
    pw_mcc: np.ndarray
    """(pairs,), of each two of the 1 + r dictionaries."""

    @property
    def found(self) -> np.ndarray:
        """(r, h), 1 where the angle to the partner is at most half that to the nearest other feature of the same dictionary; else 0.

        The latter counts as a right angle at most, so that the cosine is √½ or more: cos(α/2) = √((1 + cos α) / 2). In
        a dictionary of many directions that are all alike, each has a partner that is: that says nothing about any one
        of them.
        """
        found = self.cosine >= np.sqrt((1 + np.maximum(self.nearest_other, 0)) / 2)
        return np.where(np.isnan(self.cosine), np.nan, found)


def compare(reference: Dictionary, runs: Iterable[Dictionary]) -> Stability:
    """Match the features of a dictionary with those of each run, one run at a time.

    Directions are matched by their cosine and activations by their correlation, both signed
    (:mod:`sae.core.matching`).

    Parameters
    ----------
    reference
        The dictionary in question.
    runs
        The others; only the directions of each are kept.
    """
    directions, alive = [reference.directions], reference.alive
    cosine, best, correlation = [], [], []
    for run in runs:
        by_direction = match_vectors(reference.of_alive(), run.of_alive())
        cosine.append(_of_alive(by_direction.similarity, alive))
        best.append(_of_alive(by_direction.best, alive))
        correlation.append(_of_alive(match_activations(reference.activations, run.activations).similarity, alive))
        directions.append(run.directions)
    pairs = np.array([pw_mcc(a, b) for a, b in combinations(directions, 2)])
    others = nearest_other(reference.of_alive())
    return Stability(np.array(cosine), np.array(best), np.array(correlation), _of_alive(others, alive), pairs)


def nearest_other(directions: np.ndarray) -> np.ndarray:
    """Return the highest cosine (h,) of each unit row (h, m) with another one; -1 for a lone one."""
    h = len(directions)
    highest = np.full(h, -1.0)
    for rows in row_blocks(h, max(1, BLOCK_VALUES // h)):
        cosine = directions[rows] @ directions.T
        cosine[np.arange(len(cosine)), np.arange(h)[rows]] = -1
        highest[rows] = cosine.max(axis=1)
    return highest


def pw_mcc(a: np.ndarray, b: np.ndarray) -> float:
    """Mean |cosine| of the pairs of rows of a (h, m) and b (h, m) that are matched one to one for the highest sum.

    Rows have length 1. All features count, dead ones too (PW-MCC, arXiv:2505.20254). Up to `FULL_PAIRS` pairs. Above,
    the matching is that of :func:`~sae.core.matching.match_vectors`, by signed cosines, and rows without a partner
    count 0: at most a little lower.
    """
    if len(a) * len(b) > FULL_PAIRS:
        return float(np.nansum(match_vectors(a, b).similarity) / min(len(a), len(b)))
    similarity = np.abs(a @ b.T)
    return float(similarity[linear_sum_assignment(similarity, maximize=True)].mean())


def curve(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return the share of `values` that are at or above each threshold; NaN values are left out, and without any it is NaN."""
    known = np.sort(values[~np.isnan(values)])
    if len(known) == 0:
        return np.full(len(thresholds), np.nan)
    return 1 - np.searchsorted(known, thresholds, side="left") / len(known)


def random_dictionaries(
    x: Matrix, scaling: Scaling, n_features: int, l0: float, seeds: Sequence[int], *, of_cells: bool
) -> Iterator[Dictionary]:
    """Yield dictionaries that learned nothing, to see how alike two are by chance.

    Their directions are uniform on the sphere in the training space, or those of random cells. A feature's activation
    is the cell's coordinate along the direction where that is above one threshold, at which cells have `l0` active
    features on average: as in an SAE before training.

    Parameters
    ----------
    x
        (n, d), raw representation.
    scaling
        The map into the training space.
    of_cells
        Directions of cells, each at most once where there are as many cells as features.
    """
    n = x.shape[0]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        if of_cells:
            rows = rng.choice(n, n_features, replace=n < n_features)
            directions = unit(scaling.transform(read_rows(x, rows)))
        else:
            directions = unit(rng.standard_normal((n_features, len(scaling.kept))))
        calibrated = np.linspace(0, n - 1, min(n, MAX_CALIBRATED, max(1, BLOCK_VALUES // n_features))).astype(np.int64)
        tied = _tied(directions, scaling.transform(read_rows(x, calibrated)), l0)
        yield Dictionary(directions, scaling.fold(tied).encode(x).activations)


def _tied(directions: np.ndarray, y: np.ndarray, l0: float) -> Autoencoder:
    """Encode and decode by the same unit directions (h, m), with `l0` active features on average over the cells y (n, m)."""
    h, m = directions.shape
    along = (y @ directions.T).ravel()
    n_active = min(round(l0 * len(y)), along.size - 1)
    threshold = max(0.0, float(np.partition(along, along.size - n_active - 1)[along.size - n_active - 1]))
    return Autoencoder(
        W_enc=directions.T,
        b_enc=np.zeros(h),
        W_dec=directions,
        b_dec=np.zeros(m),
        activation="threshold",
        threshold=np.full(h, threshold),
    )


def _of_alive(similarity: np.ndarray, alive: np.ndarray) -> np.ndarray:
    return np.where(alive, np.nan_to_num(similarity), np.nan)
