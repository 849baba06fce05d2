"""Which perturbation each cell has, and which genes it is aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ._data import Data, Holder, is_mudata, listing
from ._design import codes as batches
from ._expression import Expression, expression
from ._lazy import column as read_column


@dataclass(frozen=True)
class PerturbedCells:
    """Perturbations, and which of them each cell has: i + 1 for the i-th, 0 for a control, −1 for a cell without a label."""

    names: pd.Index
    codes: np.ndarray
    strata: np.ndarray
    where: str


@dataclass(frozen=True)
class Targets:
    """Expression, the rows of the holder that have it, and the positions of the targets of each perturbation."""

    expressed: Expression
    rows: np.ndarray | slice
    genes: list[np.ndarray]


def perturbed_cells(held: Holder, groupby: str, control: object, batch: str | None, min_cells: int) -> PerturbedCells:
    """Read which perturbation and which batch each cell has."""
    obs, where = held.data.obs, f"{held.where}.obs[{groupby!r}]"
    if groupby not in obs.columns:
        raise KeyError(f"{held.where}.obs has no column {groupby!r}; it has {listing(obs.columns)}.")
    column = read_column(obs, groupby)
    if pd.api.types.is_float_dtype(column):
        raise ValueError(f"{where} is continuous ({column.dtype}). Pass a column of perturbations as groupby=.")
    labels = pd.Categorical(column).remove_unused_categories()
    names = labels.categories.astype(str)
    if not names.is_unique:
        raise ValueError(f"{where} has labels that read the same as text ({listing(names)}). Rename them.")
    several = isinstance(control, list | tuple | set | np.ndarray | pd.Index | pd.Series)
    controls = pd.Index(list(control) if several else [control]).astype(str)  # type: ignore[call-overload]
    unknown = controls[~controls.isin(names)]
    if len(unknown) or controls.empty:
        raise ValueError(
            f"{where} has no cells of the control {listing(unknown)}; it has {listing(names, 40)}. Pass one or several of these "
            "as control=."
        )
    is_control = names.isin(controls)
    if is_control.all():
        raise ValueError(f"{where} has only the control {listing(names)}; a perturbation is needed as well.")
    codes = np.append(np.where(is_control, 0, np.cumsum(~is_control)), -1)[labels.codes]
    n_control = int((codes == 0).sum())
    if n_control < min_cells:
        raise ValueError(
            f"{where} has {n_control} control cells ({listing(controls)}); min_cells={min_cells} are needed."
        )
    strata = np.zeros(len(codes), dtype=np.int64)
    if batch is not None:
        labelled = np.flatnonzero(codes >= 0)
        strata[labelled] = batches(held, batch, labelled, "batch")
    return PerturbedCells(names[~is_control], codes, strata, where)


def targets_of(
    data: Data,
    held: Holder,
    cells: PerturbedCells,
    target: Mapping[str, str | Sequence[str]] | str | None,
    *,
    layer: str | None,
    var_mod: str | None,
) -> Targets | None:
    """Find the targets among the genes; None where none was asked for, and none goes by its name."""
    wanted = _wanted(held, cells, target)
    if target is None and layer is None and var_mod is None:
        if is_mudata(held.data):
            return None
        known = held.data.var_names if held.data.raw is None else held.data.raw.var_names
        if not known.isin(cells.names).any():
            return None
    expressed, rows = expression(data, held, layer=layer, var_mod=var_mod)
    places = [expressed.genes.get_indexer(pd.Index(genes, dtype=object)) for genes in wanted]
    if target is not None and all((place < 0).all() for place in places):
        asked = list(dict.fromkeys(gene for genes in wanted for gene in genes))
        raise ValueError(
            f"{expressed.where} has none of the targets ({listing(asked)}) among its {len(expressed.genes)} genes, such as "
            f"{listing(expressed.genes[:3])}. Name genes as they are named there, or leave target= out."
        )
    return Targets(expressed, rows, [np.unique(place[place >= 0]) for place in places])


def _wanted(
    held: Holder, cells: PerturbedCells, target: Mapping[str, str | Sequence[str]] | str | None
) -> list[list[str]]:
    """List the target genes of each perturbation."""
    if target is None:
        return [[name] for name in cells.names]
    if isinstance(target, str):
        obs = held.data.obs
        if target not in obs.columns:
            raise KeyError(
                f"{held.where}.obs has no column {target!r}; it has {listing(obs.columns)}. Pass one of them as target=, or a "
                "dict of perturbation and gene."
            )
        column = read_column(obs, target)
        return [
            list(column[cells.codes == number].dropna().astype(str).unique())
            for number in range(1, len(cells.names) + 1)
        ]
    unknown = [name for name in target if str(name) not in cells.names]
    if unknown:
        raise KeyError(
            f"target= names {listing(unknown)}; the perturbations of {cells.where} are {listing(cells.names)}."
        )
    genes = {str(name): [of] if isinstance(of, str) else list(of) for name, of in target.items()}
    return [genes.get(name, []) for name in cells.names]
