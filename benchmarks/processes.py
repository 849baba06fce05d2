"""Would training in several processes be faster than in several threads?

Two processes of one thread share each batch and average their gradients with `torch.distributed` (gloo), beside one process of
two threads with torch, and beside the compiled back end that `sae.tl.fit` uses on the CPU. Rounds alternate; the table has the medians of
cells per second. The result of two processes is not that of one: each takes the k largest of its own half of the batch.

    python benchmarks/processes.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae.core.architectures import ARCHITECTURES
from sae.core.backend import Backend, Settings
from sae.core.backend_torch import TorchBackend
from sae.core.initial import initial_weights
from sae.core.train import make_backend

ROUNDS, WARM_UP, STEPS = 5, 5, 40
SHAPES = {"50 × 2,048, batches of 4,096": (50, 2_048, 4_096), "512 × 4,096, batches of 1,024": (512, 4_096, 1_024)}
CONTENDERS = {
    "compiled, 1 process × 2 threads": (1, 2, True),
    "torch, 1 process × 2 threads": (1, 2, False),
    "torch, 2 processes × 1 thread": (2, 1, False),
}


def settings(n_features: int, batch_size: int) -> Settings:
    return Settings("batchtopk", n_features, (n_features,), 32, None, None, 1e-3, 10_000, batch_size, 0, "cpu")


def step_rate(backend: Backend, batches: list[np.ndarray]) -> float:
    """Return steps per second."""
    for number in range(WARM_UP):
        backend.step(batches[number % len(batches)], number, 1e-3)
    start = time.perf_counter()
    for number in range(STEPS):
        backend.step(batches[number % len(batches)], WARM_UP + number, 1e-3)
    return STEPS / (time.perf_counter() - start)


def run(rank: int, n_processes: int, threads: int, compiled: bool, shape: tuple[int, int, int], folder: str) -> None:
    """Train in one of some processes; the first writes what it measured."""
    torch.set_num_threads(threads)
    d, n_features, batch_size = shape
    how = settings(n_features, batch_size // n_processes)
    rng = np.random.default_rng(rank)
    batches = [rng.standard_normal((how.batch_size, d)).astype(np.float32) for _ in range(8)]
    weights = initial_weights(np.random.default_rng(0).standard_normal((n_features, d)), np.ones(d), how)
    if compiled:
        backend: Backend = make_backend(weights, how)
    else:
        backend = TorchBackend(weights, ARCHITECTURES[how.architecture], how)
    if n_processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n_processes)

        def average(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                for value in group["params"]:
                    dist.all_reduce(value.grad)
                    value.grad /= n_processes

        backend._optimizer.register_step_pre_hook(average)  # type: ignore[attr-defined]
    rate = step_rate(backend, batches) * batch_size
    backend.close()
    if n_processes > 1:
        dist.destroy_process_group()
    if rank == 0:
        Path(folder, "rate").write_text(str(rate))


def main() -> None:
    for name, shape in SHAPES.items():
        found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
        for _ in range(ROUNDS):
            for contender, (n_processes, threads, compiled) in CONTENDERS.items():
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(run, (n_processes, threads, compiled, shape, folder), nprocs=n_processes)
                    found[contender].append(float(Path(folder, "rate").read_text()))
        print(f"\n{name}\n\n| | cells per second | of the compiled |\n|---|---|---|")
        fastest = statistics.median(found["compiled, 1 process × 2 threads"])
        for contender, rates in found.items():
            rate = statistics.median(rates)
            print(f"| {contender} | {rate:,.0f} | {rate / fastest:.2f} |")


if __name__ == "__main__":
    main()
