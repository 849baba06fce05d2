"""What `tl.steer` stored of one feature, as figures need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from .. import get
from ._style import GREY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._data import Data

CONTROLS: dict[str, tuple[str, dict[str, Any]]] = {
    "of_features": (
        "random features, mean",
        {"color": GREY, "marker": "s", "linestyle": "--", "markerfacecolor": "none"},
    ),
    "of_directions": ("random directions, mean", {"color": GREY, "marker": "x", "linestyle": ":"}),
}

CHANGE = "mean change of prediction"


class Steered:
    """The stored tables of one feature."""

    def __init__(self, data: Data, name: str, label: str | None, modality: str | None, key: str, mod: str | None):
        self.name, self.label = name, label
        self._data, self._modality = data, modality
        self._where: dict[str, Any] = {"key": key, "mod": mod}
        self.doses = self.table("doses")
        if self.doses.empty:
            known = get.steering(data, table="doses", **self._where)["feature"].unique()
            raise KeyError(f"{name} was not steered; {', '.join(known)} were. Run sae.tl.steer with it first.")

    def table(self, name: str, label: str | None = None, modality: str | None = None) -> pd.DataFrame:
        """Return one of the tables of `tl.steer`."""
        return get.steering(self._data, self.name, table=name, label=label, modality=modality, **self._where)

    def dose(self, asked: float | None) -> float:
        """Choose a dose among those there are."""
        known = self.doses["dose"]
        if asked is None:
            return 1.0 if (known == 1).any() else float(known.max())
        if not (known == asked).any():
            raise KeyError(f"{self.name} was not steered at dose={asked}; it was at {', '.join(map(str, known))}.")
        return asked

    def changes(self) -> tuple[pd.DataFrame, int]:
        """Return the changes of genes, those of the same name told apart by modality, and over how many labels they are averaged."""
        found = self.table("genes", self.label, self._modality)
        n_labels = 1 if self.label is not None else max(1, self.table("labels")["label"].nunique())
        gene = found["gene"].astype(str)
        if "modality" in found:
            modality = found["modality"].astype(str)
            several = modality.groupby(gene).transform("nunique") > 1
            gene = gene.where(~several, gene + " (" + modality + ")")
        return found.assign(gene=gene), n_labels


def known_genes(asked: Sequence[str], known: pd.Index, where: str) -> list[str]:
    """Return genes without repeats, or say which there are none of."""
    asked = [asked] if isinstance(asked, str) else list(dict.fromkeys(asked))
    missing = [gene for gene in asked if gene not in known]
    if missing or not asked:
        raise KeyError(
            f"{missing[0] if missing else 'No gene'!r} is not among the {len(known)} genes stored {where}, such as "
            f"{', '.join(known[:5])}. Pass others as genes=, or run sae.tl.steer with n_genes=None to store all."
        )
    return asked
