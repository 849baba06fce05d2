"""Seeds that can be stored and drawn again."""

from __future__ import annotations

import numpy as np

MOST = 2**62
"""Files hold 64 bits, and other seeds are counted up from the first."""


def integer_seed(rng: int | np.random.Generator | None) -> int:
    """Return the integer itself, or one that is drawn."""
    if not isinstance(rng, int | np.integer):
        return int(np.random.default_rng(rng).integers(2**31))
    if not is_seed(rng):
        raise ValueError(f"rng={rng} is no seed; expected an integer from 0 to 2**62.")
    return int(rng)


def is_seed(value: object) -> bool:
    """Tell whether a value can be stored as a seed."""
    return isinstance(value, int | np.integer) and 0 <= int(value) <= MOST
