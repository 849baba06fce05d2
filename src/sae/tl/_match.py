from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, Holder, is_mudata, listing
from .._expression import expression
from .._pairs import holders, terms
from ..core.rows import Columns, Matrix, on_disk

if TYPE_CHECKING:
    from ..core.matching import Matching

BY = ("auto", "decoder", "activations", "genes", "enrichment")
FEWEST_CELLS, FEWEST_GENES = 10, 10
SAME_CELLS = 0.5
"""Share of the cells of the smaller object that must be in the other, for objects to be of the same cells: barcodes coincide."""
CHANCE_FEATURES = 1_000
"""Features matched by chance, at least, that each pair is compared with."""
CHANCE_QUANTILE = 0.95


def match(
    a: Data,
    b: Data,
    *,
    key: str = "sae",
    key_b: str | None = None,
    by: Literal["auto", "decoder", "activations", "genes", "enrichment"] = "auto",
    mod: str | None = None,
    mod_b: str | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    var_mod: str | None = None,
    collection: str | None = None,
    max_padj: float = 0.05,
    n_permutations: int | None = None,
    rng: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    r"""Pair the features of two SAEs, one to one: of two seeds, two models of the same cells, or two data sets.

    The pairs are those with the highest sum of similarities (Hungarian method; see the notes), which are

    * `"decoder"`: the cosine of the decoder directions, in the space that `a` was trained in. For SAEs of the same representation.
    * `"activations"`: Pearson's r of the activations over the cells that both objects have, by `obs_names`. For any two
      models, and for several SAEs of one object.
    * `"genes"`: Pearson's r of the gene signatures, over the genes that both objects have. The signature of a feature is
      Pearson's r of its activation with the expression of each gene, over its own cells. For different cells.
    * `"enrichment"`: the Jaccard index of the gene sets (with their direction) of the features that :func:`sae.tl.enrich` stored with
      `padj` ≤ `max_padj`. For different cells, and different species or modalities.

    All are signed but the last, and only pairs above 0 are made.

    A most similar feature can be found for any, in a large dictionary even a quite similar one. The same matching is therefore made
    by chance as well: with random signs for each direction of `b` along the principal axes of all, so that few axes still hold most
    of them where they did; with the cells of `b` permuted for its activations, and for its signatures, so that what genes have to do
    with each other stays; with gene sets exchanged between the features of `b`, each keeping as many, and each set its number of
    features.

    Parameters
    ----------
    a, b
        AnnData or MuData, fitted; may be the same object. For all but `"decoder"` also with activations.
    key
        Name of the SAE of `a`.
    key_b
        Name of the SAE of `b`, by default `key`.
    by
        What is compared. `"auto"`: the decoders, if both SAEs were trained on the same values of the same cells; else the activations, if
        half of the cells of the smaller object are in the other; else the genes.
    mod
        The modality that holds the SAE of `a`.
    mod_b
        The modality that holds the SAE of `b`, by default `mod` where `b` is a MuData.
    layer, use_raw
        Expression for `"genes"`, of both objects: this layer, else `.raw` if there is one (unless `use_raw=False`), else `X`. Pass
        log-normalised values.
    var_mod
        The modality whose variables `"genes"` reads, of each MuData; by default that of its SAE.
    collection
        Only gene sets of this collection.
    max_padj
        Gene sets that count, see above.
    n_permutations
        Matchings by chance. By default as many as match 1,000 features; 0 for none.
    rng
        Seed or generator, for what is random.

    Returns
    -------
    A row per feature of `a`, the most similar pairs first:

    * `feature` and `feature_b`, missing for a feature that is left without a partner;
    * `similarity` of the pair, and `reciprocal`: whether each is the most similar of all to the other;
    * `best_feature_b` and `best_similarity`: the most similar feature of `b`, whether or not it is another one's partner;
    * `chance`, the similarity that 5 % of features have by chance or exceed; `pval`, the share of them with such a similarity as
      the pair or a higher one, (1 + their number) / (1 + all); NaN without permutations;
    * `cosine` of the decoders of the pair, where both SAEs are of the same representation, and `correlation` of their activations, where
      the objects are of the same cells (see `by`), or where that is what was compared: else NaN.

    Raises
    ------
    KeyError
        There is no such SAE, or no activations or gene sets where they are needed.
    ValueError
        Decoders of different inputs; fewer than 10 shared cells or genes; no shared gene sets; repeated names of cells or genes; a
        setting out of range.

    Notes
    -----
    Up to 2,048 × 2,048 features the matching is the best of all. Above, it is the best among the 32 most similar features of each
    one, of either side, and then again among what is left: the same unless many features have the same neighbours.

    Signatures are made of all shared genes rather than of the best ones that `rank_genes` stored: which those are
    differs from sample to sample, while noise in thousands of correlations averages out. They do not depend on how strongly a feature is
    active, nor on how high a gene is in one data set. They do depend on which cells there are to compare with: a feature of B cells
    has another signature among other B cells than in blood.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> for seed in (0, 1):
    ...     sae.tl.fit(adata, n_features=32, steps=200, rng=seed, key_added=f"seed{seed}")
    ...     sae.tl.encode(adata, key=f"seed{seed}")
    >>> pairs = sae.tl.match(adata, adata, key="seed0", key_b="seed1")
    >>> len(pairs)
    32
    """
    from scanpy import logging as logg

    _check(by, max_padj, n_permutations)
    key_b = key if key_b is None else key_b
    held_a, held_b = holders(a, b, mod, mod_b)
    left = _Side(a, held_a, key, _schema.read(held_a, key))
    right = _Side(b, held_b, key_b, _schema.read(held_b, key_b))
    cells = _shared_cells(left.held, right.held)
    chosen = _chosen(left, right, cells) if by == "auto" else by
    needed = chosen in ("activations", "genes")
    active = (
        _schema.activations_in_memory(held_a, key) if needed or left.encoded else None,
        _schema.activations_in_memory(held_b, key_b) if needed or right.encoded else None,
    )
    if chosen == "decoder":
        compared = _decoders(left, right)
    elif chosen == "activations":
        compared = _activations(left, right, *active, cells)
    elif chosen == "genes":
        compared = _genes(left, right, *active, layer=layer, use_raw=use_raw, var_mod=var_mod)
    else:
        compared = _enrichment(left, right, collection, max_padj)
    found = compared.matching(compared.a, compared.b)
    alive = np.isfinite(found.best)
    if n_permutations is None:
        n_permutations = math.ceil(CHANCE_FEATURES / max(alive.sum(), 1))
    generator = np.random.default_rng(rng)
    drawn = (compared.matching(compared.a, compared.by_chance(generator)) for _ in range(n_permutations))
    chance = np.concatenate([np.empty(0), *(np.nan_to_num(matched.similarity[alive]) for matched in drawn)])
    table = _table(left, right, found, chance)
    table["cosine"] = found.similarity if chosen == "decoder" else _cosine(left, right, found)
    table["correlation"] = np.nan
    if chosen == "activations":
        table["correlation"] = found.similarity
    elif active[0] is not None and active[1] is not None and _same_cells(left, right, cells):
        table["correlation"] = _correlation(active[0][cells[0]], active[1][cells[1]], found)
    above = np.count_nonzero(found.similarity > table["chance"])
    logg.info(
        f"matched {np.count_nonzero(found.partner >= 0)} of {left.n_features} features of {left.where} with "
        f"{right.n_features} of {right.where} by {chosen!r}, {compared.of}"
        + (f"; {above} are more similar than {CHANCE_QUANTILE:.0%} of pairs by chance" if n_permutations else "")
    )
    return _schema.plain_index(table.sort_values("similarity", ascending=False, kind="stable"))


@dataclass(frozen=True)
class _Side:
    """One of the two SAEs."""

    data: Data
    held: Holder
    key: str
    stored: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.held.where}.uns[{self.key!r}]"

    @property
    def n_features(self) -> int:
        return len(self.stored["weights"]["W_dec"])

    @property
    def encoded(self) -> bool:
        return self.key in self.held.data.obsm and "features" in self.stored


