"""What a report says: the tables and cells of an SAE, as the page reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import get
from .._names import names as named
from . import _compact

if TYPE_CHECKING:
    import anndata as ad

    from .._data import Data
    from .._schema import Features

BLOCK = 100
"""Features that are packed together, and unpacked when one of them is opened."""
MOST_POINTS, MOST_CELLS = 4_000_000, 2_000
"""With more activations than this to draw, only so many cells are drawn of a feature, the strongest."""
N_BINS, N_SIMILAR, N_LABELS, N_PERTURBATIONS, N_LISTED, N_TOP_GENES = 30, 8, 6, 10, 8, 4
MOST_NAMED = 40
"""Labels that are written on the map, of a column with no more than these."""
SIGNIFICANT = 0.05
BASES = ("umap", "tsne")
SHOWN_IF_THERE = ("stability", "module", "mean", "max")
NOT_SHOWN = ("dead", "name_genes", "map_x", "map_y")

HELP = {
    "n_cells": "cells in which the feature is active",
    "density": "share of the cells in which the feature is active",
    "mean": "mean activation over all cells",
    "max": "largest activation",
    "stability": "how much of the feature other seeds find again: the cosine of decoder directions, 1 is the same",
    "module": "group of features that are alike (sae.tl.feature_map)",
    "gene": "gene, or other variable",
    "score": "test statistic: above 0 where the active cells have more",
    "log2fc": "log2 fold change, active against inactive cells",
    "padj": "adjusted p-value; cells are taken as independent, which those of one donor are not",
    "fdr": "false discovery rate, from permuted cells or random sets",
    "overlap": "genes of the set that stand out",
    "size": "measured genes of the set",
    "auroc": "how well the activation tells these cells from the others: 0.5 is chance, 1 perfect; on all cells",
    "held_out_auroc": "the same on cells that did not choose the direction",
    "held_out_f1": "F1 on cells that did not choose the threshold",
    "difference": "mean activation in these cells minus that in the others",
    "similarity": "1 is the same",
    "responds": "the false discovery rate is low enough",
}
SET_HELP = {"score": "of the method of sae.tl.enrich: further from 0 is stronger"}
PERTURBATION_HELP = {
    "auroc": "how well the activation tells perturbed from control cells: 0.5 is chance",
    "difference": "mean activation in perturbed minus that in control cells",
    "score": "test statistic: above 0 where perturbed cells have more",
}
TITLES = {
    "n_cells": "cells", "log2fc": "log2 fc", "auroc": "AUROC", "held_out_auroc": "held-out AUROC", "held_out_f1": "held-out F1",
    "gene_set": "gene set", "fdr": "FDR", "neighbor": "feature",
}  # fmt: skip


@dataclass
class Pool:
    """Every text once; tables give its number, −1 for none."""

    texts: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def codes(self, values: pd.Series) -> list[int]:
        """Number the values of a column."""
        found = pd.Categorical(values).remove_unused_categories()
        known = np.array([self.add(str(text)) for text in found.categories] + [-1])
        return known[found.codes].tolist()

    def lists(self, values: pd.Series, most: int) -> list[list[int]]:
        """Number the first parts of texts such as "CD3D;CD3E"."""
        found = pd.Categorical(values).remove_unused_categories()
        known = [[self.add(part) for part in str(text).split(";")[:most] if part] for text in found.categories]
        return [known[code] if code >= 0 else [] for code in found.codes]


@dataclass(frozen=True)
class Table:
    """A table of the cards: rows `start[i]` to `start[i + 1]` belong to feature i."""

    spec: dict[str, Any]
    start: np.ndarray
    values: list[list[Any]]

    def part(self, first: int, last: int) -> dict[str, Any]:
        """Return the rows of some features."""
        begin, end = self.start[first], self.start[last]
        return {
            "start": (self.start[first : last + 1] - begin).tolist(),
            "values": [column[begin:end] for column in self.values],
        }


@dataclass(frozen=True)
class Contents:
    """What the page shows at once, what it unpacks when needed, and what was left out."""

    facts: list[tuple[str, str, str]]
    notices: list[str]
    main: dict[str, Any]
    blocks: list[dict[str, Any]]
    cells: bytes | None
    points: list[bytes]


def contents(
    data: Data,
    *,
    key: str,
    mod: str | None,
    features: Features,
    basis: str | None,
    n_genes: int,
    n_sets: int,
    max_cells: int,
) -> Contents:
    """Gather whatever the verbs that were run have stored."""
    where: dict[str, Any] = {"key": key, "mod": mod}
    chosen = get.activations(data, features, **where)
    if not chosen.n_obs:
        raise ValueError(f"There are no cells to report on: {key!r} has activations of 0 cells.")
    statistics, a = chosen.var, sparse.csc_matrix(chosen.X)
    if "name" not in statistics:
        statistics = statistics.assign(name=named(data, **where)["name"])
    pool, notices = Pool(), list[str]()
    tables = _Tables(data, chosen.var_names, features, where, pool)
    label_tables = list(tables.labels())
    groupbys = [table.spec["title"] for table in label_tables]
    sets, found_sets = tables.sets(n_sets)
    up, down, found_genes = tables.genes(n_genes)
    cards = [table for table in (*label_tables, up, down, *sets, tables.perturbations(), tables.similar(a)) if table]

    main = {
        "key": key,
        "names": chosen.var_names.tolist(),
        "columns": _columns(statistics, groupbys, found_sets, found_genes, pool),
        "genes": found_genes["ids"].tolist(),
        "sets": found_sets["ids"].tolist(),
        "dead": np.flatnonzero(statistics["dead"]).tolist(),
        "tables": [table.spec for table in cards],
        "block": BLOCK,
        "n_cells": chosen.n_obs,
        "map": None,
        "cells": None,
    }
    if {"map_x", "map_y"} <= set(statistics):
        main["map"] = {axis: _compact.rounded(statistics[f"map_{axis}"].to_numpy(dtype=float)) for axis in "xy"}
    place, cells = None, None
    coordinates = _coordinates(data, basis, mod, notices)
    if coordinates is not None:
        place, cells, drawn = _drawn(chosen, a, coordinates, groupbys, max_cells, pool, notices)
        main["cells"] = {"axes": coordinates.columns.tolist(), **drawn}
    counts = _compact.histograms(a, N_BINS)
    spans = [(first, min(first + BLOCK, len(statistics))) for first in range(0, len(statistics), BLOCK)]
    blocks = [
        {"tables": [table.part(*span) for table in cards], "histogram": counts[slice(*span)].tolist()} for span in spans
    ]
    points = [_compact.point_bytes(place[:, slice(*span)]) for span in spans] if place is not None else []
    main["pool"] = list(pool.texts)
    n_features = len(get.features(data, **where))
    if len(statistics) < n_features:
        notices.insert(0, f"{len(statistics):,} of {n_features:,} features were asked for.")
    return Contents(_facts(data, statistics, a, where), notices, main, blocks, cells, points)


@dataclass(frozen=True)
class _Tables:
    data: Data
    names: pd.Index
    features: Features
    where: dict[str, Any]
    pool: Pool

    def stored(self, read: Callable[..., pd.DataFrame], **options: Any) -> pd.DataFrame:
        """Return a table, an empty one where its verb was not run."""
        try:
            return read(self.data, self.features, **options, **self.where)
        except KeyError:
            return pd.DataFrame({"feature": []})

    def table(
        self, kind: str, title: str, note: str, rows: pd.DataFrame, columns: Sequence[str], help: Mapping[str, str]
    ) -> Table | None:
        """Make a table of these columns, of those that hold anything."""
        if rows.empty:
            return None
        number = self.names.get_indexer(pd.Index(rows["feature"]))
        order = np.argsort(number, kind="stable")
        rows = rows.iloc[order]
        specs, values = [], []
        for name in columns:
            if name in rows and rows[name].notna().any():
                if name == "neighbor":
                    form, found = "feature", self.names.get_indexer(pd.Index(rows[name])).tolist()
                else:
                    form, found = _values(rows[name], self.pool, listed=name == "genes")
                form = {"padj": "p", "fdr": "p"}.get(name, form)
                specs.append({"title": TITLES.get(name, name), "help": help.get(name, ""), "form": form})
                values.append(found)
        start = np.searchsorted(number[order], np.arange(len(self.names) + 1))
        return Table({"kind": kind, "title": title, "note": note, "columns": specs}, start, values)

    def labels(self) -> Iterator[Table]:
        """Make a table per column of labels."""
        rows = self.stored(get.labels)
        if rows.empty:
            return
        shown = ("label", "auroc", "held_out_auroc", "held_out_f1", "difference", "padj")
        for groupby, part in rows.groupby("groupby", observed=True, sort=False):
            best = part[part.groupby("feature", observed=True).cumcount() < N_LABELS]
            found = self.table("labels", str(groupby), "", best, shown, HELP)
            if found:
                yield found

    def sets(self, n: int) -> tuple[list[Table | None], pd.DataFrame]:
        """Make a table of gene sets per direction, and list the significant ones of raised genes per feature, nested ones included."""
        rows, made = self.stored(get.enrichment), []
        if rows.empty:
            return [], self.listed(rows, "gene_set")
        note = f"The best {n}, without those whose genes are all among those of a better one; genes up to {N_LISTED}."
        for direction in (name for name in ("up", "both", "down") if (rows["direction"] == name).any()):
            shown = self.stored(get.enrichment, direction=direction, redundant=False, n=n)
            columns = ["gene_set", "overlap", "size", "score", "padj", "fdr", "genes"]
            columns[1:1] = [name for name in ("collection", "modality") if name in rows and rows[name].nunique() > 1]
            made.append(self.table("sets", f"Gene sets {direction}", note, shown, columns, HELP | SET_HELP))
        significant = rows[(rows["padj"] <= SIGNIFICANT) & ~(rows["fdr"] > SIGNIFICANT) & (rows["direction"] != "down")]
        return made, self.listed(significant, "gene_set")

    def genes(self, n: int) -> tuple[Table | None, Table | None, pd.DataFrame]:
        """Make the tables of raised and lowered genes, and list the significant raised ones per feature."""
        rows = {direction: self.stored(get.genes, direction=direction, n=n) for direction in ("up", "down")}
        made = []
        for direction, found in rows.items():
            columns = ["gene", "score", "log2fc", "padj"]
            columns[1:1] = ["modality"] if "modality" in found and found["modality"].nunique() > 1 else []
            made.append(self.table("genes", f"Genes {direction}", "", found, columns, HELP))
        raised = self.stored(get.genes, direction="up", max_padj=SIGNIFICANT, n=max(n, N_TOP_GENES))
        return made[0], made[1], self.listed(raised, "gene")

    def listed(self, rows: pd.DataFrame, column: str) -> pd.DataFrame:
        """List the numbers of texts per feature, best first (`ids`), with the first adjusted p-value (`padj`)."""
        found = pd.DataFrame({"ids": [[] for _ in self.names], "padj": np.nan}, index=self.names)
        if not rows.empty:
            ids = pd.Series(self.pool.codes(rows[column]), index=rows["feature"].astype(str))
            lists = ids.groupby(level=0, sort=False).agg(lambda part: list(dict.fromkeys(part)))
            found["ids"] = [lists.get(name, []) for name in self.names]
            first = rows.drop_duplicates("feature").set_index("feature")["padj"]
            found["padj"] = first.astype(float).reindex(found.index)
        return found

    def perturbations(self) -> Table | None:
        """Make the table of perturbations."""
        rows = self.stored(get.perturbation)
        if rows.empty:
            return None
        rows = rows[rows.groupby("feature", observed=True).cumcount() < N_PERTURBATIONS]
        columns = ["perturbation", "difference", "auroc", "score", "padj", "fdr", "responds"]
        columns[1:1] = ["groupby"] if rows["groupby"].nunique() > 1 else []
        note = f"The {N_PERTURBATIONS} with the strongest response, of either direction."
        return self.table("perturbations", "Perturbations", note, rows, columns, HELP | PERTURBATION_HELP)

    def similar(self, a: sparse.csc_matrix) -> Table | None:
        """Make the table of neighbours: those of `tl.feature_map`, else the cosine of activations."""
        rows = self.stored(get.neighbors)
        note = "As in the map of features."
        if rows.empty:
            note = "By the cosine of activations: active in the same cells."
            nearest, cosine = _compact.similar(a, N_SIMILAR)
            feature, column = np.nonzero(nearest >= 0)
            neighbor = self.names[nearest[feature, column]]
            rows = pd.DataFrame(
                {"feature": self.names[feature], "neighbor": neighbor, "similarity": cosine[feature, column]}
            )
        rows = rows[rows["neighbor"].isin(self.names)]
        rows = rows[rows.groupby("feature", observed=True).cumcount() < N_SIMILAR]
        return self.table("similar", "Similar features", note, rows, ["neighbor", "similarity"], HELP)


def _values(column: pd.Series, pool: Pool, *, listed: bool = False) -> tuple[str, list[Any]]:
    """Turn a column into JSON, and say how to show it."""
    if listed:
        return "list", pool.lists(column, N_LISTED)
    if pd.api.types.is_bool_dtype(column):
        return "text", pool.codes(column.map({True: "yes", False: "no"}))
    if pd.api.types.is_integer_dtype(column) and column.notna().all():
        return "number", column.tolist()
    if pd.api.types.is_numeric_dtype(column):
        return "number", _compact.rounded(column.to_numpy(dtype=float, na_value=np.nan))
    return "text", pool.codes(column)


def _columns(
    statistics: pd.DataFrame, groupbys: Sequence[str], sets: pd.DataFrame, genes: pd.DataFrame, pool: Pool
) -> list[dict[str, Any]]:
    """Make the columns of the large table: the common ones first, those that few ask for not shown at first."""
    made: dict[str, dict[str, Any]] = {}

    def add(key: str, form: str, values: list[Any], *, width: float = 0, **more: Any) -> None:
        width = width or (_width(values, pool) if form == "text" else 5)
        common = {"title": TITLES.get(key, key), "help": HELP.get(key, ""), "shown": True}
        made[key] = {"key": key, "form": form, "width": width, **common, **more, "values": values}

    add("name", *_values(statistics["name"], pool), width=18, searched=True)
    for name in ("n_cells", "density"):
        add(name, *_values(statistics[name], pool), own=True)
    for groupby in groupbys:
        label, auroc = f"{groupby}_label", f"{groupby}_auroc"
        if label in statistics and auroc in statistics:
            told = f"the label of {groupby} with the highest AUROC"
            add(label, *_values(statistics[label], pool), title=groupby, help=told, groupby=groupby, searched=True)
            add(
                auroc,
                *_values(statistics[auroc], pool),
                title="AUROC",
                groupby_of=groupby,
                help=f"of {groupby}: {HELP['auroc']}",
            )
    if any(sets["ids"]):
        told = f"the most significant gene set, not of lowered genes, with padj (and FDR, if known) up to {SIGNIFICANT}"
        add("gene_set", "text", [ids[0] if ids else -1 for ids in sets["ids"]], width=16, help=told)
        add("set_padj", "p", _compact.rounded(sets["padj"].to_numpy()), title="set padj", help=HELP["padj"])
    if any(genes["ids"]):
        told = f"the most raised genes, with padj up to {SIGNIFICANT}"
        add("top_genes", "list", [ids[:N_TOP_GENES] for ids in genes["ids"]], title="genes", width=15, help=told)
    for name in (*SHOWN_IF_THERE, *statistics):
        if name in statistics and name not in {*made, *NOT_SHOWN} and statistics[name].notna().any():
            form, values = _values(statistics[name], pool)
            form = "p" if form == "number" and name.endswith(("pval", "padj", "fdr")) else form
            add(name, form, values, shown=name in SHOWN_IF_THERE, own=name in SHOWN_IF_THERE, searched=name == "module")
    return list(made.values())


def _width(ids: list[int], pool: Pool) -> float:
    """Return a width for texts, in letters' heights: that of most of them."""
    texts = list(pool.texts)
    lengths = [len(texts[i]) for i in ids if i >= 0]
    return float(np.clip(np.quantile(lengths or [0], 0.9) * 0.6 + 1.5, 6, 17).round(1))


