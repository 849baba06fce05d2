from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb

import sae
from sae.pl._feature_map import HUES, LIGHT_GREY, N_MODULES, N_VALUES


@pytest.fixture
def mapped(archived):
    sae.tl.feature_map(archived, n_neighbors=5)
    return archived


def dots(ax):
    """The place, colour and area of every dot that is drawn."""
    found = []
    for points in ax.collections:
        places = np.asarray(points.get_offsets())
        colors = np.broadcast_to(points.get_facecolors(), (len(places), 4)) if len(places) else []
        sizes = np.broadcast_to(points.get_sizes(), len(places)) if len(places) else []
        found += [
            (*place, to_hex(color), size) for place, color, size in zip(places.tolist(), colors, sizes, strict=True)
        ]
    return pd.DataFrame(found, columns=["map_x", "map_y", "color", "area"])


def drawn(ax, data):
    """The colour and area of every feature."""
    ax.figure.canvas.draw()
    table = sae.get.features(data)[["map_x", "map_y"]].dropna().reset_index(names="feature")
    found = dots(ax)
    assert len(found) == len(table), "every feature once"
    return table.merge(found, on=["map_x", "map_y"]).set_index("feature")


def legend(ax):
    """The texts of the legend of the colours, each with its colour."""
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    return dict(
        zip(texts, [to_hex(handle.get_facecolor()[0]) for handle in ax.get_legend().legend_handles], strict=True)
    )


def size_key(ax):
    (key,) = [artist for artist in ax.artists if hasattr(artist, "get_texts")]
    return [text.get_text() for text in key.get_texts()]


def test_modules_have_a_colour_a_number_and_a_name(mapped):
    ax = sae.pl.feature_map(mapped)
    found, module = drawn(ax, mapped), sae.get.features(mapped)["module"].dropna().astype(str)
    table = sae.get.modules(mapped, n=1)
    for i, row in enumerate(table.itertuples()):
        of_module = module.index[module == row.module]
        assert set(found.loc[of_module, "color"]) == {to_hex(HUES[i])}
    lines = list(legend(ax))
    assert len(lines) == len(table)
    for line, row in zip(lines, table.itertuples(), strict=True):
        assert line.startswith(f"{row.module}  ({row.n_features})  {row.labels}"[:20])
    numbers = {text.get_text(): text.xy for text in ax.texts}
    assert sorted(numbers) == sorted(table["module"])
    for name, place in numbers.items():
        at = found[(found["map_x"] == place[0]) & (found["map_y"] == place[1])].index
        assert module[at].tolist() == [name], "the number is at a feature of the module"


def test_areas_grow_with_the_density(mapped):
    features = sae.get.features(mapped)
    for size, texts in (("density", [f"{100 * features['density'].max():.2g} %"]), ("mean", ["mean activation"])):
        ax = sae.pl.feature_map(mapped, size=size)
        found = drawn(ax, mapped)
        order = features.loc[found.index, size].rank()
        assert found["area"].rank().corr(order) > 0.999
        assert found["area"].max() / found["area"].min() > 4
        assert set(texts) <= set(size_key(ax))
        for points in ax.collections:
            assert (np.diff(points.get_sizes()) <= 0).all(), "small dots are on top of large ones"
    equal = sae.pl.feature_map(mapped, size=None)
    assert drawn(equal, mapped)["area"].nunique() == 1 and not equal.artists


def test_best_labels(mapped):
    ax = sae.pl.feature_map(mapped, groupby="bulk_labels")
    found, shown = drawn(ax, mapped), legend(ax)
    labels = sae.get.features(mapped).loc[found.index, "bulk_labels_label"].astype(str)
    assert set(shown) == set(labels)
    assert found["color"].tolist() == [shown[label] for label in labels]
    assert ax.get_legend().get_title().get_text() == "best bulk_labels"
    with pytest.raises(ValueError, match="Labels of several columns were scored"):
        sae.pl.feature_map(mapped, color="label")


def test_numbers_have_a_colour_bar(mapped):
    ax = sae.pl.feature_map(mapped, color="max", size=None)
    features = sae.get.features(mapped)
    (points,) = [points for points in ax.collections if len(points.get_offsets())]
    values = pd.Series(np.asarray(points.get_array()), points.get_offsets()[:, 0])
    np.testing.assert_array_equal(values[features["map_x"].dropna()], features.loc[~features["dead"], "max"])
    assert ax.figure.axes[1].get_ylabel() == "max" and ax.get_legend() is None


def test_numbers_of_two_signs_and_missing_ones(mapped):
    features = mapped.uns["sae"]["features"]
    features["change"] = np.linspace(-1, 3, len(features))
    features.loc["sae_0", "change"] = np.nan
    ax = sae.pl.feature_map(mapped, color="change", size=None)
    found = drawn(ax, mapped)
    assert found.loc["sae_0", "color"] == to_hex(LIGHT_GREY) and list(legend(ax)) == ["none"]
    (points,) = [points for points in ax.collections if len(points.get_offsets())]
    limit = features.loc[found.index, "change"].max()
    assert points.get_clim() == (-limit, limit)
    lowest, highest = (to_rgb(found["color"].loc[name]) for name in ("sae_1", found.index[-1]))
    assert lowest[2] > lowest[0] and highest[0] > highest[2], "blue is down, red is up"


