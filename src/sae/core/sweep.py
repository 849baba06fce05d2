"""Many fits of SAEs to one matrix: which ones a grid stands for, what is measured of each, and where it is kept."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import queue
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from scipy import sparse

from .architectures import ARCHITECTURES
from .files import replacing
from .fitting import Fitted, Options, fit, plan, with_chosen_k
from .labels import cross_fit, stratified_halves
from .matching import match_vectors
from .recovery import recovery
from .rows import Matrix
from .seeds import is_seed
from .sources import Source
from .stability import nearest_other
from .untrusted import MOST_JSON_BYTES, content, strict_json

FORMAT = 1
"""Of the files; those of another one are not read."""
SPARSITY = ("k", "l1", "l0")
SETTINGS = tuple(field.name for field in fields(Options) if field.name not in ("device", "frozen_decoder"))
FLOATS = ("l1", "l0", "learning_rate", "validation")
N_SPLITS = 5
RECOVERED = 0.95
FAILURES = (ArithmeticError, ValueError, MemoryError, OSError, RuntimeError)
REPEATABLE = (ArithmeticError, ValueError)
"""Failures that would come again."""


@dataclass(frozen=True)
class Run:
    """One SAE of a sweep."""

    setting: int
    """Number of its options; runs that differ in nothing but the seed share it."""
    options: Options
    seed: int


@dataclass(frozen=True)
class Evidence:
    """What is known of the cells, to judge SAEs by."""

    codes: np.ndarray | None = None
    """(n,) label of each cell, -1 for none."""
    truth: np.ndarray | None = None
    """(n, p) true variables."""
    seed: int = 0
    """Of the divisions into halves, the same for all runs."""

    @property
    def identity(self) -> str:
        """What differs for other labels, another truth, or other divisions."""
        parts = [np.array(self.seed), self.codes] if self.codes is not None else []
        parts += [self.truth] if self.truth is not None else []
        content = b"".join(repr((part.shape, part.dtype)).encode() + part.tobytes() for part in parts)
        return hashlib.blake2b(content, digest_size=12).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What is kept of a run."""

    record: dict[str, Any]
    """Settings and measures as plain values, None for unknown ones; `error` where it failed."""
    directions: np.ndarray | None = None
    """(features that are active in some cell, m), decoder rows of length 1 in the training space."""
    lasting: bool = True
    """Whether the run would end in the same way again."""


# ---- Which runs


def expand(
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]], seeds: Sequence[int], *, device: str = "auto"
) -> list[Run]:
    """List the runs of one grid or of several, none twice: all combinations of the values of each setting.

    Of `k`, `l1` and `l0`, a combination keeps the one that its architecture uses.

    Parameters
    ----------
    grid
        Values of each of `SETTINGS`, and of `seed` where they are not `seeds`; one value need not be in a list.
    """
    grids = list(grid) if isinstance(grid, Iterable) and not isinstance(grid, Mapping) else [grid]
    if not grids:
        raise ValueError("grid= is empty. Pass settings and their values, such as {'n_features': [64, 128]}.")
    asked: list[tuple[Options, int]] = []
    for one in grids:
        if not isinstance(one, Mapping):
            raise TypeError(f"grid= has a {type(one).__name__}; expected a mapping of settings to values, or several.")
        values = {name: _values(name, given) for name, given in one.items()}
        _check_used(values)
        own_seeds = values.pop("seed", seeds)
        for combination in product(*values.values()):
            options = _options(dict(zip(values, combination, strict=True)), device)
            asked += [(options, seed) for seed in own_seeds]
    numbers: dict[Options, int] = {}
    return [Run(numbers.setdefault(options, len(numbers)), options, seed) for options, seed in dict.fromkeys(asked)]


def _values(name: str, given: Any) -> list[Any]:
    if name not in (*SETTINGS, "seed"):
        raise ValueError(f"grid= has {name!r}, which is no setting; known are {', '.join((*SETTINGS, 'seed'))}.")
    given = given.tolist() if isinstance(given, np.ndarray) else given
    listed = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    values = [value.item() if isinstance(value, np.generic) else value for value in listed]
    if not values:
        raise ValueError(f"grid= has no values for {name!r}. Pass one or more, or leave it out.")
    if name == "seed" and not all(map(is_seed, values)):
        raise ValueError(f"grid= has the seeds {values}; expected integers from 0 to 2**62.")
    return values


def _sparsity(architecture: Any) -> str | None:
    known = isinstance(architecture, str) and architecture in ARCHITECTURES
    return ARCHITECTURES[architecture].sparsity if known else None


