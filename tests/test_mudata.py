"""Cells with several modalities, through every verb: a made-up multiome, and real ones where the shared data is at hand."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from scipy import sparse

import sae
from sae.tl._peaks_to_genes import peaks_to_genes

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
N, PROGRAMS, GENES, PEAKS = 300, 4, 15, 2
"""Cells, programmes, genes of a programme, and peaks of a gene."""


@dataclass(frozen=True)
class Multiome:
    """Cells whose programmes open the peaks of the genes that they express."""

    mdata: mudata.MuData
    genes: pd.DataFrame
    """Where the genes are."""
    activity: np.ndarray
    """(cells, programmes)"""
    net: dict[str, list[str]]
    """The genes of each programme."""


def _counts(rate, rng, names, cells):
    adata = ad.AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)))
    adata.obs_names, adata.var_names = cells, names
    sc.pp.normalize_total(adata, target_sum=1e3)
    sc.pp.log1p(adata)
    return adata


@pytest.fixture(scope="session")
def _multiome():
    rng = np.random.default_rng(0)
    g = PROGRAMS * GENES
    active = rng.random((N, PROGRAMS)) < 0.35
    activity = active * rng.gamma(3, 0.4, size=active.shape)
    program = np.repeat(np.arange(PROGRAMS), GENES)
    cells = [f"cell{i}" for i in range(N)]
    rna = _counts(np.exp(0.2 + activity[:, program]), rng, [f"g{i}" for i in range(g)], cells)
    genes = pd.DataFrame({"chrom": "chr1", "start": 100_000 * np.arange(1, g + 1), "strand": "+"}, index=rna.var_names)
    genes["end"] = genes["start"] + 10_000
    # One peak in the promoter and one in the body of each gene; and some that are of no gene, and always open.
    start = np.concatenate([genes["start"] - 600, genes["start"] + 4000, genes["start"] + 50_000])
    rate = np.exp(np.hstack([np.tile(activity[:, program], PEAKS), np.full((N, g), 0.5)]) - 0.3)
    atac = _counts(rate, rng, [f"chr1-{at}-{at + 500}" for at in start], cells)[rng.permutation(N)].copy()
    mdata = mudata.MuData({"rna": rna, "atac": atac})
    mdata.obsm["X_mofa"] = (activity @ rng.normal(size=(PROGRAMS, 8)) + rng.normal(size=(N, 8)) * 0.1).astype(
        np.float32
    )
    mdata.obsm["X_umap"] = mdata.obsm["X_mofa"][:, :2].copy()
    mdata.obs["strongest"] = pd.Categorical([f"p{k}" for k in np.c_[activity, np.full(N, 0.2)].argmax(axis=1)])
    sae.tl.fit(mdata, use_rep="X_mofa", n_features=16, k=4, steps=600, progress=False)
    sae.tl.encode(mdata)
    sae.tl.rank_genes(mdata, var_mod="rna")
    sae.tl.rank_genes(mdata, var_mod="atac")
    net = {f"programme {k}": rna.var_names[program == k].tolist() for k in range(PROGRAMS)}
    pairs = peaks_to_genes(mdata, genes, var_mod="atac")
    for modality, given in (("rna", None), ("atac", pairs)):
        sae.tl.enrich(
            mdata, net, var_mod=modality, var_to_gene=given, collection="programmes", progress=False, n_null=5
        )
    sae.tl.score_labels(mdata, "strongest")
    sae.tl.name_features(mdata)
    return Multiome(mdata, genes, activity, net)


@pytest.fixture
def multiome(_multiome):
    """After every verb, with the SAE on a joint embedding."""
    return Multiome(_multiome.mdata.copy(), _multiome.genes, _multiome.activity, _multiome.net)


def feature_of(multiome, k):
    """The feature that follows a programme best."""
    a = multiome.mdata.obsm["sae"].toarray()
    with np.errstate(invalid="ignore", divide="ignore"):
        return int(np.nanargmax([np.corrcoef(column, multiome.activity[:, k])[0, 1] for column in a.T]))


def test_features_have_the_genes_and_the_peaks_of_their_programme(multiome):
    pairs = peaks_to_genes(multiome.mdata, multiome.genes, var_mod="atac").set_index("peak")["gene"]
    assert len(pairs) == PROGRAMS * GENES * PEAKS
    for k in range(PROGRAMS):
        members = set(multiome.net[f"programme {k}"])
        best = {"direction": "up", "max_padj": 0.05, "n": GENES}
        genes = sae.get.genes(multiome.mdata, feature_of(multiome, k), modality="rna", **best)["gene"]
        peaks = sae.get.genes(multiome.mdata, feature_of(multiome, k), modality="atac", **best)["gene"]
        assert len(genes) == GENES and np.mean(genes.isin(members)) > 0.9
        assert np.mean(pairs.reindex(peaks).isin(members)) > 0.9


@pytest.mark.parametrize("modality", ["rna", "atac"])
def test_enrichment_on_genes_and_on_peaks(multiome, modality):
    for k in range(PROGRAMS):
        found = sae.get.enrichment(multiome.mdata, feature_of(multiome, k), direction="up", modality=modality)
        assert found["gene_set"].iloc[0] == f"programme {k}" and found["fdr"].iloc[0] <= 0.05
        assert set(found["genes"].iloc[0].split(";")) <= set(multiome.net[f"programme {k}"])
        assert found["size"].iloc[0] == GENES, "genes, however many peaks they have"


@pytest.mark.parametrize(("again", "kept"), [("rna", "atac"), ("atac", "rna")])
def test_a_modality_replaces_its_own_rows_only(multiome, again, kept):
    mdata = multiome.mdata
    before = {name: mdata.uns["sae"][name] for name in ("genes", "enrichment", "enrichment_null")}
    assert all(set(table["modality"]) == {"rna", "atac"} for table in before.values())
    sae.tl.rank_genes(mdata, var_mod=again, n_genes=3)
    net = {"all": sum(multiome.net.values(), [])[:30]}
    pairs = None if again == "rna" else peaks_to_genes(mdata, multiome.genes, var_mod="atac")
    sae.tl.enrich(mdata, net, var_mod=again, var_to_gene=pairs, collection="programmes", max_padj=0.5, n_null=0)
    for name, old in before.items():
        new = mdata.uns["sae"][name]
        a, b = (table[table["modality"] == kept].reset_index(drop=True).astype(object) for table in (old, new))
        pd.testing.assert_frame_equal(a, b)
        assert len(new[new["modality"] == again]) < len(old[old["modality"] == again]) or name == "enrichment_null"
    assert sae.get.enrichment(mdata, modality=again)["gene_set"].unique().tolist() == ["all"]


def test_cells_are_matched_by_name(multiome):
    """The peaks of the fixture have their cells in another order than the MuData."""
    mdata = multiome.mdata
    assert not mdata["atac"].obs_names.equals(mdata.obs_names)
    sorted_too = mudata.MuData({"rna": mdata["rna"].copy(), "atac": mdata["atac"][mdata.obs_names].copy()})
    sorted_too.obsm["X_mofa"], sorted_too.obsm["sae"] = mdata.obsm["X_mofa"], mdata.obsm["sae"]
    sorted_too.uns["sae"] = mdata.uns["sae"]
    pairs = peaks_to_genes(mdata, multiome.genes, var_mod="atac")
    sae.tl.rank_genes(sorted_too, var_mod="atac")
    sae.tl.enrich(sorted_too, multiome.net, var_mod="atac", var_to_gene=pairs, collection="programmes", n_null=0)
    sae.tl.enrich(mdata, multiome.net, var_mod="atac", var_to_gene=pairs, collection="programmes", n_null=0)
    for get in (sae.get.genes, sae.get.enrichment):
        a, b = (get(data, modality="atac") for data in (mdata, sorted_too))
        order = ["feature", "gene"] if "gene" in a else ["feature", "direction", "gene_set"]
        a, b = (table.sort_values(order, ignore_index=True) for table in (a, b))
        pd.testing.assert_frame_equal(a, b, rtol=1e-6, check_categorical=False)


def test_labels_and_names_of_the_mudata(multiome):
    mdata = multiome.mdata
    features = sae.get.features(mdata)
    for k in range(PROGRAMS):
        best = sae.get.label_summary(mdata, groupby="strongest", label=f"p{k}").iloc[0]
        assert best["held_out_auroc"] > 0.8
    assert features["name"].is_unique and features["strongest_scope"].notna().all()
    sae.tl.name_features(mdata, modality="rna", by="genes")
    named = features["name"].str.split(" · ").str[-1].str.split(", ").explode()
    with_genes = sae.get.genes(mdata, direction="up", modality="rna", max_padj=0.05)["feature"]
    assert not named[named.index.isin(with_genes)].str.startswith("chr1-").any()
    named = sae.get.features(mdata)["name_genes"].dropna()
    assert len(named) and named.str.split(";").explode().isin(mdata["rna"].var_names).all()
    sae.tl.score_labels(mdata, "strongest", baselines=True, var_mod="atac")
    chosen = sae.get.label_summary(mdata, source="gene")["selected"]
    assert chosen.isin(mdata["atac"].var_names).all()


GETTERS = ("activations", "features", "model", "decoder", "history", "genes", "enrichment", "labels", "label_summary")


def test_results_and_figures_of_the_mudata(multiome):
    mdata = multiome.mdata
    for name in GETTERS:
        assert getattr(sae.get, name)(mdata) is not None
    activations = sae.get.activations(mdata)
    assert activations.obs_names.equals(mdata.obs_names) and activations.shape == (N, 16)
    assert set(activations.obsm) == {"X_mofa", "X_umap"}
    panels = sae.pl.feature_umap(mdata, [0, 1])
    assert len(panels) == 2 and sae.pl.history(mdata) is not None
    for modality in (None, "rna", "atac"):
        dots = sae.pl.enrichment(mdata, modality=modality).collections[0]
        assert len(dots.get_offsets()) == len({tuple(place) for place in dots.get_offsets()})
    plt.close("all")


def test_h5mu_after_every_verb(multiome, tmp_path, compare):
    mdata = multiome.mdata
    mdata.write_h5mu(tmp_path / "cells.h5mu")
    stored = mudata.read_h5mu(tmp_path / "cells.h5mu")
    compare.assert_same(mdata.uns["sae"], stored.uns["sae"])
    compare.assert_same(mdata.obsm["sae"], stored.obsm["sae"])
    pairs = peaks_to_genes(stored, multiome.genes, var_mod="atac")
    stored["atac"].uns["peak_annotation"] = pairs.set_axis(pairs.index.astype(str))
    stored.write_h5mu(tmp_path / "again.h5mu")
    stored = mudata.read_h5mu(tmp_path / "again.h5mu")
    for data in (mdata, stored):
        given = pairs if data is mdata else data["atac"].uns["peak_annotation"]
        sae.tl.encode(data)
        sae.tl.rank_genes(data, var_mod="atac", n_genes=5)
        sae.tl.enrich(data, multiome.net, var_mod="atac", var_to_gene=given, n_null=0)
        sae.tl.score_labels(data, "strongest")
    compare.assert_same(mdata.uns["sae"], stored.uns["sae"])


NEEDS = {
    "fit": (lambda m: sae.tl.fit(m), r"Pass mod= \(one of 'rna', 'atac'\), or use_rep=.*'X_mofa'"),
    "fit on what is not there": (
        lambda m: sae.tl.fit(m, "X_multivi"),
        r"no 'X_multivi'; it has .*'X_mofa'.*\. Pass one of them as use_rep=, or mod= \(one of 'rna', 'atac'\)",
    ),
    "fit on a layer": (lambda m: sae.tl.fit(m, layer="log"), r"Pass mod= \(one of 'rna', 'atac'\)"),
    "rank_genes": (lambda m: sae.tl.rank_genes(m), r"var_mod= \(one of 'rna', 'atac'\)"),
    "enrich": (lambda m: sae.tl.enrich(m, {"a": ["g0"]}), r"var_mod= \(one of 'rna', 'atac'\)"),
    "score_labels": (
        lambda m: sae.tl.score_labels(m, "strongest", baselines=True),
        r"var_mod= \(one of 'rna', 'atac'\)",
    ),
    "peaks_to_genes": (lambda m: peaks_to_genes(m, pd.DataFrame()), r"var_mod= \(one of 'rna', 'atac'\)"),
}


@pytest.mark.parametrize(("call", "message"), NEEDS.values(), ids=NEEDS)
def test_without_a_modality_the_modalities_are_listed(multiome, compare, call, message):
    before = compare.state(multiome.mdata)
    with pytest.raises((KeyError, ValueError), match=message):
        call(multiome.mdata)
    compare.assert_same(before, compare.state(multiome.mdata))


@pytest.mark.parametrize("mod", ["rna", "atac"])
@pytest.mark.parametrize(
    "call",
    [
        sae.tl.encode,
        sae.tl.rank_genes,
        sae.tl.name_features,
        lambda m, **where: sae.tl.enrich(m, {"a": ["g0"]}, **where),
        lambda m, **where: sae.tl.score_labels(m, "strongest", **where),
        sae.get.genes,
        sae.get.activations,
        sae.pl.enrichment,
        sae.pl.history,
    ],
)
def test_an_sae_of_a_modality_is_not_the_mudatas(multiome, compare, mod, call):
    """Whoever leaves `mod=` out is told which modality has one."""
    mdata = multiome.mdata
    del mdata.uns["sae"], mdata.obsm["sae"]
    sc.pp.pca(mdata[mod], n_comps=5)
    sae.tl.fit(mdata, mod=mod, n_features=4, steps=5, progress=False)
    before = compare.state(mdata)
    with pytest.raises(KeyError, match=rf"mdata\.uns has no SAE 'sae'.*Modalities with an SAE: '{mod}'; pass mod="):
        call(mdata)
    with pytest.raises(ValueError, match=r"no modality 'adt'; it has 'rna', 'atac'"):
        call(mdata, mod="adt")
    compare.assert_same(before, compare.state(mdata))


@pytest.mark.parametrize("held_in", ["rna", None])
def test_cells_that_a_modality_lacks_take_no_part(multiome, held_in):
    """What is found for the cells that are in both is what is found where there are no others."""
    rna, atac = multiome.mdata["rna"].copy(), multiome.mdata["atac"][:200].copy()
    in_both = rna.obs_names.intersection(atac.obs_names)
    partial, paired = (mudata.MuData({"rna": part.copy(), "atac": atac.copy()}) for part in (rna, rna[in_both]))
    for mdata in (partial, paired):
        held = mdata if held_in is None else mdata[held_in]
        at = multiome.mdata.obs_names.get_indexer(held.obs_names)
        held.obsm["sae"], held.uns["sae"] = multiome.mdata.obsm["sae"][at], multiome.mdata.uns["sae"].copy()
        held.obsm["X_mofa"] = multiome.mdata.obsm["X_mofa"][at]
        sae.tl.rank_genes(mdata, mod=held_in, var_mod="atac")
    a, b = (sae.get.genes(mdata, mod=held_in, modality="atac") for mdata in (partial, paired))
    a, b = (table.sort_values(["feature", "gene"], ignore_index=True) for table in (a, b))
    pd.testing.assert_frame_equal(a, b, rtol=1e-6, check_categorical=False)


@pytest.mark.parametrize(
    ("rows", "lacks", "more"), [(slice(100, None), 100, 50), (slice(None), 0, 50), (slice(0, 80), 220, 50)]
)
def test_unpaired_cells_are_counted(multiome, log, rows, lacks, more):
    """Some cells have no ATAC, others nothing else."""
    source = multiome.mdata
    rna, shared = source["rna"], source["atac"][source.obs_names[rows]]
    others = source["atac"][:more].copy()
    others.obs_names = [f"other{i}" for i in range(more)]
    mdata = mudata.MuData({"rna": rna.copy(), "atac": ad.concat([shared, others])})
    at = source.obs_names.get_indexer(rna.obs_names)
    mdata["rna"].obsm["sae"], mdata["rna"].uns["sae"] = source.obsm["sae"][at], source.uns["sae"]
    mdata["rna"].obsm["X_mofa"] = source.obsm["X_mofa"][at]
    sc.settings.verbosity = "info"
    for call in (sae.tl.rank_genes, lambda m, **where: sae.tl.enrich(m, {"a": m["atac"].var_names[:9]}, **where)):
        call(mdata, mod="rna", var_mod="atac")
        said = f"{N - lacks} cells are in mdata.mod['rna'] and in mdata.mod['atac']; {lacks} are only in the former and {more} only in"
        assert log().count(said) == 1 and ("WARNING: " + said in log()) == (lacks > 0)
        sc.settings.logfile.truncate(0)
    sae.tl.rank_genes(mdata, mod="rna", var_mod="rna")
    assert "take no part" not in log()


def test_modalities_without_a_cell_in_common(multiome, compare):
    mdata = multiome.mdata
    atac = mdata["atac"].copy()
    atac.obs_names = [f"other{i}" for i in range(N)]
    apart = mudata.MuData({"rna": mdata["rna"].copy(), "atac": atac})
    apart["rna"].obsm["sae"], apart["rna"].uns["sae"] = mdata.obsm["sae"], mdata.uns["sae"]
    before = compare.state(apart)
    for call in (
        lambda: sae.tl.rank_genes(apart, mod="rna", var_mod="atac"),
        lambda: sae.tl.enrich(apart, multiome.net, mod="rna", var_mod="atac"),
        lambda: sae.tl.score_labels(apart, "strongest", mod="rna", var_mod="atac", baselines=True),
    ):
        apart["rna"].obs["strongest"] = mdata.obs["strongest"]
        with pytest.raises(ValueError, match=r"No cell of mdata\.mod\['rna'\] is in mdata\.mod\['atac'\]"):
            call()
    del apart["rna"].obs["strongest"]
    compare.assert_same(before, compare.state(apart))


# ---- Real cells


def read(name: str) -> mudata.MuData:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    with warnings.catch_warnings():
        # Some proteins of a file are named like genes.
        warnings.filterwarnings("ignore", message="var_names are not unique", module="mudata")
        return mudata.read_h5mu(path)


def normalize(adata: ad.AnnData) -> None:
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=20)


def test_features_of_a_real_multiome_have_genes_and_peaks():
    """Peaks that a feature raises are open in more of the cells whose type it tells, which it has never seen."""
    mdata = read("bmmc_multiome_neurips2021_500cells.h5mu")
    is_open = (mdata["atac"].X > 0).toarray()
    for adata in mdata.mod.values():
        normalize(adata)
    scaled = [adata.obsm["X_pca"] / adata.obsm["X_pca"].std() for adata in mdata.mod.values()]
    mdata.obsm["X_joint"] = np.hstack(scaled)
    sae.tl.fit(mdata, use_rep="X_joint", progress=False)
    sae.tl.encode(mdata)
    sae.tl.score_labels(mdata, "cell_type")
    for modality in mdata.mod:
        sae.tl.rank_genes(mdata, var_mod=modality)
    table = sae.get.genes(mdata, max_padj=0.05)
    tested = sae.get.features(mdata)["genes_status"] == "tested"
    both = table.groupby("feature", observed=True)["modality"].nunique()
    assert (both == 2).sum() > 0.3 * tested.sum()

    markers = {"Erythroblast": {"HBA1", "HBA2", "HBB", "AHSP", "HEMGN"}, "CD14+ Mono": {"FCN1", "LYST", "DPYD", "TYMP"}}
    n_peaks = 0
    for label, known in markers.items():
        feature = sae.get.label_summary(mdata, label=label)["selected"].iloc[0]
        genes = sae.get.genes(mdata, feature, direction="up", modality="rna", n=10)["gene"]
        assert len(known & set(genes)) >= 2
        peaks = sae.get.genes(mdata, feature, direction="up", modality="atac", max_padj=0.05)["gene"]
        inside = (mdata.obs["cell_type"] == label).to_numpy()
        columns = mdata["atac"].var_names.get_indexer(pd.Index(peaks))
        assert (is_open[inside][:, columns].mean(axis=0) > is_open[~inside][:, columns].mean(axis=0)).all()
        n_peaks += len(peaks)
    assert n_peaks > 0


PROTEINS = {
    "CD3": ["CD3D", "CD3E", "CD3G"], "CD5": "CD5", "CD7": "CD7", "CD8": ["CD8A", "CD8B"], "CD4": "CD4", "CD2": "CD2",
    "CD19": "CD19", "CD22": "CD22", "CD20": "MS4A1", "CD21": "CR2", "CD24": "CD24", "IgM": "IGHM", "IgD": "IGHD",
    "CD79b": "CD79B", "CD14": "CD14", "CD33": "CD33", "CD11b": "ITGAM", "CD11c": "ITGAX", "CD36": "CD36", "CD64": "FCGR1A",
    "CD56": "NCAM1", "CD16": "FCGR3A", "CD94": "KLRD1", "CD161": "KLRB1", "CD71": "TFRC", "CD41": "ITGA2B",
}  # fmt: skip


def test_enrichment_of_real_proteins_by_their_genes():
    """B cells are found by the proteins on their surface, read as genes of a set of genes."""
    mdata = read("bmmc_cite_neurips2021_600cells.h5mu")
    for adata in mdata.mod.values():
        normalize(adata)
    measured = {protein: genes for protein, genes in PROTEINS.items() if protein in mdata["adt"].var_names}
    assert len(measured) > 15
    sets = {
        "B cell": ["CD19", "CD22", "MS4A1", "CR2", "IGHM", "IGHD", "CD79B"],
        "T cell": ["CD3D", "CD3E", "CD3G", "CD5", "CD7", "CD2"],
        "Myeloid cell": ["CD14", "CD33", "ITGAM", "ITGAX", "CD36", "FCGR1A"],
    }
    sae.tl.fit(mdata, mod="rna", n_features=64, progress=False)
    sae.tl.encode(mdata, mod="rna")
    sae.tl.score_labels(mdata, "cell_type", mod="rna")
    sae.tl.enrich(mdata, sets, mod="rna", var_mod="adt", var_to_gene=measured, min_size=3, n_null=0, progress=False)
    for label, expected in {"Naive CD20+ B IGKC+": "B cell", "CD14+ Mono": "Myeloid cell"}.items():
        feature = sae.get.label_summary(mdata, label=label, mod="rna")["selected"].iloc[0]
        found = sae.get.enrichment(mdata, feature, direction="up", mod="rna")
        assert found["gene_set"].iloc[0] == expected
        assert found["pval"].iloc[0] < 0.01 and (found["modality"] == "adt").all()
