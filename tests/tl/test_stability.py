from __future__ import annotations

import signal

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse
from scipy.optimize import linear_sum_assignment

import sae
from sae.core.preprocess import fit_scaling
from sae.tl import _stability

QUICK = {"n_features": 12, "k": 3, "steps": 60, "progress": False}
COLUMNS = ["stability", "stability_best", "stability_activation", "stability_found"]
CURVE = {"source": "category", "measure": "category", "threshold": "float64", "share": "float64"}
SUMMARY = {
    "source": "category",
    "n_features": "int64",
    **dict.fromkeys([*COLUMNS, "nearest_other", "pw_mcc", "pw_mcc_sd"], "float64"),
}


@pytest.fixture
def small(make_adata):
    """80 cells with an SAE of 12 features."""
    adata = make_adata()
    sae.tl.fit(adata, **QUICK)
    sae.tl.encode(adata)
    return adata


def stability(adata, n_seeds=2, **how):
    sae.tl.stability(adata, n_seeds=n_seeds, progress=False, **how)
    stored = adata.uns["sae"]["stability"]
    return adata.uns["sae"]["features"][COLUMNS], stored["curve"], stored["summary"].set_index("source")


def same_seed(monkeypatch):
    monkeypatch.setattr(_stability, "_other_seeds", lambda n, seed, drawn_from: [seed] * n)


def test_writes_columns_and_tables(small, compare):
    before = compare.state(small)
    assert sae.tl.stability(small, n_seeds=3) is None
    stored = small.uns["sae"].pop("stability")
    features = small.uns["sae"]["features"]
    small.uns["sae"]["features"] = features.drop(columns=COLUMNS)
    compare.assert_same(before, compare.state(small))

    assert list(features)[-4:] == COLUMNS and features[COLUMNS].dtypes.eq(np.float64).all()
    assert stored["curve"].dtypes.astype(str).to_dict() == CURVE
    assert stored["summary"].dtypes.astype(str).to_dict() == SUMMARY
    assert stored["summary"]["source"].tolist() == ["sae", "cells", "random"]
    of_run = stored["params"]
    assert (of_run["n_seeds"], of_run["subsample"]) == (3, None)
    assert len(set(of_run["seeds"])) == 3 and 0 not in of_run["seeds"]


