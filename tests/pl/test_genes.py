from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text

import sae
from sae.pl._genes import _apart


def points(ax):
    """Every triangle or dot: x, y, and the marker's face."""
    return [
        (x, y, tuple(np.round(dots.get_facecolor()[0], 3)))
        for dots in ax.collections
        if hasattr(dots, "get_sizes") and len(dots.get_offsets())
        for x, y in np.asarray(dots.get_offsets())
    ]


def boxes(ax):
    """The boxes of the names in the picture."""
    ax.figure.draw_without_rendering()
    names = [text for text in ax.texts if isinstance(text, Annotation)] or ax.get_yticklabels()
    return {text.get_text(): Text.get_window_extent(text) for text in names}


def apart(found):
    every = list(found.values())
    return not any(a.overlaps(b) for i, a in enumerate(every) for b in every[:i])


def test_rank_draws_the_best_of_both_directions(archived):
    ax = sae.pl.genes(archived, "sae_0", n_genes=6)
    up = sae.get.genes(archived, "sae_0", direction="up", n=6)
    down = sae.get.genes(archived, "sae_0", direction="down", n=6)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [*up["gene"], *down["gene"][::-1]]
    by_row = dict(zip(ax.get_yticks(), [*up["score"], *down["score"][::-1]], strict=True))
    assert {y: x for x, y, _ in points(ax)} == by_row
    assert ax.get_title().split("\n") == ["sae_0", sae.get.features(archived)["name"]["sae_0"]]
    assert apart(boxes(ax))


@pytest.mark.parametrize("direction", ["up", "down"])
def test_rank_of_one_direction(archived, direction):
    ax = sae.pl.genes(archived, 0, direction=direction, n_genes=4)
    genes = sae.get.genes(archived, 0, direction=direction, n=4)["gene"].tolist()
    assert [tick.get_text() for tick in ax.get_yticklabels()] == (genes if direction == "up" else genes[::-1])


def test_rank_draws_hollow_what_is_not_significant(archived):
    table = sae.get.genes(archived, "sae_12")
    ax = sae.pl.genes(archived, "sae_12", n_genes=40)
    hollow = {x for x, _, face in points(ax) if face == (1, 1, 1, 1)}
    assert 0 < len(hollow) < len(table) and hollow == set(table["score"][table["padj"] > 0.05])
    assert "hollow: padj > 0.05" in ax.get_xlabel()
    assert "hollow" not in sae.pl.genes(archived, "sae_7", n_genes=5).get_xlabel()


def test_volcano_draws_all_that_is_stored_and_says_how_many(archived):
    table = sae.get.genes(archived, "sae_12")
    ax = sae.pl.genes(archived, "sae_12", kind="volcano", n_genes=5)
    drawn = {(x, y) for x, y, _ in points(ax)}
    assert drawn == set(zip(table["log2fc"], -np.log10(table["padj"]), strict=True))
    n_up, n_down = (table["score"] > 0).sum(), (table["score"] < 0).sum()
    assert ax.get_xlabel() == f"log2 fold change\nshown: best {n_up} up, {n_down} down"
    grey = {x for x, _, face in points(ax) if face[:3] == (0.5, 0.5, 0.5)}
    assert grey == set(table["log2fc"][table["padj"] > 0.05])
    assert (table["padj"][:5] <= 0.05).all() and (table["padj"][-5:] > 0.05).all()
    assert sorted(boxes(ax)) == sorted(table["gene"][:5]), "no names of what is not significant"


@pytest.mark.parametrize("n_genes", [3, 10, 40])
def test_names_in_a_volcano_do_not_overlap_each_other_or_points(archived, n_genes):
    ax = sae.pl.genes(archived, "sae_0", kind="volcano", n_genes=n_genes)
    found = boxes(ax)
    assert 6 <= len(found) <= 2 * n_genes and apart(found)
    inside = ax.get_window_extent()
    at = ax.transData.transform([(x, y) for x, y, _ in points(ax)])
    for box in found.values():
        assert box.y0 >= inside.y0 - 1 and box.y1 <= inside.y1 + 1
        assert not any(box.contains(*place) for place in at)


def test_names_lead_to_their_points(archived):
    table = sae.get.genes(archived, "sae_0").set_index("gene")
    ax = sae.pl.genes(archived, "sae_0", kind="volcano", n_genes=4)
    for text in ax.texts:
        row = table.loc[text.get_text()]
        assert text.xy == pytest.approx((row["log2fc"], -np.log10(row["padj"])))


def test_p_values_of_zero_are_drawn_above_all_others(archived):
    table = archived.uns["sae"]["genes"]
    of_one = table.index[table["feature"] == "sae_0"]
    table.loc[of_one[:3], "padj"] = 0.0
    ax = sae.pl.genes(archived, "sae_0", kind="volcano")
    hollow = [(x, y) for x, y, face in points(ax) if face == (1, 1, 1, 1)]
    others = [y for _, y, face in points(ax) if face != (1, 1, 1, 1)]
    assert sorted(x for x, _ in hollow) == sorted(table.loc[of_one[:3], "log2fc"])
    assert np.isfinite(others).all() and max(others) < min(y for _, y in hollow) < ax.get_ylim()[1]
    assert "hollow: padj rounds to 0" in ax.get_xlabel()
    table.loc[of_one, "padj"] = 0.0
    assert all(y > 300 for _, y, _ in points(sae.pl.genes(archived, "sae_0", kind="volcano")))


