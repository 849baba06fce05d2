"""The expression that features are read against: measured, or what a model predicts, and what its values are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd

from ._data import LARGEST, Data, Holder, is_mudata, layer_matrix, listing, modality, readable, refuse_non_finite
from ._prediction import Prediction, predicted
from .core.rows import Columns, Matrix, on_disk, select_rows, take_rows

if TYPE_CHECKING:
    from .core.moments import Genes

Scale: TypeAlias = Literal["log1p", "counts", "linear", "scaled"]

STATED: dict[str, Scale] = {"log1p": "log1p", "linear": "linear", "log": "scaled"}
"""What a model says of its predictions; there is no ratio of means of logarithms."""
MAX_LOG1P = 50
"""No log1p of a count reaches this: it would be 5e21 counts."""


@dataclass(frozen=True)
class Expression:
    """Expression (n, g), in memory or read by rows, its genes, and what its values are.

    Attributes
    ----------
    summary
        What a pass over the cells tells of each gene.
    scale
        `"log1p"`, `"counts"` (all integers), `"linear"` (too large for logarithms) or `"scaled"` (some are negative).
    log_base
        The base of log1p values; None for counts and linear values; NaN for scaled ones, of which there is no fold change.
    """

    matrix: Matrix
    genes: pd.Index
    where: str
    summary: Genes
    scale: Scale
    log_base: float | None


def expression(
    data: Data,
    held: Holder,
    *,
    layer: str | None,
    use_raw: bool | None = None,
    var_mod: str | None = None,
    model: object | None = None,
    latent: Matrix | None = None,
) -> tuple[Expression, np.ndarray | slice]:
    """Read expression for the cells of an SAE, or what a model predicts it to be from their `latent` (n, d).

    The cells are gone through once. Values that are recognised as other than log1p values are warned of in the log.

    Returns
    -------
    The expression, and the rows of the holder that it has values for (in the same order as the expression).
    """
    from .core.moments import scan

    stated = None
    source, where = _source(data, held, var_mod, model)
    cells, selected = _matched(held, source, where)
    if model is None:
        stored, genes, place = _expression_matrix(source, where, layer, use_raw)
        matrix, uns = select_rows(stored, cells), source.uns
    else:
        if layer is not None or use_raw:
            asked = "use_raw=True" if layer is None else f"layer={layer!r}"
            raise ValueError(f"Both model= and {asked} were given. Pass one of them.")
        stored = matrix = _predicted(data, held, source, model, latent, cells, selected, var_mod)
        genes, place = matrix.part.genes, matrix.decoder.where
        uns = source.uns if matrix.part.uns is None else matrix.part.uns
        stated = matrix.part.scale
        if var_mod is not None and matrix.part.modality is None and not is_mudata(data):
            raise ValueError(f"var_mod={var_mod!r} names a modality, but {place} has none. Leave var_mod= out.")
    if len(genes) == 0 or matrix.shape[0] == 0:
        raise ValueError(f"{place} has {'no genes' if len(genes) == 0 else 'no cells'}: there is nothing to compare.")
    if not genes.is_unique:
        repeated = genes[genes.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene names of {place} occur more than once ({listing(repeated, 5)}). "
            "Make them unique: adata.var_names_make_unique()."
        )
    summary = scan(matrix)
    missing = summary.n_bad == matrix.shape[0]
    if model is not None and missing.any() and not missing.all():
        stored = matrix = Columns(matrix, np.flatnonzero(~missing))
        genes, summary = genes[~missing], summary.of(~missing)
    if summary.n_bad.any() or max(summary.highest.max(), -summary.lowest.min()) > LARGEST:
        refuse_non_finite(stored, place)
    scale = recognised_scale(summary) if stated is None else STATED[stated]
    if stated is None and scale != "log1p":
        _warn_of_scale(scale, summary, genes, place)
    log_base = {"log1p": log1p_base(uns), "scaled": np.nan}.get(scale)
    return Expression(matrix, genes, place, summary, scale, log_base), selected


def _source(data: Data, held: Holder, var_mod: str | None, model: object | None) -> tuple[ad.AnnData, str]:
    """Find the AnnData whose genes are meant; a model may predict other modalities for it."""
    if not is_mudata(data):
        if var_mod is not None and model is None:
            raise ValueError(f"var_mod={var_mod!r} names a modality, but the data is an AnnData. Leave var_mod= out.")
        return held.data, held.where
    if var_mod is not None:
        return modality(data, var_mod), f"mdata.mod[{var_mod!r}]"
    if is_mudata(held.data):
        raise ValueError(
            f"The SAE lives on the MuData itself. Say whose genes to read with var_mod= (one of {listing(data.mod)})."
        )
    return held.data, held.where


def _matched(held: Holder, source: ad.AnnData, where: str) -> tuple[np.ndarray, np.ndarray | slice]:
    """Match cells by name: their rows in the source, rising since that may be on disk, and the same cells in the holder."""
    from scanpy import logging as logg

    if source is held.data:
        return np.arange(source.n_obs), slice(None)
    if not source.obs_names.is_unique:
        raise ValueError(
            f"{where} has cell names that occur more than once, so cells cannot be matched by name. "
            "Make them unique: obs_names_make_unique()."
        )
    position = source.obs_names.get_indexer(held.data.obs_names)
    selected = np.argsort(position, kind="stable")[np.count_nonzero(position < 0) :]
    if len(selected) == 0:
        raise ValueError(f"No cell of {held.where} is in {where}: their obs_names have nothing in common.")
    missing, unused = held.data.n_obs - len(selected), source.n_obs - len(selected)
    if missing or unused:
        say = logg.warning if missing else logg.info
        say(
            f"{len(selected)} cells are in {held.where} and in {where}; {missing} are only in the former and {unused} only in the "
            "latter: they take no part."
        )
    return position[selected], selected


def cells_of(a: Matrix, rows: np.ndarray | slice) -> Matrix:
    """Return the activations of the cells that :func:`expression` has values for, in its order.

    On disk they can only be read in their own order, in which expression is unless cells were matched by name: all of them come
    into memory then.
    """
    if isinstance(rows, slice):
        return a
    if on_disk(a) and (np.diff(rows) < 0).any():
        a = take_rows(a, slice(None))
    return select_rows(a, rows)


def _predicted(
    data: Data,
    held: Holder,
    source: ad.AnnData,
    model: object,
    latent: Matrix,
    cells: np.ndarray,
    selected: np.ndarray | slice,
    var_mod: str | None,
) -> Prediction:
    """Read what a model predicts for the cells of an SAE; it is given the object that the SAE is of, with all modalities."""
    if not isinstance(selected, slice):
        latent = select_rows(latent, selected)
    joint = is_mudata(held.data)
    of = held.data[selected] if joint else source if isinstance(selected, slice) else source[cells]
    return predicted(model, latent, of, var_mod)


def _expression_matrix(
    source: ad.AnnData, where: str, layer: str | None, use_raw: bool | None
) -> tuple[Matrix, pd.Index, str]:
    if layer is not None:
        if use_raw:
            raise ValueError(f"Both layer={layer!r} and use_raw=True were given. Pass one of them.")
        (matrix, place), genes = layer_matrix(source, where, layer), source.var_names
    elif use_raw or (use_raw is None and source.raw is not None):
        if source.raw is None:
            raise ValueError(f"use_raw=True, but {where}.raw is not set.")
        matrix, genes, place = source.raw.X, source.raw.var_names, f"{where}.raw.X"
    else:
        matrix, genes, place = source.X, source.var_names, f"{where}.X"
    if isinstance(matrix, ad.abc.CSCDataset):
        raise ValueError(
            f"{place} is stored by columns (CSC) on disk, from where rows cannot be read without all the rest. Store it by "
            "rows: load it, convert it with .tocsr(), and write it again."
        )
    return readable(matrix, place), genes, place


def recognised_scale(summary: Genes) -> Scale:
    """Tell from their range and from whether they are integers what expression values are."""
    if summary.lowest.min(initial=0) < 0:
        return "scaled"
    if summary.whole.all():
        return "counts"
    return "linear" if summary.highest.max(initial=0) >= MAX_LOG1P else "log1p"


def _warn_of_scale(scale: Scale, summary: Genes, genes: pd.Index, place: str) -> None:
    """Say in the log how values that are not log-normalised were recognised, and what follows."""
    from scanpy import logging as logg

    values = summary.lowest if scale == "scaled" else summary.highest
    gene = int(values.argmin() if scale == "scaled" else values.argmax())
    found = f"{values[gene]:.3g}, of {genes[gene]!r}"
    logg.warning(
        {
            "counts": f"{place} holds integers, probably counts (up to {found}): features that follow the library size will "
            "seem to regulate every gene. Pass log-normalised values (sc.pp.normalize_total, sc.pp.log1p).",
            "linear": f"{place} is not log-transformed: it has values up to {found}, and no logarithm of a count reaches "
            f"{MAX_LOG1P}. Fold changes are ratios of plain means. Pass log-normalised values (sc.pp.log1p).",
            "scaled": f"{place} looks scaled: it has negative values (down to {found}). There are no fold changes of such "
            "values: log2fc is NaN. Pass layer= with log-normalised values, or keep them in adata.raw.",
        }[scale]
    )


def log1p_base(uns: Mapping[str, Any]) -> float:
    """Return the base of log1p values, as Scanpy recorded it or else e."""
    recorded = uns.get("log1p")
    base = recorded.get("base") if isinstance(recorded, Mapping) else None
    return math.e if base is None else float(base)
