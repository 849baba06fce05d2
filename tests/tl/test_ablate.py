from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import zarr
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.neighbors import KNeighborsClassifier

import sae

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
THREE_BATCHES = FOLDER / "pbmc_3batch_10x_symphony_lognorm_labeled.h5ad"

FEATURES = {
    "key_added": "category",
    "feature": "category",
    "batch": "category",
    "batch_score": "float64",
    "label": "category",
    "label_score": "float64",
    "size": "float64",
    "ablated": "bool",
}
SCORES = {
    "key_added": "category",
    "source": "category",
    "draw": "int64",
    "n_features": "int64",
    "change": "float64",
    "batch_asw": "float64",
    "silhouette_batch": "float64",
    "silhouette_label": "float64",
    "batch_purity": "float64",
    "label_purity": "float64",
    "label_accuracy": "float64",
}


def simulated(seed: int, n: int = 600, d: int = 10) -> ad.AnnData:
    """Cells of four groups, each along an axis of its own; the second batch is moved along another axis."""
    rng = np.random.default_rng(seed)
    group, batch = rng.integers(4, size=n), rng.integers(2, size=n)
    x = rng.normal(scale=0.5, size=(n, d))
    x[np.arange(n), group] += 4
    x[:, -1] += 3 * batch * rng.uniform(0.5, 1.5, n)
    obs = {"group": np.array(list("abcd"))[group], "batch": np.array(["one", "two"])[batch]}
    obs = pd.DataFrame(obs, index=[f"cell{i}" for i in range(n)])
    return ad.AnnData(obs=obs, obsm={"X_sim": x.astype(np.float32)})


@pytest.fixture(scope="module")
def _batches():
    adata = simulated(0)
    sae.tl.fit(adata, "X_sim", n_features=8, k=2, preprocess="center", steps=300, progress=False)
    sae.tl.encode(adata)
    return adata


@pytest.fixture
def batches(_batches):
    return _batches.copy()


def known_features(a: np.ndarray, batch: list[str], label: list[str]) -> ad.AnnData:
    """An SAE whose features are the columns of its representation, which are given."""
    obs = pd.DataFrame({"batch": batch, "label": label}, index=[f"cell{i}" for i in range(len(a))])
    adata = ad.AnnData(obs=obs, obsm={"X_known": a.astype(np.float32)})
    d = a.shape[1]
    sae.tl.fit(adata, "X_known", architecture="vanilla", l1=0.1, n_features=d, steps=1, progress=False)
    adata.uns["sae"]["weights"] |= {
        "W_enc": np.eye(d, dtype=np.float32),
        "b_enc": np.zeros(d, dtype=np.float32),
        "W_dec": np.eye(d, dtype=np.float32),
        "b_dec": np.zeros(d, dtype=np.float32),
    }
    sae.tl.encode(adata, progress=False)
    return adata


def ablation(adata, key_added=None, key="sae"):
    tables = adata.uns[key]["ablation"].values()
    return [table if key_added is None else table[table["key_added"] == key_added] for table in tables]


def without(adata, features, rep="X_pca", key="sae"):
    """Take the features out one after another."""
    z = np.asarray(adata.obsm[rep], dtype=np.float64)
    a, W_dec = adata.obsm[key].toarray(), adata.uns[key]["weights"]["W_dec"]
    for feature in features:
        z = z - np.outer(a[:, feature], W_dec[feature])
    return z


def test_writes_the_representation_and_two_tables(encoded, compare):
    before = compare.state(encoded)
    assert sae.tl.ablate(encoded, ["sae_3", 5], batch="phase", groupby="bulk_labels", n_controls=3) is None
    features, scores = ablation(encoded)
    del encoded.uns["sae"]["ablation"]
    new = encoded.obsm["X_pca_ablated"]
    del encoded.obsm["X_pca_ablated"]
    compare.assert_same(before, compare.state(encoded))

    assert new.dtype == np.float32
    np.testing.assert_allclose(new, without(encoded, [3, 5]), atol=1e-4)
    assert features.dtypes.astype(str).to_dict() == FEATURES and list(features) == list(FEATURES)
    assert scores.dtypes.astype(str).to_dict() == SCORES and list(scores) == list(SCORES)
    assert features["feature"].tolist() == [f"sae_{i}" for i in range(32)]
    assert features.loc[features["ablated"], "feature"].tolist() == ["sae_3", "sae_5"]
    assert scores["source"].tolist() == ["before", "after", "control", "control", "control"]
    assert scores["draw"].tolist() == [0, 0, 1, 2, 3]
    assert scores["n_features"].tolist() == [0, 2, 2, 2, 2]


