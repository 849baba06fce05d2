"""Work on parts of the cells, on the cluster that a dask array is computed on."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .rows import Matrix, is_dask, take_rows


def cluster_of(*matrices: Matrix) -> Any:
    """Return the `distributed.Client` that dask arrays among the matrices are computed on; None where there is none."""
    distributed = sys.modules.get("distributed")
    if distributed is None or not any(map(is_dask, matrices)):
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

    Parameters
    ----------
    client
        Of the cluster.
    function
        `function(so_far, *rows, *shared)` is given what it returned for the slice before (None for the first of a part), the
        same rows of each matrix in memory, as :func:`take_rows` gives them, and what is shared. It must leave `so_far` as it is: a task may
        be run again.
    matrices
        Of the same cells. Rows of dask arrays are computed where they are needed, others are read here and sent.
    parts
        Each one or several slices of rows, whose results follow from each other, on one worker.
    shared
        Sent to every worker once.

    Yields
    ------
    What the last slice of each part gave, in the order of the parts. Two parts per worker are in work at a time.
    """
    import dask

    run = dask.delayed(_apply, pure=False)
    everywhere = [client.scatter(value, broadcast=True, hash=False) for value in shared]
    workers = max(1, len(client.scheduler_info(n_workers=-1)["workers"]))
    ahead: deque[Any] = deque()
    try:
        for slices in parts:
            so_far = None
            for rows in slices:
                some = [x[rows] if is_dask(x) else take_rows(x, rows) for x in matrices]
                so_far = run(function, so_far, len(some), *some, *everywhere)
            ahead.append(client.compute(so_far))
            if len(ahead) == 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        client.cancel(list(ahead))


def _apply(function: Callable[..., Any], so_far: Any, n_matrices: int, *given: Any) -> Any:
    some = [take_rows(part, slice(None)) for part in given[:n_matrices]]
    return function(so_far, *some, *given[n_matrices:])
