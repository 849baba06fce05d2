from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sae.core.fitting import Options, fit, options_of, plan, with_chosen_k
from sae.core.preprocess import PREPROCESS, directions, fit_scaling
from sae.core.restart import restart_steps
from sae.core.seeds import integer_seed

QUICK = {"n_features": 32, "steps": 60, "device": "cpu"}
EACH = {
    "topk": {"k": 3},
    "batchtopk": {"k": 4},
    "matryoshka": {},
    "vanilla": {"l1": 0.3},
    "relu": {},
    "jumprelu": {"l0": 0.02},
    "gated": {},
}


@pytest.mark.parametrize("architecture", EACH)
@pytest.mark.parametrize("preprocess", [None, "standardize"])
def test_options_of_a_stored_sae_train_it_again(x, architecture, preprocess):
    options = Options(architecture=architecture, preprocess=preprocess, **QUICK, **EACH[architecture])
    first = fit(plan(x, options, 3))
    spelled_out = options_of(first.params)
    again = fit(plan(x, replace(spelled_out, device="cpu"), 3))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_array_equal(getattr(first.autoencoder, name), getattr(again.autoencoder, name))
    assert first.params == again.params
    chosen = ("early_stopping", "device", "frozen_decoder", "k", "l1", "l0")
    assert None not in {name: value for name, value in vars(spelled_out).items() if name not in chosen}.values()
    assert sum(value is not None for value in (spelled_out.k, spelled_out.l1, spelled_out.l0)) == 1


def test_options_of_the_paper_recipe(x):
    options = Options(architecture="vanilla", recipe="paper", **QUICK)
    params = fit(plan(x, options, 0)).params
    assert options_of(params).recipe == "paper"
    assert fit(plan(x, replace(options_of(params), device="cpu"), 0)).params == params


def test_options_that_an_older_version_did_not_keep(x):
    params = fit(plan(x, Options(**QUICK), 0)).params | {"version": "0.0.1"}
    for name in ("recipe", "validation", "k"):
        with pytest.raises(ValueError, match=rf"stored without '{name}' .*version 0.0.1.* Run sae.tl.fit"):
            options_of({other: value for other, value in params.items() if other != name})


def test_seeds():
    assert [integer_seed(rng) for rng in (0, np.int32(7))] == [0, 7]
    assert integer_seed(np.random.default_rng(1)) == integer_seed(np.random.default_rng(1))
    for rng in (-1, 2**63, np.int64(-1)):
        with pytest.raises(ValueError, match=f"rng={rng} is no seed"):
            integer_seed(rng)


def test_cells_are_divided_by_the_seed(x):
    one, same, other = (plan(x, Options(validation=0.2, **QUICK), seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.val_rows, same.val_rows)
    assert not np.array_equal(one.val_rows, other.val_rows)
    assert sorted([*one.train_rows, *one.val_rows]) == list(range(len(x)))
    assert len(one.val_rows) == round(0.2 * len(x))


def test_goodness_is_of_the_cells_of_training_and_of_those_held_out(x):
    planned = plan(x, Options(**QUICK), 0)
    fitted = fit(planned)
    a = fitted.autoencoder.encode(x).activations.toarray().astype(np.float64)
    error = np.square(x - a @ fitted.autoencoder.W_dec - fitted.autoencoder.b_dec).sum(axis=1)
    variance = x.astype(np.float64).var(axis=0).sum()
    for prefix, rows in (("", planned.train_rows), ("val_", planned.val_rows)):
        np.testing.assert_allclose(fitted.params[f"{prefix}fvu"], error[rows].mean() / variance, rtol=1e-4)
        np.testing.assert_allclose(fitted.params[f"{prefix}l0"], (a[rows] > 0).sum(axis=1).mean(), rtol=1e-6)


@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_directions_are_unit_rows_of_the_training_space(x, preprocess):
    with_constant = np.column_stack([7 * x, np.full(len(x), 2.0)]).astype(np.float32)
    fitted = fit(plan(with_constant, Options(preprocess=preprocess, **QUICK), 0))
    found = fitted.directions
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-9)
    forward = fitted.scaling.forward
    W_dec = fitted.autoencoder.W_dec[:, fitted.scaling.kept].astype(np.float64)
    expected = W_dec * forward if forward.ndim == 1 else W_dec @ forward
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_directions_of_other_cells_have_the_same_axes(x, preprocess):
    """Eigenvectors have any sign, and near equal eigenvalues any order."""
    one, other = (fit_scaling(part, preprocess) for part in (x[::2], x[1::2]))
    W_dec = np.random.default_rng(0).normal(size=(40, x.shape[1]))
    pairs = (directions(W_dec, one.factors) * directions(W_dec, other.factors)).sum(axis=1)
    assert pairs.min() > 0.99


def test_directions_of_features_without_a_decoder_stay_zero():
    np.testing.assert_array_equal(directions(np.array([[0.0, 0.0], [3.0, 4.0]]), None), [[0, 0], [0.6, 0.8]])


@pytest.mark.parametrize("architecture", EACH)
def test_a_frozen_decoder_is_random_and_only_depends_on_the_seed(x, architecture):
    options = Options(
        architecture=architecture, frozen_decoder=True, preprocess="center", **QUICK, **EACH[architecture]
    )
    one, longer, other = (
        fit(plan(x, replace(options, steps=steps), seed)).directions for steps, seed in ((5, 0), (60, 0), (60, 1))
    )
    np.testing.assert_allclose(one, longer, atol=1e-6)
    cosine = np.abs(one @ other.T)
    assert cosine.mean() < 0.3


def test_dead_features_of_a_frozen_decoder_stay_where_they_are(settings):
    assert restart_steps(settings(steps=1000), 10)
    assert not restart_steps(settings(steps=1000, frozen_decoder=True), 10)


def test_k_is_chosen_once(x):
    planned = with_chosen_k(plan(x, Options(k="auto", **QUICK), 0))
    assert planned.settings.k == planned.chosen_k.k
    assert with_chosen_k(planned) is planned
    assert fit(planned).params["k"] == planned.settings.k


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"architecture": "tpok"}, ValueError, "architecture='tpok' is not one of"),
        ({"recipe": "paper"}, ValueError, "recipe='paper' trains"),
        ({"l1": 1.0}, ValueError, "made sparse by k=, not by l1="),
        ({"k": "most"}, ValueError, "neither a number"),
        ({"n_features": 2.5}, TypeError, "expected an integer"),
        ({"architecture": "vanilla", "l1": "much"}, TypeError, "l1='much' is a str"),
        ({"learning_rate": 0.0}, ValueError, "not above 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate=nan is not above 0 and finite"),
        ({"learning_rate": float("inf")}, ValueError, "not above 0 and finite"),
        ({"learning_rate": "high"}, TypeError, "learning_rate='high' is a str; expected a number"),
        ({"architecture": "vanilla", "l1": float("nan")}, ValueError, "l1=nan is negative or not finite"),
        ({"architecture": ["topk"]}, ValueError, "is not one of"),
        ({"validation": 1.0}, ValueError, "is not a share"),
        ({"validation": "0.1"}, TypeError, "validation='0.1' is a str"),
    ],
)
def test_bad_options_are_refused_when_they_are_made(given, error, message):
    with pytest.raises(error, match=message):
        Options(**given)


def test_too_few_cells(x):
    with pytest.raises(ValueError, match="the latent has 9 cells"):
        plan(x[:9], Options(), 0, where="the latent")
