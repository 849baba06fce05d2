"""The network of multiDGD: from latents to the share of each feature in the counts of a cell, and the search for latents.

A latent (d + c) is that of the cell, then that of its covariate, if the model has one. Modalities are numbers here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
import torch
from torch.nn.functional import linear, log_softmax, relu

from .rows import row_blocks

Layers: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"

BLOCK_ROWS = 128
LEARNING_RATE, WEIGHT_DECAY, BETAS = 1e-2, 1e-4, (0.5, 0.7)
"""Of the search for latents, as in the package."""
LEAST_TOTAL = 1e-10
"""Stands for a total of no counts, which has no logarithm."""


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture: means (k, d), logarithms of precisions (k, d) or (k, 1), and of weights (k,)."""

    mean: torch.Tensor
    log_precision: torch.Tensor
    log_weight: torch.Tensor

    def log_density(self, z: torch.Tensor) -> torch.Tensor:
        """Return the log density at each row of `z` (n, d)."""
        squares = ((z[:, None] - self.mean) ** 2 * self.log_precision.exp()).sum(dim=2)
        log_precision = self.log_precision.expand_as(self.mean).sum(dim=1)
        return (self.log_weight + (log_precision - squares - z.shape[1] * math.log(2 * math.pi)) / 2).logsumexp(dim=1)


class Network:
    """A decoder with a head per modality, the dispersion of each feature, and the prior of latents.

    Parameters
    ----------
    state
        Parameters under the names that multiDGD gives them.
    n_modalities
        Number of heads.
    device
        Where they are kept and used.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], n_modalities: int, device: str):
        def get(key: str) -> torch.Tensor:
            return state[key].to(device, torch.float32)

        def layers(key: str) -> Layers:
            # Activations have the odd numbers.
            numbers = [i for i in range(0, len(state), 2) if f"{key}.{i}.weight" in state]
            return [(get(f"{key}.{i}.weight"), get(f"{key}.{i}.bias")) for i in numbers]

        heads = [f"decoder.out_modules.{i}" for i in range(n_modalities)]
        mixtures = [key for key in ("gmm", "correction_gmm") if f"{key}.mean" in state]
        self._device = device
        self._main = layers("decoder.main")
        self._heads = [layers(f"{head}.fc") for head in heads]
        self._r = [get(f"{head}.distribution.log_r").exp() + 1 for head in heads]
        self._priors = [
            Mixture(get(f"{key}.mean"), get(f"{key}.neglogvar"), get(f"{key}.weight").log_softmax(dim=0))
            for key in mixtures
        ]

    @property
    def dispersion(self) -> list[np.ndarray]:
        """(g,) per modality: the variance of counts is mean + mean² / dispersion."""
        return [r[0].cpu().numpy() for r in self._r]

    @property
    def covariate_means(self) -> np.ndarray:
        """(k, c) the latent that each category of the covariate is around."""
        return self._priors[1].mean.cpu().numpy()

    def shares(self, latents: np.ndarray, modalities: Sequence[int]) -> list[np.ndarray]:
        """Map latents (n, d + c) to the share of each feature (n, g)."""
        shares = [np.empty((len(latents), self._r[m].shape[1]), np.float32) for m in modalities]
        for rows in row_blocks(len(latents), BLOCK_ROWS):
            with torch.no_grad():
                found = self._log_shares(torch.from_numpy(latents[rows]).to(self._device), modalities)
            for all_rows, values in zip(shares, found, strict=True):
                all_rows[rows] = values.exp().cpu().numpy()
        return shares

    def search(self, counts: Mapping[int, np.ndarray], n_epochs: int) -> np.ndarray:
        """Find the latents (n, d + c) under which counts (n, g) of one or more modalities are likely.

        Each cell starts at the combination of the components' means that explains its counts best. Then Adam maximises
        log NB(k; m, r) + log p(z). It goes by element, so that no cell depends on others.
        """
        with torch.enable_grad():
            k = {m: torch.from_numpy(values).to(self._device) for m, values in counts.items()}
            starts = torch.stack([torch.cat(means) for means in product(*(prior.mean for prior in self._priors))])
            losses = torch.stack([self._loss(start[None], k) for start in starts])
            z = starts[losses.argmin(dim=0)].requires_grad_()
            optimizer = torch.optim.Adam([z], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS)
            for _ in range(n_epochs):
                optimizer.zero_grad()
                (self._loss(z, k) - self._log_prior(z)).sum().backward()
                optimizer.step()
        return z.detach().cpu().numpy()

    def _log_shares(self, latents: torch.Tensor, modalities: Sequence[int]) -> list[torch.Tensor]:
        shared = latents
        for weight, bias in self._main:
            shared = relu(linear(shared, weight, bias))
        found = []
        for m in modalities:
            (weight, bias), *others = self._heads[m]
            x = linear(shared, weight, bias)
            for weight, bias in others:
                x = linear(relu(x), weight, bias)
            found.append(log_softmax(x, dim=1))
        return found

    def _loss(self, latents: torch.Tensor, counts: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Return −log NB of each cell without the terms that do not depend on the mean."""
        loss = torch.zeros((), device=self._device)
        for (m, k), log_share in zip(counts.items(), self._log_shares(latents, list(counts)), strict=True):
            log_mean = log_share + k.sum(dim=1, keepdim=True).clamp_min(LEAST_TOTAL).log()
            loss = loss + ((k + self._r[m]) * torch.logaddexp(log_mean, self._r[m].log()) - k * log_mean).sum(dim=1)
        return loss

    def _log_prior(self, latents: torch.Tensor) -> torch.Tensor:
        parts = latents.split([prior.mean.shape[1] for prior in self._priors], dim=1)
        return sum(
            (prior.log_density(z) for prior, z in zip(self._priors, parts, strict=True)),
            start=torch.zeros((), device=self._device),
        )