def _coordinates(data: Data, basis: str | None, mod: str | None, notices: list[str]) -> pd.DataFrame | None:
    """Return the embedding that was asked for, else the first of the usual ones, else none, with a notice."""
    if basis is not None:
        return get.embedding(data, basis, mod=mod)
    for usual in BASES:
        try:
            return get.embedding(data, usual, mod=mod)
        except KeyError:
            continue
    notices.append(
        "There is no map of the cells: the data has neither a UMAP nor a t-SNE. Run sc.tl.umap, or pass basis=."
    )
    return None


def _drawn(
    chosen: ad.AnnData,
    a: sparse.csc_matrix,
    coordinates: pd.DataFrame,
    groupbys: Sequence[str],
    max_cells: int,
    pool: Pool,
    notices: list[str],
) -> tuple[sparse.csc_matrix, bytes, dict[str, Any]]:
    """Return what the maps draw: activations (cells of the map × features), where these cells are, and the labels over them."""
    rank = _compact.ranks(a)
    cells = _cells_of_map(a, rank, coordinates.to_numpy(dtype=float), max_cells, notices)
    xy = _compact.on_grid(coordinates.to_numpy(dtype=float)[cells])
    order = _compact.near_each_other(xy)
    cells, xy = cells[order], xy[order]
    place = np.full(a.shape[0], -1)
    place[cells] = np.arange(len(cells))
    kept = place[a.indices] >= 0
    if kept.sum() > MOST_POINTS:
        kept &= rank < MOST_CELLS
        wide = int((np.diff(a.indptr) > MOST_CELLS).sum())
        notices.append(f"Of {wide:,} features only cells among the {MOST_CELLS:,} most active are drawn in colour.")
    labels = {name: _places(chosen.obs[name].iloc[cells], xy, pool) for name in groupbys if name in chosen.obs}
    if crowded := [name for name in labels if chosen.obs[name].nunique() > MOST_NAMED]:
        notices.append(f"Labels of {', '.join(crowded)} are not written on the maps: there are more than {MOST_NAMED}.")
    drawn = {"n": len(cells), "labels": {name: found for name, found in labels.items() if found}}
    return _compact.levels(a, place, kept), _compact.cell_bytes(xy), drawn


