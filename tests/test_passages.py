"""Passage collections equal what `csv` and `json` read; side files; what is broken is named."""

import csv
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pickle
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


@pytest.fixture(params=[1 << 20, 64, 13, 1])
def window(request, monkeypatch):
    """Small windows put every kind of boundary in the middle of every kind of thing."""
    monkeypatch.setattr(module, "_WINDOW", request.param)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for the disk's sake: there are many files


_numbers = itertools.count()


def write(folder: Path, content: str | bytes, name: str = "passages") -> Path:
    """A file with a name of its own, so that no side file of another lies beside it."""
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


@pytest.mark.parametrize("seed", range(40))
def test_random_rows_equal_csv(seed, tmp_path, window):
    rng = random.Random(seed)
    text = "\ufeff" * rng.randrange(2) + rng.choice(["", "\n", "\r\n\n"])
    endings = rng.choice([["\n"], ["\r\n"], ["\n", "\r\n", "\r", "\n\n"]])
    for _ in range(rng.randrange(1, 20)):
        text += "\t".join(random_field(rng) for _ in range(3)) + rng.choice(endings)
    text = rng.choice([text, text.rstrip("\r\n")])
    rows = read_csv(text)
    opened = Passages(write(tmp_path, text))
    assert list(opened) == to_passages(rows)
    assert list(opened.ids()) == [row[0] for row in rows]


@pytest.mark.parametrize("lineterminator", ["\n", "\r\n", "\r"])
def test_what_csv_writes_takes_the_fast_way(lineterminator, tmp_path, monkeypatch):
    rng = random.Random(0)
    rows = [["".join(rng.choices('ab"\t\n\r é日', k=6)) for _ in range(3)] for _ in range(500)]
    file = io.StringIO(newline="")
    csv.writer(file, "excel-tab", lineterminator=lineterminator, quoting=csv.QUOTE_ALL).writerows(
        rows
    )
    monkeypatch.setattr(module, "_row_ends", None)
    assert list(Passages(write(tmp_path, file.getvalue()))) == to_passages(rows)


def test_the_fast_way_equals_the_slow_one_on_all_short_texts():
    n_fast, scratch = 0, np.empty((2, 6), dtype=bool)
    for characters in itertools.product(b'a"\t\n', repeat=6):
        marks, kinds = module._find_marks(np.array(characters, dtype=np.uint8), scratch)
        fast, slow = module._regular_row_ends(marks, kinds), module._row_ends(marks, kinds)
        if fast is not None:
            n_fast += 1
            assert [list(part) for part in fast] == [list(part) for part in slow], characters
        assert fast is not None or ord('"') in characters
    assert n_fast > 1000