def test_scores_are_of_the_representations(encoded):
    """Each score against scikit-learn, on what is stored."""
    sae.tl.ablate(encoded, [0, 1, 2], batch="phase", groupby="bulk_labels", n_controls=2, n_neighbors=10)
    scores = ablation(encoded)[1].set_index("source")
    variance = encoded.uns["sae"]["params"]["variance"]
    assert scores.loc["before", "change"] == 0
    for source, rep in (("before", "X_pca"), ("after", "X_pca_ablated")):
        x, row = encoded.obsm[rep], scores.loc[source]
        batch, label = (encoded.obs[column].astype(str).to_numpy() for column in ("phase", "bulk_labels"))
        assert row["batch_asw"] == pytest.approx(silhouette_score(x, batch), abs=1e-5)
        assert row["silhouette_label"] == pytest.approx((silhouette_score(x, label) + 1) / 2, abs=1e-5)
        change = ((x.astype(np.float64) - encoded.obsm["X_pca"]) ** 2).sum(axis=1).mean() / variance
        assert row["change"] == pytest.approx(change, abs=1e-6)
        for name, codes in (("batch_purity", batch), ("label_purity", label)):
            model = KNeighborsClassifier(10).fit(x, codes)
            near = model.kneighbors(return_distance=False)
            assert row[name] == pytest.approx((codes[near] == codes[:, None]).mean(), abs=1e-3)
        votes = [pd.Series(label[one]).mode()[0] for one in model.kneighbors(return_distance=False)]
        assert row["label_accuracy"] == pytest.approx((np.array(votes) == label).mean(), abs=2e-3)
        assert 0 < row["silhouette_batch"] < 1
    assert scores.loc["after", "change"] > 0.01 and (scores.loc["control", "change"] > 0).all()


def test_size_is_what_the_removal_of_one_changes(encoded):
    sae.tl.ablate(encoded, 4, batch="phase", n_controls=0)
    features, scores = ablation(encoded)
    assert scores["change"].iloc[1] == pytest.approx(features["size"].iloc[4], rel=1e-5)


@pytest.mark.parametrize("layout", ["dense", "csr", "frame"])
def test_of_genes_and_of_tables(make_adata, layout):
    adata = make_adata(layout=layout)
    use_rep = "X_pca" if layout == "frame" else "X"
    if layout == "frame":
        adata.obsm["X_pca"] = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=list("abcdef"))
    sae.tl.fit(adata, use_rep, n_features=8, steps=30)
    sae.tl.encode(adata)
    sae.tl.ablate(adata, [0, 3])
    adata.obsm["old"] = (
        adata.X.toarray() if layout == "csr" else np.asarray(adata.obsm["X_pca"] if layout == "frame" else adata.X)
    )
    np.testing.assert_allclose(adata.obsm[f"{use_rep}_ablated"], without(adata, [0, 3], "old"), atol=1e-5)


