from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy.optimize import linear_sum_assignment

import sae
from sae.tl._match import match

COLUMNS = {
    "feature": "category",
    "feature_b": "category",
    "similarity": "float64",
    "reciprocal": "bool",
    "best_feature_b": "category",
    "best_similarity": "float64",
    "chance": "float64",
    "pval": "float64",
    "cosine": "float64",
    "correlation": "float64",
}
BY = ("decoder", "activations", "genes", "enrichment")
DATA = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def number(names: pd.Series) -> np.ndarray:
    """The numbers of features, -1 for none."""
    return names.astype(object).str.rpartition("_")[2].fillna(-1).astype(int).to_numpy()


def with_permuted(adata: ad.AnnData, order: np.ndarray, key: str = "sae", key_added: str = "other") -> None:
    """Store an SAE again with its features in another order."""
    stored = adata.uns[key]
    weights = dict(stored["weights"])
    weights |= {"W_enc": weights["W_enc"][:, order], "b_enc": weights["b_enc"][order], "W_dec": weights["W_dec"][order]}
    new = {**stored, "weights": weights}
    new["features"] = stored["features"].iloc[order].set_axis([f"{key_added}_{i}" for i in range(len(order))])
    if "enrichment" in stored:
        renamed = {f"{key}_{old}": f"{key_added}_{new}" for new, old in enumerate(order)}
        table = stored["enrichment"]
        new["enrichment"] = table.assign(feature=table["feature"].astype(object).map(renamed).astype("category"))
    adata.uns[key_added] = new
    adata.obsm[key_added] = adata.obsm[key][:, order]


@pytest.fixture(scope="module")
def _two_seeds(_encoded):
    adata = _encoded.copy()
    sae.tl.fit(adata, n_features=32, steps=150, progress=False, rng=1, key_added="other")
    sae.tl.encode(adata, key="other")
    return adata


@pytest.fixture
def two_seeds(_two_seeds):
    """700 real cells with two SAEs of the same components."""
    return _two_seeds.copy()


@pytest.mark.parametrize("by", BY)
def test_an_sae_with_its_features_permuted(encoded, by):
    order = np.random.default_rng(0).permutation(32)
    if by == "enrichment":
        # So many sets that no two features have the same.
        genes = np.random.default_rng(1).permutation(encoded.var_names)
        net = {f"set{i}": list(genes[i * 5 : i * 5 + 15]) for i in range(150)}
        sae.tl.enrich(encoded, net, n_null=0, n_sets=None, min_log2fc=0.1, progress=False)
    with_permuted(encoded, order)
    other = encoded[np.random.default_rng(2).permutation(700)].copy()
    settings = {"by": by, "key_b": "other", "n_permutations": 2, "max_padj": 1}
    tables = [match(encoded, other, **settings), match(encoded, encoded, **settings)]
    for table in tables:
        assert table.dtypes.astype(str).to_dict() == COLUMNS
        # Of a feature without gene sets there is nothing to find.
        assert table["feature_b"].notna().sum() >= (31 if by == "enrichment" else 32)
        found = table.dropna(subset="feature_b")
        np.testing.assert_array_equal(order[number(found["feature_b"])], number(found["feature"]))
        np.testing.assert_allclose(found[["similarity", "best_similarity", "cosine", "correlation"]], 1, atol=1e-6)
        assert found["reciprocal"].all()
    assert tables[0]["pval"].max() < 0.1


def test_permuted_on_a_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", n_features=12, steps=60)
    sae.tl.encode(mdata, mod="rna")
    order = np.random.default_rng(0).permutation(12)
    with_permuted(mdata["rna"], order)
    rna, other = mdata["rna"], mdata.copy()
    for a, b, where in (
        (mdata, other, {"mod": "rna"}),
        (mdata, rna, {"mod": "rna"}),
        (rna, other, {"mod_b": "rna"}),
    ):
        for by in ("decoder", "activations", "genes"):
            table = match(a, b, key_b="other", by=by, **where)
            alive = table["feature_b"].notna()
            assert alive.sum() >= 8
            np.testing.assert_array_equal(order[number(table["feature_b"][alive])], number(table["feature"][alive]))


