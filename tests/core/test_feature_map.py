from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import jaccard_score

from sae.core import feature_map as core
from sae.core import similarity
from sae.core.feature_map import (
    coactivation,
    common_to_modules,
    directions,
    gene_signatures,
    graph,
    layout,
    modules,
    nearest,
    shared_sets,
)
from sae.core.moments import scan


def activations(n: int = 60, h: int = 14, density: float = 0.3, seed: int = 0) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(np.where(rng.random((n, h)) < density, rng.exponential(size=(n, h)), 0))


def groups(n: int, size: int = 8, d: int = 12, seed: int = 0) -> np.ndarray:
    """Vectors about a few centres that are unrelated."""
    rng = np.random.default_rng(seed)
    return np.repeat(np.eye(n, d), size, axis=0) * 3 + rng.normal(size=(n * size, d)) * 0.3


def expected_nearest(similarity: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sort all the others of each feature, by a plain loop."""
    index, values = [], []
    for i, row in enumerate(similarity):
        others = sorted((-value, j) for j, value in enumerate(row) if j != i and value > 0)[:k]
        index.append([j for _, j in others])
        values.append([-value for value, _ in others])
    return index, values


def found_lists(found):
    there = found.index >= 0
    return (
        [row[mask].tolist() for row, mask in zip(found.index, there, strict=True)],
        [row[mask].tolist() for row, mask in zip(found.similarity, there, strict=True)],
    )


def correlation(a: sparse.csr_matrix) -> np.ndarray:
    dense = a.toarray()
    return np.array([[stats.pearsonr(x, y).statistic for y in dense.T] for x in dense.T])


@pytest.mark.parametrize("block", [similarity.BLOCK_VALUES, 40], ids=["one block", "many"])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_nearest_by_coactivation(k, block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK_VALUES", block)
    a = activations()
    features, alive = coactivation(a)
    assert alive.all()
    index, values = expected_nearest(correlation(a), k)
    found = nearest(features, k)
    assert found.index.shape == (14, min(k, 13))
    assert found_lists(found)[0] == index
    for row, other in zip(found_lists(found)[1], values, strict=True):
        np.testing.assert_allclose(row, other, rtol=1e-9)


def test_dead_and_constant_features_cannot_be_compared():
    a = activations().toarray()
    a[:, 3], a[:, 5] = 0, 2.5
    features, alive = coactivation(sparse.csr_matrix(a))
    assert np.flatnonzero(~alive).tolist() == [3, 5] and len(features) == 12
    assert np.flatnonzero(~directions(np.eye(4)[[0, 1, 1]] * [[1], [0], [2]])[1]).tolist() == [1]
    assert shared_sets(sparse.csr_matrix([[1, 1], [0, 0]]))[1].tolist() == [True, False]


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_nearest_by_genes(layout):
    x = activations(60, 30, 0.5, seed=1).toarray()
    x[:, 4] = 3
    a = sparse.csr_matrix(activations().toarray() * (np.arange(14) != 2))
    x = sparse.csr_matrix(x) if layout == "csr" else x
    features, alive = gene_signatures(a, x, scan(x).shift)
    kept = np.delete(np.arange(14), 2)
    assert np.flatnonzero(alive).tolist() == kept.tolist()
    varying = np.delete(np.arange(30), 4)
    x = x.toarray() if layout == "csr" else x
    r = np.array([[stats.pearsonr(a[:, [i]].toarray().ravel(), x[:, g]).statistic for g in varying] for i in kept])
    cosine = r @ r.T / np.outer(np.linalg.norm(r, axis=1), np.linalg.norm(r, axis=1))
    index, values = expected_nearest(cosine, 4)
    found = nearest(features, 4)
    assert found_lists(found)[0] == index
    np.testing.assert_allclose(np.concatenate(found_lists(found)[1]), np.concatenate(values), rtol=1e-4)


def test_nearest_by_gene_sets():
    members = np.random.default_rng(0).random((12, 20)) < 0.3
    jaccard = [[jaccard_score(x, y) for y in members] for x in members]
    found = nearest(shared_sets(sparse.csr_matrix(members.astype(float)))[0], 3)
    index, values = expected_nearest(np.array(jaccard), 3)
    assert found_lists(found)[0] == index
    np.testing.assert_allclose(np.concatenate(found_lists(found)[1]), np.concatenate(values))


def test_features_that_are_unlike_all_others_have_no_neighbours():
    found = nearest(directions(np.vstack([np.eye(5, 6), [0, 0, 0, 0, 1, 1]]))[0], 3)
    assert (found.index >= 0).sum(axis=1).tolist() == [0, 0, 0, 0, 1, 1]
    joined = graph(found)
    assert joined.nnz == 2 and joined[4, 5] == 1
    assert modules(joined, 1.0, 0).tolist() == [1, 2, 3, 4, 0, 0]
    assert np.isfinite(layout(joined, 0)).all()


@pytest.mark.parametrize(("m", "d", "k"), [(50, 10, 5), (120, 30, 15), (7, 3, 3)])
def test_graph_is_that_of_umap(m, d, k):
    found = nearest(directions(np.random.default_rng(0).normal(size=(m, d)) + 2)[0], k)
    assert (found.index >= 0).all()
    index = np.column_stack([np.arange(m), found.index])
    distance = np.column_stack([np.zeros(m), 1 - found.similarity]).astype(np.float32)
    expected, _, _ = core._umap().fuzzy_simplicial_set(
        found.index, k + 1, None, "precomputed", knn_indices=index, knn_dists=distance
    )
    np.testing.assert_allclose(graph(found).toarray(), expected.toarray(), atol=1e-4)


def test_graph_of_features_that_are_the_same():
    joined = graph(nearest(directions(np.ones((6, 3)))[0], 3))
    assert (joined != joined.T).nnz == 0 and set(joined.data) == {1.0}
    assert np.isfinite(layout(joined, 0)).all()


def test_modules_are_the_groups_by_size():
    vectors = np.vstack([groups(3, 6), groups(1, 11, seed=1)[:, ::-1]])
    joined = graph(nearest(directions(vectors)[0], 5))
    found = modules(joined, 1.0, 0)
    assert found.tolist() == [1] * 6 + [2] * 6 + [3] * 6 + [0] * 11
    assert len(set(modules(joined, 40.0, 0))) > 4
    assert len(set(modules(joined, 1e-6, 0))) == 4, "parts that nothing joins stay apart"


def test_layout_puts_neighbours_together():
    found = nearest(directions(groups(4))[0], 5)
    places = layout(graph(found), 0)
    assert places.shape == (32, 2) and np.allclose(places.mean(axis=0), 0, atol=1e-4)
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distance, np.inf)
    same = np.repeat(np.arange(4), 8)
    assert (same[distance.argsort(axis=1)[:, :4]] == same[:, None]).mean() > 0.95


def test_seed_decides():
    joined = graph(nearest(directions(np.random.default_rng(0).normal(size=(40, 8)))[0], 6))
    before = joined.copy()
    first = layout(joined, 1)
    np.testing.assert_array_equal(first, layout(joined, 1))
    assert not np.array_equal(first, layout(joined, 2))
    assert (joined != before).nnz == 0, "umap drops weak edges in place"
    np.testing.assert_array_equal(modules(joined, 1.0, 1), modules(joined, 1.0, 1))


@pytest.mark.parametrize("m", [0, 1, 2, 3, 4])
def test_few_features(m):
    found = nearest(directions(np.abs(np.random.default_rng(0).normal(size=(m, 5))))[0], 15)
    assert found.index.shape == (m, max(m - 1, 0))
    joined = graph(found)
    places = layout(joined, 0)
    assert places.shape == (m, 2) and np.isfinite(places).all()
    assert len(np.unique(places, axis=0)) == m
    assert len(modules(joined, 1.0, 0)) == m


def test_what_is_common_to_modules():
    module = np.array([0, 0, 0, 0, 1, 1, 1])
    members = sparse.csr_matrix([[1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1]], dtype=float)
    found = common_to_modules(module, members)
    assert found.overlap.tolist() == [[3, 0], [1, 3]]
    for i, n in enumerate([4, 3]):
        for j, size in enumerate([4, 3]):
            assert found.pval[i, j] == pytest.approx(stats.hypergeom.sf(found.overlap[i, j] - 1, 7, size, n))
