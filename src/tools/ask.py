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
from collections.abc import Callable, Iterator
from typing import Any

from src.options import (
    GenerationOptions,
    TargetOptions,
    ask_parser,
    conversation_search,
    select,
)
from src.runtime.errors import InputError, reports_input_errors

if __name__ == "__main__":
    reports_input_errors(ask_parser().parse_args)()  # answers --help at once

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
from src.tools.replies import Evidence, Reply, clean, print_reply
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

    answer = Conversation(find, reader, tokenizer, device, precision, options)
    if options.serve:
        serve(answer, options.host, options.port, log)
        return
    sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    is_typed = options.question is None and sys.stdin.isatty() and sys.stdout.isatty()
    if is_typed:
        say(log, "ready", "type a question; Ctrl-D leaves")
    asked = [options.question.strip()] if options.question is not None else _piped()
    n_asked = 0
    for question in _typed() if is_typed else asked:
        print_reply(answer(question))
        n_asked += 1
    took = duration(time.perf_counter() - started)
    say(log, "done", "%s in %s", count(n_asked, "question"), took)


def _typed() -> Iterator[str]:
    """Questions typed at a prompt, until Ctrl-D. Ctrl-C drops the line, as in a shell; the arrow
    keys bring back earlier questions."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (not in every Python; looks at the terminal when imported)
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
            yield question


def _piped() -> Iterator[str]:
    """Questions one a line, each printed as if it had been typed."""
    sys.stdin.reconfigure(errors="replace")  # invalid text must not end a conversation
    for line in sys.stdin:
        if question := line.strip():
            print(f"question: {clean(question)}", flush=True)
            yield question


class Conversation:
    """Answers questions: finds passages for each, and reads them like those in a data file."""

    def __init__(
        self,
        find: Find,
        reader: FiDT5,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        precision: str,
        options: argparse.Namespace,
    ):
        self._find, self._options = find, options
        self._collate = ReaderCollator(tokenizer, options.text_maxlength)
        self._passages: list[Passage] = []  # of the question that is being read
        how = device, precision, select(GenerationOptions, options)
        scores = {"with_scores": True, "targets": TargetOptions(attribution=True)}
        self._start = lambda: answer_questions(reader, tokenizer, self._batches(), *how, **scores)
        self._question, self._answers = "", self._start()

    def _batches(self) -> Iterator[dict[str, Any]]:
        while True:
            question = self._question.encode(errors="replace").decode()  # no unpaired surrogates
            self._passages = self._find(question)
            example = Example(0, "0", question, None, [], self._passages)
            n_context, with_title = self._options.n_context, not self._options.no_title
            texts = reader_texts(example, n_context, with_title)
            yield self._collate([ReaderItem(0, texts, None)])

    def __call__(self, question: str) -> Reply:
        """Errors: those of reading; the next question starts afresh."""
        answers, self._answers, self._question = self._answers, self._start(), question
        (answer,) = next(answers)
        self._answers = answers
        # (Without passages, the question alone has scores.)
        scores = zip(self._passages, answer.scores, answer.targets["attribution"], strict=False)
        read = [
            Evidence(p.title, p.text, score, attribution, p.score, p.position + 1)
            for p, score, attribution in scores
        ]
        return Reply(answer.text, sorted(read, key=lambda e: -e.score), answer.log_probability)


if __name__ == "__main__":
    reports_input_errors(lambda: main(ask_parser().parse_args()))()
