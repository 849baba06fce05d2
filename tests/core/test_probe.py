from __future__ import annotations

import h5py
import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.preprocessing import StandardScaler

from sae.core import probe as module
from sae.core.probe import RIDGES, linear_r2, logistic, logistic_auroc, random_folds, standardised


def made(n=400, d=6, t=3, *, noise=1.0, shift=0.0, seed=0):
    """Columns (n, d) of different scales, and variables (n, t) that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(1, size=(n, d)) * rng.uniform(0.1, 10, d) + shift
    y = (x - shift) / x.std(axis=0) @ rng.normal(size=(d, t)) + noise * rng.normal(size=(n, t))
    return x, y


def folds_of(x, k=4, seed=1):
    return random_folds(len(x), k, np.random.default_rng(seed))


def scaled(x):
    return StandardScaler().fit_transform(x)


def on_disk(x, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    return h5py.File(tmp_path / "x.h5")["x"]


LAYOUTS = {"dense": lambda x, _: x, "csr": lambda x, _: sparse.csr_matrix(x), "disk": on_disk}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


# ---- Folds


@pytest.mark.parametrize(("n", "k"), [(10, 2), (103, 5)])
def test_folds_are_even_and_random(n, k):
    one, other = (random_folds(n, k, np.random.default_rng(seed)) for seed in (0, 1))
    size = np.bincount(one, minlength=k)
    assert size.sum() == n and size.max() - size.min() <= 1
    assert (one != other).any()


def test_donors_stay_together():
    donors = np.random.default_rng(0).integers(7, size=200)
    folds = random_folds(200, 3, np.random.default_rng(0), donors)
    assert all(len(set(folds[donors == donor])) == 1 for donor in range(7))
    assert set(folds) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((100, 1), "n_folds=1 is below 2", id="one fold"),
        pytest.param((100, 2.5), "n_folds=2.5 is a float; expected an integer", id="no number of folds"),
        pytest.param((9, 5), "9 cells are too few for n_folds=5", id="few cells"),
        pytest.param((6, 3, None, np.array([0, 1, 0, 1, 0, 1])), "2 donors cannot be divided", id="few donors"),
    ],
)
def test_bad_folds(arguments, message):
    n, k, _, donors = (*arguments, None, None)[:4]
    with pytest.raises((ValueError, TypeError), match=message):
        random_folds(n, k, np.random.default_rng(0), donors)


# ---- Numbers


@each_layout
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_r2_is_that_of_linear_regression(layout, shift, tmp_path, monkeypatch):
    """With the least penalty, cross-validated least squares of scikit-learn."""
    monkeypatch.setattr(module, "RIDGES", RIDGES[:1])
    x, y = made(shift=shift)
    folds = folds_of(x)
    found = linear_r2(standardised(layout(x, tmp_path)), y, folds)
    expected = cross_val_predict(LinearRegression(), x, y, cv=PredefinedSplit(folds))
    np.testing.assert_allclose(found.score, r2_score(y, expected, multioutput="raw_values"), atol=1e-7)


def test_many_chunks(monkeypatch):
    x, y = made()
    folds = folds_of(x)
    whole = linear_r2(standardised(x), y, folds)
    monkeypatch.setattr("sae.core.moments.CHUNK_ROWS", 7)
    parts = linear_r2(standardised(x), y, folds)
    np.testing.assert_allclose(parts.score, whole.score, rtol=1e-12)
    np.testing.assert_allclose(parts.error, whole.error, rtol=1e-9)


@pytest.mark.parametrize("d", [6, 200, 900], ids=["few columns", "half as many as cells", "more than cells"])
def test_the_penalty_is_that_of_generalised_cross_validation(d):
    """Each training part against a loop over penalties with scikit-learn's ridge, of those that leave a quarter free."""
    x, y = made(300, d, 2, noise=5)
    folds = folds_of(x, 3)
    z = scaled(x)
    expected = np.empty_like(y)
    for fold in range(3):
        train = folds != fold
        n = train.sum()
        centred = z[train] - z[train].mean(axis=0)
        for t in range(y.shape[1]):
            errors, models = [], []
            for ridge in RIDGES:
                model = Ridge(alpha=ridge * n, solver="svd").fit(z[train], y[train, t])
                values = np.linalg.svd(centred, compute_uv=False) ** 2
                df = 1 + (values / (values + ridge * n)).sum()
                residual = np.square(y[train, t] - model.predict(z[train])).mean()
                free = 1 - df / n
                errors.append(residual / max(free, 1e-14) ** 2 if free >= 0.25 or ridge == RIDGES[-1] else np.inf)
                models.append(model)
            expected[~train, t] = models[int(np.argmin(errors))].predict(z[~train])
    found = linear_r2(standardised(x), y, folds)
    np.testing.assert_allclose(found.score, r2_score(y, expected, multioutput="raw_values"), atol=1e-5)


