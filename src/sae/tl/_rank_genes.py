from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder
from .._design import codes, design, indicators
from .._expression import cells_of, expression
from .._progress import progress_bar

if TYPE_CHECKING:
    from ..core.differential import Differential
    from ..core.groups import Groups
    from ..core.moments import Genes
    from ..core.rows import Matrix

METHODS = ("welch", "wilcoxon", "regression")
PSEUDOCOUNT = 0.1


def rank_genes(
    data: Data,
    *,
    key: str = "sae",
    method: Literal["welch", "wilcoxon", "regression"] = "welch",
    batch: str | None = None,
    donor: str | None = None,
    covariates: Sequence[str] | None = None,
    percentile: float | None = None,
    layer: str | None = None,
    use_raw: bool | None = None,
    model: object | None = None,
    mod: str | None = None,
    var_mod: str | None = None,
    n_genes: int | None = 100,
    min_cells: int = 10,
    min_expected: float = 30,
    pseudocount: float = PSEUDOCOUNT,
    progress: bool = True,
) -> None:
    r"""Find the genes of every feature: differential expression of its active against its inactive cells.

    With 1 the cells where the feature is active (activation > 0) and 0 the others,

    * `"welch"`: Welch's t-test for unequal variances on the expression values,

      .. math::
          t = (\bar{x}_1 - \bar{x}_0) / \sqrt{s_1^2 / n_1 + s_0^2 / n_0}

    * `"wilcoxon"`: the rank-sum test, with corrections for ties and continuity; `score` is its z.
    * `"regression"`: least squares on the activation a itself, and on `covariates`; `score` is the t of β in

      .. math::
          x = \alpha + \beta a + C \gamma + \varepsilon

    P-values are two-sided, adjusted within a feature over all genes that are tested (Benjamini-Hochberg). The fold change is
    log2((m₁ + c) / (m₀ + c)) with the pseudocount c and m = expm1(x̄) for log1p values (not all integers, all below 50; of
    the base in `uns["log1p"]`, else e), m = x̄ otherwise. Scaled values (some negative) have none: NaN. A warning in the log says
    what was recognised, if not log1p values. For a regression, x̄₁ is the fitted value at the mean activation
    of the active cells, x̄₀ at the lowest activation, which is 0 where some cell is inactive.

    Cells of one batch or donor are alike, and a test that takes them as independent finds what differs between batches, or
    in one donor of many cells, significant. `batch=` compares cells of the same batch only: differences d_b of means within
    each batch are averaged (`"welch"`),

    .. math::
        t = \sum_b w_b d_b \Big/ \sqrt{\sum_b w_b^2 (s_{1b}^2 / n_{1b} + s_{0b}^2 / n_{0b})}, \qquad
        w_b = \frac{n_{1b} n_{0b}}{n_{1b} + n_{0b}}

    over batches with at least two active and two inactive cells; cells are ranked within batches, with weights 1/(n_b + 1)
    (`"wilcoxon"`: van Elteren's test); or batches are covariates (`"regression"`). `donor=` makes the donors the sample: the
    t-test of the differences of means d_j in J donors, t = d̄ √J / s_d with J − 1 degrees of freedom.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod` (or `var_mod`, for an SAE on the MuData itself), with activations.
    key
        Name of the SAE.
    method
        `"welch"`, `"wilcoxon"` or `"regression"`.
    batch
        Column of `obs`: compare within batches (samples, plates, technologies).
    donor
        Column of `obs`: test over donors (patients, animals, or cultures that stand for them), each of which counts once; with
        `"welch"` only. A donor counts for a feature with three active and three inactive cells, and three such donors are needed.
    covariates
        Columns of `obs` that a regression takes account of: numbers as they are, others as categories.
    percentile
        Compare only the cells where the activation is above this percentile of all cells with the cells where it is zero, and
        use no others (arXiv:2410.11468, with 99). Where fewer cells than that are active, all of them are used. With
        `"welch"` only.
    layer, use_raw
        Expression to read: this layer, else `.raw` if there is one (unless `use_raw=False`), else `X`. It may be on disk (backed,
        Zarr, a memory map) or a dask array, and is then read in chunks of cells, as the activations are if they are on disk. A
        dask array on a `dask.distributed` cluster is gone through by its workers, but for `"wilcoxon"`.
    model
        Test what a model predicts instead of data (as arXiv:2410.11468 does): one of `sae.models`, or an object with a method
        `decode(z, data)` that returns the expression of the cells in `data`, a part of the AnnData, given their latent `z` (cells ×
        dimensions), which is the representation that was encoded: an array (cells × the genes of `data`), an AnnData, or a dict with
        one of them per modality, of which `var_mod` names one. It is called for chunks of cells, for all of them at least twice, and
        must always give the same. Genes that are NaN everywhere are left out.
    mod
        The modality that holds the SAE.
    var_mod
        The modality whose variables are tested, by default `mod`. Cells are matched by `obs_names`. With `model`, the modality of its
        prediction, also for an AnnData.
    n_genes
        Genes to store per feature and direction, best first; None for all. Adjusted p-values are over all genes.
    min_cells
        Features that are active in fewer cells are not tested, nor (but for `"regression"`) those that are inactive in fewer.
    min_expected
        Of Welch's test, also within batches and over donors: a gene is not tested for a feature if fewer cells than this are
        expected to have it in the group that has less of it, n x̄² / s² with the n of that group, x̄ and s of the other.
        Where next to no cell has a gene there is next to no variance, and any difference seems significant: with 30, 5 ± 0.5 %
        of genes have p < 0.05 when cells are permuted. 0 tests all.
        Of the rank-sum test without `batch`: where fewer cells than this are expected to have a gene in the smaller group, and
        that has more of it, p is that of how many of its cells have the gene and of their ranks, if this is larger than that of
        the normal approximation, and `score` the z that has this p. 0 takes the normal approximation for all.
    pseudocount
        c above, in the unit of the un-logged values: 0.1 is a tenth of a count per 10,000 after the usual normalisation.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `uns[key]["features"]["genes_status"]`, `"tested"` or why not, and `uns[key]["genes"]`, a row per feature and
    gene: `feature`, `gene`, `score` (t or z), `log2fc`, `pval`,
    `padj`, and `modality` for a MuData.

    Raises
    ------
    KeyError
        There are no activations, or no such layer or column.
    ValueError
        No cells or no genes; NaN or infinite expression values; `model` together with `layer`; repeated gene names; a setting out of range, or one that the method
        does not have; cells without a batch, donor or covariate; a continuous batch or donor; fewer than three donors; as many
        covariates as cells.
    TypeError
        Expression of an unknown kind; a model without `decode`.

    Notes
    -----
    A gene with one value in all active cells and another in all others has an infinite `score`.

    `batch=` removes what differs between batches, and still takes the cells of a batch as independent: for a claim about
    donors in general, use `donor=`. It needs donors: with three, only large effects reach significance.

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

    from ..core.groups import active_groups, percentile_groups
    from ..core.strata import MIN_DONORS

    _check(method, n_genes, percentile=percentile, batch=batch, donor=donor, covariates=covariates)
    held = holder(data, mod)
    a = _schema.activations(held, key)
    latent = None if model is None else _schema.latent(held, key).matrix
    expressed, rows = expression(data, held, layer=layer, use_raw=use_raw, var_mod=var_mod, model=model, latent=latent)
    how = _How(
        method,
        None if batch is None else codes(held, batch, rows, "batch"),
        None if donor is None else codes(held, donor, rows, "donor", least=MIN_DONORS),
        design(held, covariates or (), rows),
        {"log_base": expressed.log_base, "pseudocount": pseudocount, "min_cells": min_cells},
        min_expected,
    )
    start = logg.info(f"ranking {len(expressed.genes)} variables of {expressed.where} for {a.shape[1]} features")
    a = cells_of(a, rows)
    groups = active_groups(a) if percentile is None else percentile_groups(a, percentile)
    with progress_bar(a.shape[1], "genes", "feature", shown=progress) as bar:
        blocks, imprecise, tested = [], 0, np.zeros(a.shape[1], dtype=bool)
        for block in _compared(groups, expressed.matrix, expressed.summary, how):
            blocks.append(_best_genes(block, n_genes))
            imprecise += block.imprecise
            tested[block.features] = np.isfinite(block.pval).any(axis=1)
            bar.update(len(block.features))
        bar.update(a.shape[1] - bar.n)
    if imprecise:
        logg.warning(
            f"{imprecise} variances (within a group, or of residuals) are below 1e-10 of the squared mean, where float64 sums are "
            "good to fewer than six digits: subtract what the cells have in common, or leave these genes out."
        )
    if not tested.any():
        logg.warning(
            f"no feature was tested: {held.where}.uns[{key!r}]['features']['genes_status'] says why. min_cells= (of each side) and "
            "min_expected= set the limits."
        )
    table = _table(blocks, _schema.feature_names(key, a.shape[1]), expressed.genes)
    modality = var_mod or mod
    if modality is not None:
        table["modality"] = pd.Categorical([modality] * len(table))
    stored = _schema.read(held, key)
    status = pd.Categorical(_status(groups, tested, min_cells, donor))
    new = {
        "features": stored["features"].assign(genes_status=status),
        "genes": _schema.replace_rows(stored.get("genes"), table, {"modality": modality}),
    }
    _schema.write(held, key, {**stored, **new})
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['genes'], {len(table)} rows for {tested.sum()} features; "
        f"['features']['genes_status'] says why not for the others",
    )


def _check(
    method: str,
    n_genes: int | None,
    *,
    percentile: float | None,
    batch: str | None,
    donor: str | None,
    covariates: Sequence[str] | None,
) -> None:
    if n_genes is not None and n_genes < 1:
        raise ValueError(f"n_genes={n_genes} is below 1. Pass the number of genes per feature and direction, or None.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(map(repr, METHODS))}.")
    if method != "welch" and percentile is not None:
        raise ValueError(
            f"method={method!r} uses all cells, percentile={percentile} leaves some out. Use method='welch', or leave "
            "percentile= out."
        )
    if method != "welch" and donor is not None:
        raise ValueError(
            f"method={method!r} takes cells as independent, and donor={donor!r} makes the donors the sample. Use "
            "method='welch', or batch= to compare within donors."
        )
    if method != "regression" and covariates is not None:
        raise ValueError(
            f"method={method!r} has no covariates. Use method='regression', or batch= for a categorical one, to compare "
            "within its categories."
        )
    if batch is not None and donor is not None:
        raise ValueError(
            f"Both batch={batch!r} and donor={donor!r} were given. Pass one of them: differences are taken within donors, "
            "so that a donor's batch plays no part if all its cells are of one."
        )


@dataclass(frozen=True)
class _How:
    """How they are compared; `batch` and `donor` are codes (n,), `covariates` (n, c)."""

    method: str
    batch: np.ndarray | None
    donor: np.ndarray | None
    covariates: np.ndarray
    limits: dict[str, Any]
    min_expected: float


def _compared(groups: Groups, x: Matrix, genes: Genes, how: _How) -> Iterator[Differential]:
    """Compare the cells of every feature by any method."""
    from ..core.differential import differential
    from ..core.regression import regression
    from ..core.strata import by_donor, stratified
    from ..core.wilcoxon import wilcoxon

    if how.method == "regression":
        covariates = how.covariates if how.batch is None else np.hstack([how.covariates, indicators(how.batch)])
        yield from regression(groups, x, genes, covariates, **how.limits)
        return
    limits = {**how.limits, "min_expected": how.min_expected}
    if how.donor is not None:
        blocks = by_donor(groups, x, genes, how.donor, **limits)
    elif how.batch is not None:
        blocks = stratified(groups, x, genes, how.batch, **limits)
    else:
        blocks = differential(groups, x, genes, **limits)
    if how.method == "welch":
        yield from blocks
        return
    ranks = wilcoxon(groups, x, how.batch, min_cells=how.limits["min_cells"], min_expected=how.min_expected)
    for block, ranked in zip(blocks, ranks, strict=True):
        found = {name: getattr(ranked, name) for name in ("score", "pval", "log_pval", "padj")}
        yield replace(block, **found, either_way=np.isfinite(ranked.pval))


def _status(groups: Groups, tested: np.ndarray, min_cells: int, donor: str | None) -> np.ndarray:
    """Say of each feature whether it was tested, or why not."""
    reason = groups.status(min_cells)
    other = "no gene that could be tested" + (", or too few donors with active and inactive cells" if donor else "")
    return np.where(tested, "tested", np.where(reason == "tested", other, reason)).astype(object)


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
