"""How well columns tell labels apart, from the non-zero values alone: scores on all cells, and on cells that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import float64, njit
from scipy import sparse, special

from .label_scan import Scan, groups_of, scan_trend, scanned, sizes_of, sorted_columns
from .moments import chunks
from .rows import Matrix, dense_rows
from .statistics import welch_interval

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
    n_active: np.ndarray
    """(features,) cells in which each is not zero."""


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


def score_labels(a: Matrix, codes: np.ndarray, n_labels: int) -> LabelScores:
    """Score every feature against every label.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0, sparse or dense, in memory or read by rows.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    """
    groups = groups_of(codes, n_labels, np.zeros((1, len(codes)), np.int8))
    return _scores(a, codes, n_labels, [scans[0] for _, scans in scanned(a, groups, n_labels)])


def score_and_cross_fit(
    a: Matrix,
    codes: np.ndarray,
    n_labels: int,
    halves: np.ndarray,
    *,
    on_block: Callable[[int], object] | None = None,
) -> tuple[LabelScores, CrossFit]:
    """Return :func:`score_labels` and :func:`cross_fit` of activations, which are sorted once for both."""
    everyone = np.zeros((1, len(codes)), np.int8)
    groups = groups_of(codes, n_labels, np.concatenate([everyone, halves], dtype=np.int8))
    whole, fitting = [], _CrossFitting(sizes_of(groups[1:], n_labels), a.shape[1])
    for columns, scans in scanned(a, groups, n_labels):
        whole.append(scans[0])
        fitting.add(columns, scans[1:])
        if on_block is not None:
            on_block(columns.stop - columns.start)
    return _scores(a, codes, n_labels, whole), fitting.finished()


def _scores(a: Matrix, codes: np.ndarray, n_labels: int, scans: list[Scan]) -> LabelScores:
    """Make the scores of all cells of what the columns were found to be, block by block."""
    n = int(a.shape[0])
    u, f1 = (np.concatenate([scan[i][:, 0] for scan in scans]).T for i in range(2))
    cubes = np.concatenate([scan[3][:, 0, 1] for scan in scans])
    n_in = np.bincount(codes, minlength=n_labels).astype(np.float64)[:, None]
    n_out = n - n_in
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = u / (n_in * n_out)
        sd = np.sqrt(n_in * n_out / 12 * (n + 1 - (cubes - n) / (n * (n - 1))))
        z = (np.abs(u - n_in * n_out / 2) - 0.5) / sd
    pval = np.where(sd > 0, np.minimum(2 * special.ndtr(-z), 1), 1.0)

    sums, squares, n_active = _label_sums(a, codes, n_labels)
    mean_in, var_in = _mean_variance(sums, squares, n_in)
    mean_out, var_out = _mean_variance(sums.sum(axis=0) - sums, squares.sum(axis=0) - squares, n_out)
    low, high = welch_interval(mean_in, var_in, n_in, mean_out, var_out, n_out)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(var_in / n_in) + np.sqrt(var_out / n_out)
    return LabelScores(auroc, f1, mean_in - mean_out, low, high, pval, error, n_active)


def differences(
    x: Matrix, columns: np.ndarray, codes: np.ndarray, *, signs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the cells of each label with the others in a column of its own.

    Parameters
    ----------
    x
        (n, columns), sparse or dense, in memory or read by rows.
    columns
        (labels,) the column of each label.
    codes
        (n,) label of each cell.
    signs
        (labels,) 1 or −1, what the column is multiplied with.

    Returns
    -------
    Mean inside minus outside, and its 95 % confidence interval by Welch's t; each (labels,).
    """
    shift, moments = None, np.zeros((len(columns), 2, 2))
    for rows, part in chunks(x):
        values = dense_rows(part[:, columns], slice(None)).astype(np.float64) * signs
        # Of one and the same cell, however the cells are read: rounding depends on it.
        shift = values[0].copy() if shift is None else shift
        _add_inside(values - shift, codes[rows], moments)
    n_in = np.bincount(codes, minlength=len(columns)).astype(np.float64)
    n = np.stack([n_in, len(codes) - n_in])
    mean, variance = _mean_variance(moments[:, :, 0].T, moments[:, :, 1].T, n)
    low, high = welch_interval(mean[0], variance[0], n[0], mean[1], variance[1], n[1])
    return mean[0] - mean[1], low, high


