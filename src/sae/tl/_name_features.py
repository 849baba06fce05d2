from __future__ import annotations

from collections.abc import Sequence

from .. import _schema
from .._data import Data, holder
from .._names import SOURCES, names

TABLES = ("labels", "enrichment", "genes")


def name_features(
    data: Data,
    *,
    key: str = "sae",
    mod: str | None = None,
    modality: str | None = None,
    collection: str | None = None,
    groupby: str | None = None,
    by: str | Sequence[str] = SOURCES,
    max_padj: float = 0.05,
    min_auroc: float = 0.8,
    min_f1: float = 0.5,
) -> None:
    """Give every feature a short name, with the evidence: "B cell · CD79A, MS4A1".

    From whatever there is of the results of :func:`sae.tl.score_labels`, :func:`sae.tl.enrich` and :func:`sae.tl.rank_genes`,
    a feature has

    * a label, if its activation tells cells that took no part in any choice: `held_out_auroc` ≥ `min_auroc` and `held_out_f1` ≥
      `min_f1`, with `auroc` > ½ and `padj` ≤ `max_padj`. Of several the one with the highest AUROC. AUROC alone would name
      features of common cells after a rare type in which they are active as well;
    * a gene set, if its genes are higher where the feature is active, with `padj` ≤ `max_padj` and, where cells were permuted,
      `fdr` ≤ `max_padj`. Of several the one with the lowest p-value, then the strongest score;
    * genes that are higher where it is active, with `padj` ≤ `max_padj`, best score first. Without
      `tl.rank_genes` these are the genes that its gene set was found by.

    The name is the first of these that is there, in the order of `by`, followed by the first two genes (one after a meaning of
    more than 22 characters; three where there are only genes), about 40 characters in all. Mitochondrial transcripts, ribosomal
    proteins and MALAT1, which follow how much RNA a cell has, and peaks are passed over as long as there are others. Names of gene
    sets are freed of collection, identifier and underscores. No two features have the same name: from the feature with the highest mean
    activation down, one whose name is taken shows the next gene in place of its last one, up to the tenth, and is numbered after
    that. A feature of which nothing is known is called as its row: "sae_7".

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    modality
        Only genes and gene sets of this modality, of a MuData.
    collection
        Only gene sets of this collection.
    groupby
        Only labels of this column of `obs`: of the cell types, say, and not of the batches.
    by
        What to name a feature by, the preferred one first, from `"label"`, `"gene set"` and `"genes"`. What is left out
        names no feature.
    max_padj
        Only labels, gene sets and genes with an adjusted p-value (and, of gene sets, a false discovery rate) up to this.
    min_auroc, min_f1
        Only labels with held-out scores of at least this.

    Returns
    -------
    Nothing. Writes columns of `uns[key]["features"]`: `name`; `name_from` (`"label"`, `"gene set"`, `"genes"` or `"none"`);
    and the evidence, whatever the name is from: `name_label`, `name_groupby` (its column of `obs`), `name_label_auroc` (held out);
    `name_gene_set`, `name_gene_set_padj`, `name_gene_set_fdr`; `name_genes` (up to ten, separated by ";"). Missing where there is none.

    Raises
    ------
    KeyError
        There are no activations; none of the three verbs has run; no such modality, collection or groupby.
    ValueError
        `by` has something else.

    Notes
    -----
    Names stay as they are when labels, gene sets or genes are computed again: run this verb again too. Figures use the names that
    are stored, and where there are none, those that this verb would give with its defaults.

    Where labels are known they are the better names, so they come first, and where label and gene set disagree the name is the
    label. On four sets of blood cells and one of marrow, trained with three seeds each, the label was the commonest
    among the 20 cells where the feature is most active for 93 % of the 210 features that had one (82 % of 257 with `min_f1=0`). On
    the blood cells, the best set of :func:`sae.datasets.immune_markers` fitted those cells in 68 % of 425 features, and in 81 % of 386 when
    :func:`sae.tl.enrich` ran with `percentile=95`: a feature that is weakly active in many cells is named after what these have
    in common unless only the strongly active ones are compared.

    With a small collection of gene sets, a single permutation of the cells may leave every `fdr` above 0.05 (it is at least one over
    the number of p-values found): run :func:`sae.tl.enrich` with `n_null=5` or more.

    No name is there twice, so names can stand for features: `sc.pl.dotplot(sae.get.activations(adata), names, groupby,
    gene_symbols="name")`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> sae.tl.name_features(adata)
    >>> any(name.startswith("CD19+ B · ") for name in sae.get.features(adata)["name"])
    True
    """
    from scanpy import logging as logg

    held = holder(data, mod)
    stored = _schema.read(held, key)
    if "features" in stored and not any(table in stored for table in TABLES):
        raise KeyError(
            f"{held.where}.uns[{key!r}] has nothing to name features by. Run sae.tl.score_labels, sae.tl.enrich or "
            f"sae.tl.rank_genes(..., key={key!r}) first."
        )
    columns = names(
        data,
        key=key,
        mod=mod,
        modality=modality,
        collection=collection,
        groupby=groupby,
        by=by,
        max_padj=max_padj,
        min_auroc=min_auroc,
        min_f1=min_f1,
    )
    table = stored["features"].drop(columns=columns.columns, errors="ignore").join(columns)
    _schema.write(held, key, {**stored, "features": table})
    counts = columns["name_from"].value_counts()
    logg.info(
        f"named {len(columns)} features",
        deep=f"added\n    {held.where}.uns[{key!r}]['features'], columns 'name...': "
        + ", ".join(f"{count} by {kind}" for kind, count in counts.items()),
    )
