from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Representation, fingerprint, holder, representation
from .._design import label_column
from .._progress import progress_bar
from .._variables import Asked, variables

if TYPE_CHECKING:
    from ..core.sweep import Evidence, Run, Store

OPTIONAL = (
    "k", "l1", "l0_weight", "early_stopping", "label_auroc", "truth_best", "truth_matched", "truth_found", "stability", "error",
)  # fmt: skip
"""Columns that are left out where no run has them."""


def sweep(
    data: Data,
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    use_rep: str | None = None,
    layer: str | None = None,
    mod: str | None = None,
    groupby: str | None = None,
    truth: Asked | None = None,
    n_seeds: int = 1,
    n_jobs: int = 1,
    client: Any = None,
    path: str | PathLike[str] | None = None,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    progress: bool = True,
    key_added: str = "sae_sweep",
) -> pd.DataFrame:
    """Train a grid of SAEs and compare them: how well they reconstruct, how sparsely, and what else they are good for.

    Every combination of settings is trained with every seed as :func:`sae.tl.fit` trains it, on the same cells; `fit` with the
    settings and the `seed` of a row as `rng` gives that very SAE. More active features always reconstruct better, so no
    single number says which SAE is best: `pareto` marks the settings that no other beats in both L0 and held-out FVU.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`. What is in memory is shared by the processes, what is on disk (a memory map, a backed, Zarr or
        dask matrix) is opened by each of them, and with `client` must be where its workers find it. The result is the same.
    grid
        Settings and the values to try, such as `{"n_features": [64, 128], "k": [4, 8, 16]}`, of which all combinations are
        trained; or a list of such grids. The settings are arguments of :func:`sae.tl.fit`: `architecture`, `recipe`, `preprocess`,
        `n_features`, `k`, `l1`, `l0`, `learning_rate`, `steps`, `batch_size`, `validation`, `early_stopping`; and `seed`,
        instead of `n_seeds`. What is left out is chosen as `fit` does. Of `k`, `l1` and `l0` a combination has the one that its
        `architecture` uses. What is asked for twice is trained once.
    use_rep, layer, mod
        The representation to train on, as in :func:`sae.tl.fit`.
    groupby
        Column of `obs` with labels to score the features against.
    truth
        True variables to find among the features: a key of `obsm`, or what else :func:`sae.tl.recovery` takes.
    n_seeds
        Train each SAE from so many seeds: the integer of `rng` and those that follow.
    n_jobs
        Processes to train in, -1 for one per CPU, however many threads `OMP_NUM_THREADS` allows. They share the CPUs, or those
        threads, and have one each at least: on the CPU, small SAEs are trained fastest by one process per CPU. Each needs a few
        seconds to start.
    client
        A dask client (`distributed.Client`) to train on instead, or any executor with `submit`.
    path
        A folder that keeps each run when it is finished. Called again with the same folder, whatever stopped it, the
        sweep goes on where it was; a larger grid trains what is new. Runs on other data, or judged by other labels or another truth,
        are told apart, and those of another version of sae are done again.
    rng
        Seed or generator, for an integer.
    device
        As in :func:`sae.tl.fit`.
    progress
        Show a progress bar when it takes more than a second.
    key_added
        Name of the sweep in `uns`.

    Returns
    -------
    A row per run, in the order of the grid, also written to `uns[key_added]["runs"]` (:func:`sae.get.sweep` returns it) beside
    `uns[key_added]["params"]`:

    * `setting`, a number that the seeds of one combination share, the settings with those that were chosen filled in (the
      penalty `l0` is in `l0_weight`) and `seed`;
    * `fvu` and `l0` on the training cells, `val_fvu` and `val_l0` on the held-out cells, as in the `params` of an SAE;
    * `dead`, the share of features that no cell activates, and `redundancy`, the mean over the others of the highest cosine of their
      decoder row with another one, in the training space;
    * with `groupby`, `label_auroc`: the mean over labels of the held-out AUROC of a label's best feature, chosen on one half of the
      cells and scored on the other (5 divisions, as in :func:`sae.tl.score_labels`, the same for all runs);
    * with `truth`, over the true variables, `truth_best`, the mean of the highest absolute correlation with a feature, `truth_matched`,
      that with features matched one to one, and `truth_found`, the number that has a feature with one above .95;
    * with several seeds, `stability`: the mean cosine of decoder rows matched one to one with those of the setting's other seeds,
      0 for those without a match; features that no cell activates do not count;
    * `pareto`, whether no other setting has both a lower `l0` and a lower `val_fvu`, or one of them lower and the other the same.
      Settings are compared by the means over their seeds, which hold out different cells, so that the seeds of a setting are
      marked together; a run that failed is in no mean and never marked, and without held-out cells none is.
      :func:`sae.get.sweep` marks by other measures;
    * `seconds` of training; and `error`, what went wrong where a run failed.

    Optional columns are left out where no run has them. When interrupted (Ctrl-C), the finished runs are returned and written.

    Raises
    ------
    KeyError
        The representation, `groupby` or `truth` is not there.
    PermissionError
        `path` cannot be written to.
    TypeError
        A setting of another type, or a `client` that is none.
    ValueError
        A setting that is not known or out of range, before anything is trained; something else is stored under `key_added`; all
        runs failed; `n_jobs` and `client` with a matrix that other processes cannot open.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> runs = sae.tl.sweep(adata, {"n_features": [16, 32], "steps": 50}, groupby="bulk_labels")
    >>> runs[["n_features", "k", "seed"]].values.tolist()
    [[16, 4, 0], [32, 8, 0]]
    >>> best = runs.loc[runs["val_fvu"].idxmin()]
    >>> sae.tl.fit(adata, n_features=best["n_features"], k=best["k"], steps=50, rng=best["seed"])
    >>> bool(adata.uns["sae"]["params"]["val_fvu"] == best["val_fvu"])
    True
    """
    from scanpy import logging as logg

    from ..core.seeds import integer_seed
    from ..core.sweep import Evidence, Store, expand
    from ..core.train import choose_device

    held = holder(data, mod)
    _schema.check_sweep_key(key_added, held)
    _check(n_seeds, n_jobs, client)
    choose_device(device)
    first = integer_seed(rng)
    runs = expand(grid, range(first, first + n_seeds), device=device)
    evidence = Evidence(
        None if groupby is None else label_column(held.data.obs, groupby, held.where).codes.astype(np.int64),
        None if truth is None else variables(held, truth, "truth").values,
        first,
    )
    found = representation(held, use_rep, layer)
    (n, d), cells = found.matrix.shape, fingerprint(held, found.matrix)

    start = logg.info(f"training {len(runs)} SAEs on {found.where} ({n} × {d})")
    several = len(runs) > len({run.setting for run in runs})
    with tempfile.TemporaryDirectory() if path is None else nullcontext(path) as folder:
        identity = f"{cells} {n} {d} {evidence.identity}"
        store = Store(Path(folder), identity, with_directions=several or path is not None)
        records, interrupted = _records(runs, found, evidence, store, n_jobs, client, progress)
        if path is not None:
            logg.info(f"    {len(records)} of {len(runs)} runs are in {path}")
        finished = [run for run in runs if run in records]
        if not finished:
            raise KeyboardInterrupt
        agreement = _stability(finished, records, store) if several else {}
    table = _table(finished, records, agreement)
    _report(table, len(runs), path, interrupted)

    params = {
        "use_rep": None if layer is not None else (use_rep or "X_pca"),
        "layer": layer,
        "groupby": groupby,
        "truth": truth if isinstance(truth, str) else None,
        "n_obs": n,
        "fingerprint": cells,
        "ended": "interrupted" if interrupted else "finished",
        "version": importlib.metadata.version("scsae"),
    }
    _schema.write(held, key_added, {"sweep_version": _schema.SWEEP_VERSION, "params": params, "runs": table})
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key_added!r}], {len(table)} runs, {table['pareto'].sum()} of them of settings that no other beats",
    )
    return table.reset_index(drop=True)