def stratified_halves(codes: np.ndarray, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Divide the cells of every label evenly: (n_splits, n) of 0 and 1, an odd cell going to either half."""
    halves = np.empty((n_splits, len(codes)), dtype=np.int8)
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
    halves = np.empty((n_splits, len(codes)), dtype=np.int8)
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
    both_signs: bool = False,
    on_block: Callable[[int], object] | None = None,
) -> CrossFit:
    """Choose on one half of the cells and score on the other, both ways, for several divisions of the cells.

    What is chosen: the direction of a column (AUROC below ½ is turned round) and its threshold of highest F1, for every
    label; and for each label the best column, by AUROC. A threshold is a value of the choosing half, above zero unless the column has
    negative values; where none finds a cell of the label, nothing is predicted and F1 is 0.

    Parameters
    ----------
    x
        (n, columns): dense or sparse, in memory or read by rows.
    codes
        (n,) label of each cell, 0 ... n_labels − 1.
    halves
        (splits, n) of 0 and 1.
    both_signs
        The columns of −x follow those of x.
    on_block
        Is told the number of columns that are done.
    """
    groups = groups_of(codes, n_labels, halves)
    fitting = _CrossFitting(sizes_of(groups, n_labels), x.shape[1] * (2 if both_signs else 1))
    for columns, scans in scanned(x, groups, n_labels, both_signs=both_signs):
        fitting.add(columns, scans)
        if on_block is not None:
            on_block(columns.stop - columns.start)
    return fitting.finished()


class _CrossFitting:
    """What has been chosen so far, and its scores on the other halves.

    Parameters
    ----------
    size
        (splits, 2, labels) cells.
    h
        Columns.
    """

    def __init__(self, size: np.ndarray, h: int):
        n_splits, _, n_labels = size.shape
        self._pairs = size * (size.sum(axis=2, keepdims=True) - size)
        """Of a cell inside and one outside (splits, 2, labels)."""
        self._valid = (self._pairs > 0).all(axis=1)
        """Whether both halves have any (splits, labels)."""
        self._auroc, self._f1 = np.zeros((h, n_labels)), np.zeros((h, n_labels))
        self._chosen = np.full((n_splits, 2, n_labels), -1)
        self._strength = np.full((n_splits, 2, n_labels), -np.inf)
        self._scores, self._held_out, self._held_out_f1 = (np.full((n_splits, 2, n_labels), np.nan) for _ in range(3))

    def add(self, columns: slice, scans: Sequence[Scan]) -> None:
        """Take in what was found of some columns in each division."""
        kept = (self._strength, self._scores, self._held_out, self._held_out_f1, self._chosen)
        for split, (u, _, crossed, _) in enumerate(scans):
            with np.errstate(divide="ignore", invalid="ignore"):
                found = u / self._pairs[split]
            turned = np.where(found < 0.5, 1 - found[:, ::-1], found[:, ::-1])
            self._auroc[columns] += np.where(self._valid[split], turned.mean(axis=1), 0)
            self._f1[columns] += np.where(self._valid[split], crossed.mean(axis=1), 0)
            best = found.argmax(axis=0)[None]
            top, out, out_f1 = (
                np.take_along_axis(values, best, axis=0)[0] for values in (found, found[:, ::-1], crossed)
            )
            place = columns.start + best[0]
            # Of equal ones the first, in whatever order the columns come.
            tied = (top == self._strength[split]) & (place < self._chosen[split])
            better = self._valid[split] & ((top > self._strength[split]) | tied)
            for values, new in zip(kept, (top, top, out, out_f1, place), strict=True):
                values[split] = np.where(better, new, values[split])

    def finished(self) -> CrossFit:
        """Return the means over halves and divisions, and the choices."""
        with np.errstate(invalid="ignore"):
            n_valid = self._valid.sum(axis=0)
            auroc, f1 = (self._auroc / n_valid).T, (self._f1 / n_valid).T
        return CrossFit(auroc, f1, self._chosen, self._scores, self._held_out, self._held_out_f1)


def trend(a: Matrix, codes: np.ndarray, n_labels: int) -> Trend:
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
        Activations (n, h) ≥ 0, sparse or dense, in memory or read by rows.
    codes
        (n,) place of each cell's label in the order, 0 ... n_labels − 1.
    """
    n = int(a.shape[0])
    size = np.bincount(codes, minlength=n_labels).astype(np.float64)
    j, (squares, cubes) = np.zeros(a.shape[1]), np.zeros((2, a.shape[1]))
    of_cells = codes.astype(np.uint16)
    for columns, block in sorted_columns(a):
        scan_trend(
            block.starts, block.cells, block.values, of_cells, size, j[columns], squares[columns], cubes[columns]
        )
        del block
    sums, _, _ = _label_sums(a, codes, n_labels)
    steps = np.diff(sums / size[:, None], axis=0)
    direction = (steps > 0).all(axis=0).astype(np.int64) - (steps < 0).all(axis=0)
    variance = _trend_variance(n, size, squares, cubes)
    # Squares of millions of cells are exact in float64, cubes are not.
    varies = squares < float(n) * n
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(varies, (j - (float(n) * n - (size**2).sum()) / 4) / np.sqrt(variance), 0.0)
    # The means of a constant feature differ by rounding.
    return Trend(np.where(varies, direction, 0), z, 2 * special.ndtr(-np.abs(z)))


def _trend_variance(n: int, size: np.ndarray, squares: np.ndarray, cubes: np.ndarray) -> np.ndarray:
    """V of J, from n, n_i, and Σ t² and Σ t³ of each column."""
    label = [(size * (size - 1) * factor).sum() for factor in (2 * size + 5, size - 2, 1)]
    tied = [2 * cubes + 3 * squares - 5 * n, cubes - 3 * squares + 2 * n, squares - n]
    variance = (n * (n - 1) * (2 * n + 5) - label[0] - tied[0]) / 72 + label[2] * tied[2] / (8 * n * (n - 1))
    return variance + (label[1] * tied[1] / (36 * n * (n - 1) * (n - 2)) if n > 2 else 0)


def _label_sums(a: Matrix, codes: np.ndarray, n_labels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σx and Σx² (labels, columns), added cell by cell, and the number of cells that are not zero (columns,)."""
    sums, squares = np.zeros((2, n_labels, a.shape[1]))
    n_active = np.zeros(a.shape[1], np.int64)
    for rows, part in chunks(a):
        some = sparse.csr_matrix(part)
        _add_rows(some.indptr, some.indices, some.data, codes[rows], sums, squares, n_active)
    return sums, squares, n_active


@_compiled
def _add_rows(indptr, indices, data, codes, sums, squares, n_active):
    for row in range(len(indptr) - 1):
        for e in range(indptr[row], indptr[row + 1]):
            value = float64(data[e])
            sums[codes[row], indices[e]] += value
            squares[codes[row], indices[e]] += value * value
            n_active[indices[e]] += value != 0


@_compiled
def _add_inside(values, codes, moments):
    """Add Σx and Σx² of the label of each column (labels, 2: inside and outside, 2)."""
    for row in range(values.shape[0]):
        for label in range(values.shape[1]):
            side = 0 if codes[row] == label else 1
            moments[label, side, 0] += values[row, label]
            moments[label, side, 1] += values[row, label] ** 2


def _mean_variance(sums: np.ndarray, squares: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance from Σx and Σx²; NaN where there are too few values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / n
        variance = np.where(n > 1, np.maximum(squares - n * mean**2, 0) / (n - 1), np.nan)
    return mean, variance