def _check_used(values: Mapping[str, list[Any]]) -> None:
    """Refuse a penalty or k that would be ignored throughout."""
    architectures = values.get("architecture", [Options().architecture])
    used = set(map(_sparsity, architectures))
    for name in SPARSITY:
        if name in values and None not in used and name not in used:
            names = ", ".join(map(repr, architectures))
            raise ValueError(
                f"grid= has {name!r}, which its architectures ({names}) do not use: they are made sparse by "
                f"{', '.join(sorted(map(str, used)))}=. Name another architecture, or leave {name!r} out."
            )


def _options(settings: dict[str, Any], device: str) -> Options:
    """Make the options of a combination; equal numbers are written in the same way."""
    sparsity = _sparsity(settings.get("architecture", Options().architecture))
    used = {name: value for name, value in settings.items() if name not in SPARSITY or sparsity in (None, name)}
    floats = {name: float(used[name]) for name in FLOATS if isinstance(used.get(name), int)}
    return Options(**used | floats, device=device)


# ---- One run


def measured(source: Source, run: Run, evidence: Evidence) -> Outcome:
    """Train one SAE and measure it; where that fails, the record says how."""
    x = source()
    record = _asked(run)
    start = time.perf_counter()
    try:
        planned = with_chosen_k(plan(x, run.options, run.seed))
        record |= _settings(asdict(planned.settings) | {"preprocess": planned.scaling.kind})
        fitted = fit(planned)
        seconds = time.perf_counter() - start
        if fitted.params["ended"] == "interrupted":
            raise KeyboardInterrupt
        measures, directions = _measures(x, fitted, evidence)
    except FAILURES as error:
        return Outcome(record | {"error": f"{type(error).__name__}: {error}"}, None, isinstance(error, REPEATABLE))
    record |= measures | {"seconds": seconds}
    return Outcome({name: None if value != value else value for name, value in record.items()}, directions)


def _asked(run: Run) -> dict[str, Any]:
    options = run.options
    more = {"recipe": options.recipe, "validation": options.validation, "early_stopping": options.early_stopping}
    return {**_settings(asdict(options)), **more, "seed": run.seed}


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Name the settings as the parameters of a stored SAE are; the L0 penalty must not be taken for the measure."""
    names = ("architecture", "preprocess", "n_features", "k", "l1", "learning_rate", "steps", "batch_size")
    found = {name: given[name] for name in names} | {"l0_weight": given["l0"]}
    return found | {"k": None} if found["k"] == "auto" else found


def _measures(x: Matrix, fitted: Fitted, evidence: Evidence) -> tuple[dict[str, Any], np.ndarray]:
    a = fitted.autoencoder.encode(x).activations
    alive = a.getnnz(axis=0) > 0
    directions = fitted.directions[alive]
    found = {name: fitted.params[name] for name in ("fvu", "val_fvu", "l0", "val_l0")}
    found |= {"dead": float(1 - alive.mean()), "redundancy": redundancy(directions)}
    if evidence.codes is not None:
        found["label_auroc"] = label_auroc(a, evidence.codes, evidence.seed)
    if evidence.truth is not None:
        recovered = recovery(evidence.truth, a)
        found |= {"truth_best": float(recovered.best.mean()), "truth_matched": float(recovered.matched.mean())}
        found["truth_found"] = int((recovered.best > RECOVERED).sum())
    return found, directions.astype(np.float32)


def redundancy(directions: np.ndarray) -> float:
    """Mean over rows (h, m) of length 1 of the highest cosine with another one; NaN for fewer than two."""
    return float(nearest_other(directions).mean()) if len(directions) > 1 else float("nan")


def label_auroc(a: sparse.csr_matrix, codes: np.ndarray, seed: int) -> float:
    """Mean over labels of the held-out AUROC of each label's best feature, chosen on the other half of the cells."""
    known = codes >= 0
    # Not the array itself: one that another process shares is read-only, for which kernels would be compiled anew.
    codes = codes[known].astype(np.int64)
    halves = stratified_halves(codes, N_SPLITS, np.random.default_rng(seed))
    held_out = cross_fit(a[known], codes, int(codes.max()) + 1, halves).held_out_auroc
    scored = held_out[:, :, ~np.isnan(held_out).all(axis=(0, 1))]
    return float(np.nanmean(scored, axis=(0, 1)).mean()) if scored.size else float("nan")


# ---- All runs


