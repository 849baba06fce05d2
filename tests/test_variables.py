from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from sae._data import holder
from sae._variables import variables


@pytest.fixture
def adata(make_adata):
    adata = make_adata(30)
    adata.obs["number"] = np.arange(30)
    adata.obs["flag"] = adata.obs["number"] > 3
    adata.obs["text"] = np.where(adata.obs["flag"], "x", "y").astype(object)
    return adata


def read(adata, asked):
    return variables(holder(adata, None), asked, "truth")


def test_everything_in_one_mapping(adata):
    table = pd.DataFrame({"one": np.arange(30.0), "kind": list("ab") * 15}, index=adata.obs_names)[::-1]
    found = read(adata, {"pcs": "X_pca", "n": adata.obs["number"], "cells": "group", "mixed": table})
    assert found.group.tolist() == ["pcs"] * 6 + ["n"] + ["cells"] * 3 + ["mixed"] * 3
    assert found.name.tolist() == [
        *(f"pcs_{i}" for i in range(6)), "number", "a", "b", "c", "one", "kind: a", "kind: b"
    ]  # fmt: skip
    assert found.label.tolist() == [False] * 7 + [True] * 3 + [False, True, True]
    np.testing.assert_array_equal(found.values[:, :6], adata.obsm["X_pca"])
    np.testing.assert_array_equal(found.values[:, 6], np.arange(30))
    np.testing.assert_array_equal(found.values[:, 7], adata.obs["group"] == "a")
    # The rows of a table are matched by name.
    np.testing.assert_array_equal(found.values[:, 10], np.arange(30))
    np.testing.assert_array_equal(found.values[:, 11], np.arange(30) % 2 == 0)


@pytest.mark.parametrize(
    ("asked", "names", "label"),
    [
        pytest.param("number", ["number"], False, id="number"),
        pytest.param("flag", ["flag"], False, id="boolean"),
        pytest.param("text", ["x", "y"], True, id="strings"),
        pytest.param(["number", "text"], ["number", "x", "y"], None, id="several"),
        pytest.param(np.arange(30), ["truth"], False, id="vector"),
        pytest.param(np.eye(30)[:, :2], ["truth_0", "truth_1"], False, id="array"),
        pytest.param(sparse.eye(30).tocsc()[:, :2], ["truth_0", "truth_1"], False, id="sparse"),
        pytest.param([np.arange(30), np.eye(30)[:, :2]], ["truth_0", "truth_1_0", "truth_1_1"], False, id="arrays"),
        pytest.param(torch.arange(30), ["truth"], False, id="tensor"),
    ],
)
def test_what_can_be_passed(adata, asked, names, label):
    found = read(adata, asked)
    assert found.name.tolist() == names
    assert found.values.shape == (30, len(names))
    if label is not None:
        assert found.label.tolist() == [label] * len(names)


def test_unused_categories_are_no_labels(adata):
    assert read(adata[adata.obs["group"] != "b"].copy(), "group").name.tolist() == ["a", "c"]


def missing(adata):
    adata.obs["group"] = adata.obs["group"].where(adata.obs["group"] != "b")
    return "group"


def nan(adata):
    adata.obs["number"] = adata.obs["number"].where(adata.obs["flag"])
    return "number"


def both(adata):
    adata.obsm["number"] = np.ones((30, 1))
    return "number"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        pytest.param(
            lambda _: "none", KeyError, "truth= 'none' is neither in adata.obs, which has 'group'", id="unknown"
        ),
        pytest.param(lambda _: {"a": "none"}, KeyError, r"truth\['a'\] 'none' is neither", id="unknown in a group"),
        pytest.param(lambda _: [], ValueError, "truth= is empty", id="empty"),
        pytest.param(both, ValueError, "'number' is in adata.obs and in adata.obsm", id="ambiguous"),
        pytest.param(
            missing, ValueError, r"adata.obs\['group'\] is missing, NaN or infinite for \d+ of the 30", id="label"
        ),
        pytest.param(nan, ValueError, r"adata.obs\['number'\] is missing, NaN or infinite for 4 of the 30", id="nan"),
        pytest.param(
            lambda _: np.ones((4, 2)), ValueError, r"truth= has the shape \(4, 2\); expected a row", id="rows"
        ),
        pytest.param(lambda _: np.ones((30, 0)), ValueError, r"has the shape \(30, 0\)", id="no columns"),
        pytest.param(lambda _: np.ones((30, 2, 2)), TypeError, r"of shape \(30, 2, 2\); expected numbers", id="cube"),
        pytest.param(lambda _: np.array(["a"] * 30), TypeError, "is an array of <U1", id="array of strings"),
        pytest.param(lambda _: pd.Categorical(["a"] * 30), TypeError, "is an array of object", id="categorical"),
        pytest.param(
            lambda adata: pd.DataFrame({"a": [1.0]}, index=adata.obs_names[:1]),
            ValueError,
            "truth= has no rows for 29 of the 30 cells",
            id="table of other cells",
        ),
        pytest.param(
            lambda adata: pd.DataFrame({"a": range(31)}, index=[*adata.obs_names, adata.obs_names[0]]),
            ValueError,
            "names of cells occur more than once",
            id="repeated names",
        ),
        pytest.param(
            lambda adata: pd.Series([f"cell {i}" for i in range(30)] * 1, index=adata.obs_names).astype("category"),
            None,
            None,
            id="many labels are fine",
        ),
    ],
)
def test_bad_input(adata, asked, error, message):
    asked = asked(adata)
    if error is None:
        assert len(read(adata, asked).name) == 30
        return
    with pytest.raises(error, match=message):
        read(adata, asked)


def test_too_many_labels(adata, monkeypatch):
    monkeypatch.setattr("sae._variables.MAX_LABELS", 2)
    with pytest.raises(
        ValueError, match=r"adata.obs\['group'\] has 3 different values in 'group'; labels can be up to 2"
    ):
        read(adata, "group")
