"""How well batches mix and labels keep apart in a representation, and which features tell either."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .labels import score_labels

N_ALIKE = 10
"""Features of the most similar size among which a control is drawn."""


@dataclass(frozen=True)
class Mixing:
    """Scores of a representation, NaN for what was not given or cannot be told."""

    batch_asw: float
    silhouette_batch: float
    silhouette_label: float
    batch_purity: float
    label_purity: float
    label_accuracy: float


def mixing(x: np.ndarray, batch: np.ndarray | None, label: np.ndarray | None, n_neighbors: int) -> Mixing:
    r"""Score a representation, with s the silhouette width (b − a) / max(a, b) of a cell (Rousseeuw 1987).

    * `batch_asw`: mean of s between batches; the lower, the better they mix.
    * `silhouette_batch`: mean over labels of the mean of 1 − \|s\| between batches among the cells of the label; 1 where they mix. Labels
      that are in one batch only, or of whose cells each is a batch of its own, are left out (as scib-metrics does).
    * `silhouette_label`: (mean of s between labels + 1) / 2.
    * `batch_purity`, `label_purity`: mean share of the nearest neighbours that are of the cell's own batch or label.
    * `label_accuracy`: share of the cells whose label is the most frequent among their nearest neighbours, the first one in a tie.

    Parameters
    ----------
    x
        (n, d)
    batch, label
        (n,) codes 0, 1, ...; None for neither.
    n_neighbors
        Without the cell itself, in Euclidean distance.
    """
    missing = float("nan")
    near = None if batch is None and label is None else neighbors(x, n_neighbors)
    return Mixing(
        batch_asw=missing if batch is None else float(silhouette(x, batch).mean()),
        silhouette_batch=missing if batch is None or label is None else silhouette_batch(x, batch, label),
        silhouette_label=missing if label is None else float((silhouette(x, label).mean() + 1) / 2),
        batch_purity=missing if batch is None or near is None else purity(near, batch),
        label_purity=missing if label is None or near is None else purity(near, label),
        label_accuracy=missing if label is None or near is None else vote_accuracy(near, label),
    )


def silhouette(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Silhouette width (n,) of each cell; NaN where all are of one group, or each of its own."""
    from sklearn.metrics import silhouette_samples

    if not 1 < len(np.unique(codes)) < len(codes):
        return np.full(len(codes), np.nan)
    return silhouette_samples(x, codes)


def silhouette_batch(x: np.ndarray, batch: np.ndarray, label: np.ndarray) -> float:
    r"""Mean over labels of the mean of 1 − \|s\| between batches among the cells of a label."""
    widths = [np.abs(silhouette(x[inside], batch[inside])) for inside in (label == one for one in np.unique(label))]
    means = [1 - width.mean() for width in widths if not np.isnan(width).any()]
    return float(np.mean(means)) if means else float("nan")


def neighbors(x: np.ndarray, n_neighbors: int) -> np.ndarray:
    """Find the nearest other cells (n, n_neighbors) of each cell."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=n_neighbors).fit(x).kneighbors(return_distance=False)


def purity(near: np.ndarray, codes: np.ndarray) -> float:
    """Mean share of the neighbours (n, k) that have the code of the cell itself."""
    return float((codes[near] == codes[:, None]).mean())


def vote_accuracy(near: np.ndarray, codes: np.ndarray) -> float:
    """Share of the cells whose code most of their neighbours (n, k) have; in a tie, the lowest code counts."""
    votes = np.zeros((len(codes), codes.max() + 1), dtype=np.int64)
    np.add.at(votes, (np.arange(len(codes))[:, None], codes[near]), 1)
    return float((votes.argmax(axis=1) == codes).mean())


def separation(a: sparse.csr_matrix, codes: np.ndarray, strata: np.ndarray) -> np.ndarray:
    r"""AUROC with which each feature tells the cells of each code from the others within strata (codes, h).

    The mean over strata of the AUROC within each, weighted by n₁ n₀ / (n₁ + n₀ + 1) of the cells inside and outside, as in van
    Elteren's test. NaN for a code that no stratum has beside others.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0.
    codes, strata
        (n,) codes 0, 1, ...
    """
    n_codes = int(codes.max()) + 1
    total, weight = np.zeros((n_codes, a.shape[1])), np.zeros((n_codes, 1))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        n_in = np.bincount(codes[rows], minlength=n_codes)[:, None]
        pairs = n_in * (len(rows) - n_in) / (len(rows) + 1)
        if pairs.any():
            total += np.where(pairs > 0, score_labels(a[rows], codes[rows], n_codes).auroc, 0) * pairs
            weight += pairs
    with np.errstate(invalid="ignore"):
        return total / weight


def step_sizes(a: sparse.csr_matrix, W_dec: np.ndarray) -> np.ndarray:
    """Mean over cells of the squared length of a_f W_dec[f], what the removal of a feature alone moves them by (h,)."""
    squares = np.bincount(a.indices, weights=a.data.astype(np.float64) ** 2, minlength=a.shape[1])
    return squares / max(a.shape[0], 1) * (W_dec.astype(np.float64) ** 2).sum(axis=1)


def removed(z: np.ndarray, a: sparse.csr_matrix, W_dec: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return z − Σ_f a_f W_dec[f] (n, d) over some features; what the SAE does not reconstruct stays."""
    return z - a[:, features] @ W_dec[features]


def alike(size: np.ndarray, features: np.ndarray, n_draws: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw sets of other features of similar sizes, to compare a set of features with.

    In each draw, each feature in turn is given one of the ten that are most similar to it by the ratio of sizes, and that are not in the
    draw yet.

    Parameters
    ----------
    size
        (h,), 0 for features that are not drawn.
    features
        The set, which is not drawn from.

    Returns
    -------
    `n_draws` sets, or none where there are not enough other features.
    """
    others = np.setdiff1d(np.flatnonzero(size > 0), features)
    wanted = features[size[features] > 0]
    if len(others) < len(wanted):
        return []
    draws = []
    for _ in range(n_draws):
        left, drawn = others, []
        for feature in rng.permutation(wanted):
            nearest = np.argsort(np.abs(np.log(size[left] / size[feature])), kind="stable")[:N_ALIKE]
            place = rng.choice(nearest)
            drawn.append(left[place])
            left = np.delete(left, place)
        draws.append(np.sort(np.array(drawn, dtype=np.int64)))
    return draws
