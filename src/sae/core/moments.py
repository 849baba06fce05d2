"""Counts, sums and squares of every gene over the cells of many groups at once, in chunks of rows.

For every gene, its cells are visited once, and each adds its value to the groups that it belongs to: the sums of one gene
over 5,000 groups stay in the processor's cache. Values are summed in float64 in the order of the cells by one thread, so that
no result depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import float64, njit
from scipy import sparse

from .groups import Groups
from .rows import Matrix, pieces, row_blocks
from .workers import Workers, available_threads

CHUNK_VALUES = 16_000_000
"""Values of a dense matrix read at a time, in float64 (128 MB)."""
CHUNK_ROWS = 8192
GENES_PER_TASK = 128
SUM_VALUES = 75_000_000
"""Groups × genes whose two sums are held at a time (1.2 GB)."""
ROUNDING = 1e-13
"""A variance below this share of the mean square is what rounding leaves of zero."""
IMPRECISE = 1e5
"""Beyond this ratio of mean to standard deviation, float64 sums leave a variance less than six digits."""

_compiled: Any = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class Genes:
    """What one pass over the cells tells of each gene; all arrays (genes,). NaN and infinite values count as no values.

    Attributes
    ----------
    mean, lowest, highest
        Over all cells.
    shift
        What is subtracted before squaring: the mean, where every cell has a stored value, else 0. A gene with zeros
        among n cells has a standard deviation of at least mean / √n, which float64 can bear.
    whole
        Whether all values are integers.
    n_bad
        Cells where the value is NaN or infinite.
    """

    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    shift: np.ndarray
    whole: np.ndarray
    n_bad: np.ndarray

    @property
    def varies(self) -> np.ndarray:
        """Whether the values differ at all."""
        return self.highest > self.lowest

    def of(self, genes: np.ndarray | slice) -> Genes:
        """Select some genes, in any order."""
        return Genes(**{name: values[genes] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Moments:
    """Of one group of cells for each feature of a block."""

    n: np.ndarray
    """(features, 1)"""
    mean: np.ndarray
    """(features, genes)"""
    variance: np.ndarray
    """(features, genes), unbiased; exactly 0 for a gene that is constant in the group, NaN for a single cell."""

    def of_genes(self, chosen: np.ndarray | slice) -> Moments:
        """Return the moments of some genes."""
        return Moments(self.n, self.mean[:, chosen], self.variance[:, chosen])

    def imprecise(self) -> int:
        """Count the variances that rounding may have spoilt: mean over standard deviation above 1e5, but not constant."""
        return int(((self.variance > 0) & (np.abs(self.mean) > IMPRECISE * np.sqrt(self.variance))).sum())


def chunks(x: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Read a matrix (n, g) in chunks of rows: CSR if it is sparse, else float64."""
    for rows, part in pieces(x, max(1, min(CHUNK_ROWS, CHUNK_VALUES // max(x.shape[1], 1)))):
        yield rows, part if sparse.issparse(part) else np.ascontiguousarray(part, dtype=np.float64)


def scan(x: Matrix) -> Genes:
    """Look through all cells once for the range of each gene and for what its values are like."""
    n, g = x.shape
    total, lowest, highest = np.zeros(g), np.full(g, np.inf), np.full(g, -np.inf)
    stored, n_bad, whole = np.zeros(g, np.int64), np.zeros(g, np.int64), np.ones(g, bool)
    for _, part in chunks(x):
        if sparse.issparse(part):
            _scan_sparse(part.indices, part.data, total, lowest, highest, whole, stored, n_bad)
        else:
            _scan_dense(part, total, lowest, highest, whole, n_bad)
            stored += len(part)
    full = stored == n
    lowest, highest = np.where(full, lowest, np.minimum(lowest, 0)), np.where(full, highest, np.maximum(highest, 0))
    mean = total / np.maximum(n - n_bad, 1)
    return Genes(mean, lowest, highest, np.where(full, mean, 0.0), whole, n_bad)


@dataclass(frozen=True)
class Block:
    """Some features whose sums are known; their moments are made when they are asked for, by any thread."""

    features: np.ndarray
    sums: GroupSums
    positive: slice
    active: slice

    def moments(self) -> tuple[Moments, Moments]:
        """Return the moments of the positive and of the reference cells."""
        return self.sums.moments(self.positive, inside=True), self.sums.moments(self.active, inside=False)


def group_moments(groups: Groups, features: np.ndarray, x: Matrix, genes: Genes, *, block: int) -> Iterator[Block]:
    """Measure every gene in the positive and in the reference cells of some features.

    Parameters
    ----------
    groups
        Of all features.
    features
        Those to measure.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    genes
        What :func:`scan` found.
    block
        Features in a block of the result.

    Yields
    ------
    Blocks of features. The cells are read once for as many features as 1.2 GB of sums allow.
    """
    g = x.shape[1]
    apart = groups.positive is not groups.active
    held = max(block, SUM_VALUES // (max(g, 1) * (2 if apart else 1)) // block * block)
    for rows in row_blocks(len(features), held):
        chosen = features[rows]
        members = groups.active[chosen]
        if apart:
            members = sparse.vstack([members, groups.positive[chosen]], format="csr")
        sums = GroupSums(members, x, genes.shift)
        first = len(chosen) if apart else 0
        for part in row_blocks(len(chosen), block):
            yield Block(chosen[part], sums, slice(first + part.start, first + part.stop), part)


class GroupSums:
    """Σ(x − shift) and Σ(x − shift)² of every gene over the cells of many groups, or over all others.

    The smaller side of a group is summed directly, the other is the rest of the total.

    Parameters
    ----------
    members
        (f, n), stored where a cell belongs to a group.
    x
        Expression (n, g).
    shift
        (g,) of :func:`scan`.
    """

    def __init__(self, members: sparse.csr_matrix, x: Matrix, shift: np.ndarray):
        f, self._n = members.shape
        g = x.shape[1]
        self._shift = shift
        self._n_inside = members.getnnz(axis=1)
        self._flipped = self._n_inside > self._n / 2
        by_cell = members.T.tocsr()
        self._sums = np.zeros((g, f + 1, 2))
        workers = Workers(available_threads())
        try:
            for rows, part in chunks(x):
                groups = _smaller_sides(by_cell[rows], self._flipped)
                starts, features = groups.indptr.astype(np.int64), groups.indices.astype(np.uint32)
                workers.each(self._adder(part, starts, features), range(0, g, GENES_PER_TASK))
        finally:
            workers.close()

    def _adder(self, part: Matrix, starts: np.ndarray, features: np.ndarray) -> Callable[[int, int], None]:
        """Return what adds a chunk of cells to the sums of some genes."""
        g, shift, sums = len(self._shift), self._shift, self._sums
        if sparse.issparse(part):
            columns = part.tocsc()

            def add(worker: int, low: int) -> None:
                high = min(low + GENES_PER_TASK, g)
                _add_sparse(low, high, columns.indptr, columns.indices, columns.data, shift, starts, features, sums)
        else:
            values = np.ascontiguousarray((part - shift).T)

            def add(worker: int, low: int) -> None:
                _add_dense(low, min(low + GENES_PER_TASK, g), values, starts, features, sums)

        return add

    def moments(self, groups: slice, *, inside: bool) -> Moments:
        """Return means and variances inside or outside of some groups."""
        n = self._n_inside[groups]
        n = n if inside else self._n - n
        from_rest = self._flipped[groups] if inside else ~self._flipped[groups]
        mean, variance = np.empty((2, len(n), len(self._shift)))
        _finish(self._sums[:, groups], self._sums[:, -1], from_rest, n, self._shift, mean, variance)
        return Moments(n[:, None].astype(np.float64), mean, variance)


def _smaller_sides(members: sparse.csr_matrix, flipped: np.ndarray) -> sparse.csr_matrix:
    """Replace some groups by all other cells, and append one group of all cells."""
    n, f = members.shape
    rows, columns = members.nonzero()
    kept = ~flipped[columns]
    other_rows, other = np.nonzero(~members[:, flipped].toarray().astype(bool))
    rows = np.concatenate([rows[kept], other_rows, np.arange(n)])
    columns = np.concatenate([columns[kept], np.flatnonzero(flipped)[other], np.full(n, f)])
    return sparse.csr_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(n, f + 1))


@_compiled
def _scan_sparse(indices, data, total, lowest, highest, whole, stored, n_bad):
    for e in range(indices.size):
        gene, value = indices[e], float64(data[e])
        stored[gene] += 1
        if np.isfinite(value):
            total[gene] += value
            lowest[gene] = min(lowest[gene], value)
            highest[gene] = max(highest[gene], value)
            whole[gene] &= value == np.floor(value)
        else:
            n_bad[gene] += 1


@_compiled
def _scan_dense(part, total, lowest, highest, whole, n_bad):
    for cell in range(part.shape[0]):
        for gene in range(part.shape[1]):
            value = part[cell, gene]
            if np.isfinite(value):
                total[gene] += value
                lowest[gene] = min(lowest[gene], value)
                highest[gene] = max(highest[gene], value)
                whole[gene] &= value == np.floor(value)
            else:
                n_bad[gene] += 1


@_compiled
def _add_sparse(low, high, indptr, indices, data, shift, starts, features, sums):
    for gene in range(low, high):
        of_gene = sums[gene]
        for e in range(indptr[gene], indptr[gene + 1]):
            value = float64(data[e]) - shift[gene]
            square = value * value
            cell = indices[e]
            for p in range(starts[cell], starts[cell + 1]):
                feature = features[p]
                of_gene[feature, 0] += value
                of_gene[feature, 1] += square


@_compiled
def _add_dense(low, high, values, starts, features, sums):
    for gene in range(low, high):
        of_gene = sums[gene]
        for cell in range(values.shape[1]):
            value = values[gene, cell]
            square = value * value
            for p in range(starts[cell], starts[cell + 1]):
                feature = features[p]
                of_gene[feature, 0] += value
                of_gene[feature, 1] += square


@_compiled
def _finish(sums, totals, from_rest, n, shift, mean, variance):
    """Turn the sums of a side, or of all cells less it, into moments (groups, genes)."""
    for gene in range(sums.shape[0]):
        for f in range(n.size):
            first, second = sums[gene, f, 0], sums[gene, f, 1]
            summed = second
            if from_rest[f]:
                # What is the rest of a total is rounded as the total is.
                summed = totals[gene, 1]
                first, second = totals[gene, 0] - first, totals[gene, 1] - second
            if n[f] == 0:
                mean[f, gene] = np.nan
                variance[f, gene] = np.nan
                continue
            centre = first / n[f]
            spread = second / n[f] - centre * centre
            mean[f, gene] = centre + shift[gene]
            if n[f] == 1:
                variance[f, gene] = np.nan
            else:
                variance[f, gene] = spread * n[f] / (n[f] - 1) if spread > ROUNDING * summed / n[f] else 0.0
