"""multiDGD against the package itself: `multidgd/make_fixture.py` trained two models with it and kept what it says of them."""

from __future__ import annotations

import json
import shutil
import warnings
from functools import cache
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from scipy.special import logsumexp

import sae
from sae.models._multidgd import MultiDGD

FILES = Path(__file__).parent / "multidgd"
SPLITS = ["train", "validation", "test"]
MODELS = {"multiome": {"GEX": slice(0, 20), "ATAC": slice(20, 110)}, "rna": {"rna": slice(0, 25)}}


@cache
def package(name: str) -> dict[str, np.ndarray]:
    """What the package says of a model, and the cells."""
    with np.load(FILES / name / "package.npz") as found:
        return dict(found)


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(FILES / name / "_obs.csv", index_col=0, dtype=str)


def cells(name: str = "multiome", split: str | None = None, layout: str = "csr") -> ad.AnnData:
    """All cells, or those of a split in the package's order, with the modalities as multiDGD expects them."""
    found = package(name)
    counts = found["counts"].astype(np.float32)
    var = pd.DataFrame(index=found["var_names"])
    var["modality"] = ""
    for modality, columns in MODELS[name].items():
        var.iloc[columns, 0] = modality
    adata = ad.AnnData(sparse.csr_matrix(counts) if layout == "csr" else counts, table(name), var)
    return adata if split is None else adata[adata.obs["train_val_test"] == split].copy()


def as_mudata(adata: ad.AnnData) -> mudata.MuData:
    """The same as a MuData with the usual names."""
    names = {"GEX": "rna", "ATAC": "atac", "rna": "rna"}
    modalities = adata.var["modality"]
    return mudata.MuData({names[m]: adata[:, modalities == m].copy() for m in modalities.unique()})


def proportions(name: str = "multiome", **options) -> MultiDGD:
    return MultiDGD(FILES / name, library_size=1, log1p=False, progress=False, **options)


def forgetting(name: str, split: str) -> dict:
    """Options for a model that does not know the cells of a split, and searches for them."""
    obs = table(name)
    if split == "test":
        obs.loc[obs["train_val_test"] == split, "train_val_test"] = "none"
    else:
        obs.index = obs.index.where(obs["train_val_test"] != split, "other " + obs.index)
    return {"obs": obs, "new_cells": "optimise"}


def predictions(predicted: ad.AnnData | dict[str, ad.AnnData]) -> list[ad.AnnData]:
    return [predicted] if isinstance(predicted, ad.AnnData) else list(predicted.values())


# ---- What the package says


