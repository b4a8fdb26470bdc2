"""Data files: questions with their answers and passages, opened without reading them into memory.

A data file is a JSON list (`.json`), one JSON object a line (`.jsonl`), or DPR's rows of a question
and its answers (`.csv`); see `docs/formats.md`. `Examples` opens each by byte offsets and decodes
an example when it is asked for, so that no process ever holds the objects of a whole file, and the
processes of a machine share its pages. `JsonItems` and `JsonLists` do the same for JSON of other
kinds, such as datasets are published in.
"""

import ast
import contextlib
import csv
import dataclasses
import json
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.errors import InputError, first_line, shorten
from src.terminal import Bar, no_bar

# ----------------------------------------------------------------------------------------------
# Files


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
        return _line_number(self._bytes, position)

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


class Examples(JsonItems):
    """The examples of a data file, of JSON or of DPR's rows; `examples[i]` decodes the i-th.
    NQ-open's `answer` and BEIR's `_id` and `text` get the names that ours have."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        first = self._bytes[self._spans[0, 0] : self._spans[0, 0] + 1]
        self._has_rows = Path(self.path).suffix in _ROWS and first not in (b"{", b"[")

    def __getitem__(self, index: int) -> dict:
        start, end = self._spans[index]
        try:
            example = super().__getitem__(index)
        except _BadRow as error:
            raise InputError(f"{self.path}, line {self._line(start)}: {error}") from None
        text = self._bytes[start:end]
        # How JSON has halves of characters; Python's texts have more ways.
        if self._has_rows or b"\\ud" in text or b"\\uD" in text:
            check_characters(example, lambda: f"{self.path}, line {self._line(start)}")
        return _with_our_names(example)

    def _parse(self, text: str) -> Any:
        return _parse_row(text) if self._has_rows else super()._parse(text)


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


# ----------------------------------------------------------------------------------------------
# Other people's questions

_ROWS = (".csv", ".tsv", ".txt")  # names of files with DPR's rows
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_STRINGS = re.compile(rf"\[\s*(?:{_STRING}\s*(?:,\s*{_STRING}\s*)*,?)?\s*\]")


class _BadRow(Exception):
    """What is wrong with a row, and the cure."""


def _parse_row(line: str) -> dict:
    """An example from a row of DPR's: question, tab, the answers as a Python list of texts.

    Fields are quoted as `csv` writes them. Errors: `_BadRow`.
    """
    line = line.rstrip("\r\n") + "\n"
    try:
        fields = next(csv.reader([line], delimiter="\t"))
    except csv.Error as error:
        raise _BadRow(f"not a row of TSV ({error}); mend it, or give JSON") from None
    if len(fields) != 2 or fields[1].endswith("\n"):  # an open quote mark takes the line's end in
        raise _BadRow(
            "a row must be a question, a tab and a list of answers like ['Paris', 'Lyon'], not "
            f"{shorten(line, 60)}; mend it, or give JSON"
        )
    question, answers = fields[0], fields[1].strip()
    try:
        # Nothing but strings gets as far as Python's own reader of literals.
        if not _STRINGS.fullmatch(answers):
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about backslashes that mean nothing
            return {"question": question, "answers": ast.literal_eval(answers)}
    except (ValueError, SyntaxError):
        raise _BadRow(
            "the answers of a row must be a list of texts like ['Paris', 'Lyon'], not "
            f"{shorten(answers, 60)}; mend it, or give JSON"
        ) from None


def _with_our_names(example: dict) -> dict:
    """The example under the names of our format, if it has those of NQ-open or BEIR."""
    theirs = {"answer": "answers"}
    if "question" not in example and "_id" in example:
        theirs |= {"_id": "id", "text": "question"}
    if not any(name in example and theirs[name] not in example for name in theirs):
        return example
    return {
        theirs[name] if name in theirs and theirs[name] not in example else name: value
        for name, value in example.items()
    }


# ----------------------------------------------------------------------------------------------
# Where the examples stand

_CHUNK = 1 << 24  # bytes looked at in one go: large enough for numpy, small enough for memory
_QUOTE, _BACKSLASH, _NEWLINE = ord('"'), ord("\\"), ord("\n")
_WINDOW = 1 << 18  # bytes
_BYTES_WORTH_A_PROCESS = 1 << 25  # of examples to check
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
    where, found = _line_number(data, begin), data[begin:end].strip().decode(errors="replace")
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
                f"{path}, line {_line_number(data, begin)}: bad JSON (the list must hold objects "
                f"with one comma between two, not {shorten(between.decode(errors='replace'), 40)})"
            )
        begin = spans[number, 1] if number < len(spans) else end


def _check_end(data: mmap.mmap, end: int, path: str) -> None:
    """Nothing follows the list or object that closes at a place of a file."""
    rest = re.compile(rb"\S").search(data, end + 1)
    if rest:
        where = _line_number(data, rest.start())
        kind = "list" if data[end] == ord("]") else "object"
        raise InputError(f"{path}, line {where}: bad JSON (text after the {kind}'s end)")


def _line_number(data: mmap.mmap, position: int) -> int:
    """The number of the line, from 1, that holds a byte position."""
    buffer = np.frombuffer(data, dtype=np.uint8, count=int(position))
    chunks = range(0, len(buffer), _CHUNK)
    return 1 + sum(int((buffer[c : c + _CHUNK] == _NEWLINE).sum()) for c in chunks)


def check_place(path: str, option: str = "--output_path") -> None:
    """Whether a file can be written where an option says: asked at the start, not after hours of
    work. Errors: `InputError` when it cannot."""
    place = Path(path)
    try:
        if place.is_dir():
            raise InputError(f"{option} {shorten(path)}: a folder; name a file in it")
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another {option}"
        ) from None


def json_list(items: Iterable[dict]) -> Iterator[str]:
    """The pieces of a JSON list, with an item a line."""
    opening = "[\n"
    for item in items:
        yield opening + json.dumps(item)
        opening = ",\n"
    yield "\n]\n"


def write_whole(path: Path, pieces: Iterable[str]) -> Path:
    """Write a file beside its place and rename it: complete or absent, also when it is the pieces
    that fail."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another place, or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never begun
            partial.unlink()
    return path


