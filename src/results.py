"""The files that test_reader.py writes, joined from the parts that its processes stream out.

Each process appends the answers of its batches to a part of its own; batches were dealt out in
turn, so reading the parts in turn gives the input's order without holding anything in memory.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.errors import InputError
from src.examples import Examples, parse_example
from src.reader import Answer


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers.part-{rank}.jsonl"


class AnswerFile:
    """One process's part: a line a batch, each a list of [index, answer, scores]."""

    def __init__(self, folder: Path, rank: int):
        self.path = _part(folder, rank)

    def __enter__(self) -> "AnswerFile":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w")
        return self

    def write(self, answers: list[Answer]) -> None:
        rows = [[answer.index, answer.text, answer.scores] for answer in answers]
        self._file.write(json.dumps(rows) + "\n")

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_parts(folder: Path, world_size: int) -> Iterator[Answer]:
    """All processes' answers in the input's order."""
    files = [open(_part(folder, rank)) for rank in range(world_size)]  # noqa: SIM115
    try:
        turn = 0
        while line := files[turn % world_size].readline():
            for index, text, scores in json.loads(line):
                yield Answer(index, text, scores)
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

    return _write_whole(folder / "final_output.txt", lines())


def write_scores(folder: Path, data: Examples, world_size: int, n_context: int) -> Path:
    """Write `dataset_wscores.json`: the data with the reader's score on each passage it read.

    The passages stand in reading order; those beyond `n_context` follow without a score, because
    the score that they came with is of another kind. Returns the file's path.
    """

    def pieces() -> Iterator[str]:
        opening = "[\n"
        for answer in read_parts(folder, world_size):
            example = scored_example(data[answer.index], answer, n_context)
            yield opening + json.dumps(example)
            opening = ",\n"
        yield "\n]\n"

    return _write_whole(folder / "dataset_wscores.json", pieces())


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


def _write_whole(path: Path, pieces: Iterator[str]) -> Path:
    """Write a file beside its place and rename it: complete or absent."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    partial.replace(path)
    return path
