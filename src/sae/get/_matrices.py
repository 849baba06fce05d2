"""Features against labels: scores as a matrix, and activations label by label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import _design, _schema
from .._data import Data, Holder, holder, listing
from .._lazy import column as read_column
from .._schema import Features
from ._cells import some_columns
from ._rows import of, rows_of

METRICS = ("auroc", "f1", "held_out_auroc", "held_out_f1", "difference")


def label_matrix(
    data: Data,
    groupby: str | None = None,
    *,
    metric: str = "auroc",
    features: Features = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return one score of features and labels as a matrix.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`, after `tl.score_labels`.
    groupby
        Labels of this column of `obs`; can be left out where only one was scored.
    metric
        `"auroc"`, `"f1"`, `"held_out_auroc"`, `"held_out_f1"` or `"difference"`, which :func:`sae.tl.score_labels` describes.
    features
        One or several, by name or number, in the order of the rows; by default all.

    Returns
    -------
    Features × labels, in the order in which they were scored; the columns have the name of `groupby`.

    Raises
    ------
    KeyError
        There are no label scores, none of this column, or no such feature.
    ValueError
        No such metric; several columns were scored, and `groupby` does not say which is meant.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> sae.get.label_matrix(adata, metric="f1").shape
    (32, 10)
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is not one of {listing(METRICS)}.")
    held = holder(data, mod)
    table = _schema.table(held, key, "labels")
    scored = table["groupby"].astype(str).unique()
    if groupby is None and len(scored) > 1:
        raise ValueError(f"Labels of several columns were scored: {listing(scored)}. Pass one of them as groupby=.")
    table = rows_of(of(table, "groupby", groupby), features, data, key, mod)
    table = table.astype({"feature": str, "label": str})
    known = _schema.features(held, key)
    matrix = table.pivot(index="feature", columns="label", values=metric)
    rows = known.index[_schema.resolve(features, known.index, known.get("name"))]
    matrix = matrix.loc[rows, table["label"].unique()]
    return matrix.rename_axis(index="feature", columns=groupby or scored[0])


def by_label(
    data: Data,
    features: Features,
    groupby: str,
    *,
    order: Sequence[str] | None = None,
    n_bins: int = 10,
    donor: str | None = None,
    key: str = "sae",
    mod: str | None = None,
) -> pd.DataFrame:
    """Return how active features are in the cells of each label, or along a number such as pseudotime.

    Parameters
    ----------
    data, key, mod
        As in :func:`sae.get.activations`.
    features
        One or several, by name or number; None for all.
    groupby
        Column of `obs`. Cells without a value, or with an infinite one, are left out.
    order
        Labels in the order of a process; cells of other labels are left out, as in :func:`sae.tl.score_labels`. By default all
        labels, in the order of the categories.
    n_bins
        A column of more different numbers is divided at its quantiles into so many bins, each of about as many cells.
    donor
        Column of `obs`: cells are averaged within each donor first, so that each donor counts once, and the interval is over
        donors.

    Returns
    -------
    A row per feature and label: `feature`; `label`, in order, and an ordered categorical where the order means something (given,
    of an ordered categorical, or of numbers); `position`, the place of the label, an integer, or the mean of the numbers; `n_cells`, and
    `n_donors` with `donor`; `mean`, the mean activation, and `ci_low` to `ci_high`, its 95 % interval (Student's t); `share`
    of the cells that are active.

    Raises
    ------
    KeyError
        There are no activations, or no such feature or column.
    ValueError
        `order` names labels that are not there, or one twice; no cell has a label; cells without a donor, or continuous donors.

    Notes
    -----
    Without `donor`, the interval takes cells as independent, which those of one donor are not: it is then too narrow for what
    would be seen in other donors. An interval of one cell or donor is NaN.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> table = sae.get.by_label(adata, "sae_0", "phase", order=["G1", "S", "G2M"])
    >>> table["label"].tolist()
    ['G1', 'S', 'G2M']
    """
    from ..core.label_means import label_means

    held = holder(data, mod)
    a = _schema.activations(held, key)
    table = _schema.features(held, key)
    names = table.index
    chosen = _schema.resolve(features, names, table.get("name"))
    groups = _groups(held, groupby, order, n_bins)
    known = groups.codes >= 0
    codes, n_labels = groups.codes[known], len(groups.names)
    samples = None if donor is None else _design.codes(held, donor, known, "donor")
    found = label_means(some_columns(a, chosen)[known], codes, n_labels, samples)
    columns = {
        "feature": pd.Categorical.from_codes(np.repeat(np.arange(len(chosen)), n_labels), names[chosen]),
        "label": pd.Categorical.from_codes(
            np.tile(np.arange(n_labels), len(chosen)), groups.names, ordered=groups.ordered
        ),
        "position": np.tile(groups.position, len(chosen)),
        "n_cells": np.tile(np.bincount(codes, minlength=n_labels), len(chosen)),
        "n_donors": np.tile(found.n.ravel().astype(np.int64), len(chosen)),
        **{name: getattr(found, name).T.ravel() for name in ("mean", "ci_low", "ci_high", "share")},
    }
    return pd.DataFrame(columns).drop(columns="n_donors" if donor is None else [])


@dataclass(frozen=True)
class _Groups:
    codes: np.ndarray
    """(n,) label of each cell, −1 for none."""
    names: pd.Index
    position: np.ndarray
    """(labels,)"""
    ordered: bool


def _groups(held: Holder, groupby: str, order: Sequence[str] | None, n_bins: int) -> _Groups:
    """Read the labels of the cells, or divide their numbers into bins."""
    obs, place = held.data.obs, f"{held.where}.obs[{groupby!r}]"
    if groupby not in obs.columns:
        raise KeyError(
            f"{held.where}.obs has no column {groupby!r}; it has {listing(obs.columns)}. Pass one as groupby=."
        )
    column = read_column(obs, groupby)
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if numeric and order is None:
        return _bins(column.to_numpy(dtype=np.float64, na_value=np.nan), n_bins, place)
    labels = pd.Categorical(column).remove_unused_categories()
    if not len(labels.categories):
        raise ValueError(f"{place} has no labels: it is missing for all cells.")
    labels = labels.rename_categories(str)
    if order is not None:
        labels = labels.set_categories(_design.ordered_labels(order, labels.categories, place), ordered=True)
    return _Groups(
        labels.codes.astype(np.int64), labels.categories, np.arange(len(labels.categories)), bool(labels.ordered)
    )


def _bins(values: np.ndarray, n_bins: int, place: str) -> _Groups:
    """Take few different numbers as they are, and divide many at their quantiles."""
    if n_bins < 2:
        raise ValueError(f"n_bins={n_bins} is below 2; numbers are divided into two groups or more.")
    known = np.isfinite(values)
    if not known.any():
        raise ValueError(f"{place} has no finite numbers.")
    distinct = np.unique(values[known])
    codes = np.full(len(values), -1)
    if len(distinct) <= n_bins:
        codes[known] = np.searchsorted(distinct, values[known])
        names = pd.Index([f"{value:.15g}" for value in distinct])
    else:
        binned = pd.qcut(values[known], n_bins, duplicates="drop").remove_unused_categories()
        codes[known] = binned.codes
        names = binned.categories.astype(str)
    sums = np.bincount(codes[known], weights=values[known], minlength=len(names))
    return _Groups(codes, names, sums / np.bincount(codes[known], minlength=len(names)), ordered=True)
