"""Activations in a Zarr folder, written by blocks of cells in the layout that anndata reads as a sparse matrix."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import anndata as ad
import numpy as np
from scipy import sparse

from .core.interrupts import deferred_interrupts
from .core.rows import Matrix

CHUNK_VALUES = 2**18
"""Activations in a chunk of the folder: 1 MB of values and as much of their columns."""
BLOCK_VALUES = 2**20
"""Activations in a block of the dask array, about."""
MOST_BLOCK_ROWS = 2**16
LONGEST_SHORT = np.iinfo(np.int32).max
"""Activations that 32-bit row starts can count."""
MARK, CELLS = "sae_activations", "sae_cells"
"""Attributes that name the SAE and the cells, by which an earlier folder is known."""


class SparseStore:
    """A folder that is filled with activations (n, h) by blocks of cells.

    Used as a context: it is written beside `path`, and :meth:`publish` puts it in place of what was there. If the
    context is left by an exception, also after that, all is as before, unless the activations are in use already.

    Parameters
    ----------
    path
        Of the folder.
    key
        Of the SAE.
    shape
        (n, h)
    cells
        Tells these cells from others. Objects may go on reading from an earlier folder, which only the same cells may replace.
    """

    def __init__(self, path: str | PathLike[str], key: str, shape: tuple[int, int], cells: str | None = None):
        self._owner = {MARK: key} if cells is None else {MARK: key, CELLS: cells}
        self._path = _checked(path, self._owner)
        self._partial, self._earlier = (
            self._path.with_name(f"{self._path.name}.{uuid4().hex}.{what}") for what in ("partial", "earlier")
        )
        self._shape, self._published = shape, False
        self._in_use: Callable[[], bool] = lambda: False
        self._starts = np.zeros(shape[0] + 1, np.int64)
        self._n_rows = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

    def __enter__(self) -> SparseStore:
        import zarr

        self._group = zarr.open_group(self._partial, mode="w-", zarr_format=2)
        self._arrays = [self._create("data", np.float32, 0), self._create("indices", np.int32, 0)]
        return self

    def _create(self, name: str, dtype: type, length: int) -> Any:
        return self._group.create_array(name, shape=(length,), dtype=dtype, chunks=(CHUNK_VALUES,))

    def append(self, rows: sparse.csr_matrix) -> None:
        """Write the activations of the next cells."""
        end = self._n_rows + rows.shape[0]
        self._starts[self._n_rows + 1 : end + 1] = self._starts[self._n_rows] + rows.indptr[1:]
        self._n_rows = end
        self._waiting.append((rows.data, rows.indices))
        self._n_waiting += rows.nnz
        if self._n_waiting >= CHUNK_VALUES:
            self._write(self._n_waiting // CHUNK_VALUES * CHUNK_VALUES)

    def _write(self, n: int) -> None:
        """Write so many of the values that wait; whole chunks, but for the last ones of all."""
        joined = [np.concatenate(parts) for parts in zip(*self._waiting, strict=True)]
        for array, values in zip(self._arrays, joined, strict=True):
            done = array.shape[0]
            array.resize((done + n,))
            array[done:] = values[:n]
        self._waiting = [(joined[0][n:], joined[1][n:])]
        self._n_waiting -= n

    def publish(self, in_use: Callable[[Matrix], bool] = lambda _: False) -> Matrix:
        """Put the complete folder in place and return it as a dask array that is read where it is needed.

        Parameters
        ----------
        in_use
            Tells whether the array is where it is wanted. Then the folder stays, whatever happens.
        """
        if self._n_waiting:
            self._write(self._n_waiting)
        n, n_stored = self._shape[0], int(self._starts[-1])
        starts = self._starts if n_stored > LONGEST_SHORT else self._starts.astype(np.int32)
        self._create("indptr", starts.dtype.type, n + 1)[:] = starts
        _checked(self._path, self._owner)
        layout: dict[str, Any] = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [*self._shape]}
        self._group.attrs.update(layout | self._owner)
        with deferred_interrupts():
            if self._path.exists():
                os.rename(self._path, self._earlier)
            self._published = True
            os.rename(self._partial, self._path)
        opened = _opened(self._path, self._shape, n_stored)
        self._in_use = lambda: in_use(opened)
        return opened

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with deferred_interrupts():
            if kind is not None and self._published and not self._in_use():
                shutil.rmtree(self._path, ignore_errors=True)
                if self._earlier.exists():
                    os.rename(self._earlier, self._path)
            for rest in (self._partial, self._earlier):
                shutil.rmtree(rest, ignore_errors=True)


def _opened(path: Path, shape: tuple[int, int], n_stored: int) -> Matrix:
    """Open a folder of ours as a dask array, in blocks of a power of two of rows."""
    import zarr

    n, n_features = shape
    group = zarr.open_group(path, mode="r")
    if n == 0:
        # Early 0.12 of anndata makes no dask array without cells.
        return ad.io.read_elem(group)
    rows = max(1, min(MOST_BLOCK_ROWS, BLOCK_VALUES * n // max(n_stored, 1)))
    return ad.experimental.read_elem_lazy(group, chunks=(1 << rows.bit_length() - 1, n_features))


def _checked(path: str | PathLike[str], owner: dict[str, str]) -> Path:
    """Return where to write, or say why not; what is no earlier folder of this SAE and these cells is never touched."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"out={path!r} is a {type(path).__name__}; expected the path of a folder.")
    if importlib.util.find_spec("dask") is None or importlib.util.find_spec("zarr") is None:
        raise ImportError(
            'out= writes with zarr and reads with dask, of which one is not there. pip install "scsae[dask]"'
        )
    # A link stays one: the folder that it leads to is replaced.
    found = Path(os.path.realpath(path))
    if not found.parent.is_dir():
        raise FileNotFoundError(
            f"out={os.fspath(path)!r} is in a folder that does not exist: {found.parent}. Make it first."
        )
    if not found.exists():
        return found
    earlier = _owner(found)
    if MARK not in earlier:
        raise FileExistsError(
            f"out={os.fspath(path)!r} exists and was not written by sae.tl.encode; it would be overwritten. Choose another "
            "path, or remove it first."
        )
    if any(earlier.get(name, value) != value for name, value in owner.items()):
        whose = f"the SAE {earlier[MARK]!r}" if earlier[MARK] != owner[MARK] else "other cells"
        raise FileExistsError(
            f"out={os.fspath(path)!r} holds the activations of {whose}, and would be overwritten by those of "
            f"{owner[MARK]!r} in these cells. Choose another path, or remove it first."
        )
    return found


def _owner(path: Path) -> dict[str, str]:
    """Return whose activations a folder holds; nothing where it holds something else."""
    try:
        attributes = json.loads((path / ".zattrs").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(attributes, dict):
        return {}
    return {name: attributes[name] for name in (MARK, CELLS) if name in attributes}
