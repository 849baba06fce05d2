"""How far expression changes when cells are moved in the latent: sums over cells, and a paired test of every gene."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from .rows import Matrix, dense_rows, pieces, select_rows
from .statistics import benjamini_hochberg, log2_fold_change
from .steering import Decode, Steps, chunk_rows
from .student import log_two_sided
from .workers import Workers, available_threads

SUM_BYTES = 256_000_000
"""What the sums of the features that are steered together may take."""

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class Changes:
    """Sums over cells of how much each gene changes, in each group of cells; all arrays (groups, genes), float64."""

    n: np.ndarray
    """(groups,) cells, those that were left as they are included: they change by 0."""
    before: np.ndarray
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, n: np.ndarray, before: np.ndarray) -> Changes:
        """Start with no change, from the sums of expression before."""
        return cls(n, before, np.zeros_like(before), np.zeros_like(before))

    def add(self, before: np.ndarray, after: np.ndarray, rows: np.ndarray, codes: np.ndarray, workers: Workers) -> None:
        """Add some cells: `after` (m, genes) of the `rows` (m,) of `before`, which belong to the groups `codes` (m,)."""

        def stripe(_: int, columns: slice) -> None:
            _add_changes(before, after, rows, codes, columns.start, columns.stop, self.total, self.squares)

        workers.each(stripe, _stripes(before.shape[1], workers.n))

    @property
    def mean(self) -> np.ndarray:
        """Mean change d̄ of each gene; NaN in a group without cells."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.total / self.n[:, None]


@dataclass(frozen=True)
class Paired:
    """A paired t-test of every gene in every group; all arrays (groups, genes), NaN where nothing changes at all."""

    change: np.ndarray
    """d̄, the mean over cells of after − before."""
    log2fc: np.ndarray
    score: np.ndarray
    """t = d̄ √n / s, with s the standard deviation of the changes."""
    pval: np.ndarray
    padj: np.ndarray
    """Over the genes of a group."""


def add_rows(values: np.ndarray, codes: np.ndarray, sums: np.ndarray, workers: Workers) -> None:
    """Add the rows of `values` (m, genes) to the `sums` (groups, genes) of their groups."""

    def stripe(_: int, columns: slice) -> None:
        _add_rows(values, codes, columns.start, columns.stop, sums)

    workers.each(stripe, _stripes(values.shape[1], workers.n))


def _stripes(n_columns: int, n: int) -> list[slice]:
    edges = np.linspace(0, n_columns, n + 1).astype(int)
    return [slice(int(first), int(last)) for first, last in zip(edges[:-1], edges[1:], strict=True)]


def paired_test(changes: Changes, log_base: float | None, pseudocount: float, *, log: bool = False) -> Paired:
    """Test whether genes change, in the same cells before and after.

    Parameters
    ----------
    log_base
        The base b of values log_b(1 + x), None for plain values, NaN for those that have no fold change.
    pseudocount
        Of the fold change, see :func:`log2_fold_change`.
    log
        Values are natural logarithms themselves: log2fc is d̄ / ln 2.
    """
    n = changes.n[:, None].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        change = changes.total / n
        # What rounding leaves of equal changes is no variance.
        spread = changes.squares - n * change**2
        variance = np.where(spread > 1e-12 * changes.squares, spread, 0) / (n - 1)
        score = np.where(changes.squares == 0, np.nan, change / np.sqrt(variance / n))
        before = changes.before / n
        if log:
            log2fc = change / np.log(2)
        else:
            log2fc = log2_fold_change(before + change, before, log_base=log_base, pseudocount=pseudocount)
    score[np.broadcast_to(n < 2, score.shape)] = np.nan
    pval = np.exp(log_two_sided(score, np.broadcast_to(np.maximum(n - 1, 1), score.shape)))
    return Paired(change, log2fc, score, pval, benjamini_hochberg(pval))


def new_workers() -> Workers:
    """Threads for sums over cells."""
    return Workers(available_threads())


def summed_changes(
    z: Matrix,
    cells: np.ndarray,
    codes: np.ndarray,
    steps: Sequence[Steps],
    decode: Decode,
    n_genes: Sequence[int],
    *,
    on_chunk: Callable[[int], object] | None = None,
) -> Iterator[list[Changes]]:
    """Decode cells before and after each of several interventions, and add up how their expression changes.

    Cells are read in chunks, all interventions of a block at each, so that memory does not depend on their number.

    Parameters
    ----------
    z
        (N, d), in memory or on disk.
    cells
        (n,) positions in `z` of the cells that are steered.
    codes
        (n,) group of each.
    steps
        A step for each of the n cells, per intervention.
    n_genes
        Of each modality.
    on_chunk
        Called with the number of interventions that a chunk of cells is through with.

    Yields
    ------
    Of each intervention, the changes of each modality.
    """
    n = np.bincount(codes)
    at_once = max(1, SUM_BYTES // (16 * len(n) * sum(n_genes)))
    workers = new_workers()
    before = [np.zeros((len(n), g)) for g in n_genes]
    try:
        for first in range(0, len(steps), at_once):
            block = steps[first : first + at_once]
            found = [[Changes.none(n, sums) for sums in before] for _ in block]
            for rows, part in pieces(select_rows(z, cells), chunk_rows(n_genes)):
                some = dense_rows(part, slice(None)).astype(np.float32, copy=False)
                base = decode(cells[rows], some, None)
                if first == 0:
                    for sums, values in zip(before, base, strict=True):
                        add_rows(values, codes[rows], sums, workers)
                for step, changes in zip(block, found, strict=True):
                    moved = np.flatnonzero(step.moved(rows))
                    if len(moved):
                        at = rows.start + moved
                        after = decode(cells[at], some[moved], step.of(at))
                        for one, other, change in zip(base, after, changes, strict=True):
                            change.add(one, other, moved, codes[at], workers)
                if on_chunk is not None:
                    on_chunk(len(block))
            yield from found
    finally:
        workers.close()


def group_means(z: Matrix, cells: np.ndarray, codes: np.ndarray, n_groups: int) -> np.ndarray:
    """Return the mean latent (groups, d) of cells, by group; NaN for a group without cells."""
    total = np.zeros((n_groups, z.shape[1]))
    for rows, part in pieces(select_rows(z, cells), 8192):
        np.add.at(total, codes[rows], dense_rows(part, slice(None)))
    with np.errstate(invalid="ignore"):
        return total / np.bincount(codes, minlength=n_groups)[:, None]


@_compiled
def _add_changes(before, after, rows, codes, first, last, total, squares):
    for i in range(len(rows)):
        # Slices, so that the inner loop runs from 0 over contiguous values and is compiled to vector instructions.
        one, other = before[rows[i], first:last], after[i, first:last]
        sums, second = total[codes[i], first:last], squares[codes[i], first:last]
        for j in range(last - first):
            change = np.float64(other[j]) - np.float64(one[j])
            sums[j] += change
            second[j] += change * change


@_compiled
def _add_rows(values, codes, first, last, sums):
    for i in range(len(codes)):
        row, into = values[i, first:last], sums[codes[i], first:last]
        for j in range(last - first):
            into[j] += row[j]
