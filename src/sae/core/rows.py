"""Reading a matrix by rows, in memory or on disk, without copying all of it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import numpy as np
from scipy import sparse

Matrix: TypeAlias = Any
"""A NumPy array or a SciPy CSR matrix; or, on disk, anything with a shape that gives rows for a slice."""

PIECE_BYTES = 64_000_000
"""What is read from disk at a time, unless a single chunk there is larger; two such pieces are held."""
CHUNKS_PER_PIECE = 4
DISK_BLOCK_ROWS = 256
DISK_BLOCKS_SHUFFLED = 128


def take_rows(x: Matrix, rows: slice | np.ndarray) -> Any:
    """Return some rows of `x` (n, d) in memory: CSR in canonical format if they are sparse, else a dense array."""
    part = x[rows]
    if hasattr(part, "compute"):
        part = part.compute()
    return as_csr(part) if sparse.issparse(part) else np.asarray(part)


def pieces(x: Matrix, size: int) -> Iterator[tuple[slice, Any]]:
    """Yield the rows of `x` (n, d) in order, `size` at a time, in memory as :func:`take_rows` gives them.

    From disk, several chunks of the file are read at once, the next ones while those before are in use.
    """
    n = x.shape[0]
    if not on_disk(x):
        for rows in row_blocks(n, size):
            yield rows, take_rows(x, rows)
        return
    least = stored_rows(x)
    at_once = max(least, min(CHUNKS_PER_PIECE * least, int(PIECE_BYTES / max(row_bytes(x), 1))))
    larger = list(row_blocks(n, -(-at_once // size) * size))
    ahead = reads_ahead(x)
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for number, rows in enumerate(larger):
            part = take_rows(x, rows) if waiting is None else waiting.result()
            follows = ahead and number + 1 < len(larger)
            waiting = reader.submit(take_rows, x, larger[number + 1]) if follows else None
            for some in row_blocks(rows.stop - rows.start, size):
                yield slice(rows.start + some.start, rows.start + some.stop), part[some]


def is_dask(x: Matrix) -> bool:
    """Tell whether this is a dask array."""
    return type(x).__module__.partition(".")[0] == "dask"


def _stored(x: Matrix) -> Any:
    """Return the array on disk that some rows or columns are of."""
    while isinstance(x, Rows | Columns):
        x = x.matrix
    return x


def stored_rows(x: Matrix) -> int:
    """Rows that a file can only give together: a chunk of HDF5, Zarr or dask (the median one); 1 in memory."""
    x = _stored(x)
    if is_dask(x):
        return max(1, int(np.median(x.chunks[0])))
    group = getattr(x, "group", None)
    chunked = getattr(x if group is None else group["data"], "chunks", None)
    if not chunked:
        return 1
    return chunked[0] if group is None else max(1, int(chunked[0] / max(_stored_per_row(group), 1)))


def row_bytes(x: Matrix) -> float:
    """Bytes that a row takes in memory, on average; of a sparse dask array those that a dense one would take."""
    stored = _stored(x)
    group = getattr(stored, "group", None)
    if group is None:
        return x.shape[1] * x.dtype.itemsize
    return _stored_per_row(group) * (x.dtype.itemsize + group["indices"].dtype.itemsize)


def _stored_per_row(group: Any) -> float:
    return group["data"].shape[0] / max(group["indptr"].shape[0] - 1, 1)


def reads_ahead(x: Matrix) -> bool:
    """Tell whether another thread may read rows: not of a model's predictions, whose code is the user's."""
    return type(_stored(x)).__module__.partition(".")[0] in ("h5py", "zarr", "dask", "anndata")


def dense_rows(x: Matrix, rows: slice | np.ndarray) -> np.ndarray:
    """Return some rows of `x` (n, d) as a dense array of its dtype."""
    part = take_rows(x, rows)
    return part.toarray() if sparse.issparse(part) else part


def as_csr(matrix: Any) -> sparse.csr_matrix:
    """Convert a sparse matrix to CSR with the columns of each row in order, none twice; the original stays as it is."""
    rows = sparse.csr_matrix(matrix)
    if not rows.has_canonical_format:
        # SciPy sorts in place when it needs order, and these arrays may be the user's.
        rows = rows.copy()
        rows.sum_duplicates()
    return rows


@dataclass(frozen=True)
class Columns:
    """Some columns of a matrix on disk, in any order; HDF5 itself gives them in rising order only."""

    matrix: Matrix
    positions: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and selected columns."""
        return self.matrix.shape[0], len(self.positions)

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self.matrix.dtype

    def __getitem__(self, rows: slice) -> np.ndarray | sparse.csr_matrix:
        """Return some rows, dense or CSR as the matrix gives them."""
        return take_rows(self.matrix, rows)[:, self.positions]


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix on disk, in any order.

    For a slice, blocks of as many rows as it has (256 at least) are read one after another, those that hold some of them.
    Where `positions` rise, each row of the file is read for two slices at most; in another order, each slice may read all.
    """

    matrix: Matrix
    positions: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Selected rows and columns."""
        return len(self.positions), self.matrix.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self.matrix.dtype

    def __getitem__(self, rows: slice) -> np.ndarray | sparse.csr_matrix:
        """Return some of the rows, dense or CSR as the matrix gives them."""
        wanted = self.positions[rows]
        found = [
            (places, take_rows(self.matrix, block)[wanted[places] - block.start])
            for places, block in _blocks_with(wanted, max(len(wanted), DISK_BLOCK_ROWS), self.matrix.shape[0])
        ]
        if not found:
            return take_rows(self.matrix, slice(0, 0))
        order = np.argsort(np.concatenate([places for places, _ in found]))
        parts = [part for _, part in found]
        return (sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts))[order]


