from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sae._data import holder
from sae._design import codes, design, indicators

ALL = slice(None)
N = 6


@pytest.fixture
def held():
    obs = pd.DataFrame(
        {
            "size": np.array([10, 20, 30, 40, 50, 60], dtype=np.float32),
            "count": np.arange(N),
            "flag": [True, False, True, True, False, False],
            "nullable": pd.array([5, 6, 7, 8, 9, 10], dtype="Int64"),
            "batch": ["b", "a", "b", "c", "a", "a"],
            "stage": pd.Categorical(list("xyxyzz"), categories=list("zyxw")),
            "numbered": pd.Categorical([3, 1, 3, 1, 1, 3]),
            "same": "only",
            "gap": ["b", None, "b", "c", None, "a"],
            "hole": [1.0, np.nan, 2, 3, 4, 5],
            "endless": [1.0, np.inf, 2, 3, -np.inf, 5],
        },
        index=[f"cell{i}" for i in range(N)],
    )
    return holder(ad.AnnData(np.zeros((N, 2)), obs=obs), None)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([], np.empty((N, 0))),
        (["size"], [[10], [20], [30], [40], [50], [60]]),
        (["count"], np.arange(N)[:, None]),
        (["nullable"], np.arange(5, 11)[:, None]),
        (["flag"], [[1], [0], [1], [1], [0], [0]]),
        (["batch"], [[0, 0], [1, 0], [0, 0], [0, 1], [1, 0], [1, 0]]),
        (["stage"], [[0, 0], [1, 0], [0, 0], [1, 0], [0, 1], [0, 1]]),
        (["numbered"], [[0], [1], [0], [1], [1], [0]]),
        (["same"], np.empty((N, 0))),
        (["count", "flag"], [[0, 1], [1, 0], [2, 1], [3, 1], [4, 0], [5, 0]]),
    ],
    ids=str,
)
def test_design(held, columns, expected):
    found = design(held, columns, ALL)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


def test_design_of_some_cells(held):
    """Of which only the categories that they have are told apart."""
    rows = np.array([4, 0, 2])
    np.testing.assert_array_equal(design(held, ["count", "batch"], rows), [[4, 0], [0, 1], [2, 1]])
    np.testing.assert_array_equal(design(held, ["gap"], np.array([0, 2, 3])), [[0], [0], [1]])
    assert design(held, [], rows).shape == (3, 0)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("batch", [0, 1, 0, 2, 1, 1]),
        ("stage", [0, 1, 0, 1, 2, 2]),
        ("count", np.arange(N)),
        ("flag", [0, 1, 0, 0, 1, 1]),
        ("same", np.zeros(N)),
    ],
)
def test_codes(held, column, expected):
    np.testing.assert_array_equal(codes(held, column, ALL, "batch"), expected)


def test_codes_of_some_cells_leave_no_gap(held):
    np.testing.assert_array_equal(codes(held, "gap", np.array([3, 5, 3]), "batch"), [0, 1, 0])


def test_indicators():
    np.testing.assert_array_equal(indicators(np.array([2, 0, 1])), [[0, 1], [0, 0], [1, 0]])


BOTH = {"codes": lambda held, column: codes(held, column, ALL, "batch"), "design": lambda h, c: design(h, [c], ALL)}
each_reader = pytest.mark.parametrize("read", BOTH.values(), ids=BOTH)


@each_reader
def test_missing_column(held, read):
    with pytest.raises(KeyError, match=r"adata\.obs has no column 'donor'; it has 'size', .*Pass one of them in \w+="):
        read(held, "donor")


@each_reader
def test_missing_values(held, read):
    with pytest.raises(ValueError, match=r"adata\.obs\['gap'\] is missing for 2 of the 6 cells\. Fill it in"):
        read(held, "gap")


@each_reader
def test_too_many_categories(read):
    obs = pd.DataFrame({"name": [f"n{i}" for i in range(1001)]}, index=[f"cell{i}" for i in range(1001)])
    with pytest.raises(
        ValueError, match=r"adata\.obs\['name'\] has 1001 different values; categories can be up to 1000"
    ):
        read(holder(ad.AnnData(np.zeros((1001, 1)), obs=obs), None), "name")


def test_too_few_values(held):
    with pytest.raises(
        ValueError,
        match=r"adata\.obs\['batch'\] has 2 different values \('b', 'c'\) among the 2 cells; donor= needs 3",
    ):
        codes(held, "batch", np.array([0, 3]), "donor", least=3)
    assert len(codes(held, "batch", ALL, "donor", least=3)) == N


def test_continuous_codes(held):
    with pytest.raises(ValueError, match=r"adata\.obs\['size'\] is continuous \(float32\)\. Pass a column of names"):
        codes(held, "size", ALL, "batch")


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ("batch", TypeError, r"covariates='batch' is a string; expected a list of columns: \['batch'\]"),
        (["hole"], ValueError, r"adata\.obs\['hole'\] is missing for 1 of the 6 cells"),
        (["endless"], ValueError, r"adata\.obs\['endless'\] has 2 infinite values"),
    ],
    ids=str,
)
def test_bad_covariates(held, columns, error, message):
    with pytest.raises(error, match=message):
        design(held, columns, ALL)
