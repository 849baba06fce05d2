from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

import sae
from sae._data import holder
from sae._evaluation import BASELINES, Attributed, Cells, _most_variable, even_share
from sae.core.fidelity import components
from sae.tl._evaluate import evaluate

QUICK = {"n_splits": 2, "n_bootstrap": 20, "n_neighbors": 5, "progress": False}
FEW = {**QUICK, "baselines": ["pca", "genes"]}
COLUMNS = {
    **dict.fromkeys(["section", "metric", "source", "groupby", "label"], "category"),
    **dict.fromkeys(["value", "ci_low", "ci_high", "difference", "difference_low", "difference_high"], "float64"),
}


def prepared(adata, **fit):
    sae.tl.fit(adata, n_features=12, steps=60, progress=False, **fit)
    sae.tl.encode(adata, progress=False, mod=fit.get("mod"))
    return adata


@pytest.fixture
def small(make_adata):
    """80 cells in three groups, with an SAE."""
    return prepared(make_adata(g=30))


@pytest.fixture
def sets():
    return {"one": [f"g{i}" for i in range(6)], "two": [f"g{i}" for i in range(10, 18)]}


def smooth(z, data):
    """A decoder with curves: 7 genes of 6 dimensions."""
    weights = np.random.default_rng(1).normal(size=(6, 7)) / 3
    return np.logaddexp(0, z @ weights)


def metrics(adata, section=None, metric=None, source=None, *, label=None, key="sae"):
    """Rows of the table, those over all labels unless one is asked for."""
    found = adata.uns[key]["metrics"]
    for name, wanted in (("section", section), ("metric", metric), ("source", source)):
        found = found if wanted is None else found[found[name] == wanted]
    return found[found["label"].isna()] if label is None else found[found["label"] == label]


def value(adata, *of, column="value", **more):
    (found,) = metrics(adata, *of, **more)[column]
    return found


def test_everything_at_once(small, sets):
    model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
    before = small.copy()
    evaluate(small, "group", sets, model=model, **QUICK)
    table = small.uns["sae"]["metrics"]
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert table.index.tolist() == [str(i) for i in range(len(table))]
    assert not table.duplicated(["section", "metric", "source", "label"]).any()
    assert table["value"].notna().all()
    assert set(metrics(small, "labels", "auroc")["source"]) == {
        "sae", *BASELINES, "l1_genes_column", "l1_latent_column",
    }  # fmt: skip
    assert set(metrics(small, "gene_sets", "auroc")["source"]) == {"sae", "permuted_cells", *BASELINES[:8]}
    assert set(metrics(small, "reconstruction", "fvu")["source"]) == {"sae", "pca", "frozen_decoder"}
    of_auroc = table[table["metric"] == "auroc"]
    assert (of_auroc["ci_low"] <= of_auroc["ci_high"]).all()
    assert of_auroc["value"].between(0, 1).all()
    assert table.loc[table["section"] == "labels", "groupby"].eq("group").all()
    # Nothing else was touched.
    assert [name for name in small.uns["sae"] if name not in before.uns["sae"]] == ["metrics"]
    np.testing.assert_array_equal(small.X, before.X)


def test_differences_are_of_the_sae_and_paired(small, sets):
    evaluate(small, "group", sets, **QUICK)
    table = small.uns["sae"]["metrics"].astype({"label": object}).fillna({"label": ""})
    sae_rows = table[table["source"] == "sae"].set_index(["section", "metric", "label"])["value"]
    others = table[table["difference"].notna()]
    expected = sae_rows.loc[list(zip(others["section"], others["metric"], others["label"], strict=True))].to_numpy()
    np.testing.assert_allclose(others["difference"], expected - others["value"])
    assert table.loc[table["source"] == "sae", "difference"].isna().all()
    # The representation is its own PCA up to a rotation: choices are alike, and so a paired difference hardly varies.
    row = metrics(small, "labels", "auroc", "l1_latent_column").iloc[0]
    width, alone = row["difference_high"] - row["difference_low"], row["ci_high"] - row["ci_low"]
    assert 0 <= width < 2 * alone + 0.1


