"""A passage collection, opened without reading it into memory.

`Passages(path)` is a sequence over DPR's TSV (`id`, `text`, `title`) or JSONL with `id` or `_id`,
`title`, and `text` or `contents` (BEIR, pyserini), either gzipped too. One pass finds where each
passage begins; the places are kept in a side file, `.NAME.offsets`, which later openings and other
processes map. So memory does not grow with the collection: 21 million passages open like a hundred.
"""

import csv
import itertools
import json
import mmap
import operator
import os
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.files import kept, line_number, open_source, unpacked
from src.runtime.errors import InputError, first_line, shorten
from src.runtime.terminal import Bar, no_bar


class Passage(NamedTuple):
    """A passage of a collection; one without a title has "" there."""

    id: str
    title: str
    text: str


class Passages(Sequence[Passage]):
    """The passages of a TSV or JSONL file; `passages[i]` decodes the i-th.

    TSV is read as Python's `csv.reader(file, delimiter="\\t")` reads it; empty lines are left out.
    A first row that holds the names id, text and title gives their order; without one it is this.

    Errors: `InputError` when the file is missing, empty, cut off inside a quoted field, or has a
    row that is not of three columns. What else is wrong inside a passage (not UTF-8, bad JSON, no
    text) is found when that passage is read; the first one is read at once.

    Args:
        bar: for what takes long with a new collection.
    """

    def __init__(self, path: str | Path, bar: Bar = no_bar):
        self.path, self._bar = str(path), bar
        self._source = unpacked(self.path, bar)
        with open_source(self._source, self.path) as file:
            self._stat = os.fstat(file.fileno())
            if self._stat.st_size == 0:
                raise InputError(f"{self.path}: the file is empty; give one with passages")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = self._kept(".offsets", self._find_passages)
        self._offsets = found[:-3]  # [n + 1]: where each passage begins, and where the last ends
        self._columns = found[-3:].tolist()  # of id, text and title; -1 in JSONL
        self._id_table: np.ndarray | None = None
        self[0]  # a file of the wrong kind is reported now

    def _kept(self, suffix: str, make: Callable[[], Iterator[np.ndarray]]) -> np.ndarray:
        return kept(self._source, self._stat, suffix, make)

    def _find_passages(self) -> Iterator[np.ndarray]:
        """As the function of this name, with a progress bar."""
        position = 0
        with self._bar(len(self._bytes), "B", "finding passages") as bar:
            for array in _find_passages(self._bytes, self.path):
                yield array
                if len(array):
                    bar.update(int(array[0]) - position)
                    position = int(array[0])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Passage:
        row = range(len(self))[index]  # IndexError, and the meaning of -1
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        record = self._bytes[start:end]
        try:
            text = record.decode()
            return _parse_json(text) if self._columns[0] < 0 else self._parse_row(text)
        except UnicodeDecodeError as error:
            problem = f"byte {record[error.start]:#x} is not UTF-8 text; re-encode the file"
            raise self._error(start + error.start, problem) from None
        except ValueError as error:
            raise self._error(start, str(error)) from None

    def _parse_row(self, row: str) -> Passage:
        row = row.rstrip("\r\n")
        try:
            fields = next(csv.reader([row], delimiter="\t")) if '"' in row else row.split("\t")
        except csv.Error as error:
            raise ValueError(f"not a row of TSV ({error}); is a quote mark left open?") from None
        identity, text, title = self._columns
        return Passage(fields[identity], fields[title], fields[text])

    def _error(self, position: int, problem: str) -> InputError:
        return _error(self._bytes, self.path, position, problem)

    def ids(self) -> Iterator[str]:
        """The passages' ids in order, one by one."""
        return map(self._id, range(len(self)))

    def _ids_in_parts(self) -> Iterator[Iterator[str]]:
        """All ids part by part, with a progress bar."""
        with self._bar(len(self), "passage", "reading ids") as bar:
            for start in range(0, len(self), _PART):
                rows = range(start, min(start + _PART, len(self)))
                yield map(self._id, rows)
                bar.update(len(rows))

    def _id(self, row: int) -> str:
        if self._columns[0] == 0:  # the usual place: no need to decode the whole passage
            start = int(self._offsets[row])
            head, tab, _ = self._bytes[start : start + 32].partition(b"\t")
            if tab and head.isalnum():  # ASCII, and without a quote mark
                return head.decode()
        return self[row].id

    def find(self, ids: Sequence[str]) -> list[int]:
        """The places of the passages with these ids: `passages[place].id == id`.

        The first call reads all ids once and keeps what it learns in a side file, `.NAME.ids`: ids
        that count up by one from any number, as Wikipedia's do, need no table; for others it is one
        of sorted hashes, which takes 24 bytes of memory a passage while it is made, and later none.

        An id with DPR's `wiki:` before it, which no passage has, is that of the one without.

        Errors: `InputError` for an id that is not there, and for ids that are not unique.
        """
        if self._id_table is None:
            self._id_table = self._kept(".ids", self._make_id_table)
        return [self._find_one(identity) for identity in ids]

    def _find_one(self, identity: str) -> int:
        place = self._look_up(identity)
        if place is None and identity.startswith(_DPR_PREFIX):
            place = self._look_up(identity.removeprefix(_DPR_PREFIX))
        if place is None:
            raise InputError(
                f"{self.path}: no passage has the id {shorten(identity)}; "
                "give the collection that the id was taken from"
            )
        return place

    def _look_up(self, identity: str) -> int | None:
        if len(self._id_table) == 1:
            place = int(identity) - int(self._id_table[0]) if _NUMBER.fullmatch(identity) else -1
            if 0 <= place < len(self):
                return place
        else:
            hashes, places = self._id_table.reshape(2, -1)
            wanted = _hash(identity)
            # Different ids with one hash, should there be any, lie side by side.
            for at in range(int(np.searchsorted(hashes, wanted)), len(self)):
                if hashes[at] != wanted:
                    break
                if self._id(int(places[at])) == identity:
                    return int(places[at])
        return None

    def _make_id_table(self) -> Iterator[np.ndarray]:
        """The first id if the others count up from it, else all hashes, sorted, and their places.

        Errors: `InputError` for two passages with the same id.
        """
        if _NUMBER.fullmatch(self._id(0)):
            first = int(self._id(0))
            counted = map(str, itertools.count(first))
            if all(all(map(operator.eq, ids, counted)) for ids in self._ids_in_parts()):
                yield np.array([first])
                return
        ids = itertools.chain.from_iterable(self._ids_in_parts())
        hashes = np.fromiter(map(_hash, ids), np.int64, len(self))
        places = np.argsort(hashes, kind="stable")
        hashes = hashes[places]
        for at in np.flatnonzero(hashes[1:] == hashes[:-1]):
            one, other = places[at : at + 2].tolist()
            if self._id(one) == self._id(other):
                line = line_number(self._bytes, int(self._offsets[one]))
                problem = f"the id {shorten(self._id(one))} is that of line {line} too; change one"
                raise self._error(int(self._offsets[other]), problem)
        yield hashes
        yield places

    def fingerprint(self) -> str:
        """A short text that tells this collection from others, wherever it lies, gzipped or not.

        It is a hash of the file's size and of 256 blocks of 4 KiB spread evenly over it, the first
        and the last included: a file up to 1 MiB is read whole; a change of a larger one that
        keeps its size and misses the blocks goes unseen.
        """
        size = len(self._bytes)
        hashed = blake2b(str(size).encode(), digest_size=16)
        for start in np.linspace(0, max(size - 4096, 0), 256).astype(np.int64).tolist():
            hashed.update(self._bytes[start : start + 4096])
        return hashed.hexdigest()

    # A memory map cannot be sent to a data-loading worker; the worker opens the file again.
    def __reduce__(self) -> tuple:
        return Passages, (self.path,)


