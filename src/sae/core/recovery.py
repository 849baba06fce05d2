"""How much of a known truth the features hold: correlations of variables with features, best and one to one, and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from .rows import Matrix, as_csr, pieces, varying_columns

BLOCK_VALUES = 8_000_000
"""Cells × features of a block; dense ones are held in float64 (64 MB)."""

COLLINEAR = 1e-8
"""Combinations of features with less than this share of the largest variance take no part in a regression."""


@dataclass(frozen=True)
class Recovery:
    """How well each of p variables is found among h features."""

    best: np.ndarray
    """(p,), highest |r| over all features."""
    feature: np.ndarray
    """(p,), number of the feature that has it."""
    r: np.ndarray
    """(p,), its r, with the sign."""
    highest: np.ndarray
    """(p,), highest r over all features, with the sign."""
    matched: np.ndarray
    """(p,), |r| with the variable's own feature, of the one-to-one matching with the highest sum; 0 without one."""
    partner: np.ndarray
    """(p,), number of that feature; −1 without one."""
    n_above: np.ndarray
    """(thresholds, p), number of features with |r| above each threshold."""


@dataclass(frozen=True)
class GraphRecovery:
    """How well the edges of p variables are found among g genes; all arrays (p,), NaN where a variable has none."""

    precision: np.ndarray
    """Share of the edges found that are true; 0 where none is found."""
    recall: np.ndarray
    """Share of the true edges that are found."""
    f1: np.ndarray
    average_precision: np.ndarray
    """Of the order of the genes, whatever the number of edges; by chance about `density`."""
    density: np.ndarray
    """Share of the genes that are true edges."""


def recovery(truth: np.ndarray, activations: Matrix, thresholds: Sequence[float] = ()) -> Recovery:
    """Find for each variable its most correlated feature, with and without sharing of features.

    Parameters
    ----------
    truth
        (n, p), numbers.
    activations
        (n, h), CSR or dense, in memory or read by rows.
    thresholds
        Of |r|, to count the features of a variable.
    """
    return judged(correlations(truth, activations), thresholds)


def judged(r: np.ndarray, thresholds: Sequence[float] = ()) -> Recovery:
    """Find the features of each variable from all correlations (p, h).

    The best and the matched one are by |r|. The matching is the optimal one (Hungarian method,
    :func:`scipy.optimize.linear_sum_assignment`); with more variables than features, some get none.
    """
    if r.shape[1] == 0:
        raise ValueError("The activations have no features to look for the variables in.")
    strength, everyone = np.abs(r), np.arange(len(r))
    feature = strength.argmax(axis=1)
    matched, partner = np.zeros(len(r)), np.full(len(r), -1)
    variables, partners = linear_sum_assignment(strength, maximize=True)
    matched[variables], partner[variables] = strength[variables, partners], partners
    n_above = np.array([(strength > threshold).sum(axis=1) for threshold in thresholds], dtype=np.int64)
    return Recovery(
        strength[everyone, feature], feature, r[everyone, feature], r.max(axis=1), matched, partner,
        n_above.reshape(len(thresholds), len(r)),
    )  # fmt: skip


def correlations(truth: np.ndarray, activations: Matrix, *, centred: bool = True) -> np.ndarray:
    """Pearson correlation r (p, h) of each variable with each feature; 0 where either is constant.

    With z the centred variables, r = zᵀa / √(Σz² Σ(a − ā)²), in float64; a sparse `a` is multiplied as it is.

    Parameters
    ----------
    truth
        (n, p), numbers.
    activations
        (n, h), CSR or dense, in memory or read by rows.
    centred
        Without centring it is the cosine; 0 where either is 0 throughout.
    """
    if truth.ndim != 2 or len(truth) != activations.shape[0]:
        raise ValueError(f"The truth is {truth.shape}; expected one row for each of {activations.shape[0]} cells.")
    z = truth.astype(np.float64)
    if not np.isfinite(z).all():
        raise ValueError(f"{(~np.isfinite(z)).sum()} values of the truth are not finite. Leave these cells out.")
    if centred:
        z -= z.mean(axis=0) if len(z) else 0
    products, squares, varying = _sums(z, activations, centred)
    r = np.zeros_like(products)
    norms = np.sqrt(np.outer(np.square(z).sum(axis=0), squares))
    known = np.ix_(varying_columns(truth), varying) if centred else norms > 0
    r[known] = products[known] / norms[known]
    return np.clip(r, -1, 1)


