from __future__ import annotations

import gzip

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from sae._peaks import read_genes, read_gtf, read_pairs
from sae.tl._peaks_to_genes import peaks_to_genes

GENES = pd.DataFrame(
    {
        "chrom": ["chr1", "chr1", "chr2"],
        "start": [10_000, 30_000, 5_000],
        "end": [20_000, 40_000, 6_000],
        "strand": ["+", "-", "+"],
        "gene": ["A", "B", "C"],
    }
)
PEAKS = ["chr1-9000-9500", "chr1-15000-15400", "chr1-41000-41500", "chr1-22000-22100", "chr2-5900-9000", "chrX-1-50"]
EXPECTED = [
    ["chr1-9000-9500", "A", -500, "promoter"],
    ["chr1-15000-15400", "A", 5000, "body"],
    ["chr1-41000-41500", "B", -1000, "promoter"],
    ["chr1-22000-22100", "A", 12000, "distal"],
    ["chr2-5900-9000", "C", 900, "body"],
]


def cells(names, **columns):
    return ad.AnnData(np.ones((3, len(names)), dtype=np.float32), var=pd.DataFrame(columns, index=list(names)))


def listed(data, genes=GENES, **settings):
    return peaks_to_genes(data, genes, max_distance=15_000, **settings).values.tolist()


def test_promoter_body_and_nearest_start():
    assert listed(cells(PEAKS)) == EXPECTED
    assert peaks_to_genes(cells(PEAKS), GENES)["peak_type"].tolist() == ["promoter", "body", "promoter", "body"]
    table = peaks_to_genes(cells(PEAKS), GENES, upstream=0, downstream=5000, max_distance=20_000)
    assert table["peak_type"].tolist() == ["distal", "promoter", "distal", "distal", "promoter"]
    text = pd.Series(["a"]).dtype  # object, and str with pandas 3
    assert table.dtypes.to_dict() == {"peak": text, "gene": text, "distance": np.int64, "peak_type": text}


@pytest.mark.parametrize("pattern", ["{}:{}-{}", "{}_{}_{}", "{}:{}_{}", "{}-{}-{}"])
@pytest.mark.parametrize("prefix", ["chr", "Chr", ""])
def test_names_of_peaks(pattern, prefix):
    names = [pattern.format(prefix + chrom[3:], start, end) for chrom, start, end in (p.split("-") for p in PEAKS)]
    assert [row[1:] for row in listed(cells(names))] == [row[1:] for row in EXPECTED]
    assert [row[0] for row in listed(cells(names))] == names[:5]


def test_chromosomes_with_separators_in_their_name():
    genes = GENES.assign(chrom=["chr6_GL000251v2_alt", "HLA-A*01:01", "chrUn_KI270302v1"])
    names = ["chr6_GL000251v2_alt_9000_9500", "HLA-A*01:01:41000-41500", "chrUn_KI270302v1-5900-9000"]
    assert [row[1] for row in listed(cells(names), genes)] == ["A", "B", "C"]