def test_label_scores_against_loops(small):
    evaluate(small, "group", **FEW)
    labels = pd.Categorical(small.obs["group"])
    rng = np.random.default_rng(0)
    cells = Cells.drawn(holder(small, None), np.arange(80), labels, None, 5_000, 2, 20, rng)
    for source, columns in {"sae": small.obsm["sae"].toarray(), "genes": small.X}.items():
        each = np.zeros((21, 3))
        for split in range(2):
            for label in range(3):
                inside = labels.codes == label
                for p in range(2):
                    chosen, scored = cells.halves[split] == p, cells.halves[split] != p
                    aurocs = [roc_auc_score(inside[chosen], column[chosen]) for column in columns.T]
                    best = columns[:, int(np.argmax(aurocs))]
                    for b, weight in enumerate(cells.weights):
                        rows = np.repeat(np.arange(80), (weight * scored).astype(int))
                        each[b, label] += roc_auc_score(inside[rows], best[rows]) / 4
        mean = each.mean(axis=1)
        found = metrics(small, "labels", "auroc", source).iloc[0]
        expected = [mean[0], *np.quantile(mean[1:], [0.025, 0.975])]
        np.testing.assert_allclose(found[["value", "ci_low", "ci_high"]].astype(float), expected)
        assert value(small, "labels", "auroc", source, label="b") == pytest.approx(each[0, 1])
        assert value(small, "labels", "labels_at_0.9", source) == (each[0] >= 0.9).sum()
        assert value(small, "labels", "n_columns", source) == columns.shape[1]


def test_reconstruction_and_fidelity_against_the_formulas(encoded):
    evaluate(encoded, "bulk_labels", **FEW)
    x = encoded.obsm["X_pca"].astype(float)
    model = sae.get.model(encoded)
    x_hat = encoded.obsm["sae"] @ model.W_dec + model.b_dec
    labels = encoded.obs["bulk_labels"].cat.codes.to_numpy()

    def fvu(x_hat):
        return ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()

    def accuracy(x):
        distance = ((x[:, None] - x[None]) ** 2).sum(axis=2)
        np.fill_diagonal(distance, np.inf)
        near = np.argsort(distance, axis=1)[:, :5]
        return np.mean([np.bincount(labels[row]).argmax() == own for row, own in zip(near, labels, strict=True)])

    l0 = round(encoded.obsm["sae"].nnz / encoded.n_obs)
    pca = PCA(l0, svd_solver="full").fit(x)
    x_pca = pca.inverse_transform(pca.transform(x))
    assert value(encoded, "reconstruction", "fvu", "sae") == pytest.approx(fvu(x_hat), rel=1e-4)
    assert value(encoded, "reconstruction", "fvu", "pca") == pytest.approx(fvu(x_pca), rel=1e-4)
    assert value(encoded, "reconstruction", "fvu_all", "sae") == pytest.approx(fvu(x_hat), rel=1e-3)
    for source, of in {"representation": x, "sae": x_hat, "pca": x_pca}.items():
        assert value(encoded, "fidelity", "label_accuracy", source) == pytest.approx(accuracy(of), abs=0.003)
    assert value(encoded, "sparsity", "l0", "sae") == pytest.approx(encoded.obsm["sae"].nnz / 700)
    density = sae.get.features(encoded)["density"]
    assert value(encoded, "sparsity", "density_q50", "sae") == pytest.approx(density[density > 0].median())


@pytest.mark.parametrize("preprocess", ["standardize", "whiten"])
def test_the_space_of_training(make_adata, preprocess):
    adata = make_adata()
    adata.obsm["X_pca"] *= np.array([100, 10, 1, 1, 1, 1])
    prepared(adata, preprocess=preprocess)
    evaluate(adata, **{**QUICK, "baselines": ["frozen_decoder"]})
    x, model = adata.obsm["X_pca"].astype(float), sae.get.model(adata)
    x_hat = adata.obsm["sae"] @ model.W_dec + model.b_dec
    y, y_hat = ((values - x.mean(axis=0)) / x.std(axis=0) for values in (x, x_hat))
    if preprocess == "whiten":
        size, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
        root = np.sqrt(size + 1e-3 * size.mean())
        y, y_hat = ((values - x.mean(axis=0)) @ vectors / root for values in (x, x_hat))
    expected = ((y - y_hat) ** 2).sum() / (y**2).sum()
    assert value(adata, "reconstruction", "fvu_scaled", "sae") == pytest.approx(expected, rel=1e-3)
    assert value(adata, "reconstruction", "fvu_scaled", "frozen_decoder") > expected
    assert abs(value(adata, "reconstruction", "fvu", "sae") - expected) > 0.003


