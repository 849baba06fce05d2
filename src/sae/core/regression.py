"""Expression of every gene regressed on the activation of every feature, and on covariates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from scipy import linalg, sparse

from .differential import BLOCK_VALUES, Differential
from .groups import Groups
from .moments import GENES_PER_TASK, IMPRECISE, ROUNDING, Genes, dense_or_csr, summed, sums_at_a_time
from .partitions import Summing, Sums
from .rows import Matrix, as_csr, row_blocks
from .statistics import log2_fold_change
from .t_test import check_limits, from_t
from .workers import Workers, available_threads, in_order

SUM_VALUES = 150_000_000
"""Products (features × genes) summed at a time (1.2 GB); with more, the cells are read again for the next features."""
CLUSTER_SUM_VALUES = 36_000_000
"""The same on a cluster (0.3 GB), where a worker holds those of several tasks."""
COLLINEAR = 1e-7
"""A covariate of which the others leave no more than this share of its standard deviation is dropped (as in R's `lm`)."""
CONSTANT = 1e-12
"""A standard deviation below this share of the largest value is what rounding leaves of zero."""

_compiled: Any = njit(nogil=True, cache=True)


def regression(
    groups: Groups,
    x: Matrix,
    genes: Genes,
    covariates: np.ndarray,
    *,
    log_base: float | None,
    pseudocount: float,
    min_cells: int,
) -> Iterator[Differential]:
    r"""Fit x_g = α + β a_f + C γ + ε by least squares, for all features f and genes g, in blocks of features.

    With Q an orthonormal basis of the intercept and the covariates (rank r), and residuals ã = a − Q Qᵀa, x̃ = x − Q Qᵀx
    (Frisch and Waugh 1933, Lovell 1963),

    β = ãᵀx̃ / ãᵀã,  t = β √(ν ãᵀã / (x̃ᵀx̃ − β² ãᵀã)),  ν = n − r − 1,

    which needs Σ a x, Σ x², Qᵀx and Qᵀa alone: one pass over the cells for as many features as 1.2 GB of sums allow. The
    fold change is from the lowest activation a₀ (0, but for a feature that is active in all cells) to the mean ā⁺ of the
    active cells, at the mean of the covariates: from x̄ − β (ā − a₀) to x̄ + β (ā⁺ − ā), kept between 0 and the highest
    value of the gene. For a feature that is on or off, without covariates, these are the means of inactive and active cells.

    Parameters
    ----------
    groups
        Activations (n, h) ≥ 0, and in how many cells each feature is active.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    genes
        What :func:`scan` found.
    covariates
        (n, c), any c ≥ 0, in memory, beside a basis of the same size. Those that others explain change nothing.
    log_base, pseudocount
        For the fold change, see :func:`log2_fold_change`.
    min_cells
        Features that are active in fewer cells are left out.

    Yields
    ------
    Blocks of features in order; `score` is t. Nothing is tested (score 0, p and adjusted p NaN) where the gene or the
    feature is constant, or as good as explained by the covariates.
    """
    check_limits(min_cells, pseudocount)
    n, g = x.shape
    basis = orthonormal(covariates)
    if n - basis.shape[1] < 2:
        raise ValueError(
            f"{n} cells leave no degrees of freedom beside {basis.shape[1] - 1} independent covariates and the "
            "activation. Use fewer covariates (a categorical one counts once per category)."
        )
    features = np.flatnonzero(groups.n_active >= min_cells)
    block = max(1, BLOCK_VALUES // max(g, 1))
    n_held = max(1, sums_at_a_time(x, SUM_VALUES, CLUSTER_SUM_VALUES) // (block * max(g, 1))) * block
    for held in row_blocks(len(features), n_held):
        chosen = features[held]
        fit = _Fit(groups, chosen, x, genes, basis)

        def tested(part: slice, chosen: np.ndarray = chosen, fit: _Fit = fit) -> Differential:
            return fit.differential(chosen[part], part, log_base=log_base, pseudocount=pseudocount)

        yield from in_order(tested, row_blocks(len(chosen), block), available_threads())


def orthonormal(covariates: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis (n, r) of the intercept, which comes first, and some covariates (n, c).

    Covariates are centred, scaled to length 1 and dropped where a QR decomposition with pivoting finds them collinear.
    """
    n = len(covariates)
    centred = covariates - covariates.mean(axis=0)
    # Once more, for columns far from zero, whose mean is rounded.
    centred -= centred.mean(axis=0)
    length = np.linalg.norm(centred, axis=0)
    varying = length > CONSTANT * np.sqrt(n) * np.abs(covariates).max(axis=0)
    q, r, _ = linalg.qr(centred[:, varying] / length[varying], mode="economic", pivoting=True)
    rank = int((np.abs(np.diag(r)) > COLLINEAR).sum())
    return np.column_stack([np.full(n, n**-0.5), q[:, :rank]])


class _Fit:
    """Sums over the cells from which all slopes of some features follow.

    Parameters
    ----------
    groups, features
        Activations (n, h), and the f features of them that are measured.
    x
        Expression (n, g).
    genes
        What :func:`scan` found.
    basis
        (n, r) of :func:`orthonormal`.
    """

    def __init__(self, groups: Groups, features: np.ndarray, x: Matrix, genes: Genes, basis: np.ndarray):
        n, f = x.shape[0], len(features)
        self._genes, self._df = genes, n - basis.shape[1] - 1
        sums = cross_products(groups.a, basis, x, genes.shift, features)
        n_active, total = groups.n_active[features], sums.feature_totals
        self._mean, self._mean_active = total / n, total / n_active
        self._lowest = np.where(n_active < n, 0, sums.feature_lowest)
        self._products, on_basis = sums.products[:, :f], sums.products[:, f:]
        self._genes_on_basis = np.ascontiguousarray(on_basis.T)
        self._features_on_basis = sums.features_on_basis
        left = sums.feature_squares - (self._features_on_basis**2).sum(axis=1)
        self._square = np.where(left > sums.feature_squares / IMPRECISE**2, left, np.nan)
        left = sums.gene_squares - (on_basis**2).sum(axis=1)
        self._gene_square = np.where(genes.varies & (left > ROUNDING * sums.gene_squares), left, np.nan)
        self._least, self._highest = sums.gene_squares / IMPRECISE**2, sums.highest

    def differential(
        self, features: np.ndarray, part: slice, *, log_base: float | None, pseudocount: float
    ) -> Differential:
        """Test a part of the features."""
        product = self._products[:, part].T - self._features_on_basis[part] @ self._genes_on_basis
        square, gene_square = self._square[part, None], self._gene_square
        slope = product / square
        left = gene_square - slope * product
        exact = left <= ROUNDING * gene_square
        with np.errstate(divide="ignore", invalid="ignore"):
            t = product * np.sqrt(self._df / (square * np.where(exact, 0.0, left)))
        rise = np.where(np.isnan(t), 0.0, slope)
        ends = (self._genes.mean + rise * (a - self._mean)[part, None] for a in (self._mean_active, self._lowest))
        means = (np.clip(end, 0, self._highest) for end in ends)
        log2fc = log2_fold_change(*means, log_base=log_base, pseudocount=pseudocount)
        imprecise = int((~exact & (left < self._least)).sum())
        return from_t(features, t, self._df, log2fc, imprecise=imprecise)


@dataclass(frozen=True)
class CrossProducts:
    """Over all cells, expression less its shift; f features, g genes, a basis of r vectors."""

    products: np.ndarray
    """(g, f + r) of every gene with each feature and each basis vector."""
    gene_squares: np.ndarray
    highest: np.ndarray
    """(g,) value of each gene, or 0."""
    features_on_basis: np.ndarray
    """(f, r)"""
    feature_squares: np.ndarray
    feature_totals: np.ndarray
    feature_lowest: np.ndarray
    """(f,), of the cells where each is active."""


def cross_products(
    a: Matrix, basis: np.ndarray, x: Matrix, shift: np.ndarray, features: np.ndarray | None = None
) -> CrossProducts:
    """Read the cells once, with some of the features (by default all); every gene is added up by one thread, in their order."""
    features = np.arange(a.shape[1]) if features is None else features
    return CrossProducts(*summed(_Multiplying(shift, features, basis.shape[1]), x, a, basis))


@dataclass(frozen=True)
class _Multiplying(Summing):
    """What :class:`CrossProducts` consists of, of some features of all."""

    shift: np.ndarray
    features: np.ndarray
    r: int

    def start(self) -> Sums:
        g, f = len(self.shift), len(self.features)
        of_features = np.zeros((f, self.r)), np.zeros(f), np.zeros(f), np.full(f, np.inf)
        return np.zeros((g, f + self.r)), np.zeros(g), np.zeros(g), *of_features

    def add(self, sums: Sums, workers: Workers, *parts: Any) -> None:
        x, weights, basis = dense_or_csr(parts[0]), as_csr(parts[1])[:, self.features].astype(np.float64), parts[2]
        weights.data = np.maximum(weights.data, 0)
        weights.eliminate_zeros()
        _add_features(weights.indptr, weights.indices, weights.data, basis, *sums[3:])
        joined = sparse.hstack([weights, sparse.csr_matrix(basis)], format="csr")
        workers.each(_adder(x, joined, self.shift, *sums[:3]), range(0, len(self.shift), GENES_PER_TASK))

    def join(self, sums: Sums, more: Sums) -> None:
        sums[2][:] = np.maximum(sums[2], more[2])
        sums[6][:] = np.minimum(sums[6], more[6])
        for place in (0, 1, 3, 4, 5):
            sums[place][:] += more[place]


def _adder(
    part: Matrix, weights: sparse.csr_matrix, shift: np.ndarray, *sums: np.ndarray
) -> Callable[[int, int], None]:
    """Return what adds a chunk of cells to the products, squares and highest values of some genes."""
    g = len(shift)
    starts, columns = weights.indptr.astype(np.int64), weights.indices.astype(np.uint32)
    if sparse.issparse(part):
        by_gene = part.tocsc()
        x = by_gene.indptr, by_gene.indices, by_gene.data, shift

        def add(worker: int, low: int) -> None:
            high = min(low + GENES_PER_TASK, g)
            _add_sparse(low, high, *x, starts, columns, weights.data, *sums)
    else:
        values = np.ascontiguousarray((part - shift).T)

        def add(worker: int, low: int) -> None:
            high = min(low + GENES_PER_TASK, g)
            _add_dense(low, high, values, shift, starts, columns, weights.data, *sums)

    return add


@_compiled
def _add_features(indptr, indices, weights, basis, on_basis, squares, totals, lowest):
    for cell in range(basis.shape[0]):
        for e in range(indptr[cell], indptr[cell + 1]):
            feature, weight = indices[e], weights[e]
            for k in range(basis.shape[1]):
                on_basis[feature, k] += weight * basis[cell, k]
            squares[feature] += weight * weight
            totals[feature] += weight
            lowest[feature] = min(lowest[feature], weight)


@_compiled
def _add_sparse(low, high, indptr, indices, data, shift, starts, columns, weights, products, squares, highest):
    for gene in range(low, high):
        of_gene = products[gene]
        for e in range(indptr[gene], indptr[gene + 1]):
            highest[gene] = max(highest[gene], data[e])
            value = data[e] - shift[gene]
            squares[gene] += value * value
            cell = indices[e]
            for p in range(starts[cell], starts[cell + 1]):
                of_gene[columns[p]] += value * weights[p]


@_compiled
def _add_dense(low, high, values, shift, starts, columns, weights, products, squares, highest):
    for gene in range(low, high):
        of_gene = products[gene]
        for cell in range(values.shape[1]):
            value = values[gene, cell]
            highest[gene] = max(highest[gene], value + shift[gene])
            squares[gene] += value * value
            for p in range(starts[cell], starts[cell + 1]):
                of_gene[columns[p]] += value * weights[p]
