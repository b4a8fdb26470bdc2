"""Exact search equals brute force and FAISS's flat index, however the collection is cut up."""

import itertools
import json
import os
import tracemalloc
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from src.runtime.errors import InputError
from src.search import tiles
from src.search.embeddings import open_shards
from src.search.exact import Found, Indexer, merge
from src.search.shards import Shard, ShardWriter


@pytest.fixture(autouse=True, params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype_of_products(request, monkeypatch):
    """Every test in this file is run with both, whatever the processor."""
    monkeypatch.setattr(tiles, "fastest_type", lambda: request.param)
    return request.param


def shards_of(vectors: np.ndarray, *borders: int) -> list[Shard]:
    """The vectors in shards with ids p0, p1, ..."""
    ids = [f"p{row}" for row in range(len(vectors))]
    edges = [0, *borders, len(vectors)]
    return [
        Shard(f"shard{number}", ids[start:end], vectors[start:end], {})
        for number, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> Found:
    """The definition: every inner product, exact for whole numbers; ties to the lower position."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return Found(np.take_along_axis(scores, order, axis=1).astype(np.float32), order)


def plain_search(queries: np.ndarray, vectors: np.ndarray, k: int) -> Found:
    """FAISS's inner products one by one, of all rows, put in order."""
    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    few = range(0, len(queries), 10)  # for so few, FAISS never forms a matrix product
    parts = [flat.search(queries[start : start + 10], len(vectors)) for start in few]
    every = Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return merge([every], k)


def assert_same(found: Found, expected: Found) -> None:
    assert found.scores.dtype == np.float32
    assert found.positions.dtype == np.int64
    assert np.array_equal(found.positions, expected.positions)
    assert np.array_equal(found.scores, expected.scores)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole_numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Small whole numbers: scores are exact in any precision, and most of them are ties."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


@pytest.mark.parametrize("block_rows", [1, 64, 199, 1000])
@pytest.mark.parametrize("borders", [(), (1, 1, 64, 65, 199)])
@pytest.mark.parametrize(("k", "dtype"), [(1, np.float16), (5, np.float32), (250, np.float16)])
def test_ties_and_all_equal_brute_force(block_rows, borders, dtype, k):
    """Also for more passages than there are."""
    vectors, queries = whole_numbers(200, 8).astype(dtype), whole_numbers(30, 8, seed=1)
    found = Indexer(shards_of(vectors, *borders), block_rows).search(queries, k)
    assert_same(found, brute_force(queries, vectors, k))


@pytest.mark.parametrize("tile_rows", [1, 32, 2048])
@pytest.mark.parametrize("values", [1, 3, 40])
def test_equal_passages_keep_their_order(values, tile_rows, monkeypatch):
    """Copies of few vectors have equal scores at any position, though not whole ones."""
    monkeypatch.setattr(tiles, "TILE_ROWS", tile_rows)
    rows = np.random.default_rng(2).integers(0, values, 500)
    vectors, queries = random(values, 33)[rows], random(40, 33, seed=1)
    for block_rows in (50, 123, 500):
        found = Indexer(shards_of(vectors, 77, 300), block_rows).search(queries, 60)
        assert_same(found, plain_search(queries, vectors, 60))


@pytest.mark.parametrize("tile_rows", [1, 32, 2048])
def test_scores_that_differ_by_rounding_alone(tile_rows, monkeypatch):
    """Passages so alike that a matrix product puts them in another order."""
    monkeypatch.setattr(tiles, "TILE_ROWS", tile_rows)
    vectors = 100 * random(1, 64) + 1e-5 * random(400, 64, seed=1)
    queries = random(50, 64, seed=2)
    expected = plain_search(queries, vectors, 20)
    product = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :20]
    assert not np.array_equal(product, expected.positions)  # or the test would show nothing
    for block_rows in (10, 64, 400):
        assert_same(Indexer(shards_of(vectors), block_rows).search(queries, 20), expected)


@pytest.mark.parametrize("n_queries", [1, 20, 200])
@pytest.mark.parametrize("k", [1, 100])
def test_equals_the_flat_index(n_queries, k):
    vectors, queries = random(3000, 48), random(n_queries, 48, seed=1)
    flat = faiss.IndexFlatIP(48)
    flat.add(vectors)
    found = Indexer(shards_of(vectors, 1234), 700).search(queries, k)
    assert_same(found, Found(*flat.search(queries, k)))


def test_every_row_is_better_than_those_before(monkeypatch):
    """No row can be discarded at once, and few are collected before they are scored."""
    monkeypatch.setattr(tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(tiles, "_LEAST_PENDING", 8)
    vectors = np.linspace(0.1, 1, 999, dtype=np.float32)[:, None] * np.ones(24, np.float32)
    queries = np.abs(random(20, 24, seed=1))
    for k in (1, 7, 100):
        assert_same(
            Indexer(shards_of(vectors), 200).search(queries, k), plain_search(queries, vectors, k)
        )


def test_embeddings_too_alike_for_bfloat16_are_compared_in_float32(monkeypatch):
    """Or every passage would be scored by itself."""
    types, multiply = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, out: types.append(a.dtype) or multiply(a, b, out=out)
    )
    vectors, queries = 10 + 0.1 * random(9000, 32), random(50, 32, seed=1)
    found = Indexer(shards_of(vectors)).search(queries, 20)
    assert_same(found, plain_search(queries, vectors, 20))
    assert types[-1] == torch.float32
    types.clear()
    Indexer(shards_of(random(9000, 32))).search(queries, 20)
    assert set(types) == {tiles.fastest_type()}


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scores_below_zero_and_vectors_of_any_size(scale):
    vectors, queries = scale * np.abs(random(3000, 40)), -np.abs(random(60, 40, seed=1))
    vectors = vectors.astype(np.float32)
    found = Indexer(shards_of(vectors, 17), 1000).search(queries, 30)
    assert (found.scores < 0).all()
    assert_same(found, plain_search(queries, vectors, 30))


def test_more_queries_than_are_taken_at_once(monkeypatch):
    vectors, queries = random(300, 16), random(50, 16, seed=1)
    expected = Indexer(shards_of(vectors), 100).search(queries, 20)
    monkeypatch.setattr(tiles, "QUERIES_AT_ONCE", 7)
    assert_same(Indexer(shards_of(vectors), 100).search(queries, 20), expected)


@pytest.mark.parametrize("processes", [2, 40])
def test_processes_together_find_what_one_does(processes):
    vectors = np.concatenate([random(300, 16), random(200, 16)])  # ties across the blocks
    queries = random(50, 16, seed=1)
    indexer = Indexer(shards_of(vectors, 90), 33)
    expected = indexer.search(queries, 25)
    parts = [indexer.search(queries, 25, (i, processes)) for i in range(processes)]
    assert_same(merge(parts, 25), expected)


def test_the_number_of_threads_makes_no_difference():
    vectors, queries = random(3000, 300), random(500, 300, seed=1)
    before, results = faiss.omp_get_max_threads(), []
    for threads in (1, 2, 3):
        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)
        results.append(Indexer(shards_of(vectors), 1024).search(queries, 30))
    faiss.omp_set_num_threads(before)
    torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


