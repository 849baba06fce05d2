from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike

import numpy as np

from .. import _schema
from .._data import Data, Holder, columns_in_order, fingerprint, holder, is_mudata, representation
from .._progress import progress_bar
from .._sparse_store import SparseStore
from ..core.autoencoder import Autoencoder
from ..core.feature_statistics import FeatureStatistics
from ..core.rows import Matrix

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
    out: str | PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """Compute the activation of every feature in every cell.

    `a = activation(x @ W_enc + b_enc)`, in blocks of a fixed shape: the result of a cell does not depend on the cells
    that are encoded with it, and no cells × features array is ever held densely. A representation on disk (backed, Zarr,
    dask) is read some chunks at a time, and gives what it gives in memory to the last bit. The blocks of a dask array on a
    `dask.distributed` cluster are encoded by its workers.

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
    out
        A folder to write the activations to, block by block, where they are too large for memory: ten million cells with
        32 active features take 2.6 GB. It must not exist yet, or be of an earlier call for the same `key` and cells; that
        one is replaced when the new one is complete. `obsm[key]` is then a dask array that reads from the folder when it
        is used, in subsets and copies of the object too; files that the object is written to get the values. So the
        folder must stay where it is, no object may be written over it (anndata empties a folder that it writes to), and
        copies of the object that still refer to the earlier activations read the new ones once it is replaced. The folder
        is Zarr, in the layout of anndata's sparse matrices: `anndata.io.read_elem(zarr.open_group(out))` loads it. Needs dask: `pip install "scsae[dask]"`.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `obsm[key]`, a CSR matrix (cells × features, float32) of activations ≥ 0 (with `out`, a dask array of CSR
    blocks), and in `uns[key]` the table `features` (per feature `n_cells` active, `density`, `mean` and `max` activation
    over all cells, `dead`) and `encoded`: what was read, its L0 and its FVU = mean ‖x − x̂‖² / (variance over the cells
    given to `fit`). Earlier results that rest on activations are removed.

    Raises
    ------
    KeyError
        There is no SAE of this name, or no such representation.
    ValueError
        The representation has another width than the SAE reads, lacks columns by name, or has values that are NaN, infinite or
        above 3.4e38.
    FileExistsError
        `out` is something else than activations of this SAE in these cells; it is left alone.
    FileNotFoundError
        The folder that `out` is to be in does not exist.
    ImportError
        `out` is given and dask is not installed.

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

    The same on disk:

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sae.tl.encode(adata, out=Path(folder) / "activations.zarr")
    ...     print(type(adata.obsm["sae"]).__module__, adata.obsm["sae"][:100].compute().shape)
    dask.array.core (100, 32)
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
    n, cells = x.shape[0], fingerprint(held, x)
    names = cells.partition("-")[0]
    with nullcontext() if out is None else SparseStore(out, key, (n, model.n_features), f"{n} {names}") as store:
        with progress_bar(n, "encode", "cell", shown=progress) as bar:
            activations, squared_error, statistics = _encoded(model, x, store, bar.update)
        fvu = float(np.mean(squared_error) / params["variance"]) if n else float("nan")
        # The larger one: where few cells are held out, they may happen to fit well.
        trained_fvu = float(np.nanmax([params["val_fvu"], params["fvu"]]))
        if n >= JUDGED_CELLS and fvu > max(BAD_FIT * trained_fvu, trained_fvu + WORSE_FIT):
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
        new["features"] = _schema.statistics_table(key, statistics)
        new["encoded"] = {
            "use_rep": use_rep,
            "layer": layer,
            "n_obs": n,
            "fvu": fvu,
            "l0": int(statistics.n_cells.sum()) / max(n, 1),
            "fingerprint": cells,
        }
        if store is not None:
            activations = store.publish(lambda published: held.data.obsm.get(key) is published)
        _schema.write(held, key, new, activations, anew=True)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.obsm[{key!r}], activations: FVU {fvu:.3f} (in training {trained_fvu:.3f}), "
        f"{new['encoded']['l0']:.1f} active features per cell, {int(new['features']['dead'].sum())} dead features",
    )


def _encoded(
    model: Autoencoder, x: Matrix, store: SparseStore | None, on_block: Callable[[int], object]
) -> tuple[Matrix | None, np.ndarray, FeatureStatistics]:
    """Return activations (None if they go to a store), the squared error of each cell, and statistics of each feature."""
    if store is None:
        encoded = model.encode(x, on_block=on_block)
        return encoded.activations, encoded.squared_error, FeatureStatistics.of(encoded.activations)
    statistics, errors = FeatureStatistics(model.n_features), [np.empty(0)]
    for block in model.encode_blocks(x, on_block=on_block):
        store.append(block.activations)
        statistics.add(block.activations)
        errors.append(block.squared_error)
    return None, np.concatenate(errors), statistics
