"""Pairs of features, one to one: by the directions of vectors, by activations on the same cells, or by sets they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from .controls import random_directions
from .rows import Matrix
from .similarity import Activations, Features, Sets, Vectors, blocks, highest

FULL_PAIRS = 4_200_000
"""Up to this many pairs of features (2,048 × 2,048) all are looked at."""
N_NEAREST = 32
"""Of each feature, above that."""

Pairs: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns, and their similarities."""
Closest: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Of each feature the most similar other one, and their similarity."""


@dataclass(frozen=True)
class Matching:
    """Pairs of the features of a (h_a of them) with those of b (h_b)."""

    partner: np.ndarray
    """(h_a,), the feature of b that is matched; -1 where none is."""
    similarity: np.ndarray
    """(h_a,), of the pair; NaN where there is none."""
    best: np.ndarray
    """(h_a,), the highest similarity to any feature of b; NaN for a dead feature."""
    nearest: np.ndarray
    """(h_a,), the feature of b that has it; -1 for a dead feature."""
    best_b: np.ndarray
    """(h_b,), the highest similarity of each feature of b to any of a."""
    nearest_b: np.ndarray
    """(h_b,), the feature of a that has it."""

    @property
    def reciprocal(self) -> np.ndarray:
        """(h_a,), whether the partner is the most similar feature of b, and this one the most similar of a to it."""
        paired = self.partner >= 0
        mutual = self.nearest_b[self.partner] == np.arange(len(self.partner)) if len(self.nearest_b) else paired
        return paired & (self.partner == self.nearest) & mutual


def match_vectors(a: np.ndarray, b: np.ndarray) -> Matching:
    r"""Match rows by their cosine.

    The matching is the one with the highest sum of similarities, of pairs that are above 0: a feature has a sign. One that is like
    none of those that are left stays alone, as do rows of zeros. Up to `FULL_PAIRS` pairs it is found among all of them (Hungarian
    method, :func:`scipy.optimize.linear_sum_assignment`). Above, it is found among the `N_NEAREST` of each row and of each column
    (:func:`scipy.sparse.csgraph.min_weight_full_bipartite_matching`), and what that leaves is matched in the same way again. That is
    the best matching of all if one of the best uses no other pair than those: so for features that have a counterpart, and in practice
    for unrelated ones in ten or more dimensions.

    Parameters
    ----------
    a, b
        (h_a, m) and (h_b, m).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"The vectors are {a.shape} and {b.shape}; expected matrices with the same number of columns.")
    (left, alive_a), (right, alive_b) = Vectors.alive(a), Vectors.alive(b)
    return _match(left, right, alive_a, alive_b)


def match_activations(a: Matrix, b: Matrix) -> Matching:
    """Match columns by their Pearson correlation over the rows, as :func:`match_vectors` does; those that are constant stay alone.

    Parameters
    ----------
    a, b
        (n, h_a) and (n, h_b), CSR or dense, of the same cells.
    """
    _check_cells(a, b)
    (left, alive_a), (right, alive_b) = Activations.alive(a), Activations.alive(b)
    return _match(left, right, alive_a, alive_b)


def match_sets(a: sparse.csr_matrix, b: sparse.csr_matrix) -> Matching:
    """Match rows by the Jaccard index of what they hold, |A ∩ B| / |A ∪ B|, as :func:`match_vectors` does; empty rows stay alone.

    Parameters
    ----------
    a, b
        (h_a, m) and (h_b, m), stored where a set has a member.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"The sets are {a.shape} and {b.shape}; expected the same number of possible members.")
    (left, alive_a), (right, alive_b) = Sets.alive(a), Sets.alive(b)
    return _match(left, right, alive_a, alive_b)


def paired_correlations(a: Matrix, b: Matrix, columns_a: np.ndarray, columns_b: np.ndarray) -> np.ndarray:
    """Return Pearson's r of given pairs of columns of a (n, h_a) and b (n, h_b); NaN where one of them is constant."""
    _check_cells(a, b)
    (left, alive_a), (right, alive_b) = Activations.alive(a), Activations.alive(b)
    r = np.full(len(columns_a), np.nan)
    known = np.flatnonzero(alive_a[columns_a] & alive_b[columns_b])
    mine = left.take((np.cumsum(alive_a) - 1)[columns_a[known]])
    theirs = right.take((np.cumsum(alive_b) - 1)[columns_b[known]])
    products = np.asarray(mine.by_feature.multiply(theirs.by_feature).sum(axis=1)).ravel()
    r[known] = np.clip(products - mine.centre * theirs.centre, -1, 1)
    return r


