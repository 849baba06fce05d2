"""Counts, sums and squares of every gene over the cells of many groups at once, in chunks of rows.

For every gene, its cells are visited once, and each adds its value to the groups that it belongs to: the sums of one gene
over 5,000 groups stay in the processor's cache. Values are summed in float64 in the order of the cells by one thread, so that
no result depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import float64, njit
from scipy import sparse

from . import partitions
from .cluster import cluster_of
from .partitions import Summing, Sums
from .rows import Matrix, as_csr, on_disk, pieces, row_blocks
from .workers import Workers

if TYPE_CHECKING:
    from .groups import Counts, Groups

CHUNK_VALUES = 16_000_000
"""Values of a dense matrix read at a time, in float64 (128 MB)."""
CHUNK_ROWS = 8192
PARTITION_ROWS = 2**18
"""Sums start from zero in each partition of so many cells; those of the partitions are added in order."""
GENES_PER_TASK = 128
SUM_VALUES = 75_000_000
"""Groups × genes whose two sums are held at a time (1.2 GB), those of a partition beside those of all before it included."""
CLUSTER_SUM_VALUES = 18_000_000
"""The same on a cluster (0.3 GB), where a worker holds those of several tasks."""
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


def chunk_rows(g: int) -> int:
    """Rows of a matrix with g columns that are looked at at a time."""
    return max(1, min(CHUNK_ROWS, CHUNK_VALUES // max(g, 1)))


def chunks(x: Matrix) -> Iterator[tuple[slice, Matrix]]:
    """Read a matrix (n, g) in chunks of rows: CSR if it is sparse, else float64."""
    for rows, part in pieces(x, chunk_rows(x.shape[1])):
        yield rows, dense_or_csr(part)


def dense_or_csr(part: Matrix) -> Matrix:
    """Return rows as they are summed: CSR, or a contiguous array of float64."""
    return part if sparse.issparse(part) else np.ascontiguousarray(part, dtype=np.float64)


def summed(what: Summing, *matrices: Matrix, only: np.ndarray | None = None) -> Sums:
    """Sum over all cells of some matrices, see :func:`.partitions.summed`."""
    size = chunk_rows(matrices[0].shape[1])
    return partitions.summed(what, matrices, size=size, partition=PARTITION_ROWS, only=only)


def sums_at_a_time(x: Matrix, most: int, on_cluster: int) -> int:
    """Divide the numbers that may be held by how often they are: twice where the cells make more than one partition."""
    if cluster_of(x) is not None:
        return on_cluster
    return most // 2 if x.shape[0] > PARTITION_ROWS else most


def scan(x: Matrix) -> Genes:
    """Look through all cells once for the range of each gene and for what its values are like."""
    n, g = x.shape
    total, lowest, highest, whole, stored, n_bad = summed(_Scanning(g), x)
    full = stored == n
    lowest, highest = np.where(full, lowest, np.minimum(lowest, 0)), np.where(full, highest, np.maximum(highest, 0))
    mean = total / np.maximum(n - n_bad, 1)
    return Genes(mean, lowest, highest, np.where(full, mean, 0.0), whole, n_bad)


@dataclass(frozen=True)
class _Scanning(Summing):
    """Of g genes, the sum, lowest and highest value, whether all are whole, how many are stored, and how many not finite."""

    g: int

    def start(self) -> Sums:
        g = self.g
        counts = np.zeros((2, g), np.int64)
        return np.zeros(g), np.full(g, np.inf), np.full(g, -np.inf), np.ones(g, bool), counts[0], counts[1]

    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        part = dense_or_csr(parts[0])
        if sparse.issparse(part):
            _scan_sparse(part.indices, part.data, *sums)
        else:
            total, lowest, highest, whole, stored, n_bad = sums
            _scan_dense(part, total, lowest, highest, whole, n_bad)
            stored += len(part)

    def join(self, sums: Sums, more: Sums) -> None:
        for into, values, how in zip(
            sums, more, (np.add, np.minimum, np.maximum, np.logical_and, np.add, np.add), strict=True
        ):
            how(into, values, out=into)


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
    for _, blocks in stratum_moments(groups, groups.counts, {0: features}, x, genes, None, block=block):
        yield from blocks


def stratum_moments(
    groups: Groups,
    counts: Counts,
    features: Mapping[int, np.ndarray],
    x: Matrix,
    genes: Genes,
    codes: np.ndarray | None,
    *,
    block: int,
    beside: int = 0,
) -> Iterator[tuple[int, Iterator[Block]]]:
    """Measure every gene in both groups of some features, within each stratum of the cells.

    Parameters
    ----------
    counts
        Cells of the groups in each stratum.
    features
        Those to measure in some strata.
    codes
        (n,) stratum of each cell; None if there is one.
    beside
        Of the 150 million numbers (1.2 GB), those that the caller holds.

    Yields
    ------
    Number and blocks of a stratum, in order; of many features, a stratum comes more than once. The cells are read once for as many
    features of as many strata as memory allows.
    """
    g, sides = max(x.shape[1], 1), len(groups.limits)
    most = max(SUM_VALUES - beside // 2, SUM_VALUES // 4)
    most = sums_at_a_time(x, most, CLUSTER_SUM_VALUES) // (g * sides)
    # In memory one stratum after another is quicker: the sums of a gene stay in the processor's cache.
    for some in _packs(features, most if on_disk(x) else 0, most, block):
        sums = GroupSums(groups, counts, some, x, genes.shift, codes)
        for stratum in some:
            yield stratum, sums.blocks(stratum, block)
        del sums


def _packs(
    features: Mapping[int, np.ndarray], most: int, most_of_one: int, block: int
) -> Iterator[dict[int, np.ndarray]]:
    """Take so many features of several strata, or of one, together, in whole blocks."""
    pack: dict[int, np.ndarray] = {}
    for stratum, chosen in features.items():
        for rows in row_blocks(len(chosen), max(block, most_of_one // block * block)):
            if pack and (stratum in pack or sum(map(len, pack.values())) + len(chosen[rows]) > most):
                yield pack
                pack = {}
            pack[stratum] = chosen[rows]
    if pack:
        yield pack


class GroupSums:
    """Σ(x − shift) and Σ(x − shift)² of every gene over the cells of many groups, or over all others of their stratum.

    The smaller side of a group is summed directly, the other is the rest of the total.

    Parameters
    ----------
    groups
        Of all features.
    counts
        Cells of the groups in each stratum.
    features
        Those to measure in some strata.
    x
        Expression (n, g).
    shift
        (g,) of :func:`scan`.
    codes
        (n,) stratum of each cell; None if there is one.
    """

    def __init__(
        self,
        groups: Groups,
        counts: Counts,
        features: Mapping[int, np.ndarray],
        x: Matrix,
        shift: np.ndarray,
        codes: np.ndarray | None = None,
    ):
        limits, strata = groups.limits, np.array(list(features))
        apart = len(limits) > 1
        self._shift, self._features, self._first = shift, features, {}
        places = np.full((len(strata), *limits.shape), -1, np.int32)
        inside, self._stratum = [], np.repeat(np.arange(len(strata)), [len(limits) * len(f) for f in features.values()])
        n_groups = 0
        for i, (stratum, chosen) in enumerate(features.items()):
            self._first[stratum] = n_groups
            for side, n in enumerate((counts.active, counts.positive)[: len(limits)]):
                places[i, side, chosen] = n_groups + np.arange(len(chosen))
                inside.append(n[stratum, chosen])
                n_groups += len(chosen)
        self._apart = apart
        self._n_inside = np.concatenate(inside)
        self._n = counts.n[strata]
        self._flipped = self._n_inside > self._n[self._stratum] / 2
        adding = _Adding(shift, limits, places, self._flipped, self._stratum)
        if codes is None:
            [self._sums] = summed(adding, x, groups.a)
        else:
            local = np.full(len(counts.n), -1, np.int32)
            local[strata] = np.arange(len(strata))
            of_cells = local[codes]
            [self._sums] = summed(adding, x, groups.a, of_cells, only=of_cells >= 0)

    def blocks(self, stratum: int, block: int) -> Iterator[Block]:
        """Yield the features of a stratum in blocks."""
        chosen, first = self._features[stratum], self._first[stratum]
        for part in row_blocks(len(chosen), block):
            active = slice(first + part.start, first + part.stop)
            apart = len(chosen) if self._apart else 0
            yield Block(chosen[part], self, slice(active.start + apart, active.stop + apart), active)

    def moments(self, groups: slice, *, inside: bool) -> Moments:
        """Return means and variances inside or outside of some groups of one stratum."""
        stratum = self._stratum[groups.start]
        n = self._n_inside[groups]
        n = n if inside else self._n[stratum] - n
        from_rest = self._flipped[groups] if inside else ~self._flipped[groups]
        mean, variance = np.empty((2, len(n), len(self._shift)))
        total = self._sums[:, len(self._stratum) + stratum]
        _finish(self._sums[:, groups], total, from_rest, n, self._shift, mean, variance)
        return Moments(n[:, None].astype(np.float64), mean, variance)


@dataclass(frozen=True)
class _Adding(Summing):
    """Σ(x − shift) and Σ(x − shift)² over the smaller side of each group, and over each stratum: (g, groups + strata, 2)."""

    shift: np.ndarray
    limits: np.ndarray
    """(sides, h), a cell is in a group where the activation is above."""
    places: np.ndarray
    """(strata, sides, h) number of the group, −1 for none."""
    flipped: np.ndarray
    """(groups,) whether the cells that are not in it are summed."""
    stratum: np.ndarray
    """(groups,)"""

    def start(self) -> Sums:
        return (np.zeros((len(self.shift), len(self.flipped) + len(self.places), 2)),)

    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        x, a = dense_or_csr(parts[0]), as_csr(parts[1])
        codes = parts[2] if len(parts) > 2 else np.zeros(a.shape[0], np.int32)
        workers.each(self._adder(x, *self._smaller_sides(a, codes), *sums), range(0, len(self.shift), GENES_PER_TASK))

    def _smaller_sides(self, a: sparse.csr_matrix, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """List for each cell the groups that it is added to."""
        turned = np.flatnonzero(self.flipped)
        turned_of = np.searchsorted(self.stratum[turned], np.arange(len(self.places) + 1))
        most = len(self.limits) * a.nnz + (1 + np.diff(turned_of).max(initial=0)) * len(codes)
        starts, members = np.empty(len(codes) + 1, np.int64), np.empty(most, np.uint32)
        sides = self.limits, self.places, self.flipped, turned, turned_of
        _list_groups(a.indptr, a.indices, a.data, codes, *sides, starts, members)
        return starts, members

    def _adder(
        self, x: Matrix, starts: np.ndarray, members: np.ndarray, sums: np.ndarray
    ) -> Callable[[int, int], None]:
        """Return what adds a chunk of cells to the sums of some genes."""
        g, shift = len(self.shift), self.shift
        if sparse.issparse(x):
            columns = x.tocsc()

            def add(worker: int, low: int) -> None:
                high = min(low + GENES_PER_TASK, g)
                _add_sparse(low, high, columns.indptr, columns.indices, columns.data, shift, starts, members, sums)
        else:
            values = np.ascontiguousarray((x - shift).T)

            def add(worker: int, low: int) -> None:
                _add_dense(low, min(low + GENES_PER_TASK, g), values, starts, members, sums)

        return add


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
def _list_groups(indptr, indices, data, codes, limits, places, flipped, turned, turned_of, starts, members):
    """Write for each cell the groups that it is in, or for those that are flipped is not in, and that of its stratum.

    Parameters
    ----------
    turned, turned_of
        The groups that are flipped, and where those of each stratum begin.
    starts, members
        CSR; written.
    """
    seen = np.full(flipped.size, -1)
    end = 0
    for cell in range(codes.size):
        starts[cell] = end
        stratum = codes[cell]
        if stratum < 0:
            continue
        for e in range(indptr[cell], indptr[cell + 1]):
            value, feature = float64(data[e]), indices[e]
            for side in range(limits.shape[0]):
                group = places[stratum, side, feature]
                if group >= 0 and value > limits[side, feature]:
                    if flipped[group]:
                        seen[group] = cell
                    else:
                        members[end] = group
                        end += 1
        for k in range(turned_of[stratum], turned_of[stratum + 1]):
            if seen[turned[k]] != cell:
                members[end] = turned[k]
                end += 1
        members[end] = flipped.size + stratum
        end += 1
    starts[codes.size] = end


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
