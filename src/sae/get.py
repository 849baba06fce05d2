"""Read results out, as AnnData, arrays and tidy tables. Nothing in here changes the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd

from . import _schema
from ._data import Data, holder, is_mudata, joint_keys, listing
from ._schema import Features
from .core.autoencoder import Autoencoder

__all__ = [
    "ablation",
    "activations",
    "decoder",
    "embedding",
    "enrichment",
    "features",
    "genes",
    "history",
    "label_summary",
    "labels",
    "model",
    "perturbation",
    "steering",
]


def activations(data: Data, feature: Features = None, *, key: str = "sae", mod: str | None = None) -> ad.AnnData:
    """Return the activations as an AnnData of their own, cells × features, for the rest of Scanpy.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`.
    feature
        A feature or several, by name or number; by default all.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.

    Returns
    -------
    An AnnData with the activations (CSR) as `X`, the cells' `obs`, the feature table as `var`, and the cells' `obsm` without
    `X_pca`, which Scanpy would take for the principal components of `X`. Pass `use_rep="X"` to `sc.pp.neighbors` to compute
    neighbors on the activations themselves.

    Raises
    ------
    KeyError
        There are no activations under this key, or no such feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.get.activations(adata).shape
    (700, 32)
    """
    held = holder(data, mod)
    a = _schema.activations(held, key)
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    obsm = {name: held.data.obsm[name] for name in keys if name not in (key, "X_pca")}
    uns = {name: value for name, value in held.data.uns.items() if name.endswith("_colors")}
    var = features(data, key=key, mod=mod)
    chosen = _schema.resolve(feature, var.index)
    return ad.AnnData(X=a[:, chosen], obs=held.data.obs, var=var.iloc[chosen], obsm=obsm, uns=uns).copy()


def embedding(data: Data, basis: str = "umap", *, mod: str | None = None) -> pd.DataFrame:
    """Return the first two coordinates of the cells in an embedding, to plot on.

    Parameters
    ----------
    data, mod
        As in :func:`sae.get.activations`.
    basis
        Key of `obsm`, with or without `X_`.

    Returns
    -------
    Cells × 2, columns named after the basis.

    Raises
    ------
    KeyError
        There is no such embedding.

    Examples
    --------
    >>> import sae
    >>> sae.get.embedding(sae.datasets.pbmc68k(), "umap").columns.tolist()
    ['UMAP1', 'UMAP2']
    """
    held = holder(data, mod)
    keys = joint_keys(held.data) if is_mudata(held.data) else list(held.data.obsm)
    found = next((name for name in (basis, f"X_{basis}") if name in keys), None)
    if found is None:
        raise KeyError(
            f"{held.where}.obsm has no {basis!r} or 'X_{basis}'; it has {listing(keys)}. Pass one as basis=."
        )
    name = found.removeprefix("X_").upper()
    coordinates = np.asarray(held.data.obsm[found])[:, :2].copy()
    return pd.DataFrame(coordinates, index=held.data.obs_names, columns=[f"{name}{i + 1}" for i in range(2)])


def features(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the feature table: a row per feature, the columns of `tl.encode` and of the verbs run since.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> list(sae.get.features(adata).columns)
    ['n_cells', 'density', 'mean', 'max', 'dead']
    """
    return _schema.features(holder(data, mod), key)


def model(data: Data, *, key: str = "sae", mod: str | None = None) -> Autoencoder:
    """Return the SAE as plain arrays that can encode and decode.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> model = sae.get.model(adata)
    >>> activations = model.encode(adata.obsm["X_pca"]).activations
    >>> model.decode(activations).shape
    (700, 50)
    """
    return copy.deepcopy(_schema.model(_schema.read(holder(data, mod), key)))


def decoder(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the decoder: the direction of each feature in the representation.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Returns
    -------
    `W_dec` (features × columns of the representation), in units of the representation.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.get.decoder(adata).loc["sae_3"].shape
    (50,)
    """
    stored = _schema.read(holder(data, mod), key)
    directions, params = stored["weights"]["W_dec"], stored["params"]
    names = stored["weights"].get("input_names")
    if names is None:
        names = [f"{params['layer'] or params['use_rep']}_{i}" for i in range(directions.shape[1])]
    return pd.DataFrame(directions.copy(), index=_schema.feature_names(key, len(directions)), columns=list(names))


def history(data: Data, *, key: str = "sae", mod: str | None = None) -> pd.DataFrame:
    """Return the training history, a row per record.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`; only `tl.fit` need have run.

    Returns
    -------
    `step`, `learning_rate`, `loss` (of the batch), `fvu`, `l0` (of up to 2,048 training cells), `dead_fraction` (features
    not active for two passes), `val_fvu`, `val_l0` (of up to 2,048 held-out cells).

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> int(sae.get.history(adata)["step"].iloc[-1])
    200
    """
    return _schema.table(holder(data, mod), key, "history").reset_index(drop=True)


def genes(
    data: Data,
    feature: Features = None,
    *,
    direction: str | None = None,
    modality: str | None = None,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the genes of features, the most raised first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.rank_genes`.
    feature
        A feature or several, by name or number; by default all.
    direction
        `"up"` or `"down"`: only genes that are higher, or lower, where the feature is active; the latter with the most
        lowered first.
    modality
        Only variables of this modality, of a MuData.
    max_padj
        Only genes with an adjusted p-value up to this.
    n
        At most so many genes per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.rank_genes(adata)
    >>> len(sae.get.genes(adata, "sae_0", direction="up", n=5))
    5
    """
    _check_direction(direction)
    table = _rows_of(_schema.table(holder(data, mod), key, "genes"), feature, data, key, mod)
    table = _of(table, "modality", modality)
    if direction is not None:
        table = table[table["score"] > 0 if direction == "up" else table["score"] < 0]
    return _head(_sorted(table, ["score"], [direction == "down"], max_padj), n)


