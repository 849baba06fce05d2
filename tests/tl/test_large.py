"""`fit` and `encode` of representations on disk, activations that are written there, and memory that does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

import sae
from sae import _schema
from sae.core import fitting
from sae.core import rows as core_rows

N, D = 1300, 8
KEY = "X_big"
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
QUICK = {"n_features": 16, "k": 3, "steps": 40, "progress": False}
da = pytest.importorskip("dask.array")


def values():
    """Sums of a few programs, some values zero."""
    rng = np.random.default_rng(0)
    active = (rng.random((N, 12)) < 0.2) * rng.exponential(size=(N, 12))
    x = active @ rng.normal(size=(12, D)) + 3
    return np.where(rng.random((N, D)) < 0.1, 0, x).astype(np.float32)


def as_hdf5(x, folder):
    file = h5py.File(folder / "x.h5", "w")
    return file.create_dataset("x", data=x, chunks=(100, 3), compression="gzip")


def as_hdf5_contiguous(x, folder):
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=x)


def as_zarr(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=(100, 3))


def as_one_chunk(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=x.shape)


def as_hdf5_csr(x, folder, kind=sparse.csr_matrix):
    file = h5py.File(folder / "x.h5", "w")
    ad.io.write_elem(file, "x", kind(x), dataset_kwargs={"chunks": (500,)})
    return ad.io.sparse_dataset(file["x"])


def as_hdf5_csc(x, folder):
    return as_hdf5_csr(x, folder, sparse.csc_matrix)


def as_zarr_csr(x, folder):
    group = zarr.open_group(folder / "x.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "x", sparse.csr_matrix(x), dataset_kwargs={"chunks": (500,)})
    return ad.io.sparse_dataset(group["x"])


def as_lazy_csr(x, folder):
    as_zarr_csr(x, folder)
    return ad.experimental.read_elem_lazy(zarr.open_group(folder / "x.zarr", mode="r")["x"], chunks=(100, D))


def as_dask(x, folder):
    return da.from_array(x, chunks=(100, 3))


def as_unequal_dask(x, folder):
    return da.from_array(x, chunks=((1, 400, 99, 700, 100), D))


def as_dask_csr(x, folder):
    return da.from_array(x, chunks=(100, D)).map_blocks(sparse.csr_matrix)


PLACES = {
    "hdf5": as_hdf5,
    "hdf5 without chunks": as_hdf5_contiguous,
    "zarr": as_zarr,
    "zarr in one chunk": as_one_chunk,
    "hdf5 csr": as_hdf5_csr,
    "hdf5 csc": as_hdf5_csc,
    "zarr csr": as_zarr_csr,
    "lazy csr": as_lazy_csr,
    "dask": as_dask,
    "dask of unequal chunks": as_unequal_dask,
    "dask csr": as_dask_csr,
}
each_place = pytest.mark.parametrize("place", PLACES)


@pytest.fixture
def put(tmp_path):
    """Factory: the cells, with their representation in one of the places."""
    made = []

    def put(place, slot="obsm"):
        folder = tmp_path / f"put{len(made)}"
        folder.mkdir()
        x = values() if place == "memory" else PLACES[place](values(), folder)
        made.append(x)
        obs = pd.DataFrame(index=[f"cell{i}" for i in range(N)])
        adata = ad.AnnData(obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(D)]))
        if slot == "X":
            adata.X = x
        else:
            getattr(adata, slot)[KEY] = x
        return adata

    yield put
    for x in made:
        file = getattr(x, "file", getattr(getattr(x, "group", None), "file", None))
        if isinstance(file, h5py.File):
            file.close()


WHERE = {"obsm": {"use_rep": KEY}, "layers": {"layer": KEY}, "X": {"use_rep": "X"}}


def assert_same_sae(found, expected, key="sae"):
    one, other = (adata.uns[key] for adata in (found, expected))
    for name in WEIGHTS:
        np.testing.assert_array_equal(one["weights"][name], other["weights"][name], err_msg=name)
    pd.testing.assert_frame_equal(one["history"], other["history"], check_exact=True)
    assert one["params"] == other["params"]


def assert_same_activations(found, expected, compare, key="sae"):
    one, other = (adata.obsm[key] for adata in (found, expected))
    compare.assert_same(sparse.csr_matrix(core_rows.take_rows(one, slice(None))), other)
    for name in ("features", "encoded"):
        compare.assert_same(found.uns[key][name], expected.uns[key][name])


# ---- Reading


@pytest.mark.parametrize("slot", WHERE)
@each_place
def test_what_can_be_held_is_fitted_and_encoded_as_in_memory(put, place, slot, compare):
    memory, disk = put("memory", slot), put(place, slot)
    for adata in (memory, disk):
        sae.tl.fit(adata, **WHERE[slot], **QUICK)
        sae.tl.encode(adata)
    assert_same_sae(disk, memory)
    assert_same_activations(disk, memory, compare)


@pytest.fixture
def blocks(monkeypatch):
    """Files are too large to be held: five blocks of 256 rows, of which two are shuffled together."""
    monkeypatch.setattr(core_rows, "FEWEST_BLOCKS", 2)
    monkeypatch.setattr(core_rows, "GROUP_BYTES", 2 * 256 * D * 4)


CHUNKED = [place for place in PLACES if place not in ("zarr in one chunk", "hdf5 csc", "hdf5")]


@pytest.mark.parametrize("place", CHUNKED)
@pytest.mark.usefixtures("blocks")
def test_larger_files_give_one_result_wherever_and_however_they_are_stored(put, place, compare):
    expected, adata = put("hdf5"), put(place)
    for stored in (expected, adata):
        sae.tl.fit(stored, KEY, **QUICK)
        sae.tl.encode(stored)
    assert_same_sae(adata, expected)
    assert_same_activations(adata, expected, compare)


@pytest.mark.usefixtures("blocks")
def test_blocks_of_a_larger_file_train_as_well_as_single_cells(put):
    fvu = {}
    for place in ("memory", "hdf5"):
        adata = put(place)
        sae.tl.fit(adata, KEY, **QUICK | {"steps": 300})
        fvu[place] = adata.uns["sae"]["params"]["val_fvu"]
    assert fvu["hdf5"] == pytest.approx(fvu["memory"], rel=0.1)


@pytest.mark.usefixtures("blocks")
def test_threads_change_nothing(put, monkeypatch):
    from sae.core import autoencoder, backend_numba

    found = []
    for threads in (1, 3):
        for module in (autoencoder, backend_numba):
            monkeypatch.setattr(module, "available_threads", lambda threads=threads: threads)
        adata = put("zarr")
        sae.tl.fit(adata, KEY, **QUICK)
        sae.tl.encode(adata)
        found.append(adata)
    assert_same_sae(*found)
    assert (found[0].obsm["sae"] != found[1].obsm["sae"]).nnz == 0


@pytest.mark.parametrize("place", ["zarr", "dask csr"])
@pytest.mark.usefixtures("blocks")
def test_checkpoint_of_a_larger_file_is_gone_on_from(put, tmp_path, monkeypatch, place):
    from sae.tl import _fit as module

    whole, resumed = put(place), put(place)
    sae.tl.fit(whole, KEY, **QUICK)
    make = module.progress_bar

    class Pressed:
        """Ctrl-C after 17 steps."""

        def __init__(self, bar):
            self.bar, self.n = bar, 0

        def __enter__(self):
            self.bar.__enter__()
            return self

        def __exit__(self, *error):
            return self.bar.__exit__(*error)

        def update(self, n=1):
            self.n += 1
            if self.n == 17:
                raise KeyboardInterrupt

        def set_postfix(self, *given, **named):
            pass

    monkeypatch.setattr(module, "progress_bar", lambda *given, **named: Pressed(make(*given, **named)))
    sae.tl.fit(resumed, KEY, checkpoint=tmp_path / "state.npz", **QUICK)
    assert resumed.uns["sae"]["params"]["steps"] == 17
    monkeypatch.setattr(module, "progress_bar", make)
    sae.tl.fit(resumed, KEY, checkpoint=tmp_path / "state.npz", **QUICK)
    assert_same_sae(resumed, whole)


def test_backed_file(put, tmp_path, compare):
    memory = put("memory", "X")
    memory.write_h5ad(tmp_path / "cells.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for adata in (memory, backed):
        sae.tl.fit(adata, "X", **QUICK)
        sae.tl.encode(adata)
    assert_same_sae(backed, memory)
    assert_same_activations(backed, memory, compare)
    backed.file.close()


@pytest.mark.parametrize("place", ["zarr", "zarr csr", "dask"])
def test_mudata(put, place, compare):
    found = []
    for where in ("memory", place):
        adata, joint = put(where), put(where)
        mdata = mudata.MuData({"rna": adata, "other": adata[:, :0].copy()})
        mdata.obsm["X_joint"] = joint.obsm[KEY]
        sae.tl.fit(mdata, KEY, mod="rna", **QUICK)
        sae.tl.encode(mdata, mod="rna")
        sae.tl.fit(mdata, "X_joint", **QUICK)
        sae.tl.encode(mdata)
        found.append(mdata)
    memory, disk = found
    for one, other in ((disk, memory), (disk["rna"], memory["rna"])):
        assert_same_sae(one, other)
        assert_same_activations(one, other, compare)


@pytest.mark.parametrize("verb", ["fit", "encode", "encode out"])
@pytest.mark.parametrize("place", ["zarr", "dask csr"])
def test_values_that_are_not_finite_are_refused_before_anything_is_written(put, tmp_path, compare, verb, place):
    adata = put("memory")
    sae.tl.fit(adata, KEY, **QUICK)
    bad = values()
    bad[[3, 1200], 2] = np.nan
    del adata.obsm[KEY]
    (tmp_path / "bad").mkdir()
    stored = PLACES[place](bad, tmp_path / "bad")
    before = compare.state(adata)
    adata.obsm[KEY] = stored
    with pytest.raises(ValueError, match=r"2 NaN or infinite values in 2 of 1300 rows \(rows 3, 1200\)"):
        if verb == "fit":
            sae.tl.fit(adata, KEY, **QUICK)
        else:
            sae.tl.encode(adata, out=tmp_path / "a.zarr" if "out" in verb else None)
    del adata.obsm[KEY]
    compare.assert_same(before, compare.state(adata))
    assert not (tmp_path / "a.zarr").exists()


def test_goodness_of_many_cells_is_measured_on_some(put, monkeypatch):
    monkeypatch.setattr(fitting, "MAX_JUDGED", 100)
    found = {}
    for place in ("memory", "zarr"):
        adata = put(place)
        sae.tl.fit(adata, KEY, **QUICK | {"n_features": 16}, validation=0.2)
        found[place] = adata
    assert_same_sae(found["zarr"], found["memory"])
    params, x = found["memory"].uns["sae"]["params"], values()
    encoded = sae.get.model(found["memory"]).encode(x)
    shuffled = np.random.default_rng(params["seed"]).permutation(N)
    for prefix, rows in (("val_", np.sort(shuffled[:260])), ("", np.sort(shuffled[260:]))):
        some = rows[np.linspace(0, len(rows) - 1, 100).astype(int)]
        assert params[f"{prefix}fvu"] == encoded.squared_error[some].mean() / params["variance"]
        assert params[f"{prefix}l0"] == np.diff(encoded.activations.indptr)[some].mean()


# ---- Writing


def beside(folder):
    """What was left of writing."""
    return [path.name for path in folder.iterdir() if path.name.endswith((".partial", ".earlier"))]


@pytest.fixture
def pair(put, tmp_path):
    """The same cells encoded in memory and into a folder."""
    memory = put("memory")
    sae.tl.fit(memory, KEY, **QUICK)
    disk = memory.copy()
    sae.tl.encode(memory)
    sae.tl.encode(disk, out=tmp_path / "a.zarr")
    return memory, disk


def test_out_gives_what_is_given_in_memory(pair, tmp_path, compare):
    memory, disk = pair
    assert type(disk.obsm["sae"]).__module__ == "dask.array.core"
    assert disk.obsm["sae"].dtype == np.float32
    compare.assert_same(dict(disk.uns["sae"]), dict(memory.uns["sae"]))
    assert_same_activations(disk, memory, compare)
    compare.assert_same(ad.io.read_elem(zarr.open_group(tmp_path / "a.zarr", mode="r")), memory.obsm["sae"])
    assert not beside(tmp_path)


@each_place
def test_out_from_disk(put, tmp_path, place, compare):
    memory, disk = put("memory"), put(place)
    sae.tl.fit(memory, KEY, **QUICK)
    sae.tl.encode(memory)
    sae.tl.encode(disk, reference=memory, out=str(tmp_path / "a.zarr"))
    assert_same_activations(disk, memory, compare)


def whole(adata):
    return sparse.csr_matrix(adata.obsm["sae"].compute())


def through_h5ad(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    return ad.read_h5ad(folder / "cells.h5ad")


def through_zarr(adata, folder):
    adata.write_zarr(folder / "cells.zarr")
    return ad.read_zarr(folder / "cells.zarr")


def lazily_through_zarr(adata, folder):
    adata.write_zarr(folder / "cells.zarr")
    read = ad.AnnData(obs=adata.obs)
    group = zarr.open_group(folder / "cells.zarr", mode="r")
    read.obsm["sae"] = ad.experimental.read_elem_lazy(group["obsm/sae"])
    return read


def test_activations_on_disk_stay_there_in_copies_and_subsets(pair, compare):
    memory, disk = pair
    mask = np.random.default_rng(0).random(N) < 0.3
    for one, other in (
        (disk.copy(), memory),
        (disk[mask], memory[mask]),
        (disk[mask].copy(), memory[mask].copy()),
        (disk[np.flatnonzero(mask)[::-1]].copy(), memory[np.flatnonzero(mask)[::-1]].copy()),
        (ad.concat({"a": disk, "b": disk}, index_unique="-"), ad.concat({"a": memory, "b": memory}, index_unique="-")),
    ):
        assert core_rows.is_dask(one.obsm["sae"])
        compare.assert_same(whole(one), sparse.csr_matrix(other.obsm["sae"]))


@pytest.mark.parametrize("through", [through_h5ad, through_zarr, lazily_through_zarr])
def test_activations_on_disk_are_written_with_the_object(pair, tmp_path, through, compare):
    memory, disk = pair
    read = through(disk, tmp_path)
    found = sparse.csr_matrix(core_rows.take_rows(read.obsm["sae"], slice(None)))
    compare.assert_same(found, memory.obsm["sae"])


def test_statistics_are_recomputed_when_cells_were_removed(pair):
    memory, disk = pair
    mask = np.random.default_rng(0).random(N) < 0.3
    part, other = disk[mask].copy(), memory[mask].copy()
    pd.testing.assert_frame_equal(sae.get.features(part), sae.get.features(other), check_exact=True)
    assert part.uns["sae"]["features"]["n_cells"].sum() > sae.get.features(part)["n_cells"].sum()


def test_again_into_the_same_folder_and_back_into_memory(pair, tmp_path, compare):
    memory, disk = pair
    disk.obsm[KEY] = disk.obsm[KEY] * np.float32(1.01)
    memory.obsm[KEY] = disk.obsm[KEY]
    with pytest.warns(UserWarning, match="has another 'X_big'"):
        sae.tl.encode(disk, out=tmp_path / "a.zarr")
    with pytest.warns(UserWarning, match="has another 'X_big'"):
        sae.tl.encode(memory)
    assert_same_activations(disk, memory, compare)
    assert "a.zarr" in os.listdir(tmp_path) and not beside(tmp_path)
    with pytest.warns(UserWarning, match="has another 'X_big'"):
        sae.tl.encode(disk)
    assert sparse.issparse(disk.obsm["sae"])
    assert (tmp_path / "a.zarr").exists(), "a folder of the user's is never removed"


def test_no_cells(pair, tmp_path):
    none = pair[0][:0].copy()
    sae.tl.encode(none, out=tmp_path / "none.zarr")
    assert none.obsm["sae"].shape == (0, 16)
    assert none.uns["sae"]["features"]["dead"].all()


@pytest.mark.parametrize("mod", [None, "rna"])
def test_mudata_out(put, tmp_path, mod, compare):
    found = []
    for out in (None, tmp_path / "a.zarr"):
        mdata = mudata.MuData({"rna": put("memory"), "other": put("memory")[:, :0].copy()})
        mdata.obsm["X_joint"] = values()
        sae.tl.fit(mdata, KEY if mod else "X_joint", mod=mod, **QUICK)
        sae.tl.encode(mdata, mod=mod, out=out)
        found.append(mdata[mod] if mod else mdata)
    memory, disk = found
    assert_same_activations(disk, memory, compare)


FAILURES = {"while encoding": "statistics", "while writing the object": "write", "after the last block": "fingerprint"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("moment", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_leaves_object_and_folder_as_they_were(put, tmp_path, monkeypatch, compare, earlier, moment, error):
    from sae.tl import _encode as module

    adata = put("memory")
    sae.tl.fit(adata, KEY, **QUICK)
    if earlier:
        sae.tl.encode(adata, out=tmp_path / "a.zarr")
        written = whole(adata)

    def fails(*given, **named):
        raise error

    target = {"statistics": module.FeatureStatistics, "write": _schema, "fingerprint": module}[moment]
    monkeypatch.setattr(target, "add" if moment == "statistics" else moment, fails)
    before = compare.state(adata)
    held = adata.obsm.get("sae")
    with pytest.raises(error):
        sae.tl.encode(adata, out=tmp_path / "a.zarr")
    assert (tmp_path / "a.zarr").exists() is earlier and not beside(tmp_path)
    assert adata.obsm.get("sae") is held
    after = compare.state(adata)
    before["obsm"].pop("sae", None), after["obsm"].pop("sae", None)
    compare.assert_same(before, after)
    if earlier:
        compare.assert_same(whole(adata), written)


def test_out_of_something_else_is_refused(pair, tmp_path, compare):
    memory, _ = pair
    before = compare.state(memory)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match=r"out='.*notes' exists and was not written by sae\.tl\.encode"):
        sae.tl.encode(memory, out=tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match=r"a folder that does not exist"):
        sae.tl.encode(memory, out=tmp_path / "no" / "a.zarr")
    sae.tl.fit(memory, KEY, key_added="other", **QUICK)
    with pytest.raises(FileExistsError, match=r"holds the activations of the SAE 'sae'.*by those of 'other'"):
        sae.tl.encode(memory, key="other", out=tmp_path / "a.zarr")
    del memory.uns["other"]
    compare.assert_same(before, compare.state(memory))
    assert (tmp_path / "a.zarr").exists() and not beside(tmp_path)


# ---- Memory

GROWTH = """
import sys
import anndata as ad
import numpy as np
import pandas as pd
import zarr
import sae
from sae.core import rows

