from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _schema
from .._data import Data, Holder, holder, is_mudata, listing, modality, readable, refuse_non_finite, representation
from .._variables import Asked, Variables, variables
from ..core.rows import Columns, Matrix, dense_rows, on_disk, select_rows

if TYPE_CHECKING:
    from ..core.recovery import GraphRecovery, Recovery

EDGES = ("regression", "correlation", "cosine")
FOLDS = 5


def recovery(
    data: Data,
    truth: Asked,
    *,
    key: str = "sae",
    use_rep: str | None = None,
    layer: str | None = None,
    mod: str | None = None,
    thresholds: Sequence[float] = (0.9, 0.95),
    ceiling: bool = True,
    graph: str | np.ndarray | sparse.spmatrix | pd.DataFrame | None = None,
    edges: Literal["regression", "correlation", "cosine"] = "regression",
    cut: float | None = None,
    var_mod: str | None = None,
    summary: bool = False,
    rng: int | np.random.Generator | None = 0,
) -> pd.DataFrame:
    r"""Find known variables among the features of an SAE, or among the columns of anything else.

    For each variable, over all cells, with r Pearson's correlation of the variable with the activation of a feature: the
    feature of highest \|r\|; the feature that it gets when every variable has its own (the one-to-one matching, within a
    group, with the highest sum of \|r\|); and how many features are above a threshold, which tells whether it was split.

    The linear ceiling is the held-out multiple correlation R = √max(R², 0) with the representation that the SAE was trained
    on: what the best direction in it could know (:func:`probe`). A feature with a threshold is no direction and can be above.

    With a graph, every gene gets a score for the matched feature of every variable, and as many edges as the truth has are
    drawn, those with the highest scores of all. Precision, recall and F1 are of the edges of one variable; average precision
    is of the order of its genes, by chance about `density`.

    Parameters
    ----------
    data
        AnnData with activations, or MuData with `mod` or an SAE of its own.
    truth
        Variables: a key of `obsm`, a column of `obs`, a list of these, an array or DataFrame with a row per cell (a DataFrame
        is brought into the order of `obs_names`), or a dict from names of groups to one of these. A categorical column counts
        label by label; pass its codes to have it as one number.
    key
        Name of the SAE.
    use_rep
        Judge the columns of this key of `obsm`, or of `"X"`, instead of the SAE: principal components, genes.
    layer
        The same for a layer.
    mod
        The modality that holds the SAE.
    thresholds
        Of \|r\|, to count features and variables above them.
    ceiling
        Whether to regress the variables on the representation.
    graph
        Which variable drives which gene, genes × variables: a key of `varm`, or values that are 0 where it does not. It is of
        every group with as many variables.
    edges
        Score of a gene: `"regression"`, its standardised slope on all matched features of the group at once; or one feature
        at a time, `"correlation"` or, as published, `"cosine"` (without centring). Only the slopes tell a program from others
        that the same cells use: with the true variables for features they give the true graph, where there is no noise.
    cut
        Share of all pairs of variable and gene that are drawn as edges; by default as many as the truth has.
    var_mod
        The modality whose `X` and `varm` the graph is of, by default `mod`.
    summary
        Return the table of groups instead of that of variables.
    rng
        Seed or generator, for the folds of the ceiling.

    Returns
    -------
    A table with a row per variable: `group`, `variable`; `feature`, its `r` and `abs_r`; `signed_r`, the highest r of any
    feature, sign and all; `matched_feature` and `matched`, its \|r\| (0 if there are too few features); `n_above_0.9`,
    `n_above_0.95`, features above each threshold; `ceiling`; `precision`, `recall`, `f1`, `average_precision`, `density`.

    With `summary`, a row per group: `group`, `n_variables`; `mean_abs_r` and `max_abs_r`; `mean_signed_r` and `max_signed_r`
    (the published measure, which one lucky variable decides); `matched`, a mean; for each threshold `n_above_0.9`, variables
    with a feature above it, `n_matched_above_0.9`, with one of their own, and `features_per_variable_0.9`, a mean; and the
    means of `ceiling`, and of the columns of the graph.

    Raises
    ------
    KeyError
        There are no activations, or no such column or key.
    ValueError
        The truth has NaN, or a row for other cells, or no variable that differs between cells; the graph is of other genes or of
        no group; fewer than ten cells (three without the ceiling).

    Notes
    -----
    A variable that is the same in all cells has NaN everywhere. Many features find a variable by chance the better, the fewer the
    cells: compare with random directions (`use_rep=`), never with 0.

    Examples
    --------
    >>> import sae
    >>> adata = sae.datasets.simulate_small(2_000)
    >>> sae.tl.fit(adata, "X", n_features=8, k=2, steps=200, progress=False)
    >>> sae.tl.encode(adata)
    >>> found = sae.tl.recovery(adata, {"X": "programs", "A": "activity"}, graph="programs")
    >>> found["variable"].tolist()
    ['X_0', 'X_1', 'X_2', 'activity']
    >>> genes = sae.tl.recovery(adata, "programs", use_rep="X", summary=True)
    >>> genes["max_abs_r"].round(2).tolist()
    [1.0]
    """
    from ..core.recovery import correlations, judged

    _check(thresholds, edges, cut)
    held = holder(data, mod)
    if use_rep is None and layer is None:
        a: Matrix = _schema.activations_in_memory(held, key)
        names = _schema.feature_names(key, a.shape[1])
        latent = _schema.latent(held, key).matrix if ceiling else None
    else:
        judge = representation(held, use_rep, layer)
        a = latent = judge.matrix
        names = pd.Index([f"{use_rep}_{i}" for i in range(a.shape[1])] if judge.names is None else judge.names)
    found = variables(held, truth, "truth")
    _refuse_few(len(found.values), latent, ceiling, held.where)
    varies = found.varying("truth")
    known = None if graph is None else _graph(data, held, graph, var_mod, found)

    r = correlations(found.values, a)
    highest = np.full(len(varies), np.nan)
    if ceiling:
        highest[varies] = _ceiling(latent, found.values[:, varies], rng)
    parts = []
    for group in dict.fromkeys(found.group):
        in_group = found.group == group
        some = np.flatnonzero(in_group & varies)
        result = judged(r[some], thresholds)
        part = _of_features(result, names, thresholds) | {"ceiling": highest[some]}
        if known is not None and len(some) and known.edges.shape[1] == in_group.sum():
            part |= vars(known.compared(a, result, r[some], varies[in_group], edges, cut))
        parts.append(pd.DataFrame(part, index=some))
    table = pd.concat(parts).reindex(range(len(varies)))
    table = pd.DataFrame({"group": found.group, "variable": found.name}).join(table)
    if summary:
        table = _summary(table, thresholds)
    columns = {str(name): column.to_numpy() for name, column in table.items()}
    return _schema.tidy(columns, list(columns), {})


