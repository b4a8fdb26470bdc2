"""How answers and rankings are judged: exact match, F1, answer in passage, recall, agreement.

No torch here, so that data can be evaluated anywhere in a moment.
"""

import functools
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

import regex

_ARTICLES = regex.compile(r"\b(a|an|the)\b", regex.UNICODE)
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
# DPR's tokenizer: a run of letters, digits and combining marks, or one other visible character.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def normalize_answer(text: str) -> str:
    """Lower-case, without ASCII punctuation, articles (a, an, the) and extra white space.

    Source: the SQuAD evaluation (Rajpurkar et al., 2016), as the reference uses it.
    """
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised answers."""
    predicted = normalize_answer(prediction)
    return any(normalize_answer(answer) == predicted for answer in answers)


def _token_f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:  # SQuAD 2.0: nothing agrees with nothing only
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(right)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 between the prediction and one of the answers, in [0, 1].

    Tokens are the words of `normalize_answer`, counted with repetition (Rajpurkar et al., 2016).
    """
    predicted = normalize_answer(prediction).split()
    scores = (_token_f1(predicted, normalize_answer(answer).split()) for answer in answers)
    return max(scores, default=0.0)


def tokenize(text: str) -> list[str]:
    """The lower-cased tokens that `has_answer` compares, after NFD normalisation."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


@functools.lru_cache(maxsize=1 << 16)
def _answer_tokens(answer: str) -> tuple[str, ...]:
    return tuple(tokenize(answer))  # the same answers are looked for in many passages


def has_answer(answers: Sequence[str], text: str) -> bool:
    """Whether one of the answers stands in the text as a run of whole tokens.

    An answer without any token (empty, or only spaces) is in every text, as the reference has it.
    Source: answer recall in DPR (Karpukhin et al., 2020, section 4).
    """
    tokens = tokenize(text)
    for answer in map(_answer_tokens, answers):
        width = len(answer)
        for start in range(len(tokens) - width + 1):
            if tuple(tokens[start : start + width]) == answer:
                return True
    return False


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
