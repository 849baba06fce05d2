"""What the features are like beside each other: neighbors, modules, and what gene sets they share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, holder, listing
from .._schema import Features
from ..core.feature_map import common_to_modules
from ._features import enrichment, features, genes
from ._rows import head, in_order, plain, rows_of

IDENTIFIER = re.compile(r"[A-Za-z_]+:\w+")
TOP = "all"
"""What the R package GO.db puts above the three aspects of the Gene Ontology."""


def neighbors(
    data: Data, feature: Features = None, *, n: int | None = None, key: str = "sae", mod: str | None = None
) -> pd.DataFrame:
    """Return the features that are most like others, the most similar first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.feature_map`.
    feature
        A feature or several, by name or number; by default all.
    n
        At most so many neighbors per feature; no more than `tl.feature_map` kept.

    Returns
    -------
    `feature`, `neighbor`, `similarity`: what that is depends on the `space` of :func:`sae.tl.feature_map`. A feature that is like
    no other has no rows.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.feature_map(adata)
    >>> sae.get.neighbors(adata, "sae_3", n=5).columns.tolist()
    ['feature', 'neighbor', 'similarity']
    """
    table = _schema.result(holder(data, mod), key, "feature_map")["neighbors"]
    table = rows_of(table, feature, data, key, mod)
    return head(in_order(table, ["similarity"], [False], None), n)


def modules(
    data: Data,
    *,
    n: int = 3,
    groupby: str | None = None,
    collection: str | None = None,
    max_padj: float = 0.05,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the modules of the feature map, with what their features have more often than the others.

    Gene sets, labels and genes are ordered by the hypergeometric p-value of how many features of the module have them. This is
    for naming modules: p-values are not given, because features of one module share cells.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.feature_map`.
    n
        At most so many gene sets, labels and genes per module.
    groupby
        Only labels of this column of `obs`; by default of all that were scored.
    collection
        Only gene sets of this collection.
    max_padj
        A feature has the gene sets and genes that are higher where it is active, with an adjusted p-value (and, of gene
        sets, a false discovery rate) up to this. It has one label of each column, that of the highest AUROC.

    Returns
    -------
    A row per module, the largest first: `module`, `n_features`, and of what is stored `gene_sets`, `labels` and `genes`,
    separated by "; ".

    Raises
    ------
    KeyError
        There is no map, or there are no labels or gene sets of what was asked for.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> sae.tl.feature_map(adata)
    >>> sae.get.modules(adata).columns.tolist()
    ['module', 'n_features', 'labels']
    """
    held = holder(data, mod)
    _schema.result(held, key, "feature_map")
    stored, table = _schema.read(held, key), features(data, key=key, mod=mod)
    module = table["module"].dropna()
    names = module.cat.categories
    columns: dict[str, object] = {"module": names, "n_features": module.value_counts()[names].to_numpy()}
    if "enrichment" in stored or collection is not None:
        sets = _significant(data, collection, "up", max_padj, max_padj, key, mod)
        columns["gene_sets"] = _most_common(module, sets["feature"], sets["gene_set"], n)
    if "labels" in stored or groupby is not None:
        scored = _schema.table(held, key, "labels")["groupby"].cat.categories
        if groupby is not None and groupby not in scored:
            raise KeyError(f"There are no results for the groupby {groupby!r}; there are for {listing(scored)}.")
        labels = pd.concat([table[f"{name}_label"].dropna().astype(str) for name in scored if groupby in (None, name)])
        columns["labels"] = _most_common(module, labels.index, labels, n)
    if "genes" in stored:
        raised = genes(data, direction="up", max_padj=max_padj, key=key, mod=mod)
        columns["genes"] = _most_common(module, raised["feature"], raised["gene"], n)
    return pd.DataFrame(columns)


def term_features(
    data: Data,
    term: str,
    *,
    collection: str | None = None,
    direction: str | None = "up",
    max_padj: float = 0.05,
    max_fdr: float = 0.05,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the features that have a gene set with given words in its name.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.enrich`.
    term
        Words, each of which must begin a word of the name: "ion homeostasis" finds "Iron ion homeostasis", and so does "homeo
        iron", but not "cation homeostasis". Case does not matter.
    collection
        Only gene sets of this collection.
    direction
        `"up"`, `"down"` or `"both"`, as in :func:`sae.get.enrichment`; None for any.
    max_padj, max_fdr
        Only gene sets with an adjusted p-value, and a false discovery rate where there is one, up to this.

    Returns
    -------
    A row per feature, the most significant first: `feature`; `gene_set`, the best one, and its `padj`; `n_sets`, how many there
    are.

    Raises
    ------
    KeyError
        There is no enrichment, or none of this collection.
    ValueError
        `term` has no words.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers())
    >>> set(sae.get.term_features(adata, "b cell")["gene_set"])
    {'B cell'}
    """
    words = re.findall(r"\w+", term)
    if not words:
        raise ValueError(f"term={term!r} has no words to look for in the names of gene sets.")
    table = _significant(data, collection, direction, max_padj, max_fdr, key, mod)
    every = table["gene_set"].cat.categories
    readable = every.astype(str).str.replace("_", " ")
    found = np.ones(len(every), dtype=bool)
    for word in words:
        found &= readable.str.contains(rf"\b{re.escape(word)}", case=False, regex=True)
    table = table[found[table["gene_set"].cat.codes]]
    counted = table.assign(
        n_sets=table.groupby("feature", observed=True)["gene_set"].transform("size").astype(np.int64)
    )
    return plain(counted.drop_duplicates("feature")[["feature", "gene_set", "padj", "n_sets"]])


