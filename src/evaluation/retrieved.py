"""The file that retrieval writes, and what is written beside it."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.examples import Examples, available_cpus, in_order, read_example
from src.data.json_files import json_list
from src.data.outputs import write_whole
from src.data.passages import Passages
from src.data.trec import run_lines
from src.evaluation.answers import find_answers
from src.evaluation.rankings import first_hit
from src.runtime.errors import InputError, shorten

MADE_BY, RECALL = ".made_by.json", ".recall.json"  # appended to the name of the file they describe
_PAIRS_WORTH_A_PROCESS = 100_000  # of a question and a passage; a process starts in 0.1 s
_PART = 16  # questions whose passages are searched at a time


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
    on_examples: Callable[[int], object] = lambda n: None,
) -> list[int]:
    """Write questions with the passages found for them, and beside them what made them.

    Args:
        path: the data in the reader's format; `.jsonl` gives a line for each example, any other
            name a JSON list.
        positions, scores: [q, k], of each question's passages in the collection, best first; -1
            where there are fewer.
        workers: maximum number of processes that look for answers.
        made_by: as JSON values; `model` is the last column of a TREC run.
        as_trec: write a TREC run instead.

    Returns: for each question with gold answers, the rank of its first passage with one, from 1; 0
    if there is none.
    """
    firsts: list[int] = []

    def found_for(index: int) -> list[tuple[int, float]]:
        pairs = zip(positions[index].tolist(), scores[index].tolist(), strict=True)
        return [(row, score) for row, score in pairs if row >= 0]

    def find_in(part: range) -> list[list[bool] | None]:
        """Which passages of some questions contain an answer; None for a question without any."""
        answers = [read_example(data, index).answers for index in part]
        texts = [(passages[row].text for row, _ in found_for(index)) for index in part]
        pairs = zip(answers, texts, strict=True)
        return [list(find_answers(*pair)) if pair[0] else None for pair in pairs]

    def found() -> Iterator[tuple[int, list[bool]]]:
        n_workers = min(workers, available_cpus(), scores.size // _PAIRS_WORTH_A_PROCESS)
        parts = (range(n, min(n + _PART, len(data))) for n in range(0, len(data), _PART))
        hits = itertools.chain.from_iterable(in_order(find_in, parts, n_workers))
        for index, contained in enumerate(hits):
            if contained is not None:
                firsts.append(first_hit(contained))
            yield index, contained or []
            on_examples(1)

    def examples() -> Iterator[dict[str, Any]]:
        for index, contained in found():
            contexts = []
            for number, (row, score) in enumerate(found_for(index)):
                identity, title, text, *_, more = passages[row]
                context = {"id": identity, "title": title, "text": text, "score": score}
                context |= {"hasanswer": contained[number]} if contained else {}
                contexts.append(context | {n: more[n] for n in more if n not in context})
            yield {**data[index], "ctxs": contexts}

    def trec_lines() -> Iterator[str]:
        for index, _ in found():
            ranked = ((passages[row].id, score) for row, score in found_for(index))
            yield from run_lines(read_example(data, index).id, ranked, made_by["model"])

    for kind in (MADE_BY, RECALL):  # of an earlier file
        beside(path, kind).unlink(missing_ok=True)
    write_whole(path, trec_lines() if as_trec else as_json(path, examples()))
    write_beside(path, MADE_BY, made_by)
    return firsts


def as_json(path: str | Path, examples: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The text of a data file: `.jsonl` has a line for each example, any other a JSON list."""
    as_lines = (json.dumps(example) + "\n" for example in examples)
    return as_lines if str(path).endswith(".jsonl") else json_list(examples)


def beside(path: Path, kind: str) -> Path:
    return path.with_name(path.name + kind)


def write_beside(path: Path, kind: str, values: dict[str, Any]) -> None:
    write_whole(beside(path, kind), [json.dumps(values, indent=1) + "\n"])


def write_recall(path: Path, firsts: Sequence[int], n_docs: int) -> dict[str, float]:
    """Write recall at 1, 5, 20 and 100 beside the retrieved data; nothing without gold answers.

    Args: firsts: what `write_retrieved` returned.
    Returns: the values by name, in [0, 1].
    """
    ks = [k for k in (1, 5, 20, 100) if firsts and k <= n_docs]
    recalls = {f"recall@{k}": sum(0 < rank <= k for rank in firsts) / len(firsts) for k in ks}
    if recalls:
        write_beside(path, RECALL, {**recalls, "questions": len(firsts)})
    return recalls
