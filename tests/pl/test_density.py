from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sae


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_bars_are_the_features(archived):
    table = sae.get.features(archived)
    ax = sae.pl.density(archived)
    heights = [bar.get_height() for bar in ax.patches]
    edges = [bar.get_x() for bar in ax.patches] + [100]
    percent = 100 * table["density"][~table["dead"]]
    np.testing.assert_array_equal(heights, np.histogram(percent, edges)[0])
    assert sum(heights) == (~table["dead"]).sum() == 23
    assert ax.get_xscale() == "log" and ax.get_xlim() == pytest.approx((1, 100))
    (median,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert median.get_xdata()[0] == pytest.approx(percent.median())
    assert texts(ax) == [f"median {percent.median():.0f} %", "1 of 24 dead"]


def test_scopes_are_stacked(archived):
    scope = sae.get.features(archived)["bulk_labels_scope"]
    whole = sae.pl.density(archived, bins=8)
    ax = sae.pl.density(archived, groupby="bulk_labels", bins=8)
    by_scope = {bars.get_label().split()[0]: [bar.get_height() for bar in bars] for bars in ax.containers}
    assert {name: sum(heights) for name, heights in by_scope.items()} == {
        name: (scope == name).sum() for name in ("local", "regional", "global")
    }
    np.testing.assert_array_equal(np.sum(list(by_scope.values()), axis=0), [bar.get_height() for bar in whole.patches])
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    np.testing.assert_array_equal(tops, [bar.get_height() for bar in whole.patches])
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 3, "not by colour alone"


def test_features_that_no_labelled_cell_has_are_told(archived):
    table = archived.uns["sae"]["features"]
    table.loc["sae_0", "bulk_labels_scope"] = "dead"
    assert "in no labelled cell (1)" in texts(sae.pl.density(archived, groupby="bulk_labels"))


def test_features_that_are_active_everywhere(archived):
    archived.uns["sae"]["features"][["density", "dead"]] = [1.0, False]
    ax = sae.pl.density(archived)
    assert sum(bar.get_height() for bar in ax.patches) == 24 and ax.get_xlim() == pytest.approx((10, 100))


def test_given_axes(archived):
    _, (given, other) = plt.subplots(1, 2)
    assert sae.pl.density(archived, ax=given) is given
    assert not other.has_data()


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca", mod="rna", n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata, mod="rna")
    alive = (~sae.get.features(mdata, mod="rna")["dead"]).sum()
    assert sum(bar.get_height() for bar in sae.pl.density(mdata, mod="rna").patches) == alive


def test_refuses(archived):
    with pytest.raises(
        KeyError, match=r"no scopes for 'louvain'; there are for 'bulk_labels', 'phase'. Run sae.tl.score"
    ):
        sae.pl.density(archived, groupby="louvain")
    with pytest.raises(ValueError, match="bins=0 is below 1"):
        sae.pl.density(archived, bins=0)
    archived.uns["sae"]["features"] = archived.uns["sae"]["features"].assign(dead=True)
    with pytest.raises(ValueError, match="All 24 features are dead"):
        sae.pl.density(archived)
    assert isinstance(archived.uns["sae"]["features"], pd.DataFrame)
