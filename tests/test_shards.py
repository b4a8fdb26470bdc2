"""Shards: a killed writer resumes to the same bytes; broken and mismatched shards are named."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from src.runtime.errors import InputError
from src.search.embeddings import open_shards
from src.search.shards import ShardWriter, is_finished, read_shard, shard_path

IDS = ["1", "wiki:2", "", "日本", "x" * 300, "a b\tc", "\ud800", "7", "8", "9", "10"]
ROWS, DIMENSION = len(IDS), 5
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIMENSION)).astype(np.float32)
METADATA = {"model": "m1", "passages": "p1", "options": "{}"}


@pytest.fixture(autouse=True)
def _spare_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def writer_of(path: Path, dtype: type = np.float16, **changed: str) -> ShardWriter:
    return ShardWriter(path, ROWS, DIMENSION, dtype, {**METADATA, **changed})


def write(path: Path, block: int = 4, dtype: type = np.float16, **changed: str) -> Path:
    with writer_of(path, dtype, **changed) as writer:
        write_rest(writer, block)
    return path


def write_rest(writer: ShardWriter, block: int) -> None:
    while writer.position < ROWS:
        rows = slice(writer.position, writer.position + block)
        writer.append(IDS[rows], VECTORS[rows])
    writer.finish()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("wikipedia_embeddings", "wikipedia_embeddings/wiki_07"),
        ("a/b/", "a/b/wiki_07"),
        ("./emb", "emb/wiki_07"),
        ("././emb", "emb/wiki_07"),
        (".//emb/", "emb/wiki_07"),
        ("./emb/x", "emb/x_07"),
        ("dir/passages", "dir/passages_07"),
        ("/passages", "/passages_07"),
        (".", "wiki_07"),
    ],
)
def test_shard_path(output, expected):
    assert shard_path(output, 7) == Path(expected)
    assert shard_path(output, 123).name == Path(expected).name.replace("07", "123")


# ----------------------------------------------------------------------------------------------
# Writing and reading back


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_shard_is_what_was_written(dtype, tmp_path):
    shard = read_shard(write(tmp_path / "folder" / "wiki_00", dtype=dtype))
    assert isinstance(shard.embeddings, np.memmap)
    assert shard.embeddings.dtype == dtype
    assert np.array_equal(shard.embeddings, VECTORS.astype(dtype))
    assert shard.ids[:] == list(shard.ids) == IDS
    assert (shard.ids[-1], shard.ids[1:3], len(shard.ids)) == (IDS[-1], IDS[1:3], ROWS)
    assert shard.metadata.items() >= METADATA.items()
    assert files(tmp_path / "folder") == ["wiki_00"]
    with pytest.raises(IndexError):
        shard.ids[ROWS]
    tensors = load_file(shard.path)
    assert np.array_equal(tensors["embeddings"], shard.embeddings)
    text, offsets = tensors["id_bytes"].tobytes(), tensors["id_offsets"].tolist()
    pieces = [text[start:end] for start, end in itertools.pairwise(offsets)]
    assert [piece.decode("utf-8", "surrogatepass") for piece in pieces] == IDS


def test_nothing_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    assert len(read_shard(write(tmp_path / "wiki_00"))) == ROWS
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_without_rows_or_without_columns(tmp_path):
    for rows, dimension in ((0, 5), (3, 0)):
        path = tmp_path / f"wiki_{rows}"
        with ShardWriter(path, rows, dimension, np.float32, METADATA) as writer:
            writer.append(["a", "b", "c"][:rows], np.empty((rows, dimension)))
            writer.finish()
        shard = read_shard(path)
        assert shard.embeddings.shape == load_file(path)["embeddings"].shape == (rows, dimension)
        assert shard.ids[:] == ["a", "b", "c"][:rows]


def test_misuse_of_the_writer(tmp_path):
    with writer_of(tmp_path / "wiki_00") as writer:
        for ids, vectors in (
            (IDS[:2], VECTORS[:3]),
            (IDS[:2], VECTORS[:2, :4]),
            (IDS * 2, np.concatenate([VECTORS] * 2)),
        ):
            with pytest.raises(ValueError, match="do not go into"):
                writer.append(ids, vectors)
        with pytest.raises(ValueError, match="0 of 11 rows"):
            writer.finish()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_embeddings_that_are_not_finite_are_not_written(value, tmp_path):
    vectors = VECTORS.copy()
    vectors[3, 1] = value  # the last of the values is finite, but not as float16
    with writer_of(tmp_path / "wiki_00") as writer:
        with pytest.raises(InputError, match=r"'日本' is not finite in float16; .*--no_fp16"):
            writer.append(IDS, vectors)
        assert writer.position == 0


# ----------------------------------------------------------------------------------------------
# Killed writers


class Killed(Exception):
    """In place of a signal."""


def test_a_writer_killed_at_any_step_resumes(tmp_path, monkeypatch):
    """Steps: each write, each flush to disk, each renaming. Nothing that follows one happens."""
    whole = write(tmp_path / "whole").read_bytes()
    path = tmp_path / "wiki_00"
    steps = [0]

    def counted(function):
        def step(*arguments):
            steps[0] -= 1
            if steps[0] == 0:
                raise Killed
            return function(*arguments)

        return step

    for owner, name in ((ShardWriter, "_write"), (os, "fsync"), (Path, "replace")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    for kill_at in range(1, 1000):
        steps[0] = kill_at
        try:
            write(path)
        except Killed:
            assert steps[0] == 0
        else:
            break
        steps[0] = 0
        if not path.exists():  # it is, when the writer was killed after the very last renaming
            before = writer_of(path).position
            assert before in (0, 4, 8, ROWS)
            write(path, block=3)
        assert path.read_bytes() == whole
        for name in files(tmp_path):
            if name != "whole":
                (tmp_path / name).unlink()
    assert kill_at == 1 + 3 * 6 + 4  # so each step was the last one once


def test_rows_are_on_disk_before_they_are_called_finished(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(
        os, "fsync", lambda number: order.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *pair: (order.append(str(pair[1])), replace(*pair)))
    write(tmp_path / "wiki_00", block=ROWS)
    assert [re.sub("[0-9a-f]{8}", "X", Path(name).name) for name in order] == [
        *(".wiki_00.partial", ".wiki_00.progress.json.X.partial", ".wiki_00.progress.json"),
        *(".wiki_00.partial", "wiki_00", tmp_path.name),
    ]


def cut(missing: int) -> Callable[[Path], object]:
    partial = ".wiki_00.partial"
    size = lambda folder: max(0, (folder / partial).stat().st_size - missing)  # noqa: E731
    return lambda folder: os.truncate(folder / partial, size(folder))


def progress(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / ".wiki_00.progress.json").write_text(text)


UNTRUSTED = [  # what was written of a shard, what became of it, and what is said
    *((np.float16, {}, cut(missing), "shorter") for missing in (1, 10, 200, 400, 9999)),
    *(
        (np.float16, {}, progress(text), "cannot be read")
        for text in ("", "[]", "{}", '{"rows": 4', '{"rows": [], "text_bytes": 1}')
    ),
    (np.float16, {"model": "m2"}, lambda folder: None, "another model"),
    (np.float32, {}, lambda folder: None, "another model"),
]


@pytest.mark.parametrize(("dtype", "changed", "damage", "said"), UNTRUSTED)
def test_a_partial_shard_that_is_not_trusted(dtype, changed, damage, said, tmp_path):
    """Cut off, without its progress, or another run's: it is begun again."""
    whole, path = write(tmp_path / "whole").read_bytes(), tmp_path / "wiki_00"
    writer_of(path, dtype, **changed).append(IDS[:8], VECTORS[:8])
    damage(tmp_path)
    with writer_of(path) as writer:
        assert writer.position == 0
        assert said in writer.discarded
        write_rest(writer, 5)
    assert path.read_bytes() == whole


