"""FAISS indexes: saved and loaded the same, and distinguished by what they were made from."""

import functools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from src.runtime.errors import InputError
from src.search import tiles
from src.search.embeddings import open_shards
from src.search.exact import Indexer
from src.search.faiss_index import CompressedIndexer, expected_memory, load_or_build, recall
from src.search.saved_index import read_description
from src.search.shards import ShardWriter

ROWS, DIMENSION = 3000, 16
FACTORIES = ["PQ8x4", "IVF16,PQ8x4", "HNSW8", "SQfp16", "Flat", "RR16,IVF8,PQ4x4", "PQ4x4,RFlat"]
RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.standard_normal((ROWS, DIMENSION)).astype(np.float32)
QUERIES = RANDOM.standard_normal((50, DIMENSION)).astype(np.float32)
LOG = logging.getLogger("tests")


@pytest.fixture(autouse=True)
def _spare_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_shards(folder: Path, vectors: np.ndarray = VECTORS, **changed: str) -> Indexer:
    metadata = {"model": "m1", "passages": "p1", "options": "{}", **changed}
    for shard, rows in enumerate(np.array_split(np.arange(len(vectors)), 2)):
        path = folder / f"wiki_0{shard}"
        with ShardWriter(path, len(rows), DIMENSION, np.float16, metadata) as writer:
            writer.append([f"p{row}" for row in rows], vectors[rows])
            writer.finish()
    return Indexer(open_shards(folder / "wiki_*"), 512)


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> Indexer:
    """One collection for all tests, which none of them changes."""
    return write_shards(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def build(exact) -> Callable[[str], CompressedIndexer]:
    """Each kind of index is trained once."""
    return functools.cache(functools.partial(CompressedIndexer.build, exact))


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_is_saved_and_loaded_the_same(factory, exact, build, tmp_path):
    built = build(factory)
    built.save(tmp_path / "index")
    loaded = CompressedIndexer.load(tmp_path / "index", exact, factory)
    assert len(loaded) == len(built) == ROWS
    before, after = built.search(QUERIES, 20), loaded.search(QUERIES, 20)
    assert np.array_equal(before.positions, after.positions)
    assert np.array_equal(before.scores, after.scores)
    size = (tmp_path / "index" / "index.faiss").stat().st_size
    work = 4 * DIMENSION * (512 + ROWS)  # a block, and the rows to train with
    memory = expected_memory(ROWS, DIMENSION, 512, factory)
    assert 0.9 * size < memory - work < 1.1 * size + 9 * ROWS


def test_expected_memory_of_exact_search():
    tile = 4 * 768 + 2 * 768 + 4 * 768  # a row, rounded, and what that loses
    tile += tiles.QUERIES_AT_ONCE * (4 + 1 + 8)  # scores, which of them count, and copies to sort
    assert expected_memory(21_000_000, 768, 50_000) == tiles.TILE_ROWS * tile
    assert expected_memory(10, 768, 50_000) == 10 * tile


def test_building_again_gives_the_same(exact, tmp_path):
    told = []
    for name in ("a", "b"):
        index = CompressedIndexer.build(exact, "IVF16,PQ4x4", seed=3, on_rows=told.append)
        index.save(tmp_path / name)
    for name in ("index.faiss", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sum(told) == 2 * ROWS


@pytest.mark.parametrize(
    ("factory", "least"),
    [("Flat", 1.0), ("SQ8", 0.9), ("HNSW8", 0.8), ("IVF8,Flat", 1.0), ("PQ8x4", 0.1)],
)
def test_recall_against_exact_search(factory, least, exact, build):
    found, wanted = build(factory).search(QUERIES, 10), exact.search(QUERIES, 10)
    pairs = zip(wanted.positions, found.positions, strict=True)
    counted = np.mean([len(set(wanted) & set(found)) / 10 for wanted, found in pairs])
    assert recall(found, wanted) == pytest.approx(counted)
    assert least <= counted <= 1


def test_recall_of_nothing(exact):
    nothing = exact.search(QUERIES[:0], 10)
    assert recall(nothing, nothing) == 1


@pytest.fixture(scope="module")
def duplicates(tmp_path_factory) -> Indexer:
    """2,000 embeddings, 400 of which are the same."""
    vectors = VECTORS[np.random.default_rng(5).integers(0, 700, 2000)]
    vectors[700:1100] = VECTORS[2999]
    return write_shards(tmp_path_factory.mktemp("duplicates"), vectors)


@pytest.mark.parametrize(
    "factory",
    [*FACTORIES, "IVF8,PQ4x4fs", "HNSW8,SQ8", "IVF8,PQ4x4,RFlat", "PQ4x4,Refine(SQ8)", "RR16,SQ8"],
)
def test_a_list_begins_every_longer_one(factory, duplicates):
    """With ties in the collection's order, and whatever questions are asked together."""
    index = CompressedIndexer.build(duplicates, factory)
    queries = np.concatenate([QUERIES[:3], duplicates.take(np.array([900]))])
    longest = index.search(queries, 2000)
    order = np.lexsort((longest.positions, -longest.scores), axis=-1)
    found = longest.positions >= 0
    assert (order[found] == np.nonzero(found)[1]).all()
    for k in (1, 100, 127, 129, 600):
        shorter = index.search(queries, k)
        assert np.array_equal(shorter.positions, longest.positions[:, :k])
        assert np.array_equal(shorter.scores, longest.scores[:, :k])
    alone = index.search(queries[3:], 150)
    assert np.array_equal(alone.positions[0], longest.positions[3, :150])
    if "HNSW" not in factory:  # which does not look at all passages
        copies = [row for row in longest.positions[3].tolist() if 700 <= row < 1100]
        assert copies[:100] == list(range(700, 800))


# ----------------------------------------------------------------------------------------------
# What can be wrong


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("foo", "could not parse"),
        ("PQ7", "multiple of the number of subquantizers"),
        ("IVF5000,Flat", "training points"),
        ("IDMap,SQ8", "add_with_ids"),
        ("", "could not parse"),
    ],
)
def test_a_factory_that_does_not_suit(factory, reason, exact):
    with pytest.raises(InputError, match=f"--index_factory '{factory}': .*{DIMENSION}.*{reason}"):
        CompressedIndexer.build(exact, factory)


