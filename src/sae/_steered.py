"""Where the latent and the predicted expression of steered cells are put."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _schema
from ._data import Data, Holder, is_mudata, modality
from ._prediction import Decoder, Part
from .core.rows import Matrix, dense_rows, row_blocks
from .core.steering import Steps, chunk_rows


@dataclass(frozen=True)
class Added:
    """Where the latent and the prediction of one feature at one dose go; None for nowhere."""

    held: Holder
    key: str | None
    layer: str | None
    genes: Any
    """The AnnData whose layers the prediction is put into."""
    part: int

    def changes(self, step: Steps, rows: np.ndarray, latent: Matrix, decoder: Decoder) -> list[_schema.Change]:
        """Move the cells that are steered, and predict all."""
        if self.key is None and self.layer is None:
            return []
        n = latent.shape[0]
        z = dense_rows(latent, slice(None)).astype(np.float32)
        steps = np.zeros_like(z)
        steps[rows] = step.of(slice(None))
        moved = [] if self.key is None else [_schema.Change(self.held.data, "obsm", self.key, z + steps)]
        if self.layer is None:
            return moved
        names, genes = self.held.data.obs_names, decoder.parts[self.part].genes
        cells, columns = self.genes.obs_names.get_indexer(names), self.genes.var_names.get_indexer(genes)
        layer = np.full(self.genes.shape, np.nan, dtype=np.float32)
        for some in row_blocks(n, chunk_rows([len(part.genes) for part in decoder.parts])):
            values = decoder.decode(z[some], self.held.data[some], steps[some])[self.part]
            layer[np.ix_(cells[some][cells[some] >= 0], columns[columns >= 0])] = values[cells[some] >= 0][
                :, columns >= 0
            ]
        return [*moved, _schema.Change(self.genes, "layers", self.layer, layer)]

    def told(self) -> str:
        """Say what was added, for the log."""
        told = "" if self.key is None else f"\n    {self.held.where}.obsm[{self.key!r}], the steered latent"
        return told if self.layer is None else f"{told}\n    layers[{self.layer!r}], the predicted expression"


def added_to(
    data: Data,
    held: Holder,
    key_added: str | None,
    layer_added: str | None,
    n_steps: int,
    parts: Sequence[Part],
    part: int,
    var_mod: str | None,
) -> Added:
    """Check where results of one feature at one dose may go."""
    for name, given in (("key_added", key_added), ("layer_added", layer_added)):
        if given is not None and n_steps != 1:
            raise ValueError(f"{name}={given!r} holds one feature at one dose; there are {n_steps} of both together.")
        if given is not None and (not given or "/" in given):
            raise ValueError(f"{name}={given!r} cannot name a slot: it must be a non-empty string without '/'.")
    if key_added is not None:
        _schema.check_free(held, key_added)
    genes, wanted = held.data, var_mod or parts[part].modality
    if layer_added is None:
        return Added(held, key_added, None, genes, part)
    if is_mudata(data) and wanted is not None:
        genes = modality(data, wanted)
    if is_mudata(genes):
        raise ValueError(
            "A MuData has no layers, and the model does not say of which modality its prediction is. Pass var_mod=, or leave "
            "layer_added= out."
        )
    if not (genes.obs_names.is_unique and genes.var_names.is_unique and parts[part].genes.is_unique):
        raise ValueError(
            f"layer_added={layer_added!r} puts predictions in their places by name, but names of cells or genes occur more than once. "
            "Make them unique: adata.obs_names_make_unique(), adata.var_names_make_unique()."
        )
    for name in _schema.stored_keys(genes.uns):
        if genes.uns[name]["params"]["layer"] == layer_added:
            raise ValueError(
                f"layers[{layer_added!r}] holds the representation of the SAE {name!r}, and would be overwritten. Choose another "
                "layer_added=."
            )
    return Added(held, key_added, layer_added, genes, part)
