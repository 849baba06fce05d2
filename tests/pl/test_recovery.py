from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sae

TRUTH = {"programs": "programs", "activity": "activity", "gates": "gates"}


@pytest.fixture(scope="module")
def cells():
    adata = sae.datasets.simulate_small(2_000)
    sae.tl.fit(adata, "X", n_features=6, k=2, steps=300, progress=False)
    sae.tl.encode(adata)
    return adata


@pytest.fixture(scope="module")
def _table(cells):
    return sae.tl.recovery(cells, TRUTH, thresholds=(0.95, 0.8))


@pytest.fixture
def table(_table):
    return _table.copy()


@pytest.fixture(scope="module")
def genes(cells):
    return sae.tl.recovery(cells, TRUTH, use_rep="X", thresholds=(0.8, 0.95))


@pytest.fixture(scope="module")
def groups(cells):
    return sae.tl.recovery(cells, TRUTH, thresholds=(0.95, 0.8), summary=True)


def points(ax, filled):
    """The points of each group or table, by what the legend calls them."""
    found = {}
    for line in ax.lines:
        if line.get_marker() not in ("None", "", None) and len(line.get_xdata()):
            hollow = line.get_markerfacecolor() == "none"
            if hollow != filled:
                found.setdefault((line.get_color(), line.get_marker()), []).extend(line.get_xydata().tolist())
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_a_point_per_variable_at_its_ceiling(table):
    ax = sae.pl.recovery(table)
    for filled, column in ((True, "abs_r"), (False, "matched")):
        drawn = list(points(ax, filled).values())
        assert len(drawn) == 3, "groups differ in colour and marker"
        for part, (_, expected) in zip(drawn, table.groupby("group", sort=False, observed=True), strict=True):
            np.testing.assert_allclose(part, expected[["ceiling", column]])
    diagonal = [line for line in ax.lines if type(line).__name__ == "AxLine"]
    assert len(diagonal) == 1 and diagonal[0].get_slope() == 1


def test_best_and_own_are_joined(table):
    table.loc["0", "matched"] = 0.1
    ax = sae.pl.recovery(table)
    segments = np.concatenate([part.get_segments() for part in ax.collections])
    np.testing.assert_allclose(segments[:, 0], table[["ceiling", "matched"]])
    np.testing.assert_allclose(segments[:, 1], table[["ceiling", "abs_r"]])


