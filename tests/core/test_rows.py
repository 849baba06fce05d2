from __future__ import annotations

import itertools
import threading
import time

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from sae.core import rows as module
from sae.core.rows import (
    Columns,
    Rows,
    as_csr,
    dense_rows,
    on_disk,
    pieces,
    read_rows,
    row_blocks,
    row_bytes,
    select_rows,
    shuffled_batches,
    stored_rows,
    take_rows,
)

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
    return file.create_dataset("x", data=x, chunks=(min(100, len(x)), D) if len(x) else None)


def as_zarr(x, folder):
    return zarr.array(x, store=folder / "x.zarr", chunks=(min(100, max(len(x), 1)), D))


def as_dask(x, folder):
    return pytest.importorskip("dask.array").from_array(x, chunks=(100, D))


def as_hdf5_csr(x, folder):
    file = h5py.File(folder / "csr.h5", "w")
    ad.io.write_elem(file, "x", sparse.csr_matrix(x), dataset_kwargs={"chunks": (100 * D,)})
    return ad.io.sparse_dataset(file["x"])


def as_zarr_csr(x, folder):
    group = zarr.open_group(folder / "csr.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "x", sparse.csr_matrix(x), dataset_kwargs={"chunks": (100 * D,)})
    return ad.io.sparse_dataset(group["x"])


def as_dask_csr(x, folder):
    """Chunks along both axes."""
    whole = pytest.importorskip("dask.array").from_array(x, chunks=(100, 2))
    return whole.map_blocks(sparse.csr_matrix)


IN_MEMORY = {"array": lambda x, folder: x, "csr": lambda x, folder: sparse.csr_matrix(x)}
DENSE = {"memory map": as_memory_map, "hdf5": as_hdf5, "zarr": as_zarr, "dask": as_dask}
SPARSE = {"hdf5 csr": as_hdf5_csr, "zarr csr": as_zarr_csr, "dask csr": as_dask_csr}
ON_DISK = DENSE | SPARSE
PLACES = IN_MEMORY | ON_DISK
each_place = pytest.mark.parametrize("place", PLACES)
each_order = pytest.mark.parametrize("place", ["array", "memory map", "zarr"])
"""In memory rows are drawn one by one, from disk in shuffled blocks, which another thread may read."""


@pytest.fixture
def put(tmp_path):
    """Factory: rows in one of the places."""
    made = []

    def put(place, x):
        made.append(PLACES[place](x, tmp_path))
        return made[-1]

    yield put
    for stored in made:
        file = getattr(stored, "file", getattr(getattr(stored, "group", None), "file", None))
        if isinstance(file, h5py.File):
            file.close()


@pytest.fixture
def few_blocks_at_a_time(monkeypatch):
    """Two blocks of 256 rows, of memory maps and of all other files."""
    monkeypatch.setattr(module, "DISK_BLOCKS_SHUFFLED", 2)
    monkeypatch.setattr(module, "FEWEST_BLOCKS", 2)
    monkeypatch.setattr(module, "GROUP_BYTES", 2 * BLOCK * D * 4)


def numbers(batch):
    """The numbers of the rows in a batch, which must be whole."""
    np.testing.assert_array_equal(batch, numbered(int(batch.max()) + 1)[batch[:, 0].astype(int)])
    return batch[:, 0].astype(int)


def drawn(x, rows, size, n_batches, *, seed=0, first=0):
    batches = itertools.islice(shuffled_batches(x, rows, size, seed=seed, first=first), n_batches)
    return [numbers(batch) for batch in batches]


class Counted:
    """Rows that are read by slices only, and counted."""

    dtype = np.dtype(np.float32)

    def __init__(self, n):
        self.shape, self.read = (n, D), []

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.read.append((rows.start, rows.stop))
        return numbered(self.shape[0])[rows]


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
    counted = Counted(700)
    rows = np.array([699, 3, 300, 4, 258, 698])
    np.testing.assert_array_equal(read_rows(counted, rows), numbered(700)[rows])
    assert counted.read == [(0, 700)], "neighbours together"
    counted = Counted(2000)
    read_rows(counted, np.array([1999, 3, 300, 4, 1998]))
    assert counted.read == [(0, 512), (1792, 2000)]


def test_no_more_is_read_at_a_time_than_can_be_held(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * BLOCK * D * 4)
    counted, rows = Counted(10 * BLOCK), np.random.default_rng(0).permutation(10 * BLOCK)
    np.testing.assert_array_equal(numbers(read_rows(counted, rows)), rows)
    assert counted.read == [(start * BLOCK, min(start + 3, 10) * BLOCK) for start in (0, 3, 6, 9)]


def assert_rows(found, expected, place):
    """In memory, of the same kind as they are stored."""
    if "csr" in place:
        assert type(found) is sparse.csr_matrix
        assert found.has_canonical_format
        found = found.toarray()
    assert type(found) is np.ndarray
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@each_place
@pytest.mark.parametrize("rows", [slice(0, 300), slice(120, 250), slice(299, 300), slice(7, 7)], ids=str)
def test_a_slice_is_sparse_where_the_matrix_is(put, place, rows):
    x, stored = numbered(300), put(place, numbered(300))
    assert_rows(take_rows(stored, rows), x[rows], place)
    np.testing.assert_array_equal(dense_rows(stored, rows), x[rows])


@pytest.mark.parametrize("as_format", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.coo_array])
def test_other_sparse_formats_become_csr(as_format):
    x = numbered(9) * (numbered(9) % 2 == 0)
    assert_rows(as_csr(as_format(x)), x, "csr")


