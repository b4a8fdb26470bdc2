"""The files that testing and retrieval write.

In testing, each process appends the answers of its batches to a part of its own; batches were dealt
out in turn, so reading the parts in turn gives the input's order with nothing held in memory.
"""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.data.examples import Examples, parse_example, read_example
from src.data.json_files import json_list
from src.data.outputs import require_regular, write_whole, writing
from src.data.passages import Passages
from src.evaluation.answers import ANSWERS, SCORES, find_answers, judge
from src.evaluation.rankings import recall_at_k
from src.models.reader import Answer
from src.runtime.errors import InputError, shorten
from src.training.metrics import Average

OnExamples = Callable[[int], object]
MADE_BY, RECALL = ".made_by.json", ".recall.json"  # behind the name of the file that they are about


def _silently(n_more: int) -> None:
    pass


def check_results(folder: Path) -> None:
    """Errors: `InputError`, before hours of work, where a result would replace no regular file."""
    for path in (folder / ANSWERS, folder / SCORES, _beside(folder / SCORES, MADE_BY)):
        with writing(path, "remove it, or use another --name"):
            require_regular(path)


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers.part-{rank}.jsonl"


class AnswerFile:
    """One process's part: a line that says what made it, then a line a batch, each a list of
    [index, answer, scores].

    A part that the same command left unfinished is continued; `finished` holds its answers, batch
    by batch. Any other is replaced.

    Args:
        made_by: all that the answers depend on, as JSON values.
    """

    def __init__(self, folder: Path, rank: int, made_by: dict[str, Any]):
        self.path = _part(folder, rank)
        with writing(self.path, "remove it"):
            require_regular(self.path)
        self.finished: list[list[Answer]] = []
        header = json.dumps({"made_by": made_by}) + "\n"
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # the last may have been cut off
        if kept and kept[0] == header:
            self.finished = [_read_batch(line) for line in kept[1:]]
        else:
            kept = [header]
        write_whole(self.path, kept)

    def __enter__(self) -> "AnswerFile":
        self._file = open(self.path, "a")
        return self

    def write(self, answers: list[Answer]) -> None:
        rows = [[answer.index, answer.text, answer.scores] for answer in answers]
        with writing(self.path, "make room, and the same command resumes after the last batch"):
            self._file.write(json.dumps(rows) + "\n")
            self._file.flush()

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class Tally:
    """Mean exact match and F1, in percent, of answers to a file's questions."""

    def __init__(self, data: Examples):
        self._data = data
        self.exact_match, self.f1 = Average(), Average()

    def add(self, answers: list[Answer]) -> None:
        for answer in answers:
            if gold := read_example(self._data, answer.index).answers:
                match, overlap = judge(answer.text, gold)
                self.exact_match.add(100.0 * match)
                self.f1.add(100.0 * overlap)

    def over_all(self) -> "Tally":
        """The tally over what every process added."""
        joint = Tally(self._data)
        joint.exact_match, joint.f1 = self.exact_match.over_all(), self.f1.over_all()
        return joint

    def __str__(self) -> str:
        n = round(self.exact_match.weight)
        if not n:
            return "the data has no answers to judge by"
        return (
            f"exact match {self.exact_match.value():.2f}, F1 {self.f1.value():.2f} on {n} examples"
        )


def remove_parts(folder: Path) -> None:
    """Remove what the processes, of this run or of one with more of them, kept of their answers."""
    for path in folder.glob(_part(folder, 0).name.replace("0", "*")):
        path.unlink()


def _read_batch(line: str) -> list[Answer]:
    return [Answer(index, text, scores) for index, text, scores in json.loads(line)]


def read_parts(folder: Path, world_size: int) -> Iterator[Answer]:
    """All processes' answers in the input's order."""
    files = [open(_part(folder, rank)) for rank in range(world_size)]  # noqa: SIM115
    try:
        for file in files:
            file.readline()  # what made it
        turn = 0
        while line := files[turn % world_size].readline():
            yield from _read_batch(line)
            turn += 1
    finally:
        for file in files:
            file.close()


def write_answers(folder: Path, data: Examples, world_size: int) -> Path:
    """Write `final_output.txt`: a line `id<TAB>answer` an example, with single spaces for any other
    white space in either. Returns its path."""

    def lines() -> Iterator[str]:
        for answer in read_parts(folder, world_size):
            identity = data[answer.index].get("id")
            identity = answer.index if identity is None else identity
            yield f"{' '.join(str(identity).split())}\t{' '.join(answer.text.split())}\n"

    return write_whole(folder / ANSWERS, lines())


def write_scores(
    folder: Path,
    data: Examples,
    world_size: int,
    n_context: int,
    made_by: dict[str, Any],
    on_examples: OnExamples = _silently,
) -> Path:
    """Write `dataset_wscores.json`: the data with the reader's score on each passage it read; and
    beside it what made it.

    The passages stand in reading order; those beyond `n_context` follow without a score, because
    the score that they came with is of another kind. Returns the file's path.

    Args: on_examples: is told how many more are written.
    """

    def examples() -> Iterator[dict[str, Any]]:
        for answer in read_parts(folder, world_size):
            yield scored_example(data[answer.index], answer, n_context)
            on_examples(1)

    _beside(folder / SCORES, MADE_BY).unlink(missing_ok=True)
    path = write_whole(folder / SCORES, json_list(examples()))
    write_made_by(path, made_by)
    return path


