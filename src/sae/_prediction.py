"""What a pretrained model says of expression, decoded from the latent of some cells whenever it is read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from ._data import Data, in_memory, is_mudata, listing
from .core.rows import Matrix, dense_rows

SCALES = ("log1p", "linear", "log")


@dataclass(frozen=True)
class Part:
    """The genes (or peaks) of one modality that a model predicts, and what it says the values are."""

    modality: str | None
    genes: pd.Index
    scale: str | None
    """`"log1p"`, `"linear"`, `"log"`, or None where the model does not say: `uns["scale"]` of what it returns."""
    uns: Mapping[str, Any] | None


@dataclass(frozen=True)
class Decoder:
    """A model that predicts expression, and the genes that it predicts, which never change."""

    model: Any
    parts: tuple[Part, ...]
    where: str
    intervenes: bool = False
    """Whether the model changes what happens inside it instead of decoding a latent."""

    @classmethod
    def of(cls, model: Any, z: np.ndarray, cell: Data, *, steps: bool = False) -> Decoder:
        """Predict one cell, to see what a model predicts; for `steps` by its method `intervene`, if it has one."""
        where = f"the prediction of {type(model).__name__}"
        intervenes = steps and _has(model, "intervene")
        if not (intervenes or _has(model, "decode")):
            raise TypeError(
                f"model= is a {type(model).__name__}, which has no method decode(z, data). Pass a model, such as "
                "sae.models.PCA(adata) or sae.models.SCVI(trained), or one of your own, whose decode(z, data) returns the "
                "expression for the latent z of the cells in data."
            )
        decoder = cls(model, (), where, intervenes)
        found = decoder._split(decoder._call(z, None, cell), cell)
        return replace(decoder, parts=tuple(part for part, _ in found))

    def decode(self, z: np.ndarray, cells: Data, step: np.ndarray | None = None) -> list[np.ndarray]:
        """Predict some cells at `z` (n, d), or at `z` + `step`: an array (cells × genes) for each part."""
        found = self._split(self._call(z, step, cells), cells)
        for (now, _), before in zip(found, self.parts, strict=False):
            if not now.genes.equals(before.genes):
                raise ValueError(
                    f"{self.where} has {len(now.genes)} genes ({listing(now.genes, 3)}) for {len(z)} cells, and "
                    f"{len(before.genes)} ({listing(before.genes, 3)}) for the first one. decode(z, data) must always return "
                    "the same."
                )
        if [now.modality for now, _ in found] != [before.modality for before in self.parts]:
            raise ValueError(f"{self.where} has other modalities for some cells than for the first one.")
        return [values for _, values in found]

    def _call(self, z: np.ndarray, step: np.ndarray | None, cells: Data) -> Any:
        with warnings.catch_warnings():
            # The same cells at several latents at once.
            warnings.filterwarnings("ignore", "Observation names are not unique")
            if self.intervenes:
                return self.model.intervene(np.zeros_like(z) if step is None else step, cells)
            return self.model.decode(z if step is None else z + step, cells)

    def _split(self, predicted: Any, cells: Data) -> list[tuple[Part, np.ndarray]]:
        if is_mudata(predicted):
            predicted = dict(predicted.mod)
        if not isinstance(predicted, Mapping):
            predicted = {None: predicted}
        return [self._part(modality, values, cells) for modality, values in predicted.items()]

    def _part(self, modality: str | None, predicted: Any, cells: Data) -> tuple[Part, np.ndarray]:
        """Check what was predicted of one modality, and what it is."""
        of_modality = is_mudata(cells) and modality in cells.mod
        genes, scale, uns = cells.mod[modality].var_names if of_modality else cells.var_names, None, None
        if isinstance(predicted, ad.AnnData):
            genes, uns = predicted.var_names, predicted.uns
            scale, predicted = uns.get("scale"), predicted.X
        values = in_memory(predicted, self.where)
        if values.shape != (cells.n_obs, len(genes)):
            raise ValueError(
                f"{self.where} has the shape {values.shape} for {cells.n_obs} cells and {len(genes)} genes. decode(z, data) must "
                "return a row for each cell in data and a column for each of its genes, or an AnnData with genes of its own."
            )
        if scale not in (None, *SCALES):
            raise ValueError(f"{self.where} has uns['scale'] = {scale!r}; it can be {', '.join(map(repr, SCALES))}.")
        return Part(modality, genes, scale, uns), dense_rows(values, slice(None))


def _has(model: Any, method: str) -> bool:
    return callable(getattr(model, method, None))


@dataclass(frozen=True)
class Prediction:
    """A matrix (n, g) of what a model predicts of one modality, decoded whenever rows are read."""

    decoder: Decoder
    number: int
    """Of the modality, among those the model predicts."""
    latent: Matrix
    cells: Data

    dtype = np.dtype(np.float64)

    @property
    def part(self) -> Part:
        """What is predicted."""
        return self.decoder.parts[self.number]

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and predicted genes."""
        return self.cells.n_obs, len(self.part.genes)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Decode some of the cells."""
        return self.decoder.decode(dense_rows(self.latent, rows), self.cells[rows])[self.number]


def predicted(model: object, latent: Matrix, cells: Data, modality: str | None) -> Prediction:
    """Read what a model predicts of a modality, or of the only one it knows.

    Raises
    ------
    NotImplementedError
        The model has no decoder, as it says itself.
    """
    decoder = Decoder.of(model, dense_rows(latent, slice(0, 1)), cells[:1])
    known = [part.modality for part in decoder.parts]
    if len(known) == 1 and known[0] is None:
        return Prediction(decoder, 0, latent, cells)
    if modality not in known:
        raise ValueError(
            f"{decoder.where} is of the modalities {listing(known)}, not of {modality!r}. Pass one of them as var_mod=."
        )
    return Prediction(decoder, known.index(modality), latent, cells)
