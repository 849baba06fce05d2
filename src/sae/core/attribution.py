"""Which dimensions of a latent a prediction comes from: input × gradient and integrated gradients, through any decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .baselines import Standardised, in_both_halves
from .statistics import average_ranks

SMALLEST_VARIANCE = 1e-11
"""Of that of the first component of predicted expression; below is rounding."""
STEP = 0.02
"""Of a dimension's standard deviation, to either side of a cell: for derivatives."""
COMPLETE = 1e-2
"""How far the attributions of a cell may be from adding up, in standard deviations of the logit: far less than what orders cells."""
NODES = (1, 4, 16)
"""Points on the way from the baseline that are tried; one is exact for a linear decoder."""

Logits: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""From the latent (n, d) of the same n cells each time to logits (n, probes)."""


@dataclass(frozen=True)
class Probes:
    """Logistic regressions of all labels on predicted expression, one for each label and half.

    Attributes
    ----------
    weights, intercept
        (genes, probes) and (probes,), of (splits, 2, labels) probes in that order; zeros where a label is not in both halves.
    valid
        (splits, labels)
    """

    weights: np.ndarray
    intercept: np.ndarray
    valid: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, codes: np.ndarray, n_labels: int, halves: np.ndarray) -> Probes:
        """Fit them, with columns standardised on the half that is fitted, and scikit-learn's default penalty of ‖w‖².

        Parameters
        ----------
        x
            Predicted expression (n, genes).
        codes
            (n,) labels, 0, 1, ...
        halves
            (splits, n) of 0 and 1.
        """
        valid = in_both_halves(codes, n_labels, halves)
        x = x.astype(np.float64)
        scores, right = _low_rank(x - x.mean(axis=0))
        weights = np.zeros((x.shape[1], len(halves), 2, n_labels))
        intercept = np.zeros((len(halves), 2, n_labels))
        for split, half in enumerate(halves):
            for p in range(2):
                fitted = np.flatnonzero(half == p)
                standard = Standardised.of(x[fitted])
                # ‖w‖² is the same in any orthonormal basis of the space that the standardised rows are in.
                back, triangle = np.linalg.qr(right / standard.sd[:, None])
                rotated = (scores[fitted] - scores[fitted].mean(axis=0)) @ triangle.T
                for label in np.flatnonzero(valid[split]):
                    w, b = _ridge(rotated, codes[fitted] == label)
                    w = back @ w / standard.sd
                    weights[:, split, p, label] = w
                    intercept[split, p, label] = b - standard.mean @ w
        return cls(weights.reshape(x.shape[1], -1), intercept.ravel(), valid)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Return the logits (n, probes) of predicted expression (n, genes)."""
        return x @ self.weights + self.intercept


