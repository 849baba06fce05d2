"""How well columns tell labels apart, from the non-zero values alone: scores on all cells, and on cells that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from scipy import sparse, special

from .columns import GeneColumns
from .rows import Matrix, on_disk, row_blocks
from .statistics import welch_interval
from .workers import Workers, available_threads

BLOCK_VALUES = 8_000_000
"""Values sorted at a time; 0.5 GB at most."""
N_DRAWS = 20
"""Ways to divide the donors that are drawn for one split, to keep the one with most labels in both halves."""

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class LabelScores:
    """How well each feature tells each label from the other cells; all arrays (labels, features)."""

    auroc: np.ndarray
    f1: np.ndarray
    difference: np.ndarray
    ci_low: np.ndarray
    ci_high: np.ndarray
    pval: np.ndarray
    standard_error: np.ndarray
    """SE of the mean inside the label plus SE of the mean outside."""


@dataclass(frozen=True)
class CrossFit:
    """Scores on the half of the cells that had no say in them; NaN for a label that no split has in both halves."""

    auroc: np.ndarray
    """(labels, columns): AUROC in the direction chosen on the other half; mean over halves and splits."""
    f1: np.ndarray
    """(labels, columns): F1 at the threshold chosen on the other half; mean over halves and splits."""
    chosen: np.ndarray
    """(splits, 2, labels): the best column of the label on that half, −1 where the label is not in both halves."""
    selection_auroc: np.ndarray
    """(splits, 2, labels): its AUROC on the half that it was chosen on."""
    held_out_auroc: np.ndarray
    """(splits, 2, labels): its AUROC on the other half."""
    held_out_f1: np.ndarray
    """(splits, 2, labels): its F1 on the other half, at the threshold that is best on that one."""


@dataclass(frozen=True)
class Trend:
    """Whether columns rise or fall along ordered labels; all arrays (columns,)."""

    direction: np.ndarray
    """1 where the mean rises at every step, −1 where it falls at every step, else 0."""
    score: np.ndarray
    pval: np.ndarray


def score_labels(a: sparse.csr_matrix, codes: np.ndarray, n_labels: int) -> LabelScores:
    """Score every feature against every label.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    """
    n = a.shape[0]
    everyone = np.zeros(n, dtype=np.int64)
    scans = [_scan_csc(*block, codes, everyone, n_labels) for _, block in _sorted_columns(a)]
    u, f1 = (np.concatenate([scan[i][:, 0] for scan in scans]).T for i in range(2))
    cubes = np.concatenate([scan[3][:, 0, 1] for scan in scans])
    n_in = np.bincount(codes, minlength=n_labels).astype(np.float64)[:, None]
    n_out = n - n_in
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = u / (n_in * n_out)
        sd = np.sqrt(n_in * n_out / 12 * (n + 1 - (cubes - n) / (n * (n - 1))))
        z = (np.abs(u - n_in * n_out / 2) - 0.5) / sd
    pval = np.where(sd > 0, np.minimum(2 * special.ndtr(-z), 1), 1.0)

    sums, squares = _label_sums(a, codes, n_labels)
    mean_in, var_in = _mean_variance(sums, squares, n_in)
    mean_out, var_out = _mean_variance(sums.sum(axis=0) - sums, squares.sum(axis=0) - squares, n_out)
    low, high = welch_interval(mean_in, var_in, n_in, mean_out, var_out, n_out)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(var_in / n_in) + np.sqrt(var_out / n_out)
    return LabelScores(auroc, f1, mean_in - mean_out, low, high, pval, error)


def difference(x: np.ndarray, inside: np.ndarray) -> tuple[float, float, float]:
    """Mean of `x` (n,) inside minus outside, and its 95 % confidence interval by Welch's t."""
    one, rest = x[inside].astype(np.float64), x[~inside].astype(np.float64)
    moments = []
    for part in (one, rest):
        variance = part.var(ddof=1) if len(part) > 1 else np.nan
        moments += [np.array(part.mean()), np.array(variance), np.array(len(part))]
    low, high = welch_interval(*moments)
    return one.mean() - rest.mean(), float(low), float(high)


