"""Does turning up a feature do to progenitors, or to unstimulated cells, what biology does?

    python benchmarks/steering.py --h5ad marrow.h5ad --groupby cell_type --target Erythroid_late --start HSC,HSC_MPP,MEP_Mk_primed \\
        --genes erythroid --scvi marrow_scvi --scvi-genes scvi_gene --scvi-batch run
    python benchmarks/steering.py --h5ad kang.h5ad --groupby condition --target stim --start ctrl --genes interferon

The SAE is trained with default settings on all cells. The feature of the target label (highest AUROC) is chosen on one half of the cells; in
the other half, its activation is set in the starting cells to its mean in the target cells of the first half. Told are the AUROC of a list of
genes from the literature among all genes by how much they change, the share of the neighbours with the target label before and
after, and the share of the way to the target cells that is covered, beside random features that are active in a similar number of cells
(of SAEs of three seeds) and random directions, moved as far. The model is scVI (`--scvi`, a folder, or `train`), or the principal
components. Counts are normalised and log-transformed for the latter.
"""

from __future__ import annotations

import argparse
import warnings

import anndata as ad
import numpy as np
import scanpy as sc

import sae

GENES = {
    # Globins and their chaperone, enzymes and carriers of heme synthesis, biliverdin reductase, carbonic anhydrases of red cells.
    "erythroid": "HBA1 HBA2 HBB HBD HBG1 HBG2 HBM HBQ1 AHSP ALAS2 ALAD HMBS UROS UROD CPOX PPOX FECH SLC25A37 SLC25A38 TSPO2 ABCB6 "
    "ABCB10 FAM132B BLVRB CA1 CA2",
    # Genes that type I interferon induces in most cells.
    "interferon": "ISG15 ISG20 IFIT1 IFIT2 IFIT3 IFI6 IFI44 IFI44L IFI35 IFITM1 IFITM2 IFITM3 MX1 MX2 OAS1 OAS2 OAS3 OASL STAT1 IRF7 "
    "CXCL10 CXCL11 RSAD2 LY6E PLSCR1 EIF2AK2 HERC5 DDX58 XAF1 SAMD9 TRIM22 BST2 APOBEC3A TNFSF10",
}


def scvi_model(adata: ad.AnnData, options: argparse.Namespace):
    """Load or train scVI on the counts; its latent goes into `obsm["X_scVI"]`."""
    import scvi

    scvi.settings.verbosity = 40
    counts = adata[:, adata.var[options.scvi_genes]].copy() if options.scvi_genes else adata.copy()
    if options.scvi != "train":
        trained = scvi.model.SCVI.load(options.scvi, adata=counts)
    else:
        scvi.settings.seed = 0
        scvi.model.SCVI.setup_anndata(counts, batch_key=options.scvi_batch)
        trained = scvi.model.SCVI(counts, n_latent=20, gene_likelihood="nb")
        trained.train(200, accelerator="cpu", enable_progress_bar=False, logger=False, enable_model_summary=False)
    model = sae.models.SCVI(trained)
    adata.obsm["X_scVI"] = model.embed(counts)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--h5ad", required=True, help="cells with counts in X")
    parser.add_argument("--groupby", required=True)
    parser.add_argument("--target", required=True, help="label whose feature is turned up")
    parser.add_argument("--start", required=True, help="labels of the cells that are steered, separated by commas")
    parser.add_argument("--genes", choices=GENES, required=True, help="list of genes that should rise")
    parser.add_argument("--scvi", help="folder of a trained scVI model, or 'train'")
    parser.add_argument("--scvi-genes", help="column of var that marks its genes")
    parser.add_argument("--scvi-batch", help="column of obs with batches, to train it")
    parser.add_argument("--doses", default="0.5,1,2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="scvi|lightning|torch")

    adata = ad.read_h5ad(options.h5ad)
    model = scvi_model(adata, options) if options.scvi else None
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if model is None:
        sc.pp.pca(adata)
        model = sae.models.PCA(adata)
    rep = "X_scVI" if options.scvi else "X_pca"
    keys = ["sae", "seed_1", "seed_2"]
    for number, key in enumerate(keys):
        sae.tl.fit(adata, use_rep=rep, rng=options.seed + number, key_added=key, progress=False)
        sae.tl.encode(adata, key=key, progress=False)

    labels = adata.obs[options.groupby].astype(str)
    half = np.zeros(adata.n_obs, dtype=int)
    rng = np.random.default_rng(options.seed)
    for label in labels.unique():
        rows = rng.permutation(np.flatnonzero(labels == label))
        half[rows[::2]] = 1
    chosen_on, scored_on = adata[half == 0].copy(), adata[half == 1].copy()
    sae.tl.score_labels(chosen_on, options.groupby, progress=False)
    best = sae.get.labels(chosen_on, label=options.target).iloc[0]
    target = (chosen_on.obs[options.groupby] == options.target).to_numpy()
    value = float(sae.get.activations(chosen_on, best["feature"]).X[target].mean())
    start = scored_on.obs[options.groupby].isin(options.start.split(",")).to_numpy()
    sae.tl.steer(
        scored_on, best["feature"], model=model, value=value, doses=[float(dose) for dose in options.doses.split(",")],
        cells=start, groupby=options.groupby, net={options.genes: GENES[options.genes].split()}, n_controls=200,
        control_keys=keys[1:], progress=False,
    )  # fmt: skip

    doses, towards, controls, genes = (
        sae.get.steering(scored_on, table=table) for table in ("doses", "labels", "controls", "genes")
    )
    print(
        f"{best['feature']} of {adata.uns['sae']['params']['n_features']}, AUROC for {options.target} {best['auroc']:.3f} on the half that "
        f"chose it; set to {value:.2f} in {start.sum()} cells of the other half\n"
    )
    print("dose | measure | feature | random features | random directions | above features | above directions")
    for row in controls.itertuples():
        if row.measure in ("effect", "distance", "gene_set") or row.name == options.target:
            print(
                f"{row.dose:g} | {row.measure} {row.name} | {row.value:.3f} | {row.of_features:.3f} | {row.of_directions:.3f} | "
                f"{row.above_features:.3f} of {row.n_features} | {row.above_directions:.3f} of {row.n_directions}"
            )
    print(
        "\ndose | step | off the manifold (before) | cells | neighbours with the target label, before → after | way covered"
    )
    for row in towards[towards["towards"] == options.target].itertuples():
        dose = doses[doses["dose"] == row.dose].iloc[0]
        print(
            f"{row.dose:g} | {dose.step:.2f} | {dose.off_manifold:.2f} ({dose.off_manifold_before:.2f}) | {row.label} | "
            f"{row.before:.3f} → {row.after:.3f} | {row.closed:.2f}"
        )
    first = genes[
        (genes["dose"] == doses["dose"].iloc[len(doses) // 2]) & (genes["label"] == options.start.split(",")[0])
    ]
    print(f"\nrises most, in {options.start.split(',')[0]}: {' '.join(first['gene'].head(15))}")


if __name__ == "__main__":
    main()
