from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import zarr
from joblib import cpu_count
from scipy import sparse

import sae

GRID = {"n_features": [8, 12], "k": [2, 3], "steps": 20}
QUIET = {"progress": False}


def sweep(data, grid=GRID, **settings):
    """The table without the seconds."""
    return sae.tl.sweep(data, grid, **{**QUIET, **settings}).drop(columns="seconds")


def same(a, b):
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture
def adata(make_adata):
    made = make_adata()
    made.obsm["truth"] = made.obsm["X_pca"][:, :2] * 2
    return made


@pytest.fixture
def info():
    """What Scanpy logs, in full."""
    import io

    before = sc.settings.logfile, sc.settings.verbosity
    stream = io.StringIO()
    sc.settings.logfile, sc.settings.verbosity = stream, "debug"
    yield stream.getvalue
    sc.settings.logfile, sc.settings.verbosity = before


# ---- The table


def test_a_row_per_run_with_what_was_chosen(pbmc):
    table = sae.tl.sweep(pbmc, {"n_features": [16, 32], "steps": 50}, groupby="bulk_labels", n_seeds=2, rng=5, **QUIET)
    assert table["setting"].tolist() == [0, 0, 1, 1] and table["seed"].tolist() == [5, 6, 5, 6]
    assert table["n_features"].tolist() == [16, 16, 32, 32] and table["k"].tolist() == [4, 4, 8, 8]
    assert set(table["architecture"]) == {"matryoshka"} and set(table["preprocess"]) == {"damped"}
    assert table["label_auroc"].between(0.6, 1).all() and table["stability"].between(0.1, 0.99).all()
    assert table["seconds"].gt(0).all() and not {"error", "l1", "truth_best", "early_stopping"} & set(table)
    pd.testing.assert_frame_equal(sae.get.sweep(pbmc), table, check_categorical=False)


@pytest.mark.parametrize("row", range(4))
def test_fit_trains_the_very_sae_of_a_row(adata, row):
    grid = {"architecture": ["topk", "vanilla"], "k": 3, "l1": 0.5, "n_features": [8, 12], "steps": 20}
    runs = sae.tl.sweep(adata, grid, rng=3, **QUIET)
    run = runs.loc[row]
    sparsity = {"k": int(run["k"])} if run["architecture"] == "topk" else {"l1": run["l1"]}
    settings = {name: run[name] for name in ("architecture", "preprocess", "n_features", "steps", "learning_rate")}
    sae.tl.fit(adata, **settings, **sparsity, rng=run["seed"], **QUIET)
    params = adata.uns["sae"]["params"]
    assert {name: params[name] for name in ("fvu", "val_fvu", "l0", "val_l0")} == {
        name: run[name] for name in ("fvu", "val_fvu", "l0", "val_l0")
    }


def test_fit_trains_the_very_sae_that_ended_early(adata):
    settings = {"n_features": 8, "k": 3, "early_stopping": 1, "learning_rate": 0.05}
    run = sae.tl.sweep(adata, settings | {"steps": 400}, **QUIET).loc[0]
    sae.tl.fit(adata, **settings, steps=run["steps"], **QUIET)
    params = adata.uns["sae"]["params"]
    assert params["ended"] == "early" and params["val_fvu"] == run["val_fvu"]


def test_settings_that_do_not_go_together(adata):
    table = sweep(adata, {"architecture": ["topk", "vanilla"], "k": [2, 3], "l1": 1, "n_features": 8, "steps": 20})
    assert table["architecture"].tolist() == ["topk", "topk", "vanilla"]
    np.testing.assert_array_equal(table["k"], [2, 3, np.nan])
    np.testing.assert_array_equal(table["l1"], [np.nan, np.nan, 1])


def test_truth_is_looked_for(adata):
    table = sweep(adata, truth="truth")
    sae.tl.fit(adata, n_features=8, k=2, steps=20, **QUIET)
    sae.tl.encode(adata)
    r = np.abs(np.corrcoef(adata.obsm["truth"].T, adata.obsm["sae"].toarray().T)[:2, 2:])
    assert table["truth_best"][0] == pytest.approx(np.nanmax(r, axis=1).mean())
    same(table, sweep(adata, truth=adata.obsm["truth"]))


