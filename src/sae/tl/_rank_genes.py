from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, expression, holder
from .._progress import progress_bar

if TYPE_CHECKING:
    from scipy import sparse

    from .._data import Expression
    from ..core.differential import Differential

METHODS = ("welch", "wilcoxon")
PSEUDOCOUNT = 0.1


def rank_genes(
    data: Data,
    *,
    key: str = "sae",
    method: Literal["welch", "wilcoxon"] = "welch",
    percentile: float | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    model: object | None = None,
    mod: str | None = None,
    var_mod: str | None = None,
    n_genes: int | None = 100,
    min_cells: int = 3,
    pseudocount: float = PSEUDOCOUNT,
    progress: bool = True,
) -> None:
    r"""Find the genes of every feature: differential expression of its active against its inactive cells.

    With 1 the cells where the feature is active (activation > 0) and 0 the others,

    * `"welch"`: Welch's t-test for unequal variances on the expression values,

      .. math::
          t = (\bar{x}_1 - \bar{x}_0) / \sqrt{s_1^2 / n_1 + s_0^2 / n_0}

    * `"wilcoxon"`: the rank-sum test, with corrections for ties and continuity; `score` is its z.

    P-values are two-sided, adjusted within a feature over all genes that vary (Benjamini-Hochberg). The fold change is
    log2((m₁ + c) / (m₀ + c)) with the pseudocount c and m = expm1(x̄) for log1p values (not all integers, all below 50; of
    the base in `uns["log1p"]`, else e), m = x̄ otherwise. Scaled values (some negative) have none: NaN. A warning in the log says
    what was recognised, if not log1p values.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod` (or `var_mod`, for an SAE on the MuData itself), with activations.
    key
        Name of the SAE.
    method
        `"welch"` or `"wilcoxon"`.
    percentile
        Compare only the cells where the activation is above this percentile of all cells with the cells where it is zero, and
        use no others (arXiv:2410.11468, with 99). Where fewer cells than that are active, all of them are used. With
        `"welch"` only.
    layer, use_raw
        Expression to read: this layer, else `.raw` if there is one (unless `use_raw=False`), else `X`. It may be on disk (backed,
        Zarr, a memory map) or a dask array, and is then read in chunks of cells.
    model
        Test what a model predicts instead of data (as arXiv:2410.11468 does). An object with a method `decode(z, data)` that
        returns the expression of the cells in `data`, a part of the AnnData, given their latent `z` (cells × dimensions), which
        is the representation that was encoded: an array (cells × the genes of `data`), or an AnnData. It is called for chunks of
        cells, for all of them at least twice, and must always give the same. Genes that are NaN everywhere are left out.
    mod
        The modality that holds the SAE.
    var_mod
        The modality whose variables are tested, by default `mod`. Cells are matched by `obs_names`.
    n_genes
        Genes to store per feature and direction, best first; None for all. Adjusted p-values are over all genes.
    min_cells
        Features that are active, or inactive, in fewer cells are not tested.
    pseudocount
        c above, in the unit of the un-logged values: 0.1 is a tenth of a count per 10,000 after the usual normalisation.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `uns[key]["genes"]`, a row per feature and gene: `feature`, `gene`, `score` (t or z), `log2fc`, `pval`,
    `padj`, and `modality` for a MuData.

    Raises
    ------
    KeyError
        There are no activations, or no such layer.
    ValueError
        NaN or infinite expression values; repeated gene names; a setting out of range; `model` together with `layer`.
    TypeError
        Expression of an unknown kind; a model without `decode`.

    Notes
    -----
    With few active cells Welch's test is too liberal for genes expressed in only some of them; read p-values of features with
    fewer than about 30 active cells as a ranking.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata, n_genes=10)
    >>> list(sae.get.genes(adata, feature=0).columns)
    ['feature', 'gene', 'score', 'log2fc', 'pval', 'padj']
    """
    from scanpy import logging as logg

    if n_genes is not None and n_genes < 1:
        raise ValueError(f"n_genes={n_genes} is below 1. Pass the number of genes per feature and direction, or None.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if method == "wilcoxon" and percentile is not None:
        raise ValueError(
            f"method='wilcoxon' ranks all cells, percentile={percentile} leaves some out. Use method='welch', or leave "
            "percentile= out."
        )
    held = holder(data, mod)
    a = _schema.activations(held, key)
    latent = None if model is None else _schema.latent(held, key).matrix
    expressed, rows = expression(data, held, layer=layer, use_raw=use_raw, var_mod=var_mod, model=model, latent=latent)
    start = logg.info(f"ranking {len(expressed.genes)} genes of {expressed.where} for {a.shape[1]} features")
    with progress_bar(a.shape[1], "genes", "feature", shown=progress) as bar:
        blocks, imprecise = [], 0
        for block in _compared(a[rows], expressed, method, percentile, pseudocount, min_cells):
            blocks.append(_best_genes(block, n_genes))
            imprecise += block.imprecise
            bar.update(len(block.features))
        bar.update(a.shape[1] - bar.n)
    if imprecise:
        logg.warning(
            f"{imprecise} variances within a group are below 1e-10 of the squared mean, where float64 sums are good to fewer "
            "than six digits: subtract what the cells have in common, or leave these genes out."
        )
    table = _table(blocks, _schema.feature_names(key, a.shape[1]), expressed.genes)
    modality = var_mod or mod
    if modality is not None:
        table["modality"] = pd.Categorical([modality] * len(table))
    n_ranked = table["feature"].nunique()
    stored = _schema.read(held, key)
    table = _schema.replace_rows(stored.get("genes"), table, {"modality": modality})
    _schema.write(held, key, {**stored, "genes": table})
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['genes'], {len(table)} rows for {n_ranked} features; "
        f"those with fewer than {min_cells} active or inactive cells were not tested",
    )


