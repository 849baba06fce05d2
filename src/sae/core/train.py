"""Training a sparse autoencoder: the loop over batches, its records, dead features, and what it leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch

from .architectures import ARCHITECTURES
from .autoencoder import Autoencoder
from .backend import Arrays, Backend, Settings
from .backend_numba import NumbaBackend
from .backend_torch import TorchBackend
from .checkpoint import Checkpoint
from .initial import initial_weights
from .preprocess import Scaling
from .restart import restart_dead, restart_steps
from .rows import Matrix, read_rows, shuffled_batches
from .schedule import Schedule

N_RECORDS = 50
MAX_EVALUATED = 2048
MIN_CALIBRATED, MAX_CALIBRATED = 1000, 8192
DEAD_AFTER_PASSES = 2
IMPROVEMENT = 1e-3
DIVERGED = 10
"""Times the loss before the first step."""


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


@dataclass(frozen=True)
class Trained:
    """What training leaves: the SAE of the raw representation, its history, and how it ended."""

    autoencoder: Autoencoder
    history: list[Record]
    steps: int
    unexplained: float
    """Σ‖y − ŷ‖² / Σ‖y‖² of held-out cells in the training space (of training cells where none are held out)."""
    ended: str
    """`"finished"`, `"early"` (nothing was gained any more) or `"interrupted"`."""


class DivergedError(FloatingPointError):
    """The loss became NaN, infinite or far worse than that of no features at all."""


def choose_device(device: str) -> str:
    """Return `device`, or for `"auto"` the fastest kind that this machine has."""
    if device != "auto":
        try:
            torch.device(device)
        except RuntimeError:
            raise ValueError(f"device={device!r} is not 'auto', 'cpu', 'cuda', 'cuda:0', 'mps' or the like.") from None
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_backend(weights: Arrays, settings: Settings) -> Backend:
    """Choose the compiled back end on the CPU where it knows the architecture, else torch."""
    architecture = ARCHITECTURES[settings.architecture]
    compiled = settings.device == "cpu" and architecture.compiled
    return (NumbaBackend if compiled else TorchBackend)(weights, architecture, settings)


def train(
    x: Matrix,
    scaling: Scaling,
    settings: Settings,
    *,
    train_rows: np.ndarray,
    val_rows: np.ndarray,
    patience: int | None = None,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, Record | None], object] | None = None,
) -> Trained:
    """Train an SAE on rows of a representation.

    The loss is `mean over cells of Σ_g w_g ‖y − ŷ_g‖² + l1 · Σ a`, both sums over the whole vector, y the scaled
    representation, ŷ_g its reconstruction from the features of the first g groups and w_g that group's weight; rows of the
    decoder keep unit norm. Adam with betas (0.9, 0.999).

    Parameters
    ----------
    x
        (n, d), raw representation.
    scaling
        The map into the training space.
    settings
        How to train.
    train_rows, val_rows
        Row numbers to train on and to validate on (may be empty), in rising order.
    patience
        End after so many of the 50 records without a gain of 0.1 % in the held-out FVU.
    checkpoint
        Where to keep the state, about once a minute; where there is one already, training goes on from it.
    on_step
        Called after each step with its number and, at a record, the record.
    """
    architecture = ARCHITECTURES[settings.architecture]

    looked_at = [
        spread(train_rows, settings.n_features),
        *(spread(rows, MAX_EVALUATED) for rows in (train_rows, val_rows)),
    ]
    start, *evaluated = (scaling.transform(part) for part in _read_together(x, looked_at))
    weights = initial_weights(start, scaling.spread, settings)
    with closing(make_backend(weights, settings)) as backend, _collected_interrupts() as interrupts:
        worst = DIVERGED * _start_loss(backend, evaluated[0], settings)
        idle = DEAD_AFTER_PASSES * -(-len(train_rows) // settings.batch_size)
        record_every = max(1, settings.steps // N_RECORDS)
        restarts = restart_steps(settings, idle)
        schedule = Schedule(settings.steps, constant=settings.paper)
        first, rows = (0, []) if checkpoint is None else checkpoint.resume(backend, schedule)
        history = [Record(int(row[0]), *row[1:]) for row in rows]
        stream = shuffled_batches(x, train_rows, settings.batch_size, seed=settings.seed, first=first)
        step, interrupted = first - 1, False

        def save() -> None:
            if checkpoint is not None:
                checkpoint.save(backend, schedule, [list(vars(record).values()) for record in history], step + 1)

        try:
            while step + 1 < schedule.steps:
                if interrupts:
                    raise KeyboardInterrupt
                y = scaling.transform(next(stream))
                step += 1
                rate = settings.learning_rate * schedule.factor(step)
                loss = backend.step(y, step, rate, schedule.pressure(step))
                if not loss < worst:
                    raise _diverged(loss, step, schedule, settings)
                if step in restarts:
                    restart_dead(backend, y, step, idle, settings)
                record = None
                if (step + 1) % record_every == 0 or step + 1 == schedule.steps:
                    dead = float((step - backend.last_fired >= idle).mean())
                    (fvu, l0), (val_fvu, val_l0) = (_evaluate(backend, part, scaling) for part in evaluated)
                    record = Record(step + 1, rate, loss, fvu, l0, dead, val_fvu, val_l0)
                    history.append(record)
                    if patience is not None and _stalled(history, patience):
                        schedule.end_early(step)
                    if checkpoint is not None and checkpoint.due:
                        save()
                if on_step is not None:
                    on_step(step, record)
        except KeyboardInterrupt:
            if step < 0:
                raise
            interrupted = True
            save()
        if architecture.activation == "threshold" and architecture.sparsity == "k":
            calibrated = val_rows if len(val_rows) >= MIN_CALIBRATED else train_rows
            backend.calibrate(scaling.transform(read_rows(x, spread(calibrated, MAX_CALIBRATED))))
        judged = evaluated[1 if len(val_rows) else 0]
        unexplained = float(np.square(backend.evaluate(judged)[0]).sum() / np.square(judged).sum())
        ended = "interrupted" if interrupted else "early" if schedule.steps < settings.steps else "finished"
        return Trained(scaling.fold(_export(backend, settings)), history, step + 1, unexplained, ended)


@contextmanager
def _collected_interrupts() -> Iterator[list[int]]:
    """Note Ctrl-C for the end of the step, when all weights are of the same one; a second Ctrl-C acts at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    usual = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _start_loss(backend: Backend, y: np.ndarray, settings: Settings) -> float:
    """Return the loss on `y` before the first step, or that of no features if it is larger, with a penalty to match."""
    with np.errstate(over="ignore", invalid="ignore"):
        residuals, _ = backend.evaluate(y)
        loss = max(np.square(part, dtype=np.float64).sum(axis=1).mean() for part in (residuals, y))
    penalty = (settings.l1 or 0) * np.abs(y).sum(axis=1, dtype=np.float64).mean() * settings.n_features
    penalty += (settings.l0 or 0) * settings.n_features
    return float((loss + penalty) / y.shape[1] if settings.paper else loss + penalty)


