from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from .._perturbed import PerturbedCells, Targets, perturbed_cells, targets_of
from .._progress import progress_bar
from ..core.rows import select_rows

if TYPE_CHECKING:
    from scipy import sparse

    from ..core.perturbation import Response

FEATURES = (
    "groupby", "perturbation", "feature", "difference", "active", "control_active", "auroc", "score", "pval", "padj", "fdr",
    "responds",
)  # fmt: skip
SUMMARY = (
    "groupby", "perturbation", "status", "n_cells", "n_control", "n_responding", "n_permuted", "pval", "padj",
    "best_feature", "best_auroc", "best_fdr", "target", "target_status", "target_log2fc", "target_feature",
    "target_correlation", "target_rank", "target_percentile", "target_pval",
)  # fmt: skip
TARGETS = ("groupby", "n_targets", "percentile", "expected", "pval_random", "pval_exchanged")
PLACE = ("correlation", "rank", "percentile", "pval")
TEXT = ("status", "best_feature", "target", "target_status", "target_feature")
PSEUDOCOUNT = 0.1


def perturbation(
    data: Data,
    groupby: str,
    control: str | Sequence[str],
    *,
    key: str = "sae",
    mod: str | None = None,
    var_mod: str | None = None,
    layer: str | None = None,
    batch: str | None = None,
    target: Mapping[str, str | Sequence[str]] | str | None = None,
    min_cells: int = 10,
    max_fdr: float = 0.05,
    n_permutations: int = 200,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    """Find the features that respond to perturbations (CRISPR, drugs), and whether the perturbed gene is among their genes.

    For each perturbation and each feature, perturbed cells (1) are compared with control cells (0):

    * `difference` of mean activations, and the share of cells where the feature is active (`active`, `control_active`); with
      `batch`, within batches, averaged with the weights n₁ n₀ / (n₁ + n₀) of each;
    * `auroc`, the probability that a perturbed cell has the higher activation than a control (of its batch), ties counted half;
    * `score`, the z of the rank-sum test (within batches: van Elteren's), `pval`, its two-sided normal approximation, and
      `padj`, adjusted over all features and perturbations of the call (Benjamini-Hochberg);
    * `fdr`, the false discovery rate among the features of this perturbation with an abs(z) as large. It is estimated from
      the same tests with labels permuted among the perturbed and control cells (of each batch): (1 + permuted tests as large) /
      permutations / (tests as large). A feature responds where it is at most `max_fdr`. It is of one perturbation because
      otherwise strong perturbations lower the threshold for those that do nothing.

    Then the target, the gene that was knocked out, say, if it was measured: is it among the genes of a feature that responds?
    Perturbed cells cannot tell, for they have both the response and less of the target. So genes are taken from the other
    cells: all labelled ones, control or not, but those whose perturbation has this target. In these, genes are ordered by
    abs(r), Pearson's correlation of expression and activation (within batches), with `target_feature`, the responding feature
    of largest abs(z). `target_rank` and `target_percentile` are the place of the target among all genes; `target_pval` is the
    share of features for which it stands as high, among this one and the 50 that are active in about as many cells, for a gene
    may stand high for any feature. Of several targets the one that stands highest counts, for these features too.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    groupby
        Column of `obs`, categorical, string or boolean: the perturbation of each cell (a gene, a guide, a drug, a condition).
        Cells without one are left out.
    control
        The label of control cells (non-targeting, vehicle), or several labels.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    var_mod
        The modality whose genes the targets are looked up in, by default `mod`. Cells are matched by `obs_names`.
    layer
        Expression for the targets: this layer, else `.raw` if there is one, else `X`; in memory, on disk or a dask array.
    batch
        Column of `obs` (replicates, donors): compare and permute within its values only. Values without perturbed or
        without control cells do not count.
    target
        The genes of a perturbation: a dict of label and gene, or genes; or a column of `obs`, such as the target of the guide.
        By default the label itself, where it is the name of a gene.
    min_cells
        Perturbations with fewer cells or controls to compare are skipped, with a warning in the log. Of the others, features
        that are active in fewer of the compared cells are not tested.
    max_fdr
        Features up to this false discovery rate respond.
    n_permutations
        Of the labels. The smallest `pval` of a perturbation is 1 / (`n_permutations` + 1).
    rng
        Seed or generator, for the permutations and the nulls of the targets.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes tables to `uns[key]["perturbation"]`; rows of another `groupby` are kept.

    * `"features"`, a row per perturbation and tested feature: `groupby`, `perturbation`, `feature`, `difference`, `active`,
      `control_active`, `auroc`, `score`, `pval`, `padj`, `fdr`, `responds`.
    * `"summary"`, a row per perturbation: `status`, `"tested"` or why not; `n_cells` and `n_control`, those compared;
      `n_responding`, and `n_permuted`, the features that reach the same abs(z) with permuted labels (mean); `pval`, whether the
      perturbation does anything: the share of permutations with a largest abs(z) as high, the real labels included, and `padj`,
      adjusted over perturbations; `best_feature`, of largest abs(z), `best_auroc` and `best_fdr`; `target`, `target_status`
      (`"placed"`, or why not), `target_log2fc` of its mean expression, all perturbed against all control cells, `target_feature`,
      `target_correlation` (r), `target_rank` (1 is best), `target_percentile` (the share of the other genes that stand lower)
      and `target_pval`.
    * `"targets"`, a single row, on all placed targets together: `n_targets`; their mean `percentile`; the one `expected` of
      features of like activity; p-values of the mean, against 10,000 draws of such features, `pval_random`, and against
      targets exchanged between perturbations, `pval_exchanged`, which asks for more: that the features that respond to a
      perturbation know its target better than those of others.

    Raises
    ------
    KeyError
        There are no activations, or no such column or layer; `target` names perturbations that are not there.
    ValueError
        The column is continuous; no cell has the control label; too few control cells; no perturbation with enough cells; cells
        without a batch; none of the given targets was measured; NaN or infinite expression; a setting out of range.

    Notes
    -----
    All p-values, and permutations, take cells as independent, which those of one guide, clone or culture are not. To see how
    much differs without any perturbation, compare control guides with each other: `groupby` a column of guides, one of the
    non-targeting ones as the perturbation. With `batch`, `pval` of features with few active cells is too small in the far
    tail (by a factor of about 3 at 1e-4); what is from permutations is not concerned.

    Transcripts of the target are among what an embedding of expression reads. Where the perturbation removes them
    (`target_log2fc`), a feature that knows the target responds for that reason alone. To rule this out, leave the targets out of
    the embedding (`sc.pp.pca(..., mask_var=)`); they can stay in `X`. A feature that responds need not know the target, either:
    what a receptor sets off does not tell how many transcripts it has.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> b_cells = adata.obs["bulk_labels"] == "CD19+ B"
    >>> adata.obs["condition"] = b_cells.map({True: "B cells", False: "others"})
    >>> sae.tl.perturbation(adata, "condition", control="others", target={"B cells": "CD79A"})
    >>> summary = adata.uns["sae"]["perturbation"]["summary"]
    >>> bool(summary["n_responding"].iloc[0] > 0)
    True
    """
    from scanpy import logging as logg

    if not isinstance(n_permutations, int | np.integer) or n_permutations < 1:
        raise ValueError(
            f"n_permutations={n_permutations!r} is not an integer of 1 or more; without any there is no false discovery rate."
        )
    if not isinstance(min_cells, int | np.integer) or min_cells < 2:
        raise ValueError(f"min_cells={min_cells!r} is not an integer of 2 or more. Pass the fewest cells to compare.")
    if not 0 < max_fdr <= 1:
        raise ValueError(f"max_fdr={max_fdr} is not a rate above 0, up to 1.")
    held = holder(data, mod)
    a = _schema.activations_in_memory(held, key)
    cells = perturbed_cells(held, groupby, control, batch, min_cells)
    targets = targets_of(data, held, cells, target, layer=layer, var_mod=var_mod)
    rng = np.random.default_rng(rng)

    settings: dict[str, Any] = {"n_permutations": n_permutations, "min_cells": min_cells, "max_fdr": max_fdr}
    start = logg.info(f"comparing {a.shape[1]} features in {len(cells.names)} groups of {groupby!r} with controls")
    found = []
    with progress_bar(len(cells.names), "perturbations", "perturbation", shown=progress) as bar:
        for number in range(len(cells.names)):
            found.append(_compared(a, cells, number, rng, **settings))
            bar.update()
    skipped = cells.names[[one.response is None for one in found]]
    few = f"fewer than {min_cells} cells or controls" + (f" in values of {batch!r} that have both" if batch else "")
    if len(skipped) == len(found):
        raise ValueError(
            f"{cells.where} has no perturbation to compare: {listing(skipped)} have {few}. Lower min_cells=."
        )
    features = _schema.feature_names(key, a.shape[1])
    tests = _tests(found, max_fdr)
    rows = _summary(found, tests, features, few)
    overall: dict[str, Any] = dict.fromkeys(TARGETS, np.nan) | {"n_targets": 0}
    if targets is not None:
        overall |= _place_targets(rows, a, cells, tests, targets, features, min_cells, rng)

    stored = _schema.read(held, key)
    tables = dict(stored.get("perturbation", {}))
    for name, table in _tables(rows, tests, overall, groupby, cells.names, features).items():
        tables[name] = _schema.replace_rows(tables.get(name), table, {"groupby": groupby})
    _schema.write(held, key, {**stored, "perturbation": tables})

    if len(skipped):
        logg.warning(f"{len(skipped)} perturbations of {groupby!r} were skipped, with {few}: {listing(skipped)}.")
    n_responding = np.array([row["n_responding"] for row in rows])
    by_chance = np.nansum([row["n_permuted"] for row in rows])
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['perturbation'], groupby {groupby!r}: {(n_responding > 0).sum()} of "
        f"{len(rows)} perturbations have features that respond; {n_responding.sum()} in all, {by_chance:.1f} with permuted "
        f"labels; {overall['n_targets']} targets placed among the genes of a feature",
    )


