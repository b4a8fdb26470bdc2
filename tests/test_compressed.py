"""Compressed indexes: saved and loaded the same, told apart by what they were made from."""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from src.runtime.errors import InputError
from src.search.embeddings import open_shards
from src.search.exact import Indexer
from src.search.faiss_index import (
    CompressedIndexer,
    expected_memory,
    load_or_build,
    read_description,
    recall,
)
from src.search.shards import ShardWriter

ROWS, DIMENSION = 3000, 16
FACTORIES = [
    "PQ8x4",
    "IVF16,PQ8x4",
    "HNSW8",
    "SQfp16",
    "SQ8",
    "Flat",
    "OPQ4,IVF8,PQ4x4",
    "IVF8,Flat",
    "PQ4x4,RFlat",
]
RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.standard_normal((ROWS, DIMENSION)).astype(np.float32)
QUERIES = RANDOM.standard_normal((150, DIMENSION)).astype(np.float32)


@pytest.fixture(autouse=True)
def _spare_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_shards(folder: Path, rows: int = ROWS, **changed: str) -> Indexer:
    metadata = {"model": "m1", "passages": "p1", "options": "{}", **changed}
    for shard, (start, end) in enumerate([(0, 1000), (1000, rows)]):
        with ShardWriter(
            folder / f"wiki_0{shard}", end - start, DIMENSION, np.float16, metadata
        ) as writer:
            writer.append([f"p{row}" for row in range(start, end)], VECTORS[start:end])
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
    assert after.positions.dtype == np.int64
    expected = [[f"p{position}" for position in row] for row in after.positions]
    assert loaded.ids(after.positions) == built.ids(after.positions) == expected
    ordered = np.lexsort((after.positions, -after.scores), axis=-1)
    assert (ordered == np.arange(20)).all()


def test_a_loaded_index_needs_no_embeddings(tmp_path):
    exact = write_shards(tmp_path)
    CompressedIndexer.build(exact, "SQ8").save(tmp_path / "index")
    expected = exact.ids(exact.search(QUERIES, 1).positions)
    for path in tmp_path.glob("wiki_*"):
        path.unlink()
    loaded = CompressedIndexer.load(tmp_path / "index")
    found = loaded.ids(loaded.search(QUERIES, 1).positions)
    assert np.mean([a == b for a, b in zip(found, expected, strict=True)]) > 0.9


def test_building_again_gives_the_same(exact, tmp_path):
    for name in ("a", "b"):
        CompressedIndexer.build(exact, "IVF16,PQ4x4", seed=3).save(tmp_path / name)
    for name in ("index.faiss", "ids.safetensors", "index.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("factory", "least"),
    [("Flat", 1.0), ("SQ8", 0.9), ("HNSW8", 0.8), ("IVF8,Flat", 1.0), ("PQ8x4", 0.1)],
)  # fmt: skip
def test_recall_against_exact_search(factory, least, exact, build):
    built = build(factory)
    found, wanted = built.search(QUERIES, 10), exact.search(QUERIES, 10)
    assert least <= recall(found, wanted) <= 1
    pairs = zip(wanted.positions, found.positions, strict=True)
    counted = np.mean([len(set(wanted) & set(found)) / 10 for wanted, found in pairs])
    assert recall(found, wanted) == pytest.approx(counted)


def test_recall_of_nothing(exact):
    nothing = exact.search(QUERIES[:0], 10)
    assert recall(nothing, nothing) == 1


@pytest.mark.parametrize(
    "factory",
    [*FACTORIES, "PQ4x4fs", "IVF8,PQ4x4fs", "HNSW8,SQ8", "IVF8,PQ4x4,RFlat", "PQ4x4,Refine(SQ8)",
     "RR16,SQ8"],
)  # fmt: skip
def test_a_list_begins_every_longer_one(factory, duplicates):
    """With ties in the collection's order, and whatever questions are asked together."""
    index = CompressedIndexer.build(duplicates, factory)
    queries = np.concatenate([QUERIES[:5], duplicates.take(np.array([900]))])
    longest = index.search(queries, 2000)
    order = np.lexsort((longest.positions, -longest.scores), axis=-1)
    found = longest.positions >= 0
    assert (order[found] == np.nonzero(found)[1]).all()
    for k in (1, 3, 100, 127, 128, 129, 600, 1999):
        shorter = index.search(queries, k)
        assert np.array_equal(shorter.positions, longest.positions[:, :k])
        assert np.array_equal(shorter.scores, longest.scores[:, :k])
    for number in (0, 5):
        alone = index.search(queries[number : number + 1], 150)
        assert np.array_equal(alone.positions[0], longest.positions[number, :150])
    if "HNSW" not in factory:  # which does not look at all passages
        copies = [row for row in longest.positions[5].tolist() if 700 <= row < 1100]
        assert copies[:100] == list(range(700, 800))