def test_pareto_compares_means_over_seeds(pbmc):
    sweep(pbmc, {"n_features": 32, "k": [2, 4, 8], "steps": [20, 100]}, n_seeds=2)
    for pair in (("l0", "val_fvu"), ("l0", "stability")):
        table = sae.get.sweep(pbmc, pareto=pair)
        means = table.groupby("setting")[list(pair)].mean() * [1, 1 if pair[1] == "val_fvu" else -1]
        expected = [not ((means <= row).all(axis=1) & (means < row).any(axis=1)).any() for _, row in means.iterrows()]
        assert table["pareto"].tolist() == np.repeat(expected, 2).tolist()
        assert 0 < sum(expected) < 6


def test_data_of_any_kind_give_the_same(adata, make_mudata):
    expected = sweep(adata, use_rep="X_pca")
    adata.obsm["sparse"] = sparse.csr_matrix(adata.obsm["X_pca"])
    adata.obsm["frame"] = pd.DataFrame(adata.obsm["X_pca"], index=adata.obs_names)
    adata.layers["same"] = np.hstack([adata.obsm["X_pca"], np.zeros((80, 14), np.float32)])
    for rep in ("sparse", "frame"):
        same(sweep(adata, use_rep=rep), expected)
    assert sae.tl.sweep(adata, {"steps": 5, "n_features": 8}, layer="same", **QUIET)["fvu"].notna().all()
    assert adata.uns["sae_sweep"]["params"]["layer"] == "same" and adata.uns["sae_sweep"]["params"]["use_rep"] is None

    mdata = make_mudata()
    in_modality = sweep(mdata, mod="rna", groupby="group", key_added="grid")
    same(in_modality, sweep(mdata["rna"].copy(), groupby="group"))
    assert "grid" in mdata["rna"].uns and "grid" not in mdata.uns
    pd.testing.assert_series_equal(sae.get.sweep(mdata, key="grid", mod="rna")["fvu"], in_modality["fvu"])
    sweep(mdata, use_rep="X_joint", groupby="group")
    assert "sae_sweep" in mdata.uns


# ---- Failures


def test_a_run_that_fails_is_a_row(adata, log):
    table = sweep(adata, {"n_features": [8, 16], "k": [4, 12], "learning_rate": [0.01, 1e6], "steps": 20}, n_seeds=2)
    failed = table["error"].notna()
    assert failed.sum() == 10 and table.loc[failed, "fvu"].isna().all() and table.loc[~failed, "fvu"].notna().all()
    assert table.loc[failed, "error"].str.split(":").str[0].value_counts().to_dict() == {
        "DivergedError": 6,
        "ValueError": 4,
    }
    assert not table.loc[failed, "pareto"].any() and table["pareto"].any()
    assert "10 of 16 runs failed, the first with DivergedError: The loss is" in log()


