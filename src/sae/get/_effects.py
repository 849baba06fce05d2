"""What features do, and what acts on them: steering, ablation and perturbations."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, listing
from .._schema import Features
from ._rows import head, in_order, of, plain, rows_of


def steering(
    data: Data,
    feature: Features = None,
    *,
    table: str = "genes",
    dose: float | None = None,
    label: str | None = None,
    modality: str | None = None,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return what turning features up or down does.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.steer`.
    feature
        A feature or several, by name or number; by default all that were steered.
    table
        `"genes"`, the most raised first; or `"doses"`, `"labels"`, `"controls"`, as :func:`sae.tl.steer` describes them.
    dose
        Only this dose.
    label
        Only cells with this label, of `"genes"` and `"labels"`.
    modality
        Only variables of this modality, of a model that predicts several.
    max_padj
        Only genes with an adjusted p-value up to this.
    n
        At most so many rows per feature.

    Examples
    --------
    >>> import sae
    >>> import scanpy as sc
    >>> adata = sae.datasets.pbmc68k()
    >>> sc.pp.pca(adata)
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.steer(adata, [0, 1], model=sae.models.PCA(adata), doses=[0, 1], n_controls=2)
    >>> len(sae.get.steering(adata, "sae_0", dose=1, n=5))
    5
    """
    known = _schema.result(holder(data, mod), key, "steering")
    if table not in _schema.STEERING:
        raise ValueError(f"table={table!r} is not one of {listing(_schema.STEERING)}.")
    found = rows_of(known[table], feature, data, key, mod)
    if dose is not None:
        if not (found["dose"] == dose).any():
            doses = sorted({float(value) for value in found["dose"]})
            raise KeyError(f"There are no results for the dose {dose}; there are for {', '.join(map(str, doses))}.")
        found = found[found["dose"] == dose]
    found = of(of(found, "label", label), "modality", modality)
    if table == "genes":
        found = in_order(found, ["change"], [False], max_padj)
    return head(found, n)


def ablation(
    data: Data, *, table: str = "scores", key_added: str | None = None, key: str = "sae", mod: str | None = None
) -> pd.DataFrame:
    """Return how well batches are mixed and labels kept apart before and after features were removed.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.ablate`.
    table
        `"scores"`, or `"features"`: of each feature what it tells apart, and whether it was removed. :func:`sae.tl.ablate`
        describes the columns.
    key_added
        Only the representation of this name.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.ablate(adata, "sae_0", batch="phase", groupby="bulk_labels", n_controls=1)
    >>> list(sae.get.ablation(adata)["source"])
    ['before', 'after', 'control']
    """
    known = _schema.result(holder(data, mod), key, "ablation")
    if table not in known:
        raise ValueError(f"table={table!r} is not one of {listing(known)}.")
    return plain(of(known[table], "key_added", key_added))


def perturbation(
    data: Data,
    feature: Features = None,
    *,
    table: str = "features",
    groupby: str | None = None,
    perturbation: str | None = None,
    responds: bool = False,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return how features respond to perturbations.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.perturbation`.
    feature
        A feature or several, by name or number, of `"features"`; by default all.
    table
        `"features"`, the strongest responses of either direction first; `"summary"`, a row per perturbation, those that most features
        respond to first; or `"targets"`, a row per column of perturbations: are perturbed genes among the genes of features that respond?
        :func:`sae.tl.perturbation` describes the columns.
    groupby
        Only perturbations of this column of `obs`.
    perturbation
        Only this perturbation, of `"features"` and `"summary"`.
    responds
        With `True`, only features that respond: those with a false discovery rate up to the `max_fdr` of `tl.perturbation`.
    max_padj
        Only rows with an adjusted p-value up to this, of `"features"` and `"summary"`.
    n
        At most so many features per perturbation.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.perturbation(adata, "bulk_labels", control="CD14+ Monocyte")
    >>> len(sae.get.perturbation(adata, perturbation="CD19+ B", responds=True, n=3))
    3
    >>> sae.get.perturbation(adata, table="summary", perturbation="CD19+ B")["status"].tolist()
    ['tested']
    """
    known = _schema.result(holder(data, mod), key, "perturbation")
    if table not in known:
        raise ValueError(f"table={table!r} is not one of {listing(known)}.")
    found = of(known[table], "groupby", groupby)
    if table == "targets":
        return plain(found)
    found = of(found, "perturbation", perturbation)
    if max_padj is not None:
        found = found[found["padj"] <= max_padj]
    if table == "summary":
        return plain(found.sort_values("n_responding", ascending=False, kind="stable"))
    found = rows_of(found, feature, data, key, mod)
    found = found[found["responds"]] if responds else found
    found = found.iloc[np.argsort(-found["score"].abs().to_numpy(), kind="stable")]
    if n is not None:
        found = found[found.groupby(["groupby", "perturbation"], observed=True).cumcount() < n]
    return plain(found)
