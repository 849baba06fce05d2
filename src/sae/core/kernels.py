"""Compiled loops of training and encoding, for the CPU.

A training step computes the dense encoder product in blocks of rows and turns each block at once into lists of active
entries (`select_top`, `select_above`), so that no batch × features array exists; `decode_block` reconstructs from the
lists, and `update_features` sums the gradients of each feature over its entries and takes the Adam step. Sums run in
the order of the rows within a feature and of the features within a row, so no result depends on the number of threads.

Positive floats have the order of their bit patterns read as integers, bfloat16 as well as float32: the selection works
on these integers, which lets the compiler use vector instructions.

They share one file because numba's cache notices a change only in the file of the function that is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import float32, int32, njit

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
SUMMED_FEATURES = 64
"""So many features in turn share one sum of the pre-bias's gradient: it must not depend on the number of threads."""

_fast: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})
# One multiply-add per statement and no reordering: every row of `products` takes the same steps wherever it stands.
_exact: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


@_fast
def _mark(row, floor, marks):
    for j in range(row.size):
        marks[j] = row[j] > floor


@_fast
def _gather(row, marks, words, columns, values):
    """List the marked columns and their values; `words` is `marks` read eight at a time."""
    n = 0
    for w in range(words.size):
        if words[w]:
            for j in range(8 * w, 8 * w + 8):
                columns[n] = j
                n += marks[j]
    for e in range(n):
        values[e] = row[columns[e]]
    return n


@_fast
def _count_above(values, n, floor):
    count = int32(0)
    for e in range(n):
        count += values[e] > floor
    return count


@_fast
def cut_for(values, n, k, floor):
    """Return a cut with exactly k of values[:n] above it, or a cut and how many values that equal it must be added.

    All values are above `floor`, and n ≥ k.
    """
    high = values[0]
    for e in range(n):
        high = max(high, values[e])
    low, n_above_high = floor, 0
    while high - low > 1:
        middle = low + ((high - low) >> 1)
        count = _count_above(values, n, middle)
        if count == k:
            return middle, 0
        if count > k:
            low = middle
        else:
            high, n_above_high = middle, count
    return high, k - n_above_high


@_fast
def _positive_bits(value, shift):
    """Bits of a float32 as an integer, without the lowest `shift`; 0 for what is not positive."""
    one = np.empty(1, np.float32)
    one[0] = value
    return max(one.view(np.int32)[0], int32(0)) >> shift


@_fast
def _from_bits(bits, shift):
    one = np.empty(1, np.int32)
    one[0] = bits << shift
    return one.view(np.float32)[0]


@_fast
def select_top(bits, shift, norm, ratio, k, starts, columns, values, marks, words, some_columns, some_values):
    """List the k largest of the positive pre-activations of each row.

    Parameters
    ----------
    bits
        (rows, h) pre-activations as integers; `shift` is 16 for bfloat16, 0 for float32.
    norm, ratio
        The search starts at the values above `ratio` · norm of the row; the result does not depend on it.
    starts, columns, values
        Written: row r has the entries starts[r] to starts[r + 1].

    Returns
    -------
    The mean over the rows of the k-th largest value by the norm.
    """
    total = 0.0
    n_listed = 0
    bits_listed = values.view(np.int32)
    for r in range(bits.shape[0]):
        starts[r] = n_listed
        row = bits[r]
        floor = _positive_bits(float32(ratio * norm[r]), shift)
        _mark(row, floor, marks)
        n = _gather(row, marks, words, some_columns, some_values)
        if n < k and floor > 0:
            floor = _positive_bits(float32(0), shift)
            _mark(row, floor, marks)
            n = _gather(row, marks, words, some_columns, some_values)
        cut, n_ties = floor, 0
        if n > k:
            # Whole vectors are counted faster than single values.
            padded = min((n + 31) & ~31, some_values.size)
            for e in range(n, padded):
                some_values[e] = floor
            cut, n_ties = cut_for(some_values, padded, k, floor)
        if norm[r] > 0:
            total += _from_bits(cut, shift) / norm[r]
        for e in range(n):
            value = some_values[e]
            columns[n_listed] = some_columns[e]
            bits_listed[n_listed] = int32(value) << shift
            tie = value == cut and n_ties > 0
            n_listed += (value > cut) | tie
            n_ties -= tie
    starts[bits.shape[0]] = n_listed
    return total / bits.shape[0]


