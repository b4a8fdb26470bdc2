"""JSON lists and lines, opened by byte offsets: an item is decoded when it is asked for, so no
process ever holds the objects of a whole file."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from src.data.files import SPACE, Source, open_text
from src.runtime.errors import InputError, first_line, shorten


class BadValue(ValueError):
    """What is wrong with a part of a file, and the remedy."""


def decode(
    source: Source, start: int, data: bytes, parse: Callable[[str], Any] = json.loads
) -> Any:
    """What `parse` makes of a record that begins at a position of a file.

    Errors: `InputError` with the line number, for a record that is not UTF-8 or that `parse`
    refuses (JSON's errors, `BadValue`).
    """
    try:
        return parse(data.decode())
    except BadValue as error:
        problem = str(error)
    except UnicodeDecodeError as error:
        start += error.start
        problem = f"byte {data[error.start]:#x} is not UTF-8 text; re-encode the file"
    except json.JSONDecodeError as error:
        start += len(error.doc[: error.pos].encode())
        problem = f"bad JSON ({error.msg}); correct it, or make the file again"
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond Python's limits
        problem = f"unreadable JSON ({first_line(error, 80)}); correct it, or make the file again"
    raise source.error(start, problem) from None


def read_json(path: str | Path) -> Any:
    """The contents of a small JSON file. Errors: `InputError`."""
    source = open_text(str(path))
    data = b"".join(data for _, data in source.chunks(source.start))
    return decode(source, source.start, data)


class JsonItems(Sequence[dict]):
    """The objects of a `.json` list or `.jsonl` file, or of an object of objects keyed by numbers,
    which become their `id`; `items[i]` decodes the i-th.

    Errors: `InputError` when the file is missing, empty, not text, or neither a list nor lines.
    Errors inside an item are found when that item is read.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.source = open_text(self.path)
        self._spans, self._is_keyed = _find_objects(self.source)
        self._numbers = np.arange(len(self._spans))  # of the items in the file

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict:
        start, end = self._spans[index].tolist()
        data = b"".join(data for _, data in self.source.chunks(start, end)).rstrip(SPACE)
        item = decode(self.source, start, data, self._parse)
        if not isinstance(item, dict):
            problem = f'an example must be an object like {{"question": ...}}, not {shorten(item)}'
            raise self.source.error(start, problem)
        if self._is_keyed and "id" not in item:
            before = self.source.read(max(start - 100, 0), start)
            item = {"id": re.search(rb'"(\d+)"\s*:\s*$', before)[1].decode(), **item}
        return item

    def _parse(self, text: str) -> Any:
        return json.loads(text)

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

_HEAD = 1 << 16  # bytes that tell a file's kind
_QUOTE = ord('"')
# What each byte does to the depth of nesting.
_DEPTH = np.zeros(256, dtype=np.int8)
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1


def _find_objects(source: Source) -> tuple[np.ndarray, bool]:
    """The byte spans [n, 2] of the objects in a file, and whether it is one object that has them
    under numbers. Otherwise its start tells a list, which TriviaQA has under "Data", from lines."""
    start = source.skip_blanks(source.start)
    head = source.read(start, min(start + _HEAD, source.size))
    if not head:
        raise InputError(f"{source.path}: the file is empty; give one with examples")
    is_keyed = re.match(rb'\{\s*"\d+"\s*:\s*\{', head) is not None
    if around := re.match(rb'(\{\s*"Data"\s*:\s*)?\[', head) or is_keyed:
        end = _find_nested(source, start)[1]
        opening = start if is_keyed else start + around.end() - 1
        spans, closing = _find_nested(source, opening)
        _check_between(source, spans, opening + 1, closing, is_keyed)
        if opening > start:
            rest = source.read(start, opening) + b"[]" + source.read(closing + 1, end + 1)
            decode(source, start, rest)
        rest = source.skip_blanks(end + 1)
        if rest < source.size:
            raise source.error(rest, "bad JSON (text after its end); correct it, or copy it again")
    else:
        starts = np.concatenate(list(source.line_starts(source.start)))
        ends = np.append(starts, source.size)[1:]
        spans = np.stack([starts, ends], axis=1)
        if head[:1] == b"{" and len(spans) > 1:
            _check_first_line(source, *spans[0].tolist())
    if len(spans) == 0:
        raise InputError(f"{source.path}: there are no examples in this file; give one with some")
    return spans, is_keyed


def _check_first_line(source: Source, start: int, end: int) -> None:
    """Errors: `InputError` if it only begins an object that is written over several lines."""
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(source.read(start, end))
        return
    problem = None
    with contextlib.suppress(ValueError, RecursionError):  # an `InputError` is a ValueError, too
        end = _find_nested(source, start)[1] + 1
        first = json.loads(source.read(start, end))
        problem = "objects over several lines; write each on a line (jq -c . FILE)"
        if source.skip_blanks(end) == source.size:
            fields = shorten(list(first), 200)
            problem = (
                f"one object over several lines, with the fields {fields}; give a list of them"
            )
    if problem:
        raise source.error(start, problem)


def _find_nested(source: Source, start: int) -> tuple[np.ndarray, int]:
    """The list or object that opens at a position: the spans [n, 2] of the lists and objects
    directly in it, found by counting brackets outside strings, and the position where it closes.

    Errors: `InputError` when the file ends before it closes.
    """
    starts, ends = [], []
    depth, in_string, escaped = 0, 0, False
    for position, data in source.chunks(start):
        # Without escaped backslashes and quotes, which mean nothing here.
        data = (b"_" + data[1:] if escaped else data).replace(rb"\\", b"__")
        escaped = data.endswith(b"\\")
        view = np.frombuffer(data.replace(rb"\"", b"__"), dtype=np.uint8)
        # Comparisons are faster than a table of all bytes; 32 turns [ and ] into { and }.
        lowered = view | 32
        (marks,) = ((view == _QUOTE) | (lowered == ord("{")) | (lowered == ord("}"))).nonzero()
        is_quote = view[marks] == _QUOTE
        quotes = marks[is_quote]
        brackets = marks[~is_quote]
        # A bracket is outside strings if an even number of quotes precedes it.
        brackets = brackets[(np.searchsorted(quotes, brackets) + in_string) % 2 == 0]
        in_string = (in_string + len(quotes)) % 2
        steps = _DEPTH[view[brackets]]
        depths = depth + np.cumsum(steps, dtype=np.int64)
        closing = np.flatnonzero(depths == 0)
        if len(closing):
            brackets, steps, depths = (a[: closing[0] + 1] for a in (brackets, steps, depths))
        starts.append(brackets[(depths == 2) & (steps == 1)] + position)
        ends.append(brackets[(depths == 1) & (steps == -1)] + position + 1)
        if len(closing):
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
            end = int(brackets[-1]) + position
            if source.read(start, start + 1) + source.read(end, end + 1) not in (b"[]", b"{}"):
                raise source.error(end, "bad JSON (another bracket was open); correct it")
            return spans, end
        depth = int(depths[-1]) if len(depths) else depth
    kind = "list" if source.read(start, start + 1) == b"[" else "object"
    raise InputError(
        f"{source.path}: bad JSON (the file ends inside the {kind}: was it cut off?); make or copy "
        "it again"
    )


def _check_between(
    source: Source, spans: np.ndarray, begin: int, list_end: int, is_keyed: bool
) -> None:
    """One comma between two objects, and nothing before the first or after the last; with
    `is_keyed`, a number before each."""
    key = rb'[ \t\r\n]*"\d+"[ \t\r\n]*:' if is_keyed else b""
    for number, (start, end) in enumerate([*spans.tolist(), (list_end, list_end)]):
        between = source.read(begin, start).strip(SPACE)
        comma = b"," if 0 < number < len(spans) else b""
        if not re.fullmatch(comma + (key if number < len(spans) else b""), between):
            found = shorten(between.decode(errors="replace"), 40)
            problem = f"there must be objects with one comma between two, not {found}"
            raise source.error(begin, f"bad JSON ({problem})")
        begin = end