def test_modalities_of_the_same_cells(make_mudata):
    mdata = make_mudata()
    for where in ({"mod": "rna"}, {"mod": "adt"}, {"use_rep": "X_joint"}):
        sae.tl.fit(mdata, n_features=12, steps=60, **where)
        sae.tl.encode(mdata, **{name: value for name, value in where.items() if name == "mod"})
    table = match(mdata, mdata, mod="rna", mod_b="adt")
    expected = match(mdata["rna"], mdata["adt"], by="activations")
    pd.testing.assert_frame_equal(table, expected)
    joint = match(mdata, mdata, mod_b="rna")
    np.testing.assert_array_equal(joint["similarity"], joint["correlation"])
    by_genes = match(mdata, mdata, mod="rna", mod_b="adt", by="genes", var_mod="rna")
    assert by_genes["similarity"].max() > 0.5


def test_two_seeds(two_seeds, compare):
    before = compare.state(two_seeds)
    table = match(two_seeds, two_seeds, key_b="other")
    compare.assert_same(before, compare.state(two_seeds))
    assert table.dtypes.astype(str).to_dict() == COLUMNS
    assert sorted(number(table["feature"])) == list(range(32))
    partners = table["feature_b"].dropna()
    assert partners.is_unique and len(partners) > 25
    assert table["similarity"].is_monotonic_decreasing and table["similarity"].iloc[0] > 0.6
    np.testing.assert_array_equal(table["similarity"], table["cosine"])
    assert (table["best_similarity"] >= table["similarity"].fillna(0)).all()

    by_activity = match(two_seeds, two_seeds, key_b="other", by="activations")
    assert (by_activity["pval"] < 0.05).sum() > 20
    r = np.corrcoef(two_seeds.obsm["sae"].toarray().T, two_seeds.obsm["other"].toarray().T)[:32, 32:]
    rows, columns = linear_sum_assignment(np.maximum(r, 0), maximize=True)
    assert by_activity["similarity"].sum() == pytest.approx(np.maximum(r, 0)[rows, columns].sum(), rel=1e-5)
    paired = table.dropna(subset="feature_b")
    np.testing.assert_allclose(
        paired["correlation"], r[number(paired["feature"]), number(paired["feature_b"])], atol=1e-5
    )


def test_similarities_by_genes_are_correlations_of_correlations(two_seeds):
    half = two_seeds[:400].copy(), two_seeds[400:, ::-2].copy()
    table = match(*half, by="genes", key_b="other").dropna(subset="feature_b")
    genes = half[0].var_names.intersection(half[1].var_names)
    assert len(genes) == 383
    x = [part[:, genes].X.toarray().astype(float) for part in half]

    def signature(adata, x, key, feature):
        a = adata.obsm[key][:, feature].toarray().ravel()
        with np.errstate(invalid="ignore"):
            return np.nan_to_num([np.corrcoef(a, gene)[0, 1] for gene in x.T])

    for row in table.iloc[[0, 5, -1]].itertuples():
        mine = signature(half[0], x[0], "sae", int(row.feature.rpartition("_")[2]))
        theirs = signature(half[1], x[1], "other", int(row.feature_b.rpartition("_")[2]))
        assert row.similarity == pytest.approx(np.corrcoef(mine, theirs)[0, 1], abs=1e-5)
    assert table["correlation"].isna().all(), "no cell in common"


def test_decoders_are_compared_in_the_space_of_a(two_seeds):
    """On half of the cells, whitening has other axes; the same directions of the representation are still the same."""
    scaling = two_seeds.uns["sae"]["weights"]["scaling"]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(scaling.shape[1],) * 2))[0]
    two_seeds.uns["other"] = {**two_seeds.uns["sae"]}
    two_seeds.uns["other"]["weights"] = {**two_seeds.uns["sae"]["weights"], "scaling": scaling @ rotation}
    table = match(two_seeds, two_seeds, key_b="other", by="decoder")
    np.testing.assert_allclose(table["similarity"], 1, atol=1e-6)
    assert (number(table["feature"]) == number(table["feature_b"])).all()