def test_many_values_and_missing_ones_are_grey(mapped):
    features = mapped.uns["sae"]["features"]
    live = features.index[~features["dead"]]
    values = [f"value {i:02d}" for i in range(len(live))]
    values[:6] = ["value 00"] * 3 + ["value 01"] * 2 + [None]
    features["kind"] = pd.Categorical(pd.Series(values, live).reindex(features.index))
    ax = sae.pl.feature_map(mapped, color="kind")
    found, shown = drawn(ax, mapped), legend(ax)
    n_rest = len(set(values) - {None}) - N_VALUES
    assert n_rest > 1 and list(shown)[-2:] == [f"{n_rest} others", "none"]
    assert {"value 00", "value 01"} <= set(shown)
    assert set(found.loc[live[:3], "color"]) == {shown["value 00"]}
    assert found.loc[live[5], "color"] == to_hex(LIGHT_GREY) == shown["none"]


def test_dead_or_not_is_a_category(mapped):
    assert list(legend(sae.pl.feature_map(mapped, color="dead"))) == ["False"]


def test_features_with_a_term_are_marked(mapped):
    with_term = sae.get.term_features(mapped, "b cell")["feature"].tolist()
    ax = sae.pl.feature_map(mapped, term="b cell")
    found = drawn(ax, mapped)
    assert 0 < len(with_term) < len(found)
    assert set(found.index[found["color"] != to_hex(LIGHT_GREY)]) == set(with_term)
    assert f"gene sets with “b cell”: {len(with_term)} of {len(found)} features" in legend(ax)
    assert "gene sets with “ferritin”: 0 of" in next(iter(legend(sae.pl.feature_map(mapped, term="ferritin"))))


def test_marked_features_that_are_not_on_the_map_are_counted(mapped):
    feature = sae.get.term_features(mapped, "b cell")["feature"].iloc[0]
    mapped.uns["sae"]["features"].loc[feature, ["map_x", "map_y", "module"]] = np.nan
    assert next(iter(legend(sae.pl.feature_map(mapped, term="b cell")))).endswith(" features, 1 not on the map")


def test_parent_terms(mapped):
    sets = sae.get.enrichment(mapped)["gene_set"].astype(str).unique()
    kind = {name: "myeloid" if "onocyte" in name or "endritic" in name else "lymphoid" for name in sets}
    parents = pd.DataFrame({"term": kind.keys(), "parent": kind.values()})
    parents = pd.concat([parents, pd.DataFrame({"term": ["myeloid", "lymphoid"], "parent": "top"})])
    expected = sae.get.parent_terms(mapped, parents)["name"].astype(object)
    ax = sae.pl.feature_map(mapped, parents=parents)
    found, shown = drawn(ax, mapped), legend(ax)
    named = expected[found.index].map(str.capitalize, na_action="ignore").fillna("none")
    assert found["color"].tolist() == [shown[name] for name in named]
    assert {"Myeloid", "Lymphoid"} <= set(shown)


def test_many_modules(mapped):
    features = mapped.uns["sae"]["features"]
    live = features.index[~features["dead"]]
    n = len(live)
    assert n > N_MODULES
    features["module"] = pd.Categorical(
        pd.Series([str(i) for i in range(n)], live).reindex(features.index)
    ).set_categories([str(i) for i in range(n)])
    ax = sae.pl.feature_map(mapped)
    found = drawn(ax, mapped)
    assert found["color"].nunique() == N_MODULES + 1
    assert (found["color"] == to_hex(LIGHT_GREY)).sum() == n - N_MODULES
    assert list(legend(ax))[-1] == f"and {n - 10} smaller ones" and len(ax.texts) == N_MODULES


def test_nothing_is_cut_off_or_overlaps(mapped):
    for settings in ({}, {"groupby": "bulk_labels"}, {"term": "b cell"}, {"color": "max"}):
        ax = sae.pl.feature_map(mapped, **settings)
        figure = ax.figure
        figure.canvas.draw()
        assert figure.get_size_inches()[0] * 25.4 == pytest.approx(85, abs=1)
        boxes = [artist.get_window_extent() for artist in [*ax.artists, ax.get_legend(), ax.xaxis.label] if artist]
        for box in boxes:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_given_axes_keep_their_figure(mapped):
    figure, (given, other) = plt.subplots(1, 2, figsize=(7, 3))
    plt.sca(other)
    assert sae.pl.feature_map(mapped, ax=given) is given
    assert len(dots(given)) == 23 and not other.collections
    assert figure.get_size_inches().tolist() == [7, 3]


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca", mod="rna", n_features=12, steps=50, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.feature_map(mdata, mod="rna")
    table = sae.get.features(mdata, mod="rna")
    assert len(dots(sae.pl.feature_map(mdata, mod="rna"))) == table["map_x"].notna().sum()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"color": "width"}, KeyError, "features have no 'width'; they have 'n_cells'"),
        ({"size": "width"}, KeyError, "no column of numbers 'width'; there are 'n_cells', 'density'"),
        ({"size": "module"}, KeyError, "no column of numbers 'module'"),
        ({"color": "max", "term": "b cell"}, ValueError, "color= and term= were given"),
        ({"groupby": "louvain"}, KeyError, "groupby 'louvain'"),
        ({"collection": "go"}, KeyError, "collection 'go'"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
    ],
)
def test_bad_input(mapped, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.feature_map(mapped, **settings)


def test_without_a_map(encoded):
    with pytest.raises(KeyError, match=r"Run sae.tl.feature_map"):
        sae.pl.feature_map(encoded)


def test_all_features_dead(mapped):
    mapped.obsm["sae"].data[:] = 0
    mapped.obsm["sae"].eliminate_zeros()
    sae.tl.feature_map(mapped)
    with pytest.raises(ValueError, match="No feature is on the map"):
        sae.pl.feature_map(mapped)