@dataclass(frozen=True)
class _Compared:
    """One perturbation compared with its controls; without a response it was skipped."""

    response: Response | None
    n_cells: int
    n_control: int


def _compared(
    a: sparse.csr_matrix,
    cells: PerturbedCells,
    number: int,
    rng: np.random.Generator,
    *,
    n_permutations: int,
    min_cells: int,
    max_fdr: float,
) -> _Compared:
    """Compare the cells of one perturbation with the controls of the same batches."""
    from ..core.perturbation import comparable, respond

    rows = np.flatnonzero((cells.codes == 0) | (cells.codes == number + 1))
    rows = rows[comparable(cells.codes[rows] > 0, cells.strata[rows])]
    perturbed = cells.codes[rows] > 0
    n_cells = int(perturbed.sum())
    n_control = len(rows) - n_cells
    if min(n_cells, n_control) < min_cells:
        return _Compared(None, n_cells, n_control)
    response = respond(
        a[rows], perturbed, cells.strata[rows], n_permutations, rng, min_cells=min_cells, max_fdr=max_fdr
    )
    return _Compared(response, n_cells, n_control)


def _tests(found: list[_Compared], max_fdr: float) -> dict[str, np.ndarray]:
    """Put the tests of all perturbations one below the other; `perturbation` and `feature` are numbers."""
    from ..core.statistics import benjamini_hochberg

    numbers, responses = zip(*((i, one.response) for i, one in enumerate(found) if one.response), strict=True)
    tests = {
        "perturbation": np.repeat(numbers, [len(response.features) for response in responses]),
        "feature": np.concatenate([response.features for response in responses]),
    }
    for name in ("difference", "active", "control_active", "auroc", "score", "pval", "fdr"):
        tests[name] = np.concatenate([getattr(response, name) for response in responses])
    return tests | {"padj": benjamini_hochberg(tests["pval"]), "responds": tests["fdr"] <= max_fdr}


