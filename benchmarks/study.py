"""What decides whether an SAE finds known programs? One thing varied at a time, on simulated cells.

Cells are those of sae.datasets.simulate_programs: 5,000 with 100 programs in 300 genes. A linear model with a latent of 100 is trained
on their expression (sae.models.Autoencoder), and an SAE on its latent (400 features). Each part varies one of these:

    paper      the published table: recipe="paper" on the latent of 150 of a model with a hidden layer (10,000 cells, 1,000 genes),
               with published figures, this package's defaults and baselines beside it
    width      features of the SAE
    sparsity   active features per cell (k), and the L1 penalty
    model      layers of the autoencoder, and their width (10,000 cells, 500 genes)
    training   passes of an autoencoder with a hidden layer (the same cells)
    latent     dimensions of the latent
    closeness  programs near the expression and far from it, beside what a linear probe finds of them
    noise      counts per cell

    python benchmarks/study.py
    python benchmarks/study.py width sparsity --figures figures --tables tables
    python benchmarks/study.py width --tuning --cells 2000 --epochs 5

Every part prints a row per run and medians over seeds. --figures draws them, --tables writes the rows as CSV. SAEs are sae.tl.fit at
defaults, which centre such a latent, and with preprocess="damped". A program counts as found when |r| of its activity and some
feature's activation is above .95.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import recovery as programs
from sklearn.decomposition import NMF, PCA, FastICA
from tqdm import tqdm

import sae
from sae.core import probe
from sae.core.recovery import correlations, recovery
from sae.models import Autoencoder

mpl.use("agg")
from matplotlib import pyplot as plt

# These seeds are only ever reported on; nothing is tuned on them.
BENCHMARK_SEEDS, TUNING_SEEDS = (101, 202, 303), (0, 1, 2)

N_CELLS, N_GENES, EPOCHS = 5_000, 300, 60
N_LATENT, DEPTH = 100, 1
N_FEATURES = 400
FOUND = 0.95

WIDTHS = (50, 100, 200, 400, 1_000, 2_000)
ACTIVE = (5, 10, 20, 30, 45, 70)
PENALTIES = (0.3, 1.0, 3.0, 10.0)
MODEL_SIZE = {"cells": 10_000, "genes": 500}
PASSES = (5, 15, 40, 100)
DEPTHS, UNITS = (1, 2, 4, 6), {"narrow": 100, "wide": 300}
LATENTS = (20, 50, 100, 150, 250)
CLOSENESS_MODELS = {1: UNITS["narrow"], 2: UNITS["wide"]}
COUNTS = (None, 100_000, 20_000, 5_000)
PREPROCESS = {"defaults": None, "damped": "damped"}
BASELINES = ("raw genes", "NMF", "PCA", "ICA", "random directions")
NMF_STEPS, ICA_STEPS = 150, 300

PAPER_CELLS = 4_500
PAPER_BLOCK = 2_000
PAPER_MODEL = {"n_latent": 150, "depth": 2, "width": "wide"}
PAPER_SIZE = {"cells": 10_000, "genes": 1_000, "epochs": 40, "learning_rate": 1e-4}
PAPER_RATE, PAPER_STEPS = 1e-4, {3_000: 1_500, 15_000: 150, 75_000: 1}
PUBLISHED = pd.DataFrame(
    {
        "n_features": [3_000, 15_000, 75_000],
        "active": [2_343, 11_849, 59_227],
        "L0": [2_337, 11_167, 44_265],
        "X": [0.17, 0.17, 0.20],
        "X'": [0.41, 0.44, 0.45],
        "X''": [0.69, 0.76, 0.77],
        "A": [0.51, 0.52, 0.55],
        "B": [0.63, 0.67, 0.67],
    }
)
GROUPS = ("X", "X'", "X''", "A", "B")


# ---- Cells and latents


@cache
def simulated(n_cells: int, n_genes: int, counts: int | None, seed: int) -> ad.AnnData:
    """Cells with their expression in X, or counts with the same mean."""
    adata = sae.datasets.simulate_programs(n_cells, n_genes, rng=seed)
    if counts is not None:
        drawn = sae.datasets.simulate_programs(n_cells, n_genes, rng=seed, noise="poisson", depth=counts).X
        adata.X = drawn * (adata.X.mean() / drawn.mean())
    return adata


@cache
def model_of(
    options: Options, seed: int, n_latent: int, depth: int, width: int | str, counts: int | None
) -> Autoencoder:
    return Autoencoder.fit(
        simulated(options.cells, options.genes, counts, seed),
        n_latent=n_latent,
        depth=depth,
        width=width,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        rng=seed,
        progress=False,
    )


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    seeds: tuple[int, ...]
    cells: int
    genes: int
    epochs: int
    learning_rate: float = 1e-3

    def latent(
        self,
        seed: int,
        n_latent: int = N_LATENT,
        depth: int = DEPTH,
        width: int | str = "narrow",
        counts: int | None = None,
    ) -> ad.AnnData:
        """Return the cells with the latent of an autoencoder in `obsm["X_ae"]`, and its R² in `uns["r2"]`."""
        adata = simulated(self.cells, self.genes, counts, seed).copy()
        model = model_of(self, seed, n_latent, depth, width, counts)
        adata.obsm["X_ae"], adata.uns["r2"] = model.embed(adata), model.r2
        return adata


def truth(adata: ad.AnnData) -> dict[str, np.ndarray]:
    """Every group of hidden variables (cells, p); cell types as numbers, as in the published analysis."""
    return {
        "X": adata.obsm["activity"],
        "X'": adata.obsm["programs_unmasked"],
        "X''": adata.obsm["programs"],
        "A": adata.obs["cell_type"].cat.codes.to_numpy()[:, None].astype(float),
        "B": adata.obs["covariate"].to_numpy()[:, None].astype(float),
    }


def cell_types(adata: ad.AnnData) -> np.ndarray:
    """Membership of each cell type (cells, types)."""
    return pd.get_dummies(adata.obs["cell_type"]).to_numpy(float)


# ---- What is measured


def probed(z: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Held-out R² of each variable by linear regression on z."""
    folds = probe.random_folds(len(z), 5, np.random.default_rng(seed))
    return probe.linear_r2(probe.standardised(z), y, folds).score


