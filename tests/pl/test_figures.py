from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sae
from sae.pl._titles import WIDTH, shorten, titles


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_feature_umap_draws_a_titled_panel_per_feature(analysed):
    axes = sae.pl.feature_umap(analysed, ["sae_3", 0])
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["sae_3", "sae_0"]
    for ax, name in zip(axes, ["sae_3", "sae_0"], strict=True):
        drawn = np.sort(ax.collections[0].get_array())
        np.testing.assert_allclose(drawn, np.sort(sae.get.activations(analysed, name).X.toarray().ravel()))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP1", "UMAP2")


def test_feature_umap_takes_any_basis_and_given_axes(analysed):
    _, given = plt.subplots()
    ax = sae.pl.feature_umap(analysed, 1, basis="X_pca", ax=given)
    assert ax is given
    drawn, expected = np.asarray(ax.collections[0].get_offsets()), analysed.obsm["X_pca"][:, :2]
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0), rtol=1e-6)


def test_titles_prefer_gene_sets_over_labels(analysed):
    names = sae.get.features(analysed).index.tolist()
    sets = sae.get.enrichment(analysed, direction="up", max_padj=0.05, n=1).set_index("feature")["gene_set"]
    labels = sae.get.labels(analysed, max_padj=0.05).query("auroc > 0.5").drop_duplicates("feature")
    labels = labels.set_index("feature")["label"]
    for name, title in zip(names, titles(analysed, names, key="sae", mod=None), strict=True):
        meaning = sets.get(name, labels.get(name))
        assert title == (name if meaning is None else f"{name}\n{shorten(meaning)}")


def test_title_names_no_label_that_the_feature_is_rarer_in(analysed):
    stored = {name: value for name, value in analysed.uns["sae"].items() if name != "enrichment"}
    stored["labels"] = stored["labels"].assign(auroc=0.2, padj=1e-9)
    analysed.uns["sae"] = stored
    assert titles(analysed, ["sae_0", "sae_1"], key="sae", mod=None) == ["sae_0", "sae_1"]
    stored["labels"] = stored["labels"].assign(auroc=0.8)
    assert all("\n" in title for title in titles(analysed, ["sae_0", "sae_1"], key="sae", mod=None))


def test_long_names_are_cut_at_a_word():
    name = "positive regulation of transcription by RNA polymerase II (GO:0045944)"
    assert len(shorten(name)) <= WIDTH
    assert shorten(name).endswith("...")
    assert shorten("B cell") == "B cell"
    assert shorten("oxygen transport (GO:0015671)") == "oxygen transport"


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


def test_enrichment_draws_a_dot_per_significant_set(analysed):
    ax = sae.pl.enrichment(analysed, n_features=5, n_sets=1)
    columns = [tick.get_text() for tick in ax.get_xticklabels()]
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    table = sae.get.enrichment(analysed, columns, direction="up", max_padj=0.05)
    table = table[table["gene_set"].map(shorten).isin(rows)]
    dots = ax.collections[0]
    assert len(dots.get_offsets()) == len(table)
    expected = {
        (columns.index(f), rows.index(shorten(s))): score
        for f, s, score in table[["feature", "gene_set", "score"]].values
    }
    found = {(int(x), int(y)): value for (x, y), value in zip(dots.get_offsets(), dots.get_array(), strict=True)}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[key] for key in expected], list(expected.values()))


def test_enrichment_without_a_significant_set_says_so(analysed):
    with pytest.raises(ValueError, match="None of these features has a gene set with padj"):
        sae.pl.enrichment(analysed, max_padj=1e-300)
