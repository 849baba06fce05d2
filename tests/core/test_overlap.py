from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.overlap import exchanged, overlap


def sets(*members: str, of: str = "abcdefgh") -> sparse.csr_matrix:
    return sparse.csr_matrix([[letter in row for letter in of] for row in members], dtype=float)


def test_by_hand():
    """Terms a to h; counts of a..d: 2, 1, 1, 0 in one, 1, 1, 0, 1 in the other."""
    one, other = sets("ab", "ac", ""), sets("ab", "d")
    found = overlap(one, other, np.random.default_rng(0))
    assert found.shared == 2
    assert found.spearman == pytest.approx(stats.spearmanr([2, 1, 1, 0], [1, 1, 0, 1]).statistic)
    assert found.jaccard == pytest.approx((1 + 0) / 2)
    both = overlap(one, sets("ab", "ad", "a"), np.random.default_rng(0), counted="both")
    assert both.spearman == pytest.approx(stats.spearmanr([2, 1], [3, 1]).statistic)
    assert both.jaccard == pytest.approx((1 + 1 / 2) / 2), "ac with a; three sets of which two have a partner"
    assert len(found.spearman_by_chance) == len(found.jaccard_by_chance) == 0


def test_jaccard_is_the_best_of_all_pairings():
    rng = np.random.default_rng(0)
    one, other = (sparse.csr_matrix(rng.random((5, 12)) < 0.6, dtype=float) for _ in range(2))

    def jaccard(i, j):
        x, y = set(one[i].indices), set(other[j].indices)
        return len(x & y) / len(x | y)

    best = max(np.mean([jaccard(i, j) for i, j in enumerate(order)]) for order in permutations(range(5)))
    assert overlap(one, other, rng).jaccard == pytest.approx(best)


def test_exchanged_sets_keep_their_sizes_and_how_often_each_member_occurs():
    rng = np.random.default_rng(0)
    members = sparse.csr_matrix(rng.random((30, 20)) < rng.random(20), dtype=float)
    drawn = exchanged(members, rng)
    np.testing.assert_array_equal(drawn.getnnz(axis=0), members.getnnz(axis=0))
    np.testing.assert_array_equal(drawn.getnnz(axis=1), members.getnnz(axis=1))
    assert set(drawn.data) == {1.0} and drawn.has_canonical_format
    assert (drawn != members).nnz > 100


def test_exchanged_sets_are_uniform():
    """The six ways to give each of two sets two of four members that occur once, drawn about as often each."""
    members, rng = sets("ab", "cd", of="abcd"), np.random.default_rng(0)
    drawn = Counter(tuple(exchanged(members, rng).indices[:2]) for _ in range(1_200))
    assert len(drawn) == 6
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3


def test_chance_is_what_unrelated_sets_have():
    rng = np.random.default_rng(0)
    often = rng.random(40) * 0.5
    one, other = (sparse.csr_matrix(rng.random((60, 40)) < often, dtype=float) for _ in range(2))
    found = overlap(one, other, rng, n_permutations=30)
    assert abs(found.jaccard - found.jaccard_by_chance.mean()) < 3 * found.jaccard_by_chance.std()
    assert found.spearman > 0.8 > found.spearman_by_chance.max()
    same = overlap(one, one[rng.permutation(60)], rng, n_permutations=30)
    assert same.jaccard == pytest.approx(1) and same.jaccard_by_chance.max() < 0.7


def test_without_sets_there_is_nothing_to_measure():
    found = overlap(sets("", "a"), sets("", ""), np.random.default_rng(0), n_permutations=2)
    assert found.shared == 0 and np.isnan(found.jaccard) and np.isnan(found.spearman)
    assert np.isnan(found.jaccard_by_chance).all()
