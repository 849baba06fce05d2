"""Training steps with torch, for every architecture and device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .architectures import Architecture
from .backend import Arrays, Settings, active_features, group_weights, has_pre_bias

INITIAL_THRESHOLD = 0.1
BANDWIDTH = 0.2
"""Of JumpReLU, in units of the training space, where the mean squared norm of a cell is the number of inputs."""


class TorchBackend:
    """An SAE in training on any torch device."""

    def __init__(self, arrays: Arrays, architecture: Architecture, settings: Settings):
        h, d = arrays["W_enc"].shape
        self.settings, self.architecture = settings, architecture
        self.device = torch.device(settings.device)
        start = dict(arrays)
        if has_pre_bias(architecture, settings):
            start.setdefault("b_pre", np.zeros(d))
        if architecture.name == "jumprelu":
            start.setdefault("log_threshold", np.full(h, np.log(INITIAL_THRESHOLD)))
        if architecture.name == "gated":
            start.setdefault("log_scale", np.zeros(h))
            start.setdefault("b_gate", np.zeros(h))
        self._parameters = {
            name: torch.tensor(value, dtype=torch.float32, device=self.device, requires_grad=True)
            for name, value in start.items()
        }
        if settings.frozen_decoder:
            # Without a gradient Adam leaves it alone.
            self._parameters["W_dec"].requires_grad_(False)
        self._fused = self.device.type != "mps"
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=settings.learning_rate, fused=self._fused)
        self._group_weights = torch.from_numpy(group_weights(len(settings.groups))).to(self.device)
        self._last_fired = torch.zeros(h, dtype=torch.long, device=self.device)
        self.threshold, self._pressure = 0.0, 1.0

    @property
    def last_fired(self) -> np.ndarray:
        """(h,) the last step in which each feature was active."""
        return self._last_fired.cpu().numpy()

    def close(self) -> None:
        """Do nothing: torch frees its memory."""

    def step(self, y: np.ndarray, number: int, rate: float, pressure: float = 1.0) -> float:
        """Take step `number` (from 0) on the rows `y` (n, d) and return the loss before it.

        `pressure` is explained at :class:`Backend`.
        """
        self._optimizer.param_groups[0]["lr"] = rate
        self._pressure = pressure
        loss, active = self._loss(self._load(y))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            if not (self.settings.paper or self.settings.frozen_decoder):
                W_dec = self._parameters["W_dec"]
                W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
            self._last_fired[active.any(dim=0)] = number
        return loss.item()

    @torch.no_grad()
    def evaluate(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals ŷ − y (n, d) and the number of active features of each row; nothing is learned."""
        residuals, counts = np.empty_like(y), np.empty(len(y), np.int64)
        for start in range(0, len(y), self.settings.batch_size):
            rows = slice(start, start + self.settings.batch_size)
            part = self._load(y[rows])
            activations, _ = self._activate(part, learn=False)
            *_, reconstruction = self._reconstructions(activations)
            residuals[rows] = (reconstruction - part).cpu().numpy()
            counts[rows] = (activations > 0).sum(dim=1).cpu().numpy()
        return residuals, counts

    @torch.no_grad()
    def calibrate(self, y: np.ndarray) -> None:
        """Set the threshold at which the rows `y` (n, d) have k active features on average.

        Half-way between the last that is in and the first that is out, so that rounding on another machine moves neither.
        """
        k, size = self.settings.k or 1, self.settings.batch_size
        largest = torch.zeros(0, device=self.device)
        for start in range(0, len(y), size):
            found = self._pre_activations(self._load(y[start : start + size])).relu().flatten()
            largest = torch.cat([largest, found[found > 0]])
            largest = largest.topk(min(len(y) * k + 1, len(largest))).values
        self.threshold = float(largest[-2:].mean()) if len(largest) > len(y) * k else 0.0

    def weights(self) -> Arrays:
        """Return the parameters as arrays on the CPU."""
        return {name: value.detach().cpu().numpy() for name, value in self._parameters.items()}

    def state(self) -> Arrays:
        """Return everything that the next step depends on."""
        state = {**self.weights(), "last_fired": self.last_fired, "scalars": np.array([self.threshold])}
        for name, value in self._parameters.items():
            for key, moment in self._optimizer.state[value].items():
                state[f"{name}_{key}"] = moment.cpu().numpy()
        return {name: value.copy() for name, value in state.items()}

    @torch.no_grad()
    def load(self, state: Arrays) -> None:
        """Go on from a state."""
        for name, value in self._parameters.items():
            value.copy_(torch.from_numpy(state[name]))
            self._optimizer.state[value] = {
                key: torch.tensor(
                    state[f"{name}_{key}"], device="cpu" if key == "step" and not self._fused else self.device
                )
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self._last_fired = torch.tensor(state["last_fired"], device=self.device)
        self.threshold = float(state["scalars"][0])

    @torch.no_grad()
    def restart(self, features: np.ndarray, directions: np.ndarray, length: float = 1.0) -> None:
        """Give some features new unit directions (features, d) with encoders of a length; forget what they learned."""
        index = torch.from_numpy(features).to(self.device)
        for name, value in self._parameters.items():
            if name in ("b_dec", "b_pre"):
                continue
            fresh = self._load(directions) if name in ("W_enc", "W_dec") else torch.zeros_like(value[index])
            if name == "log_threshold":
                fresh = fresh + float(np.log(INITIAL_THRESHOLD))
            value[index] = length * fresh if name == "W_enc" else fresh
            moments = self._optimizer.state[value]
            moments["exp_avg"][index] = 0
            # 0 would make the first steps three times as long as any other.
            moments["exp_avg_sq"][index] = moments["exp_avg_sq"].mean(dim=0)

    def _load(self, y: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(y).to(self.device)

    def _pre_activations(self, y: torch.Tensor) -> torch.Tensor:
        p = self._parameters
        return torch.addmm(p["b_enc"], y + p["b_pre"] if "b_pre" in p else y, p["W_enc"].T)

    def _activate(self, y: torch.Tensor, *, learn: bool = True) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return activations (n, h), and what the architecture adds to the loss."""
        p, n = self._parameters, len(y)
        if self.architecture.name == "gated":
            return self._gate(y)
        pre = self._pre_activations(y)
        if self.architecture.name == "jumprelu":
            threshold = p["log_threshold"].exp()
            pre = pre.relu()
            return _Jump.apply(pre, threshold), self._pressure * (self.settings.l0 or 0) / n * _Step.apply(
                pre, threshold
            ).sum()
        if self.architecture.sparsity == "l1":
            a = pre.relu()
            return a, self._pressure * (self.settings.l1 or 0) / (
                n * (a.shape[1] if self.settings.paper else 1)
            ) * a.sum()
        k = active_features(self.settings.k or 1, self._pressure if learn else 1.0, pre.shape[1])
        if self.architecture.activation == "topk":
            values, indices = pre.topk(round(k), dim=1, sorted=False)
            return torch.zeros_like(pre).scatter(1, indices, values.relu()), 0.0
        pre = pre.relu()
        if learn:
            wanted = round(n * k)
            largest = pre.detach().flatten().topk(min(wanted + 1, pre.numel())).values
            self.threshold = float(largest[-1]) if len(largest) > wanted else 0.0
        return pre * (pre > self.threshold), 0.0

    def _gate(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate and magnitude share the encoder's directions; the gate alone, with the decoder fixed, must reconstruct too."""
        p = self._parameters
        shared = y @ p["W_enc"].T
        gate = (shared + p["b_gate"]).relu()
        magnitude = (shared * p["log_scale"].exp() + p["b_enc"]).relu()
        of_gate = torch.addmm(p["b_dec"].detach(), gate, p["W_dec"].detach())
        added = (
            self._pressure * (self.settings.l1 or 0) * gate.sum(dim=1).mean() + (y - of_gate).square().sum(dim=1).mean()
        )
        return magnitude * (gate > 0), added

    def _reconstructions(self, a: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the reconstruction from the first features of each group; the last is that from all."""
        y_hat: torch.Tensor = self._parameters["b_dec"]
        start = 0
        for stop in self.settings.groups:
            y_hat = y_hat + a[:, start:stop] @ self._parameters["W_dec"][start:stop]
            start = stop
            yield y_hat

    def _loss(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, added = self._activate(y)
        errors = [(y - y_hat).square().sum(dim=1).mean() for y_hat in self._reconstructions(a)]
        weight = 1 / y.shape[1] if self.settings.paper else 1.0
        return weight * (torch.stack(errors) * self._group_weights).sum() + added, a.detach() > 0


def _near(z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the rectangular kernel of width `BANDWIDTH` around the threshold, over its width."""
    return ((z - threshold).abs() < BANDWIDTH / 2) / BANDWIDTH


class _Jump(torch.autograd.Function):
    """z where it is above the threshold, else 0, with a straight-through gradient for the threshold."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        of_threshold = -(threshold * _near(z, threshold) * gradient).sum(dim=0)
        return (z > threshold) * gradient, of_threshold


class _Step(torch.autograd.Function):
    """1 where z is above the threshold, else 0, with a straight-through gradient for the threshold alone."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        z, threshold = ctx.saved_tensors
        (gradient,) = gradients
        return None, -(_near(z, threshold) * gradient).sum(dim=0)
