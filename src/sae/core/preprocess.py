"""Scaling of the representation for training, and how to fold it into the weights afterwards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from .autoencoder import Autoencoder
from .rows import Matrix, dense_rows, pieces

Preprocess = Literal["damped", "center", "standardize", "whiten", "none"]
PREPROCESS: tuple[str, ...] = get_args(Preprocess)
WHITEN_MAX_INPUTS = 2_000
WHITEN_MIN_CELLS_PER_INPUT = 10
WHITEN_RIDGE = 1e-3
DAMPING = 3
DECORRELATING = ("damped", "whiten")
UNCORRELATED = 0.12
"""Columns are principal components when the root mean square of their correlations is below this.

It is 0 for the cells that a PCA was computed on, .04 to .1 for half of their cell types, and .2 between scVI's latents.
"""
FEWEST_COMPONENTS, UNEQUAL = 16, 4
SMALLEST_EIGENVALUE, LEAST_SIGNAL = 1e-6, 0.1
CONSTANT = 1e-6
"""A column is constant when its standard deviation is below this share of its mean (or of the widest column)."""


@dataclass(frozen=True)
class Scaling:
    """The affine map into the space an SAE is trained in, `y = (x[:, kept] − mean[kept]) · forward`, and its inverse.

    Attributes
    ----------
    kind
        How it was made.
    mean
        (d,), float64.
    kept
        (m,) columns that vary.
    forward, backward
        (m,) factors, or (m, m) matrices for whitening; float64.
    variance
        Mean of ‖x − mean‖² over the cells, in the raw representation.
    """

    kind: Preprocess
    mean: np.ndarray
    kept: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    variance: float
    spread: np.ndarray
    """(m,) standard deviations of the columns of y."""

    @property
    def n_effective(self) -> float:
        """Participation ratio (Σ v)² / Σ v² of the variances v of y's columns: how many of them carry most of it."""
        return float(np.square(self.spread).sum() ** 2 / (self.spread**4).sum())

    @property
    def factors(self) -> np.ndarray | None:
        """Factors (d,) or the matrix (d, d) from raw to training space, float32; None for one factor, which turns nothing.

        The matrix is V diag(g) Vᵀ where `forward` is V diag(g): turned back to the axes of the raw representation, so that it can
        be compared with that of other cells, whose eigenvectors have other signs and another order.
        """
        if self.kind in ("center", "none"):
            return None
        d, kept = len(self.mean), self.kept
        if self.forward.ndim == 1:
            full = np.zeros(d, dtype=np.float32)
            full[kept] = self.forward
            return full
        full = np.zeros((d, d), dtype=np.float32)
        full[np.ix_(kept, kept)] = self.forward @ (self.forward / np.linalg.norm(self.forward, axis=0)).T
        return full

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Map raw rows (n, d) to training rows (n, m), float32 and contiguous."""
        columns = x if len(self.kept) == x.shape[1] else np.take(x, self.kept, axis=1)
        centred = np.subtract(columns, self.mean[self.kept], dtype=np.float64)
        if self.forward.ndim == 1:
            return np.multiply(centred, self.forward, out=centred).astype(np.float32, order="C")
        return (centred @ self.forward).astype(np.float32, order="C")

    def fold(self, trained: Autoencoder) -> Autoencoder:
        """Rewrite an SAE of the training space (m inputs) as one of the raw representation (d inputs).

        With F = `forward` and B = `backward`: W_enc ← F W_enc, b_enc ← b_enc − mean F W_enc, W_dec ← W_dec B,
        b_dec ← b_dec B + mean. Constant columns get zero weight and their own value as decoder bias. Computed in
        float64, stored as float32.
        """
        d, h = len(self.mean), trained.n_features
        encoder, decoder = trained.W_enc.astype(np.float64), trained.W_dec.astype(np.float64)
        bias = trained.b_dec.astype(np.float64)
        if self.forward.ndim == 1:
            encoder, decoder, bias = self.forward[:, None] * encoder, decoder * self.backward, bias * self.backward
        else:
            encoder, decoder, bias = self.forward @ encoder, decoder @ self.backward, bias @ self.backward
        b_enc = trained.b_enc - self.mean[self.kept] @ encoder
        W_enc, W_dec, b_dec = np.zeros((d, h)), np.zeros((h, d)), self.mean.copy()
        W_enc[self.kept], W_dec[:, self.kept] = encoder, decoder
        b_dec[self.kept] += bias
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if trained.threshold is not None:
            # Pre-activations, and so their thresholds, are the same in both spaces.
            weights["threshold"] = trained.threshold
        return replace(trained, **{name: value.astype(np.float32) for name, value in weights.items()})


def directions(W_dec: np.ndarray, factors: np.ndarray | None) -> np.ndarray:
    """Decoder rows (h, d) in the training space, scaled to length 1, float64; rows of zeros stay.

    In the raw representation the largest components would decide alone how similar two rows are.

    Parameters
    ----------
    W_dec
        (h, d), of the raw representation.
    factors
        Those of the :class:`Scaling`.
    """
    rows = np.asarray(W_dec, dtype=np.float64)
    if factors is not None:
        rows = rows * factors if factors.ndim == 1 else rows @ factors.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def fit_scaling(x: Matrix, kind: Preprocess | None = None, *, block_rows: int = 4096) -> Scaling:
    """Measure the scaling of a representation in one pass for the mean and one for the spread.

    Parameters
    ----------
    x
        (n, d), dense or CSR, in memory or on disk.
    kind
        By default `"damped"` for principal components and `"center"` for everything else.
        `"damped"`: principal components, each divided by its standard deviation and multiplied by (1 − ν/λ)³, the cube of
        the share of its variance λ that is not noise; ν = λ_d² / λ_{d/2} continues the logarithm of the spectrum by half
        its length. Without noise that is whitening.
        `"center"`: one global factor, such that the mean squared norm is the number of varying columns.
        `"standardize"`: unit standard deviation per column. `"whiten"`: V (Λ + ρ)^−½ from the eigenvectors V and
        eigenvalues Λ of the covariance, with the ridge ρ = 1e-3 · mean(Λ). `"none"`: the representation as it is.
    """
    n, d = x.shape
    too_wide = d > WHITEN_MAX_INPUTS or n < WHITEN_MIN_CELLS_PER_INPUT * d
    if kind is None and (too_wide or d < FEWEST_COMPONENTS):
        kind = "center"
    if kind in DECORRELATING and too_wide:
        raise ValueError(
            f"preprocess={kind!r} estimates a {d} × {d} covariance from {n} cells; it needs at most "
            f"{WHITEN_MAX_INPUTS} columns and {WHITEN_MIN_CELLS_PER_INPUT} cells per column. "
            'Use preprocess="center" or "standardize".'
        )
    mean = np.zeros(d)
    for _, part in pieces(x, block_rows):
        mean += dense_rows(part, slice(None)).sum(axis=0, dtype=np.float64)
    mean /= n
    paired = kind is None or kind in DECORRELATING
    # Apart from the products, whose diagonal can differ in the last bit: what is found then equals what is asked for.
    variance, second = np.zeros(d), np.zeros((d, d) if paired else 0)
    for _, part in pieces(x, block_rows):
        centred = dense_rows(part, slice(None)).astype(np.float64) - mean
        variance += np.square(centred).sum(axis=0)
        if paired:
            second += centred.T @ centred
    variance /= n
    second /= n
    spread = np.sqrt(variance)
    if kind is None:
        kind = "damped" if _like_components(second) else "center"
    # Where columns keep their proportions, one that is negligible beside the widest counts as constant too.
    scale = np.abs(mean) if kind == "standardize" else np.maximum(np.abs(mean), spread.max())
    kept = np.flatnonzero(spread > CONSTANT * scale)
    if len(kept) == 0:
        raise ValueError(f"All {d} columns of the representation are constant over {n} cells: there is nothing to fit.")
    if kind == "damped":
        values, vectors = np.linalg.eigh(second[np.ix_(kept, kept)])
        gain = _damped_gain(values)
        forward, backward = vectors * gain, (vectors / gain).T
    elif kind == "whiten":
        values, vectors = np.linalg.eigh(second[np.ix_(kept, kept)])
        root = np.sqrt(np.maximum(values, 0) + WHITEN_RIDGE * values.mean())
        forward, backward = vectors / root, (vectors * root).T
    elif kind == "standardize":
        forward, backward = 1 / spread[kept], spread[kept]
    elif kind == "none":
        mean[kept] = 0
        forward = backward = np.ones(len(kept))
    else:
        factor = np.sqrt(len(kept) / variance[kept].sum())
        forward, backward = np.full(len(kept), factor), np.full(len(kept), 1 / factor)
    if kind in DECORRELATING:
        in_training = np.sqrt(np.maximum(values, 0)) * np.linalg.norm(forward, axis=0)
    else:
        in_training = spread[kept] * forward
    return Scaling(kind, mean, kept, forward, backward, float(variance[kept].sum()), in_training)


def noise_level(values: np.ndarray) -> float:
    """Extrapolate a spectrum (rising eigenvalues) by half its length, on a logarithmic scale: λ_d² / λ_{d/2}."""
    return float(values[0] ** 2 / values[len(values) // 2])


def _damped_gain(values: np.ndarray) -> np.ndarray:
    """Return the factor of each principal component, such that the mean squared norm is their number."""
    values = np.maximum(values, SMALLEST_EIGENVALUE * values.mean())
    signal = np.maximum(1 - noise_level(values) / values, 0)
    gain = np.maximum(signal, LEAST_SIGNAL) ** DAMPING / np.sqrt(values)
    return gain * np.sqrt(len(values) / (gain**2 * values).sum())


def _like_components(covariance: np.ndarray) -> bool:
    """Tell whether the columns that vary are as uncorrelated as principal components, and as unequal."""
    spread = np.sqrt(np.diag(covariance))
    varying = spread > CONSTANT * spread.max()
    if varying.sum() < FEWEST_COMPONENTS or spread.max() ** 2 < UNEQUAL * np.median(spread[varying] ** 2):
        return False
    correlation = covariance[np.ix_(varying, varying)] / np.outer(spread[varying], spread[varying])
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    return bool(np.sqrt(np.square(off_diagonal).mean()) < UNCORRELATED)
