"""The packed parts of a page, read back."""

from __future__ import annotations

import base64
import gzip
import json

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity

from sae.report import _compact


@pytest.fixture
def a():
    """Activations of 300 cells: features that are active in all cells, in none, in one, and in few."""
    rng = np.random.default_rng(0)
    values = sparse.random(300, 7, density=0.2, random_state=rng, dtype=np.float32).tolil()
    values[:, 0] = rng.exponential(size=(300, 1))
    values[:, 3] = 0
    values[:, 4] = 0
    values[17, 4] = 2.5
    return sparse.csc_matrix(values)


@pytest.mark.parametrize(
    ("values", "n_bytes"),
    [([0, 1, 127], 3), ([128, 16_383], 4), ([16_384], 3), ([2**31 - 1, 0], 6), ([], 0)],
    ids=["one byte", "two bytes", "three bytes", "five bytes", "none"],
)
def test_varints(values, n_bytes, decode):
    content = _compact.varints(np.array(values, dtype=np.int64))
    assert len(content) == n_bytes
    assert decode.varints(content, len(values)) == (values, b"")


def test_varints_agree_with_the_published_example():
    # The one of the description of LEB128: 624485 is E5 8E 26.
    assert _compact.varints(np.array([624_485])) == bytes([0xE5, 0x8E, 0x26])


def test_packed_is_the_same_every_time_and_cannot_end_an_element():
    hostile = {"</script>": "<!--", "ü": [1, None]}
    packed = _compact.packed_json(hostile)
    assert packed == _compact.packed_json(hostile)
    assert not set(packed) & set("<>&-")
    assert json.loads(gzip.decompress(base64.b64decode(packed))) == hostile


def test_rounded_has_four_digits_and_nothing_json_lacks():
    values = np.array([1.23456, -1e-300, 0.0, np.nan, np.inf, -np.inf, 123_456.0])
    largest = np.finfo(float).max
    assert _compact.rounded(values) == [1.235, -1e-300, 0, None, largest, -largest, 123_500]


def test_the_grid_is_filled_by_either_axis_and_takes_a_line():
    rng = np.random.default_rng(0)
    xy = _compact.on_grid(rng.normal(size=(50, 2)) * [1, 100])
    assert xy.min(axis=0).tolist() == [0, 0] and xy.max(axis=0).tolist() == [4095, 4095]
    line = _compact.on_grid(np.array([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]]))
    assert line.tolist() == [[0, 0], [1365, 0], [4095, 0]]
    assert _compact.on_grid(np.empty((0, 2))).shape == (0, 2)


def test_cells_come_back_in_their_order(decode):
    xy = np.random.default_rng(0).integers(0, 4096, size=(200, 2))
    np.testing.assert_array_equal(decode.cells(_compact.cell_bytes(xy), 200), xy)


def test_cells_that_are_near_are_listed_near():
    xy = np.random.default_rng(0).integers(0, 4096, size=(2_000, 2))
    order = _compact.near_each_other(xy)
    assert sorted(order) == list(range(2_000))
    apart, before = (np.abs(np.diff(found, axis=0)).sum() for found in (xy[order], xy))
    assert apart < before / 10


def test_ranks_are_those_of_a_loop(a):
    found = _compact.ranks(a)
    for j in range(a.shape[1]):
        values = a.data[a.indptr[j] : a.indptr[j + 1]]
        expected = [sum(other > value for other in values) for value in values]
        assert found[a.indptr[j] : a.indptr[j + 1]].tolist() == expected


def test_points_come_back(a, decode):
    place = np.random.default_rng(1).permutation(300)
    points = _compact.levels(a, place, np.ones(a.nnz, dtype=bool))
    for j, (places, levels) in enumerate(decode.points(_compact.point_bytes(points), a.shape[1])):
        values = a[:, j].toarray().ravel()
        assert sorted(places) == places and set(places) == set(place[values > 0])
        restored = np.zeros(300)
        restored[places] = np.array(levels) / 255 * values.max()
        # Half a step; and no active cell becomes an inactive one.
        np.testing.assert_allclose(restored[place], values, atol=values.max() / 255)
        assert min(levels, default=1) >= 1


def test_points_of_few_features_and_cells(a, decode):
    place = np.where(np.arange(300) < 100, np.arange(300), -1)
    kept = (place[a.indices] >= 0) & (_compact.ranks(a) < 20)
    found = decode.points(_compact.point_bytes(_compact.levels(a, place, kept)[:, 2:5]), 3)
    strongest = np.argsort(-a[:, 2].toarray().ravel(), kind="stable")[:20]
    active = set(np.flatnonzero(a[:, 2].toarray().ravel()))
    assert set(found[0][0]) == set(strongest[strongest < 100].tolist()) & active
    assert [found[1], found[2]] == [([], []), ([17], [255])]


def test_drawn_cells_leave_no_feature_without(a):
    rank = _compact.ranks(a)
    cells = _compact.drawn_cells(a.indices, rank, 300, 60, np.random.default_rng(0))
    assert len(set(cells)) == len(cells) == 60 and (np.diff(cells) > 0).all()
    kept = a[cells].toarray()
    alive = a.toarray().any(axis=0)
    np.testing.assert_allclose(kept.max(axis=0)[alive], a.toarray().max(axis=0)[alive])
    # The half that is drawn at random has cells that are strong in nothing.
    best = np.full(300, 300)
    np.minimum.at(best, a.indices, rank)
    assert (best[cells] > np.sort(best)[60]).sum() > 15


def test_histograms_are_those_of_numpy(a):
    found = _compact.histograms(a, 10)
    for j in range(a.shape[1]):
        values = a[:, j].toarray().ravel().astype(np.float64)
        values = values[values > 0]
        expected = np.histogram(values, bins=10, range=(0, values.max()))[0] if len(values) else np.zeros(10)
        assert np.abs(found[j] - expected).sum() <= 2 and found[j].sum() == len(values)


@pytest.mark.parametrize("n", [3, 6, 20])
@pytest.mark.parametrize("block", [2, 256])
def test_similar_is_the_cosine(a, n, block):
    nearest, cosine = _compact.similar(a, n, block)
    expected = cosine_similarity(a.T.toarray())
    np.fill_diagonal(expected, -1)
    for j in range(a.shape[1]):
        order = np.argsort(-expected[j], kind="stable")[: min(n, 6)]
        assert nearest[j].tolist() == [k if expected[j, k] > 0 else -1 for k in order]
        found = nearest[j] >= 0
        np.testing.assert_allclose(cosine[j][found], expected[j, order][found], rtol=1e-5)


def test_a_single_feature_has_none_that_are_similar(a):
    assert _compact.similar(a[:, :1], 5)[0].shape == (1, 0)