def select_rows(x: Matrix, positions: np.ndarray) -> Matrix:
    """Return some rows of `x`: a copy in memory, or a :class:`Rows` of what is on disk. All of them in order are `x`."""
    if np.array_equal(positions, np.arange(x.shape[0])):
        return x
    if isinstance(x, Rows):
        return Rows(x.matrix, x.positions[positions])
    return Rows(x, positions) if on_disk(x) else x[positions]


def _blocks_with(rows: np.ndarray, size: int, n: int) -> Iterator[tuple[np.ndarray, slice]]:
    """Yield the blocks of `size` among n rows that hold some of `rows`, each after the places in `rows` that are in it."""
    order = np.argsort(rows, kind="stable")
    blocks, starts = np.unique(rows[order] // size, return_index=True)
    for block, places in zip(blocks, np.split(order, starts)[1:], strict=True):
        first = int(block) * size
        yield places, slice(first, min(first + size, n))


def row_blocks(n: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of at most `size` rows that cover `n` rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def varying_columns(x: Matrix) -> np.ndarray:
    """Mark the columns of `x` that do not hold one and the same value throughout."""
    if x.shape[0] == 0:
        return np.zeros(x.shape[1], dtype=bool)
    highest, lowest = x.max(axis=0), x.min(axis=0)
    if sparse.issparse(x):
        highest, lowest = highest.toarray().ravel(), lowest.toarray().ravel()
    return highest > lowest


def on_disk(x: Matrix) -> bool:
    """Tell whether rows are read from a file each time: a memory map, or an array of HDF5 or Zarr."""
    if sparse.issparse(x):
        return False
    base = x
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap) or not isinstance(x, np.ndarray)


def read_rows(x: Matrix, rows: np.ndarray) -> np.ndarray:
    """Return rows in any order; from disk, each block of 256 rows that has some of them is read once."""
    if not on_disk(x):
        return dense_rows(x, rows)
    found = np.empty((len(rows), x.shape[1]), x.dtype)
    for places, block in _blocks_with(rows, DISK_BLOCK_ROWS, x.shape[0]):
        found[places] = dense_rows(x, block)[rows[places] - block.start]
    return found


def _shuffled(n: int, rows: np.ndarray, seed: int, *, disk: bool) -> Iterator[np.ndarray]:
    """Yield row numbers in groups, each row once a pass; on disk, groups of 128 random blocks shuffled together."""
    if disk:
        wanted = np.zeros(n, dtype=bool)
        wanted[rows] = True
    for number in count():
        rng = np.random.default_rng([seed, number])
        if not disk:
            yield rows[rng.permutation(len(rows))]
            continue
        blocks = rng.permutation(-(-n // DISK_BLOCK_ROWS))
        for some in row_blocks(len(blocks), DISK_BLOCKS_SHUFFLED):
            found = (np.sort(blocks[some])[:, None] * DISK_BLOCK_ROWS + np.arange(DISK_BLOCK_ROWS)).ravel()
            found = found[found < n]
            yield rng.permutation(found[wanted[found]])


def shuffled_batches(x: Matrix, rows: np.ndarray, size: int, *, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of `size` rows without end, each row once a pass, from batch `first` on."""
    disk = on_disk(x)
    waiting = np.empty(0, dtype=np.int64)
    held = np.empty((0, x.shape[1]), x.dtype)
    skipped = 0
    for group in _shuffled(x.shape[0], rows, seed, disk=disk):
        waiting = np.concatenate([waiting, group])
        n_batches = len(waiting) // size
        skip = min(first - skipped, n_batches)
        skipped += skip
        if skip > 0:
            # They belong to the first batch that is skipped.
            held = held[:0]
        if not disk:
            for batch in range(skip, n_batches):
                yield dense_rows(x, waiting[batch * size : (batch + 1) * size])
        elif skip == 0 or skip < n_batches:
            held = np.concatenate([held, read_rows(x, waiting[skip * size + len(held) :])])
            for batch in range(n_batches - skip):
                yield held[batch * size : (batch + 1) * size]
            held = held[(n_batches - skip) * size :].copy()
        waiting = waiting[n_batches * size :]
