"""A run in numbers: its curves, where passages contain answers, its answers judged.

`page.py` makes a page of them. Data files are read one question at a time; only a few numbers are
kept of each, and a full record of the questions that the page shows.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.examples import Example, Examples, read_example
from src.evaluation.answers import SCORES, answer_spans, find_answers, judge, normalize_answer
from src.evaluation.rankings import Ranking, first_hit
from src.runtime.errors import InputError, shorten
from src.tools.report.charts import Line

MOST_POINTS = 200  # of a curve; more updates than that are averaged in groups
LONGEST_PIECE = 2000  # characters shown of a passage's text before, between and after answers
MOST_MARKS = 20  # answers marked in a passage
MOST_ANSWERS = 10  # gold answers of a question that are shown


# ----------------------------------------------------------------------------------------------
# Curves


def read_metrics(path: Path) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """The values of a `metrics.jsonl` by name, as (step, value) in the file's order, and how many
    were left out because they are not finite. An incomplete last line is ignored.

    Errors: `InputError` when any other line is not a step with numbers.
    """
    values: dict[str, list[tuple[int, float]]] = {}
    left_out = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; remove the lines that are not") from None
    for number, line in enumerate(lines, start=1):
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
                break  # the run was killed while it wrote, or is writing now
            raise InputError(
                f'{path}, line {number}: must be a step with its numbers, such as {{"step": 1, '
                f'"train/loss": 2.5}}, not {shorten(line.strip(), 40)}; remove the line'
            ) from None
    return values, left_out


def thin(name: str, points: Sequence[tuple[int, float]]) -> tuple[Line, int]:
    """A curve of at most `MOST_POINTS` points, and how many values each of them is the mean of. A
    point is at the step of the last of its values; the band runs from their lowest to highest."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size == 1:
        return Line(name, points), 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    values = [[value for _, value in part] for part in parts]
    means = [(part[-1][0], sum(v) / len(v)) for part, v in zip(parts, values, strict=True)]
    return Line(name, means, [(min(v), max(v)) for v in values]), size


# ----------------------------------------------------------------------------------------------
# Questions, answers, passages


@dataclass
class Survey:
    """All questions judged, and records of those that the page shows.

    A verdict is a question's `match`, `f1` (both None if not answered), `length` (words of the
    shortest gold answer), `holding` (passages read that contain an answer) and `top` (whether the
    first does); None without gold answers. `by_score` and `as_found` rank the data's own passages,
    in reading order and in the file's; `compared` names other files with the same questions.
    """

    data: Examples
    answered: bool
    scored: bool
    by_score: Ranking
    as_found: Ranking
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """The share, in percent, of questions for which this part of the verdict is true, or its
        mean."""
        return percent([verdict[name] for verdict in self.verdicts])


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
        n_context: how many passages were read, if known; the reader's own scores
            (dataset_wscores.json) override it.
        rankings: other files; records compare with those of the same questions.
    """
    scored = Path(data.path).name == SCORES
    name = "by the reader's attention" if scored else short_names([data.path])[0]
    found = Survey(data, answers is not None, scored, Ranking(name), Ranking("as found"))
    n_shown = min(max_questions, len(data))
    shown = [number * len(data) // n_shown for number in range(n_shown)]
    for index in range(len(data)):
        example = read_example(data, index)
        passages, gold = example.passages, example.answers
        n_read = len(passages) if n_context is None else min(n_context, len(passages))
        if scored:
            n_read = sum(passage.score is not None for passage in passages)
        flags = list(find_answers(gold, (passage.text for passage in passages)))
        given = answers[index] if answers else None
        verdict = dict.fromkeys(["match", "f1", "length", "holding"])
        if gold:
            match, f1 = (None, None) if given is None else judge(given, gold)
            length = min(len(normalize_answer(answer).split()) for answer in gold)
            verdict = {"match": match, "f1": f1, "length": length, "holding": sum(flags[:n_read])}
            found.verdicts.append(verdict | {"top": any(flags[: min(n_read, 1)])})
        found.by_score.add(example, flags)
        by_place = sorted(zip((p.position for p in passages), flags, strict=True))
        found.as_found.add(example, (flag for _, flag in by_place))
        if index == shown[len(found.records) % n_shown]:
            record = {"id": example.id, "question": example.question, "given": given, **verdict}
            found.records.append(record | _evidence(example, flags, n_read, passages_shown))
    same = [ranking for ranking in rankings if ranking.questions == found.by_score.questions]
    found.compared = [ranking.name for ranking in same]
    for index, record in zip(shown, found.records, strict=True):
        record["first"] = [ranking.firsts[index] for ranking in same]
    return found


def _evidence(
    example: Example, flags: list[bool], n_read: int, passages_shown: int
) -> dict[str, Any]:
    """The rest of a question's record, as the page's script reads it (see `page.html`)."""
    ranks = list(range(min(passages_shown, len(flags))))
    if (first := first_hit(flags)) > passages_shown:
        ranks.append(first - 1)
    shown = []
    for rank in ranks:
        passage = example.passages[rank]
        spans = answer_spans(example.answers, passage.text) if flags[rank] else []
        parts, hidden = excerpt(passage.text, spans)
        row = {"k": rank, "found": passage.position + 1, "title": passage.title, "parts": parts}
        shown.append({**row, "hidden": hidden})
    return {
        "right": example.answers[:MOST_ANSWERS],
        "more": max(0, len(example.answers) - MOST_ANSWERS),
        "read": n_read,
        "scores": [None if p.score is None else float(f"{p.score:.4g}") for p in example.passages],
        "flags": "".join("01"[flag] for flag in flags),
        "passages": shown,
    }


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """A passage for the page: pieces of its text, every second one a marked answer, and how many
    characters are left out from the middle of long pieces."""
    ends = [0, *(end for span in spans[:MOST_MARKS] for end in span), len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(ends)]
    hidden = 0
    for n in range(0, len(parts), 2):
        excess = len(parts[n]) - LONGEST_PIECE
        if excess > 0:
            middle = LONGEST_PIECE * 3 // 4
            rest = parts[n][middle + excess :]
            parts[n] = f"{parts[n][:middle]} [\N{HORIZONTAL ELLIPSIS}] {rest}"
            hidden += excess
    return parts, hidden


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folder and ending where these are unique, else the paths."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n independent questions, both in [0, 1] (Wilson, 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half
