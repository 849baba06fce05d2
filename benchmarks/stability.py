"""Do other seeds find the same features, and what raises that? Every option of sae.tl.fit that could, one change at a time.

Each setting is trained from several seeds. The runs are compared two by two: features are matched one to one by the cosine of
their decoder directions in the space of training (sae.core.stability). Beside it stands what the setting costs: FVU, and the
held-out AUROC of the best feature of each label (as in labels.py) or the simulated programs that are found (as in recovery.py).

    options   one change at a time from the defaults, and the combinations that help
    halves    the same settings, each run on another half of the cells: are features of the cells, or of these cells?
    chance    sae.tl.stability at defaults beside dictionaries that learned nothing

    python benchmarks/stability.py
    python benchmarks/stability.py options --h5ad pbmc3k.h5ad:cell_type --h5ad marrow.h5ad:cell_type
    python benchmarks/stability.py chance --tuning --seeds 3 --cells 3000

Cells are the bundled PBMC, simulate_programs (the first 100 principal components, 400 features) and the files that are given.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import labels
import numpy as np
import pandas as pd
from recovery import N_COMPONENTS, N_FEATURES, N_GENES, aligned, labelled, principal_components
from tqdm import tqdm

import sae
from sae.core.defaults import DEFAULT_L1, LEARNING_RATE, STEPS
from sae.core.preprocess import directions, fit_scaling
from sae.core.recovery import recovery
from sae.core.stability import Dictionary, compare
from sae.core.train import DivergedError

FIRST_SEED, FIRST_TUNING_SEED, N_SEEDS = 101, 0, 4
N_CELLS = 12_000
STABLE, FOUND = 0.9, 0.95
PENALISED = ("vanilla", "gated", "jumprelu")

HELP = (
    "pw_mcc ± sd: |cosine| of all features, matched, over pairs of runs; similarity: cosine of active features with their "
    f"partners; ≥ {STABLE}: share of active features whose mean similarity is that high; again: found again (share of pairs; see "
    "sae.tl.stability); r: of activations, matched by that; AUROC: of each label's best feature, held out; programs: found of "
    f"100, |r| > {FOUND}"
)


@dataclass(frozen=True)
class Cells:
    """Cells to train on, and what is known about them."""

    name: str
    adata: ad.AnnData
    groupby: str | None
    width: dict[str, int]


def all_cells(options: argparse.Namespace) -> Iterator[Cells]:
    for path, groupby in [(None, "bulk_labels"), *options.h5ad]:
        yield Cells("pbmc68k" if path is None else os.path.basename(path), labels.cells(path), groupby, {})
    adata = sae.datasets.simulate_programs(options.cells or N_CELLS, N_GENES, rng=options.seeds[0])
    adata.obsm["X_pca"] = principal_components(adata.X, N_COMPONENTS)
    yield Cells("simulated", adata, None, {"n_features": N_FEATURES})


def settings(cells: Cells) -> dict[str, dict]:
    """Name and arguments of every setting, from what the defaults are on these cells."""
    adata = ad.AnnData(obsm={"X_pca": cells.adata.obsm["X_pca"]})
    sae.tl.fit(adata, progress=False, steps=1, **cells.width)
    params = adata.uns["sae"]["params"]
    h, k, batch = params["n_features"], params["k"], params["batch_size"]
    changes: dict[str, dict] = {
        "default": {},
        **{f"architecture={name}": {"architecture": name} for name in ("batchtopk", "topk", *PENALISED)},
        **{f"n_features × {f:g}": {"n_features": round(h * f)} for f in (0.5, 2, 4)},
        **{f"k × {f:g}": {"k": max(1, round(k * f))} for f in (0.25, 0.5, 2)},
        **{f"steps × {f}": {"steps": STEPS * f} for f in (2, 4)},
        **{f"learning_rate × {f:g}": {"learning_rate": LEARNING_RATE * f} for f in (0.25, 0.5, 2)},
        **{f"preprocess={name}": {"preprocess": name} for name in ("center", "standardize", "whiten")},
        **{f"batch_size × {f:g}": {"batch_size": round(batch * f)} for f in (0.25, 4)},
        "validation=0": {"validation": 0.0},
        "k × 0.5, steps × 4": {"k": max(1, round(k / 2)), "steps": 4 * STEPS},
        "n_features × 0.5, steps × 4": {"n_features": round(h / 2), "steps": 4 * STEPS},
        "vanilla, l1 × 0.5": {"architecture": "vanilla", "l1": DEFAULT_L1 / 2},
        "vanilla, l1 × 2": {"architecture": "vanilla", "l1": 2 * DEFAULT_L1},
    }
    # On half of the cells the default would be narrower.
    return {name: {"n_features": h, **how} for name, how in changes.items()}


def trained(cells: Cells, seed: int, how: dict, rows: np.ndarray | None) -> ad.AnnData:
    """Fit to some of the cells, and encode all."""
    part = cells.adata if rows is None else cells.adata[rows].copy()
    sae.tl.fit(part, rng=seed, progress=False, **{**cells.width, **how})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The SAE .* leaves", UserWarning)  # the table says how badly it fits
        sae.tl.encode(cells.adata, reference=part, progress=False)
    return cells.adata


def judged(cells: Cells, runs: Iterable[ad.AnnData], kind: str | None) -> dict[str, float]:
    """What each run is worth, and how alike they are."""
    scaling = fit_scaling(cells.adata.obsm["X_pca"], kind)
    dictionaries, rows = [], []
    for adata in runs:
        stored = adata.uns["sae"]
        a = adata.obsm["sae"]
        dictionaries.append(Dictionary(directions(stored["weights"]["W_dec"], scaling.factors), a))
        row = {
            "FVU": stored["encoded"]["fvu"],
            "L0": stored["encoded"]["l0"],
            "dead": stored["features"]["dead"].mean(),
        }
        if cells.groupby is not None:
            sae.tl.score_labels(adata, cells.groupby, progress=False)
            row["AUROC"] = sae.get.label_summary(adata, groupby=cells.groupby)["held_out_auroc"].mean()
        else:
            found = recovery(adata.obsm["programs"], a)
            row |= {"programs": float((found.best > FOUND).sum()), "best": found.best.mean()}
        rows.append(row)
    results = [compare(one, dictionaries[:i] + dictionaries[i + 1 :]) for i, one in enumerate(dictionaries)]
    cosine = np.concatenate([result.cosine.mean(axis=0) for result in results])
    pairs = results[0].pw_mcc
    return {
        "n_features": len(dictionaries[0].directions),
        "pw_mcc": pairs.mean(),
        "sd": pairs.std(ddof=1) if len(pairs) > 1 else np.nan,
        "similarity": np.nanmean(cosine),
        f"≥ {STABLE}": (cosine[~np.isnan(cosine)] >= STABLE).mean(),
        "again": np.nanmean(np.concatenate([result.found.mean(axis=0) for result in results])),
        "r": np.nanmean(np.concatenate([result.correlation.mean(axis=0) for result in results])),
        **pd.DataFrame(rows).mean().to_dict(),
    }


def table(cells: Cells, options: argparse.Namespace, *, halves: bool) -> pd.DataFrame:
    """A row per setting."""
    rng, n, rows = np.random.default_rng(options.seeds[0]), cells.adata.n_obs, []
    divisions = [np.sort(half) for _ in options.seeds[::2] for half in np.array_split(rng.permutation(n), 2)]
    for name, how in tqdm(settings(cells).items(), desc=cells.name, unit="setting", disable=None, leave=False):
        if options.only and not any(name.startswith(one) for one in options.only):
            continue
        parts = divisions if halves else [None] * len(options.seeds)
        began = time.perf_counter()
        try:
            runs = (trained(cells, seed, how, part) for seed, part in zip(options.seeds, parts, strict=False))
            row = judged(cells, runs, how.get("preprocess"))
        except (DivergedError, ValueError) as error:
            print(f"{cells.name}, {name}, left out: {error}", flush=True)
            continue
        rows.append({"setting": name, **row, "seconds": (time.perf_counter() - began) / len(options.seeds)})
        if options.verbose:
            print(aligned(pd.DataFrame(rows[-1:])), flush=True)
    return pd.DataFrame(rows)


def options_part(options: argparse.Namespace) -> None:
    for cells in all_cells(options):
        found = table(cells, options, halves=False)
        print(
            f"\noptions: {cells.name}, {cells.adata.n_obs} cells, {len(options.seeds)} seeds\n{HELP}\n{aligned(found)}",
            flush=True,
        )


def halves_part(options: argparse.Namespace) -> None:
    for cells in all_cells(options):
        found = table(cells, options, halves=True)
        print(
            f"\nhalves: {cells.name}, each run on a half of {cells.adata.n_obs} cells\n{HELP}\n{aligned(found)}",
            flush=True,
        )


def chance_part(options: argparse.Namespace) -> None:
    for cells in all_cells(options):
        sae.tl.fit(cells.adata, rng=options.seeds[0], progress=False, **cells.width)
        sae.tl.encode(cells.adata, progress=False)
        sae.tl.stability(cells.adata, n_seeds=len(options.seeds), progress=False)
        summary = cells.adata.uns["sae"]["stability"]["summary"].astype({"source": str})
        print(f"\nchance: {cells.name}, {len(options.seeds)} more seeds\n{aligned(summary)}", flush=True)


PARTS = {"options": options_part, "halves": halves_part, "chance": chance_part}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; by default all")
    parser.add_argument(
        "--tuning", action="store_true", help=f"seeds from {FIRST_TUNING_SEED} on, not from {FIRST_SEED}"
    )
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--cells", type=int, help="simulate so many cells instead, to try it out")
    parser.add_argument("--only", action="append", default=[], metavar="SETTING", help="settings that begin so")
    parser.add_argument("--h5ad", type=labelled, action="append", default=[], metavar="FILE:GROUPBY")
    parser.add_argument("--verbose", action="store_true", help="print each row when it is there")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    first = FIRST_TUNING_SEED if given.tuning else FIRST_SEED
    given.seeds = list(range(first, first + given.seeds))
    for chosen in given.parts or PARTS:
        PARTS[chosen](given)