def parent_terms(
    data: Data,
    parents: pd.DataFrame,
    *,
    level: int = 1,
    collection: str | None = None,
    direction: str | None = "up",
    max_padj: float = 0.05,
    max_fdr: float = 0.05,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return what part of an ontology each feature's gene sets belong to most often.

    A gene set counts for every ancestor of its term at the level that is asked for, itself included. Of several ancestors
    that are equally frequent, the one with fewer gene sets of all features is taken.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.enrich`.
    parents
        A row per term and parent, as from :func:`sae.io.read_go_terms`: `term`, `parent`, and optionally the `name` of the
        term.
    level
        Steps below the top of the ontology, on the shortest way: 1 for the children of "biological_process".
    collection
        Only gene sets of this collection.
    direction
        `"up"`, `"down"` or `"both"`, as in :func:`sae.get.enrichment`; None for any.
    max_padj, max_fdr
        Only gene sets with an adjusted p-value, and a false discovery rate where there is one, up to this.

    Returns
    -------
    A row per feature, in order: `parent` (its identifier), `name`, `n_sets`, how many gene sets lie below it, and `of_sets`,
    how many have a term at all. Missing for features without such sets.

    Raises
    ------
    KeyError
        There is no enrichment, or none of this collection.
    ValueError
        `parents` lacks a column, has no term of this level, or has none of the gene sets.

    Notes
    -----
    Gene sets are found in the ontology by their whole name or by the identifier in it: "heme metabolic process (GO:0042168)". Terms of
    level 1 are broad, and most features may share one, such as "cellular process"; level 2 tells more.

    Examples
    --------
    >>> import pandas as pd
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers())
    >>> kinds = {
    ...     "B cell": "lymphoid",
    ...     "NK cell": "lymphoid",
    ...     "CD14+ monocyte": "myeloid",
    ...     "lymphoid": "top",
    ...     "myeloid": "top",
    ... }
    >>> parents = pd.DataFrame({"term": kinds.keys(), "parent": kinds.values()})
    >>> sae.get.parent_terms(adata, parents)["parent"].cat.categories.tolist()
    ['lymphoid', 'myeloid']
    """
    above, named = _ontology(parents)
    at_level = _level(above, level)
    table = _significant(data, collection, direction, max_padj, max_fdr, key, mod)
    gene_sets = table["gene_set"].cat.remove_unused_categories().cat.categories.astype(str)
    terms = {gene_set: term for gene_set in gene_sets if (term := _term(gene_set, above)) is not None}
    if len(gene_sets) and not terms:
        raise ValueError(
            f"parents has none of the {len(gene_sets)} gene sets, such as {listing(gene_sets, 3)}. Their names must be its terms, or "
            "have them as in 'heme metabolic process (GO:0042168)'."
        )
    named |= {term: gene_set.partition(f" ({term})")[0] for gene_set, term in terms.items() if term not in named}
    ancestors = {gene_set: sorted(_ancestors(term, above) & at_level) for gene_set, term in terms.items()}
    sets = table[["feature", "gene_set"]].astype(str).drop_duplicates()
    sets = sets[sets["gene_set"].isin(ancestors.keys())]
    every = sets.assign(parent=sets["gene_set"].map(ancestors)).explode("parent").dropna()
    counts = every.groupby(["feature", "parent"]).size().rename("n_sets").reset_index()
    counts["in_all"] = counts.groupby("parent")["n_sets"].transform("sum")
    best = counts.sort_values(["n_sets", "in_all", "parent"], ascending=[False, True, True]).drop_duplicates("feature")
    index = features(data, key=key, mod=mod).index
    best = best.set_index("feature").reindex(index)
    return pd.DataFrame(
        {
            "parent": best["parent"].astype("category"),
            "name": best["parent"].map(lambda term: named.get(term, term), na_action="ignore").astype("category"),
            "n_sets": best["n_sets"],
            "of_sets": sets["feature"].value_counts().reindex(index).astype(np.float64),
        },
        index=index,
    )


def _significant(
    data: Data,
    collection: str | None,
    direction: str | None,
    max_padj: float,
    max_fdr: float,
    key: str,
    mod: str | None,
) -> pd.DataFrame:
    """Return the gene sets of features that hold, the most significant first."""
    table = enrichment(data, collection=collection, direction=direction, max_padj=max_padj, key=key, mod=mod)
    return table[~(table["fdr"] > max_fdr)]


def _most_common(module: pd.Series, feature: Iterable[str], term: Iterable[str], n: int) -> list[str]:
    """List the terms of each module that its features have more often than the others."""
    pairs = pd.DataFrame({"feature": np.asarray(feature, dtype=object), "term": np.asarray(term, dtype=object)})
    pairs = pairs[pairs["feature"].isin(module.index)].drop_duplicates()
    # Numbered as they come, the best first: so ties are in this order.
    codes, terms = pd.factorize(pairs["term"])
    shape = (len(terms), len(module))
    columns = module.index.get_indexer(pd.Index(pairs["feature"]))
    members = sparse.csr_matrix((np.ones(len(codes)), (codes, columns)), shape=shape)
    found = common_to_modules(module.cat.codes.to_numpy(), members)
    sizes = module.cat.codes.value_counts().sort_index().to_numpy()
    more_often = found.overlap / sizes[:, None] > members.getnnz(axis=1) / len(module)
    order = np.argsort(found.log_pval, axis=1, kind="stable")[:, :n]
    return ["; ".join(terms[row[more[row]]]) for row, more in zip(order, more_often, strict=True)]


def _ontology(parents: pd.DataFrame) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the parents of each term, none for those at the top, and the names that are known."""
    missing = [name for name in ("term", "parent") if name not in parents]
    if missing:
        raise ValueError(
            f"parents has the columns {listing(parents.columns)}; it lacks {listing(missing)}. It is a table with a row per term and "
            "parent; rename its columns."
        )
    known = parents.dropna(subset=["term", "parent"])
    known = known[known["parent"] != TOP].astype({"term": str, "parent": str})
    above: dict[str, list[str]] = {term: [] for term in [*parents["term"].dropna().astype(str), *known["parent"]]}
    for term, parent in zip(known["term"], known["parent"], strict=True):
        above[term].append(parent)
    if "name" not in parents:
        return above, {}
    named = parents.dropna(subset=["term", "name"]).astype({"term": str, "name": str})
    return above, dict(zip(named["term"], named["name"], strict=True))


def _level(above: Mapping[str, list[str]], level: int) -> set[str]:
    """Find the terms that are so many steps below the top, on the shortest way."""
    below: dict[str, list[str]] = {}
    for term, parents in above.items():
        for parent in parents:
            below.setdefault(parent, []).append(term)
    reached = current = {term for term, parents in above.items() if not parents}
    for _ in range(level):
        current = {child for term in current for child in below.get(term, ())} - reached
        reached = reached | current
    if level < 0 or not current:
        raise ValueError(f"parents has no terms of level={level}. Level 0 is the top, those below nothing.")
    return current


def _term(gene_set: str, above: Mapping[str, list[str]]) -> str | None:
    """Find the term that a gene set is called by."""
    named = [gene_set, *reversed(IDENTIFIER.findall(gene_set))]
    return next((name for name in named if name in above), None)


def _ancestors(term: str, above: Mapping[str, list[str]]) -> set[str]:
    """Return a term and all that it leads to."""
    found, waiting = {term}, [term]
    while waiting:
        new = set(above[waiting.pop()]) - found
        found |= new
        waiting += new
    return found
