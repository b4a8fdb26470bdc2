"""The search on a device finds what `Indexer` does, to the bit; here the device is the CPU."""

import numpy as np
import pytest
import torch

from src.runtime.errors import InputError
from src.search import gpu as module
from src.search.exact import Found, Indexer, merge
from src.search.gpu import GpuIndexer
from tests.test_index import assert_same, brute_force, random, shards_of, whole_numbers

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def gpu(vectors, *borders, rows=64, dtype=torch.float16, keep=False) -> GpuIndexer:
    return GpuIndexer(shards_of(vectors, *borders), rows, CPU, dtype, keep)


def check(vectors, queries, k, dtype=torch.float16, rows=64) -> Found:
    expected = Indexer(shards_of(vectors, len(vectors) // 3), rows).search(queries, k)
    found = gpu(vectors, len(vectors) // 3, rows=rows, dtype=dtype).search(queries, k)
    assert_same(found, expected)
    return found


def by_indexer(monkeypatch) -> list[int]:
    """How many queries each search by `Indexer` itself gets, from now on."""
    counts, search = [], Indexer.search

    def counted(self, queries, *more):
        counts.append(len(queries))
        return search(self, queries, *more)

    monkeypatch.setattr(Indexer, "search", counted)
    return counts


@BOTH
@pytest.mark.parametrize("stored", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_equals_indexer(dtype, stored, k):
    vectors, queries = random(3000, 48).astype(stored), random(70, 48, seed=1)
    for rows in (300, 3000):
        check(vectors, queries, k, dtype, rows)


@BOTH
@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("k", [1, 5, 150])
def test_ties_and_all_equal_brute_force(dtype, rows, k):
    vectors, queries = whole_numbers(200, 8), whole_numbers(30, 8, seed=1)
    found = check(vectors, queries, k, dtype, rows)
    assert_same(found, brute_force(queries, vectors, k))


@BOTH
def test_the_device_alone_finds_what_is_not_too_alike(dtype, monkeypatch):
    """A list longer than what is asked for is enough: nothing is left to `Indexer`."""
    counts = by_indexer(monkeypatch)
    vectors, queries = random(20_000, 64), random(50, 64, seed=1)
    found = gpu(vectors, rows=3000, dtype=dtype).search(queries, 20)
    assert not counts
    assert_same(found, Indexer(shards_of(vectors), 3000).search(queries, 20))


@BOTH
@pytest.mark.parametrize("values", [1, 3, 40])
@pytest.mark.parametrize("spare", [0, 5, 128])
def test_equal_passages_stand_in_their_order(dtype, values, spare, monkeypatch):
    """Also where more are equal than the list is long."""
    monkeypatch.setattr(module, "_SPARE_ROWS", spare)
    rows = np.random.default_rng(2).integers(0, values, 1500)
    check(random(values, 33)[rows], random(20, 33, seed=1), 20, dtype, 123)


@BOTH
@pytest.mark.parametrize("spare", [0, 128])
@pytest.mark.parametrize("distance", [1e-5, 1e-2, 0.3])
def test_scores_that_half_precision_cannot_tell_apart(dtype, distance, spare, monkeypatch):
    monkeypatch.setattr(module, "_SPARE_ROWS", spare)
    vectors = 10 * random(1, 64) + distance * random(1000, 64, seed=1)
    check(vectors, random(30, 64, seed=2), 20, dtype, 101)


def test_what_is_too_alike_is_searched_wider_and_then_by_indexer(monkeypatch):
    monkeypatch.setattr(module, "_SPARE_ROWS", 4)
    counts, widths = by_indexer(monkeypatch), []
    propose = GpuIndexer._propose

    def watched(self, queries, width, *more):
        widths.append((len(queries), width))
        return propose(self, queries, width, *more)

    monkeypatch.setattr(GpuIndexer, "_propose", watched)
    # Along three axes: far apart; 20 alike, of which a list of 8 holds too few; 200 alike.
    vectors = np.zeros((600, 3), np.float32)
    vectors[:300, 0] = np.arange(300)
    vectors[300:320, 1] = 1 + 1e-6 * np.arange(20)
    vectors[320:520, 2] = 1 + 1e-6 * np.arange(200)
    queries = np.eye(3, dtype=np.float32)
    found = gpu(vectors, rows=600).search(queries, 2)
    assert widths == [(3, 8), (2, 64)]
    assert counts == [1]
    assert found.positions.tolist() == [[299, 298], [319, 318], [519, 518]]


@BOTH
@pytest.mark.parametrize("scales", [(1e-30, 1e10), (1e6, 1e6), (1e12, 1e-25), (1e-20, 1e-20)])
def test_numbers_that_half_precision_cannot_hold(dtype, scales):
    """Neither too large nor too small ones lose anything but by rounding."""
    vectors = (random(900, 24) * scales[0]).astype(np.float32)
    check(vectors, (random(20, 24, seed=1) * scales[1]).astype(np.float32), 10, dtype)


@BOTH
def test_one_row_or_number_far_larger_than_all(dtype):
    """What the others lose by it is known, and looked for again."""
    vectors, queries = random(900, 24), random(20, 24, seed=1)
    vectors[450] *= 1e9
    vectors[:, 3] *= 1e6
    queries[:, 5] *= 1e7
    check(vectors, queries, 10, dtype)


def test_scores_beyond_float32(monkeypatch):
    """Sums that overflow do so in `Indexer`'s way, by `Indexer`."""
    counts = by_indexer(monkeypatch)
    vectors, queries = 1e17 * random(300, 8), random(4, 8, seed=1)
    queries[2] *= 1e21
    with np.errstate(invalid="ignore"):
        found = gpu(vectors).search(queries, 3)
    assert counts == [1]
    assert np.isinf(found.scores[2]).all()
    rest = [0, 1, 3]
    expected = Indexer(shards_of(vectors), 64).search(queries[rest], 3)
    assert_same(Found(*(array[rest] for array in found)), expected)


@BOTH
def test_zeros(dtype):
    vectors, queries = random(300, 8), random(4, 8, seed=1)
    vectors[100:], queries[1] = 0, 0
    check(vectors, queries, 5, dtype)
    check(np.zeros((10, 8), np.float32), queries, 5, dtype)


@BOTH
def test_bounds_hold(dtype):
    """A row's plain score lies between its bounds, in any block."""
    vectors = random(500, 96) * np.geomspace(1e-3, 1e3, 500, dtype=np.float32)[:, None]
    queries = random(20, 96, seed=1)
    found = gpu(vectors, rows=50, dtype=dtype)._propose(queries, 500, (0, 1), None)
    exact = np.take_along_axis(queries @ vectors.T, found.positions, axis=1)
    assert (found.lower <= exact).all()
    assert (exact <= found.upper).all()
    # And they are no wider than half precision is coarse: by its last bit of both vectors.
    lengths = np.linalg.norm(vectors, axis=1)[found.positions]
    lengths *= np.linalg.norm(queries, axis=1)[:, None]
    width = found.upper - found.lower
    assert np.median(width / lengths) < 4.2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("processes", [1, 2, 3, 40])
@pytest.mark.parametrize("keep", [False, True])
def test_processes_together_find_what_one_does(processes, keep):
    vectors = np.concatenate([random(300, 16), random(200, 16)])  # ties across the blocks
    queries = random(50, 16, seed=1)
    expected = Indexer(shards_of(vectors, 90), 33).search(queries, 25)
    ours = gpu(vectors, 90, rows=33, keep=keep)
    for _ in range(2):
        parts = [ours.search(queries, 25, (i, processes)) for i in range(processes)]
        assert_same(merge(parts, 25), expected)


def test_kept_blocks_are_read_once(monkeypatch):
    read, blocks = [], Indexer.blocks

    def counted(self, part=(0, 1), on_rows=None):
        for start, block in blocks(self, part, on_rows):
            read.append(start)
            yield start, block

    monkeypatch.setattr(Indexer, "blocks", counted)
    vectors = random(200, 8)
    expected = [Indexer(shards_of(vectors)).search(random(9, 8, seed=n), 4) for n in (1, 2)]
    for keep in (True, False):
        told = []
        ours = gpu(vectors, keep=keep)
        read.clear()
        for n, right in zip((1, 2), expected, strict=True):
            assert_same(ours.search(random(9, 8, seed=n), 4, on_rows=told.append), right)
        assert read == [0, 64, 128, 192] * (1 if keep else 2)
        assert told == [64, 64, 64, 8] * 2


@pytest.mark.parametrize(("free", "fits"), [(10**12, True), (10**9, False)])
def test_blocks_are_kept_where_they_fit(free, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    ours = GpuIndexer(shards_of(random(9, 4)), 5, torch.device("cuda"))
    monkeypatch.setattr(GpuIndexer, "__len__", lambda _: 5_000_000)
    assert ours._fits(1, 0) == fits


def test_many_queries_go_by_groups(monkeypatch):
    vectors, queries = random(300, 16), random(50, 16, seed=1)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 64 * 7)
    check(vectors, queries, 20)


def test_more_passages_asked_for_than_there_are():
    for rows in (2, 100):
        check(random(7, 4), random(3, 4, seed=1), 50, rows=rows)


def test_nothing_to_look_for_or_in():
    ours = gpu(random(7, 4))
    assert ours.search(np.empty((0, 4)), 5).scores.shape == (0, 5)
    empty = gpu(random(0, 4), 0)
    assert empty.search(random(3, 4), 5).positions.shape == (3, 0)


def test_what_is_wrong_is_said_as_by_indexer():
    vectors, queries = random(50, 4), random(6, 4, seed=1)
    with pytest.raises(InputError, match=r"have 5 dim.* shard0 have 4; .*--model_path"):
        gpu(vectors).search(random(3, 5), 5)
    vectors[33, 2] = np.nan
    with pytest.raises(InputError, match="shard1: the embedding of passage 'p33' is not finite"):
        gpu(vectors, 20, rows=15).search(queries, 3)


def test_too_little_memory_is_one_line(monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_products", full)
    with pytest.raises(InputError, match="blocks of 64 embeddings; lower --indexing_batch_size"):
        gpu(random(50, 4)).search(random(6, 4, seed=1), 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_on_a_gpu(dtype):
    vectors, queries = random(20_000, 96), random(300, 96, seed=1)
    expected = Indexer(shards_of(vectors), 3000).search(queries, 50)
    for keep in (None, False):
        ours = GpuIndexer(shards_of(vectors), 3000, torch.device("cuda"), dtype, keep)
        for _ in range(2):
            assert_same(ours.search(queries, 50), expected)