def test_places_in_columns_come_first():
    parts = [name.split("-") for name in PEAKS]
    columns = {"chrom": [p[0] for p in parts], "start": [int(p[1]) for p in parts], "end": [int(p[2]) for p in parts]}
    adata = cells([f"peak{i}" for i in range(len(PEAKS))], **columns)
    assert [row[1:] for row in listed(adata)] == [row[1:] for row in EXPECTED]
    adata.var = adata.var.astype({"chrom": "category", "start": str})
    assert [row[1:] for row in listed(adata)] == [row[1:] for row in EXPECTED]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g: g.rename(columns=str.title).rename(columns={"Chrom": "Chromosome"}), id="PyRanges"),
        pytest.param(lambda g: g.rename(columns={"chrom": "seqname", "gene": "gene_name"}), id="GTF reader"),
        pytest.param(
            lambda g: g.rename(
                columns={
                    "chrom": "chromosome_name",
                    "start": "start_position",
                    "end": "end_position",
                    "gene": "external_gene_name",
                }
            ).assign(strand=[1, -1, 1], chromosome_name=["1", "1", "2"]),
            id="BioMart",
        ),
        pytest.param(lambda g: g.set_index("gene"), id="names in the index"),
        pytest.param(lambda g: g.assign(chrom=[1, 1, 2]), id="numbers"),
        pytest.param(
            lambda g: g.assign(chrom=[1.0, 1.0, 2.0], strand=[1.0, -1.0, 1.0]), id="numbers of a column with gaps"
        ),
        pytest.param(
            lambda g: pd.concat([g, g.iloc[:1].assign(chrom=None, gene="D"), g.iloc[:1].assign(gene=None)]),
            id="rows without a place or a name",
        ),
        pytest.param(lambda g: pd.concat([g, g.assign(end=g["end"] - 50)]), id="transcripts"),
        pytest.param(lambda g: g.astype({"chrom": "category", "gene": "category", "start": str}), id="categories"),
    ],
)
def test_tables_of_genes(change):
    genes = change(GENES)
    before = genes.copy()
    assert listed(cells(PEAKS), genes) == EXPECTED
    pd.testing.assert_frame_equal(genes, before)


def test_genes_of_an_unknown_strand_may_start_at_either_end():
    interval = [f"{row.chrom}:{row.start}-{row.end}" for row in GENES.itertuples()]
    var = pd.DataFrame({"interval": [*interval, "NA"]}, index=["A", "B", "C", "MT-CO1"])
    expected = [row.copy() for row in EXPECTED]
    expected[1][2:] = [4600, "body"]
    expected[3][2:] = [-2000, "promoter"]
    expected[4][2:] = [0, "promoter"]
    assert listed(cells(PEAKS), var) == expected
    assert listed(cells(PEAKS), GENES.assign(strand=".")) == expected


def test_the_mitochondrial_chromosome():
    genes = GENES.assign(chrom="MT")
    assert listed(cells(["chrM-9000-9500"]), genes) == [["chrM-9000-9500", "A", -500, "promoter"]]


LINES = [
    "#!genome-build GRCh38",
    'chr1\tHAVANA\tgene\t10000\t20000\t.\t+\t.\tgene_id "ENSG1"; gene_type "protein_coding"; gene_name "A";',
    'chr1\tHAVANA\texon\t10000\t11000\t.\t+\t.\tgene_id "ENSG1"; gene_name "A";',
    'chr1\tENSEMBL\tgene\t30000\t40000\t.\t-\t.\tgene_id "B"; gene_version "2";',
    'chr2\tHAVANA\tgene\t5000\t6000\t.\t+\t.\tgene_name "C"; gene_id "ENSG3";',
]


@pytest.mark.parametrize("opened", [open, gzip.open])
def test_gtf(opened, tmp_path):
    path = tmp_path / "genes.gtf"
    with opened(path, "wt") as file:
        file.write("\n".join(LINES) + "\n")
    pd.testing.assert_frame_equal(read_gtf(path), GENES)
    assert listed(cells(PEAKS), path) == listed(cells(PEAKS), str(path)) == EXPECTED


def test_gtf_without_genes(tmp_path):
    path = tmp_path / "genes.gtf"
    path.write_text(LINES[2] + "\n")
    with pytest.raises(ValueError, match=r"genes\.gtf has no genes: .* is 'gene' for those, and here 'exon'"):
        read_genes(path)


