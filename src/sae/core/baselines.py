"""What features are compared with: other decompositions, directions drawn at random, and columns chosen with the labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from .rows import Matrix

MOST_COMPONENTS = 100
N_FACTORS = 50
FACTORED_GENES = 2_000
"""Genes that NMF is given: those of the highest variance."""
ICA_STEPS, NMF_STEPS = 1_000, 300
SCREENED = 500
"""Columns that L1 logistic regression is given: those most correlated with the label on the choosing half."""
RELATIVE_PENALTY = 0.1
"""Of the smallest penalty that leaves no column."""


def both_signs(x: np.ndarray) -> np.ndarray:
    """Return each column and its negative (n, 2 columns): the sign of a component means nothing."""
    return np.hstack([x, -x])


def independent_components(seen: np.ndarray, x: np.ndarray, seed: int) -> tuple[np.ndarray, str]:
    """Values of `x` (n, up to 100) on the independent components of the cells `seen`, and a remark if they did not converge.

    By FastICA (Hyvärinen 1999).
    """
    from sklearn.decomposition import FastICA

    # In float32 it takes steps of rounding error for convergence.
    seen, x = seen.astype(np.float64), x.astype(np.float64)
    rank = int(np.linalg.matrix_rank(seen - seen.mean(axis=0)))
    n = min(rank, MOST_COMPONENTS)
    model = FastICA(n, whiten="unit-variance", whiten_solver="svd", max_iter=ICA_STEPS, random_state=seed)
    return _fitted(model, seen, x)


def nonnegative_factors(seen: Matrix, x: Matrix, n: int, seed: int) -> tuple[np.ndarray, str]:
    """Activations of `x` (cells, n) by nonnegative matrix factorisation (Lee and Seung 1999) of the cells `seen`, and a remark as above.

    Of the 2,000 genes of the highest variance.

    Parameters
    ----------
    seen, x
        Expression (cells, genes) ≥ 0, dense or CSR. Some gene varies among the cells seen.
    """
    from sklearn.decomposition import NMF

    variance = Standardised.of(seen).sd ** 2
    variance[np.isinf(variance)] = 0
    kept = np.sort(np.argsort(-variance, kind="stable")[:FACTORED_GENES])
    kept = kept[variance[kept] > 0]
    n = min(n, len(kept), seen.shape[0])
    model = NMF(n, init="nndsvda", tol=1e-3, max_iter=NMF_STEPS, random_state=seed)
    return _fitted(model, *(part[:, kept].astype(np.float32) for part in (seen, x)))


def _fitted(model: Any, seen: Matrix, x: Matrix) -> tuple[np.ndarray, str]:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        columns = model.fit(seen).transform(x)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return columns, f"{type(model).__name__} had not converged after {model.n_iter_} steps" if stopped else ""


def rectified(projected: np.ndarray, n_active: np.ndarray) -> np.ndarray:
    """Subtract a threshold from each column, and set to 0 what is below: its `n_active` (columns,) highest values stay above 0."""
    n = len(projected)
    ordered = -np.sort(-projected, axis=0)
    # Between the last value that stays and the next one; for all of them, below the last.
    places = np.minimum(np.stack([np.maximum(n_active - 1, 0), n_active]), n - 1)
    last, following = np.take_along_axis(ordered, places, axis=0)
    threshold = np.where(n_active < n, (last + following) / 2, last - 1e-3 * np.ptp(ordered, axis=0))
    return np.where(n_active > 0, np.maximum(projected - threshold, 0), 0)


@dataclass(frozen=True)
class Supervised:
    """What L1 logistic regression of each label makes of cells in the half that it was not fitted on."""

    classifier: np.ndarray
    """(splits, labels, n), its logit; NaN where a label is not in both halves."""
    column: np.ndarray
    """(splits, labels, n), the column with the largest coefficient alone, with the sign of that."""
    n_columns: np.ndarray
    """(splits, 2, labels), columns with a coefficient that is not 0; NaN as above."""


def supervised(
    x: Matrix,
    codes: np.ndarray,
    n_labels: int,
    halves: np.ndarray,
    seed: int,
    *,
    on_fit: Callable[[], object] | None = None,
) -> Supervised:
    """Fit an L1-penalised logistic regression of each label against the others on each half.

    Columns are standardised on the half that is fitted, and those 500 kept that correlate most with the label there (Fan and Lv
    2008). The penalty is a tenth of the smallest one that leaves no column.

    Parameters
    ----------
    x
        (n, columns), dense or CSR.
    codes
        (n,) labels, 0, 1, ...
    halves
        (splits, n) of 0 and 1.
    """
    shape = len(halves), n_labels, x.shape[0]
    classifier, column = np.full(shape, np.nan), np.full(shape, np.nan)
    n_columns = np.full((len(halves), 2, n_labels), np.nan)
    valid = in_both_halves(codes, n_labels, halves)
    for split, half in enumerate(halves):
        for p in range(2):
            fitted, scored = np.flatnonzero(half == p), np.flatnonzero(half != p)
            on, off = (x[rows].tocsc() if sparse.issparse(x) else x[rows] for rows in (fitted, scored))
            standard = Standardised.of(on)
            for label in np.flatnonzero(valid[split]):
                inside = codes[fitted] == label
                few = standard.most_correlated(on, inside, SCREENED)
                weights, intercept = _lasso(standard.transform(on, few), inside, seed)
                on_scored = standard.transform(off, few)
                strongest = np.abs(weights).argmax()
                classifier[split, label, scored] = on_scored @ weights + intercept
                column[split, label, scored] = on_scored[:, strongest] * np.sign(weights[strongest])
                n_columns[split, p, label] = np.count_nonzero(weights)
            if on_fit is not None:
                on_fit()
    return Supervised(classifier, column, n_columns)


def in_both_halves(codes: np.ndarray, n_labels: int, halves: np.ndarray) -> np.ndarray:
    """Tell whether both halves have cells of the label and others (splits, labels)."""
    size = np.stack([[np.bincount(codes[half == p], minlength=n_labels) for p in range(2)] for half in halves])
    return ((size > 0) & (size < size.sum(axis=2, keepdims=True))).all(axis=1)


@dataclass(frozen=True)
class Standardised:
    """Mean and standard deviation of columns, which a constant column has none of: it becomes 0."""

    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def of(cls, x: Matrix) -> Standardised:
        """Measure the columns of `x` (n, columns)."""
        if sparse.issparse(x):
            from sklearn.utils.sparsefuncs import mean_variance_axis

            mean, variance = mean_variance_axis(x.astype(np.float64), 0)
        else:
            mean, variance = x.mean(axis=0, dtype=np.float64), x.var(axis=0, dtype=np.float64)
        sd = np.sqrt(variance)
        return cls(mean, np.where(sd > 1e-6 * np.abs(mean), sd, np.inf))

    def transform(self, x: Matrix, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Standardise some columns of `x` (n, all columns)."""
        part = x[:, columns]
        return ((part.toarray() if sparse.issparse(part) else part) - self.mean[columns]) / self.sd[columns]

    def most_correlated(self, x: Matrix, inside: np.ndarray, n: int) -> np.ndarray:
        """Find the columns with the highest correlation, of either sign, with `inside` (n,)."""
        difference = np.asarray(inside.astype(np.float64) @ x) / inside.sum() - self.mean
        return np.sort(np.argsort(-np.abs(difference / self.sd), kind="stable")[:n])


def _lasso(x: np.ndarray, inside: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    # scikit-learn 1.8 renamed it.
    l1: dict[str, Any] = {"l1_ratio": 1.0} if LogisticRegression().penalty == "deprecated" else {"penalty": "l1"}
    # Without any column, the intercept alone predicts the share of the label.
    highest = np.abs((inside - inside.mean()) @ x).max()
    # This solver would shrink the intercept as well.
    l1 |= {"C": 1 / max(RELATIVE_PENALTY * highest, 1e-12), "solver": "liblinear", "intercept_scaling": 100.0}
    model = LogisticRegression(max_iter=1_000, random_state=seed, **l1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, inside)
    return model.coef_[0], float(model.intercept_[0])