def test_parts_that_are_not_asked_for_are_left_out(small, sets):
    evaluate(small, **QUICK)
    found = small.uns["sae"]["metrics"]
    assert set(found["section"]) == {"reconstruction", "sparsity", "dictionary", "fidelity"}
    assert "label_accuracy" not in set(found["metric"])
    evaluate(small, None, sets, **FEW)
    assert set(metrics(small, "gene_sets")["source"]) == {"sae", "permuted_cells", "pca", "genes"}
    assert metrics(small, "labels").empty
    evaluate(small, "group", **{**QUICK, "baselines": []})
    assert set(metrics(small, "labels")["source"]) == {"sae"}
    assert metrics(small, "reconstruction", "fvu")["source"].tolist() == ["sae"]


def test_random_labels_are_at_chance_for_all(make_adata):
    """Whatever sees labels sees those of the choosing half only."""
    adata = prepared(make_adata(n=400, g=30))
    adata.obs["random"] = pd.Categorical(np.random.default_rng(3).permutation(np.repeat(list("xy"), 200)))
    model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
    evaluate(adata, "random", model=model, **{**QUICK, "n_splits": 4})
    assert metrics(adata, "labels", "auroc")["value"].between(0.4, 0.6).all()


class TestAttributions:
    def test_a_linear_model_finds_the_components(self, pbmc):
        """Each attribution of a linear probe is its component times a factor."""
        import scanpy as sc

        sc.pp.pca(pbmc, n_comps=20)
        prepared(pbmc)
        chosen = {**QUICK, "baselines": ["representation", "input_x_gradient", "integrated_gradients"]}
        evaluate(pbmc, "bulk_labels", model=sae.models.PCA(pbmc), **chosen)
        of = {name: value(pbmc, "labels", "auroc", name) for name in chosen["baselines"]}
        assert of["input_x_gradient"] == pytest.approx(of["integrated_gradients"], abs=1e-6)
        assert of["input_x_gradient"] == pytest.approx(of["representation"], abs=0.02)
        assert value(pbmc, "attribution", "n_nodes", "integrated_gradients") == 1
        assert value(pbmc, "attribution", "completeness_gap", "integrated_gradients") < 1e-3

    def test_of_a_decoder_with_curves_they_add_up(self, small, log):
        model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
        evaluate(small, "group", model=model, **{**QUICK, "baselines": ["integrated_gradients"]})
        assert value(small, "attribution", "n_nodes", "integrated_gradients") > 1
        assert value(small, "attribution", "completeness_gap", "integrated_gradients") < 5e-3
        assert log() == ""

    def test_of_a_decoder_with_steps_it_is_said(self, small, log):
        model = sae.models.Functions(decode=lambda z, data: np.round(z[:, :3]), genes=list("abc"), scale="linear")
        evaluate(small, "group", model=model, **{**QUICK, "baselines": ["integrated_gradients"]})
        assert "is not smooth" in log()

    def test_genes_without_a_prediction_are_left_out(self, small):
        def decode(z, data):
            found = smooth(z, data)
            found[:, 2] = np.nan
            return found

        model = sae.models.Functions(decode=decode, genes=list("abcdefg"), scale="linear")
        evaluate(small, "group", model=model, **{**QUICK, "baselines": ["input_x_gradient"]})
        assert 0.5 < value(small, "labels", "auroc", "input_x_gradient") <= 1

    def test_a_model_without_any_prediction(self, small, compare):
        before = compare.state(small)
        model = sae.models.Functions(
            decode=lambda z, data: np.full((len(z), 2), np.nan), genes=list("ab"), scale="linear"
        )
        with pytest.raises(ValueError, match="no gene with a finite value for all of the 80 cells"):
            evaluate(small, "group", model=model, **QUICK)
        compare.assert_same(before, compare.state(small))

    def test_of_an_autoencoder(self, make_adata):
        adata = make_adata(n=300, g=40)
        model = sae.models.Autoencoder.fit(adata, n_latent=6, epochs=5, progress=False)
        adata.obsm["X_pca"] = model.embed(adata)
        prepared(adata)
        evaluate(adata, "group", model=model, **{**QUICK, "baselines": ["input_x_gradient", "integrated_gradients"]})
        assert value(adata, "labels", "auroc", "integrated_gradients") > 0.6
        assert value(adata, "attribution", "completeness_gap", "integrated_gradients") < 0.2

    def test_predictions_are_read_in_blocks(self, small, monkeypatch):
        model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
        settings = {**QUICK, "baselines": ["input_x_gradient"], "model": model}
        evaluate(small, "group", **settings)
        whole = small.uns["sae"]["metrics"]
        monkeypatch.setattr("sae._evaluation.BLOCK_VALUES", 7 * 9)
        evaluate(small, "group", **settings)
        pd.testing.assert_frame_equal(whole, small.uns["sae"]["metrics"], rtol=1e-4)

    def test_probes_read_the_genes_of_the_highest_variance(self, small, monkeypatch):
        monkeypatch.setattr("sae._evaluation.PROBED_GENES", 3)
        model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
        held, x = holder(small, None), small.obsm["X_pca"]
        labels = pd.Categorical(small.obs["group"])
        cells = Cells.drawn(held, np.arange(80), labels, None, 80, 1, 2, np.random.default_rng(0))
        attributed = Attributed(model, held, x, cells, None)
        highest = np.sort(np.argsort(-smooth(x, None).var(axis=0))[:3])
        far = np.vstack([np.r_[9.0, np.zeros(6)], smooth(x, None)])
        found = np.sort(np.argsort(-far.var(axis=0))[:3])
        assert _most_variable([far[:9], far[9:]], 3).tolist() == found.tolist()
        expected = attributed.probes.logits(smooth(x, None)[:, highest])
        np.testing.assert_allclose(attributed.logits()(x), expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            attributed.logits(5)(x[attributed.spread(5)]), expected[attributed.spread(5)], atol=1e-3
        )

    def test_a_model_that_cannot_decode(self, small, compare):
        before = compare.state(small)
        model = sae.models.Functions(embed=lambda data: data.obsm["X_pca"])
        with pytest.raises(NotImplementedError, match="no decode"):
            evaluate(small, "group", model=model, **QUICK)
        compare.assert_same(before, compare.state(small))


