"""Does an SAE find more than other decompositions, chance, and what the labels choose themselves? `tl.evaluate` on real cells.

    python benchmarks/evidence.py evaluation
    python benchmarks/evidence.py evaluation --h5ad pbmc3k.h5ad:cell_type --h5ad marrow.h5ad:cell_type --seeds 3

Cells are the 700 PBMC of sae.datasets.pbmc68k, and those of each file; counts are normalised as in benchmarks/labels.py. The latent is
50 principal components, the model their inverse; gene sets are the package's immune markers unless --net says otherwise. All
settings are the defaults.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import labels
import pandas as pd
import scanpy as sc

import sae

MIN_SIZE = 3
SEED = 0
"""Of the first SAE."""
SCORES = """\
Labels and gene sets: higher is better, SAE − it above 0 where the SAE is better. In brackets, 95 % bootstrap intervals.
label AUROC: of each label's best column, chosen on one half of the cells, on the other half; mean over labels; intervals over cells
labels ≥ .9: labels that reach it
columns:     that were chosen among, both signs of a component counted; of L1 as a whole, those with a coefficient
set AUROC:   of each gene set by its best column, likewise, mean over sets; intervals over sets, not over cells"""
KEPT = """\
Reconstruction and dictionary. "better" says whether low or high is; SAE − it has no such sign. fvu_train, fvu_held_out, fvu_all: of the
cells of training, of those held out, and of all, without intervals; fvu, fvu_scaled and fidelity: of the compared cells. pca: as many components
as the SAE has active features per cell. label_accuracy: of nearest neighbours in what the source is a reconstruction of, in the
representation itself, and in the codes."""
BETTER = {
    "fvu": "low",
    "neighbor_overlap": "high",
    "label_accuracy": "high",
    "nearest_cosine": "low",
    "duplicates": "low",
}


def shown(value: float, low: float, high: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    if pd.isna(value):
        return "-"
    return f"{value:{sign}.3f}" + ("" if pd.isna(low) else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per source: what it scores by labels and gene sets, and how far the SAE is above."""
    known = metrics[metrics["label"].isna()].set_index(["section", "metric", "source"])
    rows = []
    for source in metrics.loc[metrics["section"].isin(["labels", "gene_sets"]), "source"].unique():
        row = {"source": source}
        for title, place in (("label AUROC", ("labels", "auroc")), ("set AUROC", ("gene_sets", "best_column_auroc"))):
            empty = (*place, source) not in known.index
            found = pd.Series(dtype=float) if empty else known.loc[(*place, source)]
            interval = [found.get(name, float("nan")) for name in ("value", "ci_low", "ci_high")]
            difference = [found.get(name, float("nan")) for name in ("difference", "difference_low", "difference_high")]
            row |= {title: shown(*interval), f"SAE − it ({title.split()[0]})": shown(*difference, signed=True)}
            if title == "label AUROC":
                for name, metric in (("labels ≥ .9", "labels_at_0.9"), ("columns", "n_columns")):
                    row[name] = "-" if empty else f"{known.loc[('labels', metric, source), 'value']:.0f}"
        rows.append(row)
    return pd.DataFrame(rows)


def reconstructions(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per number that is of the reconstruction or the dictionary."""
    kept = metrics[metrics["section"].isin(["reconstruction", "sparsity", "fidelity", "dictionary"])]
    kept = kept[~kept["metric"].str.startswith("density")]
    kept = kept.assign(
        better=[BETTER.get("fvu" if name.startswith("fvu") else name, "") for name in kept["metric"]],
        value=[shown(*row) for row in kept[["value", "ci_low", "ci_high"]].to_numpy()],
        difference=[
            shown(*row, signed=True) for row in kept[["difference", "difference_low", "difference_high"]].to_numpy()
        ],
    )
    return kept[["metric", "better", "source", "value", "difference"]].rename(columns={"difference": "SAE − it"})


def evaluation(path: str | None, groupby: str, net: object, seed: int) -> None:
    adata = labels.cells(path)
    if path is None:
        sc.pp.pca(adata)
    sae.tl.fit(adata, rng=seed, progress=False)
    sae.tl.encode(adata, progress=False)
    start = time.perf_counter()
    sae.tl.evaluate(adata, groupby, net, model=sae.models.PCA(adata), min_size=MIN_SIZE, rng=seed)
    params, metrics = adata.uns["sae"]["params"], adata.uns["sae"]["metrics"].astype({"label": object})
    n_labels = metrics["label"].nunique()
    print(
        f"\n{'pbmc68k' if path is None else os.path.basename(path)}, seed {seed}: {adata.n_obs} cells, {n_labels} labels of {groupby}, "
        f"{params['n_features']} features, k {params['k']}, {time.perf_counter() - start:.0f} s"
    )
    print(SCORES)
    print(scores(metrics).to_string(index=False))
    print(KEPT)
    print(reconstructions(metrics).to_string(index=False), flush=True)


def labelled(text: str) -> tuple[str, str]:
    path, _, groupby = text.rpartition(":")
    return path, groupby


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["evaluation"], default="evaluation")
    parser.add_argument("--h5ad", type=labelled, action="append", default=[], metavar="FILE:GROUPBY")
    parser.add_argument("--net", help="a GMT file; by default sae.datasets.immune_markers()")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    sets = sae.datasets.immune_markers() if options.net is None else options.net
    for file, column in [(None, "bulk_labels"), *options.h5ad]:
        for number in range(options.seeds):
            evaluation(file, column, sets, SEED + number)
