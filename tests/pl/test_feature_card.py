from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

import sae
from sae.pl._titles import set_titles

ALL = ["umap", "numbers", "histogram", "stability", "genes", "labels", "enrichment"]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def names(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def overlap(one, other):
    a, b = (ax.get_tightbbox() for ax in (one, other))
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 2 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2


def test_all_panels_on_one_page(archived):
    panels = sae.pl.feature_card(archived, 0)
    assert list(panels) == ALL
    figure = panels["umap"].get_figure(root=True)
    figure.canvas.draw()
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= page[0] + 0.02 and box.y1 <= page[1] + 0.02
    for name in ALL:
        assert not any(overlap(panels[name], panels[other]) for other in ALL if other != name), name
    name = sae.get.features(archived)["name"]["sae_0"]
    assert figure.get_suptitle() == f"sae_0  {name}"


def test_umap_and_histogram_show_the_activations(archived):
    panels = sae.pl.feature_card(archived, "sae_3")
    activation = sae.get.activations(archived, 3).X.toarray().ravel()
    np.testing.assert_allclose(np.sort(panels["umap"].collections[0].get_array()), np.sort(activation))
    bars = panels["histogram"].patches
    counts, _ = np.histogram(activation[activation > 0], len(bars))
    assert [bar.get_height() for bar in bars] == counts.tolist()
    assert panels["histogram"].get_title() == f"active in {(activation > 0).sum()} of 350 cells"


def test_genes_labels_and_sets_are_the_best_ones(archived):
    panels = sae.pl.feature_card(archived, 0, n_genes=3, n_labels=4, n_sets=2, groupby="phase")
    best = {side: sae.get.genes(archived, 0, direction=side, n=3)["gene"].tolist() for side in ("up", "down")}
    assert names(panels["genes"]) == [*best["up"], *reversed(best["down"])]
    table = sae.get.labels(archived, 0, groupby="phase", n=4)
    assert names(panels["labels"]) == table["label"].tolist() and panels["labels"].get_title() == "phase"
    np.testing.assert_allclose(panels["labels"].lines[0].get_xdata(), table["auroc"])
    table = sae.get.enrichment(archived, 0, max_padj=0.05, redundant=False, n=2)
    arrows = {"up": "▲", "down": "▼"}
    titled = zip(table["direction"], set_titles(table["gene_set"].tolist()), strict=True)
    assert texts(panels["enrichment"]) == [f"{arrows[side]} {title}" for side, title in titled]
    np.testing.assert_allclose([bar.get_width() for bar in panels["enrichment"].patches], -np.log10(table["padj"]))


def test_nested_sets_are_told_once(archived):
    genes = sae.get.genes(archived, 2, direction="up", n=8)["gene"].tolist()
    nested = {f"top {n}": genes[:n] for n in (4, 6, 8)}
    sae.tl.enrich(archived, nested, min_size=3, collection="nested", progress=False)
    found = {
        wanted: sae.get.enrichment(archived, 2, collection="nested", max_padj=0.05, redundant=wanted)
        for wanted in (True, False)
    }
    assert len(found[False]) < len(found[True])
    panels = sae.pl.feature_card(archived, 2, collection="nested")
    assert [text[2:] for text in texts(panels["enrichment"])] == set_titles(found[False]["gene_set"].tolist())


def test_labels_are_of_the_first_column_that_was_scored(archived):
    assert sae.pl.feature_card(archived, 0)["labels"].get_title() == "bulk_labels"


def test_stability_beside_all_features_and_random_cells(archived):
    columns = ["stability", "stability_best", "stability_activation", "stability_found"]
    ax = sae.pl.feature_card(archived, 2)["stability"]
    summary = sae.get.stability(archived).set_index("source")
    drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
    np.testing.assert_allclose(drawn["this feature"], sae.get.features(archived).loc["sae_2", columns].astype(float))
    np.testing.assert_allclose(drawn["all features"], summary.loc["sae", columns].astype(float))
    np.testing.assert_allclose(drawn["random cells"], summary.loc["cells", columns].astype(float))


def test_numbers_with_the_evidence_of_the_name(archived):
    row = sae.get.features(archived).loc["sae_0"]
    lines = texts(sae.pl.feature_card(archived, 0)["numbers"])
    found = dict(zip(lines[::2], lines[1::2], strict=True))
    assert found["active in"] == f"{row['n_cells']} cells ({100 * row['density']:.2g} %)"
    assert (
        found["activation"] == f"mean {row['mean'] * 350 / row['n_cells']:.3g} where active, highest {row['max']:.3g}"
    )
    assert found["named"] == f"by {row['name_from']}"
    assert found["label"] == f"{row['name_label']} (held-out AUROC {row['name_label_auroc']:.2f})"
    assert f"(padj {row['name_gene_set_padj']:.1g})" in found["gene set"]
    assert found["genes"].startswith(row["name_genes"].split(";")[0])


def test_similar_features_once_there_is_a_map(archived):
    stored = archived.uns["sae"]
    without = archived.copy()
    without.uns["sae"] = {name: value for name, value in stored.items() if name != "feature_map"}
    assert "similar" not in texts(sae.pl.feature_card(without, 0)["numbers"])
    lines = texts(sae.pl.feature_card(archived, 0)["numbers"])
    table = sae.get.neighbors(archived, 0, n=3)
    start = lines.index("similar")
    assert lines[start::2] == ["similar", *[""] * (len(table) - 1)]
    for text, (_, other, value) in zip(lines[start + 1 :: 2], table.to_numpy(), strict=True):
        assert text.startswith(f"{other} ({value:.2f}) ")
    assert lines[lines.index("module") + 1] == sae.get.features(archived)["module"]["sae_0"]


def test_what_is_not_stored_is_left_out(encoded):
    assert list(sae.pl.feature_card(encoded, 0)) == ["umap", "numbers", "histogram"]
    del encoded.obsm["X_umap"]
    panels = sae.pl.feature_card(encoded, 0)
    assert list(panels) == ["numbers", "histogram"]
    sae.tl.score_labels(encoded, "phase")
    panels = sae.pl.feature_card(encoded, 0)
    assert list(panels) == ["numbers", "histogram", "labels"]
    last, page = panels["labels"].figure.bbox.width, panels["labels"].get_figure(root=True).bbox.width
    assert last == pytest.approx(page, rel=0.02), "the last one takes the room of two"


def test_a_dead_feature_has_only_numbers(archived):
    table = sae.get.features(archived)
    dead = table.index[table["dead"]][0]
    panels = sae.pl.feature_card(archived, dead)
    assert list(panels) == ["numbers"]
    assert texts(panels["numbers"]) == ["active in", "none of 350 cells (dead)"]


def test_on_given_figures(archived):
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    left, right = figure.subfigures(1, 2)
    panels = sae.pl.feature_card(archived, 0, fig=left)
    others = sae.pl.feature_card(archived, 1, fig=right)
    figure.canvas.draw()
    middle = figure.bbox.width / 2
    assert all(ax.get_window_extent().x1 <= middle for ax in panels.values())
    assert all(ax.get_window_extent().x0 >= middle for ax in others.values())
    assert left.get_suptitle().startswith("sae_0") and right.get_suptitle().startswith("sae_1")
    whole = plt.figure()
    assert all(ax.get_figure(root=True) is whole for ax in sae.pl.feature_card(archived, 0, fig=whole).values())
    assert plt.get_fignums() == [figure.number, whole.number]


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", n_features=8, k=2, steps=20, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.rank_genes(mdata, mod="rna", var_mod="adt")
    sae.tl.score_labels(mdata, "group", mod="rna")
    panels = sae.pl.feature_card(mdata, 0, basis="pca", modality="adt", mod="rna")
    assert list(panels) == ["umap", "numbers", "histogram", "genes", "labels"]


def test_the_object_stays_as_it_is(archived, compare):
    before = compare.state(archived)
    sae.pl.feature_card(archived, 0)
    compare.assert_same(before, compare.state(archived))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"feature": [0, 1]}, ValueError, "are 2 features; a card is of one"),
        ({"feature": "sae_99"}, KeyError, "no feature 'sae_99'"),
        ({"basis": "tsne"}, KeyError, "no 'tsne'"),
        ({"groupby": "donor"}, KeyError, "no results for the groupby 'donor'"),
        ({"collection": "GO"}, KeyError, "no results for the collection 'GO'"),
        ({"modality": "rna"}, KeyError, "no results for the modality 'rna'"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
    ],
)
def test_bad_input(archived, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.feature_card(archived, **{"feature": 0} | settings)
    assert plt.get_fignums() == []
