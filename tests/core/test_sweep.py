from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import roc_auc_score

from sae.core.fitting import Options, fit, plan
from sae.core.labels import stratified_halves
from sae.core.sweep import (
    N_SPLITS,
    Evidence,
    Outcome,
    Run,
    Store,
    expand,
    in_this_process,
    label_auroc,
    measured,
    on_client,
    redundancy,
    stability,
)

X = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
SMALL = Options(n_features=8, steps=20, device="cpu")


def source():
    return X


# ---- Which runs


def asked(grid, seeds=(0,)):
    """The options of all runs that are not the default, and their seeds."""
    default = vars(Options())
    return [
        ({name: value for name, value in vars(run.options).items() if value != default[name]}, run.seed)
        for run in expand(grid, seeds)
    ]


def test_all_combinations_with_all_seeds():
    runs = expand({"n_features": [8, 16], "k": [2, 3]}, [5, 6], device="cpu")
    found = [(run.setting, run.options.n_features, run.options.k, run.seed) for run in runs]
    assert found == [
        (0, 8, 2, 5), (0, 8, 2, 6), (1, 8, 3, 5), (1, 8, 3, 6), (2, 16, 2, 5), (2, 16, 2, 6), (3, 16, 3, 5), (3, 16, 3, 6),
    ]  # fmt: skip
    assert all(run.options.device == "cpu" for run in runs)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        pytest.param({}, [{}], id="one SAE with the defaults"),
        pytest.param({"k": 3}, [{"k": 3}], id="a value on its own"),
        pytest.param({"architecture": "topk"}, [{"architecture": "topk"}], id="a string on its own"),
        pytest.param({"k": range(2, 4)}, [{"k": 2}, {"k": 3}], id="range"),
        pytest.param({"k": np.array([2, 2, 3])}, [{"k": 2}, {"k": 3}], id="the same twice"),
        pytest.param({"k": np.array(2)}, [{"k": 2}], id="an array of one value"),
        pytest.param({"k": pd.Series([2, 3])}, [{"k": 2}, {"k": 3}], id="a column of a table"),
        pytest.param({"k": ["auto", None]}, [{"k": "auto"}, {}], id="chosen in both ways"),
        pytest.param([{"k": [2, 3]}, {"k": [3, 4]}], [{"k": 2}, {"k": 3}, {"k": 4}], id="overlapping grids"),
        pytest.param(
            {"architecture": ["topk", "vanilla"], "k": [2, 3], "l1": [0.5, 1]},
            [
                {"architecture": "topk", "k": 2},
                {"architecture": "topk", "k": 3},
                {"architecture": "vanilla", "l1": 0.5},
                {"architecture": "vanilla", "l1": 1.0},
            ],
            id="sparsity where it is used",
        ),
        pytest.param(
            [{"architecture": "vanilla", "l1": 1}, {"architecture": "vanilla", "l1": np.float64(1)}],
            [{"architecture": "vanilla", "l1": 1.0}],
            id="equal numbers",
        ),
    ],
)
def test_grids(grid, expected):
    assert [options for options, _ in asked(grid)] == expected
    assert all(type(value) in (int, float, str) for options, _ in asked(grid) for value in options.values())


def test_seeds_of_a_grid():
    assert asked([{"k": 2, "seed": [7, 9]}, {"k": 3}], seeds=[0]) == [({"k": 2}, 7), ({"k": 2}, 9), ({"k": 3}, 0)]


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        pytest.param({"width": [8]}, ValueError, "'width', which is no setting; known are architecture, recipe", id="name"),
        pytest.param({"device": ["cpu"]}, ValueError, "'device', which is no setting", id="not of the grid"),
        pytest.param({"k": []}, ValueError, "no values for 'k'", id="no values"),
        pytest.param([], ValueError, "grid= is empty", id="no grids"),
        pytest.param(None, TypeError, "grid= has a NoneType; expected a mapping", id="nothing"),
        pytest.param({"architecture": [["topk"]]}, ValueError, r"architecture=\['topk'\] is not one of", id="a list too many"),
        pytest.param({"learning_rate": [float("nan")]}, ValueError, "not above 0 and finite", id="NaN"),
        pytest.param(["k"], TypeError, "grid= has a str; expected a mapping", id="no mapping"),
        pytest.param({"n_features": [8, 0]}, ValueError, "n_features=0 is below 1", id="out of range"),
        pytest.param({"n_features": [8.0]}, TypeError, "n_features=8.0 is a float", id="type"),
        pytest.param({"architecture": ["topk", "deep"]}, ValueError, "architecture='deep' is not one of", id="choice"),
        pytest.param({"l1": [1]}, ValueError, r"'l1', which its architectures \('matryoshka'\) do not use", id="unused"),
        pytest.param({"architecture": ["vanilla", "gated"], "k": 2}, ValueError, "made sparse by l1=", id="unused by all"),
        pytest.param({"seed": [0.5]}, ValueError, r"seeds \[0.5\]; expected integers", id="seed"),
        pytest.param({"seed": [-1]}, ValueError, r"seeds \[-1\]; expected integers from 0", id="negative seed"),
    ],
)  # fmt: skip
def test_bad_grids(grid, error, message):
    with pytest.raises(error, match=message):
        expand(grid, [0])


