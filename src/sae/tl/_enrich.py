from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from .._design import codes
from .._expression import Expression, cells_of, expression
from .._genesets import Net, default_collection, match
from .._peaks import VarToGene, by_gene
from .._progress import progress_bar

if TYPE_CHECKING:
    from scipy import sparse

    from ..core.groups import Groups
    from ..core.set_search import Found

METHODS = ("ora", "mannwhitney", "ulm", "gsea", "aucell", "scfeaturelens")
SEPARATOR = ";"
PUBLISHED_PERCENTILE, PUBLISHED_CELLS = 99, 3
MIN_CELLS = 10
MAX_BINS, GENES_PER_BIN = 25, 100
NULL_SETS = 20_000
"""Random sets a feature is compared with, at least."""


def enrich(
    data: Data,
    net: Net,
    *,
    key: str = "sae",
    method: Literal["ora", "mannwhitney", "ulm", "gsea", "aucell", "scfeaturelens"] = "ora",
    collection: str | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    mod: str | None = None,
    var_mod: str | None = None,
    var_to_gene: VarToGene | None = None,
    model: object | None = None,
    percentile: float | None = None,
    background: Sequence[str] | None = None,
    directions: Sequence[str] = ("up", "down"),
    max_padj: float = 0.05,
    min_log2fc: float = 0.5,
    min_size: int = 5,
    max_size: int | None = 500,
    n_sets: int | None = 50,
    n_null: int = 1,
    batch: str | None = None,
    min_cells: int | None = None,
    min_expected: float = 30,
    pseudocount: float = 0.1,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Find the gene sets of every feature.

    Differential expression of the feature's active against its inactive cells (the Welch statistics of
    :func:`sae.tl.rank_genes`, computed here in blocks, so that verb need not have run), then one of

    * `"ora"`, over-representation: the study set of a feature are the genes with adjusted p ≤ `max_padj` and log2 fold
      change ≥ `min_log2fc` (`"up"`), ≤ −`min_log2fc` (`"down"`) or either (`"both"`). With N genes, K of them in the gene set,
      n in the study set and x in both, the p-value is P(X ≥ x), X ~ Hypergeometric(N, K, n): Fisher's exact test, one-sided.
      `score` is the log2 odds ratio, with 0.5 added to each count.
    * `"mannwhitney"`, a rank test of the t statistics of the genes in the set against those of all other tested genes, with
      corrections for ties and continuity. `score` is its z, the direction is the sign of z, the p-value two-sided.
    * `"ulm"`, a linear model of the t statistics of all genes on set membership (or weight; Badia-i-Mompel et al. 2022,
      doi:10.1093/bioadv/vbac016). `score` is the t of its slope, the direction is its sign, the p-value two-sided.
    * `"gsea"`, gene-set enrichment analysis of the t statistics (Subramanian et al. 2005, doi:10.1073/pnas.0506580102):
      `score` is the normalised enrichment score, the p-value from 1,000 permutations of the genes. Slow: for few features and sets.
    * `"aucell"` (Aibar et al. 2017, doi:10.1038/nmeth.4463): `score` is the area under the curve that recovers the set among
      the 5 % of genes with the highest (`"up"`) or lowest (`"down"`) t, between 0 and 1; p-value from the mean and variance of
      the area of a random set, and far too small for small sets: trust `fdr` alone.
    * `"scfeaturelens"`, exactly the procedure of arXiv:2410.11468, for comparison. Cells above the 99th percentile of the
      activation are compared with those at zero; the study set are genes with adjusted p < 1e-5 and a ratio of means above 2 or
      below 1/2, with fallbacks to p < .05 and to any ratio. Stored are the sets with p < .05 in a two-sided binomial test of the hits
      and in a Mann-Whitney test of the ratios; `pval` is the larger of the two, `score` log2((hits + ½) / (expected + ½)). Known
      flaws: nothing is corrected over sets or features; the Mann-Whitney p is half the two-sided value; a gene that is constant in
      one group gets p = 1, so that a perfect marker is lost; ratios have no pseudocount.

    The decoupler package does `"ulm"`, `"gsea"` and `"aucell"`; weights of the net matter for `"ulm"` only.

    P-values are adjusted by Benjamini-Hochberg over the sets of each feature (for `"ora"` in each direction), `padj`, and over
    all features, sets and directions, `padj_all`. All these p-values take genes as independent and as equally likely to stand out,
    which those of a real set are not. Two nulls, each `n_null` times, show what that is worth:

    * Permuted cells: each has the activations of a random other one (of its `batch`). Correlated genes and sets stay as they
      are, and nothing is there to be found.
    * Random sets: the genes of all sets are exchanged for others with a similar mean expression. The features stay as they are,
      and nothing about the sets is there to be found but their size and expression.

    A rate of false discoveries is the number of p-values up to this one that a null gives, plus one, as a share of the number
    found (made monotone; Tusher et al. 2001, doi:10.1073/pnas.091062498): over all features for permuted cells, among the sets of the
    same feature for random sets. `fdr` is the larger of the two, and the column to trust.

    Peaks of open chromatin, or proteins, are tested by the genes that they belong to (`var_to_gene`). The accessibility of a gene is
    the sum of its peaks, log1p values being added up as what they are the logarithm of. A gene then counts once, whether
    it has one peak or fifty, and random sets have genes of a similar accessibility, and so of about as many peaks.

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
        See above.
    collection
        Name of the gene sets in the result; by default the name of the GMT file, else `"gene_sets"`. Results of another
        collection are kept.
    layer, use_raw
        Expression to read: this layer, else `.raw` if there is one (unless `use_raw=False`), else `X`. It may be on disk (backed,
        Zarr, a memory map) or a dask array, and is then read in chunks of cells, by the workers of a `dask.distributed` cluster if
        it is on one.
    mod
        The modality that holds the SAE.
    var_mod
        The modality whose variables are tested, by default `mod`.
    var_to_gene
        Which genes the variables belong to, where the variables are not genes but the sets are of genes: a table with the columns
        `peak` and `gene`, as :func:`sae.tl.peaks_to_genes` or 10x Genomics (`peak_annotation.tsv`) makes it, or a dict from
        variable to gene or genes. Variables without a gene take no part. Leave it out for sets of peaks: those with a motif, say.
    model
        Test what a model predicts instead of data, see :func:`sae.tl.rank_genes`.
    percentile
        Which cells stand for a feature, see :func:`sae.tl.rank_genes`; 99 for `"scfeaturelens"` unless given.
    background
        The genes that could have been found; others take no part, as if not measured. By default all that vary over the cells.
    directions
        Of `"ora"`: any of `"up"`, `"down"`, `"both"`.
    max_padj, min_log2fc
        Which genes stand out for a feature: the study set of `"ora"`, and the genes listed for other methods. Scaled values
        (some negative) have no fold changes; genes then stand out by adjusted p and the sign of t, and `"ora"` demands
        `min_log2fc=0`.
    min_size, max_size
        Gene sets with fewer or more measured genes (of the background) are left out.
    n_sets
        Gene sets to store per feature and direction, best first; None for all. P-values are adjusted over all of them.
    n_null
        Permutations of the cells, each of which takes as long as the test itself, and draws of random sets (for quick methods, as
        many times more as it takes to compare each feature with 20,000 of them). 0 for none: `fdr` is NaN. Of activations on disk,
        those of random cells cannot be read one by one: which features are active in which cells is held in memory, two bytes for
        each (three with `percentile`).
    batch
        Column of `obs`: cells are permuted within each of its values.
    min_cells
        Features that are active, or inactive, in fewer cells are left out; `uns[key]["features"]` says which and why. By default
        10, and 3 for `"scfeaturelens"`, which uses one cell in a hundred.
    min_expected
        Genes too rare for Welch's test, see :func:`sae.tl.rank_genes`, stand out for no feature. They have no rank in
        `"mannwhitney"`, the lowest in `"aucell"`, and t = 0 in `"ulm"` and `"gsea"`; `"scfeaturelens"` takes all.
    pseudocount
        Of the fold change, see :func:`sae.tl.rank_genes`.
    rng
        Seed or generator, of the permutations and random sets.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes

    * `uns[key]["enrichment"]`, a row per feature, gene set and direction with at least one gene of the set
      standing out (for methods that score all genes, any): `feature`, `collection`, `gene_set`, `direction`, `overlap` (genes of
      the set that stand out), `size` (measured genes of the set), `score`, `pval`, `padj`, `padj_all`, `fdr`,
      `genes` (the overlapping genes, largest absolute t first, separated by ";"), and `modality` for a MuData;
    * `uns[key]["enrichment_null"]`, a row per collection: the share of all features with a gene set at `padj` ≤ `max_padj`
      (`annotated`; for `"scfeaturelens"` with one that is stored), the same with permuted cells (`annotated_permuted`) and random
      sets (`annotated_random_sets`), and the share with `fdr` ≤ `max_padj` (`annotated_fdr`);
    * `uns[key]["features"]`: the column `enrichment_status`, `"tested"` or why not.

    Raises
    ------
    KeyError
        There are no activations, or no such layer or batch.
    ValueError
        `net` lacks columns, has no gene in common with the data or no set of suitable size; `var_to_gene` lacks columns or has no
        variable of the data; no cells or no genes; repeated gene names; NaN or infinite expression values, or scaled ones with `"ora"` and a
        `min_log2fc`; a setting out of range; cells without a batch.

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

    from ..core.groups import active_groups, percentile_groups
    from ..core.null import matched_sets, random_cells
    from ..core.set_methods import StandingOut
    from ..core.set_search import Method, search

    _check(method, collection, directions, max_padj, min_log2fc, min_size, max_size, n_sets, n_null, min_expected)
    published = method == "scfeaturelens"
    percentile = PUBLISHED_PERCENTILE if published and percentile is None else percentile
    min_cells = (PUBLISHED_CELLS if published else MIN_CELLS) if min_cells is None else min_cells
    chosen_directions = (directions,) if isinstance(directions, str) else tuple(directions)
    held = holder(data, mod)
    a = _schema.activations(held, key)
    latent = None if model is None else _schema.latent(held, key).matrix
    expressed, rows = expression(data, held, layer=layer, use_raw=use_raw, var_mod=var_mod, model=model, latent=latent)
    if var_to_gene is not None:
        expressed = by_gene(expressed, var_to_gene)
    batches = None if batch is None else codes(held, batch, rows, "batch")
    genes, scaled = expressed.summary, expressed.scale == "scaled"
    if scaled and method == "ora" and min_log2fc > 0:
        raise ValueError(
            f"{expressed.where} has negative values, of which there are no fold changes, and method='ora' takes genes by "
            f"min_log2fc={min_log2fc}. Pass layer= with log-normalised values, or min_log2fc=0."
        )
    counted = _counted(background, expressed)
    if batches is not None and np.mean(np.bincount(batches)[batches] == 1) > 0.5:
        logg.warning(
            f"most cells have a batch ({held.where}.obs[{batch!r}]) of their own and cannot be exchanged with others: the "
            "permuted cells are the cells as they are, and fdr says nothing is found."
        )
    sets = match(net, expressed.genes[counted], min_size=min_size, max_size=max_size)
    collection = collection or default_collection(net)
    start = logg.info(
        f"testing {len(sets.names)} gene sets of {collection!r} for {a.shape[1]} features with {method!r}"
    )
    a, generator = cells_of(a, rows), np.random.default_rng(rng)
    groups = active_groups(a) if percentile is None else percentile_groups(a, percentile)
    n_random = _n_random(method, n_null, len(sets.names))
    random_sets = matched_sets(sets.weights, genes.mean[counted], n_random, generator, n_bins=_n_bins(counted))
    collections = [sets.weights, *random_sets]
    how = Method(
        method,
        StandingOut(max_padj, 0 if scaled else min_log2fc),
        chosen_directions,
        expressed.log_base,
        pseudocount,
        min_cells,
        min_expected,
        seed=int(generator.integers(2**31)),
    )
    with progress_bar((1 + n_null) * a.shape[1], "enrich", "feature", shown=progress) as bar:

        def run(groups: Groups, collections: list[sparse.csr_matrix], n_stored: int | None) -> list[Found]:
            found = []
            for part in search(groups, expressed.matrix, genes, counted, collections, how, n_stored=n_stored):
                found.append(part)
                bar.update(part.n_features)
            return found

        real = run(groups, collections, n_sets)
        held_in_memory = groups.in_memory() if n_null else groups
        permuted = [
            run(held_in_memory.reordered(random_cells(a.shape[0], batches, generator)), collections[:1], 0)
            for _ in range(n_null)
        ]
        bar.update((1 + n_null) * a.shape[1] - bar.n)

    columns = _columns(real, permuted, expressed.genes[counted])
    counts = _counts(real, permuted, columns, max_padj)
    place = {"collection": collection, "modality": var_mod or mod}
    table = _table(columns, _schema.feature_names(key, a.shape[1]), sets.names, place)
    summary = _summary(counts, a.shape[1], method, max_padj, place)
    stored = _schema.read(held, key)
    new = {
        "features": stored["features"].assign(enrichment_status=pd.Categorical(groups.status(min_cells))),
        "enrichment": _schema.replace_rows(stored.get("enrichment"), table, place),
        "enrichment_null": _schema.replace_rows(stored.get("enrichment_null"), summary, place),
    }
    _schema.write(held, key, {**stored, **new})
    if not any(part.n_features for part in real):
        logg.warning(f"no feature has {min_cells} cells on both sides, so none was tested; min_cells= sets the limit.")
    by_chance = f", {counts['annotated_permuted']:.1f} when cells are permuted" if n_null else ""
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['enrichment'], collection {collection!r}: {counts['annotated']} of "
        f"{a.shape[1]} features have a gene set at padj ≤ {max_padj}{by_chance}; {sets.left_out()}",
    )