@_fast
def select_above(bits, shift, floor, starts, columns, values, marks, words, some_columns, some_values):
    """List the pre-activations of each row above `floor` ≥ 0.

    Returns
    -------
    How many there are. Where that is more than `columns` holds, nothing useful was written.
    """
    cut = _positive_bits(float32(floor), shift)
    n_listed = 0
    for r in range(bits.shape[0]):
        starts[r] = n_listed
        row = bits[r]
        _mark(row, cut, marks)
        n = _gather(row, marks, words, some_columns, some_values)
        if n_listed + n <= columns.size:
            for e in range(n):
                columns[n_listed + e] = some_columns[e]
                values[n_listed + e] = _from_bits(some_values[e], shift)
        n_listed += n
    starts[bits.shape[0]] = n_listed
    return n_listed


@_fast
def select_over(pre, thresholds, starts, columns, values, marks, words):
    """List the pre-activations (rows, h) of each row above the thresholds (h,); `columns` must hold all of them."""
    n_listed = 0
    for r in range(pre.shape[0]):
        starts[r] = n_listed
        row = pre[r]
        for j in range(row.size):
            marks[j] = row[j] > thresholds[j]
        n_listed += _gather(row, marks, words, columns[n_listed:], values[n_listed:])
    starts[pre.shape[0]] = n_listed


@_fast
def keep_above(cut, starts, columns, values):
    """Drop the entries that are not above `cut`, in place."""
    n_kept = 0
    start = starts[0]
    for r in range(starts.size - 1):
        stop = starts[r + 1]
        for e in range(start, stop):
            columns[n_kept] = columns[e]
            values[n_kept] = values[e]
            n_kept += values[e] > cut
        starts[r + 1] = n_kept
        start = stop


@_fast
def recompute(y, W_enc, b_enc, starts, columns, values):
    """Replace bfloat16 values by float32 ones, from rows `W_enc` (h, d)."""
    for r in range(y.shape[0]):
        row = y[r]
        for e in range(starts[r], starts[r + 1]):
            j = columns[e]
            weights = W_enc[j]
            total = b_enc[j]
            for q in range(row.size):
                total += row[q] * weights[q]
            values[e] = max(total, float32(0))


@_fast
def decode_block(
    y, W_dec, b_dec, group_ends, group_weights, factor, penalty, starts, columns, values, gradients, residuals
):
    """Reconstruct a block of rows from its entries, with each group of features in turn.

    Parameters
    ----------
    group_ends, group_weights
        (g,) widths of the nested dictionaries, and how much each counts.
    factor, penalty
        The gradient of an entry is `factor` · residuals · W_dec + `penalty`.
    gradients
        Written: of the loss in respect of each entry.
    residuals
        (rows, g, d), written: weighted ŷ − y summed over the groups from this one on, which is what the group's
        features see.

    Returns
    -------
    Weighted sum of squared residuals over rows and groups, sum of the values.
    """
    n_rows, d = y.shape
    n_groups = group_ends.size
    squares, total = 0.0, 0.0
    for r in range(n_rows):
        residual = residuals[r, 0]
        for q in range(d):
            residual[q] = b_dec[q] - y[r, q]
        e, stop = starts[r], starts[r + 1]
        for g in range(n_groups):
            if g > 0:
                following = residuals[r, g]
                for q in range(d):
                    following[q] = residual[q]
                residual = following
            last = stop
            if g < n_groups - 1:
                last = e
                while last < stop and columns[last] < group_ends[g]:
                    last += 1
            while e + 1 < last:
                one, two = W_dec[columns[e]], W_dec[columns[e + 1]]
                a_one, a_two = values[e], values[e + 1]
                for q in range(d):
                    residual[q] += a_one * one[q] + a_two * two[q]
                e += 2
            if e < last:
                one, a_one = W_dec[columns[e]], values[e]
                for q in range(d):
                    residual[q] += a_one * one[q]
                e += 1
            square = float32(0)
            for q in range(d):
                square += residual[q] * residual[q]
            squares += group_weights[g] * square
        if n_groups > 1:
            weight = group_weights[n_groups - 1]
            for q in range(d):
                residual[q] *= weight
        for g in range(n_groups - 2, -1, -1):
            here, after, weight = residuals[r, g], residuals[r, g + 1], group_weights[g]
            for q in range(d):
                here[q] = weight * here[q] + after[q]
        g = 0
        for e in range(starts[r], stop):
            j = columns[e]
            while j >= group_ends[g]:
                g += 1
            one, residual = W_dec[j], residuals[r, g]
            dot = float32(0)
            for q in range(d):
                dot += residual[q] * one[q]
            # At exactly 0 the rectifier passes no gradient.
            gradients[e] = factor * dot + penalty if values[e] > 0 else float32(0)
            total += values[e]
    return squares, total


