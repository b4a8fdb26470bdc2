"""Passage collections equal what `csv` and `json` read; their caches; errors name the line."""

import csv
import gzip
import io
import itertools
import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import pytest

from src.data import files
from src.data import passages as module
from src.data.passages import Passage, Passages
from src.runtime.errors import InputError

HEADER = "id\ttext\ttitle\n"


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=[1 << 20, 13])
def window(request, monkeypatch):
    """Small windows put every kind of boundary in the middle of every kind of thing."""
    monkeypatch.setattr(files, "_CHUNK", request.param)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for the disk's sake: there are many files


@pytest.fixture
def any_ids(monkeypatch):
    """Ids need not be unique."""
    monkeypatch.setattr(Passages, "_make_id_table", lambda self: iter([np.array([0])]))


_numbers = itertools.count()


def write(folder: Path, content: str | bytes, name: str = "passages") -> Path:
    """A file with a name of its own, so that no cache of another lies beside it."""
    path = folder / f"{name}{next(_numbers)}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_csv(text: str) -> list[list[str]]:
    """The slow way: the rows that are not empty."""
    rows = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), delimiter="\t")
    return [row for row in rows if row]


def to_passages(rows: list[list[str]]) -> list[Passage]:
    """Rows of id, text, title, as DPR orders them."""
    return [Passage(identity, title, text) for identity, text, title in rows]


# ----------------------------------------------------------------------------------------------
# TSV and JSONL


def random_field(rng: random.Random) -> str:
    """A field in one of the forms that `csv` takes for one, by the rules or not."""
    anything = "".join(rng.choice('ab"\t\n\r é日\v') for _ in range(rng.randrange(9)))
    quoted = '"' + anything.replace('"', '""') + '"'
    bare = "".join(rng.choice('ab" é日\v\f\x1c\u2028') for _ in range(rng.randrange(9)))
    bare = bare.lstrip('"')  # or it would open the field
    return rng.choice([quoted, quoted, bare, quoted + bare, "", "plain"])


@pytest.mark.parametrize("seed", range(15))
def test_random_rows_equal_csv(seed, tmp_path, window, any_ids):
    rng = random.Random(seed)
    text = "\ufeff" * rng.randrange(2) + rng.choice(["", "\n", "\r\n\n"]) + HEADER
    endings = rng.choice([["\n"], ["\r\n"], ["\n", "\r\n", "\r", "\n\n"]])
    for _ in range(rng.randrange(1, 20)):
        text += "\t".join(random_field(rng) for _ in range(3)) + rng.choice(endings)
    text = rng.choice([text, text.rstrip("\r\n")])
    rows = read_csv(text)[1:]
    opened = Passages(write(tmp_path, text))
    assert list(opened) == to_passages(rows)
    assert list(opened.ids()) == [row[0] for row in rows]


NAMES = [
    ("id", "text", "title"),
    ("ID", "Text ", "Title"),
    ("pid", " passage", "Page Title"),
    ("Doc_ID", "CONTENTS", "doc-title"),
    ("#_id", "body", "title  "),
    ("Passage ID", "passage text", "document title"),
]


@pytest.mark.parametrize(
    ("names", "order"), list(zip(NAMES, itertools.permutations(range(3)), strict=True))
)
def test_a_header_gives_the_columns(order, names, tmp_path):
    fields = ("7", "all of it", "A name")
    row = "\t".join(fields[column] for column in order) + "\n"
    header = "\t".join(names[column] for column in order)
    quoted = "\t".join(f'"{names[column]}"' for column in order)
    for start in (header + "\n", "\ufeff" + header + "\n\n", "\n" + quoted + "\r\n"):
        opened = Passages(write(tmp_path, start + row))
        assert list(opened) == [Passage("7", "A name", "all of it")]
        assert list(opened.ids()) == ["7"]
        assert opened.find(["7"]) == [0]


