"""Two SAEs side by side: how messages tell them apart, and the gene sets of both in the same columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse

from . import _schema
from ._data import Data, Holder, holder, is_mudata, listing


def holders(a: Data, b: Data, mod: str | None, mod_b: str | None) -> tuple[Holder, Holder]:
    """Find the objects that two SAEs live in, called a and b; `mod_b` is by default `mod` for a MuData."""
    mod_b = mod if mod_b is None and is_mudata(b) else mod_b
    found = []
    for data, name, modality in ((a, "a", mod), (b, "b", mod_b)):
        held = holder(data, modality)
        found.append(replace(held, where=held.where.replace("mdata" if is_mudata(data) else "adata", name, 1)))
    return found[0], found[1]


@dataclass(frozen=True)
class Terms:
    """Which gene sets were found for which features; the columns are the sets that either table lists, found or not."""

    a: sparse.csr_matrix
    """(h_a, sets), stored where a set was found for a feature."""
    b: sparse.csr_matrix
    """(h_b, sets)"""
    all_found: bool
    """Whether the tables list no set that was not found: what else was tested is then not known."""


def terms(
    a: Holder, key: str, b: Holder, key_b: str, *, collection: str | None, max_padj: float | None, signed: bool
) -> Terms:
    """Read the gene sets of two SAEs.

    Parameters
    ----------
    max_padj
        Sets with an adjusted p-value up to this are found; None for all that are stored.
    signed
        Whether a set of genes that are higher and the same one lower are two different ones.
    """
    tables = [_of(held, name, collection) for held, name in ((a, key), (b, key_b))]
    both, n = pd.concat(tables, ignore_index=True), len(tables[0])
    columns = ["collection", "gene_set", "direction"] if signed else ["collection", "gene_set"]
    term = both.groupby(columns, observed=True, sort=False).ngroup().to_numpy()
    if not np.intersect1d(term[:n], term[n:]).size:
        listed = (listing(table["gene_set"].unique(), 3) for table in tables)
        raise ValueError(
            f"The gene sets of {a.where}.uns[{key!r}] and {b.where}.uns[{key_b!r}] have nothing in common: {' and '.join(listed)}. "
            "Run sae.tl.enrich on both with the same net and collection."
        )
    found = np.ones(len(both), dtype=bool) if max_padj is None else (both["padj"] <= max_padj).to_numpy()
    matrices = []
    for held, name, rows in ((a, key, slice(0, n)), (b, key_b, slice(n, None))):
        names = _schema.feature_names(name, len(_schema.read(held, name)["weights"]["W_dec"]))
        features = names.get_indexer(pd.Index(both["feature"][rows].astype(object)))[found[rows]]
        marks = np.ones(len(features)), (features, term[rows][found[rows]])
        # Of two modalities, a set may be listed twice.
        matrices.append(sparse.csr_matrix(marks, shape=(len(names), term.max(initial=-1) + 1)).sign())
    return Terms(matrices[0], matrices[1], all_found=bool(found.all()))


def _of(held: Holder, key: str, collection: str | None) -> pd.DataFrame:
    table = _schema.table(held, key, "enrichment")
    if collection is None:
        return table
    chosen = table[table["collection"] == collection]
    if chosen.empty:
        raise KeyError(
            f"{held.where}.uns[{key!r}]['enrichment'] has no collection {collection!r}; it has "
            f"{listing(table['collection'].unique())}. Pass one of them as collection=."
        )
    return chosen