def test_auto_tells_what_the_two_have_in_common(two_seeds, log):
    def how(a, b, **settings):
        table = match(a, b, key_b="other", **settings).dropna(subset="feature_b")
        same = [name for name in ("cosine", "correlation") if (table[name] == table["similarity"]).all()]
        return same[0] if same else "genes"

    assert how(two_seeds, two_seeds) == "cosine"
    recomputed = two_seeds.copy()
    recomputed.uns["other"] = {**recomputed.uns["other"]}
    recomputed.uns["other"]["params"] = {**recomputed.uns["other"]["params"], "fingerprint": "another-one"}
    assert how(two_seeds, recomputed) == "correlation"
    assert log() == ""
    assert how(two_seeds, recomputed, by="decoder") == "cosine"
    assert "a.uns['sae'] and b.uns['other'] were trained on different cells or values" in log()
    # Few barcodes are the same by coincidence.
    names = [f"{name}{'' if i < 30 else '-b'}" for i, name in enumerate(two_seeds.obs_names)]
    recomputed.obs_names = names
    assert how(two_seeds, recomputed) == "genes"
    assert how(two_seeds, recomputed, by="activations") == "correlation"
    recomputed.obs_names = ["same"] * 700
    assert how(two_seeds, recomputed) == "genes"


def test_chance_is_what_unrelated_features_have(two_seeds):
    """The cells of one are permuted: nothing is found. The p-values of the pairs are then uniform, roughly."""
    rng = np.random.default_rng(0)
    other = two_seeds.copy()
    other.obsm["other"] = other.obsm["other"][rng.permutation(700)]
    random = other.uns["other"] = {**other.uns["other"]}
    random["weights"] = {**random["weights"], "W_dec": rng.normal(size=(32, 50))}
    for by in ("decoder", "activations", "genes"):
        table = match(two_seeds, other, key_b="other", by=by)
        assert (table["pval"] < 0.05).mean() < 0.2 and table["pval"].mean() > 0.3, by
        assert 0 < table["chance"].iloc[0] < 0.7
        assert table["chance"].nunique() == 1
        related = match(two_seeds, two_seeds, key_b="other", by=by)
        assert (related["pval"] < 0.05).sum() > 9, by
    without = match(two_seeds, other, key_b="other", n_permutations=0)
    assert without[["chance", "pval"]].isna().all(axis=None)
    pd.testing.assert_frame_equal(match(two_seeds, other, key_b="other"), match(two_seeds, other, key_b="other", rng=0))


def test_chance_of_decoders_that_lie_along_few_axes(two_seeds):
    """As in expression, where few axes hold most: unrelated directions are alike there, and none of them is a finding."""
    rng = np.random.default_rng(0)
    for key in ("sae", "other"):
        W_dec = rng.normal(size=(32, 50)) * np.arange(1.0, 51) ** -1.5
        weights = {name: values for name, values in two_seeds.uns[key]["weights"].items() if name != "scaling"}
        two_seeds.uns[key] = {**two_seeds.uns[key], "weights": {**weights, "W_dec": W_dec}}
    table = match(two_seeds, two_seeds, key_b="other", by="decoder")
    assert table["similarity"].mean() > 0.7
    assert (table["pval"] < 0.05).mean() < 0.2 and table["pval"].mean() > 0.3


