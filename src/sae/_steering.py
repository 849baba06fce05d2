"""What steering did: the cells it was done to, where they are in the latent, and the tables that tell what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from . import _schema
from ._prediction import Part
from .core.controls import Measures, Sample, effect_size, exceeds
from .core.neighbours import Placed, Reference
from .core.steering import Steps

if TYPE_CHECKING:
    from .core.changes import Changes, Paired


@dataclass(frozen=True)
class Cohort:
    """The cells that are steered, and the labels of all cells.

    Attributes
    ----------
    rows
        (n,) their positions, in rising order.
    codes, labels
        (n,) the label of each, among those that some of them have.
    all_codes, all_labels
        The label of every cell of the data, −1 for those without one.
    """

    rows: np.ndarray
    codes: np.ndarray
    labels: pd.Index
    all_codes: np.ndarray
    all_labels: pd.Index

    @property
    def labelled(self) -> bool:
        """Whether there are labels; a column of them has two or more."""
        return len(self.all_labels) > 1


@dataclass(frozen=True)
class Place:
    """Where cells are in the latent."""

    reference: Reference
    sample: Sample
    deviation: np.ndarray
    """(d,) standard deviation of the latent's columns."""


@dataclass(frozen=True)
class Sets:
    """Gene sets (sets, genes) among the genes of one of the modalities that a model predicts."""

    names: pd.Index
    members: np.ndarray
    of: int


@dataclass(frozen=True)
class Centres:
    """Mean latents: (labels, d) of all cells of each label, and (own labels, d) of the steered ones."""

    of_all: np.ndarray
    of_steered: np.ndarray


class Tables:
    """The rows of all result tables, as they come."""

    def __init__(self, features: pd.Index, cohort: Cohort, place: Place, parts: Sequence[Part], sets: Sets):
        self.cohort, self.place, self.parts, self.sets = cohort, place, parts, sets
        self._genes = pd.Index(np.concatenate([np.asarray(part.genes, dtype=object) for part in parts])).unique()
        self._categories = {
            "feature": features,
            "gene": self._genes,
            "modality": pd.Index([str(part.modality) for part in parts]),
            "label": cohort.labels,
            "towards": cohort.all_labels,
        }
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _schema.STEERING}

    def add_genes(self, feature: int, step: Steps, tests: Sequence[Paired], n_genes: int | None) -> None:
        """Keep the genes of every label that change most, from the most raised to the most lowered."""
        for number, (part, test) in enumerate(zip(self.parts, tests, strict=True)):
            order = np.argsort(-test.change, axis=1, kind="stable")
            found = {
                name: np.take_along_axis(getattr(test, name), order, axis=1)
                for name in ("change", "log2fc", "score", "pval", "padj")
            }
            with np.errstate(invalid="ignore"):
                raised, lowered = found["change"] > 0, found["change"] < 0
            if n_genes is not None:
                raised &= np.cumsum(raised, axis=1) <= n_genes
                lowered &= np.cumsum(lowered[:, ::-1], axis=1)[:, ::-1] <= n_genes
            kept = raised | lowered
            label, _ = np.nonzero(kept)
            gene = self._genes.get_indexer(part.genes)[order[kept]]
            columns = {"label": label, "gene": gene, "modality": np.full(len(label), number)}
            self._add("genes", feature, step, columns | {name: values[kept] for name, values in found.items()})

    def add_dose(self, feature: int, step: Steps, changes: Sequence[Changes], after: Placed) -> None:
        """Tell how far cells are moved, how near others they end up, and how much expression changes."""
        n = len(self.cohort.rows)
        if step.offset is None:
            length = np.abs(step.amount(slice(None))).mean() * np.linalg.norm(step.direction)
        else:
            length = np.linalg.norm(step.of(slice(None)), axis=1).mean()
        before, limit = self.place.sample.before, self.place.reference.outlying
        row = {
            "value": step.strength,
            "n_cells": n,
            "n_moved": int(step.moved(slice(None)).sum()),
            "step": length,
            "effect": effect_size([change.total.sum(axis=0) / n for change in changes]),
            "distance_before": before.distance.mean(),
            "distance": after.distance.mean(),
            "off_manifold_before": (before.distance > limit).mean(),
            "off_manifold": (after.distance > limit).mean(),
        }
        self._add("doses", feature, step, {name: np.array([value]) for name, value in row.items()})

    def add_labels(self, feature: int, step: Steps, centres: Centres, after: Placed) -> None:
        """Tell of the cells of each label whether they move towards others."""
        sample, codes = self.place.sample, self.cohort.codes
        n = len(self.cohort.labels)
        shares = [_means(placed.shares, codes[sample.at], n) for placed in (sample.before, after)]
        moved = _means(step.amount(slice(None))[:, None], codes, n) * step.direction
        if step.offset is not None:
            moved = moved + _means(step.offset, codes, n)
        way = centres.of_all - centres.of_steered[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            closed = np.einsum("gd,gtd->gt", moved, way) / np.square(way).sum(axis=2)
        # The cells of a label have no way to go to their own centre.
        closed[self.cohort.all_labels.get_indexer(self.cohort.labels)[:, None] == np.arange(closed.shape[1])] = np.nan
        label, towards = np.indices(closed.shape)
        columns = {"label": label, "towards": towards, "before": shares[0], "after": shares[1], "closed": closed}
        columns["difference"] = shares[1] - shares[0]
        self._add("labels", feature, step, {name: values.ravel() for name, values in columns.items()})

    def add_controls(
        self, feature: int, step: Steps, measures: Measures, like: np.ndarray, directions: np.ndarray
    ) -> None:
        """Compare a feature with random features and directions."""
        value = measures.of_steps([step])[0]
        labels, sets = list(self.cohort.all_labels), list(self.sets.names)
        columns: dict[str, np.ndarray] = {"value": value}
        for name, drawn in (("features", like), ("directions", directions)):
            others = measures.of_steps([step.along(direction) for direction in drawn]) if len(drawn) else None
            columns[f"n_{name}"] = np.full(len(value), len(drawn))
            columns[f"of_{name}"] = np.full(len(value), np.nan) if others is None else others.mean(axis=0)
            columns[f"above_{name}"] = np.full(len(value), np.nan) if others is None else exceeds(value, others)
        measure = ["effect", "distance", *["label"] * len(labels), *["gene_set"] * len(sets)]
        columns["measure"] = np.array(measure, dtype=object)
        columns["name"] = np.array(["", "", *labels, *sets], dtype=object)
        told = self.cohort.labelled | (columns["measure"] != "label")
        self._add("controls", feature, step, {name: values[told] for name, values in columns.items()})

    def _add(self, table: str, feature: int, step: Steps, columns: dict[str, np.ndarray]) -> None:
        n = len(next(iter(columns.values())))
        self._rows[table].append({"feature": np.full(n, feature), "dose": np.full(n, step.dose), **columns})

    def finished(self) -> dict[str, pd.DataFrame]:
        """Return the tables."""
        found = {}
        for name, order in _schema.STEERING.items():
            rows = self._rows[name]
            columns = {column: np.concatenate([row[column] for row in rows]) for column in order} if rows else {}
            found[name] = _schema.tidy(columns, order, {c: i for c, i in self._categories.items() if c in order})
        if len(self.parts) == 1 and self.parts[0].modality is None:
            found["genes"] = found["genes"].drop(columns="modality")
        return found


def _means(values: np.ndarray, codes: np.ndarray, n: int) -> np.ndarray:
    """Average rows (cells, m) by group: (n groups, m)."""
    marks = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n, len(codes)))
    return marks @ values / np.bincount(codes, minlength=n)[:, None]
