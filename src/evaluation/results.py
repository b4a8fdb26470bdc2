"""The files that testing and retrieval write.

In testing, each process appends the answers of its batches to its own part. Batches are assigned to
processes in turn, so reading the parts in turn gives the input's order, with nothing in memory.
"""

import json
import logging
import multiprocessing
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.data.examples import Examples, parse_example, read_example
from src.data.json_files import json_list
from src.data.outputs import require_regular, write_whole, writing
from src.data.passages import Passages
from src.evaluation.answers import ANSWERS, SCORES, Task, exact_match, find_answers, judge, match
from src.evaluation.rankings import recall_at_k
from src.models.answering import Answer
from src.options import TargetOptions, select
from src.runtime.errors import InputError, shorten
from src.runtime.terminal import say
from src.training.metrics import Average, passing_bar

OnExamples = Callable[[int], object]  # called with the number of examples just written
ANSWER_RECORDS, CURVE = "answers.jsonl", "n_context_curve.json"
MADE_BY, RECALL = ".made_by.json", ".recall.json"  # appended to the name of the file they describe


def check_results(folder: Path) -> None:
    """Errors: `InputError`, before hours of work, if a result would replace anything but a file."""
    names = ANSWERS, SCORES, f"{SCORES}{MADE_BY}", ANSWER_RECORDS, CURVE
    for path in (folder / name for name in names):
        with writing(path, "remove it, or use another --name"):
            require_regular(path)


def _part(folder: Path, rank: int) -> Path:
    return folder / f".answers.part-{rank}.jsonl"


class AnswerFile:
    """One process's part: a line with what made it, then a line for each batch, a list of the
    fields of its answers.

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
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n")]  # the last may be incomplete
        if kept and kept[0] == header:
            self.finished = [_read_batch(line) for line in kept[1:]]
        else:
            kept = [header]
        write_whole(self.path, kept)

    def __enter__(self) -> "AnswerFile":
        self._file = open(self.path, "a")
        return self

    def write(self, answers: list[Answer]) -> None:
        rows = [list(vars(answer).values()) for answer in answers]
        with writing(self.path, "make room, and the same command resumes after the last batch"):
            self._file.write(json.dumps(rows) + "\n")
            self._file.flush()

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def right_answer(data: Examples) -> Callable[[int], str | None]:
    """The text that an example's passages are scored by: its target, or else its first answer."""

    def find(index: int) -> str | None:
        example = read_example(data, index)
        answers = [example.target] if example.target is not None else example.answers
        return answers[0] if answers else None

    return find


class Tally:
    """Mean exact match and F1, in percent, of answers to a file's questions, and of those from the
    first n passages alone in `by_context`."""

    def __init__(self, data: Examples):
        self._data = data
        self.exact_match, self.f1 = Average(), Average()
        self.by_context: dict[str, Tally] = {}

    def add(self, answers: list[Answer]) -> None:
        for answer in answers:
            gold = read_example(self._data, answer.index).answers
            self._add(answer.text, gold)
            for n, text in answer.by_context.items():
                self.by_context.setdefault(n, Tally(self._data))._add(text, gold)

    def _add(self, text: str, gold: list[str]) -> None:
        if gold:
            match, overlap = judge(text, gold)
            self.exact_match.add(100.0 * match)
            self.f1.add(100.0 * overlap)

    def over_all(self, contexts: Sequence[int] = ()) -> "Tally":
        """The tally over what every process added, also from these numbers of passages."""
        joint = Tally(self._data)
        joint.exact_match, joint.f1 = self.exact_match.over_all(), self.f1.over_all()
        for n in map(str, contexts):  # a process may have had no batch
            joint.by_context[n] = self.by_context.get(n, Tally(self._data)).over_all()
        return joint

    def values(self) -> dict[str, float | None]:
        mean, n = self.exact_match, round(self.exact_match.weight)
        return {"exact_match": mean.value(), "f1": self.f1.value(), "questions": n}

    def __str__(self) -> str:
        n = round(self.exact_match.weight)
        if not n:
            return "the data has no answers to judge by"
        return (
            f"exact match {self.exact_match.value():.2f}, F1 {self.f1.value():.2f} on {n} examples"
        )


def write_curve(folder: Path, tally: Tally) -> str:
    """Write `n_context_curve.json`: exact match and F1 by number of passages read. Returns it as
    text for the log."""
    values = {n: part.values() for n, part in tally.by_context.items()}
    write_whole(folder / CURVE, [json.dumps(values, indent=1) + "\n"])
    shown = [(n, part["exact_match"]) for n, part in values.items()]
    return ", ".join(f"{n}: {'-' if match is None else f'{match:.2f}'}" for n, match in shown)


def remove_parts(folder: Path) -> None:
    """Remove the parts of this run's processes, and of an earlier run with more of them."""
    for path in folder.glob(_part(folder, 0).name.replace("0", "*")):
        path.unlink()


def _read_batch(line: str) -> list[Answer]:
    return [Answer(*row) for row in json.loads(line)]


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


def write_files(
    folder: Path,
    data: Examples,
    world_size: int,
    options: Namespace,
    made_by: dict[str, Any],
    log: logging.Logger,
) -> None:
    """Write what the options of test_reader.py ask for, from the parts of all processes."""
    if options.write_results:
        path = write_answers(folder, data, world_size, options.abstain_below)
        say(log, "answers", "%s", path)
    if options.write_crossattention_scores:
        with passing_bar(len(data), "question", "writing scores") as bar:
            n, targets = options.n_context, select(TargetOptions, options)
            path = write_scores(folder, data, world_size, n, made_by, targets, bar.update)
        say(log, "scores", "%s", path)


