from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterable
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

import sae
from sae._genesets import read_gmt as sets_of
from sae._ontology import propagate

SHARED = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data") / "genesets"
ALL_RELATIONS = ("is_a", "part_of", "regulates")
SPELLED = {"isa": "is_a: ", "part of": "relationship: part_of "} | {
    f"{sign}regulates": f"relationship: {sign.replace(' ', '_')}regulates "
    for sign in ("", "positively ", "negatively ")
}
"""Relations as the shared tables name them, and as an OBO file writes them."""


def go(number: int) -> str:
    return f"GO:{number:07d}"


def term(number: int, *lines: str, name: str | None = None, namespace: str = "biological_process") -> str:
    """A stanza; the lines may refer to other terms by "@number"."""
    tags = [f"id: {go(number)}", f"name: {name or f'process {number}'}", f"namespace: {namespace}", *lines]
    return "\n".join(["[Term]", *(re.sub(r"@(\d+)", lambda found: go(int(found[1])), tag) for tag in tags), "", ""])


def line(
    number: int,
    gene: str,
    *,
    qualifier: str = "involved_in",
    evidence: str = "IDA",
    aspect: str = "P",
    accession: str = "P1",
    n_fields: int = 17,
) -> str:
    """An annotation in GAF 2.2."""
    fields = [
        "UniProtKB",
        accession,
        gene,
        qualifier,
        go(number),
        "PMID:1",
        evidence,
        "",
        aspect,
        "a name",
        "",
        "protein",
    ]
    fields += ["taxon:9606", "20200101", "UniProt", "", ""]
    return "\t".join(fields[:n_fields]) + "\n"


def write(path: Path, text: str, *, packed: bool = False) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return path


OBO_HEADER = "format-version: 1.2\ndata-version: releases/2022-07-01\n! a comment\n\n"
GAF_HEADER = "!gaf-version: 2.2\n!generated-by: us\n!\n"


@pytest.fixture
def read(tmp_path):
    """`read(stanzas, lines, **options)` writes the two files and reads them; the sets come back by number of the term."""

    def reader(stanzas: Iterable[str], lines: Iterable[str], **options) -> dict[int, list[str]]:
        obo = write(tmp_path / "go.obo", OBO_HEADER + "".join(stanzas))
        gaf = write(tmp_path / "genes.gaf", GAF_HEADER + "".join(lines))
        net = sae.io.read_go(obo, gaf, **options)
        assert net.columns.tolist() == ["source", "target"]
        assert net.index.equals(pd.RangeIndex(len(net)))
        sets: dict[int, list[str]] = {}
        for source, target in net.itertuples(index=False):
            sets.setdefault(int(source[-8:].rstrip(")")), []).append(target)
        return sets

    return reader


# ---- GO: what a file means


DIAMOND = [term(1), term(2, "is_a: @1 ! process 1"), term(3, "is_a: @1"), term(4, "is_a: @2", "is_a: @3"), term(5)]


def test_genes_belong_to_all_ancestors_once(read):
    assert read(DIAMOND, [line(4, "A"), line(2, "B"), line(5, "C")]) == {
        1: ["A", "B"],
        2: ["A", "B"],
        3: ["A"],
        4: ["A"],
        5: ["C"],
    }


def test_annotations_may_be_left_as_they_stand(read):
    assert read(DIAMOND, [line(4, "A"), line(2, "B")], propagate=False) == {2: ["B"], 4: ["A"]}


def test_sets_are_named_and_ordered(tmp_path):
    obo = write(tmp_path / "go.obo", term(7, name="late") + term(3, "is_a: @7", name=r"early\, \"so\" ! not this"))
    gaf = write(tmp_path / "genes.gaf", line(3, "B") + line(3, "A") + line(7, "C") + line(3, "A"))
    expected = [
        ('early, "so" (GO:0000003)', "A"),
        ('early, "so" (GO:0000003)', "B"),
        ("late (GO:0000007)", "A"),
        ("late (GO:0000007)", "B"),
        ("late (GO:0000007)", "C"),
    ]
    net = sae.io.read_go(obo, gaf)
    pd.testing.assert_frame_equal(net, pd.DataFrame(expected, columns=["source", "target"]))


