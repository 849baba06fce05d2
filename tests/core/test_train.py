from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from sae.core import train as module
from sae.core.architectures import ARCHITECTURES
from sae.core.preprocess import PREPROCESS, fit_scaling
from sae.core.train import (
    DivergedError,
    Settings,
    batches,
    initial_directions,
    learning_rate_factor,
    nested_groups,
    train,
)

N, D, TRUE, ACTIVE = 2000, 16, 24, 3
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture(scope="module")
def directions():
    """True unit directions (features, d)."""
    drawn = np.random.default_rng(0).normal(size=(TRUE, D))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def x(directions):
    """Cells (n, d), each a sum of three true directions with weights of 1 to 2."""
    rng = np.random.default_rng(1)
    active = rng.random((N, TRUE)).argsort(axis=1) < ACTIVE
    return (np.where(active, rng.uniform(1, 2, size=(N, TRUE)), 0) @ directions).astype(np.float32)


def settings(architecture="topk", *, k=ACTIVE, l1=1.0, n_features=32, learning_rate=3e-3, steps=60, **rest):
    given = {"groups": (n_features,), "batch_size": 256, "seed": 0, "device": "cpu"} | rest
    return Settings(architecture, n_features, k=k, l1=l1, learning_rate=learning_rate, steps=steps, **given)


def trained(x, preprocess="center", *, n_val=200, on_step=None, **given):
    """The SAE and its history."""
    rows = np.arange(x.shape[0])
    split = len(rows) - n_val
    return train(
        x,
        fit_scaling(x, preprocess),
        settings(**given),
        train_rows=rows[:split],
        val_rows=rows[split:],
        on_step=on_step,
    )


def assert_equal_weights(one, other):
    for name in WEIGHTS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
def test_same_seed_gives_the_same_weights_to_the_bit(x, architecture):
    (one, history), (other, again) = (trained(x, architecture=architecture) for _ in range(2))
    assert_equal_weights(one, other)
    assert history == again


def test_another_seed_gives_other_weights(x):
    one, other = (trained(x, seed=seed)[0] for seed in (0, 1))
    for name in WEIGHTS:
        assert not np.allclose(getattr(one, name), getattr(other, name)), name


def test_global_generators_are_neither_read_nor_moved(x):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = trained(x, steps=5)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert_equal_weights(one, trained(x, steps=5)[0])


def test_csr_trains_as_dense(x):
    thinned = np.where(np.abs(x) > 0.5, x, 0)
    assert_equal_weights(trained(thinned)[0], trained(sparse.csr_matrix(thinned))[0])


def test_weights_come_from_the_training_rows_alone(x):
    scaling, rows = fit_scaling(x, "center"), np.arange(N)
    other = x.copy()
    other[::2] = 7
    one, same = (train(matrix, scaling, settings(), train_rows=rows[1::2], val_rows=rows[::2]) for matrix in (x, other))
    assert_equal_weights(one[0], same[0])
    assert one[1][-1].fvu == same[1][-1].fvu
    assert one[1][-1].val_fvu != same[1][-1].val_fvu


