"""What adapters read of data: cells and genes by their names, and counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from .._data import listing


def unique(names: pd.Index, where: str, remedy: str) -> pd.Index:
    """Refuse names that occur more than once."""
    if not names.is_unique:
        repeated = listing(names[names.duplicated()].unique(), 3)
        raise ValueError(f"{where} has names that occur more than once ({repeated}). Make them unique: {remedy}.")
    return names


def cells_in(names: pd.Index, wanted: pd.Index, where: str) -> np.ndarray:
    """Return the positions of the cells of a MuData (`wanted`) among those of a modality, −1 for those that it lacks.

    A cell may be there several times, if the modality has it as often and in the same places.
    """
    there = wanted.isin(names)
    if wanted[there].equals(names):
        return np.where(there, there.cumsum() - 1, -1)
    return unique(names, where, "obs_names_make_unique()").get_indexer(wanted)


def genes_in(
    names: pd.Index,
    genes: pd.Index,
    where: str,
    what: str,
    reader: str,
    remedy: str = "Use the same annotation, and all genes.",
) -> np.ndarray | slice:
    """Return the positions of all `genes` of a model among the names in data.

    Parameters
    ----------
    what, reader
        What they are, and who needs them: "genes", "the SCVI reads".
    """
    if names.equals(genes):
        return slice(None)
    positions = unique(names, where, "var_names_make_unique()").get_indexer(genes)
    missing = genes[positions < 0]
    if len(missing):
        raise ValueError(
            f"{where} lacks {len(missing)} of the {len(genes)} {what} ({len(missing) / len(genes):.1%}) that "
            f"{reader}: {listing(missing, 5)}. {remedy}"
        )
    return positions


def refuse_fractions(values: Any, genes: pd.Index, where: str, model: str, remedy: str) -> None:
    """Refuse values (n, g), dense or CSR, that are not counts."""
    stored = values.data if sparse.issparse(values) else values
    wrong = ~((stored >= 0) & (stored == np.floor(stored)) & (stored < np.inf))
    if not wrong.any():
        return
    gene = values.indices[wrong][0] if sparse.issparse(values) else np.nonzero(wrong)[1][0]
    raise ValueError(
        f"{where} does not hold counts, which {model} reads: {wrong.sum()} of the {np.prod(values.shape)} values looked at are "
        f"negative or not whole ({stored[wrong][0]:.3g} of {str(genes[gene])!r}, for one). {remedy}"
    )
