from __future__ import annotations

import threading
import time

import pytest

from sae.core.workers import Workers, available_threads


@pytest.fixture
def make():
    made = []

    def make(n, at_start=None):
        made.append(Workers(n, at_start))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("n_tasks", [0, 1, 2, 7])
def test_results_are_in_the_order_of_the_tasks(make, n, n_tasks):
    def slow(worker, task):
        time.sleep(0.001 * (n_tasks - task))
        return 10 * task

    assert make(n).each(slow, range(n_tasks)) == [10 * task for task in range(n_tasks)]


def test_tasks_of_one_worker_run_one_after_the_other(make):
    """So that they can share its scratch space."""
    busy, taken = set(), []

    def work(worker, task):
        assert worker not in busy
        busy.add(worker)
        time.sleep(0.001)
        busy.remove(worker)
        taken.append(worker)

    make(3).each(work, range(12))
    assert sorted(taken) == sorted([0, 1, 2] * 4)


def test_with_one_worker_the_caller_does_it_all(make):
    threads = set(make(1).each(lambda worker, task: threading.get_ident(), range(4)))
    assert threads == {threading.get_ident()}


def test_threads_start_with_what_they_are_told_to(make):
    started = []
    workers = make(3, lambda: started.append(threading.get_ident()))
    for _ in range(2):
        used = set(workers.each(lambda worker, task: time.sleep(0.01) or threading.get_ident(), range(3)))
        assert used - {threading.get_ident()} == set(started)


@pytest.mark.parametrize("failing", [0, 1, 4])
def test_an_error_reaches_the_caller(make, failing):
    def work(worker, task):
        if task == failing:
            raise ZeroDivisionError(f"task {task}")

    with pytest.raises(ZeroDivisionError, match=f"task {failing}"):
        make(3).each(work, range(6))


@pytest.mark.parametrize(("asked", "limit"), [("1", 1), ("10000", None), ("", None), ("0", None), ("many", None)])
def test_threads_are_the_cpus_or_fewer_if_the_environment_says_so(monkeypatch, asked, limit):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    all_cpus = available_threads()
    assert all_cpus >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert available_threads() == (limit or all_cpus)
