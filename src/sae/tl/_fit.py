from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, fingerprint, holder, representation
from .._progress import progress_bar
from ..core.architectures import ARCHITECTURES
from ..core.preprocess import PREPROCESS, Preprocess, fit_scaling

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..core.autoencoder import Autoencoder
    from ..core.backend import Settings
    from ..core.preprocess import Scaling
    from ..core.rows import Matrix
    from ..core.train import Record, Trained

MIN_CELLS = 10
RECIPES = ("default", "paper")


def fit(
    data: Data,
    use_rep: str | None = None,
    *,
    layer: str | None = None,
    mod: str | None = None,
    architecture: Literal["topk", "batchtopk", "matryoshka", "vanilla", "relu", "jumprelu", "gated"] = "matryoshka",
    recipe: Literal["default", "paper"] = "default",
    preprocess: Preprocess | None = None,
    n_features: int | None = None,
    k: int | Literal["auto"] | None = None,
    l1: float | None = None,
    l0: float | None = None,
    learning_rate: float | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    validation: float = 0.1,
    early_stopping: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    rng: int | np.random.Generator | None = 0,
    device: str = "auto",
    progress: bool = True,
    key_added: str = "sae",
) -> None:
    r"""Train a sparse autoencoder (SAE) on an embedding of the cells.

    With x (d,) the embedding of a cell, scaled as `preprocess` says, and h = `n_features`, the SAE is

    .. math::
        a = \sigma(x W_{enc} + b_{enc}) \in R^h, \qquad \hat{x} = a W_{dec} + b_{dec}

    and minimises the mean over cells of ‖x − x̂‖² with Adam. What σ keeps of the pre-activations, and what else is minimised,
    is the architecture:

    ============== =============================================================== ============ =========================
    `architecture` σ keeps                                                         made sparse  source
    ============== =============================================================== ============ =========================
    `"matryoshka"` as `"batchtopk"`; the first features reconstruct alone, too     `k`          arXiv:2503.17547
    `"batchtopk"`  the k · n largest of n cells in training; later, those above    `k`          arXiv:2412.06410
                   one threshold at which held-out cells have k on average
    `"topk"`       the k largest of each cell                                      `k`          arXiv:2406.04093
    `"vanilla"`    all positive ones, with the penalty `l1` · Σ a                  `l1`         arXiv:2410.11468
    `"relu"`       the same; a free bias is added to x                             `l1`         arXiv:2410.11468
    `"jumprelu"`   those above a learned threshold, with the penalty `l0` · ‖a‖₀   `l0`         arXiv:2407.14435
    `"gated"`      those whose gate is open, with the penalty on the gate          `l1`         arXiv:2404.16014
    ============== =============================================================== ============ =========================

    Decoder rows keep unit norm and start at the directions of random cells, with noise of the same length and of the cells'
    spread; the encoder starts as the decoder's transpose. The learning rate warms up over the first 5 % of the steps and
    decays over the last 20 %, both linearly. Sparsity grows over the first 30 %: from 3 k to k active features, or from no
    penalty to all of it. The scaling is folded into the weights at the end, so the stored weights act on the embedding as
    it stands in `data`.

    On the CPU, k and L1 architectures are trained by compiled code (the first run on a machine compiles it, some 15 s); the
    others, and all on other devices, by torch. Results are the same for any number of threads, which
    `OMP_NUM_THREADS` limits.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`. The embedding may be a memory map, a backed, Zarr or dask matrix: it is read in
        shuffled blocks of rows, and memory holds the weights, their moments and some blocks.
    use_rep
        Key of `obsm`, or `"X"`. By default `"X_pca"`. A MuData without `mod` needs the key of a joint embedding.
    layer
        Train on this layer instead of an embedding.
    mod
        The modality whose embedding to read and in which to store the result.
    architecture
        See above. Nested dictionaries keep a feature for broad programs however wide the dictionary is; the widths are
        eight more than there are effective inputs (the participation ratio (Σ v)² / Σ v² of the variances v of x), doubled
        up to h, and count 1, 1/2, 1/4, ...
    recipe
        `"paper"` trains as arXiv:2410.11468 did: no scaling, uniform initial weights, free decoder norms, errors averaged
        over d and the penalty over h, a constant rate; by default h = 10,000, `l1` = 0.001, rate 1e-4, batches of 128,
        500 passes.
    preprocess
        `"damped"`: principal components x_i, of variances λ_i, become (x_i − mean) / √λ_i · (1 − ν / λ_i)³, which whitens
        what is signal and shrinks what is noise; ν = λ_d² / λ_{d/2} continues the logarithm of the spectrum by half its
        length. `"center"`: subtract the mean, one global scale (mean squared norm d). `"standardize"`: unit variance per
        column. `"whiten"`: decorrelated columns of unit variance, with a ridge of 0.001 times the mean eigenvalue. `"none"`.
        Damping and whitening need d ≤ 2,000 and 10 d cells. By default `"damped"` for principal components, which
        are recognised by being uncorrelated, and `"center"` for everything else.
    n_features
        Width h of the dictionary. By default the largest power of two that leaves 24 cells a feature, at least 64 and
        at most 8,192 or the power of two from 8 d on: 64 for 2,700 cells, 512 from 12,500 cells on at d = 50.
    k
        Active features per cell. By default 0.3 d, between 4 and 64, at most a quarter of `n_features`. `"auto"`: the smallest
        k, of 0.1 d to 0.62 d, that leaves less than 1 % of held-out cells unexplained (in the training space, short runs on
        narrow dictionaries, by bisection), and the default where none does, as on noisy cells. `params` then holds what was
        tried, and how it was chosen.
    l1
        Weight of the L1 penalty, in the convention of sums over d and over h. By default 1.
    l0
        Weight of the L0 penalty of `"jumprelu"`. By default 0.1.
    learning_rate
        Peak rate. By default 0.008 where k is set, else 2e-4 · √(16384 / h).
    steps
        Gradient steps. By default 2,500 where k is set, else 9 / `learning_rate`; or one pass over the cells if that is more.
    batch_size
        Cells per step. By default 256 below 100,000 cells, 1,024 below a million, else 4,096; never more than the
        training cells.
    validation
        Share of the cells held out to report on, 0 for none.
    early_stopping
        Begin the final decay of the learning rate when the held-out FVU has not fallen by 0.1 % over so many of the 50
        records of the history.
    checkpoint
        A file to keep the state of training in, about once a minute and when interrupted. Where it exists, training goes
        on from it, to the same result as without a break.
    rng
        Seed or generator. The integer that was drawn is kept in `params["seed"]`; the same one gives the same weights on
        the same machine.
    device
        `"cpu"`, `"cuda"`, `"mps"`, or `"auto"` for the fastest there is.
    progress
        Show a progress bar when training takes more than a second.
    key_added
        Name of the SAE, and of its slots in `uns`, `obsm` and `varm`.

    Returns
    -------
    Nothing. Writes `uns[key_added]` with `params`, `weights` (`W_enc` (d, h), `b_enc` (h,), `W_dec` (h, d), `b_dec`
    (d,), float32; `threshold` (h,) where σ has one; `input_names` if the columns have names) and `history` (a row per record:
    loss, FVU, L0 and dead fraction in training, FVU and L0 on the held-out cells; FVU is the fraction of variance
    unexplained, Σ‖x − x̂‖² / Σ‖x − mean‖², in the raw embedding). Results of an earlier SAE under the same key are removed.
    When interrupted (Ctrl-C), what was trained so far is kept, and `params["ended"]` says so.

    Raises
    ------
    KeyError
        The embedding or layer is not there.
    ValueError
        NaN or infinite values, fewer than 10 cells, a setting out of range or that the architecture does not use, a
        checkpoint of other settings or data.
    FloatingPointError
        Training diverged.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, use_rep="X_pca", n_features=32, steps=200)
    >>> adata.uns["sae"]["weights"]["W_dec"].shape
    (32, 50)
    """
    from scanpy import logging as logg

    from ..core.checkpoint import Checkpoint
    from ..core.defaults import choose_settings
    from ..core.train import choose_device, train

    held = holder(data, mod)
    _schema.check_key(key_added, held)
    if key_added == use_rep:
        raise ValueError(f"key_added={key_added!r} is also the representation to train on, which it would replace.")
    _check_choices(architecture, preprocess, recipe, validation)
    _check_sparsity(architecture, k=k, l1=l1, l0=l0)
    _check_positive(n_features=n_features, k=None if k == "auto" else k, learning_rate=learning_rate, steps=steps)
    _check_positive(batch_size=batch_size, early_stopping=early_stopping)
    found = representation(held, use_rep, layer)
    x, (n, d) = found.matrix, found.matrix.shape
    if n < MIN_CELLS:
        raise ValueError(f"{found.where} has {n} cells; an SAE needs at least {MIN_CELLS}.")

    seed = int(rng) if isinstance(rng, int | np.integer) else int(np.random.default_rng(rng).integers(2**31))
    train_rows, val_rows = _split(n, validation, seed, found.where)
    scaling = fit_scaling(x, "none" if preprocess is None and recipe == "paper" else preprocess)
    if len(scaling.kept) < d:
        logg.warning(f"{d - len(scaling.kept)} of {d} columns of {found.where} are constant; they get zero weight.")
    settings = choose_settings(
        n,
        d,
        architecture=architecture,
        paper=recipe == "paper",
        n_effective=scaling.n_effective,
        n_features=n_features,
        k=k,
        l1=l1,
        l0=l0,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        n_train=len(train_rows),
        seed=seed,
        device=choose_device(device),
    )

    start = logg.info(f"training {settings.n_features} features on {found.where} ({n} × {d})")
    choice: dict[str, Any] = {}
    if k == "auto":
        settings, choice = _with_chosen_k(x, scaling, settings, train_rows, val_rows)
    cells = fingerprint(held, x)
    identity = f"{cells} {n} {scaling.kind} {validation}"
    with progress_bar(settings.steps, "fit", "step", shown=progress) as bar:
        trained = train(
            x,
            scaling,
            settings,
            train_rows=train_rows,
            val_rows=val_rows,
            patience=early_stopping,
            checkpoint=None if checkpoint is None else Checkpoint(Path(checkpoint), settings, identity),
            on_step=partial(_show, bar),
        )
    if trained.ended == "interrupted":
        logg.warning(f"interrupted after {trained.steps} of {settings.steps} steps; what was trained so far is kept.")

    params = {
        **_stored_settings(settings),
        **choice,
        **_stored_scaling(scaling, d),
        **_goodness(trained.autoencoder, x, train_rows, val_rows, scaling.variance),
        "recipe": recipe,
        "steps": trained.steps,
        "ended": trained.ended,
        "use_rep": None if layer is not None else (use_rep or "X_pca"),
        "layer": layer,
        "validation": float(validation),
        "n_obs": n,
        "fingerprint": cells,
        "version": importlib.metadata.version("scsae"),
    }
    _schema.drop_results(held, key_added)
    _schema.write(held, key_added, _stored(params, trained, found.names))
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key_added!r}], the SAE: FVU {params['fvu']:.3f} "
        f"(held out {params['val_fvu']:.3f}), {params['l0']:.1f} active features per cell",
    )