def scored_example(raw: dict[str, Any], answer: Answer, n_context: int) -> dict[str, Any]:
    """The example with its passages in reading order and the answer's scores on the first ones."""
    passages = parse_example(raw, answer.index, "").passages
    contexts = []
    for number, passage in enumerate(passages):
        context = dict(raw["ctxs"][passage.position])
        context.pop("score", None)
        if number < n_context:
            context["score"] = answer.scores[number]
        contexts.append(context)
    return {**raw, "ctxs": contexts} if contexts else raw


def check_trec_ids(data: Examples, passages: Passages) -> None:
    """Errors: `InputError`, before hours of work, for ids that a TREC run cannot hold: its columns
    are told apart by white space, and its questions by their ids."""
    cure = "change it, or say --output_format json"
    seen = set()
    for index in range(len(data)):
        identity = read_example(data, index).id
        if len(identity.split()) != 1 or identity in seen:
            problem = "is another's too" if identity in seen else "is empty or has white space"
            raise InputError(f"{data.where(index)}: its id {shorten(identity)} {problem}; {cure}")
        seen.add(identity)
    for identity in passages.ids():
        if len(identity.split()) != 1:
            problem = f"the id {shorten(identity)} is empty or has white space"
            raise InputError(f"{passages.path}: {problem}; {cure}")


def write_retrieved(
    path: Path,
    data: Examples,
    passages: Passages,
    places: list[list[int]],
    scores: np.ndarray,
    workers: int,
    made_by: dict[str, Any],
    as_trec: bool = False,
    on_examples: OnExamples = _silently,
) -> list[list[bool]]:
    """Write questions with the passages found for them, in the reader's input format or as a TREC
    run, and beside them, in `.made_by.json`, what made them.

    Args:
        path: `.jsonl` gives a line an example, any other name a JSON list.
        places, scores: of each question's passages in the collection, best first.
        workers: how many processes may look for the answers.
        made_by: what made them, as JSON values; `model` is the last column of a TREC run.
        as_trec: write a TREC run.
        on_examples: is told how many more are written.

    Returns: for each question with answers, whether each of its passages holds one.
    """
    flags = []
    as_lines = path.suffix == ".jsonl"

    def task(index: int) -> tuple[list[str], list[str]]:
        answers = read_example(data, index).answers
        return answers, [passages[place].text for place in places[index]]

    def pieces() -> Iterator[str]:
        opening = "" if as_lines else "[\n"
        found = _find_answers(map(task, range(len(data))), len(data), scores.size, workers)
        for index, (has_answers, holds) in enumerate(found):
            on_examples(1)
            if has_answers:
                flags.append(holds)
            if as_trec:
                yield from trec_lines(index)
                continue
            contexts = []
            for place, score, hold in zip(places[index], scores[index], holds, strict=False):
                identity, title, text, *_ = passages[place]
                context = {"id": identity, "title": title, "text": text, "score": float(score)}
                contexts.append(context | ({"hasanswer": hold} if has_answers else {}))
            yield opening + json.dumps({**data[index], "ctxs": contexts})
            opening = "\n" if as_lines else ",\n"
        if not as_trec:
            yield "\n" if as_lines else "\n]\n"

    def trec_lines(index: int) -> Iterator[str]:
        question = read_example(data, index).id
        for rank, (place, score) in enumerate(
            zip(places[index], scores[index], strict=False), start=1
        ):
            yield f"{question} Q0 {passages[place].id} {rank} {float(score)!r} {made_by['model']}\n"

    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in (MADE_BY, RECALL):  # those of what stood here before
        _beside(path, kind).unlink(missing_ok=True)
    write_whole(path, pieces())
    write_made_by(path, made_by)
    return flags


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(path.name + kind)


def write_made_by(path: Path, made_by: dict[str, Any]) -> None:
    """Write what made a file beside it: readers of the file itself need not know."""
    write_whole(_beside(path, MADE_BY), [json.dumps(made_by, indent=1) + "\n"])


def _match(task: tuple[list[str], list[str]]) -> tuple[bool, list[bool]]:
    answers, texts = task
    return bool(answers), list(find_answers(answers, texts))


def _find_answers(
    tasks: Iterator[tuple[list[str], list[str]]], n_tasks: int, n_pairs: int, workers: int
) -> Iterator[tuple[bool, list[bool]]]:
    """Whether there are answers, and which texts hold one, for each (answers, texts) in turn."""
    # A process takes a moment to start: not for a few passages.
    workers = min(workers, os.cpu_count() or 1, n_pairs // 50_000)
    if workers <= 1:
        yield from map(_match, tasks)
        return
    # They inherit that SIGINT is blocked: Ctrl-C in a terminal is for this process to answer.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with pool:
        yield from pool.imap(_match, tasks, chunksize=max(1, min(64, n_tasks // (4 * workers))))
        pool.close()  # leaving the block would end them by SIGTERM, which they may have been
        pool.join()  # started to ignore


def write_recall(path: Path, flags: list[list[bool]], n_docs: int) -> dict[str, float]:
    """Write the recall at 1, 5, 20 and 100 beside the retrieved data; {} when there are no answers.

    Returns: the values by name, in [0, 1].
    """
    ks = [k for k in (1, 5, 20, 100) if flags and k <= n_docs]
    recalls = {f"recall@{k}": recall_at_k(flags, k) for k in ks}
    if recalls:
        record = json.dumps({**recalls, "questions": len(flags)}, indent=1) + "\n"
        write_whole(_beside(path, RECALL), [record])
    return recalls
