from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, Holder, holder, listing
from .._design import label_column, ordered_labels
from .._expression import expression
from .._lazy import column as read_column
from .._progress import progress_bar
from ..core.rows import Matrix, select_rows, take_rows

if TYPE_CHECKING:
    from ..core.labels import CrossFit, LabelScores

Z = 1.96
SCOPES = ("local", "regional", "global", "dead")
TRENDS = ("falling", "none", "rising")
TAKEN = {"name": "label", "name_label": "auroc"}
"""Columns of `obs` whose results would be called as those of :func:`sae.tl.name_features`."""


def score_labels(
    data: Data,
    groupby: str,
    *,
    key: str = "sae",
    mod: str | None = None,
    donor: str | None = None,
    n_splits: int = 5,
    scopes: str = "3-way",
    order: Sequence[str] | None = None,
    baselines: bool = False,
    layer: str | None = None,
    var_mod: str | None = None,
    max_padj: float = 0.05,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Score every feature against every label of the cells (cell types, conditions, batches).

    For a label with n₁ cells inside and n₀ outside, and the activation of one feature as the score of a cell:

    * `auroc` = U / (n₁ n₀), the probability that a cell of the label has the higher activation, ties counted half;
      `pval` is the two-sided Mann-Whitney test of it (normal approximation with correction for ties and continuity),
      adjusted over features and labels by Benjamini-Hochberg;
    * `f1`, the best 2 TP / (2 TP + FP + FN) over all thresholds above zero;
    * `difference` D, mean activation inside minus outside, with the 95 % interval `ci_low` to `ci_high` of Welch's t;
    * `held_out_auroc`, `held_out_f1`: the cells are divided into halves; on one half, the direction of the feature (above or
      below AUROC ½) and the threshold of best F1 are chosen, on the other they are scored; mean over both ways and
      `n_splits` divisions. A feature that is lower in the label has `auroc` below ½ and `held_out_auroc` above.

    The best of many features looks better than it is on the cells that it was chosen on. For each label, the feature of
    highest AUROC on one half is therefore scored on the other, which with random labels gives ½ on average.

    A feature is called significant for a label when D > 1.96 (SE₁ + SE₀), with SE = s / √n, and its scope is `"local"` for
    exactly one such label, `"regional"` for several, `"global"` for none although it is active, `"dead"` when it is active in
    no labelled cell (arXiv:2410.11468). In the 2-way form, a feature that is active and not local is global.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    groupby
        Column of `obs`, categorical, string or boolean. Cells without a label are left out.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE.
    donor
        Column of `obs`: all cells of a donor go to the same half, so that held-out scores are of other donors. By default
        the cells of every label are divided evenly.
    n_splits
        Random divisions into halves.
    scopes
        `"3-way"` or `"2-way"`.
    order
        Labels in the order of a process, two or more of them: features are tested for a trend along it, on the cells of these labels.
    baselines
        Choose and score the best gene, and the best column of the representation (a principal component, say, of either
        sign), in the same way as the best feature.
    layer
        Expression for `baselines`: this layer, else `.raw` if there is one, else `X`; in memory, on disk or a dask array.
    var_mod
        The modality whose variables `baselines` reads, by default `mod`. Cells are matched by `obs_names`.
    max_padj
        Only for the log message: how many labels have a feature with an adjusted p-value up to this.
    rng
        Seed or generator, for the divisions.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes

    * `uns[key]["labels"]`, a row per feature and label: `feature`, `groupby`, `label`, `auroc`, `f1`, `held_out_auroc`,
      `held_out_f1`, `difference`, `ci_low`, `ci_high`, `pval`, `padj`;
    * `uns[key]["label_summary"]`, a row per label and source (`"feature"`; `"gene"` and `"representation"` are the baselines):
      `n_cells`; `selected`, the one most often chosen, and `agreement`, its share of the 2 `n_splits` choices;
      `selection_auroc`, the mean on the halves that chose; `held_out_auroc`, the mean on the other halves, and `held_out_sd`,
      its standard deviation over divisions; `held_out_f1`, likewise; `difference`, `ci_low` and `ci_high` of the selected one on
      all cells, in its own units;
    * in `uns[key]["features"]` the columns `{groupby}_label` (with the highest AUROC on all cells), `{groupby}_auroc` and
      `{groupby}_scope`; with `order`, `{groupby}_trend` (`"rising"` or `"falling"` where the mean activation does so at every
      step, else `"none"`), `{groupby}_trend_score` (z of the Jonckheere-Terpstra test, positive for rising) and
      `{groupby}_trend_padj` (Benjamini-Hochberg over features).

    Rows of another `groupby` are kept.

    Raises
    ------
    KeyError
        There are no activations, or no such column.
    ValueError
        The column is continuous, has fewer than two labels, or is called `name` or `name_label`; cells without a donor, or only
        one donor; `order` names labels that are not there; NaN or infinite expression.

    Notes
    -----
    Activations and baselines on disk are read in chunks, once for the sums and once more for every 64 million values, which are sorted
    at a time (0.5 GB of float32, else 0.8 GB); what is held beside them are a few numbers per cell. Of a dask array on a cluster, the workers compute what is read, and
    the scores are made here. Scores are the same as in memory to the last bit.

    A label that no division has in both halves (of one cell, or of one donor) has no held-out scores: NaN, with a warning
    in the log. p-values and intervals take cells as independent, which those of one donor are not, and say nothing of the choice
    among features: to report how well a feature knows a label, report `held_out_auroc`. Its `held_out_sd` is what the division
    into halves adds, not how far the cells of another experiment would be. The SAE itself may have been trained on all cells; it
    never sees a label.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels", baselines=True)
    >>> sae.get.labels(adata)["label"].nunique()
    10
    >>> sae.get.label_summary(adata, label="CD19+ B")["source"].nunique()
    3
    """
    from scanpy import logging as logg

    from ..core.labels import cross_fit, score_and_cross_fit
    from ..core.statistics import benjamini_hochberg

    if scopes not in ("3-way", "2-way"):
        raise ValueError(f"scopes={scopes!r} is neither '3-way' nor '2-way'.")
    if n_splits < 1:
        raise ValueError(f"n_splits={n_splits} is below 1. Pass the number of divisions into halves.")
    held = holder(data, mod)
    activations = _schema.activations(held, key)
    labels = label_column(held.data.obs, groupby, held.where)
    if "/" in groupby:
        raise ValueError(f"{groupby!r} cannot name stored columns: h5ad does not take '/' in keys. Rename the column.")
    if groupby in TAKEN:
        raise ValueError(
            f"{groupby!r} cannot name stored columns: sae.tl.name_features writes '{groupby}_{TAKEN[groupby]}', too. Rename the column."
        )
    known = labels.codes >= 0
    codes, names = labels.codes[known].astype(np.int64), labels.categories.astype(str)
    places = None
    if order is not None:
        places = pd.Index(ordered_labels(order, names, f"{held.where}.obs[{groupby!r}]", least=2)).get_indexer(names)
    halves = _halves(held, codes, known, donor, n_splits, rng)
    a = select_rows(activations, np.flatnonzero(known))
    features = _schema.feature_names(key, a.shape[1])
    sources = [Source("feature", a, features, slice(None))]
    if baselines:
        sources += _baselines(data, held, key, known, layer, var_mod)

    start = logg.info(f"scoring {a.shape[1]} features against {len(names)} labels of {groupby!r}")
    with progress_bar(sum(len(source.names) for source in sources), "labels", "column", shown=progress) as bar:
        scores, fit = score_and_cross_fit(a, codes, len(names), halves, on_block=bar.update)
        fits = [fit]
        for source in sources[1:]:
            of = source.matrix, codes[source.rows], len(names), halves[:, source.rows]
            fits.append(cross_fit(*of, both_signs=source.both_signs, on_block=bar.update))

    padj = benjamini_hochberg(scores.pval.ravel()).reshape(scores.pval.shape)
    silent = scores.n_active == 0
    scope = _scope(scores, silent, scopes)
    columns = {
        f"{groupby}_label": pd.Categorical.from_codes(np.where(silent, -1, scores.auroc.argmax(axis=0)), names),
        f"{groupby}_auroc": scores.auroc.max(axis=0),
        f"{groupby}_scope": pd.Categorical(list(scope), categories=list(SCOPES)),
    }
    if places is not None:
        columns |= _trend(a, places[codes], len(order or ()), groupby)
    stored = _schema.read(held, key)
    stale = [f"{groupby}_{name}" for name in ("trend", "trend_score", "trend_padj")]
    new = {
        "features": stored["features"].drop(columns=stale, errors="ignore").assign(**columns),
        "labels": _table(scores, fits[0], padj, features, groupby, names),
        "label_summary": _summary(sources, fits, codes, groupby, names),
    }
    for name in ("labels", "label_summary"):
        new[name] = _schema.replace_rows(stored.get(name), new[name], {"groupby": groupby})
    _schema.write(held, key, {**stored, **new})

    unscored = names[np.isnan(fits[0].held_out_auroc).all(axis=(0, 1))]
    if len(unscored):
        least = "cells" if donor is None else f"donors ({held.where}.obs[{donor!r}])"
        logg.warning(
            f"no held-out scores for {listing(unscored)} of {groupby!r}: both halves of the cells must have some of the label "
            f"and some of the others, so at least two {least} of each."
        )
    counts = ", ".join(f"{(scope == name).sum()} {name}" for name in SCOPES)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['labels'] and ['label_summary'], groupby {groupby!r}: {counts}; "
        f"{int(((padj <= max_padj) & (scores.auroc > 0.5)).any(axis=1).sum())} of {len(names)} labels have a feature",
    )


@dataclass(frozen=True)
class Source:
    """Columns among which the best one of a label is chosen."""

    name: str
    matrix: Matrix
    names: pd.Index
    rows: np.ndarray | slice
    """The rows of the matrix among the labelled cells."""
    both_signs: bool = False
    """Whether the columns with the other sign follow, whose names are the same."""


def _baselines(
    data: Data, held: Holder, key: str, known: np.ndarray, layer: str | None, var_mod: str | None
) -> list[Source]:
    """Read the genes and the representation of the labelled cells."""
    expressed, selected = expression(data, held, layer=layer, var_mod=var_mod)
    labelled = known[selected]
    rows = (np.cumsum(known) - 1)[selected][labelled]
    genes = Source("gene", select_rows(expressed.matrix, np.flatnonzero(labelled)), expressed.genes, rows)

    encoded, found = _schema.read(held, key)["encoded"], _schema.latent(held, key)
    x = select_rows(found.matrix, np.flatnonzero(known))
    numbered = [f"{encoded['layer'] or encoded['use_rep']}_{i}" for i in range(x.shape[1])]
    names = pd.Index(numbered if found.names is None else found.names)
    # In both directions: the sign of a component means nothing.
    both_signs = not sparse.issparse(take_rows(x, slice(0, 1)))
    return [genes, Source("representation", x, names.append(names) if both_signs else names, slice(None), both_signs)]


def _halves(
    held: Holder,
    codes: np.ndarray,
    known: np.ndarray,
    donor: str | None,
    n_splits: int,
    rng: int | np.random.Generator | None,
) -> np.ndarray:
    """Divide the labelled cells into halves, by label or by donor."""
    from ..core.labels import donor_halves, stratified_halves

    rng = np.random.default_rng(rng)
    if donor is None:
        return stratified_halves(codes, n_splits, rng)
    obs, where = held.data.obs, held.where
    if donor not in obs.columns:
        raise KeyError(
            f"{where}.obs has no column {donor!r}; it has {listing(obs.columns)}. Pass one of them as donor=."
        )
    column = read_column(obs, donor)
    if pd.api.types.is_float_dtype(column):
        raise ValueError(f"{where}.obs[{donor!r}] is continuous ({column.dtype}). Pass a column of names as donor=.")
    donors, found = pd.factorize(column[known])
    if (donors < 0).any():
        raise ValueError(
            f"{where}.obs[{donor!r}] is missing for {(donors < 0).sum()} of the {len(donors)} labelled cells. "
            "Fill it in, or remove these cells."
        )
    if len(found) < 2:
        raise ValueError(
            f"{where}.obs[{donor!r}] has only one donor ({listing(found)}) among the labelled cells; two are needed. "
            "Leave donor= out to divide the cells of each label instead."
        )
    return donor_halves(codes, donors, n_splits, rng)


def _scope(scores: LabelScores, silent: np.ndarray, form: str) -> np.ndarray:
    significant = (scores.difference > Z * scores.standard_error).sum(axis=0)
    several = "regional" if form == "3-way" else "global"
    return np.select([silent, significant == 1, significant > 1], ["dead", "local", several], "global")


def _trend(a: Matrix, places: np.ndarray, n_labels: int, groupby: str) -> dict[str, object]:
    """Make the columns of a trend along the order, from the cells whose label is in it."""
    from ..core.labels import trend
    from ..core.statistics import benjamini_hochberg

    along = np.flatnonzero(places >= 0)
    found = trend(select_rows(a, along), places[along], n_labels)
    return {
        f"{groupby}_trend": pd.Categorical.from_codes(found.direction + 1, categories=pd.Index(TRENDS)),
        f"{groupby}_trend_score": found.score,
        f"{groupby}_trend_padj": benjamini_hochberg(found.pval),
    }


def _table(
    scores: LabelScores, fit: CrossFit, padj: np.ndarray, features: pd.Index, groupby: str, names: pd.Index
) -> pd.DataFrame:
    """Make a row per feature and label."""
    feature_codes, label_codes = np.divmod(np.arange(padj.size), len(names))
    columns = {
        "feature": feature_codes,
        "groupby": np.zeros(padj.size, dtype=np.int64),
        "label": label_codes,
        "held_out_auroc": fit.auroc.T.ravel(),
        "held_out_f1": fit.f1.T.ravel(),
        "padj": padj.T.ravel(),
        **{name: getattr(scores, name).T.ravel() for name in _schema.LABELS if hasattr(scores, name)},
    }
    return _schema.tidy(columns, _schema.LABELS, {"feature": features, "groupby": pd.Index([groupby]), "label": names})


def _summary(
    sources: list[Source], fits: list[CrossFit], codes: np.ndarray, groupby: str, names: pd.Index
) -> pd.DataFrame:
    """Make a row per label and source."""
    by_source = [_chosen(source, fit, codes[source.rows]) for source, fit in zip(sources, fits, strict=True)]
    rows = [row for of_label in zip(*by_source, strict=True) for row in of_label]
    label_codes, source_codes = np.divmod(np.arange(len(rows)), len(sources))
    columns = {
        "groupby": np.zeros(len(rows), dtype=np.int64),
        "label": label_codes,
        "source": source_codes,
        "n_cells": np.bincount(codes)[label_codes],
        **{
            name: np.array([row[name] for row in rows], dtype=object if name == "selected" else None)
            for name in rows[0]
        },
    }
    categories = {
        "groupby": pd.Index([groupby]),
        "label": names,
        "source": pd.Index([source.name for source in sources]),
    }
    return _schema.tidy(columns, _schema.LABEL_SUMMARY, categories)


def _chosen(source: Source, fit: CrossFit, codes: np.ndarray) -> list[dict[str, object]]:
    """Summarise the choices of each label over the splits that have it in both halves."""
    from ..core.labels import differences

    unknown: dict[str, object] = {"selected": None, **dict.fromkeys(_schema.LABEL_SUMMARY[5:], np.nan)}
    rows: list[dict[str, object]] = []
    best, agreement = np.zeros(fit.chosen.shape[2], dtype=np.int64), np.zeros(fit.chosen.shape[2])
    for label, chosen in enumerate(np.moveaxis(fit.chosen, 2, 0)):
        columns, counts = np.unique(chosen[chosen >= 0], return_counts=True)
        if len(columns):
            best[label], agreement[label] = columns[counts.argmax()], counts.max() / counts.sum()
    width = source.matrix.shape[1]
    apart, low, high = differences(source.matrix, best % width, codes, signs=np.where(best < width, 1.0, -1.0))
    for label, chosen in enumerate(np.moveaxis(fit.chosen, 2, 0)):
        scored = chosen[:, 0] >= 0
        if not scored.any():
            rows.append(unknown)
            continue
        held_out = fit.held_out_auroc[scored, :, label].mean(axis=1)
        row = {
            "selected": str(source.names[best[label]]),
            "agreement": agreement[label],
            "selection_auroc": fit.selection_auroc[scored, :, label].mean(),
            "held_out_auroc": held_out.mean(),
            "held_out_sd": held_out.std(ddof=1) if len(held_out) > 1 else np.nan,
            "held_out_f1": fit.held_out_f1[scored, :, label].mean(),
        }
        rows.append(row | {"difference": apart[label], "ci_low": low[label], "ci_high": high[label]})
    return rows
