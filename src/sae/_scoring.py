"""The scores of `tl.evaluate`, and the table that they go into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from . import _schema
from ._data import listing
from ._evaluation import Attributed, Compared, Source
from ._genesets import GeneSets
from .core.rows import Matrix

METRICS = (
    "section", "metric", "source", "groupby", "label", "value", "ci_low", "ci_high", "difference", "difference_low",
    "difference_high",
)  # fmt: skip
SAME = 0.9
"""Two features with a higher cosine are one, found twice."""
GOOD = 0.9
"""AUROC from which a label or a gene set counts as known."""
QUANTILES = (5, 25, 50, 75, 95)
COMPLETENESS_CELLS = 64
N_PERMUTATIONS = 5
PERMUTED_COLUMNS = 1_000
"""Enough of them, over all permutations: the more features, the fewer permutations it takes."""


class Metrics:
    """The rows of the table, as they come."""

    def __init__(self, groupby: str | None, labels: pd.Index):
        self._groupby, self._labels = groupby, labels
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        section: str,
        metric: str,
        source: str,
        samples: np.ndarray | float,
        *,
        beside: np.ndarray | None = None,
        label: str | None = None,
        of_labels: bool = False,
    ) -> None:
        """Add a number, or the estimate and its resamples (1 + resamples,), `beside` those of the SAE."""
        from .core.bootstrap import interval

        value, low, high = interval(np.atleast_1d(np.asarray(samples, dtype=np.float64)))
        row = {"section": section, "metric": metric, "source": source, "value": value, "ci_low": low, "ci_high": high}
        row |= {"groupby": self._groupby if of_labels else None, "label": label}
        if beside is not None:
            names = ("difference", "difference_low", "difference_high")
            row |= dict(zip(names, interval(beside - np.asarray(samples)), strict=True))
        self._rows.append(row)

    def table(self) -> pd.DataFrame:
        """Return the table."""
        columns, categories = {}, {}
        for name in METRICS:
            values = [row.get(name) for row in self._rows]
            if name in ("section", "metric", "source", "groupby", "label"):
                codes, found = pd.factorize(np.array(values, dtype=object))
                columns[name], categories[name] = codes, pd.Index(found)
            else:
                columns[name] = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        return _schema.tidy(columns, METRICS, categories)


def stored_metrics(metrics: Metrics, stored: Any, a: Any) -> None:
    """Write down what training and encoding have measured."""
    params, encoded = stored["params"], stored["encoded"]
    for name, value in (("train", params["fvu"]), ("held_out", params["val_fvu"]), ("all", encoded["fvu"])):
        metrics.add("reconstruction", f"fvu_{name}", "sae", value)
    for name, value in (("l0_train", params["l0"]), ("l0_held_out", params["val_l0"])):
        metrics.add("sparsity", name, "sae", value)
    n, n_cells = a.shape[0], a.getnnz(axis=0)
    metrics.add("sparsity", "l0", "sae", a.nnz / n)
    metrics.add("sparsity", "dead", "sae", (n_cells == 0).mean())
    for q in QUANTILES:
        density = np.percentile(n_cells[n_cells > 0] / n, q) if n_cells.any() else np.nan
        metrics.add("sparsity", f"density_q{q:02d}", "sae", density)


def dictionary_metrics(metrics: Metrics, of: Compared) -> None:
    """Tell how alike active features are, beside random directions, and what a frozen decoder makes of sparsity."""
    from .core.controls import random_directions
    from .core.fidelity import nearest_cosine

    active = of.learned.directions[of.learned.active]
    drawn = random_directions(len(active), active.shape[1], np.random.default_rng(of.seed))
    cosines = {"sae": nearest_cosine(active), "random_directions": nearest_cosine(drawn)}
    for measure in ("nearest_cosine", "duplicates"):
        beside = None
        for name, cosine in cosines.items():
            # The only feature has no other.
            known = cosine[~np.isnan(cosine)]
            values = known if measure == "nearest_cosine" else known > SAME
            value = np.array([values.mean() if len(values) else np.nan])
            metrics.add("dictionary", measure, name, value, beside=beside)
            beside = value
    if of.fixed is not None:
        n, h = of.fixed.a.shape
        metrics.add("sparsity", "l0", "frozen_decoder", of.fixed.a.nnz / n)
        metrics.add("sparsity", "dead", "frozen_decoder", 1 - len(of.fixed.active) / h)


def fidelity_metrics(metrics: Metrics, of: Compared, n_neighbors: int, *, with_pca: bool) -> None:
    """Compare reconstructions with the representation, and among each other."""
    from scanpy import logging as logg

    from .core.bootstrap import weighted_mean
    from .core.fidelity import components, kept_neighbors, right_votes, unexplained
    from .core.mixing import neighbors

    x, weights = of.x, of.cells.weights
    x_hat = {"sae": of.learned.x_hat}
    l0 = max(1, round(of.learned.a.nnz / len(x)))
    if with_pca and l0 < min(of.x_seen.shape):
        x_hat["pca"] = components(of.x_seen, x, l0, of.seed)[1]
    elif with_pca:
        logg.info(f"    no PCA reconstruction: {l0} active features per cell are no less than its {x.shape[1]} columns")
    if of.fixed is not None:
        x_hat["frozen_decoder"] = of.fixed.x_hat
    near = {name: neighbors(values, n_neighbors) for name, values in x_hat.items()}
    original = neighbors(x, n_neighbors)
    kept = {name: kept_neighbors(original, found) for name, found in near.items()}
    measured = {
        ("reconstruction", "fvu"): {name: unexplained(x, values, weights) for name, values in x_hat.items()},
        ("reconstruction", "fvu_scaled"): {
            name: unexplained(of.scaled(x), of.scaled(values), weights) for name, values in x_hat.items()
        },
        ("fidelity", "neighbor_overlap"): {name: weighted_mean(values, weights) for name, values in kept.items()},
    }
    if of.cells.n_labels > 1:
        near |= {"representation": original, "sae_codes": neighbors(of.learned.a, n_neighbors)}
        right = {name: right_votes(found, of.cells.codes) for name, found in near.items()}
        accuracy = {name: weighted_mean(values, weights) for name, values in right.items()}
        measured["fidelity", "label_accuracy"] = accuracy
    for (section, metric), samples in measured.items():
        for name, values in samples.items():
            beside = None if name == "sae" else samples["sae"]
            metrics.add(section, metric, name, values, beside=beside, of_labels=metric == "label_accuracy")


class Scoring:
    """Scores the columns of one source after another by labels and gene sets; the SAE comes first."""

    def __init__(self, metrics: Metrics, of: Compared, sets: GeneSets | None):
        self._metrics, self._of = metrics, of
        members = None if sets is None else (sets.weights != 0).astype(np.float64)
        self._sets = None if members is None or of.genes is None else (members, of.genes.matrix)
        self._auroc: np.ndarray | None = None
        self._of_sets: dict[str, np.ndarray] = {}

    def add(self, source: Source) -> None:
        """Score columns that know no label."""
        from .core.bootstrap import of_chosen
        from .core.labels import cross_fit

        cells = self._of.cells
        if cells.n_labels > 1:
            fit = cross_fit(source.columns, cells.codes, cells.n_labels, cells.halves)
            scores = of_chosen(source.columns, fit.chosen, cells.halves)
            self._add_labels(source.name, scores, source.columns.shape[1])
        if self._sets is not None:
            self._add_set_metrics(source.name, self._set_samples(source, *self._sets))

    def add_null(self) -> None:
        """Score the gene sets of features whose cells are permuted, the mean of a few permutations."""
        from .core.bootstrap import mean_of_known

        if self._sets is None:
            return
        a, rng = self._of.learned.a, np.random.default_rng(self._of.seed)
        n_permutations = min(max(PERMUTED_COLUMNS // a.shape[1], 1), N_PERMUTATIONS)
        drawn = [
            self._set_samples(Source("", a[rng.permutation(a.shape[0])]), *self._sets) for _ in range(n_permutations)
        ]
        mean = {metric: mean_of_known(np.stack([each[metric] for each in drawn]), 0) for metric in drawn[0]}
        self._add_set_metrics("permuted_cells", mean)

    def add_supervised(self, name: str) -> None:
        """Score L1 logistic regression, and the one column that it takes for the best."""
        from .core.baselines import supervised
        from .core.bootstrap import mean_of_known

        cells, genes = self._of.cells, self._of.genes
        if name == "l1_genes" and genes is None:
            return
        columns = genes.matrix if name == "l1_genes" and genes is not None else self._of.x
        fit = supervised(columns, cells.codes, cells.n_labels, cells.halves, self._of.seed)
        self._add_labels(name, fit.classifier, float(mean_of_known(fit.n_columns, (0, 1, 2))))
        self._add_labels(f"{name}_column", fit.column, columns.shape[1])

    def add_attributions(self, name: str, attributed: Attributed, on_dimension: Callable[[], object]) -> None:
        """Score the attribution of a probe's logit to each dimension of the latent."""
        from scanpy import logging as logg

        from .core.attribution import (
            COMPLETE,
            BestColumn,
            completeness_gap,
            enough_nodes,
            input_x_gradient,
            integrated_gradients,
        )

        z, cells = attributed.z, self._of.cells
        best = BestColumn(cells.codes, cells.halves, attributed.probes.valid)
        logits, baseline, n_nodes = attributed.logits(), z.mean(axis=0), 0
        columns: Iterator[np.ndarray] = input_x_gradient(logits, z)
        if name == "integrated_gradients":
            some = attributed.spread(COMPLETENESS_CELLS)
            n_nodes, _ = enough_nodes(attributed.logits(COMPLETENESS_CELLS), z[some], baseline)
            logg.info(f"    integrated gradients: {2 * n_nodes * z.shape[1]} predictions of {len(z)} cells")
            columns = integrated_gradients(logits, z, baseline, n_nodes)
        total = np.zeros_like(attributed.logits_before)
        for values in columns:
            best.add(values)
            total += values
            on_dimension()
        self._add_labels(name, best.scores, z.shape[1])
        if name == "integrated_gradients":
            gap = completeness_gap(total, attributed.logits_before, logits(np.broadcast_to(baseline, z.shape)))
            self._metrics.add("attribution", "n_nodes", name, n_nodes)
            self._metrics.add("attribution", "completeness_gap", name, gap)
            if gap > 10 * COMPLETE:
                logg.warning(
                    f"integrated gradients with {n_nodes} points add up to the change of the logit only within {gap:.2g} of its "
                    "standard deviations: the decoder of the model is not smooth."
                )

    def _add_labels(self, name: str, scores: np.ndarray, n_columns: float) -> None:
        from .core.bootstrap import held_out_auroc, mean_of_known

        cells = self._of.cells
        auroc = held_out_auroc(scores, cells.codes, cells.halves, cells.weights)
        if self._auroc is None:
            _warn_of_unscored(cells.labels[np.isnan(auroc[0])])

        # Donors that are not drawn take labels with them; the others must not count for more, as labels differ.
        def whole(of: np.ndarray) -> np.ndarray:
            return np.where(np.isnan(of), of[0], of)

        def add(metric: str, of: Callable[[np.ndarray], np.ndarray], label: str | None = None) -> None:
            beside = None if self._auroc is None else of(self._auroc)
            self._metrics.add("labels", metric, name, of(auroc), beside=beside, label=label, of_labels=True)

        add("auroc", lambda of: mean_of_known(whole(of), 1))
        add("labels_at_0.9", lambda of: (whole(of) >= GOOD).sum(axis=1))
        self._metrics.add("labels", "n_columns", name, n_columns, of_labels=True)
        for number, label in enumerate(cells.labels):
            add("auroc", lambda of, number=number: of[:, number], label)  # type: ignore[misc]
        if self._auroc is None:
            self._auroc = auroc

    def _set_samples(self, source: Source, members: sparse.csr_matrix, x: Matrix) -> dict[str, np.ndarray]:
        """Score the gene sets of some columns: estimate and resamples (1 + resamples,) of each metric."""
        from .core.bootstrap import resamples, weighted_mean
        from .core.set_scores import score_sets

        columns, own = source.columns, source.own
        if own is not None:
            columns, own = self._some_genes(columns)
        found = score_sets(columns, x, members, self._of.cells.halves[0], own=own)
        n_resamples, varies = len(self._of.cells.weights) - 1, np.flatnonzero(~np.isnan(found.auroc))
        # The same sets for all sources; columns have no partners.
        of_sets, of_columns = np.random.default_rng(self._of.seed).spawn(2)
        by_set = resamples(np.zeros(members.shape[0], np.int64), n_resamples, of_sets)
        samples = {"best_column_auroc": weighted_mean(found.of_sets, by_set)}
        by_column = resamples(np.zeros(len(varies), np.int64), n_resamples, of_columns)
        for metric, values in (("auroc", found.auroc), ("same_set", found.same)):
            missing = np.full(1 + n_resamples, np.nan)
            samples[metric] = weighted_mean(values[varies], by_column) if len(varies) else missing
        samples["n_sets"] = np.array([found.n_sets(GOOD)], dtype=np.float64)
        return samples

    def _add_set_metrics(self, name: str, samples: dict[str, np.ndarray]) -> None:
        for metric, values in samples.items():
            self._metrics.add("gene_sets", metric, name, values, beside=self._of_sets.get(metric))
        self._of_sets = self._of_sets or samples

    def _some_genes(self, x: Any) -> tuple[Any, np.ndarray]:
        """Draw as many genes that vary as the SAE has features, in rising order."""
        from .core.rows import varying_columns

        varying = np.flatnonzero(varying_columns(x))
        n = self._of.learned.a.shape[1]
        chosen = np.sort(np.random.default_rng(self._of.seed).permutation(varying)[:n])
        return x[:, chosen], chosen


def _warn_of_unscored(labels: pd.Index) -> None:
    from scanpy import logging as logg

    if len(labels):
        logg.warning(
            f"no held-out scores for {listing(labels)}: both halves of the cells must have some of the label and some of the others."
        )
