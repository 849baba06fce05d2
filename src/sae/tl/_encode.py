from __future__ import annotations

import copy
import warnings

import numpy as np

from .. import _schema
from .._data import Data, Holder, columns_in_order, fingerprint, holder, is_mudata, representation
from .._progress import progress_bar

BAD_FIT, WORSE_FIT = 2.0, 0.01
JUDGED_CELLS = 20


def encode(
    data: Data,
    *,
    key: str = "sae",
    reference: Data | None = None,
    use_rep: str | None = None,
    layer: str | None = None,
    mod: str | None = None,
    progress: bool = True,
) -> None:
    """Compute the activation of every feature in every cell.

    `a = activation(x @ W_enc + b_enc)`, in blocks of a fixed shape: the result of a cell does not depend on the cells
    that are encoded with it, and no cells × features array is ever held densely.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`.
    key
        Name of the SAE.
    reference
        Another object that holds the SAE `key` (under the same `mod`), to encode new cells with it. Its weights, settings
        and history are copied to `data`.
    use_rep, layer
        Where to read the representation; by default where the SAE was trained.
    mod
        The modality that holds the SAE and its representation.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `obsm[key]`, a CSR matrix (cells × features, float32) of activations ≥ 0, and in `uns[key]` the
    table `features` (per feature `n_cells` active, `density`, `mean` and `max` activation over all cells, `dead`) and
    `encoded`: what was read, its L0 and its FVU = mean ‖x − x̂‖² / (variance over the cells given to `fit`). Earlier results
    that rest on activations are removed.

    Raises
    ------
    KeyError
        There is no SAE of this name, or no such representation.
    ValueError
        The representation has another width than the SAE reads, or lacks columns by name.

    Warns
    -----
    UserWarning
        The FVU of 20 cells or more is over twice that in training, held-out cells included (another PCA than the one trained
        on, say), or the representation of the same cells has changed since.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> adata.obsm["sae"].shape
    (700, 32)
    """
    from scanpy import logging as logg

    held = holder(data, mod if reference is None or is_mudata(data) else None)
    if reference is None:
        stored = _schema.read(held, key)
    else:
        _schema.check_key(key, held)
        source = holder(reference, mod if is_mudata(reference) else None)
        stored = _schema.read(Holder(source.data, f"reference ({source.where})"), key)
    model, params = _schema.model(stored), stored["params"]
    if use_rep is None and layer is None:
        use_rep, layer = params["use_rep"], params["layer"]
    found = representation(held, use_rep, layer)
    x = columns_in_order(found, stored["weights"].get("input_names", ()))
    if x.shape[1] != model.n_inputs:
        raise ValueError(
            f"{found.where} has {x.shape[1]} columns; the SAE {key!r} reads {model.n_inputs} "
            f"(it was trained on {params['layer'] or params['use_rep']!r})."
        )
    if reference is None:
        _schema.warn_if_changed(held, key, params, stored["weights"].get("input_names", ()), stacklevel=3)

    start = logg.info(f"encoding {found.where} with {key!r}")
    with progress_bar(x.shape[0], "encode", "cell", shown=progress) as bar:
        encoded = model.encode(x, on_block=bar.update)
    activations = encoded.activations
    fvu = float(np.mean(encoded.squared_error) / params["variance"]) if x.shape[0] else float("nan")
    # The larger one: where few cells are held out, they may happen to fit well.
    trained_fvu = float(np.nanmax([params["val_fvu"], params["fvu"]]))
    if x.shape[0] >= JUDGED_CELLS and fvu > max(BAD_FIT * trained_fvu, trained_fvu + WORSE_FIT):
        warnings.warn(
            f"The SAE {key!r} leaves {fvu:.3f} of the variance of {found.where} unexplained, against {trained_fvu:.3f} "
            "in training. Is it the same embedding that the SAE was trained on (the same model, "
            "the same PCA loadings)?",
            UserWarning,
            stacklevel=2,
        )
    new = {name: stored[name] for name in ("schema_version", "params", "weights", "history")}
    if reference is not None:
        new = copy.deepcopy(new)
    new["features"] = _schema.statistics_table(key, activations)
    new["encoded"] = {
        "use_rep": use_rep,
        "layer": layer,
        "n_obs": x.shape[0],
        "fvu": fvu,
        "l0": activations.nnz / max(x.shape[0], 1),
        "fingerprint": fingerprint(held, x),
    }
    _schema.drop_results(held, key)
    _schema.write(held, key, new, activations)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.obsm[{key!r}], activations: FVU {fvu:.3f} (in training {trained_fvu:.3f}), "
        f"{new['encoded']['l0']:.1f} active features per cell, {int(new['features']['dead'].sum())} dead features",
    )
