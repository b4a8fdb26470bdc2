"""JSON files, opened by byte offsets; their items are decoded when they are asked for.

So no process ever holds the objects of a whole file.
"""

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from src.data.files import Source
from src.runtime.errors import InputError, first_line, shorten


class JsonFile:
    """A JSON file; `json()` decodes all of it.

    Errors: `InputError` when the file is missing, empty or changes; and, with a line number, for
    what is not UTF-8 or not JSON in the part that is decoded.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.source = Source(self.path)

    def json(self) -> Any:
        return self._decode(0, self.source.size)

    def _decode(self, start: int, end: int) -> Any:
        record = b"".join(data for _, data in self.source.chunks(start, end)).rstrip()
        try:
            return self._parse(record)
        except BadValue as error:
            problem = str(error)
        except UnicodeDecodeError as error:
            start, problem = start + error.start, "not UTF-8 text; re-encode it"
        except json.JSONDecodeError as error:
            line = self.source.line_number(start) + error.lineno - 1
            problem = f"bad JSON ({error.msg}); correct it, or make the file again"
            raise InputError(f"{self.path}, line {line}: {problem}") from None
        except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
            problem = f"JSON that cannot be read ({first_line(error, 80)}); correct it, or make the"
            problem += " file again"
        raise self.source.error(start, problem) from None

    def _parse(self, record: bytes) -> Any:
        return json.loads(record.decode())


class JsonItems(JsonFile, Sequence[dict]):
    """The objects of a `.json` list or `.jsonl` file; `items[i]` decodes the i-th.

    Args:
        key: the file holds one object, and the list is under this key of it.
    Errors: `InputError` when the file is missing, empty, not text, or neither a list nor lines.
    Errors inside an item are found when that item is read.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        super().__init__(path)
        self._spans = _find_objects(self.source, key)
        self._numbers = np.arange(len(self._spans))  # of the items in the file

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict:
        start, end = self._spans[index].tolist()
        item = self._decode(start, end)
        if not isinstance(item, dict):
            problem = f'an example must be an object like {{"question": ...}}, not {shorten(item)}'
            raise self.source.error(start, problem)
        return item

    def where(self, index: int) -> str:
        """The file and example for an error message, numbered from 1 as editors and people do."""
        line = self.source.line_number(int(self._spans[index, 0]))
        return f"{self.path}, example {self._numbers[index] + 1} (line {line})"

    def without(self, indices: Collection[int]) -> Self:
        """The other items, numbered anew from 0; `where` still gives their numbers in the file."""
        rest = copy.copy(self)
        rest._numbers = np.delete(self._numbers, list(indices))
        rest._spans = np.delete(self._spans, list(indices), axis=0)
        return rest


class JsonLists(JsonFile, Mapping[str, list]):
    """A file of one JSON object of lists, `{"0": ["17", "4"], ...}`; `lists[name]` decodes one of
    them. Only the names are in memory.

    Errors: `InputError` when the file is missing, empty, or does not hold such an object.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._spans = _find_lists(self.source)

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __getitem__(self, name: str) -> list:
        return self._decode(*self._spans[name])


class BadValue(ValueError):
    """What is wrong with a part of a file, and the remedy."""


def check_characters(value: object) -> None:
    """JSON can hold unpaired surrogates, which UTF-8 cannot. Errors: `BadValue`."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(error.object[error.start])
        raise BadValue(f"{surrogate} is an unpaired surrogate; remove it") from None


def json_list(items: Iterable[dict]) -> Iterator[str]:
    """The pieces of a JSON list, with an item a line."""
    opening = "[\n"
    for item in items:
        yield opening + json.dumps(item)
        opening = ",\n"
    yield "\n]\n"


# ----------------------------------------------------------------------------------------------
# Where the objects are

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
# What each byte does to the depth of nesting.
_DEPTH = np.zeros(256, dtype=np.int8)
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1


def _start(source: Source) -> int:
    """The position of the first character, behind a byte-order mark and white space."""
    return source.skip_blanks(3 if source.read(0, min(3, source.size)) == b"\xef\xbb\xbf" else 0)


def _find_objects(source: Source, key: str | None) -> np.ndarray:
    """The byte spans [n, 2] of the objects in a file; `[` at its start tells a list from lines."""
    start = _start(source)
    if start == source.size:
        raise InputError(f"{source.path}: the file is empty; give one with examples")
    if key is not None:
        spans = _find_list_under(source, key)
    elif source.read(start, start + 1) == b"[":
        spans, end = _find_nested(source, start)
        _check_gaps(source, spans, start + 1, end)
        _check_end(source, end)
    else:
        starts = np.concatenate(list(source.line_starts(start)))
        spans = np.stack([starts, np.append(starts[1:], source.size)], axis=1)
    if len(spans) == 0:
        raise InputError(f"{source.path}: there are no examples in this file; give one with some")
    return spans


