"""What a model of scvi-tools reads of the data, and where: counts, batches and covariates, as its registry has them.

scvi-tools itself registers an object before it reads it, which writes into it and keeps it in memory for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._data import Data, holder, is_mudata, listing, modality, readable
from ..core.rows import select_rows, take_rows
from ._reading import cells_in, genes_in, refuse_fractions

if TYPE_CHECKING:
    import anndata as ad


@dataclass(frozen=True)
class Column:
    """A column of `obs` that a model reads: as codes of the categories it knows, or as numbers.

    Attributes
    ----------
    mod
        The modality of a MuData whose `obs` it is in, None for the object itself.
    what
        What it is for the model, for messages.
    """

    name: str
    mod: str | None
    categories: pd.Index | None
    what: str

    def read(self, data: Data) -> np.ndarray:
        """Return codes, or float32, of the cells in `data`."""
        if self.categories is not None and len(self.categories) == 1:
            return np.zeros(data.n_obs, dtype=np.int64)
        obs, where = data.obs, "mdata.obs" if is_mudata(data) else "adata.obs"
        if self.mod is not None and is_mudata(data):
            part, where = modality(data, self.mod), f"mdata.mod[{self.mod!r}].obs"
            cells = cells_in(part.obs_names, data.obs_names, where)
            obs = part.obs.reset_index(drop=True).reindex(cells).set_axis(data.obs_names)
        hint = f" Or pass batch= to decode all cells as of {listing(self.categories)}." if self.what == "batch" else ""
        if self.name not in obs:
            raise KeyError(f"{where} has no column {self.name!r}, which the model reads as {self.what}.{hint}")
        if self.categories is not None:
            return self._codes(obs[self.name], f"{where}[{self.name!r}]", hint)
        numbers = obs[self.name].to_numpy(np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError(f"{where}[{self.name!r}] is NaN or infinite for {(~np.isfinite(numbers)).sum()} cells.")
        return numbers

    def _codes(self, values: pd.Series, where: str, hint: str) -> np.ndarray:
        found, known = pd.Categorical(values), self._known()
        # The last is that of missing values, whose code is −1.
        codes = np.append(known.get_indexer(found.categories.astype(str)), -1)[found.codes]
        unknown = values[codes < 0]
        if len(unknown):
            raise ValueError(
                f"{where} has {len(unknown)} cells of {listing(unknown.unique(), 5)}, which the model does not know as "
                f"{self.what}; it knows {listing(known)}.{hint}"
            )
        return codes

    def _known(self) -> pd.Index:
        """Return the categories as text, which files turn numbers into."""
        return pd.Index([] if self.categories is None else self.categories).astype(str)

    def code(self, category: object) -> int:
        """Return the code of a category."""
        known = self._known()
        if self.name.startswith("_scvi"):
            raise ValueError(f"batch={category!r}, but the model was set up without batch_key=. Leave batch= out.")
        if str(category) not in known:
            raise ValueError(f"The model does not know the batch {category!r}; it knows {listing(known)}.")
        return int(known.get_indexer(pd.Index([str(category)]))[0])


@dataclass(frozen=True)
class Counts:
    """The counts of one modality that a model reads, and predicts.

    Attributes
    ----------
    mod, layer
        Where they are: a modality of a MuData, or None for an AnnData; a layer, or None for X.
    rna
        Whether this is expression, else accessibility.
    whole
        Whether only whole numbers will do.
    model
        Name of the model, for messages.
    """

    mod: str | None
    layer: str | None
    genes: pd.Index
    rna: bool
    whole: bool
    model: str

    @property
    def name(self) -> str:
        """What predictions of it are called."""
        return self.mod or "rna"

    def reader(self, data: Data) -> Callable[[slice], np.ndarray]:
        """Return what reads the counts of some of the cells as float32, with the genes in the order of the model."""
        adata, where = self._holder(holder(data, None).data)
        matrix, place = adata.X, f"{where}.X"
        if self.layer is not None:
            if self.layer not in adata.layers:
                raise KeyError(
                    f"{where}.layers has no {self.layer!r}, where the {self.model} was set up to read counts; it has "
                    f"{listing(adata.layers)}."
                )
            matrix, place = adata.layers[self.layer], f"{where}.layers[{self.layer!r}]"
        what = "genes" if self.rna else "regions"
        columns = genes_in(adata.var_names, self.genes, where, what, f"the {self.model} reads")
        places = np.arange(data.n_obs) if adata is data else cells_in(adata.obs_names, data.obs_names, where)
        there = places >= 0
        selected, before = select_rows(readable(matrix, place), places[there]), np.append(0, there.cumsum())

        def read(rows: slice) -> np.ndarray:
            part = take_rows(selected, slice(before[rows.start], before[rows.stop]))[:, columns]
            part = np.asarray(part.toarray() if hasattr(part, "toarray") else part, dtype=np.float32)
            if self.whole:
                refuse_fractions(part, self.genes, place, f"the {self.model}", "Put the counts there.")
            if there[rows].all():
                return part
            # Of a cell that a modality lacks, there are no counts.
            padded = np.zeros((rows.stop - rows.start, part.shape[1]), dtype=np.float32)
            padded[there[rows]] = part
            return padded

        return read

    def _holder(self, data: Data) -> tuple[ad.AnnData, str]:
        if (self.mod is not None) == is_mudata(data):
            return (data, "adata") if self.mod is None else (modality(data, self.mod), f"mdata.mod[{self.mod!r}]")
        if self.mod is None:
            raise TypeError(
                f"The {self.model} reads an AnnData: pass a modality of the MuData, one of {listing(data.mod)}."
            )
        raise TypeError(
            f"The {self.model} reads counts from a MuData with the modality {self.mod!r}, and got an AnnData."
        )


def counts(fields: Mapping[str, Any], model: str, *, whole: bool) -> list[Counts]:
    """Find the counts of each modality, in the order in which a model reads them."""
    found = []
    for key in ("X", "atac"):
        if key in fields:
            place, genes = fields[key]["data_registry"], fields[key]["state_registry"]["column_names"]
            found.append(Counts(place.get("mod_key"), place["attr_key"], pd.Index(genes), key == "X", whole, model))
    return found


def columns(fields: Mapping[str, Any]) -> tuple[Column, list[Column], list[Column], Column | None]:
    """Find batches, categorical and continuous covariates, and the size factor of RNA."""

    def read(key: str) -> tuple[Mapping[str, Any], str | None]:
        field = fields.get(key, {})
        return field.get("state_registry", {}), field.get("data_registry", {}).get("mod_key")

    state, mod = read("batch")
    batches = Column(state["original_key"], mod, pd.Index(state["categorical_mapping"]), "batch")
    state, mod = read("extra_categorical_covs")
    categories = [
        Column(name, mod, pd.Index(state["mappings"][name]), "covariate") for name in state.get("field_keys", ())
    ]
    state, mod = read("extra_continuous_covs")
    numbers = [Column(name, mod, None, "covariate") for name in state.get("columns", ())]
    # MULTIVI has one of each modality, of which the first is that of RNA.
    state, mod = read("size_factor")
    place = fields.get("size_factor", {}).get("data_registry", {})
    name = state["columns"][0] if "columns" in state else place.get("attr_key")
    return batches, categories, numbers, None if name is None else Column(name, mod, None, "size factor")