def test_dense_and_sparse_agree(make_adata, sets):
    tables = []
    for layout in ("dense", "csr"):
        adata = prepared(make_adata(g=30, layout=layout))
        assert sparse.issparse(adata.X) == (layout == "csr")
        evaluate(adata, "group", sets, **QUICK)
        tables.append(adata.uns["sae"]["metrics"])
    one, other = (table[~table["source"].isin(["nmf"])].reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(one, other, rtol=1e-3, atol=1e-3)


def test_a_seed_gives_one_result(small, sets):
    state = np.random.get_state()[1].copy()
    tables = []
    for rng in (3, 3, np.random.default_rng(3), 4):
        evaluate(small, "group", sets, rng=rng, **QUICK)
        tables.append(small.uns["sae"]["metrics"])
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    assert (tables[0]["value"] != tables[3]["value"]).any()
    np.testing.assert_array_equal(state, np.random.get_state()[1])


def test_few_cells_are_drawn_evenly(encoded):
    sizes = encoded.obs["bulk_labels"].value_counts()
    most = even_share(sizes.to_numpy(), 200)
    assert sizes.clip(upper=most).sum() <= 200 < sizes.clip(upper=most + 1).sum()
    labels = pd.Categorical(encoded.obs["bulk_labels"])
    rng = np.random.default_rng(0)
    cells = Cells.drawn(holder(encoded, None), np.arange(700), labels, None, 200, 1, 5, rng)
    drawn = pd.Series(labels[cells.rows]).value_counts()
    assert (drawn == sizes.clip(upper=most)[drawn.index]).all()
    assert (np.diff(cells.rows) > 0).all()
    evaluate(encoded, "bulk_labels", n_cells=200, **FEW)
    assert value(encoded, "labels", "auroc", "sae") > 0.75


def test_cells_without_a_label_take_no_part(small):
    subset = small[10:].copy()
    small.obs["group"] = small.obs["group"].where(np.arange(80) >= 10)
    evaluate(small, "group", **FEW)
    evaluate(subset, "group", **FEW)
    # PCA is fitted on all cells, as the SAE.
    for source, most in {"sae": 1e-6, "pca": 0.05, "genes": 1e-6}.items():
        of = "labels", "auroc", source
        assert value(small, *of) == pytest.approx(value(subset, *of), abs=most)


def test_decompositions_are_fitted_on_cells_drawn_without_labels(encoded, monkeypatch):
    """Comparing as many cells of rare labels as of others must not make a decomposition look for the rare ones."""
    fitted = []

    def noted(seen, x, n, seed):
        fitted.append(seen)
        return components(seen, x, n, seed)

    monkeypatch.setattr("sae.core.fidelity.components", noted)
    evaluate(encoded, "bulk_labels", n_cells=200, **FEW)
    x = encoded.obsm["X_pca"]
    labels = encoded.obs["bulk_labels"].to_numpy()
    most = encoded.obs["bulk_labels"].value_counts(normalize=True)
    for seen in fitted:
        rows = np.array([np.flatnonzero((x == cell).all(axis=1))[0] for cell in seen])
        assert len(np.unique(rows)) == 200
        assert (labels[rows] == most.index[0]).mean() == pytest.approx(most.iloc[0], abs=0.08)
    assert len(fitted) == 2
    cells = Cells.drawn(
        holder(encoded, None), np.arange(700), pd.Categorical(labels), None, 200, 1, 5, np.random.default_rng(0)
    )
    assert (labels[cells.rows] == most.index[0]).mean() < most.iloc[0] - 0.1


def test_a_label_that_leaves_with_its_donors_keeps_its_estimate(small):
    """Else the mean over labels varies with which labels are there."""
    small.obs["donor"] = [f"d{i % 6}" for i in range(80)]
    # Told less well than the others, and of two donors only.
    hard = np.flatnonzero(small.obs["donor"].isin(["d0", "d1"]))[::3]
    small.obs["group"] = small.obs["group"].cat.add_categories("hard")
    small.obs.iloc[hard, 0] = "hard"
    evaluate(small, "group", donor="donor", **{**FEW, "n_bootstrap": 100})
    of = {label: metrics(small, "labels", "auroc", "sae", label=label).iloc[0] for label in ["a", "b", "c", "hard"]}
    assert of["hard"]["value"] < min(of[label]["value"] for label in "abc") - 0.1
    mean = metrics(small, "labels", "auroc", "sae").iloc[0]
    assert mean["ci_high"] <= np.mean([row["ci_high"] for row in of.values()]) + 1e-9
    assert value(small, "labels", "labels_at_0.9", "sae", column="ci_low") >= sum(
        row["ci_low"] >= 0.9 for row in of.values()
    )


def test_donors(small, log):
    small.obs["donor"] = [f"d{i % 4}" for i in range(80)]
    evaluate(small, "group", donor="donor", **FEW)
    assert "there are 4 donors: intervals from fewer than 20 are too narrow" in log()
    low, high = (value(small, "labels", "auroc", "sae", column=name) for name in ("ci_low", "ci_high"))
    assert 0 < low < high <= 1
    small.obs["donor"] = ["rare", *["d"] * 79]
    with pytest.raises(ValueError, match=r"18 cells that are compared are of one 'donor' only.*Raise n_cells"):
        evaluate(small, "group", donor="donor", **{**FEW, "n_cells": 20})
    small.obs["donor"] = "one"
    with pytest.raises(ValueError, match="donor= needs 2"):
        evaluate(small, "group", donor="donor", **FEW)


def test_a_label_of_one_cell_is_not_scored(small, log):
    small.obs["group"] = small.obs["group"].cat.add_categories("rare")
    small.obs.iloc[0, 0] = "rare"
    evaluate(small, "group", **FEW)
    assert "no held-out scores for 'rare'" in log()
    assert np.isnan(value(small, "labels", "auroc", "sae", label="rare"))
    assert 0.5 < value(small, "labels", "auroc", "sae") <= 1


def test_scaled_values_have_no_nonnegative_factors(small, log):
    small.layers["scaled"] = small.X - small.X.mean(axis=0)
    evaluate(small, "group", layer="scaled", **{**QUICK, "baselines": ["nmf", "genes"]})
    assert "'nmf' is left out" in log()
    assert set(metrics(small, "labels")["source"]) == {"sae", "genes"}


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_genes_that_do_not_vary(make_adata, sets, log, layout):
    adata = prepared(make_adata(g=30, layout=layout))
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32) if layout == "csr" else np.ones_like(adata.X)
    evaluate(adata, "group", sets, **QUICK)
    assert "'nmf' is left out: adata.X has no gene that varies" in log()
    for source in ("genes", "l1_genes", "l1_genes_column"):
        assert value(adata, "labels", "auroc", source) == 0.5
    assert value(adata, "gene_sets", "best_column_auroc", "sae") == 0.5


