from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sae

PARENTS = pd.DataFrame({"term": ["B cell", "top"], "parent": ["top", None]})
GETTERS = {
    "activations": sae.get.activations,
    "embedding": sae.get.embedding,
    "features": sae.get.features,
    "model": sae.get.model,
    "decoder": sae.get.decoder,
    "history": sae.get.history,
    "genes": sae.get.genes,
    "enrichment": sae.get.enrichment,
    "labels": sae.get.labels,
    "label_summary": sae.get.label_summary,
    "label_matrix": lambda data: sae.get.label_matrix(data, "phase"),
    "by_label": lambda data: sae.get.by_label(data, [0, 1], "phase"),
    "neighbors": sae.get.neighbors,
    "modules": sae.get.modules,
    "term_features": lambda data: sae.get.term_features(data, "b cell"),
    "parent_terms": lambda data: sae.get.parent_terms(data, PARENTS),
    "params": sae.get.params,
    "steering": sae.get.steering,
    "steering_arrows": lambda data: sae.get.steering_arrows(data, "X_pca_ablated"),
    "ablation": sae.get.ablation,
    "perturbation": sae.get.perturbation,
    "metrics": sae.get.metrics,
    "stability": sae.get.stability,
    "sweep": sae.get.sweep,
}
TABLES = ["genes", "enrichment", "labels"]
BEST_FIRST = {"genes": ("score", False), "enrichment": ("pval", True), "labels": ("auroc", False)}


def overwrite(value):
    """Change everything in place that can be changed."""
    if isinstance(value, pd.DataFrame):
        for i, name in enumerate(value.columns):
            if not isinstance(value[name].dtype, np.dtype):  # categories, and text with pandas 3
                value.isetitem(i, None)
            else:
                value.iloc[:, i] = np.zeros(len(value), dtype=value[name].dtype)
        value["new"] = 1
    elif isinstance(value, dict):
        value.clear()
    elif isinstance(value, ad.AnnData):
        value.X.data[:] = 0
        for slot in (value.obs, value.var):
            overwrite(slot)
        for array in value.obsm.values():
            array[:] = 0
        for colors in value.uns.values():
            colors[:] = "#000000"
    else:
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(value, name)[:] = 0


@pytest.mark.parametrize("name", GETTERS)
def test_read_only(analysed, compare, name):
    before = compare.state(analysed)
    overwrite(GETTERS[name](analysed))
    compare.assert_same(before, compare.state(analysed))


def test_every_getter_is_tested():
    assert sorted(GETTERS) == sorted(sae.get.__all__)


def test_values_do_not_share_memory(analysed):
    stored = analysed.uns["sae"]
    assert not np.shares_memory(sae.get.decoder(analysed).to_numpy(), stored["weights"]["W_dec"])
    assert not np.shares_memory(sae.get.model(analysed).W_enc, stored["weights"]["W_enc"])
    assert not np.shares_memory(sae.get.embedding(analysed).to_numpy(), analysed.obsm["X_umap"])
    a = sae.get.activations(analysed)
    assert not np.shares_memory(a.X.data, analysed.obsm["sae"].data)
    assert not np.shares_memory(a.obsm["X_umap"], analysed.obsm["X_umap"])


def test_features_are_found_by_the_names_they_were_given(analysed):
    sae.tl.name_features(analysed)
    features = sae.get.features(analysed)
    name = features["name"].iloc[3]
    for found in (sae.get.genes(analysed, name), sae.get.enrichment(analysed, name), sae.get.labels(analysed, name)):
        assert set(found["feature"]) <= {"sae_3"}
    assert sae.get.activations(analysed, [name, 0]).var_names.tolist() == ["sae_3", "sae_0"]
    assert sae.get.by_label(analysed, name, "phase")["feature"].unique().tolist() == ["sae_3"]
    part = name.split(" ")[0]
    with pytest.raises(KeyError, match=r"There is no feature .* Names with it have .*'sae_"):
        sae.get.genes(analysed, part.lower())
    with pytest.raises(KeyError, match=r"'sae_31'\.\W*$"):
        sae.get.genes(analysed, "nothing like it")


def test_an_embedding_of_one_column_is_refused(analysed):
    analysed.obsm["X_umap"] = analysed.obsm["X_umap"][:, :1]
    with pytest.raises(ValueError, match=r"has the shape \(700, 1\); two columns are needed"):
        sae.get.embedding(analysed)


