"""Files of JSON, opened by byte offsets and decoded a piece at a time when it is asked for.

So no process ever holds the objects of a whole file, and the processes of a machine share its
pages.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.files import line_number
from src.runtime.errors import InputError, first_line, shorten


class JsonFile:
    """A file of JSON, mapped into memory; `json()` decodes all of it.

    Errors: `InputError` when the file is missing or empty, and, with a line number, for what is not
    UTF-8 or not JSON in the part that is decoded.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._open()

    def _open(self) -> None:
        try:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise InputError(f"{self.path}: the file is empty; give one with examples") from None
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror}); check the path"
            ) from None

    def json(self) -> Any:
        return self._decode(0, len(self._bytes))

    def _decode(self, start: int, end: int) -> Any:
        try:
            return self._parse(self._bytes[start:end].decode())
        except UnicodeDecodeError as error:
            where = self._line(start + error.start)
            raise InputError(f"{self.path}, line {where}: not UTF-8 text; re-encode it") from None
        except json.JSONDecodeError as error:
            where = self._line(start) + error.lineno - 1
            raise InputError(
                f"{self.path}, line {where}: bad JSON ({error.msg}); mend it there, or make the "
                "file again"
            ) from None
        except (ValueError, RecursionError) as error:  # a number, or a depth, that nobody means
            raise InputError(
                f"{self.path}, line {self._line(start)}: JSON that cannot be read "
                f"({first_line(error, 80)}); mend it there, or make the file again"
            ) from None

    def _parse(self, text: str) -> Any:
        return json.loads(text)

    def _line(self, position: int) -> int:
        return line_number(self._bytes, position)

    # A memory map cannot be sent to a data-loading worker; the worker opens the file again.
    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_bytes"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


class JsonItems(JsonFile, Sequence[dict]):
    """The objects of a `.json` list or `.jsonl` file; `items[i]` decodes the i-th.

    Args:
        key: the file holds one object, and the list is what stands under this key of it.
    Errors: `InputError` when the file is missing, empty, not text, or not built as a list or as
    lines. What is wrong inside an item is found when that item is read.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        super().__init__(path)
        self._spans = _find_objects(self._bytes, self.path, key)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict:
        start, end = self._spans[index]
        item = self._decode(start, end)
        if not isinstance(item, dict):
            raise InputError(
                f"{self.path}, line {self._line(start)}: an example must be an object like "
                f'{{"question": ...}}, not {shorten(item)}'
            )
        return item

    def where(self, index: int) -> str:
        """The file and example for an error message, numbered from 1 as editors and people do."""
        return f"{self.path}, example {index + 1} (line {self._line(self._spans[index][0])})"


class JsonLists(JsonFile, Mapping[str, list]):
    """A file that holds one JSON object of lists, `{"0": ["17", "4"], ...}`; `lists[name]` decodes
    one of them. In memory are the names alone.

    Errors: `InputError` when the file is missing, empty, or does not hold such an object.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._places = _find_lists(self._bytes, self.path)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> list:
        return self._decode(*self._places[name])


