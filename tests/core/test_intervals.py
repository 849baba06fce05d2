from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.core.intervals import BODY, CHROMOSOME_LENGTH, DISTAL, PROMOTER, Intervals, near_genes, overlaps


def intervals(rows):
    """From rows of (chromosome, start, length − 1)."""
    chromosome, start, length = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Intervals(chromosome, start, start + length)


def rows(most, n_chromosomes=3, length=40):
    return st.lists(
        st.tuples(st.integers(0, n_chromosomes - 1), st.integers(0, 200), st.integers(0, length)), max_size=most
    )


@given(rows(25), rows(25))
def test_overlaps_are_those_of_two_loops(a, b):
    a, b = intervals(a), intervals(b)
    expected = [
        (i, j)
        for i in range(len(a.start))
        for j in range(len(b.start))
        if a.chromosome[i] == b.chromosome[j] and a.start[i] <= b.end[j] and b.start[j] <= a.end[i]
    ]
    assert sorted(zip(*overlaps(a, b), strict=True)) == expected


def two_loops(peaks, genes, strand, names, upstream, downstream, max_distance):
    """The genes of every peak, from the definition: {(peak, gene): (kind, distance)}."""
    found = {}
    for p in range(len(peaks.start)):
        low, high = peaks.start[p], peaks.end[p]
        candidates = []
        for g in range(len(strand)):
            if genes.chromosome[g] != peaks.chromosome[p]:
                continue
            for sign in (1, -1) if strand[g] == 0 else (strand[g],):
                tss = genes.start[g] if sign > 0 else genes.end[g]
                distance = 0 if low <= tss <= high else low - tss if low > tss else high - tss
                near = [sign * (position - tss) for position in range(low, high + 1)]
                if any(-upstream <= step <= downstream for step in near):
                    kind = PROMOTER
                elif low <= genes.end[g] and genes.start[g] <= high:
                    kind = BODY
                else:
                    kind = DISTAL
                candidates.append((kind, abs(distance), names[g], sign * distance))
        if all(kind == DISTAL for kind, *_ in candidates):
            nearest = min((apart for _, apart, *_ in candidates), default=0)
            candidates = [row for row in candidates if row[1] == nearest <= max_distance]
        else:
            candidates = [row for row in candidates if row[0] != DISTAL]
        for kind, _, name, distance in sorted(candidates, key=lambda row: row[:3]):
            found.setdefault((p, name), (kind, abs(distance)))
    return found


@given(
    rows(12, length=20),
    rows(10, length=60),
    st.lists(st.sampled_from([-1, 0, 1]), min_size=10, max_size=10),
    st.lists(st.integers(0, 5), min_size=10, max_size=10),
    st.tuples(st.integers(0, 30), st.integers(0, 10), st.sampled_from([0, 1, 15, 80])),
)
@settings(max_examples=300)
def test_near_genes_are_those_of_two_loops(peaks, genes, strand, names, reach):
    peaks, genes = intervals(peaks), intervals(genes)
    strand, names = np.array(strand)[: len(genes.start)], np.array(names)[: len(genes.start)]
    upstream, downstream, max_distance = reach
    found = near_genes(peaks, genes, strand, names, upstream=upstream, downstream=downstream, max_distance=max_distance)
    pairs = list(zip(found.peak.tolist(), found.gene.tolist(), strict=True))
    measured = zip(found.kind.tolist(), np.abs(found.distance).tolist(), strict=True)
    assert len(pairs) == len(set(pairs))
    assert dict(zip(pairs, measured, strict=True)) == two_loops(peaks, genes, strand, names, *reach)
    ordered = list(zip(found.peak, found.kind, np.abs(found.distance), found.gene, strict=True))
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(
    ("start", "end", "strand", "kind", "distance"),
    [
        pytest.param(800, 850, 1, PROMOTER, -150, id="upstream"),
        pytest.param(995, 1005, 1, PROMOTER, 0, id="holds the start"),
        pytest.param(1010, 1020, 1, PROMOTER, 10, id="downstream of the start"),
        pytest.param(1500, 1600, 1, BODY, 500, id="in the body"),
        pytest.param(2100, 2200, 1, DISTAL, 1100, id="after the end"),
        pytest.param(2100, 2200, -1, PROMOTER, -100, id="upstream on the other strand"),
        pytest.param(1500, 1600, -1, BODY, 400, id="in the body on the other strand"),
        pytest.param(800, 850, -1, DISTAL, 1150, id="after the end on the other strand"),
        pytest.param(2100, 2200, 0, PROMOTER, -100, id="unknown strand, one end"),
        pytest.param(800, 850, 0, PROMOTER, -150, id="unknown strand, other end"),
    ],
)
def test_a_peak_by_hand(start, end, strand, kind, distance):
    """A gene from 1000 to 2000, whose promoter reaches from 200 before its start to 20 after."""
    peaks, genes = intervals([(0, start, end - start)]), intervals([(0, 1000, 1000)])
    found = near_genes(peaks, genes, np.array([strand]), np.array([0]), upstream=200, downstream=20, max_distance=2000)
    assert (found.kind.tolist(), found.distance.tolist()) == ([kind], [distance])


def test_chromosomes_are_far_apart():
    """A gene at the very start of a chromosome, with a promoter that would reach before it."""
    peaks, genes = intervals([(0, 10**9, 100), (1, 0, 5)]), intervals([(1, 3, 100)])
    found = near_genes(
        peaks, genes, np.array([1]), np.array([0]), upstream=10**6, downstream=0, max_distance=CHROMOSOME_LENGTH // 4
    )
    assert (found.peak.tolist(), found.gene.tolist()) == ([1], [0])
