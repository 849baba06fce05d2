from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

import sae

SETS = {"early": [f"g{i}" for i in range(6)], "late": [f"g{i}" for i in range(9, 14)]}


class Model:
    """A smooth decoder of log1p values for 15 genes, of which it knows nothing about the last."""

    scale = "log1p"

    def __init__(self, d=6):
        rng = np.random.default_rng(3)
        self.loadings, self.calls = rng.normal(size=(d, 15)), 0

    def values(self, z):
        x = np.log1p(np.exp(z.astype(np.float64) @ self.loadings * 0.3))
        x[:, 14] = np.nan
        return x

    def decode(self, z, data):
        self.calls += 1
        genes = pd.DataFrame(index=[f"g{i}" for i in range(15)])
        return ad.AnnData(self.values(z), obs=data.obs[[]], var=genes, uns={"scale": self.scale})


class Hooked:
    """A model that takes a step inside and has no decoder."""

    def __init__(self, model, z):
        self.model, self.z = model, z

    def intervene(self, step, data):
        return self.model.decode(self.z.loc[data.obs_names].to_numpy() + step, data)

    def decode(self, z, data):
        raise NotImplementedError("Hooked has no decoder.")


@pytest.fixture(scope="module")
def _small(make_adata):
    adata = make_adata(200)
    sae.tl.fit(adata, n_features=24, k=4, steps=200, progress=False)
    sae.tl.encode(adata)
    return adata


@pytest.fixture
def adata(_small):
    return _small.copy()


@pytest.fixture
def feature(_small):
    """The number of a feature that is active in about half of the cells."""
    return int((sae.get.features(_small)["density"] - 0.5).abs().argmin())


def steer(adata, feature, model=None, **settings):
    model = Model() if model is None else model
    sae.tl.steer(adata, feature, model=model, **{"n_controls": 0, "n_genes": None, "progress": False, **settings})
    return adata.uns["sae"]["steering"]


def parts(adata, feature):
    """Latent, activation of the feature, and its direction."""
    return adata.obsm["X_pca"], adata.obsm["sae"].toarray()[:, feature], adata.uns["sae"]["weights"]["W_dec"][feature]


def moved(adata, feature, change):
    z, a, direction = parts(adata, feature)
    return z + (change(a) - a)[:, None] * direction


RULES = {
    "set to the mean of active cells": ({}, lambda a: np.full(len(a), a[a > 0].mean())),
    "set to a value": ({"value": 2.5}, lambda a: np.full(len(a), 2.5)),
    "set to a quantile": ({"quantile": 0.9}, lambda a: np.full(len(a), np.quantile(a[a > 0], 0.9))),
    "half of it": ({"value": 2, "doses": [0.5]}, lambda a: np.ones(len(a))),
    "add": ({"intervention": "add", "value": 0.5}, lambda a: a + 0.5),
    "scale": ({"intervention": "scale", "doses": 3}, lambda a: 3 * a),
    "ablate": ({"intervention": "ablate"}, lambda a: 0 * a),
}


@pytest.mark.parametrize("rule", RULES)
def test_change_of_every_gene_against_scipy(adata, feature, rule):
    settings, change = RULES[rule]
    found = steer(adata, feature, **{"doses": [1], "groupby": "group", **settings})["genes"]
    model = Model()
    before, after = model.values(adata.obsm["X_pca"]), model.values(moved(adata, feature, change))
    changed = [label for label in "abc" if np.any((after != before)[adata.obs["group"] == label, 0])]
    assert len(changed) >= 2 and set(found["label"]) == set(changed)
    for label in changed:
        cells = (adata.obs["group"] == label).to_numpy()
        rows = found[found["label"] == label].set_index("gene")
        assert set(rows.index) == {f"g{i}" for i in range(14)}
        rows = rows.loc[[f"g{i}" for i in range(14)]]
        one, other = before[cells, :14], after[cells, :14]
        expected = stats.ttest_rel(other, one)
        np.testing.assert_allclose(rows["change"], (other - one).mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rows["score"], expected.statistic, rtol=1e-3)
        np.testing.assert_allclose(np.log(rows["pval"]), np.log(expected.pvalue), rtol=1e-3)
        np.testing.assert_allclose(
            np.log(rows["padj"]), np.log(stats.false_discovery_control(expected.pvalue)), rtol=1e-3
        )
        means = [np.expm1(values.mean(axis=0)) + 0.1 for values in (other, one)]
        np.testing.assert_allclose(rows["log2fc"], np.log2(means[0] / means[1]), rtol=1e-3, atol=1e-5)


