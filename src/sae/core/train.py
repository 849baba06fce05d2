"""Training a sparse autoencoder with torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch

from .architectures import ARCHITECTURES, Architecture
from .autoencoder import Autoencoder
from .preprocess import Scaling
from .rows import Matrix, dense_rows

N_RECORDS = 50
SMALLEST_GROUP = 8
INITIAL_NOISE = 1.0
PRODUCTS_PER_THREAD = 20_000_000
MAX_EVALUATED = 2048
WARM_UP, DECAY = 0.05, 0.2


@dataclass(frozen=True)
class Settings:
    """How to train. `k` or `l1` is used, as the architecture says.

    `groups` are widths of nested dictionaries, the last one `n_features`: each must reconstruct on its own.
    """

    architecture: str
    n_features: int
    groups: tuple[int, ...]
    k: int | None
    l1: float | None
    learning_rate: float
    steps: int
    batch_size: int
    seed: int
    device: str


@dataclass(frozen=True)
class Record:
    """One line of the training history."""

    step: int
    learning_rate: float
    loss: float
    fvu: float
    l0: float
    dead_fraction: float
    val_fvu: float
    val_l0: float


HISTORY_COLUMNS = tuple(field.name for field in fields(Record))


class DivergedError(FloatingPointError):
    """The loss became NaN or infinite."""


class _Parameters(torch.nn.Module):
    def __init__(self, architecture: Architecture, directions: torch.Tensor):
        super().__init__()
        n_features, n_inputs = directions.shape
        self.W_dec = torch.nn.Parameter(directions)
        self.W_enc = torch.nn.Parameter(directions.T.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros(n_features))
        self.b_dec = torch.nn.Parameter(torch.zeros(n_inputs))
        self.b_pre = torch.nn.Parameter(torch.zeros(n_inputs)) if architecture.pre_bias else None

    def activate(self, x: torch.Tensor, k: int | None) -> torch.Tensor:
        pre = torch.addmm(self.b_enc, x if self.b_pre is None else x + self.b_pre, self.W_enc)
        if k is None:
            return pre.relu()
        values, indices = pre.topk(k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, indices, values.relu())

    def reconstructions(self, a: torch.Tensor, groups: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """Yield the reconstruction from the first features of each group; the last is that from all."""
        x_hat: torch.Tensor = self.b_dec
        start = 0
        for stop in groups:
            x_hat = x_hat + a[:, start:stop] @ self.W_dec[start:stop]
            start = stop
            yield x_hat

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def export(self, architecture: Architecture, k: int | None) -> Autoencoder:
        # To the CPU first: MPS has no float64.
        W_enc, b_enc = self.W_enc.cpu().double(), self.b_enc.cpu().double()
        if self.b_pre is not None:
            b_enc = b_enc + self.b_pre.cpu().double() @ W_enc
        return Autoencoder(
            W_enc=W_enc.numpy(),
            b_enc=b_enc.numpy(),
            W_dec=self.W_dec.cpu().double().numpy(),
            b_dec=self.b_dec.cpu().double().numpy(),
            activation=architecture.activation,
            k=k,
        )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, constant, linear decay over the last 20 %."""
    warm_up, decay = max(1, round(WARM_UP * steps)), max(1, round(DECAY * steps))
    return min(1.0, (step + 1) / warm_up, (steps - step) / decay)