def test_enrichment_by_hand(make_adata):
    adata = make_adata()
    for key in ("one", "two"):
        sae.tl.fit(adata, n_features=3, k=2, steps=20, key_added=key)
        sae.tl.encode(adata, key=key)
    for key, has in (("one", ["ab", "cd", ""]), ("two", ["c", "adb", "D"])):
        rows = [
            (f"{key}_{i}", "sets", name.lower(), "down" if name.isupper() else "up", 0.01)
            for i, names in enumerate(has)
            for name in names
        ]
        rows.append((f"{key}_2", "sets", "e", "up", 0.2))
        table = pd.DataFrame(rows, columns=["feature", "collection", "gene_set", "direction", "padj"])
        adata.uns[key]["enrichment"] = table.astype({"feature": "category", "collection": "category"})
    table = match(adata, adata, key="one", key_b="two", by="enrichment")
    assert number(table["feature_b"]).tolist() == [1, 0, -1]
    np.testing.assert_allclose(table["similarity"], [2 / 3, 1 / 2, np.nan])
    everything = match(adata, adata, key="one", key_b="two", by="enrichment", max_padj=0.5)
    # `e` and the lowered `d` are one half.
    np.testing.assert_allclose(everything["similarity"], [2 / 3, 1 / 2, 1 / 2])
    assert number(everything["feature_b"])[number(everything["feature"]) == 2] == 2


def test_more_features_on_one_side(make_adata):
    adata = make_adata()
    for key, h in (("few", 6), ("many", 20)):
        sae.tl.fit(adata, n_features=h, k=3, steps=60, key_added=key)
        sae.tl.encode(adata, key=key)
    table = match(adata, adata, key="many", key_b="few")
    assert len(table) == 20 and table["feature_b"].notna().sum() <= 6
    assert table["pval"].isna().sum() == table["feature_b"].isna().sum()
    assert match(adata, adata, key="few", key_b="many")["feature_b"].nunique() == 6


def lacks_key(adata):
    return {"key_b": "third"}


def other_width(adata):
    adata.obsm["X_few"] = adata.obsm["X_pca"][:, :20].copy()
    sae.tl.fit(adata, "X_few", n_features=16, steps=20, key_added="few", progress=False)
    return {"key_b": "few", "by": "decoder"}


def other_inputs(adata):
    adata.obsm["frame"] = pd.DataFrame(adata.obsm["X_pca"][:, :5], index=adata.obs_names, columns=list("abcde"))
    sae.tl.fit(adata, "frame", n_features=8, steps=20, key_added="one", progress=False)
    adata.obsm["frame"] = adata.obsm["frame"].rename(columns={"e": "f"})
    sae.tl.fit(adata, "frame", n_features=8, steps=20, key_added="two", progress=False)
    return {"key": "one", "key_b": "two", "by": "decoder"}


def not_encoded(adata):
    del adata.obsm["other"]
    return {"by": "activations"}


def other_cells(adata):
    adata.obs_names = [f"b{name}" for name in adata.obs_names]
    return {"by": "activations"}


def repeated_cells(adata):
    adata.obs_names = ["cell"] * adata.n_obs
    return {"by": "activations"}


def other_genes(adata):
    adata.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]
    return {"by": "genes"}


def no_enrichment(adata):
    return {"by": "enrichment"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lacks_key, KeyError, r"b.uns has no SAE 'third' \(b.uns holds the SAEs 'sae', 'other'\)"),
        (other_width, ValueError, r"a.uns\['sae'\] reads 50 columns \('X_pca'\), b.uns\['few'\] 20 \('X_few'\)"),
        (
            other_inputs,
            ValueError,
            r"1 of the 5 columns that a.uns\['one'\] reads are not read by b.uns\['two'\] \('e'\)",
        ),
        (not_encoded, KeyError, r"b.obsm has no activations 'other'. Run sae.tl.encode"),
        (other_cells, ValueError, r"^0 cells are in a and in b, .* Use by='genes' for different cells"),
        (repeated_cells, ValueError, "b has cell names that occur more than once"),
        (other_genes, ValueError, r"0 genes of a.X \('\S+', .* are in b.X \('ENSG0', .* identifiers"),
        (no_enrichment, KeyError, r"a.uns\['sae'\] has no 'enrichment'. Run sae.tl.enrich"),
        (lambda adata: {"by": "cosine"}, ValueError, "by='cosine' is not one of 'auto', 'decoder'"),
        (lambda adata: {"max_padj": 0}, ValueError, "max_padj=0 is not a probability"),
        (lambda adata: {"n_permutations": -1}, ValueError, "n_permutations=-1 is not a number of matchings"),
        (lambda adata: {"n_permutations": 1.5}, ValueError, "n_permutations=1.5 is not"),
        (lambda adata: {"mod_b": "rna"}, ValueError, "mod='rna' names a modality, but the data is an AnnData"),
        (lambda adata: {"by": "genes", "var_mod": "rna"}, ValueError, "var_mod='rna' names a modality"),
        (lambda adata: {"by": "genes", "layer": "no"}, KeyError, r"a.layers has no 'no'"),
    ],
)
def test_bad_input(two_seeds, change, error, message):
    other = two_seeds.copy()
    settings = {"key_b": "other", **change(other)}
    # Where an SAE is needed under a key of the changed object, both are that object.
    a = other if "key" in settings else two_seeds
    with pytest.raises(error, match=message):
        match(a, other, **settings)