def test_mean_of_a_reference(adata, feature):
    _, a, _ = parts(adata, feature)
    mean = a[adata.obs["group"] == "b"].mean()
    doses = steer(adata, feature, groupby="group", reference="b", doses=[1, 2])["doses"]
    np.testing.assert_allclose(doses["value"], [mean, 2 * mean], rtol=1e-6)


def test_the_value_told_is_the_one_set(adata, feature):
    assert steer(adata, feature, value=2, doses=[-1, 0, 1.5])["doses"]["value"].tolist() == [0, 0, 3]
    assert steer(adata, feature, value=2, doses=[-1], intervention="add")["doses"]["value"].tolist() == [-2]


def test_nothing_changes_where_the_activation_does_not(adata, feature):
    """Not even by what the SAE fails to reconstruct."""
    found = steer(adata, feature, intervention="scale", doses=[1.0])
    assert len(found["genes"]) == 0
    row = found["doses"].iloc[0]
    assert row["n_moved"] == 0 and row["step"] == 0 and row["effect"] == 0
    assert row["distance"] == row["distance_before"]


def test_published_form_takes_the_reconstruction(adata, feature):
    sae.tl.steer(adata, feature, model=Model(), doses=[1], value=2, reconstruct=True, key_added="X_new", n_controls=0)
    model, a = sae.get.model(adata), adata.obsm["sae"].toarray()
    a[:, feature] = 2
    np.testing.assert_allclose(adata.obsm["X_new"], model.decode(a), rtol=1e-4, atol=1e-5)
    doses = adata.uns["sae"]["steering"]["doses"]
    np.testing.assert_allclose(
        doses["step"], np.linalg.norm(model.decode(a) - adata.obsm["X_pca"], axis=1).mean(), rtol=1e-5
    )
    # Also without any change of the activation, which is the flaw of it.
    assert steer(adata, feature, intervention="scale", doses=[1], reconstruct=True)["doses"]["effect"].iloc[0] > 0


def test_latent_and_prediction_of_one_dose(adata, feature):
    mask = (adata.obs["group"] == "a").to_numpy()
    steer(adata, feature, value=3, doses=[1], cells=mask, key_added="X_up", layer_added="up")
    expected = np.where(mask[:, None], moved(adata, feature, lambda a: 3 + 0 * a), adata.obsm["X_pca"])
    np.testing.assert_allclose(adata.obsm["X_up"], expected, rtol=1e-5, atol=1e-5)
    assert adata.obsm["X_up"].dtype == adata.layers["up"].dtype == np.float32
    np.testing.assert_allclose(adata.layers["up"][:, :14], Model().values(expected)[:, :14], rtol=1e-3, atol=1e-5)
    # The model has no opinion on the last of its 15 genes, nor on the five it does not know.
    assert np.isnan(adata.layers["up"][:, 14:]).all()
    # Nothing that came before is out of date.
    sae.tl.rank_genes(adata)


def test_cells_by_name_and_by_mask(adata, feature):
    mask = np.arange(200) % 3 == 0
    by_mask = steer(adata, feature, cells=mask)
    by_name = steer(adata, feature, cells=list(adata.obs_names[mask][::-1]))
    pd.testing.assert_frame_equal(by_mask["genes"], by_name["genes"])
    assert by_mask["doses"]["n_cells"].tolist() == [67] * 4
    as_series = pd.Series(mask, index=adata.obs_names, dtype="boolean")
    for cells in (list(mask), as_series, as_series[::-1]):
        pd.testing.assert_frame_equal(by_mask["genes"], steer(adata, feature, cells=cells)["genes"])


