"""Training steps on the CPU: a dense encoder product, everything after it on lists of active entries.

L1 architectures start with half of their features active: until few are, their steps are dense matrix products with
the elementwise passes in between compiled.
"""

from __future__ import annotations

import numpy as np
import torch

from . import kernels
from .architectures import Architecture
from .backend import FIRST_K_TIMES, Arrays, Settings, active_features, group_weights, has_pre_bias, step_rate
from .workers import Workers, available_threads

BLOCK_ROWS = 128
TILE_FEATURES = 512
PRODUCTS_PER_THREAD = 10_000_000
SEARCH_FROM = 0.85
"""The search for the largest values starts at this share of the cut of the step before."""
SPARSE_BELOW = 0.15
BFLOAT16_FROM_INPUTS, BFLOAT16_FROM_PRODUCTS = 32, 50_000_000


class NumbaBackend:
    """The `topk`, `batchtopk`, `matryoshka`, `vanilla` and `relu` architectures on the CPU."""

    def __init__(self, arrays: Arrays, architecture: Architecture, settings: Settings):
        h, d = arrays["W_enc"].shape
        self.settings, self.architecture = settings, architecture
        self._pre_bias = has_pre_bias(architecture, settings)
        self.arrays = {name: np.array(value, dtype=np.float32) for name, value in arrays.items()}
        self.arrays.setdefault("b_pre", np.zeros(d, np.float32))
        for name in list(self.arrays):
            for moment in ("mean", "square"):
                self.arrays.setdefault(f"{name}_{moment}", np.zeros_like(self.arrays[name]))
        self.last_fired = np.zeros(h, np.int64)
        self.threshold = 0.0
        self._group_ends = np.array(settings.groups, np.int64)
        self._group_weights = group_weights(len(settings.groups))
        self._search = 0.0
        self._density = 1.0
        self._press(1.0)
        products = settings.batch_size * d * h
        n_workers = max(1, min(available_threads(), products // PRODUCTS_PER_THREAD))
        large = d >= BFLOAT16_FROM_INPUTS and products >= BFLOAT16_FROM_PRODUCTS
        self._may_narrow = architecture.sparsity == "k" and large and _has_bfloat16()
        self._W_enc = torch.from_numpy(self.arrays["W_enc"])
        self._W_dec = torch.from_numpy(self.arrays["W_dec"])
        self._wide = [_Scratch(h, torch.float32) for _ in range(n_workers)]
        self._narrow = [_Scratch(h, torch.bfloat16) for _ in range(n_workers)] if self._may_narrow else self._wide
        self._scratch = self._wide
        self._encoder = self._W_enc
        self._ends = [np.empty(h + 1, np.int64) for _ in range(n_workers)]
        self._sorted = [_sorted_arrays(0) for _ in range(n_workers)]
        self._allocate(settings.batch_size)
        # Left alone, a product in a thread of ours would start further threads. Last: what fails before must not leave it so.
        self._workers = Workers(n_workers, lambda: torch.set_num_threads(1))
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(1)

    def _allocate(self, n: int) -> None:
        """Make room for the lists and residuals of n rows."""
        n_blocks = -(-n // BLOCK_ROWS)
        self._starts = np.zeros((n_blocks, BLOCK_ROWS + 1), np.int64)
        self._residuals = np.empty((n, len(self._group_ends), self.arrays["b_dec"].size), np.float32)
        self._make_lists(n_blocks, BLOCK_ROWS * (FIRST_K_TIMES + 1) * (self.settings.k or 1) + 1)

    def _make_lists(self, n_blocks: int, capacity: int) -> None:
        self._columns = np.empty((n_blocks, capacity), np.int32)
        self._values = np.empty((n_blocks, capacity), np.float32)
        self._gradients = np.empty((n_blocks, capacity), np.float32)

    def close(self) -> None:
        """Give torch its number of threads back and end ours."""
        torch.set_num_threads(self._threads_before)
        self._workers.close()

    def step(self, y: np.ndarray, number: int, rate: float, pressure: float = 1.0) -> float:
        """Take step `number` (from 0) on the rows `y` (n, d) and return the loss before it.

        `pressure` is explained at :class:`Backend`.
        """
        self._press(pressure)
        if self.architecture.sparsity == "l1" and self._density > SPARSE_BELOW and len(self._group_ends) == 1:
            return self._dense_step(y, number, rate)
        self._refresh()
        squares, total = self._forward(y)
        self._density = float(self._starts[:, -1].sum()) / (len(y) * len(self.last_fired))
        settings, arrays = self.settings, self.arrays
        factor = np.float32(self._factor(len(y)))
        scaled_rate, epsilon = step_rate(number, rate)
        h = len(self.last_fired)
        n_tiles = -(-h // kernels.SUMMED_FEATURES)
        cuts = np.minimum(kernels.SUMMED_FEATURES * np.linspace(0, n_tiles, self._workers.n + 1).astype(np.int64), h)
        pre_gradients = np.zeros((n_tiles, y.shape[1]), np.float32)

        def update(worker: int, part: int) -> None:
            low, high = cuts[part], cuts[part + 1]
            ends = self._ends[part]
            while needed := kernels.sort_entries(
                low, high, self._starts, self._columns, self._values, self._gradients, ends, *self._sorted[part]
            ):
                self._sorted[part] = _sorted_arrays(needed * 5 // 4)
            kernels.update_features(
                low, high, ends, *self._sorted[part], y, self._residuals, self._group_ends, factor, arrays["b_pre"],
                scaled_rate, epsilon, not settings.paper, settings.frozen_decoder, number,
                *self._with_moments("W_enc", "W_dec", "b_enc"), pre_gradients, self.last_fired,
            )  # fmt: skip

        self._workers.each(update, range(self._workers.n))
        residual_sum = self._residuals[: len(y), 0].sum(axis=0, dtype=np.float64)
        self._update_biases(factor * residual_sum, pre_gradients.sum(axis=0), scaled_rate, epsilon)
        return self._loss(len(y), squares, total)

    def evaluate(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the residuals ŷ − y (n, d) and the number of active features of each row; nothing is learned."""
        self._press(1.0)
        residuals, counts = np.empty_like(y), np.empty(len(y), np.int64)
        for start in range(0, len(y), self.settings.batch_size):
            part = y[start : start + self.settings.batch_size]
            self._refresh(exact=True)
            self._forward(part, learn=False)
            residuals[start : start + len(part)] = self._residuals[: len(part), -1] / self._group_weights[-1]
            counts[start : start + len(part)] = np.diff(self._starts, axis=1).ravel()[: len(part)]
        return residuals, counts

    def calibrate(self, y: np.ndarray) -> None:
        """Set the threshold at which the rows `y` (n, d) have k active features on average.

        Half-way between the last that is in and the first that is out, so that rounding on another machine moves neither.
        """
        self._press(1.0)
        self._allocate(len(y))
        self._refresh(exact=True)
        blocks = self._blocks(len(y))
        cut = self._cut(y, blocks)
        values = self._listed(blocks)
        if cut > 0:
            self.threshold = float(values[values > cut].min() + values[values <= cut].max(initial=0)) / 2
        self._allocate(self.settings.batch_size)

    def weights(self) -> Arrays:
        """Return the parameters as arrays on the CPU."""
        return {name: self.arrays[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "b_pre")}

    def state(self) -> Arrays:
        """Return everything that the next step depends on."""
        scalars = np.array([self.threshold, self._search, self._density])
        return {**self.arrays, "last_fired": self.last_fired, "scalars": scalars}

    def load(self, state: Arrays) -> None:
        """Go on from a state."""
        for name, value in self.arrays.items():
            value[...] = state[name]
        self.last_fired[...] = state["last_fired"]
        self.threshold, self._search, self._density = map(float, state["scalars"])

    def restart(self, features: np.ndarray, directions: np.ndarray, length: float = 1.0) -> None:
        """Give some features new unit directions (features, d) with encoders of a length; forget what they learned."""
        for name, value in self.arrays.items():
            if name.startswith(("W_enc", "W_dec", "b_enc")):
                # A second moment of 0 would make the first steps three times as long as any other.
                value[features] = value.mean(axis=0) if name.endswith("_square") else 0
        self.arrays["W_dec"][features] = directions
        self.arrays["W_enc"][features] = length * directions

    def _press(self, pressure: float) -> None:
        self._pressure = pressure
        if self.settings.k is not None:
            self._k = active_features(self.settings.k, pressure, len(self.last_fired))

    def _factor(self, n: int) -> float:
        weight = 1 / self.arrays["b_dec"].size if self.settings.paper else 1.0
        return 2 * weight / n

    def _penalty(self, n: int) -> float:
        if self.settings.l1 is None:
            return 0.0
        return self._pressure * self.settings.l1 / (n * (len(self.last_fired) if self.settings.paper else 1))

    def _loss(self, n: int, squares: float, total: float) -> float:
        return self._factor(n) / 2 * squares + self._penalty(n) * total

    def _with_moments(self, *names: str) -> list[np.ndarray]:
        return [self.arrays[name + part] for name in names for part in ("", "_mean", "_square")]

    def _update_biases(self, of_decoder: np.ndarray, of_pre: np.ndarray, rate: np.float32, epsilon: np.float32) -> None:
        kernels.update_bias(*_first(self._with_moments("b_dec"), of_decoder.astype(np.float32)), rate, epsilon)
        if self._pre_bias:
            kernels.update_bias(*_first(self._with_moments("b_pre"), of_pre.astype(np.float32)), rate, epsilon)

    def _blocks(self, n: int) -> list[tuple[int, slice]]:
        return [(b, slice(start, min(start + BLOCK_ROWS, n))) for b, start in enumerate(range(0, n, BLOCK_ROWS))]

    def _refresh(self, *, exact: bool = False) -> None:
        """Bring what is derived from the weights up to date; `exact` products are of float32 numbers."""
        narrow = self._may_narrow and not exact
        self._scratch = self._narrow if narrow else self._wide
        self._encoder = self._W_enc.to(torch.bfloat16) if narrow else self._W_enc
        bias = self.arrays["b_enc"]
        if self._pre_bias:
            with np.errstate(over="ignore", invalid="ignore"):
                bias = bias + self.arrays["W_enc"] @ self.arrays["b_pre"]
        self._bias = torch.from_numpy(bias)
        self._encoder_bias = self._bias.to(self._encoder.dtype)

    @property
    def _shift(self) -> int:
        return 16 if self._scratch is not self._wide else 0

    def _pre_activations(self, worker: int, y: np.ndarray) -> np.ndarray:
        """Return pre-activations of a block as integers."""
        pre = self._scratch[worker].pre[: len(y)]
        torch.addmm(self._encoder_bias, torch.from_numpy(y).to(pre.dtype), self._encoder.T, out=pre)
        return pre.view(torch.int16 if self._shift else torch.int32).numpy()

    def _forward(self, y: np.ndarray, *, learn: bool = True) -> tuple[float, float]:
        """List active entries, their gradients and the residuals; return Σ residual² and Σ a."""
        blocks = self._blocks(len(y))
        self._starts[len(blocks) :] = 0
        cut = None
        if self.architecture.activation == "topk":
            ratios = self._workers.each(lambda worker, block: self._select_top(worker, block[0], y[block[1]]), blocks)
            self._search = SEARCH_FROM * float(np.mean(ratios))
        elif self.architecture.sparsity == "k" and learn:
            cut = self._cut(y, blocks)
        else:
            self._list_above(y, blocks, self.threshold)
        factor, penalty = np.float32(self._factor(len(y))), np.float32(self._penalty(len(y)))

        def decode(worker: int, block: tuple[int, slice]) -> tuple[float, float]:
            b, rows = block
            starts, columns, values = self._starts[b], self._columns[b], self._values[b]
            if cut is not None:
                kernels.keep_above(cut, starts, columns, values)
            if self._shift:
                kernels.recompute(y[rows], self.arrays["W_enc"], self._bias.numpy(), starts, columns, values)
            return kernels.decode_block(
                y[rows], self.arrays["W_dec"], self.arrays["b_dec"], self._group_ends, self._group_weights, factor, penalty,
                starts, columns, values, self._gradients[b], self._residuals[rows],
            )  # fmt: skip

        found = self._workers.each(decode, blocks)
        return sum(squares for squares, _ in found), sum(total for _, total in found)

    def _select_top(self, worker: int, b: int, y: np.ndarray) -> float:
        norm = np.sqrt(np.einsum("nd,nd->n", y, y))
        ratio = kernels.select_top(
            self._pre_activations(worker, y), self._shift, norm, self._search, round(self._k),
            self._starts[b][: len(y) + 1], self._columns[b], self._values[b],
            *self._scratch[worker].selection,
        )  # fmt: skip
        self._starts[b, len(y) + 1 :] = self._starts[b, len(y)]
        return ratio

    def _list_above(self, y: np.ndarray, blocks: list[tuple[int, slice]], floor: float) -> None:
        """List what is above a floor in all blocks."""

        def select(worker: int, block: tuple[int, slice]) -> int:
            b, rows = block
            needed = kernels.select_above(
                self._pre_activations(worker, y[rows]), self._shift, floor,
                self._starts[b][: len(y[rows]) + 1], self._columns[b], self._values[b],
                *self._scratch[worker].selection,
            )  # fmt: skip
            self._starts[b, len(y[rows]) + 1 :] = self._starts[b, len(y[rows])]
            return needed

        while (needed := max(self._workers.each(select, blocks))) > self._columns.shape[1]:
            self._make_lists(len(self._columns), needed * 5 // 4)

    def _listed(self, blocks: list[tuple[int, slice]]) -> np.ndarray:
        return np.concatenate([self._values[b, : self._starts[b, -1]] for b, _ in blocks])

    def _cut(self, y: np.ndarray, blocks: list[tuple[int, slice]]) -> np.float32:
        """List candidates, and find the value above which there are k a row on average.

        Of bfloat16 products it is found among rounded values, and all that equal the last one are in.
        """
        wanted = round(len(y) * self._k)
        while True:
            self._list_above(y, blocks, self._search)
            values = self._listed(blocks)
            if len(values) >= wanted or self._search == 0:
                break
            self._search = self._search / 2 if self._search > 1e-6 else 0.0
        cut = np.float32(0)
        if len(values) > wanted:
            bits, n_ties = kernels.cut_for(values.view(np.int32), len(values), wanted, 0)
            cut = np.array([bits - (n_ties > 0)], np.int32).view(np.float32)[0]
        self._search = SEARCH_FROM * float(cut)
        self.threshold = float(cut)
        return cut

    def _dense_step(self, y: np.ndarray, number: int, rate: float) -> float:
        n, h = len(y), len(self.last_fired)
        self._refresh()
        if not hasattr(self, "_dense"):
            self._dense = torch.empty((2, self.settings.batch_size, h))
        activations, gradients = self._dense[0, :n], self._dense[1, :n]
        blocks = self._blocks(n)
        counts, sums = np.zeros((len(blocks), h), np.int32), np.zeros((len(blocks), h), np.float32)
        factor, penalty = np.float32(self._factor(n)), np.float32(self._penalty(n))
        b_dec = torch.from_numpy(self.arrays["b_dec"])
        residuals = torch.from_numpy(self._residuals[:n, 0])
        inputs = torch.from_numpy(y)

        def forward(worker: int, block: tuple[int, slice]) -> tuple[float, float]:
            b, rows = block
            a, g, r = activations[rows], gradients[rows], residuals[rows]
            torch.addmm(self._bias, inputs[rows], self._W_enc.T, out=a)
            total = kernels.rectify(a.numpy(), counts[b])
            torch.addmm(b_dec, a, self._W_dec, out=r)
            r -= inputs[rows]
            torch.mm(r, self._W_dec.T, out=g)
            kernels.mask_gradients(a.numpy(), g.numpy(), factor, penalty, sums[b])
            return float(r.square().sum()), total

        found = self._workers.each(forward, blocks)
        scaled_rate, epsilon = step_rate(number, rate)
        of_bias = sums.sum(axis=0)
        tiles = [slice(low, min(low + TILE_FEATURES, h)) for low in range(0, h, TILE_FEATURES)]
        pre_gradients = np.zeros((len(tiles), y.shape[1]), np.float32)

        def update(worker: int, tile: int) -> None:
            part = tiles[tile]
            of_encoder = torch.mm(gradients[:, part].T, inputs)
            of_decoder = torch.mm(activations[:, part].T, residuals).mul_(float(factor))
            kernels.update_dense(
                of_encoder.numpy(), of_decoder.numpy(), of_bias[part], self.arrays["b_pre"], scaled_rate, epsilon,
                not self.settings.paper, self.settings.frozen_decoder, *(a[part] for a in self._with_moments("W_enc", "W_dec", "b_enc")), pre_gradients[tile],
            )  # fmt: skip

        self._workers.each(update, range(len(tiles)))
        residual_sum = residuals.sum(dim=0, dtype=torch.float64).numpy()
        self._update_biases(factor * residual_sum, pre_gradients.sum(axis=0), scaled_rate, epsilon)
        fired = counts.sum(axis=0)
        self.last_fired[fired > 0] = number
        self._density = float(fired.sum()) / (n * h)
        return self._loss(n, sum(squares for squares, _ in found), sum(total for _, total in found))


class _Scratch:
    """What one thread needs to select from a block of pre-activations."""

    def __init__(self, n_features: int, kind: torch.dtype):
        self.pre = torch.empty((BLOCK_ROWS, n_features), dtype=kind)
        words = np.zeros(-(-n_features // 8), np.uint64)
        values = np.empty(n_features + 32, np.int16 if kind == torch.bfloat16 else np.int32)
        self.selection = (words.view(np.uint8), words, np.empty(n_features + 32, np.int32), values)


def _first(arrays: list[np.ndarray], gradient: np.ndarray) -> list[np.ndarray]:
    return [arrays[0], gradient, *arrays[1:]]


def _sorted_arrays(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(n, np.int32), np.empty(n, np.float32), np.empty(n, np.float32)


def _has_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 numbers faster than float32 ones."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
