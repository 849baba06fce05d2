"""Which cells stand for a feature, and which it is compared with; told cell by cell, from activations in memory or on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import float64, njit
from scipy import sparse

from .moments import chunks, summed
from .partitions import Summing, Sums
from .rows import Matrix, as_csr, on_disk, take_rows
from .workers import Workers

DIGIT_BITS = 8
"""A percentile is found digit by digit, each in one pass over the activations: four for float32."""

_compiled: Any = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class Counts:
    """Cells of b strata."""

    n: np.ndarray
    """(b,)"""
    active: np.ndarray
    positive: np.ndarray
    """(b, h)"""


@dataclass(frozen=True)
class Groups:
    """Two groups of cells for each of h features: those that stand for it, and those where it is zero.

    Attributes
    ----------
    a
        Activations (n, h), in memory or read by rows.
    n_active, n_positive
        Cells (h,) where each feature is above zero, and of the positive group.
    threshold
        (h,) ≥ 0; cells above it are positive. None: all active cells.
    """

    a: Matrix
    n_active: np.ndarray
    n_positive: np.ndarray
    threshold: np.ndarray | None = None

    @property
    def n_reference(self) -> np.ndarray:
        """Cells where each feature is zero."""
        return self.a.shape[0] - self.n_active

    @property
    def limits(self) -> np.ndarray:
        """(1 or 2, h): cells are active above the first, and positive above the last."""
        zero = np.zeros(self.a.shape[1])
        return np.stack([zero] if self.threshold is None else [zero, self.threshold.astype(np.float64)])

    @property
    def counts(self) -> Counts:
        """Cells of all strata together."""
        return Counts(np.array([self.a.shape[0]]), self.n_active[None], self.n_positive[None])

    def within(self, codes: np.ndarray) -> Counts:
        """Count the cells of each stratum; `codes` (n,) are 0, 1, ...."""
        [counts] = summed(_Counting(self.limits, int(codes.max(initial=-1)) + 1), self.a, codes)
        return Counts(np.bincount(codes, minlength=len(counts)), counts[:, 0], counts[:, -1])

    def active(self, rows: slice = slice(None)) -> sparse.csr_matrix:
        """Mark where each feature is active in some cells (rows, h)."""
        return marked(take_rows(self.a, rows), self.limits[0])

    def positive(self, rows: slice = slice(None)) -> sparse.csr_matrix:
        """Mark where some cells (rows, h) stand for each feature."""
        return marked(take_rows(self.a, rows), self.limits[-1])

    def status(self, min_cells: int) -> np.ndarray:
        """Say of each feature whether it can be tested, or why not (h,)."""
        few = "active cells" if self.threshold is None else "cells above the percentile"
        return np.select(
            [self.n_positive < min_cells, self.n_reference < min_cells],
            [f"fewer than {min_cells} {few}", f"fewer than {min_cells} inactive cells"],
            "tested",
        ).astype(object)

    def reordered(self, order: np.ndarray) -> Groups:
        """Give each cell the activations of another one, `order` (n,); from disk, those of all cells come into memory."""
        if not on_disk(self.a):
            return replace(self, a=self.a[order])
        held = self.in_memory()
        before = held.a.order
        return replace(held, a=replace(held.a, order=order if before is None else before[order]))

    def in_memory(self) -> Groups:
        """Return the same groups, of what memory need hold if the activations are on disk: two or three bytes for each."""
        if not on_disk(self.a) or isinstance(self.a, Pattern):
            return self
        pattern = pattern_of(self, np.arange(self.a.shape[1]))
        return replace(self, a=pattern, threshold=None if self.threshold is None else np.ones(self.a.shape[1]))


@dataclass(frozen=True)
class Pattern:
    """Which features are active in each cell, in as little memory as that takes; gives rows like a matrix on disk.

    Attributes
    ----------
    starts
        (n + 1,) where each cell begins in the others.
    features
        (active,) as the smallest integers that hold their numbers.
    levels
        (active,): 2 where the cell is positive, else 1. None: all are.
    shape
        Cells and features.
    order
        (n,) cells in the order in which they are given; None for their own.
    """

    starts: np.ndarray
    features: np.ndarray
    levels: np.ndarray | None
    shape: tuple[int, int]
    order: np.ndarray | None = None

    dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> sparse.csr_matrix:
        """Return the levels of some cells."""
        if self.order is None:
            first, last, _ = rows.indices(self.shape[0])
            starts = self.starts[first : last + 1]
            entries: Any = slice(starts[0], starts[-1])
            starts = starts - starts[0]
        else:
            cells = self.order[rows]
            sizes = self.starts[cells + 1] - self.starts[cells]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            entries = np.arange(starts[-1]) + np.repeat(self.starts[cells] - starts[:-1], sizes)
        features = self.features[entries].astype(np.int32)
        levels = np.ones(len(features), np.uint8) if self.levels is None else self.levels[entries]
        return sparse.csr_matrix((levels, features, starts), shape=(len(starts) - 1, self.shape[1]))


def pattern_of(groups: Groups, features: np.ndarray) -> Pattern:
    """Read the pattern of some features (rising), which are numbered anew."""
    n, h = groups.a.shape
    n_active = int(groups.n_active[features].sum())
    kind = np.uint16 if len(features) <= 2**16 else np.uint32
    found = Pattern(
        np.zeros(n + 1, np.int64),
        np.empty(n_active, kind),
        None if groups.threshold is None else np.empty(n_active, np.uint8),
        (n, len(features)),
    )
    place = np.full(h, -1)
    place[features] = np.arange(len(features))
    limits = groups.limits[-1]
    row = end = 0
    for _, part in chunks(groups.a):
        part = as_csr(part)
        chosen = place[part.indices]
        kept = (part.data > 0) & (chosen >= 0)
        last = end + int(np.count_nonzero(kept))
        found.features[end:last] = chosen[kept]
        if found.levels is not None:
            found.levels[end:last] = 1 + (part.data[kept] > limits[part.indices[kept]])
        found.starts[row + 1 : row + part.shape[0] + 1] = end + np.append(0, np.cumsum(kept))[part.indptr[1:]]
        row, end = row + part.shape[0], last
    return found


def marked(part: Any, limits: np.ndarray) -> sparse.csr_matrix:
    """Mark where activations (rows, h) are above a limit (h,)."""
    rows = as_csr(part)
    above = rows.data > limits[rows.indices]
    starts = np.append(0, np.cumsum(above))[rows.indptr]
    return sparse.csr_matrix((np.ones(starts[-1], bool), rows.indices[above], starts), shape=rows.shape)


def active_groups(a: Matrix) -> Groups:
    """Compare the cells where a feature is above zero with all others."""
    [counts] = summed(_Counting(np.zeros((1, a.shape[1])), 1), a)
    return Groups(a, counts[0, 0], counts[0, 0])


def percentile_groups(a: Matrix, percentile: float = 99) -> Groups:
    """Select the cells where a feature is above a percentile of its activation over all cells.

    The percentile is NumPy's, with linear interpolation. It lies between two neighbours among the sorted values and
    below the higher one, so the cells above it are those above the lower neighbour, and nothing is interpolated. Where
    the lower neighbour is zero (fewer than 1 % of the cells are active, for the 99th percentile) these are all active
    cells.

    The lower neighbour is found in binary, eight digits at a time: its first digits are known from how many values have
    which, the next ones from the values that begin like it. Positive numbers are in the order of their bits.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    percentile
        0 to 100.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile={percentile} is not between 0 and 100.")
    n, h = a.shape
    number = np.dtype(np.float32 if a.dtype == np.float32 else np.float64)
    shifts = range(8 * number.itemsize - DIGIT_BITS, -1, -DIGIT_BITS)
    lower, n_below = np.zeros(h, np.uint64), np.zeros(h, np.int64)
    for shift in shifts:
        [sizes] = summed(_CountingDigits(number, shift, lower), a)
        up_to = n_below[:, None] + np.cumsum(sizes, axis=1)
        if shift == shifts[0]:
            n_active = up_to[:, -1]
            # Zeros are the lowest values, so this is a place among the active cells, or negative where it falls on a zero.
            place = int((n - 1) * (percentile / 100)) - (n - n_active)
        digit = np.sum(up_to[:, :-1] <= place[:, None], axis=1)
        n_below = np.where(digit > 0, up_to[np.arange(h), digit - 1], n_below)
        lower = (lower << np.uint64(DIGIT_BITS)) | digit.astype(np.uint64)
    n_positive = n_active - up_to[np.arange(h), digit]
    threshold = lower.astype(f"u{number.itemsize}").view(number)
    among_zeros = place < 0
    return Groups(a, n_active, np.where(among_zeros, n_active, n_positive), np.where(among_zeros, 0, threshold))


