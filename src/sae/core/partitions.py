"""Sums over the cells that are equal to the last bit in memory, from disk and on a cluster.

Floating-point sums depend on the order of what is added. Here they start from zero in each partition of the cells, grow cell by
cell, and the sums of the partitions are added in order. Partitions can be gone through one after another, or on several
machines at once; how the cells are read makes no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from .cluster import cluster_of, folded, whole_chunks
from .rows import Matrix, Rows, pieces, row_blocks
from .workers import Workers, available_threads

Sums: TypeAlias = tuple[np.ndarray, ...]


class Summing(ABC):
    """What is summed over the cells; sent to the workers of a cluster."""

    @abstractmethod
    def start(self) -> Sums:
        """Return the sums over no cells."""

    @abstractmethod
    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        """Add a chunk of cells, of which there are the same rows of each matrix; one by one, in their order."""

    def join(self, sums: Sums, more: Sums) -> None:
        """Add the sums of the next partition."""
        for total, values in zip(sums, more, strict=True):
            total += values


def summed(
    what: Summing,
    matrices: Sequence[Matrix],
    *,
    size: int,
    partition: int,
    only: np.ndarray | None = None,
) -> Sums:
    """Sum over the cells, on the cluster of the first matrix if it is on one.

    Parameters
    ----------
    what
        Is summed.
    matrices
        Of the same n cells, in memory or read by rows.
    size
        Cells that are added at a time.
    partition
        Cells of a partition.
    only
        (n,), the cells that need be read; `what` leaves the others out by itself.
    """
    if only is not None and only.all():
        only = None
    client = cluster_of(matrices[0])
    if client is None:
        return _here(what, matrices, size, partition, only)
    parts = _parts(matrices[0], partition, only)
    total = what.start()
    for sums in folded(client, _add_slice, matrices, parts, what, size):
        what.join(total, sums)
    return total


def _here(what: Summing, matrices: Sequence[Matrix], size: int, partition: int, only: np.ndarray | None) -> Sums:
    ends = np.arange(partition, matrices[0].shape[0] + partition, partition)
    if only is not None:
        positions = np.flatnonzero(only)
        matrices = [_some_rows(x, positions) for x in matrices]
        ends = np.searchsorted(positions, ends)
    total = sums = what.start()
    last, workers = 0, Workers(available_threads())
    try:
        for rows, parts in side_by_side(matrices, size):
            for some in _cut(rows, ends):
                number = int(np.searchsorted(ends, some.start, side="right"))
                if number != last:
                    if sums is not total:
                        what.join(total, sums)
                    # The partial sums so far go before there are others.
                    del sums
                    sums, last = what.start(), number
                whole = some == rows
                within = slice(some.start - rows.start, some.stop - rows.start)
                what.add(sums, workers, *(parts if whole else [part[within] for part in parts]))
    finally:
        workers.close()
    if sums is not total:
        what.join(total, sums)
    return total


def side_by_side(matrices: Sequence[Matrix], size: int) -> Iterator[tuple[slice, list[Any]]]:
    """Yield the same rows of several matrices, `size` at a time, each read in its own whole chunks and ahead of use."""
    for together in zip(*(pieces(x, size) for x in matrices), strict=True):
        yield together[0][0], [part for _, part in together]


def _some_rows(x: Matrix, positions: np.ndarray) -> Matrix:
    if isinstance(x, np.ndarray) and x.ndim == 1:
        return x[positions]
    return Rows(x.matrix, x.positions[positions]) if isinstance(x, Rows) else Rows(x, positions)


def _cut(rows: slice, ends: np.ndarray) -> Iterator[slice]:
    """Cut rows where a partition ends."""
    inside = ends[(ends > rows.start) & (ends < rows.stop)]
    cuts = [rows.start, *np.unique(inside).tolist(), rows.stop]
    for start, stop in zip(cuts, cuts[1:], strict=False):
        yield slice(start, stop)


def _parts(x: Matrix, partition: int, only: np.ndarray | None) -> Iterator[list[slice]]:
    """Yield the slices of each partition that have a cell to be read."""
    for rows in row_blocks(x.shape[0], partition):
        slices = [some for some in whole_chunks(x, rows) if only is None or only[some].any()]
        if slices:
            yield slices


def _add_slice(so_far: Sums | None, *given: Any) -> Sums:
    """Add a slice of the cells to the sums so far, on a worker of a cluster, which may have other tasks for other threads."""
    *parts, what, size = given
    sums = what.start() if so_far is None else tuple(values.copy() for values in so_far)
    workers = Workers(1)
    for rows in row_blocks(parts[0].shape[0], size):
        what.add(sums, workers, *(part[rows] for part in parts))
    return sums
