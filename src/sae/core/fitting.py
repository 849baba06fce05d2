"""Fitting an SAE to a matrix: what is asked for, what is chosen from the cells, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .architectures import ARCHITECTURES
from .autoencoder import Autoencoder
from .backend import Settings
from .checkpoint import Checkpoint
from .choose_k import EXPLAINED, ChosenK, choose_k
from .defaults import choose_settings
from .preprocess import PREPROCESS, Preprocess, Scaling, directions, fit_scaling
from .rows import Matrix, Rows
from .train import Record, Trained, choose_device, spread, train

MIN_CELLS = 10
RECIPES = ("default", "paper")
MAX_JUDGED = 1_000_000
"""Cells of training, and as many of those held out, on which the result is measured."""


@dataclass(frozen=True)
class Options:
    """What is asked for, under the names and with the meaning of the arguments of :func:`sae.tl.fit`; None is chosen.

    Attributes
    ----------
    frozen_decoder
        Keep a decoder of random directions, as spread as the cells, and train encoder and biases only: what an SAE finds without
        learning a dictionary.
    """

    architecture: str = "matryoshka"
    recipe: str = "default"
    preprocess: Preprocess | None = None
    n_features: int | None = None
    k: int | Literal["auto"] | None = None
    l1: float | None = None
    l0: float | None = None
    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    validation: float = 0.1
    early_stopping: int | None = None
    device: str = "auto"
    frozen_decoder: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        for name, value, choices in (
            ("architecture", self.architecture, tuple(ARCHITECTURES)),
            ("preprocess", self.preprocess or "center", PREPROCESS),
            ("recipe", self.recipe, RECIPES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        if self.recipe == "paper" and self.architecture not in ("vanilla", "relu", "topk"):
            raise ValueError(
                f"recipe='paper' trains 'vanilla', 'relu' or 'topk', not architecture={self.architecture!r}."
            )
        _check_number("validation", self.validation)
        if not 0 <= self.validation < 1:
            raise ValueError(
                f"validation={self.validation} is not a share of the cells from 0 up to, not including, 1."
            )
        _check_sparsity(self.architecture, k=self.k, l1=self.l1, l0=self.l0)
        k = None if self.k == "auto" else self.k
        _check_counts(n_features=self.n_features, k=k, steps=self.steps, batch_size=self.batch_size)
        _check_counts(early_stopping=self.early_stopping)
        if self.learning_rate is not None:
            _check_number("learning_rate", self.learning_rate)
            if not 0 < self.learning_rate < np.inf:
                raise ValueError(
                    f"learning_rate={self.learning_rate} is not above 0 and finite. Leave it out to have it chosen."
                )


@dataclass(frozen=True)
class Plan:
    """A training run before it starts: the cells, how they are scaled and divided, and all settings."""

    x: Matrix
    """(n, d), raw representation."""
    options: Options
    settings: Settings
    scaling: Scaling
    train_rows: np.ndarray
    val_rows: np.ndarray
    chosen_k: ChosenK | None = None


@dataclass(frozen=True)
class Fitted:
    """A trained SAE, and what is worth keeping of how it was trained."""

    autoencoder: Autoencoder
    history: list[Record]
    scaling: Scaling
    params: dict[str, Any]
    """Settings, scaling and goodness of fit, as plain values."""

    @property
    def directions(self) -> np.ndarray:
        """Decoder rows (h, d) in the training space, scaled to length 1."""
        return directions(self.autoencoder.W_dec, self.scaling.factors)


def options_of(params: Mapping[str, Any]) -> Options:
    """Return the options that train a stored SAE again, with nothing left to choose.

    One that ended early is trained for as many steps as it had, on a schedule of that length.
    """
    sparsity = ARCHITECTURES[params["architecture"]].sparsity
    weight = "l0_weight" if sparsity == "l0" else sparsity
    given = ("architecture", "recipe", "preprocess", "n_features", "learning_rate", "steps", "batch_size", "validation")
    if missing := [name for name in (*given, weight) if name not in params]:
        raise ValueError(
            f"The SAE was stored without {', '.join(map(repr, missing))} in its params (by version {params.get('version')} of sae), "
            "so it cannot be trained again in the same way. Run sae.tl.fit and sae.tl.encode anew."
        )
    return Options(**{name: params[name] for name in given}, **{sparsity: params[weight]})


def plan(x: Matrix, options: Options, seed: int, *, where: str = "the representation") -> Plan:
    """Divide the cells, measure their scaling and choose all settings; k="auto" is left for :func:`with_chosen_k`.

    Parameters
    ----------
    x
        (n, d), dense, CSR or on disk.
    where
        What messages call it.
    """
    n, d = x.shape
    if n < MIN_CELLS:
        raise ValueError(f"{where} has {n} cells; an SAE needs at least {MIN_CELLS}.")
    train_rows, val_rows = _split(n, options.validation, seed, where)
    paper = options.recipe == "paper"
    scaling = fit_scaling(x, "none" if options.preprocess is None and paper else options.preprocess)
    settings = choose_settings(
        n,
        d,
        architecture=options.architecture,
        paper=paper,
        n_effective=scaling.n_effective,
        n_features=options.n_features,
        k=options.k,
        l1=options.l1,
        l0=options.l0,
        learning_rate=options.learning_rate,
        steps=options.steps,
        batch_size=options.batch_size,
        n_train=len(train_rows),
        seed=seed,
        device=choose_device(options.device),
    )
    settings = replace(settings, frozen_decoder=options.frozen_decoder)
    return Plan(x, options, settings, scaling, train_rows, val_rows)


def with_chosen_k(planned: Plan) -> Plan:
    """Choose k from held-out reconstruction, where that was asked for."""
    if planned.options.k != "auto" or planned.chosen_k is not None:
        return planned
    chosen = choose_k(
        planned.x,
        planned.scaling,
        planned.settings,
        train_rows=planned.train_rows,
        val_rows=planned.val_rows,
    )
    return replace(planned, settings=replace(planned.settings, k=chosen.k), chosen_k=chosen)


def fit(
    planned: Plan,
    *,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[int, Record | None], object] | None = None,
) -> Fitted:
    """Train as planned; `checkpoint` and `on_step` are those of :func:`~sae.core.train.train`."""
    planned = with_chosen_k(planned)
    trained = train(
        planned.x,
        planned.scaling,
        planned.settings,
        train_rows=planned.train_rows,
        val_rows=planned.val_rows,
        patience=planned.options.early_stopping,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    return Fitted(trained.autoencoder, trained.history, planned.scaling, _params(planned, trained))


def _params(planned: Plan, trained: Trained) -> dict[str, Any]:
    settings, scaling = planned.settings, planned.scaling
    sparsity = ARCHITECTURES[settings.architecture].sparsity
    n, d = planned.x.shape
    return {
        "architecture": settings.architecture,
        "n_features": settings.n_features,
        "l0_weight" if sparsity == "l0" else sparsity: getattr(settings, sparsity),
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        **_choice(planned.chosen_k),
        "preprocess": scaling.kind,
        "n_constant_inputs": d - len(scaling.kept),
        "input_scale": float(scaling.forward[0]) if scaling.kind in ("center", "none") else None,
        "variance": scaling.variance,
        **_goodness(trained.autoencoder, planned),
        "recipe": planned.options.recipe,
        "steps": trained.steps,
        "ended": trained.ended,
        "validation": float(planned.options.validation),
        "n_obs": n,
    }


def how_chosen(chosen: ChosenK) -> str:
    """Say by which rule k was chosen."""
    less = f"less than {EXPLAINED:.0%} of held-out cells unexplained"
    return f"the smallest k that leaves {less}" if chosen.found else f"the default: no k leaves {less}"


def _choice(chosen: ChosenK | None) -> dict[str, Any]:
    if chosen is None:
        return {}
    tried = sorted(chosen.tried)
    return {
        "k_choice": how_chosen(chosen),
        "k_tried": np.array(tried),
        "k_tried_unexplained": np.array([chosen.tried[k] for k in tried]),
    }


def _goodness(trained: Autoencoder, planned: Plan) -> dict[str, float]:
    """Return FVU and L0 of the folded weights on the cells of training and on those held out, NaN for none.

    Of more than a million, so many evenly spaced ones are taken: to encode ten million cells would take as long as to
    train on them, and change the fourth digit.
    """
    x, parts = planned.x, {"": spread(planned.train_rows, MAX_JUDGED), "val_": spread(planned.val_rows, MAX_JUDGED)}
    rows = np.sort(np.concatenate([*parts.values()]))
    squared_error, n_active = np.empty(len(rows)), np.empty(len(rows))
    start = 0
    for block in trained.encode_blocks(x if len(rows) == x.shape[0] else Rows(x, rows)):
        done = slice(start, start := start + len(block.squared_error))
        squared_error[done], n_active[done] = block.squared_error, np.diff(block.activations.indptr)
    goodness = {}
    for prefix, part in parts.items():
        places = np.searchsorted(rows, part)
        fvu = squared_error[places].mean() / planned.scaling.variance if len(part) else np.nan
        goodness[f"{prefix}fvu"] = float(fvu)
        goodness[f"{prefix}l0"] = float(n_active[places].mean()) if len(part) else float("nan")
    return goodness


def _split(n: int, validation: float, seed: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows to train on and those to hold out."""
    shuffled = np.random.default_rng(seed).permutation(n)
    n_val = round(validation * n)
    if n_val == n:
        raise ValueError(f"validation={validation} holds out all {n} cells of {where}. Lower it.")
    return np.sort(shuffled[n_val:]), np.sort(shuffled[:n_val])


def _check_counts(**settings: int | str | None) -> None:
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected an integer.")
        if value < 1:
            raise ValueError(f"{name}={value} is below 1. Leave it out to have it chosen from the data.")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected a number.")


def _check_sparsity(architecture: str, **given: float | str | None) -> None:
    sparsity = ARCHITECTURES[architecture].sparsity
    for name, value in given.items():
        if value is None:
            continue
        if name != sparsity:
            raise ValueError(f"architecture={architecture!r} is made sparse by {sparsity}=, not by {name}=.")
        if name == "k":
            if isinstance(value, str) and value != "auto":
                raise ValueError(f"k={value!r} is neither a number of features nor 'auto'.")
            continue
        _check_number(name, value)
        if not 0 <= float(value) < np.inf:
            raise ValueError(f"{name}={value} is negative or not finite; the penalty must be 0 or more.")
