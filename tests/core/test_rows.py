from __future__ import annotations

import itertools

import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from sae.core import rows as module
from sae.core.rows import on_disk, read_rows, row_blocks, shuffled_batches

D = 3
BLOCK = 256


def numbered(n):
    """Rows (n, d) that tell their number."""
    return np.repeat(np.arange(n, dtype=np.float32)[:, None], D, axis=1) + np.arange(D, dtype=np.float32) / 8


def as_memory_map(x, folder):
    path = folder / "x.npy"
    np.save(path, x)
    return np.load(path, mmap_mode="r")


def as_hdf5(x, folder):
    file = h5py.File(folder / "x.h5", "w")
    return file.create_dataset("x", data=x, chunks=(min(100, len(x)), D))


def as_zarr(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=(min(100, len(x)), D))


def as_dask(x, folder):
    return pytest.importorskip("dask.array").from_array(x, chunks=(100, D))


IN_MEMORY = {"array": lambda x, folder: x, "csr": lambda x, folder: sparse.csr_matrix(x)}
ON_DISK = {"memory map": as_memory_map, "hdf5": as_hdf5, "zarr": as_zarr, "dask": as_dask}
PLACES = IN_MEMORY | ON_DISK
each_place = pytest.mark.parametrize("place", PLACES)
each_order = pytest.mark.parametrize("place", ["array", "memory map"])
"""In memory rows are drawn one by one, from disk in shuffled blocks."""


@pytest.fixture
def put(tmp_path):
    """Factory: rows in one of the places."""
    made = []

    def put(place, x):
        made.append(PLACES[place](x, tmp_path))
        return made[-1]

    yield put
    for stored in made:
        if isinstance(stored, h5py.Dataset):
            stored.file.close()


@pytest.fixture
def few_blocks_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "DISK_BLOCKS_SHUFFLED", 2)


def numbers(batch):
    """The numbers of the rows in a batch, which must be whole."""
    np.testing.assert_array_equal(batch, numbered(int(batch.max()) + 1)[batch[:, 0].astype(int)])
    return batch[:, 0].astype(int)


def drawn(x, rows, size, n_batches, *, seed=0, first=0):
    batches = itertools.islice(shuffled_batches(x, rows, size, seed=seed, first=first), n_batches)
    return [numbers(batch) for batch in batches]


# ---- Reading


@each_place
def test_only_what_is_read_from_a_file_is_on_disk(put, place):
    assert on_disk(put(place, numbered(300))) is (place in ON_DISK)


def test_a_view_of_a_memory_map_is_on_disk_and_a_copy_is_not(put):
    x = put("memory map", numbered(300))
    assert on_disk(x[10:200][::2])
    assert on_disk(np.asarray(x))
    assert not on_disk(np.array(x))
    assert not on_disk(np.frombuffer(numbered(4).tobytes(), np.float32))


@each_place
@pytest.mark.parametrize("n", [1, 255, 256, 257, 700])
def test_rows_are_read_in_any_order_as_by_fancy_indexing(put, place, n):
    x, rng = numbered(n), np.random.default_rng(n)
    stored = put(place, x)
    asked = rng.permutation(n), np.sort(rng.integers(n, size=40)), rng.integers(n, size=600), np.array([n - 1])
    for rows in (*asked, np.empty(0, np.int64)):
        found = read_rows(stored, rows)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, x[rows])


def test_each_block_on_disk_is_read_once():
    class Counted:
        """Rows that are read by slices only, and counted."""

        shape, dtype, read = (700, D), np.dtype(np.float32), []

        def __getitem__(self, rows):
            assert isinstance(rows, slice)
            self.read.append((rows.start, rows.stop))
            return numbered(700)[rows]

    rows = np.array([699, 3, 300, 4, 258, 698])
    np.testing.assert_array_equal(read_rows(Counted(), rows), numbered(700)[rows])
    assert Counted.read == [(0, 256), (256, 512), (512, 700)]


