"""Two-sided p of Student's t distribution in logarithms: fast, and right also where p itself is too small for a float.

With a = ν/2, p is the regularised incomplete beta function I_x(a, ½) at x = ν / (ν + t²).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.polynomial import chebyshev
from scipy import special

from .rows import row_blocks

SMALLEST_EXPANDED, LARGEST_EXPANDED = 6.0, 3.0
"""From this a on, and up to this t²/ν, the expansion for large a is good to 1e-10."""
SINH_SERIES = np.array(
    [
        -1 / 48,
        1 / 2560,
        -61 / 7741440,
        1261 / 7431782400,
        -79 / 20761804800,
        66643 / 761775532277760,
        -16820653 / 8227175748599808000,
        3745813 / 77499283242221568000,
    ]
)
"""(2 sinh(s/2) / s)^(−½) = 1 + Σ cₖ s^(2k), k = 1, 2, ..."""
ERFCX_SCALE = 3.75
NEGLIGIBLE = 1e-16
BLOCK = 16_384
"""Elements worked on at a time, so that they stay in the processor's cache."""


def _erfcx_polynomial(degree: int = 20) -> np.ndarray:
    """(1 + 2z) exp(z²) erfc(z) for all z ≥ 0 as a polynomial in (z − c) / (z + c), to 1e-14; highest power first.

    The variable is that of Shepherd and Laframboise (1981, Mathematics of Computation 36:249).
    """

    def scaled(s: Any) -> Any:
        z = ERFCX_SCALE * (1 + s) / (1 - s)
        return (1 + 2 * z) * special.erfcx(z)

    return chebyshev.cheb2poly(chebyshev.chebinterpolate(scaled, degree))[::-1].copy()


ERFCX = _erfcx_polynomial()

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})


def log_two_sided(t: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Natural logarithm of the two-sided p of t with ν = `df` degrees of freedom, log P(abs(T) ≥ abs(t)).

    For ν ≥ 12 and t² < 3ν by the expansion of DiDonato and Morris (1992, doi:10.1145/131766.131776) for large ν, else by the
    hypergeometric series. Relative error 1e-10 of p above 1e-300, and of log p below.

    Parameters
    ----------
    t, df
        Broadcast against each other. `df` is above 0, need not be an integer, and infinite for the normal distribution.

    Returns
    -------
    0 for t = 0, −∞ for infinite t; NaN where t is, or where df is not above 0.
    """
    t, df = np.broadcast_arrays(np.asarray(t, dtype=np.float64), np.asarray(df, dtype=np.float64))
    flat_t, flat_df, log_p = np.ravel(t), np.ravel(df), np.empty(t.size)
    with np.errstate(all="ignore"):
        for block in row_blocks(t.size, BLOCK):
            size, a = np.abs(flat_t[block]), flat_df[block] / 2
            y = np.log1p(size * size / (2 * a))
            share = np.empty(len(y))
            _expansion(y, a, share)
            log_p[block] = np.minimum(np.log(share) - (a - 0.25) * y, 0)
            _elsewhere(size, a, log_p[block])
    return log_p.reshape(t.shape)


@_compiled
def _expansion(y, a, share):
    """I_x(a, ½) = exp(−u) · share, where u = Ny, N = a − ¼ and y = −log x.

    I_x is the share above y of the integral over s > 0 of exp(−Ns) (2 sinh(s/2))^(−½), here by the series of sinh: with
    Γ(2k + ½, u) N^(−2k) exp(u) / √π as the part of the term k that lies above, from Γ(α + 1, u) = α Γ(α, u) + u^α exp(−u).
    """
    for i in range(y.size):
        n = a[i] - 0.25
        u = n * y[i]
        z = math.sqrt(u)
        above, whole = _scaled_erfc(z), 1.0
        power = z / math.sqrt(math.pi)
        shrink, square = 1 / (n * n), y[i] * y[i]
        sum_above, sum_whole = above, whole
        for k in range(SINH_SERIES.size):
            alpha = 2 * k + 0.5
            step = alpha * (alpha + 1) * shrink
            above = step * above + (alpha + 1 + u) * shrink * power
            whole *= step
            sum_above += SINH_SERIES[k] * above
            sum_whole += SINH_SERIES[k] * whole
            power *= square
        share[i] = sum_above / sum_whole


@_compiled
def _elsewhere(t, a, log_p):
    """Replace what the expansion does not give for t ≥ 0: small ν, t far above √ν, and the limits."""
    for i in range(t.size):
        if not (t[i] >= 0 and a[i] > 0):
            log_p[i] = np.nan
        elif t[i] == 0:
            log_p[i] = 0
        elif math.isinf(t[i]):
            log_p[i] = -np.inf
        elif math.isinf(a[i]):
            z = t[i] / math.sqrt(2)
            log_p[i] = math.log(_scaled_erfc(z)) - z * z
        elif not (a[i] >= SMALLEST_EXPANDED and t[i] * t[i] < LARGEST_EXPANDED * 2 * a[i]):
            ratio = t[i] / math.sqrt(2 * a[i])
            log_p[i] = _far_tail(ratio, a[i]) if ratio > 1 else _centre(ratio, a[i])


@_compiled
def _far_tail(ratio, a):
    """Logarithm of I_x(a, ½) for x ≤ ½, by a series with positive terms (DLMF 8.17.8)."""
    square = ratio * ratio
    log_odds = 2 * math.log(ratio)
    log_inside = math.log1p(1 / square)
    series = _series(a + 0.5, a + 1, 1 / (1 + square))
    return math.log(series / a) - a * (log_odds + log_inside) - 0.5 * log_inside - _log_beta(a)


@_compiled
def _centre(ratio, a):
    """Logarithm of 1 − I_w(½, a) for w = 1 − x ≤ ½, by the same series."""
    square = ratio * ratio
    log_front = math.log(2 * ratio) - (a + 0.5) * math.log1p(square) - _log_beta(a)
    return math.log1p(-math.exp(log_front) * _series(a + 0.5, 1.5, square / (1 + square)))


@_compiled
def _series(upper, lower, x):
    """Σ xⁿ · upper (upper + 1) ... / (lower (lower + 1) ...), n factors each."""
    term, total = 1.0, 1.0
    while term > NEGLIGIBLE * total:
        term *= upper / lower * x
        total += term
        upper += 1
        lower += 1
    return total


@_compiled
def _log_beta(a):
    return 0.5 * math.log(math.pi) + math.lgamma(a) - math.lgamma(a + 0.5)


@_compiled
def _scaled_erfc(z):
    """exp(z²) erfc(z) for z ≥ 0."""
    s = (z - ERFCX_SCALE) / (z + ERFCX_SCALE)
    total = 0.0
    for k in range(ERFCX.size):
        total = total * s + ERFCX[k]
    return total / (1 + 2 * z)