@each_layout
def test_a_linear_function_is_known_exactly(layout, tmp_path):
    x, _ = made(500, 8)
    y = np.column_stack([x @ np.arange(8), 3 * x[:, 0] - 1e-2 * x[:, 5] + 7])
    found = linear_r2(standardised(layout(x, tmp_path)), y, folds_of(x))
    np.testing.assert_allclose(found.score, 1, atol=1e-9)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)


@pytest.mark.parametrize("n", [60, 200])
def test_collinear_columns_and_noise_do_no_harm(n):
    """Copies, sums and constants; of what depends on nothing, about 0 is known, also with as many columns as cells."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n, 20))
    x = np.column_stack([x, x, x + 1e-9 * rng.normal(size=x.shape), x.sum(axis=1), np.ones(n)])
    y = np.column_stack([x[:, 0] - x[:, 1], rng.normal(size=(n, 5))])
    found = linear_r2(standardised(x), y, folds_of(x, 5))
    assert found.score[0] == pytest.approx(1, abs=1e-4)
    assert (found.score[1:] > -0.2).all()


@pytest.mark.parametrize(("n", "d"), [(50, 40), (100, 80), (60, 200)])
def test_noise_is_not_fitted_with_about_as_many_columns_as_cells(n, d):
    """Without a limit to the degrees of freedom, R² falls to -16 here, and is -1 on average."""
    rng = np.random.default_rng(0)
    found = linear_r2(standardised(rng.normal(size=(n, d))), rng.normal(size=(n, 100)), folds_of(np.empty((n, 1)), 5))
    assert found.score.mean() > -0.15
    assert found.score.min() > -0.8


def test_a_linear_function_is_known_exactly_of_few_cells():
    """Degrees of freedom are 151 of 160 training cells, but without an error."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 150))
    found = linear_r2(standardised(x), x @ rng.normal(size=(150, 3)), folds_of(x, 5))
    np.testing.assert_allclose(found.score, 1, atol=1e-6)


def test_nothing_in_constant_columns():
    y = np.random.default_rng(0).normal(size=(50, 1))
    found = linear_r2(standardised(np.ones((50, 3))), y, folds_of(y))
    assert found.score.item() == pytest.approx(0, abs=0.1)


def test_a_constant_variable_has_no_score():
    x, y = made()
    y[:, 1] = 0.1
    found = linear_r2(standardised(x), y, folds_of(x))
    np.testing.assert_array_equal(np.isnan(found.score), [False, True, False])
    np.testing.assert_array_equal(np.isnan(found.error), [False, True, False])


def test_the_error_is_that_of_the_bootstrap(monkeypatch):
    monkeypatch.setattr(module, "RIDGES", RIDGES[:1])
    x, y = made(1500, noise=2)
    folds = folds_of(x)
    found = linear_r2(standardised(x), y, folds)
    predicted = cross_val_predict(LinearRegression(), x, y, cv=PredefinedSplit(folds))
    rng = np.random.default_rng(0)
    draws = [rng.integers(len(y), size=len(y)) for _ in range(1000)]
    scores = [r2_score(y[draw], predicted[draw], multioutput="raw_values") for draw in draws]
    np.testing.assert_allclose(found.error, np.std(scores, axis=0), rtol=0.1)


def test_more_columns_and_cells_than_can_be_solved(monkeypatch):
    monkeypatch.setattr(module, "MAX_COLUMNS", 10)
    assert standardised(np.eye(12)[:, :10]).shape == (12, 10)
    with pytest.raises(ValueError, match="Normal equations of 11 columns are too large; up to 10"):
        standardised(np.eye(12)[:, :11])


# ---- Labels


def labelled(n=600, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5)) * [1, 1, 4, 0.1, 1]
    codes = np.argmax(x[:, :3] / [1, 1, 4] + rng.gumbel(size=(n, 3)) - [0, 0, 2], axis=1)
    return x, codes[:, None] == np.arange(3)


@pytest.mark.parametrize("layout", [np.asarray, sparse.csr_matrix], ids=["dense", "csr"])
def test_logistic_is_that_of_scikit_learn(layout):
    x, y = labelled()
    weights, intercept = logistic(layout(x), y)
    for t in range(3):
        model = LogisticRegression(C=1, tol=1e-9, max_iter=5000).fit(x, y[:, t])
        np.testing.assert_allclose(weights[:, t], model.coef_[0], atol=1e-3)
        np.testing.assert_allclose(intercept[t], model.intercept_[0], atol=1e-3)


