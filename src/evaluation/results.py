"""The files that testing and retrieval write.

In testing, each process appends the answers of its batches to its own part. Batches are assigned to
processes in turn, so reading the parts in turn gives the input's order, with nothing in memory.
"""

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.examples import Examples, parse_example, read_example
from src.data.json_files import json_list
from src.data.outputs import require_regular, write_whole, writing
from src.data.passages import Passages
from src.evaluation.answers import ANSWERS, SCORES, Task, judge, match
from src.evaluation.rankings import recall_at_k
from src.models.reader import Answer
from src.runtime.errors import InputError, shorten
from src.training.metrics import Average

OnExamples = Callable[[int], object]  # called with the number of examples just written
MADE_BY, RECALL = ".made_by.json", ".recall.json"  # appended to the name of the file they describe


def check_results(folder: Path, *inputs: str) -> None:
    """Errors: `InputError`, before hours of work, if a result would replace anything but a file, or
    one of the inputs."""
    for path in (folder / ANSWERS, folder / SCORES, _beside(folder / SCORES, MADE_BY)):
        with writing(path, "remove it, or use another --name"):
            require_regular(path, inputs=inputs)


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers.part-{rank}.jsonl"


class AnswerFile:
    """One process's part: a line with what made it, then a line for each batch, a list of
    [index, answer, scores].

    A part that the same command left unfinished is continued, any other is replaced. `finished`
    holds its answers, batch by batch.

    Args: made_by: everything the answers depend on, as JSON values.
    """

    def __init__(self, folder: Path, rank: int, made_by: dict[str, Any]):
        self.path = _part(folder, rank)
        with writing(self.path, "remove it"):
            require_regular(self.path)
        self.finished: list[list[Answer]] = []
        header = json.dumps({"made_by": made_by}) + "\n"
        content = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        lines, kept = content.splitlines(keepends=True), [header]
        if lines and lines[0] == header:
            with contextlib.suppress(ValueError, TypeError, RecursionError):  # damaged from here on
                for line in lines[1:]:
                    self.finished.append(_read_batch(line))
                    kept.append(line)
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
    """Remove the parts of this run's processes, and of an earlier run with more of them."""
    for path in folder.glob(_part(folder, 0).name.replace("0", "*")):
        path.unlink()


def _read_batch(line: str) -> list[Answer]:
    """Errors: ValueError or TypeError for anything else, such as a line without its end."""
    if not line.endswith("\n"):
        raise ValueError("no end of the line")
    batch = [Answer(index, text, scores) for index, text, scores in json.loads(line)]
    if not all(type(one.index) is int and isinstance(one.text, str) for one in batch):
        raise ValueError("not answers")
    return batch


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
    """Write `final_output.txt`: a line `id<TAB>answer` for each example, any whitespace in either
    replaced by single spaces. Returns its path."""

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
    on_examples: OnExamples = lambda n: None,
) -> Path:
    """Write `dataset_wscores.json`, the data with the reader's score of each passage it read, and
    beside it what made it. Returns the file's path.

    Passages are in reading order; those beyond `n_context` follow without a score, because the
    score that they came with is of another kind.
    """

    def examples() -> Iterator[dict[str, Any]]:
        for answer in read_parts(folder, world_size):
            yield _scored_example(data[answer.index], answer, n_context)
            on_examples(1)

    _beside(folder / SCORES, MADE_BY).unlink(missing_ok=True)
    path = write_whole(folder / SCORES, json_list(examples()))
    _write_beside(path, MADE_BY, made_by)
    return path