def test_when_all_fail_nothing_is_written(adata, compare):
    before = compare.state(adata)
    with pytest.raises(
        ValueError, match="All 2 runs failed; the first with ValueError: k=9 is larger than n_features=8"
    ):
        sweep(adata, {"n_features": 8, "k": [9, 10]})
    compare.assert_same(before, compare.state(adata))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"grid": {"n_features": [8, -1]}}, ValueError, "n_features=-1 is below 1"),
        ({"grid": {"depth": [2]}}, ValueError, "'depth', which is no setting; known are"),
        ({"use_rep": "X_scVI"}, KeyError, "has no 'X_scVI'"),
        ({"groupby": "celltype"}, KeyError, "no column 'celltype'"),
        ({"truth": "programs"}, KeyError, "'programs' is neither in"),
        ({"n_seeds": 0}, ValueError, "n_seeds=0"),
        ({"n_jobs": 0}, ValueError, "n_jobs=0 is neither"),
        ({"n_jobs": -2}, ValueError, "n_jobs=-2 is neither"),
        ({"client": "tcp://10.0.0.1:8786"}, TypeError, r"client='tcp://10.0.0.1:8786' has no submit\(\)"),
        ({"device": "gpu"}, ValueError, "device='gpu' is not 'auto'"),
        ({"rng": -1}, ValueError, "rng=-1 is no seed"),
        ({"key_added": "a/b"}, ValueError, "without '/'"),
        ({"key_added": "sae"}, ValueError, r"uns\['sae'\] exists and is not a sweep's"),
        ({"key_added": "log1p"}, ValueError, r"uns\['log1p'\] exists and is not a sweep's"),
    ],
)
def test_bad_input_before_anything_is_trained(adata, compare, tmp_path, settings, error, message):
    sae.tl.fit(adata, n_features=8, steps=5, **QUIET)
    adata.uns["log1p"] = {"base": None}
    before = compare.state(adata)
    with pytest.raises(error, match=message):
        sweep(adata, path=tmp_path / "runs", **settings)
    compare.assert_same(before, compare.state(adata))
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_no_sae_and_may_be_repeated(adata):
    sweep(adata)
    assert len(sweep(adata, {"n_features": 8, "steps": 5})) == 1
    with pytest.raises(KeyError, match="no SAE 'sae_sweep'"):
        sae.tl.encode(adata, key="sae_sweep")
    with pytest.raises(ValueError, match="is not an SAE's"):
        sae.tl.fit(adata, key_added="sae_sweep")
    with pytest.raises(KeyError, match="no sweep 'other'; it has 'sae_sweep'. Run sae.tl.sweep"):
        sae.get.sweep(adata, key="other")
    with pytest.raises(KeyError, match="no numbers 'architecture'; it has"):
        sae.get.sweep(adata, pareto=["l0", "architecture"])
    with pytest.raises(ValueError, match="pareto='l0' is not a list of two"):
        sae.get.sweep(adata, pareto="l0")


# ---- On disk


def write_h5ad(adata, path):
    adata.write_h5ad(path / "cells.h5ad")
    return ad.read_h5ad(path / "cells.h5ad")


def write_zarr(adata, path):
    store = zarr.storage.MemoryStore()
    adata.write_zarr(store)
    return ad.read_zarr(store)


@pytest.mark.parametrize("through", [write_h5ad, write_zarr], ids=["h5ad", "zarr"])
@pytest.mark.parametrize("settings", [{}, {"groupby": "group", "truth": "truth", "n_seeds": 2}], ids=["bare", "all"])
def test_round_trip(adata, through, settings, tmp_path, compare):
    grid = {
        "architecture": ["topk", "vanilla"],
        "k": [2, 30],
        "l1": 1,
        "n_features": 8,
        "steps": 5,
        "validation": [0, 0.1],
    }
    table = sae.tl.sweep(adata, grid, **QUIET, **settings)
    assert {"k", "l1", "error"} <= set(table)
    read = through(adata, tmp_path)
    compare.assert_same(adata.uns["sae_sweep"], read.uns["sae_sweep"])
    same(sae.get.sweep(read), sae.get.sweep(adata))
    sweep(read)


def test_a_newer_layout_is_refused(adata):
    sweep(adata)
    adata.uns["sae_sweep"]["sweep_version"] = 99
    with pytest.raises(ValueError, match="Update sae"):
        sae.get.sweep(adata)


# ---- Several processes


@pytest.fixture
def large(make_adata):
    """More than joblib copies: it shares a memory map."""
    adata = make_adata(6_000, 50)
    assert adata.obsm["X_pca"].nbytes > 2**20
    return adata


def test_several_processes_give_the_same(large):
    settings = {"groupby": "group", "n_seeds": 2}
    same(sweep(large, **settings), sweep(large, n_jobs=2, **settings))