def possible_errors(text: str) -> list[str]:
    """What the slow way finds wrong: the first bad row, and a quoted field without an end."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    errors, line, n_rows = [], 1, 0
    for row in reader:
        last, line, n_rows = line, reader.line_num + 1, n_rows + bool(row)
        if len(row) not in (0, 3) and not errors:
            errors = [f"line {last}: a row must have 3 columns .* not the {len(row)} of"]
    if read_csv(text + "\nZ")[-1] != ["Z"]:  # inside a quoted field, Z does not make a row
        errors.append(f"line {last}: this row has no end")
    return errors if n_rows else ["there are no passages"]


@pytest.mark.parametrize("seed", range(60))
def test_random_characters_equal_csv(seed, tmp_path, window):
    rng = random.Random(seed)
    if seed % 2:
        text = "".join(rng.choices('a"\t\n', weights=[1, 3, 3, 1], k=40))
    else:  # three columns more often than not
        texts = ["".join(rng.choices('"a\t', weights=[4, 4, 1], k=5)) for _ in range(6)]
        text = "".join(f'"{text}"\t{text}\t"a"\n' for text in texts)
    errors, path = possible_errors(text), write(tmp_path, text)
    if errors:
        with pytest.raises(InputError, match="|".join(errors)):
            Passages(path)
    else:
        assert list(Passages(path)) == to_passages(read_csv(text))


@pytest.mark.parametrize("order", list(itertools.permutations(["id", "text", "title"])))
def test_the_first_row_may_give_the_columns(order, tmp_path, window):
    fields = {"id": "7", "text": "all of it", "title": "A name"}
    row = "\t".join(fields[name] for name in order) + "\n"
    for header in (
        "\t".join(order),
        "\t".join(f'"{name}"' for name in order),
        "\n" + "\t".join(order),
    ):
        opened = Passages(write(tmp_path, header + "\n" + row))
        assert list(opened) == [Passage("7", "A name", "all of it")]
        assert list(opened.ids()) == ["7"]


def test_without_a_header_the_first_row_is_a_passage(tmp_path):
    assert Passages(write(tmp_path, "id\ttext\tname\n"))[0] == Passage("id", "name", "text")


def test_a_long_row(tmp_path, window, monkeypatch):
    rows = [[str(i), "long text " * (5000 if i == 50 else 1), "a title"] for i in range(100)]
    text = HEADER + "".join("\t".join(row) + "\n" for row in rows)
    assert list(Passages(write(tmp_path, text))) == to_passages(rows)
    monkeypatch.setattr(module, "_LONGEST", 1000)
    if module._WINDOW < 1000:  # such a row is not looked for without end
        with pytest.raises(InputError, match=r"line 52: this row has no end; is a quote mark"):
            Passages(write(tmp_path, text))


@pytest.mark.parametrize("seed", range(10))
def test_random_lines_equal_json(seed, tmp_path, window):
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


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_beir(compress, tmp_path):
    """A line of a `corpus.jsonl`, as BEIR's data sets have them."""
    line = {"_id": "MED-10", "title": "Statins", "text": "A\nstudy.", "metadata": {"url": "http"}}
    more = {"_id": "2", "title": "", "text": "Another.", "metadata": {}}
    content = compress(f"{json.dumps(line)}\n{json.dumps(more)}\n".encode())
    opened = Passages(write(tmp_path, content, "corpus.jsonl"))
    assert list(opened) == [Passage("MED-10", "Statins", "A\nstudy."), Passage("2", "", "Another.")]
    assert opened.find(["2", "MED-10"]) == [1, 0]


@pytest.mark.parametrize(
    ("changes", "title", "text"),
    [
        ({"contents": "Nile\nA river.\nLong."}, "Nile", "A river.\nLong."),
        ({"contents": '"Nile"\nA river.'}, "Nile", "A river."),  # pyserini's Wikipedia
        ({"contents": '"""Heroes"" (album)"\nBy Bowie.'}, '"Heroes" (album)', "By Bowie."),
        ({"contents": '"\nA quote mark.'}, '"', "A quote mark."),
        ({"contents": "A river."}, "", "A river."),
        ({"contents": '"A river."'}, "", '"A river."'),
        ({"contents": "\nA river."}, "", "A river."),
        ({"contents": "Nile\nA river.", "title": "The Nile"}, "The Nile", "Nile\nA river."),
        ({"contents": "Nile\nA river.", "title": ""}, "", "Nile\nA river."),
        ({"text": "Nile\nA river."}, "", "Nile\nA river."),
        ({"text": "A river.", "contents": "Nile\nA river."}, "", "A river."),
    ],
)
def test_the_title_in_pyserinis_contents(changes, title, text, tmp_path):
    opened = Passages(write(tmp_path, json.dumps({"id": "doc1", **changes})))
    assert list(opened) == [Passage("doc1", title, text)]


def copied(source: Path, folder: Path) -> tuple[Passages, list[Passage]]:
    """A collection opened in another folder, where its side files may lie; and the slow way."""
    opened = Passages(write(folder, source.read_bytes()))
    return opened, to_passages(read_csv(source.read_text())[1:])


def test_the_references_passages(reference: Path, tmp_path):
    opened, wanted = copied(reference / "passages.tsv", tmp_path)
    assert len(opened) == 120
    assert list(opened) == wanted


def test_xquad(xquad: Path, tmp_path):
    opened, wanted = copied(xquad / "passages.tsv", tmp_path)
    assert list(opened) == wanted
    assert opened.find([passage.id for passage in wanted][::-1]) == list(range(len(wanted)))[::-1]


def test_it_is_a_sequence(tmp_path):
    opened = Passages(write(tmp_path, "1\ta\tA\n2\tb\tB\n3\tc\tC"))
    assert len(opened) == 3
    assert opened[-1] == opened[2] == opened[np.int64(2)] == Passage("3", "C", "c")
    assert opened[0] in opened
    with pytest.raises(IndexError):
        opened[3]


def test_a_worker_opens_it_again(tmp_path):
    opened = Passages(write(tmp_path, HEADER + "1\ta\tA\n2\tb\tB\n"))
    sent = pickle.dumps(opened)
    assert len(sent) < 500
    assert list(pickle.loads(sent)) == list(opened)


