"""A run in numbers, for `page.py`: curves, passages with answers, answers judged.

Data files are read one question at a time; only a few numbers are kept of each, and a full record
of the questions on the page.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.examples import Example, Examples, read_example
from src.evaluation.answers import SCORES, answer_spans, find_answers, judge
from src.evaluation.calibration import percent, rank_correlation
from src.evaluation.groups import answer_length
from src.evaluation.rankings import Ranking, first_hit
from src.evaluation.runs import Given

LONGEST_PIECE = 2000  # characters of a passage shown before, between and after answers
MOST_MARKS = 20  # answers marked in a passage
MOST_ANSWERS = 10  # gold answers shown of a question, and alternatives of the reader


@dataclass
class Survey:
    """All questions judged, and records of those on the page.

    A verdict is a question's `match`, `f1` (both None if not answered), `length` (words of the
    shortest gold answer), `holding` (passages read that contain an answer), `top` (whether the
    first does), `p` (the answer's probability, None if unknown) and `other_match` (of the run
    compared with, None without one). Questions without gold answers have no verdict. `by_score` and
    `as_found` rank the data's own passages, in reading order and in the file's; `compared` names
    other files with the same questions. `agreements` are the rank correlations of attention with
    attribution, where both are known; `agree_on_top` tells whether they have the same first one.
    """

    data: Examples
    answered: bool
    scored: bool
    by_score: Ranking
    as_found: Ranking
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    agree_on_top: list[bool] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """The mean of this part of the verdict, in percent."""
        return percent([verdict[name] for verdict in self.verdicts])

    def add_agreement(self, scores: list[float], causes: list[float]) -> None:
        if (correlation := rank_correlation(scores, causes)) is not None:
            self.agreements.append(correlation)
            self.agree_on_top.append(scores.index(max(scores)) == causes.index(max(causes)))


def survey(
    data: Examples,
    run: Given,
    against: Given,
    n_context: int | None,
    rankings: Sequence[Ranking],
    max_questions: int,
    passages_shown: int,
) -> Survey:
    """Judge every question of a data file.

    Args:
        against: another run on the same questions.
        n_context: number of passages read, if known and the data has no scores of the reader.
        rankings: other files; records compare with those of the same questions.
    """
    scored = Path(data.path).name == SCORES
    name = "by the reader's attention" if scored else short_names([data.path])[0]
    found = Survey(data, bool(run.answers), scored, Ranking(name), Ranking("as found"))
    n_shown = min(max_questions, len(data))
    shown = [number * len(data) // n_shown for number in range(n_shown)]
    for index in range(len(data)):
        example = read_example(data, index)
        passages, gold = example.passages, example.answers
        n_read = len(passages) if n_context is None else min(n_context, len(passages))
        if scored:
            n_read = sum(passage.score is not None for passage in passages)
        flags = list(find_answers(gold, (passage.text for passage in passages)))
        causes = _attributions(data[index], example) if scored else []
        found.add_agreement([p.score for p in passages[: len(causes)]], causes)
        given = run.answers[index] if run.answers else None
        other = against.answers[index] if against.answers else None
        sure = run.confidences[index] if run.confidences else None
        verdict = dict.fromkeys(["match", "f1", "length", "holding", "other_match"])
        if gold:
            match, f1 = (None, None) if given is None else judge(given, gold)
            verdict |= {"match": match, "f1": f1, "length": answer_length(gold)}
            verdict["holding"] = sum(flags[:n_read])
            verdict["other_match"] = None if other is None else judge(other, gold)[0]
            more = {"top": any(flags[: min(n_read, 1)]), "p": sure and sure.probability}
            found.verdicts.append(verdict | more)
        found.by_score.add(example, flags)
        by_position = sorted(zip((p.position for p in passages), flags, strict=True))
        found.as_found.add(example, (flag for _, flag in by_position))
        if index == shown[len(found.records) % n_shown]:
            record = {"id": example.id, "question": example.question, "given": given, **verdict}
            record |= {"other": other, "p": sure and sure.probability, "causes": causes}
            record["alternatives"] = sure.alternatives[:MOST_ANSWERS] if sure else []
            found.records.append(record | _evidence(example, flags, n_read, passages_shown))
    same = [ranking for ranking in rankings if ranking.questions == found.by_score.questions]
    found.compared = [ranking.name for ranking in same]
    for index, record in zip(shown, found.records, strict=True):
        record["first"] = [ranking.firsts[index] for ranking in same]
    return found


_MOST_VALUES, _LONGEST_VALUE = 8, 300  # of a passage's other fields


def _attributions(raw: dict[str, Any], example: Example) -> list[float]:
    """How much each of the passages read matters to the answer; [] if that was not computed."""
    read = [passage for passage in example.passages if passage.score is not None]
    causes = [raw["ctxs"][passage.position].get("attribution") for passage in read]
    is_known = all(isinstance(c, int | float) and math.isfinite(c) for c in causes)
    return [float(f"{cause:.3g}") for cause in causes] if is_known else []


def _evidence(
    example: Example, flags: list[bool], n_read: int, passages_shown: int
) -> dict[str, Any]:
    """The rest of a question's record, for the script in `page.html`."""
    ranks = list(range(min(passages_shown, len(flags))))
    if (first := first_hit(flags)) > passages_shown:
        ranks.append(first - 1)
    shown = []
    for rank in ranks:
        passage = example.passages[rank]
        spans = answer_spans(example.answers, passage.text) if flags[rank] else []
        parts, hidden = excerpt(passage.text, spans)
        row = {"k": rank, "found": passage.position + 1, "title": passage.title}
        more = [[name, str(value)[:_LONGEST_VALUE]] for name, value in passage.more.items()]
        shown.append(row | {"parts": parts, "hidden": hidden, "more": more[:_MOST_VALUES]})
    return {
        "right": example.answers[:MOST_ANSWERS],
        "more": max(0, len(example.answers) - MOST_ANSWERS),
        "read": n_read,
        "scores": [None if p.score is None else float(f"{p.score:.4g}") for p in example.passages],
        "flags": "".join("01"[flag] for flag in flags),
        "passages": shown,
    }


def excerpt(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
    """Pieces of a text, every second one a marked answer, and the number of characters left out of
    the middle of long pieces."""
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
    """File names without folder and ending if these are unique, else the paths."""
    names = [Path(path).stem for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
