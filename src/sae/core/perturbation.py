"""How features respond to a perturbation, and where its target stands among the genes of the features that do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from .groups import active_groups
from .moments import ROUNDING, chunks
from .null import empirical_fdr
from .rows import Matrix, select_rows
from .wilcoxon import wilcoxon

N_ALIKE = 50
"""Features of like activity that a responding feature is compared with."""
N_DRAWS = 10_000


@dataclass(frozen=True)
class Response:
    """How features differ between perturbed and control cells; all arrays (tested features,).

    Attributes
    ----------
    features
        Those that are tested.
    difference
        Mean activation of perturbed less that of control cells.
    active, control_active
        Share of perturbed, and of control cells, where the feature is above zero.
    auroc, score, pval
        Of the rank-sum test; the score is z, positive where perturbed cells have more.
    fdr
        From the same tests with permuted labels, by :func:`.null.empirical_fdr` of abs(z).
    n_permuted
        Mean number of features that reach, with permuted labels, the lowest abs(z) of those with a low enough `fdr`.
    pval_any
        Share of permutations, the real labels included, with a largest abs(z) as high as that of the real labels; NaN where
        no feature is tested.
    """

    features: np.ndarray
    difference: np.ndarray
    active: np.ndarray
    control_active: np.ndarray
    auroc: np.ndarray
    score: np.ndarray
    pval: np.ndarray
    fdr: np.ndarray
    n_permuted: float
    pval_any: float


def comparable(perturbed: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Mark the cells (n,) of strata that have both perturbed and control cells."""
    size = np.bincount(strata)
    n_perturbed = np.bincount(strata, weights=perturbed, minlength=len(size))
    return ((n_perturbed > 0) & (n_perturbed < size))[strata]


def respond(
    a: sparse.csr_matrix,
    perturbed: np.ndarray,
    strata: np.ndarray,
    n_permutations: int,
    rng: np.random.Generator,
    *,
    min_cells: int,
    max_fdr: float,
) -> Response:
    """Compare perturbed with control cells in every feature, and again with labels permuted within strata.

    Means are within strata b, averaged with the weights n_1b n_0b / (n_1b + n_0b); the test is that of
    :func:`.wilcoxon.wilcoxon`, which ranks the cells in a feature once for all permutations.

    Parameters
    ----------
    a
        Activations (n, h) ≥ 0 of the compared cells.
    perturbed
        (n,) whether each is perturbed.
    strata
        (n,), codes; see :func:`comparable`.
    n_permutations
        B.
    min_cells
        Features that are active in fewer of the cells are not tested, nor those that are constant within strata.
    max_fdr
        For `n_permuted`.
    """
    tested = np.flatnonzero((a > 0).getnnz(axis=0) >= min_cells)
    x = a[:, tested]
    real_labels = sparse.csc_matrix(perturbed[:, None])
    labels = sparse.hstack([real_labels, permuted_labels(perturbed, strata, n_permutations, rng)], format="csr")
    found = list(wilcoxon(active_groups(labels), x, strata, min_cells=1))
    kept = np.isfinite(found[0].pval[0])
    x, score = x[:, kept], np.concatenate([block.score[:, kept] for block in found])
    real, *permuted = np.abs(score)
    fdr = empirical_fdr(real, real, np.concatenate(permuted), n_permutations)
    least = real[fdr <= max_fdr].min(initial=np.inf)
    inside, outside = _stratified_means(x, perturbed, strata)
    strongest = np.abs(score).max(axis=1, initial=0)
    return Response(
        tested[kept],
        inside - outside,
        *_stratified_means(x > 0, perturbed, strata),
        found[0].auroc[0, kept],
        score[0],
        found[0].pval[0, kept],
        fdr,
        float((np.array(permuted) >= least).sum() / n_permutations),
        float((strongest >= strongest[0]).mean()) if kept.any() else np.nan,
    )