def stratified_halves(codes: np.ndarray, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Divide the cells of every label evenly: (n_splits, n) of 0 and 1, an odd cell going to either half."""
    halves = np.empty((n_splits, len(codes)), dtype=np.int64)
    size = np.bincount(codes)
    first = np.cumsum(size) - size
    for half in halves:
        order = np.lexsort((rng.random(len(codes)), codes))
        place = np.arange(len(codes)) - first[codes[order]]
        # Drawn for a cell rather than a label: the codes have no say in the halves, only the labels have.
        odd = rng.integers(2, size=len(codes))[order][first[codes[order]]]
        half[order] = (place + odd) % 2
    return halves


def donor_halves(codes: np.ndarray, donors: np.ndarray, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Divide the donors evenly, all cells of a donor in one half: (n_splits, n) of 0 and 1.

    Of 20 random divisions, the first that has most labels in both halves.
    """
    n_donors = int(donors.max()) + 1
    present = np.zeros((codes.max() + 1, n_donors), dtype=bool)
    present[codes, donors] = True
    halves = np.empty((n_splits, len(codes)), dtype=np.int64)
    for half in halves:
        draws = np.stack([rng.permutation(n_donors) % 2 for _ in range(N_DRAWS)])
        in_both = [(present[:, draw == 0].any(axis=1) & present[:, draw == 1].any(axis=1)).sum() for draw in draws]
        half[:] = draws[np.argmax(in_both)][donors]
    return halves


def cross_fit(
    x: Matrix,
    codes: np.ndarray,
    n_labels: int,
    halves: np.ndarray,
    *,
    on_block: Callable[[int], object] | None = None,
) -> CrossFit:
    """Choose on one half of the cells and score on the other, both ways, for several divisions of the cells.

    What is chosen: the direction of a column (AUROC below ½ is turned round) and its threshold of highest F1, for every
    label; and for each label the best column, by AUROC. A threshold is a value of the choosing half; where none finds a cell of the label, nothing is predicted and F1 is 0.

    Parameters
    ----------
    x
        (n, columns): dense or sparse, in memory or read by rows.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    halves
        (splits, n) of 0 and 1.
    on_block
        Is told the number of columns that are done.
    """
    n_splits, h = len(halves), x.shape[1]
    auroc, f1 = np.zeros((h, n_labels)), np.zeros((h, n_labels))
    chosen = np.full((n_splits, 2, n_labels), -1)
    strength = np.full((n_splits, 2, n_labels), -np.inf)
    scores, held_out, held_out_f1 = (np.full((n_splits, 2, n_labels), np.nan) for _ in range(3))
    # A kernel is compiled anew for every memory layout.
    codes, halves = np.ascontiguousarray(codes), np.ascontiguousarray(halves)
    pairs, valid = _pairs(codes, n_labels, halves)
    for columns, block in _sorted_columns(x):
        for split, half in enumerate(halves):
            u, _, crossed, _ = _scan_csc(*block, codes, half, n_labels)
            with np.errstate(divide="ignore", invalid="ignore"):
                found = u / pairs[split]
            turned = np.where(found < 0.5, 1 - found[:, ::-1], found[:, ::-1])
            auroc[columns] += np.where(valid[split], turned.mean(axis=1), 0)
            f1[columns] += np.where(valid[split], crossed.mean(axis=1), 0)
            best = found.argmax(axis=0)[None]
            top, out, out_f1 = (
                np.take_along_axis(values, best, axis=0)[0] for values in (found, found[:, ::-1], crossed)
            )
            better = valid[split] & (top > strength[split])
            news = (top, top, out, out_f1, columns.start + best[0])
            for kept, new in zip((strength, scores, held_out, held_out_f1, chosen), news, strict=True):
                kept[split] = np.where(better, new, kept[split])
        if on_block is not None:
            on_block(columns.stop - columns.start)
    with np.errstate(invalid="ignore"):
        n_valid = valid.sum(axis=0)
        return CrossFit((auroc / n_valid).T, (f1 / n_valid).T, chosen, scores, held_out, held_out_f1)


def trend(a: sparse.csr_matrix, codes: np.ndarray, n_labels: int) -> Trend:
    """Test for a trend of every feature along ordered labels (Terpstra 1952, Jonckheere 1954).

    J = Σ over pairs of labels i < j of U_ij, the number of pairs of cells in which that of j has more, ties counted half;
    z = (J − E) / √V, with n cells, n_i in label i, and groups of t tied cells,

    E = (n² − Σ n_i²) / 4,
    V = [n(n−1)(2n+5) − Σ n_i(n_i−1)(2n_i+5) − Σ t(t−1)(2t+5)] / 72
        + Σ n_i(n_i−1)(n_i−2) Σ t(t−1)(t−2) / (36 n(n−1)(n−2)) + Σ n_i(n_i−1) Σ t(t−1) / (8 n(n−1)).

    p is two-sided, that of Kendall's τ between label and activation. A constant feature has z = 0 and p = 1.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    codes
        (n,) place of each cell's label in the order, 0 ... n_labels − 1.
    """
    n = a.shape[0]
    size = np.bincount(codes, minlength=n_labels).astype(np.float64)
    j = np.zeros(a.shape[1])
    squares, cubes = np.zeros(a.shape[1]), np.zeros(a.shape[1])
    for columns, block in _sorted_columns(a):
        for last in range(1, n_labels):
            # Each label against all before it, with the cells of later labels in the half that is not read.
            u, _, _, ties = _scan_csc(*block, (codes == last).astype(np.int64), (codes > last).astype(np.int64), 2)
            j[columns] += u[:, 0, 1]
        squares[columns], cubes[columns] = ties[:, 0].T
    sums, _ = _label_sums(a, codes, n_labels)
    steps = np.diff(sums / size[:, None], axis=0)
    direction = (steps > 0).all(axis=0).astype(np.int64) - (steps < 0).all(axis=0)
    variance = _trend_variance(n, size, squares, cubes)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(cubes < float(n) ** 3, (j - (n**2 - (size**2).sum()) / 4) / np.sqrt(variance), 0.0)
    # The means of a constant feature differ by rounding.
    return Trend(np.where(cubes < float(n) ** 3, direction, 0), z, 2 * special.ndtr(-np.abs(z)))


def _trend_variance(n: int, size: np.ndarray, squares: np.ndarray, cubes: np.ndarray) -> np.ndarray:
    """V of J, from n, n_i, and Σ t² and Σ t³ of each column."""
    label = [(size * (size - 1) * factor).sum() for factor in (2 * size + 5, size - 2, 1)]
    tied = [2 * cubes + 3 * squares - 5 * n, cubes - 3 * squares + 2 * n, squares - n]
    variance = (n * (n - 1) * (2 * n + 5) - label[0] - tied[0]) / 72 + label[2] * tied[2] / (8 * n * (n - 1))
    return variance + (label[1] * tied[1] / (36 * n * (n - 1) * (n - 2)) if n > 2 else 0)


def _pairs(codes: np.ndarray, n_labels: int, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a cell inside and one outside (splits, 2, labels), and whether both halves have any (splits, labels)."""
    size = np.stack([[np.bincount(codes[half == p], minlength=n_labels) for p in range(2)] for half in halves])
    pairs = (size * (size.sum(axis=2, keepdims=True) - size)).astype(np.float64)
    return pairs, (pairs > 0).all(axis=1)


def _sorted_columns(
    x: Matrix,
) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yield blocks of columns, each from its highest value down: indptr, row and value.

    Zeros of sparse columns are left out, unless there are negative values that they come before.
    """
    if on_disk(x):
        yield from _sorted_columns_from_disk(x)
        return
    n, h = x.shape
    stored = None
    if sparse.issparse(x):
        x = sparse.csc_matrix(x)
        if not x.data.all():
            x = x.copy()
            x.eliminate_zeros()
        stored = x if x.data.min(initial=0) >= 0 else None
    n_values = n * h if stored is None else stored.nnz
    for columns in row_blocks(h, max(1, BLOCK_VALUES * h // max(n_values, 1))):
        if stored is not None:
            indptr = stored.indptr[columns.start : columns.stop + 1].astype(np.int64)
            rows = stored.indices[indptr[0] : indptr[-1]].astype(np.int64)
            values = stored.data[indptr[0] : indptr[-1]].astype(np.float64)
        else:
            indptr = np.arange(columns.start, columns.stop + 1) * n
            rows = np.tile(np.arange(n), columns.stop - columns.start)
            values = x[:, columns].toarray() if sparse.issparse(x) else x[:, columns]
            values = np.asarray(values, dtype=np.float64).T.ravel()
        order = np.lexsort((-values, np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))))
        yield columns, (indptr - indptr[0], rows[order], values[order])


def _sorted_columns_from_disk(
    x: Matrix,
) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    workers = Workers(available_threads())
    try:
        for part in GeneColumns(x).blocks(workers):
            held = sparse.csc_matrix((part.values, part.cells, part.starts), shape=(x.shape[0], len(part)))
            for columns, block in _sorted_columns(held):
                yield slice(part.first + columns.start, part.first + columns.stop), block
    finally:
        workers.close()


@_compiled
def _scan_csc(
    indptr: np.ndarray, rows: np.ndarray, values: np.ndarray, codes: np.ndarray, half: np.ndarray, n_labels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Go down the sorted values of every column, the two halves of the cells side by side.

    Returns
    -------
    Mann-Whitney U of every label, best F1, F1 in the other half at the threshold of the best (all (columns, 2, labels)),
    and Σ t² and Σ t³ over groups of t tied cells (columns, 2, 2).
    """
    h = len(indptr) - 1
    u = np.zeros((h, 2, n_labels))
    best, crossed = np.zeros((h, 2, n_labels)), np.zeros((h, 2, n_labels))
    ties = np.zeros((h, 2, 2))
    size = np.zeros((2, n_labels))
    for cell in range(len(codes)):
        size[half[cell], codes[cell]] += 1
    n = np.array([size[0].sum(), size[1].sum()])
    hits = np.zeros((2, n_labels))
    above, below = np.zeros(2), np.zeros(2)
    for j in range(h):
        hits[:] = 0
        above[:] = 0
        start = indptr[j]
        while start < indptr[j + 1]:
            stop = start
            below[:] = above
            while stop < indptr[j + 1] and values[stop] == values[start]:
                p, label = half[rows[stop]], codes[rows[stop]]
                below[p] += 1
                hits[p, label] += 1
                stop += 1
            for i in range(start, stop):
                # Only a threshold that reaches another cell of the label can raise its F1.
                p, label = half[rows[i]], codes[rows[i]]
                u[j, p, label] += n[p] - (above[p] + below[p]) / 2
                f1 = 2 * hits[p, label] / (below[p] + size[p, label])
                if f1 > best[j, p, label]:
                    best[j, p, label] = f1
                    crossed[j, p, label] = 2 * hits[1 - p, label] / max(below[1 - p] + size[1 - p, label], 1)
            for p in range(2):
                ties[j, p, 0] += (below[p] - above[p]) ** 2
                ties[j, p, 1] += (below[p] - above[p]) ** 3
            above[:] = below
            start = stop
        for p in range(2):
            zeros = n[p] - above[p]
            ties[j, p, 0] += zeros**2
            ties[j, p, 1] += zeros**3
            for label in range(n_labels):
                u[j, p, label] += (size[p, label] - hits[p, label]) * zeros / 2
                # So far a cell was also compared with those of its own label.
                u[j, p, label] -= size[p, label] ** 2 / 2
    return u, best, crossed, ties


def _label_sums(a: sparse.csr_matrix, codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Σx and Σx² (labels, columns)."""
    n = a.shape[0]
    indicator = sparse.csr_matrix((np.ones(n), (codes, np.arange(n))), shape=(n_labels, n))
    values = a.astype(np.float64)
    return (indicator @ values).toarray(), (indicator @ values.multiply(values)).toarray()


def _mean_variance(sums: np.ndarray, squares: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance from Σx and Σx²; NaN where there are too few values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / n
        variance = np.where(n > 1, np.maximum(squares - n * mean**2, 0) / (n - 1), np.nan)
    return mean, variance
