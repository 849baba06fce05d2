"""How much alike two collections of sets are: the gene sets that the features of two SAEs stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, stats

from .matching import match_sets

TRADES = 5
"""Times that each set exchanges members with another."""


@dataclass(frozen=True)
class Overlap:
    """Measures of likeness, each with its values where nothing is shared but by chance."""

    shared: int
    """Members that occur on both sides."""
    spearman: float
    """Rank correlation of how often each member occurs."""
    jaccard: float
    """Mean over the sets of the side with fewer, of the best one-to-one matching."""
    spearman_by_chance: np.ndarray
    """(permutations,), the members of b renamed at random."""
    jaccard_by_chance: np.ndarray
    """(permutations,), the members of b exchanged between its sets."""


def overlap(
    a: sparse.csr_matrix,
    b: sparse.csr_matrix,
    rng: np.random.Generator,
    *,
    counted: str = "either",
    n_permutations: int = 0,
) -> Overlap:
    """Compare two collections of sets.

    Parameters
    ----------
    a, b
        (h_a, m) and (h_b, m), stored where a set has a member; empty sets take no part.
    counted
        Which members count for the rank correlation: those that occur on `"either"` side, or on `"both"`.
    """
    a, b = a[a.getnnz(axis=1) > 0], b[b.getnnz(axis=1) > 0]
    counts_a, counts_b = a.getnnz(axis=0), b.getnnz(axis=0)
    fewer = min(a.shape[0], b.shape[0])

    def spearman(counts_b: np.ndarray) -> float:
        kept = (counts_a > 0) & (counts_b > 0) if counted == "both" else (counts_a > 0) | (counts_b > 0)
        x, y = counts_a[kept], counts_b[kept]
        return float(stats.spearmanr(x, y).statistic) if len(set(x)) > 1 and len(set(y)) > 1 else np.nan

    def jaccard(b: sparse.csr_matrix) -> float:
        return float(np.nansum(match_sets(a, b).similarity) / fewer) if fewer else np.nan

    renamed = [spearman(rng.permutation(counts_b)) for _ in range(n_permutations)]
    drawn = [jaccard(exchanged(b, rng)) for _ in range(n_permutations)]
    shared = int(((counts_a > 0) & (counts_b > 0)).sum())
    return Overlap(shared, spearman(counts_b), jaccard(b), np.array(renamed), np.array(drawn))


def exchanged(members: sparse.csr_matrix, rng: np.random.Generator) -> sparse.csr_matrix:
    """Draw sets with as many members each, in which each member occurs as often, and nothing else is kept.

    Two sets at a time put what only one of them has together and share it out again, each as many as it gave (the curveball
    algorithm, Strona et al. 2014, doi:10.1038/ncomms5114).

    Parameters
    ----------
    members
        (h, m), stored where a set has a member.
    """
    sets = [set(row.tolist()) for row in np.split(members.indices, members.indptr[1:-1])]
    for _ in range(TRADES):
        order = rng.permutation(len(sets))
        for first, second in zip(order[::2], order[1::2], strict=False):
            _trade(sets, first, second, rng)
    columns = np.fromiter((member for held in sets for member in sorted(held)), np.int64, members.nnz)
    return sparse.csr_matrix((np.ones(members.nnz), columns, members.indptr), shape=members.shape)


def _trade(sets: list[set[int]], first: int, second: int, rng: np.random.Generator) -> None:
    both = sets[first] & sets[second]
    n_first = len(sets[first]) - len(both)
    pool = np.array(sorted(sets[first] ^ sets[second]))
    if 0 < n_first < len(pool):
        drawn = rng.permutation(pool).tolist()
        sets[first], sets[second] = both | set(drawn[:n_first]), both | set(drawn[n_first:])
