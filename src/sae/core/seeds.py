"""Seeds that can be stored and drawn again."""

from __future__ import annotations

import numpy as np


def integer_seed(rng: int | np.random.Generator | None) -> int:
    """Return the integer itself, or one that is drawn."""
    if isinstance(rng, int | np.integer) and rng < 0:
        raise ValueError(f"rng={rng} is negative; a seed is an integer from 0 on.")
    return int(rng) if isinstance(rng, int | np.integer) else int(np.random.default_rng(rng).integers(2**31))