def test_names_that_occur_twice(adata, feature):
    adata.obs_names = ["x", "x", *adata.obs_names[2:]]
    assert steer(adata, feature, cells=["x", "cell7"])["params"]["n_cells"] == 3
    with pytest.raises(
        ValueError, match=r"layer_added='up' puts predictions in their places by name, .* more than once"
    ):
        steer(adata, feature, doses=1, layer_added="up")


def test_labels_that_cells_move_towards(adata, feature):
    labels = steer(adata, feature, groupby="group", doses=[0, 4], value=2, n_neighbors=5)["labels"]
    assert len(labels) == 2 * 3 * 3
    z, _, direction = parts(adata, feature)
    group, after = adata.obs["group"].to_numpy(), moved(adata, feature, lambda a: 8 + 0 * a)
    row = labels[(labels["dose"] == 4) & (labels["label"] == "a") & (labels["towards"] == "b")].iloc[0]
    for name, points in (("before", z), ("after", after)):
        shares = []
        for i in np.flatnonzero(group == "a"):
            distance = np.linalg.norm(z - points[i], axis=1)
            distance[i] = np.inf
            shares.append((group[np.argsort(distance)[:5]] == "b").mean())
        np.testing.assert_allclose(row[name], np.mean(shares), atol=1e-6)
    np.testing.assert_allclose(row["difference"], row["after"] - row["before"])
    start, end = z[group == "a"].mean(axis=0), z[group == "b"].mean(axis=0)
    step = after[group == "a"].mean(axis=0) - start
    np.testing.assert_allclose(row["closed"], step @ (end - start) / np.sum((end - start) ** 2), rtol=1e-4)
    own = labels[labels["label"] == labels["towards"].astype(str)]
    assert own["closed"].isna().all() and labels["closed"].notna().sum() == 12


def test_a_feature_of_a_label_moves_cells_towards_it(adata):
    """The feature is chosen by its AUROC, and the cells of other labels go there."""
    sae.tl.score_labels(adata, "group", progress=False)
    best = sae.get.label_summary(adata, label="b")["selected"].iloc[0]
    found = steer(adata, best, groupby="group", reference="b", doses=[1, 2], n_controls=30, rng=1)
    labels = found["labels"]
    away = labels[(labels["label"] != "b") & (labels["towards"] == "b")]
    assert (away["closed"] > 0.2).all()
    controls = found["controls"].set_index(["dose", "measure", "name"]).sort_index()
    assert controls.loc[(2.0, "label", "b"), "above_directions"] >= 0.9


def test_controls_are_those_of_a_loop(adata, feature, monkeypatch):
    # All cells are compared: nothing is drawn but the directions.
    monkeypatch.setattr("sae.tl._steer.MAX_CONTROL_CELLS", 200)
    n = 7
    settings = {"groupby": "group", "doses": [1], "value": 3, "n_controls": n, "net": SETS, "rng": 5}
    controls = steer(adata, feature, **settings)["controls"]
    assert controls["measure"].tolist() == ["effect", "distance", *["label"] * 3, *["gene_set"] * 2]
    assert controls["name"].tolist() == ["", "", "a", "b", "c", "early", "late"]
    assert (controls["n_directions"] == n).all() and (controls["n_features"] == n).all()
    z, a, direction = parts(adata, feature)
    model = Model()

    def auroc(along):
        change = model.values(z + (3 - a)[:, None] * along) - model.values(z)
        return roc_auc_score(np.arange(14) < 6, change.mean(axis=0)[:14])

    row = controls[controls["name"] == "early"].iloc[0]
    np.testing.assert_allclose(row["value"], auroc(direction))
    n_active = adata.obsm["sae"].getnnz(axis=0)
    W = adata.uns["sae"]["weights"]["W_dec"]
    spread = z.std(axis=0)
    cosine = (W / spread) @ (direction / spread)
    cosine = cosine / np.linalg.norm(W / spread, axis=1) / np.linalg.norm(direction / spread)
    usable = np.flatnonzero((n_active > 0) & (cosine <= 0.9))
    order = np.argsort(np.abs(np.log(n_active[usable] / n_active[feature])), kind="stable")
    others = [auroc(W[g] / np.linalg.norm(W[g]) * np.linalg.norm(direction)) for g in usable[order[:n]]]
    np.testing.assert_allclose(row["of_features"], np.mean(others))
    np.testing.assert_allclose(row["above_features"], np.mean(row["value"] > np.array(others)))


