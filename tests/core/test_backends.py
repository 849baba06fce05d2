from __future__ import annotations

import numpy as np
import pytest
import torch

from sae.core import backend_numba, backend_torch
from sae.core.architectures import ARCHITECTURES
from sae.core.backend import FIRST_K_TIMES, Settings, group_weights
from sae.core.backend_numba import NumbaBackend
from sae.core.backend_torch import TorchBackend

N, D, H, K = 1500, 12, 60, 5
RATE = 3e-3
BACKENDS = {"compiled": NumbaBackend, "torch": TorchBackend}
COMPILED = [name for name, architecture in ARCHITECTURES.items() if architecture.compiled]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_compiled = pytest.mark.parametrize("architecture", COMPILED)
TRAINED_BY = [("compiled", name) for name in COMPILED] + [("torch", name) for name in ARCHITECTURES]
each_training = pytest.mark.parametrize(("backend", "architecture"), TRAINED_BY)
NESTED = (15, 30, H)
CALIBRATED = ("batchtopk", "matryoshka")


def cells(n=N, d=D, h=H, *, seed=0):
    """Cells (n, d), sums of about three of h true directions."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, h)) < 3 / h
    return ((rng.random((n, h)) + 0.5) * active @ rng.standard_normal((h, d))).astype(np.float32)


def initial(d=D, h=H, *, seed=1):
    """Weights with unit rows of the decoder, an encoder of its own and biases that are not 0."""
    rng = np.random.default_rng(seed)
    W_enc, W_dec = rng.standard_normal((2, h, d)).astype(np.float32)
    biases = {"b_enc": 0.2 * rng.standard_normal(h), "b_dec": 0.2 * rng.standard_normal(d)}
    unit = {"W_enc": W_enc / 2, "W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)}
    return unit | {name: value.astype(np.float32) for name, value in biases.items()}


def settings(architecture, *, n_features=H, k=K, l1=0.5, l0=0.05, **rest):
    sparsity = ARCHITECTURES[architecture].sparsity
    given = {"k": k, "l1": l1, "l0": l0}
    own = {name: value if name == sparsity else None for name, value in given.items()}
    groups = NESTED if architecture == "matryoshka" else (n_features,)
    common = {"groups": groups, "learning_rate": RATE, "steps": 1000, "batch_size": 200, "seed": 0, "device": "cpu"}
    return Settings(architecture, n_features, **(common | own | rest))


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """Also on a CPU that is faster with less."""
    monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_INPUTS", 10**9)


@pytest.fixture
def make():
    """Factory of back ends that are closed at the end."""
    made = []

    def make(backend, architecture, weights=None, **given):
        weights = initial() if weights is None else weights
        made.append(BACKENDS[backend](weights, ARCHITECTURES[architecture], settings(architecture, **given)))
        return made[-1]

    yield make
    for backend in made:
        backend.close()


def batches(x, steps, *, size=200, seed=2):
    rng = np.random.default_rng(seed)
    return [x[rng.permutation(len(x))[:size]] for _ in range(steps)]


def steps_of(backend, given, *, first=0, rate=RATE, pressure=1.0):
    return np.array([backend.step(y, first + number, rate, pressure) for number, y in enumerate(given)])


def copied(arrays):
    return {name: np.array(value) for name, value in arrays.items()}


def assert_same_arrays(one, other):
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# ---- The two back ends against each other


def tolerance(architecture):
    """Of two equal features, rounding decides which one is chosen; a penalty changes little for both."""
    return 1e-4 if ARCHITECTURES[architecture].sparsity == "k" else 1e-5


CASES = {
    "topk": ("topk", {}),
    "topk nested": ("topk", {"groups": NESTED}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "vanilla": ("vanilla", {}),
    "vanilla nested": ("vanilla", {"groups": NESTED, "l1": 0.2}),
    "vanilla, soon sparse": ("vanilla", {"l1": 6.0}),
    "relu": ("relu", {}),
    "relu, soon sparse": ("relu", {"l1": 6.0}),
    "paper vanilla": ("vanilla", {"paper": True}),
    "paper relu": ("relu", {"paper": True}),
    "paper topk": ("topk", {"paper": True}),
}


@pytest.mark.parametrize(("architecture", "given"), CASES.values(), ids=CASES)
def test_back_ends_agree(make, architecture, given):
    x = cells()
    compiled, torched = (make(backend, architecture, **given) for backend in BACKENDS)
    taken = batches(x, 50)
    # At a higher rate, a feature that is just active in one and not in the other would soon tell them apart.
    losses = [steps_of(backend, taken, rate=1e-3) for backend in (compiled, torched)]
    np.testing.assert_allclose(*losses, rtol=tolerance(architecture))
    found, expected = compiled.weights(), torched.weights()
    for name, value in expected.items():
        assert np.abs(value - initial().get(name, 0)).max() > 1e-3, name
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
    # A feature that is next to its threshold may be active in a cell more or less.
    assert (compiled.last_fired != torched.last_fired).mean() < 0.05
    if architecture in CALIBRATED:
        for backend in (compiled, torched):
            backend.calibrate(x[:500])
    for (residuals, counts), (other, other_counts) in [(compiled.evaluate(x), torched.evaluate(x))]:
        assert (counts != other_counts).mean() < 0.01
        np.testing.assert_allclose(np.square(residuals).sum(), np.square(other).sum(), rtol=1e-4)


@pytest.mark.parametrize("architecture", ["vanilla", "relu"])
def test_steps_of_features_that_are_mostly_silent_are_sparse_and_the_same(make, monkeypatch, architecture):
    taken, trained = batches(cells(), 40), {}
    for phase, below in (("dense", 0.0), ("switched", 0.3), ("sparse", 1.1)):
        monkeypatch.setattr(backend_numba, "SPARSE_BELOW", below)
        backend, densities = make("compiled", architecture, l1=4.0), []
        losses = []
        for number, y in enumerate(taken):
            losses.append(backend.step(y, number, 1e-2))
            densities.append(backend._density)
        trained[phase] = losses, densities, copied(backend.weights()), backend.last_fired.copy()
    densities = np.array(trained["dense"][1])
    assert densities[0] > 0.3 > densities[-1] > 0
    for phase in ("switched", "sparse"):
        np.testing.assert_allclose(trained[phase][0], trained["dense"][0], rtol=1e-5)
        np.testing.assert_allclose(trained[phase][1], densities, rtol=1e-3)
        for name, value in trained["dense"][2].items():
            np.testing.assert_allclose(trained[phase][2][name], value, rtol=1e-3, atol=2e-4, err_msg=name)
        assert (trained[phase][3] != trained["dense"][3]).mean() < 0.05


def test_an_l1_sae_switches_to_sparse_steps(make, monkeypatch):
    taken = batches(cells(), 60)
    kinds = []
    for name in ("update_dense", "update_features"):
        kernel = getattr(backend_numba.kernels, name)
        monkeypatch.setattr(
            backend_numba.kernels, name, lambda *args, kernel=kernel, name=name: (kinds.append(name), kernel(*args))[1]
        )
    steps_of(make("compiled", "vanilla", l1=6.0), taken, rate=2e-2)
    assert kinds[0] == "update_dense" and kinds[-1] == "update_features"


@pytest.mark.parametrize(("backend", "architecture"), [*TRAINED_BY, ("sparse", "vanilla")])
def test_a_frozen_decoder_stays_and_the_encoder_learns(make, monkeypatch, backend, architecture):
    if backend == "sparse":
        monkeypatch.setattr(backend_numba, "SPARSE_BELOW", 1.0)
    trained = make("torch" if backend == "torch" else "compiled", architecture, frozen_decoder=True)
    taken = batches(cells(), 40)
    losses = steps_of(trained, taken)
    np.testing.assert_array_equal(trained.weights()["W_dec"], initial()["W_dec"])
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()
    assert np.abs(trained.weights()["W_enc"] - initial()["W_enc"]).max() > 0.01
    again = make("torch" if backend == "torch" else "compiled", architecture, frozen_decoder=True)
    if backend != "torch":
        again.load(copied(trained.state()))
        np.testing.assert_array_equal(steps_of(again, taken[:2], first=40), steps_of(trained, taken[:2], first=40))


@pytest.mark.skipif(not backend_numba._has_bfloat16(), reason="this CPU has no fast bfloat16 products")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_narrow_products_train_as_well(make, monkeypatch, architecture):
    """The encoder product in bfloat16 chooses features, their values are of float32."""
    d, losses = 40, {}
    x, weights = cells(d=d), initial(d=d)
    for kind, width in (("bfloat16", d), ("float32", d + 1)):
        monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_PRODUCTS", 0)
        monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_INPUTS", width)
        backend = make("compiled", architecture, weights)
        assert backend._may_narrow is (kind == "bfloat16")
        losses[kind] = steps_of(backend, batches(x, 200), rate=1e-2)
    narrow, wide = losses["bfloat16"], losses["float32"]
    np.testing.assert_allclose(narrow[0], wide[0], rtol=1e-2)
    np.testing.assert_allclose(narrow[-20:].mean(), wide[-20:].mean(), rtol=0.03)
    assert wide[-20:].mean() < 0.6 * wide[0]


@pytest.mark.skipif(not backend_numba._has_bfloat16(), reason="this CPU has no fast bfloat16 products")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_evaluation_is_of_float32_products(make, monkeypatch, architecture):
    x, weights = cells(d=40), initial(d=40)
    backends = {}
    for width in (40, 41):
        monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_PRODUCTS", 0)
        monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_INPUTS", width)
        backends[width] = make("compiled", architecture, weights)
        backends[width].threshold = 0.5
    assert_same_arrays(*(dict(enumerate(backend.evaluate(x))) for backend in backends.values()))


# ---- Threads


@each_compiled
def test_number_of_threads_changes_nothing(make, monkeypatch, architecture):
    monkeypatch.setattr(backend_numba, "PRODUCTS_PER_THREAD", 1)
    # Three blocks of rows; three tiles of features.
    h = 2 * backend_numba.TILE_FEATURES + 7
    x, weights = cells(800, h=h), initial(h=h)
    trained = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(backend_numba, "available_threads", lambda threads=threads: threads)
        rest = {"n_features": h, "batch_size": 300, "groups": (100, h) if architecture == "matryoshka" else (h,)}
        backend = make("compiled", architecture, weights, l1=4.0, **rest)
        assert backend._workers.n == threads
        losses = steps_of(backend, batches(x, 12, size=300), rate=1e-2)
        residuals, counts = backend.evaluate(x)
        found = {"losses": losses, "residuals": residuals, "counts": counts, **copied(backend.state())}
        if architecture in CALIBRATED:
            backend.calibrate(x)
        trained.append(found | {"threshold": np.array(backend.threshold)})
    assert trained[0]["losses"][-1] < trained[0]["losses"][0]
    assert_same_arrays(trained[0], trained[1])
    assert_same_arrays(trained[0], trained[2])


@pytest.mark.parametrize("architecture", ["vanilla", "relu"])
def test_number_of_threads_changes_nothing_in_sparse_steps_of_l1(make, monkeypatch, architecture):
    monkeypatch.setattr(backend_numba, "PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(backend_numba, "SPARSE_BELOW", 1.1)
    x, trained = cells(), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(backend_numba, "available_threads", lambda threads=threads: threads)
        backend = make("compiled", architecture)
        steps_of(backend, batches(x, 12), rate=1e-2)
        trained.append(copied(backend.state()))
    assert_same_arrays(trained[0], trained[1])
    assert_same_arrays(trained[0], trained[2])


def test_small_problems_are_left_to_one_thread(make, monkeypatch):
    monkeypatch.setattr(backend_numba, "available_threads", lambda: 3)
    assert make("compiled", "topk")._workers.n == 1
    monkeypatch.setattr(backend_numba, "PRODUCTS_PER_THREAD", 200 * D * H // 2)
    assert make("compiled", "topk")._workers.n == 2


# ---- Evaluation, calibration and the record of what fired


@pytest.mark.parametrize("architecture", CALIBRATED)
@each_backend
def test_after_calibration_cells_have_k_active_features_on_average(make, backend, architecture):
    x = cells()
    made = make(backend, architecture)
    steps_of(made, batches(x, 20))
    before = copied(made.weights())
    made.calibrate(x)
    assert_same_arrays(before, made.weights())
    counts = made.evaluate(x)[1]
    assert counts.mean() == K
    assert counts.std() > 0.5
    W_enc, b_enc = before["W_enc"].astype(np.float64), before["b_enc"]
    largest = -np.sort(-(x @ W_enc.T + b_enc).ravel())
    # Half-way, so that the rounding of another machine moves no cell across it.
    assert made.threshold == pytest.approx((largest[N * K] + largest[N * K - 1]) / 2, rel=1e-6)


@each_backend
def test_calibration_with_too_few_positive_values_keeps_them_all(make, backend):
    weights = initial()
    weights["b_enc"] -= 8
    made, x = make(backend, "batchtopk", weights), cells()
    made.calibrate(x)
    assert made.threshold == 0
    counts = made.evaluate(x)[1]
    assert 0 < counts.mean() < K
    np.testing.assert_array_equal(counts, (x @ weights["W_enc"].T + weights["b_enc"] > 0).sum(axis=1))


@each_training
def test_evaluation_is_row_by_row(make, backend, architecture):
    """Whatever the size of the batch that it is done in."""
    x = cells()
    made = make(backend, architecture, batch_size=200)
    steps_of(made, batches(x, 5))
    residuals, counts = made.evaluate(x)
    assert counts.min() < counts.max() or architecture == "topk"
    for size in (1, 7, 200, 1000):
        again, counts_again = made.evaluate(x[:size])
        np.testing.assert_allclose(again, residuals[:size], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(counts_again, counts[:size])


@each_training
def test_evaluation_between_steps_changes_nothing(make, backend, architecture):
    x = cells()
    taken, trained = batches(x, 8), []
    for interrupted in (False, True):
        made = make(backend, architecture)
        for number, y in enumerate(taken):
            made.step(y, number, RATE)
            if interrupted:
                made.evaluate(x[:450])
        # But for where the search for the largest values starts, which decides nothing.
        trained.append({name: value for name, value in copied(made.state()).items() if name != "scalars"})
    assert_same_arrays(*trained)


def silent_but_one(h=H, d=D):
    """Weights of features that cannot be active, but for number 2."""
    weights = initial(d, h)
    weights["b_enc"][:] = -100
    weights["b_enc"][2] = 5
    return weights


@each_training
def test_only_features_with_a_positive_value_have_fired(make, backend, architecture):
    """TopK selects k features however few are positive."""
    weights = silent_but_one()
    if architecture == "gated":
        weights["b_gate"] = weights["b_enc"]
    made = make(backend, architecture, weights)
    taken = batches(cells(), 4)
    for number, y in enumerate(taken, start=7):
        made.step(y, number, 1e-4)
    np.testing.assert_array_equal(made.last_fired, np.where(np.arange(H) == 2, 10, 0))
    assert made.evaluate(taken[0])[1].max() == 1


@pytest.mark.skipif(not backend_numba._has_bfloat16(), reason="this CPU has no fast bfloat16 products")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_a_value_that_is_positive_in_bfloat16_alone_has_not_fired(make, monkeypatch, architecture):
    monkeypatch.setattr(backend_numba, "BFLOAT16_FROM_INPUTS", D)
    weights, y = silent_but_one(), np.zeros((200, D), np.float32)
    # .9985² < .998, but in bfloat16 .9985 is 1 and .998 is .996.
    y[:, 0] = weights["W_enc"][4] = np.float32(0.9985)
    weights["b_enc"][4] = -0.998
    narrow = torch.tensor([0.9985]).bfloat16() ** 2 + torch.tensor([-0.998]).bfloat16()
    assert narrow > 0 > 0.9985**2 - 0.998
    made = make("compiled", architecture, weights)
    made.step(y, 5, 1e-4)
    np.testing.assert_array_equal(made.last_fired, np.where(np.arange(H) == 2, 5, 0))


@each_compiled
def test_a_step_on_fewer_cells_than_a_batch(make, architecture):
    x = cells()
    compiled, torched = (make(backend, architecture) for backend in BACKENDS)
    for backend in (compiled, torched):
        steps_of(backend, batches(x, 2), rate=1e-3)
        backend.evaluate(x)
    taken = [x[:50], x[50:180], x[180:200]]
    losses = [steps_of(backend, taken, first=2, rate=1e-3) for backend in (compiled, torched)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, value in torched.weights().items():
        np.testing.assert_allclose(compiled.weights()[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


def test_group_weights_are_shares():
    for n_groups in (1, 2, 5):
        weights = group_weights(n_groups)
        assert weights.shape == (n_groups,)
        assert (weights > 0).all()
        assert weights.sum() == pytest.approx(1, rel=1e-6)


# ---- Sparsity that is asked for little by little


PENALISED = [(backend, name) for backend, name in TRAINED_BY if ARCHITECTURES[name].sparsity != "k"]


@pytest.mark.parametrize(("backend", "architecture"), PENALISED)
def test_pressure_is_a_share_of_the_penalty(make, backend, architecture):
    sparsity = ARCHITECTURES[architecture].sparsity
    taken, full = batches(cells(), 10), getattr(settings(architecture), sparsity)
    partly = make(backend, architecture)
    weakly = make(backend, architecture, **{sparsity: 0.4 * full})
    losses = [steps_of(made, taken, pressure=pressure) for made, pressure in ((partly, 0.4), (weakly, 1.0))]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name, value in weakly.weights().items():
        np.testing.assert_allclose(partly.weights()[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert abs(steps_of(make(backend, architecture), taken)[0] - losses[0][0]) > 1e-3


@pytest.mark.parametrize(
    ("k", "pressure", "as_k"),
    [
        pytest.param(4, 0.0, 4 * FIRST_K_TIMES, id="at first"),
        pytest.param(5, 0.5, round(5 * FIRST_K_TIMES**0.5), id="half way"),
        pytest.param(25, 0.0, H // 2, id="half of the features"),
        pytest.param(40, 0.0, 40, id="but k at least"),
    ],
)
@each_backend
def test_without_full_pressure_more_than_k_features_are_active(make, backend, k, pressure, as_k):
    taken = batches(cells(), 10)
    one, other = make(backend, "topk", k=k), make(backend, "topk", k=as_k)
    np.testing.assert_array_equal(steps_of(one, taken, pressure=pressure), steps_of(other, taken))
    assert_same_arrays(one.weights(), other.weights())
    assert one.evaluate(taken[0])[1].max() <= k, "the evaluation is of k features"


@pytest.mark.parametrize("architecture", CALIBRATED)
@each_backend
def test_without_full_pressure_more_than_k_features_are_active_on_average(make, backend, architecture):
    taken = batches(cells(), 10)
    one, other = make(backend, architecture), make(backend, architecture, k=FIRST_K_TIMES * K)
    np.testing.assert_array_equal(steps_of(one, taken, pressure=0.0), steps_of(other, taken))
    assert_same_arrays(one.weights(), other.weights())
    one.calibrate(cells())
    assert one.evaluate(cells())[1].mean() == K


# ---- Going on from a state, and new directions for dead features


@each_training
def test_training_goes_on_from_a_state_to_the_bit(make, backend, architecture):
    x = cells()
    taken = batches(x, 16)
    one, other = (make(backend, architecture, l1=4.0) for _ in range(2))
    steps_of(one, taken[:8], rate=1e-2)
    state = copied(one.state())
    losses = steps_of(one, taken[8:], first=8, rate=1e-2)
    assert any(not np.array_equal(state[name], value) for name, value in one.state().items())
    other.load(state)
    assert_same_arrays(state, other.state())
    np.testing.assert_array_equal(steps_of(other, taken[8:], first=8, rate=1e-2), losses)
    assert_same_arrays(one.state(), other.state())
    assert_same_arrays(*(dict(enumerate(made.evaluate(x))) for made in (one, other)))
    if architecture in CALIBRATED:
        one.calibrate(x)
        other.calibrate(x)
    assert one.threshold == other.threshold


SECOND = ("_square", "_exp_avg_sq")
MOMENTS = (*SECOND, "_mean", "_exp_avg")


@pytest.mark.parametrize("length", [1.0, 3.0])
@each_training
def test_restarted_features_take_their_new_directions_and_train(make, backend, architecture, length):
    x, restarted = cells(), np.array([3, 17])
    weights = initial()
    weights["b_enc"][restarted] = -100
    if architecture == "gated":
        weights["b_gate"] = weights["b_enc"]
    made = make(backend, architecture, weights)
    taken = batches(x, 20)
    steps_of(made, taken[:10])
    before, loss_before = copied(made.state()), np.square(made.evaluate(x)[0]).sum()
    directions = x[[5, 8]] / np.linalg.norm(x[[5, 8]], axis=1, keepdims=True)
    made.restart(restarted, directions, length)
    after = copied(made.state())
    fresh = {"W_enc": (length * directions).astype(np.float32), "W_dec": directions}
    for name in ("W_enc", "W_dec"):
        np.testing.assert_array_equal(after[name][restarted], fresh[name])
    np.testing.assert_array_equal(after["b_enc"][restarted], 0)
    of_features = [name for name in after if name.startswith(("W_", "b_enc", "b_gate", "log_")) and after[name].ndim]
    moments = [name for name in of_features if name.endswith(MOMENTS)]
    assert len(moments) >= 6
    for name in moments:
        # Second moments of 0 would make the first steps far too long.
        expected = before[name].mean(axis=0) if name.endswith(SECOND) else np.zeros_like(before[name][0])
        for feature in restarted:
            np.testing.assert_allclose(after[name][feature], expected, rtol=1e-5, err_msg=name)
        assert before[name].any(), name
    for name in of_features:
        others = np.delete(before[name], restarted, axis=0)
        np.testing.assert_array_equal(np.delete(after[name], restarted, axis=0), others, err_msg=name)
    assert np.square(made.evaluate(x)[0]).sum() != loss_before, "the weights that the next step uses"
    steps_of(made, taken[10:], first=10)
    trained = made.weights()
    assert (made.last_fired[restarted] >= 10).all()
    for name in ("W_enc", "W_dec"):
        assert (np.abs(trained[name][restarted] - fresh[name]).max(axis=1) > RATE / 10).all()


# ---- Against plain loops of autograd and torch.optim.Adam


def sum_of_squares(y, y_hat):
    return (y - y_hat).square().sum(dim=1).mean()


def decoded(p, a):
    return a @ p["W_dec"] + p["b_dec"]


def topk_loss(p, y):
    pre = y @ p["W_enc"].T + p["b_enc"]
    a = torch.where(pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K], pre, 0).clamp(min=0)
    return sum_of_squares(y, decoded(p, a))


def of_the_batch(p, y):
    pre = (y @ p["W_enc"].T + p["b_enc"]).clamp(min=0)
    return torch.where(pre >= pre.flatten().sort(descending=True).values[K * len(y) - 1], pre, 0)


def batchtopk_loss(p, y):
    return sum_of_squares(y, decoded(p, of_the_batch(p, y)))


def matryoshka_loss(p, y):
    a = of_the_batch(p, y)
    parts = [sum_of_squares(y, a[:, :end] @ p["W_dec"][:end] + p["b_dec"]) for end in NESTED]
    return sum(weight * part for weight, part in zip(group_weights(len(NESTED)).tolist(), parts, strict=True))


def vanilla_loss(p, y):
    a = (y @ p["W_enc"].T + p["b_enc"]).clamp(min=0)
    return sum_of_squares(y, decoded(p, a)) + 0.5 * a.sum(dim=1).mean()


def relu_loss(p, y):
    a = ((y + p["b_pre"]) @ p["W_enc"].T + p["b_enc"]).clamp(min=0)
    return sum_of_squares(y, decoded(p, a)) + 0.5 * a.sum(dim=1).mean()


def jumprelu_loss(p, y):
    """arXiv:2407.14435, with pseudo-derivatives for θ: −θ/ε K((z − θ)/ε) of JumpReLU and −1/ε K((z − θ)/ε) of the step."""
    z = (y @ p["W_enc"].T + p["b_enc"]).clamp(min=0)
    theta, width = p["log_threshold"].exp(), backend_torch.BANDWIDTH
    kernel = (((z - theta) / width).abs() < 0.5).float().detach() / width
    above = (z > theta).float()
    # Is 0, and has the derivative 1.
    change = theta - theta.detach()
    a = z * above - theta.detach() * kernel * change
    return sum_of_squares(y, decoded(p, a)) + 0.05 * (above - kernel * change).sum(dim=1).mean()


def gated_loss(p, y):
    """arXiv:2404.16014: reconstruction, L1 of the gate, and reconstruction from the gate with the decoder frozen."""
    gate = y @ p["W_enc"].T + p["b_gate"]
    magnitude = (y @ (p["W_enc"] * p["log_scale"].exp()[:, None]).T + p["b_enc"]).clamp(min=0)
    frozen = {name: p[name].detach() for name in ("W_dec", "b_dec")}
    positive = gate.clamp(min=0)
    return (
        sum_of_squares(y, decoded(p, (gate > 0).float() * magnitude))
        + 0.5 * positive.sum(dim=1).mean()
        + sum_of_squares(y, decoded(frozen, positive))
    )


LOSSES = {
    "topk": topk_loss,
    "batchtopk": batchtopk_loss,
    "matryoshka": matryoshka_loss,
    "vanilla": vanilla_loss,
    "relu": relu_loss,
    "jumprelu": jumprelu_loss,
    "gated": gated_loss,
}
EXTRA = {
    "relu": {"b_pre": np.zeros(D)},
    "jumprelu": {"log_threshold": np.full(H, np.log(backend_torch.INITIAL_THRESHOLD))},
    "gated": {"log_scale": np.zeros(H), "b_gate": np.zeros(H)},
}


def trained_by_autograd(loss, start, taken, *, rate, unit_norm):
    parameters = {name: torch.tensor(value, dtype=torch.float32, requires_grad=True) for name, value in start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for y in taken:
        optimizer.zero_grad()
        value = loss(parameters, torch.from_numpy(y))
        value.backward()
        optimizer.step()
        if unit_norm:
            W_dec = parameters["W_dec"]
            W_dec.data = W_dec.data / W_dec.data.norm(dim=1, keepdim=True)
        losses.append(value.item())
    return np.array(losses), {name: value.detach().numpy() for name, value in parameters.items()}


@each_training
def test_steps_are_those_of_autograd_and_adam(make, backend, architecture):
    start, taken = initial() | EXTRA.get(architecture, {}), batches(cells(), 40)
    losses, weights = trained_by_autograd(LOSSES[architecture], start, taken, rate=1e-3, unit_norm=True)
    made = make(backend, architecture)
    np.testing.assert_allclose(steps_of(made, taken, rate=1e-3), losses, rtol=2 * tolerance(architecture))
    found = made.weights()
    for name, value in weights.items():
        assert np.abs(value - start[name]).max() > 1e-3, name
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


PAPER_L1, PAPER_RATE = 0.05, 1e-4


def paper_vanilla_loss(p, y):
    a = torch.relu(y @ p["W_enc"].T + p["b_enc"])
    return (decoded(p, a) - y).square().mean() + PAPER_L1 * a.abs().mean()


def paper_relu_loss(p, y):
    a = torch.relu((y + p["b_pre"]) @ p["W_enc"].T + p["b_enc"])
    return (decoded(p, a) - y).square().mean() + PAPER_L1 * a.abs().mean()


def paper_topk_loss(p, y):
    pre = (y + p["b_pre"]) @ p["W_enc"].T + p["b_enc"]
    kept = torch.zeros_like(pre).scatter(1, pre.argsort(dim=1, descending=True)[:, :K], 1.0)
    return (decoded(p, torch.relu(kept * pre)) - y).square().mean()


PAPER_LOSSES = {"vanilla": paper_vanilla_loss, "relu": paper_relu_loss, "topk": paper_topk_loss}


@pytest.mark.parametrize("architecture", PAPER_LOSSES)
@each_backend
def test_paper_steps_are_those_of_the_published_loss(make, backend, architecture):
    """arXiv:2410.11468: mean squared error and mean |a|, free decoder norms, and but for vanilla a free pre-bias."""
    rng = np.random.default_rng(3)
    shapes = {"W_enc": (D, (H, D)), "b_enc": (D, H), "W_dec": (H, (H, D)), "b_dec": (H, D)}
    start = {
        name: rng.uniform(-1, 1, shape).astype(np.float32) / np.float32(fan_in**0.5)
        for name, (fan_in, shape) in shapes.items()
    }
    # The published runs do not centre.
    taken = batches(cells() + 3, 50)
    pre_bias = {} if architecture == "vanilla" else {"b_pre": np.zeros(D)}
    losses, weights = trained_by_autograd(
        PAPER_LOSSES[architecture], start | pre_bias, taken, rate=PAPER_RATE, unit_norm=False
    )
    made = make(backend, architecture, start, paper=True, l1=PAPER_L1)
    np.testing.assert_allclose(steps_of(made, taken, rate=PAPER_RATE), losses, rtol=1e-5)
    found = made.weights()
    for name, value in weights.items():
        assert np.abs(value - (start | pre_bias)[name]).max() > 1e-3, name
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