def _low_rank(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write `x` (n, genes) as the product of (n, r) and the transpose of orthonormal (genes, r)."""
    n, g = x.shape
    values, vectors = np.linalg.eigh(x.T @ x if g <= n else x @ x.T)
    kept = values > SMALLEST_VARIANCE * max(values[-1], 0)
    right = vectors[:, kept] if g <= n else x.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return x @ right, right


def _ridge(x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    if x.shape[1] == 0:
        return np.zeros(0), 0.0
    model = LogisticRegression(max_iter=10_000).fit(x, inside)
    return model.coef_[0], float(model.intercept_[0])


def input_x_gradient(logits: Logits, z: np.ndarray) -> Iterator[np.ndarray]:
    """Yield z_j ∂logit/∂z_j (n, probes) for each dimension j (Shrikumar et al. 2016), by central differences."""
    steps = _steps(z)
    for j in range(z.shape[1]):
        yield z[:, j, None] * _derivative(logits, z, j, steps[j])


def integrated_gradients(logits: Logits, z: np.ndarray, baseline: np.ndarray, n_nodes: int) -> Iterator[np.ndarray]:
    """Yield (z_j − b_j) ∫₀¹ ∂logit/∂z_j at b + t(z − b) dt (n, probes) for each dimension j (Sundararajan et al. 2017).

    Derivatives are central differences, the integral is Gauss-Legendre quadrature.

    Parameters
    ----------
    z
        (n, d)
    baseline
        b, (d,)
    n_nodes
        Points of the quadrature.
    """
    steps, way = _steps(z), z - baseline
    nodes, shares = np.polynomial.legendre.leggauss(n_nodes)
    for j in range(z.shape[1]):
        total = sum(
            share / 2 * _derivative(logits, baseline + (node + 1) / 2 * way, j, steps[j])
            for node, share in zip(nodes, shares, strict=True)
        )
        yield way[:, j, None] * total


def enough_nodes(logits: Logits, z: np.ndarray, baseline: np.ndarray) -> tuple[int, float]:
    """Find how many nodes make the attributions of some cells add up to logit(z) − logit(b), and how far off they still are.

    Their sum is the integral of the slope along the way, Σ_j (z_j − b_j) ∂logit/∂z_j, which two predictions tell for each node, rather
    than two for each dimension. The gap is the largest of all cells and probes, in standard deviations of each probe's logit over the
    cells.
    """
    at, origin, way = logits(z), logits(np.broadcast_to(baseline, z.shape)), z - baseline
    for n_nodes in NODES:
        nodes, shares = np.polynomial.legendre.leggauss(n_nodes)
        total = np.zeros_like(at)
        for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
            ends = (logits(baseline + (node + side * STEP) * way) for side in (1, -1))
            total += share * (next(ends) - next(ends)) / (2 * STEP)
        gap = completeness_gap(total, at, origin)
        if gap <= COMPLETE:
            break
    return n_nodes, gap


def completeness_gap(total: np.ndarray, at: np.ndarray, origin: np.ndarray) -> float:
    """Largest difference between the sum of attributions and the change of the logit, in standard deviations of each logit.

    Parameters
    ----------
    total, at, origin
        (n, probes): the sum over dimensions, the logits of the cells and those at the baseline.
    """
    spread = at.std(axis=0)
    known = spread > 1e-9
    return float(np.max(np.abs(total - (at - origin))[:, known] / spread[known], initial=0))


def _steps(z: np.ndarray) -> np.ndarray:
    spread = z.std(axis=0)
    return STEP * np.where(spread > 0, spread, 1)


def _derivative(logits: Logits, z: np.ndarray, j: int, step: float) -> np.ndarray:
    # Models read float32: what they see of the step is what counts.
    above, below = z.astype(np.float32), z.astype(np.float32)
    above[:, j] += np.float32(step)
    below[:, j] -= np.float32(step)
    return (logits(above) - logits(below)) / (above[:, j, None].astype(np.float64) - below[:, j, None])


class BestColumn:
    """Keeps, of columns that come one by one, the best one of each probe on the half that it was fitted on."""

    def __init__(self, codes: np.ndarray, halves: np.ndarray, valid: np.ndarray):
        n_splits, n_labels = valid.shape
        self._codes, self._halves, self._valid = codes, halves, valid
        self._best = np.full((n_splits, 2, n_labels), -np.inf)
        self.scores = np.full((n_splits, n_labels, len(codes)), np.nan)
        """(splits, labels, n), each cell by the column that was chosen on the other half."""

    def add(self, values: np.ndarray) -> None:
        """Look at one dimension: its attribution (n, probes) for each of (splits, 2, labels) probes."""
        n_splits, _, n_labels = self._best.shape
        values = values.reshape(len(values), n_splits, 2, n_labels)
        for split, half in enumerate(self._halves):
            for p in range(2):
                chosen, scored = np.flatnonzero(half == p), np.flatnonzero(half != p)
                found = _auroc(values[chosen, split, p], self._codes[chosen])
                better = self._valid[split] & (found > self._best[split, p])
                self._best[split, p, better] = found[better]
                self.scores[split][np.ix_(better, scored)] = values[scored, split, p][:, better].T


def _auroc(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """AUROC (labels,) of the l-th column of (n, labels) for the label l."""
    n, n_labels = values.shape
    ranks, _ = average_ranks(values.T)
    inside = codes == np.arange(n_labels)[:, None]
    n_in = inside.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((ranks * inside).sum(axis=1) - n_in * (n_in + 1) / 2) / (n_in * (n - n_in))
