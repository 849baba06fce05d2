"""Reading a matrix by rows, in memory or on disk, without copying all of it."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias, TypeVar

import numpy as np
from scipy import sparse

Matrix: TypeAlias = Any
"""A NumPy array or a SciPy CSR matrix; or, on disk, anything with a shape that gives rows for a slice."""
Task = TypeVar("Task")
Read = TypeVar("Read")

PIECE_BYTES = 32_000_000
"""What is read from disk at a time, unless a single chunk there is larger; two such pieces are held."""
CHUNKS_PER_PIECE = 4
DISK_BLOCK_ROWS = 256
"""Rows of a memory map that are read together, and the fewest of any file."""
DISK_BLOCKS_SHUFFLED = 128
"""Blocks of a memory map that are shuffled together."""
GROUP_BYTES = 128_000_000
"""Rows of a file, as 32-bit numbers, that are shuffled together."""
BLOCKS_PER_GROUP, FEWEST_BLOCKS = 32, 4


def take_rows(x: Matrix, rows: slice | np.ndarray) -> Any:
    """Return some rows of `x` (n, d) in memory: CSR in canonical format if they are sparse, else a dense array."""
    # anndata 0.12 does not give all of a matrix for [:] that is the root of a Zarr store.
    whole = isinstance(rows, slice) and rows == slice(None)
    part = x[slice(0, x.shape[0]) if whole else rows]
    if hasattr(part, "compute"):
        part = part.compute()
    return as_csr(part) if sparse.issparse(part) else np.asarray(part)


def pieces(x: Matrix, size: int) -> Iterator[tuple[slice, Any]]:
    """Yield the rows of `x` (n, d) in order, `size` at a time, in memory as :func:`take_rows` gives them.

    From disk, several whole chunks of the file are read at once, each of them once, and the next ones while those before
    are in use.
    """
    blocks = row_blocks(x.shape[0], size)
    if not on_disk(x):
        for rows in blocks:
            yield rows, take_rows(x, rows)
        return
    at_once = max(size, min(CHUNKS_PER_PIECE * stored_rows(x), int(PIECE_BYTES / max(row_bytes(x), 1))))
    yield from zip(blocks, _cut(_read(x, take_rows, spans(x, at_once)), size), strict=True)


def _read(x: Matrix, read: Callable[[Matrix, Task], Read], tasks: Iterable[Task]) -> Iterator[Read]:
    """Yield read(x, task) of all tasks; where another thread may read, it does the next one meanwhile."""
    if not reads_ahead(x):
        yield from (read(x, task) for task in tasks)
        return
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for task in tasks:
            following = reader.submit(read, x, task)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _cut(parts: Iterable[Any], size: int) -> Iterator[Any]:
    """Cut what comes in parts, which may be sparse, into pieces of `size` rows, and at the end the rest."""
    rest: list[Any] = []
    n_rest = 0
    for part in parts:
        start = min(size - n_rest, part.shape[0]) if n_rest else 0
        if start:
            rest.append(part[:start])
            n_rest += start
            if n_rest < size:
                continue
            yield _joined(rest)
        stop = start + (part.shape[0] - start) // size * size
        for low in range(start, stop, size):
            yield part[low : low + size]
        # A copy, or all of the part would be held.
        rest, n_rest = [part[stop:].copy()], part.shape[0] - stop
        del part
    if n_rest:
        yield _joined(rest)


def _joined(parts: list[Any]) -> Any:
    """Put rows below each other, or numbers behind each other."""
    if len(parts) == 1:
        return parts[0]
    return sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)


def _edges(x: Matrix, least: int) -> np.ndarray:
    """Return where blocks of whole chunks of a file begin, of at least so many rows, and then the number of rows."""
    n = x.shape[0]
    while isinstance(x, Columns):
        x = x.matrix
    if is_dask(x):
        edges = [0]
        for stop in np.cumsum(x.chunks[0]).tolist():
            if stop - edges[-1] >= least or (stop == n and n > edges[-1]):
                edges.append(stop)
        return np.array(edges)
    chunk = 1 if isinstance(x, Rows) else stored_rows(x)
    return np.append(np.arange(0, n, -(-least // chunk) * chunk), n)


def spans(x: Matrix, least: int) -> Iterator[slice]:
    """Yield consecutive slices that cover all rows: of whole chunks, and of at least so many rows but for the last."""
    edges = _edges(x, least).tolist()
    yield from map(slice, edges[:-1], edges[1:])


def is_dask(x: Matrix) -> bool:
    """Tell whether this is a dask array, or anndata's view of one."""
    return any(kind.__module__.partition(".")[0] == "dask" for kind in type(x).__mro__)


