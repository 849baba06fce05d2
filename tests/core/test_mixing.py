from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from sae.core import mixing

K = 5


@pytest.fixture
def cells():
    """Cells of four labels in three batches; the last label is in one batch only."""
    rng = np.random.default_rng(0)
    label = rng.integers(4, size=90)
    batch = np.where(label == 3, 0, rng.integers(3, size=90))
    x = rng.normal(size=(90, 4)) + 2 * np.eye(4)[label] + 0.7 * batch[:, None]
    return x, batch, label


def width(x, codes, cell):
    """Silhouette width of one cell, from Rousseeuw's formula."""
    distance = np.sqrt(((x - x[cell]) ** 2).sum(axis=1))
    mean_to = {}
    for code in set(codes.tolist()):
        others = [i for i in range(len(x)) if codes[i] == code and i != cell]
        if others:
            mean_to[code] = np.mean([distance[i] for i in others])
    if codes[cell] not in mean_to:
        return 0.0
    own = mean_to.pop(codes[cell])
    nearest = min(mean_to.values())
    return (nearest - own) / max(nearest, own)


def nearest(x, cell):
    distance = cdist(x[[cell]], x)[0]
    distance[cell] = np.inf
    return np.argsort(distance)[:K]


def test_silhouettes(cells):
    x, batch, label = cells
    found = mixing.mixing(x, batch, label, K)
    assert found.batch_asw == pytest.approx(np.mean([width(x, batch, i) for i in range(90)]))
    assert found.silhouette_label == pytest.approx((np.mean([width(x, label, i) for i in range(90)]) + 1) / 2)
    of_labels = []
    for one in range(3):
        inside = np.flatnonzero(label == one)
        of_labels.append(np.mean([1 - abs(width(x[inside], batch[inside], i)) for i in range(len(inside))]))
    assert found.silhouette_batch == pytest.approx(np.mean(of_labels))
    assert 0 < found.batch_asw < 1 and 0.5 < found.silhouette_label < 1


def test_silhouette_batch_leaves_out_labels_whose_cells_are_a_batch_each(cells):
    x, batch, label = cells
    few = np.concatenate([np.flatnonzero(label < 2), np.flatnonzero((label == 2) & (batch == 0))[:1]])
    few = np.concatenate([few, np.flatnonzero((label == 2) & (batch == 1))[:1]])
    without = few[:-2]
    expected = mixing.silhouette_batch(x[without], batch[without], label[without])
    assert mixing.silhouette_batch(x[few], batch[few], label[few]) == expected
    assert np.isnan(mixing.silhouette_batch(x, label, label)), "no label has two batches"


def test_neighbors(cells):
    x, batch, label = cells
    found = mixing.mixing(x, batch, label, K)
    shares = [[(codes[nearest(x, i)] == codes[i]).mean() for i in range(90)] for codes in (batch, label)]
    assert found.batch_purity == pytest.approx(np.mean(shares[0]))
    assert found.label_purity == pytest.approx(np.mean(shares[1]))
    predicted = cross_val_predict(KNeighborsClassifier(K), x, label, cv=LeaveOneOut())
    assert found.label_accuracy == pytest.approx((predicted == label).mean())
    assert 0.4 < found.label_accuracy < 1


def test_vote_is_for_the_first_code_in_a_tie():
    near = np.array([[1, 2], [0, 2], [0, 1]])
    assert mixing.vote_accuracy(near, np.array([0, 1, 0])) == pytest.approx(2 / 3)
    assert mixing.vote_accuracy(near, np.array([1, 0, 1])) == 0