def _find_list_under(source: Source, key: str) -> np.ndarray:
    """Spans of the objects in the list under a key of the one object that a file holds."""
    # (In a JSON text, a quote mark inside a string has a backslash before it.)
    pattern = re.compile(rb'(?<!\\)"' + key.encode() + rb'"\s*:\s*\[')
    missing = (
        f'{source.path}: no list under "{key}" in this file; was it cut off, or is it another one?'
    )
    opening, tail = None, b""
    for position, data in source.chunks(0):
        data, position = tail + data, position - len(tail)
        if found := pattern.search(data):
            opening = position + found.end() - 1
            break
        tail = data[-4096:]
    if opening is None:
        raise InputError(missing)
    spans, end = _find_nested(source, opening)
    _check_gaps(source, spans, opening + 1, end)
    # What is around the list is small. With an empty list in its place, it must be such an object.
    try:
        rest = source.read(end + 1, source.size)
        around = json.loads(source.read(0, opening) + b"[]" + rest)
    except (ValueError, RecursionError) as error:
        problem = f"bad JSON before or after the list ({first_line(error, 80)})"
        raise InputError(f"{source.path}: {problem}; make or copy it again") from None
    if not isinstance(around, dict) or around.get(key) != []:
        raise InputError(missing)
    return spans


def _find_lists(source: Source) -> dict[str, tuple[int, int]]:
    """The span of each list in the object of lists that a file holds, by its name."""
    begin = _start(source) + 1
    if source.read(begin - 1, min(begin, source.size)) != b"{":
        raise InputError(f"{source.path}: {_OBJECT_OF_LISTS}; make or copy it again")
    spans, end = _find_nested(source, begin - 1)
    lists = {}
    for start, stop in spans.tolist():
        between = source.read(begin, start).strip()  # the name, after a comma if not the first
        try:
            if source.read(start, start + 1) != b"[" or between.startswith(b",") != bool(lists):
                raise ValueError
            (name,) = json.loads(b"{" + between.removeprefix(b",") + b"0}")
        except (ValueError, RecursionError):
            raise _not_a_list(source, begin, start) from None
        lists[name] = (start, stop)
        begin = stop
    if source.read(begin, end).strip():
        raise _not_a_list(source, begin, end)
    _check_end(source, end)
    return lists


_OBJECT_OF_LISTS = 'must hold an object of lists, {"0": ["17", "4"], ...}'


def _not_a_list(source: Source, begin: int, end: int) -> InputError:
    found = source.read(begin, end).strip().decode(errors="replace")
    return source.error(begin, f"{_OBJECT_OF_LISTS}, not {shorten(found, 40)}")


def _find_nested(source: Source, start: int) -> tuple[np.ndarray, int]:
    """The list or object that opens at a position: the spans [n, 2] of the lists and objects
    directly in it, found by counting brackets outside strings, and the position where it closes.

    Errors: `InputError` when the file ends before it closes.
    """
    starts, ends = [], []
    depth, in_string, escaped = 0, 0, False
    for position, data in source.chunks(start):
        view = np.frombuffer(data, dtype=np.uint8)
        # Comparisons are faster than a table of all bytes; 32 turns [ and ] into { and }.
        lowered = view | 32
        (marks,) = ((view == _QUOTE) | (lowered == ord("{")) | (lowered == ord("}"))).nonzero()
        is_quote = view[marks] == _QUOTE
        quotes = _without_escaped(view, marks[is_quote], escaped)
        n_backslashes = len(data) - len(data.rstrip(b"\\"))
        escaped = (n_backslashes + (escaped and n_backslashes == len(data))) % 2 == 1
        brackets = marks[~is_quote]
        # A bracket is outside strings if an even number of quotes precedes it.
        brackets = brackets[(np.searchsorted(quotes, brackets) + in_string) % 2 == 0]
        in_string = (in_string + len(quotes)) % 2
        steps = _DEPTH[view[brackets]]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        closing = np.flatnonzero(depths == 0)
        if len(closing):  # what follows is not in it any more
            brackets, steps, depths = (a[: closing[0] + 1] for a in (brackets, steps, depths))
        starts.append(brackets[(depths == 2) & (steps == 1)] + position)
        ends.append(brackets[(depths == 1) & (steps == -1)] + position + 1)
        if len(closing):
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
            return spans, int(brackets[-1]) + position
        depth = int(depths[-1]) if len(depths) else depth
    kind = "list" if source.read(start, start + 1) == b"[" else "object"
    raise InputError(
        f"{source.path}: bad JSON (the file ends inside the {kind}: was it cut off?); make or copy "
        "it again"
    )


def _without_escaped(view: np.ndarray, quotes: np.ndarray, first_is_escaped: bool) -> np.ndarray:
    """The quotes that begin or end a string: those after an even number of backslashes."""
    escaped = np.zeros(len(quotes), dtype=bool)
    left = np.arange(len(quotes))
    before = quotes - 1
    while len(left):
        escaped[left[before < 0]] ^= first_is_escaped
        is_backslash = (before >= 0) & (view[before] == _BACKSLASH)
        left, before = left[is_backslash], before[is_backslash] - 1
        escaped[left] = ~escaped[left]
    return quotes[~escaped]


def _check_gaps(source: Source, spans: np.ndarray, begin: int, list_end: int) -> None:
    """One comma between two objects of a list, and nothing before the first or after the last."""
    for number in range(len(spans) + 1):
        start, end = spans[number].tolist() if number < len(spans) else (list_end, list_end)
        between = source.read(begin, start).strip()
        if between != (b"," if 0 < number < len(spans) else b""):
            found = shorten(between.decode(errors="replace"), 40)
            problem = f"the list must hold objects with one comma between two, not {found}"
            raise source.error(begin, f"bad JSON ({problem})")
        begin = end


def _check_end(source: Source, end: int) -> None:
    """Nothing follows the list or object that closes at a position."""
    rest = source.skip_blanks(end + 1)
    if rest < source.size:
        kind = "list" if source.read(end, end + 1) == b"]" else "object"
        raise source.error(rest, f"bad JSON (text after the {kind}'s end)")
