from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from sae.models._reading import cells_in, genes_in, refuse_fractions

ABC = pd.Index(["a", "b", "c"])


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        ("abc", "abc", [0, 1, 2]),
        ("cab", "abc", [1, 2, 0]),
        ("ac", "abc", [0, -1, 1]),
        ("ca", "abc", [1, -1, 0]),
        ("aac", "aabc", [0, 1, -1, 2]),
        ("abc", "aab", [0, 0, 1]),
        ("", "ab", [-1, -1]),
        ("abc", "", []),
    ],
)
def test_cells_in(names, wanted, expected):
    found = cells_in(pd.Index(list(names), dtype=object), pd.Index(list(wanted), dtype=object), "there")
    np.testing.assert_array_equal(found, expected)


def test_cells_that_cannot_be_told_apart():
    with pytest.raises(
        ValueError, match=r"there has names .* once \('a'\). Make them unique: obs_names_make_unique\(\)"
    ):
        cells_in(pd.Index(["a", "c", "a"]), pd.Index(["a", "a", "c"]), "there")


def test_genes_in():
    assert genes_in(ABC, ABC, "adata", "genes", "it reads") == slice(None)
    np.testing.assert_array_equal(genes_in(pd.Index(list("xcba")), ABC, "adata", "genes", "it reads"), [3, 2, 1])
    with pytest.raises(ValueError, match=re.escape("adata lacks 1 of the 3 genes (33.3%) that it reads: 'c'. Use")):
        genes_in(pd.Index(list("ab")), ABC, "adata", "genes", "it reads")
    with pytest.raises(ValueError, match=r"adata has names that occur more than once \('a'\).* var_names_make_unique"):
        genes_in(pd.Index(list("abca")), ABC, "adata", "genes", "it reads")


@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix], ids=["dense", "CSR"])
@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf])
def test_other_values_than_counts(convert, value):
    counts = np.arange(12, dtype=np.float32).reshape(4, 3)
    for kind in (bool, np.int32, np.uint8, np.float32, np.float64):
        refuse_fractions(convert(counts.astype(kind)), ABC, "X", "it", "")
    counts[2, 1] = counts[3, 0] = value
    message = (
        rf"X does not hold counts, which it reads: 2 of the 12 values .* \({value:.3g} of 'b', for one\). Mend it."
    )
    with pytest.raises(ValueError, match=message):
        refuse_fractions(convert(counts), ABC, "X", "it", "Mend it.")
