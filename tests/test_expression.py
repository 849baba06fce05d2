from __future__ import annotations

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sae._data import Holder
from sae._expression import expression, log1p_base
from sae.core.rows import dense_rows

LAYOUTS = {"dense": np.asarray, "csr": sparse.csr_matrix}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def values(n=30, d=4, *, seed=0):
    return np.random.default_rng(seed).poisson(1, size=(n, d)).astype(np.float32)


def read(matrix, *, uns=None, layer=None, **how):
    """Expression of an AnnData with this matrix as X or as a layer."""
    cells = pd.DataFrame(index=[f"cell-{i}" for i in range(matrix.shape[0])])
    genes = pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])])
    if layer is None:
        adata = ad.AnnData(matrix, obs=cells, var=genes, uns=uns)
    else:
        adata = ad.AnnData(obs=cells, var=genes, uns=uns, layers={layer: matrix})
    return expression(adata, Holder(adata, "adata"), layer=layer, **how)[0]


LOG = np.log1p(values())
WITH_SEVEN = np.where(np.eye(30, 4, k=-4) * [0, 0, 1, 0], 7, values() % 3)
"""Small counts, and a 7 of the third gene."""


@each_layout
@pytest.mark.parametrize(
    ("matrix", "uns", "scale", "base"),
    [
        pytest.param(LOG, {"log1p": {"base": None}}, "log1p", np.e, id="natural"),
        pytest.param(LOG, {"log1p": {}}, "log1p", np.e, id="natural, read from a file"),
        pytest.param(LOG, {"log1p": {"base": 2}}, "log1p", 2.0, id="base 2"),
        pytest.param(LOG, {}, "log1p", np.e, id="not recorded"),
        pytest.param(np.append(LOG, [[49.9] * 4], axis=0), {}, "log1p", np.e, id="just possible"),
        pytest.param(np.append(LOG, [[50] * 4], axis=0), {}, "linear", None, id="too large"),
        pytest.param(np.append(LOG, [[50] * 4], axis=0), {"log1p": {"base": 2}}, "linear", None, id="values beat the record"),
        pytest.param(values(), {}, "counts", None, id="whole floats"),
        pytest.param(values().astype(np.int64), {"log1p": {}}, "counts", None, id="integers"),
        pytest.param(values() * 100, {}, "counts", None, id="large integers"),
        pytest.param(np.zeros((3, 2)), {}, "counts", None, id="zeros"),
        pytest.param(np.append(values(), [[0, 0, 0, 0.5]], axis=0), {}, "log1p", np.e, id="one fraction"),
        pytest.param(np.append(values(9000), [[0, 0, 0, 0.5]], axis=0), {}, "log1p", np.e, id="fraction in the last of many cells"),
        pytest.param(LOG - 0.1, {"log1p": {}}, "scaled", np.nan, id="negative"),
        pytest.param(100 * (LOG - 0.1), {}, "scaled", np.nan, id="negative and large"),
        pytest.param(-values(), {}, "scaled", np.nan, id="negative integers"),
    ],
)  # fmt: skip
def test_scale_is_recognised_from_the_values(layout, matrix, uns, scale, base):
    found = read(layout(matrix), uns=uns)
    assert found.scale == scale
    np.testing.assert_equal(found.log_base, base)


@each_layout
def test_no_cells_are_refused(layout):
    with pytest.raises(ValueError, match="adata.X has no cells: there is nothing to compare"):
        read(layout(np.zeros((0, 2))))


@each_layout
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        pytest.param(LOG, "", id="log1p"),
        pytest.param(
            WITH_SEVEN,
            "adata.X holds integers, probably counts (up to 7, of 'g2'): features that follow the library size",
            id="counts",
        ),
        pytest.param(
            WITH_SEVEN * 33.3,
            "adata.X is not log-transformed: it has values up to 233, of 'g2', and no logarithm of a count reaches 50. "
            "Fold changes are ratios of plain means.",
            id="linear",
        ),
        pytest.param(
            -WITH_SEVEN / 3,
            "adata.X looks scaled: it has negative values (down to -2.33, of 'g2'). There are no fold changes of such "
            "values: log2fc is NaN. Pass layer= with",
            id="scaled",
        ),
    ],
)
def test_what_is_not_log_normalised_is_said_once_with_how_it_was_seen(layout, matrix, message, log):
    read(layout(matrix))
    assert message in log()
    assert log().count("WARNING") == (message != "")