def test_a_baseline_that_is_named_twice_is_there_once(small):
    evaluate(small, "group", **{**QUICK, "baselines": ["pca", "pca"]})
    assert metrics(small, "labels", "auroc")["source"].tolist() == ["sae", "pca"]


def test_without_expression_baselines_of_genes_are_left_out(small, log, compare):
    adata = ad.AnnData(obs=small.obs, obsm=dict(small.obsm), uns=small.uns)
    evaluate(adata, "group", **QUICK)
    assert "baselines of genes are left out" in log()
    assert not set(metrics(adata, "labels")["source"]) & {"nmf", "genes", "l1_genes", "l1_genes_column"}
    before = compare.state(adata)
    with pytest.raises(ValueError, match="X is None"):
        evaluate(adata, "group", {"one": ["g0"]}, **QUICK)
    compare.assert_same(before, compare.state(adata))


def test_a_sae_of_genes(make_adata):
    adata = make_adata(g=30, layout="csr")
    sae.tl.fit(adata, "X", n_features=12, steps=60, progress=False)
    sae.tl.encode(adata)
    evaluate(adata, "group", **QUICK)
    assert 0.5 < value(adata, "labels", "auroc", "representation") <= 1


def test_on_disk(make_adata, sets, tmp_path):
    adata = prepared(make_adata(g=30, layout="csr"))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
    settings = {**QUICK, "baselines": ["genes", "l1_genes", "random_rectified", "input_x_gradient"], "model": model}
    evaluate(adata, "group", sets, n_cells=60, **settings)
    evaluate(backed, "group", sets, n_cells=60, **settings)
    pd.testing.assert_frame_equal(adata.uns["sae"]["metrics"], backed.uns["sae"]["metrics"])
    backed.file.close()