# ---- One run


def test_a_run_is_a_fit():
    truth, codes = X[:, :2], np.arange(120) % 3 - 1
    outcome = measured(source, Run(0, SMALL, 4), Evidence(codes, truth, 1))
    fitted = fit(plan(X, SMALL, 4))
    record = outcome.record
    for name in ("architecture", "n_features", "k", "preprocess", "learning_rate", "steps", "batch_size", "seed"):
        assert record[name] == fitted.params[name], name
    for name in ("fvu", "val_fvu", "l0", "val_l0", "validation", "recipe"):
        assert record[name] == fitted.params[name], name
    assert record["l1"] is None and record["l0_weight"] is None and "error" not in record

    a = fitted.autoencoder.encode(X).activations.toarray()
    alive = a.any(axis=0)
    assert record["dead"] == pytest.approx(np.mean(~alive))
    np.testing.assert_allclose(outcome.directions, fitted.directions[alive], rtol=1e-6)
    r = np.abs(np.corrcoef(truth.T, a[:, alive].T)[:2, 2:])
    assert record["truth_best"] == pytest.approx(r.max(axis=1).mean())
    rows, columns = linear_sum_assignment(-r)
    assert record["truth_matched"] == pytest.approx(r[rows, columns].mean())
    assert record["truth_found"] == (r.max(axis=1) > 0.95).sum()
    assert record["label_auroc"] == label_auroc(sparse.csr_matrix(a), codes, 1)
    json.dumps(record, allow_nan=False)


def test_a_run_without_held_out_cells():
    record = measured(source, Run(0, replace(SMALL, validation=0.0), 0), Evidence()).record
    assert record["val_fvu"] is None and record["fvu"] > 0
    assert "label_auroc" not in record and "truth_best" not in record


def test_the_k_that_was_chosen():
    options = replace(SMALL, k="auto", n_features=32)
    record = measured(source, Run(0, options, 0), Evidence()).record
    assert record["k"] == fit(plan(X, options, 0)).params["k"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(SMALL, k=9), "ValueError: k=9 is larger than n_features=8"),
        (replace(SMALL, learning_rate=1e6), "DivergedError: The loss is"),
    ],
)
def test_a_run_that_fails_says_how(options, message):
    outcome = measured(source, Run(0, options, 0), Evidence())
    assert outcome.record["error"].startswith(message)
    assert outcome.record["n_features"] == 8 and "fvu" not in outcome.record
    assert outcome.directions is None and outcome.lasting


def test_what_is_no_failure_of_a_run_is_raised():
    with pytest.raises(AttributeError):
        measured(lambda: None, Run(0, SMALL, 0), Evidence())


def test_redundancy_is_the_mean_highest_cosine(monkeypatch):
    v = np.random.default_rng(1).normal(size=(11, 4))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    highest = [max(v[i] @ v[j] for j in range(11) if j != i) for i in range(11)]
    assert redundancy(v) == pytest.approx(np.mean(highest))
    monkeypatch.setattr("sae.core.stability.BLOCK_VALUES", 30)
    assert redundancy(v) == pytest.approx(np.mean(highest))
    assert np.isnan(redundancy(v[:1])) and np.isnan(redundancy(v[:0]))


def test_label_auroc_is_held_out():
    """Against a plain loop over divisions, halves, labels and features."""
    rng = np.random.default_rng(2)
    codes = rng.integers(-1, 3, size=150)
    a = rng.random((150, 7)) * (rng.random((150, 7)) < 0.4)
    a[:, 0] += codes == 1
    known = codes >= 0
    labels, values = codes[known], a[known]
    halves = stratified_halves(labels, N_SPLITS, np.random.default_rng(3))
    scores = []
    for label in range(3):
        for half in halves:
            for chosen_on in range(2):
                here, there = half == chosen_on, half != chosen_on
                aurocs = [roc_auc_score(labels[here] == label, values[here, j]) for j in range(7)]
                scores.append(roc_auc_score(labels[there] == label, values[there, np.argmax(aurocs)]))
    assert label_auroc(sparse.csr_matrix(a), codes, 3) == pytest.approx(np.mean(scores))
    assert label_auroc(sparse.csr_matrix(a), codes, 3) == label_auroc(sparse.csr_matrix(a), codes, 3)


def test_label_auroc_leaves_out_labels_of_one_cell():
    codes = np.array([0] * 10 + [1] * 10 + [2])
    a = sparse.csr_matrix(np.column_stack([codes == 0, codes == 1, codes == 2]).astype(float))
    assert label_auroc(a, codes, 0) == 1
    assert np.isnan(label_auroc(a[:2], np.array([0, 1]), 0))


# ---- All runs