_PART = 1 << 16  # passages between two steps of a progress bar
_DPR_PREFIX = "wiki:"  # DPR's embeddings name Wikipedia's passages so; its TSV does not
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # as `str` writes them, and an int64 holds them


def _parse_json(line: str) -> Passage:
    """A passage from one line of JSONL. Errors: ValueError that says what is wrong."""
    try:
        raw = json.loads(line)
        if "\\ud" in line or "\\uD" in line:  # JSON can hold halves of characters
            json.dumps(raw, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON ({error.msg}); write one object on each line") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{half} is half a character; remove it") from None
    except (ValueError, RecursionError) as error:  # a number, or a depth, that nobody means
        problem = f"JSON that cannot be read ({first_line(error, 80)}); mend it"
        raise ValueError(problem) from None
    if not isinstance(raw, dict):
        raise ValueError(f'a passage must be an object like {{"id": ...}}, not {shorten(raw)}')
    identity, title = raw.get("id", raw.get("_id")), raw.get("title")
    text = raw.get("text", raw.get("contents"))
    if "text" not in raw and title is None and isinstance(text, str):
        title, text = _split_contents(text)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise ValueError(f'"id" or "_id" must be text or a whole number, not {shorten(identity)}')
    if not isinstance(text, str):
        raise ValueError(f'no text: "text" or "contents" must be text, not {shorten(text)}')
    if not isinstance(title, str | None):
        raise ValueError(f'"title" must be text, not {shorten(title)}')
    return Passage(str(identity), title or "", text)


