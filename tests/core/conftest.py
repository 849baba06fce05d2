"""Cells that are sums of known directions, and SAEs trained on them."""

from __future__ import annotations

import numpy as np
import pytest

from sae.core.architectures import ARCHITECTURES
from sae.core.backend import Settings
from sae.core.checkpoint import Checkpoint
from sae.core.preprocess import fit_scaling
from sae.core.train import train

N, D, TRUE, ACTIVE = 2000, 16, 24, 3


@pytest.fixture(scope="session")
def directions():
    """True unit directions (24, 16)."""
    drawn = np.random.default_rng(0).normal(size=(TRUE, D))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="session")
def x(directions):
    """Cells (2000, 16), each a sum of three true directions with weights of 1 to 2."""
    rng = np.random.default_rng(1)
    active = rng.random((N, TRUE)).argsort(axis=1) < ACTIVE
    return (np.where(active, rng.uniform(1, 2, size=(N, TRUE)), 0) @ directions).astype(np.float32)


def _settings(architecture="topk", *, k=ACTIVE, l1=1.0, l0=0.05, n_features=32, learning_rate=3e-3, steps=60, **rest):
    sparsity = ARCHITECTURES[architecture].sparsity
    own = {name: value if name == sparsity else None for name, value in {"k": k, "l1": l1, "l0": l0}.items()}
    groups = (8, n_features) if architecture == "matryoshka" else (n_features,)
    given = {"groups": groups, "batch_size": 256, "seed": 0, "device": "cpu"} | own | rest
    return Settings(architecture, n_features, learning_rate=learning_rate, steps=steps, **given)


@pytest.fixture(scope="session")
def settings():
    """Factory of settings: of k, l1 and l0 only the one that the architecture uses counts."""
    return _settings


@pytest.fixture(scope="session")
def trained():
    """Train on all but the last rows: `trained(x, n_val=200, checkpoint=path, **settings)`."""

    def trained(
        x, preprocess="center", *, n_val=200, patience=None, checkpoint=None, identity="", on_step=None, **given
    ):
        rows = np.arange(x.shape[0])
        split = len(rows) - n_val
        used = _settings(**given)
        return train(
            x,
            fit_scaling(x, preprocess),
            used,
            train_rows=rows[:split],
            val_rows=rows[split:],
            patience=patience,
            checkpoint=None if checkpoint is None else Checkpoint(checkpoint, used, identity),
            on_step=on_step,
        )

    return trained


@pytest.fixture(scope="session")
def stopping_at():
    """Make an `on_step` that raises an error after a step; by default Ctrl-C."""

    def stopping_at(stop, error=KeyboardInterrupt):
        def on_step(step, record):
            if step == stop:
                raise error

        return on_step

    return stopping_at


@pytest.fixture(scope="session")
def assert_equal_weights():
    """Compare what two trainings left, to the bit."""

    def assert_equal_weights(one, other):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
            values = (getattr(trained.autoencoder, name) for trained in (one, other))
            np.testing.assert_array_equal(*values, err_msg=name)

    return assert_equal_weights
