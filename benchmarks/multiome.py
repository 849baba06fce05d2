"""Cells with RNA and ATAC: what are the features of a joint embedding, in genes and in peaks, and do the two agree?

    python benchmarks/multiome.py --h5mu multiome.h5mu --groupby cell_type --sets hallmark.gmt
    python benchmarks/multiome.py --h5mu multiome.h5mu --groupby cell_type --sets reactome.gmt --genes gencode.gtf.gz

The modalities `rna` and `atac` hold counts. RNA is log-normalised and reduced to principal components; peaks are TF-IDF transformed and reduced
by a singular value decomposition, without the component that is the depth of a cell. Both are brought to one scale and joined. For each
label, the feature with the highest AUROC on cells that did not choose it is told by its best genes, peaks and gene sets. `--genes` (a GTF
file, or a table with tabs) says where the genes are: then peaks are named by their first gene, gene sets are tested on
accessibility, and t statistics of genes are compared between RNA and ATAC. The last table repeats everything with the features of each
cell given to another one, and with random gene sets.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import mudata
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

import sae
from sae.core.null import permuted_cells

N_COMPONENTS, N_LISTED = 20, 6
CLEAR = 3.0
"""Absolute t of genes whose direction is compared."""


def components(mdata: mudata.MuData, seed: int) -> np.ndarray:
    """Normalise both modalities in place, and return their joint embedding."""
    rna, atac = mdata["rna"], mdata["atac"]
    counts = sparse.csr_matrix(atac.X, dtype=np.float64)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    is_open = np.maximum(np.asarray((counts > 0).sum(axis=0)).ravel(), 1)
    weighted = sparse.diags_array(1e4 / depth) @ counts @ sparse.diags_array(counts.shape[0] / is_open)
    latent = TruncatedSVD(N_COMPONENTS + 1, random_state=seed).fit_transform(sparse.csr_matrix(weighted).log1p())
    of_depth = [abs(np.corrcoef(column, np.log(depth))[0, 1]) for column in latent.T]
    print(f"the component that is the depth: {np.argmax(of_depth)} (|r| = {max(of_depth):.2f})")
    latent = np.delete(latent, np.argmax(of_depth), axis=1)
    for adata in (rna, atac):
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    if rna.n_vars > 2000:
        sc.pp.highly_variable_genes(rna, n_top_genes=2000)
    sc.pp.pca(rna, n_comps=N_COMPONENTS, random_state=seed)
    parts = (rna.obsm["X_pca"], pd.DataFrame(latent, atac.obs_names).loc[rna.obs_names].to_numpy())
    return np.hstack([part / part.std() for part in parts]).astype(np.float32)


def gene_places(path: str) -> pd.DataFrame | Path:
    return Path(path) if ".gtf" in Path(path).name else pd.read_csv(path, sep="\t")


def meaning(mdata: mudata.MuData, feature: str, first_gene: dict[str, str]) -> str:
    """Its best genes, peaks and gene sets."""
    best = {"direction": "up", "max_padj": 0.05}
    genes, peaks = (
        sae.get.genes(mdata, feature, modality=name, n=N_LISTED, **best)["gene"].tolist() for name in ("rna", "atac")
    )
    named = [f"{peak} ({first_gene[peak]})" if peak in first_gene else peak for peak in peaks]
    sets = sae.get.enrichment(mdata, feature, redundant=False, n=2, **best)
    listed = [
        f"{row.gene_set} ({row.modality}, {row.padj:.0e}{'' if row.fdr <= 0.05 else '*'})" for row in sets.itertuples()
    ]
    return " | ".join(" ".join(part) or "-" for part in (genes, named)) + " | " + ("; ".join(listed) or "-")


def statistics(mdata: mudata.MuData, modality: str) -> pd.DataFrame:
    """The t statistic of every gene or peak (columns) for every feature."""
    table = sae.get.genes(mdata, modality=modality).astype({"feature": str, "gene": str})
    return table.pivot(index="feature", columns="gene", values="score")


def agreement(mdata: mudata.MuData, pairs: pd.DataFrame, seed: int) -> None:
    """Compare the t of each gene's RNA with the mean t of its peaks, over all features; then with genes exchanged."""
    rna, peaks = statistics(mdata, "rna"), statistics(mdata, "atac")
    pairs = pairs[pairs["gene"].isin(rna.columns) & pairs["peak"].isin(peaks.columns)]
    of_genes = pd.DataFrame({gene: peaks[part["peak"]].mean(axis=1) for gene, part in pairs.groupby("gene")})
    features = rna.index.intersection(of_genes.index)
    a, b = (table.loc[features, of_genes.columns] for table in (rna, of_genes))
    order = np.random.default_rng(seed).permutation(len(of_genes.columns))
    print(
        f"\n{len(of_genes.columns)} genes with RNA and a peak, {len(features)} features; pairs with |t| > {CLEAR:g} in both that agree in sign:"
    )
    for name, other in (("the same gene", b.to_numpy()), ("another gene", b.to_numpy()[:, order])):
        clear = (np.abs(a.to_numpy()) > CLEAR) & (np.abs(other) > CLEAR)
        same = np.sign(a.to_numpy())[clear] == np.sign(other)[clear]
        print(f"  {name}: {same.sum()} of {clear.sum()}")


