"""What is known of the features: statistics, genes, gene sets and labels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder
from .._schema import Features
from ._rows import check_direction, head, in_order, of, plain, rows_of


def features(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the feature table: a row per feature, the columns of `tl.encode` and of the verbs run since.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> list(sae.get.features(adata).columns)
    ['n_cells', 'density', 'mean', 'max', 'dead']
    """
    return _schema.features(holder(data, mod), key)


def genes(
    data: Data,
    feature: Features = None,
    *,
    direction: str | None = None,
    modality: str | None = None,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the genes of features, the most raised first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.rank_genes`.
    feature
        A feature or several, by name or number; by default all.
    direction
        `"up"` or `"down"`: only genes that are higher, or lower, where the feature is active; the latter with the most
        lowered first.
    modality
        Only variables of this modality, of a MuData.
    max_padj
        Only genes with an adjusted p-value up to this.
    n
        At most so many genes per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata)
    >>> len(sae.get.genes(adata, "sae_0", direction="up", n=5))
    5
    """
    check_direction(direction)
    table = rows_of(_schema.table(holder(data, mod), key, "genes"), feature, data, key, mod)
    table = of(table, "modality", modality)
    if direction is not None:
        table = table[table["score"] > 0 if direction == "up" else table["score"] < 0]
    return head(in_order(table, ["score"], [direction == "down"], max_padj), n)


def enrichment(
    data: Data,
    feature: Features = None,
    *,
    collection: str | None = None,
    direction: str | None = None,
    modality: str | None = None,
    max_padj: float | None = None,
    max_fdr: float | None = None,
    redundant: bool = True,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the gene sets of features, the most significant first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.enrich`.
    feature
        A feature or several, by name or number; by default all.
    collection
        Only gene sets of this collection.
    direction
        `"up"` or `"down"`: only sets of genes that are higher, or lower, where the feature is active; `"both"`: only those that
        were found by both together.
    modality
        Only variables of this modality, of a MuData.
    max_padj
        Only sets with an adjusted p-value up to this.
    max_fdr
        Only sets with a false discovery rate up to this; those of a run without a null (`n_null=0`) have none, and are left out.
    redundant
        With `False`, a set is left out when all its genes that stand out (`genes`) are among those of one better set, of the
        same feature and direction, that is not itself left out: nested sets are told once. Sets are compared with all others
        that are asked for, of whatever collection; those without a gene that stands out are kept.
    n
        At most so many sets per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers())
    >>> len(sae.get.enrichment(adata, 0, direction="up", redundant=False, n=1))
    1
    """
    check_direction(direction, "both")
    table = rows_of(_schema.table(holder(data, mod), key, "enrichment"), feature, data, key, mod)
    table = of(table, "modality", modality)
    table = of(table, "collection", collection)
    if direction is not None:
        table = table[table["direction"] == direction]
    table = table.assign(strength=table["score"].abs())
    if max_fdr is not None:
        table = table[table["fdr"] <= max_fdr]
    table = in_order(table, ["pval", "strength"], [True, False], max_padj).drop(columns="strength")
    return head(table if redundant else table[~_covered(table)], n)


def labels(
    data: Data,
    feature: Features = None,
    *,
    groupby: str | None = None,
    label: str | None = None,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the label scores of features, the highest AUROC first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.score_labels`.
    feature
        A feature or several, by name or number; by default all.
    groupby
        Only labels of this column of `obs`.
    label
        Only this label.
    max_padj
        Only scores with an adjusted p-value up to this.
    n
        At most so many labels per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> len(sae.get.labels(adata, label="CD19+ B"))
    32
    """
    table = rows_of(_schema.table(holder(data, mod), key, "labels"), feature, data, key, mod)
    table = of(of(table, "groupby", groupby), "label", label)
    return head(in_order(table, ["auroc"], [False], max_padj), n)


def label_summary(
    data: Data,
    *,
    groupby: str | None = None,
    label: str | None = None,
    source: str | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the best feature of every label, scored on cells that did not choose it, the best known labels first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.score_labels`.
    groupby
        Only labels of this column of `obs`.
    label
        Only this label.
    source
        `"feature"`, or with `baselines=True` also `"gene"` and `"representation"`: only the best one of these.

    Returns
    -------
    A row per label and source; :func:`sae.tl.score_labels` describes the columns.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> bool(sae.get.label_summary(adata, label="CD19+ B")["held_out_auroc"].iloc[0] > 0.9)
    True
    """
    table = _schema.table(holder(data, mod), key, "label_summary")
    table = of(of(of(table, "groupby", groupby), "label", label), "source", source)
    return plain(table.sort_values("held_out_auroc", ascending=False, kind="stable"))


def _covered(table: pd.DataFrame) -> np.ndarray:
    """Mark gene sets whose overlapping genes are all among those of one better set that is kept, in a sorted table."""
    overlaps = table["genes"].cat.remove_unused_categories().cat
    listed = [frozenset(genes.split(";")) if genes else frozenset() for genes in overlaps.categories]
    codes = overlaps.codes.to_numpy()
    covered = np.zeros(len(table), dtype=bool)
    compared = [name for name in ("feature", "direction", "modality") if name in table]
    for rows in table.groupby(compared, observed=True, dropna=False).indices.values():
        kept: list[frozenset[str]] = []
        for row in rows:
            genes = listed[codes[row]]
            covered[row] = bool(genes) and any(genes <= better for better in kept)
            if not covered[row]:
                kept.append(genes)
    return covered
