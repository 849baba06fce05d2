"""Peaks and genes: where they lie, which belong together, and accessibility by gene."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from scipy import sparse

from ._data import listing
from ._genesets import PEAK, open_text

if TYPE_CHECKING:
    from ._expression import Expression
    from .core.intervals import Intervals

VarToGene: TypeAlias = "pd.DataFrame | pd.Series | Mapping[str, str | Iterable[str]]"

PLACE = ("chrom", "start", "end")
SPELLINGS = {
    "chrom": ("chrom", "chromosome", "chr", "seqname", "seqnames", "chromosome_name"),
    "start": ("start", "chromstart", "start_position"),
    "end": ("end", "chromend", "end_position"),
    "strand": ("strand",),
    "gene": ("gene", "gene_name", "gene_symbol", "symbol", "external_gene_name"),
}
"""Column names, in lower case, as GTF readers, PyRanges, BioMart and 10x Genomics have them."""
STRANDS = {"+": 1, "1": 1, "-": -1, "-1": -1, ".": 0, "*": 0, "nan": 0, "None": 0}
MAX_POSITION = 2**53
"""Beyond it, numbers with a point are not whole."""
ATTRIBUTE = re.compile(r'\b(gene_name|gene_id) "([^"]*)"')


@dataclass(frozen=True)
class Located:
    """Peaks or genes with a known place; arrays (i,)."""

    names: pd.Index
    chromosome: np.ndarray
    start: np.ndarray
    end: np.ndarray
    where: str

    def intervals(self, chromosomes: pd.Index) -> Intervals:
        """Number the chromosomes."""
        from .core.intervals import Intervals

        return Intervals(chromosomes.get_indexer(pd.Index(plain(self.chromosome))), self.start, self.end)


def plain(chromosomes: np.ndarray) -> np.ndarray:
    """Write chromosomes in one way: "chr1" (and 1.0, of a column of numbers with gaps) as "1", and "MT" as "M"."""
    bare = pd.Series(chromosomes, dtype=object).str.replace(r"^chr|\.0$", "", case=False, regex=True)
    return bare.replace("MT", "M").to_numpy(dtype=object)


def read_peaks(var: pd.DataFrame, where: str) -> Located:
    """Locate peaks by columns of `var`, else by their names."""
    found = _columns(var)
    if found.keys() >= set(PLACE):
        return _located(var, found, var.index, f"{where}.var")
    parts = _split(var.index)
    unread = parts["start"].isna().to_numpy()
    if unread.any():
        raise ValueError(
            f"{unread.sum()} of {len(var)} names of {where}.var_names are no peaks ({var.index[unread][0]!r}, for one). A peak is "
            "called 'chr1-100-200' or 'chr1:100-200', or has its place in the columns 'chrom', 'start' and 'end' of var, which "
            f"has {listing(var.columns)}."
        )
    return _located(parts, dict(zip(PLACE, PLACE, strict=True)), var.index, f"{where}.var_names")


def read_genes(genes: pd.DataFrame | str | Path) -> tuple[Located, np.ndarray]:
    """Locate genes by a table or a GTF file; also return their strand, 0 where it is not known.

    Rows without a place or a name are left out.
    """
    if isinstance(genes, str | Path):
        table, where = read_gtf(genes), str(genes)
    elif isinstance(genes, pd.DataFrame):
        table, where = genes, "genes"
    else:
        raise TypeError(f"genes is a {type(genes).__name__}; expected a table of genes or the path of a GTF file.")
    found = _columns(table)
    if "interval" in table and not found.keys() >= set(PLACE):
        table = table.assign(**_split(pd.Index(table["interval"])).set_axis(table.index))
        found |= zip(PLACE, PLACE, strict=True)
    missing = [name for name in PLACE if name not in found]
    if missing:
        raise ValueError(
            f"{where} has the columns {listing(table.columns)}; it lacks {listing(missing)}. A table of genes has 'chrom', 'start' "
            "and 'end' (or 'interval', such as 'chr1:100-200'), a name in 'gene' or as the index, and optionally 'strand'."
        )
    if "gene" in found:
        names = table[found["gene"]]
    elif pd.api.types.is_numeric_dtype(table.index.dtype):
        raise ValueError(
            f"{where} has no names of genes: its index is numbers, and its columns are {listing(table.columns)}. Name the genes in "
            "a column 'gene'."
        )
    else:
        names = table.index.to_series()
    known = (table[[found[name] for name in PLACE]].notna().all(axis=1) & names.notna()).to_numpy()
    table, names = table[known], names[known]
    strand = _strand(table[found["strand"]], where) if "strand" in found else np.zeros(len(table), dtype=np.int64)
    return _located(table, found, pd.Index(names.astype(str)), where), strand


def read_gtf(path: str | Path) -> pd.DataFrame:
    """Read the genes of a GTF file, plain or gzipped."""
    rows, others = [], set()
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\r\n").split("\t")
            if len(fields) < 9:
                continue
            if fields[2] != "gene":
                others.add(fields[2])
                continue
            if not (fields[3].isdecimal() and fields[4].isdecimal()):
                raise ValueError(
                    f"{path}, line {number} has {fields[3]!r} and {fields[4]!r} where a GTF file has the start and the end of a gene."
                )
            names = dict(ATTRIBUTE.findall(fields[8]))
            rows.append(
                (fields[0], int(fields[3]), int(fields[4]), fields[6], names.get("gene_name", names.get("gene_id")))
            )
    if not rows:
        raise ValueError(
            f"{path} has no genes: the third field of a line of a GTF file is 'gene' for those, and here {listing(sorted(others))}."
        )
    return pd.DataFrame(rows, columns=["chrom", "start", "end", "strand", "gene"])


def by_gene(expressed: Expression, var_to_gene: VarToGene) -> Expression:
    """Add up the variables (peaks) of each gene, log1p values as what they are the logarithm of."""
    from scanpy import logging as logg

    from .core.aggregate import aggregate
    from .core.moments import scan

    pairs = read_pairs(var_to_gene)
    position = _positions(expressed.genes, pairs["var"], expressed.where)
    pairs, position = pairs[position >= 0], position[position >= 0]
    columns, genes = pd.factorize(pairs["gene"])
    members = sparse.csr_matrix((np.ones(len(pairs)), (position, columns)), (len(expressed.genes), len(genes)))
    # A peak that is written in two ways is there twice.
    members.data[:] = 1
    logg.info(
        f"{members.getnnz(axis=1).astype(bool).sum()} of {members.shape[0]} variables of {expressed.where} in {len(genes)} genes"
    )
    matrix = aggregate(expressed.matrix, members, expressed.log_base if expressed.scale == "log1p" else None)
    return replace(
        expressed, matrix=matrix, genes=pd.Index(genes), where=f"{expressed.where} by gene", summary=scan(matrix)
    )


def read_pairs(var_to_gene: VarToGene) -> pd.DataFrame:
    """Bring what says which variable belongs to which genes into a row for each pair: `var`, `gene`."""
    if isinstance(var_to_gene, pd.DataFrame):
        table, found = var_to_gene, _columns(var_to_gene)
        if "peak" not in table and found.keys() >= set(PLACE):
            chrom, start, end = (table[found[name]].astype(str) for name in PLACE)
            table = table.assign(peak=chrom + ":" + start + "-" + end)
        missing = [name for name in ("peak", "gene") if name not in table]
        if missing:
            raise ValueError(
                f"var_to_gene= has the columns {listing(var_to_gene.columns)}; it lacks {listing(missing)}. It is a table with a row "
                "per pair of 'peak' and 'gene', as sae.tl.peaks_to_genes makes it, or a dict from variable to gene or genes."
            )
        pairs = table[["peak", "gene"]].set_axis(["var", "gene"], axis=1)
    elif isinstance(var_to_gene, Mapping | pd.Series):
        listed = [(var, [genes] if isinstance(genes, str) else genes) for var, genes in var_to_gene.items()]
        rows = [(var, gene) for var, genes in listed if isinstance(genes, Iterable) for gene in genes]
        pairs = pd.DataFrame(rows, columns=["var", "gene"])
    else:
        raise TypeError(
            f"var_to_gene= is a {type(var_to_gene).__name__}; expected a table with the columns 'peak' and 'gene', or a dict from "
            "variable to gene or genes."
        )
    pairs = pairs.dropna().astype(str)
    if pairs.empty:
        raise ValueError("var_to_gene= has no pair of a variable and a gene.")
    # Early versions of Cell Ranger ATAC write all genes of a peak into one row.
    return pairs.assign(gene=pairs["gene"].str.split(";")).explode("gene").drop_duplicates()


def _positions(variables: pd.Index, wanted: pd.Series, where: str) -> np.ndarray:
    """Find variables by name, or peaks by their place if they are written in another way."""
    position = variables.get_indexer(pd.Index(wanted))
    if (position >= 0).any():
        return position
    places = pd.Index(_place(variables))
    if places.is_unique:
        position = places.get_indexer(pd.Index(_place(pd.Index(wanted))))
    if not (position >= 0).any():
        raise ValueError(
            f"var_to_gene= and {where} have no variable in common: it has {listing(wanted.unique()[:3])}; the data has "
            f"{listing(variables[:3])}."
        )
    return position


def _place(names: pd.Index) -> np.ndarray:
    """Write the names of peaks in one way, and leave others as they are."""
    parts = _split(names)
    joined = pd.Series(plain(parts["chrom"].to_numpy(dtype=object))) + ":" + parts["start"] + "-" + parts["end"]
    return joined.where(joined.notna(), names.to_series(index=joined.index)).to_numpy(dtype=object)


def _split(names: pd.Index) -> pd.DataFrame:
    """Take names of peaks apart: text, missing where a name is none."""
    return pd.Series(names.astype(str), dtype=object).str.extract(PEAK).set_axis(["chrom", "start", "end"], axis=1)


def _columns(table: pd.DataFrame) -> dict[str, str]:
    """Find the columns of a table that say what is known of a place."""
    lower = {str(name).lower(): name for name in table.columns}
    found = {name: next((lower[s] for s in spelled if s in lower), None) for name, spelled in SPELLINGS.items()}
    return {name: column for name, column in found.items() if column is not None}


def _located(table: pd.DataFrame, found: Mapping[str, str], names: pd.Index, where: str) -> Located:
    chromosome = table[found["chrom"]].astype(str).to_numpy(dtype=object)
    start, end = (
        pd.to_numeric(table[found[name]], errors="coerce").to_numpy(dtype=np.float64) for name in ("start", "end")
    )
    wrong = ~(start >= 0) | ~(end >= start) | (end > MAX_POSITION)
    if wrong.any():
        raise ValueError(
            f"{where} has {wrong.sum()} places that do not go from a position to a later one ({names[wrong][0]!r}, for one, from "
            f"{table[found['start']].iloc[wrong.argmax()]} to {table[found['end']].iloc[wrong.argmax()]})."
        )
    return Located(names, chromosome, start.astype(np.int64), end.astype(np.int64), where)


def _strand(values: pd.Series, where: str) -> np.ndarray:
    read = values.astype(str).str.removesuffix(".0").map(STRANDS)
    unread = read.isna().to_numpy()
    if unread.any():
        raise ValueError(
            f"{where} has the strand {values[unread].iloc[0]!r}; expected '+', '-', 1, -1, or '.' for unknown."
        )
    return read.to_numpy(dtype=np.int64)
