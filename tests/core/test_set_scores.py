from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from sae.core import set_scores
from sae.core.set_scores import score_sets


@pytest.fixture
def cells():
    """40 cells, 6 columns, 30 genes, the first two columns driving five genes each; four sets."""
    rng = np.random.default_rng(0)
    columns = np.maximum(rng.normal(size=(40, 6)), 0)
    x = rng.normal(size=(40, 30))
    x[:, :5] += 3 * columns[:, :1]
    x[:, 5:10] += 3 * columns[:, 1:2]
    x = np.maximum(x, 0)
    sets = np.zeros((4, 30))
    for row, genes in enumerate((range(5), range(5, 10), range(10, 16), range(3, 25, 3))):
        sets[row, list(genes)] = 1
    return columns, x, sparse.csr_matrix(sets), rng.permutation(40) % 2


def by_loops(columns, x, sets, half, own=None):
    """AUROC and z of every column and set on each half, gene by gene."""
    auroc, z = np.full((2, columns.shape[1], sets.shape[0]), np.nan), np.zeros((2, columns.shape[1], sets.shape[0]))
    for p in range(2):
        for j in range(columns.shape[1]):
            genes = [g for g in range(x.shape[1]) if np.ptp(x[half == p, g]) > 0 and (own is None or g != own[j])]
            r = np.array([np.corrcoef(columns[half == p, j], x[half == p, g])[0, 1] for g in genes])
            for s in range(sets.shape[0]):
                inside = sets[s].toarray().ravel()[genes] > 0
                auroc[p, j, s] = roc_auc_score(inside, r)
                test = stats.mannwhitneyu(r[inside], r[~inside], method="asymptotic")
                z[p, j, s] = np.sign(auroc[p, j, s] - 0.5) * -stats.norm.ppf(test.pvalue / 2)
    return auroc, z


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
@pytest.mark.parametrize("own", [None, np.array([0, 7, 11, 12, 3, 29])], ids=["features", "genes"])
def test_sets_against_loops(cells, layout, own, monkeypatch):
    monkeypatch.setattr(set_scores, "BLOCK_COLUMNS", 4)
    columns, x, sets, half = cells
    found = score_sets(layout(columns), layout(x), sets, half, own=own)
    auroc, z = by_loops(columns, x, sets, half, own)
    top = z.argmax(axis=2)
    each = np.arange(6)
    np.testing.assert_allclose(found.auroc, (auroc[1, each, top[0]] + auroc[0, each, top[1]]) / 2)
    np.testing.assert_array_equal(found.same, top[0] == top[1])
    np.testing.assert_array_equal(found.chosen, np.where(top[0] == top[1], top[0], -1))
    best = auroc.argmax(axis=1)
    np.testing.assert_allclose(
        found.of_sets, [(auroc[1, best[0, s], s] + auroc[0, best[1, s], s]) / 2 for s in range(4)]
    )
    assert (found.chosen[:2] == [0, 1]).all()
    assert found.n_sets(0.9) >= 2
    assert found.n_sets(1.1) == 0


def test_a_column_that_is_constant_in_a_half_is_not_scored(cells):
    columns, x, sets, half = cells
    columns = columns.copy()
    columns[half == 1, 0] = 0
    found = score_sets(sparse.csr_matrix(columns), x, sets, half)
    assert np.isnan(found.auroc[0]) and np.isnan(found.same[0]) and found.chosen[0] == -1
    assert not np.isnan(found.auroc[1:]).any()
    silent = score_sets(np.zeros_like(columns), x, sets, half)
    assert np.isnan(silent.auroc).all() and np.isnan(silent.of_sets).all() and silent.n_sets(0) == 0


def test_random_columns_are_at_chance():
    rng = np.random.default_rng(0)
    x, columns = rng.normal(size=(100, 200)), rng.normal(size=(100, 80))
    sets = sparse.csr_matrix((rng.random((20, 200)) < 0.1).astype(float))
    found = score_sets(columns, x, sets, rng.permutation(100) % 2)
    assert 0.45 < found.auroc.mean() < 0.55
    assert 0.45 < found.of_sets.mean() < 0.55
    assert found.same.mean() < 0.2