@_fast
def _adam(weights, gradient, mean, square, rate, epsilon):
    for q in range(weights.size):
        g = gradient[q]
        mean[q] = float32(BETA_1) * mean[q] + float32(1 - BETA_1) * g
        square[q] = float32(BETA_2) * square[q] + float32(1 - BETA_2) * g * g
        weights[q] -= rate * mean[q] / (np.sqrt(square[q]) + epsilon)


@_fast
def _normalise(weights):
    total = float32(0)
    for q in range(weights.size):
        total += weights[q] * weights[q]
    inverse = float32(1) / np.sqrt(max(total, float32(1e-24)))
    for q in range(weights.size):
        weights[q] *= inverse


@_fast
def sort_entries(low, high, starts, columns, values, gradients, ends, rows, sorted_values, sorted_gradients):
    """Sort the entries of features low to high by feature, in the order of the rows.

    Parameters
    ----------
    starts, columns, values, gradients
        Entries by block of rows: (blocks, block rows + 1) and three times (blocks, capacity).
    ends
        Written: (high − low + 1,), the last place of each feature.
    """
    n_blocks, n_rows = starts.shape[0], starts.shape[1] - 1
    n_features = high - low
    for j in range(n_features + 1):
        ends[j] = 0
    for b in range(n_blocks):
        listed = columns[b]
        for e in range(starts[b, n_rows]):
            j = listed[e] - low
            if 0 <= j < n_features:
                ends[j + 1] += 1
    for j in range(n_features):
        ends[j + 1] += ends[j]
    if ends[n_features] > rows.size:
        return ends[n_features]
    for b in range(n_blocks):
        listed = columns[b]
        for r in range(n_rows):
            for e in range(starts[b, r], starts[b, r + 1]):
                j = listed[e] - low
                if 0 <= j < n_features:
                    place = ends[j]
                    ends[j] = place + 1
                    rows[place] = b * n_rows + r
                    sorted_values[place] = values[b, e]
                    sorted_gradients[place] = gradients[b, e]
    return 0


