"""Data files: questions with their answers and passages, opened without reading them into memory.

A data file is a JSON list (`.json`), one JSON object a line (`.jsonl`), or DPR's rows of a question
and its answers (`.csv`); see `docs/formats.md`.
"""

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from src.data.formats import FIELDS, ROWS, Pattern, parse_row, with_our_names
from src.data.json_files import BadValue, JsonItems, check_characters
from src.data.passages import Passage
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import Bar, count, no_bar

_BYTES_WORTH_A_PROCESS = 1 << 25  # of examples to check


class Examples(JsonItems):
    """The examples of a data file, of JSON or of DPR's rows; `examples[i]` decodes the i-th, with
    other people's names replaced by ours.

    Args: target: the passages' score is that under this name of their `scores`.

    `unscored` holds the indices of those that `load_data` found without scored passages;
    `answers_are_regexes` says whether each answer is a regular expression.
    """

    def __init__(self, path: str | Path, target: str | None = None):
        super().__init__(path)
        self._target = target
        start = self.source.skip_blanks(int(self._spans[0, 0]))
        is_json = self.source.read(start, start + 1) in (b"{", b"[")
        self._has_rows = Path(self.path.removesuffix(".gz")).suffix in ROWS and not is_json
        self.unscored: list[int] = []
        self.answers_are_regexes = False

    def __getitem__(self, index: int) -> dict:
        example = super().__getitem__(index)
        try:
            return _with_target(example, self._target) if self._target else example
        except BadValue as error:
            raise InputError(f"{self.where(index)}{error}") from None

    def _parse(self, text: str) -> Any:
        example = parse_row(text) if self._has_rows else json.loads(text)
        if isinstance(example, dict):
            example = with_our_names(example)
            # How JSON writes surrogates, perhaps unpaired; Python's literals have more ways.
            if self._has_rows or "\\ud" in text or "\\uD" in text:
                check_characters([example.get(name) for name in FIELDS])
        return example


def _with_target(example: dict, target: str) -> dict:
    """The example with passages scored by a target, as far as the file has it; `has_answer` is also
    in retrieved data (`hasanswer`) and in DPR's (`positive_ctxs`, `negative_ctxs`)."""
    contexts = example.get("ctxs")
    if target == "has_answer" and contexts is None and "positive_ctxs" in example:
        contexts = [
            {**context, "hasanswer": kind == "positive_ctxs"}
            for kind in ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
            for context in _list(example.get(kind), f'"{kind}" must be a list of passages')
            if isinstance(context, dict)
        ]
    if not isinstance(contexts, list):
        return example

    def score(context: dict) -> float | None:
        scores = context.get("scores")
        scores = scores if isinstance(scores, dict) else {}
        return marked(context) if target == "has_answer" else scores.get(target)

    # (What is no object is reported when it is checked.)
    scored = [{**c, "score": score(c)} if isinstance(c, dict) else c for c in contexts]
    return {**example, "ctxs": scored}


def marked(context: dict) -> float | None:
    """1 or 0 where a file says whether a passage has an answer: the target, else `hasanswer`."""
    scores, has = context.get("scores"), context.get("hasanswer")
    score = scores.get("has_answer") if isinstance(scores, dict) else None
    return float(has) if score is None and isinstance(has, bool) else score


# ----------------------------------------------------------------------------------------------
# Checked examples


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
    try:
        if "question" not in raw:
            fields = shorten(list(raw), 200)
            problem = f'no "question" among its fields {fields}; docs/formats.md has all names read'
            raise BadValue(f": {problem}")
        question, target = _text(raw["question"], '"question"'), raw.get("target")
        if not question.strip():
            raise BadValue(f': "question" must be text, not {shorten(question)}')
        contexts = _list(raw.get("ctxs"), '"ctxs" must be a list of passages')
        passages = [_parse_passage(context, i) for i, context in enumerate(contexts)]
        # Stable: equal scores keep their order, and passages without a score come last in theirs.
        passages.sort(key=lambda passage: math.inf if passage.score is None else -passage.score)
        answers = _list(raw.get("answers"), '"answers" must be a list of texts')
        identity = raw.get("id")
        return Example(
            index=index,
            id=str(index if identity is None else identity),
            question=question,
            target=None if target is None else _text(target, '"target"'),
            answers=[_text(answer, "an answer") for answer in answers],
            passages=passages,
        )
    except BadValue as error:
        raise InputError(f"{where}{error}") from None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadValue(f": {name} must be text, not {shorten(value)}")
    return value