def _stored(x: Matrix) -> Any:
    """Return the array on disk that some rows or columns are of."""
    while isinstance(x, Rows | Columns):
        x = x.matrix
    return x


def stored_rows(x: Matrix) -> int:
    """Rows that a file gives only together: a chunk of HDF5, Zarr or dask (the median one), all of CSC; 1 in memory."""
    x = _stored(x)
    if is_dask(x):
        return max(1, int(np.median(x.chunks[0])))
    group = getattr(x, "group", None)
    if group is not None and x.format == "csc":
        return max(1, x.shape[0])
    chunked = getattr(x if group is None else group["data"], "chunks", None)
    if not chunked:
        return 1
    return int(chunked[0] if group is None else max(1, chunked[0] / max(_stored_per_row(x), 1)))


def row_bytes(x: Matrix) -> float:
    """Bytes that a row takes when it is read, on average; of a sparse dask array those that a dense one would take."""
    x = _stored(x)
    group = getattr(x, "group", None)
    if group is None:
        return x.shape[1] * x.dtype.itemsize
    return _stored_per_row(x) * (x.dtype.itemsize + group["indices"].dtype.itemsize)


def _stored_per_row(x: Any) -> float:
    return x.group["data"].shape[0] / max(x.shape[0], 1)


def reads_ahead(x: Matrix) -> bool:
    """Tell whether another thread may read rows: not of a model's predictions, whose code is the user's."""
    x = _stored(x)
    return type(x).__module__.partition(".")[0] in ("h5py", "zarr", "dask", "anndata") and not (
        is_dask(x) and asked_in_turn()
    )


