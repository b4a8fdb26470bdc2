"""The file that retrieval writes, and what is written beside it."""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from src.data.examples import Examples, available_cpus, read_example
from src.data.json_files import json_list
from src.data.outputs import write_whole
from src.data.passages import Passages
from src.evaluation.answers import find_answers
from src.runtime.errors import InputError, shorten

# For a question's index: whether it has answers, and which of its passages contain one.
Search = Callable[[int], tuple[bool, list[bool]]]
MADE_BY, RECALL = ".made_by.json", ".recall.json"  # appended to the name of the file they describe
_PAIRS_WORTH_A_PROCESS = 100_000  # of a question and a passage; a process starts in 0.1 s


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

    def found_for(index: int) -> list[tuple[int, float]]:
        pairs = zip(positions[index].tolist(), scores[index].tolist(), strict=True)
        return [(row, score) for row, score in pairs if row >= 0]

    def search(index: int) -> tuple[bool, list[bool]]:
        answers = read_example(data, index).answers
        texts = (passages[row].text for row, _ in found_for(index))
        return bool(answers), list(find_answers(answers, texts))

    def found() -> Iterator[tuple[int, list[bool]]]:
        hits = _search_all(search, len(data), scores.size, workers)
        for index, (has_answers, contained) in enumerate(hits):
            if has_answers:
                flags.append(np.array(contained, bool))  # a list takes eight times as much memory
            yield index, contained if has_answers else []
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
            question = read_example(data, index).id
            for rank, (row, score) in enumerate(found_for(index), start=1):
                columns = passages[row].id, rank, repr(score), made_by["model"]
                yield "{} Q0 {} {} {} {}\n".format(question, *columns)

    for kind in (MADE_BY, RECALL):  # of an earlier file
        beside(path, kind).unlink(missing_ok=True)
    write_whole(path, trec_lines() if as_trec else as_json(path, examples()))
    write_beside(path, MADE_BY, made_by)
    return flags


def as_json(path: str | Path, examples: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The text of a data file: `.jsonl` has a line for each example, any other a JSON list."""
    as_lines = (json.dumps(example) + "\n" for example in examples)
    return as_lines if str(path).endswith(".jsonl") else json_list(examples)


def beside(path: Path, kind: str) -> Path:
    return path.with_name(path.name + kind)


def write_beside(path: Path, kind: str, values: dict[str, Any]) -> None:
    write_whole(beside(path, kind), [json.dumps(values, indent=1) + "\n"])


def _search_all(
    search: Search, n: int, n_pairs: int, workers: int
) -> Iterator[tuple[bool, list[bool]]]:
    """The results for the first n indices in order."""
    workers = min(workers, available_cpus(), n_pairs // _PAIRS_WORTH_A_PROCESS)
    if workers <= 1:
        yield from map(search, range(n))
        return
    with forked(search, workers) as pool:
        yield from pool.map(call, range(n), chunksize=max(1, min(64, n // (4 * workers))))


def forked(task: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
    """Processes that run this task, by `call`. They import nothing, read files themselves, and
    leave signals to the process that waits for them."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(workers, context, _start_worker, (task,))


def _start_worker(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def call(argument: Any) -> Any:
    return _task(argument)


def write_recall(path: Path, flags: list[Sequence[bool]], n_docs: int) -> dict[str, float]:
    """Write recall at 1, 5, 20 and 100 beside the retrieved data; nothing without gold answers.

    Returns: the values by name, in [0, 1].
    """
    ks = [k for k in (1, 5, 20, 100) if flags and k <= n_docs]
    recalls = {f"recall@{k}": sum(any(part[:k]) for part in flags) / len(flags) for k in ks}
    if recalls:
        write_beside(path, RECALL, {**recalls, "questions": len(flags)})
    return recalls