def nested_groups(n_features: int) -> tuple[int, ...]:
    """Widths of nested dictionaries: `n_features`, halved as long as at least 8 remain, in rising order."""
    widths = [n_features]
    while widths[-1] >= 2 * SMALLEST_GROUP:
        widths.append(widths[-1] // 2)
    return tuple(reversed(widths))


def initial_directions(y: torch.Tensor, n_features: int, generator: torch.Generator) -> torch.Tensor:
    """Unit directions of random cells (n, m), with isotropic noise of the same length added."""
    cells = y[torch.randint(len(y), (n_features,), generator=generator)]
    noise = torch.randn(cells.shape, generator=generator)
    normalise = torch.nn.functional.normalize
    return normalise(normalise(cells, dim=1) + INITIAL_NOISE * normalise(noise, dim=1), dim=1)


def batches(n: int, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield row numbers of batches without end, each row once per pass."""
    waiting = np.empty(0, dtype=np.int64)
    while True:
        waiting = np.concatenate([waiting, rng.permutation(n)])
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]


def choose_device(device: str) -> str:
    """Return `device`, or for `"auto"` the fastest kind that this machine has."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """Use one thread for steps of few multiply-adds: waking a second costs more, and much more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if products < PRODUCTS_PER_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    x: Matrix,
    scaling: Scaling,
    settings: Settings,
    *,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    on_step: Callable[[int, Record | None], object] | None = None,
) -> tuple[Autoencoder, list[Record]]:
    """Train an SAE on rows of a representation.

    The loss is `mean over cells and groups of ‖y − ŷ_g‖² + l1 · mean over cells of Σ a`, both sums over the whole vector, y
    the scaled representation and ŷ_g its reconstruction from the first g features; rows of the decoder keep unit norm. Adam
    with betas (0.9, 0.999).

    Parameters
    ----------
    x
        (n, d), dense or CSR, raw representation.
    scaling
        The map into the training space.
    settings
        How to train.
    train_rows, val_rows
        Row numbers to train on and to validate on (may be empty).
    on_step
        Called after each step with its number and, at a record, the record.

    Returns
    -------
    The SAE of the raw representation (scaling folded in), and the history.
    """
    architecture = ARCHITECTURES[settings.architecture]
    device = torch.device(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    k = settings.k if architecture.sparsity == "k" else None
    l1 = settings.l1 if architecture.sparsity == "l1" else None

    def load(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(scaling.transform(dense_rows(x, rows))).to(device)

    seen = load(_spread(train_rows, settings.n_features)).cpu()
    directions = initial_directions(seen, settings.n_features, generator)
    parameters = _Parameters(architecture, directions).to(device)
    optimizer = torch.optim.Adam(parameters.parameters(), lr=settings.learning_rate, fused=device.type != "mps")
    evaluated = [load(_spread(rows, MAX_EVALUATED)) for rows in (train_rows, val_rows)]
    steps_per_pass = max(1, len(train_rows) // settings.batch_size)
    last_fired = torch.zeros(settings.n_features, dtype=torch.long, device=device)
    record_every = max(1, settings.steps // N_RECORDS)
    history: list[Record] = []
    with _threads_for(settings.batch_size * len(scaling.kept) * settings.n_features):
        for step, rows in zip(range(settings.steps), batches(len(train_rows), settings.batch_size, rng), strict=False):
            rate = settings.learning_rate * learning_rate_factor(step, settings.steps)
            optimizer.param_groups[0]["lr"] = rate
            y = load(train_rows[rows])
            a = parameters.activate(y, k)
            errors = [
                (y - y_hat).square().sum(dim=1).mean() for y_hat in parameters.reconstructions(a, settings.groups)
            ]
            loss = torch.stack(errors).mean()
            if l1 is not None:
                loss = loss + l1 * a.sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            parameters.normalise_decoder()
            last_fired[(a.detach() > 0).any(dim=0)] = step
            record = None
            if (step + 1) % record_every == 0 or step + 1 == settings.steps:
                dead = float((step - last_fired >= 2 * steps_per_pass).float().mean())
                (fvu, l0), (val_fvu, val_l0) = (_evaluate(parameters, part, k, scaling) for part in evaluated)
                if not np.isfinite([loss.item(), fvu]).all():
                    raise DivergedError(
                        f"The loss is {loss.item()} and the unexplained variance {fvu} at step {step + 1} of {settings.steps}. "
                        f"The learning rate of {settings.learning_rate:g} is probably too high: try "
                        f"learning_rate={settings.learning_rate / 10:g}."
                    )
                record = Record(step + 1, rate, loss.item(), fvu, l0, dead, val_fvu, val_l0)
                history.append(record)
            if on_step is not None:
                on_step(step, record)
    return scaling.fold(parameters.export(architecture, k)), history


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Pick at most `most` of `rows`, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


@torch.no_grad()
def _evaluate(parameters: _Parameters, y: torch.Tensor, k: int | None, scaling: Scaling) -> tuple[float, float]:
    """Return FVU in the raw representation, and L0, of scaled cells; NaN for no cells."""
    if len(y) == 0:
        return float("nan"), float("nan")
    a = parameters.activate(y, k)
    residual = (y - torch.addmm(parameters.b_dec, a, parameters.W_dec)).cpu().double().numpy()
    raw = residual * scaling.backward if scaling.backward.ndim == 1 else residual @ scaling.backward
    return float(np.square(raw).sum(axis=1).mean() / scaling.variance), float((a > 0).sum(dim=1).float().mean())
