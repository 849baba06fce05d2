from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.differential import Differential
from sae.core.set_methods import StandingOut, by_aucell, by_ranks, by_ulm

G = 60


def block():
    """Two features; the last 20 genes have the highest scores and are not tested either way."""
    score = np.random.default_rng(0).normal(size=(2, G))
    score[:, 40:] += 10
    p = np.full((2, G), 0.5)
    either_way = np.broadcast_to(np.arange(G) < 40, (2, G))
    return Differential(np.arange(2), score, score, p, np.log(p), p, either_way)


def sets():
    """Tested genes, untested ones, and some of both."""
    members = np.zeros((3, G))
    members[0, :12] = members[1, 40:50] = members[2, 30:50] = 1
    return sparse.csr_matrix(members)


STANDING = StandingOut(0.05, 0.5)


def test_ranks_are_those_of_the_genes_that_are_tested_either_way():
    found, x = by_ranks(block(), sets(), STANDING)[0], block().score
    for feature in range(2):
        for place, inside in ((0, np.arange(40) < 12), (2, np.arange(40) >= 30)):
            one, rest = x[feature, :40][inside], x[feature, :40][~inside]
            expected = stats.mannwhitneyu(one, rest, method="asymptotic").pvalue
            assert found.pval[feature, place] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(found.pval[:, 1]).all(), "no gene of the set has a rank"


def test_genes_that_are_not_tested_are_the_last_for_aucell():
    """Also where all others are lowered."""
    for test in by_aucell(replace(block(), score=block().score - 9), sets(), STANDING):
        np.testing.assert_array_equal(test.score[:, 1], 0)
        assert not test.kept[:, 1].any()


def test_genes_that_are_not_tested_have_no_t_for_ulm():
    found, members = by_ulm(block(), sets(), STANDING)[0], sets().toarray()
    t = np.where(np.arange(G) < 40, block().score, 0)
    for feature, place in np.ndindex(2, 3):
        line = stats.linregress(members[place], t[feature])
        assert found.score[feature, place] == pytest.approx(line.slope / line.stderr, rel=1e-6)
