from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.quiver import Quiver

import sae

LINEAR = sae.models.Functions(decode=lambda z, data: np.column_stack([z, -z]), genes=[*"abcdefghijkl"], scale="linear")


@pytest.fixture(scope="module")
def _plain(make_adata):
    """Cells that were steered without labels and controls."""
    adata = make_adata(100)
    sae.tl.fit(adata, n_features=8, k=2, steps=50, progress=False)
    sae.tl.encode(adata)
    doses = [0, 0.5, 1, 3]
    sae.tl.steer(adata, [0, 1], model=LINEAR, intervention="add", doses=doses, n_controls=0, progress=False)
    return adata


@pytest.fixture
def plain(_plain):
    return _plain.copy()


def names(ax):
    return [tick.get_text() for tick in ax.get_yticklabels()]


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


# ---- Genes


def test_genes_are_means_over_labels(archived):
    table = sae.get.steering(archived, 0, dose=1)
    n = table["label"].nunique()
    # Only some are stored of each label: the others count as unchanged.
    wide = table.pivot_table(index="gene", columns="label", values="change", observed=True).fillna(0)
    mean = wide.mean(axis=1).sort_values(ascending=False)
    ax = sae.pl.steer(archived, 0, n_genes=4)
    assert wide.shape[1] == n == 10
    assert names(ax) == [*mean.index[:4], *mean.index[-4:]]
    widths = np.array([bar.get_width() for bar in ax.patches])
    np.testing.assert_allclose(widths, mean[names(ax)])
    colors = {bar.get_facecolor() for bar in ax.patches[:4]}, {bar.get_facecolor() for bar in ax.patches[4:]}
    assert [len(part) for part in colors] == [1, 1] and colors[0] != colors[1]
    ticks = [tuple(tick) for tick in ax.lines[0].get_xydata()]
    rows = table[table["gene"].isin(names(ax))]
    assert sorted(ticks) == sorted(
        (change, names(ax).index(gene)) for change, gene in rows[["change", "gene"]].to_numpy()
    )
    assert "at dose 1" in ax.get_xlabel() and ax.get_title(loc="right").startswith("sae_0\n")


def test_a_gene_that_is_not_stored_of_a_label_counts_as_unchanged(archived):
    before = sae.pl.steer(archived, 0)
    table = archived.uns["sae"]["steering"]["genes"]
    gene, label = names(before)[0], table["label"].cat.categories[0]
    row = (table["feature"] == "sae_0") & (table["dose"] == 1) & (table["gene"] == gene) & (table["label"] == label)
    archived.uns["sae"]["steering"]["genes"] = table[~row]
    after = sae.pl.steer(archived, 0, genes=[gene])
    expected = before.patches[0].get_width() - table.loc[row, "change"].item() / 10
    assert after.patches[0].get_width() == pytest.approx(expected)


def test_genes_of_a_label_and_dose(archived):
    table = sae.get.steering(archived, 1, dose=2, label="CD34+").set_index("gene")["change"]
    ax = sae.pl.steer(archived, "sae_1", dose=2, label="CD34+", n_genes=3)
    expected = [*table.index[:3], *table.index[-3:]]
    assert names(ax) == expected
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], table[expected])
    assert "at dose 2" in ax.get_xlabel() and "label" not in ax.get_xlabel()


def test_genes_that_are_asked_for(plain):
    table = sae.get.steering(plain, 0, dose=1).set_index("gene")["change"]
    ax = sae.pl.steer(plain, 0, genes=["b", "a"])
    assert names(ax) == sorted("ab", key=lambda gene: -table[gene])
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], table[names(ax)])


def test_the_dose_is_1_if_there_is_one(plain):
    assert "at dose 1" in sae.pl.steer(plain, 0).get_xlabel()
    sae.tl.steer(plain, 0, model=LINEAR, doses=[0.5, 3, 2], n_controls=0, progress=False)
    assert "at dose 3" in sae.pl.steer(plain, 0).get_xlabel()


