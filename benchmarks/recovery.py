"""Does an SAE find programs that are known? Simulated cells, with component analyses and raw genes as baselines.

A program counts as found when |r| of its activity and some feature's activation, over all cells, is above .95. The programs
are those of sae.datasets.simulate_programs after masking by cell type (100 in 1,000 genes), the embedding is the first 100
principal components of the expression. Unless a part says otherwise, cells are 60,000 and the SAE is sae.tl.fit at defaults
with 400 features.

    programs     the width of the SAE: 200, 400, 1,000 and 4,000 features
    baselines    PCA, ICA, NMF, raw genes and random directions on the same cells
    hard         fewer components than programs, counts, rare programs, few cells; SAE and all baselines
    small        sae.datasets.simulate_small, the latent of a linear autoencoder with 4 units, ten seeds; at defaults, with
                 n_features too, and with three features under a weak L1 penalty
    preprocess   every preprocess= of fit, on real cells (held-out AUROC of labels) and on the simulation
    auto         k="auto" against the true number of active programs

    python benchmarks/recovery.py
    python benchmarks/recovery.py programs baselines --tuning --set preprocess=whiten --set k=30
    python benchmarks/recovery.py preprocess --h5ad pbmc3k.h5ad:cell_type
    python benchmarks/recovery.py --tuning --cells 5000 --set steps=200

--set gives further arguments to every fit, except those that a part varies itself. Random directions are isotropic in the
embedding; NMF gets the nonnegative part of the expression of at most 10,000 cells, and is judged on them; "supervised" is a
linear regression of the programs on the embedding, from the other half of the cells: what a direction could know at best.
"""

from __future__ import annotations

import argparse
import ast
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import labels
import numpy as np
import pandas as pd
import scanpy as sc
import torch
from sklearn.decomposition import NMF, FastICA
from sklearn.exceptions import ConvergenceWarning
from tqdm import tqdm

import sae
from sae.core.preprocess import PREPROCESS
from sae.core.recovery import recovery
from sae.core.rows import row_blocks

# These seeds are only ever reported on; nothing is tuned on them.
BENCHMARK_SEEDS = (101, 202, 303)
TUNING_SEEDS = (0, 1, 2)
N_SMALL_SEEDS = 10
# X0 and X2 are mostly on together and equal then: a feature of both is sparser, so that only a narrow dictionary keeps them apart.
THREE_FEATURES = {
    "architecture": "vanilla",
    "n_features": 3,
    "l1": 0.02,
    "preprocess": "center",
    "learning_rate": 8e-3,
    "steps": 6_000,
}

N_CELLS, FEW_CELLS, SMALL_CELLS = 60_000, 5_000, 12_000
N_GENES, N_COMPONENTS = 1_000, 100
WIDTHS, N_FEATURES = (200, 400, 1_000, 4_000), 400
TYPE_DENSITIES = (0.15, 0.3, 0.5)
FOUND, FOUND_SMALL = 0.95, 0.99
N_RARE, RARE = 10, 0.01
NMF_CELLS = 10_000
LATENT, STARTS, PASSES, EXPLAINED = 4, 20, 40, 0.999

FOUND_HELP = (
    "found: programs of 100 with |r| > .95; best, matched: mean |r| of a program with its best feature, and with a feature "
    "of its own"
)
SAE_HELP = "dead, L0 and FVU over all cells; seconds: fit and encode"
FORMATS = {
    **dict.fromkeys(("seed", "n_features", "found", "all", "at .9", "k"), "{:.0f}"),
    **dict.fromkeys(("L0", "true L0", "seconds"), "{:.1f}"),
    "type_density": "{:.2f}",
}
SUMMED = ("all",)


# ---- Data


def principal_components(x: np.ndarray, n: int) -> np.ndarray:
    """Scores of the first n components (cells, n), from the eigenvectors of the gene covariance in float64."""
    mean = x.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((x.shape[1], x.shape[1]))
    for rows in row_blocks(len(x), 4096):
        centred = x[rows] - mean
        covariance += centred.T @ centred
    vectors = np.linalg.eigh(covariance)[1][:, : -n - 1 : -1]
    return np.concatenate([(x[rows] - mean) @ vectors for rows in row_blocks(len(x), 4096)]).astype(np.float32)


def simulated(n_cells: int, seed: int, **how) -> ad.AnnData:
    adata = sae.datasets.simulate_programs(n_cells, N_GENES, rng=seed, **how)
    adata.obsm["X_pca"] = principal_components(adata.X, N_COMPONENTS)
    return adata


def log_normalised(counts: ad.AnnData) -> ad.AnnData:
    adata = counts.copy()
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata.obsm["X_pca"] = principal_components(adata.X, N_COMPONENTS)
    return adata