def in_this_process(x: Matrix, runs: Sequence[Run], evidence: Evidence) -> Generator[Any, None, None]:
    """Yield each run with its outcome, one after another."""
    for run in runs:
        yield run, measured(lambda: x, run, evidence)


def in_processes(
    source: Source, runs: Sequence[Run], evidence: Evidence, n_jobs: int, n_threads: int
) -> Generator[Any, None, None]:
    """Yield each run with its outcome, as they come, from `n_jobs` processes that share `n_threads` threads."""
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(backend="loky", inner_max_num_threads=max(1, n_threads // n_jobs)):
        parallel = Parallel(n_jobs, return_as="generator_unordered", batch_size=1)
        with closing(parallel(delayed(_with_run)(source, run, evidence) for run in runs)) as outcomes:
            yield from outcomes


def on_client(source: Source, runs: Sequence[Run], evidence: Evidence, client: Any) -> Generator[Any, None, None]:
    """Yield each run with its outcome, as they come, from a dask client or any executor with `submit`."""
    finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
    if hasattr(client, "scatter"):
        source, evidence = client.scatter(source), client.scatter(evidence)
        # The function is the same for all, and so would be the keys of equal calls of an earlier sweep that was cancelled.
        submit = partial(client.submit, pure=False)
    else:
        submit = client.submit
    futures = [submit(_with_run, source, run, evidence) for run in runs]
    try:
        for future in futures:
            future.add_done_callback(finished.put)
        for _ in futures:
            yield finished.get().result()
    finally:
        for future in futures:
            future.cancel()


def _with_run(source: Source, run: Run, evidence: Evidence) -> tuple[Run, Outcome]:
    return run, measured(source, run, evidence)


# ---- What is kept


class Store:
    """Finished runs in a folder: a JSON file each, and the directions of its features beside it.

    Parameters
    ----------
    folder
        Where they are kept; it may hold those of other data and of other grids.
    identity
        Of the data, and of all that runs are judged by.
    """

    def __init__(self, folder: Path, identity: str, *, with_directions: bool = True):
        self.folder, self.with_directions = folder, with_directions
        self._common = {"format": FORMAT, "version": importlib.metadata.version("scsae"), "data": identity}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, run: Run, suffix: str = ".json") -> Path:
        """Return the file of a run."""
        described = json.dumps({**self._common, **asdict(run.options), "seed": run.seed}, sort_keys=True)
        return self.folder / (hashlib.blake2b(described.encode(), digest_size=16).hexdigest() + suffix)

    def save(self, run: Run, outcome: Outcome) -> None:
        """Write a run, the record last; a crash while writing leaves none."""
        if self.with_directions and outcome.directions is not None:
            with replacing(self.path(run, ".npy")) as partial_path, partial_path.open("wb") as file:
                np.save(file, outcome.directions)
        with replacing(self.path(run)) as partial_path:
            partial_path.write_text(json.dumps(outcome.record, indent=1, allow_nan=False), encoding="utf-8")

    def find(self, run: Run) -> dict[str, Any] | None:
        """Return the record of a run if it is there, in files that can be read."""
        try:
            record = strict_json(content(self.path(run), MOST_JSON_BYTES), str(self.path(run)))
            if not isinstance(record, dict) or not {"fvu", "error"} & record.keys():
                return None
            if any(isinstance(value, dict | list) for value in record.values()):
                return None
            if self.with_directions and "error" not in record and self.directions(run).ndim != 2:
                return None
        except (FileNotFoundError, ValueError, EOFError, TokenError):
            return None
        return record

    def directions(self, run: Run) -> np.ndarray:
        """Return the directions of a run's features, (active features, m)."""
        # Not `np.load`, which takes archives for arrays.
        return np.lib.format.open_memmap(self.path(run, ".npy"), mode="r")


# ---- What they say together


def stability(dictionaries: Sequence[np.ndarray]) -> np.ndarray:
    """Mean cosine of each dictionary's features with those matched one to one in the others, those without a match counted 0.

    Parameters
    ----------
    dictionaries
        Two or more, (features, m) each.
    """
    n = len(dictionaries)
    agreement = np.full((n, n), np.nan)
    for i in range(n):
        for j in range(i + 1, n):
            a, b = dictionaries[i], dictionaries[j]
            larger = max(len(a), len(b))
            found = np.nansum(match_vectors(a, b).similarity) / larger if larger else np.nan
            agreement[i, j] = agreement[j, i] = found
    return np.array([np.delete(row, i).mean() for i, row in enumerate(agreement)])
