from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae.core import kernels
from sae.core.backend import step_rate

KINDS = {"float32": (torch.float32, 0), "bfloat16": (torch.bfloat16, 16)}
each_kind = pytest.mark.parametrize("kind", KINDS)
WIDTHS = (1, 7, 8, 9, 33, 70)


def as_bits(pre, kind):
    """Pre-activations as the integers that the kernels read, and the values they stand for."""
    dtype, shift = KINDS[kind]
    narrow = torch.from_numpy(pre).to(dtype)
    return narrow.view(torch.int16 if shift else torch.int32).numpy(), narrow.float().numpy(), shift


def scratch(h, shift):
    """Room for the selection from one row."""
    words = np.zeros(-(-h // 8), np.uint64)
    kind = np.int16 if shift else np.int32
    return words.view(np.uint8), words, np.empty(h + 32, np.int32), np.empty(h + 32, kind)


def top_by_numpy(pre, k):
    """The k largest positive values of each row, of equal ones the first, as (columns, values) in order of the columns."""
    found = []
    for row in pre:
        columns = np.sort(np.argsort(-row, kind="stable")[:k])
        columns = columns[row[columns] > 0]
        found.append((columns, row[columns]))
    return found


def listed(starts, columns, values):
    pairs = zip(starts[:-1], starts[1:], strict=True)
    return [(columns[start:stop], values[start:stop]) for start, stop in pairs]


def assert_same_lists(found, expected):
    assert len(found) == len(expected)
    for (columns, values), (expected_columns, expected_values) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(columns, expected_columns)
        np.testing.assert_array_equal(values, expected_values)


def select_top(pre, k, *, kind="float32", ratio=0.0, norm=None):
    bits, exact, shift = as_bits(pre, kind)
    n, h = pre.shape
    norm = np.ones(n, np.float32) if norm is None else norm
    starts, columns, values = (
        np.empty(n + 1, np.int64),
        np.empty(2 * n * k + 1, np.int32),
        np.empty(2 * n * k + 1, "f4"),
    )
    cut = kernels.select_top(bits, shift, norm, ratio, k, starts, columns, values, *scratch(h, shift))
    return listed(starts, columns, values), exact, cut


def select_above(pre, floor, *, kind="float32", capacity=None):
    bits, exact, shift = as_bits(pre, kind)
    n, h = pre.shape
    capacity = n * h if capacity is None else capacity
    starts, columns, values = np.empty(n + 1, np.int64), np.full(capacity, -1, np.int32), np.empty(capacity, np.float32)
    needed = kernels.select_above(bits, shift, floor, starts, columns, values, *scratch(h, shift))
    return needed, starts, columns, values, exact


# ---- Selection


@st.composite
def pre_activations(draw):
    """Rows with many ties, zeros and negative values, and a k up to their width."""
    n, h = draw(st.integers(1, 5)), draw(st.sampled_from(WIDTHS))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lowest, highest = draw(st.sampled_from([(-3, 4), (-20, 3), (-5, 1), (1, 4), (0, 1)]))
    pre = rng.integers(lowest, highest, (n, h)) / 4
    if draw(st.booleans()):
        pre = pre * rng.random((n, h))
    return pre.astype(np.float32), draw(st.integers(1, h))


@each_kind
@given(drawn=pre_activations(), ratio=st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0, 50.0]), seed=st.integers(0, 100))
def test_select_top_is_a_stable_sort_whatever_the_search_starts_from(kind, drawn, ratio, seed):
    pre, k = drawn
    norm = np.random.default_rng(seed).uniform(0, 2, len(pre)).astype(np.float32)
    found, exact, _ = select_top(pre, k, kind=kind, ratio=ratio, norm=norm)
    assert_same_lists(found, top_by_numpy(exact, k))


