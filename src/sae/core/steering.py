"""Turning a feature up or off: how far its activation takes the latent of each cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np

Intervention = Literal["set", "add", "scale", "ablate"]
INTERVENTIONS: tuple[str, ...] = get_args(Intervention)


def steered_activation(a: np.ndarray, intervention: Intervention, value: float, dose: float) -> np.ndarray:
    """Return the activation a' (n,) of one feature that an intervention leads to; activations are never below 0.

    `"set"`: dose · value; `"add"`: a + dose · value; `"scale"`: dose · a; `"ablate"`: 0.
    """
    if intervention == "set":
        return np.full(len(a), max(dose * value, 0.0))
    if intervention == "add":
        return np.maximum(a + dose * value, 0)
    return np.maximum(dose * a, 0) if intervention == "scale" else np.zeros(len(a))


CHUNK_VALUES = 8_000_000
"""Predicted values held at a time, a few times over (32 MB each)."""

Decode: TypeAlias = Callable[[np.ndarray, np.ndarray, "np.ndarray | None"], list[np.ndarray]]
"""From cells (their positions, m), their latent (m, d) and a step (m, d) to expression: (m, genes) of each modality."""


@dataclass(frozen=True)
class Steps:
    """How far n cells are moved when one feature is steered at one dose: by (a' − a) times its direction.

    Attributes
    ----------
    direction
        (d,), the row of `W_dec`.
    activation
        (n,) of the feature, before.
    intervention, value, dose
        See :func:`steered_activation`.
    offset
        (n, d) a further step, of the published form: from each cell to its reconstruction.
    """

    direction: np.ndarray
    activation: np.ndarray
    intervention: Intervention
    value: float
    dose: float
    offset: np.ndarray | None = None

    @property
    def strength(self) -> float:
        """The activation that is set or added, or the factor."""
        if self.intervention == "set":
            return max(0.0, self.dose * self.value)
        if self.intervention == "add":
            return self.dose * self.value
        return self.dose if self.intervention == "scale" else 0.0

    def amount(self, cells: np.ndarray | slice) -> np.ndarray:
        """Return a' − a (m,) of some cells."""
        a = self.activation[cells].astype(np.float64)
        return steered_activation(a, self.intervention, self.value, self.dose) - a

    def moved(self, cells: np.ndarray | slice) -> np.ndarray:
        """Mark the cells (m,) that are moved at all."""
        amount = self.amount(cells)
        return amount != 0 if self.offset is None else np.ones(len(amount), bool)

    def of(self, cells: np.ndarray | slice) -> np.ndarray:
        """Return the steps (m, d) of some cells, float32."""
        along = self.amount(cells)[:, None] * self.direction
        return (along if self.offset is None else along + self.offset[cells]).astype(np.float32)

    def along(self, direction: np.ndarray) -> Steps:
        """Return steps along another direction, as long as these in every cell."""
        norm = np.linalg.norm(self.direction) / np.linalg.norm(direction)
        return replace(self, direction=direction * norm)


def chunk_rows(n_genes: Sequence[int]) -> int:
    """Cells that are decoded at a time."""
    return max(16, min(4096, CHUNK_VALUES // sum(n_genes)))
