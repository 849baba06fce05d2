from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, Holder, Representation, holder, listing
from .._design import label_column
from .._progress import progress_bar
from .._schema import Features
from ..core.rows import dense_rows, pieces, read_rows

MIN_CELLS = 10
"""Of a batch or label; features are not chosen, or kept, for a smaller one."""
BLOCK_ROWS = 8192
FEATURES = ("key_added", "feature", "batch", "batch_score", "label", "label_score", "size", "ablated")
SCORES = (
    "key_added", "source", "draw", "n_features", "change", "batch_asw", "silhouette_batch", "silhouette_label", "batch_purity",
    "label_purity", "label_accuracy",
)  # fmt: skip
SOURCES = pd.Index(["before", "after", "control"])


def ablate(
    data: Data,
    features: Features = None,
    *,
    batch: str | None = None,
    groupby: str | Sequence[str] | None = None,
    threshold: float = 0.75,
    label_threshold: float = 0.85,
    n_controls: int = 20,
    n_neighbors: int = 15,
    max_cells: int = 5_000,
    key: str = "sae",
    mod: str | None = None,
    key_added: str | None = None,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> None:
    r"""Remove features from a representation: given ones, or those that tell batches apart and no labels.

    With a_f the activation of feature f in a cell and z its representation, the new one is

    .. math::
        z' = z - \sum_f a_f W_{dec, f}

    over the removed features: as if they were off in every cell. What the SAE does not reconstruct stays in z'.

    Without `features`, those are removed whose score for a batch is `threshold` or more, and whose score for every label is
    below `label_threshold`. The score is AUROC or 1 − AUROC, whichever is higher: how well the feature, by being higher or lower, tells
    the cells of one batch (label) from the others. So that batches that differ in their cell types are not told by those, and cell types
    not by batches, batches are told apart within labels and labels within batches: the AUROC is the mean over them, with the
    weights n₁ n₀ / (n₁ + n₀ + 1) of van Elteren's test. Batches and labels of fewer than 10 cells have no say.

    Parameters
    ----------
    data
        AnnData, or MuData with `mod`, with activations.
    features
        Names or numbers of features; by default they are found.
    batch
        Column of `obs` with batches (samples, technologies).
    groupby
        Column of `obs` with labels that are to be kept, such as cell types, or several columns, of which the first is scored.
        Cells without a batch or label have no part in scores.
    threshold, label_threshold
        See above, for features that are found.
    n_controls
        Draws of as many random features, which are removed and scored in the same way. Each stands for one that was removed, and is one
        of the ten others that move cells most similarly far when removed. 0 for none.
    n_neighbors
        Nearest neighbors of a cell, without itself, for the scores.
    max_cells
        Cells on which representations are scored, drawn at random from more.
    key
        Name of the SAE.
    mod
        The modality that holds the SAE and the representation.
    key_added
        Name of the new representation, by default that of the old one with `_ablated`. An earlier ablation is replaced.
    rng
        Seed or generator, for controls and the cells that are scored.
    progress
        Show a progress bar when it takes more than a second.

    Returns
    -------
    Nothing. Writes `obsm[key_added]`, the new representation (float32, the columns that the SAE reads), and the tables
    `uns[key]["ablation"]["features"]` and `["scores"]`, whose rows for another `key_added` are kept.

    `features`, a row per feature: `key_added`, `feature`, `batch` and `label`, which it tells best, `batch_score`, `label_score`,
    `size` (what its removal alone would change, see below) and `ablated`.

    `scores`, a row for `"before"`, `"after"` and each `"control"` (column `source`; `draw` numbers the controls), with
    `n_features` removed and, of the scored cells, `change`, mean ‖z' − z‖² / (variance over the cells given to `fit`), and scores of mixing,
    by the definitions of scib-metrics where it has them, with s the silhouette width of a cell (NaN without `batch` or `groupby`):

    * `batch_asw`, mean s between batches, −1 to 1: the lower, the better batches mix;
    * `silhouette_batch`, mean over labels of the mean of 1 − \|s\| between batches within the label, 0 to 1: the higher, the better;
    * `silhouette_label`, (mean s between labels + 1) / 2: the higher, the better labels are kept;
    * `batch_purity`, `label_purity`, mean share of a cell's neighbors that are of its own batch, or label;
    * `label_accuracy`, the share of cells whose label most of their neighbors have.

    Raises
    ------
    KeyError
        There are no activations, or no such feature or column.
    ValueError
        No feature was found, or it cannot be looked for without `batch` and `groupby`; a column with one batch or label only; a
        setting out of range; `key_added` holds something else.

    Notes
    -----
    Scores are of the cells that features were chosen on, and the SAE was trained on; the controls were not chosen. A batch effect that no
    feature has to itself stays, and so does what is in the unreconstructed part: this removes features, it does not integrate data sets.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.pbmc68k()
    >>> sae.tl.fit(adata, n_features=32, steps=200)
    >>> sae.tl.encode(adata)
    >>> sae.tl.ablate(adata, ["sae_3", "sae_5"], batch="phase", groupby="bulk_labels", n_controls=5)
    >>> adata.obsm["X_pca_ablated"].shape
    (700, 50)
    >>> adata.uns["sae"]["ablation"]["scores"]["source"].tolist()[:3]
    ['before', 'after', 'control']
    """
    from scanpy import logging as logg

    from ..core.mixing import alike, removed, step_sizes

    _check(threshold, label_threshold, n_controls=n_controls, n_neighbors=n_neighbors, max_cells=max_cells)
    held, rng = holder(data, mod), np.random.default_rng(rng)
    a, latent, stored = _schema.activations_in_memory(held, key), _schema.latent(held, key), _schema.read(held, key)
    W_dec, variance = _schema.model(stored).W_dec, stored["params"]["variance"]
    names = _schema.feature_names(key, a.shape[1])
    key_added = _target(held, key_added, stored)
    groups = _groups(held, batch, groupby)
    told = _told(a[groups.rows], groups)
    if features is None:
        chosen = _found(told, groups, names, threshold, label_threshold, held.where)
    else:
        chosen = _schema.resolve(features, names, stored["features"].get("name"))
    compared = groups.batch is not None or bool(groups.labels)
    scored = groups.of(_sample(len(groups.rows), max_cells, n_neighbors if compared else 0, held.where, rng))
    size = step_sizes(a, W_dec)
    controls = alike(size, chosen, n_controls if compared else 0, rng)

    start = logg.info(f"removing {len(chosen)} of {len(names)} features from {latent.where}")
    sets = [np.empty(0, dtype=np.int64), chosen, *controls]
    x, some, rows = read_rows(latent.matrix, scored.rows).astype(np.float64), a[scored.rows], []
    with progress_bar(len(sets), "ablate", "representation", shown=progress) as bar:
        for one in sets:
            rows.append(scored.row(x, removed(x, some, W_dec, one), len(one), variance, n_neighbors))
            bar.update()
    tables = {
        "features": _features_table(told, groups, names, key_added, size / variance, chosen),
        "scores": _scores_table(rows, key_added),
    }
    earlier = stored.get("ablation", {})
    tables = {
        name: _schema.replace_rows(earlier.get(name), table, {"key_added": key_added}) for name, table in tables.items()
    }
    new = _schema.Change(held.data, "obsm", key_added, _all_rows(latent, a, W_dec, chosen))
    _schema.write(held, key, {**stored, "ablation": tables}, also=[new])
    if compared and n_controls and not controls:
        logg.warning(f"no random features to compare with: fewer than {len(chosen)} others are active.")
    logg.info(
        "    finished",
        time=start,
        deep=f"added\n    {held.where}.obsm[{key_added!r}], {latent.where} without {listing(names[chosen], 5)}; "
        f"{held.where}.uns[{key!r}]['ablation']{_summary(rows, len(scored.rows))}",
    )


@dataclass(frozen=True)
class _Groups:
    """The cells with a batch and labels.

    Attributes
    ----------
    rows
        (n,) their positions.
    batch
        (n,) their codes, None if there are none.
    labels
        Codes (n,) of each column of labels.
    batch_names, label_names
        What the codes of each column stand for.
    """

    rows: np.ndarray
    batch: np.ndarray | None
    labels: list[np.ndarray]
    batch_names: list[pd.Index]
    label_names: list[pd.Index]

    def of(self, some: np.ndarray) -> _Groups:
        """Keep some of the cells."""
        batch = None if self.batch is None else self.batch[some]
        labels = [codes[some] for codes in self.labels]
        return _Groups(self.rows[some], batch, labels, self.batch_names, self.label_names)

    def row(
        self, z: np.ndarray, new: np.ndarray, n_features: int, variance: float, n_neighbors: int
    ) -> dict[str, float]:
        """Score a representation (n, d) of these cells that was made of z by the removal of features."""
        from ..core.mixing import mixing

        change = float(((new - z) ** 2).sum(axis=1).mean() / variance)
        scores = mixing(new, self.batch, self.labels[0] if self.labels else None, n_neighbors)
        return {"n_features": n_features, "change": change, **asdict(scores)}


@dataclass(frozen=True)
class _Told:
    """Which batch (label) each feature tells best, −1 for none, and how well, NaN where that cannot be said; all (h,)."""

    batch: np.ndarray
    batch_score: np.ndarray
    label: np.ndarray
    """Among the names of all columns, one after another."""
    label_score: np.ndarray


def _groups(held: Holder, batch: str | None, groupby: str | Sequence[str] | None) -> _Groups:
    """Read the columns, for the cells that have a value in all of them."""
    by = [groupby] if isinstance(groupby, str) else list(groupby or ())
    columns = by if batch is None else [batch, *by]
    values = [label_column(held.data.obs, column, held.where) for column in columns]
    known = np.all([np.ones(held.data.n_obs, dtype=bool), *(part.codes >= 0 for part in values)], axis=0)
    if not known.any():
        raise ValueError(f"No cell of {held.where} has a value in all of {listing(columns)}.")
    found = [np.unique(part.codes[known], return_inverse=True) for part in values]
    codes = [of_cells for _, of_cells in found]
    names = [part.categories[used].astype(str) for part, (used, _) in zip(values, found, strict=True)]
    first = len(columns) - len(by)
    return _Groups(np.flatnonzero(known), codes[0] if first else None, codes[first:], names[:first], names[first:])


def _told(a: sparse.csr_matrix, groups: _Groups) -> _Told:
    """Score features for batches within labels, and for labels within batches."""
    everywhere = np.zeros(a.shape[0], dtype=np.int64)
    unknown = np.full(a.shape[1], -1), np.full(a.shape[1], np.nan)
    of_batch, of_label = unknown, unknown
    if groups.batch is not None:
        within = np.unique(np.stack([everywhere, *groups.labels]), axis=1, return_inverse=True)[1].ravel()
        of_batch = _best([_scores(a, groups.batch, within)])
    if groups.labels:
        within = everywhere if groups.batch is None else groups.batch
        of_label = _best([_scores(a, codes, within) for codes in groups.labels])
    return _Told(*of_batch, *of_label)


def _scores(a: sparse.csr_matrix, codes: np.ndarray, within: np.ndarray) -> np.ndarray:
    """How well features tell groups of 10 cells or more, in either direction (groups, h); NaN for smaller groups."""
    from ..core.mixing import separation

    auroc = separation(a, codes, within)
    return np.where((np.bincount(codes) >= MIN_CELLS)[:, None], np.maximum(auroc, 1 - auroc), np.nan)


def _best(scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which group each feature tells best (h,), −1 where that cannot be said, and how well (h,)."""
    stacked = np.vstack(scores)
    best = np.where(np.isnan(stacked), -1, stacked).argmax(axis=0)
    score = stacked[best, np.arange(stacked.shape[1])]
    return np.where(np.isnan(score), -1, best), score


def _found(
    told: _Told, groups: _Groups, names: pd.Index, threshold: float, label_threshold: float, where: str
) -> np.ndarray:
    """Choose the features that tell batches and no labels, or say how close the others are."""
    if groups.batch is None or not groups.labels:
        raise ValueError(
            "To find the features to remove, batch= and groupby= are needed, columns of obs with batches and with labels to keep "
            "(clusters, if there are no cell types). Or pass features=."
        )
    if np.isnan(told.batch_score).all():
        raise ValueError(
            f"No label of {where} has cells of two batches, of {MIN_CELLS} cells or more each: batches cannot be told from labels. "
            "Pass another groupby=, or features=."
        )
    if np.isnan(told.label_score).all():
        raise ValueError(
            f"No label of {where} with {MIN_CELLS} cells or more is beside others in a batch, so that it is not known what to keep. "
            "Pass another groupby=, or features=."
        )
    chosen = np.flatnonzero((told.batch_score >= threshold) & (told.label_score < label_threshold))
    if len(chosen) == 0:
        best = np.argsort(-told.batch_score, kind="stable")[:3]
        listed = ", ".join(f"{names[i]} ({told.batch_score[i]:.3f}, {told.label_score[i]:.3f})" for i in best)
        raise ValueError(
            f"No feature scores {threshold} or more for a batch and less than {label_threshold} for every label. Those of the highest batch score "
            f"(batch, label): {listed}. Lower threshold=, raise label_threshold=, or pass features=."
        )
    return chosen


def _sample(n: int, most: int, n_neighbors: int, where: str, rng: np.random.Generator) -> np.ndarray:
    """Draw the cells that representations are scored on."""
    scored = min(n, most)
    if scored <= n_neighbors:
        raise ValueError(
            f"n_neighbors={n_neighbors} needs more than {n_neighbors} cells, and {scored} of {where} are scored. Lower it."
        )
    return np.arange(n) if n <= most else np.sort(rng.choice(n, most, replace=False))


def _all_rows(latent: Representation, a: sparse.csr_matrix, W_dec: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Make the new representation, read in blocks of rows."""
    from ..core.mixing import removed

    new = np.empty(latent.matrix.shape, dtype=np.float32)
    for rows, part in pieces(latent.matrix, BLOCK_ROWS):
        new[rows] = removed(dense_rows(part, slice(None)), a[rows], W_dec, chosen)
    return new


def _features_table(
    told: _Told, groups: _Groups, names: pd.Index, key_added: str, size: np.ndarray, chosen: np.ndarray
) -> pd.DataFrame:
    columns = {
        "key_added": np.zeros(len(names), dtype=np.int64),
        "feature": np.arange(len(names)),
        "batch": _named(told.batch, groups.batch_names),
        "batch_score": told.batch_score,
        "label": _named(told.label, groups.label_names),
        "label_score": told.label_score,
        "size": size,
        "ablated": np.isin(np.arange(len(names)), chosen),
    }
    return _schema.tidy(columns, FEATURES, {"key_added": pd.Index([key_added]), "feature": names})


def _named(codes: np.ndarray, of_columns: Sequence[pd.Index]) -> np.ndarray:
    """Write out codes into the names of all columns, one after another; −1 is None."""
    names = [name for names in of_columns for name in names]
    return np.array([names[code] if code >= 0 else None for code in codes], dtype=object)


def _scores_table(rows: Sequence[Mapping[str, float]], key_added: str) -> pd.DataFrame:
    draw = np.maximum(np.arange(len(rows)) - 1, 0)
    columns = {
        "key_added": np.zeros(len(rows), dtype=np.int64),
        "source": np.minimum(np.arange(len(rows)), 2),
        "draw": draw,
        **{name: np.array([row[name] for row in rows]) for name in SCORES[3:]},
    }
    return _schema.tidy(columns, SCORES, {"key_added": pd.Index([key_added]), "source": SOURCES})


def _summary(rows: Sequence[Mapping[str, float]], n_cells: int) -> str:
    """Say in a log message what became of batches and labels."""
    told = []
    for name in ("batch_asw", "label_accuracy"):
        if not np.isnan(rows[0][name]):
            controls = [row[name] for row in rows[2:]]
            beside = f" (random features {np.mean(controls):.3f})" if controls else ""
            told.append(f"{name} {rows[0][name]:.3f} → {rows[1][name]:.3f}{beside}")
    return f", of {n_cells} cells: {', '.join(told)}" if told else ""


def _check(threshold: float, label_threshold: float, **at_least: int) -> None:
    for name, value in (("threshold", threshold), ("label_threshold", label_threshold)):
        if not 0.5 < value <= 1:
            raise ValueError(f"{name}={value} is not above 0.5 (what random features score) and up to 1.")
    for name, number in at_least.items():
        least = 0 if name == "n_controls" else 1
        if not isinstance(number, int | np.integer) or number < least:
            raise ValueError(f"{name}={number!r} is not an integer of {least} or more.")


def _made(stored: Mapping[str, Any]) -> set[str]:
    """Name the representations that an SAE's features were removed from."""
    return set(stored["ablation"]["scores"]["key_added"]) if "ablation" in stored else set()


def _target(held: Holder, key_added: str | None, stored: Mapping[str, Any]) -> str:
    """Name the new representation, and refuse to write over anything but an earlier one."""
    encoded = stored["encoded"]
    default = f"{encoded['layer'] or encoded['use_rep']}_ablated"
    name = default if key_added is None else key_added
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"key_added={name!r} cannot name a representation: it must be a non-empty string without '/'.")
    _schema.check_free(held, name)
    by_this = _made(stored)
    by_others = {made for key in _schema.stored_keys(held.data.uns) for made in _made(held.data.uns[key])} - by_this
    if name in held.data.obsm and name not in by_this and (name in by_others or name != default):
        raise ValueError(
            f"{held.where}.obsm[{name!r}] exists and is no earlier ablation with this SAE: it would be overwritten. Choose "
            "another key_added=, or remove it first."
        )
    return name