# ---- Doses


@pytest.mark.parametrize("measure", ["effect", "distance"])
def test_doses_beside_controls(archived, measure):
    table = sae.get.steering(archived, 0, table="controls")
    table = table[table["measure"] == measure]
    drawn = lines(sae.pl.steer(archived, 0, kind="doses", measure=measure))
    for label, column in (
        ("sae_0", "value"), ("random features, mean", "of_features"), ("random directions, mean", "of_directions"),
    ):  # fmt: skip
        np.testing.assert_allclose(drawn[label].get_xydata(), table[["dose", column]])
    assert ("before" in drawn) == (measure == "distance")


@pytest.mark.parametrize("measure", ["off_manifold", "step"])
def test_doses_of_measures_without_controls(archived, measure):
    table = sae.get.steering(archived, 0, table="doses")
    ax = sae.pl.steer(archived, 0, kind="doses", measure=measure)
    np.testing.assert_allclose(lines(ax)["sae_0"].get_xydata(), table[["dose", measure]])
    assert ax.get_xlabel() == "dose (1 = activation of 2.6)" and ax.get_ylim()[0] == 0
    if measure == "off_manifold":
        assert lines(ax)["before"].get_ydata()[0] == table["off_manifold_before"].iloc[0]


def test_doses_without_controls(plain):
    table = sae.get.steering(plain, 0, table="doses")
    drawn = lines(sae.pl.steer(plain, 0, kind="doses"))
    assert list(drawn) == ["sae_0"]
    np.testing.assert_allclose(drawn["sae_0"].get_xydata(), table[["dose", "effect"]])


def test_genes_over_doses(plain):
    """Where no cell is moved, nothing is stored of any gene: it is unchanged."""
    ax = sae.pl.steer(plain, 0, kind="doses", genes=["a", "g"])
    table = sae.get.steering(plain, 0).pivot_table(index="gene", columns="dose", values="change", observed=True)
    for gene in ("a", "g"):
        np.testing.assert_allclose(lines(ax)[gene].get_xdata(), [0, 0.5, 1, 3])
        np.testing.assert_allclose(lines(ax)[gene].get_ydata(), [0, *table.loc[gene]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "g"]


def test_a_gene_that_is_not_stored_at_a_dose_has_no_point(plain):
    table = plain.uns["sae"]["steering"]["genes"]
    left_out = (table["gene"] == "a") & (table["dose"] == 1)
    plain.uns["sae"]["steering"]["genes"] = table[~left_out]
    y = lines(sae.pl.steer(plain, 0, kind="doses", genes="a"))["a"].get_ydata()
    assert np.isnan(y).tolist() == [False, False, True, False]


def test_factors_are_no_activations(plain):
    sae.tl.steer(plain, 0, model=LINEAR, intervention="scale", doses=[0, 2], n_controls=0, progress=False)
    assert sae.pl.steer(plain, 0, kind="doses").get_xlabel() == "dose"


def test_genes_of_the_same_name_are_told_apart_by_modality(plain):
    """Not added up."""
    table = plain.uns["sae"]["steering"]["genes"]
    twin = table[table["gene"] == "a"].assign(change=100.0, modality="adt")
    both = pd.concat([table.assign(modality="rna"), twin], ignore_index=True)
    plain.uns["sae"]["steering"]["genes"] = both.astype({"modality": "category"})
    assert {"a (rna)", "a (adt)", "b"} <= set(names(sae.pl.steer(plain, 0, n_genes=20)))
    (bar,) = sae.pl.steer(plain, 0, genes=["a (adt)"]).patches
    assert bar.get_width() == 100
    assert lines(sae.pl.steer(plain, 0, kind="doses", genes="a (adt)"))["a (adt)"].get_ydata()[-1] == 100
    assert "a" in names(sae.pl.steer(plain, 0, modality="rna", n_genes=20))


# ---- Labels


def test_labels_beside_controls(archived):
    table = sae.get.steering(archived, 0, table="controls", dose=1)
    table = table[table["measure"] == "label"].sort_values("value", ascending=False)
    ax = sae.pl.steer(archived, 0, kind="labels")
    assert [text.rstrip("…") for text in names(ax)] == [
        full[: len(text.rstrip("…"))] for text, full in zip(names(ax), table["name"], strict=True)
    ]
    drawn = lines(ax)
    for label, column in (
        ("sae_0", "value"), ("random features, mean", "of_features"), ("random directions, mean", "of_directions"),
    ):  # fmt: skip
        np.testing.assert_allclose(drawn[label].get_xdata(), table[column])
        np.testing.assert_array_equal(drawn[label].get_ydata(), np.arange(10))


def test_labels_of_the_cells_of_one(archived):
    table = sae.get.steering(archived, 0, table="labels", dose=2, label="CD34+")
    table = table.sort_values("difference", ascending=False)
    ax = sae.pl.steer(archived, 0, kind="labels", label="CD34+", dose=2)
    (dots,) = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots.get_xdata(), table["difference"])
    assert ax.get_legend() is None and "(CD34+, dose 2)" in ax.get_xlabel()