def _cells_of_map(
    a: sparse.csc_matrix, rank: np.ndarray, coordinates: np.ndarray, max_cells: int, notices: list[str]
) -> np.ndarray:
    """Choose cells, and say which are left out."""
    placed = np.flatnonzero(np.isfinite(coordinates).all(axis=1))
    if len(placed) < len(coordinates):
        notices.append(
            f"{len(coordinates) - len(placed):,} of {len(coordinates):,} cells have no coordinates and are not on the map."
        )
    if len(placed) <= max_cells:
        return placed
    notices.append(
        f"The maps draw {max_cells:,} of {len(coordinates):,} cells: half of them the strongest of their features, the others at "
        "random. All numbers and histograms are of all cells."
    )
    among = np.full(len(coordinates), -1)
    among[placed] = np.arange(len(placed))
    cell = among[a.indices]
    rng = np.random.default_rng(0)
    return placed[_compact.drawn_cells(cell[cell >= 0], rank[cell >= 0], len(placed), max_cells, rng)]


def _places(labels: pd.Series, xy: np.ndarray, pool: Pool) -> list[list[int]]:
    """Return text, x and y of each label: the median of its cells."""
    found = pd.DataFrame(xy, columns=["x", "y"]).groupby(labels.astype(str).where(labels.notna()).to_numpy())
    medians = found.median().round().astype(int)
    if len(medians) > MOST_NAMED:
        return []
    return [[pool.add(str(name)), int(x), int(y)] for name, x, y in medians.itertuples()]