def test_numbers_of_the_reference(reference):
    shards = open_shards(reference / "legacy_embeddings" / "wiki_*")
    queries = np.load(reference / "question_embeddings.npz")["embeddings"]
    expected = json.loads((reference / "retrieved.json").read_text())["retrieved"]
    for block_rows in (7, 50_000):
        indexer = Indexer(shards, block_rows)
        found = indexer.search(queries, 10)
        for ids, scores, example in zip(
            indexer.ids(found.positions), found.scores, expected, strict=True
        ):
            assert ids == [context["id"] for context in example["ctxs"]]
            right = [float(context["score"]) for context in example["ctxs"]]
            assert scores == pytest.approx(right, abs=1e-4)


# ----------------------------------------------------------------------------------------------
# Edges


def test_nothing_to_look_for_or_in():
    indexer = Indexer(shards_of(random(7, 4)))
    assert indexer.search(np.empty((0, 4)), 5).scores.shape == (0, 5)
    assert indexer.ids(indexer.search(np.empty((0, 4)), 5).positions) == []
    empty = Indexer(shards_of(random(0, 4), 0))
    assert len(empty) == 0
    assert empty.search(random(3, 4), 5).positions.shape == (3, 0)


def test_vectors_in_any_layout():
    vectors, queries = random(50, 4), random(6, 4, seed=1)
    expected = Indexer(shards_of(vectors)).search(queries, 5)
    for same in (queries.astype(np.float64), np.asfortranarray(queries)):
        assert_same(Indexer(shards_of(vectors)).search(same, 5), expected)
    crooked = np.frombuffer(b"x" + vectors.tobytes(), np.float32, offset=1).reshape(50, 4)
    assert not crooked.flags.aligned
    for same in (np.asfortranarray(vectors), crooked):
        assert_same(Indexer(shards_of(same)).search(queries, 5), expected)