@pytest.mark.parametrize("preprocess", PREPROCESS)
@each_architecture
def test_decoder_rows_have_unit_norm_in_the_training_space(x, architecture, preprocess):
    forward = fit_scaling(x, preprocess).forward
    W_dec = trained(x, preprocess, architecture=architecture)[0].W_dec
    norms = np.linalg.norm(W_dec * forward if forward.ndim == 1 else W_dec @ forward, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize("preprocess", PREPROCESS)
@each_architecture
def test_history_ends_with_what_the_exported_sae_does_on_raw_cells(x, architecture, preprocess):
    raw = np.column_stack([3 * x[:, 0] + 5, x[:, 1:], np.full(N, 2.5)]).astype(np.float32)
    sae, history = trained(raw, preprocess, architecture=architecture)
    parts = {"": raw[:1800], "val_": raw[1800:]}
    for prefix, part in parts.items():
        encoded = sae.encode(part)
        centred = raw.astype(np.float64) - raw.mean(axis=0, dtype=np.float64)
        fvu = encoded.squared_error.mean() / np.square(centred).sum(axis=1).mean()
        np.testing.assert_allclose(getattr(history[-1], f"{prefix}fvu"), fvu, rtol=1e-4)
        np.testing.assert_allclose(getattr(history[-1], f"{prefix}l0"), encoded.activations.nnz / len(part), rtol=1e-3)


@each_architecture
def test_exported_sae_computes_what_was_trained(architecture):
    kind, generator = ARCHITECTURES[architecture], torch.Generator().manual_seed(0)
    parameters = module._Parameters(kind, torch.randn(10, 6, generator=generator))
    assert {name for name, _ in parameters.named_parameters()} == {*WEIGHTS, *(["b_pre"] if kind.pre_bias else [])}
    with torch.no_grad():
        for values in parameters.parameters():
            values.add_(torch.randn(values.shape, generator=generator))
    k = 4 if kind.sparsity == "k" else None
    y = torch.randn(50, 6, generator=generator)
    activations = parameters.activate(y, k)
    *_, reconstruction = parameters.reconstructions(activations, (10,))
    a, y_hat = activations.detach().numpy(), reconstruction.detach().numpy()
    sae = parameters.export(kind, k)
    assert (sae.activation, sae.k) == (kind.activation, k)
    found = sae.encode(y.numpy()).activations
    np.testing.assert_allclose(found.toarray(), a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found), y_hat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
def test_learning_rate_warms_up_stays_and_decays(steps):
    factors = np.array([learning_rate_factor(step, steps) for step in range(steps)])
    assert ((factors > 0) & (factors <= 1)).all()
    warm_up, decay = max(1, round(0.05 * steps)), max(1, round(0.2 * steps))
    np.testing.assert_allclose(factors[:warm_up], np.arange(1, warm_up + 1) / warm_up)
    np.testing.assert_allclose(factors[steps - decay :], np.arange(decay, 0, -1) / decay)
    assert (factors[warm_up : steps - decay] == 1).all()


def test_each_step_has_its_own_learning_rate(x, monkeypatch):
    monkeypatch.setattr(module, "learning_rate_factor", lambda step, steps: float(step < 3))
    stopped, three = (trained(x, steps=steps)[0] for steps in (10, 3))
    for name in WEIGHTS:
        np.testing.assert_allclose(getattr(stopped, name), getattr(three, name), rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("n", "size"),
    [pytest.param(12, 4, id="whole batches"), pytest.param(10, 4, id="remainder"), pytest.param(3, 7, id="few rows")],
)
def test_batches_take_each_row_once_per_pass(n, size):
    taken = list(itertools.islice(batches(n, size, np.random.default_rng(0)), 2 * n))
    assert {len(batch) for batch in taken} == {size}
    passes = np.concatenate(taken).reshape(-1, n)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.broadcast_to(np.arange(n), passes.shape))
    assert len(np.unique(passes, axis=0)) > 1


@each_architecture
def test_training_explains_an_easy_dictionary(x, architecture):
    history = trained(x, architecture=architecture, steps=400)[1]
    assert history[-1].fvu < 0.3 < history[0].fvu
    assert history[-1].val_fvu < 0.3


def test_topk_finds_the_true_directions(x, directions):
    W_dec = trained(x, k=4, n_features=48, learning_rate=1e-2, steps=1000)[0].W_dec
    cosine = directions @ (W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)).T
    assert (cosine.max(axis=1) > 0.9).mean() >= 0.9


def test_topk_has_at_most_k_active_features(x):
    sae, history = trained(x, k=5)
    assert sae.encode(x).activations.getnnz(axis=1).max() == 5
    assert max(record.l0 for record in history) <= 5


@pytest.mark.parametrize("architecture", ["vanilla", "relu"])
def test_larger_l1_gives_fewer_active_features(x, architecture):
    l0 = [trained(x, architecture=architecture, l1=l1, steps=300)[1][-1].l0 for l1 in (0.0, 1.0, 4.0)]
    assert l0[0] > 1.2 * l0[1] > 1.2**2 * l0[2]


def test_features_that_stopped_firing_two_passes_ago_are_dead(x):
    history = trained(x, architecture="vanilla", l1=1e3, steps=100, learning_rate=3e-2)[1]
    assert history[0].dead_fraction == 0
    assert history[-1].dead_fraction == 1
    assert history[-1].l0 == 0


