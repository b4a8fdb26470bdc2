"""A passage collection, opened without reading it into memory.

`Passages(path)` is a sequence over DPR's TSV (`id`, `text`, `title`) or JSONL with `id` or `_id`,
`title`, and `text` or `contents` (BEIR, pyserini), gzipped or not. One pass finds where each
passage begins, a second one checks the ids; both results are cached in `.NAME.offsets` and
`.NAME.ids`, which later openings and other processes map: 21 million passages open like a hundred.
"""

import csv
import io
import itertools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.data.files import LONGEST_ROW, Source, cached_array, open_text, tsv_reader
from src.data.json_files import BadValue, check_characters, decode
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import Bar, no_bar

# Names of the columns of a TSV and of the fields of JSONL, as their authors have them.
FIELD_NAMES = {
    "id": ("id", "_id", "pid", "docid", "doc_id", "docno", "passage_id", "document_id"),
    "text": ("text", "contents", "content", "passage", "passage_text", "body"),
    "title": ("title", "page_title", "doc_title", "document_title"),
}


class Passage(NamedTuple):
    """A passage of a collection, or of a question: then with its score, if it has one, and its
    `position` in the question's `ctxs`. One without a title has "". `more` holds the other fields
    of a line of JSONL that are not empty, such as `url`."""

    id: str
    title: str
    text: str
    score: float | None = None
    position: int = -1
    more: dict[str, Any] = {}  # noqa: RUF012 (nobody changes it)


class Passages(Sequence[Passage]):
    """The passages of a TSV or JSONL file; `passages[i]` decodes the i-th.

    TSV is read as Python's `csv.reader(file, delimiter="\\t")` reads it; blank lines are skipped.
    The columns are those that a header names, else id, text and title, or id and text.

    Errors: `InputError` when the file is missing, empty, cut off inside a quoted field, has an
    unknown header or a row with another number of columns, has an id twice, or is not UTF-8.

    Args:
        bar: for what takes long with a new collection.
    """

    def __init__(self, path: str | Path, bar: Bar = no_bar):
        self.path, self._bar = str(path), bar
        self._source = open_text(self.path, bar)
        found = cached_array(self._source, ".offsets", lambda: _find_passages(self._source, bar))
        self._offsets = found[:-4]  # [n + 1]: where each passage begins, and where the last ends
        # The columns of id, text and title (-1: none), and the number of columns (0 in JSONL).
        *self._columns, self._n_columns = found[-4:].tolist()
        self._parse = self._parse_row if self._n_columns else _parse_json
        self._id_table = cached_array(self._source, ".ids", self._make_id_table)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Passage:
        row = range(len(self))[index]  # IndexError, and the meaning of -1
        start, end = int(self._offsets[row]), int(self._offsets[row + 1])
        return self._decode(self._source.read(start, end), start)

    def _decode(self, record: bytes, start: int) -> Passage:
        return decode(self._source, start, record, self._parse)

    def _parse_row(self, row: str) -> Passage:
        row = row.rstrip("\r\n")
        # (A blank line may follow; a quoted field may hold line ends.)
        is_plain = not _UNPLAIN.search(row)
        fields = row.split("\t") if is_plain else next(tsv_reader(io.StringIO(row, newline="")))
        if len(fields) != self._n_columns:
            raise BadValue("not a whole row; remove the caches next to it (.NAME.offsets, .ids)")
        identity, text, title = self._columns
        return Passage(fields[identity], "" if title < 0 else fields[title], fields[text])

    def __iter__(self) -> Iterator[Passage]:
        return itertools.starmap(self._decode, self._records(no_bar))

    def ids(self, bar: Bar = no_bar) -> Iterator[str]:
        """The passages' ids in order, one by one."""
        return itertools.starmap(self._decode_id, self._records(bar))

    def _records(self, bar: Bar) -> Iterator[tuple[bytes, int]]:
        """Each passage's bytes and their position, read many at a time."""
        with bar(len(self), "passage", "reading ids") as shown:
            for start in range(0, len(self), _PART):
                offsets = self._offsets[start : start + _PART + 1].tolist()
                first = offsets[0]
                data = self._source.read(first, offsets[-1])
                for begin, end in itertools.pairwise(offsets):
                    yield data[begin - first : end - first], begin
                shown.update(len(offsets) - 1)

    def _decode_id(self, record: bytes, start: int) -> str:
        if self._columns[0] == 0:  # no need to decode the whole passage
            head, tab, _ = record.partition(b"\t")
            if tab and head.isalnum():  # ASCII, and without a quote mark
                return head.decode()
        return self._decode(record, start).id

    def find(self, ids: Sequence[str]) -> list[int]:
        """The positions of the passages with these ids: `passages[position].id == id`.

        An id that no passage has and that begins with DPR's `wiki:` is looked up without it.

        Errors: `InputError` for an id that is not in the collection.
        """
        found = []
        for identity in ids:
            row = self._look_up(identity)
            if row is None and identity.startswith(_DPR_PREFIX):
                row = self._look_up(identity.removeprefix(_DPR_PREFIX))
            if row is None:
                raise InputError(
                    f"{self.path}: no passage has the id {shorten(identity)}; "
                    "give the collection that the id was taken from"
                )
            found.append(row)
        return found

    def _look_up(self, identity: str) -> int | None:
        if len(self._id_table) == 1:
            row = int(identity) - int(self._id_table[0]) if _NUMBER.fullmatch(identity) else -1
            return row if 0 <= row < len(self) else None
        hashes, rows = self._id_table.reshape(2, -1)
        wanted = _hash(identity)
        start, end = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, "right")
        return next((row for row in rows[start:end].tolist() if self[row].id == identity), None)

    def _make_id_table(self) -> Iterator[np.ndarray]:
        """The first id if the others count up from it, as Wikipedia's do; otherwise the sorted
        hashes of all ids, then their rows.

        Errors: `InputError` for two passages with the same id.
        """
        if _NUMBER.fullmatch(self[0].id):
            first = int(self[0].id)
            if all(map(operator.eq, self.ids(self._bar), map(str, itertools.count(first)))):
                yield np.array([first])
                return
        hashes = np.fromiter(map(_hash, self.ids(self._bar)), np.int64, len(self))
        rows = np.argsort(hashes, kind="stable")
        hashes = hashes[rows]
        seen: dict[str, int] = {}  # rows whose hash is another's too, by id
        for row in sorted(rows[np.isin(hashes, hashes[1:][hashes[1:] == hashes[:-1]])].tolist()):
            first = seen.setdefault(self[row].id, row)
            if first != row:
                line = self._source.line_number(int(self._offsets[first]))
                problem = f"the id {shorten(self[row].id)} is that of line {line} too; change one"
                raise self._source.error(int(self._offsets[row]), problem)
        yield hashes
        yield rows

    def fingerprint(self) -> str:
        """A hash that identifies the collection's contents, gzipped or not, in any folder.

        It covers the file's size and 256 blocks of 4 KiB spread evenly over it, the first and the
        last included: all of a file up to 1 MiB; a change to a larger one that keeps its size and
        misses the blocks goes unnoticed.
        """
        size = self._source.size
        hashed = blake2b(str(size).encode(), digest_size=16)
        for start in np.linspace(0, max(size - 4096, 0), 256).astype(np.int64).tolist():
            hashed.update(self._source.read(start, min(start + 4096, size)))
        return hashed.hexdigest()


