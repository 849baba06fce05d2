from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sae
from sae.pl._sweep import _groups

GRID = [
    {"n_features": [12, 16], "k": [2, 4], "steps": 20},
    {"architecture": "vanilla", "l1": [0.5, 2], "n_features": 16, "steps": 20},
]


@pytest.fixture(scope="module")
def _swept(make_adata):
    adata = make_adata(150)
    sae.tl.sweep(adata, GRID, groupby="group", progress=False)
    sae.tl.sweep(adata, GRID, groupby="group", n_seeds=3, progress=False, key_added="seeds")
    sae.tl.sweep(adata, {"n_features": range(8, 17), "steps": 5}, progress=False, key_added="widths")
    sae.tl.sweep(
        adata, {"n_features": 8, "k": [2, 9], "steps": 5, "validation": 0}, progress=False, key_added="all seen"
    )
    return adata


@pytest.fixture
def swept(_swept):
    yield _swept.copy()
    plt.close("all")


def points(ax):
    """The large points, each with its legend label."""
    found = {}
    for dots in ax.collections:
        if hasattr(dots, "get_sizes") and len(dots.get_sizes()) and dots.get_sizes()[0] > 10:
            found |= {tuple(place): dots.get_label() for place in np.asarray(dots.get_offsets()).tolist()}
    return found


def test_a_point_per_run(swept):
    table = sae.get.sweep(swept)
    ax = sae.pl.sweep(swept)
    assert set(points(ax)) == set(table[["l0", "val_fvu"]].itertuples(index=False, name=None))
    assert ax.get_xlabel() == "active features per cell (L0)" and ax.get_ylabel() == "held-out variance unexplained"
    np.testing.assert_allclose(ax.figure.get_size_inches() * 25.4, (85, 76), atol=1)
    assert ax.get_legend() is None


@pytest.mark.parametrize(
    ("x", "y", "steps"),
    [("l0", "val_fvu", "steps-post"), ("l0", "label_auroc", "steps-post"), ("label_auroc", "val_fvu", "steps-pre")],
)
def test_front_is_of_what_is_drawn(swept, x, y, steps):
    table = sae.get.sweep(swept, pareto=(x, y))
    (line,) = sae.pl.sweep(swept, x, y).lines
    expected = table[table["pareto"]].sort_values(x)
    np.testing.assert_array_equal(line.get_xydata(), expected[[x, y]])
    assert line.get_drawstyle() == steps


def test_seeds_are_joined_to_their_mean(swept):
    table = sae.get.sweep(swept, key="seeds")
    means = table.groupby("setting")[["l0", "val_fvu"]].mean()
    ax = sae.pl.sweep(swept, key="seeds")
    np.testing.assert_allclose(sorted(points(ax)), sorted(means.to_numpy().tolist()))
    (lines,) = [dots for dots in ax.collections if hasattr(dots, "get_segments") and dots.get_segments()]
    drawn = np.array(lines.get_segments())
    np.testing.assert_allclose(drawn[:, 0], table[["l0", "val_fvu"]])
    np.testing.assert_allclose(drawn[:, 1], means.loc[table["setting"]])
    on_front = means[table.groupby("setting")["pareto"].first()].sort_values("l0")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), on_front)


@pytest.mark.parametrize("color", ["architecture", "n_features", "k"])
def test_a_colour_per_value_with_a_legend(swept, color):
    table = sae.get.sweep(swept)
    ax = sae.pl.sweep(swept, color=color)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    values = [
        value if isinstance(value, str) else "none" if np.isnan(value) else f"{value:g}" for value in table[color]
    ]
    assert set(labels) == set(values) and len(labels) == len(set(values))
    assert points(ax) == dict(zip(table[["l0", "val_fvu"]].itertuples(index=False, name=None), values, strict=True))
    legend = [handle.get_facecolor()[0].tolist() for handle in ax.get_legend().legend_handles]
    assert len(np.unique(legend, axis=0)) == len(labels)


def test_many_numbers_get_a_colour_bar(swept):
    ax = sae.pl.sweep(swept, color="n_features", key="widths")
    assert ax.get_legend() is None and ax.figure.axes[1].get_ylabel() == "features"
    table = sae.get.sweep(swept, key="widths")
    (dots,) = [dots for dots in ax.collections if dots.get_array() is not None and len(dots.get_array())]
    np.testing.assert_array_equal(np.sort(dots.get_array()), np.sort(table["n_features"]))


def test_settings_without_the_number_are_grey(swept):
    grid = [{"architecture": "vanilla", "l1": np.geomspace(0.1, 5, 9)}, {"architecture": "topk", "k": 3}]
    sae.tl.sweep(swept, [one | {"n_features": 12, "steps": 20} for one in grid], progress=False)
    ax = sae.pl.sweep(swept, color="l1")
    ax.figure.canvas.draw()
    (dots,) = [dots for dots in ax.collections if dots.get_array() is not None and len(dots.get_array())]
    assert len(dots.get_offsets()) == 10
    assert type(dots.norm).__name__ == "LogNorm", "the penalties are 50-fold apart"
    assert [tuple(shade) for shade in dots.get_facecolors()].count((0.5, 0.5, 0.5, 1.0)) == 1


def test_given_axes(swept):
    _, given = plt.subplots()
    assert sae.pl.sweep(swept, ax=given) is given


def test_runs_that_failed_are_left_out(swept):
    table = sae.get.sweep(swept, key="all seen")
    assert table["error"].notna().tolist() == [False, True]
    assert set(points(sae.pl.sweep(swept, y="fvu", key="all seen"))) == {(table["l0"][0], table["fvu"][0])}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"key": "other"}, KeyError, "no sweep 'other'"),
        ({"x": "width"}, KeyError, "no numbers 'width'"),
        ({"y": "architecture"}, KeyError, "no numbers 'architecture'"),
        ({"color": "width"}, KeyError, "has no 'width'"),
        ({"key": "all seen"}, ValueError, "No run has both 'l0' and 'val_fvu'. Were any cells held out"),
    ],
)
def test_bad_input(swept, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.sweep(swept, **settings)


def test_truth_values_are_no_numbers():
    """Also where some settings have none, so that the column holds objects."""
    values = pd.Series([True, False, None], dtype=object)
    assert [label for label, _, _ in _groups(values)] == ["False", "True", "none"]
    assert [label for label, _, _ in _groups(pd.Series([2.0, 0.5, np.nan]))] == ["0.5", "2", "none"]