@pytest.mark.parametrize("convert", [lambda adata: adata, as_mudata], ids=["anndata", "mudata"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_decodes_as_the_package(name, split, convert):
    model, data, expected = proportions(name), convert(cells(name, split)), package(name)
    z = model.embed(data)
    np.testing.assert_array_equal(z, expected[f"{split}_z"])
    predicted = predictions(model.decode(z, data))
    assert len(predicted) == len(MODELS[name])
    for part, modality in zip(predicted, MODELS[name], strict=True):
        np.testing.assert_allclose(part.X, expected[f"{split}_{modality}"], rtol=0, atol=1e-6)
        assert part.X.std(axis=0).mean() > 1e-3, "the latent makes a difference"
        np.testing.assert_array_equal(part.obs_names, data.obs_names)
        np.testing.assert_array_equal(part.var_names, expected["var_names"][MODELS[name][modality]])
        assert part.uns["scale"] == "linear"


@pytest.mark.parametrize("name", MODELS)
def test_dispersion(name):
    model = proportions(name)
    assert model.modalities == tuple(MODELS[name])
    for modality, dispersion in model.dispersion.items():
        np.testing.assert_allclose(dispersion, package(name)[f"dispersion_{modality}"], rtol=1e-6)


@pytest.mark.parametrize("split", SPLITS)
def test_covariates(split):
    found = proportions().covariates(cells(split=split))
    np.testing.assert_array_equal(found, package("multiome")[f"{split}_covariate"])
    assert proportions("rna").covariates(cells("rna", split)).shape == (len(cells("rna", split)), 0)


def test_cells_are_found_by_name():
    adata = cells()
    model = proportions()
    z, decoded = model.embed(adata), model.decode(model.embed(adata), adata)
    some = np.random.default_rng(1).permutation(adata.n_obs)[:23]
    np.testing.assert_array_equal(model.embed(adata[some]), z[some])
    for modality, part in model.decode(z[some], adata[some]).items():
        np.testing.assert_allclose(part.X, decoded[modality].X[some], rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_new_cells_as_the_package(name):
    model = proportions(name, n_epochs=20, **forgetting(name, "test"))
    adata = cells(name, "test")
    np.testing.assert_allclose(model.embed(adata), package(name)["test_z"], rtol=0, atol=1e-3)
    if name == "multiome":
        np.testing.assert_allclose(model.covariates(adata), package(name)["test_covariate"], rtol=0, atol=1e-3)


# ---- New cells


def objective(name: str, adata: ad.AnnData, model: MultiDGD, z: np.ndarray) -> np.ndarray:
    """log p(counts | z) + log p(z) + log p(z_cov) of each cell, by SciPy."""
    state = torch.load(FILES / name / "dgd.pt", weights_only=True)
    total = np.zeros(len(z))
    for part, (modality, columns) in zip(predictions(model.decode(z, adata)), MODELS[name].items(), strict=True):
        counts, r = adata.X.toarray()[:, columns], model.dispersion[modality]
        mean = part.X.astype(float) * counts.sum(axis=1, keepdims=True)
        total += stats.nbinom.logpmf(counts, r, r / (r + mean)).sum(axis=1)
    for key, latent in (("gmm", z), ("correction_gmm", model.covariates(adata))):
        if latent.shape[1]:
            mean, log_precision, weight = (state[f"{key}.{part}"].numpy() for part in ("mean", "neglogvar", "weight"))
            density = stats.norm.logpdf(latent[:, None], mean, np.exp(-log_precision / 2)).sum(axis=2)
            total += logsumexp(density + weight - logsumexp(weight), axis=1)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_new_cells_are_as_likely_as_those_of_training(name):
    adata = cells(name, "train")
    trained = proportions(name)
    searched = proportions(name, n_epochs=300, **forgetting(name, "train"))
    started = proportions(name, n_epochs=1, **forgetting(name, "train"))
    likely, found, start = (objective(name, adata, m, m.embed(adata)) for m in (trained, searched, started))
    # In nats per cell, of about 234 (110 features) and 69 (25 features).
    assert (found > start).mean() > 0.95 and (found - start).mean() > 5
    assert (found - likely).mean() > 0 and np.median(found - likely) > 0
    assert not np.array_equal(searched.embed(adata), trained.embed(adata))


def test_a_new_cell_does_not_depend_on_others():
    adata = cells(split="test")
    model = proportions(n_epochs=20, **forgetting("multiome", "test"))
    together = model.embed(adata)
    alone = np.vstack([model.embed(adata[i]) for i in range(3)])
    np.testing.assert_allclose(alone, together[:3], rtol=0, atol=1e-4)
    # Known cells among them, in any order.
    mixed = ad.concat([adata[:3], cells(split="train")[:2]])[[3, 0, 4, 2, 1]]
    z = model.embed(mixed)
    np.testing.assert_array_equal(z[[0, 2]], package("multiome")["train_z"][:2])
    np.testing.assert_allclose(z[[1, 4, 3]], together[:3], rtol=0, atol=1e-4)


def test_new_cells_with_one_modality():
    """The other is left out of the search, and predicted where its features have names."""
    adata, names = cells(split="test"), package("multiome")["var_names"]
    rna = as_mudata(adata)["rna"]
    options = {"n_epochs": 100, **forgetting("multiome", "test")}
    model = proportions(var_names={"rna": names[:20], "atac": names[20:]}, **options)
    z = model.embed(mudata.MuData({"rna": rna}))
    assert z.shape == (12, 5) and not np.array_equal(z, package("multiome")["test_z"])
    predicted = model.decode(z, mudata.MuData({"rna": rna}))
    assert list(predicted) == ["rna", "ATAC"]
    np.testing.assert_array_equal(predicted["ATAC"].var_names, names[20:])
    # Accessibility follows from the RNA: closer to the cell's own than the average is.
    counts = adata.X.toarray()[:, 20:]
    observed = counts / counts.sum(axis=1, keepdims=True)
    average = np.abs(observed - observed.mean(axis=0)).sum(axis=1)
    assert (np.abs(observed - predicted["ATAC"].X).sum(axis=1) < average).mean() > 0.7
    # An AnnData of RNA alone, and without the names of peaks.
    np.testing.assert_array_equal(model.embed(rna), z)
    only = proportions(**options)
    np.testing.assert_array_equal(only.embed(rna), z)
    np.testing.assert_array_equal(only.decode(z, rna).X, predicted["rna"].X)
    assert list(only.decode(z, mudata.MuData({"rna": rna}))) == ["rna"]


def test_covariates_of_new_cells_are_remembered():
    adata = cells(split="test")
    model = proportions(n_epochs=5, **forgetting("multiome", "test"))
    with pytest.raises(ValueError, match="does not know the covariate of 12 of 12 cells: 'cell"):
        model.decode(package("multiome")["test_z"], adata)
    z = model.embed(adata)
    first = model.decode(z, adata)
    assert model.covariates(adata[::-1]).shape == (12, 2)
    np.testing.assert_array_equal(model.embed(adata), z)
    np.testing.assert_array_equal(model.decode(z, adata)["GEX"].X, first["GEX"].X)
    # Other cells of the same names are searched for themselves.
    others = adata[::-1].copy()
    others.obs_names = adata.obs_names
    np.testing.assert_allclose(model.embed(others), z[::-1], rtol=0, atol=1e-4)


def test_a_table_of_cells_is_not_needed_for_new_ones(tmp_path):
    for file in ("dgd.pt", "dgd_hyperparameters.json"):
        shutil.copy(FILES / "multiome" / file, tmp_path / file)
    adata = cells(split="test")
    model = MultiDGD(tmp_path, new_cells="optimise", n_epochs=20, progress=False)
    np.testing.assert_allclose(model.embed(adata), package("multiome")["test_z"], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"12 of 12 cells .* no table of cells \(_obs.csv\).* as obs="):
        MultiDGD(tmp_path).embed(adata)
    with pytest.raises(ValueError, match="does not know the covariate of 12"):
        MultiDGD(tmp_path).decode(np.zeros((12, 5)), adata)
    with pytest.raises(ValueError, match="nothing says which cells"):
        MultiDGD(tmp_path, covariate="2")
    assert MultiDGD(tmp_path, covariate=[0, 1]).decode(np.zeros((12, 5)), adata)["GEX"].shape == (12, 20)


# ---- Options


def test_library_size():
    adata = cells(split="test")
    z, shares = package("multiome")["test_z"], package("multiome")["test_GEX"]
    default = MultiDGD(FILES / "multiome").decode(z, adata)["GEX"]
    np.testing.assert_allclose(default.X, np.log1p(1e4 * shares), rtol=1e-5)
    assert default.uns["scale"] == "log1p" and default.uns["log1p"] == {"base": None}
    scaled = MultiDGD(FILES / "multiome", library_size=500, log1p=False).decode(z, adata)["GEX"]
    np.testing.assert_allclose(scaled.X, 500 * shares, rtol=1e-5)


@pytest.mark.parametrize("layout", ["dense", "csr", "backed", "mudata"])
def test_library_as_observed(layout, tmp_path):
    adata = cells(split="test", layout="dense" if layout == "dense" else "csr")
    counts = cells(split="test").X.toarray()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(counts)
    data = as_mudata(adata) if layout == "mudata" else adata
    if layout == "backed":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        data = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    model = MultiDGD(FILES / "multiome", library_size="observed", log1p=False, layer="counts")
    predicted = model.decode(model.embed(data), data)
    for part, (modality, columns) in zip(predicted.values(), MODELS["multiome"].items(), strict=True):
        expected = counts[:, columns].sum(axis=1, keepdims=True) * package("multiome")[f"test_{modality}"]
        np.testing.assert_allclose(part.X, expected, rtol=1e-5)
    if layout == "backed":
        data.file.close()


def test_covariate():
    """A category stands for its component: here categories are numbers as text, so that the package orders 10, 2, 9."""
    adata, train = cells(), table("multiome").query("train_val_test == 'train'")
    state = torch.load(FILES / "multiome" / "dgd.pt", weights_only=True)
    for category in ("2", "9", "10"):
        (component,) = set(package("multiome")["train_component"][train["covariate_site"] == category])
        latent = state["correction_gmm.mean"][component].numpy()
        model = proportions(covariate=category)
        np.testing.assert_array_equal(model.covariates(adata), np.tile(latent, (60, 1)))
        z = model.embed(adata)
        same = proportions(covariate=latent).decode(z, adata)["GEX"].X
        np.testing.assert_array_equal(model.decode(z, adata)["GEX"].X, same)
        assert np.abs(proportions().decode(z, adata)["GEX"].X - same).max() > 1e-3


# ---- Which features


def test_modalities_are_recognised():
    adata = cells(split="test")
    model = proportions()
    z = model.embed(adata)
    expected = model.decode(z, adata)
    assert list(expected) == ["GEX", "ATAC"]
    assert list(model.decode(z, as_mudata(adata))) == ["rna", "atac"]
    other = adata.copy()
    other.var["feature_types"] = other.var.pop("modality").map({"GEX": "Gene Expression", "ATAC": "Peaks"})
    unlabelled = adata.copy()
    del unlabelled.var["modality"]
    for data in (other, unlabelled):
        for modality, part in model.decode(z, data).items():
            np.testing.assert_array_equal(part.X, expected[modality].X)
            np.testing.assert_array_equal(part.var_names, expected[modality].var_names)
    for columns, modality in ((slice(20), "GEX"), (slice(20, 110), "ATAC")):
        for data in (adata, unlabelled):
            alone = model.decode(z, data[:, columns])
            np.testing.assert_array_equal(alone.X, expected[modality].X)
    with pytest.raises(ValueError, match="data has 19 features, and the model 'GEX' with 20 features, 'ATAC' with 90"):
        model.decode(z, unlabelled[:, :19])
    with pytest.raises(ValueError, match=r"adata with var\['modality'\] = 'GEX' has 19 features"):
        model.decode(z, adata[:, 1:])
    with pytest.raises(ValueError, match="data has the modalities 'adt', and the model"):
        model.decode(z, mudata.MuData({"adt": adata[:, :20].copy()}))
    # Cells of a MuData have latents, whatever their features are.
    np.testing.assert_array_equal(model.embed(mudata.MuData({"adt": adata[:, :20].copy()})), z)


def test_features_by_name():
    """With var_names, features of data may come in any order, and with others between them."""
    adata, names = cells(split="test"), package("multiome")["var_names"]
    options = {"library_size": "observed", "var_names": {"GEX": names[:20], "ATAC": names[20:]}}
    options |= {"n_epochs": 20, "progress": False, **forgetting("multiome", "test")}
    known, model = MultiDGD(FILES / "multiome", library_size="observed"), MultiDGD(FILES / "multiome", **options)
    expected = known.decode(package("multiome")["test_z"], adata)
    more = ad.AnnData(sparse.csr_matrix(np.ones((12, 3), np.float32)), adata.obs)
    more.var_names, more.var["modality"] = ["x", "y", "z"], "GEX"
    shuffled = ad.concat([more, adata], axis="var", merge="same")
    shuffled = shuffled[:, np.random.default_rng(0).permutation(113)].copy()
    z = model.embed(shuffled)
    np.testing.assert_allclose(z, package("multiome")["test_z"], rtol=0, atol=1e-3)
    for modality, part in model.decode(z, shuffled).items():
        np.testing.assert_array_equal(part.var_names, expected[modality].var_names)
        np.testing.assert_allclose(part.X, expected[modality].X, rtol=1e-2)
    with pytest.raises(
        ValueError, match=r"lacks 2 of the 20 features \(10.0%\) that .*: 'gene0', 'gene1'\. .* as zeros"
    ):
        model.decode(z, adata[:, 2:])
    # Names are enough where no counts are read.
    names_only = proportions(var_names=options["var_names"])
    assert names_only.decode(z, adata[:, 2:])["GEX"].n_vars == 20
    assert list(names_only.decode(z, ad.AnnData(obs=adata.obs))) == ["GEX", "ATAC"]


@pytest.mark.parametrize("name", MODELS)
def test_features_in_another_order_are_refused(name):
    adata = cells(name)
    first = MODELS[name]["rna" if name == "rna" else "GEX"].stop
    totals = package(name)["counts"][:, :first].sum(axis=0)
    # In the place of the gene with most counts, that with fewest.
    order = np.r_[totals.argsort()[::-1][totals.argsort().argsort()], first : adata.n_vars]
    rows = [adata[:, order].copy(), as_mudata(adata[:, order].copy())]
    for data in rows:
        with pytest.raises(
            ValueError, match=r"probably not in the order .* correlation .* over 60 cells .* is -?0\.\d\d\."
        ):
            proportions(name).embed(data)
        assert proportions(name).embed(data[:49]).shape == (49, 5), "too few cells to tell"
    logs = adata.copy()
    logs.X = logs.X.log1p()
    assert proportions(name).embed(logs).shape == (60, 5)
    names = package(name)["var_names"]
    by_name = {modality: names[columns] for modality, columns in MODELS[name].items()}
    assert proportions(name, var_names=by_name).embed(rows[0]).shape == (60, 5)


@pytest.mark.parametrize(
    ("var_names", "error"),
    [
        ({"rna": ["a"] * 20}, r"var_names\['rna'\] has names that occur more than once \('a'\)"),
        ({"rna": list("abc")}, r"var_names\['rna'\] has 3 names; the model has 25 features of 'rna'"),
        ({"atac": list("abc")}, "var_names has 'atac'; the model has 'rna'"),
    ],
    ids=["repeated", "too few", "other modality"],
)
def test_bad_names_of_features(var_names, error):
    with pytest.raises(ValueError, match=error):
        MultiDGD(FILES / "rna", var_names=var_names)


# ---- Bad cells


@pytest.mark.parametrize("convert", [lambda adata: adata, as_mudata], ids=["anndata", "mudata"])
def test_data_stay_as_they_are(convert, compare):
    data = convert(cells())
    before = compare.state(data)
    model = MultiDGD(
        FILES / "multiome", library_size="observed", n_epochs=2, progress=False, **forgetting("multiome", "test")
    )
    model.decode(model.embed(data), data)
    compare.assert_same(before, compare.state(data))


def test_unknown_cells_are_named():
    adata = cells()[:9].copy()
    adata.obs_names = [*adata.obs_names[:7], "new1", "new2"]
    with pytest.raises(
        ValueError, match=r"2 of 9 cells .* in the checkpoint: 'new1', 'new2'\. .* new_cells='optimise'"
    ):
        proportions().embed(adata)
    adata.obs_names = [*adata.obs_names[:7], "new1", "new1"]
    with pytest.raises(
        ValueError, match=r"data has names that occur more than once \('new1'\).* obs_names_make_unique"
    ):
        proportions().embed(adata)
    with pytest.raises(ValueError, match="does not know the covariate of 2 of 9 cells: 'new1', 'new1'"):
        proportions().covariates(adata)


@pytest.mark.parametrize(
    ("shape", "error"),
    [((12, 4), r"MultiDGD decodes a latent of 5 dimensions; .* \(12, 4\)"), ((11, 5), "11 rows and data 12 cells")],
)
def test_a_latent_of_another_shape(shape, error):
    with pytest.raises(ValueError, match=error):
        proportions().decode(np.zeros(shape), cells(split="test"))


def test_counts_are_needed():
    adata = cells(split="test")
    z = package("multiome")["test_z"]
    adata.layers["logs"], adata.layers["negative"] = adata.X.log1p(), -adata.X
    observed = {"library_size": "observed"}
    searching = {"n_epochs": 1, "progress": False, **forgetting("multiome", "test")}
    for layer, value in (("logs", r"\d\.\d+"), ("negative", r"-\d+")):
        error = rf"adata with .* = 'GEX', layer '{layer}', does not hold counts, .* \({value} of 'gene\d+', for one\)"
        with pytest.raises(ValueError, match=error):
            MultiDGD(FILES / "multiome", layer=layer, **observed).decode(z, adata)
        with pytest.raises(ValueError, match=error):
            MultiDGD(FILES / "multiome", layer=layer, **searching).embed(adata)
    with pytest.raises(KeyError, match="has no layer 'counts'; it has 'logs', 'negative'"):
        MultiDGD(FILES / "multiome", layer="counts", **observed).decode(z, adata)
    names = package("multiome")["var_names"]
    by_name = {"rna": names[:20], "atac": names[20:]}
    model = MultiDGD(FILES / "multiome", var_names=by_name, **observed)
    with pytest.raises(ValueError, match="data has no counts of 'ATAC' to scale its prediction to"):
        model.decode(z, mudata.MuData({"rna": as_mudata(adata)["rna"]}))
    with pytest.raises(ValueError, match="data has none of the modalities 'GEX', 'ATAC'"):
        MultiDGD(FILES / "multiome", var_names=by_name, **searching).embed(ad.AnnData(obs=adata.obs))


def test_unpaired_cells():
    mdata = as_mudata(cells(split="test"))
    mdata = mudata.MuData({"rna": mdata["rna"], "atac": mdata["atac"][:8].copy()})
    model = proportions(n_epochs=1, **forgetting("multiome", "test"))
    with pytest.raises(ValueError, match=r"4 cells of the MuData are not in mdata.mod\['atac'\].*intersect_obs"):
        model.embed(mdata)
    assert proportions().embed(mdata).shape == (12, 5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"library_size": 0}, "library_size=0 is neither a number of counts above 0 nor 'observed'"),
        ({"library_size": "mean"}, "library_size='mean' is neither"),
        ({"new_cells": "skip"}, "new_cells='skip' is neither 'error' nor 'optimise'"),
        ({"n_epochs": 0}, "n_epochs=0: new cells need one step"),
        ({"covariate": "7"}, "covariate='7': covariate_site has '10', '2', '9'"),
        ({"covariate": [1, 2, 3]}, "neither a category .* nor a latent of 2 finite numbers"),
        ({"covariate": [1, np.nan]}, "neither a category .* nor a latent of 2 finite numbers"),
        ({"obs": pd.DataFrame(index=["a"])}, "obs= has no column 'train_val_test'; it has none"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        MultiDGD(FILES / "multiome", **options)


def test_a_covariate_that_the_model_does_not_have():
    with pytest.raises(ValueError, match="covariate='2', but the model has no covariate"):
        MultiDGD(FILES / "rna", covariate="2")


# ---- Bad files


@pytest.fixture
def folder(tmp_path):
    """The files of a model, to be spoilt."""
    for file in ("dgd.pt", "dgd_hyperparameters.json", "_obs.csv"):
        shutil.copy(FILES / "multiome" / file, tmp_path / file)
    return tmp_path


def edited(folder: Path, **changes: torch.Tensor | None) -> None:
    state = torch.load(folder / "dgd.pt", weights_only=True)
    for key, value in changes.items():
        state[key.replace("__", ".")] = value
    torch.save({key: value for key, value in state.items() if value is not None}, folder / "dgd.pt")


class Trap:
    """Unpickling this runs code."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_is_unpickled(folder, legacy):
    state = torch.load(folder / "dgd.pt", weights_only=True)
    torch.save(state | {"trap": Trap(folder / "sprung")}, folder / "dgd.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"dgd.pt is damaged, or holds more than tensors\. It is not unpickled"):
        MultiDGD(folder)
    assert not (folder / "sprung").exists()
    torch.load(folder / "dgd.pt", weights_only=False)
    assert (folder / "sprung").exists(), "the trap works"


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
def test_damaged_weights(folder, content):
    (folder / "dgd.pt").write_bytes(content)
    with pytest.raises(ValueError, match="dgd.pt is damaged"):
        MultiDGD(folder)


def test_weights_that_are_no_state_dict(folder):
    torch.save([torch.zeros(2)], folder / "dgd.pt")
    with pytest.raises(ValueError, match="dgd.pt is not a state dict"):
        MultiDGD(folder)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"decoder__main__2__bias": None, "gmm__weight": None},
            r"dgd.pt lacks 2 parameters of the model: 'gmm.weight', 'decoder.main.2.bias'",
        ),
        ({"correction_gmm__mean": None}, "lacks 1 parameters of the model: 'correction_gmm.mean'"),
        ({"correction_val_rep__z": None}, "lacks 1 parameters of the model: 'correction_val_rep.z'"),
        (
            {"decoder__main__0__weight": torch.zeros(8, 5)},
            r"decoder.main.0.weight has the shape \(8, 5\); expected 8 × 7",
        ),
        ({"representation__z": torch.zeros(40, 4)}, r"representation.z has the shape \(40, 4\); expected any × 5"),
        ({"gmm__weight": torch.zeros(3, 1)}, r"gmm.weight has the shape \(3, 1\); expected 3\."),
        ({"gmm__mean": torch.full((3, 5), torch.nan)}, "gmm.mean has NaN or infinite values"),
    ],
    ids=["missing", "covariate", "validation", "shape", "latent", "dimensions", "nan"],
)
def test_bad_parameters(folder, changes, error):
    edited(folder, **changes)
    with pytest.raises(ValueError, match=error):
        MultiDGD(folder)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", r"dgd_hyperparameters.json is not JSON"),
        ("[]", "lacks 'latent_dimension', 'n_components'"),
        ({"n_units": None}, r"dgd_hyperparameters.json lacks 'n_units'\."),
        ({"modalities": ["GEX"]}, "has 1 modalities, and numbers of features of 2"),
        ({"n_features_per_modality": [90, 20]}, r"does not fit .* has the shape \(1, 20\); expected 1 × 90"),
    ],
    ids=["broken", "no object", "missing", "modalities", "features"],
)
def test_bad_hyperparameters(folder, content, error):
    file = folder / "dgd_hyperparameters.json"
    if isinstance(content, dict):
        merged = json.loads(file.read_text()) | content
        content = json.dumps({key: value for key, value in merged.items() if value is not None})
    file.write_text(content)
    with pytest.raises(ValueError, match=error):
        MultiDGD(folder)


def test_missing_files(folder):
    with pytest.raises(FileNotFoundError, match="There is no folder '.*elsewhere'"):
        MultiDGD(folder / "elsewhere")
    (folder / "dgd.pt").rename(folder / "weights.pt")
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*dgd.pt'"):
        MultiDGD(folder)
    (folder / "dgd_hyperparameters.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="no file '<name>_hyperparameters.json'.* it has '_obs.csv', 'weights.pt'"
    ):
        MultiDGD(folder)
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*weights_hyperparameters.json'"):
        MultiDGD(folder, name="weights")


def test_several_models_in_a_folder(folder):
    for file in ("dgd.pt", "dgd_hyperparameters.json"):
        shutil.copy(folder / file, folder / file.replace("dgd", "second"))
    with pytest.raises(ValueError, match="has several models: 'dgd', 'second'. Pass one of them as name="):
        MultiDGD(folder)
    assert MultiDGD(folder, name="second").n_latent == 5


def test_which_table_of_cells(folder):
    adata, z = cells(split="train"), package("multiome")["train_z"]
    for file in ("dgd_obs.csv", "models_obs.csv"):
        for other in folder.glob("*_obs.csv"):
            other.rename(folder / file)
        np.testing.assert_array_equal(MultiDGD(folder).embed(adata), z)
    shutil.copy(folder / "models_obs.csv", folder / "other_obs.csv")
    with pytest.raises(ValueError, match="has several tables of cells: 'models_obs.csv', 'other_obs.csv'"):
        MultiDGD(folder)
    np.testing.assert_array_equal(MultiDGD(folder, obs=cells().obs).embed(adata), z)


def test_a_table_of_other_cells(folder):
    obs = table("multiome")
    obs[obs["train_val_test"] != "validation"].to_csv(folder / "_obs.csv")
    with pytest.raises(ValueError, match="latents of 8 validation cells, and the table of cells 0 of them.* as obs="):
        MultiDGD(folder)
    obs.set_axis(["twin"] * 2 + list(obs.index[2:])).to_csv(folder / "_obs.csv")
    with pytest.raises(ValueError, match=r"_obs.csv has cell names that occur more than once \('twin'\)"):
        MultiDGD(folder)
    # Of the test cells, latents may be missing, or those of others: then they are new.
    edited(folder, test_rep__z=torch.zeros(3, 5), correction_test_rep__z=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="12 of 60 cells have no latent"):
        MultiDGD(folder, obs=obs).embed(cells())
    edited(folder, test_rep__z=None, correction_test_rep__z=None)
    with pytest.raises(ValueError, match="12 of 60 cells have no latent"):
        MultiDGD(folder, obs=obs).embed(cells())


def test_names_of_cells_that_look_like_numbers(folder):
    obs = table("multiome").set_axis([f"{i:03}" for i in range(59)] + ["NA"])
    obs.to_csv(folder / "_obs.csv")
    adata = cells()
    expected = proportions().embed(adata)
    adata.obs_names = obs.index
    np.testing.assert_array_equal(MultiDGD(folder).embed(adata), expected)


# ---- Steering


@pytest.mark.parametrize("library_size", [1e4, "observed"])
@pytest.mark.parametrize("convert", [lambda adata: adata, as_mudata], ids=["anndata", "mudata"])
def test_steering(convert, library_size):
    """Controls decode the same cells several times, with the covariate of each."""
    data, model = convert(cells()), MultiDGD(FILES / "multiome", library_size=library_size)
    data.obsm["X_dgd"] = model.embed(data)
    sae.tl.fit(data, use_rep="X_dgd", n_features=8, steps=50, progress=False)
    sae.tl.encode(data)
    sae.tl.steer(data, 0, model=model, value=1.0, doses=[1.0], n_controls=3, progress=False)
    genes = sae.get.steering(data)
    assert set(genes["modality"]) == ({"GEX", "ATAC"} if isinstance(data, ad.AnnData) else {"rna", "atac"})
    assert np.isfinite(genes["change"]).all()


@pytest.mark.parametrize("convert", [lambda adata: adata, as_mudata], ids=["anndata", "mudata"])
def test_a_cell_may_be_there_several_times(convert):
    data, rows = convert(cells()), [5, 5, 3, 5]
    model = MultiDGD(FILES / "multiome", library_size="observed")
    z = model.embed(data)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique")
        found = model.decode(z[rows], data[rows])
    for modality, part in model.decode(z, data).items():
        np.testing.assert_allclose(found[modality].X, part.X[rows], rtol=1e-5)


def test_other_things_than_cells():
    for call in (proportions().embed, lambda data: proportions().decode(np.zeros((3, 5)), data)):
        with pytest.raises(TypeError, match="Expected an AnnData or a MuData, got ndarray"):
            call(np.zeros((3, 5)))