def check_characters(value: object, where: Callable[[], str]) -> None:
    """JSON can hold halves of characters, which no file of text can. Errors: `InputError`."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError(f"{where()}: {half} is half a character; remove it") from None


def json_list(items: Iterable[dict]) -> Iterator[str]:
    """The pieces of a JSON list, with an item a line."""
    opening = "[\n"
    for item in items:
        yield opening + json.dumps(item)
        opening = ",\n"
    yield "\n]\n"


# ----------------------------------------------------------------------------------------------
# Where the objects stand

_CHUNK = 1 << 24  # bytes looked at in one go: large enough for numpy, small enough for memory
_QUOTE, _BACKSLASH, _NEWLINE = ord('"'), ord("\\"), ord("\n")
_WINDOW = 1 << 18  # bytes
# What each byte does to the depth of nesting.
_DEPTH = np.zeros(256, dtype=np.int8)
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1


def _find_objects(data: mmap.mmap, path: str, key: str | None) -> np.ndarray:
    """The byte spans [n, 2] of the objects in a file; `[` at its start tells a list from lines."""
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # a byte-order mark
    head = data[start : start + 4096].lstrip()
    if not head:
        raise InputError(f"{path}: the file is empty; give one with examples")
    if key is not None:
        spans = _find_list_under(data, key, path)
    elif head[:1] == b"[":
        first = data.find(b"[")
        spans, end = _find_nested(data, first, path)
        _check_gaps(data, spans, first + 1, end, path)
        _check_end(data, end, path)
    else:
        spans = _find_lines(data, start)
    if len(spans) == 0:
        raise InputError(f"{path}: there are no examples in this file; give one with some")
    return spans


def _find_lines(data: mmap.mmap, start: int) -> np.ndarray:
    """Spans of the lines that are not blank."""
    buffer = np.frombuffer(data, dtype=np.uint8)
    ends = [
        np.flatnonzero(buffer[chunk : chunk + _CHUNK] == _NEWLINE) + chunk
        for chunk in range(0, len(buffer), _CHUNK)
    ]
    ends = np.concatenate([*ends, [len(buffer)]])
    starts = np.concatenate([[start], ends[:-1] + 1])
    spans = np.stack([starts, ends], axis=1)
    # Only short lines can be blank; looking at all of them would read the file twice.
    blank = [
        row for row in np.flatnonzero(ends - starts < 8) if not data[slice(*spans[row])].strip()
    ]
    return np.delete(spans, blank, axis=0)


def _find_list_under(data: mmap.mmap, key: str, path: str) -> np.ndarray:
    """Spans of the objects in the list under a key of the one object that a file holds."""
    # (In a JSON text, a quote mark inside a string has a backslash before it.)
    found = re.search(rb'(?<!\\)"' + key.encode() + rb'"\s*:\s*\[', data)
    missing = f'{path}: no list under "{key}" in this file; was it cut off, or is it another one?'
    if found is None:
        raise InputError(missing)
    opening = found.end() - 1
    spans, end = _find_nested(data, opening, path)
    _check_gaps(data, spans, opening + 1, end, path)
    # What is around the list is small. With an empty list in its place, it must be such an object.
    try:
        around = json.loads(data[:opening] + b"[]" + data[end + 1 :])
    except (ValueError, RecursionError) as error:
        problem = f"bad JSON before or after the list ({first_line(error, 80)})"
        raise InputError(f"{path}: {problem}; make or copy it again") from None
    if not isinstance(around, dict) or around.get(key) != []:
        raise InputError(missing)
    return spans


def _find_lists(data: mmap.mmap, path: str) -> dict[str, tuple[int, int]]:
    """The span of each list in the object of lists that a file holds, by its name."""
    opening = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{").match(data)
    if opening is None:
        raise InputError(f"{path}: {_OBJECT_OF_LISTS}; make or copy it again")
    begin = opening.end()
    spans, end = _find_nested(data, begin - 1, path)
    places = {}
    for start, stop in spans.tolist():
        between = data[begin:start].strip()  # the name, with a comma before it after another list
        try:
            if data[start] != ord("[") or between.startswith(b",") != bool(places):
                raise ValueError
            (name,) = json.loads(b"{" + between.removeprefix(b",") + b"0}")
        except (ValueError, RecursionError):
            raise _not_a_list(data, begin, start, path) from None
        places[name] = (start, stop)
        begin = stop
    if data[begin:end].strip():
        raise _not_a_list(data, begin, end, path)
    _check_end(data, end, path)
    return places


_OBJECT_OF_LISTS = 'must hold an object of lists, {"0": ["17", "4"], ...}'


def _not_a_list(data: mmap.mmap, begin: int, end: int, path: str) -> InputError:
    where, found = line_number(data, begin), data[begin:end].strip().decode(errors="replace")
    return InputError(f"{path}, line {where}: {_OBJECT_OF_LISTS}, not {shorten(found, 40)}")


def _find_nested(data: mmap.mmap, start: int, path: str) -> tuple[np.ndarray, int]:
    """The list or object that opens at a place of a file: the spans [n, 2] of the lists and objects
    directly in it, found by counting brackets outside strings, and the place where it closes.

    Errors: `InputError` when the file ends before it closes.
    """
    buffer = np.frombuffer(data, dtype=np.uint8)
    starts, ends = [], []
    depth, in_string = 0, 0
    for chunk in range(start, len(buffer), _CHUNK):
        view = buffer[chunk : chunk + _CHUNK]
        places = _find_structure(view)
        is_quote = view[places] == _QUOTE
        quotes = _without_escaped(buffer, places[is_quote] + chunk)
        brackets = places[~is_quote] + chunk
        # A bracket is outside strings if an even number of quotes stands before it.
        outside = (np.searchsorted(quotes, brackets) + in_string) % 2 == 0
        brackets = brackets[outside]
        in_string = (in_string + len(quotes)) % 2
        steps = _DEPTH[buffer[brackets]]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        closing = np.flatnonzero(depths == 0)
        if len(closing):  # what follows is not in it any more
            brackets, steps, depths = (a[: closing[0] + 1] for a in (brackets, steps, depths))
        starts.append(brackets[(depths == 2) & (steps == 1)])
        ends.append(brackets[(depths == 1) & (steps == -1)] + 1)
        if len(closing):
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
            return spans, int(brackets[-1])
        depth = int(depths[-1]) if len(depths) else depth
    kind = "list" if data[start : start + 1] == b"[" else "object"
    raise InputError(
        f"{path}: bad JSON (the file ends inside the {kind}: was it cut off?); make or copy it "
        "again"
    )


def _find_structure(view: np.ndarray) -> np.ndarray:
    """The places of quotes and brackets: window by window, so that it stays in the processor's
    cache, and by comparisons, which are faster than a table of all bytes."""
    found = []
    for start in range(0, len(view), _WINDOW):
        window = view[start : start + _WINDOW]
        lowered = window | 32  # makes [ and ] what { and } are
        marks = window == _QUOTE
        marks |= lowered == ord("{")
        marks |= lowered == ord("}")
        found.append(np.flatnonzero(marks) + start)
    return np.concatenate(found)


def _without_escaped(buffer: np.ndarray, quotes: np.ndarray) -> np.ndarray:
    """The quotes that end or begin a string: those after an even number of backslashes."""
    escaped = np.zeros(len(quotes), dtype=bool)
    left = np.arange(len(quotes))
    before = quotes - 1
    while len(left):
        is_backslash = (before >= 0) & (buffer[before] == _BACKSLASH)
        left, before = left[is_backslash], before[is_backslash] - 1
        escaped[left] = ~escaped[left]
    return quotes[~escaped]


def _check_gaps(data: mmap.mmap, spans: np.ndarray, begin: int, list_end: int, path: str) -> None:
    """One comma stands between two objects of a list, and nothing before the first or after."""
    for number in range(len(spans) + 1):
        end = spans[number, 0] if number < len(spans) else list_end
        inner = 0 < number < len(spans)
        between = data[begin:end].strip()
        if between != (b"," if inner else b""):
            raise InputError(
                f"{path}, line {line_number(data, begin)}: bad JSON (the list must hold objects "
                f"with one comma between two, not {shorten(between.decode(errors='replace'), 40)})"
            )
        begin = spans[number, 1] if number < len(spans) else end


def _check_end(data: mmap.mmap, end: int, path: str) -> None:
    """Nothing follows the list or object that closes at a place of a file."""
    rest = re.compile(rb"\S").search(data, end + 1)
    if rest:
        where = line_number(data, rest.start())
        kind = "list" if data[end] == ord("]") else "object"
        raise InputError(f"{path}, line {where}: bad JSON (text after the {kind}'s end)")
