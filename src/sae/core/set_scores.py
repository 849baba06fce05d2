"""Gene sets of columns, chosen on one half of the cells and scored on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from .enrichment import rank_sets
from .recovery import correlations
from .rows import Matrix, dense_rows, row_blocks, varying_columns

BLOCK_COLUMNS = 128


@dataclass(frozen=True)
class SetScores:
    """How gene sets that were chosen on one half of the cells do on the other, the mean of both ways."""

    auroc: np.ndarray
    """(columns,), of the set with the highest z on the choosing half; NaN for a column that is constant in a half."""
    same: np.ndarray
    """(columns,), 1 where both halves choose the same set, else 0; NaN as above."""
    chosen: np.ndarray
    """(columns,), that set; −1 where the halves differ or for a constant column."""
    of_sets: np.ndarray
    """(sets,), AUROC of the set by the column that has the highest one on the choosing half; NaN without any column."""

    def n_sets(self, least: float) -> int:
        """Count the different sets that some column has on both halves, with at least this AUROC."""
        return len(np.unique(self.chosen[(self.chosen >= 0) & (self.auroc >= least)]))


def score_sets(
    columns: Matrix,
    x: Matrix,
    sets: sparse.csr_matrix,
    half: np.ndarray,
    *,
    own: np.ndarray | None = None,
    on_block: Callable[[int], object] | None = None,
) -> SetScores:
    """Score gene sets by the correlation of a column with each gene: AUROC of the genes inside among all that vary.

    Parameters
    ----------
    columns
        (n, columns), dense or CSR.
    x
        Expression (n, genes), dense or CSR.
    sets
        (sets, genes), 1 for a member.
    half
        (n,) of 0 and 1.
    own
        (columns,) the gene that each column is, which then does not count; by default none is.
    on_block
        Is told the number of columns that are done.
    """
    h, n_sets = columns.shape[1], sets.shape[0]
    auroc, same, chosen = np.full(h, np.nan), np.full(h, np.nan), np.full(h, -1)
    best, of_sets = np.full((2, n_sets), -np.inf), np.full((2, n_sets), np.nan)
    parts = [(x[half == p], columns[half == p]) for p in range(2)]
    constant = [~varying_columns(part) for part, _ in parts]
    for block in row_blocks(h, BLOCK_COLUMNS):
        scores, active = [], np.ones(block.stop - block.start, dtype=bool)
        for (expression, of_half), still in zip(parts, constant, strict=True):
            values = dense_rows(of_half[:, block], slice(None))
            r = correlations(values, expression)
            r[:, still] = np.nan
            if own is not None:
                r[np.arange(len(r)), own[block]] = np.nan
            scores.append(rank_sets(r, sets))
            active &= np.ptp(values, axis=0) > 0
        rows, first = np.flatnonzero(active), block.start
        top = [score.z.argmax(axis=1) for score in scores]
        crossed = [scores[1 - p].auroc[np.arange(len(active)), top[p]] for p in range(2)]
        auroc[first + rows] = np.mean(crossed, axis=0)[rows]
        same[first + rows] = (top[0] == top[1])[rows]
        agreed = rows[(top[0] == top[1])[rows]]
        chosen[first + agreed] = top[0][agreed]
        for p in range(2) if len(rows) else ():
            one, other = scores[p].auroc[rows], scores[1 - p].auroc[rows]
            place = one.argmax(axis=0)[None]
            found, held_out = (np.take_along_axis(values, place, axis=0)[0] for values in (one, other))
            better = found > best[p]
            best[p] = np.where(better, found, best[p])
            of_sets[p] = np.where(better, held_out, of_sets[p])
        if on_block is not None:
            on_block(block.stop - block.start)
    return SetScores(auroc, same, chosen, of_sets.mean(axis=0))