# ---- Arrows


def test_arrows_are_those_of_the_table(archived):
    table = sae.get.steering_arrows(archived, "X_pca_ablated", 0)
    ax = sae.pl.steer(archived, 0, kind="arrows", key_added="X_pca_ablated")
    drawn = [part for part in ax.collections if isinstance(part, Quiver)]
    far = table["off_manifold"] > 0.5
    factors = []
    for quiver, part in zip(drawn, (table[~far], table[far]), strict=True):
        np.testing.assert_allclose(np.column_stack([quiver.X, quiver.Y]), part[["x", "y"]])
        np.testing.assert_allclose(quiver.U / part["dx"], quiver.V / part["dy"])
        factors += (quiver.U / part["dx"]).tolist()
    np.testing.assert_allclose(factors, factors[0])
    side = np.ptp(archived.obsm["X_umap"], axis=0).max() / 20
    longest = np.hypot(table["dx"], table["dy"]).max()
    assert factors[0] * longest == pytest.approx(2.5 * side, rel=1e-5)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [f"shift × {factors[0]:.2g}", f"shift × {factors[0]:.2g}, mostly off the manifold"]
    assert tuple(drawn[0].get_facecolor()[0]) == (0, 0, 0, 1) and tuple(drawn[1].get_facecolor()[0]) == (1, 1, 1, 1)