@pytest.fixture(scope="module")
def duplicates(tmp_path_factory) -> Indexer:
    """2,000 embeddings, 400 of which are the same."""
    vectors = VECTORS[np.random.default_rng(5).integers(0, 700, 2000)]
    vectors[700:1100] = VECTORS[2999]
    path = tmp_path_factory.mktemp("duplicates") / "wiki_00"
    with ShardWriter(path, len(vectors), DIMENSION, np.float32, {}) as writer:
        writer.append([str(row) for row in range(len(vectors))], vectors)
        writer.finish()
    return Indexer(open_shards(path))


@pytest.mark.parametrize("factory", FACTORIES)
def test_expected_memory_is_near_the_files(factory, build, tmp_path):
    build(factory).save(tmp_path / "index")
    memory = expected_memory(ROWS, DIMENSION, 512, factory)
    size = (tmp_path / "index" / "index.faiss").stat().st_size
    assert memory.in_use == pytest.approx(size, rel=0.1)
    assert memory.building > memory.in_use


def test_expected_memory_of_exact_search():
    assert expected_memory(21_000_000, 768, 50_000).in_use == 50_000 * 768 * 4
    assert expected_memory(10, 768, 50_000).building == 10 * 768 * 4


def test_progress_is_told(exact):
    told = []
    CompressedIndexer.build(exact, "SQ8", on_rows=told.append)
    assert sum(told) == ROWS


# ----------------------------------------------------------------------------------------------
# What can be wrong


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("foo", "could not parse"),
        ("PQ7", "multiple of the number of subquantizers"),
        ("PQ4x14", "training points"),
        ("IVF5000,Flat", "training points"),
        ("IDMap,SQ8", "add_with_ids"),
        ("LSH", "metric"),
        ("", "could not parse"),
    ],
)
def test_a_factory_that_does_not_suit(factory, reason, exact):
    with pytest.raises(InputError, match=f"--index_factory '{factory}': .*{DIMENSION}.*{reason}"):
        CompressedIndexer.build(exact, factory)


def test_queries_that_do_not_suit(exact):
    index = CompressedIndexer.build(exact, "SQ8")
    with pytest.raises(InputError, match="5 dimensions, but those in the index have 16"):
        index.search(QUERIES[:, :5], 3)
    with pytest.raises(InputError, match="--n-docs"):
        index.search(QUERIES, 0)
    assert index.search(QUERIES[:0], 3).positions.shape == (0, 3)
    assert index.search(QUERIES, ROWS + 5).positions.shape == (150, ROWS)


def test_an_index_that_finds_fewer(exact):
    index = CompressedIndexer.build(exact, "IVF64,Flat")
    found = index.search(QUERIES, ROWS)
    missing = found.positions < 0
    assert missing.any()
    assert np.array_equal(missing, np.isneginf(found.scores))
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()  # they stand at the end
    ids = index.ids(found.positions)
    assert [len(row) for row in ids] == (~missing).sum(axis=1).tolist()


def test_a_collection_without_passages(tmp_path):
    with ShardWriter(tmp_path / "wiki_00", 0, DIMENSION, np.float16, {}) as writer:
        writer.finish()
    empty = Indexer(open_shards(tmp_path / "wiki_00"))
    index = CompressedIndexer.build(empty, "Flat")
    assert index.search(QUERIES, 3).positions.shape == (150, 0)
    with pytest.raises(InputError, match="PQ8"):
        CompressedIndexer.build(empty, "PQ8")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": "m2"}, "model is 'm1' in the first and 'm2' in the second"),
        ({"passages": "p2"}, "passages is"),
        ({"options": "{1}"}, "options is"),
        ({"rows": 2000}, "rows is 3000 in the first and 2000 in the second"),
    ],
)
def test_an_index_of_other_embeddings(changed, named, exact, tmp_path):
    CompressedIndexer.build(exact, "SQ8").save(tmp_path / "index")
    other = write_shards(tmp_path / "other", **changed)
    with pytest.raises(InputError, match=f"index and .*other.*wiki_00 .*{named}.*allow_mismatch"):
        CompressedIndexer.load(tmp_path / "index", other, "SQ8")
    assert (
        len(CompressedIndexer.load(tmp_path / "index", other, "SQ8", allow_mismatch=True)) == ROWS
    )


def test_an_index_of_another_kind(exact, tmp_path):
    CompressedIndexer.build(exact, "SQ8").save(tmp_path / "index")
    with pytest.raises(InputError, match="factory is 'SQ8' in the first and 'HNSW32'"):
        CompressedIndexer.load(tmp_path / "index", exact, "HNSW32")


