from __future__ import annotations

import importlib.metadata
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, fingerprint, holder, representation
from .._progress import progress_bar
from ..core.preprocess import Preprocess

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..core.fitting import Fitted
    from ..core.train import Record


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
        AnnData, or MuData with `mod`. The embedding may be on disk: backed, Zarr, dask or a memory map. Up to 128 MB of
        it (as 32-bit numbers: 640,000 cells × 50) are held in memory, with the same result as if they were there. Of
        more, random blocks of rows that make up as much are shuffled together, while the next ones are read; results
        depend on the number of cells and columns, not on the kind of file nor on its chunks, unless these have more rows
        than a block (16,384 at 50 columns, 512 at 2,000), which is then a chunk. Where cells are sorted, by donor say, a
        few dozen blocks are less of a mixture than all cells. A memory map is shuffled in 128 blocks of 256 rows.
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
        Gradient steps. By default 2,500 where k is set, else 9 / `learning_rate`; or one pass over the cells if that is more. With
        more steps, and with fewer features, another seed finds more of them again (:func:`sae.tl.stability`).
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
    (d,), float32; `threshold` (h,) where σ has one; `scaling`, the factors (d,) or the matrix (d, d) by which the columns were scaled
    in training, if that was more than one factor; `input_names` if the columns have names) and `history` (a row per record:
    loss, FVU, L0 and dead fraction in training, FVU and L0 on the held-out cells; FVU is the fraction of variance
    unexplained, Σ‖x − x̂‖² / Σ‖x − mean‖², in the raw embedding). `params` has FVU and L0 of the final weights on the
    cells of training and, as `val_fvu` and `val_l0`, on those held out: on a million evenly spaced ones where there are
    more. Results of an earlier SAE under the same key are removed.
    When interrupted (Ctrl-C), what was trained so far is kept, and `params["ended"]` says so.

    Raises
    ------
    KeyError
        The embedding or layer is not there.
    ValueError
        Values that are NaN, infinite or above 3.4e38, fewer than 10 cells, a setting out of range or that the architecture does not use, a
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
    from ..core.fitting import Options, how_chosen, plan, with_chosen_k
    from ..core.fitting import fit as fit_planned
    from ..core.seeds import integer_seed

    held = holder(data, mod)
    _schema.check_key(key_added, held)
    if key_added == use_rep:
        raise ValueError(f"key_added={key_added!r} is also the representation to train on, which it would replace.")
    options = Options(
        architecture=architecture,
        recipe=recipe,
        preprocess=preprocess,
        n_features=n_features,
        k=k,
        l1=l1,
        l0=l0,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        validation=validation,
        early_stopping=early_stopping,
        device=device,
    )
    found = representation(held, use_rep, layer)
    x, (n, d) = found.matrix, found.matrix.shape
    planned = plan(x, options, integer_seed(rng), where=found.where)
    if (n_constant := d - len(planned.scaling.kept)) > 0:
        logg.warning(f"{n_constant} of {d} columns of {found.where} are constant; they get zero weight.")

    start = logg.info(f"training {planned.settings.n_features} features on {found.where} ({n} × {d})")
    planned = with_chosen_k(planned)
    if planned.chosen_k is not None:
        logg.info(f"    k = {planned.chosen_k.k}, {how_chosen(planned.chosen_k)}")
    settings, cells = planned.settings, fingerprint(held, x)
    identity = f"{cells} {n} {planned.scaling.kind} {validation}"
    kept = None if checkpoint is None else Checkpoint(Path(checkpoint), settings, identity)
    with progress_bar(settings.steps, "fit", "step", shown=progress) as bar:
        fitted = fit_planned(planned, checkpoint=kept, on_step=partial(_show, bar))
    params = fitted.params
    if params["ended"] == "interrupted":
        logg.warning(f"interrupted after {params['steps']} of {settings.steps} steps; what was trained so far is kept.")

    origin = {
        "use_rep": None if layer is not None else (use_rep or "X_pca"),
        "layer": layer,
        "fingerprint": cells,
        "version": importlib.metadata.version("scsae"),
    }
    _schema.write(held, key_added, _stored(fitted, origin, found.names), anew=True)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key_added!r}], the SAE: FVU {params['fvu']:.3f} "
        f"(held out {params['val_fvu']:.3f}), {params['l0']:.1f} active features per cell",
    )


def _stored(fitted: Fitted, origin: dict[str, Any], input_names: np.ndarray | None) -> dict[str, Any]:
    from ..core.train import HISTORY_COLUMNS

    weights = {name: getattr(fitted.autoencoder, name) for name in _schema.WEIGHTS}
    optional = {"threshold": fitted.autoencoder.threshold, "scaling": fitted.scaling.factors}
    weights |= {name: value for name, value in optional.items() if value is not None}
    if input_names is not None:
        weights["input_names"] = input_names.astype(object)
    history = pd.DataFrame([vars(record) for record in fitted.history], columns=HISTORY_COLUMNS)
    return {
        "schema_version": _schema.SCHEMA_VERSION,
        "params": {**fitted.params, **origin},
        "weights": weights,
        "history": _schema.plain_index(history),
    }


def _show(bar: tqdm, step: int, record: Record | None) -> None:
    bar.update()
    if record is not None:
        found = {"fvu": f"{record.fvu:.3f}", "l0": f"{record.l0:.1f}", "dead": f"{record.dead_fraction:.0%}"}
        bar.set_postfix(found, refresh=False)
