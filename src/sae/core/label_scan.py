"""Columns from their highest value down, and what is met on the way: pairs of cells, thresholds and ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numba import njit

from .columns import GeneBlock, GeneColumns
from .rows import Matrix, row_blocks
from .workers import Workers, available_threads

RESULT_VALUES = 2_000_000
"""Divisions × columns × labels that are scored at a time (0.1 GB)."""

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")
_inlined: Any = njit(inline="always", error_model="numpy")


def groups_of(codes: np.ndarray, n_labels: int, halves: np.ndarray) -> np.ndarray:
    """Number the label and half of each cell together: (splits, n), label + n_labels × half."""
    groups = np.empty(halves.shape, np.uint16 if 2 * n_labels <= 2**16 else np.uint32)
    for group, half in zip(groups, halves, strict=True):
        group[:] = codes
        group[half == 1] += np.asarray(n_labels, groups.dtype)
    return groups


def sizes_of(groups: np.ndarray, n_labels: int) -> np.ndarray:
    """Count the cells of each half and label (splits, 2, labels)."""
    counts = [np.bincount(group, minlength=2 * n_labels) for group in groups]
    return np.array(counts, dtype=np.float64).reshape(len(groups), 2, n_labels)


def scanned(
    x: Matrix, groups: np.ndarray, n_labels: int, *, both_signs: bool = False
) -> Iterator[tuple[slice, list[Scan]]]:
    """Yield blocks of columns, and what :func:`_scan` finds of them in each division of the cells."""
    sizes = sizes_of(groups, n_labels)
    most = max(1, RESULT_VALUES // (n_labels * len(groups)))
    workers = Workers(available_threads())
    try:
        for columns, block in sorted_columns(x, both_signs=both_signs):
            for some in row_blocks(len(block), most):
                starts = block.starts[some.start : some.stop + 1]

                def scan(_: int, split: int, starts: np.ndarray = starts, block: GeneBlock = block) -> Scan:
                    return _scan(starts, block.cells, block.values, groups[split], sizes[split])

                scans = workers.each(scan, range(len(groups)))
                yield slice(columns.start + some.start, columns.start + some.stop), scans
            # Before the next one is gathered, or two would be held.
            del block, scan
    finally:
        workers.close()


def sorted_columns(x: Matrix, *, both_signs: bool = False) -> Iterator[tuple[slice, GeneBlock]]:
    """Yield blocks of columns, the values of each from the highest down; with both signs, that of −x after each block.

    Cells that are missing have zero, wherever that is among the others.
    """
    workers = Workers(available_threads())
    try:
        for block in GeneColumns(x).blocks(workers):
            shares = list(row_blocks(len(block), -(-len(block) // (4 * workers.n))))
            several = np.diff(block.starts) > 1

            def sort(_: int, share: slice, block: GeneBlock = block, several: np.ndarray = several) -> None:
                for j in share.start + np.flatnonzero(several[share]):
                    cells, values = block.gene(j)
                    order = np.argsort(-values)
                    cells[:], values[:] = cells[order], values[order]

            def turn(_: int, share: slice, block: GeneBlock = block) -> None:
                for j in range(share.start, share.stop):
                    cells, values = block.gene(j)
                    cells[:], values[:] = cells[::-1].copy(), -values[::-1]

            columns = slice(block.first, block.first + len(block))
            workers.each(sort, shares)
            yield columns, block
            if both_signs:
                workers.each(turn, shares)
                yield slice(x.shape[1] + columns.start, x.shape[1] + columns.stop), block
            # Before the next one is gathered, or two would be held.
            del block, sort, turn
    finally:
        workers.close()


Scan: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""What :func:`_scan` returns."""


@_inlined
def _reach(best, crossed, p, label, hits, size, below):
    """Take the threshold that has been reached where its F1 is higher than those above."""
    f1 = 2 * hits[p, label] / (below[p] + size[p, label])
    if f1 > best[p, label]:
        best[p, label] = f1
        crossed[p, label] = 2 * hits[1 - p, label] / max(below[1 - p] + size[1 - p, label], 1)


@_inlined
def _tie(ties, above, below):
    """Count the cells that were passed as tied, and move on."""
    for p in range(2):
        tied = below[p] - above[p]
        ties[p, 0] += tied**2
        ties[p, 1] += tied**3
        above[p] = below[p]