def test_queries_that_do_not_suit(build):
    index = build("SQ8")
    with pytest.raises(InputError, match="5 dimensions, but those in the index have 16"):
        index.search(QUERIES[:, :5], 3)
    assert index.search(QUERIES[:0], 3).positions.shape == (0, 3)
    assert index.search(QUERIES, ROWS + 5).positions.shape == (50, ROWS)


def test_an_index_that_finds_fewer(build):
    found = build("IVF64,Flat").search(QUERIES, ROWS)
    missing = found.positions < 0
    assert missing.any()
    assert np.array_equal(missing, np.isneginf(found.scores))
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # at the end
    assert [len(row) for row in found.rows()] == (~missing).sum(axis=1).tolist()


def test_a_collection_without_passages(tmp_path):
    empty = write_shards(tmp_path, VECTORS[:0])
    assert CompressedIndexer.build(empty, "Flat").search(QUERIES, 3).positions.shape == (50, 0)
    with pytest.raises(InputError, match="PQ8"):
        CompressedIndexer.build(empty, "PQ8")


@pytest.mark.parametrize(
    ("changed", "factory", "reason"),
    [
        ({"model": "m2"}, "SQ8", "model is 'm1' in the first and 'm2' in the second"),
        ({"passages": "p2"}, "SQ8", "passages is"),
        ({"options": "{1}"}, "SQ8", "options is"),
        ({"vectors": VECTORS[:2000]}, "SQ8", "rows is 3000 in the first and 2000 in the second"),
        ({}, "HNSW32", "factory is 'SQ8' in the first and 'HNSW32'"),
    ],
)
def test_an_index_of_other_embeddings(changed, factory, reason, build, tmp_path):
    folder = tmp_path / "index"
    build("SQ8").save(folder)
    other = write_shards(tmp_path / "other", **changed)
    with pytest.raises(InputError, match=f"index and .*other.*wiki_00 .*{reason}.*allow_mismatch"):
        CompressedIndexer.load(folder, other, factory)
    allowed = CompressedIndexer.load(folder, other, factory, allow_mismatch=True)
    assert (allowed is None) == ("vectors" in changed)  # its positions would be wrong


def test_an_index_of_pickles_knows_their_files(reference, tmp_path):
    """They have no fingerprints, but names and sizes."""
    copy = shutil.copytree(reference / "legacy_embeddings", tmp_path / "copy")
    exact = Indexer(open_shards(copy / "wiki_*"))
    CompressedIndexer.build(exact, "SQ8").save(tmp_path / "index")
    assert CompressedIndexer.load(tmp_path / "index", exact, "SQ8")
    (copy / "wiki_00").rename(copy / "wiki_02")
    with pytest.raises(InputError, match="shards is"):
        CompressedIndexer.load(tmp_path / "index", Indexer(open_shards(copy / "wiki_*")), "SQ8")


def test_an_altered_index_is_built_again(exact, tmp_path, caplog):
    caplog.set_level("INFO")
    ours = write_shards(tmp_path, VECTORS[:500])

    def found() -> np.ndarray:
        caplog.clear()
        return load_or_build(ours, "SQ8", True, False, LOG).search(QUERIES, 9).positions

    expected, folder = found(), tmp_path / "index_SQ8"
    assert "saved" in caplog.text
    for name in ("index.faiss", "index.json"):
        content = (folder / name).read_bytes()
        altered = bytearray(content)
        altered[len(content) * 2 // 3] ^= 4
        broken = b"\xff" * len(content)
        for wrong in (altered, broken, content[:-9], b"", b"[]", b'{"files": 3}', None):
            if name == "index.json" and wrong is altered:  # which may be a digit or a name
                continue
            (folder / name).unlink() if wrong is None else (folder / name).write_bytes(wrong)
            assert np.array_equal(found(), expected)
            assert f"{folder} is incomplete, altered" in caplog.text
            assert "building it again" in caplog.text
    assert np.array_equal(found(), expected)
    assert "building" not in caplog.text
    (folder / "notes.txt").write_text("not ours")
    (folder / "index.faiss").write_bytes(b"")
    with pytest.raises(InputError, match=r"not a complete index, and it holds notes\.txt; remove"):
        found()
    assert (folder / "notes.txt").exists()


def test_a_failure_leaves_the_index_before(build, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    for factory in ("Flat", "SQ8"):  # the second replaces the first
        build(factory).save(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        build("SQ8").save(tmp_path / "file" / "index")

    def full(*_: object) -> None:
        raise RuntimeError("Error in faiss at io.cpp:1: Error: 'x' failed: write error: disk full")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(InputError, match=r"index: cannot be written \(disk full\); make room"):
        build("SQfp16").save(folder)
    assert read_description(folder)["factory"] == "SQ8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "index"]