def mirrored(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give each row (h, m) signs of its own, at random, along the principal axes of all rows.

    What comes out is related to nothing, but lies along the same axes as much as the rows do. Uniform directions do not: where
    few axes have most of the variance, unrelated rows are more alike than those.
    """
    # Few rows would each be an axis of its own. Among uniform ones, only those that many rows share stand out.
    many = np.vstack([vectors, random_directions(min(vectors.shape), vectors.shape[1], rng)])
    if len(many) < many.shape[1]:
        axes = np.linalg.svd(many, full_matrices=False)[2].T
    else:
        axes = np.linalg.eigh(many.T @ many)[1]
    along = vectors @ axes
    return (along * rng.choice([-1.0, 1.0], size=along.shape)) @ axes.T


def _check_cells(a: Matrix, b: Matrix) -> None:
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"The activations are of {a.shape[0]} and {b.shape[0]} cells; expected the same cells.")


def _match(a: Features, b: Features, alive_a: np.ndarray, alive_b: np.ndarray) -> Matching:
    """Match the features that are alive, and number them among all."""
    numbers_a, numbers_b = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    partner, similarity = np.full(len(alive_a), -1), np.full(len(alive_a), np.nan)
    best, nearest = np.full(len(alive_a), np.nan), np.full(len(alive_a), -1)
    best_b, nearest_b = np.full(len(alive_b), np.nan), np.full(len(alive_b), -1)
    if len(a) and len(b):
        (rows, columns, found), (to, value), (to_b, value_b) = _solver(a, b)(a, b)
        partner[numbers_a[rows]], similarity[numbers_a[rows]] = numbers_b[columns], found
        best[numbers_a], nearest[numbers_a] = value, numbers_b[to]
        best_b[numbers_b], nearest_b[numbers_b] = value_b, numbers_a[to_b]
    return Matching(partner, similarity, best, nearest, best_b, nearest_b)


def _solver(a: Features, b: Features) -> Callable[[Features, Features], tuple[Pairs, Closest, Closest]]:
    return _among_all if len(a) * len(b) <= FULL_PAIRS else _among_nearest


def _among_all(a: Features, b: Features) -> tuple[Pairs, Closest, Closest]:
    similarity = a.similarity(slice(0, len(a)), b)
    rows, columns = linear_sum_assignment(np.maximum(similarity, 0), maximize=True)
    found = similarity[rows, columns]
    closest, closest_b = ((similarity.argmax(axis), similarity.max(axis)) for axis in (1, 0))
    return (rows[found > 0], columns[found > 0], found[found > 0]), closest, closest_b


def _among_nearest(a: Features, b: Features) -> tuple[Pairs, Closest, Closest]:
    of_a, closest = _nearest(a, b)
    of_b, closest_b = _nearest(b, a)
    rows, columns, found = _assign(len(a), len(b), of_a, of_b)
    left_a, left_b = np.setdiff1d(np.arange(len(a)), rows), np.setdiff1d(np.arange(len(b)), columns)
    if len(rows) and len(left_a) and len(left_b):
        # Where many have the same neighbours, some get none of them.
        rest_a, rest_b = a.take(left_a), b.take(left_b)
        more = _solver(rest_a, rest_b)(rest_a, rest_b)[0]
        rows, columns = np.append(rows, left_a[more[0]]), np.append(columns, left_b[more[1]])
        found = np.append(found, more[2])
    return (rows, columns, found), closest, closest_b


def _assign(h_a: int, h_b: int, of_a: Pairs, of_b: Pairs) -> Pairs:
    """Find the best matching that uses only the nearest of each row, and of each column, which `of_b` names first."""
    rows, columns = np.append(of_a[0], of_b[1]), np.append(of_a[1], of_b[0])
    number, once = np.unique(rows * h_b + columns, return_index=True)
    found = np.append(of_a[2], of_b[2])[once]
    # A column of its own for each row, worth nothing, so that all rows have one. Weights of 0 would be no edges: 1 is added to all.
    pairs = sparse.csr_matrix((found + 1, np.divmod(number, h_b)), shape=(h_a, h_b))
    matched, partner = min_weight_full_bipartite_matching(sparse.hstack([pairs, sparse.eye(h_a)], "csr"), maximize=True)
    matched, partner = matched[partner < h_b], partner[partner < h_b]
    return matched, partner, found[np.searchsorted(number, matched * h_b + partner)]


def _nearest(a: Features, b: Features) -> tuple[Pairs, Closest]:
    """Return of each feature of a the most similar ones of b whose similarity is above 0, and the closest whatever it is."""
    n_nearest = min(N_NEAREST, len(b))
    closest, value, pairs = np.empty(len(a), dtype=np.int64), np.empty(len(a)), []
    for rows, block in blocks(a, b):
        closest[rows] = block.argmax(axis=1)
        value[rows] = block[np.arange(len(block)), closest[rows]]
        listed, columns, found, _ = highest(block, n_nearest)
        pairs.append((rows.start + listed, columns, found))
    of_a, of_b, similarity = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return (of_a, of_b, similarity), (closest, value)
