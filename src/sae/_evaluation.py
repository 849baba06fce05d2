"""What `tl.evaluate` compares: the cells, and the columns of the SAE and of every baseline."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from . import _schema
from ._data import Data, Holder
from ._design import codes as donor_codes
from ._expression import Expression, expression
from ._prediction import Prediction, predicted
from .core.rows import Matrix, dense_rows, row_blocks, select_rows, take_rows

if TYPE_CHECKING:
    from .core.attribution import Logits, Probes

BASELINES = (
    "representation", "pca", "fastica", "nmf", "genes", "random_directions", "random_rectified", "frozen_decoder",
    "l1_genes", "l1_latent", "input_x_gradient", "integrated_gradients",
)  # fmt: skip
OF_GENES = ("nmf", "genes", "l1_genes")
PROBED_GENES = 2_000
BLOCK_VALUES = 8_000_000
"""Predicted values and random directions held at a time (64 MB)."""
FEWEST_DONORS = 20
"""Below, too few intervals cover: in simulations, of nominal 95 % about 75 % with three to ten donors."""


@dataclass(frozen=True)
class Cells:
    """The cells that everything is compared on, how they are divided, and how they are drawn again.

    Attributes
    ----------
    rows
        Their positions in the holder, in rising order.
    codes, labels
        (n,) the label of each; one label for all without a column of labels.
    halves
        (splits, n) of 0 and 1.
    weights
        (1 + resamples, n), how often each counts.
    """

    rows: np.ndarray
    codes: np.ndarray
    labels: pd.Index
    halves: np.ndarray
    weights: np.ndarray

    @classmethod
    def drawn(
        cls,
        held: Holder,
        known: np.ndarray,
        labels: pd.Categorical | None,
        donor: str | None,
        n_cells: int,
        n_splits: int,
        n_bootstrap: int,
        rng: np.random.Generator,
    ) -> Cells:
        """Draw up to `n_cells` of the `known` cells, as evenly from all labels as possible; divide and resample them."""
        from .core.bootstrap import donor_resamples, resamples
        from .core.controls import few_of_each
        from .core.labels import donor_halves, stratified_halves

        donors = None if donor is None else donor_codes(held, donor, known, "donor", least=2)
        codes = np.zeros(len(known), dtype=np.int64) if labels is None else labels.codes.astype(np.int64)
        some = few_of_each(codes, even_share(np.bincount(codes), n_cells), rng)
        rows, codes = known[some], codes[some]
        if donors is None:
            halves, weights = stratified_halves(codes, n_splits, rng), resamples(codes, n_bootstrap, rng)
        else:
            donors = pd.factorize(donors[some])[0]
            _check_donors(int(donors.max()) + 1, len(rows), donor)
            halves = donor_halves(codes, donors, n_splits, rng)
            weights = donor_resamples(donors, n_bootstrap, rng)
        return cls(rows, codes, pd.Index(["all"]) if labels is None else labels.categories.astype(str), halves, weights)

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.labels)


def even_share(sizes: np.ndarray, n: int) -> int:
    """Find the largest number of cells per group with which there are `n` at most; at least one."""
    return max(1, bisect_right(range(1, int(sizes.max()) + 1), n, key=lambda most: np.minimum(sizes, most).sum()))


def _check_donors(n: int, n_cells: int, donor: str | None) -> None:
    from scanpy import logging as logg

    if n < 2:
        raise ValueError(
            f"The {n_cells} cells that are compared are of one {donor!r} only; donor= needs 2. Raise n_cells=."
        )
    if n < FEWEST_DONORS:
        logg.warning(f"there are {n} donors: intervals from fewer than {FEWEST_DONORS} are too narrow.")


def drawn_unseen(everyone: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Draw up to `n` cells without a look at labels, in rising order."""
    return np.sort(np.random.default_rng(seed).choice(everyone, min(n, len(everyone)), replace=False))


@dataclass(frozen=True)
class Genes:
    """Expression of the compared cells (n, g), in memory; `of` are the rows of the holder that there is expression for."""

    matrix: Matrix
    found: Expression
    of: np.ndarray

    @classmethod
    def at(cls, rows: np.ndarray, found: Expression, of: np.ndarray) -> Genes:
        """Bring the expression of some rows of the holder into memory."""
        order = np.argsort(of)
        positions = order[np.searchsorted(of, rows, sorter=order)]
        return cls(take_rows(select_rows(found.matrix, positions), slice(None)), found, of)

    def of_others(self, rows: np.ndarray) -> Matrix:
        """Bring that of other rows into memory."""
        return Genes.at(rows, self.found, self.of).matrix


