"""Gene-set methods of decoupler, on arrays.

They are called without decoupler's handling of tables, which drops empty rows, prunes and shuffles columns and adjusts
p-values in place. Scores must be finite, and no row constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse, special

PERMUTATIONS = 1000


@dataclass(frozen=True)
class SetScores:
    """All arrays (features, sets)."""

    score: np.ndarray
    pval: np.ndarray


def ulm(values: np.ndarray, sets: sparse.csr_matrix) -> SetScores:
    """Regress the values (features, genes) on the weights of each set (sets, genes): t of the slope, two-sided p."""
    import decoupler as dc

    score, pval = dc.mt.ulm.func(values, sets.toarray().T)
    return SetScores(score, pval)


def gsea(values: np.ndarray, sets: sparse.csr_matrix, seed: int) -> SetScores:
    """Run GSEA: normalised enrichment scores, and p from 1,000 permutations of the genes, no smaller than 1/1,001."""
    import decoupler as dc

    # Before 2.3, decoupler takes the seed 0 for no permutation.
    # It divides by the number of genes outside a set.
    some = np.flatnonzero(sets.getnnz(axis=1) < sets.shape[1])
    score, pval = np.zeros((len(values), sets.shape[0])), np.ones((len(values), sets.shape[0]))
    if len(some):
        score[:, some], found = dc.mt.gsea.func(values, *_lists(sets[some]), times=PERMUTATIONS, seed=seed + 1)
        pval[:, some] = np.clip(found, 1 / (PERMUTATIONS + 1), 1)
    return SetScores(score, pval)


def aucell(values: np.ndarray, sets: sparse.csr_matrix) -> SetScores:
    """Run AUCell: area under the recovery curve of each set among the 5 % highest values, 0 to 1.

    AUCell has no p-value. The area is a sum over the genes of the set, of c = max(0, u − r) for rank r with u ranks in the
    5 %, so that for m random genes among g it has mean m c̄ and variance m (g − m)/(g − 1) · Var(c), in units of the
    largest area there could be; p is one-sided, from the normal distribution, and rough for small sets.
    """
    import decoupler as dc

    g = values.shape[1]
    n_up = int(np.clip(np.ceil(0.05 * g), 2, g))
    area, _ = dc.mt.aucell.func(values, *_lists(sets), n_up=n_up)
    size = sets.getnnz(axis=1)
    gain = np.maximum(n_up - np.arange(1, g + 1), 0.0)
    largest = np.append(0, np.cumsum(gain))[np.minimum(size, n_up)]
    sd = np.sqrt(size * (g - size) / (g - 1) * gain.var())
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (area * largest - size * gain.mean()) / sd
    return SetScores(area, np.where(sd > 0, special.ndtr(-z), 1.0))


def _lists(sets: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes of all sets one after the other, where each set begins, and how many it has."""
    return sets.indices.astype(np.int64), sets.indptr[:-1].astype(np.int64), np.diff(sets.indptr).astype(np.int64)