def _diverged(loss: float, step: int, schedule: Schedule, settings: Settings) -> DivergedError:
    return DivergedError(
        f"The loss is {loss} at step {step + 1} of {schedule.steps}. The learning rate of {settings.learning_rate:g} is probably "
        f"too high: try learning_rate={settings.learning_rate / 10:g}."
    )


def _stalled(history: list[Record], patience: int) -> bool:
    """Tell whether the held-out FVU has not fallen by 0.1 % within the last `patience` records."""
    values = [record.fvu if np.isnan(record.val_fvu) else record.val_fvu for record in history]
    return len(values) > patience and min(values[-patience:]) > (1 - IMPROVEMENT) * min(values[:-patience])


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Pick at most `most` of `rows`, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _read_together(x: Matrix, sets: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Read several sets of rows in one go: on disk, rows that are spread over all cells lie in most of the chunks."""
    rows = np.unique(np.concatenate(sets))
    found = read_rows(x, rows)
    return [found[np.searchsorted(rows, some)] for some in sets]


def _evaluate(backend: Backend, y: np.ndarray, scaling: Scaling) -> tuple[float, float]:
    """Return FVU in the raw representation, and L0, of scaled cells; NaN for no cells."""
    if len(y) == 0:
        return float("nan"), float("nan")
    residuals, counts = backend.evaluate(y)
    residual = residuals.astype(np.float64)
    raw = residual * scaling.backward if scaling.backward.ndim == 1 else residual @ scaling.backward
    return float(np.square(raw).sum(axis=1).mean() / scaling.variance), float(counts.mean())


def _export(backend: Backend, settings: Settings) -> Autoencoder:
    """Return the SAE of the training space, in float64: pre-bias folded in, a gate rewritten as a threshold."""
    architecture = ARCHITECTURES[settings.architecture]
    weights = {name: value.astype(np.float64) for name, value in backend.weights().items()}
    W_enc, b_enc = weights["W_enc"].T, weights["b_enc"]
    threshold = None
    if "b_pre" in weights:
        b_enc = b_enc + weights["b_pre"] @ W_enc
    if architecture.name == "gated":
        scale = np.exp(weights["log_scale"])
        W_enc, threshold = W_enc * scale, np.maximum(b_enc - weights["b_gate"] * scale, 0)
    elif architecture.name == "jumprelu":
        threshold = np.exp(weights["log_threshold"])
    elif architecture.activation == "threshold":
        threshold = np.full(settings.n_features, backend.threshold)
    return Autoencoder(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=weights["W_dec"],
        b_dec=weights["b_dec"],
        activation=architecture.activation,
        k=settings.k if architecture.activation == "topk" else None,
        threshold=threshold,
    )
