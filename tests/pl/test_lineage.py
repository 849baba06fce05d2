from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sae

ORDER = ["G1", "S", "G2M"]


def test_lines_are_the_means_and_bands_the_intervals(archived):
    table = sae.get.by_label(archived, ["sae_1", 0], "phase", order=ORDER)
    ax = sae.pl.lineage(archived, ["sae_1", 0], "phase", order=ORDER)
    assert [text.get_text().split("  ")[0] for text in ax.get_legend().get_texts()] == ["sae_1", "sae_0"]
    for line, band, name in zip(ax.lines, ax.collections, ["sae_1", "sae_0"], strict=True):
        rows = table[table["feature"] == name]
        np.testing.assert_array_equal(line.get_xydata(), rows[["position", "mean"]])
        corners = set(map(tuple, band.get_paths()[0].vertices))
        assert {
            *zip(rows["position"], rows["ci_low"], strict=True),
            *zip(rows["position"], rows["ci_high"], strict=True),
        } <= corners
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ORDER
    assert ax.get_ylim()[0] == 0 and ax.get_ylabel() == "mean activation\n(95 % interval)"


def test_ordered_categories_need_no_order(archived):
    archived.obs["stage"] = pd.Categorical(archived.obs["phase"].astype(str), categories=ORDER, ordered=True)
    assert [tick.get_text() for tick in sae.pl.lineage(archived, 0, "stage").get_xticklabels()] == ORDER


def test_along_numbers(archived):
    archived.obs["pseudo_time"] = archived.obsm["X_pca"][:, 0].astype(np.float64)
    table = sae.get.by_label(archived, 0, "pseudo_time", n_bins=6)
    ax = sae.pl.lineage(archived, 0, "pseudo_time", n_bins=6)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), table["position"])
    assert ax.get_xlabel() == "pseudo time"
    assert all(tick.get_text() not in list(table["label"]) for tick in ax.get_xticklabels())


def test_relative_to_the_highest_mean(archived):
    plain = sae.pl.lineage(archived, [0, 1, "sae_23"], "phase", order=ORDER)
    ax = sae.pl.lineage(archived, [0, 1, "sae_23"], "phase", order=ORDER, relative=True)
    for line, before in zip(ax.lines[:2], plain.lines[:2], strict=True):
        np.testing.assert_allclose(line.get_ydata(), before.get_ydata() / before.get_ydata().max())
    assert (ax.lines[2].get_ydata() == 0).all(), "it is dead"
    assert ax.get_ylabel().startswith("activation, of its highest")


def test_donors(archived):
    archived.obs["donor"] = [f"d{i % 4}" for i in range(archived.n_obs)]
    table = sae.get.by_label(archived, 0, "phase", order=ORDER, donor="donor")
    ax = sae.pl.lineage(archived, 0, "phase", order=ORDER, donor="donor")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), table["mean"])
    assert "over donors" in ax.get_ylabel()


def test_wide_intervals_do_not_flatten_the_means(archived):
    order = ["CD34+", "CD19+ B", "CD4+/CD45RA+/CD25- Naive T"]
    table = sae.get.by_label(archived, "sae_19", "bulk_labels", order=order)
    assert table["ci_high"].max() > 2 * table["mean"].max(), "a label of two cells"
    assert sae.pl.lineage(archived, "sae_19", "bulk_labels", order=order).get_ylim()[1] == 2 * table["mean"].max()


def test_a_dead_feature_alone(archived):
    assert sae.pl.lineage(archived, "sae_23", "phase", order=ORDER).get_ylim() == (0, 1)


@pytest.mark.parametrize(("n", "angle"), [(4, 0), (8, 45), (20, 90)])
def test_labels_do_not_overlap(archived, n, angle):
    archived.obs["step"] = [f"step {i % n:02}" if angle else f"{i % n}" for i in range(archived.n_obs)]
    ax = sae.pl.lineage(archived, 0, "step", order=sorted(archived.obs["step"].unique()))
    ax.figure.draw_without_rendering()
    ticks = ax.get_xticklabels()
    assert len(ticks) == n and {tick.get_rotation() for tick in ticks} == {angle}
    if angle != 45:
        boxes = [tick.get_window_extent() for tick in ticks]
        # Extents are rounded to whole pixels, by matplotlib 3.10 to one more.
        assert all(left.x1 < right.x0 + 1 for left, right in zip(boxes, boxes[1:], strict=False))
    tight = ax.figure.get_tightbbox()
    assert tight.x0 > -0.02 and tight.x1 < ax.figure.get_size_inches()[0] + 0.02, "nothing is cut off"


def test_many_lines_differ(archived):
    ax = sae.pl.lineage(archived, None, "phase", order=ORDER)
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 24


def test_given_axes(archived):
    _, (given, other) = plt.subplots(1, 2)
    assert sae.pl.lineage(archived, 0, "phase", order=ORDER, ax=given) is given
    assert not other.has_data()


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_joint", n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata)
    assert len(sae.pl.lineage(mdata, [0, 1], "group", order=["c", "a", "b"]).lines) == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "'phase' has labels without an order: 'G1', 'G2M', 'S'. Pass them in their order as order="),
        ({"order": ["G1"]}, ValueError, "'phase' has only one label or bin, 'G1'; a line needs two"),
        ({"order": ["G1", "G0"]}, ValueError, "labels that no cell has: 'G0'"),
        ({"groupby": "time"}, KeyError, "no column 'time'"),
        ({"features": 99}, KeyError, "no feature 99"),
    ],
)
def test_refuses(archived, settings, error, message):
    with pytest.raises(error, match=message):
        sae.pl.lineage(archived, **{"features": 0, "groupby": "phase", **settings})