def _check(n_seeds: int, n_jobs: int, client: Any) -> None:
    if not isinstance(n_seeds, int | np.integer) or n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds!r} is not an integer from 1 on.")
    if not isinstance(n_jobs, int | np.integer) or (n_jobs < 1 and n_jobs != -1):
        raise ValueError(f"n_jobs={n_jobs!r} is neither a number of processes nor -1, for one per CPU.")
    if client is not None and not hasattr(client, "submit"):
        raise TypeError(f"client={client!r} has no submit(). Pass a distributed.Client, or an executor.")


def _records(
    runs: list[Run],
    found: Representation,
    evidence: Evidence,
    store: Store,
    n_jobs: int,
    client: Any,
    progress: bool,
) -> tuple[dict[Run, dict[str, Any]], bool]:
    """Read the runs that are there, do the others, and tell whether that was interrupted."""
    from scanpy import logging as logg

    kept = {run: store.find(run) for run in runs}
    records = {run: record for run, record in kept.items() if record is not None}
    todo = [run for run in runs if run not in records]
    if records:
        logg.info(f"    {len(records)} of {len(runs)} runs found in {store.folder}")
    if not todo:
        return records, False
    if not os.access(store.folder, os.W_OK):
        raise PermissionError(f"The folder path={str(store.folder)!r} cannot be written to. Choose another one.")
    with (
        progress_bar(len(runs), "sweep", "run", shown=progress) as bar,
        closing(_outcomes(todo, found, evidence, n_jobs, client)) as outcomes,
    ):
        bar.update(len(records))
        try:
            for run, outcome in outcomes:
                records[run] = outcome.record
                if outcome.lasting:
                    store.save(run, outcome)
                bar.update()
        except KeyboardInterrupt:
            return records, True
    return records, False


