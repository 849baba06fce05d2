"""What is done to the activation of a feature, in which cells, and how far that moves them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from . import _schema
from ._data import Holder, listing
from ._design import label_column
from ._steering import Cohort
from .core.rows import Matrix, dense_rows, select_rows
from .core.steering import INTERVENTIONS, Intervention, Steps


@dataclass(frozen=True)
class Settings:
    """What is done to the activation."""

    intervention: Intervention
    value: float | None
    quantile: float | None
    reference: str | None
    doses: tuple[float, ...]
    groupby: str | None

    def check(self, n_controls: int, n_neighbors: int, n_genes: int | None) -> None:
        """Refuse settings out of range, and those that exclude each other."""
        if self.intervention not in INTERVENTIONS:
            raise ValueError(f"intervention={self.intervention!r} is not one of {', '.join(map(repr, INTERVENTIONS))}.")
        given = {"value": self.value, "quantile": self.quantile, "reference": self.reference}
        given = {name: found for name, found in given.items() if found is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(f'{n}={v!r}' for n, v in given.items())} were given. Pass one of them.")
        if given and self.intervention in ("scale", "ablate"):
            name = next(iter(given))
            raise ValueError(
                f"intervention={self.intervention!r} has no value, but {name}={given[name]!r} was given. Leave it out, or pass "
                "intervention='set' or 'add'."
            )
        if self.value is not None and not (isinstance(self.value, Real) and np.isfinite(self.value)):
            raise ValueError(f"value={self.value!r} is not a finite activation.")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile} is not between 0 and 1.")
        if self.reference is not None and self.groupby is None:
            raise ValueError(f"reference={self.reference!r} is a label. Say of which column of obs with groupby=.")
        if not self.doses or not np.isfinite(self.doses).all():
            raise ValueError(f"doses={list(self.doses)} has to be one finite number or more.")
        if len(set(self.doses)) < len(self.doses):
            raise ValueError(f"doses={list(self.doses)} has a dose twice.")
        if n_controls < 0 or n_neighbors < 1 or (n_genes is not None and n_genes < 1):
            raise ValueError(
                f"n_controls={n_controls} must be 0 or more, n_neighbors={n_neighbors} and n_genes={n_genes} 1 or more."
            )

    def value_of(self, active: np.ndarray, of_reference: float) -> float:
        """Return the activation that a dose of 1 stands for, of one feature.

        Parameters
        ----------
        active
            Its activations above 0.
        of_reference
            Its mean over the cells of the reference.
        """
        if self.value is not None:
            return self.value
        if self.reference is not None:
            return of_reference
        return float(active.mean(dtype=np.float64) if self.quantile is None else np.quantile(active, self.quantile))

    def described(self) -> dict[str, Any]:
        """Return what can be stored."""
        named = {name: getattr(self, name) for name in ("intervention", "value", "quantile", "reference", "groupby")}
        return {**named, "doses": np.array(self.doses)}


def cohort_of(held: Holder, cells: Any, groupby: str | None) -> Cohort:
    """Find the cells to steer, and their labels."""
    n, wanted = held.data.n_obs, _selected(held, cells)
    if groupby is None:
        codes, names = np.zeros(n, dtype=np.int64), pd.Index(["all"])
    else:
        found = label_column(held.data.obs, groupby, held.where)
        codes, names = found.codes.astype(np.int64), found.categories.astype(str)
    rows = np.flatnonzero(wanted & (codes >= 0))
    if len(rows) == 0:
        raise ValueError(
            f"There is no cell of {held.where} to steer: cells= selects {int(wanted.sum())}, and none of them has a label."
        )
    present, own = np.unique(codes[rows], return_inverse=True)
    return Cohort(rows, own.astype(np.int64), names[present], codes, names)


def _selected(held: Holder, cells: Any) -> np.ndarray:
    """Mark the cells (N,) that a mask or names stand for."""
    n, names = held.data.n_obs, held.data.obs_names
    if cells is None:
        return np.ones(n, dtype=bool)
    given = np.atleast_1d(np.asarray(cells))
    if given.dtype != bool:
        missing = given[~pd.Index(given).isin(names)]
        if len(missing):
            raise KeyError(f"{held.where} has no cells {listing(missing, 5)}. Pass names of obs_names, or a mask.")
        return names.isin(given)
    if given.shape != (n,):
        raise ValueError(f"cells= is a mask of shape {given.shape}; {held.where} has {n} cells.")
    if not isinstance(cells, pd.Series) or cells.index.equals(names):
        return given
    place = cells.index.get_indexer(names) if cells.index.is_unique else np.array([-1])
    if np.any(place < 0):
        raise ValueError(
            f"cells= is a mask whose index is not the obs_names of {held.where}. Pass cells.to_numpy() if it has their order."
        )
    return given[place]


def steps_of(
    held: Holder,
    key: str,
    a: sparse.csr_matrix,
    latent: Matrix,
    chosen: np.ndarray,
    cohort: Cohort,
    how: Settings,
    reconstruct: bool,
) -> list[Steps]:
    """Work out how far each feature moves each cell at each dose."""
    sae, rows = _schema.model(_schema.read(held, key)), cohort.rows
    columns = sparse.csc_matrix(a[:, chosen])
    names = _schema.feature_names(key, a.shape[1])
    valued = how.intervention in ("set", "add")
    silent = chosen[columns.getnnz(axis=0) == 0]
    if len(silent) and valued and how.value is None:
        raise ValueError(
            f"{listing(names[silent], 5)} is active in no cell, so that there is no activation to set it to. Pass value=, or "
            "leave these features out."
        )
    of_reference = np.full(len(chosen), np.nan)
    if how.reference is not None:
        if how.reference not in cohort.all_labels:
            raise KeyError(
                f"{held.where}.obs[{how.groupby!r}] has no label {how.reference!r}; it has {listing(cohort.all_labels)}. Pass "
                "one as reference=."
            )
        inside = cohort.all_codes == cohort.all_labels.get_loc(how.reference)
        of_reference = np.asarray(columns[inside].astype(np.float64).mean(axis=0)).ravel()
    offset = sae.decode(a[rows]) - dense_rows(select_rows(latent, rows), slice(None)) if reconstruct else None
    steps = []
    for number, feature in enumerate(chosen):
        active = columns.data[columns.indptr[number] : columns.indptr[number + 1]]
        value = how.value_of(active, of_reference[number]) if valued else np.nan
        activation = columns[:, [number]].toarray().ravel()[rows]
        steps += [Steps(sae.W_dec[feature], activation, how.intervention, value, dose, offset) for dose in how.doses]
    return steps