def _check(thresholds: Sequence[float], edges: str, cut: float | None) -> None:
    if np.ndim(thresholds) != 1:
        raise TypeError(f"thresholds={thresholds!r} is a {type(thresholds).__name__}; expected a list of numbers.")
    outside = [threshold for threshold in thresholds if not 0 <= threshold < 1]
    if outside:
        raise ValueError(f"thresholds has {outside[0]}; those of |r| are from 0 to 1, 1 excluded.")
    if edges not in EDGES:
        raise ValueError(f"edges={edges!r} is none of {listing(EDGES)}.")
    if cut is not None and not 0 < cut <= 1:
        raise ValueError(f"cut={cut} is not a share above 0 and up to 1.")


def _refuse_few(n: int, latent: Matrix | None, ceiling: bool, where: str) -> None:
    from ..core.probe import MAX_COLUMNS

    if n < (2 * FOLDS if ceiling else 3):
        raise ValueError(
            f"{where} has {n} cells: a correlation needs three, and the linear ceiling {2 * FOLDS}. Pass more cells"
            + (", or ceiling=False." if n > 2 else ".")
        )
    if latent is not None and ceiling and min(latent.shape) > MAX_COLUMNS:
        raise ValueError(
            f"The linear ceiling of {latent.shape[1]} columns is not computed; up to {MAX_COLUMNS} are. Pass ceiling=False, or "
            "judge some of the columns."
        )


def _ceiling(latent: Matrix | None, truth: np.ndarray, rng: int | np.random.Generator | None) -> np.ndarray:
    """Return the held-out multiple correlation (p,) of each variable with a representation."""
    from ..core.probe import linear_r2, random_folds, standardised

    folds = random_folds(len(truth), FOLDS, np.random.default_rng(rng))
    return np.sqrt(np.maximum(linear_r2(standardised(latent), truth, folds).score, 0))


