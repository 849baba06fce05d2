from __future__ import annotations

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict

import sae
from sae.tl._probe import probe

COLUMNS = {
    "group": "category",
    "variable": "category",
    "kind": "category",
    "metric": "category",
    "score": "float64",
    "ci_low": "float64",
    "ci_high": "float64",
}
WORLD = 27
"""Of the worlds of `simulate_programs`, one whose ceilings are close to those of the published one."""


def ceilings(adata: ad.AnnData) -> dict[str, float]:
    """R² that the best linear function of X'' has over all cells there could be, from the moments of the simulation."""
    known = adata.uns["simulation"]
    types = known["type_programs"].astype(np.float64)
    (n_types, p), levels = types.shape, np.arange(known["n_levels"])
    rate = known["lowest_rate"] + known["rate_step"] * np.arange(p)
    mean, of_level = rate + levels.mean(), levels.var()
    of_shift = of_level + known["shift_sd"] ** 2
    used = types.mean(axis=0)
    second = np.outer(mean, mean) + of_shift + np.diag(rate)
    covariance = types.T @ types / n_types * second - np.outer(used * mean, used * mean)
    number = np.arange(n_types)
    products = {
        "X": (np.diag(used * rate), rate),
        "X'": (np.diag(used * rate) + used * of_shift, rate + of_shift),
        "A": ((number - number.mean()) @ types / n_types * mean, number.var()),
        "B": (used * of_level, of_level),
        "types": ((types - used) / n_types * mean, np.full(n_types, (1 - 1 / n_types) / n_types)),
    }
    found = {}
    for name, (cross, variance) in products.items():
        cross = np.atleast_2d(cross)
        explained = (cross * np.linalg.solve(covariance, cross.T).T).sum(axis=1)
        found[name] = float((explained / variance).mean())
    return found


def truth(adata: ad.AnnData) -> dict:
    return {
        "X''": "programs",
        "X'": "programs_unmasked",
        "X": "activity",
        "A": adata.obs["cell_type"].cat.codes.to_numpy(),
        "B": "covariate",
        "types": sparse.csr_matrix(pd.get_dummies(adata.obs["cell_type"]).to_numpy()),
    }


def means(table: pd.DataFrame) -> dict[str, float]:
    return table.groupby("group", observed=True)["score"].mean().to_dict()


# ---- What the simulators promise


@pytest.fixture(scope="module")
def programs():
    return sae.datasets.simulate_programs(20_000, 200, rng=WORLD)


@pytest.mark.parametrize("seed", [WORLD, 0, 1])
def test_linear_ceilings_are_those_of_the_formulas(seed, programs):
    adata = programs if seed == WORLD else sae.datasets.simulate_programs(20_000, 200, rng=seed)
    found = means(probe(adata, "X", truth(adata), n_folds=3, progress=False))
    assert found.pop("X''") == pytest.approx(1, abs=1e-4)
    assert found == pytest.approx(ceilings(adata), abs=0.012)


def test_linear_ceilings_are_the_published_ones(programs):
    """In a world like the published one: that of another seed has its own."""
    found = means(probe(programs, "X", truth(programs), n_folds=3, progress=False))
    del found["types"]
    assert found == pytest.approx({"X''": 1.0, "X'": 0.26, "X": 0.17, "A": 0.90, "B": 0.79}, abs=0.02)


def test_linear_ceilings_of_the_small_simulation():
    adata = sae.datasets.simulate_small(40_000)
    found = probe(adata, "X", {"A": "activity", "B": "gates", "X": "programs"})
    np.testing.assert_allclose(found["score"], [0.78, 0.62, 0.66, 0.21, 1, 1, 1], atol=0.02)
    assert found["score"].tolist()[4:] == pytest.approx([1, 1, 1], abs=1e-9)