# ----------------------------------------------------------------------------------------------
# Examples


class Passage(NamedTuple):
    """A retrieved passage. `place` is where it stood in the file's `ctxs`."""

    title: str
    text: str
    score: float | None
    place: int


@dataclasses.dataclass(frozen=True)
class Example:
    """A checked example. `passages` are in reading order: by score, highest first."""

    index: int
    id: str
    question: str
    target: str | None
    answers: list[str]
    passages: list[Passage]


def parse_example(raw: dict, index: int, where: str) -> Example:
    """Check one decoded example. Errors: `InputError` that says `where` and what is wrong."""
    question = raw.get("question")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where}: "question" must be text, not {shorten(question)}')
    target = raw.get("target")
    if target is not None and not isinstance(target, str):
        raise InputError(f'{where}: "target" must be text, not {shorten(target)}')
    answers = raw.get("answers")
    answers = [] if answers is None else answers
    if not isinstance(answers, list):
        raise InputError(f'{where}: "answers" must be a list of texts, not {shorten(answers)}')
    for answer in answers:
        if not isinstance(answer, str):
            raise InputError(f"{where}: an answer must be text, not {shorten(answer)}")
    contexts = raw.get("ctxs")
    contexts = [] if contexts is None else contexts
    if not isinstance(contexts, list):
        raise InputError(f'{where}: "ctxs" must be a list of passages, not {shorten(contexts)}')
    passages = [_parse_passage(context, place, where) for place, context in enumerate(contexts)]
    # Stable: equal scores keep their order, and passages without a score come last in theirs.
    passages.sort(key=lambda passage: math.inf if passage.score is None else -passage.score)
    identity = raw.get("id")
    return Example(
        index=index,
        id=str(index if identity is None else identity),
        question=question,
        target=target,
        answers=answers,
        passages=passages,
    )