def asked_in_turn() -> bool:
    """Tell whether dask must be asked by this thread itself: in a task of a cluster, or in an event loop.

    A task that waits makes room for what it waits for, unless it waits for another thread. In the event loop of an asynchronous
    client dask refuses to compute, but another thread would wait for the loop, which waits for it.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return False
    try:
        distributed.get_worker()
    except ValueError:
        try:
            return bool(distributed.get_client().asynchronous)
        except ValueError:
            return False
    return True


def dense_rows(x: Matrix, rows: slice | np.ndarray) -> np.ndarray:
    """Return some rows of `x` (n, d) as a dense array of its dtype."""
    part = take_rows(x, rows)
    # In this order whatever the order in the file: sums over the rows are rounded by it.
    return part.toarray() if sparse.issparse(part) else np.ascontiguousarray(part)


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

    For a slice, the chunks of the file that hold some of them are read, neighbours together. Where `positions` rise, a
    chunk is read again only where a slice ends in it; in another order, each slice may read all.
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
            for places, block in _blocks_with(self.matrix, wanted)
        ]
        if not found:
            return take_rows(self.matrix, slice(0, 0))
        order = np.argsort(np.concatenate([places for places, _ in found]))
        return _joined([part for _, part in found])[order]


def select_rows(x: Matrix, positions: np.ndarray) -> Matrix:
    """Return some rows of `x`: a copy in memory, or a :class:`Rows` of what is on disk. All of them in order are `x`."""
    if np.array_equal(positions, np.arange(x.shape[0])):
        return x
    if isinstance(x, Rows):
        return Rows(x.matrix, x.positions[positions])
    return Rows(x, positions) if on_disk(x) else x[positions]


def _blocks_with(x: Matrix, rows: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
    """Yield blocks of whole chunks that hold some of `rows`, neighbours as one, each after the places of those rows."""
    if len(rows) == 0:
        return
    edges = _edges(x, DISK_BLOCK_ROWS)
    order = np.argsort(rows, kind="stable")
    blocks, starts = np.unique(np.searchsorted(edges, rows[order], side="right") - 1, return_index=True)
    most = PIECE_BYTES / max(row_bytes(x), 1)
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] > blocks[i - 1] + 1 or edges[blocks[i] + 1] - edges[blocks[first]] > most:
            places = order[starts[first] : starts[i] if i < len(blocks) else None]
            yield places, slice(int(edges[blocks[first]]), int(edges[blocks[i - 1] + 1]))
            first = i


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
    """Return rows in any order; from disk, each chunk that has some of them is read once."""
    if not on_disk(x):
        return dense_rows(x, rows)
    if isinstance(x, Rows):
        return read_rows(x.matrix, x.positions[rows])
    found = np.empty((len(rows), x.shape[1]), x.dtype)
    for places, block in _blocks_with(x, rows):
        found[places] = dense_rows(take_rows(x, block), rows[places] - block.start)
    return found


def shuffled_batches(x: Matrix, rows: np.ndarray, size: int, *, seed: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of `size` rows without end, each row once a pass, from batch `first` on.

    In memory, and from a file of up to 128 MB (as 32-bit numbers), which is then held, rows are drawn one by one. Of a
    larger file, random blocks that make up so much are shuffled together, and the next ones are read meanwhile. There
    are 32 to 64 of them, whose length depends on the width d alone, or fewer where the chunks of the file are longer:
    then a block is a chunk, and there are four at least. Of a memory map, it is 128 blocks of 256 rows.
    """
    blocks = _blocks_to_shuffle(x) if on_disk(x) else None
    if blocks is not None and x.shape[0] <= blocks[0] * blocks[1] and not _is_memory_map(x):
        x, blocks = take_rows(x, slice(0, x.shape[0])), None
    order = _after(_shuffled(x.shape[0], rows, seed, blocks), first * size)
    if blocks is None:
        yield from (dense_rows(x, batch) for batch in _cut(order, size))
    else:
        yield from _cut(_read(x, read_rows, order), size)


def _blocks_to_shuffle(x: Matrix) -> tuple[int, int]:
    """Return how many rows of a file a block has, and how many blocks are shuffled together."""
    if _is_memory_map(x):
        return DISK_BLOCK_ROWS, DISK_BLOCKS_SHUFFLED
    most = GROUP_BYTES // (4 * x.shape[1])
    # A power of two, which chunks often are too.
    block = max(DISK_BLOCK_ROWS, 1 << (most // BLOCKS_PER_GROUP).bit_length() >> 1, stored_rows(x))
    return block, max(FEWEST_BLOCKS, most // block)


def _is_memory_map(x: Matrix) -> bool:
    return isinstance(_stored(x), np.ndarray)


def _shuffled(n: int, rows: np.ndarray, seed: int, blocks: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """Yield row numbers in groups, each once a pass: all, or those of some random blocks (rows, blocks in a group)."""
    if blocks is not None:
        length, at_once = blocks
        wanted = np.zeros(n, dtype=bool)
        wanted[rows] = True
    for number in count():
        rng = np.random.default_rng([seed, number])
        if blocks is None:
            yield rows[rng.permutation(len(rows))]
            continue
        shuffled = rng.permutation(-(-n // length))
        for some in row_blocks(len(shuffled), at_once):
            found = (np.sort(shuffled[some])[:, None] * length + np.arange(length)).ravel()
            found = found[found < n]
            yield rng.permutation(found[wanted[found]])


def _after(groups: Iterable[np.ndarray], skipped: int) -> Iterator[np.ndarray]:
    """Leave out the first row numbers."""
    for group in groups:
        if skipped < len(group):
            yield group[skipped:]
        skipped = max(skipped - len(group), 0)