def test_an_executor_gives_what_this_process_gives():
    runs, evidence = expand({"n_features": [8, 10, 12], "steps": 20}, [0]), Evidence(np.arange(120) % 2)

    def records(outcomes):
        return {run: outcome.record | {"seconds": None} for run, outcome in outcomes}

    expected = records(in_this_process(X, runs, evidence))
    with ThreadPoolExecutor(2) as pool:
        assert records(on_client(source, runs, evidence, pool)) == expected
    assert list(expected) == runs


# ---- What is kept


RUN = Run(0, SMALL, 0)
OUTCOME = Outcome({"fvu": 0.1 + 0.2, "k": None, "architecture": "topk"}, np.eye(3, dtype=np.float32))


def test_a_run_is_found_as_it_was_saved(tmp_path):
    store = Store(tmp_path / "new" / "folder", "cells")
    assert store.find(RUN) is None
    store.save(RUN, OUTCOME)
    assert store.find(RUN) == OUTCOME.record
    np.testing.assert_array_equal(store.directions(RUN), np.eye(3))
    assert sorted(path.suffix for path in store.folder.iterdir()) == [".json", ".npy"]
    assert Store(store.folder, "cells").find(replace(RUN, setting=7)) == OUTCOME.record, "the grid may be another one"


@pytest.mark.parametrize(
    ("identity", "run"),
    [
        ("others", RUN),
        ("cells", replace(RUN, seed=1)),
        ("cells", replace(RUN, options=replace(SMALL, n_features=9))),
        ("cells", replace(RUN, options=replace(SMALL, validation=0.2))),
    ],
    ids=["cells", "seed", "width", "held-out cells"],
)
def test_other_runs_are_told_apart(tmp_path, identity, run):
    Store(tmp_path, "cells").save(RUN, OUTCOME)
    assert Store(tmp_path, identity).find(run) is None


def test_those_of_another_version_are_done_again(tmp_path, monkeypatch):
    Store(tmp_path, "cells").save(RUN, OUTCOME)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert Store(tmp_path, "cells").find(RUN) is None


def test_half_of_a_run_is_none(tmp_path):
    store = Store(tmp_path, "cells")
    store.save(RUN, OUTCOME)
    store.path(RUN, ".npy").unlink()
    assert store.find(RUN) is None
    assert Store(tmp_path, "cells", with_directions=False).find(RUN) == OUTCOME.record
    for broken in (b'{"fvu": 0.', b"", b"\xff\xfe\x80", b"null", b"{}"):
        store.path(RUN).write_bytes(broken)
        assert store.find(RUN) is None
    store.save(RUN, OUTCOME)
    whole = store.path(RUN, ".npy").read_bytes()
    for broken in (b"", whole[:20], whole[:-4], b"?" * 200):
        store.path(RUN, ".npy").write_bytes(broken)
        assert store.find(RUN) is None
    store.save(RUN, replace(OUTCOME, directions=np.zeros((0, 3), np.float32)))
    assert store.find(RUN) == OUTCOME.record, "all features may be dead"


def test_a_failure_is_kept_without_directions(tmp_path):
    store = Store(tmp_path, "cells")
    store.save(RUN, Outcome({"error": "DivergedError: it did"}))
    assert store.find(RUN) == {"error": "DivergedError: it did"}


def test_a_crash_while_writing_leaves_none(tmp_path):
    store = Store(tmp_path, "cells")
    with pytest.raises(TypeError):
        store.save(RUN, Outcome({"fvu": object()}, np.eye(3)))
    assert store.find(RUN) is None and [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_what_runs_are_judged_by_has_an_identity():
    codes, truth = np.arange(4), np.ones((4, 1))
    different = [Evidence(), Evidence(codes), Evidence(codes, seed=1), Evidence(codes + 1), Evidence(truth=truth)]
    different += [Evidence(codes, truth), Evidence(truth=truth + 1), Evidence(truth=truth.astype(np.float32))]
    assert len({evidence.identity for evidence in different}) == len(different)
    assert Evidence(codes.copy(), truth.copy()).identity == Evidence(codes, truth).identity
    assert Evidence(seed=1).identity == Evidence().identity, "without labels nothing is divided"


# ---- What they say together


def test_stability_is_the_mean_matched_cosine():
    rng = np.random.default_rng(4)
    dictionaries = [rng.normal(size=(h, 5)) for h in (6, 6, 4)]
    dictionaries = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in dictionaries]

    def agreement(a, b):
        cosine = np.maximum(a @ b.T, 0)
        rows, columns = linear_sum_assignment(-cosine)
        return cosine[rows, columns].sum() / max(len(a), len(b))

    a, b, c = dictionaries
    ab, ac, bc = agreement(a, b), agreement(a, c), agreement(b, c)
    np.testing.assert_allclose(stability(dictionaries), [(ab + ac) / 2, (ab + bc) / 2, (ac + bc) / 2])


def test_stability_of_the_same_dictionary_is_one():
    rows = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0]
    np.testing.assert_allclose(stability([rows, rows[::-1]]), 1)
    np.testing.assert_allclose(stability([rows, -rows]), 0, atol=1e-9)
    assert np.isnan(stability([rows[:0], rows[:0]])).all()