@_fast
def update_features(
    low, high, ends, rows, values, gradients, y, residuals, group_ends, factor, b_pre, rate, epsilon, unit_norm, frozen, step,
    W_enc, W_enc_mean, W_enc_square, W_dec, W_dec_mean, W_dec_square, b_enc, b_enc_mean, b_enc_square, pre_gradients, last_fired,
):  # fmt: skip
    """Take one Adam step on features low to high from their sorted entries.

    Parameters
    ----------
    rate, epsilon
        With the bias corrections of this step in them.
    frozen
        Leave the decoder as it is.
    pre_gradients
        (ceil(h / SUMMED_FEATURES), d), parts of the gradient in respect of the pre-bias, are added to.
    """
    d = y.shape[1]
    of_encoder, of_decoder, of_bias = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(1, np.float32)
    start, group = 0, 0
    for j in range(low, high):
        while j >= group_ends[group]:
            group += 1
        stop = ends[j - low]
        pre_gradient = pre_gradients[j // SUMMED_FEATURES]
        bias, highest = float32(0), float32(0)
        for q in range(d):
            of_encoder[q] = 0
            of_decoder[q] = 0
        e = start
        while e + 1 < stop:
            y_one, y_two = y[rows[e]], y[rows[e + 1]]
            r_one, r_two = residuals[rows[e], group], residuals[rows[e + 1], group]
            g_one, g_two, a_one, a_two = gradients[e], gradients[e + 1], values[e], values[e + 1]
            for q in range(d):
                of_encoder[q] += g_one * y_one[q] + g_two * y_two[q]
                of_decoder[q] += a_one * r_one[q] + a_two * r_two[q]
            bias += g_one + g_two
            highest = max(highest, a_one, a_two)
            e += 2
        if e < stop:
            y_one, r_one, g_one, a_one = y[rows[e]], residuals[rows[e], group], gradients[e], values[e]
            for q in range(d):
                of_encoder[q] += g_one * y_one[q]
                of_decoder[q] += a_one * r_one[q]
            bias += g_one
            highest = max(highest, a_one)
        if highest > 0:
            last_fired[j] = step
        start = stop
        for q in range(d):
            of_decoder[q] *= factor
            of_encoder[q] += bias * b_pre[q]
            pre_gradient[q] += bias * W_enc[j, q]
        of_bias[0] = bias
        _adam(W_enc[j], of_encoder, W_enc_mean[j], W_enc_square[j], rate, epsilon)
        if not frozen:
            _adam(W_dec[j], of_decoder, W_dec_mean[j], W_dec_square[j], rate, epsilon)
        _adam(b_enc[j : j + 1], of_bias, b_enc_mean[j : j + 1], b_enc_square[j : j + 1], rate, epsilon)
        if unit_norm and not frozen:
            _normalise(W_dec[j])


@_fast
def update_dense(
    gradient_enc, gradient_dec, gradient_b, b_pre, rate, epsilon, unit_norm, frozen,
    W_enc, W_enc_mean, W_enc_square, W_dec, W_dec_mean, W_dec_square, b_enc, b_enc_mean, b_enc_square, pre_gradient,
):  # fmt: skip
    """Take one Adam step on features whose gradients are given as arrays."""
    for j in range(W_enc.shape[0]):
        for q in range(b_pre.size):
            gradient_enc[j, q] += gradient_b[j] * b_pre[q]
            pre_gradient[q] += gradient_b[j] * W_enc[j, q]
        _adam(W_enc[j], gradient_enc[j], W_enc_mean[j], W_enc_square[j], rate, epsilon)
        if not frozen:
            _adam(W_dec[j], gradient_dec[j], W_dec_mean[j], W_dec_square[j], rate, epsilon)
        if unit_norm and not frozen:
            _normalise(W_dec[j])
    _adam(b_enc, gradient_b, b_enc_mean, b_enc_square, rate, epsilon)


@_fast
def update_bias(bias, gradient, mean, square, rate, epsilon):
    """Take one Adam step on a bias."""
    _adam(bias, gradient, mean, square, rate, epsilon)


@_fast
def rectify(pre, counts):
    """Set negative values to 0 in place; add each column's number of positive values to `counts`; return their sum."""
    total = 0.0
    for r in range(pre.shape[0]):
        row = pre[r]
        part: Any = float32(0)
        for j in range(row.size):
            value = max(row[j], float32(0))
            row[j] = value
            part += value
            counts[j] += value > 0
        total += part
    return total


@_fast
def mask_gradients(activations, gradients, factor, penalty, sums):
    """Turn R W_decᵀ into gradients of the pre-activations in place, and add their columns to `sums`."""
    for r in range(activations.shape[0]):
        row, gradient = activations[r], gradients[r]
        for j in range(row.size):
            value = factor * gradient[j] + penalty if row[j] > 0 else float32(0)
            gradient[j] = value
            sums[j] += value


@_exact
def products(x, W_enc, b_enc, pre):
    """Write x W_enc + b_enc for rows (n, d), n a multiple of 2, d of 4 and features h: each element in one fixed order."""
    n, d = x.shape
    h = b_enc.size
    tile = 512
    for low in range(0, h, tile):
        high = min(low + tile, h)
        for r in range(0, n, 2):
            one, two = pre[r, low:high], pre[r + 1, low:high]
            for j in range(high - low):
                one[j] = b_enc[low + j]
                two[j] = b_enc[low + j]
            for i in range(0, d, 4):
                w_0, w_1, w_2, w_3 = (
                    W_enc[i, low:high],
                    W_enc[i + 1, low:high],
                    W_enc[i + 2, low:high],
                    W_enc[i + 3, low:high],
                )
                a_0, a_1, a_2, a_3 = x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3]
                b_0, b_1, b_2, b_3 = x[r + 1, i], x[r + 1, i + 1], x[r + 1, i + 2], x[r + 1, i + 3]
                for j in range(high - low):
                    p = one[j]
                    p += a_0 * w_0[j]
                    p += a_1 * w_1[j]
                    p += a_2 * w_2[j]
                    p += a_3 * w_3[j]
                    one[j] = p
                    p = two[j]
                    p += b_0 * w_0[j]
                    p += b_1 * w_1[j]
                    p += b_2 * w_2[j]
                    p += b_3 * w_3[j]
                    two[j] = p


@_exact
def squared_errors(x, W_dec, b_dec, starts, columns, values, errors):
    """Write ‖x − x̂‖² of each row, x̂ from its entries in their order."""
    d = b_dec.size
    residual = np.empty(d, np.float32)
    for r in range(errors.size):
        for q in range(d):
            residual[q] = b_dec[q] - x[r, q]
        for e in range(starts[r], starts[r + 1]):
            a, weights = values[e], W_dec[columns[e]]
            for q in range(d):
                residual[q] += a * weights[q]
        total = 0.0
        for q in range(d):
            total += np.float64(residual[q]) * np.float64(residual[q])
        errors[r] = total