def test_all_cpus_whatever_the_threads_of_each(adata, monkeypatch):
    from sae.core import sweep as core

    def noted(source, runs, evidence, n_jobs, n_threads):
        asked.append((n_jobs, n_threads))
        return in_processes(source, runs, evidence, n_jobs, n_threads)

    asked, in_processes = [], core.in_processes
    monkeypatch.setattr(core, "in_processes", noted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    if cpu_count() < 2:
        pytest.skip("one CPU only")
    same(sweep(adata), sweep(adata, n_jobs=-1))
    assert asked == [(2, 1)]


def test_a_script_needs_no_guard(make_adata, tmp_path):
    """Unlike what `spawn` does, other processes do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(CODE % GRID)
    np.save(tmp_path / "x.npy", make_adata(400).obsm["X_pca"])
    arguments = [script, tmp_path / "x.npy", tmp_path / "runs", 2, tmp_path / "table.json"]
    subprocess.run([sys.executable, *map(str, arguments)], check=True, timeout=120)
    assert len(pd.read_json(tmp_path / "table.json")) == 4


def test_an_executor_gives_the_same(large):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        same(sweep(large, groupby="group"), sweep(large, groupby="group", client=pool))


def test_a_dask_client_gives_the_same(large):
    distributed = pytest.importorskip("distributed", reason="dask's distributed is not installed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        same(sweep(large, groupby="group"), sweep(large, groupby="group", client=client))
        same(sweep(large, groupby="group"), sweep(large, groupby="group", client=client))


def test_matrices_on_disk_give_the_same_in_other_processes(make_adata, tmp_path):
    adata = make_adata(600, 6)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    same(sweep(backed, use_rep="X"), sweep(backed, use_rep="X", n_jobs=2))
    backed.file.close()
    np.save(tmp_path / "x.npy", adata.obsm["X_pca"])
    adata.obsm["X_pca"] = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert isinstance(adata.obsm["X_pca"], np.memmap)
    same(sweep(adata), sweep(adata, n_jobs=2))


# ---- Going on


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def test_a_larger_grid_trains_what_is_new(adata, tmp_path, info):
    first = sweep(adata, {"n_features": 8, "k": [2, 3], "steps": 20}, path=tmp_path)
    before = stamps(tmp_path)
    assert len(before) == 2
    whole = sweep(adata, path=tmp_path, n_seeds=2)
    assert "2 of 8 runs found in" in info() and len(stamps(tmp_path)) == 8
    assert before.items() <= stamps(tmp_path).items()
    same(whole, sweep(adata, n_seeds=2))
    names = ["fvu", "val_fvu", "l0"]
    same(whole.loc[[0, 2], names].reset_index(drop=True), first[names])


def test_what_was_asked_in_another_order_or_way_is_found(adata, tmp_path):
    sweep(adata, path=tmp_path)
    before = stamps(tmp_path)
    sweep(adata, [{"k": [3, 2], "steps": (20,), "n_features": np.array([12])}, GRID], path=tmp_path)
    assert stamps(tmp_path) == before


def other_values(adata):
    adata.obsm["X_pca"] = adata.obsm["X_pca"] + 1


def other_labels(adata):
    adata.obs["group"] = adata.obs["group"].cat.rename_categories({"a": "b", "b": "a"}).astype(str)


def other_truth(adata):
    adata.obsm["truth"][:, 0] += adata.obsm["X_pca"][:, 3]


@pytest.mark.parametrize("change", [other_values, other_labels, other_truth], ids=lambda f: f.__name__)
def test_other_data_in_the_same_folder_do_not_mix(adata, tmp_path, change):
    settings = {"groupby": "group", "truth": "truth"}
    first = sweep(adata, path=tmp_path, **settings)
    changed = adata.copy()
    change(changed)
    second = sweep(changed, path=tmp_path, **settings)
    assert len(stamps(tmp_path)) == 8
    same(second, sweep(changed, **settings))
    same(first, sweep(adata, path=tmp_path, **settings))
    assert len(stamps(tmp_path)) == 8


def test_a_folder_that_can_only_be_read(adata, tmp_path, monkeypatch):
    whole = sweep(adata, path=tmp_path)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    same(sweep(adata, path=tmp_path), whole)
    with pytest.raises(PermissionError, match="cannot be written to. Choose another"):
        sweep(adata, path=tmp_path, n_seeds=2)


@pytest.mark.parametrize("suffix", [".json", ".npy"])
def test_files_that_were_damaged_are_made_again(adata, tmp_path, suffix):
    whole = sweep(adata, path=tmp_path, n_seeds=2)
    damaged = sorted(tmp_path.glob(f"*{suffix}"))[0]
    damaged.write_bytes(damaged.read_bytes()[:100] + b"\xff")
    (tmp_path / "notes.json").write_text("[1]")
    same(sweep(adata, path=tmp_path, n_seeds=2), whole)


def test_failures_that_would_come_again_are_not_repeated(adata, tmp_path):
    grid = {"n_features": 8, "k": [2, 9], "steps": 20}
    first = sweep(adata, grid, path=tmp_path, n_seeds=2)
    before = stamps(tmp_path)
    same(first, sweep(adata, grid, path=tmp_path, n_seeds=2))
    assert stamps(tmp_path) == before and len(before) == 4


def test_failures_of_the_machine_are_tried_again(adata, tmp_path, monkeypatch):
    from sae.core import sweep as core

    def out_of_memory(planned):
        if planned.settings.k == 3:
            raise MemoryError("no memory")
        return fit(planned)

    fit = core.fit
    monkeypatch.setattr(core, "fit", out_of_memory)
    assert sweep(adata, path=tmp_path)["error"].dropna().tolist() == ["MemoryError: no memory"] * 2
    assert len(stamps(tmp_path)) == 2
    monkeypatch.undo()
    same(sweep(adata, path=tmp_path), sweep(adata))


LONG = {"n_features": [8, 12, 16, 20, 24], "steps": 1_500}
CODE = """
import sys, time
import numpy as np
import anndata as ad
import sae

adata = ad.AnnData(np.zeros((400, 1), np.float32), obsm={"X_pca": np.load(sys.argv[1])})
table = sae.tl.sweep(adata, %r, path=sys.argv[2], n_jobs=int(sys.argv[3]), progress=False)
table.drop(columns="seconds").to_json(sys.argv[4])
"""


def start(folder, n_jobs=1):
    """Start a sweep in a process of its own, and wait until two runs are finished."""
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(400, 20)).astype(np.float32))
    arguments = [folder / "x.npy", folder / "runs", n_jobs, folder / "table.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE % LONG, *map(str, arguments)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while len(stamps(folder / "runs")) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    return process


def go_on(folder):
    adata = ad.AnnData(np.zeros((400, 1), np.float32), obsm={"X_pca": np.load(folder / "x.npy")})
    return adata, sweep(adata, LONG, path=folder / "runs")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_killed_half_way_nothing_is_done_twice(tmp_path, info, n_jobs):
    process = start(tmp_path, n_jobs)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished = stamps(tmp_path / "runs")
    assert 2 <= len(finished) < 5 and not (tmp_path / "table.json").exists()
    adata, table = go_on(tmp_path)
    assert f"{len(finished)} of 5 runs found in {tmp_path / 'runs'}" in info()
    assert finished.items() <= stamps(tmp_path / "runs").items() and len(stamps(tmp_path / "runs")) == 5
    same(table, sweep(adata, LONG))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for other processes")
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_interrupted_what_is_finished_is_kept(tmp_path, n_jobs):
    process = start(tmp_path, n_jobs)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 0, message
    finished = stamps(tmp_path / "runs")
    assert 2 <= len(finished) < 5
    assert (
        f"interrupted after {len(finished)} of 5 runs; what is finished is kept. Repeat the call to go on." in message
    )
    assert len(pd.read_json(tmp_path / "table.json")) == len(finished)
    adata, table = go_on(tmp_path)
    assert finished.items() <= stamps(tmp_path / "runs").items()
    assert adata.uns["sae_sweep"]["params"]["ended"] == "finished" and len(table) == 5