def test_a_term_without_a_name_is_called_by_its_id(tmp_path):
    obo = write(tmp_path / "go.obo", "[Term]\nid: GO:0000001\nnamespace: biological_process\n")
    net = sae.io.read_go(obo, write(tmp_path / "genes.gaf", line(1, "A")))
    assert net["source"].tolist() == ["GO:0000001"]


@pytest.mark.parametrize(
    "qualifier", ["NOT", "NOT|involved_in", "NOT|contributes_to", "not|enables", "contributes_to|NOT"]
)
def test_negated_annotations_are_dropped_and_not_propagated(read, qualifier):
    assert read(DIAMOND, [line(4, "A", qualifier=qualifier), line(2, "B")]) == {1: ["B"], 2: ["B"]}


@pytest.mark.parametrize("qualifier", ["", "enables", "colocalizes_with", "NOTCH"])
def test_other_qualifiers_are_kept(read, qualifier):
    assert read(DIAMOND, [line(5, "A", qualifier=qualifier)]) == {5: ["A"]}


def test_a_negated_annotation_leaves_the_gene_its_others(read):
    assert read(DIAMOND, [line(2, "A", qualifier="NOT|involved_in"), line(4, "A")])[2] == ["A"]


@pytest.mark.parametrize("of", ["annotation", "relation"])
def test_alternative_ids_stand_for_their_term(read, of):
    stanzas = [term(1, "alt_id: @8", "alt_id: @9"), term(2, "is_a: @9")]
    assert read(stanzas, [line(8, "A"), line(1, "A")] if of == "annotation" else [line(2, "A")])[1] == ["A"]


def test_an_id_in_use_is_not_taken_for_an_alternative(read):
    assert read([term(1, "alt_id: @2"), term(2)], [line(2, "A")]) == {2: ["A"]}


def test_obsolete_terms_are_dropped_and_counted(read, log):
    stanzas = [*DIAMOND, term(6, "is_a: @1", "is_obsolete: true"), term(7, "is_a: @6", "is_obsolete: false")]
    assert read(stanzas, [line(6, "A"), line(6, "B"), line(7, "C"), line(1, "D")]) == {1: ["D"], 7: ["C"]}
    assert (
        "1 terms of" in log()
        and "are obsolete in" in log()
        and "their 2 annotations are left out ('GO:0000006')" in log()
    )


def test_a_merged_term_that_is_still_listed_as_obsolete_is_its_successor(read, log):
    assert read([term(1, "alt_id: @2"), term(2, "is_obsolete: true")], [line(2, "A")]) == {1: ["A"]}
    assert log() == ""


def test_terms_that_the_ontology_lacks_are_counted(read, log):
    assert read(DIAMOND, [line(5, "A"), line(91, "A"), line(92, "B"), line(92, "C")]) == {5: ["A"]}
    assert "2 terms of" in log() and "their 3 annotations are left out ('GO:0000091', 'GO:0000092')" in log()
    assert "Take both files from the same release." in log()


def test_nothing_is_said_when_all_is_well(read, log):
    read(DIAMOND, [line(5, "A")])
    assert log() == ""


ASPECTS = [
    term(1),
    term(2, "relationship: part_of @1 ! process 1", "is_a: @1", namespace="molecular_function"),
    term(3, "relationship: part_of @1 {source=\"us\"} ! process 1", "is_a: @4", namespace="molecular_function"),
    term(4, "is_a: @1", namespace="molecular_function"),
    term(5, namespace="cellular_component"),
]  # fmt: skip
ACROSS = [line(1, "A"), line(3, "B", aspect="F"), line(4, "C", aspect="F"), line(5, "D", aspect="C")]