def _outcomes(
    runs: list[Run], found: Representation, evidence: Evidence, n_jobs: int, client: Any
) -> Generator[Any, None, None]:
    from joblib import cpu_count

    from ..core.sources import source_of
    from ..core.sweep import in_processes, in_this_process, on_client
    from ..core.workers import available_threads

    n_jobs = min(cpu_count() if n_jobs == -1 else n_jobs, len(runs))
    if client is not None:
        return on_client(source_of(found.matrix, found.where), runs, evidence, client)
    if n_jobs > 1:
        return in_processes(source_of(found.matrix, found.where), runs, evidence, n_jobs, available_threads())
    return in_this_process(found.matrix, runs, evidence)


def _stability(runs: list[Run], records: Mapping[Run, dict[str, Any]], store: Store) -> dict[Run, float]:
    """Compare the seeds of each setting."""
    from ..core.sweep import stability

    by_setting: dict[int, list[Run]] = {}
    for run in runs:
        if "error" not in records[run]:
            by_setting.setdefault(run.setting, []).append(run)
    found: dict[Run, float] = {}
    for same in by_setting.values():
        if len(same) > 1:
            found |= zip(same, stability([store.directions(run) for run in same]).tolist(), strict=True)
    return found


def _table(runs: list[Run], records: Mapping[Run, dict[str, Any]], agreement: Mapping[Run, float]) -> pd.DataFrame:
    """Make a row per run."""
    rows = [{"setting": run.setting, **records[run], "stability": agreement.get(run)} for run in runs]
    found = pd.DataFrame(rows, columns=_schema.SWEEP)
    found = found.drop(columns=[name for name in OPTIONAL if found[name].isna().all()])
    for name in found:
        if name in _schema.SWEEP_TEXT:
            found[name] = pd.Categorical(found[name])
        elif found[name].dtype == object:
            found[name] = found[name].astype(np.float64)
    return _schema.plain_index(found.assign(pareto=_schema.not_beaten(found, _schema.SWEEP_PARETO)))


def _report(table: pd.DataFrame, n_runs: int, path: str | PathLike[str] | None, interrupted: bool) -> None:
    """Say what failed, and how to go on."""
    from scanpy import logging as logg

    failed = table["error"].dropna().astype(str) if "error" in table else pd.Series(dtype=str)
    if len(failed) == n_runs:
        raise ValueError(f"All {n_runs} runs failed; the first with {failed.iloc[0]}")
    if len(failed):
        logg.warning(
            f"{len(failed)} of {n_runs} runs failed, the first with {failed.iloc[0]} The column 'error' has all."
        )
    if interrupted:
        how = "Repeat the call to go on" if path is not None else "Pass path= the next time, to be able to go on"
        logg.warning(f"interrupted after {len(table)} of {n_runs} runs; what is finished is kept. {how}.")
