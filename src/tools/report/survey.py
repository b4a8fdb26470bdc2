"""A run in numbers, for the page: answers judged, passages with answers, records of questions.

Data files are read one question at a time; only a few numbers are kept of each, and a full record
of the questions on the page.
"""

import itertools
import json
import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.examples import Example, Examples, load_data, read_example
from src.data.passages import Passage
from src.evaluation.answers import ANSWERS, SCORES, answer_spans, find_answers, judge, read_answers
from src.evaluation.calibration import percent, rank_correlation
from src.evaluation.groups import answer_length
from src.evaluation.rankings import Ranking, first_hit
from src.evaluation.runs import PROBABILITIES, Confidence, read_probabilities

MOST_BYTES = 24_000_000  # of all records: browsers open that in a second
LONGEST_PIECE = 2000  # characters of a passage shown before, between and after answers
MOST_MARKS = 20  # answers marked in a passage
MOST_ANSWERS = 10  # gold answers shown of a question, and alternatives of the reader
_MOST_VALUES, _LONGEST_VALUE = 8, 300  # of a passage's other fields


@dataclass
class Survey:
    """All questions judged, and records of those on the page.

    A verdict is a question's `match`, `f1` (both None if not answered), `length` (words of the
    shortest gold answer), `holding` (passages read that contain an answer), `top` (whether the
    first does), `p` (the answer's probability, None if unknown) and `other_match` (of the run
    compared with, None without one). Questions without gold answers have no verdict. `by_score` and
    `as_found` rank the data's own passages, in reading order and in the file's; `compared` names
    other files with the same questions. `agreements` are the rank correlations of attention with
    attribution, where both are known.
    """

    data: Examples
    scored: bool
    by_score: Ranking
    as_found: Ranking
    answers: list[str]  # in the data's order; empty if the run did not write them
    confidences: list[Confidence]
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """The mean of this part of the verdict, in percent."""
        return percent([verdict[name] for verdict in self.verdicts])

    def for_script(self, against: str) -> dict[str, Any]:
        """What the page's script is to know; it shows texts as texts."""
        about = {"total": len(self.data), "answered": bool(self.answers), "scored": self.scored}
        about |= {"against": against, "judged": bool(self.confidences)}
        return about | {"rankings": self.compared, "questions": self.records}


def survey(
    path: str, options: Namespace, run_options: dict[str, Any], rankings: Sequence[Ranking]
) -> Survey:
    """Judge every question of a data file.

    Args:
        path: empty when the run answered nothing.
        rankings: other files; records compare with those of the same questions.
    Errors: `InputError` if a run answers other questions.
    """
    data, run = load_data(path) if path else [], Path(options.run)
    answers = read_answers(run / ANSWERS, data) if (run / ANSWERS).exists() else []
    others: list[str] | list[None] = [None] * len(data)
    if options.against and path:
        others = read_answers(Path(options.against) / ANSWERS, data)
    scored = Path(path).name == SCORES
    names = "by the reader's attention" if scored else Path(path).stem, "as found"
    sure = read_probabilities(run / PROBABILITIES, data) if answers else []
    found = Survey(data, scored, *map(Ranking, names), answers, sure)
    n_context = run_options.get("n_context") if answers else None
    n_shown = min(options.max_questions, len(data))
    shown = [number * len(data) // n_shown for number in range(n_shown)]
    for index, other in enumerate(others):
        example, given = read_example(data, index), answers[index] if answers else None
        gold, passages = example.answers, example.passages
        flags = list(find_answers(gold, (passage.text for passage in passages)))
        n_read = len(flags)
        if scored:
            n_read = sum(passage.score is not None for passage in passages)
        elif isinstance(n_context, int):
            n_read = min(n_context, n_read)
        match, overlap = _judge(given, gold)
        record = {"match": match, "f1": overlap, "other_match": _judge(other, gold)[0]}
        record |= {"length": None, "holding": None, "p": sure[index].probability if sure else None}
        if gold:
            record |= {"length": answer_length(gold), "holding": sum(flags[:n_read])}
            found.verdicts.append({**record, "top": any(flags[:n_read][:1])})
        causes = _attributions(data[index], passages[:n_read]) if scored else []
        scores = [passage.score for passage in passages[: len(causes)]]
        if (correlation := rank_correlation(scores, causes)) is not None:
            found.agreements.append(correlation)
        found.by_score.add(example, flags)
        by_position = sorted(zip((p.position for p in passages), flags, strict=True))
        found.as_found.add(example, (flag for _, flag in by_position))
        if index == shown[len(found.records) % n_shown]:
            record |= {"id": example.id, "question": example.question, "given": given}
            record |= {"other": other, "read": n_read, "causes": causes}
            record |= {"right": gold[:MOST_ANSWERS], "more": max(0, len(gold) - MOST_ANSWERS)}
            record["alternatives"] = sure[index].alternatives[:MOST_ANSWERS] if sure else []
            record["scores"] = [p.score and float(f"{p.score:.4g}") for p in passages]
            record["flags"] = "".join("01"[flag] for flag in flags)
            room = MOST_BYTES / n_shown - len(to_json(record).encode())
            record["passages"] = _passages(example, flags, options.passages_shown, room)
            found.records.append(record)
    same = [ranking for ranking in rankings if ranking.questions == found.by_score.questions]
    found.compared = [ranking.name for ranking in same]
    for index, record in zip(shown, found.records, strict=True):
        record["first"] = [ranking.firsts[index] for ranking in same]
    return found


def to_json(value: Any) -> str:
    """JSON for a page's script."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _judge(answer: str | None, gold: list[str]) -> tuple[bool | None, float | None]:
    return (None, None) if answer is None or not gold else judge(answer, gold)


def _attributions(raw: dict[str, Any], read: Sequence[Passage]) -> list[float]:
    """How much each of the passages read matters to the answer; [] if that was not computed."""
    causes = [raw["ctxs"][passage.position].get("attribution") for passage in read]
    is_known = all(isinstance(c, int | float) and math.isfinite(c) for c in causes)
    return [float(f"{cause:.3g}") for cause in causes] if is_known else []


def _passages(example: Example, flags: list[bool], n: int, room: float) -> list[dict[str, Any]]:
    """The first with an answer, and the first n as far as there is room, in bytes."""
    first = first_hit(flags) - 1
    ranks = {*range(min(n, len(flags))), max(first, 0)} if flags else ()
    shown = []
    for rank in sorted(ranks, key=lambda rank: (rank != first, rank)):
        passage = example.passages[rank]
        spans = answer_spans(example.answers, passage.text) if flags[rank] else []
        parts, hidden = excerpt(passage.text, spans)
        row = {"k": rank, "found": passage.position + 1, "title": passage.title}
        more = [[name, str(value)[:_LONGEST_VALUE]] for name, value in passage.more.items()]
        row |= {"parts": parts, "hidden": hidden, "more": more[:_MOST_VALUES]}
        room -= len(to_json(row).encode())
        if room < 0:
            break
        shown.append(row)
    return sorted(shown, key=lambda row: row["k"])


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """Pieces of a text, every second one a marked answer, and the number of characters left out of
    the middle of long pieces."""
    ends = [0, *itertools.chain(*spans[:MOST_MARKS]), len(text)]
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