_UNPLAIN = re.compile('["\r\n]')
_PART = 1 << 14  # passages read at a time
_DPR_PREFIX = "wiki:"  # in DPR's embeddings of Wikipedia, but not in its TSV
_EMPTY = (None, "", {}, [])
_NUMBER = re.compile("0|[1-9][0-9]{0,17}")  # as `str` writes them, within an int64


def _parse_json(line: str) -> Passage:
    """A passage from one line of JSONL. Errors: `BadValue`, and those of `json`."""
    raw = json.loads(line.rstrip())  # so that errors are on this line
    if "\\ud" in line or "\\uD" in line:  # surrogates, perhaps unpaired
        check_characters(raw)
    if not isinstance(raw, dict):
        raise BadValue(f'a passage must be an object like {{"id": ...}}, not {shorten(raw)}')
    identity, text, title = (
        next((raw[name] for name in FIELD_NAMES[field] if name in raw), None)
        for field in ("id", "text", "title")
    )
    if "text" not in raw and "contents" in raw and title is None and isinstance(text, str):
        title, text = split_contents(text)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadValue(f'"id" or "_id" must be text or a whole number, not {shorten(identity)}')
    if not isinstance(text, str):
        raise BadValue(f'no text: "text" or "contents" must be text, not {shorten(text)}')
    if not isinstance(title, str | None):
        raise BadValue(f'"title" must be text, not {shorten(title)}')
    known = itertools.chain(*FIELD_NAMES.values(), ["embeddings"])  # wiki_dpr's vectors
    more = {name: raw[name] for name in raw.keys() - {*known} if raw[name] not in _EMPTY}
    return Passage(str(identity), title or "", text, more=dict(sorted(more.items())))


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of pyserini's `contents`: the first line is the title if text follows it.

    Its Wikipedia has the titles as DPR's TSV does, in quote marks that are doubled inside.
    """
    title, _, text = contents.partition("\n")
    if not text.strip():
        return "", contents
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1].replace('""', '"')
    return title, text


def _hash(identity: str) -> int:
    digest = blake2b(identity.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ----------------------------------------------------------------------------------------------
# Where the passages begin


def _find_passages(source: Source, show: Bar) -> Iterator[np.ndarray]:
    """Arrays that make up, joined: where each passage begins; where the last one ends; the columns
    of id, text and title; the number of columns. Errors: `InputError` as `Passages` says."""
    position, columns, found = 0, [-1, -1, -1, 0], False
    first = source.skip_blanks(source.start)
    if source.read(first, min(first + 1, source.size)) == b"{":
        parts = source.line_starts(source.start)
    else:
        rows = _find_rows(source)
        parts = iter(())
        for first in itertools.islice(rows, 1):
            columns, is_header = _find_columns(source, *first)
            all_rows = rows if is_header else itertools.chain([first], rows)
            parts = _check_rows(source, all_rows, columns[-1])
    with show(source.size, "B", "finding passages") as bar:
        for starts in filter(len, parts):
            yield starts
            bar.update(int(starts[-1]) - position)
            position = int(starts[-1])
            found = True
    if not found:
        raise InputError(f"{source.path}: there are no passages in this file; give one with some")
    yield np.array([source.size, *columns])


_END = "\0"  # a row behind the last one, unless that is cut off in a quoted field; see `chunks`


def _find_rows(source: Source) -> Iterator[tuple[int, list[str]]]:
    """The rows as `csv` reads them, each with the position where it begins; as Latin-1, so that a
    character is a byte. Errors: `InputError` for a row without an end."""
    position = source.start

    def lines() -> Iterator[str]:
        nonlocal position
        rest = ""
        for _, data in source.chunks(source.start):
            # The last line may go on in the next chunk.
            *whole, rest = io.StringIO(rest + data.decode("latin-1"), newline="")
            for line in whole:
                position += len(line)
                yield line
            if len(rest) > LONGEST_ROW:
                raise csv.Error
        position += len(rest)
        yield from (rest, _END) if rest else (_END,)

    begin = source.start
    try:
        for row in tsv_reader(lines()):
            if row == [_END]:
                return
            if row and row[-1].endswith(_END):
                break
            if len(row) > 1 or "".join(row).strip():  # not a blank line
                yield begin, row
            begin = position
    except csv.Error:  # longer than LONGEST_ROW
        pass
    problem = "this row has no end; is a quote mark left open, or was the file cut off?"
    raise source.error(begin, problem)


def _find_columns(source: Source, position: int, row: list[str]) -> tuple[list[int], bool]:
    """The columns of id, text and title, and how many there are, by a file's first row; and whether
    that is a header. Errors: `InputError` for names that we do not know."""
    cells = [cell.encode("latin-1").decode(errors="replace") for cell in row]
    names = [re.sub(r"[\s-]", "_", cell.strip().lstrip("#").lower()) for cell in cells]
    found = [[i for i, name in enumerate(names) if name in known] for known in FIELD_NAMES.values()]
    counts = list(map(len, found))
    if counts == [1, 1, 1] or (counts == [1, 1, 0] and len(list(filter(None, names))) == 2):
        return [*(columns[0] if columns else -1 for columns in found), len(row)], True
    shown = shorten("\t".join(cells), 60)
    # A passage has a digit in its id, or a text that is longer than a name or ends like a sentence.
    is_name = [re.fullmatch(r"[^\r\n]{0,32}(?<![.!?])", cell.strip()) for cell in cells]
    if len(row) > 1 and all(is_name) and not re.search(r"\d", cells[0]):
        problem = (
            f"the first row, {shown}, looks like a header with unknown names; name the columns id, "
            "text and title, or put such a row first if this one is a passage"
        )
        raise source.error(position, problem)
    if len(row) == 3:
        return [0, 1, 2, 3], False
    if len(row) == 2 and not re.search(r"\s", cells[0]):
        return [0, 1, -1, 2], False
    problem = (
        "a row must have 3 columns (id, text, title) with tabs between them, or 2 (id, text), not "
        f"the {len(row)} of {shown}; correct it, or give JSONL"
    )
    raise source.error(position, problem)


def _check_rows(
    source: Source, rows: Iterable[tuple[int, list[str]]], n_columns: int
) -> Iterator[np.ndarray]:
    """The rows' positions, part by part. Errors: `InputError` for another number of columns."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, _PART)):
        for position, row in part:
            if len(row) != n_columns:
                shown = "\t".join(row).encode("latin-1").decode(errors="replace")
                problem = (
                    f"a row must have {n_columns} columns, as the first has, not the {len(row)} of "
                    f"{shorten(shown, 60)}; correct it, or give JSONL"
                )
                raise source.error(position, problem)
        yield np.array([position for position, _ in part])
