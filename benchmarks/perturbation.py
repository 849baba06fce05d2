"""Do features respond to perturbations of known effect, do their genes include the target, and what happens without any effect?

    python benchmarks/perturbation.py --h5ad papalexi21.h5ad --groupby perturbation --control non-targeting --batch bio_rep \\
        --guides grna --expected IFNGR1,IFNGR2,JAK2,STAT1,IRF1 --sets hallmark.gmt --set HALLMARK_INTERFERON_GAMMA_RESPONSE
    python benchmarks/perturbation.py --h5ad kang18.h5ad --groupby condition --control ctrl --batch donor+cell_type \\
        --expected stim --raised --sets hallmark.gmt --set HALLMARK_INTERFERON_ALPHA_RESPONSE

Counts are normalised, log-transformed and reduced to 50 principal components (of 2,000 variable genes, if there are more).
`--without-targets` leaves the perturbed genes out of the components, but not out of the genes. `--batch` takes several columns,
joined by `+`. Without `--h5ad`, half of the B cells of 700 PBMC are "perturbed" in nothing.
"""

from __future__ import annotations

import argparse
import os
from itertools import combinations

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc

import sae

TOP = 5


def cells(path: str, groupby: str, without_targets: bool) -> ad.AnnData:
    adata = ad.read_h5ad(path)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > 2000:
        sc.pp.highly_variable_genes(adata, n_top_genes=2000)
    used = adata.var.get("highly_variable", pd.Series(True, adata.var_names)).copy()
    if without_targets:
        used &= ~adata.var_names.isin(adata.obs[groupby].unique())
    adata.var["used"] = used
    sc.pp.pca(adata, n_comps=50, mask_var="used")
    return adata


def found(adata: ad.AnnData, groupby: str, control, batch: str | None, **settings) -> dict[str, pd.DataFrame]:
    sae.tl.perturbation(adata, groupby, control, batch=batch, progress=False, **settings)
    tables = adata.uns["sae"]["perturbation"]
    return {name: table[table["groupby"] == groupby] for name, table in tables.items()}


def strongest(features: pd.DataFrame) -> dict[str, list[str]]:
    """The features of largest abs(z) of every perturbation, with a sign."""
    features = features.assign(size=features["score"].abs()).sort_values("size", ascending=False)
    return {
        str(label): [f"{'+' if row.score > 0 else '-'}{row.feature}" for row in part.head(TOP).itertuples()]
        for label, part in features.groupby("perturbation", observed=True)
    }


def overlap(lists: list[list[str]]) -> float:
    """Mean Jaccard index of pairs."""
    pairs = [(set(a), set(b)) for a, b in combinations(lists, 2)]
    return float(np.mean([len(a & b) / len(a | b) for a, b in pairs])) if pairs else float("nan")


def show(tables: dict[str, pd.DataFrame]) -> None:
    top, summary = strongest(tables["features"]), tables["summary"]
    strength = tables["features"].groupby("perturbation", observed=True)["score"].agg(lambda z: z.abs().max())
    summary = summary.assign(z=summary["perturbation"].map(strength).astype(float)).sort_values("z", ascending=False)
    print(
        "perturbation | cells | responding (permuted) | p | abs(z) | AUROC | features | target, rank, percentile, p, log2 fc"
    )
    for row in summary.itertuples():
        name, place = str(row.perturbation), "-"
        if row.target_status == "placed":
            place = f"{row.target} {row.target_rank:.0f} {row.target_percentile:.3f} p {row.target_pval:.2f} {row.target_log2fc:+.1f}"
        elif isinstance(row.target, str):
            place = f"{row.target}: {row.target_status}"
        print(
            f"{name} | {row.n_cells} | {row.n_responding} ({row.n_permuted:.1f}) | {row.pval:.3f} | {row.z:.1f} | "
            f"{row.best_auroc:.3f} | {' '.join(top.get(name, []))} | {place}"
        )
    row = tables["targets"].iloc[0]
    print(
        f"\n{row['n_targets']} targets placed: mean percentile {row['percentile']:.3f}, {row['expected']:.3f} for features of like "
        f"activity (p {row['pval_random']:.3f}), p with targets exchanged {row['pval_exchanged']:.3f}"
    )


def show_expected(
    adata, tables, groupby: str, expected: list[str], members: set[str], batch: str | None, first: str
) -> None:
    """What known perturbations share: features, and their genes in cells that have none of these perturbations."""
    top, rest = strongest(tables["features"]), adata[~adata.obs[groupby].isin(expected)].copy()
    others = [top[name] for name in top if name not in expected]
    print(
        f"\nTop {TOP} features, mean Jaccard of pairs: {overlap([top[name] for name in expected]):.2f} among the expected, "
        f"{overlap(others):.2f} among the others"
    )
    shared = pd.Series([name for label in expected for name in top[label]]).value_counts().head(TOP)
    measured = members & set(adata.var_names)
    print(f"{len(measured)} of {adata.n_vars} genes are in the set: {' '.join(sorted(measured))}")
    for where, part in (("all cells", adata), ("without these perturbations", rest)):
        sae.tl.rank_genes(part, n_genes=None, batch=batch, progress=False)
        for signed, count in shared.items():
            genes = sae.get.genes(part, signed[1:])
            # Turned round where needed, so that the genes which the perturbations lower, or raise, come first.
            listed = genes["gene"].iloc[:: 1 if signed[0] == first else -1].head(8).astype(str).tolist()
            shown = " ".join(f"{gene}*" if gene in measured else gene for gene in listed)
            print(f"{where} | {signed}, {count} of {len(expected)} | {len(measured & set(listed))} of 8 | {shown}")


