"""The weights that training starts from."""

from __future__ import annotations

import numpy as np

from .backend import Arrays, Settings

INITIAL_NOISE = 1.0


def initial_directions(y: np.ndarray, spread: np.ndarray, n_features: int, rng: np.random.Generator) -> np.ndarray:
    """Unit directions of random cells (n, m), with noise of the same length and of the cells' spread (m,) added."""
    cells = y[rng.integers(len(y), size=n_features)]
    noise = rng.standard_normal(cells.shape) * spread
    return unit(unit(cells) + INITIAL_NOISE * unit(noise))


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; rows of zeros stay."""
    rows = rows.astype(np.float64)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def initial_weights(y: np.ndarray, spread: np.ndarray, settings: Settings) -> Arrays:
    """Return decoder and encoder along random cells `y` (n, m), biases 0; for the paper, uniform as torch's linear layers.

    A decoder that stays as it is has random directions, as spread as the cells: in directions in which cells hardly differ there is
    nothing to find, and whitening magnifies them.
    """
    rng = np.random.default_rng(settings.seed)
    h, d = settings.n_features, y.shape[1]
    if not settings.paper:
        if settings.frozen_decoder:
            directions = unit(rng.standard_normal((h, d)) * spread)
        else:
            directions = initial_directions(y, spread, h, rng)
        # Nested dictionaries reconstruct several times over: features that start too strong push each other down and die.
        scale = _best_scale(y, directions, settings.k) ** (2 if len(settings.groups) > 1 else 1)
        return {"W_enc": directions * scale, "b_enc": np.zeros(h), "W_dec": directions, "b_dec": np.zeros(d)}

    def uniform(fan_in: int, *shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape) / fan_in**0.5

    weights = {"W_enc": uniform(d, h, d), "b_enc": uniform(d, h), "W_dec": uniform(h, h, d), "b_dec": uniform(h, d)}
    if settings.architecture != "vanilla":
        weights.update(b_enc=np.zeros(h), b_dec=np.zeros(d))
    return weights


def _best_scale(y: np.ndarray, directions: np.ndarray, k: int | None) -> float:
    """Return the factor for the encoder with which the start reconstructs cells `y` best: similar features add up."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = np.maximum(y @ directions.T, 0)
        if k is not None and k < a.shape[1]:
            a[a < np.partition(a, -k, axis=1)[:, -k, None]] = 0
        y_hat = (a @ directions).astype(np.float64)
        return float((y * y_hat).sum() / max(np.square(y_hat).sum(), 1e-12))
