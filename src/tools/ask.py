"""A conversation with a reader: questions as they come, answers, and the passages behind these.

`open_find` gives the search, `questions` what is asked, `converse` the replies, and `print_replies`
what a person sees of them.
"""

import contextlib
import logging
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from src.data.batches import ReaderCollator, ReaderItem, reader_texts
from src.data.examples import Example
from src.data.passages import Passage, Passages
from src.evaluation.answers import answer_spans
from src.models.reader import FiDT5, answer_questions
from src.options import SearchOptions
from src.runtime.terminal import say
from src.search.retrieve import open_search

Find = Callable[[str, int], list[Passage]]  # the k passages found for a question, best first

_SHOWN, _LINES = 5, 3  # passages that are shown of a reply, and lines of each
_LONGEST = 5000  # characters of a passage's text in which the answer is looked for
_ON, _OFF = "\x02", "\x03"  # around what is marked: texts that are shown have no such characters
_KEPT = 1000  # questions in the history


# ----------------------------------------------------------------------------------------------
# Search


def open_find(
    options: SearchOptions, passages: Passages, device: torch.device, log: logging.Logger
) -> Find:
    """The search that the options ask for, for one question at a time."""
    search = open_search(options, passages, device, log)

    def find(question: str, k: int) -> list[Passage]:
        found = search.search([question], k)
        rows = [passages[position] for position in found.rows()[0]]
        scores = found.scores[0, : len(rows)].tolist()
        return [
            row._replace(score=score, position=rank)
            for rank, (row, score) in enumerate(zip(rows, scores, strict=True))
        ]

    return find


# ----------------------------------------------------------------------------------------------
# Questions


def questions(given: str | None, log: logging.Logger) -> Iterator[str]:
    """The one question that was given; without one, what a person types, or what a pipe or a file
    has in standard input, a question a line."""
    if given is not None:
        yield given.strip()
        return
    sys.stdin.reconfigure(errors="replace")  # bytes that are no text shall not end a conversation
    if sys.stdin.isatty() and sys.stdout.isatty():
        say(log, "ready", "type a question; Ctrl-D leaves")
        yield from _typed()
    else:
        yield from _piped()


