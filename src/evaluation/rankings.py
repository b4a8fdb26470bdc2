"""How rankings are judged: recall, and agreement with the reader's own order."""

from collections.abc import Iterable, Sequence

from src.data.examples import load_data, read_example
from src.evaluation.answers import find_answers
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


def first_hit(has_answers: Iterable[bool]) -> int:
    """Rank of the first passage with an answer, from 1; 0 if there is none."""
    return next((rank for rank, has in enumerate(has_answers, start=1) if has), 0)


def share_within(first_hits: Sequence[int], k: int) -> float:
    """The share of questions whose `first_hit` is among their first k passages, in [0, 1]."""
    return sum(0 < first <= k for first in first_hits) / len(first_hits)


def recall_at_k(has_answers: Sequence[Sequence[bool]], k: int) -> float:
    """The share of questions with an answer in one of their first k passages, in [0, 1]."""
    return share_within([first_hit(flags) for flags in has_answers], k)


def recalls(has_answers: Sequence[Sequence[bool]], depth: int) -> dict[str, float]:
    """Recall at 1, 5, 20 and 100, in [0, 1], as far as there are passages; {} of no questions."""
    ks = [k for k in (1, 5, 20, 100) if has_answers and k <= depth]
    return {f"recall@{k}": recall_at_k(has_answers, k) for k in ks}


def measure_retrieval(path: str) -> dict[str, float]:
    """`recalls` of a data file's questions with answers, in percent, and how many they are.
    Errors: `InputError` when it has no passages, or no answers."""
    data = load_data(path)
    flags = []
    for index in range(len(data)):
        example = read_example(data, index)
        if example.answers:
            flags.append(list(find_answers(example.answers, (p.text for p in example.passages))))
    depth = max(map(len, flags), default=0)
    if depth == 0:
        raise InputError(
            f"{path}: no question in this file has both answers and passages (ctxs); give what "
            "passage_retrieval.py wrote of questions with answers"
        )
    percent = {name: 100 * value for name, value in recalls(flags, depth).items()}
    return {"questions": len(flags), **percent}
