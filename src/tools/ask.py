"""A conversation with a reader: questions as they come, answers, and the passages behind these.

    python -m src.tools.ask --model_path READER --n_context 10 --passages psgs_w100.tsv \\
        --retriever_path RETRIEVER --passages_embeddings "wikipedia_embeddings/wiki_*" --interactive

The same as `test_reader.py` with these options. Keeps no results. `--serve` instead of
`--interactive` serves a web page (serve.py); `replies.py` shows replies on a terminal.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from src.options import (
    GenerationOptions,
    TargetOptions,
    conversation_search,
    select,
    test_reader_parser,
)
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(test_reader_parser().parse_args)()  # answers --help at once

import torch
from transformers import PreTrainedTokenizerBase

from src.data.batches import ReaderCollator, ReaderItem, reader_texts
from src.data.examples import Example
from src.data.passages import Passage, Passages
from src.models.answering import answer_questions
from src.models.reader import FiDT5, open_reader
from src.runtime.device import describe, pick_device, resolve_precision
from src.runtime.launch import detect_launch
from src.runtime.terminal import count, duration, say
from src.search.retrieve import open_search
from src.tools.replies import Evidence, Reply, clean, print_replies
from src.tools.serve import serve
from src.training.metrics import passing_bar, start_log

Find = Callable[[str], list[Passage]]  # the passages found for a question, best first


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

    def talk(questions: Iterable[str]) -> Iterator[Reply]:
        return converse(questions, find, reader, tokenizer, device, precision, options)

    if options.serve:
        serve(talk, options.host, options.port, log)
        return
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    is_typed = options.question is None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_typed:
        say(log, "ready", "type a question; Ctrl-D leaves")
    asked = [options.question.strip()] if options.question is not None else _piped()
    n_replies = print_replies(talk(_typed() if is_typed else asked))
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
    scored = {"with_scores": True, "targets": TargetOptions(attribution=True)}
    for (answer,) in answer_questions(reader, tokenizer, batches(), *how, **scored):
        # (Without passages, the question alone has scores.)
        scores = zip(passages, answer.scores, answer.targets["attribution"], strict=False)
        read = [
            Evidence(p.title, p.text, score, attribution, p.score, p.position + 1)
            for p, score, attribution in scores
        ]
        read.sort(key=lambda evidence: -evidence.score)
        yield Reply(answer.text, read, answer.log_probability)


if __name__ == "__main__":
    reports_input_errors(lambda: main(test_reader_parser().parse_args()))()