def _typed() -> Iterator[str]:
    """Questions typed at a prompt, until Ctrl-D. Ctrl-C drops the line, as in a shell; the arrow
    keys bring back what was asked before, also on other days."""
    remember = _open_history()
    while True:
        try:
            question = input("question: ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question:
            remember(question)
            yield question


def _piped() -> Iterator[str]:
    """Questions one a line, each printed as if it had been typed."""
    for line in sys.stdin:
        if question := line.strip():
            print(f"question: {clean(question)}", flush=True)
            yield question


def _open_history() -> Callable[[str], None]:
    """Let `input` have a history, and give what adds a question to it, and at once to the file that
    keeps it: a conversation can end at any moment. Where none can be kept, it does without."""
    try:
        import readline  # not in every Python; and it looks at the terminal when it is imported
    except ImportError:
        return lambda question: None
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    file = state / "fusion-in-decoder" / "questions"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(file)
    readline.set_history_length(_KEPT)
    readline.set_auto_history(False)  # which has empty lines, too

    def remember(question: str) -> None:
        if question != readline.get_history_item(readline.get_current_history_length()):
            readline.add_history(question)
        with contextlib.suppress(OSError):
            readline.write_history_file(file)

    return remember


# ----------------------------------------------------------------------------------------------
# Replies


class Evidence(NamedTuple):
    """A passage that was read: its score by the reader, by the search, and its place there, from
    1."""

    title: str
    text: str
    score: float
    search_score: float
    search_place: int


class Reply(NamedTuple):
    """An answer, and the passages that it comes from: by the reader's score, highest first."""

    answer: str
    passages: list[Evidence]


def converse(
    questions: Iterable[str],
    find: Find,
    reader: FiDT5,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    precision: str,
    n_context: int,
    text_maxlength: int,
    use_title: bool,
    max_length: int,
    num_beams: int,
    decoder: str = "fast",
) -> Iterator[Reply]:
    """Find passages for each question, and read them as those in a data file are read.

    Args: `n_context` passages are found; the others are as in `test_reader.py`.
    """
    collate = ReaderCollator(tokenizer, text_maxlength)
    passages: list[Passage] = []  # of the question that is being read

    def batches() -> Iterator[dict[str, Any]]:
        for question in questions:
            question = question.encode(errors="replace").decode()  # no half characters
            passages[:] = find(question, n_context)
            example = Example(0, "0", question, None, [], passages)
            yield collate([ReaderItem(0, reader_texts(example, n_context, use_title), None)])

    for (answer,) in answer_questions(
        reader, tokenizer, batches(), device, precision, max_length, num_beams, True, decoder
    ):
        scores = answer.scores[: len(passages)]  # with no passage, the question alone has one
        read = [
            Evidence(passage.title, passage.text, score, passage.score, passage.position + 1)
            for passage, score in zip(passages, scores, strict=True)
        ]
        yield Reply(answer.text, sorted(read, key=lambda evidence: -evidence.score))


# ----------------------------------------------------------------------------------------------
# What is shown


def print_replies(replies: Iterable[Reply]) -> int:
    """Show each reply when it comes, fitted to the terminal; returns how many there were."""
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    bold = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    n_replies = 0
    for reply in replies:
        width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
        print(f"\n{show(reply, width, bold)}\n", flush=True)
        n_replies += 1
    return n_replies


def show(reply: Reply, width: int, bold: bool) -> str:
    """A reply as text for a terminal: the answer, then the first passages, each with its scores
    and the lines around the answer, where it has one.

    Args:
        width: of the terminal, in cells.
        bold: mark answers by the terminal's bold letters; else they are not marked.
    """
    lines = wrap(f"{_ON}{clean(reply.answer) or '(no answer)'}{_OFF}", width) + [""]
    shown = reply.passages[:_SHOWN]
    scores = [f"{evidence.score:.2f}" for evidence in shown]
    found = [f"{evidence.search_score:.2f} (#{evidence.search_place})" for evidence in shown]
    for place, evidence in enumerate(shown):
        score = scores[place].rjust(max(map(len, scores)))
        head = f"{place + 1}  reader {score} | search {found[place].ljust(max(map(len, found)))}"
        title = wrap(clean(evidence.title), max(12, width - len(head) - 7))
        if title:
            head += f" | {title[0]}{' ...' if len(title) > 1 else ''}"
        lines += [head.rstrip()]
        lines += [f"   {line}" for line in _excerpt(evidence.text, reply.answer, width - 3)]
    if len(reply.passages) > _SHOWN:
        lines += [f"and {len(reply.passages) - _SHOWN} more"]
    text = "\n".join(lines)
    return text.replace(_ON, "\x1b[1m" if bold else "").replace(_OFF, "\x1b[22m" if bold else "")


def clean(text: str) -> str:
    """The text on one line, without control characters: these could do anything to a terminal."""
    kept = (c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(kept).split())


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells, broken at spaces, and inside a word that is longer."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _cells(lines[-1]) + 1 + _cells(word) > width:
            lines.append("")
        lines[-1] += " " if lines[-1] else ""
        for character in word:
            if _cells(lines[-1]) + _cells(character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


def _cells(text: str) -> int:
    """How many cells of a terminal the text takes: none for marks, two for the wide letters of
    East Asia."""
    return sum(
        0
        if unicodedata.category(c) in ("Cc", "Mn", "Me")
        else 1 + (unicodedata.east_asian_width(c) in ("W", "F"))
        for c in text
    )


def _excerpt(text: str, answer: str, width: int) -> list[str]:
    """The lines of a passage around the answer where it stands in it first; else its beginning."""
    text = clean(text[:_LONGEST])
    pieces, end = [], 0
    for start, stop in answer_spans([answer], text):
        pieces += [text[end:start], _ON, text[start:stop], _OFF]
        end = stop
    lines = wrap("".join([*pieces, text[end:]]), width - 4)  # with room for the dots
    marked = next((place for place, line in enumerate(lines) if _ON in line), 0)
    first = max(0, min(marked - 1, len(lines) - _LINES))
    excerpt = lines[first : first + _LINES]
    if first > 0:
        excerpt[0] = f"... {excerpt[0]}"
    if first + _LINES < len(lines):
        excerpt[-1] += f"{_OFF} ..."
    return excerpt