def _split(n: int, validation: float, seed: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw the rows to train on and those to hold out."""
    shuffled = np.random.default_rng(seed).permutation(n)
    n_val = round(validation * n)
    if n_val == n:
        raise ValueError(f"validation={validation} holds out all {n} cells of {where}. Lower it.")
    return np.sort(shuffled[n_val:]), np.sort(shuffled[:n_val])


def _with_chosen_k(
    x: Matrix, scaling: Scaling, settings: Settings, train_rows: np.ndarray, val_rows: np.ndarray
) -> tuple[Settings, dict[str, Any]]:
    """Choose k from the data, and say how."""
    from scanpy import logging as logg

    from ..core.choose_k import EXPLAINED, choose_k

    chosen = choose_k(x, scaling, settings, train_rows=train_rows, val_rows=val_rows)
    less = f"less than {EXPLAINED:.0%} of held-out cells unexplained"
    how = f"the smallest k that leaves {less}" if chosen.found else f"the default: no k leaves {less}"
    logg.info(f"    k = {chosen.k}, {how}")
    tried = sorted(chosen.tried)
    return replace(settings, k=chosen.k), {
        "k_choice": how,
        "k_tried": np.array(tried),
        "k_tried_unexplained": np.array([chosen.tried[k] for k in tried]),
    }


def _stored_settings(settings: Settings) -> dict[str, Any]:
    """Write the settings as plain values; of `k` and `l1`, the one that the architecture uses."""
    sparsity = ARCHITECTURES[settings.architecture].sparsity
    return {
        "architecture": settings.architecture,
        "n_features": settings.n_features,
        "l0_weight" if sparsity == "l0" else sparsity: getattr(settings, sparsity),
        "learning_rate": settings.learning_rate,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
    }


def _stored_scaling(scaling: Scaling, d: int) -> dict[str, Any]:
    return {
        "preprocess": scaling.kind,
        "n_constant_inputs": d - len(scaling.kept),
        "input_scale": float(scaling.forward[0]) if scaling.kind in ("center", "none") else None,
        "variance": scaling.variance,
    }


def _stored(params: dict[str, Any], trained: Trained, input_names: np.ndarray | None) -> dict[str, Any]:
    from ..core.train import HISTORY_COLUMNS

    weights = {name: getattr(trained.autoencoder, name) for name in _schema.WEIGHTS}
    if trained.autoencoder.threshold is not None:
        weights["threshold"] = trained.autoencoder.threshold
    if input_names is not None:
        weights["input_names"] = input_names.astype(object)
    history = pd.DataFrame([vars(record) for record in trained.history], columns=HISTORY_COLUMNS)
    return {
        "schema_version": _schema.SCHEMA_VERSION,
        "params": params,
        "weights": weights,
        "history": _schema.plain_index(history),
    }


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        lowest = "not above 0" if name == "learning_rate" else "below 1"
        if value is not None and name != "learning_rate" and not isinstance(value, int | np.integer):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected an integer.")
        if value is not None and (value <= 0 or (value < 1 and name != "learning_rate")):
            raise ValueError(f"{name}={value} is {lowest}. Leave it out to have it chosen from the data.")


def _check_choices(architecture: str, preprocess: str | None, recipe: str, validation: float) -> None:
    for name, value, choices in (
        ("architecture", architecture, tuple(ARCHITECTURES)),
        ("preprocess", preprocess or "center", PREPROCESS),
        ("recipe", recipe, RECIPES),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
    if recipe == "paper" and architecture not in ("vanilla", "relu", "topk"):
        raise ValueError(f"recipe='paper' trains 'vanilla', 'relu' or 'topk', not architecture={architecture!r}.")
    if not 0 <= validation < 1:
        raise ValueError(f"validation={validation} is not a share of the cells from 0 up to, not including, 1.")


def _check_sparsity(architecture: str, **given: float | str | None) -> None:
    sparsity = ARCHITECTURES[architecture].sparsity
    for name, value in given.items():
        if value is None:
            continue
        if name != sparsity:
            raise ValueError(f"architecture={architecture!r} is made sparse by {sparsity}=, not by {name}=.")
        if name == "k" and isinstance(value, str) and value != "auto":
            raise ValueError(f"k={value!r} is neither a number of features nor 'auto'.")
        if name != "k" and not isinstance(value, str) and value < 0:
            raise ValueError(f"{name}={value} is negative; the penalty must be 0 or more.")


def _show(bar: tqdm, step: int, record: Record | None) -> None:
    bar.update()
    if record is not None:
        found = {"fvu": f"{record.fvu:.3f}", "l0": f"{record.l0:.1f}", "dead": f"{record.dead_fraction:.0%}"}
        bar.set_postfix(found, refresh=False)


def _goodness(
    trained: Autoencoder, x: Matrix, train_rows: np.ndarray, val_rows: np.ndarray, variance: float
) -> dict[str, float]:
    """Return FVU and L0 of the folded weights on the cells of training and on those held out, NaN for none."""
    squared_error, n_active = np.empty(x.shape[0]), np.empty(x.shape[0])
    start = 0
    for block in trained.encode_blocks(x):
        rows = slice(start, start := start + len(block.squared_error))
        squared_error[rows], n_active[rows] = block.squared_error, np.diff(block.activations.indptr)
    goodness = {}
    for prefix, part in (("", train_rows), ("val_", val_rows)):
        goodness[f"{prefix}fvu"] = float(squared_error[part].mean() / variance) if len(part) else float("nan")
        goodness[f"{prefix}l0"] = float(n_active[part].mean()) if len(part) else float("nan")
    return goodness