def test_features_of_other_seeds_are_controls_too(adata, feature):
    sae.tl.fit(adata, n_features=24, k=4, steps=100, rng=1, key_added="other", progress=False)
    sae.tl.encode(adata, key="other")
    alone = steer(adata, feature, n_controls=40)["controls"]
    both = steer(adata, feature, n_controls=40, control_keys=["other"])["controls"]
    assert (alone["n_features"] < 24).all()
    assert (both["n_features"] > alone["n_features"]).all()


def test_controls_are_of_the_same_representation(adata, feature, compare):
    adata.obsm["X_other"] = adata.obsm["X_pca"][:, ::-1].copy()
    sae.tl.fit(adata, use_rep="X_other", n_features=24, k=4, steps=50, key_added="other", progress=False)
    sae.tl.encode(adata, key="other")
    before = compare.state(adata)
    with pytest.raises(ValueError, match=r"'other' of control_keys= is of 'X_other' and 'sae' of 'X_pca'"):
        steer(adata, feature, control_keys=["other"])
    compare.assert_same(before, compare.state(adata))


def test_gene_sets_without_controls(adata, feature):
    settings = {"net": SETS, "doses": [1], "value": 3, "groupby": "group"}
    alone = steer(adata, feature, **settings)["controls"]
    beside = steer(adata, feature, **settings, n_controls=3)["controls"]
    pd.testing.assert_frame_equal(alone[["measure", "name", "value"]], beside[["measure", "name", "value"]])
    assert (alone["n_features"] == 0).all() and alone["above_features"].isna().all()
    assert len(steer(adata, feature)["controls"]) == 0


def test_a_layer_that_an_sae_is_of_stays(adata, feature):
    adata.layers["log"] = adata.X.copy()
    sae.tl.fit(adata, layer="log", n_features=24, k=4, steps=20, key_added="genes", progress=False)
    with pytest.raises(ValueError, match=r"layers\['log'\] holds the representation of the SAE 'genes'"):
        steer(adata, feature, doses=1, layer_added="log")
    np.testing.assert_array_equal(adata.layers["log"], adata.X)


def test_a_view_and_a_backed_file(adata, feature, tmp_path):
    settings = {"doses": [1], "value": 2, "groupby": "group", "n_controls": 2, "key_added": "X_up", "layer_added": "up"}
    expected = adata.copy()
    found = steer(expected, feature, **settings)
    view = adata[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ad.ImplicitModificationWarning)
        of_view = steer(view, feature, **settings)
    assert "steering" not in adata.uns["sae"] and "up" not in adata.layers
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for table in ("genes", "doses", "labels", "controls"):
        pd.testing.assert_frame_equal(found[table], of_view[table])
    for data in (view, backed):
        of_data = steer(data, feature, **settings)
        pd.testing.assert_frame_equal(found["controls"], of_data["controls"])
        np.testing.assert_array_equal(data.obsm["X_up"], expected.obsm["X_up"])
    backed.file.close()


@pytest.mark.parametrize("convert", [sparse.csr_matrix, np.float64, pd.DataFrame], ids=["csr", "float64", "frame"])
def test_other_forms_of_the_latent(adata, feature, convert):
    settings = {"doses": [1], "value": 2, "groupby": "group", "reconstruct": True}
    expected = steer(adata, feature, **settings)
    latent = adata.obsm["X_pca"]
    adata.obsm["X_pca"] = convert(latent) if convert is not pd.DataFrame else pd.DataFrame(latent, adata.obs_names)
    found = steer(adata, feature, **settings)
    for table in ("genes", "doses", "labels"):
        pd.testing.assert_frame_equal(expected[table], found[table], rtol=1e-4)


