"""What is read from the map of the features, and from the ontology above their gene sets."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sae

SHARED = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")


@pytest.fixture(scope="module")
def _mapped(_analysed):
    adata = _analysed.copy()
    sae.tl.feature_map(adata, n_neighbors=5)
    return adata


@pytest.fixture
def mapped(_mapped):
    return _mapped.copy()


def put_enrichment(adata, sets: dict[str, list[str]]):
    """Store gene sets by feature, each more significant than the next."""
    rows = [(feature, name, 1e-9 * 2**i) for feature, names in sets.items() for i, name in enumerate(names)]
    table = pd.DataFrame(rows, columns=["feature", "gene_set", "pval"]).assign(
        collection="go",
        direction="up",
        overlap=1,
        size=2,
        score=1.0,
        padj=lambda t: t["pval"],
        padj_all=0.0,
        fdr=np.nan,
    )
    table["genes"] = ""
    text = ["feature", "collection", "gene_set", "direction", "genes"]
    table = table.astype(dict.fromkeys(text, "category"))
    adata.uns["sae"]["enrichment"] = table[list(sae._schema.ENRICHMENT)].set_axis(table.index.astype(str))


# ---- Neighbors and modules


def test_neighbors_most_similar_first(mapped):
    table = sae.get.neighbors(mapped)
    assert (np.diff(table["similarity"]) <= 0).all()
    assert (table["feature"].astype(str) != table["neighbor"].astype(str)).all()
    stored = mapped.uns["sae"]["feature_map"]["neighbors"]
    assert len(table) == len(stored)
    some = sae.get.neighbors(mapped, ["sae_3", 0], n=2)
    assert some["feature"].value_counts().to_dict() == {"sae_0": 2, "sae_3": 2}
    assert some["feature"].cat.categories.tolist() == ["sae_0", "sae_3"]
    of_one = stored[stored["feature"] == "sae_3"].head(2)
    assert sae.get.neighbors(mapped, "sae_3", n=2)["neighbor"].tolist() == of_one["neighbor"].tolist()


@pytest.mark.parametrize("getter", [sae.get.neighbors, sae.get.modules])
def test_without_a_map(encoded, getter):
    with pytest.raises(KeyError, match=r"has no 'feature_map'. Run sae.tl.feature_map"):
        getter(encoded)


def test_modules_are_told_by_what_is_theirs(mapped):
    features = mapped.uns["sae"]["features"]
    live = features.index[features["module"].notna()]
    module = features.loc[live, "module"].astype(str)
    # Everybody has "common"; every second feature of a module has what is the module's own.
    own = {name: [f"own {module[name]}"] if i % 2 else [] for i, name in enumerate(module.sort_values().index)}
    put_enrichment(mapped, {name: ["common", *own[name]] for name in live})
    table = sae.get.modules(mapped, groupby="bulk_labels")
    assert table["module"].tolist() == module.value_counts().sort_index(key=lambda i: i.astype(int)).index.tolist()
    assert table["n_features"].tolist() == [int((module == name).sum()) for name in table["module"]]
    assert table["gene_sets"].tolist() == [f"own {name}" for name in table["module"]]
    for row in table.itertuples():
        labels = features.loc[module.index[module == row.module], "bulk_labels_label"].astype(str)
        elsewhere = features.loc[module.index[module != row.module], "bulk_labels_label"].astype(str)
        for label in row.labels.split("; "):
            assert (labels == label).mean() > (elsewhere == label).mean()
    assert sae.get.modules(mapped, n=1)["genes"].str.contains(";").sum() == 0


def test_modules_of_what_is_stored(encoded):
    sae.tl.feature_map(encoded)
    assert sae.get.modules(encoded).columns.tolist() == ["module", "n_features"]
    sae.tl.rank_genes(encoded)
    assert sae.get.modules(encoded).columns.tolist() == ["module", "n_features", "genes"]
    with pytest.raises(KeyError, match=r"Run sae.tl.score_labels"):
        sae.get.modules(encoded, groupby="bulk_labels")
    with pytest.raises(KeyError, match=r"Run sae.tl.enrich"):
        sae.get.modules(encoded, collection="go")


def test_modules_of_unknown_labels(mapped):
    with pytest.raises(KeyError, match="no results for the groupby 'louvain'; there are for 'bulk_labels', 'phase'"):
        sae.get.modules(mapped, groupby="louvain")


# ---- Words in the names of gene sets

NAMED = {
    "sae_0": ["GOBP_IRON_ION_HOMEOSTASIS", "iron ion transport"],
    "sae_1": ["cation homeostasis"],
    "sae_2": ["heme process", "calcium ion homeostasis (GO:0055074)", "ion homeostasis"],
    "sae_3": ["regulation of homeostasis"],
}


@pytest.mark.parametrize(
    ("term", "features"),
    [
        ("ion homeostasis", ["sae_0", "sae_2"]),
        ("HOMEO ion", ["sae_0", "sae_2"]),
        ("homeostasis", ["sae_0", "sae_1", "sae_3", "sae_2"]),
        ("GO:0055074", ["sae_2"]),
        ("ferritin", []),
    ],
)
def test_features_with_a_term(encoded, term, features):
    put_enrichment(encoded, NAMED)
    found = sae.get.term_features(encoded, term)
    assert found["feature"].tolist() == features
    assert found.columns.tolist() == ["feature", "gene_set", "padj", "n_sets"]


def test_features_with_a_term_have_their_best_set(encoded):
    put_enrichment(encoded, NAMED)
    row = sae.get.term_features(encoded, "ion homeostasis").iloc[1]
    assert (row["gene_set"], row["n_sets"]) == ("calcium ion homeostasis (GO:0055074)", 2)
    table = encoded.uns["sae"]["enrichment"]
    table["fdr"] = np.where(table["feature"] == "sae_0", 0.5, 0.01)
    assert sae.get.term_features(encoded, "ion homeostasis")["feature"].tolist() == ["sae_2"]
    assert len(sae.get.term_features(encoded, "ion homeostasis", max_fdr=0.6)) == 2
    with pytest.raises(ValueError, match="has no words"):
        sae.get.term_features(encoded, " - ")


# ---- Parent terms

#        top
#       /   \
#      a     b
#     / \   / \
#    c    d    e      and f below e
TERMS = pd.DataFrame(
    [
        ("a", "top"),
        ("b", "top"),
        ("T:c", "a"),
        ("T:d", "a"),
        ("T:d", "b"),
        ("T:e", "b"),
        ("T:f", "T:e"),
        ("top", None),
    ],
    columns=["term", "parent"],
)
SETS = {
    "sae_0": ["cee (T:c)", "dee (T:d)", "T:f"],  # a: 2, b: 2; in all a: 6, b: 5
    "sae_1": ["cee (T:c)", "dee (T:d)", "unknown"],
    "sae_2": ["ef (T:f)", "ee (T:e)"],
    "sae_3": ["unknown"],
    "sae_4": ["cee (T:c)"],
    "sae_5": ["cee (T:c)"],
}


def parents_of(adata, terms=TERMS, **settings):
    return sae.get.parent_terms(adata, terms, **settings)["parent"].astype(object)


def test_most_frequent_ancestor(encoded):
    put_enrichment(encoded, SETS)
    table = sae.get.parent_terms(encoded, TERMS.assign(name=TERMS["term"].replace({"a": "process a"})))
    assert table.index.equals(sae.get.features(encoded).index)
    assert table["parent"].astype(object).iloc[:6].fillna("").tolist() == ["b", "a", "b", "", "a", "a"]
    assert table.loc[["sae_1", "sae_2"], "name"].tolist() == ["process a", "b"]
    assert table.loc[["sae_0", "sae_1", "sae_2"], "n_sets"].tolist() == [2, 2, 2]
    assert table.loc[["sae_0", "sae_1", "sae_2"], "of_sets"].tolist() == [3, 2, 2]
    assert table.loc["sae_3"].isna().all()


def test_levels(encoded):
    put_enrichment(encoded, SETS)
    assert parents_of(encoded, level=0)["sae_0"] == "top"
    assert parents_of(encoded, level=2)["sae_2"] == "T:e"
    assert parents_of(encoded, level=3).dropna().to_dict() == {"sae_0": "T:f", "sae_2": "T:f"}
    names = sae.get.parent_terms(encoded, TERMS, level=2)["name"]
    assert names["sae_2"] == "ee", "from the gene set, where the table has no names"
    for level in (4, -1):
        with pytest.raises(ValueError, match=f"no terms of level={level}"):
            parents_of(encoded, level=level)


def test_what_r_puts_on_top_is_left_out(encoded):
    put_enrichment(encoded, SETS)
    of_r = pd.concat([TERMS, pd.DataFrame([("top", "all")], columns=["term", "parent"])])
    pd.testing.assert_series_equal(parents_of(encoded), parents_of(encoded, of_r))


def test_bad_parents(encoded):
    put_enrichment(encoded, SETS)
    with pytest.raises(ValueError, match=r"columns 'child', 'parent'; it lacks 'term'.*rename"):
        parents_of(encoded, TERMS.rename(columns={"term": "child"}))
    with pytest.raises(ValueError, match="no terms of level=1"):
        parents_of(encoded, pd.DataFrame({"term": ["x", "y"], "parent": ["y", "x"]}))
    with pytest.raises(ValueError, match="parents has none of the 6 gene sets, such as"):
        parents_of(encoded, pd.DataFrame({"term": ["x"], "parent": ["y"]}))


def test_circles_above_a_term_end(encoded):
    put_enrichment(encoded, SETS)
    circle = pd.concat([TERMS, pd.DataFrame([("T:e", "T:f")], columns=["term", "parent"])])
    assert parents_of(encoded, circle)["sae_2"] == "b"


def test_real_ontology(encoded):
    path = SHARED / "genesets" / "go_bp_parents_2022.tsv.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}; set SAE_TEST_DATA to the folder that has genesets/")
    parents = pd.read_csv(path, sep="\t").rename(columns={"child": "term"})
    put_enrichment(encoded, {"sae_0": ["heme metabolic process (GO:0042168)"], "sae_1": ["lymph node (GO:0048535)"]})
    assert parents_of(encoded, parents).dropna().to_dict()["sae_0"] in ("GO:0008152", "GO:0009987")
    assert parents_of(encoded, parents, level=0)["sae_0"] == "GO:0008150"


# ---- The terms of an OBO file

OBO = """format-version: 1.2