def _summary(
    found: list[_Compared], tests: dict[str, np.ndarray], features: pd.Index, few: str
) -> list[dict[str, Any]]:
    """Make a row for each perturbation; targets are added later."""
    from ..core.statistics import benjamini_hochberg

    size = np.abs(tests["score"])
    pval = np.array([np.nan if one.response is None else one.response.pval_any for one in found])
    padj = benjamini_hochberg(pval)
    rows: list[dict[str, Any]] = []
    for i, (one, tested) in enumerate(zip(found, _parts(tests, len(found)), strict=True)):
        row: dict[str, Any] = dict.fromkeys(SUMMARY, np.nan) | dict.fromkeys(TEXT) | {"status": few}
        row |= {"n_cells": one.n_cells, "n_control": one.n_control, "n_responding": 0, "target_status": "not measured"}
        if one.response is not None:
            row |= {
                "status": "tested",
                "n_responding": int(tests["responds"][tested].sum()),
                "n_permuted": one.response.n_permuted,
                "pval": pval[i],
                "padj": padj[i],
            }
        if one.response is not None and len(size[tested]) == 0:
            row["status"] = "no feature differs between enough cells"
        if len(size[tested]):
            best = tested.start + size[tested].argmax()
            row |= {
                "best_feature": features[tests["feature"][best]],
                "best_auroc": tests["auroc"][best],
                "best_fdr": tests["fdr"][best],
            }
        rows.append(row)
    return rows


