"""A few threads that share the blocks of one step."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_threads() -> int:
    """Number of CPUs this process may use, or fewer if `OMP_NUM_THREADS` says so."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpus, int(asked)) if asked.isdigit() and int(asked) > 0 else cpus


class Workers:
    """Threads for functions that release the interpreter lock; with one, everything runs in the caller.

    Each thread but the caller's starts with `at_start`.
    """

    def __init__(self, n: int, at_start: Callable[[], object] | None = None):
        self.n = n
        self._pool = ThreadPoolExecutor(n - 1, initializer=at_start) if n > 1 else None

    def each(self, function: Callable[[int, Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Return function(worker, task) of all tasks, in their order."""
        if self._pool is None or len(tasks) == 1:
            return [function(0, task) for task in tasks]

        def share(worker: int) -> list[Result]:
            return [function(worker, task) for task in tasks[worker :: self.n]]

        others = [self._pool.submit(share, worker) for worker in range(1, self.n)]
        shares = [share(0), *(other.result() for other in others)]
        return [shares[i % self.n][i // self.n] for i in range(len(tasks))]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], n: int) -> Iterator[Result]:
    """Yield function(task) of all tasks in their order, computed by n threads that are up to n tasks ahead."""
    if n == 1:
        yield from map(function, tasks)
        return
    with ThreadPoolExecutor(n) as pool:
        ahead: deque[Future[Result]] = deque()
        for task in tasks:
            ahead.append(pool.submit(function, task))
            if len(ahead) == n:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