def with_components(adata: ad.AnnData, n: int) -> ad.AnnData:
    obsm = {"X_pca": adata.obsm["X_pca"][:, :n], "programs": adata.obsm["programs"]}
    return ad.AnnData(adata.X, obs=adata.obs, obsm=obsm, uns=adata.uns)


# ---- What is compared


def judged(truth: np.ndarray, a, n_rare: int = 0) -> dict[str, float]:
    result = recovery(truth, a)
    row = {
        "n_features": a.shape[1],
        "found": (result.best > FOUND).sum(),
        "best": result.best.mean(),
        "matched": result.matched.mean(),
    }
    return {**row, "rare best": result.best[-n_rare:].mean() if n_rare else np.nan}


def fit(adata: ad.AnnData, seed: int, settings: dict, **of_part) -> dict[str, float]:
    """Fit and encode; `of_part` wins over `settings`."""
    start = time.perf_counter()
    sae.tl.fit(adata, **{**settings, "rng": seed, "progress": False, **of_part})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE .* leaves", UserWarning)  # the table says how badly it fits
        sae.tl.encode(adata, progress=False)
    seconds = time.perf_counter() - start
    encoded, dead = adata.uns["sae"]["encoded"], sae.get.features(adata)["dead"].mean()
    return {"dead": dead, "L0": encoded["l0"], "FVU": encoded["fvu"], "seconds": seconds}


def sae_row(adata: ad.AnnData, seed: int, settings: dict, **of_part) -> dict[str, float]:
    of_fit = fit(adata, seed, settings, **of_part)
    n_rare = adata.uns["simulation"]["n_rare"]
    return {**judged(adata.obsm["programs"], adata.obsm["sae"], n_rare), **of_fit}


Features = Iterator[tuple[str, np.ndarray, str]]
"""Name of a method, its features (cells, h), and a remark."""


def of_genes(adata: ad.AnnData, seed: int) -> Features:
    yield "raw genes", adata.X, ""
    # The default tolerance stops after two steps.
    model = NMF(N_COMPONENTS, init="random", tol=1e-6, max_iter=300, random_state=seed)
    yield "NMF", *fitted(model, np.maximum(adata.X[:NMF_CELLS], 0))


def of_embedding(adata: ad.AnnData, seed: int) -> Features:
    x = adata.obsm["X_pca"]
    yield "PCA", x, ""
    # In float32 it takes steps of rounding error for convergence.
    model = FastICA(whiten="unit-variance", whiten_solver="eigh", max_iter=500, random_state=seed)
    yield "ICA", *fitted(model, x.astype(np.float64))
    directions = np.random.default_rng(seed).standard_normal((x.shape[1], N_FEATURES)).astype(np.float32)
    projected = x @ directions
    yield "random", projected, ""
    yield "random, ReLU", np.maximum(projected, 0, out=projected), ""
    yield "supervised", predicted(x, adata.obsm["programs"]), ""


def predicted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Linear prediction of y (cells, p) from x, each half of the cells by the weights of the other."""
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    y_hat = np.empty(y.shape)
    for one, other in ((0, 1), (1, 0)):
        y_hat[one::2] = x[one::2] @ np.linalg.lstsq(x[other::2], y[other::2], rcond=None)[0]
    return y_hat


def fitted(model, x: np.ndarray) -> tuple[np.ndarray, str]:
    """Return what a model of scikit-learn makes of x, and a remark if it stopped too early."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        a = model.fit_transform(x)
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    remarks = [f"{len(x)} cells"] * isinstance(model, NMF) + [f"stopped after {model.n_iter_} steps"] * stopped
    return a, ", ".join(remarks)


def baseline_rows(adata: ad.AnnData, methods: Features) -> Iterator[dict]:
    truth, n_rare = adata.obsm["programs"], adata.uns["simulation"]["n_rare"]
    start = time.perf_counter()
    for name, a, remark in methods:
        seconds = time.perf_counter() - start
        yield {"method": name, **judged(truth[: len(a)], a, n_rare), "seconds": seconds, "remark": remark}
        start = time.perf_counter()


# ---- Parts: rows of their tables, one per run


def programs(options: argparse.Namespace) -> Iterator[dict]:
    for seed in options.seeds:
        adata = simulated(options.cells or N_CELLS, seed)
        for width in WIDTHS:
            yield {"seed": seed, **sae_row(adata, seed, options.settings, n_features=width)}


def baselines(options: argparse.Namespace) -> Iterator[dict]:
    for seed in options.seeds:
        adata = simulated(options.cells or N_CELLS, seed)
        for methods in (of_embedding, of_genes):
            for row in baseline_rows(adata, methods(adata, seed)):
                yield {"seed": seed, **row}


