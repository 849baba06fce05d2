"""How far to believe an SAE: its scores beside baselines, its stability over seeds, and sweeps of settings."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from ..core.pareto import HIGHER_IS_BETTER as HIGHER_IS_BETTER
from ._rows import of, plain


def metrics(
    data: Data,
    section: str | None = None,
    *,
    metric: str | None = None,
    source: str | None = None,
    label: str | None = None,
    each_label: bool = True,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return how an SAE compares with other decompositions, with chance, and with what the labels themselves choose.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.evaluate`.
    section
        `"reconstruction"`, `"sparsity"`, `"dictionary"`, `"fidelity"`, `"labels"`, `"attribution"` or `"gene_sets"`.
    metric
        Only this one, such as `"auroc"`.
    source
        Only this one, such as `"sae"` or `"pca"`.
    label
        Only scores of this label.
    each_label
        With `False`, only what is over all labels.

    Returns
    -------
    A row per number, in the order of :func:`sae.tl.evaluate`, which describes the columns.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.evaluate(adata, "bulk_labels", baselines=["pca"], n_splits=1, n_bootstrap=50)
    >>> found = sae.get.metrics(adata, "labels", metric="auroc", each_label=False)
    >>> found["source"].tolist()
    ['sae', 'pca']
    """
    found = _schema.table(holder(data, mod), key, "metrics")
    for column, wanted in (("section", section), ("metric", metric), ("source", source), ("label", label)):
        found = of(found, column, wanted)
    return plain(found if each_label else found[found["label"].isna()])


def stability(
    data: Data,
    *,
    table: str = "summary",
    source: str | None = None,
    measure: str | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return how much of an SAE other seeds find again, beside what learned nothing; of each feature, :func:`sae.get.features` tells.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.stability`.
    table
        `"summary"`, a row per source; or `"curve"`, the share of features whose stability is at least a threshold.
        :func:`sae.tl.stability` describes the columns.
    source
        Only `"sae"`, `"cells"` or `"random"`.
    measure
        Only `"decoder"` or `"activation"`, of the curve.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.stability(adata, n_seeds=1)
    >>> sae.get.stability(adata)["source"].tolist()
    ['sae', 'cells', 'random']
    >>> curve = sae.get.stability(adata, table="curve", source="sae", measure="decoder")
    >>> float(curve["share"].iloc[0])
    1.0
    """
    known = _schema.result(holder(data, mod), key, "stability")
    tables = ("summary", "curve")
    if table not in tables:
        raise ValueError(f"table={table!r} is not one of {listing(tables)}.")
    if measure is not None and table != "curve":
        raise ValueError(f"measure={measure!r} chooses rows of the curve. Pass table='curve' with it.")
    found = of(known[table], "source", source)
    return plain(found if table == "summary" else of(found, "measure", measure))


def sweep(
    data: Data, *, pareto: Sequence[str] = _schema.SWEEP_PARETO, key: str = "sae_sweep", mod: str | None = None
) -> pd.DataFrame:
    """Return the runs of a sweep, a row each.

    Parameters
    ----------
    data, mod
        As in :func:`sae.get.activations`, after `tl.sweep`.
    pareto
        Numbers, two or more, by which the column `pareto` marks the settings that no other beats: is as good as in all of them,
        and better in one, in the means over its seeds. Of `label_auroc`, `truth_best`, `truth_matched`, `truth_found` and
        `stability` higher is better, of everything else lower. :func:`sae.tl.sweep` describes the columns.
    key
        Name of the sweep.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> runs = sae.tl.sweep(adata, {"n_features": [16, 32], "steps": 50}, groupby="bulk_labels")
    >>> runs = sae.get.sweep(adata, pareto=["n_features", "label_auroc"])
    >>> int(runs.loc[runs["pareto"], "n_features"].min())
    16
    """
    found = plain(_schema.sweep(holder(data, mod), key))
    if isinstance(pareto, str) or len(pareto) < 2:
        raise ValueError(f"pareto={pareto!r} is not a list of two or more columns of numbers.")
    numbers = found.select_dtypes("number").columns
    for name in pareto:
        if name not in numbers:
            raise KeyError(f"The sweep has no numbers {name!r}; it has {listing(numbers, len(numbers))}.")
    return found.assign(pareto=_schema.not_beaten(found, pareto))