def test_activations(analysed):
    a = sae.get.activations(analysed)
    assert isinstance(a.X, sparse.csr_matrix)
    assert (a.X != analysed.obsm["sae"]).nnz == 0
    pd.testing.assert_frame_equal(a.obs, analysed.obs)
    pd.testing.assert_frame_equal(a.var, analysed.uns["sae"]["features"], check_names=False)
    np.testing.assert_array_equal(a.obsm["X_umap"], analysed.obsm["X_umap"])
    assert "X_pca" not in a.obsm and "sae" not in a.obsm, "Scanpy would take X_pca for the components of X"
    np.testing.assert_array_equal(a.uns["bulk_labels_colors"], analysed.uns["bulk_labels_colors"])


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        pytest.param(None, [f"sae_{i}" for i in range(32)], id="all"),
        pytest.param("sae_5", ["sae_5"], id="name"),
        pytest.param(5, ["sae_5"], id="number"),
        pytest.param(np.int64(5), ["sae_5"], id="NumPy number"),
        pytest.param(["sae_7", 5], ["sae_7", "sae_5"], id="list"),
        pytest.param(np.array([7, 5]), ["sae_7", "sae_5"], id="array"),
        pytest.param(pd.Index(["sae_7"]), ["sae_7"], id="index"),
        pytest.param([7, "sae_7"], ["sae_7"], id="twice"),
    ],
)
def test_features_by_name_and_number(analysed, asked, names):
    a = sae.get.activations(analysed, asked)
    assert a.var_names.tolist() == names
    columns = [int(name[4:]) for name in names]
    np.testing.assert_array_equal(a.X.toarray(), analysed.obsm["sae"].toarray()[:, columns])
    for name in TABLES:
        whole, part = GETTERS[name](analysed), GETTERS[name](analysed, asked)
        expected = whole[whole["feature"].isin(names)].reset_index(drop=True)
        pd.testing.assert_frame_equal(part, expected, check_categorical=False)
        assert len(part) and set(part["feature"].cat.categories) == set(expected["feature"]), (
            "no categories without rows"
        )


@pytest.mark.parametrize("name", TABLES)
def test_best_first(analysed, name):
    table = GETTERS[name](analysed)
    column, ascending = BEST_FIRST[name]
    assert len(table) == len(analysed.uns["sae"][name])
    values = table[column] if ascending else -table[column]
    assert values.is_monotonic_increasing
    assert table.index.tolist() == list(range(len(table)))


@pytest.mark.parametrize("name", TABLES)
def test_filters(analysed, name):
    whole = GETTERS[name](analysed)
    significant = GETTERS[name](analysed, max_padj=1e-6)
    assert 0 < len(significant) < len(whole)
    assert len(significant) == (whole["padj"] <= 1e-6).sum()
    few = GETTERS[name](analysed, n=2)
    assert few.groupby("feature", observed=True).size().max() == 2
    first = whole[whole["feature"] == "sae_3"].head(2).reset_index(drop=True)
    pd.testing.assert_frame_equal(GETTERS[name](analysed, "sae_3", n=2), first, check_categorical=False)


def test_genes_by_direction(analysed):
    up = sae.get.genes(analysed, "sae_3", direction="up")
    down = sae.get.genes(analysed, "sae_3", direction="down")
    assert (up["score"] > 0).all() and up["score"].is_monotonic_decreasing
    assert (down["score"] < 0).all() and down["score"].is_monotonic_increasing, "the most lowered first"
    assert len(up) + len(down) == len(sae.get.genes(analysed, "sae_3"))


def test_enrichment_by_direction_and_collection(analysed):
    sae.tl.enrich(analysed, {"b": ["CD79A", "CD79B", "MS4A1"]}, min_size=3, collection="small")
    for direction in ("up", "down"):
        table = sae.get.enrichment(analysed, direction=direction, collection="immune")
        assert len(table) > 0
        assert table["direction"].eq(direction).all() and table["collection"].eq("immune").all()
    assert sae.get.enrichment(analysed, collection="small")["gene_set"].eq("b").all()
    sae.tl.enrich(
        analysed, sae.datasets.immune_markers(), directions=["both"], collection="together", n_null=0, progress=False
    )
    both = sae.get.enrichment(analysed, direction="both")
    assert len(both) > 0 and both["collection"].eq("together").all()
    with pytest.raises(ValueError, match=r"direction='left' is neither 'up' nor 'down' nor 'both'\."):
        sae.get.enrichment(analysed, direction="left")
    ties = sae.get.enrichment(analysed)
    ties = ties[ties["pval"].duplicated(keep=False)]
    strength = ties["score"].abs()
    assert strength.groupby(ties["pval"]).apply(lambda part: part.is_monotonic_decreasing).all()


