from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Holder, Representation, columns_in_order, fingerprint, holder, representation
from .._progress import progress_bar

if TYPE_CHECKING:
    from ..core.autoencoder import Autoencoder
    from ..core.fitting import Options, Plan
    from ..core.preprocess import Scaling
    from ..core.rows import Matrix
    from ..core.stability import Dictionary, Stability

COLUMNS = ("stability", "stability_best", "stability_activation", "stability_found")
THRESHOLDS = np.linspace(0, 1, 51)


def stability(
    data: Data,
    *,
    key: str = "sae",
    mod: str | None = None,
    n_seeds: int = 5,
    subsample: float | None = None,
    device: str = "auto",
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Train the SAE again from other seeds, and tell which of its features come back.

    `n_seeds` further SAEs are trained with the settings of the stored one (for as many steps, if it ended early) on the
    same representation; another seed holds out other cells, starts from other weights and takes the cells in another
    order. The features of each run are matched one to one to those of the stored SAE, for the highest sum of
    similarities:

    * by the cosine of their decoder directions, in the space of training;
    * by the correlation (Pearson) of their activations over all cells.

    Both are signed. A feature's stability is the mean over runs of the similarity with its partner, 0 in a run that
    left it without one. Features that are active in no cell have no part in it: theirs is NaN.

    Any two dictionaries have something in common by chance. The same is therefore computed for dictionaries that
    learned nothing, as many of them and as wide, dead features included: of `"random"` directions, uniform on the
    sphere in the space of training, and of the directions of random `"cells"`, which training starts near. Their
    activations are coordinates along these directions, above one threshold that gives the L0 of the SAE. Cells of one
    type are alike, so most of any two such dictionaries can be paired well, only with no say in which cell goes with
    which. A feature therefore counts as found again in a run when the angle between its decoder direction and its
    partner's is at most half the angle to the nearest other feature of its own dictionary (or to a right angle, if that
    is less: the cosine is 0.71 or more).

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, after `tl.encode`.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    n_seeds
        Further SAEs to train; each takes as long as `tl.fit` did.
    subsample
        Train each of them on a random share of the cells, such as 0.5, instead of all: are the features those of these
        cells, or of cells like these? Part of this share is held out, as in `tl.fit`; activations are compared on all cells.
    device
        As in `tl.fit`.
    rng
        Seed or generator, for the seeds, the subsamples and the random dictionaries.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes to `uns[key]["features"]` the columns

    * `stability`, mean decoder cosine with the partner;
    * `stability_best`, the same with the most similar feature of each run, which several features may share: well above
      `stability` where a feature was split or merged;
    * `stability_activation`, mean correlation of activations with the partner by activation;
    * `stability_found`, the share of runs in which it is found again;

    and to `uns[key]["stability"]` two tables and `params` (`n_seeds`, `seeds`, `subsample`):

    * `curve`, the share of features whose stability is at least a threshold: `source` (`"sae"`, `"cells"`, `"random"`),
      `measure` (`"decoder"`, `"activation"`), `threshold`, `share`;
    * `summary`, a row per source: `n_features` that are active, and means over them of `stability`, `stability_best`,
      `stability_activation`, `stability_found` and `nearest_other`, the highest cosine with another feature of the same
      dictionary; `pw_mcc`, the mean \|cosine\| of all features, dead ones too, matched one to one for its highest sum
      (arXiv:2505.20254), mean over all pairs of the 1 + `n_seeds` dictionaries, and `pw_mcc_sd`, its standard deviation
      over the pairs.

    `tl.encode` and `tl.fit` remove them.

    Raises
    ------
    KeyError
        There is no SAE of this name, it is not encoded, or its representation is gone.
    ValueError
        The representation is not the one that the SAE was trained on; a setting out of range; too few cells in a subsample
        to train on; an SAE of a version of sae that did not keep all settings.
    FloatingPointError
        Training diverged from one of the seeds.

    Notes
    -----
    A feature that comes back is a property of the cells rather than of a seed, not thereby a biological one; one that
    does not may be one of several ways to say the same thing. Five seeds are enough to rank features: on 2,638 PBMC,
    stability over five seeds correlated at 0.85 with stability over twelve others, and that over a single one at 0.59.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.stability(adata, n_seeds=2)
    >>> summary = adata.uns["sae"]["stability"]["summary"].set_index("source")
    >>> bool(summary.loc["sae", "stability"] > summary.loc["random", "stability"])
    True
    """
    from scanpy import logging as logg

    from ..core.fitting import options_of
    from ..core.preprocess import fit_scaling
    from ..core.seeds import integer_seed
    from ..core.stability import compare, random_dictionaries
    from ..core.train import choose_device

    choose_device(device)
    _check(n_seeds, subsample)
    held = holder(data, mod)
    features, stored = _schema.table(held, key, "features"), _schema.read(held, key)
    found = _trained_on(held, key, stored)
    x, params = found.matrix, stored["params"]
    options = replace(options_of(params), device=device)
    seeds = _other_seeds(n_seeds, params["seed"], integer_seed(rng))

    if params.get("ended") == "interrupted":
        logg.warning(f"{key!r} was interrupted; it is compared with SAEs that finish in its {params['steps']} steps.")
    start = logg.info(f"training {n_seeds} more SAEs like {key!r} on {found.where}")
    scaling = fit_scaling(x, options.preprocess)
    reference = _dictionary(_schema.model(stored), x, scaling)
    with progress_bar(n_seeds * params["steps"], "stability", "step", shown=progress) as bar:
        results = {"sae": compare(reference, _trained(x, options, scaling, seeds, subsample, bar.update))}
    h, l0 = reference.activations.shape[1], reference.activations.nnz / x.shape[0]
    for name, of_cells in (("cells", True), ("random", False)):
        first, *others = random_dictionaries(x, scaling, h, l0, [params["seed"], *seeds], of_cells=of_cells)
        results[name] = compare(first, others)

    new = features.assign(**_columns(results["sae"]))
    tables = {"curve": _curve(results), "summary": _summary(results)}
    of_run = {"n_seeds": n_seeds, "seeds": np.array(seeds), "subsample": subsample}
    _schema.write(held, key, {**stored, "features": new, "stability": {**tables, "params": of_run}})
    means = tables["summary"].set_index("source")["stability"]
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    to {held.where}.uns[{key!r}]['features'] the columns 'stability', ...: {means['sae']:.2f} on average "
        f"({means['cells']:.2f} for random cells, {means['random']:.2f} for random directions)\n"
        f"    {held.where}.uns[{key!r}]['stability'], the curve and the summary",
    )


def _trained_on(held: Holder, key: str, stored: Mapping[str, Any]) -> Representation:
    """Read the representation that the SAE was trained on, or say that it is another one now."""
    params, names = stored["params"], stored["weights"].get("input_names", ())
    found = representation(held, params["use_rep"], params["layer"])
    x = columns_in_order(found, names)
    if x.shape[0] != params["n_obs"] or fingerprint(held, x) != params.get("fingerprint"):
        raise ValueError(
            f"{found.where} ({x.shape[0]} cells) is not what {key!r} was trained on ({params['n_obs']} cells): other cells, "
            f"other names or other values. Run sae.tl.fit(..., key_added={key!r}) and sae.tl.encode on it first."
        )
    return Representation(x, found.where, found.names)


def _other_seeds(n: int, seed: int, drawn_from: int) -> list[int]:
    """Draw different seeds that are not that of the stored SAE."""
    drawn = np.random.default_rng(drawn_from).choice(2**31, n + 1, replace=False)
    return [int(other) for other in drawn if other != seed][:n]


def _trained(
    x: Matrix,
    options: Options,
    scaling: Scaling,
    seeds: list[int],
    subsample: float | None,
    on_step: Callable[[], object],
) -> Iterator[Dictionary]:
    from ..core.fitting import fit, plan

    for seed in seeds:
        planned = plan(x, options, seed) if subsample is None else _plan_subsample(x, options, seed, subsample)
        fitted = fit(planned, on_step=lambda number, record: on_step())
        if fitted.params["ended"] == "interrupted":
            raise KeyboardInterrupt
        yield _dictionary(fitted.autoencoder, x, scaling)


def _plan_subsample(x: Matrix, options: Options, seed: int, subsample: float) -> Plan:
    from ..core.fitting import plan
    from ..core.rows import select_rows

    n = x.shape[0]
    rows = np.sort(np.random.default_rng(seed).choice(n, round(subsample * n), replace=False))
    try:
        return plan(select_rows(x, rows), options, seed, where="the random share of the cells")
    except ValueError as error:
        raise ValueError(
            f"The SAE cannot be trained on {len(rows)} of {n} cells (subsample={subsample}); choose a larger share. {error}"
        ) from error


def _dictionary(autoencoder: Autoencoder, x: Matrix, scaling: Scaling) -> Dictionary:
    from ..core.preprocess import directions
    from ..core.stability import Dictionary

    rows = directions(autoencoder.W_dec, scaling.factors).astype(np.float32)
    return Dictionary(rows, autoencoder.encode(x).activations)


def _columns(result: Stability) -> dict[str, np.ndarray]:
    """Average over runs; a feature that is dead stays NaN."""
    values = (result.cosine, result.best_cosine, result.correlation, result.found)
    return {name: of_runs.mean(axis=0) for name, of_runs in zip(COLUMNS, values, strict=True)}


def _curve(results: Mapping[str, Stability]) -> pd.DataFrame:
    from ..core.stability import curve

    measures = {"decoder": "cosine", "activation": "correlation"}
    shares = [
        curve(getattr(result, name).mean(axis=0), THRESHOLDS)
        for result in results.values()
        for name in measures.values()
    ]
    n = len(THRESHOLDS)
    columns = {
        "source": np.repeat(np.arange(len(results)), len(measures) * n),
        "measure": np.tile(np.repeat(np.arange(len(measures)), n), len(results)),
        "threshold": np.tile(THRESHOLDS, len(shares)),
        "share": np.concatenate(shares),
    }
    categories = {"source": pd.Index(list(results)), "measure": pd.Index(list(measures))}
    return _schema.tidy(columns, list(columns), categories)


def _summary(results: Mapping[str, Stability]) -> pd.DataFrame:
    columns: dict[str, Any] = {"source": np.arange(len(results))}
    for name in ("n_features", *COLUMNS, "nearest_other", "pw_mcc", "pw_mcc_sd"):
        columns[name] = []
    for result in results.values():
        alive = ~np.isnan(result.cosine[0])
        columns["n_features"].append(int(alive.sum()))
        for name, values in _columns(result).items():
            columns[name].append(values[alive].mean() if alive.any() else np.nan)
        columns["nearest_other"].append(result.nearest_other[alive].mean() if alive.any() else np.nan)
        columns["pw_mcc"].append(result.pw_mcc.mean())
        columns["pw_mcc_sd"].append(result.pw_mcc.std(ddof=1) if len(result.pw_mcc) > 1 else np.nan)
    table = {name: np.asarray(values) for name, values in columns.items()}
    return _schema.tidy(table, list(table), {"source": pd.Index(list(results))})


def _check(n_seeds: int, subsample: float | None) -> None:
    if not isinstance(n_seeds, int | np.integer) or n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds!r} is not a number of SAEs to train, of 1 or more.")
    if subsample is not None and not (isinstance(subsample, float | np.floating) and 0 < subsample < 1):
        raise ValueError(
            f"subsample={subsample!r} is not a share of the cells between 0 and 1. Leave it out to train on all."
        )
