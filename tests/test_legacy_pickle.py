"""Pickled embeddings equal what `pickle` loads; whatever else a pickle asks for is refused."""

import pickle
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from src.runtime.errors import InputError
from src.search import embeddings
from src.search.embeddings import open_shard, open_shards
from src.search.legacy_pickle import read_legacy_embeddings

VECTORS = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
IDS = ["1", "wiki:2", "ü3", "", "x" * 300, "日本"]


def written(folder: Path, content: bytes) -> Path:
    path = folder / "embeddings_00"
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read_legacy_embeddings(written(folder, content))
    message = str(caught.value)
    assert message.startswith(str(folder)), message
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------
# What people have


def test_the_references_shards(reference):
    for path in (reference / "legacy_embeddings").glob("wiki_*"):
        ids, vectors = pickle.loads(path.read_bytes())
        found = read_legacy_embeddings(path)
        assert found.ids == ids
        assert found.vectors.dtype == vectors.dtype
        assert np.array_equal(found.vectors, vectors)


FORMS = {
    "the original's and Contriever's": (IDS, VECTORS),
    "half precision": (IDS, VECTORS.astype(np.float16)),
    "DPR's": [(name, row) for name, row in zip(IDS, VECTORS, strict=True)],
    "two of DPR's": [["a", VECTORS[0]], ["b", VECTORS[1]]],
    "column order": (IDS, np.asfortranarray(VECTORS)),
    "doubles of another machine": (IDS, VECTORS.astype(">f8")),
    "numbers as ids": ([0, 255, 65536, -1, 2**40, 2**100], VECTORS),
    "numpy numbers as ids": ([np.int64(i) for i in range(6)], VECTORS),
    "an array of ids": (np.arange(6, dtype=np.int32), VECTORS),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_protocol(form, protocol, tmp_path):
    content = FORMS[form]
    ids, vectors = content if isinstance(content, tuple) else zip(*content, strict=True)
    found = open_shard(written(tmp_path, pickle.dumps(content, protocol)))
    assert list(found.ids) == list(map(str, ids))
    assert found.embeddings.dtype in (np.float16, np.float32)
    assert np.array_equal(found.embeddings, np.stack(vectors).astype(found.embeddings.dtype))


def test_a_pickle_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = written(tmp_path, pickle.dumps((IDS, VECTORS)))
    shard = open_shard(path)
    (copy,) = tmp_path.glob(".embeddings_00.*.converted")
    assert (shard.path, shard.metadata, shard.embeddings.filename) == (str(path), {}, str(copy))
    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "read_legacy_embeddings", None)  # not read again
        assert np.array_equal(open_shard(path).embeddings, VECTORS)
    assert len(open_shards(tmp_path / "emb*")) == len(open_shards(tmp_path / "*")) == 1
    written(tmp_path, pickle.dumps((IDS, -VECTORS), 2))
    (tmp_path / "..embeddings_00.1-2.converted.partial").write_text("of a process that was killed")
    assert np.array_equal(open_shard(path).embeddings, -VECTORS)
    assert len(list(tmp_path.iterdir())) == 2
    assert not copy.exists()