def hard(options: argparse.Namespace) -> Iterator[dict]:
    n_cells, settings = options.cells or N_CELLS, {"n_features": N_FEATURES, **options.settings}
    few = min(n_cells, FEW_CELLS)
    for seed in options.seeds:
        plain = simulated(n_cells, seed)
        of_matrix = list(baseline_rows(plain, of_genes(plain, seed)))
        for n in (20, 50):
            adata = with_components(plain, n)
            for row in [sae_row(adata, seed, settings), *baseline_rows(adata, of_embedding(adata, seed)), *of_matrix]:
                yield {"seed": seed, "case": f"{n} components", "method": "SAE", **row}
        del plain, adata
        for case, make in {
            "counts, log-normalised": lambda seed: log_normalised(simulated(n_cells, seed, noise="poisson")),
            "counts": lambda seed: simulated(n_cells, seed, noise="poisson"),
            "10 programs in 1 % of cells": lambda seed: simulated(n_cells, seed, rare=RARE, n_rare=N_RARE),
            f"{few:,} cells": lambda seed: simulated(few, seed),
        }.items():
            adata = make(seed)
            yield {"seed": seed, "case": case, "method": "SAE", **sae_row(adata, seed, settings)}
            for methods in (of_embedding, of_genes):
                for row in baseline_rows(adata, methods(adata, seed)):
                    yield {"seed": seed, "case": case, **row}