def enrichment(
    data: Data,
    feature: Features = None,
    *,
    collection: str | None = None,
    direction: str | None = None,
    modality: str | None = None,
    max_padj: float | None = None,
    max_fdr: float | None = None,
    redundant: bool = True,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the gene sets of features, the most significant first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.enrich`.
    feature
        A feature or several, by name or number; by default all.
    collection
        Only gene sets of this collection.
    direction
        `"up"` or `"down"`: only sets of genes that are higher, or lower, where the feature is active; `"both"`: only those that
        were found by both together.
    modality
        Only variables of this modality, of a MuData.
    max_padj
        Only sets with an adjusted p-value up to this.
    max_fdr
        Only sets with a false discovery rate up to this; those of a run without a null (`n_null=0`) have none, and are left out.
    redundant
        With `False`, a set is left out when all its genes that stand out (`genes`) are among those of one better set, of the
        same feature and direction, that is not itself left out: nested sets are told once. Sets are compared with all others
        that are asked for, of whatever collection; those without a gene that stands out are kept.
    n
        At most so many sets per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.enrich(adata, sae.datasets.immune_markers())
    >>> len(sae.get.enrichment(adata, 0, direction="up", redundant=False, n=1))
    1
    """
    _check_direction(direction, "both")
    table = _rows_of(_schema.table(holder(data, mod), key, "enrichment"), feature, data, key, mod)
    table = _of(table, "modality", modality)
    table = _of(table, "collection", collection)
    if direction is not None:
        table = table[table["direction"] == direction]
    table = table.assign(strength=table["score"].abs())
    if max_fdr is not None:
        table = table[table["fdr"] <= max_fdr]
    table = _sorted(table, ["pval", "strength"], [True, False], max_padj).drop(columns="strength")
    return _head(table if redundant else table[~_covered(table)], n)


def labels(
    data: Data,
    feature: Features = None,
    *,
    groupby: str | None = None,
    label: str | None = None,
    max_padj: float | None = None,
    n: int | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the label scores of features, the highest AUROC first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.score_labels`.
    feature
        A feature or several, by name or number; by default all.
    groupby
        Only labels of this column of `obs`.
    label
        Only this label.
    max_padj
        Only scores with an adjusted p-value up to this.
    n
        At most so many labels per feature.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> len(sae.get.labels(adata, label="CD19+ B"))
    32
    """
    table = _rows_of(_schema.table(holder(data, mod), key, "labels"), feature, data, key, mod)
    table = _of(_of(table, "groupby", groupby), "label", label)
    return _head(_sorted(table, ["auroc"], [False], max_padj), n)


def label_summary(
    data: Data,
    *,
    groupby: str | None = None,
    label: str | None = None,
    source: str | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return the best feature of every label, scored on cells that did not choose it, the best known labels first.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.score_labels`.
    groupby
        Only labels of this column of `obs`.
    label
        Only this label.
    source
        `"feature"`, or with `baselines=True` also `"gene"` and `"representation"`: only the best one of these.

    Returns
    -------
    A row per label and source; :func:`sae.tl.score_labels` describes the columns.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> bool(sae.get.label_summary(adata, label="CD19+ B")["held_out_auroc"].iloc[0] > 0.9)
    True
    """
    table = _schema.table(holder(data, mod), key, "label_summary")
    table = _of(_of(_of(table, "groupby", groupby), "label", label), "source", source)
    return _plain(table.sort_values("held_out_auroc", ascending=False, kind="stable"))


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
    found = _rows_of(known[table], feature, data, key, mod)
    if dose is not None:
        if not (found["dose"] == dose).any():
            doses = sorted({float(value) for value in found["dose"]})
            raise KeyError(f"There are no results for the dose {dose}; there are for {', '.join(map(str, doses))}.")
        found = found[found["dose"] == dose]
    found = _of(_of(found, "label", label), "modality", modality)
    if table == "genes":
        found = _sorted(found, ["change"], [False], max_padj)
    return _head(found, n)


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
    return _plain(_of(known[table], "key_added", key_added))


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
    found = _of(known[table], "groupby", groupby)
    if table == "targets":
        return _plain(found)
    found = _of(found, "perturbation", perturbation)
    if max_padj is not None:
        found = found[found["padj"] <= max_padj]
    if table == "summary":
        return _plain(found.sort_values("n_responding", ascending=False, kind="stable"))
    found = _rows_of(found, feature, data, key, mod)
    found = found[found["responds"]] if responds else found
    found = found.iloc[np.argsort(-found["score"].abs().to_numpy(), kind="stable")]
    if n is not None:
        found = found[found.groupby(["groupby", "perturbation"], observed=True).cumcount() < n]
    return _plain(found)


def _check_direction(direction: str | None, *more: str) -> None:
    known = ("up", "down", *more)
    if direction is not None and direction not in known:
        raise ValueError(f"direction={direction!r} is neither {' nor '.join(map(repr, known))}.")


def _of(table: pd.DataFrame, column: str, wanted: str | None) -> pd.DataFrame:
    """Keep the rows with a value, or say which values there are."""
    if wanted is None:
        return table
    known = table[column].cat.categories if column in table else pd.Index([])
    if wanted not in known:
        raise KeyError(f"There are no results for the {column} {wanted!r}; there are for {listing(known)}.")
    return table[table[column] == wanted]


def _rows_of(table: pd.DataFrame, feature: Features, data: Data, key: str, mod: str | None) -> pd.DataFrame:
    if feature is None:
        return table
    names = features(data, key=key, mod=mod).index
    return table[table["feature"].isin(names[_schema.resolve(feature, names)])]


def _sorted(table: pd.DataFrame, by: Sequence[str], ascending: Sequence[bool], max_padj: float | None) -> pd.DataFrame:
    """Keep the significant rows, best first."""
    if max_padj is not None:
        table = table[table["padj"] <= max_padj]
    return table.sort_values(list(by), ascending=list(ascending), kind="stable")


def _head(table: pd.DataFrame, n: int | None) -> pd.DataFrame:
    """Keep the first `n` rows of each feature."""
    if n is not None:
        table = table[table.groupby("feature", observed=True).cumcount() < n]
    return _plain(table)


def _covered(table: pd.DataFrame) -> np.ndarray:
    """Mark gene sets whose overlapping genes are all among those of one better set that is kept, in a sorted table."""
    overlaps = table["genes"].cat.remove_unused_categories().cat
    listed = [frozenset(genes.split(";")) if genes else frozenset() for genes in overlaps.categories]
    codes = overlaps.codes.to_numpy()
    covered = np.zeros(len(table), dtype=bool)
    compared = [name for name in ("feature", "direction", "modality") if name in table]
    for rows in table.groupby(compared, observed=True, dropna=False).indices.values():
        kept: list[frozenset[str]] = []
        for row in rows:
            genes = listed[codes[row]]
            covered[row] = bool(genes) and any(genes <= better for better in kept)
            if not covered[row]:
                kept.append(genes)
    return covered


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Number the rows, and drop categories without any."""
    categorical = table.select_dtypes("category").columns
    table = table.assign(**{name: table[name].cat.remove_unused_categories() for name in categorical})
    return table.reset_index(drop=True)