def test_a_model_that_takes_steps(adata, feature):
    z = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names)
    decoded = steer(adata, feature, groupby="group")
    hooked = steer(adata, feature, Hooked(Model(), z), groupby="group")
    for table in ("genes", "doses", "labels"):
        pd.testing.assert_frame_equal(decoded[table], hooked[table])
    with pytest.raises(NotImplementedError, match="Hooked has no decoder"):
        sae.tl.rank_genes(adata, model=Hooked(Model(), z))
    # A step is measured as well.
    sae.tl.steer(adata, feature, model=Hooked(Model(), z), value=2, doses=[1], layer_added="up", progress=False)
    expected = Model().values(moved(adata, feature, lambda a: 2 + 0 * a))
    np.testing.assert_allclose(adata.layers["up"][:, :14], expected[:, :14], rtol=1e-4, atol=1e-5)


def test_logarithms_have_a_fold_change(adata, feature):
    model = Model()
    model.scale = "log"
    found = steer(adata, feature, model)["genes"]
    np.testing.assert_allclose(found["log2fc"], found["change"] / np.log(2))


def test_chunks_and_blocks_change_nothing(adata, feature, monkeypatch):
    whole = steer(adata, [feature, 0, 1], groupby="group", n_controls=3)
    monkeypatch.setattr("sae.core.steering.CHUNK_VALUES", 15 * 33)
    monkeypatch.setattr("sae.core.changes.SUM_BYTES", 15 * 3 * 16 * 5)
    parts = steer(adata, [feature, 0, 1], groupby="group", n_controls=3)
    for table in ("genes", "doses", "labels", "controls"):
        pd.testing.assert_frame_equal(whole[table], parts[table], rtol=1e-6)


def test_same_seed_same_result(adata, feature):
    first = steer(adata, feature, n_controls=5, rng=3)["controls"]
    pd.testing.assert_frame_equal(first, steer(adata, feature, n_controls=5, rng=3)["controls"])
    assert not first["of_directions"].equals(steer(adata, feature, n_controls=5, rng=4)["controls"]["of_directions"])


def test_best_genes_of_each_direction(adata, feature):
    everything = steer(adata, feature, doses=[1])["genes"]
    best = steer(adata, feature, doses=[1], n_genes=2)["genes"]
    rising = everything.sort_values("change", ascending=False)["gene"].astype(str).tolist()
    assert best["gene"].astype(str).tolist() == rising[:2] + rising[-2:]
    assert best["padj"].to_numpy() == pytest.approx(everything.set_index("gene").loc[best["gene"], "padj"].to_numpy())


def test_cells_without_a_label_are_left_out(adata, feature):
    adata.obs["some"] = adata.obs["group"].where(np.arange(200) < 150)
    found = steer(adata, feature, groupby="some")
    assert (found["doses"]["n_cells"] == 150).all()
    assert found["labels"]["label"].nunique() == 3


def test_two_modalities(make_mudata):
    mdata = make_mudata(80)
    # A joint SAE, and a model of both modalities.
    sae.tl.fit(mdata, use_rep="X_joint", n_features=16, k=3, steps=100, progress=False)
    sae.tl.encode(mdata)
    loadings = np.random.default_rng(0).normal(size=(6, 28))

    class Joint:
        def decode(self, z, data):
            assert isinstance(data, mudata.MuData) and data.n_obs == len(z)
            x = (z @ loadings).astype(np.float32)
            names = {"rna": mdata["rna"].var_names, "adt": mdata["adt"].var_names}
            values = {"rna": x[:, :20], "adt": np.exp(x[:, 20:])}
            return {
                mod: ad.AnnData(
                    values[mod],
                    obs=pd.DataFrame(index=data.obs_names),
                    var=pd.DataFrame(index=names[mod]),
                    uns={"scale": "log1p" if mod == "rna" else "linear"},
                )
                for mod in names
            }

    sae.tl.steer(
        mdata, 0, model=Joint(), value=2, doses=[1], groupby="group", n_controls=2, layer_added="up", var_mod="adt"
    )
    genes = mdata.uns["sae"]["steering"]["genes"]
    assert genes.groupby("modality", observed=True)["gene"].nunique().to_dict() == {"rna": 20, "adt": 8}
    _, a, direction = mdata.obsm["X_joint"], mdata.obsm["sae"].toarray()[:, 0], mdata.uns["sae"]["weights"]["W_dec"][0]
    z = mdata.obsm["X_joint"] + (2 - a)[:, None] * direction
    change = np.exp(z @ loadings) - np.exp(mdata.obsm["X_joint"] @ loadings)
    inside = (mdata.obs["group"] == "a").to_numpy()
    row = genes[(genes["gene"] == "p3") & (genes["label"] == "a")].iloc[0]
    np.testing.assert_allclose(row["change"], change[inside, 23].mean(), rtol=1e-4)
    rows = mdata.obs_names.get_indexer(mdata["adt"].obs_names)
    np.testing.assert_allclose(mdata["adt"].layers["up"], np.exp(z @ loadings)[rows, 20:], rtol=1e-3)

    sae.tl.rank_genes(mdata, model=Joint(), var_mod="adt", min_expected=0)
    assert set(sae.get.genes(mdata)["gene"]) <= set(mdata["adt"].var_names)
    with pytest.raises(ValueError, match=r"is of the modalities 'rna', 'adt', not of 'atac'|no modality 'atac'"):
        sae.tl.rank_genes(mdata, model=Joint(), var_mod="atac")