def test_without_held_out_cells_their_columns_are_nan(x):
    history = trained(x, n_val=0, steps=10)[1]
    assert np.isnan([[record.val_fvu, record.val_l0] for record in history]).all()
    assert np.isfinite([[record.fvu, record.l0, record.loss] for record in history]).all()


@pytest.mark.parametrize(("steps", "recorded"), [(3, [1, 2, 3]), (101, [*range(2, 101, 2), 101])])
def test_every_step_is_announced_and_about_fifty_are_recorded(x, steps, recorded):
    calls = []
    history = trained(x, steps=steps, on_step=lambda step, record: calls.append((step, record)))[1]
    assert [step for step, _ in calls] == list(range(steps))
    assert [record for _, record in calls if record is not None] == history
    assert [record.step for record in history] == recorded
    rates = [3e-3 * learning_rate_factor(step - 1, steps) for step in recorded]
    np.testing.assert_allclose([record.learning_rate for record in history], rates)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_diverged_training_says_what_to_try(x, architecture):
    with pytest.raises(DivergedError, match=r"at step [12] of 20.*try learning_rate=1e\+19"):
        trained(x, architecture=architecture, learning_rate=1e20, steps=20)


def test_batch_may_be_larger_than_the_training_set(x):
    sae = trained(x[:40], n_val=10, batch_size=64, steps=5)[0]
    assert np.isfinite(sae.W_enc).all()


def test_device_is_taken_as_given_and_auto_is_one_that_is_there():
    assert module.choose_device("cpu") == "cpu"
    assert torch.zeros(1, device=module.choose_device("auto")).sum() == 0


def test_settings_of_the_other_kind_of_sparsity_are_not_used(x):
    for architecture, unused in (("topk", {"l1": 9.0}), ("vanilla", {"k": 1})):
        one, other = (trained(x, architecture=architecture, steps=5, **given)[0] for given in ({}, unused))
        assert_equal_weights(one, replace(other, k=one.k))


@pytest.mark.parametrize(
    ("n_features", "groups"),
    [
        (1, (1,)),
        (15, (15,)),
        (16, (8, 16)),
        (64, (8, 16, 32, 64)),
        (100, (12, 25, 50, 100)),
        (128, (8, 16, 32, 64, 128)),
    ],
)
def test_nested_groups_halve_the_dictionary_down_to_eight(n_features, groups):
    assert nested_groups(n_features) == groups


def test_each_group_reconstructs_from_its_first_features():
    generator = torch.Generator().manual_seed(0)
    parameters = module._Parameters(ARCHITECTURES["topk"], torch.randn(12, 5, generator=generator))
    with torch.no_grad():
        parameters.b_dec.add_(torch.randn(5, generator=generator))
    a = torch.rand(7, 12, generator=generator)
    found = list(parameters.reconstructions(a, (3, 6, 12)))
    for stop, x_hat in zip((3, 6, 12), found, strict=True):
        expected = a[:, :stop] @ parameters.W_dec[:stop] + parameters.b_dec
        torch.testing.assert_close(x_hat, expected)


def test_first_features_of_a_nested_dictionary_explain_more_than_those_of_a_plain_one(x):
    def explained_by_the_first_eight(groups):
        sae = trained(x, groups=groups, steps=600)[0]
        a = sae.encode(x).activations.toarray()
        a[:, 8:] = 0
        return 1 - np.square(x - sae.decode(a)).sum() / np.square(x - x.mean(axis=0)).sum()

    assert explained_by_the_first_eight((8, 16, 32)) > explained_by_the_first_eight((32,)) + 0.05


def test_initial_directions_are_unit_vectors_near_cells_and_distinct():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(20, 50, generator=generator)
    found = initial_directions(y, 200, generator)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(200))
    cosine = found @ torch.nn.functional.normalize(y, dim=1).T
    # Noise of the same length, at right angles to it, leaves 1 / sqrt(2) of a direction.
    assert abs(float(cosine.max(dim=1).values.median()) - 2**-0.5) < 0.05
    assert len(torch.unique(found, dim=0)) == 200