def read_expression(
    data: Data, held: Holder, layer: str | None, var_mod: str | None, *, needed: bool
) -> tuple[Expression, np.ndarray] | None:
    """Read expression, and the rows of the holder that it is of; None with a remark where it is not needed and there is none."""
    from scanpy import logging as logg

    try:
        found, selected = expression(data, held, layer=layer, var_mod=var_mod)
    except (KeyError, TypeError, ValueError) as error:
        if needed:
            raise
        logg.warning(f"baselines of genes are left out: {error}")
        return None
    return found, np.arange(held.data.n_obs)[selected]


@dataclass(frozen=True)
class Dictionary:
    """An SAE, of the compared cells: activations (n, h), reconstruction (n, d) and directions (h, d) in the training space."""

    a: sparse.csr_matrix
    x_hat: np.ndarray
    directions: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """Features that are active in some of the cells."""
        return np.flatnonzero(self.a.getnnz(axis=0))


def trained(stored: Mapping[str, Any], a: sparse.csr_matrix) -> Dictionary:
    """Return the stored SAE, from its activations (n, h)."""
    model = _schema.model(stored)
    return Dictionary(a, a @ model.W_dec + model.b_dec, _schema.directions(stored))


def frozen(stored: Mapping[str, Any], x: Matrix, rows: np.ndarray, seed: int, where: str) -> Dictionary | None:
    """Train the SAE again on all cells `x` with a decoder that stays as it is drawn, and encode some; None if it cannot be."""
    from scanpy import logging as logg

    from .core.fitting import fit, options_of, plan

    options = replace(options_of(stored["params"]), frozen_decoder=True)
    try:
        fitted = fit(plan(x, options, seed, where=where))
    except (FloatingPointError, ValueError) as error:
        # Cells that an SAE of others has encoded may be too few to train on.
        logg.warning(f"the baseline 'frozen_decoder' is left out: {error}")
        return None
    if fitted.params["ended"] == "interrupted":
        raise KeyboardInterrupt
    model = fitted.autoencoder
    a = model.encode(select_rows(x, rows)).activations
    return Dictionary(a, a @ model.W_dec + model.b_dec, fitted.directions)


@dataclass(frozen=True)
class Compared:
    """Everything that scores are computed from.

    Attributes
    ----------
    x
        Representation of the cells (n, d).
    seen, x_seen
        Rows of the holder that PCA, ICA and NMF are fitted on, drawn without a look at labels, and their representation.
    learned, fixed
        The SAE, and that with a frozen decoder, or None.
    genes
        Expression of the cells, or None.
    factors
        From the representation to the space of training, as stored.
    """

    cells: Cells
    x: np.ndarray
    seen: np.ndarray
    x_seen: np.ndarray
    learned: Dictionary
    fixed: Dictionary | None
    genes: Genes | None
    factors: Any
    seed: int

    def scaled(self, x: np.ndarray) -> np.ndarray:
        """Map rows (n, d) to the space that the SAE was trained in, up to a shift and one factor."""
        x = x.astype(np.float64)
        if self.factors is None:
            return x
        factors = np.asarray(self.factors, dtype=np.float64)
        return x * factors if factors.ndim == 1 else x @ factors


@dataclass(frozen=True)
class Source:
    """Columns among which the best one of a label or gene set is chosen; `own` is the gene that each is."""

    name: str
    columns: Matrix
    own: np.ndarray | None = None


def unsupervised(wanted: Sequence[str], of: Compared) -> Iterator[Source]:
    """Make the columns of every baseline that sees no label, one after another."""
    from scanpy import logging as logg

    from .core.baselines import (
        MOST_COMPONENTS,
        N_FACTORS,
        both_signs,
        independent_components,
        nonnegative_factors,
        rectified,
    )
    from .core.fidelity import components

    def remarked(found: tuple[np.ndarray, str]) -> np.ndarray:
        if found[1]:
            logg.warning(f"{found[1]}: longer runs of this baseline might score higher.")
        return found[0]

    x, x_seen, a, genes, fixed = of.x, of.x_seen, of.learned.a, of.genes, of.fixed
    (n, d), n_active = x_seen.shape, a.getnnz(axis=0)
    makers: dict[str, Callable[[], Matrix]] = {
        "representation": lambda: both_signs(x),
        "pca": lambda: both_signs(components(x_seen, x, min(d, n - 1, MOST_COMPONENTS), of.seed)[0]),
        "fastica": lambda: both_signs(remarked(independent_components(x_seen, x, of.seed))),
        "random_directions": lambda: _projected(of),
        "random_rectified": lambda: rectified(_projected(of), n_active),
    }
    if fixed is not None:
        makers["frozen_decoder"] = lambda: fixed.a
    if genes is not None:
        makers["genes"] = lambda: genes.matrix
        makers["nmf"] = lambda: remarked(
            nonnegative_factors(genes.of_others(of.seen), genes.matrix, min(d, N_FACTORS), of.seed)
        )
        summary, reason = genes.found.summary, ""
        if summary.lowest.min(initial=0) < 0:
            reason = "has negative values, which have no nonnegative factors. Pass layer= with log-normalised values."
        elif not summary.varies.any():
            reason = "has no gene that varies."
        if "nmf" in wanted and reason:
            del makers["nmf"]
            logg.warning(f"the baseline 'nmf' is left out: {genes.found.where} {reason}")
    for name in wanted:
        if name in makers:
            own = np.arange(genes.matrix.shape[1]) if genes is not None and name == "genes" else None
            yield Source(name, makers[name](), own)


