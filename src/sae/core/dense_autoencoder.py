"""A plain autoencoder: fully connected layers from expression to a latent and back, trained with Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch.nn.functional import linear, relu

from .rows import Matrix, dense_rows, row_blocks, shuffled_batches
from .schedule import Schedule

Layers: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
Width: TypeAlias = "int | Literal['narrow', 'wide']"

BLOCK_VALUES = 8_000_000
"""Cells × units of the widest layer that are held at a time (32 MB)."""
FIRST_WIDTH, NEXT_WIDTH = 1000, 150
"""Least widths of the hidden layers of narrow models, the first of several and all others."""


def hidden_widths(n_genes: int, n_latent: int, depth: int, width: Width) -> list[int]:
    """Return the widths of the depth − 1 hidden layers of the encoder, as arXiv:2410.11468 chose them.

    Wide ones fall linearly from half the genes to the latent. Narrow ones have 150 units or twice the latent, the first of
    several 1,000 or twice the latent.
    """
    if width == "wide":
        return [max(1, int(units)) for units in np.linspace(n_genes // 2, n_latent, depth + 1)[1:-1]]
    if width == "narrow":
        first = FIRST_WIDTH if depth > 2 else NEXT_WIDTH
        return [max(least, 2 * n_latent) for least in [first, *[NEXT_WIDTH] * (depth - 2)][: depth - 1]]
    return [width] * (depth - 1)


@dataclass(frozen=True)
class Network:
    """Linear layers with a ReLU between them; weights are (output, input).

    Attributes
    ----------
    rectified
        Whether there is a ReLU on the output, too.
    """

    encoder: Layers
    decoder: Layers
    rectified: bool

    @property
    def n_latent(self) -> int:
        """Dimensions of the latent."""
        return len(self.encoder[-1][1])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Map expression (n, g) to the latent (n, d)."""
        return _through(self.encoder, x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Map the latent (n, d) to expression (n, g)."""
        x = _through(self.decoder, z)
        return relu(x) if self.rectified else x

    def to(self, device: str) -> Network:
        """Return a copy on a device."""
        encoder, decoder = (
            [(weight.detach().to(device), bias.detach().to(device)) for weight, bias in layers]
            for layers in (self.encoder, self.decoder)
        )
        return Network(encoder, decoder, self.rectified)

    def rows(self, n: int) -> Iterator[slice]:
        """Yield blocks of `n` rows that fit in memory in every layer."""
        widest = max(max(weight.shape) for weight, _ in (*self.encoder, *self.decoder))
        return row_blocks(n, max(1, BLOCK_VALUES // widest))


@torch.no_grad()
def encode(network: Network, x: Matrix, columns: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Map some columns of a matrix (n, g), in memory or on disk, to the latent (n, d)."""
    z = np.empty((x.shape[0], network.n_latent), np.float32)
    for rows in network.rows(len(z)):
        z[rows] = network.encode(_tensor(dense_rows(x, rows)[:, columns])).numpy()
    return z


@torch.no_grad()
def decode(network: Network, z: np.ndarray) -> np.ndarray:
    """Map the latent (n, d) to expression (n, g)."""
    x = np.empty((len(z), len(network.decoder[-1][1])), np.float32)
    for rows in network.rows(len(z)):
        x[rows] = network.decode(_tensor(z[rows])).numpy()
    return x


def explained(network: Network, x: Matrix, mean: np.ndarray) -> float:
    """Return R² of the reconstruction, 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; NaN if nothing varies."""
    unexplained = total = 0.0
    for rows in network.rows(x.shape[0]):
        part = dense_rows(x, rows)
        difference = decode(network, encode(network, part)) - part.astype(np.float64)
        unexplained += np.square(difference).sum()
        total += np.square(part - mean).sum()
    return float(1 - unexplained / total) if total > 0 else float("nan")


def train(
    x: Matrix,
    mean: np.ndarray,
    hidden: list[int],
    n_latent: int,
    *,
    rectified: bool,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
    device: str,
    on_step: Callable[[], object],
) -> Network:
    """Minimise the mean of (x − x̂)² over cells and genes with Adam, and return the network on the CPU.

    Weights start as those of torch's linear layers, uniform in ±1/√inputs, and the last bias at the `mean` (g,) of x: an
    output that starts at 0 may never be positive, and then ReLU never lets it learn. The rate warms up over the first 5 %
    of the steps and decays over the last 20 %.
    """
    widths = [x.shape[1], *hidden, n_latent]
    network = Network(_initial(widths, rng, device), _initial(widths[::-1], rng, device), rectified)
    network.decoder[-1][1].copy_(_tensor(mean))
    parameters = [tensor.requires_grad_() for layer in (*network.encoder, *network.decoder) for tensor in layer]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = Schedule(steps)
    batches = shuffled_batches(x, np.arange(x.shape[0]), batch_size, seed=int(rng.integers(2**31)))
    with torch.enable_grad():
        for step, batch in enumerate(islice(batches, steps)):
            y = _tensor(batch).to(device)
            optimizer.param_groups[0]["lr"] = learning_rate * schedule.factor(step)
            loss = (network.decode(network.encode(y)) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_step()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The loss became {loss.item()}. Lower learning_rate={learning_rate}.")
    return network.to("cpu")


def _through(layers: Layers, x: torch.Tensor) -> torch.Tensor:
    (weight, bias), *others = layers
    x = linear(x, weight, bias)
    for weight, bias in others:
        x = linear(relu(x), weight, bias)
    return x


def _initial(widths: list[int], rng: np.random.Generator, device: str) -> Layers:
    return [
        (
            _tensor(rng.uniform(-1, 1, (after, before)) / before**0.5).to(device),
            _tensor(rng.uniform(-1, 1, after) / before**0.5).to(device),
        )
        for before, after in pairwise(widths)
    ]


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
