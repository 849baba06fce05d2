from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import sae
from sae.tl._compare_enrichment import compare_enrichment


@pytest.fixture
def by_hand(make_adata):
    """Two SAEs of four features with gene sets made up: an upper-case letter is a set that is lower, `padj` .01, after a colon .2."""
    adata = make_adata()
    for key in ("one", "two"):
        sae.tl.fit(adata, n_features=4, k=2, steps=20, key_added=key)
        sae.tl.encode(adata, key=key)

    def store(**has: list[str]) -> ad.AnnData:
        for key, features in has.items():
            rows = [
                (f"{key}_{i}", "sets", name.lower(), "down" if name.isupper() else "up", padj)
                for i, text in enumerate(features)
                for part, padj in zip(text.split(":"), (0.01, 0.2), strict=False)
                for name in part
            ]
            table = pd.DataFrame(rows, columns=["feature", "collection", "gene_set", "direction", "padj"])
            adata.uns[key]["enrichment"] = table.astype(dict.fromkeys(table.columns[:4], "category"))
        return adata

    return store


def compared(adata, **settings):
    table = compare_enrichment(adata, adata, key="one", key_b="two", **settings)
    assert table.columns.tolist() == ["measure", "a", "b", "value", "chance", "pval"]
    assert table.index.tolist() == [str(i) for i in range(7)]
    return table.set_index("measure")


def test_by_hand(by_hand):
    """Terms of one: a 2, b 1, c 1, D 1; of two: a 1, b 1, c 2, d 1. Listed are a, b, c, d, D, e, f."""
    adata = by_hand(one=["ab", "ac:e", "D", ":f"], two=["ab", "c", "cd", ":e"])
    table = compared(adata)
    assert table.loc["features", ["a", "b"]].tolist() == [4, 4]
    assert table.loc["annotated_features", ["a", "b"]].tolist() == [3, 3]
    assert table.loc["terms", ["a", "b"]].tolist() == [4, 4]
    np.testing.assert_allclose(table.loc["terms_per_feature", ["a", "b"]].astype(float), 5 / 3)
    assert table.loc["shared_terms", "value"] == 3
    assert table.loc["shared_terms", "chance"] == pytest.approx(4 * 4 / 7)
    contingency = [[3, 1], [1, 2]]
    assert table.loc["shared_terms", "pval"] == pytest.approx(stats.fisher_exact(contingency, "greater").pvalue)
    assert table.loc["spearman", "value"] == pytest.approx(stats.spearmanr([2, 1, 1, 1, 0], [1, 1, 2, 0, 1]).statistic)
    assert table.loc["matched_jaccard", "value"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert table.loc[["features", "terms"], ["value", "chance", "pval"]].isna().all(axis=None)


def test_published_counts_all_that_is_stored(by_hand):
    """All sets whatever `padj` and direction; terms of one: a 2, b 1, c 1, d 1, e 1, f 1; of two: a 1, b 1, c 2, d 1, e 1."""
    adata = by_hand(one=["ab", "ac:e", "D", ":f"], two=["ab", "c", "cd", ":e"])
    table = compared(adata, published=True)
    assert table.loc["annotated_features", ["a", "b"]].tolist() == [4, 4]
    assert table.loc["shared_terms", "value"] == 5 and np.isnan(table.loc["shared_terms", "chance"])
    assert table.loc["spearman", "value"] == pytest.approx(stats.spearmanr([2, 1, 1, 1, 1], [1, 1, 2, 1, 1]).statistic)
    assert table.loc["matched_jaccard", "value"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 0) / 4)


def test_chance(by_hand):
    """With one set each, a permutation of the features' sets is the same collection: as alike as by chance."""
    adata = by_hand(one=list("abcd"), two=list("dbca"))
    table = compared(adata)
    assert table.loc["matched_jaccard", ["value", "chance", "pval"]].tolist() == [1, 1, 1]
    assert np.isnan(table.loc["spearman", "value"]), "all counts are the same"
    assert (
        compared(adata, n_permutations=0).loc[["spearman", "matched_jaccard"], ["chance", "pval"]].isna().all(axis=None)
    )
    few = by_hand(one=["ab", "cd", "ef", "gh"], two=["ab", "cd", "ef", "gh"])
    table = compared(few, n_permutations=50)
    assert table.loc["matched_jaccard", "value"] == 1
    assert table.loc["matched_jaccard", "chance"] < 0.7 and table.loc["matched_jaccard", "pval"] < 0.1
    pd.testing.assert_frame_equal(compared(few), compared(few, rng=np.random.default_rng(0)))


@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_real_gene_sets_of_two_seeds(encoded, net, compare, tmp_path, store):
    sae.tl.fit(encoded, n_features=32, steps=150, progress=False, rng=1, key_added="other")
    sae.tl.encode(encoded, key="other")
    for key in ("sae", "other"):
        sae.tl.enrich(encoded, net, key=key, n_sets=None, n_null=0, min_size=3, progress=False)
    before = compare.state(encoded)
    table = compare_enrichment(encoded, encoded, key_b="other")
    compare.assert_same(before, compare.state(encoded))
    values = table.set_index("measure")
    assert values.loc["spearman", "value"] > 0.5 > values.loc["spearman", "chance"]
    assert 1 > values.loc["matched_jaccard", "value"] > values.loc["matched_jaccard", "chance"] > 0
    encoded.uns["comparison"] = table
    getattr(encoded, f"write_{store}")(tmp_path / "cells")
    back = getattr(ad, f"read_{store}")(tmp_path / "cells")
    pd.testing.assert_frame_equal(back.uns["comparison"], table)
    pd.testing.assert_frame_equal(compare_enrichment(back, encoded, key_b="other"), table)


def test_mudata(make_mudata):
    mdata = make_mudata()
    nets = {"rna": {f"s{i}": [f"g{j}" for j in range(i, i + 8)] for i in range(12)}}
    sae.tl.fit(mdata, mod="rna", n_features=12, steps=60)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.enrich(mdata, nets["rna"], mod="rna", max_padj=0.5, min_log2fc=0, n_null=0)
    table = compare_enrichment(mdata, mdata, mod="rna", max_padj=1)
    pd.testing.assert_frame_equal(table, compare_enrichment(mdata["rna"], mdata, mod_b="rna", max_padj=1))
    assert table.set_index("measure").loc["matched_jaccard", "value"] == 1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"key_b": "third"}, KeyError, r"b.uns has no SAE 'third'"),
        ({"collection": "GO"}, KeyError, r"a.uns\['one'\]\['enrichment'\] has no collection 'GO'; it has 'sets'"),
        ({"max_padj": 2}, ValueError, "max_padj=2 is not a probability"),
        ({"n_permutations": True}, ValueError, "n_permutations=True is not a number of draws"),
        ({"mod": "rna"}, ValueError, "mod='rna' names a modality"),
    ],
)
def test_bad_input(by_hand, settings, error, message):
    adata = by_hand(one=["a"], two=["a"])
    with pytest.raises(error, match=message):
        compare_enrichment(adata, adata, **{"key": "one", "key_b": "two"} | settings)


def test_nothing_in_common(by_hand, encoded):
    adata = by_hand(one=["a"], two=["b"])
    with pytest.raises(
        ValueError, match="of a.uns\\['one'\\] and b.uns\\['two'\\] have nothing in common: 'a' and 'b'"
    ):
        compare_enrichment(adata, adata, key="one", key_b="two")
    with pytest.raises(KeyError, match="b.uns\\['sae'\\] has no 'enrichment'. Run sae.tl.enrich"):
        compare_enrichment(adata, encoded, key="one", key_b="sae")
