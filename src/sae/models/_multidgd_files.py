"""The files of a multiDGD model: read as plain tensors, JSON and CSV, and checked against each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from .._data import listing
from ..core.untrusted import MOST_JSON_BYTES, content, strict_json

if TYPE_CHECKING:
    import torch

State: TypeAlias = "Mapping[str, torch.Tensor]"

HYPERPARAMETERS = (
    "latent_dimension",
    "n_components",
    "n_hidden",
    "n_hidden_modality",
    "n_units",
    "decoder_width",
    "n_features_per_modality",
    "modalities",
)
SPLITS = {
    "train": ("representation.z", "correction_rep.z"),
    "validation": ("validation_rep.z", "correction_val_rep.z"),
    "test": ("test_rep.z", "correction_test_rep.z"),
}
"""Where the latents of the cells of a split are, and those of their covariate."""
COVARIATE_WIDTH = 2
LISTS, LAYERS = ("modalities", "n_features_per_modality"), ("n_hidden", "n_hidden_modality")
MOST_LAYERS, MOST_UNITS = 1_000, 10**8


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a model say.

    Attributes
    ----------
    n_latent, n_covariate
        Widths of the latent, and of the covariate's; the latter is 0 for a model without one.
    obs
        The cells that it was made with, all text, if that is known.
    latents
        (n, d + c) latents by the names of cells; of no cells where `obs` is None.
    """

    state: State
    modalities: tuple[str, ...]
    n_latent: int
    n_covariate: int
    obs: pd.DataFrame | None
    latents: pd.DataFrame


def read_checkpoint(folder: Path, name: str | None, obs: pd.DataFrame | None) -> Checkpoint:
    """Read a model that multiDGD saved, and check that its files belong together."""
    name = name or _only_name(folder)
    settings = _read_hyperparameters(folder / f"{name}_hyperparameters.json")
    state = _read_state(folder / f"{name}.pt")
    n_latent, n_covariate = settings["latent_dimension"], _covariate_width(state, settings)
    _check_state(state, settings, n_covariate, name)
    obs = _read_obs(folder, name) if obs is None else _checked_obs(obs, "obs=")
    latents = pd.DataFrame(np.empty((0, n_latent + n_covariate), np.float32), index=pd.Index([], dtype=str))
    if obs is not None:
        latents = _latents(state, obs, n_latent + n_covariate)
    return Checkpoint(state, tuple(settings["modalities"]), n_latent, n_covariate, obs, latents)


def _only_name(folder: Path) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Pass the one that the model was saved to.")
    suffix = "_hyperparameters.json"
    names = sorted(file.name.removesuffix(suffix) for file in folder.glob(f"*{suffix}"))
    if not names:
        has = listing(sorted(file.name for file in folder.iterdir()))
        raise FileNotFoundError(f"{folder} has no file '<name>{suffix}', as multiDGD saves it; it has {has}.")
    if len(names) > 1:
        raise ValueError(f"{folder} has several models: {listing(names)}. Pass one of them as name=.")
    return names[0]


def _read_hyperparameters(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}, which multiDGD saves with the weights.")
    found = strict_json(content(file, MOST_JSON_BYTES), str(file), finite=False)
    missing = [key for key in HYPERPARAMETERS if key not in found] if isinstance(found, dict) else HYPERPARAMETERS
    if missing:
        raise ValueError(
            f"{file} lacks {listing(missing)}. It has to be the file that multiDGD saves with the weights."
        )
    _check_hyperparameters(found, file)
    n, n_widths = len(found["modalities"]), len(found["n_features_per_modality"])
    if n != n_widths:
        raise ValueError(f"{file} has {n} modalities, and numbers of features of {n_widths}.")
    return found


def _check_hyperparameters(found: Mapping[str, Any], file: Path) -> None:
    """Check that sizes are sizes, and names names."""
    for key in HYPERPARAMETERS:
        most = MOST_LAYERS if key in LAYERS else MOST_UNITS
        values = found[key] if key in LISTS and isinstance(found[key], list) else [found[key]]
        if key == "modalities":
            right = all(isinstance(value, str) for value in values)
        else:
            right = all(type(value) is int and 0 <= value <= most for value in values)
        if not right or (key in LISTS) != isinstance(found[key], list):
            raise ValueError(f"{file} has as {key!r} {str(found[key])[:50]}, which multiDGD does not save.")


def _read_state(file: Path) -> State:
    """Load a state dict without running anything that the file says."""
    import torch

    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}: the weights, as multiDGD saves them.")
    remedy = f"Load the model with multiDGD, if you trust it, and save its weights: torch.save(model.state_dict(), {file.name!r})."
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged files, torch raises whatever comes first
        raise ValueError(
            f"{file} is damaged, or holds more than tensors. It is not unpickled, since that could run any code. {remedy}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} is not a state dict, which has tensors by name. {remedy}")
    return state


