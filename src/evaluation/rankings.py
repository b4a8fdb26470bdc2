"""How rankings are judged: recall, and agreement with the reader's order."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence

import numpy as np

from src.data.examples import Example, load_data, read_example
from src.evaluation.answers import find_answers, means
from src.runtime.errors import InputError


def first_hit(has_answers: Iterable[bool]) -> int:
    """Rank of the first passage with an answer, from 1; 0 if there is none."""
    return next((rank for rank, has in enumerate(has_answers, start=1) if has), 0)


def judge_ranks(
    gold_ranks: Sequence[int], marks: Sequence[bool], top: Sequence[int], recall_at: Iterable[int]
) -> dict[str, float]:
    """The dev metrics of a retriever for one question, by name; none without passages.
    `inversions`: pairs of passages that retriever and reader order differently; `avg_top`: the
    share of the retriever's first k that are among the reader's first k; `idx_top`: how many of the
    retriever's it takes to include all of the reader's first k.

    Args:
        gold_ranks: the reader's rank (0: highest score) of each passage, in the retriever's order.
        marks: which passages have an answer, in the reader's order; empty if that is unknown.
        top: numbers of passages for overlap and index; recall_at: for recall.
    """
    if not gold_ranks:
        return {}
    pairs = itertools.combinations(gold_ranks, 2)
    values: dict[str, float] = {"inversions": sum(earlier > later for earlier, later in pairs)}
    for k in [k for k in top if k <= len(gold_ranks)]:
        within = [number for number, rank in enumerate(gold_ranks, start=1) if rank < k]
        values[f"avg_top{k}"] = sum(number <= k for number in within) / k
        values[f"idx_top{k}"] = max(within)
    if marks:
        first = first_hit(marks[rank] for rank in gold_ranks)
        values |= {f"recall@{k}": float(0 < first <= k) for k in recall_at}
    return values


class Ranking:
    """Each question's `first_hit`, None without gold answers, and the largest number of passages.
    Rankings of the same questions have equal `questions`."""

    def __init__(self, name: str = ""):
        self.name, self.depth = name, 0
        self.firsts: list[int | None] = []
        self._digest = hashlib.sha256()

    def add(self, example: Example, has_answers: Iterable[bool]) -> None:
        self._digest.update(json.dumps([example.id, example.question]).encode())
        self.firsts.append(first_hit(has_answers) if example.answers else None)
        self.depth = max(self.depth, len(example.passages) if example.answers else 0)

    @property
    def questions(self) -> str:
        return self._digest.hexdigest()

    @property
    def n_judged(self) -> int:
        return sum(first is not None for first in self.firsts)

    def recall(self, k: int) -> float:
        """In percent, over the questions with gold answers."""
        return 100 * sum(0 < (first or 0) <= k for first in self.firsts) / self.n_judged


def rank_answers(path: str, name: str = "", regex_answers: bool = False) -> Ranking:
    """Read a file of questions with passages. Errors: `InputError` when it has no passages, or no
    gold answers."""
    data, ranking = load_data(path, regex_answers=regex_answers), Ranking(name)
    for index in range(len(data)):
        example = read_example(data, index)
        ranking.add(example, find_answers(example.answers, (p.text for p in example.passages)))
    if ranking.depth == 0:
        problem = "no question in this file has both answers and passages (ctxs)"
        raise InputError(f"{path}: {problem}; give what passage_retrieval.py wrote")
    return ranking


def judge_retrieval(
    path: str, ks: Sequence[int], regex_answers: bool = False
) -> tuple[str, dict[str, np.ndarray]]:
    """A digest of the questions, and for those with answers whether the first k passages have one,
    for each k up to the number of passages, [n]. Errors: those of `rank_answers`."""
    ranking = rank_answers(path, regex_answers=regex_answers)
    firsts = np.array([first for first in ranking.firsts if first is not None])
    depths = [k for k in ks if k <= ranking.depth]
    return ranking.questions, {f"recall@{k}": (firsts > 0) & (firsts <= k) for k in depths}


def measure_retrieval(path: str) -> dict[str, float]:
    """Recall@k in percent over the questions of a data file that have answers."""
    return means(judge_retrieval(path, (1, 5, 20, 100))[1])
