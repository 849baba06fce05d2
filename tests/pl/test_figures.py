from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sae
from sae.pl._titles import set_titles, short_labels, titles


def test_feature_umap_draws_a_titled_panel_per_feature(analysed):
    axes = sae.pl.feature_umap(analysed, ["sae_3", 0])
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["sae_3", "sae_0"]
    for ax, name in zip(axes, ["sae_3", "sae_0"], strict=True):
        drawn = np.sort(ax.collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(sae.get.activations(analysed, name).X.toarray().ravel()))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP1", "UMAP2")


def test_feature_umap_of_a_dead_feature_is_grey(analysed):
    analysed.obsm["sae"] = analysed.obsm["sae"].copy()
    analysed.obsm["sae"].data[analysed.obsm["sae"].indices == 1] = 0
    analysed.obsm["sae"].eliminate_zeros()
    panels = sae.pl.feature_umap(analysed, [0, 1])
    assert panels[0].collections[0].get_clim()[1] == pytest.approx(analysed.obsm["sae"].max(axis=0).toarray()[0, 0])
    assert panels[1].collections[0].get_clim() == (0, 1)


def test_feature_umap_takes_any_basis_and_given_axes(analysed):
    _, given = plt.subplots()
    ax = sae.pl.feature_umap(analysed, 1, basis="X_pca", ax=given)
    assert ax is given
    drawn, expected = np.asarray(ax.collections[0].get_offsets()), analysed.obsm["X_pca"][:, :2]
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0), rtol=1e-6)


def test_feature_umap_refuses_one_axes_for_several_features(analysed):
    with pytest.raises(ValueError, match="ax= takes one panel, but features= has 2"):
        sae.pl.feature_umap(analysed, [0, 1], ax=plt.subplots()[1])


def test_titles_are_the_names_with_and_without_name_features(analysed):
    features = sae.get.features(analysed).index.tolist()
    asked = ["sae_9", *features[:5]]
    before = titles(analysed, asked, key="sae", mod=None)
    sae.tl.name_features(analysed)
    names = sae.get.features(analysed)["name"]
    assert before == titles(analysed, asked, key="sae", mod=None) == [f"{name}\n{names[name]}" for name in asked]
    assert all(" · " in title for title in before)


def test_titles_are_the_names_that_are_stored(analysed):
    sae.tl.name_features(analysed, by="genes")
    names = sae.get.features(analysed)["name"]
    assert titles(analysed, ["sae_3"], key="sae", mod=None) == [f"sae_3\n{names['sae_3']}"]
    assert sae.pl.feature_umap(analysed, "sae_3").get_title() == f"sae_3\n{names['sae_3']}"
    ticks = sae.pl.enrichment(analysed).get_xticklabels()
    assert all(
        tick.get_text() == "  ".join([names[tick.get_text().split("  ")[1]], tick.get_text().split("  ")[1]])
        for tick in ticks
    )


def test_title_of_a_feature_of_which_nothing_is_known(encoded):
    assert titles(encoded, ["sae_0", "sae_1"], key="sae", mod=None) == ["sae_0", "sae_1"]
    sae.tl.rank_genes(encoded)
    sae.tl.name_features(encoded, by="label")
    assert titles(encoded, ["sae_0"], key="sae", mod=None) == ["sae_0"]


def test_long_gene_sets_are_cut_unless_they_would_read_the_same():
    term = "antigen processing and presentation of exogenous peptide antigen"
    short = "Antigen processing and presentation of exogenous peptide…"
    assert set_titles(["B cell", f"{term} (GO:0002478)"]) == ["B cell", short]
    via = f"{term} via MHC class II"
    assert set_titles([f"{term} (GO:0002478)", via]) == [term.capitalize(), "A" + via[1:]]


def test_long_labels_are_cut_unless_they_would_read_the_same():
    long = "a very long label of a subtype of cells"
    assert short_labels(["B", long]) == ["B", "a very long label of a…"]
    assert short_labels([long + " 1", long + " 2"]) == [long + " 1", long + " 2"]


