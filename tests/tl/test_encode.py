from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

import sae

HALVES = slice(0, 400), slice(400, 800)
STATISTICS = ["n_cells", "density", "mean", "max", "dead"]


def dense_activations(x, stored):
    """The formula of the docstring, cell by cell."""
    weights, params = stored["weights"], stored["params"]
    pre = np.asarray(x, dtype=np.float64) @ weights["W_enc"].astype(np.float64) + weights["b_enc"]
    a = np.where(pre > weights.get("threshold", 0), pre, 0)
    for row in a if params["architecture"] == "topk" else ():
        row[np.argsort(-row)[params["k"] :]] = 0
    return a


def assert_same_rows(a, b):
    for part in ("indptr", "indices", "data"):
        assert getattr(a, part).tobytes() == getattr(b, part).astype(getattr(a, part).dtype).tobytes(), part


@pytest.mark.parametrize(
    "settings",
    [
        {"architecture": "topk", "k": 5},
        {"architecture": "topk", "k": 32},
        {"architecture": "batchtopk", "k": 5},
        {"architecture": "matryoshka", "k": 5},
        {"architecture": "vanilla", "l1": 0.5},
        {"architecture": "relu", "preprocess": "standardize"},
        {"architecture": "jumprelu"},
        {"architecture": "gated"},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_activations_follow_the_formula(pbmc, settings):
    sae.tl.fit(pbmc, n_features=32, steps=60, **settings)
    assert sae.tl.encode(pbmc) is None
    a = pbmc.obsm["sae"]
    assert isinstance(a, sparse.csr_matrix) and a.dtype == np.float32 and a.shape == (700, 32)
    assert a.has_sorted_indices and (a.data > 0).all()
    expected = dense_activations(pbmc.obsm["X_pca"], pbmc.uns["sae"])
    np.testing.assert_allclose(a.toarray(), expected, atol=1e-4)
    if settings["architecture"] == "topk":
        assert np.diff(a.indptr).max() <= settings["k"]


def test_writes_what_it_says(fitted, compare):
    before = compare.state(fitted)
    sae.tl.encode(fitted)
    after = compare.state(fitted)
    del after["obsm"]["sae"]
    encoded, _ = after["uns"]["sae"].pop("encoded"), after["uns"]["sae"].pop("features")
    compare.assert_same(before, after)
    expected = {"use_rep": "X_pca", "layer": None, "n_obs": 700}
    compare.assert_same(expected, {name: encoded[name] for name in expected})
    x = fitted.obsm["X_pca"].astype(np.float64)
    a = dense_activations(x, fitted.uns["sae"])
    weights = fitted.uns["sae"]["weights"]
    residual = x - (a @ weights["W_dec"] + weights["b_dec"])
    assert encoded["fvu"] == pytest.approx(np.square(residual).sum() / np.square(x - x.mean(axis=0)).sum(), rel=1e-4)
    assert encoded["l0"] == pytest.approx((a > 0).sum(axis=1).mean())


def test_feature_table(fitted):
    # One feature that no cell reaches.
    fitted.uns["sae"]["weights"]["b_enc"][3] = -1e6
    sae.tl.encode(fitted)
    table = fitted.uns["sae"]["features"]
    a = fitted.obsm["sae"].toarray()
    assert list(table) == STATISTICS
    assert table.index.tolist() == [f"sae_{i}" for i in range(32)]
    np.testing.assert_array_equal(table["n_cells"], (a > 0).sum(axis=0))
    np.testing.assert_allclose(table["density"], (a > 0).mean(axis=0))
    np.testing.assert_allclose(table["mean"], a.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(table["max"], a.max(axis=0))
    assert np.flatnonzero(table["dead"]).tolist() == [3]
    assert table.dtypes.astype(str).tolist() == ["int64", "float64", "float64", "float64", "bool"]


@pytest.mark.parametrize("cell", [0, 1, 511, 512, 699])
def test_one_cell_alone_and_among_all(encoded, cell):
    alone = encoded[cell : cell + 1].copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The SAE 'sae' leaves")  # one cell may well be hard to reconstruct
        sae.tl.encode(alone)
    assert_same_rows(encoded.obsm["sae"][cell], alone.obsm["sae"])


@pytest.mark.parametrize("selection", ["subset", "permutation"])
def test_other_cells_do_not_matter(encoded, selection):
    rng = np.random.default_rng(0)
    rows = {
        "subset": np.flatnonzero(rng.random(700) < 0.4),
        "permutation": rng.permutation(700),
    }[selection]
    other = encoded[rows].copy()
    sae.tl.encode(other)
    assert_same_rows(encoded.obsm["sae"][rows], other.obsm["sae"])


def test_no_cells(encoded):
    none = encoded[:0].copy()
    sae.tl.encode(none)
    assert none.obsm["sae"].shape == (0, 32)
    assert none.uns["sae"]["features"]["dead"].all()


def test_reference_encodes_new_cells(pbmc, compare):
    known, new = pbmc[:500].copy(), pbmc[500:].copy()
    sae.tl.fit(known, n_features=32, steps=100, key_added="atlas")
    sae.tl.encode(known, key="atlas")
    sae.tl.score_labels(known, "bulk_labels", key="atlas")
    before = compare.state(known)
    sae.tl.encode(new, key="atlas", reference=known)
    compare.assert_same(before, compare.state(known))
    a = dense_activations(new.obsm["X_pca"], known.uns["atlas"])
    np.testing.assert_allclose(new.obsm["atlas"].toarray(), a, atol=1e-4)
    np.testing.assert_array_equal(new.uns["atlas"]["features"]["n_cells"], (a > 0).sum(axis=0))
    for name in ("schema_version", "params", "weights", "history"):
        compare.assert_same(known.uns["atlas"][name], new.uns["atlas"][name])
    assert set(new.uns["atlas"]) == {"schema_version", "params", "weights", "history", "features", "encoded"}
    # From here on the new object stands on its own.
    new.uns["atlas"]["weights"]["W_dec"][:] = 0
    new.uns["atlas"]["params"]["k"] = 1
    new.uns["atlas"]["history"]["loss"] = 0.0
    compare.assert_same(before, compare.state(known))


def test_reference_with_another_name_of_the_embedding(pbmc):
    known, new = pbmc[:500].copy(), pbmc[500:].copy()
    sae.tl.fit(known, n_features=32, steps=50)
    new.obsm["X_mapped"] = new.obsm.pop("X_pca")
    sae.tl.encode(new, reference=known, use_rep="X_mapped")
    assert new.uns["sae"]["encoded"]["use_rep"] == "X_mapped"
    sae.tl.score_labels(new, "phase")


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_genes_in_another_order(make_adata, layout):
    adata = make_adata(layout=layout)
    sae.tl.fit(adata, use_rep="X", steps=20)
    sae.tl.encode(adata)
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    sae.tl.encode(shuffled)
    assert_same_rows(adata.obsm["sae"], shuffled.obsm["sae"])
    sae.tl.score_labels(shuffled, "group")

    more = make_adata(g=25, layout=layout, first=1000, seed=5)[:, np.random.default_rng(1).permutation(25)].copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The SAE 'sae' leaves")  # unrelated cells
        sae.tl.encode(more, reference=adata)
    genes = more[:, adata.var_names].X
    genes = genes.toarray() if layout == "csr" else genes
    np.testing.assert_allclose(more.obsm["sae"].toarray(), dense_activations(genes, adata.uns["sae"]), atol=1e-4)


def test_missing_genes_are_named(make_adata, compare):
    adata = make_adata()
    sae.tl.fit(adata, use_rep="X", steps=20)
    fewer = adata[:, ["g0", "g1", *(f"g{i}" for i in range(4, 20))]].copy()
    before = compare.state(fewer)
    with pytest.raises(ValueError, match=r"lacks 2 of the 20 columns that the SAE reads: 'g2', 'g3'"):
        sae.tl.encode(fewer)
    compare.assert_same(before, compare.state(fewer))


def test_columns_by_name_from_data_frame(make_adata):
    adata = make_adata(d=3)
    frame = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=["a", "b", "c"])
    adata.obsm["X_pca"] = frame
    sae.tl.fit(adata, steps=20)
    sae.tl.encode(adata)
    turned = adata.copy()
    turned.obsm["X_pca"] = frame[["c", "a", "b"]]
    sae.tl.encode(turned)
    assert_same_rows(adata.obsm["sae"], turned.obsm["sae"])


def test_data_frame_for_an_sae_without_names(make_adata):
    adata = make_adata(d=3)
    sae.tl.fit(adata, steps=20)
    sae.tl.encode(adata)
    named = adata.copy()
    named.obsm["X_pca"] = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names, columns=["a", "b", "c"])
    sae.tl.encode(named)
    assert_same_rows(adata.obsm["sae"], named.obsm["sae"])


def test_another_embedding_of_the_same_width_is_noticed():
    rng = np.random.default_rng(0)
    programs = rng.normal(size=(16, 20))
    x = (rng.exponential(size=(800, 16)) * (rng.random((800, 16)) < 0.15) @ programs).astype(np.float32)
    names = [f"cell{i}" for i in range(800)]
    known, new = (ad.AnnData(obs=pd.DataFrame(index=names[part]), obsm={"X_pca": x[part]}) for part in HALVES)
    sae.tl.fit(known, steps=500)
    sae.tl.encode(new.copy(), reference=known)  # the same PCA: no warning
    rotation = stats.ortho_group.rvs(20, random_state=0)
    new.obsm["X_pca"] = (new.obsm["X_pca"] @ rotation).astype(np.float32)
    with pytest.warns(UserWarning, match=r"leaves .* unexplained, against .* same embedding") as caught:
        sae.tl.encode(new, reference=known)
    assert [warning.filename for warning in caught] == [__file__]
    assert "sae" in new.obsm


def test_recomputed_embedding_is_noticed(encoded, net):
    encoded.obsm["X_pca"] = encoded.obsm["X_pca"] + np.float32(1e-3)
    message = r"adata has another 'X_pca' than when 'sae' was made from it.*sae\.tl\.encode again"
    calls = [
        lambda: sae.tl.rank_genes(encoded),
        lambda: sae.tl.enrich(encoded, net),
        lambda: sae.tl.score_labels(encoded, "phase"),
        lambda: sae.get.activations(encoded),
        lambda: sae.tl.encode(encoded),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match=message) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]
    sae.tl.score_labels(encoded, "phase")  # encoded anew: nothing to say


