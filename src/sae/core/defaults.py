"""Settings that are chosen from the size of the data, and those of the paper."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .architectures import ARCHITECTURES
from .backend import Settings

CELLS_PER_FEATURE = 24
FEATURES_PER_INPUT = 8
N_FEATURES_RANGE = (64, 8192)
K_SHARE, K_RANGE = 0.3, (4, 64)
DEFAULT_L1 = 1.0
DEFAULT_L0 = 0.1
LEARNING_RATE, STEPS = 8e-3, 2500
STEPS_TIMES_RATE = 9
MORE_THAN_INPUTS = 8
PAPER: dict[str, Any] = {"n_features": 10_000, "l1": 1e-3, "learning_rate": 1e-4, "batch_size": 128, "passes": 500}
"""Of arXiv:2410.11468."""


def choose_settings(
    n: int,
    d: int,
    *,
    architecture: str,
    paper: bool,
    n_effective: float,
    n_features: int | None,
    k: int | Literal["auto"] | None,
    l1: float | None,
    l0: float | None,
    learning_rate: float | None,
    steps: int | None,
    batch_size: int | None,
    n_train: int,
    seed: int,
    device: str,
) -> Settings:
    """Choose from the size of the data what was not given."""
    sparsity = ARCHITECTURES[architecture].sparsity
    n_features = n_features or (PAPER["n_features"] if paper else default_n_features(n, d))
    batch_size = min(batch_size or (PAPER["batch_size"] if paper else default_batch_size(n)), n_train)
    learning_rate = float(
        learning_rate or (PAPER["learning_rate"] if paper else default_learning_rate(sparsity, n_features))
    )
    one_pass = -(-n_train // batch_size)
    if sparsity == "k":
        k = k if isinstance(k, int | np.integer) else default_k(d, n_features)
        if k > n_features:
            raise ValueError(f"k={k} is larger than n_features={n_features}. Choose k up to the number of features.")
    return Settings(
        architecture=architecture,
        n_features=n_features,
        groups=nested_groups(n_features, n_effective) if architecture == "matryoshka" else (n_features,),
        k=int(k) if sparsity == "k" and k is not None else None,
        l1=(PAPER["l1"] if paper else DEFAULT_L1) if sparsity == "l1" and l1 is None else l1,
        l0=DEFAULT_L0 if sparsity == "l0" and l0 is None else l0,
        learning_rate=learning_rate,
        steps=steps or (PAPER["passes"] * one_pass if paper else max(default_steps(sparsity, learning_rate), one_pass)),
        batch_size=batch_size,
        seed=seed,
        device=device,
        paper=paper,
    )


def nested_groups(n_features: int, n_effective: float) -> tuple[int, ...]:
    """Widths of nested dictionaries: eight more than there are effective inputs, doubled up to `n_features`.

    A narrower first one has to merge programs (arXiv:2505.11756), a wider one lets features of single cell types take
    programs over.
    """
    width, widths = round(n_effective) + MORE_THAN_INPUTS, []
    while width < n_features:
        widths.append(width)
        width *= 2
    return (*widths, n_features)


def default_n_features(n: int, d: int) -> int:
    """Largest power of two that leaves 24 cells a feature, within 64 and the power of two from 8 d on (≤ 8,192)."""
    low, high = N_FEATURES_RANGE
    widest = max(low, min(high, 2 ** int(np.ceil(np.log2(FEATURES_PER_INPUT * d)))))
    return int(np.clip(2 ** int(np.log2(max(n // CELLS_PER_FEATURE, 1))), low, widest))


def default_k(d: int, n_features: int) -> int:
    """Three tenths of the embedding's width, between 4 and 64, at most a fourth of the features and at least 1."""
    return max(1, min(int(np.clip(round(K_SHARE * d), *K_RANGE)), n_features // 4))


def default_learning_rate(sparsity: str, n_features: int) -> float:
    """Return 8e-3 where k is set, else 2e-4 · √(16384 / h)."""
    return LEARNING_RATE if sparsity == "k" else float(2e-4 * np.sqrt(16384 / n_features))


def default_steps(sparsity: str, learning_rate: float) -> int:
    """Return 2,500 where k is set, else 9 over the learning rate."""
    return STEPS if sparsity == "k" else round(STEPS_TIMES_RATE / learning_rate)


def default_batch_size(n: int) -> int:
    """Return 256 below 100,000 cells, 1,024 below a million, else 4,096."""
    return 256 if n < 100_000 else 1024 if n < 1_000_000 else 4096
