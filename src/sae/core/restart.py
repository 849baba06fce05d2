"""Dead features start again where something is missing in the reconstruction."""

from __future__ import annotations

import numpy as np

from .backend import Backend, Settings
from .initial import unit

N_RESTARTS, RESTART_EVERY, RESTART_UNTIL = 50, 50, 0.8
RESTART_SHARE, WORTH_A_RESTART = 10, 0.01
RESTART_LENGTH, RESTART_LENGTH_PENALISED = 1.0, 0.2
LONGEST = 1.0
"""Encoder of a feature that starts again: one that is longer overshoots, which it and others then chase with longer ones."""


def restart_steps(settings: Settings, idle: int) -> range:
    """Return the steps after which idle features start again: none near the end, where they could not learn any more."""
    if settings.paper or settings.frozen_decoder:
        return range(0)
    every = max(RESTART_EVERY, settings.steps // N_RESTARTS, idle)
    return range(every - 1, int(RESTART_UNTIL * settings.steps), every)


def restart_dead(backend: Backend, y: np.ndarray, step: int, idle: int, settings: Settings) -> None:
    """Point features that were idle for `idle` steps at what is missing in the reconstruction of random cells of `y` (n, d).

    At most a tenth of all features at a time, those idle longest first. Their encoders get the mean length of the others, but
    at most 1, or a fifth of it where a penalty has to hold them down (Bricken et al. 2023). Where almost nothing is missing, spare
    features stay dead.
    """
    dead = np.flatnonzero(step - backend.last_fired >= idle)
    if len(dead) == 0:
        return
    residuals, _ = backend.evaluate(y)
    if not np.square(residuals, dtype=np.float64).sum() > WORTH_A_RESTART * np.square(y, dtype=np.float64).sum():
        return
    lengths = np.linalg.norm(np.delete(backend.weights()["W_enc"], dead, axis=0), axis=1)
    most = min(max(1, settings.n_features // RESTART_SHARE), len(y))
    dead = dead[np.argsort(backend.last_fired[dead], kind="stable")[:most]]
    rng = np.random.default_rng([settings.seed, step])
    missing = -residuals[rng.choice(len(y), len(dead), replace=False)]
    length = RESTART_LENGTH if settings.k is not None else RESTART_LENGTH_PENALISED
    usual = min(float(lengths.mean()), LONGEST) if len(lengths) else LONGEST
    backend.restart(dead, unit(missing), length * usual)
