from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import sae
from sae import _schema

COLUMNS = [
    "name", "name_from", "name_gene_set", "name_gene_set_padj", "name_gene_set_fdr", "name_label", "name_groupby",
    "name_label_auroc", "name_genes",
]  # fmt: skip

GENE_SET = {
    "feature": "sae_0", "collection": "go", "gene_set": "B cell (CL:0000236)", "direction": "up", "overlap": 2, "size": 9,
    "score": 3.0, "pval": 1e-6, "padj": 1e-4, "fdr": 0.0, "genes": "CD79A;CD79B",
}  # fmt: skip
LABEL = {
    "feature": "sae_0", "groupby": "type", "label": "B_cells", "auroc": 0.9, "f1": 0.8, "held_out_auroc": 0.85,
    "held_out_f1": 0.8, "difference": 1.0, "ci_low": 0.5, "ci_high": 1.5, "pval": 1e-6, "padj": 1e-4,
}  # fmt: skip
GENE = {"feature": "sae_0", "gene": "CD79A", "score": 9.0, "log2fc": 2.0, "pval": 1e-6, "padj": 1e-4}


def table(default, rows):
    """Make a stored table whose rows state only what differs from a good one."""
    made = pd.DataFrame([default | row for row in rows], columns=list(default))
    return _schema.plain_index(
        made.astype({name: "category" for name, value in default.items() if isinstance(value, str)})
    )


def genes(*symbols, **row):
    return [row | {"gene": gene, "score": 20.0 - i} for i, gene in enumerate(symbols)]


@pytest.fixture
def tabled(encoded):
    """Four features with made-up results, in place of what the verbs would write; strength falls from sae_0 on."""

    def make(sets=None, labels=None, genes=None, modality=None):
        stored = encoded.uns["sae"]
        weights, params = stored["weights"], stored["params"]
        cut = {"W_enc": weights["W_enc"][:, :4]} | {name: weights[name][:4] for name in ("b_enc", "W_dec", "threshold")}
        stored["weights"], stored["params"] = weights | cut, params | {"n_features": 4, "k": min(params["k"], 4)}
        stored["features"] = stored["features"].head(4).assign(mean=[4.0, 3.0, 2.0, 1.0])
        for name, default, rows in (("enrichment", GENE_SET, sets), ("labels", LABEL, labels), ("genes", GENE, genes)):
            if rows is not None:
                stored[name] = table(default if modality is None else default | {"modality": modality}, rows)
        return encoded

    return make


def named(adata, **settings):
    sae.tl.name_features(adata, **settings)
    return adata.uns["sae"]["features"]


def test_label_before_gene_set_before_genes(tabled):
    features = named(
        tabled(
            sets=[{"feature": "sae_0"}, {"feature": "sae_1"}],
            labels=[{}],
            genes=genes("MS4A1", "CD79A", "CD74", "IGHM") + genes("CD37", "CD22", "CD19", "CD20", feature="sae_2"),
        )
    )
    assert features["name"].tolist() == ["B cells · MS4A1, CD79A", "B cell", "CD37, CD22, CD19", "sae_3"]
    assert features["name_from"].tolist() == ["label", "gene set", "genes", "none"]
    first, nothing = features.loc["sae_0"], features.loc["sae_3"]
    assert first["name_gene_set"] == "B cell (CL:0000236)", "evidence is kept as it is, also what the name is not from"
    assert (first["name_gene_set_padj"], first["name_gene_set_fdr"]) == (1e-4, 0)
    assert (first["name_label"], first["name_groupby"], first["name_label_auroc"]) == ("B_cells", "type", 0.85)
    assert first["name_genes"] == "MS4A1;CD79A;CD74;IGHM"
    assert nothing[COLUMNS[2:]].isna().all()


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ({"padj": 0.05}, True),
        ({"padj": 0.051}, False),
        ({"held_out_auroc": 0.8}, True),
        ({"held_out_auroc": 0.79}, False),
        ({"held_out_auroc": np.nan}, False),
        ({"held_out_f1": 0.5}, True),
        ({"held_out_f1": 0.49}, False),
        ({"held_out_f1": np.nan}, False),
        ({"auroc": 0.1}, False),
    ],
    ids=str,
)
def test_which_labels_count(tabled, row, counts):
    features = named(tabled(labels=[row]))
    assert features["name_from"].iloc[0] == ("label" if counts else "none")
    assert pd.notna(features["name_label"].iloc[0]) == counts


