from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse

import sae
from sae.models import _scvi
from sae.models._scvi import SCVI

scvi = pytest.importorskip("scvi", reason="scvi-tools is not installed")

FOLDER = Path(os.environ.get("SAE_TEST_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
SILENT = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
}
KEYS = {"categorical_covariate_keys": ["plate"], "continuous_covariate_keys": ["age"]}


def trained(cls, data, *, keys=None, **how):
    """Set a model up on a copy and train it for a little, without a word."""
    data = data.copy()
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        (cls.setup_mudata if isinstance(data, mudata.MuData) else cls.setup_anndata)(data, **(keys or {}))
        model = cls(data, n_latent=6, **how)
        model.train(max_epochs=2, train_size=1.0, batch_size=128, early_stopping=False, **SILENT)
    return model


def scanvi(data, *, keys):
    model = trained(scvi.model.SCVI, data, keys=keys)
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        model = scvi.model.SCANVI.from_scvi_model(model, labels_key="bulk_labels", unlabeled_category="CD34+")
        model.train(max_epochs=2, train_size=1.0, batch_size=128, **SILENT)
    return model


def own(model, z=None, **loaded):
    """The model's own pass over its own data, through its own loader: what it infers, and generates from z or the mean."""
    with torch.inference_mode(), torch.random.fork_rng():
        (tensors,) = model._make_data_loader(model.adata, batch_size=model.adata.n_obs)
        tensors |= loaded
        inferred = model.module.inference(**model.module._get_inference_input(tensors))
        mean = inferred["qz"].loc if "qz" in inferred else inferred["qz_m"]
        inferred["z"] = mean if z is None else torch.from_numpy(z)
        if inferred.get("ql") is not None:
            inferred["library"] = inferred["ql"].loc
        return inferred, model.module.generative(**model.module._get_generative_input(tensors, inferred))


@pytest.fixture(scope="module")
def _counts():
    """700 real cells: the smallest value of a cell, un-logged, is that of one count."""
    adata = sae.datasets.pbmc68k()[:, :300].copy()
    x = np.expm1(adata.X.toarray().astype(np.float64))
    unit = np.where(x > 0, x, np.inf).min(axis=1, keepdims=True)
    counts = sparse.csr_matrix(np.round(x / unit).astype(np.float32))
    rng = np.random.default_rng(0)
    obs = adata.obs[["bulk_labels"]].assign(
        batch=pd.Categorical(rng.choice(["b", "a", "c"], 700)),
        plate=rng.integers(3, size=700),
        age=rng.normal(size=700),
        depth=counts.sum(axis=1).A1 / 100,
        open=rng.random(700),
    )
    return ad.AnnData(counts, obs=obs, var=adata.var[[]], layers={"counts": counts.copy()})


@pytest.fixture
def counts(_counts):
    return _counts.copy()


VARIANTS = {
    "zinb": (scvi.model.SCVI, {"batch_key": "batch", "layer": "counts"}, {}),
    "nb": (scvi.model.SCVI, {"batch_key": "batch"}, {"gene_likelihood": "nb", "n_layers": 2}),
    "poisson": (scvi.model.SCVI, {}, {"gene_likelihood": "poisson"}),
    "normal": (scvi.model.SCVI, {}, {"gene_likelihood": "normal"}),
    "covariates": (scvi.model.SCVI, {"batch_key": "batch"} | KEYS, {"encode_covariates": True, "n_layers": 2}),
    "covariates of the decoder": (scvi.model.SCVI, {"batch_key": "batch"} | KEYS, {}),
    "batch embedding": (
        scvi.model.SCVI,
        {"batch_key": "batch"} | KEYS,
        {"batch_representation": "embedding", "encode_covariates": True},
    ),
    "size factor": (scvi.model.SCVI, {"batch_key": "batch", "size_factor_key": "depth"}, {}),
    "inferred library": (scvi.model.SCVI, {"batch_key": "batch"}, {"use_observed_lib_size": False}),
    "linear": (scvi.model.LinearSCVI, {"batch_key": "batch"}, {}),
    "logistic normal": (scvi.model.SCVI, {}, {"latent_distribution": "ln"}),
    "scanvi": (scanvi, {"batch_key": "batch"} | KEYS, {}),
}


@pytest.fixture(scope="module")
def variant(_counts):
    """Train each model when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            cls, keys, how = VARIANTS[name]
            made[name] = trained(cls, _counts, keys=keys, **how) if isinstance(cls, type) else cls(_counts, keys=keys)
        return made[name]

    return get


each_variant = pytest.mark.parametrize("name", VARIANTS)


def mean_counts(px):
    """The mean that the distribution has without the extra zeros."""
    return next(getattr(px, name) for name in ("mu", "rate", "loc") if hasattr(px, name)).numpy()


@each_variant
def test_decode_is_the_models_own_generative_path(variant, counts, name):
    trained = variant(name)
    z = np.random.default_rng(1).normal(size=(700, 6)).astype(np.float32)
    if name == "logistic normal":
        z = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    px = own(trained, z)[1]["px"]

    model = SCVI(trained, library_size="observed", log1p=False)
    found = model.decode(z, counts)
    np.testing.assert_allclose(found.X, mean_counts(px), **CLOSE)
    assert found.X.dtype == np.float32 and found.uns["scale"] == "linear"
    assert found.obs_names.equals(counts.obs_names) and found.var_names.equals(counts.var_names)

    shares = SCVI(trained, library_size=1, log1p=False).decode(z, counts).X
    scale = (px.normal_mu if name == "normal" else px.scale).numpy()
    if name == "size factor":
        scale = scale / scale.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, scale, **CLOSE)

    found = SCVI(trained).decode(z, counts)
    assert found.uns["scale"] == "log1p" and found.uns["log1p"] == {"base": None}
    np.testing.assert_allclose(found.X, np.log1p(1e4 * scale), **CLOSE)


@each_variant
def test_embed_is_the_posterior_mean_and_decode_of_it_the_models_own(variant, counts, name):
    trained = variant(name)
    model = SCVI(trained, library_size="observed", log1p=False)
    z = model.embed(counts)
    assert z.shape == (700, 6) and z.dtype == np.float32
    inferred, _ = own(trained)
    if name == "logistic normal":
        np.testing.assert_allclose(z, torch.softmax(inferred["qz"].loc, dim=-1).numpy(), **CLOSE)
    else:
        np.testing.assert_allclose(z, trained.get_latent_representation(), **CLOSE)
        np.testing.assert_allclose(model.decode(z, counts).X, mean_counts(own(trained)[1]["px"]), **CLOSE)


def test_the_zero_inflated_mean_is_that_without_the_extra_zeros(variant, counts):
    z = SCVI(variant("zinb")).embed(counts)
    px = own(variant("zinb"), z)[1]["px"]
    found = SCVI(variant("zinb"), library_size="observed", log1p=False).decode(z, counts).X
    np.testing.assert_allclose(found * (1 - px.zi_probs.numpy()), px.mean.numpy(), **CLOSE)
    assert (found > px.mean.numpy()).all()


@pytest.mark.parametrize("name", ["zinb", "batch embedding", "linear", "scanvi"])
def test_all_cells_as_of_one_batch(variant, counts, name):
    trained = variant(name)
    z = np.random.default_rng(1).normal(size=(700, 6)).astype(np.float32)
    px = own(trained, z, batch=torch.full((700, 1), 2))[1]["px"]
    model = SCVI(trained, batch="c", log1p=False, library_size=1)
    np.testing.assert_allclose(model.decode(z, counts).X, px.scale.numpy(), **CLOSE)
    of_own = SCVI(trained, log1p=False, library_size=1).decode(z, counts).X
    differ = (of_own != model.decode(z, counts).X).any(axis=1)
    assert (differ == (counts.obs["batch"] != "c")).all()
    if name != "batch embedding":
        del counts.obs["batch"]
        np.testing.assert_array_equal(model.decode(z, counts).X[::50], model.decode(z, counts).X[::50])
        assert SCVI(trained).embed(counts).shape == z.shape


@pytest.mark.parametrize("name", ["zinb", "covariates", "linear"])
def test_each_cell_is_on_its_own(variant, counts, name, monkeypatch):
    model = SCVI(variant(name), library_size="observed")
    z = model.embed(counts)
    expected = model.decode(z, counts).X
    order = np.random.default_rng(0).permutation(700)
    shuffled = counts[order].copy()
    np.testing.assert_allclose(model.embed(shuffled), z[order], **CLOSE)
    np.testing.assert_allclose(model.decode(z[order], shuffled).X, expected[order], **CLOSE)
    parts = [slice(0, 1), slice(1, 300), slice(300, 700)]
    np.testing.assert_allclose(np.vstack([model.embed(counts[rows]) for rows in parts]), z, **CLOSE)
    decoded = [model.decode(z[rows], counts[rows]).X for rows in parts]
    np.testing.assert_allclose(np.vstack(decoded), expected, **CLOSE)
    monkeypatch.setattr(_scvi, "BLOCK_VALUES", 300 * 64)
    np.testing.assert_allclose(model.embed(counts), z, **CLOSE)
    np.testing.assert_allclose(model.decode(z, counts).X, expected, **CLOSE)
    empty = counts[:0].copy()
    assert model.embed(empty).shape == (0, 6) and model.decode(z[:0], empty).shape == (0, 300)


LAYOUTS = {
    "dense": lambda x: x.toarray(),
    "integers": lambda x: x.astype(np.int32),
    "csc": sparse.csc_matrix,
    "float64": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_genes_in_another_order_and_layouts(variant, counts, layout, tmp_path):
    model = SCVI(variant("nb"), library_size="observed")
    z = model.embed(counts)
    expected = model.decode(z, counts)
    extra = ad.AnnData(np.full((700, 5), 0.5, np.float32), obs=counts.obs, var=pd.DataFrame(index=list("vwxyz")))
    other = ad.concat([counts[:, ::-1], extra], axis=1, merge="first")
    other.X = layout(sparse.csr_matrix(other.X))
    np.testing.assert_allclose(model.embed(other), z, **CLOSE)
    np.testing.assert_allclose(model.decode(z, other).X, expected.X, **CLOSE)
    if layout is not LAYOUTS["csc"]:
        other.write_h5ad(tmp_path / "cells.h5ad")
        backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
        np.testing.assert_allclose(model.embed(backed), z, **CLOSE)
        np.testing.assert_allclose(model.decode(z[5:50], backed[5:50]).X, expected.X[5:50], **CLOSE)
        backed.file.close()


def test_nothing_is_left_behind(variant, counts, compare):
    trained = variant("covariates")
    registered = {name: len(store) for name, store in trained._per_instance_manager_store.items()}
    of_model, of_data = compare.state(trained.adata), compare.state(counts)
    trained.module.train()
    trained.module.decoder.eval()
    modes = [part.training for part in trained.module.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    model = SCVI(trained, library_size="observed")
    found = model.decode(model.embed(counts), counts)
    assert (torch.rand(1), np.random.random()) == expected
    assert [part.training for part in trained.module.modules()] == modes
    trained.module.eval()
    np.testing.assert_array_equal(found.X, model.decode(model.embed(counts), counts).X)
    compare.assert_same(compare.state(trained.adata), of_model)
    compare.assert_same(compare.state(counts), of_data)
    assert {name: len(store) for name, store in trained._per_instance_manager_store.items()} == registered


def test_saved_and_loaded(variant, counts, tmp_path):
    variant("covariates").save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = scvi.model.SCVI.load(tmp_path / "model", adata=counts.copy(), accelerator="cpu")
    a, b = SCVI(variant("covariates")), SCVI(loaded)
    counts.obs["plate"] = counts.obs["plate"].astype(str).astype("category")
    np.testing.assert_allclose(a.embed(counts), b.embed(counts), **CLOSE)
    np.testing.assert_allclose(a.decode(a.embed(counts), counts).X, b.decode(a.embed(counts), counts).X, **CLOSE)


def test_scvi_is_imported_only_for_its_models():
    code = (
        "import sys, sae, sae.models._scvi as adapter\n"
        "try: adapter.SCVI(object())\n"
        "except TypeError as error: print(error)\n"
        "assert not {'scvi', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "model= is a object. Pass a trained model of scvi.model: SCVI, SCANVI, LinearSCVI, MULTIVI;"
    )


# ---- Bad input


def change(name, value):
    def apply(adata):
        adata.obs[name] = value

    return apply


def halve(adata):
    adata.X = adata.X * 0.5


def log(adata):
    sc.pp.log1p(adata, layer="counts")


def missing(adata):
    adata.X.data[5] = np.nan


def infinite(adata):
    adata.X.data[5] = np.inf


BAD_DATA = {
    "not counts": ("nb", halve, "adata.X does not hold counts, which the SCVI reads: 47590 of the 210000 values looked at are"),
    "normalised layer": ("zinb", log, "adata.layers['counts'] does not hold counts, which the SCVI reads:"),
    "infinite": ("nb", infinite, "adata.X does not hold counts, which the SCVI reads: 1 of the 210000 values"),
    "NaN": ("nb", missing, "adata.X does not hold counts, which the SCVI reads: 1 of the 210000 values"),
    "unknown batch": (
        "covariates",
        change("batch", ["d"] * 30 + ["a"] * 670),
        "adata.obs['batch'] has 30 cells of 'd', which the model does not know as batch; it knows 'a', 'b', 'c'. Or pass batch=",
    ),
    "missing batch": (
        "covariates",
        change("batch", pd.Categorical(["a"] * 690 + [None] * 10)),
        "adata.obs['batch'] has 10 cells of 'nan', which the model does not know as batch; it knows 'a', 'b', 'c'.",
    ),
    "unknown covariate": (
        "covariates",
        change("plate", 7),
        "adata.obs['plate'] has 700 cells of '7', which the model does not know as covariate; it knows '0', '1', '2'.",
    ),
    "covariate with NaN": ("covariates", change("age", [np.nan] * 3 + [0] * 697), "adata.obs['age'] is NaN or infinite for 3"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(variant, counts, name, damage, message, compare):
    damage(counts)
    before = compare.state(counts)
    model = SCVI(variant(name), library_size="observed")
    with pytest.raises(ValueError, match=re.escape(message)):
        model.embed(counts)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.decode(np.zeros((700, 6)), counts)
    compare.assert_same(compare.state(counts), before)


def test_genes_that_are_missing_or_repeated(variant, counts):
    model = SCVI(variant("nb"))
    few = counts[:, np.arange(300) % 4 != 1].copy()
    message = f"adata lacks 75 of the 300 genes (25.0%) that the SCVI reads: '{counts.var_names[1]}', "
    with pytest.raises(ValueError, match=re.escape(message)):
        model.embed(few)
    counts.var_names = [*counts.var_names[:-1], counts.var_names[0]]
    with pytest.raises(ValueError, match=f"occur more than once .'{counts.var_names[0]}'.*var_names_make_unique"):
        model.embed(counts)


def test_places_that_are_missing(variant, counts):
    z = np.zeros((700, 6))
    del counts.layers["counts"], counts.obs["batch"], counts.obs["age"]
    with pytest.raises(
        KeyError, match=r"adata.layers has no 'counts', where the SCVI was set up to read counts; it has none"
    ):
        SCVI(variant("zinb")).embed(counts)
    with pytest.raises(
        KeyError, match=r"adata.obs has no column 'batch', which .* Or pass batch= to decode .* 'a', 'b', 'c'"
    ):
        SCVI(variant("zinb")).decode(z, counts)
    with pytest.raises(KeyError, match="adata.obs has no column 'age', which the model reads as covariate"):
        SCVI(variant("covariates"), batch="a").decode(z, counts)
    mdata = mudata.MuData({"rna": counts})
    with pytest.raises(TypeError, match="The SCVI reads an AnnData: pass a modality of the MuData, one of 'rna'"):
        SCVI(variant("nb")).embed(mdata)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.zeros((700, 7)), r"SCVI decodes a latent of 6 dimensions; got an array of shape \(700, 7\)"),
        (np.zeros(6), r"SCVI decodes a latent of 6 dimensions; got an array of shape \(6,\)"),
        (np.zeros((699, 6)), "The latent has 699 rows and data 700 cells"),
    ],
    ids=["width", "one cell", "rows"],
)
def test_a_latent_of_another_shape(variant, counts, z, message):
    with pytest.raises(ValueError, match=message):
        SCVI(variant("nb")).decode(z, counts)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch": "d"}, "The model does not know the batch 'd'; it knows 'a', 'b', 'c'"),
        ({"library_size": 0}, "library_size=0 is neither a number of counts above 0 nor 'observed'"),
        ({"library_size": "latent"}, "library_size='latent' is neither"),
        ({"library_size": np.nan}, "library_size=nan is neither"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_are_wrong(variant, how, message):
    with pytest.raises(ValueError, match=message):
        SCVI(variant("nb"), **how)


def test_a_batch_where_there_are_none(variant):
    with pytest.raises(ValueError, match="batch='0', but the model was set up without batch_key=. Leave batch= out"):
        SCVI(variant("poisson"), batch="0")


def test_models_that_are_not_supported(counts):
    scvi.model.AUTOZI.setup_anndata(counts)
    with pytest.raises(TypeError, match="model= is a AUTOZI. .* of scvi.model: SCVI, SCANVI, LinearSCVI, MULTIVI"):
        SCVI(scvi.model.AUTOZI(counts))
    scvi.model.SCVI.setup_anndata(counts)
    with pytest.raises(ValueError, match="The SCVI is not trained. Call its train"):
        SCVI(scvi.model.SCVI(counts))


# ---- MULTIVI


@pytest.fixture(scope="module")
def _paired(_counts):
    """Genes as RNA, and the detection of others as the openness of regions."""
    rna, atac = _counts[:, :180].copy(), _counts[:, 180:].copy()
    atac.var_names = [f"chr1-{i}" for i in range(atac.n_vars)]
    atac.X = (atac.X > 0).astype(np.float32)
    atac.layers["counts"] = atac.X * 3
    mdata = mudata.MuData({"expression": rna, "peaks": atac})
    mdata.obs = mdata.obs.assign(**{name: _counts.obs[name] for name in ("batch", "plate", "age", "depth", "open")})
    return mdata


@pytest.fixture
def paired(_paired):
    """The same, with the modalities in another order."""
    mdata = mudata.MuData({name: _paired[name].copy() for name in ("peaks", "expression")})
    mdata.obs = _paired.obs.copy()
    return mdata


MODALITIES = {"modalities": {"rna_layer": "expression", "atac_layer": "peaks"}, "batch_key": "batch"}
MULTI = {
    "batch": (MODALITIES, {}),
    "covariates": (MODALITIES | KEYS | {"atac_layer": "counts"}, {"encode_covariates": True, "gene_likelihood": "nb"}),
    "covariates of the decoder": (MODALITIES | KEYS, {"modality_weights": "universal"}),
    "size factors": (MODALITIES | {"size_factor_key": ["depth", "open"]}, {}),
    "logistic normal": ({"modalities": MODALITIES["modalities"]}, {"latent_distribution": "ln"}),
}


@pytest.fixture(scope="module")
def multi(_paired):
    made = {}

    def get(name):
        if name not in made:
            keys, how = MULTI[name]
            made[name] = trained(scvi.model.MULTIVI, _paired, keys=keys, **how)
        return made[name]

    return get


@pytest.mark.parametrize("name", MULTI)
def test_both_modalities_are_the_models_own(multi, paired, name, compare):
    trained = multi(name)
    before = compare.state(paired)
    model = SCVI(trained, library_size="observed", log1p=False)
    z = model.embed(paired)
    inferred, generated = own(trained)
    if name != "logistic normal":
        np.testing.assert_allclose(z, trained.get_latent_representation(), **CLOSE)
    else:
        np.testing.assert_allclose(z, torch.softmax(inferred["qz_m"], dim=-1).numpy(), **CLOSE)
    for latent in (z, np.random.default_rng(1).normal(size=z.shape).astype(np.float32)):
        _, generated = own(trained, latent)
        found = model.decode(latent, paired)
        assert set(found) == {"expression", "peaks"}
        np.testing.assert_allclose(found["expression"].X, generated["px_rate"].numpy(), **CLOSE)
        np.testing.assert_allclose(found["peaks"].X, generated["p"].numpy(), **CLOSE)
    assert {part.uns["scale"] for part in found.values()} == {"linear"}
    for modality, part in found.items():
        assert part.var_names.equals(paired[modality].var_names) and part.obs_names.equals(paired.obs_names)

    found = SCVI(trained).decode(latent, paired)
    shares = generated["px_scale"].numpy()
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["expression"].X, np.log1p(1e4 * shares), **CLOSE)
    np.testing.assert_allclose(found["peaks"].X, generated["p"].numpy(), **CLOSE)
    assert {name: part.uns["scale"] for name, part in found.items()} == {"expression": "log1p", "peaks": "linear"}

    if name != "logistic normal":
        _, generated = own(trained, latent, batch=torch.full((700, 1), 1))
        found = SCVI(trained, batch="b", library_size=1, log1p=False).decode(latent, paired["expression"])
        np.testing.assert_allclose(found["peaks"].X, generated["p"].numpy(), **CLOSE)
    compare.assert_same(compare.state(paired), before)


def zero(adata, cells):
    adata.X = sparse.csr_matrix(adata.X.multiply(~cells[:, None]), dtype=np.float32)


def test_cells_that_a_modality_lacks_are_padded_as_multivi_wants_them(multi, paired):
    trained = multi("batch")
    partial = mudata.MuData(
        {"expression": paired["expression"][100:].copy(), "peaks": paired["peaks"][:650][::-1].copy()}
    )
    partial.obs["batch"] = paired.obs["batch"].reindex(partial.obs_names)
    partial = partial[paired.obs_names[np.random.default_rng(0).permutation(700)]].copy()
    assert partial["expression"].n_obs == 600 and partial["peaks"].n_obs == 650

    padded = paired.copy()
    zero(padded["expression"], np.arange(700) < 100)
    zero(padded["peaks"], np.arange(700) >= 650)
    padded.obs["_indices"] = np.arange(700)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pd.DataFrame(trained.get_latent_representation(padded), index=padded.obs_names)
    model = SCVI(trained, library_size="observed")
    z = model.embed(partial)
    np.testing.assert_allclose(z, expected.loc[partial.obs_names], **CLOSE)
    np.testing.assert_allclose(
        model.decode(z, partial)["expression"].X,
        model.decode(expected.to_numpy(), padded)["expression"][partial.obs_names].X,
        **CLOSE,
    )


def test_bad_input_to_multivi(multi, paired):
    model = SCVI(multi("batch"))
    with pytest.raises(
        TypeError, match="The MULTIVI reads counts from a MuData with the modality 'expression', and got an AnnData"
    ):
        model.embed(paired["expression"])
    with pytest.raises(ValueError, match="The MuData has no modality 'expression'; it has 'peaks'"):
        model.embed(mudata.MuData({"peaks": paired["peaks"]}))
    fewer = mudata.MuData({"expression": paired["expression"], "peaks": paired["peaks"][:, 30:]})
    with pytest.raises(
        ValueError, match=r"mdata.mod\['peaks'\] lacks 30 of the 120 regions \(25.0%\) that the MULTIVI reads"
    ):
        model.embed(fewer)
    paired["peaks"].X *= 0.1
    with pytest.raises(ValueError, match=r"mdata.mod\['peaks'\].X does not hold counts, which the MULTIVI reads"):
        model.embed(paired)
    paired.obs["batch"] = "new"
    with pytest.raises(
        ValueError, match=r"mdata.obs\['batch'\] has 700 cells of 'new', which the model does not know as batch"
    ):
        model.decode(np.zeros((700, 6)), paired)


def test_multivi_with_weights_of_each_cell(_paired):
    model = SCVI(trained(scvi.model.MULTIVI, _paired, keys=MODALITIES, modality_weights="cell"))
    with pytest.raises(ValueError, match="modality weights of each training cell"):
        model.embed(_paired)
    assert model.decode(np.zeros((700, 6)), _paired)["peaks"].shape == (700, 120)


# ---- Real data


def path(name):
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} is not in {FOLDER}; set SAE_TEST_DATA to the folder that has it")
    return FOLDER / name


def test_real_counts():
    adata = ad.read_h5ad(path("pbmc3k_hvg2000_counts_labeled.h5ad"))
    model = trained(scvi.model.SCVI, adata)
    found = SCVI(model, library_size="observed", log1p=False)
    z = found.embed(adata)
    np.testing.assert_allclose(z, model.get_latent_representation(), **CLOSE)
    np.testing.assert_allclose(found.decode(z, adata).X, mean_counts(own(model)[1]["px"]), **CLOSE)


def test_real_multiome():
    mdata = mudata.read_h5mu(path("bmmc_multiome_neurips2021_500cells.h5mu"))
    model = trained(scvi.model.MULTIVI, mdata, keys={"modalities": {"rna_layer": "rna", "atac_layer": "atac"}})
    found = SCVI(model, library_size="observed", log1p=False)
    z = found.embed(mdata)
    np.testing.assert_allclose(z, model.get_latent_representation(), **CLOSE)
    decoded, (_, generated) = found.decode(z, mdata), own(model)
    np.testing.assert_allclose(decoded["rna"].X, generated["px_rate"].numpy(), **CLOSE)
    np.testing.assert_allclose(decoded["atac"].X, generated["p"].numpy(), **CLOSE)


def test_a_cell_may_be_there_several_times(multi, paired):
    """As when steering decodes the same cells at several latents."""
    model = SCVI(multi("batch"), library_size="observed")
    z = model.embed(paired)
    rows = [5, 5, 3, 5]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        found = model.decode(z[rows], paired[rows])
    for modality, part in model.decode(z, paired).items():
        np.testing.assert_allclose(found[modality].X, part.X[rows], rtol=1e-5)


@pytest.mark.parametrize("data", [None, np.zeros((3, 6))], ids=["None", "array"])
def test_other_things_than_cells(variant, data):
    model = SCVI(variant("nb"))
    for call in (model.embed, lambda data: model.decode(np.zeros((3, 6)), data)):
        with pytest.raises(TypeError, match="Expected an AnnData or a MuData, got"):
            call(data)
