"""What is in the file, read back without a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import sae
from sae.report import _contents, report


class Page:
    """A report, unpacked."""

    def __init__(self, path: Path):
        self.text = path.read_text("utf-8")
        blobs = re.findall(r'<script type="text/plain" id="data-(\w+)">([A-Za-z0-9+/=]*)</script>', self.text)
        self.blobs = {name: gzip.decompress(base64.b64decode(content)) for name, content in blobs}
        self.main = json.loads(self.blobs["main"])
        self.blocks = [
            json.loads(self.blobs[f"block{i}"]) for i in range(-(-len(self.main["names"]) // self.main["block"]))
        ]
        self.columns = {column["key"]: column for column in self.main["columns"]}

    def column(self, key: str) -> list:
        """The values of a column of the large table, texts as texts."""
        values = self.columns[key]["values"]
        return [self.text_of(value) for value in values] if self.columns[key]["form"] == "text" else values

    def text_of(self, number: int) -> str | None:
        return self.main["pool"][number] if number >= 0 else None

    def rows(self, title: str, feature: str) -> pd.DataFrame:
        """A table of a card."""
        specs = self.main["tables"]
        t = [spec["title"] for spec in specs].index(title)
        block, i = divmod(self.main["names"].index(feature), self.main["block"])
        part = self.blocks[block]["tables"][t]
        begin, end = part["start"][i : i + 2]
        found = {}
        for spec, values in zip(specs[t]["columns"], part["values"], strict=True):
            read = {"text": self.text_of, "feature": self.main["names"].__getitem__}.get(
                spec["form"], lambda value: value
            )
            if spec["form"] == "list":
                read = lambda numbers: [self.text_of(number) for number in numbers]
            found[spec["title"]] = [read(value) for value in values[begin:end]]
        return pd.DataFrame(found)

    @property
    def notices(self) -> str:
        return " ".join(re.findall(r"<li>(.*?)</li>", self.text))


def test_it_returns_the_path_and_takes_text(archived, tmp_path):
    assert report(archived, tmp_path / "a.html") == tmp_path / "a.html"
    assert report(archived, str(tmp_path / "b.html")) == tmp_path / "b.html"
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_the_data_stay_as_they_were(archived, tmp_path, compare):
    before = compare.state(archived)
    report(archived, tmp_path / "page.html")
    compare.assert_same(before, compare.state(archived))


def test_the_large_table_is_that_of_the_features(archived, tmp_path):
    page = Page(report(archived, tmp_path / "page.html"))
    features = sae.get.features(archived)
    assert page.main["names"] == features.index.tolist()
    for name in ("n_cells", "density", "mean", "max", "bulk_labels_auroc", "stability"):
        np.testing.assert_allclose(np.array(page.column(name), dtype=float), features[name], rtol=1e-3)
    for name in ("name", "bulk_labels_label", "phase_label", "bulk_labels_scope"):
        assert page.column(name) == [None if pd.isna(text) else text for text in features[name]]
    shown = [key for key, column in page.columns.items() if column["shown"]]
    assert shown[:5] == ["name", "n_cells", "density", "bulk_labels_label", "bulk_labels_auroc"]
    assert {"gene_set", "set_padj", "top_genes", "stability"} <= set(shown) and "name_from" not in shown
    assert page.main["dead"] == np.flatnonzero(features["dead"]).tolist()
    assert page.notices == ""


def test_the_best_gene_set_and_genes_are_significant_and_raised(archived, tmp_path):
    page = Page(report(archived, tmp_path / "page.html"))
    for i, feature in enumerate(page.main["names"]):
        sets = sae.get.enrichment(archived, feature, direction="up", max_padj=0.05, max_fdr=0.05)
        assert page.column("gene_set")[i] == (None if sets.empty else sets["gene_set"].iloc[0])
        assert [page.text_of(j) for j in page.main["sets"][i]] == sets["gene_set"].tolist()
        genes = sae.get.genes(archived, feature, direction="up", max_padj=0.05, n=4)["gene"].tolist()
        assert [page.text_of(j) for j in page.columns["top_genes"]["values"][i]] == genes


def test_short_cards_leave_the_large_table_as_it_is(archived, tmp_path):
    long, short = (Page(report(archived, tmp_path / "page.html", n_genes=n, n_sets=n)) for n in (15, 1))
    for name in ("top_genes", "gene_set"):
        listed = [
            [page.text_of(i) for i in np.hstack(page.columns[name]["values"]).astype(int)] for page in (long, short)
        ]
        assert listed[0] == listed[1]


def test_infinite_and_unknown_numbers(archived, tmp_path):
    genes = archived.uns["sae"]["genes"]
    first = genes.index[genes["feature"] == "sae_7"]
    genes.loc[first[:2], "score"] = np.inf
    genes.loc[first[:1], ["log2fc", "padj"]] = -np.inf, np.nan
    found = Page(report(archived, tmp_path / "page.html")).rows("Genes up", "sae_7").iloc[:2]
    largest = np.finfo(float).max
    assert found["score"].tolist() == [largest, largest]
    assert found["log2 fc"].iloc[0] == -largest and pd.isna(found["padj"].iloc[0])


def test_columns_of_ones_own(archived, tmp_path):
    archived.uns["sae"]["features"] = archived.uns["sae"]["features"].assign(
        whole=pd.array([1, None, 3] * 8, dtype="Int64"),
        flag=pd.array([True, None, False] * 8, dtype="boolean"),
        part=pd.array([0.5, None, 2] * 8, dtype="Float64"),
    )
    page = Page(report(archived, tmp_path / "page.html"))
    found = {name: page.column(name)[:3] for name in ("whole", "flag", "part")}
    assert found == {"whole": [1, None, 3], "flag": ["yes", None, "no"], "part": [0.5, None, 2]}


def test_labels_that_are_too_many_to_write(archived, tmp_path, monkeypatch):
    monkeypatch.setattr(_contents, "MOST_NAMED", 5)
    page = Page(report(archived, tmp_path / "page.html"))
    assert list(page.main["cells"]["labels"]) == ["phase"]
    assert page.notices == "Labels of bulk_labels are not written on the maps: there are more than 5."
    assert {"bulk_labels", "phase"} <= {spec["title"] for spec in page.main["tables"]}


def test_one_cell_or_none(archived, tmp_path):
    page = Page(report(archived[:1].copy(), tmp_path / "page.html"))
    assert page.main["n_cells"] == page.main["cells"]["n"] == 1
    with pytest.raises(ValueError, match="There are no cells"):
        report(archived[:0].copy(), tmp_path / "none.html")


@pytest.mark.parametrize("feature", ["sae_0", "sae_7", "sae_20"])
def test_the_cards_have_the_rows_of_get(archived, tmp_path, feature):
    page = Page(report(archived, tmp_path / "page.html", n_genes=7, n_sets=3))
    for title, direction in (("Genes up", "up"), ("Genes down", "down")):
        genes = sae.get.genes(archived, feature, direction=direction, n=7)
        found = page.rows(title, feature)
        assert found["gene"].tolist() == genes["gene"].tolist()
        np.testing.assert_allclose(found[["score", "log2 fc", "padj"]], genes[["score", "log2fc", "padj"]], rtol=1e-3)
    for direction in ("up", "down"):
        sets = sae.get.enrichment(archived, feature, direction=direction, redundant=False, n=3)
        found = page.rows(f"Gene sets {direction}", feature)
        assert found["gene set"].tolist() == sets["gene_set"].tolist()
        assert found["genes"].tolist() == [genes.split(";")[:8] if genes else [] for genes in sets["genes"]]
        assert found["overlap"].tolist() == sets["overlap"].tolist()
    labels = sae.get.labels(archived, feature, groupby="bulk_labels", n=6)
    assert page.rows("bulk_labels", feature)["label"].tolist() == labels["label"].tolist()
    found = page.rows("Perturbations", feature)
    expected = sae.get.perturbation(archived, feature).head(10)
    assert found["perturbation"].tolist() == expected["perturbation"].tolist()
    assert found["responds"].tolist() == ["yes" if responds else "no" for responds in expected["responds"]]


def test_histograms_count_all_active_cells(archived, tmp_path):
    page = Page(report(archived, tmp_path / "page.html", max_cells=10))
    counts = np.concatenate([block["histogram"] for block in page.blocks]).sum(axis=1)
    assert counts.tolist() == sae.get.features(archived)["n_cells"].tolist()


def test_the_map_has_every_cell_and_its_activation(archived, tmp_path, decode):
    page = Page(report(archived, tmp_path / "page.html"))
    n = page.main["cells"]["n"]
    assert n == archived.n_obs and page.main["cells"]["axes"] == ["UMAP1", "UMAP2"]
    xy = decode.cells(page.blobs["cells"], n)
    umap = archived.obsm["X_umap"]
    scaled = (umap - umap.min(axis=0)) / np.ptp(umap, axis=0) * 4095
    a = archived.obsm["sae"].toarray()
    for j, (places, levels) in enumerate(decode.points(page.blobs["points0"], a.shape[1])):
        active = np.flatnonzero(a[:, j])
        drawn = np.column_stack([xy[places], levels])
        expected = np.column_stack([scaled[active], a[active, j] / a[:, j].max() * 255]) if len(active) else drawn
        drawn, expected = (part[np.lexsort(np.rint(part.T[:2]))] for part in (drawn, expected))
        np.testing.assert_allclose(drawn, expected, atol=1)
    for name, x, y in page.main["cells"]["labels"]["bulk_labels"]:
        cells = (archived.obs["bulk_labels"] == page.text_of(name)).to_numpy()
        np.testing.assert_allclose([x, y], np.median(scaled[cells], axis=0), atol=1)


def test_the_facts(archived, tmp_path):
    text = report(archived, tmp_path / "page.html").read_text("utf-8")
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    params, encoded = sae.get.params(archived), sae.get.params(archived, encoded=True)
    assert facts["SAE"] == "sae (matryoshka, k 6)" and facts["trained on"] == "X_pca, 350 cells"
    assert facts["features"] == "24 (1 dead)" and facts["cells"] == "350" and facts["genes"] == "250"
    assert facts["FVU"] == f"{encoded['fvu']:.3g} (held out in training: {params['val_fvu']:.3g})"
    assert facts["L0"].startswith(f"{encoded['l0']:.3g} ") and facts["written with"] == f"sae {sae.__version__}"


def test_only_fit_and_encode(encoded, tmp_path):
    page = Page(report(encoded, tmp_path / "page.html"))
    assert [key for key, column in page.columns.items() if column["shown"]] == [
        "name",
        "n_cells",
        "density",
        "mean",
        "max",
    ]
    assert [spec["title"] for spec in page.main["tables"]] == ["Similar features"]
    assert page.main["cells"]["labels"] == {}


def test_without_the_map_of_features_similar_ones_are_those_active_in_the_same_cells(encoded, tmp_path):
    page = Page(report(encoded, tmp_path / "page.html"))
    a = encoded.obsm["sae"].toarray()
    cosine = a.T @ a / np.maximum(np.outer(np.linalg.norm(a, axis=0), np.linalg.norm(a, axis=0)), 1e-30)
    np.fill_diagonal(cosine, -1)
    found = page.rows("Similar features", "sae_3")
    np.testing.assert_allclose(found["similarity"], -np.sort(-cosine[3])[: len(found)], rtol=1e-3)
    assert found["feature"].iloc[0] == f"sae_{cosine[3].argmax()}"


def test_the_map_of_features(encoded, tmp_path):
    sae.tl.feature_map(encoded)
    page = Page(report(encoded, tmp_path / "page.html"))
    features = sae.get.features(encoded)
    for axis in "xy":
        np.testing.assert_allclose(np.array(page.main["map"][axis], dtype=float), features[f"map_{axis}"], rtol=1e-3)
    assert page.columns["module"]["shown"] and not {"map_x", "map_y"} & set(page.columns)
    expected = sae.get.neighbors(encoded, "sae_3", n=8)
    found = page.rows("Similar features", "sae_3")
    assert found["feature"].tolist() == expected["neighbor"].tolist()
    np.testing.assert_allclose(found["similarity"], expected["similarity"], rtol=1e-3)


def test_before_encode(fitted, tmp_path):
    with pytest.raises(KeyError, match="Run sae.tl.encode"):
        report(fitted, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_some_features(archived, tmp_path):
    archived.uns["sae"] = {name: stored for name, stored in archived.uns["sae"].items() if name != "feature_map"}
    page = Page(report(archived, tmp_path / "page.html", features=["sae_7", 2]))
    assert page.main["names"] == ["sae_7", "sae_2"] and "2 of 24 features were asked for" in page.notices
    assert page.column("name") == sae.get.features(archived)["name"][["sae_7", "sae_2"]].tolist()
    assert page.rows("Similar features", "sae_7")["feature"].tolist() == ["sae_2"]
    for feature in ("sae_7", "sae_2"):
        genes = sae.get.genes(archived, feature, direction="up", n=15)["gene"].tolist()
        assert page.rows("Genes up", feature)["gene"].tolist() == genes
    with pytest.raises(KeyError, match="There is no feature 'sae_99'"):
        report(archived, tmp_path / "page.html", features=["sae_99"])


def test_several_blocks(archived, tmp_path, monkeypatch, decode):
    whole = Page(report(archived, tmp_path / "whole.html"))
    monkeypatch.setattr(_contents, "BLOCK", 7)
    parts = Page(report(archived, tmp_path / "parts.html"))
    assert len(parts.blocks) == 4
    for feature in whole.main["names"]:
        for spec in whole.main["tables"]:
            pd.testing.assert_frame_equal(parts.rows(spec["title"], feature), whole.rows(spec["title"], feature))
    points = [decode.points(parts.blobs[f"points{i}"], n) for i, n in enumerate([7, 7, 7, 3])]
    assert sum(points, []) == decode.points(whole.blobs["points0"], 24)


def test_basis(archived, tmp_path):
    archived.obsm["X_tsne"] = archived.obsm["X_umap"].copy()
    archived.obsm["X_draw"] = archived.obsm["X_umap"][:, ::-1].copy()
    assert Page(report(archived, tmp_path / "page.html", basis="draw")).main["cells"]["axes"] == ["DRAW1", "DRAW2"]
    del archived.obsm["X_umap"]
    assert Page(report(archived, tmp_path / "page.html")).main["cells"]["axes"] == ["TSNE1", "TSNE2"]
    with pytest.raises(KeyError, match="adata.obsm has no 'umap' or 'X_umap'; it has"):
        report(archived, tmp_path / "other.html", basis="umap")
    del archived.obsm["X_tsne"]
    page = Page(report(archived, tmp_path / "page.html"))
    assert page.main["cells"] is None and not [name for name in page.blobs if name.startswith(("cells", "points"))]
    assert "neither a UMAP nor a t-SNE" in page.notices
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize("n_missing", [10, 350])
def test_cells_without_coordinates(archived, tmp_path, n_missing, decode):
    archived.obsm["X_umap"][:n_missing] = np.nan
    page = Page(report(archived, tmp_path / "page.html"))
    assert page.main["cells"]["n"] == 350 - n_missing
    assert f"{n_missing} of 350 cells have no coordinates" in page.notices
    points = decode.points(page.blobs["points0"], 24)
    assert sum(len(places) for places, _ in points) == archived.obsm["sae"][n_missing:].nnz


def test_what_is_left_out_is_said(archived, tmp_path, monkeypatch, decode):
    page = Page(report(archived, tmp_path / "page.html", max_cells=100))
    assert page.main["cells"]["n"] == 100 and "The maps draw 100 of 350 cells" in page.notices
    monkeypatch.setattr(_contents, "MOST_POINTS", 500)
    monkeypatch.setattr(_contents, "MOST_CELLS", 40)
    page = Page(report(archived, tmp_path / "page.html"))
    counts = [len(places) for places, _ in decode.points(page.blobs["points0"], 24)]
    n_cells = sae.get.features(archived)["n_cells"]
    assert counts == np.minimum(n_cells, 40).tolist()
    assert f"Of {(n_cells > 40).sum()} features only cells among the 40 most active" in page.notices


def test_a_modality_and_a_joint_embedding(make_mudata, tmp_path):
    mdata = make_mudata()
    mdata["rna"].obsm["X_umap"] = mdata["rna"].obsm["X_pca"][:, :2].copy()
    sae.tl.fit(mdata, mod="rna", n_features=16, steps=50, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.rank_genes(mdata, mod="rna", min_cells=3)
    sae.tl.rank_genes(mdata, mod="rna", var_mod="adt", min_cells=3)
    page = Page(report(mdata, tmp_path / "page.html", mod="rna"))
    assert page.main["cells"]["n"] == 80
    modalities = sae.get.genes(mdata, mod="rna")["modality"].unique()
    assert set(page.rows("Genes up", "sae_0").get("modality", [])) <= set(modalities)
    with pytest.raises(KeyError, match="Modalities with an SAE: 'rna'"):
        report(mdata, tmp_path / "other.html")

    sae.tl.fit(mdata, use_rep="X_joint", n_features=16, steps=50, key_added="joint", progress=False)
    sae.tl.encode(mdata, key="joint")
    page = Page(report(mdata, tmp_path / "page.html", key="joint", basis="X_joint"))
    assert page.main["names"][0] == "joint_0" and page.main["cells"]["n"] == 80


def test_no_text_of_the_data_is_in_the_page_as_it_is(archived, tmp_path):
    hostile = "</script><!--<script>alert(1)</script>"
    archived.obs["bulk_labels"] = archived.obs["bulk_labels"].cat.rename_categories({"CD19+ B": hostile})
    for table in ("labels", "genes", "enrichment"):
        stored = archived.uns["sae"][table]
        column = {"labels": "label", "genes": "gene", "enrichment": "gene_set"}[table]
        archived.uns["sae"][table] = stored.assign(
            **{column: stored[column].cat.rename_categories({stored[column].cat.categories[0]: hostile})}
        )
    page = Page(report(archived, tmp_path / "page.html"))
    assert hostile in page.main["pool"] and "alert(1)" not in page.text


def test_the_key_is_escaped(pbmc, tmp_path):
    key = "<img src=x onerror=alert(1)>\"'&"
    sae.tl.fit(pbmc, n_features=8, steps=20, key_added=key, progress=False)
    sae.tl.encode(pbmc, key=key)
    page = Page(report(pbmc, tmp_path / "page.html", key=key))
    assert "<img" not in page.text and "&lt;img src=x onerror=alert(1)&gt;" in page.text
    assert page.main["key"] == key


def test_the_page_may_only_run_its_own_script(archived, tmp_path):
    text = report(archived, tmp_path / "page.html").read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text).group(1)
    assert policy.startswith("default-src 'none'; ")
    for element, source in (("script", "script-src"), ("style", "style-src")):
        content = re.search(f"<{element}>(.*?)</{element}>", text, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}'" in policy.replace("&#39;", "'")
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org)|url\(|@import|innerHTML", text)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (".", IsADirectoryError, "is a folder. Pass the name of a file in it, such as"),
        ("missing/page.html", FileNotFoundError, "There is no folder .*missing. Make it first"),
    ],
)
def test_paths_that_cannot_be_written(archived, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        report(archived, tmp_path / name)


@pytest.mark.parametrize("option", ["n_genes", "n_sets", "max_cells"])
def test_counts_below_one(archived, tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}=0 is below 1"):
        report(archived, tmp_path / "page.html", **{option: 0})


def test_a_failed_run_leaves_the_older_file(archived, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("older")

    def fail(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        report(archived, path)
    assert path.read_text() == "older" and [found.name for found in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_permissions_are_those_of_other_new_files_and_of_the_one_replaced(archived, tmp_path):
    other = tmp_path / "other"
    other.touch()
    path = report(archived, tmp_path / "page.html")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o640)
    assert stat.S_IMODE(report(archived, path).stat().st_mode) == 0o640