def test_an_index_of_pickles_knows_their_files(reference, tmp_path):
    """They have no fingerprints, but names and sizes."""
    copy = shutil.copytree(reference / "legacy_embeddings", tmp_path / "copy")
    exact = Indexer(open_shards(copy / "wiki_*"))
    CompressedIndexer.build(exact, "SQ8").save(tmp_path / "index")
    assert CompressedIndexer.load(tmp_path / "index", exact, "SQ8")
    other = Indexer(open_shards([copy / "wiki_01", copy / "wiki_01", copy / "wiki_00"]))
    assert CompressedIndexer.load(tmp_path / "index", other, "SQ8")
    (copy / "wiki_00").rename(copy / "wiki_02")
    with pytest.raises(InputError, match="shards is"):
        CompressedIndexer.load(tmp_path / "index", Indexer(open_shards(copy / "wiki_*")), "SQ8")


def test_what_is_incomplete_is_named(exact, tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(InputError, match="index: not a complete index"):
        CompressedIndexer.load(folder)
    CompressedIndexer.build(exact, "SQ8").save(folder)
    for name in ("index.faiss", "ids.safetensors", "index.json"):
        content = (folder / name).read_bytes()
        for wrong in (b"", content[:-3], None):
            if wrong is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(wrong)
            with pytest.raises(InputError, match=f"^{folder}") as caught:
                CompressedIndexer.load(folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(content)
    assert CompressedIndexer.load(folder)


def test_contents_that_are_broken_are_named(exact, tmp_path):
    folder = tmp_path / "index"
    CompressedIndexer.build(exact, "SQ8").save(folder)
    whole = (folder / "index.faiss").read_bytes()
    (folder / "index.faiss").write_bytes(b"\xff" * len(whole))
    with pytest.raises(InputError, match=r"index.faiss: altered since"):
        CompressedIndexer.load(folder)
    (folder / "index.faiss").write_bytes(whole)
    description = json.loads((folder / "index.json").read_text())
    for changed in ([], {"files": {}}, {**description, "rows": 5}, {**description, "files": 3}):
        (folder / "index.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=f"^{folder}: "):
            CompressedIndexer.load(folder)


def test_an_altered_index_is_built_again(exact, tmp_path, caplog):
    caplog.set_level("INFO")
    shard = dataclasses.replace(exact.shards[0], path=str(tmp_path / "wiki_00"))
    ours = Indexer([shard])
    (tmp_path / "wiki_00").write_text("")
    log = logging.getLogger("tests")

    def found() -> np.ndarray:
        return load_or_build(ours, "SQ8", True, False, log).search(QUERIES, 9).positions

    expected, folder = found(), tmp_path / "index_SQ8"
    assert "saved" in caplog.text
    for name in ("index.faiss", "ids.safetensors", "index.json"):
        content = (folder / name).read_bytes()
        altered = bytearray(content)
        altered[len(content) * 2 // 3] ^= 4
        for wrong in (altered, content[:-9], b"", None):
            (folder / name).unlink() if wrong is None else (folder / name).write_bytes(wrong)
            caplog.clear()
            assert np.array_equal(found(), expected)
            if not (name == "index.json" and wrong is altered):  # which can be a number's digit
                assert f"{folder}" in caplog.text
                assert "building it again" in caplog.text
            caplog.clear()
            assert np.array_equal(found(), expected)
            assert "building" not in caplog.text
    (folder / "notes.txt").write_text("not ours")
    (folder / "index.faiss").write_bytes(b"")
    with pytest.raises(InputError, match="not a complete index"):
        found()
    assert (folder / "notes.txt").exists()


def test_saving_takes_the_place_of_the_index_before(exact, tmp_path):
    folder = tmp_path / "index"
    for factory in ("SQ8", "SQfp16"):
        CompressedIndexer.build(exact, factory).save(folder)
        assert read_description(folder)["factory"] == factory
    assert [path.name for path in tmp_path.iterdir() if "index" in path.name] == ["index"]


def test_a_failure_leaves_the_index_before(exact, tmp_path, monkeypatch):
    folder = tmp_path / "index"
    CompressedIndexer.build(exact, "SQ8").save(folder)

    def full(*_: object) -> None:
        raise RuntimeError("Error in faiss at io.cpp:1: Error: 'x' failed: write error: disk full")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(InputError, match=r"index: the index cannot be written \(disk full\)"):
        CompressedIndexer.build(exact, "SQfp16").save(folder)
    assert read_description(folder)["factory"] == "SQ8"
    assert [path.name for path in tmp_path.iterdir() if "index" in path.name] == ["index"]


def test_a_place_that_cannot_be_written(exact, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        CompressedIndexer.build(exact, "SQ8").save(tmp_path / "file" / "index")
