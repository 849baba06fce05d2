"""Choosing how many features are active in a cell, from held-out reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .backend import Settings
from .defaults import nested_groups
from .preprocess import Scaling
from .rows import Matrix
from .train import train

SHARES = (0.1, 0.12, 0.15, 0.18, 0.21, 0.25, 0.3, 0.36, 0.43, 0.52, 0.62)
EXPLAINED = 0.01
PILOT_STEPS = 2000


@dataclass(frozen=True)
class ChosenK:
    """The choice, and what it rests on: the fraction unexplained of held-out cells for each k that was tried."""

    k: int
    found: bool
    tried: dict[int, float]


def choose_k(
    x: Matrix, scaling: Scaling, settings: Settings, *, train_rows: np.ndarray, val_rows: np.ndarray
) -> ChosenK:
    """Find the smallest k that explains held-out cells, by bisection over shares of the inputs' number m.

    Held-out loss alone falls with k for ever, but where cells are sums of k programs it drops to almost nothing at their
    number: the rule is the smallest k that leaves less than 1 % of ‖y‖² of held-out cells unexplained, in the training
    space. Each k is tried on a narrow dictionary in a short run. Where none of them gets there, as on noisy cells, the
    k of `settings` stands.
    """
    groups = nested_groups(settings.n_features, scaling.n_effective)[:2]
    ks = sorted({max(1, round(share * len(scaling.kept))) for share in SHARES})
    ks = [k for k in ks if 2 * k <= groups[-1]]
    tried: dict[int, float] = {}

    def explains(k: int) -> bool:
        pilot = replace(settings, k=k, n_features=groups[-1], groups=groups, steps=min(PILOT_STEPS, settings.steps))
        trained = train(x, scaling, pilot, train_rows=train_rows, val_rows=val_rows)
        if trained.ended == "interrupted":
            raise KeyboardInterrupt
        tried[k] = trained.unexplained
        return tried[k] < EXPLAINED

    if not ks or not explains(ks[-1]):
        return ChosenK(settings.k or 1, False, tried)
    low, high = 0, len(ks) - 1
    while low < high:
        middle = (low + high) // 2
        if explains(ks[middle]):
            high = middle
        else:
            low = middle + 1
    return ChosenK(ks[high], True, tried)
