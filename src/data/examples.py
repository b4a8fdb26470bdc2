"""Data files: questions with their answers and passages, opened without reading them into memory.

A data file is a JSON list (`.json`), one JSON object a line (`.jsonl`), or DPR's rows of a question
and its answers (`.csv`); see `docs/formats.md`.
"""

import ast
import csv
import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from src.data.json_files import JsonItems, check_characters
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import Bar, no_bar

_BYTES_WORTH_A_PROCESS = 1 << 25  # of examples to check


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
# Checked examples


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
