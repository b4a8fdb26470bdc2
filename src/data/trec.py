"""TREC's files: runs (what a system found) and qrels (which passages are relevant)."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from src.data.files import read_text
from src.runtime.errors import InputError, shorten

Run = dict[str, dict[str, float]]  # scores by passage id, by question id; in the file's order


def read_run(path: str | Path) -> Run:
    """A TREC run: lines `question Q0 passage rank score name`; the rank is not used, as in
    trec_eval. Errors: `InputError` for another line, or a passage that a question has twice."""
    run: Run = {}

    def add(fields: list[str]) -> None:
        question, _, passage, _, score, _ = fields
        if passage in run.setdefault(question, {}) or not math.isfinite(float(score)):
            raise ValueError
        run[question][passage] = float(score)

    shape = "question Q0 passage rank score name, with a passage only once for a question"
    _read_lines(path, add, f"a line of a run must be {shape}")
    return run


def run_lines(question: str, found: Iterable[tuple[str, float]], name: str) -> Iterator[str]:
    """The lines of a run for a question, by the ids and scores of its passages, best first."""
    for rank, (passage, score) in enumerate(found, start=1):
        yield f"{question} Q0 {passage} {rank} {score!r} {name}\n"


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance by passage id, by question id, from TREC's lines (question, 0, passage, relevance)
    or BEIR's TSV (question, passage, relevance, below a header). Errors: `InputError`."""
    qrels: dict[str, dict[str, int]] = {}

    def add(fields: list[str]) -> None:
        if fields != ["query-id", "corpus-id", "score"]:
            three = fields if len(fields) == 3 else [fields[0], *fields[2:]]
            question, passage, relevance = three
            qrels.setdefault(question, {})[passage] = int(relevance)

    shape = "question 0 passage relevance, or (BEIR) question, passage, relevance"
    _read_lines(path, add, f"a line of qrels must be {shape}")
    return qrels


def _read_lines(path: str | Path, add: Callable[[list[str]], None], rule: str) -> None:
    """Give the fields of each line to `add`, which raises ValueError for those it cannot read."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            if line.strip():
                add(line.split())
        except ValueError:
            problem = f"{rule}, not {shorten(line.strip())}"
            raise InputError(f"{path}, line {number}: {problem}; correct it") from None
