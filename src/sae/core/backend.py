"""What the training loop asks of a back end: the CPU's compiled one, or torch for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from .architectures import Architecture
from .kernels import BETA_1, BETA_2, EPSILON

FIRST_K_TIMES = 3
Arrays: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    groups
        Widths of nested dictionaries, the last one `n_features`: each must reconstruct on its own.
    k, l1, l0
        How sparse: one of them, as the architecture says.
    paper
        Train as arXiv:2410.11468: errors and penalty averaged over inputs and features, free decoder norms, one rate.
    frozen_decoder
        Leave the decoder as it starts, at random directions.
    """

    architecture: str
    n_features: int
    groups: tuple[int, ...]
    k: int | None
    l1: float | None
    l0: float | None
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    device: str
    paper: bool = False
    frozen_decoder: bool = False


class Backend(Protocol):
    """An SAE in training: weights (`W_enc` and `W_dec` both (h, d)), moments of Adam, and one step of it."""

    threshold: float

    @property
    def last_fired(self) -> np.ndarray:
        """(h,) the last step in which each feature was active."""
        ...

    def step(self, y: np.ndarray, number: int, rate: float, pressure: float = 1.0) -> float:
        """Take step `number` (from 0) on the rows `y` (n, d) and return the loss before it.

        `pressure`, from 0 to 1, is how much of the sparsity is asked for: a share of the L1 or L0 penalty, or
        k · 3^(1 − pressure) active features.
        """
        ...

    def evaluate(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals ŷ − y (n, d) and the number of active features of each row."""
        ...

    def calibrate(self, y: np.ndarray) -> None:
        """Set the threshold at which the rows `y` (n, d) have k active features on average."""
        ...

    def weights(self) -> Arrays:
        """Return the parameters as arrays on the CPU."""
        ...

    def state(self) -> Arrays:
        """Return everything that the next step depends on."""
        ...

    def load(self, state: Arrays) -> None:
        """Go on from a state."""
        ...

    def restart(self, features: np.ndarray, directions: np.ndarray, length: float = 1.0) -> None:
        """Give some features new unit directions (features, d) with encoders of a length; forget what they learned."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


def has_pre_bias(architecture: Architecture, settings: Settings) -> bool:
    """Tell whether a free bias is added to the input: the paper's TopK has one too."""
    return architecture.pre_bias or (settings.paper and architecture.name == "topk")


def step_rate(number: int, rate: float) -> tuple[np.float32, np.float32]:
    """Return Adam's rate and epsilon for step `number` (from 0), with the bias corrections in them."""
    root = np.sqrt(1 - BETA_2 ** (number + 1))
    return np.float32(rate * root / (1 - BETA_1 ** (number + 1))), np.float32(EPSILON * root)


def group_weights(n_groups: int) -> np.ndarray:
    """Return how much each nested dictionary counts: the first most, each next one half as much, 1 together."""
    weights = 0.5 ** np.arange(n_groups)
    return (weights / weights.sum()).astype(np.float32)


def active_features(k: int, pressure: float, n_features: int) -> float:
    """Return how many features may be active on average: `FIRST_K_TIMES` k at first, k in the end."""
    return min(k * FIRST_K_TIMES ** (1 - pressure), max(k, n_features / 2))