def show_null(adata, groupby: str, control, batch: str | None, repeats: int) -> None:
    """What is found when labels are permuted (within batches)."""
    rng = np.random.default_rng(0)
    blocks = np.zeros(adata.n_obs, int) if batch is None else pd.factorize(adata.obs[batch])[0]
    labels, below, responding, total, padj = adata.obs[groupby].astype(str).to_numpy(), [], 0, 0, 0
    for seed in range(repeats):
        permuted = labels.copy()
        for block in np.unique(blocks):
            permuted[blocks == block] = rng.permutation(labels[blocks == block])
        adata.obs["permuted"] = permuted
        tables = found(adata, "permuted", control, batch, rng=seed, target=None)
        below.append((tables["features"]["pval"] < 0.05).mean())
        responding += (tables["summary"]["n_responding"] > 0).sum()
        padj += (tables["summary"]["padj"] <= 0.05).sum()
        total += len(tables["summary"])
    print(
        f"\nPermuted labels, {repeats} times: p < .05 for {np.mean(below):.4f} of tests ({min(below):.4f} to {max(below):.4f}); "
        f"a feature responds in {responding} of {total} perturbations; {padj} have padj ≤ .05"
    )


def show_guides(adata, groupby: str, control, guides: str, batch: str | None) -> None:
    """Each control guide against the other control guides: there is nothing to be found."""
    part = adata[adata.obs[groupby] == control].copy()
    part.obs[guides] = part.obs[guides].astype(str)
    names, rows = part.obs[guides].value_counts().index, []
    for name in names:
        tables = found(part, guides, [other for other in names if other != name], batch)
        row = tables["summary"].iloc[0]
        share = (tables["features"]["pval"] < 0.05).mean()
        rows.append(
            f"{name} {row['n_cells']} cells, {row['n_responding']} features, p {row['pval']:.3f}, p < .05 {share:.3f}"
        )
    print("\nControl guides against each other:\n" + "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", help="counts with perturbations")
    parser.add_argument("--groupby", default="perturbation")
    parser.add_argument("--control", default="control")
    parser.add_argument("--batch", help="column of batches, or several joined by +")
    parser.add_argument("--guides", help="column of guides, to compare control guides with each other")
    parser.add_argument("--expected", help="perturbations that share an effect, separated by commas")
    parser.add_argument("--sets", help="GMT file")
    parser.add_argument("--set", help="the set in it that the shared effect is on")
    parser.add_argument(
        "--raised", action="store_true", help="the shared effect raises genes (by default it lowers them)"
    )
    parser.add_argument("--without-targets", action="store_true", help="leave the targets out of the components")
    parser.add_argument("--permutations", type=int, default=5, help="of all labels, for the last table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    groupby, control, batch = options.groupby, options.control, options.batch
    if options.h5ad is None:
        adata = sae.datasets.pbmc68k()
        half = np.arange(adata.n_obs) % 2 == 0
        adata.obs[groupby] = np.where(half & (adata.obs["bulk_labels"] == "CD19+ B"), "nothing", control)
        adata = adata[adata.obs["bulk_labels"] == "CD19+ B"].copy()
    else:
        adata = cells(options.h5ad, groupby, options.without_targets)
    if batch is not None and "+" in batch:
        columns = batch.split("+")
        adata.obs[batch] = adata.obs[columns].astype(str).agg(" ".join, axis=1)
    sae.tl.fit(adata, rng=options.seed, progress=False)
    sae.tl.encode(adata, progress=False)
    tables = found(adata, groupby, control, batch)
    density = sae.get.features(adata)["density"]
    print(
        f"{adata.n_obs:,} cells × {adata.n_vars:,} genes, {len(density)} features, {(density == 0).mean():.1%} dead, half of "
        f"them in fewer than {density.median():.2%} of the cells\n"
    )
    show(tables)
    if options.expected:
        net = sae.io.read_gmt(options.sets)
        members = set(net.loc[net["source"] == options.set, "target"])
        show_expected(
            adata, tables, groupby, options.expected.split(","), members, batch, "+" if options.raised else "-"
        )
    show_null(adata, groupby, control, batch, options.permutations)
    if options.guides:
        show_guides(adata, groupby, control, options.guides, batch)


if __name__ == "__main__":
    main()
