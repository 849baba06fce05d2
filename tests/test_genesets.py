from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sae._genesets import default_collection, match, read_gmt, read_net

GMT = {
    "description": ("T cell\tabout T cells\tCD3D\tCD3E\n", {"T cell": ["CD3D", "CD3E"]}),
    "empty description": ("T cell\t\tCD3D\tCD3E\n", {"T cell": ["CD3D", "CD3E"]}),
    "URL": ("HALLMARK_HYPOXIA\thttps://www.gsea-msigdb.org/x\tPGK1\n", {"HALLMARK_HYPOXIA": ["PGK1"]}),
    "identifier and term": ("GO:0030218\terythrocyte differentiation\tGATA1\n", {"erythrocyte differentiation (GO:0030218)": ["GATA1"]}),
    "identifier and URL": ("GO:0030218\thttp://go.org\tGATA1\n", {"GO:0030218": ["GATA1"]}),
    "identifier twice": ("GO:0030218\tGO:0030218\tGATA1\n", {"GO:0030218": ["GATA1"]}),
    "identifier alone": ("GO:0030218\t\tGATA1\n", {"GO:0030218": ["GATA1"]}),
    "spaces in genes": ("a set\t\tHLA DRA\tCD3 (all)\n", {"a set": ["HLA DRA", "CD3 (all)"]}),
    "Windows line ends": ("a\t\tX\tY\r\nb\t\tZ\r\n", {"a": ["X", "Y"], "b": ["Z"]}),
    "blank lines": ("\na\t\tX\n\n  \t \nb\t\tZ\n\n", {"a": ["X"], "b": ["Z"]}),
    "no last line end": ("a\t\tX\tY", {"a": ["X", "Y"]}),
    "empty fields at the end": ("a\t\tX\tY\t\t\n", {"a": ["X", "Y"]}),
    "padding": (" a \t\t X\tY \n", {"a": ["X", "Y"]}),
    "repeated gene": ("a\t\tX\tY\tX\n", {"a": ["X", "Y"]}),
}  # fmt: skip


def write(path: Path, text: str) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(text.encode())
    return path


@pytest.mark.parametrize("name", ["sets.gmt", "sets.gmt.gz"])
@pytest.mark.parametrize(("text", "expected"), GMT.values(), ids=GMT)
def test_gmt_is_read(tmp_path, text, expected, name):
    path = write(tmp_path / name, text)
    assert read_gmt(path) == read_gmt(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a\t\tX\nb\tY\n", "sets.gmt, line 2 has 2 fields separated by tabs", id="short line"),
        pytest.param("a desc X Y\n", "sets.gmt, line 1 has 1 fields separated by tabs", id="spaces"),
        pytest.param("a\t\tX\n\na\t\tY\n", "sets.gmt, line 3: the gene set 'a' occurs twice", id="repeated set"),
    ],
)
def test_bad_gmt_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_gmt(write(tmp_path / "sets.gmt", text))


def table(*rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["source", "target", "weight"])


SETS = {"a": ["X", "Y"], "b": ["Y"]}
UNWEIGHTED = table(("a", "X", 1.0), ("a", "Y", 1.0), ("b", "Y", 1.0))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        pytest.param(SETS, UNWEIGHTED, id="dict of lists"),
        pytest.param({"a": ("X", "Y"), "b": {"Y"}}, UNWEIGHTED, id="dict of tuples and sets"),
        pytest.param({"a": pd.Index(["X", "Y"]), "b": np.array(["Y"])}, UNWEIGHTED, id="dict of arrays"),
        pytest.param({"a": ["X", "Y", "X"], "b": ["Y"], "c": []}, UNWEIGHTED, id="repeated genes and an empty set"),
        pytest.param(UNWEIGHTED.drop(columns="weight"), UNWEIGHTED, id="table without weight"),
        pytest.param(UNWEIGHTED.assign(other=0)[["other", "target", "source"]], UNWEIGHTED, id="other columns"),
        pytest.param(pd.concat([UNWEIGHTED, UNWEIGHTED]), UNWEIGHTED, id="repeated rows"),
        pytest.param(UNWEIGHTED.astype({"source": "category", "target": "category"}), UNWEIGHTED, id="categories"),
        pytest.param(
            table(("a", "X", -2), ("a", "Y", 1)), table(("a", "X", -2.0), ("a", "Y", 1.0)), id="table with weight"
        ),
        pytest.param(table((1, 2, 1.0)), table(("1", "2", 1.0)), id="numbers as names"),
    ],
)
def test_net_becomes_a_long_table(net, expected):
    pd.testing.assert_frame_equal(read_net(net), expected)


def test_net_is_not_changed():
    net = UNWEIGHTED.astype({"weight": int})
    before = net.copy()
    read_net(net)
    pd.testing.assert_frame_equal(net, before)


@pytest.mark.parametrize("kind", [str, Path])
def test_net_may_be_a_path(tmp_path, kind):
    path = write(tmp_path / "sets.gmt", "a\t\tX\tY\nb\t\tY\n")
    pd.testing.assert_frame_equal(read_net(kind(path)), UNWEIGHTED)