def _list(value: Any, problem: str) -> list:
    if not isinstance(value, list | None):
        raise BadValue(f": {problem}, not {shorten(value)}")
    return value or []


_OUR_FIELDS = frozenset(  # of a passage
    ["id", "title", "text", "score", "hasanswer", "scores", "token_log_probs", "attribution"]
)


def _parse_passage(context: Any, position: int) -> Passage:
    # (Files have millions: a call for each field would take half as long again.)
    if not isinstance(context, dict):
        problem = f"must be an object, not {shorten(context)}"
        raise BadValue(f", passage {position + 1}: {problem}")
    title, text, score = context.get("title"), context.get("text"), context.get("score")
    if score is not None:
        try:  # numbers or strings of them: the reference's own files have both
            score = float(score)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not math.isfinite(score):
            problem = f"must be a finite number or left out, not {shorten(context['score'])}"
            raise BadValue(f', passage {position + 1}: "score" {problem}')
    if not isinstance(text, str) or not (title is None or isinstance(title, str)):
        name = "title" if isinstance(text, str) else "text"
        problem = f'"{name}" must be text, not {shorten(context.get(name))}'
        raise BadValue(f", passage {position + 1}: {problem}")
    more = {}
    if not context.keys() <= _OUR_FIELDS:
        more = {name: value for name, value in context.items() if name not in _OUR_FIELDS}
    return Passage(str(context.get("id", "")), title or "", text, score, position, more)


def read_example(examples: Examples, index: int) -> Example:
    """The checked example at an index of a file."""
    raw = examples[index]
    try:
        example = parse_example(raw, index, "")
        if examples.answers_are_regexes:
            patterns = list(map(Pattern, example.answers))
            return dataclasses.replace(example, answers=patterns)
        return example
    except BadValue as error:
        raise InputError(f"{examples.where(index)}{error}") from None
    except InputError:  # the line number costs a pass over the file: only when it is needed
        return parse_example(raw, index, examples.where(index))