def _parts(tests: dict[str, np.ndarray], n: int) -> list[slice]:
    """Find the tests of each perturbation."""
    bounds = np.searchsorted(tests["perturbation"], np.arange(n + 1))
    return [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]


def _place_targets(
    rows: list[dict[str, Any]],
    a: sparse.csr_matrix,
    cells: PerturbedCells,
    tests: dict[str, np.ndarray],
    targets: Targets,
    features: pd.Index,
    min_cells: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Write into the rows where the targets stand among the genes of a feature; return the test of all targets together."""
    from ..core.perturbation import group_means, place_targets
    from ..core.statistics import log2_fold_change

    genes, codes = targets.genes, cells.codes[targets.rows]
    labelled = np.flatnonzero(codes >= 0)
    codes, strata = codes[labelled], cells.strata[targets.rows][labelled]
    a, x = a[targets.rows][labelled], select_rows(targets.expressed.matrix, labelled)
    measured = [i for i in range(len(rows)) if len(genes[i])]
    shown = {i: genes[i][0] for i in measured}
    for i in measured:
        rows[i]["target_status"] = "no feature responds"
    asked = [i for i in measured if rows[i]["n_responding"]]
    overall = {}
    if asked:
        own = [
            np.isin(codes, [j + 1 for j in measured if np.isin(genes[j], genes[i]).any()]).nonzero()[0] for i in asked
        ]
        strength = np.zeros((len(rows), a.shape[1]))
        some = tests["responds"]
        strength[tests["perturbation"][some], tests["feature"][some]] = np.abs(tests["score"][some])
        placed = place_targets(a, x, strata, own, [genes[i] for i in asked], strength[asked], rng, min_cells=min_cells)
        for place, i in enumerate(asked):
            if placed.feature[place] < 0:
                rows[i]["target_status"] = f"no responding feature in {min_cells} cells without the perturbation"
            elif placed.gene[place] < 0:
                rows[i]["target_status"] = "the same in all cells without the perturbation"
            else:
                shown[i] = placed.gene[place]
                rows[i] |= {"target_status": "placed", "target_feature": features[placed.feature[place]]}
                rows[i] |= {f"target_{name}": getattr(placed, name)[place] for name in PLACE}
        overall = {name: getattr(placed, name) for name in TARGETS[3:]}
        known = placed.percentile[placed.gene >= 0]
        overall |= {"n_targets": len(known), "percentile": known.mean() if len(known) else np.nan}
    means = np.maximum(group_means(x, codes, len(rows) + 1, np.array(list(shown.values()), dtype=np.int64)), 0)
    for column, (i, gene) in enumerate(shown.items()):
        pair = means[i + 1, column], means[0, column]
        log2fc = log2_fold_change(*pair, log_base=targets.expressed.log_base, pseudocount=PSEUDOCOUNT)
        rows[i] |= {"target": targets.expressed.genes[gene], "target_log2fc": log2fc}
    return overall


def _tables(
    rows: list[dict[str, Any]],
    tests: dict[str, np.ndarray],
    overall: dict[str, Any],
    groupby: str,
    names: pd.Index,
    features: pd.Index,
) -> dict[str, pd.DataFrame]:
    """Make the three tables."""
    summary = {name: np.array([row[name] for row in rows], object if name in TEXT else None) for name in rows[0]}
    summary["perturbation"] = np.arange(len(rows))
    targets = {name: np.array([value]) for name, value in overall.items()}
    tables = {"features": (tests, FEATURES), "summary": (summary, SUMMARY), "targets": (targets, TARGETS)}
    categories = {"groupby": pd.Index([groupby]), "perturbation": names, "feature": features}
    made = {}
    for table, (columns, order) in tables.items():
        columns["groupby"] = np.zeros(len(next(iter(columns.values()))), dtype=np.int64)
        made[table] = _schema.tidy(columns, order, {name: categories[name] for name in order if name in categories})
    return made