def test_a_latent_of_fewer_dimensions_knows_less(programs):
    """Superposition: how much of 100 programs is in 100, 50 and 10 principal components."""
    x = programs.X - programs.X.mean(axis=0)
    components = np.linalg.eigh(np.cov(x, rowvar=False))[1][:, ::-1]
    scores = []
    for d in (100, 50, 10):
        programs.obsm["X_pca"] = (x @ components[:, :d]).astype(np.float32)
        scores.append(probe(programs, None, "programs", n_folds=2, progress=False)["score"].mean())
    assert scores[0] == pytest.approx(1, abs=1e-3)
    assert scores[0] > scores[1] + 0.1 > scores[2] + 0.2 > 0.2


# ---- The table


@pytest.fixture
def cells(make_adata):
    adata = make_adata(200)
    rng = np.random.default_rng(0)
    adata.obs["number"] = adata.obsm["X_pca"] @ np.arange(6) + rng.normal(size=200) * 3
    adata.obs["flag"] = adata.obs["number"] > 0
    adata.obsm["two"] = rng.normal(size=(200, 2))
    return adata


def test_the_table_is_tidy_and_stays_so_on_disk(cells, tmp_path, compare):
    before = compare.state(cells)
    found = probe(cells, "X_pca", ["number", "group", "two", "flag"])
    compare.assert_same(before, compare.state(cells))
    assert found.dtypes.astype(str).to_dict() == COLUMNS
    assert found["variable"].tolist() == ["number", "a", "a", "b", "b", "c", "c", "two_0", "two_1", "flag"]
    assert found["metric"].tolist() == ["r2", *["r2", "auroc"] * 3, "r2", "r2", "r2"]
    assert found["kind"].tolist() == ["number", *["label"] * 6, "number", "number", "number"]
    assert found["group"].tolist() == ["number", *["group"] * 6, "two", "two", "flag"]
    assert (found["ci_low"] <= found["score"]).all() and (found["score"] <= found["ci_high"]).all()
    r2 = found[found["metric"] == "r2"]
    assert (r2["ci_low"] < r2["score"]).all() and (r2["score"] < r2["ci_high"]).all()
    cells.uns["probe"] = found
    for kind in ("h5ad", "zarr"):
        getattr(cells, f"write_{kind}")(tmp_path / kind)
        compare.assert_same(found, getattr(ad, f"read_{kind}")(tmp_path / kind).uns["probe"])


def test_scores_are_those_of_scikit_learn(cells):
    """On other folds, so up to what those change."""
    found = probe(cells, "X_pca", ["number", "group"]).set_index(["variable", "metric"])["score"]
    x, folds = cells.obsm["X_pca"], KFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(LinearRegression(), x, cells.obs["number"], cv=folds)
    assert found["number", "r2"] == pytest.approx(r2_score(cells.obs["number"], predicted), abs=0.02)
    for label in "abc":
        inside = (cells.obs["group"] == label).to_numpy()
        score = cross_val_predict(LogisticRegression(), x, inside, cv=folds, method="decision_function")
        assert found[label, "auroc"] == pytest.approx(roc_auc_score(inside, score), abs=0.03)
        predicted = cross_val_predict(LinearRegression(), x, inside.astype(float), cv=folds)
        assert found[label, "r2"] == pytest.approx(r2_score(inside, predicted), abs=0.03)


def test_a_seed_repeats_and_another_differs(cells):
    one, other, third = (probe(cells, "X_pca", ["number", "group"], rng=rng) for rng in (0, 0, 1))
    pd.testing.assert_frame_equal(one, other)
    assert (one["score"] != third["score"]).any()
    state = np.random.get_state()[1].copy()
    probe(cells, "X_pca", "group")
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_every_layout_of_the_representation(cells, tmp_path):
    expected = probe(cells, "X", ["number", "group"])["score"]
    dense = cells.X
    cells.X = sparse.csr_matrix(dense)
    np.testing.assert_allclose(probe(cells, "X", ["number", "group"])["score"], expected, atol=2e-3)
    cells.layers["same"], cells.obsm["table"] = dense, pd.DataFrame(dense, cells.obs_names, cells.var_names)
    np.testing.assert_allclose(probe(cells, None, ["number", "group"], layer="same")["score"], expected, atol=1e-9)
    np.testing.assert_allclose(probe(cells, "table", ["number", "group"])["score"], expected, atol=1e-9)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    np.testing.assert_allclose(probe(backed, "X", ["number", "group"])["score"], expected, atol=2e-3)
    backed.file.close()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = dense
    with h5py.File(tmp_path / "x.h5") as file:
        cells.obsm["disk"] = dense
        cells.obsm._data["disk"] = file["x"]
        np.testing.assert_allclose(probe(cells, "disk", ["number", "group"])["score"], expected, atol=1e-9)