@pytest.mark.parametrize(
    ("content", "passage"),
    [
        ("7\tA text of words.\n8\tb\n", Passage("7", "", "A text of words.")),  # MS MARCO's
        ("pid\tpassage\n7\ta\n", Passage("7", "", "a")),
        ("body\tdocid\na\t7\n", Passage("7", "", "a")),
        ("id\ttext\ttitle\turl\n7\ta\tA\thttp\n", Passage("7", "A", "a")),
        ("id\ttext\ttitle\t\n7\ta\tA\t\n", Passage("7", "A", "a")),
        ("url\tid\ttext\ttitle\nhttp\t7\ta\tA\n", Passage("7", "A", "a")),
        ("7\tText\tTitle\n", Passage("7", "Title", "Text")),  # without a header
        ("wiki\tThis is a sentence.\tWiki\n", Passage("wiki", "Wiki", "This is a sentence.")),
        ("x\t" + "long " * 9 + "\tX\n", Passage("x", "X", "long " * 9)),
    ],
)
def test_columns(content, passage, tmp_path):
    opened = Passages(write(tmp_path, content))
    assert opened[0] == next(iter(opened)) == passage


@pytest.mark.parametrize(
    "header",
    ["id\ttext\tname", "docno\tparagraph\theading", "ID\tArticle", "id\ttitle", "key\tvalue\t",
     "id\ttext\ttext", "id\tpid\ttext\ttitle", "number\tText (words)\tTitle", "é\tü\tö"],
)  # fmt: skip
def test_an_unknown_header_is_shown(header, tmp_path):
    path = write(tmp_path, f"\n{header}\n" + "\t".join("1ab"[: header.count("\t") + 1]) + "\n")
    shown = repr(header)[1:-1]
    with pytest.raises(InputError) as caught:
        Passages(path)
    assert str(caught.value).startswith(
        f"{path}, line 2: the first row, '{shown}', looks like a he"
    )
    assert "name the columns id, text and title" in str(caught.value)


@pytest.mark.slow
def test_a_long_row(tmp_path, window, monkeypatch):
    rows = [[str(i), "long text " * (20_000 if i == 50 else 1), "a title"] for i in range(100)]
    text = HEADER + "".join("\t".join(row) + "\n" for row in rows)
    assert list(Passages(write(tmp_path, text))) == to_passages(rows)
    for field in ("long text " * 20_000, '"' + "long\ntext " * 20_000 + '"'):
        monkeypatch.setattr(module, "LONGEST_ROW", 100_000)
        monkeypatch.setattr(files, "LONGEST_ROW", 100_000)  # such a row is not read to its end
        with pytest.raises(InputError, match=r"line 3: this row has no end; is a quote mark"):
            Passages(write(tmp_path, f"{HEADER}1\ta\tb\n2\t{field}\tb\n"))


@pytest.mark.parametrize("seed", range(5))
def test_random_lines_equal_json(seed, tmp_path, window, any_ids):
    rng = random.Random(seed)
    lines, wanted = [], []
    for _ in range(rng.randrange(1, 12)):
        text, title = random_field(rng), random_field(rng)
        identity = rng.choice([rng.randrange(99), "doc-" + random_field(rng)])
        line = {rng.choice(["id", "_id"]): identity, rng.choice(["text", "contents"]): text}
        if rng.random() < 0.7:
            line["title"] = title
        elif "contents" in line:  # without a title, it may hold one: see below
            line["contents"] = text = text.replace("\n", " ")
        lines.append(json.dumps(line, ensure_ascii=bool(rng.randrange(2))))
        wanted.append(Passage(str(identity), line.get("title") or "", text))
    for end in ("\n", "\r\n", "\n\n"):
        content = "\ufeff" * rng.randrange(2) + end.join(lines) + end * rng.randrange(2)
        opened = Passages(write(tmp_path, content))
        assert list(opened) == wanted
        assert list(opened.ids()) == [passage.id for passage in wanted]


