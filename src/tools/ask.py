"""A conversation with a reader: questions as they come, answers, and the passages behind these.

    python -m src.tools.ask --model_path READER --n_context 10 --passages psgs_w100.tsv \\
        --retriever_path RETRIEVER --passages_embeddings "wikipedia_embeddings/wiki_*" --interactive

The same as `test_reader.py` with these options. Keeps no results.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from src.options import GenerationOptions, conversation_search, select, test_reader_parser
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(test_reader_parser().parse_args)()  # answers --help at once

import torch
from transformers import PreTrainedTokenizerBase

from src.data.batches import ReaderCollator, ReaderItem, reader_texts
from src.data.examples import Example
from src.data.passages import Passage, Passages
from src.evaluation.answers import answer_spans
from src.models.answering import answer_questions
from src.models.reader import FiDT5, open_reader
from src.runtime.device import describe, pick_device, resolve_precision
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, say
from src.search.retrieve import open_search
from src.training.metrics import passing_bar, start_log

Find = Callable[[str], list[Passage]]  # the passages found for a question, best first

_SHOWN, _LINES = 5, 3  # passages that are shown of a reply, and lines of each
_LONGEST = 5000  # characters of a passage that are searched for the answer
_ON, _OFF = "\x02", "\x03"  # around an answer to mark; `clean` removes these characters from texts


def main(options: argparse.Namespace) -> None:
    """Answer questions until there are no more, by the options of test_reader.py."""
    started = time.perf_counter()
    launch = detect_launch(os.environ, options.local_rank)
    device = pick_device(launch.local_rank)
    precision = resolve_precision(options.precision, device)
    if launch.world_size > 1:
        raise InputError("a conversation has one process: start it without torchrun or srun")
    log = start_log(None)
    say(log, "ask", "a Fusion-in-Decoder reader, with passages found as you ask")
    say(log, "device", "%s; %s", describe(device), precision)
    passages = Passages(options.passages, passing_bar)
    n, each = count(len(passages), "passage"), count(options.n_context, "passage")
    say(log, "passages", "%s of %s, %s for each question", n, options.passages, each)
    search = open_search(conversation_search(options), passages, device, log)
    reader, tokenizer = open_reader(options, device, log)

    def find(question: str) -> list[Passage]:
        found = search.search([question], options.n_context)
        return [
            passages[position]._replace(score=float(found.scores[0, rank]), position=rank)
            for rank, position in enumerate(found.rows()[0])
        ]

    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    is_typed = options.question is None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_typed:
        say(log, "ready", "type a question; Ctrl-D leaves")
    asked = [options.question.strip()] if options.question is not None else _piped()
    replies = converse(
        _typed() if is_typed else asked, find, reader, tokenizer, device, precision, options
    )
    n_replies = print_replies(replies)
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s", count(n_replies, "question"), took)


# ----------------------------------------------------------------------------------------------
# Questions


def _typed() -> Iterator[str]:
    """Questions typed at a prompt, until Ctrl-D. Ctrl-C drops the line, as in a shell; the arrow
    keys bring back earlier questions, also of earlier conversations."""
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
    sys.stdin.reconfigure(errors="replace")  # invalid text must not end a conversation
    for line in sys.stdin:
        if question := line.strip():
            print(f"question: {clean(question)}", flush=True)
            yield question


def _open_history() -> Callable[[str], None]:
    """Give `input` a history. Returns a function that adds a question to it and, if possible, to
    its file at once: a conversation can end at any moment."""
    try:
        import readline  # not in every Python; and it looks at the terminal when it is imported
    except ImportError:
        return lambda question: None
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    file = state / "fusion-in-decoder" / "questions"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        readline.read_history_file(file)
    readline.set_history_length(1000)
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
    """A passage that was read: its scores by reader and search, and its rank there, from 1."""

    title: str
    text: str
    score: float
    search_score: float
    search_rank: int


class Reply(NamedTuple):
    """An answer, and the passages that were read for it, by the reader's score, highest first."""

    answer: str
    passages: list[Evidence]