# ----------------------------------------------------------------------------------------------
# Finding by id, and the fingerprint


@pytest.mark.parametrize("first", [0, 1, 8, 95, 10**17])
@pytest.mark.parametrize("columns", [(0, 1, 2), (2, 1, 0)])
def test_ids_that_count_up_need_no_table(first, columns, tmp_path):
    fields = ["id", "text", "title"]
    rows = [fields, *([str(first + i), "text", "title"] for i in range(30))]
    text = "\n".join("\t".join(row[column] for column in columns) for row in rows)
    opened = Passages(write(tmp_path, text))
    ids = list(opened.ids())
    assert opened.find(ids) == list(range(30))
    assert opened.find([]) == []
    assert len(opened._id_table) == 1
    for missing in (
        str(first - 1),
        str(first + 30),
        f"0{first}",
        f"+{first}",
        f"{first} ",
        "",
        "x",
    ):
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
    table = {identity: place for place, identity in enumerate(ids)}
    wanted = random.Random(0).choices(ids, k=1000)
    assert opened.find(wanted) == [table[identity] for identity in wanted]
    for missing in ["5", "a" * 32, "", "é"]:
        if missing not in table:
            with pytest.raises(InputError, match="no passage has the id"):
                opened.find([ids[0], missing])
    monkeypatch.setattr(Passages, "_make_id_table", None)  # the side file has it
    again = Passages(opened.path)
    assert again.find(wanted) == opened.find(wanted)


@pytest.mark.parametrize("n_hashes", [1 << 60, 2])
def test_an_id_must_be_unique(n_hashes, tmp_path, monkeypatch):
    hash_all = module._hash
    monkeypatch.setattr(module, "_hash", lambda identity: hash_all(identity) % n_hashes)
    path = write(tmp_path, 'a\t"two\nlines"\tA\nb\tx\tB\nc\tx\tC\nb\ty\tD\n')
    message = r"line 5: the id 'b' is that of line 3 too"
    with pytest.raises(InputError, match=message):
        Passages(path).find(["c"])


def test_the_fingerprint_is_the_contents(tmp_path):
    def fingerprint(content: bytes) -> str:
        return Passages(write(tmp_path, content)).fingerprint()

    rows = [f"{i}\t{'text ' * 9}\ttitle\n".encode() for i in range(40000)]
    small, large = b"".join(rows[:100]), b"".join(rows)
    assert fingerprint(small) == fingerprint(small) == fingerprint(gzip.compress(small))
    assert len({fingerprint(b"".join(rows[:n])) for n in (1, 2, 100, 30000, 40000)}) == 5
    for place in (0, 2000, 3000, len(small) - 2):  # a file up to 1 MiB is read whole
        assert fingerprint(small[:place] + b"7" + small[place + 1 :]) != fingerprint(small)
    for place in (0, len(large) - 2):
        assert fingerprint(large[:place] + b"7" + large[place + 1 :]) != fingerprint(large)


# ----------------------------------------------------------------------------------------------
# Files that are made once and kept

ROWS = "1\ta\tA\n2\tb\tB\n"


def side_files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.glob(f".{path.name}*"))


def test_the_side_file_is_used(tmp_path, monkeypatch):
    path = write(tmp_path, ROWS)
    path.chmod(0o644)
    first = Passages(path)
    first.find(["1"])
    side = path.with_name(f".{path.name}.offsets")
    assert side.stat().st_mode & 0o777 == 0o644  # for all who may read the source
    assert side_files(path) == [f".{path.name}.ids", f".{path.name}.offsets"]
    monkeypatch.setattr(module, "_find_passages", None)
    again = Passages(path)
    assert list(again) == list(first)
    assert isinstance(again._offsets.base.base, np.memmap)  # mapped: not in this process's memory


@pytest.mark.parametrize("keeps", ["nothing", "size", "time"])
def test_the_side_file_is_made_anew_when_the_source_changes(keeps, tmp_path):
    path = write(tmp_path, ROWS)
    Passages(path).find(["2"])
    before = path.stat()
    path.write_text("12\ta\t\n3\tb\tB\n" if keeps == "size" else "3\tb\tB\n")
    time = before.st_mtime_ns + (0 if keeps == "time" else 1)
    os.utime(path, ns=(time, time))
    opened = Passages(path)
    assert list(opened) == to_passages(read_csv(path.read_text()))
    assert opened.find(["3"]) == [len(opened) - 1]