def _probability(log_probability: float, n_tokens: int) -> dict[str, float]:
    mean = log_probability / max(1, n_tokens)
    names = "log_probability", "mean_log_probability", "n_tokens"
    return dict(zip(names, (log_probability, mean, n_tokens), strict=True))


def write_answers(
    folder: Path, data: Examples, world_size: int, abstain_below: float = 0.0
) -> Path:
    """Write `final_output.txt`: a line `id<TAB>answer` for each example, any whitespace in either
    replaced by single spaces; and `answers.jsonl`, which has the answers' probabilities. Returns
    the path of the first.

    Args: abstain_below: the answer is empty where its probability is lower.
    """

    def lines() -> Iterator[tuple[str, str]]:
        for answer in read_parts(folder, world_size):
            example = read_example(data, answer.index)
            text = "" if answer.probability < abstain_below else answer.text
            identity = example.id
            record = {"id": identity, "answer": text}
            record |= _probability(answer.log_probability, answer.n_tokens)
            if example.answers:
                record["correct"] = exact_match(text, example.answers)
            if answer.alternatives:
                others = [{"answer": a[0], **_probability(*a[1:])} for a in answer.alternatives]
                record["alternatives"] = others
            yield f"{' '.join(identity.split())}\t{' '.join(text.split())}\n", json.dumps(record)

    records = (f"{record}\n" for _, record in lines())
    write_whole(folder / ANSWER_RECORDS, records)
    return write_whole(folder / ANSWERS, (line for line, _ in lines()))


def write_scores(
    folder: Path,
    data: Examples,
    world_size: int,
    n_context: int,
    made_by: dict[str, Any],
    targets: TargetOptions = TargetOptions(),  # noqa: B008 (frozen)
    on_examples: OnExamples = lambda n: None,
) -> Path:
    """Write `dataset_wscores.json`, the data with the reader's score of each passage it read, and
    beside it what made it. Returns the file's path.

    Passages are in reading order; those beyond `n_context` follow without a score, because the
    score that they came with is of another kind.
    """

    def examples() -> Iterator[dict[str, Any]]:
        for answer in read_parts(folder, world_size):
            yield _scored_example(data[answer.index], answer, n_context, targets)
            on_examples(1)

    _beside(folder / SCORES, MADE_BY).unlink(missing_ok=True)
    path = write_whole(folder / SCORES, json_list(examples()))
    _write_beside(path, MADE_BY, made_by)
    return path


def _scored_example(
    raw: dict[str, Any], answer: Answer, n_context: int, targets: TargetOptions
) -> dict[str, Any]:
    """The example with its passages in reading order and the answer's scores on the first ones."""
    example = parse_example(raw, answer.index, "")
    values = dict(answer.targets) or {"attention": answer.scores}
    if "has_answer" in targets.names:
        texts = (passage.text for passage in example.passages)
        values["has_answer"] = [float(has) for has in find_answers(example.answers, texts)]
    contexts = []
    for number, passage in enumerate(example.passages):
        context = dict(raw["ctxs"][passage.position])
        context.pop("score", None)
        if number < n_context:
            scores = {name: values[name][number] for name in targets.names}
            context["score"] = scores[targets.names[0]]
            if targets.targets != "attention":
                context["scores"] = scores
            for name in ("token_log_probs", "attribution"):
                if name in values:
                    context[name] = values[name][number]
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
    rows: list[list[int]],
    scores: np.ndarray,
    workers: int,
    made_by: dict[str, Any],
    as_trec: bool = False,
    on_examples: OnExamples = lambda n: None,
) -> list[list[bool]]:
    """Write questions with the passages found for them, and beside them what made them.

    Args:
        path: the data in the reader's format; `.jsonl` gives a line for each example, any other
            name a JSON list.
        rows, scores: of each question's passages in the collection, best first.
        workers: maximum number of processes that look for answers.
        made_by: as JSON values; `model` is the last column of a TREC run.
        as_trec: write a TREC run instead.

    Returns: for each question with gold answers, whether each of its passages contains one.
    """
    flags = []

    def task(index: int) -> Task:
        return read_example(data, index).answers, [passages[row].text for row in rows[index]]

    def found() -> Iterator[tuple[int, list[bool]]]:
        hits = _find_answers(map(task, range(len(data))), len(data), scores.size, workers)
        for index, (has_answers, contained) in enumerate(hits):
            if has_answers:
                flags.append(contained)
            yield index, contained if has_answers else []
            on_examples(1)

    def examples() -> Iterator[dict[str, Any]]:
        for index, contained in found():
            contexts = []
            for number, (row, score) in enumerate(zip(rows[index], scores[index], strict=False)):
                identity, title, text, *_ = passages[row]
                context = {"id": identity, "title": title, "text": text, "score": float(score)}
                hit = {"hasanswer": contained[number]} if contained else {}
                contexts.append(context | hit)
            yield {**data[index], "ctxs": contexts}

    def trec_lines() -> Iterator[str]:
        for index, _ in found():
            question = read_example(data, index).id
            for rank, (row, score) in enumerate(zip(rows[index], scores[index], strict=False)):
                columns = passages[row].id, rank + 1, repr(float(score)), made_by["model"]
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


def write_recall(path: Path, flags: list[list[bool]], n_docs: int) -> dict[str, float]:
    """Write recall at 1, 5, 20 and 100 beside the retrieved data; nothing without gold answers.

    Returns: the values by name, in [0, 1].
    """
    ks = [k for k in (1, 5, 20, 100) if flags and k <= n_docs]
    recalls = {f"recall@{k}": recall_at_k(flags, k) for k in ks}
    if recalls:
        _write_beside(path, RECALL, {**recalls, "questions": len(flags)})
    return recalls