@pytest.mark.parametrize(
    ("aspect", "expected"),
    [
        pytest.param("P", {1: ["A", "B"]}, id="process"),
        pytest.param("F", {3: ["B"], 4: ["B", "C"]}, id="function"),
        pytest.param("C", {5: ["D"]}, id="component"),
        pytest.param(None, {1: ["A", "B"], 3: ["B"], 4: ["B", "C"], 5: ["D"]}, id="all"),
    ],
)
def test_is_a_stays_within_an_aspect_and_part_of_does_not(read, aspect, expected):
    assert read(ASPECTS, ACROSS, aspect=aspect) == expected


def test_the_ontology_says_what_aspect_a_term_has(read):
    assert read(DIAMOND, [line(5, "A", aspect="F")]) == {5: ["A"]}


RELATED = [
    term(1),
    term(2, "is_a: @1"),
    term(3, "relationship: part_of @1"),
    term(4, "relationship: regulates @1"),
    term(5, "relationship: positively_regulates @1"),
    term(6, "relationship: negatively_regulates @1"),
    term(7, "relationship: has_part @1"),
    term(8, "intersection_of: @1"),
]
REGULATORS = {"regulates": "D", "positively_regulates": "E", "negatively_regulates": "F"}


@pytest.mark.parametrize(
    ("options", "genes"),
    [
        pytest.param({}, "BC", id="default"),
        pytest.param({"relations": ("is_a",)}, "B", id="is_a"),
        pytest.param({"relations": "part_of"}, "C", id="one name"),
        pytest.param({"relations": ["is_a", "part_of", "regulates"]}, "BCDEF", id="regulates and its kinds"),
        pytest.param({"relations": ["positively_regulates"]}, "E", id="one kind"),
        pytest.param({"relations": ["has_part"]}, "G", id="what else the file has"),
        pytest.param({"relations": ()}, "", id="none"),
    ],
)
def test_relations_are_followed_as_asked(read, options, genes):
    lines = [line(number, letter) for number, letter in zip(range(2, 9), "BCDEFGH", strict=True)]
    assert "".join(read(RELATED, lines, **options).get(1, [])) == genes


def test_relations_to_other_ontologies_are_not_followed(read):
    stanzas = [term(1, "relationship: part_of CL:0000232 ! erythrocyte"), term(2, namespace="external")]
    assert read(stanzas, [line(1, "A")]) == {1: ["A"]}


CODES = [line(5, code, evidence=code) for code in ("IDA", "IEA", "ND", "IBA")]


@pytest.mark.parametrize(
    ("options", "genes"),
    [
        pytest.param({}, ["IBA", "IDA", "IEA"], id="default"),
        pytest.param({"exclude_evidence": ()}, ["IBA", "IDA", "IEA", "ND"], id="all"),
        pytest.param({"exclude_evidence": ("ND", "IEA")}, ["IBA", "IDA"], id="excluded"),
        pytest.param({"exclude_evidence": "IEA"}, ["IBA", "IDA", "ND"], id="excluded by one name"),
        pytest.param({"evidence": ["IDA", "ND"]}, ["IDA"], id="both"),
        pytest.param({"evidence": "IDA"}, ["IDA"], id="one name"),
    ],
)
def test_evidence(read, options, genes):
    assert read(DIAMOND, CODES, **options) == {5: genes}


def test_genes_by_accession(read):
    lines = [line(5, "A", accession="Q1"), line(5, "A", accession="P1"), line(5, "", accession="P2")]
    assert read(DIAMOND, lines, genes="id") == {5: ["P1", "P2", "Q1"]}


@pytest.mark.parametrize("symbol", ["", "  "])
def test_lines_without_a_symbol_are_counted(read, log, symbol):
    assert read(DIAMOND, [line(5, symbol), line(5, "A"), line(5, symbol)]) == {5: ["A"]}
    assert "2 annotations of" in log() and "name no gene" in log()