def test_infinite_scores_are_drawn_beyond_all_others(archived):
    table = archived.uns["sae"]["genes"]
    of_one = table.index[table["feature"] == "sae_0"]
    second = table.loc[of_one, "score"].nlargest(2).iloc[1]
    table.loc[table.loc[of_one, "score"].idxmax(), "score"] = np.inf
    ax = sae.pl.genes(archived, "sae_0", n_genes=3)
    xs = [x for x, _, _ in points(ax)]
    assert len(xs) == 6 and np.isfinite(xs).all() and max(xs) > second and ax.get_xlim()[1] > max(xs)


def test_several_features_and_one_without_genes(archived):
    axes = sae.pl.genes(archived, ["sae_23", 0])
    assert [ax.get_title().split("\n")[0] for ax in axes] == ["sae_23", "sae_0"]
    assert axes[0].texts[0].get_text() == "no genes are stored"
    assert sae.pl.genes(archived, "sae_23", kind="volcano").texts[0].get_text() == "no genes are stored"


def test_given_axes(archived):
    _, (given, other) = plt.subplots(1, 2)
    for kind in ("rank", "volcano"):
        assert sae.pl.genes(archived, 0, kind=kind, ax=given) is given
    assert not other.has_data()
    with pytest.raises(ValueError, match="ax= takes one panel, but features= has 2"):
        sae.pl.genes(archived, [0, 1], ax=given)


def test_many_names_on_small_axes(archived):
    _, axes = plt.subplots(1, 2, figsize=(4, 2), layout="constrained")
    assert apart(boxes(sae.pl.genes(archived, 0, n_genes=20, ax=axes[0])))
    assert apart(boxes(sae.pl.genes(archived, 0, kind="volcano", n_genes=20, ax=axes[1])))


def test_names_of_two_modalities_are_told_apart(archived):
    table = archived.uns["sae"]["genes"]
    of_one = (table["feature"] == "sae_0").to_numpy()
    archived.uns["sae"]["genes"] = table.assign(
        modality=pd.Categorical(np.where(of_one & (table["score"] > 0), "adt", "rna"))
    )
    ticks = [tick.get_text() for tick in sae.pl.genes(archived, "sae_0", n_genes=2).get_yticklabels()]
    assert [tick.split(" ")[1] for tick in ticks] == ["(adt)", "(adt)", "(rna)", "(rna)"]
    one = sae.pl.genes(archived, "sae_0", n_genes=2, modality="rna").get_yticklabels()
    assert [tick.get_text() for tick in one] == [tick.split(" ")[0] for tick in ticks[2:]]


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca", mod="rna", n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.rank_genes(mdata, mod="rna", min_cells=3, min_expected=0)
    feature = sae.get.genes(mdata, mod="rna")["feature"].iloc[0]
    assert sae.pl.genes(mdata, feature, mod="rna").get_title().startswith(feature)


@pytest.mark.parametrize(
    ("features", "settings", "error", "message"),
    [
        (0, {"kind": "dots"}, ValueError, "kind='dots' is neither 'rank' nor 'volcano'"),
        (0, {"n_genes": 0}, ValueError, "n_genes=0 is too few"),
        (0, {"direction": "both"}, ValueError, "direction='both'"),
        ("sae_99", {}, KeyError, "no feature 'sae_99'"),
        (0, {"modality": "atac"}, KeyError, "no results for the modality 'atac'"),
    ],
)
def test_refuses(archived, features, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.genes(archived, features, **settings)


def test_volcano_needs_fold_changes(archived):
    archived.uns["sae"]["genes"]["log2fc"] = np.nan
    with pytest.raises(ValueError, match="no fold changes: the expression was scaled. Pass kind='rank'"):
        sae.pl.genes(archived, 0, kind="volcano")
    sae.pl.genes(archived, 0)


def test_values_are_moved_apart_as_little_as_needed():
    np.testing.assert_allclose(_apart(np.array([0.2, 0.9, 0.5]), 0.1), [0.2, 0.9, 0.5])
    np.testing.assert_allclose(_apart(np.array([0.5, 0.5]), 0.1), [0.55, 0.45])
    np.testing.assert_allclose(_apart(np.array([0.99, 0.02, 0.98]), 0.1), [0.95, 0.05, 0.85])
    assert len(_apart(np.array([]), 0.1)) == 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = rng.random(9)
        places = _apart(y, 0.11)
        assert (np.diff(np.sort(places)) > 0.11 - 1e-9).all() and places.min() > 0.05 and places.max() < 0.95
        assert (np.argsort(places) == np.argsort(y)).all()
