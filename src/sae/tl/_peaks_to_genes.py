from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from .._data import Data, holder, is_mudata, listing
from .._lazy import loaded
from .._peaks import plain, read_genes, read_peaks

PEAK_TYPES = ("promoter", "body", "distal")
MAX_REACH = 10_000_000_000
"""No chromosome is that long."""


def peaks_to_genes(
    data: Data,
    genes: pd.DataFrame | str | Path,
    *,
    var_mod: str | None = None,
    upstream: int = 2_000,
    downstream: int = 100,
    max_distance: int = 0,
) -> pd.DataFrame:
    """Find the genes that peaks of open chromatin lie in, or near.

    A peak belongs to all genes whose promoter it overlaps, from `upstream` bases before the start to `downstream` bases after it,
    and to all whose body it overlaps: the regions whose accessibility is commonly taken for the activity of a gene. A peak
    in none of them belongs to the gene with the nearest start, if that is at most `max_distance` away.

    Parameters
    ----------
    data
        AnnData of peaks, or MuData with `var_mod`. A peak is located by the columns `chrom`, `start` and `end` of `var`, or else by
        its name: "chr1-100-200", "chr1:100-200" or "chr1_100_200".
    genes
        Where the genes are, in the same assembly as the peaks: a GTF file (may be gzipped; its lines of the feature "gene"
        count), or a table with `chrom`, `start`, `end` and `strand`, and the name in `gene` or as the index. Columns may be spelled as
        GTF readers, BioMart or PyRanges do (`seqname`, `Chromosome`, `start_position`, `gene_name`, ...). In place of the first three,
        `interval` ("chr1:100-200") serves, as in the `var` of genes from 10x Genomics. Genes whose strand is not known may start at
        either end. Several rows may be of one gene: its transcripts, say.
    var_mod
        The modality with the peaks.
    upstream, downstream
        Reach of the promoter from the start of the gene, in bases.
    max_distance
        How far from the nearest start a peak outside of all genes may be, in bases; 0 leaves these peaks out.

    Returns
    -------
    A table with a row per pair of `peak` and `gene`: `distance`, in bases from the start of the gene to the peak (0 where the peak
    has the start in it, negative upstream), and `peak_type`, `"promoter"`, `"body"` or `"distal"`. Peaks are in the order of the
    data, the genes of each from the promoter outwards. It goes as it is into :func:`sae.tl.enrich` as `var_to_gene=`.

    Raises
    ------
    ValueError
        Names that are no peaks, a table without places or names, a GTF file without genes, no chromosome in common, or a
        MuData without `var_mod`.
    TypeError
        `genes` is neither a table nor a path.

    Notes
    -----
    Both ends belong to an interval. Whether positions count from 0 (BED) or from 1 (GTF) makes a difference of one base, and is not looked
    into. "chr1" and "1" are the same chromosome, as are "M" and "MT".

    Where genes overlap they share peaks, and seem to be regulated together. `table.drop_duplicates("peak")` keeps the first gene
    of each peak.

    Examples
    --------
    >>> import anndata, numpy, pandas, sae
    >>> peaks = anndata.AnnData(
    ...     numpy.ones((2, 3)), var=pandas.DataFrame(index=["chr1-900-950", "chr1-1800-1900", "chr1-9000-9100"])
    ... )
    >>> genes = pandas.DataFrame({"gene": ["A"], "chrom": ["1"], "start": [1000], "end": [2000], "strand": ["+"]})
    >>> sae.tl.peaks_to_genes(peaks, genes, max_distance=10_000).values.tolist()
    [['chr1-900-950', 'A', -50, 'promoter'], ['chr1-1800-1900', 'A', 800, 'body'], ['chr1-9000-9100', 'A', 8000, 'distal']]
    """
    from scanpy import logging as logg

    from ..core.intervals import near_genes

    for name, value in {"upstream": upstream, "downstream": downstream, "max_distance": max_distance}.items():
        if not 0 <= value < MAX_REACH:
            raise ValueError(f"{name}={value} is not a number of bases, 0 or more and below {MAX_REACH:,}.")
    if var_mod is not None and not is_mudata(data):
        raise ValueError(f"var_mod={var_mod!r} names a modality, but the data is no MuData. Leave var_mod= out.")
    held = holder(data, var_mod)
    if is_mudata(held.data):
        raise ValueError(
            f"The peaks of a MuData are in a modality. Say which, var_mod= (one of {listing(held.data.mod)})."
        )
    peaks, (known, strand) = read_peaks(loaded(held.data.var), held.where), read_genes(genes)
    chromosomes = pd.Index(pd.unique(plain(known.chromosome)))
    rows = np.flatnonzero(np.isin(plain(peaks.chromosome), chromosomes))
    if len(rows) == 0:
        raise ValueError(
            f"No peak of {peaks.where} is on a chromosome of {known.where}: the peaks are on "
            f"{listing(pd.unique(peaks.chromosome), 5)}, the genes on {listing(pd.unique(known.chromosome), 5)}."
        )
    codes, names = pd.factorize(known.names)
    found = near_genes(
        peaks.intervals(chromosomes).of(rows),
        known.intervals(chromosomes),
        strand,
        codes,
        upstream=upstream,
        downstream=downstream,
        max_distance=max_distance,
    )
    first = np.unique(found.peak, return_index=True)[1]
    in_promoter, in_body, near = np.bincount(found.kind[first], minlength=len(PEAK_TYPES))
    logg.info(
        f"{len(peaks.names)} peaks of {held.where}: {in_promoter} in a promoter, {in_body} in the body of a gene, {near} nearer than "
        f"{max_distance} bases to one, {len(peaks.names) - len(first)} without a gene"
    )
    return pd.DataFrame(
        {
            "peak": peaks.names[rows[found.peak]].to_numpy(dtype=object),
            "gene": names[found.gene].to_numpy(dtype=object),
            "distance": found.distance,
            "peak_type": np.array(PEAK_TYPES, dtype=object)[found.kind],
        }
    )