def _projected(of: Compared) -> np.ndarray:
    """Project the cells on as many random directions of the space of training as the SAE has features (n, h)."""
    from .core.controls import random_directions

    y = of.scaled(of.x)
    y -= y.mean(axis=0)
    (n, d), h, rng = y.shape, of.learned.a.shape[1], np.random.default_rng(of.seed)
    projected = np.empty((n, h), dtype=np.float32)
    for block in row_blocks(h, max(1, BLOCK_VALUES // d)):
        projected[:, block] = y @ random_directions(block.stop - block.start, d, rng).T
    return projected


def floating_rows(x: Matrix, rows: np.ndarray) -> np.ndarray:
    """Return some rows of a representation as a dense array of floats, in one order in memory: sums depend on it."""
    part = dense_rows(select_rows(x, rows), slice(None))
    return np.ascontiguousarray(part, dtype=np.result_type(part.dtype, np.float32))


def _most_variable(blocks: Iterable[np.ndarray], n: int) -> np.ndarray:
    """Find the genes of the highest variance among those with a prediction for all cells, which come in blocks."""
    n_cells, total, squares, shift = 0, 0.0, 0.0, None
    with np.errstate(invalid="ignore", over="ignore"):
        for block in blocks:
            shift = block[0].astype(np.float64) if shift is None else shift
            values = block - shift
            n_cells, total, squares = (
                n_cells + len(block),
                total + values.sum(axis=0),
                squares + np.square(values).sum(axis=0),
            )
        variance = np.asarray(squares / n_cells - np.square(total / n_cells))
    known = np.flatnonzero(np.isfinite(variance))
    return np.sort(known[np.argsort(-variance[known], kind="stable")[:n]])


class Attributed:
    """Probes of the labels on what a model predicts for the compared cells, and their logits at any latent."""

    def __init__(self, model: object, held: Holder, latent: Matrix, cells: Cells, var_mod: str | None):
        from .core.attribution import Probes

        self.z = floating_rows(latent, cells.rows).astype(np.float32)
        self._data, self._rows = held.data, cells.rows
        self._found: Prediction = predicted(model, latent, held.data, var_mod)
        size = max(1, BLOCK_VALUES // max(self._found.shape[1], 1))
        self._blocks = [(block, held.data[cells.rows[block]]) for block in row_blocks(len(cells.rows), size)]
        # Decoded twice rather than held for all genes.
        self._known = _most_variable((self._decode(self.z[block], of) for block, of in self._blocks), PROBED_GENES)
        if len(self._known) == 0:
            raise ValueError(
                f"{self._found.decoder.where} has no gene with a finite value for all of the {len(self.z)} cells. Leave model= out, or "
                "pass a model that predicts expression for them."
            )
        before = np.concatenate([self._decode(self.z[block], of)[:, self._known] for block, of in self._blocks])
        self.probes: Probes = Probes.fit(before, cells.codes, cells.n_labels, cells.halves)
        self.logits_before = self.probes.logits(before)

    def logits(self, few: int | None = None) -> Logits:
        """Return the function from the latent of all cells, or of the `few` ones that `spread` gives, to logits."""
        blocks = self._blocks
        if few is not None:
            rows = self.spread(few)
            blocks = [(slice(0, len(rows)), self._data[self._rows[rows]])]

        def of(z: np.ndarray) -> np.ndarray:
            z = np.asarray(z, dtype=np.float32)
            return np.concatenate(
                [self.probes.logits(self._decode(z[rows], part)[:, self._known]) for rows, part in blocks]
            )

        return of

    def spread(self, few: int) -> np.ndarray:
        """Return up to so many cells, evenly spaced."""
        return np.unique(np.linspace(0, len(self.z) - 1, few).astype(np.int64))

    def _decode(self, z: np.ndarray, cells: Any) -> np.ndarray:
        return self._found.decoder.decode(z, cells)[self._found.number]