@pytest.mark.parametrize("preprocess", ["center", "standardize", "whiten"])
def test_is_what_separate_fits_give(make_adata, preprocess):
    """Train the same SAEs by hand, and match them with SciPy over dense matrices."""
    small, how = make_adata(), {**QUICK, "preprocess": preprocess}
    small.obsm["X_pca"] *= np.array([4, 3, 2, 1, 1, 0.5], np.float32)
    sae.tl.fit(small, **how)
    sae.tl.encode(small)
    columns, curve, summary = stability(small)
    x, scaling = small.obsm["X_pca"], fit_scaling(small.obsm["X_pca"], preprocess)

    def of(data):
        rows = data.uns["sae"]["weights"]["W_dec"].astype(np.float64)
        rows = rows @ scaling.forward if preprocess == "whiten" else rows * scaling.forward
        return rows / np.linalg.norm(rows, axis=1, keepdims=True), data.obsm["sae"].toarray()

    D, a = of(small)
    alive = a.any(axis=0)
    cosines, correlations, dictionaries = [], [], [D]
    for seed in small.uns["sae"]["stability"]["params"]["seeds"]:
        other = ad.AnnData(obsm={"X_pca": x})
        sae.tl.fit(other, **how, rng=int(seed))
        sae.tl.encode(other)
        D_other, a_other = of(other)
        alive_other = a_other.any(axis=0)
        dictionaries.append(D_other)
        cosines.append(D[alive] @ D_other[alive_other].T)
        with np.errstate(invalid="ignore"):
            correlations.append(np.corrcoef(a[:, alive].T, a_other[:, alive_other].T)[: alive.sum(), alive.sum() :])

    def mean(similarities):
        found = np.zeros((len(similarities), alive.sum()))
        for row, similarity in zip(found, similarities, strict=True):
            i, j = linear_sum_assignment(np.maximum(similarity, 0), maximize=True)
            row[i] = np.maximum(similarity[i, j], 0)
        return found

    cosine, r = mean(cosines), mean(correlations)
    of_alive = columns[alive]
    np.testing.assert_allclose(of_alive["stability"], cosine.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(of_alive["stability_best"], np.mean([c.max(axis=1) for c in cosines], axis=0), atol=1e-5)
    np.testing.assert_allclose(of_alive["stability_activation"], r.mean(axis=0), atol=1e-5)
    within = D[alive] @ D[alive].T - 2 * np.eye(alive.sum())
    found = np.arccos(cosine) <= np.minimum(np.arccos(within.max(axis=1)), np.pi / 2) / 2
    np.testing.assert_allclose(of_alive["stability_found"], found.mean(axis=0))
    assert columns[~alive].isna().all(axis=None)

    pairs = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        similarity = np.abs(dictionaries[i] @ dictionaries[j].T)
        pairs.append(similarity[linear_sum_assignment(similarity, maximize=True)].mean())
    assert summary.loc["sae", "pw_mcc"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert summary.loc["sae", "pw_mcc_sd"] == pytest.approx(np.std(pairs, ddof=1), abs=1e-5)
    assert summary.loc["sae", "n_features"] == alive.sum()
    assert summary.loc["sae", "nearest_other"] == pytest.approx(within.max(axis=1).mean(), abs=1e-5)
    np.testing.assert_allclose(summary.loc["sae", COLUMNS].astype(float), of_alive.mean(), rtol=1e-6)
    for measure, values in (("decoder", cosine), ("activation", r)):
        rows = curve[(curve["source"] == "sae") & (curve["measure"] == measure)]
        expected = [(values.mean(axis=0) >= t - 1e-6).mean() for t in rows["threshold"]]
        np.testing.assert_allclose(rows["share"], expected, atol=1.01 / alive.sum())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"architecture": "vanilla", "k": None},
        {"architecture": "topk", "preprocess": "whiten"},
        {"architecture": "jumprelu", "k": None, "l0": 0.05},
        {"architecture": "relu", "k": None, "l1": 0.01, "recipe": "paper", "learning_rate": 1e-3},
        {"k": "auto", "validation": 0.2, "batch_size": 16},
    ],
    ids=["default", "vanilla", "whiten", "jumprelu", "paper", "auto"],
)
def test_the_same_seed_gives_the_same_features(make_adata, settings, monkeypatch):
    """The stored settings train the stored SAE again, whatever they are."""
    adata = make_adata()
    sae.tl.fit(adata, **{**QUICK, **settings})
    sae.tl.encode(adata)
    same_seed(monkeypatch)
    columns, curve, summary = stability(adata, n_seeds=1)
    alive = ~adata.uns["sae"]["features"]["dead"]
    np.testing.assert_allclose(columns[alive].iloc[:, :3], 1, atol=1e-5)
    assert summary.loc["sae", "pw_mcc"] == pytest.approx(1, abs=1e-5)
    ours = curve[(curve["source"] == "sae") & (curve["threshold"] < 0.99)]
    assert ours["share"].eq(1).all()


def test_real_features_come_back_more_than_random_ones(encoded):
    columns, _, summary = stability(encoded)
    assert summary.loc["sae", "stability"] > summary.loc["random", "stability"] + 0.1
    assert summary.loc["sae", "nearest_other"] < summary.loc["cells", "nearest_other"]
    assert columns["stability_best"].ge(columns["stability"] - 1e-9).all()


def test_depends_on_the_seed_alone(small):
    one, other = (stability(small, rng=rng)[0] for rng in (0, 0))
    pd.testing.assert_frame_equal(one, other)
    assert not one.equals(stability(small, rng=1)[0])
    state = np.random.get_state()[1].copy()
    stability(small, rng=None)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_never_the_seed_of_the_stored_one():
    drawn = _stability._other_seeds(3, 0, 0)
    others = _stability._other_seeds(3, drawn[1], 0)
    assert len(set(others)) == 3 and drawn[1] not in others and drawn[0] in others