def test_on_disk_in_blocks(make_adata, tmp_path, monkeypatch):
    adata = make_adata(layout="csr")
    sae.tl.fit(adata, "X", n_features=8, steps=30)
    sae.tl.encode(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    sae.tl.ablate(adata, [0, 3], batch="group", n_controls=2)
    monkeypatch.setattr("sae.tl._ablate.BLOCK_ROWS", 7)
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    sae.tl.ablate(backed, [0, 3], batch="group", n_controls=2)
    np.testing.assert_array_equal(backed.obsm["X_ablated"], adata.obsm["X_ablated"])
    pd.testing.assert_frame_equal(ablation(backed)[1], ablation(adata)[1])
    backed.file.close()


@pytest.mark.parametrize("where", ["rna", "adt", None])
def test_mudata(make_mudata, where, compare):
    mdata = make_mudata()
    rep = "X_joint" if where is None else "X_pca"
    slot = mdata if where is None else mdata[where]
    slot.obs["half"] = np.where(np.arange(slot.n_obs) % 2, "odd", "even")
    sae.tl.fit(mdata, rep, mod=where, n_features=8, steps=60)
    sae.tl.encode(mdata, mod=where)
    before = compare.state(mdata)
    sae.tl.ablate(mdata, [1, 2], batch="half", groupby="group", mod=where, n_controls=2)
    np.testing.assert_allclose(slot.obsm[f"{rep}_ablated"], without(slot, [1, 2], rep), atol=1e-5)
    assert ablation(slot)[1]["label_accuracy"].notna().all()
    del slot.uns["sae"]["ablation"], slot.obsm[f"{rep}_ablated"]
    compare.assert_same(before, compare.state(mdata))


def test_features_are_found_by_the_stated_rule(batches):
    sae.tl.ablate(batches, batch="batch", groupby="group", threshold=0.7, n_controls=0)
    features = ablation(batches)[0]
    a = batches.obsm["sae"].toarray()
    batch, group = batches.obs["batch"].to_numpy(), batches.obs["group"].to_numpy()

    def within(inside, strata, feature):
        aurocs, weights = [], []
        for stratum in np.unique(strata):
            rows = strata == stratum
            n_in = inside[rows].sum()
            weights.append(n_in * (rows.sum() - n_in) / (rows.sum() + 1))
            aurocs.append(roc_auc_score(inside[rows], a[rows, feature]))
        return np.average(aurocs, weights=weights)

    for row in features.itertuples():
        feature = int(row.feature.rpartition("_")[2])
        of_batch = {one: within(batch == one, group, feature) for one in ("one", "two")}
        of_label = {one: within(group == one, batch, feature) for one in "abcd"}
        of_batch, of_label = ({k: max(v, 1 - v) for k, v in scores.items()} for scores in (of_batch, of_label))
        assert row.batch_score == pytest.approx(max(of_batch.values()))
        assert row.label_score == pytest.approx(max(of_label.values()))
        assert of_batch[row.batch] == pytest.approx(row.batch_score)
        assert of_label[row.label] == pytest.approx(row.label_score)
        assert row.ablated == (row.batch_score >= 0.7 and row.label_score < 0.85)
    assert 0 < features["ablated"].sum() < 8 and (features["label_score"] >= 0.85).any()


@pytest.mark.parametrize("seed", range(3))
def test_simulated_batch_effect(seed):
    """Batches mix, cell types stay; as many random features leave batches as they are."""
    adata = simulated(seed)
    sae.tl.fit(adata, "X_sim", n_features=8, k=2, preprocess="center", steps=300, progress=False)
    sae.tl.encode(adata)
    sae.tl.ablate(adata, batch="batch", groupby="group")
    scores = ablation(adata)[1].groupby("source", observed=True).mean(numeric_only=True)
    before, after, control = (scores.loc[source] for source in ("before", "after", "control"))
    assert before["batch_asw"] > 0.13 and after["batch_asw"] < 0.07
    assert after["silhouette_batch"] > before["silhouette_batch"] + 0.1
    assert after["batch_purity"] < before["batch_purity"] - 0.09
    assert after["label_accuracy"] > 0.99 and after["silhouette_label"] > before["silhouette_label"]
    assert control["batch_asw"] > before["batch_asw"] - 0.01
    assert control["batch_purity"] > before["batch_purity"] - 0.05


def made_up():
    """Four batches and two labels; features: label, batch, silent in one batch, one batch of one label, noise."""
    rng = np.random.default_rng(0)
    batch, label = np.arange(800) % 4, np.arange(800) // 4 % 2
    on = [label == 1, batch == 0, batch != 1, (batch == 2) & (label == 0), rng.random(800) < 0.5]
    a = np.stack(on, axis=1) * rng.uniform(1, 2, (800, 5)) + rng.uniform(0, 0.5, (800, 5))
    return known_features(a, [f"b{i}" for i in batch], [f"l{i}" for i in label])


def test_batch_features_of_every_kind():
    adata = made_up()
    sae.tl.ablate(adata, batch="batch", groupby="label", threshold=0.8, n_controls=0)
    features = ablation(adata)[0].set_index("feature")
    assert features["ablated"].tolist() == [False, True, True, False, False]
    assert features["batch"].tolist()[1:4] == ["b0", "b1", "b2"]
    assert features["label_score"].tolist()[0] == pytest.approx(1)
    assert features.loc["sae_3", "batch_score"] == pytest.approx(0.75, abs=0.02), "½ in one label, 1 in the other"
    np.testing.assert_allclose(adata.obsm["X_known_ablated"][:, [1, 2]], 0, atol=1e-6)
    np.testing.assert_array_equal(adata.obsm["X_known_ablated"][:, [0, 3, 4]], adata.obsm["X_known"][:, [0, 3, 4]])


def test_batches_of_other_cell_types_are_no_batch_effect(encoded):
    """B cells and monocytes are told apart by many features; a batch of them is not, when they are labels."""
    known = encoded[encoded.obs["bulk_labels"].isin(["CD19+ B", "CD14+ Monocyte"])].copy()
    rng = np.random.default_rng(0)
    of_b = np.where(known.obs["bulk_labels"] == "CD19+ B", 0.9, 0.1)
    known.obs["run"] = np.where(rng.random(known.n_obs) < of_b, "first", "second")
    with pytest.raises(ValueError, match=r"No feature scores 0\.75 or more for a batch"):
        sae.tl.ablate(known, batch="run", groupby="bulk_labels")
    known.obs["nothing"] = np.where(rng.random(known.n_obs) < 0.5, "x", "y")
    sae.tl.ablate(known, batch="run", groupby="nothing", n_controls=0)
    assert ablation(known)[0]["ablated"].any()


def test_several_columns_of_labels():
    """What tells a condition is kept when that is among the labels, though most of its cells are in one batch."""
    rng = np.random.default_rng(0)
    batch, label = np.arange(800) % 4, np.arange(800) // 4 % 2
    treated = rng.random(800) < np.where(batch == 0, 0.95, 0.05)
    a = np.stack([label, treated, rng.random(800)], axis=1) + rng.uniform(0, 0.5, (800, 3))
    adata = known_features(a, [f"b{i}" for i in batch], [f"l{i}" for i in label])
    adata.obs["condition"] = np.where(treated, "treated", "control")
    sae.tl.ablate(adata, batch="batch", groupby=["label"], n_controls=0)
    one = ablation(adata)
    assert one[0]["ablated"].tolist() == [False, True, False] and set(one[0]["label"]) == {"l0"}
    with pytest.raises(ValueError, match=r"No feature scores .*\(batch, label\): sae_\d \(0\.5\d+, "):
        sae.tl.ablate(adata, batch="batch", groupby=["label", "condition"])
    sae.tl.ablate(adata, [1], batch="batch", groupby=["label", "condition"], n_controls=0)
    both = ablation(adata)
    assert both[0]["label"].tolist()[:2] == ["l0", "control"]
    assert both[0]["batch_score"].tolist()[1] < 0.6 and both[0]["label_score"].tolist()[1] > 0.99
    pd.testing.assert_frame_equal(one[1], both[1])


def test_small_groups_have_no_say():
    adata = made_up()
    adata.obs["label"] = adata.obs["label"].astype(object)
    odd = np.flatnonzero((adata.obs["batch"] == "b0").to_numpy())[:9]
    adata.obs.iloc[odd, 1] = "few"
    a = adata.obsm["sae"].tolil()
    a[:, 1] = 0
    a[odd, 1] = 5
    adata.obsm["sae"] = a.tocsr()
    sae.tl.ablate(adata, [1], batch="batch", groupby="label", n_controls=0)
    assert ablation(adata)[0].loc["1", "label_score"] < 0.6
    adata.obs.iloc[np.append(odd, np.flatnonzero((adata.obs["batch"] == "b0").to_numpy())[9]), 1] = "few"
    sae.tl.ablate(adata, [1], batch="batch", groupby="label", n_controls=0)
    assert ablation(adata)[0].loc["1", "label_score"] > 0.9


def test_cells_without_a_label_are_moved_but_not_scored(encoded):
    labels = encoded.obs["bulk_labels"].astype(object)
    labels[::3] = np.nan
    encoded.obs["some"] = labels.astype("category")
    part = encoded[encoded.obs["some"].notna().to_numpy()].copy()
    for adata in (encoded, part):
        sae.tl.ablate(adata, [3, 5], batch="phase", groupby="some", n_controls=0)
    np.testing.assert_allclose(encoded.obsm["X_pca_ablated"], without(encoded, [3, 5]), atol=1e-4)
    pd.testing.assert_frame_equal(ablation(encoded)[1], ablation(part)[1])
    pd.testing.assert_frame_equal(
        ablation(encoded)[0].drop(columns="size"), ablation(part)[0].drop(columns="size"), check_categorical=False
    )


def test_without_columns_nothing_is_scored(encoded):
    sae.tl.ablate(encoded, [3])
    features, scores = ablation(encoded)
    assert len(scores) == 2 and scores["change"].iloc[1] > 0
    assert scores.iloc[:, 5:].isna().all(axis=None)
    assert features[["batch", "batch_score", "label", "label_score"]].isna().all(axis=None)


def test_few_cells_suffice_when_nothing_is_scored(make_adata):
    adata = make_adata(n=12)
    sae.tl.fit(adata, n_features=4, steps=10, validation=0)
    sae.tl.encode(adata)
    sae.tl.ablate(adata, [0])
    np.testing.assert_allclose(adata.obsm["X_pca_ablated"], without(adata, [0]), atol=1e-5)
    with pytest.raises(ValueError, match="n_neighbors=15 needs more than 15 cells, and 12 of adata are scored"):
        sae.tl.ablate(adata, [0], batch="group")


def test_a_second_ablation_keeps_the_first(encoded):
    sae.tl.ablate(encoded, [3], batch="phase", groupby="bulk_labels", n_controls=2)
    first, kept = ablation(encoded), encoded.obsm["X_pca_ablated"]
    sae.tl.ablate(encoded, [4, 5], key_added="other")
    assert encoded.obsm["X_pca_ablated"] is kept
    for table, old, rows in zip(ablation(encoded), first, (64, 6), strict=True):
        assert len(table) == rows and table.index.tolist() == [str(i) for i in range(rows)]
        again = table[table["key_added"] == "X_pca_ablated"]
        pd.testing.assert_frame_equal(again, old, check_categorical=False)
    sae.tl.ablate(encoded, [6], batch="phase", n_controls=0)
    assert len(ablation(encoded, "X_pca_ablated")[1]) == 2 and len(ablation(encoded, "other")[1]) == 2
    np.testing.assert_allclose(encoded.obsm["X_pca_ablated"], without(encoded, [6]), atol=1e-4)
    sae.tl.ablate(encoded, [7], key_added="other")
    np.testing.assert_allclose(encoded.obsm["other"], without(encoded, [7]), atol=1e-4)


def test_again_after_another_fit(encoded):
    sae.tl.ablate(encoded, [3])
    sae.tl.fit(encoded, n_features=8, steps=20)
    sae.tl.encode(encoded)
    assert "ablation" not in encoded.uns["sae"]
    sae.tl.ablate(encoded, [3])
    np.testing.assert_allclose(encoded.obsm["X_pca_ablated"], without(encoded, [3]), atol=1e-4)


def test_controls_are_seeded_and_of_other_features(encoded):
    def scores(**settings):
        sae.tl.ablate(encoded, [0, 3], batch="phase", n_controls=4, **settings)
        return ablation(encoded)[1]

    pd.testing.assert_frame_equal(scores(), scores(rng=0))
    pd.testing.assert_frame_equal(scores(), scores(rng=np.random.default_rng(0)))
    assert not scores().equals(scores(rng=1))
    assert (scores()["n_features"].iloc[2:] == 2).all()


def test_scores_of_some_cells(encoded):
    sae.tl.ablate(encoded, [0], batch="phase", groupby="bulk_labels", n_controls=0, max_cells=400)
    some = ablation(encoded)[1]
    sae.tl.ablate(encoded, [0], batch="phase", groupby="bulk_labels", n_controls=0, max_cells=700)
    everyone = ablation(encoded)[1]
    assert not some.equals(everyone)
    np.testing.assert_allclose(some.iloc[:, 4:], everyone.iloc[:, 4:], atol=0.1)
    assert np.isfinite(encoded.obsm["X_pca_ablated"]).all()


def test_too_few_others_for_controls(encoded, log):
    sae.tl.ablate(encoded, range(20), batch="phase", n_controls=2)
    assert len(ablation(encoded)[1]) == 2
    assert "no random features to compare with: fewer than 20 others are active" in log()


def write_h5ad(adata, path):
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad")


def write_zarr(adata, path):
    store = zarr.storage.MemoryStore()
    adata.write_zarr(store)
    return ad.read_zarr(store)


@pytest.mark.parametrize("through", [write_h5ad, write_zarr], ids=["h5ad", "zarr"])
def test_round_trip(encoded, through, tmp_path, compare):
    sae.tl.ablate(encoded, [0, 3])
    read = through(encoded, tmp_path)
    compare.assert_same(encoded.uns["sae"], read.uns["sae"])
    for adata in (encoded, read):
        sae.tl.ablate(adata, [1], batch="phase", groupby="bulk_labels", n_controls=2, key_added="other")
    compare.assert_same(encoded.uns["sae"], through(read, tmp_path).uns["sae"])
    compare.assert_same(encoded.obsm["other"], read.obsm["other"])


def test_h5mu(make_mudata, tmp_path, compare):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=30)
    sae.tl.encode(mdata)
    sae.tl.ablate(mdata, [1], groupby="group", n_controls=2)
    mdata.write_h5mu(tmp_path / "cells.h5mu")
    read = mudata.read_h5mu(tmp_path / "cells.h5mu")
    compare.assert_same(mdata.uns["sae"], read.uns["sae"])
    compare.assert_same(mdata.obsm["X_joint_ablated"], read.obsm["X_joint_ablated"])