@_compiled
def _untied(start, end, cells, values, groups, size, n, u, best, crossed, ties, hits, above):
    """Go down as long as there is one cell of each value, and zero is not passed: the most frequent case, on its own because it is fast then."""
    n_labels = size.shape[1]
    positive = values[start] > 0
    while start < end and values[start] != 0 and (values[start] > 0) == positive:
        if start + 1 < end and values[start + 1] == values[start]:
            break
        group = groups[cells[start]]
        p = int(group >= n_labels)
        label = group - p * n_labels
        u[p, label] += n[p] - above[p] - 0.5
        above[p] += 1
        hits[p, label] += 1
        _reach(best, crossed, p, label, hits, size, above)
        ties[p, 0] += 1
        ties[p, 1] += 1
        start += 1
    return start


@_compiled
def _scan(starts: np.ndarray, cells: np.ndarray, values: np.ndarray, groups: np.ndarray, size: np.ndarray) -> Scan:
    """Go down the sorted values of every column, the two halves of the cells side by side.

    Parameters
    ----------
    starts, cells, values
        Of some sorted columns. Cells that are missing have zero.
    groups
        (n,) label + n_labels × half of each cell.
    size
        (2, labels) cells.

    Returns
    -------
    Mann-Whitney U of every label, best F1, F1 in the other half at the threshold of the best (all (columns, 2, labels)),
    and Σ t² and Σ t³ over groups of t tied cells (columns, 2, 2).
    """
    h, n_labels = len(starts) - 1, size.shape[1]
    u = np.zeros((h, 2, n_labels))
    best, crossed = np.zeros((h, 2, n_labels)), np.zeros((h, 2, n_labels))
    ties = np.zeros((h, 2, 2))
    n = np.array([size[0].sum(), size[1].sum()])
    hits, zeros = np.zeros((2, n_labels)), np.zeros((2, n_labels))
    above, below = np.zeros(2), np.zeros(2)
    for j in range(h):
        hits[:] = 0
        above[:] = 0
        start, end = starts[j], starts[j + 1]
        while start < end:
            if values[start] == 0:
                # They are counted with the cells that are missing.
                start += 1
                continue
            if values[start] < 0 and (start == starts[j] or values[start - 1] >= 0):
                below[:] = above
                zeros[:] = size - hits
                for i in range(start, end):
                    group = groups[cells[i]]
                    zeros[group // n_labels, group % n_labels] -= 1
                hits += zeros
                for p in range(2):
                    below[p] += zeros[p].sum()
                for p in range(2):
                    for label in range(n_labels):
                        if zeros[p, label] > 0:
                            u[j, p, label] += zeros[p, label] * (n[p] - (above[p] + below[p]) / 2)
                            _reach(best[j], crossed[j], p, label, hits, size, below)
                _tie(ties[j], above, below)
            stop = _untied(start, end, cells, values, groups, size, n, u[j], best[j], crossed[j], ties[j], hits, above)
            if stop > start:
                start = stop
                continue
            below[:] = above
            while stop < end and values[stop] == values[start]:
                group = groups[cells[stop]]
                p = int(group >= n_labels)
                below[p] += 1
                hits[p, group - p * n_labels] += 1
                stop += 1
            for i in range(start, stop):
                # Only a threshold that reaches another cell of the label can raise its F1.
                group = groups[cells[i]]
                p = int(group >= n_labels)
                label = group - p * n_labels
                u[j, p, label] += n[p] - (above[p] + below[p]) / 2
                _reach(best[j], crossed[j], p, label, hits, size, below)
            _tie(ties[j], above, below)
            start = stop
        for p in range(2):
            left = n[p] - above[p]
            ties[j, p, 0] += left**2
            ties[j, p, 1] += left**3
            for label in range(n_labels):
                u[j, p, label] += (size[p, label] - hits[p, label]) * left / 2
                # So far a cell was also compared with those of its own label.
                u[j, p, label] -= size[p, label] ** 2 / 2
    return u, best, crossed, ties


@_compiled
def scan_trend(starts, cells, values, codes, size, pairs, squares, cubes):
    """Add up J, Σ t² and Σ t³ of sorted columns ≥ 0."""
    n_labels = len(size)
    left, tied = np.empty(n_labels), np.empty(n_labels)
    for j in range(len(starts) - 1):
        left[:] = size
        start, end = starts[j], starts[j + 1]
        while start < end and values[start] > 0:
            stop = start
            tied[:] = 0
            while stop < end and values[stop] == values[start]:
                tied[codes[cells[stop]]] += 1
                stop += 1
            for i in range(start, stop):
                for lower in range(codes[cells[i]]):
                    pairs[j] += left[lower] - tied[lower] / 2
            left -= tied
            squares[j] += float(stop - start) ** 2
            cubes[j] += float(stop - start) ** 3
            start = stop
        for label in range(n_labels):
            for lower in range(label):
                pairs[j] += left[label] * left[lower] / 2
        squares[j] += left.sum() ** 2
        cubes[j] += left.sum() ** 3
