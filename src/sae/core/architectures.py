"""The sparse autoencoders that can be trained, and how each one turns pre-activations into activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu", "topk"]


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one sparse autoencoder from another.

    Attributes
    ----------
    name
        The value of `architecture=` in :func:`sae.tl.fit`.
    activation
        `"relu"` keeps every positive pre-activation, `"topk"` the `k` largest of them.
    sparsity
        The setting that makes it sparse: `"k"` or `"l1"`.
    pre_bias
        Whether a free bias is added to the input before the encoder.
    source
        Where it was described.
    """

    name: str
    activation: Activation
    sparsity: Literal["k", "l1"]
    pre_bias: bool
    source: str


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("topk", "topk", "k", False, "Gao et al. 2024, arXiv:2406.04093"),
        Architecture("vanilla", "relu", "l1", False, "Schuster 2024, arXiv:2410.11468 (vanilla)"),
        Architecture("relu", "relu", "l1", True, "Bricken et al. 2023; arXiv:2410.11468 (ReLU, free pre-bias)"),
    )
}
