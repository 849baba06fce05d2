"""Small encodings of what a page draws: each has its decoder in page.js."""

from __future__ import annotations

import base64
import gzip
import json
import math

import numpy as np
from scipy import sparse

LEVELS = 255
"""Steps of an activation, from above 0 to the feature's largest."""
LARGEST = float(np.finfo(np.float64).max)
BITS = 12
"""Of a coordinate: finer than the pixels of a map."""


def packed(content: bytes) -> str:
    """Compress, and write with letters that cannot end an HTML element; the same every time."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


def packed_json(content: object) -> str:
    """Pack what JSON can say."""
    return packed(json.dumps(content, separators=(",", ":"), allow_nan=False).encode())


def rounded(values: np.ndarray) -> list[float | None]:
    """Round to four digits, which is what is shown. JSON has no NaN, which is None, and no infinity, which is the largest number."""
    shown = np.nan_to_num(values, nan=np.nan)
    return [
        None if math.isnan(value) else value if abs(value) == LARGEST else float(f"{value:.4g}")
        for value in shown.tolist()
    ]


def varints(values: np.ndarray) -> bytes:
    """Write whole numbers ≥ 0, seven bits a byte, the lowest first; the eighth bit says that more follow (LEB128)."""
    parts = np.asarray(values, dtype=np.uint64)[:, None] >> np.arange(0, 35, 7, dtype=np.uint64)
    used = np.maximum((parts > 0).sum(axis=1), 1)[:, None]
    place = np.arange(parts.shape[1])
    marked = (parts & np.uint64(0x7F)) | np.where(place < used - 1, np.uint64(0x80), np.uint64(0))
    return marked[place < used].astype(np.uint8).tobytes()


def zigzag(values: np.ndarray) -> np.ndarray:
    """Turn 0, −1, 1, −2, ... into 0, 1, 2, 3, ..."""
    values = np.asarray(values, dtype=np.int64)
    return (values << 1) ^ (values >> 63)


def on_grid(coordinates: np.ndarray) -> np.ndarray:
    """Round coordinates (n, 2) to a grid of 2**BITS that each axis fills."""
    if not len(coordinates):
        return np.empty((0, 2), dtype=np.int64)
    low = coordinates.min(axis=0)
    extent = coordinates.max(axis=0) - low
    return np.rint((coordinates - low) / np.where(extent > 0, extent, 1) * (2**BITS - 1)).astype(np.int64)


def near_each_other(xy: np.ndarray) -> np.ndarray:
    """Order points of the grid along a Z curve: cells of a feature are then close in the list, and their distances short."""
    code = np.zeros(len(xy), dtype=np.int64)
    for bit in range(BITS):
        for axis in range(2):
            code |= ((xy[:, axis] >> bit) & 1) << (2 * bit + axis)
    return np.argsort(code, kind="stable")


def cell_bytes(xy: np.ndarray) -> bytes:
    """Write points of the grid, as steps from one to the next: all of x, then all of y."""
    return b"".join(varints(zigzag(np.diff(xy[:, axis], prepend=0))) for axis in range(2))


def ranks(a: sparse.csc_matrix) -> np.ndarray:
    """Rank the cells of each feature by activation, 0 the strongest; one number per stored value."""
    found = np.empty(a.nnz, dtype=np.int64)
    for begin, end in zip(a.indptr[:-1], a.indptr[1:], strict=True):
        order = np.argsort(-a.data[begin:end], kind="stable")
        found[begin:end][order] = np.arange(end - begin)
    return found


def drawn_cells(cells: np.ndarray, rank: np.ndarray, n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Choose `most` of `n` cells: half the strongest of their features, so that no feature is left without, half any others.

    Parameters
    ----------
    cells, rank
        The cell of each stored activation, and its rank among those of the feature.
    """
    best = np.full(n, n)
    np.minimum.at(best, cells, rank)
    strong, others = np.split(np.lexsort((rng.permutation(n), best)), [most // 2])
    return np.sort(np.concatenate([strong, rng.choice(others, most - len(strong), replace=False)]))


def levels(a: sparse.csc_matrix, place: np.ndarray, kept: np.ndarray) -> sparse.csc_matrix:
    """Turn the activations that are kept into steps of their feature's largest value.

    Parameters
    ----------
    place
        Of each cell on the map; −1 is none, of which nothing may be kept.
    kept
        Marks stored activations.

    Returns
    -------
    Places × features, uint8, with sorted places.
    """
    column = np.repeat(np.arange(a.shape[1]), np.diff(a.indptr))
    kept = kept & (a.data > 0)
    level = np.clip(np.rint(a.data[kept] / highest(a)[column[kept]] * LEVELS), 1, LEVELS).astype(np.uint8)
    shape = (int((place >= 0).sum()), a.shape[1])
    found = sparse.csc_matrix((level, (place[a.indices[kept]], column[kept])), shape=shape)
    found.sort_indices()
    return found


def highest(a: sparse.csc_matrix) -> np.ndarray:
    """Return the largest activation of each feature, above 0 so that one can divide by it."""
    return np.maximum(a.max(axis=0).toarray().ravel(), np.finfo(np.float32).tiny)


def point_bytes(a: sparse.csc_matrix) -> bytes:
    """Write some features: the number of cells of each; of all, the steps from one place to the next; of all, the levels."""
    steps = np.diff(a.indices, prepend=0)
    first = a.indptr[:-1][np.diff(a.indptr) > 0]
    steps[first] = a.indices[first]
    return varints(np.diff(a.indptr)) + varints(steps) + a.data.tobytes()


def histograms(a: sparse.csc_matrix, n_bins: int) -> np.ndarray:
    """Count the active cells of each feature between 0 and its largest value (features × bins)."""
    column = np.repeat(np.arange(a.shape[1]), np.diff(a.indptr))
    active = a.data > 0
    column, share = column[active], a.data[active] / highest(a)[column[active]]
    place = np.minimum((share * n_bins).astype(np.int64), n_bins - 1)
    return np.bincount(column * n_bins + place, minlength=a.shape[1] * n_bins).reshape(a.shape[1], n_bins)


def similar(a: sparse.csc_matrix, n: int, block: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Find the `n` features that are most active in the same cells: their numbers, −1 for none, and cosines (features × n)."""
    length = np.sqrt(np.asarray(a.multiply(a).sum(axis=0)).ravel())
    unit = sparse.csr_matrix(a @ sparse.diags_array(1 / np.where(length > 0, length, 1)))
    columns = unit.T.tocsr()
    h, n = a.shape[1], min(n, a.shape[1] - 1)
    nearest, cosine = np.full((h, n), -1), np.zeros((h, n))
    for begin in range(0, h if n > 0 else 0, block):
        found = (columns[begin : begin + block] @ unit).toarray()
        rows = np.arange(len(found))
        found[rows, begin + rows] = -1
        best = np.argpartition(-found, n - 1, axis=1)[:, :n]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(found, best, 1), axis=1, kind="stable"), 1)
        value = np.take_along_axis(found, best, 1)
        nearest[begin : begin + block], cosine[begin : begin + block] = np.where(value > 0, best, -1), value
    return nearest, cosine