def enrich(mdata: mudata.MuData, options: argparse.Namespace, pairs: pd.DataFrame | None, seed: int) -> None:
    for modality, given in {"rna": None, **({} if pairs is None else {"atac": pairs})}.items():
        sae.tl.enrich(
            mdata,
            options.sets,
            var_mod=modality,
            var_to_gene=given,
            method=options.method,
            n_null=5,
            rng=seed,
            progress=False,
        )


def calibration(mdata: mudata.MuData, options: argparse.Namespace, pairs: pd.DataFrame | None) -> None:
    """Give the features of each cell to another cell, and count what is found."""
    found = []
    for run in range(options.permutations + 1):
        if run:
            mdata.obsm["sae"] = permuted_cells(mdata.obsm["sae"], rng=run)
            for modality in ("rna", "atac"):
                sae.tl.rank_genes(mdata, var_mod=modality, n_genes=None, progress=False)
            enrich(mdata, options, pairs, run)
        genes = sae.get.genes(mdata).groupby("modality", observed=True)
        null = mdata.uns["sae"]["enrichment_null"].set_index("modality")
        for modality, table in genes:
            row = {"cells": "permuted" if run else "as they are", "modality": modality}
            row |= {"genes or peaks with p < .05": (table["pval"] < 0.05).mean()}
            row |= {"with padj < .05": (table["padj"] < 0.05).mean()}
            if modality in null.index:
                shares = null.loc[modality, ["annotated", "annotated_random_sets", "annotated_fdr"]]
                row |= dict(zip(("features with a set", "with a random set", "by fdr"), shares, strict=True))
            found.append(row)
    table = pd.DataFrame(found).groupby(["cells", "modality"], observed=True).mean()
    print(f"\nshares, {options.permutations} permutations\n{table.round(4).T.to_string()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5mu", required=True)
    parser.add_argument("--groupby", default="cell_type")
    parser.add_argument("--sets", required=True, help="GMT file")
    parser.add_argument(
        "--genes", help="where the genes are: a GTF file, or a table with chrom, start, end, strand and gene"
    )
    parser.add_argument("--max-distance", type=int, default=0, help="of peaks outside of genes")
    parser.add_argument("--method", default="ora")
    parser.add_argument("--permutations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    mudata.set_options(pull_on_update=False)
    mdata = mudata.read_h5mu(options.h5mu)
    mdata.obsm["X_joint"] = components(mdata, options.seed)
    pairs, first_gene = None, {}
    if options.genes:
        sc.settings.verbosity = "info"
        pairs = sae.tl.peaks_to_genes(
            mdata, gene_places(options.genes), var_mod="atac", max_distance=options.max_distance
        )
        sc.settings.verbosity = "warning"
        first_gene = pairs.drop_duplicates("peak").set_index("peak")["gene"].to_dict()

    sae.tl.fit(mdata, use_rep="X_joint", rng=options.seed, progress=False)
    sae.tl.encode(mdata, progress=False)
    sae.tl.score_labels(mdata, options.groupby, progress=False)
    for modality in ("rna", "atac"):
        sae.tl.rank_genes(mdata, var_mod=modality, n_genes=None, progress=False)
    enrich(mdata, options, pairs, options.seed)
    params = mdata.uns["sae"]["params"]
    print(
        f"{mdata.n_obs:,} cells, {mdata['rna'].n_vars:,} genes, {mdata['atac'].n_vars:,} peaks, {params['n_features']} features, "
        f"FVU {params['fvu']:.3f} (held out {params['val_fvu']:.3f})\n"
    )
    print("label | cells | feature | AUROC, held out | genes | peaks | gene sets (modality, adjusted p; * fdr > .05)")
    for row in sae.get.label_summary(mdata, source="feature").itertuples():
        told = meaning(mdata, row.selected, first_gene)
        print(f"{row.label} | {row.n_cells} | {row.selected} | {row.held_out_auroc:.3f} | {told}")
    if pairs is not None:
        agreement(mdata, pairs, options.seed)
    calibration(mdata, options, pairs)


if __name__ == "__main__":
    main()
