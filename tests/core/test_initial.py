from __future__ import annotations

import numpy as np
import pytest

from sae.core.architectures import ARCHITECTURES
from sae.core.initial import initial_directions, initial_weights
from sae.core.preprocess import fit_scaling
from sae.core.train import make_backend

each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def test_initial_directions_are_unit_vectors_near_cells_and_distinct():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((20, 50)).astype(np.float32)
    found = initial_directions(y, np.ones(50), 200, rng)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    cosine = found @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T
    # Noise of the same length, at right angles to it, leaves 1 / sqrt(2) of a direction.
    assert abs(np.median(cosine.max(axis=1)) - 2**-0.5) < 0.05
    assert len(np.unique(found, axis=0)) == 200


def test_noise_in_the_initial_directions_is_spread_like_the_cells():
    y, spread = np.eye(1, 301, dtype=np.float32), np.repeat([0.0, 1, 3, 0], [1, 100, 100, 100])
    found = initial_directions(y, spread, 200, np.random.default_rng(0))
    narrow, wide, none = np.split(found[:, 1:], 3, axis=1)
    assert np.square(wide).mean() == pytest.approx(9 * np.square(narrow).mean(), rel=0.05)
    assert not none.any()


@each_architecture
def test_first_encoder_is_the_decoder_times_a_factor(x, settings, architecture):
    start = initial_weights(x, np.ones(x.shape[1]), settings(architecture))
    ratio = start["W_enc"] / start["W_dec"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(start["W_dec"], axis=1), 1, rtol=1e-5)
    assert not start["b_enc"].any() and not start["b_dec"].any()


@pytest.mark.parametrize("architecture", ["topk", "vanilla", "relu"])
def test_no_other_factor_of_the_encoder_reconstructs_better(x, settings, architecture):
    scaling, used = fit_scaling(x, "center"), settings(architecture)
    y = scaling.transform(x)
    start = initial_weights(y, scaling.spread, used)
    errors = []
    for factor in (0.97, 1.0, 1.03):
        backend = make_backend(start | {"W_enc": (factor * start["W_enc"]).astype(np.float32)}, used)
        errors.append(np.square(backend.evaluate(y)[0]).sum(dtype=np.float64))
        backend.close()
    assert errors[1] < min(errors[0], errors[2])


def test_features_of_nested_dictionaries_start_weaker(x, settings):
    """At the square of the factor that is best for reconstructing once: they do it several times over."""
    lengths = []
    for groups in ((32,), (8, 32), (8, 16, 32)):
        start = initial_weights(x, np.ones(x.shape[1]), settings("batchtopk", groups=groups))
        lengths.append(np.linalg.norm(start["W_enc"], axis=1))
    plain, *nested = lengths
    assert 0.1 < plain.max() < 0.9
    for length in nested:
        np.testing.assert_allclose(length, plain**2, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["vanilla", "relu", "topk"])
def test_paper_starts_from_uniform_weights(x, settings, architecture):
    """As torch's linear layers: within 1 / sqrt(inputs of the layer)."""
    d, h = x.shape[1], 400
    start = initial_weights(x, np.ones(d), settings(architecture, n_features=h, paper=True))
    bounds = {"W_enc": d**-0.5, "W_dec": h**-0.5}
    bounds |= {"b_enc": d**-0.5, "b_dec": h**-0.5} if architecture == "vanilla" else {}
    for name, bound in bounds.items():
        values = np.abs(start[name])
        assert 0.8 * bound < values.max() <= bound, name
        assert abs(np.mean(values) / bound - 0.5) < 0.2, name
        assert abs(np.mean(start[name] > 0) - 0.5) < 0.4, name
    for name in {"b_enc", "b_dec"} - bounds.keys():
        assert not start[name].any(), name
    shapes = {name: value.shape for name, value in start.items()}
    assert shapes == {"W_enc": (h, d), "b_enc": (h,), "W_dec": (h, d), "b_dec": (d,)}


def test_a_frozen_decoder_has_random_directions_as_spread_as_the_cells(x, settings):
    spread = np.linspace(0.1, 2, x.shape[1])
    weights = initial_weights(x, spread, settings(n_features=8000, frozen_decoder=True))["W_dec"]
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, rtol=1e-5)
    drawn = np.random.default_rng(1).normal(size=(8000, x.shape[1])) * spread
    expected = np.square(drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(np.square(weights).mean(axis=0), expected, rtol=0.1)
    np.testing.assert_allclose(weights.mean(axis=0), 0, atol=0.02)