# ---- GO: what a file looks like


@pytest.mark.parametrize("n_fields", [15, 16, 17])
def test_columns_at_the_end_may_be_missing(read, n_fields):
    assert read(DIAMOND, [line(5, "A", n_fields=n_fields)]) == {5: ["A"]}


@pytest.mark.parametrize("name", ["go.obo", "go.obo.gz"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [str, Path])
def test_gzip_is_told_by_content(tmp_path, name, packed, kind):
    obo = write(tmp_path / name, "".join(DIAMOND), packed=packed)
    gaf = write(tmp_path / name.replace("obo", "gaf"), line(5, "A"), packed=packed)
    gmt = write(tmp_path / name.replace("obo", "gmt"), "process 5 (GO:0000005)\t\tA\n", packed=packed)
    pd.testing.assert_frame_equal(sae.io.read_go(kind(obo), kind(gaf)), sae.io.read_gmt(kind(gmt)))


@pytest.mark.parametrize("packed", [False, True])
def test_line_ends_comments_and_other_stanzas(tmp_path, packed):
    text = "\ufeff! first\r\n" + (
        term(1) + "! between\n\n[Typedef]\nid: part_of\nname: part of\nis_a: overlaps\n\n"
        "[Instance]\nid: x\n\n[Term]\nid: GO:0000002\nname: two\nnamespace: biological_process\nis_a: GO:0000001"
    ).replace("\n", "\r\n")
    obo = write(tmp_path / "go.obo", text, packed=packed)
    gaf = write(tmp_path / "genes.gaf", "!gaf-version: 2.1\r\n\r\n" + line(2, "A").replace("\n", "\r\n") + "! last")
    assert sae.io.read_go(obo, gaf)["source"].tolist() == ["process 1 (GO:0000001)", "two (GO:0000002)"]


@pytest.mark.parametrize(
    ("obo", "message"),
    [
        pytest.param("<html>\n", "go.obo, line 1 is '<html>'; a line of an OBO file is 'tag: value'.", id="not OBO"),
        pytest.param(term(1) + "name\n", "go.obo, line 6 is 'name'; a line of", id="no value"),
        pytest.param("\n[Term]\nname: x\n", "go.obo, line 2: this [Term] has no id.", id="no id"),
        pytest.param(term(1) + term(1), "go.obo, line 6: the term 'GO:0000001' occurs twice.", id="twice"),
        pytest.param(term(1, "is_a: ! x"), "go.obo, line 1: this [Term] has the line 'is_a: ', which names no", id="is_a"),
        pytest.param(
            term(2) + term(1, "relationship: part_of ! x"),
            "go.obo, line 6: this [Term] has the line 'relationship: part_of', which names no other term.",
            id="relationship",
        ),
        pytest.param("", "go.obo has no terms of the Gene Ontology. Pass its OBO file", id="empty"),
        pytest.param(term(1, namespace="cell"), "go.obo has no terms of the Gene Ontology.", id="another ontology"),
    ],
)  # fmt: skip
def test_bad_obo_is_refused_with_its_line(tmp_path, obo, message):
    gaf = write(tmp_path / "genes.gaf", line(1, "A"))
    with pytest.raises(ValueError, match=re.escape(message)):
        sae.io.read_go(write(tmp_path / "go.obo", obo), gaf)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param("GO:0000005 A\n", "genes.gaf, line 3 has 1 fields separated by tabs; a GAF line has 17.", id="spaces"),
        pytest.param(line(5, "A", n_fields=14), "genes.gaf, line 3 has 14 fields separated", id="short"),
        pytest.param(line(5, "A\tB"), "genes.gaf, line 3 has 18 fields separated", id="long"),
        pytest.param(line(5, "A").replace("GO:", "GO_"), "genes.gaf, line 3 has 'GO_0000005' in column 5", id="id"),
        pytest.param(line(5, "A", aspect="BP"), "genes.gaf, line 3 has 'BP' in column 9", id="aspect"),
        pytest.param(
            line(5, "A", aspect="x", qualifier="NOT"), "genes.gaf, line 3 has 'x' in column 9", id="in a line left out"
        ),
    ],
)  # fmt: skip
def test_bad_gaf_is_refused_with_its_line(tmp_path, bad, message):
    obo = write(tmp_path / "go.obo", "".join(DIAMOND))
    gaf = write(tmp_path / "genes.gaf", f"! comment\n{line(5, 'A')}{bad}")
    with pytest.raises(ValueError, match=re.escape(message)):
        sae.io.read_go(obo, gaf)


