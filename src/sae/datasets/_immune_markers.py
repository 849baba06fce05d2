from __future__ import annotations

from importlib.resources import files

import pandas as pd


def immune_markers() -> pd.DataFrame:
    """Marker genes of the major human blood and immune cell types, each with the paper that reports it.

    Written for this package from the primary literature; symbols are HGNC's, with an older symbol beside it where it is
    still common in data sets.

    Returns
    -------
    A table with a row per cell type and gene: `source` (cell type), `target` (gene symbol), `reference` (paper with DOI). It
    goes as it is into :func:`sae.tl.enrich`, or into decoupler.

    Examples
    --------
    >>> import sae
    >>> net = sae.datasets.immune_markers()
    >>> net.columns.tolist()
    ['source', 'target', 'reference']
    """
    with files(__package__).joinpath("immune_markers.tsv").open(encoding="utf-8") as lines:
        return pd.read_csv(lines, sep="\t", dtype=str)
