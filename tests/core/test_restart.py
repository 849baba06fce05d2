from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sae.core import restart as module
from sae.core import train as training
from sae.core.architectures import ARCHITECTURES
from sae.core.initial import initial_weights
from sae.core.restart import restart_dead, restart_steps
from sae.core.train import make_backend

D, H = 20, 40
"""Features are the axes, +e₀ ... +e₁₉ and −e₀ ... −e₁₉: those of the second half are idle on positive cells."""
PENALISED = ("vanilla", "jumprelu")
each_architecture = pytest.mark.parametrize("architecture", ["topk", *PENALISED])


def positive_cells(n=60):
    return (0.5 + np.random.default_rng(0).random((n, D))).astype(np.float32)


@pytest.fixture
def start(settings):
    """Make a back end whose reconstruction of positive cells is `share` of each plus `offset`, and its settings."""
    made = []

    def start(architecture="topk", *, share=0.5, offset=0.0):
        used = settings(architecture, n_features=H, k=D)
        axes = np.vstack([np.eye(D), -np.eye(D)]).astype(np.float32)
        # Encoders of idle features have another length.
        lengths = np.repeat([share, 3.0], D)[:, None]
        weights = {"W_enc": lengths * axes, "b_enc": np.zeros(H), "W_dec": axes, "b_dec": np.full(D, offset)}
        made.append(make_backend({name: value.astype(np.float32) for name, value in weights.items()}, used))
        # Rate 0: only the moments of Adam and the steps in which features fired come to be.
        made[-1].step(positive_cells(), 0, 0.0)
        return made[-1], used

    yield start
    for backend in made:
        backend.close()


def decoder(backend):
    return backend.weights()["W_dec"].copy()


def changed(before, after):
    return np.flatnonzero((before != after).any(axis=1))


@each_architecture
def test_idle_features_start_again_along_what_the_reconstruction_of_a_cell_lacks(start, architecture):
    backend, used = start(architecture, offset=0.3)
    y, before = positive_cells(4), decoder(backend)
    backend.step(y, 10, 0.0)
    restart_dead(backend, y, 10, 5, used)
    weights = backend.weights()
    restarted = changed(before, weights["W_dec"])
    assert len(restarted) == 4
    assert (restarted >= D).all(), "the others are active"
    lacking = y - (0.5 * y + 0.3)
    lacking /= np.linalg.norm(lacking, axis=1, keepdims=True)
    cosine = weights["W_dec"][restarted] @ lacking.T
    np.testing.assert_allclose(cosine.max(axis=1), 1, rtol=1e-6)
    assert set(cosine.argmax(axis=1)) == set(range(4)), "each a cell of its own"
    # Active features have encoders of length 0.5; against a penalty, new ones get a fifth of it.
    length = 0.1 if architecture in PENALISED else 0.5
    np.testing.assert_allclose(weights["W_enc"][restarted], length * weights["W_dec"][restarted], rtol=1e-5)


@pytest.mark.parametrize(("share", "length"), [(0.5, 0.5), (2.0, 1.0)])
def test_new_encoders_are_never_long_enough_to_overshoot(start, share, length):
    backend, used = start(share=share)
    y, before = positive_cells(4), decoder(backend)
    backend.step(y, 10, 0.0)
    restart_dead(backend, y, 10, 5, used)
    restarted = changed(before, decoder(backend))
    assert len(restarted) == 4
    np.testing.assert_allclose(np.linalg.norm(backend.weights()["W_enc"][restarted], axis=1), length, rtol=1e-5)


@pytest.mark.parametrize(
    ("idle", "n_cells", "n_restarted"),
    [
        pytest.param(10, 60, 4, id="a tenth of the features"),
        pytest.param(H - 2, 60, 3, id="no more than are idle"),
        pytest.param(10, 2, 2, id="no more than there are cells"),
    ],
)
def test_features_idle_longest_start_again_first(start, idle, n_cells, n_restarted):
    backend, used = start("vanilla")
    order = np.random.default_rng(1).permutation(H)
    before = decoder(backend)
    for step, feature in enumerate(order):
        backend.step(before[[feature]], step + 1, 0.0)
    np.testing.assert_array_equal(backend.last_fired[order], np.arange(H) + 1)
    restart_dead(backend, positive_cells(n_cells), H + 1, idle, used)
    assert set(changed(before, decoder(backend))) == set(order[:n_restarted])


@pytest.mark.parametrize(("share", "restarts"), [(0.91, False), (0.89, True)])
def test_spare_features_stay_dead_where_a_hundredth_or_less_is_missing(start, share, restarts):
    """What is missing of each cell is 1 − share, squared .0081 or .0121."""
    backend, used = start(share=share)
    before = decoder(backend)
    restart_dead(backend, positive_cells(), 10, 10, used)
    assert (len(changed(before, decoder(backend))) > 0) is restarts


def test_the_seed_and_the_step_choose_the_cells(start):
    found = []
    for seed, step in ((0, 10), (0, 10), (1, 10), (0, 11)):
        backend, used = start()
        restart_dead(backend, positive_cells(), step, 10, replace(used, seed=seed))
        found.append(decoder(backend))
    one, same, other_seed, other_step = found
    np.testing.assert_array_equal(one, same)
    assert (one != other_seed).any() and (one != other_step).any()


@pytest.mark.parametrize(
    ("steps", "idle", "every"),
    [
        pytest.param(1000, 4, 50, id="every 50 steps"),
        pytest.param(10_000, 4, 200, id="50 times"),
        pytest.param(1000, 130, 130, id="time to have been idle"),
    ],
)
def test_restarts_leave_the_last_fifth_of_the_steps_for_learning(settings, steps, idle, every):
    found = list(restart_steps(settings(steps=steps), idle))
    assert found == [step for step in range(steps) if (step + 1) % every == 0 and step < 0.8 * steps]


def test_paper_has_no_restarts(settings):
    assert len(restart_steps(settings("vanilla", steps=10_000, paper=True), 4)) == 0


# ---- In training


@pytest.fixture
def start_dead(monkeypatch):
    """Call it with features: training starts with them far below 0."""

    def start_dead(features):
        def weights(*args):
            start = initial_weights(*args)
            start["b_enc"][features] = -100
            return start

        monkeypatch.setattr(training, "initial_weights", weights)

    return start_dead


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_that_start_dead_come_alive(x, trained, start_dead, monkeypatch, architecture):
    dead = np.arange(0, 32, 2)
    start_dead(dead)
    restarted = trained(x, architecture=architecture, steps=1000)
    monkeypatch.setattr(module, "RESTART_UNTIL", 0)
    left = trained(x, architecture=architecture, steps=1000)
    assert left.history[-1].dead_fraction >= 0.5
    assert not left.autoencoder.encode(x).activations[:, dead].nnz
    assert restarted.history[-1].dead_fraction < 0.25
    assert (restarted.autoencoder.encode(x).activations.getnnz(axis=0)[dead] > 0).mean() > 0.5


def test_paper_leaves_dead_features_dead(x, trained, start_dead):
    start_dead(np.arange(8))
    found = trained(x, architecture="vanilla", paper=True, steps=200)
    assert found.history[-1].dead_fraction >= 0.25