def test_no_gene_set_in_common(two_seeds, net):
    for key, collection in (("sae", "one"), ("other", "two")):
        sae.tl.enrich(two_seeds, net, key=key, collection=collection, n_null=0, progress=False)
    with pytest.raises(ValueError, match="have nothing in common: .* with the same net and collection"):
        match(two_seeds, two_seeds, key_b="other", by="enrichment")
    with pytest.raises(KeyError, match=r"has no collection 'two'; it has 'one'. Pass one of them as collection="):
        match(two_seeds, two_seeds, key_b="other", by="enrichment", collection="two")


def test_wrong_data(two_seeds):
    with pytest.raises(TypeError, match="Expected an AnnData or a MuData, got int"):
        match(two_seeds, 1)


def test_activations_are_the_same_read_from_h5ad(two_seeds, tmp_path):
    two_seeds.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for by in ("activations", "genes"):
        expected = match(two_seeds, two_seeds, key_b="other", by=by, n_permutations=1)
        pd.testing.assert_frame_equal(match(two_seeds, back, key_b="other", by=by, n_permutations=1), expected)
    back.file.close()


LINEAGE = {
    "B": "B",
    "CD14+ Mono": "monocyte",
    "FCGR3A+ Mono": "monocyte",
    "MNP": "monocyte",
    "NK": "cytotoxic",
    "CD8 T": "cytotoxic",
    "T_CD8": "cytotoxic",
}
"""Labels of the two data sets. Features of CD8 T cells are often those of all cytotoxic cells."""


def test_the_same_cell_types_of_two_data_sets():
    """PBMC of two donors and chemistries: features of B cells, monocytes and cytotoxic cells find their like by genes alone."""
    read = []
    for name in ("pbmc3k_hvg2000_counts_labeled.h5ad", "pbmc4k_half_counts_labeled.h5ad"):
        if not (DATA / name).exists():
            pytest.skip(f"{name} is not in {DATA}; set SAE_TEST_DATA to the folder that has it")
        adata = ad.read_h5ad(DATA / name)
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=50)
        sae.tl.fit(adata, n_features=128, steps=1_000, progress=False)
        sae.tl.encode(adata)
        sae.tl.score_labels(adata, "cell_type", n_splits=1, progress=False)
        read.append(adata)
    table = match(*read)
    assert table["cosine"].isna().all() and table["correlation"].isna().all()
    label = [sae.get.features(adata)["cell_type_label"].astype(object).map(LINEAGE) for adata in read]
    auroc = [sae.get.features(adata)["cell_type_auroc"] for adata in read]
    sure = table[(table["pval"] < 0.05) & table["feature_b"].notna()]
    names = sure["feature"].astype(object), sure["feature_b"].astype(object)
    known = (auroc[0][names[0]].to_numpy() > 0.9) & label[0][names[0]].notna().to_numpy()
    mine, theirs = label[0][names[0]].to_numpy()[known], label[1][names[1]].to_numpy()[known]
    assert set(mine) == {"B", "monocyte", "cytotoxic"}
    assert known.sum() >= 8 and np.mean(mine == theirs) >= 0.8