def test_subsets_are_not_taken_for_recomputed(encoded):
    part = encoded[encoded.obs["phase"] == "G1"].copy()
    sae.tl.score_labels(part, "bulk_labels")
    sae.tl.encode(part)
    genes = encoded[:, :100].copy()
    sae.tl.score_labels(genes, "bulk_labels")


def test_encode_drops_stale_results(analysed):
    analysed.varm["sae"] = np.zeros((analysed.n_vars, 32))
    sae.tl.encode(analysed)
    assert "sae" not in analysed.varm
    assert set(analysed.uns["sae"]) == {"schema_version", "params", "weights", "history", "features", "encoded"}
    assert list(analysed.uns["sae"]["features"]) == STATISTICS


def test_layer(make_adata):
    adata = make_adata(layout="csr")
    adata.layers["log"] = adata.X.copy()
    sae.tl.fit(adata, layer="log", steps=20)
    sae.tl.encode(adata)
    np.testing.assert_allclose(
        adata.obsm["sae"].toarray(), dense_activations(adata.X.toarray(), adata.uns["sae"]), atol=1e-4
    )
    assert adata.uns["sae"]["encoded"]["layer"] == "log"
    adata.layers["other"] = adata.layers["log"] * 0.5
    sae.tl.encode(adata, layer="other")
    np.testing.assert_allclose(
        adata.obsm["sae"].toarray(), dense_activations(adata.X.toarray() / 2, adata.uns["sae"]), atol=1e-4
    )


