"""The sparse autoencoders that can be trained, and how each one turns pre-activations into activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu", "topk", "threshold"]


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one sparse autoencoder from another.

    Attributes
    ----------
    name
        The value of `architecture=` in :func:`sae.tl.fit`.
    activation
        `"relu"` keeps every positive pre-activation of a cell, `"topk"` the `k` largest of them, `"threshold"` those
        above the feature's threshold.
    sparsity
        The setting that makes it sparse: `"k"`, `"l1"` or `"l0"`.
    pre_bias
        Whether a free bias is added to the input before the encoder.
    compiled
        Whether the compiled CPU back end can train it; torch can train all.
    source
        Where it was described.
    """

    name: str
    activation: Activation
    sparsity: Literal["k", "l1", "l0"]
    pre_bias: bool
    compiled: bool
    source: str


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("topk", "topk", "k", False, True, "Gao et al. 2024, arXiv:2406.04093"),
        Architecture("batchtopk", "threshold", "k", False, True, "Bussmann et al. 2024, arXiv:2412.06410"),
        Architecture("matryoshka", "threshold", "k", False, True, "Bussmann et al. 2025, arXiv:2503.17547"),
        Architecture("vanilla", "relu", "l1", False, True, "Schuster 2024, arXiv:2410.11468 (vanilla)"),
        Architecture("relu", "relu", "l1", True, True, "Bricken et al. 2023; arXiv:2410.11468 (ReLU, free pre-bias)"),
        Architecture("jumprelu", "threshold", "l0", False, False, "Rajamanoharan et al. 2024, arXiv:2407.14435"),
        Architecture("gated", "threshold", "l1", False, False, "Rajamanoharan et al. 2024, arXiv:2404.16014"),
    )
}
