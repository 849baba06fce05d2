from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, expression, holder
from .._genesets import GeneSets, Net, default_collection, match
from .._progress import progress_bar
from ..core.rows import varying_columns

if TYPE_CHECKING:
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
    min_cells: int = 3,
    pseudocount: float = 0.1,
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
    min_cells
        Features that are active, or inactive, in fewer cells are left out.
    pseudocount
        Of the fold change, see :func:`sae.tl.rank_genes`.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `uns[key]["enrichment"]`, a row per feature, gene set and direction with at least one gene of the set
    standing out (for `"mannwhitney"` and `"ulm"`, any): `feature`, `collection`, `gene_set`, `direction`, `overlap` (genes of the set
    that stand out), `size` (genes of the set that were tested), `score`, `pval`, `padj`, `genes` (the overlapping genes,
    largest absolute t first, separated by ";"), and `modality` for a MuData.

    Raises
    ------
    KeyError
        There are no activations, or no such layer.
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

    from ..core.differential import differential
    from ..core.groups import active_groups, percentile_groups

    _check(method, collection, max_padj, min_log2fc, min_size, max_size, n_sets)
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

    groups = active_groups(a[rows]) if percentile is None else percentile_groups(a[rows], percentile)
    rows_of = {"ora": _ora, "mannwhitney": _mannwhitney, "ulm": _ulm}[method]
    parts = []
    with progress_bar(a.shape[1], "enrich", "feature", shown=progress) as bar:
        for block in differential(
            groups, matrix, log_base=expressed.log_base, pseudocount=pseudocount, min_cells=min_cells
        ):
            listed = _Listed(block, sets, genes, max_padj, min_log2fc, n_sets)
            parts.extend(rows_of(listed))
            bar.update(len(block.features))
        bar.update(a.shape[1] - bar.n)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
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

    stored = _schema.read(held, key)
    table = _schema.replace_rows(stored.get("enrichment"), table, {"collection": collection, "modality": modality})
    _schema.write(held, key, {**stored, "enrichment": table})
    n_named = table.loc[(table["collection"] == collection) & (table["padj"] <= max_padj), "feature"].nunique()
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['enrichment'], collection {collection!r}: {n_named} of {a.shape[1]} "
        f"features have a gene set at padj ≤ {max_padj}",
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
class _Listed:
    """A block of features with what decides which rows are stored, and which genes are listed in them."""

    block: Differential
    sets: GeneSets
    genes: pd.Index
    max_padj: float
    min_log2fc: float
    n_sets: int | None

    def standing_out(self, direction: str) -> np.ndarray:
        """Mark (features, genes) that differ between active and inactive cells in one direction."""
        sign = 1 if direction == "up" else -1
        return (self.block.padj <= self.max_padj) & (sign * self.block.log2fc >= self.min_log2fc)

    def rows(
        self,
        direction: str,
        overlap: np.ndarray,
        score: np.ndarray,
        pval: np.ndarray,
        padj: np.ndarray,
        kept: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Write the best sets of each feature among those `kept`, all arrays (features, sets), as table columns."""
        order = np.lexsort((-np.abs(score), np.where(kept, pval, np.inf)), axis=1)[:, : self.n_sets]
        features = np.broadcast_to(np.arange(len(pval))[:, None], order.shape)
        chosen = kept[features, order]
        f, s = features[chosen], order[chosen]
        return {
            "feature": self.block.features[f],
            "gene_set": s,
            "direction": np.full(len(f), DIRECTIONS.index(direction)),
            "overlap": overlap[f, s],
            "size": self.sets.members.getnnz(axis=1)[s].astype(np.int64),
            "score": score[f, s],
            "pval": pval[f, s],
            "padj": padj[f, s],
            "genes": self._overlapping_genes(direction, f, s),
        }

    def rows_by_sign(self, score: np.ndarray, pval: np.ndarray, padj: np.ndarray) -> list[dict[str, np.ndarray]]:
        """Write sets with a positive score as up, and those with a negative one as down."""
        parts = []
        for direction, kept in (("up", score > 0), ("down", score < 0)):
            overlap = (self.sets.members @ self.standing_out(direction).T.astype(np.float64)).T.astype(np.int64)
            parts.append(self.rows(direction, overlap, score, pval, padj, kept))
        return parts

    def _overlapping_genes(self, direction: str, features: np.ndarray, sets: np.ndarray) -> np.ndarray:
        standing = self.standing_out(direction)
        members, strength = self.sets.members, np.abs(self.block.score)
        listed = np.empty(len(features), dtype=object)
        for row, (f, s) in enumerate(zip(features, sets, strict=True)):
            hits = members.indices[members.indptr[s] : members.indptr[s + 1]]
            hits = hits[standing[f, hits]]
            listed[row] = SEPARATOR.join(self.genes[hits[np.argsort(-strength[f, hits], kind="stable")]])
        return listed


def _ora(listed: _Listed) -> list[dict[str, np.ndarray]]:
    from ..core.enrichment import over_representation

    parts = []
    for direction in DIRECTIONS:
        result = over_representation(listed.standing_out(direction), listed.sets.members)
        parts.append(
            listed.rows(direction, result.overlap, result.log2_odds, result.pval, result.padj, result.overlap > 0)
        )
    return parts


def _ulm(listed: _Listed) -> list[dict[str, np.ndarray]]:
    import decoupler as dc
    from scipy.special import stdtr

    from ..core.statistics import benjamini_hochberg

    t = listed.block.score
    t = np.clip(t, *np.array([-1, 1]) * np.abs(t[np.isfinite(t)]).max(initial=0))
    scores, _ = dc.mt.ulm(
        pd.DataFrame(t, index=listed.block.features.astype(str), columns=listed.genes.astype(str)),
        listed.sets.net,
        tmin=0,
        empty=False,
    )
    score = scores[listed.sets.names].to_numpy(dtype=np.float64)
    pval = 2 * stdtr(len(listed.genes) - 2, -np.abs(score))
    return listed.rows_by_sign(score, pval, benjamini_hochberg(pval))


def _mannwhitney(listed: _Listed) -> list[dict[str, np.ndarray]]:
    from ..core.enrichment import rank_sets

    result = rank_sets(np.where(np.isnan(listed.block.pval), np.nan, listed.block.score), listed.sets.members)
    return listed.rows_by_sign(result.z, result.pval, result.padj)