# Smaller, so that the data can be small.
rows.GROUP_BYTES, rows.PIECE_BYTES = 8_000_000, 4_000_000
folder, n, d, chunk = sys.argv[1], 300_000, 200, 2_500
block = np.random.default_rng(0).normal(size=(chunk, d)).astype(np.float32)
x = zarr.create_array(folder + "/x.zarr", shape=(n, d), chunks=(chunk, d // 2), dtype="f4")
for start in range(0, n, chunk):
    x[start : start + chunk] = block + np.float32(start % 7)
adata = ad.AnnData(obs=pd.DataFrame(index=pd.RangeIndex(n).astype(str)))
how = {"n_features": 32, "steps": 20, "preprocess": "center", "progress": False}


def run(adata, x, name):
    adata.obsm["X_big"] = x
    sae.tl.fit(adata, "X_big", **how)
    sae.tl.encode(adata, out=f"{folder}/{name}", progress=False)


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


run(adata[: 5 * chunk].copy(), np.tile(block, (5, 1)), "small")
before = peak()
run(adata, x, "large")
print(peak() - before, x.nbytes, adata.uns["sae"]["encoded"]["n_obs"])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc, which is Linux's")
def test_memory_stays_below_the_size_of_the_data(tmp_path):
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    # Memory that is free again goes back at once: the peak is then what was held, whichever threads held it.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert result.returncode == 0, result.stderr
    growth, size, n = map(int, result.stdout.split())
    assert n == 300_000 and size == 240_000_000
    assert growth < size / 3


# ---- A cluster


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="dask's distributed is not installed")
    made = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with made as started, distributed.Client(started) as client:
        yield client


@pytest.mark.parametrize("place", ["dask", "dask of unequal chunks", "dask csr", "lazy csr"])
@pytest.mark.usefixtures("cluster")
def test_workers_of_a_cluster_encode_as_in_memory(put, tmp_path, place, compare, monkeypatch):
    from sae.core import autoencoder

    memory, disk, onto_disk = put("memory"), put(place), put(place)
    sae.tl.fit(memory, KEY, **QUICK)
    sae.tl.encode(memory)
    monkeypatch.setattr(autoencoder, "BLOCKS_PER_THREAD", 1)
    monkeypatch.setattr(autoencoder, "BLOCK_ROWS", 128)
    sae.tl.encode(disk, reference=memory)
    assert_same_activations(disk, memory, compare)

    def here(*given):
        raise AssertionError("encoded by this process")

    monkeypatch.setattr(autoencoder.Autoencoder, "_encode_here", here)
    sae.tl.encode(onto_disk, reference=memory, out=tmp_path / "a.zarr")
    assert_same_activations(onto_disk, memory, compare)


@pytest.mark.usefixtures("cluster")
def test_fit_on_a_cluster_is_fit_in_memory(put):
    memory, disk = put("memory"), put("dask csr")
    for adata in (memory, disk):
        sae.tl.fit(adata, KEY, **QUICK)
    assert_same_sae(disk, memory)
