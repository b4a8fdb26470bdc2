"""Shards of embeddings: what was written comes back, however often the writer was killed."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from src.errors import InputError
from src.shards import ShardWriter, is_finished, open_shards, read_shard, shard_path

IDS = ["1", "日本", "", "a b", "é" * 50, "7"]


def vectors(dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(IDS), 5)).astype(dtype)


def metadata(shard: int = 0, shards: int = 1, first: int = 0, model: str = "m") -> dict[str, str]:
    return {
        "model": model, "passages": "p", "options": "o",
        "shard_id": str(shard), "num_shards": str(shards), "first": str(first),
    }  # fmt: skip


def write(path: Path, rows=slice(None), dtype=np.float32, **kwargs) -> Path:
    ids, block = IDS[rows], vectors(dtype)[rows]
    with ShardWriter(path, len(ids), 5, dtype, metadata(**kwargs)) as writer:
        writer.append(ids[:2], block[:2])
        writer.append(ids[2:], block[2:])
        return writer.finish()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_was_written_comes_back(dtype, tmp_path):
    path = write(tmp_path / "x_00", dtype=dtype)
    shard = read_shard(path)
    assert shard.ids[:] == IDS
    assert [shard.ids[row] for row in range(len(IDS))] == IDS
    assert np.array_equal(shard.embeddings, vectors(dtype))
    assert isinstance(shard.embeddings, np.memmap)
    assert metadata().items() <= shard.metadata.items()
    stored = load_file(path)  # the safetensors library's own word
    assert np.array_equal(stored["embeddings"], vectors(dtype))
    assert bytes(stored["id_bytes"]).decode() == "".join(IDS)
    assert is_finished(path, metadata())
    assert not is_finished(path, metadata(model="other"))
    assert [file.name for file in tmp_path.iterdir()] == ["x_00"]


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("damage", ["none", "torn block", "cut", "no progress"])
def test_a_killed_writer_goes_on(blocks, damage, tmp_path):
    whole = write(tmp_path / "whole").read_bytes()
    path = tmp_path / "x"
    cuts = [0, 2, 3, len(IDS)]
    block = vectors()
    writer = ShardWriter(path, len(IDS), 5, np.float32, metadata())
    for start, end in itertools.pairwise(cuts[: blocks + 1]):
        writer.append(IDS[start:end], block[start:end])
    writer._file.close()  # killed
    partial, progress = tmp_path / ".x.partial", tmp_path / ".x.progress.json"
    if damage == "torn block":  # bytes of a block that was not finished
        with open(partial, "ab") as file:
            file.write(b"half")
    elif damage == "cut":
        os.truncate(partial, partial.stat().st_size // 2)
    elif damage == "no progress":
        progress.unlink(missing_ok=True)
    assert not path.exists()
    with ShardWriter(path, len(IDS), 5, np.float32, metadata()) as writer:
        expected = cuts[blocks] if damage in ("none", "torn block") else 0
        assert writer.position == expected
        writer.append(IDS[writer.position :], block[writer.position :])
        writer.finish()
    assert path.read_bytes() == whole


def test_another_runs_partial_file_is_not_gone_on_from(tmp_path):
    writer = ShardWriter(tmp_path / "x", len(IDS), 5, np.float32, metadata(model="other"))
    writer.append(IDS[:2], vectors()[:2])
    writer._file.close()
    with ShardWriter(tmp_path / "x", len(IDS), 5, np.float32, metadata()) as writer:
        assert writer.position == 0
        assert "another model" in writer.discarded


def test_names():
    assert shard_path("wikipedia_embeddings", 0) == Path("wikipedia_embeddings/wiki_00")
    assert shard_path("wikipedia_embeddings/", 3) == Path("wikipedia_embeddings/wiki_03")
    assert shard_path("dir/passages", 12) == Path("dir/passages_12")
    assert shard_path("/a/b", 100) == Path("/a/b_100")


def test_shards_are_put_in_order_and_checked(tmp_path):
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for number, rows in enumerate(parts):
        write(tmp_path / f"x_{number}", rows, shard=number, shards=3, first=2 * number)
    shards = open_shards(str(tmp_path / "x_*"))
    assert [identity for shard in shards for identity in shard.ids[:]] == IDS
    backwards = open_shards([tmp_path / f"x_{n}" for n in (2, 0, 1)])
    assert [shard.path for shard in backwards] == [shard.path for shard in shards]

    with pytest.raises(InputError, match="no embeddings"):
        open_shards(str(tmp_path / "y_*"))
    with pytest.raises(InputError, match="x_"):
        open_shards(str(tmp_path / "x_[02]"))  # one is missing
    shutil.copy(tmp_path / "x_1", tmp_path / "x_1b")
    with pytest.raises(InputError, match=r"x_1b"):
        open_shards(str(tmp_path / "x_*"))  # one is there twice
    (tmp_path / "x_1b").unlink()
    write(tmp_path / "x_1", parts[1], shard=1, shards=3, first=2, model="other")
    with pytest.raises(InputError, match=r"x_0.*x_1.*other.*--allow_mismatch"):
        open_shards(str(tmp_path / "x_*"))
    assert len(open_shards(str(tmp_path / "x_*"), allow_mismatch=True)) == 3


def test_broken_files_are_named(tmp_path):
    whole = write(tmp_path / "x").read_bytes()
    cases = {
        "empty": b"",
        "short": whole[:5],
        "cut": whole[:-3],
        "no header": b"\xff" * 100,
        "text": b"hello, I am no shard of embeddings\n" * 5,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_shard(tmp_path / name)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    block = vectors()
    block[3, 1] = np.nan
    with ShardWriter(tmp_path / "x", len(IDS), 5, np.float32, metadata()) as writer:
        with pytest.raises(InputError, match=r"'a b' is not finite"):
            writer.append(IDS, block)
        assert writer.position == 0