@pytest.mark.parametrize(
    ("changes", "title", "text"),
    [
        ({"contents": "Nile\nA river.\nLong."}, "Nile", "A river.\nLong."),
        ({"contents": '"""Heroes"" (album)"\nBy Bowie.'}, '"Heroes" (album)', "By Bowie."),
        ({"contents": '"\nA quote mark.'}, '"', "A quote mark."),
        ({"contents": '"A river."'}, "", '"A river."'),
        ({"contents": "\nA river."}, "", "A river."),
        ({"contents": "A river.\n"}, "", "A river.\n"),  # CACM and SciFact in Anserini's format
        ({"contents": "A river.\r\n \t\n\u3000"}, "", "A river.\r\n \t\n\u3000"),
        ({"docid": "doc1", "passage": "A river.\n"}, "", "A river.\n"),
        ({"contents": "Nile\nA river.", "title": "The Nile"}, "The Nile", "Nile\nA river."),
        ({"contents": "Nile\nA river.", "title": ""}, "", "Nile\nA river."),
        ({"text": "A river.", "contents": "Nile\nA river."}, "", "A river."),
    ],
)
def test_the_title_in_pyserinis_contents(changes, title, text, tmp_path):
    opened = Passages(write(tmp_path, json.dumps({"docid": "doc1", **changes})))
    assert list(opened) == [Passage("doc1", title, text)]


def test_it_is_a_sequence(tmp_path):
    opened = Passages(write(tmp_path, "1\ta\tA\n2\tb\tB\n3\tc\tC"))
    assert len(opened) == 3
    assert opened[-1] == opened[2] == opened[np.int64(2)] == Passage("3", "C", "c")
    assert opened[0] in opened
    with pytest.raises(IndexError):
        opened[3]


# ----------------------------------------------------------------------------------------------
# Finding by id, and the fingerprint


@pytest.mark.parametrize("first", [0, 8, 10**17])
@pytest.mark.parametrize("columns", [(0, 1, 2), (2, 1, 0)])
def test_ids_that_count_up_need_no_table(first, columns, tmp_path):
    fields = ["id", "text", "title"]
    rows = [fields, *([str(first + i), "text", "title"] for i in range(30))]
    text = "\n".join("\t".join(row[column] for column in columns) for row in rows)
    opened = Passages(write(tmp_path, text))
    assert opened.find(list(opened.ids())) == list(range(30))
    assert len(opened._id_table) == 1
    for missing in (str(first - 1), str(first + 30), f"0{first}", f"+{first}", f"{first} ", ""):
        with pytest.raises(InputError, match=r"no passage has the id .*give the collection"):
            opened.find([missing])


@pytest.mark.parametrize("ids", [["1", "2", "3"], ["1", "7", "3"]])
def test_dprs_ids_are_those_of_its_tsv(ids, tmp_path):
    """Its embeddings say `wiki:1` of the passage that its TSV calls 1."""
    opened = Passages(write(tmp_path, "".join(f"{name}\tx\ty\n" for name in ids)))
    assert opened.find([f"wiki:{ids[1]}", ids[1], f"wiki:{ids[2]}"]) == [1, 1, 2]
    for missing in ("wiki:9", "wiki:", "wiki:wiki:1", "nq:1"):
        with pytest.raises(InputError, match=f"no passage has the id '{missing}'; give"):
            opened.find([missing])
    both = Passages(write(tmp_path, f"{ids[0]}\tx\ty\nwiki:{ids[0]}\tx\ty\n"))
    assert both.find([ids[0], f"wiki:{ids[0]}"]) == [0, 1]  # a collection's own ids come first


IDS = {
    "with a gap": ["1", "2", "4"],
    "with a zero before": ["01", "02", "03"],
    "with an other digit": ["1", "2", "٣"],
    "down": ["3", "2", "1"],
    "too large": [str(10**30 + i) for i in range(3)],
    "quoted": ['"1"', '"2\t"', '"3"'],
    "quoted marks": ['"a""b"', "a", '""'],
    "long": ["a" * 50, "a" * 51, "a" * 31],
    "random": [f"{random.Random(i).random()}é" for i in range(500)],
}


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("n_hashes", [1 << 60, 7], ids=["", "with colliding hashes"])
def test_find_equals_a_dict(case, n_hashes, tmp_path, monkeypatch):
    hash_all = module._hash
    monkeypatch.setattr(module, "_hash", lambda identity: hash_all(identity) % n_hashes)
    text = HEADER + "".join(f"{identity}\ttext\ttitle\n" for identity in IDS[case])
    opened = Passages(write(tmp_path, text))
    ids = [row[0] for row in read_csv(text)[1:]]
    table = {identity: index for index, identity in enumerate(ids)}
    wanted = random.Random(0).choices(ids, k=1000)
    assert opened.find(wanted) == [table[identity] for identity in wanted]
    for missing in ["5", "a" * 32, "", "é"]:
        if missing not in table:
            with pytest.raises(InputError, match="no passage has the id"):
                opened.find([ids[0], missing])
    monkeypatch.setattr(Passages, "_make_id_table", None)  # the cache has it
    again = Passages(opened.path)
    assert again.find(wanted) == opened.find(wanted)