@each_kind
@pytest.mark.parametrize("h", [*WIDTHS, 1000])
def test_select_top_of_any_width(kind, h):
    pre = np.random.default_rng(h).standard_normal((20, h)).astype(np.float32)
    for k in {1, min(3, h), h // 2 or 1, h}:
        found, exact, _ = select_top(pre, k, kind=kind)
        assert_same_lists(found, top_by_numpy(exact, k))


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_select_top_without_any_positive_value_lists_nothing(ratio):
    pre = -np.random.default_rng(0).random((4, 9), dtype=np.float32)
    pre[2] = 0
    pre[3] = -0.0
    found, _, cut = select_top(pre, 3, ratio=ratio)
    assert [len(columns) for columns, _ in found] == [0, 0, 0, 0]
    assert cut == 0


@each_kind
def test_select_top_tells_where_the_next_search_may_start(kind):
    """The returned share of the norm separates the k-th from the next value."""
    rng = np.random.default_rng(0)
    norm = np.array([2.5], np.float32)
    for _ in range(20):
        pre = rng.standard_normal((1, 50)).astype(np.float32)
        _, exact, cut = select_top(pre, 4, kind=kind, norm=norm)
        descending = -np.sort(-exact[0])
        assert descending[4] <= cut * norm[0] * (1 + 1e-6)
        assert cut * norm[0] <= descending[3] * (1 + 1e-6)


def test_select_top_of_cells_at_the_origin_takes_no_part_in_the_next_search():
    pre = np.array([[1, 2, 3, 4], [1, 2, 3, 4]], np.float32)
    _, _, cut = select_top(pre, 1, norm=np.array([0, 1], np.float32))
    assert 1.5 <= cut < 2, "half of a value from 3 up to, not including, 4"


@st.composite
def numbers_above(draw):
    floor = draw(st.integers(0, 50))
    values = draw(
        st.lists(st.integers(floor + 1, floor + draw(st.sampled_from([1, 3, 10**6]))), min_size=1, max_size=40)
    )
    return np.array(values, np.int32), floor, draw(st.integers(1, len(values)))


@given(numbers_above())
def test_cut_leaves_k_above_it_or_says_how_many_of_the_equal_ones_to_add(drawn):
    values, floor, k = drawn
    cut, n_ties = kernels.cut_for(values, len(values), k, floor)
    assert (values > cut).sum() + n_ties == k
    assert 0 <= n_ties <= (values == cut).sum()


@each_kind
@given(drawn=pre_activations(), floor=st.sampled_from([0.0, 0.25, 0.3, 2.0]))
def test_select_above_is_a_comparison(kind, drawn, floor):
    pre, _ = drawn
    needed, starts, columns, values, exact = select_above(pre, floor, kind=kind)
    expected = [(np.flatnonzero(row > floor), row[row > floor]) for row in exact]
    assert needed == sum(len(columns) for columns, _ in expected)
    assert_same_lists(listed(starts, columns, values), expected)


def test_select_above_says_how_much_room_it_needs():
    pre = np.ones((3, 10), np.float32)
    needed, *_ = select_above(pre, 0.5, capacity=29)
    assert needed == 30
    needed, starts, columns, _, _ = select_above(pre, 0.5, capacity=30)
    assert needed == 30
    np.testing.assert_array_equal(starts, [0, 10, 20, 30])
    np.testing.assert_array_equal(columns, np.tile(np.arange(10), 3))


@pytest.mark.parametrize("h", [*WIDTHS, 1000])
def test_select_over_compares_each_feature_with_its_own_threshold(h):
    rng = np.random.default_rng(h)
    pre, thresholds = rng.standard_normal((20, h)).astype(np.float32), rng.random(h, dtype=np.float32)
    pre[3], pre[4], pre[5] = thresholds, thresholds + 1, -1
    starts, columns, values = np.empty(21, np.int64), np.empty(20 * h + 8, np.int32), np.empty(20 * h + 8, np.float32)
    kernels.select_over(pre, thresholds, starts, columns, values, *scratch(h, 0)[:2])
    expected = [(np.flatnonzero(row > thresholds), row[row > thresholds]) for row in pre]
    assert [len(columns) for columns, _ in expected[3:6]] == [0, h, 0]
    assert_same_lists(listed(starts, columns, values), expected)


@given(drawn=pre_activations(), cut=st.sampled_from([0.25, 0.3, 2.0]))
def test_keep_above_is_to_select_above(drawn, cut):
    pre, _ = drawn
    _, starts, columns, values, _ = select_above(pre, 0.0)
    kernels.keep_above(np.float32(cut), starts, columns, values)
    expected = [(np.flatnonzero(row > np.float32(cut)), row[row > np.float32(cut)]) for row in pre]
    assert_same_lists(listed(starts, columns, values), expected)


# ---- A step


def entries(n=40, h=21, *, seed=0, density=0.2):
    """Activations (n, h) with empty rows and a column never active, and their lists by row."""
    rng = np.random.default_rng(seed)
    a = np.where(rng.random((n, h)) < density, rng.random((n, h)), 0).astype(np.float32)
    a[[0, n // 2]] = 0
    a[:, 3] = 0
    _, starts, columns, values, _ = select_above(a, 0.0)
    return a, starts, columns, values


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def groups_of(ends):
    """The group of each feature."""
    return np.searchsorted(ends, np.arange(ends[-1]), side="right")


def test_recompute_is_the_encoder_for_the_listed_entries():
    a, starts, columns, values = entries()
    y, W_enc, b_enc = drawn(40, 6), drawn(21, 6, seed=1), drawn(21, seed=2)
    kernels.recompute(y, W_enc, b_enc, starts, columns, values)
    expected = np.maximum(y.astype(np.float64) @ W_enc.T + b_enc, 0)[a > 0]
    assert (expected == 0).any() and (expected > 0).any()
    np.testing.assert_allclose(values[: starts[-1]], expected, rtol=1e-5, atol=1e-6)


ONE = np.ones(1, np.float32)
GROUPS = {"one": (21,), "two": (8, 21), "four": (2, 5, 10, 21), "an empty one": (3, 4, 21)}
each_grouping = pytest.mark.parametrize("ends", GROUPS.values(), ids=GROUPS)


@each_grouping
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_decode_block_is_the_formula(ends, penalty):
    a, *lists = entries()
    starts, _, values = lists
    rows, cols = np.nonzero(a)
    values[5] = a[rows[5], cols[5]] = 0
    y, W_dec, b_dec = drawn(40, 6), drawn(21, 6, seed=1), drawn(6, seed=2)
    gradients, residuals = np.empty_like(values), np.empty((40, len(ends), 6), np.float32)
    factor, weights = np.float32(0.7), np.linspace(0.5, 0.2, len(ends), dtype=np.float32) if len(ends) > 1 else ONE
    squares, total = kernels.decode_block(
        y, W_dec, b_dec, np.array(ends), weights, factor, np.float32(penalty), *lists, gradients, residuals
    )
    exact = np.array([a[:, :end].astype(np.float64) @ W_dec[:end] + b_dec - y for end in ends])
    np.testing.assert_allclose(squares, weights @ np.square(exact).sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(total, a.sum(dtype=np.float64), rtol=1e-6)
    seen = np.cumsum((weights[:, None, None] * exact)[::-1], axis=0)[::-1]
    np.testing.assert_allclose(residuals, seen.transpose(1, 0, 2), rtol=1e-4, atol=1e-4)
    expected = factor * np.einsum("hnd,hd->nh", seen[groups_of(ends)], W_dec) + penalty
    expected[a == 0] = 0
    np.testing.assert_allclose(gradients[: starts[-1]], expected[rows, cols], rtol=1e-4, atol=1e-4)
    assert gradients[5] == 0, "no gradient passes the rectifier at 0"


def blocks_of(lists, size):
    """The lists of all rows as blocks of `size` rows each, the last one filled up with empty rows."""
    starts, *others = lists
    n = len(starts) - 1
    n_blocks = -(-n // size)
    by_block = np.zeros((n_blocks, size + 1), np.int64)
    parts = [np.zeros((n_blocks, starts[-1]), part.dtype) for part in others]
    for b in range(n_blocks):
        here = starts[b * size : min((b + 1) * size, n) + 1]
        by_block[b, : len(here)] = here - here[0]
        by_block[b, len(here) :] = here[-1] - here[0]
        for part, other in zip(parts, others, strict=True):
            part[b, : here[-1] - here[0]] = other[here[0] : here[-1]]
    return by_block, *parts


def sorted_by_feature(lists, low, high, *, size=16, capacity=1000):
    room = np.empty(capacity, np.int32), np.empty(capacity, np.float32), np.empty(capacity, np.float32)
    ends = np.empty(high - low + 1, np.int64)
    needed = kernels.sort_entries(np.int64(low), np.int64(high), *blocks_of(lists, size), ends, *room)
    return needed, ends, *room


@pytest.mark.parametrize(("low", "high"), [(0, 21), (0, 8), (8, 21), (3, 4)])
@pytest.mark.parametrize("size", [16, 40, 64])
def test_sort_entries_is_a_stable_sort_by_feature(low, high, size):
    a, starts, columns, values = entries()
    gradients = drawn(len(values))
    needed, ends, rows, sorted_values, sorted_gradients = sorted_by_feature(
        (starts, columns, values, gradients), low, high, size=size
    )
    assert needed == 0
    row_of, column_of = np.nonzero(a)
    order = np.argsort(column_of, kind="stable")
    order = order[(column_of[order] >= low) & (column_of[order] < high)]
    np.testing.assert_array_equal(ends[: high - low], np.cumsum((a > 0).sum(axis=0)[low:high]))
    np.testing.assert_array_equal(rows[: len(order)], row_of[order])
    np.testing.assert_array_equal(sorted_values[: len(order)], values[order])
    np.testing.assert_array_equal(sorted_gradients[: len(order)], gradients[order])


def test_sort_entries_says_how_much_room_it_needs():
    a, *lists = entries()
    lists.append(lists[-1])
    n = int((a > 0).sum())
    assert sorted_by_feature(lists, 0, 21, capacity=n - 1)[0] == n
    assert sorted_by_feature(lists, 0, 21, capacity=n)[0] == 0


def adam(weights, gradient, mean, square, number, rate):
    """Adam as published (arXiv:1412.6980), in float64."""
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * np.square(gradient)
    corrected = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.999 ** (number + 1))
    return weights - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8), mean, square


def moments(*shape):
    return drawn(*shape, seed=7) / 10, np.square(drawn(*shape, seed=8)) / 10


def assert_adam(found, before, gradient, number, *, unit_norm=False):
    weights, mean, square = adam(before[0].astype(np.float64), gradient, *before[1:], number, 1e-2)
    if unit_norm:
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    for part, expected in zip(found, (weights, mean, square), strict=True):
        np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1, 999])
def test_update_bias_is_a_step_of_adam(number):
    bias, gradient, (mean, square) = drawn(9), drawn(9, seed=1), moments(9)
    before = bias.copy(), mean.copy(), square.copy()
    kernels.update_bias(bias, gradient, mean, square, *step_rate(number, 1e-2))
    assert_adam((bias, mean, square), before, gradient, number)


def assert_decoder(found, before, gradient, number, unit_norm, frozen):
    if not frozen:
        assert_adam(found, before, gradient, number, unit_norm=unit_norm)
        return
    for part, expected in zip(found, before, strict=True):
        np.testing.assert_array_equal(part, expected)


def dictionary(h=21, d=6):
    """Weights with their moments: encoder, decoder, encoder bias."""
    return [array for shape in ((h, d), (h, d), (h,)) for array in (drawn(*shape, seed=h), *moments(*shape))]


each_decoder = pytest.mark.parametrize(
    ("unit_norm", "frozen"), [(True, False), (False, False), (True, True)], ids=["unit", "free", "frozen"]
)


@each_grouping
@each_decoder
def test_update_features_is_a_step_of_adam_on_the_gradients(ends, unit_norm, frozen):
    a, starts, columns, values = entries()
    n, h, d, number = 40, 21, 6, 4
    y, residuals, b_pre, gradients = drawn(n, d), drawn(n, len(ends), d, seed=1), drawn(d, seed=2), drawn(len(values))
    arrays, factor = dictionary(), np.float32(0.7)
    before = [array.copy() for array in arrays]
    pre_gradients, last_fired = np.ones((1, d), np.float32), np.full(h, 2)
    for low, high in ((0, 13), (13, h)):
        _, *found = sorted_by_feature((starts, columns, values, gradients), low, high)
        kernels.update_features(
            np.int64(low), np.int64(high), *found, y, residuals, np.array(ends), factor, b_pre,
            *step_rate(number, 1e-2), unit_norm, frozen, number, *arrays, pre_gradients, last_fired,
        )  # fmt: skip
    g = np.zeros((n, h))
    g[a > 0] = gradients[: starts[-1]]
    of_decoder = factor * np.einsum("nh,nhd->hd", a, residuals[:, groups_of(ends)].astype(np.float64))
    assert_adam(arrays[0:3], before[0:3], g.T @ (y + b_pre), number)
    assert_decoder(arrays[3:6], before[3:6], of_decoder, number, unit_norm, frozen)
    assert_adam(arrays[6:9], before[6:9], g.sum(axis=0), number)
    np.testing.assert_allclose(pre_gradients[0], 1 + g.sum(axis=0) @ before[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(last_fired, np.where((a > 0).any(axis=0), number, 2))
    assert last_fired[3] == 2


@each_decoder
def test_update_dense_is_a_step_of_adam_on_the_gradients(unit_norm, frozen):
    h, d, number = 21, 6, 4
    of_encoder, of_decoder, of_bias, b_pre = drawn(h, d), drawn(h, d, seed=1), drawn(h, seed=2), drawn(d, seed=3)
    arrays, pre_gradient = dictionary(), np.ones(d, np.float32)
    before = [array.copy() for array in arrays]
    expected = of_encoder + np.outer(of_bias, b_pre).astype(np.float64)
    kernels.update_dense(
        of_encoder, of_decoder, of_bias, b_pre, *step_rate(number, 1e-2), unit_norm, frozen, *arrays, pre_gradient
    )
    assert_adam(arrays[0:3], before[0:3], expected, number)
    assert_decoder(arrays[3:6], before[3:6], of_decoder, number, unit_norm, frozen)
    assert_adam(arrays[6:9], before[6:9], of_bias, number)
    np.testing.assert_allclose(pre_gradient, 1 + of_bias @ before[0], rtol=1e-4, atol=1e-5)


def test_rectify_sets_negative_values_to_zero_and_counts_the_others():
    pre = drawn(30, 17)
    pre[3, 4] = 0
    before, counts = pre.copy(), np.ones(17, np.int32)
    total = kernels.rectify(pre, counts)
    np.testing.assert_array_equal(pre, np.maximum(before, 0))
    np.testing.assert_array_equal(counts, 1 + (before > 0).sum(axis=0))
    np.testing.assert_allclose(total, pre.sum(dtype=np.float64), rtol=1e-6)


def test_mask_gradients_passes_those_of_active_features():
    a, gradients, sums = np.maximum(drawn(30, 17), 0), drawn(30, 17, seed=1), np.ones(17, np.float32)
    expected = np.where(a > 0, np.float32(0.7) * gradients + np.float32(0.3), 0)
    kernels.mask_gradients(a, gradients, np.float32(0.7), np.float32(0.3), sums)
    np.testing.assert_allclose(gradients, expected, rtol=1e-5, atol=1e-6)
    assert (gradients[a == 0] == 0).all()
    np.testing.assert_allclose(sums, 1 + expected.sum(axis=0), rtol=1e-4, atol=1e-5)


def test_step_rate_makes_adam_with_its_bias_corrections():
    """Against torch over several steps from zero moments."""
    start, gradients = drawn(9), drawn(6, 9, seed=1)
    parameter = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1e-2)
    bias, mean, square = start.copy(), np.zeros(9, np.float32), np.zeros(9, np.float32)
    for number, gradient in enumerate(gradients):
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        kernels.update_bias(bias, gradient, mean, square, *step_rate(number, 1e-2))
    np.testing.assert_allclose(bias, parameter.detach().numpy(), rtol=1e-5)
    assert np.abs(bias - start).min() > 1e-4


# ---- Encoding


def multiplied(x, W_enc, b_enc):
    pre = np.empty((len(x), len(b_enc)), np.float32)
    kernels.products(x, W_enc, b_enc, pre)
    return pre


@pytest.mark.parametrize(("n", "d", "h"), [(2, 4, 1), (6, 8, 511), (10, 52, 513), (4, 12, 1100)])
def test_products_are_the_matrix_product(n, d, h):
    x, W_enc, b_enc = drawn(n, d), drawn(d, h, seed=1), drawn(h, seed=2)
    expected = x.astype(np.float64) @ W_enc + b_enc
    np.testing.assert_allclose(multiplied(x, W_enc, b_enc), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("h", [1, 3, 16, 63, 64, 511, 512, 513, 530, 1031])
def test_a_row_of_products_is_the_same_to_the_bit_wherever_it_stands(h):
    x, W_enc, b_enc = drawn(50, 52), drawn(52, h, seed=1), drawn(h, seed=2)
    among = multiplied(x, W_enc, b_enc)
    for row in (0, 1, 6, 7, 11, 48, 49):
        pair = np.stack([x[row], x[0]])
        np.testing.assert_array_equal(multiplied(pair, W_enc, b_enc)[0], among[row])
        np.testing.assert_array_equal(multiplied(pair[::-1].copy(), W_enc, b_enc)[1], among[row])
    np.testing.assert_array_equal(multiplied(x[10:36].copy(), W_enc, b_enc), among[10:36])


def test_an_element_of_products_is_the_same_to_the_bit_in_any_column():
    x, column = drawn(2, 52), drawn(52, seed=1)
    pre = multiplied(x, np.repeat(column[:, None], 1037, axis=1), np.full(1037, 0.3, np.float32))
    np.testing.assert_array_equal(pre, np.repeat(pre[:, :1], 1037, axis=1))


def test_squared_errors_are_the_formula_and_the_same_to_the_bit_wherever_a_row_stands():
    a, starts, columns, values = entries()
    x, W_dec, b_dec = drawn(40, 8), drawn(21, 6, seed=1), drawn(6, seed=2)
    errors = np.empty(40)
    kernels.squared_errors(x, W_dec, b_dec, starts, columns, values, errors)
    residual = x[:, :6] - (a.astype(np.float64) @ W_dec + b_dec)
    np.testing.assert_allclose(errors, np.square(residual).sum(axis=1), rtol=1e-5)
    for row in (0, 7, 38):
        alone, here = np.empty(1), slice(starts[row], starts[row + 1])
        own = starts[row : row + 2] - starts[row]
        kernels.squared_errors(x[row : row + 1], W_dec, b_dec, own, columns[here], values[here], alone)
        assert alone[0] == errors[row]
