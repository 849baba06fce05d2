"""Work on parts of the cells, on the cluster that a dask array is computed on."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from .rows import PIECE_BYTES, Matrix, asked_in_turn, is_dask, row_bytes, take_rows

SPARSE_SHARE = 4
"""Of a sparse array as many rows are taken at a time as have this many times the bytes, were they dense."""
MOST_SENT = "1TB"
"""What is in memory is sent with the tasks that need it, of which a few are in work at a time: dask warns from 10 MB on."""

Value = TypeVar("Value")


def cluster_of(*matrices: Matrix) -> Any:
    """Return the `distributed.Client` that dask arrays among the matrices are computed on; None where there is none.

    A verb that itself runs as a task of a cluster divides its work no further: its tasks could wait for the place that it takes.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None or not any(map(is_dask, matrices)) or asked_in_turn():
        return None
    try:
        return distributed.get_client()
    except ValueError:
        return None


def folded(
    client: Any,
    function: Callable[..., Any],
    matrices: Sequence[Matrix],
    parts: Iterable[Sequence[slice]],
    *shared: Any,
) -> Iterator[Any]:
    """Go through parts of the cells on the workers of a cluster.

    Tasks of a worker that dies are run again by others. An error in a task is raised here as it is there. What is still in
    work is cancelled when the caller stops, by an error or Ctrl-C too.

    Parameters
    ----------
    client
        Of the cluster.
    function
        `function(so_far, *rows, *shared)` is given what it returned for the slice before (None for the first of a part), the
        same rows of each matrix in memory, as :func:`take_rows` gives them, and what is shared. It must leave all of them as
        they are: a task may be run again.
    matrices
        Of the same cells. Rows of dask arrays are computed where they are needed, others are read here and sent.
    parts
        Each one or several slices of rows, whose results follow from each other, on one worker.
    shared
        Sent to the cluster once.

    Yields
    ------
    What the last slice of each part gave, in the order of the parts. A part per thread and one more per worker are in work or
    wait to be fetched at a time.
    """
    import dask

    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    most = max(2, len(workers) + sum(worker["nthreads"] for worker in workers))
    run, ahead = dask.delayed(_apply, pure=False), deque[Any]()
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": MOST_SENT}):
        # As results of tasks: what is scattered is lost with the worker that holds it.
        everywhere = [client.submit(_itself, value, pure=False) for value in shared]
    try:
        for slices in parts:
            so_far = None
            for rows in slices:
                some = [x[rows] if is_dask(x) else take_rows(x, rows) for x in matrices]
                so_far = run(function, so_far, len(some), *some, *everywhere)
            with dask.config.set({"distributed.admin.large-graph-warning-threshold": MOST_SENT}):
                ahead.append(client.compute(so_far))
            if len(ahead) == most:
                yield _fetched(ahead)
        while ahead:
            yield _fetched(ahead)
    finally:
        # Without what they share, which goes once nobody asks for it: together, dask's scheduler of 2024 stumbles over them.
        client.cancel([*ahead])
        for value in everywhere:
            value.release()


def _fetched(ahead: deque[Any]) -> Any:
    # In the queue until it is here, to be cancelled with the others if it never comes.
    found = ahead[0].result()
    ahead.popleft()
    return found


def _itself(value: Value) -> Value:
    return value


def _apply(function: Callable[..., Any], so_far: Any, n_matrices: int, *given: Any) -> Any:
    some = [take_rows(part, slice(None)) for part in given[:n_matrices]]
    return function(so_far, *some, *given[n_matrices:])


def whole_chunks(x: Matrix, rows: slice) -> Iterator[slice]:
    """Divide rows of a dask array where its chunks end: into about 64 MB, or single chunks where those are larger."""
    share = SPARSE_SHARE if sparse.issparse(x._meta) else 1
    most = max(1, int(share * PIECE_BYTES / max(row_bytes(x), 1)))
    edges = np.cumsum(x.chunks[0])
    ends = [*edges[(edges > rows.start) & (edges < rows.stop)].tolist(), rows.stop]
    start = rows.start
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - start > most:
            yield slice(start, end)
            start = end