def test_a_cell_is_not_its_own_neighbor_among_copies_of_it():
    x = np.repeat(np.random.default_rng(0).normal(size=(10, 2)), 4, axis=0)
    near = mixing.neighbors(x, 3)
    assert not (near == np.arange(40)[:, None]).any()
    assert mixing.purity(near, np.arange(40) // 4) == 1


def test_without_batches_or_labels(cells):
    x, batch, label = cells
    everything = vars(mixing.mixing(x, batch, label, K))
    for given in ({"batch": batch, "label": None}, {"batch": None, "label": label}, {"batch": None, "label": None}):
        found = vars(mixing.mixing(x, **given, n_neighbors=K))
        for name, value in found.items():
            needs = ["batch", "label"] if name == "silhouette_batch" else [("batch" if "batch" in name else "label")]
            missing = any(given[one] is None for one in needs)
            assert np.isnan(value) if missing else value == everything[name], name


@pytest.mark.parametrize("codes", [np.zeros(6, dtype=int), np.arange(6)], ids=["one group", "each its own"])
def test_silhouette_that_is_not_defined(codes):
    assert np.isnan(mixing.silhouette(np.random.default_rng(0).normal(size=(6, 2)), codes)).all()


def activations(n=120, h=7, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix((rng.random((n, h)) * (rng.random((n, h)) < 0.5)).astype(np.float32))


def test_separation_within_strata(cells):
    _, batch, label = cells
    a = activations(90)
    found = mixing.separation(a, batch, label)
    dense = a.toarray()
    for code in range(3):
        for feature in range(7):
            total = weight = 0.0
            for stratum in range(4):
                inside = batch[label == stratum] == code
                pairs = inside.sum() * (~inside).sum() / (len(inside) + 1)
                if pairs:
                    total += roc_auc_score(inside, dense[label == stratum, feature]) * pairs
                    weight += pairs
            assert found[code, feature] == pytest.approx(total / weight)


def test_separation_is_not_confounded():
    """A feature of a label tells batches that differ in their labels, but not within labels."""
    rng = np.random.default_rng(0)
    label = rng.integers(2, size=2000)
    batch = (rng.random(2000) < np.where(label == 1, 0.9, 0.1)).astype(int)
    a = sparse.csr_matrix((label * rng.random(2000) + rng.random(2000) / 4)[:, None].astype(np.float32))
    assert mixing.separation(a, batch, np.zeros(2000, dtype=int))[1, 0] > 0.75
    assert mixing.separation(a, batch, label)[1, 0] == pytest.approx(0.5, abs=0.05)


def test_separation_that_cannot_be_told():
    codes = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    strata = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    found = mixing.separation(activations(8, 3), codes, strata)
    assert np.isnan(found[0]).all() and not np.isnan(found[1:]).any()


def test_removed_and_step_sizes():
    rng = np.random.default_rng(0)
    a, W_dec, z = activations(), rng.normal(size=(7, 3)).astype(np.float32), rng.normal(size=(120, 3))
    dense = a.toarray().astype(np.float64)
    expected = z.copy()
    for feature in (1, 4):
        expected -= np.outer(dense[:, feature], W_dec[feature])
    np.testing.assert_allclose(mixing.removed(z, a, W_dec, np.array([1, 4])), expected, atol=1e-6)
    np.testing.assert_array_equal(mixing.removed(z, a, W_dec, np.array([], dtype=int)), z)
    moved = [np.mean((np.outer(dense[:, feature], W_dec[feature]) ** 2).sum(axis=1)) for feature in range(7)]
    np.testing.assert_allclose(mixing.step_sizes(a, W_dec), moved, rtol=1e-6)


def test_alike_draws_features_of_similar_size():
    size = np.exp(np.arange(100) / 5)
    size[[40, 41]] = 0
    chosen = np.array([10, 38, 70])
    draws = mixing.alike(size, chosen, 200, np.random.default_rng(0))
    drawn = np.concatenate(draws)
    assert len(draws) == 200 and all(len(set(draw)) == 3 for draw in draws)
    assert not set(drawn) & {10, 38, 70, 40, 41}
    # Ten nearest of each, by ratio: five steps to either side, or six where two in between have no size.
    allowed = [set(range(5, 16)), set(range(32, 45)), set(range(65, 76))]
    for draw in draws:
        assert [number in near for number, near in zip(draw, allowed, strict=True)] == [True] * 3
    assert len(set(drawn)) == 30, "every one of the ten is drawn at some time"


def test_alike_does_not_draw_what_is_not_there():
    size = np.array([1.0, 2.0, 0.0, 3.0, 4.0])
    rng = np.random.default_rng(0)
    assert mixing.alike(size, np.array([0, 1, 3]), 5, rng) == []
    assert [draw.tolist() for draw in mixing.alike(size, np.array([0, 1]), 3, rng)] == [[3, 4]] * 3
    assert [len(draw) for draw in mixing.alike(size, np.array([0, 2]), 3, rng)] == [1] * 3, "dead ones move no cells"
    assert mixing.alike(size, np.array([0]), 0, rng) == []
