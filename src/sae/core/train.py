"""Training a sparse autoencoder: data order, learning rate, dead features, records, checkpoints."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .architectures import ARCHITECTURES
from .autoencoder import Autoencoder
from .backend import Arrays, Backend, Settings
from .backend_numba import NumbaBackend
from .backend_torch import TorchBackend
from .preprocess import Scaling
from .rows import Matrix, read_rows, shuffled_batches

N_RECORDS = 50
MORE_THAN_INPUTS = 8
INITIAL_NOISE = 1.0
MAX_EVALUATED = 2048
MIN_CALIBRATED, MAX_CALIBRATED = 1000, 8192
WARM_UP, DECAY, PRESSURE = 0.05, 0.2, 0.3
RESTART_UNTIL, RESTART_LENGTH = 0.5, 0.2
DEAD_AFTER_PASSES = 2
IMPROVEMENT = 1e-3
DIVERGED = 10
"""Times the loss before the first step."""
CHECKPOINT_SECONDS = 60.0


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


class CheckpointError(ValueError):
    """A checkpoint belongs to other settings or other data."""


class Schedule:
    """Linear warm-up over the first 5 % of the steps, constant rate, linear decay over the last 20 %.

    `end_early` lets the decay begin at once.
    """

    def __init__(self, steps: int, *, constant: bool = False):
        self.steps, self.constant = steps, constant
        self.decay = max(1, round(DECAY * steps))

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate for `step`, counted from 0."""
        if self.constant:
            return 1.0
        warm_up = max(1, round(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm_up, (self.steps - step) / self.decay)

    def pressure(self, step: int) -> float:
        """Return the share of the sparsity that is asked for: it grows linearly over the first 30 % of the steps."""
        return 1.0 if self.constant else min(1.0, (step + 1) / max(1, round(PRESSURE * self.steps)))

    def end_early(self, step: int) -> None:
        """Let the decay begin after `step`, for as long as it would have taken in a run planned that way."""
        if step + 1 < self.steps - self.decay:
            self.decay = 1 if self.constant else max(1, round((step + 1) * DECAY / (1 - DECAY)))
            self.steps = step + 1 + self.decay


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


def initial_directions(y: np.ndarray, spread: np.ndarray, n_features: int, rng: np.random.Generator) -> np.ndarray:
    """Unit directions of random cells (n, m), with noise of the same length and of the cells' spread (m,) added."""
    cells = y[rng.integers(len(y), size=n_features)]
    noise = rng.standard_normal(cells.shape) * spread
    return _unit(_unit(cells) + INITIAL_NOISE * _unit(noise))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def initial_weights(y: np.ndarray, spread: np.ndarray, settings: Settings) -> Arrays:
    """Return decoder and encoder along random cells `y` (n, m), biases 0; for the paper, uniform as torch's linear layers."""
    rng = np.random.default_rng(settings.seed)
    h, d = settings.n_features, y.shape[1]
    if not settings.paper:
        directions = initial_directions(y, spread, h, rng)
        # Nested, features that start too strong push each other down in turn, and none of them stays dead.
        nested = len(settings.groups) > 1
        encoder = directions if nested else directions * _best_scale(y, directions, settings.k)
        return {"W_enc": encoder, "b_enc": np.zeros(h), "W_dec": directions, "b_dec": np.zeros(d)}

    def uniform(fan_in: int, *shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape) / fan_in**0.5

    weights = {"W_enc": uniform(d, h, d), "b_enc": uniform(d, h), "W_dec": uniform(h, h, d), "b_dec": uniform(h, d)}
    if settings.architecture != "vanilla":
        weights.update(b_enc=np.zeros(h), b_dec=np.zeros(d))
    return weights


def _best_scale(y: np.ndarray, directions: np.ndarray, k: int | None) -> float:
    """Return the factor for the encoder with which the start reconstructs cells `y` best: similar features add up."""
    with np.errstate(over="ignore", invalid="ignore"):
        a = np.maximum(y @ directions.T, 0)
        if k is not None and k < a.shape[1]:
            a[a < np.partition(a, -k, axis=1)[:, -k, None]] = 0
        y_hat = (a @ directions).astype(np.float64)
        return float((y * y_hat).sum() / max(np.square(y_hat).sum(), 1e-12))


def choose_device(device: str) -> str:
    """Return `device`, or for `"auto"` the fastest kind that this machine has."""
    if device != "auto":
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
    checkpoint: Path | None = None,
    identity: str = "",
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
        File to keep the state in, about once a minute; where it exists, training goes on from it.
    identity
        Of the data: a checkpoint of another is refused.
    on_step
        Called after each step with its number and, at a record, the record.
    """
    architecture = ARCHITECTURES[settings.architecture]

    def load(rows: np.ndarray) -> np.ndarray:
        return scaling.transform(read_rows(x, rows))

    weights = initial_weights(load(_spread(train_rows, settings.n_features)), scaling.spread, settings)
    with closing(make_backend(weights, settings)) as backend, _collected_interrupts() as interrupts:
        evaluated = [load(_spread(rows, MAX_EVALUATED)) for rows in (train_rows, val_rows)]
        worst = DIVERGED * _start_loss(backend, evaluated[0], settings)
        pass_steps = -(-len(train_rows) // settings.batch_size)
        idle = DEAD_AFTER_PASSES * pass_steps
        record_every = max(1, settings.steps // N_RECORDS)
        restart_every = max(1, settings.steps // 20, idle)
        schedule = Schedule(settings.steps, constant=settings.paper)
        history: list[Record] = []
        first, interrupted = 0, False
        if checkpoint is not None and checkpoint.exists():
            first, history = _resume(checkpoint, backend, schedule, settings, identity)
        saved_at, step = time.monotonic(), first - 1
        stream = shuffled_batches(x, train_rows, settings.batch_size, seed=settings.seed, first=first)
        try:
            while step + 1 < schedule.steps:
                if interrupts:
                    raise KeyboardInterrupt
                y = scaling.transform(next(stream))
                step += 1
                rate = settings.learning_rate * schedule.factor(step)
                loss = backend.step(y, step, rate, schedule.pressure(step))
                if not loss < worst:
                    raise _diverged(f"The loss is {loss}", step, schedule, settings)
                if (
                    settings.k is None
                    and not settings.paper
                    and (step + 1) % restart_every == 0
                    and step < RESTART_UNTIL * schedule.steps
                ):
                    _restart_dead(backend, y, step, idle, settings)
                record = None
                if (step + 1) % record_every == 0 or step + 1 == schedule.steps:
                    dead = float((step - backend.last_fired >= idle).mean())
                    (fvu, l0), (val_fvu, val_l0) = (_evaluate(backend, part, scaling) for part in evaluated)
                    record = Record(step + 1, rate, loss, fvu, l0, dead, val_fvu, val_l0)
                    history.append(record)
                    if patience is not None and _stalled(history, patience):
                        schedule.end_early(step)
                    if checkpoint is not None and time.monotonic() - saved_at > CHECKPOINT_SECONDS:
                        _save(checkpoint, backend, schedule, history, step + 1, settings, identity)
                        saved_at = time.monotonic()
                if on_step is not None:
                    on_step(step, record)
        except KeyboardInterrupt:
            if step < 0:
                raise
            interrupted, ended = True, "interrupted"
            if checkpoint is not None:
                _save(checkpoint, backend, schedule, history, step + 1, settings, identity)
        if architecture.activation == "threshold" and architecture.sparsity == "k":
            rows = val_rows if len(val_rows) >= MIN_CALIBRATED else train_rows
            backend.calibrate(load(_spread(rows, MAX_CALIBRATED)))
        judged = evaluated[-1] if len(val_rows) else evaluated[0]
        unexplained = float(np.square(backend.evaluate(judged)[0]).sum() / np.square(judged).sum())
        if not interrupted:
            ended = "early" if schedule.steps < settings.steps else "finished"
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


def _diverged(found: str, step: int, schedule: Schedule, settings: Settings) -> DivergedError:
    return DivergedError(
        f"{found} at step {step + 1} of {schedule.steps}. The learning rate of {settings.learning_rate:g} is probably "
        f"too high: try learning_rate={settings.learning_rate / 10:g}."
    )


def _restart_dead(backend: Backend, y: np.ndarray, step: int, idle: int, settings: Settings) -> None:
    """Point features that were idle for so many steps at cells that are badly reconstructed, the worst most often.

    Their encoders get a fifth of the mean length of the others (Bricken et al. 2023).
    """
    dead = np.flatnonzero(step - backend.last_fired >= idle)
    if len(dead) == 0:
        return
    residuals, _ = backend.evaluate(y)
    weights = np.square(residuals, dtype=np.float64).sum(axis=1)
    if not weights.sum() > 0:
        return
    rng = np.random.default_rng([settings.seed, step])
    chosen = _unit(y[rng.choice(len(y), len(dead), p=weights / weights.sum())])
    lengths = np.linalg.norm(np.delete(backend.weights()["W_enc"], dead, axis=0), axis=1)
    length = RESTART_LENGTH * (lengths.mean() if len(lengths) else 1.0)
    backend.restart(dead, chosen, float(length))


def _stalled(history: list[Record], patience: int) -> bool:
    """Tell whether the held-out FVU has not fallen by 0.1 % within the last `patience` records."""
    values = [record.fvu if np.isnan(record.val_fvu) else record.val_fvu for record in history]
    return len(values) > patience and min(values[-patience:]) > (1 - IMPROVEMENT) * min(values[:-patience])


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Pick at most `most` of `rows`, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


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


def _signature(settings: Settings, identity: str) -> str:
    return json.dumps({**asdict(settings), "groups": list(settings.groups), "data": identity}, sort_keys=True)


def _save(
    path: Path,
    backend: Backend,
    schedule: Schedule,
    history: list[Record],
    done: int,
    settings: Settings,
    identity: str,
) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    partial = path.with_name(path.name + ".partial")
    arrays: dict[str, Any] = {f"state.{name}": value for name, value in backend.state().items()}
    arrays["signature"] = np.array(_signature(settings, identity))
    arrays["progress"] = np.array([done, schedule.steps, schedule.decay])
    records = np.array([list(vars(record).values()) for record in history])
    arrays["history"] = records.reshape(-1, len(HISTORY_COLUMNS))
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _resume(
    path: Path, backend: Backend, schedule: Schedule, settings: Settings, identity: str
) -> tuple[int, list[Record]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            saved = {name: archive[name] for name in archive.files}
        signature, progress, records = str(saved["signature"]), saved["progress"], saved["history"]
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of sae, or was damaged ({error}). Remove it to train from the start, or choose "
            "another file."
        ) from error
    if signature != _signature(settings, identity):
        raise CheckpointError(
            f"The checkpoint {path} was written with other settings or other data. Repeat the settings, or choose another "
            "file."
        )
    backend.load({name[len("state.") :]: value for name, value in saved.items() if name.startswith("state.")})
    done, schedule.steps, schedule.decay = (int(number) for number in progress)
    return done, [Record(int(row[0]), *row[1:].tolist()) for row in records]