@pytest.mark.parametrize("form", ["the original's and Contriever's", "DPR's"])
def test_where_no_copy_can_be_written_the_pickle_is_read(form, tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(embeddings, "ShardWriter", full)
    path = written(tmp_path, pickle.dumps(FORMS[form]))
    shard = open_shard(path)
    assert list(shard.ids) == IDS
    assert np.array_equal(shard.embeddings, VECTORS)
    assert list(tmp_path.iterdir()) == [path]
    assert "the disk is full; reading the pickle each time" in caplog.text


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_the_module_names_of_old_and_new_numpy(core, tmp_path):
    content = pickle.dumps((IDS, VECTORS), 3).replace(b"numpy._core", b"numpy.core")
    content = content.replace(b"numpy.core", core)
    assert core + b".multiarray" in content
    assert np.array_equal(read_legacy_embeddings(written(tmp_path, content)).vectors, VECTORS)


# ----------------------------------------------------------------------------------------------
# Hostile files

MARK = "ran"  # a file that appears if any of the commands below is run


def call(module: str, name: str, argument: str) -> bytes:
    """The pickle of a call, in the oldest way of naming a function."""
    return b"\x80\x02c%s\n%s\nX%s%s\x85R." % (
        module.encode(), name.encode(), struct.pack("<I", len(argument)), argument.encode(),
    )  # fmt: skip


class Reduced:
    """Pickles as a call, as an attacker's object does."""

    def __init__(self, *reduced: object):
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


def touch() -> str:
    return f"open({MARK!r}, 'w').close()"


HOSTILE = {
    "'os.system'": call("os", "system", f"touch {MARK}"),
    "'posix.system'": call("posix", "system", f"touch {MARK}"),
    "'__builtin__.eval'": call("__builtin__", "eval", touch()),
    "'builtins.exec'": pickle.dumps((IDS, Reduced(exec, (touch(),))), 4),
    "'builtins.getattr'": pickle.dumps(([Reduced(getattr, ("x", "encode"))], VECTORS), 5),
    "'numpy.load'": pickle.dumps(Reduced(np.load, ("x.npy", None, True)), 3),
    "'_codecs.lookup'": call("_codecs", "lookup", "zip"),
    "'xml.dom.pulldom.parse'": call("xml.dom.pulldom", "parse", "x"),
    "'os.path.join'": b"\x80\x04\x8c\x02os\x8c\x09path.join\x93.",
    "INST": b"(isubprocess\ncall\n.",
    "OBJ": b"(cos\npopen\nX\x02\x00\x00\x00lso.",
    "NEWOBJ": b"\x80\x02cos\nfork\n)\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "BINPERSID": b"\x80\x02K\x01Q.",
    "PERSID": b"Pabc\n.",
    "EMPTY_DICT": b"\x80\x02}.",
    "EMPTY_SET": b"\x80\x04\x8f.",
    "dtype 'O8'": pickle.dumps((IDS, np.array([["a"]] * 6, dtype=object)), 4),
    "dtype 'U1'": pickle.dumps((np.array(list("abcdef")), VECTORS), 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_allowed_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    message = refusal(tmp_path, HOSTILE[name])
    assert f"refused, because this pickle asks for {name}" in message.replace(
        "asks for the pickle instruction ", "asks for "
    ).replace("asks for a numpy array of ", "asks for ")
    assert not Path(MARK).exists()
    assert set(sys.modules) == before  # to import is to run, too


def number(value: int) -> bytes:
    """The pickle of a number of any size."""
    width = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def array(shape: tuple, data: bytes = bytes(16)) -> bytes:
    """The pickle of a float32 array that says to have a shape."""
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
    order = b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x89\x88\x87R" + order
    sizes = b"".join(map(number, shape))
    content = b"B" + struct.pack("<I", len(data)) + data
    return empty + b"(K\x01(" + sizes + b"t" + dtype + b"\x89" + content + b"tb"


def pair(ids: bytes, vectors: bytes) -> bytes:
    return b"\x80\x03" + ids + vectors + b"\x86."


ABSURD = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 34) + b"ab.",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"ab.",
    "text": b"\x80\x04X" + struct.pack("<I", 1 << 31) + b"ab.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"ab.",
    "a memo": b"\x80\x02]r" + struct.pack("<I", (1 << 32) - 1) + b".",
    "a memo that is not there": b"\x80\x02j" + struct.pack("<I", (1 << 32) - 1) + b".",
    "a shape": pair(b"]", array((1 << 47, 4))),
    "a shape beyond all": pair(b"]", array((1 << 100, 1 << 100))),
    "a negative shape": pair(b"]", array((-2, -2))),
    "a shape of one dimension": pair(b"](K\x01e", array((4,))),
    "rows without columns": pair(b"]", array((1 << 47, 0), b"")),
    "one vector many times": b"\x80\x03]q\x00(K\x01%s\x86q\x01" % array((4,))
    + b"h\x01" * 10_000
    + b"e.",
    "lists in lists": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
}


def doubled(times: int) -> bytes:
    """A text in lists in lists: each has the one before twice, so its `repr` is 2^times long."""
    put = [b"q" + bytes([depth + 1]) for depth in range(times)]
    get = [b"h" + bytes([depth + 1]) for depth in range(times)]
    return b"".join(
        b"](" + (get[d - 1] * 2 if d else b"K\x01K\x01") + b"e" + put[d] for d in range(times)
    )  # leaves all on the stack


ABSURD |= {  # what cannot be called; the state of what cannot have one
    "None called": b"\x80\x02cnumpy\nndarray\n)R.",
    "a number called": b"\x80\x02K\x01)R.",
    "an array called": b"\x80\x03" + b"cnumpy.core.multiarray\n_reconstruct\n)R)R.",
    "a function's state": b"\x80\x02c_codecs\nencode\nK\x01b.",
    "a class's state": b"\x80\x02cnumpy\ndtype\nK\x01\x85b.",
    "a list's state": b"\x80\x02]K\x01\x85b.",
    "no text encoded": b"\x80\x02c_codecs\nencode\nN]\x86b.",
}
MEGABYTE = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x00"
ABSURD |= {
    "a nested dtype": b"\x80\x02" + doubled(60) + b"cnumpy\ndtype\nh\x3c\x89\x88\x87R.",
    "nested ids": b"\x80\x03" + doubled(60) + b"h\x3c" + array((2, 2)) + b"\x86.",
    "a shape of many huge integers": pair(b"]", array((1 << 2000,) * 4000)),
    "an id many times": pair(
        b"](" + MEGABYTE + b"h\x00" * 7999 + b"e", array((8000, 1), bytes(32_000))
    ),
    "a text encoded many times": b"\x80\x02" + MEGABYTE + b"]("
    + b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R" * 1000 + b"e.",
    "many lists": b"\x80\x02](" + b"]" * 300_000 + b"e.",
    "many tuples": b"\x80\x02](" + b"K\x01\x85" * 200_000 + b"e.",
    "many names": b"\x80\x04K\x01" + b"\x94" * 300_000 + b".",
    "many texts": b"\x80\x04](" + b"\x8c\x02ab" * 300_000 + b"e.",
    "many marks": b"\x80\x04" + b"(" * 300_000 + b".",
    "a dtype of many floats": b"\x80\x02cnumpy\ndtype\nX\x0c\0\0\0(1000000,)f4\x89\x88\x87R.",
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_pickles_end_early(name, tmp_path):
    tracemalloc.start()
    refusal(tmp_path, ABSURD[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * len(ABSURD[name]) + 16_000_000


WRONG = {
    "cannot mmap an empty file": b"",
    "it holds neither (ids, array) nor a list of (id, vector)": pickle.dumps(5),
    "it holds neither": pickle.dumps(VECTORS),
    "nor a list of": pickle.dumps([("a", VECTORS[0]), ("b",)]),
    "5 ids, but 6 embeddings": pickle.dumps((IDS[:5], VECTORS)),
    "its array is int32 [6, 4], not float [n, d]": pickle.dumps((IDS, VECTORS.astype(np.int32))),
    "its ids are not texts": pickle.dumps(("abcdef", VECTORS)),
    "its ids are not texts or whole numbers": pickle.dumps(([[]] * 6, VECTORS)),
    "its vectors are not all float [d]": pickle.dumps(
        [("a", VECTORS[0]), ("b", VECTORS[0, :2]), ("c", VECTORS[0])]
    ),
}


@pytest.mark.parametrize("reason", WRONG)
def test_other_contents(reason, tmp_path):
    assert reason in refusal(tmp_path, WRONG[reason])


def test_cut_off_anywhere(reference, tmp_path):
    content = (reference / "legacy_embeddings" / "wiki_00").read_bytes()
    for end in range(0, len(content), 211):
        refusal(tmp_path, content[:end])