def explained(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """R² of the best linear map from x to each column of y."""
    x = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
    error = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    return 1 - np.square(error).sum(axis=0) / np.square(y - y.mean(axis=0)).sum(axis=0)


def linear_autoencoder(adata: ad.AnnData, seed: int) -> tuple[np.ndarray, float]:
    """The latent (cells, 4) of x → 4 → ReLU(x̂), trained until R² of x and of the programs is .999, and that of x.

    Starts from other weights until none of the outputs dies in training.
    """
    x = torch.from_numpy(adata.X)
    variance = (x - x.mean(dim=0)).square().mean()
    torch.manual_seed(seed)
    for _ in range(STARTS):
        encoder, decoder = torch.nn.Linear(x.shape[1], LATENT), torch.nn.Linear(LATENT, x.shape[1])
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
        for _ in range(PASSES):
            for rows in torch.randperm(len(x)).split(128):
                loss = (decoder(encoder(x[rows])).relu() - x[rows]).square().mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
            with torch.no_grad():
                latent = encoder(x)
                found = 1 - float((decoder(latent).relu() - x).square().mean() / variance)
            if found > EXPLAINED and explained(latent.numpy(), adata.obsm["programs"]).min() > EXPLAINED:
                return latent.numpy(), found
    raise RuntimeError(f"The autoencoder of seed {seed} explains {found:.3f} after {STARTS} starts.")


def small(options: argparse.Namespace) -> Iterator[dict]:
    for seed in range(options.seeds[0], options.seeds[0] + N_SMALL_SEEDS):
        adata = sae.datasets.simulate_small(options.cells or SMALL_CELLS, rng=seed)
        truth = adata.obsm["programs"]
        adata.obsm["X_pca"], reconstructed = linear_autoencoder(adata, seed)
        of_latent = {"R2 Y": reconstructed, "R2 X": explained(adata.obsm["X_pca"], truth).min()}
        for settings in (options.settings, THREE_FEATURES):
            of_fit = fit(adata, seed, settings)
            activations = adata.obsm["sae"]
            best = recovery(truth, activations).best
            of_programs = {f"X{number}": value for number, value in enumerate(best)}
            of_programs["all"] = int((best >= FOUND_SMALL).all())
            yield {"seed": seed, "n_features": activations.shape[1], **of_latent, **of_programs, **of_fit}


def preprocess_real(options: argparse.Namespace) -> Iterator[dict]:
    for path, groupby in [(None, "bulk_labels"), *options.h5ad]:
        adata = labels.cells(path)
        name = "pbmc68k" if path is None else os.path.basename(path)
        for seed in options.seeds:
            for kind in PREPROCESS:
                try:
                    of_fit = fit(adata, seed, options.settings, preprocess=kind)
                except ValueError as error:
                    print(f"{name}, {kind}, left out: {error}")
                    continue
                sae.tl.score_labels(adata, groupby, baselines=True, progress=False)
                held_out = sae.get.label_summary(adata).pivot(index="label", columns="source", values="held_out_auroc")
                auroc, component = held_out["feature"], held_out["representation"].mean()
                of_labels = {"AUROC": auroc.mean(), "at .9": (auroc >= 0.9).sum(), "component": component}
                yield {"cells": name, "seed": seed, "preprocess": kind, **of_labels, **of_fit}


def preprocess_simulated(options: argparse.Namespace) -> Iterator[dict]:
    settings = {"n_features": N_FEATURES, **options.settings}
    for seed in options.seeds:
        adata = simulated(options.cells or N_CELLS, seed)
        for kind in PREPROCESS:
            yield {"seed": seed, "preprocess": kind, **sae_row(adata, seed, settings, preprocess=kind)}


def auto(options: argparse.Namespace) -> Iterator[dict]:
    settings = {"n_features": N_FEATURES, **options.settings}
    for seed in options.seeds:
        for density in TYPE_DENSITIES:
            adata = simulated(options.cells or N_CELLS, seed, type_density=density)
            active = np.count_nonzero(adata.obsm["programs"]) / adata.n_obs
            row = sae_row(adata, seed, settings, k="auto")
            k = adata.uns["sae"]["params"]["k"]
            yield {"seed": seed, "type_density": density, "true L0": active, "k": k, "k / true": k / active, **row}


# ---- Tables


@dataclass(frozen=True)
class Table:
    title: str
    columns: str
    rows: Callable[[argparse.Namespace], Iterator[dict]]
    by: tuple[str, ...]

    def show(self, options: argparse.Namespace) -> None:
        """Print a row per run, and a summary over seeds; after an error or Ctrl-C, the rows so far."""
        rows: list[dict] = []
        try:
            for row in tqdm(self.rows(options), desc=self.title, unit="row", disable=None, leave=False):
                rows.append(row)
        finally:
            print(f"\n{self.title}\n{self.columns}", flush=True)
            if rows:
                self._print(pd.DataFrame(rows))

    def _print(self, found: pd.DataFrame) -> None:
        found = found.dropna(axis=1, how="all")
        if "remark" in found:
            found["remark"] = found.pop("remark").fillna("")
        print(aligned(found), flush=True)
        n_seeds = found["seed"].nunique()
        if n_seeds == 1:
            return
        numbers = found.select_dtypes("number").columns.difference(["seed", *self.by], sort=False)
        summary = {name: "sum" if name in SUMMED else "median" for name in numbers}
        sums = "".join(f", sum of {name!r}" for name in numbers if name in SUMMED)
        print(f"medians over {n_seeds} seeds{sums}")
        print(aligned(found.groupby(list(self.by), sort=False).agg(summary).reset_index()), flush=True)


def aligned(table: pd.DataFrame) -> str:
    formatters = {name: FORMATS.get(name, "{:.3f}").format for name in table.select_dtypes("number")}
    return table.to_string(index=False, formatters=formatters, na_rep="-")


PARTS = {
    "programs": (Table("programs: the width of the SAE", f"{FOUND_HELP}; {SAE_HELP}", programs, ("n_features",)),),
    "baselines": (Table("baselines", f"{FOUND_HELP}; seconds: until the features are there", baselines, ("method",)),),
    "hard": (
        Table(
            "hard: where the answer is not a rotation away",
            f"{FOUND_HELP}; rare best: the same as best over the 10 rare programs; {SAE_HELP}",
            hard,
            ("case", "method"),
        ),
    ),
    "small": (
        Table(
            "small: three programs behind five genes, from the 4 units of a linear autoencoder",
            "R2 Y: of the autoencoder; R2 X: linear, of the worst program from its latent; X0 to X2: |r| of the best "
            f"feature; all: 1 if all three are at .99 or more; {SAE_HELP}",
            small,
            ("n_features",),
        ),
    ),
    "preprocess": (
        Table(
            "preprocess: real cells",
            "AUROC: of each label's best feature, held out, mean over labels; at .9: number of labels that reach it; "
            f"component: the same AUROC of principal components; {SAE_HELP}",
            preprocess_real,
            ("cells", "preprocess"),
        ),
        Table("preprocess: simulated programs", f"{FOUND_HELP}; {SAE_HELP}", preprocess_simulated, ("preprocess",)),
    ),
    "auto": (
        Table(
            'auto: k="auto"',
            f"true L0: active programs per cell; k: what was chosen; {FOUND_HELP}; {SAE_HELP}",
            auto,
            ("type_density",),
        ),
    ),
}


# ---- Command line


def setting(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def labelled(text: str) -> tuple[str, str]:
    path, _, groupby = text.rpartition(":")
    return path, groupby


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument("--tuning", action="store_true", help=f"seeds {TUNING_SEEDS} instead of {BENCHMARK_SEEDS}")
    parser.add_argument("--cells", type=int, help="simulate so many cells instead, to try it out")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--h5ad", type=labelled, action="append", default=[], metavar="FILE:GROUPBY")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    given.seeds, given.settings = TUNING_SEEDS if given.tuning else BENCHMARK_SEEDS, dict(given.set)
    # Compile before the clock runs.
    fit(sae.datasets.pbmc68k(), 0, {**given.settings, "n_features": 32, "steps": 10})
    for chosen in given.parts or PARTS:
        began = time.perf_counter()
        for table in PARTS[chosen]:
            table.show(given)
        print(f"{chosen}: {time.perf_counter() - began:.0f} s", flush=True)