Sums = tuple[np.ndarray, np.ndarray, np.ndarray]
"""zᵀa (p, h), Σ(a − ā)² (h,) (Σa² if not centred), and whether a varies (h,)."""


def _sums(z: np.ndarray, a: Matrix, centred: bool) -> Sums:
    """Sum in blocks of cells, read twice: for the mean, and for the rest. Of sparse ones, the square of each zero is ā²."""
    a = as_csr(a) if sparse.issparse(a) else a
    n, h = a.shape
    size = max(1, BLOCK_VALUES // max(h, 1))
    total, low, high, n_stored = np.zeros(h), np.full(h, np.inf), np.full(h, -np.inf), np.zeros(h, dtype=np.int64)
    for _, part in pieces(a, size):
        if sparse.issparse(part):
            total += np.bincount(part.indices, weights=part.data, minlength=h)
            n_stored += np.bincount(part.indices, minlength=h)
            np.minimum.at(low, part.indices, part.data)
            np.maximum.at(high, part.indices, part.data)
        else:
            total += part.sum(axis=0, dtype=np.float64)
            n_stored += len(part)
            low, high = np.minimum(low, part.min(axis=0)), np.maximum(high, part.max(axis=0))
    mean = total / max(n, 1) * centred
    products, squares = np.zeros((z.shape[1], h)), (n - n_stored) * mean**2
    for rows, part in pieces(a, size):
        if sparse.issparse(part):
            some = part.astype(np.float64)
            products += (some.T @ z[rows]).T
            squares += np.bincount(some.indices, weights=np.square(some.data - mean[some.indices]), minlength=h)
        else:
            some = part - mean
            products += z[rows].T @ some
            squares += np.square(some).sum(axis=0)
    some_zero = n_stored < n
    return (
        products,
        squares,
        np.where(some_zero, np.maximum(high, 0), high) > np.where(some_zero, np.minimum(low, 0), low),
    )


def edge_scores(features: np.ndarray, x: Matrix, method: str) -> np.ndarray:
    """Score every edge (p, g) from a feature to a gene.

    Parameters
    ----------
    features
        Activations (n, p).
    x
        Expression (n, g), in memory or read by rows.
    method
        `"regression"`: standardised slopes of the gene on all features at once, R⁺ r with R the correlations among features
        and r those with genes; `"correlation"`: r; `"cosine"`: r without centring.
    """
    scores = correlations(features, x, centred=method != "cosine")
    if method != "regression":
        return scores
    return np.linalg.pinv(correlations(features, features), rcond=COLLINEAR, hermitian=True) @ scores


def graph_recovery(scores: np.ndarray, truth: np.ndarray, n_edges: int) -> GraphRecovery:
    """Compare the `n_edges` highest scores of all with the true edges.

    Parameters
    ----------
    scores
        (p, g), of each variable's feature with each gene. Variables without a feature have −inf: they get no edge.
    truth
        (p, g), bool.
    """
    p, g = truth.shape
    order = np.argsort(-scores, axis=None, kind="stable")[:n_edges]
    found = np.zeros(p * g, dtype=bool)
    found[order] = scores.ravel()[order] > -np.inf
    found = found.reshape(p, g)
    hits, n_found, n_true = (part.sum(axis=1).astype(np.float64) for part in (found & truth, found, truth))
    n_true[n_true == 0] = np.nan
    precision = np.where(np.isnan(n_true), np.nan, hits / np.maximum(n_found, 1))
    average = np.array([_average_precision(*pair) for pair in zip(scores, truth, strict=True)])
    return GraphRecovery(precision, hits / n_true, 2 * hits / (n_found + n_true), average, n_true / g)


def _average_precision(score: np.ndarray, truth: np.ndarray) -> float:
    """Return Σ (R_k − R_{k−1}) P_k over the different scores, from the highest down."""
    if not truth.any():
        return np.nan
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(score[order][1:] != score[order][:-1]), len(score) - 1)
    hits = np.cumsum(truth[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / truth.sum())