def test_whether_a_shard_is_finished(tmp_path):
    path = tmp_path / "wiki_00"
    assert not is_finished(path, METADATA)
    with writer_of(path) as writer:
        writer.append(IDS[:4], VECTORS[:4])
        assert not is_finished(path, METADATA)
        write_rest(writer, 4)
    assert is_finished(path, METADATA)
    assert not is_finished(path, {**METADATA, "model": "m2"})
    os.truncate(path, path.stat().st_size - 1)
    assert not is_finished(path, METADATA)


def test_a_full_disk(tmp_path, monkeypatch):
    path = write(tmp_path / "wiki_00")
    before = path.read_bytes()
    with writer_of(path, model="m2") as writer:
        writer.append(IDS[:4], VECTORS[:4])

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "_write", full)
            with pytest.raises(InputError, match=r"wiki_00: .*No space left on device"):
                writer.append(IDS[4:], VECTORS[4:])
    assert path.read_bytes() == before
    with writer_of(path, model="m2") as writer:
        assert writer.position == 4
        write_rest(writer, 4)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs \d+ B more, but its disk has 100 B left"):
        writer_of(tmp_path / "wiki_01")
    assert files(tmp_path) == ["wiki_00"]
    with pytest.raises(InputError, match="cannot be written"):
        writer_of(path / "wiki_00")