def _check(
    method: str,
    collection: str | None,
    directions: Sequence[str],
    max_padj: float,
    min_log2fc: float,
    min_size: int,
    max_size: int | None,
    n_sets: int | None,
    n_null: int,
    min_expected: float,
) -> None:
    from ..core.set_methods import DIRECTIONS

    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if collection is not None and (not isinstance(collection, str) or not collection):
        raise ValueError(f"collection={collection!r} cannot name gene sets: it must be a non-empty string.")
    chosen = (directions,) if isinstance(directions, str) else tuple(directions)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(DIRECTIONS):
        raise ValueError(f"directions={directions!r} is not a list of some of {', '.join(map(repr, DIRECTIONS))}.")
    if method != "ora" and chosen != ("up", "down"):
        raise ValueError(
            f"directions={directions!r} is for method='ora'; {method!r} has its own. Leave directions= out."
        )
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
    if not min_expected >= 0:
        raise ValueError(f"min_expected={min_expected} is not a number of cells. Pass 0 or more; 0 tests every gene.")
    if isinstance(n_null, bool) or not isinstance(n_null, int | np.integer) or n_null < 0:
        raise ValueError(f"n_null={n_null} is not a number of permutations. Pass 1 or more, or 0 for none.")


def _counted(background: Sequence[str] | None, expressed: Expression) -> np.ndarray:
    """Mark the genes that take part: those that vary, of the background."""
    varies = expressed.summary.varies
    counted = varies if background is None else varies & _background(background, expressed)
    if counted.sum() < 2:
        also = "" if background is None else " and are in background="
        raise ValueError(
            f"{counted.sum()} genes of {expressed.where} vary over the cells{also}: gene sets can only be told from other genes."
        )
    return counted


