from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, Holder, expression, holder, listing
from .._genesets import GeneSets, Net, default_collection, match
from .._progress import progress_bar
from ..core.rows import Matrix, varying_columns

if TYPE_CHECKING:
    from scipy import sparse

    from ..core.differential import Differential

METHODS = ("ora", "mannwhitney", "ulm")
DIRECTIONS = ("up", "down")
SEPARATOR = ";"


def enrich(
    data: Data,
    net: Net,
    *,
    key: str = "sae",
    method: Literal["ora", "mannwhitney", "ulm"] = "ora",
    collection: str | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    mod: str | None = None,
    var_mod: str | None = None,
    percentile: float | None = None,
    max_padj: float = 0.05,
    min_log2fc: float = 0.5,
    min_size: int = 5,
    max_size: int | None = 500,
    n_sets: int | None = 50,
    n_null: int = 1,
    batch: str | None = None,
    min_cells: int = 3,
    pseudocount: float = 0.1,
    rng: int = 0,
    progress: bool = True,
) -> None:
    r"""Find the gene sets of every feature.

    Differential expression of the feature's active against its inactive cells (the Welch statistics of
    :func:`sae.tl.rank_genes`, computed here in blocks, so that verb need not have run), then one of

    * `"ora"`, over-representation: the study set of a feature are the genes with adjusted p ≤ `max_padj` and log2 fold
      change ≥ `min_log2fc` (`"up"`) or ≤ −`min_log2fc` (`"down"`). With N genes tested, K of them in the gene set, n in the
      study set and x in both, the p-value is P(X ≥ x), X ~ Hypergeometric(N, K, n): Fisher's exact test, one-sided. `score`
      is the log2 odds ratio, with 0.5 added to each count. Weights of the net are not used.
    * `"mannwhitney"`, a rank test of the t statistics of the genes in the set against those of all other tested genes, with
      corrections for ties and continuity. `score` is its z, the direction is the sign of z, the p-value two-sided. It takes
      genes for independent, and the genes of real sets are not: read its p-values as a ranking.
    * `"ulm"`, a linear model of the t statistics of all tested genes on set membership (or weight), by
      :mod:`decoupler` (Badia-i-Mompel et al. 2022, doi:10.1093/bioadv/vbac016). `score` is the t of its slope, the
      direction is its sign, the p-value two-sided.

    P-values are adjusted over the sets (and for `"ora"` separately for up and down) of each feature by Benjamini-Hochberg.
    They know nothing of how genes go together, so everything is repeated on `n_null` permutations of the cells, in which each
    cell has the activations of a random other one: correlated genes and sets are kept, and nothing is there to be found.
    `fdr` is the number of p-values up to this one that a permutation gives, over all features, sets and directions, as a share
    of the number found (made monotone; Tusher et al. 2001, doi:10.1073/pnas.091062498).

    Parameters
    ----------
    data
        AnnData, or MuData with `mod` (or `var_mod`, for an SAE on the MuData itself), with activations.
    net
        Gene sets: a table with the columns `source` (set), `target` (gene) and optionally `weight`, as decoupler has it;
        a dict of gene lists; or the path of a GMT file (may be gzipped). :func:`sae.io.read_go` makes such a table from the
        Gene Ontology's files.
    key
        Name of the SAE.
    method
        `"ora"`, `"mannwhitney"` or `"ulm"`.
    collection
        Name of the gene sets in the result; by default the name of the GMT file, else `"gene_sets"`. Results of another
        collection are kept.
    layer, use_raw
        Expression to read: this layer, else `.raw` if there is one (unless `use_raw=False`), else `X`.
    mod
        The modality that holds the SAE.
    var_mod
        The modality whose variables are tested, by default `mod`.
    percentile
        Which cells stand for a feature, see :func:`sae.tl.rank_genes`.
    max_padj, min_log2fc
        Which genes stand out for a feature: the study set of `"ora"`, and the genes listed for either method.
    min_size, max_size
        Gene sets with fewer or more measured genes (those that vary over the cells) are left out.
    n_sets
        Gene sets to store per feature and direction, best first; None for all. P-values are adjusted over all of them.
    n_null
        Permutations. Each takes as long as the test itself; 0 for none, and `fdr` is NaN.
    batch
        Column of `obs`: cells are permuted within each of its values.
    min_cells
        Features that are active, or inactive, in fewer cells are left out.
    pseudocount
        Of the fold change, see :func:`sae.tl.rank_genes`.
    rng
        Seed of the permutations.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `uns[key]["enrichment"]`, a row per feature, gene set and direction with at least one gene of the set
    standing out (for `"mannwhitney"` and `"ulm"`, any): `feature`, `collection`, `gene_set`, `direction`, `overlap` (genes of the set
    that stand out), `size` (genes of the set that were tested), `score`, `pval`, `padj`, `fdr`, `genes` (the overlapping genes,
    largest absolute t first, separated by ";"), and `modality` for a MuData. `uns[key]["enrichment_null"]` has a row per collection: the share of all
    features with a gene set at adjusted p ≤ `max_padj` (`annotated`), and the same under permutation (`annotated_null`).

    Raises
    ------
    KeyError
        There are no activations, or no such layer or batch.
    ValueError
        `net` lacks columns, has no gene in common with the data or no set of suitable size; repeated gene names; negative
        (scaled), NaN or infinite expression values.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers(), collection="immune")
    >>> sae.get.enrichment(adata)["collection"].unique().tolist()
    ['immune']
    """
    from scanpy import logging as logg

    from ..core.null import empirical_fdr, permuted_cells

    _check(method, collection, max_padj, min_log2fc, min_size, max_size, n_sets)
    if n_null < 0:
        raise ValueError(f"n_null={n_null} is negative. Pass the number of permutations, or 0 for none.")
    held = holder(data, mod)
    a = _schema.activations(held, key)
    expressed, rows = expression(data, held, layer=layer, use_raw=use_raw, var_mod=var_mod)
    varying = varying_columns(expressed.matrix)
    matrix = expressed.matrix if varying.all() else expressed.matrix[:, varying]
    genes = expressed.genes[varying]
    sets = match(net, genes, min_size=min_size, max_size=max_size)
    collection = collection or default_collection(net)
    start = logg.info(
        f"testing {len(sets.names)} gene sets of {collection!r} for {a.shape[1]} features with {method!r}"
    )

    codes = _batch_codes(held, batch)
    how = _How(
        method,
        matrix,
        expressed.log_base,
        sets,
        genes,
        percentile=percentile,
        max_padj=max_padj,
        min_log2fc=min_log2fc,
        n_sets=n_sets,
        min_cells=min_cells,
        pseudocount=pseudocount,
    )
    a = a[rows]
    n_features = a.shape[1]
    with progress_bar((1 + n_null) * n_features, "enrich", "feature", shown=progress) as bar:
        real, annotated, parts = _run(a, how, bar.update, write=True)
        null = np.full((n_null, *real.shape), np.nan, dtype=np.float32)
        by_chance, generator = np.zeros(n_null), np.random.default_rng(rng)
        for number in range(n_null):
            permuted = permuted_cells(a, None if codes is None else codes[rows], generator)
            null[number], by_chance[number], _ = _run(permuted, how, bar.update, write=False)
        bar.update((1 + n_null) * n_features - bar.n)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if parts:
        fdr = empirical_fdr(real, null) if n_null else np.full(real.shape, np.nan)
        columns["fdr"] = fdr[columns["direction"], columns["feature"], columns["gene_set"]].astype(np.float64)
    columns["collection"] = np.zeros(len(columns.get("feature", ())), dtype=np.int64)
    categories = {
        "feature": _schema.feature_names(key, a.shape[1]),
        "collection": pd.Index([collection]),
        "gene_set": sets.names,
        "direction": pd.Index(DIRECTIONS),
    }
    table = _schema.tidy(columns, _schema.ENRICHMENT, categories)
    modality = var_mod or mod
    if modality is not None:
        table["modality"] = pd.Categorical([modality] * len(table))

    shares = {
        "annotated": annotated / n_features,
        "annotated_null": by_chance.mean() / n_features if n_null else np.nan,
    }
    summary = pd.DataFrame({"collection": [collection], "method": [method], "max_padj": [max_padj], **shares})
    summary = summary.astype({"collection": "category", "method": "category"})
    if modality is not None:
        summary["modality"] = pd.Categorical([modality])
    stored, place = _schema.read(held, key), {"collection": collection, "modality": modality}
    table = _schema.replace_rows(stored.get("enrichment"), table, place)
    summary = _schema.replace_rows(stored.get("enrichment_null"), summary, place)
    _schema.write(held, key, {**stored, "enrichment": table, "enrichment_null": summary})
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['enrichment'], collection {collection!r}: {annotated} of {n_features} "
        f"features have a gene set at padj ≤ {max_padj}"
        + (f", {by_chance.mean():.1f} when cells are permuted" if n_null else ""),
    )


