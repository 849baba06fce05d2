"""What steering does to a few cells, measured in the same way for a feature, for random features and for random directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .neighbours import Placed, Reference
from .steering import Decode, Steps, chunk_rows

SAME_FEATURE = 0.9
"""Features whose directions have a higher cosine are one and the same, found twice."""

SAME_VALUE = 1e-5
"""Values that differ by a smaller share differ by rounding, as do the effects of all directions in an orthogonal model."""


def alike_in_activity(n_active: float, pool: np.ndarray, cosine: np.ndarray, n: int) -> np.ndarray:
    """Choose the `n` features of a pool that are active in the most similar number of cells, by ratio.

    Parameters
    ----------
    n_active
        Cells in which the feature itself is active.
    pool
        (features,) cells in which each of the others is active; those without any are not chosen.
    cosine
        (features,) of their directions with that of the feature; above .9 a feature counts as the same, and is not chosen.
    """
    usable = np.flatnonzero((pool > 0) & (cosine <= SAME_FEATURE))
    distance = np.abs(np.log(pool[usable] / max(n_active, 1)))
    return np.sort(usable[np.argsort(distance, kind="stable")[:n]])


def random_directions(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n directions (n, d) of norm 1, uniform on the sphere."""
    drawn = rng.standard_normal((n, d))
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def set_auroc(change: np.ndarray, members: np.ndarray) -> float:
    """Tell how far the genes of a set rise above the others: AUROC of `members` (genes,) by `change` (genes,).

    Genes without a value (NaN) count on neither side.
    """
    from scipy import stats

    known = ~np.isnan(change)
    inside = members[known]
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if n_in == 0 or n_out == 0:
        return float("nan")
    ranks = stats.rankdata(change[known])
    return float((ranks[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


@dataclass(frozen=True)
class Sample:
    """Some of the cells that are steered, and where they are before.

    Attributes
    ----------
    at
        (m,) their positions among the steered cells, in rising order.
    cells, z
        Their positions (m,) in the data, and their latent (m, d).
    own
        (m,) their numbers among the reference cells, −1 for those that are not.
    before
        Their neighbours.
    """

    at: np.ndarray
    cells: np.ndarray
    z: np.ndarray
    own: np.ndarray
    before: Placed

    def place(self, steps: Sequence[Steps], reference: Reference) -> list[Placed]:
        """Find the neighbours of the cells after each of several steps."""
        moved = [np.flatnonzero(step.moved(self.at)) for step in steps]
        z = [self.z[some] + step.of(self.at[some]) for some, step in zip(moved, steps, strict=True)]
        rows = np.concatenate(moved)
        distance, shares = (np.stack([before] * len(steps)) for before in (self.before.distance, self.before.shares))
        if len(rows):
            which = np.repeat(np.arange(len(steps)), [len(some) for some in moved])
            after = reference.place(np.concatenate(z), self.own[rows])
            distance[which, rows], shares[which, rows] = after.distance, after.shares
        return [Placed(*one) for one in zip(distance, shares, strict=True)]

    def select(self, few: np.ndarray) -> Sample:
        """Keep some of the cells."""
        before = Placed(self.before.distance[few], self.before.shares[few])
        return Sample(self.at[few], self.cells[few], self.z[few], self.own[few], before)


@dataclass(frozen=True)
class Measures:
    """What is measured of a step that some cells take.

    Attributes
    ----------
    sample, reference
        The cells, and those that they are placed among.
    base
        Their expression (m, genes) without a step, of each modality.
    sets
        (sets, genes) boolean, members among the genes of the modality `of`.
    """

    sample: Sample
    reference: Reference
    base: Sequence[np.ndarray]
    sets: np.ndarray
    of: int
    decode: Decode

    def of_steps(self, steps: Sequence[Steps]) -> np.ndarray:
        """Measure each step: effect size, distance to the neighbours, change of their labels, AUROC of the sets (steps, measures)."""
        placed = self.sample.place(steps, self.reference)
        found = []
        for number, changes in enumerate(self._mean_changes(steps)):
            labels = (placed[number].shares - self.sample.before.shares).mean(axis=0)
            sets = [set_auroc(changes[self.of], members) for members in self.sets]
            found.append([effect_size(changes), placed[number].distance.mean(), *labels, *sets])
        return np.array(found, dtype=np.float64)

    def _mean_changes(self, steps: Sequence[Steps]) -> Iterator[list[np.ndarray]]:
        """Yield the mean change of each gene (genes,) in each modality, after each step; several are decoded together."""
        sample = self.sample
        at_once = max(1, chunk_rows([values.shape[1] for values in self.base]) // len(sample.at))
        for first in range(0, len(steps), at_once):
            block = steps[first : first + at_once]
            moved = [np.flatnonzero(step.moved(sample.at)) for step in block]
            rows = np.concatenate(moved)
            if len(rows) == 0:
                yield from ([np.zeros(values.shape[1]) for values in self.base] for _ in block)
                continue
            along = np.concatenate([step.of(sample.at[some]) for some, step in zip(moved, block, strict=True)])
            after = self.decode(sample.cells[rows], sample.z[rows], along)
            ends = np.cumsum([len(some) for some in moved])
            for some, end in zip(moved, ends, strict=True):
                yield [
                    (other[end - len(some) : end] - one[some]).sum(axis=0, dtype=np.float64) / len(sample.at)
                    for one, other in zip(self.base, after, strict=True)
                ]


def effect_size(changes: Sequence[np.ndarray]) -> float:
    """Root mean square over genes of how much they change, those without a prediction (NaN) left out."""
    return float(np.sqrt(np.nanmean(np.square(np.concatenate(changes)))))


def exceeds(value: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of `others` (controls, measures) that `value` (measures,) is above by more than rounding; NaN for NaN."""
    share = (value - others > SAME_VALUE * np.maximum(np.abs(value), np.abs(others))).mean(axis=0)
    return np.where(np.isnan(value) | np.isnan(others).any(axis=0), np.nan, share)


def few_of_each(codes: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Draw up to `most` cells of each group, in rising order."""
    order = np.lexsort((rng.random(len(codes)), codes))
    sizes = np.bincount(codes)
    place = np.arange(len(codes)) - (np.cumsum(sizes) - sizes)[codes[order]]
    return np.sort(order[place < most])
