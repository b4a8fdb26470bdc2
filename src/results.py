"""The files that testing and retrieval write.

In testing, each process appends the answers of its batches to a part of its own; batches were dealt
out in turn, so reading the parts in turn gives the input's order with nothing held in memory.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import InputError
from src.evaluation import has_answer, recall_at_k
from src.examples import Examples, json_list, parse_example, read_example, write_whole
from src.passages import Passages
from src.reader import Answer

ANSWERS, SCORES = "final_output.txt", "dataset_wscores.json"


def check_results(folder: Path) -> None:
    """Errors: `InputError`, before hours of work, where a result's place is taken by a folder."""
    for path in (folder / ANSWERS, folder / SCORES):
        if path.is_dir():
            raise InputError(f"{path}: a folder is in this place; remove it, or use another --name")


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers.part-{rank}.jsonl"


class AnswerFile:
    """One process's part: a line that says what made it, then a line a batch, each a list of
    [index, answer, scores].

    A part that the same command left unfinished is gone on with; `finished` holds its answers by
    the batch. Any other is begun anew.

    Args:
        made_by: all that the answers depend on, as JSON values.
    """

    def __init__(self, folder: Path, rank: int, made_by: dict[str, Any]):
        self.path = _part(folder, rank)
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
        try:
            self._file.write(json.dumps(rows) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); make room, and the same "
                "command goes on after the last finished batch"
            ) from error

    def __exit__(self, *exception: object) -> None:
        self._file.close()


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
    """Write `final_output.txt`: a line `id<TAB>answer` an example. Returns its path."""

    def lines() -> Iterator[str]:
        for answer in read_parts(folder, world_size):
            identity = data[answer.index].get("id")
            identity = answer.index if identity is None else identity
            yield f"{identity}\t{' '.join(answer.text.split())}\n"

    return write_whole(folder / ANSWERS, lines())


def write_scores(folder: Path, data: Examples, world_size: int, n_context: int) -> Path:
    """Write `dataset_wscores.json`: the data with the reader's score on each passage it read.

    The passages stand in reading order; those beyond `n_context` follow without a score, because
    the score that they came with is of another kind. Returns the file's path.
    """

    answers = read_parts(folder, world_size)
    examples = (scored_example(data[answer.index], answer, n_context) for answer in answers)
    return write_whole(folder / SCORES, json_list(examples))


def scored_example(raw: dict[str, Any], answer: Answer, n_context: int) -> dict[str, Any]:
    """The example with its passages in reading order and the answer's scores on the first ones."""
    passages = parse_example(raw, answer.index, "").passages
    contexts = []
    for number, passage in enumerate(passages):
        context = dict(raw["ctxs"][passage.place])
        context.pop("score", None)
        if number < n_context:
            context["score"] = answer.scores[number]
        contexts.append(context)
    return {**raw, "ctxs": contexts} if contexts else raw


def write_retrieved(
    path: Path,
    data: Examples,
    passages: Passages,
    places: list[list[int]],
    scores: np.ndarray,
    workers: int,
) -> list[list[bool]]:
    """Write questions with the passages found for them, in the reader's input format.

    Args:
        path: `.jsonl` gives a line an example, any other name a JSON list.
        places, scores: of each question's passages in the collection, best first.
        workers: how many processes may look for the answers.

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
            if has_answers:
                flags.append(holds)
            contexts = []
            for place, score, hold in zip(places[index], scores[index], holds, strict=False):
                identity, title, text = passages[place]
                context = {"id": identity, "title": title, "text": text, "score": float(score)}
                contexts.append(context | ({"hasanswer": hold} if has_answers else {}))
            yield opening + json.dumps({**data[index], "ctxs": contexts})
            opening = "\n" if as_lines else ",\n"
        yield "\n" if as_lines else "\n]\n"

    write_whole(path, pieces())
    return flags


def _match(task: tuple[list[str], list[str]]) -> tuple[bool, list[bool]]:
    answers, texts = task
    return bool(answers), [bool(answers) and has_answer(answers, text) for text in texts]


def _find_answers(
    tasks: Iterator[tuple[list[str], list[str]]], n_tasks: int, n_pairs: int, workers: int
) -> Iterator[tuple[bool, list[bool]]]:
    """Whether there are answers, and which texts hold one, for each (answers, texts) in turn."""
    # A process takes a moment to start: not for a few passages.
    workers = min(workers, os.cpu_count() or 1, n_pairs // 50_000)
    if workers <= 1:
        yield from map(_match, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_match, tasks, chunksize=max(1, min(64, n_tasks // (4 * workers))))


def write_recall(path: Path, flags: list[list[bool]], n_docs: int) -> dict[str, float]:
    """Write the recall at 1, 5, 20 and 100 beside the retrieved data; {} when there are no answers.

    Returns: the values by name, in [0, 1].
    """
    recalls = {
        f"recall@{k}": recall_at_k(flags, k) for k in (1, 5, 20, 100) if flags and k <= n_docs
    }
    if recalls:
        record = json.dumps({**recalls, "questions": len(flags)}, indent=1) + "\n"
        write_whole(path.with_name(f"{path.name}.recall.json"), [record])
    return recalls