def test_subsample_trains_on_a_share_and_compares_all_cells(small, monkeypatch):
    from sae.core import fitting

    seen = []
    plan = fitting.plan

    def noted(x, *args, **kwargs):
        seen.append(x)
        return plan(x, *args, **kwargs)

    monkeypatch.setattr(fitting, "plan", noted)
    columns, _, _ = stability(small, subsample=0.5)
    assert [len(x) for x in seen] == [40, 40] and not np.array_equal(*seen)
    cells = set(map(bytes, small.obsm["X_pca"]))
    assert all(len(set(map(bytes, x)) & cells) == 40 for x in seen)
    assert not columns.equals(stability(small)[0])


def with_x(adata, layout, folder):
    """The same cells with the embedding as X, dense, CSR or read from a file."""
    x = adata.obsm["X_pca"] if layout != "csr" else sparse.csr_matrix(adata.obsm["X_pca"])
    data = ad.AnnData(x, obs=adata.obs)
    if layout == "backed":
        data.write_h5ad(folder / "cells.h5ad")
        data = ad.read_h5ad(folder / "cells.h5ad", backed="r")
    return data


@pytest.mark.parametrize("layout", ["csr", "backed"])
def test_same_for_every_kind_of_input(make_adata, layout, tmp_path):
    found = []
    for kind in ("dense", layout):
        data = with_x(make_adata(), kind, tmp_path)
        sae.tl.fit(data, "X", **QUICK)
        sae.tl.encode(data)
        found.append(stability(data, subsample=0.6 if layout == "csr" else None)[0])
        if kind == "backed":
            data.file.close()
    # Batches of rows from disk come in another order.
    tolerance = 1e-5 if layout == "csr" else 0.3
    assert np.abs(found[0] - found[1])["stability"].mean() < tolerance


def test_from_disk_by_rows(make_adata, tmp_path, monkeypatch):
    data = with_x(make_adata(), "backed", tmp_path)
    sae.tl.fit(data, "X", **QUICK)
    sae.tl.encode(data)
    same_seed(monkeypatch)
    columns, _, _ = stability(data, n_seeds=1)
    np.testing.assert_allclose(columns["stability"].dropna(), 1, atol=1e-5)
    stability(data, n_seeds=1, subsample=0.5)
    data.file.close()


def test_in_a_mudata(make_mudata, monkeypatch):
    mdata = make_mudata()
    same_seed(monkeypatch)
    for where, holder in (({"mod": "rna"}, mdata["rna"]), ({}, mdata)):
        sae.tl.fit(mdata, "X_pca" if where else "X_joint", **QUICK, **where)
        sae.tl.encode(mdata, **where)
        sae.tl.stability(mdata, n_seeds=1, progress=False, **where)
        assert holder.uns["sae"]["features"]["stability"].dropna().to_numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("through", ["h5ad", "zarr"])
def test_survives_storage_and_goes_stale_with_the_features(small, through, tmp_path, compare):
    stability(small)
    if through == "h5ad":
        small.write_h5ad(tmp_path / "cells.h5ad")
        read = ad.read_h5ad(tmp_path / "cells.h5ad")
    else:
        store = zarr.storage.MemoryStore()
        small.write_zarr(store)
        read = ad.read_zarr(store)
    compare.assert_same(small.uns["sae"], read.uns["sae"])
    columns, *_ = stability(read)
    pd.testing.assert_frame_equal(columns, small.uns["sae"]["features"][COLUMNS], check_names=False)
    sae.tl.score_labels(read, "group")
    assert "stability" in read.uns["sae"] and "stability" in read.uns["sae"]["features"]
    sae.tl.encode(read)
    assert "stability" not in read.uns["sae"] and "stability" not in read.uns["sae"]["features"]


def test_one_more_seed_has_no_spread(small):
    summary = stability(small, n_seeds=1)[2]
    assert summary["pw_mcc_sd"].isna().all() and summary["pw_mcc"].notna().all()