def test_arrows_are_never_longer_than_the_shift(plain):
    sae.tl.steer(
        plain, 0, model=LINEAR, intervention="add", doses=[0.2], n_controls=0, key_added="X_new", progress=False
    )
    table = sae.get.steering_arrows(plain, "X_new", basis="pca", n_grid=4)
    ax = sae.pl.steer(plain, 0, kind="arrows", key_added="X_new", basis="pca", n_grid=4)
    (quiver,) = [part for part in ax.collections if isinstance(part, Quiver)]
    np.testing.assert_allclose(quiver.U, table["dx"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["shift"]


def test_arrows_where_some_cells_have_no_place(archived):
    archived.obsm["X_umap"][:5] = np.nan
    (arrows, *_) = [
        part
        for part in sae.pl.steer(archived, 0, kind="arrows", key_added="X_pca_ablated").collections
        if isinstance(part, Quiver)
    ]
    table = sae.get.steering_arrows(archived, "X_pca_ablated", 0)
    side = np.ptp(archived.obsm["X_umap"][5:], axis=0).max() / 20
    near = table[table["off_manifold"] <= 0.5]
    factor = 2.5 * side / np.hypot(table["dx"], table["dy"]).max()
    np.testing.assert_allclose(arrows.U, factor * near["dx"], rtol=1e-5)


def test_arrows_lie_on_the_cells(archived):
    ax = sae.pl.steer(archived, 0, kind="arrows", key_added="X_pca_ablated", basis="X_umap")
    cells = ax.collections[0]
    activation = sae.get.activations(archived, 0).X.toarray().ravel()
    order = np.argsort(activation, kind="stable")
    np.testing.assert_allclose(cells.get_array(), activation[order])
    np.testing.assert_allclose(cells.get_offsets(), archived.obsm["X_umap"][order], rtol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP1", "UMAP2")


# ---- All


@pytest.mark.parametrize("kind", ["genes", "doses", "labels", "arrows"])
def test_given_axes(archived, kind):
    figure, (given, other) = plt.subplots(1, 2)
    ax = sae.pl.steer(archived, 0, kind=kind, key_added="X_pca_ablated", ax=given)
    assert ax is given and not other.has_data() and plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("kind", ["genes", "doses", "labels", "arrows"])
def test_a_column_wide_and_nothing_cut(archived, kind):
    ax = sae.pl.steer(archived, 0, kind=kind, key_added="X_pca_ablated")
    figure = ax.figure
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == pytest.approx(3.35)
    box, page = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.02 and box.y0 >= -0.02 and box.x1 <= page[0] + 0.02 and box.y1 <= page[1] + 0.02


def test_mudata(make_mudata):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", n_features=8, k=2, steps=20, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.steer(
        mdata, 0, model=LINEAR, doses=[2], groupby="group", n_controls=2, key_added="X_new", mod="rna", progress=False
    )
    for kind in ("genes", "doses", "labels", "arrows"):
        sae.pl.steer(mdata, 0, kind=kind, key_added="X_new", basis="pca", n_grid=4, mod="rna")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kind": "genres"}, ValueError, "kind='genres' is not one of 'genes', 'doses'"),
        ({"kind": "doses", "measure": "size"}, ValueError, "measure='size' is not one of 'effect'"),
        ({"kind": "arrows"}, ValueError, "Run sae.tl.steer\\(..., key_added='X_steered'\\)"),
        ({"kind": "arrows", "key_added": "X_new"}, KeyError, "no 'X_new'"),
        ({"kind": "arrows", "key_added": "X_few", "basis": "pca"}, ValueError, "No square holds three moved cells"),
        ({"kind": "labels"}, ValueError, "steered without labels. Run sae.tl.steer with groupby="),
        ({"feature": [0, 1]}, ValueError, "are 2 features"),
        ({"feature": "sae_7"}, KeyError, "sae_7 was not steered; sae_0, sae_1 were"),
        ({"dose": 7}, KeyError, "not steered at dose=7; it was at 0.0, 0.5"),
        ({"n_genes": 0}, ValueError, "n_genes=0 is below 1"),
        ({"dose": 0}, ValueError, "No gene changes at dose 0 of sae_0"),
        ({"genes": ["a", "z"]}, KeyError, "'z' is not among the 12 genes stored of sae_0 at dose 1"),
        ({"kind": "doses", "genes": ["z"]}, KeyError, "'z' is not among"),
        ({"label": "T"}, KeyError, "no results for the label 'T'"),
        ({"key": "other"}, KeyError, "no SAE 'other'"),
    ],
)
def test_bad_input(plain, settings, error, message):
    plain.obsm["X_few"] = plain.obsm["X_pca"].copy()
    plain.obsm["X_few"][0] += sae.get.decoder(plain).loc["sae_0"].to_numpy()
    with pytest.raises(error, match=message):
        sae.pl.steer(plain, **{"feature": 0} | settings)
    assert plt.get_fignums() == []


def test_labels_without_controls(plain):
    sae.tl.steer(plain, 0, model=LINEAR, groupby="group", n_controls=0, progress=False)
    with pytest.raises(ValueError, match="without controls. Pass label="):
        sae.pl.steer(plain, 0, kind="labels")
    assert len(names(sae.pl.steer(plain, 0, kind="labels", label="a"))) == 3