def test_entries_out_of_order_or_given_twice_are_put_right_in_a_copy():
    rows = sparse.csr_matrix(([1.0, 2.0, 4.0, 8.0], [2, 0, 2, 1], [0, 3, 4]), shape=(2, 3))
    found = as_csr(rows)
    np.testing.assert_array_equal(found.toarray(), [[2, 0, 5], [0, 8, 0]])
    assert found.has_canonical_format
    np.testing.assert_array_equal(rows.indices, [2, 0, 2, 1])


def test_what_is_stored_out_of_order_is_read_in_order(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        rows = sparse.csr_matrix(([1.0, 2.0, 4.0, 8.0], [2, 0, 2, 1], [0, 3, 4]), shape=(2, 3))
        ad.io.write_elem(file, "x", rows)
        found = take_rows(ad.io.sparse_dataset(file["x"]), slice(0, 2))
    np.testing.assert_array_equal(found.indices, [0, 2, 1])
    np.testing.assert_array_equal(found.data, [2, 5, 8])


# ---- Some rows or columns of what is on disk


@pytest.mark.parametrize("place", ON_DISK)
@pytest.mark.parametrize("columns", [[2, 0], [1], [0, 1, 2], [2, 2]], ids=str)
def test_columns_are_those_of_an_array(put, place, columns):
    x = numbered(300)
    selected = Columns(put(place, x), np.array(columns))
    assert selected.shape == (300, len(columns))
    assert selected.dtype == np.float32
    assert on_disk(selected)
    assert_rows(take_rows(selected, slice(40, 260)), x[40:260, columns], place)


POSITIONS = {
    "all": np.arange(700),
    "some": np.flatnonzero(np.random.default_rng(0).random(700) < 0.4),
    "few": np.array([3, 4, 511, 512, 699]),
    "shuffled": np.random.default_rng(1).permutation(700),
    "repeated": np.random.default_rng(2).integers(700, size=900),
    "none": np.empty(0, np.int64),
}


@pytest.mark.parametrize("place", ON_DISK)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_rows_in_another_order_are_those_of_an_array(put, place, positions):
    x, stored = numbered(700), put(place, numbered(700))
    selected = Rows(stored, positions)
    assert selected.shape == (len(positions), D)
    assert selected.dtype == np.float32
    assert on_disk(selected)
    for rows in (*row_blocks(len(positions), 300), slice(0, len(positions)), slice(2, 5), slice(1, 1)):
        assert_rows(take_rows(selected, rows), x[positions][rows], place)


def test_rising_rows_are_read_in_blocks_each_at_most_twice():
    counted = Counted(6000)
    positions = np.flatnonzero(np.random.default_rng(0).random(6000) < 0.3)
    for rows in row_blocks(len(positions), 500):
        np.testing.assert_array_equal(numbers(Rows(counted, positions)[rows]), positions[rows])
    read = np.concatenate([np.arange(start, stop) for start, stop in counted.read])
    assert np.bincount(read).max() <= 2
    assert len(read) <= 6000 + 4 * BLOCK, "only the blocks where a slice ends are read twice"


def test_few_rows_are_read_without_the_rest():
    counted = Counted(6000)
    Rows(counted, np.array([5, 3000, 3001]))[0:3]
    assert counted.read == [(0, 256), (2816, 3072)]


@each_place
def test_rows_are_selected_without_copying_what_is_on_disk(put, place):
    x, stored = numbered(300), put(place, numbered(300))
    positions = np.array([9, 2, 250])
    selected = select_rows(stored, positions)
    assert isinstance(selected, Rows) is (place in ON_DISK)
    assert_rows(take_rows(selected, slice(0, 3)), x[positions], place)
    again = select_rows(selected, np.array([2, 0]))
    assert_rows(take_rows(again, slice(0, 2)), x[[250, 9]], place)
    assert getattr(again, "matrix", None) is (stored if place in ON_DISK else None)
    assert select_rows(stored, np.arange(300)) is stored


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


def test_all_files_and_all_arrays_give_the_same_batches(put, few_blocks_at_a_time):
    rows = np.arange(5, 1100)
    for places in (IN_MEMORY, ON_DISK):
        batches = [drawn(put(place, numbered(1111)), rows, 90, 30) for place in places]
        for other in batches[1:]:
            np.testing.assert_array_equal(other, batches[0])


@pytest.mark.parametrize("place", [place for place in ON_DISK if place != "memory map"])
def test_a_file_that_can_be_held_gives_the_batches_of_an_array(put, place):
    rows = np.arange(5, 1100)
    expected = drawn(numbered(1111), rows, 90, 30)
    np.testing.assert_array_equal(drawn(put(place, numbered(1111)), rows, 90, 30), expected)


def test_a_file_that_can_be_held_is_read_once():
    counted = Counted(1000)
    drawn(counted, np.arange(1000), 300, 20)
    assert counted.read == [(0, 1000)]


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


# ---- Chunks


class Chunked:
    """A file that gives whole chunks only, which says by which thread and how often each was read."""

    dtype = np.dtype(np.float32)

    def __init__(self, n, chunk, *, fails_at=None):
        self.shape, self.chunks, self.fails_at = (n, D), (chunk, D), fails_at
        self.times, self.threads, self.largest = np.zeros(-(-n // chunk), int), set(), 0

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        if self.fails_at is not None and rows.start <= self.fails_at < rows.stop:
            raise OSError("the disk is gone")
        if rows.stop > rows.start:
            self.times[rows.start // self.chunks[0] : -(-rows.stop // self.chunks[0])] += 1
        self.threads.add(threading.current_thread())
        self.largest = max(self.largest, rows.stop - rows.start)
        return numbered(self.shape[0])[rows]


@pytest.fixture
def ahead(monkeypatch):
    """Files of tests are read ahead, too."""
    monkeypatch.setattr(module, "reads_ahead", lambda x: True)


CHUNKS = {"chunks": 100, "one chunk": 3000, "rows": 1, "chunks of more than a piece": 999}
each_chunk = pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)


@each_place
@pytest.mark.parametrize("size", [1, 7, 100, 250, 699, 5000])
@pytest.mark.parametrize("n", [0, 1, 700])
def test_pieces_are_the_rows_in_order(put, place, size, n):
    x = numbered(700)[:n]
    found = list(pieces(put(place, x), size))
    assert [rows for rows, _ in found] == list(row_blocks(n, size))
    for rows, part in found:
        assert_rows(part, x[rows], place)


@each_chunk
@pytest.mark.parametrize("size", [64, 250, 1000])
def test_pieces_read_each_chunk_once(ahead, chunk, size):
    file = Chunked(3000, chunk)
    found = [part for _, part in pieces(file, size)]
    np.testing.assert_array_equal(np.concatenate(found), numbered(3000))
    assert (file.times == 1).all()


def test_pieces_of_dask_read_each_chunk_once(monkeypatch):
    """Chunks of unequal length."""
    da = pytest.importorskip("dask.array")
    lengths, read = (300, 1, 299, 500, 7, 93, 800), []
    starts = np.cumsum([0, *lengths])
    monkeypatch.setattr(module, "PIECE_BYTES", 600 * D * 4)

    def chunk(block_info):
        (start, stop), _ = block_info[None]["array-location"]
        read.append(start)
        return numbered(2000)[start:stop]

    x = da.map_blocks(chunk, chunks=(lengths, (D,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))
    assert stored_rows(x) == 299
    np.testing.assert_array_equal(np.concatenate([part for _, part in pieces(x, 128)]), numbered(2000))
    assert sorted(read) == starts[:-1].tolist()
    read.clear()
    rows = np.array([1999, 0, 605])
    np.testing.assert_array_equal(read_rows(x, rows), numbered(2000)[rows])
    assert sorted(read) == [0, 600, 1100, 1107, 1200], "short ones with the next"


@pytest.mark.parametrize(("chunk", "size", "most"), [(100, 100, 400), (100, 1000, 1000), (800, 100, 800)])
def test_pieces_read_some_chunks_at_a_time(monkeypatch, chunk, size, most):
    monkeypatch.setattr(module, "PIECE_BYTES", 700 * D * 4)
    file = Chunked(3000, chunk)
    list(pieces(file, size))
    assert file.largest == most


def test_the_next_piece_is_read_while_one_is_in_use(ahead):
    """And not more than the next."""
    reads = pieces(file := Chunked(3000, 100), 400)
    next(reads)
    wait_until(lambda: file.times.sum() == 8)
    time.sleep(0.02)
    assert file.times.tolist() == [1] * 8 + [0] * 22
    assert threading.main_thread() not in file.threads


def test_code_of_others_stays_in_its_thread():
    file = Chunked(3000, 100)
    list(pieces(file, 100))
    drawn(file, np.arange(3000), 100, 10)
    assert file.threads == {threading.main_thread()}


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize(
    "read", [lambda x: pieces(x, 100), lambda x: shuffled_batches(x, np.arange(3000), 100, seed=0)]
)
def test_no_thread_is_left_when_reading_ends_early(ahead, few_blocks_at_a_time, read):
    before = readers()
    reads = read(Chunked(3000, 100))
    next(reads)
    assert len(readers()) == len(before) + 1
    reads.close()
    assert readers() == before
    for _ in read(Chunked(3000, 100)):
        break
    assert readers() == before, "nor when it is just dropped"


@pytest.mark.parametrize("fails_at", [0, 450, 2999])
def test_an_error_of_the_reader_is_raised_where_the_rows_are_asked_for(ahead, few_blocks_at_a_time, fails_at):
    before, got = readers(), []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(rows for rows, _ in pieces(Chunked(3000, 100, fails_at=fails_at), 400))
    assert got == list(row_blocks(3000, 400))[: fails_at // 400]
    with pytest.raises(OSError, match="the disk is gone"):
        drawn(Chunked(3000, 100, fails_at=fails_at), np.arange(3000), 100, 40)
    assert readers() == before


BUDGETS = {
    "chunks shorter than blocks": (100, 12_000, (512, 33)),
    "blocks of whole chunks": (128, 12_000, (512, 33)),
    "chunks as blocks": (700, 12_000, (700, 24)),
    "few long chunks": (4000, 12_000, (4000, 4)),
    "a narrow budget": (100, 30, (256, 4)),
}


@pytest.mark.parametrize(("chunk", "rows", "blocks"), BUDGETS.values(), ids=BUDGETS)
def test_blocks_are_chosen_by_width_and_at_least_a_chunk(monkeypatch, chunk, rows, blocks):
    monkeypatch.setattr(module, "GROUP_BYTES", 17_000 * D * 4 if rows == 12_000 else rows * D * 4)
    assert module._blocks_to_shuffle(Chunked(50_000, chunk)) == blocks


def test_the_order_does_not_depend_on_the_chunks(monkeypatch, ahead):
    monkeypatch.setattr(module, "GROUP_BYTES", 17_000 * D * 4)
    n, rows = 40_000, np.arange(0, 40_000, 3)
    batches = [drawn(Chunked(n, chunk), rows, 1000, 30, seed=5) for chunk in (1, 100, 512)]
    for other in batches[1:]:
        np.testing.assert_array_equal(other, batches[0])


@pytest.mark.parametrize(("chunk", "most"), [(64, 1.2), (128, 1.0), (512, 1.0), (400, 2.0), (700, 1.0), (5000, 1.0)])
def test_a_pass_reads_each_chunk_once_or_twice(monkeypatch, ahead, chunk, most):
    """Once where blocks are whole chunks, else those at their ends again."""
    monkeypatch.setattr(module, "GROUP_BYTES", 17_000 * D * 4)
    n, size = 40_000, 1000
    file = Chunked(n, chunk)
    for _ in itertools.islice(shuffled_batches(file, np.arange(n), size, seed=0), n // size):
        pass
    per_pass = -(-n // chunk)
    ahead_of_use = -(-20_000 // chunk) * most
    assert per_pass <= file.times.sum() <= most * per_pass + ahead_of_use + 1


def test_starting_later_does_not_read_what_is_skipped(ahead, few_blocks_at_a_time):
    file = Chunked(3000, 128)
    batch = next(shuffled_batches(file, np.arange(3000), 100, seed=0, first=27))
    np.testing.assert_array_equal(numbers(batch), drawn(file, np.arange(3000), 100, 28)[27])
    file.times[:] = 0
    batches = shuffled_batches(file, np.arange(3000), 100, seed=0, first=27)
    next(batches)
    batches.close()
    assert file.times.sum() <= 2 * 4, "two groups: the first that is needed, and the next one"


def test_a_matrix_in_one_chunk_is_read_once_and_held(few_blocks_at_a_time):
    file = Chunked(3000, 3000)
    np.testing.assert_array_equal(
        drawn(file, np.arange(3000), 100, 90), drawn(numbered(3000), np.arange(3000), 100, 90)
    )
    assert file.times.tolist() == [1]


def test_a_sparse_matrix_that_is_held_stays_sparse(put, monkeypatch):
    held = []
    monkeypatch.setattr(module, "dense_rows", lambda x, rows: held.append(x) or dense_rows(x, rows))
    drawn(put("zarr csr", numbered(1000)), np.arange(1000), 100, 3)
    assert {type(x) for x in held} == {sparse.csr_matrix}


def test_rows_of_csc_are_read_all_at_once(tmp_path):
    x = numbered(700)
    with h5py.File(tmp_path / "csc.h5", "w") as file:
        ad.io.write_elem(file, "x", sparse.csc_matrix(x), dataset_kwargs={"chunks": (30,)})
        stored = ad.io.sparse_dataset(file["x"])
        assert stored_rows(stored) == 700
        assert row_bytes(stored) == pytest.approx(D * 8, rel=0.01)
        for rows, part in pieces(stored, 100):
            assert_rows(part, x[rows], "csr")


def test_sizes_of_what_is_stored(put):
    x = numbered(700)
    sizes = {"array": (1, D * 4), "memory map": (1, D * 4), "hdf5": (100, D * 4), "zarr": (100, D * 4)}
    sizes |= {"dask": (100, D * 4), "dask csr": (100, D * 4)}
    for place, (rows, n_bytes) in sizes.items():
        stored = put(place, x)
        for matrix in (stored, Rows(stored, np.arange(5)), Columns(stored, np.array([1]))):
            assert (stored_rows(matrix), row_bytes(matrix)) == (rows, n_bytes), place
    for place in ("hdf5 csr", "zarr csr"):
        assert stored_rows(stored := put(place, x)) == pytest.approx(100, abs=1)
        assert row_bytes(stored) == pytest.approx(D * 8, rel=0.01)


def wait_until(condition):
    stop = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < stop
        time.sleep(0.001)
