"""What a run came to, as numbers: its curves, where passages hold answers, its answers judged.

`page.py` makes a page of them. Data files are gone through one question at a time; what is
kept of each is a few numbers, and of as many as the page shows, a record. No torch here.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.data.examples import Example, Examples, load_data, read_example
from src.evaluation.answers import (
    SCORES,
    answer_spans,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
)
from src.runtime.errors import InputError, shorten

MOST_POINTS = 200  # of a curve; more updates than that are averaged in groups
LONGEST_TEXT = 2000  # characters of a passage that are shown from its beginning
MOST_ANSWERS = 10  # right answers of a question that are shown

# ----------------------------------------------------------------------------------------------
# What a training run wrote


def read_metrics(path: Path) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """The values of a `metrics.jsonl` by name, as (step, value) in the file's order, and how many
    were left out because they are not finite. A last line that was cut off is passed over.

    Errors: `InputError` when any other line is not a step with numbers.
    """
    values: dict[str, list[tuple[int, float]]] = {}
    left_out = 0
    try:
        with open(path, encoding="utf-8") as file:
            for place, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    step = int(row.pop("step"))
                    for name, value in row.items():
                        if math.isfinite(value):
                            values.setdefault(name, []).append((step, float(value)))
                        else:
                            left_out += 1
                except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                    if not line.endswith("\n"):
                        break  # of a run that was killed while it wrote, or writes just now
                    raise InputError(
                        f"{path}, line {place}: must be a step with its numbers, such as "
                        f'{{"step": 1, "train/loss": 2.5}}, not {shorten(line.strip(), 40)}; '
                        "remove the line"
                    ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; remove the lines that are not") from None
    return values, left_out


class Curve(NamedTuple):
    """Points (x, y). Each is the mean of `size` values, which `band` says the lowest and highest
    of; with a size of 1 there is no band."""

    points: list[tuple[float, float]]
    band: list[tuple[float, float]]
    size: int


def thin(points: Sequence[tuple[int, float]]) -> Curve:
    """A curve of at most `MOST_POINTS` points, each at the step of the last of its values."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return Curve(list(points), [], 1)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[value for _, value in part] for part in parts]
    means = [sum(part) / len(part) for part in values]
    band = [(min(part), max(part)) for part in values]
    return Curve([(p[-1][0], mean) for p, mean in zip(parts, means, strict=True)], band, size)


# ----------------------------------------------------------------------------------------------
# Where files of passages have their answers


class Ranking(NamedTuple):
    """Where questions have the first of their passages with an answer.

    `firsts` has, for each question, that passage's place from 1, 0 if no passage has one, or None
    if nobody can say because the question has no right answers. `questions` tells whether two
    files ask the same.
    """

    name: str
    firsts: list[int | None]
    depth: int
    questions: str

    def judged(self) -> list[int]:
        return [first for first in self.firsts if first is not None]

    def recall(self, k: int) -> float:
        """In percent, over the questions with right answers."""
        judged = self.judged()
        return 100 * sum(0 < first <= k for first in judged) / len(judged)


def rank_answers(path: str, name: str) -> Ranking:
    """Read a file of questions with passages. Errors: `InputError` when it has no passages, or no
    answers to look for."""
    data = load_data(path)
    firsts: list[int | None] = []
    depth, digest = 0, hashlib.sha256()
    for index in range(len(data)):
        example = read_example(data, index)
        digest.update(_identity(example))
        if example.answers:
            texts = (passage.text for passage in example.passages)
            firsts.append(_first(has_answer(example.answers, text) for text in texts))
            depth = max(depth, len(example.passages))
        else:
            firsts.append(None)
    if depth == 0:
        raise InputError(
            f"{path}: no question in this file has both answers and passages (ctxs); give what "
            "passage_retrieval.py wrote of questions with answers"
        )
    return Ranking(name, firsts, depth, digest.hexdigest())


def _identity(example: Example) -> bytes:
    return json.dumps([example.id, example.question]).encode()


def _first(flags: Iterable[bool]) -> int:
    return next((place for place, flag in enumerate(flags, start=1) if flag), 0)


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folder and ending where that tells them apart, else the paths."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def curve_places(depth: int) -> list[int]:
    """The k of a recall curve: every one at first, then evenly on a scale that counts in powers."""
    return sorted({round(depth ** (part / 60)) for part in range(61)} | {min(5, depth)})


# ----------------------------------------------------------------------------------------------
# Questions, answers, passages


class Verdict(NamedTuple):
    """What there is to say of a question with right answers. `match` and `overlap` are None when
    no answer was given; `holding` counts the passages with an answer among those that were read."""

    match: bool | None
    overlap: float | None
    length: int
    holding: int
    top_holds: bool


@dataclasses.dataclass
class Survey:
    """All questions judged, and records of those that the page holds.

    `compared` names the other files whose rankings of the same questions are told of in the
    records, `by_score` and `as_found` are those of the data's own passages, None without any.
    """

    data: Examples
    answered: bool
    scored: bool
    verdicts: list[Verdict]
    records: list[dict[str, Any]]
    compared: list[str]
    by_score: Ranking | None
    as_found: Ranking | None