@pytest.mark.parametrize(
    ("row", "counts"),
    [
        ({"padj": 0.05}, True),
        ({"padj": 0.051}, False),
        ({"fdr": 0.05}, True),
        ({"fdr": 0.051}, False),
        ({"fdr": np.nan}, True),
        ({"direction": "down"}, False),
    ],
    ids=str,
)
def test_which_gene_sets_count(tabled, row, counts):
    features = named(tabled(sets=[row]))
    assert features["name_from"].iloc[0] == ("gene set" if counts else "none")
    assert pd.notna(features["name_gene_set"].iloc[0]) == counts


@pytest.mark.parametrize(
    ("row", "counts"), [({"padj": 0.05}, True), ({"padj": 0.051}, False), ({"score": -9.0}, False)], ids=str
)
def test_which_genes_count(tabled, row, counts):
    features = named(tabled(genes=[row]))
    assert features["name"].iloc[0] == ("CD79A" if counts else "sae_0")
    assert features["name_from"].iloc[0] == ("genes" if counts else "none")


def test_limits_can_be_set(tabled):
    adata = tabled(sets=[{"padj": 0.1}], labels=[{"held_out_auroc": 0.7, "held_out_f1": 0.3}])
    assert named(adata)["name_from"].iloc[0] == "none"
    assert named(adata, max_padj=0.1)["name_from"].iloc[0] == "gene set"
    assert named(adata, min_auroc=0.7)["name_from"].iloc[0] == "none"
    assert named(adata, min_auroc=0.7, min_f1=0.3)["name_from"].iloc[0] == "label"


def test_the_best_of_several(tabled):
    features = named(
        tabled(
            sets=[
                {"gene_set": "second", "pval": 1e-6, "score": 4.0},
                {"gene_set": "first", "pval": 1e-6, "score": 5.0},
                {"gene_set": "chance", "pval": 1e-9, "fdr": 0.2},
                {"gene_set": "third", "pval": 1e-3, "score": 9.0},
            ],
            labels=[
                {"label": "rare", "auroc": 0.99, "held_out_f1": 0.2},
                {"label": "low"},
                {"label": "high", "auroc": 0.95},
            ],
        )
    )
    assert features["name_gene_set"].iloc[0] == "first"
    assert features["name_label"].iloc[0] == "high"


def test_by_what_features_are_named(tabled):
    adata = tabled(sets=[{}], labels=[{}], genes=genes("CD79A", "MS4A1"))
    assert named(adata, by=("gene set", "label"))["name"].iloc[0] == "B cell · CD79A, MS4A1"
    assert named(adata, by="label")["name"].iloc[0] == "B cells · CD79A, MS4A1"
    assert named(adata, by="genes")["name"].iloc[0] == "CD79A, MS4A1"
    assert named(adata, by=["genes"])["name_label"].iloc[0] == "B_cells", "evidence is given all the same"
    adata.uns["sae"]["labels"]["padj"] = 1.0
    features = named(adata, by="label")
    assert (features["name"].iloc[0], features["name_from"].iloc[0]) == ("sae_0", "none")


def test_collection_groupby_and_modality(tabled):
    adata = tabled(
        sets=[
            {"gene_set": "adaptive immunity"},
            {"gene_set": "B", "collection": "types", "pval": 1e-3, "modality": "adt"},
        ],
        labels=[{"label": "2", "groupby": "batch", "auroc": 0.95}, {}],
        genes=[*genes("CD79A"), {"gene": "CD20", "score": 3.0, "modality": "adt"}],
        modality="rna",
    )
    assert named(adata)["name"].iloc[0] == "batch 2 · CD79A, CD20"
    assert named(adata, groupby="type")["name"].iloc[0] == "B cells · CD79A, CD20"
    assert named(adata, by="gene set")["name"].iloc[0] == "Adaptive immunity · CD79A, CD20"
    assert named(adata, by="gene set", collection="types")["name"].iloc[0] == "B · CD79A, CD20"
    assert named(adata, by="gene set", modality="adt")["name"].iloc[0] == "B · CD20"