@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        pytest.param(
            UNWEIGHTED.rename(columns={"source": "term"}),
            ValueError,
            "net has the columns 'term', 'target', 'weight'; it lacks 'source'.",
            id="missing column",
        ),
        pytest.param(pd.DataFrame(), ValueError, "net has the columns none; it lacks 'source', 'target'.", id="no columns"),
        pytest.param(["X", "Y"], TypeError, "net is a list; expected a DataFrame", id="list"),
        pytest.param(None, TypeError, "net is a NoneType; expected a DataFrame", id="nothing"),
        pytest.param({"a": "CD3D"}, TypeError, "The gene set 'a' is the string 'CD3D'; expected a list of genes.", id="string"),
        pytest.param({}, ValueError, "net has no gene sets.", id="empty dict"),
        pytest.param({"a": []}, ValueError, "net has no gene sets.", id="empty set"),
        pytest.param(UNWEIGHTED[:0], ValueError, "net has no gene sets.", id="empty table"),
        pytest.param(
            table(("a", "X", 1), ("a", "Y", 1), ("a", "Y", -1)),
            ValueError,
            "net gives 1 genes two weights in one set ('Y' in 'a', for one).",
            id="two weights",
        ),
    ],
)  # fmt: skip
def test_bad_net_is_refused(net, error, message):
    with pytest.raises(error, match=re.escape(message)):
        read_net(net)


def test_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gmt"):
        read_net(tmp_path / "none.gmt")


@pytest.mark.parametrize(
    ("net", "name"),
    [
        ("a/b/GO_BP.gmt", "GO_BP"),
        (Path("a/b/GO_BP.gmt.gz"), "GO_BP"),
        ("sets.v2.gmt", "sets.v2"),
        ({}, "gene_sets"),
        (UNWEIGHTED, "gene_sets"),
    ],
)
def test_collection_is_named_after_the_file(net, name):
    assert default_collection(net) == name


GENES = pd.Index(["g0", "g1", "g2", "g3", "g4"])
NET = {
    "three of five": ["g3", "absent", "g0", "missing", "g4"],
    "one of three": ["g1", "absent", "missing"],
    "none": ["absent"],
    "all": ["g0", "g1", "g2", "g3", "g4"],
}


@pytest.mark.parametrize(
    ("min_size", "max_size", "names"),
    [
        (1, None, ["three of five", "one of three", "all"]),
        (2, None, ["three of five", "all"]),
        (3, 3, ["three of five"]),
        (1, 4, ["three of five", "one of three"]),
        (5, 5, ["all"]),
    ],
)
def test_sizes_are_counted_on_measured_genes(min_size, max_size, names):
    assert match(NET, GENES, min_size=min_size, max_size=max_size).names.tolist() == names


def test_members_are_the_measured_genes_of_each_set():
    found = match(NET, GENES, min_size=1, max_size=None)
    np.testing.assert_array_equal(found.weights.toarray(), [[1, 0, 0, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def test_weights_are_those_of_the_net():
    found = match(table(("a", "g1", -2.5), ("a", "g4", 0.5)), GENES, min_size=1, max_size=None)
    np.testing.assert_array_equal(found.weights.toarray(), [[0, -2.5, 0, 0, 0.5]])


def test_a_weight_of_zero_is_a_member():
    found = match(table(("a", "g1", 0.0), ("a", "g4", 0.5)), GENES, min_size=2, max_size=None)
    assert found.weights.getnnz() == 2


def test_sets_that_are_left_out_are_counted():
    found = match(NET, GENES, min_size=2, max_size=4)
    assert found.names.tolist() == ["three of five"]
    assert found.left_out() == "left out 1 gene sets with too few measured genes, 1 with too many and 1 without any"


@pytest.mark.parametrize(
    ("net", "sizes", "message"),
    [
        pytest.param(
            {"a": ["ENSG1", "ENSG2"]},
            (1, None),
            "net and data have no gene in common. The net has 'ENSG1', 'ENSG2'; "
            "the data has 'g0', 'g1', 'g2', 'g3', 'g4'.",
            id="no gene in common",
        ),
        pytest.param(NET, (6, 9), "None of the 3 gene sets has 6 to 9 measured genes; the largest has 5.", id="too small"),
        pytest.param(NET, (6, None), "None of the 3 gene sets has 6 to any number of measured genes", id="no upper limit"),
        pytest.param({"a": NET["all"]}, (1, 4), "None of the 1 gene sets has 1 to 4 measured genes", id="too large"),
    ],
)  # fmt: skip
def test_nothing_to_match_is_refused(net, sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        match(net, GENES, min_size=sizes[0], max_size=sizes[1])


def test_genes_that_differ_in_case_are_told():
    net = {"a": ["C3", "CD3E", "CD79A"], "b": ["C3", "LYZ"]}
    mouse = pd.Index(["C3", "Cd3e", "Cd79a", "Lyz"])
    with pytest.warns(UserWarning, match="Only 1 genes of the net are in the data, and 4 where upper and lower case"):
        match(net, mouse, min_size=1, max_size=None)
    with pytest.raises(ValueError, match="no gene in common.*They differ in upper and lower case"):
        match(net, mouse[1:], min_size=1, max_size=None)
    match(net, mouse.str.upper(), min_size=1, max_size=None)