def stored_sets(adata, rows):
    """Put gene sets in place of those that were found: feature, direction, p-value, genes; by number, best first."""
    columns = {name: np.zeros(len(rows)) for name in ("overlap", "size", "score", "padj", "fdr")}
    table = pd.DataFrame(rows, columns=["feature", "direction", "pval", "genes"]).assign(**columns)
    table["gene_set"], table["collection"] = [f"set {i}" for i in range(len(rows))], "made up"
    categorical = ["feature", "direction", "genes", "gene_set", "collection"]
    adata.uns["sae"]["enrichment"] = table.astype(dict.fromkeys(categorical, "category"))


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        pytest.param([("sae_0", "up", 1, "A;B;C"), ("sae_0", "up", 2, "C;A")], [0], id="nested"),
        pytest.param([("sae_0", "up", 2, "A;B;C"), ("sae_0", "up", 1, "C;A")], [1, 0], id="the smaller is better"),
        pytest.param([("sae_0", "up", 1, "A;B"), ("sae_0", "up", 2, "B;A")], [0], id="the same genes"),
        pytest.param([("sae_0", "up", 1, "A;B"), ("sae_0", "up", 2, "B;C")], [0, 1], id="shared in part"),
        pytest.param(
            [("sae_0", "up", 1, "A"), ("sae_0", "up", 2, "B"), ("sae_0", "up", 3, "A;B")], [0, 1, 2], id="two"
        ),
        pytest.param([("sae_0", "up", 1, "A"), ("sae_0", "down", 2, "A")], [0, 1], id="direction"),
        pytest.param([("sae_0", "up", 1, "A"), ("sae_1", "up", 2, "A")], [0, 1], id="feature"),
        pytest.param(
            [("sae_0", "up", 1, ""), ("sae_0", "up", 2, ""), ("sae_0", "up", 3, "A")], [0, 1, 2], id="no gene"
        ),
        pytest.param([("sae_0", "up", 1, "CD8A"), ("sae_0", "up", 2, "CD8")], [0, 1], id="part of a name"),
    ],
)
def test_sets_whose_genes_a_better_one_has_are_redundant(analysed, rows, kept):
    stored_sets(analysed, rows)
    table = sae.get.enrichment(analysed, redundant=False)
    assert table["gene_set"].tolist() == [f"set {i}" for i in kept]
    assert len(sae.get.enrichment(analysed)) == len(rows)


def test_redundant_sets_beside_a_plain_loop(analysed):
    rng = np.random.default_rng(0)
    rows = [
        (
            f"sae_{rng.integers(3)}",
            str(rng.choice(["up", "down"])),
            pval,
            ";".join(rng.permutation(list("ABCDE"))[:size]),
        )
        for pval, size in zip(rng.random(300), rng.integers(6, size=300), strict=True)
    ]
    stored_sets(analysed, rows)
    expected, kept = [], []
    for number in sorted(range(len(rows)), key=lambda i: rows[i][2]):
        feature, direction, _, genes = rows[number]
        same = [k for f, d, k in kept if (f, d) == (feature, direction)]
        if genes == "" or not any(all(gene in better for gene in genes.split(";")) for better in same):
            kept.append((feature, direction, genes.split(";")))
            expected.append(f"set {number}")
    table = sae.get.enrichment(analysed, redundant=False)
    assert table["gene_set"].tolist() == expected
    assert 10 < len(expected) < 200
    first = sae.get.enrichment(analysed, "sae_1", direction="up", redundant=False, n=8)
    up = table[(table["feature"] == "sae_1") & (table["direction"] == "up")]
    assert first["gene_set"].tolist() == up["gene_set"].tolist()[:8]