# ----------------------------------------------------------------------------------------------
# Broken shards


def test_a_shard_cut_off_anywhere(tmp_path):
    path = write(tmp_path / "whole")
    cut = tmp_path / "cut"
    for end in range(0, path.stat().st_size, 17):
        cut.write_bytes(path.read_bytes()[:end])
        with pytest.raises(InputError, match=f"^{cut}: not a complete shard"):
            read_shard(cut)


def with_header(folder: Path, change) -> Path:
    """A shard whose header is changed, with its length put right."""
    content = write(folder / "whole").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path = folder / "changed"
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


def setting(tensor: str, key: str, value: object):
    return lambda header: header[tensor].__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("id_bytes"),
        lambda header: header.pop("embeddings"),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__=3),
        lambda header: header.update(embeddings=[]),
        setting("__metadata__", "format_version", "2"),
        setting("embeddings", "dtype", "BF16"),
        setting("embeddings", "dtype", ["F16"]),
        setting("embeddings", "shape", [ROWS, DIMENSION + 1]),
        setting("embeddings", "shape", [-ROWS, -DIMENSION]),
        setting("embeddings", "shape", [ROWS * DIMENSION]),
        setting("embeddings", "shape", [DIMENSION, ROWS]),
        setting("embeddings", "shape", [1 << 40, 1 << 40]),
        setting("embeddings", "data_offsets", [0, 1 << 40]),
        setting("embeddings", "data_offsets", [-110, 0]),
        setting("id_bytes", "data_offsets", []),
        b"",
        b"id\ttext\ttitle\n",
        b"\xff" * 100,
        (7).to_bytes(8, "little") + b'{"a":1}',
        (100_005).to_bytes(8, "little") + b'{"a":' + b"[" * 100_000,
        (10).to_bytes(8, "little") + b'{"\xff\xff":{}}',
    ],
)
def test_what_is_no_shard(change, tmp_path):
    """Other files, and shards whose header is not true."""
    path = tmp_path / "changed"
    path.write_bytes(change) if isinstance(change, bytes) else with_header(tmp_path, change)
    with pytest.raises(InputError, match=f"^{path}: not a complete shard") as caught:
        read_shard(path)
    assert "\n" not in str(caught.value)


def test_ids_that_are_broken(tmp_path):
    path = write(tmp_path / "wiki_00")
    content = bytearray(path.read_bytes())
    content[-1] = 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match="id of row 10 is not text"):
        read_shard(path).ids[-1]


# ----------------------------------------------------------------------------------------------
# Which shards belong together


def write_all(folder: Path) -> list[Path]:
    numbers = [{"shard_id": str(n), "num_shards": "3", "first": str(n * ROWS)} for n in range(3)]
    return [write(folder / f"wiki_0{n}", **more) for n, more in enumerate(numbers)]


