from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import sparse

from sae.core import moments
from sae.core import partitions as module
from sae.core.differential import differential
from sae.core.groups import active_groups
from sae.core.moments import scan
from sae.core.partitions import Summing, side_by_side, summed
from sae.core.regression import regression
from sae.core.rows import Rows
from sae.core.strata import stratified

N = 103


@dataclass(frozen=True)
class Total(Summing):
    """Sums of columns, cell by cell, and how often something was added; `seen` are the rows that were given."""

    columns: int
    seen: list

    def start(self):
        return np.zeros(self.columns), np.zeros(1, np.int64)

    def add(self, sums, workers, *parts):
        self.seen.append(len(parts[0]))
        assert all(len(part) == len(parts[0]) for part in parts)
        for row in parts[0]:
            sums[0][:] += row
        sums[1][:] += 1


def values(n=N, *, seed=0):
    """Of sizes so different that the order of a sum shows in its last digits."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(0, 8, size=(n, 5))


def by_rows(x):
    return Rows(x, np.arange(len(x)))


def plainly(x, partition, numbers=None):
    """From the definition, with the number of each cell."""
    numbers = np.arange(len(x)) if numbers is None else numbers
    total = np.zeros(x.shape[1])
    for part in range(numbers.max() // partition + 1):
        sums = np.zeros(x.shape[1])
        for row in x[numbers // partition == part]:
            sums += row
        total += sums
    return total


each_kind = pytest.mark.parametrize("kind", [np.asarray, by_rows], ids=["memory", "disk"])


@each_kind
@pytest.mark.parametrize("size", [1, 7, 20, 1000])
@pytest.mark.parametrize("partition", [1, 10, 50, 103, 1000])
def test_sums_start_from_zero_in_each_partition(kind, size, partition):
    x = values()
    found, _ = summed(Total(5, []), [kind(x)], size=size, partition=partition)
    np.testing.assert_array_equal(found, plainly(x, partition))


def test_the_order_of_sums_shows_in_these_values():
    assert (plainly(values(), 10) != plainly(values(), 1000)).any()


@each_kind
@pytest.mark.parametrize("chosen", [slice(60, 90), slice(3, None, 4), slice(0, 0), slice(None)], ids=str)
def test_partitions_are_of_all_cells_when_some_are_read(kind, chosen):
    x, only = values(), np.zeros(N, bool)
    only[chosen] = True
    what = Total(5, [])
    found, _ = summed(what, [kind(x), np.arange(N)], size=7, partition=20, only=only)
    assert sum(what.seen) == only.sum()
    expected = plainly(x[only], 20, np.flatnonzero(only)) if only.any() else np.zeros(5)
    np.testing.assert_array_equal(found, expected)


def test_no_chunk_is_cut_but_where_a_partition_ends():
    what = Total(5, [])
    summed(what, [values()], size=30, partition=50)
    assert what.seen == [30, 20, 10, 30, 10, 3]


def test_no_cells():
    found, times = summed(Total(5, []), [values(0)], size=10, partition=10)
    np.testing.assert_array_equal(found, 0)
    assert times == 0


def test_matrices_are_read_side_by_side():
    x = values()
    for rows, (dense, stored, numbers) in side_by_side([x, by_rows(sparse.csr_matrix(x).toarray()), np.arange(N)], 8):
        np.testing.assert_array_equal(dense, x[rows])
        np.testing.assert_array_equal(stored, x[rows])
        np.testing.assert_array_equal(numbers, np.arange(N)[rows])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", [11, 1000])
def test_statistics_of_several_partitions(threads, chunk, monkeypatch):
    """Those of one to rounding, whatever the chunks and threads to the last bit."""
    rng = np.random.default_rng(1)
    x = sparse.csr_matrix(np.where(rng.random((N, 12)) < 0.6, rng.exponential(size=(N, 12)), 0))
    a = sparse.csr_matrix(np.where(rng.random((N, 6)) < 0.5, rng.exponential(size=(N, 6)), 0))
    codes = rng.integers(3, size=N)
    options = {"log_base": np.e, "pseudocount": 0.1, "min_cells": 3}

    def statistics():
        groups, genes = active_groups(a), scan(x)
        blocks = [
            *differential(groups, x, genes, **options, min_expected=0),
            *stratified(groups, x, genes, codes, **options, min_expected=0),
            *regression(groups, x, genes, np.eye(3)[codes], **options),
        ]
        return [getattr(block, name) for block in blocks for name in ("score", "log2fc", "log_pval")]

    whole = statistics()
    monkeypatch.setattr(moments, "PARTITION_ROWS", 30)
    expected = statistics()
    monkeypatch.setattr(module, "available_threads", lambda: threads)
    monkeypatch.setattr(moments, "CHUNK_ROWS", chunk)
    for one, other, alike in zip(statistics(), expected, whole, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one, alike, rtol=1e-9, atol=1e-12)