@pytest.mark.parametrize(
    ("names", "genes", "settings", "error", "message"),
    [
        (
            ["chr1-1-2", "CD3", "CD4"],
            GENES,
            {},
            ValueError,
            r"2 of 3 names of adata\.var_names are no peaks \('CD3', for one\)",
        ),
        (
            ["chr1-200-100"],
            GENES,
            {},
            ValueError,
            r"1 places that do not go .*'chr1-200-100', for one, from 200 to 100",
        ),
        (
            ["scaffold7-1-2"],
            GENES,
            {},
            ValueError,
            r"No peak .* is on a chromosome of genes: the peaks are on 'scaffold7', the genes on 'chr1', 'chr2'",
        ),
        (
            PEAKS,
            GENES.drop(columns=["start", "end"]),
            {},
            ValueError,
            r"genes has the columns 'chrom', 'strand', 'gene'; it lacks 'start', 'end'",
        ),
        (PEAKS, GENES.drop(columns="gene"), {}, ValueError, r"genes has no names of genes: its index is numbers"),
        (PEAKS, GENES.assign(strand="?"), {}, ValueError, r"genes has the strand '\?'; expected '\+', '-'"),
        (PEAKS, {"A": 1}, {}, TypeError, r"genes is a dict; expected a table of genes or the path"),
        (PEAKS, GENES, {"upstream": -1}, ValueError, r"upstream=-1 is not a number of bases, 0 or more"),
        (PEAKS, GENES, {"downstream": float("nan")}, ValueError, r"downstream=nan is not a number of bases"),
        (PEAKS, GENES, {"upstream": 10**13}, ValueError, r"upstream=10000000000000 is not a number of bases"),
        (PEAKS, GENES, {"var_mod": "atac"}, ValueError, r"var_mod='atac' names a modality.* Leave var_mod= out"),
    ],
)
def test_bad_input(names, genes, settings, error, message):
    with pytest.raises(error, match=message):
        peaks_to_genes(cells(names), genes, **settings)


def test_peaks_of_a_mudata(log):
    mdata = mudata.MuData({"rna": cells(["A", "B"]), "atac": cells(PEAKS)})
    assert listed(mdata, var_mod="atac") == EXPECTED
    with pytest.raises(ValueError, match=r"Say which, var_mod= \(one of 'rna', 'atac'\)"):
        peaks_to_genes(mdata, GENES)
    with pytest.raises(ValueError, match=r"no modality 'peaks'; it has 'rna', 'atac'"):
        peaks_to_genes(mdata, GENES, var_mod="peaks")
    with pytest.raises(ValueError, match=r"2 of 2 names of mdata\.mod\['rna'\]\.var_names are no peaks"):
        peaks_to_genes(mdata, GENES, var_mod="rna")
    assert log() == ""
    sc.settings.verbosity = "info"
    listed(mdata, var_mod="atac")
    assert "6 peaks of mdata.mod['atac']: 2 in a promoter, 2 in the body of a gene, 1 nearer than 15000 bases" in log()
    assert "1 without a gene" in log()


PAIRS = [["p1", "A"], ["p1", "B"], ["p2", "A"]]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(pd.DataFrame([*PAIRS, ["p3", None]], columns=["peak", "gene"]).assign(distance=0), id="table"),
        pytest.param(
            pd.DataFrame({"peak": ["p1", "p2", "p3"], "gene": ["A;B", "A", None], "distance": ["0;-254", "7", None]}),
            id="table of Cell Ranger ATAC 1",
        ),
        pytest.param({"p1": ["A", "B", "A"], "p2": "A", "p3": None}, id="dict"),
        pytest.param(pd.Series([["A", "B"], "A", np.nan], index=["p1", "p2", "p3"]), id="series"),
    ],
)
def test_forms_of_what_belongs_to_which_gene(given):
    assert read_pairs(given).values.tolist() == PAIRS


def test_annotation_of_10x_genomics():
    """One row per pair, the peak in three columns, and no gene where there is none."""
    table = pd.DataFrame(
        {
            "chrom": ["chr1", "chr1", "chr2"],
            "start": [100, 100, 7],
            "end": [200, 200, 9],
            "gene": ["A", "B", None],
            "distance": [0, 254, None],
            "peak_type": ["promoter", "distal", "intergenic"],
        }
    )
    assert read_pairs(table).values.tolist() == [["chr1:100-200", "A"], ["chr1:100-200", "B"]]
