from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.cluster.hierarchy import linkage

import sae


def drawn(ax):
    """The matrix in the picture, by feature and label."""
    rows = [tick.get_text().split("  ")[-1] for tick in ax.get_yticklabels()]
    columns = [tick.get_text() for tick in ax.get_xticklabels()]
    return pd.DataFrame(ax.images[0].get_array(), index=rows, columns=columns)


def marks(ax):
    """The feature of every mark, by scope."""
    rows = drawn(ax).index
    lines = [
        line
        for child in ax.child_axes
        for line in child.lines
        if line.get_label() in ("local", "regional", "global", "dead")
    ]
    return {line.get_label(): set(rows[line.get_ydata()]) for line in lines}


def forks(ax):
    """The lines of the trees: of the labels (above) and of the features (beside)."""
    return [
        np.array(child.collections[0].get_segments())
        for child in ax.child_axes
        if child.collections
        and not child.images
        and len(child.collections[0].get_paths())
        and not child.get_xlabel()
        and child.axison is False
    ]


@pytest.mark.parametrize("metric", ["auroc", "held_out_auroc", "f1", "held_out_f1"])
def test_matrix_is_the_scores(archived, metric):
    matrix = sae.get.label_matrix(archived, "phase", metric=metric)
    found = drawn(sae.pl.labels(archived, "phase", metric=metric, n_features=9))
    assert found.shape == (9, 3)
    np.testing.assert_array_equal(found, matrix.loc[found.index, found.columns])


def test_differences_are_parts_of_the_largest(archived):
    matrix = sae.get.label_matrix(archived, "phase", metric="difference")
    found = drawn(sae.pl.labels(archived, "phase", metric="difference", features=None, n_features=24))
    assert (found.abs().max(axis=1).drop("sae_23") == 1).all() and (found.loc["sae_23"] == 0).all()
    ratio = matrix.loc[found.index, found.columns].div(found).drop("sae_23")
    np.testing.assert_allclose(ratio.std(axis=1), 0, atol=1e-9)


def test_features_that_tell_labels_are_chosen(archived):
    matrix = sae.get.label_matrix(archived, "bulk_labels")
    found = drawn(sae.pl.labels(archived, "bulk_labels", n_features=10))
    assert set(matrix.idxmax()) <= set(found.index)
    archived.uns["sae"]["features"].loc["sae_19", "dead"] = True
    ax = sae.pl.labels(archived, "bulk_labels", n_features=22)
    assert set(matrix.index) - set(drawn(ax).index) == {"sae_19", "sae_23"}, "the dead ones"


def test_scopes_are_marked(archived):
    scope = sae.get.features(archived)["bulk_labels_scope"].astype(str)
    ax = sae.pl.labels(archived, "bulk_labels", features=None, n_features=24)
    assert marks(ax) == {name: set(scope.index[scope == name]) for name in scope.unique()}
    assert {text.get_text() for text in ax.get_legend().get_texts()} == set(scope)
    shapes = {(line.get_marker(), line.get_fillstyle()) for child in ax.child_axes for line in child.lines}
    assert {("o", "full"), ("o", "left"), ("o", "none"), ("x", "none")} <= shapes, "not by colour alone"


def test_trees_join_what_is_similar(archived):
    ax = sae.pl.labels(archived, "bulk_labels")
    found = drawn(ax)
    above, beside = forks(ax)
    assert len(above) == found.shape[1] - 1 and len(beside) == found.shape[0] - 1
    for lines, values in ((above, found.T), (beside[..., ::-1], found)):
        heights = np.sort(lines[:, 1, 1])
        np.testing.assert_allclose(heights, np.sort(linkage(values, "average")[:, 2]))
        # Two leaves that are joined first are neighbours, and their fork stands over them.
        first = lines[lines[:, 1, 1].argmin()]
        one, other = sorted((first[0, 0], first[3, 0]))
        assert other - one == 1 and one == int(one)
        np.testing.assert_allclose(first[1, 1], np.linalg.norm(values.iloc[int(one)] - values.iloc[int(other)]))


def test_trees_stand_where_the_matrix_is(archived):
    ax = sae.pl.labels(archived, "bulk_labels")
    ax.figure.draw_without_rendering()
    box = ax.get_window_extent()
    for child in ax.child_axes:
        other = child.get_window_extent()
        assert not box.overlaps(other) or box.intersection(box, other).width * box.intersection(box, other).height < 1
    tight = ax.figure.get_tightbbox()
    assert tight.x0 > -0.02 and tight.y0 > -0.02
    assert (np.array([tight.x1, tight.y1]) < ax.figure.get_size_inches() + 0.02).all(), "nothing is cut off"


def test_given_order_without_trees(archived):
    asked = ["sae_5", "sae_23", "sae_1"]
    ax = sae.pl.labels(archived, "phase", features=asked, dendrogram=False)
    assert drawn(ax).index.tolist() == asked and drawn(ax).columns.tolist() == ["G1", "G2M", "S"]
    assert forks(ax) == []
    assert marks(ax)["dead"] == {"sae_23"}


def test_one_feature(archived):
    assert drawn(sae.pl.labels(archived, "phase", features="sae_3")).index.tolist() == ["sae_3"]


def test_labels_without_held_out_scores_are_grey(archived):
    table = archived.uns["sae"]["labels"]
    table.loc[table["label"] == "S", "held_out_auroc"] = np.nan
    ax = sae.pl.labels(archived, "phase", metric="held_out_auroc")
    found = drawn(ax)
    assert np.ma.getmaskarray(ax.images[0].get_array())[:, found.columns.get_loc("S")].all()
    assert ax.images[0].cmap.get_bad()[:3] == pytest.approx((0.82,) * 3)


def test_given_axes(archived):
    _, (given, other) = plt.subplots(1, 2, layout="constrained")
    assert sae.pl.labels(archived, "phase", ax=given) is given
    assert not other.has_data() and len(given.figure.axes) == 2


def test_only_column(encoded):
    sae.tl.score_labels(encoded, "phase")
    assert drawn(sae.pl.labels(encoded)).shape == (20, 3)
    with pytest.raises(KeyError, match="no results for the groupby 'bulk_labels'"):
        sae.pl.labels(encoded, "bulk_labels")


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, "X_pca", mod="rna", n_features=8, steps=30, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.score_labels(mdata, "group", mod="rna")
    assert drawn(sae.pl.labels(mdata, mod="rna")).shape == (8, 3)


def test_no_features(archived):
    with pytest.raises(ValueError, match="n_features=0 is below 1"):
        sae.pl.labels(archived, "phase", n_features=0)
