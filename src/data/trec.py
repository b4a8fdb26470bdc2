"""TREC's files: runs (what a system found) and qrels (which passages are relevant)."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from src.data.files import read_text
from src.runtime.errors import InputError, shorten

Run = dict[str, dict[str, float]]  # scores by passage id, by question id; in the file's order


def read_run(path: str | Path) -> Run:
    """A TREC run: lines `question Q0 passage rank score name`; the rank is not used, as in
    trec_eval. Errors: `InputError` for another line, or a passage that a question has twice."""
    run: Run = {}
    for number, line in _lines(path):
        try:
            question, _, passage, _, score, _ = line.split()
            value = float(score)
        except ValueError:
            shape = "question Q0 passage rank score name"
            raise _error(
                path, number, f"a line of a run must be {shape}, not {shorten(line)}"
            ) from None
        scores = run.setdefault(question, {})
        if passage in scores or not np.isfinite(value):
            problem = "is found twice" if passage in scores else f"has the score {score}"
            raise _error(path, number, f"passage {passage} {problem} for question {question}")
        scores[passage] = value
    if not run:
        raise InputError(f"{path}: the run is empty; give one with some lines")
    return run


def run_lines(question: str, found: Iterable[tuple[str, float]], name: str) -> Iterator[str]:
    """The lines of a run for a question, by the ids and scores of its passages, best first."""
    for rank, (passage, score) in enumerate(found, start=1):
        yield f"{question} Q0 {passage} {rank} {score!r} {name}\n"


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance by passage id, by question id, from TREC's lines (question, 0, passage, relevance)
    or BEIR's TSV (question, passage, relevance, below a header). Errors: `InputError`."""
    qrels: dict[str, dict[str, int]] = {}
    for number, line in _lines(path):
        fields = line.split()
        if number == 1 and fields[-1] == "score":
            continue
        try:
            question, passage, relevance = fields if len(fields) == 3 else _without_second(fields)
            qrels.setdefault(question, {})[passage] = int(relevance)
        except ValueError:
            shape = "question 0 passage relevance, or (BEIR) question, passage, relevance"
            raise _error(
                path, number, f"a line of qrels must be {shape}, not {shorten(line)}"
            ) from None
    if not qrels:
        raise InputError(f"{path}: no passage is judged in this file; give qrels with some")
    return qrels


def _without_second(fields: list[str]) -> list[str]:
    question, _, passage, relevance = fields
    return [question, passage, relevance]


def _error(path: str | Path, number: int, problem: str) -> InputError:
    return InputError(f"{path}, line {number}: {problem}; correct it")


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1; of a file gzipped or not."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()