def test_numbers_found_and_thresholds(table):
    table.loc["0", "matched"] = 0.1
    ax = sae.pl.recovery(table)
    dotted = [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert dotted == [0.8, 0.95]
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    for text, (group, part) in zip(told, table.groupby("group", sort=False, observed=True), strict=True):
        best, own = (part["abs_r"] > 0.8).sum(), (part["matched"] > 0.8).sum()
        assert text == f"{group}: {best} best, {own} own of {len(part)}"
    assert (table["abs_r"] > 0.8).sum() > (table["matched"] > 0.8).sum() > 0
    assert "|r| > 0.8" in ax.get_legend().get_title().get_text()


@pytest.mark.parametrize("score", ["abs_r", "matched"])
def test_tables_side_by_side(table, genes, score):
    table.loc["0", "matched"] = 0.1
    ax = sae.pl.recovery({"SAE": table, "genes": genes}, score=score)
    names = list(TRUTH)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == names
    for part, source in zip(points(ax, True).values(), (table, genes), strict=True):
        x, y = np.array(part).T
        for place, name in enumerate(names):
            here = np.abs(x - place) < 0.5
            np.testing.assert_allclose(y[here], np.sort(source.loc[source["group"] == name, score]))
            assert (np.diff(x[here]) > 0).all()
    expected = [
        f"{(part[score] > 0.8).sum()}/{len(part)}"
        for source in (table, genes)
        for _, part in source.groupby("group", sort=False, observed=True)
    ]
    assert texts(ax) == expected
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["SAE", "genes", "ceiling, mean"]


def test_means_and_mean_ceilings(table, genes):
    ax = sae.pl.recovery({"SAE": table, "genes": genes})
    level = [line.get_ydata() for line in ax.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
    drawn = {round(float(y[0]), 6) for y in level if len(y) == 2 and y[0] == y[1]}
    for source in (table, genes):
        for _, part in source.groupby("group", observed=True):
            assert {round(part[name].mean(), 6) for name in ("matched", "ceiling")} <= drawn


def test_tables_of_groups(table, groups):
    for score, column in (("abs_r", "mean_abs_r"), ("matched", "matched")):
        ax = sae.pl.recovery(groups, score=score)
        (part,) = points(ax, True).values()
        np.testing.assert_allclose(part, np.column_stack([range(3), groups[column]]))
        name = "n_above_0.8" if score == "abs_r" else "n_matched_above_0.8"
        assert texts(ax) == [f"{n}/{of}" for n, of in groups[[name, "n_variables"]].to_numpy()]


def test_without_a_ceiling(cells):
    ax = sae.pl.recovery(sae.tl.recovery(cells, TRUTH, ceiling=False, thresholds=()))
    assert len(np.concatenate(list(points(ax, True).values()))) == 7
    assert ax.get_legend() is None and texts(ax) == []


def test_thresholds_are_those_of_all_tables(table, cells):
    other = sae.tl.recovery(cells, TRUTH, thresholds=(0.5, 0.95))
    ax = sae.pl.recovery({"a": table, "b": other})
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [0.95]


def test_constant_variables_are_left_out(table):
    numbers = table.select_dtypes("number").columns
    table.loc["1", numbers] = np.nan
    assert sae.pl.recovery(table).get_legend().get_texts()[0].get_text().endswith("of 2")
    with pytest.raises(ValueError, match="has no variable with a score"):
        sae.pl.recovery(table.iloc[[1]])


def test_many_groups_differ_and_nothing_is_cut(table, genes):
    many = pd.concat([table.assign(group=table["group"].astype(str) + f" that is number {i}") for i in range(5)])
    ax = sae.pl.recovery(many)
    assert len(points(ax, True)) == 15, "colour and marker together"
    for ax in (sae.pl.recovery(table), sae.pl.recovery({"SAE of 4,096 features": table, "random directions": genes})):
        ax.figure.canvas.draw()
        box, page = ax.figure.get_tightbbox(), ax.figure.get_size_inches()
        assert page[0] == pytest.approx(3.35)
        assert box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= page[0] + 0.02 and box.y1 <= page[1] + 0.02


def test_given_axes(table, genes):
    figure, (given, other) = plt.subplots(1, 2)
    assert sae.pl.recovery(table, ax=given) is given
    assert not other.has_data()
    assert sae.pl.recovery({"SAE": table, "genes": genes}, ax=other) is other
    assert plt.get_fignums() == [figure.number]


def test_the_table_stays_as_it_is(table, _table):
    sae.pl.recovery(table)
    sae.pl.recovery({"SAE": table, "again": table})
    pd.testing.assert_frame_equal(table, _table)


def test_bad_input(table, groups):
    for given, error, message in (
        ([table], TypeError, "Expected a table of sae.tl.recovery, or a dict of them, got list"),
        ({}, ValueError, "empty dict"),
        (pd.DataFrame({"a": [1]}), ValueError, "The table has no 'group'"),
        ({"genes": table.drop(columns="abs_r")}, ValueError, "The table 'genes' has no 'abs_r'"),
        ({"a": table, "b": groups}, ValueError, "Pass one kind"),
    ):
        with pytest.raises(error, match=message):
            sae.pl.recovery(given)
    with pytest.raises(ValueError, match="score='r' is not one of 'abs_r', 'matched'"):
        sae.pl.recovery(table, score="r")
    assert plt.get_fignums() == []