def judged(adata: ad.AnnData, a) -> dict[str, float]:
    found = recovery(adata.obsm["programs"], a)
    of_programs = {"found": (found.best > FOUND).sum(), "best": found.best.mean(), "matched": found.matched.mean()}
    return {**of_programs, "types": recovery(cell_types(adata), a).best.mean()}


def sae_row(adata: ad.AnnData, seed: int, **settings) -> dict[str, float]:
    """Train an SAE on the latent and judge it."""
    start = time.perf_counter()
    sae.tl.fit(adata, "X_ae", **{"n_features": N_FEATURES, "rng": seed, "progress": False, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE .* leaves", UserWarning)  # the table says how badly it fits
        sae.tl.encode(adata, progress=False)
    seconds = time.perf_counter() - start
    encoded, dead = adata.uns["sae"]["encoded"], sae.get.features(adata)["dead"].mean()
    of_fit = {"dead": dead, "L0": encoded["l0"], "FVU": encoded["fvu"], "seconds": seconds}
    return {**judged(adata, adata.obsm["sae"]), **of_fit}


def latent_row(adata: ad.AnnData, seed: int) -> dict[str, float]:
    known = probed(adata.obsm["X_ae"], adata.obsm["programs"], seed)
    return {"R2 Y": adata.uns["r2"], "R2 X''": known.mean(), "probe": np.sqrt(np.maximum(known, 0)).mean()}


def baselines(
    adata: ad.AnnData, seed: int, names: tuple[str, ...], n_directions: int = N_FEATURES
) -> dict[str, np.ndarray]:
    """Return what SAEs are compared with, as columns (cells, h): of the expression, or of the latent."""
    z = adata.obsm["X_ae"].astype(np.float64)
    components = min(100, z.shape[1])
    nmf = NMF(100, init="random", tol=1e-6, max_iter=NMF_STEPS, random_state=seed)
    ica = FastICA(components, whiten="unit-variance", whiten_solver="eigh", max_iter=ICA_STEPS, random_state=seed)
    make = {
        "raw genes": lambda: adata.X,
        "NMF": lambda: programs.fitted(nmf, np.maximum(adata.X, 0))[0],
        "PCA": lambda: PCA(components, svd_solver="full").fit_transform(z),
        "ICA": lambda: programs.fitted(ica, z)[0],
        "random directions": lambda: random_directions(z, seed, n_directions),
    }
    return {name: make[name]() for name in names}


def random_directions(z: np.ndarray, seed: int, n: int = N_FEATURES) -> np.ndarray:
    return z @ np.random.default_rng(seed).standard_normal((z.shape[1], n))


def baseline_rows(adata: ad.AnnData, seed: int, *names: str) -> Iterator[dict]:
    for method, a in baselines(adata, seed, names).items():
        yield {"seed": seed, "method": method, "n_features": a.shape[1], **judged(adata, a)}


def both(adata: ad.AnnData, seed: int, **settings) -> Iterator[dict]:
    """Rows of SAEs at defaults, and damped."""
    for method, preprocess in PREPROCESS.items():
        yield {"seed": seed, "method": method, **sae_row(adata, seed, preprocess=preprocess, **settings)}


# ---- Parts: rows of their tables, one per run


def width(options: Options) -> Iterator[dict]:
    for seed in options.seeds:
        adata = options.latent(seed)
        for n_features in WIDTHS:
            for row in both(adata, seed, n_features=n_features):
                yield {"n_features": n_features, **row}
        yield from baseline_rows(adata, seed, "raw genes", "ICA", "random directions")


def sparsity(options: Options) -> Iterator[dict]:
    for seed in options.seeds:
        adata = options.latent(seed)
        for k in ACTIVE:
            yield {"seed": seed, "method": "k", "value": k, **sae_row(adata, seed, k=k, preprocess="damped")}
        for l1 in PENALTIES:
            settings = {
                "architecture": "vanilla",
                "l1": l1,
                "preprocess": "damped",
                "steps": 2_500,
                "learning_rate": 3e-3,
            }
            yield {"seed": seed, "method": "l1", "value": l1, **sae_row(adata, seed, **settings)}


def model(options: Options) -> Iterator[dict]:
    larger = replace(options, **MODEL_SIZE)
    for seed in options.seeds:
        for depth in DEPTHS:
            for name, units in UNITS.items():
                if depth == 1 and name == "wide":
                    continue  # no hidden layer
                adata = larger.latent(seed, depth=depth, width=units)
                for row in both(adata, seed):
                    yield {"depth": depth, "width": name, **latent_row(adata, seed), **row}


def training(options: Options) -> Iterator[dict]:
    for seed in options.seeds:
        for epochs in PASSES:
            adata = replace(options, **MODEL_SIZE, epochs=epochs).latent(seed, depth=2, width=UNITS["wide"])
            for row in both(adata, seed):
                yield {"epochs": epochs, **latent_row(adata, seed), **row}


def latent(options: Options) -> Iterator[dict]:
    for seed in options.seeds:
        for n_latent in LATENTS:
            adata = options.latent(seed, n_latent=n_latent)
            for row in both(adata, seed):
                yield {"n_latent": n_latent, **latent_row(adata, seed), **row}


def closeness(options: Options) -> Iterator[dict]:
    larger = replace(options, **MODEL_SIZE)
    for seed in options.seeds:
        for depth, units in CLOSENESS_MODELS.items():
            adata = larger.latent(seed, depth=depth, width=units)
            sae_row(adata, seed, preprocess="damped")
            random = random_directions(adata.obsm["X_ae"], seed)
            for group, y in truth(adata).items():
                known = np.sqrt(np.maximum(probed(adata.obsm["X_ae"], y, seed), 0))
                best, chance = recovery(y, adata.obsm["sae"]).best, recovery(y, random).best
                for number in range(y.shape[1]):
                    of_variable = {"probe": known[number], "best": best[number], "random": chance[number]}
                    yield {"seed": seed, "depth": depth, "group": group, "variable": number, **of_variable}


def noise(options: Options) -> Iterator[dict]:
    for seed in options.seeds:
        for counts in COUNTS:
            adata = options.latent(seed, counts=counts)
            for row in both(adata, seed):
                yield {"counts": counts or np.inf, **latent_row(adata, seed), **row}
            for row in baseline_rows(adata, seed, "raw genes", "random directions"):
                yield {"counts": counts or np.inf, **row}


def paper(options: Options) -> Iterator[dict]:
    """The published metric: for each variable r of the feature with the highest |r|, and of these the highest of the group."""
    for seed in options.seeds:
        adata = replace(options, **PAPER_SIZE).latent(seed, **PAPER_MODEL)
        rows = np.arange(adata.n_obs)[:: max(1, adata.n_obs // PAPER_CELLS)][:PAPER_CELLS]
        hidden = {group: values[rows] for group, values in truth(adata).items()}
        z = adata.obsm["X_ae"]
        for n_features, most in PAPER_STEPS.items():
            for steps in sorted({1, most}):
                fit = {
                    "architecture": "relu",
                    "recipe": "paper",
                    "l1": 1e-3,
                    "learning_rate": PAPER_RATE,
                    "n_features": n_features,
                }
                sae.tl.fit(adata, "X_ae", **fit, steps=steps, validation=0, rng=seed, progress=False)
                trained, fvu = sae.get.model(adata), adata.uns["sae"]["params"]["fvu"]
                method = f"paper, {n_features:,}" + ", untrained" * (steps == 1)
                yield {
                    "seed": seed,
                    "method": method,
                    "FVU": fvu,
                    **paper_row(hidden, dense_activations(trained, z[rows])),
                }
        for method, preprocess in PREPROCESS.items():
            of_fit = sae_row(adata, seed, preprocess=preprocess)
            found = paper_row(hidden, iter([adata.obsm["sae"][rows].toarray()]))
            yield {"seed": seed, "method": f"sae.tl.fit, {method}", "FVU": of_fit["FVU"], **found}
        for method, a in baselines(adata[rows], seed, BASELINES, 3_000).items():
            yield {"seed": seed, "method": method, **paper_row(hidden, iter([a]))}


def dense_activations(trained, z: np.ndarray) -> Iterator[np.ndarray]:
    """Activations of a ReLU SAE, some features at a time: hardly any of them are 0."""
    for start in range(0, trained.W_enc.shape[1], PAPER_BLOCK):
        some = slice(start, start + PAPER_BLOCK)
        yield np.maximum(z @ trained.W_enc[:, some] + trained.b_enc[some], 0)


def paper_row(hidden: dict[str, np.ndarray], blocks: Iterator[np.ndarray]) -> dict[str, float]:
    best = {group: np.zeros(values.shape[1]) for group, values in hidden.items()}
    n_features = active = l0 = 0
    for a in blocks:
        n_features, active, l0 = (
            n_features + a.shape[1],
            active + (a > 0).any(axis=0).sum(),
            l0 + (a > 0).sum(axis=1).mean(),
        )
        for group, values in hidden.items():
            r = correlations(values, a)
            r = r[np.arange(len(r)), np.abs(r).argmax(axis=1)]
            best[group] = np.where(np.abs(r) > np.abs(best[group]), r, best[group])
    # A lone negative r of A or B says the same as a positive one.
    highest = {group: r.max() if len(r) > 1 else np.abs(r).max() for group, r in best.items()}
    mean = np.abs(best["X''"]).mean()
    sizes = {"n_features": n_features, "active": active, "L0": l0}
    return {**sizes, **highest, "mean X''": mean, "found": (np.abs(best["X''"]) > FOUND).sum()}


# ---- Tables


@dataclass(frozen=True)
class Part:
    title: str
    columns: str
    rows: Callable[[Options], Iterator[dict]]
    by: tuple[str, ...]
    draw: Callable[[pd.DataFrame], plt.Figure]

    def show(self, options: Options) -> pd.DataFrame:
        """Print a row per run, and medians over seeds; after an error or Ctrl-C, the rows so far."""
        rows: list[dict] = []
        try:
            for row in tqdm(self.rows(options), desc=self.title, unit="row", disable=None, leave=False):
                rows.append(row)
        finally:
            print(f"\n{self.title}\n{self.columns}", flush=True)
            found = pd.DataFrame(rows)
            if len(found):
                self._print(found)
        return found

    def _print(self, found: pd.DataFrame) -> None:
        if len(found) <= MOST_PRINTED:
            print(aligned(found), flush=True)
        numbers = found.select_dtypes("number").columns.difference(["seed", "variable", *self.by], sort=False)
        print(f"medians over {found['seed'].nunique()} seeds")
        groups = found.groupby(list(self.by), sort=False, dropna=False)
        print(aligned(groups[list(numbers)].median().reset_index()), flush=True)


def aligned(table: pd.DataFrame) -> str:
    formatters = {name: FORMATS.get(name, "{:.3f}").format for name in table.select_dtypes("number")}
    return table.to_string(index=False, formatters=formatters, na_rep="-")


# ---- Figures: a point per seed, a line through the medians


BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
LOOKS = {
    "defaults": (BLUE, "o"),
    "damped": (ORANGE, "s"),
    "k": (ORANGE, "s"),
    "l1": (GREEN, "^"),
    "narrow": (BLUE, "o"),
    "wide": (ORANGE, "s"),
    "raw genes": (GREEN, "^"),
    "random directions": (GREY, "x"),
}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7,
}
COLUMN = 3.5
RECOVERED = "best |r|, mean over programs"


def axes(n: int = 1, height: float = 2.4) -> tuple[plt.Figure, list[plt.Axes]]:
    figure, found = plt.subplots(n, 1, figsize=(COLUMN, height * n), squeeze=False, layout="constrained", sharex=True)
    return figure, list(found[:, 0])


def line(ax: plt.Axes, rows: pd.DataFrame, x: str, y: str, look: str, label: str | None = None) -> None:
    """Draw a point for each run, and a line through their medians."""
    colour, marker = LOOKS[look]
    rows = rows.dropna(subset=[x, y])
    ax.plot(rows[x], rows[y], marker, color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0.8, zorder=3)
    medians = rows.groupby(x)[y].median()
    ax.plot(medians.index, medians, color=colour, linewidth=1.3)
    ax.plot([], [], color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label or look)


def references(ax: plt.Axes, found: pd.DataFrame, names: dict[str, str]) -> None:
    """Draw a dotted line at the median of each baseline, named at its end."""
    for method, name in names.items():
        height = found.loc[found["method"] == method, "best"].median()
        ax.axhline(height, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        ax.annotate(
            name, (1, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6, color=GREY
        )


def draw_width(found: pd.DataFrame) -> plt.Figure:
    figure, (ax,) = axes()
    for method in PREPROCESS:
        line(ax, found[found["method"] == method], "n_features", "best", method)
    references(ax, found, {"raw genes": "best gene", "random directions": "random directions", "ICA": "ICA"})
    ax.set(xscale="log", xlabel="features of the SAE", ylabel=RECOVERED, ylim=(0, 1.05))
    ax.set_xticks(WIDTHS, [f"{width:,}" for width in WIDTHS])
    ax.minorticks_off()
    ax.legend()
    return figure


def draw_sparsity(found: pd.DataFrame) -> plt.Figure:
    figure, (ax,) = axes()
    names = {"k": "k (nested BatchTopK)", "l1": "L1 penalty (ReLU)"}
    for method, label in names.items():
        of_method = found[found["method"] == method]
        l0 = of_method.groupby("value")["L0"].transform("median")
        line(ax, of_method.assign(L0=l0), "L0", "best", method, label)
    ax.axvline(30, color=GREY, linewidth=0.8, linestyle=":")
    ax.annotate("active programs", (30, 0.02), rotation=90, ha="right", va="bottom", fontsize=6, color=GREY)
    ax.set(xscale="log", xlabel="active features per cell (L0)", ylabel=RECOVERED, ylim=(0, 1.05))
    ax.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    ax.minorticks_off()
    ax.legend()
    return figure


def draw_model(found: pd.DataFrame) -> plt.Figure:
    figure, (of_model, of_sae) = axes(2, 2.0)
    for name in UNITS:
        rows = found[(found["width"] == name) | (found["depth"] == 1)]
        rows = rows[rows["method"] == "damped"]
        line(of_model, rows, "depth", "probe", name, f"{name}, {UNITS[name]} units")
        line(of_sae, rows, "depth", "best", name)
    of_model.set(ylabel="linear probe, mean r", ylim=(0, 1.05))
    of_sae.set(xlabel="layers of the encoder, and of the decoder", ylabel=RECOVERED, ylim=(0, 1.05), xticks=DEPTHS)
    of_model.legend(loc="lower left")
    return figure


def draw_against_probe(found: pd.DataFrame, x: str, label: str) -> tuple[plt.Figure, plt.Axes]:
    figure, (ax,) = axes()
    ceiling = found.drop_duplicates(["seed", x])
    medians = ceiling.groupby(x)["probe"].median()
    ax.plot(medians.index, medians, color=GREY, linewidth=1, linestyle="--", label="linear probe")
    for method in PREPROCESS:
        line(ax, found[found["method"] == method], x, "best", method)
    ax.set(xlabel=label, ylabel=RECOVERED, ylim=(0, 1.05))
    return figure, ax


def draw_latent(found: pd.DataFrame) -> plt.Figure:
    figure, ax = draw_against_probe(found, "n_latent", "dimensions of the latent")
    ax.set(xscale="log")
    ax.set_xticks(LATENTS, [str(n) for n in LATENTS])
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return figure


def draw_training(found: pd.DataFrame) -> plt.Figure:
    figure, ax = draw_against_probe(found, "epochs", "passes of the model over the cells")
    ax.set(xscale="log")
    ax.set_xticks(PASSES, [str(n) for n in PASSES])
    ax.minorticks_off()
    ax.legend(loc="lower right")
    return figure


def draw_noise(found: pd.DataFrame) -> plt.Figure:
    places = {counts or np.inf: place for place, counts in enumerate(COUNTS)}
    found = found.assign(place=found["counts"].map(places))
    figure, ax = draw_against_probe(found, "place", "counts per cell")
    for method in ("raw genes", "random directions"):
        line(ax, found[found["method"] == method], "place", "best", method)
    ax.set_xticks(list(places.values()), ["no noise", *(f"{counts:,}" for counts in COUNTS if counts)])
    ax.legend(ncols=2, loc="lower left")
    return figure


def draw_closeness(found: pd.DataFrame) -> plt.Figure:
    figure, panels = axes(2, 2.9)
    groups = {"X": (BLUE, "o"), "X'": (GREEN, "^"), "X''": (ORANGE, "s"), "A": (PINK, "D"), "B": ("black", "*")}
    for ax, (depth, rows) in zip(panels, found.groupby("depth"), strict=True):
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for group, (colour, marker) in groups.items():
            points = rows[rows["group"] == group]
            size = 6 if len(points) > 50 else 30
            ax.scatter(
                points["probe"], points["best"], size, color=colour, marker=marker, alpha=0.5, linewidths=0, label=group
            )
        ax.set(ylabel="best feature: |r|", xlim=(0, 1.02), ylim=(0, 1.05), aspect="equal")
        ax.set_title("linear model" if depth == 1 else f"{depth} layers either side", fontsize=8)
    panels[-1].set_xlabel("linear probe: r, held out")
    panels[0].legend(loc="upper left")
    return figure


def draw_paper(found: pd.DataFrame) -> plt.Figure:
    figure, (ax,) = axes(height=2.8)
    width = f"{min(PAPER_STEPS):,}"
    shown = {
        f"paper, {width}": ("paper mode", BLUE, "o"),
        f"paper, {width}, untrained": ("the same, untrained", GREY, "x"),
        "random directions": ("random directions", GREEN, "^"),
        "raw genes": ("raw genes", PINK, "D"),
    }
    for number, (method, (label, colour, marker)) in enumerate(shown.items()):
        rows = found[found["method"] == method]
        for place, group in enumerate(GROUPS):
            x = np.full(len(rows), place + 0.16 * (number - 1.5))
            ax.plot(x, rows[group], marker, color=colour, markersize=4, label=label if place == 0 else None)
    published = PUBLISHED.loc[0, list(GROUPS)].astype(float)
    ax.hlines(published, np.arange(5) - 0.38, np.arange(5) + 0.38, color=ORANGE, linewidth=1.5, label="published")
    ax.set(ylabel="published metric, r", ylim=(0, 1.05))
    ax.set_xticks(range(5), GROUPS)
    ax.legend(ncols=2, loc="upper left", bbox_to_anchor=(0, 1.3))
    return figure


# ---- Command line


RECOVERY_HELP = f"best, matched: mean |r| of a program (X'') with its best feature, and with a feature of its own; found: programs of 100 with |r| > {FOUND}"
SAE_HELP = "dead, L0 and FVU over all cells; seconds: fit and encode"
PROBE_HELP = "R2 Y: of the autoencoder; R2 X'': linear, held out, from its latent; probe: mean of its root"
FORMATS = {
    **dict.fromkeys(("seed", "n_features", "n_latent", "found", "active", "depth", "counts", "epochs"), "{:.0f}"),
    **dict.fromkeys(("L0", "seconds"), "{:.1f}"),
    "value": "{:g}",
}
MOST_PRINTED = 100
PARTS = {
    "paper": Part(
        "paper: the published table",
        "X to B: r of the feature with the highest |r|, and of these the highest of the group; mean X'': mean of |r|",
        paper,
        ("method",),
        draw_paper,
    ),
    "width": Part(
        "width: features of the SAE", f"{RECOVERY_HELP}; {SAE_HELP}", width, ("method", "n_features"), draw_width
    ),
    "sparsity": Part(
        "sparsity: k, and the L1 penalty", f"{RECOVERY_HELP}; {SAE_HELP}", sparsity, ("method", "value"), draw_sparsity
    ),
    "model": Part(
        "model: layers of the autoencoder and their width",
        f"{PROBE_HELP}; {RECOVERY_HELP}; {SAE_HELP}",
        model,
        ("depth", "width", "method"),
        draw_model,
    ),
    "training": Part(
        "training: passes of the autoencoder",
        f"{PROBE_HELP}; {RECOVERY_HELP}; {SAE_HELP}",
        training,
        ("epochs", "method"),
        draw_training,
    ),
    "latent": Part(
        "latent: dimensions", f"{PROBE_HELP}; {RECOVERY_HELP}; {SAE_HELP}", latent, ("n_latent", "method"), draw_latent
    ),
    "closeness": Part(
        "closeness: near the expression and far from it",
        "means over variables of: probe, root of the held-out linear R2; best, |r| of the best feature; random, of random directions",
        closeness,
        ("depth", "group"),
        draw_closeness,
    ),
    "noise": Part(
        "noise: counts per cell", f"{PROBE_HELP}; {RECOVERY_HELP}; {SAE_HELP}", noise, ("counts", "method"), draw_noise
    ),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--tuning", action="store_true", help=f"seeds {TUNING_SEEDS} instead of {BENCHMARK_SEEDS}")
    parser.add_argument("--cells", type=int, default=N_CELLS, help="simulate so many cells instead")
    parser.add_argument("--genes", type=int, default=N_GENES)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes of the autoencoder")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw a figure for every part")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write the rows of every part as CSV")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    asked = Options(TUNING_SEEDS if given.tuning else BENCHMARK_SEEDS, given.cells, given.genes, given.epochs)
    for folder in filter(None, (given.figures, given.tables)):
        folder.mkdir(parents=True, exist_ok=True)
    for name in given.parts or PARTS:
        began = time.perf_counter()
        rows_found = PARTS[name].show(asked)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        if given.tables:
            rows_found.to_csv(given.tables / f"{name}.csv", index=False, float_format="%.4g")
        if given.figures:
            with mpl.rc_context(STYLE):
                PARTS[name].draw(rows_found).savefig(given.figures / f"{name}.png", dpi=200)
