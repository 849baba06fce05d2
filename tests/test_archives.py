"""What earlier versions of the package wrote stays readable: a frozen file of every layout, in both formats."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import pytest
import zarr

import sae
from sae import _schema

FOLDER = Path(__file__).parent / "archives"
VERSIONS = range(1, _schema.SCHEMA_VERSION + 1)
GETTERS = {
    "params": {}, "features": {}, "history": {}, "genes": {}, "enrichment": {}, "labels": {}, "label_summary": {},
    "neighbors": {}, "modules": {}, "perturbation": {}, "metrics": {}, "stability": {}, "steering": {}, "sweep": {},
    "ablation": {"key_added": "X_pca_ablated"},
}  # fmt: skip


def read(name: str) -> ad.AnnData:
    path = FOLDER / name
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(zarr.storage.ZipStore(path, mode="r"))


def test_every_version_is_kept():
    kept = {path.name for path in FOLDER.glob("schema_*")}
    assert kept == {f"schema_{version}.{ending}" for version in VERSIONS for ending in ("h5ad", "zarr.zip")}


@pytest.fixture(params=[f"schema_{version}.{ending}" for version in VERSIONS for ending in ("h5ad", "zarr.zip")])
def archive(request):
    return read(request.param)


@pytest.mark.parametrize("getter", GETTERS)
def test_every_result_is_read(archive, getter):
    assert len(getattr(sae.get, getter)(archive, **GETTERS[getter]))


def test_both_formats_hold_the_same(compare):
    for version in VERSIONS:
        a, b = (read(f"schema_{version}.{ending}") for ending in ("h5ad", "zarr.zip"))
        compare.assert_same(a.uns["sae"], b.uns["sae"])
        compare.assert_same(a.obsm["sae"], b.obsm["sae"])


def test_the_model_goes_on(archive, compare):
    before = archive.obsm["sae"].copy()
    sae.tl.encode(archive, progress=False)
    # Kernels of another machine may add in another order.
    assert abs(before - archive.obsm["sae"]).max() < 1e-4
    sae.tl.rank_genes(archive, progress=False)
    sae.tl.enrich(archive, sae.datasets.immune_markers(), min_size=5, progress=False)
    sae.tl.score_labels(archive, "phase", progress=False)
    sae.tl.name_features(archive)
    assert len(sae.get.genes(archive)) and len(sae.get.enrichment(archive)) and len(sae.get.labels(archive))


def test_results_are_added_to_stored_ones(archive):
    sae.tl.score_labels(archive, "phase", progress=False)
    sae.tl.enrich(archive, sae.datasets.immune_markers(), collection="again", min_size=5, progress=False)
    assert set(sae.get.labels(archive)["groupby"]) == {"bulk_labels", "phase"}
    assert {"again", "immune_markers"} <= set(sae.get.enrichment(archive)["collection"])


def test_a_newer_layout_is_refused(archive):
    archive.uns["sae"]["schema_version"] = _schema.SCHEMA_VERSION + 1
    with pytest.raises(ValueError, match=r"schema version .* this version of sae reads up to .* Update sae"):
        sae.get.features(archive)
