"""Search on a device finds what `Indexer` does; here the device is the CPU."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.runtime.errors import InputError
from src.search import gpu as module
from src.search.exact import Found, Indexer, merge
from src.search.gpu import GpuIndexer
from tests.test_index import assert_same, brute_force, random, shards_of, whole_numbers

CPU = torch.device("cpu")


def gpu(vectors, *borders, rows=64) -> GpuIndexer:
    return GpuIndexer(shards_of(vectors, *borders), rows, CPU)


def check(vectors, queries, k, rows=64) -> Found:
    expected = Indexer(shards_of(vectors, len(vectors) // 3), rows).search(queries, k)
    found = gpu(vectors, len(vectors) // 3, rows=rows).search(queries, k)
    assert_same(found, expected)
    return found


@pytest.mark.parametrize("stored", [np.float16, np.float32])
@pytest.mark.parametrize("k", [1, 100, 400])
def test_equals_indexer(stored, k):
    vectors, queries = random(3000, 48).astype(stored), random(70, 48, seed=1)
    check(vectors, queries, k, rows=700)


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("k", [1, 150, 250])
def test_ties_and_all_equal_brute_force(rows, k):
    vectors, queries = whole_numbers(200, 8), whole_numbers(30, 8, seed=1)
    found = check(vectors, queries, k, rows)
    assert_same(found, brute_force(queries, vectors, k))


@pytest.mark.parametrize("values", [1, 40])
@pytest.mark.parametrize("k", [20, 300])
def test_equal_passages_keep_their_order(values, k):
    """Also where more are equal than are proposed."""
    rows = np.random.default_rng(2).integers(0, values, 2500)
    check(random(values, 33)[rows], random(20, 33, seed=1), k, 123)


def test_a_list_begins_every_longer_one():
    base = random(400, 16)
    vectors = base[np.random.default_rng(3).integers(0, 400, 2000)]
    vectors[300:900] = base[7]
    queries = np.concatenate([random(9, 16, seed=1), base[7:8]])
    ours = gpu(vectors, rows=700)
    longest = ours.search(queries, 2000)
    for k in (1, 128, 129, 513, 1500):
        found = ours.search(queries, k)
        assert_same(found, Found(longest.scores[:, :k], longest.positions[:, :k]))
        alone = ours.search(queries[3:4], k)
        assert_same(alone, Found(found.scores[3:4], found.positions[3:4]))


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e5, 1e15])
def test_numbers_that_half_precision_cannot_hold(scale):
    vectors, queries = random(500, 16) * np.float32(scale), random(9, 16, seed=1)
    check(vectors, queries, 20)
    check(random(500, 16), queries * np.float32(scale), 20)


def test_zeros():
    vectors, queries = random(300, 8), random(4, 8, seed=1)
    vectors[100:], queries[1] = 0, 0
    check(vectors, queries, 5)
    check(np.zeros((10, 8), np.float32), queries, 5)


@pytest.mark.parametrize("processes", [2, 40])
def test_processes_together_find_what_one_does(processes):
    vectors = np.concatenate([random(300, 16), random(200, 16)])  # ties across the blocks
    queries = random(50, 16, seed=1)
    expected = Indexer(shards_of(vectors, 90), 33).search(queries, 25)
    ours = gpu(vectors, 90, rows=33)
    parts = [ours.search(queries, 25, (i, processes)) for i in range(processes)]
    assert_same(merge(parts, 25), expected)


@pytest.mark.parametrize("stored", [np.float16, np.float32])
@pytest.mark.parametrize("keep", [True, False])
def test_cached_blocks_are_read_once(keep, stored, monkeypatch):
    read, blocks = [], Indexer.blocks

    def counted(self, *arguments, **options):
        for start, block in blocks(self, *arguments, **options):
            read.append(start)
            yield start, block

    monkeypatch.setattr(GpuIndexer, "_fits", lambda *_: keep)
    vectors, told = random(200, 8).astype(stored), []
    expected = [Indexer(shards_of(vectors)).search(random(9, 8, seed=n), 4) for n in (1, 2)]
    monkeypatch.setattr(Indexer, "blocks", counted)
    ours = gpu(vectors)
    for n, right in zip((1, 2), expected, strict=True):
        assert_same(ours.search(random(9, 8, seed=n), 4, on_rows=told.append), right)
    assert read == [0, 64, 128, 192] * (1 if keep else 2)
    assert told == 2 * [64, 64, 64, 8]


@pytest.mark.parametrize(("free", "fits"), [(10**12, True), (10**9, False)])
def test_blocks_are_cached_where_they_fit(free, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    ours = GpuIndexer(shards_of(random(9, 400)), 5, torch.device("cuda"))
    assert ours._fits(5_000_000, 0) == fits


def test_many_queries_go_by_groups(monkeypatch):
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", 64 * 7)
    check(random(300, 16), random(50, 16, seed=1), 20)


def test_nothing_to_look_for_or_in():
    assert gpu(random(7, 4)).search(np.empty((0, 4)), 5).scores.shape == (0, 5)
    assert gpu(random(0, 4), 0).search(random(3, 4), 5).positions.shape == (3, 0)


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.__name__.partition(".")[0] in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_the_host_waits_once_however_many_blocks(stored):
    index = gpu(random(300, 16).astype(stored), rows=20)
    with Waits() as waits:
        index.search(random(9, 16, seed=1), 5)
    assert waits.n == 1


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_embeddings_that_are_not_finite(stored):
    vectors, queries = random(50, 4).astype(stored), random(6, 4, seed=1)
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
def test_on_a_gpu():
    vectors, queries = random(20_000, 96), random(300, 96, seed=1)
    expected = Indexer(shards_of(vectors), 3000).search(queries, 50)
    ours = GpuIndexer(shards_of(vectors), 3000, torch.device("cuda"))
    for _ in range(2):
        assert_same(ours.search(queries, 50), expected)