@pytest.mark.parametrize(
    "stanzas",
    [
        pytest.param([term(1, "is_a: @2"), term(2, "is_a: @3"), term(3, "relationship: part_of @1")], id="three"),
        pytest.param([term(1, "is_a: @1")], id="itself"),
        pytest.param([term(1, "alt_id: @2", "is_a: @2")], id="itself by another id"),
    ],
)
def test_circles_are_refused_and_named(read, stanzas):
    with pytest.raises(ValueError, match="go round in a circle") as caught:
        read([*stanzas, term(9)], [line(9, "A")])
    circle = re.findall(r"GO:(\d{7})", str(caught.value))
    assert len(circle) == len(stanzas) + 1 and circle[0] == circle[-1]
    # Each leads to the next.
    assert all(int(b) == int(a) % len(stanzas) + 1 for a, b in zip(circle, circle[1:], strict=False))
    assert read(stanzas, [line(1, "A")], propagate=False) == {1: ["A"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aspect": "BP"}, "aspect='BP' is not one of 'P', 'F', 'C', nor None for all."),
        ({"genes": "name"}, "genes='name' is neither 'symbol' nor 'id'."),
        ({"relations": ["is-a"]}, "relations= has 'is-a', which"),
        ({"evidence": ["IEA"]}, "None of the 3 annotations of"),
        ({"aspect": "C"}, "1 have the qualifier NOT, 1 other evidence, 0 no symbol, 0 terms not in use, and the others another"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(read, options, message):
    lines = [line(5, "A"), line(5, "A", qualifier="NOT|enables"), line(5, "A", evidence="ND")]
    with pytest.raises(ValueError, match=re.escape(message)):
        read(DIAMOND, lines, **options)


def test_a_cut_download_is_said_to_be_one(tmp_path):
    whole = gzip.compress("".join(DIAMOND).encode() + os.urandom(1000).hex().encode())
    (tmp_path / "go.obo.gz").write_bytes(whole[:-200])
    with pytest.raises(ValueError, match="Is the download complete?"):
        sae.io.read_go(tmp_path / "go.obo.gz", tmp_path / "genes.gaf")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    obo = write(tmp_path / "go.obo", term(1))
    with pytest.raises(FileNotFoundError, match=r"none\.obo"):
        sae.io.read_go(tmp_path / "none.obo", obo)
    with pytest.raises(FileNotFoundError, match=r"none\.gaf"):
        sae.io.read_go(obo, tmp_path / "none.gaf")


# ---- Propagation


@pytest.mark.parametrize("seed", range(20))
def test_propagation_is_that_of_the_closure(seed):
    """Networkx finds the ancestors by a search from each term."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    shuffled = rng.permutation(n)
    edges = [(f"t{shuffled[a]}", f"t{shuffled[b]}") for b in range(n) for a in range(b + 1, n) if rng.random() < 3 / n]
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(f"t{i}" for i in range(n))
    members = {f"t{i}": {f"g{j}" for j in rng.integers(30, size=rng.integers(1, 6))} for i in range(n) if i % 3}
    expected: dict[str, set[str]] = {}
    for name, genes in members.items():
        for ancestor in {name} | nx.descendants(graph, name):
            expected.setdefault(ancestor, set()).update(genes)
    before = {name: set(genes) for name, genes in members.items()}
    assert propagate(members, {name: set(graph.successors(name)) for name in graph}) == expected
    assert members == before


def test_a_long_chain_is_no_problem():
    n = 20_000
    found = propagate({"0": {"A"}}, {str(i): {str(i + 1)} for i in range(n)})
    assert len(found) == n + 1 and all(genes == {"A"} for genes in found.values())


# ---- GMT


def test_gmt_becomes_a_long_table(tmp_path):
    path = write(tmp_path / "sets.gmt", "b\t\tY\tX\tY\nGO:0030218\terythrocyte differentiation\tX\n")
    expected = [("b", "Y"), ("b", "X"), ("erythrocyte differentiation (GO:0030218)", "X")]
    pd.testing.assert_frame_equal(sae.io.read_gmt(path), pd.DataFrame(expected, columns=["source", "target"]))


@pytest.mark.parametrize("text", ["", "\n", "a\t\t\n"], ids=["empty", "blank", "no genes"])
def test_gmt_without_sets_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"sets\.gmt has no gene sets"):
        sae.io.read_gmt(write(tmp_path / "sets.gmt", text))


# ---- On the way to features


def test_the_table_goes_into_enrich(encoded, tmp_path):
    genes = encoded.var_names[:60]
    obo = write(tmp_path / "go.obo", "".join(DIAMOND))
    gaf = write(tmp_path / "genes.gaf", "".join(line(4 if i % 2 else 5, gene) for i, gene in enumerate(genes)))
    net = sae.io.read_go(obo, gaf)
    sae.tl.enrich(encoded, net, collection="GO", n_sets=None, progress=False)
    assert set(sae.get.enrichment(encoded)["gene_set"]) <= set(net["source"])
    assert len(sae.get.enrichment(encoded))


# ---- The real ontology


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in {SHARED}; set SAE_TEST_DATA to the folder that has 'genesets'")
    return path


def test_the_real_ontology_as_bioconductor_propagates_it(tmp_path):
    """Its release of July 2022, written as OBO and GAF; it kept the sets of 3 to 2,500 genes, over all relations."""
    terms = pd.read_csv(shared("go_bp_terms_2022.tsv.gz"), sep="\t")
    edges = pd.read_csv(shared("go_bp_parents_2022.tsv.gz"), sep="\t")
    lines = edges["relationship"].map(SPELLED) + edges["parent"]
    related = lines.groupby(edges["child"]).agg("\n".join)
    stanzas = (
        f"[Term]\nid: {found.go_id}\nname: {found.term}\nnamespace: biological_process\n{related.get(found.go_id, '')}\n\n"
        for found in terms.itertuples()
    )
    obo = write(tmp_path / "go.obo", OBO_HEADER + "".join(stanzas), packed=True)
    direct = sae.io.read_gmt(shared("go_bp_human_2022_direct.gmt.gz"))
    numbers = direct["source"].str.extract(r"GO:(\d+)\)$")[0].astype(int)
    annotations = (line(number, gene) for number, gene in zip(numbers, direct["target"], strict=True))
    gaf = write(tmp_path / "goa.gaf", GAF_HEADER + "".join(annotations), packed=True)

    expected = {name: set(genes) for name, genes in sets_of(shared("go_bp_human_2022_propagated.gmt.gz")).items()}
    net = sae.io.read_go(obo, gaf, relations=ALL_RELATIONS)
    found = {str(name): set(genes) for name, genes in net.groupby("source")["target"]}
    assert {name: genes for name, genes in found.items() if 3 <= len(genes) <= 2500} == expected

    safe = sae.io.read_go(obo, gaf)
    pairs = {(name, gene) for name, genes in expected.items() for gene in genes}
    shared_pairs = pairs.intersection(safe.itertuples(index=False, name=None))
    # Without the relations that regulate, a seventh of the pairs goes.
    assert len(shared_pairs) / len(pairs) == pytest.approx(0.856, abs=0.001)