@pytest.mark.parametrize("n_hashes", [1 << 60, 2])
def test_an_id_must_be_unique(n_hashes, tmp_path, monkeypatch):
    hash_all = module._hash
    monkeypatch.setattr(module, "_hash", lambda identity: hash_all(identity) % n_hashes)
    path = write(tmp_path, 'a\t"two\nlines"\tA\nb\tx\tB\nc\tx\tC\nb\ty\tD\n')
    message = r"line 5: the id 'b' is that of line 3 too"
    for _ in range(2):  # with the other cache in place, too
        with pytest.raises(InputError, match=message):
            Passages(path)
    lines = [{"id": 7, "text": "a"}, {"_id": "8", "text": "b"}, {"docid": "7", "text": "c"}]
    path = write(tmp_path, "\n\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"line 5: the id '7' is that of line 1 too"):
        Passages(path)


def test_the_fingerprint_is_the_contents(tmp_path):
    def fingerprint(content: bytes) -> str:
        return Passages(write(tmp_path, content)).fingerprint()

    rows = [f"{i}\t{'text ' * 9}\ttitle\n".encode() for i in range(22000)]
    small, large = b"".join(rows[:100]), b"".join(rows)
    assert fingerprint(small) == fingerprint(small) == fingerprint(gzip.compress(small))
    assert len({fingerprint(b"".join(rows[:n])) for n in (1, 2, 100, 20000, 22000)}) == 5
    # A file up to 1 MiB is read whole.
    for content, position in ((small, 0), (small, 2000), (small, 3000), (large, len(large) - 2)):
        changed = content[:position] + b"y" + content[position + 1 :]
        assert fingerprint(changed) != fingerprint(content)


# ----------------------------------------------------------------------------------------------
# Caches and unpacked files

ROWS = "1\ta\tA\n2\tb\tB\n"


def caches(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.glob(f".{path.name}*"))


def test_the_cache_is_used(tmp_path, monkeypatch):
    path = write(tmp_path, ROWS)
    path.chmod(0o644)
    first = Passages(path)
    first.find(["1"])
    side = path.with_name(f".{path.name}.offsets")
    assert side.stat().st_mode & 0o777 == 0o644  # for all who may read the source
    assert caches(path) == [f".{path.name}.ids", f".{path.name}.offsets"]
    monkeypatch.setattr(module, "_find_passages", None)
    monkeypatch.setattr(Passages, "_make_id_table", None)
    again = Passages(path)
    assert list(again) == list(first)
    assert isinstance(again._offsets.base.base, np.memmap)  # mapped: not in this process's memory


@pytest.mark.parametrize("keeps", ["nothing", "size", "time"])
def test_the_cache_is_rebuilt_when_the_source_changes(keeps, tmp_path):
    path = write(tmp_path, ROWS)
    Passages(path).find(["2"])
    before = path.stat()
    path.write_text("12\ta\t\n3\tb\tB\n" if keeps == "size" else "3\tb\tB\n")
    time = before.st_mtime_ns + (0 if keeps == "time" else 1)
    os.utime(path, ns=(time, time))
    opened = Passages(path)
    assert list(opened) == to_passages(read_csv(path.read_text()))
    assert opened.find(["3"]) == [len(opened) - 1]


@pytest.mark.parametrize("suffix", [".offsets", ".ids"])
def test_a_damaged_cache_is_rebuilt(suffix, tmp_path):
    path = write(tmp_path, "".join(f"a{i * i}\ttext {i}\tT{i}\n" for i in range(9)))
    wanted = list(Passages(path))
    cache = path.with_name(f".{path.name}{suffix}")
    good = cache.read_bytes()
    shorter = np.delete(np.frombuffer(good, dtype=np.int64), 1)
    shorter[-2] -= 1  # its length is right again
    swapped = good[8:16] + good[:8] + good[16:]
    for damaged in (b"", good[8:], good[:-3], bytes(len(good)), swapped, shorter.tobytes()):
        cache.write_bytes(damaged)
        opened = Passages(path)
        assert list(opened) == wanted
        assert opened.find(["a16", "a64"]) == [4, 8]
        assert cache.read_bytes() == good


def test_a_cache_of_another_file_or_version_is_rebuilt(tmp_path, monkeypatch):
    path = write(tmp_path, ROWS)
    assert len(Passages(path)) == 2
    stat = path.stat()
    other = write(tmp_path, "12\t\tA\n3\tb\tB\n")  # of the same name, size and time
    os.utime(other, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    other.rename(path)
    assert list(Passages(path)) == [Passage("12", "A", ""), Passage("3", "B", "b")]
    monkeypatch.setattr(files, "_FORMAT", files._FORMAT + 1)
    cache = path.with_name(f".{path.name}.offsets")
    before = cache.read_bytes()
    assert len(Passages(path)) == 2
    assert cache.read_bytes() != before


def test_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path, ROWS)
    side = path.with_name(f".{path.name}.offsets")
    side.mkdir()  # stands in the way, even of root
    wanted = list(Passages(path))
    kept = list((tmp_path / "cache").glob("*/*.offsets"))
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "_find_passages", None)
        assert list(Passages(path)) == wanted
    kept[0].unlink()
    kept[0].parent.rmdir()
    kept[0].parent.write_text("in the way")  # and no cache folder: a file without a name
    assert list(Passages(path)) == wanted


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    """What was half written is removed, and the collection opens all the same."""
    path = write(tmp_path, ROWS)

    def fill_up(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill_up)
    assert len(Passages(path)) == 2
    assert caches(path) == []