@dataclass(frozen=True)
class _Counting(Summing):
    """Cells above one or two limits (k, h) in each of b strata, the rows of another matrix: (b, k, h)."""

    limits: np.ndarray
    n_strata: int

    def start(self) -> Sums:
        return (np.zeros((self.n_strata, *self.limits.shape), np.int64),)

    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        rows = as_csr(parts[0])
        codes = parts[1] if len(parts) > 1 else np.zeros(rows.shape[0], np.int64)
        _count(rows.indptr, rows.indices, rows.data, self.limits, codes, *sums)


@dataclass(frozen=True)
class _CountingDigits(Summing):
    """How many of the positive values of each feature whose first binary digits are known (h,) have which next eight (h, 256)."""

    number: np.dtype
    shift: int
    known: np.ndarray

    def start(self) -> Sums:
        return (np.zeros((len(self.known), 2**DIGIT_BITS), np.int64),)

    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        rows = as_csr(parts[0])
        values = rows.data.astype(self.number, copy=False)
        bits = values.view(f"u{self.number.itemsize}")
        _count_digits(rows.indices, values, bits, np.uint64(self.shift), self.known, *sums)


@_compiled
def _count(indptr, indices, data, limits, codes, counts):
    for cell in range(codes.size):
        of_stratum = counts[codes[cell]]
        for e in range(indptr[cell], indptr[cell + 1]):
            for k in range(limits.shape[0]):
                of_stratum[k, indices[e]] += float64(data[e]) > limits[k, indices[e]]


@_compiled
def _count_digits(indices, values, bits, shift, known, sizes):
    n_digits = np.uint64(sizes.shape[1])
    for e in range(indices.size):
        if values[e] > 0:
            # Of mixed signs, integers would become floats.
            digits = np.uint64(bits[e]) >> shift
            if digits // n_digits == known[indices[e]]:
                sizes[indices[e], np.int64(digits % n_digits)] += 1