def test_too_few_cells_to_train_on(make_adata, log):
    trained = make_adata(n=300)
    sae.tl.fit(trained, n_features=12, steps=60, preprocess="whiten", progress=False)
    few = make_adata(n=300)[:40].copy()
    sae.tl.encode(few, reference=trained)
    evaluate(few, "group", **QUICK)
    assert "'frozen_decoder' is left out" in log()
    assert {"random_directions", "l1_latent"} <= set(metrics(few, "labels")["source"])


class TestMuData:
    @pytest.fixture
    def mdata(self, make_mudata):
        return make_mudata(n=90)

    def test_in_a_modality_it_is_as_in_its_anndata(self, mdata):
        prepared(mdata, mod="rna")
        alone = mdata["rna"].copy()
        model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
        settings = {**QUICK, "baselines": ["genes", "l1_latent", "input_x_gradient"], "model": model}
        evaluate(mdata, "group", mod="rna", **settings)
        evaluate(alone, "group", **settings)
        pd.testing.assert_frame_equal(mdata["rna"].uns["sae"]["metrics"], alone.uns["sae"]["metrics"])
        assert "sae" not in mdata.uns

    def test_of_a_joint_representation_only_cells_with_expression_take_part(self, mdata, log):
        prepared(mdata, use_rep="X_joint")
        evaluate(mdata, "group", var_mod="adt", **FEW)
        found = mdata.uns["sae"]["metrics"]
        assert "80 cells are in mdata" in log()
        part = mdata[mdata["adt"].obs_names].copy()
        evaluate(part, "group", var_mod="adt", **FEW)
        of = "labels", "auroc", "genes"
        assert value(mdata, *of) == pytest.approx(value(part, *of), abs=0.15)
        assert found.dtypes.astype(str).to_dict() == COLUMNS

    def test_without_a_modality_for_genes_they_are_left_out(self, mdata, log):
        prepared(mdata, use_rep="X_joint")
        model = sae.models.Functions(decode=smooth, genes=list("abcdefg"), scale="linear")
        evaluate(mdata, "group", model=model, **QUICK)
        assert "baselines of genes are left out: The SAE lives on the MuData itself" in log()
        assert {"input_x_gradient", "pca"} <= set(metrics(mdata, "labels")["source"])


