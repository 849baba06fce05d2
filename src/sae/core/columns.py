"""Reading a matrix gene by gene that is stored by rows, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from scipy import sparse

from .moments import chunks
from .rows import Matrix, as_csr, on_disk, row_blocks
from .workers import Workers

COLUMN_VALUES = 8_000_000
"""Values of a matrix in memory that are gathered at a time (0.1 GB)."""
DISK_COLUMN_VALUES = 64_000_000
"""The same for a matrix on disk (0.5 GB of float32, 0.8 GB of others), all rows of which are read for each such block of genes."""

_compiled: Any = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class GeneBlock:
    """Values of consecutive genes, gene by gene.

    Attributes
    ----------
    first
        The first gene.
    starts
        (genes + 1,) where each gene begins in the other two.
    cells, values
        (stored,) int32 and float32 if the matrix is, else float64, by rising cell. Cells that are missing have zero; zeros may be stored, too.
    """

    first: int
    starts: np.ndarray
    cells: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        """Return the number of genes."""
        return len(self.starts) - 1

    def gene(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cells and values of the j-th gene of the block."""
        stored = slice(self.starts[j], self.starts[j + 1])
        return self.cells[stored], self.values[stored]


class GeneColumns:
    """The columns of a matrix.

    In memory, every value is visited twice: to count those of each gene, and to gather them. From disk, all rows are read
    once to count, and once more for every 64 million values (a gene with more is held in one piece).

    Parameters
    ----------
    x
        (n, g), dense or sparse, in memory or read by rows.
    """

    def __init__(self, x: Matrix):
        self.shape = x.shape
        self._x = as_csr(x) if sparse.issparse(x) else x
        self._sizes = np.zeros(x.shape[1], np.int64)
        for _, part in self._parts(slice(0, x.shape[1])):
            if sparse.issparse(part):
                for some in row_blocks(part.nnz, COLUMN_VALUES):
                    self._sizes += np.bincount(part.indices[some], minlength=x.shape[1])
            else:
                self._sizes += np.count_nonzero(part, axis=0)

    def blocks(self, workers: Workers) -> Iterator[GeneBlock]:
        """Yield all genes in blocks, gathered by several threads."""
        starts = np.concatenate([[0], np.cumsum(self._sizes)])
        most = DISK_COLUMN_VALUES if on_disk(self._x) else COLUMN_VALUES
        low = 0
        while low < len(self._sizes):
            high = max(low + 1, int(np.searchsorted(starts, starts[low] + most, side="right")) - 1)
            yield self._gather(low, starts[low : high + 1] - starts[low], workers)
            low = high

    def _gather(self, first: int, starts: np.ndarray, workers: Workers) -> GeneBlock:
        kind = np.float32 if self._x.dtype == np.float32 else np.float64
        cells, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], kind)
        n_genes = len(starts) - 1
        places = starts[:-1].copy()
        shares = list(row_blocks(n_genes, -(-n_genes // workers.n)))
        for row, part in self._parts(slice(first, first + n_genes)):

            def take(worker: int, genes: slice, row: int = row, part: Matrix = part) -> None:
                if sparse.issparse(part):
                    arrays = part.indptr, part.indices, part.data, first + genes.start, first + genes.stop
                    take_sparse(*arrays, row, places[genes], cells, values)
                else:
                    take_dense(part, genes.start, row, places[genes], cells, values)

            workers.each(take, shares)
        return GeneBlock(first, starts, cells, values)

    def _parts(self, genes: slice) -> Iterator[tuple[int, Matrix]]:
        """Read by rows: number of the first row, and CSR of all genes, or a contiguous array of those asked for."""
        x = self._x
        if sparse.issparse(x):
            yield 0, x
        elif isinstance(x, np.ndarray):
            for rows, part in chunks(x[:, genes]):
                yield rows.start, np.ascontiguousarray(part)
        else:
            for rows, part in chunks(x):
                yield rows.start, as_csr(part) if sparse.issparse(part) else np.ascontiguousarray(part[:, genes])


@_compiled
def take_sparse(indptr, indices, data, low, high, row, places, cells, values):
    """Copy the entries of columns low to high of some rows, by column.

    Parameters
    ----------
    indptr, indices, data
        CSR with sorted rows.
    row
        Number of the first row.
    places
        (high − low,) where the next entry of each column goes in `cells` and `values`, which are written; moved on.
    """
    for r in range(indptr.size - 1):
        stop = indptr[r + 1]
        e = indptr[r] + np.searchsorted(indices[indptr[r] : stop], low)
        while e < stop and indices[e] < high:
            place = places[indices[e] - low]
            places[indices[e] - low] = place + 1
            cells[place] = row + r
            values[place] = data[e]
            e += 1


@_compiled
def take_dense(part, low, row, places, cells, values):
    """Copy what is not zero in the columns from `low` on, as many as there are `places`; see `take_sparse`."""
    for r in range(part.shape[0]):
        for j in range(places.size):
            value = part[r, low + j]
            if value != 0:
                cells[places[j]] = row + r
                values[places[j]] = value
                places[j] += 1
