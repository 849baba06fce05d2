"""Intervals on chromosomes: which overlap, and which genes a peak lies in or near."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CHROMOSOME_LENGTH = 1 << 40
"""Apart from each other by this much, positions on different chromosomes are as good as on one."""
PROMOTER, BODY, DISTAL = range(3)


@dataclass(frozen=True)
class Intervals:
    """Arrays (i,): the number of the chromosome, and the first and last position, both of which belong to the interval."""

    chromosome: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Return start and end on one line that has all chromosomes."""
        offset = self.chromosome.astype(np.int64) * CHROMOSOME_LENGTH
        return offset + self.start, offset + self.end

    def of(self, chosen: np.ndarray) -> Intervals:
        """Return some of them."""
        return Intervals(self.chromosome[chosen], self.start[chosen], self.end[chosen])


@dataclass(frozen=True)
class Nearby:
    """Pairs of a peak and a gene, arrays (p,); by peak, then kind, then distance, each pair once.

    Attributes
    ----------
    peak, gene
        Their numbers.
    kind
        `PROMOTER`, `BODY` or `DISTAL`.
    distance
        From the gene's start to the peak, along its strand: 0 where the peak has the start in it, negative upstream.
    """

    peak: np.ndarray
    gene: np.ndarray
    kind: np.ndarray
    distance: np.ndarray


def overlaps(a: Intervals, b: Intervals) -> tuple[np.ndarray, np.ndarray]:
    """Find all pairs of intervals that share a position: numbers in `a`, and in `b`.

    Of two that do, the one that does not start first starts in the other. Those that start in an interval are neighbours
    when all are sorted by their start.
    """
    (a_start, a_end), (b_start, b_end) = a.keys(), b.keys()
    in_a, b_started = _starting_in(a_start, a_end, b_start, "left")
    in_b, a_started = _starting_in(b_start, b_end, a_start, "right")
    return np.concatenate([in_a, a_started]), np.concatenate([b_started, in_b])


def near_genes(
    peaks: Intervals,
    genes: Intervals,
    strand: np.ndarray,
    names: np.ndarray,
    *,
    upstream: int,
    downstream: int,
    max_distance: int,
) -> Nearby:
    """Find the genes whose promoter or body each peak overlaps; of the others, the genes with the nearest start.

    Parameters
    ----------
    genes
        Rows of a table of genes, of which several can be of one gene.
    strand
        (g,) 1, −1, or 0 where it is not known: either end is then taken for the start.
    names
        (g,) number of the gene that a row is of.
    upstream, downstream
        The promoter reaches from so much before the start to so much after it.
    max_distance
        To the nearest start, of peaks in no promoter or body; 0 for none.
    """
    unknown = np.flatnonzero(strand == 0)
    rows = np.concatenate([np.arange(len(strand)), unknown])
    sign = np.concatenate([np.where(strand == 0, 1, strand), np.full(len(unknown), -1)])
    bodies, owner = genes.of(rows), names[rows]
    tss = np.where(sign > 0, bodies.start, bodies.end)
    before, after = np.where(sign > 0, upstream, downstream), np.where(sign > 0, downstream, upstream)
    promoters = Intervals(bodies.chromosome, tss - before, tss + after)

    found = [overlaps(peaks, promoters), overlaps(peaks, bodies)]
    placed = np.zeros(len(peaks.start), dtype=bool)
    placed[np.concatenate([peak for peak, _ in found])] = True
    orphans = np.flatnonzero(~placed)
    peak, row = _nearest(peaks.of(orphans), Intervals(bodies.chromosome, tss, tss), max_distance)
    found.append((orphans[peak], row))

    kind = np.repeat([PROMOTER, BODY, DISTAL], [len(peak) for peak, _ in found])
    peak, row = (np.concatenate(part) for part in zip(*found, strict=True))
    distance = sign[row] * _distance(peaks.of(peak), tss[row])
    order = np.lexsort((owner[row], np.abs(distance), kind, peak))
    peak, gene, kind, distance = peak[order], owner[row][order], kind[order], distance[order]
    _, first = np.unique(peak * (names.max(initial=0) + 1) + gene, return_index=True)
    first.sort()
    return Nearby(peak[first], gene[first], kind[first], distance[first])


def _starting_in(low: np.ndarray, high: np.ndarray, starts: np.ndarray, side: str) -> tuple[np.ndarray, np.ndarray]:
    """List the intervals (low to high), each with every start in it; with `side="right"` not those at `low` itself."""
    order = np.argsort(starts, kind="stable")
    first = np.searchsorted(starts[order], low, side=side)  # type: ignore[call-overload]
    return _ranges(first, np.searchsorted(starts[order], high, side="right"), order)


def _ranges(first: np.ndarray, last: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the number of each range, with all of `order[first:last]`."""
    n = np.maximum(last - first, 0)
    within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    return np.repeat(np.arange(len(n)), n), order[np.repeat(first, n) + within]


def _distance(intervals: Intervals, point: np.ndarray) -> np.ndarray:
    """Return how far each interval is beyond its point: 0 where it holds it, negative where it ends before."""
    return np.maximum(intervals.start - point, 0) + np.minimum(intervals.end - point, 0)


def _nearest(intervals: Intervals, points: Intervals, most: int) -> tuple[np.ndarray, np.ndarray]:
    """List the intervals with the points nearest to them, several where they are as near, up to a distance of `most`."""
    if most <= 0 or len(points.start) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    (low, high), (place, _) = intervals.keys(), points.keys()
    order = np.argsort(place, kind="stable")
    ordered = place[order]
    preceding = np.searchsorted(ordered, low, side="right") - 1
    following = np.searchsorted(ordered, high, side="left")
    beyond = most + 1
    behind = np.where(preceding >= 0, low - ordered[np.maximum(preceding, 0)], beyond)
    ahead = np.where(following < len(ordered), ordered[np.minimum(following, len(ordered) - 1)] - high, beyond)
    nearest = np.minimum(np.minimum(behind, ahead), beyond)
    lists = []
    for at, apart in ((low - nearest, behind), (high + nearest, ahead)):
        near = np.flatnonzero((apart == nearest) & (nearest <= most))
        first, last = np.searchsorted(ordered, at[near]), np.searchsorted(ordered, at[near], side="right")
        which, point = _ranges(first, last, order)
        lists.append((near[which], point))
    return np.concatenate([which for which, _ in lists]), np.concatenate([point for _, point in lists])
