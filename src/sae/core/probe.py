"""What a representation knows linearly of variables: linear and logistic regression, scored on cells held out from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .moments import chunks, scan
from .rows import Matrix, dense_rows, row_blocks, select_rows, take_rows, varying_columns

RIDGES = 10.0 ** np.arange(-10, 4)
"""Penalties to choose from, as shares of the mean square of a column."""
RESOLVED = 1e-10
"""Directions with less than this share of the variance of the largest are lost in the rounding of normal equations."""
EXACT = 1e-14
"""An error below this share of the variance is rounding."""
FEWEST_FREE = 0.25
"""Penalties that leave a smaller share of the training cells free are left out: with few left to judge by, noise passes."""
SURE = 1e-6
"""Unless the error is below this share of the variance, which noise does not reach."""
MAX_COLUMNS = 10_000
LOGISTIC_VALUES = 20_000_000
"""Cells × columns that train a logistic regression at most (160 MB); of more cells, some are drawn."""
STEPS = 200
BLOCK_COLUMNS = 512


@dataclass(frozen=True)
class Scores:
    """Of t variables on held-out cells; NaN where there is nothing to predict."""

    score: np.ndarray
    """(t,)"""
    error: np.ndarray
    """(t,) standard error over the held-out cells, the models as they are."""


def random_folds(n: int, n_folds: int, rng: np.random.Generator, donors: np.ndarray | None = None) -> np.ndarray:
    """Divide n cells into folds (n,) of the same size, or donors (n,) with all of their cells."""
    if not isinstance(n_folds, int | np.integer):
        raise TypeError(f"n_folds={n_folds!r} is a {type(n_folds).__name__}; expected an integer.")
    if n_folds < 2:
        raise ValueError(f"n_folds={n_folds} is below 2: no cells would be held out.")
    if donors is not None:
        n_donors = int(donors.max(initial=-1)) + 1
        if n_donors < n_folds:
            raise ValueError(f"{n_donors} donors cannot be divided into n_folds={n_folds}. Pass fewer folds.")
        return (rng.permutation(n_donors) % n_folds)[donors]
    if n < 2 * n_folds:
        raise ValueError(f"{n} cells are too few for n_folds={n_folds}: there must be two in each. Pass fewer folds.")
    return rng.permutation(n) % n_folds


@dataclass(frozen=True)
class Standardised:
    """Columns with mean 0 and standard deviation 1, made as they are read; constant ones are 0.

    Sparse ones are only scaled: their mean is left to the intercept.
    """

    x: Matrix
    mean: np.ndarray
    factor: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and columns."""
        return self.x.shape

    def __iter__(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield chunks of rows, dense or CSR, in float64."""
        for rows, part in chunks(self.x):
            yield rows, self.of(part)

    def rows(self, rows: np.ndarray) -> Matrix:
        """Return some rows."""
        return self.of(take_rows(select_rows(self.x, rows), slice(None)))

    def of(self, part: Matrix) -> Matrix:
        """Standardise some rows."""
        if sparse.issparse(part):
            return sparse.csr_matrix(part.astype(np.float64) @ sparse.diags(self.factor))
        return (part - self.mean) * self.factor


def standardised(x: Matrix) -> Standardised:
    """Prepare a representation (n, d) for regression; one with more columns than cells is rotated into as many as cells.

    The rotation (left singular vectors times singular values) keeps all distances, so that every ridge or logistic
    regression is the same, and knows no variable.
    """
    n, d = x.shape
    if min(n, d) > MAX_COLUMNS:
        raise ValueError(
            f"Normal equations of {d} columns are too large; up to {MAX_COLUMNS} are solved. Reduce them with sc.pp.pca, or "
            "choose some."
        )
    columns = scan(x)
    squares = np.zeros(d)
    for _, part in chunks(x):
        if sparse.issparse(part):
            squares += np.bincount(part.indices, (part.data - columns.mean[part.indices]) ** 2, minlength=d)
            squares += (part.shape[0] - part.getnnz(axis=0)) * columns.mean**2
        else:
            squares += ((part - columns.mean) ** 2).sum(axis=0)
    factor = np.zeros(d)
    factor[columns.varies] = np.sqrt(n / squares[columns.varies])
    whole = Standardised(x, columns.mean, factor)
    if d <= n:
        return whole
    return Standardised(_rotated(whole), np.zeros(n), np.ones(n))


def _rotated(whole: Standardised) -> np.ndarray:
    x = dense_rows(whole.x, slice(0, whole.shape[0]))
    products = np.zeros((len(x), len(x)))
    for some in row_blocks(x.shape[1], BLOCK_COLUMNS):
        part = (x[:, some].astype(np.float64) - whole.mean[some]) * whole.factor[some]
        products += part @ part.T
    values, vectors = np.linalg.eigh(products)
    return vectors * np.sqrt(np.maximum(values, 0))


# ---- Numbers: linear regression


def linear_r2(
    x: Standardised, y: np.ndarray, folds: np.ndarray, *, on_step: Callable[[int], object] | None = None
) -> Scores:
    r"""Held-out R² of each variable by ridge regression on all columns.

    With ŷ of a cell from the other folds' cells, R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)² over all cells. The penalty λ of each
    variable is the one of `RIDGES` with the lowest generalised cross-validation error on the training cells (Golub, Heath
    and Wahba 1979), (RSS / n) / (1 − df / n)²: so small that it changes nothing where the variable is a linear function of
    the columns, and large where cells are too few. Near df = n that error is 0 / 0, and its lowest value often the worst
    model: the choice is among penalties with df ≤ 3/4 n and those that leave next to no error. The standard error is that of
    a ratio of means.

    Parameters
    ----------
    y
        (n, t)
    folds
        (n,) 0, 1, ...
    on_step
        Is told the number of cells that were read.
    """
    y, varies = np.asarray(y, dtype=np.float64), varying_columns(y)
    y = y - y.mean(axis=0)
    models = [_ridge(*sums) for sums in _training_sums(x, y, folds, on_step)]
    e2, e4, es, s4 = np.zeros((4, y.shape[1]))
    for rows, part in x:
        fold, error = folds[rows], y[rows].copy()
        for number in np.unique(fold):
            weights, intercept = models[number]
            error[fold == number] -= part[fold == number] @ weights + intercept
        error, s = error**2, y[rows] ** 2
        e2 += error.sum(axis=0)
        e4 += (error**2).sum(axis=0)
        es += (error * s).sum(axis=0)
        s4 += (s**2).sum(axis=0)
        if on_step is not None:
            on_step(len(fold))
    s2 = (y**2).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(varies, e2 / s2, np.nan)
        error = np.sqrt(np.maximum(e4 - 2 * share * es + share**2 * s4, 0)) / s2
    return Scores(1 - share, np.where(varies, error, np.nan))


def _training_sums(
    x: Standardised, y: np.ndarray, folds: np.ndarray, on_step: Callable[[int], object] | None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Add up each fold, and yield for each the sums over all others: n, Σx, Σy, Σxxᵀ, Σxyᵀ and Σy²."""
    d, t, k = x.shape[1], y.shape[1], int(folds.max()) + 1
    sums = [np.zeros((k, *shape)) for shape in ((), (d,), (t,), (d, d), (d, t), (t,))]
    for rows, part in x:
        for fold in np.unique(folds[rows]):
            inside = folds[rows] == fold
            one, target = part[inside], y[rows][inside]
            square = one.T @ one
            square = square.toarray() if sparse.issparse(square) else square
            new = len(target), np.asarray(one.sum(axis=0)).ravel(), target.sum(axis=0)
            for total, added in zip(sums, (*new, square, one.T @ target, (target**2).sum(axis=0)), strict=True):
                total[fold] += added
        if on_step is not None:
            on_step(rows.stop - rows.start)
    totals = [total.sum(axis=0) for total in sums]
    for fold in range(k):
        yield tuple(total - own[fold] for total, own in zip(totals, sums, strict=True))


def _ridge(
    n: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, xy: np.ndarray, yy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (d, t) and intercepts (t,) from sums over the training cells."""
    x, y = x / n, y / n
    variance = np.maximum(yy / n - y**2, 0)
    values, vectors = np.linalg.eigh(xx / n - np.outer(x, x))
    kept = values > RESOLVED * values[-1]
    values, vectors = values[kept, None], vectors[:, kept]
    on_vectors = vectors.T @ (xy / n - np.outer(x, y))
    found = []
    for ridge in RIDGES:
        shrunk = 1 / (values + ridge)
        explained = (on_vectors**2 * shrunk * (2 - values * shrunk)).sum(axis=0)
        free = 1 - ((values * shrunk).sum() + 1) / n
        error = np.maximum(variance - explained, EXACT * variance) / max(free, EXACT) ** 2
        chosen = (free >= FEWEST_FREE) | (error <= SURE * variance) | (ridge == RIDGES[-1])
        found.append(np.where(chosen, error, np.inf))
    weights = vectors @ (on_vectors / (values + RIDGES[np.argmin(found, axis=0)]))
    return weights, y - x @ weights


# ---- Labels: logistic regression


def logistic_auroc(
    x: Standardised,
    labels: np.ndarray,
    folds: np.ndarray,
    rng: np.random.Generator,
    *,
    on_step: Callable[[int], object] | None = None,
) -> Scores:
    """Held-out AUROC of each label by logistic regression, one against all other cells.

    A cell of the label is compared with the other cells of its fold, by a model of the other folds: AUROC is the mean share
    that it is above, ties counted half. The standard error is DeLong's (1988). NaN for a label with fewer than two cells
    inside or outside of it that can be compared.

    Parameters
    ----------
    labels
        (n, t), bool.
    folds
        (n,) 0, 1, ...
    on_step
        Is told the number of folds that are done.
    """
    t = labels.shape[1]
    above: list[list[np.ndarray]] = [[] for _ in range(t)]
    below: list[list[np.ndarray]] = [[] for _ in range(t)]
    directions = None if sparse.issparse(x.x) else _directions(x)
    most = max(1, LOGISTIC_VALUES // max(x.shape[1], 1))
    for fold in range(int(folds.max()) + 1):
        train, out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(train) > most:
            train = np.sort(rng.choice(train, most, replace=False))
        known = labels[train].any(axis=0) & ~labels[train].all(axis=0)
        part = x.rows(train)
        weights, intercept = logistic(part if directions is None else part @ directions, labels[train])
        scores = x.rows(out) @ (weights if directions is None else directions @ weights) + intercept
        for label in np.flatnonzero(known):
            one, other = _placements(scores[:, label], labels[out, label])
            above[label].append(one)
            below[label].append(other)
        if on_step is not None:
            on_step(1)
    found = [
        _auroc(np.concatenate([[], *one]), np.concatenate([[], *other]))
        for one, other in zip(above, below, strict=True)
    ]
    return Scores(*np.array(found).reshape(t, 2).T)


def _directions(x: Standardised) -> np.ndarray:
    """Return the principal directions (d, r) of the columns, without those that have no variance.

    Along them a regression is the same, but takes few steps.
    """
    products = np.zeros((x.shape[1], x.shape[1]))
    for _, part in chunks(x.x):
        z = x.of(part.toarray() if sparse.issparse(part) else part)
        products += z.T @ z
    values, vectors = np.linalg.eigh(products)
    return vectors[:, values > RESOLVED * values[-1]]


def logistic(x: Matrix, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit each column of y (n, t) on x (n, d): Σ log(1 + exp(z)) − y z + |w|² / 2 is least, with z = x w + b.

    All at once, by L-BFGS on their sum. The penalty is that of scikit-learn at C = 1.
    """
    from scipy.optimize import minimize

    (n, d), t = x.shape, y.shape[1]
    y = y.astype(np.float64)
    share = np.clip(y.mean(axis=0), 0.5 / n, 1 - 0.5 / n)
    squares = np.asarray(x.multiply(x).sum(axis=0)).ravel() if sparse.issparse(x) else (x**2).sum(axis=0)
    curvature = share * (1 - share)
    # In these units the curvature at the start is 1, and a gradient of .001 a thousandth of a standard error.
    of_w, of_b = 1 / np.sqrt(1 + squares[:, None] * curvature), 1 / np.sqrt(n * curvature)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: d * t].reshape(d, t) * of_w, flat[d * t :] * of_b
        z = x @ w + b
        residual = 0.5 * (1 + np.tanh(z / 2)) - y
        value = (np.logaddexp(0, z) - y * z).sum() + 0.5 * (w**2).sum()
        return value, np.concatenate([((x.T @ residual + w) * of_w).ravel(), residual.sum(axis=0) * of_b])

    start = np.concatenate([np.zeros(d * t), np.log(share / (1 - share)) / of_b])
    options = {"maxiter": STEPS, "ftol": 1e-10, "gtol": 1e-3}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x
    return found[: d * t].reshape(d, t) * of_w, found[d * t :] * of_b


def _placements(score: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each cell inside the share of those outside that it is above, and for each outside the share it is below."""
    from scipy.stats import rankdata

    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if n_in == 0 or n_out == 0:
        return np.empty(0), np.empty(0)
    ranks = rankdata(score)
    one = (ranks[inside] - rankdata(score[inside])) / n_out
    other = 1 - (ranks[~inside] - rankdata(score[~inside])) / n_in
    return one, other


def _auroc(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    if min(len(above), len(below)) < 2:
        return np.nan, np.nan
    return above.mean(), np.sqrt(above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below))