def test_blocks_cover_all_rows():
    assert list(row_blocks(10, 4)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(row_blocks(8, 4)) == [slice(0, 4), slice(4, 8)]
    assert list(row_blocks(0, 4)) == []


# ---- Batches


@each_place
def test_every_wanted_row_is_in_every_pass_once_and_no_other(put, place, few_blocks_at_a_time):
    x, wanted = put(place, numbered(1500)), np.arange(1500)[np.arange(1500) % 10 != 3]
    size, passes = 75, 3
    taken = np.concatenate(drawn(x, wanted, size, passes * len(wanted) // size)).reshape(passes, -1)
    np.testing.assert_array_equal(np.sort(taken, axis=1), np.broadcast_to(wanted, taken.shape))
    assert len(np.unique(taken, axis=0)) == passes, "in another order each time"


SIZES = {
    "whole batches": (1024, 256),
    "batches across groups": (1500, 200),
    "batches across passes": (1030, 64),
    "a batch of more than a group": (1500, 700),
    "fewer rows than a block": (40, 8),
    "one batch": (100, 100),
    "fewer rows than a batch": (30, 70),
    "far fewer rows than a batch": (3, 50),
    "one row": (1, 4),
}


@each_order
@pytest.mark.parametrize(("n", "size"), SIZES.values(), ids=SIZES)
def test_batches_are_full_and_cut_from_whole_passes(put, place, few_blocks_at_a_time, n, size):
    batches = drawn(put(place, numbered(n)), np.arange(n), size, 3 * n // size + 8)
    assert {len(batch) for batch in batches} == {size}
    taken = np.concatenate(batches)
    passes = taken[: len(taken) // n * n].reshape(-1, n)
    assert len(passes) >= 3
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.broadcast_to(np.arange(n), passes.shape))


def assert_starting_later_is_skipping(x, rows, size):
    expected = drawn(x, rows, size, 24)
    for first in (*range(8), 12, 20):
        for number, batch in enumerate(drawn(x, rows, size, 4, first=first), start=first):
            np.testing.assert_array_equal(batch, expected[number], err_msg=f"batch {number} after {first} skipped")


@each_order
@pytest.mark.parametrize(("n", "size"), SIZES.values(), ids=SIZES)
def test_starting_later_is_skipping(put, place, few_blocks_at_a_time, n, size):
    assert_starting_later_is_skipping(put(place, numbered(n)), np.arange(n), size)


@pytest.mark.parametrize("size", [32, 100])
def test_starting_later_is_skipping_where_blocks_hold_unequal_numbers_of_rows(put, few_blocks_at_a_time, size):
    """The few rows of one group wait for those of the next, and may belong to a batch that is skipped."""
    wanted = np.concatenate([np.arange(2 * BLOCK), [600, 601, 800, 1030, 1300]])
    assert_starting_later_is_skipping(put("memory map", numbered(1500)), wanted, size)


@each_order
def test_the_seed_decides_the_order(put, place):
    x, rows = put(place, numbered(1000)), np.arange(1000)
    one, again, other = (np.concatenate(drawn(x, rows, 100, 10, seed=seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9


def test_all_files_and_all_arrays_give_the_same_batches(put, tmp_path, few_blocks_at_a_time):
    rows = np.arange(5, 1100)
    for places in (IN_MEMORY, ON_DISK):
        batches = [drawn(put(place, numbered(1111)), rows, 90, 30) for place in places]
        for other in batches[1:]:
            np.testing.assert_array_equal(other, batches[0])


def test_from_disk_rows_of_distant_blocks_meet_in_a_batch(put):
    n = 40 * BLOCK
    batch, *_ = drawn(put("memory map", numbered(n)), np.arange(n), 512, 1)
    assert len(np.unique(batch // BLOCK)) == 40
    # Drawn without replacement from 10,240 rows: the gaps between neighbours are of all sizes.
    assert abs(np.corrcoef(batch[:-1], batch[1:])[0, 1]) < 0.2


def test_from_disk_a_few_wanted_rows_make_full_batches(put, few_blocks_at_a_time):
    """Most groups of blocks hold none of them."""
    wanted = np.array([2, 3, 700, 1499])
    taken = np.concatenate(drawn(put("memory map", numbered(1500)), wanted, 3, 8)).reshape(-1, 4)
    np.testing.assert_array_equal(np.sort(taken, axis=1), np.broadcast_to(wanted, taken.shape))


def test_a_batch_may_be_changed(put, few_blocks_at_a_time):
    """It is not the rows that wait for the next one."""
    x, rows = put("memory map", numbered(700)), np.arange(700)
    expected = drawn(x, rows, 90, 30)
    for batch, kept in zip(shuffled_batches(x, rows, 90, seed=0), expected, strict=False):
        np.testing.assert_array_equal(numbers(batch), kept)
        batch[...] = -1