def _open_and_find(path: Path) -> tuple[list[Passage], list[int]]:
    opened = Passages(path)
    return list(opened), opened.find(["y0", "y999"])


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_several_processes_at_once(compress, tmp_path):
    text = HEADER + "".join(f"y{i}\ttext {i}\ttitle\n" for i in range(1000))
    path = write(tmp_path, compress(text.encode()))
    with multiprocessing.get_context("fork").Pool(6) as pool:
        results = pool.map(_open_and_find, [path] * 12, chunksize=1)
    assert all(result == (to_passages(read_csv(text)[1:]), [0, 999]) for result in results)
    assert not [name for name in caches(path) if name.endswith(".partial")]


def test_a_gzipped_file_is_unpacked_once(tmp_path, monkeypatch, caplog):
    path = write(tmp_path, gzip.compress((HEADER + ROWS).encode()), "passages.tsv.gz")
    opened = Passages(path)
    assert "unpacked once" in caplog.text
    assert list(opened) == to_passages(read_csv(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(gzip, "open", None)
        assert list(Passages(path)) == list(opened)
    n_files = len(caches(path))
    path.write_bytes(gzip.compress((HEADER + ROWS + "3\tc\tC\n4\td\tD\n").encode()))
    assert len(Passages(path)) == 4
    assert len(caches(path)) == n_files  # what belonged to the old archive is gone


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_broken_archive(damage, tmp_path):
    packed = gzip.compress("".join(f"{i * i}\tx\ty\n" for i in range(999)).encode())
    middle = len(packed) // 2
    broken = packed[:middle] + (b"" if damage == "cut" else b"xx" + packed[middle + 2 :])
    path = write(tmp_path, broken)
    with pytest.raises(InputError, match=r"the archive is cut off or damaged \(.*fetch it again"):
        Passages(path)
    assert caches(path) == []


# ----------------------------------------------------------------------------------------------
# Errors

BROKEN = {
    "empty": ("", "the file is empty"),
    "only empty lines": ("\n\r\n\n", "no passages"),
    "only a header": (HEADER, "no passages"),
    "two columns": (HEADER + "1\ta\tb\n2\tc\n", r"line 3: .* 3 columns, .* the 2 of '2\\tc'; corr"),
    "four columns": ('1\t"a\n"\tb\n\n2\tc\td\te\n', r"line 4: .* 3 columns, .* the 4 of '2\\tc"),
    "four at first": ("1\ta\tb\tc\n", r"line 1: .* 3 columns .* the 4 of '1\\ta\\tb\\tc'; corr"),
    "questions": ("who is 7\t['I']\n", r"line 1: .* 3 columns .* the 2 of .who is 7"),
    "a JSON list": ('[\n{"id": 1, "text": "a"}]', r"line 1: .* the 1 of '\['; .*JSONL"),
    "a NUL byte": ("1\ta\tb\n2\tc\0\td\n", "line 2: a NUL byte, .*not UTF-8 text"),
    "NUL bytes in JSON": ('{"id": 1, "text": "a"}\n' + "\0" * 99, "line 2: a NUL byte"),
    "cut in a quoted field": (HEADER + '1\ta\tb\n2\t"cut\nhere', "line 3: this row .*cut off"),
    "cut after a pair": ('1\t"a"\t""""b\n2\t"cut""', "line 2: this row has no end.*cut off"),
    "not UTF-8": (b"1\ta\tb\n2\t\"c\n\xe9\"\td\n", "line 3: byte 0xe9 is not UTF-8.*re-encode"),
    "bad JSON": ('{"id": 1, "text": "a"}\n\n{"id": 2,\n', r"line 3: bad JSON \(.*correct it"),
    "no object": ('{"id": 1, "text": "a"}\n[1]', r"line 2: .*an object.*not \[1\]"),
    "no id": ('{"text": "a"}', 'line 1: "id" or "_id" must be .*not None'),
    "an id of another kind": ('{"id": 1.5, "text": "a"}', 'line 1: "id" or "_id" .*not 1.5'),
    "a surrogate": ('{"id": 1, "text": "\\ud83d"}', r"line 1: '.ud83d' is an unpaired surrogate"),
    "lists in lists": ('{"id": 1, "text": ' + "[" * 100_000, "line 1: unreadable JSON .max"),
    "a true id": ('{"id": true, "text": "a"}', 'line 1: "id" or "_id" .*not True'),
    "no text": ('{"id": 1, "title": "a"}', 'line 1: no text: "text" or "contents" .*not None'),
    "text of another kind": ('{"id": 1, "text": ["a"]}', r'"text" .*must be text, not \[.a.\]'),
    "a title of another kind": ('{"id": 1, "text": "", "title": 3}', '"title" must be text, not 3'),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_line_and_value(case, tmp_path, window):
    content, message = BROKEN[case]
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=message) as caught:
        list(Passages(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------
# Files that change while they are read


def cut_off(path: Path) -> None:
    os.truncate(path, 9)


def overwrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(path.read_bytes().replace(b"text", b"lies"))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**7))  # some clocks are coarse


def append(path: Path) -> None:
    with open(path, "a") as file:
        file.write("x\ttext\ttitle\n")


MANY = HEADER + "".join(f"{i}\ttext {i}\ttitle\n" for i in range(2000))


@pytest.mark.parametrize("change", [cut_off, overwrite, append])
def test_a_collection_that_changes(change, tmp_path):
    opened = Passages(write(tmp_path, MANY))
    change(Path(opened.path))
    for read in (lambda: opened[1999], lambda: list(opened), opened.fingerprint, lambda: opened[0]):
        with pytest.raises(InputError, match=r"changed while it was being read; run the command"):
            read()


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda path: os.replace(write(path.parent, "x"), path)]
)
def test_a_collection_that_is_removed_or_replaced_can_be_read(change, tmp_path):
    opened = Passages(write(tmp_path, MANY))
    wanted = list(opened)
    change(Path(opened.path))
    assert list(opened) == wanted
    assert opened.find(["7"]) == [7]


@pytest.mark.parametrize(
    "lines", [MANY.splitlines(keepends=True), ['{"id": 1, "text": "a"}\n'] * 999]
)
def test_a_collection_that_changes_at_its_first_opening(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 64)
    path = write(tmp_path, "".join(lines))
    chunks = files.Source.chunks

    def shrinking(self, start: int, end: int | None = None):
        for number, chunk in enumerate(chunks(self, start, end)):
            if number == 50:
                cut_off(path)
            yield chunk

    monkeypatch.setattr(files.Source, "chunks", shrinking)
    with pytest.raises(InputError, match="changed while it was being read"):
        Passages(path)
    assert caches(path) == []
