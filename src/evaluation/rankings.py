"""How rankings are judged: recall, and agreement with the reader's own order."""

from collections.abc import Sequence

from src.data.examples import load_data, read_example
from src.evaluation.answers import has_answer
from src.runtime.errors import InputError


def count_inversions(gold_ranks: Sequence[int]) -> int:
    """Pairs of passages that the retriever orders otherwise than the reader.

    Args:
        gold_ranks: the reader's rank (0: highest score) of each passage, in the retriever's order.
    """
    return sum(
        earlier > later for place, later in enumerate(gold_ranks) for earlier in gold_ranks[:place]
    )


def top_k_overlap(gold_ranks: Sequence[int], k: int) -> float:
    """Which share of the retriever's first k passages is among the reader's first k."""
    top = gold_ranks[:k]
    return sum(rank < k for rank in top) / len(top)


def last_gold_index(gold_ranks: Sequence[int], k: int) -> int:
    """How many of the retriever's passages hold all of the reader's first k."""
    return max(place for place, rank in enumerate(gold_ranks, start=1) if rank < k)


def recall_at_k(has_answers: Sequence[Sequence[bool]], k: int) -> float:
    """The share of questions with an answer in one of their first k passages, in [0, 1]."""
    return sum(any(flags[:k]) for flags in has_answers) / len(has_answers)


def measure_retrieval(path: str) -> dict[str, float]:
    """Recall at 1, 5, 20 and 100, in percent, over the questions with answers of a data file, as
    far as it has passages. Errors: `InputError` when it has no passages, or no answers."""
    data = load_data(path)
    flags = []
    for index in range(len(data)):
        example = read_example(data, index)
        if example.answers:
            flags.append([has_answer(example.answers, p.text) for p in example.passages])
    depth = max(map(len, flags), default=0)
    if depth == 0:
        raise InputError(
            f"{path}: no question in this file has both answers and passages (ctxs); give what "
            "passage_retrieval.py wrote of questions with answers"
        )
    recalls = {f"recall@{k}": 100 * recall_at_k(flags, k) for k in (1, 5, 20, 100) if k <= depth}
    return {"questions": len(flags), **recalls}