def _split_contents(contents: str) -> tuple[str, str]:
    """Title and text of pyserini's `contents`, whose first line is the title where there are two.

    Its Wikipedia has the titles as DPR's TSV does, in quote marks that are doubled inside.
    """
    title, line_end, text = contents.partition("\n")
    if not line_end:
        return "", contents
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].replace('""', '"')
    return title, text


def _hash(identity: str) -> int:
    digest = blake2b(identity.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ----------------------------------------------------------------------------------------------
# Where the passages begin

_WINDOW = 1 << 20  # bytes looked at in one go: what numpy makes of them fits the processor's cache
_LONGEST = 1 << 24  # bytes of a row; `csv` takes no field of more than 131,072 characters
_TAB, _NEWLINE, _QUOTE = ord("\t"), ord("\n"), ord('"')
_MARK = np.zeros(256, dtype=bool)  # the bytes that can begin or end a field
_MARK[list(b'\t\n\r"')] = True


def _find_passages(data: mmap.mmap, path: str) -> Iterator[np.ndarray]:
    """Arrays that make up, joined: where each passage begins; where the last one ends; the columns
    of id, text and title, or -1 for JSONL. Errors: `InputError` as `Passages` says."""
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # a byte-order mark
    while data[start : start + 1] in (b"\r", b"\n"):
        start += 1
    columns, find = [-1, -1, -1], _find_lines
    if data[start : start + 1] != b"{":
        columns, find = [0, 1, 2], _find_rows
        first = re.split(rb"[\r\n]", data[start : start + 64])[0]
        names = first.decode(errors="replace").replace('"', "").split("\t")
        if sorted(names) == ["id", "text", "title"]:
            columns = [names.index(name) for name in ("id", "text", "title")]
            start += len(first) + 1
    n_passages = 0
    for starts in find(data, start, path):
        n_passages += len(starts)
        yield starts
    if n_passages == 0:
        raise InputError(f"{path}: there are no passages in this file; give one with some")
    yield np.array([len(data), *columns])


def _find_lines(data: mmap.mmap, start: int, path: str) -> Iterator[np.ndarray]:
    """The starts of the lines that are not empty, window by window."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    yield np.array([start])
    for window in range(start, len(buffer), _WINDOW):
        starts = np.flatnonzero(buffer[window : window + _WINDOW] == _NEWLINE) + window + 1
        starts = starts[starts < len(buffer)]
        yield starts[~np.isin(buffer[starts], list(b"\r\n"))]


def _find_rows(data: mmap.mmap, start: int, path: str) -> Iterator[np.ndarray]:
    """The starts of the rows that are not empty, window by window; each must have two tabs."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    scratch = np.empty((2, _WINDOW), dtype=bool)
    while start < len(buffer):
        size = scratch.shape[1]
        marks, kinds = _find_marks(buffer[start : start + size], scratch)
        if start + size >= len(buffer):  # the file's end ends a row too
            marks, kinds = np.append(marks, len(buffer) - start), np.append(kinds, _NEWLINE)
        ends, tabs = _regular_row_ends(marks, kinds) or _row_ends(marks, kinds)
        if len(ends) == 0 and start + size < len(buffer) and size < _LONGEST:
            scratch = np.empty((2, 2 * size), dtype=bool)  # from here on: there may be more of them
            continue
        if len(ends) == 0:
            problem = "this row has no end; is a quote mark left open, or was the file cut off?"
            raise _error(data, path, start, problem)
        ends += start
        starts = np.append(start, ends[:-1] + 1)
        filled = starts < ends  # the \n of a \r\n ends an empty row
        wrong = np.flatnonzero(filled & (tabs != 2))
        if len(wrong):
            start, end = int(starts[wrong[0]]), int(ends[wrong[0]])
            row = data[start : min(end, start + 200)].decode(errors="replace")
            problem = (
                "a row must have 3 columns (id, text, title) with tabs between them, not the "
                f"{tabs[wrong[0]] + 1} of {shorten(row, 60)}; mend it, or give JSONL"
            )
            raise _error(data, path, start, problem)
        yield starts[filled]
        start = int(ends[-1]) + 1


def _find_marks(view: np.ndarray, scratch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of the tabs, line ends and quote marks, and which of them each is.

    Args:
        scratch: [2, window]: new memory for each window would cost as much as the search.
    """
    # Below 14 are \t, \n, \r, and what hardly occurs in text and is sorted out afterwards.
    found = np.less(view, 14, out=scratch[0, : len(view)])
    found |= np.equal(view, _QUOTE, out=scratch[1, : len(view)])
    (marks,) = found.nonzero()
    known = _MARK[view.take(marks)]
    if not known.all():
        marks = marks[known]
    return marks, view.take(marks)


def _regular_row_ends(marks: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """`_row_ends` in one go, where each quote mark opens a field, closes one, or is one of a pair
    in a quoted field, as in all that `csv` writes; otherwise None.

    What has an even number of such quote marks before it is outside of quotes.
    """
    is_quote = kinds == _QUOTE
    inside = np.logical_xor.accumulate(is_quote)  # what follows the mark
    # A quote mark in its place touches another mark, or the first row's start, on its outside;
    # what comes after the last mark changes nothing before it.
    touches = np.concatenate([marks[:1] == 0, marks[1:] - marks[:-1] == 1, [True]])
    if (is_quote & ~np.where(inside, touches[:-1], touches[1:])).any():
        return None
    (outside,) = (~(inside | is_quote)).nonzero()  # tabs and line ends
    (breaks,) = (kinds.take(outside) != _TAB).nonzero()
    tabs = np.concatenate([breaks[:1], breaks[1:] - breaks[:-1] - 1])
    return marks.take(outside.take(breaks)), tabs


def _row_ends(marks: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows end whose marks these are, counted from the first one's start, and the number
    of tabs between the fields of each: the rules by which `csv` reads anything, mark by mark."""
    ends, tabs = [], []
    field, n_tabs, quoted, closed = 0, 0, False, -2
    for mark, kind in zip(marks.tolist(), kinds.tolist(), strict=True):
        if kind == _QUOTE:
            if quoted:
                quoted, closed = False, mark
            elif mark in (field, closed + 1):  # opens the field; or the second of a pair in it
                quoted = True
        elif not quoted:
            field, n_tabs = mark + 1, n_tabs + 1
            if kind != _TAB:
                ends.append(mark)
                tabs.append(n_tabs - 1)
                n_tabs = 0
    return np.array(ends, dtype=np.int64), np.array(tabs, dtype=np.int64)


def _error(data: mmap.mmap, path: str, position: int, problem: str) -> InputError:
    return InputError(f"{path}, line {line_number(data, position)}: {problem}")
