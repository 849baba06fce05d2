from __future__ import annotations

import anndata as ad

import sae
from sae.demo import main


def test_demo_writes_everything(tmp_path, capsys):
    main(["--out", str(tmp_path / "out"), "--groupby", "bulk_labels"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"features.csv", "genes.csv", "enrichment.csv", "labels.csv", "history.csv", "summary.csv"}
    figures = {"enrichment.png", "feature_card.png", "feature_map.png", "feature_umap.png", "history.png"}
    assert written == tables | figures | {"adata.h5ad", "report.html"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("B cell", "NK cell", "CD16+ monocyte"))


def test_demo_of_counts_without_an_embedding(tmp_path, capsys):
    adata = sae.datasets.simulate_differentiation(300, 300)
    counts = ad.AnnData(adata.layers["counts"], obs=adata.obs[["cell_type"]], var=adata.var[[]])
    counts.write_h5ad(tmp_path / "cells.h5ad")
    main(["--h5ad", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "out")])
    assert "50 principal components are computed" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adata.h5ad", "summary.csv", "report.html"} <= written
    assert "feature_umap.png" not in written, "there is no UMAP to draw on"
