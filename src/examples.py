"""Data files: questions with their answers and passages, opened without reading them into memory.

A data file is a JSON list (`.json`), one JSON object a line (`.jsonl`), or DPR's rows of a question
and its answers (`.csv`); see `docs/formats.md`. `Examples` opens each by byte offsets and decodes
an example when it is asked for, so that no process ever holds the objects of a whole file, and the
processes of a machine share its pages.
"""

import ast
import csv
import dataclasses
import json
import math
import mmap
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from src.errors import InputError, first_line, shorten

# ----------------------------------------------------------------------------------------------
# Files


class Examples(Sequence[dict]):
    """The examples of a `.json` list, or of lines of JSON or of DPR's rows; `examples[i]` decodes
    the i-th. NQ-open's `answer` and BEIR's `_id` and `text` get the names that ours have.

    Errors: `InputError` when the file is missing, empty, not text, or not built as a list or as
    lines. What is wrong inside an example is found when that example is read.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._open()
        self._spans = _find_examples(self._bytes, self.path)
        first = self._bytes[self._spans[0, 0] : self._spans[0, 0] + 1]
        self._has_rows = Path(self.path).suffix in _ROWS and first not in (b"{", b"[")

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

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict:
        start, end = self._spans[index]
        try:
            text = self._bytes[start:end].decode()
            example = _parse_row(text) if self._has_rows else json.loads(text)
            # JSON can hold halves of characters, and Python's literals have more ways to say them.
            if self._has_rows or "\\ud" in text or "\\uD" in text:
                json.dumps(example, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            where = self._line(start + error.start)
            raise InputError(f"{self.path}, line {where}: not UTF-8 text; re-encode it") from None
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise InputError(
                f"{self.path}, line {self._line(start)}: {half} is half a character; remove it"
            ) from None
        except json.JSONDecodeError as error:
            where = self._line(start) + error.lineno - 1
            raise InputError(
                f"{self.path}, line {where}: bad JSON ({error.msg}); mend it there, or make the "
                "file again"
            ) from None
        except _BadRow as error:
            raise InputError(f"{self.path}, line {self._line(start)}: {error}") from None
        except (ValueError, RecursionError) as error:  # a number, or a depth, that nobody means
            raise InputError(
                f"{self.path}, line {self._line(start)}: JSON that cannot be read "
                f"({first_line(error, 80)}); mend it there, or make the file again"
            ) from None
        if not isinstance(example, dict):
            raise InputError(
                f"{self.path}, line {self._line(start)}: an example must be an object like "
                f'{{"question": ...}}, not {shorten(example)}'
            )
        return _with_our_names(example)

    def _line(self, position: int) -> int:
        return _line_number(self._bytes, position)

    def where(self, index: int) -> str:
        """The file and example for an error message, numbered from 1 as editors and people do."""
        return f"{self.path}, example {index + 1} (line {self._line(self._spans[index][0])})"

    # A memory map cannot be sent to a data-loading worker; the worker opens the file again.
    def __getstate__(self) -> dict:
        return {"path": self.path, "_spans": self._spans, "_has_rows": self._has_rows}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


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
# What each byte does to the depth of nesting.
_DEPTH = np.zeros(256, dtype=np.int8)
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1


def _find_examples(data: mmap.mmap, path: str) -> np.ndarray:
    """The byte spans [n, 2] of the examples in a file; `[` at its start tells a list from lines."""
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # a byte-order mark
    head = data[start : start + 4096].lstrip()
    if not head:
        raise InputError(f"{path}: the file is empty; give one with examples")
    spans = _find_list_items(data, path) if head[:1] == b"[" else _find_lines(data, start)
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


def _find_list_items(data: mmap.mmap, path: str) -> np.ndarray:
    """Spans of the objects in a top-level JSON list, found by counting brackets outside strings.

    Errors: `InputError` with a line number when brackets do not match, when the file ends too
    early, or when something other than a comma stands between two objects.
    """
    buffer = np.frombuffer(data, dtype=np.uint8)
    starts, ends = [], []
    depth, in_string, list_end = 0, 0, None
    for chunk in range(0, len(buffer), _CHUNK):
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
        if len(depths) == 0:
            continue
        if depths.min() < 0 or list_end is not None:
            wrong = brackets[np.argmax(depths < 0)] if list_end is None else brackets[0]
            raise InputError(
                f"{path}, line {_line_number(data, wrong)}: bad JSON (unmatched bracket)"
            )
        depth = int(depths[-1])
        starts.append(brackets[(depths == 2) & (steps == 1)])
        ends.append(brackets[(depths == 1) & (steps == -1)] + 1)
        closing = np.flatnonzero(depths == 0)
        if len(closing):
            list_end = int(brackets[closing[0]])
            if closing[0] != len(brackets) - 1:
                where = _line_number(data, brackets[closing[0] + 1])
                raise InputError(f"{path}, line {where}: bad JSON (text after the list's end)")
    if list_end is None:
        raise InputError(
            f"{path}: bad JSON (the file ends inside the list: was it cut off?); make or copy it "
            "again"
        )
    spans = np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1)
    _check_gaps(data, spans, list_end, path)
    return spans


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


def _check_gaps(data: mmap.mmap, spans: np.ndarray, list_end: int, path: str) -> None:
    """One comma stands between two objects of a list, and nothing before the first or after."""
    begin = data.find(b"[") + 1
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
    if data[list_end + 1 :].strip():
        where = _line_number(data, list_end + 1)
        raise InputError(f"{path}, line {where}: bad JSON (text after the list's end)")


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


def write_whole(path: Path, pieces: Iterable[str]) -> Path:
    """Write a file beside its place and rename it: complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); give another place, or make room"
        ) from error
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
) -> Examples:
    """Open a data file and check this process's share of its examples (`rank`, `rank +
    world_size`, ...), so that a broken one is reported now and not in the middle of the night.

    Args:
        needs_target: the examples are to train a reader: each must have a target or answers.
        needs_scores: the examples are to distil from: each must have a score on one of its first
            `needs_scores` passages.
    """
    examples = Examples(path)
    for index in range(rank, len(examples), world_size):
        example = read_example(examples, index)
        if needs_target and example.target is None and not example.answers:
            where = examples.where(index)
            raise InputError(f'{where}: "target" or "answers" is needed to train on it')
        if needs_scores and not any(p.score is not None for p in example.passages[:needs_scores]):
            raise InputError(
                f"{examples.where(index)}: none of its passages has a score of the reader; write "
                "them with test_reader.py --write_crossattention_scores"
            )
    return examples