def test_base_of_the_logarithm():
    assert log1p_base({}) == log1p_base({"log1p": {}}) == log1p_base({"log1p": {"base": None}}) == np.e
    assert log1p_base({"log1p": {"base": 10}}) == 10


@each_layout
def test_summary_is_that_of_the_cells_that_are_read(layout):
    x = np.log1p(values())
    summary = read(layout(x), layer="log").summary
    np.testing.assert_allclose(summary.mean, x.mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(summary.highest, x.max(axis=0))


def numbered(cells):
    return np.array(cells, dtype=np.float64)[:, None] + [0, 0.5]


def matched(layout, rna_cells, adt_cells, *, bad=()):
    """Expression of a modality, which tells the number of the cell, for the SAE of another, and the rows that it is for."""
    rna, adt = (
        ad.AnnData(layout(numbered(cells)), obs=pd.DataFrame(index=[f"cell-{i}" for i in cells]))
        for cells in (rna_cells, adt_cells)
    )
    adt.X[np.flatnonzero(np.isin(adt_cells, bad)), 0] = np.nan
    adt.var_names = ["a", "b"]
    mdata = mudata.MuData({"rna": rna, "adt": adt})
    found, rows = expression(mdata, Holder(mdata["rna"], "mdata.mod['rna']"), layer=None, var_mod="adt")
    return found, rows, mdata["adt"].X


@each_layout
def test_cells_of_another_modality_are_matched_by_name(layout):
    found, rows, _ = matched(layout, [3, 1, 4, 15, 9], [9, 2, 6, 3, 1])
    np.testing.assert_array_equal(rows, [4, 0, 1])
    np.testing.assert_array_equal(dense_rows(found.matrix, slice(0, 3)), numbered([9, 3, 1]))
    assert found.summary.highest.tolist() == [9, 9.5]


@each_layout
def test_the_same_cells_are_not_copied(layout):
    found, rows, x = matched(layout, [3, 1, 4], [4, 3, 1])
    np.testing.assert_array_equal(rows, [2, 0, 1])
    assert found.matrix is x if layout is np.asarray else np.shares_memory(found.matrix.data, x.data)


def test_a_model_is_given_the_cells_that_have_both_a_latent_and_the_other_modality():
    class Model:
        def decode(self, z, data):
            np.testing.assert_array_equal(z, numbered([int(name.split("-")[1]) for name in data.obs_names])[:, :1])
            prediction = ad.AnnData(np.hstack([z, z + 0.25, z * np.nan]))
            prediction.uns["log1p"] = {"base": 2}
            return prediction

    rna, adt = (ad.AnnData(numbered(cells)) for cells in ([3, 1, 4, 15, 9], [9, 2, 6, 3, 1]))
    rna.obs_names, adt.obs_names = (["cell-" + str(int(x)) for x in adata.X[:, 0]] for adata in (rna, adt))
    adt.var_names = ["a", "b"]
    mdata = mudata.MuData({"rna": rna, "adt": adt})
    where, latent = Holder(mdata["rna"], "mdata.mod['rna']"), rna.X[:, :1]
    found, rows = expression(mdata, where, layer=None, var_mod="adt", model=Model(), latent=latent)
    np.testing.assert_array_equal(rows, [4, 0, 1])
    assert found.genes.tolist() == ["0", "1"]
    assert found.matrix.shape == (3, 2)
    np.testing.assert_array_equal(dense_rows(found.matrix, slice(1, 3)), [[3, 3.25], [1, 1.25]])
    assert (found.where, found.scale, found.log_base) == ("the prediction of Model", "log1p", 2)


def test_rows_of_bad_values_are_those_of_the_matrix_and_not_of_the_matched_cells():
    with pytest.raises(
        ValueError, match=r"mdata\.mod\['adt'\]\.X has 1 NaN or infinite values in 1 of 4 rows \(rows 3\)"
    ):
        matched(np.asarray, [3, 1], [2, 5, 1, 3], bad=[3])
    matched(np.asarray, [3, 1], [2, 5, 1, 3], bad=[5])