def test_sae_of_a_modality(make_mudata):
    mdata = make_mudata(80)
    sae.tl.fit(mdata, mod="rna", n_features=16, k=3, steps=100, progress=False)
    sae.tl.encode(mdata, mod="rna")
    alone = mdata["rna"].copy()
    for data, where in ((mdata, {"mod": "rna"}), (alone, {})):
        sae.tl.steer(data, 0, model=Model(), value=2, groupby="group", n_controls=2, **where)
    pd.testing.assert_frame_equal(
        sae.get.steering(mdata, mod="rna", table="labels"), sae.get.steering(alone, table="labels")
    )


def test_get_steering(adata, feature):
    steer(adata, [feature, "sae_0"], groupby="group", doses=[0, 1], value=2)
    found = sae.get.steering(adata, feature, dose=1, label="b", n=3)
    assert len(found) == 3 and found["change"].is_monotonic_decreasing
    assert set(found["label"]) == {"b"} and set(found["feature"]) == {f"sae_{feature}"}
    assert len(sae.get.steering(adata, table="doses")) == 4
    with pytest.raises(KeyError, match=r"no results for the dose 3; there are for 0\.0, 1\.0"):
        sae.get.steering(adata, dose=3)
    with pytest.raises(ValueError, match=r"table='cells' is not one of 'genes', 'doses', 'labels', 'controls'"):
        sae.get.steering(adata, table="cells")


