from __future__ import annotations

import anndata as ad


def pbmc68k() -> ad.AnnData:
    """700 peripheral blood mononuclear cells that come with Scanpy, with log-normalised expression in `X`.

    A sample of the 68,579 PBMC of Zheng et al. 2017, doi:10.1038/ncomms14049 (10x Genomics), restricted to 765 variable
    genes. Scanpy's own object (:func:`scanpy.datasets.pbmc68k_reduced`) has scaled values in `X` and the log-normalised
    ones in `.raw`; here the latter are `X` and there is no `.raw`.

    Returns
    -------
    700 × 765, natural log1p of normalised counts (CSR), with `obs["bulk_labels"]` (ten cell types, from 240 down to 8
    cells), `obsm["X_pca"]` (50, of the scaled values), `obsm["X_umap"]`.

    Examples
    --------
    >>> import sae
    >>> sae.datasets.pbmc68k().shape
    (700, 765)
    """
    import scanpy as sc

    scaled = sc.datasets.pbmc68k_reduced()
    adata = scaled.raw.to_adata()
    adata.varm["PCs"] = scaled.varm["PCs"]
    adata.uns["log1p"] = {"base": None}
    del adata.uns["rank_genes_groups"]
    return adata