def test_redundant_among_the_sets_that_are_asked_for(analysed):
    stored_sets(analysed, [("sae_0", "up", 0.1, "A;B"), ("sae_0", "up", 0.2, "A")])
    table = analysed.uns["sae"]["enrichment"]
    table["collection"] = pd.Categorical(["go", "markers"])
    assert sae.get.enrichment(analysed, redundant=False)["gene_set"].tolist() == ["set 0"]
    assert sae.get.enrichment(analysed, collection="markers", redundant=False)["gene_set"].tolist() == ["set 1"]
    table["padj"] = [0.9, 0.01]
    assert sae.get.enrichment(analysed, max_padj=0.05, redundant=False)["gene_set"].tolist() == ["set 1"]
    table["modality"] = pd.Categorical(["rna", "adt"])
    assert len(sae.get.enrichment(analysed, redundant=False)) == 2


def test_redundant_sets_of_real_genes(analysed):
    markers = ["CD79A", "CD79B", "MS4A1", "CD74", "HLA-DRA", "IGJ"]
    nested = {f"b {n}": markers[:n] for n in range(3, 7)}
    sae.tl.enrich(analysed, nested, min_size=3, collection="nested", progress=False)
    whole = sae.get.enrichment(analysed, collection="nested", direction="up")
    reduced = sae.get.enrichment(analysed, collection="nested", direction="up", redundant=False)
    assert len(reduced) < len(whole)
    assert set(reduced["feature"]) == set(whole["feature"])
    best = whole.drop_duplicates("feature").reset_index(drop=True)
    pd.testing.assert_frame_equal(
        reduced.drop_duplicates("feature").reset_index(drop=True), best, check_categorical=False
    )


def test_labels_by_groupby_and_label(analysed):
    assert set(sae.get.labels(analysed, groupby="phase")["label"]) == {"G1", "S", "G2M"}
    table = sae.get.labels(analysed, groupby="bulk_labels", label="CD19+ B")
    assert len(table) == 32 and table["label"].eq("CD19+ B").all()


def test_label_summary_by_groupby_and_source(analysed):
    assert len(sae.get.label_summary(analysed)) == 13
    assert set(sae.get.label_summary(analysed, groupby="phase", source="feature")["label"]) == {"G1", "S", "G2M"}
    with pytest.raises(KeyError, match="no results for the source 'gene'; there are for 'feature'"):
        sae.get.label_summary(analysed, source="gene")


def test_features_and_history(analysed):
    table = sae.get.features(analysed)
    assert table.index.tolist() == [f"sae_{i}" for i in range(32)]
    assert {"n_cells", "bulk_labels_scope", "phase_auroc"} <= set(table)
    history = sae.get.history(analysed)
    assert history.index.tolist() == list(range(len(history)))
    assert history["step"].iloc[-1] == 150


def test_decoder(fitted):
    table = sae.get.decoder(fitted)
    np.testing.assert_array_equal(table, fitted.uns["sae"]["weights"]["W_dec"])
    assert table.index.tolist() == [f"sae_{i}" for i in range(32)]
    assert table.columns.tolist() == [f"X_pca_{i}" for i in range(50)]


def test_decoder_of_genes(make_adata):
    adata = make_adata(g=7)
    sae.tl.fit(adata, use_rep="X", steps=2)
    assert sae.get.decoder(adata).columns.tolist() == adata.var_names.tolist()


def test_model_encodes_and_decodes(encoded):
    model = sae.get.model(encoded)
    assert (model.n_inputs, model.n_features) == (50, 32)
    result = model.encode(encoded.obsm["X_pca"])
    assert (result.activations != encoded.obsm["sae"]).nnz == 0
    error = np.square(encoded.obsm["X_pca"] - model.decode(result.activations)).sum(axis=1)
    np.testing.assert_allclose(error, result.squared_error, rtol=1e-4)


def test_embedding(pbmc):
    for basis in ("umap", "X_umap"):
        table = sae.get.embedding(pbmc, basis)
        assert table.columns.tolist() == ["UMAP1", "UMAP2"]
        np.testing.assert_array_equal(table, pbmc.obsm["X_umap"])
    np.testing.assert_array_equal(sae.get.embedding(pbmc, "pca"), pbmc.obsm["X_pca"][:, :2])