def _facts(
    data: Data, statistics: pd.DataFrame, a: sparse.csc_matrix, where: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """Say which SAE this is and how well it reconstructs."""
    params, encoded = get.params(data, **where), get.params(data, encoded=True, **where)
    settings = [f"{name} {params[name]:g}" for name in ("k", "l1", "l0_weight") if params.get(name) is not None]
    held = data if where["mod"] is None else data.mod[where["mod"]]
    source = f"{params['layer'] or params['use_rep']}, {params['n_obs']:,} cells"
    return [
        ("SAE", f"{where['key']} ({', '.join([params['architecture'], *settings])})", ""),
        ("trained on", source, ""),
        ("features", f"{len(statistics):,} ({statistics['dead'].sum():,} dead)", "dead: active in none of these cells"),
        ("cells", f"{a.shape[0]:,}", ""),
        ("genes", f"{held.n_vars:,}", "or other variables"),
        ("FVU", _number(encoded, "fvu") + _held_out(params, "val_fvu"), "variance that is unexplained: 0 is perfect"),
        ("L0", _number(encoded, "l0") + _held_out(params, "val_l0"), "mean number of active features in a cell"),
        ("trained with", f"sae {params['version']}", ""),
        ("written with", f"sae {version('scsae')}", ""),
    ]


def _number(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return "unknown" if value is None or not np.isfinite(value) else f"{value:.3g}"


def _held_out(params: dict[str, Any], name: str) -> str:
    number = _number(params, name)
    return "" if number == "unknown" else f" (held out in training: {number})"