def _scored_example(raw: dict[str, Any], answer: Answer, n_context: int) -> dict[str, Any]:
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
    are separated by whitespace, and its questions distinguished by their ids."""
    remedy = "change it, or say --output_format json"
    seen = set()
    for index in range(len(data)):
        identity = read_example(data, index).id
        if len(identity.split()) != 1 or identity in seen:
            problem = "is another's too" if identity in seen else "is empty or has white space"
            where = f"{data.where(index)}: its id {shorten(identity)}"
            raise InputError(f"{where} {problem}; {remedy}")
        seen.add(identity)
    for identity in passages.ids():
        if len(identity.split()) != 1:
            problem = f"the id {shorten(identity)} is empty or has white space"
            raise InputError(f"{passages.path}: {problem}; {remedy}")


def write_retrieved(
    path: Path,
    data: Examples,
    passages: Passages,
    positions: np.ndarray,
    scores: np.ndarray,
    workers: int,
    made_by: dict[str, Any],
    as_trec: bool = False,
    on_examples: OnExamples = lambda n: None,
) -> list[Sequence[bool]]:
    """Write questions with the passages found for them, and beside them what made them.

    Args:
        path: the data in the reader's format; `.jsonl` gives a line for each example, any other
            name a JSON list.
        positions, scores: [q, k], of each question's passages in the collection, best first; -1
            where there are fewer.
        workers: maximum number of processes that look for answers.
        made_by: as JSON values; `model` is the last column of a TREC run.
        as_trec: write a TREC run instead.

    Returns: for each question with gold answers, whether each of its passages contains one.
    """
    flags: list[Sequence[bool]] = []

    def found_for(index: int) -> Iterator[tuple[int, float]]:
        for row, score in zip(positions[index].tolist(), scores[index].tolist(), strict=True):
            if row >= 0:
                yield row, score

    def task(index: int) -> Task:
        answers = read_example(data, index).answers
        return answers, [passages[row].text for row, _ in found_for(index)]

    def found() -> Iterator[tuple[int, list[bool]]]:
        hits = _find_answers(map(task, range(len(data))), len(data), scores.size, workers)
        for index, (has_answers, contained) in enumerate(hits):
            if has_answers:
                flags.append(np.array(contained, bool))  # a list takes eight times as much memory
            yield index, contained if has_answers else []
            on_examples(1)

    def examples() -> Iterator[dict[str, Any]]:
        for index, contained in found():
            contexts = []
            for number, (row, score) in enumerate(found_for(index)):
                identity, title, text, *_ = passages[row]
                context = {"id": identity, "title": title, "text": text, "score": score}
                hit = {"hasanswer": contained[number]} if contained else {}
                contexts.append(context | hit)
            yield {**data[index], "ctxs": contexts}

    def trec_lines() -> Iterator[str]:
        for index, _ in found():
            question = read_example(data, index).id
            for rank, (row, score) in enumerate(found_for(index), start=1):
                columns = passages[row].id, rank, repr(score), made_by["model"]
                yield "{} Q0 {} {} {} {}\n".format(question, *columns)

    for kind in (MADE_BY, RECALL):  # of an earlier file
        _beside(path, kind).unlink(missing_ok=True)
    as_lines = (json.dumps(example) + "\n" for example in examples())
    as_json = as_lines if path.suffix == ".jsonl" else json_list(examples())
    write_whole(path, trec_lines() if as_trec else as_json)
    _write_beside(path, MADE_BY, made_by)
    return flags


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(path.name + kind)


def _write_beside(path: Path, kind: str, values: dict[str, Any]) -> None:
    write_whole(_beside(path, kind), [json.dumps(values, indent=1) + "\n"])


def _find_answers(
    tasks: Iterator[Task], n_tasks: int, n_pairs: int, workers: int
) -> Iterator[tuple[bool, list[bool]]]:
    """Whether there are answers, and which texts contain one, for each task in turn."""
    # Starting a process takes as long as matching a million passages.
    workers = min(workers, os.cpu_count() or 1, n_pairs // 1_000_000)
    if workers <= 1:
        yield from map(match, tasks)
        return
    # They inherit that SIGINT is blocked: this process answers Ctrl-C.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool = multiprocessing.get_context("spawn").Pool(workers)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with pool:
        yield from pool.imap(match, tasks, chunksize=max(1, min(64, n_tasks // (4 * workers))))
        pool.close()  # leaving the block would send SIGTERM, which the workers may ignore
        pool.join()


def write_recall(path: Path, flags: list[Sequence[bool]], n_docs: int) -> dict[str, float]:
    """Write recall at 1, 5, 20 and 100 beside the retrieved data; nothing without gold answers.

    Returns: the values by name, in [0, 1].
    """
    ks = [k for k in (1, 5, 20, 100) if flags and k <= n_docs]
    recalls = {f"recall@{k}": recall_at_k(flags, k) for k in ks}
    if recalls:
        _write_beside(path, RECALL, {**recalls, "questions": len(flags)})
    return recalls