def _compared(
    a: sparse.csr_matrix,
    expressed: Expression,
    method: str,
    percentile: float | None,
    pseudocount: float,
    min_cells: int,
) -> Iterator[Differential]:
    """Compare the cells of every feature by either method."""
    from ..core.differential import differential
    from ..core.groups import active_groups, percentile_groups
    from ..core.wilcoxon import wilcoxon

    groups = active_groups(a) if percentile is None else percentile_groups(a, percentile)
    x = expressed.matrix
    blocks = differential(
        groups, x, expressed.summary, log_base=expressed.log_base, pseudocount=pseudocount, min_cells=min_cells
    )
    if method == "welch":
        yield from blocks
        return
    for block, ranked in zip(blocks, wilcoxon(a, x, min_cells=min_cells), strict=True):
        yield replace(block, score=ranked.score, pval=ranked.pval, padj=ranked.padj)


def _best_genes(block: Differential, n_genes: int | None) -> dict[str, np.ndarray]:
    """Keep the best genes of each feature in each direction, from the most raised to the most lowered."""
    order = np.argsort(-block.score, axis=1, kind="stable")
    columns = {
        name: np.take_along_axis(getattr(block, name), order, axis=1) for name in ("score", "log2fc", "pval", "padj")
    }
    kept = np.isfinite(columns["pval"])
    if n_genes is not None:
        place = np.arange(order.shape[1])
        raised = (place < n_genes) & (columns["score"] > 0)
        lowered = (place >= order.shape[1] - n_genes) & (columns["score"] < 0)
        kept &= raised | lowered
    features = np.broadcast_to(block.features[:, None], order.shape)
    return {name: values[kept] for name, values in {"feature": features, "gene": order, **columns}.items()}


def _table(blocks: list[dict[str, np.ndarray]], features: pd.Index, genes: pd.Index) -> pd.DataFrame:
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in _schema.GENES} if blocks else {}
    return _schema.tidy(columns, _schema.GENES, {"feature": features, "gene": genes})