def brute_force(score, inside):
    """AUROC of one fold: all pairs."""
    pairs = score[inside][:, None] - score[~inside][None]
    return (pairs > 0).mean() + (pairs == 0).mean() / 2


@each_layout
def test_auroc_is_that_of_scikit_learn(layout, tmp_path):
    x, labels = labelled()
    folds = folds_of(x)
    found = logistic_auroc(standardised(layout(x, tmp_path)), labels, folds, np.random.default_rng(0))
    z = scaled(x)
    for t in range(3):
        scores, weights = [], []
        for fold in range(4):
            train = folds != fold
            model = LogisticRegression(C=1, tol=1e-9, max_iter=5000).fit(z[train], labels[train, t])
            score = model.decision_function(z[~train])
            scores.append(roc_auc_score(labels[~train, t], score))
            assert scores[-1] == pytest.approx(brute_force(score, labels[~train, t]))
            weights.append(labels[~train, t].sum())
        assert found.score[t] == pytest.approx(np.average(scores, weights=weights), abs=1e-3)


def test_the_error_of_an_auroc_is_delongs():
    """Its definition: variances of the shares of pairs that each cell wins, over the two sorts of cells."""
    x, labels = labelled(300)
    folds = folds_of(x, 2)
    found = logistic_auroc(standardised(x), labels, folds, np.random.default_rng(0))
    z = scaled(x)
    for t in range(3):
        above, below = [], []
        for fold in range(2):
            train = folds != fold
            model = LogisticRegression(C=1, tol=1e-9, max_iter=5000).fit(z[train], labels[train, t])
            score, inside = model.decision_function(z[~train]), labels[~train, t]
            above += [(score[~inside] < one).mean() for one in score[inside]]
            below += [(score[inside] > one).mean() for one in score[~inside]]
        expected = np.sqrt(np.var(above, ddof=1) / len(above) + np.var(below, ddof=1) / len(below))
        assert found.error[t] == pytest.approx(expected, rel=0.02)


def test_random_labels_are_not_known():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(2000, 10)), rng.random((2000, 4)) < [0.5, 0.1, 0.02, 0.9]
    found = logistic_auroc(standardised(x), labels, folds_of(x), rng)
    assert (np.abs(found.score - 0.5) < 4 * found.error).all()
    assert (found.error < 0.06).all()


def test_separable_labels_are_known_whatever_the_number_of_columns():
    rng = np.random.default_rng(0)
    labels = np.arange(60)[:, None] % 3 == np.arange(3)
    x = np.hstack([labels * 5.0, rng.normal(size=(60, 200)) * 0.01, np.ones((60, 1))])
    assert x.shape[1] > len(x)
    found = logistic_auroc(standardised(x[:, :3]), labels, folds_of(x), rng)
    np.testing.assert_array_equal(found.score, 1)
    found = logistic_auroc(standardised(x), labels, folds_of(x), rng)
    assert (found.score > 0.5).all()


def test_a_label_of_one_cell_has_no_score():
    x, labels = labelled()
    labels = np.column_stack([labels[:, 0], np.arange(len(x)) == 5, np.zeros(len(x), dtype=bool)])
    found = logistic_auroc(standardised(x), labels, folds_of(x), np.random.default_rng(0))
    np.testing.assert_array_equal(np.isnan(found.score), [False, True, True])


def test_of_many_cells_some_are_drawn(monkeypatch):
    x, labels = labelled(3000)
    folds = folds_of(x)
    every = logistic_auroc(standardised(x), labels, folds, np.random.default_rng(0))
    monkeypatch.setattr(module, "LOGISTIC_VALUES", 500 * x.shape[1])
    some = logistic_auroc(standardised(x), labels, folds, np.random.default_rng(0))
    assert (some.score != every.score).any()
    np.testing.assert_allclose(some.score, every.score, atol=0.02)


def test_rotation_changes_nothing_for_few_cells():
    """More columns than cells: the regressions of the columns themselves, by scikit-learn."""
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(80, 120)), rng.random((80, 1)) < 0.4
    x[labels[:, 0], :3] += 2
    folds = folds_of(x)
    found = logistic_auroc(standardised(x), labels, folds, rng)
    z, scores, sizes = scaled(x), [], []
    for fold in range(4):
        train = folds != fold
        model = LogisticRegression(C=1, tol=1e-9, max_iter=5000).fit(z[train], labels[train, 0])
        scores.append(roc_auc_score(labels[~train, 0], model.decision_function(z[~train])))
        sizes.append(labels[~train].sum())
    assert found.score.item() == pytest.approx(np.average(scores, weights=sizes), abs=5e-3)
