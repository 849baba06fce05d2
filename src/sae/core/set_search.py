"""Gene sets of all features, block by block, with what random sets of the same size and expression would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy import sparse

from .differential import compare, measured_groups
from .groups import Groups
from .moments import Block, Genes
from .null import empirical_fdr
from .rows import Matrix
from .set_methods import (
    DIRECTIONS,
    SetTests,
    StandingOut,
    by_aucell,
    by_gsea,
    by_over_representation,
    by_ranks,
    by_scfeaturelens,
    by_ulm,
)
from .statistics import benjamini_hochberg
from .workers import available_threads, in_order

BLOCK_VALUES = 2_000_000
"""Features × gene sets that a thread works on at a time; about ten float64 arrays of this size are alive at once (0.16 GB)."""

_compiled = njit(nogil=True, cache=True)


@dataclass(frozen=True)
class Method:
    """How genes are compared, and sets tested."""

    name: str
    standing: StandingOut
    directions: Sequence[str]
    log_base: float | None
    pseudocount: float
    min_cells: int
    min_expected: float
    seed: int

    def tests(
        self, measured: Block, genes: Genes, counted: np.ndarray | slice, sets: sparse.csr_matrix
    ) -> list[SetTests]:
        """Test sets for a block of features, by direction."""
        positive, reference = (group.of_genes(counted) for group in measured.moments())
        if self.name == "scfeaturelens":
            return by_scfeaturelens(positive, reference, sets)
        block = compare(
            measured.features,
            positive,
            reference,
            genes.of(counted),
            log_base=self.log_base,
            pseudocount=self.pseudocount,
            min_expected=self.min_expected,
        )
        if self.name == "ora":
            return by_over_representation(block, sets, self.standing, self.directions)
        if self.name == "gsea":
            return by_gsea(block, sets, self.standing, self.seed)
        return {"mannwhitney": by_ranks, "ulm": by_ulm, "aucell": by_aucell}[self.name](block, sets, self.standing)


@dataclass(frozen=True)
class Found:
    """What a block of features gives."""

    n_features: int
    annotated: np.ndarray
    """(1 + random,), features with a gene set, of the real and of each random collection."""
    log_pval: np.ndarray
    """Of all real tests with p < 1, flat."""
    n_tests: int
    rows: dict[str, np.ndarray]
    """The best sets of each feature and direction: columns of a table, with `hits`, the genes of a set that stand out, those
    that do most first, in one list for all rows, and `n_hits`, how many each row has."""


def search(
    groups: Groups,
    x: Matrix,
    genes: Genes,
    counted: np.ndarray,
    collections: Sequence[sparse.csr_matrix],
    method: Method,
    *,
    n_stored: int | None,
) -> Iterator[Found]:
    """Test gene sets for the features of `groups` that have enough cells, for blocks of features.

    Parameters
    ----------
    groups
        Of h features among n cells.
    x
        Expression (n, g), dense or sparse, in memory or read by rows.
    genes
        What :func:`sae.core.moments.scan` tells of `x`.
    counted
        (g,), the genes that take part; all of them vary.
    collections
        (sets, genes that take part), stored for a member: its weight. The first are the real sets, the others random ones.
    method
        How.
    n_stored
        Sets in `rows` for each feature and direction, 0 for none, None for all.
    """
    places = slice(None) if counted.all() else np.flatnonzero(counted)
    stacked = sparse.vstack(collections, format="csr")
    n_sets = collections[0].shape[0]

    def found(measured: Block) -> Found:
        return _digest(
            measured.features, method.tests(measured, genes, places, stacked), n_sets, method, stacked, n_stored
        )

    # decoupler starts threads of its own.
    threads = 1 if method.name in ("ulm", "gsea", "aucell") else available_threads()
    most = max(1, BLOCK_VALUES // stacked.shape[0])
    yield from in_order(found, measured_groups(groups, x, genes, method.min_cells, most=most), threads)


def _digest(
    features: np.ndarray,
    tests: list[SetTests],
    n_sets: int,
    method: Method,
    sets: sparse.csr_matrix,
    n_stored: int | None,
) -> Found:
    collections = [slice(low, low + n_sets) for low in range(0, sets.shape[0], n_sets)]
    padj = [[benjamini_hochberg(test.pval[:, some]) for some in collections] for test in tests]
    # As published, a set that is kept is a finding.
    limit = np.inf if method.name == "scfeaturelens" else method.standing.max_padj
    named = [
        np.any(
            [
                (test.kept[:, some] & (of_test[c] <= limit)).any(axis=1)
                for test, of_test in zip(tests, padj, strict=True)
            ],
            axis=0,
        )
        for c, some in enumerate(collections)
    ]
    real = collections[0]
    log_pval = [test.log_pval[:, real][test.tested[:, real] & (test.log_pval[:, real] < 0)] for test in tests]
    rows = _rows(features, tests, [of_test[0] for of_test in padj], n_sets, sets, n_stored) if n_stored != 0 else {}
    return Found(
        len(features),
        np.array([chosen.sum() for chosen in named]),
        np.concatenate(log_pval),
        sum(int(test.tested[:, real].sum()) for test in tests),
        rows,
    )


def _rows(
    features: np.ndarray,
    tests: list[SetTests],
    padj: list[np.ndarray],
    n_sets: int,
    sets: sparse.csr_matrix,
    n_stored: int | None,
) -> dict[str, np.ndarray]:
    """Make a row for each of the best sets of each feature and direction."""
    parts = []
    for test, adjusted in zip(tests, padj, strict=True):
        kept, log_pval, score = test.kept[:, :n_sets], test.log_pval[:, :n_sets], test.score[:, :n_sets]
        order = np.lexsort((-np.abs(score), np.where(kept, log_pval, np.inf)), axis=1)[:, :n_stored]
        place = np.broadcast_to(np.arange(len(order))[:, None], order.shape)
        chosen = kept[place, order]
        f, s = place[chosen], order[chosen]
        hits = np.empty(test.overlap[f, s].sum(), np.int64)
        list_hits(f, s, sets.indptr, sets.indices, test.study, test.strength, hits)
        parts.append(
            {
                "place": f,
                "feature": features[f],
                "gene_set": s,
                "direction": np.full(len(f), DIRECTIONS.index(test.direction)),
                "size": sets.getnnz(axis=1)[s].astype(np.int64),
                "padj": adjusted[f, s],
                **{name: getattr(test, name)[f, s] for name in ("overlap", "score", "pval", "log_pval")},
                "hits": hits,
            }
        )
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if sets.shape[0] > n_sets:
        rows["fdr"] = _rates_of_random_sets(rows["place"], rows["log_pval"], tests, n_sets)
    del rows["place"]
    return rows


def _rates_of_random_sets(place: np.ndarray, log_pval: np.ndarray, tests: list[SetTests], n_sets: int) -> np.ndarray:
    """Estimate the false discovery rate of each row among all sets of its feature, from the random sets of that feature."""
    n_random = tests[0].pval.shape[1] // n_sets - 1
    rates = np.empty(len(place))
    for feature in np.unique(place):
        mine = place == feature
        # Tests with a higher p than all rows have no influence.
        highest = log_pval[mine].max()
        log_p = [np.where(test.tested[feature], test.log_pval[feature], np.inf) for test in tests]
        real, null = (np.concatenate([part[side] for part in log_p]) for side in (slice(n_sets), slice(n_sets, None)))
        real, null = real[real <= highest], null[null <= highest]
        rates[mine] = empirical_fdr(-log_pval[mine], -real, -null, n_random)
    return rates


@_compiled
def list_hits(features, chosen, starts, genes, study, strength, hits):
    """Write the genes of each chosen set that stand out for its feature, by falling strength, one row after the other."""
    end = 0
    for row in range(features.size):
        first = end
        of_feature, strong = study[features[row]], strength[features[row]]
        for e in range(starts[chosen[row]], starts[chosen[row] + 1]):
            gene = genes[e]
            if of_feature[gene]:
                place = end
                while place > first and strong[hits[place - 1]] < strong[gene]:
                    hits[place] = hits[place - 1]
                    place -= 1
                hits[place] = gene
                end += 1