def test_another_key(fitted):
    sae.tl.fit(fitted, n_features=16, steps=2, key_added="wide")
    sae.tl.encode(fitted, key="wide")
    sae.tl.score_labels(fitted, "phase", key="wide")
    assert sae.get.features(fitted, key="wide").index[3] == "wide_3"
    assert sae.get.activations(fitted, "wide_3", key="wide").n_vars == 1
    assert set(sae.get.labels(fitted, "wide_3", key="wide")["feature"]) == {"wide_3"}


def test_mudata(make_mudata):
    mdata = make_mudata()
    mdata.obsm["X_umap"] = mdata.obsm["X_joint"][:, :2].copy()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=20)
    sae.tl.fit(mdata, mod="adt", n_features=4, steps=20)
    sae.tl.encode(mdata)
    sae.tl.encode(mdata, mod="adt")
    joint, adt = sae.get.activations(mdata), sae.get.activations(mdata, mod="adt")
    assert joint.shape == (80, 8) and adt.shape == (70, 4)
    assert set(joint.obsm) == {"X_joint", "X_umap"}
    assert joint.obs_names.tolist() == mdata.obs_names.tolist()
    assert adt.obs_names.tolist() == mdata["adt"].obs_names.tolist()
    assert len(sae.get.features(mdata, mod="adt")) == 4
    assert sae.get.decoder(mdata).columns[0] == "X_joint_0"
    np.testing.assert_array_equal(sae.get.embedding(mdata), mdata.obsm["X_umap"])


def test_feature_statistics_are_those_of_the_cells_that_are_there(analysed):
    part = analysed[:40].copy()
    a = part.obsm["sae"].toarray()
    found = sae.get.features(part)
    np.testing.assert_array_equal(found["n_cells"], (a > 0).sum(axis=0))
    np.testing.assert_allclose(found["mean"], a.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found["dead"], (a == 0).all(axis=0))
    assert list(found) == list(analysed.uns["sae"]["features"])


def test_enrichment_by_false_discovery_rate(analysed):
    whole = sae.get.enrichment(analysed)
    part = sae.get.enrichment(analysed, max_fdr=0.3)
    assert len(part) == (whole["fdr"] <= 0.3).sum()


def test_tables_of_earlier_versions_lack_columns(analysed):
    stored = analysed.uns["sae"]
    stored["enrichment"] = stored["enrichment"].drop(columns=["fdr", "padj_all"])
    stored["labels"] = stored["labels"].drop(columns=["held_out_auroc", "held_out_f1"])
    assert sae.get.enrichment(analysed)["fdr"].isna().all()
    assert sae.get.labels(analysed)["held_out_auroc"].isna().all()
    sae.tl.name_features(analysed)


def test_ablation(analysed):
    scores = sae.get.ablation(analysed)
    assert scores["source"].tolist() == ["before", "after", "control", "control"]
    features = sae.get.ablation(analysed, table="features", key_added="X_pca_ablated")
    assert features.loc[features["ablated"], "feature"].tolist() == ["sae_0"]
    with pytest.raises(KeyError, match="no results for the key_added 'X_new'; there are for 'X_pca_ablated'"):
        sae.get.ablation(analysed, key_added="X_new")
    with pytest.raises(ValueError, match="table='score' is not one of 'features', 'scores'"):
        sae.get.ablation(analysed, table="score")


def test_perturbation(analysed):
    everything = sae.get.perturbation(analysed)
    assert (np.diff(everything["score"].abs()) <= 0).all()
    best = sae.get.perturbation(analysed, perturbation="CD19+ B", responds=True, n=2)
    assert len(best) == 2 and best["responds"].all() and set(best["perturbation"]) == {"CD19+ B"}
    one = sae.get.perturbation(analysed, "sae_3", max_padj=0.01)
    assert set(one["feature"]) == {"sae_3"} and (one["padj"] <= 0.01).all()
    summary = sae.get.perturbation(analysed, table="summary")
    tested = summary[summary["status"] == "tested"]
    assert (np.diff(tested["n_responding"]) <= 0).all() and len(tested) >= 5
    assert sae.get.perturbation(analysed, table="targets")["groupby"].tolist() == ["bulk_labels"]
    with pytest.raises(ValueError, match="table='target' is not one of"):
        sae.get.perturbation(analysed, table="target")