def test_mudata_modality(make_mudata, compare):
    mdata = make_mudata()
    sae.tl.fit(mdata, mod="rna", steps=20)
    before = compare.state(mdata)
    sae.tl.encode(mdata, mod="rna")
    alone = mdata["rna"].copy()
    sae.tl.encode(alone)
    assert_same_rows(alone.obsm["sae"], mdata["rna"].obsm["sae"])
    del mdata["rna"].obsm["sae"], mdata["rna"].uns["sae"]["features"], mdata["rna"].uns["sae"]["encoded"]
    compare.assert_same(before, compare.state(mdata))


def test_mudata_joint(make_mudata):
    mdata, new = make_mudata(), make_mudata()
    sae.tl.fit(mdata, "X_joint", steps=20)
    sae.tl.encode(mdata)
    expected = dense_activations(mdata.obsm["X_joint"], mdata.uns["sae"])
    np.testing.assert_allclose(mdata.obsm["sae"].toarray(), expected, atol=1e-4)
    sae.tl.encode(new, reference=mdata)
    assert_same_rows(mdata.obsm["sae"], new.obsm["sae"])
    sae.tl.fit(mdata, mod="rna", steps=20)
    sae.tl.encode(new, reference=mdata, mod="rna")
    assert new["rna"].obsm["sae"].shape == (80, 64)
