from __future__ import annotations

from sae.demo import main


def test_demo_writes_everything(tmp_path, capsys):
    main(["--out", str(tmp_path / "out"), "--groupby", "bulk_labels"])
    written = {path.name for path in (tmp_path / "out").iterdir()}
    tables = {"features.csv", "genes.csv", "enrichment.csv", "labels.csv", "history.csv", "summary.csv"}
    figures = {"enrichment.png", "feature_card.png", "feature_map.png", "feature_umap.png", "history.png"}
    assert written == tables | figures | {"adata.h5ad", "report.html"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("B cell", "NK cell", "CD16+ monocyte"))
