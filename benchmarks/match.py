"""How long does it take to pair the features of two large SAEs, and are the pairs right?

Features are matched with the same ones in another order, with noisy ones (a decoder at a cosine of about .8; activations of which a
third is of other cells), and with unrelated ones, by decoder directions and by activations on the same cells. The peer is the
full Hungarian method on all pairs (scipy.optimize.linear_sum_assignment), up to --peer features.

    found    share of the features whose partner is the right one
    sum      sum of the similarities of all pairs, as a share of that of the full Hungarian method
    seconds  wall-clock, reading the features included

    python benchmarks/match.py
    python benchmarks/match.py --features 1024 4096 --peer 4096
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from sae.core.matching import Matching, match_activations, match_vectors

N_CELLS, K = 20_000, 32
WIDTHS = (50, 512)
NOISE = 0.75
SEED = 101
COLUMNS = {
    "features": (9, ","),
    "by": (28, ""),
    "with": (11, ""),
    "seconds": (9, ".1f"),
    "found": (8, ".4f"),
    "full: seconds": (15, ".1f"),
    "full: found": (13, ".4f"),
    "sum": (9, ".5f"),
}
"""Width and format of each."""


def vectors(h: int, d: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((h, d), dtype=np.float32)


def activations(n: int, h: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """K features of each cell, some features far more often than others."""
    weight = 0.5 + rng.exponential(size=h)
    columns = np.concatenate([rng.choice(h, K, replace=False, p=weight / weight.sum()) for _ in range(n)])
    values = rng.exponential(size=n * K).astype(np.float32)
    return sparse.csr_matrix((values, columns, np.arange(0, n * K + 1, K)), shape=(n, h))


def unrelated_in_a_third(a: sparse.csr_matrix, rng: np.random.Generator) -> sparse.csr_matrix:
    rows = np.arange(a.shape[0])
    exchanged = rng.choice(rows, a.shape[0] // 3, replace=False)
    rows[exchanged] = rng.permutation(exchanged)
    return a[rows]


def full_vectors(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float]:
    a, b = (x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (a, b))
    return hungarian(a @ b.T)


def full_activations(a: sparse.csr_matrix, b: sparse.csr_matrix) -> tuple[np.ndarray, float]:
    products, n = (a.T.astype(np.float64) @ b).toarray(), a.shape[0]
    (mean_a, sd_a), (mean_b, sd_b) = ((x.mean(axis=0).A1, np.sqrt(x.power(2).mean(axis=0).A1)) for x in (a, b))
    sd_a, sd_b = np.sqrt(sd_a**2 - mean_a**2), np.sqrt(sd_b**2 - mean_b**2)
    return hungarian((products / n - np.outer(mean_a, mean_b)) / np.outer(sd_a, sd_b))


def hungarian(similarity: np.ndarray) -> tuple[np.ndarray, float]:
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return columns, float(similarity[rows, columns].sum())


def timed(function: Callable, *given) -> tuple[object, float]:
    start = time.perf_counter()
    return function(*given), time.perf_counter() - start


def problems(h: int, rng: np.random.Generator) -> Iterator[tuple[str, str, Callable, Callable, object, object, object]]:
    """Yield what is matched, with whom, both ways to do it, both sides, and the right partners."""
    order = rng.permutation(h)
    right = np.argsort(order)
    for d in WIDTHS:
        a = vectors(h, d, rng)
        what = f"decoder, d = {d}", match_vectors, full_vectors
        yield what[0], "permuted", *what[1:], a, a[order], right
        yield what[0], "noisy", *what[1:], a, a[order] + NOISE * vectors(h, d, rng), right
        yield what[0], "unrelated", *what[1:], a, vectors(h, d, rng), None
    a = activations(N_CELLS, h, rng)
    what = f"activations, {N_CELLS:,} cells", match_activations, full_activations
    yield what[0], "permuted", *what[1:], a, a[:, order], right
    yield what[0], "noisy", *what[1:], a, unrelated_in_a_third(a, rng)[:, order], right
    yield what[0], "unrelated", *what[1:], a, a[rng.permutation(N_CELLS)], None


def measured(h: int, peer: int) -> Iterator[dict[str, object]]:
    for what, with_whom, ours, full, a, b, right in problems(h, np.random.default_rng(SEED)):
        found, seconds = timed(ours, a, b)
        assert isinstance(found, Matching)
        row = {"features": h, "by": what, "with": with_whom, "seconds": seconds}
        if right is not None:
            row["found"] = np.mean(found.partner == right)
        if h <= peer:
            (columns, total), row["full: seconds"] = timed(full, a, b)
            row["sum"] = np.nansum(found.similarity) / total
            if right is not None:
                row["full: found"] = np.mean(columns == right)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[2_048, 4_096, 16_384])
    parser.add_argument("--peer", type=int, default=4_096)
    options = parser.parse_args()
    print("".join(f"{name:>{width}}" for name, (width, _) in COLUMNS.items()))
    for h in options.features:
        for row in measured(h, options.peer):
            cells = (f"{row[name]:{form}}" if name in row else "" for name, (_, form) in COLUMNS.items())
            print(
                "".join(f"{cell:>{width}}" for cell, (width, _) in zip(cells, COLUMNS.values(), strict=True)),
                flush=True,
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"\n{os.cpu_count()} cores, peak memory {peak:.1f} GB (the matrix of 16,384 × 16,384 similarities alone: 2.1 GB)"
    )


if __name__ == "__main__":
    main()
