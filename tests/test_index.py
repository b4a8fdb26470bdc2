"""Search equals brute force and IndexFlatIP, ties included, over any shards and block sizes."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from src.compressed import CompressedIndexer, expected_memory, factory_string, recall
from src.errors import InputError
from src.index import Indexer, merge
from src.shards import Shard, ShardWriter, open_shards


def make_vectors(n: int = 97, d: int = 8, ties: bool = True) -> np.ndarray:
    """Small whole numbers, so that sums are exact and many scores are equal."""
    rng = np.random.default_rng(0)
    if ties:
        return rng.integers(-2, 3, (n, d)).astype(np.float32)
    return rng.standard_normal((n, d)).astype(np.float32)


def make_shards(folder: Path, vectors: np.ndarray, n_shards: int, dtype=np.float32) -> list[Shard]:
    folder.mkdir()
    bounds = [len(vectors) * number // n_shards for number in range(n_shards + 1)]
    for number in range(n_shards):
        first, last = bounds[number], bounds[number + 1]
        metadata = {
            "model": "m", "passages": "p", "options": "o", "first": str(first),
            "shard_id": str(number), "num_shards": str(n_shards),
        }  # fmt: skip
        shape = last - first, vectors.shape[1]
        with ShardWriter(folder / f"x_{number:02d}", *shape, dtype, metadata) as writer:
            writer.append([f"id{row}" for row in range(first, last)], vectors[first:last])
            writer.finish()
    return open_shards(str(folder / "x_*"))


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int):
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # ties: the lower position first
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("n_shards", [1, 3, 7])
@pytest.mark.parametrize("block_rows", [1, 13, 50_000])
def test_exact_search_is_brute_force(dtype, n_shards, block_rows, tmp_path):
    vectors, queries = make_vectors(), make_vectors(11)[::-1]
    exact = Indexer(make_shards(tmp_path / "s", vectors, n_shards, dtype), block_rows)
    assert (len(exact), exact.dimension) == (97, 8)
    for k in (1, 10, 97, 200):
        found = exact.search(queries, k)
        scores, positions = brute_force(queries, vectors, k)
        assert np.array_equal(found.positions, positions)
        assert np.array_equal(found.scores, scores)
    assert exact.ids(positions[:2, :3]) == [[f"id{p}" for p in row] for row in positions[:2, :3]]


def test_exact_search_is_index_flat_ip(tmp_path):
    vectors, queries = make_vectors(1000, 32, ties=False), make_vectors(20, 32, ties=False)
    flat = faiss.IndexFlatIP(32)
    flat.add(vectors)
    scores, positions = flat.search(queries, 25)
    found = Indexer(make_shards(tmp_path / "s", vectors, 3), 100).search(queries, 25)
    assert np.array_equal(found.positions, positions)
    assert np.abs(found.scores - scores).max() < 1e-4


@pytest.mark.parametrize("n", [2, 3])
def test_processes_share_the_blocks(n, tmp_path):
    vectors, queries = make_vectors(), make_vectors(11)
    exact = Indexer(make_shards(tmp_path / "s", vectors, 2), 10)
    parts = [exact.search(queries, 20, (rank, n)) for rank in range(n)]
    together = merge(parts, 20)
    whole = exact.search(queries, 20)
    assert np.array_equal(together.positions, whole.positions)
    assert np.array_equal(together.scores, whole.scores)


def test_no_queries_and_wrong_ones(tmp_path):
    exact = Indexer(make_shards(tmp_path / "s", make_vectors(), 1))
    assert exact.search(np.zeros((0, 8), np.float32), 5).positions.shape == (0, 5)
    with pytest.raises(InputError, match=r"(?s)9.*8|8.*9"):
        exact.search(np.zeros((2, 9), np.float32), 5)
    with pytest.raises(InputError, match="finite"):
        exact.search(np.full((2, 8), np.nan, np.float32), 5)


def test_results_from_the_references_embeddings(reference: Path):
    exact = Indexer(open_shards(str(reference / "legacy_embeddings" / "wiki_*")), 50)
    queries = np.load(reference / "question_embeddings.npz")["embeddings"]
    found = exact.search(queries, 10)
    expected = json.loads((reference / "retrieved.json").read_text())["retrieved"]
    assert exact.ids(found.positions) == [[c["id"] for c in row["ctxs"]] for row in expected]
    scores = np.array([[c["score"] for c in row["ctxs"]] for row in expected])
    assert np.abs(found.scores - scores).max() < 1e-4


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "PQ4x4", "IVF4,Flat", "HNSW8"])
def test_compressed_search_is_what_faiss_finds(factory, tmp_path):
    vectors, queries = make_vectors(400, 16, ties=False), make_vectors(30, 16, ties=False)
    exact = Indexer(make_shards(tmp_path / "s", vectors, 3), 64)
    built = CompressedIndexer.build(exact, factory)
    built.save(tmp_path / "index")
    loaded = CompressedIndexer.load(tmp_path / "index", exact, factory)
    found, again = built.search(queries, 10), loaded.search(queries, 10)
    assert np.array_equal(found.positions, again.positions)
    assert np.array_equal(found.scores, again.scores)
    assert len(built) == len(loaded) == 400
    assert loaded.ids(found.positions[:1]) == [[f"id{p}" for p in found.positions[0] if p >= 0]]
    wanted = brute_force(queries, vectors, 10)[1]
    share = np.mean(
        [len(np.intersect1d(*rows)) / 10 for rows in zip(found.positions, wanted, strict=True)]
    )
    assert recall(built, exact, queries, 10) == pytest.approx(share)
    assert share == 1.0 if factory == "Flat" else share > 0.3
    memory = expected_memory(400, 16, 64, factory)
    size = (tmp_path / "index" / "index.faiss").stat().st_size
    assert 0.5 * size < memory.in_use < 2 * size


def test_an_index_of_something_else_is_refused(tmp_path):
    exact = Indexer(make_shards(tmp_path / "a", make_vectors(), 1))
    fewer = Indexer(make_shards(tmp_path / "b", make_vectors(50), 1))
    CompressedIndexer.build(exact, "SQfp16").save(tmp_path / "index")
    with pytest.raises(InputError, match=r"index.*--allow_mismatch"):
        CompressedIndexer.load(tmp_path / "index", fewer, "SQfp16")
    with pytest.raises(InputError, match="SQfp16"):
        CompressedIndexer.load(tmp_path / "index", exact, "PQ4x4")
    (tmp_path / "index" / "index.faiss").write_bytes(b"short")
    with pytest.raises(InputError, match="index"):
        CompressedIndexer.load(tmp_path / "index", exact, "SQfp16")


def test_factories():
    assert factory_string("", 0, 8) == ""
    assert factory_string("", 64, 8) == "PQ64x8"
    assert factory_string("IVF8,PQ4", 0, 8) == "IVF8,PQ4"
    with pytest.raises(InputError, match="give one"):
        factory_string("PQ8", 8, 8)


@pytest.mark.parametrize("factory", ["nonsense", "PQ5", "IVF1000,Flat"])
def test_impossible_factories(factory, tmp_path):
    exact = Indexer(make_shards(tmp_path / "s", make_vectors(), 1))
    with pytest.raises(InputError, match=factory):
        CompressedIndexer.build(exact, factory)