def test_genes_in_another_order_are_the_same_representation(make_adata, monkeypatch):
    adata = make_adata()
    sae.tl.fit(adata, "X", **QUICK)
    sae.tl.encode(adata)
    turned = adata[:, ::-1].copy()
    same_seed(monkeypatch)
    assert stability(turned, n_seeds=1)[0]["stability"].dropna().to_numpy() == pytest.approx(1, abs=1e-5)


def other_values(adata):
    adata.obsm["X_pca"][0] += 1
    return adata


def of_other_cells(a):
    """An SAE that was trained elsewhere has no fingerprint of these cells."""
    a.uns["sae"]["params"]["fingerprint"] = ""
    return a


def without(name):
    def change(adata):
        del adata.uns["sae"]["params"][name]
        return adata

    return change


BAD = {
    "no SAE": (lambda a: a, {"key": "other"}, KeyError, "has no SAE 'other'"),
    "not encoded": (lambda a: (a.uns["sae"].pop("features"), a)[1], {}, KeyError, "encode"),
    "embedding gone": (lambda a: (a.obsm.pop("X_pca"), a)[1], {}, KeyError, "obsm has no 'X_pca'"),
    "other values": (other_values, {}, ValueError, "is not what 'sae' was trained on"),
    "fewer cells": (lambda a: a[:50].copy(), {}, ValueError, r"\(50 cells\).*trained on \(80 cells\)"),
    "no seeds": (lambda a: a, {"n_seeds": 0}, ValueError, "n_seeds=0"),
    "half a seed": (lambda a: a, {"n_seeds": 1.5}, ValueError, "n_seeds=1.5"),
    "all cells": (lambda a: a, {"subsample": 1}, ValueError, "subsample=1"),
    "not a share": (lambda a: a, {"subsample": "half"}, ValueError, "subsample='half' is not a share"),
    "too few cells": (lambda a: a, {"subsample": 0.05}, ValueError, "on 4 of 80 cells .subsample=0.05.*has 4 cells"),
    "no such device": (lambda a: a, {"device": "gpu"}, ValueError, "device='gpu' is not 'auto'"),
    "an older SAE": (without("recipe"), {}, ValueError, "stored without 'recipe' in its params"),
    "not known on what": (of_other_cells, {}, ValueError, "is not what 'sae' was trained on"),
}


@pytest.mark.parametrize(("change", "how", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_data_alone(small, compare, change, how, error, message):
    data = change(small)
    before = compare.state(data)
    with pytest.raises(error, match=message):
        sae.tl.stability(data, **{"n_seeds": 1, "progress": False, **how})
    compare.assert_same(before, compare.state(data))


def test_too_few_cells_to_whiten_in_a_subsample(make_adata):
    adata = make_adata()
    sae.tl.fit(adata, **QUICK, preprocess="whiten")
    sae.tl.encode(adata)
    with pytest.raises(
        ValueError, match=r"cannot be trained on 40 of 80 cells \(subsample=0.5\); choose a larger share"
    ):
        sae.tl.stability(adata, n_seeds=1, subsample=0.5, progress=False)


def test_says_that_an_interrupted_sae_is_compared_with_whole_ones(small, log):
    small.uns["sae"]["params"]["ended"] = "interrupted"
    stability(small, n_seeds=1)
    assert "'sae' was interrupted; it is compared with SAEs that finish in its 60 steps" in log()


def test_measures_are_of_the_curve(small):
    stability(small, n_seeds=1)
    assert len(sae.get.stability(small, table="curve", measure="decoder")) == 3 * 51
    with pytest.raises(ValueError, match="measure='decoder' chooses rows of the curve. Pass table='curve'"):
        sae.get.stability(small, measure="decoder")


def test_interrupted_leaves_the_data_alone(small, compare, monkeypatch):
    from sae.core import fitting

    def interrupted(planned, *, on_step):
        def step(number, record):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            on_step(number, record)

        return fit(planned, on_step=step)

    fit = fitting.fit
    monkeypatch.setattr(fitting, "fit", interrupted)
    before = compare.state(small)
    with pytest.raises(KeyboardInterrupt):
        sae.tl.stability(small, n_seeds=2, progress=False)
    compare.assert_same(before, compare.state(small))