def test_genes_of_the_set_where_none_were_ranked(tabled):
    features = named(tabled(sets=[{"genes": "CD79A;CD79B;MS4A1"}, {"feature": "sae_1", "genes": ""}]))
    assert features["name"].tolist()[:2] == ["B cell · CD79A, CD79B", "B cell"]
    assert features["name_genes"].iloc[0] == "CD79A;CD79B;MS4A1"
    assert pd.isna(features["name_genes"].iloc[1])


def test_genes_of_every_cell_are_in_the_table_but_not_in_the_name(tabled):
    symbols = ["MT-CO1", "RPL3", *(f"RPS{i}" for i in range(2, 13)), "CD79A"]
    features = named(tabled(genes=genes(*symbols)))
    assert features["name"].iloc[0] == "CD79A"
    assert features["name_genes"].iloc[0].split(";") == symbols[:10]


def test_long_meanings_have_one_gene_and_names_about_forty_characters(tabled):
    long = "positive regulation of transcription by RNA polymerase II (GO:0045944)"
    just, more = "a" * 22, "b" * 23
    rows = [{"gene_set": long}, {"gene_set": just, "feature": "sae_1"}, {"gene_set": more, "feature": "sae_2"}]
    ranked = [row for i in range(3) for row in genes("HLA-DQA1", "CD74", feature=f"sae_{i}")]
    names = named(tabled(sets=rows, genes=ranked))["name"]
    assert names.iloc[0] == "Pos. reg. of transcription… · HLA-DQA1"
    assert names.iloc[1] == f"A{just[1:]} · HLA-DQA1, CD74"
    assert names.iloc[2] == f"B{more[1:]} · HLA-DQA1"
    assert len(names.iloc[0]) <= 40
    names = named(tabled(sets=[{}], genes=genes("ENSG00000156738", "ENSG00000105369")))["name"]
    assert names.iloc[0] == "B cell · ENSG00000156738, ENSG00000105369", "a short meaning is not cut for long genes"


def test_features_of_the_same_meaning_are_told_apart_by_genes(tabled):
    ranked = [row for i in range(3) for row in genes("LYZ", "FTL", "CST3", feature=f"sae_{i}")]
    adata = tabled(labels=[{"feature": f"sae_{i}"} for i in range(4)], genes=ranked)
    assert named(adata)["name"].tolist() == [
        "B cells · LYZ, FTL",
        "B cells · LYZ, CST3",
        "B cells · LYZ, FTL (2)",
        "B cells",
    ]
    adata.uns["sae"]["features"]["mean"] = [1.0, 2.0, 3.0, 4.0]
    names = named(adata)["name"].tolist()
    assert names == ["B cells · LYZ, FTL (2)", "B cells · LYZ, CST3", "B cells · LYZ, FTL", "B cells"], (
        "the strongest first"
    )


def test_numbers_do_not_collide_with_labels(tabled):
    labels = [{"label": label, "feature": f"sae_{i}"} for i, label in enumerate(["B (2)", "B", "B", "B"])]
    assert named(tabled(labels=labels))["name"].tolist() == ["B (2)", "B", "B (3)", "B (4)"]


def test_real_features(analysed):
    features = named(analysed)
    assert list(features.columns[-len(COLUMNS) :]) == COLUMNS
    assert features["name"].is_unique
    assert {"label", "gene set"} <= set(features["name_from"])
    ranked = sae.get.genes(analysed, direction="up", max_padj=0.05)
    scores = analysed.uns["sae"]["labels"]
    for feature, row in features.iterrows():
        own = ranked.loc[ranked["feature"] == feature, "gene"].tolist()
        assert (row["name_genes"] if own else []) == (";".join(own[:10]) if own else [])
        known = scores[(scores["feature"] == feature) & (scores["padj"] <= 0.05) & (scores["auroc"] > 0.5)]
        known = known[(known["held_out_auroc"] >= 0.8) & (known["held_out_f1"] >= 0.5)]
        if known.empty:
            assert pd.isna(row["name_label"])
        else:
            assert row["name_label"] == known.loc[known["auroc"].idxmax(), "label"]
            assert row["name"].split(" · ")[0] == row["name_label"]
            assert set(row["name"].split(" · ")[1].split(" (")[0].split(", ")) <= set(own)
    b_cells = features[features["name_label"] == "CD19+ B"]
    assert len(b_cells) and b_cells["name"].str.startswith("CD19+ B · ").all()


