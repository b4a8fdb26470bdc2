"""The files that testing writes.

Each process appends the answers of its batches to its own part. Batches are assigned to
processes in turn, so reading the parts in turn gives the input's order, with nothing in memory.
"""

import contextlib
import itertools
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from src.data.examples import Example, Examples, read_example
from src.data.outputs import require_regular, write_whole, writing
from src.evaluation.answers import ANSWERS, SCORES, exact_match, find_answers, judge
from src.evaluation.retrieved import MADE_BY, as_json, beside, write_beside
from src.evaluation.runs import CURVE, PROBABILITIES
from src.models.answering import Answer
from src.options import TargetOptions, select
from src.runtime.terminal import say
from src.training.metrics import Average, passing_bar


def check_results(folder: Path, *inputs: str) -> None:
    """Errors: `InputError`, before hours of work, if a result would replace anything but a file, or
    one of the inputs."""
    names = ANSWERS, SCORES, f"{SCORES}{MADE_BY}", PROBABILITIES, CURVE
    for path in (folder / name for name in names):
        with writing(path, "remove it, or use another --name"):
            require_regular(path, inputs=inputs)


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
        rows = [list(vars(answer).values()) for answer in answers]
        with writing(self.path, "make room, and the same command resumes after the last batch"):
            self._file.write(json.dumps(rows) + "\n")
            self._file.flush()

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def right_answer(data: Examples, index: int) -> str | None:
    """The text that an example's passages are scored by: its target, or else its first answer."""
    example = read_example(data, index)
    if example.target is not None or data.answers_are_regexes:
        return example.target
    return example.answers[0] if example.answers else None


class Tally:
    """Mean exact match and F1, in percent, of answers to a file's questions (under ""), and of
    those from the first n passages alone, for each n of `contexts`."""

    def __init__(self, data: Examples, contexts: Sequence[int] = ()):
        self._data = data
        self.averages = {n: (Average(), Average()) for n in ("", *map(str, contexts))}

    def add(self, answers: list[Answer]) -> None:
        for answer in answers:
            gold = read_example(self._data, answer.index).answers
            for n, averages in self.averages.items() if gold else ():
                verdicts = judge(answer.by_context[n] if n else answer.text, gold)
                for average, verdict in zip(averages, verdicts, strict=True):
                    average.add(100.0 * verdict)

    def over_all(self) -> "Tally":
        """The tally over what every process added."""
        joint = Tally(self._data)
        joint.averages = {n: tuple(a.over_all() for a in pair) for n, pair in self.averages.items()}
        return joint

    def means(self, n: str = "") -> dict[str, float | None]:
        """None without gold answers."""
        match, overlap = self.averages[n]
        return {"exact_match": match.value(), "f1": overlap.value()}

    def __str__(self) -> str:
        if not (n := round(self.averages[""][0].weight)):
            return "the data has no answers to judge by"
        match, overlap = self.means().values()
        return f"exact match {match:.2f}, F1 {overlap:.2f} on {n} examples"


def write_curve(folder: Path, tally: Tally) -> str:
    """Write `n_context_curve.json`: exact match and F1 by number of passages read. Returns it as
    text for the log."""
    values = {
        n: {**tally.means(n), "questions": round(match.weight)}
        for n, (match, _) in tally.averages.items()
        if n
    }
    write_whole(folder / CURVE, [json.dumps(values, indent=1) + "\n"])
    shown = [(n, part["exact_match"]) for n, part in values.items()]
    return ", ".join(f"{n}: {'-' if match is None else f'{match:.2f}'}" for n, match in shown)


def remove_parts(folder: Path) -> None:
    """Remove the parts of this run's processes, and of an earlier run with more of them."""
    for path in folder.glob(_part(folder, 0).name.replace("0", "*")):
        path.unlink()


def _read_batch(line: str) -> list[Answer]:
    """Errors: ValueError or TypeError for anything else, such as a line without its end."""
    if not line.endswith("\n"):
        raise ValueError("no end of the line")
    batch = [Answer(*row) for row in json.loads(line)]
    if not all(type(one.index) is int and isinstance(one.text, str) for one in batch):
        raise ValueError("not answers")
    return batch


def read_parts(folder: Path, world_size: int) -> Iterator[Answer]:
    """All processes' answers in the input's order."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(_part(folder, rank))) for rank in range(world_size)]
        for file in files:
            file.readline()  # what made it
        for file in itertools.cycle(files):
            if not (line := file.readline()):
                return
            yield from _read_batch(line)


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
    return {"log_probability": log_probability, "mean_log_probability": mean, "n_tokens": n_tokens}


def write_answers(
    folder: Path, data: Examples, world_size: int, abstain_below: float = 0.0
) -> Path:
    """Write `final_output.txt`: a line `id<TAB>answer` for each example, any whitespace in either
    replaced by single spaces; and `answers.jsonl`, which has the answers' probabilities. Returns
    the path of the first.

    Args: abstain_below: the answer is empty where its probability is lower.
    """

    def records() -> Iterator[dict[str, Any]]:
        for answer in read_parts(folder, world_size):
            example = read_example(data, answer.index)
            text = "" if answer.probability < abstain_below else answer.text
            record = {"id": example.id, "answer": text}
            record |= _probability(answer.log_probability, answer.n_tokens)
            if example.answers:
                record["correct"] = exact_match(text, example.answers)
            if answer.alternatives:
                others = [{"answer": a[0], **_probability(*a[1:])} for a in answer.alternatives]
                record["alternatives"] = others
            yield record

    def lines() -> Iterator[str]:
        for record in records():
            yield f"{' '.join(record['id'].split())}\t{' '.join(record['answer'].split())}\n"

    write_whole(folder / PROBABILITIES, (json.dumps(record) + "\n" for record in records()))
    return write_whole(folder / ANSWERS, lines())


def write_scores(
    folder: Path,
    data: Examples,
    world_size: int,
    n_context: int,
    made_by: dict[str, Any],
    targets: TargetOptions = TargetOptions(),  # noqa: B008 (frozen)
    on_examples: Callable[[int], object] = lambda n: None,
) -> Path:
    """Write `dataset_wscores.json`, the data with the reader's score of each passage it read, and
    beside it what made it. Returns the file's path.

    Passages are in reading order; those beyond `n_context` follow without a score, because the
    score that they came with is of another kind.
    """

    def examples() -> Iterator[dict[str, Any]]:
        for answer in read_parts(folder, world_size):
            example = read_example(data, answer.index)
            yield _scored_example(data[answer.index], example, answer, n_context, targets)
            on_examples(1)

    beside(folder / SCORES, MADE_BY).unlink(missing_ok=True)
    path = write_whole(folder / SCORES, as_json(SCORES, examples()))
    write_beside(path, MADE_BY, made_by)
    return path


_OF_READERS = ("score", "scores", "token_log_probs", "attribution")  # perhaps of another reader


def _scored_example(
    raw: dict[str, Any], example: Example, answer: Answer, n_context: int, targets: TargetOptions
) -> dict[str, Any]:
    """The example with its passages in reading order and the answer's scores on the first ones."""
    values = dict(answer.targets) or {"attention": answer.scores}
    if "has_answer" in targets.names:
        texts = (passage.text for passage in example.passages)
        values["has_answer"] = [float(has) for has in find_answers(example.answers, texts)]
    contexts = []
    for number, passage in enumerate(example.passages):
        given = raw["ctxs"][passage.position]
        context = {name: given[name] for name in given if name not in _OF_READERS}
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