def _check(
    method: str,
    collection: str | None,
    max_padj: float,
    min_log2fc: float,
    min_size: int,
    max_size: int | None,
    n_sets: int | None,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if collection is not None and (not isinstance(collection, str) or not collection):
        raise ValueError(f"collection={collection!r} cannot name gene sets: it must be a non-empty string.")
    if not 0 < max_padj <= 1:
        raise ValueError(f"max_padj={max_padj} is not a probability above 0 and up to 1.")
    if min_log2fc < 0:
        raise ValueError(f"min_log2fc={min_log2fc} is negative: a gene would be both up and down.")
    if max_size is not None and max_size < min_size:
        raise ValueError(f"max_size={max_size} is below min_size={min_size}.")
    if n_sets is not None and n_sets < 1:
        raise ValueError(
            f"n_sets={n_sets} is below 1. Pass the number of gene sets per feature and direction, or None."
        )


@dataclass(frozen=True)
class _How:
    """What is tested, and how."""

    method: str
    x: Matrix
    log_base: float | None
    sets: GeneSets
    genes: pd.Index
    percentile: float | None
    max_padj: float
    min_log2fc: float
    n_sets: int | None
    min_cells: int
    pseudocount: float


@dataclass(frozen=True)
class _Tested:
    """Gene sets of a block of features in one direction; arrays (features, sets)."""

    direction: str
    overlap: np.ndarray
    score: np.ndarray
    pval: np.ndarray
    padj: np.ndarray
    kept: np.ndarray


def _run(
    a: sparse.csr_matrix, how: _How, advance: Callable[[int], object], *, write: bool
) -> tuple[np.ndarray, int, list[dict[str, np.ndarray]]]:
    """Test all gene sets for all features.

    Returns
    -------
    −log p (directions, features, sets) with NaN for what is not kept, the number of features with a gene set at the
    adjusted p that is asked for, and the columns of the table, in parts.
    """
    from ..core.differential import differential
    from ..core.groups import active_groups, percentile_groups

    groups = active_groups(a) if how.percentile is None else percentile_groups(a, how.percentile)
    tests = {"ora": _ora, "mannwhitney": _mannwhitney, "ulm": _ulm}[how.method]
    evidence = np.full((len(DIRECTIONS), a.shape[1], len(how.sets.names)), np.nan, dtype=np.float32)
    annotated, parts = 0, []
    for block in differential(
        groups, how.x, log_base=how.log_base, pseudocount=how.pseudocount, min_cells=how.min_cells
    ):
        listed = _Listed(block, how)
        named = np.zeros(len(block.features), dtype=bool)
        for found in tests(listed):
            strength = -np.log(np.maximum(found.pval, np.finfo(np.float64).tiny))
            evidence[DIRECTIONS.index(found.direction), block.features] = np.where(found.kept, strength, np.nan)
            named |= ((found.padj <= how.max_padj) & found.kept).any(axis=1)
            if write:
                parts.append(listed.rows(found))
        annotated += int(named.sum())
        advance(len(block.features))
    return evidence, annotated, parts


def _batch_codes(held: Holder, batch: str | None) -> np.ndarray | None:
    if batch is None:
        return None
    if batch not in held.data.obs.columns:
        raise KeyError(f"{held.where}.obs has no column {batch!r}; it has {listing(held.data.obs.columns)}.")
    return pd.factorize(held.data.obs[batch])[0]


@dataclass(frozen=True)
class _Listed:
    """A block of features with what decides which rows are stored, and which genes are listed in them."""

    block: Differential
    how: _How

    def standing_out(self, direction: str) -> np.ndarray:
        """Mark (features, genes) that differ between active and inactive cells in one direction."""
        sign = 1 if direction == "up" else -1
        return (self.block.padj <= self.how.max_padj) & (sign * self.block.log2fc >= self.how.min_log2fc)

    def rows(self, found: _Tested) -> dict[str, np.ndarray]:
        """Write the best sets of each feature among those kept as table columns."""
        kept, pval, n_sets = found.kept, found.pval, self.how.n_sets
        order = np.lexsort((-np.abs(found.score), np.where(kept, pval, np.inf)), axis=1)[:, :n_sets]
        features = np.broadcast_to(np.arange(len(pval))[:, None], order.shape)
        chosen = kept[features, order]
        f, s = features[chosen], order[chosen]
        return {
            "feature": self.block.features[f],
            "gene_set": s,
            "direction": np.full(len(f), DIRECTIONS.index(found.direction)),
            "overlap": found.overlap[f, s],
            "size": self.how.sets.members.getnnz(axis=1)[s].astype(np.int64),
            "score": found.score[f, s],
            "pval": pval[f, s],
            "padj": found.padj[f, s],
            "genes": self._overlapping_genes(found.direction, f, s),
        }

    def by_sign(self, score: np.ndarray, pval: np.ndarray, padj: np.ndarray) -> list[_Tested]:
        """Take sets with a positive score as up, and those with a negative one as down."""
        found = []
        for direction, kept in (("up", score > 0), ("down", score < 0)):
            overlap = (self.how.sets.members @ self.standing_out(direction).T.astype(np.float64)).T.astype(np.int64)
            found.append(_Tested(direction, overlap, score, pval, padj, kept))
        return found

    def _overlapping_genes(self, direction: str, features: np.ndarray, sets: np.ndarray) -> np.ndarray:
        standing = self.standing_out(direction)
        members, strength = self.how.sets.members, np.abs(self.block.score)
        listed = np.empty(len(features), dtype=object)
        for row, (f, s) in enumerate(zip(features, sets, strict=True)):
            hits = members.indices[members.indptr[s] : members.indptr[s + 1]]
            hits = hits[standing[f, hits]]
            listed[row] = SEPARATOR.join(self.how.genes[hits[np.argsort(-strength[f, hits], kind="stable")]])
        return listed


def _ora(listed: _Listed) -> list[_Tested]:
    from ..core.enrichment import over_representation

    found = []
    for direction in DIRECTIONS:
        result = over_representation(listed.standing_out(direction), listed.how.sets.members)
        found.append(_Tested(direction, result.overlap, result.log2_odds, result.pval, result.padj, result.overlap > 0))
    return found


def _ulm(listed: _Listed) -> list[_Tested]:
    import decoupler as dc
    from scipy.special import stdtr

    from ..core.statistics import benjamini_hochberg

    t = listed.block.score
    t = np.clip(t, *np.array([-1, 1]) * np.abs(t[np.isfinite(t)]).max(initial=0))
    scores, _ = dc.mt.ulm(
        pd.DataFrame(t, index=listed.block.features.astype(str), columns=listed.how.genes.astype(str)),
        listed.how.sets.net,
        tmin=0,
        empty=False,
    )
    score = scores[listed.how.sets.names].to_numpy(dtype=np.float64)
    pval = 2 * stdtr(len(listed.how.genes) - 2, -np.abs(score))
    return listed.by_sign(score, pval, benjamini_hochberg(pval))


def _mannwhitney(listed: _Listed) -> list[_Tested]:
    from ..core.enrichment import rank_sets

    result = rank_sets(np.where(np.isnan(listed.block.pval), np.nan, listed.block.score), listed.how.sets.members)
    return listed.by_sign(result.z, result.pval, result.padj)