@pytest.mark.parametrize("storage", ["h5ad", "zarr"])
def test_through_storage(small, sets, tmp_path, storage, compare):
    evaluate(small, "group", sets, **FEW)
    path = tmp_path / f"cells.{storage}"
    getattr(small, f"write_{storage}")(path)
    stored = getattr(ad, f"read_{storage}")(path)
    compare.assert_same(small.uns["sae"]["metrics"], stored.uns["sae"]["metrics"])
    evaluate(small, **FEW)
    getattr(small, f"write_{storage}")(tmp_path / f"again.{storage}")
    stored = getattr(ad, f"read_{storage}")(tmp_path / f"again.{storage}")
    compare.assert_same(small.uns["sae"]["metrics"], stored.uns["sae"]["metrics"])


def test_a_second_call_replaces_the_table_and_keeps_the_rest(small, sets):
    sae.tl.score_labels(small, "group", progress=False)
    evaluate(small, "group", sets, **FEW)
    evaluate(small, **FEW)
    assert metrics(small, "labels").empty
    assert "labels" in small.uns["sae"]
    sae.tl.encode(small)
    assert "metrics" not in small.uns["sae"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groupby": "nothing"}, KeyError, "has no column 'nothing'"),
        ({"baselines": "pca"}, ValueError, "is not a list"),
        ({"baselines": ["pca", "umap"]}, ValueError, "There is no 'umap'"),
        ({"n_splits": 0}, ValueError, "n_splits=0"),
        ({"n_bootstrap": 0}, ValueError, "n_bootstrap=0"),
        ({"n_cells": 1.5}, ValueError, "n_cells=1.5"),
        ({"n_neighbors": 80}, ValueError, "80 cells to compare"),
        ({"donor": "nobody"}, KeyError, "has no column 'nobody'"),
        ({"net": {"one": ["nothing"]}}, ValueError, "no gene in common"),
        ({"layer": "nothing"}, KeyError, "has no 'nothing'"),
        ({"key": "other"}, KeyError, "has no SAE 'other'"),
        ({"mod": "rna"}, ValueError, "names a modality"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_leaves_the_data_as_they_were(small, settings, error, message, compare):
    before = compare.state(small)
    with pytest.raises(error, match=message):
        evaluate(small, **{"groupby": "group", **FEW, **settings})
    compare.assert_same(before, compare.state(small))


def test_activations_are_needed(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, n_features=12, steps=20, progress=False)
    with pytest.raises(KeyError, match=r"Run sae\.tl\.encode"):
        evaluate(adata)


def test_one_label_with_expression(make_mudata):
    mdata = make_mudata(n=60)
    prepared(mdata, use_rep="X_joint")
    names = mdata["adt"].obs_names
    mdata.obs["half"] = pd.Categorical(np.where(mdata.obs_names.isin(names), "both", "rna only"))
    with pytest.raises(ValueError, match="two are needed"):
        evaluate(mdata, "half", var_mod="adt", **FEW)
    assert isinstance(mdata, mudata.MuData) and "metrics" not in mdata.uns["sae"]