@pytest.mark.parametrize("broken", ["empty", "short", "cut", "long", "other", "another version's"])
def test_a_broken_side_file_is_made_anew(broken, tmp_path, monkeypatch):
    path = write(tmp_path, ROWS)
    wanted = list(Passages(path))
    side = path.with_name(f".{path.name}.offsets")
    good = side.read_bytes()
    changed = {
        "empty": b"", "short": good[:8], "cut": good[8:], "long": good + b"x" * 8,
        "other": b"x" * 999, "another version's": good,
    }  # fmt: skip
    side.write_bytes(changed[broken])
    if broken == "another version's":
        monkeypatch.setattr(files, "_FORMAT", files._FORMAT + 1)
        good = None
    assert list(Passages(path)) == wanted
    assert good is None or side.read_bytes() == good


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
    assert side_files(path) == []


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
    assert not [name for name in side_files(path) if name.endswith(".partial")]


def test_a_gzipped_file_is_unpacked_once(tmp_path, monkeypatch, caplog):
    path = write(tmp_path, gzip.compress((HEADER + ROWS).encode()), "passages.tsv.gz")
    opened = Passages(path)
    assert "unpacking" in caplog.text
    assert list(opened) == to_passages(read_csv(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(gzip, "open", None)
        assert list(Passages(path)) == list(opened)
    n_files = len(side_files(path))
    path.write_bytes(gzip.compress((HEADER + ROWS * 2).encode()))
    assert len(Passages(path)) == 4
    assert len(side_files(path)) == n_files  # what belonged to the old archive is gone


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_broken_archive(damage, tmp_path):
    packed = gzip.compress("".join(f"{i * i}\tx\ty\n" for i in range(999)).encode())
    middle = len(packed) // 2
    broken = packed[:middle] + (b"" if damage == "cut" else b"xx" + packed[middle + 2 :])
    path = write(tmp_path, broken)
    with pytest.raises(InputError, match=r"the archive is cut off or damaged \(.*fetch it again"):
        Passages(path)
    assert side_files(path) == []


def test_an_archive_that_cannot_be_unpacked(tmp_path, monkeypatch):
    path = write(tmp_path, gzip.compress(ROWS.encode()))

    def fill_up(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gzip.GzipFile, "read", fill_up)
    with pytest.raises(InputError, match=r"No space left.*run gunzip -k"):
        Passages(path)
    assert side_files(path) == []


# ----------------------------------------------------------------------------------------------
# Errors

BROKEN = {
    "empty": ("", "the file is empty"),
    "only empty lines": ("\n\r\n\n", "no passages"),
    "only a header": (HEADER, "no passages"),
    "two columns": (HEADER + "1\ta\tb\n2\tc\n", r"line 3: .* 3 columns .* the 2 of '2\\tc'; mend"),
    "four columns": ('1\t"a\n"\tb\n\n2\tc\td\te\n', r"line 4: .* 3 columns .* the 4 of '2\\tc\\td"),
    "a JSON list": ('[\n{"id": 1, "text": "a"}]', r"line 1: .* the 1 of '\['; .*JSONL"),
    "cut in a quoted field": (HEADER + '1\ta\tb\n2\t"cut\nhere', "line 3: this row .*cut off"),
    "cut after a pair": ('1\t"a"\t""""b\n2\t"cut""', "line 2: this row has no end.*cut off"),
    "not UTF-8": (b"1\ta\tb\n2\t\"c\n\xe9\"\td\n", "line 3: byte 0xe9 is not UTF-8.*re-encode"),
    "a very long field": (f'1\t"{"a" * 140000}"\tb', "line 1: .*field larger.*left open"),
    "bad JSON": ('{"id": 1, "text": "a"}\n\n{"id": 2,\n', r"line 3: bad JSON \(.*one object"),
    "no object": ('{"id": 1, "text": "a"}\n[1]', r"line 2: .*an object.*not \[1\]"),
    "no id": ('{"text": "a"}', 'line 1: "id" or "_id" must be .*not None'),
    "an id of another kind": ('{"id": 1.5, "text": "a"}', 'line 1: "id" or "_id" .*not 1.5'),
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


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.tsv: cannot be read \(No such file.*check"):
        Passages(tmp_path / "nowhere.tsv")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory"):
        Passages(tmp_path)