def test_history_draws_training_and_held_out_cells(analysed):
    table = sae.get.history(analysed)
    ax = sae.pl.history(analysed, "fvu")
    training, held_out = ax.lines
    np.testing.assert_array_equal(training.get_ydata(), table["fvu"])
    np.testing.assert_array_equal(held_out.get_ydata(), table["val_fvu"])
    assert len(sae.pl.history(analysed)) == 3


def test_history_without_held_out_cells(analysed):
    sae.tl.fit(analysed, n_features=16, steps=5, validation=0)
    assert len(sae.pl.history(analysed, "fvu").lines) == 1
    sae.pl.history(analysed, "val_fvu")


def drawn(ax):
    """Return the features, the gene sets and the score of every dot of an enrichment figure."""
    columns = [tick.get_text().split("  ")[-1] for tick in ax.get_xticklabels()]
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    dots = ax.collections[0]
    assert len(dots.get_offsets()) == len({tuple(place) for place in dots.get_offsets()})
    places = zip(dots.get_offsets(), dots.get_array(), strict=True)
    return columns, rows, {(columns[int(x)], rows[int(y)]): score for (x, y), score in places}


def test_enrichment_draws_a_dot_per_significant_set(analysed):
    columns, rows, found = drawn(sae.pl.enrichment(analysed, n_features=5, n_sets=1))
    table = sae.get.enrichment(analysed, columns, direction="up", max_padj=0.05)
    assert len(columns) == 5
    assert set(rows) == set(set_titles(table.drop_duplicates("feature")["gene_set"].tolist()))
    table = table.assign(row=set_titles(table["gene_set"].tolist()))
    expected = table[table["row"].isin(rows)].set_index(["feature", "row"])["score"].to_dict()
    assert found == pytest.approx(expected)


def test_enrichment_makes_no_rows_of_redundant_sets(analysed):
    b = ["CD79A", "CD79B", "MS4A1", "CD74", "HLA-DRA", "IGJ", "HLA-DPB1"]
    nested = {f"b {n}": b[:n] for n in range(3, 8)}
    sae.tl.enrich(analysed, nested, min_size=3, collection="nested", progress=False)
    settings = {"collection": "nested", "n_features": 30, "n_sets": 3}
    columns, rows, found = drawn(sae.pl.enrichment(analysed, **settings))
    every, more, _ = drawn(sae.pl.enrichment(analysed, redundant=True, **settings))
    assert set(columns) == set(every)
    assert set(rows) < set(more)
    reduced = sae.get.enrichment(
        analysed, columns, collection="nested", direction="up", max_padj=0.05, max_fdr=0.05, redundant=False, n=3
    )
    assert set(rows) == set(set_titles(reduced["gene_set"].unique().tolist()))
    whole = sae.get.enrichment(analysed, columns, collection="nested", direction="up", max_padj=0.05, max_fdr=0.05)
    whole = whole.assign(row=whole["gene_set"].str.capitalize())
    assert set(found) == set(whole.loc[whole["row"].isin(rows), ["feature", "row"]].itertuples(index=False, name=None))
    assert len(found) > len(reduced[reduced["feature"].isin(columns)]), "a dot also where the set is redundant"


def test_enrichment_without_a_significant_set_says_so(analysed):
    with pytest.raises(ValueError, match="None of these features has a gene set with padj"):
        sae.pl.enrichment(analysed, max_padj=1e-300)


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca", mod="rna", n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata, mod="rna")
    genes = mdata.mod["rna"].var_names
    sae.tl.enrich(mdata, {"first": genes[:5].tolist()}, mod="rna", var_mod="rna", min_size=2, progress=False)
    sae.tl.sweep(mdata, {"n_features": [8, 16], "steps": 10}, mod="rna", progress=False)
    assert len(sae.pl.feature_umap(mdata, [0, 1], basis="pca", mod="rna")) == 2
    assert len(sae.pl.history(mdata, "fvu", mod="rna").lines)
    assert sae.pl.enrichment(mdata, max_padj=1, max_fdr=1, mod="rna").get_yticklabels()
    assert len(sae.pl.sweep(mdata, "l0", "fvu", mod="rna").collections)