def _parse_passage(context: Any, place: int, where: str) -> Passage:
    if not isinstance(context, dict):
        raise InputError(f"{where}, passage {place + 1}: must be an object, not {shorten(context)}")
    text, title = context.get("text"), context.get("title")
    if not isinstance(text, str):
        raise InputError(f'{where}, passage {place + 1}: "text" must be text, not {shorten(text)}')
    if title is not None and not isinstance(title, str):
        raise InputError(
            f'{where}, passage {place + 1}: "title" must be text, not {shorten(title)}'
        )
    score = context.get("score")
    if score is not None:
        try:  # numbers or strings, as the reference's own files have both
            score = float(score)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            raise InputError(
                f'{where}, passage {place + 1}: "score" must be a finite number or left out, '
                f"not {shorten(context['score'])}"
            )
    return Passage(title or "", text, score, place)


def read_example(examples: Examples, index: int) -> Example:
    """The checked example at a place in a file."""
    raw = examples[index]
    try:
        return parse_example(raw, index, "")
    except InputError:  # the line number costs a pass over the file: only when it is needed
        return parse_example(raw, index, examples.where(index))


def load_data(
    path: str | Path,
    rank: int = 0,
    world_size: int = 1,
    needs_target: bool = False,
    needs_scores: int = 0,
    bar: Bar = no_bar,
) -> Examples:
    """Open a data file and check this process's share of its examples (`rank`, `rank +
    world_size`, ...), so that a broken one is reported now and not in the middle of the night.
    A large file is checked by several processes.

    Args:
        needs_target: the examples are to train a reader: each must have a target or answers.
        needs_scores: the examples are to distil from: each must have a score on one of its first
            `needs_scores` passages.
        bar: for the examples that are checked.
    """
    examples = Examples(path)

    def check(index: int) -> None:
        example = read_example(examples, index)
        if needs_target and example.target is None and not example.answers:
            where = examples.where(index)
            raise InputError(f'{where}: "target" or "answers" is needed to train on it')
        if needs_scores and not any(p.score is not None for p in example.passages[:needs_scores]):
            raise InputError(
                f"{examples.where(index)}: none of its passages has a score of the reader; write "
                "them with test_reader.py --write_crossattention_scores"
            )

    size = os.path.getsize(path) // world_size
    n_processes = min(_cpus(), size // _BYTES_WORTH_A_PROCESS, 16)
    indices = range(rank, len(examples), world_size)
    with bar(len(indices), "example", "checking examples") as shown:
        _check_all(check, indices, n_processes, shown.update)
    return examples


def _check_all(
    check: Callable[[int], None],
    indices: range,
    n_processes: int,
    on_examples: Callable[[int], None],
) -> None:
    """Run a check on each index, shared out among processes. Errors: the check's first one."""
    if n_processes < 2:
        for index in indices:
            check(index)
            on_examples(1)
        return
    # Forked, so that they have the opened file, and nothing is sent but what they find.
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    errors: list[tuple[int, str]] = []
    try:
        for number in range(n_processes):
            ours, theirs = context.Pipe(duplex=False)
            share = indices[number::n_processes]
            process = context.Process(target=_check_share, args=(check, share, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        while pipes:
            for pipe in multiprocessing.connection.wait(pipes):
                try:
                    found = pipe.recv()
                except EOFError:
                    pipes.remove(pipe)
                    continue
                if isinstance(found, int):
                    on_examples(found)
                else:
                    errors.append(found)
    except BaseException:  # Ctrl-C, for one: none is to outlive this process
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    if errors:
        raise InputError(min(errors)[1])
    broken = [process.exitcode for process in processes if process.exitcode]
    if broken:
        raise RuntimeError(f"a process that checks examples ended with status {broken[0]}")


def _check_share(check: Callable[[int], None], indices: range, pipe: Connection) -> None:
    """In a process of its own: send how many examples are well, at times, and the first error."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # what they mean is the waiting process's to say
    told = 0
    try:
        for done, index in enumerate(indices, start=1):
            try:
                check(index)
            except InputError as error:
                pipe.send((index, str(error)))
                return
            if done - told == 100 or done == len(indices):
                pipe.send(done - told)
                told = done
    except BrokenPipeError:
        return  # nobody waits any more


def _cpus() -> int:
    """How many CPUs this process may use, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
