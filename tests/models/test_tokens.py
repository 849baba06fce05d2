"""Cells as ranked genes: against a table worked by hand, and a plain loop over real cells."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from sae.models._tokens import Vocabulary, rank, read_dictionary

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")

IDS = [f"ENSG0000000000{i}" for i in range(1, 6)]
V1 = {name: i for i, name in enumerate(["<pad>", "<mask>", *IDS])}
V2 = {name: i for i, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *IDS])}
MEDIANS = dict(zip(IDS, [1, 2, 0.5, 4, 1], strict=True))

# Genes A to E, with medians 1, 2, ½, 4, 1 and (V2) tokens 4 to 8.   counts / median
TABLE = [
    ([1, 1, 1, 1, 1], [6, 4, 8, 5, 7]),  #                           1, ½, 2, ¼, 1: A and E tie, A has the lower token
    ([3, 0, 0, 0, 0], [4]),  #                                       only A
    ([0, 4, 1, 8, 0], [5, 6, 7]),  #                                 B, C and D are all 2
    ([2, 10, 0, 4, 3], [5, 8, 4, 7]),  #                             2, 5, -, 1, 3
    ([0, 0, 1, 9, 2], [7, 6, 8]),  #                                 -, -, 2, 2¼, 2
    ([5, 9, 2, 0, 0], [4, 5, 6]),  #                                 5, 4½, 4, -, -
    ([1, 3, 1, 5, 0], [6, 5, 7, 4]),  #                              1, 1½, 2, 1¼, -
    ([0, 0, 0, 1, 0], [7]),  #                                       only D
    ([10, 0, 4, 100, 9], [7, 4, 8, 6]),  #                           10, -, 8, 25, 9
    ([100, 300, 20, 500, 99], [5, 7, 4, 8, 6]),  #                   100, 150, 40, 125, 99
]
COUNTS = sparse.csr_matrix(np.array([counts for counts, _ in TABLE], dtype=np.float32))
RANKED = [ranked for _, ranked in TABLE]


def ranked(counts, vocabulary, names=IDS, longest=9999):
    return [list(cell) for cell in rank(counts, vocabulary.find(names), vocabulary.medians, longest)]


def test_ten_cells_by_hand():
    assert ranked(COUNTS, Vocabulary.read(V2, MEDIANS, None)) == RANKED
    assert ranked(COUNTS, Vocabulary.read(V1, MEDIANS, None)) == [[token - 2 for token in cell] for cell in RANKED]


def test_the_highest_ranks_are_kept():
    assert ranked(COUNTS, Vocabulary.read(V2, MEDIANS, None), longest=2) == [cell[:2] for cell in RANKED]


def test_neither_depth_nor_the_order_of_columns_counts():
    vocabulary = Vocabulary.read(V2, MEDIANS, None)
    order = [3, 0, 4, 2, 1]
    assert ranked(COUNTS[:, order], vocabulary, [IDS[i] for i in order]) == RANKED
    assert ranked(COUNTS * 7, vocabulary) == RANKED


def test_columns_of_one_gene_are_added_up_and_stored_zeros_are_not_counts():
    vocabulary = Vocabulary.read(V2, MEDIANS, None)
    half = COUNTS.copy()
    half.data = np.floor(half.data / 2)
    assert np.any(half.data == 0)
    twice = sparse.hstack([half, COUNTS - half], format="csr")
    assert ranked(twice, vocabulary, [*IDS, *(f"{name}.3" for name in IDS)]) == RANKED
    only = ranked(half, vocabulary)
    assert only[0] == [] and only[1] == [4]


def test_how_genes_are_looked_up():
    names = {"GATA1": IDS[0], "KLF1": f"{IDS[1]}.4", "ENSG00000999999": IDS[2], "LOST": "ENSG00000888888"}
    vocabulary = Vocabulary.read(V2, dict(list(MEDIANS.items())[:4]), names)
    looked_up = [
        "GATA1",
        "KLF1",
        "ENSG00000999999.2",
        f"{IDS[3]}.12",
        "LOST",
        "gata1",
        IDS[4],
        "<cls>",
        "",
        f"{IDS[0]}_PAR_Y",
    ]
    assert vocabulary.find(looked_up).tolist() == [4, 5, 6, 7, -1, -1, -1, -1, -1, -1]
    assert vocabulary.n_genes == 4
    # A name that the model has is itself, whatever else it may stand for.
    assert Vocabulary.read(V2, MEDIANS, {IDS[0]: IDS[1]}).find(IDS[:1]).tolist() == [4]


def test_batch():
    vocabulary = Vocabulary.read(V2, MEDIANS, None)
    batch = vocabulary.batch(np.array([4, 2]), [np.array([6, 5, 8]), np.array([7])])
    assert batch.rows.tolist() == [4, 2]
    assert batch.ids.tolist() == [[2, 6, 5, 8, 3], [2, 7, 3, 0, 0]]
    assert batch.filled.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.genes.tolist() == [[False, True, True, True, False], [False, True, False, False, False]]
    batch = Vocabulary.read(V1, MEDIANS, None).batch(np.array([0, 1]), [np.array([6, 5]), np.array([4])])
    assert batch.ids.tolist() == [[6, 5], [4, 0]]
    assert batch.genes.tolist() == batch.filled.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("name", ["tokens.json", "tokens.json.gz"])
def test_dictionaries_from_files(tmp_path, name):
    content = json.dumps(V2).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for path in (tmp_path / name, str(tmp_path / name)):
        assert read_dictionary(path, "tokens") == V2


class Trap:
    def __reduce__(self):
        return pytest.fail, ("it was opened",)


@pytest.mark.parametrize("name", ["tokens.pkl", "tokens.json", "tokens.pkl.gz"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_not_opened(tmp_path, name, protocol):
    content = pickle.dumps(Trap(), protocol)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=r"tokens='.*' is a pickle.*Convert it once.*json.dumps\(pickle.loads"):
        read_dictionary(tmp_path / name, "tokens")


def test_the_conversion_that_the_message_gives(tmp_path, monkeypatch):
    """The published medians are NumPy numbers."""
    monkeypatch.chdir(tmp_path)
    Path("name.pkl").write_bytes(pickle.dumps({name: np.float32(value) for name, value in MEDIANS.items()}))
    with pytest.raises(ValueError) as error:
        read_dictionary("name.pkl", "medians")
    exec(str(error.value).split('python -c "')[1].removesuffix('"'), {})
    assert read_dictionary("name.json", "medians") == MEDIANS


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "holds a list; expected a dictionary"), ("{1}", "is not JSON: .* Pass a JSON file")],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_dictionary(tmp_path / "a.json", "tokens")


def without(name, tokens=V2):
    return {key: value for key, value in tokens.items() if key != name}


@pytest.mark.parametrize(
    ("tokens", "medians", "message"),
    [
        (without("<pad>"), MEDIANS, "tokens has no '<pad>'. Pass the token dictionary"),
        (without("<mask>", V1), MEDIANS, "tokens has no '<mask>'"),
        (without("<eos>"), MEDIANS, "tokens has no '<eos>'"),
        (without("<cls>"), MEDIANS, "tokens has no '<cls>'"),
        (V2 | {IDS[0]: 5}, MEDIANS, "The 9 values of tokens do not number its names from 0 to 8"),
        (V2 | {IDS[0]: "four"}, MEDIANS, "do not number"),
        (without(IDS[0]), MEDIANS, "The 8 values of tokens do not number"),
        (
            V2,
            {"TP53": 1.0},
            r"None of the 1 medians \('TP53'\) is of a gene in tokens \('ENSG00000000003', .*one version",
        ),
        (V2, MEDIANS | {IDS[2]: 0}, "1 medians are not above 0: 'ENSG00000000003'"),
        (V2, MEDIANS | {IDS[2]: float("inf"), IDS[1]: -1}, "2 medians are not above 0"),
    ],
    ids=["pad", "mask", "eos", "cls", "repeated", "text", "gap", "other medians", "zero", "infinite"],
)
def test_dictionaries_that_do_not_fit(tokens, medians, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary.read(tokens, medians, None)


# ---- The published dictionaries


def published(name):
    path = FOLDER / "vocab" / f"geneformer_{name}.json.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in {path.parent}; set SAE_TEST_DATA to the folder that has vocab/")
    return path


def test_the_two_published_versions():
    v2 = Vocabulary.read(published("v2_token_dictionary_gc104M"), published("v2_gene_median_gc104M"), None)
    assert [part.tolist() for part in v2.frame] == [[2], [3]]
    assert (len(v2.names), v2.n_genes) == (20275, 20271)
    v1 = read_dictionary(published("v1_token_dictionary_gc30M"), "tokens")
    of_v1 = Vocabulary.read(v1, dict.fromkeys(v1, 1.0), None)
    assert [part.tolist() for part in of_v1.frame] == [[], []]
    assert len(of_v1.names) == 25426


def test_real_cells_against_a_plain_loop():
    """Geneformer's published rule: counts of 10,000 a cell, divided by the median, from the highest down."""
    cells = FOLDER / "marrow_cd34_setty19_counts_labeled.h5ad"
    if not cells.exists():
        pytest.skip(f"{cells.name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    tokens, medians, symbols = (
        read_dictionary(published(f"v2_{name}"), name)
        for name in ("token_dictionary_gc104M", "gene_median_gc104M", "gene_name_id_gc104M")
    )
    adata = ad.read_h5ad(cells, backed="r")[::130].to_memory()
    counts = adata.X.toarray().astype(np.float64)
    expected = []
    for cell in counts:
        values = {}
        for symbol, count in zip(adata.var_names, cell, strict=True):
            gene = symbols.get(symbol)
            if count > 0 and gene in tokens:
                values[tokens[gene]] = values.get(tokens[gene], 0) + count / cell.sum() * 10_000 / medians[gene]
        expected.append(sorted(values, key=lambda token, values=values: (-values[token], token)))
    found = ranked(sparse.csr_matrix(counts), Vocabulary.read(tokens, medians, symbols), adata.var_names)
    assert found == expected
    assert min(map(len, found)) > 500
