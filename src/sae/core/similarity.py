"""How alike features are: by the directions of vectors, by activations on the same cells, or by sets they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
from scipy import sparse

from .rows import Matrix, row_blocks, varying_columns

BLOCK_VALUES = 8_000_000
"""Similarities held at a time (64 MB)."""
DENSE_SHARE = 0.01
"""Share of the products of two activations that are not zero above which dense arithmetic is the faster one."""


class Features(Protocol):
    """Features that are alive, with what it takes to compare them with others of their kind."""

    def __len__(self) -> int: ...

    def take(self, chosen: np.ndarray) -> Self:
        """Select some features."""

    def similarity(self, rows: slice, other: Self) -> np.ndarray:
        """Compare some features (r) with all others (h): (r, h)."""


@dataclass(frozen=True)
class Vectors:
    """Rows of length 1, (h, m)."""

    unit: np.ndarray

    @classmethod
    def alive(cls, x: np.ndarray) -> tuple[Self, np.ndarray]:
        """Scale rows (h, m); mark those that are not zero."""
        x = np.asarray(x, dtype=np.float64)
        if not np.isfinite(x).all():
            raise ValueError(f"{(~np.isfinite(x)).sum()} values of the vectors are not finite.")
        length = np.linalg.norm(x, axis=1)
        alive = length > 0
        return cls(x[alive] / length[alive, None]), alive

    def __len__(self) -> int:
        return len(self.unit)

    def take(self, chosen: np.ndarray) -> Self:
        """Select some features."""
        return type(self)(self.unit[chosen])

    def similarity(self, rows: slice, other: Self) -> np.ndarray:
        """Compare some features with all others."""
        return self.unit[rows] @ other.unit.T


@dataclass(frozen=True)
class Activations:
    """Columns a / √Σ(a − ā)², stored both ways, and √n ā on the same scale."""

    by_cell: sparse.csr_matrix
    by_feature: sparse.csr_matrix
    centre: np.ndarray

    @classmethod
    def alive(cls, a: Matrix) -> tuple[Self, np.ndarray]:
        """Scale columns (n, h); mark those that vary."""
        a = sparse.csr_matrix(a, dtype=np.float64)
        if not np.isfinite(a.data).all():
            raise ValueError(f"{(~np.isfinite(a.data)).sum()} activations are not finite.")
        alive = varying_columns(a)
        a = a[:, alive]
        n, h = a.shape
        mean = np.bincount(a.indices, weights=a.data, minlength=h) / max(n, 1)
        squares = np.bincount(a.indices, weights=np.square(a.data - mean[a.indices]), minlength=h)
        length = np.sqrt(squares + (n - a.getnnz(axis=0)) * mean**2)
        scaled = sparse.csr_matrix((a.data / length[a.indices], a.indices, a.indptr), shape=a.shape)
        return cls(scaled, scaled.T.tocsr(), np.sqrt(n) * mean / length), alive

    def __len__(self) -> int:
        return len(self.centre)

    def take(self, chosen: np.ndarray) -> Self:
        """Select some features."""
        return type(self)(self.by_cell[:, chosen], self.by_feature[chosen], self.centre[chosen])

    def similarity(self, rows: slice, other: Self) -> np.ndarray:
        """Compare some features with all others."""
        mine = self.by_feature[rows]
        n, h = other.by_cell.shape
        n_products = mine.getnnz(axis=0) @ other.by_cell.getnnz(axis=1).astype(np.float64)
        if n_products > DENSE_SHARE * n * h * mine.shape[0]:
            r = _dense_product(mine, other.by_cell)
        else:
            r = (mine @ other.by_cell).toarray()
        r -= np.outer(self.centre[rows], other.centre)
        return np.clip(r, -1, 1, out=r)


@dataclass(frozen=True)
class Sets:
    """Members (h, m), each 1."""

    members: sparse.csr_matrix

    @classmethod
    def alive(cls, members: sparse.csr_matrix) -> tuple[Self, np.ndarray]:
        """Take what is stored (h, m); mark rows that hold anything."""
        marked = sparse.csr_matrix((np.ones(members.nnz), members.indices, members.indptr), shape=members.shape)
        alive = marked.getnnz(axis=1) > 0
        return cls(marked[alive]), alive

    def __len__(self) -> int:
        return self.members.shape[0]

    def take(self, chosen: np.ndarray) -> Self:
        """Select some features."""
        return type(self)(self.members[chosen])

    def similarity(self, rows: slice, other: Self) -> np.ndarray:
        """Compare some features with all others."""
        mine = self.members[rows]
        shared = (mine @ other.members.T).toarray()
        return shared / (mine.getnnz(axis=1)[:, None] + other.members.getnnz(axis=1) - shared)


Kind = TypeVar("Kind", bound=Features)


def blocks(a: Kind, b: Kind) -> Iterator[tuple[slice, np.ndarray]]:
    """Compare some features of a at a time with all of b."""
    for rows in row_blocks(len(a), max(1, BLOCK_VALUES // max(len(b), 1))):
        yield rows, a.similarity(rows, b)


def highest(block: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find the k ≥ 1 highest values of each row, of those above 0, the highest first; of equal ones the first.

    Returns
    -------
    Row, column, value, and place in the row's order.
    """
    # Many times faster than argpartition.
    cut = np.partition(block, block.shape[1] - k, axis=1)[:, block.shape[1] - k]
    rows, columns = np.nonzero((block >= cut[:, None]) & (block > 0))
    values = block[rows, columns]
    order = np.lexsort((-values, rows))
    place = np.arange(len(order)) - np.searchsorted(rows, rows)
    order, place = order[place < k], place[place < k]
    return rows[order], columns[order], values[order], place


def _dense_product(a: sparse.csr_matrix, b: sparse.csr_matrix) -> np.ndarray:
    """Return a (r, n) @ b (n, h) in blocks of the n."""
    columns = a.tocsc()
    product = np.zeros((a.shape[0], b.shape[1]))
    for cells in row_blocks(b.shape[0], max(1, BLOCK_VALUES // max(*product.shape, 1))):
        product += columns[:, cells].toarray() @ b[cells].toarray()
    return product