def _covariate_width(state: State, settings: Mapping[str, Any]) -> int:
    mean = state.get("correction_gmm.mean")
    if mean is not None:
        return mean.shape[-1]
    return COVARIATE_WIDTH if settings.get("correction_variable") else 0


def _check_state(state: State, settings: Mapping[str, Any], c: int, name: str) -> None:
    """Check that all parameters are there, finite, and of the right shapes."""
    expected = dict(_shapes(settings, c))
    for key, correction in SPLITS.values():
        if key in state:
            expected[key] = (None, settings["latent_dimension"])
            expected |= {correction: (len(state[key]), c)} if c else {}
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(f"{name}.pt lacks {len(missing)} parameters of the model: {listing(missing, 20)}.")
    for key, shape in expected.items():
        found = tuple(state[key].shape)
        if len(found) != len(shape) or any(wanted not in (None, n) for n, wanted in zip(found, shape, strict=True)):
            wanted = " × ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"{name}.pt does not fit {name}_hyperparameters.json: {key} has the shape {found}; expected {wanted}."
            )
        if not state[key].isfinite().all():
            raise ValueError(f"{name}.pt: {key} has NaN or infinite values. The training of the model has failed.")


def _shapes(settings: Mapping[str, Any], c: int) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Yield the names and shapes of parameters (None: any size); c is the width of the covariate's latent."""
    d, k = settings["latent_dimension"], settings["n_components"]
    yield "representation.z", (None, d)
    yield from {"gmm.mean": (k, d), "gmm.neglogvar": (k, d), "gmm.weight": (k,)}.items()
    if c:
        key = "correction_gmm"
        yield from {f"{key}.mean": (None, c), f"{key}.neglogvar": (None, 1), f"{key}.weight": (None,)}.items()
    units, wide, n = settings["n_units"], settings["decoder_width"], settings["n_hidden_modality"]
    main = [d + c] + [units] * settings["n_hidden"]
    widths = {"decoder.main": main}
    for i, g in enumerate(settings["n_features_per_modality"]):
        last = [wide * max(units, round(math.sqrt(g)))] * (n > 1)
        widths[f"decoder.out_modules.{i}.fc"] = [main[-1]] + [wide * units] * (n - 2) + last + [g]
        yield f"decoder.out_modules.{i}.distribution.log_r", (1, g)
    for key, sizes in widths.items():
        for i, (n_in, n_out) in enumerate(pairwise(sizes)):
            yield f"{key}.{2 * i}.weight", (n_out, n_in)
            yield f"{key}.{2 * i}.bias", (n_out,)


def _read_obs(folder: Path, name: str) -> pd.DataFrame | None:
    """Read the table of cells that multiDGD wrote; its name lacks the model's."""
    named = [file for file in (folder / f"{name}_obs.csv", folder / "_obs.csv") if file.is_file()]
    files = named[:1] or sorted(folder.glob("*_obs.csv"))
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(f"{folder} has several tables of cells: {listing(f.name for f in files)}. Pass one as obs=.")
    try:
        # As text, so that names that look like numbers stay what they are.
        table = pd.read_csv(files[0], dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"{files[0]} is not a table of cells, or was damaged: {error}. Pass one as obs=.") from error
    return _checked_obs(table.set_index(table.columns[0]), str(files[0]))


def _checked_obs(obs: pd.DataFrame, where: str) -> pd.DataFrame:
    if "train_val_test" not in obs:
        raise ValueError(
            f"{where} has no column 'train_val_test'; it has {listing(obs.columns)}. Pass the obs of the data that the model "
            "was made with as obs=."
        )
    names = obs.index.astype(str)
    if not names.is_unique:
        repeated = listing(names[names.duplicated()].unique(), 3)
        raise ValueError(
            f"{where} has cell names that occur more than once ({repeated}): their latents cannot be told apart."
        )
    return obs.astype(str).set_axis(names)


def _latents(state: State, obs: pd.DataFrame, width: int) -> pd.DataFrame:
    """Return latents, each with that of its covariate, by the names of cells: those of a split are in the order of `obs`."""
    tables = []
    for split, keys in SPLITS.items():
        names = obs.index[obs["train_val_test"] == split]
        n = len(state[keys[0]]) if keys[0] in state else 0
        # Latents of test cells may be those of other data. Then nothing tells whose they are.
        if n != len(names) and split != "test":
            raise ValueError(
                f"The checkpoint has latents of {n} {split} cells, and the table of cells {len(names)} of them: it is not that of "
                "the model. (multiDGD writes _obs.csv anew for each model that is made or loaded in the folder.) Pass the obs of "
                "the data that the model was made with as obs=."
            )
        if n == len(names):
            parts = [state[key].float().numpy() for key in keys if key in state]
            values = np.hstack(parts) if parts else np.empty((0, width), np.float32)
            tables.append(pd.DataFrame(values[:, :width], index=names))
    return pd.concat(tables)