def test_again_with_other_results(analysed):
    before = named(analysed)
    sae.tl.score_labels(analysed, "phase", progress=False)
    sae.tl.enrich(analysed, sae.datasets.immune_markers(), collection="again", progress=False)
    pd.testing.assert_frame_equal(analysed.uns["sae"]["features"][COLUMNS], before[COLUMNS])
    again = named(analysed, by="genes")
    assert again.columns.is_unique and set(again["name_from"]) <= {"genes", "none"}
    sae.tl.encode(analysed)
    assert "name" not in analysed.uns["sae"]["features"], "other activations are other features"


def test_names_stand_for_features_in_scanpy(analysed):
    import scanpy as sc

    chosen = named(analysed)["name"].tolist()[:3]
    axes = sc.pl.dotplot(sae.get.activations(analysed), chosen, groupby="bulk_labels", gene_symbols="name", show=False)
    assert [tick.get_text() for tick in axes["mainplot_ax"].get_xticklabels()] == chosen


def test_dead_features_and_empty_tables(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, n_features=8, steps=20)
    adata.uns["sae"]["weights"]["b_enc"][:] = -1e6
    with pytest.warns(UserWarning, match="unexplained"):
        sae.tl.encode(adata)
    sae.tl.rank_genes(adata)
    assert named(adata)["name"].tolist() == [f"sae_{i}" for i in range(8)]
    sae.tl.enrich(adata, {"a": [f"g{i}" for i in range(6)]})
    sae.tl.score_labels(adata, "group")
    features = named(adata)
    assert features["name"].tolist() == [f"sae_{i}" for i in range(8)]
    assert features["name_from"].eq("none").all()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"by": "gene_set"},
            ValueError,
            r"by='gene_set' is not a choice from 'label', 'gene set', 'genes'\. Pass some",
        ),
        ({"by": ("label", "set")}, ValueError, r"by=\('label', 'set'\) is not"),
        ({"by": ()}, ValueError, r"by=\(\) is not"),
        ({"collection": "go"}, KeyError, r"no results for the collection 'go'; there are for 'immune'"),
        (
            {"groupby": "louvain"},
            KeyError,
            r"no results for the groupby 'louvain'; there are for 'bulk_labels', 'phase'",
        ),
        ({"modality": "rna"}, KeyError, r"no results for the modality 'rna'; there are for none"),
    ],
    ids=str,
)
def test_clear_errors_and_nothing_changed(analysed, compare, settings, error, message):
    before = compare.state(analysed)
    with pytest.raises(error, match=message):
        sae.tl.name_features(analysed, **settings)
    compare.assert_same(before, compare.state(analysed))


def test_nothing_to_name_by(encoded, compare):
    before = compare.state(encoded)
    message = r"nothing to name features by\. Run sae\.tl\.score_labels, sae\.tl\.enrich or sae\.tl\.rank_genes\(.*'sae'\) first"
    with pytest.raises(KeyError, match=message):
        sae.tl.name_features(encoded)
    with pytest.raises(KeyError, match=r"has no 'enrichment'\. Run sae\.tl\.enrich"):
        sae.tl.rank_genes(encoded)
        sae.tl.name_features(encoded, collection="go")
    with pytest.raises(KeyError, match=r"has no 'labels'\. Run sae\.tl\.score_labels"):
        sae.tl.name_features(encoded, groupby="phase")
    del encoded.uns["sae"]["genes"], encoded.uns["sae"]["features"]["genes_status"]
    compare.assert_same(before, compare.state(encoded))


def test_before_encode(fitted):
    with pytest.raises(KeyError, match=r"Run sae\.tl\.encode"):
        sae.tl.name_features(fitted)