@dataclass(frozen=True)
class _Compared:
    """What is matched, how, what there is in place of b by chance, and of how many things it is."""

    a: Any
    b: Any
    matching: Callable[[Any, Any], Matching]
    by_chance: Callable[[np.random.Generator], Any]
    of: str


def _check(by: str, max_padj: float, n_permutations: int | None) -> None:
    if by not in BY:
        raise ValueError(f"by={by!r} is not one of {', '.join(map(repr, BY))}.")
    if not 0 < max_padj <= 1:
        raise ValueError(f"max_padj={max_padj} is not a probability above 0 and up to 1.")
    wrong_type = isinstance(n_permutations, bool) or not isinstance(n_permutations, int | np.integer | None)
    if wrong_type or (n_permutations is not None and n_permutations < 0):
        raise ValueError(
            f"n_permutations={n_permutations!r} is not a number of matchings. Pass 1 or more, or 0 for none."
        )


def _shared_cells(a: Holder, b: Holder) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the cells that both have, in the order of a; none if names occur more than once."""
    if a.data is b.data:
        return np.arange(a.data.n_obs), np.arange(b.data.n_obs)
    if not (a.data.obs_names.is_unique and b.data.obs_names.is_unique):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    position = b.data.obs_names.get_indexer(a.data.obs_names)
    return np.flatnonzero(position >= 0), position[position >= 0]


def _same_cells(a: _Side, b: _Side, cells: tuple[np.ndarray, np.ndarray]) -> bool:
    fewer = min(a.held.data.n_obs, b.held.data.n_obs)
    return len(cells[0]) >= max(FEWEST_CELLS, SAME_CELLS * fewer)


def _same_representation(a: _Side, b: _Side) -> bool:
    return a.stored["params"]["fingerprint"] == b.stored["params"]["fingerprint"]


def _chosen(a: _Side, b: _Side, cells: tuple[np.ndarray, np.ndarray]) -> str:
    if _same_representation(a, b):
        return "decoder"
    return "activations" if _same_cells(a, b, cells) else "genes"


def _decoders(a: _Side, b: _Side) -> _Compared:
    from ..core.matching import match_vectors, mirrored

    of_a, of_b = _directions(a, b)
    if not _same_representation(a, b):
        from scanpy import logging as logg

        logg.warning(
            f"{a.where} and {b.where} were trained on different cells or values ({_inputs(a)} and {_inputs(b)}): their decoders can "
            "be compared only if the columns mean the same in both."
        )
    return _Compared(
        of_a,
        of_b,
        match_vectors,
        lambda rng: mirrored(of_b, rng),
        f"{of_a.shape[1]} dimensions",
    )


def _directions(a: _Side, b: _Side) -> tuple[np.ndarray, np.ndarray]:
    """Return the decoder directions of both in the space that `a` was trained in: another one of `b` has other axes."""
    from ..core.preprocess import directions

    of_a, of_b = (np.asarray(side.stored["weights"]["W_dec"]) for side in (a, b))
    names_a, names_b = (pd.Index(side.stored["weights"].get("input_names", ())) for side in (a, b))
    advice = "Use by='activations' for the same cells, by='genes' for others."
    if of_a.shape[1] != of_b.shape[1]:
        raise ValueError(
            f"{a.where} reads {of_a.shape[1]} columns ({_inputs(a)}), {b.where} {of_b.shape[1]} ({_inputs(b)}): their decoders cannot "
            f"be compared. {advice}"
        )
    if len(names_a) and len(names_b):
        position = names_b.get_indexer(names_a)
        if (position < 0).any():
            raise ValueError(
                f"{(position < 0).sum()} of the {len(names_a)} columns that {a.where} reads are not read by {b.where} "
                f"({listing(names_a[position < 0], 5)}): their decoders cannot be compared. {advice}"
            )
        of_b = of_b[:, position]
    factors = a.stored["weights"].get("scaling")
    factors = None if factors is None else np.asarray(factors)
    return directions(of_a, factors), directions(of_b, factors)


def _inputs(side: _Side) -> str:
    params = side.stored["params"]
    return repr(params["layer"] or params["use_rep"])


def _activations(
    a: _Side, b: _Side, of_a: sparse.csr_matrix, of_b: sparse.csr_matrix, cells: tuple[np.ndarray, np.ndarray]
) -> _Compared:
    from ..core.matching import match_activations

    n = len(cells[0])
    for held in (a.held, b.held):
        if n == 0 and not held.data.obs_names.is_unique:
            raise ValueError(
                f"{held.where} has cell names that occur more than once, so cells cannot be matched by name. Make them unique: "
                "obs_names_make_unique()."
            )
    if n < FEWEST_CELLS:
        raise ValueError(
            f"{n} cells are in {a.held.where} and in {b.held.where}, by obs_names ({listing(a.held.data.obs_names, 2)} and "
            f"{listing(b.held.data.obs_names, 2)}): activations can be compared over {FEWEST_CELLS} or more. Use by='genes' for "
            "different cells."
        )
    mine, theirs = of_a[cells[0]], of_b[cells[1]]
    return _Compared(
        mine, theirs, match_activations, lambda rng: theirs[rng.permutation(n)], f"over {n} cells that both have"
    )


def _genes(
    a: _Side,
    b: _Side,
    of_a: sparse.csr_matrix,
    of_b: sparse.csr_matrix,
    *,
    layer: str | None,
    use_raw: bool | None,
    var_mod: str | None,
) -> _Compared:
    from ..core.matching import match_vectors
    from ..core.signatures import signatures

    read = []
    for side, activations in ((a, of_a), (b, of_b)):
        of_mod = var_mod if is_mudata(side.data) or not (is_mudata(a.data) or is_mudata(b.data)) else None
        expressed, rows = expression(side.data, side.held, layer=layer, use_raw=use_raw, var_mod=of_mod)
        read.append((expressed, activations[rows]))
    (x, active), (x_b, active_b) = read
    shared = x.genes.intersection(x_b.genes, sort=False)
    if len(shared) < FEWEST_GENES:
        raise ValueError(
            f"{len(shared)} genes of {x.where} ({listing(x.genes, 3)}) are in {x_b.where} ({listing(x_b.genes, 3)}): "
            f"signatures need {FEWEST_GENES} or more. Do both use the same identifiers (symbols or Ensembl ids)?"
        )
    places, places_b = (found.genes.get_indexer(shared) for found in (x, x_b))
    of_shared = _columns(x.matrix, places), x.summary.shift[places]
    b_of_shared = _columns(x_b.matrix, places_b), x_b.summary.shift[places_b]

    def centred(active: sparse.csr_matrix, x: Matrix, shift: np.ndarray) -> np.ndarray:
        r = signatures(active, x, shift)
        r -= r.mean(axis=1, keepdims=True)
        return r

    return _Compared(
        centred(active, *of_shared),
        centred(active_b, *b_of_shared),
        match_vectors,
        lambda rng: centred(active_b[rng.permutation(active_b.shape[0])], *b_of_shared),
        f"over {len(shared)} genes that both have",
    )


def _columns(matrix: Matrix, positions: np.ndarray) -> Matrix:
    return Columns(matrix, positions) if on_disk(matrix) else matrix[:, positions]


def _enrichment(a: _Side, b: _Side, collection: str | None, max_padj: float) -> _Compared:
    from ..core.matching import match_sets
    from ..core.overlap import exchanged

    found = terms(a.held, a.key, b.held, b.key, collection=collection, max_padj=max_padj, signed=True)
    n_shared = np.count_nonzero((found.a.getnnz(axis=0) > 0) & (found.b.getnnz(axis=0) > 0))
    return _Compared(
        found.a, found.b, match_sets, lambda rng: exchanged(found.b, rng), f"over {n_shared} gene sets that both have"
    )


def _table(a: _Side, b: _Side, found: Matching, chance: np.ndarray) -> pd.DataFrame:
    names, names_b = _schema.feature_names(a.key, a.n_features), _schema.feature_names(b.key, b.n_features)
    as_high = len(chance) - np.searchsorted(np.sort(chance), found.similarity)
    paired = found.partner >= 0
    return pd.DataFrame(
        {
            "feature": pd.Categorical.from_codes(np.arange(len(names)), categories=names),
            "feature_b": pd.Categorical.from_codes(found.partner, categories=names_b),
            "similarity": found.similarity,
            "reciprocal": found.reciprocal,
            "best_feature_b": pd.Categorical.from_codes(found.nearest, categories=names_b),
            "best_similarity": found.best,
            "chance": np.quantile(chance, CHANCE_QUANTILE) if len(chance) else np.nan,
            "pval": np.where(paired & (len(chance) > 0), (1 + as_high) / (1 + len(chance)), np.nan),
        }
    )


def _cosine(a: _Side, b: _Side, found: Matching) -> np.ndarray:
    """Return the cosine of the decoders of the pairs, if both are of the same representation."""
    cosine = np.full(len(found.partner), np.nan)
    if _same_representation(a, b):
        paired = found.partner >= 0
        of_a, of_b = _directions(a, b)
        cosine[paired] = np.einsum("ij,ij->i", of_a[paired], of_b[found.partner[paired]])
    return cosine


def _correlation(a: sparse.csr_matrix, b: sparse.csr_matrix, found: Matching) -> np.ndarray:
    from ..core.matching import paired_correlations

    r = np.full(len(found.partner), np.nan)
    paired = np.flatnonzero(found.partner >= 0)
    r[paired] = paired_correlations(a, b, paired, found.partner[paired])
    return r
