from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats

from sae.core.decoupled import aucell, gsea, ulm

N_GENES = 80


def values(n=3, *, seed=0):
    """Scores (features, genes)."""
    return np.random.default_rng(seed).normal(size=(n, N_GENES))


def random_sets(n, size, *, seed=1):
    """Sets (n, genes) of so many genes."""
    rng = np.random.default_rng(seed)
    members = np.zeros((n, N_GENES))
    for row in members:
        row[rng.choice(N_GENES, size, replace=False)] = 1
    return sparse.csr_matrix(members)


def test_ulm_is_the_slope_of_a_regression_on_the_weights():
    sets = random_sets(4, 10)
    sets.data = np.random.default_rng(2).normal(size=sets.nnz)
    found = ulm(values(), sets)
    for f, s in np.ndindex(3, 4):
        line = stats.linregress(sets[s].toarray().ravel(), values()[f])
        assert found.score[f, s] == pytest.approx(line.slope / line.stderr, rel=1e-6)
        assert found.pval[f, s] == pytest.approx(line.pvalue, rel=1e-6)


def test_gsea_finds_a_set_at_the_top_and_one_at_the_bottom():
    x = values()
    first, last = np.argsort(-x[0])[:8], np.argsort(-x[0])[-8:]
    members = np.zeros((3, N_GENES))
    members[0, first] = members[1, last] = members[2, :: N_GENES // 8] = 1
    found = gsea(x, sparse.csr_matrix(members), seed=0)
    assert found.score[0, 0] > 1.5 and found.score[0, 1] < -1.5
    # Never 0, and permuted with the seed 0 as well. decoupler 2.3 counts only permutations of the same sign.
    assert (found.pval[0, :2] >= 1 / 1001).all() and (found.pval[0, :2] < 1 / 200).all()
    assert found.pval[0, 2] > 0.05


def test_gsea_p_values_of_random_sets_are_uniform():
    found = gsea(values(1), random_sets(200, 12), seed=1)
    assert stats.kstest(found.pval.ravel(), "uniform").pvalue > 1e-3


def test_area_is_that_under_the_recovery_curve():
    x, sets = values(), random_sets(5, 12)
    found = aucell(x, sets)
    for f, s in np.ndindex(3, 5):
        ranks = stats.rankdata(-x[f])[sets[s].indices]
        recovered = [(ranks <= r).sum() for r in range(1, 4)]
        assert found.score[f, s] == pytest.approx(sum(recovered) / (1 + 2 + 3), rel=1e-12)


def test_p_of_an_area_is_that_of_random_sets_of_the_same_size():
    """From the mean and the variance over 20,000 of them."""
    sets = random_sets(20_000, 30)
    found = aucell(values(1), sets)
    z = (found.score - found.score.mean()) / found.score.std()
    np.testing.assert_allclose(found.pval, stats.norm.sf(z), atol=0.02)


def test_a_set_of_all_genes_cannot_differ():
    found = aucell(values(1), sparse.csr_matrix(np.ones((1, N_GENES))))
    assert found.score.item() == 1
    assert found.pval.item() == 1
