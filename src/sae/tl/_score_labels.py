from __future__ import annotations

import numpy as np
import pandas as pd

from .. import _schema
from .._data import Data, holder, listing

Z = 1.96
MAX_LABELS = 1_000
SCOPES = ("local", "regional", "global", "dead")


def score_labels(data: Data, groupby: str, *, key: str = "sae", mod: str | None = None, max_padj: float = 0.05) -> None:
    r"""Score every feature against every label of the cells (cell types, conditions, batches).

    For a label with n₁ cells inside and n₀ outside, and the activation of one feature as the score of a cell:

    * `auroc` = U / (n₁ n₀), the probability that a cell of the label has the higher activation, ties counted half;
      `pval` is the two-sided Mann-Whitney test of it (normal approximation with correction for ties and continuity),
      adjusted over features and labels by Benjamini-Hochberg;
    * `f1`, the best 2 TP / (2 TP + FP + FN) over all thresholds above zero;
    * `difference` D, mean activation inside minus outside.

    A feature is called significant for a label when D > 1.96 (SE₁ + SE₀), with SE = s / √n, and its scope is `"local"` for
    exactly one such label, `"regional"` for several, `"global"` for none although it is active, `"dead"` when it is active in no labelled cell
    (arXiv:2410.11468, the 3-way form).

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
    max_padj
        Only for the log message: how many labels have a feature with an adjusted p-value up to this.

    Returns
    -------
    Nothing. Writes `uns[key]["labels"]`, a row per feature and label: `feature`, `groupby`, `label`, `auroc`, `f1`,
    `difference`, `pval`, `padj`; and in `uns[key]["features"]` the columns `{groupby}_label` (with the highest AUROC),
    `{groupby}_auroc` and `{groupby}_scope`. Rows of another `groupby` are kept.

    Raises
    ------
    KeyError
        There are no activations, or no such column.
    ValueError
        The column is continuous, or has fewer than two labels.

    Notes
    -----
    Scores are computed on all cells. The best of many features on the cells it was chosen on looks better than it is: to
    report a score, choose on one part of the cells and score on another.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.score_labels(adata, "bulk_labels")
    >>> sae.get.labels(adata)["label"].nunique()
    10
    """
    from scanpy import logging as logg

    from ..core.statistics import benjamini_hochberg
    from ..core.statistics import score_labels as score

    held = holder(data, mod)
    a = _schema.activations(held, key)
    labels = _labels(held.data.obs, groupby, held.where)
    known = labels.codes >= 0
    names = labels.categories.astype(str)
    start = logg.info(f"scoring {a.shape[1]} features against {len(names)} labels of {groupby!r}")
    scores = score(a[known], labels.codes[known].astype(np.int64), len(names))
    padj = benjamini_hochberg(scores.pval.ravel()).reshape(scores.pval.shape)

    features = _schema.feature_names(key, a.shape[1])
    feature_codes, label_codes = np.divmod(np.arange(scores.auroc.size), len(names))
    columns = {
        "feature": feature_codes,
        "groupby": np.zeros(scores.auroc.size, dtype=np.int64),
        "label": label_codes,
        "padj": padj.T.ravel(),
        **{name: getattr(scores, name).T.ravel() for name in ("auroc", "f1", "difference", "pval")},
    }
    categories = {"feature": features, "groupby": pd.Index([groupby]), "label": names}
    table = _schema.tidy(columns, _schema.LABELS, categories)

    stored = _schema.read(held, key)
    significant = (scores.difference > Z * scores.standard_error).sum(axis=0)
    silent = a[known].getnnz(axis=0) == 0
    scope = np.select([silent, significant == 1, significant > 1], ["dead", "local", "regional"], "global")
    best = scores.auroc.argmax(axis=0)
    summary = stored["features"].assign(
        **{
            f"{groupby}_label": pd.Categorical.from_codes(np.where(silent, -1, best), categories=names),
            f"{groupby}_auroc": scores.auroc.max(axis=0),
            f"{groupby}_scope": pd.Categorical(list(scope), categories=list(SCOPES)),
        }
    )
    table = _schema.replace_rows(stored.get("labels"), table, {"groupby": groupby})
    _schema.write(held, key, {**stored, "labels": table, "features": summary})
    counts = ", ".join(f"{(scope == name).sum()} {name}" for name in SCOPES)
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.uns[{key!r}]['labels'], groupby {groupby!r}: {counts}; "
        f"{int(((padj <= max_padj) & (scores.auroc > 0.5)).any(axis=1).sum())} of {len(names)} labels have a feature",
    )


def _labels(obs: pd.DataFrame, groupby: str, where: str) -> pd.Categorical:
    """Read a column of labels, with unused categories dropped."""
    if not isinstance(groupby, str) or groupby not in obs.columns:
        raise KeyError(f"{where}.obs has no column {groupby!r}; it has {listing(obs.columns)}.")
    if "/" in groupby:
        raise ValueError(f"{groupby!r} cannot name stored columns: h5ad does not take '/' in keys. Rename the column.")
    column = obs[groupby]
    if pd.api.types.is_float_dtype(column):
        raise ValueError(
            f"{where}.obs[{groupby!r}] is continuous ({column.dtype}). Pass a column of labels, or make one with pd.cut."
        )
    labels = pd.Categorical(column).remove_unused_categories()
    if len(labels.categories) > MAX_LABELS:
        raise ValueError(
            f"{where}.obs[{groupby!r}] has {len(labels.categories)} different values; labels can be up to {MAX_LABELS}. "
            "Pass a column of cell types, conditions or the like."
        )
    if not labels.categories.astype(str).is_unique:
        raise ValueError(
            f"{where}.obs[{groupby!r}] has labels that read the same as text ({listing(labels.categories)}). Rename them."
        )
    if len(labels.categories) < 2:
        found = f"only one label ({listing(labels.categories)})" if len(labels.categories) else "no labels"
        raise ValueError(
            f"{where}.obs[{groupby!r}] has {found}; a feature can only be told from another label: two are needed."
        )
    return labels