def test_activations_of_an_sae(encoded):
    found = probe(encoded, "sae", "bulk_labels", n_folds=3)
    aurocs = found.loc[found["metric"] == "auroc", "score"]
    assert len(aurocs) == encoded.obs["bulk_labels"].nunique()
    assert aurocs.mean() > 0.9
    raw = probe(encoded, "X", "bulk_labels", n_folds=3)
    assert raw.loc[raw["metric"] == "auroc", "score"].mean() > 0.95
    assert (raw.loc[raw["metric"] == "r2", "score"] > -0.1).all()


def test_mudata(make_mudata):
    mdata = make_mudata()
    joint = probe(mdata, "X_joint", "group", n_folds=3)
    alone = probe(mdata, "X_pca", "group", mod="rna", n_folds=3)
    assert joint["variable"].tolist() == alone["variable"].tolist() == ["a", "a", "b", "b", "c", "c"]
    # The same embedding with its columns in reverse, but the cells are in another order.
    np.testing.assert_allclose(joint["score"], alone["score"], atol=0.1)


def test_donors_are_held_out_whole(cells):
    """A variable that every donor has its own value of cannot be known of other donors."""
    rng = np.random.default_rng(0)
    donor = rng.integers(10, size=200)
    cells.obs["donor"] = pd.Categorical([f"donor{number}" for number in donor])
    cells.obs["own"] = rng.normal(size=10)[donor]
    cells.obsm["of_donor"] = (donor[:, None] == np.arange(10)).astype(float)
    assert probe(cells, "of_donor", "own")["score"].item() == pytest.approx(1, abs=1e-6)
    assert probe(cells, "of_donor", "own", donor="donor")["score"].item() < 0.1


def test_what_is_constant_is_named(cells, log):
    table = pd.DataFrame({"number": cells.obs["number"], "always": 3.0})
    found = probe(cells, "X_pca", table)
    assert found["score"].isna().tolist() == [False, True]
    assert "1 of 2 variables of targets= are the same in all cells ('always')" in log()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"targets": "nothing"}, KeyError, "'nothing' is neither in adata.obs", id="no such key"),
        pytest.param(
            {"targets": np.ones((200, 2))}, ValueError, "no variable that differs between the 200", id="constant"
        ),
        pytest.param(
            {"targets": np.ones((7, 2))}, ValueError, r"\(7, 2\); expected a row for each of the 200", id="rows"
        ),
        pytest.param({"use_rep": "X_umap"}, KeyError, "no 'X_umap'", id="no such representation"),
        pytest.param({"n_folds": 1}, ValueError, "n_folds=1 is below 2", id="one fold"),
        pytest.param({"n_folds": 150}, ValueError, "200 cells are too few for n_folds=150", id="few cells"),
        pytest.param({"donor": "group"}, ValueError, "3 donors cannot be divided into n_folds=5", id="few donors"),
        pytest.param({"donor": "person"}, KeyError, "no column 'person'", id="no such donor"),
        pytest.param({"mod": "rna"}, ValueError, "the data is an AnnData", id="modality"),
    ],
)
def test_bad_input(cells, arguments, error, message, compare):
    before = compare.state(cells)
    with pytest.raises(error, match=message):
        probe(cells, **{"use_rep": "X_pca", "targets": "number", **arguments})
    compare.assert_same(before, compare.state(cells))


def test_nan_in_the_representation(cells):
    cells.obsm["X_pca"][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"obsm\['X_pca'\] has 1 NaN or infinite values"):
        probe(cells, "X_pca", "number")
