"""What the simulators share: names, checks of their arguments, and counts drawn from expected expression."""

from __future__ import annotations

import numpy as np

from ..core.rows import row_blocks

BLOCK_ROWS = 4096


def names(kind: str, n: int) -> list[str]:
    """Return `cell_0`, `cell_1`, ..."""
    return [f"{kind}_{number}" for number in range(n)]


def check_sizes(**sizes: int) -> None:
    """Refuse numbers of things that are none or below 1."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"{name}={size!r} is a {type(size).__name__}; expected an integer.")
        if size < 1:
            raise ValueError(f"{name}={size} is below 1.")


def check_shares(**shares: float | None) -> None:
    """Refuse what is not a share above 0; None is no share."""
    for name, share in shares.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name}={share} is not a share above 0 and up to 1.")


def check_amounts(**amounts: float) -> None:
    """Refuse negative and infinite numbers."""
    for name, amount in amounts.items():
        if not 0 <= amount < np.inf:
            raise ValueError(f"{name}={amount} is not a number from 0 up.")


def correlated_poisson(
    rates: np.ndarray, n: int, correlation: float, block_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw Poisson variables (n, p) of which blocks of neighbours share a normal variable (Gaussian copula).

    X_j = F_j⁻¹(Φ(√ρ u + √(1 − ρ) e_j)), with u of the block and e_j standard normal, and F_j the distribution function of
    Poisson(rates_j), which the margin therefore is.
    """
    from scipy import special, stats

    block = np.arange(len(rates)) // block_size
    reach = np.arange(int(stats.poisson.isf(1e-16, rates.max())) + 1)
    cumulative = stats.poisson.cdf(reach, rates[:, None])
    drawn = np.empty((n, len(rates)), dtype=np.float32)
    for rows in row_blocks(n, BLOCK_ROWS):
        shared = rng.standard_normal((rows.stop - rows.start, block[-1] + 1))[:, block]
        own = rng.standard_normal(shared.shape)
        quantile = special.ndtr(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own)
        for j in range(len(rates)):
            drawn[rows, j] = np.searchsorted(cumulative[j], quantile[:, j])
    return drawn


def draw_counts(
    x: np.ndarray, depth: float, size_factor: np.ndarray, dispersion: float, rng: np.random.Generator
) -> None:
    """Replace expected expression (n, g) by counts with a mean total of `depth` per cell, block by block.

    Poisson, or with a dispersion φ > 0 negative binomial with variance μ + φ μ²: Poisson of a mean that is itself drawn from
    a gamma distribution with shape 1/φ. `size_factor` (n,) multiplies the means of each cell.
    """
    np.maximum(x, 0, out=x)
    mean_total = x.sum(dtype=np.float64) / len(x)
    factor = depth / mean_total if mean_total > 0 else 0.0
    for rows in row_blocks(len(x), BLOCK_ROWS):
        expected = factor * x[rows].astype(np.float64) * size_factor[rows, None]
        if dispersion > 0:
            expected *= rng.gamma(1 / dispersion, dispersion, size=expected.shape)
        x[rows] = rng.poisson(expected)