def _background(background: Sequence[str], expressed: Expression) -> np.ndarray:
    """Mark the genes of the background."""
    if isinstance(background, str):
        raise TypeError(f"background is the string {background!r}; expected a list of genes.")
    chosen = pd.Index(background).astype(str)
    found = expressed.genes.isin(chosen)
    if not found.any():
        raise ValueError(
            f"background= has no gene of {expressed.where}: it has {listing(chosen, 5)}; the data has "
            f"{listing(expressed.genes, 5)}. Do both use the same identifiers (symbols or Ensembl ids)?"
        )
    return found


def _n_bins(counted: np.ndarray) -> int:
    """Bins of mean expression for random sets: 25 where each has 100 genes or more, so that a programme does not fill one."""
    return int(np.clip(counted.sum() // GENES_PER_BIN, 1, MAX_BINS))


def _n_random(method: str, n_null: int, n_sets: int) -> int:
    """Draws of all random sets: so many that every feature has a null of its own, where that takes little time."""
    return n_null if method in ("ulm", "gsea") or n_null == 0 else max(n_null, math.ceil(NULL_SETS / n_sets))


def _columns(real: list[Found], permuted: list[list[Found]], genes: pd.Index) -> dict[str, np.ndarray]:
    """Make the columns of the table: adjusted over everything, compared with both nulls, and with the names of genes."""
    from ..core.null import empirical_fdr
    from ..core.statistics import adjusted_among

    if not real:
        return {}
    columns = {name: np.concatenate([part.rows[name] for part in real]) for name in real[0].rows}
    log_pval, everything = columns.pop("log_pval"), np.concatenate([part.log_pval for part in real])
    columns["padj_all"] = adjusted_among(log_pval, everything, sum(part.n_tests for part in real))
    if permuted:
        null = np.concatenate([part.log_pval for run in permuted for part in run])
        by_cells = empirical_fdr(-log_pval, -everything, -null, len(permuted))
        columns["fdr"] = np.maximum(columns["fdr"], by_cells)
    else:
        columns["fdr"] = np.full(len(log_pval), np.nan)
    names, ends = genes[columns.pop("hits")].to_numpy(dtype=object), np.cumsum(columns["overlap"])
    listed = [SEPARATOR.join(names[end - n : end]) for n, end in zip(columns["overlap"], ends, strict=True)]
    columns["genes"] = np.array([*listed, None], dtype=object)[:-1]
    return columns


def _counts(
    real: list[Found], permuted: list[list[Found]], columns: dict[str, np.ndarray], max_padj: float
) -> dict[str, float]:
    """Count the features with a gene set, by adjusted p, by FDR, and in both nulls."""
    annotated = np.zeros((1, 2)) if not real else np.array([part.annotated for part in real])
    if not permuted:
        return {"annotated": annotated[:, 0].sum()} | dict.fromkeys(_schema.ANNOTATED[1:], np.nan)
    by_fdr = len(np.unique(columns["feature"][columns["fdr"] <= max_padj])) if real else 0
    by_chance = np.mean([sum(part.annotated[0] for part in run) for run in permuted])
    by_size = annotated[:, 1:].sum(axis=0).mean()
    return dict(zip(_schema.ANNOTATED, (annotated[:, 0].sum(), by_fdr, by_chance, by_size), strict=True))


def _table(
    columns: dict[str, np.ndarray], features: pd.Index, sets: pd.Index, place: dict[str, str | None]
) -> pd.DataFrame:
    """Make the table of gene sets."""
    from ..core.set_methods import DIRECTIONS

    columns["collection"] = np.zeros(len(columns.get("feature", ())), dtype=np.int64)
    collection = pd.Index([place["collection"]])
    categories = {"feature": features, "collection": collection, "gene_set": sets, "direction": pd.Index(DIRECTIONS)}
    return _of_modality(_schema.tidy(columns, _schema.ENRICHMENT, categories), place)


def _summary(
    counts: dict[str, float], n_features: int, method: str, max_padj: float, place: dict[str, str | None]
) -> pd.DataFrame:
    """Make the row that says what share of features has a gene set, and what share by chance."""
    shares = {name: count / n_features for name, count in counts.items()}
    row = {"collection": place["collection"], "method": method, "max_padj": max_padj, **shares}
    return _of_modality(pd.DataFrame([row]).astype({"collection": "category", "method": "category"}), place)


def _of_modality(table: pd.DataFrame, place: dict[str, str | None]) -> pd.DataFrame:
    """Add the modality of a MuData as a column."""
    modality = place["modality"]
    return table if modality is None else table.assign(modality=pd.Categorical([modality] * len(table)))