BAD = {
    "intervention": ({"intervention": "push"}, ValueError, r"intervention='push' is not one of 'set', 'add'"),
    "two values": ({"value": 1, "quantile": 0.5}, ValueError, r"value=1 and quantile=0\.5 were given\. Pass one"),
    "value of a factor": ({"intervention": "scale", "value": 1}, ValueError, r"has no value, but value=1 was given"),
    "infinite value": ({"value": np.inf}, ValueError, r"value=inf is not a finite activation"),
    "quantile": ({"quantile": 90}, ValueError, r"quantile=90 is not between 0 and 1"),
    "reference without labels": ({"reference": "a"}, ValueError, r"reference='a' is a label.*groupby="),
    "unknown reference": ({"reference": "z", "groupby": "group"}, KeyError, r"no label 'z'; it has 'a', 'b', 'c'"),
    "unknown column": ({"groupby": "type"}, KeyError, r"adata\.obs has no column 'type'; it has 'group'"),
    "no doses": ({"doses": []}, ValueError, r"doses=\[\] has to be one finite number or more"),
    "a dose twice": ({"doses": [1, 1]}, ValueError, r"has a dose twice"),
    "short mask": ({"cells": [True, False]}, ValueError, r"mask of shape \(2,\); adata has 200 cells"),
    "empty mask": ({"cells": np.zeros(200, bool)}, ValueError, r"no cell of adata to steer"),
    "unknown cells": ({"cells": ["x"]}, KeyError, r"adata has no cells 'x'"),
    "two for one layer": (
        {"layer_added": "up"},
        ValueError,
        r"layer_added='up' holds one feature at one dose; there are 4",
    ),
    "two for one latent": ({"key_added": "X_up"}, ValueError, r"key_added='X_up' holds one feature at one dose"),
    "latent over the embedding": (
        {"key_added": "X_pca", "doses": 1},
        ValueError,
        r"holds the representation of the SAE",
    ),
    "latent over the SAE": ({"key_added": "sae", "doses": 1}, ValueError, r"holds the activations of the SAE 'sae'"),
    "slash": ({"layer_added": "a/b", "doses": 1}, ValueError, r"layer_added='a/b' cannot name a slot"),
    "negative controls": ({"n_controls": -1}, ValueError, r"n_controls=-1 must be 0 or more"),
    "one string of keys": ({"control_keys": "other"}, TypeError, r"control_keys='other' is a string"),
    "unknown key": ({"control_keys": ["other"]}, KeyError, r"no SAE 'other'"),
    "no decoder": ({"model": object()}, TypeError, r"model= is a object, which has no method decode\(z, data\)"),
    "another width": ({"model": Model(4)}, ValueError, r"matmul"),
    "mask of other cells": (
        {"cells": pd.Series([True] * 200)},
        ValueError,
        r"mask whose index is not the obs_names of adata",
    ),
    "modality of none": (
        {"var_mod": "rna"},
        ValueError,
        r"var_mod='rna' names a modality, but the prediction of Model",
    ),
    "unknown genes": ({"net": {"s": ["HBB"]}}, ValueError, r"no gene in common"),
    "unknown feature": ({"feature": "sae_99"}, KeyError, r"no feature 'sae_99'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(adata, feature, case, compare):
    settings, error, message = BAD[case]
    before = compare.state(adata)
    settings = {"feature": feature, "model": Model(), "progress": False, **settings}
    with pytest.raises(error, match=message):
        sae.tl.steer(adata, settings.pop("feature"), **settings)
    compare.assert_same(before, compare.state(adata))


def test_a_dead_feature_has_no_activation_to_set(adata):
    dead = sae.get.features(adata)
    dead = dead.index[dead["dead"]]
    if len(dead) == 0:
        a = adata.obsm["sae"].tolil()
        a[:, 3] = 0
        adata.obsm["sae"] = a.tocsr()
        adata.obsm["sae"].eliminate_zeros()
        dead = ["sae_3"]
    with pytest.raises(ValueError, match=rf"'{dead[0]}' is active in no cell"):
        steer(adata, dead[0])
    assert steer(adata, dead[0], value=1)["doses"]["effect"].iloc[-1] > 0


def test_nothing_is_written_when_the_model_fails_half_way(adata, feature, compare):
    class Failing(Model):
        def decode(self, z, data):
            if self.calls == 5:
                raise RuntimeError("out of memory")
            return super().decode(z, data)

    steer(adata, feature)
    before = compare.state(adata)
    with pytest.raises(RuntimeError, match="out of memory"):
        steer(adata, feature, Failing(), key_added="X_up", layer_added="up", doses=[1], groupby="group", n_controls=9)
    compare.assert_same(before, compare.state(adata))


def test_components_of_other_cells_or_of_another_run_are_refused(pbmc, compare):
    sc.pp.pca(pbmc, n_comps=20)
    sae.tl.fit(pbmc, n_features=16, steps=20, progress=False)
    sae.tl.encode(pbmc)
    part = pbmc[:300].copy()
    sc.pp.pca(part, n_comps=20)
    before = compare.state(pbmc)
    with pytest.raises(
        ValueError, match="The PCA does not make the latent of the SAE from the expression of adata: it is of other"
    ):
        sae.tl.steer(pbmc, 0, model=sae.models.PCA(part), progress=False)
    fewer = pbmc.copy()
    sc.pp.pca(fewer, n_comps=10)
    with (
        pytest.warns(UserWarning, match="has another 'X_pca'"),
        pytest.raises(ValueError, match=r"X_pca'\] has 10 columns; the SAE 'sae' reads 20"),
    ):
        sae.tl.steer(fewer, 0, model=sae.models.PCA(fewer), progress=False)
    compare.assert_same(before, compare.state(pbmc))