def load_data(
    path: str | Path,
    rank: int = 0,
    world_size: int = 1,
    needs_target: bool = False,
    needs_scores: int = 0,
    bar: Bar = no_bar,
    target: str | None = None,
    regex_answers: bool = False,
) -> Examples:
    """Open a data file and check this process's share of its examples (`rank`, `rank +
    world_size`, ...), so that a broken one is reported now and not in the middle of the night.
    A large file is checked by several processes.

    Args:
        needs_target: the examples are to train a reader: each must have a target or answers.
        needs_scores: the examples are to distil from: those of this process's share without a score
            on one of their first `needs_scores` passages (with the target `has_answer`: without an
            answer in one) are listed in `unscored`; 0: none are.
        bar: for the examples that are checked.
        target: see `Examples`.
        regex_answers: whether the answers are regular expressions.
    """
    examples = Examples(path, target)
    examples.answers_are_regexes = regex_answers

    def check(index: int) -> int:
        example = read_example(examples, index)
        if needs_target and example.target is None and not example.answers:
            where = examples.where(index)
            raise InputError(f'{where}: "target" or "answers" is needed to train on it')
        scores = [passage.score for passage in example.passages[:needs_scores]]
        scores = [score for score in scores if score is not None]
        lacks_scores = needs_scores and not (any(scores) if target == "has_answer" else scores)
        is_empty = example.answers and not any(map(str.strip, example.answers))
        return _UNSCORED * bool(lacks_scores) + _EMPTY * bool(is_empty)

    def check_all(part: range) -> list[tuple[int, int]]:
        return [(index, flags) for index in part if (flags := check(index))]

    size = examples.source.size // world_size  # of a process's share
    n_processes = min(available_cpus(), size // _BYTES_WORTH_A_PROCESS, 16)
    indices = range(rank, len(examples), world_size)
    parts = [indices[start : start + 100] for start in range(0, len(indices), 100)]
    found: list[tuple[int, int]] = []  # what is noted of an example, with its index
    with bar(len(indices), "example", "checking examples") as shown:
        for part, noted in zip(parts, in_order(check_all, parts, n_processes), strict=True):
            found += noted
            shown.update(len(part))
    examples.unscored = [index for index, flags in found if flags & _UNSCORED]
    if n_empty := sum(flags & _EMPTY > 0 for _, flags in found):
        numbers = f"{n_empty:,} of {count(len(indices), 'question')} of {path}"
        text = "%s have empty answers alone, which count as found in every passage"
        logging.getLogger("fid").warning(text, numbers)
    return examples


_UNSCORED, _EMPTY = 1, 2  # what `load_data` notes of an example: all answers empty


def skip_unscored(
    examples: Examples,
    gathered: Iterable[list[int]],
    log: logging.Logger,
    target: str | None = None,
) -> Examples:
    """The examples to distil from, given `unscored` of all processes.

    Errors: `InputError` when none is left.
    """
    skipped = [index for indices in gathered for index in indices]
    if len(skipped) == len(examples):
        describe_passages(examples, 0, "distil from them")
        has_not = "none of the passages that are read has"
        if target == "has_answer":
            raise InputError(
                f"{examples.path}: {has_not} an answer by hasanswer, which passage_retrieval.py "
                "writes for questions with answers"
            )
        name, option = (f" by {target}", f" --targets {target}") if target else ("", "")
        raise InputError(
            f"{examples.path}: {has_not} a score of the reader{name}; write them with "
            f"test_reader.py --write_crossattention_scores{option}"
        )
    if skipped:
        n, total = f"{len(skipped):,}", count(len(examples), "question")
        lacking = "a passage with an answer" if target == "has_answer" else "scored passages"
        log.info("skipped %s of %s of %s without %s", n, total, examples.path, lacking)
    return examples.without(skipped)


def describe_passages(examples: Examples, n_context: int, needed_to: str = "") -> str:
    """What is read of the examples' passages, for the log.

    Errors: `InputError` when no example has any, if `needed_to` says what they are for.
    """
    if any(read_example(examples, index).passages for index in range(len(examples))):
        return f"at most {count(n_context, 'passage')} each"
    fields = shorten(list(examples[0]), 200)
    found = f'no example has passages under "ctxs" (the first has {fields})'
    if needed_to:
        raise InputError(
            f"{examples.path}: {found}, but they are needed to {needed_to}; find some with "
            "passage_retrieval.py, or rename the field that holds them"
        )
    return f"questions alone: {found}"


def in_order(task: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`task(item)` for each item, in order; with several workers in processes, a few items ahead.
    They are forked, so they import nothing, and have the task's files open already."""
    if workers <= 1:
        yield from map(task, items)
        return
    waiting: deque = deque()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _start_worker, (task,)) as pool:
        for item in items:
            waiting.append(pool.submit(_run_task, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start_worker(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    ignore_signals()


def _run_task(item: Any) -> Any:
    return _task(item)


def ignore_signals(worker: int = 0) -> None:
    """In a worker process: SLURM signals every process of a job, and a terminal's Ctrl-C reaches
    all of them too; how to respond is up to the process that waits for them. (A worker that SIGTERM
    ended would end a training with an error.)"""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def available_cpus() -> int:
    """How many CPUs this process may use, as far as the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