def converse(
    questions: Iterable[str],
    find: Find,
    reader: FiDT5,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    precision: str,
    options: argparse.Namespace,
) -> Iterator[Reply]:
    """Find passages for each question, and read them like those in a data file."""
    collate = ReaderCollator(tokenizer, options.text_maxlength)
    passages: list[Passage] = []  # of the question that is being read

    def batches() -> Iterator[dict[str, Any]]:
        for question in questions:
            question = question.encode(errors="replace").decode()  # no unpaired surrogates
            passages[:] = find(question)
            example = Example(0, "0", question, None, [], passages)
            texts = reader_texts(example, options.n_context, not options.no_title)
            yield collate([ReaderItem(0, texts, None)])

    how = device, precision, select(GenerationOptions, options)
    for (answer,) in answer_questions(reader, tokenizer, batches(), *how, with_scores=True):
        scores = answer.scores[: len(passages)]  # without passages, the question alone has one
        read = [
            Evidence(passage.title, passage.text, score, passage.score, passage.position + 1)
            for passage, score in zip(passages, scores, strict=True)
        ]
        yield Reply(answer.text, sorted(read, key=lambda evidence: -evidence.score))


def print_replies(replies: Iterable[Reply]) -> int:
    """Show each reply when it comes, fitted to the terminal; returns how many there were."""
    bold = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    n_replies = 0
    for reply in replies:
        n_replies += 1
        width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
        print(f"\n{show(reply, width, bold)}\n", flush=True)
    return n_replies


def show(reply: Reply, width: int, bold: bool) -> str:
    """A reply as text for a terminal of `width` cells: the answer, then the first passages, each
    with its scores and the lines around the answer, which is printed in bold if `bold`."""
    lines = wrap(f"{_ON}{clean(reply.answer) or '(no answer)'}{_OFF}", width) + [""]
    shown = reply.passages[:_SHOWN]
    scores = _align([f"{evidence.score:.2f}" for evidence in shown], str.rjust)
    found = [f"{evidence.search_score:.2f} (#{evidence.search_rank})" for evidence in shown]
    rows = zip(shown, scores, _align(found, str.ljust), strict=True)
    for rank, (evidence, score, hit) in enumerate(rows, start=1):
        head = f"{rank}  reader {score} | search {hit}"
        title = wrap(clean(evidence.title), max(12, width - len(head) - 7))
        if title:
            head += f" | {title[0]}{' ...' if len(title) > 1 else ''}"
        lines += [head.rstrip()]
        lines += [f"   {line}" for line in _excerpt(evidence.text, reply.answer, width - 3)]
    if len(reply.passages) > _SHOWN:
        lines += [f"and {len(reply.passages) - _SHOWN} more"]
    text = "\n".join(lines)
    return text.replace(_ON, "\x1b[1m" if bold else "").replace(_OFF, "\x1b[22m" if bold else "")


def _align(texts: list[str], adjust: Callable[[str, int], str]) -> list[str]:
    return [adjust(text, max(map(len, texts))) for text in texts]


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
    """The text's width in a terminal: marks have none, the wide letters of East Asia two cells."""
    return sum(
        0
        if unicodedata.category(c) in ("Cc", "Mn", "Me")
        else 1 + (unicodedata.east_asian_width(c) in ("W", "F"))
        for c in text
    )


def _excerpt(text: str, answer: str, width: int) -> list[str]:
    """The lines of a passage around the first occurrence of the answer, or else its beginning."""
    text = clean(text[:_LONGEST])
    pieces, end = [], 0
    for start, stop in answer_spans([answer], text):
        pieces += [text[end:start], _ON, text[start:stop], _OFF]
        end = stop
    lines = wrap("".join([*pieces, text[end:]]), width - 4)  # with room for the dots
    marked = next((number for number, line in enumerate(lines) if _ON in line), 0)
    first = max(0, min(marked - 1, len(lines) - _LINES))
    excerpt = lines[first : first + _LINES]
    if first > 0:
        excerpt[0] = f"... {excerpt[0]}"
    if first + _LINES < len(lines):
        excerpt[-1] += f"{_OFF} ..."
    return excerpt


if __name__ == "__main__":
    reports_input_errors(lambda: main(test_reader_parser().parse_args()))()