def _of_features(result: Recovery, names: pd.Index, thresholds: Sequence[float]) -> dict[str, np.ndarray]:
    matched = np.asarray(names, dtype=object)[result.partner]
    matched[result.partner < 0] = None
    return {
        "feature": np.asarray(names, dtype=object)[result.feature],
        "r": result.r,
        "abs_r": result.best,
        "signed_r": result.highest,
        "matched_feature": matched,
        "matched": result.matched,
        **{f"n_above_{threshold}": n for threshold, n in zip(thresholds, result.n_above, strict=True)},
    }


def _summary(table: pd.DataFrame, thresholds: Sequence[float]) -> pd.DataFrame:
    rows = []
    for group, part in table.groupby("group", sort=False):
        row = {"group": group, "n_variables": part["abs_r"].count()}
        for name in ("abs_r", "signed_r"):
            row |= {f"mean_{name}": part[name].mean(), f"max_{name}": part[name].max()}
        row["matched"] = part["matched"].mean()
        for threshold in thresholds:
            row[f"n_above_{threshold}"] = (part["abs_r"] > threshold).sum()
            row[f"n_matched_above_{threshold}"] = (part["matched"] > threshold).sum()
            row[f"features_per_variable_{threshold}"] = part[f"n_above_{threshold}"].mean()
        means = ("ceiling", "precision", "recall", "f1", "average_precision", "density")
        rows.append(row | {name: part[name].mean() for name in means if name in part})
    return pd.DataFrame(rows)


# ---- Which variable drives which gene


@dataclass(frozen=True)
class Graph:
    """The expression (n, g) of the cells, and which edges (g, p) are true."""

    x: Matrix
    edges: np.ndarray

    def compared(
        self, a: Matrix, result: Recovery, r: np.ndarray, varies: np.ndarray, method: str, cut: float | None
    ) -> GraphRecovery:
        """Compare the edges of the matched features with those of the variables that vary."""
        from ..core.recovery import edge_scores, graph_recovery

        truth = self.edges[:, varies].T
        paired = np.flatnonzero(result.partner >= 0)
        partner = result.partner[paired]
        chosen = dense_rows(Columns(a, partner) if on_disk(a) else a[:, partner], slice(0, a.shape[0]))
        scores = np.full(truth.shape, -np.inf)
        # A feature that is low where the variable is high has its edges turned round.
        scores[paired] = np.sign(r[paired, partner])[:, None] * edge_scores(chosen, self.x, method)
        return graph_recovery(scores, truth, int(truth.sum()) if cut is None else round(cut * truth.size))


def _graph(data: Data, held: Holder, graph: Any, var_mod: str | None, found: Variables) -> Graph:
    source, where = held.data, held.where
    if var_mod is not None:
        if not is_mudata(data):
            raise ValueError(f"var_mod={var_mod!r} names a modality, but the data is an AnnData. Leave var_mod= out.")
        source, where = modality(data, var_mod), f"mdata.mod[{var_mod!r}]"
    elif is_mudata(source):
        raise ValueError(f"The SAE lives on the MuData itself. Pass var_mod= (one of {listing(source.mod)}).")
    rows = source.obs_names.get_indexer(held.data.obs_names) if source is not held.data else np.arange(source.n_obs)
    if (rows < 0).any():
        raise ValueError(
            f"{(rows < 0).sum()} of the {len(rows)} cells of {held.where} are not in {where}. Leave them out."
        )
    x = readable(source.X, f"{where}.X")
    refuse_non_finite(x, f"{where}.X")
    place = "graph="
    if isinstance(graph, str):
        if graph not in source.varm:
            raise KeyError(f"{where}.varm has no {graph!r}; it has {listing(source.varm)}. Pass one of them as graph=.")
        graph, place = source.varm[graph], f"{where}.varm[{graph!r}]"
    if isinstance(graph, pd.DataFrame):
        graph = graph.to_numpy()
    true = graph.toarray() if sparse.issparse(graph) else np.asarray(graph)
    sizes = {str(group): int((found.group == group).sum()) for group in found.group}
    if true.ndim != 2 or len(true) != source.n_vars or true.shape[1] not in sizes.values():
        variables_of = ", ".join(f"{n} of {group!r}" for group, n in sizes.items())
        raise ValueError(
            f"{place} has the shape {true.shape}; expected the {source.n_vars} genes of {where} × the variables ({variables_of})."
        )
    return Graph(select_rows(x, rows), true != 0)