def test_impossible_requests():
    for queries, k, rows, problem in (
        (random(3, 5), 5, 9, r"have 5 dim.* shard0 have 4; .*--model_path"),
        (random(3, 4), 0, 9, "--n-docs must be at least 1, not 0"),
        (random(3, 4), 5, 0, "--indexing_batch_size must be at least 1, not 0"),
    ):
        with pytest.raises(InputError, match=problem):
            Indexer(shards_of(random(7, 4)), rows).search(queries, k)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_embeddings_that_are_not_finite(value):
    vectors, queries = random(50, 4), random(6, 4, seed=1)
    vectors[33, 2] = value
    with pytest.raises(InputError, match="shard1: the embedding of passage 'p33' is not finite"):
        Indexer(shards_of(vectors, 20), 15).search(queries, 3)
    queries[1, 1] = value
    with pytest.raises(InputError, match="questions' embeddings are not finite"):
        Indexer(shards_of(vectors), 15).search(queries, 3)


def test_taking_rows_out():
    vectors = random(50, 4).astype(np.float16)
    indexer = Indexer(shards_of(vectors, 0, 20, 20, 21))
    for positions in ([], [0], [0, 19, 20, 21, 49], range(50)):
        rows = np.array(positions, dtype=np.int64)
        assert np.array_equal(indexer.take(rows), vectors[rows].astype(np.float32))


def test_blocks_are_all_rows_in_order_once():
    vectors = random(50, 4).astype(np.float16)
    told = []
    blocks = Indexer(shards_of(vectors, 20), 8).blocks(on_rows=told.append)
    copies = [(start, block.copy()) for start, block in blocks]
    assert [start for start, _ in copies] == list(range(0, 50, 8))
    assert np.array_equal(np.concatenate([block for _, block in copies]), vectors)
    assert told == [8] * 6 + [2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_no_more_than_a_block_is_in_memory(dtype):
    vectors, queries = random(20_000, 64).astype(dtype), random(2, 64, seed=1)
    indexer = Indexer(shards_of(vectors, 12_345), 2000)
    tracemalloc.start()
    indexer.search(queries, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 2000 * 64 * 4


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_file_that_changes_while_it_is_searched(dtype, tmp_path, monkeypatch):
    """One line, where touching the pages of a shortened file would end the process."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    path, vectors = tmp_path / "wiki_00", random(5000, 64).astype(dtype)

    def cut() -> None:
        os.truncate(path, 30_000)

    def overwrite() -> None:
        path.write_bytes(bytes(path.stat().st_size))

    for change, reason in (
        (cut, "changed while"), (overwrite, "changed while"), (path.unlink, "No such file"),
    ):  # fmt: skip
        for use in ("search", "ids", "take") if change is cut else ("search",):
            with ShardWriter(path, len(vectors), 64, dtype, {}) as writer:
                writer.append([str(row) for row in range(len(vectors))], vectors)
                writer.finish()
            os.utime(path, (1, 1))  # times of a file system can be coarse
            indexer = Indexer(open_shards(path), 1000)
            arguments = {
                "search": (random(3, 64), 5), "ids": (np.array([[4999]]),),
                "take": (np.array([4999]),),
            }  # fmt: skip
            change()
            with pytest.raises(InputError, match=f"wiki_00: .*{reason}") as caught:
                getattr(indexer, use)(*arguments[use])
            assert "\n" not in str(caught.value)


def test_shards_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    vectors, queries = random(100, 8), random(9, 8, seed=1)
    for shard in shards_of(vectors, 40):
        path = Path(tmp_path / shard.path)
        with ShardWriter(path, len(shard), 8, np.float32, {}) as writer:
            writer.append(shard.ids, shard.embeddings)
            writer.finish()
    indexer = Indexer(open_shards(tmp_path / "shard*"), 30)
    found = indexer.search(queries, 12)
    assert_same(found, plain_search(queries, vectors, 12))
    assert indexer.ids(found.positions) == [[f"p{p}" for p in row] for row in found.positions]
    assert indexer.ids(np.array([[0, 39, 40], [99, -1, -1]])) == [["p0", "p39", "p40"], ["p99"]]
