from __future__ import annotations

import pytest

from sae._names import WIDTH, label_text, set_text, shorten, shown_genes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("B cell", "B cell"),
        ("CD8+ cytotoxic T cell", "CD8+ cytotoxic T cell"),
        ("erythrocyte differentiation (GO:0030218)", "Erythrocyte differentiation"),
        ("mRNA processing (GO:0006397)", "mRNA processing"),
        ("'de novo' protein folding (GO:0006458)", "'de novo' protein folding"),
        ("alpha-beta T cell activation", "Alpha-beta T cell activation"),
        ("Interferon Signaling R-HSA-913531", "Interferon Signaling"),
        ("Heme Biosynthesis WP561", "Heme Biosynthesis"),
        ("HALLMARK_TNFA_SIGNALING_VIA_NFKB", "TNFA signaling via NFKB"),
        ("HALLMARK_E2F_TARGETS", "E2F targets"),
        ("HALLMARK_MYC_TARGETS_V1", "MYC targets V1"),
        ("HALLMARK_IL6_JAK_STAT3_SIGNALING", "IL6 JAK STAT3 signaling"),
        ("HALLMARK_COMPLEMENT", "Complement"),
        ("HALLMARK_KRAS_SIGNALING_UP", "KRAS signaling up"),
        ("GOBP_B_CELL_ACTIVATION", "B cell activation"),
        ("GOMF_DNA_BINDING", "DNA binding"),
        ("REACTOME_TRNA_PROCESSING", "tRNA processing"),
        ("REACTOME_MHC_CLASS_II_ANTIGEN_PRESENTATION", "MHC class II antigen presentation"),
        ("KEGG_MEDICUS_REFERENCE_WNT_PATHWAY", "Reference WNT pathway"),
        ("REACTOME_TYPE_I_HEMIDESMOSOME_ASSEMBLY", "Type I hemidesmosome assembly"),
        ("AIZARANI_LIVER_C21_STELLATE_CELLS", "Aizarani liver C21 stellate cells"),
        ("NK", "NK"),
        ("GO_TO_BED", "To bed"),
        ("T_cells", "T cells"),
        ("HALLMARK", "HALLMARK"),
        ("(GO:0030218)", "(GO:0030218)"),
    ],
)
def test_gene_sets_as_phrases(name, text):
    assert set_text(name) == text


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("CD14+ Monocyte", "CD14+ Monocyte"),
        ("Mono_cDC_prog", "Mono cDC prog"),
        ("7", "leiden r1 7"),
        ("True", "leiden r1 True"),
        ("?", "leiden r1 ?"),
    ],
)
def test_labels_that_say_nothing_alone_have_their_column(label, text):
    assert label_text(label, "leiden_r1") == text


def test_long_texts_are_abbreviated_and_cut_at_a_word():
    assert shorten("Regulation of lymphocyte activation") == "Regulation of lymphocyte activation"
    assert shorten("Positive regulation of lymphocyte activation", 40) == "Pos. reg. of lymphocyte activation"
    assert shorten("Negative regulation of T cell activation", 24) == "Neg. reg. of T cell…"
    assert shorten("one two three", 12) == "one two…"
    assert shorten("one two three", 8) == "one two…"
    assert shorten("one two three", 7) == "one…"
    assert shorten("a" * 50) == "a" * (WIDTH - 1) + "…"
    for width in range(1, 60):
        assert len(shorten("positive regulation of transcription by RNA polymerase II", width)) <= width


@pytest.mark.parametrize(
    "gene",
    [
        "MT-CO1", "mt-Nd1", "RPL3", "Rpl13a", "RPS27A", "RPS4Y1", "RPLP0", "RPSA", "MALAT1", "Malat1", "chr1-1000-1900",
        "X:1000-1900", "chr6_GL000251v2_alt_1000_1900",
    ],
)  # fmt: skip
def test_genes_of_every_cell_are_passed_over(gene):
    assert shown_genes([gene, "CD79A"]) == ["CD79A"]
    assert shown_genes([gene]) == [gene], "unless there is nothing else"


@pytest.mark.parametrize(
    "gene",
    [
        "RPS6KA1", "RPS6KB2", "MTOR", "MT1X", "RPTOR", "RPA1", "RPRM", "NEAT1", "MRPL12", "NKX2-1", "HLA-DRB1", "AC003681.1",
        "RP11-34P13-7",
    ],
)  # fmt: skip
def test_genes_that_only_look_like_them_are_not(gene):
    assert shown_genes([gene, "CD79A"]) == [gene, "CD79A"]


def test_symbols_without_the_identifier_behind():
    found = shown_genes(
        ["HLA-DRA_ENSG00000204287", "Cd3e|ENSMUSG00000032093.1", "CD79A", "CD79A_ENSG00000105369", "ENSG00000156738"]
    )
    assert found == ["HLA-DRA", "Cd3e", "CD79A", "ENSG00000156738"]
    assert shown_genes([f"g{i}" for i in range(20)]) == [f"g{i}" for i in range(10)]