def survey(
    data: Examples,
    answers: list[str] | None,
    n_context: int | None,
    rankings: Sequence[Ranking],
    max_questions: int,
    passages_shown: int,
) -> Survey:
    """Judge every question of a data file, one after the other.

    Args:
        answers: those given, in the data's order.
        n_context: how many passages were read, where it is known; the reader's own scores
            (dataset_wscores.json) tell it better.
        rankings: other files; those of the same questions are told of in the records.
    """
    scored = Path(data.path).name == SCORES
    shown = {place * len(data) // max_questions for place in range(max_questions)}
    shown = shown if max_questions < len(data) else set(range(len(data)))
    verdicts, records = [], []
    by_score: list[int | None] = []  # places of first passages with an answer, as in Ranking
    as_found: list[int | None] = []
    depth, digest = 0, hashlib.sha256()
    for index in range(len(data)):
        example = read_example(data, index)
        passages = example.passages
        digest.update(_identity(example))
        depth = max(depth, len(passages))
        n_read = len(passages) if n_context is None else min(n_context, len(passages))
        if scored:
            n_read = sum(passage.score is not None for passage in passages)
        right = example.answers
        flags = [bool(right) and has_answer(right, passage.text) for passage in passages]
        given = None if answers is None else answers[index]
        verdict = None
        if right:
            judged = given is not None
            verdict = Verdict(
                match=exact_match(given, right) if judged else None,
                overlap=f1(given, right) if judged else None,
                length=min(len(normalize_answer(answer).split()) for answer in right),
                holding=sum(flags[:n_read]),
                top_holds=any(flags[: min(1, n_read)]),
            )
            verdicts.append(verdict)
        by_score.append(_first(flags) if right else None)
        places = [p.position for p, flag in zip(passages, flags, strict=True) if flag]
        as_found.append(min(places, default=-1) + 1 if right else None)
        if index in shown:
            records.append(_record(example, given, verdict, flags, n_read, passages_shown))
    questions = digest.hexdigest()
    same = [ranking for ranking in rankings if ranking.questions == questions]
    for index, record in zip(sorted(shown), records, strict=True):
        record["first"] = [ranking.firsts[index] for ranking in same]
    has_both = depth > 0 and bool(verdicts)
    name = "by the reader's attention" if scored else short_names([data.path])[0]
    return Survey(
        data=data,
        answered=answers is not None,
        scored=scored,
        verdicts=verdicts,
        records=records,
        compared=[ranking.name for ranking in same],
        by_score=Ranking(name, by_score, depth, questions) if has_both else None,
        as_found=Ranking("as found", as_found, depth, questions) if has_both else None,
    )


def _record(
    example: Example,
    given: str | None,
    verdict: Verdict | None,
    flags: list[bool],
    n_read: int,
    passages_shown: int,
) -> dict[str, Any]:
    """A question as the page's script reads it (see `src/tools/report/page.html`)."""
    places = list(range(min(passages_shown, len(flags))))
    if (first := _first(flags)) > passages_shown:
        places.append(first - 1)
    passages = []
    for place in places:
        passage = example.passages[place]
        spans = answer_spans(example.answers, passage.text) if flags[place] else []
        parts, hidden = excerpt(passage.text, spans)
        passages.append(
            {"k": place, "found": passage.position + 1, "title": passage.title, "parts": parts}
            | ({"hidden": hidden} if hidden else {})
        )
    scores = [None if p.score is None else float(f"{p.score:.4g}") for p in example.passages]
    return {
        "id": example.id,
        "question": example.question,
        "given": given,
        "right": example.answers[:MOST_ANSWERS],
        "more": max(0, len(example.answers) - MOST_ANSWERS),
        "match": verdict and verdict.match,
        "f1": None if verdict is None or verdict.overlap is None else round(verdict.overlap, 4),
        "length": verdict and verdict.length,
        "holding": verdict and verdict.holding,
        "read": n_read,
        "scores": scores,
        "flags": "".join("1" if flag else "0" for flag in flags),
        "passages": passages,
    }


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """A passage for the page: pieces of its text, of which every second is a marked answer, and how
    many characters are left out. A long text is cut, but keeps its first answer."""
    length = len(text)
    kept = [(0, length if length <= LONGEST_TEXT else LONGEST_TEXT)]
    if spans and spans[0][0] >= kept[0][1]:
        kept.append((max(kept[0][1], spans[0][0] - 200), min(length, spans[0][1] + 300)))
    parts, before, hidden = [""], 0, length
    for start, end in kept:
        end = max([end, *(right for left, right in spans if left < end < right)])  # not through one
        hidden -= end - start
        parts[-1] += " [\N{HORIZONTAL ELLIPSIS}] " if start > before else ""
        before = start
        for left, right in spans:
            if start <= left < end:
                parts[-1] += text[before:left]
                parts += [text[left:right], ""]
                before = right
        parts[-1] += text[before:end]
        before = end
    return parts, hidden


# ----------------------------------------------------------------------------------------------
# Shares


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent questions, both in [0, 1] (Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def group_verdicts(
    verdicts: Sequence[Verdict],
    value: Callable[[Verdict], int],
    bins: Sequence[tuple[int, int | None]],
) -> list[tuple[tuple[int, int | None], list[Verdict]]]:
    """The bins (from, to; None: no end) that have questions, each with theirs."""
    chosen = [
        (
            (low, high),
            [v for v in verdicts if low <= value(v) and (high is None or value(v) <= high)],
        )
        for low, high in bins
    ]
    return [(ends, group) for ends, group in chosen if group]
