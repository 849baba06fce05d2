"""From AnnData or MuData to matrices: where an SAE lives, and the representation it is trained on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from .core.rows import Columns, Matrix, as_csr, is_dask, on_disk, read_rows

if TYPE_CHECKING:
    from mudata import MuData


Data: TypeAlias = "ad.AnnData | MuData"

FINGERPRINT_ROWS = 1_000
LARGEST = float(np.finfo(np.float32).max)
"""Encoders are float32; and values of this size can be squared in float64."""


@dataclass(frozen=True)
class Holder:
    """The object that carries one SAE in its `uns`, and how to speak of it in messages."""

    data: Any
    where: str


@dataclass(frozen=True)
class Representation:
    """What an SAE reads: (n, d), in memory or read from disk by rows, with the names of the columns when they are genes."""

    matrix: Matrix
    where: str
    names: np.ndarray | None


def is_mudata(data: object) -> bool:
    """Tell whether `data` is a MuData, without importing mudata."""
    mudata = sys.modules.get("mudata")
    return mudata is not None and isinstance(data, mudata.MuData)


def holder(data: Data, mod: str | None) -> Holder:
    """Find the object whose `uns` and `obsm` an SAE lives in: the AnnData, a modality, or the MuData itself."""
    if isinstance(data, ad.AnnData):
        if mod is not None:
            raise ValueError(f"mod={mod!r} names a modality, but the data is an AnnData. Leave mod= out.")
        return Holder(data, "adata")
    if not is_mudata(data):
        path = isinstance(data, str | PathLike)
        hint = " Read a file with anndata.read_h5ad, and the folder of an SAE with sae.io.read." if path else ""
        raise TypeError(f"Expected an AnnData or a MuData, got {type(data).__name__}.{hint}")
    if mod is None:
        return Holder(data, "mdata")
    return Holder(modality(data, mod), f"mdata.mod[{mod!r}]")


def modality(mdata: MuData, mod: str) -> ad.AnnData:
    """Return one modality of a MuData."""
    if mod not in mdata.mod:
        raise ValueError(f"The MuData has no modality {mod!r}; it has {listing(mdata.mod)}.")
    return mdata.mod[mod]


def listing(names: object, most: int = 10) -> str:
    """Write names for a message: quoted, and shortened after `most`."""
    # anndata 0.13 lists X among the layers, as None.
    quoted = [repr(str(name)) for name in names if name is not None]  # type: ignore[attr-defined]
    if not quoted:
        return "none"
    return ", ".join(quoted[:most]) + (f", ... ({len(quoted)} in all)" if len(quoted) > most else "")


def representation(held: Holder, use_rep: str | None, layer: str | None) -> Representation:
    """Read the matrix that an SAE is trained on or applied to."""
    data, where = held.data, held.where
    if use_rep is not None and layer is not None:
        raise ValueError(f"Both use_rep={use_rep!r} and layer={layer!r} were given. Pass one of them.")
    if is_mudata(data) and (layer is not None or use_rep is None or use_rep == "X"):
        raise ValueError(
            f"A MuData has no X, layers or default representation of its own. Pass mod= (one of {listing(data.mod)}), "
            f"or use_rep= with a joint embedding; mdata.obsm has {listing(joint_keys(data))}."
        )
    if layer is not None:
        return _checked(*layer_matrix(data, where, layer), np.asarray(data.var_names, dtype=object))
    if use_rep == "X":
        return _checked(data.X, f"{where}.X", np.asarray(data.var_names, dtype=object))
    keys = joint_keys(data) if is_mudata(data) else list(data.obsm)
    if use_rep is None:
        if "X_pca" not in keys:
            raise KeyError(
                f"{where}.obsm has no 'X_pca'; it has {listing(keys)}. "
                "Pass one of them as use_rep= (or use_rep='X'), or run sc.pp.pca first."
            )
        use_rep = "X_pca"
    if use_rep not in keys:
        other = f"mod= (one of {listing(data.mod)})" if is_mudata(data) else "use_rep='X'"
        raise KeyError(
            f"{where}.obsm has no {use_rep!r}; it has {listing(keys)}. Pass one of them as use_rep=, or {other}."
        )
    return _checked(data.obsm[use_rep], f"{where}.obsm[{use_rep!r}]", None)


def joint_keys(mdata: MuData) -> list[str]:
    """List the `obsm` keys of a MuData that are embeddings (it keeps a membership mask per modality there too)."""
    return [key for key in mdata.obsm if key not in mdata.mod]


def layer_matrix(adata: ad.AnnData, where: str, layer: str) -> tuple[Matrix, str]:
    """Return a layer, and what messages call it."""
    if layer not in adata.layers:
        raise KeyError(f"{where}.layers has no {layer!r}; it has {listing(adata.layers)}. Pass one of them as layer=.")
    return adata.layers[layer], f"{where}.layers[{layer!r}]"


def _checked(matrix: Any, where: str, names: np.ndarray | None) -> Representation:
    if isinstance(matrix, pd.DataFrame):
        names, matrix = np.asarray(matrix.columns.astype(str), dtype=object), matrix.to_numpy()
    matrix = readable(matrix, where)
    refuse_non_finite(matrix, where)
    return Representation(matrix, where, names)


def readable(matrix: Any, where: str) -> Matrix:
    """Check that a matrix is cells × columns of numbers and gives rows; a sparse one in memory is returned as CSR."""
    matrix = matrix if _read_by_rows(matrix) else in_memory(matrix, where)
    if any(size != size for size in matrix.shape):
        raise ValueError(
            f"{where} is a dask array whose size is not known: {matrix.shape}. Call compute_chunk_sizes() on it first."
        )
    if len(matrix.shape) != 2 or matrix.shape[1] == 0:
        raise ValueError(f"{where} has the shape {matrix.shape}; expected cells × at least one column.")
    if matrix.dtype.kind not in "biuf":
        raise TypeError(f"{where} holds {matrix.dtype} values; expected numbers.")
    return matrix


def _read_by_rows(matrix: Any) -> bool:
    """Tell whether this is a backed, Zarr or dask matrix, which gives rows for a slice."""
    kind = type(matrix).__module__.partition(".")[0]
    return kind in ("h5py", "zarr") or is_dask(matrix) or (kind == "anndata" and hasattr(matrix, "to_memory"))


def in_memory(matrix: Any, where: str) -> np.ndarray | sparse.csr_matrix:
    """Return a dense array or CSR matrix, or say that this is none."""
    if matrix is None:
        raise ValueError(f"{where} is None: there are no values to read.")
    if isinstance(matrix, np.ndarray) or sparse.issparse(matrix):
        # Nothing compiled knows the extended precision of some processors.
        matrix = matrix.astype(np.float64) if matrix.dtype == np.longdouble else matrix
    if sparse.issparse(matrix):
        return as_csr(matrix)
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix)
    kind = f"{type(matrix).__module__}.{type(matrix).__qualname__}"
    raise TypeError(
        f"{where} is a {kind}; expected a NumPy array, a SciPy sparse matrix, an HDF5 or Zarr array, a sparse matrix on disk "
        "as anndata reads it, or a dask array of one of them."
    )


def refuse_non_finite(matrix: Matrix, where: str) -> None:
    """Raise an error that says how many values are NaN, infinite or beyond float32, and in which rows."""
    from .core.moments import chunks

    if not np.issubdtype(matrix.dtype, np.inexact):
        return
    if not on_disk(matrix):
        values = matrix.data if sparse.issparse(matrix) else matrix
        if values.size == 0 or (float(values.min()) >= -LARGEST and float(values.max()) <= LARGEST):
            return
    rows_of_bad, n_large = [], 0
    for rows, part in chunks(matrix):
        values = part.data if sparse.issparse(part) else part
        bad = ~(np.abs(values) <= LARGEST)
        n_large += np.isfinite(values[bad]).sum()
        found = np.searchsorted(part.indptr, np.flatnonzero(bad), "right") - 1 if bad.ndim == 1 else np.nonzero(bad)[0]
        rows_of_bad.append(rows.start + found)
    n_bad = sum(map(len, rows_of_bad))
    if n_bad:
        bad_rows = np.unique(np.concatenate(rows_of_bad))
        first = ", ".join(map(str, bad_rows[:5])) + (", ..." if len(bad_rows) > 5 else "")
        what = "NaN or infinite values" if n_large == 0 else f"NaN, infinite or too large values (above {LARGEST:.1e})"
        raise ValueError(
            f"{where} has {n_bad} {what} in {len(bad_rows)} of {matrix.shape[0]} rows (rows {first}). "
            "Remove these cells, or recompute the matrix."
        )


def fingerprint(held: Holder, matrix: Matrix, columns: np.ndarray | slice = slice(None)) -> str:
    """Hash the names and values of up to 1,000 evenly spaced rows, to tell later whether they were recomputed."""
    n = matrix.shape[0]
    rows = np.linspace(0, n - 1, min(n, FINGERPRINT_ROWS)).astype(np.int64)
    names = "\n".join(held.data.obs_names[rows].astype(str))
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(read_rows(matrix, rows)[:, columns], dtype=np.float32)
    digests = (hashlib.blake2b(part, digest_size=12).hexdigest() for part in (names.encode(), values.tobytes()))
    return "-".join(digests)


def recomputed(held: Holder, use_rep: str | None, layer: str | None, names: Sequence[str], earlier: str) -> bool:
    """Tell whether the same cells now have another representation than when `earlier` was taken.

    Columns that have names are compared in the order of `names`; where some of those are gone, nothing can be told.
    """
    slot = held.data.obsm if layer is None else held.data.layers
    key = use_rep if layer is None else layer
    of_genes = layer is not None or use_rep == "X"
    matrix = held.data.X if layer is None and of_genes else slot.get(key)
    found = held.data.var_names if of_genes and not is_mudata(held.data) else None
    if isinstance(matrix, pd.DataFrame):
        found, matrix = matrix.columns.astype(str), matrix.to_numpy()
    if not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix)):
        return False
    columns: np.ndarray | slice = slice(None)
    if found is not None and len(names) and not np.array_equal(found, names):
        columns = found.get_indexer(pd.Index(names)) if found.is_unique else np.array([-1])
        if np.any(columns < 0):
            return False
    cells, values = fingerprint(held, matrix.tocsr() if sparse.issparse(matrix) else matrix, columns).split("-")
    return cells == earlier.split("-")[0] and values != earlier.split("-")[1]


def columns_in_order(found: Representation, names: Sequence[str]) -> Matrix:
    """Return the columns of a representation that an SAE was trained on, in its order."""
    if found.names is None or len(names) == 0 or np.array_equal(found.names, names):
        return found.matrix
    position = pd.Index(found.names).get_indexer(pd.Index(names))
    missing = [name for name, place in zip(names, position, strict=True) if place < 0]
    if missing:
        raise ValueError(
            f"{found.where} lacks {len(missing)} of the {len(names)} columns that the SAE reads: {listing(missing, 5)}."
        )
    return Columns(found.matrix, position) if on_disk(found.matrix) else found.matrix[:, position]