def permuted_labels(
    perturbed: np.ndarray, strata: np.ndarray, n_permutations: int, rng: np.random.Generator
) -> sparse.csc_matrix:
    """Draw as many cells as are perturbed from each stratum at random: (n, permutations), true for those drawn."""
    cells = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    drawn = [
        some[rng.choice(len(some), perturbed[some].sum(), replace=False, shuffle=False)]
        for _ in range(n_permutations)
        for some in cells
    ]
    starts = np.arange(n_permutations + 1) * perturbed.sum()
    rows = np.concatenate(drawn)
    return sparse.csc_matrix((np.ones(len(rows), bool), rows, starts), shape=(len(perturbed), n_permutations))


def _stratified_means(x: sparse.csr_matrix, perturbed: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of all columns over perturbed and over control cells, averaged over strata."""
    groups, n_groups = 2 * strata + perturbed, 2 * (strata.max() + 1)
    n = np.bincount(groups, minlength=n_groups).reshape(-1, 2)
    means = (_indicator(groups, n_groups) @ x.astype(np.float64)).toarray() / np.maximum(n.ravel(), 1)[:, None]
    weights = n.prod(axis=1) / np.maximum(n.sum(axis=1), 1)
    weights = weights / weights.sum()
    return weights @ means[1::2], weights @ means[0::2]


def _indicator(groups: np.ndarray, n_groups: int) -> sparse.csr_matrix:
    """Mark the cells of each group (groups, n); those with a negative one are in none."""
    cells = np.flatnonzero(groups >= 0)
    return sparse.csr_matrix((np.ones(len(cells)), (groups[cells], cells)), shape=(n_groups, len(groups)))


@dataclass(frozen=True)
class Sums:
    """What the correlations of features and genes within strata follow from; sums over some cells.

    Attributes
    ----------
    n
        Cells (s,) of each stratum.
    a, x
        Activation (s, f) and expression (s, g).
    aa, xx, ax
        Squares (f,) and (g,), and products (f, g), over all strata.
    """

    n: np.ndarray
    a: np.ndarray
    x: np.ndarray
    aa: np.ndarray
    xx: np.ndarray
    ax: np.ndarray

    def of(self, features: np.ndarray) -> Sums:
        """Keep some of the features."""
        return replace(self, a=self.a[:, features], aa=self.aa[features], ax=self.ax[features])

    def without(self, some: Sums) -> Sums:
        """Leave out the cells of other sums."""
        return Sums(**{name: value - getattr(some, name) for name, value in vars(self).items()})

    def correlation(self) -> np.ndarray:
        """Pearson's r (f, g) of residuals from the means of strata; 0 for a constant feature, NaN for a constant gene."""
        aa, xx = _about_means(self.aa, self.a, self.n), _about_means(self.xx, self.x, self.n)
        r = self.ax - self.a.T @ (self.x / np.maximum(self.n, 1)[:, None])
        r /= np.sqrt(np.where(aa > 0, aa, np.inf))[:, None]
        r /= np.sqrt(np.where(xx > 0, xx, np.nan))
        return r


def _about_means(squares: np.ndarray, total: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Sum of squares (columns,) about the means of strata; exactly 0 where rounding leaves something of it."""
    left = squares - (total**2 / np.maximum(n, 1)[:, None]).sum(axis=0)
    return np.where(left > ROUNDING * squares, left, 0)


def sums(a: sparse.csr_matrix, x: Matrix, strata: np.ndarray, n_strata: int) -> Sums:
    """Sum activations (n, f) and expression (n, g), dense or sparse, in memory or read by rows, over the cells."""
    f, g = a.shape[1], x.shape[1]
    found = Sums(
        np.bincount(strata, minlength=n_strata).astype(np.float64),
        *(np.zeros(shape) for shape in ((n_strata, f), (n_strata, g), f, g, (f, g))),
    )
    for rows, part in chunks(x):
        values, expressed = a[rows].astype(np.float64), part.astype(np.float64)
        members = _indicator(strata[rows], n_strata)
        for total, more in (
            (found.a, members @ values),
            (found.x, members @ expressed),
            (found.aa, values.multiply(values).sum(axis=0)),
            (found.xx, expressed.multiply(expressed).sum(axis=0) if sparse.issparse(part) else (expressed**2).sum(0)),
            (found.ax, values.T @ expressed),
        ):
            total += more.toarray() if sparse.issparse(more) else np.asarray(more).reshape(total.shape)
    return found


def places(r: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place some genes among all by abs(r), for each feature.

    Parameters
    ----------
    r
        (f, g), NaN for a gene that has no place.
    genes
        Positions (t,).

    Returns
    -------
    Ranks (f, t), 1 for the largest abs(r), and percentiles (f, t), the share of the other genes that have a smaller one; ties
    count half.
    """
    size = np.abs(r)
    chosen = size[:, genes]
    higher = np.stack([(size > one[:, None]).sum(axis=1) for one in chosen.T], axis=1)
    not_lower = np.stack([(size >= one[:, None]).sum(axis=1) for one in chosen.T], axis=1)
    n = int(np.count_nonzero(~np.isnan(r[0])))
    rank = np.where(np.isnan(chosen), np.nan, (higher + not_lower + 1) / 2)
    return rank, (n - rank) / max(n - 1, 1)


def group_means(x: Matrix, codes: np.ndarray, n_groups: int, columns: np.ndarray) -> np.ndarray:
    """Means of some columns of `x` (n, g) over the rows with each code (n,); rows with a negative one do not count."""
    total = np.zeros((n_groups, len(columns)))
    for rows, part in chunks(x):
        more = _indicator(codes[rows], n_groups) @ part[:, columns].astype(np.float64)
        total += more.toarray() if sparse.issparse(more) else more
    with np.errstate(invalid="ignore"):
        return total / np.bincount(codes[codes >= 0], minlength=n_groups)[:, None]


@dataclass(frozen=True)
class Placed:
    """Where the targets of m perturbations stand among the genes of a feature that responds; −1 and NaN without a place.

    Attributes
    ----------
    feature
        (m,), the feature.
    gene
        (m,), of several targets the one that stands highest, by position.
    correlation, rank, percentile
        (m,), of that gene.
    pval
        (m,), against its percentile for features of like activity.
    expected
        Mean percentile for these.
    pval_random, pval_exchanged
        Of the mean percentile, against them, and against targets exchanged between perturbations.
    """

    feature: np.ndarray
    gene: np.ndarray
    correlation: np.ndarray
    rank: np.ndarray
    percentile: np.ndarray
    pval: np.ndarray
    expected: float
    pval_random: float
    pval_exchanged: float


def place_targets(
    a: sparse.csr_matrix,
    x: Matrix,
    strata: np.ndarray,
    own: Sequence[np.ndarray],
    genes: Sequence[np.ndarray],
    strength: np.ndarray,
    rng: np.random.Generator,
    *,
    min_cells: int,
) -> Placed:
    """Place the targets of m ≥ 1 perturbations among all genes, by abs(r) with the strongest feature that responds.

    r is that of :meth:`Sums.correlation` over all cells but those that have the perturbation. Only features that are active
    in enough of these cells, for all perturbations, take part.

    Parameters
    ----------
    a, x, strata
        Activations (n, h), expression (n, g) and stratum (n,) of the same cells.
    own
        The cells that are left out, for each perturbation.
    genes
        Positions of the targets of each.
    strength
        (m, h), above 0 where a feature responds.
    min_cells
        Enough.
    """
    m, n_strata = len(own), int(strata.max()) + 1
    n_active = (a > 0).getnnz(axis=0)
    enough = np.all([n_active - (a[out] > 0).getnnz(axis=0) >= min_cells for out in own], axis=0)
    strength = np.where(enough, strength, 0)
    responding = np.flatnonzero(strength.any(axis=1))
    best = strength[responding].argmax(axis=1)
    alike = {feature: _nearest(np.where(enough, n_active, 0), feature) for feature in np.unique(best).tolist()}
    kept = np.unique(np.concatenate([best, *alike.values()]).astype(np.int64))
    a = a[:, kept]
    whole = sums(a, x, strata, n_strata)
    feature, gene, found = np.full(m, -1), np.full(m, -1), np.full((4, m), np.nan)
    feature[responding] = best
    percentile = np.full((len(kept), m), np.nan)
    for i in responding.tolist():
        # Those that are exchanged, and those like the one that responds.
        compared = np.unique(np.searchsorted(kept, [*best, *alike[feature[i]]]))
        some = sums(a[own[i]][:, compared], select_rows(x, own[i]), strata[own[i]], n_strata)
        r = whole.of(compared).without(some).correlation()
        known = genes[i][~np.isnan(r[0, genes[i]])]
        if len(known):
            rank, share = places(r, known)
            row = np.searchsorted(kept[compared], feature[i])
            first = share[row].argmax()
            gene[i], percentile[compared, i] = known[first], share.max(axis=1)
            found[:3, i] = r[row, known[first]], rank[row, first], share[row, first]
    placed = np.flatnonzero(gene >= 0)
    rows = np.searchsorted(kept, feature[placed])
    others = {row: np.searchsorted(kept, alike[kept[row]]) for row in np.unique(rows).tolist()}
    found[3, placed], *overall = compare_places(percentile[:, placed], rows, others, rng)
    return Placed(feature, gene, *found, *overall)


def _nearest(n_active: np.ndarray, feature: int) -> np.ndarray:
    """Return the 50 features whose rank by active cells is nearest, or as many as there are that are active at all."""
    order = np.argsort(n_active, kind="stable")
    order = order[n_active[order] > 0]
    apart = np.abs(np.arange(len(order)) - np.flatnonzero(order == feature)[0])
    return order[np.argsort(apart, kind="stable")[1 : N_ALIKE + 1]]


def compare_places(
    percentile: np.ndarray, rows: np.ndarray, alike: Mapping[int, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, float, float, float]:
    """Test whether chosen rows stand higher than others that are like them, for each of m columns and for all together.

    With n rows like the chosen one, of which k stand at least as high, p = (k + 1) / (n + 1). For all columns together, the
    mean is compared with those of 10,000 draws: each chosen row is replaced by a random one that is like it, or by itself, in
    all columns that share it; or the rows are exchanged between columns. Then p = (draws at least as high + 1) / (draws + 1).

    Parameters
    ----------
    percentile
        (r, m)
    rows
        (m,), those that are chosen.
    alike
        Rows that are like each of these.

    Returns
    -------
    p of each column (m,), the mean of the draws, and p of the mean in both ways; NaN without any column.
    """
    m = np.arange(len(rows))
    if len(m) == 0:
        return np.empty(0), np.nan, np.nan, np.nan
    found = percentile[rows, m]
    pval = [(1 + (percentile[alike[row], i] >= found[i]).sum()) / (1 + len(alike[row])) for i, row in enumerate(rows)]
    drawn = {row: rng.choice(np.append(others, row), N_DRAWS) for row, others in alike.items()}
    random = percentile[np.stack([drawn[row] for row in rows.tolist()], axis=1), m].mean(axis=1)
    exchanged = percentile[rows, rng.permuted(np.tile(m, (N_DRAWS, 1)), axis=1)].mean(axis=1)
    # Sums of the same numbers in another order differ by rounding.
    least = found.mean() * (1 - 1e-12)
    shares = [float((1 + (means >= least).sum()) / (1 + N_DRAWS)) for means in (random, exchanged)]
    return np.array(pval), float(random.mean()), shares[0], shares[1]
