from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext

import h5py
import numpy as np
import pytest
import torch
import zarr
from scipy import sparse

from sae.core import backend_numba, restart
from sae.core import train as module
from sae.core.architectures import ARCHITECTURES
from sae.core.backend_numba import NumbaBackend
from sae.core.backend_torch import TorchBackend
from sae.core.checkpoint import CheckpointError
from sae.core.initial import initial_weights
from sae.core.preprocess import PREPROCESS, fit_scaling
from sae.core.schedule import Schedule
from sae.core.train import DivergedError, make_backend, train

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
CALIBRATED = ("batchtopk", "matryoshka")


def weights_of(one):
    return {name: getattr(one.autoencoder, name) for name in WEIGHTS}


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@each_architecture
def test_same_seed_gives_the_same_weights_to_the_bit(x, trained, assert_equal_weights, architecture):
    one, other = (trained(x, architecture=architecture) for _ in range(2))
    assert_equal_weights(one, other)
    assert one.history == other.history
    assert (one.steps, one.ended) == (60, "finished")


def test_another_seed_gives_other_weights(x, trained):
    one, other = (weights_of(trained(x, seed=seed)) for seed in (0, 1))
    for name in WEIGHTS:
        assert not np.allclose(one[name], other[name]), name


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_global_generators_are_neither_read_nor_moved(x, trained, assert_equal_weights, architecture):
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = trained(x, architecture=architecture, steps=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(6)
    np.random.seed(6)
    assert_equal_weights(one, trained(x, architecture=architecture, steps=5))


def test_csr_trains_as_dense(x, trained, assert_equal_weights):
    thinned = np.where(np.abs(x) > 0.5, x, 0)
    assert_equal_weights(trained(thinned), trained(sparse.csr_matrix(thinned)))


@each_architecture
def test_weights_come_from_the_training_rows_alone(x, settings, architecture):
    scaling, rows = fit_scaling(x, "center"), np.arange(len(x))
    other = x.copy()
    other[::2] = 7
    one, same = (
        train(matrix, scaling, settings(architecture), train_rows=rows[1::2], val_rows=rows[::2])
        for matrix in (x, other)
    )
    for name in WEIGHTS:
        np.testing.assert_array_equal(weights_of(one)[name], weights_of(same)[name], err_msg=name)
    assert one.history[-1].fvu == same.history[-1].fvu
    assert one.history[-1].val_fvu != same.history[-1].val_fvu


@pytest.mark.parametrize("preprocess", PREPROCESS)
@each_architecture
def test_decoder_rows_have_unit_norm_in_the_training_space(x, trained, architecture, preprocess):
    forward = fit_scaling(x, preprocess).forward
    W_dec = trained(x, preprocess, architecture=architecture, steps=20).autoencoder.W_dec
    norms = np.linalg.norm(W_dec * forward if forward.ndim == 1 else W_dec @ forward, axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


@pytest.mark.parametrize("preprocess", PREPROCESS)
@each_architecture
def test_history_ends_with_what_the_exported_sae_does_on_raw_cells(x, trained, architecture, preprocess):
    raw = np.column_stack([3 * x[:, 0] + 5, x[:, 1:], np.full(len(x), 2.5)]).astype(np.float32)
    found = trained(raw, preprocess, architecture=architecture)
    last = found.history[-1]
    for prefix, part in (("", raw[:1800]), ("val_", raw[1800:])):
        encoded = found.autoencoder.encode(part)
        centred = raw.astype(np.float64) - raw.mean(axis=0, dtype=np.float64)
        fvu = encoded.squared_error.mean() / np.square(centred).sum(axis=1).mean()
        # Where the threshold is calibrated in the end, the records are of the last batch's.
        rtol = 0.2 if architecture in CALIBRATED else 1e-3
        np.testing.assert_allclose(getattr(last, f"{prefix}fvu"), fvu, rtol=rtol)
        np.testing.assert_allclose(getattr(last, f"{prefix}l0"), encoded.activations.nnz / len(part), rtol=rtol)


# ---- From training to the SAE of the raw representation


EXPORTED = [(NumbaBackend, name) for name, kind in ARCHITECTURES.items() if kind.compiled]
EXPORTED += [(TorchBackend, name) for name in ARCHITECTURES]


@pytest.mark.parametrize(("backend", "architecture"), EXPORTED)
def test_exported_sae_computes_what_was_trained(settings, backend, architecture):
    h, d, rng = 32, 6, np.random.default_rng(0)
    shapes = {"W_enc": (h, d), "b_enc": h, "W_dec": (h, d), "b_dec": d}
    shapes |= {"relu": {"b_pre": d}, "jumprelu": {"log_threshold": h}}.get(architecture, {})
    shapes |= {"log_scale": h, "b_gate": h} if architecture == "gated" else {}
    y = rng.standard_normal((50, d)).astype(np.float32)
    start = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    used = settings(architecture, n_features=h, k=4)
    made = backend(start, ARCHITECTURES[architecture], used)
    if architecture in CALIBRATED:
        made.threshold = 0.7
    residuals, counts = made.evaluate(y)
    exported = module._export(made, used)
    made.close()
    assert (exported.activation, exported.k) == (
        ARCHITECTURES[architecture].activation,
        4 if architecture == "topk" else None,
    )
    assert (exported.threshold is not None) is (exported.activation == "threshold")
    found = exported.encode(y)
    np.testing.assert_array_equal(np.diff(found.activations.indptr), counts)
    assert 0 < counts.mean() < h
    np.testing.assert_allclose(exported.decode(found.activations) - y, residuals, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", CALIBRATED)
@pytest.mark.parametrize(
    "n_val", [pytest.param(200, id="held-out"), pytest.param(199, id="too few"), pytest.param(0, id="none")]
)
def test_calibration_is_on_held_out_cells_where_they_are_enough(x, trained, architecture, n_val):
    autoencoder = trained(x, architecture=architecture, n_val=n_val).autoencoder
    assert len(np.unique(autoencoder.threshold)) == 1
    split = len(x) - n_val
    used = x[split:] if n_val >= module.MIN_CALIBRATED else x[:split]
    # Folding moves the pre-activations by the last digit.
    assert autoencoder.encode(used).activations.nnz / len(used) == pytest.approx(3, abs=0.02)


# ---- Steps


@each_architecture
def test_each_step_has_its_own_learning_rate(x, trained, monkeypatch, architecture):
    monkeypatch.setattr(Schedule, "factor", lambda self, step: float(step < 3))
    monkeypatch.setattr(Schedule, "pressure", lambda self, step: 1.0)
    stopped, three = (trained(x, architecture=architecture, steps=steps) for steps in (10, 3))
    for name in WEIGHTS:
        one, other = (weights_of(found)[name] for found in (stopped, three))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)


# ---- What training achieves


@each_architecture
def test_training_explains_an_easy_dictionary(x, trained, architecture):
    found = trained(x, architecture=architecture, steps=150, learning_rate=1e-2)
    first, last = found.history[0], found.history[-1]
    assert last.fvu < 0.3
    assert last.fvu < first.fvu
    assert last.val_fvu < 0.3


def test_topk_finds_the_true_directions(x, trained, directions):
    W_dec = trained(x, k=4, n_features=48, learning_rate=1e-2, steps=1000).autoencoder.W_dec
    cosine = directions @ (W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True)).T
    assert (cosine.max(axis=1) > 0.9).mean() >= 0.9


def test_topk_has_at_most_k_active_features(x, trained):
    found = trained(x, k=5)
    assert found.autoencoder.encode(x).activations.getnnz(axis=1).max() == 5
    assert max(record.l0 for record in found.history) <= 5


@pytest.mark.parametrize(
    ("architecture", "penalties"),
    [
        ("vanilla", {"l1": (0.0, 1.0, 4.0)}),
        ("relu", {"l1": (0.0, 1.0, 4.0)}),
        ("gated", {"l1": (0.0, 1.0, 4.0)}),
        ("jumprelu", {"l0": (0.0, 0.1, 1.0)}),
    ],
)
def test_a_larger_penalty_gives_fewer_active_features(x, trained, architecture, penalties):
    ((name, values),) = penalties.items()
    given = {"architecture": architecture, "steps": 150, "learning_rate": 1e-2}
    l0 = [trained(x, **given, **{name: value}).history[-1].l0 for value in values]
    assert l0[0] > 1.2 * l0[1] > 1.2**2 * l0[2] > 0


def test_a_penalty_that_outweighs_everything_is_not_divergence(x, trained):
    found = trained(x, architecture="vanilla", l1=1e3, steps=10)
    assert found.ended == "finished"


def test_features_that_stopped_firing_two_passes_ago_are_dead(x, trained, monkeypatch):
    monkeypatch.setattr(restart, "RESTART_UNTIL", 0)
    history = trained(x, architecture="vanilla", l1=1e3, steps=100, learning_rate=3e-2).history
    assert history[0].dead_fraction == 0
    assert history[-1].dead_fraction == 1
    assert history[-1].l0 == 0


def test_without_held_out_cells_their_columns_are_nan(x, trained):
    history = trained(x, n_val=0, steps=10).history
    assert np.isnan([[record.val_fvu, record.val_l0] for record in history]).all()
    assert np.isfinite([[record.fvu, record.l0, record.loss] for record in history]).all()


@pytest.mark.parametrize(("steps", "recorded"), [(3, [1, 2, 3]), (101, [*range(2, 101, 2), 101])])
def test_every_step_is_announced_and_about_fifty_are_recorded(x, trained, steps, recorded):
    calls = []
    history = trained(x, steps=steps, on_step=lambda step, record: calls.append((step, record))).history
    assert [step for step, _ in calls] == list(range(steps))
    assert [record for _, record in calls if record is not None] == history
    assert [record.step for record in history] == recorded
    rates = [3e-3 * Schedule(steps).factor(step - 1) for step in recorded]
    np.testing.assert_allclose([record.learning_rate for record in history], rates)


def test_first_features_of_a_nested_dictionary_explain_more_than_those_of_a_plain_one(x, trained):
    def explained_by_the_first_eight(groups):
        found = trained(x, groups=groups, steps=600).autoencoder
        a = found.encode(x).activations.toarray()
        a[:, 8:] = 0
        return 1 - np.square(x - found.decode(a)).sum() / np.square(x - x.mean(axis=0)).sum()

    assert explained_by_the_first_eight((8, 16, 32)) > explained_by_the_first_eight((32,)) + 0.05


def test_batch_may_be_larger_than_the_training_set(x, trained):
    found = trained(x[:40], n_val=10, batch_size=64, steps=5)
    assert np.isfinite(found.autoencoder.W_enc).all()


def test_device_is_taken_as_given_and_auto_is_one_that_is_there():
    assert module.choose_device("cpu") == "cpu"
    assert torch.zeros(1, device=module.choose_device("auto")).sum() == 0


def test_a_device_that_is_none():
    with pytest.raises(ValueError, match="device='gpu' is not 'auto', 'cpu'"):
        module.choose_device("gpu")


@each_architecture
def test_the_compiled_back_end_is_used_where_there_is_one(x, settings, architecture):
    used = settings(architecture)
    made = make_backend(initial_weights(x, np.ones(x.shape[1]), used), used)
    made.close()
    assert isinstance(made, NumbaBackend if ARCHITECTURES[architecture].compiled else TorchBackend)


# ---- From disk


def as_memory_map(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


def as_hdf5(x, folder):
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_dataset("x", data=x, chunks=(100, x.shape[1]))
    return h5py.File(folder / "x.h5")["x"]


def as_zarr(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=(100, x.shape[1]))


FILES = {"memory map": as_memory_map, "hdf5": as_hdf5, "zarr": as_zarr}
each_file = pytest.mark.parametrize("store", FILES.values(), ids=FILES)


@each_file
@pytest.mark.parametrize(("architecture", "rel"), [("vanilla", 0.02), ("topk", 0.1)])
def test_training_from_disk_is_as_good_as_from_memory(x, trained, tmp_path, architecture, rel, store):
    """The batches differ; with TopK, so do local optima."""
    stored, given = store(x, tmp_path), {"architecture": architecture, "steps": 200, "learning_rate": 1e-2}
    memory, disk = (trained(matrix, **given).history[-1] for matrix in (x, stored))
    assert disk.fvu == pytest.approx(memory.fvu, rel=rel)
    assert disk.val_fvu == pytest.approx(memory.val_fvu, rel=rel)
    assert disk.l0 == pytest.approx(memory.l0, rel=rel)
    if isinstance(stored, h5py.Dataset):
        stored.file.close()


@each_file
def test_training_from_disk_needs_no_held_out_cells(x, trained, tmp_path, store):
    stored = store(x, tmp_path)
    assert np.isnan(trained(stored, n_val=0, steps=5).history[-1].val_fvu)
    if isinstance(stored, h5py.Dataset):
        stored.file.close()


# ---- Threads


def test_any_number_of_threads_trains_the_same_sae(x, trained, assert_equal_weights, monkeypatch):
    monkeypatch.setattr(backend_numba, "PRODUCTS_PER_THREAD", 1)
    for architecture in ("topk", "batchtopk", "vanilla"):
        found = []
        for threads in (1, 3):
            monkeypatch.setattr(backend_numba, "available_threads", lambda threads=threads: threads)
            found.append(trained(x, architecture=architecture))
        assert_equal_weights(*found)
        assert found[0].history == found[1].history


ENDINGS = {
    "finished": ({}, None, None),
    "diverged": ({"learning_rate": 1e6}, None, DivergedError),
    "interrupted": ({}, KeyboardInterrupt, None),
    "error": ({}, RuntimeError, RuntimeError),
    "refused checkpoint": ({"identity": "other"}, None, CheckpointError),
}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize(("given", "raised", "error"), ENDINGS.values(), ids=ENDINGS)
def test_threads_are_as_before_however_training_ends(
    x, trained, stopping_at, monkeypatch, tmp_path, architecture, given, raised, error
):
    monkeypatch.setattr(backend_numba, "PRODUCTS_PER_THREAD", 1)
    monkeypatch.setattr(backend_numba, "available_threads", lambda: 2)
    if error is CheckpointError:
        given = given | {"checkpoint": tmp_path / "state.npz"}
        trained(x, architecture=architecture, checkpoint=given["checkpoint"], on_step=stopping_at(3))
    before, threads = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(2)
    try:
        with nullcontext() if error is None else pytest.raises(error):
            trained(x, architecture=architecture, on_step=stopping_at(3, raised) if raised else None, **given)
        assert torch.get_num_threads() == 2
        assert threading.active_count() == threads
    finally:
        torch.set_num_threads(before)


# ---- Divergence


@each_architecture
def test_diverged_training_says_what_to_try(x, trained, architecture):
    message = r"at step \d+ of 20\. The learning rate of 1e\+06 .*try learning_rate=100000\."
    with pytest.raises(DivergedError, match=message):
        trained(x, architecture=architecture, learning_rate=1e6, steps=20)


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_a_learning_rate_beyond_all_numbers(x, trained, architecture):
    with pytest.raises(DivergedError, match=r"at step [12] of 20.*try learning_rate=1e\+19"):
        trained(x, architecture=architecture, learning_rate=1e20, steps=20)


@pytest.mark.parametrize("architecture", ["topk", "vanilla", "gated"])
def test_values_whose_squares_are_beyond_all_numbers(x, trained, architecture):
    with pytest.raises(DivergedError, match=r"at step 1 of 20"):
        trained(x * np.float32(1e25), "none", architecture=architecture, steps=20)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_units_of_the_input_do_not_matter(x, trained, factor):
    one, other = trained(x).history[-1], trained(x.astype(np.float64) * factor).history[-1]
    assert other.fvu == pytest.approx(one.fvu, rel=0.02)


@each_architecture
def test_an_sae_that_starts_badly_has_not_diverged(x, trained, architecture):
    """Many features of few inputs overshoot at first; cells far from the origin are badly reconstructed at first."""
    narrow = x[:, :3]
    assert trained(narrow, architecture=architecture, n_features=600, steps=4).steps == 4
    assert trained(x + 30, "none", architecture=architecture, steps=4).steps == 4


# ---- Ending early


def test_ends_early_where_nothing_is_gained(x, trained):
    found = trained(x, learning_rate=1e-9, steps=400, patience=3)
    # Of the records after every 8 steps, the second to fourth are no better than the first; a quarter more to decay.
    assert (found.steps, found.ended) == (40, "early")
    assert [record.step for record in found.history] == [8, 16, 24, 32, 40]
    rates = np.array([record.learning_rate for record in found.history])
    np.testing.assert_allclose(rates[1:] / 1e-9, [16 / 20, 1, 1, 1 / 8])


def test_goes_on_where_something_is_gained(x, trained, assert_equal_weights):
    patient, other = (trained(x, steps=100, patience=patience) for patience in (15, None))
    assert patient.ended == "finished"
    assert_equal_weights(patient, other)


def test_without_held_out_cells_the_training_cells_tell_that_nothing_is_gained(x, trained):
    assert trained(x, learning_rate=1e-9, steps=400, patience=3, n_val=0).steps == 40


def test_a_run_that_took_all_its_steps_did_not_end_early(x, trained):
    found = trained(x, learning_rate=1e-9, steps=100, patience=42)
    assert (found.steps, found.ended) == (100, "finished")


# ---- Interruption


@each_architecture
def test_interruption_keeps_what_was_trained(x, trained, stopping_at, architecture):
    found = trained(x, architecture=architecture, steps=60, on_step=stopping_at(39))
    assert (found.steps, found.ended) == (40, "interrupted")
    assert [record.step for record in found.history] == list(range(1, 41))
    encoded = found.autoencoder.encode(x[:1800])
    fvu = encoded.squared_error.mean() / x.var(axis=0).sum()
    assert found.history[-1].fvu == pytest.approx(fvu, rel=0.1 if architecture in CALIBRATED else 1e-3)


def test_interruption_after_the_first_step_leaves_an_sae_without_history(x, trained, stopping_at):
    found = trained(x, steps=200, on_step=stopping_at(0))
    assert (found.steps, found.ended, found.history) == (1, "interrupted", [])
    assert np.isfinite(found.autoencoder.W_enc).all()


def test_ctrl_c_waits_for_the_end_of_the_step(x, trained):
    """A real signal, sent from another thread while training runs."""
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    found = trained(x, steps=10**7)
    timer.join()
    assert found.ended == "interrupted" and 0 < found.steps < 10**7
    assert np.isfinite(found.autoencoder.W_dec).all()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