def test_shards_are_opened_in_order(tmp_path):
    expected = [str(path) for path in write_all(tmp_path)]
    for pattern in (str(tmp_path / "wiki_*"), tmp_path / "wiki_0?"):
        assert [shard.path for shard in open_shards(pattern)] == expected
    renamed = (tmp_path / "wiki_00").rename(tmp_path / "zzz")  # the number counts, not the name
    assert [shard.path for shard in open_shards(tmp_path / "*")] == [str(renamed), *expected[1:]]


def test_pickles_are_opened_in_the_order_of_their_numbers(tmp_path):
    for number in (99, 100, 9, 10):
        content = ([str(number)], VECTORS[:1])
        (tmp_path / f"wiki_{number:02d}").write_bytes(pickle.dumps(content))
    ids = [shard.ids[0] for shard in open_shards(tmp_path / "wiki_*")]
    assert ids == ["9", "10", "99", "100"]


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    path = write(tmp_path / "wiki_[0]")
    assert open_shards(path)[0].path == str(path)


def test_no_such_shards(tmp_path):
    with pytest.raises(InputError, match=r"wiki_\*: there are no embeddings"):
        open_shards(tmp_path / "wiki_*")
    with pytest.raises(InputError, match="a folder; name its shards"):
        open_shards(tmp_path)


LAST = {"shard_id": "2", "num_shards": "3", "first": "22"}
MIXED: dict[str, tuple[Callable[[Path], object], list[str]]] = {  # change, and what is said
    **{
        f"another {key}": (
            lambda folder, key=key: write(folder / "wiki_02", **{**LAST, key: "4"}),
            ["wiki_00", "wiki_02", key, {**METADATA, **LAST}[key], "4"],
        )
        for key in ("model", "passages", "options", "num_shards")
    },
    "the first missing": (lambda f: (f / "wiki_00").unlink(), ["shard 0 of 3 is missing"]),
    "the last missing": (lambda f: (f / "wiki_02").unlink(), ["shard 2 of 3 is missing"]),
    "one doubled": (lambda f: shutil.copy(f / "wiki_01", f / "wiki_copy"),
        ["wiki_01", "wiki_copy", "both shard 1"]),
    "a gap": (lambda f: write(f / "wiki_01", **{**LAST, "shard_id": "1", "first": "12"}),
        ["wiki_00 ends at passage 11", "wiki_01 begins at 12"]),
    "a pickle": (lambda f: (f / "wiki_03").write_bytes(pickle.dumps((IDS, VECTORS))),
        ["wiki_00", "wiki_03"]),
    "an absurd number of shards": (
        lambda f: [path.unlink() for path in f.glob("wiki_*")]
        and write(f / "wiki_00", shard_id="0", num_shards="9" * 18),
        ["shard 1 of 999999999999999999 is missing"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_shards_that_do_not_belong_together(case, tmp_path):
    """Named, unless `allow_mismatch` accepts them."""
    change, words = MIXED[case]
    write_all(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError) as caught:
        open_shards(tmp_path / "wiki_*")
    for word in ("--allow_mismatch", *words):
        assert word in str(caught.value)
    assert open_shards(tmp_path / "wiki_*", allow_mismatch=True)


def test_shards_of_two_dimensions_never_mix(tmp_path):
    for number in (0, 1):
        content = (IDS, VECTORS[:, : 5 - number])
        (tmp_path / f"wiki_0{number}").write_bytes(pickle.dumps(content))
    for allow in (False, True):
        with pytest.raises(InputError, match=r"wiki_00 and .*wiki_01: .* have 5 and 4 dimensions"):
            open_shards(tmp_path / "wiki_*", allow)


@pytest.mark.parametrize("value", ["-1", "", "9" * 30])
def test_numbers_that_are_none(value, tmp_path):
    write(tmp_path / "wiki_00", shard_id=value)
    with pytest.raises(InputError, match=r"wiki_00: its shard_id is .*, not a number"):
        open_shards(tmp_path / "wiki_*")