BAD = {
    "no features": ({}, ValueError, r"batch= and groupby= are needed.*Or pass features="),
    "no labels": ({"batch": "phase"}, ValueError, r"batch= and groupby= are needed"),
    "unknown feature": ({"features": "sae_99"}, KeyError, r"no feature 'sae_99': the SAE has"),
    "unknown number": ({"features": [0, 40]}, KeyError, r"no feature 40: the SAE has 32 features"),
    "empty": ({"features": []}, ValueError, r"No features were given"),
    "unknown batch": ({"features": 0, "batch": "run"}, KeyError, r"adata\.obs has no column 'run'"),
    "unknown labels": ({"features": 0, "groupby": ["phase", "x"]}, KeyError, r"adata\.obs has no column 'x'"),
    "continuous": ({"features": 0, "batch": "percent_mito"}, ValueError, r"'percent_mito'\] is continuous"),
    "one batch": ({"batch": "one", "groupby": "phase"}, ValueError, r"'one'\] has only one label \('x'\)"),
    "labels are batches": (
        {"batch": "phase", "groupby": "phase"},
        ValueError,
        r"No label of adata has cells of two batches.*Pass another groupby=",
    ),
    "none is known": ({"batch": "first", "groupby": "second"}, ValueError, r"has a value in all of 'first', 'second'"),
    "none is found": (
        {"batch": "phase", "groupby": "bulk_labels", "threshold": 0.99},
        ValueError,
        r"No feature scores 0\.99 or more .*: sae_\d+ \(0\.\d+, 0\.\d+\), .*Lower threshold=",
    ),
    "low threshold": ({"threshold": 0.5}, ValueError, r"threshold=0\.5 is not above 0\.5"),
    "high threshold": ({"label_threshold": 1.2}, ValueError, r"label_threshold=1\.2 is not above"),
    "controls": ({"features": 0, "n_controls": -1}, ValueError, r"n_controls=-1 is not an integer of 0 or more"),
    "neighbors": ({"features": 0, "n_neighbors": 0}, ValueError, r"n_neighbors=0 is not an integer of 1 or more"),
    "half a cell": ({"features": 0, "max_cells": 0.5}, ValueError, r"max_cells=0\.5 is not an integer"),
    "few cells": (
        {"features": 0, "batch": "phase", "max_cells": 15},
        ValueError,
        r"needs more than 15 cells, and 15 of adata are scored",
    ),
    "no name": ({"features": 0, "key_added": ""}, ValueError, r"key_added='' cannot name a representation"),
    "slash": ({"features": 0, "key_added": "a/b"}, ValueError, r"key_added='a/b' cannot name"),
    "the old one": ({"features": 0, "key_added": "X_pca"}, ValueError, r"obsm\['X_pca'\] holds the representation"),
    "the SAE": ({"features": 0, "key_added": "sae"}, ValueError, r"obsm\['sae'\] holds the activations"),
    "something else": (
        {"features": 0, "key_added": "X_umap"},
        ValueError,
        r"obsm\['X_umap'\] exists and is no earlier ablation",
    ),
    "another SAE": ({"features": 0, "key": "other"}, KeyError, r"no SAE 'other'"),
    "a modality of an AnnData": ({"features": 0, "mod": "rna"}, ValueError, r"Leave mod= out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(encoded, compare, name):
    arguments, error, message = BAD[name]
    encoded.obs["one"] = "x"
    encoded.obs["first"] = pd.Categorical(np.where(np.arange(700) < 300, encoded.obs["phase"].astype(object), None))
    encoded.obs["second"] = pd.Categorical(np.where(np.arange(700) >= 300, encoded.obs["phase"].astype(object), None))
    before = compare.state(encoded)
    with pytest.raises(error, match=message):
        sae.tl.ablate(encoded, **arguments)
    compare.assert_same(before, compare.state(encoded))


def test_key_of_a_modality(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=10)
    sae.tl.encode(mdata)
    with pytest.raises(ValueError, match=r"key_added='rna' is the name of a modality"):
        sae.tl.ablate(mdata, 0, key_added="rna")


def test_not_encoded(fitted):
    with pytest.raises(KeyError, match=r"Run sae\.tl\.encode"):
        sae.tl.ablate(fitted, 0)


def test_what_another_sae_reads_is_not_replaced(encoded):
    sae.tl.ablate(encoded, 0)
    sae.tl.fit(encoded, "X_pca_ablated", n_features=8, steps=10, key_added="second")
    with pytest.raises(ValueError, match=r"obsm\['X_pca_ablated'\] holds the representation of the SAE 'second'"):
        sae.tl.ablate(encoded, 1)


def test_what_another_sae_has_ablated_is_not_replaced(encoded):
    sae.tl.fit(encoded, n_features=8, steps=10, key_added="second", progress=False)
    sae.tl.encode(encoded, key="second", progress=False)
    sae.tl.ablate(encoded, 0)
    with pytest.raises(ValueError, match=r"obsm\['X_pca_ablated'\] exists and is no earlier ablation with this SAE"):
        sae.tl.ablate(encoded, 1, key="second")
    np.testing.assert_allclose(encoded.obsm["X_pca_ablated"], without(encoded, [0]), atol=1e-4)
    sae.tl.ablate(encoded, 1, key="second", key_added="other")
    sae.tl.ablate(encoded, 1)


@pytest.mark.parametrize("seed", range(2))
def test_three_batches_of_pbmc(seed):
    """Three chemistries: batches mix, cell types stay, and random features do not mix batches."""
    if not THREE_BATCHES.exists():
        pytest.skip(f"{THREE_BATCHES.name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    adata = ad.read_h5ad(THREE_BATCHES)
    sc.pp.pca(adata, n_comps=50)
    sae.tl.fit(adata, rng=seed, progress=False)
    sae.tl.encode(adata, progress=False)
    sae.tl.ablate(adata, batch="batch", groupby="cell_type", progress=False)
    scores = ablation(adata)[1]
    means = scores.groupby("source", observed=True).mean(numeric_only=True)
    before, after, control = (means.loc[source] for source in ("before", "after", "control"))
    assert after["batch_asw"] < before["batch_asw"] - 0.01
    assert after["silhouette_batch"] > before["silhouette_batch"] + 0.01
    assert after["batch_purity"] < before["batch_purity"] - 0.03
    assert after["label_accuracy"] >= before["label_accuracy"] - 0.02
    assert control["batch_asw"] > after["batch_asw"] + 0.01
    assert control["label_accuracy"] < after["label_accuracy"] + 0.005