[Term]
id: GO:0000001
name: top
namespace: biological_process

[Term]
id: GO:0000002
name: part
namespace: biological_process
is_a: GO:0000001 ! top

[Term]
id: GO:0000003
name: piece
namespace: biological_process
alt_id: GO:0000009
is_a: GO:0000002 ! part
relationship: part_of GO:0000001 ! top
relationship: part_of GO:0000005 ! place
relationship: positively_regulates GO:0000004 ! other

[Term]
id: GO:0000004
name: other
namespace: biological_process
is_a: GO:0000009 ! piece

[Term]
id: GO:0000005
name: place
namespace: cellular_component

[Term]
id: GO:0000006
name: old
namespace: biological_process
is_obsolete: true
"""


@pytest.fixture
def obo(tmp_path):
    path = tmp_path / "go.obo"
    path.write_text(OBO)
    return path


def listed(table):
    return [
        tuple(None if value is None else value[-1] if value[:3] == "GO:" else value for value in row)
        for row in table.to_numpy()
    ]


def test_read_go_terms(obo):
    table = sae.io.read_go_terms(obo)
    assert table.columns.tolist() == ["term", "name", "parent"]
    assert listed(table) == [
        ("1", "top", None),
        ("2", "part", "1"),
        ("3", "piece", "1"),
        ("3", "piece", "2"),
        ("4", "other", "3"),
    ]


def test_read_go_terms_of_other_aspects_and_relations(obo):
    assert listed(sae.io.read_go_terms(obo, aspect="C")) == [("5", "place", None)]
    every = listed(sae.io.read_go_terms(obo, aspect=None, relations=["part_of", "regulates"]))
    assert ("3", "piece", "5") in every and ("3", "piece", "4") in every and ("2", "part", None) in every
    with pytest.raises(ValueError, match="aspect='X' is not one of"):
        sae.io.read_go_terms(obo, aspect="X")
    with pytest.raises(ValueError, match="relations= has 'is_b'"):
        sae.io.read_go_terms(obo, relations="is_b")


def test_terms_go_into_parent_terms(encoded, obo):
    put_enrichment(encoded, {"sae_0": ["other (GO:0000004)"]})
    table = sae.get.parent_terms(encoded, sae.io.read_go_terms(obo))
    # "piece" is part of the top, but also below "part".
    assert table.loc["sae_0", "name"] in ("part", "piece")
