"""Pickled embeddings of others are read, and hostile pickles run nothing."""

import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from src.errors import InputError
from src.legacy_pickle import read_legacy_embeddings


def test_the_references_embeddings(reference: Path):
    for name in ("wiki_00", "wiki_01"):
        path = reference / "legacy_embeddings" / name
        with open(path, "rb") as file:
            ids, expected = pickle.load(file)  # ours, and known to be harmless
        found = read_legacy_embeddings(path)
        assert found.ids == [str(identity) for identity in ids]
        assert np.array_equal(found.vectors, expected)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_layouts_of_others(protocol, dtype, tmp_path):
    vectors = np.random.default_rng(0).standard_normal((4, 3)).astype(dtype)
    ids = ["a", "日本", "3", "wiki:4"]
    for content in ((ids, vectors), list(zip(ids, vectors, strict=True))):
        (tmp_path / "x").write_bytes(pickle.dumps(content, protocol=protocol))
        found = read_legacy_embeddings(tmp_path / "x")
        assert found.ids == ids
        assert np.array_equal(found.vectors, vectors)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(folder: Path) -> dict[str, bytes]:
    touch = f"touch {folder}/ran"
    nested = b"\x80\x04" + b"]" * 200_000 + b"."
    huge_bytes = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"abc."
    real = pickle.dumps((["a"], np.zeros((1, 2), np.float32)), protocol=4)
    return {
        "system": pickle.dumps((["a"], Call(os.system, touch))),
        "eval": pickle.dumps(Call(eval, f"__import__('os').system('{touch}')")),
        "exec": pickle.dumps(Call(exec, f"open('{folder}/ran', 'w')")),
        "getattr": pickle.dumps(Call(getattr, "text", "upper")),
        "objects": pickle.dumps((["a"], np.array([[Call(os.system, touch)]], dtype=object))),
        "inst": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "nested": nested,
        "huge bytes": huge_bytes,
        "huge memo": b"\x80\x04r\xff\xff\xff\xff.",
        "cut": real[:-20],
        "a dictionary": pickle.dumps({"a": 1}),
        "numbers of ids and vectors differ": pickle.dumps((["a", "b"], np.zeros((1, 2)))),
        "no pickle": b"hello",
        "empty": b"",
    }


def test_hostile_pickles_run_nothing(tmp_path):
    for name, content in hostile(tmp_path).items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_legacy_embeddings(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_what_was_asked_for_is_named(tmp_path):
    for name in ("system", "eval", "getattr"):
        (tmp_path / "x").write_bytes(hostile(tmp_path)[name])
        with pytest.raises(InputError, match=name):
            read_legacy_embeddings(tmp_path / "x")


def test_a_claimed_shape_allocates_nothing(tmp_path):
    small = pickle.dumps((["a"], np.zeros((1, 2), np.float32)), protocol=4)
    assert small.count(b"K\x01K\x02\x86") == 1  # the shape (1, 2)
    large = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")  # LONG1
    stream = io.BytesIO(small.replace(b"K\x01K\x02\x86", large + b"K\x02\x86"))
    (tmp_path / "x").write_bytes(stream.getvalue())
    with pytest.raises(InputError):
        read_legacy_embeddings(tmp_path / "x")
