"""Matrices that other processes read: shared when in memory, opened again when on disk."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

from .rows import Matrix, on_disk

Source: TypeAlias = Callable[[], Matrix]
"""Gives a matrix in whichever process it is called; can be pickled."""


def source_of(x: Matrix, where: str) -> Source:
    """Return what gives `x` in another process: in memory if it is, else from the file that it is read from.

    Parameters
    ----------
    where
        What messages call it.
    """
    if isinstance(x, np.ndarray):
        return _mapped_source(x, where) if on_disk(x) else partial(_in_memory, x)
    if sparse.issparse(x):
        return partial(_as_it_is, x)
    stored: Any = getattr(x, "group", x)
    if type(stored).__module__.partition(".")[0] == "h5py":
        return partial(_from_hdf5, stored.file.filename, stored.name)
    _check_pickle(x, where)
    return partial(_as_it_is, x)


def _check_pickle(x: Matrix, where: str) -> None:
    try:
        pickle.dumps(x)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise _not_portable(where, str(error)) from error


def _not_portable(where: str, reason: str) -> ValueError:
    return ValueError(
        f"{where} cannot be opened in another process ({reason}). Read it into memory, or leave n_jobs= and client= out."
    )


def _mapped_source(x: np.ndarray, where: str) -> Source:
    mapped: Any = x
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    filename = getattr(mapped, "filename", None)
    if filename is None:
        raise _not_portable(where, "a memory map of a file without a name")
    offset = mapped.offset + x.__array_interface__["data"][0] - mapped.__array_interface__["data"][0]
    return partial(_mapped, str(filename), x.shape, x.dtype, offset, x.strides)


def _mapped(
    filename: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, strides: tuple[int, ...]
) -> np.ndarray:
    return np.ndarray(shape, dtype, np.memmap(filename, np.uint8, "r"), offset, strides)


def _from_hdf5(filename: str, name: str) -> Matrix:
    import h5py

    stored = h5py.File(filename, "r")[name]
    if isinstance(stored, h5py.Dataset):
        return stored
    from anndata.io import sparse_dataset

    return sparse_dataset(stored)


def _in_memory(x: np.ndarray) -> np.ndarray:
    # Processes may share it as a memory map, and the rows of those are shuffled in another way.
    return np.asarray(x.data)


def _as_it_is(x: Matrix) -> Matrix:
    return x
